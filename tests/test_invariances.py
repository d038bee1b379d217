"""What must not change a number, and what must: batches, order, workers, seeds, kills, precision, switches, labels out
of sight."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import prepare, small_config
from safetensors.torch import load_file

from smart_iqa import training
from smart_iqa.crops import jitter, normalise
from smart_iqa.data import load_set
from smart_iqa.devices import note_environment
from smart_iqa.files import read_lines
from smart_iqa.frozen import FrozenFeed
from smart_iqa.lab.runs import open_run, run_folder
from smart_iqa.losses import ladder_loss
from smart_iqa.model import HyperIQA, SmartIQA
from smart_iqa.training import CropFeed, Solver, ladders_of, learning_rates, make_model, predict

GOLDEN = json.loads((Path(__file__).parent / "reference" / "golden.json").read_text())["models"]


def train(cfg, folder, frozen=False):
    """Train in a folder; the solver, what it says, and the chosen weights."""
    _, feed, model = prepare(cfg)
    feed = FrozenFeed(model, feed.cache, feed.table, cfg, feed.device) if frozen else feed
    folder.mkdir(exist_ok=True)
    solver = Solver(model, feed, cfg, folder)
    done = solver.fit()
    return solver, done, load_file(folder / "checkpoint.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def journal(folder) -> pd.DataFrame:
    return read_lines(folder / "metrics.jsonl").drop(columns=["seconds", "val_seconds"])


@pytest.fixture
def folder(standin, tmp_path):
    """A copy of the healthy set, to be changed."""
    return shutil.copytree(standin, tmp_path / "set")


def relabel(folder, split, change):
    """Change the scores of one split by a function of them."""
    frame = pd.read_csv(folder / "labels.csv")
    rows = frame.split == split
    frame.loc[rows, "score"] = np.asarray(change(frame.score[rows]))
    frame.to_csv(folder / "labels.csv", index=False)


@pytest.fixture(scope="module")
def trained(standin, tmp_path_factory):
    """A model that was trained long enough for its scores to spread over the scale."""
    cfg = small_config(standin, epochs=8, lr=3e-3, train_crops=2, cache=str(tmp_path_factory.mktemp("cache")))
    solver, _, _ = train(cfg, tmp_path_factory.mktemp("trained"))
    spread = predict(solver.model, solver.feed, "train", 2).pred.std()
    assert spread > 5, (
        f"the stand-in model predicts nearly one number (std {spread:.2f}): its invariances would show nothing"
    )
    return solver


# -- batches, order, workers, precision --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make, crop, n",
    [
        (lambda: SmartIQA(backbone="resnet10t"), 96, 5),
        (lambda: SmartIQA("lite"), 96, 5),
        (lambda: SmartIQA("tiny"), 224, 2),
        (lambda: SmartIQA("tiny", use_attention=False), 96, 3),
        (HyperIQA, 64, 3),
    ],
    ids=["resnet10t", "lite", "tiny", "tiny at 96", "hyperiqa"],
)
def test_batch_of_n_is_n_batches_of_one(make, crop, n):
    """Each crop has its own target network; mixing them up across the batch would show here."""
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(n, 3, crop, crop) * torch.linspace(0.2, 2, n).view(-1, 1, 1, 1)
    with torch.inference_mode():
        together, alone = model(x), torch.cat([model(x[k : k + 1]) for k in range(n)])
    assert (together - alone).abs().max() < min(1e-3, 0.02 * together.std())  # far below what mixed-up crops would show


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_of_prediction(batch_size, trained):
    """Crops of one picture may be torn apart by a batch's end."""
    want = predict(trained.model, trained.feed, "test", 4)
    cfg = small_config(trained.cfg.root, batch_size=batch_size)
    got = predict(trained.model, CropFeed(trained.feed.cache, trained.feed.table, cfg, trained.feed.device), "test", 4)
    pd.testing.assert_frame_equal(got, want, rtol=0, atol=1e-3)


def test_order_of_rows(trained, folder):
    """A label file sorted otherwise gives every picture the same score."""
    frame = pd.read_csv(folder / "labels.csv")
    frame.sample(frac=1, random_state=1).to_csv(folder / "labels.csv", index=False)
    _, feed, _ = prepare(small_config(folder))
    got, want = (predict(trained.model, f, "test", 4) for f in (feed, trained.feed))
    assert list(got.image) != list(want.image)
    pd.testing.assert_frame_equal(
        got.set_index("image").loc[want.image].reset_index(), want, rtol=0, atol=1e-3, check_column_type=False
    )


def test_prediction_is_repeatable(trained):
    """Nothing random is left at test time, whatever the global generators have drawn."""
    first = predict(trained.model, trained.feed, "test", 4)
    torch.rand(100), random.random()
    pd.testing.assert_frame_equal(predict(trained.model, trained.feed, "test", 4), first, check_exact=True)


@pytest.mark.parametrize(
    "values, copies",
    [({}, 0), ({"color_jitter": 0.4}, 0), ({"test_positions": "random"}, 0),
     ({"crop": 48, "ladder": 1.0, "zoom": 1.3}, 40)],
    ids=["plain", "jitter", "random test crops", "ladders"],
)
def test_number_of_workers(values, copies, standin):
    """Workers only cut; what is cut is decided before. Also from the middle of an epoch on, as after a kill."""
    seen = []
    for workers in (0, 2):
        _, feed, _ = prepare(small_config(standin, workers=workers, train_crops=2, **values))
        torch.manual_seed(3)
        batches = [b for first in (0, 3) for b in feed.train_batches(1, first)]
        seen.append((torch.cat([x for x, _ in batches]), torch.cat([r for _, r in batches]),
                     torch.cat(list(feed.test_batches(np.arange(33, 41), 4)))))
    assert len(seen[0][0]) == 50 + 50 - 24 + copies
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_workers_do_not_touch_the_generator(standin):
    """Starting a loader must not draw from the stream that drop-out reads: a resumed epoch starts one loader more."""
    for workers in (0, 2):
        _, feed, _ = prepare(small_config(standin, workers=workers))
        before = torch.get_rng_state()
        list(feed.train_batches(0))
        assert torch.equal(before, torch.get_rng_state()), workers


@pytest.mark.parametrize("values", [{}, {"crop": 48, "ladder": 1.0, "zoom": 1.3}], ids=["plain", "ladders"])
def test_rest_of_an_epoch_is_its_tail(values, standin):
    """A resumed epoch sees exactly the crops that the killed one had not seen, and their damaged copies."""
    _, feed, _ = prepare(small_config(standin, train_crops=3, **values))
    whole, rest = list(feed.train_batches(2)), list(feed.train_batches(2, 4))
    assert len(rest) == len(whole) - 4 == len(feed) - 4
    assert all(torch.equal(a, b) and torch.equal(r, s) for (a, r), (b, s) in zip(whole[4:], rest, strict=True))


def test_ladders_reach_the_loss(standin, tmp_path, monkeypatch):
    """The loss gets the levels at which the feed has damaged the crops of that very batch, and the weights feel it."""
    told, weights = [], []

    def spy(top, rungs, levels, *limits):
        assert limits == (5.0, 15.0)  # points per level, at least and at most
        told.append((rungs.detach().clone(), levels))
        return ladder_loss(top, rungs, levels, *limits)

    monkeypatch.setattr(training, "ladder_loss", spy)
    for ladder in (0.0, 1.0):
        cfg = small_config(standin, ladder=ladder, epochs=1)
        _, feed, model = prepare(cfg)
        (folder := tmp_path / str(ladder)).mkdir()
        Solver(model, feed, cfg, folder).fit()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    sizes = [len(rows) for _, rows in feed.train_batches(0)]
    drawn = [ladders_of(cfg, 0, k, n)[2].tolist() for k, n in enumerate(sizes)]
    assert [levels.tolist() for _, levels in told] == drawn
    assert all(rungs.shape == levels.shape and len(rungs) for rungs, levels in told)
    assert not torch.equal(*weights)


def test_bf16_is_close_to_fp32(trained):
    """The heads stay in fp32, so that bf16 costs less than half a point on the 0-100 scale."""
    want = predict(trained.model, trained.feed, "test", 4)
    cfg = small_config(trained.cfg.root, amp="on")
    got = predict(trained.model, CropFeed(trained.feed.cache, trained.feed.table, cfg, trained.feed.device), "test", 4)
    assert (got.pred != want.pred).any(), "bf16 was not switched on"
    assert (got.pred - want.pred).abs().max() < 0.5


# -- seeds -------------------------------------------------------------------------------------------------------------
HARD = dict(
    color_jitter=0.3, drop_path=0.2, dropout=0.3, accumulate=2, loss="smooth_l1+20*plcc", warmup=0.5
)  # all that draws or counts


@pytest.mark.parametrize("frozen", [False, True])
def test_seed(frozen, standin, tmp_path):
    """The same seed gives the same bits, another seed others; a different global state before makes no difference."""
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(len(runs) + 1)
        values = {k: v for k, v in HARD.items() if k != "color_jitter" or not frozen}
        runs[name] = train(small_config(standin, seed=seed, frozen=frozen, **values), tmp_path / name, frozen)[2]
    assert same(runs["a"], runs["b"])
    assert not same(runs["a"], runs["c"])
    assert journal(tmp_path / "a").equals(journal(tmp_path / "b")) and not journal(tmp_path / "a").equals(
        journal(tmp_path / "c")
    )


def test_machine_settings_do_not_change_the_run(standin, tmp_path):
    """Workers and the cache folder are no part of a run's name, so they must not be part of its result."""
    a = small_config(standin, **HARD)
    b = small_config(standin, **HARD, workers=2, cache=str(tmp_path / "elsewhere"), checkpoint_minutes=0)
    assert run_folder(a, load_set(a)) == run_folder(b, load_set(b))
    assert same(train(a, tmp_path / "a")[2], train(b, tmp_path / "b")[2])


# -- kills -------------------------------------------------------------------------------------------------------------
CHILD = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from conftest import prepare, small_config
from smart_iqa.training import Solver
cfg = small_config(sys.argv[2], **json.loads(sys.argv[4]))
_, feed, model = prepare(cfg)
print(json.dumps(Solver(model, feed, cfg, sys.argv[3]).fit()))
"""


@pytest.mark.slow
def test_run_killed_at_random_equals_a_whole_run(standin, tmp_path):
    """SIGKILL, twice, at a random time; after the last restart weights and journal are those of a run that nobody
    touched."""
    values = HARD | dict(epochs=4, train_crops=2, checkpoint_minutes=0, cache=str(tmp_path / "cache"))
    _, want, weights = train(small_config(standin, **values), tmp_path / "whole")
    (killed := tmp_path / "killed").mkdir()
    argv = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(standin), str(killed), json.dumps(values)]
    delays, kills = [random.uniform(0, 0.6) for _ in range(2)], 0
    for delay in delays:
        seen = (killed / "resume.pt").stat().st_mtime_ns if (killed / "resume.pt").exists() else 0
        child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and (
            not (killed / "resume.pt").exists() or (killed / "resume.pt").stat().st_mtime_ns == seen
        ):
            time.sleep(0.002)
        time.sleep(delay)
        child.kill()
        _, err = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), err
        kills += child.returncode != 0
    assert kills, f"the run was over before it could be killed (delays {delays})"
    last = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    assert json.loads(last.stdout)["best_epoch"] == want["best_epoch"]
    assert same(weights, load_file(killed / "checkpoint.safetensors")), f"kills after {delays}"
    pd.testing.assert_frame_equal(journal(killed), journal(tmp_path / "whole"), check_exact=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "where",
    ["before a resume point", "after a resume point", "between checkpoint and resume point", "after the last epoch"],
)
def test_killed_at_an_awkward_moment(where, standin, tmp_path, monkeypatch):
    """The moments that a random kill seldom hits."""
    values = HARD | dict(epochs=3, checkpoint_minutes=0)
    want = train(small_config(standin, **values), tmp_path / "whole")[2]
    _, feed, model = prepare(cfg := small_config(standin, **values))
    (killed := tmp_path / "killed").mkdir()
    solver, save, count = Solver(model, feed, cfg, killed), training.save_resume_point, [0]

    def stop(solver):
        count[0] += 1
        n = {
            "before a resume point": 2,
            "after a resume point": 3,
            "between checkpoint and resume point": 6,
            "after the last epoch": 9,
        }[where]
        if where == "after a resume point" or where == "after the last epoch":
            save(solver)
        if count[0] == n:
            raise Killed
        if where in ("before a resume point", "between checkpoint and resume point"):
            save(solver)

    monkeypatch.setattr(training, "save_resume_point", stop)
    with pytest.raises(Killed):
        solver.fit()
    monkeypatch.undo()
    assert same(train(cfg, killed)[2], want)
    pd.testing.assert_frame_equal(journal(killed), journal(tmp_path / "whole"), check_exact=True)


def test_finished_run_is_not_trained_again(standin, tmp_path):
    """Starting the same command once more returns the same model."""
    cfg = small_config(standin)
    _, done, weights = train(cfg, tmp_path)
    _, again, later = train(cfg, tmp_path)
    assert again == done and same(weights, later) and list(journal(tmp_path).epoch) == [1, 2]


# -- labels out of sight -----------------------------------------------------------------------------------------------
def test_test_labels_do_not_reach_the_weights(folder, tmp_path):
    """The original chose its epoch on the test set. Here other test labels leave every bit of the run as it is."""
    cfg = small_config(folder, epochs=4, lr=3e-3, patience=2)
    _, done, weights = train(cfg, tmp_path / "a")
    relabel(folder, "test", lambda s: 100 - s)
    _, done_2, weights_2 = train(cfg, tmp_path / "b")
    assert same(weights, weights_2) and done["best_epoch"] == done_2["best_epoch"]
    assert journal(tmp_path / "a").equals(journal(tmp_path / "b"))


@pytest.mark.parametrize("protocol, chosen_on, other", [("default", "val", "test"), ("legacy", "test", "val")])
def test_part_that_chooses_the_epoch(protocol, chosen_on, other, folder, tmp_path):
    """Turned round, the labels of the choosing split turn best into worst; they never reach a gradient.

    The other split's do nothing."""
    cfg = small_config(folder, epochs=5, lr=3e-3, protocol=protocol, fit="short", test_positions="grid")
    solver, done, _ = train(cfg, tmp_path / "a")
    assert solver.history[done["best_epoch"] - 1]["val_srcc"] == max(r["val_srcc"] for r in solver.history)
    assert len({r["val_srcc"] for r in solver.history}) > 1, "all epochs are equally good: the test would see nothing"
    relabel(folder, chosen_on, lambda s: 100 - s)
    turned, done_2, _ = train(cfg, tmp_path / "b")
    assert done_2["best_epoch"] != done["best_epoch"]
    np.testing.assert_allclose(
        [r["val_srcc"] for r in turned.history], [-r["val_srcc"] for r in solver.history], atol=1e-9
    )
    assert [r["train_loss"] for r in turned.history] == [r["train_loss"] for r in solver.history]
    relabel(folder, chosen_on, lambda s: 100 - s)
    relabel(folder, other, lambda s: 100 - s)
    assert train(cfg, tmp_path / "c")[1]["best_epoch"] == done["best_epoch"]


@pytest.mark.parametrize("protocol, split", [("default", "val"), ("legacy", "test")])
def test_splits_that_training_looks_at(protocol, split, standin, tmp_path, monkeypatch):
    """By default the test split is not even scored while training."""
    seen = []
    monkeypatch.setattr(
        "smart_iqa.training.predict", lambda m, f, split, *a, **k: seen.append(split) or predict(m, f, split, *a, **k)
    )
    train(small_config(standin, protocol=protocol, size=64, crop=64), tmp_path)
    assert seen == [split] * 2


# -- published defects, one at a time ----------------------------------------------------------------------------------
def test_the_defects_of_the_published_protocol_are_switches(standin, tmp_path):
    """Choosing on test, alone, changes what chooses and nothing that is learned."""
    cfg = small_config(standin, epochs=4, lr=3e-3)
    train(cfg, tmp_path / "a")
    train(replace(cfg, choose_on="test"), tmp_path / "b")
    assert set(journal(tmp_path / "b").chosen_on) == {"test"} and set(journal(tmp_path / "a").chosen_on) == {"val"}
    assert list(journal(tmp_path / "a").train_loss) == list(journal(tmp_path / "b").train_loss)


def test_the_floor_lifts_the_learning_rate(standin):
    """A floor above the rate: the backbone's rises to it; without a floor it falls to nothing."""
    cfg = small_config(standin, epochs=4, lr=1e-3, schedule="cosine", warmup=0.0)
    first, last = (learning_rates(replace(cfg, lr_floor=2e-3), step, 10)[0] for step in (0, 39))
    assert last > first and learning_rates(cfg, 39, 10)[0] < 1e-5


def test_the_rebuilt_optimizer_loses_the_new_parts(standin, tmp_path):
    """HyperIQA's defect: from the second epoch on the new parts stay as they are, the backbone goes on; our way both
    learn."""

    def moved(**switch):
        weights = []
        for epochs in (1, 2):
            cfg = small_config(standin, epochs=epochs, lr=1e-3, schedule="constant", patience=0, **switch)
            folder = tmp_path / f"{epochs}{len(switch)}"
            weights.append(
                {
                    k: v.clone()
                    for k, v in last_weights(cfg, folder).items()
                    if v.is_floating_point() and "running" not in k
                }
            )
        changed = {k for k in weights[0] if not torch.equal(weights[0][k], weights[1][k])}
        return {
            "backbone": any(k.startswith("backbone.") for k in changed),
            "new": any(not k.startswith("backbone.") for k in changed),
        }

    assert moved() == {"backbone": True, "new": True}
    assert moved(rebuild_optimizer=True) == {"backbone": True, "new": False}


def last_weights(cfg, folder) -> dict:
    """The weights at the end of training, whichever epoch was best."""
    _, feed, model = prepare(cfg)
    folder.mkdir()
    Solver(model, feed, cfg, folder).fit()
    return torch.load(folder / "resume.pt", weights_only=True)["model"]


@pytest.mark.parametrize("at", [1, 4])
def test_a_killed_run_with_a_rebuilt_optimizer_goes_on(at, standin, tmp_path, monkeypatch):
    """Killed in the first epoch (both groups) or in the second (one group): the same bits as undisturbed."""
    cfg = small_config(standin, epochs=3, lr=1e-3, patience=0, rebuild_optimizer=True, checkpoint_minutes=0.0)
    want = last_weights(cfg, tmp_path / "whole")
    _, feed, model = prepare(cfg)
    (killed := tmp_path / "killed").mkdir()
    save, count = training.save_resume_point, [0]

    def stop(solver):
        save(solver)
        count[0] += 1
        if count[0] == at:
            raise Killed

    monkeypatch.setattr(training, "save_resume_point", stop)
    with pytest.raises(Killed):
        Solver(model, feed, cfg, killed).fit()
    monkeypatch.undo()
    _, feed, model = prepare(cfg)
    Solver(model, feed, cfg, killed).fit()
    assert same(torch.load(killed / "resume.pt", weights_only=True)["model"], want)


# -- switches ----------------------------------------------------------------------------------------------------------
SWITCHES = {
    "single": dict(use_multiscale=False, use_attention=False),
    "concat": dict(use_attention=False),
    "attention": {},
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_switches_change_the_parameters(name):
    """Each switch adds and removes exactly the published parts, counted to the last parameter."""
    size, _, variant = name.partition("-")
    with torch.device("cpu"):
        model = HyperIQA() if name == "hyperiqa" else SmartIQA(size, **SWITCHES[variant])
    assert sum(p.numel() for p in model.parameters()) == GOLDEN[name]["parameters"]
    assert (model.head.gate is None) == (variant != "attention")


def test_attention_needs_stages():
    with pytest.raises(ValueError, match="use_attention"):
        SmartIQA("tiny", use_multiscale=False)


def test_attention_reaches_the_score(trained):
    """A gate that were computed and not used would leave the score alone."""
    x, _ = next(iter(trained.feed.train_batches(0)))
    with torch.inference_mode():
        before = trained.model.eval()(x)
        bias = trained.model.head.gate.net[3].bias
        kept = bias.clone()
        bias += torch.tensor([3.0, 0, 0, 0])
        after = trained.model(x)
        bias.copy_(kept)
    assert (before - after).abs().max() > 0.1


def _windows(feed, flip):
    """Every crop of the training plan, cut by hand."""
    cache = feed.cache
    plan = [(x, int(r)) for xs, rs in feed.train_batches(0) for x, r in zip(xs, rs, strict=True)]
    found = []
    for x, row in plan:
        pixels = normalise(torch.from_numpy(np.ascontiguousarray(cache[row])).permute(2, 0, 1)[None])[0]
        wide = pixels.unfold(1, 64, 1).unfold(2, 64, 1)  # 3, y, x, 64, 64
        hit = [bool((wide == v[:, None, None]).flatten(3).all(3).all(0).any()) for v in (x, x.flip(2))]
        found.append(hit)
    return np.array(found)


@pytest.mark.parametrize("flip", [True, False])
def test_flip(flip, standin):
    """Off: every crop is a piece of the picture. On: about half are mirrored, and none is anything else."""
    _, feed, _ = prepare(small_config(standin, flip=flip, train_crops=2))
    plain, mirrored = _windows(feed, flip).T
    assert (plain | mirrored).all()
    assert plain.all() if not flip else 10 <= mirrored.sum() <= 40 and not plain.all()


def test_color_jitter(standin):
    """Zero leaves every pixel; more changes training crops, each otherwise, and never those that are scored."""
    crops = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    assert jitter(crops, 0) is crops
    one = jitter(crops[:1].expand(6, -1, -1, -1), 0.5)
    assert one.dtype == torch.uint8 and len({t.numpy().tobytes() for t in one}) == 6
    (_, plain, _), (_, jittered, _) = (prepare(small_config(standin, color_jitter=j)) for j in (0, 0.4))
    (a, rows_a), (b, rows_b) = (next(iter(f.train_batches(0))) for f in (plain, jittered))
    assert torch.equal(rows_a, rows_b) and not torch.equal(a, b)
    assert all(
        torch.equal(x, y)
        for x, y in zip(plain.test_batches(np.arange(3), 4), jittered.test_batches(np.arange(3), 4), strict=True)
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "positions, per_picture, moves", [("grid", 6, False), ("center", 1, False), ("random", 6, True)]
)
def test_test_positions(positions, per_picture, moves, frozen, standin):
    """Where test crops lie: the grid and the centre do not depend on the seed, the published way does.

    Frozen features obey too."""
    got = []
    for seed in (1, 2):
        cfg = small_config(standin, seed=seed, test_positions=positions, frozen=frozen)
        _, feed, _ = prepare(cfg)
        model = make_model(small_config(standin, seed=0)).eval()
        feed = FrozenFeed(model, feed.cache, feed.table, cfg, feed.device) if frozen else feed
        p = predict(model, feed, "test", 6)
        batches = list(feed.test_batches(np.arange(33, 41), 6))
        assert sum(len(b[0]) if frozen else len(b) for b in batches) == 8 * per_picture
        assert p.pred_std.isna().all() == (per_picture == 1)
        got.append(p.pred)
    assert (got[0] != got[1]).any() == moves


def test_frozen_features_score_as_the_whole_model(standin):
    """The short cut is the same model: only fp16 storage lies between."""
    cfg = small_config(standin)
    _, feed, model = prepare(cfg)
    frozen = FrozenFeed(model.eval(), feed.cache, feed.table, cfg, feed.device)
    np.testing.assert_allclose(predict(model, frozen, "test", 4).pred, predict(model, feed, "test", 4).pred, atol=0.1)


def test_frozen_backbone_stays(standin, tmp_path):
    """Frozen: not one bit of the backbone moves, batch norm statistics included, while the heads do."""
    cfg = small_config(standin, frozen=True)
    before = {k: v.clone() for k, v in prepare(cfg)[2].state_dict().items()}
    _, _, after = train(cfg, tmp_path, frozen=True)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and not any(k.startswith("backbone.") for k in moved)


@pytest.mark.parametrize("freeze", [False, True])
def test_freeze_batchnorm(freeze, standin, tmp_path):
    """Running statistics move or stay as the switch says; the backbone's weights are trained either way."""
    cfg = small_config(standin, freeze_batchnorm=freeze, epochs=1)
    before = {k: v.clone() for k, v in prepare(cfg)[2].state_dict().items()}
    _, _, after = train(cfg, tmp_path)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert any("running_mean" in k for k in moved) != freeze
    assert any(k.startswith("backbone.") and "weight" in k for k in moved)


@pytest.mark.parametrize(
    "name, value",
    [
        ("dropout", 0.5),
        ("clip", 1e-3),
        ("accumulate", 2),
        ("warmup", 1.0),
        ("optimizer", "adam"),
        ("schedule", "constant"),
        ("alpha", 1.0),
        ("loss", "l2"),
        ("weight_decay", 0.5),
        ("head_lr_ratio", 10.0),
        ("eta_min", 0.5),
        ("start_at_mean", False),
        ("train_crops", 2),
        ("flip", False),
        ("color_jitter", 0.3),
        ("batch_size", 5),
        ("use_attention", False),
    ],
)
def test_every_switch_changes_the_training(name, value, standin, tmp_path_factory, _plain_run):
    """A parameter that changes nothing is a lie in the record. Two short runs that differ in it alone must differ."""
    cfg = small_config(standin, **BASE | {name: value})
    assert not same(train(cfg, tmp_path_factory.mktemp("run"))[2], _plain_run)


BASE = dict(drop_path=0.0, dropout=0.0, epochs=2, lr=1e-3, loss="smooth_l1")


@pytest.fixture(scope="module")
def _plain_run(standin, tmp_path_factory):
    return train(small_config(standin, **BASE), tmp_path_factory.mktemp("run"))[2]


@pytest.mark.parametrize("size", ["tiny", "lite"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_drop_path(size, rate):
    """Stochastic depth: with it, two passes in training differ; without it (and without drop-out), they are one."""
    model = SmartIQA(size, use_attention=False, drop_path=rate, dropout=0.0).train()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), model(x)) == (rate == 0)


def test_frozen_features_cannot_be_jittered(standin):
    """Features are computed once, from plain crops: the switch must be refused, not ignored."""
    with pytest.raises(ValueError, match="color_jitter"):
        cfg = small_config(standin, frozen=True, color_jitter=0.3)
        _, feed, model = prepare(cfg)
        FrozenFeed(model, feed.cache, feed.table, cfg, feed.device)


def test_accumulated_batches_are_one_large_batch(standin, tmp_path):
    """8 + 8 + 8 accumulated thrice is a batch of 24, as long as nothing looks across the batch (batch norm is kept)."""
    values = dict(
        freeze_batchnorm=True, dropout=0.0, loss="l1", epochs=1, clip=0, flip=False, optimizer="adam", limit=24, lr=1e-4
    )
    a = train(small_config(standin, batch_size=24, **values), tmp_path / "a")[2]
    b = train(small_config(standin, batch_size=8, accumulate=3, **values), tmp_path / "b")[2]
    worst = max((a[k].float() - b[k].float()).abs().max().item() for k in a)
    start = prepare(small_config(standin, **values))[2].state_dict()
    moved = max((a[k].float() - start[k].float()).abs().max().item() for k in a)
    share = np.mean([((a[k] - b[k]).abs() < 1e-6).float().mean().item() for k in a if a[k].is_floating_point()])
    assert (
        moved > 5e-5 and worst <= 2.1e-4 and share > 0.95
    )  # Adam's first step is lr * sign: tiny gradients may differ in sign


def test_the_checkpoint_is_of_the_best_epoch_that_was_written_down(standin, tmp_path, monkeypatch):
    """Killed between the weights of a best epoch and its resume point; validated again, on another device say, that
    epoch is not the best."""
    values, evaluate, cfg = iter([0.5, 0.9, 0.4]), training.evaluate, small_config(standin, seed=0)
    monkeypatch.setattr(training, "evaluate", lambda *a, **k: evaluate(*a, **k) | dict(srcc=next(values)))
    images, feed, model = prepare(cfg)
    folder = open_run(tmp_path / "run", cfg, images, keep=False)
    first, save, kept = Solver(model, feed, cfg, folder), training.save_resume_point, {}

    def killed(solver):
        if solver.state["epoch"] == 2:
            raise KeyboardInterrupt
        save(solver)
        kept.update({k: v.clone() for k, v in solver.model.state_dict().items()})

    monkeypatch.setattr(training, "save_resume_point", killed)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    monkeypatch.setattr(training, "save_resume_point", save)
    _, feed, model = prepare(cfg)
    second = Solver(model, feed, cfg, folder)
    assert second.fit()["best_epoch"] == 1 and all(
        torch.equal(v, kept[k]) for k, v in second.model.state_dict().items()
    )
    assert not list(folder.glob(".best-*"))


def test_a_solver_that_trains_nothing_notes_nothing(standin, tmp_path):
    """Several processes stopped early for want of patience; the one that reads their result has trained nothing."""
    cfg = small_config(standin, epochs=6, patience=1, lr=1e-9)
    for _ in range(2):
        images, feed, model = prepare(cfg)
        folder = tmp_path / "run"
        if not folder.exists():
            open_run(folder, cfg, images, keep=False)
        outcome = Solver(model, feed, cfg, folder).fit()
        note_environment(folder, processes=2)
    assert outcome["stopped"] == "no better epoch in 1"
    assert "resumed" not in json.loads((folder / "environment.json").read_text())

"""What is read out of finished runs: the analysis module on predictions that can be computed by hand, and its three
notebooks end to end."""

import json

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import without_kernels
from scipy import stats

from smart_iqa.demo import DEMO_NOTE
from smart_iqa.lab.analysis import (
    SMALL,
    all_of,
    bin_means,
    content_tests,
    correlations,
    gate_values,
    kinds_of,
    open_seeds,
    opinion_noise,
    picture_statistics,
    triage_claims,
    verdict,
    worst_cases,
)
from smart_iqa.lab.compare import VERDICTS, summarise
from smart_iqa.lab.runs import execute, read_run, run_digest

TINY = dict(
    profile="demo",
    limit=24,
    epochs=1,
    train_crops=1,
    val_crops=1,
    test_crops=2,
    batch_size=8,
    crop=64,
    size=64,
    amp="off",
    baseline=False,
    pretrained="none",
    checkpoint_minutes=5.0,
    threads=1,
)


def table(a3=None, n=200, seed=0):
    """Predictions of a run: the true score is the row, the gate gives `a3` to stage 3 and shares the rest evenly."""
    score = np.linspace(0, 100, n)
    a3 = np.linspace(0.25, 0.999, n) if a3 is None else a3
    noise = np.random.default_rng(seed).normal(0, 8, n)
    names, rest = [f"p{k:03}.png" for k in range(n)], (1 - a3) / 3
    return pd.DataFrame(
        dict(
            image=names,
            score=score,
            std=20.0,
            votes=100,
            ref=names,
            split="test",
            pred=50 + 0.7 * (score - 50) + noise,
            pred_std=1.0,
            a1=rest,
            a2=rest,
            a3=a3,
            a4=rest,
            near_duplicate=False,
        )
    )


def write_run(folder, seed, predictions, **config):
    """A folder as a finished run leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(seed=seed, dataset="csv", threads=3) | config))
    (folder / "environment.json").write_text("{}")
    record = dict(
        run_id=folder.name,
        method="SMART-lite",
        dataset="csv",
        profile="lite",
        seed=seed,
        note="made for a test",
        **summarise(predictions, 0),
    )
    (folder / "record.json").write_text(json.dumps(record))
    predictions.to_csv(folder / "predictions.csv", index=False)
    return folder


@pytest.fixture
def two(tmp_path):
    """Two seeds whose gate is exactly monotone in quality."""
    return [write_run(tmp_path / f"s{s}", s, table(seed=s)) for s in (0, 1)]


def verdicts(runs):
    return [c["verdict"] for c in triage_claims(runs)]


def test_a_gate_that_follows_quality_holds(two):
    """a3 rises with the true score without exception: correlation 1 with interval [1, 1], all parts hold, and seeds
    agree."""
    runs = open_seeds(two, n_boot=200)
    rho = correlations({"a3": gate_values(runs)["a3"]}, runs.score, **runs.resampling).set_index("seed")
    assert rho.rho["mean"] == pytest.approx(1) and rho.low["mean"] == pytest.approx(1)
    assert verdicts(runs) == ["holds"] * 5


def test_a_constant_gate_does_not(tmp_path):
    """The same weights for every picture: no relation, nothing nearly all on stage 3, and balance alone is no
    triage."""
    flat = open_seeds([write_run(tmp_path / f"s{s}", s, table(np.full(200, 0.25), seed=s)) for s in (0, 1)], n_boot=200)
    assert verdicts(flat) == ["does not hold", "does not hold", "holds", "does not hold", "does not hold"]


def test_a_gate_the_wrong_way_round_does_not(tmp_path):
    """Good pictures spread, bad ones on stage 3: the opposite of the claim is not the claim."""
    assert (
        verdicts(open_seeds([write_run(tmp_path / "r", 0, table(np.linspace(0.999, 0.25, 200)))], n_boot=200))[:4]
        == ["does not hold"] * 4
    )


def test_a_weak_relation_on_few_pictures_is_not_decided(tmp_path):
    """24 pictures and a correlation that may be 0 or .5: neither yes nor no."""
    a3 = 0.3 + 0.1 * np.random.default_rng(3).permutation(24) / 24 + 0.02 * np.linspace(0, 1, 24)
    assert verdicts(open_seeds([write_run(tmp_path / "r", 0, table(a3, n=24))]))[0] == "not decided"


def test_rows_have_no_order(two, tmp_path):
    """Shuffled predictions give the same tables to the last bit, bootstrap included."""
    mixed = [write_run(tmp_path / "mixed" / f"s{s}", s, table(seed=s).sample(frac=1, random_state=s)) for s in (1, 0)]
    a, b = (open_seeds(folders, n_boot=100) for folders in (two, mixed))
    assert triage_claims(a) == triage_claims(b)
    pd.testing.assert_frame_equal(
        bin_means(a.score, dict(pred=a.values("pred")), **a.resampling),
        bin_means(b.score, dict(pred=b.values("pred")), **b.resampling),
    )
    pd.testing.assert_frame_equal(worst_cases(a), worst_cases(b))


def test_a_changed_prediction_changes_the_table(two, tmp_path):
    """One prediction of one seed moved by 90 points is found: in its bin, and on top of the worst cases."""
    changed = table(seed=1)
    changed.loc[7, "pred"] += 180
    a, b = open_seeds(two), open_seeds([two[0], write_run(tmp_path / "changed", 1, changed)])
    before, after = (bin_means(r.score, dict(bias=r.values("pred") - r.score), 10, 0) for r in (a, b))
    assert after.bias[0] - before.bias[0] == pytest.approx(180 / 2 / 20) and (after.bias[1:] == before.bias[1:]).all()
    assert worst_cases(b).image[0] == "p007.png" and worst_cases(a).image[0] != "p007.png"


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(predictions=lambda t: t.head(190)), "other: its test images"),
        (
            dict(predictions=lambda t: t.assign(score=t.score.where(t.index != 3, 50))),
            "other: its test images or their scores",
        ),
        (dict(config=dict(lr=1)), r"other: is of another configuration than s0 \(lr\)"),
        (dict(seed=0), "one seed"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(two, tmp_path, change, why):
    """Fewer pictures, other scores, another learning rate, the same seed twice: each error names the run.

    The machine may differ."""
    other = write_run(
        tmp_path / "other",
        change.get("seed", 2),
        change.get("predictions", lambda t: t)(table(seed=2)),
        threads=1,
        **change.get("config", {}),
    )
    with pytest.raises(ValueError, match=why):
        open_seeds([two[0], other])


def test_runs_without_anything_are_refused():
    with pytest.raises(ValueError, match="give runs="):
        open_seeds(None)


def test_few_scenes_give_no_interval_and_no_verdict(tmp_path):
    """Nine scenes: every verdict says that it cannot be tested; ten scenes are resampled as scenes and give wider
    intervals than pictures would."""

    def scenes(k): return table().assign(ref=lambda t: (t.index % k).astype(str))

    nine, ten = (open_seeds([write_run(tmp_path / str(k), 0, scenes(k))], n_boot=300) for k in (9, 10))
    assert (
        set(verdicts(nine)) == {"cannot be tested here"} and ten.resampled == "scenes" and verdicts(ten)[0] == "holds"
    )
    noisy = ten.score + 200 * np.random.default_rng(0).normal(size=10)[np.arange(200) % 10]
    by_scene, by_picture = (correlations({"x": noisy}, ten.score, 300, g).iloc[-1] for g in (ten.labels.ref, None))
    assert by_scene.high - by_scene.low > 0 and by_scene.rho == by_picture.rho and by_scene.low != by_picture.low


def test_an_interval_decides():
    """The four verdicts, and that one failing part brings a claim down."""
    assert [verdict(*x, SMALL) for x in ((0.1, 0.3), (-0.3, 0.09), (0.09, 0.11), (np.nan, np.nan))] == list(VERDICTS)
    assert VERDICTS == ("holds", "does not hold", "not decided", "cannot be tested here")
    assert (
        verdict(-0.5, -0.2, SMALL, either=True) == "holds" and verdict(-0.5, 0.05, SMALL, either=True) == "not decided"
    )
    assert all_of(["holds", "does not hold", "cannot be tested here"]) == "does not hold"


def test_noise_of_votes():
    """20 points of spread over 100 votes are 2 points of error of a score; without votes nothing is said."""
    t = table()
    noise = opinion_noise(t)
    assert noise["rmse"] == pytest.approx(2) and noise["reliability"] == pytest.approx(1 - 4 / t.score.var())
    assert noise["bias"][0] > 0 > noise["bias"][-1] and noise["mae"].mean() == pytest.approx(
        2 * np.sqrt(2 / np.pi), rel=0.01
    )
    assert opinion_noise(t.assign(votes=np.nan)) is None and opinion_noise(t.drop(columns="votes")) is None


def test_statistics_of_known_pictures():
    """A checkerboard: brightness and contrast by hand, no colour, and sharper than the same in soft."""
    board = np.repeat((255 * (np.indices((32, 32)).sum(0) % 2)).astype(np.uint8)[..., None], 3, 2)
    of = picture_statistics(board)
    assert (
        of["brightness"] == pytest.approx(127.5)
        and of["contrast"] == pytest.approx(127.5)
        and of["colourfulness"] == pytest.approx(0, abs=1e-9)
    )
    assert of["sharpness"] > picture_statistics(board // 2)["sharpness"] > 0
    assert list(kinds_of(pd.Series(["Images/ss01 (2).jpg", "Images/ss03 (9).jpg"]), "biq2021")) == ["ss01", "ss03"]


def test_content_is_found_where_it_is():
    """An error made of brightness is found in brightness and not in a column of chance; the table's p-values are
    corrected together."""
    rng = np.random.default_rng(0)
    content = pd.DataFrame(dict(brightness=rng.uniform(0, 255, 300), chance=rng.normal(size=300)))
    error = (content.brightness.to_numpy() - 128)[None] / 20 + rng.normal(0, 3, (2, 300))
    t = content_tests(error, content, 400).set_index(["statistic", "of"])
    assert t.p_holm["brightness", "error"] == pytest.approx(4 * t.p["brightness", "error"])
    assert t.p_holm["brightness", "error"] < 0.05 < t.p_holm["chance", "error"]


# --- the notebooks ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One tiny run on the demo set, and the three notebooks about it: name to folder, and the run's own folder."""
    out, cache = tmp_path_factory.mktemp("analysis"), str(tmp_path_factory.mktemp("cache"))
    with without_kernels():
        run = execute("train", TINY | dict(cache=cache), out=out, echo=None)
    return {
        x: execute(x, dict(runs=str(run), cache=cache, threads=1), out=out, echo=None)
        for x in ("attention", "features", "errors")
    } | dict(run=run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "features", "errors"])
def test_a_notebook_leaves_what_the_report_reads(demo, name):
    """The record's keys, its digest of the run, verdicts of the known kind, every table in three forms with the demo's
    note, every figure in two."""
    folder = demo[name]
    record = json.loads((folder / "record.json").read_text())
    assert {"run_id", "method", "dataset", "profile", "note", "seeds", "inputs", "missing", "claims"} <= set(record)
    assert (record["run_id"], record["method"], record["dataset"], record["note"]) == (
        folder.name,
        name,
        "demo",
        DEMO_NOTE,
    )
    assert record["inputs"] == {demo["run"].name: run_digest(demo["run"])}
    assert record["claims"] and {c["verdict"] for c in record["claims"]} == {"cannot be tested here"}  # one scene
    assert any("too few for an interval" in m for m in record["missing"])
    stems = {p.stem for p in (folder / "tables").iterdir()}
    assert "claims" in stems and {p.name for p in (folder / "tables").iterdir()} == {
        f"{s}.{e}" for s in stems for e in ("md", "tex", "csv")
    }
    assert all(DEMO_NOTE in (folder / "tables" / f"{s}.md").read_text() for s in stems)
    assert {p.suffix for p in (folder / "figures").iterdir()} == {".pdf", ".png"} and (folder / "photos").is_dir()
    nb = nbformat.read(folder / "run.ipynb", 4)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    shown = sum("image/png" in o.get("data", {}) for o in outputs)
    assert shown == len(list((folder / "figures").glob("*.png")))  # what is under photos/ is shown nowhere
    assert sum(DEMO_NOTE in "".join(o.get("data", {}).get("text/markdown", "")) for o in outputs) >= 2
    assert nb.cells[-1].outputs[0]["text"].startswith("record:")


@pytest.mark.slow
def test_the_tables_are_of_the_predictions(demo):
    """Computed here once more from predictions.csv."""
    p = read_run(demo["run"])["predictions"].query("split == 'test'")
    went = pd.read_csv(demo["attention"] / "tables" / "correlations.csv").query("seed == 'mean'").set_index("quantity")
    assert went.rho["stage 3"] == pytest.approx(stats.spearmanr(p.a3, p.score)[0]) and went.low.isna().all()
    bias = pd.read_csv(demo["errors"] / "tables" / "by_quality.csv")
    assert (bias.n * bias.bias).sum() == pytest.approx((p.pred - p.score).sum())
    worst = pd.read_csv(demo["errors"] / "tables" / "worst.csv")
    assert worst.error.abs().iloc[0] == pytest.approx((p.pred - p.score).abs().max())
    listed = pd.read_csv(demo["features"] / "tables" / "pictures.csv")
    assert set(listed.picture[listed.quality == "worst"]) == set(p.sort_values(["score", "image"]).image[:3])


def test_a_model_without_a_gate_is_a_record_and_no_crash(tmp_path):
    """The attention notebook of a run whose weights are NaN says why there is nothing, and the report can read it."""
    bare = write_run(tmp_path / "bare", 0, table().assign(a1=np.nan, a2=np.nan, a3=np.nan, a4=np.nan))
    with without_kernels():
        folder = execute("attention", dict(runs=str(bare), resamples=50, threads=1), out=tmp_path / "out", echo=None)
    record = json.loads((folder / "record.json").read_text())
    assert any("no gate" in m for m in record["missing"]) and [c["verdict"] for c in record["claims"]] == [
        "cannot be tested here"
    ]


def test_errors_beside_the_noise_of_votes(tmp_path):
    """Where a set counts its votes: 40 points of spread over 64 votes are 5 points, and the model's errors are found to
    be larger. No picture is at hand."""
    folders = [write_run(tmp_path / f"s{s}", s, table(seed=s).assign(std=40.0, votes=64)) for s in (0, 1)]
    asked = dict(runs=",".join(map(str, folders)), resamples=200, threads=1)
    with without_kernels():
        folder = execute("errors", asked, out=tmp_path / "out", echo=None)
    record = json.loads((folder / "record.json").read_text())
    noisy = next(c for c in record["claims"] if "noise of opinions" in c["claim"])
    error = np.mean([np.abs(t.pred - t.score).mean() for t in map(table, [None] * 2, [200] * 2, (0, 1))])
    assert (
        noisy["verdict"] == "holds"
        and noisy["measured"].startswith(f"{error:.2f} [")
        and "noise alone 3.9" in noisy["measured"]
    )  # 5 sqrt(2 / pi)
    assert any("image set is not at hand" in m for m in record["missing"]) and not any(
        "votes" in m for m in record["missing"]
    )
    bins = pd.read_csv(folder / "tables" / "by_quality.csv")
    assert bins.noise_bias.iloc[0] > 0 > bins.noise_bias.iloc[-1] and (bins.mae > bins.noise_mae).mean() > 0.5

"""The scorer: one score per picture whatever surrounds it, local maps, intervals, and the packaged model."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_image

import smart_iqa
from smart_iqa.app.engines import Scorer, card_of, create_scorer, save_scorer
from smart_iqa.app.scoring import Calibration, Policy, layout
from smart_iqa.demo import photograph
from smart_iqa.images import ImageError, load_image
from smart_iqa.model import CheckpointError, build_model, find_checkpoint, read_about

PHOTOS = ("coffee", "chelsea", "camera", "rocket")


@pytest.fixture(scope="module")
def scorer():
    return smart_iqa.create_scorer("smart-lite", device="cpu", engine="torch")


@pytest.fixture(scope="module")
def photos():
    images = [photograph(n) for n in PHOTOS]
    return [*images, images[0].resize((90, 60)), images[1].crop((0, 0, 451, 60))]  # any sizes


@pytest.fixture(scope="module")
def alone(scorer, photos):
    return np.array([scorer(p) for p in photos])


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = build_model("smart", model_size="lite")
    model.shift_scores(50)
    return Scorer(
        model,
        Policy(64, "short", 32, 2),
        Calibration((50.0,), (2.5, 0.5), (2.5, 0.5), tuple(np.linspace(-2, 2, 99))),
        dict(name="small"),
        device="cpu",
        amp="off",
    )


def test_a_picture_has_one_score(scorer, photos, alone):
    """Alone, in a list, in another order: to the bit."""
    assert np.array_equal(scorer(photos), alone)
    assert np.array_equal(scorer(photos[::-1])[::-1], alone)
    assert len(set(np.round(alone, 2))) == len(alone)  # and different pictures have different ones


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_moves_nothing(scorer, photos, alone, batch_size):
    other = Scorer(
        scorer.model, scorer.policy, scorer.calibration, scorer.info, device="cpu", batch_size=batch_size
    )
    assert np.abs(other(photos[:2]) - alone[:2]).max() < 1e-3


def test_bf16_is_near(scorer, photos):
    """Within half a point alone and in a batch; and not far from fp32. (Small crops: some processors imitate bf16.)"""
    small = dict(policy=Policy(112, "short", 96, 6), device="cpu")
    exact, bf16 = (Scorer(scorer.model, amp=amp, **small) for amp in ("off", "on"))
    found = bf16(photos)
    assert np.abs(found - [bf16(p) for p in photos]).max() < 0.5
    assert 0 < np.abs(found - exact(photos))[:4].max() < 1


def test_every_kind_of_input(scorer, photos, alone, tmp_path):
    photo = photos[0]
    photo.save(tmp_path / "a.png")
    a = np.asarray(photo)
    t = torch.from_numpy(a.copy()).permute(2, 0, 1)
    for same in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        photo,
        a,
        a / 255,
        a.astype(np.float32) / 255,
        a.astype(np.uint16) * 257,
        t,
        t / 255,
        t[None],
    ):
        got = scorer(same)
        assert np.allclose(got, alone[0], atol=1e-3)
    assert (
        isinstance(scorer(photo), float)
        and scorer([photo]).shape == (1,)
        and scorer(torch.stack([t, t])).shape == (2,)
        and scorer([]).shape == (0,)
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        (np.zeros((5, 5, 7), np.uint8), "shape"),
        (np.full((9, 9, 3), 128.0), "0-1"),
        (np.full((9, 9), np.nan), "0-1"),
        (torch.zeros(3, 9, 9) - 2, "0-1"),
        (np.zeros((0, 9, 3), np.uint8), "shape"),
        ("gone.jpg", "gone.jpg"),
        (None, "NoneType"),
        (np.zeros((9, 9), np.int32), "int32"),
    ],
)
def test_wrong_input_is_named(small, wrong, said):
    with pytest.raises(ImageError, match=said):
        small(wrong)


def test_a_bad_picture_does_not_stop_the_rest(small, photos):
    got = list(small.stream([photos[0], "gone.jpg", photos[1], None]))
    assert isinstance(got[1], ImageError) and isinstance(got[3], ImageError)
    assert got[2].score == small(photos[1]) and got[0].score == small(photos[0])


def test_stream_is_lazy(small, photos):
    """A folder of any length fits in memory: no more than a few pictures are taken ahead."""
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield photos[4]

    stream = small.stream(endless())
    next(stream), next(stream)
    assert len(taken) < 12


def test_map_is_local(scorer):
    """Damage to the left half shows there; patches that lie in the right half keep their very number."""
    photo = photograph("coffee")
    damaged = photo.copy()
    damaged.paste(photo.crop((0, 0, 300, 400)).filter(ImageFilter.GaussianBlur(5)), (0, 0))
    before, after = scorer.map(photo), scorer.map(damaged)
    middle = before.resized[0] / 2
    right, left = before.lefts >= middle + 2, before.lefts + before.crop <= middle
    change = after.patches - before.patches
    assert right.any() and left.any() and not change[:, right].any() and change[:, left].mean() < -5
    drawn = after.pixels(60) - before.pixels(60)
    assert drawn[:, :20].mean() < 4 * drawn[:, 40:].mean() - 1  # the picture of the map says so, too
    assert before.score == pytest.approx(before.patches.mean())


def test_map_of_the_scores_own_crops_is_the_score(scorer, photos, alone):
    for photo, score in zip(photos[:3], alone):
        assert scorer.map(photo, crop=scorer.policy.crop).score == pytest.approx(score, abs=1e-6)


def test_overlay_has_the_pictures_shape(small, photos):
    overlay = small.map(photos[1]).overlay(photos[1], width=200)
    assert overlay.size[0] == 200 and abs(overlay.size[1] / 200 - photos[1].height / photos[1].width) < 0.02


def test_layout_covers_every_shape():
    policy = Policy(512, "short", 320, 20)
    for w, h in ((512, 512), (4000, 3000), (3000, 4000), (1, 1), (9000, 100), (7, 4000)):
        for local in (False, True):
            (rw, rh), tops, lefts = layout(w, h, policy, local)
            for starts, length in ((tops, rh), (lefts, rw)):
                assert starts[0] == 0 and starts[-1] == length - policy.crop and (np.diff(starts) >= 0).all()
                assert len(starts) >= 64 or np.diff(starts, prepend=0).max() <= policy.crop  # no gap


def test_differentiable(scorer):
    photo = photograph("chelsea")
    x = (torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None] / 255).requires_grad_()
    score = scorer.differentiable(x, crops=2)
    score.sum().backward()
    assert x.grad.shape == x.shape and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    with torch.no_grad():
        assert abs(float(scorer.differentiable(x)) - scorer(photo)) < 2
    assert not any(p.requires_grad for p in scorer.model.parameters())


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_differentiable_takes_floats_of_any_precision(small, kind):
    """The score is that of the same numbers in fp32, the gradient comes back in the precision of the picture."""
    x = torch.rand(2, 3, 60, 50).to(kind)
    alike = x.float().requires_grad_()
    x.requires_grad_()
    scores, expected = small.differentiable(x), small.differentiable(alike)
    scores.sum().backward()
    expected.sum().backward()
    assert torch.equal(scores, expected) and x.grad.dtype == kind
    assert torch.equal(x.grad, alike.grad.to(kind)) and x.grad.abs().sum() > 0


@pytest.mark.parametrize("wrong", [255.0, -1.0, float("nan"), float("inf")])
def test_differentiable_refuses_what_lies_outside(small, wrong):
    x = torch.rand(1, 3, 60, 50)
    x[0, 1, 2, 3] = wrong
    with pytest.raises(ImageError, match="within 0-1"):
        small.differentiable(x)


def test_differentiable_of_an_endless_strip(small, monkeypatch):
    """Resized as a whole it would need gigabytes; crop by crop it is the same score, with the same gradient."""
    small.model = lambda crops: (crops**2).mean((1, 2, 3))  # quick
    short = torch.rand(1, 3, 20, 700)  # enlarged, as strips are
    results = []
    for most in (40_000_000, 1):
        monkeypatch.setattr(smart_iqa.app.engines, "MAX_PIXELS", most)
        x = short.clone().requires_grad_()
        score = small.differentiable(x)
        score.sum().backward()
        results.append((score.detach(), x.grad))
    (whole, of_whole), (parts, of_parts) = results
    assert torch.allclose(whole, parts, atol=1e-3) and torch.allclose(of_whole, of_parts, atol=1e-3)
    monkeypatch.undo()
    resized = []
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *a, **k: resized.append(a))
    assert torch.isfinite(small.differentiable(torch.rand(1, 3, 1, 20_000))).all() and not resized


def test_a_scorer_does_not_depend_on_the_default_dtype(photos):
    expected = create_scorer("smart-lite", device="cpu", engine="torch")(photos[0])
    torch.set_default_dtype(torch.float64)
    try:
        scorer = create_scorer("smart-lite", device="cpu", engine="torch")
        assert scorer(photos[0]) == pytest.approx(expected, abs=1e-4)  # on some processors the last bit differs
        assert scorer.differentiable(torch.rand(1, 3, 40, 40), crops=1).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_file_holds_everything(small, photos, tmp_path):
    save_scorer(small, tmp_path / "m.safetensors")
    again = create_scorer(tmp_path / "m.safetensors", device="cpu", amp="off")
    assert (
        again.details(photos[:2]) == small.details(photos[:2])
        and again.policy == small.policy
        and again.info == small.info
    )
    one = again.details(photos[:1])[0]
    assert one.low < one.score < one.high
    narrower = create_scorer(tmp_path / "m.safetensors", device="cpu", amp="off", level=0.5).details(photos[:1])[0]
    assert one.low < narrower.low and narrower.high < one.high


def test_the_packaged_model():
    path = find_checkpoint("smart-lite")
    about = read_about(path)
    assert path.stat().st_size <= 12e6 and about["calibration"]["residuals"] and about["policy"]["crops"] > 0
    scorer = create_scorer(device="cpu", thorough=True)
    assert scorer.policy.crops == 20 and scorer.calibration.scores
    scorer = create_scorer(device="cpu")
    assert scorer.calibration.scores and scorer.engine == "onnxruntime"
    assert scorer.score_range == (0, 100) and scorer.higher_is_better
    assert {"name", "trained_on", "licence", "data_terms", "measured", "meaning", "fails_on"} <= set(scorer.info)
    json.dumps(scorer.info)
    measured = scorer.info["measured"]["val"]
    assert measured["srcc_low"] < measured["srcc"] < measured["srcc_high"]


def test_damage_lowers_the_score(scorer):
    """Not a claim about people, but a model for which this fails is broken."""
    for name in PHOTOS[:2]:
        photo = photograph(name)
        assert scorer(photo) > scorer(photo.filter(ImageFilter.GaussianBlur(4))) + 5


@pytest.mark.parametrize(
    "name, said", [("smart-light", "smart-lite"), ("gone.safetensors", "no such file"), (".", "model.safetensors")]
)
def test_unknown_models_are_named(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RuntimeError, CheckpointError), match=said):
        create_scorer(name)


def test_image_with_no_number_is_an_error(small):
    with torch.no_grad():
        for p in small._fast.parameters():
            p.fill_(float("nan"))
    assert isinstance(next(small.stream([Image.new("RGB", (64, 64))])), ImageError)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_two_policies(photos, scorer, tmp_path, engine):
    """More crops, an interval of its own, the same whatever the batch; both survive in a file."""
    default = create_scorer("smart-lite", device="cpu", engine=engine)
    thorough = create_scorer("smart-lite", device="cpu", engine=engine, thorough=True)
    assert thorough.policy.crops > default.policy.crops and thorough.id != default.id
    assert thorough.calibration.residuals != default.calibration.residuals
    scores = thorough.details(photos[:3])
    other = create_scorer("smart-lite", device="cpu", engine=engine, thorough=True, batch_size=1)
    assert np.abs(other(photos[:3]) - [s.score for s in scores]).max() < 1e-3
    assert all(s.low < s.score < s.high for s in scores)
    save_scorer(scorer, tmp_path / "copy.safetensors")
    assert create_scorer(tmp_path / "copy.safetensors", thorough=True).calibration == thorough.calibration
    assert create_scorer(tmp_path / "copy.safetensors").calibration == default.calibration


def test_without_a_second_policy(small, tmp_path):
    """A model without one says so; another number of crops has no intervals, and never borrows those of the policy."""
    save_scorer(small, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="no thorough policy"):
        create_scorer(tmp_path / "small.safetensors", thorough=True)
    with pytest.raises(ValueError, match="crops=0"):
        create_scorer(tmp_path / "small.safetensors", crops=0)
    with pytest.warns(UserWarning, match="not calibrated with 6 crops"):
        other = create_scorer(tmp_path / "small.safetensors", crops=6, device="cpu")
    assert np.isnan(other.details([Image.new("RGB", (64, 64))])[0].low)
    same = create_scorer(tmp_path / "small.safetensors", crops=small.policy.crops, device="cpu")
    assert same.calibration == small.calibration


def test_engines_agree_on_fifty_pictures(scorer):
    """The ONNX file in the package gives torch's scores to a hundredth of a point, by the default policy."""
    rng = np.random.default_rng(0)
    pictures = []
    for k in range(50):
        photo = photograph(PHOTOS[k % len(PHOTOS)])
        photo = photo.resize((int(rng.integers(200, 900)), int(rng.integers(200, 900))))
        pictures.append(photo.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3))))
    by_onnx = create_scorer("smart-lite", device="cpu", engine="onnxruntime")
    assert np.abs(by_onnx(pictures) - scorer(pictures)).max() < 0.01
    assert by_onnx.id.rpartition("/")[0] == scorer.id.rpartition("/")[0] and by_onnx.id != scorer.id


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_the_first_model_can_be_had_by_name(engine):
    """What it said when it was the packaged model."""
    first = create_scorer("smart-lite-1", device="cpu", engine=engine)
    assert first.info["version"] == "1.1"
    assert first(load_sample_image("china.jpg")) == pytest.approx(75.017, abs=0.01)


def test_bf16_is_asked_of_an_engine_that_has_it():
    """Who asks for bf16 without naming an engine gets torch; onnxruntime by name says that it has none."""
    assert create_scorer(device="cpu", amp="on").engine == "torch-bf16"
    assert create_scorer(device="cpu", amp="auto").engine == "onnxruntime"
    with pytest.raises(ValueError, match="onnxruntime computes in fp32"):
        create_scorer(device="cpu", engine="onnxruntime", amp="on")


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_threads_are_independent(engine):
    """Eight threads that share a scorer get what one gets, bit for bit, scores and attention, sizes mixed."""
    scorer = create_scorer("smart-lite", device="cpu", engine=engine)
    pictures = [photograph(PHOTOS[k % 4]).resize((200 + 40 * (k % 3), 200 + 30 * (k % 5))) for k in range(16)]
    alone = [scorer.details(p)[0] for p in pictures]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda p: scorer.details(p)[0], pictures * 2)) == alone * 2


def test_a_large_photo_is_decoded_smaller(tmp_path):
    """A JPEG of 12 megapixels is scored from a reduced decoding, upright, within half a point of the whole one."""
    scorer, rng = create_scorer("smart-lite", device="cpu"), np.random.default_rng(0)
    photo = photograph("coffee").resize((4000, 3000), Image.Resampling.BICUBIC)
    noisy = np.asarray(photo, np.int16) + rng.normal(0, 6, (3000, 4000, 1)).astype(np.int16)
    photo, turned = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), Image.Exif()
    turned[274] = 6
    photo.save(tmp_path / "whole.jpg", quality=92)
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=92, exif=turned)
    whole = load_image(tmp_path / "whole.jpg")
    by_file, by_pixels = scorer.details([tmp_path / "whole.jpg", whole])
    (upright,) = scorer.details(tmp_path / "turned.jpg")
    assert by_file.score != by_pixels.score  # it was reduced
    assert abs(by_file.score - by_pixels.score) < 0.5
    assert (by_file.width, by_file.height) == (upright.width, upright.height) == (4000, 3000)
    assert abs(upright.score - by_file.score) < 0.5


@pytest.mark.parametrize("one", ["path", "Path", "PIL", "array", "tensor"])
def test_one_picture_is_one_picture_everywhere(small, photos, tmp_path, one):
    """A single picture is one row of `table` and `details`, whatever it comes as; wrong things are named."""
    photos[0].save(tmp_path / "a.png")
    pixels = np.asarray(photos[0])
    picture = dict(path=str(tmp_path / "a.png"), Path=tmp_path / "a.png", PIL=photos[0], array=pixels,
                   tensor=torch.from_numpy(pixels.copy()).permute(2, 0, 1))[one]
    assert len(small.table(picture)) == len(small.details(picture)) == 1
    assert small.table(picture).score[0] == small(picture)


def test_a_damaged_open_picture_costs_one_row(small, photos, tmp_path):
    """A lazily opened PIL picture whose file is cut fails like its path does, in its own row."""
    photos[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:20_000])
    results = list(small.stream([photos[0], Image.open(tmp_path / "cut.png"), photos[1]]))
    assert isinstance(results[1], ImageError) and "cut.png" in str(results[1])
    assert results[2].score == small(photos[1])


def test_weights_of_the_scoring_copy_are_its_own(small):
    """bf16 and fused kernels live in a copy: the model that is saved, mapped and differentiated stays fp32."""
    fast = Scorer(small.model, small.policy, device="cpu", amp="on")
    assert {p.dtype for p in fast.model.parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in fast._fast.backbone.parameters()} and {
        p.dtype for p in fast._fast.head.parameters()
    } == {torch.float32}


RESEARCH = ("torch", "torchvision", "timm", "scipy", "matplotlib", "sklearn", "skimage", "safetensors", "onnx")
NONE_OF_THEM = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {RESEARCH} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def without_research(code: str, *words: str) -> subprocess.CompletedProcess:
    """Run Python where the research half cannot be imported."""
    command = [sys.executable, "-c", NONE_OF_THEM + code, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_scoring_leaves_nothing_in_the_home(tmp_path, photos):
    """onnxruntime would keep a device id and a database of events there."""
    photos[0].save(tmp_path / "a.png")
    (home := tmp_path / "home").mkdir()
    command = [sys.executable, "-m", "smart_iqa", "score", str(tmp_path / "a.png")]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "SMART_IQA"))} | dict(HOME=str(home))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not list(home.rglob("*"))


def test_scoring_imports_no_research(tmp_path, photos):
    """The command line scores, maps and draws a contact sheet without torch, timm, torchvision, scipy or matplotlib."""
    photos[0].save(tmp_path / "a.jpg")
    outputs = ["--out", tmp_path / "s.csv", "--html", tmp_path / "s.html", "--heatmap", tmp_path]
    words = ["score", tmp_path / "a.jpg", *outputs]
    done = without_research("from smart_iqa.cli import main\nsys.exit(main(sys.argv[1:]))", *map(str, words))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.jpg.map.png").exists() and "a.jpg" in (tmp_path / "s.html").read_text()


def test_what_needs_research_says_so():
    """Who asks for a model, or for a command of the research half, is told which extra to install."""
    done = without_research("from smart_iqa import SmartIQA")
    assert "ImportError" in done.stderr and "smart-iqa[lab]" in done.stderr
    done = without_research("from smart_iqa.cli import main\nsys.exit(main(['demo']))")
    assert done.returncode == 1 and "smart-iqa[lab]" in done.stderr and "Traceback" not in done.stderr
    done = without_research("import smart_iqa\nsmart_iqa.create_scorer('smart-lit')")
    assert "smart-lite" in done.stderr


def test_old_import_paths():
    """What the README of the original and ours have shown."""
    from smart_iqa import HyperIQA, SmartIQA, load_checkpoint
    from smart_iqa.data import DataLoader

    assert SmartIQA.__module__ == HyperIQA.__module__ == load_checkpoint.__module__ == "smart_iqa.model"
    assert DataLoader.__module__ == "smart_iqa.data"
    assert smart_iqa.create_scorer is create_scorer


def test_the_onnx_file_is_the_checkpoint():
    """The two packaged files have the same weights and the same card."""
    by_torch, by_onnx = (create_scorer(device="cpu", engine=engine) for engine in ("torch", "onnxruntime"))
    assert by_onnx.weights == by_torch.weights
    cards = [json.loads(json.dumps(card_of(scorer))) for scorer in (by_onnx, by_torch)]
    assert cards[0] == cards[1] == read_about(find_checkpoint("smart-lite"))

"""What leaves the package: hub folders, ONNX files and figures. Numbers stay the model's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from huggingface_hub import ModelCard, constants

from smart_iqa import create_scorer
from smart_iqa.app.engines import ONNX_FILES, OnnxScorer, Scorer
from smart_iqa.app.export import (
    ExportError,
    check_onnx,
    compare_engines,
    export_onnx,
    model_card,
    quantise_onnx,
    save_pretrained,
    write_onnx_beside,
)
from smart_iqa.app.scoring import Calibration, Policy, cut, quality_figure
from smart_iqa.crops import normalise
from smart_iqa.demo import photograph
from smart_iqa.model import CheckpointError, SmartIQA

INFO = dict(name="toy", trained_on="toys", licence="MIT")


def needs_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install onnx onnxscript onnxruntime")


def toy(**arguments) -> Scorer:
    """A small network, taught to see noise: an untrained one scores every crop alike, and hides every fault."""
    torch.manual_seed(0)
    model = SmartIQA(backbone="test_efficientnet", dropout=0.0, **arguments)
    for layer in getattr(model.head.hyper, "layers", []):
        torch.nn.init.xavier_normal_(
            layer.weight, gain=4
        )  # torch's own start is nearly flat through five sigmoids, for longer than this
    policy, levels = Policy(110, "short", 96, 6), np.linspace(0, 90, 12)
    crops = normalise(
        torch.from_numpy(np.concatenate([cut(picture(k, noise=n), policy)[:2] for k, n in enumerate(levels)])).permute(
            0, 3, 1, 2
        )
    )
    target = torch.from_numpy(np.repeat(95 - levels, 2)).float()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.shift_scores(50)
    for _ in range(25):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model.train()(crops), target).backward()
        optimizer.step()
    return Scorer(
        model, policy, Calibration((50.0,), (2.5, 0.5), (2.5, 0.5), tuple(np.linspace(-2, 2, 99))), INFO,
        device="cpu", amp="off"
    )


@pytest.fixture(scope="module")
def photos():
    return [
        picture(0, 150, 130),
        picture(3, 240, 130, 60.0),
        photograph("coffee").resize((180, 120)),
        photograph("camera").resize((130, 130)),
    ]


@pytest.fixture(scope="module")
def small():
    return toy()


@pytest.fixture(scope="module")
def small_file(small, tmp_path_factory):
    needs_onnx()
    export_onnx(small, path := tmp_path_factory.mktemp("onnx") / "small.onnx")
    return path


@pytest.fixture(scope="module")
def packaged():
    return create_scorer("smart-lite", device="cpu", engine="torch", thorough=True)


def static(scorer: Scorer) -> Scorer:
    """The same under a policy whose crops no file takes in another size: traced in two thirds of the time."""
    return Scorer(scorer.model, Policy(110, "short", 90, 6), scorer.calibration, INFO, device="cpu", amp="off")


def load_onnx(path):
    import onnx

    return onnx.load(path)


def onnx_array(tensor):
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# -- ONNX ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_packaged_model_equals_torch(packaged, batch):
    """The package's file in plain onnxruntime against the unfolded model in plain torch: 1e-4 points."""
    pytest.importorskip("onnxruntime")
    side = packaged.policy.crop
    real = np.concatenate([cut(photograph(n), packaged.policy)[::2] for n in ("coffee", "rocket")])[:batch]
    noise = np.random.default_rng(batch).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    for crops in (real, noise):
        score, *attention = session(ONNX_FILES["smart-lite"]).run(None, {"crops": crops})
        with torch.inference_mode():
            want = packaged.model(normalise(torch.from_numpy(crops).permute(0, 3, 1, 2))).numpy()
        assert score.shape == (batch,) and np.abs(score - want).max() <= 1e-4
        if attention:
            assert np.abs(attention[0] - packaged.model.last_attention_weights.numpy()).max() <= 1e-5


@pytest.mark.slow
def test_packaged_file_is_what_export_writes(tmp_path):
    """The ONNX file in the package is made by the code beside it, from the checkpoint beside it."""
    needs_onnx()
    kept = ONNX_FILES["smart-lite"]
    shutil.copy(kept.with_suffix(".safetensors"), tmp_path)
    made = write_onnx_beside(tmp_path / "smart-lite.safetensors")
    want, got = (
        {i.name: onnx_array(i) for i in load_onnx(path).graph.initializer} for path in (kept, made)
    )  # names and values: the order of nodes is the exporter's, and changes with its version
    assert set(want) == set(got)
    assert all(np.array_equal(want[name], got[name]) for name in want)
    x = np.random.default_rng(0).integers(0, 256, (2, 320, 320, 3), dtype=np.uint8)
    scores = [session(path).run(["score"], {"crops": x})[0] for path in (kept, made)]
    assert np.abs(scores[0] - scores[1]).max() < 1e-5
    assert OnnxScorer(made).id == OnnxScorer(kept).id


def test_batch_is_free(small, small_file, photos):
    """Sizes that were never traced; and a crop's score does not depend on its neighbours."""
    run = session(small_file)
    (crops,) = run.get_inputs()
    assert (
        crops.name == "crops"
        and crops.type == "tensor(uint8)"
        and isinstance(crops.shape[0], str)
        and all(isinstance(side, str) for side in crops.shape[1:3])
        and crops.shape[3] == 3
    )
    x = np.concatenate([cut(p, small.policy)[:2] for p in photos])[:7]
    alone = np.concatenate([run.run(["score"], {"crops": x[k : k + 1]})[0] for k in range(7)])
    assert alone.std() > 1  # else the next line could not fail
    for n in (1, 2, 5, 7):
        assert np.abs(run.run(["score"], {"crops": x[:n]})[0] - alone[:n]).max() < 1e-4


@pytest.mark.parametrize(
    "arguments",
    [
        dict(head="plain"),
        pytest.param(dict(use_attention=False), marks=pytest.mark.slow),
        pytest.param(dict(use_attention=False, use_multiscale=False), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_kind_of_head(arguments, tmp_path, photos):
    needs_onnx()
    scorer = static(toy(**arguments))
    found = export_onnx(scorer, tmp_path / "a.onnx")
    assert found.score.max() <= 1e-4 and sorted(set(found.batch)) == [1, 3, 20]
    want, got = scorer.table(photos), OnnxScorer(tmp_path / "a.onnx").table(photos)
    assert list(got) == list(want) and np.abs(got - want).max(axis=None) < 1e-3 and want.score.std() > 1
    assert ("a1" in got) == (arguments.get("use_attention") is not False)


def test_file_says_what_it_is(small, small_file):
    """Policy, calibration, normalisation and card in the metadata; no trace of the machine."""
    facts = {k: json.loads(v) for k, v in session(small_file).get_modelmeta().custom_metadata_map.items()}
    card = facts["about"]
    assert Policy(**card["policy"]) == small.policy and card["info"] == INFO and facts["precision"] == "float32"
    assert card["calibration"]["residuals"] == list(small.calibration.residuals)
    assert facts["weights"] == small.weights and facts["side"] is None and len(facts["normalisation"]["mean"]) == 3
    raw = small_file.read_bytes()
    assert not any(word in raw for word in (b"site-packages", os.getcwd().encode()))


@pytest.mark.slow
def test_same_file_every_time(small, small_file, monkeypatch, tmp_path):
    """A second export has the first one's bytes; one that fails the check leaves what was there."""
    written = []

    def keep(path, scorer):
        written.append(Path(path).read_bytes())
        return check_onnx(path, scorer)

    monkeypatch.setattr("smart_iqa.app.export.check_onnx", keep)
    (tmp_path / "old.onnx").write_text("kept")
    with pytest.raises(ExportError, match=r"old\.onnx.*limit"):
        export_onnx(small, tmp_path / "old.onnx", limit=-1.0)
    assert written == [small_file.read_bytes()]
    assert (tmp_path / "old.onnx").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_wrong_numbers_are_noticed(small, small_file, tmp_path):
    """One changed weight is enough."""
    import onnx

    proto = onnx.load(small_file)
    weight = next(i for i in proto.graph.initializer if "head.hyper" in i.name and len(i.dims) == 4)
    changed = onnx.numpy_helper.to_array(weight) * 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(proto, tmp_path / "changed.onnx")
    assert check_onnx(small_file, small).score.max() <= 1e-4 < check_onnx(tmp_path / "changed.onnx", small).score.max()


def test_onnx_scorer_is_a_scorer(small, small_file, photos):
    """The same table, intervals and map; lists, errors in place, and what it cannot do says so."""
    exported = OnnxScorer(small_file, threads=1)
    want, got = small.table(photos), exported.table(photos)
    assert list(got) == list(want) and np.abs(got - want).max(axis=None) < 1e-3
    assert [type(s).__name__ for s in exported.stream([photos[0], "gone.jpg"])] == ["Score", "ImageError"]
    for crop in (96, 64):
        assert np.abs(exported.map(photos[0], crop).patches - small.map(photos[0], crop).patches).max() < 1e-3
    with pytest.raises(TypeError, match="create_scorer"):
        exported.differentiable(torch.zeros(1, 3, 96, 96))
    with pytest.raises(TypeError, match="create_scorer"):
        exported.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="level"):
        OnnxScorer(small_file, level=0.999)


def test_files_that_are_none(small_file, tmp_path):
    import onnx

    (tmp_path / "text.onnx").write_text("no model")
    proto = onnx.load(small_file)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    for name, reason in (("gone.onnx", "no such file"), ("text.onnx", "cannot be read"), ("bare.onnx", "export_onnx")):
        with pytest.raises(CheckpointError, match=f"{name}.*{reason}"):
            OnnxScorer(tmp_path / name)
    with pytest.raises(ValueError, match="engine"):
        OnnxScorer(small_file, engine="tensorrt")


@pytest.mark.parametrize("facts", [dict(about=None), dict(about="{"), dict(weights=None), dict(side="many")], ids=str)
def test_metadata_that_cannot_be_read(small_file, tmp_path, facts):
    """A file of an earlier version, or with damaged metadata, is named, and the fix is said."""
    import onnx

    proto = onnx.load(small_file)
    known = {p.key: p.value for p in proto.metadata_props} | facts
    onnx.helper.set_model_props(proto, {k: v for k, v in known.items() if v is not None})
    onnx.save(proto, tmp_path / "old.onnx")
    with pytest.raises(CheckpointError, match="old.onnx.*export_onnx"):
        OnnxScorer(tmp_path / "old.onnx")


def test_int8(small, small_file, photos, tmp_path):
    """A smaller file that says so, whose scores follow fp32's; no pictures and no fp32 file are errors."""
    quantise_onnx(small_file, tmp_path / "int8.onnx", photos, crops=8)
    int8 = OnnxScorer(tmp_path / "int8.onnx")
    assert "int8" in int8.id and int8.policy == small.policy and int8.calibration == small.calibration
    with pytest.raises(ValueError, match="96 x 96"):
        int8.map(photos[0], crop=64)
    table = compare_engines({"fp32": small, "int8": int8}, photos, truth=[70, 60, 50, 40])
    assert table.largest_difference["fp32"] == 0 < table.largest_difference["int8"] < 3 * np.std(small(photos)) + 1
    assert np.isclose(table.srcc_loss, table.srcc["fp32"] - table.srcc).all()
    with pytest.raises(ValueError, match="at least one picture"):
        quantise_onnx(small_file, tmp_path / "x.onnx", [])
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]


def test_openvino(small, small_file, photos):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    scorer = OnnxScorer(small_file, "openvino")
    assert np.abs(scorer(photos) - small(photos)).max() < 1e-3 and scorer.engine == "openvino"
    assert np.array_equal(scorer(photos), [scorer(p) for p in photos])  # in threads and alone


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_says_what_to_install(small, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(small, tmp_path / "x.onnx")


# -- the folder for the hub ------------------------------------------------------------------------
def test_folder_gives_identical_scores(small, photos, tmp_path):
    folder = small.save_pretrained(tmp_path / "a" / "b")
    again = create_scorer(folder, device="cpu", amp="off")
    assert again.details(photos) == small.details(photos)  # to the bit, intervals too
    assert (again.policy, again.info) == (small.policy, small.info)
    assert Scorer.from_pretrained(folder, device="cpu", amp="off")(photos[0]) == small(photos[0])
    bare = SmartIQA.from_pretrained(folder)
    assert not bare.training and all(torch.equal(v, small.model.state_dict()[k]) for k, v in bare.state_dict().items())
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.safetensors"]


def test_card(small, packaged, tmp_path):
    """The hub's own parser reads it, and it says what the scorer knows."""
    for scorer, name in ((small, "toy"), (packaged, packaged.info["name"])):
        card = ModelCard(model_card(scorer))
        assert (
            card.data.library_name == "smart-iqa" and card.data.license and "image-quality-assessment" in card.data.tags
        )
        assert f"# {name}\n" in card.text and f"{scorer.policy.size} pixels" in card.text
    toys = ModelCard(model_card(small))
    assert toys.data.license == "mit" and toys.data.datasets == ["toys"] and "99 calibration pictures" in toys.text
    hostile = dict(
        name="a\n---\nlicense: mit", licence="ask: us\n---", trained_on="<script>, a set with spaces", note="x | y\n| z"
    )
    unknown = Scorer(small.model, small.policy, None, hostile, "cpu", "off")
    card = ModelCard(model_card(unknown))
    assert card.data.license == "other" and card.data.license_name.startswith("ask: us") and not card.data.datasets
    assert "not calibrated" in card.text and "<script>" not in card.text and "x \\| y \\| z" in card.text


def test_own_readme_is_kept(small, tmp_path):
    save_pretrained(small, tmp_path)
    written = (tmp_path / "README.md").read_text()
    small_other = Scorer(small.model, small.policy, None, dict(name="other"), "cpu", "off")
    assert "# other" in (save_pretrained(small_other, tmp_path) / "README.md").read_text() != written  # ours is renewed
    (tmp_path / "README.md").write_text("mine")
    assert (save_pretrained(small, tmp_path) / "README.md").read_text() == "mine"


def test_offline_hub_id_is_a_clear_and_quick_error():
    """Importing asks for no optional package; an id that is not cached ends in one sentence within seconds."""
    code = """
import sys, time
import smart_iqa.app.export, smart_iqa.app.folders
assert not {"onnx", "onnxruntime", "onnxscript", "openvino"} & set(sys.modules), "imported"
start = time.time()
try:
    smart_iqa.create_scorer("nobody/no-such-model")
except Exception as e:
    print(type(e).__name__, round(time.time() - start, 1), e, sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | dict(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    kind, seconds, message = done.stdout.strip().split("|")
    assert kind == "WeightsError" and float(seconds) < 15
    assert "nobody/no-such-model" in message and "connect" in message and "folder" in message


def test_hub_id_that_is_cached(small, photos, tmp_path, monkeypatch):
    """What an earlier download left is found without a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--toy"
    small.save_pretrained(repo / "snapshots" / "0123abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("smart_iqa.model.hf_hub_download", _cached(tmp_path))
    assert create_scorer("owner/toy", device="cpu", amp="off").details(photos) == small.details(photos)


def _cached(folder):
    """hf_hub_download with another cache folder: its default was read when it was imported."""
    from huggingface_hub import hf_hub_download

    return lambda *args, **kw: hf_hub_download(*args, cache_dir=folder, **kw)


# -- one picture, all of it ------------------------------------------------------------------------
def test_figure_without_gate_or_calibration(photos):
    """Picture, map and colour bar, and a title that says that there is no interval."""
    plain = toy(use_attention=False)
    plain.calibration = None
    axes = quality_figure(plain, photos[0]).axes
    assert len(axes) == 3
    assert "no interval" in axes[0].get_title(loc="left")


def test_no_widget_state_in_the_notebook():
    """GitHub shows stored widgets as blanks."""
    tutorials = Path(__file__).resolve().parent.parent / "nbs" / "tutorials"
    nb = json.loads((tutorials / "look_at_a_photo.ipynb").read_text(encoding="utf-8"))
    assert "widgets" not in nb["metadata"]
    kinds = {kind for c in nb["cells"] for o in c.get("outputs", []) for kind in o.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds and kinds & {"image/png", "image/jpeg"}

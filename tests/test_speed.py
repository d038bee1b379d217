"""The experiments about the packaged model's speed, policies and behaviour run whole, on as little as they take."""
import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import without_kernels
from PIL import ImageFilter

from smart_iqa.demo import photograph
from smart_iqa.lab.runs import execute

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SMART_IQA_DATA", ROOT.parent / "shared" / "data"))
pytestmark = pytest.mark.slow


def record_of(name, out, **parameters):
    with without_kernels():
        folder = execute(name, parameters, out, echo=None)
    return json.loads((folder / "record.json").read_text())


def test_speed(tmp_path):
    """Every part but the compiler, one turn each: both sides compute the same function, and every ratio is there."""
    few = dict(
        profile="demo",
        models="lite",
        repeats=1,
        images=1,
        crops=2,
        batches="2",
        batch_size=4,
        train_steps=1,
        data_batches=1,
        limit=8,
        threads=1,
    )
    record = record_of(
        "speed",
        tmp_path,
        what="limit,kernels,scoring,files,training,data,steps,ranking",
        cache=str(tmp_path / "cache"),
        **few,
    )
    assert {r["what"] for r in record["ratios"]} == {"scoring", "scoring files", "training", "data"}
    assert {(r["what"], r["batch"]) for r in record["against_limit"]} == {("scoring", 2), ("training", 2)} and set(
        record["kernels"]
    ) == {"2"}
    assert (
        set(record["same_function"]) == {"lite", "lite, trained"}
        and record["srcc"]["pictures"] == 8
        and not record["compiled"]
    )


def test_behaviour(tmp_path):
    """One photograph, damaged in every way and stored in every way; a trial writes nothing into the model."""
    file = ROOT / "smart_iqa" / "weights" / "smart-lite.safetensors"
    before = file.read_bytes()
    record = record_of("behaviour", tmp_path, limit=1, threads=1, megapixels=4, write=str(file))
    assert len(record["photos"]) == 1 and len(record["ladders"]) >= 5 and len(record["steadiness"]) >= 4
    assert record["same_bits"] == 0 and record["engines"] < 1e-3
    blur = next(r for r in record["detail"] if r["damage"] == "blur, sigma 2 pixels")
    assert blur["short side 512"] < blur["4 megapixels"] - 3  # large files hide it
    assert record["generated"] is None and any(v["number"] is None for v in record["limits"].values())
    assert file.read_bytes() == before


def test_behaviour_on_generated_pictures(tmp_path):
    """Opinions on pictures in a git repository are read without unpacking it."""
    data = tmp_path / "agiqa" / "data"
    (data / "ACGIQA-3K").mkdir(parents=True)
    rows = ["name,prompt,mos_quality"]
    for k in range(4):
        for kind, radius in (("fine_normal", k / 4), ("poor_normal", 2 + k)):
            name = f"{kind}_{k:03}.jpg"
            photograph("coffee").filter(ImageFilter.GaussianBlur(radius)).save(data / "ACGIQA-3K" / name)
            rows.append(f"{name},coffee {k},{4 - radius / 2}")
    (data / "data.csv").write_text("\n".join(sorted(rows, key=lambda r: not r.startswith("name"))))
    git = ["git", "-C", str(tmp_path / "agiqa"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "pictures"]):
        subprocess.run([*git, *command], check=True)
    few = dict(limit=1, threads=1, megapixels=1, every=1, generated=str(tmp_path / "agiqa"))
    measured = record_of("behaviour", tmp_path, **few)["generated"]
    assert measured["n"] == 8 and measured["srcc"] > 0.8 and len(measured["kinds"]) == 2


@pytest.mark.skipif(not (DATA / "biq2021").is_dir(), reason="no biq2021/ below $SMART_IQA_DATA")
def test_policies(tmp_path):
    """A trial on few pictures compares and writes nothing into the model, although it is told where."""
    file = ROOT / "smart_iqa" / "weights" / "smart-lite.safetensors"
    before = file.read_bytes()
    evaluation = next((ROOT / "nbs" / "results" / "embedded" / "first").glob("evaluate-*"))
    few = dict(candidates="512-320-1,512-320-3", draws=50, limit=24)
    record = record_of(
        "policies", tmp_path, evaluation=str(evaluation), root=str(DATA / "biq2021"), write=str(file), **few
    )
    assert len(record["candidates"]) == 3 and record["thorough"]["crops"] == 20 and file.read_bytes() == before


def test_cost(tmp_path):
    """One engine on two pictures of each size: every measurement is in the record, and none is nonsense."""
    few = dict(engines="onnxruntime", repeats=1, pictures=2, flat=12, starts=1)
    record = record_of("cost", tmp_path, **few)
    sizes = ["512 x 512", "12 megapixels", "24 megapixels"]
    assert record["processor"] and record["cores"] >= 1 and record["measured"][:2] == "20"
    assert [s["size"] for s in record["sizes"]] == sizes and record["sizes"][2]["megapixels"] == 24
    rates = {(r["policy"], r["threads"], r["size"]): r["per_second"] for r in record["rates"]}
    threads = {1, record["cores"]}
    assert set(rates) == {(p, t, s) for p in ("default", "thorough") for t in threads for s in sizes}
    assert all(rates["default", t, sizes[0]] > rates["thorough", t, sizes[0]] > 0 for t in threads)
    assert [m["size"] for m in record["memory"]] == sizes
    assert all(20 < m["loaded_mib"] < m["peak_mib"] < 2000 for m in record["memory"])
    assert record["flat"]["pictures"] == 12 and record["flat"]["last_mib"] < 2 * record["flat"]["first_mib"]
    assert 0 < record["start"]["python -c 'import smart_iqa'"] < record["start"]["smart-iqa score one.jpg"]
    assert {"smart-iqa", "onnxruntime", "numpy", "pandas"} < set(record["install"]) and min(record["install"].values())
    assert not {"torch", "timm"} & set(record["install"])
    assert [r["room"] for r in record["reduced"]] == [2, 1]
    assert 0 < record["reduced"][0]["mean"] <= record["reduced"][0]["most"] < 1

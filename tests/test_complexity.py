"""Counted MACs and parameters against golden and published numbers, through the experiment notebook itself."""
import json
from pathlib import Path

import pytest
from conftest import without_kernels

from smart_iqa.lab.runs import RunError, execute

pytestmark = pytest.mark.slow  # the experiment `complexity`, whole

GOLDEN = json.loads((Path(__file__).parent / "reference" / "golden.json").read_text())["models"]
PUBLISHED = dict(tiny=4.47, small=8.65, base=15.28, hyperiqa=4.33)  # labelled "FLOPs", one crop of 224


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run on lite; counts of all models are in every run."""
    out = tmp_path_factory.mktemp("complexity")
    folder = execute(
        "complexity",
        dict(models="lite", repeats=2, crops=2, precisions="fp32", device="cpu", threads=1),
        out=out,
        echo=None,
    )
    return folder, json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def counts(run):
    return {r["model"]: r for r in run[1]["counts"]}


@pytest.mark.parametrize("name", ["tiny", "small", "base", "hyperiqa", "tiny-nogate", "small-nogate", "base-nogate"])
def test_parameters_are_golden(counts, name):
    key = name if name == "hyperiqa" else name.replace("-nogate", "-concat") if "-" in name else f"{name}-attention"
    assert counts[name]["parameters"] == GOLDEN[key]["parameters"]


def test_two_counters_agree(counts):
    """Every model and variant, within 1 %; and neither of them counted nothing."""
    assert len(counts) == 13
    for r in counts.values():
        assert r["torch"] > 1e8 and abs(r["own"] / r["torch"] - 1) < 0.01, r["model"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_near_the_published(counts, name):
    """All MACs lie within 3 % of what was published; the next test says what the 3 % are."""
    assert counts[name]["torch"] / 1e9 == pytest.approx(PUBLISHED[name], rel=0.03)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_explains_the_rest(run, name):
    """Without attention's products, with the published order of the distortion vector and with elementwise operations:
    .2 %."""
    way = next(r for r in run[1]["ways"] if r["model"] == name)
    assert way["together"] == pytest.approx(PUBLISHED[name], rel=0.002)
    assert (way["- attention"] < -0.05) == (name != "hyperiqa")  # a ResNet has no attention to miss
    assert way["together"] == pytest.approx(
        way["all MACs"] + way["- attention"] + way["+ published order"] + way["+ elements"]
    )


def test_swin_tiny_by_hand(counts):
    """Window attention of Swin-Tiny by the formula of its paper, 2 M^2 h w C a block; and the gate, two linear
    layers."""
    by_hand = sum(
        blocks * 2 * 49 * side**2 * c for blocks, side, c in zip((2, 2, 6, 2), (56, 28, 14, 7), (96, 192, 384, 768))
    )
    assert counts["tiny"]["attention"] == by_hand
    gate = 768 * 256 + 256 * 4
    assert counts["tiny"]["torch"] - counts["tiny-nogate"]["torch"] == gate


def test_the_run_keeps_tables_figure_and_protocol(run):
    folder, record = run
    for part in ("counted", "latency", "published", "ways"):
        assert (folder / "tables" / f"{part}.md").read_text().count("|") > 10
        assert r"\toprule" in (folder / "tables" / f"{part}.tex").read_text()
    assert 'labelled "FLOPs"' in (folder / "tables" / "published.md").read_text()
    assert (folder / "figures" / "macs.pdf").exists() and (folder / "figures" / "macs.png").exists()
    assert all(w in record["protocol"] for w in ("1 threads", "2 timed", "warm-up", "224", "load"))
    assert [(r["what"], r["batch"]) for r in record["times"]] == [("one crop", 1), ("one score (2 crops)", 2)]


def test_times_and_memory_are_sane(run, counts):
    one, two = run[1]["times"]
    for r in (one, two):
        assert 0 < r["min"] <= r["median"] <= r["max"] and r["min"] <= r["mean"] <= r["max"]
        assert r["per_second"] == pytest.approx(1000 * r["batch"] / r["median"])
    weights = 4 * counts["lite"]["parameters"] / 1e6
    assert 0.95 * weights < one["memory"] < two["memory"] < 4 * weights


@pytest.mark.parametrize("given, said", [(dict(models="lite,huge"), "huge: no such model; there are tiny"),
                                         (dict(precisions="int3"), "int3: no such precision"),
                                         (dict(repeats=1), "at least 2 repeats")])
def test_wrong_values_are_named(tmp_path, given, said):
    with without_kernels(), pytest.raises(RunError, match=said):
        execute("complexity", dict(device="cpu") | given, out=tmp_path, echo=None)
    assert not list(tmp_path.glob("*/*/record.json"))

"""`average`: the weights of runs that share their start."""
import shutil
from dataclasses import asdict

import pandas as pd
import pytest
from conftest import small_config
from safetensors.torch import load_file

from smart_iqa.metrics import srcc
from smart_iqa.records import read_run
from smart_iqa.runs import execute

KEEP = ("dataset", "labels", "score_range", "backbone", "pretrained", "size", "crop", "train_crops", "val_crops", "test_crops", "epochs", "batch_size",
        "lr", "weight_decay", "patience", "amp", "device", "group_duplicates", "loss")


@pytest.fixture(scope="module")
def runs(standin, tmp_path_factory):
    """A start, two runs from it, and one from nowhere."""
    out = tmp_path_factory.mktemp("out")
    common = {k: v for k, v in asdict(small_config(standin)).items() if k in KEEP} | dict(
        profile="lite", root=str(standin), split="official", baseline=False, open_test=False, threads=1, cache=str(out / "cache"), epochs=1, ema=0.0)
    start = execute("train", common | dict(seed=9), out=out, name="start", echo=None)
    two = [execute("train", common | dict(seed=s, init=str(start / "checkpoint.safetensors")), out=out, name=f"s{s}", echo=None) for s in (0, 1)]
    return out, start, two


def test_average_is_the_mean_and_a_run_like_any_other(runs):
    out, _, two = runs
    folder = execute("average", dict(runs=",".join(map(str, two)), threads=1, cache=str(out / "cache")), out=out, echo=None)
    mean, (a, b) = load_file(folder / "checkpoint.safetensors"), (load_file(f / "checkpoint.safetensors") for f in two)
    changed = [k for k in mean if not a[k].equal(b[k])]
    assert len(changed) > 20 and all(((a[k] + b[k]) / 2 - mean[k]).abs().max() < 1e-5 for k in changed if mean[k].is_floating_point())
    run = read_run(folder)
    assert run["average_of"] == [f.name for f in two] and set(run["predictions"].split) == {"val"}
    assert run["parts"]["val"]["srcc"] == pytest.approx(srcc(run["predictions"].pred, run["predictions"].score))
    opened = read_run(execute("evaluate", dict(checkpoint=str(folder), threads=1, cache=str(out / "cache")), out=out, echo=None))
    assert opened["parts"]["test"]["n"] == 8


def test_runs_with_other_starts_are_refused(runs):
    out, start, two = runs
    for pair, why in (((two[0], start), "has no init|differs"), ((start, start), "has no init"), ((two[0],), "two or more")):
        with pytest.raises(Exception, match=why):
            execute("average", dict(runs=",".join(map(str, pair)), threads=1, cache=str(out / "cache")), out=out, echo=None, name="refused" + str(len(pair)))


def test_runs_on_other_splits_are_refused(runs, tmp_path):
    out, _, two = runs

    other = tmp_path / two[1].name
    shutil.copytree(two[1], other)
    splits = pd.read_csv(other / "splits.csv")
    splits.loc[[0, 40], "split"] = ["test", "train"]
    splits.to_csv(other / "splits.csv", index=False)
    with pytest.raises(Exception, match="another split"):
        execute("average", dict(runs=f"{two[0]},{other}", threads=1, cache=str(out / "cache")), out=out, echo=None, name="split")

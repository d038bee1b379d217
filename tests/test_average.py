"""`average`: the weights of runs that share their start."""
import shutil
from dataclasses import asdict

import pandas as pd
import pytest
from conftest import small_config
from safetensors.torch import load_file

from smart_iqa.lab.runs import execute, read_run
from smart_iqa.metrics import srcc

KEEP = (
    "dataset",
    "labels",
    "score_range",
    "backbone",
    "pretrained",
    "size",
    "crop",
    "train_crops",
    "val_crops",
    "test_crops",
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "patience",
    "amp",
    "device",
    "group_duplicates",
    "loss",
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_kernels")]  # the experiment `average`, whole


@pytest.fixture(scope="module")
def runs(standin, tmp_path_factory, no_kernels):
    """A start, two runs from it, and one from nowhere."""
    out = tmp_path_factory.mktemp("out")
    common = {k: v for k, v in asdict(small_config(standin)).items() if k in KEEP} | dict(
        profile="lite",
        root=str(standin),
        split="official",
        baseline=False,
        open_test=False,
        threads=1,
        cache=str(out / "cache"),
        epochs=1,
        ema=0.0,
    )
    start = execute("train", common | dict(seed=9), out=out, name="start", echo=None)
    two = [
        execute(
            "train", common | dict(seed=s, init=str(start / "checkpoint.safetensors")), out=out, name=f"s{s}", echo=None
        )
        for s in (0, 1)
    ]
    return out, start, two


def test_average_is_the_mean_and_a_run_like_any_other(runs):
    out, _, two = runs
    folder = execute(
        "average", dict(runs=",".join(map(str, two)), threads=1, cache=str(out / "cache")), out=out, echo=None
    )
    mean, (a, b) = load_file(folder / "checkpoint.safetensors"), (load_file(f / "checkpoint.safetensors") for f in two)
    changed = [k for k in mean if not a[k].equal(b[k])]
    assert len(changed) > 20 and all(
        ((a[k] + b[k]) / 2 - mean[k]).abs().max() < 1e-5 for k in changed if mean[k].is_floating_point()
    )
    run = read_run(folder)
    assert run["average_of"] == [f.name for f in two] and set(run["predictions"].split) == {"val"}
    assert run["splits"]["val"]["srcc"] == pytest.approx(srcc(run["predictions"].pred, run["predictions"].score))
    opened = read_run(
        execute("evaluate", dict(checkpoint=str(folder), threads=1, cache=str(out / "cache")), out=out, echo=None)
    )
    assert opened["splits"]["test"]["n"] == 8


def test_runs_with_other_starts_are_refused(runs):
    out, start, two = runs
    for pair, why in (
        ((two[0], start), "has no init|differs"),
        ((start, start), "has no init"),
        ((two[0],), "two or more"),
    ):
        with pytest.raises(Exception, match=why):
            execute(
                "average",
                dict(runs=",".join(map(str, pair)), threads=1, cache=str(out / "cache")),
                out=out,
                echo=None,
                name="refused" + str(len(pair)),
            )


def test_runs_on_other_splits_are_refused(runs, tmp_path):
    out, _, two = runs

    other = tmp_path / two[1].name
    shutil.copytree(two[1], other)
    splits = pd.read_csv(other / "splits.csv")
    splits.loc[[0, 40], "split"] = ["test", "train"]
    splits.to_csv(other / "splits.csv", index=False)
    with pytest.raises(Exception, match="another split"):
        execute(
            "average",
            dict(runs=f"{two[0]},{other}", threads=1, cache=str(out / "cache")),
            out=out,
            echo=None,
            name="split",
        )


def test_evaluate_marks_near_duplicates_of_the_models_own_pictures(standin, tmp_path):
    """Trained on even pictures and tested on odd ones: a copy of a training picture is marked, one of the target's own
    training split is not."""
    root = tmp_path / "set"
    shutil.copytree(standin, root)
    labels = pd.read_csv(root / "labels.csv")
    mine = labels.image.str.contains(r"[02468]\.png")
    other = (
        labels.image[~mine & (labels.split == "test")].tolist()
        + labels.image[~mine & (labels.split == "train")].tolist()
    )
    trained = labels.image[mine & (labels.split == "train")].iloc[0]
    labels.loc[labels.image == other[0], "split"] = "test"
    labels.loc[labels.image == other[1], "split"] = "test"
    shutil.copy(root / trained, root / other[0])    # met in training
    shutil.copy(root / other[2], root / other[1])   # its twin is in a training split that this model never saw
    labels.to_csv(root / "labels.csv", index=False)
    common = {k: v for k, v in asdict(small_config(root)).items() if k in KEEP} | dict(
        profile="lite",
        root=str(root),
        split="official",
        baseline=False,
        threads=1,
        cache=str(tmp_path / "cache"),
        epochs=1,
        ema=0.0,
        group_duplicates=True,
        leaks="mark",
        val_fraction=0.2,
    )
    run = execute("train", common | dict(include="p*[02468].png", open_test=False), out=tmp_path, echo=None)
    done = execute(
        "evaluate",
        dict(checkpoint=str(run), include="p*[13579].png", threads=1, cache=common["cache"]),
        out=tmp_path,
        echo=None,
    )
    p = read_run(done)["predictions"].query("split == 'test'").set_index("image").near_duplicate
    assert bool(p[other[0]]) and not bool(p[other[1]]) and p.sum() == 1

"""The demo end to end through papermill and the command line; a failing run; the installed wheel."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from conftest import STANDIN, without_kernels

from smart_iqa.cli import main
from smart_iqa.demo import DEMO_NOTE
from smart_iqa.lab.runs import RunError, execute, read_run
from smart_iqa.model import SmartIQA

COMMAND = [str(Path(sys.executable).parent / "smart-iqa")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One rendered demo set and pixel cache for all tests of this file."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory, cache):
    """`smart-iqa demo`, as the README's first command runs it: its output and its folder of runs."""
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [*COMMAND, "demo", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "SMART_IQA_CACHE": cache},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, out


@pytest.mark.slow
def test_demo_prints_where_things_are(demo):
    """What it prints exists, progress is shown, and the numbers say that they are about a rendered set."""
    text, _ = demo
    paths = re.findall(r"(/\S+(?:record\.json|run\.ipynb|\.png))", text)
    assert len(paths) >= 5 and all(Path(p).is_file() for p in paths)
    assert DEMO_NOTE in text and "epoch 1: train loss" in text and "validation SRCC" in text


@pytest.mark.slow
def test_demo_record(demo):
    """The record holds what the design promises, and the model learned: test SRCC well above chance on scenes it never
    saw."""
    folder = next(demo[1].glob("demo/*/"))
    run = read_run(folder)
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "predictions.csv",
        "checkpoint.safetensors",
        "environment.json",
        "figures",
        "run.ipynb",
    }
    assert not (folder / "resume.pt").exists()
    assert run["splits"]["test"]["srcc"] > 0.6 and run["note"] == DEMO_NOTE
    assert run["best_epoch"] == run["history"].set_index("epoch").val_srcc.idxmax()
    p = run["predictions"]
    assert {"pred", "pred_std", "a1", "a2", "a3", "a4", "baseline", "near_duplicate"} <= set(p.columns)
    assert set(p.split) == {"val", "test"} and not set(p.ref[p.split == "val"]) & set(p.ref[p.split == "test"])
    assert (p[["a1", "a2", "a3", "a4"]].sum(axis=1) - 1).abs().max() < 1e-3
    assert {"commit", "packages", "seed"} <= set(run["environment"])


@pytest.mark.slow
def test_demo_notebook_draws(demo):
    """The executed notebook has the three figures in it and no error."""
    nb = nbformat.read(next(demo[1].glob("demo/*/run.ipynb")), 4)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    assert not [o for o in outputs if o.output_type == "error"]


@pytest.mark.slow
def test_a_finished_run_is_skipped(demo, cache, monkeypatch, capsys):
    """The same command again trains nothing."""
    record = next(demo[1].glob("demo/*/record.json"))
    before = record.stat().st_mtime_ns
    monkeypatch.setenv("SMART_IQA_CACHE", cache)
    assert not main(["demo", "--out", str(demo[1])])
    assert "already finished" in capsys.readouterr().out and record.stat().st_mtime_ns == before


@pytest.mark.slow
def test_evaluate_reproduces_the_run(demo, cache, tmp_path):
    """The evaluate notebook, from the run's folder, gives the test scores that the run wrote down."""
    folder = next(demo[1].glob("demo/*/"))
    with without_kernels():
        done = execute("evaluate", dict(checkpoint=str(folder), cache=cache), out=tmp_path, echo=None)
    a, b = read_run(folder)["predictions"], read_run(done)["predictions"]
    both = a[a.split == "test"].merge(b, on="image")
    assert len(both) == len(b) and (both.pred_x - both.pred_y).abs().max() < 0.01


@pytest.mark.slow
def test_evaluate_at_a_size_that_training_crops_do_not_fit(demo, cache, tmp_path):
    """What training crops need is no condition of scoring: a run with `zoom` is evaluated at a smaller size."""
    source = next(demo[1].glob("demo/*/"))
    folder = shutil.copytree(source, tmp_path / "zoomed")
    config = json.loads((folder / "config.json").read_text())
    zoomed = config | dict(zoom=config["size"] / config["crop"])
    (folder / "config.json").write_text(json.dumps(zoomed))
    smaller = dict(checkpoint=str(folder), cache=cache, size=config["crop"], test_crops=1)
    with without_kernels():
        done = execute("evaluate", smaller, out=tmp_path, echo=None)
    assert read_run(done)["policy"]["size"] == config["crop"]


@pytest.mark.slow
def test_evaluate_refuses_pictures_that_the_model_has_seen(demo, cache, tmp_path):
    """split=none on the set that a run was trained on would test on its training pictures."""
    folder = next(demo[1].glob("demo/*/"))
    with without_kernels(), pytest.raises(RunError, match="were used in training"):
        execute("evaluate", dict(checkpoint=str(folder), cache=cache, split="none"), out=tmp_path, echo=None)


@pytest.mark.slow
def test_the_baseline_notebook_repeats_the_runs_own_baseline(demo, cache, tmp_path):
    """The ridge beside a finished run is the one that the run made itself, and the model's predictions stay as they
    were."""
    folder = next(demo[1].glob("demo/*/"))
    with without_kernels():
        done = execute("baseline", dict(run=str(folder), cache=cache), out=tmp_path, echo=None)
    a, b = read_run(folder)["predictions"], read_run(done)["predictions"]
    assert (a.pred == b.pred).all() and (a.baseline - b.baseline).abs().max() < 1e-6


@pytest.mark.slow
def test_two_scenes_give_no_interval(demo):
    """The demo's test split has two photographs: its record claims no interval and no significance."""
    run = read_run(next(demo[1].glob("demo/*/")))
    assert (
        run["splits"]["test"]["resampled"] == "nothing"
        and "srcc_low" not in run["splits"]["test"]
        and "test" not in run["comparison"]
    )


@pytest.mark.slow
def test_runs_are_listed(demo, capsys):
    """`smart-iqa runs` shows the run with its headline number."""
    assert not main(["runs", "--out", str(demo[1])])
    out = capsys.readouterr().out
    assert "demo-lite-s0" in out and "test_srcc" in out


def test_a_wrong_parameter_is_an_error_before_anything_starts(tmp_path, capsys):
    """Papermill only logs unknown parameters; a misspelt learning rate must not train with the default."""
    assert main(["run", "train", "learning_rat=1", "--out", str(tmp_path / "o")]) == 1
    assert "learning_rat" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_failing_run_says_why(tmp_path, standin):
    """A loss that explodes: the error names epoch and setting, the executed notebook is kept, no record is written."""
    explodes = dict(root=str(standin), lr=1e30, clip=0.0, schedule="constant", warmup=0.0, threads=1, name="explodes")
    with pytest.raises(RunError, match="lower lr"):
        execute("train", STANDIN | explodes, out=tmp_path, echo=None)
    assert not list(tmp_path.glob("*/*/record.json")) and list(tmp_path.glob("*/*/run.ipynb"))


def test_the_wheel_carries_notebooks_and_data(tmp_path):
    """An installed wheel can run experiments: they, and the published results, are in it."""
    root = Path(__file__).resolve().parent.parent
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(root)],
        check=True,
        timeout=600,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for wanted in (
        "smart_iqa/experiments/train.ipynb",
        "smart_iqa/experiments/evaluate.ipynb",
        "smart_iqa/data_files/published.csv",
        "smart_iqa/model.py",
    ):
        assert wanted in names
    assert (
        json.loads(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).read("smart_iqa/experiments/train.ipynb"))["nbformat"]
        == 4
    )


def test_the_readme_one_liner():
    """89,111,941 parameters, without network or weights."""
    m = SmartIQA(model_size="base", use_attention=True, pretrained=False)
    assert sum(p.numel() for p in m.parameters()) == 89111941

"""Training in two real processes against one: loss curves, predictions, resuming, and what happens when one is
killed."""

import json
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import small_config, without_kernels

from smart_iqa import training
from smart_iqa.config import make_config
from smart_iqa.crops import build_cache
from smart_iqa.data import load_set
from smart_iqa.devices import Devices, own_device
from smart_iqa.files import read_lines
from smart_iqa.frozen import FrozenFeed
from smart_iqa.lab.runs import execute, is_held, open_run
from smart_iqa.model import load_checkpoint
from smart_iqa.training import CropFeed, Solver, make_model, predict, save_resume_point

pytest.importorskip("accelerate")
CASES = {  # 25 training pictures in batches of 8: the last batch of one picture leaves one process without any
    "l1": dict(loss="l1"),
    "plcc": dict(loss="l1+20*plcc"),
    "srcc": dict(loss="srcc"),
    "pairs": dict(loss="rank+5*fidelity", alpha=0.5, margin=2.0),
    "steps": dict(loss="plcc", accumulate=2, ema=0.9, clip=0.5),
    "frozen": dict(frozen=True, loss="plcc"),
    "ladders": dict(loss="l1", crop=48, ladder=1.0, ladder_every=3, zoom=1.3),
}
SCRIPT = '''
import json, os, sys
from smart_iqa.crops import build_cache
from smart_iqa.lab.runs import train_together
from smart_iqa.training import CropFeed
import smart_iqa.lab.runs as runs, smart_iqa.training as solver

class Killed(Exception): pass
stop, seen, feed, fit = json.loads(sys.argv[1]), [0], CropFeed.train_batches, solver.Solver.fit

def batches(*a):
    for item in feed(*a):
        if seen[0] == 5 and stopping: raise Killed
        seen[0] += 1
        yield item

def fit_and_tell(self):
    done = fit(self)
    for split, crops in (("val", 3), ("test", 1)):
        told = solver.predict(self.model, self.feed, split, crops, devices=self.devices)
        told.to_csv(self.folder / f"{split}-{self.devices.rank}.csv", index=False)
    return done

CropFeed.train_batches, solver.Solver.fit = batches, fit_and_tell
for folder in sys.argv[2:]:
    stopping, seen[0] = folder in stop, 0
    try: devices = train_together([folder])
    except Killed: pass
devices.leave()
'''


def opened(folder, standin, **values):
    """A run folder that is open: a small backbone without batch norms, and no dropout (the gate has one), for each
    process draws its own."""
    given = dict(
        backbone="test_convnext",
        use_attention=False,
        dropout=0.0,
        drop_path=0.0,
        epochs=2,
        cache=str(standin / "cache"),
    )
    cfg = small_config(standin, **given | values)
    open_run(folder, cfg, load_set(cfg), keep=False)
    return folder


def alone(folder, batches=None):
    """Train a run in this process, or some batches of it; its solver."""
    cfg = make_config(**json.loads((folder / "config.json").read_text()))
    found = load_set(cfg)
    cache = build_cache(found, cfg.size, cfg.fit, cfg.cache)
    model = make_model(cfg, float(found.rows("train").score.mean()))
    feed = (FrozenFeed if cfg.frozen else CropFeed)(
        *([model] if cfg.frozen else []), cache, found.table, cfg, torch.device("cpu")
    )
    solver = Solver(model, feed, cfg, folder)
    if batches:
        whole, seen = feed.train_batches, [0]

        def some(*a):
            for item in whole(*a):
                if seen[0] == batches:
                    raise KeyboardInterrupt
                seen[0] += 1
                yield item

        feed.train_batches = some
        with pytest.raises(KeyboardInterrupt):
            solver.fit()
    else:
        solver.fit()
    return solver


def curve(folder):
    return read_lines(folder / "metrics.jsonl")[
        ["epoch", "train_loss", "val_srcc", "val_plcc", "lr_backbone", "lr_head"]
    ].to_numpy(float)


def command(*words, processes=2, launcher="torchrun"):
    """The command line that trains in several processes of this machine."""
    line = dict(
        torchrun=["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"],
        accelerate=[
            "accelerate.commands.launch",
            "--multi_gpu",
            f"--num_processes={processes}",
            "--num_machines=1",
            "--mixed_precision=bf16",
            "--dynamo_backend=no",
            "--main_process_port=0",
        ],
    )
    return [sys.executable, "-m", *line[launcher], *map(str, words)]


def start(*words, **options):
    """Several processes, to their end; what they printed."""
    done = subprocess.run(command(*words, **options), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, standin):
    """Every case by one process and by two, all in one launch by Accelerate; among them a run that one process began,
    and one stopped in its second epoch."""
    root, each = tmp_path_factory.mktemp("devices"), dict(checkpoint_minutes=0.0)
    more = dict(norms=dict(backbone="test_efficientnet"), begun=CASES["l1"] | each, stopped=CASES["l1"] | each)
    two = {n: opened(root / "two" / n, standin, **v) for n, v in (CASES | more).items()}
    for name, values in CASES.items():
        alone(opened(root / "one" / name, standin, **values))
    alone(two["begun"], batches=2)
    script = root / "script.py"
    script.write_text(SCRIPT)
    return root, start(script, json.dumps([str(two["stopped"])]), *two.values(), launcher="accelerate")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, pairs):
    """Loss, validation and learning rates of every epoch, to 1e-4, for every kind of loss."""
    one, two = (curve(pairs[0] / k / case) for k in ("one", "two"))
    assert len(one) == 2 and abs(one[1, 1] - one[0, 1]) > 1e-3  # it learns
    assert np.allclose(one, two, rtol=1e-4, atol=1e-4), one - two
    a, b = (load_checkpoint(pairs[0] / k / case).state_dict() for k in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["l1", "frozen"])
@pytest.mark.parametrize("split, crops", [("val", 3), ("test", 1)])
def test_each_picture_is_scored_once(case, split, crops, pairs):
    """Both processes get the table that one gets: every picture once, in order, with the same numbers."""
    folder = pairs[0] / "two" / case
    solver = alone(folder)  # all epochs are done: it takes the best
    expected = predict(solver.model, solver.feed, split, crops)
    for rank in (0, 1):
        told = pd.read_csv(folder / f"{split}-{rank}.csv")
        assert list(told.image) == list(expected.image)
        assert np.allclose(told[["pred", "pred_std"]], expected[["pred", "pred_std"]], atol=1e-3, equal_nan=True)


@pytest.mark.slow
def test_learning_batch_norms_are_said(pairs):
    """Once in the output and in the run's environment; where there are none, nothing is said."""
    root, said = pairs
    norms, none = (json.loads((root / "two" / n / "environment.json").read_text()) for n in ("norms", "l1"))
    assert (
        said.count("batch norms learn") == 1 and "freeze_batchnorm" in norms["batch_norms"] and norms["processes"] == 2
    )
    assert "batch_norms" not in none and none["processes"] == 2
    assert "processes" not in json.loads((root / "one" / "l1" / "environment.json").read_text())


@pytest.mark.slow
def test_two_processes_then_one(pairs):
    """A run that two processes left in its second epoch ends as one that was never stopped, and says what changed."""
    folder = pairs[0] / "two" / "stopped"
    assert len(torch.load(folder / "resume.pt", weights_only=True)["random"]) == 2 and len(curve(folder)) == 1
    alone(folder)
    assert np.allclose(curve(folder), curve(pairs[0] / "one" / "l1"), rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "environment.json").read_text())["resumed"] == [{"processes": 1}]


@pytest.mark.slow
def test_one_process_then_two(pairs):
    """A run that one process left after two batches."""
    folder = pairs[0] / "two" / "begun"
    assert np.allclose(curve(folder), curve(pairs[0] / "one" / "l1"), rtol=1e-4, atol=1e-4)


def wait_for(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_killed_processes(pairs, standin):
    """kill -9 of one of two ends the launch, which names the signal; kill -9 of torchrun ends both; the same line
    resumes the run each time."""
    values = CASES["l1"] | dict(threads=1, epochs=40, schedule="constant", checkpoint_minutes=0.0)
    folder = opened(pairs[0] / "killed", standin, **values)
    journal = folder / "metrics.jsonl"

    def launched(epochs):
        """A launch that has trained so many epochs more, and its two processes."""
        before = len(read_lines(journal))
        torchrun = subprocess.Popen(command("-m", "smart_iqa.lab.runs", folder), stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(read_lines(journal)) >= before + epochs or torchrun.poll() is not None)
        both = psutil.Process(torchrun.pid).children(recursive=True)
        assert len(both) == 2 and is_held(folder)
        return torchrun, both

    torchrun, both = launched(1)
    both[1].kill()
    error = torchrun.communicate(timeout=60)[1]
    assert torchrun.returncode == 1 and "Signal 9 (SIGKILL)" in error
    assert not psutil.wait_procs(both, timeout=3)[1] and not is_held(folder)
    torchrun, both = launched(2)
    torchrun.kill()
    torchrun.wait()
    assert not psutil.wait_procs(both, timeout=3)[1] and not is_held(folder)
    done = len(read_lines(journal))
    assert 3 <= done < 40, "the kill came too late to test anything"
    whole = opened(pairs[0] / "whole", standin, **values)
    alone(whole, batches=4 * done)
    assert np.allclose(curve(folder)[:done], curve(whole)[:done], rtol=1e-4, atol=1e-4)


def failing(*words):
    """The errors of a launch that fails."""
    done = subprocess.run(command("-m", "smart_iqa.lab.runs", *words), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.slow
def test_the_error_says_what_a_process_said(pairs, standin):
    """A diverging run ends both processes, with the sentence that one process alone would have said."""
    folder = opened(pairs[0] / "diverges", standin, **CASES["l1"] | dict(threads=1, lr=1e30, clip=0.0))
    error = failing(folder)
    assert "Diverged: " in error and "lower lr" in error and str(folder) in error and not is_held(folder)


@pytest.mark.slow
def test_a_held_folder_is_refused(pairs, standin):
    """Two launches do not train one run: the second says why, and changes nothing."""
    folder = opened(pairs[0] / "held", standin, **CASES["l1"])
    hold = (
        "import sys; from smart_iqa.lab.runs import hold_by_hand; hold_by_hand(sys.argv[1]); "
        "print('here', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "here\n"
    error = failing(folder)
    assert "Busy: " in error and "another process works here" in error and not (folder / "metrics.jsonl").exists()
    other.kill()
    other.wait()


@pytest.mark.slow
def test_the_notebook_after_torchrun(tmp_path, standin):
    """A run that torchrun trained, with its parameters, in two processes of one machine and of two: `train` then writes
    the record that one process makes."""
    given = dict(
        dataset="csv",
        root=str(standin),
        labels="labels.csv",
        score_range="0,100",
        backbone="test_convnext",
        use_attention=False,
        dropout=0.0,
        drop_path=0.0,
        pretrained="none",
        size=64,
        crop=64,
        train_crops=1,
        val_crops=2,
        test_crops=4,
        epochs=2,
        batch_size=8,
        patience=0,
        amp="off",
        device="cpu",
        group_duplicates=False,
        cache=str(tmp_path / "cache"),
        threads=2,
        loss="plcc",
        profile="lite",
        baseline=False,
    )

    def words(out):
        return [f"{k}={v}" for k, v in (given | dict(out=out)).items()]

    start("-m", "smart_iqa.lab.runs", *words(tmp_path / "2"))
    with without_kernels():
        one, two = (execute("train", given, out=tmp_path / n, echo=None) for n in "12")
    records = [json.loads((f / "record.json").read_text()) for f in (one, two)]
    assert one.name == two.name and np.isclose(*(r["splits"]["test"]["srcc"] for r in records), atol=1e-4)
    assert np.allclose(curve(two), curve(one), rtol=1e-4, atol=1e-4)
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    lines = [
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            f"--node-rank={k}",
            "--nproc-per-node=1",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
            "-m",
            "smart_iqa.lab.runs",
            *words(tmp_path / "3"),
        ]
        for k in (0, 1)
    ]
    for p in [subprocess.Popen(line) for line in lines]:
        assert p.wait(300) == 0
    assert np.allclose(curve(tmp_path / "3" / "runs" / one.name), curve(one), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_launched(monkeypatch):
    """In one sentence, before anything is trained."""
    with pytest.raises(ValueError, match="cuda"):
        own_device("cuda:1", 1, 2)
    with monkeypatch.context() as m, pytest.raises(ImportError, match="smart-iqa.batch"):
        m.setitem(sys.modules, "accelerate", None)
        Devices(0, 2, torch.device("cpu")).prepare(torch.nn.Linear(1, 1))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="--multi_gpu"):
        Devices.of_launcher("cpu")


def test_a_full_disk_leaves_no_part(standin, tmp_path, monkeypatch):
    """The old resume point stays, the torn one is removed."""
    solver = alone(opened(tmp_path / "run", standin, epochs=1))
    before = (solver.folder / "resume.pt").read_bytes()

    def full(point, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_resume_point(solver)
    assert (solver.folder / "resume.pt").read_bytes() == before and not list(solver.folder.glob(".resume*"))


def test_a_clock_that_jumps(standin, tmp_path, monkeypatch):
    """Back by an hour at every look: seconds stay positive, and resume points are written."""
    now = [1e9]

    def jumps():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", jumps)
    saved, save = [], training.save_resume_point
    monkeypatch.setattr(training, "save_resume_point", lambda solver: (saved.append(1), save(solver)))
    solver = alone(opened(tmp_path / "run", standin, epochs=1, checkpoint_minutes=0.0))
    assert (
        all(solver.history[0][k] >= 0 for k in ("seconds", "val_seconds")) and len(saved) == 5
    )  # four steps and the epoch's end

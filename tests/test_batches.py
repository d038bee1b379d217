"""Whole batches in real processes, of which some are killed, starved or misled.

Afterwards every run is finished once, and its numbers are those of an undisturbed batch.
"""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import STANDIN

from smart_iqa.config import make_config
from smart_iqa.data import load_set
from smart_iqa.files import take_lock
from smart_iqa.lab import workers
from smart_iqa.lab.runs import (
    KERNEL_LOCK,
    RUN_LOCK,
    Busy,
    RunError,
    execute,
    is_finished,
    is_held,
    list_runs,
    open_run,
    planned_folder,
    release,
    run_state,
    train_together,
)
from smart_iqa.lab.studies import Study, run_study
from smart_iqa.lab.workers import Job, connect, finish, run_jobs

pytest.importorskip("distributed", reason="needs Dask distributed: pip install 'smart-iqa[batch]'")
CLI = [sys.executable, "-c", "import sys; from smart_iqa.cli import main; sys.exit(main())"]
OWN = dict(
    os.environ,
    OMP_NUM_THREADS="1",
    PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
)


def recipe(root, **more):
    """What every run of a batch is: seconds of training, a resume point after every step."""
    own = dict(root=str(root), test_crops=2, epochs=4, checkpoint_minutes=0, threads=1, baseline=False)
    return STANDIN | own | more


def study(root, out, workers=2, log=None, env=None):
    """The command of a batch: two arms, one seed, two workers."""
    words = [
        "run",
        "study",
        f"control={json.dumps(recipe(root))}",
        'arms={"l2": {"loss": "l2"}}',
        "seeds=0",
        f"workers={workers}",
        f"out={out}",
        "batch=study",
    ]
    return subprocess.Popen(
        [*CLI, *words], env=OWN | (env or {}), stdout=log or subprocess.DEVNULL, stderr=subprocess.STDOUT
    )


def results(out):
    """All that a batch has found out, without what no two batches share: seconds and times."""
    runs = {f.parent.name: f.parent for f in sorted(Path(out).glob("study/*/record.json"))}
    found = {}
    for name, folder in runs.items():
        record = json.loads((folder / "record.json").read_text())
        history = (
            pd.read_json(folder / "metrics.jsonl", lines=True)
            if (folder / "metrics.jsonl").exists()
            else pd.DataFrame()
        )
        table = (folder / "predictions.csv").read_text() if (folder / "predictions.csv").exists() else ""
        for metrics in record.get("splits", {}).values():
            for k in ("plcc_fitted", "rmse_fitted", "fit"):  # four parameters through 8 images are not one curve
                metrics.pop(k, None)
        found[name] = (
            {k: v for k, v in record.items() if k != "seconds"},
            history.drop(columns=["seconds", "val_seconds"], errors="ignore").to_csv(),
            table,
        )
    return found


@pytest.fixture(scope="session")
def undisturbed(standin, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert study(standin, out, workers=2).wait(timeout=600) == 0
    assert len(results(out)) == 3  # two arms, and the study itself
    return results(out)


def check(out, expected):
    assert results(out) == expected
    # (a kernel that finished as its parent died leaves its last progress.json, which nobody reads)
    left = [
        str(p.relative_to(out))
        for p in Path(out).rglob("*")
        if p.name.endswith(".tmp") or p.name in ("failure.json", "resume.pt")
    ]
    assert not left and not any(is_held(f) for f in Path(out).glob("study/*"))


def victims(driver):
    """The processes of a batch by what they are."""
    found = dict(driver=[driver.pid], kernel=[], worker=[])
    try:
        for p in psutil.Process(driver.pid).children(recursive=True):
            line = " ".join(p.cmdline())
            found["kernel"] += [p.pid] if "ipykernel" in line else []
            found["worker"] += [p.pid] if "multiprocessing.spawn" in line and "spawn_main" in line else []
    except psutil.NoSuchProcess:
        pass
    return found


def kill(pid):
    """Kill -9; whether there was something to kill."""
    try:
        alive = psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    return alive


def gone(pids, within=20):
    """Wait until processes have ended: nothing may outlive its parent for long."""
    until = time.monotonic() + within
    while alive := [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < until, (
            f"processes outlive their parent: {[psutil.Process(p).cmdline() for p in alive]}"
        )
        time.sleep(0.2)


def chaos(root, out, seed, kills, log):
    """Kill processes of a batch at random moments, starting it again where it ends, until it has finished."""
    rng, driver, starts = random.Random(seed), study(root, out, log=log), 1
    until, hit = time.monotonic() + 900, 0
    while driver.poll() is None or driver.returncode != 0:
        assert time.monotonic() < until and starts < 15, "the batch does not end"
        if driver.poll() is not None:
            print(f"{time.strftime('%X')} ended with {driver.returncode}: started again", file=log, flush=True)
            driver, starts = study(root, out, log=log), starts + 1
        if not kills:
            driver.wait(timeout=600)
            continue
        while driver.poll() is None and len(victims(driver)["kernel"]) < 2:  # the study's own kernel, and that of a run
            time.sleep(0.2)
        time.sleep(rng.uniform(0, 8))
        there = victims(driver)
        kind = rng.choice([k for k in ("driver", "kernel", "kernel", "worker") if there[k]])
        everybody = [p for pids in there.values() for p in pids]
        if not kill(rng.choice(there[kind])):
            continue  # it has ended by itself
        kills, hit = kills - 1, hit + 1
        print(
            f"{time.strftime('%X')} kill -9 of a {kind};"
            f" {[f.name for f in Path(out).glob('study/*') if is_finished(f)]} were finished",
            file=log,
            flush=True,
        )
        if kind == "driver":
            driver.wait()
            gone(everybody)
    return hit


@pytest.mark.slow  # the notebooks lab/runs and lab/workers kill a kernel and a worker
@pytest.mark.parametrize("seed", [0])  # other seeds kill at other moments
def test_random_kills(standin, tmp_path, undisturbed, seed):
    """kill -9 of kernels, workers and the driver at random moments, three times a batch."""
    with open(tmp_path / "log.txt", "w") as log:
        hit = chaos(standin, tmp_path / "out", seed, 3, log)
    print((tmp_path / "log.txt").read_text())
    assert hit, "nothing was killed"
    check(tmp_path / "out", undisturbed)


@contextmanager
def dask(*words):
    p = subprocess.Popen(
        [sys.executable, "-m", "dask", *map(str, words)], env=OWN, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield p
    finally:
        for child in psutil.Process(p.pid).children(recursive=True) if p.poll() is None else ():
            kill(child.pid)
        kill(p.pid)
        p.wait()


def until_true(condition, within=300):
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.3)


@pytest.mark.slow
def test_scheduler_killed_and_workers_late(standin, tmp_path, undisturbed):
    """A scheduler of its own: workers join after the batch has begun; it is killed, started anew, and the same
    command goes on."""
    file, out = tmp_path / "scheduler.json", tmp_path / "out"
    with open(tmp_path / "log.txt", "w+") as log:
        with dask(
            "scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file
        ) as scheduler:
            until_true(file.exists)
            driver = study(standin, out, workers=file, log=log)
            time.sleep(8)
            assert driver.poll() is None and not list(out.glob("study/*/record.json"))  # it waits for workers
            with dask("worker", "--nthreads", 1, "--memory-limit", 0, "--no-dashboard", "--scheduler-file", file):
                until_true(lambda: list(out.glob("study/*/resume.pt")) or list(out.glob("study/*/record.json")))
                kill(scheduler.pid)
                assert driver.wait(timeout=180) == 1
        log.seek(0)
        assert "the scheduler has gone" in log.read()
        file.unlink()
        with dask("scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file):
            until_true(file.exists)
            driver = study(standin, out, workers=file, log=log)
            with (
                dask("worker", "--nthreads", 1, "--memory-limit", 0, "--no-dashboard", "--scheduler-file", file),
                dask("worker", "--nthreads", 1, "--memory-limit", 0, "--no-dashboard", "--scheduler-file", file),
            ):
                assert driver.wait(timeout=300) == 0
    check(out, undisturbed)


NOTE = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))


def small_notebook(path, *cells):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    nb = new_notebook(cells=[new_code_cell(c) for c in cells], metadata=NOTE)
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, path)
    return str(path)


@pytest.mark.slow
def test_every_run_starts_once(tmp_path):
    """Two drivers, one of them with a worker, want the same four runs: each is executed by one of them."""
    diary = tmp_path / "diary"
    nb = small_notebook(
        tmp_path / "n.ipynb",
        "n = 0\nfolder = None",
        f"import time\nwith open({str(diary)!r}, 'a') as f: f.write(f'{{n}}\\n')\ntime.sleep(1)",
        "from pathlib import Path\nPath(folder, 'record.json').write_text('{}')",
    )
    jobs = f"{{n: Job({nb!r}, dict(n=n)) for n in range(4)}}"
    code = (
        "import sys\nfrom smart_iqa.lab.workers import *\nif __name__ == '__main__':\n"  # the worker imports it, too
        f"    print(len(finish({jobs}, {str(tmp_path / 'out')!r}, workers=sys.argv[1])))"
    )
    (tmp_path / "driver.py").write_text(code)
    drivers = [
        subprocess.Popen([sys.executable, tmp_path / "driver.py", n], env=OWN, stdout=subprocess.PIPE, text=True)
        for n in "01"
    ]
    assert [p.communicate(timeout=300)[0].strip() for p in drivers] == ["4"] * 2
    assert sorted(diary.read_text().split()) == list("0123")


def test_stale_locks(tmp_path):
    """Lock files that a dead process left hold nothing, whatever stands in them."""
    nb = small_notebook(
        tmp_path / "n.ipynb", "folder = None", "from pathlib import Path\nPath(folder, 'record.json').write_text('{}')"
    )
    folder = planned_folder(nb, {}, tmp_path)
    folder.mkdir(parents=True)
    for name in (RUN_LOCK, KERNEL_LOCK):
        (folder / name).write_text("4194304\nanother-host\n")
    (folder / "failure.json").write_text("{")  # torn
    (folder / ".record.json.123.tmp").write_text("{")
    assert run_state(folder)["state"] == "waiting"
    assert (
        execute(nb, {}, tmp_path, echo=None) == folder
        and not list(folder.glob("*.tmp"))
        and not list(folder.glob(".*.tmp"))
    )


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """Lustre without its option flock answers ENOSYS, others other numbers: an error with the mend, and no lock
    that a killed process would leave behind."""
    nb = small_notebook(
        tmp_path / "n.ipynb", "folder = None", "from pathlib import Path\nPath(folder, 'record.json').write_text('{}')"
    )
    fcntl = pytest.importorskip("fcntl")

    def flock(fd, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):  # the second time with lock files that lie there, as in a folder that was copied from elsewhere
        with pytest.raises(RunError, match="no file locks.*another out"):
            execute(nb, {}, tmp_path, echo=None)
        folder = planned_folder(nb, {}, tmp_path)
        assert not is_held(folder)
        for name in (RUN_LOCK, KERNEL_LOCK):
            (folder / name).touch()
    with pytest.raises(OSError, match="no file locks"):
        take_lock(folder / RUN_LOCK)
    monkeypatch.undo()
    assert is_finished(execute(nb, {}, tmp_path, echo=None, wait=False))


def test_who_looks_on_shows_the_present_and_hides_nothing(tmp_path):
    """Progress that a killed attempt left is not told again; a journal that cannot be read does not take the
    place of the run's own error."""
    nb = small_notebook(
        tmp_path / "n.ipynb", "folder = None", "import time\ntime.sleep(2.5)\nraise KeyError('the reason')"
    )
    folder, said = planned_folder(nb, {}, tmp_path), []
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(
        json.dumps(dict(step="scoring test", done=90, total=100, seconds=900.0, initial=0))
    )
    (folder / "metrics.jsonl").write_text('{"epoch": 1\n{"epoch": 2}\n')
    with pytest.raises(RunError, match="the reason"):
        execute(nb, {}, tmp_path, echo=said.append)
    assert not any("scoring test" in line for line in said)


def test_every_change_of_the_environment_is_told(tmp_path):
    """Back to what it began with is a change, too."""
    from smart_iqa.devices import _write_environment, last_environment

    first, second = dict(commit="a", threads=1), dict(commit="b", threads=1)
    for now in (first, second, second | dict(threads=2), second | dict(threads=2), first):
        _write_environment(tmp_path, now)
    told = json.loads((tmp_path / "environment.json").read_text())
    assert (
        told["resumed"] == [dict(commit="b"), dict(threads=2), first]
        and {k: last_environment(told)[k] for k in first} == first
    )


@pytest.mark.slow
def test_a_run_diverges_and_the_rest_goes_on(standin, tmp_path):
    """NaN stops one arm with epoch, step and rates; its folder says so; the others are finished."""
    given = recipe(standin, epochs=1, seed=0)
    arms = {"control": {}, "explodes": dict(lr=1e30, clip=0.0, schedule="constant"), "l2": dict(loss="l2")}
    common = {k: v for k, v in given.items() if k != "seed"}
    sweep = run_study(
        Study("sweep", arms=dict(demo=arms)), "demo", recipe=common, seeds="0", out=tmp_path, batch="sweep"
    )
    assert sorted(sweep.runs) == [("control", 0), ("l2", 0)]
    assert list(sweep.missing) == ["explodes"]
    assert re.search(r"diverged: .*epoch 1.*lr \(now 1e\+30", sweep.missing["explodes"])
    log = list_runs(tmp_path, "state == 'failed'", every=True)
    assert len(log) and set(log.lr) == {1e30}
    failed = json.loads((tmp_path / "sweep" / log.run[0] / "failure.json").read_text())
    assert (
        failed["kind"] == "Diverged"
        and "epoch 1" in failed["reason"]
        and (tmp_path / "sweep" / log.run[0] / failed["configuration"]).exists()
    )


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own size, and a function that changes it."""
    where = tmp_path / "disk"
    where.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root")

    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(where)], check=True)

    yield where, remount
    subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.slow
def test_disk_full_and_read_only(standin, tmp_path, small_disk, undisturbed):
    """A full disk is an error that says so, leaves no half file, and the same call goes on when there is room; a
    disk that may only be read is another."""
    disk, remount = small_disk
    jobs = {0: Job("train", recipe(standin, open_test=False, seed=0), "control-s0")}
    with pytest.raises(RunError, match=r"(?i)no space left on device"):
        finish(jobs, disk, "study")
    for folder in (disk / "study").glob("*"):
        assert not is_finished(folder) and not [p for p in folder.iterdir() if p.suffix == ".tmp"]
        for p in folder.glob("*.json"):
            json.loads(p.read_text())
    remount("size=200m")
    folders = finish(jobs, disk, "study")
    assert {k: v for k, v in results(disk).items()} == {k: v for k, v in undisturbed.items() if k.startswith("control")}
    remount("ro")
    assert finish(jobs, disk, "study") == folders  # what is finished can be read
    with pytest.raises(RunError, match=r"(?i)read-only file system.*run the same command again to resume"):
        finish({0: Job("train", recipe(standin, seed=9))}, disk, "study")


FAKETIME = next(
    (
        p
        for p in (
            Path("/usr/lib", *there, "faketime", "libfaketimeMT.so.1")
            for there in (["x86_64-linux-gnu"], ["aarch64-linux-gnu"], [])
        )
        if p.exists()
    ),
    None,
)


def jumping(clock, process, every):
    """Set a process's clock by days, forwards and backwards, until it ends; how often."""
    jumps = 0
    while process.poll() is None:
        clock.with_suffix(".new").write_text(random.Random(jumps).choice(["+2d", "-2d", "+1h", "-400d", "+0"]))
        os.replace(clock.with_suffix(".new"), clock)
        jumps += 1
        time.sleep(every)
    return jumps


def false_clock(clock):
    """The environment of processes whose wall clock is what a file says; other clocks go on."""
    clock.write_text("+0")
    site = clock.with_name("site")
    site.mkdir()  # libfaketime 0.9.10 breaks clock_nanosleep (EINVAL) where the monotonic clock is left alone
    (site / "sitecustomize.py").write_text(
        "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None"
    )
    return dict(
        PYTHONPATH=os.pathsep.join([str(site), OWN["PYTHONPATH"]]),
        LD_PRELOAD=str(FAKETIME),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        DONT_FAKE_MONOTONIC="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )


needs_faketime = pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime (Debian: faketime)")


@pytest.mark.slow
@needs_faketime
def test_a_clock_that_jumps(standin, tmp_path):
    """Days forwards and backwards while a run trains: resume points go on, times stay sane, and the numbers are
    those of an undisturbed run."""
    clock, given = tmp_path / "clock", recipe(standin, open_test=False, seed=0)

    def words(out):
        return [f"{k}={v}" for k, v in given.items()] + [f"out={tmp_path / out}", "batch=study", "name=control"]

    command = [sys.executable, "-m", "smart_iqa.lab.runs", *words("jumped")]
    trained = subprocess.Popen(command, env=OWN | false_clock(clock))
    assert jumping(clock, trained, 0.3) > 5 and trained.returncode == 0
    train_together(words("calm"))
    jumped, calm = (next((tmp_path / out / "study").glob("*")) for out in ("jumped", "calm"))
    release(calm)
    histories = [pd.read_json(folder / "metrics.jsonl", lines=True) for folder in (jumped, calm)]
    assert histories[0].seconds.between(0, 600).all() and (jumped / "resume.pt").exists()
    ours, theirs = (h.drop(columns=["seconds", "val_seconds"]) for h in histories)
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    ours, theirs = ((folder / "checkpoint.safetensors").read_bytes() for folder in (jumped, calm))
    assert ours == theirs


@needs_faketime
@pytest.mark.slow
def test_a_whole_batch_under_a_clock_that_jumps(standin, tmp_path, undisturbed):
    """Kernels and workers too, and the run's end."""
    clock, out = tmp_path / "clock", tmp_path / "out"
    driver = study(standin, out, env=false_clock(clock))
    assert jumping(clock, driver, 5) > 5 and driver.returncode == 0
    check(out, undisturbed)


def test_by_hand_nothing_is_opened_where_somebody_works(standin, tmp_path):
    """A launcher works there; or a kernel whose launcher died; or the run was finished just now. Locks taken
    before the error are released."""
    from smart_iqa.lab import runs as records

    cfg = make_config(**recipe(standin, seed=0))
    found, run = load_set(cfg), tmp_path / "run"
    run.mkdir()
    hold = (
        "import sys; from smart_iqa.files import take_lock; lock = take_lock(sys.argv[1]);"
        " print('here', flush=True); sys.stdin.read()"
    )
    for name in (RUN_LOCK, KERNEL_LOCK):
        other = subprocess.Popen(
            [sys.executable, "-c", hold, str(run / name)],
            env=OWN,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout.readline() == "here\n"
        with pytest.raises(Busy):
            open_run(run, cfg, found)
        other.kill()
        other.wait()
        assert not records._kept and not (run / "config.json").exists()
    (run / "record.json").write_text("{}")
    with pytest.raises(ValueError, match="finished"):
        records.hold_by_hand(run)
    assert not records._kept


OPEN = """
from pathlib import Path
from smart_iqa.config import make_config
from smart_iqa.data import load_set
from smart_iqa.lab.runs import open_run
cfg = make_config(profile="demo", **{given!r})
open_run(Path(folder), cfg, load_set(cfg))
"""


def test_a_batch_folder_behind_a_link(standin, tmp_path):
    """The kernel of a run knows its launcher's lock by whatever name."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "study").symlink_to(tmp_path / "scratch")
    opens = OPEN.format(given=recipe(standin))
    nb = small_notebook(tmp_path / "n.ipynb", "folder = None", opens, "Path(folder, 'record.json').write_text('{}')")
    assert is_finished(execute(nb, {}, tmp_path, "study", echo=None))


def test_a_notebook_gone_through_by_hand_holds_its_folder(standin, tmp_path):
    """Without a launcher, open_run holds the folder as long as the kernel lives; and where somebody works
    already, it says so."""
    given = recipe(standin, seed=0)
    folder = planned_folder("train", given, tmp_path)
    waits = "import sys\nprint('open', flush=True)\nsys.stdin.read()"
    by_hand = f"folder = {str(folder)!r}\n{OPEN.format(given=given)}\n{waits}"
    kernel = subprocess.Popen(
        [sys.executable, "-c", by_hand], env=OWN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert kernel.stdout.readline() == "open\n"
    with pytest.raises(Busy):
        execute("train", given, tmp_path, echo=None, wait=False)
    cfg = make_config(profile="demo", **given)
    with pytest.raises(Busy, match="another process works here"):
        open_run(folder, cfg, load_set(cfg))
    kernel.kill()
    kernel.wait()
    assert not is_held(folder)


@pytest.fixture(scope="module")
def one_worker():
    """A client with one worker, which runs the code that is installed."""
    with connect(1) as client:
        yield client


@pytest.mark.parametrize("other", ["smart_iqa", "torch", "n.ipynb"])
def test_workers_of_another_version(other, tmp_path, monkeypatch, one_worker):
    """A worker that would compute with other code, other packages or another notebook refuses."""
    nb = small_notebook(
        tmp_path / "n.ipynb", "folder = None", "from pathlib import Path\nPath(folder, 'record.json').write_text('{}')"
    )
    here = workers._versions(nb)
    assert other in here
    monkeypatch.setattr(workers, "_versions", lambda notebook: here | {other: "another"})
    ((_, ended),) = run_jobs([Job(nb, {})], tmp_path, client=one_worker)
    assert isinstance(ended, RunError) and f"another version of {other} than the driver" in str(ended)


def test_a_relative_root_is_found_again(tmp_path, monkeypatch):
    """Runs are made and read under one name, whatever directory `root` is told from."""
    nb = small_notebook(
        tmp_path / "n.ipynb",
        "root = None\nfolder = None",
        "from pathlib import Path\nPath(folder, 'record.json').write_text('{}')",
    )
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list(finish({0: Job(nb, dict(root="pics"))}, tmp_path)) == [0]


@pytest.mark.parametrize("kind, finished", [("Diverged", [0, 2, 3]), ("KeyError", [0])])
def test_the_rest_goes_on_after_what_concerns_one_run_alone(kind, finished, tmp_path):
    """In a study as in a sweep: after a diverged run all others are made, and the error comes then; another error
    stops what was not begun."""
    nb = small_notebook(
        tmp_path / "n.ipynb",
        "n = None\nfolder = None",
        f"from pathlib import Path\nif n == 1:\n    raise type({kind!r}, (Exception,), {{}})('x')\n"
        "Path(folder, 'record.json').write_text('{}')",
    )
    jobs = {n: Job(nb, dict(n=n)) for n in range(4)}
    with pytest.raises(RunError) as told:
        finish(jobs, tmp_path)
    assert told.value.kind == kind and list(finish(jobs, tmp_path, only_finished=True)) == finished


def test_what_a_worker_cannot_do_is_not_called_killed(tmp_path, monkeypatch, one_worker):
    """A notebook that only the driver sees."""
    nb = small_notebook(tmp_path / "n.ipynb", "folder = None", "pass")
    monkeypatch.setattr(workers, "_versions", lambda notebook: {})
    said = []
    job = Job(str(Path(nb).with_name("none.ipynb")), {})
    ((_, ended),) = run_jobs([job], tmp_path, client=one_worker, echo=said.append)
    assert ended.kind == "ValueError" and "none.ipynb" in str(ended) and not said


def test_what_killed_a_run_is_asked_again(tmp_path, monkeypatch):
    """A dead kernel: three attempts; an error of the run itself is final."""
    for kind, times in (("DeadKernelError", 3), ("Diverged", 1)):
        asked = []
        monkeypatch.setattr(
            workers, "_work", lambda job, *a, kind=kind, asked=asked: asked.append(job) or ("failed", ("no", kind, ""))
        )
        monkeypatch.setattr(workers.time, "sleep", lambda s: None)
        ((_, ended),) = run_jobs([Job("train", {})], tmp_path)
        assert ended.kind == kind and len(asked) == times


@pytest.mark.slow
def test_a_watch_ends_with_its_reader(standin, tmp_path):
    """`smart-iqa runs --watch | head -1`, and options that it does not know."""
    execute("train", recipe(standin, epochs=1, open_test=False), tmp_path, echo=None)
    watch = subprocess.Popen(
        [*CLI, "runs", "--watch", "--out", str(tmp_path)], env=OWN, stdout=subprocess.PIPE, text=True
    )
    assert "1 finished" in watch.stdout.readline()
    watch.stdout.close()
    assert watch.wait(timeout=60) == 0
    done = subprocess.run(
        [*CLI, "runs", "--watch", "--where", "seed == 0"], env=OWN, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "--where" in done.stderr

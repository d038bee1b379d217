"""The pixel cache survives kills, does not grow with the set in memory, and is the same however it is made."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from smart_iqa.crops import build_cache
from smart_iqa.sets import DataError
from smart_iqa.splits import ImageSet

N = 48
BUILD = """
import sys
from pathlib import Path
import pandas as pd
from smart_iqa.crops import build_cache
from smart_iqa.splits import ImageSet

if __name__ == "__main__":
    root, folder, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    names = sorted(p.name for p in root.glob("*.jpg"))
    table = pd.DataFrame(dict(image=names, mos=0.0, score=50.0, std=0.0, ref=names, split="train"))
    print("ready", flush=True)
    build_cache(ImageSet("photos", root, table), 128, folder=folder, processes=processes)
    import resource
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(N):
        small = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8))
        small.resize((1600, 1200), Image.Resampling.BICUBIC).save(root / f"{i:03d}.jpg", quality=90)
    (root / "build.py").write_text(BUILD)
    return root


def stand_in(root: Path) -> ImageSet:
    names = sorted(p.name for p in root.glob("*.jpg"))
    return ImageSet(
        "photos", root, pd.DataFrame(dict(image=names, mos=0.0, score=50.0, std=0.0, ref=names, split="train"))
    )


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    return build_cache(stand_in(photos), 128, folder=tmp_path_factory.mktemp("whole"))


def start(photos: Path, folder: Path, processes: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(photos / "build.py"), str(photos), str(folder), str(processes)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_in_the_middle_goes_on(photos, whole, tmp_path):
    p = start(photos, tmp_path, 0)
    p.stdout.readline()
    while not (rows := list(tmp_path.glob("*.rows"))) or rows[0].stat().st_size == 0:
        assert p.poll() is None, "finished before it could be killed"
        time.sleep(0.005)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    done = len(rows[0].read_text().splitlines())
    assert 0 < done < N and not list(tmp_path.glob("*.csv"))
    kept = rows[0].read_text().splitlines()[0]
    with open(next(tmp_path.glob("*.part")), "ab") as f:  # pixels whose row was never written
        f.write(b"x" * 1234)
    rows[0].write_text(rows[0].read_text() + kept[:7])    # and a torn row
    before = os.stat(next(tmp_path.glob("*.part"))).st_ino
    cache = build_cache(stand_in(photos), 128, folder=tmp_path)
    assert cache.path.read_bytes() == whole.path.read_bytes() and cache.index.equals(whole.index)
    assert os.stat(cache.path).st_ino == before, "begun anew instead of gone on with"
    assert not list(tmp_path.glob("*.rows")) and not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_processes_give_the_same_bytes(photos, whole, tmp_path):
    p = start(photos, tmp_path, 2)
    assert "peak" in p.communicate(timeout=120)[0] and p.returncode == 0
    assert next(tmp_path.glob("*.u8")).read_bytes() == whole.path.read_bytes()


def test_two_at_once_make_one_cache(photos, whole, tmp_path):
    both = [start(photos, tmp_path, 0) for _ in range(2)]
    assert [(p.communicate(timeout=120), p.returncode)[1] for p in both] == [0, 0]
    assert [f.read_bytes() for f in tmp_path.glob("*.u8")] == [whole.path.read_bytes()]


def test_died_between_the_last_two_steps(photos, whole, tmp_path):
    cache = build_cache(stand_in(photos), 128, folder=tmp_path)
    index = cache.path.with_suffix(".csv")
    rows = pd.read_csv(index, dtype={"image": str}).to_numpy().tolist()
    cache.path.with_suffix(".rows").write_text("".join(f'["{r[0]}", {r[1]}, {r[2]}, {r[3]}]\n' for r in rows))
    index.unlink()
    inode = os.stat(cache.path).st_ino
    again = build_cache(stand_in(photos), 128, folder=tmp_path)
    assert again.path.read_bytes() == whole.path.read_bytes() and os.stat(again.path).st_ino == inode


def test_a_broken_picture_is_named_and_the_work_is_kept(photos, tmp_path):
    root = tmp_path / "copy"
    root.mkdir()
    for f in sorted(photos.glob("*.jpg"))[:6]:
        (root / f.name).write_bytes(f.read_bytes())
    (root / "003.jpg").write_bytes((root / "003.jpg").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"003\.jpg.*cannot be decoded"):
        build_cache(stand_in(root), 128, folder=tmp_path)
    images = stand_in(root)
    began = time.perf_counter()
    cache = build_cache(images, 128, folder=tmp_path, on_error="skip")
    assert len(cache) == len(images.table) == 5 and list(images.skipped.image) == ["003.jpg"]
    assert time.perf_counter() - began < 1, "decoded again"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(photos, tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, times in ((few, 1), (many, 8)):
        folder.mkdir()
        for k in range(times):
            for f in photos.glob("*.jpg"):
                (folder / f"{k}-{f.name}").write_bytes(f.read_bytes())
        (folder / "build.py").write_text(BUILD)
    peaks = []
    for folder in (few, many):
        out = start(folder, folder / "cache", 0).communicate(timeout=300)[0]
        peaks.append(int(out.split("peak")[1]))
    assert peaks[1] < 1.15 * peaks[0]

"""Try the small install as a photographer would: a folder, a table, a contact sheet, a map, the best of a group.

Run it with the Python of an environment that has `pip install .` and nothing else.
"""

import importlib.util
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

LIMIT = 400e6  # bytes of site-packages
RESEARCH = ("torch", "timm", "torchvision", "matplotlib", "papermill")


def command(*words, code: int = 0) -> str:
    """Run smart-iqa; return what it prints."""
    done = subprocess.run(["smart-iqa", *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def scene(seed: int, width: int = 900, height: int = 600) -> Image.Image:
    """Draw a smooth scene with edges, another one for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / height
    waves = [np.sin(6 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(-1, 1, (3, 3))]
    pixels = 128 + 60 * np.stack(waves, -1) * np.sign(np.sin(9 * x + seed))[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def size_of(folder: Path) -> int:
    """Sum the bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


present = [name for name in RESEARCH if importlib.util.find_spec(name)]
assert not present, f"the small install brings {', '.join(present)}"
bytes_installed = size_of(Path(site.getsitepackages()[0]))
print(f"site-packages: {bytes_installed / 1e6:.0f} MB")
assert bytes_installed < LIMIT

with tempfile.TemporaryDirectory() as scratch:
    photos, out = Path(scratch) / "photos", Path(scratch) / "out"
    photos.mkdir()
    for k in range(3):
        scene(k).save(photos / f"{k}.jpg", quality=92)
    scene(0).filter(ImageFilter.GaussianBlur(4)).save(photos / "0-blurred.jpg", quality=92)
    started = time.time()
    command("score", photos / "0.jpg")
    print(f"one picture from a cold process: {time.time() - started:.2f} s")
    outputs = ["--out", out / "scores.csv", "--html", out / "sheet.html", "--heatmap", out / "maps"]
    print(command("score", photos, *outputs))
    table = pd.read_csv(out / "scores.csv")
    assert table.score.between(0, 100).all()
    assert len(table) == len(list((out / "maps").glob("*.map.png"))) == 4
    assert (out / "sheet.html").read_text(encoding="utf-8").count("<figure>") == 4
    print(command("best", photos, "--out", out / "best.csv", "--html", out / "best.html"))
    groups = pd.read_csv(out / "best.csv").query("file.str.contains('0')")
    assert groups.sort_values("score").file.iloc[-1].endswith("0.jpg")
    print(command("--version"))
    assert "pip install 'smart-iqa[lab]'" in command("demo", code=1)

missing = subprocess.run([sys.executable, "-c", "from smart_iqa import SmartIQA"], capture_output=True, text=True)
assert "smart-iqa[lab]" in missing.stderr, missing.stderr
print("the small install works")

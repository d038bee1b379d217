"""Stand-in sets for the tests: small synthetic pictures whose score is how little noise they carry. And notebooks
without kernels."""
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: kernels and workers take it over, and several tests run at once

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from smart_iqa.config import make_config
from smart_iqa.crops import build_cache
from smart_iqa.data import load_set
from smart_iqa.files import PROGRESS
from smart_iqa.lab import runs
from smart_iqa.training import CropFeed, make_model

SPLITS = ["train"] * 25 + ["val"] * 8 + ["test"] * 8  # 25: batches of 8 leave a last batch of one picture


LONG = ("test_batches.py", "test_paper.py", "test_devices.py", "test_invariances.py", "test_finetune.py")


class ByFile(LoadScopeScheduling):
    """Give each file to one process, as its fixtures are shared; notebooks need nothing from each other."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return nodeid if path.endswith("test_notebooks.py") else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """Processes take what stands first: long files begin, and the notebooks, which are short, fill the gaps at the
    end."""
    order = {name: k for k, name in enumerate(LONG)} | {"test_notebooks.py": len(LONG) + 1}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small models are no faster on more threads, and bit-equality asks for one number of threads everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Nothing that a test computes lands in the user's cache."""
    if "SMART_IQA_CACHE" not in os.environ:
        monkeypatch.setenv("SMART_IQA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def run(capsys):
    """Run smart-iqa in this process: exit code, stdout, stderr."""
    from smart_iqa.cli import main

    def command(*words):
        capsys.readouterr()
        try:
            code = main([*map(str, words)])
        except SystemExit as e:
            code = e.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


def picture(seed: int, width: int = 96, height: int = 80, noise: float = 0.0) -> Image.Image:
    """A smooth scene in colour, different for every seed, with noise of a known strength (grey levels)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [sum(np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(-3, 3, (3, 3))) for _ in range(3)]
    pixels = 128 + 36 * np.stack(waves, -1) + rng.normal(0, max(noise, 1e-9), (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_set(folder, scores=None, splits=SPLITS):
    """Pictures and labels.csv (image, score, split) in a folder; score 0-100 is 100 minus the noise."""
    folder.mkdir(parents=True, exist_ok=True)
    own = np.random.default_rng(0).uniform(5, 95, len(splits)).round(2)
    for k, score in enumerate(own):
        picture(k, 80 + 16 * (k % 3), 72 + 16 * (k % 2), 100 - score).save(folder / f"p{k}.png")
    names = [f"p{k}.png" for k in range(len(splits))]
    pd.DataFrame(dict(image=names, score=own if scores is None else scores, split=splits)).to_csv(
        folder / "labels.csv", index=False
    )
    return folder


STANDIN = dict(  # a stand-in set under a model of a million weights, so that an epoch takes a second
    dataset="csv",
    labels="labels.csv",
    score_range="0,100",
    backbone="test_efficientnet",
    pretrained="none",
    size=64,
    crop=64,
    train_crops=1,
    val_crops=2,
    test_crops=4,
    epochs=2,
    batch_size=8,
    lr=1e-3,
    head_lr_ratio=1.0,
    weight_decay=0.01,
    patience=0,
    amp="off",
    device="cpu",
    group_duplicates=False,
    start_at_mean=True,
    loss="smooth_l1",
)
TINY = dict(  # the same haste on the demo set
    limit=24, epochs=1, batch_size=8, crop=64, size=64, train_crops=1, val_crops=1, test_crops=1, pretrained="none",
    amp="off", threads=1, frozen=False,
)


def small_config(root, **values):
    """Return the configuration of a run on a stand-in set."""
    return make_config(**STANDIN | dict(root=str(root)) | values)


def prepare(cfg):
    """Image set, pixel cache, feed and model of a configuration, as a run makes them."""
    images = load_set(cfg)
    cache = build_cache(images, cfg.size, cfg.fit, cfg.cache, cfg.on_error)
    model = make_model(cfg, float(images.rows("train").score.mean()))
    return images, CropFeed(cache, images.table, cfg, torch.device("cpu")), model


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    """The folder of a healthy set: 25 + 8 + 8 pictures. Copy it before you harm it."""
    return write_set(tmp_path_factory.mktemp("standin"))


def run_cells(path, parameters: dict):
    """Execute the code cells of a notebook in this process, as papermill does in a kernel that takes seconds to start.
    What it displays is not kept."""
    names = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as m:
        m.setattr("IPython.display.display", Mock())
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, str(path), "exec"), names)
                names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}


def _execute_here(path: Path, folder: Path, parameters: dict):
    """Do what `runs._execute` does, without papermill; the executed notebook has no outputs."""
    threads = torch.get_num_threads()
    shutil.copy(path, folder / "run.ipynb")
    with pytest.MonkeyPatch.context() as m:
        m.setenv(PROGRESS, str(folder / "progress.json"))
        try:
            run_cells(path, parameters | dict(folder=str(folder)))
        except Exception as e:
            kind = type(e).__name__
            raise runs._failed(path.stem, folder, kind, str(e), f"{path.stem} failed with {kind}: {e}") from None
        finally:
            torch.set_num_threads(threads)


@contextmanager
def without_kernels():
    """Let `execute` run notebooks in this process: for tests that ask what a notebook computes, not how it is run."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runs, "_execute", _execute_here)
        yield
    plt.close("all")


@pytest.fixture(scope="module")
def no_kernels():
    """`without_kernels` for all tests of a file."""
    with without_kernels():
        yield

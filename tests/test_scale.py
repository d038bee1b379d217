"""A stand-in of KonIQ-10k's layout goes through everything that a run does, and memory is watched."""
import json

import numpy as np
import pandas as pd
import torch
from conftest import small_config

from smart_iqa.cli import main
from smart_iqa.crops import build_cache
from smart_iqa.data import load_set
from smart_iqa.demo import KONIQ_NOTE, render_koniq
from smart_iqa.lab.probe import FirstBatches
from smart_iqa.lab.runs import execute
from smart_iqa.training import CropFeed


def test_the_whole_notebook(tmp_path):
    recipe = dict(backbone="test_efficientnet", pretrained="none", size=96, crop=64, batch_size=8, device="cpu")
    where = dict(cache=str(tmp_path / "cache"), root=str(tmp_path / "set"))
    given = dict(pictures=40, compare=0, steps=2, train_crops=2, recipe=json.dumps(recipe), threads=1) | where
    record = json.loads((execute("scale", given, tmp_path / "out", echo=None) / "record.json").read_text())
    phases = pd.DataFrame(record["phases"]).set_index("phase")
    assert list(phases.index) == ["render", "near-duplicates", "pixel cache", "train", "validate", "test"]
    assert (
        phases.made.all()
        and (phases.owned > 1e7).all()
        and phases.pieces["render"] == 40
        and phases.pieces["train"] == 2
    )
    assert record["note"] == KONIQ_NOTE and record["dataset"] == "koniq-10k"
    words = [f"{k}={v}" for k, v in (given | dict(compare=20)).items()]
    assert main(["run", "scale", *words, "name=again", "--out", str(tmp_path / "out")]) == 0  # as people start it
    again = json.loads(next((tmp_path / "out").glob("*/again-*/record.json")).read_text())
    claim, = again["claims"]  # the pictures' cache was there, so nothing is said of making it
    assert (
        claim["verdict"] == "cannot be tested here"
        and "not measured: near-duplicates, pixel cache" in claim["measured"]
    )


def test_first_batches_are_those_of_the_whole_epoch(tmp_path):
    """A shorter epoch, not another one: the same crops in the same order, also from the middle on."""
    render_koniq(tmp_path / "set", 24, progress=False)
    cfg = small_config(
        tmp_path / "set",
        dataset="koniq-10k",
        labels=None,
        score_range=None,
        train_crops=3,
        cache=str(tmp_path / "cache"),
    )
    found = load_set(cfg)
    assert found.note == KONIQ_NOTE  # every record on it says what it is
    pixels = build_cache(found, cfg.size, cfg.fit, cfg.cache)
    cpu = torch.device("cpu")
    whole, few = CropFeed(pixels, found.table, cfg, cpu), FirstBatches(pixels, found.table, cfg, cpu, batches=3)
    assert len(few) == 3 < len(whole) and len(FirstBatches(pixels, found.table, cfg, cpu, batches=10**6)) == len(whole)
    every = list(whole.train_batches(0))
    for first in (0, 2):
        got = list(few.train_batches(0, first))
        assert len(got) == 3 - first
        assert all(np.array_equal(x, y) and np.array_equal(r, s) for (x, r), (y, s) in zip(got, every[first:]))

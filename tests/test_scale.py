"""A stand-in of KonIQ-10k's layout goes through everything that a run does, and memory is watched."""
import json

import pandas as pd
import pytest

from smart_iqa.cli import main
from smart_iqa.demo import KONIQ_NOTE
from smart_iqa.lab.runs import execute

pytestmark = pytest.mark.slow  # the experiment `scale`, whole


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

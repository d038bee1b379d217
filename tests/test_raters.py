"""The limit that raters set, from pictures that were rated twice: against ratings whose error is known."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import picture, without_kernels

from smart_iqa.lab.runs import execute

ERROR = 3.0  # points, of one rating


@pytest.fixture(scope="module")
def rated_twice(tmp_path_factory):
    """BIQ2021's layout: 60 scenes as PNG and again as JPEG, each copy rated on its own."""
    root, rng, rows = tmp_path_factory.mktemp("twice"), np.random.default_rng(0), []
    (root / "Images").mkdir()
    for scene, quality in enumerate(rng.uniform(20, 80, 60)):
        whole = picture(scene, 160, 160)
        for copy, suffix in ((0, "png"), (100, "jpg")):
            name = f"ss0{1 + scene % 2} ({scene + copy}).{suffix}"
            whole.save(root / "Images" / name, quality=98)
            rows.append((name, (quality + rng.normal(0, ERROR)) / 100))
    tested = [(f"ss03 ({k}).png", k / 2) for k in (0, 1)]
    for name, _ in tested:
        picture(ord(name[6])).save(root / "Images" / name)
    for split, of in (("Train", rows), ("Test", tested)):
        table = pd.DataFrame(of, columns=["Image Name", "MOS"])
        table.to_csv(root / f"{split} (Images and MOS).csv", index=False)
    return root


def test_the_error_of_a_rating_is_found(rated_twice, tmp_path):
    """Twins alone count; sigma is that of one rating; reliability is what sigma leaves of the scores' variance."""
    with without_kernels():
        folder = execute("raters", dict(root=str(rated_twice), cache=str(tmp_path / "cache")), tmp_path, echo=None)
    record = json.loads((folder / "record.json").read_text())
    assert record["overall"]["pairs"] == 60
    assert abs(record["overall"]["sigma"] - ERROR) < 0.9
    assert record["overall"]["equal"] == 0
    limits = {row["subset"]: row for row in record["limits"]}
    assert list(limits) == ["all", "ss01", "ss02"]
    for row in limits.values():
        assert abs(row["reliability"] - (1 - ERROR**2 / 300)) < 0.03  # the variance of 20-80 is 300
        assert row["best_plcc"] == pytest.approx(row["reliability"] ** 0.5)

"""Real files: BIQ2021 (6,200 pictures of it) and the real label file of KonIQ-10k.

Skipped where they are not on disk."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from smart_iqa.config import make_config
from smart_iqa.data import load_set
from smart_iqa.images import load_image
from smart_iqa.sets import KONIQ_PAPER_LEAVES_OUT
from smart_iqa.splits import leaked

DATA = Path(os.environ.get("SMART_IQA_DATA") or Path(__file__).parents[2] / "shared" / "data").expanduser()
ROOT, KONIQ = DATA / "biq2021", DATA / "scores" / "koniq10k_distributions_sets.csv"
needs_biq = pytest.mark.skipif(not (ROOT / "Images").is_dir(), reason="no biq2021/ below $SMART_IQA_DATA")
needs_koniq = pytest.mark.skipif(
    not KONIQ.is_file(), reason="no scores/koniq10k_distributions_sets.csv below $SMART_IQA_DATA"
)


@pytest.fixture(scope="module")
def labels():
    """The two label files, read without our reader."""
    lists = [
        pd.read_csv(ROOT / f"{s.title()} (Images and MOS).csv", usecols=["Image Name", "MOS"]).assign(split=s)
        for s in ("train", "test")
    ]
    return pd.concat(lists, ignore_index=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def biq(cache):
    """The set without looking for near-duplicates."""
    return load_set(make_config("lite", root=str(ROOT), cache=cache, group_duplicates=False))


@needs_biq
def test_splits(biq, labels):
    """The official test split as it is; a tenth of the official training split becomes the validation split."""
    official = labels.split.value_counts()
    counts = biq.table.split.value_counts()
    assert (official.train, official.test) == (5200, 1000), (
        "another excerpt of BIQ2021: the counts below are not its own"
    )
    assert counts.test == 1000 and counts.val == 520 and counts.train == 4680 and not len(biq.skipped)
    test = {f"Images/{n}".lower() for n in labels["Image Name"][labels.split == "test"]}
    assert {i.lower() for i in biq.rows("test").image} == test


@needs_biq
def test_scores_are_the_mos(biq, labels):
    """100 times the label, from the declared 0 to 1; nothing is stretched to the observed extremes."""
    want = {f"Images/{n}".lower(): 100 * m for n, m in zip(labels["Image Name"], labels.MOS, strict=True)}
    got = biq.table
    np.testing.assert_allclose(got.score, [want[i.lower()] for i in got.image], atol=1e-9)


@needs_biq
def test_row_whose_case_differs(biq, labels):
    """One row says ss02 otherwise than its file; it is found, and the file's own name stands in the table."""
    on_disk = set(os.listdir(ROOT / "Images"))
    astray = [n for n in labels["Image Name"] if n not in on_disk]
    assert [n.lower() for n in astray] == ["ss02 (1014).jpg"]
    name = next(n for n in on_disk if n.lower() == "ss02 (1014).jpg")
    assert f"Images/{name}" in set(biq.table.image) and all((ROOT / i).is_file() for i in biq.table.image)


@needs_biq
def test_file_that_is_an_mpo(biq):
    """A two-frame file named .jpg is read like the others."""
    formats = {}
    for i in biq.table.image:
        with Image.open(ROOT / i) as img:
            formats.setdefault(img.format, []).append(i)
    assert set(formats) <= {"JPEG", "MPO"} and len(formats.get("MPO", [])) <= 1, {k: len(v) for k, v in formats.items()}
    for i in formats.get("MPO", []):
        assert load_image(ROOT / i).mode == "RGB"


@needs_biq
def test_validation_part_depends_on_its_seed_alone(cache, biq):
    cfg = make_config("lite", root=str(ROOT), cache=cache, group_duplicates=False)
    assert load_set(cfg).table.equals(biq.table)
    other = load_set(make_config("lite", root=str(ROOT), cache=cache, group_duplicates=False, split_seed=1)).table
    assert set(other.image[other.split == "test"]) == set(biq.rows("test").image)
    assert set(other.image[other.split == "val"]) != set(biq.rows("val").image)


@needs_biq
@pytest.mark.slow
def test_near_duplicates(cache):
    """The official split shows nearly the same picture on both sides.

    Ours does not, between training and validation."""
    found = load_set(make_config("lite", root=str(ROOT), cache=cache))
    d = found.duplicates
    crossing = d[(d.split_a == "test") != (d.split_b == "test")]
    assert len(crossing) >= 50
    pairs = {frozenset((Path(a).name, Path(b).name)) for a, b in zip(crossing.image_a, crossing.image_b, strict=True)}
    assert frozenset(("ss01 (1066).jpg", "ss01 (905).jpg")) in pairs
    inside = d[(d.split_a != "test") & (d.split_b != "test")]
    assert len(inside) and (inside.split_a == inside.split_b).all()
    assert leaked(found) == {
        a if s == "test" else b for a, b, s in zip(crossing.image_a, crossing.image_b, crossing.split_a, strict=True)
    }
    assert abs(found.table.split.value_counts().val - 520) <= 60
    # pairs are alike in what people said, too: chance would give a difference of some 20 points
    assert (d.score_a - d.score_b).abs().median() < 10


@pytest.fixture(scope="module")
def koniq(tmp_path_factory):
    """KonIQ-10k's label file beside one tiny picture under all of its 10,073 names (links: the search reads names
    alone)."""
    root = tmp_path_factory.mktemp("koniq")
    (root / KONIQ.name).write_bytes(KONIQ.read_bytes())
    (root / "512x384").mkdir()
    Image.new("RGB", (8, 6), "gray").save(root / "one.jpg")
    for name in pd.read_csv(KONIQ, dtype=str).image_name:
        os.link(root / "one.jpg", root / "512x384" / name)
    return root


@needs_koniq
def test_koniq_official_split(koniq, cache):
    found = load_set(make_config("paper", root=str(koniq), cache=cache, group_duplicates=False))
    assert dict(found.table.split.value_counts()) == {"train": 7058, "val": 1000, "test": 2015}
    raw = pd.read_csv(KONIQ).set_index("image_name")
    mine = found.table.set_index(found.table.image.map(lambda i: Path(i).name))
    np.testing.assert_allclose(mine.score, (raw.MOS[mine.index] - 1) / 99 * 100, atol=1e-9)  # MOS is declared as 1-100
    np.testing.assert_allclose(mine["std"], raw.SD[mine.index] * 25, atol=1e-9)  # votes 1-5: a step is 25 points


@needs_koniq
def test_koniq_paper_split(koniq, cache):
    found = load_set(make_config("paper", root=str(koniq), cache=cache, split="paper", group_duplicates=False))
    counts = found.table.split.value_counts()
    assert counts.train == 7046 and counts.test == 2010
    assert (
        not {Path(i).stem for i in found.table.image} & set(KONIQ_PAPER_LEAVES_OUT)
        and len(set(KONIQ_PAPER_LEAVES_OUT)) == 17
    )


@needs_koniq
def test_koniq_random_split(koniq, cache):
    """Ten random splits are ten different ones, each complete and of the right size."""
    seen = set()
    for seed in range(3):
        table = load_set(
            make_config("paper", root=str(koniq), cache=cache, split="random", split_seed=seed, group_duplicates=False)
        ).table
        counts = table.split.value_counts()
        assert abs(counts.test - 0.2 * 10073) < 2 and abs(counts.val - 0.1 * 0.8 * 10073) < 2 and counts.sum() == 10073
        seen.add(frozenset(table.image[table.split == "test"]))
    assert len(seen) == 3

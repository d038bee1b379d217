"""`smart-iqa data`: damaged copies of sets and what is said about them, how to get one, splits as files, exit
codes."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import picture
from PIL import Image
from test_biq2021 import ROOT as BIQ
from test_biq2021 import needs_biq

from smart_iqa import checks
from smart_iqa.checks import MAX_LINES, check_set, find_lines, look
from smart_iqa.cli import main
from smart_iqa.config import make_config
from smart_iqa.crops import build_cache
from smart_iqa.data import load_set
from smart_iqa.duplicates import signature
from smart_iqa.images import load_image
from smart_iqa.sets import FACTS, DataError
from smart_iqa.splits import read_split

N = dict(train=26, val=6, test=8)


def labels_of(root: Path) -> pd.DataFrame:
    return pd.read_csv(root / "labels.csv", dtype=object)


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """Forty pictures that are all different and their labels on 1-5, with a split."""
    root = tmp_path_factory.mktemp("sound")
    for k in range(40):
        picture(k, 96 + 8 * (k % 3), 80, 4).save(root / f"p{k:02d}.jpg", quality=92)
    mos = np.random.default_rng(3).uniform(1.2, 4.8, 40).round(2)
    split = [name for name, n in N.items() for _ in range(n)]
    pd.DataFrame(dict(image=[f"p{k:02d}.jpg" for k in range(40)], mos=mos, split=split)).to_csv(
        root / "labels.csv", index=False
    )
    return root


@pytest.fixture
def root(sound, tmp_path):
    """A copy to harm."""
    return Path(shutil.copytree(sound, tmp_path / "set"))


def config(root, **values):
    return make_config("paper", **dict(dataset="csv", root=str(root), labels="labels.csv", score_range="1,5") | values)


@pytest.fixture
def run(capsys):
    """Run the command in this process: exit code, stdout, stderr."""
    def command(*words):
        capsys.readouterr()
        try:
            code = main(["data", *map(str, words)])
        except SystemExit as e:
            code = e.code
        said = capsys.readouterr()
        return code, said.out, said.err
    return command


def check_words(root, *more):
    return ("check", "csv", root, "--labels", "labels.csv", "--score-range", "1,5", "--quiet", *more)


# ---- a sound set


def test_sound_set(root, run):
    code, out, err = run(*check_words(root))
    assert code == 0 and out.splitlines()[0].endswith(": fine") and err == ""
    assert (
        "40 can be used of 40" in out
        and "train 26, val 6, test 8" in out
        and "PROBLEM" not in out
        and "WARNING" not in out
    )
    assert "1 (worst) to 5 (best)" in out and re.search(r"\d+ pictures per second", out)
    assert "96 x 80 to 112 x 80" in out and "RGB 40; JPEG 40" in out


def test_each_picture_is_decoded_once(root, monkeypatch):
    """The readability check and the search for near-duplicates share the pixels, and `load_set` finds the pairs
    afterwards."""
    import smart_iqa.duplicates as data

    opened = []
    monkeypatch.setattr(checks, "load_image", lambda p: opened.append(Path(p).name) or load_image(p))
    monkeypatch.setattr(data, "load_image", lambda p: pytest.fail("decoded a second time"))
    load_image(root / "p05.jpg").save(root / "p39.jpg", quality=50)  # one pair
    report = check_set(config(root))
    assert sorted(opened) == [f"p{k:02d}.jpg" for k in range(40)]
    found = load_set(config(root, leaks="mark"))
    assert len(found.duplicates) == len(report.pairs) == 1 and set(report.pairs.iloc[0][["image_a", "image_b"]]) == {
        "p05.jpg",
        "p39.jpg",
    }


def test_signature_of_a_look_is_that_of_the_image(root):
    facts, (bits, thumb) = look(root / "p04.jpg")
    want = signature(load_image(root / "p04.jpg"))
    assert bits == want[0] and (thumb == want[1]).all() and facts["width"] == 104 and facts["error"] == ""


def test_nothing_is_changed(root):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.iterdir()}
    check_set(config(root))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.iterdir()} == before


# ---- one damage at a time: (what is done, kind, level, words of the report)


def lose(root):
    (root / "p17.jpg").unlink()


def tear(root):
    data = (root / "p17.jpg").read_bytes()
    (root / "p17.jpg").write_bytes(data[: len(data) * 2 // 3])


def tear_and_close(root):
    tear(root)
    (root / "p17.jpg").write_bytes((root / "p17.jpg").read_bytes() + b"\xff\xd9")


def empty(root):
    (root / "p17.jpg").write_bytes(b"")


def web_page(root):
    (root / "p17.jpg").write_text("<html>404 Not Found</html>")


def other_case(root):
    (root / "p17.jpg").rename(root / "P17.JPG")


def copy_bytes(root):
    shutil.copy(root / "p03.jpg", root / "p17.jpg")


def leak(root):
    load_image(root / "p03.jpg").resize((80, 64), Image.Resampling.BICUBIC).save(root / "p36.jpg", quality=55)


def stray(root):
    picture(77).save(root / "stray.PNG")
    (root / "notes.txt").write_text("no picture")


def edit(root, change):
    t = labels_of(root)
    change(t)
    t.to_csv(root / "labels.csv", index=False)


def set_label(value, row=17):
    return lambda root: edit(root, lambda t: t.__setitem__("mos", [*t.mos[:row], value, *t.mos[row + 1:]]))


def twice(root):
    edit(root, lambda t: t.__setitem__("image", [*t.image[:17], "p03.jpg", *t.image[18:]]))


def constant(root):
    edit(root, lambda t: t.__setitem__("mos", "3"))


def no_test(root):
    edit(root, lambda t: t.__setitem__("split", t.split.replace("test", "train")))


def typo_in_split(root):
    edit(root, lambda t: t.__setitem__("split", ["trian", *t.split[1:]]))


def half_a_split(root):
    edit(root, lambda t: t.__setitem__("split", [None, None, *t.split[2:]]))


def references(root):
    edit(root, lambda t: t.insert(1, "ref", ["wall", *t.image[1:36], "wall", *t.image[37:]]))


def narrow(root):
    edit(root, lambda t: t.__setitem__("mos", [str(round(1 + float(m) / 100, 4)) for m in t.mos]))


DAMAGES = [
    (lose, "missing", "problem", ("labels.csv line 19: p17.jpg: no such file", "copy them again", "--partial")),
    (tear, "unreadable", "problem", ("labels.csv line 19: p17.jpg: cannot be decoded", "truncated", "--on-error skip")),
    (tear_and_close, "unreadable", "problem", ("p17.jpg: cannot be decoded", "fetch the file again")),
    (empty, "unreadable", "problem", ("p17.jpg: cannot be decoded (the file is empty)",)),
    (web_page, "unreadable", "problem", ("p17.jpg: cannot be decoded (text, no picture)",)),
    (other_case, "case", "warning", ("labels.csv line 19: p17.jpg: the file is P17.JPG",)),
    (copy_bytes, "copies", "warning", ("p17.jpg: the same bytes as p03.jpg", "points apart in their labels")),
    (leak, "leak", "problem", ("p36.jpg: nearly p03.jpg (train)", "--split random")),
    (stray, "extra", "warning", ("stray.PNG: no row of the labels names it",)),
    (
        set_label("5.4"),
        "label",
        "problem",
        ("labels.csv line 19: p17.jpg: label 5.4 is outside the declared 1 to 5", "fresh copy"),
    ),
    (set_label("3,4"), "label", "problem", ("labels.csv line 19: p17.jpg: label '3,4' is not a number",)),
    (set_label(""), "label", "problem", ("labels.csv line 19: p17.jpg: label '' is not a number",)),
    (
        set_label("3.4142135"),
        "rounding",
        "warning",
        ("labels.csv line 19: p17.jpg: label 3.4142135; the others have 2 decimals",),
    ),
    (twice, "twice", "problem", ("labels.csv line 5 and line 19: p03.jpg: named twice", "delete the rows")),
    (constant, "constant", "problem", ("all 40 labels are 3", "--score-column")),
    (no_test, "split", "problem", ("the test split has 0 images", "--split random")),
    (typo_in_split, "split", "problem", ("trian",)),
    (half_a_split, "split", "problem", ("2 of 40 images have no official split",)),
    (references, "reference", "problem", ("wall: in the test split and outside of it",)),
    (narrow, "range", "warning", ("they use 0 to 1 of 0-100", "--score-range")),
]
IDS = [d[0].__name__ if d[0].__name__ != "<lambda>" else f"label-{k}" for k, d in enumerate(DAMAGES)]


@pytest.mark.parametrize("harm, kind, level, words", DAMAGES, ids=IDS)
def test_damage(root, harm, kind, level, words):
    """Exactly this is found, it is told with file, line and mend, and it decides the exit code."""
    harm(root)
    report = check_set(config(root))
    found = report.findings[report.findings.kind == kind]
    assert len(found) == 1 and list(found.level) == [level], report
    by_the_way = {"copies": {"rounding"}, "twice": {"extra"}, "constant": set()}.get(kind, set())
    assert set(report.findings.kind) <= {kind} | by_the_way, report
    assert report.code == (level == "problem") and ("NOT FINE" in str(report)) == (level == "problem")
    for word in words:
        assert word in str(report), report


def test_everything_at_once(root, run, tmp_path):
    """All damages in one pass, in no more lines than a screen has; all rows in a file; nothing but the report on
    stdout."""
    other_case(root)
    for k in range(8):
        (root / f"p{k:02d}.jpg").unlink()
        (root / f"p{k + 8:02d}.jpg").write_bytes((root / f"p{k + 8:02d}.jpg").read_bytes()[:900])
    shutil.copy(root / "p20.jpg", root / "p21.jpg")
    load_image(root / "p22.jpg").save(root / "p33.jpg", quality=50)
    for k in range(12):
        picture(100 + k).save(root / f"stray{k}.png")
    edit(root, lambda t: t.__setitem__("mos", [*t.mos[:23], "6", "x", *t.mos[25:]]))
    code, out, err = run(*check_words(root, "--findings", tmp_path / "findings.csv", "--pairs", tmp_path / "pairs.csv"))
    assert code == 1 and len(out.splitlines()) <= MAX_LINES
    assert "NOT FINE: missing 8, label 2, unreadable 8, leak 1" in out and "... and " in out
    findings = pd.read_csv(tmp_path / "findings.csv")
    assert findings.kind.value_counts().to_dict() == dict(
        missing=8, unreadable=8, label=2, leak=1, copies=1, extra=12, case=1
    )
    assert set(findings[findings.kind == "missing"]["where"]) == {f"labels.csv line {k + 2}" for k in range(8)}
    pairs = pd.read_csv(tmp_path / "pairs.csv")
    assert list(pairs.same_bytes) == [True, False] and "findings.csv" in err


def test_skip_makes_rows_a_warning(root, run):
    """What would be left out in training does not fail the check when leaving out is asked for."""
    lose(root)
    (root / "p18.jpg").write_bytes(b"x")
    set_label("nine", 20)(root)
    assert run(*check_words(root))[0] == 1
    code, out, _ = run(*check_words(root, "--on-error", "skip"))
    assert code == 0 and out.count("WARNING") == 3 and "37 can be used" in out


def test_wrong_case_is_used_all_the_same(root):
    other_case(root)
    report = check_set(config(root))
    assert report.code == 0 and "P17.JPG" in set(report.files.image) and (report.files.error == "").all()


def test_lower_is_better(root):
    assert "5 (worst) to 1 (best)" in str(check_set(config(root, score_range="5,1")))


def test_turned_by_exif(root):
    exif = Image.Exif()
    exif[274] = 6
    load_image(root / "p05.jpg").save(root / "p05.jpg", exif=exif)
    report = check_set(config(root))
    row = report.files.set_index("image").loc["p05.jpg"]
    assert row.turned and (row.width, row.height) == (80, 112) and "1 turned by EXIF" in str(report)


# ---- what training refuses, a check reports


def table(change):
    """Replace the labels by what a function makes of them."""
    return lambda root: change(labels_of(root)).to_csv(root / "labels.csv", index=False)


def text(change):
    """Replace the text of the labels."""
    return lambda root: (root / "labels.csv").write_text(change((root / "labels.csv").read_text()))


def strip(root):
    Image.new("RGB", (100000, 1)).save(root / "p17.jpg", "PNG")


def lose_all(root):
    for p in root.glob("*.jpg"):
        p.unlink()


def tear_validation(root):
    for k in range(26, 32):
        (root / f"p{k}.jpg").write_bytes(b"torn")


def split_file(change):
    """Write the split as a file, changed."""
    return lambda root: change(labels_of(root)[["image", "split"]]).to_csv(root / "split.csv", index=False)


REFUSED = {  # what is done, the configuration, what both say
    "no separator": (text(lambda t: t.replace(",", " ")), {}, "separate fields by commas"),
    "a field too many": (text(lambda t: t.replace("p17.jpg,", "p17,jpg,")), {}, r"row 18 \(line 19\) has 4 fields"),
    "a field too few": (text(lambda t: t.replace("p17.jpg,", "")), {}, r"row 18 \(line 19\) has 2 fields"),
    "a doubled column": (text(lambda t: t.replace("split", "mos", 1)), {}, "two columns have the name 'mos'"),
    "no rows": (text(lambda t: t.splitlines()[0]), {}, "has no rows"),
    "empty": (text(lambda t: ""), {}, "it is empty"),
    "no range": (text(str), dict(score_range="5"), "score_range="),
    "another column": (text(str), dict(score_column="beauty"), "has no column 'beauty'"),
    "nothing included": (text(str), dict(include="q*"), "matches none of 40"),
    "a negative deviation": (
        table(lambda t: t.assign(std=[-0.5, *[0.5] * 39])), {}, "label with a negative standard deviation",
    ),
    "a deviation in words": (table(lambda t: t.assign(std="some")), {}, "row 1: std 'some' is not a number"),
    "an infinite deviation": (
        table(lambda t: t.assign(std=["inf", *[0.5] * 39])), {}, "label with an infinite standard deviation",
    ),
    "no name": (table(lambda t: t.assign(image=["", *t.image[1:]])), {}, "names no image"),
    "no file": (lose, {}, "no such file"),
    "no files": (lose_all, {}, "no such file"),
    "no files, skipped": (lose_all, dict(on_error="skip"), "no image is left"),
    "torn": (tear, {}, "truncated"),
    "a strip": (strip, {}, "a strip of 100000 x 1 pixels"),
    "a strip in a folder of squares": (strip, dict(size=512, crop=512), "would become 51200000 x 512"),
    "torn validation, skipped": (tear_validation, dict(on_error="skip"), "the val split has 0 images and needs 2"),
    "no label": (table(lambda t: t.assign(mos="-", )), dict(on_error="skip"), "no image is left"),
    "outside": (table(lambda t: t.assign(mos=[7, *t.mos[1:]])), {}, "label 7 is outside the declared 1 to 5"),
    "twice": (table(lambda t: t.assign(image=["p01.jpg", *t.image[1:]])), {}, "named twice in the labels, first in"),
    "twice in other words": (
        table(lambda t: t.assign(image=["./p01.jpg", *t.image[1:]])), {}, "is p01.jpg under another name",
    ),
    "out of the folder": (table(lambda t: t.assign(image=["../p00.jpg", *t.image[1:]])), {}, "is not below"),
    "no split": (table(lambda t: t.drop(columns="split")), {}, "40 of 40 images have no official split"),
    "half a split": (half_a_split, {}, "2 of 40 images have no official split"),
    "another split": (typo_in_split, {}, "'trian' of p00.jpg is not train, val, cal or test"),
    "no test": (no_test, {}, "the test split has 0 images and needs 2"),
    "no calibration": (
        table(lambda t: t.assign(split=t.split.where(t.index > 0, "cal"))), dict(cal_fraction=0.1),
        "the cal split has 1 images and needs 2",
    ),
    "limit": (text(str), dict(limit=1), "the val split has 1 images and needs 2; limit=1"),
    "one scene": (table(lambda t: t.assign(ref="wall")), dict(split="random"), "1 group of images cannot be split"),
    "few": (
        table(lambda t: t[:12]), dict(split="random"), "1 images and needs 2; val_fraction=0.2 would do",
    ),
    "too few": (table(lambda t: t[:3]), dict(split="random"), "3 images of 3 scenes are too few"),
    "one to test on": (table(lambda t: t[:1]), dict(split="none"), "the test split has 1 images and needs 2"),
    "a scene on both sides": (references, {}, "wall: .*(in the test split and outside|the same reference)"),
    "a scene on both sides, by a blank": (
        table(lambda t: t.assign(ref=["wall ", *t.image[1:39], "wall"])), {}, "wall: .*(in the test|the same ref)",
    ),
    "copies on both sides": (leak, {}, r"p36.jpg.*near"),
    "no split file": (text(str), dict(split="split.csv"), "split.csv: no such file"),
    "a split of others": (split_file(lambda t: t[1:]), dict(split="split.csv"), "in the set and not in the split"),
    "a split named twice": (
        split_file(lambda t: pd.concat([t, t[:1]])), dict(split="split.csv"), "row 41: p00.jpg is named twice",
    ),
    "a split with a gap": (
        split_file(lambda t: t.assign(split=["", *t.split[1:]])), dict(split="split.csv"), "row 1: has no image or no",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_training_refuses_is_reported(what, root):
    """Both go through the same steps, so that they give the same reason."""
    harm, values, told = REFUSED[what]
    harm(root)
    if values.get("split", "").endswith(".csv"):
        values = values | dict(split=str(root / "split.csv"))
    cfg = config(root, **values)
    with pytest.raises(DataError) as e:
        images = load_set(cfg)
        build_cache(images, cfg.size, cfg.fit, on_error=cfg.on_error)
    assert re.search(told, str(e.value)), e.value
    report = check_set(cfg)
    assert report.code == 1
    assert re.search(told, str(report)), report


def test_what_training_takes_is_fine(root):
    """Nothing is found where nothing is refused, whatever the split."""
    split_file(lambda t: t)(root)
    for values in (dict(), dict(split="random"), dict(split="none"), dict(split="split.csv"), dict(limit=2)):
        cfg = config(root, **{k: str(root / v) if v == "split.csv" else v for k, v in values.items()})
        load_set(cfg)
        report = check_set(cfg)
        assert len(report.findings) == 0, report
    assert "random: train 29, val 3, test 8" in str(check_set(config(root, split="random")))


def test_set_without_a_split_of_its_own(root, run):
    """Nobody asked for a split that the labels do not have: it is checked with a random one, as it would be used."""
    table(lambda t: t.drop(columns="split"))(root)
    code, out, _ = run(*check_words(root))
    assert code == 0 and "random: train 29, val 3, test 8" in out
    code, out, _ = run(*check_words(root, "--split", "official"))
    assert code == 1 and "40 of 40 images have no official split" in out


def test_names_that_are_spelled_otherwise_are_a_warning(root):
    table(lambda t: t.assign(image=["P00.JPG ", ".\\p01.jpg", *t.image[2:]]))(root)
    report = check_set(config(root))
    assert report.code == 0 and list(report.findings.kind) == ["case", "case"]
    assert "P00.JPG : the file is p00.jpg" in str(report)


# ---- the wrong folder, the wrong words


def test_wrong_folder(root, run):
    for words, part in (
        (("biq2021", root), "Train (Images and MOS).csv"),
        (("csv", root, "--labels", "no.csv", "--score-range", "1,5"), "no such file"),
        (("csv", root / "nowhere", "--labels", "labels.csv"), "is not a folder"),
        (("csv", root, "--labels", "labels.csv"), "score_range"),
        (("csv", root, "--labels", "labels.csv", "--score-range", "1,5", "--score-column", "beauty"), "beauty"),
    ):
        code, out, err = run("check", *words, "--quiet")
        assert code == 1 and part in out + err and "Traceback" not in err


def test_labels_without_their_pictures(root, run):
    for p in root.glob("*.jpg"):
        p.unlink()
    code, out, _ = run(*check_words(root))
    assert code == 1 and "missing 40" in out and "0 can be used of 40" in out


@pytest.mark.parametrize(
    "words",
    [
        ("check", "csv"),
        ("check",),
        ("split", "csv", "x"),
        ("check", "csv", "x", "--on-error", "cry"),
        ("nonsense",),
        (),
    ],
)
def test_usage(run, words):
    assert run(*words)[0] == 2


def test_unknown_set(run, tmp_path):
    for words in (("info", "koniq"), ("check", "koniq", tmp_path)):
        code, out, err = run(*words)
        assert code == 1 and "did you mean koniq-10k" in out + err


# ---- sets with an official split and a published number: a copy of BIQ2021's layout


def make_biq(root: Path, train: int = 20, test: int = 6) -> Path:
    (root / "Images").mkdir(parents=True)
    for k in range(train + test):
        picture(k, 64, 48, 4).save(root / "Images" / f"ss0{1 + k % 2} ({k}).jpg", quality=92)
    for part, rows in (("Train", range(train)), ("Test", range(train, train + test))):
        lines = "".join(f"ss0{1 + k % 2} ({k}).jpg,{0.05 + k / 40:.3f},,\n" for k in rows)
        (root / f"{part} (Images and MOS).csv").write_text("Image Name,MOS,,\n" + lines)
    return root


@pytest.fixture
def biq(tmp_path, monkeypatch):
    """Twenty-six pictures, which are all that were published."""
    monkeypatch.setitem(FACTS, "biq2021", replace(FACTS["biq2021"], images=26, official=(20, 0, 6)))
    return make_biq(tmp_path / "biq")


def test_published_number(biq, run):
    code, out, _ = run("check", "biq2021", biq, "--quiet")
    assert code == 0 and "26 published" in out and "train 20 of 20, test 6 of 6" in out and "ss01 13, ss02 13" in out


@pytest.mark.parametrize("how", ["files", "labels"])
def test_half_copied(biq, run, how):
    """Half of the files, or half of the rows too: a problem, unless a part is asked for; then it is said which."""
    gone = [f for f in sorted((biq / "Images").iterdir()) if f.name.startswith("ss02")]
    for f in gone:
        f.unlink()
    if how == "labels":
        for f in biq.glob("*.csv"):
            f.write_text("\n".join(line for line in f.read_text().splitlines() if not line.startswith("ss02")) + "\n")
    code, out, _ = run("check", "biq2021", biq, "--quiet")
    assert code == 1 and "count 1" in out and "--partial" in out and ("missing 13" in out) == (how == "files")
    code, out, _ = run("check", "biq2021", biq, "--quiet", "--partial")
    assert code == 0 and "26 published: 50 % of the set, a part" in out and "train 10 of 20, test 3 of 6" in out
    (biq / "Images" / "ss01 (4).jpg").write_bytes(b"torn")
    code, out, _ = run("check", "biq2021", biq, "--quiet", "--partial")
    assert code == 1 and "unreadable 1" in out  # a part may be small, not broken


def test_part_without_a_test_part(biq, run):
    (biq / "Test (Images and MOS).csv").write_text("Image Name,MOS\nss01 (20).jpg,0.5\n")
    assert run("check", "biq2021", biq, "--quiet")[0] == 1
    code, out, _ = run("check", "biq2021", biq, "--quiet", "--partial")
    assert code == 0 and "the test split has 1 images" in out


def test_more_than_published(biq, monkeypatch):
    monkeypatch.setitem(FACTS, "biq2021", replace(FACTS["biq2021"], images=20))
    report = check_set(make_config("paper", dataset="biq2021", root=str(biq)))
    assert report.code == 0 and list(report.findings.kind) == ["more"]


def test_official_split_that_leaks_is_a_warning(biq, run, tmp_path):
    load_image(biq / "Images" / "ss01 (4).jpg").save(biq / "Images" / "ss01 (22).jpg", quality=50)
    code, out, _ = run("check", "biq2021", biq, "--quiet", "--pairs", tmp_path / "pairs.csv")
    assert code == 0 and "crossing 1" in out and "Images/ss01 (22).jpg: nearly Images/ss01 (4).jpg (train)" in out
    pairs = pd.read_csv(tmp_path / "pairs.csv")
    assert len(pairs) == 1 and set(pairs.loc[0, ["split_a", "split_b"]]) == {"train", "test"}


def test_line_in_the_right_label_file(biq):
    """Other tables in the folder name the picture too; the line is that of the file that the reader takes."""
    for other in ("Subset_1.csv", "Test.csv", "Train.csv"):
        (biq / other).write_text("name\n" + "".join(f"ss01 ({k}).jpg\n" for k in range(26)))
    for k in (2, 24):
        (biq / "Images" / f"ss01 ({k}).jpg").unlink()
    report = check_set(make_config("paper", dataset="biq2021", root=str(biq)))
    assert list(report.problems[report.problems.kind == "missing"]["where"]) == [
        "Train (Images and MOS).csv line 4",
        "Test (Images and MOS).csv line 6",
    ]


def test_include_is_a_part_that_was_asked_for(biq, run):
    """Not counted against the published number; but ten training pictures leave one for validation, and training would
    fail."""
    words = ("check", "biq2021", biq, "--quiet", "--include", "*/ss01*")
    code, out, _ = run(*words)
    assert code == 1 and "NOT FINE: split 1" in out and "the val split has 1 images" in out
    code, out, _ = run(*words, "--partial")
    assert code == 0 and "13 can be used" in out and "without a label" not in out and "of the set, a part" not in out


def test_split_file(biq, run, tmp_path):
    """A split file of another copy is a problem, and so is one that leaks, official split or not."""
    assert run("split", "biq2021", biq, "--to", tmp_path / "s", "--count", 1, "--quiet")[0] == 0
    file = tmp_path / "s" / "biq2021-00.csv"
    assert run("check", "biq2021", biq, "--quiet", "--split", file)[0] == 0
    t = pd.read_csv(file)
    a, b = t.image[t.split == "train"].iloc[0], t.image[t.split == "test"].iloc[0]
    load_image(biq / a).save(biq / b, quality=60)
    code, out, _ = run("check", "biq2021", biq, "--quiet", "--split", file)
    assert code == 1 and "leak 1" in out
    t.iloc[:-1].to_csv(file, index=False)
    code, out, _ = run("check", "biq2021", biq, "--quiet", "--split", file)
    assert code == 1 and "in the set and not in the split" in out


# ---- splits as files


def split_words(root, to, *more):
    return ("split", "csv", root, "--labels", "labels.csv", "--score-range", "1,5", "--quiet", "--to", to, *more)


def test_splits(root, run, tmp_path):
    """Ten different ones; near-duplicates never part; the number in the name is the seed."""
    load_image(root / "p03.jpg").save(root / "p36.jpg", quality=55)
    code, out, _ = run(*split_words(root, tmp_path / "s"))
    files = sorted((tmp_path / "s").iterdir())
    assert (
        code == 0 and [f.name for f in files] == [f"csv-{k:02d}.csv" for k in range(10)] and len(out.splitlines()) == 10
    )
    frames = [pd.read_csv(f, index_col="image").split for f in files]
    assert len({tuple(f) for f in frames}) == 10 and all(f["p03.jpg"] == f["p36.jpg"] for f in frames)
    assert all(abs((f == "test").sum() - 8) <= 1 for f in frames)
    assert run(*split_words(root, tmp_path / "t", "--seed", 3, "--count", 2))[0] == 0
    assert (tmp_path / "t" / "csv-04.csv").read_bytes() == files[4].read_bytes()
    found = load_set(config(root, split=str(files[2])))
    assert (found.table.split.to_numpy() == read_split(files[2], found.table.image)).all()


def test_splits_are_not_overwritten(root, run, tmp_path):
    to = tmp_path / "s"
    assert run(*split_words(root, to, "--count", 2))[0] == 0
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in to.iterdir()}
    assert run(*split_words(root, to, "--count", 2))[0] == 0  # the same: nothing to write
    code, _, err = run(*split_words(root, to, "--count", 3, "--test-fraction", 0.4))
    assert (
        code == 1 and "--again" in err and {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in to.iterdir()} == before
    )
    assert run(*split_words(root, to, "--count", 3, "--test-fraction", 0.4, "--again"))[0] == 0
    assert (pd.read_csv(to / "csv-00.csv").split == "test").sum() == 16 and len(list(to.iterdir())) == 3


# ---- preparing


def test_prepare(root, run, tmp_path):
    words = (
        "prepare",
        "csv",
        root,
        "--labels",
        "labels.csv",
        "--score-range",
        "1,5",
        "--quiet",
        "--size",
        64,
        "--cache",
        tmp_path / "cache",
    )
    code, out, _ = run(*words)
    pixels = sum(64 * round((96 + 8 * (k % 3)) * 0.8) * 3 for k in range(40))
    assert (
        code == 0
        and out.startswith("40 pictures")
        and [f.stat().st_size for f in (tmp_path / "cache").glob("*.u8")] == [pixels]
    )
    (root / "p17.jpg").write_bytes(b"torn")
    code, _, err = run(*words)
    assert code == 1 and "p17.jpg" in err and "--on-error skip" in err
    code, out, err = run(*words, "--on-error", "skip")
    assert code == 0 and out.startswith("39 pictures") and "left out: p17.jpg" in err


def test_prepare_without_an_official_split(root, run, tmp_path):
    edit(root, lambda t: t.pop("split"))
    assert (
        run(
            "prepare",
            "csv",
            root,
            "--labels",
            "labels.csv",
            "--score-range",
            "1,5",
            "--quiet",
            "--size",
            64,
            "--cache",
            tmp_path,
        )[0]
        == 0
    )


# ---- facts


def test_list_and_info(run):
    code, out, _ = run("list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(FACTS)
    live = next(line for line in out.splitlines() if line.startswith("live "))
    assert "112 to -3" in live and "lower is better" in live and "779" in live
    for name, facts in FACTS.items():
        code, out, _ = run("info", name)
        assert code == 0 and facts.source in out and facts.terms in out and all(f in out for f in facts.files)


@pytest.mark.parametrize("name", [name for name, facts in FACTS.items() if "http" in facts.get])
def test_info_says_how_to_get_every_public_set(run, name):
    """Where it is, what to accept, how to lay it out, and the command to check the copy with."""
    code, out, _ = run("info", name)
    steps = [line.strip() for line in out.splitlines()[-3:]]
    assert code == 0
    assert [step[:3] for step in steps] == ["1. ", "2. ", "3. "]
    assert FACTS[name].get in steps[0]
    assert FACTS[name].terms in steps[0]
    assert all(file in steps[1] for file in FACTS[name].files)
    assert steps[2] == f"3. smart-iqa data check {name} FOLDER"


def test_help_does_not_wait_for_torch():
    """The commands import what they need; `--help` imports none of it."""
    code = (
        "import sys, smart_iqa.cli as c\ntry: c.main(['data', 'check', '--help'])\n"
        "except SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--partial" in done.stdout, done.stderr


def test_lines_of_headless_and_nested_label_files(tmp_path):
    (tmp_path / "mos_with_names.txt").write_text("5.51 I01_01_1.bmp\n5.50 i01_01_2.bmp\n")
    (tmp_path / "list.json").write_text(json.dumps([dict(image="x/a.jpg", score=1), dict(image="x/b b.jpg", score=2)]))
    pd.DataFrame(dict(image=["k1.png", "k2.png"], mos=[1, 2])).to_excel(tmp_path / "t.xlsx", index=False)
    files = [tmp_path / n for n in ("mos_with_names.txt", "list.json", "t.xlsx")]
    found = find_lines(["d/i01_01_2.bmp", "x/b b.jpg", "k2.png", "none"], files)
    assert found == {
        "d/i01_01_2.bmp": "mos_with_names.txt line 2",
        "x/b b.jpg": "list.json row 2",
        "k2.png": "t.xlsx row 3",
        "none": "",
    }


# ---- the real thing


@needs_biq
def test_shared_biq2021(run, tmp_path):
    """Some fifty real photographs: sound, and among them one that was saved again on the other side of the official
    split."""
    code, out, _ = run(
        "check",
        "biq2021",
        BIQ,
        "--include",
        "*/ss03 ([57]*[67][12]).jpg",
        "--quiet",
        "--partial",
        "--pairs",
        tmp_path / "pairs.csv",
    )
    assert code == 0 and "PROBLEM" not in out and "512 x 512" in out and "of the declared 0 (worst) to 1 (best)" in out
    assert (
        "WARNING  pairs of near-duplicates on both sides of the official split" in out
        and len(out.splitlines()) <= MAX_LINES
    )
    pairs = pd.read_csv(tmp_path / "pairs.csv")
    cross = pairs[(pairs.split_a == "test") != (pairs.split_b == "test")]
    assert f"crossing {len(cross)}" in out
    assert {"Images/ss03 (7961).jpg", "Images/ss03 (5772).jpg"} in [
        {a, b} for a, b in zip(cross.image_a, cross.image_b, strict=True)
    ]


def test_ctrl_c_in_a_check_says_that_it_begins_anew(monkeypatch, capsys, tmp_path):
    def stop(*a, **kw):
        raise KeyboardInterrupt

    monkeypatch.setattr("smart_iqa.checks.check_set", stop)
    assert main(["data", "check", "csv", str(tmp_path), "--labels", "x.csv", "--score-range", "0,1"]) == 130
    assert "begins anew" in capsys.readouterr().err

"""`smart-iqa best` and `Scorer.compare`: what is grouped and what never, bursts, hostile files, tables, exit codes."""

import hashlib
import io
import math
import os
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import picture
from PIL import Image
from test_score import HOSTILE, make_toy

from smart_iqa.app.best import BEST_COLUMNS, BURST_SECONDS, best_files, exposure, group_files
from smart_iqa.app.engines import Scorer, create_scorer, save_scorer
from smart_iqa.app.folders import PictureFile, find_pictures, score_files
from smart_iqa.cli import main
from smart_iqa.demo import PHOTOS, photograph
from smart_iqa.distortions import distort
from smart_iqa.duplicates import find_same_scenes, same_scene, scene_of

CAMERA = {271: "Maker", 272: "Model"}
COFFEE, CAT, ROCKET = photograph("coffee"), photograph("chelsea"), photograph("rocket")


def jpeg(img: Image.Image, quality: int) -> Image.Image:
    img.save(out := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(out).convert("RGB")


def cropped(img: Image.Image, left: float, top: float, right: float = 0, bottom: float = 0) -> Image.Image:
    w, h = img.size
    return img.crop((round(w * left), round(h * top), round(w * (1 - right)), round(h * (1 - bottom))))


CHANGES = {
    "same": lambda p: p,
    "crop": lambda p: cropped(p, 0.08, 0.08),
    "crop around": lambda p: cropped(p, 0.05, 0.05, 0.05, 0.05),
    "brighter": lambda p: p.point(lambda v: min(255, v * 4 // 3)),
    "darker": lambda p: p.point(lambda v: v // 2),
    "jpeg": lambda p: jpeg(p, 10),
    "half": lambda p: p.resize((p.width // 2, p.height // 2)),
    "larger": lambda p: p.resize((p.width * 4 // 3, p.height * 4 // 3)),
    "other shape": lambda p: p.resize((p.width, p.height * 9 // 10)),
    "blurred": lambda p: distort(p, "blur", 3),
    "noisy": lambda p: distort(p, "noise", 2),
}


@pytest.fixture(scope="module")
def toy() -> Scorer:
    """A scorer of milliseconds that knows about pairs."""
    scorer = make_toy()
    scorer.more["preference"] = dict(spread=0.6, same_scene=0.8)
    return scorer


@pytest.fixture
def album(tmp_path, monkeypatch):
    """Two scenes with company, one without, a broken file; the test stands beside the folder."""
    (tmp_path / "album" / "sub").mkdir(parents=True)
    COFFEE.save(tmp_path / "album" / "coffee.png")
    jpeg(COFFEE, 30).save(tmp_path / "album" / "sub" / "a copy.png")
    distort(COFFEE, "blur", 3).save(tmp_path / "album" / "z.png")
    CAT.save(tmp_path / "album" / "cat.png")
    cropped(CAT, 0.06, 0.06).save(tmp_path / "album" / "cat, cropped.jpg")
    ROCKET.save(tmp_path / "album" / "rocket.png")
    (tmp_path / "album" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "album"


@pytest.fixture(scope="module")
def model_file(toy, tmp_path_factory):
    save_scorer(toy, path := tmp_path_factory.mktemp("model") / "toy.safetensors")
    return str(path)


@pytest.fixture
def run(run, model_file):
    """Run smart-iqa best with the toy model."""
    return lambda *words: run("best", "--model", model_file, "--device", "cpu", *words)


def groups_of(frame: pd.DataFrame) -> set[frozenset]:
    return {frozenset(rows.file.map(os.path.basename)) for _, rows in frame[frame.group.notna()].groupby("group")}


GROUPS = {frozenset({"coffee.png", "a copy.png", "z.png"}), frozenset({"cat.png", "cat, cropped.jpg"})}


# -- one scene or two --------------------------------------------------------------------------------
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_the_same_scene(change):
    """For every photograph that the dependencies ship."""
    for photo in PHOTOS:
        img = photograph(photo)
        assert same_scene(scene_of(img), scene_of(CHANGES[change](img))), photo.ref


def test_different_scenes_are_never_grouped():
    """Not the photographs, not their changed copies, not two windows of one photograph that share nothing."""
    scenes, names = [], []
    for photo in PHOTOS:
        for change in ("same", "crop", "darker", "blurred"):
            scenes.append(scene_of(CHANGES[change](photograph(photo))))
            names.append(photo.ref)
    wrong = [(names[a], names[b]) for a, b in find_same_scenes(scenes) if names[a] != names[b]]
    assert wrong == []
    left, right = cropped(ROCKET, 0, 0, 0.5), cropped(ROCKET, 0.5, 0)
    assert not same_scene(scene_of(left), scene_of(right))


def test_blank_pictures_resemble_nothing():
    """Else all black frames of a folder, and every dark one, would be one group."""
    blank = [Image.new("RGB", (200, 150), c) for c in ("black", "white", "grey", "grey")]
    assert find_same_scenes([scene_of(p) for p in [*blank, COFFEE]]) == []


def test_same_scene_has_no_order():
    """A pair has one answer, whichever comes first, alone or in a list."""
    scenes = [scene_of(change(p)) for p in (COFFEE, CAT, picture(1), picture(2)) for change in CHANGES.values()]
    listed = set(find_same_scenes(scenes))
    n = len(scenes)
    for a in range(n):
        for b in range(a + 1, n):
            assert same_scene(scenes[a], scenes[b]) == same_scene(scenes[b], scenes[a]) == ((a, b) in listed)
    backwards = find_same_scenes(scenes[::-1])
    assert sorted((n - 1 - b, n - 1 - a) for a, b in backwards) == sorted(listed)


# -- bursts ------------------------------------------------------------------------------------------
def shot(folder: Path, name: str, img: Image.Image, second: float | None, camera=CAMERA, part: str = "") -> Path:
    """Save a picture as a camera does."""
    exif = Image.Exif()
    for tag, value in camera.items():
        exif[tag] = value
    if second is not None:
        exif.get_ifd(0x8769)[36867] = f"2026:05:01 12:00:{second:02d}"
    if part:
        exif.get_ifd(0x8769)[37521] = part
    img.save(folder / name, quality=95, exif=exif)
    return folder / name


def blended(strength: float) -> Image.Image:
    """A scene over which another one comes up."""
    return Image.blend(COFFEE, ROCKET.resize(COFFEE.size), strength)


def test_a_burst_may_fit_less_well(tmp_path):
    """The same two pictures are a group when one camera took them within seconds, and only then."""
    loose = next(s for s in np.linspace(0, 1, 41) if not same_scene(scene_of(COFFEE), scene_of(blended(s))))
    other = blended(loose)
    cases = {
        "burst": dict(second=4),
        "late": dict(second=3 + BURST_SECONDS + 1),
        "other camera": dict(second=4, camera={271: "Maker", 272: "Another"}),
        "no camera": dict(second=4, camera={}),
        "no time": dict(second=None),
    }
    for name, case in cases.items():
        (folder := tmp_path / name).mkdir()
        shot(folder, "a.jpg", COFFEE, 3)
        shot(folder, "b.jpg", other, **case)
        frame = group_files(find_pictures(folder))
        assert frame.group.notna().all() == (name == "burst"), name
    assert group_files(find_pictures(tmp_path / "burst")).kind.tolist() == ["burst"] * 2


def test_seconds_alone_make_no_group(tmp_path):
    """Somebody who turns round and shoots has taken two scenes."""
    for k, img in enumerate((COFFEE, CAT, ROCKET)):
        shot(tmp_path, f"{k}.jpg", img, k)
    assert group_files(find_pictures(tmp_path)).group.isna().all()


@pytest.mark.parametrize(
    "when",
    ["0000:00:00 00:00:00", "    :  :     :  :  ", "2026:13:41 99:00:00", "yesterday", "", "2026-05-01T12:00:00", "\0"],
)
def test_a_broken_clock_is_no_time(when, tmp_path):
    exif = Image.Exif()
    exif[271], exif[306] = "Maker", when
    exif.get_ifd(0x8769)[36867] = when
    COFFEE.save(tmp_path / "a.jpg", exif=exif)
    assert exposure(tmp_path / "a.jpg") == (None, "")
    assert group_files(find_pictures(tmp_path)).readable.all()


BROKEN = [b"no tags at all", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]


@pytest.mark.parametrize("block", BROKEN)
def test_a_broken_block_is_no_time(block, tmp_path):
    COFFEE.save(tmp_path / "a.jpg", exif=block)
    assert exposure(tmp_path / "a.jpg") == (None, "")


def test_parts_of_a_second_count(tmp_path):
    path = shot(tmp_path, "a.jpg", COFFEE, 7, part="04")
    assert exposure(path) == (datetime(2026, 5, 1, 12, 0, 7, 40000), "Maker Model")
    odd = shot(tmp_path, "b.jpg", COFFEE, 7, part="x4")
    assert exposure(odd)[0] == datetime(2026, 5, 1, 12, 0, 7)


# -- groups --------------------------------------------------------------------------------------------
def test_groups_best_first(album, toy):
    """The right groups, each in order of the scores that `score` gives, with the probability that `compare` gives."""
    frame = best_files(toy, album)
    assert groups_of(frame) == GROUPS
    scores = score_files(toy, album).set_index("file").score
    for _, rows in frame[frame.group.notna()].groupby("group"):
        assert rows.score.is_monotonic_decreasing and rows.place.tolist() == list(range(1, len(rows) + 1))
        assert rows.score.tolist() == scores[rows.file].tolist()
        assert math.isnan(rows.p_first.iloc[0])
        for r in rows.iloc[1:].itertuples():
            assert r.p_first == pytest.approx(toy.compare(rows.file.iloc[0], r.file), abs=2e-4) and r.p_first >= 0.5
    assert frame.attrs["alone"] == 1 and frame.attrs["grouped"] == 5
    assert "rocket.png" not in set(frame.file.map(os.path.basename))
    assert frame.error.ne("").sum() == 1


def test_the_order_of_the_arguments_means_nothing(album, run):
    """The same files, named in any order: the same table, byte for byte."""
    names = sorted(str(p) for p in album.rglob("*.*"))
    tables = []
    for k, order in enumerate((names, names[::-1], names[3:] + names[:3], [str(album)])):
        assert run(*order, "--out", f"{k}.csv")[0] == 1
        tables.append(Path(f"{k}.csv").read_bytes())
    assert len(set(tables)) == 1


def test_groups_are_stable_when_a_picture_is_added(album, toy):
    """Whatever comes, the others stay together and keep their order; a copy joins its group."""
    before = best_files(toy, album)
    picture(5, 300, 200).save(album / "0 first of all.png")
    stranger = best_files(toy, album)
    assert groups_of(stranger) == GROUPS
    columns = ["group", "place", "p_first", "file", "score"]
    pd.testing.assert_frame_equal(stranger[columns], before[columns])
    CAT.resize((200, 133)).save(album / "small cat.png")
    joined = groups_of(best_files(toy, album))
    assert joined == {g | {"small cat.png"} if "cat.png" in g else g for g in GROUPS}


def fingerprint(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_nothing_is_moved_deleted_or_written_beside_the_pictures(album, run):
    before = fingerprint(album)
    assert run("album", "--out", "best.csv", "--html", "best.html", "--scores", "scores.csv", "--alone")[0] == 1
    assert fingerprint(album) == before
    assert {p.name for p in album.parent.iterdir()} == {"album", "best.csv", "best.html", "scores.csv"}


def test_equal_files_are_a_toss_up(tmp_path, toy):
    """Two copies, bit for bit: one half, and the first name first."""
    COFFEE.save(tmp_path / "b.png")
    shutil.copy(tmp_path / "b.png", tmp_path / "a.png")
    frame = best_files(toy, tmp_path)
    assert frame.file.map(os.path.basename).tolist() == ["a.png", "b.png"]
    assert frame.p_first.iloc[1] == 0.5


def test_a_group_whose_others_fail_is_no_group(album, toy):
    """A picture that vanishes between looking and scoring has a row that says so; what is left alone is alone."""
    files = find_pictures(album)

    class Late(Scorer):
        def stream(self, pictures):
            (album / "cat.png").unlink()
            return super().stream(pictures)

    late = Late(toy.model, toy.policy, toy.calibration, toy.info, device="cpu", more=toy.more)
    frame = best_files(late, files)
    assert groups_of(frame) == {g for g in GROUPS if "cat.png" not in g}
    assert set(frame[frame.error != ""].file.map(os.path.basename)) == {"broken.jpg", "cat.png"}


def test_hostile_files(tmp_path, toy):
    """Every file that has no score has the row, with the reason, that `score` gives it; the others are grouped."""
    for name, (data, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(data)
    frame, scored = best_files(toy, tmp_path, alone=True), score_files(toy, tmp_path)
    assert len(frame) == len(HOSTILE)
    errors = frame.set_index("file").error.sort_index()
    assert errors.equals(scored.set_index("file").error.sort_index())
    photo = next(g for g in groups_of(frame) if "plain.png" in g)
    assert {"plain.jpg", "no_jpeg.jpg", "grey16.png", "cmyk.jpg", "turned.jpg", "broken_exif.png", "two.mpo"} <= photo
    assert "one_pixel.png" not in photo and "thread.png" not in photo


# -- two pictures -----------------------------------------------------------------------------------
def test_compare_is_antisymmetric(toy):
    """Both orders make exactly one, a picture against itself one half, and the higher score is the favourite."""
    pictures = [picture(k, 90 + k, 70, 12 * k) for k in range(3)]
    scores = toy(pictures)
    for same in (None, True, False):
        for a in range(3):
            assert toy.compare(pictures[a], pictures[a], same) == 0.5
            for b in range(a):
                p = toy.compare(pictures[a], pictures[b], same)
                assert 0 < p < 1 and p + toy.compare(pictures[b], pictures[a], same) == 1
                assert (p > 0.5) == (scores[a] > scores[b])


def test_one_scene_is_seen_in_the_pictures(toy):
    a, b = COFFEE, distort(COFFEE, "blur", 2)
    assert toy.compare(a, b) == toy.compare(a, b, True) != toy.compare(a, b, False)
    assert toy.compare(a, CAT) == toy.compare(a, CAT, False)


def test_a_scorer_that_knows_nothing_about_pairs_says_so(toy):
    for calibration, more in ((toy.calibration, {}), (None, toy.more)):
        bare = Scorer(toy.model, toy.policy, calibration, dict(name="bare"), device="cpu", more=more)
        with pytest.raises(ValueError, match="bare: was not calibrated on pairs"):
            bare.compare(COFFEE, CAT)


def test_the_packaged_model_knows_about_pairs():
    """By both of its policies: a sharp photograph and a heavily blurred copy of it."""
    for thorough in (False, True):
        scorer = create_scorer(thorough=thorough)
        assert scorer.compare(COFFEE, distort(COFFEE, "blur", 5)) > 0.9


# -- the command ------------------------------------------------------------------------------------
def test_table_and_summary(album, run):
    code, out, err = run("album", "--out", "best.csv", "--html", "best.html")
    assert code == 1 and "broken.jpg" in err and "5 pictures in 2 groups; 1 alone; 1 failed" in err
    assert out.count("group ") == 2 and "first better" in out and "rocket" not in out
    table = pd.read_csv("best.csv")
    assert list(table) == BEST_COLUMNS
    assert table.group.tolist()[:5] == [1, 1, 2, 2, 2] and math.isnan(table.group[5])
    assert table.p_first.isna().tolist() == [True, False, True, False, False, True]
    assert table.model.nunique() == 1 and table.error.notna().sum() == 1


def test_quiet_alone_and_exit_codes(album, run):
    (album / "broken.jpg").unlink()
    code, out, err = run("album", "--quiet")
    assert code == 0 and out == "" and err.count("\n") == 1
    code, out, _ = run("album", "--alone")
    assert code == 0 and "alone:" in out and "rocket.png" in out
    code, out, err = run(album / "rocket.png", album / "cat.png")
    assert code == 0 and "0 pictures in 0 groups; 2 alone" in err
    assert run("nowhere.jpg")[0] == 2
    assert run("album", "--crops", "0")[0] == 2


def test_impossible_outputs_are_refused_before_the_work(album, run):
    for words in (("--out", "best.xlsx"), ("--html", "album")):
        code, out, err = run("album", *words)
        assert code == 1 and out == "" and "pictures in" not in err and words[1] in err


def test_scores_are_kept_and_used(album, run):
    """The table of `smart-iqa score` saves the work, and an interrupted run goes on."""
    _, _, first = run("album", "--scores", "s.csv", "--out", "1.csv")
    assert "scored before" not in first and len(pd.read_csv("s.csv")) == 6
    _, _, second = run("album", "--scores", "s.csv", "--out", "2.csv")
    assert "5 scored before" in second
    assert Path("1.csv").read_bytes() == Path("2.csv").read_bytes()


def test_names_reach_neither_terminal_nor_page(tmp_path, run, monkeypatch):
    """Escape codes and tags in names stay text; the page needs no network."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    for name in ("<img src=http:x>.png", "esc\x1b[31m.png", "car\rriage.png"):
        COFFEE.resize((120, 80)).save(Path("in") / name)
    code, out, err = run("in", "--out", "best.csv", "--html", "best.html")
    page = Path("best.html").read_text(encoding="utf-8")
    assert code == 0 and "\x1b" not in out + err + page
    assert "<img src=http" not in page and page.count("<figure") == 3 and page.count("src=\"data:image/jpeg") == 3
    assert set(pd.read_csv("best.csv").file) == {f.file for f in find_pictures("in")}


def test_a_model_without_pairs_still_groups(album, toy, tmp_path, capsys):
    """As scores come without intervals where there is no calibration."""
    bare = Scorer(toy.model, toy.policy, None, dict(name="bare"), device="cpu")
    save_scorer(bare, tmp_path / "bare.safetensors")
    assert main(["best", "album", "--model", str(tmp_path / "bare.safetensors"), "--out", "b.csv"]) == 1
    table = pd.read_csv("b.csv")
    assert table.p_first.isna().all() and table.group.nunique() == 2
    assert "%" not in capsys.readouterr().out


def test_files_that_are_not_there(toy):
    frame = best_files(toy, [PictureFile("gone.jpg", ".", "no such file or folder")])
    assert frame.error.tolist() == ["no such file or folder"] and frame.attrs["groups"] == 0

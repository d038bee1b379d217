"""Hostile files, labels and checkpoints: each is read rightly, or refused by an error that names it.

Never a wrong number."""

import io
import json
import os
import pickle
import shutil
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SPLITS, picture, prepare, small_config, write_set
from PIL import Image, features
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import ConstantInputWarning

from smart_iqa.config import make_config
from smart_iqa.crops import build_cache, grid_plan, random_plan
from smart_iqa.data import load_set
from smart_iqa.files import read_lines
from smart_iqa.images import ImageError, load_image, load_reduced, resize, to_rgb
from smart_iqa.lab.runs import open_run, read_run
from smart_iqa.metrics import evaluate
from smart_iqa.model import CheckpointError, SmartIQA, load_checkpoint, save_checkpoint
from smart_iqa.sets import DataError
from smart_iqa.training import Diverged, Solver, TrainingError, predict, save_resume_point, targets

as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything"
)


def pixels(path) -> np.ndarray:
    return np.asarray(load_image(path)).astype(int)


@pytest.fixture
def folder(standin, tmp_path):
    """A copy of the healthy set, to be harmed."""
    return shutil.copytree(standin, tmp_path / "set")


def relabel(folder, change):
    """Replace the label table by what a function makes of it."""
    change(pd.read_csv(folder / "labels.csv")).to_csv(folder / "labels.csv", index=False)


# -- pictures: modes ---------------------------------------------------------------------------------------------------
def test_16_bit_grey_keeps_its_values(tmp_path):
    """Pillow's own conversion clips at 255, which turns nearly every 16-bit picture white."""
    ramp = np.linspace(0, 65535, 256 * 4).round().astype(np.uint16).reshape(4, 256)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    assert np.abs(pixels(tmp_path / "x.png") - np.round(ramp / 257.0)[..., None]).max() <= 1


def test_16_bit_grey_big_endian_tiff(tmp_path):
    """Byte order is the file's business, not the label's."""
    ramp = np.linspace(0, 65535, 1024).round().astype(">u2").reshape(4, 256)
    Image.frombytes("I;16B", (256, 4), ramp.tobytes()).save(tmp_path / "x.tif")
    assert np.abs(pixels(tmp_path / "x.tif") - np.round(ramp.astype(float) / 257)[..., None]).max() <= 1


def test_16_bit_rgb(tmp_path):
    """A 48-bit PNG, written by hand because Pillow cannot: the high byte is the value."""
    rgb = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    head = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    assert np.abs(pixels(tmp_path / "x.png") - rgb.astype(int) / 257).max() <= 1


def test_cmyk_jpeg_resembles_its_rgb_version(tmp_path):
    """Read with the wrong sign, a CMYK JPEG is a negative."""
    photo = picture(3, 160, 120)
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert Image.open(tmp_path / "cmyk.jpg").mode == "CMYK"
    assert np.abs(pixels(tmp_path / "cmyk.jpg") - np.asarray(photo)).mean() < 6


@pytest.mark.parametrize("mode, inside", [("RGBA", [200, 30, 60]), ("LA", [90, 90, 90]), ("P", [200, 30, 60])])
def test_transparency_is_laid_over_white(mode, inside, tmp_path):
    """What lies under full transparency is often black; nobody who rated the picture saw it."""
    if mode == "P":
        img = Image.new("P", (8, 8), 1)
        img.putpalette([0, 0, 0, *inside])
        img.paste(0, (0, 0, 4, 8))
        img.save(tmp_path / "x.png", transparency=0)
    else:
        img = Image.new("RGBA", (8, 8), (*inside, 255))
        img.paste((0, 0, 0, 0), (0, 0, 4, 8))
        img.convert(mode).save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").mode == mode
    got = pixels(tmp_path / "x.png")
    assert (got[:, :4] == 255).all() and (got[:, 4:] == inside).all(), got[0]


def test_half_transparency_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "x.png")
    assert np.abs(pixels(tmp_path / "x.png") - 127).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_exif_orientation(orientation, kind, tmp_path):
    """A phone writes the sensor's rows and a tag; raters saw the upright picture."""
    upright = picture(5, 64, 40)
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{kind}", exif=exif, **({"quality": 98, "subsampling": 0} if kind == "jpg" else {}))
    got = pixels(tmp_path / f"x.{kind}")
    assert got.shape == (40, 64, 3)
    assert np.abs(got - np.asarray(upright)).mean() < (2 if kind == "jpg" else 1e-9)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (50, 1), (31, 700)])
def test_pictures_smaller_than_the_crop_are_enlarged(size, tmp_path):
    """A crop always lies inside: the short side is at least the crop, whatever came in."""
    img = resize(picture(0, *size), 64)
    assert min(img.size) == 64
    for plan in (
        grid_plan(np.array([img.size[::-1]]), [0], 64, 20),
        random_plan(np.array([img.size[::-1]]), [0], 64, 50, 0),
    ):
        assert (plan.top >= 0).all() and (plan.left >= 0).all()
        assert (plan.top + 64 <= img.height).all() and (plan.left + 64 <= img.width).all()


def test_one_pixel_picture_is_scored(folder):
    """The smallest picture goes all the way to a number."""
    Image.new("RGB", (1, 1), "red").save(folder / "p40.png")
    _, feed, model = prepare(small_config(folder))
    assert np.isfinite(predict(model, feed, "test", 4).pred).all()


def test_endless_strip_is_refused():
    """1 x 100000 pixels would become 384 x 38 million."""
    with pytest.raises(ImageError, match="strip of 100000 x 1"):
        resize(Image.new("RGB", (100000, 1)), 384)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "mpo"])
def test_first_frame(kind, tmp_path):
    """Animations and two-picture phone files: the first frame is the picture."""
    frames = [Image.new("RGB", (32, 24), c) for c in ("red", "blue")]
    try:
        frames[0].save(tmp_path / f"x.{kind}", save_all=True, append_images=frames[1:])
    except (OSError, KeyError) as e:
        pytest.skip(f"this Pillow writes no {kind}: {e}")
    with Image.open(tmp_path / f"x.{kind}") as img:
        assert img.n_frames == 2, "the test needs a file with two frames"
    got = pixels(tmp_path / f"x.{kind}")
    assert got.shape == (24, 32, 3) and np.abs(got - (255, 0, 0)).max() <= 3


# -- pictures: broken ones ---------------------------------------------------------------------------------------------
def _png_header(width, height):
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data)) + \
        struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))


def _truncated_jpeg():
    picture(0, 300, 300, 20).save(out := io.BytesIO(), "JPEG")
    return out.getvalue()[: len(out.getvalue()) // 2]


BROKEN = {
    "truncated JPEG": (_truncated_jpeg, "cannot be decoded"),
    "closed JPEG": (lambda: _truncated_jpeg() + b"\xff\xd9", "cannot be decoded"),
    "text": (lambda: b"<html>404 Not Found</html>", "cannot be decoded"),
    "empty file": (lambda: b"", "cannot be decoded"),
    "header alone": (lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "cannot be decoded"),
    "bomb of 3.6 gigapixels": (lambda: _png_header(60000, 60000), "too many pixels"),
    "bomb of 196 megapixels": (lambda: _png_header(14000, 14000), "too many pixels"),
    "a directory": (None, "cannot be decoded"),
}


def _break(path, what):
    path.unlink(missing_ok=True)
    path.mkdir() if BROKEN[what][0] is None else path.write_bytes(BROKEN[what][0]())


@pytest.mark.parametrize("what", BROKEN)
def test_broken_picture_is_refused(what, tmp_path):
    _break(tmp_path / "x.jpg", what)
    with pytest.raises(ImageError, match=f"x.jpg: {BROKEN[what][1]}"):
        load_image(tmp_path / "x.jpg")


def _encoded(kind="JPEG", img=None, **options) -> bytes:
    (img or picture(0, 300, 300, 20)).save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


JPEGS = {
    "baseline": {},
    "progressive": dict(progressive=True),
    "optimised": dict(optimize=True),
    "restarts": dict(restart_marker_rows=1),
    "best": dict(quality=100, subsampling=0),
    "grey": dict(img=picture(0, 300, 300, 20).convert("L"), progressive=True),
    "inks": dict(img=picture(0, 300, 300, 20).convert("CMYK")),
}
HARM = {
    "closed": lambda data, k: data[:k] + b"\xff\xd9",
    "zeros": lambda data, k: data[:k] + bytes(len(data) - k),
    "closed zeros": lambda data, k: data[:k] + bytes(len(data) - k - 2) + b"\xff\xd9",
    "hole": lambda data, k: data[:k] + bytes(4096) + data[k + 4096 :],
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_is_not_whole_is_refused(kind, harm, tmp_path):
    """libjpeg fills in what is missing, and Pillow drops its warning: two thirds of the pixels could be invented."""
    data = _encoded(**JPEGS[kind])
    for share in (0.4, 0.7):
        (tmp_path / "x.jpg").write_bytes(HARM[harm](data, int(share * len(data))))
        for short in (None, 60):
            with pytest.raises(ImageError, match=r"x.jpg: cannot be decoded \(its data are truncated or damaged"):
                load_reduced(tmp_path / "x.jpg", short)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_whole_jpeg_is_decoded_as_pillow_does(kind, tmp_path):
    """What lies behind the end is no damage: a phone's film, an archive, zeros; nor is a missing end marker."""
    data, path = _encoded(**JPEGS[kind]), tmp_path / "x.jpg"
    for after in (b"", b"PK\3\4" * 100, bytes(5000), data, b"\xff\xd8\xff"):
        path.write_bytes(data + after)
        for short in (None, 140, 60):
            opened = Image.open(path)
            if short:
                opened.draft(None, (short, short))
            ours = load_reduced(path, short)[0]
            if opened.mode != "CMYK":
                assert np.array_equal(np.asarray(ours), np.asarray(opened.convert("RGB")))
            assert ours.size == opened.size
    if kind != "inks":  # which Pillow decodes itself
        path.write_bytes(data[:-2])
        assert load_image(path).size == (300, 300)
    path.write_bytes(data[:-2] + b"\0" * 3 + data[-2:])  # as some cameras do
    assert load_image(path).size == (300, 300)


ZEROS = b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6000)  # an EXIF block without tags


@pytest.mark.parametrize("harm", ["zeros", "hole"])
@pytest.mark.parametrize("kind, exif", [("WEBP", b""), ("WEBP", ZEROS), ("AVIF", b""), ("AVIF", ZEROS)])
def test_a_hole_in_a_webp_or_avif_is_refused(kind, exif, harm, tmp_path):
    """Their coders take zeros for a picture. Zeros in EXIF are none of its pixels."""
    if not features.check(kind.lower()):
        pytest.skip(f"this Pillow writes no {kind}")
    data = _encoded(kind, quality=95, exif=exif)
    (tmp_path / "x").write_bytes(data)
    assert load_image(tmp_path / "x").size == (300, 300)
    at = len(_encoded(kind, quality=95)) // 2
    (tmp_path / "x").write_bytes(HARM[harm](data, at))
    with pytest.raises(ImageError, match="a hole of zeros"):
        load_image(tmp_path / "x")


def test_a_damaged_png_is_refused(tmp_path):
    """Asking for EXIF made Pillow decode and fail unseen; asked again, it gave what it had."""
    data = _encoded("PNG")
    for harm in ("zeros", "hole"):
        (tmp_path / "x.png").write_bytes(HARM[harm](data, len(data) // 2))
        with pytest.raises(ImageError, match="truncated or damaged"):
            load_image(tmp_path / "x.png")


@pytest.mark.parametrize("kind, harm, said", [
    ("PNG", lambda d: d.replace(b"\r\n", b"\n", 1).replace(b"\0", b""), "damaged, or no picture"),
    ("AVIF", lambda d: d[: len(d) // 2], "truncated or damaged"),
    ("TIFF", lambda d: HARM["hole"](d, len(d) // 3), "truncated or damaged"),
])
def test_damage_is_named(kind, harm, said, tmp_path, capfd):
    """Not "text" or "a video"; and a library of C does not write past the program."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    data = _encoded(kind, **(dict(compression="tiff_lzw") if kind == "TIFF" else {}))
    (tmp_path / "x").write_bytes(harm(data))
    with pytest.raises(ImageError, match=said):
        load_image(tmp_path / "x")
    assert capfd.readouterr().err == ""


def test_integers_of_32_bits_have_no_white(tmp_path):
    """Taken for 16 bits they were 28 points off; a PGM says what its white is."""
    ramp = np.linspace(0, 4095, 256).round().reshape(4, 64)
    for kind in (np.int32, np.float32):
        Image.fromarray(ramp.astype(kind)).save(tmp_path / "x.tif")
        with pytest.raises(ImageError, match="nothing says which is white"):
            load_image(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="nothing says which is white"):
        to_rgb(Image.fromarray(ramp.astype(np.int32)))
    (tmp_path / "x.pgm").write_bytes(b"P5 64 4 4095 " + ramp.astype(">u2").tobytes())
    assert np.abs(pixels(tmp_path / "x.pgm")[..., 0] - ramp * 255 / 4095).max() <= 1


def test_missing_picture_is_refused(tmp_path):
    with pytest.raises(ImageError, match=r"x.jpg: no such file"):
        load_image(tmp_path / "x.jpg")


@as_root
def test_unreadable_picture_is_refused(tmp_path):
    picture(0).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").chmod(0)
    with pytest.raises(ImageError, match="PermissionError"):
        load_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("what", BROKEN)
def test_broken_picture_in_a_set(what, folder):
    """By default the file is named; with on_error='skip' it is left out and recorded, in a first and in a later run."""
    _break(folder / "p3.png", what)
    with pytest.raises(DataError, match=r"p3\.png.*(cannot be decoded|too many pixels)"):
        prepare(small_config(folder))
    for _ in range(2):  # decoded, then found in the cache
        images, feed, _ = prepare(small_config(folder, on_error="skip"))
        assert list(images.skipped.image) == ["p3.png"] and "p3.png" in images.skipped.reason[0]
        assert "p3.png" not in set(images.table.image) and len(feed.cache) == len(images.table) == len(SPLITS) - 1
        assert list(feed.cache.index.image) == list(images.table.image)
    with pytest.raises(
        DataError, match=r"p3\.png"
    ):  # the cache of a skipping run does not hide the fault from a strict one
        prepare(small_config(folder))


def test_broken_picture_does_not_stop_the_search_for_duplicates(folder):
    _break(folder / "p3.png", "text")
    images = load_set(small_config(folder, group_duplicates=True))
    assert len(images.table) == len(SPLITS) and "p3.png" not in set(images.duplicates.image_a) | set(
        images.duplicates.image_b
    )


def test_skipped_is_recorded_in_the_run(folder):
    """Missing, unreadable and badly labelled images all end up in skipped.csv with a reason each."""
    (folder / "p1.png").unlink()
    _break(folder / "p3.png", "text")
    relabel(folder, lambda t: t.assign(score=t.score.where(t.image != "p5.png", np.nan)))
    cfg = small_config(folder, on_error="skip")
    images, _, _ = prepare(cfg)
    skipped = pd.read_csv(open_run(folder / "run", cfg, images) / "skipped.csv").set_index("image").reason
    assert sorted(skipped.index) == ["p1.png", "p3.png", "p5.png"]
    assert "no such file" in skipped["p1.png"] and "decoded" in skipped["p3.png"] and "row 6" in skipped["p5.png"]


def test_dangling_link(folder):
    """A link to nowhere stands in the folder's listing, but is no file."""
    (folder / "p3.png").unlink()
    (folder / "p3.png").symlink_to(folder / "gone.png")
    with pytest.raises(DataError, match=r"p3\.png"):
        prepare(small_config(folder))
    images, _, _ = prepare(small_config(folder, on_error="skip"))
    assert list(images.skipped.image) == ["p3.png"]


def test_all_pictures_of_a_part_unreadable(folder):
    """Left out one by one, nothing is left: said before hours of training, not after."""
    for k in np.flatnonzero(np.array(SPLITS) == "val"):
        _break(folder / f"p{k}.png", "text")
    with pytest.raises(DataError, match="val"):
        prepare(small_config(folder, on_error="skip"))


def test_all_pictures_unreadable(folder):
    for k in range(len(SPLITS)):
        _break(folder / f"p{k}.png", "empty file")
    with pytest.raises(DataError, match=r"no image|empty|0 images"):
        prepare(small_config(folder, on_error="skip"))


def test_decoding_in_threads_leaves_warnings_alone(tmp_path):
    """warnings.catch_warnings is not safe in threads: filters of one picture must not outlive it, nor hide later
    warnings."""
    for k, side in enumerate((200, 900)):
        picture(k, side, side).save(tmp_path / f"{k}.jpg")
    before = list(warnings.filters)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(load_image, [tmp_path / f"{k % 2}.jpg" for k in range(200)]))
        after = list(warnings.filters)
    finally:
        warnings.filters[:] = before
    assert after == before


# -- labels ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, told", [
    ("", "cannot be read"), ("\n\n", "cannot be read"), ("image,score,split\n", "has no rows"),
    ("image score split\na.png 3 train\n", "which column holds the image.*image score split; it is the only one"),
    ("image,score,split\n,,\n", "has no rows"),
    ("file,points\na.png,3\n", "which column holds the image.*image_column.*file, points"),
    ("image,points\na.png,3\n", "which column holds the mos.*score_column.*image, points"),
])
def test_label_file_that_holds_no_labels(text, told, tmp_path):
    """The message names the columns that there are and the option that picks one."""
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=f"labels.csv.*{told}"):
        load_set(small_config(tmp_path))


@pytest.mark.parametrize("name, content, told", [
    ("x.csv", "image,score\nfoté.png,3\n".encode("latin-1"), "line 2 is not UTF-8"),
    ("x.csv", "image,score\na.png,3\n".encode("utf-16"), "line 1 is not UTF-8"),
    ("x.tsv", "image,score\na.png,3\n".encode("utf-16-le"), "zero bytes.*UTF-16"),
    ("x.json", b"[{", "cannot be read"), ("x.parquet", b"PAR1", "cannot be read"), ("x.xlsx", b"PK", "cannot be read"),
    ("x.json", b'{"a.png": 3, "b.png": 4}', "no list of records such as"), ("x.json", b'[1, 2]', "no list of records"),
    ("x.json", b'[{"image": "a.png", "score": 3, "score": 4}]', "'score' twice"),
    ("x.jsonl", b'{"image": "a.png", "score": 3}\n{"image": "b.png"\n', "line 2 is no record"),
    ("x.jsonl", b'{"image": "a.png", "score": 3, "score": 4}\n', "line 1.*'score' twice"),
    ("x.doc", b"", "labels are read from .csv"),
])
def test_label_file_that_cannot_be_read(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*({told})"):
        load_set(small_config(tmp_path, labels=name))


ROWS = [("p0.png", "20", "train"), ("p1.png", "30.5", "val"), ("p2.png", "40", "val"), ("p3.png", "50", "test"),
        ("p4.png", "60", "test")]  # fmt: skip


@pytest.fixture
def five(standin, tmp_path):
    """Five pictures of the healthy set and a way to write their labels as text."""
    for k in range(5):
        shutil.copy(standin / f"p{k}.png", tmp_path)

    def labels(text, name="labels.csv", **values):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return small_config(tmp_path, labels=name, **values)

    return labels


def joined(separator=",", end="", head_end=None, rows=ROWS, head=("image", "score", "split"), feed="\n"):
    """A table as text, with something at the ends of its rows."""
    lines = [separator.join(row) + end for row in rows]
    return feed.join([separator.join(head) + (end if head_end is None else head_end), *lines]) + feed


RIGHT = {  # written otherwise than usual, and yet in one way only
    "comma at every end": joined(end=","),
    "comma at the ends of rows": joined(end=",", head_end=""),
    "comma at the end of the header": joined(end="", head_end=","),
    "three commas and blanks": joined(end=", ,,", head_end=""),
    "comma at one end": joined().replace("20,train", "20,train,"),
    "rows of commas": joined() + ",,\n\n,,,\n",
    "byte order mark": "\ufeff" + joined(),
    "semicolons": joined(";"),
    "semicolons, decimal commas": joined(";").replace(".5", ",5"),
    "semicolons and a comma in the header": joined(";", head=("image", "score", "split", "remarks, free"), end=";",
                                                   head_end=""),
    "tabs": joined("\t"),
    "tabs at the ends": joined("\t", end="\t", head_end=""),
    "bars": joined("|"),
    "quoted decimal commas": joined().replace("30.5", '"30,5"'),
    "blanks in the header": joined(head=(" image", "score ", " split ")),
    "blanks in the cells": joined(rows=[(i, f" {s} ", f" {p}") for i, s, p in ROWS]),
    "blanks around names": joined(rows=[(f" {i} ", s, p) for i, s, p in ROWS]),
    "carriage returns": joined(feed="\r\n"),
    "old carriage returns": joined(feed="\r"),
    "no line feed at the end": joined().rstrip("\n"),
    "empty lines": joined(feed="\n\n"),
    "quotation marks": joined(rows=[(f'"{i}"', f'"{s}"', p) for i, s, p in ROWS]),
    "line feed in a cell": joined(rows=[(*r, '"so\nso"') for r in ROWS], head=("image", "score", "split", "remark")),
    "back slashes": joined(rows=[(f".\\{i}", s, p) for i, s, p in ROWS]),
    "row names of pandas": joined(
        rows=[(str(k), *r) for k, r in enumerate(ROWS)], head=("", "image", "score", "split")
    ),
}


@pytest.mark.parametrize("what", RIGHT)
@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv"])
def test_table_that_can_be_read_in_one_way_only(what, name, five):
    """It is read in this way."""
    table = load_set(five(RIGHT[what], name)).table
    assert list(zip(table.image, table.score, table.split, strict=True)) == [(i, float(s), p) for i, s, p in ROWS]


WRONG = {  # damaged, and what is said
    "a field too many": (joined().replace("40,val", "40,val,x"), r"row 3 \(line 4\) has 4 fields and the header 3"),
    "a field too many at first": (joined().replace("p0.png,", "p0,png,"), r"row 1 \(line 2\) has 4 fields"),
    "row names of R": (joined(rows=[(str(k), *r) for k, r in enumerate(ROWS)]), r"row 1 \(line 2\) has 4 fields"),
    "a field too few": (joined().replace("40,val", "40"), r"row 3 \(line 4\) has 2 fields and the header 3"),
    "a torn row": (joined().rstrip("\n")[:-9], r"row 5 \(line 6\) has 1 fields"),
    "a field too many, semicolons": (joined(";").replace("40;val", "40;val;x"), "row 3 .*separated by semicolons"),
    "an open quotation mark": (joined().replace("p2.png", '"p2.png'), r"row 3 \(line 4\).*quotation mark"),
    "an open one after a line feed": (
        joined().replace("p1.png", '"p1\n.png"').replace("p2.png", '"p2.png'), r"row 3 \(line 5\).*quotation mark",
    ),
    "a column twice": (joined(head=("image", "score", "split", "score"), end=",1", head_end=""), "the name 'score'"),
    "a column twice, blanks": (joined(head=("image", "score", "split", " score"), end=",1", head_end=""), "'score'"),
    "a row without a name": (joined().replace("p2.png", ""), "row 3: names no image"),
    "a row with a blank name": (joined().replace("p2.png", "  "), "row 3: names no image"),
    "names that differ in blanks": (joined().replace("p2.png", "p1.png "), "p1.png  ?: is p1.png under another name"),
    "a negative deviation": (
        joined(head=("image", "score", "split", "std"), end=",-0.5", head_end=""), "row 1: label with a negative",
    ),
    "an infinite deviation": (
        joined(head=("image", "score", "split", "std"), end=",inf", head_end=""), "row 1: label with an? infinite",
    ),
    "per cent": (joined().replace("30.5", "30.5 %"), "row 2: label '30.5 %' is not a number"),
    "a decimal comma among points": (joined().replace("20", '"20,5"'), "row 1: label '20,5' is not a number"),
    "perhaps thousands": (joined(";").replace("30.5", "3,125"), "row 2: label '3,125' is not a number"),
    "a name that leaves the folder": (joined().replace("p2.png", "../p2.png"), r"\.\./p2\.png: is not below"),
    "a name that is too long": (joined().replace("p2.png", "x\\" + "p/" * 5000), "no such file"),
    "a name of another machine": (joined().replace("p2.png", "C:\\p\\p2.png"), "path of another machine"),
    "a name without its ending": (joined().replace("p2.png", "p2"), r"p2: no such file; is it p2\.png"),
    "another split": (joined().replace("val", "Val", 1), "'Val' of p1.png is not train, val, cal or test"),
    "twice": (joined().replace("p2.png", "p1.png"), "row 3: named twice in the labels, first in row 2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_table_that_is_damaged_names_its_row(what, five):
    text, told = WRONG[what]
    with pytest.raises(DataError, match=told):
        load_set(five(text))


@pytest.mark.parametrize("kind", ["xlsx", "json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "column, value, told",
    [
        ("image", None, "row 3: names no image"),
        ("image", 2, r"2: no such file; is it 02\.png\? A number loses its zeros"),
        ("score", None, "row 3: label '' is not a number"),
        ("score", True, "row 3: label 'True' is not a number"),
        ("score", "40 %", "row 3: label '40 %' is not a number"),
        ("score", 1e9, "row 3: label 1e\\+09 is outside the declared"),
        ("std", -1.0, "row 3: label with a negative"),
    ],
)
def test_tables_of_other_kinds(kind, column, value, told, five, tmp_path):
    """The same defects as in text are found in them, row by row; empty rows say nothing."""
    shutil.copy(tmp_path / "p2.png", tmp_path / "02.png")
    rows = [dict(image=i, score=float(s), split=p, std=1.0) for i, s, p in ROWS]
    rows[2][column] = value
    frame = pd.DataFrame(rows).astype(object)
    if kind == "parquet":
        frame = frame.astype({column: str}).replace("None", None) if not isinstance(value, float) else frame
    write = dict(
        xlsx=lambda p: frame.to_excel(p, index=False, startrow=1),
        json=lambda p: p.write_text("\ufeff" + json.dumps(rows), encoding="utf-8"),
        jsonl=lambda p: p.write_text("\n".join(map(json.dumps, rows)) + "\n\n"),
        parquet=lambda p: frame.set_index("image").to_parquet(p),
    )
    write[kind](tmp_path / f"labels.{kind}")
    with pytest.raises(DataError, match=told):
        load_set(small_config(tmp_path, labels=f"labels.{kind}"))
    rows = [dict(image=i, score=float(s), split=p) for i, s, p in ROWS]
    frame = pd.DataFrame(rows)
    write[kind](tmp_path / f"labels.{kind}")
    assert list(load_set(small_config(tmp_path, labels=f"labels.{kind}")).table.image) == [r[0] for r in ROWS]


def test_numbers_and_names_that_no_machine_has(five, tmp_path):
    """Four hundred digits are no score, half a character and a zero byte no name."""
    for change, told in (
        (dict(score=10**400), "row 3: label '10+' is not a number"),
        (dict(image="\ud800.png"), "labels.json: cannot be read"),
        (dict(image="p2\0.png"), "no such file"),
    ):
        rows = [dict(image=i, score=float(s), split=p) for i, s, p in ROWS]
        rows[2] |= change
        (tmp_path / "labels.json").write_text(json.dumps(rows))
        with pytest.raises(DataError, match=told):
            load_set(small_config(tmp_path, labels="labels.json"))


def test_column_twice_in_a_workbook(five, tmp_path):
    pd.DataFrame([[*r, 3] for r in ROWS], columns=["image", "score", "split", "score"]).to_excel(
        tmp_path / "labels.xlsx", index=False
    )
    with pytest.raises(DataError, match=r"labels\.xlsx.*two columns have the name 'score'"):
        load_set(small_config(tmp_path, labels="labels.xlsx"))


def test_accents_are_composed_in_two_ways(five, tmp_path):
    """macOS writes e and an accent, labels often one character; both at once are no match."""
    one, two = "caf\u00e9.png", "cafe\u0301.png"
    (tmp_path / "p0.png").rename(tmp_path / two)
    cfg = five(joined().replace("p0.png", one))
    assert load_set(cfg).table.image[0] == two
    cfg = five(joined().replace("p0.png", one).replace("p1.png", two))
    with pytest.raises(DataError, match="under another name"):
        load_set(cfg)


def test_names_inside_by_another_way(five, tmp_path):
    """An absolute name and one with a detour are that of the file; a folder like a file is below root too."""
    rows = [(f"{tmp_path}/p0.png", *ROWS[0][1:]), (f"../{tmp_path.name}/p1.png", *ROWS[1][1:]), *ROWS[2:]]
    assert list(load_set(five(joined(rows=rows))).table.image) == [r[0] for r in ROWS]
    with pytest.raises(DataError, match="is p0.png under another name"):
        load_set(five(joined(rows=[*rows, ROWS[0]])))


def test_scenes_that_differ_in_blanks_are_one(five):
    rows = [(*r, s) for r, s in zip(ROWS, ("a", "b", "b", "a ", "c"), strict=True)]
    with pytest.raises(DataError, match="a: the same reference on both sides"):
        load_set(five(joined(rows=rows, head=("image", "score", "split", "ref"))))


SPLIT = joined(rows=[(i, p) for i, _, p in ROWS], head=("image", "split"))


@pytest.mark.parametrize(
    "text, told",
    [
        (SPLIT.replace("\n", ",\n"), None),
        (SPLIT.replace(",", " ; "), None),
        (SPLIT.replace("p2.png,val", "p2.png"), r"row 3 \(line 4\) has 1 fields"),
        (SPLIT.replace("p2.png", ""), "row 3: has no image"),
        (SPLIT.replace("val", "", 1), "row 2: has no image or"),
        (SPLIT.replace("p2", "p1"), "row 3: p1.png is named twice"),
        (SPLIT.replace("image", "split"), "the name 'split'"),
        ("image,split\n", "has no rows"),
        ("", "it is empty"),
    ],
)
def test_split_tables(text, told, five, tmp_path):
    """They are read as labels are."""
    (tmp_path / "split.csv").write_text(text)
    cfg = five(joined(), split=str(tmp_path / "split.csv"))
    if told is None:
        assert list(load_set(cfg).table.split) == [r[2] for r in ROWS]
    else:
        with pytest.raises(DataError, match=told):
            load_set(cfg)


@pytest.mark.parametrize(
    "rows, told",
    [
        ([("p0.png", "20,5"), ("p1.png", "30")], None),
        ([("p0.png", "20"), ("p0.png", "20"), ("p1.png", "30")], None),
        ([("p0.png", "20"), ("p0.png", "21")], "row 2: another prediction for p0.png"),
        ([("p0.png", "much")], "no prediction for 1 training images, e.g. p0.png"),
        ([("p0.png", "20"), ("p1.png", "30", "40")], r"row 2 \(line 3\) has 4 fields"),
        ([("p1.png", "20")], "no prediction for 1 training images"),
    ],
)
def test_teachers_table(rows, told, five, tmp_path):
    """It is read as labels are."""
    (tmp_path / "teacher.csv").write_text(joined(";", end=";", rows=rows, head=("image", "pred")))
    cfg = five(joined(), teacher=str(tmp_path / "teacher.csv"))
    table = load_set(cfg).table
    if told is None:
        assert np.isclose(targets(table, cfg)[0], (20 + float(rows[0][1].replace(",", "."))) / 2)
    else:
        with pytest.raises(ValueError, match=told):
            targets(table, cfg)


def test_predictions_of_a_run_that_were_edited(standin, tmp_path):
    """A spreadsheet leaves commas, which say nothing; a row that was moved is named."""
    for name in ("record", "config", "environment"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "predictions.csv").write_text("image,pred,\n007,3.5,,\n")
    p = read_run(tmp_path)["predictions"]
    assert list(p.columns) == ["image", "pred"] and p.image[0] == "007" and p.pred[0] == 3.5
    (tmp_path / "predictions.csv").write_text("image,pred\n007,3.5\na,b,1\n")
    with pytest.raises(ValueError, match=r"predictions\.csv: row 2 \(line 3\) has 3 fields and the header 2"):
        read_run(tmp_path)


def test_missing_label_file(folder):
    with pytest.raises(DataError, match=r"nowhere.csv: no such file"):
        load_set(small_config(folder, labels="nowhere.csv"))


def test_byte_order_mark(folder):
    """Excel's 'CSV UTF-8' starts with one; it is no part of the first column's name."""
    text = (folder / "labels.csv").read_bytes()
    (folder / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text)
    assert len(load_set(small_config(folder)).table) == len(SPLITS)


@pytest.mark.parametrize(
    "value, told",
    [
        ("", "not a number"),
        ("n/a", "not a number"),
        ("good", "good"),
        ("inf", "inf"),
        ("-inf", "inf"),
        ("100.5", "100.5 is outside the declared 0 to 100"),
        ("-3", "-3 is outside"),
        ("3,5", "3,5"),
    ],
)
def test_bad_label_names_its_row(value, told, folder):
    """Raised by default with picture and row; skipped, each bad row is counted once."""
    frame = pd.read_csv(folder / "labels.csv", dtype=str)
    frame.loc[6, "score"] = value
    frame.to_csv(folder / "labels.csv", index=False)
    with pytest.raises(DataError, match=rf"1 images? cannot be used(.|\n)*p6\.png: row 7: label .*{told}"):
        load_set(small_config(folder))
    images = load_set(small_config(folder, on_error="skip"))
    assert list(images.skipped.image) == ["p6.png"] and len(images.table) == len(SPLITS) - 1


def test_no_label_is_a_number(folder):
    relabel(folder, lambda t: t.assign(score=np.nan))
    with pytest.raises(DataError, match="no image is left"):
        load_set(small_config(folder, on_error="skip"))


def test_everything_wrong_is_told_at_once(folder):
    (folder / "p2.png").unlink()
    relabel(folder, lambda t: t.assign(score=t.score.where(t.image != "p6.png", 400)))
    with pytest.raises(DataError) as e:
        load_set(small_config(folder))
    assert "p2.png" in str(e.value) and "p6.png" in str(e.value) and "on_error='skip'" in str(e.value)


def test_a_picture_named_twice(folder):
    """Twice in the labels, it could stand on both sides of a split."""
    relabel(folder, lambda t: pd.concat([t, t.iloc[[4]].assign(split="test")]))
    with pytest.raises(DataError, match=r"p4\.png: row 42: named twice"):
        load_set(small_config(folder))
    images = load_set(small_config(folder, on_error="skip"))  # nobody knows which row is right: both go
    assert list(images.skipped.image) == ["p4.png"] and "p4.png" not in set(images.table.image)


@pytest.mark.parametrize("again", ["P4.PNG", "./p4.png"])
def test_a_picture_named_twice_in_other_words(again, folder):
    """One file under two names is still one picture, here in train and in test."""
    relabel(folder, lambda t: pd.concat([t, t.iloc[[4]].assign(split="test", image=again)]))
    with pytest.raises(DataError, match=r"p4.png"):
        load_set(small_config(folder))


def test_case_of_names(folder):
    """Sets made on Windows differ from their labels in case; two candidates are no match."""
    (folder / "p4.png").rename(folder / "P4.PnG")
    assert "P4.PnG" in set(load_set(small_config(folder)).table.image)
    shutil.copy(folder / "P4.PnG", folder / "p4.PNG")
    if len(set(os.listdir(folder)) & {"P4.PnG", "p4.PNG"}) == 2:
        with pytest.raises(DataError, match=r"p4\.png: could be any of"):
            load_set(small_config(folder))


HOSTILE_NAMES = [
    "001.png",
    "with space.png",
    " lead.png",
    'comma, and "quote".png',
    "größe 図 🙂.png",
    "100%#?.png",
    "-rf.png",
    "semi;colon.png",
    "a'b.png",
    "$HOME.png",
]
NUMERIC_NAMES = ["80184044", "007", "1e5", "10344921126", "0x1F", "1_000"]
NULL_NAMES = ["NA", "null", "None", "nan", "inf", "True"]


@pytest.mark.parametrize(
    "names",
    [HOSTILE_NAMES, NUMERIC_NAMES, ["80184044"], ["007"], ["2.50"], NULL_NAMES, ["NA", "007"]],
    ids=["hostile", "numbers and text", "integers", "leading zeros", "decimals", "null", "null and integers"],
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "xlsx", "parquet"])
def test_file_names_are_text(names, kind, tmp_path):
    """Readers that guess types turn 007 into 7 and NA into nothing."""
    if names is not HOSTILE_NAMES:
        names = [*names, *(str(k) for k in range(100, 112 - len(names)))]
    splits = [("train", "val", "val", "test", "test")[k % 5] for k in range(len(names))]
    for k, name in enumerate(names):
        picture(k, 32, 32).save(tmp_path / name, "PNG")
    frame = pd.DataFrame(dict(image=names, score=[float(10 + k) for k in range(len(names))], split=splits))
    path = tmp_path / f"labels.{kind}"
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    write = {
        "csv": lambda: frame.to_csv(path, index=False),
        "tsv": lambda: frame.to_csv(path, sep="\t", index=False),
        "json": lambda: path.write_text(json.dumps(frame.to_dict("records"))),
        "xlsx": lambda: frame.to_excel(path, index=False),
        "jsonl": lambda: path.write_text("\n".join(json.dumps(r) for r in frame.to_dict("records"))),
        "parquet": lambda: frame.to_parquet(path),
    }
    write[kind]()
    images = load_set(small_config(tmp_path, labels=path.name))
    assert dict(zip(images.table.image, images.table.score, strict=True)) == dict(zip(names, frame.score, strict=True))
    first = build_cache(images, 64)
    again = build_cache(load_set(small_config(tmp_path, labels=path.name)), 64)  # now read back from the index file
    assert list(first.index.image) == list(again.index.image) == names


def test_scene_names_are_text(folder):
    """References 1, 01 and NA are three scenes, and no scene stands on two sides of a random split."""
    relabel(folder, lambda t: t.drop(columns="split").assign(ref=["1", "01", "NA", "x"] * 10 + ["1"]))
    table = load_set(small_config(folder, split="random", val_fraction=0.3)).table
    assert table.ref.nunique() == 4 and (table.groupby("ref", dropna=False).split.nunique() == 1).all()


@pytest.mark.parametrize("others", ["7", "x"])
def test_picture_without_a_scene_is_its_own_scene(others, folder):
    """Empty cells are not one big scene."""
    relabel(folder, lambda t: t.drop(columns="split").assign(ref=[others, "", ""] * 13 + ["", ""]))
    table = load_set(small_config(folder, split="random")).table
    assert (table.ref == table.image).sum() == 28 and table.ref.nunique() == 29


def test_absolute_paths_in_the_labels(folder):
    """A label file made by a script often has them; either they work, or the error names the file."""
    relabel(folder, lambda t: t.assign(image=[str(folder / i) for i in t.image]))
    _, feed, _ = prepare(small_config(folder))
    assert len(feed.cache) == len(SPLITS)


@pytest.mark.parametrize("score_range", [None, "0", "5,5", "a,b", "0,1,2", "nan,1", "0,inf", ""])
def test_score_range_must_be_two_numbers(score_range, folder):
    """An open or undefined range would make every score NaN or 0."""
    with pytest.raises(DataError, match="score_range"):
        load_set(small_config(folder, score_range=score_range))


def test_score_range_turned_round(folder):
    """Lower is better: the range says so, and the score is turned."""
    straight, turned = (load_set(small_config(folder, score_range=r)).table.score for r in ("0,100", "100,0"))
    np.testing.assert_allclose(straight + turned, 100)


@pytest.mark.parametrize(
    "column, value, told",
    [("split", "training", "training"), ("split", "", "no official split"), ("std", "wide", "std")],
)
def test_other_columns_with_nonsense(column, value, told, folder):
    frame = pd.read_csv(folder / "labels.csv").assign(std="3")
    frame.loc[2, column] = value
    frame.to_csv(folder / "labels.csv", index=False)
    with pytest.raises(DataError, match=told):
        load_set(small_config(folder))


@pytest.mark.parametrize(
    "values, told",
    [({"root": "/nowhere"}, "nowhere"), ({"labels": None}, "labels"), ({"dataset": "koniq10k"}, "koniq-10k")],
)
def test_configuration_that_names_no_set(values, told, folder):
    given = dict(dataset="csv", root=str(folder), labels="labels.csv", score_range="0,100") | values
    with pytest.raises(ValueError, match=told):
        load_set(make_config(**given))


class Feed:
    table, device = pd.DataFrame(dict(score=[1.0], std=[1.0])), "cpu"

    def __len__(self):
        return 1


class Heads(torch.nn.Linear):
    """The least that a solver takes for a model."""

    def __init__(self):
        super().__init__(1, 1)
        self.backbone = torch.nn.Linear(1, 1)
        self.head_parameters = lambda: [self.weight]


@pytest.mark.parametrize(
    "name, value",
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("crop", 512),
        ("batch_sise", 8),
        ("lr", "fast"),
        ("flip", "perhaps"),
        ("profile", "papper"),
        ("split", "half"),
        ("loss", "l3"),
        ("alpha", -1),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("val_fraction", 1.5),
        ("test_fraction", -0.5),
        ("limit", -1),
        ("patience", -2),
        ("weight_decay", -1),
        ("warmup", -1),
        ("color_jitter", -1),
        ("step_epochs", 0),
        ("clip", -1),
        ("dropout", 1.5),
    ],
)
def test_configuration_with_nonsense(name, value, folder):
    """Caught when the configuration or the solver is made, long before it can spoil a run; the message names it."""
    with pytest.raises(ValueError, match=f"{name}|{value}"):
        cfg = make_config(**{name: value})
        Solver(Heads(), Feed(), cfg, folder)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_tiny_set(size, tmp_path):
    """A handful of images is trained on, or refused with a word about the split that is too small; never a crash after
    an epoch."""
    write_set(tmp_path / "s", splits=["train"] * size)
    relabel(tmp_path / "s", lambda t: t.drop(columns="split"))
    cfg = small_config(tmp_path / "s", split="random", epochs=1)
    try:
        _, feed, model = prepare(cfg)
    except DataError as e:
        assert any(w in str(e) for w in ("train", "val", "test", "cannot be split"))
    else:
        Solver(model, feed, cfg, tmp_path).fit()
        assert np.isfinite(predict(model, feed, "test", 2).pred).all()


# -- metrics and training ----------------------------------------------------------------------------------------------
def test_constant_scores_have_no_correlation():
    with pytest.warns(ConstantInputWarning):
        m = evaluate(np.arange(6.0), np.full(6, 50.0), n_boot=20)
    assert np.isnan(m["srcc"]) and np.isnan(m["plcc"]) and np.isnan(m["krcc"]) and np.isfinite(m["rmse"])


@pytest.mark.parametrize("pred, score", [([1, np.nan, 3], [1, 2, 3]), ([1, 2, 3], [1, np.inf, 3])])
def test_metrics_name_the_row_that_is_no_number(pred, score):
    with pytest.raises(ValueError, match="row 1"):
        evaluate(pred, score)


@pytest.mark.parametrize("pred, score", [([], []), ([1], [1]), ([1, 2], [1, 2, 3]), ([[1, 2]], [[1, 2]])])
def test_metrics_refuse_what_is_no_pair_of_vectors(pred, score):
    with pytest.raises(ValueError, match=r"at least 2|one length"):
        evaluate(pred, score)


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
@pytest.mark.parametrize("loss", ["smooth_l1+20*plcc", "rank", "fidelity", "srcc"])
def test_constant_scores_train(loss, tmp_path):
    """Every correlation is 0/0: training ends with finite weights, the first epoch and an undefined SRCC."""
    write_set(tmp_path / "s", scores=50.0)
    cfg = small_config(tmp_path / "s", loss=loss, alpha=1.0)
    _, feed, model = prepare(cfg)
    done = Solver(model, feed, cfg, tmp_path).fit()
    assert done["best_epoch"] == 1
    assert all(torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point())
    assert np.isfinite(predict(model, feed, "test", 2).pred).all()
    assert [json.loads(row)["val_srcc"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        None,
        None,
    ]


@pytest.mark.parametrize("loss", ["l1", "plcc", "rank", "fidelity", "srcc"])
def test_last_batch_of_one_picture_trains(loss, standin, tmp_path):
    """25 pictures in batches of 8 leave one, which crashed the original."""
    cfg = small_config(standin, loss=loss, epochs=1)
    _, feed, model = prepare(cfg)
    sizes = [len(rows) for _, rows in feed.train_batches(0)]
    assert sizes == [8, 8, 8, 1] and len(feed) == 4
    Solver(model, feed, cfg, tmp_path).fit()
    assert all(torch.isfinite(v).all() for v in model.state_dict().values() if v.is_floating_point())


@pytest.mark.parametrize("batch_size", [8, 64])
def test_loss_that_is_no_number_stops(batch_size, standin, tmp_path):
    """Training stops at once and says which setting to change, also when the only step of an epoch is the harmful
    one."""
    cfg = small_config(standin, lr=1e30, batch_size=batch_size, clip=0, optimizer="adam")
    _, feed, model = prepare(cfg)
    with pytest.raises(TrainingError, match=r"epoch 1.*lower lr"):
        Solver(model, feed, cfg, tmp_path).fit()
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_torn_journal(tmp_path):
    """A last line cut off by a crash is dropped; a bad line in the middle is damage and is named."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert list(read_lines(path).epoch) == [1, 2]
    path.write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2"):
        read_lines(path)


def test_torn_journal_is_mended_by_a_resumed_run(standin, tmp_path):
    """The journal is written anew from the resume point, so that the next row does not join the torn one."""
    cfg = small_config(standin, epochs=2)
    _, feed, model = prepare(cfg)

    class Killed(Exception):
        pass

    def kill(history):
        raise Killed

    with pytest.raises(Killed):
        Solver(model, feed, cfg, tmp_path, on_epoch=kill).fit()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"epoch": 2, "tr')
    Solver(model, feed, cfg, tmp_path).fit()
    assert list(read_lines(tmp_path / "metrics.jsonl").epoch) == [1, 2]


@pytest.mark.parametrize("cut", [0, 100, 0.5, -1, "text"])
def test_damaged_resume_point(cut, standin, tmp_path):
    """The error names the file, so that one knows what to delete."""
    cfg = small_config(standin, epochs=1)
    _, feed, model = prepare(cfg)
    save_resume_point(Solver(model, feed, cfg, tmp_path))
    path = tmp_path / "resume.pt"
    whole = path.read_bytes()
    path.write_bytes(b"hello" * 50 if cut == "text" else whole[: int(cut * len(whole)) if cut == 0.5 else cut])
    with pytest.raises((TrainingError, ValueError), match=r"resume\.pt"):
        Solver(model, feed, cfg, tmp_path).fit()


def test_resume_point_of_another_model(standin, tmp_path):
    """A folder that was used for another model: named, not a list of five hundred keys."""
    cfg = small_config(standin, epochs=1)
    _, feed, model = prepare(cfg)
    save_resume_point(Solver(model, feed, cfg, tmp_path))
    other = small_config(standin, epochs=1, use_attention=False)
    _, feed, model = prepare(other)
    with pytest.raises((TrainingError, ValueError), match=r"resume\.pt"):
        Solver(model, feed, other, tmp_path).fit()


@as_root
def test_cache_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(OSError, match="cache"):
        prepare(small_config(folder, cache=str(tmp_path / "cache")))


def test_cache_folder_that_is_a_file(folder, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match="cache"):
        prepare(small_config(folder, cache=str(tmp_path / "cache")))


def test_half_written_cache_is_made_again(folder, tmp_path):
    """Killed between pixels and index: the index is written last, so the pixels alone are not trusted."""
    cache = tmp_path / "cache"
    _, feed, _ = prepare(small_config(folder, cache=str(cache)))
    whole = feed.cache.path.read_bytes()
    feed.cache.path.with_suffix(".csv").unlink()
    feed.cache.path.write_bytes(whole[:1000])
    _, feed, _ = prepare(small_config(folder, cache=str(cache)))
    assert feed.cache.path.read_bytes() == whole
    assert sorted(p.suffix for p in cache.iterdir()) == [".csv", ".json", ".lock", ".u8"]


def test_picture_that_changed_is_decoded_again(folder):
    """The cache goes by size and time of every file: an exchanged picture is never scored as the old one."""
    _, feed, model = prepare(small_config(folder))
    old = predict(model, feed, "test", 4)
    Image.new("RGB", (200, 100), "white").save(folder / "p40.png")
    _, feed, _ = prepare(small_config(folder))
    new = predict(model, feed, "test", 4)
    assert (old.pred != new.pred).tolist() == (old.image == "p40.png").tolist()


# -- checkpoints -------------------------------------------------------------------------------------------------------
class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle", "legacy"])
def test_checkpoint_with_code_is_refused(how, tmp_path):
    """A pickle may run anything when it is loaded. This one would leave a folder behind."""
    path, mark = tmp_path / "x.pkl", tmp_path / "executed"
    content = {"model_state_dict": {"a": torch.zeros(1)}, "extra": Payload(mark)}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"extra": Payload(mark)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=r"x.pkl"):
        load_checkpoint(path)
    assert not mark.exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "whole.safetensors"
    save_checkpoint(SmartIQA(backbone="test_efficientnet"), path)
    return path


@pytest.mark.parametrize("cut", [0, 4, 8, 1000, 0.5, -1])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_truncated_checkpoint(cut, kind, checkpoint, tmp_path):
    """An interrupted download is called damaged, not dangerous."""
    path = tmp_path / f"x.{kind}"
    if kind == "pth":
        torch.save(load_checkpoint(checkpoint).state_dict(), path)
    whole = (checkpoint if kind == "safetensors" else path).read_bytes()
    path.write_bytes(whole[: int(cut * len(whole)) if cut == 0.5 else cut])
    with pytest.raises(CheckpointError, match=f"x.{kind}: is neither"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [{}, [1, 2], {"a": 1}, {"a": torch.zeros(2)}, torch.zeros(3), {"model_state_dict": None}]
)
def test_checkpoint_of_something_else(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "header",
    [
        None,
        {"smart_iqa": "{"},
        {"smart_iqa": '{"method": "smart", "size": 3}'},
        {"smart_iqa": '{"backbone": "no_such_net"}'},
        {"smart_iqa": "[]"},
        {"smart_iqa": '"lite"'},
    ],
)
def test_safetensors_with_an_odd_header(header, tmp_path):
    """Whatever a header says, the error is ours and names the file."""
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=r"x.safetensors"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "harm, told",
    [
        (lambda s: s.pop("lda.convs.0.weight"), "1 missing: lda.convs.0.weight"),
        (lambda s: s.update(more=torch.zeros(1)), "1 extra: more"),
        (lambda s: s.update({"gate.net.0.bias": torch.zeros(3)}), r"gate.net.0.bias \(3,\) instead of \(256,\)"),
    ],
)
def test_checkpoint_that_does_not_fit(harm, told, checkpoint, tmp_path):
    with safe_open(checkpoint, "pt") as f:
        state, header = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    harm(state)
    save_file(state, tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(tmp_path / "x.safetensors")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_a_weight_that_is_no_number_is_not_hidden(standin, tmp_path):
    """A kernel that clamps what it computed turns NaN into 0: training ends with the gradient, and scoring does not use
    such kernels."""
    cfg = small_config(
        standin,
        backbone=None,
        model_size="lite",
        amp="on",
        freeze_batchnorm=True,
        clip=0.0,
        epochs=1,
        cache=str(tmp_path / "cache"),
    )
    _, feed, model = prepare(cfg)
    with torch.no_grad():
        model.backbone.model.blocks[0][0].bn1.weight[0] = float("nan")
    with pytest.raises(Diverged, match="the (gradient's norm|loss) is nan in epoch 1, batch 1.*lower lr"):
        Solver(model, feed, cfg, tmp_path).fit()
    assert predict(model, feed, "val", 1).pred.isna().all()

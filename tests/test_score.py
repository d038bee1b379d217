"""`smart-iqa score`: hostile folders, tables that survive a kill, what is shown, offline pages, exit codes."""

import base64
import csv
import errno
import html.parser
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from PIL import Image, ImageCms

from smart_iqa.app.engines import Scorer, create_scorer, save_scorer
from smart_iqa.app.folders import (
    COLUMNS,
    Journal,
    PictureFile,
    contact_sheet,
    find_pictures,
    read_scores,
    score_files,
)
from smart_iqa.app.scoring import Calibration, Policy
from smart_iqa.cli import main
from smart_iqa.demo import photograph
from smart_iqa.files import sole_writer
from smart_iqa.images import ImageError, load_image
from smart_iqa.model import build_model

posix = pytest.mark.skipif(os.name == "nt", reason="names, pipes and signals of POSIX")


def make_toy(seed: int = 0, name: str = "toy") -> Scorer:
    """Untrained, of a million weights: a picture takes milliseconds."""
    torch.manual_seed(seed)
    model = build_model("smart", backbone="test_efficientnet")
    model.shift_scores(50)
    return Scorer(
        model,
        Policy(64, "short", 32, 2),
        Calibration((50.0,), (2.5, 0.5), (2.5, 0.5), tuple(np.linspace(-2, 2, 99))),
        dict(name=name),
        device="cpu",
    )


@pytest.fixture(scope="session")
def toy():
    return make_toy()


@pytest.fixture(scope="session")
def model_file(toy, tmp_path_factory):
    save_scorer(toy, path := tmp_path_factory.mktemp("model") / "toy.safetensors")
    return str(path)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Six pictures, one of them in a subfolder, one broken; the test stands beside their folder."""
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for k in range(4):
        picture(k, 80 + 20 * k, 72, 25 * k).save(tmp_path / "photos" / f"p{k}.png")
    picture(9, 100, 70).save(tmp_path / "photos" / "sub" / "p0.jpg")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


@pytest.fixture
def run(run, model_file):
    """Run smart-iqa score with the toy model."""
    return lambda *words: run("score", "--model", model_file, "--device", "cpu", *words)


def shown(table: str) -> list[str]:
    """The file column of a printed table."""
    return [line.split("  ")[-1] for line in table.splitlines()[1:]]


# -- hostile files: each a right score or a named error --------------------------------------------
def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width, height, depth, colour, rows, *more) -> bytes:
    """A PNG of any bit depth, by hand because Pillow cannot write them all."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + body + chunk(b"IEND", b"")


def raw_tiff(values: np.ndarray, bits: int, data: bytes) -> bytes:
    """A grey TIFF of any bit depth."""
    h, w = values.shape
    tags = [(256, w), (257, h), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, h), (279, len(data))]
    entries = b"".join(
        struct.pack("<HHIHH", t, 3, 1, v, 0) if v < 65536 else struct.pack("<HHII", t, 4, 1, v) for t, v in tags
    )
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def ink_profile() -> bytes:
    """A CMYK profile by hand (ICC v2, 8-bit tables, 2 grid points), in which the ink called cyan is orange."""
    grid = []
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        light = (1 - 0.4 * c) * (1 - 0.3 * m) * (1 - 0.1 * y) * (1 - k)
        grid += [round(255 * light), 128 + round(60 * c * (1 - k)), 128 + round(60 * c * (1 - k))]
    identity = bytes(range(256))
    one = [struct.pack(">i", 65536 if i % 4 == 0 else 0) for i in range(9)]
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + b"".join(one) + identity * 4 + bytes(grid) + identity * 3
    head = bytearray(128)
    head[8:12], head[12:24], head[36:40] = bytes([2, 0x20, 0, 0]), b"prtrCMYKLab ", b"acsp"
    head[68:80] = struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    table = struct.pack(">I", 1) + b"A2B0" + struct.pack(">II", 144, len(lut))
    head[0:4] = struct.pack(">I", 144 + len(lut))
    return bytes(head) + table + lut


def saved(img, kind, **kw) -> bytes:
    img.copy().save(out := io.BytesIO(), kind, **kw)  # a copy: Pillow keeps the last encoder's settings in the picture
    return out.getvalue()


PHOTO = photograph("chelsea").crop((100, 50, 300, 200))
GREY = np.asarray(PHOTO.convert("L"))
DEEP = GREY.astype(np.uint16) * 257
GREY_RGB = Image.fromarray(GREY).convert("RGB")
CUT_OUT = Image.merge(
    "RGBA", [*PHOTO.split(), Image.fromarray((np.indices(GREY.shape)[1] > 90).astype(np.uint8) * 200)]
)
WHITE = Image.new("RGBA", PHOTO.size, "white")
ON_WHITE = Image.alpha_composite(WHITE, CUT_OUT).convert("RGB")
GREY_ON_WHITE = Image.alpha_composite(WHITE, CUT_OUT.convert("LA").convert("RGBA")).convert("RGB")
PALETTE = PHOTO.quantize(64)
ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[274] = 6
SIDEWAYS = PHOTO.transpose(Image.Transpose.ROTATE_90)
LAB = ImageCms.profileToProfile(PHOTO, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
TWELVE = GREY.astype(int) * 4095 // 255
JPEG = saved(PHOTO, "JPEG", quality=95)
OTHER = PHOTO.transpose(Image.Transpose.FLIP_TOP_BOTTOM).point(lambda v: 255 - v)


def twelve_bits() -> bytes:
    a, b = TWELVE.reshape(-1, 2).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


# name: (bytes, what it shows as plain RGB, or a part of the error)
HOSTILE = {
    "plain.png": (saved(PHOTO, "PNG"), PHOTO),
    "plain.jpg": (JPEG, PHOTO),
    "LOUD.JPG": (JPEG, PHOTO),
    "no_jpeg.jpg": (saved(PHOTO, "PNG"), PHOTO),  # the content decides, not the suffix
    "grey16.png": (saved(Image.fromarray(DEEP), "PNG"), GREY_RGB),
    "grey16_big_endian.tif": (
        saved(Image.frombytes("I;16B", PHOTO.size, DEEP.astype(">u2").tobytes()), "TIFF"),
        GREY_RGB,
    ),
    "grey16_zero_is_white.tif": (saved(Image.fromarray(65535 - DEEP), "TIFF", tiffinfo={262: 0}), GREY_RGB),
    "grey12.tif": (raw_tiff(GREY, 12, twelve_bits()), GREY_RGB),
    "grey32.tif": (saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "nothing says which is white"),
    "float.tif": (saved(Image.fromarray(GREY / np.float32(255)), "TIFF"), GREY_RGB),
    "rgb16.png": (
        raw_png(200, 150, 16, 2, [r.tobytes() for r in (np.asarray(PHOTO) * np.uint16(257)).astype(">u2")]),
        PHOTO,
    ),
    "rgba16.png": (
        raw_png(200, 150, 16, 6, [r.tobytes() for r in (np.asarray(CUT_OUT) * np.uint16(257)).astype(">u2")]),
        ON_WHITE,
    ),
    "cmyk.tif": (saved(PHOTO.convert("CMYK"), "TIFF"), PHOTO),
    "cmyk.jpg": (saved(PHOTO.convert("CMYK"), "JPEG", quality=95), PHOTO),
    "cmyk_broken_profile.tif": (saved(PHOTO.convert("CMYK"), "TIFF", icc_profile=b"no profile" * 20), PHOTO),
    "lab.tif": (saved(LAB, "TIFF"), PHOTO),
    "ycbcr.tif": (saved(PHOTO.convert("YCbCr"), "TIFF"), PHOTO),
    "bilevel.png": (saved(PHOTO.convert("1"), "PNG"), PHOTO.convert("1").convert("RGB")),
    "palette.gif": (saved(PALETTE, "GIF"), PALETTE.convert("RGB")),
    "palette.png": (saved(PALETTE, "PNG"), PALETTE.convert("RGB")),
    "alpha.png": (saved(CUT_OUT, "PNG"), ON_WHITE),
    "alpha.webp": (saved(CUT_OUT, "WEBP", lossless=True), ON_WHITE),
    "grey_alpha.png": (saved(CUT_OUT.convert("LA"), "PNG"), GREY_ON_WHITE),
    "turned.jpg": (saved(SIDEWAYS, "JPEG", quality=95, exif=ON_ITS_SIDE), PHOTO),
    "turned.png": (saved(SIDEWAYS, "PNG", exif=ON_ITS_SIDE), PHOTO),
    "broken_exif.png": (saved(PHOTO, "PNG", exif=b"no tags at all"), PHOTO),
    "animated.gif": (
        saved(PALETTE, "GIF", save_all=True, append_images=[OTHER.quantize(64)] * 2),
        PALETTE.convert("RGB"),
    ),
    "animated.webp": (saved(PHOTO, "WEBP", save_all=True, append_images=[OTHER.copy()] * 2, lossless=True), PHOTO),
    "animated.png": (saved(PHOTO, "PNG", save_all=True, append_images=[OTHER.copy()] * 2), PHOTO),
    "two.mpo": (saved(PHOTO, "MPO", save_all=True, append_images=[OTHER.copy()], quality=95), PHOTO),
    "pages.tif": (saved(PHOTO, "TIFF", save_all=True, append_images=[OTHER.copy()]), PHOTO),
    "one_pixel.png": (saved(Image.new("RGB", (1, 1), "red"), "PNG"), Image.new("RGB", (1, 1), "red")),
    "thread.png": (saved(PHOTO.resize((1, 5000)), "PNG"), PHOTO.resize((1, 5000))),
    "panorama.jpg": (saved(PHOTO.resize((20000, 300)), "JPEG", quality=95), PHOTO.resize((20000, 300))),
    "endless.png": (
        saved(PHOTO.resize((60000, 6)), "PNG"),
        PHOTO.resize((60000, 6)),
    ),  # whole at 512 pixels: 2.6 gigapixels
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "half.png": (saved(PHOTO, "PNG")[:20000], "truncated"),
    "half.tif": (saved(PHOTO, "TIFF")[:40000], "cannot be decoded"),
    "empty.jpg": (b"", "file is empty"),
    "page.jpg": (b"<!doctype html><title>404</title>", "text, no picture"),
    "noise.png": (bytes(range(256)) * 4, "no picture that Pillow knows"),
    "bomb.png": (raw_png(60000, 60000, 8, 2, [b"\0" * 100]), "too many pixels"),
    "real_bomb.png": (raw_png(14000, 14000, 1, 0, [bytes(1750)] * 14000), "too many pixels"),
    "text_bomb.png": (
        raw_png(8, 8, 8, 0, [bytes(8)] * 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
        "cannot be decoded",
    ),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pip install pillow-heif"),
    "raw.tif": (saved(PHOTO.resize((40, 30)), "TIFF", tiffinfo={254: 1}), "thumbnail"),
    "no_white.tif": (saved(Image.fromarray(DEEP.astype(np.int32) * 100), "TIFF"), "nothing says which is white"),
    "nan.tif": (saved(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "not numbers"),
}
LOSSY = {"plain.jpg", "LOUD.JPG", "cmyk.jpg", "turned.jpg", "two.mpo", "panorama.jpg", "ycbcr.tif", "lab.tif"}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """All of them in one folder."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (data, _) in HOSTILE.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def packaged():
    """The packaged weights under a policy that is quick on strips, where 64 columns of the usual crops take seconds."""
    own = create_scorer("smart-lite", device="cpu", engine="torch")
    return Scorer(own.model, Policy(224, "short", 128, 4), own.calibration, own.info, device="cpu", amp="off")


@pytest.fixture(scope="module")
def verdicts(hostile, packaged):
    """The packaged model on the whole folder, in one go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        frame = score_files(packaged, hostile)
    return frame.set_index(frame.file.map(os.path.basename))


def test_the_hostile_folder_is_covered(verdicts):
    """Nothing is lost and nothing is passed over."""
    assert len(HOSTILE) >= 24 and set(verdicts.index) == set(HOSTILE) and len(verdicts) == len(HOSTILE)
    assert ((verdicts.error == "") == verdicts.score.notna()).all()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(name, verdicts, packaged):
    """The score of the same content as a plain picture (lossy kinds: nearly), or an error that says what is wrong."""
    expected, row = HOSTILE[name][1], verdicts.loc[name]
    if isinstance(expected, str):
        assert expected in row.error and "\n" not in row.error and np.isnan(row.score) and pd.isna(row.width), row.error
    else:
        assert row.error == "" and (row.width, row.height) == expected.size
        near = (2, 3) if name in LOSSY else (0.05, 0.5)  # points, grey levels
        assert abs(row.score - packaged(expected)) < near[0], (row.score, packaged(expected))
        assert np.abs(np.asarray(load_image(row.file)).astype(int) - np.asarray(expected)).mean() < near[1]
        assert row.low <= row.score <= row.high


def test_the_right_scores_are_not_all_alike(verdicts, packaged):
    """Else the test above could not fail: wrong readings of these files have other scores."""
    right = packaged(PHOTO)
    wrong = {
        "negative": PHOTO.point(lambda v: 255 - v),
        "second frame": OTHER,
        "grey": GREY_RGB,
        "black": Image.new("RGB", PHOTO.size),
        "white": Image.new("RGB", PHOTO.size, "white"),
        "squeezed": Image.fromarray(GREY // 16).convert("RGB"),
        "on white": ON_WHITE,
    }
    for name, img in wrong.items():
        assert (
            abs(packaged(img) - right) > 0.05 and np.abs(np.asarray(img).astype(int) - np.asarray(PHOTO)).mean() > 6
        ), name


def test_inks_by_their_own_profile(tmp_path):
    """A CMYK file's numbers mean a colour only by its profile; here cyan is orange."""
    img = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    img.paste((0, 0, 0, 0), (4, 0, 8, 8))
    for kind in ("TIFF", "JPEG"):
        img.resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "x", kind, icc_profile=ink_profile())
        with Image.open(tmp_path / "x") as opened:
            assert opened.mode == "CMYK"
        got = np.asarray(load_image(tmp_path / "x")).astype(int)
        lab = Image.frombytes("LAB", (1, 1), bytes([153, 60, 60]))  # 60, 60, 60; Pillow keeps a and b signed
        orange = ImageCms.profileToProfile(
            lab, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        ).getpixel((0, 0))
        assert np.abs(got[32, 10] - orange).max() < 12 and (got[32, 50] > 245).all(), (got[32, 10], orange, got[32, 50])


def test_rgb_profiles_are_left_alone(tmp_path):
    """As in training."""
    PHOTO.save(tmp_path / "x.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert np.array_equal(load_image(tmp_path / "x.png"), PHOTO)


def test_a_frame_that_was_asked_for_stays(toy):
    """A file means its first frame; a Pillow picture means the frame it stands at."""
    with Image.open(io.BytesIO(HOSTILE["animated.png"][0])) as img:
        first = toy(img)
        img.seek(1)
        second = toy(img)
    assert first == toy(PHOTO) and second == toy(OTHER) and first != second


@posix
def test_things_that_are_no_files(tmp_path, toy):
    """A pipe in the folder must not be waited for; links may lead nowhere, to a file, or round in a circle."""
    PHOTO.save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to("gone.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "folder.jpg").mkdir()
    PHOTO.save(tmp_path / "folder.jpg" / "inner.png")
    (tmp_path / "folder.jpg" / "up").symlink_to("..")
    started = time.time()
    frame = score_files(toy, tmp_path)
    assert time.time() - started < 20
    errors = dict(zip(frame.file.map(lambda f: os.path.relpath(f, tmp_path)), frame.error))
    assert [k for k, e in errors.items() if not e] == ["a.png", "folder.jpg/inner.png", "link.png"]
    assert (
        "named pipe" in errors["pipe.jpg"]
        and "leads nowhere" in errors["dangling.jpg"]
        and errors["self.jpg"]
        and len(errors) == 6
    )
    assert frame.score.nunique() == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(photos, toy):
    (photos / "p0.png").chmod(0)
    (photos / "sub").chmod(0)
    try:
        errors = score_files(toy, "photos").set_index("file").error
    finally:
        (photos / "sub").chmod(0o700)
    assert (
        "Permission" in errors["photos/p0.png"]
        and "cannot be read" in errors["photos/sub"]
        and not errors["photos/p1.png"]
    )


def test_a_file_that_vanishes(photos, toy):
    """Between listing and reading."""
    found = find_pictures("photos")
    (photos / "p1.png").unlink()
    frame = score_files(toy, found, "s.csv")
    assert frame.set_index("file").error["photos/p1.png"] == "no such file" and (frame.error == "").sum() == 4
    PHOTO.save(photos / "p1.png")
    assert (score_files(toy, found, "s.csv").error == "").sum() == 5


NAMES = [
    "two  blanks.png",
    "line\nfeed.png",
    "carriage\rreturn.png",
    "tab\t.png",
    "ünï ☃ 日本.png",
    '"quote",comma;.png',
    "=1+1.png",
    "-x.png",
    "@a.png",
    "%s{0}\\n.png",
    "<img src=http:x>&amp;.png",
    "esc\x1b[31m.png",
    "\u202egnp.exe.png",
    "a[1]*.png",
    "'.png",
    " .png",
]


@posix
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_wild_names(kind, tmp_path, monkeypatch, run):
    """Each name comes back from the table as the path that it is, and no byte of it drives the terminal or the page."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    for name in NAMES:
        PHOTO.resize((40, 30)).save(Path("in") / name)
    shutil.copy("in/-x.png", b"in/caf\xe9.png")
    os.chdir("in")
    code, out, err = run(".", "--out", f"../s.{kind}", "--html", "../r.html", "--heatmap", "../maps")
    assert code == 0, err
    table = read_scores(f"../s.{kind}")
    assert {os.path.normpath(f) for f in table.file} == {*NAMES, "caf\\xe9.png"} and table.score.nunique() == 1
    assert not table.file.str.match(r"[=+\-@\t\r]").any()
    read = {
        "csv": lambda p: pd.read_csv(p, keep_default_na=False),
        "jsonl": lambda p: pd.read_json(p, lines=True),
        "parquet": pd.read_parquet,
    }[kind]
    assert list(read(f"../s.{kind}").file) == list(table.file)
    assert len(out.splitlines()) == len(NAMES) + 2 and "\x1b" not in out and "\u202e" not in out and "\r" not in out
    page = Path("../r.html").read_bytes().decode()
    assert "<img src=http" not in page and "\x1b" not in page and "\u202e" not in page
    assert len(list(Path("../maps").iterdir())) == len(NAMES) + 1
    assert run(".", "--out", f"../s.{kind}")[2].count("17 were there before") == 1


# -- what is found ---------------------------------------------------------------------------------
def paths_of(*given, **kw):
    return [Path(f.path).as_posix() for f in find_pictures(given, **kw)]


def test_folders(photos):
    everything = [
        "photos/broken.jpg",
        "photos/p0.png",
        "photos/p1.png",
        "photos/p2.png",
        "photos/p3.png",
        "photos/sub/p0.jpg",
    ]
    (photos / "notes.txt").write_text("x")
    (photos / ".hidden.png").write_bytes(b"")
    (photos / ".cache").mkdir()
    shutil.copy("photos/p0.png", "photos/.cache/p0.png")
    assert (
        paths_of("photos") == paths_of("./photos/") == paths_of(Path("photos"), "photos/sub", str(photos)) == everything
    )
    assert paths_of("photos", recursive=False) == everything[:-1]
    assert paths_of("photos/notes.txt", "photos/.hidden.png") == [
        "photos/notes.txt",
        "photos/.hidden.png",
    ]  # named: tried


def test_patterns(photos):
    assert paths_of("photos/p[12].png") == ["photos/p1.png", "photos/p2.png"] and paths_of("photos/**/*.jpg") == [
        "photos/broken.jpg",
        "photos/sub/p0.jpg",
    ]
    assert paths_of("phot*") == paths_of("photos") and paths_of(str(photos / "*.png")) == [
        p.as_posix() for p in sorted(photos.glob("*.png"))
    ]
    assert [f.error for f in find_pictures(["photos/*.bmp", "gone.png", "gone/"])] == [
        "no file matches this pattern"
    ] + ["no such file or folder"] * 2
    shutil.copy("photos/p1.png", "photos/p[12].png")
    assert paths_of("photos/p[12].png") == ["photos/p[12].png"]


@posix
def test_links_in_a_circle(photos):
    """Also under **, where following links would never end."""
    before = paths_of("photos")
    (photos / "sub" / "round").symlink_to(photos)
    (photos / "sub" / "again").symlink_to(photos / "sub")
    assert paths_of("photos") == before
    assert set(before) <= set(paths_of("photos/**/*")) and len(paths_of("photos/**/*.png")) == 4


@posix
def test_linked_folders_are_followed(photos, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "here").symlink_to(photos)
    assert len(paths_of("links")) == 6


def test_nothing_to_score(photos, run):
    """Exit code 2, and a message for each thing that was asked for."""
    (photos.parent / "empty").mkdir()
    code, out, err = run("empty", "gone.png", "*.bmp")
    assert (
        code == 2
        and not out
        and "empty: no picture in this folder" in err
        and "gone.png: no such file" in err
        and "*.bmp: no file matches" in err
    )


def test_names_from_stdin(photos, run, monkeypatch):
    for names in (b"photos/p0.png\r\n\r\nphotos/sub\n", b"photos/p0.png\0photos/sub\0"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(names)))
        code, out, _ = run("-", "photos/p1.png")
        assert code == 0 and shown(out) == ["photos/p0.png", str(Path("photos/sub/p0.jpg")), "photos/p1.png"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert run("-")[0] == 2


# -- the table on disk -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns(kind, photos, toy, run):
    code, _, _ = run("photos", "nowhere.png", "--out", f"s.{kind}")
    table = read_scores(f"s.{kind}")
    assert code == 1 and list(table) == list(COLUMNS) and len(table) == 7
    first = table.iloc[1]
    assert first.file == str(Path("photos/p0.png")) and (first.width, first.height, first.bytes) == (
        80,
        72,
        os.path.getsize("photos/p0.png"),
    )
    assert (
        abs(first.score - toy(load_image("photos/p0.png"))) < 0.1
        and first.low < first.score < first.high
        and first.level == 0.9
    )
    assert (
        (table.model == toy.id).all()
        and table.error[0].startswith("cannot be decoded")
        and table.error[6] == "no such file or folder"
    )
    assert set(os.listdir()) == {"photos", f"s.{kind}"}  # no journal, no temporary file


def test_three_kinds_of_table_hold_the_same(photos, toy):
    frames = [score_files(toy, "photos", f"s.{kind}") for kind in ("csv", "jsonl", "parquet")]
    for kind, frame in zip(("csv", "jsonl", "parquet"), frames):
        assert frame.equals(frames[0]) and read_scores(f"s.{kind}").equals(frame)
    with open("s.csv", newline="") as f:
        assert next(csv.reader(f)) == list(COLUMNS)
    assert (
        [json.loads(line)["file"] for line in open("s.jsonl")]
        == list(frames[0].file)
        == list(pd.read_parquet("s.parquet").file)
    )


def count_scored(toy, monkeypatch):
    """A list that fills with the paths that are really scored."""
    seen, stream = [], toy.stream
    monkeypatch.setattr(toy, "stream", lambda paths: stream(seen.append(p) or p for p in paths))
    return seen


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("cut", [1, 7, 60, 150, 400])
def test_torn_table(kind, cut, photos, toy, monkeypatch):
    """Cut anywhere, the second run writes what the first would have written, and scores only what is missing."""
    whole = score_files(toy, "photos", f"whole.{kind}")
    journal = Journal(f"torn.{kind}")
    journal.begin(Journal(f"whole.{kind}").read())
    journal.file.close()
    os.truncate(journal.lines, os.path.getsize(journal.lines) - cut)
    seen = count_scored(toy, monkeypatch)
    again = score_files(toy, "photos", f"torn.{kind}")
    assert again.equals(whole) and read_scores(f"torn.{kind}").equals(whole)
    if kind != "parquet":
        assert Path(f"torn.{kind}").read_bytes() == Path(f"whole.{kind}").read_bytes()
    assert 1 + (cut > 1) <= len(seen) < 6 and again.attrs["kept"] == 6 - len(seen)  # the torn row, the broken file
    assert not list(photos.parent.glob("*.part.*")) and not list(photos.parent.glob(".*"))


def test_torn_header(photos, toy):
    for size in (0, 5, len(",".join(COLUMNS))):
        Path("s.csv").write_text(",".join(COLUMNS)[:size])
        score_files(toy, "photos", "s.csv")
        assert len(read_scores("s.csv")) == 6


def test_what_is_scored_again(photos, toy, monkeypatch):
    """Files that changed or failed, and no others; rows of other folders stay."""
    before = score_files(toy, "photos", "s.csv")
    picture(50, 90, 90).save(photos / "p1.png")
    picture(51, 90, 90).save(photos / "broken.jpg")
    seen = count_scored(toy, monkeypatch)
    after = score_files(toy, "photos", "s.csv")
    assert [Path(p).name for p in seen] == ["broken.jpg", "p1.png"] and (after.error == "").all()
    assert (
        list(after.file) == list(before.file) == list(read_scores("s.csv").file)
        and (after.score != before.score).sum() == 2
    )
    shutil.copytree("photos/sub", "more")
    score_files(toy, "more", "s.csv")
    assert len(read_scores("s.csv")) == 7 and len(seen) == 3


def test_excel_may_have_been_there(photos, toy, monkeypatch):
    """A byte order mark and other line ends do not hide what was scored."""
    whole = score_files(toy, "photos", "s.csv")
    Path("s.csv").write_bytes(b"\xef\xbb\xbf" + Path("s.csv").read_bytes().replace(b"\n", b"\r\n"))
    seen = count_scored(toy, monkeypatch)
    assert score_files(toy, "photos", "s.csv").equals(whole) and [Path(p).name for p in seen] == ["broken.jpg"]


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("s.csv", b"image,mos\na.jpg,3\n", "does not begin"),
        ("s.csv", b"no table", "does not begin"),
        ("s.csv", b"\x89PNG", "does not begin"),
        ("s.jsonl", b'{"image": 1}\n', "does not begin"),
        ("s.jsonl", b'{"file": 1}\n', "not ours"),
        ("s.parquet", b"PAR1", "s.parquet"),
        ("s.csv", (",".join(COLUMNS) + "\na.jpg,good" + "," * 10 + "\n").encode(), "good"),
        ("s.csv", (",".join(COLUMNS) + "\na.jpg\n").encode(), "not ours"),
    ],
)
def test_a_table_of_something_else_is_not_touched(name, content, told, photos, run):
    Path(name).write_bytes(content)
    code, _, err = run("photos", "--out", name)
    assert code == 1 and told in err and "--out" in err and Path(name).read_bytes() == content


def test_one_table_one_model(photos, toy, run):
    """Another model, even of the same name, or another level: an error with the mend, and the table stays."""
    score_files(make_toy(seed=1), "photos", "s.csv")
    before = Path("s.csv").read_bytes()
    code, _, err = run("photos", "--out", "s.csv")
    assert code == 1 and "holds scores of toy@" in err and "--out" in err and Path("s.csv").read_bytes() == before
    assert run("photos", "--out", "t.csv")[0] == 1 and "level" in run("photos", "--out", "t.csv", "--level", "0.8")[2]


def test_fingerprint_of_a_model(toy, model_file):
    """The same after saving; another for other weights, policy or calibration."""
    own = toy.id
    assert own == create_scorer(model_file, device="cpu").id == make_toy().id and own.startswith("toy@")
    other = [
        make_toy(seed=1),
        Scorer(toy.model, Policy(64, "short", 32, 3), toy.calibration, toy.info),
        Scorer(toy.model, toy.policy, None, toy.info),
    ]
    assert len({own, *(s.id for s in other)}) == 4


def test_a_model_without_calibration(photos, toy):
    plain = Scorer(toy.model, toy.policy, None, toy.info, device="cpu")
    frame = score_files(plain, "photos", "s.csv")
    assert (
        frame.low.isna().all() and frame.level.isna().all() and score_files(plain, "photos", "s.csv").attrs["kept"] == 5
    )


@posix
@pytest.mark.parametrize("kind", ["csv", pytest.param("parquet", marks=pytest.mark.slow)])
def test_kill_9(kind, tmp_path, monkeypatch, model_file, run):
    """A killed run goes on, and its table is that of an undisturbed one."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("many")
    for k in range(10):
        picture(k, 400, 300, 5 * k).save(f"many/{k}.png")
    (tmp_path / "many" / "0.png").write_bytes(b"broken")
    for k in range(10, 150):
        os.link(f"many/{k % 10}.png", f"many/{k}.png")
    lines = Journal(f"killed.{kind}").lines
    words = ["score", "many", "--model", model_file, "--device", "cpu", "--threads", "1", "--out", f"killed.{kind}"]
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; from smart_iqa.cli import main; sys.exit(main())", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.time() + 120
    while (
        (not lines.exists() or lines.read_bytes().count(b"\n") < 20) and child.poll() is None and time.time() < deadline
    ):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, child.stderr.read().decode()
    assert 19 <= lines.read_bytes().count(b"\n") < 150 and not Path("killed.parquet").exists()
    _, _, err = run("many", "--out", f"killed.{kind}")
    kept = int(re.search(r"(\d+) were there before", err)[1])
    assert 0 < kept < 150
    run("many", "--out", f"whole.{kind}")
    assert Path(f"killed.{kind}").read_bytes() == Path(f"whole.{kind}").read_bytes()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_row_is_on_disk_before_the_next_picture(kind, photos, toy, monkeypatch):
    """So a kill costs one row."""
    lines, stream, seen = Journal(f"s.{kind}").lines, toy.stream, []

    def watched(paths):
        for got in stream(paths):
            seen.append(lines.read_bytes().count(b"\n") - (kind == "csv"))
            yield got

    monkeypatch.setattr(toy, "stream", watched)
    score_files(toy, "photos", f"s.{kind}")
    assert seen == list(range(6))


def test_ctrl_c(photos, toy, run, monkeypatch):
    """Exit code 130; with --out the rows are there, without it the message does not promise what cannot be."""
    stream = Scorer.stream

    def stop(self, paths):
        for k, got in enumerate(stream(self, paths)):
            if k == 3:
                raise KeyboardInterrupt
            yield got

    monkeypatch.setattr(Scorer, "stream", stop)
    code, _, err = run("photos", "--out", "s.csv")
    assert code == 130 and "resumes where it was" in err and len(read_scores("s.csv")) == 3
    code, _, err = run("photos")
    assert code == 130 and "--out" in err and "resumes where it was" not in err


# -- what is shown ---------------------------------------------------------------------------------
def test_table_on_the_terminal(photos, toy, run):
    code, out, err = run("photos")
    assert code == 1 and "p0.png" in out and "broken.jpg" not in out and "broken.jpg: cannot be decoded" in err
    assert shown(out) == [f for f in score_files(toy, "photos").file if "broken" not in f] and "90 % interval" in out
    assert "5 scored" in err and "1 failed" in err and "files per second" in err and "mean" in err


def test_top_bottom_sort(photos, toy, run):
    frame = score_files(toy, "photos")
    best = list(frame.dropna(subset="score").sort_values("score", ascending=False).file)
    named = sorted(best)
    for words, expected in {
        ("--sort", "score"): best,
        ("--sort", "score", "--reverse"): best[::-1],
        ("--top", "2"): best[:2],
        ("--bottom", "2"): best[:-3:-1],
        ("--top", "1", "--bottom", "1"): [best[0], best[-1]],
        ("--top", "99"): best,
        ("--sort", "name"): named,
        ("--top", "2", "--sort", "name"): sorted(best[:2]),
        ("--top", "3", "--bottom", "3"): best,
    }.items():
        assert shown(run("photos", *words)[1]) == expected, words
    sizes = [re.search(r"(\d+) x", line)[1] for line in run("photos", "--sort", "size")[1].splitlines()[1:]]
    assert sizes == sorted(sizes, key=int, reverse=True)
    run("photos", "--top", "1", "--out", "s.csv")
    assert len(read_scores("s.csv")) == 6  # what is shown is not what is written


def test_quiet(photos, run):
    code, out, err = run("photos", "--quiet")
    assert code == 1 and not out and "broken.jpg" in err and "%|" not in err
    assert "scoring:" in run("photos")[2]


def test_exit_codes(photos, run):
    assert (
        run("photos/p0.png")[0] == 0
        and run("photos")[0] == 1
        and run("photos/p0.png", "gone.png")[0] == 1
        and run("gone.png")[0] == 2
    )
    for words in (
        ("--top", "0"),
        ("--top", "x"),
        ("--level", "90"),
        ("--batch", "-1"),
        ("--sort", "colour"),
        ("--nonsense",),
    ):
        assert run("photos", *words)[0] == 2, words
    assert run()[0] == 2
    for words in (("--model", "smart-light"), ("--out", "s.xls"), ("--html", "photos"), ("--device", "abacus")):
        code, _, err = run("photos", *words)
        assert code == 1 and "smart-iqa: " in err and "Traceback" not in err, (words, err)


def test_outputs_in_folders_that_are_not_there_yet(photos, run):
    assert run("photos/p0.png", "--out", "a/b/s.csv", "--html", "c/r.html", "--heatmap", "d/e")[0] == 0
    assert Path("a/b/s.csv").exists() and Path("c/r.html").exists() and Path("d/e/p0.png.map.png").exists()


@posix
def test_reader_that_goes_away(photos):
    """`| head -1` ends the output, not the run; ASCII terminals show what they can."""
    shutil.copy("photos/p0.png", "photos/é.png")
    program = f"{sys.executable} -c 'import sys; from smart_iqa.cli import main; sys.exit(main())'"
    line = f"{program} score photos"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} | true; echo code ${{PIPESTATUS[0]}}; {line} | cat"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert (
        "code 1" in done.stdout
        and "Traceback" not in done.stderr
        and "Broken" not in done.stderr
        and "\\xe9.png" in done.stdout
    )


# -- maps and pages --------------------------------------------------------------------------------
def test_maps(photos, run):
    """Same-named files of several folders and suffixes do not meet; other runs add; maps are not pictures."""
    picture(7, 90, 70).save(photos / "p0.jpg")
    (photos.parent / "other").mkdir()
    shutil.copy("photos/p0.png", "other/p0.png")
    assert run("photos", "other", "--heatmap", "maps")[0] == 1
    written = {p.relative_to("maps").as_posix() for p in Path("maps").rglob("*.png")}
    assert written == {
        *(f"photos/p{k}.png.map.png" for k in range(4)),
        "photos/p0.jpg.map.png",
        "photos/sub/p0.jpg.map.png",
        "other/p0.png.map.png",
    }
    assert max(Image.open("maps/photos/p3.png.map.png").size) == 768
    before = {p: p.stat().st_mtime_ns for p in Path("maps").rglob("*.png")}
    picture(60, 90, 70).save(photos / "p0.jpg")
    run("photos", "other", "--heatmap", "maps")
    assert [p.name for p, t in before.items() if p.stat().st_mtime_ns != t] == ["p0.jpg.map.png"]
    shutil.move("maps", "photos/maps")
    assert not [p for p in paths_of("photos") if "maps" in p]


def test_maps_of_strips(tmp_path, run):
    """A map is no larger than its longest side allows."""
    for name in ("thread.png", "panorama.jpg"):
        (tmp_path / name).write_bytes(HOSTILE[name][0])
    assert run(tmp_path, "--heatmap", tmp_path / "maps", "--quiet")[0] == 0
    for name in ("thread.png", "panorama.jpg"):
        assert max(Image.open(tmp_path / "maps" / f"{name}.map.png").size) <= 5000


class Page(html.parser.HTMLParser):
    """Tags and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_contact_sheet(photos, toy, run):
    """Best first, thumbnails inside, failures at the end, nothing from outside."""
    Image.open(io.BytesIO(HOSTILE["turned.jpg"][0])).save(photos / "turned.jpg", exif=ON_ITS_SIDE, quality=95)
    assert run("photos", "--html", "report.html")[0] == 1
    source, page = Path("report.html").read_text(encoding="utf-8"), Page("report.html")
    frame = score_files(toy, "photos").dropna(subset="score").sort_values("score", ascending=False)
    images = [a for t, a in page.tags if t == "img"]
    assert [a["alt"] for a in images] == list(frame.file)
    assert (
        not {t for t, _ in page.tags} & {"script", "link", "iframe", "base"}
        and "url(" not in source
        and "http" not in source
    )
    for a, row in zip(images, frame.itertuples()):
        assert a["src"].startswith("data:image/jpeg;base64,") and f"{row.score:.1f}" in page.text
        thumb = Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1])))
        assert max(thumb.size) <= 320 and abs(thumb.width / thumb.height - row.width / row.height) < 0.05
    assert (
        "broken.jpg: cannot be decoded" in page.text
        and "90 %" in page.text
        and "higher is better" in page.text
        and toy.id in page.text
    )
    assert "prefers-color-scheme" in source and "undefined" not in source and "nan" not in page.text.lower()


def test_contact_sheet_escapes(tmp_path, toy, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "x\"'><b onload=1>&.png" if os.name != "nt" else "x'&.png"
    PHOTO.resize((40, 30)).save(name)
    Path("bad<i>.jpg").write_bytes(b"") if os.name != "nt" else None
    run(".", "--html", "r.html")
    page = Page("r.html")
    assert [a["alt"] for t, a in page.tags if t == "img"] == [name] and not [a for _, a in page.tags if "onload" in a]
    assert name in page.text


def test_contact_sheet_when_a_picture_has_gone(photos, run):
    """Scored in an earlier run, gone since the listing: the card stays."""
    run("photos", "--out", "s.csv")
    frame = read_scores("s.csv")
    (photos / "p0.png").unlink()
    contact_sheet(frame, "r.html")
    page = Page("r.html")
    assert len([t for t, _ in page.tags if t == "img"]) == 4 and "the picture is gone" in page.text


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["score", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in "out top bottom sort reverse device batch model heatmap html level amp threads recursive quiet".split():
        assert f"--{word}" in text, word
    assert "stdin" in text


def test_library_use(photos, toy):
    """Without a command line: paths, patterns or what was found; an empty list is an empty table."""
    whole = score_files(toy, "photos")
    assert score_files(toy, [Path("photos")]).equals(whole) and score_files(toy, find_pictures("photos")).equals(whole)
    empty = score_files(toy, [], "e.csv")
    assert len(empty) == 0 and list(empty) == list(COLUMNS) and read_scores("e.csv").equals(empty)
    assert score_files(toy, [PictureFile("gone.png", ".", "was there once")]).error[0] == "was there once"
    with pytest.raises(ValueError, match=r"s.csv: no such file"):
        read_scores("s.csv")
    with pytest.raises(ImageError):
        toy("photos/broken.jpg")


def test_medium_format_photograph_has_a_score_and_no_warning(tmp_path):
    """100 megapixels, of which Pillow warns. (pytest resets the filters of warnings: a process of its own.)"""
    Image.new("L", (11648, 8736), 90).save(tmp_path / "large.jpg")
    Image.new("L", (1456, 1092), 90).save(tmp_path / "small.jpg")
    command = [
        sys.executable,
        "-c",
        "import sys; from smart_iqa.cli import main; sys.exit(main(sys.argv[1:]))",
        "score",
        "--quiet",
    ]
    done = subprocess.run([*command, "--out", str(tmp_path / "s.csv"), str(tmp_path)], capture_output=True, text=True)
    table = read_scores(tmp_path / "s.csv")
    assert done.returncode == 0 and "ecompression" not in done.stderr and table.width.tolist() == [11648, 1456]
    assert abs(table.score[0] - table.score[1]) < 0.5


SLOW_ONE = """
import sys, time
from types import SimpleNamespace
from smart_iqa.app.folders import score_files

def stream(paths):
    print("mine", flush=True)
    time.sleep(600)
    yield

score_files(SimpleNamespace(id="slow", calibration=None, stream=stream), sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("spelling", ["s.csv", "sub/../s.csv", "link.csv"])
def test_two_commands_on_one_table(spelling, toy, photos, tmp_path):
    """The second says so and leaves the table alone, whatever cache and name of the file each has; when the first has
    been killed, it goes on."""
    out = tmp_path / "s.csv"
    (tmp_path / "sub").mkdir()
    if spelling == "link.csv":
        os.symlink("s.csv", tmp_path / "link.csv")
    command = [sys.executable, "-c", SLOW_ONE, str(photos), str(tmp_path / spelling)]
    env = os.environ | {"SMART_IQA_CACHE": str(tmp_path / "another")}
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert other.stdout.readline() == "mine\n"
        before = out.read_bytes()
        with pytest.raises(ValueError, match=r"s.csv: another process"):
            score_files(toy, [str(photos)], out)
        assert out.read_bytes() == before
    finally:
        other.kill()
        other.wait()
    assert len(score_files(toy, [str(photos)], out)) == len(read_scores(out)) > 0
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_share_without_locks_loses_no_row(kind, toy, photos, tmp_path, monkeypatch):
    """Two machines that do not see one another's locks: the table of the last to end has the rows of both."""
    monkeypatch.setattr("smart_iqa.files.take_lock", lambda *args: Mock())
    shutil.copytree(photos / "sub", tmp_path / "more")
    stream, out = toy.stream, tmp_path / f"s.{kind}"

    def meanwhile(paths):
        for k, got in enumerate(stream(paths)):
            if k == 2:
                monkeypatch.setattr(toy, "stream", stream)
                score_files(toy, "more", out)
            yield got

    monkeypatch.setattr(toy, "stream", meanwhile)
    whole = score_files(toy, "photos", out)
    assert len(read_scores(out)) == len(whole) + 1
    assert list(read_scores(out).file[1:]) == list(whole.file)


def test_a_table_behind_a_link_is_the_one_it_leads_to(toy, photos, tmp_path):
    """The link stays a link, and no second table appears beside it."""
    (tmp_path / "far").mkdir()
    os.symlink("far/s.csv", tmp_path / "s.csv")
    score_files(toy, [str(photos)], tmp_path / "s.csv")
    picture(50, 90, 90).save(photos / "p1.png")
    score_files(toy, [str(photos)], tmp_path / "s.csv")
    assert (tmp_path / "s.csv").is_symlink()
    assert len(read_scores(tmp_path / "far" / "s.csv")) == 6


def test_a_folder_that_cannot_hold_a_table(photos, run, monkeypatch):
    """Told before anything is scored: a folder that is a file, one that is read-only, a share without locks."""
    code, _, err = run("photos", "--out", "photos/p0.png/s.csv")
    assert (code, "photos/p0.png/s.csv: its folder cannot be written" in err) == (1, True)
    for number, told in ((errno.EROFS, "Read-only"), (errno.ENOLCK, "no file locks")):
        monkeypatch.setattr("smart_iqa.files.FileLock.acquire", Mock(side_effect=OSError(number, os.strerror(number))))
        code, _, err = run("photos", "--out", "s.csv")
        assert (code, "s.csv: its folder cannot be written" in err, told in err) == (1, True, True)
    assert os.listdir() == ["photos"]


# -- what others have written into a table ---------------------------------------------------------
def with_column(path: Path):
    """Add a column by hand, as its kind of file allows."""
    if path.suffix == ".parquet":
        pd.read_parquet(path).assign(mine="keep").to_parquet(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(json.loads(r) | {"mine": "keep"}) + "\n" for r in path.open()))
    else:
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([f"{header},mine", *(f"{r},keep" for r in rows)]) + "\n")


def changed_text(change):
    """A change of a .csv table's text."""
    return lambda path: path.write_bytes(change(path.read_text()).encode())


CHANGES = {
    "a column": ("csv", with_column, "not ours (mine)"),
    "a column of JSON": ("jsonl", with_column, "not ours (mine)"),
    "a column of parquet": ("parquet", with_column, "not ours (mine)"),
    "a field in one row": ("csv", changed_text(lambda t: t.replace("\n", ",keep\n").replace(",keep", "", 1)), "row"),
    "another order": (
        "csv",
        lambda path: pd.read_csv(path, dtype=str)[list(COLUMNS)[::-1]].to_csv(path, index=False),
        "another order",
    ),
    "a column less": (
        "csv",
        lambda path: pd.read_csv(path, dtype=str).drop(columns="std").to_csv(path, index=False),
        "without std",
    ),
    "semicolons": ("csv", changed_text(lambda t: "\ufeff" + t.replace(",", ";").replace("\n", "\r\n")), "commas"),
    "another encoding": ("csv", lambda path: path.write_bytes(path.read_bytes() + b"caf\xe9.jpg\n"), "UTF-8"),
    "a quote": ("csv", changed_text(lambda t: t.replace("\nphotos/p0", '\n"photos/p0', 1)), "s.csv"),
    "decimal commas": ("csv", changed_text(lambda t: t.replace(",0.9,", ',"0,9",')), "0,9"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_table_that_would_lose_what_somebody_wrote(name, photos, toy):
    """It is refused, and not one byte of it changes; neither is anything left beside it."""
    kind, change, told = CHANGES[name]
    out = Path(f"s.{kind}")
    score_files(toy, "photos", out)
    change(out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=re.escape(told)) as e:
        score_files(toy, "photos", out)
    assert str(out) in str(e.value)
    assert out.read_bytes() == before
    assert sorted(os.listdir()) == ["photos", f"s.{kind}"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_editor_may_have_been_there(kind, photos, toy):
    """Blank lines and a last line without its line feed cost no row, also of files that are not scored now."""
    out = Path(f"s.{kind}")
    score_files(toy, "photos", out)
    header, *rows = out.read_text().splitlines() if kind == "csv" else ["", *out.read_text().splitlines()]
    out.write_text("\n".join([*[header][: kind == "csv"], rows[0], "", *rows[1:]]))
    score_files(toy, "photos/p0.png", out)
    assert set(read_scores(out).file) == {r.split('"')[3] if kind == "jsonl" else r.split(",")[0] for r in rows}


# -- what is passed over ---------------------------------------------------------------------------
def test_kinds_that_are_not_read_are_counted(photos, run):
    """By kind and with what to do, once each; what is no picture is not mentioned, and what is named is tried."""
    (photos / "sub" / "more").mkdir()
    for name in ("a.DNG", "b.dng", "c.jxl", "sub/d.cr2", "sub/more/e.mp4", "notes.txt", "a.xmp", "Thumbs.db"):
        (photos / name).write_bytes(b"II*\0")
    code, _, err = run("photos", "photos/sub", "photos/c.jxl")
    assert "passed over 4 files of kinds that are not read (.cr2 1, .dng 2, .mp4 1)" in err
    assert "rawpy" in err
    assert "photos/c.jxl: cannot be decoded" in err
    assert not [word for word in ("notes.txt", ".xmp", "Thumbs") if word in err]
    assert "passed over" not in run("photos/p0.png")[2]
    (photos.parent / "raws").mkdir()
    (photos / "a.DNG").rename("raws/a.DNG")
    code, _, err = run("raws")
    assert (code, ".dng 1" in err) == (2, True)


JXL = """
from PIL import Image, JpegImagePlugin

def opened(file, name):
    file.seek(12)
    return JpegImagePlugin.JpegImageFile(file, name)

Image.register_open("JXL", opened, lambda head: head[4:8] == b"JXL ")
Image.register_extension("JXL", ".jxl")
"""


def test_jpeg_xl_is_read_where_its_plugin_is_installed(photos, toy, tmp_path, monkeypatch):
    (photos / "a.jxl").write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n" + JPEG)
    assert "pip install pillow-jxl-plugin" in score_files(toy, "photos/a.jxl").error[0]
    assert "photos/a.jxl" not in paths_of("photos")
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "pillow_jxl.py").write_text(JXL.replace("file.seek(12)", "import io; file.seek(12); file = "
                                                                    "io.BytesIO(file.read())"))
    monkeypatch.syspath_prepend(str(tmp_path / "plugins"))
    for table in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, table, dict(getattr(Image, table)))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    assert "photos/a.jxl" in paths_of("photos")
    assert (score_files(toy, "photos/a.jxl").error == "").all()


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"])
def test_folders_of_systems(name, photos, run):
    """Passed over below a folder and by patterns, which is said; scored where they are named."""
    before = paths_of("photos")
    (photos / "sub" / name).mkdir()
    shutil.copy("photos/p0.png", f"photos/sub/{name}/p0.png")
    shutil.copy("photos/p0.png", "photos/._p0.png")
    assert paths_of("photos") == before
    assert len(paths_of("photos/**/*.png")) == 4
    _, _, err = run("photos")
    assert f"._* 1, {name} 1" in err or f"{name} 1, ._* 1" in err
    for named in (f"photos/sub/{name}", f"photos/sub/{name}/p0.png", f"photos/*/{name}/*.png"):
        assert paths_of(named) == [f"photos/sub/{name}/p0.png"]


@pytest.mark.parametrize("address", ["https://example.org/a.jpg", "http://example.org/a?b=[1]", "s3://bucket/a.png"])
def test_addresses_are_not_fetched(address, photos, run):
    """Its row has it as it was given, and says so; a table is not written to one."""
    code, _, err = run(address, "photos/p0.png", "--out", "s.csv")
    assert code == 1
    assert f"{address}: an address" in err
    assert read_scores("s.csv").file[0] == address
    code, _, err = run("photos/p0.png", "--out", f"{address}.csv")
    assert (code, "an address" in err) == (1, True)
    assert sorted(os.listdir()) == ["photos", "s.csv"]


# -- names that look alike -------------------------------------------------------------------------
@posix
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_names_that_print_alike_have_a_row_each(kind, tmp_path, toy, monkeypatch):
    """Bytes that are no UTF-8, the escape that stands for them, and an accent in one sign or in two."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    names = [b"caf\xe9.png", rb"caf\xe9.png", rb"caf\x5cxe9.png", rb"caf\\xe9.png", b"caf\\\xe9.png",
             "caf\u00e9.png".encode(), "cafe\u0301.png".encode()]
    for k, name in enumerate(names):
        picture(k, 60 + k, 50).save(tmp_path / "in" / "new.png")
        os.rename(b"in/new.png", b"in/" + name)
    whole = score_files(toy, "in", f"s.{kind}")
    assert sorted(whole.width) == [60 + k for k in range(len(names))]
    assert whole.file.nunique() == len(names)
    assert whole.file.map(lambda f: f.encode("utf-8").decode() == f).all()
    seen = count_scored(toy, monkeypatch)
    again = score_files(toy, "in", f"s.{kind}")
    assert again.equals(whole)
    assert not seen


@posix
def test_the_parent_of_a_linked_folder_is_not_where_the_link_lies(photos, tmp_path):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    picture(3, 70, 70).save(tmp_path / "far" / "p0.png")
    (photos / "link").symlink_to(tmp_path / "far" / "deep")
    assert paths_of("photos/p0.png", "photos/link/../p0.png", "photos/sub/../p0.png") == [
        "photos/p0.png",
        "photos/link/../p0.png",
    ]


# -- outputs that would meet something else --------------------------------------------------------
@pytest.mark.parametrize(
    "words, told",
    [
        (("--out", "s.csv", "--html", "s.csv"), "--html s.csv: --out names the same file"),
        (("--out", "s.csv", "--html", "sub/../s.csv"), "--out names the same file"),
        (("--out", "s.csv", "--html", "link.csv"), "--out names the same file"),
        (("--out", "s.csv", "--heatmap", "s.csv"), "a file; --heatmap takes the name of a folder"),
        (("--html", "photos/p0.png"), "would replace photos/p0.png, which is read"),
        (("--html", "linked.html"), "would replace photos/p0.png, which is read"),
        (("--out", "photos"), "a folder; --out takes the name of a file"),
    ],
)
def test_no_output_replaces_another_or_a_picture(words, told, photos, run):
    os.mkdir("sub")
    os.symlink("s.csv", "link.csv")
    os.symlink("photos/p0.png", "linked.html")
    assert run("photos", "--out", "s.csv")[0] == 1
    before = Path("s.csv").read_bytes(), Path("photos/p0.png").read_bytes()
    code, _, err = run("photos", *words)
    assert code == 1
    assert told in err
    assert (Path("s.csv").read_bytes(), Path("photos/p0.png").read_bytes()) == before


def test_outputs_meet_also_before_they_are_there(photos, run):
    os.symlink("new.csv", "link.html")
    assert run("photos", "--out", "new.csv", "--html", "link.html")[0] == 1
    assert not Path("new.csv").exists()


def test_the_model_is_no_output(photos, run, model_file, tmp_path):
    before = Path(model_file).read_bytes()
    assert run("photos", "--html", model_file)[0] == 1
    assert Path(model_file).read_bytes() == before


def test_a_map_replaces_no_picture(photos, run):
    """Its name may be that of a file which somebody else has made."""
    shutil.copy("photos/p1.png", "photos/p0.png.map.png")
    before = Path("photos/p0.png.map.png").read_bytes()
    code, _, err = run("photos/p0.png", "--heatmap", "photos")
    assert code == 1
    assert "photos/p0.png.map.png is no map" in err
    assert "wrote" not in err
    assert Path("photos/p0.png.map.png").read_bytes() == before


def test_no_folder_of_maps_is_named_that_was_not_written(photos, run):
    code, _, err = run("photos/broken.jpg", "--heatmap", "maps")
    assert (code, "wrote" in err, Path("maps").exists()) == (1, False, False)


def test_memory_that_is_short_is_said(photos, run, monkeypatch):
    monkeypatch.setattr(Scorer, "stream", Mock(side_effect=MemoryError))
    code, _, err = run("photos")
    assert (code, "not enough memory" in err, "Traceback" in err) == (1, True, False)


def test_a_closed_stdin(photos, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    code, _, err = run("-")
    assert (code, "stdin, which is closed" in err) == (1, True)


def test_a_number_of_crops_that_is_not_made_is_said_once(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        PHOTO.save(tmp_path / name)
    main(["score", str(tmp_path), "--model", "smart-lite-1", "--crops", "2"])
    err = capsys.readouterr().err
    assert err.count("2 crops: a photograph of 3:2 gets 3; it gets 3 where asked for that") == 1
    assert "UserWarning" not in err


def test_a_closed_stderr(photos, run, monkeypatch):
    """The scores come, and what belongs to stderr goes nowhere."""
    monkeypatch.setattr("sys.stderr", None)
    code, out, _ = run("photos/p0.png", "--out", "s.csv")
    assert (code, len(read_scores("s.csv")), "smart-iqa:" in out) == (0, 1, False)


@pytest.mark.parametrize("words", [("score", "--html", "x"), ("best", "--html", "x"), ("best", "--out", "x.csv")])
def test_two_commands_on_one_page(words, photos, model_file, capsys):
    """A page or a table of groups is the work of one command at a time, too."""
    command, *output = words
    with sole_writer(output[1]):
        assert main([command, "photos", "--model", model_file, "--device", "cpu", *output]) == 1
    assert f"{output[1]}: another process is writing to it" in capsys.readouterr().err
    assert os.listdir() == ["photos"]

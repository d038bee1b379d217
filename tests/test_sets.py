"""Every set of the field from what people have on disk: real label files where they are, documented formats elsewhere.

The pictures are links to one tiny file under the real names: nothing here decodes one.
"""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import openpyxl
import pandas as pd
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from smart_iqa.config import make_config
from smart_iqa.data import load_set
from smart_iqa.sets import FACTS, LIVE_PARTS, DataError, facts_table, reader_of, set_info

DATA = Path(os.environ.get("SMART_IQA_DATA") or Path(__file__).parents[2] / "shared" / "data").expanduser() / "scores"


def real(name):
    """A real label file, or a skip that says which one is missing."""
    if not (DATA / name).is_file():
        pytest.skip(f"no scores/{name} below $SMART_IQA_DATA")
    return DATA / name


def fill(root, names):
    """One tiny picture under many names."""
    root.mkdir(parents=True, exist_ok=True)
    if not (one := root / ".one").exists():
        Image.new("RGB", (8, 6), "gray").save(one, "PNG")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(one, root / name)
    return root


def load(name, root, split="none", **values):
    return load_set(
        make_config(
            "lite",
            dataset=name,
            root=str(root),
            split=split,
            cache=str(root / ".cache"),
            group_duplicates=False,
            **values,
        )
    ).table


def raw(name, root, split="official"):
    return reader_of(name)(root, make_config("lite", dataset=name, root=str(root), split=split))


def told(name, root, *words, split="none", **values):
    """The message of the DataError holds all words."""
    with pytest.raises(DataError) as e:
        load(name, root, split, **values)
    assert all(w in str(e.value) for w in words), (words, str(e.value))
    return str(e.value)


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


def check(table, name, images=None, best=None, worst=None, std=None):
    """Counts, scale and direction of a loaded set."""
    facts = FACTS[name]
    assert len(table) == (images or facts.images) and table.score.between(0, 100).all()
    lo, hi = facts.scale
    np.testing.assert_allclose(table.score, 100 * (table.mos - lo) / (hi - lo), atol=1e-9)
    if best:
        assert Path(table.image[table.score.idxmax()]).name == best
    if worst:
        assert Path(table.image[table.score.idxmin()]).name == worst
    assert table["std"].isna().all() if std is None else np.allclose(table["std"], std)


def by_scene(table_of):
    """Random splits keep each reference on one side."""
    table = table_of("random")
    assert table.groupby("ref").split.nunique().max() == 1 and table.split.nunique() == 3
    assert abs((table.split == "test").mean() - 0.2) < 0.05


# --- facts

def test_facts():
    """The counts are those of the makers; each set says where it comes from, what is allowed and how its labels run."""
    assert {n: f.images for n, f in FACTS.items() if f.images} == {
        "koniq-10k": 10073,
        "spaq": 11125,
        "kadid-10k": 10125,
        "agiqa-3k": 2982,
        "live": 779,
        "livec": 1162,
        "csiq": 866,
        "tid2013": 3000,
        "bid": 586,
        "biq2021": 12000,
        "iqt": 371,
        "flive": 39810,
        "uhd-iqa": 6073,
        "piq23": 5116,
        "ava": 255530,
    }
    assert {n: f.scale for n, f in FACTS.items() if n != "csv"} == {
        "koniq-10k": (0, 100),
        "spaq": (0, 100),
        "kadid-10k": (1, 5),
        "agiqa-3k": (0, 5),
        "live": (112, -3),
        "livec": (0, 100),
        "csiq": (1, 0),
        "tid2013": (0, 9),
        "bid": (0, 5),
        "biq2021": (0, 1),
        "iqt": (1, 5),
        "flive": (0, 100),
        "uhd-iqa": (0, 1),
        "piq23": (-8, 6),
        "ava": (1, 10),
        "demo": (0, 100),
    }
    table = facts_table()
    assert list(table.index) == list(FACTS) == list(dict.fromkeys(FACTS))
    lower = table.label.str.contains("lower")
    assert ((table.worst > table.best) == lower).all() and set(table.index[lower]) == {"live", "csiq"}
    assert (table[["kind", "terms", "get", "source"]].drop(["csv", "demo"]) != "").all().all()
    assert "dst_imgs_all" in set_info("csiq") and "866" in set_info("csiq")
    with pytest.raises(ValueError, match="kadid-10k"):
        set_info("kadid10k")


# --- AGIQA-3K

@pytest.fixture(scope="module")
def agiqa(tmp_path_factory):
    root = tmp_path_factory.mktemp("agiqa")
    shutil.copy(real("agiqa3k_data.csv"), root / "data.csv")
    return fill(root, pd.read_csv(root / "data.csv").name)


def test_agiqa(agiqa):
    labels = pd.read_csv(agiqa / "data.csv")
    table = load("agiqa-3k", agiqa)
    check(
        table,
        "agiqa-3k",
        best=labels.name[labels.mos_quality.idxmax()],
        worst=labels.name[labels.mos_quality.idxmin()],
        std=labels.std_quality * 20,
    )
    prompts = (
        labels.set_index("name").prompt[table.image].to_numpy()
    )  # scenes are the prompts, though they are read off the names
    assert table.groupby(prompts).ref.nunique().max() == 1 and table.ref.nunique() == labels.prompt.nunique() == 300
    by_scene(lambda split: load("agiqa-3k", agiqa, split))


@pytest.mark.parametrize("folder", ["images", "AGIQA-3K", "deep/er"])
def test_agiqa_elsewhere(tmp_path, folder):
    names = [f"{g}_normal_{i:03d}.jpg" for g in ("sd1.5", "DALLE2") for i in range(3)]
    pd.DataFrame(dict(name=names, mos_quality=[0, 1, 2, 3, 4, 5])).to_csv(tmp_path / "data.csv", index=False)
    table = load("agiqa-3k", fill(tmp_path, [f"{folder}/{n}" for n in names]))
    assert (
        list(table.image) == [f"{folder}/{n}" for n in names]
        and list(table.ref) == ["000", "001", "002"] * 2
        and table["std"].isna().all()
    )


# --- LIVE

@pytest.fixture(scope="module")
def live(tmp_path_factory):
    root = tmp_path_factory.mktemp("live")
    for name in ("dmos_realigned.mat", "refnames_all.mat"):
        shutil.copy(real(name), root / name)
    return fill(root, [f"{p}/img{i}.bmp" for p, n in LIVE_PARTS.items() for i in range(1, n + 1)])


# pictures whose reference other code lists (IQA-PyTorch's table)
KNOWN = """jp2k/img4 dancers jp2k/img10 woman jp2k/img99 womanhat jp2k/img227 statue
jpeg/img1 womanhat jpeg/img120 house jpeg/img233 parrots
wn/img1 monarch wn/img9 cemetry wn/img10 plane wn/img17 monarch""".split()


def test_live(live):
    mat = loadmat(live / "dmos_realigned.mat")
    dmos, std = mat["dmos_new"].ravel(), mat["dmos_std"].ravel()
    table = load("live", live)
    kept = dmos != 0  # 203 copies of references
    check(table, "live", std=std[kept] * 100 / 115)
    np.testing.assert_allclose(table.mos, dmos[kept])
    assert ((table.mos < 0) | (table.mos > 100)).sum() == 24 and (
        np.argsort(table.score) == np.argsort(-table.mos)
    ).all()
    assert dict(table.image.str.split("/").str[0].value_counts()) == {
        "jp2k": 169,
        "jpeg": 175,
        "wn": 145,
        "gblur": 145,
        "fastfading": 145,
    }
    assert not {"jp2k/img1.bmp", "wn/img146.bmp", "wn/img174.bmp"} & set(table.image)
    ref = table.set_index("image").ref
    assert (
        ref.nunique() == 29
        and (ref.groupby([ref, ref.index.str.split("/").str[0]]).size().unstack()[["wn", "gblur", "fastfading"]] == 5)
        .all()
        .all()
    )
    assert [ref[f"{f}.bmp"] for f in KNOWN[::2]] == [f"{r}.bmp" for r in KNOWN[1::2]]
    by_scene(lambda split: load("live", live, split))


def copy_live(live, root, **changes):
    """LIVE with changed variables of its two MATLAB files, linked pictures."""
    root.mkdir(exist_ok=True)
    for part in LIVE_PARTS:
        shutil.copytree(live / part, root / part, copy_function=os.link)
    dmos = {k: v for k, v in loadmat(live / "dmos_realigned.mat").items() if k[0] != "_"} | {
        k: v for k, v in changes.items() if k != "refnames_all"
    }
    savemat(root / "dmos_realigned.mat", dmos)
    refs = changes.get("refnames_all", loadmat(live / "refnames_all.mat")["refnames_all"])
    savemat(root / "refnames_all.mat", dict(refnames_all=refs))
    return root


def test_live_as_released(live, tmp_path):
    """982 names and flags, in the order of the files: the same table."""
    want = load("live", live)
    ref = want.set_index("image").ref
    files = [f"{p}/img{i}.bmp" for p, n in LIVE_PARTS.items() for i in range(1, n + 1)]
    refs = np.array([ref.get(f, "ocean.bmp") for f in files], object)[None]
    orgs = np.array([f not in ref.index for f in files], np.uint8)[None]
    root = copy_live(live, tmp_path / "r", refnames_all=refs, orgs=orgs)
    pd.testing.assert_frame_equal(load("live", root), want)
    (
        (root / "gblur").rename(root / "Blur"),
        (root / "jp2k").rename(root / "JP2K"),
        (root / "dmos_realigned.mat").rename(root / "DMOS_realigned.mat"),
    )
    renamed = load("live", root)
    assert {"Blur/img1.bmp", "JP2K/img2.bmp"} <= set(renamed.image) and (renamed.mos == want.mos).all()


def test_live_edited(live, tmp_path):
    refs = loadmat(live / "refnames_all.mat")["refnames_all"]
    dmos = loadmat(live / "dmos_realigned.mat")["dmos_new"]
    told(
        "live",
        copy_live(live, tmp_path / "a", refnames_all=refs[:-1]),
        "refnames_all.mat: has 778 names",
        "982 files, 779",
        "as it was published",
    )
    told("live", copy_live(live, tmp_path / "b", refnames_all=refs[::-1]), "in no known order", "studentsculpture")
    told("live", copy_live(live, tmp_path / "c", dmos_new=dmos[:, :-5]), "has 977 DMOS", "982")
    told(
        "live",
        copy_live(live, tmp_path / "d", dmos_new=np.where(np.arange(982) == 1, 0, dmos)),
        "204 copies of references",
    )
    root = copy_live(live, tmp_path / "e")
    (root / "wn" / "img7.bmp").unlink()
    told("live", root, "1 images cannot be used", "wn/img7.bmp: no such file", "on_error='skip'")
    assert len(load("live", root, on_error="skip")) == 778
    shutil.rmtree(root / "fastfading")
    told("live", root, "146 images", "fastfading/img1.bmp: no such file")
    (root / "refnames_all.mat").unlink()
    told("live", root, "it has none of refnames_all.mat")
    (root / "dmos_realigned.mat").write_bytes(b"<html>404</html>")
    fill(root, ["refnames_all.mat"])
    told("live", root, "dmos_realigned.mat: cannot be read as a MATLAB file", "Copy it again")


# --- LIVE In the Wild

@pytest.fixture
def livec(tmp_path):
    names = (
        [f"t{i}.bmp" for i in range(1, 8)] + [f"{i}.bmp" for i in range(3, 1162)] + ["1162.JPG", "1163.JPG", "1164.bmp"]
    )
    assert len(names) == 1169
    mos = np.linspace(3, 92, 1169)[None]
    (tmp_path / "Data").mkdir()
    savemat(tmp_path / "Data" / "AllImages_release.mat", dict(AllImages_release=np.array(names, object)[:, None]))
    savemat(tmp_path / "Data" / "AllMOS_release.mat", dict(AllMOS_release=mos))
    savemat(tmp_path / "Data" / "AllStdDev_release.mat", dict(AllStdDev_release=mos / 5))
    return fill(tmp_path, [f"Images/trainingImages/{n}" for n in names[:7]] + [f"Images/{n}" for n in names[7:]])


def test_livec(livec):
    table = load("livec", livec)
    mos = np.linspace(3, 92, 1169)[7:]
    check(table, "livec", best="1164.bmp", worst="3.bmp", std=mos / 5)
    np.testing.assert_allclose(table.mos, mos)
    assert not table.image.str.contains("training").any() and (table.ref == table.image).all()


def test_livec_edited(livec):
    (livec / "Images" / "17.bmp").rename(livec / "Images" / "17 copy.bmp")
    told("livec", livec, "Images/17.bmp: no such file")
    (livec / "Images" / "17 copy.bmp").rename(livec / "Images" / "17.BMP")
    assert "Images/17.BMP" in set(load("livec", livec).image)
    savemat(livec / "Data" / "AllMOS_release.mat", dict(AllMOS_release=np.ones((1, 1162))))
    told("livec", livec, "1169 name", "1162 mos", "one download")
    savemat(livec / "Data" / "AllMOS_release.mat", dict(mos=np.ones((1, 1162))))
    told("livec", livec, "has no variable 'AllMOS_release'; it has mos")
    told("livec", livec / "Images", "one level up", str(livec))
    (livec / "Data" / "AllMOS_release.mat").unlink()
    told("livec", livec, "is not the folder of livec", "Data/AllMOS_release.mat", "form")


# --- CSIQ

@pytest.fixture(scope="module")
def csiq(tmp_path_factory):
    root = tmp_path_factory.mktemp("csiq")
    shutil.copy(real("csiq_label.txt"), root / "csiq_label.txt")
    names = [line.split()[0] for line in (root / "csiq_label.txt").read_text().splitlines()]
    return fill(
        root, [f"dst_imgs_all/{n}" for n in names] + [f"src_imgs/{n}.png" for n in {n.split(".")[0] for n in names}]
    )


def csiq_sheet(path, rows):
    """csiq.DMOS.xlsx as its makers lay it out: titles of the table in D4:I4 of the sheet all_by_image."""
    book = openpyxl.Workbook()
    book.active.title = "notes"
    sheet = book.create_sheet("all_by_image")
    sheet["D2"] = "DMOS by image"
    for k, title in enumerate(["image", "dst_idx", "dst_type", "dst_lev", "dmos_std", "dmos"]):
        sheet.cell(4, 4 + k, title)
    for i, row in enumerate(rows):
        for k, value in enumerate(row):
            sheet.cell(5 + i, 4 + k, value)
    book.save(path)


def test_csiq(csiq):
    labels = dict(line.split() for line in (csiq / "csiq_label.txt").read_text().splitlines())
    table = load("csiq", csiq)
    check(table, "csiq")
    assert dict(zip(table.image.str.removeprefix("dst_imgs_all/"), table.mos, strict=True)) == {
        n: float(v) for n, v in labels.items()
    }
    assert table.score[table.mos == 0].eq(100).all() and table.score[table.mos == 1].eq(0).all()  # DMOS: 0 is the best
    assert table.ref.nunique() == 30 and set(table.ref) == {p.stem.lower() for p in (csiq / "src_imgs").iterdir()}
    by_scene(lambda split: load("csiq", csiq, split))


def test_csiq_by_distortion(csiq, tmp_path):
    """dst_imgs/awgn/, .../blur/ and so on, with folders of other cases: the same labels."""
    shutil.copy(csiq / "csiq_label.txt", tmp_path / "CSIQ_label.txt")
    names = [p.name for p in (csiq / "dst_imgs_all").iterdir()]
    table = load("csiq", fill(tmp_path, [f"Dst_imgs/{n.split('.')[1].lower()}/{n}" for n in names]))
    want = load("csiq", csiq)
    assert list(table.score) == list(want.score) and list(table.ref) == list(want.ref)
    assert table.image[0] == "Dst_imgs/awgn/1600.AWGN.1.png"


def test_csiq_sheet(csiq, tmp_path):
    """The makers' spreadsheet names the distortions otherwise than the files, and has deviations."""
    token = {
        "AWGN": "noise",
        "BLUR": "blur",
        "JPEG": "jpeg",
        "jpeg2000": "jpeg 2000",
        "fnoise": "fnoise",
        "contrast": "contrast",
    }
    rows = []
    for line in (csiq / "csiq_label.txt").read_text().splitlines():
        (image, distortion, level, _), dmos = line.split()[0].split("."), float(line.split()[1])
        rows.append((int(image) if image == "1600" else image, 1, token[distortion], int(level), 0.1, dmos))
    csiq_sheet(tmp_path / "csiq.DMOS.xlsx", rows)
    os.symlink(csiq / "dst_imgs_all", tmp_path / "dst_imgs_all")
    table, want = load("csiq", tmp_path), load("csiq", csiq)
    assert (
        table.image.equals(want.image)
        and np.allclose(table.score, want.score)
        and table.ref.equals(want.ref)
        and np.allclose(table["std"], 10)
    )
    csiq_sheet(tmp_path / "csiq.DMOS.xlsx", [(*r[:2], "snow", *r[3:]) if i == 3 else r for i, r in enumerate(rows)])
    told("csiq", tmp_path, "row 8: 'snow' is no distortion of CSIQ")
    pd.DataFrame(rows).to_excel(tmp_path / "csiq.DMOS.xlsx", sheet_name="all_by_image")
    told("csiq", tmp_path, "no row with the titles image, dst_type", "csiq_label.txt")
    pd.DataFrame(rows).to_excel(tmp_path / "csiq.DMOS.xlsx")
    told("csiq", tmp_path, "sheet 'all_by_image' cannot be read")


def test_csiq_edited(csiq, tmp_path):
    shutil.copy(csiq / "csiq_label.txt", tmp_path)
    os.symlink(csiq / "dst_imgs_all", tmp_path / "dst_imgs_all")
    label = tmp_path / "csiq_label.txt"
    edit(label, "0.206245", "good")
    told("csiq", tmp_path, "dst_imgs_all/1600.AWGN.2.png: row 2: label 'good' is not a number", "on_error='skip'")
    edit(label, "good", "")
    told("csiq", tmp_path, "csiq_label.txt: line 2: '1600.AWGN.2.png' is not 'name mos'")
    edit(label, "1600.AWGN.2.png", "noisy.png 0.2")
    told("csiq", tmp_path, "row 2", "'noisy.png' does not tell its reference")
    edit(label, "noisy.png 0.2", "1600.AWGN.2.png 20.6")
    told("csiq", tmp_path, "label 20.6 is outside the declared 0 to 1")


# --- TID2013

def tid_names(case):
    return [f"{case}{r:02d}_{d:02d}_{k}.bmp" for r in range(1, 26) for d in range(1, 25) for k in range(1, 6)]


def test_tid2013(tmp_path):
    """3,000 labels in one case, files in the other; the two of one reference share it whatever the case."""
    names, rng = tid_names("I"), np.random.default_rng(0)
    mos = rng.uniform(0.25, 7.2, 3000).round(5)
    (tmp_path / "mos_with_names.txt").write_text("".join(f"{m:.5f} {n}\r\n" for m, n in zip(mos, names, strict=True)))
    (tmp_path / "reference_images").mkdir()
    fill(
        tmp_path,
        [f"distorted_images/{n}" for n in tid_names("i")] + [f"reference_images/I{r:02d}.BMP" for r in range(1, 26)],
    )
    table = load("tid2013", tmp_path)
    check(table, "tid2013", best=names[mos.argmax()].lower(), worst=names[mos.argmin()].lower())
    np.testing.assert_allclose(table.mos, mos)
    assert (
        table.image[0] == "distorted_images/i01_01_1.bmp"
        and (table.groupby("ref").size() == 120).all()
        and table.ref.nunique() == 25
    )
    by_scene(lambda split: load("tid2013", tmp_path, split))
    told("tid2013", tmp_path / "distorted_images", "one level up", repr(str(tmp_path)))


# --- KADID-10k

KADID = [f"I{r:02d}_{d:02d}_{k:02d}.png" for r in range(1, 82) for d in range(1, 26) for k in range(1, 6)]


@pytest.fixture(scope="module")
def kadid(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("kadid"), np.random.default_rng(0)
    mos = np.where(np.arange(10125) == 0, 4.93, rng.uniform(1, 4.9, 10125)).round(2)
    pd.DataFrame(dict(dist_img=KADID, ref_img=[f"{n[:3]}.png" for n in KADID], dmos=mos, var=0.5)).to_csv(
        root / "dmos.csv", index=False
    )
    return fill(root, [f"images/{n}" for n in KADID] + [f"images/I{r:02d}.png" for r in range(1, 82)])


def test_kadid(kadid):
    table = load("kadid-10k", kadid)
    check(table, "kadid-10k", best="I01_01_01.png", std=12.5)  # dmos is a MOS, var is a deviation
    assert (table.groupby("ref").size() == 125).all() and table.ref.nunique() == 81
    by_scene(lambda split: load("kadid-10k", kadid, split))


def test_kadid_variants(tmp_path):
    """Another folder, no var and no ref_img: the reference is in the name."""
    (tmp_path / "DMOS.csv").write_text("dist_img,dmos\nI01_01_01.png,1\nI01_02_01.png,5\nI02_01_01.png,3\n")
    table = load(
        "kadid-10k",
        fill(tmp_path, [f"distorted_images/{n}" for n in ("I01_01_01.png", "i01_02_01.PNG", "I02_01_01.png")]),
    )
    assert (
        list(table.score) == [0, 100, 50]
        and list(table.ref) == ["i01", "i01", "i02"]
        and table.image[1] == "distorted_images/i01_02_01.PNG"
    )


def test_kadid_edited(tmp_path):
    head = "dist_img,ref_img,dmos,var\n"
    fill(tmp_path, [f"images/I01_01_0{k}.png" for k in range(1, 6)])
    label = tmp_path / "dmos.csv"
    rows = [f"I01_01_0{k}.png,I01.png,{k},0.5\n" for k in range(1, 6)]
    for text, words in (
        (
            head.replace("dmos", "score") + "".join(rows),
            ("dmos.csv: has no column 'dmos'; it has dist_img", "dataset='csv'"),
        ),
        (head + "".join(rows).replace(",0.5", ",?", 1), ("row 1: std '?' is not a number",)),
        (head + "".join(rows) + "I01_01_06.png,I01.png,3,0.5\n", ("1 images", "images/I01_01_06.png: no such file")),
        (head + "".join(rows) + rows[0], ("row 6: named twice",)),
        (head + "".join(rows).replace("png,5,", "png,6,"), ("label 6 is outside the declared 1 to 5",)),
        (head, ("has no rows",)),
        ("", ("cannot be read as .csv",)),
    ):
        label.write_text(text)
        told("kadid-10k", tmp_path, *words)


# --- SPAQ

def spaq_sheet(path, names, mos):
    pd.DataFrame({"Image name": names, "MOS": mos, "Brightness": 50, "Unnamed: 9": ""}).to_excel(path, index=False)


SPAQ = [f"{i:05d}.jpg" for i in range(1, 201)]


@pytest.mark.parametrize(
    "label, folder",
    [
        ("Annotations/MOS and Image attribute scores.xlsx", "TestImage"),
        ("MOS and Image attribute scores.xlsx", "TestImage"),
        ("annotations/MOS and image attribute scores.xlsx", "Dataset/TestImage"),
        ("MOS and Image attribute scores.xlsx", "."),
    ],
)
def test_spaq(tmp_path, label, folder):
    mos = np.linspace(4.2, 91.5, 200).round(2)
    (tmp_path / label).parent.mkdir(exist_ok=True)
    spaq_sheet(tmp_path / label, SPAQ, mos)
    table = load("spaq", fill(tmp_path, [f"{folder}/{n}" for n in SPAQ]))
    check(table, "spaq", images=200, best="00200.jpg", worst="00001.jpg")
    assert table.image[0] == ("00001.jpg" if folder == "." else f"{folder}/00001.jpg") and np.allclose(table.score, mos)


def test_spaq_as_csv(tmp_path):
    """A spreadsheet turned into CSV: names keep their zeros."""
    (tmp_path / "Annotations").mkdir()
    pd.DataFrame({"Image name": ["007", "NA"], "MOS": [10, 20]}).to_csv(
        tmp_path / "Annotations" / "MOS_and_Image_attribute_scores.csv", index=False
    )
    assert list(load("spaq", fill(tmp_path, ["TestImage/007", "TestImage/NA"])).image) == [
        "TestImage/007",
        "TestImage/NA",
    ]


def test_labels_without_pictures(tmp_path):
    (tmp_path / "Annotations").mkdir()
    spaq_sheet(tmp_path / "Annotations" / "MOS and Image attribute scores.xlsx", SPAQ, 50)
    told("spaq", tmp_path, "has the labels, but none of the 200 pictures", "00001.jpg", "TestImage", "Copy them there")
    shutil.copy(tmp_path / "Annotations" / "MOS and Image attribute scores.xlsx", tmp_path)
    fill(tmp_path, ["TestImage/00001.jpg"])
    told("spaq", tmp_path / "Annotations", "The folder above has TestImage/", repr(str(tmp_path)))
    told("spaq", tmp_path, "199 images cannot be used", "TestImage/00002.jpg: no such file", "... and 189 more")


# --- the paper's lists

LISTS = {"spaq": ("spaq", SPAQ[:40], (0, 100)), "kadid-10k": ("kadid", KADID[:40], (1, 5)),
         "agiqa-3k": ("agiqa", [f"sd1.5_normal_{i:03d}.jpg" for i in range(40)], (0, 5))}


def paper_list(path, short, names, scores, prefix="{}_test/"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps([dict(image=prefix.format(short) + n, score=s) for n, s in zip(names, scores, strict=True)])
    )


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("place", ["beside", "subfolder", "usual folder", "root"])
def test_paper_list(tmp_path, name, place):
    """A folder with a list and pictures: all of it is the test split, on the set's scale."""
    short, names, (worst, best) = LISTS[name]
    scores = np.linspace(worst + 0.1 * (best - worst), best, 40)
    home = {
        "beside": f"{short}-test",
        "subfolder": f"{short}-test/pictures",
        "usual folder": FACTS[name].folders[-1],
        "root": ".",
    }[place]
    paper_list(
        tmp_path / (f"{short}_test.json" if place == "root" else f"{short}-test/{short}_test.json"),
        short,
        names,
        scores,
    )
    fill(tmp_path, [f"{home}/{n}" for n in names])
    table = raw(name, tmp_path)
    assert set(table.split) == {"test"} and list(table.image) == [n if home == "." else f"{home}/{n}" for n in names]
    table = load(name, tmp_path)
    np.testing.assert_allclose(table.score, np.linspace(10, 100, 40))
    assert table.ref.nunique() == {"spaq": 40, "kadid-10k": 1, "agiqa-3k": 40}[name]


@pytest.mark.parametrize("name", LISTS)
def test_paper_list_on_another_scale(tmp_path, name):
    """0-1, or as published: recognised, never stretched; one wild label stays an error."""
    short, names, (worst, best) = LISTS[name]
    part = np.linspace(0.2, 0.8, 40)
    fill(tmp_path, names)
    for scores in (part, worst + part * (best - worst)):
        paper_list(tmp_path / f"{short}_test.json", short, names, scores, prefix="")
        np.testing.assert_allclose(load(name, tmp_path).score, 100 * part)
    wild = [*(worst + part[:-1] * (best - worst)), best * 1.4]
    paper_list(tmp_path / f"{short}_test.json", short, names, wild)
    told(name, tmp_path, f"row 40: label {best * 1.4:g} is outside the declared {worst} to {best}")


def test_paper_list_inside_the_full_set(kadid, tmp_path):
    """With split='paper' the list counts; otherwise the whole set does."""
    root = tmp_path / "k"
    root.mkdir()
    for entry in kadid.iterdir():
        if not entry.name.startswith("."):
            os.symlink(entry, root / entry.name)
    told(
        "kadid-10k",
        root,
        "split='paper' needs the paper's list of kadid-10k, kadid_test.json or kadid-test/kadid_test.json",
        "split='none'",
        split="paper",
    )
    own = pd.read_csv(root / "dmos.csv").set_index("dist_img").dmos
    picked = KADID[3::50]
    paper_list(root / "kadid-test" / "kadid_test.json", "kadid", picked, [float(v) for v in own[picked]])
    table = raw("kadid-10k", root, "paper")
    assert len(table) == len(picked) and set(table.split) == {"test"} and table.image[0] == f"images/{picked[0]}"
    assert len(load("kadid-10k", root)) == 10125
    whole = load("kadid-10k", root).set_index("image")
    assert list(table.ref) == list(whole.ref[table.image])


def test_paper_split_loads(tmp_path):
    """split='paper' of a set whose list is all test goes through load_set: there is nothing to train on, and that is no
    error."""
    short, names, _ = LISTS["spaq"]
    spaq_sheet(tmp_path / "MOS and Image attribute scores.xlsx", SPAQ, 50)
    paper_list(tmp_path / "spaq-test" / "spaq_test.json", short, names, np.linspace(10, 90, 40))
    table = load("spaq", fill(tmp_path, [f"TestImage/{n}" for n in SPAQ]), split="paper")
    assert len(table) == 40 and set(table.split) == {"test"} and np.allclose(table.score, np.linspace(10, 90, 40))


def test_paper_list_edited(tmp_path):
    short, names, _ = LISTS["agiqa-3k"]
    path = tmp_path / "agiqa_test.json"
    fill(tmp_path, names)
    for content, words in (
        ([{"picture": n, "score": 1} for n in names], ("has no column 'image'; it has picture, score",)),
        ([{"image": n, "stars": 1} for n in names], ("has no column 'score'",)),
        ([], ("has no rows",)),
        ([{"image": "a.jpg", "score": 1}], ("'a.jpg' does not tell its reference",)),
    ):
        path.write_text(json.dumps(content))
        told("agiqa-3k", tmp_path, "agiqa_test.json", *words)
    path.write_text("[{]")
    told("agiqa-3k", tmp_path, "agiqa_test.json: cannot be read as .json")
    path.write_text(
        json.dumps({"files": [dict(image=n, score=2.5) for n in names]})
    )  # a list in an object that holds nothing else
    assert load("agiqa-3k", tmp_path).score.eq(50).all()


# --- BID

def bid_sheet(path, rows, titles=("Image Number", "Average Subjective Grade")):
    book = openpyxl.Workbook()
    for row in ([titles] if titles else []) + rows:
        book.active.append(list(row))
    book.save(path)


def test_bid(tmp_path):
    """586 numbers, not all of 1 ... 590, and notes below the table."""
    numbers = [n for n in range(1, 591) if n not in (17, 90, 301, 588)]
    grades = np.linspace(0.1, 4.8, 586).round(3)
    bid_sheet(
        tmp_path / "DatabaseGrades.xlsx",
        [(n, float(g)) for n, g in zip(numbers, grades, strict=True)] + [("", ""), ("mean", 2.4)],
    )
    fill(tmp_path, [f"DatabaseImage{n:04d}.JPG" for n in numbers])
    table = load("bid", tmp_path)
    check(table, "bid", best="DatabaseImage0590.JPG", worst="DatabaseImage0001.JPG")
    np.testing.assert_allclose(table.mos, grades)


def test_bid_variants(tmp_path):
    rows = [(1, 2.5), (12, 5)]
    bid_sheet(tmp_path / "databasegrades.xlsx", rows, titles=None)
    table = load("bid", fill(tmp_path, ["ImageDatabase/DatabaseImage0001.jpg", "ImageDatabase/DatabaseImage0012.jpg"]))
    assert list(table.image) == ["ImageDatabase/DatabaseImage0001.jpg", "ImageDatabase/DatabaseImage0012.jpg"] and list(
        table.score
    ) == [50, 100]
    bid_sheet(tmp_path / "databasegrades.xlsx", [(1, 2.5), ("twelve", 5)])
    told("bid", tmp_path, "row 3: 'twelve' is not the number of a picture")
    bid_sheet(tmp_path / "databasegrades.xlsx", [("a.jpg", 2.5)])
    told("bid", tmp_path, "no numbers of pictures")
    bid_sheet(tmp_path / "databasegrades.xlsx", [(1, 2.5), (12, "")])
    told("bid", tmp_path, "DatabaseImage0012.JPG: row 2: label '' is not a number")


# --- KonIQ-10k and BIQ2021: their other layouts; test_biq2021.py has the real files

def test_koniq_layouts(tmp_path):
    """The scores unpacked into their own folder, the JSON lists with MOS 1-100, and two sizes side by side."""
    names = [f"{i}.jpg" for i in range(40)]
    inner = tmp_path / "a" / "koniq10k_scores_and_distributions"
    inner.mkdir(parents=True)
    pd.DataFrame(dict(image_name=names, MOS=3, SD=0.5, MOS_zscore=np.linspace(0, 100, 40))).to_csv(
        inner / "koniq10k_scores_and_distributions.csv", index=False
    )
    a = load("koniq-10k", fill(tmp_path / "a", [f"koniq10k_512x384/512x384/{n}" for n in names]))
    assert (
        np.allclose(a.score, np.linspace(0, 100, 40))
        and np.allclose(a["std"], 12.5)
        and a.image[0] == "koniq10k_512x384/512x384/0.jpg"
    )
    assert "votes" not in a
    scores = pd.read_csv(inner / "koniq10k_scores_and_distributions.csv")
    scores.assign(c_total=range(100, 140)).to_csv(inner / "koniq10k_scores_and_distributions.csv", index=False)
    assert list(load("koniq-10k", tmp_path / "a").votes) == list(
        range(100, 140)
    )  # how many people there were, where the file tells
    b = fill(tmp_path / "b", [f"{d}/{n}" for d in ("512x384", "1024x768") for n in names])
    for part, k in (("train", slice(0, 30)), ("test", slice(30, 40))):
        paper_list(b / f"koniq_{part}.json", "koniq", names[k], np.linspace(10, 90, 40)[k])
    table = load("koniq-10k", b, "official", val_fraction=0.2)
    np.testing.assert_allclose(table.score, (np.linspace(10, 90, 40) - 1) / 99 * 100)  # they hold MOS 1-100
    assert set(table.image.str.split("/").str[0]) == {"1024x768"} and dict(table.split.value_counts()) == {
        "train": 24,
        "test": 10,
        "val": 6,
    }
    (b / "1024x768" / "3.jpg").unlink()
    told("koniq-10k", b, "1 images", "1024x768/3.jpg: no such file")  # not filled up from the other size
    (b / "koniq_test.json").unlink()
    told("koniq-10k", b, "it has none of koniq_test.json")


def test_biq2021_half(tmp_path):
    (tmp_path / "train (Images and MOS).csv").write_text("Image Name,MOS,,\nss01 (1).jpg,0.5,,\nss01 (2).jpg,0.25,,\n")
    fill(tmp_path, ["images/ss01 (1).jpg", "images/ss01 (2).jpg"])
    told("biq2021", tmp_path, "it has none of Test (Images and MOS).csv")
    (tmp_path / "Test (Images and MOS).csv").write_text("Image Name,MOS\nss02 (1).jpg,1\n")
    told("biq2021", tmp_path, "1 images", "images/ss02 (1).jpg: no such file")
    assert list(load("biq2021", tmp_path, on_error="skip").score) == [50, 25]


@pytest.mark.parametrize("folder", ["test_1/", ""])
def test_iqt(tmp_path, folder):
    """The repository, or its folder test_1: names without .png, votes 1-5; the name tells the source."""
    names = ["Dancers.avi_1frame_crf_03_height_0864", "Dancers.avi_1frame_crf_30_height_0144",
             "A_3840x2160.mkv_1frame_crf_00_height_2160"]
    fill(tmp_path, [f"{folder}images/{n}.png" for n in names])
    rows = "".join(f"{n},{mos},0.7,{std}\n" for n, mos, std in zip(names, (4, 1, 5), (1, 0.5, 0)))
    (tmp_path / f"{folder}mos_ci.csv").write_text(f"image_name,mos,ci,std\n{rows}")
    table = load("iqt", tmp_path).set_index("image").loc[[f"{folder}images/{n}.png" for n in names]]
    assert list(table.score) == [75, 0, 100]
    assert list(table["std"]) == [25, 12.5, 0]
    assert list(table.ref) == ["dancers.avi", "dancers.avi", "a_3840x2160.mkv"]
    (tmp_path / f"{folder}images/{names[1]}.png").unlink()
    told("iqt", tmp_path, "1 images", f"{names[1]}.png: no such file")


# --- FLIVE, UHD-IQA, PIQ23, AVA

def test_flive(tmp_path):
    """As its authors hand it on: subfolders in the names, and two files for the official split."""
    names = ["voc_emotic_ava/AVA__149.jpg", "voc_emotic_ava/EMOTIC__a.jpg", "blur_dataset/motion0044.jpg"]
    fill(tmp_path, [f"database/{n}" for n in names])
    (tmp_path / "labels_image.csv").write_text("name,mos\n" + "".join(f"{n},{m}\n" for n, m in zip(names, (60, 0, 75))))
    table = load("flive", tmp_path)
    assert list(table.image) == [f"database/{n}" for n in names]
    assert list(table.score) == [60, 0, 75]
    told("flive", tmp_path, "official split", "labels640.csv", "split='random'", split="official")
    (tmp_path / "labels640.csv").write_text(f"mos_patch_1,name_image\n70,{names[1]}\n")
    told("flive", tmp_path, "labels=640_padded.csv", split="official")
    rows = f"{names[0]},False\n{names[2]},True\n"
    (tmp_path / "labels=640_padded.csv").write_text(f"name_image,is_valid\n{rows}")
    assert list(raw("flive", tmp_path).split) == ["train", "test", "val"]
    (tmp_path / "labels640.csv").rename(tmp_path / "labels>640.csv")  # its other name
    assert list(raw("flive", tmp_path).split) == ["train", "test", "val"]


@pytest.mark.parametrize("places", [("training", "validation", "test"), ("images",) * 3, (".",) * 3])
def test_uhd(tmp_path, places):
    """In three folders, in one, or in the folder itself."""
    files = [f"{place}/{i}.jpg" for i, place in enumerate(places)]
    fill(tmp_path, files)
    rows = "".join(f"{i}.jpg,0.{i + 1},{s},\n" for i, s in enumerate(("training", "validation", "test")))
    path = tmp_path / "uhd-iqa-metadata.csv"
    path.write_text(f"image_name,quality_mos,set,subset\n{rows}")
    table = load("uhd-iqa", tmp_path)
    assert [(tmp_path / image).is_file() for image in table.image] == [True] * 3
    np.testing.assert_allclose(table.score, [10, 20, 30])
    assert list(raw("uhd-iqa", tmp_path).split) == ["train", "val", "test"]
    edit(path, "validation", "valid")
    told("uhd-iqa", tmp_path, "row 2", "'valid'", "training, validation, test")


def test_piq23(tmp_path):
    """Scenes stay together, fifteen are the official test, and names in other letters tell their scene too."""
    scenes = ["Indoor_Scene_0", "Indoor_Scene_1", "Night_Scene_31", "Lowlight_Scene_14"]
    names = [f"{i}_{scene}.{'JPG' if i else 'tiff'}" for i, scene in enumerate(scenes)]
    fill(tmp_path, [f"Overall/{n}" for n in names])
    fill(tmp_path, [f"Details/{n}" for n in names])  # other crops under the same names
    rows = "".join(f"Overall\\{n},{j},0.7,{n},{s}\n" for n, j, s in zip(names, (-8, -1, 6, 0), scenes))
    (tmp_path / "Scores_Overall.csv").write_text(f"IMAGE PATH,JOD,JOD STD,IMAGE,SCENE\n{rows}")
    table = raw("piq23", tmp_path)
    assert list(table.image) == [f"Overall/{n}" for n in names]
    assert list(table.split) == ["train", "test", "test", "train"]
    assert list(table.ref) == [s.lower() for s in scenes]
    np.testing.assert_allclose(table["std"], 5)
    np.testing.assert_allclose(load("piq23", tmp_path).score, [0, 50, 100, 800 / 14])


def test_ava(tmp_path):
    """The label is the mean vote; a line that is no row of votes is named."""
    fill(tmp_path, ["images/953619.jpg", "images/953958.jpg"])
    path = tmp_path / "AVA.txt"
    path.write_text("1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396\n2 953958 10 7 15 26 26 21 10 8 1 2 1 21 1396\n")
    table = load("ava", tmp_path)
    np.testing.assert_allclose(table.mos, [699 / 124, 592 / 126])
    votes = np.repeat(np.arange(1, 11), [0, 1, 5, 17, 38, 36, 15, 6, 5, 1])
    np.testing.assert_allclose(table["std"].iloc[0], votes.std() * 100 / 9)
    told("ava", tmp_path, "generic_test.jpgl", "split='random'", split="official")
    (tmp_path / "aesthetics_image_lists").mkdir()
    (tmp_path / "aesthetics_image_lists" / "generic_test.jpgl").write_text("953958\n")
    assert list(raw("ava", tmp_path).split) == ["train", "test"]
    for bad in ("3 1 0 0 0 0 0 0 0 0 0 0 1 1 1", "3 1 0 0 0 1 0 0", "3 x 0 1 5 17 38 36 15 6 5 1 1 22 1396"):
        old = path.read_text()
        path.write_text(f"{old}\n{bad}\n")
        told("ava", tmp_path, "line 4", "ten counts of votes")
        path.write_text(old)


# --- a set of one's own

@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "xlsx"])
def test_own_labels(tmp_path, kind):
    """Every kind of label file gives the same table, and names that look like numbers or like nothing stay names."""
    frame = pd.DataFrame(
        dict(image=["007", "NA", "1e5"], mos=[1.0, 3.0, 5.0], std=[0.4, 0.8, 0.2], ref=["x", "x", "y"])
    )
    path = tmp_path / f"labels.{kind}"
    {
        "csv": lambda: frame.to_csv(path, index=False),
        "tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        "parquet": lambda: frame.to_parquet(path),
        "json": lambda: frame.to_json(path, orient="records"),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "xlsx": lambda: frame.to_excel(path, index=False),
    }[kind]()
    table = load("csv", fill(tmp_path, ["007", "NA", "1e5"]), labels=path.name, score_range="1,5")
    assert (
        list(table.image) == ["007", "NA", "1e5"]
        and list(table.score) == [0, 50, 100]
        and np.allclose(table["std"], [10, 20, 5])
    )
    assert list(table.ref) == ["x", "x", "y"] and list(
        load("csv", tmp_path, labels=path.name, score_range="5,1").score
    ) == [100, 50, 0]


# --- wrong folders

PICTURED = sorted(set(FACTS) - {"csv", "demo"})


@pytest.mark.parametrize("name", PICTURED)
def test_wrong_folder(tmp_path, name):
    """Says what was looked for, then what else the folder is, where the right one is, or how to get the set."""
    fill(tmp_path / "photos", ["a.jpg"])
    told(name, tmp_path / "photos", f"photos: is not the folder of {name}", FACTS[name].files[0], FACTS[name].get)
    other = "bid" if name != "bid" else "tid2013"
    fill(tmp_path / "other", [FACTS[other].files[0]])
    told(name, tmp_path / "other", f"the labels of {other}", f"dataset={other!r}")
    fill(tmp_path / "twice", [f"inner/{FACTS[name].files[0]}", "inner/deeper/a.jpg"])
    told(name, tmp_path / "twice", "one level down", repr(str(tmp_path / "twice" / "inner")))
    told(name, tmp_path / "twice" / "inner" / "deeper", "one level up", repr(str(tmp_path / "twice" / "inner")))

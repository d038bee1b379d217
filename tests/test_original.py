"""Published calls, checkpoints and folders: the snippets of the two READMEs run as printed."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture

import smart_iqa.data
from smart_iqa.data import DataLoader, index_names
from smart_iqa.model import SmartIQA, load_checkpoint, native_name

# -- the loader ------------------------------------------------------------------------------------
README = """
from smart_iqa.data import DataLoader
from torch.utils.data import DataLoader as TorchDataLoader

# Define your custom dataset
dataset = DataLoader(
    dataset='koniq-10k',
    path='path/to/dataset',
    img_indx=list(range(num_images)),
    patch_size=224,
    patch_num=1,
    batch_size=8,
    istrain=True
)

dataloader = dataset.get_data()
"""


@pytest.fixture(scope="module")
def koniq(tmp_path_factory):
    """The README's folder, of ten rendered pictures; labels in another order than the names."""
    root = tmp_path_factory.mktemp("work") / "path" / "to" / "dataset"
    (root / "1024x768").mkdir(parents=True)
    names = [f"{k}.jpg" for k in (9, 2, 10, 31, 4, 55, 6, 70, 8, 1)]
    for i, n in enumerate(names):
        picture(i, 160, 120).save(root / "1024x768" / n)
    pd.DataFrame(dict(image_name=names, MOS=3.0, SD=0.5, MOS_zscore=np.arange(10) * 10.0)).to_csv(
        root / "koniq10k_scores_and_distributions.csv", index=False
    )
    return root


@pytest.fixture(autouse=True)
def _cache(koniq, monkeypatch):
    monkeypatch.setenv("SMART_IQA_CACHE", str(koniq.parent / "cache"))


def scores_by_name(koniq) -> list:
    t = pd.read_csv(koniq / "koniq10k_scores_and_distributions.csv").sort_values("image_name")  # as text: 1, 10, 2, ...
    return t.MOS_zscore.tolist()


def test_readme_example_as_printed(koniq, monkeypatch):
    """Section Custom Dataset of the README, word for word."""
    monkeypatch.chdir(koniq.parents[2])
    here = dict(num_images=10)
    exec(README, here)
    batches = list(here["dataloader"])
    assert len(here["dataloader"]) == 2 and [tuple(x.shape) for x, _ in batches] == [(8, 3, 224, 224), (2, 3, 224, 224)]
    assert all(x.dtype == s.dtype == torch.float32 and x.is_contiguous() for x, s in batches)
    assert sorted(torch.cat([s for _, s in batches]).tolist()) == [10.0 * k for k in range(10)]
    assert (
        abs(float(torch.cat([x for x, _ in batches]).mean())) < 1 and float(batches[0][0].min()) < -0.5
    )  # normalised, not bytes


def test_numbers_are_pictures_by_name(koniq):
    """img_indx counts sorted file names, not rows of the label file, and keeps its order and repetitions."""
    test = DataLoader("koniq-10k", koniq, [3, 0, 3], 64, 1, 1, istrain=False).get_data()
    wanted = scores_by_name(koniq)
    assert [float(s) for _, s in test] == [wanted[3], wanted[0], wanted[3]]
    assert index_names(DataLoader("koniq-10k", koniq, [], 64, 1).images) == [
        f"1024x768/{n}.jpg" for n in sorted(map(str, (9, 2, 10, 31, 4, 55, 6, 70, 8, 1)))
    ]


def test_test_crops_are_the_grid(koniq):
    """Without training the crops are the fixed grid, the same every time and at any batch size."""
    one, again, other = (
        torch.cat([x for x, _ in DataLoader("koniq-10k", koniq, [0, 1], 224, 6, b, istrain=False, seed=s).get_data()])
        for b, s in ((1, 0), (1, 0), (5, 1))
    )
    assert torch.equal(one, again) and torch.equal(one, other) and one.shape == (12, 3, 224, 224)
    assert len({x.numpy().tobytes() for x in one[:6]}) == 6  # not six times the same crop, as in the published test


def test_training_crops_are_random_and_repeatable(koniq):
    """Other crops every time one goes through, the same for equal seeds, some mirrored; patch_num of each picture."""

    def passes(seed):
        data = DataLoader("koniq-10k", koniq, range(4), 224, 3, 5, istrain=True, seed=seed).get_data()
        return [[torch.cat(v) for v in zip(*data)] for _ in range(2)], len(data)

    (first, second), n = passes(1)
    (same, _), _ = passes(1)
    assert n == 3 and first[0].shape[0] == 12 and sorted(first[1].tolist()) == sorted(3 * scores_by_name(koniq)[:4])
    assert torch.equal(first[0], same[0]) and torch.equal(first[1], same[1])
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], passes(2)[0][0][0])


def test_training_crops_are_flipped(tmp_path):
    """Half of them are mirrored: with pictures as large as the crop nothing else is left to chance."""
    for k in range(2):
        picture(k, 64, 64).save(tmp_path / f"{k}.png")
    pd.DataFrame(dict(image=["0.png", "1.png"], score=[1.0, 2.0])).to_csv(tmp_path / "labels.csv", index=False)
    given = dict(labels="labels.csv", score_range="0,100", size=64)
    plain = next(iter(DataLoader("csv", tmp_path, [0], 64, 1, istrain=False, **given).get_data()))[0][0]
    crops = next(iter(DataLoader("csv", tmp_path, [0], 64, 40, 40, istrain=True, **given).get_data()))[0]
    mirrored = sum(torch.equal(c, plain.flip(-1)) for c in crops)
    assert 8 < mirrored < 32 and mirrored + sum(torch.equal(c, plain) for c in crops) == 40


@pytest.mark.parametrize("wrong", [10, -1, 999])
def test_index_out_of_range(koniq, wrong):
    """A number that stands for nothing is an error that says how many there are."""
    with pytest.raises(IndexError, match=rf"{wrong} is out of range.*10 pictures, numbered 0 to 9"):
        DataLoader("koniq-10k", koniq, [0, wrong], 224, 1)


def test_numbers_are_references_where_there_are(tmp_path):
    """With references, numbers count sorted references, so that a split by number never divides a scene."""
    rows = [
        dict(image=f"{d}{r}.png", ref=f"ref{r}", score=10.0 * k + r) for k, d in enumerate("xyz") for r in (3, 1, 2)
    ]
    for i, r in enumerate(rows):
        picture(i, 80, 64).save(tmp_path / r["image"])
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    given = dict(labels="labels.csv", score_range="0,100", size=64)
    test = DataLoader("csv", tmp_path, [2], 64, 2, 4, istrain=False, **given)
    assert test.names == ["ref1", "ref2", "ref3"] and sorted(s for _, b in test.get_data() for s in b.tolist()) == [
        3.0,
        3.0,
        13.0,
        13.0,
        23.0,
        23.0,
    ]
    train = DataLoader("csv", tmp_path, [0, 1], 64, 1, 4, **given)
    assert not {s for _, b in train.get_data() for s in b.tolist()} & {3.0, 13.0, 23.0} and len(train.get_data()) == 2
    with pytest.raises(IndexError, match="3 references, numbered 0 to 2"):
        DataLoader("csv", tmp_path, [3], 64, 1, **given)


def test_a_wrong_folder_is_a_data_error(tmp_path):
    """As everywhere: the message names the set and the folder."""
    with pytest.raises(ValueError, match="koniq-10k"):
        DataLoader("koniq-10k", tmp_path, [0], 224, 1)
    with pytest.raises(AttributeError, match="Loader2"):
        getattr(smart_iqa.data, "Loader2")  # noqa: B009


# -- models and checkpoints ------------------------------------------------------------------------
USAGE = """
from smart_iqa import SmartIQA
import torch

# Load model
model = SmartIQA(model_size='base', use_attention=True)
checkpoint = torch.load('checkpoints/best_model.pth')
model.load_state_dict(checkpoint['model_state_dict'])
model.eval()

# Predict quality
with torch.no_grad():
    quality_score = model(image_tensor)  # Range: 0-100
"""
ATTENTION = """
from smart_iqa import SmartIQA

model = SmartIQA(model_size='base', use_attention=True)
model.eval()

with torch.no_grad():
    quality_score = model(image)
    attention_weights = model.last_attention_weights  # [a1, a2, a3, a4]
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Random weights of a tiny model under the published names, in the three wrappings."""
    folder, keys = (
        tmp_path_factory.mktemp("published"),
        Path(__file__).parent / "reference" / "checkpoint_keys" / "tiny-attention.txt",
    )
    (folder / "checkpoints").mkdir()
    torch.manual_seed(3)
    own = SmartIQA("tiny").eval()
    theirs = {native_name(k): k for k in (line.split()[0] for line in keys.read_text().splitlines() if line.strip())}
    state = {theirs.get(k, k): v for k, v in own.state_dict().items()}
    assert sum(k.startswith("swin.") for k in state) > 100
    for name, content in (
        ("best_model.pth", dict(model_state_dict=state)),
        ("best_model.pkl", dict(model_hyper=state)),
        ("bare.pkl", state),
    ):
        torch.save(content, folder / "checkpoints" / name)
    return folder, own


def test_usage_as_printed(published, monkeypatch):
    """README, Pretrained Models: Usage; with tiny for base, to save memory."""
    folder, own = published
    monkeypatch.chdir(folder)
    x = torch.randn(2, 3, 224, 224)
    here = dict(image_tensor=x)
    exec(USAGE.replace("'base'", "'tiny'"), here)
    with torch.no_grad():
        assert torch.equal(here["quality_score"], own(x)) and here["quality_score"].shape == (2,)


def test_attention_extraction_as_printed():
    """README, Attention Weight Extraction."""
    here = dict(image=torch.randn(1, 3, 224, 224), torch=torch)
    exec(ATTENTION.replace("'base'", "'tiny'"), here)
    assert here["attention_weights"].shape == (1, 4) and torch.allclose(
        here["attention_weights"].sum(), torch.tensor(1.0), atol=1e-5
    )


@pytest.mark.parametrize("name", ["best_model.pth", "best_model.pkl", "bare.pkl"])
def test_every_wrapping_is_one_call(published, name):
    """Project summary, Model Inference: eight numbers and some switches become one call that reads the file."""
    folder, own = published
    model, x = load_checkpoint(folder / "checkpoints" / name), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert model(x)[0].item() == pytest.approx(own(x)[0].item(), abs=1e-5)
    assert model.arguments["model_size"] == "tiny" and model.use_attention and not model.training

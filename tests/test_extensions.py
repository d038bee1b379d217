"""A head, a loss and a set in somebody else's package: by module:Name, by entry point, and the errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import prepare, small_config

from smart_iqa.config import make_config, run_id
from smart_iqa.data import load_set
from smart_iqa.heads import HEADS, Head, find_head
from smart_iqa.losses import get_loss
from smart_iqa.model import CheckpointError, SmartIQA, load_checkpoint, save_checkpoint
from smart_iqa.sets import find_set

ROOT = Path(__file__).resolve().parent.parent
MODULE = '''
import torch
from torch import nn

from smart_iqa.heads import Head
from smart_iqa.sets import SetFacts

NUMBER = 3


class Wide(Head):
    needs = ((2, 2), (4, 1))
    options = dict(width=4)

    def __init__(self, channels, use_multiscale=True, use_attention=True, dropout=0.0, width=4):
        super().__init__(channels)
        self.layers = nn.Sequential(nn.Linear(4 * channels[1] + channels[3], width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, pooled):
        return self.layers(torch.cat([m.flatten(1) for m in pooled], 1)).flatten()

    @property
    def last_bias(self):
        return self.layers[2].bias


def cubic(pred, score):
    return (pred - score).abs().pow(3).mean()


def with_std(pred, score, std=None):
    return pred.mean() * 0 + (1.0 if std is None else std.sum())


ROADS = SetFacts(scale=(0, 100), images=41, source="a test", files=("labels.csv",), get="made by a test",
                 columns=(("name", "image"), ("mos", "score")))
BROKEN = SetFacts(scale=(0, 1), images=None, source="a test", read=lambda root, cfg: 1 / 0)
'''
POINTS = """
[smart_iqa.heads]
wide = quality_extras.parts:Wide
gone = quality_extras.parts:Gone
[smart_iqa.losses]
cubic = quality_extras.parts:cubic
[smart_iqa.sets]
roads = quality_extras.parts:ROADS
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package, as a wheel leaves it: a folder of modules and one of metadata with entry points."""
    site = tmp_path / "site"
    (site / "quality_extras").mkdir(parents=True)
    (site / "quality_extras" / "__init__.py").write_text("")
    (site / "quality_extras" / "parts.py").write_text(MODULE)
    info = site / "quality_extras-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quality-extras\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(site))
    yield site
    for name in [n for n in sys.modules if n.split(".")[0] == "quality_extras"]:
        del sys.modules[name]


def train_briefly(cfg):
    """A step of a model made from a configuration, and the model."""
    _, feed, model = prepare(cfg)
    x, rows = next(iter(feed.train_batches(0)))
    loss = get_loss(cfg.loss)
    before = model.head.last_bias.item()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    loss(model(x), torch.as_tensor(feed.table.score.to_numpy()[rows.numpy()]).float()).backward()
    optimizer.step()
    assert model.head.last_bias.item() != before
    return model


@pytest.mark.parametrize("prefix", ["quality_extras.parts:", ""], ids=["module:Name", "entry point"])
def test_all_three_in_one_run(package, standin, prefix):
    """A configuration names head, loss and set; the set is read, the model trained, saved and found again."""
    names = dict(head="Wide", loss="cubic", dataset="ROADS")
    names = {k: prefix + v if prefix else v.lower() for k, v in names.items()}
    cfg = small_config(standin, **names, labels=None, score_range=None, split="random", val_fraction=0.2)
    assert len(load_set(cfg).table) == 41
    model = train_briefly(cfg)
    assert type(model.head).__name__ == "Wide"
    save_checkpoint(model, package / "model.safetensors")
    again = load_checkpoint(package / "model.safetensors")
    assert again.arguments == model.arguments
    assert (again.arguments["head"], again.arguments["width"]) == (names["head"], 4)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize("head, loss, dataset", [
    ("quality_extras.parts:Wide", "l1+2*quality_extras.parts:cubic", "quality_extras.parts:ROADS"),
    ("wide", "l1+2*cubic", "roads")], ids=["module:Name", "entry point"])
def test_in_another_process(package, standin, head, loss, dataset):
    """As an installed package works: nothing is imported or registered before the names are used."""
    code = f"""
from smart_iqa.config import make_config
from smart_iqa.data import load_set
from smart_iqa.losses import get_loss
from smart_iqa.training import make_model
cfg = make_config("lite", head={head!r}, loss={loss!r}, dataset={dataset!r}, root={str(standin)!r}, split="random",
                  backbone="test_efficientnet", pretrained="none", group_duplicates=False, device="cpu")
print(type(make_model(cfg).head).__name__, len(load_set(cfg).table), callable(get_loss(cfg.loss)))
"""
    path = os.pathsep.join([str(package), str(ROOT)])
    env = os.environ | dict(PYTHONPATH=path, SMART_IQA_CACHE=str(package / "cache"))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["Wide", "41", "True"], done.stderr


def test_losses(package):
    """In a sum, with the opinions' spread where the function takes it."""
    pred, score, std = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0]), torch.tensor([4.0, 5.0])
    assert get_loss("2*quality_extras.parts:cubic + l1")(pred, score) == 2 * 4.5 + 1.5
    assert get_loss("quality_extras.parts:with_std")(pred, score, std) == 9
    assert get_loss("quality_extras.parts:with_std", legacy=True)(pred, score) == 1


def test_options_of_a_head(package):
    """They reach the class, are stored, and a wrong one is named."""
    model = SmartIQA(backbone="test_efficientnet", head="wide", width=7)
    assert model.head.layers[0].out_features == model.arguments["width"] == 7
    with pytest.raises(ValueError, match="option of head 'wide' 'depth'"):
        SmartIQA(backbone="test_efficientnet", head="wide", depth=2)


def test_a_reader_of_its_own(package, tmp_path):
    """`read` of the facts is what reads the set."""
    with pytest.raises(ZeroDivisionError):
        load_set(make_config("lite", dataset="quality_extras.parts:BROKEN", root=str(tmp_path)))


def test_run_folders_have_no_colon(package):
    """A module's name stays out of the run's name; the hash has it."""
    ids = {run_id(make_config("lite", dataset=f"quality_extras.{m}:ROADS"), "data") for m in ("parts", "other")}
    assert len(ids) == 2
    assert all(i.startswith("ROADS-lite-s0-") for i in ids)


@pytest.mark.parametrize("find, name, words", [
    (find_head, "hypr", "unknown head 'hypr'; did you mean hyper.*known: hyper, plain, projected, wide, gone, or pack"),
    (find_head, "nowhere.parts:Wide", "head 'nowhere.parts:Wide': there is no module 'nowhere'; install"),
    (find_head, "quality_extras.party:Wide", "no module 'quality_extras.party'"),
    (find_head, "quality_extras.parts:Wild", "module 'quality_extras.parts' has no 'Wild'; did you mean Wide"),
    (find_head, "quality_extras.parts:cubic", "is <function cubic.*no class that extends"),
    (find_head, "gone", "head 'gone' .an entry point.: module 'quality_extras.parts' has no 'Gone'"),
    (find_set, "quality_extras.parts:Wide", "dataset 'quality_extras.parts:Wide': is .*no SetFacts"),
    (find_set, "road", "unknown dataset 'road'; did you mean roads"),
    (get_loss, "quality_extras.parts:NUMBER", "is 3, no function"),
    (get_loss, "l1+cubik", "unknown loss 'cubik'; did you mean cubic")])
def test_what_is_wrong_with_a_name(package, find, name, words):
    with pytest.raises(ValueError, match=words):
        find(name)


def test_a_module_that_fails(package):
    """Its own error is told, not hidden behind 'not found'."""
    (package / "quality_extras" / "torn.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="importing 'quality_extras.torn' failed: ZeroDivisionError"):
        find_head("quality_extras.torn:Wide")


class Row(Head):
    """A head that exists in this process alone."""

    needs = ((4, 1),)

    def __init__(self, channels, **switches):
        super().__init__(channels)
        self.layer = torch.nn.Linear(channels[3], 1)

    def forward(self, pooled):
        return self.layer(pooled[0].flatten(1)).flatten()


def test_a_checkpoint_whose_head_is_not_here(tmp_path, monkeypatch):
    """The file is found and whole; what lacks is the class, and the message says its name."""
    with monkeypatch.context() as patch:
        patch.setitem(HEADS, "row", Row)
        save_checkpoint(SmartIQA(backbone="test_efficientnet", head="row"), tmp_path / "row.safetensors")
        assert type(load_checkpoint(tmp_path / "row.safetensors").head) is Row
    with pytest.raises(CheckpointError, match="row.safetensors: unknown head 'row'.*Install the package"):
        load_checkpoint(tmp_path / "row.safetensors")


def test_heads_compute_in_fp32(monkeypatch):
    """Under autocast to bf16 too, whoever wrote them."""
    monkeypatch.setitem(HEADS, "row", Row)
    model = SmartIQA(backbone="test_efficientnet", head="row").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 3, 64, 64)).dtype == torch.float32


def test_names_in_files_lack_the_prefix(monkeypatch):
    """Every tensor of a state dict is `backbone....` or the head's own name, nested in another module too."""
    monkeypatch.setitem(HEADS, "row", Row)
    model = SmartIQA(backbone="test_efficientnet", head="row")
    own = [k for k in model.state_dict() if not k.startswith("backbone.")]
    assert own == ["layer.weight", "layer.bias"]
    outer = torch.nn.ModuleDict(dict(inner=model))
    state = {k: v + 1 if v.is_floating_point() else v for k, v in outer.state_dict().items()}
    assert "inner.layer.weight" in state
    outer.load_state_dict(state)
    assert torch.equal(model.head.layer.bias, state["inner.layer.bias"])
    assert json.dumps(model.arguments)

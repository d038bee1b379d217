"""The architecture as a forward pass shows it: against the published numbers, and in the drawing nothing overlaps and
no line runs through a box."""

import itertools
import json
import re
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import without_kernels
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from smart_iqa.heads import HEADS, Head
from smart_iqa.lab.runs import RunError, execute
from smart_iqa.model import HyperIQA, SmartIQA


def definitions() -> types.ModuleType:
    """What the notebook defines, without what it executes: its cells up to the heading of the models."""
    path = Path(__file__).resolve().parent.parent / "nbs" / "experiments" / "architecture.ipynb"
    cells = nbformat.read(path, 4).cells
    end = next(k for k, c in enumerate(cells) if c.source.startswith("## The models"))
    module = types.ModuleType("architecture")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec("\n".join(c.source for c in cells[:end] if c.cell_type == "code"), vars(module))
    return module


architecture = definitions()
draw_architecture, trace_model, watch = architecture.draw_architecture, architecture.trace_model, architecture.watch
GOLDEN = json.loads((Path(__file__).parent / "reference" / "golden.json").read_text())["models"]
SWIN = dict(tiny=(96, 192, 384, 768), small=(96, 192, 384, 768), base=(128, 256, 512, 1024))
VARIANTS = dict(
    single=dict(use_attention=False, use_multiscale=False),
    concat=dict(use_attention=False),
    attention={},
    plain=dict(head="plain"),
    projected=dict(head="projected"),
    projected_concat=dict(head="projected", use_attention=False),
)
BLOCKS = {"backbone", "lda", "gate", "afa", "hyper", "target"}
TARGET = [(112, 224), (56, 112), (28, 56), (14, 28), (1, 14)]
GENERATED = 224 * 112 + 112 + 112 * 56 + 56 + 56 * 28 + 28 + 28 * 14 + 14 + 14 * 1 + 1


def small(**arguments):
    """A model of some hundred thousand parameters in the backbone: the heads are what is looked at."""
    return SmartIQA(backbone="test_efficientnet", **arguments)


def crop(*side):
    return torch.zeros(1, 3, *(side if len(side) == 2 else side * 2))


def words(fig):
    return [t.get_text() for t in fig.axes[0].texts]


# -- what is read -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "size, variant",
    [("tiny", "single"), ("tiny", "concat"), ("tiny", "attention"), ("small", "attention"), ("base", "attention")],
)
def test_golden(size, variant):
    """Parameters are the published ones; stages, distortion vector, content, stem, writers and target network
    have the published shapes."""
    t, c = trace_model(SmartIQA(size, **VARIANTS[variant])), SWIN[size]
    assert t.parameters() == GOLDEN[f"{size}-{variant}"]["parameters"]
    assert [t[f"stage {k}"].shape for k in (1, 2, 3, 4)] == [(n, s, s) for n, s in zip(c, (56, 28, 14, 7))]
    assert [t[f"reduced {k}"].shape for k in (1, 2, 3)] == [(16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert [t[f"v{k}"].shape for k in (1, 2, 3, 4)] == [(16,), (16,), (16,), (176,)] and t["v"].shape == (224,)
    assert [t[f"stem {k}"].shape for k in (1, 2, 3)] == [(512, 7, 7), (256, 7, 7), (112, 7, 7)] and t["mean"].shape == (
        112,
    )
    assert [t[f"W{k}"].shape for k in range(1, 6)] == [(512, 7, 7), (128, 7, 7), (32, 7, 7), (8, 7, 7), (14,)]
    assert [t[f"b{k}"].shape for k in range(1, 6)] == [(112,), (56,), (28,), (14,), (1,)]
    assert [t[f"layer {k}"].shape for k in range(1, 6)] == TARGET and t.generated == GENERATED == 33_545
    assert all(
        np.prod(t[f"W{k}"].shape) + np.prod(t[f"b{k}"].shape) == t[f"layer {k}"].generated for k in range(1, 6)
    )  # what writes a layer writes all of it
    if variant == "single":
        assert "concatenated" not in t and "content 3" not in t and t["content 4"].shape == (c[3], 7, 7)
    else:
        assert t["concatenated"].shape == (sum(c), 7, 7)
    assert ("gate" in t) == (variant == "attention")


def test_hyperiqa():
    t = trace_model(HyperIQA())
    assert (
        t.parameters() == GOLDEN["hyperiqa"]["parameters"]
        and t.generated == 33_545
        and t.title == "HyperIQA"
        and t.backbone == "resnet50"
    )
    assert [t[f"stem {k}"].shape[0] for k in (1, 2, 3)] == [1024, 512, 112] and t["v4"].parameters == 2048 * 176 + 176


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_add_up(variant):
    """Every parameter is in one block; the switches change what they say and nothing else."""
    model = small(**VARIANTS[variant])
    t, whole = trace_model(model, crop(64)), trace_model(small(), crop(64))
    assert t.parameters() == sum(p.numel() for p in model.parameters()) == t.table().parameters.sum()
    modules = dict(backbone="backbone", lda="lda", gate="gate", afa="project")
    own = {
        b: sum(p.numel() for n, p in model.named_parameters() if n.removeprefix("head.").split(".")[0] == m)
        for b, m in modules.items()
    }
    assert own == {b: t.parameters(b) for b in own}
    same = {
        "single": BLOCKS - {"gate", "hyper"},
        "concat": BLOCKS - {"gate"},
        "attention": BLOCKS,
        "plain": BLOCKS - {"hyper", "target"},
    }
    assert {b for b in BLOCKS if t.parameters(b) == whole.parameters(b)} == same.get(variant, {"backbone"})


def test_generated_is_what_differs():
    """Read from the memory of the tensors, and checked by values: a generated number differs between two crops, a
    learned one does not."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for arguments, want in (
        ({}, GENERATED),
        (dict(head="plain"), 112),
        (dict(head="projected"), 128 * 8 + 128 + 128 + 1),
    ):
        torch.manual_seed(0)
        model = small(**arguments).eval()
        with watch(model) as seen, torch.no_grad():
            model(x)
        differ = sum(int((t[0] != t[1]).sum()) for layer in seen["hyper"][1] for t in layer)
        assert trace_model(model, x).generated == want and want * 0.95 <= differ <= want
        assert trace_model(model, x).parts == trace_model(model, x[:1]).parts  # of one crop, whatever the batch


@pytest.mark.parametrize("side", [(96, 96), (64, 128), (320, 320)])
def test_other_crops(side):
    """Stages follow the crop; what comes after the pools does not."""
    t, usual = trace_model(small(), crop(*side)), trace_model(small(), crop(224))
    assert t["crop"].shape == (3, *side) and [t[f"stage {k}"].shape[1:] for k in (1, 2, 3, 4)] == [
        (side[0] // s, side[1] // s) for s in (4, 8, 16, 32)
    ]
    assert [p for p in t.parts if p.block not in ("backbone",)] == [
        p for p in usual.parts if p.block not in ("backbone",)
    ]


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_other_pyramids(backbone):
    model = SmartIQA(backbone=backbone)
    t = trace_model(model, crop(64))
    assert [t[f"stage {k}"].shape[0] for k in (1, 2, 3, 4)] == model.backbone.channels and t["concatenated"].shape == (
        sum(model.backbone.channels),
        7,
        7,
    )
    assert (
        t.backbone == backbone
        and t.title == "SMART-IQA"
        and t.generated == 33_545
        and f"backbone {backbone}" in words(draw_architecture(t))[1]
    )


def test_model_is_left_as_it_was():
    model = small().train()
    model.head.gate.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace_model(model, crop(64))
    assert (
        model.training
        and model.head.lda.training
        and not model.head.gate.training
        and model.last_attention_weights is None
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not any(
        m._forward_hooks for m in model.modules()
    )


def test_a_layer_that_no_part_knows(monkeypatch):
    """Neither a stranger nor a failing forward pass leaves hooks behind."""
    model = small()
    model.head.hyper.more = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="a layer is in no part"):
        trace_model(model, crop(64))
    with pytest.raises(RuntimeError):
        trace_model(model.train(), torch.zeros(1, 5, 64, 64))
    assert model.training and not any(m._forward_hooks for m in model.modules())


class Votes(Head):
    """A head with parameters in layers, in itself and in a layer that never runs."""

    needs = ((1, 2), (3, 1), (4, 1), (4, 7))

    def __init__(self, channels, **switches):
        super().__init__(channels)
        self.layers = nn.ModuleList(
            nn.Linear(c, 1) for c in (4 * channels[0], channels[2], channels[3], 49 * channels[3])
        )
        self.level = nn.Parameter(torch.zeros(1))
        self.idle = nn.Linear(2, 3)

    def forward(self, pooled):
        return self.level + sum(layer(p.flatten(1)) for layer, p in zip(self.layers, pooled)).flatten()


@pytest.fixture
def votes(monkeypatch):
    monkeypatch.setitem(HEADS, "votes", Votes)
    return SmartIQA(backbone="resnet18", head="votes")


def test_a_head_of_somebody_else(votes):
    """Its needs, then its layers in the order in which they ran; every parameter is counted."""
    t = trace_model(votes, crop(64))
    channels = votes.backbone.channels
    assert [p.shape for p in t.of("head") if p.name.startswith("needs")] == [
        (channels[0], 2, 2),
        (channels[2], 1, 1),
        (channels[3], 1, 1),
        (channels[3], 7, 7),
    ]
    assert [p.name for p in t.of("head") if p.parameters] == [f"layers.{k}" for k in range(4)] + ["itself", "idle"]
    assert t.parameters() == sum(p.numel() for p in votes.parameters())
    assert t.title == "SMART-IQA, votes head" and t.generated == 0


# -- what is drawn ----------------------------------------------------------------------------------------------------
def drawing(monkeypatch, trace):
    """The figure with the boxes and lines that it was made of."""
    boxes, lines, box, line = [], [], architecture._Sheet.box, architecture._Sheet.line

    def keep_box(self, *args, **kw):
        boxes.append((box(self, *args, **kw), args[4]))
        return boxes[-1][0]

    monkeypatch.setattr(architecture._Sheet, "box", keep_box)
    monkeypatch.setattr(
        architecture._Sheet,
        "line",
        lambda self, *points, **kw: (lines.append((points, kw)), line(self, *points, **kw))[1],
    )
    return draw_architecture(trace), boxes, lines


def apart(a, b, slack=0.0):
    """Whether two rectangles (x0, y0, x1, y1) do not overlap by more than the slack."""
    return min(a[2], b[2]) - max(a[0], b[0]) <= slack or min(a[3], b[3]) - max(a[1], b[1]) <= slack


def model_of(name):
    if name == "votes":
        return SmartIQA(backbone="resnet18", head=name)
    return (
        HyperIQA()
        if name == "hyperiqa"
        else SmartIQA("base")
        if name == "base"
        else SmartIQA(backbone="resnet18", **VARIANTS[name])
    )


@pytest.mark.parametrize(
    "name, side", [*((v, s) for v in VARIANTS for s in (224, 1024)), ("hyperiqa", 1024), ("base", 224), ("votes", 224)]
)
def test_layout(monkeypatch, votes, name, side):
    """Boxes apart, texts apart and within their boxes and the sheet, lines beside the boxes and across no other
    line."""
    fig, boxes, lines = drawing(monkeypatch, trace_model(model_of(name), crop(side)))
    width, height = fig.get_size_inches()
    assert width == 7.0 and (4.5 < height < 7.5 or name == "votes") and not plt.get_fignums()
    rectangles = [(b.x, b.y, b.right, b.bottom) for b, _ in boxes]
    assert all(apart(a, b, 1e-6) for k, a in enumerate(rectangles) for b in rectangles[k + 1 :])
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    texts = [t.get_window_extent(canvas.get_renderer()) for t in fig.axes[0].texts]
    inches = [(t.x0 / fig.dpi, height - t.y1 / fig.dpi, t.x1 / fig.dpi, height - t.y0 / fig.dpi) for t in texts]
    said = words(fig)
    assert (
        min(t[0] for t in inches) >= 0
        and max(t[2] for t in inches) <= width
        and min(t[1] for t in inches) >= 0
        and max(t[3] for t in inches) <= height
    )
    for k, a in enumerate(inches):
        assert all(apart(a, b, 0.035) for b in inches[k + 1 :]), said[
            k
        ]  # lines of one box: their extents touch, their letters do not
        own = [r for r in rectangles if r[0] <= (a[0] + a[2]) / 2 <= r[2] and r[1] <= (a[1] + a[3]) / 2 <= r[3]]
        assert not own or (own[0][0] < a[0] and a[2] < own[0][2]), said[k]
        assert own or all(apart(a, r) for r in rectangles), said[k]
    segments = [
        (min(p[0], q[0]), min(p[1], q[1]), max(p[0], q[0]), max(p[1], q[1]))
        for points, _ in lines
        for p, q in zip(points, points[1:])
    ]
    assert all(s[0] == pytest.approx(s[2]) or s[1] == pytest.approx(s[3]) for s in segments)  # right angles
    for s in segments:
        grown = s[0] - 1e-9, s[1] - 1e-9, s[2] + 1e-9, s[3] + 1e-9
        assert all(apart(grown, (r[0] + 0.01, r[1] + 0.01, r[2] - 0.01, r[3] - 0.01)) for r in rectangles), s
        assert all(apart(grown, t) for t, what in zip(inches, said) if what not in "×"), s
    vertical, horizontal = ([s for s in segments if s[k] == pytest.approx(s[k + 2])] for k in (0, 1))
    crossings = [
        (v, h)
        for v in vertical
        for h in horizontal
        if h[0] + 0.01 < v[0] < h[2] - 0.01 and v[1] + 0.01 < h[1] < v[3] - 0.01
    ]
    assert not crossings


def test_dashed_arrows_are_generated_layers(monkeypatch):
    """One for each layer that is written, none where weights are learned; it starts at what writes the layer."""
    for variant, want in (("attention", 5), ("projected", 2), ("plain", 1)):
        with monkeypatch.context() as patch:
            _, boxes, lines = drawing(patch, trace_model(small(**VARIANTS[variant]), crop(64)))
        dashed = [points for points, kw in lines if kw.get("dashed")][:-1]  # the last one is the key's
        assert len(dashed) == want
        for (x, top), (_, bottom) in dashed:
            column = [(b, text[0]) for b, text in boxes if b.cx == pytest.approx(x)]
            above, below = (
                [w for b, w in column if b.bottom == pytest.approx(top)],
                [w for b, w in column if b.y == pytest.approx(bottom)],
            )
            assert [w[1:] for w in above] == [w.removeprefix("layer ") for w in below] != []  # b2 above layer 2


def test_the_figure_follows_the_model():
    """Another width, another head, another crop: other words. And each number of the drawing is one of the trace."""
    torch.manual_seed(0)
    model = small()
    before = words(draw_architecture(trace_model(model, crop(64))))
    assert "linear: 256, ReLU" in before and "3 × 64 × 64" in before and "33,545 generated" in before
    model.head.gate.net[0], model.head.gate.net[3] = nn.Linear(model.head.gate.net[0].in_features, 99), nn.Linear(99, 4)
    model.head.hyper.stem[0], model.head.hyper.stem[2] = (
        nn.Conv2d(model.head.hyper.stem[0].in_channels, 333, 1),
        nn.Conv2d(333, 256, 1),
    )
    trace = trace_model(model, crop(96))
    after = words(draw_architecture(trace))
    gate = sum(p.numel() for p in model.head.gate.parameters())
    assert {"linear: 99, ReLU", "333 × 7 × 7", "3 × 96 × 96", f"{gate:,} par."} <= set(
        after
    ) and "linear: 256, ReLU" not in after
    shapes = [w.split(": ")[-1] for w in after if w.count("×") == 2 and any(c.isdigit() for c in w)]
    assert len(shapes) > 15 and set(shapes) <= set(trace.table()["shape"])

    def numbers(text):
        return {int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", text)}

    sums = {
        sum(own) for own in itertools.product(*[[0, p.parameters] for p in trace.of("lda")])
    }  # a branch is a convolution and a linear layer
    known = (
        numbers(trace.table().to_string())
        | sums
        | {trace.parameters(b) for b in (None, "hyper", "gate")}
        | {trace.generated}
    )
    assert {n for w in after for n in numbers(w)} <= known | set(range(10))  # and the digits of names


# -- the notebook -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = execute(
        "architecture",
        dict(models="lite,tiny,lite-projected", crop=128),
        out=tmp_path_factory.mktemp("architecture"),
        echo=None,
    )
    return folder, json.loads((folder / "record.json").read_text())


@pytest.mark.slow
def test_notebook_writes_a_run(run):
    """Record, tables in three forms and figures in two; a claim where a size is published."""
    folder, record = run
    assert (
        record["run_id"] == folder.name
        and record["method"] == "architecture"
        and record["models"] == ["lite", "tiny", "lite-projected"]
    )
    assert record["inputs"] == {} and record["missing"] == []
    assert [(c["claim"].split()[0], c["published"], c["measured"], c["verdict"]) for c in record["claims"]] == [
        ("tiny", "29,521,479", "29,521,479", "holds")
    ]
    for stem in ("blocks", "shapes", "lite", "lite-projected"):
        assert all((folder / "tables" / f"{stem}.{s}").stat().st_size for s in ("md", "tex", "csv"))
    for stem in ("lite", "lite-projected"):
        assert (folder / "figures" / f"{stem}.pdf").read_bytes()[:4] == b"%PDF" and (
            folder / "figures" / f"{stem}.png"
        ).stat().st_size > 50_000
    blocks = pd.read_csv(folder / "tables" / "blocks.csv").set_index("model")
    assert blocks.parameters["lite"] == sum(
        p.numel() for p in SmartIQA("lite").parameters()
    ) and blocks.generated.tolist() == [33_545, 33_545, 1281]
    assert (
        "3 × 128 × 128" in (folder / "tables" / "lite.md").read_text()
        and (folder / "config.json").exists()
        and (folder / "environment.json").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "models, said", [("base-nothing", "base-nothing: no such model"), (" , ", "no model is named")]
)
def test_wrong_names_are_told(tmp_path, models, said):
    with without_kernels(), pytest.raises(RunError, match=said):
        execute("architecture", dict(models=models), out=tmp_path, echo=None)
    assert not list(tmp_path.glob("*/*/record.json"))

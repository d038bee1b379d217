"""The head of the paper's text, "projected": counted, recomputed by hand, saved and loaded, trained, exported; and
"hyper" left as it was."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture, prepare, small_config
from safetensors import safe_open
from safetensors.torch import save_file

from smart_iqa.app.engines import Scorer
from smart_iqa.app.scoring import Policy, quality_figure
from smart_iqa.config import make_config, run_id
from smart_iqa.frozen import FrozenFeed
from smart_iqa.lab.figures import attention_by_decile, attention_table
from smart_iqa.model import (
    CheckpointError,
    HyperIQA,
    SmartIQA,
    build_model,
    load_checkpoint,
    read_about,
    save_checkpoint,
    write_about,
)
from smart_iqa.training import Solver, make_model, predict


@pytest.fixture(autouse=True)
def _seeded():
    """Whatever ran before, models start the same."""
    torch.manual_seed(0)


KEYS = Path(__file__).parent / "reference" / "checkpoint_keys"


def paper(**arguments) -> SmartIQA:
    torch.manual_seed(0)  # whatever ran before
    return SmartIQA(**dict(backbone="test_efficientnet", head="projected", dropout=0.0) | arguments)


def shaken(model: SmartIQA, seed: int = 1) -> SmartIQA:
    """Every bias and the gate far from where they start: at the start too much is zero or alike for a slip to show."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("backbone."):
                p.add_(0.3 * torch.randn_like(p) * (p.std() if p.dim() > 1 else 1.0))
        if model.head.gate is not None:
            model.head.gate.layers[2].bias.copy_(torch.tensor([-2.0, -0.5, 0.7, 2.5]))
    return model.eval()


def crops(n: int = 3, side: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


# -- what it is --------------------------------------------------------------------------------------------------------
def linear(i, o):
    return i * o + o


def backbone_parameters(size: str) -> int:
    """Counted in the published key lists."""
    lines = [
        line.split("\t")
        for line in (KEYS / f"{size}-single.txt").read_text().splitlines()
        if line.startswith("swin.backbone.")
    ]
    shapes = {
        k: [int(n) for n in re.findall(r"\d+", s)]
        for k, s in lines
        if not k.endswith(("relative_position_index", "attn_mask"))
    }
    return sum(int(np.prod(s)) for s in shapes.values())


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(
    "size, channels, golden", [("tiny", (96, 192, 384, 768), 29_857_503), ("base", (128, 256, 512, 1024), 89_490_461)]
)
def test_parameters(size, channels, golden, gate):
    """By formula from the paper's widths and a rank of 8, to the last one."""
    last, rank = channels[3], 8
    projections = sum(linear(c, 512) for c in channels)
    stem = linear(last, 512) + linear(512, 256) + linear(256, 112)
    first = rank * 4 * 512 * 49 + linear(112, 128 * rank) + linear(112, 128)  # V, A(x), b1(x)
    second = linear(112, 128) + linear(112, 1)
    attention = linear(last, 128) + linear(128, 4)
    want = backbone_parameters(size) + projections + stem + first + second + attention * gate
    assert want == golden - attention * (not gate)
    assert sum(p.numel() for p in SmartIQA(size, head="projected", use_attention=gate).parameters()) == want


@pytest.mark.parametrize("gate, rank, side", [(True, 8, 96), (False, 8, 96), (True, 3, 160)])
def test_forward_by_hand(gate, rank, side):
    """Scores and gate again, picture by picture, in plain torch with the whole 128 x 100,352 matrix, from the state
    dict alone."""
    model = shaken(paper(use_attention=gate, rank=rank))
    w, x = model.state_dict(), crops(side=side)
    with torch.no_grad():
        maps, scores = model.features(x), model(x)
        for k in range(3):
            stages = [torch.nn.functional.adaptive_avg_pool2d(m[k], 7) for m in maps]
            flat = [s.reshape(len(s), 49) for s in stages]
            projected = [
                (w[f"project.convs.{i}.weight"][:, :, 0, 0] @ f + w[f"project.convs.{i}.bias"][:, None]).clamp(min=0)
                for i, f in enumerate(flat)
            ]
            alpha = torch.ones(4)
            if gate:
                h = (w["gate.layers.0.weight"] @ maps[3][k].mean((1, 2)) + w["gate.layers.0.bias"]).clamp(min=0)
                alpha = 1 / (1 + torch.exp(-(w["gate.layers.2.weight"] @ h + w["gate.layers.2.bias"])))
                assert torch.allclose(model.last_attention_weights[k], alpha, atol=1e-5)
            z = torch.cat([a * p.reshape(-1) for a, p in zip(alpha, projected)])
            h = flat[3]
            for i in (0, 2, 4):
                h = (w[f"hyper.stem.{i}.weight"][:, :, 0, 0] @ h + w[f"hyper.stem.{i}.bias"][:, None]).clamp(min=0)
            c = h.mean(1)
            made = {
                n: w[f"hyper.{n}.weight"] @ c + w[f"hyper.{n}.bias"]
                for n in ("factor", "last_weight", "biases.0", "biases.1")
            }
            W1 = made["factor"].reshape(128, rank) @ w["hyper.basis.weight"]
            assert z.shape == (100_352,) and W1.shape == (128, 100_352)
            hidden = 1 / (1 + torch.exp(-(W1 @ z + made["biases.0"])))
            want = (made["last_weight"] * hidden).sum() + made["biases.1"][0]
            assert abs(want - scores[k]) < 1e-3 * max(1, abs(want)), (k, want, scores)
    assert scores.std() > 1e-2 and (model.last_attention_weights is None) == (not gate)


def test_gate_is_a_sigmoid():
    """Four weights, each for itself: they need not sum to one, all may open, and each reaches the score."""
    model, x = shaken(paper()), crops()
    with torch.no_grad():
        before = model(x)
        a = model.last_attention_weights
        assert a.shape == (3, 4) and (a > 0).all() and (a < 1).all() and (a.sum(1) - 1).abs().min() > 0.3
        for k in range(4):
            bias = model.head.gate.layers[2].bias
            kept = bias.clone()
            bias[k] += 3.0
            after = model(x)
            moved = (model.last_attention_weights - a).abs().max(0).values
            assert moved[k] > 0.05 and (moved > 1e-6).sum() == 1  # a softmax would move the others too
            assert (after - before).abs().max() > 1e-3
            bias.copy_(kept)
        model.head.gate.layers[2].bias.fill_(50)
        model(x)
        assert torch.allclose(model.last_attention_weights, torch.ones(3, 4))


@pytest.mark.parametrize("arguments", [{}, dict(use_attention=False), dict(backbone=None, model_size="lite")], ids=str)
def test_fresh_model_is_healthy(arguments):
    """Scores near the start, not all alike; a gradient for every parameter; the bias moves them by what it is told."""
    torch.manual_seed(0)
    model, x = paper(**arguments).train(), crops(4)
    before = model.eval()(x).detach()
    model.shift_scores(55.0)
    scores = model(x)
    assert torch.allclose(scores - before, torch.full((4,), 55.0), atol=1e-3)
    assert scores.isfinite().all() and (scores - 55).abs().max() < 10 and scores.std() > 1e-3
    model.train()(x).square().mean().backward()
    silent = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0
    ]
    assert not silent, silent


@pytest.mark.parametrize("arguments", [{}, dict(backbone="resnet10t"), dict(backbone=None, model_size="tiny")], ids=str)
def test_batch_is_its_parts(arguments):
    model, x = shaken(paper(**arguments)), crops(3, 128)
    with torch.no_grad():
        together = model(x)
        attention = model.last_attention_weights
        alone = torch.cat([model(i[None]) for i in x])
    assert together.std() > 1e-2
    assert torch.allclose(together, alone, atol=1e-3) and torch.allclose(
        model.last_attention_weights, attention[2:], atol=1e-5
    )


def test_dropout_spares_the_score():
    """Behind the hidden layer, never behind the last: a dropped score would be 0."""
    model = paper(dropout=0.9).train()
    model.shift_scores(1000)
    with torch.no_grad():
        scores = torch.stack([model(crops(2)) for _ in range(8)])
    assert scores.min() > 500 and scores.max() < 1500 and scores.std() > 0


# -- saved and loaded --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [{}, dict(use_attention=False), dict(rank=3)], ids=str)
def test_round_trip(arguments, tmp_path):
    """Checkpoint and folder hold the same model to the bit; the header names variant and rank."""
    model, x = shaken(paper(**arguments)), crops()
    save_checkpoint(model, tmp_path / "a.safetensors")
    model.save_pretrained(tmp_path / "folder")
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        header = json.loads(f.metadata()["smart_iqa"])
    assert (header["head"], header["rank"]) == ("projected", arguments.get("rank", 8))
    for again in (load_checkpoint(tmp_path / "a.safetensors"), SmartIQA.from_pretrained(tmp_path / "folder")):
        assert again.arguments == model.arguments and not again.training
        with torch.no_grad():
            assert torch.equal(again(x), model(x))


def test_equal_models_are_equal_files(tmp_path):
    """Whoever compares checksums finds the same model the same, in one process and in another."""
    about = dict(info=dict(name="small", trained_on=["a", "b"]), policy=dict(size=384))
    code = (
        "import sys, torch; from smart_iqa.model import *; torch.manual_seed(0); "
        f"m = SmartIQA(backbone='test_efficientnet'); save_checkpoint(m, sys.argv[1], {about})"
    )
    other = tmp_path / "other.safetensors"
    subprocess.run([sys.executable, "-c", code, other], env=os.environ | dict(PYTHONHASHSEED="7"), check=True)
    torch.manual_seed(0)
    model, path = SmartIQA(backbone="test_efficientnet"), tmp_path / "x.safetensors"
    seen = {other.read_bytes()}
    for _ in range(8):
        save_checkpoint(model, path, about)
        seen.add(path.read_bytes())
        write_about(path, about | dict(more=1))
        write_about(path, about)
        seen.add(path.read_bytes())
    assert len(seen) == 1


def test_about_of_before(tmp_path):
    """Files of before have `about` beside the arguments; it is read, replaced, and then there once."""
    model = SmartIQA(backbone="test_efficientnet")
    tensors, old = {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "old.safetensors"
    said = dict(info=dict(name="old"))
    header = {"smart_iqa": json.dumps(model.arguments), "about": json.dumps(said), "format": "pt"}
    save_file(tensors, old, metadata=header)
    assert read_about(old) == said and load_checkpoint(old).arguments == model.arguments
    write_about(old, dict(a=1))
    with safe_open(old, "pt") as f:
        assert set(f.metadata()) == {"smart_iqa", "format"}
    assert read_about(old) == dict(a=1) and load_checkpoint(old).arguments == model.arguments
    write_about(old, {})
    assert read_about(old) == {}


@pytest.mark.parametrize("gate, rank", [(True, 8), (False, 2)])
def test_bare_state_dict_is_detected(gate, rank, tmp_path):
    """No header: the keys tell variant, gate and rank."""
    model = SmartIQA("tiny", head="projected", use_attention=gate, rank=rank).eval()
    torch.save(model.state_dict(), tmp_path / "bare.pkl")
    again = load_checkpoint(tmp_path / "bare.pkl")
    assert again.arguments == model.arguments | dict(
        drop_path=again.arguments["drop_path"], dropout=again.arguments["dropout"]
    )
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, stored",
    [
        ({}, {}),
        ({}, dict(afa="concat")),
        (dict(head="plain"), dict(afa="concat")),
        (dict(head="projected"), dict(afa="projected", head="hyper", rank=8)),
    ],
    ids=str,
)
def test_headers_of_before(arguments, stored, tmp_path):
    """Headers had a field afa, and older ones had not; both load to the same numbers."""
    model, x = SmartIQA(backbone="test_efficientnet", **arguments).eval(), crops()
    old = model.arguments | stored
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"smart_iqa": json.dumps(old)})
    again = load_checkpoint(tmp_path / "old.safetensors")
    assert again.arguments == model.arguments
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_runs_of_before():
    """A stored configuration with afa is the same run under the same id."""
    ids = {"concat": "biq2021-lite-s0-f62093fdbc", "projected": "biq2021-lite-s0-b2d06a4ded"}
    for afa, known in ids.items():
        stored = asdict(make_config("lite")) | dict(afa=afa)
        assert run_id(make_config(**stored), "data") == known
    assert make_config(**stored) == make_config("lite", head="projected")
    assert run_id(make_config("paper"), "data") == "koniq-10k-base-s42-e57f16698f"
    assert run_id(make_config("demo", head="plain"), "data") == "demo-lite-s0-8bfab0b097"


def test_variants_are_not_mistaken(tmp_path):
    """Weights of one under the header of the other: told, not loaded."""
    a, b = paper(), SmartIQA(backbone="test_efficientnet")
    heads = [{k for k in m.state_dict() if not k.startswith("backbone.")} for m in (a, b)]
    assert heads[0] - heads[1] and heads[1] - heads[0] and not any("gate" in k for k in heads[0] & heads[1])
    save_file(
        {k: v.contiguous() for k, v in a.state_dict().items()},
        tmp_path / "x.safetensors",
        metadata={"smart_iqa": json.dumps(b.arguments)},
    )
    with pytest.raises(CheckpointError, match=r"missing: lda.*extra: .*hyper\.basis"):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (dict(head="paper"), "unknown head 'paper'.*hyper, plain, projected"),
        (dict(use_multiscale=False, use_attention=False), "use_multiscale=False"),
        (dict(use_multiscale=False), "use_multiscale=False"),
        (dict(head="plain", rank=3), "option of head 'plain' 'rank'"),
        (dict(rank=0), "rank=0"),
        (dict(rank=129), "rank=129.*128"),
    ],
    ids=str,
)
def test_what_it_cannot_do(arguments, told):
    with pytest.raises(ValueError, match=told):
        paper(**arguments)


# -- in a run ----------------------------------------------------------------------------------------------------------
def test_configuration_reaches_the_model():
    """Hyper unless asked; the name of the run changes; a wrong word is an error."""
    values = dict(backbone="test_efficientnet", pretrained="none", device="cpu")
    models = {head: make_model(make_config("lite", head=head, **values)) for head in (None, "hyper", "projected")}
    assert [m.arguments["head"] for m in models.values()] == ["hyper", "hyper", "projected"]
    assert make_config("paper").head == "hyper"
    assert build_model("smart", backbone="test_efficientnet").arguments["head"] == "hyper"
    assert not hasattr(HyperIQA().head, "project")
    assert len({run_id(make_config("lite", head=head), "t") for head in (None, "hyper", "projected")}) == 2
    with pytest.raises(ValueError, match="unknown head 'paper'"):
        make_model(make_config("lite", head="paper", **values))
    with pytest.raises(ValueError, match="unknown parameter 'afa'"):
        make_config("lite", afa="paper")


def test_start_from_the_other_variant_is_refused(tmp_path):
    save_checkpoint(paper(), tmp_path / "start.safetensors")
    cfg = make_config(
        "lite",
        backbone="test_efficientnet",
        pretrained="none",
        device="cpu",
        dropout=0.0,
        init=str(tmp_path / "start.safetensors"),
    )
    with pytest.raises(ValueError, match="init=.*projected"):
        make_model(cfg)


@pytest.mark.parametrize("frozen", [False, True])
def test_it_trains(frozen, standin, tmp_path):
    """All of it moves, or with frozen features the heads alone; the loss falls; attention goes into the table and its
    figure."""
    cfg = small_config(standin, head="projected", frozen=frozen, epochs=25 if frozen else 4, lr=3e-3, dropout=0.0)
    _, feed, model = prepare(cfg)
    if frozen:
        feed = FrozenFeed(model, feed.cache, feed.table, cfg, feed.device)
    before = {k: v.clone() for k, v in model.named_parameters()}
    solver = Solver(model, feed, cfg, tmp_path)
    solver.fit()
    assert solver.history[-1]["train_loss"] < 0.8 * solver.history[0]["train_loss"]
    still = {k for k, v in model.named_parameters() if torch.equal(v, before[k])}
    assert still == ({k for k in before if k.startswith("backbone.")} if frozen else set())
    p = predict(model, feed, "test", 4)
    a = p[["a1", "a2", "a3", "a4"]]
    assert a.gt(0).all(axis=None) and a.lt(1).all(axis=None) and (a.sum(axis=1) - 1).abs().min() > 0.1
    t = attention_table(p)
    assert np.isclose(np.average(t.a2, weights=t.n), p.a2.mean()) and t.entropy.between(0, 2 + 1e-6).all()
    attention_by_decile(p).canvas.draw()


def test_frozen_features_serve_both(standin):
    """Both variants read the same pooled maps, so a file of features is one for both, and scores by it are the whole
    model's."""
    cfg = small_config(standin, head="projected")
    _, feed, model = prepare(cfg)
    other = make_model(small_config(standin)).eval()
    other.backbone.load_state_dict(model.backbone.state_dict())
    x = crops(2, 64)
    with torch.no_grad():
        for p, q in zip(model.eval().pool(model.features(x)), other.pool(other.features(x)), strict=True):
            assert torch.equal(p, q)
    frozen = FrozenFeed(model, feed.cache, feed.table, cfg, feed.device)
    assert FrozenFeed(other, feed.cache, feed.table, cfg, feed.device).features.filename == frozen.features.filename
    np.testing.assert_allclose(predict(model, frozen, "test", 4).pred, predict(model, feed, "test", 4).pred, atol=0.1)


# -- used --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scorer():
    model = shaken(paper())
    return Scorer(model, Policy(110, "short", 96, 6), None, dict(name="toy"), device="cpu", amp="off")


def test_scorer_and_figure(scorer):
    """Four weights a picture, in the table and beside the picture."""
    photos = [picture(0, 150, 130), picture(3, 240, 130, 60.0)]
    t = scorer.table(photos)
    assert t[["a1", "a2", "a3", "a4"]].sum(axis=1).sub(1).abs().min() > 0.3 and t.score.std() > 0
    bars = quality_figure(scorer, photos[0]).axes[2].patches
    assert np.allclose(sorted(b.get_width() for b in bars), sorted(pd.Series(t.loc[0, ["a1", "a2", "a3", "a4"]])))


def test_onnx(scorer, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install onnx onnxscript onnxruntime")
    from smart_iqa.app.engines import OnnxScorer
    from smart_iqa.app.export import export_onnx

    found = export_onnx(scorer, tmp_path / "a.onnx")
    assert sorted(set(found.batch)) == [1, 3, 20] and found.attention.max() <= 1e-5
    photos = [picture(0, 150, 130), picture(3, 240, 130, 60.0)]
    want, got = scorer.table(photos), OnnxScorer(tmp_path / "a.onnx").table(photos)
    assert list(got) == list(want) and np.abs(got - want).max(axis=None) < 1e-3

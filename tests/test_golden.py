"""Parity with the published models: scores and attention to 1e-4, parameters exactly, every published key list
loads."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from smart_iqa.model import load_checkpoint

REFERENCE = Path(__file__).parent / "reference"
GOLDEN = json.loads((REFERENCE / "golden.json").read_text())


def published_state(name: str, seed: int) -> dict[str, torch.Tensor]:
    """A state dict with the published keys and shapes, filled by the recipe that made the golden outputs."""
    state = {}
    for line in (REFERENCE / "checkpoint_keys" / f"{name}.txt").read_text().splitlines():
        key, shape = line.split("\t")
        shape = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
        r = np.random.RandomState((zlib.crc32(key.encode()) + seed) & 0xFFFFFFFF).standard_normal(shape)
        r = np.asarray(r, dtype="float32")
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.long)
            continue
        if len(shape) >= 2 and not key.endswith("relative_position_bias_table"):
            r = r / np.sqrt(np.prod(shape[1:]))
        elif key.endswith("running_var"):
            r = 1 + 0.1 * np.abs(r)
        elif len(shape) == 1 and key.endswith("weight"):
            r = 1 + 0.02 * r
        else:
            r = 0.02 * r
        state[key] = torch.from_numpy(np.asarray(r, dtype="float32"))
    return state


@pytest.mark.parametrize("name", sorted(GOLDEN["models"]))
def test_golden(name, tmp_path):
    expected = GOLDEN["models"][name]
    torch.save(published_state(name, GOLDEN["weight_seed"]), tmp_path / "published.pkl")
    model = load_checkpoint(tmp_path / "published.pkl")
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    x = torch.from_numpy(
        np.random.RandomState(GOLDEN["image_seed"]).standard_normal((2, 3, 224, 224)).astype("float32")
    )
    with torch.no_grad():
        pooled = model.pool(model.features(x))
        score = model.head(pooled)
        vector = model.head.lda(pooled[:4])
    np.testing.assert_allclose(score.numpy(), expected["score"], atol=1e-4)
    np.testing.assert_allclose(vector[:, :4].numpy(), expected["target_in_vec_head"], atol=1e-4)
    if expected["attention"]:
        np.testing.assert_allclose(model.last_attention_weights.numpy(), expected["attention"], atol=1e-4)
    else:
        assert model.last_attention_weights is None


@pytest.mark.parametrize("wrapper", ["model_state_dict", "model_hyper"])
def test_wrapped_checkpoints(wrapper, tmp_path):
    """The README's and the project summary's wrappings load to the same model as the bare state dict."""
    state = published_state("tiny-attention", 5)
    torch.save({wrapper: state}, tmp_path / "wrapped.pth")
    torch.save(state, tmp_path / "bare.pkl")
    wrapped, bare = load_checkpoint(tmp_path / "wrapped.pth"), load_checkpoint(tmp_path / "bare.pkl")
    for (k, a), (_, b) in zip(wrapped.state_dict().items(), bare.state_dict().items()):
        assert torch.equal(a, b), k


def test_published_keys_load_into_a_model_by_hand():
    """model.load_state_dict(checkpoint[...]) as in the original README."""
    from smart_iqa import SmartIQA

    model = SmartIQA(model_size="tiny", use_attention=True)
    state = published_state("tiny-attention", 1)
    model.load_state_dict(state)
    assert torch.equal(model.head.gate.net[0].weight, state["multiscale_attention.attention_net.0.weight"])

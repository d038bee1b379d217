"""The model as a metric of pyiqa and of torchmetrics, with the real libraries where they are installed."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from smart_iqa.app.engines import create_scorer
from smart_iqa.demo import photograph


@pytest.fixture(scope="module")
def photos():
    return [photograph(n).resize((480, 360)) for n in ("coffee", "chelsea", "rocket")]


@pytest.fixture(scope="module")
def batch(photos):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in photos])


@pytest.fixture(scope="module")
def expected(photos):
    return create_scorer(device="cpu", engine="torch")(photos)


@pytest.fixture(scope="module")
def metric():
    pyiqa = pytest.importorskip("pyiqa", reason="pyiqa is not installed: pip install pyiqa")
    from smart_iqa.app.plugins import register_pyiqa

    register_pyiqa()
    register_pyiqa()
    return pyiqa.create_metric("smart-lite", device="cpu")


def test_nothing_is_imported_early():
    """The module neither needs nor loads torch, pyiqa or torchmetrics, and other names are errors."""
    code = (
        "import sys, smart_iqa.app.plugins as p\n"
        "assert not {'torch', 'pyiqa', 'torchmetrics'} & set(sys.modules)\n"
        "assert not hasattr(p, 'MeanSquare')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_pyiqa(metric, photos, batch, expected, tmp_path):
    """The scorer's numbers for a batch, one picture and a path; higher is better."""
    together = metric(batch)
    photos[0].save(tmp_path / "a.png")
    assert together.shape == (3,)
    assert np.abs(together.numpy() - expected).max() < 0.05
    assert torch.equal(together, torch.cat([metric(x[None]) for x in batch]))
    assert abs(float(metric(str(tmp_path / "a.png"))) - expected[0]) < 0.05
    assert metric.lower_better is False and metric.metric_mode == "NR"


@pytest.mark.slow
def test_pyiqa_as_a_loss(metric, batch, expected):
    import pyiqa

    assert "smart-lite" in pyiqa.list_models("NR")
    x = batch.clone().requires_grad_()
    loss = pyiqa.create_metric("smart-lite", device="cpu", as_loss=True)(x)
    loss.backward()
    assert abs(float(loss) - expected.mean()) < 2
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.slow
def test_pyiqa_finds_the_entry_point():
    """After any look-up of a network pyiqa knows the metric by itself. Skipped where the package is not installed."""
    pytest.importorskip("pyiqa", reason="pyiqa is not installed: pip install pyiqa")
    from importlib.metadata import entry_points

    if not [e for e in entry_points(group="pyiqa.archs") if e.value.startswith("smart_iqa")]:
        pytest.skip("the installed smart-iqa has no entry point for pyiqa: pip install -e .")
    code = "import pyiqa; pyiqa.create_metric('psnr'); assert 'smart-lite' in pyiqa.list_models()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_torchmetrics(photos, batch, expected):
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install torchmetrics")
    from smart_iqa.app.plugins import MeanScore

    quality = MeanScore(device="cpu")
    quality.update(batch[:2])
    quality.update(photos[2])
    assert isinstance(quality, torchmetrics.Metric)
    assert abs(float(quality.compute()) - expected.mean()) < 0.01
    assert float(pickle.loads(pickle.dumps(quality)).compute()) == float(copy.deepcopy(quality).compute())
    quality.reset()
    assert torch.isnan(quality.compute())
    assert abs(float(torchmetrics.MetricCollection([quality])(batch)["MeanScore"]) - expected.mean()) < 0.01

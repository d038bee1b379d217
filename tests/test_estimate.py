"""What a batch takes: the runs that are counted are those that are started, and the arithmetic is the run's own."""
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_config, without_kernels

from smart_iqa.backbones import forward_flops
from smart_iqa.cli import main
from smart_iqa.config import make_config
from smart_iqa.data import load_set
from smart_iqa.lab.estimate import (
    Machine,
    PlannedRun,
    against,
    batch_runs,
    cost_of,
    describe,
    estimate,
    estimate_text,
    images_key,
    kind_key,
    kind_of,
    measure,
    measure_step,
)
from smart_iqa.lab.runs import execute, is_finished, run_folder
from smart_iqa.lab.studies import pick_studies
from smart_iqa.training import make_model

RECIPE = dict(
    dataset="csv", labels="labels.csv", score_range="0,100", backbone="test_efficientnet", pretrained="none", size=64,
    crop=64, train_crops=1, val_crops=2, test_crops=4, epochs=1, batch_size=8, group_duplicates=False, amp="off",
    device="cpu", leaks="mark", baseline=False,
)
HERE = Machine("here", 1.0, 16, cores=2, described=False)
BASE = dict(batch_size=8, train_crops=4, val_crops=2, test_crops=3, epochs=5)


def timings_of(*configs, **changes):
    """Measurements that nobody made: a step takes 2 s, scoring a crop 0.1 s, cutting it 0.01 s."""
    step = dict(batch=8, seconds=2.0, memory=3e9, base=1e9, scored=0.1, values=100, moments=10, start=7.0,
                parameters=10_000, learnt=1000, bf16=True, measured="now") | changes
    images = dict(decode=0.5, crop=0.01, pixels=1000)
    return dict(machine=dict(device="cpu", affinity=2, threads=1), tflops=dict(bf16=1.0, fp32=0.5),
                images={images_key(c): images for c in configs}, steps={kind_key(c): step for c in configs})


def planned(cfg, key="a", **sizes):
    return PlannedRun(key, "train", cfg, sizes or dict(train=10, val=4, test=6), ("main",))


def test_heads_on_frozen_features():
    """Every crop goes through the backbone once; arms share what they can, and seeds share all but training crops."""
    cfg = make_config("paper", frozen=True, **BASE)
    timings = timings_of(cfg)
    cost = cost_of(planned(cfg), timings, HERE)
    assert np.isclose(cost.seconds["train"], 5 * 5 * 2.0)
    assert np.isclose(cost.seconds["validate"], 5 * 4 * 2 * 2.0 / 8 / 3)
    assert np.isclose(cost.seconds["score"], 10 * 3 * 2.0 / 8 / 3)
    features = sorted(s[1:] for s in cost.shared.values() if s[0] == "frozen features")
    assert np.allclose(features, [(n * 0.11, n * 200) for n in (8, 30, 40)])
    assert cost.disk_working - cost.disk_kept == 2 * 4 * (10_000 + 2 * 1000)  # moments of the heads alone
    arms = [planned(cfg), planned(replace(cfg, loss="l2"), "b"), planned(replace(cfg, seed=1), "c")]
    shared = estimate(arms, timings, HERE).shared
    assert np.isclose(shared.seconds["frozen features"], (8 + 30 + 2 * 40) * 0.11)
    assert np.isclose(shared.seconds["pixel cache"], 20 * 0.5 / 2)
    assert len(cost_of(planned(replace(cfg, baseline=True)), timings, HERE).shared) == len(cost.shared) + 2


def test_steps_averages_and_scoring_alone():
    cfg = make_config("paper", **BASE | dict(epochs=1), ema=0.9)
    timings, sizes = timings_of(cfg, learnt=10_000), dict(train=9, val=2, test=2)
    cost = cost_of(planned(cfg, **sizes), timings, HERE)
    assert np.isclose(cost.seconds["train"], 5 * 2.08)  # 36 crops: four whole batches and a small one
    assert cost.disk_working - cost.disk_kept == 2 * 4 * 4 * 10_000
    shut = cost_of(planned(replace(cfg, open_test=False), **sizes), timings, HERE)
    assert np.isclose(shut.seconds["score"], 2 * 3 * 0.11)
    assert np.isclose(cost.seconds["score"], 4 * 3 * 0.11)
    alone = cost_of(replace(planned(cfg, **sizes), notebook="evaluate"), timings, HERE)
    assert alone.seconds["train"] == 0
    assert np.isclose(alone.seconds["score"], 2 * 3 * 0.11)


def test_a_described_machine_is_as_much_faster_as_its_matrix_products():
    cfg = make_config("paper", **BASE)
    here = cost_of(planned(cfg), timings_of(cfg), HERE)
    there = cost_of(planned(cfg), timings_of(cfg), describe("tflops=100 memory_gb=80 cores=10"))
    assert np.isclose(here.step, 2 + 0.08)
    assert np.isclose(there.step, 2 / 100 + 0.08)
    assert there.memory == here.memory - 1e9  # without what this process owned before the model


def test_what_does_not_fit_is_named_with_what_to_change():
    cfg = make_config("paper", **BASE | dict(batch_size=32))
    timings = timings_of(cfg)  # above 1 GB a quarter of a GB per crop
    result = estimate([planned(cfg)], timings, describe("tflops=100 memory_gb=5 disk_gb=0.001 cores=8"))
    assert "needs 8.0 GB" in result.problems[0]
    assert "batch_size=16 accumulate=2" in result.problems[0]
    assert "disk: needs" in result.problems[-1]
    little = describe("tflops=100 memory_gb=0.2 cores=8")
    assert "not even one crop" in estimate([planned(cfg)], timings, little).problems[0]


def test_workers_share_memory_and_cores():
    cfg = make_config("paper", **BASE | dict(batch_size=32))
    timings, two = timings_of(cfg), [planned(cfg), planned(replace(cfg, seed=1), "b")]
    many = estimate(two, timings, replace(HERE, memory_gb=10), workers=2)
    assert "x 2 at once" in many.problems[0]
    assert "workers=1" in many.problems[0]
    timings["machine"]["threads"] = 2  # all cores: two workers are no faster than one, and need twice the memory
    crowded = estimate(two, timings, replace(HERE, memory_gb=10), workers=2)
    assert crowded.totals["at_once"] == 1
    assert "x 2 at once" in crowded.problems[0]


def test_a_device_that_waits_for_crops_is_named():
    cfg = make_config("paper", **BASE)
    machine = describe("tflops=20 memory_gb=80 cores=8")
    assert "cut in the training process: workers=" in estimate([planned(cfg)], timings_of(cfg), machine).problems[0]
    beside = replace(cfg, workers=8)
    assert not estimate([planned(beside)], timings_of(beside), machine).problems


def test_every_experiment_of_the_table_is_listed():
    """A run that two experiments need counts once; what starts no runs is named with the reason."""
    runs, left_out = batch_runs("paper", seeds="0")
    assert set(left_out) == {"cross_dataset", "attention", "features", "errors", "architecture", "complexity"}
    assert {e for r in runs for e in r.experiments} | set(left_out) == {s.notebook for s in pick_studies()}
    assert len([r for r in runs if {"losses", "regularization"} <= set(r.experiments)]) == 1
    assert len({r.key for r in runs}) == len(runs)
    splits = [r.sizes["test"] for r in runs if r.experiments == ("audit",) and r.cfg.split == "random"]
    assert splits == [round(0.2 * 10073)] * 3
    assert any(r.cfg.method == "hyperiqa" and r.cfg.batch_size == 96 for r in runs)
    assert {r.cfg.batch_size for r in runs if "regularization" in r.experiments} == {32, 8, 24}


@pytest.fixture(scope="module")
def swept(standin, tmp_path_factory):
    """One tiny experiment, really run: its parameters, and the folder with its run."""
    out = tmp_path_factory.mktemp("swept")
    common = dict(root=str(standin), recipe=json.dumps(RECIPE), seeds="0", threads=1)
    with without_kernels():
        execute("main", dict(profile="demo") | common, out, "here", echo=None)
    return common, out / "here"


@pytest.mark.slow
def test_listed_runs_are_those_that_were_started(swept):
    common, batch = swept
    runs, left_out = batch_runs("demo", "main", **common)
    folders = {run_folder(r.cfg, load_set(r.cfg), batch.parent, batch.name) for r in runs}
    assert not left_out
    assert folders == {f for f in batch.iterdir() if is_finished(f) and (f / "splits.csv").exists()}
    assert runs[0].sizes == dict(train=25, val=8, test=8)


@pytest.mark.slow
def test_an_estimate_is_compared_with_a_run(swept, tmp_path):
    """Generous: the machine does other things, and a run of seconds is mostly start-up."""
    folder = next(f for f in sorted(swept[1].iterdir()) if (f / "splits.csv").exists())
    here = against(folder, steps=2).set_index("step")
    assert 0.05 < here.ratio["training"] < 20
    assert here.measured["training"] > 0
    text = estimate_text(against_run=folder, steps=2)
    assert "cannot be told apart from a wrong estimate" in text
    assert folder.name in text
    with pytest.raises(ValueError, match=r"no record\.json"):
        against(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("record.json", "config.json", "environment.json", "metrics.jsonl", "splits.csv"):
        (other / name).write_bytes((folder / name).read_bytes())
    env = json.loads((other / "environment.json").read_text()) | dict(cpu="another")
    (other / "environment.json").write_text(json.dumps(env))
    with pytest.raises(ValueError, match="another machine .*cpu another"):
        against(other)
    os.utime(other / "record.json", (0, 0))  # a copy is of another time; what counts was written down
    copied = against(other, anywhere=True, steps=2).set_index("step").measured
    assert copied.equals(here.measured)
    assert (copied[copied.index.str.contains("whole run")] > copied["training"]).all()


@pytest.mark.slow
def test_the_text_reads_well(swept, capsys):
    common = swept[0] | dict(seeds="0,1", steps=2)
    text = estimate_text("demo", "main", workers=2, **common)
    assert text.startswith("2 runs on this machine")
    assert "test_efficientnet, 8 x 64²" in text
    assert "baseline's features" in text
    there = estimate_text("demo", "main", machine="a100-80gb cores=16", **common)
    assert "2 runs on a100-80gb" in there
    assert "assumed: a model reaches the same fraction" in there
    words = [word for k in ("root", "recipe", "seeds", "threads") for word in (f"--{k}", str(common[k]))]
    assert main(["plan", "--profile", "demo", "--only", "main", "--steps", "2", *words]) == 0
    assert capsys.readouterr().out.startswith("2 runs on this machine")


@pytest.mark.parametrize("call, words", [
    (lambda: estimate_text("papper"), "profile"),
    (lambda: estimate_text(steps=0), "steps=0"),
    (lambda: estimate_text(machine="a100"), "a100-80gb"),
    (lambda: measure([]), "no run"),
    (lambda: batch_runs("paper", only="lossess"), "losses"),
    (lambda: estimate([planned(make_config("paper"))], {}, HERE, workers=0), "workers=0"),
    (lambda: estimate([], {}, HERE, left_out=dict(main="no set")), "nothing to estimate: main: no set"),
])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_an_unknown_number_of_images_is_a_reason_not_a_guess():
    _, left_out = batch_runs("paper", "losses", recipe=json.dumps(dict(dataset="spaq")))
    assert "give root" in left_out["losses"]


@pytest.mark.parametrize("head", ["hyper", "plain"])
def test_operations_of_every_head_are_counted(head):
    model = make_model(small_config("x", head=head)).eval()
    counted = forward_flops(model, torch.zeros(1, 3, 64, 64))
    assert counted == forward_flops(model, torch.zeros(2, 3, 64, 64)) / 2 > 1e6


def test_a_kind_is_measured_at_its_own_batch():
    step = measure_step(kind_of(small_config("x", frozen=True, threads=1)), steps=1)
    assert step["batch"] == 8
    assert step["values"] > 0
    assert step["seconds"] > 0 < step["scored"]
    assert step["learnt"] < step["parameters"]

"""What a batch will take: the runs that are counted are those that are started, and the arithmetic is the run's own."""
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_config

from smart_iqa.backbones import forward_flops
from smart_iqa.config import make_config
from smart_iqa.data import load_set
from smart_iqa.lab import plan, probe
from smart_iqa.lab.plan import Machine, cost_of, describe, project
from smart_iqa.lab.probe import PlannedRun, data_key, kind_key, kind_of, planned_runs
from smart_iqa.lab.runs import execute, is_finished, run_folder
from smart_iqa.lab.studies import pick_studies
from smart_iqa.training import make_model

RECIPE = dict(dataset="csv", labels="labels.csv", score_range="0,100", backbone="test_efficientnet", pretrained="none", size=64, crop=64,
              train_crops=1, val_crops=2, test_crops=4, epochs=1, batch_size=8, group_duplicates=False, amp="off", device="cpu", leaks="mark", baseline=False)
HERE = Machine("here", 1.0, 16, cores=2, described=False)


def told_of(*configs, **changes):
    """Measurements that nobody made: a step 2 s, scoring 0.1 s, heads 0.001 s, features 0.25 s a crop; cutting a crop 0.01 s."""
    kind = dict(batches=[8], step_seconds=[2.0], step_memory=[3e9], base_memory=1e9, score_seconds=0.001, whole_seconds=0.1, feature_seconds=0.25,
                feature_values=100, moment_values=10, head_parameters=1000, parameters=10_000, flops=1e10, bf16=True) | changes
    data = dict(decode=0.5, sketch=0.2, crop=0.01, width=1024, height=768, pixels=0)
    general = dict(tflops_bf16=1.0, tflops_fp32=0.5, pair=0.001, start=7.0, summary=0.0)
    kinds = {kind_key(c): kind | dict(kind=kind_of(c)) for c in configs}
    return dict(machine=dict(device="cpu", affinity=2, threads=1), general=general, data={data_key(c): data for c in configs}, kinds=kinds)


def planned(cfg, key="a", **parts):
    return PlannedRun(key, "train", cfg, tuple((parts or dict(train=10, val=4, test=6)).items()), ("main",))


BASE = dict(batch_size=8, train_crops=4, val_crops=2, test_crops=3, epochs=5, group_duplicates=False)


def test_heads_on_frozen_features():
    """Every crop goes through the backbone once; all arms of a seed share what they can, and seeds share all but the training crops."""
    cfg = make_config("paper", frozen=True, **BASE)
    told = told_of(cfg)
    cost = cost_of(planned(cfg), told, HERE)
    assert cost.seconds["train"] == 5 * 5 * 2.0 and np.isclose(cost.seconds["validate"], 5 * 4 * 2 * 0.001)
    assert np.isclose(cost.seconds["score"], 10 * 3 * 0.001)
    features = [s for s in cost.shared.values() if s[0] == "frozen features"]
    assert np.allclose(sorted(s[1] for s in features), [n * 0.26 for n in (8, 30, 40)]) and sorted(s[2] for s in features) == [n * 200 for n in (8, 30, 40)]
    assert np.isclose(cost.disk_working - cost.disk_kept, 2 * 4 * (10_000 + 2 * 1000))  # moments of the heads alone
    arms = [planned(cfg), planned(replace(cfg, loss="l2"), "b"), planned(replace(cfg, seed=1), "c")]
    shared = project(arms, told, HERE).shared
    assert shared.what.value_counts().to_dict() == {"frozen features": 4, "pixel cache": 1}
    assert len(cost_of(planned(replace(cfg, baseline=True)), told, HERE).shared) == len(cost.shared) + 2


def test_steps_accumulation_ema_and_scoring_alone():
    cfg = make_config("paper", **BASE | dict(epochs=1), ema=0.9)
    told = told_of(cfg)
    cost = cost_of(planned(cfg, train=9, val=2, test=2), told, HERE)
    assert np.isclose(cost.seconds["train"], 5 * 2.08)  # 36 crops: four whole batches and a small one, which is taken for whole
    assert cost.disk_working - cost.disk_kept == 2 * 4 * 4 * 10_000
    shut = cost_of(planned(replace(cfg, open_test=False), train=9, val=2, test=2), told, HERE)
    assert np.isclose(shut.seconds["score"], 2 * 3 * 0.11) and np.isclose(cost.seconds["score"], 4 * 3 * 0.11)
    alone = cost_of(replace(planned(cfg, train=9, val=2, test=2), notebook="evaluate"), told, HERE)
    assert alone.seconds["train"] == 0 and np.isclose(alone.seconds["score"], 2 * 3 * 0.11)
    pairs = cost_of(planned(replace(cfg, group_duplicates=True)), told, HERE).shared
    assert np.isclose(next(s for w, s, _ in pairs.values() if w == "near-duplicates"), 20 * 0.2 / 2 + 0.001 * 190)


def test_what_does_not_fit_is_named_with_the_mend():
    cfg = make_config("paper", **BASE | dict(batch_size=32))
    told = told_of(cfg, batches=[4, 8], step_seconds=[1.0, 1.5], step_memory=[2e9, 3e9])  # a quarter of a GB a crop above 1 GB
    p = project([planned(cfg)], told, describe("tflops=100 memory_gb=5 disk_gb=0.001 cores=8"))
    memory, disk = p.problems[0], p.problems[-1]
    assert "needs 8.0 GB" in memory and "batch_size=16 accumulate=2" in memory and "disk: needs" in disk
    assert "not even one crop" in project([planned(cfg)], told, describe("tflops=100 memory_gb=0.2 cores=8")).problems[0]
    many = project([planned(cfg), planned(replace(cfg, seed=1), "b")], told, replace(HERE, memory_gb=10), workers=2)
    assert "x 2 at once" in many.problems[0] and "workers=1" in many.problems[0]
    told["machine"]["threads"] = 2  # all cores: two workers are no faster than one, and need twice the memory
    crowded = project([planned(cfg), planned(replace(cfg, seed=1), "b")], told, replace(HERE, memory_gb=10), workers=2)
    assert crowded.totals["at_once"] == 1 and "x 2 at once" in crowded.problems[0]
    feed = project([planned(cfg)], told, describe("tflops=20 memory_gb=80 devices=1 cores=8")).problems
    assert any("cut in the training process: workers=" in t for t in feed)
    beside = replace(cfg, workers=8)
    assert not project([planned(beside)], told_of(beside), describe("tflops=1 memory_gb=80 cores=8")).problems
    with pytest.raises(ValueError, match="workers=0"):
        project([planned(cfg)], told, HERE, workers=0)
    with pytest.raises(ValueError, match="nothing to project: main: no set"):
        project([], told, HERE, left_out=dict(main="no set"))


def test_every_sweep_of_the_paper_can_be_asked():
    """The arms are those of the table; a run that two experiments want counts once."""
    runs, left_out = planned_runs("paper", seeds="0")
    assert set(left_out) == {"cross_dataset", "attention", "features", "errors", "architecture", "complexity"}
    asked = {e for r in runs for e in r.asked_by}
    assert asked | set(left_out) == {s.notebook for s in pick_studies()}
    l1 = [r for r in runs if {"losses", "regularization"} <= set(r.asked_by)]
    assert len(l1) == 1 and len({r.key for r in runs}) == len(runs)
    splits = [r for r in runs if r.asked_by == ("audit",) and r.cfg.split == "random"]
    assert len(splits) == 3 and all(dict(r.parts)["test"] == round(0.2 * 10073) for r in splits)
    assert any(r.cfg.method == "hyperiqa" and r.cfg.batch_size == 96 for r in runs)
    assert {r.cfg.batch_size for r in runs if "regularization" in r.asked_by} == {32, 8, 24}


@pytest.fixture(scope="module")
def swept(standin, tmp_path_factory):
    """One tiny experiment, really run: its parameters, and the folder with its run."""
    out = tmp_path_factory.mktemp("swept")
    given = dict(profile="demo", root=str(standin), recipe=json.dumps(RECIPE), seeds="0", threads=1)
    execute("main", given, out, "here", echo=None)
    return given, out / "here"


def test_planned_runs_are_those_that_were_started(swept):
    given, batch = swept
    runs, left_out = planned_runs("demo", "main", **{k: v for k, v in given.items() if k != "profile"})
    folders = {run_folder(r.cfg, load_set(r.cfg), batch.parent, batch.name) for r in runs}
    assert not left_out and len(folders) == 1
    assert folders == {f for f in batch.iterdir() if is_finished(f) and (f / "splits.csv").exists()}
    assert dict(runs[0].parts) == dict(train=25, val=8, test=8)


def test_a_projection_is_held_against_a_run(swept, tmp_path):
    """Generous: the machine does other things, and a run of seconds is mostly start-up."""
    _, batch = swept
    folder = next(f for f in sorted(batch.iterdir()) if (f / "splits.csv").exists())
    t = plan.against(folder, steps=2).set_index("what")
    assert 0.05 < t.ratio["training"] < 20 and t.measured["training"] > 0
    text = plan.report(against_run=folder, steps=2)
    assert "cannot be told apart from a wrong projection" in text and folder.name in text
    with pytest.raises(ValueError, match=r"no record\.json"):
        plan.against(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("record.json", "config.json", "environment.json", "metrics.jsonl", "splits.csv"):
        (other / name).write_bytes((folder / name).read_bytes())
    env = json.loads((other / "environment.json").read_text()) | dict(cpu="another")
    (other / "environment.json").write_text(json.dumps(env))
    with pytest.raises(ValueError, match="another machine .*cpu another"):
        plan.against(other)
    os.utime(other / "record.json", (0, 0))  # a copy is of another time; what is told was written down
    copied = plan.against(other, anywhere=True, steps=2).set_index("what").measured
    assert copied.equals(t.measured) and (copied[[k for k in copied.index if "whole run" in k]] > copied["training"]).all() and len(copied) == 4


def test_a_report_of_a_batch_reads_well(swept):
    asked = {k: v for k, v in swept[0].items() if k != "profile"} | dict(seeds="0,1", steps=2)
    text = plan.report("demo", "main", workers=2, **asked)
    assert text.startswith("2 runs on this machine") and "test_efficientnet, 8 x 64²" in text and "baseline's features" in text
    there = plan.report("demo", "main", machine="a100-80gb cores=16", **asked)
    assert "2 runs on a100-80gb" in there and "assumed: a model reaches the same part" in there


def test_bad_input():
    for call, word in ((lambda: plan.report("papper"), "profile"), (lambda: plan.report(steps=0), "steps=0"),
                       (lambda: plan.report(machine="a100"), "a100-80gb"), (lambda: probe.measure([]), "no run"),
                       (lambda: planned_runs("paper", only="lossess"), "losses")):
        with pytest.raises(ValueError, match=word):
            call()
    _, left_out = planned_runs("paper", "losses", recipe=json.dumps(dict(dataset="spaq")))
    assert "give root" in left_out["losses"]  # nothing tells how many pictures: a reason, not a guess


@pytest.mark.parametrize("head", ["hyper", "plain"])
def test_operations_of_every_head_are_counted(head):
    model = make_model(small_config("x", head=head)).eval()
    counted = forward_flops(model, torch.zeros(1, 3, 64, 64))
    assert counted == forward_flops(model, torch.zeros(2, 3, 64, 64)) / 2 > 1e6


def test_a_kind_is_measured_at_its_own_batch():
    told = probe.measure_kind(kind_of(small_config("x", frozen=True, threads=1)), steps=1)
    assert told["batches"] == [1, 2, 8] and told["feature_values"] > 0 and 0 < told["score_seconds"] < told["whole_seconds"]
    assert told["head_parameters"] < told["parameters"]

"""The table of studies: its rows fit the notebooks and the package, and what is listed is what is started."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from conftest import TINY, without_kernels

import smart_iqa
from smart_iqa.lab import studies
from smart_iqa.lab.notebooks import experiments, parameters_of
from smart_iqa.lab.report import parameters_for, run_paper
from smart_iqa.lab.runs import RunError, is_finished, planned_folder
from smart_iqa.lab.studies import (
    RECIPES,
    STUDIES,
    cross_runs,
    job_config,
    pick_studies,
    run_study,
    split_sizes,
    studies_of,
    study_runs,
)

ROWS = [s.name for s in STUDIES.values() if s.takes == "arms"]
RECIPE = dict(
    dataset="csv",
    labels="labels.csv",
    score_range="0,100",
    backbone="test_efficientnet",
    pretrained="none",
    size=64,
    crop=64,
    train_crops=1,
    val_crops=2,
    test_crops=4,
    epochs=1,
    batch_size=8,
    group_duplicates=False,
    amp="off",
    device="cpu",
    leaks="mark",
    baseline=False,
)


def opened(notebook: Path) -> set[str]:
    """The names of the studies that a notebook opens or runs, read from its code."""
    names = set()
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "code":
            for call in (n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Call)):
                name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                words = [a.value for a in call.args if isinstance(a, ast.Constant)]
                names |= set(words[:1]) if name in ("open_study", "run") else set()
    return names


def test_every_study_has_its_notebook():
    assert {s.notebook for s in STUDIES.values()} <= set(experiments())
    assert all(s.shown_in == "" or STUDIES[s.shown_in].notebook == s.shown_in for s in STUDIES.values())


def test_every_notebook_shows_the_rows_that_it_has():
    """A notebook opens the studies of the table that name it, and no others."""
    for name, path in experiments().items():
        expected = {s.name for s in studies_of(name) if s.takes == "arms"}
        assert opened(path) == expected, name


@pytest.mark.parametrize("profile", RECIPES)
@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_is_a_valid_configuration(name, profile):
    study = STUDIES[name]
    if isinstance(study.arms.get(profile), str):
        with pytest.raises(ValueError, match=study.arms[profile]):
            study_runs(name, profile)
        return
    jobs = study_runs(name, profile)
    made = {}
    for job in jobs:
        made[job.key] = job_config(job, made.get(job.needs))
        assert set(job.parameters) <= set(parameters_of(job.notebook))
    assert len({job.label for job in jobs}) == len(made) == len(jobs)
    assert bool(jobs) == (study.takes in ("arms", "domains"))
    if study.takes == "models":
        assert study.parameters[profile]


def test_a_value_of_the_recipe_is_multiplied():
    """Whatever the recipe is: twice its crops, and a floor of twice its learning rate."""
    arms = {job.arm: job.parameters for job in study_runs("crops", "lite", recipe=dict(train_crops=3), seeds="0")}
    assert arms["twice the training crops"]["train_crops"] == 6
    floor = next(j for j in study_runs("audit_training", "paper", seeds="0") if "floor" in j.arm)
    assert floor.parameters["lr_floor"] == 2 * job_config(floor).lr


def test_dynamics_shares_the_runs_of_others():
    def parameters(name, profile):
        return [job.parameters for job in study_runs(name, profile)]

    for profile in RECIPES:
        main, ablation = parameters("main", profile), parameters("ablation", profile)
        assert all(p in main + ablation for p in parameters("dynamics", profile))


@pytest.mark.parametrize("name", ROWS)
def test_what_is_listed_is_what_is_started(name, standin, monkeypatch):
    """`run_study` hands over exactly its list; each run fails at once, as where weights are missing for it alone."""
    started = []

    def fail(jobs, out, batch, *more):
        started.extend(jobs)
        for k in range(len(jobs)):
            yield k, RunError("stopped by the test", "Diverged", "")

    monkeypatch.setattr(studies, "run_jobs", fail)
    given = dict(root=str(standin), recipe=json.dumps(RECIPE), seeds="0")
    with pytest.raises(ValueError, match="no run of the control"):
        run_study(name, "demo", **given, out="outputs", batch="nowhere")
    assert started == study_runs(name, "demo", **given)


def folders_of(jobs, out: Path) -> set[str]:
    """The names of the folders that a list of runs has."""
    made = {}
    for job in jobs:
        given = dict(checkpoint=str(made[job.needs])) if job.needs else {}
        made[job.key] = planned_folder(job.notebook, given | job.parameters, out, "paper-demo", job.name)
    return {folder.name for folder in made.values()}


@pytest.mark.slow
def test_a_batch_starts_the_runs_that_are_listed(tmp_path):
    """`smart-iqa paper` on the demo set: two studies, one seed, trained and evaluated; no folder more, none less."""
    given = dict(recipe=json.dumps(TINY), seeds="0", cache=str(tmp_path / "cache"))
    out = tmp_path.resolve()
    with without_kernels():
        _, failed = run_paper("demo", out, only="main,cross_dataset", echo=lambda text: None, **given)
    listed = [job for name in ("main", "cross_dataset") for job in study_runs(name, "demo", **given)]
    runs = {f.name for f in (out / "paper-demo").iterdir() if (f / "splits.csv").exists() and is_finished(f)}
    assert not failed
    assert len(listed) == 1 + 2 + 4
    assert runs == folders_of(study_runs("main", "demo", **given), out) | folders_of(listed[1:], out)


def test_models_are_trained_on_every_domain_and_evaluated_on_all():
    jobs = cross_runs(dict(a="*-blur-*", b="*-jpeg-*"), profile="demo", seeds=(0, 1))
    assert [job.notebook for job in jobs] == ["train"] * 4 + ["evaluate"] * 8
    assert {job.needs for job in jobs[4:]} == {job.key for job in jobs[:4]}
    assert all("checkpoint" not in job.parameters for job in jobs)


def test_the_report_asks_for_the_same_list():
    """The parameters that the batch gives to the notebook lead to the runs of the table."""
    common = dict(root="DIR", recipe=json.dumps(dict(epochs=1)), seeds="0,1", cache=None, threads=2)
    asked = parameters_for(STUDIES["cross_dataset"], "lite", Path("out"), "b", common)
    read = {k: json.loads(asked[k]) for k in ("domains", "train", "test")}
    seeds = [int(s) for s in asked["seeds"].split(",")]
    here = cross_runs(**read, seeds=seeds, **{k: asked[k] for k in ("profile", "root", "threads")})
    assert here == study_runs("cross_dataset", "lite", **common)


def test_sizes_of_splits_are_numbers():
    assert split_sizes(job_config(study_runs("main", "lite")[0])) == dict(train=3000, val=1000, test=2000)
    random = replace(job_config(study_runs("main", "paper")[0]), split="random")
    assert split_sizes(random)["test"] == round(0.2 * 10073)


def test_no_hidden_mode():
    """No module executes another's source, reads code by a pattern, or has a mode in which nothing is started."""
    for path in Path(smart_iqa.__file__).parent.rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        calls = {
            n.func.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"exec", "eval"}, path
        assert "ContextVar" not in code, path


def test_a_misspelt_experiment_is_named():
    with pytest.raises(ValueError, match="did you mean losses"):
        pick_studies("lossess")

"""Sweeps and the paper's batch with real runs: what is missing runs, what stands is skipped, and every number comes
from a record."""

import io
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import STANDIN, TINY, without_kernels

from smart_iqa.cli import main
from smart_iqa.demo import DEMO_NOTE
from smart_iqa.lab.experiment import arm_table, caption_of, is_current, readable
from smart_iqa.lab.figures import arms_figure
from smart_iqa.lab.report import _Listing, parameters_for, run_paper
from smart_iqa.lab.runs import RunError, compare_runs, list_runs, parameters_of, run_digest
from smart_iqa.lab.studies import Study, pick_studies, run_study

COMMAND = [str(Path(sys.executable).parent / "smart-iqa")]


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """One folder for outputs and one for the rendered pictures."""
    out = tmp_path_factory.mktemp("paper")
    return out, dict(recipe=json.dumps(TINY), cache=str(tmp_path_factory.mktemp("cache")))


EXPLODES = dict(lr=1e30, clip=0.0, schedule="constant", warmup=0.0)
ARMS = {
    "l1": dict(loss="l1"),
    "l2": dict(loss="l2"),
    "no weights": dict(method="hyperiqa", pretrained="wheel"),
    "diverges": EXPLODES,
    "large": "needs a GPU",
}


def sweep(batch):
    out, given = batch
    study = Study("sweep", arms=dict(demo=ARMS), title="Losses")
    with without_kernels():
        return run_study(
            study, "demo", recipe=given["recipe"], seeds="0", cache=given["cache"], out=out, batch="sweep"
        )


@pytest.fixture(scope="module")
def first(batch):
    return sweep(batch)


def times(out, batch="sweep"):
    return {p.parent.name: p.stat().st_mtime_ns for p in (out / batch).glob("*/record.json")}


@pytest.mark.slow
def test_what_cannot_run_is_a_row_with_its_reason(first):
    table = arm_table(first)
    assert table.set_index("arm").seeds.to_dict() == {"l1": 1, "l2": 1, "no weights": 0, "diverges": 0, "large": 0}
    shown = readable(table).set_index("arm").SRCC
    assert (
        shown["large"] == "not run: needs a GPU"
        and "weights are not on this machine" in shown["no weights"]
        and "diverged" in shown["diverges"]
    )
    assert DEMO_NOTE in caption_of(first) and "n = 24" in caption_of(first)


def test_another_error_stops_the_sweep(standin, tmp_path):
    """A misspelt loss is no finding."""
    typo = Study("sweep", arms=dict(demo={"typo": dict(loss="l3")}))
    with without_kernels(), pytest.raises(RunError, match="unknown loss|choose|known"):
        run_study(typo, "demo", recipe=STANDIN | dict(root=str(standin), threads=1), seeds="0", out=tmp_path)


@pytest.mark.slow
def test_validation_sweeps_keep_the_test_part_shut(first):
    assert all(set(r["predictions"].split) == {"val"} and not r["config"]["open_test"] for r in first.runs.values())


@pytest.mark.slow
def test_two_scenes_claim_nothing(first):
    """The demo's validation split has two photographs: no intervals, no p-values."""
    table = arm_table(first)
    assert table[["srcc_low", "low", "p", "p_holm"]].isna().all(axis=None) and "[" not in readable(table).SRCC[0]
    arms_figure(table)


@pytest.mark.slow
def test_a_deleted_run_is_the_only_one_that_reruns_and_the_table_is_the_same(batch, first):
    before, table = times(batch[0]), arm_table(first)
    gone = Path(first.runs["l2", 0]["folder"])
    shutil.rmtree(gone)
    again = sweep(batch)
    after = times(batch[0])
    assert {k for k in before if after[k] != before[k]} == {gone.name}
    pd.testing.assert_frame_equal(arm_table(again).drop(columns="seconds"), table.drop(columns="seconds"))


@pytest.mark.slow
def test_a_changed_record_changes_table_and_figure_and_is_told(batch, first):
    folder = Path(first.runs["l1", 0]["folder"])
    kept, digest = (folder / "record.json").read_text(), run_digest(folder)
    record = json.loads(kept)
    record["splits"]["val"]["srcc"] += 0.1
    try:
        (folder / "record.json").write_text(json.dumps(record))
        changed = arm_table(sweep(batch))
        assert run_digest(folder) != digest
    finally:
        (folder / "record.json").write_text(kept)
    plain = arm_table(first)
    assert (
        np.isclose(changed.srcc[0] - plain.srcc[0], 0.1)
        and "their predictions give" in changed.remark[0]
        and not plain.remark.any()
    )
    dots = [
        [line.get_xdata()[0] for line in arms_figure(t).axes[0].lines if line.get_marker() == "o"]
        for t in (plain, changed)
    ]
    assert dots[0][-1] != dots[1][-1] and dots[0][:-1] == dots[1][:-1]


@pytest.fixture(scope="module")
def report(batch):
    out, given = batch
    said = []
    folder, failed = run_paper(
        "demo", out, only="ranking,architecture", seeds="0", echo=said.append, workers=2, **given
    )  # below without
    return folder, failed, [s for s in said if ":" in s]


@pytest.mark.slow
def test_report_gathers_everything(report, batch):
    folder, failed, said = report
    assert not failed and len(said) == 2
    assert {p.name for p in (folder / "figures").iterdir()} >= {"ranking.pdf", "ranking.png"}
    assert {p.name for p in (folder / "tables").iterdir()} >= {"ranking.md", "ranking.tex", "ranking.csv"}
    page = (folder / "report.html").read_text()
    assert DEMO_NOTE in page and "alpha=0.5" in page and page.count("data:image/png") >= 2 and "open_study(" not in page
    for outside in ('src="http', 'href="http', "<script"):
        assert outside not in page
    number = f"{pd.read_csv(folder / 'tables' / 'ranking.csv').srcc[1]:.3f}"
    assert number in page and number in (folder / "tables" / "ranking.tex").read_text()


@pytest.mark.slow
def test_paper_again_changes_nothing_and_a_deleted_run_comes_back(report, batch):
    """Second start: experiments stand. A run's folder deleted: that one reruns, its experiment is made again, the
    table is the same."""
    out, given = batch
    folder = report[0]
    csv = (folder / "tables" / "ranking.csv").read_text()
    before, said = times(out, "paper-demo"), []
    run_paper("demo", out, only="ranking,architecture", seeds="0", echo=said.append, **given)
    assert all("stands as it is" in s for s in said)
    after = times(out, "paper-demo")
    assert {k for k in before if after[k] != before[k]} == {folder.name}
    victim = next(
        p
        for p in (out / "paper-demo").glob("demo-lite-*")
        if json.loads((p / "config.json").read_text())["alpha"] == 0.5
    )
    shutil.rmtree(victim)
    experiment = next((out / "paper-demo").glob("ranking-*"))
    assert not is_current(experiment)
    run_paper("demo", out, only="ranking,architecture", seeds="0", echo=said.append, **given)
    last = times(out, "paper-demo")
    assert {k for k in after if last[k] != after[k]} == {folder.name, experiment.name, victim.name}
    drop = dict(columns="seconds")
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "tables" / "ranking.csv").drop(**drop), pd.read_csv(io.StringIO(csv)).drop(**drop)
    )


@pytest.mark.slow
def test_a_failed_experiment_does_not_stop_the_others(batch, tmp_path, capsys):
    """losses cannot run with an unknown schedule; architecture needs no pictures. The command says which failed,
    in the report too."""
    recipe = json.dumps(TINY | dict(schedule="none"))
    words = [
        "--only",
        "losses,architecture,attention",
        "--recipe",
        recipe,
        "--cache",
        batch[1]["cache"],
        "--out",
        str(tmp_path),
    ]
    assert main(["paper", *words]) == 1
    said = capsys.readouterr().err
    assert "losses failed" in said and "schedule" in said and "needs the runs of main" in said
    record = json.loads(next(tmp_path.glob("paper-demo/report-*/record.json")).read_text())
    assert set(record["failed"]) == {"losses", "attention"} and any("architecture" in f for f in record["files"])


def test_parameters_of_every_experiment_fit():
    """What the list asks an experiment under any profile are parameters that it has."""
    common = dict(root=".", recipe="{}", seeds="0", cache=".", threads=1)
    for step in pick_studies():
        for profile in ("demo", "lite", "paper"):
            if step.takes == "runs":
                assert {"runs", "root", "cache"} <= set(parameters_of(step.notebook))
            elif (step.takes, profile) != ("domains", "paper"):
                assert set(parameters_for(step, profile, Path("."), "b", common)) <= set(
                    parameters_of(step.notebook)
                ), step


def test_cli_says_what_is_wrong(tmp_path, capsys):
    def said(*words):
        code, told = main(["paper", *words, "--out", str(tmp_path)]), capsys.readouterr()
        return code or 0, told.err + told.out

    assert said("--profile", "lite") == (
        1,
        "smart-iqa: --profile lite needs --root: the folder of BIQ2021, or of another set named in --recipe\n",
    )
    assert "no such folder" in said("--profile", "lite", "--root", str(tmp_path / "x"))[1]
    code, text = said("--only", "loses")
    assert code == 1 and "did you mean losses" in text
    code, text = said("--list")
    assert code == 0 and all(s.notebook in text for s in pick_studies()) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_log(first, batch, capsys):
    """Filtered, compared, written; the command prints what the frame holds."""
    out = batch[0]
    frame = list_runs(out, "loss == 'l2'")
    assert (
        len(frame) == 1
        and set(frame.columns) >= {"started", "commit", "machine", "seconds", "stopped", "val_srcc"}
        and frame.started.notna().all()
    )
    names = ["sweep/" + Path(first.runs[a, 0]["folder"]).name for a in ("l1", "l2")]
    apart = compare_runs(names, out)
    assert "loss" in apart.index and "epochs" not in apart.index and "lr" not in apart.index
    csv = out / "log.csv"
    words = [
        "--where",
        "loss == 'l1' and seed == 0",
        "--sort=-val_srcc",
        "--columns",
        "run,loss,seed,val_srcc",
        "--csv",
        str(csv),
    ]
    assert not main(["runs", "--out", str(out), *words])
    said = capsys.readouterr().out
    assert Path(first.runs["l1", 0]["folder"]).name in said and "l2" not in said and len(pd.read_csv(csv)) >= 1
    for words, told in (
        (["--where", "los == 1"], "columns:"),
        (["--columns", "lose"], "did you mean"),
        (["--compare", "nothing"], "fits 0 runs"),
    ):
        assert main(["runs", "--out", str(out), *words]) == 1
        said = capsys.readouterr().err
        assert told in said and "Traceback" not in said


@pytest.mark.slow
def test_an_unfinished_run_shows_its_state(first, batch):
    """The run that diverged and the one without weights, if its folder was opened, are in the log as what they are."""
    log = list_runs(batch[0], "batch == 'sweep'", every=True)
    assert (
        log.state[log.lr == EXPLODES["lr"]].tolist() == ["failed"]
        and (log.state[log.lr != EXPLODES["lr"]] == "finished").sum() == 2
    )


@pytest.mark.long
def test_the_whole_demo(tmp_path):
    """`smart-iqa paper --profile demo` as the README has it, with one seed in place of two."""
    words = ["paper", "--profile", "demo", "--seeds", "0", "--out", str(tmp_path)]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=4000)
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.glob("paper-demo/report-*/record.json")).read_text())
    assert (
        not record["failed"]
        and {f.split("/")[0] for f in record["files"]} == {"tables", "figures"}
        and len(record["inputs"]) == len(pick_studies())
    )


def test_threads_of_one_batch_lose_nothing(tmp_path):
    """Three experiments that end at once are all in the listing, and it can be read."""
    names = ("losses", "ranking", "crops")
    for k in range(5):
        where = tmp_path / str(k)
        for n in names:
            (where / n).mkdir(parents=True)
            (where / n / "record.json").write_text("{}")
        listing, gate = _Listing(where, "now"), threading.Barrier(3)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda n: (gate.wait(), listing.finished(n, where / n)), names))
        assert set(json.loads((where / "experiments.json").read_text())["done"]) == set(names)

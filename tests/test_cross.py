"""From records to the cross-dataset tables: every number is the metrics' own, and follows the records."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import picture, run_cells

from smart_iqa.config import make_config
from smart_iqa.files import write_json
from smart_iqa.lab import figures
from smart_iqa.lab.compare import compare_cells, cross_cells, summarise
from smart_iqa.lab.runs import find_notebook, read_run
from smart_iqa.metrics import compare, evaluate_runs, holm, plcc, srcc

LABELS = pd.DataFrame(
    dict(
        image=[f"t{i:02d}.png" for i in range(40)],
        score=np.random.default_rng(1).uniform(5, 95, 40).round(2),
        split="test",
    )
)


def write_run(folder: Path, predictions: pd.DataFrame, config: dict | None = None, **record) -> Path:
    """A finished evaluate run, as the notebook writes it: config, environment, predictions, record."""
    folder.mkdir(parents=True, exist_ok=True)
    predictions = predictions.assign(ref=predictions.image, near_duplicate=False)
    predictions.to_csv(folder / "predictions.csv", index=False)
    write_json(folder / "config.json", config or dict(dataset="csv"))
    write_json(folder / "environment.json", {})
    write_json(
        folder / "record.json",
        dict(run_id=folder.name, method="m", dataset="csv", note="", **summarise(predictions, n_boot=10)) | record,
    )
    return folder


def guess(noise: float, seed: int, labels: pd.DataFrame = LABELS) -> pd.DataFrame:
    return labels.assign(pred=labels.score + np.random.default_rng(seed).normal(0, noise, len(labels)))


@pytest.fixture
def grid(tmp_path):
    """Two models of two seeds and two seeds, on one set; folders of finished runs."""
    return {
        (m, "pets"): [write_run(tmp_path / f"{m}-{s}", guess(noise, k + s)) for s in range(2)]
        for m, noise, k in (("sharp", 10, 0), ("blunt", 40, 10))
    }


def load(grid) -> dict:
    return {k: [read_run(f) for f in folders] for k, folders in grid.items()}


def predictions_of(cells, key) -> np.ndarray:
    return np.stack([r["predictions"].sort_values("image").pred for r in cells[key]])


# -- the numbers -------------------------------------------------------------------------------------------------------
def test_cells_are_the_metrics(grid):
    """Every number of a cell is `evaluate_runs` on the predictions, and the point is the plain mean over seeds."""
    cells = load(grid)
    table = cross_cells(cells, n_boot=200).set_index("model")
    score = LABELS.sort_values("image").score.to_numpy()
    for model in ("sharp", "blunt"):
        p = predictions_of(cells, (model, "pets"))
        assert evaluate_runs(p, score, 200).items() <= table.loc[model].to_dict().items()
        assert np.isclose(table.srcc[model], np.mean([srcc(x, score) for x in p])) and np.isclose(
            table.plcc[model], np.mean([plcc(x, score) for x in p])
        )
        assert (
            table.srcc_low[model] < table.srcc[model] < table.srcc_high[model]
            and table.n[model] == 40
            and table.n_runs[model] == 2
        )


def test_text_tables_show_these_numbers(grid):
    """Markdown, LaTeX and CSV hold the cell's numbers, rounded and nothing else."""
    table = cross_cells(load(grid), n_boot=100)
    for metric, (_, digits) in figures.COLUMNS.items():
        wide = figures.cross_wide(table, metric)
        texts = figures.markdown(wide), figures.booktabs(wide, "a caption", "tab:x")
        for value in table[metric]:
            assert all(f"{value:.{digits}f}" in t for t in texts), metric
    interval = f"{table.srcc[0]:.3f} [{table.srcc_low[0]:.3f}, {table.srcc_high[0]:.3f}]"
    assert interval in figures.markdown(figures.cross_wide(table)) and f"sharp & {interval}" in figures.booktabs(
        figures.cross_wide(table)
    )
    assert np.allclose(pd.read_csv(__import__("io").StringIO(table.to_csv(index=False))).srcc, table.srcc)


def test_booktabs_is_a_whole_table():
    """What LaTeX needs stands in order once, and special characters are escaped."""
    tex = figures.booktabs(pd.DataFrame({"a_b": ["5 % & $"], "c": ["x"]}), "A & B", "tab:y")
    order = [
        r"\begin{table}",
        r"\caption{A \& B}",
        r"\label{tab:y}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a\_b & c \\",
        r"\midrule",
        r"5 \% \& \$ & x \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    at = [tex.index(word) for word in order]
    assert at == sorted(at) and all(tex.count(word) == 1 for word in order)


def test_a_changed_prediction_changes_the_table(grid):
    """The records are the only source: one number in one of them moves its own cell and no other."""
    before = cross_cells(load(grid), n_boot=0).set_index("model")
    folder = grid["blunt", "pets"][1]
    p = pd.read_csv(folder / "predictions.csv")
    p.loc[3, "pred"] = 500.0
    write_run(folder, p)
    after = cross_cells(load(grid), n_boot=0).set_index("model")
    assert after.rmse["blunt"] != before.rmse["blunt"] and after.srcc["blunt"] != before.srcc["blunt"]
    assert after.loc["sharp"].equals(before.loc["sharp"])
    assert figures.markdown(figures.cross_wide(after.reset_index(), "rmse")) != figures.markdown(
        figures.cross_wide(before.reset_index(), "rmse")
    )


def test_a_record_that_contradicts_its_predictions_is_refused(grid):
    """A number edited in record.json alone is an error that names the run, not a table."""
    path = grid["sharp", "pets"][0] / "record.json"
    record = json.loads(path.read_text())
    record["splits"]["test"]["srcc"] += 0.01
    write_json(path, record)
    with pytest.raises(ValueError, match="sharp-0: the record says SRCC"):
        cross_cells(load(grid))


def test_the_paired_test_is_compare(grid):
    """Differences, intervals and p-values are `metrics.compare` on the same pictures; p_holm is `metrics.holm` over all
    rows."""
    cells = load(grid)
    score = LABELS.sort_values("image").score
    pairs = [("pets", "sharp", "blunt"), ("pets", "blunt", ("sharp", "blunt"))]
    table = compare_cells(cells, pairs, n_boot=300)
    sharp, blunt = (predictions_of(cells, (m, "pets")) for m in ("sharp", "blunt"))
    for row, (a, b) in zip(table.to_dict("records"), ((sharp, blunt), (blunt, np.concatenate([sharp, blunt])))):
        told = compare(a, b, score, n_boot=300)
        assert [row[k] for k in ("diff", "low", "high", "p")] == [told[k] for k in ("diff", "low", "high", "p")]
    assert np.allclose(table.p_holm, holm(table.p)) and list(table.better) == ["a", "b"]
    lower = compare_cells(cells, pairs[:1], metric="rmse", n_boot=300)
    assert lower["diff"][0] < 0 and lower.better[0] == "a"  # a smaller error is better


def test_few_scenes_claim_nothing(tmp_path):
    """Where a set shows two scenes there is no interval, no p-value and no winner, however large the difference."""
    runs = {(m, "s"): [read_run(write_run(tmp_path / m, guess(noise, 1)))] for m, noise in (("good", 1), ("bad", 60))}
    for r in (r for v in runs.values() for r in v):
        r["predictions"]["ref"] = ["x"] * 20 + ["y"] * 20
    table, told = cross_cells(runs), compare_cells(runs, [("s", "good", "bad")])
    assert (
        "srcc_low" not in table
        and (table.resampled == "nothing").all()
        and told["diff"][0] > 0.2
        and told.p_holm.isna().all()
        and told.better[0] is None
    )


def test_other_pictures_are_refused(grid, tmp_path):
    """Models that were not tested on the same pictures, or by the same scores, do not share a column."""
    cells = load(grid)
    for k, other in enumerate((guess(10, 3).iloc[:39], guess(10, 3).assign(score=lambda t: t.score + 1))):
        with pytest.raises(ValueError, match="third on pets, other-"):
            cross_cells(cells | {("third", "pets"): [read_run(write_run(tmp_path / f"other-{k}", other))]})


def test_left_out_pictures_count_for_no_model(grid):
    """What one model has seen leaves the column for all of them, in tables and tests alike."""
    cells, leave = load(grid), {"pets": {"t05.png", "t06.png"}}
    table = cross_cells(cells, leave, n_boot=0)
    kept = LABELS[~LABELS.image.isin(leave["pets"])].sort_values("image")
    p = [r["predictions"].set_index("image").pred[kept.image] for r in cells["blunt", "pets"]]
    assert table.n.tolist() == [38, 38] and np.isclose(
        table.set_index("model").srcc["blunt"], np.mean([srcc(x, kept.score) for x in p])
    )
    assert compare_cells(cells, [("pets", "sharp", "blunt")], leave, n_boot=20).n[0] == 38


def test_published_stays_apart(grid):
    """Published numbers are in a panel of their own, hatched, and are exactly those of the file."""
    table, told = (
        cross_cells(load(grid), n_boot=0),
        figures.published_table(tables=("smart-paper",)).query("dataset != trained_on"),
    )
    ours, theirs = figures.cross_heatmap(table, published=told).axes
    assert sorted(t.get_text() for t in theirs.texts) == sorted(f"{v:.4f}" for v in told.srcc) and all(
        p.get_hatch() for p in theirs.patches
    )
    assert not any(p.get_hatch() for p in ours.patches) and [t.get_text().split("\n")[0] for t in ours.texts] == [
        f"{v:.3f}" for v in table.srcc
    ]
    assert (
        "published" in theirs.get_title(loc="left")
        and "not measured here" in theirs.get_title(loc="left")
        and len(told) == 6
    )


# -- the notebook ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """A set of two domains, 30 pictures each, of which 14 are for the test; one test picture of b is a training picture
    of a again."""
    root = tmp_path_factory.mktemp("domains")
    rows = [
        dict(
            image=f"{d}_{k:02d}.png",
            score=float(np.round(5 + 3 * k - 0.5 * (d == "b"), 2)),
            split="train" if k < 12 else "val" if k < 16 else "test",
        )
        for d in "ab"
        for k in range(30)
    ]
    for i, r in enumerate(rows):
        picture(3 if r["image"] == "b_20.png" else i, 64, 48).save(root / r["image"])
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    return root


def run_notebook(monkeypatch, tmp_path, root, harm=None, **given) -> Path:
    """The notebook's own cells in this process; instead of training and scoring, runs are written as those notebooks
    would."""
    labels = pd.read_csv(root / "labels.csv")

    def execute(experiment, parameters, out, batch, name):
        folder, p = Path(out) / batch / name, dict(parameters)
        made = read_run(p.pop("checkpoint"))["config"] if experiment == "evaluate" else {}
        cfg = make_config(**{k: v for k, v in made.items() if k != "open_test"} | {k: v for k, v in p.items()})
        part = labels[labels.image.str.match(cfg.include.replace("*", ".*"))]
        if experiment == "train":
            write_run(folder, guess(5, cfg.seed, part[part.split == "val"]), asdict(cfg))
            part[["image", "split"]].to_csv(folder / "splits.csv", index=False)
        else:
            near = 8 if made["include"] == cfg.include else 25  # elsewhere it is worse
            write_run(
                folder,
                guess(near, cfg.seed, part[part.split == "test"]),
                asdict(cfg),
                checkpoint=str(parameters["checkpoint"]),
            )
        if harm:
            harm(folder)
        return folder

    def finish(jobs, out, batch, *others):
        folders = {}
        for key, job in jobs.items():
            checkpoint = dict(checkpoint=folders[job.needs]) if job.needs else {}
            folders[key] = execute(job.notebook, checkpoint | job.parameters, out, batch, job.name)
        return folders

    monkeypatch.setattr("smart_iqa.lab.workers.finish", finish)
    recipe = dict(labels="labels.csv", score_range="0,100", split="official", leaks="mark")
    values = (
        dict(
            domains=dict(a="a_*", b="b_*"),
            dataset="csv",
            root=str(root),
            profile="demo",
            train=recipe | dict(group_duplicates=True),
            seeds="0,1",
            cache=str(tmp_path / "cache"),
            n_boot=200,
            folder=str(tmp_path / "outputs" / "cross" / "it"),
        )
        | given
    )
    run_cells(find_notebook("cross_dataset"), values)
    return Path(values["folder"])


def test_notebook_from_records_to_tables(monkeypatch, tmp_path, domains):
    """Domains: four cells of two seeds each; numbers, gaps, marks and files are those of the predictions."""
    folder = run_notebook(monkeypatch, tmp_path, domains)
    run = read_run(folder)
    cells, gaps = pd.DataFrame(run["cells"]), pd.DataFrame(run["gaps"])
    assert run["left_out"] == {"a": [], "b": ["b_20.png"]} and cells.n.tolist() == [
        14,
        14,
        13,
        13,
    ]  # it is a_03.png again
    assert cells.own.tolist() == [True, False, False, True] and (cells.n_runs == 2).all()
    runs = folder.parent
    own, other = (
        np.stack(
            [
                read_run(runs / f"trained-on-{d}-on-b-{k}")["predictions"].query("image != 'b_20.png'").pred
                for k in range(2)
            ]
        )
        for d in "ba"
    )
    labels = read_run(runs / "trained-on-b-on-b-0")["predictions"].query("image != 'b_20.png'")
    told = compare(own, other, labels.score, n_boot=200)
    at_b = gaps.set_index("set").loc["b"]
    assert (
        np.allclose([at_b[k] for k in ("diff", "low", "high", "p")], [told[k] for k in ("diff", "low", "high", "p")])
        and at_b.b == "trained on a"
        and at_b["training pictures here"] == 12
    )
    each = [srcc(x, labels.score) - srcc(y, labels.score) for x, y in zip(own, other)]
    assert at_b["each seed"] == ", ".join(f"{v:+.3f}" for v in each) and np.isclose(np.mean(each), at_b["diff"])
    text, tex = (
        "".join(p.read_text() for p in sorted((folder / "tables").glob(f"*.{kind}"))) for kind in ("md", "tex")
    )
    for r in cells.itertuples():
        shown = f"{r.srcc:.3f} [{r.srcc_low:.3f}, {r.srcc_high:.3f}]" + " (own)" * r.own
        assert shown in text and shown in tex
    assert np.allclose(pd.read_csv(folder / "tables" / "cross_srcc.csv").srcc, cells.srcc)
    assert np.allclose(pd.read_csv(folder / "tables" / "cross_gaps.csv")["diff"], gaps["diff"])
    assert f"{at_b['diff']:+.3f} [{at_b.low:+.3f}, {at_b.high:+.3f}]" in text and tex.count(
        r"\begin{tabular}"
    ) == tex.count(r"\end{tabular}") == len(list((folder / "tables").glob("*.md")))
    assert {p.name for p in (folder / "figures").iterdir()} == {"cross.pdf", "cross.png", "gaps.pdf", "gaps.png"}


def test_notebook_follows_the_records(monkeypatch, tmp_path, domains):
    """Other predictions in one run, another table; everything else stays."""

    def spoil(folder):
        if folder.name == "trained-on-a-on-b-1":
            p = pd.read_csv(folder / "predictions.csv")
            write_run(
                folder,
                p.assign(pred=-p.pred),
                read_run(folder)["config"],
                checkpoint=json.loads((folder / "record.json").read_text())["checkpoint"],
            )

    plain, spoilt = (
        pd.read_csv(run_notebook(monkeypatch, tmp_path / n, domains, harm) / "tables" / "cross_srcc.csv").set_index(
            ["model", "set"]
        )
        for n, harm in (("x", None), ("y", spoil))
    )
    changed = plain.index[(plain.srcc != spoilt.srcc)]
    assert list(changed) == [("trained on a", "b")] and spoilt.srcc[changed[0]] < plain.srcc[changed[0]] - 0.3


def test_notebook_compares_checkpoints(monkeypatch, tmp_path, domains):
    """Named checkpoints are compared with the one that is named, Holm-corrected over models and sets."""
    run_notebook(monkeypatch, tmp_path, domains)
    made = {d: str(tmp_path / "outputs" / "cross" / f"{d}-s0") for d in "ab"}
    sets = {
        n: dict(
            dataset="csv",
            root=str(domains),
            labels="labels.csv",
            score_range="0,100",
            split="official",
            include=f"{n}_*",
        )
        for n in "ab"
    }
    folder = run_notebook(
        monkeypatch,
        tmp_path / "two",
        domains,
        domains={},
        checkpoints=dict(first=made["a"], second=made["b"]),
        sets=sets,
        against="second",
    )
    compared = pd.DataFrame(read_run(folder)["compared"])
    assert compared[["set", "a", "b"]].values.tolist() == [
        ["a", "first", "second"],
        ["b", "first", "second"],
    ] and np.allclose(compared.p_holm, holm(compared.p))
    assert (
        compared["diff"][0] > 0 > compared["diff"][1]
        and "Against second" in (folder / "tables" / "cross_against.md").read_text()
    )


def test_notebook_refuses(monkeypatch, tmp_path, domains):
    """Nothing to compare, an unknown reference and a name used twice are errors that say so."""
    for given, word in (
        (dict(domains={}), "nothing to compare"),
        (dict(against="nobody"), "nobody"),
        (dict(sets=dict(a={}), checkpoints=dict(x="y")), "names a domain and a set"),
    ):
        with pytest.raises(ValueError, match=word):
            run_notebook(monkeypatch, tmp_path, domains, **given)


@pytest.mark.slow
def test_notebook_trains_and_tests_on_the_demo_set(tmp_path, monkeypatch):
    """The real thing, smallest: two kinds of damage, one seed, trained, evaluated and told by papermill; the second
    call starts nothing."""
    from smart_iqa.lab.runs import execute

    small = dict(
        pretrained="none", size=64, crop=64, epochs=1, train_crops=1, val_crops=1, test_crops=1, batch_size=8, amp="off"
    )
    given = dict(
        profile="demo",
        seeds="0",
        threads=1,
        n_boot=50,
        cache=str(tmp_path / "cache"),
        train=small,
        domains={"blur": "*-blur-*", "noise": "*-noise-*"},
    )
    folder = execute("cross_dataset", given, out=tmp_path, batch="cross", echo=None)
    run = read_run(folder)
    cells = pd.DataFrame(run["cells"])
    assert (
        len(cells) == 4
        and (cells.n == 15).all()
        and "rendered demo set" in run["note"].lower()
        and (cells.resampled == "nothing").all()
    )
    for r in cells.itertuples():
        p = read_run(folder.parent / run["runs"][f"{r.model} on {r.set}"][0])["predictions"]
        assert np.isclose(srcc(p.pred, p.score), r.srcc) and p.image.str.contains(f"-{r.set}-").all()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("cross/*/record.json")}
    execute("cross_dataset", given, out=tmp_path, batch="cross", echo=None, again=True)
    assert len(times) == 7 and sum(p.stat().st_mtime_ns != t for p, t in times.items()) == 1

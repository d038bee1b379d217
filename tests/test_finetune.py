"""Experiments around the packaged model, end to end on small pictures: finetune, study, teacher,
evaluate, package."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFilter

from smart_iqa.app.engines import Scorer, create_scorer, save_scorer
from smart_iqa.app.scoring import Policy
from smart_iqa.cli import main
from smart_iqa.lab.runs import execute, read_run
from smart_iqa.model import build_model


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """120 pictures of coloured noise, more or less blurred; the less, the better its score of 1-5."""
    folder, rng = tmp_path_factory.mktemp("mine"), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    rows = []
    for k in range(120):
        sigma = rng.uniform(0, 3)
        image = (
            Image.fromarray(rng.integers(0, 255, (80, 96, 3)).astype(np.uint8))
            .resize((192, 160))
            .filter(ImageFilter.GaussianBlur(sigma))
        )
        image.save(folder / "pictures" / f"{k:03d}.png")
        rows.append((f"{k:03d}.png", round(5 - 4 * sigma / 3, 3)))
    pd.DataFrame(rows, columns=["image", "mos"]).to_csv(folder / "my.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "small.safetensors"
    torch.manual_seed(0)
    model = build_model("smart", model_size="lite", pretrained="wheel")
    model.shift_scores(50)
    save_scorer(
        Scorer(model, Policy(96, "short", 64, 2), None, dict(name="small", trained_on="nothing"), device="cpu"), path
    )
    return path


def finetune_words(mine, start, out):
    return [
        "finetune",
        str(mine / "my.csv"),
        "--images",
        str(mine / "pictures"),
        "--score-range",
        "1,5",
        "--model",
        str(start),
        "--out",
        str(out),
        "epochs=6",
        "threads=1",
        "cal_fraction=0.3",
        f"cache={out / 'cache'}",
    ]


@pytest.fixture(scope="module")
def tuned(mine, start, tmp_path_factory, no_kernels):
    out = tmp_path_factory.mktemp("out")
    assert not main(finetune_words(mine, start, out))
    (folder,) = (out / "finetune").iterdir()
    return folder


def test_finetune_learns(tuned):
    run = read_run(tuned)
    before, after = run["before"]["test"]["srcc"], run["splits"]["test"]["srcc"]
    assert after > 0.9 and after > before
    assert run["difference"]["low"] > 0 and set(run["predictions"].split) == {"val", "cal", "test"}


def test_finetuned_model_scores(tuned, mine):
    scorer = create_scorer(tuned / "model.safetensors", device="cpu", amp="auto")  # as the run predicted
    p = read_run(tuned)["predictions"].query("split == 'test'").head(5)
    rows = scorer.details([mine / "pictures" / i for i in p.image])
    assert np.abs(np.array([r.score for r in rows]) - p.pred).max() < 1 and all(r.low < r.high for r in rows)
    assert scorer.info["adapted_from"] == "small"


def test_finetune_again_is_finished(tuned, mine, start, capsys):
    main(finetune_words(mine, start, tuned.parent.parent))
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["gone.csv", "--images", "."], "gone.csv"),
        (["{csv}", "--images", "gone"], "gone"),
        (["{csv}", "--images", "{pictures}", "epochz=3"], "epochs"),
    ],
)
def test_finetune_bad_input(mine, tmp_path, capsys, words, said):
    words = [w.format(csv=mine / "my.csv", pictures=mine / "pictures") for w in words]
    assert main(["finetune", *words, "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


def test_finetune_on_few_pictures(mine, start, tmp_path, capsys, no_kernels):
    """The message says which fractions would do, and they do; a header of no known column and rows that do not fit are
    told before anything is computed."""
    rows = (mine / "my.csv").read_text().splitlines()
    words = ["few.csv" if w.endswith("my.csv") else w for w in finetune_words(mine, start, tmp_path / "out")]
    words = [w for w in words if not w.startswith(("cal_fraction", "epochs"))] + ["epochs=1"]
    few = tmp_path / "few.csv"
    words[1] = str(few)
    for text, told in (
        (rows[:6], "5 images of 5 scenes are too few: add images"),
        (rows[:13], "val_fraction=0.2, cal_fraction=0.25 would do for these 12 images"),
        ([r + ",x" * (k == 7) for k, r in enumerate(rows)], "row 7 (line 8) has 3 fields and the header 2"),
        ([r.replace("image", "photo") for r in rows], "image_column"),
        ([r.replace("image", "mos") for r in rows], "two columns have the name 'mos'"),
    ):
        few.write_text("\n".join(text))
        assert main(words) == 1
        assert told in capsys.readouterr().err
    few.write_text("\n".join(rows[:13]))
    assert main([*words, "val_fraction=0.2", "cal_fraction=0.25"]) == 0
    assert "on 2 test pictures" in capsys.readouterr().out


TIMED = {"config.json", "environment.json", "metrics.jsonl", "record.json"}  # where it ran, and how long it took


def test_the_same_training_writes_the_same_files(mine, start, tmp_path, no_kernels):
    """Checksums of models, predictions and figures can be compared; what holds times differs in nothing else."""
    (tmp_path / "few.csv").write_text("\n".join((mine / "my.csv").read_text().splitlines()[:31]))
    for out in ("a", "b"):
        words = ["epochs=1" if w == "epochs=6" else w for w in finetune_words(mine, start, tmp_path / out)]
        assert main(["finetune", str(tmp_path / "few.csv"), *words[2:]]) == 0
    a, b = (next((tmp_path / out / "finetune").iterdir()) for out in ("a", "b"))
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    assert {"model.safetensors", "checkpoint.safetensors", "curves.pdf", "curves.png"} <= {p.name for p in files}
    assert [str(p) for p in files if p.name not in TIMED and (a / p).read_bytes() != (b / p).read_bytes()] == []
    assert read_run(a)["splits"] == read_run(b)["splits"]
    histories = [read_run(run)["history"].drop(columns=["seconds", "val_seconds"]) for run in (a, b)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


@pytest.fixture(scope="module")
def taught(mine, tmp_path_factory, no_kernels):
    """A teacher, two arms of one seed that use it or not, an evaluation of one of them, and its package."""
    out = tmp_path_factory.mktemp("taught")
    data = dict(
        dataset="csv", labels=str(mine / "my.csv"), root=str(mine / "pictures"), score_range="1,5", split="random"
    )
    quick = data | dict(
        size=96, crop=64, val_crops=2, test_crops=2, cal_fraction=0.3, val_fraction=0.2, epochs=2, frozen=True
    )
    control = {k: v for k, v in quick.items() if k != "root"}
    parameters = dict(
        profile="lite",
        root=quick["root"],
        control=json.dumps(control),
        arms='{"plain": {"head": "plain"}}',
        seeds="0",
        threads=1,
    )
    folder = execute("study", parameters | dict(cache=str(out / "cache")), out=out, batch="study")
    return folder, out, quick


@pytest.mark.slow
def test_study(taught):
    run = read_run(taught[0])
    assert (
        [r["arm"] for r in run["compared"]] == ["control", "plain"]
        and run["compared"][1]["p_holm"] is not None
        and not run["missing"]
    )
    trained = read_run(next(taught[1].glob("study/control-s0-*")))
    assert set(trained["predictions"].split) == {"val"}  # test and calibration stayed shut


@pytest.mark.slow
def test_evaluate_opens_test_and_calibrates_then_package(taught, mine):
    _, out, quick = taught
    run = next(out.glob("study/control-s0-*"))
    folder = execute("evaluate", dict(checkpoint=str(run), baseline=True, threads=1), out=out)
    evaluated = read_run(folder)
    assert set(evaluated["predictions"].split) == {"val", "cal", "test"} and "test" in evaluated["comparison"]
    overall = [r for r in evaluated["coverage"] if r["decile"] == "all"]
    assert [r["level"] for r in overall] == [0.5, 0.8, 0.9]  # 23 calibration pictures promise no more
    assert np.all(np.diff([r["coverage"] for r in overall]) >= 0)
    file = out / "packed.safetensors"
    execute(
        "package", dict(evaluation=str(folder), to=str(file), title="packed", root=quick["root"], check=10), out=out
    )
    scorer = create_scorer(file, device="cpu")
    assert scorer.info["measured"]["test"]["srcc"] == evaluated["splits"]["test"]["srcc"] and scorer.policy == Policy(
        96, "short", 64, 2
    )
    assert str(evaluated["splits"]["test"]["n"]) in file.with_suffix(".md").read_text()


@pytest.mark.slow
def test_teacher_never_saw_the_picture(tmp_path, no_kernels):
    """On the demo set: predictions for every training picture and for no other, out of fold, and worth something."""
    folder = execute("teacher", dict(members="lite:64:64:1", folds=3, threads=1), out=tmp_path)
    told, record = pd.read_csv(folder / "teacher.csv"), read_run(folder)
    assert told.pred.notna().all() and told.image.is_unique and 0.1 < record["measured"][0]["train_out_of_fold"] < 0.99

"""The command line as a whole: help with an example per command, errors with the nearest word, exit codes, no wait
for torch."""

import subprocess
import sys

import pytest

from smart_iqa.cli import COMMANDS, DATA, parse_parameters, read_words

EVERY = [[name] for name in COMMANDS] + [["data"]] + [["data", name] for name in DATA]
SLOW = "{'torch', 'numpy', 'pandas', 'scipy', 'matplotlib', 'papermill'}"


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_has_an_example(run, words):
    code, out, _ = run(*words, "--help")
    assert code == 0
    assert f"smart-iqa {' '.join(words)}" in out.partition("Example:")[2]


@pytest.mark.parametrize("words", [[], ["data"]])
def test_help_names_every_command(run, words):
    code, out, _ = run(*words, "--help")
    assert code == 0
    assert all(name in out for name in (DATA if words else [*COMMANDS, "data"]))


def test_help_and_usage_errors_import_nothing_slow():
    lines = [["--help"], ["score", "--help"], ["trane"], ["score", "x.jpg", "--top", "0"], []]
    code = f"""
import sys
from smart_iqa.cli import main
for words in {lines!r}:
    try: main(words)
    except SystemExit as e: print("ended:", {SLOW} & set(sys.modules), e.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended:")]
    assert ended == [f"ended: set() {code}" for code in (0, 0, 2, 2, 2)]


def test_help_takes_little_time():
    """Below half a second on a quiet machine; one that is busy or slow is given more."""
    code = (
        "import time; from smart_iqa.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(time.process_time())"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(float(done.stdout.splitlines()[-1]))
    assert min(seconds) < 0.8


@pytest.mark.parametrize(
    "words, part",
    [
        (("demo", "--sede", "1"), "--seed"),
        (("score", "x.jpg", "--sort", "scores"), "did you mean score?"),
        (("score", "x.jpg", "--thorough", "--crops", "3"), "--thorough"),
        (("data", "prepare", "csv", "x", "--on-error", "skipp"), "did you mean skip?"),
        (("data", "prepare", "csv", "x", "--size", "0"), "choose a whole number, above 0"),
        (("data", "split", "csv", "x"), "--to"),
    ],
)
def test_words_that_are_not_understood(run, words, part):
    code, out, err = run(*words)
    assert code == 2
    assert out == ""
    assert part in " ".join(err.split())


def test_unknown_experiment_and_parameter(run):
    code, _, err = run("run", "trane")
    assert (code, err) == (1, "smart-iqa: unknown experiment 'trane'; did you mean train?\n")
    code, _, err = run("run", "train", "--lrr", "1")
    assert (code, err) == (1, "smart-iqa: unknown parameter of train 'lrr'; did you mean lr?\n")
    code, _, err = run("run", "train", "--profile", "lite", "--root", "x", "--epochs", "many")
    assert (code, err) == (1, "smart-iqa: epochs='many': choose a whole number, above 0\n")


@pytest.mark.parametrize(
    "words",
    [
        ["--root", "a b/c_d", "--loss", "smooth_l1", "--frozen", "true", "--score-range", "0,1", "--lr", "1e-3"],
        ["--root=a b/c_d", "--loss=smooth_l1", "--frozen=true", "--score_range=0,1", "--lr=1e-3"],
        ["root=a b/c_d", "loss=smooth_l1", "frozen=true", "score_range=0,1", "lr=1e-3"],
    ],
)
def test_parameters_of_runs(words):
    """Options of the command may stand among them, and no value is changed on its way."""
    command = read_words(["run", "train", *words[:2], "--batch", "mine_too", *words[2:]])
    assert command.batch == "mine_too"
    assert parse_parameters(command.words) == dict(
        root="a b/c_d", loss="smooth_l1", frozen=True, score_range="0,1", lr=1e-3
    )


def test_version_names_package_model_and_citation(run):
    """What a paper needs: version, model with fingerprint and engine, and a sentence."""
    from smart_iqa import __version__, create_scorer

    code, out, _ = run("--version")
    assert code == 0 and f"smart-iqa {__version__}" in out
    assert create_scorer(device="cpu").id in out and "scored with" in out

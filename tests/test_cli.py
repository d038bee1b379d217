"""The command line as a whole: help with an example per command, errors with the nearest word, exit codes, no wait
for torch."""

import json
import os
import subprocess
import sys

import pytest
from conftest import picture

from smart_iqa.cli import COMMANDS, DATA, parse_parameters, read_words
from smart_iqa.files import cache_dir

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


@pytest.mark.parametrize("module", ["smart_iqa", "smart_iqa.cli"])
def test_python_m(module):
    done = subprocess.run([sys.executable, "-m", module, "run", "trane"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "smart-iqa: unknown experiment 'trane'; did you mean train?\n")


HOMELESS = """
import os, pathlib, sys
os.environ.pop("SMART_IQA_CACHE", None)
if sys.argv[1] == "no entry":
    del os.environ["HOME"]
    def nobody(*args):
        raise KeyError("no such user")
    import pwd
    pwd.getpwuid = pwd.getpwnam = nobody
else:
    os.environ["HOME"] = sys.argv[1]
from smart_iqa.cli import main
from smart_iqa.files import cache_dir
print("cache", cache_dir())
def code(*words):
    try:
        return main([*words])
    except SystemExit as e:
        return e.code
photo, folder = sys.argv[2:]
print("codes", [code("--version"), code("--help"), code("data", "list"), code("data", "info", "koniq-10k"),
                code("score", photo, "--out", folder + "/s.csv", "--html", folder + "/s.html"),
                code("best", photo, "--scores", folder + "/s.csv", "--out", folder + "/b.csv"),
                code("runs", "--out", folder)])
"""


@pytest.mark.skipif(os.name == "nt", reason="a Windows user has a profile")
@pytest.mark.parametrize("home", ["no entry", "gone/home", "/dev/null"])
def test_no_home_is_needed(home, tmp_path):
    """A user without an entry, a home that is not there, and one that cannot be written."""
    picture(0).save(tmp_path / "a.png")
    words = [sys.executable, "-c", HOMELESS, home, str(tmp_path / "a.png"), str(tmp_path)]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "codes [0, 0, 0, 0, 0, 0, 0]" in done.stdout, done.stderr
    assert f"cache {tmp_path}/smart_iqa-{os.getuid()}\n" in done.stdout


def test_a_temporary_cache_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    """Whoever may write among the temporary files could else hand over files of his own."""
    monkeypatch.delenv("SMART_IQA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="SMART_IQA_CACHE"):
        cache_dir()


def test_tables_of_a_check_replace_neither_each_other_nor_the_labels(run, standin):
    for words in (("--pairs", "x.csv", "--findings", "./x.csv"), ("--findings", str(standin / "labels.csv"))):
        code, _, err = run("data", "check", "csv", standin, "--labels", standin / "labels.csv", *words, "--quiet")
        assert code == 1
        assert "give" in err
        assert "image" in (standin / "labels.csv").read_text()[:10]


def test_runs_that_failed_before_they_had_a_configuration(run, tmp_path):
    """As while images were read."""
    (tmp_path / "runs" / "early-1").mkdir(parents=True)
    failure = {"kind": "DataError", "reason": "3 files cannot be read", "notebook": "train"}
    (tmp_path / "runs" / "early-1" / "failure.json").write_text(json.dumps(failure))
    code, out, _ = run("runs", "--out", tmp_path)
    assert code == 0
    assert "early-1" in out
    assert "failed" in out

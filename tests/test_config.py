"""One list of parameters: what is refused and with which words, run ids that stay, and what is made from the list."""
import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import papermill
import pytest

from smart_iqa.config import MACHINE, PROFILES, Config, allowed, make_config, parameters_cell, parameters_table, run_id

ROOT = Path(__file__).resolve().parent.parent
RUN_IDS = json.loads((Path(__file__).parent / "reference" / "run_ids.json").read_text())
REFUSED = {
    "name": (dict(epoch=3), "unknown parameter 'epoch'; did you mean epochs or step_epochs?"),
    "whole number": (dict(epochs="many"), "epochs='many': choose a whole number, above 0"),
    "part of a whole number": (dict(epochs=2.5), "epochs=2.5: choose a whole number, above 0"),
    "number": (dict(lr="fast"), "lr='fast': choose a number, above 0"),
    "flag": (dict(frozen="maybe"), "frozen='maybe': choose true or false"),
    "list": (dict(lr=[1e-3]), "lr=[0.001]: choose a number, above 0"),
    "above": (dict(lr=0), "lr=0: choose a number, above 0"),
    "or more": (dict(workers=-1), "workers=-1: choose a whole number, 0 or more"),
    "below": (dict(dropout=1.0), "dropout=1.0: choose a number, 0 or more and below 1"),
    "both limits": (dict(val_fraction=0), "val_fraction=0: choose a number, above 0 and below 1"),
    "infinite": (dict(margin="inf"), "margin='inf': choose a number, 0 or more"),
    "not a number": (dict(clip=float("nan")), "clip=nan: choose a number, 0 or more"),
    "choice": (dict(schedule="linear"), "schedule='linear': choose one of cosine, step, constant, hyperiqa"),
    "near choice": (dict(on_error="raises"), "on_error='raises': choose one of raise, skip; did you mean raise?"),
    "choice or file": (
        dict(split="offical"),
        "split='offical': choose one of official, paper, random, none or a .csv file; did you mean official?",
    ),
    "two at once": (
        dict(lr=-1, fit="long"),
        "fit='long': choose one of short, squash\nlr=-1: choose a number, above 0",
    ),
    "together": (dict(crop=512), "crop=512 is larger than the short side size=384: raise size or lower crop"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusal_names_field_value_and_what_is_allowed(kind):
    values, message = REFUSED[kind]
    with pytest.raises(ValueError) as error:
        make_config("lite", **values)
    assert str(error.value) == message


def test_unknown_profile():
    with pytest.raises(ValueError) as error:
        make_config("light")
    assert str(error.value) == "unknown profile 'light'; did you mean lite?"


@pytest.mark.parametrize("key", RUN_IDS)
def test_run_ids_stay(key):
    """The ids of finished runs, which a batch that is started again looks for: text, ints and floats give one id."""
    profile, values = key.split(" ", 1)
    values = {name: value for name, value in json.loads(values).items() if name not in MACHINE}
    assert run_id(make_config(profile, **values), "table") == RUN_IDS[key]


def test_a_later_parameter_changes_an_id_only_when_it_is_used():
    """Runs of before such a parameter keep their ids; a run that uses it is another run."""
    plain = run_id(make_config("lite"), "table")
    assert plain == run_id(make_config("lite", zoom=1.0, ladder=0.0), "table")
    assert len({plain, *(run_id(make_config("lite", **v), "table") for v in (dict(zoom=1.2), dict(ladder=1.0)))}) == 3


def test_zoom_must_fit_into_the_picture():
    assert make_config("lite", size=512, crop=320, zoom=1.6).zoom == 1.6
    with pytest.raises(ValueError, match="zoom=2: .* at most 1.6"):
        make_config("lite", size=512, crop=320, zoom=2)


@pytest.mark.parametrize("other", [dict(frozen=True), dict(color_jitter=0.1)])
def test_ladders_need_crops_that_are_cut_anew_and_not_jittered(other):
    with pytest.raises(ValueError, match=f"ladder .*{next(iter(other))}.*: switch one of them off"):
        make_config("lite", ladder=1.0, **other)


@pytest.mark.parametrize("values", [dict(lr="1e-3", seed="7", frozen="true", drop_path="0.1"),
                                    dict(lr=np.float64(1e-3), seed=np.int64(7), frozen=np.True_, drop_path=0.1),
                                    dict(lr=1e-3, seed=7.0, frozen=1, drop_path=np.float64(0.1))])
def test_values_are_converted(values):
    cfg = make_config("lite", **values)
    plain = dict(lr=1e-3, seed=7, frozen=True, drop_path=0.1)
    assert {name: getattr(cfg, name) for name in plain} == plain
    assert [type(getattr(cfg, name)) for name in plain] == [float, int, bool, float]
    assert make_config("lite", root=ROOT).root == str(ROOT)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_written_configuration_is_read_again(profile):
    cfg = make_config(profile)
    assert make_config(**json.loads(json.dumps(asdict(cfg)))) == cfg
    assert replace(cfg, seed=5) == make_config(profile, seed=5)


def test_train_has_every_parameter():
    """The parameters cell of train is made from `Config`, and papermill reads every name and its help from it."""
    done = subprocess.run([sys.executable, ROOT / ".ci" / "parameters.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = papermill.inspect_notebook(str(ROOT / "nbs" / "experiments" / "train.ipynb"))
    assert list(seen) == [*(f.name for f in fields(Config)), "out", "batch", "name", "folder"]
    for f in fields(Config):
        assert seen[f.name]["help"].endswith(f.metadata["doc"])


def test_cell_and_table_have_a_line_per_parameter():
    cell, table = parameters_cell().splitlines(), parameters_table(Config).splitlines()
    for f in fields(Config):
        assert len([line for line in cell if line.startswith(f"{f.name} = ")]) == 1
        assert f"| `{f.name}` | {allowed(f.type)} | `{f.default!r}` | {f.metadata['doc']} |" in table
    assert max(map(len, cell)) <= 120


def test_config_imports_neither_torch_nor_numpy():
    code = "import sys, smart_iqa.config; print({'torch', 'numpy', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n"

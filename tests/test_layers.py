"""The folders show the layers: who may import whom, read from the code itself, imports inside functions included."""
import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smart_iqa"
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("[!_]*.py"))}
NUMBERS = {
    f"smart_iqa.{m[2]}": int(m[1]) for p in (ROOT / "nbs").glob("*.ipynb") if (m := re.match(r"(\d+)_(\w+)", p.stem))
}


def imports_of(module: str, source: str) -> set[str]:
    """Find the modules of the package that a module imports, wherever in its code the import stands."""
    known = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            known |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            known |= {start, *(f"{start}.{a.name}" for a in node.names)}
    return known & set(MODULES)


IMPORTS = {m: imports_of(m, p.read_text(encoding="utf-8")) for m, p in MODULES.items()}


def layer(module: str) -> str:
    """Name the layer of a module: root, lab, app, or cli, which stands on top of all."""
    parts = module.split(".")
    return "cli" if parts[1] == "cli" else parts[1] if len(parts) == 3 else "root"


MAY_IMPORT = {"root": {"root"}, "lab": {"root", "lab"}, "app": {"root", "app"}, "cli": {"root", "lab", "app"}}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stays_in_its_layer(module):
    """Root reaches neither lab nor app; app does not reach lab; nobody reaches the command line."""
    wrong = {m for m in IMPORTS[module] if layer(m) not in MAY_IMPORT[layer(module)]}
    assert not wrong


def test_there_is_no_circle():
    """The modules can be put in an order in which each imports only from earlier ones."""
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", NUMBERS)
def test_the_numbers_are_the_order(module):
    """A numbered notebook reaches, directly or through rooms without a number, only lower numbers."""
    reached, queue = set(), [module]
    while queue:
        for m in IMPORTS[queue.pop()] - reached:
            reached.add(m)
            queue.append(m)
    assert not {m for m in reached if NUMBERS.get(m, -1) >= NUMBERS[module]}


def test_imports_are_found_wherever_they_stand():
    """The reader of imports sees absolute and relative ones, at the top and inside functions."""
    source = (
        "from ..config import Config\ndef f():\n    from smart_iqa.app import scoring\n    import smart_iqa.losses\n"
    )
    assert imports_of("smart_iqa.lab.runs", source) == {"smart_iqa.config", "smart_iqa.app.scoring", "smart_iqa.losses"}


OLD = """
from smart_iqa import HyperIQA, SmartIQA, load_checkpoint
from smart_iqa.data import DataLoader
from smart_iqa import *
import smart_iqa

smart_iqa.create_scorer
"""


def test_old_import_paths_work():
    """What a README has shown, the original's or ours, is importable."""
    subprocess.run([sys.executable, "-c", OLD], check=True, timeout=120)

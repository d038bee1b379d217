"""Every library notebook runs top to bottom in a fresh kernel, and the package is what the notebooks export."""
import ast
import filecmp
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import kernels
import nbformat
import papermill
import pytest
from nbclient import NotebookClient

from smart_iqa.lab.notebooks import parameters_of

ROOT = Path(__file__).resolve().parent.parent


def name_of(path: Path) -> str:
    """Name a notebook by its folder and stem: lab/runs."""
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


FOLDERS = ("", "lab", "app", "tutorials", "results")
LIBRARY = [p for folder in FOLDERS for p in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))]
# a tutorial trains models and tests nothing that its library notebooks do not
RUNS = [pytest.param(p, marks=pytest.mark.slow) if p.parent.name == "tutorials" else p for p in LIBRARY]
EXPERIMENTS = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))
SOURCE = {name_of(p): nbformat.read(p, 4) for p in LIBRARY + EXPERIMENTS}


@pytest.fixture(scope="session")
def forking():
    """Where the processes of notebooks come from."""
    return kernels.start()


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_runs_top_to_bottom(path, tmp_path, forking):
    """As in JupyterLab's "restart and run all": a process of its own, the notebook's folder, no order but its own; its
    temporary files go with it."""
    with tempfile.TemporaryDirectory() as short:  # the path of a socket may have some hundred characters
        room, log = Path(short) / "t", Path(short) / "log"
        room.mkdir()
        env = dict(SMART_IQA_CACHE=str(tmp_path / "cache"), TMPDIR=str(room))
        process = forking.Process(target=kernels.run_all_cells, args=(path, log, env))
        process.start()
        process.join(600)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0, log.read_text()[-4000:]
        left = {}
        for p in room.rglob("*"):
            with suppress(FileNotFoundError):  # of a process that is just ending
                left[p.relative_to(room).as_posix()] = p.stat().st_size * p.is_file()
        assert sum(left.values()) < 100_000, left  # processes that a notebook kills on purpose leave a few small files


@pytest.mark.slow
def test_runs_in_a_kernel():
    """The notebook of the training loop in a kernel as JupyterLab starts it, where the others are forked."""
    path = ROOT / "nbs" / "13_training.ipynb"
    here = {"metadata": {"path": str(path.parent)}}
    NotebookClient(nbformat.read(path, 4), timeout=600, kernel_name="python3", resources=here).execute()


def test_package_equals_export(tmp_path):
    """nbdev_export in a copy of the project changes no file of the package."""
    for name in ("nbs", "smart_iqa"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for file in (tmp_path / "smart_iqa").rglob("[!_]*.py"):
        file.unlink()  # what no notebook exports must not survive
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True, timeout=300)
    names, exported = (
        {p.relative_to(r / "smart_iqa").as_posix() for p in (r / "smart_iqa").rglob("*.py")} for r in (ROOT, tmp_path)
    )
    assert names == exported
    _, different, errors = filecmp.cmpfiles(ROOT / "smart_iqa", tmp_path / "smart_iqa", sorted(names), shallow=False)
    assert not different + errors


@pytest.mark.parametrize("name", SOURCE)
def test_notebook_is_clean(name):
    """Kernel 'python3' (else papermill fails elsewhere), no error output, no execution counts, no star import in
    exports."""
    nb = SOURCE[name]
    assert nb.metadata.kernelspec.name == "python3"
    for cell in nb.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None
            assert not [o for o in cell.outputs if o.output_type == "error"]
            assert not (cell.source.startswith("#| export") and re.search(r"import \*", cell.source))


@pytest.mark.parametrize("name", SOURCE)
def test_cells_are_short(name):
    """No code cell is longer than 60 lines; only the parameters of `train`, which Config writes, need more."""
    cells = [c for c in SOURCE[name].cells if c.cell_type == "code"]
    long = [c.id for c in cells if c.source.count("\n") >= 60 and "parameters" not in c.metadata.get("tags", [])]
    assert not long


@pytest.mark.parametrize("name", SOURCE)
def test_lines_are_short(name):
    """No line is longer than 120 characters, in prose as in code."""
    lines = [(c.id, line) for c in SOURCE[name].cells for line in c.source.split("\n")]
    long = [(cell, line) for cell, line in lines if len(line) > 120]
    assert not long


@pytest.mark.parametrize("name", SOURCE)
def test_outputs_name_no_machine(name):
    """What a notebook shows is about its subject: no warning of an installed package, no folder of the author's."""
    shown = [str(o) for c in SOURCE[name].cells for o in c.get("outputs", ())]
    words = ("site-packages", "ipykernel_", str(ROOT), f"{Path.home()}/")
    wrong = [o[:200] for o in shown if any(w in o for w in words) or re.search(r"(?<![\w.~])/[\w/-]*outputs/", o)]
    assert not wrong


@pytest.mark.parametrize("name", SOURCE)
def test_one_assert_a_line(name):
    """A test cell says one thing with each assert, so that the line that fails says what is wrong."""
    compound = []
    for cell in SOURCE[name].cells:
        if cell.cell_type == "code" and not cell.source.startswith(("#| export", "%")):
            for node in ast.walk(ast.parse(cell.source)):
                test = node.test if isinstance(node, ast.Assert) else None
                if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
                    compound.append((cell.id, ast.unparse(node)))
    assert not compound


def names_set_by(source: str) -> set[str]:
    """Read which names a cell sets at its own level: by def, class, import, assignment, for or with."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        else:
            inner = (n for c in ast.walk(node) if isinstance(c, ast.comprehension) for n in ast.walk(c.target))
            stored = {n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            found |= {n.id for n in stored - set(inner)}  # the variable of a comprehension is its own
    return found


@pytest.mark.parametrize("name", SOURCE)
def test_no_cell_hides_what_the_notebook_exports(name):
    """A test cell that gives a second meaning to an exported or imported name breaks the functions that use it, in
    the notebook alone: the package still works, and the notebook does not run."""
    exported, hidden = set(), []
    for cell in SOURCE[name].cells:
        if cell.cell_type == "code" and not cell.source.startswith("%"):
            names = names_set_by(cell.source)
            imports = {a.asname or a.name for n in ast.parse(cell.source).body
                       if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}  # fmt: skip
            if cell.source.startswith("#| export"):
                exported |= names
            else:
                hidden += [(cell.id, n) for n in (names - imports) & exported]
    assert not hidden


def test_lines_of_the_package_are_short():
    """The package keeps the notebooks' lines; only the lists of names, which nbdev writes, are longer."""
    files = [p for p in (ROOT / "smart_iqa").rglob("*.py") if p.name != "_modidx.py"]
    lines = [(p.name, line) for p in files for line in p.read_text(encoding="utf-8").splitlines()]
    assert len(lines) > 10_000
    assert not [(name, line) for name, line in lines if len(line) > 120 and not line.startswith("__all__")]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_experiment_parameters(path):
    """Papermill sees one parameters cell and all of its names, and every experiment is told where its record goes."""
    tagged = [c for c in SOURCE[name_of(path)].cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    written = re.findall(r"^(\w+)\s*=", tagged[0].source, re.M)
    assert list(papermill.inspect_notebook(str(path))) == written
    assert {"out", "batch", "name", "folder"} <= set(written)
    seen = papermill.inspect_notebook(str(path))
    assert parameters_of(path) == {name: dict(default=p["default"], help=p["help"]) for name, p in seen.items()}


def test_readme_is_made_from_the_index():
    """README.md is the index notebook as Markdown; `python .ci/readme.py` makes it."""
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "readme.py", "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_readme_is_short():
    """Below a thousand words, those of tables and code included; a sign that stands alone is none."""
    assert sum(bool(re.search(r"\w", word)) for word in (ROOT / "README.md").read_text().split()) < 1000

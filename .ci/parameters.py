"""Write the parameters cell of nbs/experiments/train.ipynb from `Config`. With --check: change nothing, exit 1 if it is
stale."""

import sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))

from smart_iqa.config import parameters_cell  # noqa: E402

path = root / "nbs" / "experiments" / "train.ipynb"
notebook = nbformat.read(path, 4)
cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
stale = cell.source != parameters_cell()
if "--check" in sys.argv:
    sys.exit("train.ipynb does not have the parameters of Config; run python .ci/parameters.py" if stale else 0)
if stale:
    cell.source = parameters_cell()
    nbformat.write(notebook, path)

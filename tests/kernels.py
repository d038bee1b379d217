"""Notebooks without the seconds that each kernel spends on importing torch: processes forked from one that has."""

import atexit
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import matplotlib
import nbformat
from IPython.core.interactiveshell import InteractiveShell

PRELOADED = ["kernels", "pandas", "seaborn", "scipy.stats", "timm", "torchvision", "onnxruntime", "smart_iqa.training"]


def start():
    """Begin the process that all notebooks of this session are forked from; it imports and does nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_all_cells(path: Path, log: Path, env: dict):
    """Run a notebook's code cells in its folder, as a kernel does; exit code 1 at the first error, which `log` has."""
    os.environ.update(env)
    tempfile.tempdir = None  # read from the environment again
    multiprocessing.set_start_method(None, force=True)  # of the notebook's own processes: this system's default
    os.chdir(path.parent)
    with open(log, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    matplotlib.use("module://matplotlib_inline.backend_inline")
    shell = InteractiveShell.instance(colors="nocolor")
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and not shell.run_cell(cell.source, store_history=True).success:
            print(f"\ncell {cell.id} of {path.name}:\n{cell.source}", file=sys.stderr)
            sys.exit(1)
    atexit._run_exitfuncs()  # a forked process leaves them out: temporary folders go with the kernel

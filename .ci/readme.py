"""Make README.md and its pictures from nbs/index.ipynb. With --check: change nothing, exit 1 if they are not up to
date."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
index = nbformat.read(root / "nbs" / "index.ipynb", 4)
index.metadata["language_info"] = {"name": "python"}  # nbdev_clean removes it; it names the language of the code blocks
text, resources = MarkdownExporter().from_notebook_node(index)
files = {f"nbs/images/index-{k}.png": data for k, data in enumerate(resources["outputs"].values())}
for name, new in zip(resources["outputs"], files):
    text = text.replace(f"]({name})", f"]({new})")

for notebook in sorted((root / "nbs").rglob("*.ipynb")):  # links between notebooks, seen from the top level
    name = notebook.relative_to(root / "nbs").as_posix()
    text = text.replace(f"]({name})", f"](nbs/{name})")
text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.strip().splitlines())) + "\n"
files["README.md"] = text.encode()

stale = [name for name, data in files.items() if not (root / name).exists() or (root / name).read_bytes() != data]
if "--check" in sys.argv:
    sys.exit(f"not made from nbs/index.ipynb: {', '.join(stale)}; run python .ci/readme.py" if stale else 0)
for name in stale:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(files[name])

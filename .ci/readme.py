"""Make README.md with its pictures from nbs/index.ipynb, and nbs/README.md, the list of all notebooks, from their
first lines.

With --check: change nothing, and exit with 1 if they are not up to date.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")  # a Markdown link to a file
FOLDERS = {
    "": "The method. The numbers are the order in which the data flows; a module imports only from lower numbers.",
    "lab": "Studies: many runs, compared and reported. Each notebook is a module of `smart_iqa.lab`.",
    "app": "Scoring photographs. Each notebook is a module of `smart_iqa.app`.",
    "experiments": "One question each, as a notebook with papermill parameters: `smart-iqa run NAME`.",
    "tutorials": "How to change a part or use one. The tests execute them.",
    "results": "What was measured, drawn from the records of runs.",
}


def readme() -> dict[str, bytes]:
    """Turn the index into README.md (its cells tagged remove-input show their output alone) and its pictures."""
    index = nbformat.read(NBS / "index.ipynb", 4)
    index.metadata["language_info"] = {
        "name": "python"
    }  # nbdev_clean removes it; it names the language of the code blocks
    remove = {"enabled": True, "remove_input_tags": ("remove-input",)}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=remove))
    text, resources = exporter.from_notebook_node(index)
    files = {f"nbs/images/index-{k}.png": data for k, data in enumerate(resources["outputs"].values())}
    for name, new in zip(resources["outputs"], files):
        text = text.replace(f"]({name})", f"]({new})")
    names = {p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb")} | {"README.md"}
    text = LINK.sub(lambda m: f"](nbs/{m[1]}" if m[1] in names else f"]({m[1].removeprefix('../')}", text)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.strip().splitlines())) + "\n"
    return files | {"README.md": text.encode()}


def notebooks() -> str:
    """List the notebooks by folder, each with its title and its one line."""
    lines = ["# The notebooks", "", "`python .ci/readme.py` makes this list from the first lines of each notebook.", ""]
    for folder, about in FOLDERS.items():
        lines += [f"## `nbs/{folder}`", "", about, "", "| notebook | |", "|---|---|"]
        for path in sorted((NBS / folder).glob("*.ipynb"), key=lambda p: (not p.stem[0].isdigit(), p.stem)):
            first = nbformat.read(path, 4).cells[0].source
            line = re.search(r"^> (.+)", first, re.M)
            if path.stem != "index":
                lines.append(f"| [{path.stem}]({path.relative_to(NBS).as_posix()}) | {line[1] if line else ''} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    files = readme() | {"nbs/README.md": notebooks().encode()}
    broken = [
        m[1] for m in LINK.finditer(files["README.md"].decode()) if not (ROOT / m[1]).exists() and m[1] not in files
    ]
    if broken:
        sys.exit(f"nbs/index.ipynb: links to what does not exist: {', '.join(broken)}")
    old = [
        str(p.relative_to(ROOT))
        for p in (NBS / "images").glob("index-*.png")
        if p.relative_to(ROOT).as_posix() not in files
    ]
    stale = [name for name, data in files.items() if not (ROOT / name).exists() or (ROOT / name).read_bytes() != data]
    if "--check" in sys.argv:
        wrong = ", ".join(stale + old)
        sys.exit(f"not made from nbs/index.ipynb: {wrong}; run python .ci/readme.py" if wrong else 0)
    for name in old:
        (ROOT / name).unlink()
    for name in stale:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(files[name])

"""Build the documentation site from the notebooks, without network: python .ci/site.py DIR, then open DIR/index.html.

Nothing is executed: the pages show the outputs that are committed.
A link to nowhere or a formula that is not understood is an error.
"""
import os
import re
import sys
from configparser import ConfigParser
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from nbformat.v4 import new_markdown_cell, new_notebook

from smart_iqa.lab.report import OfflinePage

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
REPOSITORY = f"{config['DEFAULT']['git_url']}/blob/{config['DEFAULT']['branch']}"
FOLDERS = ("", "lab", "app", "experiments", "tutorials", "results")
UNKNOWN = re.compile(r"<math[^>]*>(?:(?!</math>).)*(?:\\|&#x0005C;).*?</math>", re.S)  # a command left as it is


def load(path: Path) -> nbformat.NotebookNode:
    "Return a page's notebook: directives become a tag, hidden and empty cells go; a text is a notebook of one cell."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return new_notebook(cells=[new_markdown_cell(text)])
    if path.suffix != ".ipynb":
        return new_notebook(cells=[new_markdown_cell(f"# {path.name}\n\n```\n{text}\n```")])
    nb = nbformat.reads(text, 4)
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}  # nbdev_clean removes it
    for cell in nb.cells:
        lines = cell.source.splitlines() if cell.cell_type == "code" else []
        directives = " ".join(line for line in lines if line.startswith("#|"))
        if lines:
            cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        if "export" in directives and "default_exp" not in directives:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "exported"]
        if "hide" in directives:
            cell.source = ""
    nb.cells = [cell for cell in nb.cells if cell.source]
    return nb


def title_of(path: Path) -> str:
    "A page in the list: 11 Losses."
    heading = load(path).cells[0].source.splitlines()[0].lstrip("# ")
    number = path.stem[:3].replace("_", " ") if path.stem[:2].isdigit() else ""
    return f"{number}{heading}"


def listed(folder: str) -> list[Path]:
    "The notebooks of a folder, without the index."
    return [p for p in sorted((NBS / folder).glob("*.ipynb")) if p.stem != "index" and not p.name.startswith("_")]


def link(path: Path, folder: Path, name: str) -> str:
    "A Markdown link, as a page in `folder` has it."
    return f"[{name}]({os.path.relpath(path, folder)})"


def target_of(url: str, path: Path, pages: dict[Path, Path]) -> str:
    "Where a link of a page leads on the site: to another page, or to the file in the repository."
    target, _, fragment = url.partition("#")
    if urlsplit(url).scheme or not target:
        return url
    source = (path.parent / target).resolve()
    if not source.exists():
        sys.exit(f"{path.relative_to(ROOT)}: link to {url}, which does not exist")
    if source in pages:
        to = os.path.relpath(pages[source], pages[path].parent)
    else:
        to = f"{REPOSITORY}/{source.relative_to(ROOT)}"
    return f"{to}#{fragment}" if fragment else to


def build(out: Path):
    "Write the site. A link to nowhere or a formula that is not understood ends it."
    more = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "CITATION.cff", NBS / "references.bib"]
    order = [NBS / "index.ipynb", NBS / "README.md", *(path for folder in FOLDERS for path in listed(folder)), *more]
    pages = {p: out / p.relative_to(NBS if NBS in p.parents else ROOT).with_suffix(".html") for p in order}
    pages[ROOT / "README.md"] = pages[NBS / "index.ipynb"]  # it is made from the index
    for k, path in enumerate(order):
        nb = load(path)
        before, after = order[max(k - 1, 0)], order[(k + 1) % len(order)]
        around = dict(start=order[0], notebooks=order[1], previous=before, next=after)
        links = " · ".join(link(p, path.parent, name) for name, p in around.items() if p != path)
        nb.cells = [new_markdown_cell(links), *nb.cells]
        nb.metadata["title"] = f"{title_of(path)} · SMART-IQA"
        page = OfflinePage(partial(target_of, path=path, pages=pages))
        html, _ = page.from_notebook_node(nb, {"metadata": {"path": str(path.parent)}})
        if bad := UNKNOWN.search(html):
            sys.exit(f"{path.relative_to(ROOT)}: formula not understood: {bad[0]}")
        pages[path].parent.mkdir(parents=True, exist_ok=True)
        pages[path].write_text(html, encoding="utf-8")
    print(f"{len(order)} pages; open {out / 'index.html'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]).resolve())

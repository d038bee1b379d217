"""Build the documentation site from the notebooks, without network: python .ci/site.py DIR, then open DIR/index.html.

Nothing is executed: the pages show the outputs that are committed. A warning (a link to nowhere, a formula that is not understood) is an error.
Needs the docs extra: pip install -e ".[docs]".
"""
import re
import shutil
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
from sphinx.application import Sphinx

here = Path(__file__).resolve().parent
root = here.parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

DIRECTIVE = re.compile(r"^#\|\s*(\w+).*\n?", re.M)  # nbdev's: "#| export"
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)([^)\s]*)\)")  # a Markdown link to a file
CSS = """\
@media (min-width: 105em) { .content { width: 56em; } .sidebar-drawer { width: calc(50% - 31em); } }
.formula { overflow-x: auto; margin: 0.6em 0; padding: 0.5em 0; }
math { font-size: 1.1em; }
.cell.tag_exported > .cell_input { position: relative; border-left-color: var(--color-brand-primary); }
.cell.tag_exported > .cell_input::before { content: "in the package"; position: absolute; right: 1em; top: -0.8em; padding: 0 0.4em;
  font-size: 0.7em; color: var(--color-foreground-muted); background: var(--color-background-primary); }
.cell_output { overflow-x: auto; }
.cell_output img { max-width: 100%; height: auto; background: #fff; }
.cell_output table { font-size: var(--font-size--small); }
.cell_output table.dataframe { border: 0; border-collapse: collapse; }
.cell_output table.dataframe :is(th, td) { border: 0; border-bottom: 1px solid var(--color-background-border); padding: 0.2em 0.6em; text-align: right; }
"""
CITE = """\
# How to cite

The software, as `CITATION.cff` has it:

```{literalinclude} CITATION.cff
:language: yaml
:end-before: "references:"
```

## The methods and the image sets

```{literalinclude} references.bib
:language: bibtex
```
"""


def menu(caption: str, pages: list[str]) -> str:
    "A part of the navigation."
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def entry(path: Path, nbs: Path) -> str:
    "A notebook's line there, with its number: 09 Losses."
    title = re.search(r"^# (.+)", nbformat.read(path, 4).cells[0].source, re.M)[1]
    number = re.match(r"\d+ ?", path.stem.replace("_", " "))
    return f"{number[0] if number else ''}{title} <{path.relative_to(nbs).with_suffix('').as_posix()}>"


def page(path: Path, extra: str = "") -> nbformat.NotebookNode:
    "A notebook as the site shows it: directives become tags of their cells, and `extra` is a last cell."
    nb = nbformat.read(path, 4)
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}  # nbdev_clean removes it
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            words = DIRECTIVE.findall(cell.source)
            cell.source = DIRECTIVE.sub("", cell.source).strip()
            if "hide" in words or not cell.source:
                continue
            if {"export", "exporti", "exports"} & set(words):
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "exported"]
        cells.append(cell)
    nb.cells = cells + ([nbformat.v4.new_markdown_cell(extra)] if extra else [])
    return nb


def outside(text: str, path: Path) -> str:
    "Links of a page at the top level (CONTRIBUTING.md): notebooks lead to their pages, other files to the repository."
    def to(match):
        target, rest = match.groups()
        if not (path.parent / target).exists():
            sys.exit(f"{path.name}: link to {target}, which does not exist")
        inside = "index.ipynb" if target == "README.md" else target.removeprefix("nbs/")  # the README is made from the index
        known = inside.endswith(".ipynb") or target in ("CHANGELOG.md", "CONTRIBUTING.md")
        return f"]({inside}{rest})" if known else f"]({cfg['git_url']}/blob/{cfg['branch']}/{target}{rest})"
    return LINK.sub(to, text)


def source(folder: Path):
    "What Sphinx reads, in the layout of nbs/, so that the links between notebooks hold as they stand."
    nbs = root / "nbs"
    parts = {"Library": sorted(nbs.glob("[0-9]*.ipynb")), "Experiments": sorted((nbs / "experiments").glob("*.ipynb")),
             "Results": sorted((nbs / "results").glob("*.ipynb"))}
    parts = {caption: [p for p in found if not p.name.startswith("_")] for caption, found in parts.items()}
    menus = [menu(caption, [entry(p, nbs) for p in found]) for caption, found in parts.items() if found]
    menus.append(menu("For people who carry it on", ["CONTRIBUTING", "CHANGELOG", "cite"]))
    for path in [nbs / "index.ipynb", *(p for found in parts.values() for p in found)]:
        target = folder / path.relative_to(nbs)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page(path, "\n".join(menus) if path.stem == "index" else ""), target)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        (folder / name).write_text(outside((root / name).read_text(encoding="utf-8"), root / name), encoding="utf-8")
    shutil.copy(root / "CITATION.cff", folder)
    shutil.copy(nbs / "references.bib", folder)
    (folder / "cite.md").write_text(CITE, encoding="utf-8")
    (folder / "_static").mkdir()
    (folder / "_static" / "site.css").write_text(CSS, encoding="utf-8")


def build(out: Path) -> int:
    "The site in `out`; 0 if all is well."
    sys.path.insert(0, str(here))  # for mathml.py
    settings = dict(
        project=cfg["title"], author=cfg["author"], copyright=cfg["copyright"], version=cfg["version"], release=cfg["version"],
        extensions=["myst_nb", "mathml"], html_math_renderer="mathml", html_theme="furo", html_title=f"{cfg['title']} {cfg['version']}",
        html_static_path=["_static"], html_css_files=["site.css"], html_copy_source=False, html_show_sourcelink=False, html_show_sphinx=False,
        nb_execution_mode="off", nb_ipywidgets_js={}, nb_merge_streams=True, nb_render_markdown_format="gfm", myst_enable_extensions=["dollarmath", "amsmath"],
        myst_heading_anchors=3, exclude_patterns=["_build"], html_last_updated_fmt=None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "source"
        folder.mkdir()
        source(folder)
        html = Path(scratch) / "build" / "html"  # myst-nb writes beside the folder that it is given
        app = Sphinx(folder, None, html, Path(scratch) / "doctrees", "html", settings, status=None, warningiserror=True, freshenv=True)
        app.build(force_all=True)
        if app.statuscode == 0:
            shutil.copytree(html, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".buildinfo", "objects.inv"))
            print(f"{len(list(out.rglob('*.html')))} pages; open {out / 'index.html'}")
        return app.statuscode


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(build(Path(sys.argv[1]).resolve()))

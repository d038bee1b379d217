"""What maintainers need: how to cite it, a clean tree, the versions of a paper run, a site that stands alone."""

import re
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_citation(settings):
    """CITATION.cff is YAML with what its schema asks for, and of this version."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["cff-version"] == "1.2.0" and cff["message"] and cff["title"] == settings["title"] and cff["authors"]
    assert str(cff["version"]) == settings["version"]
    assert cff["license"].lower() == settings["license"] and cff["repository-code"] == settings["git_url"]
    for reference in cff["references"]:
        assert {"type", "title", "authors", "year"} <= set(reference), reference["title"]
        assert reference["type"] != "conference-paper" or reference["conference"]["name"]


def test_references():
    """Every BibTeX entry has a key of its own, author, title and year, balanced braces and one field a line."""
    text = "\n".join(
        line
        for line in (ROOT / "nbs" / "references.bib").read_text(encoding="utf-8").splitlines()
        if not line.startswith("%")
    )
    entries = re.findall(r"^@(\w+)\{([\w]+),\n(.*?)^\}$", text, re.M | re.S)
    assert len(entries) == text.count("@") > 20
    keys = [key for _, key, _ in entries]
    assert len(set(keys)) == len(keys)
    for _, key, body in entries:
        fields = dict(re.findall(r"^  (\w+) = \{(.+)\},$", body, re.M))
        assert len(fields) == len(body.splitlines()), key
        assert {"author", "title", "year"} <= set(fields) and re.fullmatch(r"\d{4}", fields["year"]), key
        assert fields["year"] in key and all(value.count("{") == value.count("}") for value in fields.values()), key


def test_what_is_cited_has_an_entry():
    """The papers of CITATION.cff are in the BibTeX file too."""
    plain = lambda text: re.sub(r"[{}]", "", text).lower()
    titles = plain((ROOT / "nbs" / "references.bib").read_text(encoding="utf-8"))
    for reference in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]:
        assert plain(reference["title"]) in titles


def test_ruff():
    """The whole tree is clean, notebooks too."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_lock(settings):
    """Every requirement, the extras' too, is pinned to a version that satisfies it; no machine is in the file."""
    lines = (ROOT / ".ci" / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(
        re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)", line).groups() for line in lines if not line.startswith("#")
    )
    assert list(pins) == sorted(pins)
    wanted = [r for key, value in settings.items() if key.endswith("requirements") for r in value.split()]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pins and requirement.specifier.contains(pins[name], prereleases=True), (
            f"{requirement}: run python .ci/lock.py"
        )
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton"))]


LOADS = {
    "link": "href",
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
    "embed": "src",
}


class Page(HTMLParser):
    """The links of a page, what it loads, and the names that one can link to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.names = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if attrs.get(LOADS.get(tag)):
            self.loads.append(attrs[LOADS[tag]])
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", attrs.get("style") or "")


@pytest.mark.slow
def test_site(tmp_path):
    """The site is built, every link within it leads somewhere, and no page loads anything from elsewhere."""
    for needed in ("nbconvert", "latex2mathml"):
        pytest.importorskip(needed, reason="the docs extra is not installed")
    out = tmp_path / "site"
    done = subprocess.run([sys.executable, ROOT / ".ci" / "site.py", out], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["site"]
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in out.rglob("*.html")}
    notebooks = [
        p
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT / "nbs").parts)
    ]
    assert {p.relative_to(ROOT / "nbs").with_suffix(".html") for p in notebooks} <= {p.relative_to(out) for p in pages}
    for path, page in pages.items():
        for target in page.links + page.loads:
            url = urlsplit(target)
            if url.scheme == "data" or (
                target in page.links and target not in page.loads and url.scheme in ("http", "https", "mailto")
            ):
                continue
            assert not url.scheme and not url.netloc, f"{path.name} loads {target}"
            found = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert found.is_file(), f"{path.name}: {target}"
            if url.fragment and found in pages:
                # as a browser finds it: the name as it is written, then decoded
                assert {url.fragment, unquote(url.fragment)} & pages[found].names, f"{path.name}: {target}"
        assert not re.search(r"^#\|", re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8")), re.M), (
            f"{path.name} shows a directive"
        )
    for style in out.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name
    losses = (out / "11_losses.html").read_text(encoding="utf-8")
    assert "<math" in losses and "\\rho" not in losses and "$$" not in losses

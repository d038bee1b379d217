"""Files are replaced in one place: a writer elsewhere would have to repeat its promises."""
import ast
from pathlib import Path

import pytest

import smart_iqa
from smart_iqa.files import replacing, write_whole

PACKAGE = Path(smart_iqa.__file__).parent
MODULES = sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))
MOVES = {("os", "replace"), ("os", "rename"), ("os", "renames"), ("shutil", "move")}


def moves(source: str) -> list[str]:
    """The calls in a module that rename a file: of `os` and `shutil`, and `path.replace(target)` or
    `path.rename(target)`."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = getattr(node.func.value, "id", "")
        of_path = node.func.attr in ("replace", "rename") and len(node.args) == 1 and not node.keywords
        # str.replace has two arguments; columns of pandas are renamed by keyword, rename(index=name)
        if (owner, node.func.attr) in MOVES or of_path:
            calls.append(f"line {node.lineno}: {ast.unparse(node)}")
    return calls


@pytest.mark.parametrize(
    "source", ["os.replace(a, b)", "Path(a).replace(b)", "os.rename(a, b)", "(a / b).rename(c)", "shutil.move(a, b)"]
)
def test_every_way_to_rename_is_seen(source):
    assert len(moves(source)) == 1


@pytest.mark.parametrize("source", ["text.replace('a', 'b')", "frame.rename(columns=names)", "replace(cfg, seed=1)"])
def test_what_renames_no_file(source):
    assert not moves(source)


@pytest.mark.parametrize("module", MODULES)
def test_only_one_module_renames_files(module):
    calls = moves((PACKAGE / module).read_text(encoding="utf-8"))
    assert bool(calls) == (module == "files.py"), calls


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    write_whole(path, b"old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_bytes(b"ha")
        raise OSError("the disk is full")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "a.bin"
    write_whole(path, b"old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_bytes() == b"old"

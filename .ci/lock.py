"""Pin the environment: write .ci/requirements.lock, with every distribution that the package and its extras pull in, as
installed here.
"""

import platform
from collections.abc import Iterable
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

root = Path(__file__).resolve().parent.parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")

HEADER = """\
# The environment of the tests and of a paper run, written by .ci/lock.py on Python {python}, {system}. As a constraint:
#
#     pip install -c .ci/requirements.lock ".[batch]"
#
# Local version suffixes (+cu130) are dropped, and so is what exists for one kind of GPU only (CUDA libraries, Triton):
# PyTorch asks for those itself, pinned or nearly so, and pip installs them where they belong.
"""
GPU = ("nvidia-", "cuda-", "triton")


def pinned(
    wanted: Iterable[str],  # requirements, as in settings.ini
) -> dict[str, str]:  # name to public version, of these and of all that they require here
    "What is installed for these requirements, without the parts of one GPU's maker."
    found, queue, seen = {}, [Requirement(w) for w in wanted], set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name.startswith(GPU):
            continue
        installed = distribution(name)
        found[name] = Version(installed.version).public
        for extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            needs = [Requirement(r) for r in installed.requires or ()]
            queue += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    wanted = [r for key, value in config["DEFAULT"].items() if key.endswith("requirements") for r in value.split()]
    lines = [f"{name}=={version}" for name, version in pinned(wanted).items()]
    text = HEADER.format(python=platform.python_version(), system=platform.system()) + "\n".join(lines) + "\n"
    (root / ".ci" / "requirements.lock").write_text(text, encoding="utf-8")

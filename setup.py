"""Packaging: everything that varies stands in settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_name"]

# The wheel carries the experiment notebooks, so that `smart-iqa run` works after a plain install.
# In a checkout they are read from nbs/experiments; here setuptools maps that folder into the package.
setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="MIT",
    packages=[*find_packages(include=[lib, f"{lib}.*"]), f"{lib}.experiments"],
    package_dir={f"{lib}.experiments": "nbs/experiments"},
    package_data={f"{lib}.experiments": ["*.ipynb"], lib: ["data_files/*", "weights/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "lab": cfg["lab_requirements"].split(),
        # each of these adds to the research half
        **{
            extra: f"{cfg['lab_requirements']} {cfg[f'{extra}_requirements']}".split()
            for extra in ("dev", "batch", "export", "paper")
        },
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
        "pyiqa.archs": [f"{lib}={lib}.app.plugins:register_pyiqa"],
    },
    zip_safe=False,
)

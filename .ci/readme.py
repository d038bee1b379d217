"""Make README.md from nbs/index.ipynb. With --print: write it to standard output instead."""
import sys
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).resolve().parent.parent
config = Config(MarkdownExporter=dict(preprocessors=["nbconvert.preprocessors.RegexRemovePreprocessor"]),
                RegexRemovePreprocessor=dict(patterns=[r"^#\|\s*hide"]))
text, _ = MarkdownExporter(config=config).from_filename(str(root / "nbs" / "index.ipynb"))
text = text.replace("](images/", "](nbs/images/").replace("](experiments/", "](nbs/experiments/").replace("](results/", "](nbs/results/")
text = "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"
for path in sorted((root / "nbs").glob("[0-9]*.ipynb")):  # links between notebooks, seen from the top level
    text = text.replace(f"]({path.name})", f"](nbs/{path.name})")
if "--print" in sys.argv:
    sys.stdout.write(text)
else:
    (root / "README.md").write_text(text, encoding="utf-8")

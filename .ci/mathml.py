"""A Sphinx extension: formulas as MathML, made while the site is built, so that a page needs no script and no network."""
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging


def mathml(tex: str, display: str, where: nodes.Node) -> str:
    "One formula. A command that the converter does not know stays in its output with its backslash: a warning, so the build fails."
    out = convert(tex, display=display)
    if "\\" in out or "&#x0005C;" in out:
        logging.getLogger(__name__).warning("formula not understood: %s", tex, location=where)
    return out


def inline(writer, node):
    writer.body.append(mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def block(writer, node):
    writer.body.append(f'<div class="formula">{mathml(node.astext(), "block", node)}</div>\n')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return dict(version="1", parallel_read_safe=True, parallel_write_safe=True)

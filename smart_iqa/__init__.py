"""Blind image quality assessment.

`create_scorer` scores photographs; `SmartIQA` and `HyperIQA` are the models; `load_checkpoint` reads them.
"""
__version__ = "0.1.0"

import importlib

_HOMES = {"SmartIQA": "model", "HyperIQA": "model", "load_checkpoint": "model", "create_scorer": "app.engines"}
__all__ = ["HyperIQA", "SmartIQA", "create_scorer", "load_checkpoint"]


def __getattr__(name: str):  # torch takes seconds to import: only who asks for a model waits
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as e:
        if (e.name or "").startswith(__name__):
            raise
        raise ImportError(f"smart_iqa.{name} needs {e.name}, which scoring photographs does not: "
                          f"pip install 'smart-iqa[lab]'") from None


def __dir__():
    return sorted([*globals(), *__all__])

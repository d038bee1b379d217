"""Blind image quality assessment.

`create_scorer` scores photographs; `SmartIQA` and `HyperIQA` are the models; `load_checkpoint` reads them.
"""
__version__ = "0.1.0"

import importlib

_HOMES = {"SmartIQA": "model", "HyperIQA": "model", "load_checkpoint": "model", "create_scorer": "app.scoring"}
__all__ = ["HyperIQA", "SmartIQA", "create_scorer", "load_checkpoint"]


def __getattr__(name: str):  # torch takes seconds to import: only who asks for a model waits
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])

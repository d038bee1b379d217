__version__ = "0.1.0"

from .model import HyperIQA, SmartIQA, load_checkpoint

__all__ = ["HyperIQA", "SmartIQA", "load_checkpoint"]

__version__ = "0.1.0"

from .model import HyperIQA, SmartIQA, load_checkpoint
from .scoring import create_scorer

__all__ = ["HyperIQA", "SmartIQA", "create_scorer", "load_checkpoint"]

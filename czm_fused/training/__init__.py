"""The reference training of the paper's networks, and `train` for your own."""

from .config import Config
from .errors import DivergedError, TrainingError
from .run import TrainingResult, train

__all__ = ["Config", "DivergedError", "TrainingError", "TrainingResult", "train"]

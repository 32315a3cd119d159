"""Train an adapter on labelled text."""

from propulsion_export.training.loop import Progress
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.trainer import TrainResult, train

__all__ = ["Progress", "TrainOptions", "TrainResult", "train"]

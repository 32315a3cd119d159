"""Train an adapter on labelled examples, texts, or prompts with responses."""

from propulsion_export.environment.progress import Progress
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.trainer import TrainResult, train

__all__ = ["Progress", "TrainOptions", "TrainResult", "train"]

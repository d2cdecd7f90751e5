"""``linear_preference_loss``: the loss of a preference objective straight from hidden states, gradients included."""

from .grouping import LossPlan, plan
from .op import linear_preference_loss

__all__ = ["LossPlan", "linear_preference_loss", "plan"]

"""The op ``preference_loss``: token log-probs, sequences and tuples of them -> the loss of a preference objective."""

from .op import preference_loss, sequence_scores

__all__ = ["preference_loss", "sequence_scores"]

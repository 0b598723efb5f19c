"""A minimal reference RL loop around the loss: `train.py` is the whole algorithm, top to bottom."""

from prefixloss.check import UsageError

__all__ = ["UsageError"]

"""A minimal reference RL loop around the loss: `train.py` is the whole algorithm, top to bottom."""


class UsageError(ValueError):
    """An argument that cannot work, found before any work was done; the message names it."""

"""Gradient tolerances at work at any size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from prefixloss.backends.torch import entries


@contextmanager
def leaving_out() -> Iterator[None]:
    """Within it a tolerance leaves out whatever it may. The package does not where dense products are faster, as they
    are for a tiny model's few tokens."""
    with patch.multiple(entries, _DENSE=1, _LOOKED_AT=1):
        yield

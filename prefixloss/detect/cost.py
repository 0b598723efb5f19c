"""What asking models costs: calls and tokens, counted wherever a detector asks one."""

from __future__ import annotations

import threading
from typing import NamedTuple


class Cost(NamedTuple):
    """calls: requests to a server, or responses and prompts read by a model in this process. tokens: those read and
    written; a server that does not say how many counts none."""

    calls: int = 0
    tokens: int = 0

    def since(self, before: Cost) -> Cost:
        return Cost(self.calls - before.calls, self.tokens - before.tokens)


_LOCK = threading.Lock()
_total = Cost()


def spend(calls: int, tokens: int) -> None:
    """Adds to what this process has spent."""
    global _total  # noqa: PLW0603
    with _LOCK:
        _total = Cost(_total.calls + calls, _total.tokens + tokens)


def spent() -> Cost:
    """All that this process has spent so far."""
    return _total

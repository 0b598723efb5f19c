"""How much work a call may do, in its own processor time: a busy machine makes it wait, not work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fails if the block takes this thread longer, waiting not counted. Give ten times what it takes: processors differ
    and share their caches, while what grows with the square of a large text takes minutes."""
    start = time.thread_time()
    yield
    took = time.thread_time() - start
    assert took < seconds, f"{took:.1f} s of processor time, expected less than {seconds:g}"

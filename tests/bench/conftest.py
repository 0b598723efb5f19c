"""What the commands of the benchmark change in their process."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A run and a command set those of their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

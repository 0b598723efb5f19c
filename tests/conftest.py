"""Kernels run on the GPU where there is one, else on CPU tensors in Triton's interpreter, which is chosen at import."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter computes with NumPy, which warns where a kernel means to divide by 0 or to overflow."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"))


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    """What a test changes in torch itself makes another one fail, one day, in another order."""
    before = state_of_torch()
    yield
    assert state_of_torch() == before


def state_of_torch() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
        # a replaced `Tensor.__getitem__` leaves tensors that Python takes for sequences, and this fails
        torch.tensor([torch.tensor(0)]).tolist(),
    )

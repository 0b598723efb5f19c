"""Kernels run on the GPU where there is one, else on CPU tensors in Triton's interpreter, which is chosen at import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter computes with NumPy, which warns where a kernel means to divide by 0 or to overflow."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"))

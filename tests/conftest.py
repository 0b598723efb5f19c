"""Kernels run on the GPU where there is one, else on CPU tensors: in Triton's interpreter, or with `--emulate` as PTX.

Which one is chosen before the first kernel is loaded.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption("--emulate", action="store_true", help="run kernels as sm_90 code in tests/ptx_emulator")
    group.addoption("--figures", metavar="FILE", help="with --emulate: where to write what ran, as JSON")
    group.addoption("--noise", type=int, default=0, help="with --emulate: seed of approximate instructions' errors")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("emulate"):
        _emulate(config)
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def _emulate(config: pytest.Config) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    from ptx_emulator import Emulator  # noqa: PLC0415 (after the choice)

    from prefixloss import door  # noqa: PLC0415

    config.emulator = Emulator(config.getoption("noise"))
    config.emulator.install()
    door._interpreted = lambda: True  # the back-end takes CPU tensors


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the emulator ran: in this process, or in those that tests started."""
    config = terminalreporter.config
    if emulator := getattr(config, "emulator", None):
        terminalreporter.write_line(f"emulated: {emulator.figures}")
        if path := config.getoption("figures"):
            Path(path).write_text(json.dumps({**vars(emulator.figures), "variants": sorted(emulator.figures.variants)}))
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "emulated":
                terminalreporter.write_line(f"emulated, {report.nodeid.partition('::')[2]}: {value}")


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

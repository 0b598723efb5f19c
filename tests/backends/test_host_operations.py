"""How many operations a call sends to a device: below a thousand tokens it takes as long as the host takes for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefixloss import LossOutput, TokenAdvantages, linear_prefix_loss, prefix_loss

B, T, D, V = 3, 7, 8, 33
# nothing is launched for these
VIEWS = {
    "alias", "as_strided", "detach", "expand", "select", "slice", "split", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "_unsafe_view", "scalar_tensor",
}  # fmt: skip


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sent.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[list[str]]:
    """The operations that are no views; our own operators are one each."""
    sent: list[str] = []
    with Counter() as counter:
        yield sent
    sent += [name for name in counter.sent if name not in VIEWS]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def advantages(kind: str) -> Any:
    if kind == "of tokens":
        return randn(B, T)
    return randn(B) if kind == "of responses" else TokenAdvantages(randn(B), randn(B), torch.tensor([0, 2, 3]))


def from_hidden(**arguments: Any) -> LossOutput:
    return linear_prefix_loss(randn(B, T, D).requires_grad_(), randn(V, D).requires_grad_(), **arguments)


def from_logits(**arguments: Any) -> LossOutput:
    return prefix_loss(randn(B, T, V).requires_grad_(), **arguments)


TOKENS = torch.arange(B * T).reshape(B, T)
RECORDED = {"mask": TOKENS % 7 < 5, "old_logps": randn(B, T) - 3}


# as many as there are; 73 to 93 before metrics came from two sums and padded responses without a search
@pytest.mark.parametrize(
    ("call", "kind", "recorded", "most"),
    [
        (from_hidden, "of responses", {}, 35),
        (from_hidden, "of tokens", RECORDED, 33),
        (from_hidden, "of prefixes", RECORDED, 42),
        (from_logits, "of responses", {}, 34),
        (from_logits, "of responses", RECORDED, 33),
        (from_logits, "of prefixes", RECORDED, 41),
    ],
)
def test_a_call_of_the_kernels_sends_few_operations(
    call: Callable[..., LossOutput], kind: str, recorded: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixloss.check.readable", lambda *_: False)  # as on an accelerator
    given = advantages(kind)
    with counted() as sent:
        call(tokens=TOKENS, advantages=given, backend="triton", **recorded)
    made = [name for name in sent if name not in ("randn", "requires_grad_")]
    assert sum(name in ("linear_loss", "logit_loss") for name in made) == 1
    assert len(made) <= most, made


def test_values_are_looked_at_once_for_all_arguments() -> None:
    recorded = {"old_logps": randn(B, T), "sampler_logps": randn(B, T), "ref_logps": randn(B, T)}
    looks = {}
    for name, given in (("one", {}), ("four", recorded)):
        with counted() as sent:
            from_hidden(tokens=TOKENS, advantages=advantages("of tokens"), backend="triton", **given)
        looks[name] = sent.count("_local_scalar_dense") + sent.count("is_nonzero")
    assert looks["one"] == looks["four"] > 0

"""What is timed, by name: how a method's step is made, and what the harness knows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .from_hidden import bare_products, compiled, cut_cross_entropy, liger, naive, ours, picked, torch_fused, trl
from .from_logits import (
    compiled_from_logits,
    copy_logits,
    copy_logits_anew,
    liger_from_logits,
    liger_inplace,
    naive_from_logits,
    ours_from_logits,
    ours_inplace,
    trl_from_logits,
)
from .step import Step


@dataclass(frozen=True)
class Method:
    """How to make a method's step from `Linear` or `Logits`, and what it needs.

    needs: what must be installed, and the module that shows it. gpu_only: why it runs on no CPU. by_token: whether
    it takes an advantage a token. skips: whether tokens that cannot learn are left out of its products. products: of
    N x D x V, in a call. whole: what it must hold at once of [N, V], bytes an entry. compiles: by torch.compile, at its
    first call.
    """

    label: str
    make: Callable[[Any], Step]
    needs: tuple[str, str] | None = None
    floor: bool = False
    gpu_only: str = ""
    by_token: bool = True
    softcap: bool = True
    skips: bool = False
    products: int = 3
    whole: float = 0.0
    compiles: bool = False


TORCH = ("torch >= 2.13", "torch.nn.modules.linear_cross_entropy")
TRL, LIGER, CCE = ("trl", "trl"), ("liger-kernel", "liger_kernel"), ("cut-cross-entropy", "cut_cross_entropy")
KERNELS = "its Triton kernels need a GPU"
OURS, FLOOR = "ours", "floor"
# by where the loss starts, then by name
METHODS: dict[str, dict[str, Method]] = {
    "hidden": {
        FLOOR: Method("bare products, learning tokens", bare_products, floor=True, skips=True, whole=2),
        OURS: Method("prefixloss", ours, skips=True),
        "naive": Method("PyTorch", naive, whole=8),
        "picked": Method("PyTorch, learning rows only", picked, skips=True, whole=8),
        "compiled": Method("PyTorch, compiled", compiled, whole=4, compiles=True),
        "torch": Method("torch linear_cross_entropy", torch_fused, needs=TORCH, softcap=False, products=4),
        "trl": Method("TRL chunked log-probs", trl, needs=TRL, products=4),
        "liger": Method(
            "Liger chunked GRPO", liger, needs=LIGER, by_token=False, softcap=False, products=4, compiles=True
        ),
        "cce": Method("Cut Cross-Entropy", cut_cross_entropy, needs=CCE, skips=True, compiles=True),
    },
    "logits": {
        FLOOR: Method("bare copy", copy_logits, floor=True, products=0, whole=2),
        "new-copy": Method("bare copy into new memory", copy_logits_anew, floor=True, products=0, whole=2),
        OURS: Method("prefixloss", ours_from_logits, products=0, whole=2),
        "ours-inplace": Method("prefixloss, in place", ours_inplace, products=0),
        "naive": Method("PyTorch", naive_from_logits, products=0, whole=6),
        "compiled": Method("PyTorch, compiled", compiled_from_logits, products=0, whole=2, compiles=True),
        "trl": Method("TRL selective_log_softmax", trl_from_logits, needs=TRL, gpu_only=KERNELS, products=0, whole=2),
        "liger": Method("Liger Triton GRPO", liger_from_logits, needs=LIGER, gpu_only=KERNELS, products=0, whole=2),
        "liger-inplace": Method(
            "Liger Triton GRPO, in place", liger_inplace, needs=LIGER, gpu_only=KERNELS, products=0
        ),
    },
}
NAMES = tuple(dict.fromkeys(name for methods in METHODS.values() for name in methods))

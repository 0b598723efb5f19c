"""Several processes give the gradient of one with the whole batch: data parallel, sharded, split by vocabulary, and
with responses that span processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import group_of, in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from prefixloss import LossConfig, TokenAdvantages, linear_prefix_loss, prefix_loss
from prefixloss.maths import reductions
from prefixloss.parallel import global_normalizer

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="the processes talk through gloo")

B, T, D, V = 8, 5, 6, 12
REDUCTIONS = [name for name in reductions.BY_NAME if name != "none"]  # which has no denominator
# sums of a few dozen float32 products in another order
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


class Policy(nn.Module):
    """The loss is computed in the model's own forward, so that the wrappers' hooks fire."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, weight: Tensor | None = None, **loss: Any) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(ids)))
        return linear_prefix_loss(hidden, self.head.weight if weight is None else weight, **loss).loss


def batch() -> dict[str, Tensor]:
    """Ragged lengths; the last two responses learn nothing, the two before have no token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (B, T), generator=generator)
    tokens = torch.randint(V, (B, T), generator=generator)
    lengths = torch.tensor([5, 1, 3, 4, 0, 0, 2, 5])
    advantages = torch.randn(B, generator=generator)
    advantages[6:] = 0
    return {
        "ids": ids, "tokens": tokens, "mask": torch.arange(T) < lengths[:, None], "advantages": advantages,
        "old_logps": torch.randn(B, T, generator=generator) * 0.1 - 2.5, "group_ids": torch.arange(B) // 2,
    }  # fmt: skip


def whole_gradients(config: LossConfig, tied: bool) -> dict[str, Tensor]:
    model = Policy(tied)
    model(**batch(), config=config).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def configs() -> list[LossConfig]:
    return [LossConfig(reduction=r, max_length=T if r == "constant" else None) for r in REDUCTIONS]  # type: ignore[arg-type]


def part_of(rows: slice, config: LossConfig) -> dict[str, Any]:
    mine: dict[str, Any] = {name: x[rows] for name, x in batch().items()}
    given = {name: mine[name] for name in ("tokens", "mask", "group_ids")}
    return {**mine, "config": config, "normalizer": global_normalizer(config, **given)}


def check(model: nn.Module, want: dict[str, Tensor], note: str) -> None:
    """Parameters may be sharded, and wrapped."""
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, f"{note} {name}"
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(
            grad, want[name.removeprefix("module.")], msg=lambda m, n=name: f"{note} {n}: {m}", **CLOSE
        )


def data_parallel(rank: int, size: int, file: str) -> None:
    with group_of(rank, size, file):
        mesh = init_device_mesh("cpu", (size,))
        rows = slice(rank * B // size, (rank + 1) * B // size)
        for config in configs():
            for tied in (False, True):
                want = whole_gradients(config, tied)
                wrapped = DistributedDataParallel(Policy(tied))
                wrapped(**part_of(rows, config)).backward()
                check(wrapped, want, f"DDP {config.reduction}")

                sharded = Policy(tied)
                fully_shard(sharded, mesh=mesh)
                sharded(**part_of(rows, config)).backward()
                check(sharded, want, f"FSDP2 {config.reduction}")


@pytest.mark.parametrize("size", [2, 4])
def test_ddp_and_fsdp_give_the_whole_batch_s_gradient_for_every_reduction(size: int, tmp_path: Path) -> None:
    in_processes(data_parallel, size, tmp_path)


def accumulation(rank: int, size: int, file: str) -> None:
    with group_of(rank, size, file):
        mesh = init_device_mesh("cpu", (size,))
        config, want = LossConfig(), whole_gradients(LossConfig(), tied=True)
        halves = [slice(start, start + 2) for start in (4 * rank, 4 * rank + 2)]
        parts = [part_of(rows, config) for rows in halves]
        normalizer = sum(part["normalizer"] for part in parts)
        model = Policy(tied=True)
        fully_shard(model, mesh=mesh)
        for number, part in enumerate(parts):
            model.set_requires_gradient_sync(number == len(parts) - 1)
            model(**{**part, "normalizer": normalizer}).backward()
        check(model, want, "FSDP2, two micro-batches")


def test_gradient_accumulation_adds_up_to_the_whole_batch(tmp_path: Path) -> None:
    in_processes(accumulation, 2, tmp_path)


def data_and_vocabulary(rank: int, size: int, file: str) -> None:
    with group_of(rank, size, file):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
        data, vocabulary = mesh["data"].get_group(), mesh["vocabulary"].get_group()
        here = dist.get_rank(vocabulary)
        columns = slice(0, 7) if here == 0 else slice(7, V)
        rows = slice(dist.get_rank(data) * 4, dist.get_rank(data) * 4 + 4)
        for config in configs():
            want = whole_gradients(config, tied=False)
            model = Policy(tied=False)
            weight = model.head.weight.detach()[columns].clone().requires_grad_()
            mine: dict[str, Any] = {name: x[rows] for name, x in batch().items()}
            given = {name: mine[name] for name in ("tokens", "mask", "group_ids")}
            normalizer = global_normalizer(config, **given, group=data, averaged=False)
            model(**mine, weight=weight, tp_group=vocabulary, config=config, normalizer=normalizer).backward()
            grads = {
                "embed.weight": model.embed.weight.grad,
                "body.weight": model.body.weight.grad,
                "head": weight.grad,
            }
            for name, grad in grads.items():
                assert grad is not None
                dist.all_reduce(grad, group=data)
                expected = want["head.weight"][columns] if name == "head" else want[name]
                torch.testing.assert_close(grad, expected, **CLOSE)


def test_data_and_vocabulary_parallel_together(tmp_path: Path) -> None:
    in_processes(data_and_vocabulary, 4, tmp_path)


# responses that span processes

ACROSS = [
    (LossConfig(), None),
    (LossConfig(reduction="seq-mean-token-mean", ratio_level="sequence", kl="k3", kl_coef=0.1), "pair"),
    (LossConfig(reduction="group-token-mean"), "pair"),
    (LossConfig(reduction="seq-mean-token-sum", ratio_level="sequence"), "response"),
]
PAIR = TokenAdvantages(torch.linspace(0.1, 0.8, B), torch.linspace(-1, -0.3, B), torch.tensor([0, 1, 2, 3, 1, 0, 2, 4]))


def across_arguments(config: LossConfig, kind: str | None) -> dict[str, Any]:
    given = batch()
    given.pop("ids")
    advantages: Any = {None: given["advantages"][:, None].expand(B, T), "response": given["advantages"], "pair": PAIR}
    return {**given, "advantages": advantages[kind], "ref_logps": given["old_logps"] + 0.2, "config": config}


def responses_across(rank: int, size: int, file: str) -> None:
    with group_of(rank, size, file) as group:
        cuts = [0, 2, 3, T] if size == 3 else [0, 1, T]
        mine = slice(cuts[rank], cuts[rank + 1])
        logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(5))
        for backend in ("torch", "triton"):
            for config, kind in ACROSS:
                whole = across_arguments(config, kind)
                leaf = logits.clone().requires_grad_()
                out = prefix_loss(leaf, **whole, backend="torch")
                out.loss.backward()
                assert leaf.grad is not None
                part = {name: x[:, mine] if isinstance(x, Tensor) and x.dim() == 2 else x for name, x in whole.items()}
                here = logits[:, mine].clone().requires_grad_()
                share = prefix_loss(here, **part, cp_group=group, backend=backend).loss
                share.backward()
                note = f"{backend}, {config}"
                torch.testing.assert_close(here.grad, leaf.grad[:, mine], msg=lambda m, n=note: f"{n}: {m}", **CLOSE)
                total = share.detach().clone()
                dist.all_reduce(total)
                torch.testing.assert_close(total, out.loss.detach(), **CLOSE)


def data_and_context(rank: int, size: int, file: str) -> None:
    with group_of(rank, size, file):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
        context = mesh["context"].get_group()
        rows = slice(4 * mesh["data"].get_local_rank(), 4 * mesh["data"].get_local_rank() + 4)
        columns = slice(0, 2) if dist.get_rank(context) == 0 else slice(2, T)
        for config in configs():
            given = batch()
            given["advantages"] = given["advantages"][:, None].expand(B, T)
            mine: dict[str, Any] = {n: x[rows] if x.dim() == 1 else x[rows, columns] for n, x in given.items()}
            counted = {name: mine[name] for name in ("tokens", "mask", "group_ids")}
            normalizer = global_normalizer(config, **counted, cp_group=context)
            wrapped = DistributedDataParallel(Policy(tied=True))
            wrapped(**mine, config=config, normalizer=normalizer, cp_group=context).backward()
            check(wrapped, whole_gradients(config, tied=True), f"DDP, context parallel, {config.reduction}")


def test_data_and_context_parallel_together(tmp_path: Path) -> None:
    in_processes(data_and_context, 4, tmp_path)


def test_a_group_has_to_be_one() -> None:
    given = across_arguments(LossConfig(), None)
    with pytest.raises(TypeError, match="cp_group: got 3"):
        prefix_loss(torch.zeros(B, T, V), **given, cp_group=3)


@pytest.mark.parametrize("size", [2, 3])
def test_a_response_may_span_processes(size: int, tmp_path: Path) -> None:
    in_processes(responses_across, size, tmp_path)


# the normaliser alone


def shared_group(rank: int, size: int, file: str) -> None:
    with group_of(rank, size, file):
        config = LossConfig(reduction="group-token-mean")
        tokens = torch.zeros(2, 2, dtype=torch.int64)
        # the last rank has none of group 7, and must not be left waiting
        with pytest.raises(ValueError, match="group_ids: got group 7 on several ranks"):
            global_normalizer(config, tokens, group_ids=torch.tensor([[7, 1], [7, 2], [3, 4]][rank]))
        some = global_normalizer(LossConfig(), tokens, averaged=False)
        nobody = global_normalizer(LossConfig(), tokens, mask=tokens, averaged=False)
        assert (some + nobody).item() == some.item() == 4 * size
        logits = torch.randn(2, 2, V, requires_grad=True)
        loss = prefix_loss(logits, tokens, torch.ones(2), mask=tokens, normalizer=nobody).loss
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert not logits.grad.any()


def test_a_group_on_several_ranks_is_refused_on_all_and_a_batch_without_a_token_counts_as_none(tmp_path: Path) -> None:
    in_processes(shared_group, 3, tmp_path)

"""The patched model in DDP and FSDP2: several processes have the gradient of one with the whole batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import group_of, in_processes

pytest.importorskip("transformers", reason="these tests patch models of transformers")

from tiny_models import SINGLE, B, assert_same_gradients, batch, gradients, seen, tiny
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from prefixloss import LossConfig, TokenAdvantages
from prefixloss.integrations.transformers import PrefixBatch, patch_model
from prefixloss.parallel import global_normalizer

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="the processes talk through gloo")

WHOLE = LossConfig(kl="k3", kl_coef=0.2)


def part_of(rows: slice) -> tuple[dict[str, Any], PrefixBatch]:
    whole = batch()
    tensors = {name: getattr(whole, name)[rows] for name in ("mask", "old_logps", "ref_logps")}
    normalizer = global_normalizer(WHOLE, tensors["mask"].long(), mask=tensors["mask"])
    mine = PrefixBatch(
        advantages=TokenAdvantages(*(x[rows] for x in whole.advantages)), normalizer=normalizer, **tensors
    )
    return {name: x[rows] for name, x in seen().items()}, mine


def sharded(name: str) -> Any:
    """Patched before it is sharded: layers, root, and the head alone where it is not tied."""
    model = tiny(name, torch.float32)
    patch_model(model, WHOLE)
    for layer in model.model.layers:
        fully_shard(layer)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        fully_shard(model.lm_head)
    fully_shard(model)
    return model


def assert_whole(model: Any, want: dict[str, torch.Tensor]) -> None:
    whole = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        whole[name.removeprefix("module.")] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    assert_same_gradients(whole, want, **SINGLE)


def parallel(rank: int, size: int, file: str) -> None:
    with group_of(rank, size, file):
        rows = slice(rank * B // size, (rank + 1) * B // size)
        for name in ("qwen2", "qwen2-tied"):
            model = tiny(name, torch.float32)
            undo = patch_model(model, WHOLE)
            want = gradients(model, model(**seen(), prefix_loss=batch()).loss)
            undo()
            given, mine = part_of(rows)

            model.zero_grad()
            wrapped = DistributedDataParallel(model)
            patch_model(wrapped, WHOLE)
            wrapped(**given, prefix_loss=mine).loss.backward()
            assert_whole(wrapped, want)

            model = sharded(name)
            model(**given, prefix_loss=mine).loss.backward()
            assert_whole(model, want)

            # a ratio over the response needs the head once more, in the backward
            model.zero_grad()
            sequence = replace(WHOLE, ratio_level="sequence")
            model(**given, prefix_loss=mine.replace(config=sequence)).loss.backward()
            alone = tiny(name, torch.float32)
            patch_model(alone, sequence)
            assert_whole(model, gradients(alone, alone(**seen(), prefix_loss=batch()).loss))

            # a response at a time, two to a process
            model.zero_grad()
            parts = [part_of(slice(i, i + 1)) for i in range(rows.start, rows.stop)]
            total = sum(mine.normalizer for _, mine in parts)
            for number, (given, mine) in enumerate(parts):
                model.set_requires_gradient_sync(number == len(parts) - 1)
                model(**given, prefix_loss=mine.replace(normalizer=total)).loss.backward()
            assert_whole(model, want)

        # sharded first, patched (and looked at) then
        late = tiny("qwen2-tied", torch.float32)
        for module in (*late.model.layers, late):
            fully_shard(module)
        patch_model(late, WHOLE)
        given, mine = part_of(rows)
        late(**given, prefix_loss=mine).loss.backward()
        assert_whole(late, want)
        with_adapters(rows)
        in_half_precision(rank)


def with_adapters(rows: slice) -> None:
    """LoRA on body and head, in parts like the rest; patched before it is sharded, or through PEFT's wrapper after."""
    peft = pytest.importorskip("peft")

    def adapted(name: str) -> Any:
        model = tiny(name, torch.float32)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        return peft.get_peft_model(model, settings)

    given, mine = part_of(rows)
    for name, late in (("qwen2", False), ("qwen2-tied", True)):
        alone, model = adapted(name), adapted(name)
        model.load_state_dict(alone.state_dict())
        patch_model(alone, WHOLE)
        want = gradients(alone, alone(**seen(), prefix_loss=batch()).loss)
        inner = model.get_base_model()
        if not late:
            patch_model(model, WHOLE)
            fully_shard(inner.lm_head)
        for layer in inner.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if late:
            patch_model(model, WHOLE)
        model(**given, prefix_loss=mine).loss.backward()
        whole = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        assert_same_gradients(whole, want, **SINGLE)


def in_half_precision(rank: int) -> None:
    """FSDP2 casts what a module is given: a PrefixBatch stays as it is, and a dict's log-probs are refused."""
    given, mine = part_of(slice(rank * 2, rank * 2 + 2))
    mine = mine.replace(ref_logps=None, config=LossConfig())
    model = tiny("qwen2", torch.float32)
    patch_model(model)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    out = model(**given, prefix_loss=mine)
    assert out.loss.dtype == torch.float32
    # the policy's own log-probs give ratios of exactly 1, and would not once they are rounded
    again = model(**given, prefix_loss=mine.replace(old_logps=out.logps))
    assert again.metrics["ratio_max"] == again.metrics["ratio_mean"] == 1
    out.loss.backward()
    with pytest.raises(TypeError, match=r"^old_logps: got bfloat16 .*never a PrefixBatch"):
        model(**given, prefix_loss=vars(mine))


def test_ddp_and_fsdp_have_the_gradient_of_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    """And mixed precision leaves recorded log-probs alone. (One test: the processes take their time to start.)"""
    in_processes(parallel, 2, tmp_path)

"""verl's own training worker on a CPU: `python verl_worker.py FOLDER` leaves in out.pt what each kind of run did.

verl has no platform for a CPU, but registries for platforms and engines of others': a CPU is put there, under its FSDP2
engine. FSDP1 wants a GPU for `sync_module_states`. The model that is trained is in FOLDER.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VERL_PLATFORM": "cpu", "RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # the worker reads them, and does not connect

import torch
from torch import Tensor
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry

STEPS, RATE, ENTROPY, KL = 3, 1e-2, 0.01, 0.05
PROMPTS, RESPONSES = [2, 3, 1, 2], [3, 5, 4, 6]  # lengths
SCORES = [1.0, -3.0, 1.0, -5.0]  # wrong from the third and from the fifth token on
# policy loss, and whether our head is under verl's fused forward
KINDS = {"verl": ("vanilla", False), "loss": ("prefix_clip", False), "loss and head": ("prefix_clip", True)}


@PlatformRegistry.register("cpu")
class CPU(PlatformCUDA):  # type: ignore[misc]
    device_name, vendor_name, device_module = "cpu", "none", torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def communication_backend_name(self) -> str:
        return "gloo"


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def padded(parts: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def tokens(vocab: int) -> list[Tensor]:
    """Of each prompt and its response."""
    random = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocab, (p + r,), generator=random) for p, r in zip(PROMPTS, RESPONSES, strict=True)]


def batch(ids: list[Tensor], **more: list[Tensor]) -> Any:
    """As verl's trainer hands it to its workers: nested tensors without padding."""
    from verl.utils import tensordict_utils as tu  # noqa: PLC0415

    scored = [(torch.arange(len(i)) >= p).long() for i, p in zip(ids, PROMPTS, strict=True)]
    lists = {
        "input_ids": ids,
        "position_ids": [torch.arange(len(i)) for i in ids],
        "prompts": [i[:p] for i, p in zip(ids, PROMPTS, strict=True)],
        "responses": [i[p:] for i, p in zip(ids, PROMPTS, strict=True)],
        "response_mask": [torch.ones(r, dtype=torch.long) for r in RESPONSES],
        "loss_mask": scored,
        **more,
    }
    said = {"temperature": 1.0, "global_batch_size": 4, "max_response_length": max(RESPONSES)}
    said |= {"mini_batch_size": 4, "epochs": STEPS, "calculate_entropy": True, "compute_loss": False}
    return tu.get_tensordict({name: nested(parts) for name, parts in lists.items()}, non_tensor_dict=said)


def worker(folder: Path, loss_mode: str, fused: bool) -> Any:
    from verl.trainer.config import CheckpointConfig  # noqa: PLC0415
    from verl.workers import config  # noqa: PLC0415
    from verl.workers.engine_workers import TrainingWorker  # noqa: PLC0415
    from verl.workers.utils.losses import ppo_loss  # noqa: PLC0415

    model = config.HFModelConfig(
        path=str(folder), load_tokenizer=False, use_remove_padding=False, enable_gradient_checkpointing=False,
        use_fused_kernels=fused, fused_kernel_options={"impl_backend": "torch"},
        override_config={"attn_implementation": "eager"},
    )  # fmt: skip
    single = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    engine = config.FSDPEngineConfig(
        strategy="fsdp2", use_torch_compile=False, mixed_precision=single, use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2, infer_micro_batch_size_per_gpu=2,
    )  # fmt: skip
    made = TrainingWorker(
        config.TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=config.FSDPOptimizerConfig(lr=RATE, total_training_steps=STEPS, clip_grad=1.0),
            checkpoint_config=CheckpointConfig(),
        )
    )
    made.reset()
    actor = config.ActorConfig(
        strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2, entropy_coeff=ENTROPY, use_kl_loss=True,
        kl_loss_coef=KL, policy_loss=config.PolicyLossConfig(loss_mode=loss_mode),
    )  # fmt: skip
    made.set_loss_fn(partial(ppo_loss, actor))
    return made


def run(folder: Path, loss_mode: str, head: bool) -> dict[str, Any]:
    """Log-probs by the worker, VPPO's advantages by verl's registry, then updates: all that a step of training has but
    the sampling."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn  # noqa: PLC0415
    from verl.utils import tensordict_utils as tu  # noqa: PLC0415

    torch.manual_seed(0)
    actor = worker(folder, loss_mode, head)
    ids = tokens(actor.model_config.hf_config.vocab_size)
    old = tu.get(actor.infer_batch(batch(ids)), "log_probs").unbind()
    # position t predicts token t + 1
    old = [row[p - 1 : -1] for row, p in zip(old, PROMPTS, strict=True)]
    mask = padded([torch.ones(r) for r in RESPONSES])
    rewards = padded(
        [torch.nn.functional.pad(torch.tensor([s]), (r - 1, 0)) for s, r in zip(SCORES, RESPONSES, strict=True)]
    )
    a, _ = get_adv_estimator_fn("vppo")(rewards, mask, config={}, index=["a", "a", "b", "b"])
    given = {
        "old_log_probs": old,
        "ref_log_prob": old,
        "advantages": [x[:r] for x, r in zip(a, RESPONSES, strict=True)],
    }
    metrics = tu.get(actor.train_mini_batch(batch(ids, **given)), "metrics")
    weights = [w.full_tensor().detach() for w in actor.engine.module.parameters()]
    return {
        "losses": metrics["loss"], "norms": metrics["grad_norm"], "names": sorted(metrics), "old": padded(old),
        "advantages": a, "weights": torch.cat([w.flatten() for w in weights]),
    }  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.cpu.max_memory_allocated = torch.cpu.max_memory_reserved = lambda: 0  # type: ignore[attr-defined]
    # verl would name the CPU's backend twice, as its own and as the device's
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from verl.models.transformers import monkey_patch  # noqa: PLC0415
    from verl.workers.engine.base import EngineRegistry  # noqa: PLC0415
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: PLC0415

    from prefixloss.integrations import verl  # noqa: PLC0415

    EngineRegistry.register("language_model", "fsdp2", "cpu")(FSDPEngineWithLMHead)
    monkey_patch.is_trl_available = lambda: False  # it imports a model that TRL 1.16 does not have
    verl.patch_head()
    torch.save({kind: run(folder, *given) for kind, given in KINDS.items()}, folder / "out.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

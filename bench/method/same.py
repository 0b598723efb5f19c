"""Same loss, same run: a trainer's own loss beside ours, step by step from the same start; here TRL's GRPO trainer.

Both sample with the same random numbers. Two sums in another order differ in the last bit, and training carries that
on; were a formula different, the first step would show it.
"""

from __future__ import annotations

import json
import os
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from prefixloss.io.files import write_whole

from .show import interval

WHO = ("theirs", "ours")
PROMPTS = ["1 + 2 = 3\n", "so it is 4.\n", "What is 7 - 3?", "Step 1: 5 + 5 = 10\n"]
COMMAND = "python -m bench.method same"
_KEPT = ("loss", "grad_norm", "reward")  # of a log; rewards are in those of steps that sample


class Curves(NamedTuple):
    """A run: what it logged at each step, its weights at the start and at the end, and the seconds it took."""

    logs: list[dict[str, float]]
    start: Any
    end: Any
    seconds: float


def reward(completions: list[str], **_: Any) -> list[float]:
    """Of a random model's texts about half earn it."""
    return [float(sum(c in "aeiou0123" for c in text) % 2) for text in completions]


def tokenizer() -> Any:
    """One token a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    words = ["<pad>", "<eos>", "<unk>", *sorted(set(string.printable))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model_of(words: Any) -> Any:
    """A tiny Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    shape = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def run(who: str, seed: int, steps: int) -> Curves:
    """GRPO from one random start a seed: two passes over each batch, so that ratios leave 1, and a KL."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415
    from datasets import Dataset  # noqa: PLC0415
    from transformers import LlamaForCausalLM  # noqa: PLC0415
    from trl import GRPOConfig, GRPOTrainer  # noqa: PLC0415

    from prefixloss.integrations.trl import PrefixGRPOTrainer  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    words = tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        model_of(words).save_pretrained(f"{folder}/model")  # TRL looks for its reference there
        model = LlamaForCausalLM.from_pretrained(f"{folder}/model")
        settings = GRPOConfig(
            output_dir=folder, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            logging_steps=1, seed=seed, learning_rate=1e-3, beta=0.05, loss_type="dapo", num_iterations=2,
            per_device_train_batch_size=4, num_generations=4, max_completion_length=12, max_steps=steps,
        )  # fmt: skip
        given: dict[str, Any] = {
            "model": model, "reward_funcs": reward, "args": settings, "processing_class": words,
            "train_dataset": Dataset.from_dict({"prompt": PROMPTS * 4}),
        }  # fmt: skip
        ours: dict[str, Any] = {"advantage": "grpo", "fused_loss": True}
        trainer = GRPOTrainer(**given) if who == "theirs" else PrefixGRPOTrainer(**given, **ours)
        flat = lambda: torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
        start, began = flat(), time.perf_counter()
        trainer.train()
        logs = [
            {name: log[name] for name in _KEPT if name in log} for log in trainer.state.log_history if "loss" in log
        ]
        return Curves(logs, start, flat(), time.perf_counter() - began)


def difference(theirs: Curves, ours: Curves) -> dict[str, Any]:
    """Of one seed. first: the relative difference at the first step that learns; later ones: the largest of all.
    same_samples: steps until the rewards differ, all of them if they never do."""
    pairs = list(zip(theirs.logs, ours.logs, strict=True))
    apart = [i for i, (a, b) in enumerate(pairs) if a.get("reward") != b.get("reward")]
    learns = next(i for i, (a, _) in enumerate(pairs) if a["grad_norm"] > 0)
    moved = float((theirs.end - theirs.start).norm())
    norms = [abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"] for a, b in pairs if a["grad_norm"] > 0]
    return {
        "steps": len(pairs), "same_samples": apart[0] if apart else len(pairs),
        "first_grad_norm": abs(pairs[learns][0]["grad_norm"] / pairs[learns][1]["grad_norm"] - 1),
        "loss": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "loss_size": statistics.fmean(abs(a["loss"]) for a, _ in pairs),
        "grad_norm": max(norms), "grad_norm_median": statistics.median(norms),
        "weights": float((theirs.end - ours.end).norm()) / moved, "moved": moved,
        "seconds": [theirs.seconds, ours.seconds],
    }  # fmt: skip


def measure(run: Callable[[str, int, int], Curves], seeds: int, steps: int, workers: int) -> list[dict[str, Any]]:
    """A record a seed. run: who, seed and steps to its curves."""
    jobs = [(who, seed, steps) for seed in range(seeds) for who in WHO]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        made = dict(zip([job[:2] for job in jobs], pool.map(run, *zip(*jobs, strict=True)), strict=True))
    return [{"seed": seed, **difference(made["theirs", seed], made["ours", seed])} for seed in range(seeds)]


_ROWS = {
    "steps with the same samples": ("same_samples", "{:.0f}"),
    "gradient norm at the first step that learns, relative difference": ("first_grad_norm", "{:.1e}"),
    "gradient norm, median step, relative difference": ("grad_norm_median", "{:.1e}"),
    "gradient norm, worst step, relative difference": ("grad_norm", "{:.1e}"),
    "loss, worst step, difference": ("loss", "{:.1e}"),
    "loss, mean size": ("loss_size", "{:.1e}"),
    "weights at the end, difference as a share of how far they moved": ("weights", "{:.1e}"),
}


ABOUT = {
    "trl": """## TRL

TRL's GRPO trainer (`loss_type="dapo"`, a KL, two passes a batch) with its own loss, and with ours
(`PrefixGRPOTrainer`, `advantage="grpo"`, `fused_loss=True`).""",
    "verl": """## verl

verl's own functions for GRPO in one loop: log-probs and entropies from logits, `grpo` advantages, the `vanilla` loss
(clipped at 0.2 and 0.28, dual clip at 3), `kl_penalty` and `agg_loss`, two passes a batch. Ours: `fused_logps` from
hidden states, `neutral_prefix` advantages, which without a first error are GRPO's, and the loss `prefix_clip`, from
verl's registries; KL and entropy terms are verl's of our log-probs. verl adds 1e-6 to the deviation that it divides
advantages by, and ours nothing: the gradients differ by about 2e-6. Training carries differences on, so that the worst
steps are late ones.""",
}


def page(records: dict[str, list[dict[str, Any]]]) -> str:
    """A table a trainer."""
    steps = next(iter(records.values()))[0]["steps"]
    lines = [
        "# Same loss, same run",
        "",
        f"{steps} steps from the same start with the same random numbers, a tiny Llama in float32 on a CPU.",
        f"`{COMMAND}` makes this page.",
    ]
    for trainer, about in ABOUT.items():
        if trainer in records:
            lines += ["", about, "", *table(records[trainer])]
    return "\n".join(lines) + "\n"


def table(records: list[dict[str, Any]]) -> list[str]:
    """A seed a column; the last one has the mean and its 95 % t interval."""
    seeds = [str(record["seed"]) for record in records]
    lines = [
        f"| | {' | '.join('seed ' + seed for seed in seeds)} | mean, 95 % interval |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    for label, (key, form) in _ROWS.items():
        values = [record[key] for record in records]
        mean, half = interval(values)
        lines.append(
            f"| {label} | {' | '.join(map(form.format, values))} | {form.format(mean)} ± {form.format(half)} |"
        )
    return lines


def write(out: Path, records: dict[str, list[dict[str, Any]]]) -> str:
    """same.json and same.md in the directory, with the records of trainers that are there and not given; the page."""
    path = out / "same.json"
    records = {**(json.loads(path.read_text()) if path.exists() else {}), **records}
    text = page(records)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write((json.dumps(records, indent=1) + "\n").encode()))
    write_whole(out / "same.md", lambda file: file.write(text.encode()))
    return text

"""TRL from GRPO to VPPO: the two lines marked below, in a script of your own.

    python examples/trl_vppo.py                                   # a tiny random Llama on additions, on the CPU
    accelerate launch examples/trl_vppo.py --model Qwen/Qwen3-0.6B --steps 200

It needs the extras "trl" and "detect". On real hardware it costs what TRL's GRPO costs, less the logits: with
fused_loss=True no [tokens, vocabulary] is held. No run on a GPU was made.
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig

from prefixloss.integrations.trl import PrefixGRPOTrainer  # instead of trl.GRPOTrainer
from prefixloss.rl.policy import tiny_policy


def right(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 for a response that ends in the right answer."""
    return [float(text.strip().endswith(value)) for text, value in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=2)
    given = parser.parse_args()

    model: object = given.model
    if given.model is None:
        tokenizer = tiny_policy(16, 1).tokenizer
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **special))
    else:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
    sums = [(a, b) for a in range(3, 7) for b in range(5, 9)]
    data = Dataset.from_dict({"prompt": [f"{a}+{b}=?\n" for a, b in sums], "answer": [str(a + b) for a, b in sums]})
    small = given.model is None
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, max_steps=given.steps, per_device_train_batch_size=4, num_generations=4, beta=0.0,
            max_completion_length=16 if small else 1024, use_cpu=small, bf16=not small, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=small,
        )  # fmt: skip
        trainer = PrefixGRPOTrainer(
            model=model, reward_funcs=right, args=args, train_dataset=data, processing_class=tokenizer,
            detector="maths", fused_loss=True,  # who finds the first wrong step; the loss in one pass over the head
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main()

"""TRL's own GRPO tests, with its trainer and with ours in its place: what passes with one and not with the other.

    python tests/integrations/trl_suite.py CHECKOUT_OF_TRL [ARGUMENTS OF PYTEST]

The tests ask the hub for small models and data. Here they find random models of the same architectures, a tokenizer of
single characters and a few lines of text in the directory in which they run, under the same names. Those that want
images or a real vocabulary fail either way.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HUB = "trl-internal-testing"
# of transformers: the class without its ending, what the hub adds to its name, and what its configuration needs
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("Qwen2ForCausalLM", "-2.5", {}),
    ("Qwen2ForSequenceClassification", "-2.5", {"num_labels": 1}),
    ("Qwen3ForCausalLM", "", {"head_dim": 2}),
    ("Qwen3ForSequenceClassification", "", {"head_dim": 2, "num_labels": 1}),
    ("Qwen3MoeForCausalLM", "", {"head_dim": 2, "num_experts": 4, "num_experts_per_tok": 2}),
    ("LlamaForCausalLM", "-3.2", {}),
    ("LlamaForSequenceClassification", "-3.2", {"num_labels": 1}),
    ("MistralForCausalLM", "-0.2", {}),
    ("Gemma2ForCausalLM", "", {"head_dim": 2}),
    ("Cohere2ForCausalLM", "", {}),
    ("GptOssForCausalLM", "", {"head_dim": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Glm4MoeForCausalLM", "", {"head_dim": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}),
]
SIZE = {
    "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<user>' + m.role + ': ' + (m.content or '') + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<user>assistant: ' }}{% endif %}"
)
LINES = [f"{word} is better than" for word in ("Beautiful", "Explicit", "Simple", "Complex", "Flat", "Sparse")] * 3


def make_models(folder: Path) -> None:
    import torch  # noqa: PLC0415 (the parent needs none of these)
    import transformers  # noqa: PLC0415
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    names = ["<pad>", "<eos>", "<unk>", "<user>", "\n", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<user>"], chat_template=TEMPLATE,
    )  # fmt: skip
    for name, ending, more in MODELS:
        torch.manual_seed(0)
        config = getattr(transformers, re.sub("For.*", "Config", name))
        model = getattr(transformers, name)(config(vocab_size=len(names), **SIZE, **more))
        model.save_pretrained(folder / f"tiny-{name}{ending}")
        tokenizer.save_pretrained(folder / f"tiny-{name}{ending}")


def make_data(folder: Path) -> None:
    """The two configurations of "zen" that the tests read."""
    listed = []
    for name in ("standard_prompt_only", "conversational_prompt_only"):
        (folder / name).mkdir(parents=True)
        for split, lines in (("train", LINES[:17]), ("test", LINES[:3])):
            rows = [line if name[0] == "s" else [{"role": "user", "content": line}] for line in lines]
            text = "".join(json.dumps({"prompt": row}) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
        files = "".join(f"\n  - split: {s}\n    path: {name}/{s}.jsonl" for s in ("train", "test"))
        listed.append(f"- config_name: {name}\n  data_files:{files}")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(listed) + "\n---\n")


def run(folder: Path, ours: bool, more: list[str]) -> dict[str, str]:
    """Each test's outcome."""
    report = folder / f"{ours}.xml"
    given = {"PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1", "TRL_SUITE": "ours" if ours else "theirs"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider", "--tb=no"]
    command += [f"--junitxml={report}", "-W", "ignore", "tests/test_grpo_trainer.py", *more]
    subprocess.run(command, cwd=folder, env={**os.environ, **given}, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[case.attrib["name"]] = outcomes[0] if outcomes else "passed"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    checkout, more = (given := parser.parse_known_args())[0].checkout, given[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copytree(checkout / "tests", folder / "tests")
        make_models(folder / HUB)
        make_data(folder / HUB / "zen")
        theirs, ours = (run(folder, which, more) for which in (False, True))
    for name, outcome in theirs.items():
        print(f"{name}: {outcome}, with ours {ours.get(name)}" if ours.get(name) != outcome else f"{name}: {outcome}")
    print(
        *(f"{who}: {list(found.values()).count('passed')} passed" for who, found in (("TRL", theirs), ("ours", ours)))
    )
    return int(any(outcome == "passed" != ours.get(name) for name, outcome in theirs.items()))


def put_ours_in_place() -> None:
    """As a plugin of the tests' pytest: before they import the trainer."""
    import trl  # noqa: PLC0415
    from trl import import_utils  # noqa: PLC0415

    # a checkout of another version may ask for more than there is
    for name in re.findall(r"is_\w+_available", Path("tests/testing_utils.py").read_text()):
        if not hasattr(import_utils, name):
            setattr(import_utils, name, lambda *_, **__: False)
    if os.environ["TRL_SUITE"] == "theirs":
        return
    from prefixloss.integrations.trl import PrefixGRPOTrainer  # noqa: PLC0415

    class GRPOTrainer(PrefixGRPOTrainer):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **{"advantage": "grpo", "detector": None, "fused_loss": True, **more})

    trl.GRPOTrainer = GRPOTrainer


if __name__ == "__main__":
    sys.exit(main())
if "TRL_SUITE" in os.environ:
    put_ours_in_place()

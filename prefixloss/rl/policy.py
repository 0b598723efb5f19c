"""The policy: a tiny model made here or any `transformers` causal LM, and what the loss needs from it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from prefixloss import linear_logps
from prefixloss.check import first_line
from prefixloss.integrations.models.heads import LogitMap, refuse_quantised
from prefixloss.rl import UsageError
from prefixloss.rl.rollouts import Sampled
from prefixloss.steps import INSTRUCTION, decode, token_boundaries


class Policy:
    """A causal LM seen as hidden states and a head: log-probs are log_softmax(softcap(logit_scale * (h W^T + bias))).

    The model stays in evaluation mode (dropout would make old and new log-probs differ for no reason).
    """

    def __init__(self, model: Any, tokenizer: Any, instruction: str = "{question}\n") -> None:
        self.model, self.tokenizer, self.instruction = model.eval(), tokenizer, instruction
        model.config.prefixloss_instruction = instruction  # saved with it, for whoever has it go on
        self.decoder = model.get_decoder()
        self.takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self.lm_head = model.get_output_embeddings()
        self.dtype = torch.float32  # of the products
        self.softcap, self.logit_scale = LogitMap.usual(model.config)
        # a model's own sampling defaults (top-p, penalties) would make samples come from another distribution
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.end_ids: list[int] = ends if isinstance(ends, list) else [ends]
        model.generation_config = GenerationConfig(eos_token_id=self.end_ids, pad_token_id=tokenizer.pad_token_id)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def weight(self) -> Tensor:
        """Of the head, [V, D] in the products' dtype."""
        return self.lm_head.weight.to(self.dtype)

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.lm_head, "bias", None)
        return None if bias is None else bias.to(self.dtype)

    @property
    def head(self) -> dict[str, Any]:
        """What `linear_logps` takes beside the hidden states."""
        return {
            "lm_head_weight": self.weight,
            "lm_head_bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., D] -> [.., V], the plain form of what the loss computes."""
        logits = self.logit_scale * torch.nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def all_hidden(self, ids: Tensor, attention: Tensor) -> Tensor:
        """The last layer's output after its norm: [B, L] -> [B, L, D]."""
        positions = {"position_ids": (attention.cumsum(1) - 1).clamp(min=0)} if self.takes_positions else {}
        with self.products():
            out = self.decoder(input_ids=ids, attention_mask=attention, use_cache=False, **positions)
        return out.last_hidden_state.to(self.dtype)

    def products(self) -> torch.autocast:
        """Within it the model's products are made in `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def hidden(self, sampled: Sampled) -> Tensor:
        """[B, T, D]; hidden[b, t] predicts sampled.tokens[b, t]."""
        return self.all_hidden(sampled.ids, sampled.attention)[:, -sampled.mask.shape[1] - 1 : -1]

    @torch.no_grad()
    def logps(self, sampled: Sampled) -> Tensor:
        """Log-probs of the sampled tokens, float [B, T], 0 after the responses' ends."""
        return linear_logps(self.hidden(sampled), tokens=sampled.tokens, mask=sampled.mask, **self.head).logps

    def save(self, directory: Path) -> None:
        """A directory that `load_policy` and `transformers` can load."""
        logging.disable_progress_bar()
        if hasattr(self.model, "merge_and_unload"):
            copy.deepcopy(self.model).merge_and_unload().save_pretrained(directory)
        else:
            self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def save_adapters(self, directory: Path) -> None:
        """The adapters of a LoRA model, as `peft` loads them on top of the model that they were made for."""
        self.model.save_pretrained(directory)

    def prompt(self, question: str) -> str:
        text = self.instruction.format(question=question)
        if getattr(self.tokenizer, "chat_template", None) is None:
            return text
        chat = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def encode(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts padded on the left: ids and attention mask, int64 [B, P]."""
        # a chat template has written the special tokens already
        special = getattr(self.tokenizer, "chat_template", None) is None
        batch = self.tokenizer(
            [self.prompt(q) for q in questions], padding=True, return_tensors="pt", add_special_tokens=special
        )
        return batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)

    @torch.no_grad()
    def sample(self, questions: Sequence[str], max_tokens: int) -> Sampled:
        """One response a question at temperature 1 from the whole distribution, from the global torch generator."""
        prompt, attention = self.encode(questions)
        with self.products():
            ids = self.model.generate(
                input_ids=prompt,
                attention_mask=attention,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_tokens,
            )
        tokens = ids[:, prompt.shape[1] :]
        ended = torch.isin(tokens, torch.tensor(self.end_ids, device=tokens.device))
        mask = ended.cumsum(1) - ended.long() == 0
        return self._sampled(prompt, attention, tokens, mask, ended.any(1))

    def written(self, questions: Sequence[str], responses: Sequence[str]) -> Sampled:
        """Given responses in the place of sampled ones, each with its end token."""
        prompt, attention = self.encode(questions)
        rows = [self.tokenizer.encode(r, add_special_tokens=False) + self.end_ids[:1] for r in responses]
        return self.from_rows(prompt, attention, rows, [True] * len(rows))

    def from_rows(
        self, prompt: Tensor, attention: Tensor, rows: Sequence[list[int]], finished: Sequence[bool]
    ) -> Sampled:
        """Responses as token ids with their end tokens, behind prompts as `encode` makes them."""
        pad, width = self.tokenizer.pad_token_id, max(map(len, rows))
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(width, device=self.device) < lengths[:, None]
        return self._sampled(prompt, attention, tokens, mask, torch.tensor(finished, device=self.device))

    def _sampled(self, prompt: Tensor, attention: Tensor, tokens: Tensor, mask: Tensor, finished: Tensor) -> Sampled:
        rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
        texts = [decode(self.tokenizer, row) for row in rows]
        both = torch.cat([attention, mask.to(attention.dtype)], 1)
        return Sampled(torch.cat([prompt, tokens], 1), both, mask, finished, texts)


def add_lora(policy: Policy, rank: int) -> None:
    """Adapters in float32 at every linear layer but the head; they alone are trained from here on."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 (an extra)

    if policy.dtype == torch.bfloat16:
        # weights that never move lose nothing between steps; buffers, as of rotary positions, stay float32
        for weight in policy.model.parameters():
            weight.data = weight.data.to(policy.dtype)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    policy.model = get_peft_model(policy.model, settings).eval()  # the decoder's own layers now hold them


def add_checkpoints(policy: Policy) -> None:
    """Layers are computed again on the way back. transformers does that in training mode only, with dropout."""
    layers = [layer for layer in policy.decoder.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError("--gradient-checkpointing: the model has no layers that can be computed again")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def set_chat(policy: Policy, chat: bool | None, name: str) -> None:
    """chat: whether the tokenizer's chat template is needed, or left off; None: used where there is one.

    Left off it is gone: whatever makes a prompt, and whoever loads the trained policy, does without it too.
    """
    if chat and getattr(policy.tokenizer, "chat_template", None) is None:
        raise UsageError(f"--chat: the tokenizer of {name!r} has no chat template")
    if chat is False:
        policy.tokenizer.chat_template = None
    try:
        policy.prompt("1+1=?")
    except Exception as error:  # templates are programs, and raise what they like
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"--chat: the chat template of {name!r} fails, --no-chat leaves it off: {reason}") from None


def token_at(tokenizer: Any, ids: Sequence[int], offset: int) -> int:
    """Index of the token that holds character `offset` of the decoded response; the last token if it lies at the end.

    A token that straddles the offset belongs to what starts there.
    """
    return min(token_boundaries(tokenizer, ids, [offset])[0], len(ids) - 1)


# ---- the tiny model ----------------------------------------------------------------------------------------


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, but "Step k: " and "Answer: " whole: short responses whose steps start at a token."""
    words = [*(f"Step {k}: " for k in range(1, 10)), "Answer: ", "\n", *"0123456789+-*=()?"]
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"Step [1-9]: |Answer: |[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_policy(hidden_size: int, layers: int) -> Policy:
    """A Llama with random weights from the global torch generator."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Policy(LlamaForCausalLM(config), tokenizer)


# ---- any causal LM -----------------------------------------------------------------------------------------


def load_policy(name: str, option: str = "--model") -> Policy:
    """A causal LM and its tokenizer from a directory, or from the hub under that name; UsageError if unusable.

    option: that the name was given with.
    """
    try:
        local = Path(name).exists()
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=local, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = first_line(error)
        raise UsageError(f"{option}: cannot load {name!r} as a causal language model: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token_id is None or getattr(model, "get_decoder", None) is None:
        raise UsageError(f"{option}: {name!r} has no end token or no decoder, so it cannot be trained here")
    try:
        refuse_quantised(model.get_output_embeddings())
    except ValueError as error:
        raise UsageError(f"{option}: {name!r}: {error}") from None
    policy = Policy(model, tokenizer, INSTRUCTION)
    check_head(policy, name, option)
    return policy


@torch.no_grad()
def check_head(policy: Policy, name: str, option: str = "--model") -> None:
    """Some models change their logits in ways of their own, or read on through padding; the loss would then optimise
    another policy, silently."""
    ids = torch.arange(4, device=policy.device)[None] % len(policy.weight)
    seen = torch.ones_like(ids)
    theirs = policy.model(input_ids=ids).logits
    ours = policy.logits(policy.all_hidden(ids, seen))
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise UsageError(f"{option}: the logits of {name!r} are not its head applied to its last hidden states")
    # a batch's prompts are padded on the left
    width = ids.shape[1]
    padding = torch.full_like(ids, policy.tokenizer.pad_token_id)
    rows, attention = torch.cat([padding, ids], 1), torch.cat([torch.zeros_like(seen), seen], 1)
    ours = policy.logits(policy.all_hidden(rows, attention)[:, width:])
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise UsageError(f"{option}: {name!r} is another policy behind padding: it reads on through it")

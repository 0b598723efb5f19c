"""Continuations sampled from a causal language model of `transformers`, the same for the same seed in any batch."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixloss.detect.cost import spend


@dataclass(frozen=True)
class Sampler:
    """prompt: the text that asks for a solution of a problem, up to where the answer begins. special: whether the
    tokenizer has to add its own special tokens before it. max_tokens: of a continuation."""

    model: Any
    tokenizer: Any
    prompt: Callable[[str], str]
    special: bool
    max_tokens: int
    temperature: float
    batch_size: int
    seed: int

    def continuations(self, problem_and_text: Sequence[tuple[str, str]], count: int) -> list[list[str | None]]:
        """`count` texts for each problem and beginning; None for one that did not come to an end."""
        rows = [(k, number) for k in range(len(problem_and_text)) for number in range(count)]
        ids = [self._tokens(*one) for one in problem_and_text]
        draws = [self._draws(*one, count) for one in problem_and_text]
        rows.sort(key=lambda row: len(ids[row[0]]))
        texts: list[list[str | None]] = [[None] * count for _ in problem_and_text]
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            made = self._sample([ids[k] for k, _ in batch], torch.stack([draws[k][number] for k, number in batch]))
            for (k, number), text in zip(batch, made, strict=True):
                texts[k][number] = text
        return texts

    def _tokens(self, problem: str, text: str) -> list[int]:
        return list(self.tokenizer(self.prompt(problem) + text, add_special_tokens=self.special)["input_ids"])

    def _draws(self, problem: str, text: str, count: int) -> Tensor:
        """Uniform numbers, float64 [count, max_tokens], that belong to this seed and beginning."""
        key = zlib.crc32(f"{self.seed}\0{problem}\0{text}".encode("utf-8", "replace"))
        generator = torch.Generator().manual_seed(key)
        return torch.rand(count, self.max_tokens, generator=generator, dtype=torch.float64)

    @torch.inference_mode()
    def _sample(self, prompts: Sequence[Sequence[int]], draws: Tensor) -> list[str | None]:
        """Prompts padded on the left. A token is where its distribution passes the row's next uniform number."""
        device, width = self.model.device, max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        draws, ends = draws.to(device), torch.tensor(self.ends, device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        made: list[Tensor] = []
        cache, step, written = None, ids, 0
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        for number in range(self.max_tokens):
            options = (
                {"position_ids": (seen.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]} if takes_positions else {}
            )
            out = self.model(input_ids=step, attention_mask=seen, past_key_values=cache, use_cache=True, **options)
            cache = out.past_key_values
            step = _drawn(out.logits[:, -1] / self.temperature, draws[:, number])[:, None].where(~done[:, None], pad)
            written += int((~done).sum())
            made.append(step)
            done = done | torch.isin(step[:, 0], ends)
            seen = torch.cat([seen, torch.ones_like(step)], 1)
            if bool(done.all()):
                break
        spend(len(prompts), sum(map(len, prompts)) + written)
        rows = zip(torch.cat(made, 1).tolist(), done.tolist(), strict=True)
        return [self._text(tokens) if ended else None for tokens, ended in rows]

    @property
    def ends(self) -> list[int]:
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return ends if isinstance(ends, list) else [ends]

    def _text(self, tokens: list[int]) -> str:
        end = next((k for k, token in enumerate(tokens) if token in self.ends), len(tokens))
        return str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """int64 [B]: the token at which the cumulative distribution of logits [B, V] passes a number from 0 to 1 [B]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    passed = cumulative > (uniform * cumulative[:, -1])[:, None]
    return passed.int().argmax(-1)

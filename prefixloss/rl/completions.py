"""Responses asked for by token ids, as vLLM and SGLang answer `/v1/completions`; nothing is taken that does not fit."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from prefixloss import check
from prefixloss.io.endpoint import NOTHING, UnansweredError

BYTES_A_TOKEN = 512  # of a reply: an id, its log-prob, its text and what else a server says of it


class Written(NamedTuple):
    """A response's token ids with its end token, their log-probs, and whether it came to an end."""

    tokens: list[int]
    logps: list[float]
    finished: bool


class Limits(NamedTuple):
    """What a response keeps to. ends: tokens that end it. vocabulary: V of the policy."""

    max_tokens: int
    ends: Collection[int]
    vocabulary: int


def request(model: str, prompt: list[int], limits: Limits, seed: int, greedy: bool) -> dict[str, Any]:
    """A sample of the whole distribution at temperature 1, whatever the server's own top-p or penalties are.

    One a request: some servers give all that they make of one request the same seed, and so the same tokens.
    """
    return {
        "model": model, "prompt": prompt, "n": 1, "max_tokens": limits.max_tokens, "seed": seed,
        "temperature": 0.0 if greedy else 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": list(limits.ends),
        "logprobs": 0,  # of the sampled tokens alone
        "return_token_ids": True,
    }  # fmt: skip


def read(reply: Any, prompt: list[int], limits: Limits) -> Written:
    """The response to a prompt in a reply. UnansweredError: what is missing or wrong in it."""
    try:
        choices = list(reply["choices"])
    except (LookupError, TypeError):
        raise UnansweredError('no "choices" in the reply') from None
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise UnansweredError(f"{len(choices)} choices in the reply, expected one")
    choice = choices[0]
    if choice.get("prompt_token_ids") not in (None, prompt):
        raise UnansweredError("it is about other prompt_token_ids than were sent")
    tokens, logps = _tokens(choice, limits.vocabulary), _logps(choice)
    if len(logps) != len(tokens):
        raise UnansweredError(f"{len(logps)} log-probs for {len(tokens)} tokens, expected one a token")
    if any(token in limits.ends for token in tokens[:-1]):
        raise UnansweredError("it goes on behind an end token")
    reason, finished = choice.get("finish_reason"), bool(tokens) and tokens[-1] in limits.ends
    if reason == "stop" and not finished:
        raise UnansweredError("it stopped without an end token: has the server stop words or other end tokens?")
    if len(tokens) > limits.max_tokens or not (finished or len(tokens) == limits.max_tokens):
        wants = f"an end token or {limits.max_tokens} tokens"
        raise UnansweredError(f"{len(tokens)} tokens, finish_reason {check.describe(reason)}, expected {wants}")
    return Written(tokens, logps, finished)


def _tokens(choice: dict[str, Any], vocabulary: int) -> list[int]:
    tokens = choice.get("token_ids")
    if not isinstance(tokens, list):
        raise UnansweredError('no "token_ids": does the server know return_token_ids, as vLLM does from 0.10.2 on?')
    for token in tokens:
        if not check.is_whole(token) or not 0 <= token < vocabulary:
            wants = f"ids in [0, {vocabulary}), the policy's vocabulary"
            raise UnansweredError(f"got token {check.describe(token)}, expected {wants}")
    return tokens


def _logps(choice: dict[str, Any]) -> list[float]:
    try:
        logps = list(choice["logprobs"]["token_logprobs"])
    except (LookupError, TypeError):
        raise UnansweredError('no "token_logprobs" in its "logprobs"') from None
    for logp in logps:
        number = isinstance(logp, (int, float)) and not isinstance(logp, bool)
        if not number or not NOTHING < logp <= check.ROUNDED_PROBABILITIES:
            raise UnansweredError(f"got a log-prob of {check.describe(logp)}, expected a number of at most 0")
    return [min(float(logp), 0.0) for logp in logps]

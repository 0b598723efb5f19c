"""Responses of the policy by a served engine, which is given each new policy's weights before it is asked again."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prefixloss.io.address import Address
from prefixloss.io.endpoint import KEY, UnansweredError, opened, run
from prefixloss.io.files import write_whole_directory
from prefixloss.rl.completions import BYTES_A_TOKEN, Limits, Written, read, request
from prefixloss.rl.policy import Policy
from prefixloss.rl.reload import Reload, Server
from prefixloss.rl.rollouts import Sampled
from prefixloss.rl.team import Team

AT_ONCE = 256  # requests; the engine makes batches of them
TRIES = 2
PROBE_TOKENS = 16
FAR = 0.5  # nats between two programs' log-probs of a token, on average, which no rounding explains
MOVED = 1e-3  # nats: where a log-prob of the policy has moved by more, some of the engine's have too


class Sampler(Protocol):
    """The policy itself, or an engine that has its weights."""

    def sample(self, questions: Sequence[str], max_tokens: int) -> Sampled: ...


class Place(NamedTuple):
    """Where an engine is. address: with the model's name there. folder: for weights, on a file system that it sees
    under the same path. seconds: the limit of a request, over all tries. key: the environment variable with the key.
    """

    address: Address
    folder: Path
    seconds: float
    key: str = KEY


class Engine:
    """One that answers `/v1/completions` as vLLM and SGLang do. Each process asks, the first one loads the weights.

    probes: questions by whose answers it is seen whether the engine has the policy's weights.

    UnansweredError: there is no answer that fits. Nothing stands in for it.
    """

    def __init__(
        self, policy: Policy, place: Place, reload: Reload, probes: Sequence[str], team: Team = Team()
    ) -> None:
        self.policy, self.place, self.reload, self.probes, self.team = policy, place, reload, probes, team
        self.folder = place.folder.absolute()
        # names that are new, whatever a run before this one left in the engine
        self.sitting = int(team.sum([secrets.randbelow(2**32) if team.leads else 0])[0])
        self.update: int | None = None  # after which the engine's weights are the policy's
        self.seen: tuple[Sampled, Tensor] | None = None  # its last answers to the probes, and the policy's log-probs

    def sample(self, questions: Sequence[str], max_tokens: int) -> Sampled:
        """One response a question, at temperature 1 from the whole distribution; seeds by torch's global generator."""
        return self._ask(questions, max_tokens, greedy=False)

    def load(self, update: int) -> None:
        """Gives the engine the policy's weights, which are those after `update`, if it has not got them."""
        if self.update == update:
            return
        before, self.update = self.update, update
        failure: UnansweredError | None = None
        if self.team.leads:
            try:
                self._load(self._directory(update), None if before is None else self._name(before))
                self._look()
            except UnansweredError as error:
                failure = error
        if self.team.any(failure is not None):
            raise failure or UnansweredError("rollouts: the first process could not load the weights")

    # ---- weights

    def _name(self, update: int) -> str:
        return f"prefixloss-{self.sitting:08x}-{update}"

    def _directory(self, update: int) -> Path:
        return self.folder / self._name(update)

    def _load(self, path: Path, before: str | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole_directory(path, self.policy.save_adapters if self.reload.adapters else self.policy.save)
        run(self._tell(path, before))
        for old in self.folder.iterdir():
            if old != path:
                shutil.rmtree(old)

    async def _tell(self, path: Path, before: str | None) -> None:
        async with opened(self.place.address.root, self.place.key, 1 << 20) as endpoint:
            try:
                await self.reload.load(Server.of(endpoint, self.place.seconds, TRIES), str(path), path.name, before)
            except Exception as error:
                raise UnansweredError(f"rollouts: loading {path}: {endpoint.reason(error)}") from None

    def _look(self) -> None:
        """Whether the engine answers with the policy's weights, and not with others or those before an update."""
        answers = self._ask(self.probes, PROBE_TOKENS, greedy=True)
        assert answers.logps is not None
        own = self.policy.logps(answers)
        gap = float((own - answers.logps).abs()[answers.mask].mean())
        if gap > FAR:
            what = f"the engine's log-probs are {gap:.2g} from the policy's on average, expected at most {FAR}"
            raise UnansweredError(f"rollouts: {what}: it has another model, or other weights")
        if self.seen is not None and _same(answers, self.seen[0]):
            moved = float((own - self.seen[1]).abs().max())
            if moved > MOVED:
                what = f"the engine answers as before to the last digit, the policy's log-probs moved by {moved:.2g}"
                raise UnansweredError(f"rollouts: {what}: it has not loaded the weights")
        else:
            self.seen = answers, own

    # ---- responses

    def _ask(self, questions: Sequence[str], max_tokens: int, greedy: bool) -> Sampled:
        prompt, attention = self.policy.encode(questions)
        prompts = [ids[seen.bool()].tolist() for ids, seen in zip(prompt, attention, strict=True)]
        # no numbers are drawn for what is not random: a run that resumes looks once more than one that was not stopped
        seeds = [0] * len(prompts) if greedy else torch.randint(2**31, (len(prompts),)).tolist()
        limits = Limits(max_tokens, self.policy.end_ids, len(self.policy.lm_head.weight))
        written = run(self._written(prompts, limits, seeds, greedy))
        tokens, logps, finished = zip(*written, strict=True)
        sampled = self.policy.from_rows(prompt, attention, tokens, finished)
        width = sampled.mask.shape[1]
        padded = torch.tensor([row + [0.0] * (width - len(row)) for row in logps], device=self.policy.device)
        return sampled.with_logps(padded)

    async def _written(self, prompts: list[list[int]], limits: Limits, seeds: list[int], greedy: bool) -> list[Written]:
        gate = asyncio.Semaphore(AT_ONCE)
        model = self._name(self.update or 0) if self.reload.adapters else self.place.address.model
        most_bytes = 65536 + BYTES_A_TOKEN * (max(map(len, prompts)) + limits.max_tokens)
        async with opened(self.place.address.url.rstrip("/"), self.place.key, most_bytes) as endpoint:

            async def one(number: int) -> Written:
                wanted = request(str(model), prompts[number], limits, seeds[number], greedy)
                try:
                    async with gate:
                        reply = await endpoint.ask("/completions", wanted, self.place.seconds, TRIES)
                    return read(reply, prompts[number], limits)
                except Exception as error:
                    raise UnansweredError(f"rollouts: response {number}: {endpoint.reason(error)}") from None

            return await asyncio.gather(*map(one, range(len(prompts))))


def _same(answers: Sampled, before: Sampled) -> bool:
    assert answers.logps is not None
    assert before.logps is not None
    return torch.equal(answers.ids, before.ids) and torch.equal(answers.logps, before.logps)

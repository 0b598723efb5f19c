"""verl's own functions beside ours in one loop, as its trainer and workers call them on a batch."""

from __future__ import annotations

import copy
import time
from typing import Any

from . import same


def settings(who: str) -> Any:
    """verl's configuration of an actor, with its own policy loss or ours."""
    from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: PLC0415

    return ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4, clip_ratio_high=0.28, entropy_coeff=0.01,
        use_kl_loss=True, kl_loss_coef=0.05, kl_loss_type="low_var_kl", loss_agg_mode="token-mean",
        policy_loss=PolicyLossConfig(loss_mode="vanilla" if who == "theirs" else "prefix_clip"),
    )  # fmt: skip


def scores(who: str, model: Any, ids: Any, prompt: int) -> tuple[Any, Any]:
    """Log-probs and entropies [B, T] of the responses behind `prompt` tokens."""
    from verl.utils import torch_functional as verl_functional  # noqa: PLC0415

    from prefixloss.integrations.verl import fused_logps  # noqa: PLC0415

    labels, places = ids[:, prompt:], slice(prompt - 1, -1)
    if who == "ours":
        hidden = model.model(input_ids=ids).last_hidden_state[:, places]
        return fused_logps(hidden, model.lm_head.weight, labels)
    logits = model(input_ids=ids).logits[:, places]
    return verl_functional.logprobs_from_logits(logits, labels), verl_functional.entropy_from_logits(logits)


def sample(who: str, model: Any, reference: Any, words: Any, prompt: str) -> tuple[dict[str, Any], float]:
    """A group of four responses with all that an update needs, and their mean reward."""
    import torch  # noqa: PLC0415
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn  # noqa: PLC0415

    given = words(prompt, return_tensors="pt").input_ids
    ids = model.generate(given.repeat(4, 1), do_sample=True, max_new_tokens=12, pad_token_id=0, eos_token_id=1)
    start = given.shape[1]
    ends = ids[:, start:] == 1
    mask = (ends.int().cumsum(1) - ends.int()) == 0  # up to the end of text
    lengths = mask.sum(1)
    texts = [words.decode(row[:n], skip_special_tokens=True) for row, n in zip(ids[:, start:], lengths, strict=True)]
    earned = torch.tensor(same.reward(texts))
    rewards = torch.zeros(mask.shape).scatter(1, lengths[:, None] - 1, earned[:, None])
    # without a first error ours is GRPO's advantage too
    estimator = get_adv_estimator_fn("grpo" if who == "theirs" else "neutral_prefix")
    options = {"config": {"norm_adv_by_std_in_grpo": True}} if who == "ours" else {}
    advantages, _ = estimator(token_level_rewards=rewards, response_mask=mask.long(), index=["same"] * 4, **options)
    with torch.no_grad():
        old, known = (scores(who, made, ids, start)[0] for made in (model, reference))
    batch = {"ids": ids, "start": start, "mask": mask, "advantages": advantages, "old": old, "reference": known}
    return batch, float(earned.mean())


def loss_of(who: str, model: Any, batch: dict[str, Any], config: Any) -> Any:
    """The policy's loss from verl's registry, and verl's entropy and KL terms."""
    from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty  # noqa: PLC0415

    logps, entropies = scores(who, model, batch["ids"], batch["start"])
    policy, _ = get_policy_loss_fn(config.policy_loss.loss_mode)(
        old_log_prob=batch["old"], log_prob=logps, advantages=batch["advantages"], response_mask=batch["mask"],
        loss_agg_mode=config.loss_agg_mode, config=config,
    )  # fmt: skip
    kl = kl_penalty(logprob=logps, ref_logprob=batch["reference"], kl_penalty=config.kl_loss_type)
    entropy, away = (agg_loss(x, batch["mask"], config.loss_agg_mode) for x in (entropies, kl))
    return policy - config.entropy_coeff * entropy + config.kl_loss_coef * away


def run(who: str, seed: int, steps: int) -> same.Curves:
    """GRPO from one random start a seed: two passes over each batch, so that ratios leave 1, an entropy and a KL."""
    import torch  # noqa: PLC0415

    import prefixloss.integrations.verl  # noqa: F401, PLC0415 (registers what is ours)

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    words = same.tokenizer()
    model = same.model_of(words)
    reference, config = copy.deepcopy(model), settings(who)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    flat = lambda: torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    start, began, logs = flat(), time.perf_counter(), []
    for step in range(steps):
        log = {}
        if step % 2 == 0:
            prompt = same.PROMPTS[step // 2 % len(same.PROMPTS)]
            batch, log["reward"] = sample(who, model, reference, words, prompt)
        loss = loss_of(who, model, batch, config)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        logs.append({"loss": float(loss.detach()), "grad_norm": float(norm), **log})
    return same.Curves(logs, start, flat(), time.perf_counter() - began)

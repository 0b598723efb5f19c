"""Tiny random models of transformers, a batch for them, and what the loss is from the logits they give on their own."""

from typing import Any

import oracle
import pytest
import torch
import transformers

from prefixloss import LossConfig, TokenAdvantages
from prefixloss.integrations.transformers import PrefixBatch, PrefixLossOutput

V, B, PROMPT, T = 48, 4, 3, 5
L = PROMPT + T
# float64 models compute their norms and rotations in float32: what goes through them backwards is rounded there
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
# float32 sums of at most a few hundred terms, in another order
SINGLE = {"rtol": 1e-4, "atol": 2e-6}

SMALL = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2, "attn_implementation": "sdpa",
}  # fmt: skip
GPT2 = {
    "vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
MOE = {"output_router_logits": True, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.7}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "llama": ("Llama", {}),
    "phi, with a bias": ("Phi", {"num_key_value_heads": 2}),
    "gemma2, capped": (
        "Gemma2",
        {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "granite, divided": ("Granite", {"logits_scaling": 3.0}),
    "cohere, multiplied": ("Cohere", {"logit_scale": 0.25}),
    "hyperclovax, multiplied by what granite divides by": ("HyperCLOVAX", {"logits_scaling": 0.4}),
    "gpt2": ("GPT2", GPT2),
    "mixtral": ("Mixtral", {**MOE, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**MOE, "num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8}),
}
CONFIG = LossConfig(kl="k3", kl_coef=0.2, temperature=0.8, stats="scored")


# whose own code has no float64: experts, and rows of eager attention that see nothing
ONLY_SINGLE = ("Mixtral", "Qwen3Moe", "Gemma2")


def tiny(name: str = "qwen2", dtype: torch.dtype | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    if dtype is None:
        dtype = torch.float32 if MODELS[name][0] in ONLY_SINGLE else torch.float64
    family, own = MODELS[name]
    small = {} if family == "GPT2" else {**SMALL, **({"attn_implementation": "eager"} if family == "Gemma2" else {})}
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = getattr(transformers, f"{family}Config")(**{**small, **own, **options})
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(transformers, family + suffix)(config).to(dtype).train()


def inputs(left: bool = True) -> dict[str, torch.Tensor]:
    """Prompts of 3, 2, 1 and 3 tokens, padded on the left, before responses of 5, 3, 4 and 1, padded on the right.
    With left=False all padding comes last."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (B, L), generator=g)
    prompts, lengths = torch.tensor([3, 2, 1, 3]), torch.tensor([5, 3, 4, 1])
    column = torch.arange(L)
    response = (column >= PROMPT) & (column < PROMPT + lengths[:, None])
    seen = (column >= PROMPT - prompts[:, None]) & (column < PROMPT + lengths[:, None])
    ids = ids * seen
    if not left:
        order = (~seen).int().argsort(dim=1, stable=True)
        ids, response, seen = (x.gather(1, order) for x in (ids, response, seen))
    position = (seen.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": seen.long(), "response": response, "position_ids": position}


def batch(**changes: Any) -> PrefixBatch:
    """About the last T columns of `inputs()`."""
    g = torch.Generator().manual_seed(2)
    old = torch.randn(B, T, generator=g) * 0.4 - 4
    pair = TokenAdvantages(torch.tensor([0.4, -0.3, 0.9, 0.0]), torch.tensor([-1.0, 0.6, -0.2, 0.5]),
                           torch.tensor([2, 1, 0, 1]))  # fmt: skip
    made = PrefixBatch(
        inputs()["response"][:, PROMPT:], pair, old_logps=old, ref_logps=old + torch.randn(B, T, generator=g) * 0.3
    )
    return made.replace(**changes)


def seen(**more: Any) -> dict[str, Any]:
    given = inputs()
    return {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], **more}


def plain(model: Any, config: LossConfig = CONFIG, given: PrefixBatch | None = None, **kwargs: Any) -> oracle.Result:
    """From the logits that the model gives on its own, without our code."""
    given = batch() if given is None else given
    ids, columns = kwargs["input_ids"], given.mask.shape[1]
    output = model(**kwargs)
    logits = output.logits[:, -columns - 1 : -1].double()
    options = {k: getattr(config, k) for k in ("kl", "kl_coef", "temperature", "reduction", "stats", "objective")}
    advantages = given.advantages
    case = oracle.Case(
        ids[:, -columns:], oracle.Pair(*advantages) if isinstance(advantages, tuple) else advantages, logits=logits,
        mask=given.mask, old_logps=given.old_logps, ref_logps=given.ref_logps, options=options,
        normalizer=given.normalizer,
    )  # fmt: skip
    result = oracle.solve(case)
    result = result._replace(logps=result.logps.detach() * given.mask.flatten())
    aux = getattr(output, "aux_loss", None)
    if aux is not None:
        result = result._replace(loss=result.loss + MOE["router_aux_loss_coef"] * aux)
    return result


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Any], theirs: dict[str, Any], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    assert any(g.any() for g in theirs.values())
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name].double(), grad.double(), msg=lambda m, n=name: f"{n}: {m}", **(tolerance or CLOSE)
        )


def assert_same(model: Any, patched: Any = None, config: LossConfig = CONFIG, given: Any = None, **kwargs: Any) -> None:
    """model's own logits against `patched` (the model itself unless it is wrapped)."""
    given, kwargs = given or batch(), kwargs or seen()
    close = CLOSE if next(model.parameters()).dtype == torch.float64 else SINGLE
    torch.manual_seed(7)
    want = plain(model, config, given, **kwargs)
    theirs = gradients(model, want.loss)
    torch.manual_seed(7)
    out = (patched or model)(**kwargs, prefix_loss=given)
    assert isinstance(out, PrefixLossOutput)
    ours = gradients(model, out.loss)
    torch.testing.assert_close(out.loss.double(), want.loss.double(), **close)
    torch.testing.assert_close(out.logps.flatten().double(), want.logps, **close)
    assert_same_gradients(ours, theirs, **close)

"""patch_model against the plain computation from the model's own logits: loss, log-probs and every gradient.

Tiny random models of transformers, made on the spot.
"""

# ruff: noqa: E402 (transformers may be missing)

import copy
import inspect
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="these tests patch models of transformers")

from tiny_models import (
    CLOSE,
    CONFIG,
    MODELS,
    PROMPT,
    SINGLE,
    SMALL,
    B,
    L,
    T,
    V,
    assert_same,
    assert_same_gradients,
    batch,
    gradients,
    inputs,
    plain,
    seen,
    tiny,
)

from prefixloss import LossConfig
from prefixloss.integrations.transformers import PrefixBatch, PrefixLossOutput, patch_model

try:
    import peft
except ImportError:
    peft = None

needs_peft = pytest.mark.skipif(peft is None, reason="peft is not installed")

# ---- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loss_log_probs_and_all_gradients_are_those_of_the_model_s_own_logits(name: str) -> None:
    model = tiny(name)
    with patch_model(model, CONFIG):
        more = {"position_ids": inputs()["position_ids"]} if name == "gpt2" else {}
        assert_same(model, **seen(**more))


@pytest.mark.parametrize("name", ["qwen2-tied", "llama"])
def test_float32_as_well(name: str) -> None:
    model = tiny(name, torch.float32)
    patch_model(model, CONFIG)
    assert_same(model)


@pytest.mark.parametrize("columns", [T, T + 1, L - 1, L])
def test_the_mask_may_cover_the_responses_or_everything(columns: int) -> None:
    """out.loss, and log-probs where the tokens stand."""
    model = tiny()
    patch_model(model, CONFIG)
    narrow = model(**seen(), prefix_loss=batch())
    widened = {
        name: nn.functional.pad(getattr(batch(), name), (columns - T, 0)) for name in ("mask", "old_logps", "ref_logps")
    }
    wide = model(**seen(), prefix_loss=batch(**widened))
    assert wide.logps.shape == (B, columns)
    assert torch.equal(narrow.loss, wide.loss)
    for name in ("logps", "entropy", "kl", "learning"):
        x, y = getattr(narrow, name), getattr(wide, name)
        assert torch.equal(x, y[:, -T:]), name
        assert not y[:, :-T].any(), name
    if columns < L:  # the plain computation has no logits before the first token
        assert_same(model, given=batch(**widened))


def test_padding_on_the_left_is_padding_on_the_right() -> None:
    model = tiny()
    patch_model(model, LossConfig())
    results = []
    for left in (True, False):
        given = inputs(left)
        out = model(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"],
            prefix_loss=PrefixBatch(given["response"], batch().advantages),
        )  # fmt: skip
        results.append((out.loss.item(), gradients(model, out.loss), out.logps[given["response"]]))
    (a, g, p), (b, h, q) = results
    assert a == pytest.approx(b, rel=1e-6)
    # rotations by other angles, in float32
    assert_same_gradients(g, h, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_sequences_packed_into_one_row_are_sequences_padded() -> None:
    model = tiny()
    patch_model(model, LossConfig(reduction="seq-mean-token-mean"))
    given = inputs()
    kept = given["attention_mask"].bool()
    padded = model(**seen(), prefix_loss=PrefixBatch(given["response"], batch().advantages))
    theirs = gradients(model, padded.loss)
    packed = {name: given[name][kept][None] for name in ("input_ids", "position_ids", "response")}
    offsets = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    out = model(
        input_ids=packed["input_ids"], position_ids=packed["position_ids"],
        prefix_loss=PrefixBatch(packed["response"], batch().advantages, cu_seqlens=offsets),
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(padded.loss.item(), rel=1e-6)
    assert_same_gradients(gradients(model, out.loss), theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.logps[0], padded.logps[kept], rtol=1e-5, atol=1e-6)


def test_other_ways_to_say_the_same() -> None:
    """A dict, ids by position, embeddings with the tokens beside them, fewer logits, a config for one call, tuples."""
    model = tiny()
    patch_model(model)
    given, ids = seen(), inputs()["input_ids"]
    want = model(**given, prefix_loss=batch(config=CONFIG)).loss
    fields = {**vars(batch()), "config": CONFIG}
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": given["attention_mask"],
        "prefix_loss": batch(config=CONFIG, tokens=ids[:, PROMPT:]),
    }  # fmt: skip
    for out in (
        model(**given, prefix_loss=fields),
        model(ids, given["attention_mask"], prefix_loss=fields),
        model(**embedded),
        model(**given, logits_to_keep=T + 1, prefix_loss=fields),
        model(**given, return_dict=False, prefix_loss=fields),
    ):
        torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=0)
    assert not torch.equal(model(**given, prefix_loss=batch(ref_logps=None)).loss, want)


def test_log_probs_come_back_as_old_log_probs() -> None:
    model = tiny()
    patch_model(model, LossConfig(stats="scored"))
    first = model(**seen(), prefix_loss=batch(old_logps=None, ref_logps=None))
    again = model(**seen(), prefix_loss=batch(old_logps=first.logps, ref_logps=None))
    assert again.metrics["ratio_max"].item() == pytest.approx(1)
    assert again.loss.item() == pytest.approx(first.loss.item(), abs=1e-9)


def test_losses_per_token_stand_where_their_tokens_do() -> None:
    model = tiny()
    patch_model(model, replace(CONFIG, reduction="none"))
    out = model(**seen(), prefix_loss=batch())
    assert out.loss.shape == (B, T)
    want = plain(model, replace(CONFIG, reduction="none"), batch(), **seen())
    torch.testing.assert_close(out.loss, want.loss.reshape(B, T), **CLOSE)
    weights = torch.linspace(0.5, 2, B * T, dtype=torch.float64).reshape(B, T)
    ours = gradients(model, (out.loss * weights).sum())
    assert_same_gradients(ours, gradients(model, (want.loss.reshape(B, T) * weights).sum()))


def test_the_exact_kl_takes_what_the_reference_s_head_was_given() -> None:
    model, reference = tiny(), tiny("llama")
    config = LossConfig(kl="full", kl_coef=0.3)
    patch_model(model, config)
    with torch.no_grad():
        states = reference.model(**seen()).last_hidden_state
    given = {"ref_hidden": states, "ref_lm_head_weight": reference.lm_head.weight}
    out = model(**seen(), prefix_loss=batch(ref_logps=None, **given))
    logits, ref_logits = model(**seen()).logits, reference(**seen()).logits
    cut = slice(PROMPT - 1, L - 1)
    case = oracle.Case(
        inputs()["input_ids"][:, PROMPT:], oracle.Pair(*batch().advantages), logits=logits[:, cut], mask=batch().mask,
        old_logps=batch().old_logps, ref_logits=ref_logits[:, cut].detach(), options={"kl": "full", "kl_coef": 0.3},
    )  # fmt: skip
    want = oracle.solve(case).loss
    torch.testing.assert_close(out.loss, want, **CLOSE)
    assert_same_gradients(gradients(model, out.loss), gradients(model, want))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_the_router_s_loss_is_added_where_the_model_is_asked_for_it(name: str) -> None:
    model = tiny(name)
    patch_model(model, CONFIG)
    with_router = model(**seen(), prefix_loss=batch())
    without = model(**seen(), output_router_logits=False, prefix_loss=batch())
    half = model(**seen(), prefix_loss=batch(aux_scale=0.5))
    assert without.aux_loss is None
    assert with_router.aux_loss > 0
    for out, share in ((with_router, 1), (half, 0.5)):
        torch.testing.assert_close(out.loss, without.loss + 0.7 * share * with_router.aux_loss, rtol=1e-6, atol=0)


# ---- PEFT --------------------------------------------------------------------------------------------------


def lora(model: Any, *, before: bool = False, adapter: str = "default", **options: Any) -> Any:
    """The model in PEFT, patched before or after, with adapters whose second matrix is not 0."""
    undo = patch_model(model, CONFIG) if before else None
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **options), adapter_name=adapter)
    randomise(wrapped)
    if undo is None:
        patch_model(wrapped, CONFIG)
    return wrapped


def randomise(model: Any) -> None:
    g = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = (torch.randn(p.shape, generator=g) * 0.3).to(p)


BODY, HEAD = ["q_proj", "v_proj", "down_proj"], ["q_proj", "lm_head"]


@needs_peft
@pytest.mark.parametrize("before", [False, True], ids=["patched after", "patched before"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": BODY},
        {"target_modules": HEAD},
        {"target_modules": HEAD, "lora_dropout": 0.4},
        {"target_modules": HEAD, "lora_bias": True},
        {"target_modules": HEAD, "use_rslora": True},
        {"target_modules": BODY, "use_dora": True},
        {"target_modules": BODY, "modules_to_save": ["lm_head"]},
    ],
    ids=lambda o: ", ".join(f"{k}={v}" for k, v in o.items()),
)
def test_lora_on_body_and_head_has_peft_s_own_gradients(options: dict[str, Any], before: bool) -> None:
    """The frozen head gets none."""
    wrapped = lora(tiny(), before=before, **options)
    assert_same(wrapped)
    names = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    trained = [("lora_" in name or "modules_to_save" in name) for name in names]
    assert trained
    assert all(trained)
    if options["target_modules"] is HEAD:
        assert sum("lm_head.lora_" in name for name in names) == (3 if options.get("lora_bias") else 2)


@needs_peft
@pytest.mark.parametrize("name", ["qwen2-tied", "gemma2, capped", "cohere, multiplied"])
def test_lora_on_a_tied_capped_or_scaled_head(name: str) -> None:
    with pytest.warns(UserWarning, match="tie"):
        wrapped = lora(tiny(name), target_modules=HEAD)
    assert_same(wrapped)


@needs_peft
def test_a_head_with_adapters_may_learn_as_well() -> None:
    wrapped = lora(tiny(), target_modules=HEAD)
    base = wrapped.get_base_model().lm_head.base_layer.weight
    base.requires_grad_()
    assert_same(wrapped)
    assert base.grad.any()


@needs_peft
def test_several_adapters_disabled_ones_and_merged_ones() -> None:
    wrapped = lora(tiny(), target_modules=HEAD)
    wrapped.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=HEAD))
    randomise(wrapped)
    wrapped.base_model.set_adapter(["default", "second"])
    assert_same(wrapped)
    both = wrapped(**seen(), prefix_loss=batch()).loss
    wrapped.set_adapter("second")
    assert_same(wrapped)
    merged = []
    for names in (["second"], ["default", "second"]):
        wrapped.merge_adapter(names)
        merged.append(wrapped(**seen(), prefix_loss=batch()).loss)
        torch.testing.assert_close(merged[-1], plain(wrapped, **seen()).loss, **CLOSE)
        wrapped.unmerge_adapter()
    torch.testing.assert_close(merged[1], both, rtol=1e-6, atol=1e-9)
    wrapped.merge_adapter()
    with wrapped.disable_adapter():
        bare = wrapped(**seen(), prefix_loss=batch()).loss
        torch.testing.assert_close(bare, plain(wrapped, **seen()).loss, **CLOSE)
    assert len({round(x.item(), 6) for x in (both, merged[0], bare)}) == 3


@needs_peft
def test_a_saved_head_gives_way_when_adapters_are_disabled() -> None:
    wrapped = lora(tiny(), target_modules=BODY, modules_to_save=["lm_head"])
    with torch.no_grad():
        wrapped.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    on = wrapped(**seen(), prefix_loss=batch()).loss
    with wrapped.disable_adapter():
        off = wrapped(**seen(), prefix_loss=batch()).loss
        torch.testing.assert_close(off, plain(wrapped, **seen()).loss, **CLOSE)
    torch.testing.assert_close(on, plain(wrapped, **seen()).loss, **CLOSE)
    assert not torch.isclose(on, off)


@needs_peft
@pytest.mark.parametrize("before", [False, True], ids=["patched after", "patched before"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: peft.LoraConfig(target_modules=HEAD, use_dora=True), "with the LoRA variant DoraLinearVariant"),
        (lambda: peft.IA3Config(target_modules=HEAD, feedforward_modules=[]), "of type peft.tuners.ia3"),
        (lambda: peft.LoHaConfig(target_modules=HEAD), "of type peft.tuners.loha"),
    ],
)
def test_adapters_on_the_head_that_are_not_plain_lora_are_refused(make: Any, words: str, before: bool) -> None:
    model = tiny()
    if before:
        patch_model(model, CONFIG)
        wrapped = peft.get_peft_model(model, make())
        with pytest.raises(ValueError, match=f"^model: got a head {words}"):
            wrapped(**seen(), prefix_loss=batch())
    else:
        wrapped = peft.get_peft_model(model, make())
        with pytest.raises(ValueError, match=f"^model: got a head {words}"):
            patch_model(wrapped, CONFIG)
    assert wrapped(**seen()).logits.shape == (B, L, V)


@needs_peft
def test_an_adapter_a_row_is_refused_on_the_head() -> None:
    wrapped = lora(tiny(), target_modules=HEAD).eval()
    with pytest.raises(ValueError, match="adapter_names"):
        wrapped(**seen(), adapter_names=["default", "__base__"] * 2, prefix_loss=batch())


@needs_peft
def test_virtual_tokens_before_the_prompt_shift_nothing() -> None:
    wrapped = peft.get_peft_model(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    patch_model(wrapped, CONFIG)
    want = plain(wrapped, CONFIG, batch(), **seen())
    out = wrapped(**seen(), prefix_loss=batch(tokens=inputs()["input_ids"][:, PROMPT:]))
    torch.testing.assert_close(out.loss, want.loss, **CLOSE)
    with pytest.raises(ValueError, match=r"^input_ids: got None, expected token ids"):
        wrapped(**seen(), prefix_loss=batch())


@needs_peft
def test_adapters_of_float32_on_a_model_of_bfloat16() -> None:
    """PEFT's default. Its own logits are rounded to bfloat16; ours are not: compared with float64."""
    wrapped = lora(tiny(dtype=torch.bfloat16), target_modules=HEAD)
    head = wrapped.get_base_model().lm_head
    assert head.lora_A["default"].weight.dtype == torch.float32
    heard: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: heard.append(args[0].detach()))
    out = wrapped(**seen(), prefix_loss=batch())
    hook.remove()
    a, b = (x["default"].weight.detach().double() for x in (head.lora_A, head.lora_B))
    whole = head.base_layer.weight.detach().double() + head.scaling["default"] * b @ a
    logits = heard[0].double() @ whole.t() / 0.8
    ids = inputs()["input_ids"]
    want = logits.log_softmax(-1)[:, PROMPT - 1 : -1].gather(-1, ids[:, PROMPT:, None])[..., 0] * batch().mask
    # A h and B are rounded to bfloat16, 2^-9 each, of a part of the logits (at most about 10 here)
    torch.testing.assert_close(out.logps.double(), want, rtol=0, atol=2 * 2**-9 * logits.abs().max().item())


# ---- training tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen2-tied", "mixtral"])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    model = tiny(name)
    patch_model(model, CONFIG)
    want = gradients(model, model(**seen(), prefix_loss=batch()).loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    assert_same(model)
    if not (use_reentrant and name == "mixtral"):  # transformers' router loss has no gradient there
        assert_same_gradients(gradients(model, model(**seen(), prefix_loss=batch()).loss), want)


@needs_peft
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_under_lora(use_reentrant: bool) -> None:
    wrapped = lora(tiny(), target_modules=HEAD)
    wrapped.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    wrapped.enable_input_require_grads()
    assert_same(wrapped)


def test_under_autocast_it_is_the_loss_of_the_rounded_head() -> None:
    """Its products are of bfloat16 numbers with float32 sums, and its log-probs are not rounded."""
    model = tiny(dtype=torch.float32)
    patch_model(model, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**seen(), prefix_loss=batch())
    ours = gradients(model, out.loss)
    assert out.loss.dtype == out.logps.dtype == torch.float32

    rounded = tiny(dtype=torch.float32)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return hidden.bfloat16().float() @ rounded.lm_head.weight.bfloat16().float().t()

    rounded.lm_head.forward = head
    with torch.autocast("cpu", torch.bfloat16):
        want = plain(rounded, **seen())
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    theirs = gradients(rounded, want.loss)
    for name, grad in theirs.items():
        # gradients pass through bfloat16 layer by layer: a rounding of 2^-9 here and there
        assert (ours[name] - grad).abs().max() <= 2**-6 * grad.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_accepted_and_near_their_own_logits(dtype: torch.dtype) -> None:
    for name in ("qwen2", "gemma2, capped", "granite, divided"):
        model = tiny(name, dtype)
        patch_model(model, CONFIG)
        out = model(**seen(), prefix_loss=batch())
        want = plain(model, **seen())
        # the model's own logits, of about 10, are rounded to its dtype
        torch.testing.assert_close(out.logps.double().flatten(), want.logps, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_a_grad_scaler_gives_the_same_gradients_once_unscaled() -> None:
    model = tiny(dtype=torch.float32)
    patch_model(model, CONFIG)
    want = gradients(model, model(**seen(), prefix_loss=batch()).loss)
    optimiser, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**14)
    model.zero_grad()
    scaler.scale(model(**seen(), prefix_loss=batch()).loss).backward()
    scaler.unscale_(optimiser)
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert_same_gradients(ours, want, rtol=1e-6, atol=0)  # powers of two


def compiled_like_plain(model: Any, backend: str, *batches: PrefixBatch) -> None:
    """One graph for the model and its loss; other numbers take the same graph, and so do the model's own logits."""
    torch._dynamo.reset()
    undo, close = patch_model(model, CONFIG), SINGLE
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for given in batches:
        out = compiled(**seen(), prefix_loss=given)
        ours = gradients(model, out.loss)
        eager = model(**seen(), prefix_loss=given)
        torch.testing.assert_close(out.loss, eager.loss, **close)
        torch.testing.assert_close(out.logps, eager.logps, **close)
        torch.testing.assert_close(out.metrics, eager.metrics, **close)
        assert_same_gradients(ours, gradients(model, eager.loss), **close)
    # the model's own compiled logits: roundings of the largest through its norms
    logits = model(**seen()).logits
    assert (compiled(**seen()).logits - logits).abs().max() <= 2e-6 * logits.abs().max()
    undo()


OTHER = {"advantages": torch.linspace(-1, 1, B), "normalizer": 7.0}


def test_a_compiled_model_with_its_loss_is_one_graph() -> None:
    compiled_like_plain(tiny("qwen2-tied", torch.float32, num_hidden_layers=1), "aot_eager", batch())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gemma2, capped", "mixtral"])
def test_compiled_for_several_kinds_of_batches(name: str) -> None:
    compiled_like_plain(tiny(name, torch.float32), "aot_eager", batch(), batch(**OTHER))


@pytest.mark.slow
@needs_peft
def test_a_compiled_model_with_lora_on_its_head_is_one_graph() -> None:
    torch._dynamo.reset()
    wrapped = lora(tiny(dtype=torch.float32), target_modules=HEAD)
    compiled = torch.compile(wrapped.get_base_model(), fullgraph=True, backend="aot_eager")
    ours = gradients(wrapped, compiled(**seen(), prefix_loss=batch()).loss)
    assert_same_gradients(ours, gradients(wrapped, wrapped(**seen(), prefix_loss=batch()).loss), **SINGLE)


@pytest.mark.slow
def test_inductor_makes_the_same_loss() -> None:
    compiled_like_plain(tiny("qwen2-tied", torch.float32, num_hidden_layers=1), "inductor", batch(), batch(**OTHER))


# ---- the patch ---------------------------------------------------------------------------------------------


def test_without_the_keyword_the_model_is_its_own() -> None:
    model = tiny()
    before = model(**seen()).logits
    signature = inspect.signature(model.forward)
    undo = patch_model(model)
    assert torch.equal(model(**seen()).logits, before)
    assert inspect.signature(model.forward) == signature
    labels = inputs()["input_ids"]
    assert model(**seen(), labels=labels).loss > 0
    model.eval()
    written = model.generate(**seen(), max_new_tokens=3, do_sample=False)
    undo()
    assert torch.equal(written, model.generate(**seen(), max_new_tokens=3, do_sample=False))
    assert not {"forward", "_prefixloss"} & (set(vars(model)) | set(vars(model.lm_head)))
    undo()  # nothing left to undo
    with pytest.raises(TypeError, match="prefix_loss"):
        model.lm_head(torch.zeros(1, 16), prefix_loss=batch())


def test_a_forward_that_was_replaced_before_is_kept() -> None:
    model = tiny()
    calls = []
    own, own_head = model.forward, model.lm_head.forward
    model.forward = lambda *a, **k: (calls.append("model"), own(*a, **k))[1]
    model.lm_head.forward = lambda h: (calls.append("head"), own_head(h))[1]
    replaced = model.forward, model.lm_head.forward
    with patch_model(model):
        calls.clear()
        model(**seen(), prefix_loss=batch())
        assert calls == ["model"]
        model(**seen())
        assert calls == ["model", "model", "head"]
    assert (model.forward, model.lm_head.forward) == replaced


def test_a_copy_is_patched_on_its_own() -> None:
    model = tiny()
    undo = patch_model(model, CONFIG)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(1.3)
    undo()
    want = plain(twin, **seen()).loss
    torch.testing.assert_close(twin(**seen(), prefix_loss=batch()).loss, want, **CLOSE)
    assert not isinstance(model(**seen()), PrefixLossOutput)
    assert not hasattr(model, "_prefixloss")
    assert hasattr(twin, "_prefixloss")


def test_training_flags_and_the_random_state_are_left_alone() -> None:
    model = tiny()
    model.model.layers[0].eval()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    patch_model(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_in_the_loss_leaves_the_head_as_it_was() -> None:
    model = tiny()
    patch_model(model)
    with pytest.raises(ValueError, match="ref_logps"):
        model(**seen(), prefix_loss=batch(config=LossConfig(kl="k3", kl_coef=1.0), ref_logps=None))
    assert model(**seen()).logits.shape == (B, L, V)


# ---- what is refused ---------------------------------------------------------------------------------------


class Shifted(transformers.LlamaForCausalLM):
    """Makes something of its logits that no option says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * 1.1


class Banned(Shifted):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([5]), -1e9)


class Cut(Shifted):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., :-2]


class Twice(Shifted):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits + self.lm_head(self.model.embed_tokens(torch.zeros(2, 6, dtype=torch.int64)))) / 2


class Never(transformers.LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.t())


class Loud(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def llama(kind: type, head: Any = None) -> Any:
    model = kind(transformers.LlamaConfig(**SMALL))
    model.lm_head = model.lm_head if head is None else head
    return model


def noisy() -> Any:
    head = nn.Linear(16, V)
    inner = head.forward
    head.forward = lambda x: inner(x) + 1
    return head


def other(name: str, **options: Any) -> Any:
    small = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = {**small, "num_attention_heads": 2, "initializer_range": 0.3, **options}
    family = name.split("For", maxsplit=1)[0].removesuffix("Model").removesuffix("LMHead")
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**config))


T5 = {"d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8}
REFUSED: dict[str, tuple[Any, str]] = {
    "unknown scale": (lambda: llama(Shifted), "Shifted, which makes something unknown of its head's logits"),
    "banned token": (lambda: llama(Banned), "Banned, which makes something unknown of its head's logits"),
    "fewer columns": (lambda: llama(Cut), "Cut, which makes something unknown of its head's logits"),
    "two calls": (lambda: llama(Twice), "Twice, which calls its head 2 times"),
    "no call": (lambda: llama(Never), "Never, which calls its head 0 times"),
    "a head of its own": (lambda: llama(transformers.LlamaForCausalLM, Loud(16, V)), "a head of type .*Loud"),
    "a head that adds": (lambda: llama(transformers.LlamaForCausalLM, noisy()), "whose head adds something"),
    "not causal": (lambda: other("BertForMaskedLM"), "BertForMaskedLM, where a token changes what comes before it"),
    "no head": (lambda: other("BertModel"), "BertModel, which has no LM head"),
    "a classifier": (lambda: other("LlamaForSequenceClassification"), "SequenceClassification, which has no LM head"),
    "two halves": (lambda: other("T5ForConditionalGeneration", **T5), "T5.*, an encoder and a decoder"),
    "not a model": (lambda: nn.Linear(2, 2), "Linear, which has no LM head"),
    "nothing there": (lambda: tiny().to("meta"), "Qwen2ForCausalLM with parameters on the meta device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_not_what_the_loss_takes_them_for_are_refused_by_name(name: str) -> None:
    make, words = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=f"^model: got .*{words}.*, expected "):
        patch_model(model)
    assert not hasattr(model, "_prefixloss")


def test_a_model_is_patched_once() -> None:
    model = tiny()
    undo = patch_model(model)
    with pytest.raises(ValueError, match=r"^model: got Qwen2ForCausalLM, which is patched already"):
        patch_model(model)
    undo()
    patch_model(model)


def test_a_scale_or_cap_other_than_the_model_s_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^softcap: got 5.0, expected None: the model's own is 2.0"):
        patch_model(tiny("gemma2, capped"), LossConfig(softcap=5.0))
    with pytest.raises(ValueError, match=r"^logit_scale: got 0.5, expected 1.0: the model's own is 0.25"):
        patch_model(tiny("cohere, multiplied"), LossConfig(logit_scale=0.5))
    patch_model(tiny("gemma2, capped"), LossConfig(softcap=2.0))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (lambda: 3, TypeError, "^prefix_loss: got int, expected a PrefixBatch, or a dict of its fields"),
        (lambda: {"mask": 1}, ValueError, "^prefix_loss: got a dict without 'advantages'"),
        (
            lambda: {**vars(batch()), "masks": 1},
            TypeError,
            "^PrefixBatch: got 'masks', expected some of mask, advantages",
        ),
        (lambda: batch(mask=torch.ones(B * T)), ValueError, r"^mask: got .*, expected \[B, T\]"),
        (lambda: batch(old_logps=torch.zeros(B, L)), ValueError, "^old_logps: got .*the shape of mask"),
        (lambda: batch(old_logps=batch().old_logps.bfloat16()), TypeError, "^old_logps: got bfloat16 .*float32"),
        (lambda: PrefixBatch(torch.ones(B, L + 1), torch.ones(B)), ValueError, "^mask: got .*last T columns"),
        (lambda: PrefixBatch(torch.ones(B - 1, T), torch.ones(B - 1)), ValueError, "^mask: got .*last T columns"),
        (lambda: PrefixBatch(torch.ones(B, L), torch.ones(B)), ValueError, "^mask: got a sequence whose first token"),
        (lambda: batch(cu_seqlens=torch.tensor([0, 3])), ValueError, r"^mask: got .*\[1, N\]"),
        (lambda: batch(tokens=torch.zeros(B, T)), TypeError, "^tokens: got float32"),
    ],
)
def test_wrong_batches_are_named(given: Any, error: type[Exception], words: str) -> None:
    model = tiny()
    patch_model(model)
    with pytest.raises(error, match=words):
        model(**seen(), prefix_loss=given())


def test_wrong_calls_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    patch_model(model)
    with pytest.raises(ValueError, match=r"^labels: got a value beside prefix_loss"):
        model(**seen(), labels=inputs()["input_ids"], prefix_loss=batch())
    with pytest.raises(ValueError, match=r"^model: got hidden states of shape \[4, 2, 16\] at its head"):
        model(**seen(), logits_to_keep=2, prefix_loss=batch())
    with pytest.raises(TypeError, match=r"^config: got dict"):
        patch_model(tiny(), {"kl": None})
    monkeypatch.setattr("prefixloss.integrations.transformers.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        model(**seen(), prefix_loss=batch())

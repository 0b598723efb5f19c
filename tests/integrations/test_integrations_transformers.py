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

from prefixloss import LossConfig, linear_logps, linear_prefix_loss
from prefixloss.integrations.models.positions import takes_positions
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


# ---- positions ---------------------------------------------------------------------------------------------


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking at a mask would stall the stream."""
    monkeypatch.setattr("prefixloss.check.readable", lambda _: False)


def wide() -> PrefixBatch:
    """`batch()`, about all columns."""
    names = ("mask", "old_logps", "ref_logps")
    return batch(**{name: nn.functional.pad(getattr(batch(), name), (PROMPT, 0)) for name in names})


@pytest.mark.parametrize("given", [batch, wide])
@pytest.mark.parametrize(
    "keep",
    [0, T + 1, L - 1, L, L + 5, torch.arange(L), torch.arange(PROMPT - 1, L - 1), torch.tensor([-6, -5, -4, -3, -2])],
    ids=str,
)
def test_logits_of_some_positions_are_enough_where_they_are_those_of_the_scored_tokens(keep: Any, given: Any) -> None:
    model = tiny()
    patch_model(model, CONFIG)
    want = model(**seen(), prefix_loss=given())
    out = model(**seen(), logits_to_keep=keep, prefix_loss=given())
    torch.testing.assert_close(out.loss, plain(model, **seen()).loss, **CLOSE)
    for name in ("logps", "entropy", "kl", "learning"):
        torch.testing.assert_close(getattr(out, name), getattr(want, name), rtol=1e-12, atol=1e-12)
    assert_same_gradients(gradients(model, out.loss), gradients(model, want.loss))
    tokens = replace(CONFIG, reduction="none")
    each, every = (
        model(**seen(), prefix_loss=given().replace(config=tokens), **more).loss
        for more in ({"logits_to_keep": keep}, {})
    )
    torch.testing.assert_close(each, every, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [T, L])
@pytest.mark.parametrize(
    "keep", [1, 4, T, torch.arange(PROMPT, L), torch.tensor([2, 3, 5, 6, 7]), torch.arange(T + 1)], ids=str
)
def test_logits_that_leave_out_a_scored_token_s_are_refused(keep: Any, columns: int) -> None:
    """The first response is of all T columns. Nothing runs before."""
    model = tiny()
    patch_model(model)
    model.model.forward = None
    with pytest.raises(
        ValueError, match=f"^logits_to_keep: got .* of {L} positions, expected the positions before all"
    ):
        model(**seen(), logits_to_keep=keep, prefix_loss=wide() if columns == L else batch())


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        (-1, ValueError),
        (2.0, ValueError),
        (True, ValueError),
        (torch.tensor(3), ValueError),
        (torch.tensor([2, 3, 4, 5, 6, 6]), ValueError),
        (torch.tensor([5, 4]), ValueError),
        (torch.tensor([1, L]), ValueError),
        (torch.tensor([1.0]), TypeError),
        (torch.ones(L, dtype=torch.bool), TypeError),
    ],
    ids=str,
)
def test_logits_to_keep_that_are_no_positions_are_named(keep: Any, error: type[Exception]) -> None:
    model = tiny()
    patch_model(model)
    with pytest.raises(error, match=r"^logits_to_keep: got "):
        model(**seen(), logits_to_keep=keep, prefix_loss=batch())


def row(drop: int = 0) -> tuple[dict[str, torch.Tensor], PrefixBatch, torch.Tensor]:
    """`inputs()` without padding in one row, all scored but each sequence's first, without `drop` columns of mask."""
    given = inputs()
    kept = given["attention_mask"].bool()
    offsets = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    ids, places = given["input_ids"][kept][None], given["position_ids"][kept][None]
    mask = (places > 0)[:, drop:]
    return {"input_ids": ids, "position_ids": places}, PrefixBatch(mask, torch.ones(4), cu_seqlens=offsets), kept


@pytest.mark.parametrize("drop", [0, 1])
def test_the_first_token_of_a_packed_sequence_is_never_scored_from_the_one_before(
    drop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the mask's values are looked at, an error; elsewhere those columns are cleared on the device."""
    model = tiny()
    patch_model(model)
    call, given, _ = row(drop)
    want = model(**call, prefix_loss=given)
    everything = given.replace(mask=torch.ones_like(given.mask))
    with pytest.raises(ValueError, match=r"^mask: got a sequence whose first token is scored"):
        model(**call, prefix_loss=everything)
    unread(monkeypatch)
    got = model(**call, prefix_loss=everything)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    assert torch.equal(got.logps, want.logps)
    assert got.metrics["scored_tokens"] == given.mask.sum()


@pytest.mark.parametrize("columns", [L - 1, L])
def test_a_token_behind_padding_is_never_scored_from_it(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row begins with padding; the first real token of each has nothing before it."""
    model = tiny()
    patch_model(model)
    attended = (torch.arange(L) >= torch.tensor([1, 2, 4, 3])[:, None]).long()
    ids = inputs()["input_ids"].clamp(min=3)
    mask = attended[:, -columns:].bool()
    call = {"input_ids": ids, "attention_mask": attended}
    with pytest.raises(ValueError, match=r"^mask: got a sequence whose first token is scored"):
        model(**call, prefix_loss=PrefixBatch(mask, torch.ones(B)))
    apart = mask & (attended.cumsum(1) > 1)[:, -columns:]
    want = model(**call, prefix_loss=PrefixBatch(apart, torch.ones(B)))
    assert_same(model, config=LossConfig(), given=PrefixBatch(apart[:, -L + 1 :], torch.ones(B)), **call)
    unread(monkeypatch)
    got = model(**call, prefix_loss=PrefixBatch(mask, torch.ones(B)))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    assert torch.equal(got.logps, want.logps)


def test_an_end_token_that_is_not_attended_to_may_be_scored() -> None:
    """Where the end token is the padding token, a mask made of the ids leaves out the one at the end as well."""
    model = tiny()
    patch_model(model, CONFIG)
    call = seen(attention_mask=inputs()["attention_mask"].clone())
    call["attention_mask"][0, -1] = 0
    assert batch().mask[0, -1]
    assert_same(model, **call)


@pytest.mark.parametrize("at", ["front", "middle", "end", "everywhere"])
def test_empty_sequences_in_a_packed_row_change_nothing(at: str) -> None:
    model = tiny()
    patch_model(model)
    call, given, _ = row()
    want = model(**call, prefix_loss=given)
    offsets, weights = given.cu_seqlens.tolist(), [1.0] * 4
    for place in {"front": [0], "middle": [2], "end": [4], "everywhere": [4, 4, 2, 0, 0]}[at]:
        offsets.insert(place, offsets[place])
        weights.insert(place, 9.0)
    out = model(**call, prefix_loss=given.replace(cu_seqlens=torch.tensor(offsets), advantages=torch.tensor(weights)))
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-12, atol=0)
    assert torch.equal(out.logps, want.logps)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_ids": None}, "^position_ids: got None with several sequences in a row"),
        ({"position_ids": torch.arange(23)[None]}, "^position_ids: got ids that go on from one sequence into the next"),
        ({"attention_mask": torch.ones(1, 23)}, r"^attention_mask: got float32 \[1, 23\] beside several sequences"),
        ({"use_cache": True}, "^use_cache: got a cache with several sequences"),
    ],
)
def test_packed_sequences_that_would_see_each_other_are_refused(changes: dict[str, Any], words: str) -> None:
    model = tiny()
    patch_model(model)
    call, given, kept = row()
    assert kept.sum() == 22
    cut = {name: x[:, :22] if isinstance(x, torch.Tensor) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=words.replace("23", "22")):
        model(**{**call, **cut}, prefix_loss=given)
    # what is refused does join them: the second sequence's log-probs are others
    joined = model(**{**call, **cut}).logits
    apart = model(**call, use_cache=False).logits
    assert (joined - apart)[:, given.cu_seqlens[1] :].abs().max() > 0.01


def test_a_model_that_joins_packed_sequences_is_refused_by_name_and_one_sequence_taken() -> None:
    config = transformers.OPTConfig(
        vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64, init_std=0.3, dropout=0.0,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    patch_model(model)
    call, given, _ = row()
    with pytest.raises(ValueError, match=r"^cu_seqlens: got several sequences in a row of OPTForCausalLM"):
        model(**call, prefix_loss=given)
    one = PrefixBatch(given.mask[:, :8], torch.ones(2), cu_seqlens=torch.tensor([0, 8, 8]))
    assert model(input_ids=call["input_ids"][:, :8], prefix_loss=one).loss.isfinite()


ABSOLUTE = {
    "gpt2": lambda: tiny("gpt2"),
    "gpt-neo": lambda: other("GPTNeoForCausalLM", num_layers=1, num_heads=2, attention_types=[[["global"], 1]]),
    "bert": lambda: other("BertLMHeadModel", is_decoder=True),
    # these find their places on their own, RoBERTa from the ids: its first is not 0
    "opt": lambda: other("OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=16, init_std=0.3),
    "roberta": lambda: other("RobertaForCausalLM", is_decoder=True, pad_token_id=0),
}


@pytest.mark.parametrize("position_ids", [False, True])
@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_positions_are_those_of_each_sequence_alone(name: str, position_ids: bool) -> None:
    """Padded on the left, with the mask alone; positions that are given are taken as they are."""
    model = ABSOLUTE[name]().eval()
    patch_model(model, LossConfig(stats="scored"))
    given = inputs()
    if position_ids and name == "roberta":
        given["position_ids"] = (given["position_ids"] + 1) * given["attention_mask"]
    more = {"position_ids": given["position_ids"]} if position_ids else {}
    out = model(**seen(**more), prefix_loss=batch(ref_logps=None))
    mask, kept = batch().mask, given["attention_mask"].bool()
    for i in range(B):
        ids = given["input_ids"][i][kept[i]][None]
        alone = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(out.logps[i][mask[i]].to(alone), alone[-int(mask[i].sum()) :], rtol=1e-4, atol=1e-5)


def test_positions_that_are_given_are_taken_as_they_are() -> None:
    model = tiny("gpt2")
    patch_model(model, CONFIG)
    others = inputs()["position_ids"] + 7
    assert_same(model, **seen(position_ids=others))
    assert not torch.equal(model(**seen(), prefix_loss=batch()).loss, plain(model, **seen(position_ids=others)).loss)


def test_a_model_that_makes_positions_of_several_axes_is_left_to_it() -> None:
    class Axes(transformers.LlamaForCausalLM):
        def _prepare_position_ids_for_generation(self, *_: Any) -> Any:
            return None

    class Inherits(Axes):
        pass

    assert takes_positions(llama(transformers.LlamaForCausalLM))
    assert not takes_positions(llama(Axes))
    assert not takes_positions(llama(Inherits))


RECURRENT = {
    "Rwkv": {"context_length": 64},
    # takes position ids as well, for its attention: they do not help
    "RecurrentGemma": {
        "num_attention_heads": 2, "intermediate_size": 24, "lru_width": 16, "attention_window_size": 16,
        "w_init_variance_scale": 1.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_model_that_reads_on_through_padding_is_found(name: str) -> None:
    if name == "RecurrentGemma" and transformers.__version__ < "5":
        pytest.skip("before transformers 5 it keeps its state from one call to the next, without a cache too")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V, hidden_size=16, num_hidden_layers=3, **RECURRENT[name]
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    patch_model(model)
    with pytest.raises(ValueError, match=f"^attention_mask: got padding before tokens of {name}ForCausalLM"):
        model(**seen(), prefix_loss=batch())
    right = inputs(left=False)
    out = model(
        input_ids=right["input_ids"], attention_mask=right["attention_mask"],
        prefix_loss=PrefixBatch(right["response"], torch.ones(B)),
    )  # fmt: skip
    assert out.loss.isfinite()


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


class Int8(torch.Tensor):
    """As torchao's quantised weights are: it calls itself float32, and a linear layer takes it; nothing else does."""

    def __new__(cls, ids: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, ids.shape, dtype=scale.dtype)

    def __init__(self, ids: torch.Tensor, scale: torch.Tensor) -> None:
        self.ids, self.scale = ids, scale

    def __tensor_flatten__(self) -> Any:
        return ["ids", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Any:
        return Int8(inner["ids"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(args[0], args[1].ids * args[1].scale, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].ids, args[0].scale)
        raise NotImplementedError(func)


def int8() -> nn.Parameter:
    return nn.Parameter(Int8(torch.ones(V, 16, dtype=torch.int8), torch.tensor(0.1)), requires_grad=False)


class Linear8(nn.Linear):
    """As bitsandbytes' layers are: a class of their own over a weight of integers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 0.1)


class Packed8(nn.Module):
    """As torch.ao's layers are: `weight` is a method."""

    def weight(self) -> torch.Tensor:
        return torch.ones(V, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight())


def quantised(kind: str) -> nn.Module:
    head: nn.Module = nn.Linear(16, V, bias=False)
    if kind == "a subclass":
        head.weight = int8()
    elif kind == "integers":
        head = Linear8(16, V, bias=False)
        head.weight = nn.Parameter(torch.ones(V, 16, dtype=torch.int8), requires_grad=False)
    elif kind == "float8":
        head.weight = nn.Parameter(head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    else:
        head = Packed8()
    return head


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("a subclass", "Linear with a weight of Int8"),
        ("integers", r"Linear8 with a weight of int8 \[48, 16\]"),
        ("float8", r"Linear with a weight of float8_e4m3fn \[48, 16\]"),
        ("a method", "Packed8 with a weight of method"),
    ],
)
def test_a_quantised_head_is_refused_by_name(kind: str, words: str, verify: bool, adapter: bool) -> None:
    model = llama(transformers.LlamaForCausalLM, quantised(kind))
    if adapter:  # a layer over it, as PEFT has
        model.lm_head = nn.Identity()
        model.lm_head.base_layer = quantised(kind)
    with pytest.raises(ValueError, match=f"^model: got a quantised head, .*{words}, expected one in floating point: "):
        patch_model(model, verify=verify)
    assert not hasattr(model, "_prefixloss")


def test_a_head_that_is_quantised_under_an_active_patch_is_refused_before_the_model_runs() -> None:
    model = tiny()
    patch_model(model)
    model.lm_head = quantised("a subclass")
    model.model.forward = None
    with pytest.raises(ValueError, match=r"^model: got a quantised head"):
        model(**seen(), prefix_loss=batch())


@pytest.mark.parametrize("weight", [int8, lambda: torch.ones(V, 16, dtype=torch.int8), lambda: Packed8().weight])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_quantised_weight_is_refused_by_name(weight: Any, backend: str) -> None:
    """linear_logps is what the other trainers' heads call."""
    hidden, ids = torch.randn(3, 16), torch.zeros(3, dtype=torch.int64)
    words = r"^lm_head_weight: got (Int8|int8 \[48, 16\]|method), expected .*leave the head out of the quantisation"
    with pytest.raises(TypeError, match=words):
        linear_prefix_loss(hidden, weight(), ids, torch.ones(3), backend=backend)
    with pytest.raises(TypeError, match=words):
        linear_logps(hidden, weight(), ids, backend=backend)


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
    hook = model.model.norm.register_forward_hook(lambda *given: given[-1][:, :2])
    with pytest.raises(ValueError, match=r"^model: got hidden states of shape \[4, 2, 16\] at its head"):
        model(**seen(), prefix_loss=batch())
    hook.remove()
    with pytest.raises(TypeError, match=r"^config: got dict"):
        patch_model(tiny(), {"kl": None})
    monkeypatch.setattr("prefixloss.integrations.transformers.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        model(**seen(), prefix_loss=batch())

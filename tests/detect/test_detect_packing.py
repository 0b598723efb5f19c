"""Several responses in one row of a model: the same loss and gradients as one in each, and none sees another."""

import json

import pytest
import torch
from test_detect_train_prm import SEPARATOR, base_in, invoke, records, written
from transformers import AutoConfig, AutoModelForTokenClassification, LlamaForTokenClassification

from prefixloss.detect.models import packing
from prefixloss.detect.models.packing import check_packing, laid, packed
from prefixloss.detect.models.reading import Marked
from prefixloss.detect.prm_examples import Settings, examples_of, load_base
from prefixloss.detect.prm_learner import _loss, balance
from prefixloss.detect.records import Record

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 2, "num_local_experts": 4,
}  # fmt: skip
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
APART = {  # with rotated, learned and windowed places
    "llama": {}, "qwen2": {}, "gpt_neox": {}, "gpt2": {}, "mistral": {"sliding_window": 4}, "gemma2": WINDOW,
}  # fmt: skip
MIXED = {  # one that looks both ways, one whose state runs on, one whose places come from its mask
    "bert": {}, "minimax": {"layer_types": ["linear_attention", "full_attention"]}, "bloom": {},
}  # fmt: skip


def model_of(kind: str, attention: str = "sdpa", **settings: object):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings}, attn_implementation=attention)
    model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)  # as far from even attention as a trained one's
    return model.eval()


def responses(lengths: tuple[int, ...] = (9, 4, 17, 5, 8), seed: int = 1) -> list[Marked]:
    made = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 64, (n,), generator=made).tolist() for n in lengths]
    return [Marked(one, [len(one) // 2, len(one) - 1]) for one in ids]


# rows


def test_rows_are_as_long_as_the_longest_and_filled_from_the_long_ones_down() -> None:
    assert packed([3, 9, 4, 5, 2]) == [[1], [3, 2], [0, 4]]
    assert packed([4, 4]) == [[0], [1]]
    assert packed([7]) == [[0]]


def test_positions_start_again_with_each_response_and_where_they_end() -> None:
    batch = [Marked([3, 4, 5], [1, 2]), Marked([6, 7, 8, 9, 10, 11], [5]), Marked([12], [0])]
    inputs, ends, padding = laid(batch, CPU, packing=True)
    assert inputs["input_ids"].tolist() == [[6, 7, 8, 9, 10, 11], [3, 4, 5, 12, 0, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 1]]
    assert inputs["input_ids"].flatten()[ends].tolist() == [4, 5, 11, 12]
    assert padding == 2
    inputs, ends, padding = laid(batch, CPU, packing=False)
    assert inputs["input_ids"].flatten()[ends].tolist() == [4, 5, 11, 12]
    assert inputs["attention_mask"].sum(1).tolist() == [3, 6, 1]
    assert padding == 8


# what comes of them


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Without the head's dropout, which falls on other numbers in other rows."""
    return base_in(tmp_path_factory.mktemp("base"), classifier_dropout=0.0)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [*((kind, "eager") for kind in APART), *((kind, "sdpa") for kind in APART if kind != "gemma2")],
)
def test_no_response_of_a_row_sees_another(kind: str, attention: str) -> None:
    """Another one's tokens change, and not a bit of the rest."""
    model, batch = model_of(kind, attention, **APART[kind]), responses()
    rows = packed([len(one.ids) for one in batch])
    assert [2] in rows
    assert [0, 4] in rows
    check_packing(model, batch)

    def logits() -> torch.Tensor:
        inputs, ends, _ = laid(batch, CPU, packing=True)
        with torch.no_grad():
            return model(**inputs).logits.flatten(0, 1)[ends].view(len(batch), 2, 2)

    before = logits()
    for changed in range(len(batch)):
        kept = batch[changed]
        batch[changed] = Marked([(token + 7) % 60 + 3 for token in kept.ids], kept.ends)
        others = [k for k in range(len(batch)) if k != changed]
        after = logits()
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[changed], before[changed])
        batch[changed] = kept


@pytest.mark.parametrize("kind", MIXED)
def test_a_model_that_mixes_them_is_refused(kind: str) -> None:
    model = model_of(kind, "eager", **MIXED[kind]).train()
    with pytest.raises(ValueError, match=r"packing: \w+ does not keep .* apart, its logits move by"):
        check_packing(model, responses())
    assert model.training


def test_a_model_that_takes_no_positions_is_refused(monkeypatch) -> None:
    model = model_of("llama")
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask: real(input_ids, attention_mask))
    with pytest.raises(ValueError, match=r"packing: Llama\w+ does not keep .* unexpected keyword argument"):
        check_packing(model, responses())


def test_one_that_forgets_to_start_again_is_found_by_the_trial(monkeypatch) -> None:
    """With untrained weights, which hardly attend to anything."""
    torch.manual_seed(0)
    model = LlamaForTokenClassification(AutoConfig.for_model("llama", **SIZES))
    check_packing(model, responses())
    places = packing._inputs

    def run_on(rows, device, packs):
        inputs = places(rows, device, packs)
        if packs:
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        return inputs

    monkeypatch.setattr(packing, "_inputs", run_on)
    with pytest.raises(ValueError, match="packing: Llama"):
        check_packing(model, responses())


def test_loss_and_gradients_are_those_of_one_response_a_row(base) -> None:
    """In float64, whose rounding of sums over some hundred tokens and widths stays below 1e-12 of the largest."""
    settings = Settings(held_out=0.2, device="cpu")
    model, tokens = load_base(base, settings)
    training, _ = examples_of(records(40), model, tokens, settings)
    model.double().eval()
    weights, batch = balance(training).double(), training[:12]
    found = {}
    for packs in (False, True):
        inputs, ends, padding = laid([example.marked for example in batch], CPU, packs)
        loss = _loss(model(**inputs).logits.flatten(0, 1)[ends], batch, weights)
        model.zero_grad()
        loss.backward()
        found[packs] = loss.detach(), [p.grad for p in model.parameters()], padding
    assert found[True][2] < 0.5 * found[False][2]
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-12, atol=0)
    for together, alone in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12 * float(alone.abs().max()))


# the command


def lines(made: list[Record]) -> list[dict]:
    return [{"problem": r.problem, "steps": r.steps, "first_error": None if r.label < 0 else r.label} for r in made]


def test_a_judge_is_trained_from_packed_rows_and_judges_alike(base, tmp_path) -> None:
    data = written(tmp_path / "labels.jsonl", lines(records(40)))
    reports = {}
    for name, extra in (("alone", []), ("together", ["--packing"])):
        result = invoke("train", data, "--model", base, "--out", tmp_path / name, "--lr", 0.01, *extra)
        assert result.exit_code == 0, result.output
        reports[name] = json.loads((tmp_path / name / "report.json").read_text())
        assert f"{reports[name]['padding']:.0%} of what the model read was padding" in " ".join(result.output.split())
    alone, together = reports["alone"], reports["together"]
    assert together["padding"] < 0.5 * alone["padding"]
    # float32 rounds to 6e-8; six steps of AdamW, which divides by what is small, make no more than a thousandth of it
    assert together["held_out_loss"] == pytest.approx(alone["held_out_loss"], rel=1e-3)
    assert SEPARATOR in (tmp_path / "together" / "tokenizer.json").read_text()


def test_a_base_that_cannot_is_refused_with_one_line_and_leaves_nothing(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("prefixloss.detect.models.packing._APART", -1.0)
    data = written(tmp_path / "labels.jsonl", lines(records(12)))
    result = invoke("train", data, "--model", base, "--out", tmp_path / "out", "--packing")
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert "prefixloss: packing: LlamaForTokenClassification does not keep the responses of a row apart" in said
    assert said.endswith("leave it off")
    assert [path.name for path in tmp_path.iterdir()] == ["labels.jsonl"]

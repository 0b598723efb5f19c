"""Text to steps, and steps to tokens."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefixloss.steps import decode, pieces, split, step_tokens, token_boundaries

SEGMENTERS = ("markers", "blank-lines", "lines", "sentences")
TEXT = "Intro.\nStep 1: 2 + 3 = 5.\n\n**Step 2: 5 * 4 = 20.** Naïve café 😀 漢字.\r\nStep 3: so 20. Answer: 20\n"
CORPUS = [TEXT, "Step 4: the answer is 12. We add 3.5 and 8.5.", "naïve café 😀😃 漢字かな", "a b c, d! (e) 'f'"] * 4


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"])
    )
    return tokenizer


def sentencepiece_style() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer.train_from_iterator(
        ["Step 1: 2 + 3 = 5. so the answer is 20"] * 4,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>", "<unk>", *bytes_]),
    )
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<eos>", "[UNK]"], show_progress=False)
    )
    return tokenizer


TOKENIZERS = {
    make.__name__: PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="<eos>")
    for make in (byte_level, sentencepiece_style, wordpiece)
}
tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def sampled(tokenizer: PreTrainedTokenizerFast, text: str, rng: random.Random, canonical: bool) -> list[int]:
    """Tokens of a text; not canonical: the text is cut at random places and its pieces are tokenized apart."""
    if canonical:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    cuts = sorted(rng.sample(range(len(text) + 1), min(6, len(text) + 1)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [i for piece in pieces if piece for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]


# steps


@pytest.mark.parametrize("by", SEGMENTERS)
@given(text=st.text(alphabet="Step 12.:\n\r *é😀!?ab", max_size=60))
def test_spans_tile_the_text(by: str, text: str) -> None:
    spans = split(text, by)
    assert "".join(span.of(text) for span in spans) == text
    assert all(span.start < span.end for span in spans)


def test_markers_start_steps_and_what_stands_before_the_first_belongs_to_it() -> None:
    steps = [span.of(TEXT) for span in split(TEXT)]
    assert [step[:12] for step in steps] == ["Intro.\nStep ", "**Step 2: 5 ", "Step 3: so 2"]


def test_a_numbered_list_marks_steps_where_no_step_marker_does() -> None:
    text = "We know:\n1. a = 2\n2) b = 3.5\n**3.** so 5.5\n7. of them"
    assert [span.of(text).strip() for span in split(text)] == [
        "We know:\n1. a = 2",
        "2) b = 3.5",
        "**3.** so 5.5\n7. of them",
    ]


def test_a_marker_out_of_order_or_inside_a_line_starts_nothing() -> None:
    text = "Step 1: go on as in Step 2 of the book.\nStep 3: no.\nStep 2: yes.\nStep 2: again."
    assert [span.of(text)[:7] for span in split(text)] == ["Step 1:", "Step 2:"]


def test_decimals_abbreviations_and_initials_end_no_sentence() -> None:
    text = "It costs 3.5 dollars, e.g. today. J. Smith pays! Does he? (Yes.) He does."
    assert [span.of(text).strip() for span in split(text, "sentences")] == [
        "It costs 3.5 dollars, e.g. today.",
        "J. Smith pays!",
        "Does he?",
        "(Yes.)",
        "He does.",
    ]


def test_blank_lines_may_hold_spaces_and_carriage_returns() -> None:
    text = "a\r\n\r\nb\n \nc\nd"
    assert [span.of(text) for span in split(text, "blank-lines")] == ["a\r\n\r\n", "b\n \n", "c\nd"]


def test_no_text_has_no_steps_and_an_unknown_segmenter_is_named() -> None:
    assert split("") == []
    with pytest.raises(ValueError, match="by: got 'words'"):
        split("a", "words")  # type: ignore[arg-type]


# tokens


@tokenizers
@pytest.mark.parametrize("canonical", [True, False])
def test_tokens_before_a_boundary_decode_to_the_text_before_it(
    tokenizer: PreTrainedTokenizerFast, canonical: bool
) -> None:
    rng = random.Random(0)
    exact = 0
    for _ in range(40):
        ids = [*sampled(tokenizer, TEXT, rng, canonical), tokenizer.eos_token_id]
        text = decode(tokenizer, ids)
        offsets = list(range(len(text) + 1))
        for offset, count in zip(offsets, token_boundaries(tokenizer, ids, offsets), strict=True):
            before = decode(tokenizer, ids[:count]).rstrip("\ufffd")
            # a token that straddles the boundary is not among those before it
            assert text[:offset].startswith(before)
            if before != text[:offset]:
                after = decode(tokenizer, ids[: count + 1])
                assert len(after.rstrip("\ufffd")) > offset or after.endswith("\ufffd")
            else:
                exact += 1
                # and the fewest do: half of the next character is not among them
                assert count == 0 or decode(tokenizer, ids[: count - 1]) != before
    assert exact > 400  # most boundaries between words and steps fall between tokens


@tokenizers
def test_a_boundary_is_where_a_plain_count_over_all_prefixes_puts_it(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = sampled(tokenizer, TEXT, random.Random(1), canonical=False)
    text = decode(tokenizer, ids)
    prefixes = [decode(tokenizer, ids[:k]) for k in range(len(ids) + 1)]
    offsets = [span.start for span in split(text, "sentences")]
    for offset, count in zip(offsets, token_boundaries(tokenizer, ids, offsets), strict=True):
        exact = [k for k, prefix in enumerate(prefixes) if prefix == text[:offset]]
        if exact:
            assert count == exact[0]


def test_a_token_that_straddles_the_boundary_belongs_to_the_later_step() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b\nStep": 1, " 2": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    # text "ab\nStep 2": the step starts at character 3, inside token 1
    assert decode(fast, [0, 1, 2]) == "ab\nStep 2"
    assert token_boundaries(fast, [0, 1, 2], [0, 1, 3, 7, 9]) == [0, 1, 1, 2, 3]


def test_half_a_character_is_no_part_of_the_text_before_it() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    emoji = tokenizer.convert_tokens_to_ids(list("ðŁĺĢ"))  # the vocabulary's letters for the four bytes of 😀
    ids = [*tokenizer("ok", add_special_tokens=False)["input_ids"], *emoji]
    head = len(ids) - 4
    assert decode(tokenizer, ids) == "ok😀"
    assert token_boundaries(tokenizer, ids, [2, 3]) == [head, len(ids)]


@tokenizers
@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="Step 123:=+\n\r éß漢😀.", max_size=40))
def test_steps_and_their_first_tokens_fit_together(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    steps, starts = step_tokens(tokenizer, ids, "lines")
    assert "".join(steps) == decode(tokenizer, ids)
    assert starts == sorted(starts)
    assert starts[:1] in ([], [0])
    assert all(0 <= start < len(ids) for start in starts)


@tokenizers
@pytest.mark.parametrize("canonical", [True, False])
def test_pieces_join_to_the_text_and_end_where_the_tokens_do(
    tokenizer: PreTrainedTokenizerFast, canonical: bool
) -> None:
    ids = sampled(tokenizer, TEXT, random.Random(2), canonical=canonical)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == decode(tokenizer, ids)
    for count in range(len(ids)):
        assert decode(tokenizer, ids[:count]).startswith("".join(found[:count]))
    assert pieces(tokenizer, []) == []


@pytest.mark.parametrize("text", [None, b"Step 1: 2", 3, ["Step 1"]])
def test_only_a_text_is_cut(text: object) -> None:
    with pytest.raises(TypeError, match=r"text: got .*, expected a string"):
        split(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", [None, "words", ["lines"], 1])
def test_only_known_ways_to_cut_are_taken(by: object) -> None:
    with pytest.raises(ValueError, match=r"by: got .*, expected 'markers'"):
        split("a", by)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [-1, 1000, 0.5, True, None])
def test_offsets_lie_within_the_text(offset: object) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer("Step 1: 2", add_special_tokens=False)["input_ids"]
    assert token_boundaries(tokenizer, ids, [0, len("Step 1: 2")]) == [0, len(ids)]
    with pytest.raises(ValueError, match=r"offsets: got .*, expected whole numbers from 0 to 9"):
        token_boundaries(tokenizer, ids, [0, offset])  # type: ignore[list-item]

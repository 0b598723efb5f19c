"""The tiny model and its tokenizer, offsets to tokens, and the exactness of what the loss is given for any model."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from prefixloss import linear_logps
from prefixloss.rl import UsageError, policy, task


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return policy.tiny_policy(16, 1)


def byte_tokenizer():
    """One token a byte, so that a character may take several; a merge makes "1\\n" one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate(["<eos>", *alphabet, "1\u010a"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("1", "\u010a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


# ---- the tiny tokenizer


def test_tiny_tokenizer_gives_back_questions_and_solutions_without_unknown_tokens(tiny):
    for p in task.chains(0, 0, 100):
        ids = tiny.tokenizer.encode(f"{p.question}\n{p.solution}")
        assert tiny.tokenizer.unk_token_id not in ids
        assert policy.decode(tiny.tokenizer, ids) == f"{p.question}\n{p.solution}"


def test_tiny_model_has_fewer_than_five_million_parameters():
    assert sum(p.numel() for p in policy.tiny_policy(64, 2).model.parameters()) < 5e6


# ---- offsets


def test_token_at_the_start_of_each_line_is_its_step_marker(tiny):
    for p in task.chains(0, 0, 50):
        ids = tiny.tokenizer.encode(p.solution)
        offset = 0
        for line in p.lines:
            token = policy.token_at(tiny.tokenizer, ids, offset)
            assert line.startswith(tiny.tokenizer.decode([ids[token]]))
            assert policy.decode(tiny.tokenizer, ids[:token]) == p.solution[:offset]
            offset += len(line) + 1


def test_a_token_that_straddles_the_offset_belongs_to_the_later_step():
    tokenizer = byte_tokenizer()
    text = "=11\nStep"
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids)[2] == "1\u010a"
    assert policy.token_at(tokenizer, ids, 2) == 2  # at the 1 it starts with
    assert policy.token_at(tokenizer, ids, 3) == 2  # at the newline inside it
    assert policy.token_at(tokenizer, ids, 4) == 3


def test_a_character_of_several_tokens_is_found_at_its_first():
    tokenizer = byte_tokenizer()
    text = "a\u20ac\U0001f600b"  # 1, 3, 4 and 1 bytes
    ids = tokenizer.encode(text)
    assert len(ids) == 9
    assert [policy.token_at(tokenizer, ids, offset) for offset in range(4)] == [0, 1, 4, 8]


def test_an_offset_at_the_end_is_the_end_token(tiny):
    ids = [*tiny.tokenizer.encode("Step 1: 2+3=5"), tiny.tokenizer.eos_token_id]
    assert policy.token_at(tiny.tokenizer, ids, len("Step 1: 2+3=5")) == len(ids) - 1


# ---- sampling


def test_sample_scores_the_response_up_to_its_end_token_and_marks_what_was_cut_off(tiny):
    torch.manual_seed(1)
    questions = [p.question for p in task.chains(0, 0, 64)]
    sampled = tiny.sample(questions, 20)
    eos = tiny.tokenizer.eos_token_id
    assert 0 < sampled.finished.sum() < 64  # a random model ends about half of them
    for i in range(64):
        tokens, mask = sampled.tokens[i].tolist(), sampled.mask[i].tolist()
        length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        assert mask == [True] * length + [False] * (len(tokens) - length)
        assert bool(sampled.finished[i]) == (eos in tokens)
        assert sampled.texts[i] == policy.decode(tiny.tokenizer, tokens[:length])
    assert sampled.prompt_lengths.tolist() == [len(tiny.tokenizer.encode(tiny.prompt(q))) for q in questions]


def test_padding_changes_no_log_prob(tiny):
    pairs = [("2+3=?", "Answer: 5"), ("((2+3)*4+5)*2=?", "Step 1: 2+3=5\nAnswer: 50")]
    questions, responses = zip(*pairs, strict=True)
    together = tiny.written(questions, responses)
    logps = linear_logps(tiny.hidden(together), tokens=together.tokens, mask=together.mask, **tiny.head).logps
    for i, (q, r) in enumerate(pairs):
        alone = tiny.written([q], [r])
        expected = linear_logps(tiny.hidden(alone), tokens=alone.tokens, mask=alone.mask, **tiny.head).logps[0]
        torch.testing.assert_close(logps[i][together.mask[i]], expected)


# ---- hidden states and head

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS = {
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
    "logit_scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    "tied": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_are_the_models_own(tiny, kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    for p in model.parameters():
        torch.nn.init.normal_(p)  # far from uniform, a bias that is not 0
    wrapped = policy.Policy(model, tiny.tokenizer)
    pairs = [("2+3=?", "Answer: 5"), ("((2+3)*4+5)*2=?", "Step 1: 2+3=5\nAnswer: 50")]
    sampled = wrapped.written(*zip(*pairs, strict=True))
    ours = linear_logps(wrapped.hidden(sampled), tokens=sampled.tokens, mask=sampled.mask, **wrapped.head).logps
    for i in range(2):
        ids = sampled.ids[i][sampled.attention[i].bool()][None]
        length = int(sampled.mask[i].sum())
        theirs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        expected = theirs.gather(-1, ids[0, 1:, None])[-length:, 0]
        torch.testing.assert_close(ours[i][sampled.mask[i]], expected, rtol=1e-4, atol=1e-4)


def test_a_models_own_sampling_defaults_are_dropped(tiny):
    model = MODELS["bias"]()
    model.generation_config = GenerationConfig(top_p=0.5, repetition_penalty=1.3, eos_token_id=[1, 5])
    wrapped = policy.Policy(model, tiny.tokenizer)
    assert wrapped.end_ids == [1, 5]
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert model.generation_config.top_p in (None, 1.0)


# ---- loading


def test_a_saved_policy_loads_again_with_the_same_logits(tiny, tmp_path):
    tiny.save(tmp_path)
    loaded = policy.load_policy(str(tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, tiny.model(input_ids=ids).logits)
    assert "Step 1:" in loaded.prompt("How many?")
    assert "How many?" in loaded.prompt("How many?")


def test_load_policy_names_the_argument_and_the_reason(tmp_path):
    with pytest.raises(UsageError, match=r"--model: cannot load .*"):
        policy.load_policy(str(tmp_path))


def test_a_model_whose_logits_are_not_its_head_is_refused(tiny):
    model = MODELS["logits_scaling"]()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    wrapped = policy.Policy(model, tiny.tokenizer)
    policy.check_head(wrapped, "granite")
    wrapped.logit_scale = 1.0
    with pytest.raises(UsageError, match="granite"):
        policy.check_head(wrapped, "granite")


def test_a_recurrent_model_that_reads_on_through_padding_is_refused(tiny):
    """Its logits are its head's; with a prompt padded on the left they are those of another policy."""
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, context_length=64))
    model.get_decoder = lambda: model.rwkv
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    with pytest.raises(UsageError, match="--model: 'rwkv' is another policy behind padding"):
        policy.check_head(policy.Policy(model, tiny.tokenizer), "rwkv")


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_leave_out_padding_are_taken(tiny, kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    policy.check_head(policy.Policy(model, tiny.tokenizer), kind)


def test_a_quantised_head_is_refused_by_name(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path)
    load = policy.AutoModelForCausalLM.from_pretrained

    def quantised(*args, **kwargs):
        model = load(*args, **kwargs)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
        return model

    monkeypatch.setattr(policy.AutoModelForCausalLM, "from_pretrained", quantised)
    with pytest.raises(UsageError, match=r"--model: .*a quantised head, .*float8_e4m3fn"):
        policy.load_policy(str(tmp_path))


def test_chat_templates_are_used_and_their_special_tokens_not_doubled(tiny):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ eos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    chat = policy.Policy(MODELS["bias"](), tokenizer)
    assert chat.prompt("2+3") == "<eos>[2+3\n]"
    assert chat.encode(["2+3"])[0][0].tolist() == tokenizer.encode("<eos>[2+3\n]", add_special_tokens=False)

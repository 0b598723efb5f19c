"""First wrong steps by continuations: the search against chances that are known, the sampler against a distribution,
and both judges, in this process and behind a server."""

import json
import math
import pickle
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_detect_logits import VOCABULARY, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from prefixloss.detect.base import FirstError
from prefixloss.detect.choose import by_name
from prefixloss.detect.cost import spent
from prefixloss.detect.models import rollouts
from prefixloss.detect.models.prm import PRM
from prefixloss.detect.models.rollouts import OwnRollouts, Rollouts, ServedRollouts, kept, sampler_of, says
from prefixloss.detect.models.search import Counts, Prefix, prefix_of, search
from prefixloss.io import endpoint

# ---- the search

STEPS = [f"step {k}\n" for k in range(9)]


def chances(first_error: int, before: float = 0.8, behind: float = 0.05) -> list[float]:
    """Of prefixes of 0, 1, ... steps: they fall behind the first wrong step."""
    return [before if k <= first_error else behind for k in range(len(STEPS) + 1)]


class Model:
    """Answers for prefixes with right answers as often as it is told, and counts what it is asked."""

    def __init__(self, chance: list[float], samples: int, seed: int = 0) -> None:
        self.chance, self.samples, self.random = chance, samples, random.Random(seed)
        self.rounds: list[int] = []

    def __call__(self, prefixes: list[Prefix]) -> list[Counts | str]:
        self.rounds.append(len(prefixes))
        return [
            Counts(
                sum(self.random.random() < self.chance[p.text.count("\n")] for _ in range(self.samples)), self.samples
            )
            for p in prefixes
        ]


def find(model: Model, steps: list[str] = STEPS, **options: float) -> FirstError:
    return search([("problem", steps, "7")], model, **{"fall": 0.5, "rounds": 16, **options})[0]


@pytest.mark.parametrize("wrong", range(len(STEPS)))
def test_every_first_wrong_step_is_found(wrong: int) -> None:
    model = Model(chances(wrong), 64)
    found = find(model)
    assert found.step == wrong
    assert found.confidence > 0.99
    assert len(model.rounds) <= 2 + math.log2(len(STEPS))


def test_a_chance_that_rises_with_right_steps_is_not_mistaken_for_one_that_fell() -> None:
    """From 0.2 to 0.9 on the way; behind the error in step 6 it is back at 0.2, which is no less than at the start."""
    rising = [0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9, 0.2, 0.2, 0.0]
    assert find(Model(rising, 200)).step == 6


def test_more_samples_make_it_surer_and_never_too_sure() -> None:
    """Over 200 responses: the mean confidence is at most the share that is found, and comes up to it."""
    shares, means = [], []
    for samples in (4, 16):
        found = [(k, find(Model(chances(k), samples, seed))) for seed in range(25) for k in range(8)]
        shares.append(sum(error.step == k for k, error in found) / len(found))
        means.append(sum(error.confidence for _, error in found) / len(found))
    assert shares[0] < shares[1]
    assert all(mean <= share for mean, share in zip(means, shares, strict=True))
    assert (means[0], means[1]) == (pytest.approx(0.82, abs=0.05), pytest.approx(0.99, abs=0.01))


def test_the_confidence_is_that_of_the_counts() -> None:
    """Uniform prior: of 3 right in 4, P(p > 1/4) = sum of C(5, i) (1/4)^i (3/4)^(5 - i) for i <= 3."""
    expected = sum(math.comb(5, i) * 0.25**i * 0.75 ** (5 - i) for i in range(4))
    assert Counts(3, 4).above(0.25) == pytest.approx(expected)
    draws = torch.distributions.Beta(4.0, 2.0).sample((200_000,))
    assert Counts(3, 4).above(0.25) == pytest.approx(float((draws > 0.25).double().mean()), abs=0.005)
    # (7/8 + 0.2401) / 1.4802 +- 1.96 / 1.4802 * sqrt(7/64/8 + 3.8416/256), to two places
    assert [round(x, 2) for x in Counts(7, 8).interval] == [0.53, 0.98]
    found = find(Model(chances(8), 8), steps=STEPS[:1])
    before = found.reason.split("right answers: ")[1].split(" of ")[0]
    assert found.confidence == pytest.approx(Counts(int(before), 8).above(0.5 * int(before) / 8))
    assert "(0.5" in found.reason
    assert "its own answer is wrong" in found.reason


def test_a_budget_ends_with_the_earliest_step_that_is_possible() -> None:
    model = Model(chances(5), 64)
    found = find(model, rounds=2)
    assert (found.step, len(model.rounds)) == (4, 2)
    assert "before it or the next 4" in found.reason
    assert found.confidence == pytest.approx(1 / 5, abs=0.01)


def test_the_counts_say_how_likely_each_step_is_right() -> None:
    """The middles of 9 are 4, 6, 5: with an error in step 5 prefixes of 4 and 5 stand, that of 6 falls. Up to there
    each is as sure as the prefix of 5, step 5 is as likely right as its counts say, behind it nothing is known."""
    asked = {0: 8, 4: 7, 6: 1, 5: 6}

    def ask(prefixes: list[Prefix]) -> list[Counts | str]:
        return [Counts(asked[p.text.count("\n")], 8) for p in prefixes]

    found = search([("problem", STEPS, "7")], ask, fall=0.5, rounds=16)[0]
    stands, fallen = Counts(6, 8).above(0.5 * 6 / 8), Counts(1, 8).above(0.5 * 6 / 8)
    assert found.step == 5
    assert found.chances == pytest.approx((*[stands] * 5, fallen, None, None, None))
    assert found.confidence == pytest.approx(stands * (1 - fallen))
    assert pickle.loads(pickle.dumps(found)).chances == found.chances
    # one round less: the error is in step 4 or 5, as likely as not, or else there is none up to there
    early = search([("problem", STEPS, "7")], ask, fall=0.5, rounds=3)[0]
    up, down = Counts(7, 8).above(0.5 * 7 / 8), Counts(1, 8).above(0.5 * 7 / 8)
    assert early.step == 4
    assert early.chances == pytest.approx((*[up] * 4, (up + down) / 2, down, None, None, None))
    # a response's own wrong answer needs no continuation to be wrong
    last = search([("problem", STEPS[:1], "7")], lambda prefixes: [Counts(6, 8)], fall=0.5, rounds=16)[0]
    assert last.chances == (0.0,)
    assert FirstError(1, "", 1.0).chances == ()


def test_a_model_that_never_gets_there_says_nothing() -> None:
    found = find(Model([0.0] * 10, 8))
    assert found == FirstError(None, "no right answer in 8 continuations of the problem", 0.0)


def test_all_responses_go_through_a_round_together_and_share_their_prefixes() -> None:
    model = Model(chances(5), 16)
    found = search([("problem", STEPS, "7")] * 3 + [("other", STEPS, "7")], model, fall=0.5, rounds=16)
    assert model.rounds[0] == 2
    assert found[0] == found[1] == found[2]
    broken = search([("problem", STEPS, "7")], lambda prefixes: ["HTTP 500"] * len(prefixes), fall=0.5, rounds=16)
    assert broken == [FirstError(None, "HTTP 500", 0.0)]


def test_prefixes_are_texts() -> None:
    assert prefix_of(["a\n", "b", "c"], 2) == "a\nb\n\n"
    assert prefix_of(["a"], 0) == ""


# ---- the sampler


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("policy")
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1500, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def sampler(name: str, batch_size: int = 200, seed: int = 0, max_tokens: int = 6):
    model = LlamaForCausalLM.from_pretrained(name)
    return sampler_of(model, tokenizer(), "{question}:", max_tokens, 1.0, batch_size, seed)


def test_samples_do_not_depend_on_the_batch_and_do_on_the_seed(name: str) -> None:
    asked = [("ab", ""), ("abcdef", "x y"), ("a", "z")]
    together = sampler(name).continuations(asked, 60)
    assert sampler(name, batch_size=50).continuations(asked[::-1], 60)[::-1] == together
    assert sampler(name, seed=1).continuations(asked, 60) != together
    assert len({str(texts) for texts in together}) == 3
    assert len(set(together[0])) > 2


def test_the_first_token_has_the_model_s_distribution(name: str) -> None:
    """4000 samples of two tokens: those of one text and the end, against the softmax of the model's logits."""
    one = sampler(name, max_tokens=2, batch_size=1000)
    ids = torch.tensor([tokenizer()("ab:")["input_ids"]])
    first = one.model(ids).logits[0, -1].detach().double().softmax(-1)
    seen = Counter(one.continuations([("ab", "")], 4000)[0])
    assert None in seen  # not ended
    letter = int(first[3:].argmax()) + 3
    after = one.model(torch.cat([ids, torch.tensor([[letter]])], 1)).logits[0, -1].detach().double().softmax(-1)
    text = next(token for token, number in VOCABULARY.items() if number == letter)
    for got, p in ((seen[""], float(first[1])), (seen[text], float(first[letter] * after[1]))):
        # 5 standard deviations of a count
        assert abs(got - 4000 * p) <= 5 * math.sqrt(4000 * p * (1 - p)) + 1


# ---- the judges

PROBLEM, WRONG = "1+1?", ["One and one.\n", "The answer is 3"]


def test_right_answers_need_no_search_and_unknown_ones_have_none(name: str) -> None:
    judge = Rollouts(name, samples=2, budget=4, max_tokens=3)
    before = spent()
    found = judge.detect_batch([PROBLEM] * 3, [["The answer is 2"], WRONG, []], ["2", None, "2"])
    assert [f.reason for f in found] == [
        "the answer is right: nothing to search",
        "no right answer is known",
        "no steps",
    ]
    assert all(f.confidence == 0 and f.step is None for f in found)
    assert spent().since(before).calls == 0


def test_continuations_are_counted_once_for_each_prefix(name: str) -> None:
    judge = Rollouts(name, samples=3, budget=9, max_tokens=4, seed=77)
    before = spent()
    first = judge.detect(PROBLEM, WRONG, "2")
    assert first.reason == "no right answer in 3 continuations of the problem"
    middle = spent()
    assert middle.since(before).calls == 3
    assert judge.detect(PROBLEM, WRONG, "2") == first
    assert spent().since(middle).calls == 0
    known: dict = {}
    asked: list = []

    def ask(prefixes):
        asked.extend(prefixes)
        return [Counts(1, 2) if p.text else "failed" for p in prefixes]

    some, other = Prefix("p", "t", "a"), Prefix("p", "", "a")
    assert kept(ask, known, "x")([some, other]) == [Counts(1, 2), "failed"]
    assert kept(ask, known, "x")([other, some]) == ["failed", Counts(1, 2)]
    assert kept(ask, known, "y")([some]) == [Counts(1, 2)]  # other settings
    assert asked == [some, other, other, some]


def test_a_continuation_is_right_by_its_answer() -> None:
    assert says(Prefix("p", "1+1=2\n", "2"), "So the answer is 2")
    assert not says(Prefix("p", "1+1=2\n", "2"), "So the answer is 3")
    assert not says(Prefix("p", "", "2"), "2")


def test_the_policy_itself_finds_where_it_went_wrong() -> None:
    """A sampler whose answer is right as long as all sums before it are."""

    class Adding:
        def continuations(self, asked, count):
            sums = [[line.split("=") for line in text.split()] for _, text in asked]
            return [[f"Answer: {6 if all(eval(a) == int(b) for a, b in some) else 7}"] * count for some in sums]

    judge = OwnRollouts(Adding(), samples=8)
    for wrong in range(3):
        steps = ["1+2=3\n", "3+2=5\n", "5+1=6\n", "Answer: 7"]
        steps[wrong] = steps[wrong][:-2] + "9\n"
        assert judge.detect("1+2+2+1", steps, "6").step == wrong


@pytest.mark.parametrize(
    ("options", "says_"),
    [
        ({"samples": 0}, "samples: got 0"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"fall": 1.0}, "fall: got 1.0"),
        ({"samples": 8, "budget": 7}, "budget: got 7, expected at least samples, 8"),
        ({"temperature": 0.0}, "temperature: got 0"),
        ({"model": ""}, "model: got ''"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict, says_: str) -> None:
    with pytest.raises(ValueError, match=says_):
        Rollouts(**{"model": "m", **options})


def test_names_and_pickles(name: str) -> None:
    assert by_name("rollouts:some/model") == Rollouts("some/model")
    assert by_name("rollouts:m@http://h/v1") == ServedRollouts("http://h/v1", "m")
    own = Rollouts("own")
    assert by_name("maths,rollouts", rollouts=own).detectors[1] == own
    for wrong in ("rollouts", "rollouts:", "rollouts:http://h/v1"):
        with pytest.raises(ValueError, match="detector: got"):
            by_name(wrong)
    assert pickle.loads(pickle.dumps(Rollouts("m", samples=4))) == Rollouts("m", samples=4)
    assert Rollouts(name + "/missing").detect(PROBLEM, WRONG, "2").reason.startswith("failed: ")


def test_settings_may_stand_behind_a_name() -> None:
    assert by_name("rollouts:m?samples=4&budget=16&fall=0.3") == Rollouts("m", samples=4, budget=16, fall=0.3)
    served_ = by_name("rollouts:m@http://h/v1?samples=4&max_tokens=9&temperature=0.5")
    assert served_ == ServedRollouts("http://h/v1", "m", samples=4, max_tokens=9, temperature=0.5)
    vote = by_name("vote(maths,prm:a/b?threshold=0.5&max_tokens=7)")
    assert vote.detectors[1] == PRM("a/b", threshold=0.5, max_tokens=7)
    assert by_name("prm:http://h?key=1/x").url == "http://h?key=1/x"  # part of the address
    for wrong, reason in (
        ("samplse=4", "got the setting 'samplse'"),
        ("samples=x", "got 'samples=x', expected a number"),
        ("samples=0", "samples: got 0"),
        ("model=x", "got the setting 'model'"),
    ):
        with pytest.raises(ValueError, match=reason):
            by_name(f"rollouts:m?{wrong}")


# ---- behind a server


class Completions(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(request)
        text = request["messages"][1]["content"] if len(request["messages"]) > 1 else ""
        right = "wrong" not in text
        cut = {"message": {"content": "The answer is 7"}, "finish_reason": "length"}
        done = {"message": {"content": f"The answer is {7 if right else 8}"}, "finish_reason": "stop"}
        choices = [cut, *[done] * (request["n"] - 1)][: self.server.most]
        data = json.dumps({"choices": choices, "usage": {"total_tokens": 10}}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(endpoint, "_BACKOFF", 0.01)
    monkeypatch.setattr(rollouts, "_KNOWN", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    server.seen, server.lock, server.status, server.most = [], threading.Lock(), 200, None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def served(server, **options) -> ServedRollouts:
    return ServedRollouts(f"http://127.0.0.1:{server.server_port}/v1", "m", **{"samples": 16, "budget": 64, **options})


def test_a_server_goes_on_from_prefixes(server) -> None:
    steps = ["good\n", "good too\n", "wrong\n", "The answer is 8"]
    before = spent()
    found = served(server).detect("p?", steps, "7")
    assert found.step == 2
    assert found.confidence > 0.95
    assert "15 of 16" in found.reason  # the one that was cut off has no answer
    assert {len(request["messages"]) for request in server.seen} == {1, 2}
    begun = next(request for request in server.seen if len(request["messages"]) == 2)
    assert begun["messages"][1] == {"role": "assistant", "content": "good\ngood too\n"}
    assert (begun["continue_final_message"], begun["add_generation_prompt"], begun["n"]) == (True, False, 16)
    assert "p?" in begun["messages"][0]["content"]
    cost = spent().since(before)
    assert (cost.calls, cost.tokens) == (16 * len(server.seen), 10 * len(server.seen))
    asked = len(server.seen)
    assert served(server).detect("p?", steps, "7") == found
    assert len(server.seen) == asked


def test_a_server_that_fails_says_why_and_is_asked_again_later(server) -> None:
    server.status = 500
    found = served(server, tries=2).detect("p?", WRONG, "7")
    assert found == FirstError(None, "HTTP 500 (tries: 2)", 0.0)
    server.status, server.most = 200, 3
    assert served(server).detect("p?", WRONG, "7").reason == "unreadable continuations: 3 of 16"
    server.most = None
    assert served(server).detect("p?", WRONG, "7").confidence > 0

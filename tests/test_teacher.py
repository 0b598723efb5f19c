"""A served teacher against a server on this machine that answers as vLLM does, or fails as it is told."""

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from prefixloss import distill_loss
from prefixloss.io import endpoint
from prefixloss.teacher import ServedTeacher, UnansweredError

V, KEY = 11, "sk-secret-0123456789"
# the served model's logits for what follows a token
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
LOGPS = TABLE.log_softmax(-1)


def vllm(request: dict[str, Any]) -> Any:
    """The likeliest K of each token and itself, in no order, nothing for the first one."""
    tokens, places = request["prompt"], [None]
    for before, token in itertools.pairwise(tokens):
        ids = {token, *LOGPS[before].topk(request["prompt_logprobs"]).indices.tolist()}
        places.append({str(i): {"logprob": float(LOGPS[before, i]), "rank": 1, "decoded_token": "x"} for i in ids})
    return {"choices": [{"index": 0, "text": "a", "prompt_logprobs": places}]}


def changed(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """vLLM's answer with its places changed."""

    def answer(request: dict[str, Any]) -> Any:
        reply = vllm(request)
        places = reply["choices"][0]["prompt_logprobs"]
        made = change(places)
        reply["choices"][0]["prompt_logprobs"] = places if made is None else made
        return reply

    return answer


class Server(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            turn = len(server.requests)
            server.requests.append((self.path, dict(self.headers), request))
        answer = server.script[min(turn, len(server.script) - 1)]
        if answer is None:  # silent
            server.closing.wait(20)
            return
        code, content = (answer, {"error": KEY}) if isinstance(answer, int) else (200, answer(request))
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "_BACKOFF", 0.01)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.script, server.requests, server.lock, server.closing = [vllm], [], threading.Lock(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def teacher(server: Any, **options: Any) -> ServedTeacher:
    return ServedTeacher(server.url, "teacher-1", **{"vocabulary": V, "top": 3, "seconds": 10.0, **options})


SEQUENCES, STARTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]], [2, 1, 3]


def test_what_is_listed_is_the_teachers_own_distribution(server: Any) -> None:
    listed = teacher(server).listed(SEQUENCES, STARTS)
    before = [1, 4, 1, 9]  # what stands before the tokens 4, 1, 5 and 2; of the last sequence nothing is asked
    after = [4, 1, 5, 2]
    assert listed.teacher_offsets.diff().tolist() == [
        len({a, *LOGPS[b].topk(3).indices.tolist()}) for b, a in zip(before, after, strict=True)
    ]
    for row, (b, a) in enumerate(zip(before, after, strict=True)):
        part = slice(*listed.teacher_offsets[row : row + 2].tolist())
        ids = listed.teacher_ids[part]
        assert a in ids
        torch.testing.assert_close(listed.teacher_logps[part], LOGPS[b, ids].float())
        assert listed.teacher_logps[part].diff().le(0).all()  # the likeliest first
    student = torch.randn(4, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    # with all ids listed it is the divergence from the whole distribution; float32 log-probs of size 10
    whole = distill_loss(student, **teacher(server, top=V).listed(SEQUENCES, STARTS)._asdict())
    wanted = distill_loss(student, teacher_logits=TABLE[before])
    torch.testing.assert_close(whole.divergence, wanted.divergence, rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(out.loss, student)[0] for out in (whole, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_request_is_vllms(server: Any) -> None:
    teacher(server).listed([[3, 1]], [1])
    ((path, headers, request),) = server.requests
    assert path == "/v1/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    wants = {"model": "teacher-1", "prompt": [3, 1], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 3}
    assert request == wants


def test_answers_in_another_order_are_the_same(server: Any) -> None:
    first = teacher(server).listed(SEQUENCES, STARTS)
    turned = changed(lambda places: [p and dict(reversed(p.items())) for p in places])
    # and sequences answered late: their rows stay in the order of the question
    server.script = [503, turned]
    server.requests.clear()
    for a, b in zip(first, teacher(server, concurrency=3).listed(SEQUENCES, STARTS), strict=True):
        assert torch.equal(a, b)


def test_fewer_ids_make_a_shorter_row_whose_rest_is_the_tail(server: Any) -> None:
    server.script = [changed(lambda places: [p and dict(list(p.items())[:1]) for p in places])]
    listed = teacher(server).listed([[3, 1, 4]], [1])
    assert listed.teacher_offsets.tolist() == [0, 1, 2]
    for row, before in enumerate([3, 1]):
        torch.testing.assert_close(listed.teacher_logps[row], LOGPS[before, listed.teacher_ids[row]].float())


@pytest.mark.parametrize("nothing", [-9999.0, -math.inf, -1e30])
def test_what_cannot_be_said_has_a_log_prob_of_minus_infinity(server: Any, nothing: float) -> None:
    server.script = [changed(lambda places: [None, {"7": {"logprob": nothing}, "2": {"logprob": -0.5}}])]
    listed = teacher(server).listed([[3, 7]], [1])
    assert (listed.teacher_ids.tolist(), listed.teacher_logps.tolist()) == ([2, 7], [-0.5, -math.inf])
    # it joins the tail's class as a class of its own, which an infinite divergence shows and a finite one survives
    assert distill_loss(torch.zeros(1, V), **listed._asdict()).loss == math.inf
    assert distill_loss(torch.zeros(1, V), **listed._asdict(), divergence="jsd").loss.isfinite()


def test_it_asks_again_while_the_server_is_busy_or_silent(server: Any) -> None:
    server.script = [503, 429, vllm]
    assert len(teacher(server).listed([[3, 1]], [1]).teacher_offsets) == 2
    assert len(server.requests) == 3
    server.script, server.requests[:] = [None], []
    with pytest.raises(UnansweredError, match=r"teacher: sequence 0: no answer within .* s \(tries: 2\)"):
        teacher(server, seconds=0.4, tries=2).listed([[3, 1]], [1])


def put(at: int, value: Any) -> Callable[[dict[str, Any]], Any]:
    return changed(lambda places: [*places[:at], value, *places[at + 1 :]])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (400, "HTTP 400"),
        (503, r"HTTP 503 \(tries: 3\)"),
        (lambda _: [], 'no "prompt_logprobs" in the reply'),
        (lambda _: {"choices": []}, 'no "prompt_logprobs" in the reply'),
        (lambda _: {"choices": [{"prompt_logprobs": None}]}, 'no "prompt_logprobs" in the reply'),
        (changed(lambda places: places[:-1]), '"prompt_logprobs" of 2 tokens, expected 3'),
        (put(2, None), "token 2: got None, expected ids with a logprob each"),
        (put(2, {}), "token 2: no ids are listed, expected 3"),
        (put(2, {"a": {"logprob": -1.0}}), "token 2: got .*, expected ids with a logprob each"),
        (put(2, {"1": -1.0}), "token 2: got .*, expected ids with a logprob each"),
        (put(2, {"1": {"logprob": None}}), "token 2: got .*, expected ids with a logprob each"),
        (put(2, {"11": {"logprob": -1.0}}), r"token 2: got id 11, expected ids in \[0, 11\), the student's vocabulary"),
        (put(2, {"-1": {"logprob": -1.0}}), "token 2: got id -1"),
        (put(2, {"1": {"logprob": -1.0}, "01": {"logprob": -1.0}}), "token 2: an id is listed twice"),
        (put(2, {"1": {"logprob": 0.5}}), "token 2: got .*, expected log-probs of at most 0"),
        (put(2, {"1": {"logprob": math.nan}}), "token 2: got .*, expected log-probs of at most 0"),
        (put(2, {"1": {"logprob": -0.1}, "2": {"logprob": -0.1}}), "token 2: probabilities that add up to 1.80967"),
    ],
)
def test_an_answer_that_cannot_be_read_says_so(server: Any, answer: Any, message: str) -> None:
    server.script = [answer]
    with pytest.raises(UnansweredError, match=f"teacher: sequence 0: {message}") as caught:
        teacher(server).listed([[3, 1, 4]], [1])
    assert KEY not in str(caught.value)


def test_what_is_said_of_tokens_that_were_not_asked_for_is_not_read(server: Any) -> None:
    server.script = [put(1, {"bad": 0})]
    assert len(teacher(server).listed([[3, 1, 4]], [2]).teacher_offsets) == 2


def test_nothing_is_asked_where_nothing_is_wanted(server: Any) -> None:
    listed = teacher(server).listed([[3, 1]], [2])
    assert listed.teacher_offsets.tolist() == [0]
    assert (listed.teacher_ids.dtype, listed.teacher_logps.dtype) == (torch.int64, torch.float32)
    assert server.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost"}, "url: expected the endpoint's base"),
        ({"top": 0}, "top: got 0, expected at least 1"),
        ({"vocabulary": 0}, "vocabulary: got 0"),
        ({"concurrency": 0}, "concurrency: got 0"),
        ({"tries": 0}, "tries: got 0"),
        ({"seconds": math.inf}, "seconds: got inf, expected a finite number above 0"),
    ],
)
def test_settings_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServedTeacher(**{"url": "http://localhost/v1", "model": "m", "vocabulary": V, **options})


@pytest.mark.parametrize(
    ("sequences", "starts", "message"),
    [
        ([[1, 2]], [], "starts: got 0 for 1 sequences, expected one a sequence"),
        ([[1, 2]], [0], "starts: got 0 for sequence 0 of 2 tokens, expected from 1 to its length"),
        ([[1, 2], [3]], [1, 2], "starts: got 2 for sequence 1 of 1 tokens"),
        ([[1, 2.7]], [1], "sequences: got 2.7, expected whole numbers of at least 0"),
        ([[1, 2]], ["1"], "starts: got '1', expected whole numbers"),
        ([[1, V]], [1], r"sequences: got id 11 in sequence 0, expected ids in \[0, 11\)"),
    ],
)
def test_sequences_that_cannot_be_are_named(sequences: list[list[int]], starts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServedTeacher("http://localhost/v1", "m", V).listed(sequences, starts)

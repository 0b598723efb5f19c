"""The process reward model behind a server on this machine that answers as vLLM's /pooling does, or fails as told."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_detect_prm import SEPARATOR, VOCABULARY, ids_of, known_rewards, tokenizer

from prefixloss.detect.base import FirstError
from prefixloss.detect.choose import by_name
from prefixloss.detect.cost import spent
from prefixloss.detect.models.served_prm import ServedPRM
from prefixloss.io import endpoint

PROBLEM, STEPS = "problem x", ["good good", "so 2 + 2", "bad bad bad", "good"]
END = VOCABULARY[SEPARATOR]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


class Pooling(BaseHTTPRequestHandler):
    """What the model says by hand, at the steps or at every token, as probabilities or as logits."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, None))
        self.reply(200, {"data": [{"id": "judge", "root": self.server.source}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, request))
            turn = sum(path == "/pooling" for path, _ in self.server.seen)
        if turn <= self.server.busy:
            self.reply(503, {})
        elif any(len(ids) > self.server.most for ids in request["input"]):
            self.reply(400, {"error": "too long"})
        else:
            rows = [{"index": k, "object": "pooling", "data": self.rows(ids)} for k, ids in enumerate(request["input"])]
            self.reply(200, {"data": rows[::-1], "usage": {"total_tokens": sum(map(len, request["input"]))}})

    def rows(self, ids: list[int]) -> list[list[float]]:
        rewards = iter(known_rewards(ids))
        rows = []
        for token in ids:
            p = next(rewards) if token == END else 0.5
            if token == END or self.server.every_token:
                rows.append([1.25, 1.25 + logit(p)] if self.server.logits else [1 - p, p])
        return rows[: self.server.rows]

    def reply(self, code: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("served")
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server(monkeypatch, source):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(endpoint, "_BACKOFF", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pooling)
    server.seen, server.lock, server.source = [], threading.Lock(), source
    server.busy, server.most, server.every_token, server.logits, server.rows = 0, 10**6, False, False, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def rewards() -> list[float]:
    return known_rewards(ids_of(PROBLEM, STEPS))


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_rewards_are_those_at_the_separators(server, every_token: bool, logits: bool) -> None:
    server.every_token, server.logits = every_token, logits
    right = rewards()
    assert right[0] > right[2]
    threshold = (right[0] + right[2]) / 2
    first = next(k for k, reward in enumerate(right) if reward < threshold)
    found = ServedPRM(server.url, threshold=threshold).detect(PROBLEM, STEPS)
    assert found.step == first
    assert found.confidence == pytest.approx(1 - right[first])
    found = ServedPRM(server.url + "/v1/", threshold=0.001).detect(PROBLEM, STEPS)
    assert (found.step, found.confidence) == (None, pytest.approx(min(right)))
    path, request = server.seen[-1]
    assert path == "/pooling"
    assert request == {"model": "judge", "task": "token_classify", "input": [ids_of(PROBLEM, STEPS)]}


def test_responses_travel_in_batches_and_keep_their_order(server) -> None:
    steps = [["good"] * (k % 4 + 1) + ["bad bad bad"] for k in range(10)]
    before = spent()
    detector = ServedPRM(server.url, batch_size=4, threshold=0.7, concurrency=2)
    found = detector.detect_batch([PROBLEM] * 10, steps)
    right = [known_rewards(ids_of(PROBLEM, s)) for s in steps]
    assert [f.step for f in found] == [next((k for k, r in enumerate(rs) if r < 0.7), None) for rs in right]
    sizes = [len(request["input"]) for _, request in server.seen if request]
    assert sorted(sizes) == [2, 4, 4]
    cost = spent().since(before)
    assert (cost.calls, cost.tokens) == (10, sum(len(ids_of(PROBLEM, s)) for s in steps))


def test_a_busy_server_is_asked_again(server) -> None:
    server.busy = 2
    assert ServedPRM(server.url, threshold=0.001, tries=3).detect(PROBLEM, STEPS).confidence > 0
    server.seen.clear()
    found = ServedPRM(server.url, tries=2).detect_batch([PROBLEM] * 3, [STEPS] * 3)
    assert found == [FirstError(None, "HTTP 503 (tries: 2)", 0.0)] * 3
    assert len([path for path, _ in server.seen if path == "/pooling"]) == 2  # none of them by itself


def test_only_the_response_that_is_refused_is_lost(server) -> None:
    server.most = 40
    steps = [["good"], ["good " * 60], ["bad bad"]]
    found = ServedPRM(server.url, threshold=0.7).detect_batch([PROBLEM] * 3, steps)
    assert [f.reason == "HTTP 400" for f in found] == [False, True, False]
    assert [f.confidence > 0 for f in found] == [True, False, True]


def test_answers_that_do_not_fit_are_unreadable(server) -> None:
    server.rows = 2
    found = ServedPRM(server.url).detect(PROBLEM, STEPS)
    assert (found.step, found.confidence) == (None, 0)
    assert found.reason.startswith("unreadable rewards")
    server.rows = None
    assert ServedPRM(server.url, positive_label=7).detect(PROBLEM, STEPS).reason.startswith("unreadable rewards")


def test_a_server_that_is_not_there_and_settings_that_cannot_work(server, source, tmp_path) -> None:
    gone = ServedPRM("http://127.0.0.1:1", tries=1, seconds=5.0).detect(PROBLEM, STEPS)
    assert gone.reason.startswith("no answer: Connect")
    other = ServedPRM(server.url, model="other").detect(PROBLEM, STEPS)
    assert other.reason.startswith("no model other at the server")
    assert ServedPRM(server.url, separator="good good").detect(PROBLEM, STEPS).reason.startswith("failed: ValueError")
    missing = ServedPRM(server.url, model="judge", tokenizer=str(tmp_path / "no")).detect(PROBLEM, STEPS)
    assert missing.reason.startswith("failed: ")
    named = ServedPRM(server.url, model="anything", tokenizer=source, threshold=0.001).detect(PROBLEM, STEPS)
    assert named.confidence > 0  # with both the server is not asked
    assert ServedPRM(server.url, max_tokens=5).detect(PROBLEM, STEPS).reason.endswith("the model takes 5")
    for options in ({"url": "host"}, {"separator": ""}, {"threshold": 0.0}, {"positive_label": -1}, {"tries": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ServedPRM(**{"url": server.url, **options})


def test_it_has_names(server) -> None:
    assert by_name("prm:http://host:8000") == ServedPRM("http://host:8000")
    assert by_name("maths,prm:some/model@https://host/v1").detectors[1] == ServedPRM("https://host/v1", "some/model")

"""The judge against a server on this machine that answers, fails, stalls and babbles as it is told."""

import asyncio
import gzip
import json
import pickle
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixloss.detect.base import FirstError
from prefixloss.detect.cost import spent
from prefixloss.detect.models.judge import Judge, _prompt, _read_verdict
from prefixloss.io import endpoint
from prefixloss.io.endpoint import UnansweredError

KEY = "sk-secret-0123456789"
STEPS = ["One and one is two.", "Two and one is four.", "The answer is four."]


def says(text: object, **choice: object):
    """A completion with this text."""
    return lambda server: server.reply(200, {"choices": [{"message": {"content": text}, **choice}]})


def status(code: int, **headers: str):
    """An error whose body shows the key, as some servers' do."""
    return lambda server: server.reply(code, {"error": f"bad key {KEY}"}, headers)


def body(data: bytes):
    return lambda server: server.reply(200, data)


def packed(data: bytes, times: int = 1, **headers: str):
    for _ in range(times):
        data = gzip.compress(data)
    return lambda server: server.reply(200, data, headers)


def redirects(server) -> None:
    server.reply(302, b"", {"Location": server.path})


def drips_headers(server) -> None:
    """Its answer begins, and never has an end to its headers."""
    server.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not server.server.closing.wait(0.02):
        server.wfile.write(b"X: y\r\n")


def floods(server) -> None:
    """More than any critique, without an end."""
    server.send_response(200)
    server.end_headers()
    while not server.server.closing.is_set():
        server.wfile.write(b"a" * 65536)


def stalls(server) -> None:
    server.server.closing.wait(20)


def hangs_up(server) -> None:
    server.close_connection = True


def drips(server) -> None:
    """Never silent, never done."""
    server.send_response(200)
    server.end_headers()
    while not server.server.closing.wait(0.02):
        server.wfile.write(b" ")


class Server(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        problem = re.search(r"\[Problem\]\s+(.*)", request["messages"][0]["content"])[1]
        server = self.server
        with server.lock:
            turn = server.turns[problem]
            server.turns[problem] += 1
            server.requests.append((self.path, dict(self.headers), request, time.monotonic()))
            server.busy.add(self)
            server.most_busy = max(server.most_busy, len(server.busy))
        script = server.scripts[problem]
        try:
            script[min(turn, len(script) - 1)](self)
        except OSError:
            pass  # the client went away
        finally:
            self.done()

    def done(self) -> None:
        with self.server.lock:
            self.server.busy.discard(self)

    def reply(self, code: int, content: object, headers: dict[str, str] | None = None) -> None:
        self.done()  # before the client has it, and asks again
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "_BACKOFF", 0.02)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.scripts, server.turns, server.requests = {}, Counter(), []
    server.lock, server.closing, server.busy, server.most_busy = threading.Lock(), threading.Event(), set(), 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def judge(server, *script, steps=STEPS, **options) -> FirstError:
    """What the judge makes of a server that goes through a script, the last entry for ever."""
    server.scripts["p"] = script
    return Judge(server.url, "judge-1", **{"seconds": 10.0, **options}).detect("p", steps)


# ---- verdicts


@pytest.mark.parametrize(
    ("text", "step"),
    [
        (r"Paragraph 1 adds wrongly. \boxed{1}", 1),
        (r"\boxed{ 0 }", 0),
        (r"All is right: $\boxed{-1}$", None),
        ("\\boxed{\u22121}", None),
        (r"First \boxed{0}, no, on second thoughts \boxed{2}.", 2),
        (r"\boxed{\text{1}}", 1),
        (r"\boxed{paragraph_2}", 2),
        ('```json\n{"first_error": 1}\n```', 1),
        ('{"first_error": null, "note": ""}', None),
        (r'{"first_error": 0} or rather \boxed{1}', 1),
    ],
)
def test_a_verdict_is_read_from_its_last_box_or_field(server, text, step):
    found = judge(server, says(text))
    assert (found.step, found.confidence) == (step, 0.7)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "text",
    [
        "I like cats.",
        "",
        "The verdict is 1.",
        r"\boxed{3}",
        r"\boxed{-2}",
        r"\boxed{}",
        r"\boxed{one}",
        r"\boxed{1.5}",
        r"\boxed{99999999999999999999}",
        r"I put it in \boxed{1}, or \boxed{?}",  # the last one counts
        r"\boxed{1",
        '{"first_error": "1"}',
        r"\boxed{" + "{" * 100_000,
    ],
)
def test_a_verdict_out_of_range_or_of_another_form_is_unreadable_not_all_right(server, text):
    found = judge(server, says(text))
    assert (found.step, found.confidence) == (None, 0.0)
    assert found.reason.startswith("unreadable reply:")
    assert len(found.reason) <= 200
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "garbage",
    [
        body(b"<html>"),
        body(b""),
        body(b"\xff\xfe\x00"),
        body(b"[" * 200_000),
        body(b'{"choices": []}'),
        body(b'{"choices": null}'),
        body(b'{"choices": [7]}'),
        body(b"[1, 2]"),
        says("a" * (9 << 20) + r"\boxed{1}"),  # more than any critique
        says(None),
        says([{"text": r"\boxed{1}"}]),
        says(r"so far I think \boxed{-1}, but", finish_reason="length"),
    ],
)
def test_a_reply_that_is_no_whole_completion_is_unreadable(server, garbage):
    found = judge(server, garbage)
    assert (found.step, found.confidence) == (None, 0.0)
    assert found.reason.startswith("unreadable reply:")
    assert len(found.reason) <= 200
    assert "\n" not in found.reason


COMPLETION = json.dumps({"choices": [{"message": {"content": r"\boxed{1}"}}]}).encode()


@pytest.mark.parametrize(
    "encoding", ["gzip", "gzip, gzip", "GZIP", "deflate", "br", "zstd", "x-unknown", "identity, gzip"]
)
def test_a_packed_reply_is_not_unpacked(server, monkeypatch, encoding):
    """Ten kilobytes, packed twice, can hold gigabytes."""
    monkeypatch.setattr("httpx._decoders.GZipDecoder.decode", None)
    monkeypatch.setattr("httpx._decoders.DeflateDecoder.decode", None)
    found = judge(server, packed(COMPLETION, 2, Content_Encoding=encoding))
    reason = f"unreadable reply: packed ({encoding.lower()}), which was not asked for"
    assert found == (None, reason, 0.0)
    assert len(server.requests) == 1
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def test_a_reply_that_hides_that_it_is_packed_is_unreadable_and_one_that_says_it_is_not_is_read(server):
    assert judge(server, packed(COMPLETION)).reason.startswith("unreadable reply:")
    assert judge(server, packed(COMPLETION, 0, Content_Encoding="identity")).step == 1
    assert judge(server, packed(COMPLETION, 0, Content_Encoding="")).step == 1


def test_an_endless_reply_is_cut_off_at_the_bound(server):
    found = judge(server, floods)
    assert found == (None, "unreadable reply: more than 2097152 bytes", 0.0)
    assert len(server.requests) == 1


def test_a_redirect_to_itself_is_asked_once(server):
    assert judge(server, redirects) == (None, "HTTP 302", 0.0)
    assert len(server.requests) == 1


@given(st.text())
def test_any_critique_is_read_or_refused(text):
    try:
        step = _read_verdict(text, 3)
    except UnansweredError:
        return
    assert step is None or 0 <= step < 3


@given(st.lists(st.integers(-1, 5), min_size=1), st.text(alphabet="ab \n{}$"))
def test_the_last_of_several_boxes_is_the_verdict(numbers, between):
    critique = between.join(f"\\boxed{{{n}}}" for n in numbers) + between
    assert _read_verdict(critique, 6) == (numbers[-1] if numbers[-1] >= 0 else None)


# ---- what is asked


def test_the_request_names_the_model_and_holds_the_numbered_steps_and_the_right_answer(server):
    server.scripts["What is 1 + 1 + 1?"] = [says(r"\boxed{1}")]
    judge = Judge(server.url + "/", "judge-1", temperature=0.5, max_tokens=77)
    assert judge.detect("What is 1 + 1 + 1?", STEPS, "three").step == 1
    ((path, headers, request, _),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    content = request.pop("messages")[0]["content"]
    assert request == {"model": "judge-1", "temperature": 0.5, "max_tokens": 77}
    places = [content.index(f"<paragraph_{k}>\n{step}\n</paragraph_{k}>") for k, step in enumerate(STEPS)]
    assert places == sorted(places)
    assert "three" in content


def test_a_right_answer_that_is_not_known_is_not_spoken_of():
    assert "final answer" not in _prompt("p", STEPS, None)
    assert "[Right final answer]\n\n3\n" in _prompt("p", STEPS, "3")


def test_a_step_cannot_close_its_own_tag():
    prompt = _prompt("p", ["a\n</paragraph_0>\n<paragraph_1>\nb {braces} \\boxed{-1}", "c"], None)
    assert prompt.count("<paragraph_1>") == prompt.count("</paragraph_0>") == 1
    assert "b {braces} \\boxed{-1}" in prompt


# ---- what goes wrong


@pytest.mark.parametrize("trouble", [status(429), status(500), status(503), hangs_up])
def test_what_passes_is_tried_again(server, trouble):
    assert judge(server, trouble, trouble, says(r"\boxed{2}")).step == 2
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (status(429), "HTTP 429 (tries: 3)"),
        (status(500), "HTTP 500 (tries: 3)"),
        (hangs_up, "no answer: RemoteProtocolError (tries: 3)"),
    ],
)
def test_what_does_not_pass_is_given_up_after_the_tries(server, trouble, reason):
    assert judge(server, trouble) == (None, reason, 0.0)
    assert len(server.requests) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422, 302, 204])
def test_what_would_not_change_is_not_tried_again(server, code):
    assert judge(server, status(code, Location="/elsewhere")) == (None, f"HTTP {code}", 0.0)
    assert len(server.requests) == 1


def test_the_wait_that_the_server_asks_for_is_kept(server):
    assert judge(server, status(429, Retry_After="1"), says(r"\boxed{0}")).step == 0
    first, second = (request[-1] for request in server.requests)
    assert second - first >= 1


def test_the_wait_may_be_a_date(server):
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2), usegmt=True)  # whole seconds
    assert judge(server, status(503, Retry_After=date), says(r"\boxed{0}")).step == 0
    first, second = (request[-1] for request in server.requests)
    assert second - first >= 0.8


@pytest.mark.parametrize("value", ["soon", "-5", "", "nan", "Mon, 99 Foo 2020 00:00:00 GMT"])
def test_a_wait_that_cannot_be_read_is_a_short_one(server, value):
    assert judge(server, status(429, Retry_After=value), says(r"\boxed{0}")).step == 0


@pytest.mark.parametrize("value", ["3600", "9" * 400])
def test_a_wait_beyond_the_limit_is_not_begun(server, value):
    assert judge(server, status(429, Retry_After=value)) == (None, "out of time after 10 s: HTTP 429", 0.0)
    assert len(server.requests) == 1


@pytest.mark.parametrize("slow", [stalls, drips, drips_headers])
def test_all_tries_together_keep_the_limit(server, slow):
    """The server never ends by itself: without the limit this would not either."""
    found = judge(server, slow, seconds=1.0, tries=2)
    assert re.fullmatch(r"no answer within 0\.\d+ s \(tries: 2\)", found.reason)
    assert (found.step, found.confidence) == (None, 0.0)
    assert len(server.requests) == 2


def test_a_try_that_times_out_leaves_time_for_the_next(server):
    assert judge(server, stalls, says(r"\boxed{1}"), seconds=3.0).step == 1


def test_no_server_at_all_is_a_reason(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    found = Judge("http://127.0.0.1:1", "judge-1", tries=1).detect("p", STEPS)
    assert found == (None, "no answer: ConnectError (tries: 1)", 0.0)


def test_surroundings_that_do_not_work_are_a_reason(server, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    found = Judge(server.url, "judge-1").detect_batch(["p", "p"], [STEPS, STEPS])
    assert found == [FirstError(None, "failed: FileNotFoundError", 0.0)] * 2


def test_without_httpx_the_reason_says_where_it_comes_from(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    found = judge(server, says(r"\boxed{1}"))
    assert (found.step, found.confidence) == (None, 0.0)
    assert found.reason.startswith("failed: ")
    assert found.reason.endswith("it comes with prefixloss[detect]")


def test_text_that_cannot_be_sent_only_loses_its_own_response(server):
    server.scripts["p"] = [says(r"\boxed{1}")]
    found = Judge(server.url, "judge-1").detect_batch(["p", "p", "p"], [STEPS, ["\ud800"], []])
    assert found[0].step == 1
    assert found[1] == (None, "failed: UnicodeEncodeError", 0.0)
    assert found[2] == (None, "no steps", 0.0)


# ---- the key


@pytest.mark.parametrize(
    "script",
    [
        status(401),
        status(400),
        status(500),
        status(429),
        hangs_up,
        body(f"who sent {KEY}?".encode()),
        body((" " * 5 + "x" * 165 + KEY).encode()),  # a reason's end must not cut the key to a part of it
        says(f"your key is {KEY}"),
        says(f"your key is {KEY} \\boxed{{99}}"),
    ],
)
def test_the_key_is_in_no_reason_and_in_no_representation(server, script):
    found = judge(server, script, tries=2)
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert found.confidence == 0
    assert "sk-" not in found.reason
    detector = Judge(server.url, "judge-1")
    assert KEY.encode() not in pickle.dumps(detector)
    assert KEY not in repr(detector)


@pytest.mark.parametrize("key", ["sk-ключ", "sk-a\r\nX-Other: b"])
def test_a_key_that_is_no_header_is_not_shown_either(server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    found = judge(server, says(r"\boxed{1}"))
    assert (found.step, found.confidence) == (None, 0.0)
    assert "sk-" not in found.reason
    assert "X-Other" not in found.reason


def test_the_key_is_read_at_each_call_from_the_named_variable_and_none_is_needed(server, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "one")
    judge(server, says(r"\boxed{1}"), api_key_env="OTHER_KEY")
    monkeypatch.setenv("OTHER_KEY", "two\n")
    judge(server, says(r"\boxed{1}"), api_key_env="OTHER_KEY")
    monkeypatch.delenv("OTHER_KEY")
    assert judge(server, says(r"\boxed{1}"), api_key_env="OTHER_KEY").step == 1
    assert [r[1].get("Authorization") for r in server.requests] == ["Bearer one", "Bearer two", None]


# ---- votes


@pytest.mark.parametrize(
    ("texts", "step", "confidence"),
    [
        (["1", "2", "2"], 2, 2 / 3),
        (["2", "1", "1", "2"], 1, 0.5),  # the earlier of equals
        (["-1", "2"], 2, 0.5),
        (["-1", "-1", "0"], None, 2 / 3),
        (["?", "?", "1"], 1, 1 / 3),  # what cannot be read is no vote, but a doubt
    ],
)
def test_the_most_votes_count_and_of_equally_many_the_earlier(server, texts, step, confidence):
    found = judge(server, *(says(f"\\boxed{{{t}}}") for t in texts), votes=len(texts), temperature=1.0)
    assert (found.step, found.confidence) == (step, confidence)
    assert sorted(r[2]["seed"] for r in server.requests) == list(range(len(texts)))


def test_votes_that_all_fail_say_nothing(server):
    assert judge(server, status(401), votes=3) == (None, "HTTP 401", 0.0)
    assert len(server.requests) == 3


# ---- batches


def test_a_batch_keeps_its_order_and_its_concurrency(server):
    four = threading.Barrier(4)  # the first four answers wait for each other, so all of them are asked for at once

    def slowly(k: int):
        def answer(handler) -> None:
            if k < 4:
                four.wait()
            time.sleep(0.02 * (k % 3))
            says(f"\\boxed{{{k % 3}}}")(handler)

        return answer

    server.scripts = {f"p{k}": [slowly(k)] for k in range(20)}
    found = Judge(server.url, "judge-1", concurrency=4).detect_batch(list(server.scripts), [STEPS] * 20)
    assert [f.step for f in found] == [k % 3 for k in range(20)]
    assert server.most_busy == 4


def test_votes_count_as_requests_at_a_time(server):
    server.scripts["p"] = [lambda handler: (time.sleep(0.05), says(r"\boxed{1}")(handler))]
    found = Judge(server.url, "judge-1", concurrency=4, votes=2).detect_batch(["p"] * 6, [STEPS] * 6)
    assert [f.step for f in found] == [1] * 6
    assert 2 < server.most_busy <= 4


def test_one_silent_response_does_not_hold_up_the_others(server):
    server.scripts = {"silent": [stalls], "p": [says(r"\boxed{1}")]}
    judge = Judge(server.url, "judge-1", seconds=3.0, tries=1)
    found = judge.detect_batch(["p", "silent", "p"], [STEPS] * 3, ["3", None, "3"])
    assert [f.step for f in found] == [1, None, 1]
    assert found[1] == (None, "no answer within 3 s (tries: 1)", 0.0)


def test_an_empty_batch_is_empty(server):
    assert Judge(server.url, "judge-1").detect_batch([], []) == []
    assert server.requests == []


def test_it_works_inside_a_running_event_loop(server):
    async def notebook() -> FirstError:
        return judge(server, says(r"\boxed{1}"))

    assert asyncio.run(notebook()).step == 1


# ---- the settings


def test_a_pickled_judge_judges_the_same(server):
    server.scripts["p"] = [says(r"\boxed{1}")]
    detector = Judge(server.url, "judge-1", seconds=3.0)
    again = pickle.loads(pickle.dumps(detector))
    assert again == detector
    assert again.detect("p", STEPS) == detector.detect("p", STEPS) == detector.find("p", STEPS, None)


@pytest.mark.parametrize(
    ("name", "value"), [("url", "localhost"), ("model", ""), ("tries", 0), ("votes", 0), ("concurrency", 0)]
)
def test_settings_that_cannot_work_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        Judge(**{"url": "http://localhost", "model": "judge-1", name: value})


def test_importing_the_judge_does_not_import_httpx():
    code = "import sys, prefixloss.detect.models.judge; sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_calls_and_tokens_are_counted_as_far_as_the_endpoint_says(server) -> None:
    server.scripts["p"] = [
        lambda s: s.reply(200, {"choices": [{"message": {"content": r"\boxed{1}"}}], "usage": {"total_tokens": 70}}),
        says(r"\boxed{1}"),
    ]
    before = spent()
    Judge(server.url, "judge-1").detect_batch(["p", "p"], [STEPS] * 2)
    assert spent().since(before) == (2, 70)

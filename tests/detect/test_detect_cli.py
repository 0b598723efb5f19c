"""`prefixloss detect` and `detect eval`: names, file formats, scores, and errors before any work."""

import codecs
import errno
import json
import os
import pickle
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prefixloss import cli
from prefixloss.detect import commands
from prefixloss.detect.base import Detector, FirstError
from prefixloss.detect.choose import by_name
from prefixloss.detect.combine import Earliest, FirstOf, Vote
from prefixloss.detect.cost import spend
from prefixloss.detect.evaluate import KINDS, Scores, kind_of
from prefixloss.detect.records import FormatError, read_records
from prefixloss.io.files import Growing

WRONG_AT_1 = {"problem": "(2 + 3) * 4 =", "steps": ["2 + 3 = 5.", "5 * 4 = 21.", "So the answer is 21"], "answer": "20"}
RIGHT = {"problem": "(2 + 3) * 4 =", "response": "Step 1: 2 + 3 = 5.\nStep 2: 5 * 4 = 20.\nSo the answer is 20"}
UNREAD = {"problem": "Who was it?", "response": "I think that it was Ann."}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["detect", *map(str, arguments)])


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prm(**step: object) -> dict[str, Any]:
    return {"question": {"problem": "x"}, "label": {"steps": [step]}}


# names


@pytest.mark.parametrize(
    "name", ["auto", "maths", "code", "brackets", "swaps", "sorting", "orderings", "rules", "knights"]
)
def test_every_name_is_a_detector_that_can_be_pickled(name: str) -> None:
    detector = by_name(name)
    assert isinstance(detector, Detector)
    assert pickle.loads(pickle.dumps(detector)) == detector


def test_names_combine() -> None:
    assert isinstance(by_name("maths,code"), FirstOf)
    vote = by_name("vote(maths, earliest(code,brackets), prm:some/model)")
    assert isinstance(vote, Vote)
    assert isinstance(vote.detectors[1], Earliest)
    assert vote.detectors[2].model == "some/model"  # type: ignore[attr-defined]
    judge = by_name("judge:some-model@http://localhost:1/v1")
    assert (judge.model, judge.url) == ("some-model", "http://localhost:1/v1")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name", ["", "math", "prm", "prm:", "maths:x", "judge:model", "vote()", "maths,", "vote(maths"]
)
def test_other_names_are_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"detector: got .*, expected .*(maths|judge)"):
        by_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "vote(maths,maths", "vote(maths))", ")(", "maths)", "(", "vote((", "earliest(vote(maths),code",
        "vote(" * 5000 + "maths" + ")" * 5000, "(" * 10**6, "vote(" * 17 + "maths" + ")" * 17,
    ],
    ids=lambda name: name[:20],
)  # fmt: skip
def test_brackets_that_do_not_pair_up_or_go_too_deep_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"detector: got .*, expected brackets that pair up, at most 16") as caught:
        by_name(name)
    assert len(str(caught.value)) < 1000


def test_groups_stand_beside_each_other_and_within_each_other() -> None:
    both = by_name("vote(maths),earliest(maths, vote(code,rules))")
    assert isinstance(both, FirstOf)
    vote, earliest = both.detectors
    assert isinstance(vote, Vote)
    assert isinstance(earliest, Earliest)
    assert isinstance(earliest.detectors[1], Vote)
    deep = by_name("vote(" * 16 + "maths" + ")" * 16)
    assert isinstance(deep, Vote)
    assert by_name("prm:models/one(two,three)").model == "models/one(two,three)"  # type: ignore[attr-defined]


def test_a_detector_that_cannot_be_read_ends_the_command_with_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", {"problem": "1 + 1 =", "steps": ["1 + 1 = 2"]})
    result = invoke(path, "--detector", "vote(maths,maths")
    assert result.exit_code == 2
    assert "--detector: got 'vote(maths,maths', expected brackets" in result.output


@pytest.mark.parametrize("kind", ["prm", "logits", "rollouts"])
@pytest.mark.parametrize("command", ["annotate", "eval"])
def test_a_model_that_cannot_be_loaded_ends_the_command_before_any_response(
    tmp_path: Path, kind: str, command: str
) -> None:
    (tmp_path / "empty").mkdir()
    path = written(tmp_path / "in.jsonl", {"problem": "1 + 1 =", "steps": ["1 + 1 = 3"], "first_error": 0})
    name = f"maths,{kind}:{tmp_path / 'empty'}"
    form = ["--format", "labelled"] if command == "eval" else []
    result = invoke(command, path, "--detector", name, *form)
    assert result.exit_code == 2
    assert f"--detector: got '{name}', which cannot be loaded: " in " ".join(result.output.split("\n"))
    assert "first_error" not in result.output


@pytest.mark.parametrize("name", [None, 1, b"maths", ["maths"]])
def test_a_detectors_name_is_a_string(name: object) -> None:
    with pytest.raises(TypeError, match=r"detector: got .*, expected a name"):
        by_name(name)  # type: ignore[arg-type]


def test_auto_sends_each_kind_of_problem_to_its_own_reader() -> None:
    auto = by_name("auto")
    row = "In a row: an owl, a crow, and a hawk.\nThe owl is the leftmost.\nThe crow is the rightmost."
    for problem, wrong in (
        ("Complete the rest of the sequence. Input: [ { (", "[ ; stack: {"),
        ("Sort the following words alphabetically: List: oak elm", "So the answer is oak elm"),
        (row, "The owl is the leftmost, so it must be the rightmost."),
        ("(2 + 3) * 4 =", "2 + 3 = 6"),
    ):
        result = auto.detect(problem, [wrong])
        assert result.step == 0, (problem, result)
        assert auto.detect(problem, ["I think so."]).step is None


# files


def test_the_plain_form_takes_steps_or_cuts_a_response(tmp_path: Path) -> None:
    first, second = read_records(written(tmp_path / "x.jsonl", WRONG_AT_1, RIGHT), "plain")
    assert first.steps == WRONG_AT_1["steps"]
    assert (first.answer, first.label) == ("20", None)
    assert len(second.steps) == 2
    assert "".join(second.steps) == RIGHT["response"]


def test_published_sets_are_read(tmp_path: Path) -> None:
    bigbench = {"input": "q", "steps": ["a", "b"], "answer": "1", "target": "2", "mistake_index": 1}
    process = {"problem": "q", "steps": ["a", "b"], "label": -1, "final_answer_correct": True}
    rated = [
        {"completions": [{"text": "bad", "rating": -1}, {"text": "a", "rating": 1}], "chosen_completion": 1},
        {"completions": [{"text": "c", "rating": -1}], "chosen_completion": None, "human_completion": {"text": "b"}},
        {"completions": [{"text": "no", "rating": -1}], "chosen_completion": None},
        {"completions": [{"text": "after", "rating": 1}], "chosen_completion": 0},
    ]
    prm = {"question": {"problem": "q", "ground_truth_answer": "2"}, "label": {"steps": rated}}
    for form, row, want in (
        ("bigbench-mistake", bigbench, (["a", "b"], "2", 1)),
        ("bigbench-mistake", bigbench | {"mistake_index": None}, (["a", "b"], "2", -1)),
        ("processbench", process, (["a", "b"], None, -1)),
        ("prm800k", prm, (["a", "b", "no"], "2", 2)),
    ):
        (record,) = read_records(written(tmp_path / "x.jsonl", row), form)
        assert (record.problem, record.steps, record.answer, record.label) == ("q", *want)


@pytest.mark.parametrize(
    ("form", "row", "says"),
    [
        ("plain", {"response": "x"}, "line 2: the key 'problem'"),
        ("plain", {"problem": "x"}, "line 2: the key 'response'"),
        ("plain", {"problem": "x", "steps": "y"}, "line 2: the key 'steps'"),
        ("plain", {"problem": "x", "steps": [1]}, "line 2: the key 'steps'"),
        ("plain", {"problem": "x", "response": "y", "answer": [1]}, "line 2: the key 'answer'"),
        ("plain", [], "line 2: expected an object"),
        ("bigbench-mistake", {"input": "x", "steps": ["a"]}, "line 2: the key 'mistake_index' is missing"),
        ("bigbench-mistake", {"input": "x", "steps": ["a"], "mistake_index": 1}, "the label 1 is no step of 1"),
        ("processbench", {"problem": "x", "steps": ["a"], "label": True}, "line 2: the key 'label'"),
        ("processbench", {"problem": "x", "steps": ["a"], "label": -2}, "the label -2 is no step"),
        ("prm800k", {"question": "x", "label": {}}, "line 2: the key 'question'"),
        ("prm800k", {"question": {"problem": "x"}, "label": {"steps": 3}}, "line 2: the key 'steps'"),
        ("prm800k", {"question": {"problem": "x"}, "label": {"steps": [3]}}, "line 2: the key 'steps'"),
        ("prm800k", prm(completions=3), "line 2: the key 'completions'"),
        ("prm800k", prm(completions=[3]), "line 2: the key 'completions'"),
        ("prm800k", prm(completions=[], chosen_completion=0), "line 2: the key 'chosen_completion'"),
        ("prm800k", prm(completions=[{"text": 1}]), "line 2: the key 'text'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, form: str, row: object, says: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + json.dumps(row), encoding="utf-8")
    with pytest.raises(FormatError, match=says):
        read_records(path, form)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    empty, binary, broken = (tmp_path / name for name in ("empty", "binary", "broken"))
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\x00")
    broken.write_text('{"problem": ')
    for path, says in (
        (empty, "no lines"),
        (binary, "UTF-8"),
        (broken, "line 1: not JSON"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(FormatError, match=says):
            read_records(path, "plain")


ROWS = '{"problem": "a", "response": "é"}\r\n\r\n{"problem": "b", "response": "\U0001d465"}\r\n'
ARRAY = '\n[ {"problem": "a",\n "response": "é"} ,\r\n{"problem": "b", "response": "\U0001d465"}\n]\n'


@pytest.mark.parametrize("text", [ROWS, ARRAY], ids=["lines", "array"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_lines_and_arrays_are_read_in_every_encoding_that_a_mark_names(
    tmp_path: Path, text: str, mark: bytes, encoding: str
) -> None:
    (tmp_path / "x.json").write_bytes(mark + text.encode(encoding))
    records = read_records(tmp_path / "x.json", "plain")
    assert [(record.problem, *record.steps) for record in records] == [("a", "é"), ("b", "\U0001d465")]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'[{"problem": "a", "response": "b"},\n\n 2]', "line 3: expected an object"),
        (b'[{"problem": "a", "response": "b"},\n{}]', "line 2: the key 'response'"),
        (b'[{"problem": "a", "response": "b"},\n\n{"problem": \n}]', "line 4: not JSON"),
        (b'[{"problem": "a", "response": "b"}\n', "line 1: not JSON"),
        (b'[{"problem": "a", "response": "b"},\n', "line 2: not JSON"),
        (b'[{"problem": "a", "response": "b"},\n]', "line 2: not JSON"),
        (b'[{"problem": "a", "response": "b"}\n{}]', "line 1: not JSON .no comma"),
        (b'[{"problem": "a", "response": "b"}\n]\n[]', "line 2: not JSON .more behind"),
        (b"\n[]", "line 2: expected an object, got an empty array"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"problem": "a", "response": "b"}\n\xff', "line 2: not UTF-8 text"),
        (b"\xff\xfe{\x00\n", "line 1: not UTF-8 text, and not the UTF-16"),
        (b"a,b\n1,2\n", "line 1: not JSON"),
        (b'{"problem": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
    ],
)
def test_what_is_neither_is_refused_with_its_line(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(FormatError, match=rf"x\.json, {says}"):
        read_records(tmp_path / "x.json", "plain")


# commands


def test_detect_annotates_each_line(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", WRONG_AT_1, RIGHT | {"id": "é"}, UNREAD)
    out = tmp_path / "out.jsonl"
    result = invoke(source, "--out", out)
    assert result.exit_code == 0, result.output
    assert "3 responses: an error in 1, nothing to say of 1" in result.output
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["first_error"] for line in lines] == [1, None, None]
    assert lines[0]["reason"] == "20 = 21 is false"
    assert [line["confidence"] > 0 for line in lines] == [True, True, False]
    assert lines[1]["id"] == "é"
    assert "".join(lines[1]["steps"]) == RIGHT["response"]
    assert invoke(source).stdout.startswith(out.read_text(encoding="utf-8"))
    assert invoke("--detector", "brackets", source).exit_code == 0  # options may come first


def test_eval_counts_every_kind_of_outcome(tmp_path: Path) -> None:
    def row(wrong_at: int | None, label: int | None) -> dict[str, Any]:
        steps = [f"{k} + 1 = {k + 1 + (k == wrong_at)}" for k in range(3)]
        return {"input": "Count.", "steps": steps, "target": None, "mistake_index": label}

    rows = [row(1, 1), row(None, None), row(0, 1), row(2, 1), row(None, 2), row(0, None), row(2, 2), row(1, 1)]
    path, figures = written(tmp_path / "x.jsonl", *rows), tmp_path / "figures.json"
    result = invoke("eval", path, "--errors", "--json", figures)
    assert result.exit_code == 0, result.output
    got = json.loads(figures.read_text())
    counts = {kind: round(share * 8) for kind, share in got["shares"].items()}
    assert counts == {"exact": 4, "earlier": 1, "later": 1, "none found": 1, "false alarm": 1}
    assert got["processbench_f1"] == pytest.approx(2 * 0.5 * 0.5)
    assert got["pairs"][:3] == [[1, 1], [-1, -1], [1, 0]]
    assert got["steps"] == 24
    for words in (
        "false alarm, response 6: labelled none, found step 1",
        "later, response 4",
        "1 = 2 is false",
        "50.0%",
    ):
        assert words in " ".join(result.output.split()), words


HALF = "half of \ud83d, then \udc00"
ESCAPES = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202egnorw\u202c \r \x08"


def test_half_a_character_stays_the_escape_that_it_was(tmp_path: Path) -> None:
    rows = [{"problem": HALF, "response": f"2 + 2 = 5 {HALF}", HALF: [HALF]}, WRONG_AT_1]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke(source, "--out", out)
    assert result.exit_code == 0, result.output
    assert b"\\ud83d" in out.read_bytes()
    first, second = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert {key: first[key] for key in (HALF, "problem", "response")} == rows[0]
    assert "".join(first["steps"]) == rows[0]["response"]
    assert (first["first_error"], second["first_error"]) == (0, 1)
    assert invoke(source).stdout_bytes.startswith(out.read_bytes())


def test_responses_and_reasons_do_not_reach_the_terminal_as_escapes(tmp_path: Path, monkeypatch: Any) -> None:
    class Saying(Detector):
        def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
            return FirstError(0, f"because{ESCAPES}{HALF}", 0.5)

    monkeypatch.setattr(commands, "by_name", lambda name: Saying())
    rows = [{"problem": "p", "steps": [f"a{ESCAPES}{HALF}"], "label": -1}]
    (tmp_path / ESCAPES.replace("\x08", "")).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("eval", tmp_path / ESCAPES.replace("\x08", ""), "--format", "processbench", "--errors")
    assert result.exit_code == 0, result.output
    assert "because\u241b[2J" in result.output
    assert not set(ESCAPES + HALF) & set("\x1b\x07\x9b\u202e\u202c\r\x08\ud83d") & set(result.output)
    missing = invoke(tmp_path / "no\x1b[2Jsuch")
    assert (missing.exit_code, "\x1b" in missing.output) == (2, False)


class Failing(Detector):
    """Fails where the problem says so, and in the way that it says."""

    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        return FirstError(None, "read", 0.5)

    def detect_batch(self, problems: Sequence[str], *others: Any) -> list[FirstError]:
        for problem in problems:
            if problem == "fail":
                raise UnicodeError("no text")
            if problem == "interrupt":
                raise KeyboardInterrupt
            if problem == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            if problem == "crash":
                raise SystemExit(7)
        return super().detect_batch(problems, *others)


def annotated(tmp_path: Path, monkeypatch: Any, *problems: str, batch_size: int = 2) -> tuple[Any, Path]:
    monkeypatch.setattr(commands, "by_name", lambda name: Failing())
    source = written(tmp_path / "in.jsonl", *({"problem": problem, "response": "r"} for problem in problems))
    out = tmp_path / "out.jsonl"
    return invoke(source, "--out", out, "--batch-size", batch_size), out


def test_a_response_at_which_the_detector_fails_has_that_as_its_reason(tmp_path: Path, monkeypatch: Any) -> None:
    result, out = annotated(tmp_path, monkeypatch, "a", "fail", "b", "c")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["read", "failed: UnicodeError: no text", "read", "read"]
    assert [line["confidence"] for line in lines] == [0.5, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(("how", "code"), [("interrupt", 130), ("terminate", 130), ("crash", 7)])
def test_what_was_done_before_an_end_is_there(tmp_path: Path, monkeypatch: Any, how: str, code: int) -> None:
    result, out = annotated(tmp_path, monkeypatch, "a", "b", "c", how, "d")
    assert result.exit_code == code, result.output
    assert not out.exists()
    part = out.with_name("out.jsonl.part")
    assert [json.loads(line)["problem"] for line in part.read_text().splitlines()] == ["a", "b"]
    if code == 130:
        assert f"stopped: 2 of 5 responses in {part}" in result.output.replace("\n", "")
    kept = part.read_bytes()
    again, _ = annotated(tmp_path, monkeypatch, "a")
    assert again.exit_code == 2
    assert "out.jsonl.part is left from a run that did not end" in again.output
    assert part.read_bytes() == kept
    part.unlink()
    assert annotated(tmp_path, monkeypatch, how)[0].exit_code == code
    assert not part.exists()  # nothing was done


def test_a_full_disk_loses_no_line(tmp_path: Path, monkeypatch: Any) -> None:
    write = Growing.write

    def fill(self: Growing, data: bytes) -> None:
        if b'"c"' in data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(Growing, "write", fill)
    result, out = annotated(tmp_path, monkeypatch, "a", "b", "c")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    both = out.with_name("out.jsonl.part").read_text() + result.stdout
    assert [json.loads(line)["problem"] for line in both.splitlines()] == ["a", "b", "c"]


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    source, null = written(tmp_path / "in.jsonl", RIGHT), tmp_path / "null"
    null.symlink_to("/dev/null")
    for command in ([source, "--out"], ["eval", "--format", "processbench", labelled(tmp_path), "--json"]):
        assert invoke(*command, null).exit_code == 0
        assert null.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "labelled.jsonl", "null"]


def labelled(tmp_path: Path, count: int = 3) -> Path:
    row = {"problem": "(2 + 3) * 4 =", "steps": ["2 + 3 = 5.", "5 * 4 = 21."], "label": 1}
    return written(tmp_path / "labelled.jsonl", *[row] * count)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_table_is_cut(tmp_path: Path, monkeypatch: Any, width: int) -> None:
    class Found(Detector):
        def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
            return FirstError(1, "x", 1.0)

    monkeypatch.setattr(commands, "by_name", lambda name: Found())
    monkeypatch.setenv("COLUMNS", str(width))
    result = invoke("eval", labelled(tmp_path, 12_345), "--format", "processbench")
    assert result.exit_code == 0, result.output
    assert "\u2026" not in result.output
    for heading in ("responses", *KINDS, "nothing to say", "ProcessBench F1", "steps/s", "none", "8+", "12345"):
        assert heading in result.output
    assert "100.0%" in result.output


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(commands, "evaluate", None)
    source = labelled(tmp_path)
    for command in (["--out"], ["--json"]):
        arguments = ["eval", source, "--format", "processbench"] if command == ["--json"] else [source]
        result = invoke(*arguments, *command, tmp_path)
        assert result.exit_code == 2
        assert f"cannot write {tmp_path}" in result.output.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["FILE", "--detector", "oracle"], "--detector: got 'oracle', expected auto, brackets"),
        (["FILE", "--steps", "pages"], "--steps: got 'pages', expected one of markers"),
        (["FILE", "--format", "csv"], "--format: got 'csv', expected one of plain"),
        (["eval", "FILE", "--format", "plain"], "plain"),
        (["missing.jsonl"], "cannot read missing.jsonl: No such file"),
        (["FILE", "--out", "/no/such/place"], "cannot write /no/such/place"),
    ],
)
def test_wrong_arguments_get_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    path = written(tmp_path / "in.jsonl", RIGHT)
    result = invoke(*[str(path) if a == "FILE" else a for a in arguments])
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output


# scores


def test_outcomes_have_names() -> None:
    assert [kind_of(*pair) for pair in ((1, 1), (-1, None), (2, 1), (1, 2), (1, None), (-1, 0))] == [
        "exact", "exact", "earlier", "later", "none found", "false alarm",
    ]  # fmt: skip


def scored(*pairs: tuple[int, int], confidences: Sequence[float] = (), threshold: float = 0.0) -> Scores:
    """Of labelled and found steps, -1 for none."""
    sure = confidences or [1.0] * len(pairs)
    found = [FirstError(None if step < 0 else step, "", c) for (_, step), c in zip(pairs, sure, strict=True)]
    return Scores([label for label, _ in pairs], found, 4, 1.0, threshold=threshold)


def test_f1_needs_both_kinds_of_response_and_the_table_counts_all() -> None:
    assert scored((1, 1), (2, 0)).f1 is None
    assert scored((1, 0), (-1, 3)).f1 == 0
    scores = scored((1, 1), (-1, -1), (0, 5), (20, 30))
    assert scores.f1 == pytest.approx(2 * (1 / 3) / (1 + 1 / 3))
    table = scores.confusion(most=4)
    assert sum(map(sum, table)) == 4
    assert (table[0][0], table[2][2], table[1][4], table[4][4]) == (1, 1, 1, 1)


def test_finds_below_the_threshold_count_as_none() -> None:
    pairs = ((1, 1), (2, 0), (-1, 0), (-1, -1))
    kept = scored(*pairs, confidences=(0.9, 0.3, 0.3, 0.6), threshold=0.5)
    assert kept.pairs == [(1, 1), (2, -1), (-1, -1), (-1, -1)]
    assert (kept.unsure, kept.kinds["false alarm"], kept.kinds["none found"]) == (2, 0, 1)
    assert kept.share_among("exact", correct=False) == 0.5
    assert kept.share_among("exact", correct=True) == 1
    assert scored(*pairs, confidences=(0.9, 0.3, 0.3, 0.6)).share_among("false alarm", correct=True) == 0.5


def test_reliability_is_how_often_verdicts_are_right_by_their_confidence() -> None:
    """Three finds from 0.3 to 0.4, one of them right; two from 0.9, both right. Two verdicts of no error, one wrong."""
    pairs = ((1, 1), (2, 0), (-1, 0), (3, 3), (4, 4), (-1, -1), (1, -1), (2, -1))
    scores = scored(*pairs, confidences=(0.3, 0.33, 0.39, 0.9, 1.0, 0.8, 0.8, 0.0))
    low, high = scores.reliability()
    assert (low.low, low.high, low.verdicts, low.right) == (0.3, 0.4, 3, 1)
    assert low.confidence == pytest.approx(0.34)
    assert (high.low, high.verdicts, high.right) == (0.9, 2, 2)
    assert high.confidence == pytest.approx(0.95)
    # |1 - 3 * 0.34| and |2 - 2 * 0.95|, over 5 finds
    assert scores.calibration_error() == pytest.approx((0.02 + 0.1) / 5)
    # from 0.3 up all finds count: 3 of 6 with an error are exact, 1 of 2 without; from 0.9 up 2 of 6, and 2 of 2
    assert (low.f1, high.f1) == (pytest.approx(0.5), pytest.approx(2 * (1 / 3) / (4 / 3)))
    (silent,) = scores.reliability(finds=False)
    assert (silent.verdicts, silent.right) == (2, 1)
    assert scored((1, -1), confidences=[0.0]).calibration_error() is None


def test_eval_compares_detectors_and_sources(tmp_path: Path) -> None:
    rows = [WRONG_AT_1 | {"first_error": 1, "kind": "a"}, WRONG_AT_1 | {"first_error": None, "kind": "b"}]
    path, figures, picture = written(tmp_path / "x.jsonl", *rows), tmp_path / "f.json", tmp_path / "p.png"
    options = ("--format", "labelled", "--by", "kind", "--json", figures, "--picture", picture)
    result = invoke("eval", path, "--detector", "maths", "--detector", "brackets", *options)
    assert result.exit_code == 0, result.output
    got = {(row["file"], row["detector"]): row for row in json.loads(figures.read_text())["rows"]}
    exact = {key: row["shares"]["exact"] for key, row in got.items()}
    assert exact == {("a", "maths"): 1, ("b", "maths"): 0, ("a", "brackets"): 0, ("b", "brackets"): 1}
    assert got["a", "maths"]["calls"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for words in ("finds of maths by confidence", "0.9 to 1.0", "seconds a response"):
        assert words in " ".join(result.output.split()), words
    assert invoke("eval", path, path, "--format", "labelled", "--json", figures).exit_code == 0
    assert json.loads(figures.read_text())["responses"] == 4  # one source by its name
    assert "no such key" in invoke("eval", path, "--format", "labelled", "--by", "other").output


def test_eval_takes_a_threshold(tmp_path: Path) -> None:
    """The find has a confidence of 0.94."""
    path, figures = written(tmp_path / "x.jsonl", WRONG_AT_1 | {"first_error": 1}), tmp_path / "f.json"
    for threshold, exact in ((0.94, 1), (0.95, 0)):
        options = ("--format", "labelled", "--threshold", threshold, "--json", figures)
        assert invoke("eval", path, *options).exit_code == 0
        got = json.loads(figures.read_text())
        assert (got["threshold"], got["shares"]["exact"]) == (threshold, exact)
    assert invoke("eval", path, "--format", "labelled", "--threshold", 2).exit_code == 2


class Costly(Detector):
    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        spend(2, 30)
        return FirstError(1, "", 1.0)


def test_eval_says_what_a_response_costs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(commands, "by_name", lambda name: Costly())
    figures = tmp_path / "f.json"
    result = invoke("eval", labelled(tmp_path), "--format", "processbench", "--json", figures)
    got = json.loads(figures.read_text())
    assert (got["responses"], got["calls"], got["tokens"]) == (3, 6, 90)
    assert "tokens a response │ 30" in " ".join(result.output.split()).replace("│ │", "│")


def test_forms_with_labels_are_read(tmp_path: Path) -> None:
    mark = "\u043a\u0438"
    text = "How many? Step 1: 2. {}\nStep 2: 3. {}"
    shepherd = {"input": text.format(mark, mark), "label": text.format("+", "-")}
    stepwise = {"prompt": "How many?", "completions": ["2.", "3."], "labels": [True, False]}
    for form, row, steps, label in (
        ("labelled", {"problem": "How many?", "steps": ["2.", "3."], "first_error": 0}, ["2.", "3."], 0),
        ("labelled", {"problem": "How many?", "steps": ["2."], "first_error": None}, ["2."], -1),
        ("math-shepherd", shepherd, ["Step 1: 2. ", "\nStep 2: 3. "], 1),
        ("math-shepherd", shepherd | {"label": text.format("+", "+")}, None, -1),
        ("stepwise", stepwise, ["2.", "3."], 1),
        ("stepwise", stepwise | {"labels": [True, True]}, None, -1),
    ):
        (record,) = read_records(written(tmp_path / "x.jsonl", row), form)
        assert record.problem == "How many?"
        assert steps is None or record.steps == steps
        assert record.label == label


@pytest.mark.parametrize(
    ("form", "row", "says"),
    [
        ("labelled", {"problem": "x", "steps": ["a"]}, "the key 'first_error' is missing"),
        ("labelled", {"problem": "x", "steps": ["a"], "first_error": 1}, "the label 1 is no step of 1"),
        ("labelled", {"problem": "x", "steps": ["a"], "first_error": "0"}, "the key 'first_error'"),
        ("math-shepherd", {"input": "x", "label": "x"}, "the key 'input' has to be a problem, then 'Step 1'"),
        ("math-shepherd", {"input": "x Step 1: \u043a\u0438", "label": "x Step 1: ?"}, "the key 'label'"),
        ("stepwise", {"prompt": "x", "completions": ["a"], "labels": [True, True]}, "the key 'labels'"),
        ("stepwise", {"prompt": "x", "completions": ["a"], "labels": [1]}, "the key 'labels'"),
    ],
)
def test_a_wrong_line_of_a_form_with_labels_is_named(tmp_path: Path, form: str, row: object, says: str) -> None:
    with pytest.raises(FormatError, match=f"line 1: {says}"):
        read_records(written(tmp_path / "x.jsonl", row), form)

"""The one reader of answers: what a text states, and whether it is the right one, for rewards that can be trusted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixloss.detect.maths.answers import right_answer, same, stated, states
from prefixloss.detect.records import read_records
from prefixloss.rl import task

# a solution as GSM8K writes them, of the same form but not from it
SOLUTION = "Tom has 3*20=$<<3*20=60>>60.\nWith the rest he has 60+12=$<<60+12=72>>72 in all.\n#### 72"


@pytest.mark.parametrize("answer", [SOLUTION, "72", "The answer is 72.", "So it is \\boxed{72}", "#### 72"])
def test_a_data_set_s_answer_is_what_its_solution_states(answer: str, tmp_path: Path) -> None:
    assert right_answer(answer).strip().rstrip(".") == "72"
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "How much?", "answer": answer}))
    (problem,) = task.load_problems(path)
    for response, right in (
        ("\\boxed{72}", True),
        ("It is $72$.\n\nThe answer is 72.", True),
        ("Final answer: 72 dollars", True),
        (SOLUTION, True),
        ("\\boxed{73}", False),
        ("\\boxed{60}", False),  # a number of the solution, but not its answer
        ("It is 72.", False),
    ):
        assert task.check_answer(problem, response) is right, response


def test_detectors_are_told_what_a_written_solution_states(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"problem": "q", "response": "r", "answer": SOLUTION}))
    (record,) = read_records(path, "plain")
    assert record.answer is not None
    assert record.answer.strip() == "72"


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("72", "72"),
        (" $72 ", "72"),
        ("\\$72,000", "72000"),
        ("1,200.00", "1200"),
        ("1e3", "1000"),
        ("\u221212", "-12"),
        ("18 dollars per day.", "18"),
        ("**18**", "18"),
        ("18. She keeps 3 more.", "18"),
        ("72 because 48 + 24 = 72", "72"),
        ("12 + 20 = 32", "32"),
        ("x = 5", "5"),
        ("5", "x = 5"),
        ("25%", "25"),
        ("25%", "0.25"),
        ("3 1/2", "3.5"),
        ("\\frac12", "0.5"),
        ("2/4", "1/2"),
        ("500 cm", "5 m"),
        ("\\frac{\\sqrt{3}}{2}", "\\sqrt{3}/2"),
        ("1+x", "x+1"),
        ("Two  Apples.", "two apples"),
        ("(B)", "B"),
        ("\\text{(C)}", "C"),
        ("10:30", "10:30"),
        ("(1, 2)", "(1,2)"),
        ("\\left(3,\\frac{\\pi}{2}\\right)", "(3, \\frac{\\pi}{2})"),
        ("\\{2, 0.5\\}", "\\{1/2,2\\}"),
        ("2, 1", "1,2"),
    ],
)
def test_the_same_answer_in_another_spelling(said: str, right: str) -> None:
    assert same(said, right)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("73", "72"),
        ("-7", "7"),
        ("--7", "7"),
        ("0.333", "1/3"),
        ("71.9999999999999999999999999999", "72"),
        ("16*2", "32"),  # still to be worked out: the question's own expression is no answer
        ("3*2", "32"),
        ("144/2", "72"),
        ("5 5", "55"),
        ("5 = 32", "32"),
        ("32 or 33", "32"),  # more than one answer
        ("32, 33", "32"),
        ("32 or so", "32"),
        ("5 apples for 3 children", "5"),
        ("not 5", "5"),
        ("x < 3", "3"),
        ("5 cm", "5 m"),
        ("x+2", "x+1"),
        ("y+1", "x+1"),
        ("(2,1)", "(1,2)"),
        ("(1,2]", "(1,2)"),
        ("\\{1, 1\\}", "\\{1, 2\\}"),
        ("1, 2, 3", "1, 2"),
        ("three", "3"),
        ("1/0", "1"),
        ("", ""),
        ("5", ""),
    ],
)
def test_another_answer_or_none(said: str, right: str) -> None:
    assert not same(said, right)


def test_an_answer_that_was_cut_off_is_none() -> None:
    assert stated("so \\boxed{32") is None
    assert stated("so \\boxed{\\frac{1}{2}") is None
    assert stated("so \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"


@given(st.text(alphabet="()[]{}\\,$%^!*/+-=. 0123456789xsqrt\n", max_size=500), st.text(max_size=30))
def test_no_answer_makes_it_raise(said: str, right: str) -> None:
    assert same(said, right) in (True, False)
    assert states(f"#### {said}", right) in (True, False)


def test_reading_answers_needs_no_extra() -> None:
    code = (
        "import sys\nfor name in ('sympy', 'math_verify', 'z3', 'httpx'): sys.modules[name] = None\n"
        "from prefixloss.rl import task\n"
        "assert task.check_answer(task.Problem('q', '2\\\\sqrt{3}'), 'The answer is \\\\boxed{\\\\sqrt{12}}')\n"
        "assert task.check_answer(task.Problem('q', '(1, x+1)'), '\\\\boxed{(1, 1+x)}')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0

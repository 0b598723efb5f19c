"""The generated problems, the answer check and the step checker: every kind of error by hand, then garbage."""

import json
import random
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefixloss.rl import task
from prefixloss.rl.task import Problem, Steps

CHAIN = Problem("(7+5)*3-4=?", "32", ("Step 1: 7+5=12", "Step 2: 12*3=36", "Step 3: 36-4=32", "Answer: 32"))
STORY = Problem("Ann has 3 boxes of 12 eggs and eats 4. How many are left?", "32")


# ---- generation


def test_chains_are_the_same_every_time_and_do_not_depend_on_where_reading_starts():
    assert task.chains(1, 0, 20) == task.chains(1, 0, 20)
    assert task.chains(1, 5, 3) == task.chains(1, 0, 20)[5:8]
    assert task.chains(1, 0, 20) != task.chains(2, 0, 20)


def test_held_out_chains_never_occur_in_training_whatever_the_seed():
    held_out = {p.question for p in task.chains(0, 0, 300, held_out=True)}
    assert len(held_out) == 300
    for seed in range(3):
        assert held_out.isdisjoint(p.question for p in task.chains(seed, 0, 2000))


def test_every_chain_is_right_by_the_usual_precedence_and_its_lines_follow_one_another():
    for p in task.chains(3, 0, 500):
        assert p.question.endswith("=?")
        assert task.evaluate(p.question[:-2]) == int(p.answer)
        value = None
        for k, line in enumerate(p.lines[:-1], 1):
            marker, _, equality = line.partition(": ")
            left, _, right = equality.partition("=")
            assert marker == f"Step {k}"
            assert task.evaluate(left) == int(right)
            assert 0 <= int(right) <= task.MAX_VALUE
            assert value is None or left.startswith(value)
            value = right
        assert p.lines[-1] == f"Answer: {value}" == f"Answer: {p.answer}"
        assert 5 <= len(p.lines) - 1 <= 6


def test_free_form_chains_keep_question_and_answer_only():
    for plain, free in zip(task.chains(0, 0, 5), task.chains(0, 0, 5, free_form=True), strict=True):
        assert free == Problem(plain.question, plain.answer)


# ---- files


def test_load_problems_reads_each_question_once_and_keeps_numbers_as_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"question": "a", "answer": 4, "more": 1}\n\n'
        '{"question": "b", "answer": "x"}\n{"question": "a", "answer": 5}\n'
    )
    assert task.load_problems(path) == [Problem("a", "4"), Problem("b", "x")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"question": "q", "answer": ' + "9" * 5000 + "}", "not JSON"),
        ("[1]", "expected an object"),
        ('{"question": "q"}', "'answer'"),
        ('{"question": 3, "answer": "a"}', "'question'"),
        ('{"question": " ", "answer": "a"}', "'question'"),
        ('{"question": "q", "answer": true}', "'answer'"),
        ('{"question": "half \\ud83d", "answer": "a"}', "'question' has half a character"),
    ],
)
def test_load_problems_names_the_line_it_cannot_use(tmp_path, row, reason):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "fine", "answer": "1"}\n' + row + "\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: .*{reason}"):
        task.load_problems(path)


def test_load_problems_says_why_a_file_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        task.load_problems(tmp_path / "absent.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        task.load_problems(tmp_path / "binary")


def test_split_is_disjoint_complete_and_blind_to_the_order_of_the_file():
    problems = [Problem(f"q{i}", "1") for i in range(80)]
    held_out, training = task.split(problems, 100)
    assert len(held_out) == 10
    assert {p.question for p in held_out + training} == {p.question for p in problems}
    assert {p.question for p in held_out}.isdisjoint(p.question for p in training)
    assert task.split(problems[::-1], 100)[0] == held_out
    assert task.split(problems, 3)[0] == held_out[:3]


def test_shuffled_passes_hold_every_problem_once_in_another_order_each_time():
    problems = [Problem(f"q{i}", "1") for i in range(10)]
    endless = task.shuffled(problems, 0, 0, 30)
    passes = [endless[:10], endless[10:20], endless[20:]]
    assert all(set(p) == set(problems) for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert task.shuffled(problems, 0, 7, 9) == endless[7:16]


# ---- answers


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("Answer: 32", "32", True),
        ("Answer: 32\nAnswer: 5", "32", False),  # the last one counts
        ("Answer: 5\nAnswer: 32", "32", True),
        ("Answer: 322", "32", False),
        ("Answer:", "32", False),
        ("The answer is 32.", "32", True),
        ("So the final answer is 32 eggs. She had 4 more.", "32", True),
        ("Final answer: 32", "32", True),
        ("#### 32", "32", True),
        ("3 * 12 - 4 = <<3*12-4=32>>32\n#### 32", "32", True),
        ("#### 33", "32", False),
        ("The answer is 32 or 33.", "32", False),
        ("The answer is not 32.", "32", False),
        ("Answer: 3*12-4", "32", False),  # still to be worked out
        ("Answer: 3*2", "32", False),
        ("Answer: 3 2", "32", False),
        ("32", "32", False),
        ("", "32", False),
        ("so \\boxed{32}.", "32", True),
        ("\\boxed{1} or rather \\boxed{32}", "32", True),
        ("\\boxed{32", "32", False),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("**Answer:** $1,200.00$", "1200", True),
        ("Answer: 1/0", "1", False),
        ("Answer: Paris.", " paris", True),
        ("Answer: \\text{two apples}", "Two Apples", True),
        ("Answer: -7", "7", False),
        ("Answer: 0.333", "1/3", False),
    ],
)
def test_check_answer(response, answer, correct):
    assert task.check_answer(Problem("q", answer), response) is correct


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        (CHAIN.solution, True),
        ("Answer: 32", True),
        ("Answer: 32\nAnswer: 5", True),  # it ended with its first answer line
        ("Answer: 5\nAnswer: 32", False),
        ("Answer: 3*2", False),
        ("Answer: (7+5)*3-4", False),
        ("Answer: 36-4=32", True),
        ("Step 3: 36-4=32", False),
        ("\\boxed{32}", False),
        ("", False),
    ],
)
def test_a_built_in_problem_s_response_ends_with_its_first_answer_line(response, correct):
    assert task.check_answer(CHAIN, response) is correct


# ---- steps of built-in problems

RIGHT = CHAIN.solution


@pytest.mark.parametrize(
    ("response", "wrong"),
    [
        (RIGHT.replace("7+5=12", "7+5=13"), 0),  # miscalculated
        (
            RIGHT.replace("12*3=36", "12*3=38").replace("36-4=32", "38-4=34").replace("r: 32", "r: 34"),
            1,
        ),  # and carried on
        (RIGHT.replace("Step 2: 12*3=36", "Step 2: 12*4=48"), 1),  # operand miscopied, arithmetic right
        (RIGHT.replace("Step 2: 12*3=36", "Step 2: 12+3=15"), 1),  # operator miscopied
        (RIGHT.replace("Step 2: 12*3=36", "Step 2: 21*3=63"), 1),  # earlier result miscopied
        (RIGHT.replace("Step 3: 36-4=32", "Step 3: 36-4==32"), 2),  # malformed
        (RIGHT.replace("Step 3:", "Step 4:"), 2),  # misnumbered
        (RIGHT.replace("Step 2: 12*3=36\n", ""), 1),  # missing
        ("Answer: 5\n" + RIGHT, 0),  # answered before it was worked out
        (RIGHT.replace("Answer: 32", "Answer: 23"), 3),  # final answer miscopied
        (RIGHT.removesuffix("\nAnswer: 32"), 3),  # no final answer
        ("", 0),
        ("\n\n" + RIGHT, 0),
    ],
)
def test_first_wrong_line_of_a_chain_and_where_it_starts(response, wrong):
    offset = min(sum(len(line) + 1 for line in response.split("\n")[:wrong]), len(response))
    assert task.check_steps(CHAIN, response) == Steps(wrong, offset, wrong, 4)


def test_a_chain_without_a_wrong_line_has_no_first_error():
    assert task.check_steps(CHAIN, RIGHT) == Steps(-1, -1, 4, 4)
    assert task.check_steps(CHAIN, RIGHT + " \nwhatever follows") == Steps(-1, -1, 4, 4)


# ---- steps of free-form responses


@pytest.mark.parametrize(
    ("steps", "wrong"),
    [
        (["Step 1: 3 * 12 = 36 eggs.", "Step 2: She eats 4: 36 - 4 = 33."], 1),  # miscalculated
        (["**Step 1: Count.** $3 \\times 12 = 37$", "**Step 2:** 37 - 4 = 33"], 0),
        (["Step 1: 3*12 = 36", "Step 2: 36 - 5 = 31"], 1),  # 5 is from nowhere
        (["Step 1: We think about it.", "Step 2: 3*12 = 36"], 0),  # nothing to check: in doubt
        (["Step 1: 3*12 = 36", "Step 2: so there are few"], 1),
        (["Step 1: 3x + 12 = 15", "Step 2: 3*12 = 36"], 0),  # an equation, not a calculation: in doubt
        (["Step 1: 12/0 = 3", "Step 2: 3*12 = 36"], 0),
        (["Step 1: total = 3*12 = 36", "Step 2: 36 - 4 = 32 = 3 + 4"], 1),
        (["Step 1: total = 3*12 = 36", "Step 2: left = 36 - 4 = 32"], -1),
        (["Step 1: 4/3 = 1.33", "Step 2: 1.33*12 = 15.96"], -1),  # rounded as written
        (["Step 1: 4/3 = 1.34"], 0),
        (["Step 1: (3*12)-4 = 32.", "Step 1: again 3*12 = 5"], 0),  # no new step: the marker does not count on
    ],
)
def test_first_wrong_step_of_a_free_form_response(steps, wrong):
    response = "Let us see.\n\n" + "\n\n".join(steps)
    found = task.check_steps(STORY, response)
    starts = [0] + [response.index(step) for step in steps[1:]]
    assert found.wrong == wrong
    assert found.offset == (starts[wrong] if wrong >= 0 else -1)


def test_without_step_markers_no_step_is_found():
    assert task.check_steps(STORY, "3*12 = 36 and 36-4 = 33. Answer: 33") == Steps(-1, -1, 0, 0)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("10-4-3", 3),
        ("8/4/2", 1),
        ("1.5*4", 6),
        ("2*(3+(4-1))", 12),
        ("1/3", Fraction(1, 3)),
        ("1/0", None),
        ("2+", None),
        ("+2", None),
        ("(2", None),
        ("2)", None),
        ("2 3", None),
        ("2**3", None),
        ("()", None),
        ("", None),
        ("__import__('os')", None),
        ("9" * 200, None),
    ],
)
def test_evaluate(expression, value):
    assert task.evaluate(expression) == value


# ---- garbage

PIECES = [
    "Step 1:",
    "\nStep 2:",
    "Answer:",
    "\\boxed{",
    "}",
    "\\frac{1}",
    "=",
    "1,000",
    "3*4",
    "12",
    "(",
    ")",
    "\n",
    "**",
    ".",
    "\u00b2",
]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)))
@example("\\boxed{" * 50)
@example("Step 1: " + "(" * 100 + "1" + ")" * 100 + "=1")
def test_no_text_makes_the_checkers_raise_and_offsets_stay_inside(text):
    for problem in (CHAIN, STORY):
        assert task.check_answer(problem, text) in (True, False)
        steps = task.check_steps(problem, text)
        assert (steps.wrong < 0) == (steps.offset < 0)
        assert steps.offset <= len(text)
        assert steps.right <= steps.total
        assert steps.wrong < 0 or steps.right == steps.wrong


@pytest.mark.parametrize(
    "piece", ["(", "1+", "=", "1", "1,000", "Step 1: ", "\nStep 1: 1=1", "\\boxed{", "{", "*", " ", "\\frac{", "."]
)
def test_long_garbage_comes_to_an_end(piece):
    text = piece * (100_000 // len(piece))
    for problem in (CHAIN, STORY):
        task.check_answer(problem, "Answer: " + text)
        task.check_steps(problem, "Step 1: " + text)


def test_a_damaged_solution_is_never_judged_right_beyond_the_damage():
    rng = random.Random(0)
    for problem in task.chains(0, 0, 200):
        place = rng.randrange(len(problem.solution))
        damaged = problem.solution[:place] + "#" + problem.solution[place + 1 :]
        steps = task.check_steps(problem, damaged)
        assert 0 <= steps.offset <= place
        assert steps.wrong == damaged[: steps.offset].count("\n")
        assert place <= steps.offset + len(problem.lines[steps.wrong])  # the damaged line itself, not an earlier one


def test_data_files_round_trip_json(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"question": p.question, "answer": p.answer} for p in task.chains(0, 0, 5)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert task.load_problems(path) == task.chains(0, 0, 5, free_form=True)

"""Combinations of detectors, on stubs that say what they are told and remember what they were asked."""

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixloss.detect.base import Detector, FirstError
from prefixloss.detect.combine import Earliest, FirstOf, Vote

NOTHING = FirstError(None, "cannot read it", 0.0)
FINE = FirstError(None, "every step holds", 0.6)


@dataclass(frozen=True)
class Stub(Detector):
    """Says for each problem what stands in `says`. asked: the batches it was given."""

    says: dict[str, FirstError] = field(default_factory=dict, hash=False)
    asked: list[tuple] = field(default_factory=list, hash=False, compare=False)

    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        raise AssertionError("a member gets batches only")

    def detect_batch(self, problems, steps, answers=None):
        self.asked.append((list(problems), list(steps), answers and list(answers)))
        return [self.says[p] for p in problems]


@dataclass(frozen=True)
class Failing(Detector):
    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        raise RuntimeError("broken")


def stub(*results: FirstError) -> Stub:
    """The first result is for problem "0", and so on."""
    return Stub(says={str(i): result for i, result in enumerate(results)})


def error(step: int, confidence: float = 0.5) -> FirstError:
    return FirstError(step, f"step {step} is wrong", confidence)


def ask(detector: Detector, count: int) -> list[FirstError]:
    return detector.detect_batch([str(i) for i in range(count)], [["a", "b", "c", "d"]] * count, [None] * count)


results = st.builds(
    lambda step, confidence: FirstError(step if confidence else None, f"{step} {confidence}", confidence),
    st.none() | st.integers(0, 3),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
tables = st.integers(1, 4).flatmap(
    lambda members: st.lists(st.lists(results, min_size=members, max_size=members), min_size=1, max_size=5)
)  # [responses][members]


# ---- the first that can say something


def test_first_of_takes_the_first_verdict_in_order():
    first, second, third = stub(error(2), FINE, NOTHING), stub(error(0), error(1), NOTHING), stub(FINE, FINE, error(3))
    assert ask(FirstOf([first, second, third]), 3) == [error(2), FINE, error(3)]


def test_first_of_passes_on_only_what_is_undecided_as_one_batch_with_its_steps_and_answers():
    first, second, third = stub(NOTHING, FINE, NOTHING), stub(NOTHING, error(0), error(1)), stub(error(2), FINE, FINE)
    steps = [["a"], ["b"], ["c", "d"]]
    found = FirstOf([first, second, third]).detect_batch(["0", "1", "2"], steps, ["x", "y", None])
    assert found == [error(2), FINE, error(1)]
    assert first.asked == [(["0", "1", "2"], steps, ["x", "y", None])]
    assert second.asked == [(["0", "2"], [["a"], ["c", "d"]], ["x", None])]
    assert third.asked == [(["0"], [["a"]], ["x"])]


def test_first_of_asks_no_further_member_when_all_is_decided():
    first, second = stub(error(1), FINE), stub()
    assert ask(FirstOf([first, second]), 2) == [error(1), FINE]
    assert second.asked == []


# ---- the earliest error


def test_earliest_takes_the_earliest_claim_even_against_a_surer_all_right():
    members = [stub(FINE, error(3, 0.9)), stub(error(2, 0.1), error(1, 0.1)), stub(NOTHING, FINE)]
    assert ask(Earliest(members), 2) == [error(2, 0.1), error(1, 0.1)]


def test_earliest_takes_the_surer_of_two_equal_claims_and_the_surest_all_right():
    surer = FirstError(None, "proved", 1.0)
    members = [stub(error(1, 0.2), FINE), stub(error(1, 0.8), surer), stub(error(1, 0.5), NOTHING)]
    assert ask(Earliest(members), 2) == [error(1, 0.8), surer]


def test_earliest_does_not_believe_a_claim_without_confidence():
    assert ask(Earliest([stub(FirstError(0, "a guess", 0.0)), stub(error(2))]), 1) == [error(2)]


# ---- the vote


@pytest.mark.parametrize(
    ("verdicts", "weights", "step"),
    [
        ([error(1), error(2), error(2)], None, 2),
        ([error(1), error(2), error(2)], [3, 1, 1], 1),
        ([FINE, FINE, error(0)], None, None),
        ([NOTHING, NOTHING, error(3)], None, 3),  # those who cannot tell do not vote for "no error"
        ([error(2), error(1)], None, 1),
        ([FINE, error(3)], None, 3),
        ([error(0), error(0), error(1)], [0.1, 0.2, 0.3], 0),  # equal, though not as floats
        ([error(1), error(0), error(0)], [0.3, 0.1, 0.2], 0),
        ([error(1), error(1), error(0)], [0.1, 0.2, 0.3], 0),
    ],
)
def test_vote_goes_to_the_most_weight_and_of_equal_ones_to_the_earlier(verdicts, weights, step):
    assert ask(Vote([stub(v) for v in verdicts], weights), 1)[0].step == step


def test_vote_confidence_is_the_supporters_mean_with_dissent_as_nothing():
    # (2 * 0.5 + 1 * 0.8) / (2 + 1 + 1): who cannot tell has no say
    members = [stub(error(1, 0.5)), stub(error(1, 0.8)), stub(error(2, 1.0)), stub(NOTHING)]
    (found,) = ask(Vote(members, [2, 1, 1, 9]), 1)
    assert found.step == 1
    assert found.confidence == pytest.approx(1.8 / 4)
    assert found.reason == "75% of the vote: step 1 is wrong"


# ---- all of them

ALL = pytest.mark.parametrize("combine", [FirstOf, Earliest, Vote])


@ALL
def test_without_a_verdict_nothing_is_said_and_the_reasons_are_given(combine):
    members = [stub(NOTHING), stub(FirstError(None, "out of time", 0.0)), stub(NOTHING)]
    assert ask(combine(members), 1) == [FirstError(None, "cannot read it; out of time", 0.0)]


@ALL
def test_every_member_is_asked_in_batches_and_a_batch_may_be_empty(combine):
    members = [stub(NOTHING, NOTHING), stub(NOTHING, NOTHING)]
    ask(combine(members), 2)
    assert [len(m.asked) for m in members] == [1, 1]
    assert combine(members).detect_batch([], [], None) == []
    assert combine(members).detect("0", ["a"]) == combine(members).find("0", ["a"], None) == NOTHING


@ALL
def test_a_failing_member_only_loses_its_own_say(combine):
    assert combine([Failing(), stub(error(1))]).detect("0", ["a", "b"]).step == 1
    assert combine([Failing()]).detect("0", ["a"]) == (None, "failed: RuntimeError: broken", 0.0)
    assert combine([Failing()]).detect("0", []) == (None, "no steps", 0.0)


@ALL
def test_combinations_combine_pickle_hash_and_stay_the_same(combine):
    members = [stub(error(1), NOTHING), stub(FINE, error(2))]
    nested = combine([combine(members), Failing()])
    again = pickle.loads(pickle.dumps(nested))
    assert again == nested
    assert hash(again) == hash(nested)
    assert ask(again, 2) == ask(nested, 2) == ask(nested, 2)


@ALL
def test_a_list_changed_later_changes_nothing(combine):
    members = [stub(error(1))]
    combined = combine(members)
    members.clear()
    assert ask(combined, 1)[0].step == 1


@ALL
@pytest.mark.parametrize("detectors", [[], ["no detector"]])
def test_members_have_to_be_detectors(combine, detectors):
    with pytest.raises(ValueError, match=r"^detectors: got"):
        combine(detectors)


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3], [1, 0], [1, -1], [1, math.nan], [1, math.inf], []])
def test_weights_have_to_be_one_positive_number_a_member(weights):
    with pytest.raises(ValueError, match=r"^weights: got"):
        Vote([stub(), stub()], weights)


@given(tables)
def test_any_results_combine_to_a_members_step_or_to_nothing(table):
    for combine in (FirstOf, Earliest, Vote):
        members = [stub(*column) for column in zip(*table, strict=True)]
        for said, found in zip(table, ask(combine(members), len(table)), strict=True):
            verdicts = [v for v in said if v.confidence > 0]
            assert 0 <= found.confidence <= 1
            assert (found.confidence > 0) == bool(verdicts)
            assert found.step in ([v.step for v in verdicts] or [None])
            if combine is FirstOf and verdicts:
                assert found == verdicts[0]
            if combine is Earliest and verdicts:
                assert found.step == min((v.step for v in verdicts if v.step is not None), default=None)


@pytest.mark.parametrize("bad", [None, 3, "maths", (), [], [None], [Stub(), "maths"], {"a": Stub()}])
@pytest.mark.parametrize("kind", [FirstOf, Earliest, Vote])
def test_members_are_detectors_and_at_least_one(kind: type, bad: object) -> None:
    with pytest.raises(ValueError, match=r"detectors: got .*, expected at least one Detector"):
        kind(bad)


@pytest.mark.parametrize(
    "bad",
    [1.0, "ab", [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [1, "2"], [1, True], [1, 10**400]],
)
def test_weights_are_a_number_above_0_for_each_member(bad: object) -> None:
    assert Vote([Stub(), Stub()], weights=[1, 0.5]).weights == (1, 0.5)
    with pytest.raises(ValueError, match=r"weights: got .*, expected 2 finite numbers above 0"):
        Vote([Stub(), Stub()], weights=bad)  # type: ignore[arg-type]

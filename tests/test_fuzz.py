"""1,000 mutants of packed checkpoints, settings and texts: each is read right or refused in one line (fuzzing.py)."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from fuzzing import Outcome, make_subjects, message_problem, run, through

from ptq161.errors import InputError

MUTANTS = 1000


@pytest.mark.slow
def test_every_mutant_is_read_right_or_refused_in_one_line(tmp_path):
    subjects = make_subjects(tmp_path)
    halves = [(0, MUTANTS // 2), (MUTANTS // 2, MUTANTS)]
    with ThreadPoolExecutor() as pool:  # each thread only waits for a process of its own
        outcomes = [o for half in pool.map(lambda part: list(run(subjects, 0, *part)), halves) for o in half]
    assert [outcome.number for outcome in outcomes] == list(range(MUTANTS))
    assert not [outcome for outcome in outcomes if outcome.failures]
    said = Counter(answer for outcome in outcomes for answer in outcome.doors.items())
    for door, answer in (("load", "loaded"), ("load", "refused"), ("from_pretrained", "loaded"), ("verify", "sound")):
        assert said[door, answer] > MUTANTS // 100, said


def refuse(message):
    raise InputError(message)


@pytest.mark.parametrize(
    ("opened", "expected"),
    [
        (lambda: refuse("a clear line"), None),
        (lambda: refuse(" "), "message of"),
        (lambda: {}["x"], "KeyError"),
        (lambda: bytearray(10**15), "MemoryError"),
    ],
)
def test_the_fuzzer_tells_a_refusal_from_an_accident(opened, expected):
    outcome = Outcome(0, "file", "did")
    assert through(outcome, "door", opened) is None
    assert len(outcome.failures) == (expected is not None)
    assert expected is None or expected in outcome.failures[0]
    assert message_problem(ValueError("two\nlines")) and message_problem(ValueError("x" * 5000))

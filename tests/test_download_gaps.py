"""Why bars are missing: worked cases, and the same by a model that looks at every bar for itself."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpcast.database import CandleGap
from perpcast.download.gaps import Evidence, Range, classify, intersect, join, range_of, subtract

STEP = 10


def gap(first: int, bars: int, cause: str, reason: str | None = None) -> CandleGap:
    return CandleGap("A", first * STEP, bars, cause, reason)


def ms(*ranges: Range) -> list[Range]:
    return [(first * STEP, end * STEP) for first, end in ranges]


@pytest.mark.parametrize(
    ("ranges", "holes", "rest"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(-5, 20)], []),
        ([(0, 10)], [(3, 5)], [(0, 3), (5, 10)]),
        ([(0, 10), (20, 30)], [(5, 25)], [(0, 5), (25, 30)]),
        ([(0, 10)], [(0, 2), (2, 4), (8, 10)], [(4, 8)]),
        ([(0, 10)], [(10, 12), (-2, 0)], [(0, 10)]),
    ],
)
def test_subtract(ranges: list[Range], holes: list[Range], rest: list[Range]) -> None:
    assert subtract(ranges, holes) == rest
    assert intersect(ranges, holes) == subtract(ranges, rest)


@pytest.mark.parametrize(
    ("ranges", "joined"),
    [
        ([], []),
        ([(5, 7), (0, 2)], [(0, 2), (5, 7)]),
        ([(0, 2), (2, 4), (3, 9)], [(0, 9)]),
        ([(0, 9), (3, 4), (9, 10)], [(0, 10)]),
    ],
)
def test_join(ranges: list[Range], joined: list[Range]) -> None:
    assert join(ranges) == joined


@pytest.mark.parametrize(
    ("known", "missing", "first_stored", "asked", "rejected", "newest", "expected"),
    [
        # asked for and not there: before the first bar, between bars, at the newest end
        ([], [(0, 4)], 4, [(0, 20)], [], 20, [gap(0, 4, "not_listed_yet")]),
        ([], [(5, 8)], 0, [(0, 20)], [], 20, [gap(5, 3, "exchange_outage")]),
        ([], [(18, 20)], 0, [(0, 20)], [], 20, [gap(18, 2, "not_yet_fetched")]),
        ([], [(18, 20)], 0, [(0, 20)], [], None, [gap(18, 2, "exchange_outage")]),
        ([], [(0, 20)], None, [(0, 20)], [], 20, [gap(0, 20, "not_yet_fetched")]),
        ([], [(0, 20)], None, [(0, 20)], [], 50, [gap(0, 20, "not_listed_yet")]),
        # nobody asked
        ([], [(5, 8)], 0, [], [], 20, [gap(5, 3, "not_yet_fetched")]),
        ([], [(5, 8)], 0, [(0, 6)], [], 20, [gap(5, 1, "exchange_outage"), gap(6, 2, "not_yet_fetched")]),
        # what was known stays, unless bars came, or it was asked for again
        ([gap(5, 3, "exchange_outage")], [(5, 8)], 0, [], [], 20, [gap(5, 3, "exchange_outage")]),
        ([gap(5, 3, "exchange_outage")], [(6, 8)], 0, [], [], 20, [gap(6, 2, "exchange_outage")]),
        ([gap(5, 3, "rejected_row", "bad")], [(5, 8)], 0, [], [], 20, [gap(5, 3, "rejected_row", "bad")]),
        ([gap(5, 3, "rejected_row", "bad")], [(5, 8)], 0, [(5, 8)], [], 20, [gap(5, 3, "exchange_outage")]),
        ([gap(5, 3, "not_yet_fetched")], [(5, 8)], 0, [(5, 8)], [], 20, [gap(5, 3, "exchange_outage")]),
        ([gap(4, 3, "not_listed_yet")], [(4, 7)], 0, [], [], 20, [gap(4, 3, "exchange_outage")]),
        ([gap(4, 3, "flat_run")], [], 0, [], [], 20, []),
        # rejected rows, alone and inside an outage; a row that is stored all the same is no gap
        ([], [(5, 8)], 0, [(0, 20)], [((6, 7), "bad")], 20,
         [gap(5, 1, "exchange_outage"), gap(6, 1, "rejected_row", "bad"), gap(7, 1, "exchange_outage")]),
        ([], [(19, 20)], 0, [(0, 20)], [((19, 20), "bad")], 20, [gap(19, 1, "rejected_row", "bad")]),
        ([], [], 0, [(0, 20)], [((6, 7), "bad")], 20, []),
    ],
)  # fmt: skip
def test_classify(
    known: list[CandleGap],
    missing: list[Range],
    first_stored: int | None,
    asked: list[Range],
    rejected: list[tuple[Range, str]],
    newest: int | None,
    expected: list[CandleGap],
) -> None:
    evidence = Evidence(
        missing=ms(*missing),
        first_stored_ms=None if first_stored is None else first_stored * STEP,
        asked=ms(*asked),
        rejected=[(ms(stretch)[0], reason) for stretch, reason in rejected],
        flat_runs=[],
        newest_ms=None if newest is None else newest * STEP,
    )
    gaps = classify("A", STEP, known, evidence)
    assert gaps == expected
    assert classify("A", STEP, gaps, evidence) == gaps, "the second run writes the same"


def runs(bars: Sequence[bool]) -> list[Range]:
    """The stretches of True, in bars."""
    return join([(bar, bar + 1) for bar, here in enumerate(bars) if here])


BARS = st.lists(st.booleans(), min_size=16, max_size=16)


@given(stored=BARS, asked=BARS, rejected=BARS, asked_again=BARS)
def test_classify_every_missing_bar_has_one_cause_and_no_stored_one(
    stored: list[bool], asked: list[bool], rejected: list[bool], asked_again: list[bool]
) -> None:
    first_stored = stored.index(True) if any(stored) else None
    missing = runs([not here for here in stored])
    newest = len(stored)
    gaps: list[CandleGap] = []
    cause: list[str | None] = [None] * len(stored)
    for question in (asked, asked_again):
        evidence = Evidence(
            ms(*missing),
            None if first_stored is None else first_stored * STEP,
            ms(*runs(question)),
            [(ms(part)[0], "bad") for part in runs([a and b for a, b in zip(question, rejected, strict=True)])],
            [],
            newest * STEP,
        )
        gaps = classify("A", STEP, gaps, evidence)
        tail = next((bar for bar in range(newest, 0, -1) if stored[bar - 1]), 0)
        for bar, here in enumerate(stored):
            if here:
                cause[bar] = None
            elif question[bar] and rejected[bar]:
                cause[bar] = "rejected_row"
            elif question[bar]:
                late, early = bar >= tail, first_stored is None or bar < first_stored
                cause[bar] = "not_yet_fetched" if late else "not_listed_yet" if early else "exchange_outage"
            else:
                cause[bar] = cause[bar] or "not_yet_fetched"
    told: list[str | None] = [None] * len(stored)
    for each in gaps:
        for bar in range(*(time // STEP for time in range_of(each, STEP))):
            assert told[bar] is None
            told[bar] = each.cause
    if not any(rejected[tail:]):
        assert told == cause

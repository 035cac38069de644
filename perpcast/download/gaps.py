"""Stretches of time, and why bars are missing in them."""

from collections.abc import Sequence
from dataclasses import dataclass

from perpcast.database import CandleGap

Range = tuple[int, int]  # [first, end) in milliseconds

# Bars that are missing for one of these causes are not asked for again, but by `--verify`.
SETTLED = ("not_listed_yet", "exchange_outage", "rejected_row")


@dataclass(frozen=True)
class Evidence:
    """What is known of one symbol after a run; all ranges sorted, on the grid of the interval.

    `missing` holds no bar; `asked` was answered by the exchange in this run; `rejected` are rows that broke the rules.
    A missing stretch that ends at `newest_ms` may only be late.
    """

    missing: Sequence[Range]
    first_stored_ms: int | None
    asked: Sequence[Range]
    rejected: Sequence[tuple[Range, str]]
    flat_runs: Sequence[Range]
    newest_ms: int | None


def classify(symbol: str, step_ms: int, known: Sequence[CandleGap], evidence: Evidence) -> list[CandleGap]:
    """Every missing or uncounted stretch with its cause, by time; what this run did not ask keeps the cause it had."""
    rest = list(evidence.missing)
    causes: list[tuple[Range, str, str | None]] = []

    def explain(stretches: Sequence[Range], cause: str, reason: str | None = None) -> None:
        nonlocal rest
        causes.extend((part, cause, reason) for part in intersect(rest, stretches))
        rest = subtract(rest, stretches)

    for stretch, reason in evidence.rejected:
        explain([stretch], "rejected_row", reason)
    late = [part for part in rest if part[1] == evidence.newest_ms]
    explain(intersect(evidence.asked, late), "not_yet_fetched")
    before = _before_listing(evidence)
    explain(intersect(evidence.asked, before), "not_listed_yet")
    explain(evidence.asked, "exchange_outage")
    for gap in known:
        stretch = range_of(gap, step_ms)
        if gap.cause in ("not_listed_yet", "exchange_outage"):  # an older bar may have come to light since
            explain(intersect([stretch], before), "not_listed_yet")
            explain([stretch], "exchange_outage")
        elif gap.cause == "rejected_row":
            explain([stretch], gap.cause, gap.reason)
    explain(list(rest), "not_yet_fetched")
    causes += [(stretch, "flat_run", None) for stretch in evidence.flat_runs]
    return _merged(symbol, step_ms, sorted(causes))


def _before_listing(evidence: Evidence) -> list[Range]:
    """Where the symbol did not trade yet: all that is missing before the first bar that is stored."""
    first_ms = evidence.first_stored_ms
    return [part for part in evidence.missing if first_ms is None or part[0] < first_ms]


def _merged(symbol: str, step_ms: int, causes: Sequence[tuple[Range, str, str | None]]) -> list[CandleGap]:
    """Neighbours of one cause and reason become one."""
    gaps: list[CandleGap] = []
    end_ms = None
    for (first, end), cause, reason in causes:
        last = gaps[-1] if gaps else None
        if last is not None and end_ms == first and (last.cause, last.reason) == (cause, reason):
            gaps[-1] = CandleGap(symbol, last.first_missing_ms, (end - last.first_missing_ms) // step_ms, cause, reason)
        else:
            gaps.append(CandleGap(symbol, first, (end - first) // step_ms, cause, reason))
        end_ms = end
    return gaps


def range_of(gap: CandleGap, step_ms: int) -> Range:
    """The stretch of a recorded gap."""
    return gap.first_missing_ms, gap.first_missing_ms + gap.bars * step_ms


def subtract(ranges: Sequence[Range], holes: Sequence[Range]) -> list[Range]:
    """What is left of `ranges` outside of `holes`; both sorted by their first ends."""
    rest = []
    for first, end in ranges:
        for hole_first, hole_end in holes:
            if hole_first < end and hole_end > first:
                if hole_first > first:
                    rest.append((first, hole_first))
                first = max(first, hole_end)
        if first < end:
            rest.append((first, end))
    return rest


def intersect(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """What `ranges` and `others` have in common; both sorted by their first ends."""
    return subtract(ranges, subtract(ranges, others))


def join(ranges: Sequence[Range]) -> list[Range]:
    """The same stretches, sorted, overlapping and touching ones as one."""
    joined: list[Range] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((first, end))
    return joined

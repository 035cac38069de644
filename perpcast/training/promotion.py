"""Which model may become champion: the evidence it needs, the rule that judges it, and the step itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from perpcast.database import (
    Database,
    EventRecord,
    promote_model,
    promotions_on,
    read_champion,
    read_model,
    record_look,
    record_refusal,
)
from perpcast.errors import PerpcastError
from perpcast.evaluation.scores import Score
from perpcast.evaluation.splits import Span
from perpcast.timeframe import format_time


class PromotionRefusedError(PerpcastError):
    """A model lacks what a champion needs; `unmet` names each condition."""

    def __init__(self, model_id: str, unmet: Sequence[str]) -> None:
        lines = "".join(f"\n  - {condition}" for condition in unmet)
        super().__init__(f"{model_id} is not promoted, it lacks {len(unmet)} of what a champion needs:{lines}")
        self.unmet = tuple(unmet)


@dataclass(frozen=True)
class Comparison:
    """Two forecasts traded on the same signal bars, by the same policy, sizes and limits.

    `gain` is the candidate's daily net return minus the other's, its mean over the days and the 95 % interval of the
    paired bootstrap, fractions; NaN where the days are too few. `trained_until_ms` is the last bar that anything of
    either was made of: training, calibration and threshold with the bars that their labels reach.
    """

    against: str  # a baseline's name, or a model's id
    gain: Score
    span: Span  # of the signal bars
    trained_until_ms: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, for the event."""
        return {
            "against": self.against,
            "gain": self.gain.to_json(),
            "first_ms": self.span.first_ms,
            "last_ms": self.span.last_ms,
            "trained_until_ms": self.trained_until_ms,
        }


@dataclass(frozen=True)
class Evidence:
    """What is known about a candidate. `test_span` is its dataset's, whole; each comparison has its own part of it."""

    certificate_passed: bool
    certificate_detail: str  # what failed or is missing, and what to do; "" where it passed
    test_span: Span
    gain_over_best_baseline: Comparison
    gain_over_champion: Comparison | None  # None where its kind of task has no champion

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, for the event."""
        champion = self.gain_over_champion
        return {
            "certificate_passed": self.certificate_passed,
            "certificate_detail": self.certificate_detail,
            "gain_over_best_baseline": self.gain_over_best_baseline.to_json(),
            "gain_over_champion": champion and champion.to_json(),
        }


def promote(database: Database, model_id: str, evidence: Evidence, *, force: bool = False, now: datetime) -> str | None:
    """Makes a model the champion of its kind of task where the evidence suffices; returns the champion before it.

    The evidence is a look at the test span, and is counted as one. `force` allows a test span that promoted before, and
    nothing else. Raises PromotionRefusedError, MissingInputError where there is no such model, and PerpcastError where
    another command changed the champion meanwhile.
    """
    model, span = read_model(database, model_id), evidence.test_span
    champion = read_champion(database, model.task_kind)
    champion_id = champion.model_id if champion else None
    used = promotions_on(database, span.first_ms, span.last_ms)
    unmet = unmet_conditions(evidence, champion_id, () if force else used)
    record_look(database, model.dataset_fingerprint, span.first_ms, span.last_ms, model_id, "promotion", now)
    if unmet:
        record_refusal(database, model_id, unmet, evidence.to_json(), now)
        raise PromotionRefusedError(model_id, unmet)
    promote_model(
        database,
        model_id,
        over=champion_id,
        first_ms=span.first_ms,
        last_ms=span.last_ms,
        evidence={**evidence.to_json(), "forced": force and bool(used)},
        now=now,
    )
    return champion_id


def unmet_conditions(evidence: Evidence, champion_id: str | None, used: Sequence[EventRecord]) -> tuple[str, ...]:
    """What a candidate lacks, a sentence each; none where it may be promoted.

    `used` are the promotions that its test span already decided: who chooses again on the same bars, chooses by luck.
    """
    unmet = []
    if not evidence.certificate_passed:
        unmet.append(f"a leak certificate that passes: {evidence.certificate_detail}")
    unmet += _unmet_gain("best baseline", evidence.gain_over_best_baseline)
    compared = evidence.gain_over_champion
    if champion_id is not None and (compared is None or compared.against != champion_id):
        unmet.append(f"a comparison with the champion {champion_id}; run the same command again")
    elif compared is not None:
        unmet += _unmet_gain("champion", compared)
    unmet += [
        f"a test span of its own: {format_time(event.detail['first_ms'])} to {format_time(event.detail['last_ms'])} "
        f"promoted {event.detail['model_id']} on {event.time:%Y-%m-%d}; --force promotes on it again"
        for event in used
    ]
    return tuple(unmet)


def _unmet_gain(title: str, compared: Comparison) -> list[str]:
    gain, against, unmet = compared.gain, f"{title} {compared.against}", []
    if compared.span.first_ms <= compared.trained_until_ms:
        unmet.append(
            f"windows after the training of both, candidate and {against}: expected the first one after "
            f"{format_time(compared.trained_until_ms)}, received {format_time(compared.span.first_ms)}; "
            "train on newer candles"
        )
    if not gain.lower > 0:  # NaN too
        bound = f"received {gain.lower:+.4%} (mean {gain.value:+.4%}, upper bound {gain.upper:+.4%})"
        found = bound if gain.lower == gain.lower else "received none: too few days"
        unmet.append(f"a daily net return above that of the {against}: expected a lower 95 % bound above 0, {found}")
    return unmet

"""The card of a model: where it comes from, how it scored, how fast it is; for a program, and for a reader."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from perpcast.config import ModelSettings
from perpcast.evaluation.certificate import Certificate
from perpcast.evaluation.scores import METRICS, PROFIT_METRICS
from perpcast.training.dataset import Dataset
from perpcast.training.outcome import Outcome

if TYPE_CHECKING:
    from perpcast.models.export import Exported


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from."""

    model_id: str
    code_revision: str | None
    created_at: datetime
    reproduce: str  # the command


def describe(
    provenance: Provenance,
    dataset: Dataset,
    settings: ModelSettings,
    outcome: Outcome,
    exported: "Exported",
    certificate: Certificate,
) -> dict[str, Any]:
    """The card as plain numbers and names."""
    return {
        "model_id": provenance.model_id,
        "created_at": provenance.created_at.isoformat(timespec="seconds"),
        "code_revision": provenance.code_revision,
        "dataset": {"id": dataset.dataset_id, "fingerprint": dataset.fingerprint, "split": dataset.split.to_json()},
        "universe_as_of": dataset.manifest["universe_as_of"],
        "leak_certificate": certificate.to_json(),
        "settings": settings.model_dump(mode="json"),
        "evaluation": outcome.evaluation.to_json(),
        "threshold": outcome.choice.to_json(),
        "thresholds_of_baselines": dict(outcome.thresholds),
        "onnx_difference": exported.difference,
        "latency": exported.latency.to_json(),
        "reproduce": provenance.reproduce,
    }


def card_text(card: Mapping[str, Any], dataset: Dataset, outcome: Outcome, exported: "Exported") -> str:
    """The card for a reader, in Markdown."""
    parts = [
        f"# {card['model_id']}",
        outcome.evaluation.verdict.sentence,
        f"Trained {card['created_at']} on dataset {dataset.dataset_id} of {len(dataset.task.symbols)} symbols "
        f"(survivor-biased: chosen on {card['universe_as_of']}). "
        f"{_certified(Certificate.from_json(card['leak_certificate']))}",
        _table([["test span", *(each.name for each in outcome.evaluation.cards)], *score_rows(outcome)]),
    ]
    if outcome.evaluation.profits:
        parts.append(_table([profit_titles(outcome), *profit_rows(outcome)]))
    parts += [
        f"Threshold {outcome.choice.threshold:+.4%}, chosen on V2. Reproduce: `{card['reproduce']}`",
        f"Milliseconds of one prediction on the machine of the training; the exported network differs from Keras by at "
        f"most {exported.difference:.1g}:",
        _table(exported.latency.rows()),
        "    " + "\n    ".join(dataset.split.instants()),
    ]
    return "\n\n".join(parts) + "\n"


def score_rows(outcome: Outcome) -> list[list[str]]:
    """A row for each metric: its name, the model, the baselines."""
    rows = []
    for metric, (title, percent) in METRICS.items():
        values = [each.scores[metric].value for each in outcome.evaluation.cards]
        form = "{:,.0f}" if metric == "trades" else "{:+.2%}" if percent else "{:+.3f}"
        rows.append([title, *(_number(value, form) for value in values)])
    return rows


def profit_titles(outcome: Outcome) -> list[str]:
    """What the columns of `profit_rows` are called."""
    return ["probability of profit", "model", "base rate", *outcome.thresholds]


def profit_rows(outcome: Outcome) -> list[list[str]]:
    """A row for each score of the probabilities: side and name, the model, the training base rate, the baselines."""
    rows = []
    for side, found in outcome.evaluation.profits.items():
        for name, title in PROFIT_METRICS.items():
            scores = (found.scores, found.base, *(found.baselines[each] for each in outcome.thresholds))
            rows.append([f"{side}: {title}", *(_number(each[name], "{:.3f}") for each in scores)])
    return rows


def _certified(certificate: Certificate) -> str:
    """The certificate in a sentence, and how the model's rank IC compares with what shifted labels reach."""
    state = "passed" if certificate.passed else "failed"
    text = f"Leak certificate: {state}, {len(certificate.checks)} checks"
    exceeded, shifts = certificate.null.exceeded, len(certificate.null.rank_ic)
    if exceeded is None or not shifts:
        return f"{text}."
    return f"{text}; the rank IC by day is above that of {exceeded} of {shifts} nulls (labels shifted in time)."


def _number(value: float, form: str) -> str:
    return form.format(value) if np.isfinite(value) else "-"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as Markdown, the first one as its titles."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])

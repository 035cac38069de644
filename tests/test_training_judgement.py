"""Models on a real database, from stored predictions to an account and a champion: one that knows the labels, and one
that knows nothing."""

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import yaml

from perpcast.bundle import BundleParts, save_bundle
from perpcast.config import Settings, load_settings
from perpcast.database import (
    Database,
    ModelRecord,
    read_events,
    read_model,
    replace_predictions,
    upsert_candles,
    upsert_instruments,
    upsert_model,
)
from perpcast.evaluation import baselines
from perpcast.evaluation.threshold import choose_threshold
from perpcast.exit_policy import ExitPolicy
from perpcast.market import SIDES, Instrument
from perpcast.outputs import OutputReading, ReturnReading
from perpcast.prepare import prepare
from perpcast.training.dataset import Dataset, build_dataset, regression_task
from perpcast.training.judgement import gather_evidence, judge_model
from perpcast.training.outcome import JUDGED
from perpcast.training.promotion import PromotionRefusedError, promote
from tests.live_bundle import LinearNetwork, certificate
from tests.test_training_dataset import walk

ROOT = Path(__file__).parents[1]
SYMBOLS = ("AAAUSDT", "BBBUSDT", "CCCUSDT")
DAYS, LOOKBACK, HORIZON = 120, 12, 20
NOW = datetime(2025, 1, 1, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    values["model"].update(sequence_length=LOOKBACK, prediction_horizon=HORIZON)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_settings([path])


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the boosted trees are worth is not asked here."""
    monkeypatch.setattr(baselines, "BOOSTED_TREES", 3)
    monkeypatch.setitem(baselines._GROWTH, "max_iter", 3)


@pytest.fixture
def dataset(database: Database, settings: Settings) -> Dataset:
    """Three random walks of four months, of which the last 18 days are the test span."""
    policies = {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, HORIZON) for side in SIDES}
    for seed, symbol in enumerate(SYMBOLS, 1):
        upsert_candles(database, symbol, walk(DAYS * 96, seed))
    upsert_instruments(database, [instrument(symbol) for symbol in SYMBOLS], NOW)
    prepare(database, SYMBOLS, "15", policies)
    task = regression_task("15", LOOKBACK, HORIZON, SYMBOLS, policies)
    folder = settings.path("datasets")
    return build_dataset(database, task, folder, (0.7, 0.075, 0.075, 0.15), universe_as_of="2025-01-01")


def instrument(symbol: str) -> Instrument:
    tick, step = Decimal("0.0001"), Decimal("0.001")
    return Instrument(symbol, "Trading", tick, step, step, Decimal(5), Decimal(50), 0, 480)


def add_model(
    database: Database, settings: Settings, dataset: Dataset, model_id: str, skill: float, certified: bool = True
) -> None:
    """A model whose predictions are `skill` of the labels, the rest noise of their size; stored, with a bundle."""
    rng = np.random.default_rng(5)
    rows = np.concatenate([dataset.index[split] for split in JUDGED])
    labels = dataset.expected_return[rows]
    noise = labels.std() * rng.normal(size=labels.shape)
    means = skill * labels + (1 - skill) * noise
    outputs = {f"{side}_mean": means[:, n] for n, side in enumerate(SIDES)}
    outputs |= {name: means[:, 0] for name in dataset.task.outputs if name not in outputs}
    for code, symbol in enumerate(SYMBOLS):
        own = dataset.symbol[rows] == code
        times = dataset.open_time_ms[rows[own]]
        replace_predictions(database, model_id, symbol, times, {name: out[own] for name, out in outputs.items()})
    v2: dict[str, np.ndarray] = {
        side: means[: len(dataset.index["v2"]), n].astype(np.float32) for n, side in enumerate(SIDES)
    }
    bundle = save_bundle(settings.path("trained_model", model_id), parts(dataset, threshold(dataset, v2), certified))
    upsert_model(
        database,
        ModelRecord(
            model_id=model_id,
            created_at=NOW,
            task=dataset.task.to_json(),
            architecture="by hand",
            parameters={},
            dataset_id=dataset.dataset_id,
            dataset_fingerprint=dataset.fingerprint,
            metrics={},
            baselines={},
            bundle_path=f"trained_model/{model_id}",
            bundle_sha256=bundle.sha256,
        ),
    )


def threshold(dataset: Dataset, predicted: dict[str, np.ndarray]) -> float:
    return choose_threshold(predicted, dataset.windows("v2")).threshold


def parts(dataset: Dataset, chosen: float, certified: bool) -> BundleParts:
    """A bundle that expects nothing of any window, with a certificate or without one."""
    task = dataset.task
    columns = (*task.observed, *task.known)
    shape = len(columns), len(task.outputs)
    network = LinearNetwork(
        len(task.observed), len(task.known), np.zeros(shape), np.eye(LOOKBACK)[-1], np.zeros(shape[1])
    )
    own = replace(certificate(), fingerprint=dataset.fingerprint).to_json()
    rows = dataset.index["test"][:2]
    return BundleParts(
        model=network.model(),
        step=network.step(),
        readout=network.readout(),
        task=task,
        scaler=dataset.scaler,
        reading=OutputReading(task, (ReturnReading(0.0, 1.0), ReturnReading(0.0, 1.0))),
        threshold=chosen,
        card={
            "dataset": {"fingerprint": dataset.fingerprint, "split": dataset.split.to_json()},
            "leak_certificate": own if certified else None,
        },
        card_text="",
        golden=(*dataset.gather(rows), [SYMBOLS[code] for code in dataset.symbol[rows]]),
    )


def test_judged_model_is_traded_beside_its_baselines_and_every_look_is_counted(
    database: Database, settings: Settings, dataset: Dataset
) -> None:
    add_model(database, settings, dataset, "seer", skill=0.6)
    first = judge_model(settings, database, "seer", purpose="report", now=NOW)
    again = judge_model(settings, database, "seer", purpose="report", now=NOW)
    assert (first.looks, again.looks) == (1, 2)
    assert first.portfolio.sharpe.trials == 1
    # More tries: the same Sharpe ratio says less.
    assert again.portfolio.sharpe.deflated < first.portfolio.sharpe.deflated
    account = first.portfolio.model.performance
    assert account.trades > 30
    assert account.total_return > 0.05
    assert set(first.portfolio.baselines) == {"constant", "last sign", "ridge", "boosted trees"}
    assert all(account.total_return > line.performance.total_return for line in first.portfolio.baselines.values())
    event = read_events(database, "registry")[0]
    span = dataset.split.test
    assert (event.kind, event.detail["purpose"]) == ("test_span_looked_at", "report")
    assert (event.detail["first_ms"], event.detail["last_ms"]) == (span.first_ms, span.last_ms)


def test_candidates_with_and_without_what_a_champion_needs(
    database: Database, settings: Settings, dataset: Dataset
) -> None:
    add_model(database, settings, dataset, "guesser", skill=0.0)
    add_model(database, settings, dataset, "foreign", skill=0.6, certified=False)
    add_model(database, settings, dataset, "seer", skill=0.6)
    with pytest.raises(PromotionRefusedError, match="above that of the best baseline"):
        promote(database, "guesser", gather_evidence(settings, database, "guesser"), now=NOW)
    evidence = gather_evidence(settings, database, "foreign")
    assert not evidence.certificate_passed
    with pytest.raises(PromotionRefusedError, match="a leak certificate that passes"):
        promote(database, "foreign", evidence, now=NOW)
    evidence = gather_evidence(settings, database, "seer")
    judged = judge_model(settings, database, "seer", purpose="training", now=NOW)
    assert gather_evidence(settings, database, "seer", judged) == evidence
    assert evidence.gain_over_champion is None
    # Train, V1 and V2 end with 85 % of the labelled bars; what V2's labels reach is purged before the test span.
    compared = evidence.gain_over_best_baseline
    assert compared.trained_until_ms == dataset.split.v2.last_ms + (HORIZON + 1) * 900_000
    assert compared.trained_until_ms < compared.span.first_ms
    assert 0 < compared.gain.lower < compared.gain.value < compared.gain.upper
    assert promote(database, "seer", evidence, now=NOW) is None
    assert read_model(database, "seer").state == "champion"


def test_champion_is_held_against_on_the_same_windows_and_asked_what_it_never_said(
    database: Database, settings: Settings, dataset: Dataset
) -> None:
    add_model(database, settings, dataset, "first", skill=0.4)
    promote(database, "first", gather_evidence(settings, database, "first"), now=NOW)
    add_model(database, settings, dataset, "second", skill=0.8)
    evidence = gather_evidence(settings, database, "second")
    compared = evidence.gain_over_champion
    assert compared is not None
    assert compared.against == "first"
    assert compared.span == dataset.split.test
    assert compared.gain.value > 0
    # The same predictions earn the same: no gain at all.
    add_model(database, settings, dataset, "twin", skill=0.4)
    twin = gather_evidence(settings, database, "twin").gain_over_champion
    assert twin is not None
    assert twin.gain.value == 0
    # A champion whose words on two symbols are lost is asked again: its bundle expects nothing of any window.
    for symbol in SYMBOLS[1:]:
        replace_predictions(database, "first", symbol, np.empty(0, np.int64), {"buy_mean": np.empty(0)})
    asked = gather_evidence(settings, database, "twin").gain_over_champion
    assert asked is not None
    assert asked.gain.value != 0
    with pytest.raises(PromotionRefusedError, match="a test span of its own"):
        promote(database, "second", evidence, now=NOW)

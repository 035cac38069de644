"""The report page: whole in one file, its pictures beside it, its numbers as JSON, whatever the run had to show."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perpcast.evaluation.report import PaperSession, PaperTrade, RunReport, Stage, write_report
from perpcast.evaluation.scores import PROFIT_METRICS, ProfitScores
from perpcast.evaluation.threshold import choose_threshold
from perpcast.market import SIDES
from tests.test_evaluation_scores import scored


def report(forecast_scale: float = 0.005, edge: float = 0.5, paper: PaperSession | None = None) -> RunReport:
    evaluation = scored(edge, forecast_scale)
    windows = evaluation.windows
    mean: dict[str, np.ndarray] = {side: evaluation.predicted[f"{side}_mean"] for side in SIDES}
    choice = choose_threshold(
        mean, windows.realised, windows.bars_held, windows.symbol, windows.open_time_ms, windows.step_ms
    )
    return RunReport(
        title="A run",
        market="Synthetic market with a planted edge <5 %>",
        evaluation=evaluation,
        choice=choice,
        history={"loss": [1.0, 0.5], "val_loss": [0.9, 0.8]},
        stages=(Stage("Download", 1.25, 1000), Stage("Prepare", 0.0, skipped=True)),
        facts={"Model": "m1"},
        reproduce="make demo",
        paper=paper,
    )


def session() -> PaperSession:
    trade = PaperTrade("S1USDT", "buy", 0, 900_000, "take_profit", 0.021, 4.2)
    return PaperSession(np.arange(5) * 900_000, np.array([1e4, 1e4, 10_003.0, 9_999.0, 10_004.2]), 1e4, (trade,), 1)


def test_write_report_is_self_contained(tmp_path: Path) -> None:
    page = write_report(report(paper=session()), tmp_path).read_text()
    body = page[page.index("<body>") :]
    first = re.sub(r"<[^>]+>", "", body).strip().splitlines()[0]
    assert first == "Synthetic market with a planted edge &lt;5 %&gt;"
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert len(pictures) == page.count("<img ") == 8
    assert not list(tmp_path.glob("*.part"))
    assert "take profit" in page
    assert "done before" in page


def test_write_report_json_has_the_numbers_of_the_page(tmp_path: Path) -> None:
    run = report(paper=session())
    write_report(run, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["evaluation"]["verdict"]["sentence"] == run.evaluation.verdict.sentence
    assert data["paper"] == {"initial": 1e4, "final": 10_004.2, "trades": 1, "open_positions": 1}
    assert data["threshold"]["threshold"] == run.choice.threshold


def test_write_report_of_a_classifier_shows_what_it_promised_and_what_won(tmp_path: Path) -> None:
    tenth = {"count": 1200.0, "predicted": 0.314, "realised": 0.271}
    metrics = dict.fromkeys(PROFIT_METRICS, 0.5)
    found = ProfitScores({**metrics, "auc": 0.537}, 0.3, metrics, (tenth,))
    run = report()
    evaluation = replace(run.evaluation, profits={"buy": found, "sell": found})
    page = write_report(replace(run, evaluation=evaluation), tmp_path).read_text()
    assert page.count("<td>31.4 %</td><td>27.1 %</td><td>1,200</td>") == 2
    assert page.count("<td>0.537</td>") == 2


@pytest.mark.parametrize("paper", [None, PaperSession(np.empty(0, np.int64), np.empty(0), 1e4, ())])
def test_write_report_without_trades_or_paper_is_still_a_page(tmp_path: Path, paper: PaperSession | None) -> None:
    page = write_report(report(forecast_scale=0.0, edge=0.0, paper=paper), tmp_path).read_text()
    assert "not better than its baselines" in page
    assert "took no trade" in page
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page).lower()

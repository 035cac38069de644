"""The report page: whole in one file, its pictures beside it, its numbers as JSON, whatever the run had to show."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from perpcast.evaluation import report as page_of
from perpcast.evaluation.performance import drawdown
from perpcast.evaluation.portfolio import Portfolio
from perpcast.evaluation.report import Coverage, PaperSession, RunReport, write_report
from perpcast.evaluation.scores import PROFIT_METRICS, ProfitScores, Score, Verdict
from perpcast.timeframe import DAY_MS
from tests.report_world import MARKET, certificate, report, whole_report


@pytest.fixture(scope="module")
def run() -> RunReport:
    return whole_report()


@pytest.fixture(scope="module")
def folder(run: RunReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run, tmp_path_factory.mktemp("report")).parent


def text_of(page: str) -> str:
    """What a reader reads, white space made one."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page[page.index("<body>") :]))


def test_write_report_is_self_contained(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    assert not re.findall(r'(?:src|srcset|href)="(?!data:|#)', page)
    assert not re.findall(r"url\(|@import|<script", page)
    pictures = sorted(path.stem for path in folder.glob("*.png"))
    assert page.count("data:image/png;base64,") == len(pictures)
    assert set(re.findall(r'href="#(\w+)"', page)) == set(re.findall(r'id="(\w+)"', page))
    assert not list(folder.glob("*.part"))


def test_write_report_says_the_verdict_first_and_what_it_hangs_on(run: RunReport, folder: Path) -> None:
    page = (folder / "index.html").read_text()
    text = text_of(page)
    assert f'<section class="verdict {page_of.verdict_level(run)}">' in page
    assert run.portfolio is not None
    sentences = f"{run.evaluation.verdict.sentence} {page_of.money_sentence(run.portfolio)}".replace("\xa0", " ")
    assert text.startswith(f" Synthetic market with a planted edge &lt;5 %&gt; A run {sentences} Test span ")
    for said in (
        "Looked at 3 times, this one included.",
        "Survivor-biased: symbols chosen on 2025-06-28.",
        "Leak certificate: passed.",
        "what was found of planted future",
        "stops slide half-way",
        "adverse extreme first",
        "take profit",
        "expected 55 to 65 %",
        "The other 12 symbols",
        "make demo",
        "done before",
    ):
        assert said in text, said


def test_write_report_shows_every_account_with_its_numbers(run: RunReport, folder: Path) -> None:
    """In the table of accounts, and nowhere else, rows begin with these names and go on with the net return."""
    assert run.portfolio is not None
    found = run.portfolio
    text = text_of((folder / "index.html").read_text())
    lines = {"model": found.model, **found.baselines, "buy and hold": found.buy_and_hold, "always on": found.always_on}
    for name, line in lines.items():
        assert (
            f" {name} {page_of.percent_text(line.performance.total_return, signed=True)} ".replace("\xa0", " ") in text
        )
    for slippage, performance in found.slippage.items():
        said = f"slippage {slippage * 10_000:g} bp {page_of.percent_text(performance.total_return, signed=True)}"
        assert said.replace("\xa0", " ") in text


def test_write_report_json_has_the_numbers_of_the_page_and_of_its_pictures(run: RunReport, folder: Path) -> None:
    data = json.loads((folder / "report.json").read_text())
    assert run.portfolio is not None
    model = run.portfolio.model
    assert data["verdict"] == [run.evaluation.verdict.sentence, page_of.money_sentence(run.portfolio)]
    assert data["paper"] == {"initial": 1e4, "final": 10_004.2, "trades": 1, "open_positions": 1}
    assert data["threshold"]["threshold"] == run.choice.threshold
    assert data["certificate"]["checks"][0]["passed"] is True
    assert data["quality"]["COIN10USDT"] == {"bars": 1000, "missing": 100, "flat": 10, "share": 990 / 1100}
    assert data["explanation"]["importance"]["input_29"] == 30 / 465
    returns = data["series"]["net_return_by_day"]["model"]
    day = MARKET.open_time_ms // DAY_MS
    assert len(returns) == len(np.unique(day))
    assert list(returns.values())[-1] == pytest.approx(model.performance.total_return, abs=1e-12)
    depths = data["series"]["drawdown_by_day"]
    assert max(depths.values()) == model.performance.max_drawdown
    assert list(depths.values())[1] == drawdown(model.backtest.equity, 1e4)[day == day[0] + 1].max()
    trades = model.backtest.trades
    earned = data["series"]["earned_by_symbol"]
    assert earned.pop("unit") == "USDT"
    assert sum(cell for row in earned.values() for cell in row.values() if cell is not None) == pytest.approx(
        float((trades.pnl + trades.funding)[trades.closed].sum())
    )
    assert list(earned) == list(MARKET.symbols)


def test_write_report_of_a_classifier_shows_what_it_promised_and_what_won(tmp_path: Path) -> None:
    tenth = {"count": 1200.0, "predicted": 0.314, "realised": 0.271}
    metrics = dict.fromkeys(PROFIT_METRICS, 0.5)
    found = ProfitScores({**metrics, "auc": 0.537}, 0.3, metrics, (tenth,), {"ridge": {**metrics, "auc": 0.511}})
    run = report()
    evaluation = replace(run.evaluation, profits={"buy": found, "sell": found}, quantiles={})
    text = text_of(write_report(replace(run, evaluation=evaluation), tmp_path).read_text())
    assert "Sell: probability of profit model base rate ridge " in text
    assert text.count(" AUC 0.537 0.500 0.511 ") == 2
    assert (tmp_path / "profit_calibration.png").exists()
    assert not (tmp_path / "quantile_calibration.png").exists()


def test_write_report_of_a_failed_certificate_says_so(tmp_path: Path) -> None:
    text = text_of(write_report(replace(report(), certificate=certificate(passed=False)), tmp_path).read_text())
    assert "Leak certificate: failed." in text
    assert "threshold failed what was found of threshold" in text


@pytest.mark.parametrize("paper", [None, PaperSession(np.empty(0, np.int64), np.empty(0), 1e4, ())])
def test_write_report_without_trades_or_paper_is_still_a_page(tmp_path: Path, paper: PaperSession | None) -> None:
    """A forecast of nothing but losses takes no trade anywhere."""
    run = report(skill=0.0)
    page = write_report(replace(run, paper=paper), tmp_path).read_text()
    assert run.evaluation.verdict.sentence in page
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page).lower()


def moneyed(found: Portfolio, total: float, gain: Score, trades: int = 9) -> Portfolio:
    account = replace(found.model.performance, days=30, total_return=total, trades=trades, open_trades=0)
    best = replace(found.baselines["ridge"].performance, total_return=-0.0123)
    return replace(
        found,
        model=replace(found.model, performance=account),
        baselines={"ridge": replace(found.baselines["ridge"], performance=best)},
        best_baseline="ridge",
        gains={"ridge": gain, "best": gain},
    )


@pytest.mark.parametrize(
    ("total", "gain", "said"),
    [
        (0.031, Score(0.001, 0.0002, 0.002), "it made 3.1 % after fees, slippage and funding: clearly more than"),
        (-0.031, Score(0.001, -0.0002, 0.002), "it lost 3.1 % after fees, slippage and funding: not clearly"),
        (-0.2, Score(-0.01, -0.02, -0.001), "it lost 20.0 % after fees, slippage and funding: clearly less than"),
        (0.0, Score(0.0), "too few days to compare it with"),
    ],
)  # fmt: skip
def test_money_sentence_says_no_more_than_the_interval(run: RunReport, total: float, gain: Score, said: str) -> None:
    assert run.portfolio is not None
    sentence = page_of.money_sentence(moneyed(run.portfolio, total, gain)).replace("\xa0", " ")
    assert sentence.startswith("Traded for 30 days, ")
    assert said in sentence
    assert sentence.endswith("its best baseline (ridge, \N{MINUS SIGN}1.2 %).")


@pytest.mark.parametrize(
    ("found", "gain", "level"),
    [("better", 0.001, "better"), ("better", -0.001, "ranks"), ("ranks", 0.001, "ranks"), ("none", 0.001, "none")],
)
def test_the_verdict_is_green_only_where_the_account_shows_the_edge(
    run: RunReport, found: Literal["better", "ranks", "none"], gain: float, level: str
) -> None:
    assert run.portfolio is not None
    evaluation = replace(run.evaluation, verdict=Verdict(found, "A sentence."))
    portfolio = moneyed(run.portfolio, 0.1, Score(0.01, gain, 0.02))
    assert page_of.verdict_level(replace(run, evaluation=evaluation, portfolio=portfolio)) == level


def test_money_sentence_without_a_trade(run: RunReport) -> None:
    assert run.portfolio is not None
    sentence = page_of.money_sentence(moneyed(run.portfolio, 0.0, Score(0.0), trades=0))
    assert sentence == "Traded for 30 days, it took no trade."


@pytest.mark.parametrize(
    ("value", "digits", "signed", "text"),
    [
        (0.1234, 1, False, "12.3"),
        (-0.1234, 1, True, "\N{MINUS SIGN}12.3"),
        (-0.0001, 1, True, "0.0"),
        (0.0, 2, True, "0.00"),
        (12.3, 0, True, "+1,230"),
    ],
)
def test_percent_text(value: float, digits: int, signed: bool, text: str) -> None:
    assert page_of.percent_text(value, digits, signed) == f"{text}\N{NO-BREAK SPACE}%"


def test_no_chance_is_certain() -> None:
    assert page_of.chance_text(0.9999).startswith("over 99")
    assert page_of.chance_text(0.0).startswith("under 1")
    assert page_of.chance_text(0.5).startswith("50")
    assert page_of.chance_text(np.nan) == "\N{EN DASH}"


def test_what_is_not_defined_is_a_dash() -> None:
    assert page_of.percent_text(np.nan) == page_of.number_text(np.inf) == "\N{EN DASH}"
    assert page_of.range_text(Score(0.1)) == ""
    assert page_of.range_text(Score(0.1, -0.2, 0.4)).replace("\xa0", " ") == "\N{MINUS SIGN}20.0 to +40.0 %"


@pytest.mark.parametrize(("bars", "missing", "flat", "share"), [(90, 10, 9, 0.81), (0, 0, 0, 0.0), (5, 0, 0, 1.0)])
def test_coverage_is_the_share_of_bars_that_can_be_used(bars: int, missing: int, flat: int, share: float) -> None:
    """(90 - 9) / (90 + 10) = 0.81"""
    assert Coverage(bars, missing, flat).share == share

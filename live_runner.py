"""Trades a model on closed bars: python live_runner.py --mode paper

Reads config.yaml (exchange, data_download, risk_profile, fees, capital), a model that the database names, and candles
from the exchange's WebSocket, with its REST interface behind. Writes the journal: `signals`, `positions`, `equity`,
`events`. No orders are sent. Killed at any instant and run again, a session goes on where it stood.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from rich.table import Table

from perpcast.bundle import Bundle, load_bundle, read_card
from perpcast.command_line import console, notice, open_database, progress_bar, stage
from perpcast.config import Settings
from perpcast.database import Database, ModelRecord, read_models
from perpcast.errors import ConfigError, MissingInputError, SetupError
from perpcast.evaluation.certificate import check_certificate
from perpcast.exchange import BybitClient, CandleStream, Hosts, hosts_of
from perpcast.exit_policy import ExitPolicy
from perpcast.live.feed import BarFeed
from perpcast.live.forecast import bundle_forecaster, check_model, history_bars
from perpcast.live.history import CandleHistory
from perpcast.live.journal import DatabaseJournal, SessionJournal, choose_session
from perpcast.live.session import run_session
from perpcast.live.summary import SessionSummary, summarize
from perpcast.live.trader import BarSummary, Rules, Trader
from perpcast.market import SIDES, Instrument, Side
from perpcast.sizing import Sizing
from perpcast.timeframe import floor_ms, format_time, interval_ms

MODES = ("replay", "paper", "demo", "testnet", "live")
# Bars whose features are computed together where they come faster than one at a time.
BLOCK_BARS = 32
REPLAY_IDLE_SECONDS = 2.0  # a replay that is silent so long has lost its stream, or is over


@click.command()
@click.option("--mode", type=click.Choice(MODES), required=True, help="replay: history on the local exchange, fast.")
@click.option("--bars", type=click.IntRange(min=1), help="Stop after so many bars [replay: demo.replay_bars].")
@click.option("--model", "model_id", help="Id of the model [default: the champion, else the newest].")
@stage
def main(settings: Settings, mode: str, bars: int | None, model_id: str | None) -> None:
    """Trade a model on paper: positions are kept from closed bars by the exit policy, no orders are sent.

    \b
    Examples:
      python live_runner.py --mode paper
      python live_runner.py --mode paper --bars 96
      python live_runner.py --mode replay --config config.yaml --config config.local.yaml
    """
    local = settings.exchange.environment == "local"
    if mode not in ("replay", "paper"):
        raise SetupError(f"--mode {mode} comes later: nothing sends orders yet; use --mode paper")
    if mode == "replay" and not local:
        raise SetupError(
            f"--mode replay needs the local exchange, exchange.environment is {settings.exchange.environment}; "
            "start one with python -m perpcast.simulator, or use --mode paper"
        )
    if mode == "replay" and bars is None:
        bars = settings.demo.replay_bars
    begun = time.monotonic()
    with open_database(settings) as database:
        plan = make_plan(settings, database, mode, bars, model_id)
        run = asyncio.run(trade(settings, plan, DatabaseJournal(database)))
        report(settings, plan, run, DatabaseJournal(database), time.monotonic() - begun)


@dataclass(frozen=True)
class Plan:
    """What a session trades, and by which rules; all but the exchange's present state."""

    mode: str
    bars: int | None
    model_id: str
    bundle: Bundle
    hosts: Hosts
    symbols: tuple[str, ...]
    step_ms: int
    rules: Rules
    terms: Mapping[str, Any]  # what the session's results depend on, as JSON

    @property
    def prefix(self) -> str:
        """The first part of the session's name; paper on one exchange is never continued on another."""
        return f"{self.mode}-{self.terms['environment']}-{self.model_id}"


def make_plan(settings: Settings, database: Database, mode: str, bars: int | None, model_id: str | None) -> Plan:
    """Loads the model and holds it against the configuration."""
    hosts = hosts_of(settings.exchange.environment, settings.exchange.rest_url, settings.exchange.ws_url)
    model = choose_model(read_models(database), model_id)
    folder = settings.path(model.bundle_path)
    bundle = load_bundle(folder)
    check_certificate(read_card(folder), f"model {model.model_id}")
    horizon, interval = settings.model.prediction_horizon, settings.data_download.interval
    policies: dict[Side, ExitPolicy] = {
        side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, horizon) for side in SIDES
    }
    check_model(bundle, interval, policies)
    symbols = tuple(symbol for symbol in settings.data_download.symbols if symbol in bundle.task.symbols)
    if not symbols:
        raise ConfigError(f"model {model.model_id} knows none of data_download.symbols: train again with them")
    strangers = sorted(set(settings.data_download.symbols) - set(symbols))
    if strangers:
        console.print(f"not traded, unknown to the model: {', '.join(strangers)}")
    capital, leverage = settings.capital, settings.risk_profile.leverage
    fractions = [fraction for _, fraction in policies["buy"].targets]
    rules = Rules(
        source=model.model_id,
        threshold=bundle.threshold,
        policies=policies,
        sizing=Sizing.from_config(capital.per_trade_percentage, leverage, fractions),
        max_positions=capital.max_positions,
        max_drawdown=capital.max_drawdown_percentage / 100,
    )
    step_ms = interval_ms(interval)
    terms = {
        "mode": mode,
        "environment": settings.exchange.environment,
        "model_id": model.model_id,
        "bundle_sha256": bundle.sha256,
        "threshold": bundle.threshold,
        "symbols": list(symbols),
        "step_ms": step_ms,
        "policies": {side: policy.to_json() for side, policy in policies.items()},
        "leverage": leverage,
        "capital": capital.model_dump(),
    }
    return Plan(mode, bars, model.model_id, bundle, hosts, symbols, step_ms, rules, terms)


def choose_model(models: list[ModelRecord], model_id: str | None) -> ModelRecord:
    """The model of that id; without one the champion, else the newest that is not retired."""
    if model_id is not None:
        models = [model for model in models if model.model_id == model_id]
        if not models:
            raise MissingInputError(f"no model {model_id} in model_metadata; leave --model out to take the newest")
    champions = [model for model in models if model.state == "champion"]
    usable = champions or [model for model in models if model.state != "retired" or model_id is not None]
    if not usable:
        raise MissingInputError("no model trained yet; run: python train_universal_transformer.py --task regression")
    return usable[0]


async def trade(settings: Settings, plan: Plan, journal: DatabaseJournal) -> str:
    """Runs the session to its end; returns its name."""
    jitter = np.random.default_rng()
    interval = settings.data_download.interval
    async with BybitClient(plan.hosts.rest_url, jitter=jitter, on_notice=notice) as client:
        now_ms = floor_ms(await client.fetch_server_time_ms(), plan.step_ms)
        instruments = listed(await client.fetch_instruments(), plan.symbols)
        run = choose_session(journal, plan.prefix, plan.terms, now_ms, plan.bars)
        session = SessionJournal(journal, run)
        state = session.begin(now_ms, settings.capital.initial, plan.terms)
        history = CandleHistory(plan.symbols, plan.step_ms, history_bars(plan.bundle), BLOCK_BARS)
        forecaster = bundle_forecaster(plan.bundle, settings.dataset.max_gap_bars)
        trader = Trader(plan.rules, instruments, forecaster, history, session, state, plan.step_ms)
        stream = CandleStream(plan.hosts.ws_url, plan.symbols, interval, jitter=jitter)
        feed = BarFeed(
            plan.symbols,
            plan.step_ms,
            stream=stream,
            fetch=lambda symbol, first_ms, end_ms: client.fetch_candle_series(symbol, interval, first_ms, end_ms),
            exchange_time_ms=client.fetch_server_time_ms,
            history_ms=history.start_ms(state.next_ms),
            first_ms=state.next_ms,
            last_ms=None if plan.bars is None else state.first_ms + (plan.bars - 1) * plan.step_ms,
            block_bars=BLOCK_BARS,
            **({"idle_seconds": REPLAY_IDLE_SECONDS} if plan.mode == "replay" else {}),
        )
        verb = "begins" if state.next_ms == state.first_ms else "goes on"
        console.print(f"session {run} {verb} with bar {format_time(state.next_ms)} UTC, {len(plan.symbols)} symbols")
        done = (state.next_ms - state.first_ms) // plan.step_ms
        # A market that runs faster than the wall cannot be entered in time by the wall: its bars never expire.
        clock = None if settings.exchange.environment == "local" else client.fetch_server_time_ms
        with progress_bar("bars") if plan.bars else nullcontext() as on_progress:
            on_bar = watcher(on_progress, done, plan.bars)
            await run_session(feed, trader, plan.step_ms, on_bar, exchange_time_ms=clock)
    return run


def listed(instruments: Mapping[str, Instrument], symbols: tuple[str, ...]) -> dict[str, Instrument]:
    """The instruments of `symbols`. Raises ConfigError for one that the exchange does not list."""
    unknown = [symbol for symbol in symbols if symbol not in instruments]
    if unknown:
        raise ConfigError(
            f"data_download.symbols: {', '.join(unknown)} not listed by the exchange as a USDT perpetual that trades; "
            "remove it from the configuration"
        )
    return {symbol: instruments[symbol] for symbol in symbols}


def watcher(
    on_progress: Callable[[int, int], None] | None, done: int, bars: int | None
) -> Callable[[BarSummary], None]:
    """Shows each bar: in the progress bar where the end is known, else as a line."""
    count = done

    def on_bar(bar: BarSummary) -> None:
        nonlocal count
        count += 1
        if on_progress is not None and bars is not None:
            on_progress(count, bars)
            return
        console.print(
            f"{format_time(bar.open_time_ms)} UTC  {bar.predicted} predicted, {bar.entries} entries, "
            f"{bar.exits} exits, {bar.open_positions} open, equity {bar.equity:,.2f} USDT"
        )

    return on_bar


def report(settings: Settings, plan: Plan, run: str, journal: DatabaseJournal, seconds: float) -> None:
    """The session in a table, and where to look further."""
    initial = settings.capital.initial
    summary = summarize(initial, journal.read_positions(run), journal.read_equity(run))
    if plan.bars is not None and summary.bars < plan.bars:
        console.print(f"the market was over after {summary.bars:,} of {plan.bars:,} bars")
    table = Table(title=f"Paper session {run}", show_header=False)
    for name, value in summary_rows(summary):
        table.add_row(name, value)
    console.print(table)
    console.print(
        f"threshold {plan.rules.threshold:+.4%}, {seconds:.1f} s; every step stands in the tables signals, positions, "
        "equity and events under that name"
    )


def summary_rows(summary: SessionSummary) -> list[tuple[str, str]]:
    """The lines of the table; money before funding."""
    exits = ", ".join(f"{number} {reason}" for reason, number in summary.exits.items())
    won = f", {summary.wins / summary.closed:.0%} won" if summary.closed else ""
    return [
        ("bars", f"{summary.bars:,}"),
        ("trades closed", f"{summary.closed:,}{won}" + (f" ({exits})" if exits else "")),
        ("trades open", f"{summary.open_positions:,}"),
        ("realized PnL of closed trades", f"{summary.realized_pnl:+,.2f} USDT after fees and slippage"),
        ("unrealized PnL", f"{summary.unrealized_pnl:+,.2f} USDT"),
        ("equity", f"{summary.equity:,.2f} USDT ({summary.total_return:+.2%})"),
        ("largest drawdown", f"{summary.max_drawdown:.2%}"),
    ]


if __name__ == "__main__":
    main()

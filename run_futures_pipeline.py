"""Runs the whole pipeline, from the exchange to the exported model: the stages below, one after the other.

Run: python run_futures_pipeline.py [--demo]. Reads `config.yaml`; each stage skips what is done already. With --demo
the same stages run on a synthetic market in the local exchange and on a database of their own, and a paper session
follows. Writes reports/<run>/index.html, besides what the stages write.
"""

import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import yaml

from perpcast.command_line import ROOT, console, open_database, show_table, stage
from perpcast.config import Settings, load_settings
from perpcast.errors import SetupError

if TYPE_CHECKING:
    from perpcast.database import Database, ModelRecord
    from perpcast.evaluation.report import PaperSession
    from perpcast.training.judgement import Judgement


@dataclass(frozen=True)
class Stage:
    """One script of the pipeline, and what it leaves behind."""

    name: str
    makes: str
    command: tuple[str, ...]
    table: str | None = None  # whose rows the summary counts


STAGES = (
    Stage("database", "the schema on PostgreSQL", ("init_database.py",)),
    Stage("candles", "closed candles, funding rates, instruments", ("download_data.py",), "raw_market_data"),
    Stage("features", "49 indicators, and what a trade earned", ("prepare_dataset.py",), "processed_market_data"),
    Stage(
        "model",
        "one Temporal Fusion Transformer, tested and exported",
        ("train_universal_transformer.py", "--task", "regression"),
        "model_predictions",
    ),
)
PAPER = Stage("paper", "two days of paper trading with that model", ("live_runner.py", "--mode", "replay"))


@click.command(
    epilog="""\b
Examples:
  python run_futures_pipeline.py            the real market: 51 symbols, 3 years, as in config.yaml
  python run_futures_pipeline.py --promote  then the new model is champion, if it clearly earns more than the others
  python run_futures_pipeline.py --demo     a synthetic market, about five minutes, no network, no keys
"""
)
@click.option("--demo", is_flag=True, help="Synthetic market, small network, then two days of paper trading.")
@click.option("--promote", is_flag=True, help="Then make the model champion, where the evidence suffices.")
@stage
def main(settings: Settings, demo: bool, promote: bool) -> None:
    """Run every stage up to the exported model, skipping what is done."""
    if not demo:
        run(settings, STAGES, market=None, promote=promote)
        return
    with demo_world(load_settings([*settings.files, ROOT / "config.demo.yaml"])) as demo_settings:
        market = "Synthetic market with a planted edge: this says nothing about real markets."
        run(demo_settings, (*STAGES, PAPER), market, promote=promote)


def run(settings: Settings, stages: tuple[Stage, ...], market: str | None, *, promote: bool) -> None:
    """The stages, then the summary and the report; `market` is what it says of where its numbers come from."""
    begun = time.monotonic()
    seconds = run_stages(settings, stages)
    with open_database(settings) as database:
        page, judgement = report(settings, database, seconds, market)
        console.print(f"all stages in {time.monotonic() - begun:.0f} s; report: {page}")
        if promote:
            from model_registry import promote_model

            promote_model(settings, database, judgement.model.model_id, judgement)
    console.print("next: open the report in a browser; curves: tensorboard --logdir logs")


def run_stages(settings: Settings, stages: tuple[Stage, ...]) -> dict[Stage, float]:
    """Runs the scripts in order; returns the seconds of each. The first that fails ends the pipeline."""
    seconds = {}
    for number, each in enumerate(stages, 1):
        console.rule(f"[bold]{number}/{len(stages)} {each.name}[/bold]: {each.makes}", align="left")
        started = time.monotonic()
        run_script(settings, *each.command)
        seconds[each] = time.monotonic() - started
    return seconds


def run_script(settings: Settings, script: str, *options: str) -> None:
    """Runs one script with our configuration files; ends the pipeline with its exit code where it fails."""
    files = [argument for path in settings.files for argument in ("--config", str(path))]
    code = subprocess.run([sys.executable, ROOT / script, *options, *files], check=False).returncode
    if code:
        message = f"{script} ended with exit code {code}: its last lines say why; then run the same command again"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(code if code > 0 else 1)


# --- the report ------------------------------------------------------------------------------------------------------


def report(
    settings: Settings, database: "Database", seconds: Mapping[Stage, float], market: str | None
) -> "tuple[Path, Judgement]":
    """Judges the newest model, shows it with the stages, and writes the page; returns its path, and the judgement."""
    from perpcast.database import read_models, read_row_counts
    from perpcast.evaluation import report
    from perpcast.training.judgement import judge_model
    from perpcast.training.run_report import tables, verdict_of, write_page

    model = read_models(database)[0]
    counts = read_row_counts(database)
    stages = tuple(
        report.Stage(each.name, spent, counts[each.table] if each.table else None) for each, spent in seconds.items()
    )
    with console.status("scoring, trading the test span"):
        judgement = judge_model(settings, database, model.model_id, purpose="report", now=datetime.now(UTC))
        paper = paper_session(settings, database, model) if PAPER in seconds else None
        page = write_page(settings, database, judgement, market=market, stages=stages, paper=paper)
    show_table(
        ["stage", "rows", "seconds"],
        [[each.name, "" if each.rows is None else f"{each.rows:,}", f"{each.seconds:.1f}"] for each in stages],
    )
    for titles, rows in tables(judgement):
        show_table(titles, rows)
    console.print(verdict_of(judgement))
    if paper is not None:
        console.print(paper_line(paper))
    if market is not None:
        console.print(market)
    return page, judgement


def paper_line(paper: "PaperSession") -> str:
    """What the paper session came to."""
    earned = float(paper.equity[-1]) - paper.initial if len(paper.equity) else 0.0
    return (
        f"paper session: {len(paper.equity)} bars, {len(paper.trades)} trades closed, {paper.open_positions} open, "
        f"PnL {earned:+,.2f} USDT on {paper.initial:,.0f}"
    )


def paper_session(settings: Settings, database: "Database", model: "ModelRecord") -> "PaperSession":
    """The newest replay of the model, from its journal."""
    from perpcast.database import read_equity, read_positions
    from perpcast.evaluation.report import PaperSession, PaperTrade
    from perpcast.exit_policy import EXIT_REASONS
    from perpcast.live.journal import DatabaseJournal, sessions
    from perpcast.timeframe import to_ms

    name = sessions(DatabaseJournal(database), f"replay-local-{model.model_id}")[-1]
    equity, positions = read_equity(database, name), read_positions(database, name)
    trades = tuple(
        PaperTrade(
            symbol=position.symbol,
            side=position.side,
            entry_time_ms=to_ms(position.entry_time),
            exit_time_ms=to_ms(position.exit_time),
            exit_reason=EXIT_REASONS[position.exit_reason or 0],
            return_fraction=position.realized_return or 0.0,
            earned=position.realized_pnl,
        )
        for position in positions
        if position.exit_time is not None
    )
    return PaperSession(
        open_time_ms=np.array([to_ms(record.time) for record in equity], np.int64),
        equity=np.array([record.equity for record in equity]),
        initial=settings.capital.initial,
        trades=trades,
        open_positions=len(positions) - len(trades),
    )


# --- the demo's world ------------------------------------------------------------------------------------------------


@contextmanager
def demo_world(settings: Settings) -> Iterator[Settings]:
    """The demo's own exchange and database on free ports; both end with it. Yields the settings that point there.

    The exchange runs in this process, so that nothing of it is left after a kill -9; its time stands still until the
    paper session subscribes, so that every demo downloads and trades the same bars.
    """
    from perpcast.database import free_port, stop_server
    from perpcast.simulator.clock import RunningClock
    from perpcast.simulator.server import serve_in_thread
    from perpcast.simulator.synthetic import SyntheticMarket
    from perpcast.timeframe import interval_ms, parse_time, to_ms

    demo, server = settings.demo, settings.path(settings.database.directory)
    session = server.parent / "session.yaml"
    server.parent.mkdir(parents=True, exist_ok=True)
    now_ms = to_ms(parse_time(demo.now))
    end_ms = now_ms + (demo.replay_bars + 4) * interval_ms(settings.data_download.interval)
    market = SyntheticMarket(demo.market_seed, demo.planted_edge, end_ms)
    clock = RunningClock(now_ms, demo.speed, time.monotonic)
    with only_one(server.parent / "demo.lock"), serve_in_thread(market, clock) as exchange:
        try:
            # A demo that was killed may have left its database server running on another port.
            stop_server(server)
            place = {
                "database": {"port": free_port()},
                "exchange": {"environment": "local", "rest_url": exchange.rest_url, "ws_url": exchange.ws_url},
            }
            session.write_text(yaml.safe_dump(place), encoding="utf-8")
            yield load_settings([*settings.files, session])
        finally:
            stop_server(server)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Refuses a second demo in the same clone; the system frees the lock at our death."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError("another demo is running in this clone: wait for its end, or use a second clone") from None
        yield


if __name__ == "__main__":
    main()

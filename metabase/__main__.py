"""The dashboards from the command line: python -m metabase preview | provision | smoke."""

from pathlib import Path

import click

from metabase import provision, smoke
from perpcast.command_line import open_database, stage
from perpcast.config import Settings

EXAMPLES = """
\b
Examples:
  python -m metabase preview      every question as a picture, in one page; needs no Metabase
  python -m metabase provision    into the Metabase that docker compose started
  python -m metabase smoke        does it answer?
"""


@click.group(epilog=EXAMPLES)
def main() -> None:
    """The questions of the dashboards: previewed in a page, brought into Metabase, checked there."""


@main.command(
    epilog="""
\b
Examples:
  python -m metabase preview
  python -m metabase preview --symbol BTCUSDT
"""
)
@click.option("--symbol", help="Only this symbol, in every question that takes one.")
@click.option("--model", help="This model in place of the champion.")
@click.option("--session", "run", help="This session in place of the newest.")
@stage
def preview(settings: Settings, symbol: str | None, model: str | None, run: str | None) -> None:
    """Draw every question into reports/metabase/index.html."""
    from metabase.preview import write_preview

    with open_database(settings) as database:
        page: Path = write_preview(
            database, settings.path("reports", "metabase"), {"symbol": symbol, "model": model, "run": run}
        )
    click.echo(f"preview: {page}")


main.add_command(provision.main, "provision")
main.add_command(smoke.main, "smoke")

if __name__ == "__main__":
    main()

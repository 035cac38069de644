"""Which machine the shell scripts mean when none is named: python -m vast.target

Prints `config=PATH` (an ssh_config, or nothing), `host=HOST` and `folder=FOLDER` of the current rental, else of
`vast.host` in the configuration.
"""

import click

from perpcast.command_line import stage
from perpcast.config import Settings
from perpcast.errors import SetupError
from vast.machine import ALIAS
from vast.rental import Ledger


@click.command()
@stage
def main(settings: Settings) -> None:
    """Print how the machine is reached, for the scripts in vast/.

    \b
    Example:
      python -m vast.target
    """
    ledger = Ledger(settings.path(".perpcast", "vast"))
    if ledger.current() is not None:
        config = ledger.folder / "ssh_config"
        if not config.exists():
            raise SetupError("what is rented cannot be reached yet: wait until python -m vast says that it runs")
        answer = (str(config.resolve()), ALIAS)
    elif settings.vast.host is not None:
        answer = ("", settings.vast.host)
    else:
        raise SetupError(
            "no machine is rented, and the configuration names none: name one (user@host or user@host:port), or set "
            "vast.host, or rent one with python -m vast"
        )
    for name, value in zip(("config", "host", "folder"), (*answer, settings.vast.folder), strict=True):
        click.echo(f"{name}={value}")


if __name__ == "__main__":
    main()

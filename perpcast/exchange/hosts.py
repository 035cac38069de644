"""Where Bybit listens: the hosts of each environment, or the ones that the configuration names instead."""

from dataclasses import dataclass

from yarl import URL

from perpcast.errors import ConfigError


@dataclass(frozen=True)
class Hosts:
    """Base URL of the REST interface, full URL of the public linear WebSocket."""

    rest_url: str
    ws_url: str


# Demo trades with play money on mainnet's prices: its market data are mainnet's.
_ENVIRONMENTS = {
    "mainnet": Hosts("https://api.bybit.com", "wss://stream.bybit.com/v5/public/linear"),
    "testnet": Hosts("https://api-testnet.bybit.com", "wss://stream-testnet.bybit.com/v5/public/linear"),
    "demo": Hosts("https://api-demo.bybit.com", "wss://stream.bybit.com/v5/public/linear"),
}


def hosts_of(environment: str, rest_url: str | None = None, ws_url: str | None = None) -> Hosts:
    """The hosts of `environment`, each replaced by the given URL. Raises ConfigError for what is not such a URL."""
    known = _ENVIRONMENTS.get(environment)
    rest_url = rest_url or (known.rest_url if known else "")
    ws_url = ws_url or (known.ws_url if known else "")
    _check_url("exchange.rest_url", rest_url, ("http", "https"))
    _check_url("exchange.ws_url", ws_url, ("ws", "wss"))
    return Hosts(rest_url.rstrip("/"), ws_url)


def _check_url(key: str, text: str, schemes: tuple[str, str]) -> None:
    try:
        url = URL(text)
        port = url.port
    except ValueError:
        url, port = URL(), None
    if url.scheme not in schemes or not url.host or not port or url.query_string or url.user is not None:
        raise ConfigError(f"{key}: expected {schemes[0]}(s)://host[:port][/path], received {text!r}")

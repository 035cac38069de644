"""The Bybit client: REST and public streams, each answer checked before it is believed.

Only this room (and, on its own, `simulator/`) knows Bybit's field names; what leaves it are the market's values.
"""

from perpcast.exchange.client import BybitClient
from perpcast.exchange.hosts import Hosts, hosts_of
from perpcast.exchange.rate_limit import RateLimit
from perpcast.exchange.side_by_side import QUESTIONS, side_by_side
from perpcast.exchange.signing import Credentials
from perpcast.exchange.stream import CandleStream
from perpcast.exchange.wire import PAGE_BARS, CandlePage, KeyRights, MalformedError, RejectedRow

__all__ = [
    "PAGE_BARS",
    "QUESTIONS",
    "BybitClient",
    "CandlePage",
    "CandleStream",
    "Credentials",
    "Hosts",
    "KeyRights",
    "MalformedError",
    "RateLimit",
    "RejectedRow",
    "hosts_of",
    "side_by_side",
]

"""Signatures of Bybit v5 (shared/spec/bybit-v5.md 1.2): HMAC-SHA256 over exactly the bytes that go on the wire."""

import hashlib
import hmac
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Credentials:
    """An API key and its secret, which no representation shows."""

    key: str
    secret: str = field(repr=False)


def signature(credentials: Credentials, timestamp_ms: int, recv_window_ms: int, tail: bytes) -> str:
    """Of a request: `tail` is the raw query string of a GET, or the raw body of a POST."""
    return _hmac(credentials, f"{timestamp_ms}{credentials.key}{recv_window_ms}".encode() + tail)


def stream_signature(credentials: Credentials, expires_ms: int) -> str:
    """Of the `auth` message of a private WebSocket."""
    return _hmac(credentials, f"GET/realtime{expires_ms}".encode())


def signed_headers(credentials: Credentials, timestamp_ms: int, recv_window_ms: int, tail: bytes) -> dict[str, str]:
    """The headers that carry the signature of a request."""
    return {
        "X-BAPI-API-KEY": credentials.key,
        "X-BAPI-TIMESTAMP": str(timestamp_ms),
        "X-BAPI-RECV-WINDOW": str(recv_window_ms),
        "X-BAPI-SIGN": signature(credentials, timestamp_ms, recv_window_ms, tail),
    }


def _hmac(credentials: Credentials, payload: bytes) -> str:
    return hmac.new(credentials.secret.encode(), payload, hashlib.sha256).hexdigest()

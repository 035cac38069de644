"""Who asks: key, time and signature of a signed request, checked as Bybit checks them (bybit-v5.md 1.2)."""

import hashlib
import hmac
from collections.abc import Mapping

INVALID_TIME, INVALID_KEY, INVALID_SIGNATURE = 10002, 10003, 10004

_DEFAULT_RECV_WINDOW_MS = 5000
_AHEAD_MS = 1000


class UnsignedError(Exception):
    """A header is missing or no number: HTTP 401."""


class KeyRefusedError(Exception):
    """The request is signed, but not so that it can be believed: `code` is the retCode."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def is_signed(secret: str, payload: str, signature: str) -> bool:
    """Whether `signature` is the HMAC-SHA256 of `payload` in lower-case hex digits."""
    expected = hmac.new(secret.encode(), payload.encode(), hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected.encode(), signature.encode())


def check_signed(headers: Mapping[str, str], tail: str, keys: Mapping[str, str], now_ms: int) -> str:
    """The API key that signed the request. Raises UnsignedError or KeyRefusedError.

    `tail` is the query string (GET) or the body (POST) as it came over the wire, `keys` holds the secret of each key.
    """
    key, signature = headers.get("X-BAPI-API-KEY"), headers.get("X-BAPI-SIGN")
    timestamp, recv_window = headers.get("X-BAPI-TIMESTAMP", ""), headers.get("X-BAPI-RECV-WINDOW", "")
    if not key or not signature or not _is_number(timestamp) or not _is_number(recv_window or "0"):
        raise UnsignedError("expected X-BAPI-API-KEY, X-BAPI-TIMESTAMP and X-BAPI-SIGN")
    window_ms = int(recv_window or _DEFAULT_RECV_WINDOW_MS)
    if not now_ms - window_ms <= int(timestamp) < now_ms + _AHEAD_MS:
        raise KeyRefusedError(
            INVALID_TIME,
            "invalid request, please check your server timestamp or recv_window param. "
            f"req_timestamp[{timestamp}],server_timestamp[{now_ms}],recv_window[{window_ms}]",
        )
    if key not in keys:
        raise KeyRefusedError(INVALID_KEY, "API key is invalid.")
    if not is_signed(keys[key], timestamp + key + recv_window + tail, signature):
        raise KeyRefusedError(INVALID_SIGNATURE, "error sign! please check your signature generation algorithm.")
    return key


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 15

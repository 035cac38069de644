"""Interval arithmetic in UTC: bars are named by the open of their interval, in milliseconds since the epoch."""

from datetime import UTC, datetime, timedelta

DAY_MS = 86_400_000

INTERVAL_MINUTES = {
    "1": 1,
    "3": 3,
    "5": 5,
    "15": 15,
    "30": 30,
    "60": 60,
    "120": 120,
    "240": 240,
    "360": 360,
    "720": 720,
}


def interval_ms(interval: str) -> int:
    """Length of one bar in milliseconds. Raises ValueError for an interval that is not a fixed number of minutes."""
    try:
        return INTERVAL_MINUTES[interval] * 60_000
    except KeyError:
        raise ValueError(f"interval must be one of {', '.join(INTERVAL_MINUTES)}, received {interval!r}") from None


def floor_ms(time_ms: int, step_ms: int) -> int:
    """The open of the bar that holds `time_ms`."""
    return time_ms - time_ms % step_ms


def month_ms(time_ms: int) -> int:
    """The start of the month of UTC that holds `time_ms`."""
    return to_ms(from_ms(time_ms).replace(day=1, hour=0, minute=0, second=0, microsecond=0))


def to_ms(time: datetime) -> int:
    """Milliseconds since the epoch of an aware time, exactly (no float in between)."""
    if time.tzinfo is None:
        raise ValueError(f"expected an aware time, received {time.isoformat()} without a time zone")
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def from_ms(time_ms: int) -> datetime:
    """The aware UTC time of milliseconds since the epoch."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=int(time_ms))


def parse_time(text: str) -> datetime:
    """An aware UTC time from ISO 8601 text; a time without a zone is taken as UTC. Raises ValueError."""
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def format_time(time_ms: int) -> str:
    """`2025-06-28 14:15` in UTC, the way every message and table shows a bar."""
    return from_ms(time_ms).strftime("%Y-%m-%d %H:%M")

"""What a session did, from its journal."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from perpcast.database.journal import EquityRecord, PositionRecord
from perpcast.exit_policy import EXIT_REASONS


@dataclass(frozen=True)
class SessionSummary:
    """Money in USDT, net of fees and slippage, before funding; fractions are of the equity at the beginning or peak."""

    bars: int
    initial: float
    equity: float
    open_positions: int
    unrealized_pnl: float
    closed: int
    wins: int
    realized_pnl: float  # of closed positions
    exits: dict[str, int]
    max_drawdown: float

    @property
    def total_return(self) -> float:
        """Change of equity over the session."""
        return self.equity / self.initial - 1


def summarize(initial: float, positions: Sequence[PositionRecord], equity: Sequence[EquityRecord]) -> SessionSummary:
    """The sums of one session; `equity` is in order of time."""
    closed = [position for position in positions if position.exit_time is not None]
    exits = Counter(EXIT_REASONS[position.exit_reason or 0] for position in closed)
    peak, drawdown = initial, 0.0
    for record in equity:
        peak = max(peak, record.equity)
        drawdown = max(drawdown, 1 - record.equity / peak)
    return SessionSummary(
        bars=len(equity),
        initial=initial,
        equity=equity[-1].equity if equity else initial,
        open_positions=len(positions) - len(closed),
        unrealized_pnl=equity[-1].unrealized_pnl if equity else 0.0,
        closed=len(closed),
        wins=sum(position.realized_pnl > 0 for position in closed),
        realized_pnl=sum(position.realized_pnl for position in closed),
        exits={reason: exits[reason] for reason in EXIT_REASONS if exits[reason]},
        max_drawdown=drawdown,
    )

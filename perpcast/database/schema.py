"""The tables, declared once. Times are `timestamptz`, the open of the bar; ranges are read by (symbol, open_time).

A change here needs a new migration in `migrations.py`.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Double,
    Index,
    Integer,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, REAL

from perpcast.market import SIDES

metadata = MetaData()
TIME = DateTime(timezone=True)

# The feature set `candles_49` as it is stored, in its order. obv is double: only its differences count.
INDICATORS = (
    *("ema_20", "adx_14", "macd", "macd_signal", "macd_diff", "ichimoku_conversion", "ichimoku_base", "psar"),
    *("aroon_up", "aroon_down", "dpo_20"),
    *("rsi_14", "stoch_rsi_14", "stoch_k", "stoch_d", "cci_20", "williams_r_14", "roc_12", "ultimate_oscillator"),
    "mfi_14",
    *("atr_14", "bb_high", "bb_mid", "bb_low", "bb_width", "donchian_high", "donchian_mid", "donchian_low"),
    *("obv", "cmf_20", "volume_sma_20", "volume_ratio"),
    *("vortex_pos", "vortex_neg"),
    *("hour", "day_of_week", "is_weekend"),
    *("price_change_1", "price_change_4", "price_change_16"),
    *("close_to_ema", "bb_position", "donchian_position", "atr_pct", "di_diff", "aroon_oscillator", "vortex_diff"),
    *("stoch_diff", "candle_range"),
)
DOUBLE_INDICATORS = ("obv",)

# Why bars are missing, or present and not counted.
GAP_CAUSES = ("not_listed_yet", "exchange_outage", "flat_run", "rejected_row", "not_yet_fetched")
MODEL_STATES = ("candidate", "champion", "retired")


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=f"{column}_known")


schema_migrations = Table(
    "schema_migrations",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    Column("applied_at", TIME, nullable=False, server_default=func.now()),
)

instruments = Table(
    "instruments",
    metadata,
    Column("symbol", Text, primary_key=True),
    Column("status", Text, nullable=False),
    Column("tick_size", Numeric, nullable=False),
    Column("qty_step", Numeric, nullable=False),
    Column("min_quantity", Numeric, nullable=False),
    Column("min_notional", Numeric, nullable=False),
    Column("max_leverage", Numeric, nullable=False),
    Column("launch_time", TIME, nullable=False),
    Column("funding_interval_minutes", Integer, nullable=False),
    Column("fetched_at", TIME, nullable=False),
    Column("delivery_time", TIME),
)

raw_market_data = Table(
    "raw_market_data",
    metadata,
    Column("symbol", Text, nullable=False),
    Column("open_time", TIME, nullable=False),
    *(Column(name, Double, nullable=False) for name in ("open", "high", "low", "close", "volume", "turnover")),
    PrimaryKeyConstraint("symbol", "open_time"),
    # PostgreSQL sorts NaN above infinity: the upper bounds refuse both.
    CheckConstraint(
        "0 < low AND low <= open AND low <= close AND open <= high AND close <= high AND high < 'Infinity' "
        "AND volume >= 0 AND volume < 'Infinity' AND turnover >= 0 AND turnover < 'Infinity'",
        name="candle_possible",
    ),
)

# The exchange changed a candle after it was stored: both values, so that no dataset changes without a trace.
candle_revisions = Table(
    "candle_revisions",
    metadata,
    Column("symbol", Text, nullable=False),
    Column("open_time", TIME, nullable=False),
    Column("noticed_at", TIME, nullable=False),
    *(
        Column(f"{name}_{when}", Double, nullable=False)
        for when in ("before", "after")
        for name in ("open", "high", "low", "close", "volume", "turnover")
    ),
    PrimaryKeyConstraint("symbol", "open_time", "noticed_at"),
)

candle_gaps = Table(
    "candle_gaps",
    metadata,
    Column("symbol", Text, nullable=False),
    Column("first_missing", TIME, nullable=False),
    Column("bars", Integer, CheckConstraint("bars > 0"), nullable=False),
    Column("cause", Text, nullable=False),
    Column("reason", Text),
    PrimaryKeyConstraint("symbol", "first_missing"),
    _one_of("cause", GAP_CAUSES),
)

funding_rates = Table(
    "funding_rates",
    metadata,
    Column("symbol", Text, nullable=False),
    Column("funding_time", TIME, nullable=False),
    Column("rate", Double, nullable=False),
    PrimaryKeyConstraint("symbol", "funding_time"),
)

processed_market_data = Table(
    "processed_market_data",
    metadata,
    Column("symbol", Text, nullable=False),
    Column("open_time", TIME, nullable=False),
    *(Column(name, Double if name in DOUBLE_INDICATORS else REAL) for name in INDICATORS),
    *(
        column
        for side in SIDES
        for column in (
            Column(f"{side}_expected_return", Double),
            Column(f"{side}_exit_reason", SmallInteger),
            Column(f"{side}_bars_held", SmallInteger),
            Column(f"{side}_targets_filled", SmallInteger),
            Column(f"{side}_ambiguous", Boolean),
        )
    ),
    PrimaryKeyConstraint("symbol", "open_time"),
)

# What the rows of `processed_market_data` were made of, month by month: whether they still are what they would be made
# again, and what they hold.
processed_months = Table(
    "processed_months",
    metadata,
    Column("symbol", Text, nullable=False),
    Column("month", TIME, nullable=False),
    Column("version", Text, nullable=False),
    Column("candles", Integer, nullable=False),
    Column("digest", BigInteger, nullable=False),
    Column("quality", JSONB, nullable=False),
    PrimaryKeyConstraint("symbol", "month"),
)

training_sequences = Table(
    "training_sequences",
    metadata,
    Column("dataset_id", Text, nullable=False),
    Column("symbol", Text, nullable=False),
    Column("split", Text, nullable=False),
    Column("first_window", TIME, nullable=False),
    Column("last_window", TIME, nullable=False),
    Column("windows", Integer, CheckConstraint("windows > 0"), nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("task", JSONB, nullable=False),
    PrimaryKeyConstraint("dataset_id", "symbol", "split", "first_window"),
)

model_metadata = Table(
    "model_metadata",
    metadata,
    Column("model_id", Text, primary_key=True),
    Column("created_at", TIME, nullable=False),
    Column("task", JSONB, nullable=False),
    Column("architecture", Text, nullable=False),
    Column("parameters", JSONB, nullable=False),
    Column("dataset_id", Text, nullable=False),
    Column("dataset_fingerprint", Text, nullable=False),
    Column("code_revision", Text),
    Column("metrics", JSONB, nullable=False),
    Column("baselines", JSONB, nullable=False),
    Column("bundle_path", Text, nullable=False),
    Column("bundle_sha256", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'candidate'")),
    # The first target's kind; all targets of a task are of one kind.
    Column("task_kind", Text, Computed("task #>> '{targets,0,kind}'", persisted=True), nullable=False),
    _one_of("state", MODEL_STATES),
    Index("one_champion", "task_kind", unique=True, postgresql_where=text("state = 'champion'")),
)

model_predictions = Table(
    "model_predictions",
    metadata,
    Column("model_id", Text, nullable=False),
    Column("symbol", Text, nullable=False),
    Column("open_time", TIME, nullable=False),
    *(
        Column(f"{side}_{output}", REAL)
        for side in SIDES
        for output in ("mean", "q50", "q75", "q90", "profit_probability")
    ),
    PrimaryKeyConstraint("model_id", "symbol", "open_time"),
)

# Of the signals those that are worth a look; in decision.py's words, which refuse most of them for this.
ABOVE_THRESHOLD = "reason IS DISTINCT FROM 'not above the threshold'"

# The trader's journal. `run` names the session (replay, paper, later an account); an id is a function of what it names.
signals = Table(
    "signals",
    metadata,
    Column("signal_id", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("symbol", Text, nullable=False),
    Column("open_time", TIME, nullable=False),
    Column("side", Text, nullable=False),
    Column("score", Double, nullable=False),
    Column("source", Text, nullable=False),
    Column("decision", Text, nullable=False),
    Column("reason", Text),
    UniqueConstraint("run", "symbol", "open_time", "side", "source"),
    _one_of("side", SIDES),
    Index("signals_above_threshold", "run", "open_time", postgresql_where=text(ABOVE_THRESHOLD)),
)

orders = Table(
    "orders",
    metadata,
    Column("order_link_id", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("position_id", Text),
    Column("symbol", Text, nullable=False),
    Column("side", Text, nullable=False),
    Column("leg", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("order_type", Text, nullable=False),
    Column("reduce_only", Boolean, nullable=False),
    Column("quantity", Numeric, nullable=False),
    Column("price", Numeric),
    Column("trigger_price", Numeric),
    Column("status", Text, nullable=False),
    Column("order_id", Text),
    Column("reason", Text),
    Column("created_at", TIME, nullable=False),
    Column("updated_at", TIME, nullable=False),
    _one_of("side", SIDES),
    Index("orders_by_run", "run", "symbol"),
)

executions = Table(
    "executions",
    metadata,
    Column("execution_id", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("order_link_id", Text),
    Column("symbol", Text, nullable=False),
    Column("side", Text, nullable=False),
    Column("quantity", Numeric, nullable=False),
    Column("price", Numeric, nullable=False),
    Column("fee", Numeric, nullable=False),
    Column("maker", Boolean, nullable=False),
    Column("executed_at", TIME, nullable=False),
    _one_of("side", SIDES),
    Index("executions_by_order", "order_link_id"),
)

positions = Table(
    "positions",
    metadata,
    Column("position_id", Text, primary_key=True),
    Column("run", Text, nullable=False),
    Column("signal_id", Text),
    Column("symbol", Text, nullable=False),
    Column("side", Text, nullable=False),
    Column("entry_time", TIME, nullable=False),
    Column("entry_price", Double, nullable=False),
    Column("quantity", Double, nullable=False),
    Column("leverage", Double, nullable=False),
    Column("stop_loss", Double, nullable=False),
    Column("remaining_fraction", Double, nullable=False),
    Column("targets_filled", SmallInteger, nullable=False),
    Column("bars_held", Integer, nullable=False),
    Column("realized_pnl", Double, nullable=False),
    Column("exit_time", TIME),
    Column("exit_reason", SmallInteger),
    Column("realized_return", Double),
    _one_of("side", SIDES),
    Index("one_open_position", "run", "symbol", unique=True, postgresql_where=text("exit_time IS NULL")),
)

equity = Table(
    "equity",
    metadata,
    Column("run", Text, nullable=False),
    Column("time", TIME, nullable=False),
    Column("equity", Double, nullable=False),
    Column("balance", Double, nullable=False),
    Column("unrealized_pnl", Double, nullable=False),
    Column("open_positions", Integer, nullable=False),
    PrimaryKeyConstraint("run", "time"),
)

events = Table(
    "events",
    metadata,
    Column("run", Text, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("time", TIME, nullable=False),
    Column("kind", Text, nullable=False),
    Column("symbol", Text),
    Column("detail", JSONB, nullable=False),
    PrimaryKeyConstraint("run", "number"),
)

-- The schema of version 1, as the first release made it: the tests migrate it and compare with a fresh one.

CREATE TABLE candle_gaps (
    symbol TEXT NOT NULL,
    first_missing TIMESTAMP WITH TIME ZONE NOT NULL,
    bars INTEGER NOT NULL CHECK (bars > 0),
    cause TEXT NOT NULL,
    reason TEXT,
    PRIMARY KEY (symbol, first_missing),
    CONSTRAINT cause_known CHECK (cause IN ('not_listed_yet', 'exchange_outage', 'flat_run', 'rejected_row', 'not_yet_fetched'))
);

CREATE TABLE equity (
    run TEXT NOT NULL,
    time TIMESTAMP WITH TIME ZONE NOT NULL,
    equity DOUBLE PRECISION NOT NULL,
    balance DOUBLE PRECISION NOT NULL,
    unrealized_pnl DOUBLE PRECISION NOT NULL,
    open_positions INTEGER NOT NULL,
    PRIMARY KEY (run, time)
);

CREATE TABLE events (
    run TEXT NOT NULL,
    number BIGINT NOT NULL,
    time TIMESTAMP WITH TIME ZONE NOT NULL,
    kind TEXT NOT NULL,
    symbol TEXT,
    detail JSONB NOT NULL,
    PRIMARY KEY (run, number)
);

CREATE TABLE executions (
    execution_id TEXT NOT NULL,
    run TEXT NOT NULL,
    order_link_id TEXT,
    symbol TEXT NOT NULL,
    side TEXT NOT NULL,
    quantity NUMERIC NOT NULL,
    price NUMERIC NOT NULL,
    fee NUMERIC NOT NULL,
    maker BOOLEAN NOT NULL,
    executed_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (execution_id),
    CONSTRAINT side_known CHECK (side IN ('buy', 'sell'))
);

CREATE INDEX executions_by_order ON executions (order_link_id);

CREATE TABLE funding_rates (
    symbol TEXT NOT NULL,
    funding_time TIMESTAMP WITH TIME ZONE NOT NULL,
    rate DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (symbol, funding_time)
);

CREATE TABLE instruments (
    symbol TEXT NOT NULL,
    status TEXT NOT NULL,
    tick_size NUMERIC NOT NULL,
    qty_step NUMERIC NOT NULL,
    min_quantity NUMERIC NOT NULL,
    min_notional NUMERIC NOT NULL,
    max_leverage NUMERIC NOT NULL,
    launch_time TIMESTAMP WITH TIME ZONE NOT NULL,
    funding_interval_minutes INTEGER NOT NULL,
    fetched_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (symbol)
);

CREATE TABLE model_metadata (
    model_id TEXT NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    task JSONB NOT NULL,
    architecture TEXT NOT NULL,
    parameters JSONB NOT NULL,
    dataset_id TEXT NOT NULL,
    dataset_fingerprint TEXT NOT NULL,
    code_revision TEXT,
    metrics JSONB NOT NULL,
    baselines JSONB NOT NULL,
    bundle_path TEXT NOT NULL,
    bundle_sha256 TEXT NOT NULL,
    state TEXT DEFAULT 'candidate' NOT NULL,
    PRIMARY KEY (model_id),
    CONSTRAINT state_known CHECK (state IN ('candidate', 'champion', 'retired'))
);

CREATE TABLE model_predictions (
    model_id TEXT NOT NULL,
    symbol TEXT NOT NULL,
    open_time TIMESTAMP WITH TIME ZONE NOT NULL,
    buy_mean REAL,
    buy_q50 REAL,
    buy_q75 REAL,
    buy_q90 REAL,
    buy_profit_probability REAL,
    sell_mean REAL,
    sell_q50 REAL,
    sell_q75 REAL,
    sell_q90 REAL,
    sell_profit_probability REAL,
    PRIMARY KEY (model_id, symbol, open_time)
);

CREATE TABLE orders (
    order_link_id TEXT NOT NULL,
    run TEXT NOT NULL,
    position_id TEXT,
    symbol TEXT NOT NULL,
    side TEXT NOT NULL,
    leg TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    order_type TEXT NOT NULL,
    reduce_only BOOLEAN NOT NULL,
    quantity NUMERIC NOT NULL,
    price NUMERIC,
    trigger_price NUMERIC,
    status TEXT NOT NULL,
    order_id TEXT,
    reason TEXT,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (order_link_id),
    CONSTRAINT side_known CHECK (side IN ('buy', 'sell'))
);

CREATE INDEX orders_by_run ON orders (run, symbol);

CREATE TABLE positions (
    position_id TEXT NOT NULL,
    run TEXT NOT NULL,
    signal_id TEXT,
    symbol TEXT NOT NULL,
    side TEXT NOT NULL,
    entry_time TIMESTAMP WITH TIME ZONE NOT NULL,
    entry_price DOUBLE PRECISION NOT NULL,
    quantity DOUBLE PRECISION NOT NULL,
    leverage DOUBLE PRECISION NOT NULL,
    stop_loss DOUBLE PRECISION NOT NULL,
    remaining_fraction DOUBLE PRECISION NOT NULL,
    targets_filled SMALLINT NOT NULL,
    bars_held INTEGER NOT NULL,
    realized_pnl DOUBLE PRECISION NOT NULL,
    exit_time TIMESTAMP WITH TIME ZONE,
    exit_reason SMALLINT,
    realized_return DOUBLE PRECISION,
    PRIMARY KEY (position_id),
    CONSTRAINT side_known CHECK (side IN ('buy', 'sell'))
);

CREATE UNIQUE INDEX one_open_position ON positions (run, symbol) WHERE exit_time IS NULL;

CREATE TABLE processed_market_data (
    symbol TEXT NOT NULL,
    open_time TIMESTAMP WITH TIME ZONE NOT NULL,
    ema_20 REAL,
    adx_14 REAL,
    macd REAL,
    macd_signal REAL,
    macd_diff REAL,
    ichimoku_conversion REAL,
    ichimoku_base REAL,
    psar REAL,
    aroon_up REAL,
    aroon_down REAL,
    dpo_20 REAL,
    rsi_14 REAL,
    stoch_rsi_14 REAL,
    stoch_k REAL,
    stoch_d REAL,
    cci_20 REAL,
    williams_r_14 REAL,
    roc_12 REAL,
    ultimate_oscillator REAL,
    mfi_14 REAL,
    atr_14 REAL,
    bb_high REAL,
    bb_mid REAL,
    bb_low REAL,
    bb_width REAL,
    donchian_high REAL,
    donchian_mid REAL,
    donchian_low REAL,
    obv DOUBLE PRECISION,
    cmf_20 REAL,
    volume_sma_20 REAL,
    volume_ratio REAL,
    vortex_pos REAL,
    vortex_neg REAL,
    hour REAL,
    day_of_week REAL,
    is_weekend REAL,
    price_change_1 REAL,
    price_change_4 REAL,
    price_change_16 REAL,
    close_to_ema REAL,
    bb_position REAL,
    donchian_position REAL,
    atr_pct REAL,
    di_diff REAL,
    aroon_oscillator REAL,
    vortex_diff REAL,
    stoch_diff REAL,
    candle_range REAL,
    buy_expected_return DOUBLE PRECISION,
    buy_exit_reason SMALLINT,
    buy_bars_held SMALLINT,
    buy_targets_filled SMALLINT,
    buy_ambiguous BOOLEAN,
    sell_expected_return DOUBLE PRECISION,
    sell_exit_reason SMALLINT,
    sell_bars_held SMALLINT,
    sell_targets_filled SMALLINT,
    sell_ambiguous BOOLEAN,
    PRIMARY KEY (symbol, open_time)
);

CREATE TABLE raw_market_data (
    symbol TEXT NOT NULL,
    open_time TIMESTAMP WITH TIME ZONE NOT NULL,
    open DOUBLE PRECISION NOT NULL,
    high DOUBLE PRECISION NOT NULL,
    low DOUBLE PRECISION NOT NULL,
    close DOUBLE PRECISION NOT NULL,
    volume DOUBLE PRECISION NOT NULL,
    turnover DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (symbol, open_time),
    CONSTRAINT candle_possible CHECK (0 < low AND low <= open AND low <= close AND open <= high AND close <= high AND high < 'Infinity' AND volume >= 0 AND volume < 'Infinity' AND turnover >= 0 AND turnover < 'Infinity')
);

CREATE TABLE schema_migrations (
    version INTEGER NOT NULL,
    name TEXT NOT NULL,
    applied_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    PRIMARY KEY (version)
);

CREATE TABLE signals (
    signal_id TEXT NOT NULL,
    run TEXT NOT NULL,
    symbol TEXT NOT NULL,
    open_time TIMESTAMP WITH TIME ZONE NOT NULL,
    side TEXT NOT NULL,
    score DOUBLE PRECISION NOT NULL,
    source TEXT NOT NULL,
    decision TEXT NOT NULL,
    reason TEXT,
    PRIMARY KEY (signal_id),
    UNIQUE (run, symbol, open_time, side, source),
    CONSTRAINT side_known CHECK (side IN ('buy', 'sell'))
);

CREATE TABLE training_sequences (
    dataset_id TEXT NOT NULL,
    symbol TEXT NOT NULL,
    split TEXT NOT NULL,
    first_window TIMESTAMP WITH TIME ZONE NOT NULL,
    last_window TIMESTAMP WITH TIME ZONE NOT NULL,
    windows INTEGER NOT NULL CHECK (windows > 0),
    fingerprint TEXT NOT NULL,
    task JSONB NOT NULL,
    PRIMARY KEY (dataset_id, symbol, split, first_window)
);

INSERT INTO schema_migrations (version, name) VALUES (1, 'tables of the first release');

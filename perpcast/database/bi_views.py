"""The views of the schema `bi`: what a row of each is, and its query, over the newest tables.

Days and months are of UTC, whatever the session's time zone; rates and returns are fractions. Those over millions of
rows are materialized: they stand still until `refresh_bi`.
"""

from dataclasses import dataclass

from perpcast.database.schema import ABOVE_THRESHOLD, INDICATORS
from perpcast.exit_policy import EXIT_REASONS

# Indicators whose level says nothing: they follow the price, the volume or the calendar.
_WITHOUT_LEVEL = (
    *("ema_20", "macd", "macd_signal", "macd_diff", "ichimoku_conversion", "ichimoku_base", "psar", "dpo_20"),
    *("atr_14", "bb_high", "bb_mid", "bb_low", "donchian_high", "donchian_mid", "donchian_low"),
    *("obv", "volume_sma_20", "hour", "day_of_week", "is_weekend"),
)
DRIFTING = tuple(name for name in INDICATORS if name not in _WITHOUT_LEVEL)

# Of the bars of a month one in so many minutes is enough for its mean, and no hour of the day is left out: 17 bars of
# 15 minutes, which have no factor in common with the 96 of a day.
_SAMPLE_MINUTES = 255

_DAY = "({} AT TIME ZONE 'UTC')::date"
_MONTH = "date_trunc('month', {} AT TIME ZONE 'UTC')::date"
_SIGN = "CASE WHEN {} = 'buy' THEN 1 ELSE -1 END"


def _reason(code: str) -> str:
    """An exit reason by its name."""
    names = ", ".join(f"'{name}'" for name in EXIT_REASONS)
    return f"(ARRAY[{names}])[{code} + 1]"


@dataclass(frozen=True)
class View:
    """One view: what a row of it is, and its query; a materialized one also the key of its rows, and what it reads."""

    name: str
    row: str
    query: str
    key: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


# --- market data ------------------------------------------------------------------------------------------------------

_MARKET = (
    View(
        "bar_interval",
        "The one row is the time from one bar to the next; NULL without candles.",
        """
        SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY step) AS step
        FROM (
            SELECT open_time - lag(open_time) OVER (ORDER BY open_time) AS step
            FROM (
                SELECT open_time FROM raw_market_data
                WHERE symbol = (SELECT min(symbol) FROM raw_market_data)
                ORDER BY open_time DESC LIMIT 100
            ) AS newest
        ) AS steps
        """,
    ),
    View(
        "candle_months",
        "A row is a symbol and a month: the candles stored. As of the last refresh.",
        f"""
        SELECT symbol, {_MONTH.format("open_time")} AS month, count(*) AS bars,
            min(open_time) AS first_bar, max(open_time) AS last_bar
        FROM raw_market_data GROUP BY 1, 2
        """,
        ("symbol", "month"),
        ("raw_market_data",),
    ),
    View(
        "gaps",
        "A row is a stretch of bars that are missing, or present and not counted (flat_run), and why.",
        f"""
        SELECT symbol, first_missing, first_missing + (bars - 1) * step AS last_missing,
            {_DAY.format("first_missing")} AS day, bars, extract(epoch FROM bars * step)::float8 / 3600 AS hours, cause,
            reason
        FROM candle_gaps CROSS JOIN bi.bar_interval
        """,
    ),
    View(
        "gap_months",
        "A row is a symbol, a month and a cause: the bars that are missing, or not counted, in that month for it.",
        """
        SELECT symbol, month::date AS month, cause,
            sum(round(extract(epoch FROM
                least(past_end, (month + interval '1 month') AT TIME ZONE 'UTC')
                - greatest(first_missing, month AT TIME ZONE 'UTC')) / extract(epoch FROM step)))::bigint AS bars
        FROM (
            SELECT symbol, cause, step, first_missing, first_missing + bars * step AS past_end
            FROM candle_gaps CROSS JOIN bi.bar_interval
        ) AS stretches
        CROSS JOIN LATERAL generate_series(
            date_trunc('month', first_missing AT TIME ZONE 'UTC'), (past_end - step) AT TIME ZONE 'UTC', '1 month'
        ) AS month
        GROUP BY 1, 2, 3
        """,
    ),
    View(
        "coverage",
        "A row is a symbol and a month: the bars stored, missing and flat, and the share that can be used. Bars from "
        "before a listing are not missing.",
        """
        SELECT symbol, month, coalesce(bars, 0) AS bars, missing, flat,
            (coalesce(bars, 0) - flat)::float8 / nullif(coalesce(bars, 0) + missing, 0) AS usable
        FROM (
            SELECT symbol, month, coalesce(missing, 0) AS missing, coalesce(flat, 0) AS flat, candles.bars
            FROM bi.candle_months AS candles FULL JOIN (
                SELECT symbol, month,
                    sum(bars) FILTER (WHERE cause NOT IN ('flat_run', 'not_listed_yet'))::bigint AS missing,
                    sum(bars) FILTER (WHERE cause = 'flat_run')::bigint AS flat
                FROM bi.gap_months GROUP BY 1, 2
            ) AS gaps USING (symbol, month)
        ) AS months
        WHERE coalesce(bars, 0) + missing > 0
        """,
    ),
    View(
        "freshness",
        "A row is a symbol with candles: its newest one, how far that is behind the newest of all and behind now, and "
        "what is still to be fetched.",
        """
        WITH RECURSIVE present AS (
            (SELECT symbol FROM raw_market_data ORDER BY symbol LIMIT 1)
            UNION ALL
            SELECT (SELECT symbol FROM raw_market_data WHERE symbol > present.symbol ORDER BY symbol LIMIT 1)
            FROM present WHERE present.symbol IS NOT NULL
        ), newest AS (
            SELECT symbol, (SELECT max(open_time) FROM raw_market_data WHERE symbol = present.symbol) AS newest_bar
            FROM present WHERE symbol IS NOT NULL
        )
        SELECT symbol, newest_bar,
            extract(epoch FROM max(newest_bar) OVER () - newest_bar)::float8 / 3600 AS hours_behind,
            extract(epoch FROM now() - newest_bar - step)::float8 / 3600 AS hours_old,
            status AS exchange_status, fetched_at AS rules_fetched_at,
            coalesce(not_fetched, 0) AS bars_not_fetched, coalesce(rejected, 0) AS bars_rejected,
            coalesce(revised, 0) AS bars_revised
        FROM newest CROSS JOIN bi.bar_interval
        LEFT JOIN instruments USING (symbol)
        LEFT JOIN (
            SELECT symbol, sum(bars) FILTER (WHERE cause = 'not_yet_fetched')::bigint AS not_fetched,
                sum(bars) FILTER (WHERE cause = 'rejected_row')::bigint AS rejected
            FROM candle_gaps GROUP BY 1
        ) AS gaps USING (symbol)
        LEFT JOIN (SELECT symbol, count(*) AS revised FROM candle_revisions GROUP BY 1) AS revisions USING (symbol)
        """,
    ),
    View(
        "revisions",
        "A row is a candle that the exchange changed after it was stored, and by how much its close moved.",
        f"""
        SELECT symbol, open_time, noticed_at, {_DAY.format("noticed_at")} AS day, close_before, close_after,
            (close_after / close_before - 1) * 10000 AS close_moved_bps
        FROM candle_revisions
        """,
    ),
)

# --- labels and features ----------------------------------------------------------------------------------------------

_LABELS = (
    View(
        "label_months",
        "A row is a symbol, a side and a month of signals: what a trade at every bar would have earned, net of fees "
        "and slippage, before funding.",
        f"""
        SELECT symbol, key AS side, {_DAY.format("month")} AS month, (value ->> 'labels')::bigint AS trades,
            (value ->> 'return_sum')::float8 AS return_sum, (value ->> 'profits')::bigint AS profits,
            (value ->> 'ambiguous')::bigint AS ambiguous
        FROM processed_months CROSS JOIN LATERAL jsonb_each(quality -> 'sides')
        """,
    ),
    View(
        "label_exits",
        "A row is a symbol, a side, a month of signals and an exit reason: how many trades of every bar ended so.",
        f"""
        SELECT symbol, key AS side, {_DAY.format("month")} AS month, {_reason("(number - 1)::int")} AS exit_reason,
            count::bigint AS trades
        FROM processed_months CROSS JOIN LATERAL jsonb_each(quality -> 'sides')
        CROSS JOIN LATERAL jsonb_array_elements_text(value -> 'exits') WITH ORDINALITY AS exits(count, number)
        WHERE count::bigint > 0
        """,
    ),
    View(
        "indicator_months",
        "A row is a symbol, a month and an indicator that has a level: bars sampled, their mean and standard "
        "deviation. As of the last refresh.",
        f"""
        SELECT symbol, month, indicator, bars, mean, deviation
        FROM (
            SELECT symbol, {_MONTH.format("open_time")} AS month,
                {
            ", ".join(
                f"count({name}) AS {name}_bars, avg({name}::float8) AS {name}_mean, "
                f"stddev_pop({name}::float8) AS {name}_deviation"
                for name in DRIFTING
            )
        }
            FROM processed_market_data
            WHERE extract(epoch FROM open_time)::bigint % {_SAMPLE_MINUTES * 60} = 0
            GROUP BY 1, 2
        ) AS wide
        CROSS JOIN LATERAL (
            VALUES {", ".join(f"('{name}', {name}_bars, {name}_mean, {name}_deviation)" for name in DRIFTING)}
        ) AS long(indicator, bars, mean, deviation)
        WHERE bars > 0
        """,
        ("symbol", "month", "indicator"),
        ("processed_market_data",),
    ),
)

# --- models -----------------------------------------------------------------------------------------------------------

_MODELS = (
    View(
        "models",
        "A row is a trained model: what it is for, its state, and the test span that it was scored on.",
        f"""
        SELECT model_id, created_at, task_kind, state, architecture, dataset_id, code_revision,
            {_DAY.format("to_timestamp((metrics ->> 'first_ms')::float8 / 1000)")} AS test_first_day,
            {_DAY.format("to_timestamp((metrics ->> 'last_ms')::float8 / 1000)")} AS test_last_day,
            (metrics ->> 'windows')::bigint AS test_windows, (metrics ->> 'threshold')::float8 AS threshold,
            metrics #>> '{{verdict,sentence}}' AS verdict
        FROM model_metadata
        """,
    ),
    View(
        "present_model",
        "The one row is the model that a question is about where none is chosen: the champion, else the newest.",
        """
        SELECT model_id FROM bi.models ORDER BY state = 'champion' DESC, state = 'retired', created_at DESC, model_id
        LIMIT 1
        """,
    ),
    View(
        "model_scores",
        "A row is a score of a model, or of a baseline on the same untouched windows, with its 95 % interval. Errors, "
        "returns and accuracies are fractions.",
        """
        SELECT model_id, forecast, metric, (score ->> 'value')::float8 AS value, (score ->> 'lower')::float8 AS lower,
            (score ->> 'upper')::float8 AS upper
        FROM (
            SELECT model_id, 'model' AS forecast, metrics -> 'scores' AS scores FROM model_metadata
            UNION ALL
            SELECT model_id, key, value FROM model_metadata CROSS JOIN LATERAL jsonb_each(baselines)
        ) AS cards
        CROSS JOIN LATERAL jsonb_each(CASE WHEN jsonb_typeof(scores) = 'object' THEN scores END) AS each(metric, score)
        """,
    ),
    View(
        "registry_events",
        "A row is a step in the registry of models: promoted, refused, retired, rolled back, or a look at a test span.",
        f"""
        SELECT time, {_DAY.format("time")} AS day, kind AS step, detail ->> 'model_id' AS model_id,
            detail ->> 'task_kind' AS task_kind,
            coalesce(detail ->> 'over', detail ->> 'successor', detail ->> 'in_place_of') AS other_model,
            coalesce(
                detail ->> 'reason', detail ->> 'purpose',
                (SELECT string_agg(unmet, '; ')
                 FROM jsonb_array_elements_text(CASE WHEN detail ? 'unmet' THEN detail -> 'unmet' END) AS unmet)
            ) AS reason,
            (detail #>> '{{evidence,gain_over_best_baseline,gain,value}}')::float8 AS gain_a_day,
            (detail #>> '{{evidence,gain_over_best_baseline,gain,lower}}')::float8 AS gain_a_day_lower
        FROM events WHERE run = 'registry'
        """,
    ),
    View(
        "forecast_bins",
        "A row is a model, a symbol, a side, a month, a tenth of that model's and side's forecasts by expected return "
        "(1 the lowest), and a step of 5 % in the probability of profit that it gave (1 the lowest, 0 where it gives "
        "none): counts and sums of what was expected and what came true. As of the last refresh.",
        f"""
        WITH judged AS (
            SELECT model_id, symbol, open_time, sides.*
            FROM model_predictions AS said JOIN processed_market_data AS came USING (symbol, open_time)
            CROSS JOIN LATERAL (VALUES
                ('buy', buy_mean, buy_q50, buy_q75, buy_q90, buy_profit_probability, buy_expected_return),
                ('sell', sell_mean, sell_q50, sell_q75, sell_q90, sell_profit_probability, sell_expected_return)
            ) AS sides(side, predicted, q50, q75, q90, probability, realised)
            WHERE predicted IS NOT NULL AND realised IS NOT NULL
        ), edges AS (
            SELECT model_id, side,
                percentile_cont(ARRAY[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
                WITHIN GROUP (ORDER BY predicted::float8) AS edges
            FROM judged GROUP BY 1, 2
        )
        SELECT model_id, symbol, side, {_MONTH.format("open_time")} AS month,
            width_bucket(predicted::float8, edges) + 1 AS decile,
            CASE WHEN probability IS NULL THEN 0 ELSE least(width_bucket(probability::float8, 0, 1, 20), 20) END
            AS probability_bin,
            count(*) AS forecasts, sum(predicted::float8) AS predicted_sum, sum(realised) AS realised_sum,
            sum(probability::float8) AS probability_sum, count(*) FILTER (WHERE realised > 0) AS profits,
            count(q50) AS with_quantiles,
            count(*) FILTER (WHERE realised < q50) AS below_q50, count(*) FILTER (WHERE realised <= q50) AS within_q50,
            count(*) FILTER (WHERE realised < q75) AS below_q75, count(*) FILTER (WHERE realised <= q75) AS within_q75,
            count(*) FILTER (WHERE realised < q90) AS below_q90, count(*) FILTER (WHERE realised <= q90) AS within_q90
        FROM judged JOIN edges USING (model_id, side)
        GROUP BY 1, 2, 3, 4, 5, 6
        """,
        ("model_id", "symbol", "side", "month", "decile", "probability_bin"),
        ("processed_market_data", "model_predictions"),
    ),
)

# After the models: what drifted is told against what the present one was trained on.
_DRIFT = (
    View(
        "indicator_drift",
        "A row is a symbol, a month and an indicator: how far its mean lies from that of the months that the present "
        "model was trained on, else of the symbol's first year, in standard deviations of those months.",
        f"""
        WITH trained AS (
            SELECT {_MONTH.format("min(first_window)")} AS first_month, {_DAY.format("max(last_window)")} AS last_day
            FROM training_sequences WHERE split = 'train' AND dataset_id = (
                SELECT dataset_id FROM bi.models WHERE model_id = (SELECT model_id FROM bi.present_model)
            )
        ), months AS (
            SELECT *, min(month) OVER (PARTITION BY symbol) AS first_of_symbol FROM bi.indicator_months
        ), sums AS (
            SELECT symbol, indicator, sum(bars) AS bars, sum(bars * mean) / sum(bars) AS mean,
                sum(bars * (deviation ^ 2 + mean ^ 2)) / sum(bars) AS square
            FROM months CROSS JOIN trained
            WHERE month >= coalesce(first_month, first_of_symbol)
                AND month <= coalesce(last_day, (first_of_symbol + interval '11 months')::date)
            GROUP BY 1, 2
        ), reference AS (
            SELECT symbol, indicator, mean, sqrt(greatest(square - mean ^ 2, 0)) AS deviation FROM sums
        )
        SELECT months.symbol, months.month, months.indicator, months.bars, months.mean,
            reference.mean AS reference_mean, reference.deviation AS reference_deviation,
            (months.mean - reference.mean) / nullif(reference.deviation, 0) AS shift
        FROM months JOIN reference USING (symbol, indicator)
        """,
    ),
)

# --- trading ----------------------------------------------------------------------------------------------------------

_TRADING = (
    View(
        "equity_curve",
        "A row is a bar of a session: equity at its close, and how far that is below the highest so far (0 or less). "
        "USDT, before funding.",
        f"""
        SELECT run, time, {_DAY.format("time")} AS day, equity, balance, unrealized_pnl, open_positions, peak,
            equity / peak - 1 AS drawdown
        FROM (
            SELECT run, time, equity, balance, unrealized_pnl, open_positions,
                greatest(initial, max(equity) OVER (PARTITION BY run ORDER BY time)) AS peak
            FROM equity LEFT JOIN (
                SELECT run, (detail #>> '{{capital,initial}}')::float8 AS initial FROM events WHERE kind = 'session'
            ) AS began USING (run)
        ) AS curve
        """,
    ),
    View(
        "trades",
        "A row is a position of a session: entry, exit, what was expected and what came of it. PnL in USDT net of fees "
        "and slippage, before funding; returns are fractions of the entry's notional.",
        f"""
        SELECT run, position_id, positions.symbol, positions.side, entry_time, {_DAY.format("entry_time")} AS entry_day,
            extract(hour FROM entry_time AT TIME ZONE 'UTC')::int AS entry_hour, entry_price, quantity,
            quantity * entry_price AS notional, leverage, stop_loss, remaining_fraction, targets_filled, bars_held,
            realized_pnl AS pnl, exit_time, {_DAY.format("exit_time")} AS exit_day, {_reason("exit_reason")} AS
            exit_reason, exit_time IS NULL AS is_open, source AS model_id, score AS expected_return, realized_return,
            signals.open_time AS signal_time, close AS signal_close
        FROM positions LEFT JOIN signals USING (signal_id, run)
        LEFT JOIN raw_market_data AS bar ON bar.symbol = signals.symbol AND bar.open_time = signals.open_time
        """,
    ),
    View(
        "sessions",
        "A row is a session of trading, paper or live: by which model, how long, and how it stands. Money in USDT.",
        """
        SELECT run, detail ->> 'mode' AS mode, detail ->> 'environment' AS environment,
            detail ->> 'model_id' AS model_id, (detail ->> 'threshold')::float8 AS threshold, first_bar, last_bar,
            coalesce(bars, 0) AS bars, initial, coalesce(last_equity, initial) AS equity,
            last_equity / initial - 1 AS total_return, coalesce(drawdown, 0) AS max_drawdown,
            coalesce(closed, 0) AS trades_closed, coalesce(won, 0) AS trades_won, coalesce(open, 0) AS positions_open
        FROM (SELECT *, (detail #>> '{capital,initial}')::float8 AS initial FROM events WHERE kind = 'session') AS began
        LEFT JOIN (
            SELECT run, min(time) AS first_bar, max(time) AS last_bar, count(*) AS bars, min(drawdown) AS drawdown
            FROM bi.equity_curve GROUP BY 1
        ) AS curve USING (run)
        LEFT JOIN LATERAL (
            SELECT equity AS last_equity FROM equity WHERE run = began.run ORDER BY time DESC LIMIT 1
        ) AS newest ON true
        LEFT JOIN (
            SELECT run, count(exit_time) AS closed,
                count(*) FILTER (WHERE exit_time IS NOT NULL AND realized_pnl > 0) AS won,
                count(*) FILTER (WHERE exit_time IS NULL) AS open
            FROM positions GROUP BY 1
        ) AS book USING (run)
        """,
    ),
    View(
        "newest_session",
        "The one row is the session that a question is about where none is chosen: the one with the newest bar.",
        """
        SELECT run FROM events AS began
        LEFT JOIN LATERAL (SELECT max(equity.time) AS last_bar FROM equity WHERE equity.run = began.run) AS bars ON true
        WHERE kind = 'session' ORDER BY last_bar DESC NULLS LAST, length(run) DESC, run DESC LIMIT 1
        """,
    ),
    View(
        "open_positions",
        "A row is an open position: where its stop stands, what is lost if it fills there, and its price at the newest "
        "stored candle that its session has processed. USDT, before the costs of the exit.",
        f"""
        SELECT run, symbol, side, entry_time, entry_day, entry_price, quantity * remaining_fraction AS quantity_left,
            quantity * remaining_fraction * entry_price AS notional_left, leverage, targets_filled, bars_held,
            stop_loss, sign * (stop_loss / entry_price - 1) AS stop_distance,
            pnl + sign * (stop_loss - entry_price) * quantity * remaining_fraction AS pnl_at_stop,
            expected_return, newest.open_time AS price_time, newest.close AS price,
            pnl + sign * (newest.close - entry_price) * quantity * remaining_fraction AS pnl_now
        FROM (SELECT *, {_SIGN.format("side")} AS sign FROM bi.trades WHERE is_open) AS held
        LEFT JOIN LATERAL (
            SELECT open_time, close FROM raw_market_data AS bar
            WHERE bar.symbol = held.symbol AND bar.open_time >= held.entry_time
                AND bar.open_time <= (SELECT max(time) FROM equity WHERE equity.run = held.run)
            ORDER BY open_time DESC LIMIT 1
        ) AS newest ON true
        """,
    ),
    View(
        "slippage",
        "A row is a fill that had a price in mind: an entry against the close of its signal's bar, a stop against its "
        "level, an order of the exchange against its own price. Positive is worse for us; basis points and USDT.",
        f"""
        SELECT run, symbol, side, leg, time, {_DAY.format("time")} AS day, origin, wanted_price, fill_price, quantity,
            direction * (fill_price / wanted_price - 1) * 10000 AS slippage_bps,
            direction * (fill_price - wanted_price) * quantity AS slippage_usdt
        FROM (
            SELECT run, symbol, side, 'entry' AS leg, entry_time AS time, 'paper' AS origin,
                signal_close AS wanted_price, entry_price AS fill_price, quantity, {_SIGN.format("side")} AS direction
            FROM bi.trades WHERE NOT EXISTS (SELECT FROM executions WHERE executions.run = trades.run)
            UNION ALL
            SELECT events.run, positions.symbol, positions.side, detail ->> 'why', events.time, 'paper', stop_loss,
                (detail ->> 'price')::float8, (detail ->> 'quantity')::float8, -({_SIGN.format("positions.side")})
            FROM events JOIN positions ON position_id = detail ->> 'position_id' AND positions.run = events.run
            WHERE kind = 'fill' AND detail ->> 'why' IN ('stop', 'breakeven', 'lock')
            UNION ALL
            SELECT orders.run, orders.symbol, coalesce(trades.side, orders.side), leg, filled_at, 'exchange',
                coalesce(trigger_price::float8, price::float8, CASE WHEN NOT reduce_only THEN signal_close END),
                paid, filled, {_SIGN.format("orders.side")}
            FROM orders JOIN (
                SELECT order_link_id, max(executed_at) AS filled_at, sum(quantity)::float8 AS filled,
                    (sum(quantity * price) / sum(quantity))::float8 AS paid
                FROM executions GROUP BY 1
            ) AS executed USING (order_link_id)
            LEFT JOIN bi.trades ON trades.position_id = orders.position_id
        ) AS fills
        WHERE wanted_price IS NOT NULL
        """,
    ),
)

# --- operations -------------------------------------------------------------------------------------------------------

_OPERATIONS = (
    View(
        "session_events",
        "A row is an event of a session, as it was journalled; its time is the open of the bar that it belongs to.",
        f"""
        SELECT run, number, time, {_DAY.format("time")} AS day, kind, symbol, detail::text AS detail FROM events
        """,
    ),
    View(
        "decisions",
        "A row is a session, a day, a symbol, a side and an outcome: how many signals above the threshold were taken, "
        "or refused for that reason.",
        f"""
        SELECT run, {_DAY.format("open_time")} AS day, symbol, side, decision, reason, count(*) AS signals
        FROM signals WHERE {ABOVE_THRESHOLD} GROUP BY 1, 2, 3, 4, 5, 6
        """,
    ),
    View(
        "orders",
        "A row is an order that was sent to the exchange: its fate, the reason that the exchange gave, and the time "
        "from our record of it to its first execution.",
        f"""
        SELECT run, order_link_id, orders.symbol, orders.side, leg, attempt, order_type, status, reason, created_at,
            {_DAY.format("created_at")} AS day, first_executed_at,
            extract(epoch FROM first_executed_at - created_at)::float8 * 1000 AS milliseconds_to_fill
        FROM orders LEFT JOIN (
            SELECT order_link_id, min(executed_at) AS first_executed_at FROM executions GROUP BY 1
        ) AS executed USING (order_link_id)
        """,
    ),
)

# In an order in which each finds those that it reads.
VIEWS = (*_MARKET, *_LABELS, *_MODELS, *_DRIFT, *_TRADING, *_OPERATIONS)

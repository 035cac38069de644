"""The instruments that the local exchange lists: 51 as Bybit has them, others derived from their candles."""

from decimal import Decimal

import numpy as np

from perpcast.market import CandleSeries, Instrument

# symbol: tick size, quantity step (= minimum quantity), launch time in ms, and the price at which a synthetic market
# starts. The first three are shared/spec/bybit-v5.md section 5; the price is a round number of the right order.
_LISTED = """
BTCUSDT 0.10 0.001 1584230400000 47000
ETHUSDT 0.01 0.01 1615766400000 3700
SOLUSDT 0.010 0.1 1634256000000 170
XRPUSDT 0.0001 1 1620898440000 0.85
BNBUSDT 0.10 0.01 1624951080000 520
DOGEUSDT 0.00001 1 1622630640000 0.17
ADAUSDT 0.0001 1 1610668800000 1.3
LINKUSDT 0.001 0.1 1514764800000 20
DOTUSDT 0.0001 0.1 1616060040000 27
LTCUSDT 0.01 0.1 1514764800000 150
BCHUSDT 0.10 0.01 1514764800000 430
AVAXUSDT 0.001 0.1 1631664000000 110
TRXUSDT 0.00001 1 1628726400000 0.075
XLMUSDT 0.00001 1 1628726400000 0.27
UNIUSDT 0.001 0.1 1638230400000 17
AAVEUSDT 0.01 0.01 1620897660000 260
ATOMUSDT 0.001 0.1 1633910400000 32
NEARUSDT 0.001 0.1 1633910400000 15
FILUSDT 0.001 0.1 1624950900000 35
ETCUSDT 0.001 0.1 1624950240000 34
ICPUSDT 0.001 0.1 1631664000000 25
ALGOUSDT 0.0001 0.1 1632355200000 1.7
HBARUSDT 0.00001 1 1635120000000 0.29
VETUSDT 0.00001 1 1635120000000 0.08
XMRUSDT 0.01 0.01 1640143015000 230
CRVUSDT 0.0001 0.1 1635120000000 5
GALAUSDT 0.00001 1 1636416000000 0.45
SANDUSDT 0.0001 1 1635724800000 5.8
MANAUSDT 0.0001 0.1 1636329600000 3.2
AXSUSDT 0.001 0.1 1628726400000 94
THETAUSDT 0.0001 0.1 1628726400000 4.7
DYDXUSDT 0.0001 0.1 1633910400000 8
ENSUSDT 0.001 0.1 1636675200000 38
GRTUSDT 0.00001 0.1 1638748800000 0.65
RUNEUSDT 0.001 0.1 1638144000000 7
STXUSDT 0.00010 0.1 1638259183000 2.1
IMXUSDT 0.0001 0.1 1637712000000 4.5
OPUSDT 0.0001 0.1 1654059063000 1.4
ARBUSDT 0.0001 0.1 1679563660000 1.2
APTUSDT 0.0010 0.01 1666107272000 8
INJUSDT 0.0010 0.1 1660694400000 1.9
LDOUSDT 0.0001 0.1 1658300019000 1.5
SUIUSDT 0.00010 10 1683029724000 1.3
SEIUSDT 0.00010 1 1692156527000 0.2
WLDUSDT 0.0001 0.1 1690184920000 2.2
APEUSDT 0.0001 0.1 1647571477000 11
GMTUSDT 0.00001 1 1647667511000 0.7
SHIB1000USDT 0.000001 10 1634688000000 0.033
1000PEPEUSDT 0.0000010 100 1683108271000 0.0015
1000BONKUSDT 0.0000010 100 1672971039000 0.0012
1000FLOKIUSDT 0.00001 1 1677228986000 0.04
"""
# Read at run time by every client; what section 5 knows of 2025, and 50 for the rest.
_MAX_LEVERAGE = {"BTCUSDT": "100.00", "ETHUSDT": "100.00", "ADAUSDT": "75.00"}
FUNDING_INTERVAL_MINUTES = 480


def _instrument(symbol: str, tick_size: str, qty_step: str, launch_time_ms: int) -> Instrument:
    return Instrument(
        symbol=symbol,
        status="Trading",
        tick_size=Decimal(tick_size),
        qty_step=Decimal(qty_step),
        min_quantity=Decimal(qty_step),
        min_notional=Decimal(5),
        max_leverage=Decimal(_MAX_LEVERAGE.get(symbol, "50.00")),
        launch_time_ms=launch_time_ms,
        funding_interval_minutes=FUNDING_INTERVAL_MINUTES,
    )


_ROWS = [line.split() for line in _LISTED.split("\n") if line]
LISTED = {symbol: _instrument(symbol, tick, step, int(launch)) for symbol, tick, step, launch, _ in _ROWS}
START_PRICES = {symbol: float(price) for symbol, *_, price in _ROWS}


def instrument_of(symbol: str, series: CandleSeries) -> Instrument:
    """The listed instrument, or one derived from the decimals in the candles, launched with the first of them."""
    if symbol in LISTED:
        return LISTED[symbol]
    tick_size, qty_step = _smallest_step(series.close), _smallest_step(series.volume)
    return _instrument(symbol, tick_size, qty_step, int(series.open_time_ms[0]))


def _smallest_step(values: np.ndarray) -> str:
    """One unit of the last decimal in use, over the latest thousand values."""
    exponents = [Decimal(repr(value)).normalize().as_tuple().exponent for value in values[-1000:].tolist() if value]
    return format(Decimal(1).scaleb(min([0, *(e for e in exponents if isinstance(e, int))])), "f")

"""The local exchange: Bybit v5 over loopback, on recorded or synthetic candles, at a clock that may run faster.

Market side only; matching and orders move in later. Bybit's field names are written down here independently of
`perpcast.exchange`, so that the two check one another.

    clock      the market's time, on a wall that is handed in
    instruments  the listed symbols
    market     what every market offers, and what of it is visible at an instant
    recorded   a market of parquet files
    synthetic  a seeded market, with an optional planted edge
    oracle     what there is to know of a synthetic market's coming trades
    wire       Bybit's byte shapes
    signing    the check of signed requests
    rest, stream  the endpoints and the public WebSocket
    ip_limit, faults  what a request may meet before it is answered
    server     the running exchange
"""

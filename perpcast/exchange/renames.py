"""What the exchange's own lists do not tell: which contract goes on under another name, and which names mislead.

Names of USDT perpetuals, from shared/spec/bybit-v5.md section 5, which knows them until July 2026. A new name's candles
begin where it was listed: those of the old name are not part of them.
"""

# Old name: the contract of the same coin today.
RENAMED = {
    "EOSUSDT": "AUSDT",
    "FTMUSDT": "SUSDT",
    "GALUSDT": "GUSDT",
    "KLAYUSDT": "KAIAUSDT",
    "LITUSDT": "HEIUSDT",
    "MATICUSDT": "POLUSDT",
    "MKRUSDT": "SKYUSDT",
    "RAYUSDT": "RAYDIUMUSDT",
    "RNDRUSDT": "RENDERUSDT",
    "RONUSDT": "RONINUSDT",
}

# Names without a known successor, and what became of the coin.
ENDED = {
    "AGIXUSDT": "the coin merged into ASI or was rebranded",
    "FETUSDT": "the coin merged into ASI or was rebranded",
    "FXSUSDT": "the coin merged into ASI or was rebranded",
    "OCEANUSDT": "the coin merged into ASI or was rebranded",
    "TONUSDT": "Toncoin was being renamed Gram in June 2026: look for its new symbol",
}

# Names that more than one coin has had: candles from before the present contract's launch are another coin's.
REUSED = {
    "LITUSDT": "this name was Litentry's, now HEIUSDT",
    "MONUSDT": "this name was another coin's before",
}

LOOK_ALIKES = {
    "PUMPFUNUSDT": "not the coin of PUMPUSDT",
    "PUMPUSDT": "not the coin of PUMPFUNUSDT",
    "SONICUSDT": "not Sonic, the former FTMUSDT, which is SUSDT",
}

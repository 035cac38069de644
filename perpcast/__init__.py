"""Perpcast: what a disciplined trade would earn on Bybit perpetuals, learned, tested and traded by one rule."""

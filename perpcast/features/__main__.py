"""Prints docs/indicators.md, the table of the registry: python -m perpcast.features > docs/indicators.md"""

from perpcast.features.indicators import CANDLES_49, FEATURE_SET, Indicator, feature_version
from perpcast.features.inputs import CANDLE_SHAPE, KNOWN, WARMUP_BARS


def page() -> str:
    """The page in Markdown, from the registry alone."""
    head = (
        "| # | name | group | from | warm-up | model input | its warm-up | meaning |\n|---|---|---|---|---|---|---|---|"
    )
    rows = "\n".join(_row(number, indicator) for number, indicator in enumerate(CANDLES_49, 1))
    doubles = ", ".join(f"`{each.name}`" for each in CANDLES_49 if each.double)
    return f"""# Indicators

Written by `python -m perpcast.features` from the registry in `perpcast/features/indicators.py`.
Feature set `{FEATURE_SET}`, stored columns `{feature_version()}`.

Each is a column of `processed_market_data`, stored as REAL ({doubles}: double precision) and NULL where it is unknown:
before its *warm-up* (bars of a gap-free stretch that pass before its first value), on a missing bar, and where nothing
moved or traded in its window. *Model input* is what the network sees of the stored value x and of the candle, *its
warm-up* the bars before the first of those; the calendar enters as known inputs, which stand there by name. With
{WARMUP_BARS} bars of history every input is the one from all of history; how many each one needs was measured in
[decision 0003](decisions/0003-indicators-causal-and-warm-up.md).

{head}
{rows}

Beside them the model sees the candle's own shape, in units of `atr_pct`:
{_names(CANDLE_SHAPE)}.
"""


def _row(number: int, indicator: Indicator) -> str:
    transform, warmup = indicator.model_input, indicator.warmup
    if transform is None:
        form = _names(tuple(name for name in KNOWN if name.startswith(indicator.name)))
    else:
        form = (transform.__doc__ or "").strip()
    series = ", ".join(indicator.inputs)
    later = indicator.input_warmup or warmup
    cells = (number, f"`{indicator.name}`", indicator.group, series, warmup, form, later, indicator.meaning)
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(page(), end="")

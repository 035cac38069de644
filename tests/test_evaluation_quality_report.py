"""The page about the processed table: whole, readable, and with the numbers that were handed in."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from perpcast.evaluation.quality_report import QualityReport, write_quality_report
from perpcast.quality import RETURN_EDGES, Quality, SideQuality

JANUARY, FEBRUARY = 1_704_067_200_000, 1_706_745_600_000


def quality(bars: int, mean: float) -> Quality:
    counts = [0] * (len(RETURN_EDGES) + 1)
    counts[4] = bars
    side = SideQuality(bars, mean * bars, bars // 2, bars // 20, (0, bars, 0, 0, 0, 0), tuple(counts))
    return Quality(bars, bars - 33, 2, 1, 0, {"buy": side, "sell": side})


@pytest.mark.parametrize("rows", [0, 1, 30_000])
def test_page_holds_every_symbol_and_its_pictures(tmp_path: Path, rows: int) -> None:
    report = QualityReport(
        market="a market <of> tests",
        months={
            "BTCUSDT": {JANUARY: quality(2976, 0.001), FEBRUARY: quality(2784, -0.002)},
            "NEWUSDT": {FEBRUARY: quality(100, 0.0)},
        },
        gap_bars={"BTCUSDT": {"exchange_outage": 40, "flat_run": 9}},
        columns=["a", "b", "constant"],
        sample=np.column_stack([np.random.default_rng(1).normal(size=(rows, 2)), np.ones(rows)]),
    )
    page = write_quality_report(report, tmp_path / "reports" / "dataset").read_text()
    assert "a market &lt;of&gt; tests" in page
    assert "2024-01-01" in page
    assert "5,760" in page  # 2976 + 2784 bars
    assert page.count("data:image/png;base64,") == 3
    for name in ("label_distribution", "base_rates", "indicator_correlation"):
        picture = imread(tmp_path / "reports" / "dataset" / f"{name}.png")
        assert picture.shape[1] > 1000
        assert np.ptp(picture[..., :3]) > 0.5
    numbers = json.loads((tmp_path / "reports" / "dataset" / "quality.json").read_text())
    assert numbers["BTCUSDT"]["gap_bars"] == {"exchange_outage": 40, "flat_run": 9}
    assert numbers["BTCUSDT"]["sides"]["buy"]["labels"] == 5760

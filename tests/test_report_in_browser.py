"""The pages as a reader sees them, in a headless Chromium: on a telephone, on a desk, on paper."""

from pathlib import Path

import numpy as np
import pytest

from perpcast.evaluation.plots import DPI, WIDTH
from perpcast.evaluation.quality_report import QualityReport, write_quality_report
from perpcast.evaluation.report import write_report
from perpcast.evaluation.trading_plots import PAGE_WIDTH
from perpcast.quality import Quality
from tests.browser import NAMES, Look, browser_on_path, look_at
from tests.report_world import report, whole_report

pytestmark = pytest.mark.skipif(browser_on_path() is None, reason=f"no browser on PATH: none of {', '.join(NAMES)}")

TELEPHONE, DESK = 390, 1440
PAPER = 703  # A4 between its margins, in CSS pixels: (210 - 24) mm / 25.4 x 96


def assert_sound(look: Look, width: int, pictures: int) -> None:
    assert (look.page, look.content) == (width, width)
    assert look.beyond == ()
    assert (look.pictures, look.missing, look.unnamed) == (pictures, (), 0)
    assert look.complaints == ()
    assert look.requests == ()
    assert look.png.startswith(b"\x89PNG")


def assert_page_is_sound(page: Path, pictures: int) -> tuple[Look, Look, Look]:
    telephone, desk, paper = look_at(page, ("screen", TELEPHONE), ("screen", DESK), ("print", PAPER))
    for look, width in ((telephone, TELEPHONE), (desk, DESK), (paper, PAPER)):
        assert_sound(look, width, pictures)
    return telephone, desk, paper


def test_report_fits_a_telephone_a_desk_and_paper(tmp_path: Path) -> None:
    run = whole_report()
    page = write_report(run, tmp_path)
    shown = len(list(tmp_path.glob("*.png"))) - 1  # of the two of the account each width shows one
    telephone, desk, paper = assert_page_is_sound(page, shown)
    assert telephone.height > desk.height
    for look in (telephone, desk, paper):
        assert look.text.startswith(run.market)
        assert run.evaluation.verdict.sentence in look.text
    # What is folded away on a screen is on paper.
    assert "COIN0USDT" not in desk.text
    assert "COIN0USDT" in paper.text
    assert (telephone.chosen, desk.chosen) == ((WIDTH * DPI,), (PAGE_WIDTH * DPI,))


def test_report_of_a_run_with_nothing_more_to_show_fits_too(tmp_path: Path) -> None:
    assert_page_is_sound(write_report(report(), tmp_path), len(list(tmp_path.glob("*.png"))))


def test_quality_page_fits_too(tmp_path: Path) -> None:
    months = {f"COIN{number}USDT": {1_704_067_200_000: Quality(bars=2976)} for number in range(12)}
    table = QualityReport("a market", months, {}, ["a", "b"], np.random.default_rng(1).normal(size=(100, 2)))
    assert_page_is_sound(write_quality_report(table, tmp_path), 3)


FAULTS = """<!doctype html><title>faults</title><link rel="icon" href="data:,"><style>body { margin:0 }</style>
<p class="wide" style="width:2000px">too wide</p>
<div style="overflow-x:auto"><p style="width:2000px">this one scrolls</p></div>
<img src="missing.png" alt="a missing picture"><img src="data:image/png;base64,AAAA">
<script>console.error("what went wrong"); undefined_function()</script>"""


def test_the_browser_sees_what_is_amiss(tmp_path: Path) -> None:
    (tmp_path / "faults.html").write_text(FAULTS)
    (look,) = look_at(tmp_path / "faults.html", ("screen", DESK))
    assert (look.page, look.content) == (1440, 2000)
    assert look.beyond == ("P.wide too wide",)
    assert look.missing == ("a missing picture", "")
    assert look.unnamed == 1
    assert look.requests == ((tmp_path / "missing.png").as_uri(),)
    said = " ".join(look.complaints)
    for words in ("what went wrong", "Uncaught", "ERR_FILE_NOT_FOUND"):
        assert words in said

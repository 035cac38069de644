"""The catalogue of faults: each is injected by a test, and the page that says so is the present one."""

from pathlib import Path

import pytest

from tests.faults import AREAS, CATALOGUE, PAGE, Fault, marked_tests, page

IDS = [fault.id for fault in CATALOGUE]


@pytest.fixture(scope="module")
def marked() -> dict[str, list[str]]:
    return marked_tests()


@pytest.mark.parametrize("id", IDS)
def test_fault_is_injected_by_a_test(marked: dict[str, list[str]], id: str) -> None:
    assert id in marked, f'no test is marked @pytest.mark.fault("{id}")'


def test_marks_name_faults_of_the_catalogue(marked: dict[str, list[str]]) -> None:
    assert set(marked) <= set(IDS)


def test_faults_are_listed_once_by_area_and_number() -> None:
    assert sorted(set(IDS), key=lambda id: ([*AREAS].index(id[0]), id)) == IDS


def test_page_is_what_the_marks_say(marked: dict[str, list[str]]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(CATALOGUE, marked), "run: python -m tests.faults"


def test_marks_are_found_in_decorators_and_in_the_constants_that_these_name(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        'CASES = [pytest.param(3, marks=pytest.mark.fault("D03"))]\n'
        '@pytest.mark.fault("D01", "D02")\n'
        '@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.fault("D01")), 2, *CASES])\n'
        "def test_this(n): ...\n"
        '@pytest.mark.parametrize("n", CASES)\n'
        "def test_that(n): ...\n"
    )
    this, that = "test_one.py::test_this", "test_one.py::test_that"
    assert marked_tests(tmp_path) == {"D01": [this], "D02": [this], "D03": [this, that]}


def test_mark_that_belongs_to_no_test_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text('\npytestmark = pytest.mark.fault("D03")\n')
    with pytest.raises(ValueError, match=r"test_two\.py: line 2: a fault mark belongs to no test"):
        marked_tests(tmp_path)


def test_page_has_a_row_for_each_fault() -> None:
    text = page([Fault("B99", "it breaks", "it is mended")], {"B99": ["a.py::test_a", "b.py::test_b"]})
    assert "| B99 | it breaks | it is mended | `a.py::test_a`<br>`b.py::test_b` |\n" in text

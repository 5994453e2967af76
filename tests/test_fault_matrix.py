"""The matrix of docs/faults.md is what the tests show."""

import pytest

from fault_matrix import BEGIN, CASES, END, PAGE, collected, shown, table
from support import TRANSPORTS


@pytest.fixture(scope="module")
def tests() -> dict[str, set[str]]:
    return collected()


def test_no_case_is_forgotten() -> None:
    assert [*CASES] == [*range(1, 34)]


@pytest.mark.parametrize("number", CASES)
def test_each_case_is_shown_or_left_out(number: int, tests: dict[str, set[str]]) -> None:
    case = CASES[number]
    on = shown(case, tests)
    left_out = {name for names in case.left_out for name in names}
    assert on | left_out >= set(TRANSPORTS), "a gap without a reason"


def test_the_page_shows_it(tests: dict[str, set[str]]) -> None:
    page = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert page.strip() == table(tests).strip(), "run: .venv/bin/python tests/fault_matrix.py"

"""The pages' figures are README's, and README's are those of a run."""

import pytest

import figures
from ipc_bridge.harness import parts
from test_report import small_run

TO_MEND = "run: .venv/bin/python tests/figures.py"


@pytest.mark.parametrize("transport", list(parts.transports()))
def test_a_page_has_the_figures_of_readme(transport: str) -> None:
    page = figures.page_of(transport).read_text()
    made = figures.page_figures(figures.README.read_text(), transport)
    assert figures.figures(page, transport) == made.strip(), TO_MEND


def test_readme_takes_the_figures_of_a_run() -> None:
    before = figures.README.read_text()
    after = figures.readme_with(before, small_run((64, 64 << 10)))

    made = figures.page_figures(after, "pipe").splitlines()
    assert made[-4] == "| | C++ -> C++ | C++ -> Python | each / C++ floor |"
    assert made[-2].startswith("| echo of 64 bytes, median us | 8.24 (2) |")
    for setting in figures.SETTINGS:
        before = figures.replaced(before, setting, figures.figures(after, setting))
    assert before == after, "nothing else has changed"

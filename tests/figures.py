"""The figures in README and on the transports' pages: all of one run, none typed by hand.

    python tests/figures.py [RESULTS]

With the results of a run, README's tables and the plots in docs/results/ are made of them, as a
report's are. The pages' tables are rows of README's; test_docs.py holds both together.
"""

import sys
from pathlib import Path

from ipc_bridge.harness import parts, plots, results
from ipc_bridge.harness.report import markdown_table
from ipc_bridge.harness.results import Document
from ipc_bridge.harness.table import groups
from support import ROOT

README = ROOT / "README.md"
PLOTS = ROOT / "docs" / "results"
END = "<!-- end of the figures -->"
SETTINGS = {  # of README's tables: what the pages call them
    "echo 64B block same-core": "echo of 64 bytes, median us",
    "stream 64KiB block cross-core": "stream of 64 KiB items, MB/s",
}
INTRO = """\
In [README's run](../README.md#results), where peers sleep in the kernel, for the echo both on one
core (in brackets: the place; 2-4 is a tie):
"""


def begin(of: str) -> str:
    return f"<!-- figures: {of} -->"


def figures(text: str, of: str) -> str:
    """What stands between the marks."""
    assert begin(of) in text, of
    return text.partition(begin(of))[2].partition(END)[0].strip()


def replaced(text: str, of: str, figures: str) -> str:
    """The text with other figures between the marks."""
    head, mark, rest = text.partition(begin(of))
    assert mark, of
    return f"{head}{mark}\n\n{figures.strip()}\n\n{END}{rest.partition(END)[2]}"


def readme_with(text: str, document: Document) -> str:
    """README with the tables of a run."""
    found = {group.title(): group for group in groups(document)}
    for setting in SETTINGS:
        assert setting in found, f"the run has no {setting}"
        text = replaced(text, setting, "\n".join(markdown_table(found[setting])))
    return text


def page_figures(readme: str, transport: str) -> str:
    """A page's figures: its rows of README's tables."""
    schemes = parts.transports()[transport].schemes
    lines: list[str] = []
    for scheme in schemes:
        for setting, name in SETTINGS.items():
            heads, align, *rows = figures(readme, setting).splitlines()
            row = next((row for row in rows if row.startswith(f"| `{scheme}` |")), "")
            assert row, f"the run has no {scheme}"
            lines = lines or [heads.replace("| transport |", "| |"), align]
            name = f"`{scheme}`: {name}" if len(schemes) > 1 else name
            lines.append(row.replace(f"`{scheme}`", name, 1))
    return INTRO + "\n" + "\n".join(lines)


def page_of(transport: str) -> Path:
    return ROOT / "docs" / f"{transport}.md"


def draw(document: Document) -> None:
    """README's plots."""
    for group in groups(document):
        if group.title() in SETTINGS:
            canvas = plots.intervals(group).canvas
            canvas.savefig(PLOTS / f"{group.cell.op}.svg", metadata={"Date": None})


def main(where: list[str]) -> None:
    document = results.load(results.newest(Path(where[0]))) if where else None
    texts = {README: README.read_text()}
    if document:
        texts[README] = readme_with(texts[README], document)
    for transport in parts.transports():
        page = page_of(transport)
        made = page_figures(texts[README], transport)
        texts[page] = replaced(page.read_text(), transport, made)
    for path, text in texts.items():
        path.write_text(text)
    if document:
        draw(document)


if __name__ == "__main__":
    main(sys.argv[1:])

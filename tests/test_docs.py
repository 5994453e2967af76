"""README and docs: every snippet runs as it stands, every link leads somewhere, words are spelled
right, and every transport has its page."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs_support import FENCE, PAGES, Place, compile_cpp, cpp_program, script, snippets
from ipc_bridge.harness import parts
from support import BUILD, QUICK, ROOT, SLOW, own_port

TIMEOUT_S = 170.0 * SLOW
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("proto/*.md")]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")

pytestmark = pytest.mark.timeout(TIMEOUT_S + 10)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="ipcb-", dir="/tmp") as directory, own_port() as port:
        yield Place(directory, port)


@pytest.fixture(scope="module")
def cpp(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that holds the C++ snippets of all pages."""
    directory = tmp_path_factory.mktemp("snippets")
    source = directory / "snippets.cpp"
    source.write_text(cpp_program(PAGES, place))
    compile_cpp(source, directory / "snippets")
    return directory / "snippets"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_run(page: Path, place: Place, cpp: Path, tmp_path: Path) -> None:
    links = {"ipc-bridge": ROOT, ".venv": ROOT / ".venv", "build": BUILD, "snippets": cpp}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    done = subprocess.run(
        ["bash", "-c", script(page, place)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=os.environ | QUICK | {"CCACHE_BASEDIR": str(tmp_path)},
    )

    assert done.returncode == 0, done.stdout
    assert os.listdir(place.directory) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_not_run_says_why(page: Path) -> None:
    for snippet in snippets(page):
        runs = snippet.language in ("sh", "python", "cpp")
        assert runs or snippet.file or snippet.skipped or snippet.language in ("", "proto"), snippet


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        assert not re.match(r"https?://(localhost|127\.)", link)
        if re.match(r"[a-z]+:", link):
            continue  # another site; nothing here asks it
        target, _, anchor = link.partition("#")
        file = (page.parent / target) if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_words_are_spelled_right() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *map(str, PROSE)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("transport", list(parts.transports()))
def test_every_transport_has_a_page(transport: str) -> None:
    page = ROOT / "docs" / f"{transport}.md"
    text = page.read_text()

    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == ["When", "How the peers meet", "Traps", "Limits", "Try it", "Figures"]
    assert {"sh", "python", "cpp"} <= {snippet.language for snippet in snippets(page)}
    assert f"({transport}.md)" in (ROOT / "docs" / "README.md").read_text()

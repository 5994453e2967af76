"""Runs a page's snippets, word for word: each page becomes one shell script.

    <!-- file: NAME -->     the next snippet is that file
    <!-- not run: WHY -->   the next snippet is not for running

Of the others, `sh` runs as it is, in order, with a server (a line that serves) in the background;
Python is a program of its own, and C++ a function's body, all pages' in one program; what serves is
in the background. `make TARGET` is looked at, not made. The only words replaced are /tmp/ and the
port 5000, so that test runs do not meet.
"""

import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from support import BUILD, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- (?P<told>file|not run): (?P<what>[^\n]*) -->\n\n?)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
SERVES = re.compile(r"^(\S+ -m )?\S+ serve |^\S*-server |^(\S+=\S+ )*\S+ -m \w+\.server ")
SCRIPT = """set -euo pipefail
trap 'kill -INT $(jobs -p) 2>/dev/null || true; wait' EXIT
set -x
"""
BEHIND = "env --default-signal=INT {} &"  # a shell's & ignores Ctrl-C, and we mean to press it


class Snippet(NamedTuple):
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    file: str  # it is to be written there; "": it is to be run
    skipped: str  # why it is not run

    @property
    def name(self) -> str:
        """A C++ function, or a Python file."""
        return f"{self.page.stem.lower().replace('-', '_')}_{self.line}"


def snippets(page: Path) -> Iterator[Snippet]:
    """All snippets of a page."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        told, what = found["told"] or "", found["what"] or ""
        yield Snippet(
            page,
            text.count("\n", 0, found.start("text")),
            found["language"],
            found["text"],
            what if told == "file" else "",
            what if told == "not run" else "",
        )


class Place(NamedTuple):
    """Where addresses are, for one run of the tests."""

    directory: str
    port: int

    def put(self, text: str) -> str:
        """The text, with addresses of this run's own."""
        return text.replace("/tmp/", self.directory + "/").replace(":5000", f":{self.port}")


def script(page: Path, place: Place) -> str:
    """The page as a shell script; ./snippets are those in C++."""
    lines = [SCRIPT]
    for snippet in snippets(page):
        if snippet.skipped:
            continue
        if snippet.file:
            lines.append(here(snippet.file, snippet.text))
        elif snippet.language == "sh":
            lines += [command(line) for line in snippet.text.replace("\\\n", " ").splitlines()]
        elif snippet.language == "python":
            lines.append(here(f"{snippet.name}.py", snippet.text))
            words = f".venv/bin/python {snippet.name}.py"
            lines.append(BEHIND.format(words) if "serve(" in snippet.text else words)
        elif snippet.language == "cpp":
            words = f"./snippets {snippet.name}"
            lines.append(BEHIND.format(words) if "->run();" in snippet.text else words)
    return place.put("\n".join(lines) + "\n")


def here(name: str, text: str) -> str:
    """Shell words that write a file."""
    return f"mkdir -p $(dirname {name})\ncat > {name} <<'END_OF_FILE'\n{text}END_OF_FILE"


def command(line: str) -> str:
    """One line of a snippet: a server runs on, a make is only looked at."""
    line = line.partition("  #")[0].rstrip(" &")
    if line.startswith("make "):
        return f"make -n -C {shlex.quote(str(ROOT))} {line[5:]} >/dev/null"
    return BEHIND.format(line) if SERVES.match(line) else line


# --- C++ ---


def cpp_program(pages: Iterable[Path], place: Place) -> str:
    """A program with a function for each snippet of C++ that is no file; it calls one by name."""
    found = [
        snippet
        for page in pages
        for snippet in snippets(page)
        if snippet.language == "cpp" and not snippet.file and not snippet.skipped
    ]
    includes = {
        line
        for snippet in found
        for line in snippet.text.splitlines()
        if line.startswith("#include")
    }
    lines = [*sorted(includes), "#include <cstring>", "#include <ipc_bridge/endpoint.hpp>"]
    for snippet in found:
        body = re.sub(r"^#include.*\n", "", snippet.text, flags=re.M)
        where = f'#line {snippet.line + 1} "{snippet.page}"'
        lines += [f"static void {snippet.name}() {{", where, body.rstrip("\n"), "}"]
    lines.append("int main(int, char** argv) {")
    lines += [f'if (!std::strcmp(argv[1], "{one.name}")) return {one.name}(), 0;' for one in found]
    lines.append("return 2;\n}")
    return place.put("\n".join(lines) + "\n")


def compile_cpp(source: Path, program: Path) -> None:
    """Build a file as the build builds the probe: with all that the library may need."""
    listed = subprocess.run(
        ["ninja", "-C", str(BUILD), "-t", "commands", "probe"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    probe = str(ROOT / "tests" / "cpp" / "probe.cpp")
    compiling = next(line for line in listed.splitlines() if line.endswith(f"-c {probe}"))
    linking = listed.splitlines()[-1]
    target = re.search(r" -o (\S+\.o) ", compiling)
    assert target
    made = f"{program}.o"
    for line in (compiling, linking):
        line = line.replace(target[1], made).replace(probe, str(source))
        line = line.replace(" -o probe ", f" -o {program} ").replace(" -Werror", "")
        line = re.sub(r" -O\d\b", " -O0", line)
        subprocess.run(line, shell=True, cwd=BUILD, check=True)

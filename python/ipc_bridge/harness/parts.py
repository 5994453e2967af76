"""What a transport consists of, read from the code itself: its imports, its includes, and the map
from a URL to a transport.

Nothing here is a list kept by hand, except what no source can say: which package brings a module or
a header of somebody else (PYTHON_PACKAGES, CPP_PACKAGES).
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ipc_bridge.harness.programs import ROOT

PACKAGE = "ipc_bridge"
# The sources: those that a wheel holds for us (see CMakeLists.txt), or the checkout around us.
HELD = Path(__file__).with_name("tree")
TREE = HELD if HELD.is_dir() else ROOT
SOURCES = {"py": TREE / "python", "cpp": TREE / "cpp"}
SUFFIX = {"py": ".py", "cpp": ".hpp"}
ENTRY = ["dial", "listen"]  # of `endpoint`: all that an export needs of it
FOR_ECHO = {"connect", "serve"}  # of `endpoint`: the same with echo and stream
GENERATED = re.compile(r"_pb2(_grpc)?$|\.pb\.h$")  # from bridge.proto, by whoever builds

PROTO = "google"  # among what others bring: the messages of bridge.proto, and protobuf

NATIVE = SOURCES["cpp"] / "native.cpp"  # Python's module in C++
NANOBIND = "nanobind"  # among what others bring: what builds that module

# A module's first name: the distribution that brings it. Its versions stand in pyproject.toml.
PYTHON_PACKAGES = {
    PROTO: "protobuf",
    NANOBIND: "nanobind",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "sysv_ipc": "sysv-ipc",
    "zmq": "pyzmq",
}


@dataclass(frozen=True)
class Library:
    """A C++ library: how CMake finds and links it, and the Debian packages that bring it."""

    find: str
    link: str
    debian: str


# The first part of an include: the library that brings it. Others are the compiler's and libc's.
CPP_PACKAGES = {
    PROTO: Library(
        "find_package(Protobuf REQUIRED)",
        "protobuf::libprotobuf",
        "libprotobuf-dev protobuf-compiler",
    ),
    "grpcpp": Library(
        "find_package(gRPC CONFIG REQUIRED)",
        "gRPC::grpc++ gRPC::grpc++_reflection",
        "libgrpc++-dev protobuf-compiler-grpc",
    ),
    "zmq.hpp": Library("", "zmq", "libzmq3-dev cppzmq-dev"),
}


@dataclass(frozen=True)
class Transport:
    """One row of the map: its name, its URL schemes, and the stem of its files."""

    name: str
    schemes: tuple[str, ...]
    stem: str


# --- Python: by its syntax tree ---


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each module that is imported, wherever that stands, with a name that is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def python_file(module: str) -> Path | None:
    """The file of a module of ours."""
    path = SOURCES["py"].joinpath(*module.split("."))
    return next(
        (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None
    )


def uses_python(path: Path, text: str) -> tuple[set[Path], set[str]]:
    """The files of ours that a file of this text imports, and the first names of what others
    bring."""
    ours, others = set(), set()
    for module, name in imports(ast.parse(text)):
        first = module.partition(".")[0]
        if GENERATED.search(module):
            others.add(PROTO)
            continue
        native = SOURCES["py"].joinpath(*module.split("."), name + ".pyi")
        if first == PACKAGE and native.exists() and not native.with_suffix(".py").exists():
            ours |= {native, NATIVE}  # a module in C++: its types, its source
            others.add(NANOBIND)
            continue
        if first == PACKAGE:
            file = python_file(f"{module}.{name}") or python_file(module)
            if file is not None:
                ours.add(file)
        elif first not in sys.stdlib_module_names and first != path.parent.name:
            others.add(first)
    return ours, others


# --- C++: by its includes ---

INCLUDE = re.compile(r'^#include [<"]([^>"]+)[>"]', re.M)


def uses_cpp(path: Path, text: str) -> tuple[set[Path], set[str]]:
    """The headers of ours that a file of this text includes, and the first parts of what others
    bring."""
    ours, others = set(), set()
    for name in INCLUDE.findall(text):
        if GENERATED.search(name):
            others.add(PROTO)
        elif name.startswith(PACKAGE + "/"):
            ours.add(SOURCES["cpp"] / name)
        elif not (path.parent / name).exists():
            others.add(name.partition("/")[0])
    source = path.with_suffix(".cpp")  # not every header is all there is
    return ours | ({source} if source.exists() else set()), others & {PROTO, *CPP_PACKAGES}


USES: dict[str, Callable[[Path, str], tuple[set[Path], set[str]]]] = {
    "py": uses_python,
    "cpp": uses_cpp,
}


def closure(start: Iterable[Path]) -> tuple[set[Path], set[str]]:
    """All files of ours that some files need, themselves among them, and what others must bring.

    `endpoint` is not followed: it knows every transport, and an export gets it cut down.
    """
    found: set[Path] = set()
    others: set[str] = set()
    due = list(start)
    while due:
        path = due.pop()
        if path in found or path.stem == "endpoint":
            continue
        found.add(path)
        if path.suffix == ".pyi":
            continue
        language = "py" if path.suffix == ".py" else "cpp"
        ours, foreign = USES[language](path, path.read_text())
        due += ours
        others |= foreign
    return found, others


# --- the map from a URL to a transport ---


def endpoint_file(language: str) -> Path:
    """The map's file."""
    return SOURCES[language] / PACKAGE / f"endpoint{SUFFIX[language]}"


def transports() -> dict[str, Transport]:
    """Every transport by name: a URL's scheme up to a plus, so that zmq+ipc and zmq+tcp are one."""
    tree = parse(endpoint_file("py"))
    makers = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    uses = {name: names_in(node) for name, node in makers.items()}
    classes = {name: stem for stem, name in transport_imports(tree)}
    found: dict[str, Transport] = {}
    for scheme, maker in scheme_rows(tree):
        name = scheme.partition("+")[0]
        kept = reach([maker], uses)
        stems = {classes[used] for one in kept for used in uses[one] if used in classes}
        stems |= {stem for one in kept for stem, _ in transport_imports(makers[one])}
        (stem,) = stems
        schemes = found[name].schemes if name in found else ()
        found[name] = Transport(name, (*schemes, scheme), stem)
    return found


def transport_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The imports of transports: a stem, and the name that is taken from it."""
    folder = f"{PACKAGE}.transports"
    for module, name in imports(tree):
        if module == folder:
            yield name, name
        elif module.startswith(folder + "."):
            yield module.removeprefix(folder + "."), name


def scheme_rows(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """SCHEMES: each scheme with the name of the function that makes its transport."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SCHEMES":
            assert isinstance(node.value, ast.Dict)
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                assert isinstance(key, ast.Constant)
                yield str(key.value), ast.unparse(value)


def names_in(node: ast.AST) -> set[str]:
    """The plain names that a piece of code uses."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def cut_endpoint(language: str, schemes: Iterable[str]) -> str:
    """`endpoint` with only these schemes, and only what finding their transports takes."""
    wanted = set(schemes)
    source = endpoint_file(language).read_text()
    row = re.compile(r'^ +\{?"([a-z+-]+)"[:,] \w+\}?,\n', re.M)
    source = row.sub(lambda match: match[0] if match[1] in wanted else "", source)
    cut = cut_python if language == "py" else cut_cpp
    return cut(source, "The one map from a URL to a transport; here: " + ", ".join(sorted(wanted)))


def cut_python(source: str, head: str) -> str:
    """Keep what `dial` and `listen` reach."""
    tree = ast.parse(source)
    lines = source.splitlines()
    blocks: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            blocks[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            blocks[ast.unparse(target)] = node
    kept = reach(ENTRY, {name: names_in(node) for name, node in blocks.items()})
    used = set().union(*(names_in(blocks[name]) for name in kept))
    parts = [f'"""{head}.\n\nOptions follow as a query, as in `?wait=spin`.\n"""', ""]
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in used]
            parts += [ast.unparse(node)] if node.names else []
    for name, node in blocks.items():
        if name in kept:
            is_short = isinstance(node, ast.Assign | ast.AnnAssign)
            gap = 1 if is_short and parts[-1].startswith(("import", "from")) else 2
            above = [one.lineno for one in getattr(node, "decorator_list", [])]
            parts += [""] * gap + lines[min([node.lineno, *above]) - 1 : node.end_lineno]
    return "\n".join(parts) + "\n"


DEFINED = re.compile(
    r"^(?:struct|class) (\w+)"
    r"|^using (\w+) ="
    r"|^(?:\[\[\w+\]\] )?inline [^(={;]*?(\w+)(?:\[\])? ?[(={;]",
    re.M,
)


def cut_cpp(source: str, head: str) -> str:
    """Keep what `dial` and `listen` reach."""
    paragraphs = list(paragraphs_of(source[source.index("#pragma once") :]))
    words: dict[str, set[str]] = {}
    for paragraph in paragraphs:
        for name in defines(paragraph):
            code = re.sub(r"^//.*$", "", paragraph, flags=re.M)
            words.setdefault(name, set()).update(re.findall(r"\w+", code))
    kept = reach(ENTRY, words)
    used = set().union(*(words[name] for name in kept))
    parts = []
    for paragraph in paragraphs:
        defined = defines(paragraph)
        if not defined or defined & kept:
            parts.append(
                INCLUDE_LINE.sub(lambda match: match[0] * is_used(match[1], used), paragraph)
            )
    return "\n\n".join(
        [f"// {head}.\n//\n// Options follow as a query, as in `?wait=spin`.", *parts]
    )


def defines(paragraph: str) -> set[str]:
    """The names that a paragraph defines."""
    return {name for names in DEFINED.findall(paragraph) for name in names if name}


INCLUDE_LINE = re.compile(r"^#include <(.+)>\n?", re.M)


def paragraphs_of(source: str) -> Iterator[str]:
    """The pieces between blank lines outside of braces; those of a namespace do not count."""
    piece = ""
    for part in source.split("\n\n"):
        piece += ("\n\n" if piece else "") + part
        if piece.count("{") == piece.count("}") or re.search(r"^\}?.*\bnamespace\b", piece):
            yield piece
            piece = ""


def is_used(include: str, used: set[str]) -> bool:
    """Is anything used that a header of ours defines? (Of others, nobody knows.)"""
    return not include.startswith(PACKAGE) or bool(used & defined_in(SOURCES["cpp"] / include))


def defined_in(header: Path) -> set[str]:
    """The types that a header of ours defines."""
    pattern = r"^(?:enum )?(?:class|struct|using) (?:\[\[.*\]\] )?(\w+)"
    return set(re.findall(pattern, header.read_text(), re.M))


def reach(start: Iterable[str], uses: dict[str, set[str]]) -> set[str]:
    """The definitions that some need, themselves among them."""
    kept: set[str] = set()
    due = list(start)
    while due:
        name = due.pop()
        if name in uses and name not in kept | FOR_ECHO:
            kept.add(name)
            due += uses[name]
    return kept


# --- how much it is ---


def code_lines(name: str, text: str) -> int:
    """Lines that hold code: not blank, not comment alone, not docstring."""
    if name.endswith((".hpp", ".cpp")):
        lines = (line.strip() for line in text.splitlines())
        return sum(1 for line in lines if line and not line.startswith("//"))
    if not name.endswith(".py"):
        return 0
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)

"""`ipc-bridge export`: a transport as a project of its own, with a service to edit.

What is written is read from the sources (see `parts`): the transport, the core that it needs, the
thermostat of python/thermostat and cpp/thermostat, and the files of project/. In those that end
with .in

    @NAME@        is filled in,
    @cpp LINE     is kept only if C++ is exported; likewise @py and @both, @venv if Python takes
                  packages, @cppproto and @pyproto if a half takes what protoc makes, @native if
                  Python has a module in C++, @build if there is anything to compile, @proto if
                  bridge.proto is there, @framed if a transport speaks FRAME.md.

A manifest in the new project names every file that was written, with its SHA-256, so that a later
export knows what is still as it was written; it touches nothing else.
"""

import ast
import ctypes
import hashlib
import json
import keyword
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

import ipc_bridge
from ipc_bridge.console import CommandLineError
from ipc_bridge.errors import Error, Status, SystemError
from ipc_bridge.harness import parts
from ipc_bridge.harness.parts import NANOBIND, PACKAGE, PROTO, SOURCES, SUFFIX, TREE, Transport

PROJECT = Path(__file__).resolve().parent / "project"
SERVICE = "thermostat"
MANIFEST = ".exported.json"
LANGUAGES = {"cpp": ["cpp"], "python": ["py"], "both": ["cpp", "py"]}
TITLES = {"cpp": "C++", "py": "Python"}
TOPS = {"cpp": "cpp", "py": "python"}
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
TAKEN = {SERVICE, "transports", "tests", "std", "rounds", "main"}  # they mean something else there
TAKEN |= set(parts.PYTHON_PACKAGES)
TAKEN |= {"unix", "linux"}  # gcc's macros
TAKEN |= {"all", "clean", "help", "install", "package", "test"}  # CMake's own targets
# Those that are not Python's as well.
CPP_KEYWORDS = """
    alignas alignof and_eq asm auto bitand bitor bool case catch char char8_t char16_t char32_t
    co_await co_return co_yield compl concept const const_cast consteval constexpr constinit
    decltype default delete do double dynamic_cast enum explicit export extern false float friend
    goto inline int long mutable namespace new noexcept not_eq nullptr operator or_eq private
    protected public register reinterpret_cast requires short signed sizeof static static_assert
    static_cast struct switch template this thread_local throw true typedef typeid typename union
    unsigned using virtual void volatile wchar_t xor xor_eq
"""
INIT = f'"""The library: how bytes travel. Leave it as it is; the service is in {SERVICE}/."""\n'

Files = dict[str, str]  # path in the new project: text


# --- what a project consists of ---


def pair_files(chosen: list[Transport], languages: list[str]) -> Files:
    """The transports, their core, the service and its programs, and all around them."""
    files: Files = {}
    foreign: dict[str, set[str]] = {"py": set(), "cpp": set()}
    schemes = [scheme for transport in chosen for scheme in transport.schemes]
    for language in languages:
        service = sorted((SOURCES[language] / SERVICE).iterdir())
        service = [path for path in service if path.suffix in (".py", ".hpp", ".cpp")]
        folder = SOURCES[language] / PACKAGE / "transports"
        stems = {transport.stem for transport in chosen}
        endpoint = parts.endpoint_file(language).relative_to(SOURCES[language])
        files[f"{TOPS[language]}/{endpoint}"] = cut = parts.cut_endpoint(language, schemes)
        start = [*service, *(folder / f"{stem}{SUFFIX[language]}" for stem in stems)]
        start += parts.USES[language](parts.endpoint_file(language), cut)[0]
        found, foreign[language] = parts.closure(start)
        files |= {str(path.relative_to(TREE)): path.read_text() for path in found}
    if "py" in languages:
        package = f"python/{PACKAGE}"
        files[f"{package}/__init__.py"] = INIT
        files[f"{package}/transports/__init__.py"] = ""
        files[f"{package}/py.typed"] = ""
    files["FRAME.md"] = (TREE / "proto" / "FRAME.md").read_text()
    files |= around("pair", chosen, languages, foreign)
    if "py" not in languages:
        del files["pyproject.toml"]
    return files


def bare_files(chosen: list[Transport], languages: list[str]) -> Files:
    """The mechanisms alone: a program a language for each, and what the programs share."""
    files: Files = {}
    foreign: dict[str, set[str]] = {"py": set(), "cpp": set()}
    suffixes = {"py": ".py", "cpp": ".cpp"}
    for language in languages:
        folder = SOURCES[language] / "bare"
        programs = [folder / f"{bare_stem(one)}{suffixes[language]}" for one in chosen]
        shared = [folder / f"rounds{SUFFIX[language]}"]
        for path in [*programs, *shared]:
            foreign[language] |= parts.USES[language](path, path.read_text())[1]
            files[f"{TOPS[language]}/{path.name}"] = path.read_text()
    foreign["py"].discard("rounds")
    return files | around("bare", chosen, languages, foreign)


def bare_stem(transport: Transport) -> str:
    """The name of a transport's bare program. Raises Error: NOT_FOUND."""
    plain = transport.name.replace("-", "_")
    for stem in (plain, f"{plain}_pipe", transport.stem):
        if (SOURCES["py"] / "bare" / f"{stem}.py").exists():
            return stem
    raise Error(Status.NOT_FOUND, "there is no bare program of it", transport.name)


def around(
    kind: str, chosen: list[Transport], languages: list[str], foreign: dict[str, set[str]]
) -> Files:
    """The files of project/KIND that these languages need, filled in."""
    libraries = [parts.CPP_PACKAGES[name] for name in sorted(foreign["cpp"])]
    packages = requirements(foreign["py"])
    is_native = NANOBIND in foreign["py"]
    builds = is_native or "cpp" in languages
    has_venv = "py" in languages and bool(packages)
    flags = {*languages, *["venv"] * has_venv, *["both"] * (len(languages) > 1)}
    flags |= {*["native"] * is_native, *["build"] * builds}
    flags |= {f"{language}proto" for language in languages if PROTO in foreign[language]}
    flags |= {*["proto"] * bool({"cppproto", "pyproto"} & flags)}
    flags |= {*["framed"] * any(one.name != "grpc" for one in chosen)}
    names = ", ".join(f"`{one.name}`" for one in chosen)
    values = {
        "VERSION": ipc_bridge.__version__,
        "FIND": "\n".join(dict.fromkeys(one.find for one in libraries)),
        "LINK": "".join(f" {one.link}" for one in libraries),
        "REQUIREMENTS": ", ".join(f'"{text}"' for text in packages),
        "SCHEMES": " ".join(scheme for one in chosen for scheme in one.schemes),
        "VENV": " .venv/installed" * has_venv,
        "DROP_VENV": " .venv" * has_venv,
        "VENV_TOO": ", and `.venv`" * has_venv,
        "RUN_PYTHON": run_python(kind, has_venv, "$(PYTHON)"),
        "TITLE": f"The transport{'s' * (len(chosen) > 1)} {names}",
        "NEEDS": needs(languages, [one.debian for one in libraries], packages),
        "STUBS_LINK": f" {PACKAGE}_stubs" * ("cppproto" in flags),
        "STUBS": f" python/{PACKAGE}/bridge_pb2.py" * ("pyproto" in flags),
    }
    if kind == "bare":
        values["PROGRAMS"] = " ".join(bare_stem(one) for one in chosen)
    else:
        values |= by_hand(chosen, languages, run_python(kind, has_venv, "python3"))
    files = {"LICENSE": (TREE / "LICENSE").read_text()}
    if "proto" in flags:
        files["proto/bridge.proto"] = (TREE / "proto" / "bridge.proto").read_text()
    for path in sorted((PROJECT / kind).rglob("*")):
        if not path.is_file() or (path.name == "CMakeLists.txt.in" and not builds):
            continue
        name = str(path.relative_to(PROJECT / kind)).replace("gitignore", ".gitignore")
        text = path.read_text()
        if name.endswith(".in"):
            name, text = name.removesuffix(".in"), fill(text, flags, values)
        files[name] = text
    if has_venv and kind == "bare":
        files["requirements.txt"] = "".join(f"{text}\n" for text in packages)
    return files


def run_python(kind: str, has_venv: bool, python: str) -> str:
    """The first words of a command to Python; what needs no packages needs no environment."""
    if has_venv:
        return ".venv/bin/python"
    return f"PYTHONPATH=python {python}" if kind == "pair" else python


def fill(text: str, flags: set[str], values: dict[str, str]) -> str:
    """Fill in a template of project/."""
    lines = []
    for line in text.splitlines():
        flag = re.match(r"@([a-z]+) ", line)
        if flag is None or flag[1] in flags:
            lines.append(line[flag.end() :] if flag else line)
    text = re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], "\n".join(lines))
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def requirements(modules: Iterable[str]) -> list[str]:
    """What pip is to install, with the versions that this project knows to work."""
    pyproject = tomllib.loads((TREE / "pyproject.toml").read_text())
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    known = [*project["dependencies"], *pyproject["build-system"]["requires"]]
    known += [text for extra in extras for text in extra]
    found = []
    for distribution in sorted({parts.PYTHON_PACKAGES[module] for module in modules}):
        pattern = re.compile(re.escape(distribution) + r"(?![\w-])")
        found.append(next((text for text in known if pattern.match(text)), distribution))
    return found


def needs(languages: list[str], debian: list[str], packages: list[str]) -> str:
    """A sentence for README: what must be there."""
    system = ["make"]
    is_native = any(package.startswith(NANOBIND) for package in packages)
    if is_native or "cpp" in languages:
        system += ["g++", "cmake", *sorted({name for one in debian for name in one.split()})]
    system += ["python3-dev"] * is_native
    system += ["python3-venv" if packages and "py" in languages else "python3"]
    text = f"It takes, by Debian's names, {', '.join(system)}."
    if any(package.startswith("protobuf") for package in packages):
        system += ["protobuf-compiler", "protobuf-compiler-grpc"]
        text = f"It takes, by Debian's names, {', '.join(dict.fromkeys(system))}."
    if packages and "py" in languages:
        text += f" `make` puts {', '.join(packages)} into `.venv`."
    versions = {"cpp": "g++ >= 12 or clang >= 14", "py": "Python >= 3.11"}
    return text + "".join(f" {versions[language]}." for language in languages) + " Linux only."


def by_hand(chosen: list[Transport], languages: list[str], python: str) -> dict[str, str]:
    """What README says of running the programs, and of each transport."""
    programs = {
        "cpp": f"build/{SERVICE}-%s",
        "py": f"{python} -m {SERVICE}.%s",
    }
    server, client = programs[languages[0]] % "server", programs[languages[-1]] % "client"
    url = example_url(chosen[0].schemes[0])
    serve, call = f"{server} {url}", f"{client} {url}"
    if url == "stdio:":
        serve, call = "# the client starts the server", f"{client} 'stdio:{server} stdio:'"
    heads = dict.fromkeys(head_of(one) for one in chosen)
    return {
        "SERVE": serve,
        "CALL": call,
        "URLS": ", ".join(f"`{example_url(scheme)}`" for one in chosen for scheme in one.schemes),
        "WAIT": " ".join(waiting({one.name for one in chosen})),
        "HEADS": "\n".join(f"## {head}\n" for head in heads),
    }


def waiting(names: set[str]) -> Iterator[str]:
    """What README says of ?wait=, which not all take alike (see `dial`)."""
    if names - {"zmq", "grpc"}:
        yield "`?wait=block|spin|adaptive` behind it says how that side waits (adaptive: 50 us of"
        yield "polling, then asleep)."
    if "zmq" in names:
        yield "ZeroMQ waits in threads of its own: it refuses `?wait=spin`."
    if "grpc" in names:
        yield "gRPC waits in threads of its own: it takes `?wait=block` only."


def example_url(scheme: str) -> str:
    """An address to try."""
    if scheme == "stdio":
        return "stdio:"
    return f"{scheme}://127.0.0.1:5000" if scheme.endswith("tcp") else f"{scheme}:///tmp/demo"


def head_of(transport: Transport) -> str:
    """The head of a transport's file: what it is, how peers meet, its trap."""
    tree = parts.parse(SOURCES["py"] / PACKAGE / "transports" / f"{transport.stem}.py")
    title, _, rest = (ast.get_docstring(tree) or "").partition("\n\n")
    told = [text for text in rest.split("\n\n") if not re.match(r"(Copy with it|Run):", text)]
    return "\n\n".join([" ".join(title.rstrip(".").split()), *told])


# --- giving it another name ---


def renamed(files: Files, name: str) -> Files:
    """The same, as a package, namespace and targets of another name."""

    def rename(text: str) -> str:
        text = text.replace(f"python -m {PACKAGE}.peer serve", f"python -m {SERVICE}.server")
        text = text.replace("ipc-bridge-peer serve", f"build/{SERVICE}-server")
        for old, new in ((PACKAGE, name), (PACKAGE.upper(), name.upper())):
            text = text.replace(old, new)
        return text.replace('name = "ipc-bridge"', f'name = "{name.replace("_", "-")}"')

    return {rename(path): rename(text) for path, text in files.items()}


def check_name(name: str) -> None:
    """Raises CommandLineError unless it can name a package and a namespace."""
    stems = {path.stem for path in (SOURCES["py"] / PACKAGE).glob("*.py")}
    is_keyword = keyword.iskeyword(name) or name in CPP_KEYWORDS.split()
    if not NAME.fullmatch(name) or is_keyword or name.endswith("_"):
        raise CommandLineError(f"'{name}' is no name for a package and a namespace", "--name")
    # A namespace cannot share its name with a function or a type of libc: `pipe`, `key_t`.
    is_in_libc = hasattr(ctypes.CDLL(None), name) or name.endswith("_t")
    is_module = name in sys.stdlib_module_names
    if is_module or is_in_libc or name in TAKEN | (stems - {PACKAGE}):
        raise CommandLineError(f"'{name}' is the name of something else", "--name")


# --- writing it ---


def write(files: Files, directory: Path, force: bool) -> list[str]:
    """Write a project; what was kept as it was, for it is not as an export wrote it.

    Raises Error: ALREADY_EXISTS if the directory is not empty, unless forced; nothing is written
    then.
    """
    if directory.exists() and not directory.is_dir():
        raise Error(Status.ALREADY_EXISTS, "this is not a directory", str(directory))
    there = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if there - {".git"} and not force:
        what = "the directory is not empty; --force adds to it, and keeps what export did not write"
        raise Error(Status.ALREADY_EXISTS, what, str(directory))
    written = read_manifest(directory)
    kept = []
    try:
        for name, text in sorted(files.items()):
            path = directory / name
            if not is_ours(path, directory, written.get(name), text):
                was_deleted = name in written and not os.path.lexists(path)
                kept.append(name + " (deleted)" * was_deleted)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            written[name] = digest(text.encode())
    finally:
        if written:
            write_manifest(directory, written)
    return kept


def is_ours(path: Path, directory: Path, known: str | None, text: str) -> bool:
    """May it be written: is it new, or still as an export wrote it? (What was deleted stays so.)"""
    if not path.parent.resolve().is_relative_to(directory.resolve()):
        return False  # a symbolic link leads out
    if path.is_symlink():
        return False
    if not path.exists():
        return known is None
    if not path.is_file():
        return False
    return digest(path.read_bytes()) in (known, digest(text.encode()))


def digest(data: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(data).hexdigest()


def read_manifest(directory: Path) -> dict[str, str]:
    """What earlier exports wrote here. Raises Error: FAILED_PRECONDITION if it is not readable."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return {}
    try:
        if path.is_symlink():
            raise ValueError  # it may lead out
        files = json.loads(path.read_text())["files"]
        return {str(name): str(value) for name, value in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        what = "this is no manifest of an export"
        raise Error(Status.FAILED_PRECONDITION, what, str(path)) from None


def write_manifest(directory: Path, written: dict[str, str]) -> None:
    """Remember what was written."""
    told = {"by": f"ipc-bridge {ipc_bridge.__version__}", "files": dict(sorted(written.items()))}
    (directory / MANIFEST).write_text(json.dumps(told, indent=2) + "\n")


# --- the command ---


def sizes(files: Files, bare: bool) -> str:
    """How much was copied: lines of code, a line a language."""
    own, shared = ("mechanism", "shared") if bare else ("service and programs", "library")
    lines = []
    for language, top in TOPS.items():
        counts = {own: 0, shared: 0}
        for name, text in files.items():
            if name.startswith(top + "/"):
                is_own = "/rounds." not in name if bare else f"/{SERVICE}/" in name
                counts[own if is_own else shared] += parts.code_lines(name, text)
        if any(counts.values()):
            told = f"{counts[own]} lines of code of {own}, {counts[shared]:,} of {shared}"
            lines.append(f"{TITLES[language]}: {told}")
    return "\n".join(lines)


def choose(names: Iterable[str]) -> list[Transport]:
    """The transports by name, or all. Raises CommandLineError."""
    known = parts.transports()
    chosen = list(dict.fromkeys(known if "all" in (names := list(names)) else names))
    for name in chosen:
        if name not in known:
            what = f"unknown transport; known are {', '.join([*known, 'all'])}"
            raise CommandLineError(what, name)
    return [known[name] for name in chosen]


@click.command()
@click.argument("transports", nargs=-1, required=True, metavar="TRANSPORT...")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--language", type=click.Choice(list(LANGUAGES)), default="both", show_default=True)
@click.option("--bare", is_flag=True, help="The mechanism alone, with no protocol on top.")
@click.option("--name", default=PACKAGE, show_default=True, help="Of package and namespace.")
@click.option("--force", is_flag=True, help="Into a directory that is not empty.")
def export(
    transports: tuple[str, ...], directory: Path, language: str, bare: bool, name: str, force: bool
) -> None:
    """Copy TRANSPORT... (or all) into DIRECTORY, as a project that stands alone.

    With --force, files that export did not write, or that were edited or deleted since, stay as
    they are, and are named.
    """
    if not (SOURCES["cpp"] / PACKAGE).is_dir():
        what = "the sources are missing here; run it from a checkout of the project"
        raise Error(Status.NOT_FOUND, what, str(SOURCES["cpp"]))
    chosen, languages = choose(transports), LANGUAGES[language]
    check_name(name)
    files = renamed((bare_files if bare else pair_files)(chosen, languages), name)
    try:
        kept = write(files, directory, force)
    except OSError as error:
        raise SystemError("write", error.errno or 0, str(error.filename or directory)) from None
    for path in kept:
        click.echo(f"kept as it was: {path}")
    click.echo(sizes(files, bare))
    smoke = f"make -C {shlex.quote(str(directory))} smoke"
    click.echo(f"wrote {len(files) - len(kept)} files; next: {smoke}")

"""`ipc-bridge`: the tools around the library, one subcommand a module.

A subcommand raises Error for what goes wrong and CommandLineError for a wrong word; both leave as
one line, `error: STATUS: what, where`, with the exit codes of the peer programs.
"""

import importlib
import sys
from collections.abc import Sequence

import ipc_bridge
from ipc_bridge.console import CommandLineError, report_error
from ipc_bridge.errors import Error, Status
from ipc_bridge.harness import programs


def lacking(error: ModuleNotFoundError) -> Error:
    """What to install."""
    what = f"{error.name} is missing: pip install '.[harness]' in the project"
    return Error(Status.FAILED_PRECONDITION, what)


try:
    import click
except ModuleNotFoundError as error:
    sys.exit(report_error(lacking(error)))

# Its name: the module of this package that defines it, by that name.
COMMANDS: dict[str, str] = {
    "bench": "bench",
    "report": "report",
    "compare": "compare",
    "recommend": "recommend",
    "sweep": "sweep",
    "export": "export",
    "curve-keys": "curve_keys",
    "doctor": "doctor",
}


class Commands(click.Group):
    """Imports a subcommand when it is used: doctor must run where the others' libraries lack."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        try:
            module = importlib.import_module(f"ipc_bridge.harness.{COMMANDS[name]}")
        except ModuleNotFoundError as error:
            raise lacking(error) from None
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ipc_bridge.__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Tools around IPC Bridge: compare the transports on this machine, and take one home."""


def run(words: Sequence[str]) -> int:
    """Do what the words say; the exit code. Raises Error."""
    try:
        status = cli.main(args=list(words), prog_name="ipc-bridge", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else ""
        raise CommandLineError(error.format_message().rstrip("."), where) from None
    except click.Abort:
        raise KeyboardInterrupt from None
    return status if isinstance(status, int) else 0


def main() -> int:
    """The console script."""
    return programs.main(run)


if __name__ == "__main__":
    sys.exit(main())

"""`compressor`: the commands. torch is imported inside them, once recipe and model are found, so that help and errors
come at once."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from . import render
from .apply import apply, plan
from .arguments import JsonOption
from .bench import bench
from .check import check
from .compare import compare, sweep
from .evaluate import evaluate_command
from .folders import export, inspect, push, verify
from .generate import chat, run
from .recipes import recipes_app
from .report import report
from .session import session
from .together import check_single

_NOT_READ = "error: the output was closed before its end"
app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Compress language models: one recipe, composable passes, a checkpoint that runs.",
    epilog="Exit codes: 0 done, 1 the answer is no, 2 could not run, 130 interrupted (apply, sweep and check --work "
    "can go on).",
)  # fmt: skip
app.add_typer(recipes_app, name="recipes")
for command in (apply, plan, report, compare, sweep, inspect, verify, export, push, bench, run, chat, check):
    app.command()(command)
app.command("eval")(evaluate_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        render.out.print(f"compressor {version('compressor')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> None:
    session.debug, session.quiet = debug, quiet
    if context.invoked_subcommand != "apply":
        check_single(context.invoked_subcommand or "")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine offers and which kernels would be used."""
    from .doctor import examine

    record = examine()
    if as_json:
        render.document(record)
        return
    for key, value in record.items():
        render.out.print(f"{key}: {value}")


_ANYWHERE = ("-q", "--quiet", "--debug")  # which may stand behind a command, too


def _full_memory(error: BaseException) -> str:
    """What to do about an error by which a device's memory is full; empty for others."""
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if not isinstance(error, (kind, MemoryError)) and "can't allocate memory" not in str(error):
        return ""
    reason = ". ".join(str(error).splitlines()[0].split(". ")[:2]) if str(error) else "no room for more"
    return (
        f"the memory is full ({reason}); end other programs that use it, or ask for less at a time: windows of fewer "
        "tokens, a shorter prompt"
    )


def _interrupt(number: int, frame: object) -> None:
    session.interrupted = True
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: errors that people can mend are one line and exit code 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    # A kernel is compiled and kept for every batch size, and experts see all of them: the default of 1024 is 400 MB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    if "WORLD_SIZE" in os.environ:  # where another process has ended, what torch says of it is of no use to people
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    words = sys.argv[1:]
    anywhere = [word for word in words if word in _ANYWHERE]
    stdout, code, said = sys.stdout, 2, ""
    try:
        try:
            app([*anywhere, *(word for word in words if word not in _ANYWHERE)])
        finally:
            stdout.flush()
    except SystemExit as end:
        code = int(end.code or 0)
        if sys.stdout is not stdout:  # which is replaced, and 1 the code, once nobody reads it
            code, said = 2, _NOT_READ
        elif code == 130 and not session.told:
            said = "interrupted"
    except (Exception, KeyboardInterrupt) as error:
        if session.debug:
            traceback.print_exc()
        elif session.interrupted:  # which others may have caught and raised as something else
            code, said = 130, "interrupted"
        else:
            said = _told(error)
    if said and not session.follows:
        print(said, file=sys.stderr)
    sys.exit(code)


def _told(error: BaseException) -> str:
    """One line for a person."""
    from ..runtime.errors import CompressorError

    if isinstance(error, CompressorError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno:
        if error.filename is None:  # stdout, which would fail once more at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            return _NOT_READ
        return f"error: {error.filename or 'the output'}: {error.strerror}"
    if full := _full_memory(error):
        return f"error: {full}"
    return f"internal error: {error!r}; `compressor --debug ...` shows where, please report it"

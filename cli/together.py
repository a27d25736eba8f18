"""Commands that the processes of `torchrun` run together: the first talks for all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import typer

from .session import session

_GRACE = 5.0  # seconds in which the first process says by itself what is wrong in all of them


def together(command: Callable[..., None]) -> Callable[..., None]:
    """A command that the processes of one `torchrun` run together, if that is what started this one."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        session.follows = _count() > 1 and os.environ["RANK"] != "0"
        if _count() == 1 or options.get("dry_run"):
            if not session.follows:
                command(*arguments, **options)
            return
        from ..compress.guards import check_device
        from ..runtime import processes

        session.quiet |= session.follows
        try:
            check_device(options["device"])
            with processes.joined(options["device"]):
                command(*arguments, **options)
        except (Exception, KeyboardInterrupt) as error:
            if not session.follows or session.debug:
                raise
            if not session.interrupted and not isinstance(error, processes.PeerLost):
                with suppress(KeyboardInterrupt):
                    processes.tell(str(error) or repr(error))
                    time.sleep(_GRACE)
            raise typer.Exit(130 if session.interrupted else 2) from None

    return run


def check_single(command: str) -> None:
    """
    Raises:
        RecipeError: a command that works in one process was started in several.
    """
    if _count() > 1:
        from ..runtime.errors import RecipeError

        session.follows = os.environ["RANK"] != "0"
        raise RecipeError(f"compressor {command} works in one process: start it without torchrun")


def command_line() -> list[str]:
    """The words that started this program, as far as they are known."""
    if _count() == 1:
        return ["compressor"]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return ["torchrun", *(["--nproc-per-node", str(here)] if here == _count() else ["..."]), "-m", "compressor.cli"]


def interruption() -> str:
    """Why the run ends before it is done."""
    if _count() == 1:
        return "interrupted"
    from ..runtime import processes

    return processes.reason() or "interrupted"


def _count() -> int:
    """How many processes were started together: others than `torchrun` set some of its variables, too."""
    told = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ.get("WORLD_SIZE", "1")) if told else 1

"""`compressor` in processes of its own, forked from one that has torch and the passes loaded: importing them takes
longer than most commands."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "compressor.cli.main", "compressor.compress.apply", "compressor.compress.evaluate",
        "transformers.models.llama.modeling_llama",
    ]
)  # fmt: skip


class Done(NamedTuple):
    """What a finished command left on its streams."""

    stdout: str
    stderr: str


def run(*command: object, cwd: Path, code: int = 0) -> Done:
    """`compressor COMMAND` in a folder; it has to end with an exit code."""
    [(found, done)] = run_together(1, *command, cwd=cwd)
    assert found == code, done.stdout + done.stderr
    return done


def run_together(
    count: int, *command: object, cwd: Path, before: Callable[[int], object] | None = None
) -> list[tuple[int, Done]]:
    """`compressor COMMAND` in processes that work together, as `torchrun` starts them: exit codes and streams of each.

    Args:
        before: is called in each process first, with its number.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [[Path(folder) / f"{name}-{number}" for name in ("stdout", "stderr")] for number in range(count)]
        words = [str(word) for word in command]
        started = started_together(count, _command, [(words, cwd, own, before) for own in streams])
        for process in started:
            process.join()
        done = [Done(*(stream.read_text(encoding="utf-8") for stream in own)) for own in streams]
    return [(int(process.exitcode or 0), one) for process, one in zip(started, done, strict=True)]


def started_together(count: int, function: Callable[..., object], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Processes with the environment that `torchrun` gives them, each at a function with arguments of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = []
    for number, own in enumerate(arguments):
        environment = {
            "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "RANK": number, "LOCAL_RANK": number,
            "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        }  # fmt: skip
        found.append(_SERVER.Process(target=_at_work, args=(environment, function, own)))
        found[-1].start()
    return found


def _at_work(environment: dict[str, object], function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    function(*arguments)


def _command(words: list[str], cwd: Path, streams: list[Path], before: Callable[[int], object] | None) -> None:
    from compressor.cli import main, together

    together._GRACE = 0.2

    os.chdir(cwd)
    if before is not None:
        before(int(os.environ["RANK"]))
    for descriptor, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["compressor", *words]
    main.main()

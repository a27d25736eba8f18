"""`compressor` in processes of its own, forked from one that has torch and the passes loaded: importing them takes
longer than most commands."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

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
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _SERVER.Process(target=_command, args=([str(word) for word in command], cwd, streams))
        process.start()
        process.join()
        done = Done(*(stream.read_text(encoding="utf-8") for stream in streams))
    assert process.exitcode == code, done.stdout + done.stderr
    return done


def _command(words: list[str], cwd: Path, streams: list[Path]) -> None:
    from compressor.cli import main

    os.chdir(cwd)
    for descriptor, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["compressor", *words]
    main.main()

"""How commands end that are interrupted, or whose output nobody reads or no disk holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compressor.cli import main
from compressor.cli.session import Session, session
from compressor.compress import evaluate
from compressor.runtime.errors import ModelError

Pico = Callable[..., Path]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """`ended(code, *words)` runs a command in this process, which has to end with a code → what stderr was told."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(code: int, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["compressor", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main.main()
        told = capsys.readouterr().err
        assert end.value.code == code, told
        return told

    vars(session).update(vars(Session()))
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    vars(session).update(vars(Session()))


def interrupted(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("words", [("eval",), ("inspect",), ("run", "-p", "x")])
def test_every_command_says_that_it_was_interrupted(
    words: tuple[str, ...], pico: Pico, ended: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "run_evaluation", interrupted)
    monkeypatch.setattr("compressor.runtime.stored.open_model", interrupted)
    monkeypatch.setattr("compressor.runtime.loader.load", interrupted)
    command, *options = words
    assert ended(130, command, pico(), *options) == "interrupted\n"


def test_an_interruption_while_commands_are_built(ended: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "app", interrupted)
    assert ended(130) == "interrupted\n"


def test_an_interruption_that_others_caught(
    pico: Pico, ended: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def caught(path: Path) -> None:
        try:
            interrupted()
        except KeyboardInterrupt:
            raise ModelError("transformers cannot build the model") from None

    monkeypatch.setattr("compressor.runtime.stored.open_model", caught)
    assert ended(130, "inspect", pico()) == "interrupted\n"


def test_names_that_are_too_long(pico: Pico, ended: Callable[..., str], tmp_path: Path) -> None:
    for words in (
        ("apply", "w8a16", pico(), tmp_path / ("x" * 252)),
        ("inspect", "x" * 300),
        ("plan", "x" * 300, pico()),
    ):
        told = ended(2, *words)
        assert told.startswith("error: ")
        assert told.endswith("x: File name too long\n") or told.endswith("x.work: File name too long\n")


COMMANDS = ("recipes options", "recipes list")  # which print, and draw


@pytest.mark.parametrize("words", COMMANDS)
def test_a_pipe_that_is_closed_is_not_the_answer_no(words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "compressor.cli", *words.split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (2, "error: the output was closed before its end\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", COMMANDS)
def test_a_full_disk_behind_the_output(words: str) -> None:
    command = [sys.executable, "-m", "compressor.cli", *words.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: the output: No space left on device\n")

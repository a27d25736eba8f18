"""How fast a model reads and writes, as `load` gives it, and what it runs on."""

from __future__ import annotations

import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...runtime.errors import CompressorError, ResourceError


@dataclass(frozen=True)
class Work:
    """What is timed: prompts of so many tokens side by side, and the tokens that follow each."""

    batch: int
    prompt: int
    tokens: int


@dataclass
class Speed:
    """What was measured of a model.

    Attributes:
        dtype, device: that it computes in, and on.
        paths: by what linears are multiplied, in words → how many, for a token and for a prompt.
        first: seconds until the first token of an answer is there, of each round; each: seconds for every token after
            it, likewise.
        memory: bytes at most: of the GPU, or of the process beyond its imports, with the pages of the model's files.
    """

    dtype: str
    device: str
    paths: dict[str, dict[str, int]]
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    memory: int = 0

    def rates(self, work: Work) -> dict[str, list[float]]:
        """Tokens per second of each round, of all prompts together: while they are read, and while answers are
        written."""
        return {
            "prompt": [work.batch * work.prompt / seconds for seconds in self.first],
            "decode": [work.batch / seconds for seconds in self.each],
        }

    def record(self, work: Work) -> dict[str, Any]:
        """For a file."""
        return {**asdict(self), "tokens_per_second": self.rates(work)}


def bench(folders: Sequence[Path], work: Work, rounds: int, passed: Callable[[int], None]) -> list[Speed]:
    """Time models in turns, each in a process of its own, so that what else the machine does meets all alike.

    Args:
        rounds: of each, after one that is not counted.
        passed: told each round that is behind.

    Raises:
        CompressorError: a model cannot be loaded, or a prompt is beyond its positions.
    """
    with ExitStack() as stack:
        servers = [stack.enter_context(_Server(folder, work)) for folder in folders]
        found = [server.ask() for server in servers]
        for number in range(rounds + 1):
            for speed, server in zip(found, servers, strict=True):
                first, each, memory = server.ask()
                speed.memory = memory
                if number:
                    speed.first.append(first)
                    speed.each.append(each)
            passed(number)
    return found


class _Server:
    """A process that has loaded a model and times it when it is asked."""

    def __init__(self, folder: Path, work: Work) -> None:
        context = get_context("spawn")
        self._end, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, folder, work), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.join()

    def ask(self) -> Any:
        """The next thing that it has to say."""
        try:
            self._end.send(None)
            found = self._end.recv()
        except (EOFError, OSError):
            raise ResourceError("a process was killed from outside (is the memory full?)") from None
        if isinstance(found, CompressorError):
            raise found
        return found


def _serve(end: Any, folder: Path, work: Work) -> None:
    try:
        model, speed, before = _loaded(folder, work)
        end.recv()
        end.send(speed)
        while True:
            end.recv()
            end.send(_timed(model, work, before))
    except CompressorError as error:
        end.recv()
        end.send(error)
    except (EOFError, KeyboardInterrupt):  # whoever asked is gone
        pass


def _loaded(folder: Path, work: Work) -> tuple[Any, Speed, int]:
    """The model, what is known of it, and the bytes that the process took before it."""
    import transformers.models.llama.modeling_llama  # noqa: F401 (what all families import is no part of a model)
    from torch import nn

    from ...runtime.errors import RecipeError
    from ...runtime.loader import load
    from ...runtime.schemes.linear import RowsLinear
    from ...runtime.stored import open_model

    limit = open_model(folder).positions
    if limit and work.prompt + work.tokens > limit:
        raise RecipeError(f"{work.prompt} + {work.tokens} tokens are beyond the {limit} positions of {folder}")
    before = _resident()
    model: Any = load(folder)
    paths: dict[str, Counter[str]] = {"a token": Counter(), "a prompt": Counter()}
    for module in model.modules():
        for what, count in (("a token", work.batch), ("a prompt", work.batch * work.prompt)):
            if isinstance(module, RowsLinear):
                paths[what][module.path(count, model.dtype)] += 1
            elif isinstance(module, nn.Linear):
                paths[what]["plain weights"] += 1
    found = {what: dict(counts) for what, counts in paths.items()}
    return model, Speed(str(model.dtype).removeprefix("torch."), str(model.device), found), before


def _timed(model: Any, work: Work, before: int) -> tuple[float, float, int]:
    """Seconds until the first token, for each after it, and bytes at most so far, beyond those of the imports."""
    import torch

    ids = torch.randint(model.config.get_text_config().vocab_size, (work.batch, work.prompt), device=model.device)
    with torch.no_grad():
        start = _now(model)
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        last = output.logits[:, -1:].argmax(-1)
        first = _now(model) - start
        seconds = []
        for _ in range(work.tokens):
            start = _now(model)
            output = model(input_ids=last, past_key_values=output.past_key_values)
            last = output.logits[:, -1:].argmax(-1)
            seconds.append(_now(model) - start)
    cuda = model.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(model.device) if cuda else _resident() - before
    return first, statistics.median(seconds), memory


def _resident() -> int:
    """Bytes that this process had in memory at most."""
    with suppress(OSError, StopIteration, ValueError):  # what the system says of it otherwise begins with its parent's
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.device)
    return time.perf_counter()

"""Recipes run on models, measured, and held against a baseline."""

from __future__ import annotations

import hashlib
import json
import math
import re
import resource
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import CompressorError
from ..runtime.files import file_sha256, write_synced
from ..runtime.text import json_text
from .baseline import Baseline, Figures, Move, Text, moves
from .evaluate.speed import Work, bench

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibrate.corpus import Corpus
    from .job import Job

_PROMPT, _TOKENS, _ROUNDS = 256, 32, 7  # what is timed
_CODE = ("kernels", "runtime", "calibrate", "compress")
_IMPORTED = ["compressor.compress.apply", "compressor.compress.evaluate", "transformers.models.llama.modeling_llama"]


@dataclass(frozen=True)
class Case:
    """A recipe on a model.

    Attributes:
        model: its name in the baseline; folder: where it lies.
        recipe: a shipped name, or a file; edits: as `--set` takes them.
        text: what output and model are compared on.
        speed: whether both are timed, in turns.
        statistics: a folder of what calibration finds of the model, for cases that can use what others found.
    """

    model: str
    folder: str
    recipe: str
    edits: tuple[str, ...]
    text: Text
    speed: bool = False
    statistics: Path | None = None

    @property
    def name(self) -> str:
        """Of a folder."""
        known = hashlib.sha256(f"{self.model} {self.recipe} {self.edits}".encode()).hexdigest()[:8]
        return re.sub(r"[^\w.-]+", "_", f"{self.model} {Path(self.recipe).stem} {known}")

    def __str__(self) -> str:
        return f"{self.model} / {self.recipe}"


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        figures: what was measured; None where it failed, for a `reason`.
        text: sha256 of the text that figures were measured on.
        moved: its figures against the baseline; None where that has none.
        seconds: that it took; 0 where an earlier run's result was taken.
    """

    case: Case
    figures: Figures | None
    reason: str
    text: str
    moved: tuple[Move, ...] | None
    seconds: float

    @property
    def verdict(self) -> str:
        """`failed`, `new`, or the worst that a figure did: `worse`, `other`, `better`, `same`."""
        if self.figures is None:
            return "failed"
        if self.moved is None:
            return "new"
        found = {move.verdict for move in self.moved}
        return next((verdict for verdict in ("worse", "other", "better") if verdict in found), "same")

    @property
    def said(self) -> str:
        """Why it is not `same`, in a line."""
        if self.figures is None:
            return self.reason
        if self.moved is None:
            return ""
        moved = [move for move in self.moved if move.verdict != "same"]
        mixed = len({move.verdict for move in moved}) > 1
        return ", ".join(f"{move} ({move.verdict})" if mixed else str(move) for move in moved)


def run_cases(cases: Sequence[Case], baseline: Baseline, jobs: int, work: Path | None) -> Iterator[Outcome]:
    """Run each case in a process of its own, and compare.

    Args:
        jobs: cases at a time, which share the processor's threads.
        work: keeps outputs and what was measured; a case of which nothing has changed since is not run again.
    """
    with tempfile.TemporaryDirectory(prefix="compressor-check-") as room:
        base = Path(room) if work is None else work
        context = get_context("forkserver")
        _start_server(context)
        with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
            running = {pool.submit(_run, case, base / case.name, jobs, work is None): case for case in cases}
            try:
                for future in as_completed(running):
                    try:
                        found, seconds = future.result()
                    except BrokenProcessPool:
                        found, seconds = {"reason": "a process was killed from outside (is the memory full?)"}, 0.0
                    yield _outcome(running[future], baseline, found, seconds)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in (pool._processes or {}).values():
                    process.terminate()
                raise


def _start_server(context: ForkServerContext) -> None:
    """Start what processes are forked from, and wait until it has imported what they need: one that was asked for
    meanwhile would come when an interrupted `check` is gone. It and they leave Ctrl-C, which a terminal sends to all,
    to this process, which ends them."""
    context.set_forkserver_preload(_IMPORTED)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    first = context.Process(target=int)  # which does nothing
    first.start()
    first.join()


def _outcome(case: Case, baseline: Baseline, found: dict[str, Any], seconds: float) -> Outcome:
    if "reason" in found:
        return Outcome(case, None, found["reason"], "", None, seconds)
    figures, known = Figures.model_validate(found["figures"]), baseline.models.get(case.model)
    entry = None if known is None else known.recipes.get(case.recipe)
    moved = None
    if entry is not None:
        allowed, same = baseline.tolerances_of(case.model, case.recipe), baseline.text.sha256 == found["text"]
        moved = tuple(moves(figures, entry.figures, allowed, same_text=same))
    return Outcome(case, figures, "", found["text"], moved, seconds)


def _run(case: Case, folder: Path, jobs: int, once: bool) -> tuple[dict[str, Any], float]:
    """In a process of its own: what was measured, or why it was not, and the seconds that took.

    Args:
        folder: of this case alone; jobs: how many run at a time; once: whether nobody will look there again.
    """
    import torch

    start = time.monotonic()
    threads = max(1, torch.get_num_threads() // jobs)
    torch.set_num_threads(threads)
    try:
        key, kept = {} if once else _fingerprint(case, threads), folder / "figures.json"
        if not once and (found := _kept(kept, key)):
            return found, 0.0
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found = {"fingerprint": key, **_measured(case, folder / "out", _shared(case, key))}
        write_synced(kept, json_text(found))
        if once:
            shutil.rmtree(folder / "out")
        return found, time.monotonic() - start
    except CompressorError as error:
        return {"reason": str(error)}, time.monotonic() - start
    except Exception as error:  # one that is ours to mend; the other cases go on
        return {"reason": f"internal error: {error!r}"}, time.monotonic() - start


def _kept(path: Path, key: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same measured, and left whole."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Figures.model_validate(found["figures"])
        return found if (found["fingerprint"], type(found["text"])) == (key, str) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _fingerprint(case: Case, threads: int) -> dict[str, Any]:
    """What has to be the same for a result to be that of a case: all but the machine."""
    from .fingerprint import versions

    job = _job(case, Path())
    root = Path(__file__).resolve().parent.parent
    code = hashlib.sha256()
    for file in sorted(file for part in _CODE for file in (root / part).rglob("*") if file.suffix in (".py", ".json")):
        code.update(file.read_bytes())
    files = sorted(file for file in job.model.iterdir() if file.is_file())
    texts = {str(path) for path in job.inputs} | {case.text.source}
    return {
        "model": {file.name: file_sha256(file) for file in files},
        "recipe": job.recipe.model_dump(mode="json"),
        "texts": {path: file_sha256(Path(path)) for path in sorted(texts) if Path(path).is_file()},
        "versions": versions(),
        "text": case.text.model_dump(mode="json", exclude={"sha256"}),
        "code": code.hexdigest(),
        "threads": threads,
        "speed": case.speed,
    }


def _job(case: Case, out: Path) -> Job:
    from ..runtime.hub import resolve_model
    from .job import Job
    from .recipe import parse_recipe, read_recipe

    (name, recipe), (folder, commit) = read_recipe(case.recipe), resolve_model(case.folder, None)
    return Job(parse_recipe(recipe, name, case.edits), recipe, case.edits, folder, out, case.folder, commit)


def text_of(spec: Text) -> Corpus:
    """The text that models are compared on.

    Raises:
        RecipeError: there is none.
    """
    from ..calibrate.corpus import builtin_corpus, file_corpus

    return builtin_corpus("evaluation") if spec.source == "builtin" else file_corpus(Path(spec.source))


def _shared(case: Case, key: dict[str, Any]) -> Path | None:
    """The folder of what calibration finds, for all cases that it is the same for."""
    if case.statistics is None:
        return None
    from ..kernels.dispatch import cpu_capability

    data = {**key["recipe"]["data"], "of passes": [step.get("task") for step in key["recipe"]["passes"]]}
    same = [data, *(key[part] for part in ("model", "texts", "versions", "code")), str(cpu_capability())]
    return case.statistics / hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def _sharing(job: Job, folder: Path | None) -> Path | None:
    """The folder of what calibration finds, where the recipe lets it serve others, and there is room for it at hand."""
    from ..runtime.memory import available_memory
    from .guards import source_skeleton
    from .plan import make_plan
    from .surveys import keeps, statistics_bytes

    if folder is None:
        return None
    skeleton = source_skeleton(job.model, "cpu")
    plan = make_plan(job.recipe, skeleton, memory=math.inf)  # statistics are kept of all linears of a block at once
    kept, free = keeps(plan.recipe), available_memory() or math.inf
    if "linears" in kept:
        room = shutil.disk_usage(folder.parent.parent).free
        if plan.memory > free / 2 or statistics_bytes(skeleton) > room / 4:
            return None
    return folder if kept else None


def _measured(case: Case, out: Path, shared: Path | None) -> dict[str, Any]:
    """Figures of a case, and the sha256 of the text that was read for them."""
    from ..calibrate.corpus import load_tokenizer, token_windows
    from .apply import apply

    job = _job(case, out)
    plan = apply(job, lambda event: None, overwrite=True, statistics=_sharing(job, shared))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    spec = case.text
    corpus, tokenizer = text_of(spec), load_tokenizer(job.model)
    windows = token_windows(
        corpus, tokenizer, samples=spec.samples, sequence_length=spec.sequence_length, seed=spec.seed
    )
    lost = judged(out, job.model, windows)
    if not math.isfinite(lost["kl_mean"]):
        return {"reason": "its answers are not finite"}
    weights = sorted(out.glob("*.safetensors"))
    figures = Figures(
        bytes=int(plan.bytes_after),
        kv_bytes_per_token=plan.kv_after,
        format=plan.format.name,
        readers=tuple(plan.readers),
        peak_memory=peak,
        digest=hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in weights).encode()).hexdigest(),
        **lost,
        **(_timed(out, job.model) if case.speed else {}),
    )
    return {"figures": figures.model_dump(mode="json"), "text": corpus.sha256}


def judged(out: Path, base: Path, windows: Tensor) -> dict[str, float]:
    """Figures of how far an output's answers are from those of the model it came from, both in float32."""
    import torch

    from ..runtime.loader import load
    from .evaluate import evaluate

    against = evaluate(load(out, dtype=torch.float32), windows, load(base, dtype=torch.float32)).against
    assert against is not None
    return {key: getattr(against, key) for key in ("kl_mean", "kl_error", "perplexity_ratio", "ratio_error")}


def _timed(out: Path, base: Path) -> dict[str, float]:
    """Figures of how long an output takes, beside the model it came from."""
    from ..runtime.stored import open_model

    room = open_model(out).positions or _PROMPT + _TOKENS
    tokens = min(_TOKENS, max(1, room // 4))
    work = Work(batch=1, prompt=max(1, min(_PROMPT, room - tokens)), tokens=tokens)
    own, plain = bench([out, base], work, _ROUNDS, lambda number: None)
    return {
        "prompt_time": statistics.median(own.first) / statistics.median(plain.first),
        "decode_time": statistics.median(own.each) / statistics.median(plain.each),
    }


def record(outcome: Outcome) -> dict[str, Any]:
    """For a file."""
    figures = None if outcome.figures is None else outcome.figures.model_dump(mode="json")
    moved = None if outcome.moved is None else [asdict(move) for move in outcome.moved]
    return {
        "model": outcome.case.model, "recipe": outcome.case.recipe, "set": list(outcome.case.edits),
        "verdict": outcome.verdict, "said": outcome.said, "seconds": round(outcome.seconds, 1), "figures": figures,
        "moved": moved,
    }  # fmt: skip

"""Questions with choices: from a file of one's own, or from the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...calibrate.corpus import load_tokenizer
from ...runtime.errors import RecipeError
from ...runtime.loader import load
from ...runtime.stored import open_model


@dataclass(frozen=True)
class Question:
    """A prompt, what it may go on with, and which of that is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Score:
    """How often a model finds the right choice the likeliest, as a whole, and for each of its characters (what the
    harness calls acc and acc_norm); errors are standard errors over questions."""

    questions: int
    accuracy: float
    accuracy_error: float
    by_length: float
    by_length_error: float

    def record(self) -> dict[str, Any]:
        return asdict(self)


def read_questions(path: Path) -> list[Question]:
    """Lines of JSON, `{"prompt": ..., "choices": [...], "answer": number of the right one from 0}`.

    Raises:
        RecipeError: the file cannot be read, or a line is something else.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--choices {path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(row["prompt"], tuple(row["choices"]), row["answer"])
            texts = (question.prompt, *question.choices)
            right = isinstance(question.answer, int) and 0 <= question.answer < len(question.choices)
            if not all(isinstance(text, str) and text for text in texts) or not right:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RecipeError(
                f"{path}:{number}: is no question; write it as "
                '{"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'
            ) from None
        found.append(question)
    if not found:
        raise RecipeError(f"--choices {path}: holds no question")
    return found


def score(folder: Path, questions: Sequence[Question], passed: Callable[[int], None]) -> Score:
    """A model's answers, as it runs.

    Args:
        passed: told how many more questions are behind.

    Raises:
        RecipeError: a question is beyond the model's positions.
    """
    tokenizer, model = load_tokenizer(folder), load(folder)
    limit = open_model(folder).positions
    right = torch.zeros(2, len(questions), dtype=torch.float64)
    for number, question in enumerate(questions):
        found = torch.tensor([_likelihood(model, tokenizer, question.prompt, one, limit) for one in question.choices])
        lengths = torch.tensor([len(one) for one in question.choices])
        for row, values in enumerate((found, found / lengths)):
            right[row, number] = float(values.argmax() == question.answer)
        passed(1)
    means = right.mean(1)
    errors = right.std(1) / len(questions) ** 0.5 if len(questions) > 1 else torch.full((2,), torch.nan)
    return Score(len(questions), float(means[0]), float(errors[0]), float(means[1]), float(errors[1]))


@torch.no_grad()
def _likelihood(model: Any, tokenizer: Any, prompt: str, choice: str, limit: int | None) -> float:
    """Log probability of a choice behind a prompt; a space between the two belongs to the choice."""
    start = prompt.rstrip()
    rest = prompt[len(start) :] or " "
    ids: Tensor = tokenizer(start + rest + choice, return_tensors="pt")["input_ids"]
    known = tokenizer(start, return_tensors="pt")["input_ids"].shape[1]
    if limit and ids.shape[1] > limit:
        raise RecipeError(f"a question of {ids.shape[1]:,} tokens is beyond the model's {limit:,} positions")
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1].float().cpu()
    losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
    return -float(losses[max(known - 1, 0) :].double().sum())


def harness(folder: Path, tasks: Sequence[str], include: Path | None, limit: int | None) -> dict[str, dict[str, Any]]:
    """Task → what lm-evaluation-harness measures of a model as it runs.

    Args:
        include: a folder of tasks of one's own.
        limit: questions of each task; None for all.

    Raises:
        RecipeError: it is not installed, knows no such task, or cannot reach its data.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RecipeError("--tasks needs lm-evaluation-harness: pip install 'compressor[tasks]'") from None
    manager = TaskManager(include_path=None if include is None else str(include))
    known = manager.match_tasks(list(tasks))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise RecipeError(f"--tasks: lm-evaluation-harness has no {unknown[0]}; `lm-eval ls tasks` names those it has")
    positions = open_model(folder).positions
    model = HFLM(pretrained=load(folder), tokenizer=load_tokenizer(folder), max_length=positions, batch_size=1)
    try:
        found = simple_evaluate(model=model, tasks=known, task_manager=manager, limit=limit, bootstrap_iters=0)
    except (OSError, ConnectionError) as error:
        raise RecipeError(
            f"--tasks: the data of a task cannot be had ({str(error).splitlines()[0]}); go online once, or name a "
            "folder of tasks on local files with --task-path"
        ) from None
    results: dict[str, dict[str, Any]] = found["results"]
    return results

"""A whole evaluation: a model as it runs and in float32, beside the one it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...calibrate.corpus import Corpus, builtin_corpus, file_corpus, first_windows, has_tokenizer, load_tokenizer
from ...runtime.errors import ModelError, RecipeError
from ...runtime.loader import load
from ...runtime.stored import open_model
from .long_context import LongEvaluation, evaluate_long
from .measures import Evaluation, cache_per_token, evaluate

AS_RUN = 16  # windows that a model reads as it runs too: the difference to float32 is small, and varies little
LONG = 8  # windows of a length asked for


@dataclass(frozen=True)
class EvaluationJob:
    """What to evaluate.

    Attributes:
        model: a folder, plain or compressed.
        against: the folder of the model that it came from, or None.
        texts: `builtin` (its evaluation split), or a .txt or .jsonl file, each.
        samples: windows of each; fewer where the text is shorter.
        sequence_length: tokens of a window.
        long: tokens of windows in which perplexity by position and retrieval are measured too, or None.
        shared: whether a second question is asked there on the cache that answered a first.
    """

    model: Path
    against: Path | None = None
    texts: tuple[str, ...] = ("builtin",)
    samples: int = 128
    sequence_length: int = 512
    long: int | None = None
    shared: bool = False


@dataclass(frozen=True)
class Findings:
    """What was found on a text; where there are two of something, the second is the base's.

    Attributes:
        corpus_sha256: of the text.
        exact: in float32.
        dtype: what the model computes in where nothing else is asked for.
        as_run: in that, and through the kernels of the device, against itself in float32; of the first windows.
        kv_bytes_per_token: that the caches take, as run.
        long: of windows as long as was asked for, in float32.
    """

    corpus_sha256: str
    exact: Evaluation
    dtype: str
    as_run: Evaluation
    kv_bytes_per_token: tuple[float, ...]
    long: tuple[LongEvaluation, ...] = ()

    def record(self) -> dict[str, Any]:
        """For a file; what was found in float32 is at the top."""
        rest = {key: value for key, value in asdict(self).items() if key != "exact"}
        return {**self.exact.record(), **rest, "long": [one.record() for one in self.long]}


Reading = Callable[[int], AbstractContextManager[Callable[[int], None]]]  # windows → what is told how many are behind


def run_evaluation(job: EvaluationJob, reading: Reading) -> dict[str, Findings]:
    """Evaluate a model on each text; each form of each model is loaded once.

    Args:
        reading: entered before the windows of a text are read, with their number.

    Raises:
        CompressorError: a folder is damaged, or the two models have different tokenizers or vocabularies.
        RecipeError: a length is beyond the model's positions.
    """
    tokenizer = load_tokenizer(job.model)
    opened = open_model(job.model)
    if job.long is not None and opened.positions and job.long > opened.positions:
        raise RecipeError(f"--long {job.long} is beyond the model's {opened.positions} positions")
    others = [] if job.against is None else [job.against]
    corpora = {
        text: builtin_corpus("evaluation") if text == "builtin" else file_corpus(Path(text)) for text in job.texts
    }
    drawn = {
        text: shared_windows(corpus, job.model, others, job.samples, job.sequence_length)
        for text, corpus in corpora.items()
    }
    far = {} if job.long is None else {
        text: first_windows(corpus, tokenizer, LONG, job.long) for text, corpus in corpora.items()
    }  # fmt: skip
    some = next(iter(drawn.values()))[:1]
    cached = [] if job.against is None else [cache_per_token(load(job.against), some)]
    as_run = load(job.model)
    cached.insert(0, cache_per_token(as_run, some))
    own = load(job.model, dtype=torch.float32)
    base = None if job.against is None else load(job.against, dtype=torch.float32)
    found = {}
    for text, windows in drawn.items():
        with reading(len(windows)) as passed:
            rounded = evaluate(as_run, windows[:AS_RUN], own)
            exact = evaluate(own, windows, base, passed=passed)
            each = []
            for one in (own, base):
                if one is not None and text in far:
                    each.append(evaluate_long(one, tokenizer, far[text], shared=job.shared))
        dtype = str(as_run.dtype).removeprefix("torch.")
        found[text] = Findings(corpora[text].sha256, exact, dtype, rounded, tuple(cached), tuple(each))
    return found


def shared_windows(corpus: Corpus, model: Path, others: Sequence[Path], samples: int, length: int) -> Tensor:
    """The first windows of a text, of which a model and others, as far as they have tokenizers, make the same tokens.

    Raises:
        ModelError: they do not, or a model has no such tokens.
    """
    windows = first_windows(corpus, load_tokenizer(model), samples, length)
    open_model(model).check_ids(windows)
    for other in filter(has_tokenizer, others):
        if not torch.equal(windows, first_windows(corpus, load_tokenizer(other), samples, length)):
            raise ModelError(
                f"{model} and {other} make different tokens of one text, so that figures of the two cannot be "
                "compared; name the model that the one was made of"
            )
    return windows

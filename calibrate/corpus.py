"""Text in, token windows out.

The built-in corpus is text that every Python installation carries: the standard library's sources and the topics of
`pydoc_data`. It needs no network, but it varies with the Python version, so its hash travels with every result.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..runtime.errors import ModelError, RecipeError

Split = Literal["train", "calibration", "evaluation"]
Document = str | list[dict[str, Any]]  # plain text, or chat messages

# Left out: what some distributions package apart, and files that are tables rather than text.
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "turtledemo", "tkinter", "lib2to3",
    "distutils", "ensurepip", "encodings", "__pycache__", "lib-dynload", "__phello__",
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Documents with the hash that identifies them in fingerprints, manifests and baselines."""

    name: str
    documents: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@cache
def builtin_corpus(split: Split) -> Corpus:
    """The Python standard library's text of one split; a document belongs to a split by the hash of its name."""
    first_name: dict[str, str] = {}  # a text that stands under several names belongs to the first of them
    for name, text in sorted(_stdlib_documents()):
        first_name.setdefault(text, name)
    documents = tuple(text for text, name in first_name.items() if split_of(name) == split)
    if not documents:
        raise RecipeError("the Python standard library's sources are not on this machine: name a text file under data:")
    return Corpus(f"builtin:{split}", documents)


def split_of(name: str) -> Split:
    """Which split a document of the built-in corpus is in: 1/16 evaluation, 1/16 calibration, the rest train."""
    bucket = hashlib.sha256(name.encode()).digest()[0]
    return "evaluation" if bucket < 16 else "calibration" if bucket < 32 else "train"


def _stdlib_documents() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        # _sysconfigdata_* names the machine it was built on.
        if _SKIPPED_FOLDERS.intersection(parts) or parts[0] == "pydoc_data" or parts[-1].startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield "/".join(parts), text
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic, text in topics.items():
        yield f"pydoc_data/topics/{topic}", text


def find_text(path: Path) -> None:
    """Refuse a data file that is missing or of another kind."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such text file; give a .txt or .jsonl file under data.source, or 'builtin'")
    if path.suffix not in (".txt", ".jsonl"):
        raise RecipeError(f"{path}: data files are .txt or .jsonl, not {path.suffix or 'a file without a suffix'}")


def file_corpus(path: Path) -> Corpus:
    """A local `.txt` (one document), or `.jsonl` with `text` or chat `messages` on each line.

    Raises:
        RecipeError: the file is missing, of another kind, or a line of it cannot be used (the line is named).
    """
    find_text(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    documents = tuple(_jsonl_documents(path, text)) if path.suffix == ".jsonl" else (text,)
    if not any(documents):
        raise RecipeError(f"{path}: the file holds no text")
    return Corpus(path.name, documents)


def _jsonl_documents(path: Path, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path}:{number}: not a JSON document ({error.msg})") from None
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield row["text"].encode("utf-8", "replace").decode()  # JSON can say half a surrogate pair
        elif isinstance(row, dict) and isinstance(row.get("messages"), list):
            if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in row["messages"]):
                raise RecipeError(f"{path}:{number}: every message needs a 'role' and a 'content'")
            yield row["messages"]
        else:
            raise RecipeError(f"{path}:{number}: needs a 'text' string or a 'messages' list")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ModelError(f"{folder}: has no tokenizer; copy tokenizer.json from where the model came from")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises whatever its tokenizers do
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({_first_line(error)})") from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds any file that a tokenizer is made of."""
    return any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tokenize(corpus: Corpus, tokenizer: Any) -> list[int]:
    """All documents as one token stream, the end-of-text token (where the tokenizer has one) after each."""
    stream: list[int] = []
    for document in corpus.documents:
        if isinstance(document, str):
            ids = tokenizer(document, verbose=False)["input_ids"]
        else:
            if tokenizer.chat_template is None:
                raise RecipeError(f"{corpus.name} holds chat messages, but the model's tokenizer has no chat template")
            try:
                ids = tokenizer.apply_chat_template(document, tokenize=True, return_dict=True)["input_ids"]
            except Exception as error:  # whatever a model's template does
                reason = _first_line(error)
                raise RecipeError(f"{corpus.name}: the chat template refuses a conversation ({reason})") from None
        stream.extend(ids)
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            stream.append(tokenizer.eos_token_id)
    return stream


def token_windows(
    corpus: Corpus, tokenizer: Any, *, samples: int | None, sequence_length: int, seed: int = 0
) -> Tensor:
    """Cut the stream into windows without padding and draw `samples` of them (all of them in order when None).

    Returns:
        int64 `[samples, sequence_length]`, the same for the same corpus, tokenizer and seed.

    Raises:
        RecipeError: the corpus is shorter than what was asked for.
    """
    stream = tokenize(corpus, tokenizer)
    count = len(stream) // sequence_length
    wanted = count if samples is None else samples
    if count < max(wanted, 1):
        raise RecipeError(
            f"{corpus.name} has {len(stream):,} tokens, which is {count} windows of {sequence_length}; "
            f"{max(wanted, 1)} were asked for: lower data.samples or give more text"
        )
    windows = torch.tensor(stream[: count * sequence_length], dtype=torch.int64).view(count, sequence_length)
    if samples is None:
        return windows
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return windows[drawn].contiguous()

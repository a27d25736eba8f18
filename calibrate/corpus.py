"""Text in, token windows out.

Text is read and tokenized a part at a time, for a tokenizer takes over a hundred bytes of memory for each of its input.

The built-in corpus is text that every Python installation carries: the standard library's sources and the topics of
`pydoc_data`. It needs no network, but it varies with the Python version, so its hash travels with every result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, AnyStr, Literal, Protocol

import torch
from torch import Tensor

from ..runtime.errors import ModelError, RecipeError, first_line

Split = Literal["train", "calibration", "evaluation"]
Document = str | list[dict[str, Any]]  # plain text, or chat messages

# Left out: what some distributions package apart, and files that are tables rather than text.
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "turtledemo", "tkinter", "lib2to3",
    "distutils", "ensurepip", "encodings", "__pycache__", "lib-dynload", "__phello__",
}  # fmt: skip


PART = 1 << 14  # characters, or bytes of a file: tokenizing so many takes a few megabytes
MANY = 256  # parts to draw windows from: some 4 MB of text


@dataclass(frozen=True)
class Part:
    """A document, or a piece of one.

    Attributes:
        first, last: whether the document begins and ends here.
    """

    text: Document
    first: bool = True
    last: bool = True


class Parts(Protocol):
    """Parts in the order of the text; those of a file are read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Part: ...


@dataclass(frozen=True)
class Corpus:
    """Text in parts, and the hash of all of it, which identifies it in fingerprints, manifests and baselines."""

    name: str
    sha256: str
    parts: Parts

    @classmethod
    def of(cls, name: str, documents: Iterable[Document]) -> Corpus:
        """A corpus in memory."""
        digest, parts = hashlib.sha256(), list[Part]()
        for document in documents:
            digest.update(_json(document))
            parts += _parts(document)
        return cls(name, digest.hexdigest(), tuple(parts))


def _json(document: Document) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _parts(document: Document) -> list[Part]:
    if not isinstance(document, str):
        return [Part(document)] if document else []
    pieces, start = list[str](), 0
    while start < len(document):
        piece = document[start : start + PART]
        if start + PART < len(document):
            piece = piece[: _end(piece)]
        pieces.append(piece)
        start += len(piece)
    return [Part(piece, number == 0, number == len(pieces) - 1) for number, piece in enumerate(pieces)]


# Where a piece may end: between lines that are neither blank nor indented, where tokenizers split in any case; else in
# front of a space; else between two characters (in UTF-8: not in front of a byte that goes on with one).
_LINE, _SPACE, _CHARACTER = r"\S\r?\n(?=\S)", r"\S(?= \S)", r"[^\x80-\xbf][\x80-\xbf]*(?=[^\x80-\xbf])"


def _end(text: AnyStr) -> int:
    """How much of a text to take, that the rest can go on from."""
    for end in (_LINE, _SPACE, _CHARACTER):
        last = f"(?s:.*){end}"
        if found := re.match(last.encode() if isinstance(text, bytes) else last, text):
            return found.end()
    return len(text)


@cache
def builtin_corpus(split: Split) -> Corpus:
    """The Python standard library's text of one split; a document belongs to a split by the hash of its name."""
    first_name: dict[str, str] = {}  # a text that stands under several names belongs to the first of them
    for name, text in sorted(_stdlib_documents()):
        first_name.setdefault(text, name)
    documents = tuple(text for text, name in first_name.items() if split_of(name) == split)
    if not documents:
        raise RecipeError("the Python standard library's sources are not on this machine: name a text file under data:")
    return Corpus.of(f"builtin:{split}", documents)


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
    """Refuse a data file that is missing, of another kind, or not to be read."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such text file; give a .txt or .jsonl file, or 'builtin'")
    if path.suffix not in (".txt", ".jsonl"):
        raise RecipeError(f"{path}: data files are .txt or .jsonl, not {path.suffix or 'a file without a suffix'}")
    if not os.access(path, os.R_OK):
        raise RecipeError(f"{path}: this text file may not be read; change its permissions, or name another one")


def file_corpus(path: Path) -> Corpus:
    """A local `.txt` (one document), or `.jsonl` with `text` or chat `messages` on each line.

    The file is read through once, to be checked and hashed, and is kept open.

    Raises:
        RecipeError: the file is missing, of another kind, or a line of it cannot be used (the line is named).
    """
    find_text(path)
    try:
        sha256, parts = _scan_lines(path) if path.suffix == ".jsonl" else _scan_text(path)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if not len(parts):
        raise RecipeError(f"{path}: the file holds no text")
    return Corpus(path.name, sha256, parts)


class _TextParts:
    """Pieces of a text file, each from one offset to the next."""

    def __init__(self, path: Path, offsets: array[int]) -> None:
        self._file, self._offsets = open(path, "rb"), offsets  # noqa: SIM115 (read from as long as this lives)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Part:
        start, end = self._offsets[number], self._offsets[number + 1]
        self._file.seek(start)
        return Part(_plain(self._file.read(end - start).decode()), number == 0, number == len(self) - 1)


def _scan_text(path: Path) -> tuple[str, Parts]:
    """Hash and cut a text file."""
    digest, offsets, rest = hashlib.sha256(b'"'), array("q", [0]), b""
    with open(path, "rb") as file:
        while rest := rest + file.read(PART - len(rest)):
            size = _end(rest) if len(rest) == PART else len(rest)
            piece = _decoded(rest[:size], path, offsets[-1])
            digest.update(_json(_plain(piece))[1:-1])
            offsets.append(offsets[-1] + size)
            rest = rest[size:]
    digest.update(b'"')
    return digest.hexdigest(), _TextParts(path, offsets)


class _LineParts:
    """Parts of a file of JSON lines: the offset of a line, and which piece of its document it is."""

    def __init__(self, path: Path, offsets: array[int], pieces: array[int]) -> None:
        self._file, self._offsets, self._pieces = open(path, "rb"), offsets, pieces  # noqa: SIM115
        self._line: tuple[int, list[Part]] = (-1, [])  # the one that was read last

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> Part:
        offset = self._offsets[number]
        if self._line[0] != offset:
            self._file.seek(offset)
            self._line = offset, _parts(_document(json.loads(self._file.readline())))
        return self._line[1][self._pieces[number]]


def _scan_lines(path: Path) -> tuple[str, Parts]:
    """Check and hash a file of JSON lines, and find their parts."""
    digest, offsets, pieces, offset = hashlib.sha256(), array("q"), array("l"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    document = _document(json.loads(_decoded(line, path, offset)))
                except json.JSONDecodeError as error:
                    raise RecipeError(f"{path}:{number}: not a JSON document ({error.msg})") from None
                except RecursionError:
                    raise RecipeError(f"{path}:{number}: not a JSON document (nested too deeply)") from None
                except ValueError as error:
                    raise RecipeError(f"{path}:{number}: {error}") from None
                digest.update(_json(document))
                for piece in range(len(_parts(document))):
                    offsets.append(offset)
                    pieces.append(piece)
            offset += len(line)
    return digest.hexdigest(), _LineParts(path, offsets, pieces)


def _decoded(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        where = f"byte {offset + error.start:,}: {error.reason}"
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({where})") from None


def _plain(text: str) -> str:
    """A text with its line ends as they are on Unix."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _document(row: Any) -> Document:
    """What a line of JSON holds.

    Raises:
        ValueError: neither a text nor messages.
    """
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"]).encode("utf-8", "replace").decode()  # JSON can say half a surrogate pair
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        messages: list[dict[str, Any]] = row["messages"]
        if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
            raise ValueError("every message needs a 'role' and a 'content'")
        return messages
    raise ValueError("needs a 'text' string or a 'messages' list")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ModelError(f"{folder}: has no tokenizer; copy tokenizer.json from where the model came from")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer("a")  # which meets what is only looked at when text comes
        return tokenizer
    except Exception as error:  # transformers raises whatever its tokenizers do
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)})") from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds any file that a tokenizer is made of."""
    return any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    )


def tokenize(corpus: Corpus, tokenizer: Any) -> Tensor:
    """All documents as one token stream, int32 `[tokens]`, the end-of-text token (where the tokenizer has one) after
    each."""
    return _stream(corpus, tokenizer, range(len(corpus.parts)))


def token_windows(
    corpus: Corpus, tokenizer: Any, *, samples: int | None, sequence_length: int, seed: int = 0
) -> Tensor:
    """Cut the stream into windows without padding and draw `samples` of them (all of them in order when None).

    Of a long text only parts are read, drawn from all over it: as many as there are windows at least.

    Returns:
        int64 `[samples, sequence_length]`, the same for the same corpus, tokenizer and seed.

    Raises:
        RecipeError: the corpus is shorter than what was asked for.
    """
    if samples is None:
        return first_windows(corpus, tokenizer, None, sequence_length)
    return drawn_windows(corpus, tokenizer, samples, sequence_length, seed)[0]


def drawn_windows(
    corpus: Corpus,
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    seed: int,
    *,
    least: int | None = None,
    held_out: int = 0,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw windows, and others that are held out, as far as there are so many: int64 `[samples, sequence_length]` and
    `[held_out, sequence_length]`. The former do not depend on how many of the latter are wanted, unless `least` is
    given and the text is too short for both: then up to a quarter of it is held out, and the rest is drawn.

    Args:
        least: windows that are enough, where the text has no more; default: as many as are to be drawn.
        parts: of the text to draw from, at least; default: many.

    Raises:
        RecipeError: the corpus is shorter than that.
    """
    order = torch.randperm(len(corpus.parts), generator=torch.Generator().manual_seed(seed)).tolist()
    read = _read(corpus, tokenizer, order, samples * sequence_length, max(samples, MANY if parts is None else parts))
    windows = _windows(corpus, _joined(tokenizer, read), least or samples, sequence_length)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    others = windows[drawn[samples : samples + held_out]]
    if len(others) < held_out:  # all that was read is drawn
        rest = [number for number in order if number not in read]
        more = _joined(tokenizer, _read(corpus, tokenizer, rest, (held_out - len(others)) * sequence_length))
        count = min(held_out - len(others), len(more) // sequence_length)
        others = torch.cat([others, more[: count * sequence_length].view(count, sequence_length)])
    short = min(held_out, len(windows) // 4) - len(others)
    if least is not None and short > 0:
        samples = len(windows) - short
        others = torch.cat([others, windows[drawn[samples:]]])
    return windows[drawn[:samples]].long(), others.long()


def first_windows(corpus: Corpus, tokenizer: Any, limit: int | None, sequence_length: int) -> Tensor:
    """The first windows of the stream in order, as many as there are up to a limit, int64 `[windows, sequence_length]`;
    no more of the text is read than they take.

    Raises:
        RecipeError: the corpus is shorter than one window.
    """
    enough = None if limit is None else limit * sequence_length
    stream = _stream(corpus, tokenizer, range(len(corpus.parts)), enough)
    return _windows(corpus, stream, 1, sequence_length)[:limit].long()


def _windows(corpus: Corpus, stream: Tensor, wanted: int, sequence_length: int) -> Tensor:
    """A stream in as many windows as it has, if these are as many as are wanted."""
    count = len(stream) // sequence_length
    if count < wanted:
        fewer = f"fewer windows ({wanted} were asked for)" if count else f"a shorter length than {sequence_length}"
        raise RecipeError(
            f"{corpus.name} has {len(stream):,} tokens, which is {count} windows of {sequence_length}: give more text, "
            f"or ask for {fewer}"
        )
    return stream[: count * sequence_length].view(count, sequence_length)


def _stream(corpus: Corpus, tokenizer: Any, order: Iterable[int], tokens: int | None = None) -> Tensor:
    """Parts in an order until there are as many tokens as asked for (None: all), as one stream of int32 `[tokens]`."""
    return _joined(tokenizer, _read(corpus, tokenizer, order, tokens))


def _read(
    corpus: Corpus, tokenizer: Any, order: Iterable[int], tokens: int | None, parts: int = 0
) -> dict[int, tuple[Part, Tensor]]:
    """Tokenize parts in an order, until there are as many tokens and parts as asked for (None: all): number → what the
    part is, without its text, and its tokens."""
    found: dict[int, tuple[Part, Tensor]] = {}
    total = 0
    for number in order:
        if tokens is not None and total >= tokens and len(found) >= parts:
            break
        part = corpus.parts[number]
        try:
            ids = torch.tensor(_ids(corpus, tokenizer, part.text), dtype=torch.int32)
        except (RuntimeError, OverflowError):
            raise ModelError(f"{corpus.name}: the model's tokenizer has ids beyond those of any embedding") from None
        found[number] = replace(part, text=type(part.text)()), ids
        total += len(ids)
    return found


def _joined(tokenizer: Any, found: dict[int, tuple[Part, Tensor]]) -> Tensor:
    """Parts as they stand in the text: int32 `[tokens]`. Where a neighbour is missing, a part begins or ends like a
    document."""
    before, after, end = (torch.tensor(ids, dtype=torch.int32) for ids in _around(tokenizer))
    stream: list[Tensor] = []
    for number, (part, ids) in sorted(found.items()):
        plain = isinstance(part.text, str)  # a chat template says itself how a conversation begins and ends
        if plain and (part.first or number - 1 not in found):
            stream.append(before)
        stream.append(ids)
        if part.last or number + 1 not in found:
            stream.append(after if plain else ids[:0])
            if not torch.equal(torch.cat(stream[-2:])[-1:], end):
                stream.append(end)
    return torch.cat([end[:0], *stream])


def _ids(corpus: Corpus, tokenizer: Any, text: Document) -> list[int]:
    """The tokens of a part, without what the tokenizer puts around a text."""
    if isinstance(text, str):
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    if tokenizer.chat_template is None:
        raise RecipeError(f"{corpus.name} holds chat messages, but the model's tokenizer has no chat template")
    try:
        ids = tokenizer.apply_chat_template(text, tokenize=True, return_dict=True)["input_ids"]
        return ids
    except Exception as error:  # whatever a model's template does
        reason = first_line(error)
        raise RecipeError(f"{corpus.name}: the chat template refuses a conversation ({reason})") from None


def _around(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """What a tokenizer puts in front of a text and behind it, and the end-of-text token, if it has one."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    end = tokenizer.eos_token_id
    return whole[:start], whole[start + len(plain) :], [] if end is None else [end]

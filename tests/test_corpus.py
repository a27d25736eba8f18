"""Text in, the same windows out."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from compressor.calibrate import corpus as corpus_module
from compressor.calibrate.corpus import (
    PART,
    Corpus,
    builtin_corpus,
    file_corpus,
    first_windows,
    split_of,
    token_windows,
    tokenize,
)
from compressor.runtime.errors import RecipeError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(EXAMPLES / "tiny-llama")


def test_splits_share_no_document_and_are_large_enough(tokenizer) -> None:  # type: ignore[no-untyped-def]
    splits = {name: builtin_corpus(name) for name in ("train", "calibration", "evaluation")}
    documents = [{part.text for part in corpus.parts} for corpus in splits.values()]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    assert len(tokenize(splits["evaluation"], tokenizer)) > 50_000
    assert len(tokenize(splits["calibration"], tokenizer)) > 65_536
    builtin_corpus.cache_clear()
    assert builtin_corpus("evaluation").sha256 == splits["evaluation"].sha256
    assert split_of("asyncio/events.py") == "train"


def test_windows_are_packed_deterministic_and_drawn_by_seed(tokenizer) -> None:  # type: ignore[no-untyped-def]
    corpus = builtin_corpus("calibration")
    stream = tokenize(corpus, tokenizer)
    every = token_windows(corpus, tokenizer, samples=None, sequence_length=64)
    assert torch.equal(every.flatten(), stream[: every.numel()])
    assert torch.equal(first_windows(corpus, tokenizer, 5, 64), every[:5])
    assert torch.equal(first_windows(corpus, tokenizer, 10**6, 64), every)
    first = token_windows(corpus, tokenizer, samples=20, sequence_length=64, seed=1)
    assert torch.equal(first, token_windows(corpus, tokenizer, samples=20, sequence_length=64, seed=1))
    assert not torch.equal(first, token_windows(corpus, tokenizer, samples=20, sequence_length=64, seed=2))
    rows = {tuple(row) for row in every.tolist()}
    assert all(tuple(row) in rows for row in first.tolist())
    assert len({tuple(row) for row in first.tolist()}) == 20


def test_documents_end_with_the_end_token(tokenizer) -> None:  # type: ignore[no-untyped-def]
    stream = tokenize(Corpus.of("x", ("a b", "", "c", "d<|endoftext|>")), tokenizer).tolist()
    assert stream[:-2] == [*tokenizer("a b")["input_ids"], 0, *tokenizer("c")["input_ids"], 0]
    assert stream[-2:] == [*tokenizer("d")["input_ids"], 0]


class Watched:
    """A tokenizer that remembers what it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.texts = tokenizer, list[str]()

    def __call__(self, text: str, **options: Any) -> Any:
        self.texts.append(text)
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class Begun(Watched):
    """One that puts a token in front of a text."""

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [*[7] * add_special_tokens, *super().__call__(text, **options)["input_ids"]]}


def numbered(first: int, last: int) -> str:
    return "".join(f"line {number} of the text\n" + "\n" * (number % 2) for number in range(first, last))


def test_a_long_document_is_tokenized_in_pieces_to_the_same_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    text, watched = numbered(0, 5000), Watched(tokenizer)
    stream = tokenize(Corpus.of("x", (text,)), watched)
    assert stream.tolist() == [*tokenizer(text, verbose=False)["input_ids"], 0]
    assert "".join(watched.texts[:-2]) == text  # the last two ask what it puts around a text
    assert PART / 2 < max(map(len, watched.texts)) <= PART
    assert len(first_windows(Corpus.of("x", (text,)), watched, 3, 32)) == 3
    assert sum(map(len, watched.texts)) < len(text) + 2 * PART


def test_what_stands_around_a_text_stands_around_documents_not_pieces(tokenizer) -> None:  # type: ignore[no-untyped-def]
    text = numbered(0, 2000)
    stream = tokenize(Corpus.of("x", (text, "b")), Begun(tokenizer)).tolist()
    plain = tokenizer(text, verbose=False)["input_ids"]
    assert stream == [7, *plain, 0, 7, *tokenizer("b")["input_ids"], 0]


def test_few_windows_of_a_long_text_come_from_all_over_it(tokenizer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(corpus_module, "PART", 512)
    monkeypatch.setattr(corpus_module, "MANY", 8)
    corpus, watched = Corpus.of("x", (numbered(0, 20000),)), Watched(tokenizer)
    first = token_windows(corpus, watched, samples=12, sequence_length=32, seed=1)
    assert len(watched.texts) == 12 + 2
    assert torch.equal(first, token_windows(corpus, tokenizer, samples=12, sequence_length=32, seed=1))
    assert not torch.equal(first, token_windows(corpus, tokenizer, samples=12, sequence_length=32, seed=2))
    places = sorted(int(re.findall(r"line (\d+) of", tokenizer.decode(window))[0]) for window in first)
    assert places[0] < 6000
    assert places[-1] > 14000
    assert len({place // 500 for place in places}) > 6
    many = token_windows(corpus, watched, samples=400, sequence_length=300, seed=1)  # more tokens than so many parts
    assert many.shape == (400, 300)


def test_jsonl_texts_and_messages(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "hello"}]
    path.write_text("\n".join(json.dumps(row) for row in ({"text": "one"}, {"messages": messages})) + "\n\n")
    corpus = file_corpus(path)
    assert [part.text for part in corpus.parts] == ["one", messages]
    with pytest.raises(RecipeError, match="has no chat template"):
        tokenize(corpus, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    try:
        assert tokenizer.decode(tokenize(corpus, tokenizer).tolist()) == "one<|endoftext|>[user]hello<|endoftext|>"
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("gone.txt", None, "no such text file"),
        ("a.csv", "x", r"\.txt or \.jsonl, not \.csv"),
        ("a.txt", "", "holds no text"),
        ("a.jsonl", '{"text": "x"}\n{oops\n', r"a\.jsonl:2: not a JSON document"),
        ("a.jsonl", '{"body": "x"}\n', r"a\.jsonl:1: needs a 'text' string or a 'messages' list"),
        ("a.jsonl", '{"text": ""}\n', "holds no text"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1: every message needs a 'role' and a 'content'"),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000, r"a\.jsonl:2: not a JSON document \(nested too deeply\)"),
        ("a.txt", b"x" * PART + b"\xff", r"a\.txt: cannot be read as UTF-8 text \(byte 16,384: invalid start byte"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"cannot be read as UTF-8 text \(byte 24: invalid start"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes | None, match: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RecipeError, match=match):
        file_corpus(tmp_path / name)


def test_too_little_text(tokenizer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match=r"which is 0 windows of 512: give more text, or ask for a shorter"):
        token_windows(Corpus.of("short", ("some words",)), tokenizer, samples=4, sequence_length=512)


@pytest.mark.parametrize(
    "text",
    [
        numbered(0, 3000),
        numbered(0, 3000).replace("\n", "\r\n"),
        "no end of words " * 4000,
        "\u6587\u5b57\u00b0" * 20000,
        "\U0001f40d" * 9000 + '"\\\t' * 9000,
        "\n" * 40000,
    ],
    ids=["lines", "lines of Windows", "one line", "no spaces", "four bytes and escapes", "nothing but line ends"],
)
def test_a_file_is_cut_and_hashed_as_its_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "before"}) + "\n\n" + json.dumps({"text": text}) + "\n")
    plain = text.replace("\r\n", "\n")
    for corpus, expected in (
        (file_corpus(tmp_path / "a.txt"), Corpus.of("a.txt", (plain,))),
        (file_corpus(tmp_path / "a.jsonl"), Corpus.of("a.jsonl", ("before", text))),
    ):
        parts = [corpus.parts[number] for number in range(len(corpus.parts))]
        assert corpus.sha256 == expected.sha256
        assert "".join(str(part.text) for part in parts) == "".join(str(part.text) for part in expected.parts)
        assert max(len(str(part.text)) for part in parts) <= PART
        assert [part.first for part in parts[1:]] == [part.last for part in parts[:-1]]
        assert parts[0].first
        assert parts[-1].last
        assert corpus.parts[0] == parts[0]


def test_a_large_file_does_not_lie_in_memory(tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    text = numbered(0, 40000)
    (tmp_path / "a.txt").write_text(text * 10)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text[n : n + 2000]}) + "\n" for n in range(4000)) * 2)
    for name in ("a.txt", "a.jsonl"):
        assert (tmp_path / name).stat().st_size > 8_000_000
        tracemalloc.start()
        corpus = file_corpus(tmp_path / name)
        windows = token_windows(corpus, tokenizer, samples=4, sequence_length=64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert windows.shape == (4, 64)
        assert peak < 4_000_000, name

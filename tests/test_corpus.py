"""Text in, the same windows out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from compressor.calibrate.corpus import Corpus, builtin_corpus, file_corpus, split_of, token_windows, tokenize
from compressor.runtime.errors import RecipeError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(EXAMPLES / "tiny-llama")


def test_splits_share_no_document_and_are_large_enough(tokenizer) -> None:  # type: ignore[no-untyped-def]
    splits = {name: builtin_corpus(name) for name in ("train", "calibration", "evaluation")}
    documents = [set(corpus.documents) for corpus in splits.values()]
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
    assert every.flatten().tolist() == stream[: every.numel()]
    first = token_windows(corpus, tokenizer, samples=20, sequence_length=64, seed=1)
    assert torch.equal(first, token_windows(corpus, tokenizer, samples=20, sequence_length=64, seed=1))
    assert not torch.equal(first, token_windows(corpus, tokenizer, samples=20, sequence_length=64, seed=2))
    rows = {tuple(row) for row in every.tolist()}
    assert all(tuple(row) in rows for row in first.tolist())
    assert len({tuple(row) for row in first.tolist()}) == 20


def test_documents_end_with_the_end_token(tokenizer) -> None:  # type: ignore[no-untyped-def]
    stream = tokenize(Corpus("x", ("a b", "c")), tokenizer)
    assert stream == [*tokenizer("a b")["input_ids"], 0, *tokenizer("c")["input_ids"], 0]


def test_jsonl_texts_and_messages(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "hello"}]
    path.write_text("\n".join(json.dumps(row) for row in ({"text": "one"}, {"messages": messages})) + "\n\n")
    corpus = file_corpus(path)
    assert corpus.documents == ("one", messages)
    with pytest.raises(RecipeError, match="has no chat template"):
        tokenize(corpus, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    try:
        assert tokenizer.decode(tokenize(corpus, tokenizer)) == "one<|endoftext|>[user]hello<|endoftext|>"
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
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, match: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=match):
        file_corpus(tmp_path / name)


def test_too_little_text(tokenizer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError, match=r"has \d+ tokens, which is 0 windows of 512; 4 were asked for"):
        token_windows(Corpus("short", ("some words",)), tokenizer, samples=4, sequence_length=512)

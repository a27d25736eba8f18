"""Questions with choices, of a file and of lm-evaluation-harness."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import run

from compressor.compress.evaluate import tasks
from compressor.runtime.errors import RecipeError

Pico = Callable[..., Path]
WORDS = ["def", "return", "import", "class", "self", "none", "true", "value", "list", "for", "in", "range", "print"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    draw = random.Random(0)
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=5)) + ("" if number % 3 else " "),
            "choices": [" ".join(draw.choices(WORDS, k=draw.randrange(1, 4))) for _ in range(3)],
            "answer": draw.randrange(3),
        }
        for number in range(12)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "3", '{"prompt": "x", "choices": ["a"]}', '{"prompt": "x", "choices": ["a"], "answer": 1}',
        '{"prompt": "x", "choices": ["a", 2], "answer": 0}', '{"prompt": "", "choices": ["a"], "answer": 0}',
        '{"prompt": "x", "choices": [], "answer": 0}', '{"prompt": "x", "choices": ["a"], "answer": "a"}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_question(line: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "x", "choices": ["a", "b"], "answer": 1}\n' + line)
    with pytest.raises(RecipeError, match=r"questions\.jsonl:2: is no question"):
        tasks.read_questions(path)


def test_a_file_of_questions(pico: Pico, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no question"):
        tasks.read_questions(_written(tmp_path / "empty", "\n"))
    with pytest.raises(RecipeError, match="cannot be read"):
        tasks.read_questions(tmp_path / "missing")
    model, words = pico(), ("--samples", 1, "--sequence-length", 16)
    text = _written(tmp_path / "text.txt", "import os\n" * 200)
    command = ("eval", model, "--against", model, *words, "--choices", questions, "--data", "builtin", "--data", text)
    found = json.loads(run(*command, "--json", cwd=tmp_path).stdout)
    own, base = found["choices"]
    assert own == base == tasks.score(model, tasks.read_questions(questions), lambda count: None).record()
    assert own["questions"] == 12
    assert set(found["texts"]) == {"builtin", str(text)}
    assert found["texts"]["builtin"]["perplexity"] == found["perplexity"] != found["texts"][str(text)]["perplexity"]
    shown = run(*command, cwd=tmp_path).stdout
    assert f"{100 * own['accuracy']:.2f} ± {100 * own['accuracy_error']:.2f} %" in shown


def test_a_question_beyond_the_positions(pico: Pico) -> None:
    long = tasks.Question("import " * 300, ("a", "b"), 0)
    with pytest.raises(RecipeError, match="beyond the model's 256 positions"):
        tasks.score(pico(), [long], lambda count: None)


def test_the_harness_answers_alike(pico: Pico, questions: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: '{questions}'}}}}\ntest_split: test\n"
        "doc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    found = tasks.harness(pico(), ["mine"], folder, None)["mine"]
    own = tasks.score(pico(), tasks.read_questions(questions), lambda count: None)
    assert found["acc,none"] == pytest.approx(own.accuracy)
    assert found["acc_norm,none"] == pytest.approx(own.by_length)
    with pytest.raises(RecipeError, match="has no nothing_of_the_sort"):
        tasks.harness(pico(), ["nothing_of_the_sort"], folder, None)


def test_without_the_harness(pico: Pico, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'compressor\[tasks\]'"):
        tasks.harness(pico(), ["mine"], None, None)
    run("eval", pico(), "--task-limit", 3, cwd=tmp_path, code=2)


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path

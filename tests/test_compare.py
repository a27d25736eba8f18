"""`compressor compare` and `sweep`: outputs beside each other."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import run

from compressor.calibrate.corpus import file_corpus, first_windows, load_tokenizer
from compressor.compress.baseline import Figures
from compressor.compress.compare import MAX_CHOICES, unbeaten, variations
from compressor.compress.evaluate import evaluate
from compressor.compress.report import comparison, figures
from compressor.runtime import load
from compressor.runtime.errors import RecipeError

Pico = Callable[..., Path]


def row(name: str, nbytes: int, kl: float) -> tuple[str, Figures]:
    return name, Figures(bytes=nbytes, kv_bytes_per_token=1.0, format="plain", kl_mean=kl, perplexity_ratio=1.0)


def test_what_nothing_beats() -> None:
    draw = random.Random(0)
    rows = [row(str(n), draw.randrange(6), draw.randrange(6)) for n in range(40)]
    best = unbeaten(rows, "bytes")
    for name, found in rows:
        place = found.bytes, found.kl_mean
        beaten = any(
            other.bytes <= found.bytes and other.kl_mean <= found.kl_mean and (other.bytes, other.kl_mean) != place
            for _, other in rows
        )
        assert (name in best) is not beaten


def test_combinations_of_options_have_names() -> None:
    found = variations(["passes.0.bits=[2, 3]", "passes.0.damping=.1", "data.samples=[8,16]"])
    assert [name for name, _ in found] == [f"bits={bits} samples={count}" for bits in (2, 3) for count in (8, 16)]
    assert found[0][1] == ("passes.0.bits=2", "passes.0.damping=.1", "data.samples=8")
    alike = variations(["passes.0.bits=[2,3]", "passes.1.bits=[4,5]"])
    assert alike[0][0] == "passes.0.bits=2 passes.1.bits=4"
    [(_, (first,)), (_, (second,))] = variations(["passes.0.targets=[['*.q_proj'], ['*.q_proj', '*.k_proj']]"])
    assert (first, second) == ("passes.0.targets=['*.q_proj']", "passes.0.targets=['*.q_proj', '*.k_proj']")
    with pytest.raises(RecipeError, match="several values"):
        variations(["passes.0.bits=3", "passes.0.bits=[3]"])
    with pytest.raises(RecipeError, match=f"more than {MAX_CHOICES}"):
        variations([f"a={list(range(17))}", f"b={list(range(17))}"])


def test_pages_and_pictures(tmp_path: Path) -> None:
    rows = [row("original", 9, 0.0), row("<b>", 5, 0.1), row("c", 4, 0.2), row("d", 6, 0.3)]
    comparison.write_picture(rows, tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    comparison.write_page(rows, "a sweep", tmp_path / "found.html")
    page = (tmp_path / "found.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1, "the KV cache is the same in all"
    assert "<strong>&lt;b&gt;</strong>" in page
    assert "<td>d</td>" in page
    comparison.write_picture(rows[:1], tmp_path / "nothing.png")
    odd = ("re:$a$b$", 1.0, 0.1, 0.01)  # which is no formula
    assert "$a$b$" in figures.svg(figures.pareto([odd], set(), "bytes"), 2.0)
    assert "var(--first)" in figures.svg(figures.pareto([("x", 1.0, 0.1, 0.01)], {"x"}, "bytes"), 2.0)


def test_a_sweep_goes_on_and_compare_agrees(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    model = pico()
    measured = ("--data", calibration_text, "--samples", 3, "--sequence-length", 32)
    command = (
        "sweep",
        "w4a16-rtn",
        model,
        "--set",
        "passes.0.bits=[3,8]",
        "--set",
        "passes.0.group_size=32",
        *measured,
    )
    first = run(*command, "--html", "found.html", cwd=tmp_path)
    assert "bits=3: KL" in first.stderr
    assert (tmp_path / "found.html").is_file()
    again = run(*command, "--json", cwd=tmp_path)
    assert again.stderr.count("(kept)") == 2
    rows = {found["name"]: found for found in json.loads(again.stdout)}
    assert set(rows) == {"bits=3", "bits=8"}
    assert rows["bits=3"]["kl_mean"] > rows["bits=8"]["kl_mean"] > 0
    outs = sorted((tmp_path / "sweep").glob("*/out"), key=lambda out: (out / "model.safetensors").stat().st_size)
    compared = run("compare", model, *outs, *measured, "--png", "found.png", "--json", cwd=tmp_path)
    original, *others = json.loads(compared.stdout)
    assert (original["kl_mean"], original["format"]) == (0.0, "plain")
    assert others[0]["name"] == str(outs[0]), "two folders of one name are told apart"
    assert (tmp_path / "found.png").is_file()
    windows = first_windows(file_corpus(calibration_text), load_tokenizer(model), 3, 32)
    for out, found in zip(outs, others, strict=True):
        exact = evaluate(load(out, dtype=torch.float32), windows, load(model, dtype=torch.float32)).against
        assert exact is not None
        assert found["kl_mean"] == pytest.approx(exact.kl_mean, rel=1e-9)
        assert found["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors")) - _headers(out)
    (tmp_path / "other").mkdir()
    renamed = tmp_path / "other" / model.name
    shutil.copytree(outs[0], renamed)
    rows = json.loads(run("compare", model, renamed, *measured, "--json", cwd=tmp_path).stdout)
    assert [(found["name"], found["kl_mean"]) for found in rows] == [
        (str(model), 0.0), (str(renamed), others[0]["kl_mean"]),
    ], "an output that is called as the model is"  # fmt: skip
    run("compare", model, outs[0], outs[0], *measured, cwd=tmp_path, code=2)
    vocabulary = json.loads((renamed / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    vocabulary["model"]["vocab"] = dict(
        zip(words, [*list(words.values())[1:], next(iter(words.values()))], strict=True)
    )
    (renamed / "tokenizer.json").write_text(json.dumps(vocabulary))
    refused = run("compare", model, renamed, *measured, cwd=tmp_path, code=2)
    assert "make different tokens of one text" in refused.stderr
    table = run("compare", model, *outs, *measured, cwd=tmp_path).stdout
    assert "compressed-tensors" in table


def test_a_sweep_calibrates_once_for_all_that_it_serves(pico: Pico, calibration_text: Path, tmp_path: Path) -> None:
    model, recipe = pico(), tmp_path / "mixed.yaml"
    data = f"data: {{source: {calibration_text}, samples: 4, sequence_length: 64}}\n"
    recipe.write_text(
        data + "passes: [{kind: rtn, bits: mixed, average_bits: 4, group_size: 32, search: true}]\n"
        "limits: {kl: null, perplexity_ratio: null}\n"
    )
    edits = ("--set", "passes.0.average_bits=[3.5,5]", "--set", "data.samples=[4,6]")
    done = run("sweep", recipe, model, *edits, "--samples", 2, "--sequence-length", 32, "--json", cwd=tmp_path)
    found = {row["name"]: row for row in json.loads(done.stdout)}
    kept = list((tmp_path / "sweep" / "statistics").iterdir())
    assert len(kept) == 2, "a folder for each text"
    assert all(len(list(folder.glob("survey-*.json"))) == 1 for folder in kept)
    assert all((folder / "statistics.json").is_file() for folder in kept)
    alone = run("sweep", recipe, model, *edits, "--samples", 2, "--sequence-length", 32, "--json", "--jobs", 2,
                "--work", "alone", cwd=tmp_path)  # fmt: skip
    for row in json.loads(alone.stdout):
        assert found[row["name"]]["digest"] == row["digest"]
    assert not (tmp_path / "alone" / "statistics").exists()
    prune = "passes: [{kind: expert_prune, keep: 2, refit: false}]\nlimits: {kl: null, perplexity_ratio: null}\n"
    recipe.write_text(data + prune)
    run("sweep", recipe, pico("mixtral"), "--set", "passes.0.keep=[2,3]", "--work", "experts", cwd=tmp_path)
    [kept] = (tmp_path / "experts" / "statistics").iterdir()
    assert (kept / "routing.json").is_file()
    edits = ("--set", "passes.0.task=[null,builtin]", "--work", "tasks")
    run("sweep", recipe, pico("mixtral"), *edits, cwd=tmp_path)
    assert len(list((tmp_path / "tasks" / "statistics").iterdir())) == 2, "experts are seen on other text"


def _headers(out: Path) -> int:
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in out.glob("*.safetensors"))


def test_a_sweep_tells_what_fails(pico: Pico, tmp_path: Path) -> None:
    model = pico()
    run("sweep", "w4a16-rtn", model, "--set", "passes.0.bits=[3,7]", cwd=tmp_path, code=2)
    edits = ("--set", "passes.0.targets=['*', none]", "--set", "passes.0.group_size=32")
    done = run("sweep", "w4a16-rtn", model, *edits, "--samples", 1, "--sequence-length", 32, cwd=tmp_path, code=1)
    assert "targets=none: failed: passes.0 (rtn) matches no linear" in done.stderr
    assert "targets='*': KL" in done.stderr
    assert "nan" not in done.stdout, "one window has no standard error"

"""`compressor check`: what counts as moved, and the command that people and their CI run."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from command import run

from compressor.cli import ci
from compressor.cli.check import check
from compressor.compress.baseline import Baseline, Figures, Tolerances, moves
from compressor.compress.check import Case, Outcome
from compressor.runtime.errors import RecipeError

Pico = Callable[..., Path]
FIGURES = Figures(
    bytes=1000, kv_bytes_per_token=64.0, format="compressor", readers=("compressor",), kl_mean=0.01, kl_error=0.002,
    perplexity_ratio=1.02, ratio_error=0.004, peak_memory=500, prompt_time=0.8, decode_time=0.5, digest="a",
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "verdicts"),
    [
        ({}, {}),
        ({"bytes": 1001}, {"bytes": "worse"}),
        ({"bytes": 999}, {"bytes": "better"}),
        ({"kl_mean": 0.0107}, {}),
        ({"kl_mean": 0.0109}, {"kl_mean": "worse"}),
        ({"kl_mean": 0.0091}, {"kl_mean": "better"}),
        ({"kl_mean": float("nan")}, {"kl_mean": "worse"}),
        ({"perplexity_ratio": 1.03}, {}),
        ({"perplexity_ratio": 1.04, "peak_memory": 700}, {"perplexity_ratio": "worse", "peak_memory": "worse"}),
        ({"format": "compressed-tensors"}, {"format": "other"}),
        ({"readers": ("compressor", "transformers")}, {"readers": "better"}),
        ({"readers": ("transformers",)}, {"readers": "worse"}),
        ({"digest": "b", "peak_memory": None, "readers": None, "decode_time": None}, {}),
        ({"prompt_time": 0.9, "decode_time": 0.7}, {"decode_time": "worse"}),
        ({"prompt_time": 0.5}, {"prompt_time": "better"}),
    ],
)
def test_what_counts_as_moved(change: dict[str, object], verdicts: dict[str, str]) -> None:
    found = moves(FIGURES.model_copy(update=change), FIGURES, Tolerances(), same_text=True)
    assert {move.figure: move.verdict for move in found if move.verdict != "same"} == verdicts


def test_another_text_excuses_noise_alone() -> None:
    def verdict(**change: float) -> set[str]:
        found = moves(FIGURES.model_copy(update=change), FIGURES, Tolerances(), same_text=False)
        return {move.figure for move in found if move.verdict != "same"}

    room = 0.005 + 3 * 0.002 * 2**0.5
    assert verdict(kl_mean=0.01 + 0.99 * room) == set()
    assert verdict(kl_mean=0.01 + 1.01 * room) == {"kl_mean"}
    assert verdict(bytes=1001) == {"bytes"}
    other = FIGURES.model_copy(update={"digest": "b"})
    assert [move.figure for move in moves(other, FIGURES, Tolerances(digest=True), same_text=True)][-1] == "digest"


def test_an_entry_has_tolerances_of_its_own_and_the_rest_of_the_baseline(tmp_path: Path) -> None:
    entry = {"figures": FIGURES.model_dump(), "tolerances": {"kl_mean": 0.5}}
    content = {
        "tolerances": {"bytes": 0.25, "kl_mean": 0.1},
        "models": {"m": {"source": "m", "recipes": {"own": entry, "none": {"figures": FIGURES.model_dump()}}}},
    }
    read = Baseline.model_validate(content)
    read.write(tmp_path / "baseline.json")
    for baseline in (read, Baseline.read(tmp_path / "baseline.json")):
        found = {name: baseline.tolerances_of("m", name) for name in ("own", "none", "other")}
        assert {name: (one.bytes, one.kl_mean) for name, one in found.items()} == {
            "own": (0.25, 0.5), "none": (0.25, 0.1), "other": (0.25, 0.1),
        }  # fmt: skip
    written = json.loads((tmp_path / "baseline.json").read_text())["models"]["m"]["recipes"]["own"]
    assert written["tolerances"] == {"kl_mean": 0.5}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as a baseline"),
        ("[" * 100_000, "cannot be read as a baseline"),
        ('{"version": 2}', "is no baseline: version"),
        ('{"models": {"x": {"source": "x", "recipes": {"y": {"set": []}}}}}', r"recipes\.y\.figures: Field required"),
        ('{"tolerances": {"kl": 1}}', r"tolerances\.kl: Extra inputs"),
    ],
)
def test_what_is_no_baseline(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=said):
        Baseline.read(path)


def test_reports_for_machines() -> None:
    case = Case("tiny", "models/tiny", "w4a16-rtn", (), Baseline().text)
    worse = moves(FIGURES.model_copy(update={"kl_mean": 1.0}), FIGURES, Tolerances(), same_text=True)
    outcomes = [
        Outcome(case, FIGURES, "", "", (), 1.0), Outcome(case, FIGURES, "", "", tuple(worse), 2.0),
        Outcome(case, None, "no such <file> | 100 %\nor so", "", None, 0.0), Outcome(case, FIGURES, "", "", None, 0.0),
    ]  # fmt: skip
    assert [outcome.verdict for outcome in outcomes] == ["same", "worse", "failed", "new"]
    suite = ElementTree.fromstring(ci.junit(outcomes))
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "time")} == {
        "tests": "4", "failures": "2", "errors": "1", "time": "3.0",
    }  # fmt: skip
    assert [[child.tag for child in one] for one in suite] == [[], ["failure"], ["error"], ["failure"]]
    lines = list(ci.github(outcomes))
    assert [line.split(" ")[0] for line in lines] == ["::error", "::error", "::warning"]
    assert lines[1].endswith("no such <file> | 100 %25%0Aor so")
    table = ci.markdown(outcomes).splitlines()
    assert table[4].endswith("**worse**: kl_mean 0.01 → 1 |")
    assert r"no such <file> \| 100 % or so |" in table[5]
    assert len(table) == 8


def test_a_baseline_is_made_kept_and_held_against(pico: Pico, tmp_path: Path) -> None:
    model, baseline, work = pico(), tmp_path / "baseline.json", tmp_path / "work"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("passes: [{kind: rtn, bits: 4, group_size: 32}]\nlimits: {kl: null, perplexity_ratio: null}\n")
    common = ("check", "--baseline", str(baseline), "--work", str(work))
    missing = run(*common, cwd=tmp_path, code=2)
    assert "no such file; --update --why TEXT makes it" in missing.stderr
    run(*common, recipe, "--model", model, "--update", "--why", "the first", cwd=tmp_path)
    content = json.loads(baseline.read_text())
    assert content["updates"][0]["why"] == "the first"
    [(name, entry)] = content["models"].items()
    figures = entry["recipes"][str(recipe)]["figures"]
    assert (name, figures["format"]) == (model.name, "compressed-tensors")
    assert figures["peak_memory"] > 1e8
    before = figures | {}
    del figures["readers"]
    baseline.write_text(json.dumps(content))
    run(*common, "--update", "--why", "who reads it", cwd=tmp_path)
    content = json.loads(baseline.read_text())
    figures = content["models"][name]["recipes"][str(recipe)]["figures"]
    assert figures == before, "what was not measured before is filled in"
    junit, said = tmp_path / "junit.xml", tmp_path / "said.md"
    again = run(*common, "--junit", junit, "--markdown", said, cwd=tmp_path)
    assert "as before (kept)" in again.stderr
    assert ElementTree.fromstring(junit.read_text()).get("failures") == "0"
    assert "###" in said.read_text()
    figures |= {"bytes": figures["bytes"] + 1, "kl_mean": figures["kl_mean"] / 2}
    baseline.write_text(json.dumps(content))
    moved = run(*common, "--json", cwd=tmp_path, code=1)
    [found] = json.loads(moved.stdout)["cases"]
    assert found["verdict"] == "worse"
    assert {move["figure"]: move["verdict"] for move in found["moved"] if move["verdict"] != "same"} == {
        "bytes": "better", "kl_mean": "worse",
    }  # fmt: skip
    assert "1 worse or failed; if that is meant: compressor check --baseline" in moved.stderr
    run(*common, "--update", "--why", "it was meant", cwd=tmp_path)
    assert [one["why"] for one in json.loads(baseline.read_text())["updates"]] == [
        "the first", "who reads it", "it was meant",
    ]  # fmt: skip
    recipe.write_text(recipe.read_text().replace("bits: 4", "bits: 3"))
    changed = run(*common, recipe, cwd=tmp_path, code=1)
    assert "kl_mean" in changed.stdout
    assert "(kept)" not in changed.stderr


def test_speed_is_measured_where_it_is_asked_for_and_kept_where_it_is_not(pico: Pico, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("passes: [{kind: rtn, bits: 8, group_size: 32}]\nlimits: {kl: null, perplexity_ratio: null}\n")
    command = ("check", recipe, "--model", pico(), "--baseline", tmp_path / "baseline.json")
    refused = run(*command, "--speed", "--jobs", 2, "--update", "--why", "x", cwd=tmp_path, code=2)
    assert "leave --jobs out" in refused.stderr
    timed = run(*command, "--speed", "--update", "--why", "x", cwd=tmp_path)
    assert re.search(r"\d\.\d\d / \d\.\d\d", timed.stdout)
    content = json.loads((tmp_path / "baseline.json").read_text())
    [entry] = (one["recipes"][str(recipe)] for one in content["models"].values())
    assert min(entry["figures"][key] for key in ("prompt_time", "decode_time")) > 0.05
    entry["figures"] |= {"bytes": 1, "decode_time": 1e-9}
    (tmp_path / "baseline.json").write_text(json.dumps(content))
    run(*command, "--update", "--why", "y", cwd=tmp_path)
    after = json.loads((tmp_path / "baseline.json").read_text())
    [found] = (one["recipes"][str(recipe)]["figures"] for one in after["models"].values())
    assert found["bytes"] > 1
    assert found["decode_time"] == 1e-9


def test_a_recipe_that_does_not_run_is_told_and_the_others_go_on(pico: Pico, tmp_path: Path) -> None:
    recipes = []
    for number, group_size in enumerate((32, 64)):
        recipes.append(tmp_path / f"{number}.yaml")
        step = f"passes: [{{kind: rtn, scheme: {'nvfp4a16' if number else 'int'}, targets: [no.such.linear]}}]\n"
        recipes[-1].write_text(step if number else f"passes: [{{kind: rtn, bits: 4, group_size: {group_size}}}]\n")
    words = [str(recipe) for recipe in recipes]
    baseline = tmp_path / "baseline.json"
    done = run(
        "check", *words, "--model", pico(), "--baseline", baseline, "--jobs", 2, "--update", "--why", "x",
        cwd=tmp_path, code=1,
    )  # fmt: skip
    assert "1.yaml: failed: " in done.stdout
    assert list(next(iter(json.loads(baseline.read_text())["models"].values()))["recipes"]) == words[:1]


def test_the_docs_name_options_that_there_are() -> None:
    """And the workflow in them is YAML whose steps run this command."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "ci.md").read_text(encoding="utf-8")
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(check).parameters}
    known |= {"--set", "--json"} - {"--edits", "--as-json"}
    workflow = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    commands = [step["run"] for step in workflow["jobs"]["check"]["steps"] if "run" in step]
    assert any(command.startswith("compressor check ") for command in commands)
    lines = [line for line in text.splitlines() if "index-url" not in line]
    assert set(re.findall(r"--[a-z]+", "\n".join(lines))) <= known


SERVER = """
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from compressor.compress import check

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what runs in the background starts without
    check._IMPORTED, context = [], get_context("forkserver")
    check._start_server(context)
    with ProcessPoolExecutor(1, context) as pool:
        print(pool.submit(signal.getsignal, signal.SIGINT).result() is signal.SIG_IGN)
        print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_an_interruption_is_left_to_the_process_that_answers_it(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    done = subprocess.run([sys.executable, "server.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr

"""The command line as a person meets it: exit codes, streams, one-line errors."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from command import run
from rich.console import Console

from compressor.cli import doctor, render
from compressor.kernels.dispatch import CpuCapability

ROOT = Path(__file__).resolve().parent.parent
Pico = Callable[..., Path]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("apply --help", 0),
        ("recipes validate everything-moe w4a16-gptq", 0),
        ("recipes show latents-50", 0),
        ("recipes schema", 0),
        ("apply w4a16-gptw model out", 2),
        ("plan w4a16-gptq nothere", 2),
        ("plan w4a16-gptq . --memory 16", 2),
        ("apply w4a16-gptq . out --set passes.0.bit=3", 2),
        ("eval nothere", 2),
        ("run nothere -p x", 2),
    ],
)
def test_help_recipes_and_errors_answer_without_torch(tmp_path: Path, words: str, code: int) -> None:
    script = (
        f"import sys\nfrom compressor.cli import main\nsys.argv = ['compressor', *{words.split()!r}]\n"
        f"try:\n    main.main()\nexcept SystemExit as end:\n    assert (end.code or 0) == {code}, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)


@pytest.mark.parametrize(
    "error",
    [
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ...')",
        "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 80 bytes')",
        "MemoryError()",
    ],
)
def test_a_full_memory_is_told_in_one_line(pico: Pico, tmp_path: Path, error: str) -> None:
    script = (
        "import sys, torch\nfrom compressor.cli import main\nimport compressor.compress.evaluate as module\n"
        f"def full(*args):\n    raise {error}\n"
        f"module.run_evaluation = full\nsys.argv = ['compressor', 'eval', {str(pico())!r}]\nmain.main()\n"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("error: the memory is full (")
    assert found.stderr.count("\n") == 1
    assert "windows of fewer tokens" in found.stderr


def test_the_main_job_by_hand(pico: Pico, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    run("recipes", "copy", "w4a16-rtn", recipe, cwd=tmp_path)
    edit = ("--set", "passes.0.group_size=32")
    plan = json.loads(run("plan", recipe, pico(), *edit, "--json", cwd=tmp_path).stdout)
    done = run("apply", recipe, pico(), "out", *edit, cwd=tmp_path)
    assert (
        "× smaller; format compressed-tensors, read by compressor, transformers, vLLM on CPUs, vLLM on GPUs"
        in done.stdout
    )
    assert done.stderr.count("block ") == 2
    assert json.loads((tmp_path / "out" / "compressor.json").read_text())["bytes"]["after"] == plan["bytes_after"]
    assert "as they should be" in run("verify", "out", cwd=tmp_path).stdout
    assert "format: compressed-tensors" in run("inspect", "out", cwd=tmp_path).stdout
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 100)
    command = ("eval", "out", "--against", pico(), "--data", text, "--sequence-length", 64)
    report = json.loads(run(*command, "--json", cwd=tmp_path).stdout)
    assert report["against"]["kl_mean"] > 0
    assert report["tokens"] == 63 * ((len(text.read_text()) + 1) // 64)
    assert report["dtype"] == "bfloat16"
    assert report["as_run"]["tokens"] == min(16 * 63, report["tokens"])
    assert 0 < report["as_run"]["against"]["kl_mean"] < 0.01  # from itself in float32
    run(*command, "--max-ppl-ratio", "0.5", "--out", "found.json", cwd=tmp_path, code=1)
    assert json.loads((tmp_path / "found.json").read_text()) == report
    run("export", "out", "plain", cwd=tmp_path)
    assert "format: plain" in run("inspect", "plain", cwd=tmp_path).stdout
    assert run("run", "out", "-p", "def", "--max-tokens", "3", cwd=tmp_path).stdout.startswith("def")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "hash" in run("verify", "out", cwd=tmp_path, code=1).stdout


def test_what_to_do_next_can_be_copied(pico: Pico, tmp_path: Path) -> None:
    done = run("apply", "w8a16", pico(), "my out", "--set", "passes.0.group_size=32", cwd=tmp_path)
    assert f"next: compressor eval 'my out' --against {pico()}" in done.stdout


def test_a_smaller_cache_is_planned_measured_and_named(pico: Pico, tmp_path: Path) -> None:
    recipe = tmp_path / "half.yaml"
    recipe.write_text("passes: [{kind: lorc, ratio: 0.5, rank_step: 1}, {kind: rtn, group_size: 16}]")
    planned = json.loads(run("plan", recipe, pico(), "--json", cwd=tmp_path).stdout)
    assert (planned["kv_bytes_per_token_before"], planned["kv_bytes_per_token_after"]) == (256, 128)
    assert "KV cache 256 → 128 bytes a token (50.0 % kept); what is saved outweighs all weights from" in (
        run("apply", recipe, pico(), "out", cwd=tmp_path).stdout
    )
    rows = {row["becomes"] for row in planned["rows"] if row["name"].endswith("k_proj")}
    assert len(rows) == 2, "the plan's ranks are those of the survey, which reads weights alone"
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 100)
    command = ("eval", "out", "--against", pico(), "--data", text, "--sequence-length", 64, "--long", 256)
    report = json.loads(run(*command, "--json", cwd=tmp_path).stdout)
    assert report["kv_bytes_per_token"] == [128, 256]
    assert [(span["start"], span["end"]) for span in report["long"][0]["spans"]] == [(0, 64), (64, 128), (128, 256)]
    table = run(*command, cwd=tmp_path).stdout
    assert "KV cache 256 → 128 bytes a token" in table
    assert "hidden number in 256 tokens" in table
    assert "rank 20 int4: 2" in run("inspect", "out", cwd=tmp_path).stdout
    assert "beyond the model's 256 positions" in run(*command[:-1], 512, cwd=tmp_path, code=2).stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("apply", "w4a16-gptk", ".", "out"), "did you mean 'w4a16-gptq'"),
        (("apply", "w4a16-rtn", "nowhere", "out"), "nowhere: no such model folder, and not a hub id"),
        (("apply", "w4a16-rtn", ".", "out"), "config.json is missing; is this a Hugging Face model folder?"),
        (("apply", "bad.yaml", ".", "out"), "bad.yaml:2:17: passes.0.bitz: unknown key (did you mean 'bits'?)"),
        (("verify", "."), "no compressor.json"),
        (("eval", ".", "--max-ppl-ratio", "2"), "name it with --against"),
        (("eval", ".", "--out", "nowhere/found.json"), "is no file in a folder that is there"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path: Path, command: tuple[str, ...], message: str) -> None:
    (tmp_path / "bad.yaml").write_text("passes:\n  - {kind: rtn, bitz: 4}\n")
    done = run(*command, cwd=tmp_path, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_an_output_that_cannot_be_written(pico: Pico, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("apply", "w4a16-rtn", pico(), "file/out", cwd=tmp_path, code=2)
    assert "cannot be written (Not a directory); choose another output" in done.stderr


def test_usage_errors_exit_2(tmp_path: Path) -> None:
    assert "No such command" in run("aply", cwd=tmp_path, code=2).stderr


def test_validate_lists_and_exits_1(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("passes: []\n")
    done = run("recipes", "validate", "w8a16", "bad.yaml", cwd=tmp_path, code=1)
    assert "w8a16: fine" in done.stdout
    assert "bad.yaml:1:9" in done.stdout


def test_recipes_and_doctor_answer(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path).stdout == f"compressor {version('compressor')}\n"
    assert "w4a16-gptq" in json.loads(run("recipes", "list", "--json", cwd=tmp_path).stdout)
    assert "act_order: true" in run("recipes", "show", "w4a16-gptq", cwd=tmp_path).stdout
    assert json.loads(run("recipes", "schema", cwd=tmp_path).stdout)["title"] == "Recipe"
    assert "int4 on the CPU" in json.loads(run("doctor", "--json", cwd=tmp_path).stdout)


def test_readme_commands_run(tmp_path: Path) -> None:
    """Every `compressor` line of the README's shell blocks, in order, on the bundled model."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("compressor ")]
    assert len(commands) >= 6
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] == "apply" and "--set" not in words:  # what `make demo` does, on less text
            words += ["--set", "data.samples=32"]
        run(*words, cwd=tmp_path)


def test_commands_of_getting_started_run(tmp_path: Path, pico: Pico, calibration_text: Path) -> None:
    """Every `compressor` line of its shell blocks, in order, on a small model in the place of the hub's."""
    text = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 8
    shutil.copy(calibration_text, tmp_path / "my-text.txt")
    (tmp_path / "other-text.txt").write_text(calibration_text.read_text()[::-1])
    small = ["--set", "data.samples=4", "--set", "data.sequence_length=32", "--set", "passes.0.group_size=32"]
    for command in commands:
        words = [str(pico()) if word.startswith("HuggingFaceTB/") else word for word in shlex.split(command)[1:]]
        if words[0] in ("plan", "apply", "sweep"):
            words += small
        if words[0] in ("eval", "sweep"):
            words += ["--sequence-length", "32"]
        run(*words, cwd=tmp_path)
    assert (tmp_path / "sweep.html").is_file()


def test_people_are_told_what_they_may_not_expect(pico: Pico, tmp_path: Path, calibration_text: Path) -> None:
    model, recipe, text = pico(), tmp_path / "mine.yaml", tmp_path / "text.txt"
    text.write_text(calibration_text.read_text()[:1500])
    recipe.write_text(
        "data: {source: text.txt, sequence_length: 32}\nlimits: {kl: null, perplexity_ratio: null}\n"
        "passes: [{kind: gptq, group_size: 32, search: false, refinements: 0}]\n"
    )
    planned = run("plan", recipe, model, "--memory", "1MB", cwd=tmp_path)
    assert "warning: apply would refuse: 1.00 MB are less than that memory" in planned.stderr
    assert re.search(r"the text has no more; [\d,]+ tokens would be 16 for each", planned.stderr)
    assert "data.samples=" not in planned.stderr
    applied = run("apply", recipe, model, "out", "--resume", cwd=tmp_path)
    assert "there is nothing of out to go on with: the run starts from the beginning" in applied.stderr
    assert "--data TEXT, a text that it was not made with" in applied.stdout
    words = ("eval", "out", "--sequence-length", "32", "--samples", "1", "--data")
    assert "was calibrated on text.txt" in run(*words, "text.txt", cwd=tmp_path).stderr
    assert "calibrated" not in run(*words, calibration_text, cwd=tmp_path).stderr
    close = run("recipes", "show", "w4a16", cwd=tmp_path, code=2)
    assert "did you mean 'w4a16-awq' or 'w4a16-awq-gptq' or 'w4a16-gptq' or 'w4a16-rtn'?" in close.stderr
    assert "no such recipe file" in run("recipes", "validate", "nowhere.yaml", cwd=tmp_path, code=2).stderr
    timed = json.loads(run("bench", "out", "--against", model, "--prompt", 8, "--tokens", 2, "--rounds", 1, "--json",
                           cwd=tmp_path).stdout)  # fmt: skip
    assert all(0 <= one["memory"] < 2e8 for one in timed), "what is imported takes more than that"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "MODEL", "-p", ""), "--prompt holds no token"),
        (("eval", "BARE"), "has no tokenizer"),
        (("eval", "MODEL", "--against", "OTHER"), "tokens in their vocabularies"),
        (("recipes", "copy", "w8a16", "nowhere/x.yaml"), "cannot be written"),
        (("inspect", "EMPTY"), "model.safetensors"),
        (("plan", "w8a16", "MODEL", "--memory", "5x"), "--memory 5x: write it as 16GB"),
    ],
)
def test_odd_models_and_prompts_are_one_line_and_exit_2(
    pico: Pico, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    bare, empty = tmp_path / "bare", tmp_path / "empty"
    shutil.copytree(pico(), bare, ignore=shutil.ignore_patterns("tokenizer*"))
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    places = {"MODEL": pico(), "OTHER": pico(vocab_size=96), "BARE": bare, "EMPTY": empty}
    done = run(*(places.get(word, word) for word in words), cwd=tmp_path, code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_an_error_of_ours_is_not_an_answer(tmp_path: Path) -> None:
    """Exit code 1 is `the answer is no`; a crash must not look like one."""
    code = (
        "import sys\nfrom compressor.cli import doctor, main\n"
        "doctor.examine = lambda: 1 / 0\nsys.argv = ['compressor', 'doctor']\nmain.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("internal error: ZeroDivisionError")


def test_a_plan_says_what_cannot_be_shared_out(pico: Callable[..., Path], tmp_path: Path) -> None:
    model = pico("llama", hidden_size=96, intermediate_size=192, num_attention_heads=6, num_key_value_heads=6)
    edit = "--set", "passes.0.group_size=32"
    assert (
        "over 3 GPUs: every part holds whole groups"
        in run("plan", "w4a16-rtn", model, *edit, "--tp", 3, cwd=tmp_path).stdout
    )
    said = run("plan", "w4a16-rtn", model, *edit, "--tp", 4, cwd=tmp_path).stdout
    assert "not over 4 GPUs: 6 attention heads are no multiple of 4" in " ".join(said.split())
    found = json.loads(run("plan", "w4a16-rtn", model, *edit, "--tp", 4, "--json", cwd=tmp_path).stdout)
    assert found["unsplittable"][0] == "6 attention heads are no multiple of 4"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_number_is_cut_where_the_terminal_is_narrow(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [("layers.*.mlp.experts.*.down_proj", "1,234", "12.345", "a → b → c", "0.123456 ± 0.000789")] * 2
    console = Console(width=width, file=io.StringIO(), markup=False, force_terminal=True, no_color=True)
    monkeypatch.setattr(render, "out", console)
    made = render.table(
        ("linears", "count", "bits", "passes", "after"), lines, spare=("bits", "count"), words=("passes",)
    )
    console.print(made)
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert text.count("0.123456 ± 0.000789") == 2
    headings = [str(column.header) for column in made.columns]
    assert ("bits" in headings) is (width > 80)
    assert all(number in text for number, heading in (("1,234", "count"), ("12.345", "bits")) if heading in headings)
    assert max(map(len, text.splitlines())) <= width


def test_options_may_stand_behind_a_command(tmp_path: Path, pico: Pico) -> None:
    shown = run("apply", "w4a16-rtn", pico(), "out", "--set", "passes.0.group_size=32", "-q", cwd=tmp_path)
    assert "block" not in shown.stderr
    assert "report: out/report/report.html" in shown.stdout
    run("verify", "out", cwd=tmp_path)


def test_doctor_says_what_would_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    slow, fast = CpuCapability(False, False, False), CpuCapability(True, True, True)
    assert doctor.faster(False, fast, 0.0) == []
    [hint] = doctor.faster(False, fast, 5.2)
    assert hint.startswith("OMP_NUM_THREADS=3 ")
    assert "AMX" in doctor.faster(False, slow, 0.0)[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "compressor[gpu]" in doctor.faster(True, slow, 0.0)[0]

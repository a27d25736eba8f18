"""Quality, time and memory beside llm-compressor, GPTQModel and AutoRound, on the same calibration tokens.

    python benchmarks/peers.py examples/tiny-llama --bits 4 --seeds 0 1 2 \\
        --llm-compressor LC/bin/python --gptqmodel GQ/bin/python
    python benchmarks/peers.py MODEL --text calibration.txt evaluation.txt --samples 32 --threads 1 \\
        --methods "compressor: w3a16-gptq passes.0.group_size=64" "llm-compressor: gptq 3 64" "gptqmodel: 3 64"

Each tool runs in a process of its own, from an environment of its own. Their results are decoded to plain weights and
judged by one float32 forward pass on the same windows (with inputs rounded, where they are): KL(original ‖ result) per
token, and the paired difference to the first method's over windows. What the methods are: `compressor: RECIPE [EDITS]`,
a shipped recipe or a file; `llm-compressor: gptq BITS GROUP`, `awq BITS GROUP` (with zero points), `gptq PRESET` (as
NVFP4, MXFP4A16), `smoothquant` (.8, then GPTQ to int8 with inputs), `sparsegpt`, `wanda` (2:4), `experts` (REAP of a
quarter, then `gptq 4 128`); `gptqmodel: BITS GROUP`; `autoround: BITS GROUP ITERATIONS`.

`--bits` compares integers, `--sparse BLOCK` 2:4: ARMOR with blocks of that size (`armor-24`), without wrappers
(`sparsegpt-24`), and llm-compressor's SparseGPT and Wanda; `--experts` what a quarter of the experts is worth, ours
with and without `refit`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLAIN = "".join(
    f" passes.0.{edit}"
    for edit in ("correction=0", "refinements=0", "search=false", "beam=1", "act_order=false", "objective=layer")
)


def run_compressor(task: dict[str, Any]) -> None:
    from compressor.compress.apply import Job, apply
    from compressor.compress.recipe import parse_recipe, read_recipe

    recipe, *edits = task["method"].split()
    # The windows of this seed are those in the task, by construction.
    data = {
        "source": task["text"],
        "samples": len(task["ids"]),
        "sequence_length": task["length"],
        "seed": task["seed"],
    }
    edits = (*edits, *(f"data.{key}={value}" for key, value in data.items()))
    (name, text), model = read_recipe(recipe), Path(task["model"])
    job = Job(parse_recipe(text, name, edits), text, edits, model, Path(task["out"]), task["model"])
    apply(job, lambda event: None)


def llm_compressor_modifiers(method: str) -> list[Any]:
    kind, *numbers = method.split()
    if kind == "experts":
        from llmcompressor.modifiers.pruning import REAPPruningModifier

        return [REAPPruningModifier(sparsity=0.25), *llm_compressor_modifiers("gptq 4 128")]
    if kind == "sparsegpt":
        from llmcompressor.modifiers.pruning import SparseGPTModifier

        return [SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])]
    if kind == "wanda":
        from llmcompressor.modifiers.pruning import WandaPruningModifier

        return [WandaPruningModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])]
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    before: list[Any] = []
    if kind == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        before.append(AWQModifier())
    elif kind == "smoothquant":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        before.append(SmoothQuantModifier(smoothing_strength=0.8))
        numbers = ["W8A8"]
    if len(numbers) == 2:
        scheme = preset_name_to_scheme("W4A16_ASYM" if kind == "awq" else "W4A16", ["Linear"])
        scheme.weights.num_bits, scheme.weights.group_size = map(int, numbers)
    else:
        scheme = preset_name_to_scheme(numbers[0].upper(), ["Linear"])
    rounds = QuantizationModifier if kind == "awq" else GPTQModifier
    return [*before, rounds(ignore=["lm_head", "re:.*mlp.gate$"], config_groups={"group_0": scheme})]


def run_llm_compressor(task: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(task["model"], dtype="auto")
    torch.Tensor.pin_memory = lambda self, *more: self  # type: ignore[method-assign]  # which AWQ there calls anywhere
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in task["ids"]]
    oneshot(
        model=loaded, dataset=Dataset.from_list(rows), max_seq_length=task["length"],
        num_calibration_samples=len(rows), recipe=llm_compressor_modifiers(task["method"]),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    loaded.save_pretrained(task["out"], save_compressed=True)


def run_gptqmodel(task: dict[str, Any]) -> None:
    from gptqmodel import GPTQConfig, GPTQModel

    bits, group = map(int, task["method"].split())
    loaded = GPTQModel.load(task["model"], GPTQConfig(bits=bits, group_size=group), device="cpu")
    loaded.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in task["ids"]], batch_size=1)
    loaded.save(task["out"])


def run_autoround(task: dict[str, Any]) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bits, group, iterations = map(int, task["method"].split())
    loaded = AutoModelForCausalLM.from_pretrained(task["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    more = {"lr": 5e-3} if iterations < 200 else {}  # its own light recipe
    rounding = AutoRound(
        loaded, tokenizer, bits=bits, group_size=group, sym=True, iters=iterations, nsamples=len(task["ids"]),
        seqlen=task["length"], batch_size=8, dataset=[torch.tensor([ids]) for ids in task["ids"]], device_map="cpu",
        enable_torch_compile=False, low_gpu_mem_usage=False, **more,
    )  # fmt: skip
    rounding.quantize_and_save(output_dir=task["out"], format="auto_gptq")


RUNS = {"llm-compressor": run_llm_compressor, "gptqmodel": run_gptqmodel, "autoround": run_autoround}


def child(file: str) -> None:
    """One tool, its imports told apart; prints JSON."""
    start = time.perf_counter()
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    task = json.loads(Path(file).read_text())
    torch.set_num_threads(task["threads"])
    if task["tool"] == "llm-compressor":
        import llmcompressor.modifiers.quantization  # noqa: F401
    elif task["tool"] == "gptqmodel":
        import gptqmodel  # noqa: F401
    elif task["tool"] == "autoround":
        import auto_round  # noqa: F401
    else:
        import compressor.compress.apply  # noqa: F401
    ready, used = time.perf_counter(), time.process_time()
    RUNS.get(task["tool"], run_compressor)(task)
    done = time.perf_counter()
    # Not getrusage, whose peak a child inherits from the process that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1000
    size = sum(path.stat().st_size for path in Path(task["out"]).rglob("*.safetensors"))
    result = {"imports": ready - start, "work": done - ready, "cpu": time.process_time() - used}
    print("RESULT " + json.dumps({**result, "peak_mb": peak, "bytes": size}))
    sys.stdout.flush()
    os._exit(0)  # a peer's worker threads do not end by themselves


def decoded(folder: Path) -> dict[str, Any]:
    """Weights of a result as float32, decoded to the dtype that it is stored in, as readers do."""
    from compressor.runtime.stored import open_model

    opened = open_model(folder)
    return {name: opened.tensor(name).float() for name in opened.tensors}


def rounds_inputs(folder: Path) -> bool:
    """Whether a result's linears round what enters them."""
    from compressor.runtime.stored import StoredModel, open_model

    opened = open_model(folder)
    return isinstance(opened, StoredModel) and any(opened.outline(name).rounds_activations for name in opened.schemes)


def result_of(method: str, model: str, folder: Path) -> Any:
    """The model that a tool made, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from compressor.runtime import load

    if "moe" in method or "experts" in method:  # fewer experts, which the folder's own config says
        found, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        return found.eval()
    if method.startswith("compressor") or rounds_inputs(folder):
        return load(folder, dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    missing = found.load_state_dict(decoded(folder), strict=False)
    assert not missing.unexpected_keys, missing
    return found


def methods_of(options: argparse.Namespace) -> list[str]:
    """What is compared, in order."""
    if options.methods:
        return list(options.methods)
    if options.sparse:
        ours = [f"armor-24 passes.0.block_size={options.sparse}", "sparsegpt-24"]
        peers = ["llm-compressor: sparsegpt", "llm-compressor: wanda"]
    elif options.experts:
        ours, peers = ["moe-reap-25-w4", "moe-reap-25-w4 passes.0.refit=false"], ["llm-compressor: experts"]
    else:
        grid = f"{options.bits} {options.group_size}"
        ours = [f"w{options.bits}a16-gptq passes.0.group_size={options.group_size}{more}" for more in ("", PLAIN)]
        peers = [f"llm-compressor: gptq {grid}", f"gptqmodel: {grid}"]
    pythons = _pythons(options)
    return [f"compressor: {one}" for one in ours] + [one for one in peers if pythons[one.partition(":")[0]]]


def _pythons(options: argparse.Namespace) -> dict[str, str]:
    return {tool: getattr(options, tool.replace("-", "_")) for tool in RUNS}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sparse", type=int, help="compare 2:4, ARMOR's blocks being of this size")
    parser.add_argument("--experts", action="store_true", help="drop a quarter of the experts first")
    parser.add_argument("--methods", nargs="+", help="compare these")
    parser.add_argument("--text", nargs=2, default=["builtin", "builtin"], help="calibration and evaluation text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, help="evaluation windows; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llm-compressor", help="a Python that has it")
    parser.add_argument("--gptqmodel", help="a Python that has it")
    parser.add_argument("--autoround", help="a Python that has it")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    return parser.parse_args()


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result after the other: of every method for every seed."""
    import torch
    from quality import Judge, windows_of

    from compressor.runtime import load

    torch.set_num_threads(options.threads)
    pythons = {"compressor": sys.executable, **_pythons(options)}
    calibration, evaluation = (name if name == "builtin" else str(Path(name).resolve()) for name in options.text)
    judge = None
    if not options.time_only:
        windows = windows_of(evaluation, "evaluation", options.model, options.windows, options.length, 0)
        judge = Judge(load(options.model, dtype=torch.float32), windows)
        losses, _ = judge()
        print(f"original: perplexity {losses.mean().exp():.3f}, {windows[:, 1:].numel():,} tokens", flush=True)
    for seed in options.seeds:
        ids = windows_of(calibration, "calibration", options.model, options.samples, options.length, seed).tolist()
        for method in methods_of(options):
            with tempfile.TemporaryDirectory() as room:
                out, task = Path(room) / "out", Path(room) / "task.json"
                tool, _, what = method.partition(": ")
                content = {"tool": tool, "method": what, "model": str(options.model.resolve()), "out": str(out)}
                content |= {"text": calibration, "ids": ids, "length": options.length, "seed": seed}
                task.write_text(json.dumps({**content, "threads": options.threads}))
                words = [pythons[tool], str(Path(__file__).resolve()), "--child", str(task)]
                done = subprocess.run(words, capture_output=True, text=True, env=_environment(options), cwd=room)
                line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
                assert line is not None, done.stdout[-2000:] + done.stderr[-2000:]
                result = {"method": method, "seed": seed, "samples": options.samples, **json.loads(line[7:])}
                if judge is not None:
                    own, divergences = judge(
                        result_of(method, str(options.model), next(out.rglob("config.json")).parent)
                    )
                    result |= {"kl": divergences.tolist(), "ratio": float((own - losses).mean().exp())}
                    result |= {"perplexity": float(own.mean().exp())}
                yield result


def main() -> None:
    """Run every method on every seed, and print a line for each."""
    options = arguments()
    found: list[dict[str, Any]] = []
    for result in runs(options):
        found.append(result)
        line = f"seed {result['seed']}, {result['method']}: imports {result['imports']:.1f} s, work "
        line += f"{result['work']:.1f} s ({result['cpu']:.0f} of a processor), peak {result['peak_mb']:.0f} MB, "
        line += f"{result['bytes']:,} bytes"
        if "kl" in result:
            kl = sum(result["kl"]) / len(result["kl"])
            line += f"; KL {kl:.5f}, perplexity {result['perplexity']:.3f}, ratio {result['ratio']:.4f}"
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    if not options.time_only:
        _summary(found)


def _summary(results: list[dict[str, Any]]) -> None:
    import torch

    by_method: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_method.setdefault(result["method"], []).append(result)
    first = None
    for method, found in by_method.items():
        kl = torch.tensor([result["kl"] for result in found]).mean(0)
        ratio = sum(result["ratio"] for result in found) / len(found)
        first = kl if first is None else first
        difference = kl - first
        error = difference.std() / len(difference) ** 0.5
        distance = f", {difference.mean() / error:.0f} standard errors above the first" if error > 0 else ""
        print(f"mean, {method}: KL {kl.mean():.5f}, perplexity ratio {ratio:.4f}{distance}")


def _environment(options: argparse.Namespace) -> dict[str, str]:
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    more = {"GPTQMODEL_CPU_WORKERS": "2", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(options.threads)}
    return {**os.environ, **offline, **more}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main()

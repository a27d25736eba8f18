"""Quality, time and memory beside llm-compressor and GPTQModel, on the same calibration tokens.

    python benchmarks/peers.py examples/tiny-llama --bits 4 --seeds 0 1 2 \\
        --llm-compressor LC/bin/python --gptqmodel GQ/bin/python

Each tool runs in a process of its own with two threads, from an environment of its own. Their results are decoded to
plain weights and judged by one float32 forward pass on all windows of the built-in evaluation split: KL(original ‖
result) per token, and the paired difference to ours over windows. `--time-only` stops after the runs. `--sparse BLOCK`
compares 2:4 in place of integers: ARMOR with blocks of that size (`armor-24`), without wrappers (`sparsegpt-24`), and
llm-compressor's SparseGPT and Wanda. `--experts` first drops a quarter of the experts, by REAP: ours with and without
`refit`, and llm-compressor's; results are then read by stock transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PLAIN = ", correction: 0, refinements: 0, search: false, act_order: false"
LENGTH = 512


def run_compressor(model: str, ids: list[list[int]], out: str, passes: str, seed: int) -> None:
    from compressor.compress.apply import Job, apply
    from compressor.compress.recipe import parse_recipe

    # The windows of this seed are those in ids, by construction.
    data = f"data: {{samples: {len(ids)}, sequence_length: {LENGTH}, seed: {seed}}}\n"
    text = f"{data}passes: [{{{passes}}}]\n"
    apply(Job(parse_recipe(text), text, (), Path(model), Path(out), model), lambda event: None)


def llm_compressor_modifiers(method: str, bits: int, group: int) -> list[Any]:
    if method == "experts":
        from llmcompressor.modifiers.pruning import REAPPruningModifier

        return [REAPPruningModifier(sparsity=0.25), *llm_compressor_modifiers("", bits, group)]
    if method == "sparsegpt":
        from llmcompressor.modifiers.pruning import SparseGPTModifier

        return [SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])]
    if method == "wanda":
        from llmcompressor.modifiers.pruning import WandaPruningModifier

        return [WandaPruningModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])]
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.quantization import GPTQModifier

    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.num_bits, scheme.weights.group_size = bits, group
    return [GPTQModifier(ignore=["lm_head", "re:.*mlp.gate$"], config_groups={"group_0": scheme})]


def run_llm_compressor(model: str, ids: list[list[int]], out: str, modifiers: list[Any]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in ids]
    oneshot(
        model=loaded, dataset=Dataset.from_list(rows), max_seq_length=LENGTH, num_calibration_samples=len(ids),
        recipe=modifiers,
        shuffle_calibration_samples=False,
    )  # fmt: skip
    loaded.save_pretrained(out, save_compressed=True)


def run_gptqmodel(model: str, ids: list[list[int]], out: str, bits: int, group: int) -> None:
    from gptqmodel import GPTQConfig, GPTQModel

    loaded = GPTQModel.load(model, GPTQConfig(bits=bits, group_size=group), device="cpu")
    loaded.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in ids], batch_size=1)
    loaded.save(out)


def child(tool: str, model: str, ids_file: str, out: str, bits: int, group: int, seed: int) -> None:
    """One tool, its imports told apart; prints JSON."""
    start = time.perf_counter()
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(2)
    ids = json.loads(Path(ids_file).read_text())
    tool, _, method = tool.partition(", ")
    if tool == "llm-compressor":
        import llmcompressor.modifiers.quantization  # noqa: F401
    elif tool == "gptqmodel":
        import gptqmodel  # noqa: F401
    else:
        import compressor.compress.apply  # noqa: F401
    ready = time.perf_counter()
    if tool == "llm-compressor":
        run_llm_compressor(model, ids, out, llm_compressor_modifiers(method, bits, group))
    elif tool == "gptqmodel":
        run_gptqmodel(model, ids, out, bits, group)
    else:
        gptq = f"kind: gptq, bits: {bits}, group_size: {group}"
        armor = f"kind: armor, solver: als, objective: full, correction: 1, block_size: {group}"
        passes = {"": gptq, "plain": gptq + PLAIN, "armor-24": armor, "sparsegpt-24": "kind: sparse24"}
        prune = "kind: expert_prune, ratio: 0.25"
        passes |= {"experts": f"{prune}}}, {{{gptq}", "experts, published": f"{prune}, refit: false}}, {{{gptq}"}
        run_compressor(model, ids, out, passes[method], seed)
    done = time.perf_counter()
    # Not getrusage, whose peak a child inherits from the process that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1000
    size = sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))
    print("RESULT " + json.dumps({"imports": ready - start, "work": done - ready, "peak_mb": peak, "bytes": size}))
    sys.stdout.flush()
    os._exit(0)  # a peer's worker threads do not end by themselves


def decoded(folder: Path) -> dict[str, Any]:
    """Plain float32 weights of a result."""
    import torch
    from safetensors.torch import load_file

    from compressor.kernels.layouts import unpack_codes
    from compressor.runtime.stored import open_model

    config = json.loads((folder / "config.json").read_text())
    if config.get("quantization_config", {}).get("quant_method") != "gptq":
        opened = open_model(folder)
        return {name: opened.tensor(name).float() for name in opened.tensors}
    bits = config["quantization_config"]["bits"]
    stored = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    weights = {n: t.float() for n, t in stored.items() if not n.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))}
    for name in [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]:
        groups = stored[name + ".g_idx"].long()  # symmetric: the zero is the middle, which unpacking subtracts
        codes = unpack_codes(stored[name + ".qweight"].T.contiguous(), bits, len(groups))
        weights[name + ".weight"] = codes.to(torch.float32) * stored[name + ".scales"].float().T[:, groups]
    return weights


def judge(model: str, folders: dict[str, Path]) -> dict[str, Any]:
    """KL to the original per window, for each folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compressor.calibrate.corpus import builtin_corpus, token_windows

    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = token_windows(builtin_corpus("evaluation"), tokenizer, samples=None, sequence_length=LENGTH)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {}
    for name, folder in folders.items():
        if "experts" in name:
            other, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            assert not any(info.values()), info
            other.eval()
        else:
            other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
            missing = other.load_state_dict(decoded(folder), strict=False)
            assert not missing.unexpected_keys, missing
        divergences, ratios = [], []
        with torch.no_grad():
            for ids in windows.split(4):
                p, q = (m(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (base, other))
                divergences.append((p.exp() * (p - q)).sum(-1).mean(1))
                ratios.append((p - q).gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1))
        found[name] = (torch.cat(divergences).double(), torch.cat(ratios).double())
    return found


def main() -> None:
    """Run every tool on every seed, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sparse", type=int, help="compare 2:4, ARMOR's blocks being of this size")
    parser.add_argument("--experts", action="store_true", help="drop a quarter of the experts first")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--llm-compressor", help="a Python that has it")
    parser.add_argument("--gptqmodel", help="a Python that has it")
    parser.add_argument("--time-only", action="store_true")
    options = parser.parse_args()

    from transformers import AutoTokenizer

    from compressor.calibrate.corpus import builtin_corpus, token_windows

    pythons = {"compressor": sys.executable, "compressor, plain": sys.executable}
    pythons |= {"llm-compressor": options.llm_compressor} if options.llm_compressor else {}
    pythons |= {"gptqmodel": options.gptqmodel} if options.gptqmodel else {}
    if options.sparse:
        options.group_size = options.sparse
        pythons = {"compressor, armor-24": sys.executable, "compressor, sparsegpt-24": sys.executable}
        if options.llm_compressor:
            pythons |= {f"llm-compressor, {method}": options.llm_compressor for method in ("sparsegpt", "wanda")}
    if options.experts:
        pythons = {"compressor, experts": sys.executable, "compressor, experts, published": sys.executable}
        pythons |= {"llm-compressor, experts": options.llm_compressor} if options.llm_compressor else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    per_seed: dict[str, list[Any]] = {tool: [] for tool in pythons}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as room:
            windows = token_windows(
                builtin_corpus("calibration"), tokenizer, samples=options.samples, sequence_length=LENGTH, seed=seed
            )
            (Path(room) / "ids.json").write_text(json.dumps(windows.tolist()))
            folders = {}
            for tool, python in pythons.items():
                folders[tool] = Path(room) / tool.replace(", ", "-")
                words = [
                    python,
                    str(Path(__file__).resolve()),
                    "--child",
                    tool,
                    str(Path(options.model).resolve()),
                    f"{room}/ids.json",
                    str(folders[tool]),
                ]
                words += [str(options.bits), str(options.group_size), str(seed)]
                done = subprocess.run(words, capture_output=True, text=True, env=_environment(), cwd=room)
                line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
                assert line is not None, done.stdout[-2000:] + done.stderr[-2000:]
                result = json.loads(line.removeprefix("RESULT "))
                print(
                    f"seed {seed}, {tool}: imports {result['imports']:.1f} s, work {result['work']:.1f} s, "
                    f"peak {result['peak_mb']:.0f} MB, {result['bytes']:,} bytes", flush=True,
                )  # fmt: skip
            if not options.time_only:
                for tool, found in judge(options.model, folders).items():
                    per_seed[tool].append(found)
                    kl, ratio = found[0].mean(), found[1].mean().exp()
                    print(f"seed {seed}, {tool}: KL {kl:.5f}, perplexity ratio {ratio:.4f}", flush=True)
    if not options.time_only:
        _summary(per_seed)


def _summary(per_seed: dict[str, list[Any]]) -> None:
    import torch

    ours = torch.stack([kl for kl, _ in next(iter(per_seed.values()))]).mean(0)
    for tool, found in per_seed.items():
        kl = torch.stack([kl for kl, _ in found]).mean(0)
        ratio = torch.stack([ratio for _, ratio in found]).mean().exp()
        difference = kl - ours
        error = difference.std() / len(difference) ** 0.5
        distance = f", {difference.mean() / error:.0f} standard errors above ours" if error > 0 else ""
        print(f"mean, {tool}: KL {kl.mean():.5f}, perplexity ratio {ratio:.4f}{distance}")


def _environment() -> dict[str, str]:
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    return {**os.environ, **offline, "GPTQMODEL_CPU_WORKERS": "2", "TOKENIZERS_PARALLELISM": "false"}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        tool, model, ids, out, *numbers = sys.argv[2:]
        child(tool, model, ids, out, *(int(number) for number in numbers))
    else:
        main()

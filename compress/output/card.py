"""The model card of an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..plan import Plan, rows
from ..recipe import little_text

if TYPE_CHECKING:
    from ..job import Job
    from ..quality import Quality


def loading(folder: str, readers: Sequence[str], *, alone: bool) -> dict[str, str]:
    """How readers open a folder, by their names.

    Args:
        folder: as it stands in what is shown.
        alone: whether the model is a language model and nothing else.
    """
    kind, place = "CausalLM" if alone else "ImageTextToText", folder if folder == "folder" else repr(folder)
    found = {"compressor": f"from compressor.runtime import load\nmodel = load({place})"}
    if "transformers" in readers:
        lines = f"from transformers import AutoModelFor{kind}\nmodel = AutoModelFor{kind}.from_pretrained({place})"
        found["transformers"] = lines
    if any(reader.startswith("vLLM") for reader in readers):
        found["vLLM"] = f"vllm serve {folder}"
    return found


def _front(job: Job, plan: Plan, quality: Quality) -> dict[str, Any]:
    """What the hub reads of a card: what the model came from, by what it is opened, and what was measured."""
    from ...runtime.text import without_nan

    base = {"base_model": job.source, "base_model_relation": "quantized"} if job.revision else {}
    steps = dict.fromkeys(step.kind.replace("_", "-") for step in plan.recipe.passes)
    found: dict[str, Any] = {
        **base,
        "library_name": "transformers" if "transformers" in plan.readers else "compressor",
        "pipeline_tag": "text-generation",
        "tags": ["compressor", plan.format.name, *steps],
    }
    if quality.main is not None:
        name, text, against = quality.main
        numbers = {"perplexity": text.perplexity, "perplexity ratio to the original": against.perplexity_ratio,
                   "KL from the original, nats per token": against.kl_mean}  # fmt: skip
        metrics = [{"type": kind, "value": value} for kind, value in without_nan(numbers).items()]
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"{name} text, {text.tokens:,} tokens", "type": "text"}, "metrics": metrics,
        }  # fmt: skip
        found["model-index"] = [{"name": f"{Path(job.source).resolve().name}-compressed", "results": [result]}]
    return found


def model_card(
    job: Job, plan: Plan, fingerprint: Mapping[str, Any], events: Sequence[Mapping[str, Any]], quality: Quality
) -> str:
    """`README.md` of the output, from the plan and what happened."""
    checkpoint = plan.skeleton.checkpoint
    snippets = loading("folder", plan.readers, alone=checkpoint.text_config is checkpoint.config)
    load = snippets.get("transformers") or snippets["compressor"]
    edits = "".join(f" --set {edit}" for edit in job.edits)
    made_with = f"`recipe.yaml` and `{edits[1:]}`" if edits else "`recipe.yaml`"
    ratio = plan.bytes_before / plan.bytes_after
    lines = [
        "---",
        yaml.safe_dump(_front(job, plan, quality), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {Path(job.source).resolve().name}, compressed",
        "",
        f"{plan.bytes_before:,} → {plan.bytes_after:,} bytes of weights ({ratio:.2f} × smaller), "
        f"format `{plan.format.name}`, read by {', '.join(plan.readers)}.",
        "",
        f"{quality.summary()[0].upper()}{quality.summary()[1:]} (`report/quality.json`).",
        "",
        "```python",
        *(["# pip install compressed-tensors"] if plan.format.name == "compressed-tensors" else []),
        load,
        "```",
        "",
        "| linears | count | passes | stored as | bits per weight, scales included |",
        "|---|---|---|---|---|",
    ]
    for row in rows(plan):
        steps = " → ".join(row.steps) or "–"
        lines.append(f"| `{row.name}` | {row.count} | {steps} | {row.becomes} | {row.bits:.3f} |")
    lines += [
        "",
        f"Made by compressor {fingerprint['versions']['compressor']} with {made_with}.",
        "`recipe.resolved.yaml` has every option, `compressor.json` versions and hashes.",
    ]
    lines += [line for note in plan.notes for line in ("", f"{note}.")]
    fallbacks = sum(event["kind"] == "Fallback" for event in events)
    if fallbacks:
        lines += ["", f"{fallbacks} linears took a pass's fallback; `report/layers.jsonl` names them and says why."]
    starved = len({event["name"] for event in events if event["kind"] == "Starved"})
    if starved:
        lines += ["", f"{starved} linears of experts saw few calibration tokens; `report/layers.jsonl` names them."]
    if little_text(plan.recipe, plan.skeleton.checkpoint.parameters):
        lines += ["", "**Calibrated on the built-in text only**, which is little for a model of this size."]
    return "\n".join(lines) + "\n"

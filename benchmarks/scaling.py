"""How far a run over several processes would scale, worked out from its plan: nothing is run.

    python benchmarks/scaling.py w4a16-gptq config.json --processes 1 8 64 --rate 20 --network 20

Windows are dealt out in whole micro-batches, statistics are summed by a ring, groups of a stage are dealt out as
`compressor` deals them, and what all processes do alike costs each of them the same. A rate is of products of matrices,
as in `plan`; files and the start are the first process's.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.calibrate.chains import BATCH_TOKENS
from compressor.calibrate.curvature import curvature_cost
from compressor.calibrate.statistics import KINDS
from compressor.compress.plan import Plan, make_plan
from compressor.compress.recipe import parse_recipe, read_recipe
from compressor.compress.resources import LENGTH, estimated_seconds, measured_tokens
from compressor.runtime import processes
from compressor.runtime.model.imagined import imagine
from compressor.runtime.model.skeleton import Skeleton, calibration_dtype
from compressor.runtime.stored import open_model


@dataclass(frozen=True)
class Machine:
    """Operations and bytes in a second: of a process, of the network, and of the disk of the first one."""

    rate: float
    network: float
    disk: float


def divided(step: Any, rows: int, columns: int) -> tuple[float, float]:
    """Operations on a linear that every process does alike, and those that are dealt out by rows."""
    whole = step.flops(rows, columns)
    alone = step
    if getattr(step, "objective", None) == "model" and step.kind == "gptq":  # coupled rows move together
        alone = step.model_copy(update={"objective": "layer"})
    alike = min(whole, alone.flops(0, columns) + whole - alone.flops(rows, columns))
    return alike, whole - alike


def passes_seconds(plan: Plan, stage: list[list[str]], count: int, machine: Machine) -> float:
    """Of a stage's groups."""
    total = 0.0
    for step in plan.recipe.linear_passes.values():
        shapes = [[plan.linears[name].operator.shape for name in group if step.wants(name)] for group in stage]
        costs = [sum(step.flops(*shape) for shape in group) for group in shapes]
        if step.apart and len(costs) >= count:
            load = [0.0] * count
            for owner, cost in zip(processes.dealt(costs, count), costs, strict=True):
                load[owner] += cost
            total += max(load)
            continue
        parts = [divided(step, *shape) for group in shapes for shape in group]
        total += sum(alike + dealt / count for alike, dealt in parts)
    return total / machine.rate


def network_bytes(plan: Plan, stage: list[list[str]], count: int) -> float:
    """What a process sends of statistics that are summed, and of weights that it solved or is told."""
    ring, total = 2 * (count - 1) / count, 0.0
    for group in stage:
        passes = [step for step in plan.recipe.linear_passes.values() if any(map(step.wants, group))]
        asked = {need for step in passes for need in step.needs}
        columns = plan.linears[group[0]].operator.shape[1]
        total += ring * sum(kind.nbytes(columns) for name, kind in KINDS.items() if name in asked)
        total += (count > 1) * bool(passes) * sum(plan.linears[name].operator.nbytes for name in group)
    return total


def simulated(plan: Plan, count: int, machine: Machine) -> dict[str, float]:
    """Seconds by part of a run over so many processes."""
    skeleton, data = plan.skeleton, plan.recipe.data
    batches = max(1, data.tokens // max(BATCH_TOKENS, data.sequence_length))
    share = -(-batches // count) / batches
    passes = sent = 0.0
    for index in range(skeleton.blocks):
        for stage in skeleton.stages(index):
            groups = [[skeleton.disk_name(index, name) for name in group.linears] for group in stage]
            passes += passes_seconds(plan, groups, count, machine)
            sent += network_bytes(plan, groups, count)
    if plan.work["surveys"]:
        sent += 2 * (count - 1) / count * curvature_cost(skeleton, data.samples, data.sequence_length, metrics=True)[2]
    found = {part: plan.work[part] * share / machine.rate for part in ("surveys", "blocks")}
    read = -(-measured_tokens(data) // min(LENGTH, data.sequence_length))  # windows, which are dealt out one by one
    own = -(-read // count) / read if read >= count else 1.0
    found["comparing"] = plan.work["comparing"] * own / machine.rate
    return {**found, "passes": passes, "network": sent / machine.network, "files": plan.bytes_after / machine.disk}


def planned(recipe: str, model: Path, folder: Path, edits: tuple[str, ...]) -> Plan:
    if model.suffix == ".json":
        imagine(model, folder)
        model = folder
    checkpoint = open_model(model)
    parsed = parse_recipe(read_recipe(recipe)[1], recipe, edits)
    return make_plan(parsed, Skeleton(checkpoint, calibration_dtype(checkpoint)), memory=float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 8, 64])
    parser.add_argument("--rate", type=float, help="TFLOP/s of a process; default: measured here")
    parser.add_argument("--network", type=float, default=10.0, help="GB/s")
    parser.add_argument("--disk", type=float, default=1.0, help="GB/s")
    parser.add_argument("--set", action="append", default=[], dest="edits")
    options = parser.parse_args()
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            plan = planned(options.recipe, model, Path(folder), tuple(options.edits))
            rate = options.rate * 1e12 if options.rate else plan.work["passes"] / estimated_seconds(plan)["passes"]
            machine = Machine(rate, options.network * 1e9, options.disk * 1e9)
            first = sum(simulated(plan, 1, machine).values())
            for count in options.processes:
                parts = simulated(plan, count, machine)
                total = sum(parts.values())
                told = ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items())
                print(
                    f"{model.stem}, {count}: {total:,.0f} s, efficiency {first / total / count:.2f} ({told})",
                    flush=True,
                )


if __name__ == "__main__":
    main()

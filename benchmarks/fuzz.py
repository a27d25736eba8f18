"""Broken recipes, models, texts and outputs through the command line, each in a forked child.

    python benchmarks/fuzz.py --cases 200 --seed 0 --classes recipes headers

Whatever it is given, a command has to end in time with 0, 1, 2 or 130, and with an error for people where it cannot
run. OUT is there whole or not at all, what was damaged is not taken for whole, and what is read is left as it was. A
case is made of its class, its number and the seed, so that it can be run again alone (--first).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not outlive a fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import yaml  # noqa: E402
from pico import build_model  # noqa: E402

from compressor.cli import main as command_line  # noqa: E402
from compressor.compress.apply import Job, apply  # noqa: E402
from compressor.compress.evaluate import run_evaluation  # noqa: E402, F401 (for the children)
from compressor.compress.events import Event  # noqa: E402
from compressor.compress.recipe import parse_recipe, resolved_yaml, shipped  # noqa: E402
from compressor.runtime.loader import load  # noqa: E402

_CODES = (0, 1, 2, 130)
_ODD: list[Any] = [
    -1, 0, 1, 3, 17, 0.5, 1e-300, -1e308, math.nan, math.inf, None, True, "", "x", "4", "-1", "a\u202e\U0001f600",
    "y" * 3000, [], {}, [1, 2], [None], {"a": 1}, [[[[]]]], "../../etc/passwd", "/etc/hostname", "*", "re:(", ["re:["],
    "re:(a+)+$", "!!python/object:os.system",
]  # fmt: skip
_HUGE: list[Any] = [2**31, 2**63, 10**30, 10**12, 1e308, -(2**63)]
_SHARDED = "output: {shard_size: 0.05MB}\n"
_RECIPES = {
    "integers": "passes: [{kind: rtn, bits: 4, group_size: 32}]\n",
    "bytes": "passes: [{kind: rtn, scheme: int8}]\n",
    "sparse": "passes: [{kind: sparse24, method: magnitude}, {kind: rtn, bits: 4, group_size: 32}]\n",
    "latents": "passes: [{kind: lorc, ratio: 0.5}]\n" + _SHARDED,
    "calibrated": "passes: [{kind: gptq, bits: 4, group_size: 32, search: false, refinements: 0}]\n" + _SHARDED,
    "pruned": "passes: [{kind: expert_prune, keep: 3}]\n" + _SHARDED,
}


@dataclass
class Case:
    """A command, and what may not come of it.

    Attributes:
        told: what was done to its input.
        words: the command, which runs in the case's own folder.
        out: what it writes, by its name there.
        damaged: that it succeeds.
        expected: that it succeeds with other bytes than this folder's.
        kept: files and folders that it may not change.
    """

    told: str
    words: list[str]
    out: str | None = None
    damaged: bool = False
    expected: Path | None = None
    kept: list[Path] = field(default_factory=list)


class Ground:
    """What cases are made from: small models, outputs and interrupted runs, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "text.txt"
        self.text.write_text((ROOT / "examples" / "train.py").read_text(encoding="utf-8"), encoding="utf-8")
        self.llama = build_model("llama", folder / "llama")
        self.experts = build_model("qwen3_moe", folder / "experts")

    def model(self, recipe: str) -> Path:
        return self.experts if recipe == "pruned" or "moe" in recipe else self.llama

    def recipe(self, name: str) -> Path:
        path = self.folder / f"{name}.yaml"
        data = f"data: {{source: '{self.text}', samples: 2, sequence_length: 32}}\n"
        path.write_text(f"{data}limits: {{kl: null, perplexity_ratio: null}}\n{_RECIPES[name]}", encoding="utf-8")
        return path

    def _apply(self, name: str, out: Path, listener: Callable[[Event], None]) -> None:
        text, model = self.recipe(name).read_text(encoding="utf-8"), self.model(name)
        apply(Job(parse_recipe(text), text, (), model, out, str(model)), listener)

    def output(self, name: str) -> Path:
        out = self.folder / "outputs" / name
        if not out.is_dir():
            self._apply(name, out, lambda event: None)
        return out

    def interrupted(self, name: str, events: int) -> Path | None:
        """The work folder of a run that was interrupted after so many events; None: it has not as many."""
        out, heard = self.folder / "interrupted" / f"{name}-{events}" / "out", itertools.count()

        def stop(event: Event) -> None:
            if next(heard) == events:
                raise KeyboardInterrupt

        if not out.parent.is_dir():
            with suppress(KeyboardInterrupt):
                self._apply(name, out, stop)
        work = out.with_name("out.work")
        return work if work.is_dir() else None


def odd(rng: random.Random, *, huge: bool = True) -> Any:
    return copy.deepcopy(rng.choice(_ODD + _HUGE * huge))


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a document with each of its keys."""
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys):
        yield document, key
        yield from places(document[key])


def mutated(rng: random.Random, document: Any, *, huge: bool = True) -> tuple[Any, str]:
    """A document of mappings and lists with one entry changed, and what was done."""
    document = copy.deepcopy(document)
    found = list(places(document))
    if not found:
        return odd(rng, huge=huge), "all of it"
    place, key = rng.choice(found)
    way = rng.choice(["put", "put", "put", "drop", "wrap", "rename"])
    if way == "drop":
        del place[key]
    elif way == "wrap":
        place[key] = [place[key]] if rng.random() < 0.5 else {"x": place[key]}
    elif way == "rename" and isinstance(place, dict):
        place[rng.choice(["", f"{key}x", str(key).upper(), "__class__", "a.b"])] = place.pop(key)
    else:
        place[key] = odd(rng, huge=huge)
        way = f"put {place[key]!r:.40} at"
    return document, f"{way} {key}"


_INSERTED = [
    b"\0", b"\xff\xfe", b"\t", b": ", b"- ", b"&a ", b"*a", b"{", b"[" * 3000, b'"', b"\n---\n", b"\r", b"!!int x",
    b"\xef\xbb\xbf", b"<<: *a\n", b"9" * 5000, b"\xe2\x80\xa8",
]  # fmt: skip


def scrambled(rng: random.Random, raw: bytes) -> tuple[bytes, str]:
    """Bytes, some of which are changed, lost, doubled or new, and what was done."""
    place = rng.randrange(len(raw) or 1)
    end = min(len(raw), place + rng.randrange(1, 40))
    way = rng.choice(["flip", "flip", "cut", "double", "insert"])
    if way == "flip" and raw:
        found = raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :]
    elif way == "cut":
        found = raw[:place]
    elif way == "double":
        found = raw[:end] + raw[place:end] + raw[end:]
    else:
        found = raw[:place] + rng.choice(_INSERTED) + raw[place:]
    return found, f"{way} at {place} of {len(raw)}"


def rewritten(rng: random.Random, path: Path) -> str:
    """Change a file of JSON."""
    document, told = mutated(rng, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(document), encoding="utf-8")
    return f"{path.name}: {told}"


def spoilt(rng: random.Random, path: Path) -> str:
    """Change a file's bytes."""
    raw, told = scrambled(rng, path.read_bytes())
    path.write_bytes(raw)
    return f"{path.name}: {told}"


def other_kind(rng: random.Random, path: Path) -> str:
    """Put something that is no file in a file's place, or nothing."""
    path.unlink(missing_ok=True)
    way = rng.choice(["gone", "folder", "pipe", "endless", "dangling"])
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way != "gone":
        path.symlink_to("/dev/zero" if way == "endless" else "nowhere")
    return f"{path.name}: {way}"


def reheaded(rng: random.Random, path: Path) -> str:
    """Change the header of a safetensors file, or what it says of its length."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = sorted(header.keys() - {"__metadata__"})
    name, other = rng.choice(names), rng.choice(names)
    way = rng.choice(["entry", "entry", "text", "length", "exchange", "dtype", "shape", "name", "more", "none"])
    if way == "entry":
        header[name], told = mutated(rng, header[name])
        way = f"entry, {told}"
    elif way == "exchange":
        header[name], header[other] = header[other], header[name]
    elif way == "dtype":
        header[name]["dtype"] = rng.choice(["F16", "I16", "F32", "I32", "BOOL", "F8_E4M3", "U8", "X", None])
    elif way == "shape":
        header[name]["shape"] = rng.choice([header[name]["shape"][::-1], [], [-1], [2**62, 4], [0]])
    elif way == "name":
        header[rng.choice([f"{name}x", name.upper(), "", "\x1b[31mred", "model.layers.7.x"])] = header.pop(name)
    elif way == "more":
        header["more"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(body), len(body) + 8]}
        body += bytes(8)
    text = rng.choice([b"", b"[]", b"null", b"{" * 5000]) if way == "none" else json.dumps(header).encode()
    if way == "text":
        text, told = scrambled(rng, text)
    text += b" " * (-len(text) % 8)
    length = rng.choice([0, 7, length + 1, 2**40, 2**63, 2**64 - 1]) if way == "length" else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + body)
    return f"{path.name}: {way} of {name}"


def recipes(rng: random.Random, room: Path, ground: Ground) -> Case:
    """Recipes with mistakes, and `--set`."""
    path, way = room / "recipe.yaml", rng.choice(["document", "document", "text", "set", "apply"])
    name = rng.choice(list(_RECIPES) if way == "apply" else sorted(shipped()))
    model, sets = str(ground.model(name)), list[str]()
    if way in ("document", "apply"):
        text = ground.recipe(name).read_text() if way == "apply" else resolved_yaml(parse_recipe(shipped()[name]))
        document, told = mutated(rng, yaml.safe_load(text), huge=way != "apply")
        path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    else:
        path.write_text(shipped()[name], encoding="utf-8")
        told = spoilt(rng, path) if way == "text" else ""
    if way == "set":
        key = rng.choice(
            ["passes.0.bits", "passes.0", "passes.9.kind", "passes.-1.bits", "data.samples", "a.b", "", "."]
        )
        key = rng.choice([key, "passes.\u00b2", "passes.0.targets", "output.format", "__class__", "version.x"])
        value = rng.choice([str(odd(rng)), json.dumps(odd(rng)), "[*]", "{a: b", "&a [*a]", "!!timestamp x", "!!int x"])
        told, sets = f"{key}={value:.40}", ["--set", f"{key}={value}"]
    commands = [["recipes", "validate", str(path)], ["recipes", "show", str(path)], ["plan", str(path), model, *sets]]
    words = ["apply", str(path), model, "out"] if way == "apply" else commands[2] if sets else rng.choice(commands)
    return Case(f"{name}: {told}", words, "out" if way == "apply" else None, kept=[Path(model)])


def _read(rng: random.Random, told: str, model: Path, ground: Ground) -> Case:
    """Some command that reads a model."""
    recipe = str(ground.recipe(rng.choice(["integers", "bytes", "calibrated"])))
    words = rng.choice([
        ["inspect", "model", *rng.choice([[], ["--json"], ["--tensors", "*"]])],
        ["plan", recipe, "model"],
        ["apply", recipe, "model", "out"],
        ["run", "model", "-p", "import os", "--max-tokens", "2"],
        ["eval", "model", "--data", str(ground.text), "--samples", "1", "--sequence-length", "32"],
    ])  # fmt: skip
    return Case(f"{words[0]}: {told}", words, "out" if words[0] == "apply" else None, kept=[model])


def models(rng: random.Random, room: Path, ground: Ground) -> Case:
    """Models whose files beside the weights are damaged, or are no files."""
    model = Path(shutil.copytree(rng.choice([ground.llama, ground.experts]), room / "model"))
    names = ["config.json"] * 4 + ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    change = rng.choice([rewritten, rewritten, rewritten, spoilt, other_kind])
    return _read(rng, change(rng, model / rng.choice(names)), model, ground)


def headers(rng: random.Random, room: Path, ground: Ground) -> Case:
    """Weight files whose header or numbers are damaged, and their index."""
    source = rng.choice([ground.llama, ground.output("calibrated"), ground.output("bytes")])
    model = Path(shutil.copytree(source, room / "model"))
    index, file = model / "model.safetensors.index.json", rng.choice(sorted(model.glob("*.safetensors")))
    if index.is_file() and rng.random() < 0.4:
        return _read(rng, rewritten(rng, index), model, ground)
    return _read(rng, rng.choice([reheaded, reheaded, reheaded, spoilt, other_kind])(rng, file), model, ground)


def texts(rng: random.Random, room: Path, ground: Ground) -> Case:
    """Texts of odd kinds."""
    text = ground.text.read_text()[:20000]
    line = json.dumps({"text": text}).encode() + b"\n"
    messages = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode() + b"\n"
    name, raw = rng.choice([
        ("t.txt", b""), ("t.txt", rng.randbytes(4000)), ("t.txt", text.encode("utf-16")), ("t.txt", b"x"),
        ("t.txt", b"a" * 300_000), ("t.txt", b"\n" * 50_000), ("t.txt", b"\0" * 20_000), ("t.txt", text.encode()),
        ("t.jsonl", line), ("t.jsonl", line + b"{"), ("t.jsonl", b"[" * 100_000), ("t.jsonl", messages * 50),
        ("t.jsonl", b'{"text":' + b"9" * 10_000 + b"}"), ("t.jsonl", b'{"text": "\\ud800' + b"a b " * 900 + b'"}\n'),
        ("t.jsonl", b'{"messages": [5]}\n'), ("t.jsonl", b'{"text": null}\n'), ("t.jsonl", b"NaN\n"), ("t.csv", line),
    ])  # fmt: skip
    path, told = room / name, f"{name} {raw[:20]!r}"
    path.write_bytes(raw)
    if rng.random() < 0.4:
        told += ", " + rng.choice([spoilt, spoilt, other_kind])(rng, path)
    length = str(rng.choice([2, 16, 48, 2048]))
    if rng.random() < 0.5:
        words = ["eval", str(ground.llama), "--data", name, "--samples", "1", "--sequence-length", length]
        return Case(f"eval: {told}", words, kept=[ground.llama])
    edits = ["--set", f"data.source={name}", "--set", f"data.sequence_length={length}"]
    words = ["apply", str(ground.recipe("calibrated")), str(ground.llama), "out", *edits]
    return Case(f"apply: {told}", words, "out", kept=[ground.llama])


def ways(rng: random.Random, room: Path, ground: Ground) -> Case:
    """Outputs that are in the way of something, or cannot be written."""
    mine, model = room / "mine", Path(shutil.copytree(ground.llama, room / "model"))
    mine.mkdir()
    (mine / "letter.txt").write_text("mine")
    (room / "link").symlink_to("mine")
    out = rng.choice(["mine", "mine/letter.txt/out", "link", ".", "..", "/", "/dev/null", "/proc/x", "x" * 300, ""])
    out = rng.choice([out, out, "a\n\t'$(b)", "none/of/these/out", "model", "model/../out", "x" * 252])
    if work := rng.random() < 0.2:
        shutil.copytree(mine, room / "out.work")
    options = rng.choice([[], [], ["--overwrite"], ["--resume"]])
    words, kept = ["apply", str(ground.recipe("integers")), "model", out, *options], [mine, model]
    if rng.random() < 0.3 and options != ["--resume"]:
        words, kept = ["export", str(ground.output("integers")), out, *options], [mine]
    kept += [room / "out.work"] if work else []
    return Case(f"{words[0]} {out!r:.40} {' '.join(options)}{' beside work' * work}", words, kept=kept)


def outputs(rng: random.Random, room: Path, ground: Ground) -> Case:
    """Outputs that were damaged since they were written."""
    name = rng.choice(list(_RECIPES))
    folder = Path(shutil.copytree(ground.output(name), room / "it"))
    before = contents(folder)
    listed = [folder / one for one in sorted(json.loads((folder / "compressor.json").read_text())["files"])]
    weights = [one for one in listed if one.suffix == ".safetensors"]
    texts = [folder / one for one in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    changes = [(spoilt, listed), (other_kind, listed), (reheaded, weights), (spoilt, weights), (rewritten, texts)]
    change, paths = rng.choice(changes)
    told = change(rng, rng.choice(paths))
    if rng.random() < 0.1:
        (folder / rng.choice(["chat_template.jinja", "other.safetensors", "vocab.txt", "x.py"])).write_text("{}")
    words = rng.choice([["verify", "it"], ["verify", "it", "--json"], ["export", "it", "out"], ["inspect", "it"]])
    words = rng.choice([words, words, words, words, ["run", "it", "-p", "import os", "--max-tokens", "2"]])
    damaged = words[0] in ("verify", "export") and contents(folder) != before
    return Case(f"{words[0]} {name}: {told}", words, "out" if words[0] == "export" else None, damaged)


def work(rng: random.Random, room: Path, ground: Ground) -> Case:
    """Work folders that were damaged before a run is resumed."""
    name = rng.choice(["integers", "calibrated", "calibrated", "latents", "pruned", "pruned"])
    while (found := ground.interrupted(name, rng.randrange(12))) is None:
        pass
    folder = Path(shutil.copytree(found, room / "out.work"))
    journal = folder / "journal.jsonl"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    way = rng.choice(["bytes", "bytes", "bytes", "line", "kind", "folder", "more"])
    if way == "line":
        lines = journal.read_bytes().splitlines(keepends=True)
        told, one = "lines of the journal", rng.choice(lines)
        journal.write_bytes(b"".join(rng.choice([lines[1:], [*lines, one], [one, *lines], [b"5\n", *lines], [one]])))
    elif way == "folder":
        path = rng.choice([folder / "out", folder / "chains", *(folder / "chains").glob("*/*")])
        told = f"{path.name} is gone"
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    elif way == "more":
        (folder / "mine.txt").write_text(told := "mine")
    else:
        told = {"bytes": spoilt, "kind": other_kind}[way](rng, rng.choice(files))
    words = ["apply", str(ground.recipe(name)), str(ground.model(name)), "out", "--resume"]
    return Case(f"{found.parent.name}: {told}", words, "out", expected=ground.output(name), kept=[ground.model(name)])


CLASSES: dict[str, Callable[[random.Random, Path, Ground], Case]] = {
    made.__name__: made for made in (recipes, models, headers, texts, ways, outputs, work)
}


def run(words: list[str], room: Path, limit: float) -> tuple[int | None, str]:
    """A command in a forked child → its exit code (None: it did not end in time; below 0: a signal), what it said."""
    streams, end = room / ".said", time.monotonic() + limit
    streams.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _command(words, room, streams)
    code: int | None = None
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.005)
    else:
        code = os.waitstatus_to_exitcode(found[1])
    return code, streams.read_text(encoding="utf-8", errors="replace")


def _command(words: list[str], room: Path, streams: Path) -> None:
    """In the child, which ends here."""
    code = 99
    try:
        for descriptor in (1, 2):
            os.dup2(os.open(streams, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.chdir(room)
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # bytes
        sys.argv = ["compressor", *words]
        command_line.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def contents(path: Path) -> dict[str, str]:
    """What lies at a place, but for timings: names and hashes; of what is no file, what it is."""
    found = {}
    for one in [path, *sorted(path.rglob("*"))]:
        kind = hashlib.sha256(one.read_bytes()).hexdigest() if one.is_file() else "folder" if one.is_dir() else "other"
        found[str(one.relative_to(path))] = f"link {os.readlink(one)} {kind}" if one.is_symlink() else kind
    return {name: kind for name, kind in found.items() if not name.endswith(("timings.jsonl", "report.html"))}


def problems(case: Case, room: Path, limit: float) -> tuple[int | None, str, list[str]]:
    """Run a case: its exit code, what it said, and what should not have come of it."""
    before = [contents(path) for path in case.kept]
    code, said = run(case.words, room, limit)
    found = [word for word in ("Traceback", "internal error") if word in said]
    found += ["hang"] * (code is None) + [f"exit code {code}"] * (code not in (None, *_CODES))
    found += ["damage passed"] * (case.damaged and code == 0) + ["silence"] * (code == 2 and not said.strip())
    found += ["input changed"] * (before != [contents(path) for path in case.kept])
    out = room / (case.out or "nowhere")
    if out.exists():
        if code not in (0, 1):
            found.append("OUT in spite of an error")
        elif case.expected is not None:
            found += ["other bytes"] * (contents(out) != contents(case.expected))
        elif case.words[0] == "apply":
            found += ["OUT is not whole"] * (run(["verify", "out"], room, limit)[0] != 0)
    elif case.out is not None and code == 0:
        found.append("no OUT")
    return code, said, found


def main(classes: list[str], cases: int, seed: int, first: int = 0, limit: float = 60.0) -> int:
    """Run cases of some classes and print a table; return how many had problems."""
    torch.set_num_threads(1)
    bad, table = 0, [["class", "cases", *map(str, _CODES), "problems"]]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        ground, room = Ground(Path(name)), Path(name) / "room"
        load(ground.llama)  # which imports what children need
        for kind in classes:
            codes, seen = Counter[int | None](), Counter[str]()
            for number in range(first, first + cases):
                room.mkdir()
                case = CLASSES[kind](random.Random(f"{seed} {kind} {number}"), room, ground)
                code, said, found = problems(case, room, limit)
                codes[code] += 1
                seen.update(found)
                if found:
                    bad += 1
                    print(f"{kind} {number}: {', '.join(found)}: {case.told}\n    {said.strip()[-600:]}", flush=True)
                shutil.rmtree(room)
            told = ", ".join(f"{count} {problem}" for problem, count in seen.items())
            table.append([kind, str(cases), *(str(codes[code]) for code in _CODES), told or "–"])
    for row in table:
        print(f"{row[0]:<10}{''.join(f'{cell:>7}' for cell in row[1:-1])}  {row[-1]}")
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a command")
    options = parser.parse_args()
    sys.exit(bool(main(options.classes, options.cases, options.seed, options.first, options.limit)))

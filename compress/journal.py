"""The work folder of a run: what is done, for whom, and how to go on after anything.

`OUT.work/` holds `journal.jsonl` (one synced line per finished step), `chains/` (calibration activations, and what
surveys made), `out/` (the output in the making) and, while an old output is being replaced, `replaced/`. OUT itself
appears by one rename. A line of the journal ends with a seal, a hash over it and the seal before, so that lines which
were changed, left out or moved are found; checksums of what lies beside it are in its lines.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..runtime import processes
from ..runtime.errors import ResourceError
from ..runtime.files import file_sha256, sync_folder


class Journal:
    """Append-only record of a run, and the lock that keeps a second run out.

    Attributes:
        folder: `OUT.work`.
        entries: finished steps read back, oldest first.
        fingerprint: of the run.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".work")
        self.entries: list[dict[str, Any]] = []
        self.fingerprint: dict[str, Any] = {}
        self._lock: Any = None
        self._seal = ""

    @property
    def result(self) -> Path:
        """The output in the making."""
        return self.folder / "out"

    @property
    def chains(self) -> Path:
        return self.folder / "chains"

    @property
    def finished(self) -> dict[str, Any] | None:
        """The entry of a run that has only to be published."""
        return next((entry for entry in self.entries if entry.get("step") == "finished"), None)

    def damaged(self, what: str) -> ResourceError:
        """An error: something of the work is not as it was left."""
        return ResourceError(f"{what}: damaged, or changed since it was left; {self._start_over}")

    @property
    def _timings(self) -> Path:
        return self.result / "report" / "timings.jsonl"

    @property
    def _start_over(self) -> str:
        """How to, without losing the output that was being replaced."""
        replaced = self.folder / "replaced"
        if replaced.exists() and not self.out.exists():
            return f"to start over, move {replaced}, which was at {self.out}, back, then delete {self.folder}"
        return f"delete {self.folder} to start over"

    def open(self, fingerprint: dict[str, Any], *, resume: bool) -> None:
        """Start a run or take up an interrupted one; the leading process does, and others are told what is done.

        Raises:
            ResourceError: another run works here; or there is work to resume and `resume` was not asked for; or what
                is there was made from something else, which is named.
        """
        self.fingerprint = fingerprint
        if processes.leads():
            self._open(fingerprint, resume=resume)
        self.entries = processes.shared(self.entries)

    def _open(self, fingerprint: dict[str, Any], *, resume: bool) -> None:
        self._take_lock()
        lines = self._whole_lines()
        if not lines:
            if resume and self.out.is_dir() and any(self.out.iterdir()):
                self._remove()
                done = (self.out / "compressor.json").is_file()
                state = (
                    "is complete, there is nothing to resume" if done else "not empty, and no interrupted run is there"
                )
                raise ResourceError(f"{self.out}: {state}")
            self._remove(keep_folder=True)
            self._append({"fingerprint": fingerprint})
            return
        if not resume:
            raise ResourceError(f"{self.folder}: an interrupted run is there; add --resume, or {self._start_over}")
        changed = differences(lines[0].get("fingerprint", {}), fingerprint)
        if changed:
            raise ResourceError(
                f"{self.folder}: cannot resume, since this run differs in {'; '.join(changed)}; undo that, or "
                f"{self._start_over}"
            )
        self._check_kinds()
        self.entries = lines[1:]

    def _check_kinds(self) -> None:
        """Refuse what is neither file nor folder: a pipe would be waited at, a link leads to somewhere else."""
        for path in sorted(self.folder.rglob("*")):
            if path.relative_to(self.folder).parts[0] == "replaced":  # somebody's own
                continue
            if path.is_symlink() or not (path.is_file() or path.is_dir()) or (path.is_dir() and path == self._timings):
                raise self.damaged(str(path))

    def done(self, entry: dict[str, Any]) -> None:
        """Record a finished step, durably."""
        if processes.leads():
            self._append(entry)
        self.entries.append(entry)

    def timing(self, entry: dict[str, Any]) -> None:
        """Note how long a step took, in the one file of the output that may differ between equal runs."""
        if not processes.leads():
            return
        self._timings.parent.mkdir(parents=True, exist_ok=True)
        with open(self._timings, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def publish(self, *, overwrite: bool) -> None:
        """Move the finished output to OUT; safe to repeat after a crash at any point of it.

        Raises:
            ResourceError: something else is at OUT, or the output is gone.
        """
        replaced = self.folder / "replaced"
        if not self.holds(self.result if self.result.is_dir() else self.out):
            lost = f"the finished output is neither in it nor at {self.out}"
            raise ResourceError(f"{self.folder}: {lost}; put it back, or {self._start_over}")
        if self.result.is_dir():
            if self.out.exists() and not any(self.out.iterdir()):
                self.out.rmdir()
            if self.out.exists():
                if not overwrite or replaced.exists():
                    raise ResourceError(f"{self.out}: not empty any more; move it away and add --resume")
                os.rename(self.out, replaced)
            os.rename(self.result, self.out)
            sync_folder(self.out.parent)
        self._remove()

    def holds(self, folder: Path) -> bool:
        """Whether a folder is the output that this run finished, by its manifest."""
        manifest = folder / "compressor.json"
        assert self.finished is not None
        return manifest.is_file() and file_sha256(manifest) == self.finished["manifest"]

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        lock = self.folder / "lock"
        if self.folder.is_dir() and any(self.folder.iterdir()) and (lock.is_symlink() or not lock.is_file()):
            raise ResourceError(f"{self.folder}: is in the way and not of a run; move it, or choose another output")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")  # noqa: SIM115 (held until the run ends)
        except OSError as error:
            raise ResourceError(f"{self.folder}: cannot be written ({error.strerror}); choose another output") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResourceError(f"{self.folder}: another run is working there; wait for it or stop it") from None

    def _remove(self, *, keep_folder: bool = False) -> None:
        """Delete the work, the journal last: until then it says what the rest is."""
        finished = self.out.exists()  # else the replaced output is the only one there is
        for name in ("out", "chains", *(("replaced",) if finished else ())):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "journal.jsonl").unlink(missing_ok=True)
        if not keep_folder:
            self.close()
            (self.folder / "lock").unlink(missing_ok=True)
            with suppress(OSError):  # whatever else somebody put there stays
                self.folder.rmdir()

    def _whole_lines(self) -> list[dict[str, Any]]:
        """The complete lines of the journal; a torn last line, from a crash while it was written, is cut off."""
        path, entries = self.folder / "journal.jsonl", list[dict[str, Any]]()
        if not path.is_file():
            return []
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) != len(raw):
            with open(path, "rb+") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                seal = entry.pop("seal")
            except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
                raise self.damaged(str(path)) from None
            self._seal = _sealed(self._seal, entry)
            if self._seal != seal:
                raise self.damaged(str(path))
            entries.append(entry)
        return entries

    def _append(self, entry: dict[str, Any]) -> None:
        self._seal = _sealed(self._seal, entry)
        with open(self.folder / "journal.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "seal": self._seal}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)


def _sealed(seal: str, entry: dict[str, Any]) -> str:
    """The seal of an entry that follows one with a seal."""
    return hashlib.sha256(f"{seal} {json.dumps(entry)}".encode()).hexdigest()[:16]


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two fingerprints, as `key: before → now`."""
    found = []
    for key in sorted({*before, *now}):
        a, b = (_by_number(one.get(key)) for one in (before, now))
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {_shown(a, b)}")
    return found


def _by_number(value: Any) -> Any:
    """A list of objects by their numbers, so that it can be said which of them differ in what."""
    objects = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return {str(number): item for number, item in enumerate(value)} if objects else value


def _shown(*values: Any) -> str:
    """Two values; of long ones a few letters, from where they differ."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    same = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = same if same > 8 else 0
    short = [("…" if start else "") + text[start : start + 12] + "…" for text in texts]
    return " → ".join(part if len(text) > 60 else text for text, part in zip(texts, short, strict=True))

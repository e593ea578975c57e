"""Results that survive: atomic shards beside the output, merged into it when none is missing.

``<out>.parts/`` holds the request (rewards, inputs, versions: another one is refused) and the
shards, each some rows under the keys of their items. A shard that is there is whole, so that a
run may be killed at any moment: the next one skips what is there. In the end, whoever finds all
rows writes the output, in the order of the inputs, and removes the folder.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffreward.files import write_atomic
from diffreward.scoring.planner import Row
from diffreward.scoring.readers import Item, clean

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from doing the same work
    fcntl = None

FORMATS = (".parquet", ".jsonl", ".csv")
_LISTED = pa.schema(
    [("key", pa.binary(16)), *((name, pa.string()) for name in ("id", "path", "prompt", "extra"))]
)
_TEXTS = ("error", "notes")


class Parts:
    """What is scored so far, of one request.

    Args:
        out: the output file; None: everything stays in memory.
        request: what the rows depend on, as JSON values.
        rank, world: number of this process among those that share the work, and how many they are.

    Raises:
        ValueError: another format than `FORMATS`.
        FileExistsError: ``out`` is there, or ``<out>.parts`` is of another request, or another
            process is at work in it.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, out: Path | None, request: dict[str, Any], rank: int = 0, world: int = 1
    ) -> None:
        self.out, self.request = out, json.loads(json.dumps(request))
        self.rank, self.world = rank, world
        self.resumed = False  # whether somebody began this before
        self.folder = None if out is None else out.with_name(out.name + ".parts")
        self.batch_size: int | None = None
        self._memory: list[pa.Table] = []
        self._kinds: dict[str, str | None] = {}
        if out is not None:
            self._open()
        self._spool = tempfile.TemporaryFile(dir=self.folder)
        self._listing = pa.ipc.new_stream(self._spool, _LISTED)

    def _open(self) -> None:
        check_output(self.out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / f"rank-{self.rank}.lock", os.O_RDWR | os.O_CREAT)
        except OSError as err:
            raise type(err)(
                f"{self.folder} cannot be written ({err.strerror}); choose another output"
            ) from err
        if not _lock(self._lock):
            raise FileExistsError(
                f"another process is scoring into {self.out} already; wait for it, or choose "
                "another output"
            )
        if self.out.exists() and not self._shards():  # others have just finished it
            self.tidy()
            raise FileExistsError(_exists(self.out))
        file = self.folder / "request.json"
        if not file.exists():
            self.remember(None)
            return
        self.resumed = True
        stored = json.loads(file.read_text(encoding="utf-8"))
        self.batch_size = stored.pop("batch_size")
        differing = [k for k in {**stored, **self.request} if stored.get(k) != self.request.get(k)]
        if differing and not self._shards():
            self.remember(None)
        elif differing:
            raise FileExistsError(
                f"{self.folder} has unfinished results of another request (its "
                f"{', '.join(differing)} differ). Run that one again to finish it, choose another "
                "output, or remove the folder"
            )
        self._mark(self.rank).unlink(missing_ok=True)  # of the earlier run

    def remember(self, batch_size: int | None) -> None:
        """Keep the batch size, so that a run that goes on computes the very same numbers."""
        self.batch_size = batch_size
        if self.folder is not None:
            text = json.dumps({**self.request, "batch_size": batch_size}, indent=2)
            write_atomic(
                self.folder / "request.json", lambda p: p.write_text(text, encoding="utf-8")
            )

    def list(self, items: Sequence[Item], keys: Sequence[bytes]) -> None:
        """Note which rows the output will have, in its order."""
        for item in items:
            for name, value in item.extra.items():
                self._kinds[name] = _widen(self._kinds.get(name), value)
        extras = [json.dumps(dict(i.extra), default=str) if i.extra else None for i in items]
        columns = {
            "key": keys,
            "id": [clean(item.id) for item in items],
            "path": [_shown(item) for item in items],
            "prompt": [item.prompt for item in items],
            "extra": extras,
        }
        arrays = [pa.array(columns[field.name], field.type) for field in _LISTED]
        self._listing.write_batch(pa.record_batch(arrays, schema=_LISTED))

    def start(self) -> set[bytes]:
        """Keys of the rows that are there; without this of every process, nobody finishes."""
        done = {key for table in self._tables(["key"]) for key in table["key"].to_pylist()}
        if self.folder is not None:
            self._mark(self.rank).touch()
        return done

    def add(self, keys: Sequence[bytes], rows: Sequence[Row]) -> None:
        """Keep some rows; on return they are on the disk."""
        names = sorted({name for row in rows for name in row})
        columns = {"key": pa.array(keys, pa.binary(16))}
        for name in names:
            values = [row.get(name) for row in rows]
            if name in _TEXTS:
                values = [None if value is None else clean(value) for value in values]
            columns[name] = pa.array(values, _type(name))
        table = pa.table(columns)
        if self.folder is None:
            self._memory.append(table)
            return
        name = blake2b(b"".join(keys), digest_size=12).hexdigest()
        write_atomic(self.folder / f"{name}.parquet", lambda p: pq.write_table(table, p))

    def finish(self, labels: Sequence[str]) -> pa.Table | None:
        """The result, written to the output; None if others are still at work.

        Args:
            labels: column name of each reward.
        """
        self._listing.close()
        # Whoever starts later must find the shards: he would take the output for somebody else's.
        if self.folder and not all(self._mark(rank).exists() for rank in range(self.world)):
            return None
        try:
            results = pa.concat_tables(self._tables(), promote_options="default")
        except FileNotFoundError:  # the one who finished first is tidying up
            return None
        place = {key: n for n, key in enumerate(results["key"].to_pylist())}
        batches = []
        self._spool.seek(0)
        naming = _columns(results, labels)
        for batch in pa.ipc.open_stream(self._spool):
            rows = [place.get(key) for key in batch["key"].to_pylist()]
            if None in rows:
                return None
            batches.append(self._rows(batch, results.take(pa.array(rows)), naming))
        table = pa.concat_tables(batches).combine_chunks()
        about = {k: v for k, v in self.request.items() if k in ("diffreward", "rewards")}
        table = table.replace_schema_metadata({"diffreward": json.dumps(about)})
        if self.out is not None:
            with _only_one(self.folder / "merge.lock") as mine:
                if not mine:
                    return None
                if not self.out.exists():
                    write_atomic(self.out, lambda p: _WRITE[self.out.suffix](table, p), self.folder)
                self.tidy()
        return table

    def tidy(self) -> None:
        """Remove the folder of a finished output."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let others work on this request."""
        self._spool.close()
        if self.folder is not None:
            os.close(self._lock)

    def _mark(self, rank: int) -> Path:
        """It is there as soon as that process has read what is done."""
        return self.folder / f"rank-{rank}.started"

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9a-f]*.parquet"))  # not the hidden, unfinished ones

    def _tables(self, columns: Sequence[str] | None = None) -> list[pa.Table]:
        if self.folder is None:
            return self._memory or [pa.table({"key": pa.array([], pa.binary(16))})]
        shards = [pq.read_table(shard, columns=columns) for shard in self._shards()]
        return shards or [pa.table({"key": pa.array([], pa.binary(16))})]

    def _rows(self, listed: pa.RecordBatch, scored: pa.Table, naming: dict[str, str]) -> pa.Table:
        """Rows of the output: what was listed, beside what was found."""
        columns = {name: listed[name] for name in ("id", "path", "prompt")}
        for name, shown in naming.items():
            if name in scored.column_names:
                columns[shown] = scored[name]
            else:
                columns[shown] = pa.nulls(len(listed), _type(name))
        extras = [json.loads(text or "{}") for text in listed["extra"].to_pylist()]
        for name, kind in self._kinds.items():
            values = [_narrow(extra.get(name), kind) for extra in extras]
            shown = f"input.{name}" if name in columns else name
            columns[shown] = pa.array(values, _KINDS[kind or "str"])
        return pa.table(columns)


def check_output(out: Path) -> None:
    """Refuse an output that is there already, or of an unknown format.

    Raises:
        FileExistsError, ValueError
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"the output is {', '.join(FORMATS)}, but {out.name} came")
    if out.exists() and not out.with_name(out.name + ".parts").exists():
        raise FileExistsError(_exists(out))


def _exists(out: Path) -> str:
    return f"{out} exists; results are never overwritten: choose another output, or move it away"


def _lock(descriptor: int) -> bool:
    """Take a lock which ends with this process, whatever becomes of its children."""
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _only_one(path: Path) -> Iterator[bool]:
    """Whether no other process is in here."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:  # the folder is gone: another one is done
        yield False
        return
    try:
        yield _lock(descriptor) and path.exists()  # it is gone if another one was in here
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------

_KINDS = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}


def _shown(item: Item) -> str | None:
    if item.file is None:
        return None
    return clean(item.id if item.span else item.file)


def _columns(results: pa.Table, labels: Sequence[str]) -> dict[str, str]:
    """Internal name -> column of the output, in its order, no two alike."""
    naming: dict[str, str] = {}

    def add(internal: str, shown: str) -> None:
        taken = {"id", "path", "prompt", *_TEXTS, *naming.values()}
        names = [shown, *(f"{shown} {n}" for n in range(2, len(taken) + 3))]
        naming[internal] = next(name for name in names if name not in taken)

    for place, label in enumerate(labels):
        add(str(place), label)
        std, parts = f"{place}_std", f"{place}."
        for name in sorted(results.column_names, key=lambda name: (name != std, name)):
            if name == std or name.startswith(parts):
                add(name, label + name.removeprefix(str(place)))
    return naming | {name: name for name in _TEXTS}


def _type(name: str) -> pa.DataType:
    return pa.string() if name in _TEXTS else pa.float32()


def _widen(kind: str | None, value: Any) -> str | None:
    """The narrowest type for what was seen so far and this value; None: nothing was."""
    if value is None:
        return kind
    new = type(value).__name__ if isinstance(value, bool | int | float) else "str"
    if new == "int" and not -(2**63) <= value < 2**63:
        new = "str"
    return new if kind in (None, new) else ("float" if {kind, new} == {"int", "float"} else "str")


def _narrow(value: Any, kind: str) -> Any:
    if value is None or kind != "str":
        return float(value) if kind == "float" and value is not None else value
    return clean(value if isinstance(value, str) else json.dumps(value))


def _plain(table: pa.Table) -> Iterator[dict]:
    """Rows whose numbers have no more digits than float32 has."""
    for batch in table.to_batches(max_chunksize=4096):
        columns = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            values = column.to_pylist()
            if column.type == pa.float32():
                values = [v if v is None else float(str(np.float32(v))) for v in values]
            columns[name] = values
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))


def _write_jsonl(table: pa.Table, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in _plain(table):
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    row[name] = str(value)  # JSON has no -inf
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _write_csv(table: pa.Table, path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, table.column_names)
        rows.writeheader()
        rows.writerows(_plain(table))


_WRITE = {".parquet": pq.write_table, ".jsonl": _write_jsonl, ".csv": _write_csv}

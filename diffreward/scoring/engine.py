"""``score``: files in, rows out, nothing lost on the way.

Rows are listed in chunks of ``shard_rows``; of each chunk, what is not there yet is decoded in
worker processes ahead of the model, scored in batches, and written as one shard. Chunks do not
depend on what was scored before, so that a run which was killed goes on with the very batches it
would have had. Under ``torchrun`` or ``accelerate launch``, process r of n takes every n-th chunk.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffreward import __version__
from diffreward.rewards import RewardSpec
from diffreward.samples import Samples
from diffreward.scoring.planner import LARGEST_BATCH, Row, Scorer
from diffreward.scoring.readers import Inputs, Item, expand
from diffreward.scoring.writer import Parts, check_output

_FEW = 64  # inputs that are not worth starting processes for


@dataclass
class ScoreTable:
    """What `score` found.

    Attributes:
        table: one row per input, in their order: ``id``, ``path``, ``prompt``, each reward with
            its ``_std`` and ``.parts`` where it has them, ``error``, ``notes``, and the other
            columns of manifests. A reward that could not score a row is null there. None: other
            processes are still at work, and the last of them writes it.
        labels: the rewards' columns.
        out: the file, if there is one.
        computed: how many rows were scored now, and not read from an earlier run or shared.
        seconds: for these, without loading the rewards.
        batch_size: that was used.
    """

    table: pa.Table | None
    labels: list[str]
    out: Path | None
    computed: int
    seconds: float
    batch_size: int

    def __len__(self) -> int:
        return 0 if self.table is None else self.table.num_rows

    def __getitem__(self, label: str) -> np.ndarray:
        """One reward's values, float32, NaN where it could not score."""
        if self.table is None:
            raise ValueError("other processes are still scoring; the last one writes the table")
        return self.table[label].to_numpy()

    def summary(self) -> dict[str, dict[str, float | int]]:
        """Of each reward: rows scored, errors, mean, std (of the population), percentiles."""
        return {label: self._summary(label) for label in self.labels}

    @property
    def rate(self) -> float:
        """Rows scored per second."""
        return self.computed / max(self.seconds, 1e-9)

    @property
    def errors(self) -> list[tuple[str, str]]:
        """Id and error of the rows that have one."""
        if self.table is None:
            return []
        wrong = self.table.filter(pa.compute.is_valid(self.table["error"]))
        return list(zip(wrong["id"].to_pylist(), wrong["error"].to_pylist(), strict=True))

    def _summary(self, label: str) -> dict[str, float | int]:
        column = self[label]
        values = column[~np.isnan(column)].astype(np.float64)
        found = {"count": len(values), "errors": len(column) - len(values)}
        if not len(values):
            return {**found, **dict.fromkeys(("mean", "std", "p5", "p50", "p95"), float("nan"))}
        with np.errstate(invalid="ignore"):  # -inf is a legal score
            p5, p50, p95 = np.percentile(values, [5, 50, 95], method="inverted_cdf")
            mean, std = values.mean(), values.std()
        numbers = {"mean": mean, "std": std, "p5": p5, "p50": p50, "p95": p95}
        return found | {name: float(number) for name, number in numbers.items()}


def score(
    inputs: str | os.PathLike | Samples | Sequence[str | os.PathLike],
    rewards: RewardSpec | Sequence[RewardSpec] | Mapping[str, RewardSpec],
    *,
    out: str | os.PathLike | None = None,
    prompts: str | Sequence[str] | None = None,
    data_column: str | None = None,
    prompt_column: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    shard_rows: int = 256,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> ScoreTable:
    """Score files, or samples in memory, by one or more rewards.

    Args:
        inputs: folders, globs, images, manifests, tars, data sets, sequence files (see
            `diffreward.scoring.readers`), or Samples.
        rewards: a reward or spec, several, or column name -> reward.
        out: ``.parquet``, ``.jsonl`` or ``.csv`` file, which must not exist. If this very request
            was interrupted before, it goes on where it was. None: the result is only returned.
        prompts: one for all inputs, or one for each in their order; None: their own.
        data_column, prompt_column: of manifests; None: the usual names.
        batch_size: rows a network sees at once; None: found by trying what fits into the memory
            of the GPU (32 on a CPU).
        num_workers: processes that decode; 0: none but this one; None: by the number of cores.
        shard_rows: rows that are written, and lost if the run is killed, together.
        device: None: CUDA if there is one.
        progress: show a bar.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: before anything is computed: an input that
            is not there or of another kind than the rewards score, an unknown reward, prompts
            that are needed and missing, an output that exists or is of another request.
        OSError: the output cannot be written.

    What is wrong with one input is never raised: it is an error of its row.
    """
    for name, value, least in [("batch_size", batch_size, 1), ("num_workers", num_workers, 0),
                               ("shard_rows", shard_rows, 1)]:  # fmt: skip
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, but {value} came")
    out = None if out is None else Path(out)
    if out is not None:
        check_output(out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if isinstance(inputs, Samples):
        return _score_samples(inputs, Scorer(rewards, device), out, prompts, batch_size)
    if world > 1 and out is None:
        raise ValueError(
            f"{world} processes share this work (WORLD_SIZE is set): give an output, in which "
            "their rows come together"
        )
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    paths = [os.fspath(path) for path in paths]
    expand(paths)  # before weights are loaded
    scorer = Scorer(rewards, device)
    listed = Inputs(
        paths, scorer.kind, data_column=data_column, prompt_column=prompt_column, prompts=prompts
    )
    if scorer.needs_prompt:
        listed.require_prompts(f"reward {scorer.needs_prompt[0]!r}")
    request = _request(scorer, paths, prompts, data_column, prompt_column)
    parts = Parts(out, request, rank)
    try:
        if batch_size is None:
            batch_size = parts.batch_size or scorer.find_batch_size(listed.first(8))
        parts.remember(batch_size := min(batch_size, LARGEST_BATCH, shard_rows))
        run = _Run(listed, scorer, parts, batch_size, shard_rows, rank, world)
        if num_workers is None:
            num_workers = _workers(scorer.device) if len(listed.first(_FEW + 1)) > _FEW else 0
        started = time.monotonic()
        run.go(num_workers, progress)
        seconds = time.monotonic() - started
        table = parts.finish(list(scorer.specs))
    finally:
        parts.close()
    return ScoreTable(table, list(scorer.specs), out, run.computed, seconds, batch_size)


@dataclass
class _Task:
    """A batch; the last one of its chunk says so, for then the chunk is written."""

    items: list[Item]
    keys: list[bytes]
    last: bool = False


@dataclass
class _Run:
    listed: Inputs
    scorer: Scorer
    parts: Parts
    batch_size: int
    shard_rows: int
    rank: int
    world: int
    computed: int = 0

    def go(self, num_workers: int, progress: bool) -> None:
        """Score what is missing."""
        keys: list[bytes] = []
        rows: list[Row] = []
        bar = tqdm(desc="score", unit="row", delay=2, disable=not progress)
        with bar:
            for task, found in self._scored(num_workers):
                if not self.computed:
                    self._warn_if_hopeless(found)
                keys += task.keys
                rows += found
                self.computed += len(found)
                bar.update(len(found))
                if task.last:
                    self.parts.add(keys, rows)
                    keys, rows = [], []

    def _scored(self, num_workers: int) -> Iterator[tuple[_Task, list[Row]]]:
        """Batches with their rows, decoded in other processes while the model works."""
        waiting: deque[_Task] = deque()

        def batches() -> Iterator[list[Item]]:
            for task in self._tasks():
                waiting.append(task)
                yield task.items

        loader = DataLoader(
            self.scorer.decoder(), sampler=batches(), batch_size=None, collate_fn=_same,
            num_workers=num_workers, worker_init_fn=_quiet_worker,
            pin_memory=self.scorer.device.type == "cuda",
        )  # fmt: skip
        for decoded in loader:
            task = waiting.popleft()
            yield task, self.scorer(task.items, decoded)

    def _tasks(self) -> Iterator[_Task]:
        """Everything is listed; what is there, or not this process's, makes no task."""
        done, seen = self.parts.done(), set()
        items, number = iter(self.listed), 0
        while chunk := list(islice(items, self.shard_rows)):
            keys = [item.key(self.scorer.context) for item in chunk]
            self.parts.list(chunk, keys)
            first = {}  # the same input twice is computed once
            for key, item in zip(keys, chunk, strict=True):
                if key not in seen:
                    seen.add(key)
                    first[key] = item
            if number % self.world == self.rank:
                yield from self._split({k: i for k, i in first.items() if k not in done})
            number += 1

    def _split(self, chunk: dict[bytes, Item]) -> list[_Task]:
        tasks = []
        for prompted in (True, False):
            some = [(k, item) for k, item in chunk.items() if (item.prompt is not None) == prompted]
            for start in range(0, len(some), self.batch_size):
                batch = some[start : start + self.batch_size]
                tasks.append(_Task([item for _, item in batch], [key for key, _ in batch]))
        if tasks:
            tasks[-1].last = True
        return tasks

    def _warn_if_hopeless(self, rows: list[Row]) -> None:
        """One warning now, instead of the same error in a million rows in the end."""
        for place, label in enumerate(self.scorer.specs):
            about = f"{label}: "
            errors = [row.get("error") or "" for row in rows]
            if all(str(place) not in row for row in rows) and all(about in e for e in errors):
                warnings.warn(
                    f"reward {label!r} failed on all {len(rows)} rows of the first batch: "
                    f"{errors[0]}",
                    stacklevel=2,
                )


def _score_samples(
    samples: Samples,
    scorer: Scorer,
    out: Path | None,
    prompts: str | Sequence[str] | None,
    batch_size: int | None,
) -> ScoreTable:
    """In memory: one row per sample, called by its number."""
    if prompts is not None:
        given = [prompts] * len(samples) if isinstance(prompts, str) else list(prompts)
        samples = Samples(samples.data, samples.modality, given, samples.context)
    for label, reward in scorer.rewards.items():
        if reward.info.modality not in (None, samples.modality):
            raise ValueError(
                f"reward {label!r} scores {reward.info.modality} samples, but {samples.modality} "
                "samples came"
            )
    if scorer.needs_prompt and samples.prompts is None:
        raise ValueError(
            f"reward {scorer.needs_prompt[0]!r} compares samples with their prompts, but these "
            "samples have none; give prompts"
        )
    parts = Parts(out, _request(scorer, [f"{len(samples)} samples in memory"], None, None, None))
    batch_size = min(batch_size or 32, LARGEST_BATCH)
    try:
        started = time.monotonic()
        for start in range(0, len(samples), batch_size):
            numbers = range(start, min(start + batch_size, len(samples)))
            batch = samples.take(numbers)
            asked = batch.prompts or [None] * len(batch)
            items = [Item(str(n), prompt=p) for n, p in zip(numbers, asked, strict=True)]
            keys = [n.to_bytes(16, "big") for n in numbers]
            parts.list(items, keys)
            parts.add(keys, scorer.score_samples(batch))
        seconds = time.monotonic() - started
        table = parts.finish(list(scorer.specs))
    finally:
        parts.close()
    return ScoreTable(table, list(scorer.specs), out, len(samples), seconds, batch_size)


def _request(
    scorer: Scorer,
    paths: Sequence[str],
    prompts: str | Sequence[str] | None,
    data_column: str | None,
    prompt_column: str | None,
) -> dict[str, Any]:
    """Everything the rows depend on, apart from the inputs' contents."""

    def describe(value: Any) -> str:
        info = getattr(value, "info", None)
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{getattr(value, '__module__', '')}.{name}" + ("" if info is None else f" {info}")

    packages = {}
    for name in ("torch", "torchvision", "pillow", "numpy", "open_clip_torch", "transformers"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    request = {
        "diffreward": __version__,
        "packages": packages,
        "rewards": scorer.specs,
        "inputs": [p if p.startswith("embedded:") else os.path.abspath(p) for p in paths],
        "prompts": prompts if prompts is None or isinstance(prompts, str) else list(prompts),
        "columns": [data_column, prompt_column],
        "device": scorer.device.type,
    }
    return json.loads(json.dumps(request, default=describe))


def _workers(device: torch.device) -> int:
    """On a GPU, as many as keep it busy; on a CPU, the model needs the cores itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, (cores or 1) - 1)) if device.type == "cuda" else min(2, (cores or 1) // 2)


def _same(decoded):
    return decoded


def _quiet_worker(number: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

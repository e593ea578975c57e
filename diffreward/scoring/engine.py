"""``score``: files in, rows out, nothing lost on the way.

Rows are listed in chunks of ``shard_rows``; of each chunk, what is not there yet is decoded in
worker processes ahead of the model, scored in batches, and written as one shard. Chunks do not
depend on what was scored before, so that a run which was killed goes on with the very batches it
would have had. Under ``torchrun`` or ``accelerate launch``, process r of n takes every n-th chunk;
with ``engine="ray"``, the actors of a Ray cluster take batches (`diffreward.scoring.on_ray`).
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffreward import __version__
from diffreward.rewards import RewardSpec
from diffreward.rewards.weights import fingerprints, weights_fingerprint
from diffreward.samples import Samples
from diffreward.scoring.decode import Decoder
from diffreward.scoring.planner import CPU_BATCH, LARGEST_BATCH, Row, Scorer, Task
from diffreward.scoring.readers import Inputs, Item, clean, expand
from diffreward.scoring.sets import SetValue, value_sets
from diffreward.scoring.writer import Parts, check_output

_FEW = 64  # inputs that are not worth starting processes for
_DEADLY = "it kills the process that decodes it"


@dataclass
class ScoreTable:
    """What `score` found.

    Attributes:
        table: one row per input, in their order: ``id``, ``path``, ``prompt``, each reward with
            its ``_std`` and ``.parts`` where it has them, ``error``, ``notes``, and the other
            columns of manifests. A reward that could not score a row is null there. None: other
            processes are still at work, and the last of them writes it.
        labels: the rewards' columns.
        sets: what each reward of sets says of each set; also in ``<out>.sets.json``.
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
    sets: list[SetValue] = field(default_factory=list)

    def __len__(self) -> int:
        return 0 if self.table is None else self.table.num_rows

    def __getitem__(self, label: str) -> np.ndarray:
        """One reward's values, float32, NaN where it could not score."""
        if self.table is None:
            raise ValueError("other processes are still scoring; the last one writes the table")
        if label not in self.table.column_names and label in [each.reward for each in self.sets]:
            raise KeyError(f"{label!r} is of sets, and no row has a value: see ScoreTable.sets")
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
    reference: Any = None,
    group_by: str | None = None,
    influence: bool = False,
    batch_size: int | None = None,
    num_workers: int | None = None,
    shard_rows: int = 256,
    device: torch.device | str | None = None,
    engine: str = "local",
    num_actors: int | None = None,
    progress: bool = False,
) -> ScoreTable:
    """Score files, or samples in memory, by one or more rewards.

    Rewards of sets give no row a number, but all inputs together, or each group of them; see
    `ScoreTable.sets`. Their features are computed with the rows, and kept until the end.

    Args:
        inputs: folders, globs, images, manifests, tars, data sets, sequence files (see
            `diffreward.scoring.readers`), or Samples.
        rewards: a reward or spec, several, or column name -> reward.
        out: ``.parquet``, ``.jsonl`` or ``.csv`` file, which must not exist. If this very request
            was interrupted before, it goes on where it was. None: the result is only returned.
        prompts: one for all inputs, or one for each in their order; None: their own.
        data_column, prompt_column: of manifests; None: the usual names.
        reference: exemplars (a folder, a manifest, texts, saved statistics: what
            `diffreward.rewards.exemplars.load_exemplars` takes) for every reward that compares
            with exemplars and names none itself.
        group_by: a column of the manifests, or ``"folder"``, the one that each file is in; of
            samples in memory, a key of their context. Each of its values makes a set; None: all
            inputs are one.
        influence: add a column ``NAME.influence`` for each reward of sets: what the set's value
            would lose without the row. For some rewards that is n times the work of the value;
            without, it is computed for sets of up to 1000 (of these rewards 100) only, for the
            standard error.
        batch_size: rows a network sees at once; None: found by trying what fits into the memory
            of the GPU (32 on a CPU).
        num_workers: processes that decode. A file that kills its decoder (too little memory, a
            defect of an image library) kills such a process and is an error of its row. 0: none:
            it kills this one. None: by the number of cores; none for a few inputs, unless an
            earlier run was interrupted.
        shard_rows: rows that are written, and lost if the run is killed, together.
        device: None: CUDA if there is one.
        engine: ``"local"``: this process (and those that torchrun started beside it: ``RANK`` and
            ``WORLD_SIZE`` are set, and each takes its share); ``"ray"``: the Ray cluster that
            ``RAY_ADDRESS`` names, or this machine. Every machine must see the files under the
            same paths.
        num_actors: of Ray, each with a model of its own; None: one for each GPU, or CPU core if
            there is no GPU.
        progress: show a bar.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: before anything is computed: an input that
            is not there or of another kind than the rewards score, an unknown reward, prompts
            that are needed and missing, an output that exists or is of another request, only
            one of ``RANK`` and ``WORLD_SIZE``.
        OSError: the output cannot be written.
        ImportError: Ray is asked for and not installed.
        RuntimeError: processes that decode die, and not of a file (with Ray: of anything).

    What is wrong with one input is never raised: it is an error of its row.
    """
    for name, value, least in [
        ("batch_size", batch_size, 1), ("num_workers", num_workers, 0),
        ("shard_rows", shard_rows, 1), ("num_actors", num_actors, 1),
    ]:  # fmt: skip
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, but {value} came")
    out = None if out is None else Path(out)
    if out is not None:
        check_output(out)
    if engine not in ("local", "ray"):
        raise ValueError(f"engine is 'local' or 'ray', but {engine!r} came")
    rank, world = _place()
    if engine == "ray" and (world > 1 or isinstance(inputs, Samples)):
        came = f"{world} processes (WORLD_SIZE is set)" if world > 1 else "samples in memory"
        raise ValueError(f"engine='ray' is for one process and files, but {came} came")
    if world > 1 and device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    if isinstance(inputs, Samples):
        scorer = Scorer(rewards, device, reference)
        _check_sets(scorer, group_by, influence)
        return _score_samples(inputs, scorer, out, prompts, batch_size, group_by, influence)
    if world > 1 and out is None:
        raise ValueError(
            f"{world} processes share this work (WORLD_SIZE is set): give an output, in which "
            "their rows come together"
        )
    if world > 1 and "MASTER_ADDR" not in os.environ:  # left over, or somebody's own launcher
        warnings.warn(
            f"RANK={rank} and WORLD_SIZE={world} are set: this process scores only its share, "
            f"every {world}th shard. Unset both to score everything",
            stacklevel=2,
        )
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    paths = [os.fspath(path) for path in paths]
    expand(paths)  # before weights are loaded
    if engine == "ray":
        from diffreward.scoring.on_ray import Cluster

        machine = Cluster(num_actors)
    else:
        machine = _Local(num_workers)
    with machine:
        scorer = Scorer(rewards, device or machine.device, reference)
        _check_sets(scorer, group_by, influence)
        listed = Inputs(
            paths, scorer.kind, data_column=data_column, prompt_column=prompt_column,
            prompts=prompts,
        )  # fmt: skip
        if scorer.needs_prompt:
            listed.require_prompts(f"reward {scorer.needs_prompt[0]!r}")
        _check_groups(listed.first(_FEW), group_by)
        request = _request(scorer, paths, prompts, data_column, prompt_column)
        parts = Parts(out, request, rank, world)
        try:
            if batch_size is None:
                batch_size = parts.batch_size or machine.find_batch_size(scorer, listed.first(8))
            parts.remember(batch_size := min(batch_size, LARGEST_BATCH, shard_rows))
            run = _Run(listed, scorer, parts, batch_size, shard_rows, rank, world, group_by)
            # What was interrupted may have been so by a file that kills who decodes it.
            few = not parts.resumed and len(listed.first(_FEW + 1)) <= _FEW
            started = time.monotonic()
            run.go(machine.scored(scorer, run.tasks(), few), progress)
            seconds = time.monotonic() - started
            table, sets = _finish(parts, scorer, influence)
        finally:
            parts.close()
    return ScoreTable(table, scorer.labels, out, run.computed, seconds, batch_size, sets)


def _finish(
    parts: Parts, scorer: Scorer, influence: bool
) -> tuple[pa.Table | None, list[SetValue]]:
    """`Parts.finish`, with the sets' values in the order of their rewards."""

    def valued() -> tuple[list[SetValue], dict[str, np.ndarray]]:
        values, columns = [], {}
        for column, labels in scorer.columns.items():
            if labels[0] in scorer.sets:
                rewards = {label: scorer.sets[label] for label in labels}
                found, more = value_sets(rewards, parts.gather(column), influence)
                values += found
                columns |= more
        places = list(scorer.sets)
        return sorted(values, key=lambda value: places.index(value.reward)), columns

    return parts.finish(scorer.labels, valued if scorer.sets else None)


def _check_sets(scorer: Scorer, group_by: str | None, influence: bool) -> None:
    for name, given in [("group_by", group_by), ("influence", influence)]:
        if given and not scorer.sets:
            raise ValueError(
                f"{name} is for rewards of sets, and {', '.join(scorer.labels)} score samples"
            )


def _check_groups(items: Sequence[Item], group_by: str | None) -> None:
    if group_by and all(_group(item, group_by) is None for item in items):
        columns = dict.fromkeys(name for item in items for name in item.extra)
        raise ValueError(
            f"the inputs cannot be grouped by {group_by!r}: they have "
            f"{'the columns ' + ', '.join(columns) if columns else 'no columns'}; 'folder' is the "
            "one that each file is in"
        )


def _group(item: Item, group_by: str | None) -> str | None:
    """Which set an item is in."""
    if group_by is None:
        return None
    value = item.extra.get(group_by)
    if value is None and group_by == "folder" and item.file is not None:
        value = os.path.dirname(item.id if item.span else item.file) or "."
    return None if value is None else _text(value)


def _text(value: Any) -> str:
    """A group's name; the same for 1, a tensor of it and numpy's."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return clean(value if isinstance(value, str) else json.dumps(value, default=str))


@dataclass
class _Run:
    listed: Inputs
    scorer: Scorer
    parts: Parts
    batch_size: int
    shard_rows: int
    rank: int
    world: int
    group_by: str | None = None
    computed: int = 0

    def go(self, scored: Iterator[tuple[Task, list[Row]]], progress: bool) -> None:
        """Keep what is scored; batches come in any order."""
        chunks: dict[int, dict[int, tuple[list[bytes], list[Row]]]] = {}
        bar = tqdm(desc="score", unit="row", delay=2, disable=not progress)
        with bar, closing(scored):
            for task, rows in scored:
                if not self.computed:
                    self._warn_if_hopeless(rows)
                chunk = chunks.setdefault(task.chunk, {})
                chunk[task.place] = task.keys, rows
                self.computed += len(rows)
                bar.update(len(rows))
                if len(chunk) == task.siblings:
                    done = [chunk[place] for place in range(task.siblings)]
                    self.parts.add(
                        [key for keys, _ in done for key in keys],
                        [row for _, rows in done for row in rows],
                    )
                    del chunks[task.chunk]

    def tasks(self) -> Iterator[Task]:
        """Everything is listed; what is there, or not this process's, makes no task."""
        done, seen = self.parts.start(), set()
        items, number = iter(self.listed), 0
        while chunk := list(islice(items, self.shard_rows)):
            keys = [item.key(self.scorer.context) for item in chunk]
            self.parts.list(chunk, keys, [_group(item, self.group_by) for item in chunk])
            first = {}  # the same input twice is computed once
            for key, item in zip(keys, chunk, strict=True):
                if key not in seen:
                    seen.add(key)
                    first[key] = item
            if number % self.world == self.rank:
                missing = {key: item for key, item in first.items() if key not in done}
                yield from self._split(missing, number)
            number += 1

    def _split(self, chunk: dict[bytes, Item], number: int) -> list[Task]:
        tasks = []
        for prompted in (True, False):
            some = [(k, item) for k, item in chunk.items() if (item.prompt is not None) == prompted]
            for start in range(0, len(some), self.batch_size):
                batch = some[start : start + self.batch_size]
                keys, items = [key for key, _ in batch], [item for _, item in batch]
                tasks.append(Task(items, keys, number, len(tasks)))
        return [replace(task, siblings=len(tasks)) for task in tasks]

    def _warn_if_hopeless(self, rows: list[Row]) -> None:
        """One warning now, instead of the same error in a million rows in the end."""
        for column, labels in self.scorer.columns.items():
            label = ", ".join(labels)
            about = f"{label}: "
            errors = [row.get("error") or "" for row in rows]
            if all(column not in row for row in rows) and all(about in e for e in errors):
                warnings.warn(
                    f"reward {label!r} failed on all {len(rows)} rows of the first batch: "
                    f"{errors[0]}",
                    stacklevel=2,
                )


class _Local:
    """This process scores, and workers decode ahead of it.

    A file can kill who decodes it (a decoder's segmentation fault, too little memory). The
    batches that the dead worker may have had are then decoded in processes of their own, the
    files at fault become errors of their rows, and the rest goes on.
    """

    device = None  # the rewards' own choice

    def __init__(self, num_workers: int | None) -> None:
        self.num_workers = num_workers

    def __enter__(self) -> _Local:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def find_batch_size(self, scorer: Scorer, items: Sequence[Item]) -> int:
        if scorer.device.type == "cuda" and self.num_workers != 0:
            deadly = _deadly(scorer.decoder(), items)
            items = [item for n, item in enumerate(items) if n not in deadly]
        return scorer.find_batch_size(items)

    def scored(
        self, scorer: Scorer, tasks: Iterator[Task], few: bool
    ) -> Iterator[tuple[Task, list[Row]]]:
        """Batches with their rows, in order."""
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = 0 if few else _workers(scorer.device)
        decoder, again, given = scorer.decoder(), deque(), deque()

        def batches() -> Iterator[list[Item]]:
            while task := again.popleft() if again else next(tasks, None):
                given.append(task)
                yield task.items

        with _deaf_to_deaths():  # to the end: the dead are waited for, too
            while True:
                loader = iter(DataLoader(
                    decoder, sampler=batches(), batch_size=None, collate_fn=_same,
                    num_workers=num_workers, worker_init_fn=_quiet_worker,
                    pin_memory=scorer.device.type == "cuda",
                ))  # fmt: skip
                while (decoded := _next(loader)) is not None and not isinstance(decoded, _Death):
                    task = given.popleft()
                    yield task, scorer(task.items, decoded)
                if decoded is None:
                    return
                del loader  # ends the other workers
                again.extendleft(reversed(_without_deadly(decoder, given, decoded)))
                given.clear()


class _Death(RuntimeError):
    """A process that decodes died."""


def _next(loader: Iterator) -> Any:
    """The next batch; None at the end; the death of a worker, with whom batches went."""
    try:
        return next(loader, None)
    except RuntimeError as err:
        if "DataLoader worker" not in str(err):
            raise
        return _Death(str(err))
    except (EOFError, ConnectionError) as err:  # it died while its tensors were taken over
        return _Death(f"{type(err).__name__}: a worker of the DataLoader is gone")


def _without_deadly(decoder: Decoder, tasks: Sequence[Task], death: Exception) -> list[Task]:
    """The same tasks, but items that kill who decodes them have an error instead.

    Raises:
        RuntimeError: there are none.
    """
    safe = []
    for task in tasks:
        deadly = _deadly(decoder, task.items)
        items = [
            replace(item, error=_DEADLY) if n in deadly else item
            for n, item in enumerate(task.items)
        ]
        safe.append(replace(task, items=items))
    if all(before.items == after.items for before, after in zip(tasks, safe, strict=True)):
        raise RuntimeError(
            "a process that decodes died, though each batch can be decoded; if memory was short, "
            "lower num_workers or batch_size. The same call again goes on where this one stopped"
        ) from death
    return safe


def _deadly(decoder: Decoder, items: Sequence[Item]) -> set[int]:
    """Numbers of the items that kill who decodes them, found by halving."""
    process = multiprocessing.get_context().Process(target=_decode_alone, args=(decoder, items))
    process.start()
    process.join()
    if process.exitcode == 0:
        return set()
    if len(items) == 1:
        return {0}
    half = len(items) // 2
    late = _deadly(decoder, items[half:])
    return _deadly(decoder, items[:half]) | {half + n for n in late}


def _decode_alone(decoder: Decoder, items: Sequence[Item]) -> None:
    """Decode as a worker does, for nobody."""
    torch.set_num_threads(1)  # after a fork, more may wait for each other for ever
    _quiet_worker(0)
    decoder[items]


@contextmanager
def _deaf_to_deaths() -> Iterator[None]:
    """Let a worker's death be noticed where its batch is awaited.

    torch raises it from a signal handler, that is anywhere: in the midst of a reward, too, of
    which it would become an error.
    """
    if (
        not hasattr(signal, "SIGCHLD")
        or threading.current_thread() is not threading.main_thread()
    ):  # fmt: skip
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _score_samples(
    samples: Samples,
    scorer: Scorer,
    out: Path | None,
    prompts: str | Sequence[str] | None,
    batch_size: int | None,
    group_by: str | None,
    influence: bool,
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
    groups = [None] * len(samples)
    if group_by is not None:
        if group_by not in samples.context:
            raise ValueError(
                f"the samples cannot be grouped by {group_by!r}: their context has "
                f"{', '.join(samples.context) or 'nothing'}"
            )
        groups = [_text(value) for value in samples.context[group_by]]
    asked = samples.prompts or [None] * len(samples)
    items = [Item(str(n), prompt=prompt) for n, prompt in enumerate(asked)]
    keys = _sample_keys(samples)
    inputs = f"{len(samples)} samples in memory, {blake2b(b''.join(keys)).hexdigest()[:32]}"
    parts = Parts(out, _request(scorer, [inputs], None, None, None))
    batch_size = min(batch_size or CPU_BATCH, LARGEST_BATCH)
    try:
        started = time.monotonic()
        parts.list(items, keys, groups)
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        missing = sorted(first[key] for key in first.keys() - parts.start())
        for start in range(0, len(missing), batch_size):
            numbers = missing[start : start + batch_size]
            rows = scorer.score_samples(samples.take(numbers))
            parts.add([keys[n] for n in numbers], rows)
        seconds = time.monotonic() - started
        table, sets = _finish(parts, scorer, influence)
    finally:
        parts.close()
    return ScoreTable(table, scorer.labels, out, len(missing), seconds, batch_size, sets)


def _sample_keys(samples: Samples) -> list[bytes]:
    """A key for each sample, of its data, prompt and context: `Item.key` of what is in memory."""
    held = samples.detach().to("cpu")
    names = sorted(held.context)
    keys = []
    for n in range(len(held)):
        context = [(name, _as_bytes(held.context[name][n])) for name in names]
        prompt = None if held.prompts is None else held.prompts[n]
        extra = {"context": [held.modality, context]}
        keys.append(
            Item("", data=_as_bytes(held.data[n]), prompt=prompt, extra=extra).key(["context"])
        )
    return keys


def _as_bytes(value: Any) -> bytes:
    """The same value, the same bytes, in every process."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        numbers = value.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} ".encode() + numbers
    try:
        return pickle.dumps(value)
    except Exception:  # never found again: better computed twice than mixed up
        return os.urandom(16)


def _request(
    scorer: Scorer,
    paths: Sequence[str],
    prompts: str | Sequence[str] | None,
    data_column: str | None,
    prompt_column: str | None,
) -> dict[str, Any]:
    """Everything the rows depend on, apart from the inputs' contents (and hubs' newer versions)."""

    def describe(value: Any) -> str:
        info = getattr(value, "info", None)
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{getattr(value, '__module__', '')}.{name}" + ("" if info is None else f" {info}")

    rewards = scorer.rewards.values()
    towers = [getattr(getattr(reward, "tower", None), "key", None) for reward in rewards]
    encoders = [getattr(getattr(reward, "encoder", None), "key", None) for reward in rewards]
    marks = {mark for reward in rewards for mark in weights_fingerprint(reward).values()}
    marks |= {m for text in _texts([scorer.specs, towers]) for m in fingerprints(text).values()}
    marks |= {_contents(text) for text in _texts(scorer.specs) if os.path.isdir(text)}
    marks |= {key for key in encoders if isinstance(key, str)}
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
        "weights": sorted(marks),
    }
    return json.loads(json.dumps(request, default=describe))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a spec that could be a path."""
    if isinstance(value, str | os.PathLike):
        yield from os.fspath(value).split(" + ")  # as `RewardInfo.weights` joins them
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _contents(folder: str) -> str:
    """A hash of the names and sizes of all files below a folder, of exemplars say."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    found = [(os.fspath(path.relative_to(folder)), path.stat().st_size) for path in files]
    return blake2b(repr(found).encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _place() -> tuple[int, int]:
    """Number of this process, and how many share the work: what launchers set.

    Raises:
        ValueError: half of it is set, or what is no such numbers.
    """
    given = {name: os.environ.get(name, "not set") for name in ("RANK", "WORLD_SIZE")}
    try:
        world = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ.get("RANK", 0 if world == 1 else -1))
    except ValueError:
        rank, world = -1, 1
    if not 0 <= rank < world:
        came = " and ".join(f"{name} is {value}" for name, value in given.items())
        raise ValueError(
            f"{came}: launchers set both, with 0 <= RANK < WORLD_SIZE. Start with torchrun, or "
            "unset both"
        )
    return rank, world


def _workers(device: torch.device) -> int:
    """On a GPU, as many as keep it busy; on a CPU, the model needs the cores itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    return max(1, min(8, cores - 1) if device.type == "cuda" else min(2, cores // 2))


def _same(decoded):
    return decoded


def _quiet_worker(number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if sys.platform == "linux":  # or the workers of a killed run may wait for it for ever
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG

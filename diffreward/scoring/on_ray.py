"""The same scoring on a Ray cluster: tasks decode, an actor for each GPU scores.

Batches are those of the local engine and go through Ray Data as they are: on GPUs, any CPU of the
cluster decodes ahead of the actors; without GPUs, each actor decodes its own. The process that
calls `score` lists the inputs (all of them before the first is scored), gathers the rows, in
whatever order they come, and writes the shards; so an interrupted run goes on with either engine.

A file that kills who decodes it is tried a few times, and then stops the run.
"""

from __future__ import annotations

import inspect
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from diffreward.scoring.decode import Decoder
from diffreward.scoring.planner import CPU_BATCH, Row, Scorer, Task
from diffreward.scoring.readers import Item

_RETRIES = 2  # after the death of an actor or a task, be it the machine's fault or a file's

_WHOLE = {"batch_size": 1, "batch_format": "pyarrow"}


class Cluster:
    """A Ray cluster: the one this process is connected to, or the one that ``RAY_ADDRESS`` names,
    or one on this machine, which ends with the scoring.

    Args:
        num_actors: None: one for each GPU, or CPU core if there is no GPU.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, num_actors: int | None) -> None:
        try:
            import ray.data
        except ImportError as err:
            raise ImportError(
                f'engine="ray" needs Ray Data ({err}): pip install "diffreward[ray]"'
            ) from err
        self.ray, self.num_actors = ray, num_actors

    def __enter__(self) -> Cluster:
        self._mine = not self.ray.is_initialized()
        if self._mine:
            self.ray.init()
        return self

    def __exit__(self, *_: object) -> None:
        if self._mine:
            self.ray.shutdown()

    @property
    def device(self) -> str:
        """What its actors score on."""
        return "cuda" if self.ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"

    def find_batch_size(self, scorer: Scorer, items: Sequence[Item]) -> int:
        """`Scorer.find_batch_size`, on a machine that scores."""
        find = self.ray.remote(**_needs(scorer), max_retries=0)(Scorer.find_batch_size)
        try:
            return self.ray.get(find.remote(scorer, [_sent(item) for item in items]))
        except self._deaths as err:
            warnings.warn(
                f"whoever tried batch sizes died ({_first_line(err)}); {CPU_BATCH} is taken",
                stacklevel=2,
            )
            return CPU_BATCH

    def scored(
        self, scorer: Scorer, tasks: Iterator[Task], few: bool
    ) -> Iterator[tuple[Task, list[Row]]]:
        """Batches with their rows, in any order."""
        kept, tables = [], []
        for n, task in enumerate(tasks):
            tables.append(_table(n, ([_sent(item) for item in task.items], None)))
            kept.append(replace(task, items=[]))
        if not kept:
            return
        data = self.ray.data.from_arrow(tables)
        data.context.enable_progress_bars = False
        if scorer.device.type == "cuda":
            data = data.map_batches(
                _decode, fn_args=(scorer.decoder(),), num_cpus=1, **_WHOLE,
                **self._limits("max_retries"),
            )  # fmt: skip
        resource = "GPU" if scorer.device.type == "cuda" else "CPU"
        units = int(self.ray.cluster_resources().get(resource, 1))
        size = min(self.num_actors or max(1, units), len(kept))
        data = data.map_batches(
            _Actor, fn_constructor_args=(scorer,), **_needs(scorer), **_WHOLE,
            compute=self.ray.data.ActorPoolStrategy(size=size),
            **self._limits("max_restarts", "max_task_retries"),
        )  # fmt: skip
        try:
            for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                for n, rows in _unpack(table):
                    yield kept[n], rows
        except self._deaths as err:
            raise RuntimeError(
                f"a process that decodes or scores died again and again ({_first_line(err)}). If a "
                "file is at fault, the same call with engine='local' finds it, and goes on where "
                "this one stopped"
            ) from err

    def _limits(self, *names: str) -> dict[str, int]:
        """Ray Data tries again for ever otherwise; Ray 2.64 is to allow nothing else."""
        options = inspect.signature(self.ray.data.Dataset.map_batches).parameters.values()
        any_name = any(option.kind is option.VAR_KEYWORD for option in options)
        known = names if any_name else {option.name for option in options} & {*names}
        return dict.fromkeys(known, _RETRIES)

    @property
    def _deaths(self) -> tuple[type[Exception], ...]:
        """What Ray raises when a process is gone."""
        errors = self.ray.exceptions
        return errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError


class _Actor:
    """Holds the rewards."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def __call__(self, table: pa.Table) -> pa.Table:
        scored = [_table(n, self.scorer(*batch)) for n, batch in _unpack(table)]
        return pa.concat_tables(scored)


def _decode(table: pa.Table, decoder: Decoder) -> pa.Table:
    """Items, with what `Decoder` made of them; their bytes are not needed any more."""
    decoded = []
    for n, (items, _) in _unpack(table):
        light = [replace(item, data=None) for item in items]
        decoded.append(_table(n, (light, decoder[items])))
    return pa.concat_tables(decoded)


def _needs(scorer: Scorer) -> dict[str, int]:
    """What one that scores takes up."""
    return {"num_gpus": 1} if scorer.device.type == "cuda" else {"num_cpus": 1}


def _first_line(err: Exception) -> str:
    return str(err).strip().partition("\n")[0]


def _sent(item: Item) -> Item:
    """The same item for a process in another folder."""
    return item if item.file is None else replace(item, file=os.path.abspath(item.file))


def _table(number: int, value: object) -> pa.Table:
    """Something that belongs to a task, as a row of Ray Data."""
    value = pa.array([pickle.dumps(value)], pa.large_binary())
    return pa.table({"number": pa.array([number]), "value": value})


def _unpack(table: pa.Table) -> Iterator[tuple[int, object]]:
    for number, value in zip(table["number"], table["value"], strict=True):
        yield number.as_py(), pickle.loads(value.as_buffer())

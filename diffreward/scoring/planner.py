"""Batches through rewards: what can be shared is computed once, and one bad sample costs one row.

A reward that names its ``preprocess`` and has ``score_prepared`` gets pixels which the workers
have resized, so that images of all sizes share a batch; the others get the images themselves, in
groups of equal size. The members of a combination are scored as if they stood alone, and then
combined. All rewards of a batch see the same tensors inside
:func:`~diffreward.rewards.towers.share_towers`: a tower they share runs once.
Rewards of sets are asked for features, once where several look through one encoder.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffreward.rewards import Reward, RewardSpec, SetReward, evaluate, make_reward, set_features
from diffreward.rewards.base import REGISTRY, Scores, as_reward, find_reward
from diffreward.rewards.distribution import FeatureReward
from diffreward.rewards.towers import share_towers
from diffreward.samples import ALPHABETS, Samples
from diffreward.scoring.decode import Decoded, Decoder, to_float
from diffreward.scoring.readers import Item
from diffreward.scoring.sets import FEATURES

CPU_BATCH = 32  # more does not make a CPU faster
LARGEST_BATCH = 256

# Not one sample's fault: going on would only write the same error into every row.
_FATAL = (ImportError, getattr(torch, "AcceleratorError", ImportError))

Row = dict[str, Any]
"""Column -> number or text. Columns of reward i: ``"i"``, ``"i_std"``, ``"i.part"``; besides them
``"error"`` and ``"notes"``, and arrays of features as ``"features.LABEL"``. What a row has no value
for is left out."""

Found = dict[str, float] | np.ndarray | str
"""What a reward says of a sample (``""``: the value, ``"_std"``, ``".part"``), its features for one
of sets, or its error."""


@dataclass
class Task:
    """A batch: number ``place`` of the ``siblings`` of its chunk, which are written together."""

    items: list[Item]
    keys: list[bytes]
    chunk: int
    place: int
    siblings: int = 0


def label_rewards(rewards: RewardSpec | Sequence[RewardSpec] | Mapping) -> dict[str, RewardSpec]:
    """Column name -> spec: a mapping as it is, others by name, numbered where names repeat.

    Raises:
        ValueError: there are none, or a name that is not in the registry.
    """
    if isinstance(rewards, Mapping) and not _is_spec(rewards):
        return dict(rewards)
    specs = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    if not specs:
        raise ValueError("give at least one reward")
    labelled: dict[str, RewardSpec] = {}
    for spec in specs:
        name = _name(spec)
        names = [name, *(f"{name} {n}" for n in range(2, len(specs) + 1))]
        labelled[next(n for n in names if n not in labelled)] = spec
    return labelled


def _is_spec(mapping: Mapping) -> bool:
    """Whether it is one reward's spec, and not column names with a spec each."""
    if "name" in mapping or len(mapping) != 1:
        return "name" in mapping
    try:
        return bool(find_reward(*mapping))
    except ValueError:
        return False


def _name(spec: RewardSpec) -> str:
    if isinstance(spec, Mapping):
        spec = spec.get("name") or next(iter(spec), "")
    return find_reward(spec).info.name if isinstance(spec, str) else as_reward(spec).info.name


def with_reference(specs: Mapping[str, RewardSpec], reference: Any) -> dict[str, RewardSpec]:
    """The same specs; what compares with exemplars, and names none itself, gets these.

    Args:
        specs: column name -> spec.
        reference: what `diffreward.rewards.exemplars.load_exemplars` takes; None: there is none.

    Raises:
        ValueError: a reward needs exemplars and there are none, or nobody needs them.
    """
    if isinstance(reference, str | os.PathLike) and os.path.exists(reference):
        reference = os.path.abspath(reference)  # for processes in other folders
    found, used = {}, False
    for label, spec in specs.items():
        found[label] = spec
        if not isinstance(spec, str | Mapping):
            continue
        full = REGISTRY.in_full(spec)
        option = inspect.signature(find_reward(full["name"]).factory).parameters.get("exemplars")
        if option is None or full.get("exemplars") is not None:
            continue
        if reference is not None:
            found[label], used = {**full, "exemplars": reference}, True
        elif option.default is option.empty:
            raise ValueError(
                f"reward {label!r} compares with exemplars, and there are none: give a reference "
                "(a folder, a manifest, texts, or saved statistics), or its option 'exemplars'"
            )
    if reference is not None and not used:
        raise ValueError(
            "a reference is for rewards that compare with exemplars and name none themselves, and "
            f"{', '.join(specs)} came"
        )
    return found


class Scorer:
    """Rewards, ready to score batches; a copy of it in another process builds its own.

    Args:
        rewards: column name -> reward or spec; specs are built when first needed, so that what
            is sent to another process is small.
        device: where to score; None: CUDA if there is one.
        reference: exemplars for the rewards that name none themselves, see `with_reference`.

    Raises:
        ValueError: no rewards, an unknown name or option, rewards of different modalities, or a
            combination with a reward of sets.
    """

    def __init__(
        self,
        rewards: RewardSpec | Sequence[RewardSpec] | Mapping[str, RewardSpec],
        device: torch.device | str | None = None,
        reference: Any = None,
    ) -> None:
        self.specs = with_reference(label_rewards(rewards), reference)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._built: dict[str, Reward] = {}
        self._overflows = 0  # how often a batch was too large for the memory

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_built": {}}

    @property
    def rewards(self) -> dict[str, Reward | SetReward]:
        """The rewards themselves."""
        if not self._built:
            built = {label: make_reward(spec) for label, spec in self.specs.items()}
            declared = {
                reward.info.modality: label for label, reward in built.items()
                if reward.info.modality
            }  # fmt: skip
            if len(declared) > 1:
                what = ", ".join(f"{label} scores {kind}" for kind, label in declared.items())
                raise ValueError(f"these rewards cannot score the same samples: {what}")
            for label, reward in built.items():
                for leaf in _leaves(reward):
                    if leaf is not reward and isinstance(leaf, SetReward):
                        raise ValueError(
                            f"{label!r} combines numbers of samples, and {leaf.info.name!r} is of "
                            "whole sets: score it by itself"
                        )
            self._built = built
        return self._built

    @property
    def sets(self) -> dict[str, SetReward]:
        """Those of sets."""
        return {k: reward for k, reward in self.rewards.items() if isinstance(reward, SetReward)}

    @property
    def labels(self) -> list[str]:
        """The columns of the others."""
        return [label for label in self.rewards if label not in self.sets]

    @property
    def columns(self) -> dict[str, list[str]]:
        """What a `Row` has -> the rewards it has it from: several, if they share their features."""
        columns = {str(place): [label] for place, label in enumerate(self.labels)}
        names: dict[int, str] = {}
        for label, reward in self.sets.items():
            plain = getattr(type(reward), "features", None) is FeatureReward.features
            source = reward.encoder if plain else reward
            name = names.setdefault(id(source), FEATURES + label)
            columns.setdefault(name, []).append(label)
        return columns

    @property
    def modality(self) -> str:
        """What the rewards score; images, if none of them says."""
        declared = [r.info.modality for r in self.rewards.values() if r.info.modality]
        return declared[0] if declared else "image"

    @property
    def kind(self) -> str:
        """The same in the words of `diffreward.scoring.readers`.

        Raises:
            ValueError: rewards of something that no reader reads.
        """
        if self.modality in ("image", "text"):
            return self.modality
        if self.modality in ALPHABETS:
            return "sequence"
        raise ValueError(
            f"there is no reader of {self.modality} files; pass Samples(..., {self.modality!r})"
        )

    @property
    def context(self) -> tuple[str, ...]:
        """Columns beside the prompt that some reward needs."""
        needed = (name for r in self.rewards.values() for name in r.info.needs_context)
        return tuple(dict.fromkeys(needed))

    @property
    def needs_prompt(self) -> list[str]:
        """Which rewards compare with the prompt."""
        return [label for label, reward in self.rewards.items() if reward.info.needs_prompt]

    def decoder(self) -> Decoder:
        """What decodes for these rewards."""
        leaves = [leaf for reward in self.rewards.values() for leaf in _leaves(reward)]
        keys = dict.fromkeys(leaf.preprocess for leaf in leaves if _prepares(leaf))
        raw = not all(map(_prepares, leaves))
        return Decoder(self.modality, tuple(keys), raw)

    def __call__(self, items: Sequence[Item], decoded: Decoded | None = None) -> list[Row]:
        """Score a batch of items of which all have a prompt, or none.

        Args:
            items: one per row.
            decoded: what `decoder` made of them; None: it is asked here.
        """
        decoded = self.decoder()[items] if decoded is None else decoded
        rows: list[Row] = [{} for _ in items]
        for n, error in decoded.errors.items():
            rows[n]["error"] = error
        for n, notes in decoded.notes.items():
            rows[n]["notes"] = notes
        if not decoded.rows:
            return rows
        prepared = {
            key: torch.as_tensor(images).to(self.device, non_blocking=True)
            for key, images in decoded.prepared.items()
        }
        raw = [(numbers, self._tensor(group)) for numbers, group in decoded.raw]
        batch = _Batch(items, decoded.rows, prepared, raw)
        with torch.no_grad(), share_towers():
            for column, labels in self.columns.items():
                for n, found in self._score(self.rewards[labels[0]], batch).items():
                    _enter(rows[n], column, ", ".join(labels), found)
        return rows

    def score_samples(self, samples: Samples) -> list[Row]:
        """Score samples that are in memory already, as one batch."""
        rows: list[Row] = [{} for _ in range(len(samples))]
        samples = samples.detach().to(self.device)
        with torch.no_grad(), share_towers():
            for column, labels in self.columns.items():
                found = self._attempt(self.rewards[labels[0]], samples)
                for row, scores in zip(rows, found, strict=True):
                    _enter(row, column, ", ".join(labels), scores)
        return rows

    def find_batch_size(self, items: Sequence[Item]) -> int:
        """The largest batch that fits into memory, by doubling; on a CPU a fixed number.

        Args:
            items: the first few; copies of them are scored.
        """
        items = [item for item in items if item.error is None]
        items = [item for item in items if (item.prompt is None) == (items[0].prompt is None)]
        if self.device.type != "cuda" or not items:
            return CPU_BATCH
        decoder, fits = self.decoder(), 1
        for size in (2**n for n in range(3, 1 + int(math.log2(LARGEST_BATCH)))):
            before = self._overflows
            batch = [items[n % len(items)] for n in range(size)]
            self(batch, decoder[batch])
            if self._overflows > before:
                break
            fits = size
        return fits

    # -- one reward, one batch -----------------------------------------------------------------

    def _score(self, reward: Reward, batch: _Batch) -> dict[int, Found]:
        """What a reward says of each row."""
        if _combines(reward):
            return self._combine(reward, batch)
        if _prepares(reward):
            groups = [(batch.rows, batch.prepared[reward.preprocess])]
            reward = _prepared(reward)
        else:
            groups = batch.raw
        return {
            n: found
            for numbers, data in groups
            for n, found in self._score_group(reward, data, numbers, batch.items).items()
        }

    def _combine(self, reward: Reward, batch: _Batch) -> dict[int, Found]:
        """The same of a combination, from what its members say."""
        members = {name: self._score(member, batch) for name, member in reward.members.items()}
        found, whole = {}, []
        for n in batch.rows:
            errors = [said[n] for said in members.values() if isinstance(said[n], str)]
            if errors:
                found[n] = "; ".join(dict.fromkeys(errors))
            else:
                whole.append(n)
        if not whole:
            return found
        scores = {
            name: _as_scores([said[n] for n in whole], self.device)
            for name, said in members.items()
        }

        def combine(samples: Samples) -> Scores:
            at = samples.data
            return reward.combine({name: said.take(at) for name, said in scores.items()}, samples)

        call = as_reward(combine, replace(reward.info, modality=None))
        places = torch.arange(len(whole), device=self.device)
        return found | self._score_group(call, places, whole, batch.items, "scores")

    def _score_group(
        self,
        reward: Reward,
        data: Any,
        numbers: Sequence[int],
        items: Sequence[Item],
        modality: str | None = None,
    ) -> dict[int, Found]:
        """Score those of a group that have what the reward needs, and say what others lack."""
        info, keep, found = reward.info, [], {}
        for at, n in enumerate(numbers):
            item = items[n]
            missing = [name for name in info.needs_context if item.extra.get(name) is None]
            if info.needs_prompt and item.prompt is None:
                found[n] = "it needs a prompt, and there is none"
            elif missing:
                found[n] = f"it needs {', '.join(missing)}, and there is none"
            else:
                keep.append(at)
        if not keep:
            return found
        if len(keep) < len(numbers):
            data = data[keep] if isinstance(data, Tensor) else [data[at] for at in keep]
            numbers = [numbers[at] for at in keep]
        chosen = [items[n] for n in numbers]
        prompts = None if chosen[0].prompt is None else [item.prompt for item in chosen]
        context = {name: [item.extra[name] for item in chosen] for name in info.needs_context}
        samples = Samples(data, modality or self.modality, prompts, context)
        return found | dict(zip(numbers, self._attempt(reward, samples), strict=True))

    def _attempt(self, call: Reward, samples: Samples) -> list[Found]:
        """What a reward says of each sample.

        What fails as a batch is tried in halves, so that the samples at fault are found in a few
        calls and everybody else has a score.
        """
        try:
            if isinstance(call, SetReward):
                return _as_rows(set_features(call, samples))
            scores = evaluate(call, samples)
            columns = {"": scores.value}
            if scores.std is not None:
                columns["_std"] = scores.std
            columns.update({f".{name}": part for name, part in scores.parts.items()})
            lists = [column.tolist() for column in columns.values()]
            return [
                dict(zip(columns, numbers, strict=True)) for numbers in zip(*lists, strict=True)
            ]
        except _FATAL:
            raise
        except Exception as err:
            overflow = isinstance(err, torch.OutOfMemoryError)
            if len(samples) == 1:
                return [" ".join(str(err).split()) or type(err).__name__]
        if overflow:  # outside of the except block, whose traceback holds on to tensors
            self._overflows += 1
            torch.cuda.empty_cache()
        middle = len(samples) // 2
        halves = samples.take(range(middle)), samples.take(range(middle, len(samples)))
        return [found for half in halves for found in self._attempt(call, half)]

    def _tensor(self, group: Any) -> Any:
        if isinstance(group, list):
            return group
        if self.modality == "image":
            return to_float(group, self.device)
        return torch.from_numpy(group).to(self.device)


@dataclass
class _Batch:
    """Items and what was decoded of them, on the device; see `Decoded`."""

    items: Sequence[Item]
    rows: list[int]
    prepared: dict[Any, Tensor]
    raw: list[tuple[list[int], Any]]


def _combines(reward: Reward) -> bool:
    return hasattr(reward, "members") and hasattr(reward, "combine")


def _leaves(reward: Reward) -> Iterator[Reward]:
    """The rewards that look at the samples themselves."""
    if not _combines(reward):
        yield reward
        return
    for member in reward.members.values():
        yield from _leaves(member)


def _as_scores(found: list[dict[str, float]], device: torch.device) -> Scores:
    """Float32 numbers, as they were before they became Python's."""
    columns = {
        name: torch.tensor([numbers[name] for numbers in found], dtype=torch.float32, device=device)
        for name in found[0]
    }
    value, std = columns.pop(""), columns.pop("_std", None)
    return Scores(value, std, {name[1:]: column for name, column in columns.items()})


def _as_rows(features: Tensor) -> list[np.ndarray]:
    """An array for each sample, of numbers that numpy has."""
    half = features.dtype in (torch.float16, torch.bfloat16)
    return list((features.float() if half else features).cpu().numpy())


def _prepares(reward: Reward) -> bool:
    return hasattr(reward, "preprocess") and hasattr(reward, "score_prepared")


def _prepared(reward: Reward) -> Reward:
    """The same reward, of samples whose data went through its ``preprocess`` already."""
    return as_reward(lambda s: reward.score_prepared(s.data, s.prompts), reward.info)


def _enter(row: Row, column: str, label: str, scores: Found) -> None:
    """Put one reward's numbers, features or error into a row."""
    if isinstance(scores, str):
        _fail(row, label, scores)
        return
    if isinstance(scores, np.ndarray):
        row[column] = scores
        return
    for name, number in scores.items():
        if not math.isnan(number):  # a part that does not apply
            row[f"{column}{name}"] = number


def _fail(row: Row, label: str, why: str) -> None:
    row["error"] = "; ".join(filter(None, [row.get("error"), f"{label}: {why}"]))

"""Data sets of preferences: which of two samples is better, or which are good.

A file (.jsonl or .parquet) with one row a judgement, and the columns

    prompt, chosen, rejected     two samples of one prompt, for DPO
    prompt, sample, label        one sample, desirable or not, for KTO

A sample is a path of an image, relative to the file's folder, or an image as bytes (as data sets
embed them: ``{"bytes": ..., "path": ...}``); or a sequence of letters. A label is true or false,
1 or 0, 1 or -1. Other columns are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from diffreward.manifests import open_image, read_rows
from diffreward.samples import ALPHABETS, Samples, to_tokens

PAIR = ("prompt", "chosen", "rejected")
LABELLED = ("prompt", "sample", "label")


@dataclass(frozen=True)
class Preferences:
    """Judged samples, checked but not opened.

    Attributes:
        path: the file.
        modality: of the samples, as in `diffreward.samples`.
        paired: each group is a pair, the chosen sample before the rejected one.
        prompts: b.
        data: b images as paths or bytes, or b sequences of letters.
        label: 1 for chosen or desirable samples, -1 for the others.
        groups: numbers from 0; samples of one pair have the same.
        rows: where in the file each sample is from, counted from 1.
    """

    path: Path
    modality: str
    paired: bool
    prompts: list[str]
    data: list[str | bytes]
    label: Float64[Tensor, " b"]
    groups: Int[Tensor, " b"]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def num_groups(self) -> int:
        """Pairs, or samples where there are none."""
        return len(self) // 2 if self.paired else len(self)

    def prompts_and_size(self) -> tuple[list[str], int]:
        """The prompt of each group, and how many samples a group has."""
        size = 2 if self.paired else 1
        return self.prompts[::size], size

    def members(self, groups: Sequence[int]) -> list[int]:
        """Where the samples of these groups are, whole groups in the order given."""
        if not self.paired:
            return list(groups)
        return [2 * group + side for group in groups for side in (0, 1)]

    def load(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> Samples:
        """Open samples.

        Args:
            indices: which.
            size: height and width to which images are scaled, and cut around their middle if they
                have another shape; None: as they are.

        Raises:
            ValueError: an image cannot be opened, or sizes or lengths differ; the message names
                the row.
        """
        if self.modality == "image":
            found = [open_image(self.data[i], self._name(i), size) for i in indices]
        else:
            found = [to_tokens(self.data[i], self.modality) for i in indices]
        for i, each in zip(indices, found, strict=True):
            if each.shape != found[0].shape:
                advice = "give a size" if self.modality == "image" else "give them one length"
                raise ValueError(
                    f"{self._name(i)} has the shape {tuple(each.shape)}, but "
                    f"{self._name(indices[0])} {tuple(found[0].shape)}; {advice}"
                )
        return Samples(torch.stack(found), self.modality, [self.prompts[i] for i in indices])

    def _name(self, i: int) -> str:
        data = self.data[i]
        return f"{self.path}, row {self.rows[i]}" + (
            f" ({data})" if self.modality == "image" and isinstance(data, str) else ""
        )


def read_preferences(path: str | Path, modality: str = "image") -> Preferences:
    """Read and check a data set of preferences; images are looked for, but not opened.

    Args:
        path: a .jsonl or .parquet file; see the module's text.
        modality: what its samples are: "image", or one of `ALPHABETS`.

    Raises:
        FileNotFoundError: the file is not there, or an image that it names: the message has its
            row.
        ValueError: an unknown ending or modality, no rows, a missing column, an empty cell, a
            label that is none, a sequence with other letters, a pair of one sample with itself, or
            labels that are all the same.
    """
    path = Path(path)
    if modality != "image" and modality not in ALPHABETS:
        raise ValueError(
            f"preferences are of image, {', '.join(ALPHABETS)}, but modality={modality!r} came"
        )
    rows, names = read_rows(path, PAIR + LABELLED, "preferences")
    if not rows:
        raise ValueError(f"{path} has no rows")
    columns = _columns(path, names)
    paired = columns == PAIR
    prompts, data, label, numbers = [], [], [], []
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        prompt, *cells = (_cell(row, column, where) for column in columns)
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: a prompt is a text, but {prompt!r} came")
        if paired:
            if cells[0] == cells[1]:
                raise ValueError(f"{where}: 'chosen' and 'rejected' are the same sample")
            signs = [1.0, -1.0]
        else:
            signs = [_label(cells.pop(), where)]
        data += [_sample(cell, modality, path, where) for cell in cells]
        prompts += [prompt] * len(cells)
        numbers += [number] * len(cells)
        label += signs
    for sign, kind in ((1.0, "desirable (label 1)"), (-1.0, "undesirable (label 0)")):
        if sign not in label:
            raise ValueError(f"{path}: no sample is {kind}; preferences need both kinds")
    groups = torch.arange(len(data)) // (2 if paired else 1)
    sign = torch.tensor(label, dtype=torch.float64)
    return Preferences(path, modality, paired, prompts, data, sign, groups, numbers)


def _columns(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Which of the two kinds a data set is."""
    kinds = [kind for kind in (PAIR, LABELLED) if set(kind) <= set(names)]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise ValueError(
            f"{path} has both {', '.join(PAIR)} and {', '.join(LABELLED)}; leave one kind out"
        )
    closest = max((PAIR, LABELLED), key=lambda kind: len(set(kind[1:]) & set(names)))
    missing = [name for name in closest if name not in names]
    raise ValueError(
        f"{path} has no column {', '.join(map(repr, missing))}; expected {', '.join(PAIR)}, or "
        f"{', '.join(LABELLED)}, and there is {', '.join(map(repr, names)) or 'nothing'}"
    )


def _cell(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise ValueError(f"{where} has no {column!r}")
    value = row[column]
    if isinstance(value, dict) and {"bytes", "path"} >= value.keys():
        value = value.get("bytes") or value.get("path")
    if value is None or (value in ("", b"") and column != "prompt"):
        raise ValueError(f"{where}: {column!r} is empty")
    return value


def _label(value: Any, where: str) -> float:
    if isinstance(value, bool | int | float) and value in (1, 0, -1):
        return 1.0 if value == 1 else -1.0
    raise ValueError(f"{where}: a label is true or false, 1 or 0, 1 or -1, but {value!r} came")


def _sample(value: Any, modality: str, path: Path, where: str) -> str | bytes:
    if modality == "image":
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise ValueError(f"{where}: an image is a path or bytes, but {value!r} came")
        file = path.parent / value
        if not file.is_file():
            raise FileNotFoundError(f"{where}: there is no image {file}")
        return str(file)
    if not isinstance(value, str):
        raise ValueError(f"{where}: a sequence is a text, but {value!r} came")
    try:
        to_tokens(value, modality)
    except ValueError as err:
        raise ValueError(f"{where}: {err}") from None
    return value.strip().upper()

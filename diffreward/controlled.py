"""Captioned pictures and the control images read off them: what conditional models learn from.

A data set is a manifest (.jsonl or .parquet) with the columns

    image        a path, relative to the file's folder, or the bytes of an image file
    text         its caption; "prompt" and "caption" are read, too
    control      optional: the control image, as the picture, if it is not to be read off it

or a folder with such a manifest named metadata.jsonl; or "embedded:scenes", captioned scenes of
coloured shapes, drawn when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.manifests import open_image, read_rows
from diffreward.rewards import shapes
from diffreward.samples import Samples

CAPTIONS = ("text", "prompt", "caption")
SCENES = "embedded:scenes"
_COLUMNS = ("prompts", "pictures", "names")


@dataclass(frozen=True)
class ControlledImages:
    """Captioned pictures, checked but not opened.

    Attributes:
        prompts: n captions.
        pictures: n paths, bytes, or numbers of scenes.
        controls: n control images, likewise; None: they are read off the pictures.
        names: how each is named in messages.
        extractor: reads control images off pictures; None: they come with the data, or the model
            takes none.
        size: height and width to which pictures are scaled and cut; None: as they are.
        interpolate: whether control images that come with the data are scaled smoothly.
        about: what the data set was read from, for a run's record.
    """

    prompts: list[str]
    pictures: list[Any]
    controls: list[Any] | None
    names: list[str]
    extractor: Any
    size: tuple[int, int] | None = None
    interpolate: bool = True
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int]) -> ControlledImages:
        """The data set of these pictures alone."""
        some = {name: [getattr(self, name)[i] for i in indices] for name in _COLUMNS}
        controls = None if self.controls is None else [self.controls[i] for i in indices]
        return replace(self, **some, controls=controls)

    def resized(self, height: int, width: int) -> ControlledImages:
        """The same at another size."""
        return replace(self, size=(height, width))

    def load(self, indices: Sequence[int]) -> Samples:
        """Pictures with their captions, and their control images as the context "control".

        Raises:
            ValueError: one cannot be opened, or sizes differ; the message names it.
        """
        images = self._open(self.pictures, indices)
        context = {}
        if self.controls is not None:
            context["control"] = self._open(self.controls, indices, self.interpolate)
        elif self.extractor is not None:
            with torch.no_grad():
                context["control"] = self.extractor.control(images)
        return Samples(images, "image", [self.prompts[i] for i in indices], context)

    def _open(
        self, what: list[Any], indices: Sequence[int], interpolate: bool = True
    ) -> Float[Tensor, "b 3 h w"]:
        found = [_scene(what[i], self.size) if isinstance(what[i], int)
                 else open_image(what[i], self.names[i], self.size, interpolate)
                 for i in indices]  # fmt: skip
        for i, each in zip(indices, found, strict=True):
            if each.shape != found[0].shape:
                raise ValueError(
                    f"{self.names[i]} is {_by(each)}, but {self.names[indices[0]]} "
                    f"{_by(found[0])}; give a size"
                )
        return torch.stack(found)


def read_controlled(
    source: str | Path,
    control: Any = None,
    *,
    size: Sequence[int] | None = None,
    count: int | None = None,
    first: int = 0,
    interpolate: bool = True,
) -> ControlledImages:
    """Read and check a data set of captioned pictures; they are looked for, but not opened.

    Args:
        source: see the module's text.
        control: what `make_extractor` takes; None: the data's column "control", if it has one.
        size: height and width.
        count: how many; None: all, or 1024 scenes.
        first: how many to pass over before.
        interpolate: whether the column's control images are scaled smoothly; False for classes,
            whose colours must not be mixed.

    Raises:
        FileNotFoundError: the file is not there, or an image that it names: the message has its
            row.
        ValueError: no rows, a missing column, an empty cell, control images twice, or a number out
            of range.
    """
    if first < 0 or (count is not None and count < 1):
        raise ValueError(f"first must be 0 or more and count 1 or more, but {first}, {count} came")
    if size is not None:
        size = tuple(size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size is a height and a width, 1 or more, but {size} came")
    from diffreward.rewards.control import make_extractor

    extractor = None if control is None else make_extractor(control)
    about = {"source": str(source), "first": first, "count": count}
    if extractor is not None:
        about["control"] = control if isinstance(control, str | Mapping) else extractor.name
    if str(source) == SCENES:
        numbers = range(first, first + (1024 if count is None else count))
        prompts = [_drawn(number)[0].caption() for number in numbers]
        names = [f"scene {number}" for number in numbers]
        return ControlledImages(prompts, list(numbers), None, names, extractor, size, about=about)
    path = Path(source)
    path = path / "metadata.jsonl" if path.is_dir() else path
    rows, columns = read_rows(path, ("image", "file_name", "control", *CAPTIONS), "pictures")
    picture = next((name for name in ("image", "file_name") if name in columns), None)
    caption = next((name for name in CAPTIONS if name in columns), None)
    if picture is None or caption is None:
        raise ValueError(
            f"{path} needs the columns 'image' (or 'file_name') and 'text' (or "
            f"{', '.join(map(repr, CAPTIONS[1:]))}), and there is {', '.join(columns) or 'nothing'}"
        )
    if extractor is not None and "control" in columns:
        raise ValueError(
            f"{path} has a column 'control', and control images are to be read off the pictures, "
            "too; leave one of the two out"
        )
    if not interpolate and "control" not in columns:
        raise ValueError(f"interpolate=False is of a column 'control', and {path} has none")
    rows = rows[first : None if count is None else first + count]
    if not rows:
        raise ValueError(f"{path} has no rows" + (f" beyond the first {first}" if first else ""))
    names = [f"{path}, row {number}" for number in range(first + 1, first + 1 + len(rows))]
    if not interpolate:
        about["interpolate"] = False
    about["digest"] = _digest(
        row.get(name) for row in rows for name in (caption, picture, "control")
    )
    pictures, prompts, controls = [], [], []
    for row, where in zip(rows, names, strict=True):
        pictures.append(_file(row.get(picture), path, f"{where}: {picture!r}"))
        if not isinstance(row.get(caption), str):
            raise ValueError(f"{where}: {caption!r} is a text, but {row.get(caption)!r} came")
        prompts.append(row[caption])
        if "control" in columns:
            controls.append(_file(row.get("control"), path, f"{where}: 'control'"))
    return ControlledImages(
        prompts, pictures, controls or None, names, extractor, size, interpolate, about
    )


def _file(value: Any, path: Path, where: str) -> str | bytes:
    if isinstance(value, dict):  # as data sets embed pictures
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} is a path or the bytes of an image, but {value!r} came")
    if not (path.parent / value).is_file():
        raise FileNotFoundError(f"{where}: there is no image {path.parent / value}")
    return str(path.parent / value)


def _digest(cells: Iterable[Any]) -> str:
    found = blake2b(digest_size=16)
    for cell in cells:
        found.update(repr(cell).encode() + b"\0")
    return found.hexdigest()


def _drawn(number: int) -> tuple[shapes.Scene, np.random.Generator]:
    rng = np.random.default_rng([2024, number])
    return shapes.random_scene(rng), rng


def _scene(number: int, size: tuple[int, int] | None) -> Float[Tensor, "3 h w"]:
    scene, rng = _drawn(number)
    image = torch.from_numpy(shapes.render(scene, rng)).permute(2, 0, 1).float() / 255
    if size is not None and size != tuple(image.shape[1:]):
        raise ValueError(
            f"scenes are drawn at {shapes.SIZE}x{shapes.SIZE}, but this model's pictures are "
            f"{size[0]}x{size[1]}"
        )
    return image


def _by(image: Tensor) -> str:
    return f"{image.shape[-2]}x{image.shape[-1]}"

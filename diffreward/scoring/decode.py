"""Items to tensors, in worker processes: bytes become pixels, pixels what a network reads.

A file that is no image, or half of one, or too large, becomes an error of its row. What is not
plain 8-bit RGB is converted and says so in ``notes``: the first frame of an animation, CMYK,
palettes, 16 bits reduced to 8, transparency laid on white, rotation by the EXIF orientation.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import stat
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffreward.samples import to_tokens
from diffreward.scoring.readers import Item

# Not every format of PIL: some start other programs (EPS) or read other files.
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO",
    "TGA",
)  # fmt: skip

# Resized to cover a square, a strip of 2 x 100000 pixels would be larger than memory.
_LARGEST_RESIZED = 2**24
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass
class Decoded:
    """A batch of items, decoded; rows are numbered as the items were.

    Attributes:
        rows: numbers of the rows that could be decoded.
        prepared: preprocess -> ``(len(rows), 3, H, W)``, in the order of ``rows``.
        raw: groups of equal size: row numbers, and uint8 images ``(k, h, w, 3)``, int64 tokens
            ``(k, l)`` or a list of k strings.
        errors: row -> why it could not be decoded.
        notes: row -> what was converted.
    """

    rows: list[int]
    prepared: dict[Callable, Any] = field(default_factory=dict)
    raw: list[tuple[list[int], Any]] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> Decoded:
        """The same with its prepared images in page-locked memory (called by the DataLoader)."""
        self.prepared = {
            key: torch.as_tensor(images).pin_memory() for key, images in self.prepared.items()
        }
        return self


class Decoder:
    """Decodes batches of items; indexed with them, as a DataLoader does.

    Args:
        modality: ``"image"``, ``"text"``, or one of `diffreward.samples.ALPHABETS`.
        preprocess: applied to every image, once each.
        raw: whether the images themselves are wanted too.
    """

    def __init__(self, modality: str, preprocess: Sequence[Callable] = (), raw: bool = True):
        self.modality, self.preprocess, self.raw = modality, tuple(preprocess), raw
        self.through_pipe = not _roomy()

    def __getitem__(self, items: Sequence[Item]) -> Decoded:
        found = Decoded([])
        prepared: dict[Callable, list[Tensor]] = {key: [] for key in self.preprocess}
        groups: dict[Any, tuple[list[int], list]] = {}
        for n, item in enumerate(items):
            try:
                if item.error is not None:
                    raise ValueError(item.error)
                data, note = self._read(item)
                ready = self._prepare(data)
            except Exception as err:  # whatever is in the file, it is this row's error
                found.errors[n] = _reason(err)
                continue
            found.rows.append(n)
            if note:
                found.notes[n] = note
            for key, image in ready.items():
                prepared[key].append(image)
            if self.raw:
                rows, members = groups.setdefault(getattr(data, "shape", None), ([], []))
                rows.append(n)
                members.append(data)
        if found.rows:
            found.prepared = {key: torch.cat(images) for key, images in prepared.items()}
        if self.through_pipe:
            found.prepared = {key: images.numpy() for key, images in found.prepared.items()}
        found.raw = [
            (rows, members if self.modality == "text" else np.stack(members))
            for rows, members in groups.values()
        ]
        return found

    def _read(self, item: Item) -> tuple[Any, str]:
        if self.modality == "image":
            pixels, notes = read_image(item)
            return pixels, ", ".join(notes)
        if self.modality == "text":
            return item.data, ""
        return to_tokens(item.data, self.modality).numpy(), ""

    def _prepare(self, pixels: Any) -> dict[Callable, Tensor]:
        if not self.preprocess:
            return {}
        image = to_float(pixels[None])
        h, w = pixels.shape[:2]
        ready = {}
        for key in self.preprocess:
            if getattr(key, "resize_mode", "") == "shortest":
                size = max(key.size)
                if size * size * max(h, w) / min(h, w) > _LARGEST_RESIZED:
                    raise ValueError(f"{w} x {h} pixels are too long and narrow to be resized")
            ready[key] = key(image)
        return ready


def to_float(pixels: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 ``(b, h, w, 3)`` as float32 ``(b, 3, h, w)`` in [0, 1]."""
    images = torch.from_numpy(pixels).to(device)
    return images.permute(0, 3, 1, 2).contiguous().float().div_(255)


def read_image(item: Item) -> tuple[np.ndarray, list[str]]:
    """Pixels, uint8 ``(h, w, 3)``, and what was converted.

    Raises:
        OSError, ValueError, Image.DecompressionBombError, ...: it cannot be read.
    """
    if item.file is None:
        return decode_image(io.BytesIO(item.data))
    # Checked first: opening a pipe would wait for ever.
    if not stat.S_ISREG(os.stat(item.file).st_mode):
        raise ValueError("not a file")
    with open(item.file, "rb") as file:
        if item.span is None:
            return decode_image(file)
        offset, size = item.span
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError(f"the tar ends after {len(data)} of its {size} bytes")
    return decode_image(io.BytesIO(data))


def decode_image(file: Any) -> tuple[np.ndarray, list[str]]:
    """`read_image` of an open file."""
    if not file.read(1):
        raise ValueError("the file is empty")
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_formats()) as image:
            stored = str([tile[3] for tile in image.tile])
            image.load()
            notes, upright = [], image
            with suppress(Exception):  # broken metadata do not make the pixels unreadable
                if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
                    upright = ImageOps.exif_transpose(image)
                    notes.append("rotated by its EXIF orientation")
            pixels = np.array(_to_rgb(upright, stored, notes))
            with suppress(Exception):  # a first frame is an image, whatever follows it
                if getattr(image, "is_animated", False):
                    notes.append("first frame of several")
            return pixels, notes


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this PIL was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image, stored: str, notes: list[str]) -> Image.Image:
    """8-bit RGB; what had to be given up for it is added to ``notes``."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and ";16" in stored):
        notes.append("16-bit")
        grey = np.round(np.asarray(image).astype(np.float64) / 257)  # 65535 is white
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {mode!r} (32 bits) have no agreed range; convert it to 8 or 16 bits"
        )
    if ";16" in stored:
        notes.append("16-bit")  # reduced by PIL
    if mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        notes.append(mode)
    if mode in ("P", "PA"):
        notes.append("palette")
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            notes.append("transparency on white")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _reason(err: Exception) -> str:
    """Why, in words that do not change from run to run (no addresses)."""
    if isinstance(err, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(err, FileNotFoundError):
        return "there is no such file"
    if isinstance(err, MemoryError):
        return "not enough memory to decode it"
    return getattr(err, "strerror", None) or " ".join(str(err).split()) or type(err).__name__


def _roomy() -> bool:
    """Whether shared memory has room for prepared batches (containers often have 64 MB of it)."""
    try:
        return shutil.disk_usage("/dev/shm").free > 2**30
    except OSError:
        return os.name != "posix" or not os.path.isdir("/dev/shm")

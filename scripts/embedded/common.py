"""What the scripts of the embedded text-to-image model share: data, captions, batches, timing.

Every script takes the data folder written by ``build_data.py`` and writes beside it; run them from
the root of the checkout with ``python -m scripts.embedded.<name> DATA ...``.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
import zlib
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # do not spin: the machine is shared

import numpy as np
import torch
from transformers import CLIPTokenizer

CONTEXT = 24  # tokens of a caption, start and end included


def load(data: Path) -> tuple[np.ndarray, list[dict], np.ndarray, list[str]]:
    """(emoji (n, v, 64, 64, 3) uint8 in v placements, their rows, scenes (m, 64, 64, 3), captions).

    The pictures are memory-mapped.
    """
    emoji, scenes = (np.load(data / f"{n}.npy", mmap_mode="r") for n in ("emoji", "scenes"))
    rows, captions = (json.loads((data / f"{n}.json").read_text()) for n in ("emoji", "scenes"))
    return emoji, rows, scenes, captions


def bucket(text: str, of: int) -> int:
    """A stable hash of a text in 0..of-1, by which splits are made."""
    return zlib.crc32(text.encode()) % of


def emoji_key(row: dict) -> str:
    return f"{row['style']} {row['hex']}"


def emoji_caption(row: dict, rng: random.Random) -> str:
    """The label, sometimes with tags or by tags alone, half of the time with the style's name."""
    tags = rng.sample(row["tags"], min(len(row["tags"]), rng.randint(1, 2)))
    draw, parts = rng.random(), [row["label"]]
    if draw > 0.75:
        parts = parts + tags if draw > 0.85 or not tags else tags
    if rng.random() < 0.5:
        parts.append(row["style"] + " style")
    return ", ".join(parts)


def tokenizer(data: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(data / "tokenizer")


def tokens(tok: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(b, CONTEXT) int64, padded with the end token."""
    return tok(
        captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
    ).input_ids


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (..., h, w, 3) -> float32 (..., 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3).float().div(127.5).sub(1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(b,) dB, for pictures in [-1, 1]."""
    return -10 * ((a - b) / 2).square().mean((1, 2, 3)).log10()


def grid(images: torch.Tensor, columns: int) -> np.ndarray:
    """(n, 3, h, w) in [-1, 1] -> one uint8 picture of ``columns`` columns."""
    n, c, h, w = images.shape
    sheet = images.view(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(n // columns * h, columns * w, c)
    return ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def schedule(elapsed: float, constant: float = 0.0, floor: float = 0.02) -> float:
    """Learning-rate factor at ``elapsed`` in [0, 1]: constant first, then a cosine to ``floor``."""
    x = max(0.0, elapsed - constant) / (1 - constant)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, x)))


def save(state: dict, path: Path) -> None:
    """Write a checkpoint beside its place and move it there, so that it is never half written."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


class Clock:
    """Minutes of wall time and CPU, ``before`` minutes of an earlier run included."""

    def __init__(self, before: float = 0.0, cpu_before: float = 0.0):
        self.start = time.time() - 60 * before
        self.cpu_start = time.process_time() - 60 * cpu_before

    @property
    def minutes(self) -> float:
        return (time.time() - self.start) / 60

    @property
    def cpu_minutes(self) -> float:
        return (time.process_time() - self.cpu_start) / 60

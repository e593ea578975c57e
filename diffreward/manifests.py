"""Manifests: tables that name pictures, as .jsonl or .parquet files; reading both."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

ENDINGS = (".jsonl", ".ndjson", ".parquet")


def read_rows(
    path: Path, wanted: Sequence[str], what: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a manifest, and the names of its columns.

    Args:
        path: the file.
        wanted: columns; others need not be read.
        what: the manifest holds, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, or a file that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with {what}")
    end = path.suffix.lower()
    if end not in ENDINGS:
        raise ValueError(f"{what} are read from {', '.join(ENDINGS)} files, not {path.name}")
    if end == ".parquet":
        try:
            names = pq.read_schema(path).names
            some = [name for name in names if name in wanted]
            return pq.read_table(path, columns=some or names[:1]).to_pylist(), names
        except pa.ArrowException as err:
            raise ValueError(f"{path} cannot be read as Parquet: {err}") from None
    found = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as err:
                raise ValueError(f"{path}, line {number}, is not JSON: {err}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a row is an object, but {row!r} came")
            found.append(row)
    return found, list(found[0]) if found else []


def open_image(
    data: str | Path | bytes, where: str, size: tuple[int, int] | None = None,
    interpolate: bool = True,
) -> Float[Tensor, "3 h w"]:  # fmt: skip
    """A picture, RGB in [0, 1], upright.

    Args:
        data: its path, or the bytes of its file.
        where: it is named, for messages.
        size: height and width to which it is scaled, and cut around its middle if it has another
            shape; None: as it is.
        interpolate: False: every pixel keeps a colour that was there, as classes must.

    Raises:
        ValueError: it cannot be opened.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as err:
        raise ValueError(f"{where} cannot be opened as an image: {err}") from None
    if size is not None:
        filter = Image.Resampling.LANCZOS if interpolate else Image.Resampling.NEAREST
        image = ImageOps.fit(image, (size[1], size[0]), filter)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

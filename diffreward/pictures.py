"""Pictures as files, and labelled grids of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffreward.files import write_atomic


def to_pil(image: Float[Tensor, "3 h w"]) -> Image.Image:
    """One picture, float32 RGB in [0, 1], as 8 bits."""
    pixels = (image.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_image(path: Path, image: Image.Image) -> None:
    """Write a picture in the format of its name, whole or not at all."""
    write_atomic(path, image.save)


@dataclass(frozen=True)
class Cell:
    """One picture of a grid, and the lines below it."""

    image: Float[Tensor, "3 h w"]
    caption: tuple[str, ...] = ()


def image_grid(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], *, smallest: int = 208,
    largest: int = 384,
) -> Image.Image:  # fmt: skip
    """A labelled grid: a heading per column; per row a title, its pictures, and their captions.

    Args:
        columns: headings.
        rows: title and one cell per column. All pictures are of one size.
        smallest, largest: longer side of a picture in the grid, in pixels. Small ones are
            enlarged by a whole factor without smoothing, large ones reduced.
    """
    font, bold, gap = _font(14), _font(15, bold=True), 14
    height, width = rows[0][1][0].image.shape[-2:]
    longer = max(height, width)
    scale = math.ceil(smallest / longer) if longer < smallest else min(1.0, largest / longer)
    size = (round(width * scale), round(height * scale))
    filter = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    captions = [line for _, cells in rows for cell in cells for line in cell.caption]
    across = max([size[0], *(math.ceil(font.getlength(text)) for text in [*columns, *captions])])
    total = gap + len(columns) * (across + gap)
    line, lines = 19, max(len(cell.caption) for _, cells in rows for cell in cells)
    titles = [_wrap(title, bold, total - 2 * gap) for title, _ in rows]
    heights = [len(title) * (line + 1) + size[1] + 4 + lines * line + gap for title in titles]

    sheet = Image.new("RGB", (total, gap + line + gap + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [gap + c * (across + gap) for c in range(len(columns))]
    for left, heading in zip(lefts, columns, strict=True):
        draw.text((left, gap), heading, fill="#555555", font=font)
    top = gap + line + gap
    for (_, cells), title, tall in zip(rows, titles, heights, strict=True):
        y = top
        for part in title:
            draw.text((gap, y), part, fill="black", font=bold)
            y += line + 1
        for left, cell in zip(lefts, cells, strict=True):
            sheet.paste(to_pil(cell.image).resize(size, filter), (left, y + 2))
            draw.rectangle((left - 1, y + 1, left + size[0], y + 2 + size[1]), outline="#cccccc")
            for n, text in enumerate(cell.caption):
                draw.text((left, y + size[1] + 5 + n * line), text, fill="#333333", font=font)
        top += tall
    return sheet


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: more letters than Pillow's own font."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """``text`` in at most ``most`` lines of at most ``width`` pixels, cut with an ellipsis."""
    lines = [""]
    for word in text.split() or ["(no prompt)"]:
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = lines[:most]
    if len(lines) > most:
        cut[-1] += " …"
    for n, line in enumerate(cut):
        while font.getlength(line) > width and len(line) > 2:
            line = line[:-2] + "…"
        cut[n] = line
    return cut

"""Pictures as files, labelled grids of them, and sequence logos."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffreward.files import write_atomic
from diffreward.samples import ALPHABETS


def to_pil(image: Float[Tensor, "3 h w"]) -> Image.Image:
    """One picture, float32 RGB in [0, 1], as 8 bits."""
    pixels = (image.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_image(path: Path, image: Image.Image) -> None:
    """Write a picture in the format of its name, whole or not at all."""
    write_atomic(path, image.save)


def save_figure(path: Path, figure, trim: bool = False) -> None:
    """Write a matplotlib figure, whole or not at all; ``trim``: without its white margins."""
    box = "tight" if trim else None
    write_atomic(path, lambda unfinished: figure.savefig(unfinished, dpi=120, bbox_inches=box))


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


# --------------------------------------------------------------------------------------------
# Sequence logos
# --------------------------------------------------------------------------------------------

BASES = {"A": "#109648", "C": "#255c99", "G": "#f7b32b", "T": "#d62839", "U": "#d62839"}
# hydrophobic, polar, amide, basic, acidic: the classes of WebLogo (Crooks et al. 2004)
RESIDUES = {
    **dict.fromkeys("AFILMPVW", "#222222"), **dict.fromkeys("CGSTY", "#109648"),
    **dict.fromkeys("NQ", "#8a3ffc"), **dict.fromkeys("HKR", "#255c99"),
    **dict.fromkeys("DE", "#d62839"),
}  # fmt: skip
COLOURS = {"dna": BASES, "rna": BASES, "protein": RESIDUES}


@dataclass(frozen=True)
class LetterSet:
    """Sequences of one length, as a logo shows them.

    Attributes:
        title: of its logo.
        share: ``(l, v)`` how often each letter stands at each position; rows sum to 1.
        count: how many sequences that is from; of weighted ones, the effective number.
    """

    title: str
    share: Float[Tensor, "l v"]
    count: float

    @property
    def information(self) -> Float[Tensor, "l v"]:
        """Heights of the letters in bits: their share of log2(v) minus the position's entropy."""
        v = self.share.shape[1]
        bits = math.log2(v) - torch.special.entr(self.share).sum(1) / math.log(2)
        return self.share * bits.clamp(min=0)[:, None]

    @property
    def chance(self) -> float:
        """Bits that as many uniformly random letters have at a position: (v - 1) / (2 ln2 count).

        To first order in 1 / count (Schneider et al. 1986, Information content of binding sites).
        """
        v = self.share.shape[1]
        return min((v - 1) / (2 * math.log(2) * self.count), math.log2(v))


def letter_set(
    title: str,
    data: Num[Tensor, "n l *v"],
    modality: str,
    weights: Float[Tensor, " n"] | None = None,
) -> LetterSet:
    """Tokens ``(n, l)`` or relaxed ones ``(n, l, v)``, with a weight each, as a `LetterSet`."""
    data = data.detach().cpu()
    x = (data if data.ndim == 3 else F.one_hot(data, len(ALPHABETS[modality]))).double()
    w = x.new_ones(len(x)) if weights is None else weights.double().cpu()
    w = w / w.sum()
    return LetterSet(title, torch.einsum("n,nlv->lv", w, x), 1 / w.square().sum().item())


def logo_figure(sets: Sequence[LetterSet], modality: str, width: int = 50):
    """Sequence logos (Schneider & Stephens 1990), one above the other, on one scale.

    A stack is as high as its position has information, log2(v) bits minus the entropy of the
    letters; each letter has its share of that, the most frequent on top. The dotted line is what
    random letters would show, for want of sequences.

    Args:
        sets: of sequences of one length, the first on top.
        modality: whose letters they are.
        width: positions in a line; longer sequences go on below.
    """
    from matplotlib.figure import Figure

    length, v = sets[0].share.shape
    lines, n = math.ceil(length / width), len(sets)
    highest = max(each.information.sum(1).max().item() for each in sets)
    top = 1.05 * max(highest, *(each.chance for each in sets), 0.01 * math.log2(v))
    figure = Figure(figsize=(12, 0.5 + lines * (n + 0.25)), layout="constrained")
    for line, part in enumerate(figure.subfigures(lines, 1, squeeze=False)[:, 0]):
        start = line * width
        axes = part.subplots(n, 1, squeeze=False, sharex=True)[:, 0]
        for axis, each in zip(axes, sets, strict=True):
            _draw_letters(axis, each.information[start : start + width], start + 1, modality)
            end = min(start + width, length) + 0.5
            axis.plot((start + 0.5, end), (each.chance,) * 2, color="#777777", ls=":", lw=0.8)
            axis.set_xlim(start + 0.4, start + min(width, max(length, 25)) + 0.6)
            axis.set_ylim(0, top)
            axis.set_title(each.title, fontsize=9, loc="left", pad=3)
            axis.set_ylabel("bits", fontsize=8)
            axis.tick_params(labelsize=8, length=2)
            axis.spines[["top", "right"]].set_visible(False)
        ticks = [at for at in range(start + 1, min(start + width, length) + 1) if at % 10 == 0]
        axes[-1].set_xticks(sorted({start + 1, *ticks}))
    return figure


def _draw_letters(axis, heights: Float[Tensor, "l v"], first: int, modality: str) -> None:
    """Stacks of letters, the i-th at x = first + i; one patch per letter of the alphabet."""
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    heights = heights.numpy()
    order = heights.argsort(axis=1, kind="stable")
    below = np.zeros_like(heights)  # where each letter stands
    sums = np.cumsum(np.take_along_axis(heights, order, 1), 1)
    np.put_along_axis(below, order[:, 1:], sums[:, :-1], 1)
    for k, letter in enumerate(ALPHABETS[modality]):
        glyph, placed = _glyph(letter), []
        for i in np.flatnonzero(heights[:, k] > 0):
            corner, size = (first + i - 0.47, below[i, k]), (0.94, heights[i, k])
            placed.append(Outline(glyph.vertices * size + corner, glyph.codes))
        if placed:
            whole = Outline.make_compound_path(*placed)
            axis.add_patch(PathPatch(whole, color=COLOURS[modality][letter], lw=0))


@functools.cache
def _glyph(letter: str):
    """The outline of a letter, stretched to fill [0, 1] x [0, 1]."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", weight="bold")
    path = TextPath((0, 0), letter, size=1, prop=font)
    box = path.get_extents()
    # an I of full width would be a bar
    at, wide = (0.3, 0.4) if letter == "I" else (0.0, 1.0)
    scaled = (path.vertices - box.min) / box.size
    # the closing points, which extents leave out, may lie elsewhere
    scaled = scaled.clip(0, 1) * (wide, 1.0) + (at, 0.0)
    return Outline(scaled, path.codes)

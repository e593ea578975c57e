"""What a run leaves behind: its folder, tables, JSON lines, pictures and plots.

Every file is written beside its final name and then renamed, so that a file which is there is
whole; a folder which is there is never written into by another run.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffreward import __version__
from diffreward.rewards import Reward, evaluate
from diffreward.samples import Samples
from diffreward.steering import SteeringResult

# --------------------------------------------------------------------------------------------
# Folders and files
# --------------------------------------------------------------------------------------------


@contextmanager
def run_folder(output: str | Path | None, verb: str) -> Iterator[Path]:
    """A new folder for a run; if the run fails before it writes anything, it goes again.

    Args:
        output: its path; None: ``runs/<verb>-<date>-<time>``, numbered if that is taken.
        verb: what the run does.

    Raises:
        FileExistsError: ``output`` exists.
        OSError: it cannot be created.
    """
    folder = _new_folder(output, verb)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # rmdir removes only what is empty
            folder.rmdir()
            if output is None:
                folder.parent.rmdir()
        raise


def _new_folder(output: str | Path | None, verb: str) -> Path:
    stem = time.strftime(f"{verb}-%Y%m%d-%H%M%S")
    names = [stem, *(f"{stem}-{n}" for n in range(2, 1000))]
    for folder in [Path("runs", name) for name in names] if output is None else [Path(output)]:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(
        f"{output or Path('runs', stem)} exists, and results are never overwritten: choose another "
        "--output, or move it away"
    )


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a path beside ``path``, then rename to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line. NaN becomes null; infinities the strings "inf", "-inf"."""
    lines = (json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in rows)
    write_text(path, "".join(line + "\n" for line in lines))


def plain(value: Any) -> Any:
    """``value`` with tensors as numbers or lists, and only numbers that JSON has."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def environment(device: torch.device | str, **more: Any) -> dict[str, Any]:
    """Versions, device and date of a run, for ``env.json``; nothing that names user or machine."""
    device = torch.device(device)
    packages = {}
    for name in ("torch", "diffusers", "transformers", "open_clip_torch", "numpy"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "diffreward": __version__,
        "python": platform.python_version(),
        "platform": platform.system(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": packages,
        **more,
    }


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False,
    numbers: bool = True,
) -> str:  # fmt: skip
    """Aligned columns; with ``numbers``, all but the first to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]

    def show(line: Sequence[str]) -> str:
        cells = [
            text.rjust(width) if numbers and c > 0 else text.ljust(width)
            for c, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |" if markdown else "   ".join(cells).rstrip()

    shown = [show(line) for line in lines]
    if markdown:
        ends = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        shown.insert(1, f"| {' | '.join(ends)} |")
    return "\n".join(shown)


# --------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------


def score_summary(summary: dict[str, dict[str, float | int]]) -> str:
    """A line per reward: how many rows it scored, and how its values spread."""
    header = ["reward", "count", "errors", "mean", "std", "p5", "p50", "p95"]
    rows = [
        [label, *(str(found[name]) for name in header[1:3])]
        + [f"{found[name]:.4g}" for name in header[3:]]
        for label, found in summary.items()
    ]
    return table(header, rows)


# --------------------------------------------------------------------------------------------
# Steering
# --------------------------------------------------------------------------------------------


def judge_prompts(judge: Reward, prompts: Sequence[str]) -> tuple[list[bool], str]:
    """Which prompts a held-out reward can judge, found on blank pictures before any compute.

    Returns:
        One answer per prompt, and what was wrong with the first that it cannot judge.
    """
    if judge.info.modality not in (None, "image"):
        return [False] * len(prompts), f"it judges {judge.info.modality} samples, not images"

    def problem(these: Sequence[str]) -> str:
        try:
            evaluate(judge, Samples(torch.ones(len(these), 3, 64, 64), "image", list(these)))
        except ValueError as err:
            return str(err)
        return ""

    with torch.no_grad():
        if not problem(prompts):
            return [True] * len(prompts), ""
        problems = [problem([prompt]) for prompt in prompts]
    return [not p for p in problems], next((p for p in problems if p), "")


@dataclass
class Arm:
    """One way of sampling: all its particles, scored by every reward.

    Attributes:
        samples: ``P * K``, prompt-major.
        scores: label -> ``(P, K)``, the guiding reward first; NaN where a judge cannot judge.
        best: ``(P,)`` the particle the guiding reward prefers.
    """

    samples: Samples
    scores: dict[str, Float[Tensor, "P K"]]
    best: Int[Tensor, " P"]

    def chosen(self, label: str) -> Float[Tensor, " P"]:
        """The score of each prompt's best particle."""
        return self.scores[label].gather(1, self.best[:, None]).squeeze(1)


class SteeringReport:
    """Everything there is to show of a steering run; `write` puts it in a folder.

    Args:
        prompts: P prompts.
        result: what `steer` returned.
        guide: label of the guiding reward.
        judges: label -> held-out reward, and for which prompts it can judge.
        num_steps: of the chain.
        threshold: the effective sample size, as a fraction of K, that resamples.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        result: SteeringResult,
        guide: str,
        judges: dict[str, tuple[Reward, Sequence[bool]]],
        num_steps: int,
        threshold: float | None = None,
    ) -> None:
        self.prompts, self.result, self.guide = list(prompts), result, guide
        self.num_steps, self.threshold = num_steps, threshold
        self.k = result.log_weights.shape[1]
        self.judged = {label: sum(can) for label, (_, can) in judges.items()}
        self.steered = self._arm(result, judges)
        self.plain = self._arm(result.best_of_n, judges) if result.best_of_n else None

    def _arm(self, found, judges) -> Arm:
        scores = {self.guide: found.scores.value.detach().float().cpu().view(-1, self.k)}
        for label, (judge, can) in judges.items():
            value = torch.full((len(self.prompts) * self.k,), math.nan)
            rows = torch.tensor(can).repeat_interleave(self.k).nonzero().squeeze(1)
            with torch.no_grad():
                for some in rows.split(64):
                    value[some] = evaluate(judge, found.particles.take(some)).value.cpu()
            scores[label] = value.view(-1, self.k)
        return Arm(found.particles, scores, found.best)

    # -- numbers ------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """The ways of sampling compared."""
        return [*(["unsteered", f"best-of-{self.k}"] if self.plain else []), "steered"]

    def means(self, label: str) -> list[float]:
        """Mean reward over the prompts, one per column; unsteered: over all plain particles."""
        values = [self.steered.chosen(label)]
        if self.plain:
            values = [self.plain.scores[label], self.plain.chosen(label), *values]
        return [value.double().nanmean().item() for value in values]

    def summary(self, *, markdown: bool = False) -> str:
        """The table of mean rewards."""
        rows = []
        for label in self.steered.scores:
            role = "guide"
            if label != self.guide:
                count, all_of = self.judged[label], len(self.prompts)
                role = "held out" + (f", {count} of {all_of} prompts" if count < all_of else "")
            rows.append([f"{label} ({role})", *(f"{mean:.3f}" for mean in self.means(label))])
        return table(["mean reward", *self.columns], rows, markdown=markdown)

    def roots(self) -> str:
        """How many of the initial particles have descendants, in words."""
        roots = self.result.roots
        return (
            f"{roots.double().mean():.1f} of {self.k} initial particles have descendants on "
            f"average over {len(roots)} prompts (fewest {int(roots.min())})"
        )

    def rows(self) -> Iterable[dict]:
        """One record per particle, for ``scores.jsonl``."""
        arms = [("plain", self.plain)] if self.plain else []
        for name, arm in [*arms, ("steered", self.steered)]:
            root = _roots_of(self.result.ancestors, self.k)
            for p, prompt in enumerate(self.prompts):
                for particle in range(self.k):
                    steered = name == "steered"
                    scores = {label: s[p, particle].item() for label, s in arm.scores.items()}
                    yield {
                        "arm": name,
                        "prompt_index": p,
                        "prompt": prompt,
                        "particle": particle,
                        "score": scores.pop(self.guide),
                        "held_out": scores,
                        "chosen": bool(arm.best[p] == particle),
                        "log_weight": self.result.log_weights[p, particle] if steered else None,
                        "root": int(root[-1, p, particle]) if steered else particle,
                    }

    # -- pictures -----------------------------------------------------------------------------

    def grid(self, most: int = 24) -> Image.Image:
        """Prompts down, ways of sampling across; the first ``most`` prompts."""

        def cell(arm: Arm, p: int, particle: int) -> Cell:
            scores = [(label, s[p, particle].item()) for label, s in arm.scores.items()]
            known = [f"{label} {v:.3f}" for label, v in scores if not math.isnan(v)]
            return Cell(arm.samples.data[p * self.k + particle], tuple(known))

        rows = []
        for p, prompt in enumerate(self.prompts[:most]):
            cells = [cell(self.steered, p, int(self.steered.best[p]))]
            if self.plain:
                cells = [
                    cell(self.plain, p, 0),
                    cell(self.plain, p, int(self.plain.best[p])),
                    *cells,
                ]
            rows.append((prompt, cells))
        return image_grid(self.columns, rows)

    def write(self, folder: Path, config_yaml: str, environment: dict[str, Any]) -> None:
        """Put everything into ``folder``; the numbers first, so that no plot can lose them."""
        write_jsonl(folder / "scores.jsonl", self.rows())
        write_text(folder / "config.yaml", config_yaml)
        write_text(folder / "env.json", json.dumps(plain(environment), indent=2) + "\n")
        for p, prompt in enumerate(self.prompts):
            image = self.result.samples.data[p]
            save_image(folder / "images" / f"{p:03d}-{slug(prompt)}.png", to_pil(image))
        save_image(folder / "grid.png", self.grid())
        write_text(folder / "README.md", self.readme(environment))
        figure = lineage_figure(self.result, self.prompts, self.num_steps, self.threshold)
        write_atomic(folder / "lineage.png", lambda path: figure.savefig(path, dpi=120))

    def readme(self, environment: dict[str, Any]) -> str:
        """A short account of the run, in Markdown."""
        p, steps = len(self.prompts), self.num_steps
        chains = p * self.k
        lines = [
            "# A run of `diffreward steer`",
            "",
            f"{p} prompts, {self.k} particles each, {steps} steps, guided by `{self.guide}`, on "
            f"{environment['device_name']}, {environment['date']}.",
            "",
            self.summary(markdown=True),
            "",
        ]
        if self.plain:
            lines += [
                f"*unsteered*: the mean over all plain samples. *best-of-{self.k}* and *steered*: "
                f"of each prompt's {self.k} samples, the one `{self.guide}` prefers. Both take "
                f"{chains} chains of {steps} steps, from the same noise; steering also decodes "
                f"and scores clean predictions at {len(self.result.steps)} of the steps.",
                "",
            ]
        lines += [
            "The guiding reward rises because it was asked to; whether the pictures became better "
            "is for the held-out rewards and your eyes to say, and a handful of prompts is no "
            "proof.",
            "",
            f"{self.roots()}.",
            "",
            "| file | what it is |",
            "| --- | --- |",
            "| `grid.png` | prompts down, ways of sampling across; the unsteered column is each "
            "prompt's first plain sample |",
            "| `images/` | the steered picture of every prompt |",
            "| `scores.jsonl` | one line per particle: scores, log-weight, root, whether chosen |",
            "| `lineage.png` | who descends from whom, and the effective sample size |",
            "| `config.yaml` | repeats it: `diffreward steer --config config.yaml --output NEW` |",
            "| `env.json` | versions, device, seed, time taken |",
            "",
        ]
        return "\n".join(lines)


def slug(text: str, length: int = 40) -> str:
    """``text`` as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:length].strip("-") or "no-prompt"


def _roots_of(ancestors: Int[Tensor, "H P K"], k: int) -> Int[Tensor, "H1 P K"]:
    """The initial particle each particle descends from, before and after every selection."""
    roots = [torch.arange(k).expand(ancestors.shape[1], k)]
    for chosen in ancestors:
        roots.append(roots[-1].gather(1, chosen))
    return torch.stack(roots)


def lineage_figure(
    result: SteeringResult,
    prompts: Sequence[str],
    num_steps: int,
    threshold: float | None = None,
    most: int = 8,
):
    """Particle ancestry of the first ``most`` prompts, and every prompt's ESS.

    A line is a particle, coloured by the initial particle it descends from; grey lines died out.
    """
    from matplotlib.figure import Figure

    shown = min(len(prompts), most)
    across = min(shown, 2)
    down = math.ceil(shown / across)
    figure = Figure(figsize=(4.2 * across + 0.6, 1.9 * down + 2.9), layout="constrained")
    axes = figure.subplots(down + 1, across, squeeze=False, height_ratios=[1.0] * down + [1.3])
    panels = list(axes[:-1].flat)
    for p, axis in enumerate(panels):
        if p < shown:
            _draw_lineage(axis, result, p, num_steps)
            roots, k = int(result.roots[p]), result.log_weights.shape[1]
            title = prompts[p] if len(prompts[p]) <= 40 else prompts[p][:39] + "…"
            axis.set_title(f"{title or '(no prompt)'}: {roots} of {k} roots", fontsize=9)
        else:
            axis.set_axis_off()
    grid = axes[-1, 0].get_gridspec()
    for axis in axes[-1]:
        axis.remove()
    _draw_ess(figure.add_subplot(grid[-1, :]), result, prompts, num_steps, threshold)
    return figure


def _draw_lineage(axis, result: SteeringResult, p: int, num_steps: int) -> None:
    ancestors, k = result.ancestors[:, p], result.log_weights.shape[1]
    roots = _roots_of(result.ancestors, k)[:, p]
    parents = [*ancestors, torch.arange(k)]
    alive = [set(range(k))]  # who has descendants at the end; by stage, from the end back
    for parent in reversed(parents):
        alive.insert(0, {int(parent[j]) for j in alive[0]})
    x = [0, *result.steps, num_steps]

    def line(xs, ys, root, lives):
        colour, width = (f"C{int(root) % 10}", 1.8) if lives else ("#cccccc", 1.0)
        axis.plot(xs, ys, color=colour, lw=width, zorder=1 + lives, solid_capstyle="round")

    for stage, parent in enumerate(parents):
        start, end = x[stage], x[stage + 1]
        turn = end - 0.15 * (end - start)
        for j in range(k):  # a particle lives on up to the selection ...
            line((start, turn), (j, j), roots[stage][j], j in alive[stage])
        for j in range(k):  # ... in which child j takes the place of its parent
            i = int(parent[j])
            line((turn, end), (i, j), roots[stage][i], j in alive[stage + 1])
    axis.set_xticks(x, [str(i) for i in x], fontsize=7)
    axis.set_yticks(range(k) if k <= 8 else [0, k - 1])
    axis.tick_params(labelsize=7)
    axis.set_ylabel("particle", fontsize=8)
    axis.invert_yaxis()


def _draw_ess(axis, result: SteeringResult, prompts, num_steps: int, threshold) -> None:
    x, k = [*result.steps, num_steps], result.log_weights.shape[1]
    few = len(prompts) <= 8
    for p, prompt in enumerate(prompts):
        label = (prompt[:30] or "(no prompt)") if few else None
        axis.plot(x, result.ess[:, p] / k, marker="o", markersize=3, lw=1.2, alpha=0.8, label=label)
    if not few:
        axis.plot(x, result.ess.mean(1) / k, color="black", lw=2, label="mean")
    if threshold is not None:
        axis.axhline(threshold, color="black", ls=":", lw=1)
        axis.text(0, threshold, " resampled at or below", fontsize=7, va="bottom")
    axis.set_xlim(0, num_steps)
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("step (noise to data); the last point is the final reweighting", fontsize=8)
    axis.set_ylabel("effective sample size / K", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="lower left", ncols=2, framealpha=0.7)

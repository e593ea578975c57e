"""Evaluations as numbers, grids of samples and curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffreward.files import fasta, short
from diffreward.finetuning.monitor import Evaluation, paired
from diffreward.pictures import Cell, image_grid, letter_set, logo_figure
from diffreward.samples import ALPHABETS, to_strings, written
from diffreward.sounds import spectrogram_picture


def summary(before: Evaluation, now: Evaluation) -> dict[str, Any]:
    """The line of an evaluation: means, and changes with their standard errors."""
    scores = {}
    for label, value in now.scores.items():
        change = paired(before.scores[label], value)
        known = value.double()[~value.isnan()]
        scores[label] = {
            "mean": known.mean().item() if len(known) else math.nan,
            "count": len(known),
            "change": change.mean,
            "se": change.se,
        }
    found = {}
    for name, value in now.probes.items():
        was = before.probes[name].double()
        std = was.std().item() if len(was) > 1 else math.nan
        mean = value.double().mean().item()
        found[name] = {"mean": mean, "shift": (mean - was.mean().item()) / std if std else 0.0}
    return {
        "scores": scores,
        "probes": found,
        "diversity": now.diversity.mean().item(),
        "kl": None if now.kl is None else now.kl.mean().item(),
    }


def sample_rows(evaluation: Evaluation) -> Iterable[dict[str, Any]]:
    """One record per sample, with what it is where it is no picture."""
    for row in range(len(evaluation.samples)):
        p = row // evaluation.k
        yield {
            "prompt_index": p,
            "prompt": evaluation.prompts[p],
            "sample": row % evaluation.k,
            "scores": {label: v[row].item() for label, v in evaluation.scores.items()},
            "probes": {name: v[row].item() for name, v in evaluation.probes.items()},
            "kl": None if evaluation.kl is None else evaluation.kl[row].item(),
            **written(evaluation.samples, row),
        }


def sequences(before: Evaluation, after: Evaluation) -> str | None:
    """The sequences of both as FASTA, with their rewards in the headers; None if they are none.

    Records are called ``before-p-j`` and ``after-p-j``: of prompt p, sample j.
    """
    if after.samples.modality not in ALPHABETS:
        return None
    records = []
    for when, evaluation in (("before", before), ("after", after)):
        letters = to_strings(evaluation.samples.data, evaluation.samples.modality)
        for row, sequence in enumerate(letters):
            p, j = divmod(row, evaluation.k)
            scores = {label: value[row].item() for label, value in evaluation.scores.items()}
            records.append((f"{when}-{p}-{j}", scores, sequence))
    return fasta(records)


def logos(before: Evaluation, after: Evaluation):
    """The letters of all sequences, before above after; None if they are none."""
    modality = after.samples.modality
    if modality not in ALPHABETS:
        return None
    both = (("before", before), ("after", after))
    return logo_figure([letter_set(when, e.samples.data, modality) for when, e in both], modality)


def pictures(evaluation: Evaluation) -> Float[Tensor, "n 3 h w"] | None:
    """The pictures of an evaluation, of videos the middle frame, of sounds the spectrogram.

    None if it has none.
    """
    samples = evaluation.samples
    if samples.modality == "image":
        return samples.data
    if samples.modality == "video":
        return samples.data[:, samples.data.shape[1] // 2]
    if samples.modality == "audio":
        rates = samples.context["sampling_rate"]
        shown = [spectrogram_picture(x, int(r)) for x, r in zip(samples.data, rates, strict=True)]
        return torch.stack(shown)
    return None


def _conditions(evaluation: Evaluation) -> list[Cell] | None:
    """The control image of each prompt; None without control images that are pictures."""
    control = evaluation.samples.context.get("control")
    if control is None or control.ndim != 4 or control.shape[1] not in (1, 3):
        return None
    return [Cell(image.expand(3, -1, -1)) for image in control[:: evaluation.k]]


def _cell(evaluation: Evaluation, images: Tensor, row: int) -> Cell:
    known = [(label, value[row].item()) for label, value in evaluation.scores.items()]
    return Cell(
        images[row], tuple(f"{label} {short(v)}" for label, v in known if not math.isnan(v))
    )


def sample_grid(evaluation: Evaluation, most: int = 16, across: int = 6) -> Image.Image:
    """Prompts down, samples across: the first of each, after the control image if there is one."""
    images, across = pictures(evaluation), min(across, evaluation.k)
    rows = [
        (prompt, [_cell(evaluation, images, p * evaluation.k + s) for s in range(across)])
        for p, prompt in enumerate(evaluation.prompts[:most])
    ]
    return _grid([f"sample {s + 1}" for s in range(across)], rows, _conditions(evaluation))


def before_after(
    before: Evaluation, after: Evaluation, most: int = 16, pairs: int = 2
) -> Image.Image:
    """Prompts down; across, the first samples of each before and after, from the same noise.

    The first column has the control images, if there are any.
    """
    first, last, pairs = pictures(before), pictures(after), min(pairs, after.k)
    rows = []
    for p, prompt in enumerate(after.prompts[:most]):
        at = [p * after.k + s for s in range(pairs)]
        cells = [(_cell(before, first, row), _cell(after, last, row)) for row in at]
        rows.append((prompt, [cell for pair in cells for cell in pair]))
    columns = [f"{when}, sample {s + 1}" for s in range(pairs) for when in ("before", "after")]
    return _grid(columns, rows, _conditions(after))


def _grid(columns: list[str], rows: list, conditions: list[Cell] | None) -> Image.Image:
    if conditions is not None:
        columns = ["condition", *columns]
        rows = [(name, [conditions[p], *cells]) for p, (name, cells) in enumerate(rows)]
    return image_grid(columns, rows)


def curves(rows: Sequence[dict[str, Any]]):
    """Rewards, KL, diversity and probes over the iterations, from the lines of metrics.jsonl."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained = [row for row in rows if "evaluation" not in row and row.get("reward") is not None]
    found = [(row["iteration"], row["evaluation"]) for row in rows if "evaluation" in row]
    labels = list(found[0][1]["scores"])
    has_kl = any(e["kl"] is not None for _, e in found)
    has_diversity = any(e["diversity"] is not None for _, e in found)
    has_probes = bool(found[0][1]["probes"])
    count = len(labels) + has_kl + has_diversity + has_probes
    across = min(3, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(4.4 * across, 3.3 * down), layout="constrained")
    panels = iter(figure.subplots(down, across, squeeze=False).flat)

    def panel(title: str, ylabel: str):
        axis = next(panels)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(ylabel, fontsize=9)
        axis.set_xlabel("iteration", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.grid(alpha=0.25)
        return axis

    shown = {}
    for label in labels:
        is_trained = label == labels[0]
        axis = panel(f"{label} ({'trained' if is_trained else 'held out'})", "mean reward")
        if is_trained and trained:
            (shown["rollouts, of the training prompts"],) = axis.plot(
                [row["iteration"] for row in trained], [row["reward"] for row in trained],
                color="#aaaaaa", lw=1,
            )  # fmt: skip
        points = [(x, e["scores"][label]) for x, e in found]
        shown |= _draw_changes(axis, points)
    if has_kl:
        axis = panel("KL to the pretrained model", "nats per sample")
        axis.plot(*_known((x, e["kl"]) for x, e in found), "o-", ms=3, color="#444444")
    if has_diversity:
        axis = panel("diversity within a prompt", "mean distance of two samples")
        x, mean = _known((x, e["diversity"]) for x, e in found)
        axis.plot(x, mean, "o-", ms=3, color="#444444")
        axis.set_ylim(0, 1.1 * max(mean) or 1)
    if has_probes:
        axis = panel("probes", "shift, in std before training")
        for name in found[0][1]["probes"]:
            points = ((x, e["probes"][name]["shift"]) for x, e in found)
            axis.plot(*_known(points), "o-", ms=3, label=name)
        axis.axhline(0, color="black", lw=0.6)
        axis.legend(fontsize=7, framealpha=0.7)
    for axis in panels:
        axis.set_axis_off()
    places = {"loc": "outside lower center", "ncols": 3 if across > 1 else 1}
    figure.legend(shown.values(), shown.keys(), fontsize=8, frameon=False, **places)
    return figure


def _draw_changes(axis, points: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Means, with 95% intervals of the change since the start; handles for a legend."""
    known = [(x, s) for x, s in points if isinstance(s["mean"], int | float)]
    if not known:
        axis.text(0.5, 0.5, "cannot be judged", transform=axis.transAxes, ha="center", fontsize=9)
        return {}
    x, mean = [x for x, _ in known], [s["mean"] for _, s in known]
    half = [1.96 * s["se"] if isinstance(s["se"], int | float) else 0.0 for _, s in known]
    bars = axis.errorbar(x, mean, yerr=half, fmt="o-", ms=3, lw=1.6, capsize=2.5, color="C0")
    line = axis.axhline(mean[0], color="C0", ls=":", lw=1)
    return {
        "evaluations, with 95% of the paired change since the start": bars,
        "before training": line,
    }


def _known(points: Iterable[tuple[int, Any]]) -> tuple[list, list]:
    known = [(x, y) for x, y in points if isinstance(y, int | float)]
    return [x for x, _ in known], [y for _, y in known]

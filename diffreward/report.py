"""What a run of steering or scoring shows: summaries, grids, logos, lineages, a short account."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from diffreward.files import fasta, plain, short, table, write_jsonl, write_text
from diffreward.pictures import (
    Cell,
    image_grid,
    letter_set,
    logo_figure,
    save_figure,
    save_image,
    to_pil,
)
from diffreward.rewards import Reward, evaluate
from diffreward.samples import ALPHABETS, Samples, to_strings, written
from diffreward.sounds import spectrogram_picture, write_wav
from diffreward.steering import SteeringResult

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

    @property
    def arms(self) -> dict[str, Arm]:
        """By name: "plain", if there is a comparison, and "steered"."""
        return {**({"plain": self.plain} if self.plain else {}), "steered": self.steered}

    @property
    def modality(self) -> str:
        """Of the samples; "sequence" for all whose letters are known."""
        modality = self.steered.samples.modality
        return "sequence" if modality in ALPHABETS else modality

    # -- numbers ------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """The ways of sampling compared."""
        return [*(["unsteered", f"best-of-{self.k}"] if self.plain else []), "steered"]

    def values(self, label: str) -> list[Float[Tensor, " n"]]:
        """Rewards, one set per column: of all plain particles, and of each prompt's best."""
        values = [self.steered.chosen(label)]
        if self.plain:
            values = [self.plain.scores[label].flatten(), self.plain.chosen(label), *values]
        return values

    def means(self, label: str) -> list[float]:
        """Mean of `values`, one per column."""
        return [value.double().nanmean().item() for value in self.values(label)]

    def summary(self, *, markdown: bool = False) -> str:
        """The table of mean rewards."""
        rows = []
        for label in self.steered.scores:
            role = "guide"
            if label != self.guide:
                count, all_of = self.judged[label], len(self.prompts)
                role = "held out" + (f", {count} of {all_of} prompts" if count < all_of else "")
            rows.append([f"{label} ({role})", *map(short, self.means(label))])
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
        for name, arm in self.arms.items():
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
                        **written(arm.samples, p * self.k + particle),
                    }

    # -- pictures -----------------------------------------------------------------------------

    def grid(self, most: int = 24) -> Image.Image:
        """Prompts down, ways of sampling across; the first ``most`` prompts.

        Control images come first, where samples have any.
        """
        controls = self.steered.samples.context.get("control")

        def cell(arm: Arm, p: int, particle: int) -> Cell:
            scores = [(label, s[p, particle].item()) for label, s in arm.scores.items()]
            known = [f"{label} {short(v)}" for label, v in scores if not math.isnan(v)]
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
            if controls is not None:
                cells.insert(0, Cell(controls[p * self.k]))
            rows.append((prompt, cells))
        columns = self.columns if controls is None else ["control", *self.columns]
        return image_grid(columns, rows)

    def fasta(self) -> str:
        """Each prompt's steered best, then all plain sequences, with their rewards.

        Records are called ``steered-p-j`` and ``plain-p-j``: of prompt p, particle j.
        """
        records = []
        for name, arm in reversed(self.arms.items()):
            letters = to_strings(arm.samples.data, arm.samples.modality)
            for p in range(len(self.prompts)):
                for j in range(self.k) if name == "plain" else [int(arm.best[p])]:
                    scores = {label: s[p, j].item() for label, s in arm.scores.items()}
                    records.append((f"{name}-{p}-{j}", scores, letters[p * self.k + j]))
        return fasta(records)

    def logo(self):
        """The letters of all plain particles above those of all steered ones, by their weights."""
        data, modality = self.steered.samples.data, self.steered.samples.modality
        weights = self.result.log_weights.softmax(1).flatten()
        sets = [letter_set("steered, by their weights", data, modality, weights)]
        if self.plain:
            sets.insert(0, letter_set("unsteered", self.plain.samples.data, modality))
        return logo_figure(sets, modality)

    def distributions(self):
        """A panel per reward: every value of every way of sampling, and the means."""
        from matplotlib.figure import Figure

        labels, columns = list(self.steered.scores), self.columns
        figure = Figure(figsize=(6.5, 0.4 + len(labels) * (0.6 + 0.4 * len(columns))))
        figure.set_layout_engine("constrained")
        axes = figure.subplots(len(labels), squeeze=False)[:, 0]
        for axis, label in zip(axes, labels, strict=True):
            for n, value in enumerate(self.values(label)):
                value = value[~value.isnan()].double()
                # spread evenly by rank, so that equal values can be told apart
                up = n + 0.3 * torch.linspace(-1, 1, len(value)).roll(len(value) // 2)
                colour = "#888888" if n < len(columns) - 1 else "C0"
                axis.plot(value, up, "o", ms=4.5, alpha=0.6, mew=0, color=colour)
                if len(value):
                    axis.plot([value.mean()] * 2, (n - 0.4, n + 0.4), color="black", lw=1.6)
            axis.set_yticks(range(len(columns)), columns, fontsize=8)
            axis.set_ylim(len(columns) - 0.5, -0.5)
            axis.tick_params(labelsize=8)
            axis.grid(axis="x", alpha=0.25)
            role = "guide" if label == self.guide else "held out"
            axis.set_title(f"{label} ({role})", fontsize=9, loc="left")
        return figure

    def write(self, folder: Path, config_yaml: str, environment: dict[str, Any]) -> Path:
        """Put everything into ``folder``; the numbers first, so that no plot can lose them.

        Returns:
            What to look at first.
        """
        write_jsonl(folder / "scores.jsonl", self.rows())
        write_text(folder / "config.yaml", config_yaml)
        write_text(folder / "env.json", json.dumps(plain(environment), indent=2) + "\n")
        first = folder / "scores.jsonl"
        if self.modality == "image":
            first = folder / "grid.png"
            for p, prompt in enumerate(self.prompts):
                image = self.result.samples.data[p]
                save_image(folder / "images" / f"{p:03d}-{slug(prompt)}.png", to_pil(image))
            save_image(first, self.grid())
        elif self.modality == "sequence":
            first = folder / "logo.png"
            write_text(folder / "samples.fasta", self.fasta())
            save_figure(first, self.logo())
            save_figure(folder / "rewards.png", self.distributions())
        elif self.modality == "audio":
            rates = self.result.samples.context["sampling_rate"]
            for p, prompt in enumerate(self.prompts):
                path, sound = f"{p:03d}-{slug(prompt)}", self.result.samples.data[p]
                write_wav(folder / "sounds" / f"{path}.wav", sound, int(rates[p]))
                shown = to_pil(spectrogram_picture(sound, int(rates[p])))
                save_image(folder / "sounds" / f"{path}.png", shown)
            first = folder / "sounds"
        elif self.modality == "text":
            first = folder / "samples.txt"
            write_text(first, "".join(" ".join(t.split()) + "\n" for t in self.result.samples.data))
        write_text(folder / "README.md", self.readme(environment))
        figure = lineage_figure(self.result, self.prompts, self.num_steps, self.threshold)
        save_figure(folder / "lineage.png", figure)
        return first

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
            "The guiding reward rises because it was asked to; whether the samples became better "
            "is for the held-out rewards and your eyes to say, and a handful of prompts is no "
            "proof.",
            "",
            f"{self.roots()}.",
            "",
            "| file | what it is |",
            "| --- | --- |",
            *_FILES.get(self.modality, ()),
            "| `scores.jsonl` | one line per particle: scores, log-weight, root, whether chosen |",
            "| `lineage.png` | who descends from whom, and the effective sample size |",
            "| `config.yaml` | repeats it: `diffreward steer --config config.yaml --output NEW` |",
            "| `env.json` | versions, device, seed, time taken |",
            "",
        ]
        return "\n".join(lines)


_FILES = {
    "image": (
        "| `grid.png` | prompts down, ways of sampling across; the unsteered column is each "
        "prompt's first plain sample |",
        "| `images/` | the steered picture of every prompt |",
    ),
    "sequence": (
        "| `samples.fasta` | every prompt's steered sequence, and all plain ones if any were "
        "drawn, with their rewards |",
        "| `logo.png` | letters by position, in bits: all plain particles, and all steered ones "
        "by their weights; the dotted line is what as many random letters would show. Copies of "
        "one particle look like conservation: see `lineage.png` |",
        "| `rewards.png` | every value of every reward, by way of sampling; bars are means |",
    ),
    "audio": ("| `sounds/` | the steered sound of every prompt, and its spectrogram |",),
    "text": ("| `samples.txt` | the steered text of every prompt, one a line |",),
}
"""Modality -> lines of the README's table."""


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

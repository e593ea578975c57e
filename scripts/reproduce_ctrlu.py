"""Ctrl-U's claim in shape: do uncertainty weights help reward finetuning of conditional generation?

    python scripts/reproduce_ctrlu.py --output runs/ctrlu            # 1 core hour; resumable
    python scripts/reproduce_ctrlu.py --output runs/ctrlu --report   # tables and figures only
    python scripts/reproduce_ctrlu.py --output runs/tiny --tiny      # a minute: does it run

After Zhang et al. 2024, arXiv:2410.11236, whose comparison with ControlNet++ has other numbers of
steps, times and passes in its two arms. Here all arms have equal updates, pictures, noise and
thresholds, and the controls that are missing there: two passes without weights, the penalty alone,
and weights at random places.

The embedded ControlNet is finetuned to keep a *segmentation* (colour regions of drawn scenes), by
the loss of a segmenter that is deliberately **biased**: a small network trained on drawings in
which two colours have each other's labels (`BIASES`). A model can please it by painting a shape in
the other colour. A second and a third segmenter mislabel two other colours each. In G, H and L they
only say where they disagree with the first; in J and K the mean of the three is the reward; in M it
is the exact colours, as a ceiling. A third of the pictures, in training and evaluation, show what
the first one mislabels.

**Evaluators are never trained on**: the exact colours (`control_miou`), and a larger segmenter
without bias and of another seed. The *hacking gap* is the mean IoU that the biased segmenter sees
minus that of the exact colours; *there* is the third of the conditions that shows what the first
segmenter mislabels. Evaluation is on full chains from conditions that no training has seen, from
the same noise in all arms. Intervals are of differences to ControlNet++ (arm B), bootstrapped over
conditions and seeds.

**Does U find errors?** On the ControlNet before finetuning, pictures are noised to a time and
predicted in one step; an error is a pixel of the prediction to which the biased segmenter gives
another class than its exact colour has. AUROC of each signal against these errors. And what the
weights of an ensemble do on the way from the right colour to the one that pleases (`landscape`).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from experiment import interval, load, load_data, same_sizes, save_data
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from diffreward import Samples, load_policy, make_reward, rollout, sample_generators
from diffreward.algorithms import make_algorithm
from diffreward.algorithms.ctrl_u import CtrlU
from diffreward.controlled import SCENES, ControlledImages, read_controlled
from diffreward.files import plain, table, write_atomic, write_text
from diffreward.finetuning import finetune
from diffreward.pictures import Cell, image_grid, save_figure, save_image
from diffreward.rewards import Scores, evaluate_set
from diffreward.rewards.control import ControlReward, make_extractor
from diffreward.rewards.control_metrics import mean_iou
from diffreward.rewards.shapes import COLOURS, parse

TRAIN, EVAL, SEGMENTER = 0, 20_000, 40_000  # where in the endless row of scenes
EVAL_SEED = 10_000

CLASSES = ("white", *COLOURS)
Bias = tuple[str, str]
# colours that have each other's labels, of each member of the ensemble; the first is the reward
BIASES: list[Bias] = [("purple", "blue"), ("green", "yellow"), ("red", "orange")]


@dataclass(frozen=True)
class Arm:
    """A letter, a title, options of `CtrlU`, and what is rewarded: first, all, or exact."""

    letter: str
    title: str
    options: dict[str, Any]
    rewarded: str = "first"


_ONE = {"uncertainty": None}
_TWO = {"uncertainty": "two_timesteps"}
_MEMBERS = {"uncertainty": "members"}
ARMS = [
    Arm("A", "diffusion loss only", {**_ONE, "weight": 0.0, "penalty": 0.0}),
    Arm("B", "ControlNet++, one pass", _ONE),
    Arm("C", "two passes, uniform", {**_ONE, "both_passes": True}),
    Arm("D", "w = 1, lambda U", {**_TWO, "weigh": False}),
    Arm("E", "w only", {**_TWO, "penalty": 0.0}),
    Arm("F", "Ctrl-U as published", {"preset": "paper"}),
    Arm("G", "ensemble, detached", {**_MEMBERS, "penalty": 0.0}),
    Arm("H", "G at random places", {**_MEMBERS, "penalty": 0.0, "shuffled": True}),
    Arm("I", "w only, 50 times apart", {**_TWO, "penalty": 0.0, "interval": 0.05}),
    Arm("J", "mean of the ensemble", _ONE, "all"),
    Arm("K", "J weighted by it", {**_MEMBERS, "penalty": 0.0}, "all"),
    Arm("L", "G with gradient in w", {**_MEMBERS, "penalty": 0.0, "faithful": True}),
    Arm("M", "exact colours", _ONE, "exact"),
]
BASELINE = "B"


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        pictures: scenes that are learnt from.
        iterations: updates.
        batch: pictures in an update.
        learning_rate: of AdamW, falling to 0.
        weight, max_time: mu and t_thr of all arms.
        num_steps: T of evaluations.
        conditions: of the evaluation.
        samples: of each.
        segmenter_pictures, segmenter_steps: that the segmenters learn from, and for how long.
        probed: pictures of the measurement of U.
    """

    pictures: int = 384
    iterations: int = 40
    batch: int = 16
    learning_rate: float = 3e-4
    weight: float = 1.0
    max_time: float = 0.6
    num_steps: int = 10
    conditions: int = 64
    samples: int = 2
    segmenter_pictures: int = 768
    segmenter_steps: int = 250
    probed: int = 64


FULL = Sizes()
TINY = Sizes(
    pictures=8, iterations=2, batch=4, num_steps=2, conditions=4, samples=2,
    segmenter_pictures=16, segmenter_steps=2, probed=4, max_time=0.9,
)  # fmt: skip
TIMES = (100, 200, 400, 600)  # of 1000, at which U is measured


# --------------------------------------------------------------------------------------------
# Scenes
# --------------------------------------------------------------------------------------------


def shows(caption: str, bias: Bias) -> bool:
    """Whether a scene has one of the colours."""
    return any(item.colour in bias for item in parse(caption).items)


def chosen(first: int, count: int) -> ControlledImages:
    """Scenes from a number on: every third shows what the first segmenter mislabels."""
    source = read_controlled(SCENES, "segmentation", first=first, count=16 * count)
    with_bias = [i for i, caption in enumerate(source.prompts) if shows(caption, BIASES[0])]
    other = [i for i, caption in enumerate(source.prompts) if not shows(caption, BIASES[0])]
    third = min(len(with_bias), count // 3)
    return source.take([*with_bias[:third], *other[: count - third]])


def labels(images: Float[Tensor, "b 3 h w"], bias: Bias | None) -> Int[Tensor, "b h w"]:
    """Classes of pixels, -1 at blended edges; with the bias."""
    found = make_extractor("segmentation").target(images)
    if bias is None:
        return found
    a, b = map(CLASSES.index, bias)
    return torch.where(found == a, b, torch.where(found == b, a, found))


# --------------------------------------------------------------------------------------------
# Segmenters
# --------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """A small U-Net: pictures -> logits of `CLASSES`, of the same size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.enter = self._block(3, w)
        self.down = nn.ModuleList([self._block(w, 2 * w), self._block(2 * w, 4 * w)])
        self.up = nn.ModuleList([self._block(6 * w, 2 * w), self._block(3 * w, w)])
        self.leave = nn.Conv2d(w, len(CLASSES), 1)

    @staticmethod
    def _block(a: int, b: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU(),
            nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        x, kept = self.enter(2 * images - 1), []
        for block in self.down:
            kept.append(x)
            x = block(F.avg_pool2d(x, 2))
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), kept.pop()], dim=1))
        return self.leave(x)


@torch.enable_grad()
def train_segmenter(
    path: Path, sizes: Sizes, width: int, seed: int, bias: Bias | None
) -> Segmenter:
    """Trained on drawn scenes, flipped and a little noisy; kept in ``path``."""
    torch.manual_seed(seed)
    net = Segmenter(width)
    if path.exists():
        net.load_state_dict(load_file(path))
        return net.eval().requires_grad_(False)
    source = chosen(SEGMENTER + 20_000 * seed, sizes.segmenter_pictures)
    drawn = source.load(range(len(source)))
    y = labels(drawn.data, bias)
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, sizes.segmenter_steps + 1)
    for _ in range(sizes.segmenter_steps):
        rows = torch.randint(len(y), (16,))
        x, target = drawn.data[rows], y[rows]
        if torch.rand(()) < 0.5:
            x, target = x.flip(-1), target.flip(-1)
        x = (x + 0.1 * torch.rand(16, 1, 1, 1) * torch.randn_like(x)).clamp(0, 1)
        loss = F.cross_entropy(net(x), target, ignore_index=-1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    write_atomic(path, lambda p: save_file(net.state_dict(), p))
    return net.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------
# The laboratory
# --------------------------------------------------------------------------------------------


class Watched(ControlReward):
    """The first segmenter is the reward; the others only say where they disagree."""

    def __call__(self, samples: Samples) -> Scores:
        return ControlReward(self.members[0])(samples)

    def loss_maps(self, predictions, target):
        return super().loss_maps(predictions, target)[:1]


class Lab:
    """Models, data and rewards; what takes long is made once and kept in the folder."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes

    @cached_property
    def _loaded(self):
        return load_policy(
            "embedded:emoji", controlnet="embedded:controlnet", num_steps=self.sizes.num_steps,
            guidance_scale=1.0,
        )  # fmt: skip

    def policy(self):
        """A fresh one: training changes the ControlNet."""
        loaded = self._loaded
        return load_policy(
            loaded.pipe, controlnet=copy.deepcopy(loaded.denoiser), guidance_scale=1.0,
            num_steps=self.sizes.num_steps,
        )  # fmt: skip

    @cached_property
    def train(self) -> ControlledImages:
        return chosen(TRAIN, self.sizes.pictures)

    @cached_property
    def eval(self) -> Samples:
        source = chosen(EVAL, self.sizes.conditions)
        return source.load(range(len(source)))

    @cached_property
    def members(self) -> list[Segmenter]:
        return [
            train_segmenter(self.folder / f"segmenter{k}.safetensors", self.sizes, 16, k, bias)
            for k, bias in enumerate(BIASES)
        ]

    @cached_property
    def evaluator(self) -> Segmenter:
        path = self.folder / "evaluator.safetensors"
        return train_segmenter(path, self.sizes, 24, len(BIASES), None)

    def extractor(self, net: Segmenter):
        return make_extractor({"name": "segmentation", "model": net, "palette": "shapes"})

    def reward(self, arm: Arm) -> ControlReward:
        if arm.rewarded == "exact":
            return ControlReward("segmentation")
        whole = arm.rewarded == "all" or arm.options.get("uncertainty") == "members"
        nets = self.members if whole else self.members[:1]
        kind = ControlReward if arm.rewarded == "all" else Watched
        return kind([self.extractor(net) for net in nets], name="segmenters")

    @torch.no_grad()
    def draw(self, policy) -> Float[Tensor, "n 3 h w"]:
        """Of every condition of the evaluation, its samples in turn."""
        found, k = [], self.sizes.samples
        for rows in torch.arange(len(self.eval)).split(max(1, 32 // k)):
            few = self.eval.take(rows)
            condition = policy.encode(few.prompts, control=few.context["control"]).repeat(k)
            noise = sample_generators(EVAL_SEED, len(rows), k, first_prompt=int(rows[0]))
            found.append(policy.decode(rollout(policy, condition, noise).final, condition).data)
        return torch.cat(found)

    @torch.no_grad()
    def judge(self, images: Float[Tensor, "n 3 h w"]) -> dict[str, Any]:
        """Numbers of each sample, and of the set."""
        k = self.sizes.samples
        control = self.eval.context["control"].repeat_interleave(k, 0)
        exact = make_extractor("segmentation")
        target = exact.target(control)

        def iou(extractor) -> Float[Tensor, " n"]:
            parts = [extractor(part).argmax(1) for part in images.split(64)]
            return mean_iou(torch.cat(parts), target, len(CLASSES))

        biased = iou(self.extractor(self.members[0]))
        found = {
            "miou": iou(exact), "evaluator": iou(self.extractor(self.evaluator)), "biased": biased,
        }  # fmt: skip
        found["gap"] = biased - found["miou"]
        pairs = images.unflatten(0, (-1, k))
        distance = torch.stack([torch.pdist(p.flatten(1)).mean() for p in pairs])
        found["diversity"] = distance / images[0].numel() ** 0.5
        frechet = make_reward(
            {"name": "frechet", "exemplars": replace_context(self.eval), "shrinkage": 0.1}
        )
        value = -evaluate_set(frechet, Samples(images, "image")).total
        return {name: v.double().tolist() for name, v in found.items()} | {"frechet": value}


def replace_context(samples: Samples) -> Samples:
    """The pictures alone."""
    return Samples(samples.data, samples.modality)


def perform(lab: Lab, output: Path, arm: Arm | None, seed: int) -> dict[str, Any]:
    """Train an arm (None: nothing), draw, judge; what is there is not done again."""
    name = "pretrained" if arm is None else f"{arm.letter}-seed{seed}"
    if (found := load(output, name)) is not None:
        return found
    path = output / name / "row.json"
    row: dict[str, Any] = {"arm": None if arm is None else arm.letter, "seed": seed}
    policy, started = lab.policy(), time.process_time()
    if arm is not None:
        sizes = lab.sizes
        options = {"weight": sizes.weight, "max_time": sizes.max_time, **arm.options}
        result = finetune(
            policy, lab.reward(arm), {"name": "ctrl_u", **options}, data=lab.train,
            eval_data=lab.train.take([0, 1]), method="full", iterations=sizes.iterations,
            learning_rate=sizes.learning_rate, schedule="linear", prompts_per_update=sizes.batch,
            samples_per_prompt=1, seed=seed, evaluate_every=0, eval_samples=1,
            checkpoint_every=0, loggers=[], progress=False,
        )  # fmt: skip
        if result.stopped == "signal":
            raise KeyboardInterrupt
        seconds = time.process_time() - started
        rows = [[r[f"{way}_rows"] for r in result.metrics] for way in ("forward", "backward")]
        names = ("loss", *CtrlU.logged)
        row |= {
            "options": options, "seconds_per_update": seconds / sizes.iterations,
            "rows_per_update": [float(np.mean(r)) for r in rows],
            "curve": {n: [r[n] for r in result.metrics if n in r] for n in names},
            "reward": [r["reward"] for r in result.metrics if "reward" in r],
        }  # fmt: skip
    images = lab.draw(policy)
    row |= lab.judge(images)
    stored = (images * 255).round().clamp(0, 255).to(torch.uint8)
    save_data(path.parent / "samples.safetensors", stored)
    write_text(path, json.dumps(plain(row)) + "\n")
    return row


# --------------------------------------------------------------------------------------------
# Does U find errors?
# --------------------------------------------------------------------------------------------


def auroc(score: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Probability that a positive one scores higher than another, ties counting half."""
    from scipy.stats import rankdata

    wrong = positive.numpy()
    if wrong.all() or not wrong.any():
        return float("nan")
    ranks = rankdata(score.double().numpy())
    n = wrong.sum()
    return float((ranks[wrong].sum() - n * (n + 1) / 2) / (n * (len(wrong) - n)))


@torch.no_grad()
def probe(lab: Lab, output: Path) -> dict[str, Any]:
    """AUROC of the signals at several times, and how large U and w are."""
    path = output / "probe.json"
    if path.exists():
        return json.loads(path.read_text())
    policy, source = lab.policy(), chosen(EVAL, lab.sizes.probed)
    drawn = source.load(range(len(source)))
    alone = ControlReward(lab.extractor(lab.members[0]))
    together = ControlReward([lab.extractor(net) for net in lab.members])
    exact, found = make_extractor("segmentation"), {}
    for t in TIMES:
        columns: dict[str, list[Tensor]] = {}
        for rows in torch.arange(len(drawn)).split(16):
            few = drawn.take(rows)
            condition = policy.encode(few.prompts, control=few.context["control"])
            x0 = policy.encode_samples(few)
            rng = torch.Generator().manual_seed(t + int(rows[0]))
            eps, other = (torch.randn(x0.shape, generator=rng) for _ in range(2))

            def predicted(time: float, noise: Tensor) -> Tensor:
                u = torch.full((len(rows),), (time + 0.5) / 1000)  # noqa: B023
                return policy.decode(policy.denoise(x0, u, noise, condition)[0], condition).data  # noqa: B023

            first = predicted(t, eps)
            opinion = alone.extract(first)
            seconds = {
                "two times, 1 apart": [alone.extract(predicted(t + 1, eps))],
                "two times, 50 apart": [alone.extract(predicted(t + 50, eps))],
                "two noises": [alone.extract(predicted(t, other))],
                "augmentation": alone.opinions(first, "tta")[1:],
                "ensemble": together.opinions(first, "members")[1:],
            }
            signals = {
                name: torch.stack([alone.divergence(o, opinion) for o in others]).mean(0)
                for name, others in seconds.items()
            }
            p = opinion.softmax(1)
            signals["entropy"] = -(p * p.clamp(min=1e-12).log()).sum(1)
            truth = exact.target(first)
            known = truth >= 0
            signals["wrong"] = (opinion.argmax(1) != truth).float()
            for name, signal in signals.items():
                columns.setdefault(name, []).append(signal[known])
        flat = {name: torch.cat(parts) for name, parts in columns.items()}
        wrong = flat.pop("wrong").bool()
        found[str(t)] = {
            "wrong": wrong.double().mean().item(),
            "auroc": {name: auroc(signal, wrong) for name, signal in flat.items()},
            "mean": {name: signal.mean().item() for name, signal in flat.items()},
            "below": {name: ((-signal).exp() < 0.99).double().mean().item()
                      for name, signal in flat.items()},
        }  # fmt: skip
    write_text(path, json.dumps(plain(found), indent=2) + "\n")
    return found


BLENDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def landscape(lab: Lab) -> dict[str, list[float]]:
    """Means over the pixels of one colour, on the way from it to the one that the reward mistakes.

    Pictures of the evaluation, in which the first colour of `BIASES` is blended with the other. A
    *pull* is minus the derivative of a loss by the share of the wrong colour: above 0, it is
    painted in.
    """
    exact, true = make_extractor("segmentation"), lab.eval.data
    right, wrong = BIASES[0]
    marked = exact.target(true) == CLASSES.index(right)
    rows = marked.flatten(1).any(1).nonzero()[:, 0]
    images, marked = true[rows], marked[rows]
    way = torch.tensor([b - a for a, b in zip(COLOURS[right], COLOURS[wrong], strict=True)]) / 255
    reward = ControlReward([lab.extractor(net) for net in lab.members])
    target, found = exact.target(images), {"share of the wrong colour": list(BLENDS)}
    for share in BLENDS:
        moved = images + share * way.view(1, 3, 1, 1) * marked[:, None]
        moved = moved.clamp(0, 1).requires_grad_()
        first, *others = reward.read(moved)
        loss = reward.loss_maps([first, *others], target)[0]
        u = torch.stack([reward.divergence(other, first) for other in others]).mean(0)
        w = torch.exp(-u)
        values = {"l": loss, "U": u, "w": w, "w l": w * loss}
        losses = {"no weights": loss, "w": w.detach() * loss, "gradient in w": w * loss}
        for name, each in losses.items():
            (slope,) = torch.autograd.grad(each[marked].sum(), moved, retain_graph=True)
            values[f"pull, {name}"] = -(slope * way.view(1, 3, 1, 1)).sum(1)
        for name, each in values.items():
            found.setdefault(name, []).append(each[marked].mean().item())
    return found


# --------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------

MEASURES = {
    "miou": "mIoU, exact colours", "miou_shown": "there", "evaluator": "mIoU, larger segmenter",
    "biased": "mIoU, biased segmenter", "gap": "hacking gap", "gap_shown": "there",
    "diversity": "diversity",
}  # fmt: skip


def per_condition(row: dict, name: str, samples: int) -> np.ndarray:
    values = np.array(row[name])
    return values if name == "diversity" else values.reshape(-1, samples).mean(1)


def tables(found: dict[str, list[dict]], before: dict, samples: int) -> str:
    """Means of every arm, and differences to the baseline."""
    header = ["arm", "seeds", *MEASURES.values(), "Frechet"]
    means = [["pretrained", "-", *(f"{np.mean(before[n]):.3f}" for n in MEASURES),
              f"{before['frechet']:.4f}"]]  # fmt: skip
    differences, costs = [], []
    reference = {row["seed"]: row for row in found.get(BASELINE, [])}
    for arm in ARMS:
        rows = found.get(arm.letter, [])
        if not rows:
            continue
        title = f"{arm.letter} {arm.title}"
        numbers = [f"{np.mean([np.mean(r[n]) for r in rows]):.3f}" for n in MEASURES]
        frechet = f"{np.mean([r['frechet'] for r in rows]):.4f}"
        means.append([title, str(len(rows)), *numbers, frechet])
        paired = [row for row in rows if row["seed"] in reference]
        if arm.letter != BASELINE and paired:
            cells = []
            for name in MEASURES:
                d = np.stack([
                    per_condition(r, name, samples)
                    - per_condition(reference[r["seed"]], name, samples)
                    for r in paired
                ])  # fmt: skip
                mean, low, high = interval(d)
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            differences.append([title, *cells])
        curve = {name: np.nanmean([v for r in rows for v in r["curve"].get(name, [])] or [np.nan])
                 for name in CtrlU.logged}  # fmt: skip
        seconds = np.mean([r["seconds_per_update"] for r in rows])
        forward, backward = np.mean([r["rows_per_update"] for r in rows], axis=0)
        costs.append([
            title, f"{seconds:.2f}", f"{forward:.1f}", f"{backward:.1f}",
            f"{curve['uncertainty']:.2g}", f"{curve['pixel_weight']:.4f}",
            f"{curve['pixel_weight_ess']:.4f}",
        ])  # fmt: skip
    cost_header = ["arm", "CPU s per update", "rows", "rows with gradient", "mean U", "mean w",
                   "ESS of w"]  # fmt: skip
    parts = [
        "### Means over seeds, conditions and samples (there: mislabelled scenes)",
        table(header, means, markdown=True),
        f"### Differences to {BASELINE} [95 % interval over conditions and seeds]",
        table(["arm", *MEASURES.values()], differences, markdown=True),
        "### What an update costs, and what the weights do",
        table(cost_header, costs, markdown=True),
    ]  # fmt: skip
    return "\n\n".join(parts)


def probe_table(found: dict[str, Any]) -> str:
    names = list(next(iter(found.values()))["auroc"])
    header = ["t of 1000", "wrong pixels", *names]
    rows = [
        [t, f"{100 * f['wrong']:.1f} %", *(f"{f['auroc'][n]:.3f}" for n in names)]
        for t, f in found.items()
    ]
    below = [
        [t, f"{f['mean']['two times, 1 apart']:.2g}",
         *(f"{100 * f['below'][n]:.2f} %" for n in names)] for t, f in found.items()
    ]  # fmt: skip
    return "\n\n".join([
        "### AUROC of U against errors of the biased segmenter, per pixel",
        table(header, rows, markdown=True),
        "### Pixels with exp(-U) below 0.99",
        table(["t of 1000", "mean U, 1 apart", *names], below, markdown=True),
    ])  # fmt: skip


def landscape_table(found: dict[str, list[float]]) -> str:
    lines = [[f"{x:.3g}" for x in line] for line in zip(*found.values(), strict=True)]
    return "\n\n".join([
        f"### From {BIASES[0][0]}, which is asked for, to {BIASES[0][1]}, with the ensemble's U",
        table(list(found), lines, markdown=True),
    ])  # fmt: skip


def plot(found: dict[str, list[dict]], samples: int, path: Path) -> None:
    """Differences to the baseline with their intervals."""
    from matplotlib.figure import Figure

    reference = {row["seed"]: row for row in found.get(BASELINE, [])}
    arms = [a for a in ARMS if a.letter != BASELINE and found.get(a.letter)]
    figure = Figure(figsize=(11, 1.2 + 0.35 * len(arms)), layout="constrained")
    names = ("miou", "miou_shown", "biased", "gap")
    axes = figure.subplots(1, len(names), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for y, arm in enumerate(arms):
            rows = [r for r in found[arm.letter] if r["seed"] in reference]
            d = np.stack([per_condition(r, name, samples)
                          - per_condition(reference[r["seed"]], name, samples)
                          for r in rows])  # fmt: skip
            mean, low, high = interval(d)
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color="C0")
        axis.axvline(0, color="grey", lw=0.8)
        where = "mislabelled scenes, " if name.endswith("_shown") else ""
        axis.set(xlabel=f"{MEASURES[name.removesuffix('_shown')]}\n{where}minus {BASELINE}")
        axis.set_yticks(range(len(arms)), [f"{a.letter} {a.title}" for a in arms])
        axis.xaxis.label.set_size(8)
    axes[0].invert_yaxis()
    save_figure(path, figure, trim=True)


def grid(lab: Lab, output: Path, found: dict[str, list[dict]], path: Path, most: int = 6) -> None:
    """Conditions down; across the picture it was read off, the pretrained model, and the arms."""
    k = lab.sizes.samples
    columns = {"control": lab.eval.context["control"], "picture": lab.eval.data}
    columns["pretrained"] = load_data(output / "pretrained" / "samples.safetensors")[::k]
    for arm in ARMS:
        if rows := found.get(arm.letter):
            folder = output / f"{arm.letter}-seed{rows[0]['seed']}"
            columns[f"{arm.letter}"] = load_data(folder / "samples.safetensors")[::k]
    rows = []
    step = max(1, len(lab.eval) // most)
    for i in range(0, len(lab.eval), step):
        cells = [Cell(v[i].float() / (255 if v.dtype == torch.uint8 else 1))
                 for v in columns.values()]  # fmt: skip
        rows.append((lab.eval.prompts[i], cells))
    save_image(path, image_grid(list(columns), rows[:most], smallest=96))


def report(args, lab: Lab) -> None:
    before = args.output / "pretrained" / "row.json"
    if not before.exists():
        print(f"there are no finished runs in {args.output}, so there is nothing to report")
        return
    shown = np.array([shows(caption, BIASES[0]) for caption in lab.eval.prompts])

    def read(path: Path) -> dict:
        """A row, and of what the first segmenter mislabels the measures that are called "there"."""
        row = json.loads(path.read_text())
        there = {f"{n}_shown": np.array(row[n])[shown.repeat(lab.sizes.samples)]
                 for n in ("miou", "gap")}  # fmt: skip
        return row | there

    found: dict[str, list[dict]] = {}
    for path in sorted(args.output.glob("?-seed*/row.json")):
        row = read(path)
        found.setdefault(row["arm"], []).append(row)
    texts = [tables(found, read(before), lab.sizes.samples)]
    if (path := args.output / "probe.json").exists():
        texts.append(probe_table(json.loads(path.read_text())))
        texts.append(landscape_table(landscape(lab)))
    print(text := "\n\n".join(texts))
    write_text(args.output / "report.md", text + "\n")
    if BASELINE in found and len(found) > 1:
        plot(found, lab.sizes.samples, args.output / "ctrlu_arms.png")
    grid(lab, args.output, found, args.output / "ctrlu_samples.png")


def main(argv: list[str] | None = None) -> None:
    letters = [arm.letter for arm in ARMS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/ctrlu"))
    parser.add_argument("--arms", nargs="+", choices=letters, default=letters, metavar="LETTER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tiny", action="store_true", help="a minute: to see that it runs")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = TINY if args.tiny else FULL
    same_sizes(args.output, sizes)
    lab = Lab(args.output, sizes)
    if not args.report:
        arms = [arm for arm in ARMS if arm.letter in args.arms]
        for arm in arms:  # bad options are refused before anything is computed
            make_algorithm({"name": "ctrl_u", **arm.options})
        perform(lab, args.output, None, 0)
        probe(lab, args.output)
        for seed in args.seeds:
            for arm in tqdm(arms, unit="run", desc=f"seed {seed}"):
                row = perform(lab, args.output, arm, seed)
                tqdm.write(
                    f"{arm.letter} {arm.title}: mIoU {np.mean(row['miou']):.3f}, biased "
                    f"{np.mean(row['biased']):.3f}"
                )
    report(args, lab)


if __name__ == "__main__":
    main()

"""Do uncertain rewards keep a model from exploiting a biased one? By PRDP and by steering.

    python scripts/reproduce_uncertainty.py --output runs/uncertainty            # resumable
    python scripts/reproduce_uncertainty.py --output runs/uncertainty --report   # report only
    python scripts/reproduce_uncertainty.py --output runs/tiny --tiny            # does it run
    python scripts/reproduce_uncertainty.py --parts steer --only mean softmin --seeds 0

On the embedded image model, 10 steps, no guidance, prompts "a heart" to "a ring". What a picture
is worth is known: *the truth* is the rule of `reproduce_dragon.py`, 3 + (colourfulness + log
sharpness) / sqrt 2, both standardised over pictures of the pretrained model. Four *members* have
learnt it, each from 40 rated pictures of its own, none from those of another: kernel ridge
regressions on CLIP embeddings. The ratings of the first are raised by 2 where the picture is
*greenish* (the mean of its coloured pixels is nearer to green than to the six other colours of the
embedded data); its error is large, systematic, and shared by no other. Each seed has members of
its own. The report says how well they do on pictures that none of a seed has learnt from, and
whether they disagree where they are wrong.

Arms differ in what guides them, and in nothing else:

biased          the first member alone
mean            the mean of the four: the control, which has no uncertainty in it
mean_weighted   PRDP: the same, pairs weighted by the std of the four (``weigh_uncertainty``)
softmin         their soft minimum, beta 0.5
lcb             PRDP: mean - s, s the std of the four
terminal_1, _2  steering: ``uncertainty="terminal"`` on the mean, kappa 1 and 2
intermediate    steering: ``uncertainty="intermediate"`` on the mean
truth           the rule itself: the ceiling

*PRDP*: the seeds, noise, updates and learning rate of all arms are equal, and all but
mean_weighted ignore the std in the loss. Evaluated before, halfway and after, from the same noise.
The learning rate and its schedule were set after one run each of biased and mean, both on seed 0.
*Steering*: 8 particles, three lambdas. Of each prompt the particle that the guide likes best, which
is what a user would keep, and all particles, by their weights. *plain* is the mean of 8 plain
samples from the same noise, *best of 8* the one of them that the guide likes best.

Words: *believed gain* is what the guide says has been gained since the plain samples, *true gain*
what the rule says, both in units of ratings. *Gap* is believed minus true gain. A cautious guide
believes less by definition, so arms are compared by one yardstick: the *gap of the mean*, which
puts the mean of the four in the place of the guide. It says how far the four as they are have been
deceived. To be cautious is easily had by doing less, so the verdict is on the gap of the mean *at
equal true gain*: of both arms the curve of gap over true gain is followed (over iterations, over
lambdas) until it first reaches the highest true gain that both reach. Where that is not above 0
there is nothing to compare, and the difference is 0. Members learnt from few ratings underrate what
is better than all they have seen, so a gap may be negative where nobody is deceived: look at the
difference between arms, and at the share of greenish pictures.

Intervals are 95 %, by a bootstrap that draws seeds, and samples within them (steering: prompts),
the same for all arms. Three seeds, which is three sets of members, are few.

Sizes: 384 rated pictures; PRDP 6 rollouts of 6 prompts x 8 samples, 12 updates, the first half of
the steps, 48 pictures in an evaluation; 6 prompts in steering. That is 18 runs of PRDP, about 75 s
of one core each (130 s measured on a core shared with others), and 66 of steering, about 6 s each
(11 s): half an hour to an hour.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from experiment import load, load_data, same_sizes, save_data
from jaxtyping import Bool, Float
from reproduce_dragon import Aesthetics, Head, Images, Rule, correlation
from reproduce_dragon import Sizes as DomainSizes
from torch import Tensor
from tqdm import tqdm

from diffreward import Reward, RewardInfo, Samples, Scores, evaluate, make_reward, steer
from diffreward.files import plain, table, write_text
from diffreward.finetuning import finetune
from diffreward.pictures import save_figure
from diffreward.rewards import make_encoder
from diffreward.rewards.combine import Aggregate
from diffreward.rewards.shapes import COLOURS
from diffreward.rewards.towers import share_towers

MEMBERS = ("biased", "second", "third", "fourth")
BIAS = 2.0  # of the first member's ratings of greenish pictures
STEER_SEED = 40_000  # of noise, beside that of the ratings


@dataclass(frozen=True)
class Arm:
    """What guides: a member's name, "truth", or how the members are aggregated.

    Attributes:
        options: of the algorithm, or of `steer`.
    """

    title: str
    guide: str | Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def believed(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """The guide's value, from those of the members and the truth."""
        if isinstance(self.guide, str):
            return scores[self.guide]
        opinions = torch.tensor(np.stack([scores[name] for name in MEMBERS]))
        value, std = Aggregate(**self.guide)(opinions.flatten(1))
        if self.options.get("uncertainty") == "terminal":
            value = value - self.options["kappa"] * std
        return value.view(opinions.shape[1:]).numpy()


MEAN = {"how": "mean"}
SOFTMIN = {"how": "softmin", "beta": 0.5}
LCB = {"how": "lcb", "kappa": 1.0}
ARMS = {
    "prdp": {
        "biased": Arm("biased member", "biased"),
        "mean": Arm("mean", MEAN),
        "mean_weighted": Arm("mean, weighted", MEAN, {"weigh_uncertainty": True}),
        "softmin": Arm("softmin", SOFTMIN),
        "lcb": Arm("lcb", LCB),
        "truth": Arm("truth", "truth"),
    },
    "steer": {
        "biased": Arm("biased member", "biased"),
        "mean": Arm("mean", MEAN),
        "terminal_1": Arm("terminal, kappa 1", MEAN, {"uncertainty": "terminal", "kappa": 1.0}),
        "terminal_2": Arm("terminal, kappa 2", MEAN, {"uncertainty": "terminal", "kappa": 2.0}),
        "intermediate": Arm("intermediate", MEAN, {"uncertainty": "intermediate"}),
        "softmin": Arm("softmin", SOFTMIN),
        "truth": Arm("truth", "truth"),
    },
}
CONTROL, PLAIN = "mean", "plain"
TITLES = {"prdp": "PRDP", "steer": "Steering"}


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        num_steps: T.
        prompts: there are.
        rated: pictures of each prompt, of which members learn.
        ratings: of each member.
        samples: of each prompt in a rollout.
        iterations: rollouts; an even number.
        eval_samples: of each prompt in an evaluation.
        minibatches: updates of a rollout.
        step_fraction: share of the steps that is learnt from.
        learning_rate: of AdamW, falling to 0.
        particles: K.
        lmbdas: of steering, ascending.
    """

    num_steps: int = 10
    prompts: int = 6
    rated: int = 64
    ratings: int = 40
    samples: int = 8
    iterations: int = 6
    eval_samples: int = 8
    minibatches: int = 2
    step_fraction: float = 0.5
    learning_rate: float = 3e-3
    particles: int = 8
    lmbdas: tuple[float, ...] = (2.0, 8.0, 32.0)


FULL = Sizes()
TINY = Sizes(
    num_steps=2, prompts=2, rated=24, ratings=10, samples=2, iterations=2, eval_samples=2,
    minibatches=1, particles=2, lmbdas=(8.0,),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One arm and seed; ``lmbda`` of steering, 0 for plain samples."""

    part: str
    arm: str
    seed: int
    lmbda: float | None = None

    @property
    def name(self) -> str:
        strength = "" if self.lmbda is None else f"-lambda{self.lmbda:g}"
        return f"{self.part}/{self.arm}{strength}-seed{self.seed}"


def plan(args, sizes: Sizes) -> list[Run]:
    """All runs, in the order they are done: seed by seed, steering first, which is cheap."""
    runs: list[Run] = []
    for seed in args.seeds:
        if "steer" in args.parts:
            runs.append(Run("steer", PLAIN, seed, 0.0))
            arms = [arm for arm in ARMS["steer"] if arm in args.only]
            runs += [Run("steer", arm, seed, lmbda) for lmbda in sizes.lmbdas for arm in arms]
        if "prdp" in args.parts:
            runs += [Run("prdp", arm, seed) for arm in ARMS["prdp"] if arm in args.only]
    return runs


# --------------------------------------------------------------------------------------------
# Truth and members
# --------------------------------------------------------------------------------------------


def greenish(images: Float[Tensor, "b 3 h w"], ink: float = 0.25) -> Bool[Tensor, " b"]:
    """Whether the mean of the coloured pixels is nearer to green than to the other colours.

    A pixel is coloured if one of its channels is ``ink`` or more below white. A picture without any
    is not greenish.
    """
    coloured = ((1 - images).amax(1, keepdim=True) >= ink).to(images)
    count = coloured.sum((2, 3))
    mean = (images * coloured).sum((2, 3)) / count.clamp(min=1)
    palette = torch.tensor(list(COLOURS.values())).to(images) / 255
    nearest = torch.cdist(mean, palette).argmin(1)
    return (nearest == list(COLOURS).index("green")) & (count[:, 0] > 0)


class Greenish:
    """1 for a greenish picture, else 0: the mean is their share."""

    info = RewardInfo("greenish", modality="image")

    def __call__(self, samples: Samples) -> Scores:
        return Scores(greenish(samples.data).float())


class Truth(Rule):
    """The rule, by its name here."""

    info = RewardInfo("truth", modality="image")


class Member(Aesthetics):
    """A head on embeddings as a reward, with a name."""

    def __init__(self, name: str, encoder: Any, head: Head) -> None:
        super().__init__(encoder, head)
        self.info = RewardInfo(name, modality="image")


def train_members(
    features: Float[Tensor, "n d"],
    ratings: Float[Tensor, " n"],
    green: Bool[Tensor, " n"],
    each: int,
    seed: int = 0,
) -> tuple[list[Head], dict]:
    """Heads on disjoint parts, drawn with the seed; the first overrates what is green. And facts.

    Raises:
        ValueError: there are too few ratings for that and a test.
    """
    n, m = len(ratings), len(MEMBERS)
    if n < m * each + 3:
        raise ValueError(f"{m} members of {each} ratings need more than the {n} there are")
    *parts, test = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).split(
        [each] * m + [n - m * each]
    )
    raised = ratings.double() + BIAS * green.double()
    heads = [Head(features[p], (ratings if k else raised)[p]) for k, p in enumerate(parts)]
    opinions, truth = torch.stack([h(features[test]) for h in heads]), ratings[test].double()
    error, off, std = opinions - truth, green[test], opinions.std(0)
    facts = {
        name: {
            "ratings": each,
            "greenish among them": int(green[part].sum()),
            "ridge": head.ridge,
            "correlation with the truth": correlation(opinion, truth),
            "error, greenish": e[off].mean().item(),
            "error, others": e[~off].mean().item(),
        }
        for name, part, head, opinion, e in zip(MEMBERS, parts, heads, opinions, error, strict=True)
    }
    mean = opinions.mean(0)
    facts["mean"] = {
        "correlation with the truth": correlation(mean, truth),
        "error, greenish": (mean - truth)[off].mean().item(),
        "error, others": (mean - truth)[~off].mean().item(),
        "std, greenish": std[off].mean().item(),
        "std, others": std[~off].mean().item(),
        "correlation of std with the absolute error": correlation(std, (mean - truth).abs()),
    }
    facts["test"] = {"pictures": len(test), "greenish among them": int(off.sum())}
    return heads, facts


class Lab:
    """What runs share: the model, its rated pictures, the members, and the truth."""

    def __init__(self, sizes: Sizes, output: Path) -> None:
        self.sizes, self.output = sizes, output
        self.images = Images(
            DomainSizes(sizes.num_steps, sizes.prompts, sizes.samples, 1, rated=sizes.rated),
            output / "image",
        )
        self._judges: dict[int, dict[str, Reward]] = {}

    @cached_property
    def rated(self) -> tuple[Any, Tensor, Truth, Tensor]:
        """The encoder, embeddings of the rated pictures, the truth, and the ratings."""
        rated, encoder = self.images.rated, make_encoder("clip")
        with torch.no_grad():
            parts = [encoder(Samples(part, "image")) for part in rated.data.split(64)]
        truth = Truth(rated.data)
        return encoder, torch.cat(parts), truth, evaluate(truth, rated).value

    def judges(self, seed: int) -> dict[str, Reward]:
        """The members of this seed, the truth and the property, by name."""
        if seed not in self._judges:
            encoder, features, truth, ratings = self.rated
            green = greenish(self.images.rated.data)
            heads, facts = train_members(features, ratings, green, self.sizes.ratings, seed)
            path = self.output / f"members-seed{seed}.json"
            write_text(path, json.dumps(plain(facts), indent=2) + "\n")
            members = [Member(name, encoder, h) for name, h in zip(MEMBERS, heads, strict=True)]
            judges = [*members, truth, Greenish()]
            self._judges[seed] = {judge.info.name: judge for judge in judges}
        return self._judges[seed]

    def guide(self, arm: Arm, seed: int) -> Reward:
        judges = self.judges(seed)
        if isinstance(arm.guide, str):
            return judges[arm.guide]
        options = {"aggregate" if k == "how" else k: v for k, v in arm.guide.items()}
        members = [judges[name] for name in MEMBERS]
        return make_reward({"uncertain": {"reward": members, **options}})

    @torch.no_grad()
    def scores(self, samples: Samples, seed: int, batch: int = 64) -> dict[str, Tensor]:
        """Of all judges."""
        parts = [samples.take(rows) for rows in torch.arange(len(samples)).split(batch)]
        with share_towers():
            return {
                name: torch.cat([evaluate(judge, part).value for part in parts])
                for name, judge in self.judges(seed).items()
            }

    def perform(self, run: Run) -> dict | None:
        """None: interrupted."""
        guides = {PLAIN: Arm(PLAIN, "truth"), **ARMS[run.part]}
        reward = self.guide(guides[run.arm], run.seed)  # members are trained outside the time
        started = time.process_time()
        found, data = (self.trained if run.part == "prdp" else self.steered)(
            run, guides[run.arm], reward
        )
        if found is None:
            return None
        row = {**asdict(run), **found, "seconds": time.process_time() - started}
        save_data(self.output / run.name / "samples.safetensors", self.images.stored(data))
        write_text(self.output / run.name / "row.json", json.dumps(plain(row)) + "\n")
        return row

    def trained(self, run: Run, arm: Arm, reward: Reward) -> tuple[dict | None, Samples | None]:
        """PRDP: scores ``(3, n)`` before, halfway and after, and the last samples."""
        sizes = self.sizes
        algorithm = {
            "name": "prdp", "passes": 1, "minibatches": sizes.minibatches,
            "weigh_uncertainty": False, **arm.options,
        }  # fmt: skip
        options = {
            "learning_rate": sizes.learning_rate,
            "schedule": "linear", "iterations": sizes.iterations,
            "prompts_per_update": sizes.prompts // sizes.minibatches,
            "samples_per_prompt": sizes.samples, "step_fraction": sizes.step_fraction,
            "eval_samples": sizes.eval_samples, "evaluate_every": sizes.iterations // 2,
            "checkpoint_every": 0, "seed": run.seed,
        }  # fmt: skip
        judges = [judge for judge in self.judges(run.seed).values() if judge is not reward]
        with TemporaryDirectory() as folder:
            result = finetune(
                self.images.policy(), reward, algorithm, self.images.prompts, judges=judges,
                eval_prompts=self.images.prompts, output=Path(folder, "run"), loggers=[],
                progress=False, **options,
            )  # fmt: skip
            if result.stopped == "signal":
                return None, None
            paths = sorted(Path(folder, "run", "samples").glob("iteration-*.jsonl"))
            lines = [[json.loads(line) for line in p.read_text().splitlines()] for p in paths]
        found = {
            "algorithm": algorithm, "training": options, "warnings": result.warnings,
            "scores": {
                name: [[line["scores"][name] for line in time_] for time_ in lines]
                for name in self.judges(run.seed)
            },
            "kl": [[line["kl"] for line in time_] for time_ in lines],
        }  # fmt: skip
        return found, result.after.samples

    def steered(self, run: Run, arm: Arm, reward: Reward) -> tuple[dict, Samples]:
        """Scores ``(P * K,)`` of particles, which is best, their weights; the best samples."""
        plain_run = run.arm == PLAIN
        result = steer(
            self.images.policy(), reward, self.images.prompts, lmbda=run.lmbda,
            num_particles=self.sizes.particles, schedule=() if plain_run else None,
            seed=STEER_SEED + run.seed, progress=False, **arm.options,
        )  # fmt: skip
        found = {
            "scores": self.scores(result.particles, run.seed), "best": result.best,
            "weights": result.log_weights.softmax(1), "roots": result.roots.double().mean(),
        }  # fmt: skip
        return found, result.particles if plain_run else result.samples


def perform(args) -> None:
    sizes = TINY if args.tiny else FULL
    same_sizes(args.output, sizes)
    runs = plan(args, sizes)
    left = [run for run in runs if load(args.output, run.name) is None]
    print(f"{len(runs)} runs, {len(runs) - len(left)} done")
    lab = Lab(sizes, args.output)
    for run in tqdm(left, unit="run"):
        if load(args.output, run.name) is not None:  # by another process, meanwhile
            continue
        row = lab.perform(run)
        if row is None:
            print("interrupted; run the same command to go on")
            return
        tqdm.write(f"{run.name}: {row['seconds']:.0f} s")


# --------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """What an arm's samples are worth at each of its points, the first of which is the start.

    Attributes:
        seeds: in order.
        values: quantity -> (seeds, units, points); units are samples, of steering prompts.
    """

    seeds: tuple[int, ...]
    values: dict[str, np.ndarray]

    def gain(self, what: str) -> np.ndarray:
        """Since the first point; of ``gap`` and ``gap of the mean``: believed minus true gain."""
        if what in ("gap", "gap of the mean"):
            guide = {"gap": "guide", "gap of the mean": "mean"}[what]
            return self.gain(guide) - self.gain("truth")
        return self.values[what] - self.values[what][..., :1]

    def of(self, seeds: Sequence[int]) -> Curve:
        rows = [self.seeds.index(seed) for seed in seeds]
        return Curve(tuple(seeds), {name: v[rows] for name, v in self.values.items()})


def quantities(arm: Arm, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is followed: the guide's value, mean and std of the members, truth and property."""
    opinions = np.stack([scores[name] for name in MEMBERS])
    return {
        "guide": arm.believed(scores),
        "mean": opinions.mean(0),
        "std": opinions.std(0, ddof=1),
        "truth": scores["truth"],
        "greenish": scores["greenish"],
    }


def _scores(row: dict) -> dict[str, np.ndarray]:
    return {name: np.array(value, dtype=float) for name, value in row["scores"].items()}


def _stacked(seeds: list[int], found: list[dict[str, np.ndarray]]) -> Curve:
    return Curve(tuple(seeds), {name: np.stack([f[name] for f in found]) for name in found[0]})


def prdp_curves(rows: list[dict]) -> dict[str, Curve]:
    """By arm: before, halfway, after."""
    curves = {}
    for name, arm in ARMS["prdp"].items():
        mine = sorted((r for r in rows if r["arm"] == name), key=lambda r: r["seed"])
        found = [quantities(arm, {k: v.T for k, v in _scores(r).items()}) for r in mine]
        if found:
            curves[name] = _stacked([r["seed"] for r in mine], found)
    return curves


def chosen(values: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Of ``(P * K,)`` values that of the best of each prompt: (P,)."""
    return np.take_along_axis(values.reshape(len(best), -1), best[:, None], 1)[:, 0]


def steer_curves(rows: list[dict], of_all: bool = False) -> dict[str, Curve]:
    """By arm: plain, best of K, then the best particle at each lambda; by seeds that have all.

    With ``of_all``: plain, then the weighted mean of all particles at each lambda.
    """
    known = {(r["arm"], r["seed"], r["lmbda"]): r for r in rows}
    lmbdas = sorted({lmbda for arm, _, lmbda in known if arm != PLAIN})
    curves = {}
    for name, arm in ARMS["steer"].items():
        found, seeds = [], []
        for seed in sorted({seed for _, seed, _ in known}):
            runs = [known.get((name, seed, lmbda)) for lmbda in lmbdas]
            start = known.get((PLAIN, seed, 0.0))
            if not runs or None in runs or start is None:
                continue
            pool, prompts = quantities(arm, _scores(start)), len(start["best"])
            grouped = {k: v.reshape(prompts, -1) for k, v in pool.items()}
            points = [{k: v.mean(1) for k, v in grouped.items()}]
            if not of_all:
                best = grouped["guide"].argmax(1)
                points.append({k: chosen(v, best) for k, v in pool.items()})
            for r in runs:
                worth, best = quantities(arm, _scores(r)), np.array(r["best"])
                weights = np.array(r["weights"])
                points.append(
                    {
                        k: (v.reshape(prompts, -1) * weights).sum(1) if of_all else chosen(v, best)
                        for k, v in worth.items()
                    }
                )
            seeds.append(seed)
            found.append({k: np.stack([p[k] for p in points], 1) for k in points[0]})
        if found:
            curves[name] = _stacked(seeds, found)
    return curves


def resampled(seeds: int, units: int, draws: int = 4000) -> np.ndarray:
    """Weights (draws, seeds * units) whose products with values are means of bootstrap samples.

    Seeds are drawn with replacement, and units within each of those drawn.
    """
    rng = np.random.default_rng(0)
    weights = np.zeros((draws, seeds, units))
    counts = rng.multinomial(units, np.full(units, 1 / units), size=(draws, seeds))
    which = rng.integers(seeds, size=(draws, seeds))
    for k in range(seeds):
        weights[np.arange(draws), which[:, k]] += counts[:, k]
    return weights.reshape(draws, -1) / (seeds * units)


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is above or below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def interval(value: float, draws: np.ndarray) -> Estimate:
    return Estimate(float(value), *(float(q) for q in np.quantile(draws, [0.025, 0.975])))


def averaged(values: np.ndarray) -> Estimate:
    """Of values (seeds, units)."""
    return interval(values.mean(), resampled(*values.shape) @ values.ravel())


def gap_at(true: np.ndarray, gap: np.ndarray, level: float) -> float:
    """The gap where the true gain first reaches ``level``, by lines between points.

    Args:
        true, gap: at each point, the first of which is 0.
        level: 0 or more, and reached.
    """
    if level <= true[0]:
        return float(gap[0])
    k = int(np.argmax(true >= level))
    share = (level - true[k - 1]) / (true[k] - true[k - 1])
    return float(gap[k - 1] + share * (gap[k] - gap[k - 1]))


@dataclass(frozen=True)
class Comparison:
    """An arm against the control, seeds that both have; gaps are those of the mean.

    Attributes:
        level: the highest true gain that both reach, 0 if there is none.
        at_level: gap there, of the arm and of the control.
        difference: between these.
        true_gain, gap: differences at the last point.
    """

    level: float
    at_level: tuple[float, float]
    difference: Estimate
    true_gain: Estimate
    gap: Estimate

    @property
    def verdict(self) -> str:
        gap = {-1: "smaller", 0: "not told apart", 1: "larger"}[self.difference.sign]
        true = {-1: "lower", 0: "not told apart", 1: "higher"}[self.true_gain.sign]
        return f"gap {gap}; true gain at the end {true}"


def compare(arm: Curve, control: Curve) -> Comparison:
    """Whether an arm is deceived less than the control by the time it has gained as much."""
    seeds = [seed for seed in arm.seeds if seed in control.seeds]
    arm, control = arm.of(seeds), control.of(seeds)
    flat = [
        c.gain(what).reshape(-1, c.values["truth"].shape[-1])
        for c in (arm, control)
        for what in ("truth", "gap of the mean")
    ]

    def at_level(means: list[np.ndarray]) -> tuple[float, float, float]:
        true, gap, true_control, gap_control = means
        level = max(0.0, min(true.max(), true_control.max()))
        return level, gap_at(true, gap, level), gap_at(true_control, gap_control, level)

    weights = resampled(len(seeds), len(flat[0]) // len(seeds))
    drawn = [weights @ values for values in flat]
    level, mine, theirs = at_level([values.mean(0) for values in flat])
    differences = []
    for means in zip(*drawn, strict=True):
        _, a, b = at_level(list(means))
        differences.append(a - b)
    ends = [
        interval((x[:, -1] - y[:, -1]).mean(), (dx - dy)[:, -1])
        for x, y, dx, dy in zip(flat[:2], flat[2:], drawn[:2], drawn[2:], strict=True)
    ]
    difference = interval(mine - theirs, np.array(differences))
    return Comparison(level, (mine, theirs), difference, *ends)


# --------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------


def share(values: np.ndarray) -> str:
    return f"{100 * values.mean():.0f} %"


def prdp_table(curves: dict[str, Curve], rows: list[dict]) -> str:
    header = [
        "guide", "seeds", "true before", "believed gain", "true gain, halfway", "true gain", "gap",
        "gap of the mean", "greenish before", "after", "KL",
    ]  # fmt: skip
    lines = []
    for name, curve in curves.items():
        kl = np.mean([np.mean(r["kl"][-1]) for r in rows if r["arm"] == name])
        green = curve.values["greenish"]
        lines.append(
            [
                ARMS["prdp"][name].title, str(len(curve.seeds)),
                f"{curve.values['truth'][..., 0].mean():.2f}",
                f"{curve.gain('guide')[..., -1].mean():+.2f}",
                f"{curve.gain('truth')[..., 1].mean():+.2f}",
                *(str(averaged(curve.gain(w)[..., -1])) for w in ("truth", "gap")),
                str(averaged(curve.gain("gap of the mean")[..., -1])),
                share(green[..., 0]), share(green[..., -1]), f"{kl:.3g}",
            ]
        )  # fmt: skip
    return table(header, lines, markdown=True)


def steer_table(best: dict[str, Curve], of_all: dict[str, Curve], rows: list[dict]) -> str:
    header = [
        "guide", "lambda", "seeds", "believed gain", "true gain", "gap", "gap of the mean",
        "greenish", "roots", "all: true gain", "all: gap", "all: greenish",
    ]  # fmt: skip
    lmbdas = sorted({r["lmbda"] for r in rows if r["arm"] != PLAIN})
    lines = []
    for name, curve in best.items():
        for k, lmbda in enumerate([None, *lmbdas], start=1):
            roots = [r["roots"] for r in rows if (r["arm"], r["lmbda"]) == (name, lmbda)]
            line = [
                ARMS["steer"][name].title, "best of K" if lmbda is None else f"{lmbda:g}",
                str(len(curve.seeds)), f"{curve.gain('guide')[..., k].mean():+.2f}",
                *(str(averaged(curve.gain(w)[..., k])) for w in ("truth", "gap")),
                str(averaged(curve.gain("gap of the mean")[..., k])),
                share(curve.values["greenish"][..., k]),
                f"{np.mean(roots):.1f}" if roots else "-",
            ]  # fmt: skip
            every = of_all[name]
            if lmbda is None:
                line += ["-"] * 3
            else:
                line += [f"{every.gain(w)[..., k - 1].mean():+.2f}" for w in ("truth", "gap")]
                line.append(share(every.values["greenish"][..., k - 1]))
            lines.append(line)
    start = next(iter(of_all.values())).values
    plain_line = (
        f"Plain samples: truth {start['truth'][..., 0].mean():.2f}, "
        f"greenish {share(start['greenish'][..., 0])}."
    )
    return f"{table(header, lines, markdown=True)}\n\n{plain_line}"


def verdict_table(curves: dict[str, dict[str, Curve]]) -> str:
    """All arms but the ceiling against the control; empty without the control."""
    header = [
        "part", "guide", "true gain at the end", "gap at the end", "compared at true gain",
        "gap there", "the mean's gap there", "difference", "verdict",
    ]  # fmt: skip
    lines = []
    for part, found in curves.items():
        for name, curve in found.items():
            shared = CONTROL in found and set(curve.seeds) & set(found[CONTROL].seeds)
            if name in (CONTROL, "truth") or not shared:
                continue
            c = compare(curve, found[CONTROL])
            lines.append(
                [
                    TITLES[part], ARMS[part][name].title, str(c.true_gain), str(c.gap),
                    f"{c.level:.2f}", *(f"{g:+.2f}" for g in c.at_level), str(c.difference),
                    c.verdict,
                ]
            )  # fmt: skip
    return table(header, lines, markdown=True) if lines else ""


def members_table(facts: list[dict]) -> str:
    """Means over seeds."""
    columns = (
        "ratings", "greenish among them", "correlation with the truth", "error, greenish",
        "error, others", "std, greenish", "std, others",
        "correlation of std with the absolute error",
    )  # fmt: skip
    lines = []
    for name in (*MEMBERS, "mean"):
        found = [[f[name][c] for f in facts if f[name].get(c) is not None] for c in columns]
        lines.append([name, *(f"{np.mean(values):.3g}" if values else "" for values in found)])
    pictures, green = (
        np.mean([f["test"][name] for f in facts]) for name in ("pictures", "greenish among them")
    )
    return (
        f"{table(['member', *columns], lines, markdown=True)}\n\nMeans over {len(facts)} seeds; on "
        f"{pictures:.0f} pictures that no member has learnt from, {green:.0f} of them greenish."
    )


def report(args) -> None:
    found = [json.loads(p.read_text()) for p in sorted(args.output.glob("*/*/row.json"))]
    rows = {part: [r for r in found if r["part"] == part] for part in ARMS}
    curves = {"prdp": prdp_curves(rows["prdp"]), "steer": steer_curves(rows["steer"])}
    curves = {part: c for part, c in curves.items() if c}
    if not curves:
        print(f"there are no finished arms in {args.output}, so there is nothing to report")
        return
    texts, members = [], sorted(args.output.glob("members-seed*.json"))
    if members:
        facts = [json.loads(path.read_text()) for path in members]
        texts += ["### The members", members_table(facts)]
    if "prdp" in curves:
        texts += ["### PRDP", prdp_table(curves["prdp"], rows["prdp"])]
    if "steer" in curves:
        of_all = steer_curves(rows["steer"], of_all=True)
        texts += ["### Steering", steer_table(curves["steer"], of_all, rows["steer"])]
    if verdicts := verdict_table(curves):
        texts += ["### Against the mean (differences: arm - mean)", verdicts]
    text = "\n\n".join(texts)
    print(text)
    write_text(args.output / "report.md", text + "\n")
    plot(curves, args.output / "uncertainty.png")
    plot_samples(args.output)


def plot(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """True against believed gain: over training, and over lambda."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(curves), 4.6), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    names = dict.fromkeys(name for arms in ARMS.values() for name in arms)
    colours = {name: f"C{k}" for k, name in enumerate(names)}
    ends = {"prdp": "before, halfway, after", "steer": "plain, best of K, then by lambda"}
    for axis, (part, found) in zip(axes, curves.items(), strict=True):
        top = 0.0
        for name, curve in found.items():
            x, y = (curve.gain(w).mean((0, 1)) for w in ("guide", "truth"))
            axis.plot(x, y, "o-", ms=4, color=colours[name], label=ARMS[part][name].title)
            last = averaged(curve.gain("truth")[..., -1])
            axis.plot([x[-1]] * 2, [last.low, last.high], color=colours[name], lw=0.8)
            top = max(top, x.max(), y.max())
        axis.plot([0, top], [0, top], ":", color="grey", label="as believed")
        axis.set(title=f"{TITLES[part]}: {ends[part]}", xlabel="believed gain", ylabel="true gain")
        axis.title.set_fontsize(10)
        axis.legend(fontsize=7)
    save_figure(path, figure, trim=True)
    print(f"figure: {path}")


def plot_samples(output: Path, seed_of: int = 0) -> None:
    """Pictures of each finetuned model, from the same noise."""
    from matplotlib.figure import Figure

    prompts = json.loads((output / "sizes.json").read_text())["prompts"]
    paths = {
        arm.title: output / Run("prdp", name, seed_of).name / "samples.safetensors"
        for name, arm in ARMS["prdp"].items()
    }
    paths = {title: path for title, path in paths.items() if path.exists()}
    if not paths:
        return
    figure = Figure(figsize=(9, 0.7 * len(paths)), layout="constrained")
    axes = figure.subplots(len(paths), 1, squeeze=False)[:, 0]
    for axis, (title, path) in zip(axes, paths.items(), strict=True):
        data = load_data(path).unflatten(0, (prompts, -1))[:, :2].flatten(0, 1)
        axis.imshow(torch.cat(list(data), dim=2).permute(1, 2, 0).numpy())
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    save_figure(output / "uncertainty_samples.png", figure, trim=True)
    print(f"figure: {output / 'uncertainty_samples.png'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(dict.fromkeys(name for arms in ARMS.values() for name in arms))
    parser.add_argument("--output", type=Path, default=Path("runs/uncertainty"))
    parser.add_argument("--parts", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="of the arms")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2; with --tiny 0")
    parser.add_argument("--tiny", action="store_true", help="a minute: to see that it runs")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.seeds = args.seeds or ([0] if args.tiny else [0, 1, 2])
    if not args.report:
        perform(args)
    report(args)


if __name__ == "__main__":
    main()

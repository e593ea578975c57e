"""DRAGON's table in shape: twenty rewards, and what training on each does to all the others.

    python scripts/reproduce_dragon.py --output runs/dragon            # 1.5 core hours; resumable
    python scripts/reproduce_dragon.py --output runs/dragon --report   # tables and figures only
    python scripts/reproduce_dragon.py --output runs/tiny --tiny       # a minute: does it run
    python scripts/reproduce_dragon.py --only frechet_clip_warm dna_oracle --seeds 0 1

After Bai et al. 2025, arXiv:2504.15217, whose domain is music and whose itemised list of rewards
and hyper-parameters were not available. The families are the paper's, the rewards are those of
`TARGETS`: 16 on the embedded image model, 4 on the embedded model of bacterial DNA.

*of a sample*: a head on CLIP embeddings that has learnt ratings of the model's own images,
    clip_score; an oracle of regulatory DNA.
*sample to distribution*: Frechet distance of a sample's parts to those of exemplars (per-song in
    the paper), similarity to texts.
*of a set*: Frechet distance of a set to exemplars, which may be texts; Vendi score.

**Ratings.** The rule is explicit, so that what the head has learnt can be checked: with c the
colourfulness of an image (Hasler and Suesstrunk 2003) and s the log of its sharpness (1 + variance
of the Laplacian), each standardised over the rated images, the rating is 3 + (c + s) / sqrt 2,
rounded to 1, 2, 3, 4 or 5. The head is a kernel ridge regression; it is tested on 15 % of the
ratings and then trained on all, as the paper's. The rule itself, not rounded, is an evaluation that
is never trained on.

**Win rate** of a finetuned model against the pretrained one, on the training prompts and noise that
no training has seen; sample j of a prompt starts from the same noise in both models, and ties count
half. Rewards of a sample: the share of (prompt, j) in which the finetuned model's sample has the
higher reward. Rewards of a set: the share of R random subsets in which the finetuned model's subset
has the higher value. A subset has as many samples of each prompt as D1 and D2 have in training,
drawn without replacement, and the same (prompt, j) of both models. So the number depends on the
size of subsets: that of larger ones is nearer to 0 or 1. Subsets overlap, so it is no significance.
*By chance* is the win rate of the pretrained model with other noise: near 50 % for rewards of a
sample, and of sets whatever luck gives two sets.

**Ablations** on one reward of each kind: Diffusion-DPO (all others), KTO on the same pairs, KTO on
pairs of any two prompts. DPO needs pairs of one prompt, so unpaired is KTO only. Dataset and per-
sample Frechet distance as distinct objectives: both trained with the same encoder and exemplars,
both evaluated with both.

Everything is evaluated from the saved samples, which are rounded to 8 bits.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from experiment import load, load_data, same_sizes, save_data
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from diffreward import (
    Policy,
    Reward,
    RewardInfo,
    Samples,
    Scores,
    evaluate,
    load_policy,
    make_reward,
    rollout,
    sample_generators,
)
from diffreward.files import plain, table, write_text
from diffreward.finetuning import finetune
from diffreward.pictures import save_figure
from diffreward.rewards import SetReward, make_encoder, set_features
from diffreward.rewards.probes import laplacian_variance

PAPER = 0.8145  # average win rate of its 20 rewards
EVAL_SEED, CHANCE_SEED, RATED_SEED = 10_000, 20_000, 30_000  # of noise; training's is the run's

KINDS = {
    "sample": "of a sample",
    "per_sample": "sample to distribution",
    "set": "of a set",
}
ARMS = {
    "dpo": ("DPO, paired", {}),
    "kto": ("KTO, paired", {"preset": "kto"}),
    "kto_unpaired": ("KTO, unpaired", {"preset": "kto_unpaired"}),
}
ABLATED = ("aesthetics", "per_sample_clip_warm", "frechet_clip_warm")

SHAPES = ("heart", "star", "circle", "square", "triangle", "ring")
WARM = [f"{colour} {shape}" for colour in ("a red", "an orange", "a yellow") for shape in SHAPES]
UPSTREAM = "embedded:dna/natural_upstream.fasta"
WINDOWS = {"name": "kmers", "k": 3, "window": 50}


@dataclass(frozen=True)
class Target:
    """A reward: of which model's samples, its kind and title, and what `make_reward` takes."""

    domain: str
    kind: str
    title: str
    spec: Any = None


def frechet(exemplars: Any, encoder: Any = "clip", name: str = "frechet") -> dict:
    if isinstance(exemplars, str) and ":" not in exemplars:
        exemplars = f"embedded:exemplars/{exemplars}"
    return {"name": name, "exemplars": exemplars, "encoder": encoder, "shrinkage": 0.1}


def per_sample(exemplars: str, encoder: Any = "clip") -> dict:
    return frechet(exemplars, encoder, "per_sample_frechet")


TARGETS = {
    "aesthetics": Target("image", "sample", "aesthetics head"),
    "clip_score": Target("image", "sample", "CLIP score", "clip_score"),
    "vendi_clip": Target("image", "set", "Vendi, CLIP", "vendi"),
    "vendi_vae": Target(
        "image", "set", "Vendi, VAE", {"name": "vendi", "encoder": {"vae": {"pool": "flatten"}}}
    ),
    "frechet_clip_shapes": Target("image", "set", "Frechet, CLIP, shapes", frechet("shapes")),
    "frechet_clip_warm": Target("image", "set", "Frechet, CLIP, warm", frechet("shapes_warm")),
    "frechet_clip_blue": Target("image", "set", "Frechet, CLIP, blue", frechet("shapes_blue")),
    "frechet_clip_pairs": Target("image", "set", "Frechet, CLIP, pairs", frechet("pairs")),
    "frechet_vae_warm": Target("image", "set", "Frechet, VAE, warm", frechet("shapes_warm", "vae")),
    "frechet_vae_blue": Target("image", "set", "Frechet, VAE, blue", frechet("shapes_blue", "vae")),
    "frechet_text_warm": Target("image", "set", "Frechet, CLIP, warm texts", frechet(WARM)),
    "per_sample_clip_warm": Target(
        "image", "per_sample", "per-sample Frechet, CLIP, warm", per_sample("shapes_warm")
    ),
    "per_sample_clip_blue": Target(
        "image", "per_sample", "per-sample Frechet, CLIP, blue", per_sample("shapes_blue")
    ),
    "per_sample_clip_pairs": Target(
        "image", "per_sample", "per-sample Frechet, CLIP, pairs", per_sample("pairs")
    ),
    "per_sample_vae_warm": Target(
        "image", "per_sample", "per-sample Frechet, VAE, warm", per_sample("shapes_warm", "vae")
    ),
    "similarity_text_warm": Target(
        "image", "per_sample", "similarity, CLIP, warm texts",
        {"name": "exemplar_similarity", "exemplars": WARM},
    ),
    "dna_oracle": Target("dna", "sample", "regulatory oracle", "sequence_oracle"),
    "dna_vendi": Target("dna", "set", "Vendi, 3-mers", {"name": "vendi", "encoder": "kmers"}),
    "dna_frechet": Target(
        "dna", "set", "Frechet, 3-mers, upstream", frechet(UPSTREAM, "kmers")
    ),
    "dna_per_sample": Target(
        "dna", "per_sample", "per-sample Frechet, 3-mers, upstream", per_sample(UPSTREAM, WINDOWS)
    ),
}  # fmt: skip
# evaluated, and never trained on
JUDGES = {
    "rule": Target("image", "sample", "the rule of the ratings"),
    "clip_judge": Target("image", "sample", "held-out CLIP score", "clip_judge"),
    "dna_judge": Target("dna", "sample", "held-out oracle", "sequence_judge"),
}
EVALUATED = TARGETS | JUDGES
# (trained on sets, trained on samples): the same encoder and exemplars
DISTINCT = [
    ("frechet_clip_warm", "per_sample_clip_warm"),
    ("frechet_clip_blue", "per_sample_clip_blue"),
    ("frechet_clip_pairs", "per_sample_clip_pairs"),
    ("frechet_vae_warm", "per_sample_vae_warm"),
    ("dna_frechet", "dna_per_sample"),
]


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        num_steps: T.
        prompts: of a rollout, and of the evaluation.
        samples: of each in a rollout; half of them are D1, half D2.
        iterations: rollouts, with an update each.
        num_draws: of (time, noise) per sample.
        learning_rate: of AdamW, falling to 0.
        eval_samples: of each prompt in the evaluation.
        subsets: R, for rewards of sets.
        rated: images of each prompt that the aesthetics head learns.
    """

    num_steps: int
    prompts: int
    samples: int
    iterations: int
    num_draws: int = 4
    learning_rate: float = 3e-3
    eval_samples: int = 24
    subsets: int = 100
    rated: int = 64


# a run on images is about 3 minutes on a core, one on DNA 1
FULL = {
    "image": Sizes(num_steps=10, prompts=6, samples=16, iterations=8, num_draws=2),
    "dna": Sizes(num_steps=16, prompts=6, samples=8, iterations=12, learning_rate=1e-4),
}
_TINY = dict(prompts=2, samples=4, iterations=1, num_draws=1, eval_samples=4, subsets=10, rated=8)
TINY = {"image": Sizes(num_steps=2, **_TINY), "dna": Sizes(num_steps=3, **_TINY)}
TINY_TARGETS = (
    "aesthetics", "vendi_clip", "frechet_clip_warm", "per_sample_clip_warm", "dna_oracle",
    "dna_frechet",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One reward, arm and seed; without a target it is the pretrained model with other noise."""

    domain: str
    target: str | None
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.target or 'pretrained'}-{self.arm}-seed{self.seed}"


def plan(args) -> list[Run]:
    """All runs, in the order they are done: the table of each seed, then the ablations."""
    runs: list[Run] = []
    for seed in args.seeds:
        domains = dict.fromkeys(TARGETS[name].domain for name in args.only)
        runs += [Run(domain, None, "chance", seed) for domain in domains]
        runs += [Run(TARGETS[name].domain, name, "dpo", seed) for name in args.only]
    for seed in args.seeds:
        for name in [name for name in ABLATED if name in args.only]:
            runs += [Run(TARGETS[name].domain, name, arm, seed) for arm in ARMS if arm != "dpo"]
    return [run for run in runs if run.arm in (*args.arms, "chance")]


# --------------------------------------------------------------------------------------------
# Win rates
# --------------------------------------------------------------------------------------------


def win_rate(after: Float[Tensor, " n"], before: Float[Tensor, " n"]) -> float:
    """Share of comparisons that ``after`` wins, ties counting half."""
    return ((after > before).double() + 0.5 * (after == before).double()).mean().item()


def subsets(prompts: int, samples: int, each: int, draws: int, seed: int = 0) -> Int[Tensor, "r m"]:
    """Rows of random subsets with ``each`` of a prompt's samples, no row twice; prompt-major."""
    rng = torch.Generator().manual_seed(seed)
    ranks = torch.rand(draws, prompts, samples, generator=rng).argsort(dim=2)[:, :, :each]
    return (ranks + samples * torch.arange(prompts)[:, None]).flatten(1)


@dataclass(frozen=True)
class Judged:
    """What a reward says of samples: ``each`` is what is compared, ``value`` that of all."""

    each: Float[Tensor, " n"]
    value: float


@torch.no_grad()
def judge(
    reward: Reward | SetReward, samples: Samples, rows: Int[Tensor, "r m"], batch: int = 64
) -> Judged:
    """Values of the samples, or, of a reward of sets, of the subsets with these rows."""
    if isinstance(reward, SetReward):
        features = set_features(reward, samples, batch)
        each = torch.stack([reward.value(features[r]) for r in rows])
        return Judged(each, float(reward.value(features)))
    parts = torch.arange(len(samples)).split(batch)
    value = torch.cat([evaluate(reward, samples.take(part)).value for part in parts])
    return Judged(value, value.double().mean().item())


# --------------------------------------------------------------------------------------------
# Ratings and their head
# --------------------------------------------------------------------------------------------


class Rule:
    """The rule of the ratings, see the module's text; its units are those of the images given.

    Args:
        images: over which colourfulness and sharpness are standardised.
    """

    info = RewardInfo("rule", modality="image")

    def __init__(self, images: Float[Tensor, "n 3 h w"]) -> None:
        self.colourfulness = make_reward("colorfulness")
        found = self._quantities(images)
        self.mean, self.std = found.mean(0), found.std(0).clamp(min=1e-6)

    def _quantities(self, images: Tensor) -> Float[Tensor, "n 2"]:
        colour = evaluate(self.colourfulness, Samples(images, "image")).value
        return torch.stack([colour, laplacian_variance(images).log1p()], dim=1).double()

    def __call__(self, samples: Samples) -> Scores:
        z = (self._quantities(samples.data) - self.mean) / self.std
        return Scores((3 + z.sum(1) / 2**0.5).float())

    def ratings(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """1, 2, 3, 4 or 5 each."""
        return self(Samples(images, "image")).value.round().clamp(1, 5)


class Head:
    """Kernel ridge regression with a Gaussian kernel as wide as the median distance.

    Its ridge is the one of `RIDGES` with the least squared error when each rating is left out,
    which has a closed form: (K_ridge^-1 y)_i / (K_ridge^-1)_ii.

    Args:
        features: of what is rated.
        ratings: of each.
    """

    RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)

    def __init__(self, features: Float[Tensor, "n d"], ratings: Float[Tensor, " n"]) -> None:
        self.features, y = features.double(), ratings.double()
        self.mean = y.mean()
        self.width = torch.pdist(self.features).median()
        kernel, eye = self._kernel(self.features), torch.eye(len(y), dtype=torch.float64)
        errors, weights = [], []
        for ridge in self.RIDGES:
            inverse = torch.linalg.inv(kernel + ridge * eye)
            weights.append(inverse @ (y - self.mean))
            errors.append((weights[-1] / inverse.diagonal()).square().mean().item())
        best = int(np.argmin(errors))
        self.ridge, self.weights = self.RIDGES[best], weights[best]

    def _kernel(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        squared = (features[:, None] - self.features[None]).square().sum(2)
        return (-squared / (2 * self.width**2)).exp()

    def __call__(self, features: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        return self.mean + self._kernel(features.double()) @ self.weights


class Aesthetics:
    """The head as a reward."""

    info = RewardInfo("aesthetics", modality="image")

    def __init__(self, encoder: Any, head: Head) -> None:
        self.encoder, self.head = encoder, head

    def __call__(self, samples: Samples) -> Scores:
        return Scores(self.head(self.encoder(samples)).float())


def correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1])


# --------------------------------------------------------------------------------------------
# Domains
# --------------------------------------------------------------------------------------------


class Domain(ABC):
    """A model, its prompts, and the rewards of its samples.

    Attributes:
        beta: of DRAGON; see `diffreward.algorithms.dpo`.
        training: options of `finetune`.
    """

    name: str
    beta: float
    training: ClassVar[dict[str, Any]]

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        self._rewards: dict[str, Reward | SetReward] = {}

    @abstractmethod
    def policy(self) -> Policy:
        """A fresh one: training changes the network."""

    @property
    @abstractmethod
    def prompts(self) -> list[str]: ...

    @abstractmethod
    def stored(self, samples: Samples) -> Tensor:
        """Samples as 8 bits."""

    @abstractmethod
    def restored(self, data: Tensor) -> Samples:
        """Of the prompts in turn, equally many of each."""

    def reward(self, name: str) -> Reward | SetReward:
        if name not in self._rewards:
            self._rewards[name] = self.make(name)
        return self._rewards[name]

    def make(self, name: str) -> Reward | SetReward:
        return make_reward(EVALUATED[name].spec)

    @torch.no_grad()
    def draw(self, policy: Policy, samples: int, seed: int) -> Tensor:
        """8-bit data, prompt-major."""
        found = []
        for p, prompt in enumerate(self.prompts):
            condition = policy.encode([prompt]).repeat(samples)
            noise = sample_generators(seed, 1, samples, first_prompt=p)
            found.append(
                self.stored(policy.decode(rollout(policy, condition, noise).final, condition))
            )
        return torch.cat(found)

    def _repeated(self, n: int) -> list[str]:
        return [prompt for prompt in self.prompts for _ in range(n // len(self.prompts))]


class Images(Domain):
    """Drawings of one shape"""

    name = "image"
    beta = 150.0
    training: ClassVar[dict[str, Any]] = {}

    @cached_property
    def pipe(self):
        return load_policy("embedded:emoji").pipe

    def policy(self) -> Policy:
        return load_policy(
            copy.deepcopy(self.pipe), num_steps=self.sizes.num_steps, guidance_scale=1.0
        )

    @property
    def prompts(self) -> list[str]:
        return [f"a {shape}" for shape in SHAPES[: self.sizes.prompts]]

    def stored(self, samples: Samples) -> Tensor:
        return (samples.data * 255).round().clamp(0, 255).to(torch.uint8)

    def restored(self, data: Tensor) -> Samples:
        return Samples(data.float() / 255, "image", self._repeated(len(data)))

    def make(self, name: str) -> Reward | SetReward:
        if name == "rule":
            return Rule(self.rated.data)
        if name == "aesthetics":
            return self.aesthetics()
        return super().make(name)

    @cached_property
    def rated(self) -> Samples:
        """The images that are rated; drawn once."""
        path = self.folder / "rated.safetensors"
        if not path.exists():
            save_data(path, self.draw(self.policy(), self.sizes.rated, RATED_SEED))
        return self.restored(load_data(path))

    @torch.no_grad()
    def aesthetics(self) -> Aesthetics:
        """Trained on all ratings; ``head.json`` says how well on 85 % of them."""
        images, encoder = self.rated.data, make_encoder("clip")
        y = self.reward("rule").ratings(images)
        x = torch.cat([encoder(Samples(part, "image")) for part in images.split(64)])
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        train, test = order.split([len(y) - round(0.15 * len(y)), round(0.15 * len(y))])
        tried, head = Head(x[train], y[train]), Head(x, y)
        found = {
            "ratings": len(y),
            "of each": [int((y == k).sum()) for k in range(1, 6)],
            "mean": y.mean().item(),
            "ridge": head.ridge,
            "correlation with ratings held out": correlation(tried(x[test]), y[test]),
        }
        write_text(self.folder / "head.json", json.dumps(plain(found), indent=2) + "\n")
        return Aesthetics(encoder, head)


class DNA(Domain):
    """200 bp of a bacterial genome"""

    name = "dna"
    beta = 0.1
    training: ClassVar[dict[str, Any]] = {"method": "full", "weight_decay": 0.0}

    def policy(self) -> Policy:
        return load_policy("embedded:dna", num_steps=self.sizes.num_steps)

    @property
    def prompts(self) -> list[str]:
        # The model has no prompts; with several, not all samples share one draw of (time, mask).
        return [f"region {k + 1}" for k in range(self.sizes.prompts)]

    def stored(self, samples: Samples) -> Tensor:
        return samples.data.to(torch.uint8)

    def restored(self, data: Tensor) -> Samples:
        return Samples(data.long(), "dna", self._repeated(len(data)))


DOMAINS = {domain.name: domain for domain in (Images, DNA)}


# --------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------


class Lab:
    """Performs runs of one domain."""

    def __init__(self, name: str, sizes: Sizes, output: Path) -> None:
        self.sizes, self.output = sizes, output
        self.domain: Domain = DOMAINS[name](sizes, output / name)
        self.names = [n for n, target in EVALUATED.items() if target.domain == name]
        self.rows = subsets(
            sizes.prompts, sizes.eval_samples, sizes.samples // 2, sizes.subsets
        )  # fmt: skip
        self._before: dict[tuple[str, int], Judged] = {}

    def perform(self, run: Run) -> dict | None:
        """Train, sample and evaluate, as far as it is not done yet; None: interrupted."""
        folder = self.output / run.name
        row = self.sampled(run, folder)
        if row is None:
            return None
        started = time.process_time()
        samples = self.domain.restored(load_data(folder / "samples.safetensors"))
        row["evaluation"] = {}
        for name in self.names:
            before, after = self.before(name, run.seed), self.judged(name, samples)
            wins = win_rate(after.each, before.each)
            row["evaluation"][name] = {
                "win": wins, "before": before.value, "after": after.value
            }  # fmt: skip
        row["evaluation_seconds"] = time.process_time() - started
        write_text(folder / "row.json", json.dumps(plain(row)) + "\n")
        return row

    def judged(self, name: str, samples: Samples) -> Judged:
        return judge(self.domain.reward(name), samples, self.rows)

    def before(self, name: str, seed: int) -> Judged:
        """Of the pretrained model, from the noise of the evaluation."""
        if (name, seed) not in self._before:
            path = self.domain.folder / f"before-seed{seed}.safetensors"
            if not path.exists():
                save_data(path, self.drawn(self.domain.policy(), EVAL_SEED + seed))
            self._before[name, seed] = self.judged(name, self.domain.restored(load_data(path)))
        return self._before[name, seed]

    def drawn(self, policy: Policy, seed: int) -> Tensor:
        return self.domain.draw(policy, self.sizes.eval_samples, seed)

    def sampled(self, run: Run, folder: Path) -> dict | None:
        """What training took; its samples are saved first."""
        path = folder / "training.json"
        if path.exists():
            return json.loads(path.read_text())
        row = {"domain": run.domain, "target": run.target, "arm": run.arm, "seed": run.seed}
        started = time.process_time()
        if run.target is None:
            data = self.drawn(self.domain.policy(), CHANCE_SEED + run.seed)
        else:
            policy, found = self.trained(run)
            if policy is None:
                return None
            row |= found
            data = self.drawn(policy, EVAL_SEED + run.seed)
        row["seconds"] = time.process_time() - started
        save_data(folder / "samples.safetensors", data)
        write_text(path, json.dumps(plain(row)) + "\n")
        return row

    def trained(self, run: Run) -> tuple[Policy | None, dict]:
        """The finetuned policy; None: interrupted."""
        sizes, domain = self.sizes, self.domain
        algorithm = {"name": "dragon", "beta": domain.beta, "num_draws": sizes.num_draws}
        algorithm |= {"seed": run.seed, **ARMS[run.arm][1]}
        options = {
            "learning_rate": sizes.learning_rate, "schedule": "linear",
            "iterations": sizes.iterations, "prompts_per_update": sizes.prompts,
            "samples_per_prompt": sizes.samples, "seed": run.seed, **domain.training,
        }  # fmt: skip
        result = finetune(
            domain.policy(), domain.reward(run.target), algorithm, domain.prompts,
            evaluate_every=0, eval_samples=2, checkpoint_every=0, loggers=[], progress=False,
            **options,
        )  # fmt: skip
        if result.stopped == "signal":
            return None, {}
        rows = [r for r in result.metrics if "reward" in r]
        found = {
            "algorithm": algorithm, "training": options,
            "curve": [r.get("set_value", r["reward"]) for r in rows],
            "kl": result.after.kl.double().mean().item(), "warnings": result.warnings,
        }  # fmt: skip
        return result.policy, found


def perform(args) -> None:
    sizes = TINY if args.tiny else FULL
    same_sizes(args.output, sizes)
    runs = plan(args)
    left = [run for run in runs if load(args.output, run.name) is None]
    print(f"{len(runs)} runs, {len(runs) - len(left)} done")
    labs: dict[str, Lab] = {}
    for run in tqdm(left, unit="run"):
        if load(args.output, run.name) is not None:  # by another process, meanwhile
            continue
        if run.domain not in labs:
            labs[run.domain] = Lab(run.domain, sizes[run.domain], args.output)
        row = labs[run.domain].perform(run)
        if row is None:
            print("interrupted; run the same command to go on")
            return
        text = f"{run.name}: {row['seconds'] + row['evaluation_seconds']:.0f} s"
        if run.target:
            own = row["evaluation"][run.target]
            text += f", {own['before']:.4g} -> {own['after']:.4g}, win rate {own['win']:.0%}"
        tqdm.write(text)


# --------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def mean_over(rows: list[dict], name: str, what: str) -> float:
    """Over seeds, of one entry of the evaluation."""
    return float(np.mean([row["evaluation"][name][what] for row in rows]))


def averaged(values: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by the bootstrap over rewards."""
    x, rng = np.array(values), np.random.default_rng(0)
    means = x[rng.integers(len(x), size=(draws, len(x)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(x.mean()), float(low), float(high)


def targets_of(rows: list[dict], arm: str = "dpo") -> dict[str, list[dict]]:
    """Finished runs by target, in the order of the table."""
    found = {name: [r for r in rows if (r["target"], r["arm"]) == (name, arm)] for name in TARGETS}
    return {name: runs for name, runs in found.items() if runs}


def win_table(rows: list[dict]) -> str:
    """Every reward's own, and averages by kind."""
    main, chance = targets_of(rows), [r for r in rows if r["target"] is None]
    header = ["trained on", "kind", "seeds", "before", "after", "win rate", "by chance", "KL"]
    lines = []
    for name, found in main.items():
        same = [r for r in chance if r["domain"] == TARGETS[name].domain]
        lines.append(
            [
                TARGETS[name].title, KINDS[TARGETS[name].kind], str(len(found)),
                f"{mean_over(found, name, 'before'):.4g}",
                f"{mean_over(found, name, 'after'):.4g}",
                percent(mean_over(found, name, "win")),
                percent(mean_over(same, name, "win")) if same else "-",
                f"{np.mean([r['kl'] for r in found]):.3g}",
            ]
        )  # fmt: skip
    wins = {name: mean_over(found, name, "win") for name, found in main.items()}
    groups = {"all": list(wins)}
    groups |= {title: [n for n in wins if TARGETS[n].kind == k] for k, title in KINDS.items()}
    averages = []
    for title, names in groups.items():
        if names:
            mean, low, high = averaged([wins[n] for n in names])
            above = sum(wins[n] > 0.5 for n in names)
            averages.append(
                [title, str(len(names)), percent(mean), f"{percent(low)} to {percent(high)}",
                 f"{above} of {len(names)}"]
            )  # fmt: skip
    means = table(
        ["rewards", "number", "mean win rate", "95 % (over rewards)", "above 50 %"], averages,
        markdown=True,
    )  # fmt: skip
    return f"{table(header, lines, markdown=True)}\n\n{means}\n\nThe paper: {100 * PAPER:.2f} %."


def cross(rows: list[dict], domain: str) -> tuple[list[str], list[str], np.ndarray]:
    """Names trained on, names evaluated on, and win rates ``(trained, evaluated)``."""
    main = {n: found for n, found in targets_of(rows).items() if TARGETS[n].domain == domain}
    columns = [n for n, target in EVALUATED.items() if target.domain == domain]
    columns = [n for n in columns if n in main or n in JUDGES]
    wins = [[mean_over(found, c, "win") for c in columns] for found in main.values()]
    return list(main), columns, np.array(wins)


def cross_table(rows: list[dict], domain: str) -> str:
    """In per cent; columns have the numbers of the rows, and judges come last."""
    trained, columns, wins = cross(rows, domain)
    header = ["trained on", *(str(k + 1) for k in range(len(trained)))]
    header += [EVALUATED[c].title for c in columns[len(trained) :]]
    lines = [
        [f"{k + 1} {TARGETS[name].title}", *(f"{100 * w:.0f}" for w in wins[k])]
        for k, name in enumerate(trained)
    ]
    return table(header, lines, markdown=True)


def ablation_table(rows: list[dict]) -> str:
    header = ["trained on", *(title for title, _ in ARMS.values())]
    by_arm = {arm: targets_of(rows, arm) for arm in ARMS}
    lines = []
    for name in ABLATED:
        if any(name in by_arm[arm] for arm in ARMS if arm != "dpo"):
            cells = []
            for arm in ARMS:
                found = by_arm[arm].get(name)
                cells.append("-")
                if found:
                    gain = mean_over(found, name, "after") - mean_over(found, name, "before")
                    cells[-1] = f"{percent(mean_over(found, name, 'win'))} ({gain:+.3g})"
            lines.append([TARGETS[name].title, *cells])
    return table(header, lines, markdown=True) if lines else ""


def distinct_table(rows: list[dict]) -> str:
    """Both distances, before and after training on either; lower is better."""
    main, lines = targets_of(rows), []
    header = ["exemplars", "model", "dataset Frechet", "per-sample Frechet"]
    for pair in DISTINCT:
        if not all(name in main for name in pair):
            continue
        title = TARGETS[pair[0]].title.removeprefix("Frechet, ")
        before = [f"{-mean_over(main[pair[0]], name, 'before'):.4g}" for name in pair]
        lines.append([title, "pretrained", *before])
        for name, model in zip(pair, ("trained on dataset", "trained on per-sample"), strict=True):
            cells = [
                f"{-mean_over(main[name], n, 'after'):.4g} "
                f"({percent(mean_over(main[name], n, 'win'))})"
                for n in pair
            ]
            lines.append(["", model, *cells])
    return table(header, lines, markdown=True) if lines else ""


def report(args) -> None:
    found = sorted(args.output.glob("*/*/row.json"))
    rows = [json.loads(path.read_text()) for path in found]
    if not targets_of(rows):
        print(f"there are no finished runs in {args.output}, so there is nothing to report")
        return
    texts = ["### Win rates of finetuned against pretrained", win_table(rows)]
    head = args.output / "image" / "head.json"
    if head.exists():
        facts = json.loads(head.read_text())
        texts.append(
            "Aesthetics head: "
            + ", ".join(f"{name} {value}" for name, value in facts.items())
            + "."
        )
    for domain in DOMAINS:
        if cross(rows, domain)[0]:
            title = f"### Win rates, every reward on every other: {domain} (per cent)"
            texts += [title, cross_table(rows, domain)]
    ablations, distinct = ablation_table(rows), distinct_table(rows)
    if ablations:
        texts += ["### DPO, KTO, and pairs: win rate (change of the reward)", ablations]
    if distinct:
        texts += ["### Dataset and per-sample Frechet distance (win rate)", distinct]
    text = "\n\n".join(texts)
    print(text)
    write_text(args.output / "report.md", text + "\n")
    plot_wins(rows, args.output / "dragon_wins.png")
    plot_cross(rows, args.output / "dragon_cross.png")
    plot_samples(rows, args.output)


def plot_wins(rows: list[dict], path: Path) -> None:
    """The own win rate of each reward, by kind, with that of chance."""
    from matplotlib.figure import Figure

    main, chance = targets_of(rows), [r for r in rows if r["target"] is None]
    wins = {name: mean_over(found, name, "win") for name, found in main.items()}
    order = sorted(wins, key=lambda n: (list(KINDS).index(TARGETS[n].kind), wins[n]))
    figure = Figure(figsize=(8, 1.5 + 0.28 * len(order)), layout="constrained")
    axis = figure.subplots()
    for k, kind in enumerate(KINDS):
        at = [y for y, n in enumerate(order) if TARGETS[n].kind == kind]
        axis.barh(at, [100 * wins[order[y]] for y in at], color=f"C{k}", label=KINDS[kind])
    for y, name in enumerate(order):
        same = [r for r in chance if r["domain"] == TARGETS[name].domain]
        if same:
            label = "chance" if y == 0 else None
            axis.plot(100 * mean_over(same, name, "win"), y, "k|", ms=9, label=label)
    axis.axvline(50, color="grey", lw=0.8)
    mean = 100 * float(np.mean(list(wins.values())))
    axis.axvline(mean, color="black", ls="--", lw=1, label=f"mean, {mean:.1f} %")
    axis.axvline(100 * PAPER, color="red", ls=":", lw=1, label=f"the paper's, {100 * PAPER:.2f} %")
    axis.set_yticks(range(len(order)), [TARGETS[n].title for n in order], fontsize=8)
    axis.set(xlim=(0, 100), xlabel="win rate against the pretrained model, per cent")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    save_figure(path, figure, trim=True)
    print(f"figure: {path}")


def plot_cross(rows: list[dict], path: Path) -> None:
    """The cross table of each domain as a heat map."""
    from matplotlib.figure import Figure

    panels = [found for domain in DOMAINS if (found := cross(rows, domain))[0]]
    widths = [len(columns) + 4 for _, columns, _ in panels]
    height = max(len(trained) for trained, _, _ in panels)
    figure = Figure(figsize=(0.52 * sum(widths) + 3, 0.42 * height + 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, (trained, columns, wins) in zip(axes, panels, strict=True):
        image = axis.imshow(wins, vmin=0, vmax=1, cmap="RdBu")
        for (y, x), win in np.ndenumerate(wins):
            colour = "white" if abs(win - 0.5) > 0.35 else "black"
            axis.text(x, y, f"{100 * win:.0f}", ha="center", va="center", color=colour, fontsize=7)
        titles = [EVALUATED[c].title for c in columns]
        axis.set_xticks(range(len(columns)), titles, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(trained)), [TARGETS[n].title for n in trained], fontsize=7)
        axis.set(xlabel="evaluated on", ylabel="trained on")
    figure.colorbar(image, ax=list(axes), label="win rate", shrink=0.7)
    save_figure(path, figure, trim=True)
    print(f"figure: {path}")


def plot_samples(rows: list[dict], output: Path, each: int = 2) -> None:
    """Images of the pretrained model and of all trained ones, from the same noise."""
    from matplotlib.figure import Figure

    main = {n: r for n, r in targets_of(rows).items() if TARGETS[n].domain == "image"}
    seed = min((r["seed"] for found in main.values() for r in found), default=0)
    before = output / "image" / f"before-seed{seed}.safetensors"
    paths = {"pretrained": before}
    for name in main:
        run = Run("image", name, "dpo", seed)
        paths[TARGETS[name].title] = output / run.name / "samples.safetensors"
    paths = {title: path for title, path in paths.items() if path.exists()}
    sizes = json.loads((output / "sizes.json").read_text())["image"] if paths else {}
    if not paths:
        return
    figure = Figure(figsize=(10.5, 0.62 * len(paths)), layout="constrained")
    axes = figure.subplots(len(paths), 1, squeeze=False)[:, 0]
    for axis, (title, path) in zip(axes, paths.items(), strict=True):
        data = load_data(path).unflatten(0, (sizes["prompts"], -1))[:, :each].flatten(0, 1)
        axis.imshow(torch.cat(list(data), dim=2).permute(1, 2, 0).numpy())
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    save_figure(output / "dragon_samples.png", figure, trim=True)
    print(f"figure: {output / 'dragon_samples.png'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/dragon"))
    parser.add_argument("--only", nargs="+", choices=TARGETS, metavar="NAME", help="of rewards")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tiny", action="store_true", help="a minute: to see that it runs")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.only = args.only or (list(TINY_TARGETS) if args.tiny else list(TARGETS))
    if not args.report:
        perform(args)
    report(args)


if __name__ == "__main__":
    main()

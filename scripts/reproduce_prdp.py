"""PRDP against its baselines on the embedded model: at equal cost, at scale, and by beta.

    python scripts/reproduce_prdp.py --output runs/prdp            # hours on 2 cores; resumable
    python scripts/reproduce_prdp.py --output runs/prdp --report   # tables and figure only
    python scripts/reproduce_prdp.py --output runs/quick --quick   # one seed, about 20 minutes
    python scripts/reproduce_prdp.py --only a --arms prdp_whole ddpo --budget_minutes 60

(a) *Small set of prompts.* PRDP as Algorithm 1 of arXiv:2402.08714 has it (the whole rollout in
    each of K = 4 updates), PRDP in 4 minibatches, DDPO with statistics per prompt, GRPO: all make
    4 updates a rollout. They are compared at equal reward queries (samples scored) and at equal
    compute; each runs to the later of the two and is evaluated at both.
(b) *Large set of prompts*, each visited once at most: PRDP with K = 1, in both readings, DDPO with
    prompt-agnostic statistics (the paper's baseline), and GRPO, whose baseline is the group (the
    comparison the paper lacks). Evaluated on captions no embedded model was trained on. Stability
    is the reward over the run: its peak, its end, and how many runs broke off.
(c) *KL.* PRDP with several beta, on ``clip_score`` and on ``colorfulness``, which is easily
    hacked; prompts and learning rate of (b). beta is given in standard deviations of the reward
    within prompts before training.
(d) *Steps.* What the gradient of each step of the chain is made of, before training: batches of
    samples each give a policy gradient (with advantages standardised in their prompts); what two
    batches have in common is signal, the rest is noise.

Compute is counted in rows of the UNet: those without gradient once, those with it three times.
Evaluations do not count. Training reward: ``clip_score``; judges never trained on: ``clip_judge``
(another seed, the other half of the data) and the exact ``shapes_checker``. In (a) and (b) beta is
so small that the KL is inert, as it is with the paper's values.

All arms learn from the first half of the chain's steps (``step_fraction``), and sample without
guidance: (d) says why.

Learning rates: the same grid for each arm, on a seed of its own and for a part of the compute; the
rate whose run ends with the highest training reward wins, on prompts that are not held out. That
favours what learns fast, and says nothing about later stability. Everything else is the same for
all arms: LoRA of rank 16, AdamW, gradients clipped to norm 1, 10 steps of DDIM with eta 1.

A run is a folder with ``row.json`` once it is done. What is done is not run again, and a run that
was interrupted goes on from its last checkpoint.
"""

import argparse
import copy
import json
import math
import shutil
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from experiment import interval, load, same_sizes
from tqdm import tqdm

from diffreward import Samples, evaluate, load_policy, make_reward, rollout, sample_generators
from diffreward._assets import asset_path
from diffreward.algorithms import make_algorithm
from diffreward.algorithms.base import group_mean, group_std
from diffreward.files import plain, table, write_text
from diffreward.finetuning import finetune
from diffreward.finetuning.options import Training
from diffreward.finetuning.record import read_metrics
from diffreward.finetuning.trainable import Trainable
from diffreward.rewards.shapes import random_scene

PRDP = {"name": "prdp", "beta": 0.01}  # in standard deviations of the reward: the KL is inert
ARMS = {
    "a": {
        "prdp_whole": {**PRDP, "passes": 4},
        "prdp_minibatches": {**PRDP, "passes": 1, "minibatches": 4},
        "ddpo": {"name": "ddpo", "minibatches": 4},
        "grpo": {"name": "grpo", "minibatches": 4},
        "reinforce": {"name": "reinforce"},
    },
    "b": {
        "prdp_whole": {**PRDP, "passes": 1},
        "prdp_minibatches": {**PRDP, "passes": 1, "minibatches": 4},
        "ddpo": {"name": "ddpo", "normalization": "batch", "minibatches": 4},
        "grpo": {"name": "grpo", "minibatches": 4},
        "reinforce": {"name": "reinforce"},
    },
}
NAMES = {
    "prdp_whole": "PRDP, whole rollout",
    "prdp_minibatches": "PRDP, minibatches",
    "ddpo": "DDPO",
    "grpo": "GRPO",
    "reinforce": "REINFORCE",
}
BASELINE = "ddpo"
JUDGES = {
    "clip_score": ["clip_judge", "shapes_checker"],
    "colorfulness": ["clip_score", "clip_judge", "shapes_checker"],
}
TUNING_SEED = 1000


@dataclass(frozen=True)
class Sizes:
    """How much is done. Compute is in forward rows.

    Attributes:
        num_steps: T.
        step_fraction: share of them that is learnt from.
        prompts: of a rollout: in (a), all there are; in (b) and (c).
        samples: of each prompt, in the same order.
        captions: there are in (b) and (c).
        queries: samples scored until an arm is read off; 0: it is not.
        compute: spent until an arm is read off.
        tuning: share of the compute that a run of the grid gets.
        grid: learning rates.
        betas: of (c), in standard deviations of the reward.
        rewards: of (c).
        kl_seeds: of (c), the first ones.
        trained, unseen: prompts that evaluations have of each kind; in (b) and (c), of the latter.
        eval_samples: of each.
        batches: of (d), 16 samples of each prompt of (a) in each.
        evaluate_every: iterations between evaluations on the way.
    """

    num_steps: int = 10
    step_fraction: float = 0.5
    prompts: tuple[int, int] = (8, 16)
    samples: tuple[int, int] = (8, 4)
    captions: int = 2000
    queries: tuple[int, int, int] = (1024, 0, 0)
    compute: tuple[int, int, int] = (40_000, 40_000, 24_000)
    tuning: float = 0.5
    grid: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    betas: tuple[float, ...] = (0.03, 0.3, 1.0, 3.0)
    rewards: tuple[str, ...] = ("clip_score", "colorfulness")
    kl_seeds: int = 1
    trained: int = 8
    unseen: tuple[int, int] = (8, 24)
    eval_samples: tuple[int, int] = (8, 4)
    batches: int = 10
    evaluate_every: int = 0

    def scaled(self, by: float) -> "Sizes":
        """Budgets ``by`` times as large."""
        return replace(
            self,
            queries=tuple(round(n * by) for n in self.queries),
            compute=tuple(round(n * by) for n in self.compute),
        )


FULL = Sizes()
QUICK = replace(
    FULL.scaled(0.25), grid=(1e-3,), betas=(0.1, 1.0), rewards=("clip_score",), kl_seeds=1
)  # fmt: skip
TINY = Sizes(
    num_steps=2, prompts=(4, 4), samples=(2, 2), captions=16, queries=(8, 8, 0),
    compute=(400, 250, 150), grid=(1e-4, 3e-4), betas=(0.1, 1.0), rewards=("colorfulness",),
    kl_seeds=1, trained=2, unseen=(1, 2), eval_samples=(2, 2), batches=3, evaluate_every=0,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One finetuning run; ``learning_rate`` is None where the grid decides."""

    experiment: str
    arm: str
    seed: int
    reward: str = "clip_score"
    beta: float | None = None
    learning_rate: float | None = None

    @property
    def tuning(self) -> bool:
        return self.learning_rate is not None

    @property
    def name(self) -> str:
        if self.tuning:
            return f"{self.experiment}/grid/{self.arm}-{self.learning_rate:g}"
        middle = "" if self.beta is None else f"-{self.reward}-beta{self.beta:g}"
        return f"{self.experiment}/{self.arm}{middle}-seed{self.seed}"


# --------------------------------------------------------------------------------------------
# Prompts and plan
# --------------------------------------------------------------------------------------------


@lru_cache
def captions(n: int) -> list[str]:
    """Different captions of composed scenes that are not held out, always the same."""
    rng, found = np.random.default_rng(0), {}
    while len(found) < n:
        scene = random_scene(rng)
        if scene.count > 1 and not scene.held_out():
            found[scene.caption()] = None
    return list(found)


def held_out(n: int) -> list[str]:
    """Captions that no embedded model was trained on, spread over the categories."""
    lines = asset_path("prompts/scenes.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    composed = [row["prompt"] for row in rows if row["category"] != "single object"]
    return [composed[len(composed) * j // n] for j in range(n)]


def prompts_of(run: Run, sizes: Sizes) -> tuple[list[str], list[str]]:
    """(to train on, to evaluate on); the grid is judged by none that are held out."""
    small = run.experiment == "a"
    trained = captions(sizes.prompts[0] if small else sizes.captions)
    if run.tuning:
        return trained, trained[: sizes.trained] if small else trained[-sizes.unseen[1] :]
    if small:
        return trained, trained[: sizes.trained] + held_out(sizes.unseen[0])
    return trained, held_out(sizes.unseen[1])


def plan(args, sizes: Sizes) -> list[Run]:
    """All runs, in the order they are done: the grid of an experiment, then seed by seed."""
    runs: dict[Run, None] = {}

    def grid(experiment: str, arm: str) -> None:
        if len(sizes.grid) > 1:
            for rate in sizes.grid:
                runs[Run(experiment, arm, TUNING_SEED, learning_rate=rate)] = None

    for experiment in args.only:
        if experiment == "d":
            continue  # no training
        if experiment == "c":
            grid("b", "prdp_minibatches")
            for seed in args.seeds[: sizes.kl_seeds]:
                for reward in sizes.rewards:
                    for beta in sizes.betas:
                        runs[Run("c", "prdp_minibatches", seed, reward, beta)] = None
            continue
        for arm in args.arms:
            grid(experiment, arm)
        for seed in args.seeds:
            for arm in args.arms:
                runs[Run(experiment, arm, seed)] = None
    return list(runs)


class Costs:
    """What a run costs, in forward rows."""

    def __init__(self, sizes: Sizes, guided: bool) -> None:
        self.sizes, self.per_sample = sizes, sizes.num_steps * (2 if guided else 1)
        self.learnt = max(1, round(sizes.step_fraction * sizes.num_steps)) / sizes.num_steps

    def batch(self, run: Run) -> tuple[int, int]:
        """Prompts of a rollout, and samples of each."""
        at = 0 if run.experiment == "a" else 1
        return self.sizes.prompts[at], self.sizes.samples[at]

    def iteration(self, run: Run) -> float:
        """At most: steps whose gradient is zero are left out by the engine."""
        algorithm = make_algorithm(options(run))
        updates, parts = algorithm.passes * algorithm.minibatches, algorithm.minibatches
        # rollout, reference, gradients, and log-probabilities anew before all updates but the first
        learnt = algorithm.needs_reference + 3 * algorithm.passes + (updates - 1) / parts
        units = 1 + self.learnt * learnt
        return units * math.prod(self.batch(run)) * self.per_sample

    def budgets(self, run: Run) -> dict[str, int]:
        """By name, what is left out being no budget of this run."""
        at = "abc".index(run.experiment)
        compute, queries = self.sizes.compute[at], self.sizes.queries[at]
        if run.tuning:
            compute, queries = round(compute * self.sizes.tuning), 0
        return {"queries": queries, "compute": compute} if queries else {"compute": compute}

    def total(self, run: Run) -> float:
        """An estimate, evaluations included."""
        budgets, one = self.budgets(run), self.iteration(run)
        iterations = max(1, round(budgets["compute"] / one))
        if "queries" in budgets:
            iterations = max(iterations, math.ceil(budgets["queries"] / math.prod(self.batch(run))))
        _, prompts = prompts_of(run, self.sizes)
        each = len(prompts) * self.sizes.eval_samples[run.experiment != "a"] * self.per_sample * 2
        every = self.sizes.evaluate_every
        evaluations = 1 + len(budgets) + (iterations // every if every and not run.tuning else 0)
        return iterations * one + evaluations * each


def options(run: Run, spread: float = 1.0) -> dict:
    """Of the run's algorithm; ``spread``: standard deviation of the reward within prompts."""
    if run.beta is None:
        return ARMS[run.experiment][run.arm]
    return {**ARMS["b"][run.arm], "standardize": False, "beta": run.beta * spread}


# --------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------


class Lab:
    """What runs share: the pipeline, the rewards, and what was measured before them."""

    def __init__(self, args, sizes: Sizes) -> None:
        self.args, self.sizes, self.output = args, sizes, args.output
        self.pipe = load_policy("embedded:emoji").pipe
        names = {"clip_score", "clip_judge", "shapes_checker", *sizes.rewards}
        self.rewards = {name: make_reward(name) for name in sorted(names)}
        self.costs = Costs(sizes, self.policy().guided)

    def policy(self):
        """A fresh one: training changes the network."""
        return load_policy(
            copy.deepcopy(self.pipe), num_steps=self.sizes.num_steps, guidance_scale=1.0
        )

    def speed(self) -> float:
        """Forward rows a second, of this machine now."""
        policy, n = self.policy(), 16
        with torch.no_grad():
            condition = policy.encode(held_out(1)).repeat(n)
            started, passes = time.monotonic(), 0
            while passes < 1 or time.monotonic() - started < 1:
                rollout(policy, condition, sample_generators(0, 1, n))
                passes += 1
        return passes * n * self.costs.per_sample / (time.monotonic() - started)

    def spread(self, reward: str) -> float:
        """Standard deviation of a reward within prompts, before training; measured once."""
        path = self.output / "spread.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if reward not in known:
            policy, prompts, k, parts = self.policy(), captions(self.sizes.captions)[:16], 4, []
            with torch.no_grad():
                for p, prompt in enumerate(prompts):
                    condition = policy.encode([prompt]).repeat(k)
                    noise = sample_generators(TUNING_SEED, 1, k, first_prompt=p)
                    x0 = rollout(policy, condition, noise).final
                    parts.append(policy.decode(x0, condition))
            value = evaluate(self.rewards[reward], Samples.cat(parts)).value.double()
            groups = torch.arange(len(prompts)).repeat_interleave(k)
            variance = (group_std(value, groups) ** 2).mean() * k / (k - 1)
            known[reward] = variance.sqrt().item()
            write_text(path, json.dumps(known, indent=2) + "\n")
        return known[reward]

    def learning_rate(self, run: Run) -> float:
        """The run's own, or the best of its grid."""
        if run.tuning:
            return run.learning_rate
        if len(self.sizes.grid) == 1:
            return self.sizes.grid[0]
        experiment = "b" if run.experiment == "c" else run.experiment
        ends = {}
        for rate in self.sizes.grid:
            row = load(self.output, Run(experiment, run.arm, TUNING_SEED, learning_rate=rate).name)
            score = row["marks"].get("compute", {}).get("scores", {}).get(row["reward"])
            ends[rate] = -math.inf if score is None else float(np.mean(score))
        return max(ends, key=ends.get)

    def train(self, run: Run) -> dict | None:
        """Finetune as far as the later budget, with an evaluation at each; None: interrupted."""
        folder, sizes = self.output / run.name, self.sizes
        prompts, eval_prompts = prompts_of(run, sizes)
        spread = 1.0 if run.beta is None else self.spread(run.reward)
        algorithm = make_algorithm(options(run, spread))
        (p, b), budgets = self.costs.batch(run), self.costs.budgets(run)
        training = dict(
            prompts_per_update=p // algorithm.minibatches, samples_per_prompt=b, seed=run.seed,
            learning_rate=self.learning_rate(run), loggers=[], checkpoint_every=10,
            keep_checkpoints=1, step_fraction=sizes.step_fraction,
            evaluate_every=0 if run.tuning else sizes.evaluate_every,
            eval_samples=sizes.eval_samples[run.experiment != "a"],
        )  # fmt: skip
        state = folder / "marks.json"
        if not has_checkpoint(folder):  # nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)
        marks = json.loads(state.read_text()) if state.exists() else {}
        row = {
            "experiment": run.experiment, "arm": run.arm, "seed": run.seed, "tuning": run.tuning,
            "reward": run.reward, "beta": run.beta, "spread": spread, "trained": sizes.trained,
            "learning_rate": training["learning_rate"], "algorithm": options(run, spread),
            "samples": p * b, "budgets": budgets,
        }  # fmt: skip
        while left := [name for name in budgets if name not in marks]:
            last = max(marks.values(), key=lambda m: m["iteration"], default=None)
            done, spent = (last["iteration"], last["compute"]) if last else (0, 0)
            one = spent / done if done else self.costs.iteration(run)
            target = {
                "queries": math.ceil(budgets.get("queries", 0) / (p * b)),
                "compute": done + max(1, round((budgets["compute"] - spent) / one)),
            }
            try:
                result = finetune(
                    self.policy(), self.rewards[run.reward], algorithm, prompts,
                    judges=[self.rewards[name] for name in JUDGES[run.reward]],
                    eval_prompts=eval_prompts, output=folder, progress=False,
                    iterations=min(target[name] for name in left),
                    resume="latest" if has_checkpoint(folder) else None, **training,
                )  # fmt: skip
            except RuntimeError as error:  # a gradient that is not finite, above all
                row["failed"] = str(error)
                break
            if result.stopped == "signal":
                return None
            done, spent = result.iterations, cost(result.metrics)
            reached = {"iteration": done, "queries": done * p * b, "compute": spent}
            if "before" not in marks:
                start = {"iteration": 0, "queries": 0, "compute": 0}
                marks["before"] = start | numbers(result.before)
            for name in left:
                short = budgets[name] - reached[name]
                if short <= (0 if name == "queries" else 0.5 * spent / done):
                    marks[name] = reached | numbers(result.after)
            if not any(name in marks for name in left):  # cheaper than thought: go on from here
                marks[f"after {result.iterations}"] = reached
            write_text(state, json.dumps(plain(marks)) + "\n")
        rows = read_metrics(folder / "metrics.jsonl")
        iterations = [r for r in rows if "reward" in r]
        row |= {
            "curve": curve_of(iterations, p * b),
            "seconds": sum(r["seconds"] for r in iterations),
            "warnings": [text for r in rows for text in r.get("warnings", ())],
            "marks": marks,
        }
        write_text(folder / "row.json", json.dumps(plain(row)) + "\n")
        return row

    def steps(self) -> list[dict]:
        """Of each step, and of the first ones together: the squared norms of (d)."""
        sizes, prompts = self.sizes, captions(self.sizes.prompts[0])
        policy, k = self.policy(), 2 * sizes.samples[0]
        trainable = Trainable(policy, Training())
        parameters = list(trainable.parameters.values())
        condition = policy.encode(prompts).repeat(k)
        groups = torch.arange(len(prompts)).repeat_interleave(k)
        found = torch.zeros(sizes.batches, sizes.num_steps, sum(p.numel() for p in parameters))
        for batch in tqdm(range(sizes.batches), unit="batch"):
            with torch.no_grad():
                noise = sample_generators(TUNING_SEED, len(prompts), k, stream=batch)
                path = rollout(policy, condition, noise, keep_path=True)
                samples = policy.decode(path.final, condition)
            value = evaluate(self.rewards["clip_score"], samples).value.double()
            spread = group_std(value, groups).clamp(min=1e-6)
            advantage = ((value - group_mean(value, groups)) / spread).float()
            for i in range(sizes.num_steps):
                law = policy.step_law(path.latents[i], i, condition)
                loss = (advantage * law.log_prob(path.latents[i + 1])).mean()
                parts = torch.autograd.grad(loss, parameters)
                found[batch, i] = torch.cat([p.flatten() for p in parts])
        rows = [("step", i + 1, found[:, i]) for i in range(sizes.num_steps)]
        rows += [("first", i, found[:, :i].sum(1)) for i in range(2, sizes.num_steps + 1)]
        return [{"of": of, "steps": n, **signal(g.double())} for of, n, g in rows]


def signal(gradients: torch.Tensor) -> dict[str, float]:
    """Of ``(n, d)`` independent gradients: mean squared norm, and the squared norm of their mean.

    The latter without bias, as the mean inner product of two different ones, with its standard
    error by the jackknife over batches.
    """
    n, products = len(gradients), gradients @ gradients.T
    products.fill_diagonal_(0)
    without = (products.sum() - 2 * products.sum(1)) / ((n - 1) * (n - 2))
    return {
        "norm": gradients.square().sum(1).mean().item(),
        "signal": products.sum().item() / (n * (n - 1)),
        "error": (without.var(correction=0) * (n - 1)).sqrt().item(),
    }


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("checkpoint-*"))


def cost(rows: list[dict]) -> int:
    """Of iterations, in forward rows."""
    return sum(row["forward_rows"] + 3 * row["backward_rows"] for row in rows)


def curve_of(rows: list[dict], samples: int) -> list[dict]:
    """The mean reward of each rollout, with what its policy has been trained on until then."""
    return [
        {"queries": n * samples, "compute": cost(rows[:n]), "mean": row["reward"]}
        for n, row in enumerate(rows)
    ]


def numbers(evaluation) -> dict:
    """Of each prompt the mean over its samples."""
    n = len(evaluation.prompts)
    return {
        "scores": {
            name: value.double().view(n, -1).mean(1).tolist()
            for name, value in evaluation.scores.items()
        },
        "kl": evaluation.kl.double().mean().item(),
        "diversity": evaluation.diversity.mean().item(),
        "probes": {name: value.double().mean().item() for name, value in evaluation.probes.items()},
    }


def perform(args, sizes: Sizes) -> None:
    same_sizes(args.output, sizes)
    runs = plan(args, sizes)
    if "d" in args.only and not (args.output / "steps.json").exists():
        rows = Lab(args, sizes).steps()
        write_text(args.output / "steps.json", json.dumps(rows, indent=2) + "\n")
    left = [run for run in runs if load(args.output, run.name) is None]
    print(f"{len(runs)} runs, {len(runs) - len(left)} done")
    if not left:
        return
    lab = Lab(args, sizes)
    speed = lab.speed()
    hours = sum(lab.costs.total(run) for run in left) / speed / 3600
    print(f"{speed:.0f} forward rows a second: about {hours:.1f} hours for {len(left)} runs")
    started, spent = time.monotonic(), 0.0
    for run in tqdm(left, unit="run"):
        minutes = (time.monotonic() - started) / 60
        if spent:  # what the runs took tells more than the first second
            speed = spent / (60 * minutes)
        expected = lab.costs.total(run) / speed / 60
        if args.budget_minutes is not None and minutes + expected > args.budget_minutes:
            print(f"{run.name} would take {expected:.0f} minutes: it is left for the next time")
            return
        tqdm.write(f"{run.name}: about {expected:.0f} minutes")
        row = lab.train(run)
        if row is None:
            print("interrupted; run the same command to go on")
            return
        if "failed" in row:
            tqdm.write(f"{run.name} broke off: {row['failed']}")
        spent += lab.costs.total(run)


# --------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------


def shown(d: np.ndarray) -> str:
    mean, low, high = interval(d)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def gains(rows: list[dict], mark: str, score: str, prompts: slice) -> np.ndarray:
    """``(seeds, prompts)``: the score at the mark minus that before, from the same noise."""

    def at(row: dict, mark: str) -> np.ndarray:
        return np.array(row["marks"][mark]["scores"][score])

    return np.array([at(row, mark) - at(row, "before") for row in rows])[:, prompts]


def name_of(experiment: str, arm: str) -> str:
    return NAMES[arm] + (", prompt-agnostic" if (experiment, arm) == ("b", "ddpo") else "")


def mean_of(rows: list[dict], mark: str, name: str) -> str:
    values = [row["marks"][mark][name] for row in rows]
    if None in values:
        return "-"
    mean = np.mean(values)
    return f"{mean:,.0f}" if mean >= 1000 else f"{mean:.3g}"


def at_budget(rows: list[dict], experiment: str, mark: str) -> str:
    """Every arm at one budget, and its paired difference to the baseline."""
    trained = slice(rows[0]["trained"]) if experiment == "a" else slice(0, 0)
    unseen = slice(trained.stop, None)
    scores = {"clip_score": "clip_score", "clip_judge": "judge", "shapes_checker": "checker"}
    columns = [(f"{scores[s]}, unseen", s, unseen) for s in scores]
    if experiment == "a":
        columns = [("clip_score, trained on", "clip_score", trained), *columns]
    names = [c[0] for c in columns]
    header = ["arm", "rate", "seeds", "samples", "rows", *names, "KL", "diversity"]
    lines, differences = [], []
    by_arm = {arm: [r for r in rows if r["arm"] == arm and mark in r["marks"]] for arm in NAMES}
    for arm, found in by_arm.items():
        if not found:
            continue
        lines.append(
            [
                name_of(experiment, arm), f"{found[0]['learning_rate']:g}", str(len(found)),
                mean_of(found, mark, "queries"), mean_of(found, mark, "compute"),
                *(shown(gains(found, mark, s, p)) for _, s, p in columns),
                mean_of(found, mark, "kl"), mean_of(found, mark, "diversity"),
            ]
        )  # fmt: skip
        base = {row["seed"]: row for row in by_arm[BASELINE]}
        both = [row for row in found if row["seed"] in base]
        if arm == BASELINE or not both:
            continue
        theirs = [base[row["seed"]] for row in both]
        line = [f"{name_of(experiment, arm)} - {NAMES[BASELINE]}", str(len(both))]
        for _, s, p in columns:
            line.append(shown(gains(both, mark, s, p) - gains(theirs, mark, s, p)))
        differences.append(line)
    if not lines:
        return f"No run has reached the budget in {mark} yet."
    text = table(header, lines, markdown=True)
    if differences:
        header = ["difference", "seeds", *names]
        text += "\n\n" + table(header, differences, markdown=True)
    return text


def stability(rows: list[dict]) -> str:
    """Where the training reward, averaged over a tenth of a run, begins, peaks and ends."""
    header = ["arm", "rate", "runs", "broke off", "first", "peak", "last", "lost since the peak"]
    lines = []
    for key in sorted({(r["arm"], r["learning_rate"], r["tuning"]) for r in rows}):
        found = [r for r in rows if (r["arm"], r["learning_rate"], r["tuning"]) == key]
        curves = [smooth([point["mean"] for point in r["curve"]]) for r in found if r["curve"]]
        if not curves:
            continue
        name = name_of(found[0]["experiment"], key[0]) + (" (grid)" if key[2] else "")
        first, last = (np.array([c[at] for c in curves]) for at in (0, -1))
        peak = np.array([c.max() for c in curves])
        lines.append(
            [
                name, f"{key[1]:g}", str(len(found)), str(sum("failed" in r for r in found)),
                *(f"{v.mean():.3f}" for v in (first, peak, last)),
                f"{(peak - last).mean():.3f} (at most {(peak - last).max():.3f})",
            ]
        )  # fmt: skip
    return table(header, lines, markdown=True)


def smooth(values: list[float]) -> np.ndarray:
    """Moving average over a tenth of the run."""
    width = max(1, len(values) // 10)
    return np.convolve(values, np.full(width, 1 / width), "valid")


def kl_study(rows: list[dict]) -> str:
    texts = []
    for reward in sorted({row["reward"] for row in rows}):
        labels = [reward, *JUDGES[reward]]
        lines = []
        for beta in sorted({r["beta"] for r in rows if r["reward"] == reward}):
            found = [
                r for r in rows
                if (r["reward"], r["beta"]) == (reward, beta) and "compute" in r["marks"]
            ]  # fmt: skip
            if found:
                lines.append(
                    [
                        f"{beta:g}", str(len(found)),
                        *(shown(gains(found, "compute", s, slice(None))) for s in labels),
                        mean_of(found, "compute", "kl"), mean_of(found, "compute", "diversity"),
                    ]
                )  # fmt: skip
        if lines:
            header = ["beta / std", "seeds", f"{reward} (trained on)", *labels[1:]]
            header += ["KL", "diversity"]
            texts.append(table(header, lines, markdown=True))
    return "\n\n".join(texts) or "No run is done yet."


def step_table(rows: list[dict]) -> str:
    header = ["steps", "squared norm", "signal", "standard error", "signal / norm"]
    lines = [
        [
            f"{'' if row['of'] == 'step' else 'first '}{row['steps']}", f"{row['norm']:.3g}",
            f"{row['signal']:.2g}", f"{row['error']:.1g}", f"{row['signal'] / row['norm']:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(header, lines, markdown=True)


def report(args) -> None:
    found = sorted(args.output.glob("*/*/row.json")) + sorted(args.output.glob("*/grid/*/row.json"))
    rows = [json.loads(path.read_text()) for path in found]
    steps = args.output / "steps.json"
    if not rows and not steps.exists():
        print(f"there are no finished runs in {args.output}, so there is nothing to report")
        return
    text = ["Changes since before training: mean over seeds and prompts, [95 % interval]."]
    by = {e: [r for r in rows if r["experiment"] == e] for e in "abc"}
    main = {e: [r for r in by[e] if not r["tuning"]] for e in "abc"}
    titles = {"a": "Small set of prompts", "b": "Large set of prompts"}
    for experiment, title in titles.items():
        if by[experiment]:
            text.append(f"### {title}")
        if main[experiment]:
            for mark in ("queries", "compute"):
                budget = main[experiment][0]["budgets"].get(mark)
                if budget is None:
                    continue
                unit = "samples scored" if mark == "queries" else "forward rows"
                text += [f"At {budget} {unit}:", at_budget(main[experiment], experiment, mark)]
        if by[experiment]:
            text += ["Training reward over the run:", stability(by[experiment])]
    if main["c"]:
        text += ["### KL", kl_study(main["c"])]
    if steps.exists():
        text += ["### Steps", step_table(json.loads(steps.read_text()))]
    text = "\n\n".join(text)
    print(text)
    write_text(args.output / "report.md", text + "\n")
    if rows:
        plot(main, args.output / "prdp.png")


def plot(main: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="tight")
    panels = [
        ("a", "queries", "(a) few prompts, by samples scored"),
        ("a", "compute", "(a) few prompts, by compute (forward rows)"),
        ("b", "queries", "(b) every prompt once, by samples scored"),
    ]
    for ax, (experiment, by, title) in zip(axes.flat[:3], panels, strict=True):
        for number, (arm, name) in enumerate(NAMES.items()):
            rows = [r for r in main[experiment] if r["arm"] == arm and r["curve"]]
            if not rows:
                continue
            # seeds may cost a little differently: they are averaged where all have been
            lines = [_smoothed(r["curve"], by) for r in rows]
            x = np.linspace(max(u[0] for u, _ in lines), min(u[-1] for u, _ in lines), 100)
            y = np.array([np.interp(x, *line) for line in lines])
            ax.plot(x, y.mean(0), color=f"C{number}", label=name)
            ax.fill_between(x, y.min(0), y.max(0), color=f"C{number}", alpha=0.15, lw=0)
        ax.set(title=title, ylabel="training reward (clip_score)")
        if ax.lines:
            ax.legend(fontsize=8)
    ax = axes.flat[3]
    kl = [r for r in main["c"] if r["reward"] == "clip_score" and "compute" in r["marks"]]
    kl = kl or [r for r in main["c"] if "compute" in r["marks"]]
    for label in [kl[0]["reward"], *JUDGES[kl[0]["reward"]]] if kl else []:
        points = []
        for beta in sorted({r["beta"] for r in kl}):
            found = [r for r in kl if r["beta"] == beta]
            gain = gains(found, "compute", label, slice(None)).mean()
            before = np.mean([r["marks"]["before"]["scores"][label] for r in found]) or math.nan
            points.append((np.mean([r["marks"]["compute"]["kl"] for r in found]), gain / before))
        ax.plot(*np.array(sorted(points)).T, marker="o", label=label)
    ax.set(
        title="(c) PRDP by beta", xlabel="KL to the pretrained model, nats",
        ylabel="change, relative to before",
    )  # fmt: skip
    ax.axhline(0, color="grey", lw=0.8, ls=":")
    if kl:
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nfigure: {path}")


def _smoothed(curve: list[dict], by: str) -> tuple[np.ndarray, np.ndarray]:
    return smooth([point[by] for point in curve]), smooth([point["mean"] for point in curve])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/prdp"))
    parser.add_argument("--only", nargs="+", choices="abcd", default=list("abcd"))
    parser.add_argument(
        "--arms", nargs="+", choices=NAMES, default=[a for a in NAMES if a != "reinforce"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all budgets")
    parser.add_argument("--quick", action="store_true", help="a fifth of it, one rate, one seed")
    parser.add_argument("--tiny", action="store_true", help="seconds: to see that it runs")
    parser.add_argument("--budget_minutes", type=float, help="start no run that would end later")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = TINY if args.tiny else QUICK if args.quick else FULL
    args.seeds = args.seeds or ([0] if args.quick or args.tiny else [0, 1, 2])
    if not args.report:
        args.output.mkdir(parents=True, exist_ok=True)
        perform(args, sizes if args.scale == 1 else sizes.scaled(args.scale))
    report(args)


if __name__ == "__main__":
    main()

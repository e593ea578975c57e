"""DRAKES' table in shape: what raises an oracle's score of sequences, and what that costs.

    python scripts/reproduce_drakes.py --output runs/drakes            # hours on 2 cores; resumable
    python scripts/reproduce_drakes.py --output runs/drakes --report   # tables and figures only
    python scripts/reproduce_drakes.py --output runs/tiny --tiny       # to see that it runs
    python scripts/reproduce_drakes.py --tasks dna --methods pretrained smc drakes

After Wang et al. 2025, arXiv:2410.13643, on the embedded models. The data of the paper's two
tasks are not here; these have the same form:

*dna*: 200 bp of a bacterial genome. Oracle: a classifier of regulatory (upstream) against coding
    sequence, trained on one half of the genome; held out: one trained on the other half. Natural:
    the genome's own upstream sequences.
*protein*: sequences for the backbone of 1ubi, drawn at temperature 1. Oracle: the likelihood under
    three ProteinMPNNs trained with other noise; held out: that under one trained on soluble
    proteins alone. Natural: the native sequence.

Without training: the pretrained model; best of K; CG, classifier guidance (one particle, a gradient
at every step); CFG, classifier-free guidance, whose conditional model is the pretrained one trained
further on the quarter that the oracle likes best of what is there (DNA: natural upstream
sequences, protein: samples); SMC and TDS (Feynman-Kac steering with K particles, of which the best
is kept, without and with gradients); SVDD with M branches. With training, all weights, at equal
compute: PRDP and GRPO on tokens, DRAKES without KL, and with several weights of it.

Guidance strengths (lambda, in 1 / standard deviation of the oracle before training) and learning
rates are chosen on a seed of their own, by the oracle that is optimised: strength is what it is
asked for, and what that costs elsewhere is what the table shows. Compute is counted in sequences
that go through the network, those with a gradient three times.

Medians over the samples of a seed, then mean and standard deviation over seeds, as the paper has
them. *likelihood* is the bound of log p under the pretrained model (nats), *3-mers* the Pearson
correlation of counts with natural sequences, *motifs* the Spearman correlation of the numbers of
hits of the JASPAR motifs (with pyjaspar installed), *identity* the mean share of equal letters of
two samples, *recovery* that of native letters.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from experiment import load
from torch import Tensor
from tqdm import tqdm

from diffreward import (
    Samples,
    evaluate,
    load_policy,
    make_reward,
    rollout,
    sample_generators,
    steer,
)  # fmt: skip
from diffreward._assets import asset_path
from diffreward.files import plain, table, write_text
from diffreward.finetuning import finetune
from diffreward.policies.guided import GuidedPolicy
from diffreward.policies.masked import MaskedPolicy
from diffreward.rewards.tokens import read_sequences
from diffreward.samples import to_strings, to_tokens
from diffreward.sequence_metrics import (
    kmer_correlation,
    motif_correlation,
    motif_hits,
    pairwise_identity,
    positional_entropy,
)
from diffreward.steering import svdd

TUNING_SEED = 1000
NAMES = {
    "pretrained": "pretrained",
    "best_of_k": "best of K",
    "cg": "CG",
    "cfg": "CFG",
    "smc": "SMC",
    "tds": "TDS",
    "svdd": "SVDD",
    "grpo": "GRPO",
    "prdp": "PRDP",
    "drakes_no_kl": "DRAKES, no KL",
    "drakes": "DRAKES",
}
GUIDED = ("cg", "cfg", "smc", "tds", "svdd")
TRAINED = ("grpo", "prdp", "drakes_no_kl", "drakes")
COLUMNS = ("oracle", "held out", "likelihood", "identity", "entropy")


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        num_steps: T.
        samples: of a seed and method.
        particles, branches: K and M.
        lmbdas: the grid of guidance strengths, in 1 / standard deviation of the oracle.
        scales: the grid of CFG's.
        rates: the grid of learning rates.
        steps: K of DRAKES.
        batch: sequences in an update.
        compute: of a trained method, in sequences through the network.
        tuning: share of that which a run of the grid gets.
        kls: weights of DRAKES' KL, in standard deviations of the oracle per nat; the first is that
            of the table's DRAKES, the others have lines of their own.
        draws: of the likelihood bound.
        pool: samples for CFG's training, where there are no natural ones, and its epochs.
    """

    num_steps: int = 32
    samples: int = 32
    particles: int = 4
    branches: int = 4
    lmbdas: tuple[float, ...] = (1.0, 4.0, 16.0)
    scales: tuple[float, ...] = (1.0, 2.0, 4.0)
    rates: tuple[float, ...] = (1e-4, 1e-3)
    steps: int = 8
    batch: int = 8
    compute: int = 24_000
    tuning: float = 0.4
    kls: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)
    draws: int = 16
    pool: int = 128
    epochs: int = 8


FULL = {
    "dna": Sizes(),
    "protein": Sizes(num_steps=16, samples=24, compute=16_000, pool=64, kls=(0.1, 0.01)),
}
TINY = Sizes(
    num_steps=3, samples=2, particles=2, branches=2, lmbdas=(1.0,), scales=(2.0,), rates=(1e-4,),
    steps=1, batch=2, compute=24, kls=(0.1,), draws=1, pool=4, epochs=1,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One method, seed and setting; ``setting`` is None where the grid decides."""

    task: str
    method: str
    seed: int
    setting: float | None = None
    kl: float | None = None

    @property
    def name(self) -> str:
        parts = [self.method]
        parts += [] if self.setting is None else [f"{self.setting:g}"]
        parts += [] if self.kl is None else [f"kl{self.kl:g}"]
        return f"{self.task}/{'-'.join(parts)}-seed{self.seed}"


def grid(method: str, sizes: Sizes) -> tuple[float, ...]:
    """What is tried on the tuning seed."""
    if method == "cfg":
        return sizes.scales
    return sizes.lmbdas if method in GUIDED else sizes.rates if method in TRAINED else ()


def sizes_of(task: str, args) -> Sizes:
    return TINY if args.tiny else FULL[task]


def plan(args) -> list[Run]:
    runs: dict[Run, None] = {}
    for task in args.tasks:
        sizes = sizes_of(task, args)
        for method in args.methods:
            settings = grid(method, sizes)
            if len(settings) > 1:
                runs |= {Run(task, method, TUNING_SEED, s): None for s in settings}
        for seed in args.seeds:
            runs |= {Run(task, method, seed): None for method in args.methods}
        if "drakes" in args.methods:
            more = [(kl, seed) for kl in sizes.kls[1:] for seed in args.seeds]
            runs |= {Run(task, "drakes", seed, kl=kl): None for kl, seed in more}
    return list(runs)


# --------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------


class Task(ABC):
    """A model, an oracle, a held-out one, and what natural sequences are like."""

    modality: str
    natural: Sequence[str] = ()

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        self.oracle, self.held_out = self.rewards()

    @abstractmethod
    def rewards(self) -> tuple:
        """The oracle, and the held-out one."""

    @abstractmethod
    def policy(self) -> MaskedPolicy:
        """A fresh one: training changes the network."""

    @abstractmethod
    def own(self, letters: list[str]) -> dict[str, float]:
        """Metrics of this task alone."""

    @cached_property
    def pretrained(self) -> MaskedPolicy:
        return self.policy()

    def samples(self, tokens: Tensor) -> Samples:
        condition = self.pretrained.encode([""] * len(tokens))
        return self.pretrained.decode(tokens, condition)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the oracle over the model's own samples; measured once."""
        path = self.folder / "spread.json"
        if not path.exists():
            value = evaluate(self.oracle, self.samples(self.pool)).value
            write_text(path, json.dumps(value.std().item()) + "\n")
        return json.loads(path.read_text())

    @cached_property
    def pool(self) -> Tensor:
        """The model's own samples, ``(pool, l)``."""
        return draw(self.pretrained, self.sizes.pool, TUNING_SEED, self.sizes.samples)

    def good(self) -> Tensor:
        """The quarter of what there is that the oracle likes best: what CFG's model learns."""
        found = self.pool
        if self.natural and len(self.natural) > len(found):
            found = torch.stack([to_tokens(s, self.modality) for s in self.natural])
        with torch.no_grad():
            parts = [evaluate(self.oracle, self.samples(p)).value for p in found.split(64)]
        return found[torch.cat(parts).topk(max(1, len(found) // 4)).indices]

    @cached_property
    def conditional(self) -> MaskedPolicy:
        """The pretrained model, trained further on what the oracle likes."""
        policy, data = self.policy(), self.good()
        parameters = list(policy.denoiser.requires_grad_(True).parameters())
        optimizer = torch.optim.AdamW(parameters, 3e-4)
        rng = torch.Generator().manual_seed(TUNING_SEED)
        for _ in range(self.sizes.epochs):
            for rows in torch.randperm(len(data), generator=rng).split(self.sizes.batch):
                condition = policy.encode([""] * len(rows))
                policy.denoising_loss(data[rows], condition, rng).mean().backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        policy.denoiser.requires_grad_(False)
        return policy

    @torch.no_grad()
    def metrics(self, tokens: Tensor) -> dict[str, float]:
        samples, letters = self.samples(tokens), to_strings(tokens, self.modality)
        policy, condition = self.pretrained, self.pretrained.encode([""] * len(tokens))
        rng = torch.Generator().manual_seed(0)
        return {
            "oracle": evaluate(self.oracle, samples).value.median().item(),
            "held out": evaluate(self.held_out, samples).value.median().item(),
            "likelihood": policy.elbo(tokens, condition, rng, self.sizes.draws).median().item(),
            "identity": pairwise_identity(letters),
            "entropy": positional_entropy(letters),
            **self.own(letters),
        }


class DNA(Task):
    """Regulatory sequence of a bacterium"""

    modality = "dna"

    def rewards(self) -> tuple:
        return make_reward("sequence_oracle"), make_reward("sequence_judge")

    def policy(self) -> MaskedPolicy:
        return load_policy("embedded:dna", num_steps=self.sizes.num_steps)

    @cached_property
    def natural(self) -> list[str]:
        return read_sequences(asset_path("dna/natural_upstream.fasta"), "dna")

    @cached_property
    def motifs(self) -> list:
        try:
            from pyjaspar import jaspardb
        except ImportError:
            return []
        from diffreward.rewards.motifs import load_motifs

        found = jaspardb().fetch_motifs(collection="CORE", all_versions=False)
        return [load_motifs(m.matrix_id)[0] for m in found]

    @cached_property
    def natural_hits(self) -> np.ndarray:
        return motif_hits(self.natural, self.motifs)

    def own(self, letters: list[str]) -> dict[str, float]:
        found = {"3-mers": kmer_correlation(letters, self.natural)}
        if self.motifs and self.sizes is not TINY:
            found["motifs"] = motif_correlation(letters, self.natural_hits, self.motifs)
        return found


class Protein(Task):
    """Sequences for one backbone"""

    modality = "protein"

    def rewards(self) -> tuple:
        ensemble = {"name": "mpnn_likelihood", "weights": ["v_48_002", "v_48_010", "v_48_030"]}
        return make_reward(ensemble), make_reward(
            {"name": "mpnn_likelihood", "weights": "s_48_020"}
        )

    def policy(self) -> MaskedPolicy:
        return load_policy(
            "embedded:protein", structure="1ubi.pdb", num_steps=self.sizes.num_steps,
            temperature=1.0, tau=0.5,
        )  # fmt: skip

    def own(self, letters: list[str]) -> dict[str, float]:
        tokens = torch.stack([to_tokens(s, "protein") for s in letters])
        return {"recovery": self.pretrained.recovery(tokens).mean().item()}


TASKS = {"dna": DNA, "protein": Protein}

# --------------------------------------------------------------------------------------------
# Methods
# --------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(policy: MaskedPolicy, n: int, seed: int, batch: int) -> Tensor:
    """Sequences ``(n, l)``, sample j from the noise of prompt j."""
    found = []
    for start in range(0, n, batch):
        rows = min(batch, n - start)
        noise = sample_generators(seed, rows, 1, first_prompt=start)
        found.append(rollout(policy, policy.encode([""] * rows), noise).final)
    return torch.cat(found)


@contextmanager
def counted(*policies: MaskedPolicy) -> Iterator[dict[str, int]]:
    """Sequences that go through the networks: once, and twice more if they have a gradient."""
    rows = {"forward": 0, "with gradient": 0}

    def count(module, given, out) -> None:
        rows["with gradient" if out.requires_grad else "forward"] += len(out)

    hooks = [policy.denoiser.register_forward_hook(count) for policy in policies]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
        rows["compute"] = rows["forward"] + 3 * rows["with gradient"]


class Lab:
    """Performs runs of one task."""

    def __init__(self, name: str, sizes: Sizes, output: Path) -> None:
        self.name, self.sizes, self.output = name, sizes, output
        (output / name).mkdir(parents=True, exist_ok=True)
        self.task = TASKS[name](sizes, output / name)

    def setting(self, run: Run) -> float | None:
        """The run's own, or what its grid says."""
        options = grid(run.method, self.sizes)
        if run.setting is not None or len(options) < 2:
            return run.setting if run.setting is not None else (options or (None,))[0]
        ends = {}
        for option in options:
            row = load(self.output, Run(run.task, run.method, TUNING_SEED, option).name)
            ends[option] = row["metrics"]["oracle"] if row else -math.inf
        return max(ends, key=ends.get)

    def perform(self, run: Run) -> dict:
        setting, started = self.setting(run), time.process_time()
        row = {"task": run.task, "method": run.method, "seed": run.seed, "setting": setting}
        row |= {"kl_weight": run.kl, "tuning": run.setting is not None}
        if run.method in TRAINED:
            policy, training = self.trained(run, setting)
            row |= training
        else:
            policy = self.task.pretrained
        others = [self.task.conditional] if run.method == "cfg" else []
        with counted(policy, *others) as rows:
            tokens = self.sampled(run, policy, setting)
        row |= {
            "compute_per_sequence": rows["compute"] / len(tokens),
            "seconds": time.process_time() - started,
            "metrics": self.task.metrics(tokens),
        }
        folder = self.output / run.name
        folder.mkdir(parents=True, exist_ok=True)
        letters = to_strings(tokens, self.task.modality)
        write_text(folder / "samples.fasta", "".join(f">{j}\n{s}\n" for j, s in enumerate(letters)))
        write_text(folder / "row.json", json.dumps(plain(row)) + "\n")
        return row

    def sampled(self, run: Run, policy: MaskedPolicy, setting: float | None) -> Tensor:
        sizes, oracle, n = self.sizes, self.task.oracle, self.sizes.samples
        if run.method == "cfg":
            return draw(GuidedPolicy(self.task.conditional, policy, setting), n, run.seed, n)
        if run.method in (*TRAINED, "pretrained"):
            return draw(policy, n, run.seed, n)
        prompts, k = [""] * n, sizes.particles
        options = {"seed": run.seed, "max_batch": n * k, "progress": False}
        if run.method == "best_of_k":
            return steer(
                policy, oracle, prompts, num_particles=k, lmbda=0.0, **options
            ).samples.data
        options["lmbda"] = setting / self.task.spread
        if run.method == "svdd":
            found = svdd(policy, oracle, prompts, branches=sizes.branches, **options)
        elif run.method == "cg":
            found = steer(
                policy, oracle, prompts, num_particles=1, proposal="gradient", schedule=1, **options
            )
        else:
            proposal = "gradient" if run.method == "tds" else "policy"
            found = steer(policy, oracle, prompts, num_particles=k, proposal=proposal, **options)
        return found.samples.data

    def trained(self, run: Run, rate: float) -> tuple[MaskedPolicy, dict]:
        """The finetuned policy, and what that took."""
        sizes, policy = self.sizes, self.task.policy()
        spread, t = self.task.spread, sizes.num_steps
        compute = sizes.compute * (sizes.tuning if run.setting is not None else 1)
        if run.method.startswith("drakes"):
            weight = 0.0 if run.method == "drakes_no_kl" else (run.kl or sizes.kls[0]) * spread
            algorithm = {"name": "drakes", "steps": sizes.steps, "kl": weight}
            # with a gradient the last K, and two early ones of each sample again; the reference's
            one = t - sizes.steps + 3 * sizes.steps
            one += (sizes.steps + 2 * (3 + 1)) if weight else 0
        else:
            algorithm = {"name": run.method}
            one = t * (1 + 3 + (run.method == "prdp"))
        iterations = max(1, round(compute / (one * sizes.batch)))
        with counted(policy) as rows:
            result = finetune(
                policy, self.task.oracle, algorithm, [""], method="full", learning_rate=rate,
                schedule="linear", iterations=iterations, prompts_per_update=1,
                samples_per_prompt=sizes.batch, seed=run.seed, evaluate_every=0, loggers=[],
                checkpoint_every=0, eval_samples=2, progress=False, weight_decay=0.0,
            )  # fmt: skip
        rewards = [r["reward"] for r in result.metrics if "reward" in r]
        found = {"iterations": iterations, "training_compute": rows["compute"], "curve": rewards}
        return policy, found | {"kl": result.after.kl.mean().item(), "algorithm": algorithm}


def perform(args) -> None:
    left = [run for run in plan(args) if load(args.output, run.name) is None]
    labs: dict[str, Lab] = {}
    for run in tqdm(left, unit="run"):
        if load(args.output, run.name) is not None:  # by another process, meanwhile
            continue
        if run.task not in labs:
            labs[run.task] = Lab(run.task, sizes_of(run.task, args), args.output)
        row = labs[run.task].perform(run)
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in row["metrics"].items())
        tqdm.write(f"{run.name}: {row['seconds']:.0f} s, {numbers}")


# --------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------


def spread_of(values: list[float]) -> str:
    """Mean (standard deviation over seeds)."""
    return f"{np.mean(values):.3g}" + (f" ({np.std(values, ddof=1):.2g})" if values[1:] else "")


def by_method(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """The table's lines: methods in order, then DRAKES with other weights of the KL."""
    main = [row for row in rows if not row["tuning"]]
    lines = [
        (name, [r for r in main if r["method"] == method and r["kl_weight"] is None])
        for method, name in NAMES.items()
    ]
    for kl in sorted({r["kl_weight"] for r in main if r["kl_weight"] is not None}):
        lines.append((f"DRAKES, KL {kl:g}", [r for r in main if r["kl_weight"] == kl]))
    return [(name, found) for name, found in lines if found]


def table_of(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(c for row in rows for c in row["metrics"]))
    header = ["method", "seeds", "setting", *columns, "KL", "compute per sequence", "training"]
    lines = []
    for name, found in by_method(rows):
        first = found[0]
        lines.append(
            [
                name, str(len(found)), "" if first["setting"] is None else f"{first['setting']:g}",
                *(spread_of([r["metrics"][c] for r in found]) for c in columns),
                spread_of([r["kl"] for r in found]) if "kl" in first else "",
                f"{np.mean([r['compute_per_sequence'] for r in found]):.0f}",
                f"{np.mean([r['training_compute'] for r in found]):.0f}"
                if "training_compute" in first else "",
            ]
        )  # fmt: skip
    return table(header, lines, markdown=True)


def report(args) -> None:
    texts = []
    for task in TASKS:
        found = sorted((args.output / task).glob("*/row.json"))
        rows = [json.loads(path.read_text()) for path in found]
        if not any(not row["tuning"] for row in rows):
            continue
        texts += [f"### {task}", table_of(rows)]
        trade_off(rows, args.output / f"drakes_{task}.png")
    if not texts:
        print(f"there are no finished runs in {args.output}, so there is nothing to report")
        return
    text = "\n\n".join(texts)
    print(text)
    write_text(args.output / "report.md", text + "\n")


def trade_off(rows: list[dict], path: Path) -> None:
    """The optimised oracle against the held-out one, and against what natural sequences have."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    natural = next(n for n in ("3-mers", "recovery") if n in rows[0]["metrics"])
    labels = {
        "held out": "held-out oracle (median)",
        "3-mers": "3-mer correlation with natural sequences",
        "recovery": "share of native letters",
        "identity": "mean identity of two samples",
    }
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    lines = by_method(rows)
    marks = "o^v<>sDPXphd*"
    for axis, label in zip(figure.subplots(1, 3), ("held out", natural, "identity"), strict=True):
        for number, (name, found) in enumerate(lines):
            x, y = (np.array([r["metrics"][c] for r in found]) for c in ("oracle", label))
            axis.errorbar(
                x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), fmt=marks[number % len(marks)],
                color=colormaps["tab20"](number % 20), capsize=2, label=name,
            )  # fmt: skip
        curve = [f for n, f in lines if n.startswith("DRAKES")]
        points = sorted(
            [np.mean([r["kl"] for r in f])]
            + [np.mean([r["metrics"][c] for r in f]) for c in ("oracle", label)]
            for f in curve
        )
        if len(points) > 1:
            axis.plot(*np.array(points)[:, 1:].T, color="grey", lw=0.8, ls=":", zorder=0)
        axis.set(xlabel="optimised oracle (median)", ylabel=labels[label])
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=120)
    print(f"figure: {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/drakes"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--tiny", action="store_true", help="a minute: to see that it runs")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.seeds = args.seeds or ([0, 1] if args.tiny else [0, 1, 2])
    if not args.report:
        perform(args)
    report(args)


if __name__ == "__main__":
    main()

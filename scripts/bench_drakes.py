"""What an update of DRAKES costs, and what sampling does without the calls that change nothing.

    python scripts/bench_drakes.py                      # DNA and protein
    python scripts/bench_drakes.py --tiny               # seconds: to see that it runs
    python scripts/bench_drakes.py --models dna_paper --device cuda

``update``: loss and gradient of one batch by `diffreward.algorithms.drakes`, and by a
    straightforward implementation of the published procedure: the chain is drawn with a graph at
    every step, then both networks are called again on all T states for their KL, and every graph is
    kept for one backward pass. Both have the same noise, relaxation and (corrected) KL. With all
    early steps the gradients are the same, and their difference is given; the default draws two of
    the early steps for each sample, which leaves the gradient unbiased, and ``checkpoint`` keeps a
    step's input instead of its activations.
``sampling``: sequences a second of a plain rollout, of one that reuses logits where no letter has
    changed, and of first-hitting sampling.

The networks of DNA have random weights, which costs the same as trained ones. Goals: a third of the
time, a quarter of the memory. Results belong in docs/benchmarks.md, with hardware and date.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_finetune import SavedBytes, alternate, ratio, resident_peak
from torch import Tensor

from diffreward.algorithms.drakes import DRAKES
from diffreward.networks.dna import PAPER, SMALL, DNAConvNet
from diffreward.policies.dna import DNAPolicy
from diffreward.policies.masked import MaskedPolicy, first_hitting
from diffreward.policies.protein import load_protein
from diffreward.policy import rollout, sample_generators
from diffreward.rewards import evaluate, make_reward

PLAIN = "published procedure"
ALL_STEPS, DEFAULT, CHECKPOINTED = "all KL", "default", "default, checkpoint"


@dataclass
class Case:
    """A model, its reward and the sizes of an update; T to K about as the paper's 128 to 50."""

    model: str
    reward: str
    batch: int
    num_steps: int
    differentiated: int

    def policy(self, device: str) -> MaskedPolicy:
        if self.model == "protein":
            return load_protein(num_steps=self.num_steps, tau=0.5, device=device)
        torch.manual_seed(0)
        sizes = {"dna": SMALL, "dna_paper": PAPER, "dna_tiny": {"channels": 8, "rounds": 1}}
        network = DNAConvNet(**sizes[self.model]).to(device)
        return DNAPolicy(network, 20 if self.model == "dna_tiny" else 200, num_steps=self.num_steps)


CASES = {
    "dna": Case("dna", "gc_content", 4, 32, 12),
    "dna_paper": Case("dna_paper", "gc_content", 32, 128, 50),
    "protein": Case("protein", "hydropathy", 4, 24, 12),
}
TINY = {"dna": Case("dna_tiny", "gc_content", 2, 4, 2)}


class Update:
    """One batch's loss and gradient, in the ways that are compared."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.policy = case, case.policy(device)
        self.reward = make_reward(case.reward)
        self.reference = self.policy.reference()
        self.parameters = [p for p in self.policy.denoiser.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # where training has been; at the reference the KL has no gradient
            for p in self.parameters:
                p += 1e-2 * torch.randn(p.shape, generator=generator).to(p)
        self.condition = self.policy.encode(["bench"] * case.batch)

    def generators(self) -> list[torch.Generator]:
        return sample_generators(0, 1, self.case.batch)

    @property
    def arms(self) -> dict[str, Callable[[], Tensor]]:
        """Each leaves its gradient in the parameters, and returns it."""
        ours = {
            ALL_STEPS: {"early": None}, DEFAULT: {}, CHECKPOINTED: {"checkpoint": True},
        }  # fmt: skip
        arms = {
            name: lambda options=options: self.ours(**options) for name, options in ours.items()
        }
        return {PLAIN: self.plain, **arms}

    def ours(self, **options) -> Tensor:
        algorithm = DRAKES(steps=self.case.differentiated, **options)
        loss, _, _ = algorithm.loss(
            self.policy, self.condition, self.generators(),
            lambda samples: evaluate(self.reward, samples), self.reference,
        )  # fmt: skip
        return self.gradient(loss)

    def plain(self) -> Tensor:
        """As published: all of it in one graph, and both networks again for the KL."""
        policy, condition, generators = self.policy, self.condition, self.generators()
        first = policy.num_steps - self.case.differentiated
        x, states = policy.initial(condition, generators), []
        for i in range(policy.num_steps):
            law = policy.step_law(x, i, condition)
            states.append((x, law) if i < first else (x, None))
            x = law.sample(generators) if i < first else law.rsample(generators)
        letters = torch.nn.functional.one_hot(x[..., :-1].argmax(-1), x.shape[-1]).to(x)
        samples = policy.decode(letters + (x - x.detach()), condition)
        nats = 0.0
        for i, (state, _) in enumerate(states):
            law, other = (p.step_law(state, i, condition) for p in (policy, self.reference))
            nats = nats + law.kl(other)
        return self.gradient(DRAKES().kl * nats - evaluate(self.reward, samples).value)

    def gradient(self, loss: Tensor) -> Tensor:
        loss.mean().backward()
        found = torch.cat([p.grad.flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return found

    def saved(self, arm: str) -> int:
        networks = (self.policy.denoiser, self.reference.denoiser)
        with SavedBytes([p for n in networks for p in n.parameters()]) as saved:
            self.arms[arm]()
        return saved.peak


def update(model: str, case: Case, args) -> dict:
    work = Update(case, args.device)
    whole, ours = work.plain(), work.ours(early=None)
    seconds = alternate(work.arms, args.repeats, args.device)
    saved = {arm: work.saved(arm) for arm in work.arms}
    found = {
        "batch": case.batch, "T": case.num_steps, "K": case.differentiated,
        "relative difference of gradients": float(f"{((ours - whole).norm() / whole.norm()):.1e}"),
        "seconds": {arm: round(statistics.median(s), 3) for arm, s in seconds.items()},
        "time of the published procedure over": {
            arm: ratio(seconds, PLAIN, arm) for arm in seconds if arm != PLAIN
        },
        "saved_mib": {arm: round(n / 2**20, 1) for arm, n in saved.items()},
        "saved by the published procedure over": {
            arm: round(saved[PLAIN] / n, 2) for arm, n in saved.items() if arm != PLAIN
        },
    }  # fmt: skip
    if not args.no_peaks:
        found["peak_mib"] = peaks(model, args)
    return found


def peaks(model: str, args) -> dict[str, float]:
    """MiB of each arm, in a process of its own, beside that of the loaded model."""
    found = {}
    for arm in ("loaded", PLAIN, ALL_STEPS, DEFAULT, CHECKPOINTED):
        command = [sys.executable, __file__, *args.argv, "--peak_of", arm, "--models", model]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[arm] = round(float(out.strip().splitlines()[-1]), 1)
    return found


def peak_of(case: Case, args) -> float:
    work = Update(case, args.device)
    cuda = torch.device(args.device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if args.peak_of != "loaded":
        work.arms[args.peak_of]()
    return (torch.cuda.max_memory_allocated() if cuda else resident_peak()) / 2**20


@torch.no_grad()
def sampling(model: str, case: Case, args) -> dict:
    policy = case.policy(args.device)
    condition = policy.encode(["bench"] * case.batch)

    def plain() -> Tensor:
        return rollout(policy, condition, sample_generators(0, 1, case.batch)).final

    def reused() -> Tensor:
        with policy.reuse_logits():
            return plain()

    def hitting() -> Tensor:
        return first_hitting(policy, condition, sample_generators(0, 1, case.batch)).final

    found, length = {}, policy.latent_shape(condition)[0]
    for num_steps in dict.fromkeys([case.num_steps, length, 4 * length]):
        policy.num_steps = num_steps
        if not torch.equal(plain(), reused()):
            raise RuntimeError("reused logits gave other sequences")
        arms = {"every call": plain, "reused": reused, "first hitting": hitting}
        seconds = alternate(arms, args.repeats, args.device)
        found[f"T = {num_steps}, l = {length}"] = {
            "sequences_per_second": {
                name: float(f"{case.batch / statistics.median(s):.3g}")
                for name, s in seconds.items()
            },
            "time of every call over": {
                name: ratio(seconds, "every call", name) for name in arms if name != "every call"
            },
        }
    return found


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, help="default: dna protein")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="2 short sequences, a small network")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--repeats", type=int, help="default: 3")
    parser.add_argument("--no_peaks", action="store_true", help="no processes for peak memory")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = [word for word in argv if word not in CASES and word != "--models"]
    args.models = args.models or (["dna"] if args.tiny else ["dna", "protein"])
    args.repeats = args.repeats or (1 if args.tiny else 3)
    cases = TINY if args.tiny else CASES
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of(cases[args.models[0]], args))
        return
    cuda = torch.device(args.device).type == "cuda"
    found = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    for model in args.models:
        found[model] = {part: PARTS[part](model, cases[model], args) for part in args.parts}
    print(json.dumps(found, indent=2))


PARTS = {"update": update, "sampling": sampling}

if __name__ == "__main__":
    main()

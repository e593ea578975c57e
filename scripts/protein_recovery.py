"""How much of a native sequence do masked and autoregressive sampling of ProteinMPNN recover?

    python scripts/protein_recovery.py --samples 16

Autoregressive sampling reveals one position per network call, masked sampling several; each sample
has a random decoding order of its own. Prints a table; minutes on a CPU.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from diffreward.networks.proteinmpnn import random_order
from diffreward.policies.protein import ProteinPolicy, load_protein
from diffreward.policy import rollout, sample_generators


def orders(policy: ProteinPolicy, generators: list[torch.Generator]) -> Tensor:
    """A random decoding order for each sample, ``(b, l)``."""
    return torch.stack([random_order(policy.designed, g) for g in generators])


@torch.no_grad()
def autoregressive(policy: ProteinPolicy, generators: list[torch.Generator]) -> Tensor:
    """Sequences ``(b, l)``, one position per network call in each sample's own order."""
    order = orders(policy, generators)
    condition = policy.encode([""] * len(generators), order=order)
    x = policy.initial(condition)
    rows = torch.arange(len(x))
    for step in range(int((~policy.designed).sum()), x.shape[1]):
        at = (order == step).long().argmax(1)
        p = policy.step_law(x, 0, condition).x0[rows, at]
        drawn = [torch.multinomial(q, 1, generator=g) for q, g in zip(p, generators, strict=True)]
        x[rows, at] = torch.cat(drawn)
    return x


@torch.no_grad()
def masked(policy: ProteinPolicy, generators: list[torch.Generator]) -> Tensor:
    """Sequences ``(b, l)`` by the policy's chain."""
    condition = policy.encode([""] * len(generators), order=orders(policy, generators))
    with policy.reuse_logits():
        return rollout(policy, condition, generators).final


def measure(structure: str, samples: int, steps: list[int], temperature: float, seed: int) -> None:
    """Print one row of the table per way of sampling."""
    ways = [("autoregressive", 1, autoregressive)]
    ways += [(f"masked, {n} steps", n, masked) for n in steps]
    for name, num_steps, sample in ways:
        policy = load_protein(structure, num_steps=num_steps, temperature=temperature)
        generators = sample_generators(seed, 1, samples)
        start = time.process_time()
        x = sample(policy, generators)
        seconds = (time.process_time() - start) / samples
        found = policy.recovery(x)
        error = found.std() / samples**0.5
        order = orders(policy, sample_generators(seed + 1, 1, samples))
        with torch.no_grad():
            fit = policy.denoiser.log_likelihood(x, policy._backbone, order).mean()
        print(
            f"| {structure} ({x.shape[1]}) | {name} | {found.mean():.3f} ± {error:.3f} "
            f"| {fit:.3f} | {seconds:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--structures", nargs="+", default=["1ubi.pdb", "1ake.pdb"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| structure (residues) | sampling | recovery | log-likelihood per residue | CPU s |")
    print("|---|---|---|---|---|")
    for structure in args.structures:
        measure(structure, args.samples, args.steps, args.temperature, args.seed)


if __name__ == "__main__":
    main()

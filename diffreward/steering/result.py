"""What steering returns, and what it says about itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffreward.rewards.base import Scores
from diffreward.samples import Samples


@dataclass
class BestOfN:
    """Plain samples at the same number of network evaluations, from the same noise.

    Attributes:
        samples: the P best, one per prompt.
        particles, scores: all, ``P * N``, prompt-major; N = K beside `steer`.
        best: ``(P,)`` index of the best within its prompt.
    """

    samples: Samples
    particles: Samples
    scores: Scores
    best: Int[Tensor, " P"]


@dataclass
class SteeringResult:
    """What `steer` returns; P prompts, K particles, H scored steps before the end.

    Attributes:
        samples: one per prompt, the particle of highest reward.
        particles, scores: all ``P * K``, prompt-major.
        best: ``(P,)`` index of the best particle within its prompt.
        log_weights: ``(P, K)`` weights since the last resampling. The particles represent the
            tilted law only together with these weights.
        log_z: ``(P,)`` estimate of log E[exp(lambda r)], exponentially unbiased unless lambda was
            adapted to the particles.
        roots: ``(P,)`` number of distinct initial particles that have descendants.
        ess: ``(H + 1, P)`` effective sample size before each selection, and at the end.
        ancestors: ``(H, P, K)``.
        lmbdas: ``(H, P)`` lambda at each selection.
        steps: the H scored steps.
        best_of_n: the baseline, if it was asked for.
    """

    samples: Samples
    particles: Samples
    scores: Scores
    best: Int[Tensor, " P"]
    log_weights: Float[Tensor, "P K"]
    log_z: Float[Tensor, " P"]
    roots: Int[Tensor, " P"]
    ess: Float[Tensor, "H1 P"]
    ancestors: Int[Tensor, "H P K"]
    lmbdas: Float[Tensor, "H P"]
    steps: list[int] = field(default_factory=list)
    best_of_n: BestOfN | None = None


@dataclass
class SVDDResult:
    """What `svdd` returns; P prompts, K chains of each, H steps that branched.

    The chains of a prompt are independent and have equal weights. There is no estimate of log Z:
    nothing corrects for the finite number of candidates, nor for values that are not exact.

    Attributes:
        samples: one per prompt, the chain of highest reward.
        particles, scores: all ``P * K``, prompt-major.
        best: ``(P,)`` index of the best chain within its prompt.
        chosen: ``(H, P, K)`` which of its M candidates each chain went on with.
        steps: the H steps.
        best_of_n: the baseline, if it was asked for.
    """

    samples: Samples
    particles: Samples
    scores: Scores
    best: Int[Tensor, " P"]
    chosen: Int[Tensor, "H P K"]
    steps: list[int]
    best_of_n: BestOfN | None = None


def pick_best(particles: Samples, scores: Scores, k: int) -> tuple[Int[Tensor, " P"], Samples]:
    """Index within each group of k of the highest score, and those samples."""
    best = scores.value.detach().cpu().view(-1, k).argmax(1)
    return best, particles.take(best + torch.arange(len(best)) * k)


def warn_if_collapsed(result: SteeringResult, prompts: Sequence[str]) -> None:
    """Warn when all particles of a prompt descend from one initial particle."""
    p, k = result.log_weights.shape
    gone = [prompts[j] for j in range(p) if k > 1 and result.roots[j] == 1]
    if gone:
        warnings.warn(
            f"all {k} particles descend from one root for {len(gone)} of {p} prompts (the first: "
            f"{gone[0]!r}); they are near-copies. A smaller lmbda, a smaller ess_threshold, fewer "
            "scheduled steps or more particles keep more of them apart",
            stacklevel=3,
        )


def join_results(results: list) -> Any:
    """Groups of prompts, sampled one after the other, as one result of the same class."""

    def join(name: str) -> Any:
        parts = [getattr(result, name) for result in results]
        if parts[0] is None or name == "steps":
            return parts[0]
        if isinstance(parts[0], BestOfN):
            return join_results(parts)
        if isinstance(parts[0], Tensor):
            steps_first = name in ("ess", "ancestors", "lmbdas", "chosen")
            return torch.cat(parts, 1 if steps_first else 0)
        return type(parts[0]).cat(parts)

    return type(results[0])(**{field.name: join(field.name) for field in fields(results[0])})

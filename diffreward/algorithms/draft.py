"""DRaFT and AlignProp: the gradient of the reward through the last steps of the chain.

Clark et al. 2023, *Directly Fine-Tuning Diffusion Models on Differentiable Rewards*,
arXiv:2309.17400, Algorithm 1. Prabhudesai et al. 2023, *Aligning Text-to-Image Diffusion Models
with Reward Backpropagation*, arXiv:2310.03739. Both descend L = -r(x[T], c) by backpropagation
through sampling, truncated to the last K steps: the gradient stops at x[T - K].

paper                   code
DRaFT                   ``DRaFT(steps=None)``: K = T, the exact gradient of the expected reward
DRaFT-K                 ``DRaFT(steps=K)``
DRaFT-LV, n             ``DRaFT(steps=1, extra=n)``; n = 2
AlignProp, K random     ``AlignProp(...)``; T - K is ``first``, the first step with a gradient

*DRaFT-LV* noises the finished sample n more times to x[T - 1], takes the last step again from each,
and averages the 1 + n gradients, which costs n more steps but no chain. An extra gradient has the
law of the first only where the noised samples are distributed as the chain's own x[T - 1]; as far
as the chain's marginals are not those of noising, the average is biased. (The paper sums the
gradients, which is 1 + n times the average.)

Truncation leaves out what the early steps' parameters do to the reward, and is biased in any case.
Steps without noise are differentiated as any other: DDIM with eta = 0 works as it is.

Differences from AlignProp's code: each sample draws its own K, where a batch of theirs shares one.
Its published values are those of the code at 50 steps: ``first`` normal with mean 42 and standard
deviation 5, or uniform on 30..49 (both in its second trainer), or on 0..50 (its first one, which
draws anew at every step whether the network's output is detached), given here as fractions of the
chain; loss weight 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from diffreward.algorithms.base import PathwiseAlgorithm, require_kappa, take_generators, uniform
from diffreward.policy import Condition, Generators, Policy
from diffreward.rewards import Scores
from diffreward.samples import Samples


@dataclass(frozen=True)
class DRaFT(PathwiseAlgorithm):
    """Backpropagation through the last steps.

    Args:
        steps: K, how many; null: the whole chain.
        extra: n, further noisings of the finished sample (DRaFT-LV); with steps=1 only.
        weight: the loss is -weight * reward.
        checkpoint: keep a step's input instead of its activations, and compute it twice.
        kappa: what is climbed is the reward minus kappa times its std, with the gradient of both;
            above 0, rewards without a std are refused.

    Raises:
        ValueError: a value out of range; in `loss`, more steps than the chain has, or ``extra``
            for a policy without ``noise_to``.
    """

    steps: int | None = 1
    extra: int = 0
    weight: float = 1.0
    checkpoint: bool = False
    kappa: float = 0.0

    presets: ClassVar = {
        "draft": {"steps": None, "checkpoint": True},
        "draft_1": {"steps": 1},
        "draft_lv": {"steps": 1, "extra": 2},
    }

    def __post_init__(self) -> None:
        require_kappa(self)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be 1 or more, or null (all), but {self.steps} came")
        if self.extra < 0:
            raise ValueError(f"extra must be 0 or more, but {self.extra} came")
        if self.extra and self.steps != 1:
            raise ValueError(
                f"extra={self.extra} repeats the last step alone and goes with steps=1, but "
                f"steps={self.steps} came"
            )
        _check_weight(self.weight)

    def loss(
        self,
        policy: Policy,
        condition: Condition,
        generator: Generators,
        score: Callable[[Samples], Scores],
    ) -> tuple[Float[Tensor, " b"], Samples, Scores]:
        last = policy.num_steps - 1
        steps = policy.num_steps if self.steps is None else self.steps
        if steps > policy.num_steps:
            raise ValueError(
                f"steps={steps} are to be differentiated, but the chain has {policy.num_steps}"
            )
        if self.extra and not hasattr(policy, "noise_to"):
            raise ValueError(
                f"extra={self.extra} noises the finished sample, and {type(policy).__name__} "
                "cannot (it has no noise_to); use extra=0"
            )
        x = policy.initial(condition, generator)
        first = torch.full((len(x),), policy.num_steps - steps)
        x = _run(policy, x, condition, generator, first, self.checkpoint)
        value, samples, scores = self.judge(policy, x, condition, score)
        values = [value]
        for _ in range(self.extra):
            again = policy.noise_to(x.detach(), last, generator)
            again = _step(policy, again, last, condition, generator, self.checkpoint)
            values.append(self.judge(policy, again, condition, score)[0])
        return -self.weight * torch.stack(values).mean(0), samples, scores


@dataclass(frozen=True)
class AlignProp(PathwiseAlgorithm):
    """Backpropagation through a random number of last steps.

    Args:
        truncation: the law of the first step with a gradient.
        mean, std: of the normal law, as fractions of the chain; it is cut off at the chain's ends.
        low, high: of the uniform law, as fractions of the chain; ``high`` is not reached.
        weight: the loss is -weight * reward.
        checkpoint: keep a step's input instead of its activations, and compute it twice.
        kappa: what is climbed is the reward minus kappa times its std, with the gradient of both;
            above 0, rewards without a std are refused.

    Raises:
        ValueError: a value out of range.
    """

    truncation: Literal["normal", "uniform"] = "normal"
    mean: float = 0.84
    std: float = 0.1
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    checkpoint: bool = False
    kappa: float = 0.0

    presets: ClassVar = {
        "paper": {"truncation": "uniform", "low": 0.0, "high": 1.0, "weight": 0.01},
        "normal": {"truncation": "normal", "mean": 0.84, "std": 0.1, "weight": 0.01},
        "uniform": {"truncation": "uniform", "low": 0.6, "high": 1.0, "weight": 0.01},
    }

    def __post_init__(self) -> None:
        require_kappa(self)
        if self.truncation not in ("normal", "uniform"):
            raise ValueError(f"truncation must be normal or uniform, but {self.truncation!r} came")
        if not (0 <= self.mean <= 1 and 0 < self.std < math.inf):
            raise ValueError(
                "mean must lie in [0, 1] and std must be positive and finite (fractions of the "
                f"chain), but {self.mean} and {self.std} came"
            )
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                "low and high are fractions of the chain with 0 <= low < high <= 1, but "
                f"{self.low} and {self.high} came"
            )
        _check_weight(self.weight)

    def first(
        self, num_steps: int, num_samples: int, generator: Generators = None
    ) -> Int[Tensor, " b"]:
        """The first step with a gradient, T - K, of each sample."""
        u = uniform(num_samples, generator)
        if self.truncation == "uniform":
            at = self.low + u * (self.high - self.low)
        else:  # the inverse distribution function of the normal law cut off at 0 and 1
            ends = torch.tensor([0.0, 1.0], dtype=u.dtype)
            below, above = torch.special.ndtr((ends - self.mean) / self.std)
            at = self.mean + self.std * torch.special.ndtri(below + u * (above - below))
        return (at * num_steps).long().clamp(0, num_steps - 1)

    def loss(
        self,
        policy: Policy,
        condition: Condition,
        generator: Generators,
        score: Callable[[Samples], Scores],
    ) -> tuple[Float[Tensor, " b"], Samples, Scores]:
        x = policy.initial(condition, generator)
        first = self.first(policy.num_steps, len(x), generator)
        x = _run(policy, x, condition, generator, first, self.checkpoint)
        value, samples, scores = self.judge(policy, x, condition, score)
        return -self.weight * value, samples, scores


def _run(
    policy: Policy,
    x: Tensor,
    condition: Condition,
    generator: Generators,
    first: Int[Tensor, " b"],
    checkpoint: bool,
) -> Tensor:
    """x[T] from x[0], with the graph of the steps i >= first of each sample and of no others."""
    for i in range(policy.num_steps):
        with_graph, without = (first <= i).nonzero()[:, 0], (first > i).nonzero()[:, 0]
        parts = []
        for rows, context in ((with_graph, nullcontext()), (without, torch.no_grad())):
            if len(rows) == 0:
                continue
            everything = len(rows) == len(x)
            part, c = (x, condition) if everything else (x[rows], condition.take(rows))
            with context:
                given = take_generators(generator, rows)
                parts.append(_step(policy, part, i, c, given, checkpoint))
        x = torch.cat(parts)[torch.cat([with_graph, without]).argsort()] if parts[1:] else parts[0]
    return x


def _step(
    policy: Policy,
    x: Tensor,
    i: int,
    condition: Condition,
    generator: Generators,
    checkpoint: bool,
) -> Tensor:
    if checkpoint and torch.is_grad_enabled():
        # the draw stays outside: it must not be repeated with the generators' later states
        law = checkpointed(policy.step_law, x, i, condition, use_reentrant=False)
    else:
        law = policy.step_law(x, i, condition)
    return law.rsample(generator)


def _check_weight(weight: float) -> None:
    if not 0 < weight < math.inf:
        raise ValueError(f"weight must be positive and finite, but {weight} came")

"""ReFL: the gradient of the reward of one clean prediction, at a random late step.

Xu et al. 2023, *ImageReward: Learning and Evaluating Human Preferences for Text-to-Image
Generation*, arXiv:2304.05977, section 3, Algorithm 1. The chain runs without gradients to a random
step; there the network's clean prediction is decoded and scored, and the gradient flows through
that one network call:

    L = lambda * phi(r(c, x0(x[i]))),    phi(r) = max(0, margin - r)

paper          code                  published
lambda         ``weight``            1e-3
phi            ``margin``            max(0, 2 - r)
t in [T1, T2]  ``start``, ``end``    steps 30..39 of 40, as fractions of the chain: 0.75, 1

Differences from the authors' code: each sample has a step of its own, drawn by its own generator,
where a batch of theirs shares one; the network is given the time of the step it is at (theirs is
given the step's number, and x0 is taken with the time of the step before); guidance is the
policy's (theirs has none). Their code leaves out the paper's pretraining loss, and so does this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffreward.algorithms.base import PathwiseAlgorithm, require_kappa, take_generators, uniform
from diffreward.policy import Condition, Generators, Policy
from diffreward.rewards import Scores
from diffreward.samples import Samples


@dataclass(frozen=True)
class ReFL(PathwiseAlgorithm):
    """Reward feedback learning.

    Args:
        weight: of the loss.
        margin: rewards above it are good enough and teach nothing (reward units); null: the loss
            is -weight * reward without end.
        start: the first step that may be differentiated, as a fraction of the chain.
        end: the fraction of the chain before which the last one lies.
        kappa: what is climbed is the reward minus kappa times its std, with the gradient of both;
            above 0, rewards without a std are refused.

    Raises:
        ValueError: a value out of range.
    """

    weight: float = 1e-3
    margin: float | None = 2.0
    start: float = 0.75
    end: float = 1.0
    kappa: float = 0.0

    presets: ClassVar = {"paper": {"weight": 1e-3, "margin": 2.0, "start": 0.75, "end": 1.0}}

    def __post_init__(self) -> None:
        require_kappa(self)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be positive and finite, but {self.weight} came")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite or null (no margin), but {self.margin} came")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                "start and end are fractions of the chain with 0 <= start < end <= 1, but "
                f"{self.start} and {self.end} came"
            )

    def steps(
        self, num_steps: int, num_samples: int, generator: Generators = None
    ) -> Int[Tensor, " b"]:
        """The step that is differentiated: uniform over the window; if that is empty, its first."""
        first = min(round(self.start * num_steps), num_steps - 1)
        width = round(self.end * num_steps) - first
        return first + (uniform(num_samples, generator) * width).long()

    def loss(
        self,
        policy: Policy,
        condition: Condition,
        generator: Generators,
        score: Callable[[Samples], Scores],
    ) -> tuple[Float[Tensor, " b"], Samples, Scores]:
        x = policy.initial(condition, generator)
        at = self.steps(policy.num_steps, len(condition), generator)
        rows, rest = torch.arange(len(condition)), condition  # the samples not yet at their step
        arrived, predictions = [], []
        for i in range(policy.num_steps):
            here, on = (at[rows] == i).nonzero()[:, 0], (at[rows] > i).nonzero()[:, 0]
            if len(here):
                arrived.append(rows[here])
                predictions.append(policy.step_law(x[here], i, rest.take(here)).x0)
                x, rows, rest = x[on], rows[on], rest.take(on)
            if len(rows):
                with torch.no_grad():
                    x = policy.step_law(x, i, rest).sample(take_generators(generator, rows))
        x0 = torch.cat(predictions)[torch.cat(arrived).argsort()]
        value, samples, scores = self.judge(policy, x0, condition, score)
        short = -value if self.margin is None else torch.relu(self.margin - value)
        return self.weight * short, samples, scores

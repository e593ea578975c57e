"""RAFT: finetune on the best of N own samples.

Dong et al. 2023, *RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment*,
arXiv:2304.06767, Algorithm 1. Of the N samples of a prompt the best is kept, and the model is
trained on it as on data; then the next ones are drawn from the model so trained.

    L = sum_prompts sum_j w_j e_j / number of prompts,    sum of w over a prompt's samples = 1

with e the denoising loss of a finished sample. ``keep`` and ``temperature`` choose the weights w:

``keep``  ``temperature``    w of a prompt's samples
1         null               1 for the best of them: RAFT
k         null               1 / k for the k best
null      null               equal: plain finetuning on own samples, which teaches nothing
null      tau                proportional to exp(r / tau): reward-weighted regression (RWR), Peters
                             & Schaal 2007; for diffusion, Lee et al. 2023, arXiv:2302.12192

Differences from the paper: all prompts of an update count alike, and a sample that violates a hard
constraint (reward -inf) is never kept. Of equal rewards the first sample's is the better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffreward.algorithms.base import DenoisingAlgorithm, History
from diffreward.rewards import Scores


@dataclass(frozen=True)
class RAFT(DenoisingAlgorithm):
    """Best-of-N finetuning.

    Args:
        keep: samples kept of each prompt; null: all.
        temperature: the kept are weighted by exp(reward / temperature) (reward units); null:
            equally.
        num_draws: draws of (time, noise) per sample and update.
        passes: how often a rollout is gone through.
        minibatches: updates per pass.

    Raises:
        ValueError: a value out of range; in `credit`, a group of fewer than ``keep`` samples.
    """

    keep: int | None = 1
    temperature: float | None = None
    num_draws: int = 1
    passes: int = 1
    minibatches: int = 1

    presets: ClassVar = {
        "paper": {"keep": 1, "temperature": None},
        "rwr": {"keep": None, "temperature": 1.0},
    }

    def __post_init__(self) -> None:
        for name in ("keep", "num_draws", "passes", "minibatches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, but {value} came")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be positive and finite, or null, but {self.temperature} came"
            )

    def credit(
        self, scores: Scores, groups: Int[Tensor, " b"], prompts: Sequence[str], history: History
    ) -> Scores:
        """The weight of each sample: a prompt's sum to 1, or to 0 where all rewards are -inf."""
        reward = scores.value
        _, at, count = groups.unique(return_inverse=True, return_counts=True)
        if self.keep is not None and self.keep > count.min():
            raise ValueError(
                f"keep={self.keep} of the samples of each prompt, but there are {count.min()}"
            )
        order = reward.argsort(descending=True, stable=True)
        order = order[at[order].argsort(stable=True)]  # by group, the best first
        first = count.cumsum(0) - count
        rank = torch.empty_like(at)
        rank[order] = torch.arange(len(at)) - first[at[order]]
        kept = (rank < (self.keep or len(at))) & (reward > -math.inf)
        weight = torch.ones_like(reward)
        if self.temperature is not None:
            weight = ((reward - reward[order][first][at]) / self.temperature).exp()
        weight = torch.where(kept, weight, 0.0)
        total = torch.zeros_like(weight[: len(count)]).index_add(0, at, weight)[at]
        return Scores(torch.where(kept, weight / total, 0.0))

    def loss(
        self,
        error: Float[Tensor, "b S"],
        error_ref: Float[Tensor, "b S"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
    ) -> Float[Tensor, ""]:
        return (scores.value.to(error) * error.mean(1)).sum() / len(groups.unique())

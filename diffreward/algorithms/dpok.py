"""DPOK: diffusion policy optimisation with KL regularisation.

Fan et al. 2023, *DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models*,
arXiv:2305.16381. A policy gradient, and the KL to the pretrained model of each step, which for
Gaussian steps of equal variance is |mean - mean_ref|^2 / (2 std^2). What follows was written from
the authors' code (google-research/dpok, ``train_online_pg.py``), not from the paper's text:

    rho_i = clip(exp((log p(x[i+1] | x[i]) - log p_old(x[i+1] | x[i])) / dims), 1 - clip, 1 + clip)
    loss  = mean over samples and steps of -reward_weight A rho_i + beta_kl KL_i / dims

Unlike PPO's, this ratio is clipped without a minimum: outside the limits the policy gradient of a
step is 0, also where it would lead back. The gradient of the KL is taken with the states as they
are.

paper                   code                   meaning
alpha                   ``reward_weight``      weight of the reward
beta                    ``beta_kl``            weight of the KL
t = T .. 0              i = 0 .. T-1           this package counts from noise to data

Differences from the authors' code, so that the preset ``paper`` bears its published numbers but is
no reproduction:

- A is the reward minus a value network's prediction from the state, prompt and step there; here it
  is the reward minus the mean of the other samples of the prompt, or the reward itself;
- their penalty is the mean squared difference of the guided noise predictions: the KL with each
  step weighted by 2 std^2 / (d mean / d eps)^2. Here it is the KL, in nats per dimension when
  ``dims`` is their number, which for the same weight puts another price on each step;
- they draw transitions of a buffer of the last rollouts; here updates are on one rollout.

The preset has the values for one prompt: reward_weight 10, kl_weight 0.01, clip 1e-4 of ratios of
means over D = 4 * 64 * 64 = 16384 dimensions, 5 updates a rollout. They go with 10 samples, DDIM
with eta = 1 and 50 steps, guidance 7.5, LoRA of rank 4, AdamW with learning rate 1e-5 and no weight
decay, gradients clipped to norm 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log1p
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffreward.algorithms.base import (
    History,
    TrajectoryAlgorithm,
    finite_rewards,
    leave_one_out,
    ratio_diagnostics,
    require_choice,
    require_positive,
)
from diffreward.rewards import Scores

BASELINES = ("group", "none")


@dataclass(frozen=True)
class DPOK(TrajectoryAlgorithm):
    """Diffusion policy optimisation with KL regularisation

    Args:
        reward_weight: weight of the reward.
        beta_kl: weight of the KL to the pretrained model, reward per nat where ``reward_weight``
            is 1.
        clip: the ratio of a step is clipped to 1 - clip .. 1 + clip.
        dims: log-ratios and KL are divided by this: 1, or the number of latent dimensions for a
            clip in the authors' convention.
        baseline: group subtracts the mean of the other samples of the prompt, none nothing.
        passes: how often a rollout is gone through.
        minibatches: updates per pass.
        shared_noise: the samples of a prompt start from the same noise.

    Raises:
        ValueError: a value out of range.
    """

    reward_weight: float = 1.0
    beta_kl: float = 0.1
    clip: float = 0.2
    dims: int = 1
    baseline: str = "group"
    passes: int = 1
    minibatches: int = 1
    shared_noise: bool = False

    needs_kl = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "reward_weight": 10.0,
            "beta_kl": 0.01,
            "clip": 1e-4,
            "dims": 4 * 64 * 64,
            "passes": 5,
        },
    }

    def __post_init__(self) -> None:
        require_positive(self, "reward_weight", "beta_kl", "clip", "dims", "passes", "minibatches")
        require_choice(self, "baseline", BASELINES)
        if self.clip >= 1:
            raise ValueError(f"clip of DPOK lies in (0, 1), but {self.clip} came")

    def credit(
        self, scores: Scores, groups: Int[Tensor, " b"], prompts: Sequence[str], history: History
    ) -> Scores:
        """Advantages, or the rewards themselves.

        Raises:
            ValueError: a prompt with one sample, or a reward that is not finite.
        """
        value = finite_rewards(scores, "DPOK")
        if self.baseline == "group":
            value = leave_one_out(value, groups)
        return Scores(value, None, scores.parts)

    def loss(
        self,
        log_prob: Float[Tensor, "b T"],
        log_prob_old: Float[Tensor, "b T"],
        log_prob_ref: Float[Tensor, "b T"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
        kl: Float[Tensor, "b T"] | None = None,
    ) -> Float[Tensor, ""]:
        """See the module's text.

        Raises:
            ValueError: ``kl`` is missing.
        """
        if kl is None:
            raise ValueError("DPOK needs the KL of each step, but kl is None")
        ratio = torch.exp((log_prob - log_prob_old) / self.dims)
        ratio = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = self.reward_weight * scores.value.to(ratio)[:, None] * ratio
        return (self.beta_kl * kl / self.dims - gain).mean()

    def diagnostics(
        self,
        log_prob: Float[Tensor, "b T"],
        log_prob_old: Float[Tensor, "b T"],
        log_prob_ref: Float[Tensor, "b T"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
    ) -> dict[str, float]:
        """Share of clipped steps, and log-ratios to the model that drew them, nats."""
        low, high = self.dims * log1p(-self.clip), self.dims * log1p(self.clip)
        return ratio_diagnostics(log_prob, log_prob_old, low, high)

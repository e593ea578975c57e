"""DDPO: denoising diffusion policy optimisation, with importance sampling (DDPO-IS).

Black et al. 2023, *Training Diffusion Models with Reinforcement Learning*, arXiv:2305.13301. PPO on
the chain as a Markov decision process: state x[i], action x[i+1], the reward at the end.

    rho_i = exp((log p(x[i+1] | x[i]) - log p_old(x[i+1] | x[i])) / dims)
    A     = clip(w (r - mean) / (std + 1e-6), -advantage_clip, advantage_clip)
    loss  = mean over samples and steps of -min(rho_i A, clip(rho_i, 1 - clip, 1 + clip) A)

Mean and std are of the last ``buffer_size`` rewards of the same prompt, this rollout's included; of
all rewards of the rollout while a prompt has fewer than ``min_count``, or always with
``normalization="batch"``. PRDP's authors argue that with 100,000 prompts the former hardly happens.
w is 1, but for ``uncertainty``, which is ours: see `diffreward.algorithms.grpo`.

paper                       code                   meaning
theta_old                   ``log_prob_old``       the model that drew the steps
clip range                  ``clip``               of the ratio, see below
t = T .. 0                  i = 0 .. T-1           this package counts from noise to data

Units. In the authors' code a log-probability is the *mean* over latent dimensions D, and 1e-4
clips the ratio of these. ``dims = D`` gives exactly that loss. In sums, a step is clipped once its
log-ratio leaves D log(1 - 1e-4) .. D log(1 + 1e-4), about 1e-4 D: +-1.64 nats for Stable
Diffusion's D = 4 * 64 * 64 = 16384, so the value depends on the resolution. Within these limits
rho stays within 1e-4 of 1, that is, no importance weight is applied, and the gradient is smaller
by D. With the default, ``dims = 1``, rho is the ratio of probabilities, and clip is PPO's.

preset            clip  dims   adv. clip  buffer  min  minibatches
paper             1e-4  16384  5          16      16   4
aesthetic         1e-4  16384  5          32      16   2
prompt_agnostic   1e-4  16384  5          -       -    4

``paper`` and ``aesthetic`` are the values of the authors' later PyTorch code (kvablack/
ddpo-pytorch, ``config/dgx.py``), which go with 256 samples a rollout, DDIM with eta = 1 and 50
steps, guidance 5 within the log-probability, LoRA, AdamW with learning rate 3e-4 and weight decay
1e-4, gradients clipped to norm 1. ``prompt_agnostic`` is the baseline of PRDP at large scale.

Differences: steps are taken in order where the authors shuffle them, which changes nothing, since
they sum the gradients of all steps before an update. Minibatches are of whole prompts.
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
    certainty,
    clipped_surrogate,
    finite_rewards,
    ratio_diagnostics,
    require_choice,
    require_positive,
    require_tau,
)
from diffreward.rewards import Scores

NORMALIZATIONS = ("prompt", "batch")
STABLE_DIFFUSION = {"clip": 1e-4, "dims": 4 * 64 * 64}


@dataclass(frozen=True)
class DDPO(TrajectoryAlgorithm):
    """Denoising diffusion policy optimisation

    Args:
        clip: the ratio of a step is clipped to 1 - clip .. 1 + clip.
        dims: log-ratios are divided by this: 1, or the number of latent dimensions for a clip in
            the authors' convention.
        advantage_clip: advantages are clipped to this.
        normalization: prompt or batch: whose mean and standard deviation.
        buffer_size: rewards of a prompt that are remembered; no more than the engine's history has.
        min_count: rewards of a prompt below which those of the rollout are used.
        passes: how often a rollout is gone through.
        minibatches: updates per pass.
        shared_noise: the samples of a prompt start from the same noise.
        uncertainty: tau, in units of the reward: the std at which a sample counts half as much as a
            certain one; null: all count alike.

    Raises:
        ValueError: a value out of range.
    """

    clip: float = 0.2
    dims: int = 1
    advantage_clip: float = 5.0
    normalization: str = "prompt"
    buffer_size: int = 16
    min_count: int = 16
    passes: int = 1
    minibatches: int = 1
    shared_noise: bool = False
    uncertainty: float | None = None

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {**STABLE_DIFFUSION, "minibatches": 4},
        "aesthetic": {**STABLE_DIFFUSION, "buffer_size": 32, "minibatches": 2},
        "prompt_agnostic": {**STABLE_DIFFUSION, "normalization": "batch", "minibatches": 4},
    }

    def __post_init__(self) -> None:
        require_positive(
            self, "clip", "dims", "advantage_clip", "buffer_size", "passes", "minibatches"
        )
        require_choice(self, "normalization", NORMALIZATIONS)
        require_tau(self)
        if self.clip >= 1:
            raise ValueError(f"clip of DDPO lies in (0, 1), but {self.clip} came")

    def credit(
        self, scores: Scores, groups: Int[Tensor, " b"], prompts: Sequence[str], history: History
    ) -> Scores:
        """Clipped, normalised advantages.

        Raises:
            ValueError: a reward that is not finite.
        """
        value = finite_rewards(scores, "DDPO")
        mean, std = value.mean().expand_as(value), value.std(correction=0).expand_as(value)
        if self.normalization == "prompt":
            mean, std = mean.clone(), std.clone()
            rows: dict[str, list[int]] = {}
            for row, prompt in enumerate(prompts):
                rows.setdefault(prompt, []).append(row)
            for prompt, at in rows.items():
                recent = torch.cat([history[prompt].to(value), value[at]])[-self.buffer_size :]
                if len(recent) >= self.min_count:
                    mean[at], std[at] = recent.mean(), recent.std(correction=0)
        advantage = (value - mean) / (std + 1e-6) * certainty(scores, self.uncertainty)
        limit = self.advantage_clip
        return Scores(advantage.clamp(-limit, limit), None, scores.parts)

    def loss(
        self,
        log_prob: Float[Tensor, "b T"],
        log_prob_old: Float[Tensor, "b T"],
        log_prob_ref: Float[Tensor, "b T"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
        kl: Float[Tensor, "b T"] | None = None,
    ) -> Float[Tensor, ""]:
        """See the module's text."""
        d = self.dims
        return clipped_surrogate(log_prob / d, log_prob_old / d, scores.value, self.clip).mean()

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

"""GRPO: group-relative policy optimisation, as Flow-GRPO uses it for image models.

Shao et al. 2024, *DeepSeekMath*, arXiv:2402.03300, for the advantages; Liu et al. 2025, *Flow-GRPO:
Training Flow Matching Models via Online RL*, arXiv:2505.05470, for chains of flow models, which
need a stochastic sampler of the same marginals (`diffreward.policies.gaussian.FlowSDE`).

    rho_i = exp((log p(x[i+1] | x[i]) - log p_old(x[i+1] | x[i])) / dims)
    A     = clip(w (r - mean of the prompt) / (std + 1e-4), -advantage_clip, advantage_clip)
    loss  = mean over samples and steps of
            -min(rho_i A, clip(rho_i, 1 - clip, 1 + clip) A) + beta_kl KL_i / dims

w is 1 unless ``uncertainty`` = tau is given and the rewards have a standard deviation s: then it is
1 / (1 + (s / tau)^2) over its mean in the rollout (`base.certainty`), so that an uncertain sample
counts as average, whether it is thought good or bad. Ours, not the papers'.

KL_i = KL(model || pretrained) of step i is exact, not estimated. The mean of the prompt's B samples
includes the sample itself, so that the policy gradient is shortened by 1 - 1 / B. The gradient of
the KL is taken with the states as they are, as everywhere in this family of methods: how the model
changes which states it gets into is not in it.

paper                   code                   meaning
G                       samples of a prompt    group size
epsilon                 ``clip``               of the ratio
beta                    ``beta_kl``            weight of the KL
t = T .. 0              i = 0 .. T-1           this package counts from noise to data

The preset ``flow_grpo`` has the values of the authors' code for Stable Diffusion 3.5 medium at 512
pixels, 10 steps and noise level 0.7 (yifan123/flow_grpo, ``config/grpo.py``, geneval and OCR). They
go with 48 prompts x 24 samples and two updates a rollout, LoRA, AdamW with learning rate 3e-4, and
EMA. Conversions: log-probabilities are means over D = 16 * 64 * 64 = 65536 dimensions there, hence
``dims = D``, where clip = 1e-4 is +-6.55 nats a step. Their KL is a mean over dimensions, too, and
its denominator is the variance of the noise per unit of time, that is, it is KL_i |dt_i| / D; |dt|
is 1 / T = 0.1 on average over all steps, hence beta_kl = 0.04 * 0.1, exact only on average.
``timestep_fraction`` drops the last step, as theirs does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log1p
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from diffreward.algorithms.base import (
    History,
    TrajectoryAlgorithm,
    certainty,
    clipped_surrogate,
    finite_rewards,
    group_mean,
    group_std,
    ratio_diagnostics,
    require_choice,
    require_positive,
    require_tau,
)
from diffreward.rewards import Scores

STDS = ("group", "global", "none")


@dataclass(frozen=True)
class GRPO(TrajectoryAlgorithm):
    """Group-relative policy optimisation

    Args:
        clip: the ratio of a step is clipped to 1 - clip .. 1 + clip.
        dims: log-ratios and KL are divided by this: 1, or the number of latent dimensions for a
            clip in Flow-GRPO's convention.
        advantage_clip: advantages are clipped to this.
        std: advantages are divided by the standard deviation of the rewards of their prompt
            (group), of the whole rollout (global), or not at all (none).
        beta_kl: weight of the KL to the pretrained model; 0: none, and the pretrained model is not
            called.
        timestep_fraction: share of the steps that are trained, the first ones.
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
    std: str = "group"
    beta_kl: float = 0.0
    timestep_fraction: float = 1.0
    passes: int = 1
    minibatches: int = 1
    shared_noise: bool = False
    uncertainty: float | None = None

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "flow_grpo": {
            "clip": 1e-4,
            "dims": 16 * 64 * 64,
            "std": "global",
            "beta_kl": 0.04 / 10,
            "timestep_fraction": 0.99,
            "minibatches": 2,
        },
    }

    def __post_init__(self) -> None:
        require_positive(
            self, "clip", "dims", "advantage_clip", "timestep_fraction", "passes", "minibatches"
        )
        require_choice(self, "std", STDS)
        require_tau(self)
        if self.clip >= 1 or self.timestep_fraction > 1 or not self.beta_kl >= 0:
            raise ValueError(
                "GRPO needs clip below 1, timestep_fraction up to 1 and beta_kl from 0, but "
                f"{self.clip}, {self.timestep_fraction} and {self.beta_kl} came"
            )

    @property
    def needs_kl(self) -> bool:
        """Whether there is a KL term."""
        return self.beta_kl > 0

    def credit(
        self, scores: Scores, groups: Int[Tensor, " b"], prompts: Sequence[str], history: History
    ) -> Scores:
        """Clipped advantages within each prompt.

        Raises:
            ValueError: a reward that is not finite.
        """
        value = finite_rewards(scores, "GRPO")
        advantage = value - group_mean(value, groups)
        if self.std == "group":
            advantage = advantage / (group_std(value, groups) + 1e-4)
        elif self.std == "global":
            advantage = advantage / (value.std(correction=0) + 1e-4)
        advantage, limit = advantage * certainty(scores, self.uncertainty), self.advantage_clip
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
        """See the module's text.

        Raises:
            ValueError: ``kl`` is missing.
        """
        d, n = self.dims, max(1, int(log_prob.shape[1] * self.timestep_fraction))
        now, old = log_prob[:, :n] / d, log_prob_old[:, :n] / d
        loss = clipped_surrogate(now, old, scores.value, self.clip).mean()
        if not self.needs_kl:
            return loss
        if kl is None:
            raise ValueError("GRPO with beta_kl above 0 needs the KL of each step, but kl is None")
        return loss + self.beta_kl * kl[:, :n].mean() / d

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

"""REINFORCE with a leave-one-out baseline: the plain policy gradient.

Williams 1992, *Simple statistical gradient-following algorithms for connectionist reinforcement
learning*; the baseline is that of Kool et al. 2019, *Buy 4 REINFORCE samples, get a baseline for
free!* (ICLR workshop), known as RLOO. With B samples of a prompt:

    A_a  = r_a - mean of the other B - 1 rewards of the prompt
    loss = -mean over samples of A_a sum_i log p(x[i+1] | x[i])

Its expected gradient is -grad E[r], without bias and without scale. There is no ratio and no
clipping, so that a rollout is good for one update. Nothing holds the model at the pretrained one:
E[r] of an unbounded reward has no maximiser.

With ``uncertainty`` the advantages are weighted as in `diffreward.algorithms.grpo`; the expected
gradient is then no longer that of E[r].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from jaxtyping import Float, Int
from torch import Tensor

from diffreward.algorithms.base import (
    History,
    TrajectoryAlgorithm,
    certainty,
    finite_rewards,
    leave_one_out,
    ratio_diagnostics,
    require_tau,
)
from diffreward.rewards import Scores


@dataclass(frozen=True)
class REINFORCE(TrajectoryAlgorithm):
    """REINFORCE with a leave-one-out baseline

    Args:
        shared_noise: the samples of a prompt start from the same noise.
        uncertainty: tau, in units of the reward: the std at which a sample counts half as much as a
            certain one; null: all count alike.

    Raises:
        ValueError: a value out of range.
    """

    shared_noise: bool = False
    uncertainty: float | None = None

    def __post_init__(self) -> None:
        require_tau(self)

    def credit(
        self, scores: Scores, groups: Int[Tensor, " b"], prompts: Sequence[str], history: History
    ) -> Scores:
        """Advantages over the other samples of the prompt.

        Raises:
            ValueError: a prompt with one sample, or a reward that is not finite.
        """
        advantage = leave_one_out(finite_rewards(scores, "REINFORCE"), groups)
        return Scores(advantage * certainty(scores, self.uncertainty), None, scores.parts)

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
        return -(scores.value.to(log_prob) * log_prob.sum(1)).mean()

    def diagnostics(
        self,
        log_prob: Float[Tensor, "b T"],
        log_prob_old: Float[Tensor, "b T"],
        log_prob_ref: Float[Tensor, "b T"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
    ) -> dict[str, float]:
        """Log-ratios to the model that drew the steps: 0 but for rounding."""
        numbers = ratio_diagnostics(log_prob, log_prob_old, -inf, inf)
        del numbers["clip_fraction"]
        return numbers

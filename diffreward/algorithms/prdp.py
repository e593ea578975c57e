"""PRDP: proximal reward difference prediction.

Deng et al. 2024, *PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of
Diffusion Models*, arXiv:2402.08714. A regression instead of a policy gradient: the difference of
two samples' log-likelihood ratios to the pretrained model is to equal the difference of their
rewards over beta, for every two samples of a prompt. Just the maximiser of
E[r] - beta KL(model || pretrained), over whole trajectories, fulfils all these equations.

With Delta the difference between samples a and b of one prompt:

    r_hat   = sum_i r_hat_i,   r_hat_i = log p(x[i+1] | x[i]) - log p_ref(x[i+1] | x[i])
    l       = (Delta r_hat - Delta r / beta)^2
    r_hat_i' = r_hat_i clipped to [r_hat_i,old - clip, r_hat_i,old + clip],   l' as l, of r_hat'
    loss    = mean over prompts of the mean over unordered pairs of max(l, l')

paper                  code                      meaning
r_hat_theta            ``log_ratio.sum(1)``      implied reward over beta, nats
beta                   ``beta``                  reward per nat
epsilon                ``clip``                  nats by which one step may move per rollout
K                      ``passes``                how often a rollout is gone through
N, B                   groups of ``groups``      prompts, samples of each
t = T .. 1             i = 0 .. T-1              this package counts from noise to data

What the loss is. Without clipping, that of a group of B is twice the unbiased variance of
u = r_hat - r / beta, and its derivative by r_hat of sample a is 4 (u_a - mean u) / (B - 1). At
the model that drew the samples its expected gradient is -(4 / beta) times that of
E[r] - beta KL: a policy gradient with a leave-one-out baseline. The starting noise x[0] has a
fixed law, so that zero loss cannot be reached if the reward depends on it, and what minimises the
loss on samples of *another* model is biased; both are mended by ``shared_noise``.

Units. The authors' log-probabilities must be means over latent dimensions (as DDPO's; the paper
does not say, their values make no sense otherwise), and their code takes the mean over steps,
too. Here both are sums, beta is reward per nat and clip is in nats; `from_mean_convention`
converts. With D dimensions and T steps their loss is

    (Delta r_hat / (D T) - Delta r / beta)^2 = (D T)^-2 (Delta r_hat - Delta r / (beta / (D T)))^2

so beta -> beta / (D T), clip -> clip D, and the loss has the factor (D T)^-2, which matters to the
clipping of gradients alone. For Stable Diffusion, D = 4 * 64 * 64 = 16384 and T = 50:

preset          beta (paper -> here)    clip (paper -> here)      K    prompts x samples    lr
paper_small     3e-5 -> 3.7e-11         1e-6 -> 0.016 nats        10   32 x 16              1e-5
paper_large     3e-6 -> 3.7e-12         1e-4 -> 1.6 nats          1    64 x 8               7e-6
paper_multi     3e-5 -> 3.7e-11         1e-4 -> 1.6 nats          1    64 x 8               1e-5

all with full finetuning, AdamW with weight decay 1e-4, gradients clipped to norm 1, DDPM with 50
steps and guidance 5, for 100 (small) or 1000 epochs: options of the engine, not of this class.
A difference in reward of 0.01 then asks for more than 10^8 nats: the KL is inert there.

K = 1 has two readings. One update on the whole rollout is what Algorithm 1 says; the model is
then the one that drew the samples, clipping provably does nothing, and the paper's finding that
training fails without it cannot be explained. Or one pass in minibatches with an update each,
where it acts from the second on. Presets have the first; ``paper_large_minibatches`` and
``paper_multi_minibatches`` have the second, with 8 minibatches, a number of ours.

Differences from the authors' published loss in ``fixed``, which is the default:

- everything is float64: with the paper's beta, l and l' are equal in float32 for all pairs, and
  the maximum of equals halves the gradient (the presets are float64 as well);
- pairs with equal rewards count, as Delta r_hat = 0 is an equation like the others. The authors
  drop them, and divide 0 by 0 where all are equal; with ``ties="drop"`` such a group gives 0;
- rewards are divided by their standard deviation within prompts, so that beta means the same for
  every reward;
- where rewards know their uncertainty, a pair is weighted by 1 / (V + std_a^2 + std_b^2) over the
  mean of this, V the mean squared reward difference, both over the update's pairs: differences that
  may be noise count less than others. Ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffreward.algorithms.base import (
    History,
    TrajectoryAlgorithm,
    finite_rewards,
    group_mean,
    ratio_diagnostics,
    require_choice,
    require_positive,
)
from diffreward.rewards import Scores

TIES = ("keep", "drop")


def from_mean_convention(
    beta: float, clip: float, *, dims: int, num_steps: int
) -> dict[str, float]:
    """Options of `PRDP` for the authors' beta and epsilon.

    Theirs are for log-probabilities that are means over ``dims`` latent dimensions, and for a
    mean over ``num_steps`` steps; see this module's text.
    """
    return {
        "beta": beta / (dims * num_steps),
        "clip": clip * dims,
        "scale": 1 / (dims * num_steps) ** 2,
    }


def _paper(beta: float, clip: float, **options: Any) -> dict[str, Any]:
    units = from_mean_convention(beta, clip, dims=4 * 64 * 64, num_steps=50)
    return {**units, "standardize": False, "ties": "drop", "weigh_uncertainty": False, **options}


@dataclass(frozen=True)
class PRDP(TrajectoryAlgorithm):
    """Proximal reward difference prediction

    Args:
        beta: reward per nat: at the optimum a sample whose reward is higher by beta is e times as
            likely as before, compared with others of its prompt. In units of the reward, or with
            ``standardize`` of its standard deviation.
        clip: nats by which the log-probability of one step may move before the loss stops asking
            for more; inf: no clipping. It acts from the second update on a rollout.
        passes: how often a rollout is gone through.
        minibatches: updates per pass.
        standardize: divide rewards by the standard deviation within the prompts of the rollout. It
            shrinks where the reward saturates, and the rewards grow; with false beta stays put.
        shared_noise: the samples of a prompt start from the same noise. Makes zero loss attainable,
            and samples less diverse.
        ties: keep or drop pairs of equal rewards.
        weigh_uncertainty: weight pairs by the uncertainty of their rewards, where it is known.
        scale: the loss is multiplied by this.

    Raises:
        ValueError: a value out of range.
    """

    beta: float = 0.1
    clip: float = 0.1
    passes: int = 2
    minibatches: int = 1
    standardize: bool = True
    shared_noise: bool = False
    ties: str = "keep"
    weigh_uncertainty: bool = True
    scale: float = 1.0

    needs_reference = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "fixed": {},
        "paper_small": _paper(3e-5, 1e-6, passes=10),
        "paper_large": _paper(3e-6, 1e-4, passes=1),
        "paper_multi": _paper(3e-5, 1e-4, passes=1),
        "paper_large_minibatches": _paper(3e-6, 1e-4, passes=1, minibatches=8),
        "paper_multi_minibatches": _paper(3e-5, 1e-4, passes=1, minibatches=8),
    }

    def __post_init__(self) -> None:
        require_positive(self, "beta", "clip", "passes", "minibatches", "scale")
        require_choice(self, "ties", TIES)

    def credit(
        self, scores: Scores, groups: Int[Tensor, " b"], prompts: Sequence[str], history: History
    ) -> Scores:
        """Rewards, standardised if asked for. They are not centred: only differences matter."""
        value = finite_rewards(scores, "PRDP")
        std = None if scores.std is None else scores.std.double()
        if self.standardize:
            a, b = _pairs(groups)
            spread = ((value[a] - value[b]).square().sum() / (2 * max(len(a), 1))).sqrt()
            # below the resolution of float32 rewards there is nothing but rounding
            if spread > 1e-7 * value.abs().max():
                value, std = value / spread, None if std is None else std / spread
        return Scores(value, std, scores.parts)

    def loss(
        self,
        log_prob: Float[Tensor, "b T"],
        log_prob_old: Float[Tensor, "b T"],
        log_prob_ref: Float[Tensor, "b T"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
        kl: Float[Tensor, "b T"] | None = None,
    ) -> Float[Tensor, ""]:
        """See the module's text; float64. A group without a pair gives 0.

        Raises:
            ValueError: ``log_prob_ref`` is missing.
        """
        if log_prob_ref is None:
            raise ValueError("PRDP compares with the pretrained model, but log_prob_ref is None")
        ref, value = log_prob_ref.double(), scores.value.double()
        log_ratio, old = log_prob.double() - ref, log_prob_old.double() - ref
        near = log_ratio.clamp(old - self.clip, old + self.clip)

        a, b = _pairs(groups)
        free, near = _differences(log_ratio.sum(1), a, b), _differences(near.sum(1), a, b)
        target = _differences(value, a, b) / self.beta
        # l' > l, without squaring: the squares of large errors differ by less than their rounding
        clipped = (near - free) * (near + free - 2 * target) > 0
        error = torch.where(clipped, near, free) - target

        counted = torch.ones_like(target) if self.ties == "keep" else (target != 0).to(target)
        weight = self._weight(scores, a, b, counted)
        _, group = groups.unique(return_inverse=True)
        none = torch.zeros(int(group.max()) + 1).to(target)
        total = none.index_add(0, group[a], counted * weight * error**2)
        count = none.index_add(0, group[a], counted)
        return self.scale * (total / count.clamp(min=1)).mean()

    def _weight(self, scores: Scores, a: Tensor, b: Tensor, counted: Tensor) -> Tensor:
        """V / (V + std_a^2 + std_b^2) of each pair over its mean; 1 where nothing is uncertain."""
        one = torch.ones_like(counted)
        if scores.std is None or not self.weigh_uncertainty:
            return one
        value, std = scores.value.detach().double(), scores.std.detach().double()
        noise = std[a] ** 2 + std[b] ** 2
        signal = _differences(value, a, b).square().mean()
        weight = torch.where(noise > 0, signal / (signal + noise), one)
        mean = (weight * counted).sum() / counted.sum()
        return torch.where(mean > 0, weight / mean, one)

    def diagnostics(
        self,
        log_prob: Float[Tensor, "b T"],
        log_prob_old: Float[Tensor, "b T"],
        log_prob_ref: Float[Tensor, "b T"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
    ) -> dict[str, float]:
        """Numbers for the log, of one update.

        ``clip_fraction``, ``log_ratio_mean``, ``log_ratio_max``: of single steps, to the model that
        drew them, nats. ``residual``: root mean square of Delta r_hat - Delta r / beta, nats;
        ``correlation`` of r_hat with the reward within prompts, 1 at the optimum, left out where
        one of them does not vary.
        """
        r_hat = (log_prob.double() - log_prob_ref.double()).sum(1).detach()
        value = scores.value.double()
        a, b = _pairs(groups)
        numbers = ratio_diagnostics(log_prob, log_prob_old, -self.clip, self.clip)
        if len(a):
            residual = _differences(r_hat, a, b) - _differences(value, a, b) / self.beta
            numbers["residual"] = residual.square().mean().sqrt().item()
        x, y = r_hat - group_mean(r_hat, groups), value - group_mean(value, groups)
        if (norm := x.norm() * y.norm()) > 0:
            numbers["correlation"] = (x @ y / norm).item()
        return numbers


def _pairs(groups: Int[Tensor, " b"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The two rows of each unordered pair within a group."""
    same = groups[:, None] == groups[None, :]
    a, b = same.triu(1).nonzero(as_tuple=True)
    return a, b


def _differences(x: Float[Tensor, " b"], a: Tensor, b: Tensor) -> Float[Tensor, " n"]:
    return x[a] - x[b]

"""What a finetuning algorithm is: a frozen dataclass of hyper-parameters and a loss.

There are three families, told apart by what the loss is a function of:

- *trajectory* (DDPO, GRPO, DPOK, REINFORCE, PRDP): of the log-probabilities ``(b, T)`` of the
  steps of whole trajectories;
- *denoising* (DPO, KTO, DRAGON, RAFT): of the denoising losses ``(b, S)`` of finished samples;
- *pathwise* (ReFL, DRaFT, AlignProp): of the reward itself, differentiated through the chain.

An algorithm has no state, sees no network (but for the pathwise ones), and knows nothing of
batches, devices or processes: that is the engine's part (`diffreward.finetuning`), which gives a
loss the rows of *all* processes at once, whole groups of one prompt, in float64. Credit (what the
samples of a rollout earn) and loss (what is done about it) are separate, since statistics belong to
the whole rollout, and a loss to one update.

Shapes: b samples, T steps of the chain; ``groups`` is ``(b,)`` int64, equal for samples of one
prompt; log-probabilities are sums over dimensions, in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from diffreward.policy import Condition, Generators, Policy, randn
from diffreward.rewards import Reward, Scores, SetReward, require_gradient
from diffreward.samples import Samples


@dataclass(frozen=True)
class Algorithm(ABC):
    """What all families share. A subclass overrides an attribute by a field, or by a property.

    Attributes:
        family: "trajectory", "denoising" or "pathwise".
        needs_reference: whether the loss uses the pretrained model.
        shared_noise: all samples of a prompt start from the same x[0].
        passes: K, how often a rollout is gone through.
        minibatches: updates per pass; each has as many whole groups as the others.
    """

    family: ClassVar[str]
    needs_reference = False
    shared_noise = False
    passes = 1
    minibatches = 1

    def check(self, reward: Reward | SetReward) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuse a reward that cannot work, before any compute.

        Raises:
            ValueError: what the algorithm needs, and the reward declares that it has not.
        """

    def at(self, progress: float) -> Algorithm:
        """The algorithm as it is when this share of the iterations is done: for schedules."""
        return self

    def credit(
        self, scores: Scores, groups: Int[Tensor, " b"], prompts: Sequence[str], history: History
    ) -> Scores:
        """What each sample of a whole rollout earns: its reward, or an advantage.

        Called once per rollout, before its first update. ``history`` has the earlier rollouts, not
        this one.
        """
        return scores


@dataclass(frozen=True)
class TrajectoryAlgorithm(Algorithm):
    """A loss on log-probabilities.

    Attributes:
        needs_kl: whether the loss uses the exact KL of each step to the pretrained model.
    """

    family: ClassVar[str] = "trajectory"
    needs_kl = False

    @abstractmethod
    def loss(
        self,
        log_prob: Float[Tensor, "b T"],
        log_prob_old: Float[Tensor, "b T"],
        log_prob_ref: Float[Tensor, "b T"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
        kl: Float[Tensor, "b T"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of one update.

        Args:
            log_prob: of the model that is trained, on the steps that were drawn; differentiate by
                this (and by ``kl``). Steps whose entry gets the gradient 0 are not computed again.
            log_prob_old: of the model that drew them.
            log_prob_ref: of the pretrained model, if ``needs_reference``.
            scores: what `credit` returned.
            groups: samples of one prompt have one number.
            kl: KL(model || pretrained) of each step, if ``needs_kl``.
        """

    def diagnostics(
        self,
        log_prob: Float[Tensor, "b T"],
        log_prob_old: Float[Tensor, "b T"],
        log_prob_ref: Float[Tensor, "b T"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
    ) -> dict[str, float]:
        """Numbers for the log, of one update."""
        return {}


@dataclass(frozen=True)
class DenoisingAlgorithm(Algorithm):
    """A loss on denoising losses.

    Attributes:
        num_draws: S, draws of (time, noise) per sample and update.
        shared_draws: all samples of a prompt get the same (time, noise).
        preferences: whether `loss` takes the labels of a data set of preferences (1: chosen, -1:
            rejected) in place of credit: "pairs", "labels" (of pairs, too), or None.
    """

    family: ClassVar[str] = "denoising"
    preferences: ClassVar[str | None] = None
    num_draws = 1
    shared_draws = False

    @abstractmethod
    def loss(
        self,
        error: Float[Tensor, "b S"],
        error_ref: Float[Tensor, "b S"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
    ) -> Float[Tensor, ""]:
        """The loss of one update; ``error_ref`` is of the same (time, noise) as ``error``."""

    def diagnostics(
        self,
        error: Float[Tensor, "b S"],
        error_ref: Float[Tensor, "b S"] | None,
        scores: Scores,
        groups: Int[Tensor, " b"],
    ) -> dict[str, float]:
        """Numbers for the log, of one update."""
        return {}


@dataclass(frozen=True)
class PathwiseAlgorithm(Algorithm):
    """The gradient of a differentiable reward.

    Attributes:
        needs_data: whether it learns from pictures: the loss gets their clean latents, ``x0``, and
            the reward itself, ``reward``, as further arguments.
        logged: parts of the scores whose mean is logged.
        kappa: `judge` gives the reward minus kappa times its std.
    """

    family: ClassVar[str] = "pathwise"
    kappa = 0.0
    needs_data: ClassVar[bool] = False
    logged: ClassVar[tuple[str, ...]] = ("kl",)

    def check(self, reward: Reward) -> None:
        """Refuse a reward that declares it has no gradient."""
        require_gradient(reward, what=type(self).__name__, instead=_WITHOUT_GRADIENT)

    @abstractmethod
    def loss(
        self,
        policy: Policy,
        condition: Condition,
        generator: Generators,
        score: Callable[[Samples], Scores],
    ) -> tuple[Float[Tensor, " b"], Samples, Scores]:
        """One loss per sample, with its graph, the samples it scored and their scores.

        Samples are independent: the engine takes a batch in as many pieces as memory asks for. The
        update descends the mean of the losses. With ``needs_reference`` the pretrained policy
        comes as a further argument, ``reference``. A sample that was not scored has the score NaN.

        Raises:
            ValueError: the rewards have no gradient, or one is infinite.
        """

    def judge(
        self,
        policy: Policy,
        x0: Tensor,
        condition: Condition,
        score: Callable[[Samples], Scores],
    ) -> tuple[Float[Tensor, " b"], Samples, Scores]:
        """Decode and score clean latents: what is climbed, with its graph; samples and scores.

        The scores are the reward's own, without the graph: ``kappa`` is not in them.
        """
        samples = policy.decode(x0, condition)
        scores = score(samples)
        value = scores.value
        if not value.requires_grad:
            raise ValueError(
                f"{type(self).__name__} needs a gradient, and the rewards have none: the reward is "
                "not differentiable, gradients are switched off, or nothing is trained that the "
                f"samples depend on; {_WITHOUT_GRADIENT} where the reward has none"
            )
        infinite = value.detach().isinf()
        if infinite.any():
            j = int(infinite.nonzero()[0])
            raise ValueError(
                f"{type(self).__name__} cannot differentiate the reward {value[j].item()} of a "
                f"sample for {condition.prompts[j]!r}; {_WITHOUT_GRADIENT} with hard constraints"
            )
        raw, std = value.detach(), scores.std
        if self.kappa:
            if std is None or not std.requires_grad:
                what = "have none" if std is None else "give it without a gradient"
                raise ValueError(
                    f"{type(self).__name__} with kappa={self.kappa} lowers the std of the rewards, "
                    f"and they {what}; use a reward that knows it (ensemble, uncertain), or kappa=0"
                )
            value = value - self.kappa * std
        std = None if std is None else std.detach()
        parts = {name: part.detach() for name, part in scores.parts.items()}
        return value, samples.detach(), Scores(raw, std, parts)


_WITHOUT_GRADIENT = "use prdp, ddpo or another algorithm that needs no gradient"


class History:
    """Recent rewards by prompt, kept by the engine for algorithms whose credit needs them.

    Args:
        size: rewards kept for each prompt.
    """

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._rewards: dict[str, deque[float]] = {}

    def __getitem__(self, prompt: str) -> Float[Tensor, " n"]:
        """Its rewards, oldest first, float64; none for a new prompt."""
        return torch.tensor(list(self._rewards.get(prompt, ())), dtype=torch.float64)

    def add(self, prompts: Sequence[str], values: Float[Tensor, " b"]) -> None:
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.size)).append(value)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"size": self.size, "rewards": {p: list(r) for p, r in self._rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]
        self._rewards = {p: deque(r, maxlen=self.size) for p, r in state["rewards"].items()}


def uniform(num_samples: int, generator: Generators = None) -> Float[Tensor, " b"]:
    """Uniform in [0, 1), float64, on the CPU; with a list of generators, one from each."""
    # through a normal, so that `randn` stays the one source of noise
    z = randn((num_samples, 1), generator, dtype=torch.float64)
    return torch.special.ndtr(z[:, 0]).clamp(max=1 - 1e-12)


def take_generators(generator: Generators, rows: Int[Tensor, " n"]) -> Generators:
    """The generators of some samples, where each has its own."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [generator[j] for j in rows.tolist()]


def group_mean(values: Float[Tensor, " b"], groups: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The mean of each sample's group."""
    _, at = groups.unique(return_inverse=True)
    count = torch.bincount(at).to(values)
    return (torch.zeros_like(count).index_add(0, at, values) / count)[at]


def group_std(values: Float[Tensor, " b"], groups: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The standard deviation of each sample's group (divided by n, as the papers do)."""
    return group_mean((values - group_mean(values, groups)) ** 2, groups).sqrt()


def clipped_surrogate(
    log_prob: Float[Tensor, "b T"],
    log_prob_old: Float[Tensor, "b T"],
    advantage: Float[Tensor, " b"],
    clip: float,
) -> Float[Tensor, "b T"]:
    """PPO's loss of each step, -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A).

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7, with one ratio per step, as in DDPO.
    """
    ratio = torch.exp(log_prob - log_prob_old)
    a = advantage[:, None].to(ratio)
    return -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)


def leave_one_out(values: Float[Tensor, " b"], groups: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Each value minus the mean of the *others* of its group.

    Raises:
        ValueError: a group of one.
    """
    _, at, count = groups.unique(return_inverse=True, return_counts=True)
    if count.min() < 2:
        raise ValueError(
            "a sample is compared with the others of its prompt, but a prompt came with one "
            "sample; draw at least two of each"
        )
    n = count[at].to(values)
    return (values - group_mean(values, groups)) * n / (n - 1)


def finite_rewards(scores: Scores, algorithm: str) -> Float64[Tensor, " b"]:
    """The rewards, in float64.

    Raises:
        ValueError: one is not finite: so would be every difference and every mean with it.
    """
    value = scores.value.double()
    if not value.isfinite().all():
        at = int((~value.isfinite()).nonzero()[0])
        raise ValueError(
            f"{algorithm} compares rewards, but the reward of sample {at} is {value[at].item()}; "
            "give the reward a lower bound (clip_range)"
        )
    return value


def certainty(scores: Scores, tau: float | None) -> Float64[Tensor, " b"]:
    """Weights of centred rewards, w = 1 / (1 + (std / tau)^2), divided by their mean; no gradient.

    All are 1 if ``tau`` is None, or no std is known; and, but for rounding, if all are the same.

    w (r - b) is the best linear estimate of how far a sample's true reward is from b, if those have
    the standard deviation tau and r was measured with the error std. It is flat at 0, unlike
    exp(-std / tau): small uncertainties change nothing to first order. For rewards that are *not*
    centred it would be wrong: it lifts negative ones.
    """
    if tau is None or scores.std is None:
        return torch.ones_like(scores.value, dtype=torch.float64)
    weight = 1 / (1 + (scores.std.detach().double() / tau) ** 2)
    return weight / weight.mean()


def ratio_diagnostics(
    log_prob: Float[Tensor, "b T"], log_prob_old: Float[Tensor, "b T"], low: float, high: float
) -> dict[str, float]:
    """How far an update is from the model that drew the steps, in nats a step.

    ``low`` and ``high`` are the log-ratios beyond which a step counts as clipped.
    """
    log_ratio = (log_prob.double() - log_prob_old.double()).detach()
    return {
        "clip_fraction": ((log_ratio < low) | (log_ratio > high)).double().mean().item(),
        "log_ratio_mean": log_ratio.mean().item(),
        "log_ratio_max": log_ratio.abs().max().item(),
    }


def require_positive(algorithm: Algorithm, *names: str) -> None:
    """Raise ValueError if one of these options is not above 0."""
    for name in names:
        if not (value := getattr(algorithm, name)) > 0:
            raise ValueError(f"{type(algorithm).__name__} needs {name} above 0, but {value!r} came")


def require_kappa(algorithm: Algorithm) -> None:
    """Raise ValueError if ``kappa`` is negative or infinite."""
    if not 0 <= algorithm.kappa < inf:
        raise ValueError(
            f"kappa of {type(algorithm).__name__} is 0 or more, and finite (below 0 it would "
            f"reward uncertainty), but {algorithm.kappa!r} came"
        )


def require_tau(algorithm: Algorithm) -> None:
    """Raise ValueError if ``uncertainty`` is neither None nor a finite number above 0."""
    tau = algorithm.uncertainty
    if tau is not None and not 0 < tau < inf:
        raise ValueError(
            f"uncertainty of {type(algorithm).__name__} is the std at which a sample counts half, "
            f"above 0 and finite, or null, but {tau!r} came"
        )


def require_choice(algorithm: Algorithm, name: str, choices: Sequence[str]) -> None:
    """Raise ValueError if this option is not one of ``choices``."""
    if (value := getattr(algorithm, name)) not in choices:
        raise ValueError(
            f"{name} of {type(algorithm).__name__} is one of {', '.join(choices)}, "
            f"but {value!r} came"
        )

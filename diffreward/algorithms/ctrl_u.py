"""Ctrl-U: conditional generation finetuned on how well a prediction keeps its condition.

Zhang et al. 2024, *Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward
Modeling*, arXiv:2410.11236; with the uncertainty off it is ControlNet++, Li et al. 2024,
arXiv:2404.07987. No chain is run. A real picture x0 is noised to a training time t, the network's
clean prediction is decoded, what the picture was conditioned on is read off it again, and compared:

    L = L_diff + mu 1[t <= t_thr] mean(w l) + lambda mean(U),    w = exp(-U / tau)

l is the reward's loss and U the uncertainty, both of each pixel. The paper takes U from a second
prediction at t + dt with the same noise: how much the two readings differ, by KL(second || first)
where they are distributions, else by L1.

paper      code                       published
mu         ``weight``                 0.1 .. 1 by task
t_thr      ``max_time``               200 or 400 of 1000 times
dt         ``interval``               1 of 1000
lambda     ``penalty``                0.1 or 1
tau        ``tau``                    1

Differences, and why:

- w is a constant to the gradient. Published, it is not, and d/dU (l exp(-U) + lambda U) is negative
  where U < ln(l / lambda): the network may raise U to discount its loss. ``faithful`` is as
  published. (A constant w weakens a wrong gradient and cannot turn it. Where U is of several
  readers of one picture, the published gradient protected from a biased one: docs/papers.md.)
- the gradient of lambda U reaches the first prediction alone (``penalty_gradient``), the second
  being a teacher, so that it needs no graph; published: both.
- readings are made in full precision, whatever the network's: rounding would count as uncertainty.
- the reward is of the first prediction, as in the authors' code; the paper's figure has both
  (``both_passes``).
- U may come from elsewhere (``uncertainty``): several readers of one picture say where *they* are
  unsure; two predictions, how much the picture changed.
- the penalty is, like the reward, on predictions with t <= t_thr only: others are not decoded.

A signed reward is never multiplied: l is not negative. Rewards that are no `ControlReward` have one
number per picture; l is how far it is below the upper end of its range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.algorithms.base import PathwiseAlgorithm, require_choice, uniform
from diffreward.policy import Condition, Generators, Policy, randn
from diffreward.rewards import Reward, Scores
from diffreward.rewards.control import ControlReward
from diffreward.samples import Samples

SOURCES = ("two_timesteps", "members", "tta", "dropout")
GRADIENTS = ("none", "primary", "both")


@dataclass(frozen=True)
class CtrlU(PathwiseAlgorithm):
    """Uncertainty-aware reward finetuning of conditional generation.

    Args:
        weight: mu, of the reward's loss; 0: the diffusion loss alone.
        max_time: t_thr, as a fraction of the training times; predictions from more noise are not
            rewarded.
        uncertainty: where U comes from: two_timesteps; members, tta or dropout of the reward; null:
            nowhere, which is ControlNet++. In any case l is the mean of all members' losses; of
            members, U is how far the others are from the first.
        interval: dt, as a fraction of the training times.
        tau: U that lowers a pixel's weight to 1/e, in units of U.
        weigh: whether pixels are weighted at all.
        penalty: lambda.
        penalty_gradient: which predictions the gradient of the penalty reaches: primary (the
            first), both, or none. The opinions of members, tta and dropout are all of the first.
        both_passes: both predictions are rewarded and have a diffusion loss, each with the other as
            its second.
        shuffled: weights change places within a picture at random: a control for what weighting
            does beyond a smaller loss.
        faithful: gradients flow through the weights and all of U, as published.
        ramp: the share of the run over which ``weight`` rises from 0.

    Raises:
        ValueError: an option out of range.
    """

    needs_data: ClassVar[bool] = True
    logged: ClassVar[tuple[str, ...]] = (
        "diffusion_loss", "rewarded", "uncertainty", "pixel_weight", "pixel_weight_ess",
    )  # fmt: skip

    weight: float = 0.5
    max_time: float = 0.4
    uncertainty: str | None = "two_timesteps"
    interval: float = 0.001
    tau: float = 1.0
    weigh: bool = True
    penalty: float = 0.1
    penalty_gradient: str = "primary"
    both_passes: bool = False
    shuffled: bool = False
    faithful: bool = False
    ramp: float = 0.0

    presets: ClassVar = {
        "paper": {"faithful": True, "both_passes": True},
        "controlnet_plus_plus": {"uncertainty": None, "max_time": 0.2},
    }

    def __post_init__(self) -> None:
        if self.uncertainty is not None:
            require_choice(self, "uncertainty", SOURCES)
        require_choice(self, "penalty_gradient", GRADIENTS)
        for name in ("weight", "penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} of CtrlU must be finite and not negative, but {getattr(self, name)} "
                    "came"
                )
        if not 0 < self.max_time <= 1:
            raise ValueError(
                "max_time of CtrlU is a fraction of the training times in (0, 1] (400 of 1000 are "
                f"0.4), but {self.max_time} came"
            )
        if not 0 < self.interval < 1:
            raise ValueError(
                "interval of CtrlU is a fraction of the training times in (0, 1) (1 of 1000 is "
                f"0.001), but {self.interval} came"
            )
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau of CtrlU must be positive and finite, but {self.tau} came")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp of CtrlU is a share of the run in [0, 1], but {self.ramp} came")

    def check(self, reward: Reward) -> None:
        """Refuse rewards without a gradient, and those that the options do not fit."""
        super().check(reward)
        if isinstance(reward, ControlReward):
            if self.uncertainty == "members" and len(reward.members) < 2:
                raise ValueError(
                    f"uncertainty='members' compares several readings, and {reward.info.name!r} "
                    "has one extractor; give it a list of them, or choose another source"
                )
            return
        if self.uncertainty not in (None, "two_timesteps"):
            raise ValueError(
                f"uncertainty={self.uncertainty!r} needs a reward that reads conditions off "
                f"pictures (control_...), and {reward.info.name!r} does not; take two_timesteps or "
                "null here, and the reward 'uncertain' for one that is lowered by its uncertainty"
            )
        if self._weighted and not math.isfinite(reward.info.range[1]):
            raise ValueError(
                "a weighted loss must not be negative, so that the reward needs an upper end of "
                f"its range, and {reward.info.name!r} declares none; use clip_range, or set "
                "weigh=False"
            )

    def at(self, progress: float) -> CtrlU:
        if progress >= self.ramp:
            return self
        return replace(self, weight=self.weight * progress / self.ramp)

    @property
    def _weighted(self) -> bool:
        return self.weigh and self.uncertainty is not None

    @property
    def _two(self) -> bool:
        """Whether a second prediction is made."""
        return self.both_passes or self.uncertainty == "two_timesteps"

    @property
    def _others_learn(self) -> bool:
        """Whether the gradient of U reaches opinions that the first is compared with."""
        reached = ("both",) if self.uncertainty == "two_timesteps" else ("primary", "both")
        return self.faithful or (self.penalty > 0 and self.penalty_gradient in reached)

    @property
    def _second_learns(self) -> bool:
        return self.both_passes or (self._two and self._others_learn)

    def loss(
        self,
        policy: Policy,
        condition: Condition,
        generator: Generators,
        score: Callable[[Samples], Scores],
        *,
        x0: Tensor,
        reward: Reward,
    ) -> tuple[Float[Tensor, " b"], Samples, Scores]:
        """See `PathwiseAlgorithm.loss`; of samples with t > t_thr the scores are NaN.

        Args:
            x0: clean latents of real pictures, ``(b, ...)``.
            reward: what ``score`` evaluates.
        """
        u = uniform(len(condition), generator).to(x0.device, torch.float32)
        u = u.clamp(max=1 - 1e-6)  # below 1 in float32 still
        eps = randn(x0.shape, generator, dtype=x0.dtype, device=x0.device)
        later = (u + self.interval).clamp(max=1 - 1e-6)
        first, error = policy.denoise(x0, u, eps, condition)
        predictions, loss = [first], error
        if self._two:
            with _grad_if(self._second_learns):
                second, other = policy.denoise(x0, later, eps, condition)
            predictions.append(second)
            loss = (error + other) / 2 if self.both_passes else error

        parts = {"diffusion_loss": loss.detach().float()}
        rewarded = u <= self.max_time
        # the earliest is scored in any case, so that a rollout has scores
        at = (rewarded if rewarded.any() else u == u.min()).nonzero()[:, 0]
        own = condition.take(at)
        with _grad_if(bool(rewarded.any())):
            samples = [policy.decode(x[at], own) for x in predictions]
            with torch.autocast(x0.device.type, enabled=False):
                maps = self._maps(_reading(reward, score), samples, generator, at)
        if rewarded.any():
            extra = self.weight * maps.reward_loss + self.penalty * maps.penalty
            loss = loss.index_add(0, at.to(loss.device), extra.to(loss))

        def spread(values: Tensor) -> Tensor:
            full = torch.full((len(condition),), math.nan, device=values.device)
            return full.index_copy(0, at.to(values.device), values.detach().float())

        parts |= {
            "rewarded": rewarded.float(),
            "uncertainty": spread(maps.uncertainty),
            "pixel_weight": spread(maps.weight),
            "pixel_weight_ess": spread(maps.ess),
        }
        return loss, samples[0].detach(), Scores(spread(maps.value), None, parts)

    def _maps(self, reading, samples: list[Samples], generator: Generators, at: Tensor) -> _Maps:
        """What the reward's loss, its weights and the penalty come to, of each rewarded sample."""
        target = reading.target(samples[0])
        opinions = [reading.read(each) for each in samples]  # of each prediction, by all members
        found = []
        for k in range(2 if self.both_passes else 1):
            loss = torch.stack(reading.losses(opinions[k], target)).mean(0)
            spread = torch.zeros_like(loss)
            if self.uncertainty == "two_timesteps":
                pairs = zip(opinions[k], opinions[1 - k], strict=True)
                parts = [self._uncertainty(reading, own, [other]) for own, other in pairs]
                spread = torch.stack(parts).mean(0)
            elif self.uncertainty == "members":
                spread = self._uncertainty(reading, opinions[k][0], opinions[k][1:])
            elif self.uncertainty is not None:
                with _grad_if(self._others_learn):
                    others = reading.others(samples[k], self.uncertainty)
                spread = self._uncertainty(reading, opinions[k][0], others)
            weight = torch.ones_like(loss)
            if self._weighted:
                weight = torch.exp(-(spread if self.faithful else spread.detach()) / self.tau)
            if self.shuffled:
                weight = _shuffle(weight, generator, at)
            mean = lambda map: reading.mean(map, target)  # noqa: E731
            w = weight.detach()
            ess = mean(w) ** 2 / mean(w**2)
            both = mean(weight * loss), mean(spread)
            value = reading.upper - mean(loss.detach())
            found.append(_Maps(*both, both[1].detach(), mean(w), ess, value))
        if len(found) == 1:
            return found[0]
        together = [torch.stack(pair).mean(0) for pair in zip(*map(_Maps.all, found), strict=True)]
        return _Maps(*together[:-1], found[0].value)

    def _uncertainty(self, reading, opinion: Tensor, others: list[Tensor]) -> Tensor:
        """U of each pixel, with as much of a graph as the penalty asks for."""
        if not self._others_learn:
            others = [other.detach() for other in others]
        with _grad_if(self.faithful or self.penalty_gradient != "none"):
            return torch.stack([reading.divergence(o, opinion) for o in others]).mean(0)


@dataclass
class _Maps:
    """Means over the pixels of each sample, ``(n,)``."""

    reward_loss: Tensor
    penalty: Tensor
    uncertainty: Tensor
    weight: Tensor
    ess: Tensor  #: of the weights, as a share of the pixels
    value: Tensor  #: of the reward

    def all(self) -> list[Tensor]:
        return list(vars(self).values())


def _grad_if(wanted: bool) -> torch.set_grad_enabled:
    """Gradients are recorded if they are wanted, and were before."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and wanted)


def _shuffle(weight: Tensor, generator: Generators, at: Tensor) -> Tensor:
    """The weights of each picture, at other pixels of it."""
    rows = []
    for row, j in zip(weight, at.tolist(), strict=True):
        own = generator[j] if isinstance(generator, list | tuple) else generator
        order = torch.randperm(row.numel(), generator=own).to(row.device)
        rows.append(row.flatten()[order].view_as(row))
    return torch.stack(rows)


def _reading(reward: Reward, score: Callable[[Samples], Scores]) -> _Pixels | _Whole:
    return _Pixels(reward) if isinstance(reward, ControlReward) else _Whole(reward, score)


class _Pixels:
    """A `ControlReward`: what it reads off pictures, pixel by pixel."""

    upper = 0.0

    def __init__(self, reward: ControlReward) -> None:
        self.reward = reward
        self.target, self.losses = reward.target, reward.loss_maps
        self.divergence, self.mean = reward.divergence, reward.mean

    def read(self, samples: Samples) -> list[Tensor]:
        return self.reward.read(samples.data)

    def others(self, samples: Samples, source: str) -> list[Tensor]:
        return self.reward.opinions(samples.data, source)[1:]


class _Whole:
    """Any reward: one number per sample, as a map of one pixel."""

    def __init__(self, reward: Reward, score: Callable[[Samples], Scores]) -> None:
        self.score, self.upper = score, reward.info.range[1]
        self.upper = self.upper if math.isfinite(self.upper) else 0.0

    def target(self, samples: Samples) -> None:
        return None

    def read(self, samples: Samples) -> list[Float[Tensor, "b 1 1"]]:
        return [self.score(samples).value[:, None, None]]

    def losses(self, predictions: list[Tensor], target: None) -> list[Tensor]:
        return [self.upper - each for each in predictions]

    def divergence(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs()

    def mean(self, maps: Tensor, target: None) -> Float[Tensor, " b"]:
        return maps.flatten(1).mean(1)

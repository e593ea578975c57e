"""Rewards made of rewards: what all of them share; sums, products and ensembles.

Transforms of one reward are in :mod:`.transforms`. All are registered, take specs of rewards as
options, and so nest freely, in YAML and in Python::

    make_reward({"weighted_sum": [{"name": "clip_score", "weight": 1.0},
                                  {"name": "aesthetic", "weight": 0.1}]})
    make_reward({"weighted_sum": [{"log_sigmoid": {"reward": "clip_score", "reference": 0.25}},
                                  {"log_sigmoid": {"reward": "aesthetic", "reference": 5.5}}]})

The usual order is: standardise each reward, aggregate an ensemble, transform, combine.

A combination needs what any of its members needs, is differentiable if all of them are, and knows
its range from theirs. ``Scores.parts`` holds each member's value by name, and the members' own
parts as ``"member/part"``. Members are called through :func:`evaluate`, so that a NaN names the
member and the sample. A value of -inf, a hard constraint that is not met, stays -inf through
everything but the two that map into a bounded range, ``clip_range`` and ``par``.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards.base import (
    Reward,
    RewardInfo,
    RewardSpec,
    Scores,
    evaluate,
    make_reward,
    register_reward,
)
from diffreward.rewards.towers import share_towers
from diffreward.samples import Samples

Number = float | int
Range = tuple[Number, Number]

# --------------------------------------------------------------------------------------------
# What all combinations share
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Combined:
    """A reward made of rewards: its members' scores, joined.

    Whoever has the scores of the members already, however they were computed, calls
    :meth:`combine`, and gets what a call would give.

    Attributes:
        info: what it needs and gives, see :func:`combined_info`.
        members: by name; each is scored once per call.
        join: the members' scores, in order, and the samples -> value and std. Of the samples it
            reads the prompts only.
    """

    info: RewardInfo
    members: dict[str, Reward]
    join: Callable[[list[Scores], Samples], tuple[Tensor, Tensor | None]]

    def __call__(self, samples: Samples) -> Scores:
        with share_towers():
            scores = {name: evaluate(member, samples) for name, member in self.members.items()}
        return self.combine(scores, samples)

    def combine(self, scores: Mapping[str, Scores], samples: Samples) -> Scores:
        """The scores of samples, from those of the members, by name."""
        value, std = self.join([scores[name] for name in self.members], samples)
        return Scores(value, std, member_parts({name: scores[name] for name in self.members}))


def build_members(
    specs: Sequence[RewardSpec] | RewardSpec, who: str, at_least: int = 1
) -> dict[str, Reward]:
    """Build the members of a combination; of two with the same name the second is called "name 2".

    Raises:
        ValueError: ``specs`` is no list, or too short; or a member cannot be built.
    """
    members: dict[str, Reward] = {}
    for spec in _as_list(specs, who, at_least):
        member = make_reward(spec)
        members[distinct(member.info.name, members)] = member
    return members


def _as_list(
    specs: Sequence[RewardSpec] | RewardSpec, who: str, at_least: int = 1
) -> Sequence[RewardSpec]:
    if isinstance(specs, str) or not isinstance(specs, Sequence):
        raise ValueError(f"{who} takes a list of rewards, but {specs!r} came; write [{specs!r}]")
    if len(specs) < at_least:
        raise ValueError(f"{who} takes {at_least} or more rewards, but {len(specs)} came")
    return specs


def distinct(name: str, taken: Iterable[str]) -> str:
    """``name``, numbered if it is among ``taken``: two rewards may differ in their options only."""
    taken = set(taken)
    names = [name, *(f"{name} {n}" for n in range(2, len(taken) + 2))]
    return next(n for n in names if n not in taken)


def member_parts(scores: Mapping[str, Scores]) -> dict[str, Tensor]:
    """Each member's value by its name, and its own parts as ``"name/part"``."""
    parts = {name: member.value for name, member in scores.items()}
    for name, member in scores.items():
        parts.update({f"{name}/{part}": value for part, value in member.parts.items()})
    return parts


def combined_info(
    kind: str,
    members: Mapping[str, Reward],
    range: Range,
    *,
    needs_prompt: bool = False,
    needs_context: Sequence[str] = (),
    source: str = "",
) -> RewardInfo:
    """What is known of a combination: it needs what any member needs.

    Args:
        kind: name of the combinator, to which the members' names are added.
        members: by name.
        range: of the combination.
        needs_prompt, needs_context: of the combinator itself.
        source: of the combinator; the members' are added.

    Raises:
        ValueError: members score different modalities, so that no sample could be given to all.
    """
    infos = [member.info for member in members.values()]
    name = f"{kind}({', '.join(members)})"
    modalities = {info.modality: info.name for info in infos if info.modality is not None}
    if len(modalities) > 1:
        scored = ", ".join(f"{who} scores {modality}" for modality, who in modalities.items())
        raise ValueError(f"{kind} cannot join rewards of different modalities: {scored}")
    gradients = [info.differentiable for info in infos]
    weights = _unique(info.weights for info in infos)
    # An embedded asset first would say that nothing needs to be downloaded.
    weights.sort(key=lambda given: given.startswith("embedded:"))
    return RewardInfo(
        name=name,
        modality=next(iter(modalities), None),
        differentiable=False if False in gradients else None if None in gradients else True,
        needs_prompt=needs_prompt or any(info.needs_prompt for info in infos),
        needs_context=tuple(
            dict.fromkeys([key for info in infos for key in info.needs_context] + [*needs_context])
        ),
        range=range,
        licence="; ".join(_unique(info.licence for info in infos)),
        weights=", ".join(weights) or None,
        source="; ".join(_unique([source, *(info.source for info in infos)])),
        description=name,
    )


def _unique(texts: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))


def finite_number(value: object, what: str) -> float:
    """``value`` as a float.

    Raises:
        ValueError: it is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, Number) or not math.isfinite(value):
        raise ValueError(f"{what} is a finite number, but {value!r} came")
    return float(value)


def positive_number(value: object, what: str) -> float:
    """``value`` as a float.

    Raises:
        ValueError: it is no finite number above zero.
    """
    number = finite_number(value, what)
    if number <= 0:
        raise ValueError(f"{what} must be above zero, but {value!r} came")
    return number


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero, where the true one is infinite."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, 1.0, x).sqrt())


def _times(a: Number, b: Number) -> Number:
    """Product of interval ends: the end of an unbounded range is never reached, so 0 * inf = 0."""
    return 0.0 if a == 0 or b == 0 else a * b


_ENTRY = dict(licence="Apache-2.0; the members have their own")

# --------------------------------------------------------------------------------------------
# Sums and products
# --------------------------------------------------------------------------------------------


@register_reward("weighted_sum", source="this package", **_ENTRY)
def weighted_sum(rewards: Sequence[RewardSpec] | RewardSpec) -> Combined:
    """Sum of rewards, each times its weight.

    ``std`` is the sum of |weight| * std: exact if the members' errors rise and fall together, an
    upper bound if they do not. They look at the same sample, often through the same tower, so
    that independence would be wishful. A member without a std counts as exact.

    Args:
        rewards: specs; ``"weight"`` (1.0) stands in the mapping beside the reward's options, or
            beside the reward itself: ``{"reward": spec, "weight": 0.1}``. A weight of 0 switches
            a member off, with any constraint it imposes by -inf: it is only reported.

    Raises:
        ValueError: no rewards, all weights 0, or a weight that is no finite number; when called,
            a member of negative weight gives -inf: breaking a constraint would be rewarded.
    """
    specs, weights = zip(*map(_weighted, _as_list(rewards, "weighted_sum")), strict=True)
    members = build_members(specs, "weighted_sum")
    if not any(weights):
        raise ValueError("weighted_sum has nothing to add up: all its weights are 0")

    def join(scores: list[Scores], samples: Samples) -> tuple[Tensor, Tensor | None]:
        value, std = torch.zeros_like(scores[0].value), None
        for name, weight, member in zip(members, weights, scores, strict=True):
            if weight == 0:  # not 0 * -inf
                continue
            broken = member.value == -math.inf
            if weight < 0 and broken.any():
                raise ValueError(
                    f"weighted_sum: {name!r} gave -inf to sample {int(broken.nonzero()[0, 0])}, a "
                    f"constraint that is not met, and its weight {weight:g} would reward that; "
                    "give it a positive weight, or bound it with clip_range"
                )
            value = value + weight * member.value
            if member.std is not None:
                std = abs(weight) * member.std + (0 if std is None else std)
        return value, std

    ends = [
        sorted(_times(weight, end) for end in member.info.range)
        for member, weight in zip(members.values(), weights, strict=True)
    ]
    low, high = (sum(column) for column in zip(*ends, strict=True))
    return Combined(combined_info("weighted_sum", members, (low, high)), members, join)


def _weighted(spec: RewardSpec) -> tuple[RewardSpec, float]:
    if not isinstance(spec, Mapping):
        return spec, 1.0
    rest = dict(spec)
    weight = finite_number(rest.pop("weight", 1.0), "a weight")
    return (rest["reward"] if rest.keys() == {"reward"} else rest), weight


@register_reward("product", source="this package", **_ENTRY)
def product(rewards: Sequence[RewardSpec] | RewardSpec, allow_negative: bool = False) -> Combined:
    """Product of rewards that are not negative: low as soon as one of them is.

    Of two negative factors the worse would make the product the better, and a negative factor
    turns "higher is better" round for all the others. So a reward that can be negative is refused.

    ``std`` is to first order, |product of the others| * std summed over the members: as in
    weighted_sum, for errors that rise and fall together.

    Args:
        rewards: specs.
        allow_negative: take factors that can be negative nevertheless. The product is then no
            longer increasing in each; -inf makes it -inf.

    Raises:
        ValueError: no rewards, or one whose declared range goes below zero.
    """
    members = build_members(rewards, "product")
    for name, member in members.items():
        if member.info.range[0] < 0 and not allow_negative:
            raise ValueError(
                f"product: {name!r} can be negative (its range is {list(member.info.range)}), and "
                "the product of two negative factors is a high reward. Make it positive, as by "
                "{'clip_range': {'reward': ..., 'low': 0}} or par; or pass allow_negative=True"
            )

    def join(scores: list[Scores], samples: Samples) -> tuple[Tensor, Tensor | None]:
        values = torch.stack([member.value for member in scores])
        dead = (values == -math.inf).any(dim=0)
        values = values.masked_fill(dead, 1.0)  # 0 * -inf is NaN, and so would its gradient be
        std = None
        for m, member in enumerate(scores):
            if member.std is not None:
                others = torch.cat([values[:m], values[m + 1 :]]).prod(dim=0)
                std = others.abs() * member.std + (0 if std is None else std)
        return values.prod(dim=0).masked_fill(dead, -math.inf), std

    low, high = 1.0, 1.0
    for member in members.values():
        corners = [_times(a, b) for a in (low, high) for b in member.info.range]
        low, high = min(corners), max(corners)
    if any(member.info.range[0] == -math.inf for member in members.values()):
        low = -math.inf
    return Combined(combined_info("product", members, (low, high)), members, join)


# --------------------------------------------------------------------------------------------
# Ensembles
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aggregate:
    """How K opinions r_k on one sample become one, with mean r and unbiased std s.

    name                     value                                source
    ``mean``                 r
    ``min``                  min_k r_k                            WCO, Coste et al., 2310.02743
    ``softmin``              -beta log mean_k exp(-r_k / beta)
    ``mean_minus_variance``  r - lam * s**2                       UWO, Coste et al., 2310.02743
    ``lcb``                  r - kappa * s

    ``softmin`` lies between ``min`` (beta -> 0) and ``mean`` (beta -> inf), and is r - s**2 /
    (2 beta) to second order. With beta = 1 / lambda, the temperature of steering, exp(lambda *
    value) is the harmonic mean of exp(lambda * r_k). K equal opinions give exactly that opinion
    and std 0. One -inf makes the value -inf, and the std 0: that much is certain.

    No reward is multiplied by exp(-s), which would lift a negative one.

    Attributes:
        how: one of the names.
        beta: of ``softmin``, in units of the reward.
        lam: of ``mean_minus_variance``, per unit of the reward. The paper's: 0.5 for best-of-n,
            0.1 for PPO.
        kappa: of ``lcb``.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    how: str = "softmin"
    beta: Number = 0.1
    lam: Number = 0.5
    kappa: Number = 1.0

    NAMES = ("mean", "min", "softmin", "mean_minus_variance", "lcb")

    def __post_init__(self) -> None:
        if self.how not in self.NAMES:
            raise ValueError(f"aggregate is one of {', '.join(self.NAMES)}, but {self.how!r} came")
        positive_number(self.beta, "beta")
        for name in ("lam", "kappa"):
            if finite_number(getattr(self, name), name) < 0:
                raise ValueError(
                    f"{name} must not be negative, which would reward uncertainty, but "
                    f"{getattr(self, name)} came"
                )

    def __call__(
        self, values: Float[Tensor, "k b"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Value and std of K opinions each on b samples.

        Raises:
            ValueError: K = 1, which says nothing about the uncertainty.
        """
        if len(values) < 2:
            raise ValueError("one opinion has no spread: give 2 or more")
        dead = (values == -math.inf).any(dim=0)
        values = values.masked_fill(dead, 0.0)
        # Relative to the lowest, so that equal opinions are exactly equal to their aggregate and
        # no exponential overflows.
        lowest = values.detach().amin(dim=0)
        above = values - lowest
        mean = above.mean(dim=0)
        variance = (above - mean).square().sum(dim=0) / (len(values) - 1)
        std = safe_sqrt(variance)
        if self.how == "min":
            value = above.amin(dim=0)
        elif self.how == "softmin":
            value = -self.beta * torch.expm1(-above / self.beta).mean(dim=0).log1p()
        elif self.how == "mean_minus_variance":
            value = mean - self.lam * variance
        elif self.how == "lcb":
            value = mean - self.kappa * std
        else:
            value = mean
        return (lowest + value).masked_fill(dead, -math.inf), std

    def join(self, scores: Sequence[Scores], samples: Samples) -> tuple[Tensor, Tensor]:
        """Value and std of K members' scores of the same samples, for :class:`Combined`."""
        return self(torch.stack([member.value for member in scores]))

    def range(self, ranges: Sequence[Range]) -> Range:
        """Bounds of the value from the ranges of the K opinions."""
        lows, highs = zip(*ranges, strict=True)
        k, width = len(ranges), max(highs) - min(lows)
        if self.how == "min":
            return min(lows), min(highs)
        low, high = sum(lows) / k, sum(highs) / k
        if self.how == "softmin":
            low = min(lows)
        if self.how == "lcb":  # K values within a width have at most this unbiased std
            low -= _times(self.kappa, width / 2 * math.sqrt(k / (k - 1)))
        if self.how == "mean_minus_variance":
            low -= _times(self.lam, (width / 2) ** 2 * k / (k - 1))
        return low, high


@register_reward(
    "ensemble", source="Coste et al. 2023, arXiv:2310.02743 (min, mean_minus_variance)", **_ENTRY
)
def ensemble(
    rewards: Sequence[RewardSpec] | RewardSpec,
    aggregate: str = "mean",
    beta: Number = 0.1,
    lam: Number = 0.5,
    kappa: Number = 1.0,
) -> Combined:
    """Several rewards for one thing as one: mean, min, softmin, mean_minus_variance or lcb.

    ``std`` is the unbiased standard deviation of the members, their disagreement; what they say
    about their own uncertainty is not used. Errors that all members share do not show in it.
    Members must speak in the same units: standardize them first if they do not.

    Args:
        rewards: specs, two or more.
        aggregate, beta, lam, kappa: see :class:`Aggregate`.

    Raises:
        ValueError: fewer than two rewards, an unknown aggregate or a number out of range.
    """
    members = build_members(rewards, "ensemble", at_least=2)
    how = Aggregate(aggregate, beta, lam, kappa)
    ranges = [member.info.range for member in members.values()]
    info = combined_info(f"ensemble_{aggregate}", members, how.range(ranges))
    return Combined(info, members, how.join)

"""What a reward is, how it is called, and the one table in which rewards are found.

A *reward* maps :class:`~diffreward.samples.Samples` to :class:`Scores`: one number per sample,
higher is better, which does not depend on the other samples of the batch. Anything callable that
returns a ``(b,)`` tensor will do; :func:`make_reward` gives it the rest.

Steering, finetuning and scoring call rewards through :func:`evaluate` only, so that a wrong
shape, an integer, a NaN or a missing prompt is one clear error, and never a silent zero.

A *registered* reward is a factory, a function or class whose keyword arguments are the reward's
options::

    @register_reward("brightness", modality="image", differentiable=True, range=(0, 1))
    def brightness(power: float = 1.0):
        '''Mean of the pixels to a power.'''
        return lambda samples: samples.data.pow(power).mean(dim=(1, 2, 3))

    make_reward({"name": "brightness", "power": 2.0})
    make_reward({"brightness": {"power": 2.0}})  # the same, shorter
    make_reward({"brightness": 2.0})  # shorter still: the first option

Heavy imports belong inside the factory: this package imports none of open_clip, transformers and
diffusers.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards.registry import Entry, Registry
from diffreward.samples import Samples

# --------------------------------------------------------------------------------------------
# The records
# --------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """What a reward says about b samples.

    Attributes:
        value: ``(b,)``, higher is better; float32 when it comes from :func:`evaluate`.
        std: ``(b,)`` uncertainty in the units of ``value``, where the reward knows it.
        parts: named components for reports, each ``(b,)``; NaN where one does not apply.
    """

    value: Float[Tensor, " b"]
    std: Float[Tensor, " b"] | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.value)

    def take(self, indices: Tensor | Sequence[int]) -> "Scores":
        """The scores at ``indices`` (repeats allowed), in that order."""
        at = torch.as_tensor(indices, dtype=torch.long, device=self.value.device)
        return Scores(
            self.value[at],
            None if self.std is None else self.std[at],
            {name: part[at] for name, part in self.parts.items()},
        )

    @staticmethod
    def cat(batches: Sequence["Scores"]) -> "Scores":
        """Concatenate the scores which one reward gave to several batches.

        Raises:
            ValueError: no batches, or only some of them have a std or a part.
        """
        if not batches:
            raise ValueError("Scores.cat needs at least one batch")
        head = batches[0]
        for batch in batches[1:]:
            if (batch.std is None) != (head.std is None) or batch.parts.keys() != head.parts.keys():
                raise ValueError(
                    "cannot join scores of which only some have a std or a part: "
                    "are they from the same reward?"
                )
        return Scores(
            torch.cat([batch.value for batch in batches]),
            None if head.std is None else torch.cat([batch.std for batch in batches]),
            {name: torch.cat([batch.parts[name] for batch in batches]) for name in head.parts},
        )


@dataclass(frozen=True)
class RewardInfo:
    """What is known about a reward before it is built.

    Attributes:
        name: how it is called in specs and reports.
        modality: the ``Samples.modality`` it scores; None: any.
        differentiable: the value carries a gradient to the samples' data; None: not declared.
        needs_prompt: it cannot score samples without prompts.
        needs_context: keys of ``Samples.context`` without which it cannot score.
        of_sets: it is a :class:`SetReward`: a set of samples has a value, one sample has none.
        range: lowest and highest possible value.
        licence: of its weights; of its code if it has none.
        weights: None: it has none. ``"embedded:..."``: shipped in this package. Anything else
            says what must be downloaded or given.
        source: paper, equation.
        description: one line.
    """

    name: str
    modality: str | None = None
    differentiable: bool | None = None
    needs_prompt: bool = False
    needs_context: tuple[str, ...] = ()
    of_sets: bool = False
    range: tuple[float | int, float | int] = (-math.inf, math.inf)
    licence: str = ""
    weights: str | None = None
    source: str = ""
    description: str = ""

    @property
    def needs_download(self) -> bool:
        """Whether weights from outside this package are needed to build it."""
        return self.weights is not None and not self.weights.startswith("embedded:")


@runtime_checkable
class Reward(Protocol):
    """Anything callable that carries a :class:`RewardInfo`; no base class is needed."""

    info: RewardInfo

    def __call__(self, samples: Samples) -> Scores: ...


class SetReward(ABC):
    """A reward that only a set of samples has, as diversity or the distance to a distribution.

    It sees samples through *features*, one row each, which do not depend on the other samples; so
    a large set is embedded in batches, and sets that share samples are compared without embedding
    them anew. `evaluate_set` is how it is called.

    Attributes:
        info: with ``of_sets``.
        min_samples: fewest a set may have.
    """

    info: RewardInfo
    min_samples: int = 2

    @abstractmethod
    def features(self, samples: Samples) -> Float[Tensor, "b ..."]:
        """What the value is computed from; with a gradient where the encoder has one."""

    @abstractmethod
    def value(self, features: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
        """Of the set whose features these are: higher is better; computed in float64."""

    def influence(self, features: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
        """What the value would lose without each sample: value(S) - value(S without j)."""
        n = len(features)
        if n <= self.min_samples:
            raise ValueError(
                f"{self.info.name!r} needs {self.min_samples} samples, so the influence of one "
                f"needs {self.min_samples + 1} or more, but {n} came"
            )
        rest = [torch.cat([features[:j], features[j + 1 :]]) for j in range(n)]
        return self.value(features) - torch.stack([self.value(r) for r in rest])

    def __call__(self, samples: Samples) -> Float[Tensor, ""]:
        return self.value(self.features(samples))

    def credit(self, samples: Samples) -> Float[Tensor, " b"]:
        """Each sample's influence on the set's value."""
        return self.influence(self.features(samples))

    def to(self, device: torch.device | str) -> "SetReward":
        return self


class SetScores(Scores):
    """What a set reward says about a set: ``value`` is each sample's influence, float64.

    Influences may take far longer than the set's value: they are computed when first asked for.

    Attributes:
        features: ``(b, ...)``, what `SetReward.value` takes.
        total: the set's value.
        reward: whose they are.

    Raises:
        ValueError: when ``value`` is asked for, too few samples for the reward's influences, or
            one that is NaN or infinite.
    """

    def __init__(
        self,
        value: Float[Tensor, " b"] | None = None,
        *,
        features: Float[Tensor, "b ..."],
        total: float,
        reward: SetReward,
    ) -> None:
        self.features, self.total, self.reward = features, total, reward
        self._value, self.std, self.parts = value, None, {}

    @property
    def value(self) -> Float[Tensor, " b"]:
        if self._value is None:
            found = self.reward.influence(self.features)
            self._value = _check_set(self.reward, self.features, "influence", found).double()
        return self._value

    @value.setter
    def value(self, value: Float[Tensor, " b"]) -> None:
        self._value = value

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        return f"SetScores({self.reward.info.name!r}, {len(self)} samples, total={self.total:.6g})"

    def pseudovalues(self) -> Float[Tensor, " b"]:
        """Numbers whose mean is the set's value, and whose standard error is the jackknife's.

        Tukey's pseudo-values, total + (n - 1) influence, moved to the mean ``total``: so that a
        set's value is averaged, compared pair by pair and given an interval as samples' are.
        """
        influence = self.value.double()
        return self.total + (len(influence) - 1) * (influence - influence.mean())


RewardSpec = str | Mapping | Reward | Callable[[Samples], Any]
"""A name, ``{"name": ..., option: value}`` or ``{NAME: {option: value}}``, a reward, or a callable
``Samples -> Tensor``; see :func:`make_reward`."""


# --------------------------------------------------------------------------------------------
# Calling a reward
# --------------------------------------------------------------------------------------------


def evaluate(reward: RewardSpec, samples: Samples) -> Scores:
    """Score samples, checking what goes in and what comes out.

    Args:
        reward: a reward, or a callable ``Samples -> Tensor | Scores``. A name is refused, since
            it would be built anew at every call: call :func:`make_reward` once.
        samples: b samples.

    Returns:
        Scores with ``value`` float32 ``(b,)`` on the device of the samples, with the gradient it
        came with; a reward that declares it is not differentiable gives none, lest half a
        gradient be taken for a whole one. ``-inf`` is a legal value: a hard constraint that is
        not met.

    Raises:
        ValueError: before the reward is called, if there are no samples, if their modality is not
            the reward's, if prompts or context it needs are missing, or if a sample's data are
            not finite; afterwards, if the value has not the shape ``(b,)``, or is NaN or +inf:
            the message names the sample.
        TypeError: ``reward`` is not callable, or returned anything but a floating-point tensor
            or Scores.
    """
    reward = as_reward(reward)
    if isinstance(reward, SetReward):
        raise ValueError(
            f"reward {reward.info.name!r} is of whole sets, so that a sample has none; "
            "evaluate_set(reward, samples) gives the set's, and each sample's influence on it"
        )
    _check_input(reward.info, samples)
    scores = _as_scores(reward(samples), reward.info, samples)
    _check_numbers(scores, reward.info, samples)
    if reward.info.differentiable is False:
        std = None if scores.std is None else scores.std.detach()
        parts = {name: part.detach() for name, part in scores.parts.items()}
        scores = Scores(scores.value.detach(), std, parts)
    return scores


def set_features(
    reward: RewardSpec, samples: Samples, batch: int | None = None
) -> Float[Tensor, "b ..."]:
    """The features of samples, checked as `evaluate` checks scores, ``batch`` rows at a time.

    Raises:
        ValueError: as `evaluate` before the reward is called; features that are not one finite
            row per sample.
        TypeError: ``reward`` is not of sets.
    """
    if not isinstance(reward, SetReward):
        raise TypeError(f"{_name_of(reward)!r} is no reward of sets; evaluate(...) scores samples")
    _check_input(reward.info, samples)
    parts = torch.arange(len(samples)).split(batch or len(samples))
    features = torch.cat([reward.features(samples.take(part)) for part in parts])
    if len(features) != len(samples):
        raise ValueError(
            f"reward {reward.info.name!r} gave {len(features)} rows of features for "
            f"{len(samples)} samples; expected one each"
        )
    bad = ~torch.isfinite(features.detach()).flatten(1).all(dim=1)
    if bad.any():
        raise ValueError(
            f"reward {reward.info.name!r} gave {_first(bad, samples)} features that are NaN or "
            "infinite"
        )
    return features


def score_set(reward: SetReward, features: Float[Tensor, "b ..."]) -> SetScores:
    """The value of the set with these features, and each sample's influence when it is asked for.

    Raises:
        ValueError: fewer samples than the reward needs, or a value that is NaN or infinite.
    """
    name, n = reward.info.name, len(features)
    if n < reward.min_samples:
        raise ValueError(f"reward {name!r} needs {reward.min_samples} samples or more, {n} came")
    total = _check_set(reward, features, "value", reward.value(features)).item()
    return SetScores(features=features, total=total, reward=reward)


def _check_set(reward: SetReward, features: Tensor, what: str, numbers: Tensor) -> Tensor:
    """``numbers``, if they are one of the set or one of each of its samples, and finite."""
    n, shape = len(features), () if what == "value" else (len(features),)
    if numbers.shape != shape:
        raise ValueError(
            f"reward {reward.info.name!r} gave a set of {n} samples {what} of shape "
            f"{tuple(numbers.shape)}; expected {shape}"
        )
    if not numbers.isfinite().all():
        raise ValueError(
            f"reward {reward.info.name!r} gave a set of {n} samples {what} that is NaN or infinite"
        )
    return numbers


def evaluate_set(reward: RewardSpec, samples: Samples, batch: int | None = None) -> SetScores:
    """Score a set of samples; see `set_features` and `score_set`."""
    return score_set(reward, set_features(reward, samples, batch))


def require_gradient(
    reward: Reward, value: Tensor | None = None, *, what: str = "this", instead: str = ""
) -> None:
    """Refuse to differentiate a reward that has no gradient.

    Args:
        reward: of which a gradient will be asked.
        value: what it gave, if it was called already: then it must carry a gradient, too.
        what: who asks, for the message.
        instead: what to do, for the message.

    Raises:
        ValueError: the reward declares it is not differentiable, or ``value`` has no gradient.
    """
    advice = f"; {instead}" if instead else ""
    if reward.info.differentiable is False:
        raise ValueError(
            f"{what} needs a differentiable reward, and {reward.info.name!r} is not one{advice}"
        )
    if value is not None and not value.requires_grad:
        raise ValueError(
            f"{what} needs a gradient, and reward {reward.info.name!r} gave values without "
            f"one{advice}"
        )


def judge_prompts(judge: Reward, prompts: Sequence[str], like: Samples) -> tuple[list[bool], str]:
    """Which prompts a held-out reward can judge.

    Args:
        judge: the reward.
        prompts: any number.
        like: one sample of the kind that it will be given.

    Returns:
        One answer per prompt, and what was wrong with the first that it cannot judge.
    """

    def problem(these: Sequence[str]) -> str:
        try:
            evaluate(judge, replace(like.take([0] * len(these)), prompts=list(these)))
        except ValueError as err:
            return str(err)
        return ""

    with torch.no_grad():
        if not problem(prompts):
            return [True] * len(prompts), ""
        problems = [problem([prompt]) for prompt in prompts]
    return [not p for p in problems], next((p for p in problems if p), "")


def as_reward(function: RewardSpec, info: RewardInfo | None = None) -> Reward:
    """A reward from any callable ``Samples -> Tensor | Scores``; a reward is returned unchanged.

    Args:
        function: the callable.
        info: given to a callable that carries none; by default its name only, with everything
            else undeclared.

    Raises:
        TypeError: ``function`` is not callable.
    """
    if isinstance(function, Reward) and isinstance(function.info, RewardInfo):
        return function
    if not callable(function):
        raise TypeError(
            f"a reward is a callable Samples -> Tensor, but {function!r} came; "
            "make_reward builds one from a name or a mapping"
        )
    return _FunctionReward(function, info or RewardInfo(name=_name_of(function)))


@dataclass(frozen=True)
class _FunctionReward:
    function: Callable[[Samples], Any]
    info: RewardInfo

    def __call__(self, samples: Samples) -> Scores:
        return _as_scores(self.function(samples), self.info, samples)


def _name_of(function: Callable) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _check_input(info: RewardInfo, samples: Samples) -> None:
    who = f"reward {info.name!r}"
    if not len(samples):
        raise ValueError(f"{who} was given no samples")
    if info.modality is not None and samples.modality != info.modality:
        raise ValueError(
            f"{who} scores {info.modality} samples, but {samples.modality} samples came"
        )
    if info.needs_prompt and samples.prompts is None:
        raise ValueError(
            f"{who} compares samples with their prompts, but these samples have none; "
            "pass Samples(..., prompts=[...])"
        )
    missing = [key for key in info.needs_context if key not in samples.context]
    if missing:
        raise ValueError(
            f"{who} needs {', '.join(missing)} in Samples.context; "
            f"there is {', '.join(samples.context) or 'nothing'}"
        )
    data = samples.data
    if isinstance(data, Tensor) and data.is_floating_point():
        bad = ~torch.isfinite(data.detach()).flatten(1).all(dim=1)
        if bad.any():
            raise ValueError(
                f"{_first(bad, samples)} has NaN or infinite data and was not given to {who}: "
                "the model that generated it has diverged"
            )


def _as_scores(raw: Any, info: RewardInfo, samples: Samples) -> Scores:
    """``raw`` as Scores of floating ``(b,)`` tensors on the samples' device, or a clear error."""
    scores = raw if isinstance(raw, Scores) else None
    std, parts = (scores.std, scores.parts) if scores else (None, {})
    value = scores.value if scores else raw

    return Scores(
        _vector(value, "value", info, samples),
        None if std is None else _vector(std, "std", info, samples),
        {name: _vector(part, f"part {name!r}", info, samples) for name, part in parts.items()},
    )


def _vector(tensor: Any, what: str, info: RewardInfo, samples: Samples) -> Tensor:
    b, who = len(samples), f"reward {info.name!r}"
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{who} returned {type(tensor).__name__} as {what}, expected a tensor of shape "
            f"({b},); convert it with torch.tensor(...)"
        )
    if tensor.shape != (b,):
        hint = "it must be one number for each sample, never a mean over the batch"
        if tensor.numel() == b:
            hint = "flatten it with .reshape(-1)"
        raise ValueError(
            f"{who} returned {what} of shape {tuple(tensor.shape)}, expected ({b},) for "
            f"{b} samples; {hint}"
        )
    if not tensor.is_floating_point() and not what.startswith("part"):
        raise TypeError(
            f"{who} returned {what} of dtype {tensor.dtype}, expected a floating-point "
            "tensor; convert it with .float()"
        )
    device = samples.data.device if isinstance(samples.data, Tensor) else tensor.device
    return tensor.to(device=device, dtype=torch.float32)


def _check_numbers(scores: Scores, info: RewardInfo, samples: Samples) -> None:
    value = scores.value.detach()
    bad = torch.isnan(value) | (value == math.inf)
    if bad.any():
        number = value[bad.nonzero()[0, 0]].item()
        raise ValueError(f"reward {info.name!r} gave {number} to {_first(bad, samples)}")
    if scores.std is not None:
        std = scores.std.detach()
        bad = ~(torch.isfinite(std) & (std >= 0))
        if bad.any():
            number = std[bad.nonzero()[0, 0]].item()
            raise ValueError(f"reward {info.name!r} gave std {number} to {_first(bad, samples)}")


def _first(bad: Tensor, samples: Samples) -> str:
    index = int(bad.nonzero()[0, 0])
    prompt = "" if samples.prompts is None else f" ({samples.prompts[index]!r})"
    return f"sample {index}{prompt}"


# --------------------------------------------------------------------------------------------
# The registry
# --------------------------------------------------------------------------------------------


REGISTRY = Registry("a reward", "make_reward")


def register_reward(name: str, *, overwrite: bool = False, **info: Any) -> Callable:
    """Decorator that enters a reward factory in the registry; the factory itself is unchanged.

    Args:
        name: how the reward will be called; case, ``-``, ``_`` and spaces make no difference.
        overwrite: take the place of an entry of this name (re-running a notebook cell).
        **info: fields of :class:`RewardInfo`. The description is by default the first line of
            the factory's docstring.

    The factory's arguments are the reward's options. It returns a Reward, or a plain callable
    ``Samples -> Tensor | Scores`` which is then given this entry's info. A class without an
    ``info`` attribute is given this entry's.

    Raises:
        ValueError: the name is empty or taken, or the function decorated is itself a reward
            rather than a factory of one.
        TypeError: an unknown field of RewardInfo.
    """
    REGISTRY.key(name)

    def register(factory: Callable) -> Callable:
        entry = REGISTRY.register(
            name, factory, lambda doc: RewardInfo(name=name, **{"description": doc, **info}),
            overwrite,
        )  # fmt: skip
        if isinstance(factory, type) and not hasattr(factory, "info"):
            factory.info = entry.info
        return factory

    return register


def make_reward(spec: RewardSpec, /, **options: Any) -> Reward:
    """Build a reward.

    Args:
        spec: a registered name; a mapping ``{"name": ..., option: value, ...}``; the same for
            short, ``{NAME: {option: value, ...}}``, or ``{NAME: value}`` for the first option; a
            reward (returned unchanged); or a callable ``Samples -> Tensor | Scores``.
        **options: the reward's options, as in the mapping.

    Raises:
        ValueError: an unknown name or option (the message lists near matches), a missing option,
            a mapping without a name, or options for something that is already built.
        TypeError: ``spec`` is none of these.
    """
    if isinstance(spec, str | Mapping):
        chosen = {**REGISTRY.in_full(spec), **options}
        entry = find_reward(chosen.pop("name"))
        REGISTRY.check_options(entry, chosen)
        return as_reward(entry.factory(**chosen), entry.info)
    reward = as_reward(spec)
    if options:
        raise ValueError(
            f"reward {reward.info.name!r} is already built and takes no options, "
            f"but {', '.join(options)} came"
        )
    return reward


def available_rewards() -> dict[str, RewardInfo]:
    """Every registered reward by name, sorted; builds none. Loads the plugins."""
    return REGISTRY.available()


def find_reward(name: str) -> Entry:
    """The registry's entry of a name.

    Raises:
        ValueError: there is none; the message lists near matches.
    """
    return REGISTRY.find(name)

"""One reward on another scale: relative to reference scores, clipped, or standardised.

Reference scores are of samples of a model that stays as it is, such as the base model, and are
measured once: :func:`fit` and :func:`fit_reference` do it, and what they give goes into the
reward's options or a JSON file. How a transform composes with other rewards, and what it says of
itself, is in :mod:`.combine`.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards.base import RewardSpec, Scores, evaluate, make_reward, register_reward
from diffreward.rewards.combine import (
    Combined,
    Number,
    build_members,
    combined_info,
    finite_number,
    positive_number,
)
from diffreward.samples import Samples

References = Number | Sequence[Number] | Mapping[str, Number | Sequence[Number]] | str | Path

_ENTRY = dict(licence="Apache-2.0; the members have their own")

# --------------------------------------------------------------------------------------------
# The transforms
# --------------------------------------------------------------------------------------------


@register_reward("log_sigmoid", source="Wang et al. 2024 (LSC), arXiv:2402.00742", **_ENTRY)
def log_sigmoid(
    reward: RewardSpec, reference: Number | Mapping[str, Number] | str | Path, scale: Number = 1.0
) -> Combined:
    """log sigmoid((reward - reference) * scale), at most 0: the log-probability of being good.

    Linear far below the reference, saturated above: improving what is bad counts for more than
    improving what is good. The sum of several is a logical AND: the log-probability that all the
    properties hold, if each holds by itself with probability sigmoid(...).

    ``std`` is to first order.

    Args:
        reward: spec.
        reference: score of an ordinary good sample, as of the base model: a number; a mapping
            from prompt to number; or the path of a JSON file with either
            (:func:`fit_reference` makes them).
        scale: above zero, per unit of the reward.

    Raises:
        ValueError: a number that is none; when called, a prompt without reference.
    """
    lookup = _References(reference, "log_sigmoid", several=False)
    scale = positive_number(scale, "log_sigmoid: scale")

    def join(scores: list[Scores], samples: Samples) -> tuple[Tensor, Tensor | None]:
        (member,) = scores
        z = (member.value - lookup(samples, member.value)[:, 0]) * scale
        std = None if member.std is None else member.std * scale * torch.sigmoid(-z)
        return F.logsigmoid(z), std

    def at(end: Number, references: list[float]) -> float:
        return F.logsigmoid(torch.tensor((end - references[0]) * scale)).item()

    return _transformed("log_sigmoid", reward, join, at, lookup)


@register_reward("par", source="Fu et al. 2025 (PAR), arXiv:2502.18770", **_ENTRY)
def par(reward: RewardSpec, references: References, k: Number = 1.0) -> Combined:
    """Preference as reward: the mean over references of sigmoid(k * (reward - reference)).

    The modelled probability that the sample beats one of the reference samples, in [0, 1]; it
    saturates at both ends. -inf becomes 0, the worst there is: the constraint is softened.

    ``std`` is to first order.

    Args:
        reward: spec.
        references: scores of reference samples, as of the base model: a number or a list of
            them; a mapping from prompt to either; or the path of a JSON file with one of these.
            The paper takes up to 10 and finds that one suffices.
        k: steepness, above zero, per unit of the reward. The paper's is 1.

    Raises:
        ValueError: a number that is none; when called, a prompt without references.
    """
    lookup = _References(references, "par", several=True)
    k = positive_number(k, "par: k")

    def join(scores: list[Scores], samples: Samples) -> tuple[Tensor, Tensor | None]:
        (member,) = scores
        references = lookup(samples, member.value)  # (b, m), NaN where a prompt has fewer
        there = ~references.isnan()
        z = k * (member.value[:, None] - references.nan_to_num())
        wins = torch.where(there, torch.sigmoid(z), 0.0)
        value = wins.sum(dim=1) / there.sum(dim=1)
        if member.std is None:
            return value, None
        slope = k * (wins * torch.sigmoid(-z)).sum(dim=1) / there.sum(dim=1)
        return value, member.std * slope

    def at(end: Number, references: list[float]) -> float:
        z = k * (end - torch.tensor(references))
        return torch.sigmoid(z).mean().item()

    return _transformed("par", reward, join, at, lookup)


@register_reward("clip_range", source="this package", **_ENTRY)
def clip_range(
    reward: RewardSpec, low: Number | None = None, high: Number | None = None
) -> Combined:
    """The reward, not below ``low`` and not above ``high``; outside, its gradient is zero.

    -inf becomes ``low``, if that is given: the constraint is softened. ``std`` is an upper bound:
    the reward's, as clipping brings no two values further apart, and at most half of
    ``high - low``, as nothing within an interval spreads more.

    Args:
        reward: spec.
        low, high: the bounds; at least one.

    Raises:
        ValueError: no bounds, or ``low`` is not below ``high``.
    """
    if low is None and high is None:
        raise ValueError("clip_range needs low, high, or both")
    bottom = -math.inf if low is None else finite_number(low, "clip_range: low")
    top = math.inf if high is None else finite_number(high, "clip_range: high")
    if bottom >= top:
        raise ValueError(f"clip_range: low must be below high, but {low} and {high} came")

    def join(scores: list[Scores], samples: Samples) -> tuple[Tensor, Tensor | None]:
        (member,) = scores
        std = None if member.std is None else member.std.clamp(max=(top - bottom) / 2)
        return member.value.clamp(bottom, top), std

    return _transformed("clip_range", reward, join, lambda end, _: min(max(end, bottom), top))


@register_reward("standardize", source="this package", **_ENTRY)
def standardize(
    reward: RewardSpec,
    mean: Number | None = None,
    std: Number | None = None,
    statistics: str | Path | None = None,
) -> Combined:
    """(reward - mean) / std, with the mean and std of reference scores, which stay as they are.

    Statistics that followed the samples would forgive a drift of the model, and make a score
    depend on its batch. :func:`fit` measures them once.

    Args:
        reward: spec.
        mean, std: of the reference scores.
        statistics: instead, the path of a JSON file with "mean" and "std".

    Raises:
        ValueError: neither or both were given, or std is not above zero.
        FileNotFoundError: there is no such file.
    """
    if (statistics is None) == (mean is None and std is None):
        raise ValueError("standardize needs either mean and std, or statistics, a JSON file")
    if statistics is not None:
        found = _read_json(statistics)
        if not isinstance(found, dict) or not {"mean", "std"} <= found.keys():
            raise ValueError(f"{statistics} is no JSON object with 'mean' and 'std'")
        mean, std = found["mean"], found["std"]
    centre = finite_number(mean, "standardize: mean")
    unit = positive_number(std, "standardize: std")

    def join(scores: list[Scores], samples: Samples) -> tuple[Tensor, Tensor | None]:
        (member,) = scores
        spread = None if member.std is None else member.std / unit
        return (member.value - centre) / unit, spread

    return _transformed("standardize", reward, join, lambda end, _: (end - centre) / unit)


def _transformed(
    kind: str,
    reward: RewardSpec,
    join: Callable[[list[Scores], Samples], tuple[Tensor, Tensor | None]],
    at: Callable[[Number, list[float]], Number],
    references: "_References | None" = None,
) -> Combined:
    """A monotone transform of one reward; ``at`` maps an end of its range."""
    members = build_members([reward], kind)
    low, high = members[next(iter(members))].info.range
    table = list(references.table.values()) if references else [[]]
    range = min(at(low, entry) for entry in table), max(at(high, entry) for entry in table)
    by_prompt = references is not None and references.by_prompt
    info = combined_info(kind, members, range, needs_prompt=by_prompt)
    return Combined(info, members, join)


# --------------------------------------------------------------------------------------------
# Reference scores
# --------------------------------------------------------------------------------------------


def fit(reward: RewardSpec, samples: Samples | Iterable[Samples]) -> dict[str, float]:
    """Mean and (unbiased) std of a reward on reference samples, for :func:`standardize`.

    ::

        make_reward({"standardize": {"reward": "clip_score", **fit("clip_score", samples)}})
        Path("clip.json").write_text(json.dumps(fit("clip_score", samples)))

    Args:
        reward: spec.
        samples: one or several batches of the reference model's samples.

    Raises:
        ValueError: fewer than two samples, all scores are the same, or one is -inf.
    """
    value = _score_all(reward, samples)[0]
    std = value.std().item() if len(value) > 1 else 0.0
    if not std > 0:
        raise ValueError(f"{len(value)} reference scores, all {value[0].item()}, have no spread")
    return {"mean": value.mean().item(), "std": std}


def fit_reference(
    reward: RewardSpec, samples: Samples | Iterable[Samples], quantile: float = 0.5
) -> dict[str, float]:
    """Prompt -> a quantile of its reference samples' scores, for :func:`log_sigmoid` and `par`.

    Args:
        reward: spec.
        samples: one or several batches of the reference model's samples, with prompts; best
            several samples a prompt.
        quantile: in [0, 1]; 0.5 is the median.

    Raises:
        ValueError: samples without prompts, or a score of -inf.
    """
    value, prompts = _score_all(reward, samples)
    if prompts is None:
        raise ValueError("fit_reference needs samples with prompts; fit() is for those without")
    return {
        prompt: value[[p == prompt for p in prompts]].quantile(quantile).item()
        for prompt in dict.fromkeys(prompts)
    }


def _score_all(reward: RewardSpec, samples: Samples | Iterable[Samples]):
    """Scores (n,) in float64, and the prompts, of one or several batches."""
    reward, values, prompts = make_reward(reward), [], []
    for batch in [samples] if isinstance(samples, Samples) else samples:
        with torch.no_grad():
            values.append(evaluate(reward, batch).value.double().cpu())
        prompts.extend([None] * len(batch) if batch.prompts is None else batch.prompts)
    if not values:
        raise ValueError(f"reward {reward.info.name!r} was given no reference samples")
    value = torch.cat(values)
    dead = value == -math.inf
    if dead.any():
        raise ValueError(
            f"reward {reward.info.name!r} gave -inf to {int(dead.sum())} of {len(value)} reference "
            f"samples, first to number {int(dead.nonzero()[0, 0])}: leave these out"
        )
    return value, None if None in prompts else prompts


class _References:
    """Reference scores, the same for all samples or by prompt.

    Called with the samples and their values, gives ``(b, m)`` in the values' dtype; where one
    prompt has fewer references than another, NaN.
    """

    def __init__(self, given: References, who: str, several: bool) -> None:
        if isinstance(given, str | Path):
            given = _read_json(given)
        self.who = who
        self.by_prompt = isinstance(given, Mapping)
        table = given if self.by_prompt else {"": given}
        if not table:
            raise ValueError(f"{who}: the references are empty")
        self.table = {prompt: self._numbers(entry, several) for prompt, entry in table.items()}

    def _numbers(self, entry: object, several: bool) -> list[float]:
        many = isinstance(entry, Sequence) and not isinstance(entry, str)
        if many and not (several and entry):
            expected = "one number or more" if several else "one number"
            raise ValueError(f"{self.who}: a reference is {expected}, but {entry!r} came")
        return [finite_number(n, f"{self.who}: a reference") for n in (entry if many else [entry])]

    def __call__(self, samples: Samples, value: Tensor) -> Float[Tensor, "b m"]:
        if not self.by_prompt:
            return value.new_tensor(self.table[""]).expand(len(value), -1)
        for i, prompt in enumerate(samples.prompts):
            if prompt not in self.table:
                raise ValueError(
                    f"{self.who} has no reference for the prompt of sample {i}, {prompt!r}, only "
                    f"for {len(self.table)} others"
                )
        rows = [value.new_tensor(self.table[prompt]) for prompt in samples.prompts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.nan)


def _read_json(path: str | Path) -> object:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path} is no JSON file: {err}") from err

"""Rewards that know how unsure they are: K opinions on each sample, their std and a cautious value.

symbol    code                  meaning
r_k       a row of ``values``   opinion k on a sample, k = 1 .. K
r, s      mean, ``Scores.std``  their mean and unbiased (K - 1) standard deviation
r~        ``Scores.value``      their aggregate, see :class:`~diffreward.rewards.combine.Aggregate`

Where the opinions come from: several rewards (``members``), one reward on images slightly changed
(``tta``) or with its dropout on (``dropout``; Gal & Ghahramani 2016, arXiv:1506.02142), or one
reward on two predictions of the same sample from neighbouring noise levels (``two_timesteps``;
Ctrl-U, arXiv:2410.11236).

Low uncertainty certifies nothing: all opinions may share an error. ``two_timesteps`` also measures
how much the sample changed, not only how unsure the reward is.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffreward.rewards.base import (
    Reward,
    RewardInfo,
    RewardSpec,
    Scores,
    evaluate,
    register_reward,
)
from diffreward.rewards.combine import (
    Aggregate,
    Combined,
    Number,
    build_members,
    combined_info,
    member_parts,
)
from diffreward.rewards.towers import share_towers
from diffreward.samples import Samples

SOURCES = ("members", "tta", "dropout", "two_timesteps")
SECOND = "second_prediction"

Opinions = tuple[dict[str, Scores], dict[str, Scores]]
"""K scores by name, and others which are only reported."""


@register_reward(
    "uncertain",
    licence="Apache-2.0; the members have their own",
    source="this package; aggregates after Coste et al. 2023, arXiv:2310.02743",
)
def uncertain(
    reward: RewardSpec | Sequence[RewardSpec],
    source: str = "members",
    aggregate: str = "softmin",
    *,
    beta: Number = 0.1,
    lam: Number = 0.5,
    kappa: Number = 1.0,
    augmentations: Sequence[str] | None = None,
    num_passes: int = 8,
    seed: int = 0,
) -> "Combined | Uncertain":
    """A cautious reward: K opinions on each sample, aggregated, with their std.

    ``Scores.parts`` holds each opinion. With identical opinions, the value is exactly that opinion
    and the std 0. Gradients flow through the value and the std.

    Args:
        reward: spec; for ``source="members"`` a list of two or more, in the same units.
        source: ``"members"``: each reward of the list. ``"tta"``: the reward on the image as it
            is and on each of ``augmentations`` of it. ``"dropout"``: the reward with the dropout
            layers of its networks on, ``num_passes`` times, with the same masks for every sample
            and call. ``"two_timesteps"``: the reward on the sample, and on another prediction of
            it in ``Samples.context["second_prediction"]``, of the same shape.
        aggregate: softmin, lcb, mean, min or mean_minus_variance.
        beta: of softmin, in units of the reward; 1 / lambda is consistent with steering, whose
            default lambda is 10.
        lam: of mean_minus_variance.
        kappa: of lcb, how many stds below the mean.
        augmentations: names from :data:`AUGMENTATIONS`; by default all.
        num_passes: of dropout, 2 or more.
        seed: of the dropout masks.

    Raises:
        ValueError: an unknown source, aggregate or augmentation; fewer than two opinions, since
            one says nothing about its uncertainty; a number out of range; tta of a reward that
            does not score images; dropout of a reward in which no dropout layer is found.
    """
    how = Aggregate(aggregate, beta, lam, kappa)
    if source not in SOURCES:
        raise ValueError(f"source is one of {', '.join(SOURCES)}, but {source!r} came")
    if source == "members":
        members = build_members(reward, "uncertain with source='members'", at_least=2)
        ranges = [member.info.range for member in members.values()]
        info = combined_info(f"{aggregate}_{source}", members, how.range(ranges))
        return Combined(info, members, how.join)
    members = build_members([reward], "uncertain")
    (base,) = members.values()
    if source == "tta":
        names = _augmentations(augmentations, base.info)
        opinions, count = functools.partial(_augmented, base, names), 1 + len(names)
    elif source == "dropout":
        layers = dropout_layers(base, f"reward {base.info.name!r}", num_passes)
        opinions = functools.partial(_dropped, base, layers, num_passes, seed)
        count = num_passes
    else:
        opinions, count = functools.partial(_two_timesteps, base), 2
    info = combined_info(
        f"{aggregate}_{source}",
        members,
        how.range([base.info.range] * count),
        needs_context=(SECOND,) if source == "two_timesteps" else (),
    )
    if source == "tta" and info.modality is None:
        info = dataclasses.replace(info, modality="image")
    return Uncertain(info, members, opinions, how)


@dataclass(frozen=True, eq=False)
class Uncertain:
    """A reward made of K opinions of one other; :func:`uncertain` makes them.

    Attributes:
        info: what it needs and gives.
        members: the reward asked, by name.
        opinions: samples -> K scores by name, and others by name which are only reported.
        aggregate: how the opinions become one value.
    """

    info: RewardInfo
    members: dict[str, Reward]
    opinions: Callable[[Samples], Opinions]
    aggregate: Aggregate

    def __call__(self, samples: Samples) -> Scores:
        with share_towers():
            opinions, others = self.opinions(samples)
        value, std = self.aggregate(torch.stack([scores.value for scores in opinions.values()]))
        return Scores(value, std, member_parts({**others, **opinions}))


def _two_timesteps(reward: Reward, samples: Samples) -> Opinions:
    second, first = samples.context[SECOND], samples.data
    if isinstance(first, Tensor) and getattr(second, "shape", None) != first.shape:
        raise ValueError(
            f"the second prediction must be of the samples' shape {tuple(first.shape)}, but "
            f"{tuple(second.shape) if isinstance(second, Tensor) else type(second).__name__} came"
        )
    opinions = {
        "first": evaluate(reward, samples),
        "second": evaluate(reward, dataclasses.replace(samples, data=second)),
    }
    return opinions, {}


# --------------------------------------------------------------------------------------------
# Test-time augmentation
# --------------------------------------------------------------------------------------------


def _flip(images: Tensor) -> Tensor:
    return images.flip(-1)


def _shift(images: Tensor) -> Tensor:
    h, w = images.shape[-2:]
    down, right = _margin(h), _margin(w)
    return F.pad(images, (right, 0, down, 0), mode="replicate")[..., :h, :w]


def _crop(images: Tensor) -> Tensor:
    h, w = images.shape[-2:]
    down, right = min(_margin(h), (h - 1) // 2), min(_margin(w), (w - 1) // 2)
    inside = images[..., down : h - down, right : w - right]
    return F.interpolate(inside, size=(h, w), mode="bilinear", antialias=True)


def _margin(side: int) -> int:
    return max(1, round(side / 32))


def _brighter(images: Tensor) -> Tensor:
    return (1.1 * images).clamp(max=1)


def _darker(images: Tensor) -> Tensor:
    return 0.9 * images


AUGMENTATIONS: dict[str, Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b 3 h w"]]] = {
    "flip": _flip,
    "shift": _shift,
    "crop": _crop,
    "brighter": _brighter,
    "darker": _darker,
}
"""Name -> a change that should not change the score; the size stays, gradients flow.

``flip``: left and right exchanged; leave it out where the prompts speak of sides or of writing.
``shift``: down and right by 1/32 of the side, at least a pixel; the edge is repeated. ``crop``:
1/32 off each side, and back to the size, bilinearly. ``brighter``, ``darker``: pixels times 1.1
(at most 1) and 0.9.
"""


def _augmentations(names: Sequence[str] | None, info: RewardInfo) -> tuple[str, ...]:
    if info.modality not in (None, "image"):
        raise ValueError(
            f"tta changes images, but {info.name!r} scores {info.modality}; use source='members' "
            "or 'dropout'"
        )
    names = tuple(AUGMENTATIONS if names is None else names)
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"augmentations are one or more different of {', '.join(AUGMENTATIONS)}, but "
            f"{list(names)} came"
        )
    return names


def _augmented(reward: Reward, names: Sequence[str], samples: Samples) -> Opinions:
    opinions = {"plain": evaluate(reward, samples)}
    for name in names:
        changed = dataclasses.replace(samples, data=AUGMENTATIONS[name](samples.data))
        opinions[name] = evaluate(reward, changed)
    return opinions, {}


# --------------------------------------------------------------------------------------------
# Dropout
# --------------------------------------------------------------------------------------------


def dropout_layers(holder: Any, who: str, num_passes: int) -> list[nn.Module]:
    """The dropout layers of the networks that something holds.

    Args:
        holder: see `networks_in`.
        who: what messages call it.
        num_passes: how often they will be on.

    Raises:
        ValueError: there is none with p above 0, or fewer than two passes.
    """
    if num_passes < 2:
        raise ValueError(f"num_passes must be 2 or more to have a spread, but {num_passes} came")
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    layers: dict[nn.Module, None] = {}  # a network may be found twice
    for network in networks_in(holder):
        layers.update(dict.fromkeys(m for m in network.modules() if isinstance(m, kinds)))
    found = [layer for layer in layers if 0 < layer.p < 1]
    if not found:
        raise ValueError(
            f"{who} has no dropout layer with p above 0 that could be turned on; use "
            "source='tta' or 'members'"
        )
    return found


def networks_in(holder: Any) -> list[nn.Module]:
    """The modules which something holds, in its attributes and what its functions close over."""
    networks, seen, todo = [], set(), [holder]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, Tensor | type | str | bytes):
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            networks.append(thing)
        elif isinstance(thing, Mapping):
            todo.extend(thing.values())
        elif isinstance(thing, list | tuple):
            todo.extend(thing)
        elif isinstance(thing, functools.partial):
            todo.extend([thing.func, *thing.args, *thing.keywords.values()])
        else:
            todo.append(getattr(thing, "__self__", None))  # of a method
            if isinstance(thing, FunctionType):
                todo.extend(inspect.getclosurevars(thing).nonlocals.values())
            todo.extend(getattr(thing, "__dict__", {}).values())
    return networks


def _dropped(
    reward: Reward, layers: list[nn.Module], num_passes: int, seed: int, samples: Samples
) -> Opinions:
    """Each sample by itself, as a batch of ``num_passes`` copies that differ in their masks.

    The masks begin anew with each sample, so that they depend neither on the others in the batch
    nor on its place in it, however the reward splits its batches; and a difference between two
    samples is not one of masks.
    """
    plain, passes = [], []
    for i in range(len(samples)):
        # Without dropout first: what the reward remembers of a prompt must not have it.
        plain.append(_evaluate_copies(reward, samples, i, 1))
        with dropout_on(layers, torch.Generator().manual_seed(seed)):
            passes.append(_evaluate_copies(reward, samples, i, num_passes))
    opinions = {
        f"pass {k + 1}": Scores.cat([copies.take([k]) for copies in passes])
        for k in range(num_passes)
    }
    return opinions, {"plain": Scores.cat(plain)}


def _evaluate_copies(reward: Reward, samples: Samples, i: int, copies: int) -> Scores:
    try:
        return evaluate(reward, samples.take([i] * copies))
    except ValueError as err:
        raise ValueError(f"sample {i}, as a batch of {copies} by itself: {err}") from err


@contextmanager
def dropout_on(
    layers: list[nn.Module], generator: torch.Generator, shared: bool = False
) -> Iterator[None]:
    """Dropout by hooks: the networks stay in eval mode, and no global random state is touched.

    Args:
        layers: see `dropout_layers`.
        generator: of the masks, on the CPU.
        shared: all rows of a batch have the same mask.
    """

    def drop(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        shape = (1, *output.shape[1:]) if shared else output.shape
        if not isinstance(layer, nn.Dropout):  # whole channels
            shape = (*shape[:2], *(1 for _ in shape[2:]))
        # drawn on the CPU, so that the masks are the same on every device
        keep = torch.rand(shape, generator=generator) >= layer.p
        return output * (keep.to(output.device) / (1 - layer.p)).to(output.dtype)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(drop).remove)
        yield

"""Condition rewards: how well a picture keeps the condition that it was generated from.

After ControlNet++ (Li et al. 2024, arXiv:2404.07987): what a picture was conditioned on is read off
it again by an :mod:`extractor <.extractors>`, and compared with the control image in
``Samples.context["control"]``, pixel by pixel. The reward is minus the mean loss. How unsure the
reading is, is told by several of them (:meth:`ControlReward.opinions`), as Ctrl-U (Zhang et al.
2024, arXiv:2410.11236) asks.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards import extractors_analytic, extractors_learnt  # noqa: F401  (registered)
from diffreward.rewards.base import RewardInfo, Scores, register_reward
from diffreward.rewards.combine import distinct, safe_sqrt
from diffreward.rewards.extractors import (
    Extractor,
    ExtractorSpec,
    available_extractors,
    make_extractor,
    register_extractor,
)
from diffreward.rewards.extractors_learnt import IGNORED
from diffreward.rewards.uncertainty import dropout_layers, dropout_on
from diffreward.samples import Samples

__all__ = [
    "AUGMENTATIONS",
    "ControlReward",
    "Extractor",
    "available_extractors",
    "make_extractor",
    "read_control",
    "register_extractor",
]

CONTROL = "control"
SOURCES = ("members", "tta", "dropout")

_INFO = dict(
    modality="image",
    differentiable=True,
    needs_context=(CONTROL,),
    range=(-math.inf, 0.0),
    licence="Apache-2.0; a model has its own",
    source="Li et al. 2024 (ControlNet++), arXiv:2404.07987",
)

# --------------------------------------------------------------------------------------------
# Control images
# --------------------------------------------------------------------------------------------


def read_control(samples: Samples, who: str) -> Float[Tensor, "b 3 h w"]:
    """The samples' control images, checked, on the device and in the dtype of the pictures.

    Args:
        samples: pictures with ``context["control"]``, ``(b, 1 or 3, h, w)`` in [0, 1].
        who: what messages call the one that asks.

    Raises:
        ValueError: it is missing, no tensor of that shape, of another size than the pictures, or
            not in [0, 1].
    """
    control, images = samples.context.get(CONTROL), samples.data
    if control is None:
        raise ValueError(
            f"{who} compares pictures with the control images they were generated from: pass "
            f"Samples(..., context={{'control': (b, 3, h, w)}}); there is "
            f"{', '.join(samples.context) or 'nothing'}"
        )
    if not isinstance(control, Tensor) or control.ndim != 4 or control.shape[1] not in (1, 3):
        came = tuple(control.shape) if isinstance(control, Tensor) else type(control).__name__
        raise ValueError(
            f"{who} takes control images with 1 or 3 channels, ({len(samples)}, 3, h, w), but "
            f"{came} came"
        )
    if control.shape[-2:] != images.shape[-2:]:
        raise ValueError(
            f"{who} compares pictures with control images of their size, but the pictures are "
            f"{_by(images)} and the control images {_by(control)}; resize one of them (classes "
            "without interpolation)"
        )
    low, high = control.amin().item(), control.amax().item()
    if not control.is_floating_point() or not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"{who} takes control images in [0, 1], but {control.dtype} from {low:g} to {high:g} "
            "came; divide uint8 images by 255, or add 1 to [-1, 1] and divide by 2"
        )
    return control.detach().to(images).expand(-1, 3, -1, -1)


def _by(images: Tensor) -> str:
    return f"{images.shape[-2]}x{images.shape[-1]}"


# --------------------------------------------------------------------------------------------
# The reward
# --------------------------------------------------------------------------------------------


class ControlReward:
    """Minus the mean loss between what is read off a picture and its control image.

    Of several extractors, minus the mean of their losses, with their std as ``Scores.std`` and each
    as one of ``parts``.

    Args:
        extractor: what `make_extractor` takes, or a list of it: an ensemble of one kind.
        name: what the reward is called; by default ``control_`` and the extractor's name.
        num_passes: of the source dropout, 2 or more.
        seed: of the dropout masks.

    Attributes:
        info: what it needs and gives.
        members: the extractors, one or more; the first is the one that :meth:`extract` asks, and
            from which opinions are measured.

    Raises:
        ValueError: no extractor, or extractors of different kinds; see also `make_extractor`.
    """

    def __init__(
        self,
        extractor: ExtractorSpec | Sequence[ExtractorSpec],
        *,
        name: str | None = None,
        num_passes: int = 4,
        seed: int = 0,
    ) -> None:
        specs = extractor if isinstance(extractor, list | tuple) else [extractor]
        if not specs:
            raise ValueError("a condition reward needs one extractor or more, but none came")
        self.members = [make_extractor(spec) for spec in specs]
        self.num_passes, self.seed = num_passes, seed
        first = self.members[0]
        for member in self.members[1:]:
            if _kind(member) != _kind(first):
                raise ValueError(
                    f"an ensemble is of extractors of one kind, but {first.name!r} and "
                    f"{member.name!r} came, which differ in their kind, channels or palette"
                )
        weights = [w for w in (getattr(m, "weights", None) for m in self.members) if w]
        self.info = RewardInfo(
            name=name or f"control_{first.name}",
            **_INFO
            | {
                "differentiable": all(member.differentiable for member in self.members),
                "weights": " + ".join(weights) or None,
                "description": f"minus the loss of {first.name} against the control image",
            },
        )

    def __call__(self, samples: Samples) -> Scores:
        target = self.target(samples)
        maps = self.loss_maps(self.read(samples.data), target)
        losses: dict[str, Tensor] = {}
        for member, each in zip(self.members, maps, strict=True):
            losses[distinct(member.name, losses)] = self.mean(each, target)
        if len(losses) == 1:
            (loss,) = losses.values()
            return Scores(-loss)
        all_of_them = torch.stack(list(losses.values()))
        std = safe_sqrt(all_of_them.var(dim=0))
        return Scores(-all_of_them.mean(dim=0), std, {n: -loss for n, loss in losses.items()})

    def target(self, samples: Samples) -> Tensor:
        """What predictions are compared with, read off the samples' control images.

        Raises:
            ValueError: see `read_control`.
        """
        return self.members[0].target(read_control(samples, f"reward {self.info.name!r}"))

    def extract(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """The first extractor's prediction.

        Raises:
            ValueError: it declares a gradient to the pictures and gives none.
        """
        return self._read(self.members[0], images)

    def read(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c h w"]]:
        """Every member's prediction; the first is :meth:`extract`'s.

        Raises:
            ValueError: see :meth:`extract`.
        """
        return [self._read(member, images) for member in self.members]

    def opinions(
        self, images: Float[Tensor, "b 3 h w"], source: str
    ) -> list[Float[Tensor, "b c h w"]]:
        """Several predictions of the same pictures; the first is :meth:`extract`'s.

        Args:
            images: b pictures.
            source: ``"members"``: one of each extractor. ``"tta"``: of the pictures changed as the
                extractor's ``augmentations`` say, mapped back. ``"dropout"``: with the network's
                dropout layers on, ``num_passes`` times, with the same masks for every picture and
                call.

        Raises:
            ValueError: another source; members of a single extractor; dropout without a dropout
                layer.
        """
        if source not in SOURCES:
            raise ValueError(f"source is one of {', '.join(SOURCES)}, but {source!r} came")
        first = self.members[0]
        if source == "members":
            if len(self.members) < 2:
                raise ValueError(
                    f"reward {self.info.name!r} has one extractor, which says nothing about its "
                    "uncertainty: give a list of them, or use source='tta'"
                )
            return self.read(images)
        plain = self._read(first, images)
        if source == "tta":
            names = getattr(first, "augmentations", tuple(AUGMENTATIONS))
            return [plain, *(AUGMENTATIONS[name](self._read, first, images, plain)
                             for name in names)]  # fmt: skip
        layers = dropout_layers(first, f"extractor {first.name!r}", self.num_passes)
        with dropout_on(layers, torch.Generator().manual_seed(self.seed), shared=True):
            return [plain, *(self._read(first, images) for _ in range(self.num_passes))]

    def loss_maps(
        self, predictions: Sequence[Float[Tensor, "b c h w"]], target: Tensor
    ) -> list[Float[Tensor, "b h w"]]:
        """The loss of each prediction of :meth:`read` at each pixel, not negative."""
        return [m.loss(each, target) for m, each in zip(self.members, predictions, strict=True)]

    def divergence(
        self, second: Float[Tensor, "b c h w"], first: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b h w"]:
        """How much predictions differ at each pixel: KL(second || first), or |second - first|."""
        return self.members[0].divergence(second, first)

    def mean(self, maps: Float[Tensor, "b h w"], target: Tensor) -> Float[Tensor, " b"]:
        """Mean over the pixels that count; 0 where none does."""
        if target.is_floating_point():
            return maps.flatten(1).mean(dim=1)
        counts = (target != IGNORED).flatten(1)
        total = maps.flatten(1).masked_fill(~counts, 0).sum(dim=1)
        return total / counts.sum(dim=1).clamp(min=1)

    def to(self, device: torch.device | str) -> "ControlReward":
        """Move the networks; a call does this by itself to where its samples are."""
        for member in self.members:
            if hasattr(member, "to"):
                member.to(device)
        return self

    def _read(self, member: Extractor, images: Tensor) -> Tensor:
        prediction = member(images)
        asked = torch.is_grad_enabled() and images.requires_grad and member.differentiable
        if asked and not prediction.requires_grad:
            raise ValueError(
                f"extractor {member.name!r} declares a gradient, but its prediction has none: its "
                "model cuts it, as no_grad, detach and casts to integers do"
            )
        return prediction


def _kind(extractor: Extractor) -> tuple:
    palette = getattr(extractor, "palette", None)
    colours = None if palette is None else tuple(palette.flatten().tolist())
    return extractor.channels, extractor.probabilistic, type(extractor), colours


# --------------------------------------------------------------------------------------------
# Test-time augmentation
# --------------------------------------------------------------------------------------------


def _flip(read: Callable, extractor: Extractor, images: Tensor, plain: Tensor) -> Tensor:
    back = getattr(extractor, "unflip", lambda prediction: prediction.flip(-1))
    return back(read(extractor, images.flip(-1)))


def _darker(read: Callable, extractor: Extractor, images: Tensor, plain: Tensor) -> Tensor:
    return read(extractor, 0.95 * images)


def _brighter(read: Callable, extractor: Extractor, images: Tensor, plain: Tensor) -> Tensor:
    return read(extractor, (1.05 * images).clamp(max=1))


def _shift(read: Callable, extractor: Extractor, images: Tensor, plain: Tensor) -> Tensor:
    moved = torch.cat([images[..., :1, :], images[..., :-1, :]], dim=-2)
    moved = torch.cat([moved[..., :1], moved[..., :-1]], dim=-1)
    found = read(extractor, moved)[..., 1:, 1:]
    found = torch.cat([found, plain[..., :-1, -1:]], dim=-1)
    return torch.cat([found, plain[..., -1:, :]], dim=-2)


AUGMENTATIONS: dict[str, Callable] = {
    "flip": _flip,
    "darker": _darker,
    "brighter": _brighter,
    "shift": _shift,
}
"""Name -> the prediction of changed pictures, mapped back to the pictures as they are.

``flip``: left and right exchanged. ``darker``, ``brighter``: pixels times 0.95, and 1.05 (at most
1). ``shift``: a pixel down and right, the edge repeated; the row and column that leave the picture
keep the plain prediction.
"""


# --------------------------------------------------------------------------------------------
# The registered ones
# --------------------------------------------------------------------------------------------


@register_reward("control", **_INFO | {"differentiable": None})
def control_reward(
    extractor: ExtractorSpec | Sequence[ExtractorSpec], num_passes: int = 4, seed: int = 0
) -> ControlReward:
    """Minus the loss of any extractor, or of an ensemble, against the control image.

    Args:
        extractor, num_passes, seed: see :class:`ControlReward`.
    """
    return ControlReward(extractor, num_passes=num_passes, seed=seed)


def _made(kind: str, num_passes: int, seed: int, **options: object) -> ControlReward:
    """A reward of an extractor; of as many as there are models, where several are given."""
    models = options.get("model")
    if isinstance(models, list | tuple):
        specs = [{"name": kind, **options, "model": model} for model in models]
    else:
        specs = [{"name": kind, **options}]
    name = f"control_{kind}"
    return ControlReward(specs, name=name, num_passes=num_passes, seed=seed)


@register_reward("control_edges", **_INFO)
def control_edges(
    model: object = None, num_passes: int = 4, seed: int = 0, **options: object
) -> ControlReward:
    """Minus the loss of soft edges against the control image.

    Args:
        model: as of the extractor `edges`, or a list of models: an ensemble.
        num_passes, seed: see :class:`ControlReward`.
        **options: the extractor's others.
    """
    return _made("edges", num_passes, seed, model=model, **options)


@register_reward("control_canny", **_INFO)
def control_canny(num_passes: int = 4, seed: int = 0, **options: object) -> ControlReward:
    """Minus the loss of soft thin edges against the control image; options as of `canny`."""
    return _made("canny", num_passes, seed, **options)


@register_reward("control_lineart", **_INFO)
def control_lineart(
    model: object = None, num_passes: int = 4, seed: int = 0, **options: object
) -> ControlReward:
    """Minus the loss of lines against the control image.

    Args:
        model: as of the extractor `lineart`, or a list of models: an ensemble.
        num_passes, seed: see :class:`ControlReward`.
        **options: the extractor's others.
    """
    return _made("lineart", num_passes, seed, model=model, **options)


@register_reward("control_segmentation", **_INFO)
def control_segmentation(
    model: object = "shapes_colours", num_passes: int = 4, seed: int = 0, **options: object
) -> ControlReward:
    """Minus the cross-entropy of pixels' classes against the control image's.

    Args:
        model: as of the extractor `segmentation`, or a list of models: an ensemble.
        num_passes, seed: see :class:`ControlReward`.
        **options: the extractor's others.
    """
    return _made("segmentation", num_passes, seed, model=model, **options)


@register_reward("control_depth", weights="a depth model, to be named", **_INFO)
def control_depth(
    model: object, num_passes: int = 4, seed: int = 0, **options: object
) -> ControlReward:
    """Minus the difference of depth, up to scale and shift, from the control image's.

    Args:
        model: as of the extractor `depth`, or a list of models: an ensemble.
        num_passes, seed: see :class:`ControlReward`.
        **options: the extractor's others.
    """
    return _made("depth", num_passes, seed, model=model, **options)


@register_reward("control_luma", **_INFO)
def control_luma(
    cells: int = 8, num_passes: int = 4, seed: int = 0, **options: object
) -> ControlReward:
    """Minus the loss of the coarse luma against the control image's.

    Args:
        cells: rows and columns of the grid over whose cells luma is averaged.
        num_passes, seed: see :class:`ControlReward`.
        **options: the extractor's others.
    """
    return _made("luma", num_passes, seed, cells=cells, **options)


@register_reward("control_colour", **_INFO)
def control_colour(
    cells: int = 8, num_passes: int = 4, seed: int = 0, **options: object
) -> ControlReward:
    """Minus the loss of the coarse colours against the control image's; options as control_luma."""
    return _made("colour", num_passes, seed, cells=cells, **options)


@register_reward("control_pose", weights="a pose model, to be named", **_INFO)
def control_pose(
    model: object, num_passes: int = 4, seed: int = 0, **options: object
) -> ControlReward:
    """Minus the difference of key-points' heat-maps from the control image's.

    Args:
        model: as of the extractor `pose`, or a list of models: an ensemble.
        num_passes, seed: see :class:`ControlReward`.
        **options: the extractor's others.
    """
    return _made("pose", num_passes, seed, model=model, **options)

"""Extractors: what a picture was generated from, read off the picture again.

An *extractor* maps pictures to a prediction, a map of numbers (edges, depth, colours) or of logits
(classes), and says how far it is from what a control image shows::

    make_extractor("edges")
    make_extractor({"name": "segmentation", "model": "folder/of/a/segformer"})
    make_extractor({"luma": 4})  # the first option

:mod:`.control` makes rewards of them. Nothing is cast to integers on the way from the pictures to
a prediction; a gradient flows where ``differentiable`` says so. Nothing depends on the other
pictures of a batch. Networks are frozen and in eval mode, and follow the pictures' device.

All sizes are in pixels. Control images are RGB in [0, 1], grey ones with three equal channels.

The extractors themselves are in :mod:`.extractors_analytic` and :mod:`.extractors_learnt`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffreward.rewards.base import _name_of
from diffreward.rewards.combine import Number
from diffreward.rewards.registry import Registry
from diffreward.rewards.towers import _located

Map = Float[Tensor, "b h w"]

# --------------------------------------------------------------------------------------------
# The contract
# --------------------------------------------------------------------------------------------


class Extractor(ABC):
    """Reads a condition off pictures; what is not said here is of maps of values in [0, 1].

    Args:
        distance: how values are compared, ``"mse"`` or ``"l1"``.

    Attributes:
        name: how it is called.
        channels: of the control image before it is made RGB: 1 (grey) or 3.
        differentiable: predictions carry a gradient to the pictures.
        probabilistic: predictions are logits over dim 1.
        augmentations: changes of a picture after which the prediction, mapped back, should be the
            same; names from :data:`diffreward.rewards.control.AUGMENTATIONS`.
        weights: what was loaded; None: it has no weights.
    """

    name: str = ""
    channels: int = 1
    differentiable: bool = True
    probabilistic: bool = False
    augmentations: tuple[str, ...] = ("flip", "darker", "brighter", "shift")
    weights: str | None = None

    def __init__(self, distance: str = "mse") -> None:
        if distance not in ("mse", "l1"):
            raise ValueError(
                f"distance of extractor {self.name!r} is 'mse' or 'l1', but {distance!r} came"
            )
        self.distance = distance

    @abstractmethod
    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """The prediction: values, or logits if probabilistic."""

    def control(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The control image of a picture, in [0, 1]."""
        return self(images).clamp(0, 1).expand(-1, 3, -1, -1)

    def target(self, control: Float[Tensor, "b 3 h w"]) -> Tensor:
        """What a prediction is compared with: values ``(b, c, h, w)``, or labels ``(b, h, w)``."""
        return control.mean(dim=1, keepdim=True) if self.channels == 1 else control

    def loss(self, prediction: Float[Tensor, "b c h w"], target: Tensor) -> Map:
        """How far a prediction is from the target at each pixel; not negative.

        Raises:
            ValueError: the two do not fit together.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"extractor {self.name!r} gave {tuple(prediction.shape)}, but its target is "
                f"{tuple(target.shape)}"
            )
        off = prediction - target
        return (off.abs() if self.distance == "l1" else off.square()).mean(dim=1)

    def divergence(self, second: Float[Tensor, "b c h w"], first: Float[Tensor, "b c h w"]) -> Map:
        """How much two predictions differ at each pixel: the mean of |second - first|."""
        return (second - first).abs().mean(dim=1)

    def unflip(self, prediction: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The prediction of a picture, from that of its mirror image."""
        return prediction.flip(-1)

    def to(self, device: torch.device | str) -> "Extractor":
        """Move the network; a call does this by itself to where its pictures are."""
        return self


@dataclass(frozen=True)
class ExtractorInfo:
    """What is known about an extractor before it is built; fields as in ``RewardInfo``."""

    name: str
    weights: str | None = None
    source: str = ""
    description: str = ""


ExtractorSpec = str | Mapping | Extractor | Callable[[Tensor], Tensor]
"""A name, ``{"name": ..., option: value}`` or ``{NAME: {option: value}}``, an extractor, or a
callable; see :func:`make_extractor`."""

REGISTRY = Registry("an extractor", "make_extractor")
_CONTRACT = ("name", "channels", "differentiable", "probabilistic", "control", "target", "loss",
             "divergence")  # fmt: skip


def register_extractor(name: str, *, overwrite: bool = False, **info: Any) -> Callable:
    """Decorator that enters an extractor's factory in the registry, as ``register_encoder``.

    Args:
        name: how it will be called; case, ``-``, ``_`` and spaces make no difference.
        overwrite: take the place of an entry of this name.
        **info: fields of :class:`ExtractorInfo`.

    Raises:
        ValueError: the name is empty or taken.
        TypeError: an unknown field of ExtractorInfo.
    """
    REGISTRY.key(name)

    def register(factory: Callable) -> Callable:
        REGISTRY.register(
            name, factory, lambda doc: ExtractorInfo(name=name, **{"description": doc, **info}),
            overwrite,
        )  # fmt: skip
        if isinstance(factory, type):
            factory.name = factory.name or name
        return factory

    return register


def available_extractors() -> dict[str, ExtractorInfo]:
    """Every registered extractor by name, sorted; builds none. Loads the rewards' plugins."""
    return REGISTRY.available()


def make_extractor(spec: ExtractorSpec, /, **options: Any) -> Any:
    """Build an extractor.

    Args:
        spec: a registered name; a mapping ``{"name": ..., option: value, ...}``; the same for
            short, ``{NAME: {option: value, ...}}``, or ``{NAME: value}`` for the first option; an
            extractor, or an object with all that one has (returned unchanged); or a callable,
            pictures -> values ``(b, 1, h, w)`` in [0, 1] (``(b, 3, h, w)`` if its attribute
            ``channels`` is 3).
        **options: the extractor's options, as in the mapping.

    Raises:
        ValueError: an unknown name or option (the message lists near matches), a missing option,
            a mapping without a name, or options for something that is already built.
        TypeError: ``spec`` is none of these.
    """
    if isinstance(spec, str | Mapping):
        given = {**REGISTRY.in_full(spec), **options}
        entry = REGISTRY.find(given.pop("name"))
        REGISTRY.check_options(entry, given)
        return entry.factory(**given)
    if not callable(spec) or isinstance(spec, type):
        raise TypeError(
            "an extractor is a name, a mapping, an Extractor or a callable pictures -> "
            f"(b, 1, h, w), but {spec!r} came"
        )
    whole = all(hasattr(spec, part) for part in _CONTRACT)
    extractor = spec if isinstance(spec, Extractor) or whole else _Function(spec)
    if options:
        raise ValueError(
            f"extractor {extractor.name!r} is already built and takes no options, "
            f"but {', '.join(options)} came"
        )
    return extractor


def positive(extractor: str, **options: Number) -> None:
    """Refuse options that are not positive and finite, with a ValueError."""
    for option, value in options.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"{option} of extractor {extractor!r} must be positive and finite, but {value} came"
            )


# --------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------


class Network:
    """A network, frozen and in eval mode, whose maps are brought to the pictures' size.

    Args:
        model: a folder or hub id of transformers, if ``auto`` is given; or a module or callable
            that takes pictures in [0, 1] and gives ``(b, c, h', w')`` or, for one channel,
            ``(b, h', w')``, as it is or as an attribute or item ``out``. Modules are frozen.
        who: the extractor's name.
        channels: how many it must give; None: any number.
        auto: the class of transformers that loads it.
        output: the attribute in which transformers gives the map.
        size: height and width to which pictures are scaled for it; ``"picture"``: as they are.
            None: what transformers' image processor says.

    Raises:
        FileNotFoundError: there is no such folder, or nothing on the hub.
        ValueError: weights are missing in the checkpoint; a name where none can be loaded.
        TypeError: ``model`` is neither a name nor callable.
    """

    def __init__(
        self,
        model: Any,
        who: str,
        channels: int | None = None,
        auto: str | None = None,
        output: str = "out",
        size: Sequence[int] | str | None = None,
    ) -> None:
        self.who, self.channels, self.output = who, channels, output
        self.size, self.mean, self.std = size, None, None
        if isinstance(model, str):
            if auto is None:
                raise ValueError(
                    f"model of extractor {who!r} is a module or a callable, but {model!r} came"
                )
            model, self.weights = self._load(auto, model), model
        elif callable(model):
            self.weights = f"a given {_name_of(model)}"
        else:
            raise TypeError(
                f"model of extractor {who!r} is a name, a module or a callable, but {model!r} came"
            )
        if isinstance(model, nn.Module):
            model.requires_grad_(False).eval()
        self.model = model
        if self.size == "picture":
            self.size = None
        elif self.size is not None and (isinstance(self.size, str) or len(self.size) != 2):
            raise ValueError(
                f"size of extractor {who!r} is (height, width) or 'picture', but {size!r} came"
            )

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        self.to(images.device)
        x, size = images, tuple(images.shape[-2:])
        weight = next(self.model.parameters(), None) if isinstance(self.model, nn.Module) else None
        if weight is not None:
            x = x.to(weight.dtype)
        if self.size is not None and tuple(self.size) != size:
            x = F.interpolate(x, size=tuple(self.size), mode="bilinear", antialias=True)
        if self.mean is not None:
            x = (x - x.new_tensor(self.mean).view(3, 1, 1)) / x.new_tensor(self.std).view(3, 1, 1)
        found = self.model(x)
        if isinstance(found, Mapping):
            found = found.get(self.output, found.get("out"))
        elif not isinstance(found, Tensor):
            found = getattr(found, self.output, getattr(found, "out", None))
        if isinstance(found, Tensor) and found.ndim == 3:
            found = found[:, None]
        if not self._fits(found, len(images)):
            came = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else found
            raise ValueError(
                f"the model of extractor {self.who!r} gave {came} for {len(images)} pictures; "
                f"expected floating point ({len(images)}, {self.channels or 'channels'}, h, w)"
            )
        if tuple(found.shape[-2:]) != size:
            found = F.interpolate(found, size=size, mode="bilinear", align_corners=False)
        return found if found.dtype == torch.float64 else found.float()

    def _fits(self, found: Any, b: int) -> bool:
        right = isinstance(found, Tensor) and found.ndim == 4 and found.is_floating_point()
        return right and len(found) == b and found.shape[1] == (self.channels or found.shape[1])

    def to(self, device: torch.device | str) -> "Network":
        if isinstance(self.model, nn.Module):
            # Not in the caller's inference mode: the weights must stay usable for gradients.
            with torch.inference_mode(False):
                self.model.to(device)
        return self

    def _load(self, auto: str, model: str) -> nn.Module:
        import transformers

        model = _located(model)
        try:
            settings = transformers.AutoImageProcessor.from_pretrained(model)
            with torch.inference_mode(False):
                network, report = getattr(transformers, auto).from_pretrained(
                    model, dtype=torch.float32, output_loading_info=True
                )
        except OSError as err:  # whose message does not always name it
            raise FileNotFoundError(
                f"{model!r} is no folder here with a network and its image processor, and could "
                f"not be had from the hub: {err}"
            ) from err
        lacking = sorted(report["missing_keys"])
        if lacking:  # transformers gives them random weights
            raise ValueError(
                f"the checkpoint {model!r} lacks {len(lacking)} weights of its network, the first "
                f"of them {lacking[0]}"
            )
        if getattr(settings, "do_normalize", True):
            self.mean, self.std = tuple(settings.image_mean), tuple(settings.image_std)
        own = getattr(settings, "size", None)
        resized = getattr(settings, "do_resize", True)
        resized = resized or getattr(settings, "do_affine_transform", False)  # of a person's box
        if self.size is None and own is not None and resized:
            own = dict(own)
            side = own.get("shortest_edge")
            self.size = (own.get("height") or side, own.get("width") or side)
            if None in self.size:
                raise ValueError(
                    f"the image processor of {model!r} resizes to {own}, which is not known here; "
                    f"give extractor {self.who!r} a size"
                )
        return network


class _Function(Extractor):
    """A callable, pictures -> values ``(b, channels, h, w)`` in [0, 1]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.name = str(getattr(function, "name", _name_of(function)))
        super().__init__()
        self.channels = getattr(function, "channels", 1)
        if self.channels not in (1, 3):
            raise ValueError(
                f"channels of extractor {self.name!r} are 1 or 3, but {self.channels} came"
            )
        self.differentiable = getattr(function, "differentiable", True)
        self.network = Network(function, self.name, self.channels)
        self.weights = self.network.weights if isinstance(function, nn.Module) else None

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        return self.network(images)

    def to(self, device: torch.device | str) -> "_Function":
        self.network.to(device)
        return self

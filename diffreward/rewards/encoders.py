"""Encoders: samples as vectors, for rewards that compare sets of samples with each other.

An *encoder* maps :class:`~diffreward.samples.Samples` to one embedding each, and where it can, to
the embeddings of their parts (patches, frames, residues, windows) and of texts in the same space.
Any callable ``Samples -> (b, d)`` will do; :func:`make_encoder` gives it the rest.

They are registered and made as rewards are (:mod:`.base`)::

    make_encoder("clip")
    make_encoder({"name": "dino", "model": "facebook/dinov2-small"})
    make_encoder({"kmers": {"k": 4}})
    make_encoder({"kmers": 4})  # the first option

An embedding does not depend on the other samples of the batch, and carries a gradient to the
samples' data where the network has one. Networks are frozen and in eval mode, and follow the
samples' device. While anyone holds an encoder, asking for the same one again gives the same object.

The encoders themselves are in :mod:`.image_encoders`, :mod:`.sequence_encoders` and :mod:`.audio`;
what remembers embeddings on disk is in :mod:`.embedding_cache`.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffreward.rewards.base import _name_of
from diffreward.rewards.registry import Registry
from diffreward.samples import Samples

# --------------------------------------------------------------------------------------------
# The contract
# --------------------------------------------------------------------------------------------


class Encoder(ABC):
    """Samples as vectors.

    Attributes:
        name: how it is called.
        key: what its numbers depend on, weights and preprocessing: statistics and cached
            embeddings of encoders with different keys are never mixed. See :func:`network_key`.
        modality: the ``Samples.modality`` it takes; None: any.
        differentiable: embeddings carry a gradient to the samples' data; None: not declared.
    """

    name: str = ""
    key: str
    modality: str | None = None
    differentiable: bool | None = None

    @abstractmethod
    def __call__(self, samples: Samples) -> Float[Tensor, "b d"]:
        """One embedding per sample."""

    def parts(self, samples: Samples) -> Float[Tensor, "b n d"]:
        """Embeddings of each sample's n parts.

        Raises:
            ValueError: it has none.
        """
        raise ValueError(f"encoder {self.name!r} embeds whole samples only, not their parts")

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Embeddings of texts, comparable with those of samples; without gradient.

        Raises:
            ValueError: it has none.
        """
        raise ValueError(
            f"encoder {self.name!r} has no text side; exemplars that are texts need one that has, "
            "such as 'clip'"
        )

    def resized(self, samples: Samples) -> Samples:
        """Samples of the size that the network sees, which have the same embeddings.

        So that pictures of many sizes are embedded in one batch. As they are, where the encoder
        does not resize.
        """
        return samples

    def to(self, device: torch.device | str) -> "Encoder":
        """Move the network; a call does this by itself to where its samples are."""
        return self


def embed(encoder: Encoder, what: Samples | Sequence[str], parts: bool = False) -> Tensor:
    """Call an encoder, checking what goes in and what comes out.

    Args:
        encoder: of the samples' modality.
        what: samples, or texts for its text side.
        parts: of samples.

    Returns:
        ``(b, d)``, or with ``parts`` ``(b, n, d)``.

    Raises:
        ValueError: no samples, of another modality, or not one finite row of numbers for each.
        TypeError: no floating-point tensor came out.
    """
    who, b = f"encoder {encoder.name!r}", len(what)
    if not b:
        raise ValueError(f"{who} was given no samples")
    if not isinstance(what, Samples):
        found = encoder.texts(what)
    elif encoder.modality not in (None, what.modality):
        raise ValueError(f"{who} takes {encoder.modality} samples, but {what.modality} ones came")
    else:
        found = encoder.parts(what) if parts else encoder(what)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        came = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{who} returned {came}, expected a floating-point tensor")
    if found.ndim != 2 + parts or len(found) != b or not found.shape[-1]:
        raise ValueError(
            f"{who} returned shape {tuple(found.shape)} for {b} samples, expected "
            f"({b}, {'parts, ' if parts else ''}numbers)"
        )
    bad = ~torch.isfinite(found.detach()).flatten(1).all(dim=1)
    if bad.any():
        raise ValueError(f"{who} gave sample {int(bad.nonzero()[0, 0])} a NaN or infinite number")
    return found


def network_key(name: str, network: nn.Module, *settings: Any) -> str:
    """An encoder's key: its name, and a hash of its weights and settings.

    Of the weights themselves, wherever they were loaded from: a network saved to another folder
    has the same key. Of each tensor up to 4096 numbers are read, spread evenly, which no
    finetuning leaves as they were, though a change of a few numbers can be missed.
    """
    digest = blake2b(repr(settings).encode(), digest_size=8)
    for tensor in [*network.parameters(), *network.buffers()]:
        if not tensor.is_floating_point():
            continue  # positions and the like, which releases of libraries add and drop
        values = tensor.detach().flatten()
        chosen = torch.linspace(0, max(len(values) - 1, 0), min(len(values), 4096)).long()
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(values[chosen.to(values.device)].float().cpu().numpy().tobytes())
    return f"{name}-{digest.hexdigest()}"


# --------------------------------------------------------------------------------------------
# The registry
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderInfo:
    """What is known about an encoder before it is built; fields as in ``RewardInfo``.

    Attributes:
        name: how it is called in specs.
        modality: what it takes; None: that is an option, or any.
        weights: None: it has none. ``"embedded:..."``: shipped in this package. Anything else says
            what must be downloaded or given.
        licence: of its weights.
        source: paper.
        description: one line.
    """

    name: str
    modality: str | None = None
    weights: str | None = None
    licence: str = ""
    source: str = ""
    description: str = ""


EncoderSpec = str | Mapping | Encoder | Callable[[Samples], Any]
"""A name, ``{"name": ..., option: value}`` or ``{NAME: {option: value}}``, an encoder, or a
callable ``Samples -> (b, d)``; see :func:`make_encoder`."""

REGISTRY = Registry("an encoder", "make_encoder")
_BUILT: WeakValueDictionary[Hashable, Encoder] = WeakValueDictionary()


def register_encoder(name: str, *, overwrite: bool = False, **info: Any) -> Callable:
    """Decorator that enters an encoder's factory in the registry; the factory is unchanged.

    Args:
        name: how the encoder will be called; case, ``-``, ``_`` and spaces make no difference.
        overwrite: take the place of an entry of this name.
        **info: fields of :class:`EncoderInfo`. The description is by default the first line of
            the factory's docstring.

    The factory's arguments are the encoder's options; heavy imports belong inside. A class without
    a name or modality of its own is given this entry's.

    Raises:
        ValueError: the name is empty or taken, or what is decorated is itself an encoder.
        TypeError: an unknown field of EncoderInfo.
    """
    REGISTRY.key(name)

    def register(factory: Callable) -> Callable:
        entry = REGISTRY.register(
            name, factory, lambda doc: EncoderInfo(name=name, **{"description": doc, **info}),
            overwrite,
        )  # fmt: skip
        if isinstance(factory, type):
            factory.name = factory.name or name
            factory.modality = factory.modality or entry.info.modality
        return factory

    return register


def available_encoders() -> dict[str, EncoderInfo]:
    """Every registered encoder by name, sorted; builds none. Loads the rewards' plugins."""
    return REGISTRY.available()


def make_encoder(spec: EncoderSpec, /, **options: Any) -> Encoder:
    """Build an encoder, or find the one that was built of the same name and options.

    Args:
        spec: a registered name; a mapping ``{"name": ..., option: value, ...}``; the same for
            short, ``{NAME: {option: value, ...}}``, or ``{NAME: value}`` for the first option; an
            encoder (returned unchanged); or a callable ``Samples -> (b, d)``, which has as ``key``
            its attribute of that name, or its weights if it is a module.
        **options: the encoder's options, as in the mapping.

    Raises:
        ValueError: an unknown name or option (the message lists near matches), a missing option,
            a mapping without a name, or options for something that is already built.
        TypeError: ``spec`` is none of these.
    """
    if isinstance(spec, str | Mapping):
        given = {**REGISTRY.in_full(spec), **options}
        entry = REGISTRY.find(given.pop("name"))
        REGISTRY.check_options(entry, given)
        factory = entry.factory
        key = (factory, *sorted(given.items()))
        try:
            known = _BUILT.get(key)
        except TypeError:  # an option that is no plain value
            return factory(**given)
        if known is None:
            known = _BUILT[key] = factory(**given)
        return known
    if not callable(spec):
        raise TypeError(
            f"an encoder is a callable Samples -> (b, d), a name or a mapping, but {spec!r} came"
        )
    encoder = spec if isinstance(spec, Encoder) else FunctionEncoder(spec)
    if options:
        raise ValueError(
            f"encoder {encoder.name!r} is already built and takes no options, "
            f"but {', '.join(options)} came"
        )
    return encoder


# --------------------------------------------------------------------------------------------
# What encoders share
# --------------------------------------------------------------------------------------------


class FunctionEncoder(Encoder):
    """A callable ``Samples -> (b, d)`` as an encoder.

    ``identified`` says whether its key names what it computes, or only what it is called.
    """

    def __init__(self, function: Callable[[Samples], Any]) -> None:
        self.function, self.name = function, _name_of(function)
        self.modality = getattr(function, "modality", None)
        self.differentiable = getattr(function, "differentiable", None)
        key = getattr(function, "key", None)
        if key is None and isinstance(function, nn.Module):
            key = network_key(self.name, function)
        self.identified = key is not None
        module = getattr(function, "__module__", "")
        self.key = str(key) if self.identified else f"callable {module}.{self.name}"

    def __call__(self, samples: Samples) -> Any:
        return self.function(samples)  # `embed` checks what it gives

    def to(self, device: torch.device | str) -> "FunctionEncoder":
        """Move it, if it can be moved."""
        if hasattr(self.function, "to"):
            self.function.to(device)
        return self


class NetworkEncoder(Encoder):
    """An encoder with a frozen network, differentiable unless it says otherwise.

    Args:
        network: frozen and put in eval mode.
        chunk_size: samples given to it at once.
        settings: what the embeddings depend on beside its weights.
    """

    differentiable: bool | None = True

    def __init__(self, network: nn.Module, chunk_size: int, *settings: Any) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but {chunk_size} came")
        self.network = network.requires_grad_(False).eval()
        self.chunk_size, self.settings = chunk_size, settings

    @functools.cached_property
    def key(self) -> str:
        """See :func:`network_key`."""
        return network_key(self.name, self.network, *self.settings)

    def to(self, device: torch.device | str) -> "NetworkEncoder":
        """Move the network; a call does this by itself to where its samples are."""
        # Not in the caller's inference mode: the weights must stay usable for gradients.
        with torch.inference_mode(False):
            self.network.to(device)
        return self

    def chunked(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, some rows at a time, in the network's precision, as float32 or more."""
        self.to(x.device)
        if x.is_floating_point():
            x = x.to(next(self.network.parameters()).dtype)
        found = torch.cat([function(chunk) for chunk in x.split(self.chunk_size)])
        return found if found.dtype == torch.float64 else found.float()

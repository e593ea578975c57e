"""Policies from what models are stored as: `load_policy`, and `load_pipeline` for diffusers.

Masked policies of sequences and text have loaders of their own beside their classes (`load_dna`,
`load_protein`, `load_text`); `load_policy` finds out which it is.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffreward._assets import asset_path
from diffreward.policies.audio import AudioLDM2Policy
from diffreward.policies.controlled import (
    CONTROLLED,
    TRAINED,
    ControlledPolicy,
    new_controller,
    with_controller,
)
from diffreward.policies.lora import load_lora
from diffreward.policies.masked import MaskedPolicy
from diffreward.policies.pipelines import (
    FAMILIES,
    FLOW_KERNELS,
    VP_KERNELS,
    PipelinePolicy,
    Sampling,
)
from diffreward.policy import Policy

EMBEDDED: dict[str, dict[str, Any]] = {"emoji": {"guidance_scale": 3.0}, "dna": {}, "protein": {}}
"""Embedded model -> what it is loaded with unless the caller says otherwise."""

SOUNDS: dict[str, type[PipelinePolicy]] = {"AudioLDM2Pipeline": AudioLDM2Policy}
"""Class name of a diffusers pipeline of sounds -> its policy, which has the option ``seconds``."""

SEQUENCES = {"dna": "dna:load_dna", "protein": "protein:load_protein", "text": "text:load_text"}
TEXT = "text:"  #: before a hub id or folder of a masked language model
STRUCTURES = (".pdb", ".cif", ".mmcif", ".ent")


def load_policy(spec: Any, **options) -> Policy:
    """A policy, from a diffusers pipeline or a model of sequences.

    Args:
        spec: a pipeline object, folder or hub id, as for `load_pipeline`; "embedded:emoji",
            "embedded:dna" or "embedded:protein"; a folder of a `DNAConvNet`; a PDB or mmCIF file,
            whose sequence is to be designed; a folder of a masked language model
            (``...ForMaskedLM``), or "text:" and the hub id of one.
        options: of `load_pipeline`, `diffreward.policies.dna.load_dna`,
            `diffreward.policies.protein.load_protein` or `diffreward.policies.text.load_text`.
            ``num_steps`` and ``device`` are options of all. None stands for the default, and a
            ``guidance_scale`` of 1, no guidance, is taken by all.

    Raises:
        FileNotFoundError: no such folder; a hub id that is neither cached nor reachable.
        ValueError: an unknown embedded model, an option that this model does not have, or one out
            of range.
    """
    options = {name: value for name, value in options.items() if value is not None}
    options = {name: _dtype(v) if name == "dtype" else v for name, v in options.items()}
    kind = _sequence(spec)
    if kind is None:
        _check_names(spec, options, [load_pipeline])
        return load_pipeline(spec, **options)
    module, function = SEQUENCES[kind].split(":")
    load = getattr(importlib.import_module(f"diffreward.policies.{module}"), function)
    if options.get("guidance_scale") == 1:
        del options["guidance_scale"]
    _check_names(spec, options, [load, MaskedPolicy])
    if spec == f"embedded:{kind}":
        return load(**options)
    return load(spec.removeprefix(TEXT) if isinstance(spec, str) else spec, **options)


def _sequence(spec: Any) -> str | None:
    """Which of `SEQUENCES`; None: none of them."""
    if not isinstance(spec, str | os.PathLike):
        return None
    if os.fspath(spec).startswith(TEXT):
        return "text"
    name = os.fspath(spec).removeprefix("embedded:")
    if os.fspath(spec) == f"embedded:{name}":
        return name if name in SEQUENCES and name in EMBEDDED else None
    path = Path(spec).expanduser()
    if path.suffix.lower() in STRUCTURES:
        return "protein"
    if (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        try:
            config = json.loads((path / "config.json").read_text())
            if config.get("network") == "DNAConvNet":
                return "dna"
            # by its class, or as what code that comes with it is to be loaded
            kinds = [*(config.get("architectures") or ()), *(config.get("auto_map") or ())]
        except (json.JSONDecodeError, AttributeError):
            return None
        return "text" if any(kind.endswith("ForMaskedLM") for kind in kinds) else None
    return None


def _check_names(spec: Any, options: dict[str, Any], sources: list[Callable]) -> None:
    known: dict[str, None] = {}
    for source in sources:
        for name, parameter in inspect.signature(source).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY or name == "structure":
                known[name] = None
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}"
            what = spec if isinstance(spec, str | os.PathLike) else type(spec).__name__
            raise ValueError(f"there is no option {name!r} of {what}; {hint}")


def _dtype(dtype: Any) -> torch.dtype:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, but {dtype!r} came")
    return found


def load_pipeline(
    spec: Any,
    *,
    num_steps: int = 25,
    kernel: str | None = None,
    eta: float = 1.0,
    noise_level: float = 0.7,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    seconds: float | int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    lora: str | os.PathLike | None = None,
    controlnet: Any = None,
    adapter: Any = None,
    control_scale: float | int = 1.0,
    train: str = "control",
) -> PipelinePolicy:
    """A policy from a diffusers pipeline.

    Args:
        spec: a pipeline object (Stable Diffusion 1.x/2.x, XL, 3/3.5, FLUX.1, each also with a
            ControlNet, and the first two with a T2I-Adapter; unconditional DDPM/DDIM; AudioLDM2), a
            local folder, a hub id, or "embedded:emoji".
        num_steps: T, denoising steps; at most the training steps of an epsilon- or v-prediction
            model.
        kernel: "ddim" or "ddpm" for epsilon- and v-prediction models; "flow_sde" or
            "flow_renoise" for flow-matching ones. None: ddim (ddpm for a DDPMPipeline) and
            flow_sde. flow_renoise is what diffusers' ``stochastic_sampling`` does; it shrinks the
            spread of the samples, to 0.65 of the data's in 28 steps on a Gaussian.
        eta: noise of ddim, in [0, 1]; 0 is deterministic, which steering refuses.
        noise_level: noise of flow_sde, at least 0.
        guidance_scale: as in diffusers; None: the default of the pipeline.
        negative_prompt: for classifier-free guidance.
        height, width: pixels; None: the model's own.
        seconds: length of sounds; None: the model's own.
        dtype: of the networks; None: as they are in a pipeline object, else float32, or bfloat16
            on CUDA. Latents are float32 in any case.
        device: None: where a pipeline object is, else CUDA if there is one.
        lora: folder or hub id of a LoRA, which is added to the weights; see `load_lora`.
        controlnet: what control images condition the model by: a ControlNet of diffusers (of
            Stable Diffusion, XL, 3 or FLUX), which is moved to the base network's device and
            dtype, a folder or hub id of one, "embedded:" and its name, or "new": one to be
            trained, which changes nothing at first. Conditions then are
            ``policy.encode(prompts, control=images)``.
        adapter: the same with a T2I-Adapter (of Stable Diffusion or XL); a new one is random.
        control_scale: what the ControlNet or adapter adds is multiplied by it.
        train: what finetuning trains: "control", the ControlNet or adapter, or "base".

    Raises:
        FileNotFoundError: no such folder; a hub id that is neither cached nor reachable.
        ValueError: an unknown embedded model or kernel, a kernel of the wrong path, a pipeline
            class that has no family here, a scheduler or an option of it that is not supported, a
            network that predicts variances, a number out of its range, a ControlNet or adapter
            that does not fit the model.
    """
    dtype = None if dtype is None else _dtype(dtype)
    given = {"controlnet": controlnet, "adapter": adapter}
    given = {kind: value for kind, value in given.items() if value is not None}
    if len(given) == 2:
        raise ValueError("a model is conditioned by a controlnet or an adapter; give one of them")
    if train not in TRAINED:
        raise ValueError(f"train must be {' or '.join(map(repr, TRAINED))}, but {train!r} came")
    if not math.isfinite(control_scale):
        raise ValueError(f"control_scale must be finite, but {control_scale} came")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, but {num_steps} came")
    every = (*VP_KERNELS, *FLOW_KERNELS)
    if kernel is not None and kernel not in every:
        near = difflib.get_close_matches(kernel, every, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown kernel {kernel!r}{hint} Known: {', '.join(every)}")
    pipe = _load(spec, dtype, device) if isinstance(spec, str | os.PathLike) else spec
    name = type(pipe).__name__
    families = {**FAMILIES, **CONTROLLED, **SOUNDS}
    if name not in families:
        other = "Any other pipeline can be steered with diffreward.steered(pipe, ...)"
        if name == "StableAudioPipeline":
            other = "Its sampler steps through sigmas with a multistep solver: no kernel here does"
        raise ValueError(
            f"there is no policy for {name}; there is one for {', '.join(families)}. {other}"
        )
    if seconds is not None and name not in SOUNDS:
        raise ValueError(
            f"seconds is the length of sounds, and {name} makes none; pictures have height, width"
        )
    family = families[name]
    for kind in given:
        family = with_controller(name, kind)
    if not issubclass(family, ControlledPolicy) and (control_scale != 1 or train != "control"):
        raise ValueError(
            f"control_scale and train are options of models with a controlnet or an adapter, and "
            f"this {name} has none; give controlnet=... or adapter=..."
        )
    if spec is pipe and (dtype is not None or device is not None):
        pipe.to(**{k: v for k, v in {"dtype": dtype, "device": device}.items() if v is not None})
    if guidance_scale is None:
        embedded = EMBEDDED.get(str(spec).removeprefix("embedded:"), {})
        parameters = inspect.signature(type(pipe).__call__).parameters
        own = parameters["guidance_scale"].default if "guidance_scale" in parameters else 1.0
        guidance_scale = embedded.get("guidance_scale", own)
    sampling = Sampling(num_steps, kernel, eta, noise_level)
    more = {"seconds": seconds} if name in SOUNDS else {}
    if issubclass(family, ControlledPolicy):
        more = {"control_scale": float(control_scale), "train": train}
    for kind, value in given.items():
        more["controller"] = _load_controller(value, kind, family, pipe)
    policy = family(pipe, sampling, float(guidance_scale), negative_prompt, height, width, **more)
    if lora is not None:
        load_lora(policy, lora, fuse=True)
    return policy


def _load(spec: str | os.PathLike, dtype, device):
    spec = os.fspath(spec)
    if spec.startswith("embedded:"):
        name = spec.removeprefix("embedded:")
        if name not in EMBEDDED:
            near = difflib.get_close_matches(name, EMBEDDED, n=1, cutoff=0.3)
            hint = f"; did you mean 'embedded:{near[0]}'?" if near else "."
            raise ValueError(
                f"there is no embedded model {name!r}{hint} Known: "
                + ", ".join(f"embedded:{n}" for n in EMBEDDED)
            )
        folder = str(asset_path(name))
    else:
        folder = _folder_or_id(spec, "model")
        if Path(folder).exists() and not (Path(folder) / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{spec!r} holds no diffusers pipeline: there is no model_index.json in it"
            )
    from diffusers import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    except OSError as err:
        if Path(folder).exists():
            raise
        raise FileNotFoundError(
            f"the model {spec!r} is neither a folder here nor in the local cache, and the hub "
            "could not be reached for it; check the id and the network (HF_HUB_OFFLINE must not "
            "be 1), or give the path of a downloaded folder"
        ) from err
    for module in pipe.components.values():
        # one dtype everywhere: text encoders otherwise keep that of their files
        if isinstance(module, torch.nn.Module) and module.dtype != dtype:
            module.to(dtype)
    return pipe.to(device)


def _load_controller(spec: Any, kind: str, family: type[ControlledPolicy], pipe: Any):
    """The ControlNet or adapter, on the device and in the dtype of the pipeline's network."""
    cls = family.controller_class
    if spec == "new":
        found = new_controller(family, pipe)
    elif isinstance(spec, str | os.PathLike):
        found = _read_controller(os.fspath(spec), kind, cls)
    elif type(spec).__name__ == cls:
        found = spec
    else:
        raise ValueError(
            f"{kind} of {type(pipe).__name__} is a {cls}, a folder or hub id of one, or 'new', but "
            f"{type(spec).__name__} came"
        )
    base = next(p for p in getattr(pipe, family.network).parameters() if p.is_floating_point())
    return torch.nn.Module.to(found, base.device, base.dtype)  # diffusers' own warns of nothing


def _read_controller(spec: str, kind: str, cls: str):
    import diffusers

    if spec.startswith("embedded:"):
        folder = str(asset_path(spec.removeprefix("embedded:")))
    else:
        folder = _folder_or_id(spec, kind)
    if Path(folder).exists():
        try:
            came = json.loads((Path(folder) / "config.json").read_text()).get("_class_name")
        except (OSError, json.JSONDecodeError, AttributeError) as err:
            raise FileNotFoundError(
                f"{spec!r} holds no {cls}: there is no config.json of one in it"
            ) from err
        if came != cls:
            raise ValueError(f"{kind} of this model is a {cls}, but {spec!r} holds a {came}")
    try:
        return getattr(diffusers, cls).from_pretrained(folder).eval()
    except OSError as err:
        if Path(folder).exists():
            raise
        raise FileNotFoundError(
            f"the {kind} {spec!r} is neither a folder here nor in the local cache, and the hub "
            "could not be reached for it"
        ) from err


def _folder_or_id(spec: str, what: str) -> str:
    if Path(spec).expanduser().exists():
        return str(Path(spec).expanduser())
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec) is None:
        raise FileNotFoundError(
            f"the {what} folder {spec!r} does not exist (and it is not a hub id, which reads "
            "owner/name)"
        )
    return spec

"""LoRAs of a policy's network: those that its pipeline reads, and peft's own format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from diffreward.policies.gaussian import adapter_layers

ADAPTER = "reward"  #: name of the adapters that this package puts into a network
PIPELINE_FILE = "pytorch_lora_weights.safetensors"  # names that diffusers and peft prescribe
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def load_lora(policy: Any, folder: str | Path, *, fuse: bool = False) -> None:
    """Put a LoRA into a policy: what finetuning saved, or any that the policy's pipeline reads.

    Args:
        policy: is changed in place; its ``reference()`` is the model without the LoRA.
        folder: with ``pytorch_lora_weights.safetensors``, or in peft's format; or a hub id. The
            first kind is of the network that predicts, peft's of the one that is trained: another
            one with ``train="control"``, whose reference then keeps a LoRA of the first kind.
        fuse: add the LoRA to the weights, so that it is part of the pretrained model: of its
            ``reference()``, and for training further. Half-precision weights round it.

    Raises:
        FileNotFoundError: no LoRA in the folder.
        ValueError: a LoRA of another model, or none of this network.
    """
    pipe, given = getattr(policy, "pipe", None), str(folder)
    folder = Path(folder).expanduser()
    of_peft = (folder / PEFT_CONFIG).is_file()
    network = policy.denoiser if of_peft else getattr(policy, "base", policy.denoiser)
    on_hub = not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", given) is not None
    if not of_peft and not on_hub and not (folder / PIPELINE_FILE).is_file():
        raise FileNotFoundError(
            f"no LoRA in {given!r}: it has neither {PIPELINE_FILE} nor {PEFT_CONFIG}"
        )
    if not of_peft and not hasattr(pipe, "load_lora_weights"):
        raise ValueError(
            f"the LoRA in {given!r} is for a pipeline with load_lora_weights, which "
            f"{type(policy if pipe is None else pipe).__name__} has not"
        )
    before = len(adapter_layers(network))
    try:
        if of_peft:
            _load_peft(network, folder, fuse)
        elif on_hub:
            pipe.load_lora_weights(given)
        else:
            pipe.load_lora_weights(folder, weight_name=PIPELINE_FILE, local_files_only=True)
    except OSError as err:
        raise FileNotFoundError(
            f"the LoRA {given!r} is no folder here, not in the local cache, and the hub could not "
            "be reached for it"
        ) from err
    except (RuntimeError, ValueError) as err:
        raise ValueError(
            f"the LoRA in {given!r} does not fit this {type(network).__name__}: it is of "
            "another model"
        ) from err
    if of_peft and fuse:
        return
    if len(adapter_layers(network)) == before:
        raise ValueError(
            f"the LoRA in {given!r} has nothing for this {type(network).__name__}: it is of "
            "another model, or of a text encoder alone"
        )
    if fuse:
        parts = pipe.components.items()  # the network, and maybe text encoders
        pipe.fuse_lora([n for n, p in parts if isinstance(p, nn.Module) and adapter_layers(p)])
        pipe.unload_lora_weights()


def _load_peft(network: nn.Module, folder: Path, fuse: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    config = LoraConfig.from_pretrained(folder)
    weights = load_file(folder / PEFT_FILE)
    weights = {name.removeprefix(PEFT_PREFIX): w for name, w in weights.items()}
    inject_adapter_in_model(config, network, ADAPTER)
    found = set_peft_model_state_dict(network, weights, ADAPTER)
    if found.unexpected_keys:
        raise ValueError(f"no layers for {', '.join(found.unexpected_keys[:5])}")
    if fuse:
        for name, layer in list(network.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                network.set_submodule(name, layer.get_base_layer())
        del network.peft_config


def network_name(policy: Any) -> str:
    """What the policy's pipeline calls its network."""
    return next(n for n, part in policy.pipe.components.items() if part is policy.denoiser)

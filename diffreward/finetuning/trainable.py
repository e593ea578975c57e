"""What finetuning trains: adapters, or all weights of a policy's network; and how it is kept.

A trained LoRA is saved as what its pipeline reads (``pipe.load_lora_weights(folder)``), rank and
alpha included. Where there is no such reader (unconditional pipelines, policies without a pipeline)
it is saved in peft's own format (``peft.PeftModel.from_pretrained(policy.denoiser, folder)``).
`diffreward.policies.load_lora` reads both.

Of a policy that is conditioned by a ControlNet or adapter, this is trained, or the base network
(``train`` of `load_policy`). The former is saved as a model of its own (``from_pretrained(folder)``
of its class, ``load_policy(spec, controlnet=folder)``), or as a LoRA in peft's format.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from diffreward.finetuning.options import LoRA, Training
from diffreward.finetuning.sharding import gathered, part, share_out
from diffreward.finetuning.team import Team
from diffreward.policies.gaussian import adapter_layers
from diffreward.policies.lora import ADAPTER, PEFT_FILE, PEFT_PREFIX, network_name

ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
"""The attention projections; the second row, of the text stream, is in SD3 and FLUX alone.

The default for LoRA, unless the policy has other ``lora_targets``.
"""

FULL_FILE = "model.safetensors"

HALF = (torch.float16, torch.bfloat16)


class Trainable:
    """The trained part of a policy, whose network it prepares in place.

    The network is in eval mode, so without dropout. Whatever else belongs to the
    policy or its pipeline is frozen.

    Args:
        policy: its network is ``policy.denoiser``.
        training: which part is trained, and how.
        team: the processes, over which the network is shared out if they say so.

    Attributes:
        policy: the same object; its law is the trained one.
        network: ``policy.denoiser``.
        reference: the policy of the law before training, which shares the network (adapters off),
            or has a frozen copy of it.
        parameters: what is trained, by name, in the order of the names.

    Raises:
        ValueError: a policy without a network, a network that has adapters already, targets that
            match no layer, a rank below 1, no support for activation checkpointing.
    """

    def __init__(self, policy: Any, training: Training, team: Team | None = None) -> None:
        network = getattr(policy, "denoiser", None)
        if not isinstance(network, nn.Module):
            raise ValueError(
                f"{type(policy).__name__} cannot be trained: its attribute `denoiser` must be the "
                f"network, a torch.nn.Module, but it is {network!r}"
            )
        if adapter_layers(network):
            raise ValueError(
                f"the {type(network).__name__} has adapters already. Fuse them into its weights "
                "first (pipe.fuse_lora(); pipe.unload_lora_weights(), or load_lora(policy, folder, "
                "fuse=True)), so that the pretrained model is the one with them; or unload them"
            )
        self.policy, self.network, self.training = policy, network, training
        self.team = team if team is not None and team.shard else None
        parts = getattr(getattr(policy, "pipe", None), "components", {}).values()
        for module in [network, getattr(policy, "controller", None), *parts]:
            if isinstance(module, nn.Module):
                module.requires_grad_(False)
        network.eval()
        if training.method == "lora":
            if self.team is not None:  # before adapters are added, which so stay whole
                share_out(network, policy.device)
            default = getattr(policy, "lora_targets", ATTENTION)
            check = getattr(policy, "check_adapters", None)
            _add_lora(network, training.lora, training.seed, default, check)
            self.reference = policy.reference()
        else:
            # before the copy, so that policy and reference compute alike and start with KL 0
            if training.mixed_precision != "no":
                _raise_half(network.parameters())
                _raise_half(network.buffers())
            if self.team is not None:  # the device need not hold the network and its copy
                device = policy.device
                network.cpu()
            self.reference = policy.reference()
            for p in network.parameters():
                p.requires_grad_(p.is_floating_point())
            if self.team is not None:
                for n in dict.fromkeys((network, self.reference.denoiser)):
                    share_out(n, device)
        self.parameters: dict[str, nn.Parameter] = dict(
            sorted((name, p) for name, p in network.named_parameters() if p.requires_grad)
        )
        self._ema = self._start_ema()
        if training.activation_checkpointing:
            self._checkpoint_activations()
        if training.compile:
            network.compile()  # in place: names of parameters stay

    # The moving average

    def _start_ema(self):
        if self.training.ema_decay is None:
            return None
        from diffusers.training_utils import EMAModel

        ema = EMAModel(self.parameters.values(), decay=self.training.ema_decay)
        # in half precision a long average would not move: its steps round to nothing
        _raise_half(ema.shadow_params)
        return ema

    def ema_step(self) -> None:
        """Take the present weights into the average.

        The n-th call does it with decay min(decay, n / (n + 9)), the first one with decay 0.
        """
        if self._ema is not None:
            self._ema.step(self.parameters.values())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has its averaged weights, then its own again. Without EMA: nothing."""
        if self._ema is None or self._ema.temp_stored_params is not None:  # entered already
            yield
            return
        parameters = list(self.parameters.values())
        self._ema.store(parameters)
        try:
            self._ema.copy_to(parameters)
            yield
        finally:
            self._ema.restore(parameters)

    # Resuming

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights by name, and the average as ``ema/<name>`` and ``ema/steps``.

        Weights that are shared out are so here; `sharding.whole` puts them together.
        """
        state = {name: p.detach() for name, p in self.parameters.items()}
        if self._ema is not None:
            average = zip(self.parameters, self._ema.shadow_params, strict=True)
            state |= {f"ema/{name}": p for name, p in average}
            state["ema/steps"] = torch.tensor(self._ema.optimization_step)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of another's `state_dict`, whole; nothing is changed if it does not fit.

        Raises:
            ValueError: other names, shapes or dtypes; they are named.
        """
        own = self.state_dict()
        wrong = [f"{name} is missing" for name in own if name not in state]
        wrong += [f"{name} is unknown here" for name in state if name not in own]
        for name in own.keys() & state.keys():
            here, there = own[name], state[name]
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                wrong.append(
                    f"{name} is {there.dtype} {tuple(there.shape)}, but {here.dtype} "
                    f"{tuple(here.shape)} here"
                )
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(
                "these weights are of another model, or of other training options: "
                + "; ".join(sorted(wrong)[:5])
                + more
            )
        for name, value in own.items():
            value.copy_(part(state[name], value))
        if self._ema is not None:
            self._ema.optimization_step = int(state["ema/steps"])

    # What a user keeps

    def save(self, folder: str | Path) -> None:
        """Write what was trained, averaged if there is an average, for use without this package.

        A LoRA: what ``pipe.load_lora_weights(folder)`` reads, or peft's format (see the module).
        All weights: a pipeline for ``from_pretrained(folder)``; of a ControlNet or adapter, or a
        policy without a pipeline, what the network's ``save_pretrained`` writes, or
        ``model.safetensors``, for ``safetensors.torch.load_model(policy.denoiser, file)``.

        Everything is written beside ``folder`` and moved into it at the end, over files of the same
        names; other files in it stay. If the network is shared out, all processes must call this,
        and the main one writes.
        """
        main, together = self.team is None or self.team.is_main, nullcontext()
        with self.averaged():
            if self.team is not None and self.training.method == "full":
                together = gathered(self.network, keep=main)
            with together:
                if main:
                    self._save(Path(folder))

    def _save(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.parent / f".unfinished-{folder.name}"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a save that was killed
        try:
            unfinished.mkdir()
            self._write(unfinished)
            for file in sorted(p for p in unfinished.rglob("*") if p.is_file()):
                final = folder / file.relative_to(unfinished)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        pipe = getattr(self.policy, "pipe", None)
        if getattr(self.policy, "base", self.network) is not self.network:
            pipe = None  # which has no part in what controls it
        if self.training.method == "full":
            if pipe is None and hasattr(self.network, "save_pretrained"):
                self.network.save_pretrained(folder)
                if hasattr(tokenizer := getattr(self.policy, "tokenizer", None), "save_pretrained"):
                    tokenizer.save_pretrained(folder)
            elif pipe is None:
                save_model(self.network, str(folder / FULL_FILE))
            else:
                pipe.save_pretrained(folder)
            return
        from peft import get_peft_model_state_dict

        config = copy.copy(self.network.peft_config[ADAPTER])
        config.inference_mode = True
        weights = get_peft_model_state_dict(
            self.network, adapter_name=ADAPTER, save_embedding_layers=False
        )
        if hasattr(pipe, "save_lora_weights"):
            layers = f"{network_name(self.policy)}_lora_layers"
            metadata = f"{network_name(self.policy)}_lora_adapter_metadata"
            pipe.save_lora_weights(folder, **{layers: weights, metadata: config.to_dict()})
        else:
            config.save_pretrained(folder)
            weights = {PEFT_PREFIX + name: w.contiguous() for name, w in weights.items()}
            save_file(weights, folder / PEFT_FILE, metadata={"format": "pt"})

    def _checkpoint_activations(self) -> None:
        """Of the network, and of the one that it controls, through which gradients flow."""
        base = getattr(self.policy, "base", self.network)
        if base is not self.network:
            with suppress(ValueError):  # adapters cannot, and are small
                _recompute(self.network)
        _recompute(base)


def _recompute(network: nn.Module) -> None:
    enable = getattr(network, "enable_gradient_checkpointing", None)
    try:
        if enable is None:
            raise ValueError("it has no method enable_gradient_checkpointing")
        enable()
    except ValueError as err:
        raise ValueError(
            f"{type(network).__name__} cannot recompute its activations ({err}); set "
            "activation_checkpointing to false"
        ) from err


def _add_lora(
    network: nn.Module, lora: LoRA, seed: int, default: Sequence[str],
    check: Callable[[list[str]], None] | None = None,
) -> None:  # fmt: skip
    """Put adapters into the network: A Gaussian, of the seed, B zero; float32 at least."""
    if lora.rank < 1:
        raise ValueError(f"lora.rank must be at least 1, but {lora.rank} came")
    from peft import LoraConfig, inject_adapter_in_model

    targets = _targets(network, lora.targets, default)
    if check is not None:
        check(targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        target_modules=targets,
        init_lora_weights="gaussian",
    )
    cuda = [p.device for p in network.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        # of diffusers; transformers' own asks for a peft newer than there may be, and does no more
        if hasattr(network, "load_lora_adapter"):
            network.add_adapter(config, adapter_name=ADAPTER)
        else:
            inject_adapter_in_model(config, network, ADAPTER)
    _raise_half(p for p in network.parameters() if p.requires_grad)
    network.eval()  # new layers are born in train mode


def _targets(
    network: nn.Module, targets: list[str] | str | None, default: Sequence[str]
) -> list[str]:
    """Full names of the layers that get an adapter; of the default targets, those there are."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    # peft's adapters of convolutions know no dilation
    layers = [
        name for name, m in network.named_modules()
        if isinstance(m, kinds) and set(getattr(m, "dilation", (1,))) == {1}
    ]  # fmt: skip
    kind = type(network).__name__

    def ends(target: str) -> list[str]:
        return [name for name in layers if name == target or name.endswith(f".{target}")]

    if isinstance(targets, str):
        found = [name for name in layers if re.fullmatch(targets, name)]
        if not found:
            raise ValueError(
                f"lora.targets: the regular expression {targets!r} matches the whole name of no "
                f"layer of {kind}; {_like(targets, layers)}"
            )
        return found
    wanted = default if targets is None else targets
    found = {target: ends(target) for target in wanted}
    missing = [target for target in wanted if not found[target]]
    if targets is None and len(missing) == len(wanted):
        raise ValueError(
            f"{kind} has none of the layers that get adapters by default "
            f"({', '.join(default[:4])}, ...); name layers in lora.targets. {_like('', layers)}"
        )
    if targets is not None and (missing or not wanted):
        target = missing[0] if missing else ""
        raise ValueError(
            f"lora.targets: {kind} has no layer {target!r}, nor one that ends in '.{target}'; "
            f"{_like(target, layers)}"
        )
    return [name for name in layers if any(name in names for names in found.values())]


def _like(target: str, layers: list[str]) -> str:
    """Names of layers near to a target that matched none."""
    parts = target.count(".") + 1
    ends = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in layers))
    if near := difflib.get_close_matches(target, ends, n=4, cutoff=0.5):
        return f"did you mean {', '.join(near)}?"
    more = ", ..." if len(ends) > 12 else ""
    return f"layers that can have one end in: {', '.join(ends[:12])}{more}"


def _raise_half(tensors) -> None:
    """Give tensors in half precision float32 values, in place."""
    for t in tensors:
        if t.dtype in HALF:
            t.data = t.data.float()

"""Classifier-free guidance of masked diffusion: two policies as one, letter by letter.

Schiff et al. 2024, *Simple Guidance Mechanisms for Discrete Diffusion Models*, arXiv:2412.10193
(D-CFG); Nisonoff et al. 2024, *Unlocking Guidance for Discrete State-Space Diffusion and Flow
Models*, arXiv:2406.01572. At a masked position,

    log p(x0 | x) = scale log p_conditional(x0 | x) + (1 - scale) log p_unconditional(x0 | x) + c

with c such that it sums to 1: diffusers' ``uncond + scale * (cond - uncond)``, of log-probabilities
or, as c takes up the difference, of logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.policies.masked import MaskedPolicy
from diffreward.policy import Condition
from diffreward.samples import Samples

_OTHER = "unconditional/"  # prefix of the unconditional policy's tensors in a joint condition


class GuidedPolicy(MaskedPolicy):
    """A masked policy guided away from another: `MaskedPolicy`, at two network calls a step.

    Temperature, top-p and the relaxation are of the guided law. Its ``denoiser``, what is trained,
    is the conditional policy's. Either policy may be a `reference`; both may be the same one, if it
    reads prompts.

    Args:
        conditional: whose fixed and allowed letters and options of the chain hold.
        unconditional: encoded with empty prompts.
        scale: 1 is the conditional policy, 0 the unconditional one (only that network is then
            called); more than 1 exaggerates the difference.

    Raises:
        TypeError: not masked policies.
        ValueError: the chains differ (in their letters, steps, schedule, temperature or
            remasking), or the scale is not finite.
    """

    def __init__(
        self, conditional: MaskedPolicy, unconditional: MaskedPolicy, scale: float
    ) -> None:
        for policy in (conditional, unconditional):
            if not isinstance(policy, MaskedPolicy):
                raise TypeError(
                    f"GuidedPolicy is of two masked policies, but {type(policy).__name__} came; "
                    "policies of images take guidance_scale themselves"
                )
        same = ("modality", "vocabulary", "num_steps", "schedule", "temperature", "remasking")
        for name in same:
            ours, theirs = getattr(conditional, name), getattr(unconditional, name)
            if ours != theirs:
                raise ValueError(
                    f"the conditional policy has {name} {ours!r} and the unconditional one "
                    f"{theirs!r}; load both with the same"
                )
        if not math.isfinite(scale):
            raise ValueError(f"the scale must be finite, but {scale} came")
        options = (*same[2:], "top_p", "relaxation", "tau")
        super().__init__(
            conditional.denoiser, conditional.vocabulary, conditional.modality,
            **{name: getattr(conditional, name) for name in options},
        )  # fmt: skip
        self.conditional, self.unconditional, self.scale = conditional, unconditional, scale
        self.time_independent = conditional.time_independent and unconditional.time_independent

    def encode(
        self, prompts: Sequence[str], *, unconditional: dict[str, Any] | None = None, **inputs
    ) -> Condition:
        """Both conditions as one.

        Args:
            prompts: of the conditional policy.
            unconditional: inputs of the other one; None: the same.
            inputs: of the conditional one.

        Raises:
            ValueError: the two policies' sequences have not the same length.
        """
        ours = self.conditional.encode(prompts, **inputs)
        theirs = self.unconditional.encode(
            [""] * len(ours), **(inputs if unconditional is None else unconditional)
        )
        shapes = self.conditional.latent_shape(ours), self.unconditional.latent_shape(theirs)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the conditional policy's sequences have {shapes[0][0]} positions, and the "
                f"unconditional one's {shapes[1][0]}"
            )
        other = {_OTHER + name: tensor for name, tensor in theirs.tensors.items()}
        return Condition(ours.prompts, {**ours.tensors, **other})

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        return self.conditional.latent_shape(_split(condition)[0])

    def decode(self, x0: Tensor, condition: Condition) -> Samples:
        return self.conditional.decode(x0, _split(condition)[0])

    def logits(
        self, x: Tensor, t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b l v"]:
        """The guided logits; a letter that either policy excludes, by a logit of -inf, stays so.

        Raises:
            ValueError: all letters of a position are excluded.
        """
        self._follow()
        total = None
        for policy, weight, its in zip(
            (self.conditional, self.unconditional), (self.scale, 1 - self.scale), _split(condition),
            strict=True,
        ):  # fmt: skip
            if weight == 0:
                continue
            raw = policy._call(x, t, its)
            raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
            # -inf times a negative weight is no reason to take a letter
            part = torch.where(raw == -math.inf, -math.inf, weight * raw)
            total = part if total is None else total + part
        if (total == -math.inf).all(-1).any():
            raise ValueError(
                "the conditional and the unconditional policy exclude all letters of a position "
                "between them; give both the same letters"
            )
        return total

    def _follow(self) -> None:
        """Guide with what ``denoiser`` is now: `reference` and others replace it on a copy."""
        before = self.conditional.denoiser
        if self.denoiser is before:
            return
        self.conditional = _with_denoiser(self.conditional, self.denoiser)
        if self.unconditional.denoiser is before:
            self.unconditional = _with_denoiser(self.unconditional, self.denoiser)


def _split(condition: Condition) -> tuple[Condition, Condition]:
    ours, theirs = {}, {}
    for name, tensor in condition.tensors.items():
        if name.startswith(_OTHER):
            theirs[name.removeprefix(_OTHER)] = tensor
        else:
            ours[name] = tensor
    return Condition(condition.prompts, ours), Condition([""] * len(condition), theirs)


def _with_denoiser(policy: MaskedPolicy, denoiser: torch.nn.Module) -> MaskedPolicy:
    policy = copy.copy(policy)
    policy.denoiser, policy._reused = denoiser, None
    return policy

"""What is conditioned on: encoded prompts, kept in main memory, and the pictures of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffreward.controlled import ControlledImages
from diffreward.policy import Condition, Policy, sample_generators
from diffreward.samples import Samples


class Conditions:
    """Every prompt encoded once, in the main memory; the text encoders then leave the device.

    Args:
        policy: encodes.
        prompts: as they may be asked for, by place.
        batch: most prompts encoded at once.
        data: pictures of these prompts, whose control images are encoded with them.
        most_bytes: beyond this, prompts are encoded whenever they are asked for.
    """

    def __init__(
        self, policy: Policy, prompts: Sequence[str], batch: int,
        data: ControlledImages | None = None, most_bytes: int = 2**32,
    ) -> None:  # fmt: skip
        self.policy, self.prompts, self.data, self.kept = policy, list(prompts), data, None
        parts: list[Condition] = []
        for start in range(0, len(self.prompts), batch):
            parts.append(_to(self._encode(range(len(self.prompts))[start : start + batch]), "cpu"))
            size = sum(t.nbytes for t in parts[0].tensors.values()) / len(parts[0])
            if size * len(self.prompts) > most_bytes:
                return
        self.kept = join(parts)
        self._park(True)

    def close(self) -> None:
        """The text encoders go back to where they were."""
        self._park(False)

    def _park(self, parked: bool) -> None:
        if hasattr(self.policy, "park_encoders"):
            self.policy.park_encoders(parked)

    def take(self, indices: Sequence[int]) -> Condition:
        """The conditions of these prompts, on the policy's device."""
        if self.kept is None:
            unique = sorted(set(indices))
            return self._encode(unique).take([unique.index(p) for p in indices])
        return _to(self.kept.take(list(indices)), self.policy.device)

    @torch.no_grad()
    def latents(self, indices: Sequence[int]) -> torch.Tensor:
        """Clean latents of the data's pictures."""
        return self.policy.encode_samples(self.data.load(indices))

    @torch.no_grad()
    def examples(self, most: int) -> Samples | None:
        """A few samples of the policy's kind: the data's pictures, or decoded noise.

        Returns:
            None: the policy's noise is of tokens, which have no gradient.
        """
        few = range(min(most, len(self.prompts)))
        if self.data is not None:
            return self.data.load(few).to(self.policy.device)
        condition = self.take(few)
        noise = self.policy.initial(condition, sample_generators(0, 1, len(few)))
        return self.policy.decode(noise, condition) if noise.is_floating_point() else None

    @torch.no_grad()
    def _encode(self, indices: Sequence[int]) -> Condition:
        inputs = {} if self.data is None else self.data.load(indices).context
        return self.policy.encode([self.prompts[p] for p in indices], **inputs)


def _to(condition: Condition, device: torch.device | str) -> Condition:
    return Condition(condition.prompts, {k: t.to(device) for k, t in condition.tensors.items()})


def join(conditions: Sequence[Condition]) -> Condition:
    """Concatenate batches of conditions with the same tensors."""
    names = conditions[0].tensors
    return Condition(
        [prompt for c in conditions for prompt in c.prompts],
        {name: torch.cat([c.tensors[name] for c in conditions]) for name in names},
    )

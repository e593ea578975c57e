"""A diffusion model as a *policy*: a Markov chain from noise to data, one law per step.

Conventions, stated once and used everywhere:

- the chain index ``i`` runs 0..T-1 from noise to data: ``x[0]`` is noise, ``x[T]`` is clean;
- ``log_prob`` is summed over all dimensions of a sample, in nats, shape ``(b,)``, in float32 or
  better whatever the network's dtype; a mean over dimensions is called ``mean_log_prob``;
- latents are stored in float32 (tokens in int64);
- the guidance scale has diffusers' meaning: ``uncond + scale * (cond - uncond)``;
- a ``generator`` is None, one ``torch.Generator``, or a list of them, one per sample. With a list,
  a sample's noise does not depend on its neighbours in the batch;
- no function here switches gradients off: that is the caller's choice.

Everything goes through ``Policy.step_law``: sampling, log-probabilities, KL and steering. `rollout`
is the sampling loop; the others steer (``steering/feynman_kac.py``), or switch gradients on and off
on the way (``algorithms/refl.py``, ``algorithms/draft.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.samples import Samples, _take

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class Condition:
    """Whatever a model is conditioned on, batched.

    Attributes:
        prompts: b prompts (empty strings for an unconditional model).
        tensors: named tensors with leading dimension b (text embeddings, control images, ...).

    Raises:
        ValueError: a tensor's leading dimension is not the number of prompts.
    """

    prompts: list[str]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, t in self.tensors.items():
            if len(t) != len(self.prompts):
                raise ValueError(
                    f"condition tensor {name!r} has {len(t)} rows for {len(self.prompts)} prompts"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Tensor | Sequence[int]) -> Condition:
        return Condition(
            _take(self.prompts, indices), {k: _take(t, indices) for k, t in self.tensors.items()}
        )

    def repeat(self, k: int) -> Condition:
        """Each entry k times in a row: a a a b b b ..., the layout ``[prompts, particles]``."""
        return self.take(torch.arange(len(self)).repeat_interleave(k))


@runtime_checkable
class StepLaw(Protocol):
    """The law p(x[i+1] | x[i], c) of one step, for a batch of b samples."""

    x0: Tensor  #: the clean prediction at x[i]: E[x0 | x[i]], or token probabilities (b, l, v)

    def sample(self, generator: Generators = None) -> Tensor:
        """Draw x[i+1]; no gradient flows through the draw."""

    def rsample(self, generator: Generators = None) -> Tensor:
        """Draw x[i+1] differentiably (reparameterised, or Gumbel-softmax)."""

    def log_prob(self, x_next: Tensor) -> Float[Tensor, " b"]:
        """log p(x_next | x[i], c), nats."""

    def kl(self, other: StepLaw) -> Float[Tensor, " b"]:
        """KL(self || other), nats.

        Raises:
            NotImplementedError: it has no closed form.
        """

    def take(self, indices: Tensor | Sequence[int]) -> StepLaw:
        """The laws of the samples at ``indices``."""


@runtime_checkable
class Policy(Protocol):
    """A denoising Markov chain over latents or tokens. Anything with these members is a policy."""

    num_steps: int
    device: torch.device

    def encode(self, prompts: Sequence[str], **inputs) -> Condition:
        """Turn prompts (and inputs such as control images) into a condition."""

    def initial(self, condition: Condition, generator: Generators = None) -> Tensor:
        """Draw x[0], one row per entry of ``condition``."""

    def step_law(self, x: Tensor, i: int, condition: Condition) -> StepLaw:
        """The law of x[i+1] given x[i] = x."""

    def decode(self, x0: Tensor, condition: Condition) -> Samples:
        """Turn clean latents, or clean predictions ``law.x0``, into samples."""

    def denoising_loss(
        self, x0: Tensor, condition: Condition, generator: Generators = None
    ) -> Float[Tensor, " b"]:
        """ELBO-type training loss per sample; equal generator states give equal (t, noise)."""

    def reference(self) -> Policy:
        """The pretrained law: adapters off, or a frozen copy."""


@dataclass
class Trajectory:
    """One rollout: the path of latents and the condition it was drawn under.

    Attributes:
        condition: b conditions.
        latents: ``x[0], ..., x[T]`` if the path was kept, else only ``[x[T]]``.
        log_probs: ``(b, T)`` log-probabilities of the steps, if they were asked for.
    """

    condition: Condition
    latents: list[Tensor]
    log_probs: Float[Tensor, "b T"] | None = None

    @property
    def final(self) -> Tensor:
        """x[T], the clean latents."""
        return self.latents[-1]


def rollout(
    policy: Policy,
    condition: Condition,
    generator: Generators = None,
    *,
    x: Tensor | None = None,
    keep_path: bool = False,
    log_prob: bool = False,
    differentiable: bool = False,
    progress=None,
) -> Trajectory:
    """Run the chain from noise to data: the one sampling loop.

    Args:
        policy: the model.
        condition: b conditions.
        generator: randomness of x[0] and of every step.
        x: x[0], if it is not to be drawn.
        keep_path: keep x[0..T] rather than x[T] alone.
        log_prob: also return the step log-probabilities ``(b, T)``.
        differentiable: draw with ``rsample``, so that gradients flow through the chain. Whether
            gradients are recorded at all is the caller's ``torch.no_grad`` or not.
        progress: wraps the iterable of step indices (``tqdm.tqdm``, say).
    """
    x = policy.initial(condition, generator) if x is None else x
    path, log_probs = [x], []
    steps: Iterable[int] = range(policy.num_steps)
    for i in progress(steps) if progress else steps:
        law = policy.step_law(x, i, condition)
        x = law.rsample(generator) if differentiable else law.sample(generator)
        if log_prob:
            log_probs.append(law.log_prob(x))
        if keep_path:
            path.append(x)
    return Trajectory(
        condition, path if keep_path else [x], torch.stack(log_probs, 1) if log_prob else None
    )


def path_log_prob(
    policy: Policy, trajectory: Trajectory, steps: int | None = None
) -> Float[Tensor, "b T"]:
    """Step log-probabilities of a kept path under ``policy`` (its own or another's).

    Args:
        policy: the model.
        trajectory: from `rollout` with ``keep_path=True``.
        steps: only the first so many.

    Raises:
        ValueError: the trajectory was rolled out without ``keep_path=True``, or for another number
            of steps.
    """
    x = trajectory.latents
    if len(x) != policy.num_steps + 1:
        raise ValueError(
            f"the trajectory holds {len(x)} latents, but a path of {policy.num_steps} steps has "
            f"{policy.num_steps + 1}; roll out with keep_path=True and the same number of steps"
        )
    return torch.stack(
        [
            policy.step_law(x[i], i, trajectory.condition).log_prob(x[i + 1])
            for i in range(policy.num_steps if steps is None else steps)
        ],
        1,
    )


def sample_generators(
    seed: int, num_prompts: int, num_samples: int, *, first_prompt: int = 0, stream: int = 0
) -> list[torch.Generator]:
    """One CPU generator per (prompt, sample), in the layout ``[prompts, samples]``, flattened.

    A sample's seed depends on (``seed``, prompt index, sample index, ``stream``) alone, so results
    depend neither on the batch size nor on the device nor on the number of processes.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more, but {seed} came")
    generators = []
    for p in range(first_prompt, first_prompt + num_prompts):
        for s in range(num_samples):
            state = np.random.SeedSequence([seed, p, s, stream]).generate_state(2, np.uint32)
            # 63 bits: manual_seed takes a signed 64-bit integer
            generators.append(torch.Generator().manual_seed((int(state[0]) << 31) ^ int(state[1])))
    return generators


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of ``shape``; with a list of generators, row j comes from the j-th.

    Drawn on the generators' device and then moved, in the order diffusers draws, so that the same
    generators give a diffusers pipeline the same noise.

    Raises:
        ValueError: the list is not as long as the batch.
    """
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators came for a batch of {shape[0]}")
    rows = [
        torch.randn((1, *shape[1:]), generator=g, device=g.device, dtype=dtype) for g in generator
    ]
    return torch.cat(rows).to(device)

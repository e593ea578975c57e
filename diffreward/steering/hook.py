"""Feynman-Kac steering of any diffusers pipeline, unmodified: a scheduler whose step also selects.

    with steered(pipe, "clip_score", num_particles=4) as run:
        images = pipe(["a red heart"], num_images_per_prompt=4, eta=1.0).images
    run.result.samples  # the best of each prompt

For the duration of the ``with`` block the pipeline's ``scheduler.step(model_output, t, sample)`` is
stood in for. At a scheduled step the clean prediction is worked out from these three, decoded,
scored, and the particles selected; ``model_output``, ``sample`` and the scheduler's own history are
permuted alike, and the scheduler then takes its step as if nothing had happened. No network call is
added. With ``lmbda=0`` or one particle the images are the unhooked pipeline's, bit for bit.

The paper's letters and the loop over a `Policy` are in `feynman_kac.py`; the weights and the
lineage are the same `Population`.

Each slot of the batch keeps its generator, so that copies of a particle part with fresh noise.
Some pipelines (Stable Diffusion 3, FLUX) do not hand the call's generator to their scheduler: their
steps draw from torch's global generator.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffreward import smc
from diffreward.policies.gaussian import to_x0_eps
from diffreward.policies.pipelines import decode_vae
from diffreward.rewards.base import Reward, evaluate, make_reward
from diffreward.samples import Samples
from diffreward.steering.feynman_kac import (
    FeynmanKac,
    Population,
    Potential,
)
from diffreward.steering.result import SteeringResult, warn_if_collapsed

SCHEDULERS: dict[str, tuple[str, tuple] | None] = {
    "DDIMScheduler": None,  # its eta comes with the call
    "DDPMScheduler": None,
    "EulerAncestralDiscreteScheduler": None,
    "LCMScheduler": None,
    "FlowMatchEulerDiscreteScheduler": ("stochastic_sampling", (True,)),
    "DPMSolverMultistepScheduler": ("algorithm_type", ("sde-dpmsolver++", "sde-dpmsolver")),
}
"""Class name of a scheduler known here -> the option, and its values, that make it stochastic."""


def _replacement(name: str) -> str:
    option = SCHEDULERS[name]
    more = f", {option[0]}={option[1][0]!r}" if option else ""
    return f"pipe.scheduler = {name}.from_config(pipe.scheduler.config{more})"


def clean_prediction(
    scheduler: Any, index: int, model_output: Tensor, timestep: Any, sample: Tensor
) -> Tensor:
    """The clean prediction as the scheduler itself defines it, clipped where it clips; float32.

    Args:
        scheduler: one of `SCHEDULERS`.
        index: of the step in ``scheduler.timesteps``.
        model_output, timestep, sample: what ``scheduler.step`` is given.
    """
    name, config = type(scheduler).__name__, scheduler.config
    precise = torch.promote_types(sample.dtype, torch.float32)
    x, output = sample.to(precise), model_output.to(precise)
    if output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]  # the other half is a learned variance
    prediction = config.get("prediction_type", "flow_prediction")
    if name == "FlowMatchEulerDiscreteScheduler":
        s = scheduler.sigmas[index]
        a = 1 - s
    elif name == "DPMSolverMultistepScheduler":
        a, s = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
    elif name == "EulerAncestralDiscreteScheduler":
        a = (scheduler.sigmas[index] ** 2 + 1) ** -0.5
        x, s = x * a, scheduler.sigmas[index] * a  # its sample is x0 + sigma eps
    else:
        alpha_bar = scheduler.alphas_cumprod[int(timestep)]
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    a, s = (torch.as_tensor(v, device=x.device, dtype=precise) for v in (a, s))
    x0, _ = to_x0_eps(prediction.replace("flow_prediction", "flow"), x, output, a, s)
    if config.get("thresholding"):
        x0 = scheduler._threshold_sample(x0)
    elif config.get("clip_sample"):
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    if name == "LCMScheduler":
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(int(timestep))
        x0 = c_out * x0 + c_skip * x
    return x0


class steered:
    """Steer the one call of ``pipe`` made inside the ``with`` block towards a reward.

    Afterwards `result` holds what `steer` would have returned, and the pipeline is as before, also
    after an exception. The images the call returns are the particles, ``num_particles`` in a row
    for each prompt.

    The call must make ``num_particles`` images of each prompt: ``num_images_per_prompt`` (or
    ``num_videos_per_prompt``), the ``batch_size`` of an unconditional pipeline, or, where a
    pipeline has none of these, prompts that are repeated in the list. Its own progress bar stays.
    For best-of-N from the same noise, repeat the call with ``lmbda=0`` and the same generators.

    Args:
        pipe: a diffusers pipeline whose scheduler is one of `SCHEDULERS` and stochastic.
        reward: what `make_reward` takes: a registered name or spec, a reward, a callable.
        num_particles: K, particles per prompt.
        potential, lmbda, resampling, ess_threshold, schedule, tempering, target_ess: see
            `FeynmanKac`. Steps are counted from the first one that runs, also in image-to-image.
        prompts: one per prompt of the call, for the reward. By default those of the call; needed
            if that is given ``prompt_embeds``.
        decode: latents ``(b, ...)`` to a tensor in [0, 1], images ``(b, 3, h, w)`` or videos
            ``(b, f, 3, h, w)``, or to `Samples`. By default the pipeline's own VAE and scaling.
        decode_batch: most samples decoded at once.
        seed: of the resampling draws. The particles' noise is the call's own.

    Raises:
        ValueError: bad arguments; a scheduler that is deterministic, or not known here; another
            number of images than ``num_particles``; a reward that needs prompts and finds none. All
            of it before the networks run, where the call's arguments tell; otherwise at the first
            step. A reward that is NaN or of the wrong shape.
        RuntimeError: the pipeline is already steered; a second call in one block; the pipeline
            changes the latents between steps, as inpainting does (the samples scored would not be
            those returned).
    """

    def __init__(
        self,
        pipe: Any,
        reward: Reward | Callable | str | dict,
        *,
        num_particles: int = 4,
        potential: str | Potential = "difference",
        lmbda: float = 10.0,
        resampling: str = "systematic",
        ess_threshold: float | None = 0.5,
        schedule: int | Sequence[int] | Sequence[float] | None = None,
        tempering: str | Callable[[float], float] = "constant",
        target_ess: float = 0.5,
        prompts: str | Sequence[str] | None = None,
        decode: Callable[[Tensor], Tensor | Samples] | None = None,
        decode_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        self.fk = FeynmanKac(
            lmbda, potential, tempering, resampling, ess_threshold, schedule, target_ess
        )
        for name, value in (("num_particles", num_particles), ("decode_batch", decode_batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but {value} came")
        self.pipe, self.reward, self.k, self.seed = pipe, make_reward(reward), num_particles, seed
        self.prompts = [prompts] if isinstance(prompts, str) else prompts and list(prompts)
        self.decode, self.decode_batch = decode or self._decode, decode_batch
        self.scheduler = getattr(pipe, "scheduler", None)
        self._check_scheduler()
        self.call: dict[str, Any] = {}
        self.population: Population | None = None
        self._result: SteeringResult | None = None

    @property
    def result(self) -> SteeringResult:
        """What the call gave.

        Raises:
            RuntimeError: it did not reach its last step.
        """
        if self._result is None:
            raise RuntimeError(
                "there is no result: the pipeline has not run, or stopped before the last of its "
                "scheduler's timesteps"
            )
        return self._result

    # ----------------------------------------------------------------------------------------
    # Standing in
    # ----------------------------------------------------------------------------------------

    def __enter__(self) -> steered:
        if self.population is not None or self.call:
            raise RuntimeError("this `steered` has been used; make a new one for each call")
        if hasattr(self.scheduler.step, "steered"):
            raise RuntimeError("this pipeline, or one that shares its scheduler, is being steered")
        self._plain_step, self._plain_class = self.scheduler.step, type(self.pipe)
        self._own_step = vars(self.scheduler).get("step")
        step_signature = inspect.signature(self._plain_step)
        call_signature = inspect.signature(self._plain_class.__call__)

        @functools.wraps(self._plain_step)  # pipelines look for `eta` and `generator` in it
        def step(*args, **kwargs):
            return self._step(step_signature.bind(*args, **kwargs))

        @functools.wraps(self._plain_class.__call__)
        def call(pipe, *args, **kwargs):
            bound = call_signature.bind(pipe, *args, **kwargs)
            bound.apply_defaults()
            self._check_call(bound.arguments)
            return self._plain_class.__call__(pipe, *args, **kwargs)

        step.steered = self
        self.scheduler.step = step
        # Calls are looked up on the class. A subclass for this one object, under the same name,
        # shows the call's arguments before any network runs.
        members = {"__call__": call, "__module__": self._plain_class.__module__}
        self.pipe.__class__ = type(self._plain_class.__name__, (self._plain_class,), members)
        return self

    def __exit__(self, *exception) -> None:
        self.pipe.__class__ = self._plain_class
        del self.scheduler.step
        if self._own_step is not None:
            self.scheduler.step = self._own_step
        if self._result is not None and exception[0] is None:
            unknown = [""] * len(self._result.best)
            warn_if_collapsed(self._result, self.prompts or unknown)

    def _check_scheduler(self) -> None:
        name = type(self.scheduler).__name__
        if name not in SCHEDULERS:
            raise ValueError(
                f"steering needs a stochastic sampler out of {', '.join(SCHEDULERS)}, but this "
                f"pipeline has {name}. For epsilon- and v-prediction models: "
                f"{_replacement('EulerAncestralDiscreteScheduler')}; for flow-matching models: "
                f"{_replacement('FlowMatchEulerDiscreteScheduler')}"
            )
        option = SCHEDULERS[name]
        if self.k > 1 and option and self.scheduler.config.get(option[0]) not in option[1]:
            raise ValueError(
                f"{name} is deterministic as configured, so that copies of a particle would stay "
                f"identical; replace it: {_replacement(name)}"
            )

    def _check_eta(self, arguments: dict[str, Any]) -> None:
        name = type(self.scheduler).__name__
        if name == "DDIMScheduler" and self.k > 1 and arguments.get("eta", 1.0) == 0:
            raise ValueError(
                "DDIM with eta=0 is deterministic, so that copies of a particle would stay "
                "identical; pass eta=1.0 to the pipeline, or replace the scheduler: "
                + _replacement("EulerAncestralDiscreteScheduler")
            )

    def _check_call(self, arguments: dict[str, Any]) -> None:
        """Everything the call's arguments tell, before it runs."""
        if self.call:
            raise RuntimeError("a `with steered(...)` block holds one call; make one for each")
        if self.pipe.scheduler is not self.scheduler:
            raise RuntimeError(
                "the scheduler was replaced inside `with steered(...)`; do it before"
            )
        self._check_eta(arguments)
        k = self.k
        name = next((a for a in arguments if re.fullmatch(r"num_\w+_per_prompt", a)), None)
        each = 1 if name is None else arguments[name]
        prompts = arguments.get("prompt")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, list | tuple):  # embeddings, class labels, nothing
            prompts, fits = None, name is None or each == k
        elif each == 1:
            prompts, repeated = list(prompts[::k]), list(prompts)
            fits = repeated == [p for p in prompts for _ in range(k)]
        else:
            fits = each == k
        if not fits:
            how = f"{name}={k}" if name else f"each prompt {k} times in a row"
            raise ValueError(
                f"steering with num_particles={k} needs {k} images of each prompt, and this call "
                f"makes {each}; call the pipeline with {how}"
            )
        if self.reward.info.needs_prompt and not (self.prompts or prompts):
            raise ValueError(
                f"reward {self.reward.info.name!r} compares samples with their prompts, and the "
                "call shows none; name them: steered(..., prompts=[...])"
            )
        self.call, self.prompts = arguments, self.prompts or prompts

    # ----------------------------------------------------------------------------------------
    # The step that also selects
    # ----------------------------------------------------------------------------------------

    def _step(self, bound: inspect.BoundArguments) -> Any:
        bound.apply_defaults()
        arguments, scheduler = bound.arguments, self.scheduler
        sample, timestep = arguments["sample"], arguments["timestep"]
        index = self._index(timestep)
        if self.population is None:
            self._begin(index, sample, arguments)
        elif index != self.next_index or not self._same(sample):
            raise RuntimeError(
                "the pipeline changed the latents between two steps (as inpainting, callbacks or a "
                "second pass do), so the samples scored would not be those it returns; steering "
                "cannot follow it"
            )
        i = index - self.first_index
        scored = i in self.population.steps
        if scored or i == 0:
            with torch.no_grad():
                x0 = clean_prediction(scheduler, index, arguments["model_output"], timestep, sample)
                # a reward of the wrong shape or dtype is found now, not at the first scored step
                particles = self._samples(x0 if scored else x0[:2])
                rewards = evaluate(self.reward, particles).value
            ancestors = self.population.select(i, rewards) if scored else None
            if ancestors is not None:
                history = {k: v for k, v in vars(scheduler).items() if _holds_particles(v, sample)}
                carried = {k: arguments[k] for k in ("model_output", "sample")}
                carried, history = smc.gather_particles((carried, history), ancestors)
                arguments.update(carried)
                vars(scheduler).update(history)
        output = self._plain_step(*bound.args, **bound.kwargs)
        self.returned = output[0]
        self.next_index = index + 1
        if self.next_index == len(scheduler.timesteps):
            with torch.no_grad():
                particles = self._samples(self.returned)
                scores = evaluate(self.reward, particles)
            self.population.finish(scores.value)
            self._result = self.population.result(particles, scores)
        return output

    def _index(self, timestep: Any) -> int:
        """Where the step stands in the scheduler's timesteps."""
        scheduler = self.scheduler
        if not hasattr(scheduler, "step_index"):
            return int((scheduler.timesteps == timestep).nonzero()[0, 0])
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)  # as its step is about to do
        return scheduler.step_index

    def _begin(self, index: int, sample: Tensor, arguments: dict[str, Any]) -> None:
        self._check_eta(arguments)
        n, k = len(sample), self.k
        p = len(self.prompts) if self.prompts else n // k
        if n != p * k or n == 0:
            raise ValueError(
                f"the pipeline runs a batch of {n}, but {p} prompts with num_particles={k} make "
                f"{p * k}; give it num_images_per_prompt={k}, or a batch_size that is a multiple, "
                "or, where a pipeline ignores these, each prompt that many times in a row"
            )
        self.first_index = index
        num_steps = len(self.scheduler.timesteps) - index
        self.population = Population(self.fk, p, k, num_steps, seed=self.seed)

    def _same(self, sample: Tensor) -> bool:
        return sample is self.returned or torch.equal(sample, self.returned.to(sample.dtype))

    # ----------------------------------------------------------------------------------------
    # Decoding
    # ----------------------------------------------------------------------------------------

    def _samples(self, latents: Tensor) -> Samples:
        """Decode the first ``len(latents)`` particles' latents, in chunks."""
        parts = [self.decode(x) for x in latents.split(self.decode_batch or len(latents))]
        if not isinstance(parts[0], Samples):
            modality = "video" if parts[0].ndim == 5 else "image"
            parts = [Samples(data.float(), modality) for data in parts]
        samples = Samples.cat(parts)
        if samples.prompts is None and self.prompts is not None:
            prompts = [p for p in self.prompts for _ in range(self.k)]
            samples = replace(samples, prompts=prompts[: len(samples)])
        return samples

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents as the pipeline itself would decode them."""
        pipe, vae = self.pipe, getattr(self.pipe, "vae", None)
        try:
            if vae is None and latents.ndim == 4 and latents.shape[1] == 3:
                data = latents  # a model of pixels
            elif vae is None:
                raise ValueError("it has no `vae`")
            elif latents.ndim == 5 and hasattr(pipe, "decode_latents"):
                data = pipe.decode_latents(latents.to(vae.dtype))
            else:
                data = decode_vae(vae, self._unpack(latents))
        except ValueError as err:
            raise ValueError(
                f"steered cannot tell how {type(pipe).__name__} decodes latents of shape "
                f"{tuple(latents.shape)}: {err}. Say how: steered(..., decode=function)"
            ) from err
        data = data.transpose(1, 2) if data.ndim == 5 else data  # frames before channels
        return (data.float() / 2 + 0.5).clamp(0, 1)

    def _unpack(self, latents: Tensor) -> Tensor:
        """Packed latents ``(b, patches, c)``, as FLUX has them, to maps."""
        pipe = self.pipe
        if latents.ndim != 3 or not hasattr(pipe, "default_sample_size") or not self.call:
            return latents
        scale = pipe.vae_scale_factor
        size = [self.call[v] or pipe.default_sample_size * scale for v in ("height", "width")]
        return pipe._unpack_latents(latents, *size, scale)


def _holds_particles(value: Any, sample: Tensor) -> bool:
    """Whether a scheduler's attribute is a tensor of one entry per particle, or a list of such."""
    if isinstance(value, list | tuple):
        kept = [v for v in value if v is not None]
        return bool(kept) and all(_holds_particles(v, sample) for v in kept)
    # tables of betas and timesteps have one dimension, whatever their length
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(sample)

"""Gaussian step laws: what DDIM, DDPM and flow-matching samplers have in common.

A *kernel* turns the network's output at x[i] into the law of x[i+1],

    p(x[i+1] | x[i]) = N(mean, std^2),

and is all that distinguishes one sampler from another. With a = sqrt(alpha_bar), s = sqrt(1 - a^2)
on a variance-preserving (VP) path and a = 1 - sigma, s = sigma on a flow-matching path, x[i] is
a x0 + s eps, and every prediction type is a linear map from (x, output) to (x0, eps).

kernel            source                                              zero-variance step
`DDIM`            Song et al. 2021, arXiv:2010.02502, eq. 12, 16      eta = 0, or final alpha_bar 1
`DDPM`            Ho et al. 2020, arXiv:2006.11239, eq. 7             the last, as in the paper
`FlowRenoise`     x0-prediction renoised to the next sigma; what      the last
                  diffusers' FlowMatchEuler does with
                  ``stochastic_sampling``
`FlowSDE`         Flow-GRPO, Liu et al. 2025, arXiv:2505.05470, as    noise_level = 0; the last
                  the authors' code discretises it

A step of zero variance is a point mass: it has no density. Its ``log_prob`` and ``kl`` are 0 by
convention, which leaves it out of path sums, and ``law.deterministic`` says so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffreward.policy import Condition, Generators, randn

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


def expand(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar or ``(b,)`` tensor as ``(b, 1, ..., 1)``, to broadcast against ``like``."""
    value = torch.as_tensor(value, device=like.device, dtype=like.dtype)
    value = value.expand(like.shape[0]) if value.ndim == 0 else value
    return value.reshape(-1, *[1] * (like.ndim - 1))


@dataclass
class GaussianLaw:
    """N(mean, std^2), independent over dimensions; one law per batch row.

    Attributes:
        x0: ``(b, ...)`` clean prediction at x[i].
        mean: ``(b, ...)``.
        std: ``(b, 1, ..., 1)``; 0 for a deterministic step.
        x0_std: ``(b, 1, ..., 1)`` standard deviation of x0 given x[i] for data of unit variance,
            sqrt(s^2 / (a^2 + s^2)); used to draw several clean samples from one state.
    """

    x0: Tensor
    mean: Tensor
    std: Tensor
    x0_std: Tensor

    @property
    def deterministic(self) -> bool:
        return not bool((self.std > 0).any())

    def sample(self, generator: Generators = None) -> Tensor:
        with torch.no_grad():
            return self.rsample(generator)

    def rsample(self, generator: Generators = None) -> Tensor:
        return self.mean + self.std * self._noise(generator)

    def sample_x0(self, generator: Generators = None) -> Tensor:
        """Draw x0 given x[i], approximately: N(x0, x0_std^2), exact for unit Gaussian data.

        Source: the Gaussian posterior of Loss-Guided Diffusion, Song et al. 2023 (ICML).
        """
        return self.x0 + self.x0_std * self._noise(generator)

    def log_prob(self, x_next: Tensor) -> Float[Tensor, " b"]:
        z, std = self._precise(x_next - self.mean), self._precise(self.std)
        noisy = std > 0
        std = torch.where(noisy, std, torch.ones_like(std))
        density = -0.5 * (z / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return torch.where(noisy, density, torch.zeros_like(density)).flatten(1).sum(1)

    def kl(self, other: GaussianLaw) -> Float[Tensor, " b"]:
        s, r = self._precise(self.std), self._precise(other.std)
        noisy = (s > 0) & (r > 0)
        s, r = (torch.where(noisy, v, torch.ones_like(v)) for v in (s, r))
        d2 = self._precise(self.mean - other.mean) ** 2
        nats = torch.log(r / s) + (s**2 + d2) / (2 * r**2) - 0.5
        return torch.where(noisy, nats, torch.zeros_like(nats)).flatten(1).sum(1)

    def take(self, indices) -> GaussianLaw:
        i = torch.as_tensor(indices, device=self.mean.device)
        return GaussianLaw(self.x0[i], self.mean[i], self.std[i], self.x0_std[i])

    def shift(self, gradient: Tensor) -> GaussianLaw:
        """The law tilted by exp(gradient . x): the mean moves by std^2 * gradient."""
        return GaussianLaw(self.x0, self.mean + self.std**2 * gradient, self.std, self.x0_std)

    def _noise(self, generator: Generators) -> Tensor:
        return randn(self.mean.shape, generator, dtype=self.mean.dtype, device=self.mean.device)

    @staticmethod
    def _precise(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))


def to_x0_eps(prediction: str, x: Tensor, output: Tensor, a, s) -> tuple[Tensor, Tensor]:
    """(x0, eps) from a network output at x = a x0 + s eps.

    ``prediction`` is "epsilon" (output = eps), "sample" (x0), "v_prediction" (a eps - s x0,
    Salimans & Ho 2022) or "flow" (eps - x0, the velocity of x = (1 - sigma) x0 + sigma eps).
    """
    if prediction == "epsilon":
        return (x - s * output) / a, output
    if prediction == "sample":
        return output, (x - a * output) / s
    if prediction == "v_prediction":
        return a * x - s * output, a * output + s * x
    if prediction == "flow":
        return x - s * output, x + a * output
    raise ValueError(f"prediction must be one of {PREDICTIONS}, but {prediction!r} came")


def training_target(prediction: str, x0: Tensor, eps: Tensor, a, s) -> Tensor:
    """What a network of this prediction type is trained to output at a x0 + s eps."""
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": a * eps - s * x0,
        "flow": eps - x0,
    }[prediction]


@dataclass(frozen=True)
class VPKernel:
    """What DDIM and DDPM share: a variance-preserving path on a grid of training timesteps.

    Attributes:
        timesteps: ``(T,)`` the network's time argument at step i.
        alpha_bar: ``(T,)`` cumulative product of alphas at step i.
        alpha_bar_next: ``(T,)`` the same at the step's end.
        alphas_cumprod: ``(train steps,)`` the whole training schedule.
        prediction: see `to_x0_eps`.
        clip: x0 predictions are clamped to [-clip, clip]; None leaves them alone.
    """

    timesteps: Tensor
    alpha_bar: Tensor
    alpha_bar_next: Tensor
    alphas_cumprod: Tensor
    prediction: str = "epsilon"
    clip: float | None = None

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def predict(self, i: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x0, eps, x0_std) at step i; clipping moves x0 and leaves eps, as diffusers does."""
        ab = expand(self.alpha_bar[i], x)
        x0, eps = to_x0_eps(self.prediction, x, output, ab.sqrt(), (1 - ab).sqrt())
        return (x0 if self.clip is None else x0.clamp(-self.clip, self.clip)), eps, (1 - ab).sqrt()

    def level(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of x[i] = a x0 + s eps, to broadcast against ``x``."""
        ab = expand(self.alpha_bar[i], x)
        return ab.sqrt(), (1 - ab).sqrt()

    def trained_level(self, u: Float[Tensor, " b"], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, s, t) of the training loss at uniform times u in [0, 1)."""
        t = (u * len(self.alphas_cumprod)).long()
        ab = expand(self.alphas_cumprod.to(u.device)[t], x)
        return ab.sqrt(), (1 - ab).sqrt(), t


@dataclass(frozen=True)
class DDIM(VPKernel):
    """DDIM with noise ``eta``: 0 deterministic, 1 the DDPM variance on this grid."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], but {self.eta} came")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def law(self, i: int, x: Tensor, output: Tensor) -> GaussianLaw:
        x0, eps, x0_std = self.predict(i, x, output)
        ab, ab_next = expand(self.alpha_bar[i], x), expand(self.alpha_bar_next[i], x)
        var = (1 - ab_next) / (1 - ab) * (1 - ab / ab_next)
        std = self.eta * var.clamp(min=0).sqrt()
        direction = (1 - ab_next - std**2).clamp(min=0).sqrt() * eps
        return GaussianLaw(x0, ab_next.sqrt() * x0 + direction, std, x0_std)


@dataclass(frozen=True)
class DDPM(VPKernel):
    """Ancestral sampling from q(x[i+1] | x[i], x0); ``variance`` is diffusers' name."""

    variance: str = "fixed_small"
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variance not in ("fixed_small", "fixed_small_log", "fixed_large"):
            raise ValueError(
                f"variance_type {self.variance!r} is not supported; use fixed_small, "
                "fixed_small_log or fixed_large"
            )

    def law(self, i: int, x: Tensor, output: Tensor) -> GaussianLaw:
        x0, _, x0_std = self.predict(i, x, output)
        ab, ab_next = expand(self.alpha_bar[i], x), expand(self.alpha_bar_next[i], x)
        alpha = ab / ab_next
        mean = (ab_next.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - ab_next) * x) / (1 - ab)
        if i == self.num_steps - 1:
            # as in the paper; diffusers adds noise to fixed_large chains that end at t > 0
            std = torch.zeros_like(ab)
        elif self.variance == "fixed_large":
            std = (1 - alpha).sqrt()
        else:
            std = ((1 - ab_next) / (1 - ab) * (1 - alpha)).sqrt()
        return GaussianLaw(x0, mean, std, x0_std)


@dataclass(frozen=True)
class FlowKernel:
    """What the flow-matching kernels share: x = (1 - sigma) x0 + sigma eps.

    Attributes:
        timesteps: ``(T,)`` the network's time argument at step i.
        sigmas: ``(T + 1,)`` decreasing, the last one 0.
        num_train_timesteps: the network's time is sigma times this.
    """

    timesteps: Tensor
    sigmas: Tensor
    num_train_timesteps: int = 1000
    prediction: str = "flow"

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def predict(self, i: int, x: Tensor, output: Tensor):
        """(x0, x0_std, sigma, next sigma) at step i."""
        s, s_next = expand(self.sigmas[i], x), expand(self.sigmas[i + 1], x)
        x0, _ = to_x0_eps(self.prediction, x, output, 1 - s, s)
        return x0, s / ((1 - s) ** 2 + s**2).sqrt(), s, s_next

    def level(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of x[i] = a x0 + s eps, to broadcast against ``x``."""
        s = expand(self.sigmas[i], x)
        return 1 - s, s

    def trained_level(self, u: Float[Tensor, " b"], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, s, t) of the training loss at uniform sigma = u."""
        s = expand(u, x)
        return 1 - s, s, u * self.num_train_timesteps


@dataclass(frozen=True)
class FlowRenoise(FlowKernel):
    """Predict x0, then add fresh noise of the next level: N((1 - sigma') x0, sigma'^2)."""

    stochastic: ClassVar[bool] = True

    def law(self, i: int, x: Tensor, output: Tensor) -> GaussianLaw:
        x0, x0_std, _, s_next = self.predict(i, x, output)
        return GaussianLaw(x0, (1 - s_next) * x0, s_next, x0_std)


@dataclass(frozen=True)
class FlowSDE(FlowKernel):
    """The SDE with the flow's marginals, Euler-Maruyama, as Flow-GRPO discretises it.

    With dt = sigma' - sigma < 0, velocity v and g = noise_level * sqrt(sigma / (1 - sigma)):
    mean = x + (v + g^2 / (2 sigma) (x + (1 - sigma) v)) dt, std = g sqrt(-dt). At sigma = 1 the
    denominator takes the next sigma, as the authors do. The step to sigma = 0 returns x0 without
    noise, as the authors' does not: theirs leaves visible noise in the image (a deviation of 0.07
    after 28 steps with shift 3), and they drop that step from training.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.noise_level < math.inf:
            raise ValueError(f"noise_level must be finite and >= 0, but {self.noise_level} came")

    @property
    def stochastic(self) -> bool:
        return self.noise_level > 0

    def law(self, i: int, x: Tensor, output: Tensor) -> GaussianLaw:
        x0, x0_std, s, s_next = self.predict(i, x, output)
        v, dt = (x - x0) / s, s_next - s
        below_one = torch.where(s >= 1, expand(self.sigmas[1], x), s)
        g2 = self.noise_level**2 * s / (1 - below_one)
        mean = x + (v + g2 / (2 * s) * (x + (1 - s) * v)) * dt
        end = s_next == 0
        std = torch.where(end, 0.0, (g2 * -dt).sqrt())
        return GaussianLaw(x0, torch.where(end, x0, mean), std, x0_std)


class GaussianPolicy:
    """A network and a kernel: the `Policy` contract, but for four members a family supplies.

    Subclasses define ``encode``, ``decode``, ``latent_shape`` and ``predict``; the last calls
    ``self.denoiser`` (guidance included) and nothing else of the chain.
    """

    kernel: DDIM | DDPM | FlowRenoise | FlowSDE
    denoiser: torch.nn.Module
    guided: bool = False  #: whether ``predict`` applies classifier-free guidance
    _adapters_off: bool = False

    @property
    def num_steps(self) -> int:
        return self.kernel.num_steps

    @property
    def stochastic(self) -> bool:
        """Whether the chain has noise at all; steering needs it."""
        return self.kernel.stochastic

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        # quantised weights are integers
        return next(p.dtype for p in self.denoiser.parameters() if p.is_floating_point())

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""
        raise NotImplementedError

    def predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output at x and times t ``(b,)``, in the kernel's prediction type."""
        raise NotImplementedError

    def initial(self, condition: Condition, generator: Generators = None) -> Tensor:
        shape = (len(condition), *self.latent_shape(condition))
        return randn(shape, generator, device=self.device)

    def noise_to(self, x0: Tensor, i: int, generator: Generators = None) -> Tensor:
        """Draw x[i] from q(x[i] | x0): a clean sample noised to the level at which step i starts.

        Raises:
            ValueError: the chain has no step i.
        """
        self._check_step(i)
        a, s = self.kernel.level(i, x0)
        return a * x0 + s * randn(x0.shape, generator, dtype=x0.dtype, device=x0.device)

    def step_law(self, x: Tensor, i: int, condition: Condition) -> GaussianLaw:
        self._check_step(i)
        t = self.kernel.timesteps[i].to(self.device).expand(len(x))
        return self.kernel.law(i, x, self._predict(x, t, condition))

    def denoising_loss(
        self, x0: Tensor, condition: Condition, generator: Generators = None
    ) -> Float[Tensor, " b"]:
        """Mean squared error over dimensions at one uniform time and one noise per sample.

        Of the conditional prediction alone: guidance sharpens samples, but the guided output is no
        denoiser of the data, so that a loss on it would train something else.
        """
        # the uniform comes through a normal so that `randn` stays the one source of noise
        z = randn((len(x0), 1), generator, device=x0.device)[:, 0]
        u = torch.special.ndtr(z.double()).clamp(max=1 - 1e-6).float()  # below 1 in float32 still
        eps = randn(x0.shape, generator, device=x0.device, dtype=x0.dtype)
        return self.denoise(x0, u, eps, condition)[1]

    def denoise(
        self, x0: Tensor, u: Float[Tensor, " b"], eps: Tensor, condition: Condition
    ) -> tuple[Tensor, Float[Tensor, " b"]]:
        """Noise clean latents to uniform times u in [0, 1), and predict them, without guidance.

        Returns:
            The clean prediction, and the mean squared error of what the network is trained for.
        """
        a, s, t = self.kernel.trained_level(u, x0)
        plain = copy.copy(self)
        plain.guided = False
        x = a * x0 + s * eps
        output = plain._predict(x, t, condition)
        prediction, _ = to_x0_eps(self.kernel.prediction, x, output, a, s)
        clip = getattr(self.kernel, "clip", None)
        if clip is not None:
            prediction = prediction.clamp(-clip, clip)
        target = training_target(self.kernel.prediction, x0, eps, a, s)
        return prediction, ((output - target) ** 2).flatten(1).mean(1)

    def reference(self) -> GaussianPolicy:
        """Adapters switched off where the denoiser has them, else a frozen copy as it is now."""
        ref = copy.copy(self)
        if adapter_layers(self.denoiser):
            ref._adapters_off = True
        else:
            ref.denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)
        return ref

    def _check_step(self, i: int) -> None:
        if not 0 <= i < self.num_steps:
            raise ValueError(f"step {i} came, but the chain has steps 0..{self.num_steps - 1}")

    def _predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with _without_adapters(self.denoiser) if self._adapters_off else nullcontext():
            return self.predict(x.to(self.dtype), t, condition).to(x.dtype)


def adapter_layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a network that peft gave adapters."""
    return [m for m in network.modules() if hasattr(m, "_disable_adapters")]  # peft's mark


@contextmanager
def _without_adapters(network: torch.nn.Module) -> Iterator[None]:
    """Switch peft's layers off and back to what they were.

    peft's own ``disable_adapters`` and ``enable_adapters`` also change ``requires_grad``, and
    would switch on what the caller had switched off.
    """
    layers = adapter_layers(network)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was

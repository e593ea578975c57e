"""Gaussian kernels against diffusers' schedulers, torch's distributions and closed forms."""

import dataclasses
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffreward.policies.gaussian import (
    DDIM,
    DDPM,
    PREDICTIONS,
    FlowRenoise,
    FlowSDE,
    GaussianLaw,
    GaussianPolicy,
    to_x0_eps,
    training_target,
)
from diffreward.policies.pipelines import Sampling, build_kernel
from diffreward.policy import Condition, randn, sample_generators

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SHAPE = (2, 4, 8, 8)


def kernel_of(scheduler, name, steps, **options):
    return build_kernel(scheduler, name, Sampling(num_steps=steps, **options))


def assert_every_step_matches(kernel, scheduler, steps, **step_options):
    """The whole chain, each step's draw from the same noise; the first and the last included."""
    scheduler.set_timesteps(steps)
    assert kernel.num_steps == len(scheduler.timesteps)
    torch.testing.assert_close(kernel.timesteps, scheduler.timesteps)
    x, draw = torch.randn(SHAPE), torch.Generator()
    for i, t in enumerate(scheduler.timesteps):
        output = torch.randn(SHAPE)
        law = kernel.law(i, x, output)
        theirs = scheduler.step(output, t, x, generator=draw.manual_seed(i), **step_options)
        ours = law.sample(draw.manual_seed(i))
        torch.testing.assert_close(ours, theirs.prev_sample, **CLOSE)
        if hasattr(theirs, "pred_original_sample"):
            torch.testing.assert_close(law.x0, theirs.pred_original_sample, **CLOSE)
        x = ours
    return law


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_is_diffusers_step(prediction, eta, to_one):
    scheduler = DDIMScheduler(
        prediction_type=prediction, set_alpha_to_one=to_one, clip_sample=False, steps_offset=1
    )
    kernel = kernel_of(scheduler, "ddim", 6, eta=eta)
    last = assert_every_step_matches(kernel, scheduler, 6, eta=eta)
    assert last.deterministic == (eta == 0 or to_one)
    assert kernel.stochastic == (eta > 0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_spacing_and_clipping(spacing, clip):
    scheduler = DDIMScheduler(
        timestep_spacing=spacing, clip_sample=clip, clip_sample_range=0.7, steps_offset=1
    )
    kernel = kernel_of(scheduler, "ddim", 7, eta=0.8)
    assert kernel.clip == (0.7 if clip else None)
    assert_every_step_matches(kernel, scheduler, 7, eta=0.8)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_is_diffusers_step(prediction, variance):
    scheduler = DDPMScheduler(prediction_type=prediction, variance_type=variance, clip_sample=False)
    last = assert_every_step_matches(kernel_of(scheduler, "ddpm", 6), scheduler, 6)
    assert last.deterministic


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_spacing_and_clipping(spacing, clip):
    options = {"timestep_spacing": spacing, "clip_sample": clip, "steps_offset": 1}
    scheduler = DDPMScheduler(**options)
    last = assert_every_step_matches(kernel_of(scheduler, "ddpm", 7), scheduler, 7)
    assert last.deterministic


def test_ddpm_ends_without_noise_where_diffusers_does_not():
    """fixed_large with a last timestep above 0: the same mean, but no noise on the sample."""
    scheduler = DDPMScheduler(variance_type="fixed_large", steps_offset=1, clip_sample=False)
    kernel = kernel_of(scheduler, "ddpm", 5)
    scheduler.set_timesteps(5)
    x, output = torch.randn(2, *SHAPE)
    assert scheduler.timesteps[-1] == 1
    law, draw = kernel.law(4, x, output), torch.Generator().manual_seed(0)
    theirs = scheduler.step(output, scheduler.timesteps[-1], x, generator=draw).prev_sample
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        theirs - law.mean, (1 - kernel.alpha_bar[-1]).sqrt() * noise, **CLOSE
    )
    assert law.deterministic


def test_ddpm_refuses_learned_variances():
    with pytest.raises(ValueError, match="'learned_range' is not supported"):
        kernel_of(DDPMScheduler(variance_type="learned_range"), "ddpm", 4)


def test_ddim_at_eta_one_is_ddpm():
    """On one grid, without rounding, the two are the same chain."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    ddim = kernel_of(scheduler, "ddim", 5)
    ddpm = kernel_of(DDPMScheduler.from_config(scheduler.config), "ddpm", 5)
    for i in range(5):
        x, output = torch.randn(2, *SHAPE)
        a, b = ddim.law(i, x, output), ddpm.law(i, x, output)
        torch.testing.assert_close(a.mean, b.mean, **CLOSE)
        torch.testing.assert_close(a.std, b.std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_renoise_is_diffusers_stochastic_sampling(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True, shift=shift)
    kernel = kernel_of(scheduler, "flow_renoise", 5)
    last = assert_every_step_matches(kernel, scheduler, 5)
    assert last.deterministic


def test_flow_sde_by_hand():
    """sigma 0.5 -> 0.3, noise level 0.7, x = 1, v = 2."""
    kernel = FlowSDE(torch.tensor([500.0]), torch.tensor([0.5, 0.3]), noise_level=0.7)
    law = kernel.law(0, torch.ones(1, 1), torch.full((1, 1), 2.0))
    g2, dt = 0.49 * 0.5 / 0.5, -0.2
    mean = 1 + (2 + g2 / (2 * 0.5) * (1 + 0.5 * 2)) * dt
    torch.testing.assert_close(law.mean.item(), mean)
    torch.testing.assert_close(law.std.item(), math.sqrt(g2 * 0.2))
    torch.testing.assert_close(law.x0.item(), 1 - 0.5 * 2)


def test_flow_sde_keeps_the_marginals():
    """Data N(0, 1): the velocity is linear in x, so the chain's variance follows by recursion.

    The variance at sigma must stay (1 - sigma)^2 + sigma^2, up to the discretisation, which halves
    with the step.
    """

    def worst(steps: int) -> float:
        sigmas = torch.linspace(0.98, 0.02, steps, dtype=torch.float64)
        kernel = FlowSDE(sigmas[:-1] * 1000, sigmas, noise_level=0.7)
        variance, errors = (1 - sigmas[0]) ** 2 + sigmas[0] ** 2, []
        for i, s in enumerate(sigmas[:-1]):
            # E[eps - x0 | x] for x = (1 - s) x0 + s eps
            v = (s - (1 - s)) / ((1 - s) ** 2 + s**2)
            x = torch.ones(1, 1, dtype=torch.float64)
            law = kernel.law(i, x, v * x)
            variance = law.mean.item() ** 2 * variance + law.std.item() ** 2
            end = sigmas[i + 1]
            errors.append(abs(variance - ((1 - end) ** 2 + end**2)).item())
        return max(errors)

    assert worst(2000) < 2e-3
    assert worst(4000) < 0.6 * worst(2000)


def spread_after(kernel) -> float:
    """Standard deviation at the end for data N(0, 1) and the exact velocity, by recursion."""
    variance = 1.0
    for i, s in enumerate(kernel.sigmas[:-1]):
        v = (s - (1 - s)) / ((1 - s) ** 2 + s**2)  # E[eps - x0 | x] / x
        law = kernel.law(i, torch.ones(1, 1).double(), v * torch.ones(1, 1).double())
        variance = law.mean.item() ** 2 * variance + law.std.item() ** 2
    return math.sqrt(variance)


def test_flow_sde_keeps_the_spread_that_renoising_loses():
    """The figures `load_policy` and `FlowSDE` quote; the last step of both is free of noise."""
    s = torch.linspace(1, 1 / 28, 28, dtype=torch.float64)
    sigmas = torch.cat([3 * s / (1 + 2 * s), torch.zeros(1, dtype=torch.float64)])
    sde, renoise = FlowSDE(s * 1000, sigmas), FlowRenoise(s * 1000, sigmas)
    assert 0.93 < spread_after(sde) < 1.0
    assert 0.6 < spread_after(renoise) < 0.7
    x = torch.randn(1, 5).double()
    last = sde.law(27, x, x)
    assert last.deterministic and torch.equal(last.mean, last.x0)
    authors = 0.7 * (sigmas[27] / (1 - sigmas[27])).sqrt() * sigmas[27].sqrt()
    assert 0.06 < authors < 0.1


def test_predictions_are_inverses():
    x0, eps = torch.randn(2, *SHAPE, dtype=torch.float64)
    for prediction in PREDICTIONS:
        a, s = (0.3, 0.7) if prediction == "flow" else (0.6, 0.8)
        output = training_target(prediction, x0, eps, a, s)
        back = to_x0_eps(prediction, a * x0 + s * eps, output, a, s)
        torch.testing.assert_close(back, (x0, eps))
    with pytest.raises(ValueError, match="must be one of"):
        to_x0_eps("noise", x0, eps, 0.6, 0.8)


def law(mean, std, dtype=torch.float32):
    mean = torch.as_tensor(mean, dtype=dtype)
    std = torch.as_tensor(std, dtype=dtype).reshape(-1, *[1] * (mean.ndim - 1))
    return GaussianLaw(torch.zeros_like(mean), mean, std, torch.zeros_like(std))


def test_log_prob_and_kl_are_torchs():
    m, n, x = torch.randn(3, 3, 2, 5, dtype=torch.float64)
    p, q = law(m, [0.5, 1.0, 2.0], torch.float64), law(n, [0.7, 1.5, 0.4], torch.float64)
    P, Q = (torch.distributions.Normal(v.mean, v.std) for v in (p, q))
    torch.testing.assert_close(p.log_prob(x), P.log_prob(x).sum((1, 2)))
    kl = torch.distributions.kl_divergence(P, Q).sum((1, 2))
    torch.testing.assert_close(p.kl(q), kl)
    torch.testing.assert_close(p.take([2, 0]).log_prob(x[[2, 0]]), p.log_prob(x)[[2, 0]])


def test_log_prob_is_float32_for_half_precision_networks():
    half = law(torch.randn(2, 3), [1.0, 1.0]).mean.to(torch.bfloat16)
    p = law(half, [1.0, 1.0], torch.bfloat16)
    assert p.log_prob(half).dtype == torch.float32


def test_deterministic_steps_have_no_density():
    p = law(torch.randn(2, 3), [0.0, 0.0])
    assert p.deterministic and torch.equal(p.sample(), p.mean)
    assert torch.equal(p.log_prob(torch.randn(2, 3)), torch.zeros(2))
    assert torch.equal(p.kl(law(torch.randn(2, 3), [0.0, 0.0])), torch.zeros(2))
    mean = torch.randn(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(law(mean, [0.0, 1.0]).log_prob(torch.zeros(2, 3)).sum(), mean)
    assert gradient.isfinite().all() and (gradient[0] == 0).all() and (gradient[1] != 0).all()


def test_shift_tilts_a_gaussian_exactly():
    """N(m, s^2) exp(g x) is N(m + s^2 g, s^2): log-ratios differ from g x by a constant."""
    p, g, x = law(torch.randn(1, 4), [0.6]), torch.randn(1, 4), torch.randn(50, 4)
    ratio = torch.stack([p.shift(g).log_prob(v[None]) - p.log_prob(v[None]) for v in x])[:, 0]
    gap = ratio - (x * g).sum(1)
    torch.testing.assert_close(gap, gap[:1].expand(50), rtol=1e-4, atol=1e-4)


def test_sample_has_no_gradient_and_rsample_has():
    mean = torch.zeros(2, 3, requires_grad=True)
    p = law(mean, [1.0, 2.0])
    p = GaussianLaw(p.x0, mean, p.std, p.x0_std)
    assert not p.sample().requires_grad
    p.rsample().sum().backward()
    assert torch.equal(mean.grad, torch.ones(2, 3))


def test_moments_of_the_draws():
    p = law(torch.full((20_000, 1), 3.0), torch.full((20_000,), 0.5))
    x = p.sample(torch.Generator().manual_seed(0))
    assert abs(x.mean() - 3) < 4 * 0.5 / math.sqrt(20_000)
    assert abs(x.std() - 0.5) < 0.01


def test_a_samples_noise_does_not_depend_on_its_neighbours():
    p = law(torch.zeros(3, 2, 2), [1.0, 1.0, 1.0])
    together = p.sample(sample_generators(0, 3, 1))
    alone = p.take([1]).sample(sample_generators(0, 3, 1)[1:2])
    assert torch.equal(together[1:2], alone)


class Zero(GaussianPolicy):
    """A network that outputs nothing."""

    def __init__(self, kernel):
        self.kernel, self.denoiser = kernel, torch.nn.Linear(1, 1)

    def latent_shape(self, condition):
        return (3, 4)

    def predict(self, x, t, condition):
        return torch.zeros_like(x)


def test_denoising_loss_of_a_zero_network_is_the_mean_squared_target():
    """flow: the target is eps - x0, so the loss of x0 = 2 is mean((eps - 2)^2), eps known."""
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    policy = Zero(FlowRenoise(sigmas[:2] * 1000, sigmas))
    generators = sample_generators(3, 2, 1)
    loss = policy.denoising_loss(torch.full((2, 3, 4), 2.0), Condition(["", ""]), generators)
    generators = sample_generators(3, 2, 1)
    randn((2, 1), generators)  # the times
    eps = randn((2, 3, 4), generators)
    torch.testing.assert_close(loss, ((eps - 2) ** 2).mean((1, 2)))


def test_training_times_cover_the_schedule_uniformly():
    times = []

    class Watching(Zero):
        def predict(self, x, t, condition):
            times.append(t)
            return x

    kernel = kernel_of(DDIMScheduler(clip_sample=False), "ddim", 4)
    policy = Watching(kernel)
    policy.denoising_loss(torch.zeros(8000, 3, 4), Condition([""] * 8000), torch.Generator())
    t = times[0]
    assert t.min() >= 0 and t.max() <= 999
    counts = torch.histc(t.float(), 10, 0, 1000)
    assert (counts - 800).abs().max() < 5 * math.sqrt(800 * 0.9)


def test_denoising_loss_is_that_of_the_conditional_prediction():
    """Guidance is for sampling; the loss of the guided output would train something else."""

    class Guided(Zero):
        guided = True

        def predict(self, x, t, condition):
            return torch.full_like(x, 5.0) if self.guided else torch.zeros_like(x)

    sigmas = torch.tensor([1.0, 0.5, 0.0])
    kernel = FlowRenoise(sigmas[:2] * 1000, sigmas)
    args = (torch.ones(1, 3, 4), Condition([""]))
    policy = Guided(kernel)
    plain = Zero(kernel).denoising_loss(*args, sample_generators(0, 1, 1))
    torch.testing.assert_close(policy.denoising_loss(*args, sample_generators(0, 1, 1)), plain)
    assert policy.guided and policy.step_law(*args[:1], 0, args[1]).x0.mean() < -3


class Knowing(GaussianPolicy):
    """A network that knows x0, and so answers exactly, whatever it is asked for."""

    def __init__(self, kernel, x0, prediction):
        self.kernel = dataclasses.replace(kernel, prediction=prediction)
        self.denoiser = torch.nn.Linear(1, 1)
        self.known = x0

    def predict(self, x, t, condition):
        if self.kernel.prediction == "flow":
            s = (t / 1000).view(-1, 1, 1)
            return (x - self.known) / s
        ab = self.kernel.alphas_cumprod[t].view(-1, 1, 1)
        eps = (x - ab.sqrt() * self.known) / (1 - ab).sqrt()
        return {
            "epsilon": eps,
            "sample": self.known,
            "v_prediction": ab.sqrt() * eps - (1 - ab).sqrt() * self.known,
        }[self.kernel.prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoise_finds_what_the_network_knows(prediction):
    """At every time, with an error of nothing; of another x0, the error is known in closed form."""
    flow = prediction == "flow"
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(clip_sample=False)
    kernel = kernel_of(scheduler, "flow_renoise" if flow else "ddim", 4)
    x0, eps = torch.randn(2, 5, 3, 4)
    policy = Knowing(kernel, x0, prediction)
    u = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.999])
    args = eps, Condition([""] * 5)
    found, error = policy.denoise(x0, u, *args)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)
    assert error.abs().max() < 1e-6
    # a network convinced of x0 + 1, by the target that its answer misses
    policy.known = x0 + 1
    found, error = policy.denoise(x0, u, *args)
    torch.testing.assert_close(found, x0 + 1, rtol=1e-3, atol=1e-3)
    a2 = DDIMScheduler().alphas_cumprod[(u * 1000).long()]
    missed = {
        "epsilon": a2 / (1 - a2), "sample": torch.ones(5), "v_prediction": 1 / (1 - a2),
        "flow": 1 / u**2,
    }[prediction]  # fmt: skip
    torch.testing.assert_close(error, missed, rtol=1e-3, atol=1e-4)
    if not flow:
        policy.kernel = dataclasses.replace(policy.kernel, clip=0.3)
        clipped, same = policy.denoise(x0, u, *args)
        torch.testing.assert_close(clipped, found.clamp(-0.3, 0.3))
        torch.testing.assert_close(same, error)  # of what is trained, not of what is clipped


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoising_loss_is_the_textbooks(prediction):
    """Written out again, with the times and the noise of the same generators."""
    flow = prediction == "flow"
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(clip_sample=False)
    kernel = kernel_of(scheduler, "flow_renoise" if flow else "ddim", 4)
    x0, other = torch.randn(2, 3, 3, 4)
    policy = Knowing(kernel, other, prediction)
    loss = policy.denoising_loss(x0, Condition([""] * 3), sample_generators(1, 3, 1))
    generators = sample_generators(1, 3, 1)
    u = torch.special.ndtr(torch.cat([torch.randn(1, 1, generator=g) for g in generators])[:, 0])
    eps = torch.cat([torch.randn(1, 3, 4, generator=g) for g in generators])
    for j in range(3):
        if flow:
            a, s, t = 1 - u[j], u[j], 1000 * u[j]
        else:
            t = (1000 * u[j]).long()
            a, s = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5
        x = a * x0[j] + s * eps[j]
        target = {"epsilon": eps[j], "sample": x0[j], "v_prediction": a * eps[j] - s * x0[j],
                  "flow": eps[j] - x0[j]}[prediction]  # fmt: skip
        policy.known = other[j : j + 1]
        output = policy.predict(x[None], t[None], None)[0]
        torch.testing.assert_close(loss[j], (output - target).square().mean(), rtol=1e-4, atol=1e-5)


def test_denoising_loss_of_half_precision_latents_stays_on_the_schedule():
    policy = Zero(kernel_of(DDIMScheduler(clip_sample=False), "ddim", 4))
    x0 = torch.zeros(4000, 3, 4, dtype=torch.bfloat16)
    loss = policy.denoising_loss(x0, Condition([""] * 4000), torch.Generator().manual_seed(0))
    assert loss.isfinite().all()


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_its_range(eta):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        kernel_of(DDIMScheduler(), "ddim", 4, eta=eta)


@pytest.mark.parametrize("noise_level", [-0.1, math.inf, math.nan])
def test_noise_level_outside_its_range(noise_level):
    with pytest.raises(ValueError, match="noise_level must be finite"):
        kernel_of(FlowMatchEulerDiscreteScheduler(), "flow_sde", 4, noise_level=noise_level)


def test_steps_outside_the_chain_are_refused():
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    policy = Zero(FlowRenoise(sigmas[:2] * 1000, sigmas))
    for i in (-1, 2):
        with pytest.raises(ValueError, match="steps 0..1"):
            policy.step_law(torch.zeros(1, 3, 4), i, Condition([""]))


NOISED = [
    (DDIMScheduler(clip_sample=False, steps_offset=1), "ddim"),
    (DDPMScheduler(clip_sample=False, timestep_spacing="trailing"), "ddpm"),
    (FlowMatchEulerDiscreteScheduler(shift=3.0), "flow_renoise"),
    (FlowMatchEulerDiscreteScheduler(shift=3.0), "flow_sde"),
]


@pytest.mark.parametrize(("scheduler", "name"), NOISED, ids=[name for _, name in NOISED])
def test_noise_to_is_diffusers_noising(scheduler, name):
    policy = Zero(kernel_of(scheduler, name, 6))
    scheduler.set_timesteps(6)
    add_noise = (
        (lambda x, eps, t: scheduler.scale_noise(x, t, eps))
        if name.startswith("flow")
        else scheduler.add_noise
    )
    x0 = torch.randn(2, 3, 4)
    eps = randn((2, 3, 4), sample_generators(0, 2, 1))
    for i, t in enumerate(scheduler.timesteps):
        ours = policy.noise_to(x0, i, sample_generators(0, 2, 1))
        torch.testing.assert_close(ours, add_noise(x0, eps, t[None].expand(2)), **CLOSE)
        alone = policy.noise_to(x0[1:], i, sample_generators(0, 2, 1)[1:])
        torch.testing.assert_close(ours[1:], alone)


@pytest.mark.parametrize(("scheduler", "name"), NOISED, ids=[name for _, name in NOISED])
def test_noise_to_is_the_level_the_step_starts_from(scheduler, name):
    """The network that knows the noise finds the clean sample again, whatever the step."""
    kernel = kernel_of(scheduler, name, 6)
    policy, x0 = Zero(kernel), torch.randn(2, 3, 4)
    eps = randn((2, 3, 4), sample_generators(0, 2, 1))
    output = eps - x0 if kernel.prediction == "flow" else eps
    for i in range(6):
        x = policy.noise_to(x0, i, sample_generators(0, 2, 1))
        torch.testing.assert_close(kernel.law(i, x, output).x0, x0, rtol=1e-3, atol=1e-4)
    for i in (-1, 6):
        with pytest.raises(ValueError, match="steps 0..5"):
            policy.noise_to(x0, i)


def test_kernels_are_the_classes_they_say():
    assert isinstance(kernel_of(DDIMScheduler(), "ddim", 4), DDIM)
    assert isinstance(kernel_of(DDIMScheduler(), "ddpm", 4), DDPM)

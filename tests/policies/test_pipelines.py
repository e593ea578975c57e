"""Policies from pipelines: parity with the pipelines themselves, and errors before compute.

Tiny random networks; with the same generators a rollout and ``pipe(...)`` must make the same image.
Stable Diffusion 3 and FLUX do not hand their generator to the scheduler, whose noise then comes
from torch's global generator: there both sides are seeded globally.
"""

import diffusers
import pytest
import tiny
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from diffreward.policies import load_policy
from diffreward.policies.pipelines import decode_vae
from diffreward.policy import Policy, rollout, sample_generators
from diffreward.samples import Samples

PROMPTS = ["a cat", "dog on a log"]
STEPS = 5
CLOSE = {"rtol": 0, "atol": 2e-5}  # images in [0, 1]; seen: below 5e-6


def images(policy, prompts=PROMPTS, seed=0, step_noise="generators"):
    """A rollout, decoded; the steps' noise from the generators or from torch's global one."""
    with torch.no_grad():
        condition = policy.encode(prompts)
        generators = sample_generators(seed, len(prompts), 1)
        x = policy.initial(condition, generators)
        if step_noise == "global":
            torch.manual_seed(7)
            generators = None
        final = rollout(policy, condition, generators, x=x).final
        return policy.decode(final, condition)


def reference_images(pipe, seed=0, **options):
    torch.manual_seed(7)
    return pipe(
        PROMPTS, generator=sample_generators(seed, 2, 1), num_inference_steps=STEPS,
        output_type="pt", height=16, width=16, **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_unet_families_match_their_pipelines(family, scale):
    pipe = getattr(tiny, family)()
    policy = load_policy(pipe, num_steps=STEPS, guidance_scale=scale)
    ours = images(policy)
    assert isinstance(policy, Policy) and isinstance(ours, Samples)
    assert ours.modality == "image" and ours.prompts == PROMPTS and ours.data.dtype == torch.float32
    theirs = reference_images(pipe, eta=1.0, guidance_scale=scale)
    torch.testing.assert_close(ours.data, theirs, **CLOSE)
    assert (theirs[0] - theirs[1]).abs().max() > 0.01  # the comparison has something to compare


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_negative_prompt(family):
    pipe = getattr(tiny, family)()
    policy = load_policy(pipe, num_steps=STEPS, guidance_scale=5.0, negative_prompt="bad")
    theirs = reference_images(pipe, eta=1.0, guidance_scale=5.0, negative_prompt=["bad"] * 2)
    torch.testing.assert_close(images(policy).data, theirs, **CLOSE)
    plain = load_policy(pipe, num_steps=STEPS, guidance_scale=5.0)
    assert (images(plain).data - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dynamic", [False, True])
def test_sd3_matches_its_pipeline(scale, dynamic):
    flow = type(tiny.FLOW).from_config(tiny.FLOW.config, use_dynamic_shifting=dynamic)
    pipe = tiny.sd3(flow)
    policy = load_policy(
        pipe, kernel="flow_renoise", num_steps=STEPS, guidance_scale=scale, height=16, width=16
    )
    theirs = reference_images(pipe, guidance_scale=scale)
    torch.testing.assert_close(images(policy, step_noise="global").data, theirs, **CLOSE)


@pytest.mark.parametrize("dynamic", [False, True])
def test_flux_matches_its_pipeline(dynamic):
    flow = type(tiny.FLOW).from_config(tiny.FLOW.config, use_dynamic_shifting=dynamic)
    pipe = tiny.flux(flow)
    policy = load_policy(pipe, kernel="flow_renoise", num_steps=STEPS, height=16, width=16)
    theirs = reference_images(pipe)
    torch.testing.assert_close(images(policy, step_noise="global").data, theirs, **CLOSE)


def test_ddpm_matches_its_pipeline():
    pipe = tiny.ddpm()
    ours = images(load_policy(pipe, num_steps=STEPS), prompts=["", ""])
    theirs = pipe(
        2, generator=sample_generators(0, 2, 1), num_inference_steps=STEPS, output_type="pt"
    ).images
    torch.testing.assert_close(ours.data, theirs, **CLOSE)


def test_ddim_pipeline_matches():
    pipe = tiny.quiet(DDIMPipeline(tiny.ddpm_part(), DDIMScheduler()))
    policy = load_policy(pipe, num_steps=STEPS, eta=0.5)
    theirs = pipe(
        2, generator=sample_generators(0, 2, 1), num_inference_steps=STEPS, eta=0.5,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(images(policy, prompts=["", ""]).data, theirs, **CLOSE)


@pytest.mark.parametrize("steps", [4, 7, 30])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_timesteps_are_the_schedulers(steps, spacing):
    """Whatever the rounding: 1000 / 7 and 1000 / 30 are no integers."""
    pipe = tiny.sd(type(tiny.DDIM).from_config(tiny.DDIM.config, timestep_spacing=spacing))
    policy = load_policy(pipe, num_steps=steps)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        x, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
        step = scheduler.step(output, t, x, eta=0.0)
        law = type(policy.kernel)(**{**vars(policy.kernel), "eta": 0.0}).law(i, x, output)
        torch.testing.assert_close(law.mean, step.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(law.x0, step.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_schedulers_of_other_classes_give_unclipped_ddim():
    """Stable Diffusion ships PNDM, whose configuration need not name clip_sample."""
    pndm = PNDMScheduler(**tiny.BETAS, skip_prk_steps=True, steps_offset=1)
    assert "clip_sample" not in pndm.config
    pipe = tiny.sd(pndm)
    policy = load_policy(pipe, num_steps=STEPS)
    assert policy.kernel.clip is None
    assert type(pipe.scheduler) is PNDMScheduler and pipe.scheduler.num_inference_steps is None
    ddim = load_policy(tiny.sd(), num_steps=STEPS)
    torch.testing.assert_close(policy.kernel.alpha_bar, ddim.kernel.alpha_bar)
    assert load_policy(tiny.sd(EulerDiscreteScheduler(**tiny.BETAS))).kernel.clip is None


def test_flow_kernels():
    pipe = tiny.sd3()
    assert load_policy(pipe, height=16, width=16).stochastic
    sde = load_policy(pipe, kernel="flow_sde", noise_level=0.0, num_steps=STEPS)
    assert not sde.stochastic
    x = torch.randn(2, 4, 8, 8)
    pipe.scheduler.set_timesteps(STEPS)
    s, s_next = pipe.scheduler.sigmas[1:3]
    law = sde.kernel.law(1, x, output := torch.randn(2, 4, 8, 8))
    torch.testing.assert_close(law.mean, x + (s_next - s) * output)  # Euler's step


def test_conditions_can_be_taken_and_repeated():
    policy = load_policy(tiny.sd(), num_steps=2, guidance_scale=3.0)
    condition = policy.encode(PROMPTS).repeat(3).take([4, 0])
    x = torch.randn(2, *policy.latent_shape(condition))
    direct = policy.step_law(x, 1, policy.encode(PROMPTS[::-1]))
    torch.testing.assert_close(policy.step_law(x, 1, condition).mean, direct.mean)


def test_decode_is_differentiable_and_undecorated():
    policy = load_policy(tiny.sd(), num_steps=2)
    condition = policy.encode(["a"])
    x = policy.initial(condition).requires_grad_()
    policy.decode(policy.step_law(x, 0, condition).x0, condition).data.sum().backward()
    assert x.grad.abs().max() > 0


def test_half_precision_networks_keep_float32_latents():
    pipe = tiny.sd()
    unet = tiny.unet().to(torch.bfloat16)
    pipe.register_modules(unet=unet, vae=tiny.vae().to(torch.bfloat16))
    policy = load_policy(pipe, num_steps=2)
    condition = policy.encode(["a"])  # by a float32 text encoder
    assert policy.dtype == torch.bfloat16
    with torch.no_grad():
        law = policy.step_law(policy.initial(condition), 0, condition)
        x = law.sample()
        assert law.mean.dtype == x.dtype == torch.float32
        assert law.log_prob(x).dtype == torch.float32
        assert policy.decode(x, condition).data.dtype == torch.float32


def test_reference_is_the_policy_before_training():
    pipe = tiny.sd()
    pipe.register_modules(unet=tiny.unet())
    policy = load_policy(pipe, num_steps=2)
    reference = policy.reference()
    condition = policy.encode(["a"])
    x = policy.initial(condition)
    before = policy.step_law(x, 0, condition)
    with torch.no_grad():
        policy.denoiser.conv_in.weight += 0.1
    after = policy.step_law(x, 0, condition)
    torch.testing.assert_close(reference.step_law(x, 0, condition).mean, before.mean)
    assert (after.mean - before.mean).abs().max() > 1e-4
    assert not any(p.requires_grad for p in reference.denoiser.parameters())


def test_reference_of_an_adapter_switches_it_off():
    pipe = tiny.sd()
    pipe.register_modules(unet=tiny.unet())
    policy = load_policy(pipe, num_steps=2)
    condition = policy.encode(["a"])
    x = policy.initial(condition)
    before = policy.step_law(x, 0, condition).mean
    policy.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for name, p in policy.denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    reference = policy.reference()
    assert reference.denoiser is policy.denoiser  # no second copy in memory
    torch.testing.assert_close(reference.step_law(x, 0, condition).mean, before)
    assert (policy.step_law(x, 0, condition).mean - before).abs().max() > 1e-4


def test_reference_leaves_adapters_as_they_were():
    pipe = tiny.sd()
    pipe.register_modules(unet=tiny.unet())
    policy = load_policy(pipe, num_steps=2)
    policy.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    condition, reference = policy.encode(["a"]), policy.reference()
    x = policy.initial(condition)

    def state():
        layers = [m for m in policy.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        trainable = [p.requires_grad for p in policy.denoiser.parameters()]
        return [layer.disable_adapters for layer in layers], trainable

    for change in (lambda: None, policy.denoiser.disable_adapters, policy.denoiser.requires_grad_):
        change()
        before = state()
        reference.step_law(x, 0, condition)
        assert state() == before
    # a graph made before the reference was asked still reaches the adapters
    policy.denoiser.enable_adapters()
    mean = policy.step_law(x, 0, condition).mean
    reference.step_law(x, 0, condition)
    mean.sum().backward()
    assert any(p.grad is not None for n, p in policy.denoiser.named_parameters() if "lora" in n)


def test_denoising_loss_is_the_mean_squared_error_of_the_output():
    policy = load_policy(tiny.sd(), num_steps=2, guidance_scale=1.0)
    condition = policy.encode(PROMPTS)
    x0 = policy.initial(condition)
    with torch.no_grad():
        loss = policy.denoising_loss(x0, condition, sample_generators(1, 2, 1))
        again = policy.denoising_loss(x0, condition, sample_generators(1, 2, 1))
        alone = policy.denoising_loss(x0[1:], condition.take([1]), sample_generators(1, 2, 1)[1:])
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(loss[1:], alone)  # its (t, noise) do not depend on the batch
    policy.denoiser = ZeroNetwork(policy.denoiser)
    zero = policy.denoising_loss(x0.new_zeros(200, 4, 8, 8), policy.encode(["a"]).repeat(200))
    # an epsilon network that outputs 0 errs by E[eps^2] = 1 per dimension; 51,200 draws
    assert abs(zero.mean() - 1) < 0.05


class ZeroNetwork(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.config = network, network.config

    def forward(self, x, t, **_):
        return type("Output", (), {"sample": torch.zeros_like(x)})


def test_load_from_a_folder(tmp_path):
    pipe = tiny.sd()
    pipe.save_pretrained(tmp_path / "model")
    ours = images(load_policy(str(tmp_path / "model"), num_steps=2, guidance_scale=2.0))
    theirs = images(load_policy(pipe, num_steps=2, guidance_scale=2.0))
    torch.testing.assert_close(ours.data, theirs.data)


@pytest.mark.parametrize(
    "spec, error, words",
    [
        ("./no/such/folder", FileNotFoundError, "does not exist"),
        ("no-such-folder", FileNotFoundError, "does not exist"),
        ("nobody/nothing-of-the-kind", FileNotFoundError, "hub.*could not be reached"),
        ("embedded:emojis", ValueError, "did you mean 'embedded:emoji'"),
        (".", FileNotFoundError, "model_index.json"),
        (object(), ValueError, "no policy for object.*StableDiffusionPipeline"),
    ],
)
def test_models_that_cannot_be_loaded(spec, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        load_policy(spec)


def test_bad_options():
    pipe = tiny.sd()
    with pytest.raises(ValueError, match="did you mean 'ddim'"):
        load_policy(pipe, kernel="ddimm")
    with pytest.raises(ValueError, match="flow_sde.*does not fit StableDiffusionPipeline"):
        load_policy(pipe, kernel="flow_sde")
    with pytest.raises(ValueError, match="ddim.*does not fit StableDiffusion3Pipeline"):
        load_policy(tiny.sd3(), kernel="ddim")
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        load_policy(pipe, num_steps=0)
    with pytest.raises(ValueError, match="multiples of 2"):
        load_policy(pipe, height=15)
    thresholding = type(tiny.DDIM).from_config(tiny.DDIM.config, thresholding=True)
    with pytest.raises(ValueError, match="thresholding"):
        load_policy(tiny.sd(thresholding))
    with pytest.raises(ValueError, match="takes prompts only, but image came"):
        load_policy(pipe).encode(["a"], image=None)
    for prompts in ("a cat", []):
        with pytest.raises(ValueError, match="takes a list of prompts, at least one"):
            load_policy(pipe).encode(prompts)
    with pytest.raises(ValueError, match="1000 steps reach beyond the 1000 of training"):
        load_policy(pipe, num_steps=1000)  # steps_offset moves them by one
    assert not load_policy(pipe, eta=0.0).stochastic


FLOW_SOLVER = DPMSolverMultistepScheduler(
    use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
)


@pytest.mark.parametrize(
    "build, scheduler, words",
    [
        (tiny.sd, EDMEulerScheduler(), "ddim.*EDMEulerScheduler; give the pipeline a DDIM"),
        (tiny.sd, FlowMatchEulerDiscreteScheduler(), "ddim.*FlowMatchEulerDiscreteScheduler"),
        (tiny.sd, FLOW_SOLVER, "prediction_type must be one of.*'flow_prediction' came"),
        (tiny.sd3, FLOW_SOLVER, "flow_.*DPMSolverMultistepScheduler; give the pipeline a FlowM"),
        (tiny.flux, FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "flow_"),
    ],
)
def test_schedulers_of_another_path_are_refused(build, scheduler, words):
    """diffusers would fill in its defaults and sample from another model, silently."""
    with pytest.raises(ValueError, match=words):
        load_policy(build(scheduler), height=16, width=16)


def pixels(channels, out_channels):
    return DDPMPipeline(tiny.ddpm_unet(in_channels=channels, out_channels=out_channels), DDPM)


DDPM = DDPMScheduler(variance_type="learned_range")


@pytest.mark.parametrize("kernel", ["ddim", "ddpm"])
def test_networks_that_predict_variances_are_refused(kernel):
    with pytest.raises(ValueError, match="takes 3 channels and returns 6: networks that predict"):
        load_policy(pixels(3, 6), kernel=kernel)


def test_grey_images_become_rgb_and_other_channels_are_refused():
    policy = load_policy(pixels(1, 1), num_steps=2, kernel="ddim")
    data = images(policy, [""]).data
    assert data.shape == (1, 3, 8, 8) and torch.equal(data[:, 0], data[:, 2])
    with pytest.raises(ValueError, match="1 or 3 channels, but this model's have 4"):
        load_policy(pixels(4, 4), kernel="ddim")


def test_a_long_prompt_is_warned_about(caplog):
    diffusers.utils.logging.enable_propagation()
    try:
        load_policy(tiny.sd()).encode(["many words " * 20])
    finally:
        diffusers.utils.logging.disable_propagation()
    assert "truncated" in caplog.text


def test_a_half_precision_vae_that_overflows_is_decoded_in_float32():
    plain, half = tiny.vae(), tiny.vae(force_upcast=True)
    half.load_state_dict(plain.state_dict())
    half.to(torch.float16)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(decode_vae(half, x), decode_vae(plain, x), rtol=0, atol=5e-3)
    assert half.dtype == torch.float16


def test_the_gradient_of_a_half_precision_vae_that_overflows_is_that_in_float32():
    plain, half = tiny.vae(), tiny.vae(force_upcast=True)
    half.load_state_dict(plain.state_dict())
    half.to(torch.float16)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    (ours,) = torch.autograd.grad(decode_vae(half, x).square().sum(), x)
    (theirs,) = torch.autograd.grad(decode_vae(plain, x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3 * theirs.abs().max().item())
    assert half.dtype == torch.float16


def test_latents_with_statistics():
    """SDXL-like VAEs whose latents have a mean and deviation: x * std / scale + mean."""
    plain = tiny.vae(scaling_factor=1.0)
    config = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    other = tiny.vae(scaling_factor=0.5, **config)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 8, 8)
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in config.values())
    with torch.no_grad():
        torch.testing.assert_close(decode_vae(other, x), decode_vae(plain, x * std / 0.5 + mean))

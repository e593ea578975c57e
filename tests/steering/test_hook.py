"""The pipeline hook against the unhooked pipeline, the schedulers' own numbers and closed forms."""

import copy
import subprocess
import sys
import warnings

import pytest
import tiny as pipes
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

from diffreward.policies import load_policy
from diffreward.policy import sample_generators
from diffreward.samples import Samples
from diffreward.steering.feynman_kac import steer
from diffreward.steering.hook import clean_prediction, steered

STEPS, K = 5, 2
PROMPTS = ["a cat", "two dogs"]
BETAS = {**pipes.BETAS, "clip_sample": False}
SIGMAS = pipes.BETAS

SCHEDULERS = {
    "ddim": pipes.DDIM,
    "ddpm": DDPMScheduler(**BETAS),
    "euler_a": EulerAncestralDiscreteScheduler(**SIGMAS),
    "sde_dpm++": DPMSolverMultistepScheduler(**SIGMAS, algorithm_type="sde-dpmsolver++"),
    "sde_dpm++_karras": DPMSolverMultistepScheduler(
        **SIGMAS, algorithm_type="sde-dpmsolver++", solver_order=3, use_karras_sigmas=True
    ),
    "sde_dpm": DPMSolverMultistepScheduler(
        **SIGMAS, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"
    ),
    "lcm": LCMScheduler(**BETAS),
    "flow": pipes.FLOW,
}
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(9))
SIZE = {"height": 16, "width": 16}

FAMILIES = {
    "sd": SIZE,
    "sdxl": SIZE,
    "sd3": SIZE,
    "flux": {"height": 16, "width": 24},  # packed latents: the shape alone does not tell
    "controlnet": {"image": IMAGE, **SIZE},
    "img2img": {"image": IMAGE, "strength": 0.8},
    "animate": {"num_frames": 2, **SIZE},
    "wan": {"num_frames": 5, "max_sequence_length": 16, **SIZE},
    "ddpm": {},
}


def brightness(samples: Samples) -> torch.Tensor:
    return samples.data.flatten(1).mean(1)


def generate(family, pipe, *, k=K, prompts=PROMPTS, seed=0, generator="list", **more):
    """One call of a pipeline, with ``k`` pictures of each prompt; pictures, prompt-major."""
    torch.manual_seed(seed)
    n = len(prompts) * k
    kwargs = {**FAMILIES[family], "num_inference_steps": STEPS, "output_type": "pt", **more}
    if generator == "list":
        generator = sample_generators(seed, len(prompts), k)
    elif generator == "one":
        generator = torch.Generator().manual_seed(seed)
    if family not in ("sd3", "flux", "wan", "ddpm"):
        kwargs.setdefault("eta", 1.0)
    if family == "ddpm":
        images = pipe(n, generator=generator, num_inference_steps=STEPS, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    if family == "wan":
        return pipe(prompts, num_videos_per_prompt=k, generator=generator, **kwargs).frames
    if family == "animate":  # it ignores num_videos_per_prompt
        repeated = [p for p in prompts for _ in range(k)]
        return pipe(repeated, generator=generator, **kwargs).frames
    kwargs.setdefault("num_images_per_prompt", k)
    return pipe(prompts, generator=generator, **kwargs).images


def network(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def count_calls(pipe):
    calls = []
    handle = network(pipe).register_forward_hook(lambda *a: calls.append(1))
    return calls, handle


@pytest.fixture(autouse=True)
def no_noise_about_roots():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="all .* particles descend")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


# --------------------------------------------------------------------------------------------
# The pipeline is the pipeline
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lambda_zero_is_the_unhooked_pipeline_bit_for_bit_at_no_extra_call(family):
    pipe = getattr(pipes, family)()
    calls, handle = count_calls(pipe)
    plain = generate(family, pipe)
    unhooked = len(calls)
    with steered(pipe, brightness, num_particles=K, lmbda=0.0, ess_threshold=None) as run:
        images = generate(family, pipe)
    handle.remove()
    assert torch.equal(images, plain)
    assert len(calls) == 2 * unhooked
    assert run.result.ancestors.tolist() == [[[0, 1]] * 2] * len(run.result.steps)
    # a selecting run makes other images, by as many network calls
    with steered(pipe, brightness, num_particles=K, lmbda=1e6, ess_threshold=None) as run:
        images = generate(family, pipe)
    assert not torch.equal(images, plain)
    assert (run.result.ancestors != torch.arange(K)).any()
    # the next call is unhooked again
    assert torch.equal(generate(family, pipe), plain)


@pytest.mark.parametrize(
    "name, generator",
    [
        *((name, "list") for name in SCHEDULERS if name != "flow"),
        *((name, other) for name in ("ddim", "sde_dpm++") for other in ("one", None)),
    ],
)
def test_lambda_zero_with_every_scheduler(name, generator):
    pipe = pipes.sd(SCHEDULERS[name])
    plain = generate("sd", pipe, generator=generator)
    with steered(pipe, brightness, num_particles=K, lmbda=0.0, schedule=1) as run:
        images = generate("sd", pipe, generator=generator)
    assert torch.equal(images, plain)
    assert torch.isfinite(images).all()
    assert run.result.steps == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n != "flow"])
def test_one_particle_is_the_unhooked_pipeline(name):
    pipe = pipes.sd(SCHEDULERS[name])
    plain = generate("sd", pipe, k=1)
    with steered(pipe, brightness, num_particles=1, lmbda=1e4):
        assert torch.equal(generate("sd", pipe, k=1), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_terminal_reward_is_that_of_the_returned_images(family):
    pipe = getattr(pipes, family)()
    with steered(pipe, brightness, num_particles=K, lmbda=1e4, decode_batch=3) as run:
        images = generate(family, pipe)
    result = run.result
    assert result.particles.modality == ("video" if family in ("animate", "wan") else "image")
    assert result.particles.data.shape == images.shape
    torch.testing.assert_close(result.particles.data, images, atol=2e-6, rtol=0)
    torch.testing.assert_close(result.scores.value, images.flatten(1).mean(1))
    expected = None if family == "ddpm" else [p for p in PROMPTS for _ in range(K)]
    assert result.particles.prompts == expected
    assert result.samples.prompts == (expected and PROMPTS)
    best = images.flatten(1).mean(1).view(2, K).amax(1)
    torch.testing.assert_close(brightness(result.samples), best)


def test_only_scheduled_steps_are_decoded_and_in_chunks():
    pipe, sizes = pipes.sd(), []

    def decode(latents):
        sizes.append(len(latents))
        return latents[:, :3].sigmoid()

    with steered(
        pipe, brightness, num_particles=4, decode=decode, decode_batch=3, schedule=[1, 3]
    ) as run:
        generate("sd", pipe, k=4, prompts=["a"])
    # two at the very first step show whether the reward works at all
    assert sizes == [2, 3, 1, 3, 1, 3, 1]
    assert run.result.particles.data.shape == (4, 3, 8, 8)


def test_image_to_image_counts_the_steps_that_run():
    pipe = pipes.img2img()
    with steered(pipe, brightness, num_particles=K, lmbda=1e4, schedule=1) as run:
        generate("img2img", pipe, strength=0.6)
    assert run.result.steps == [0, 1]  # 3 of the 5 run; the last is the terminal reward
    assert run.result.ess.shape == (3, 2)


# --------------------------------------------------------------------------------------------
# The clean prediction is the scheduler's own
# --------------------------------------------------------------------------------------------

PREDICTIONS = [
    (DDIMScheduler, {"clip_sample": False}),
    (DDIMScheduler, {"clip_sample": True, "clip_sample_range": 0.7}),
    (DDIMScheduler, {"clip_sample": False, "thresholding": True}),
    (DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}),
    (DDIMScheduler, {"clip_sample": False, "prediction_type": "sample"}),
    (DDPMScheduler, {"clip_sample": False}),
    (DDPMScheduler, {"clip_sample": True}),
    (DDPMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}),
    (DDPMScheduler, {"clip_sample": False, "variance_type": "learned_range"}),
    (EulerAncestralDiscreteScheduler, {}),
    (EulerAncestralDiscreteScheduler, {"prediction_type": "v_prediction"}),
    (LCMScheduler, {"clip_sample": False}),
    (LCMScheduler, {"clip_sample": False, "timestep_scaling": 0.001}),  # else c_skip is nearly 0
    (LCMScheduler, {"clip_sample": True, "prediction_type": "v_prediction"}),
    *(
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", **more})
        for more in (
            {},
            {"prediction_type": "v_prediction", "use_karras_sigmas": True},
            {"prediction_type": "sample"},
            {"thresholding": True},
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        )
    ),
    (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True, "shift": 2.0}),
]


@pytest.mark.parametrize("cls, config", PREDICTIONS, ids=lambda v: str(getattr(v, "__name__", v)))
def test_clean_prediction_is_the_schedulers(cls, config):
    g = torch.Generator().manual_seed(0)
    scheduler = cls(**config)
    scheduler.set_timesteps(6)
    x = torch.randn(3, 4, 4, 4, generator=g) * getattr(scheduler, "init_noise_sigma", 1.0)
    channels = 8 if config.get("variance_type") == "learned_range" else 4
    for index, t in enumerate(scheduler.timesteps):
        output = torch.randn(3, channels, 4, 4, generator=g)
        if hasattr(scheduler, "step_index") and scheduler.step_index is None:
            scheduler._init_step_index(t)
        ours = clean_prediction(scheduler, index, output, t, x)
        if cls is DPMSolverMultistepScheduler and config["algorithm_type"] == "sde-dpmsolver++":
            theirs = scheduler.convert_model_output(output, sample=x)
        elif cls is DPMSolverMultistepScheduler:
            eps = scheduler.convert_model_output(output, sample=x)
            a, s = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
            theirs = (x - s * eps) / a
        elif cls is FlowMatchEulerDiscreteScheduler:
            theirs = x - scheduler.sigmas[index] * output
        step = scheduler.step(output, t, x, generator=g)
        if cls is LCMScheduler:
            theirs = step.denoised
        elif hasattr(step, "pred_original_sample"):
            theirs = step.pred_original_sample
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        x = step.prev_sample
    if cls in (FlowMatchEulerDiscreteScheduler, LCMScheduler):  # the last step lands on it
        torch.testing.assert_close(x, ours, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------
# Selection, on a pipeline small enough to be done by hand
# --------------------------------------------------------------------------------------------


def toy_network(x, t):
    return torch.tanh(0.7 * x + 0.1 * float(t) / 1000) + 0.05 * x.roll(1, -1)


class ToyPipe:
    """What every text-to-image pipeline does, without networks."""

    def __init__(self, scheduler, network=toy_network, shape=(3, 2, 2)):
        self.scheduler, self.network, self.shape = pipes.fresh(scheduler), network, shape

    def __call__(
        self, prompt, num_images_per_prompt=1, num_inference_steps=6, generator=None, eta=1.0
    ):
        n = len(prompt) * num_images_per_prompt
        self.scheduler.set_timesteps(num_inference_steps)
        x = randn_tensor((n, *self.shape), generator=generator)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in self.scheduler.timesteps:
            x = self.step(x, t, generator, eta)
        return x

    def step(self, x, t, generator, eta=1.0):
        extra = {"eta": eta} if type(self.scheduler) is DDIMScheduler else {}
        scaled = getattr(self.scheduler, "scale_model_input", lambda x, t: x)(x, t)
        output = self.network(scaled, t)
        return self.scheduler.step(output, t, x, generator=generator, **extra).prev_sample


def planted(winner, at):
    """A decoder and a reward which let particle ``winner`` take all at the ``at``-th call."""
    calls = []

    def decode(latents):
        return Samples(latents, "toy")

    def reward(samples):
        calls.append(1)
        value = torch.zeros(len(samples))
        if len(calls) == at:
            value[winner] = 100.0
        return value

    return {"decode": decode, "reward": reward}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_clones_continue_as_an_unhooked_run_from_the_winners_state(name):
    k, winner, when, steps = 4, 2, 3, 6
    pipe = ToyPipe(SCHEDULERS[name])
    with steered(
        pipe, num_particles=k, potential="difference", schedule=[when], **planted(winner, 2)
    ) as run:
        ours = pipe(["a"], k, steps, generator=sample_generators(0, 1, k))
    assert run.result.ancestors.tolist() == [[[winner] * k]]
    assert run.result.roots.tolist() == [1]

    # by hand: the winner alone up to the selection, its scheduler copied, then every slot's noise
    alone = ToyPipe(SCHEDULERS[name])
    alone.scheduler.set_timesteps(steps)
    generators = sample_generators(0, 1, k)
    noise = {j: randn_tensor((1, *pipe.shape), generator=[generators[j]]) for j in range(k)}
    x = noise[winner] * getattr(alone.scheduler, "init_noise_sigma", 1.0)
    for t in alone.scheduler.timesteps[:when]:
        x = alone.step(x, t, [generators[winner]])
        for j in set(range(k)) - {winner}:
            randn_tensor(x.shape, generator=[generators[j]])
    for j in range(k):
        clone, y = copy.deepcopy(alone), x
        for t in alone.scheduler.timesteps[when:]:
            y = clone.step(y, t, [generators[j]])
        torch.testing.assert_close(ours[j : j + 1], y, atol=1e-5, rtol=1e-5)
    assert (ours[0] != ours[1]).any()


def test_prompts_never_mix():
    k = 3
    pipe = ToyPipe(pipes.DDIM)
    with steered(pipe, num_particles=k, schedule=[2], **planted(4, 2)) as run:
        ours = pipe(["a", "b"], k, generator=sample_generators(0, 2, k))
    plain = pipe(["a", "b"], k, generator=sample_generators(0, 2, k))
    assert run.result.ancestors.tolist() == [[[0, 1, 2], [1, 1, 1]]]
    assert torch.equal(ours[:k], plain[:k])


@pytest.mark.parametrize("potential", ["difference", "max"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "ddpm"])
def test_the_hook_is_steer(family, potential):
    options = {
        "num_particles": 4, "lmbda": 600.0, "seed": 3, "potential": potential,
        "ess_threshold": 0.7, "schedule": 1, "tempering": "linear",
    }  # fmt: skip
    pipe, prompts = getattr(pipes, family)(), ["a", "b", "c"]
    policy = load_policy(pipe, num_steps=STEPS)
    theirs = steer(policy, brightness, prompts, progress=False, **options)
    with steered(pipe, brightness, prompts=prompts, **options) as run:
        generate(family, pipe, k=4, prompts=prompts, seed=3)
    ours = run.result
    assert torch.equal(ours.ancestors, theirs.ancestors)
    assert len(ours.ancestors.flatten(0, 1).unique(dim=0)) > 2
    torch.testing.assert_close(ours.scores.value, theirs.scores.value, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.particles.data, theirs.particles.data, atol=1e-4, rtol=0)
    assert ours.samples.prompts == theirs.samples.prompts == prompts
    for name in ("log_weights", "log_z", "ess", "lmbdas"):
        ours_, theirs_ = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(ours_, theirs_, atol=600 * 1e-5, rtol=1e-2)


@pytest.mark.parametrize("name", ["ddim", "sde_dpm++", "flow"])
def test_the_tilted_law_of_a_gaussian_model(name):
    """Data N(0, 1) per entry and reward x: the sampler's N(0, v) must become N(lambda v, v)."""
    lmbda, k = 1.0, 40_000

    def exact(x, t):  # the optimal network for unit Gaussian data
        if name == "flow":
            s = float(t) / 1000
            return x * (s - (1 - s)) / ((1 - s) ** 2 + s**2)
        return x * (1 - pipe.scheduler.alphas_cumprod[int(t)]).sqrt()

    pipe = ToyPipe(SCHEDULERS[name], exact, shape=(1, 1, 1))
    v = pipe(["a"], k, 8, generator=torch.Generator().manual_seed(1)).double().var()
    with steered(
        pipe, lambda s: s.data.flatten(), num_particles=k, lmbda=lmbda, schedule=2,
        decode=lambda x: Samples(x, "toy"),
    ) as run:  # fmt: skip
        x = pipe(["a"], k, 8, generator=torch.Generator().manual_seed(0)).double().flatten()
    w = run.result.log_weights[0].softmax(0)
    mean = (w * x).sum()
    assert abs(mean - lmbda * v) < 0.04
    assert abs((w * (x - mean) ** 2).sum() - v) < 0.06
    assert abs(run.result.log_z[0] - lmbda**2 * v / 2) < 0.03


def test_steering_raises_the_reward_of_real_pipelines():
    """In the mean over 16 prompts and 2 seeds, by more than three standard errors."""
    pipe, prompts, gains = pipes.sd(), [chr(97 + i) for i in range(16)], []
    for seed in range(2):
        means = []
        for lmbda in (0.0, 1000.0):
            with steered(pipe, brightness, num_particles=4, lmbda=lmbda, schedule=1) as run:
                generate("sd", pipe, k=4, prompts=prompts, seed=seed)
            means.append(run.result.scores.value.view(16, 4).mean(1))
        gains.append(means[1] - means[0])
    gains = torch.cat(gains)
    assert gains.mean() > 3 * gains.std() / len(gains) ** 0.5


# --------------------------------------------------------------------------------------------
# Refusals, and leaving no trace
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler, fix",
    [
        (EulerDiscreteScheduler(**SIGMAS), "EulerAncestralDiscreteScheduler.from_config"),
        (PNDMScheduler(**SIGMAS), "EulerAncestralDiscreteScheduler.from_config"),
        (UniPCMultistepScheduler(**SIGMAS), "EulerAncestralDiscreteScheduler.from_config"),
        (HeunDiscreteScheduler(**SIGMAS), "EulerAncestralDiscreteScheduler.from_config"),
        (DPMSolverMultistepScheduler(**SIGMAS), "algorithm_type='sde-dpmsolver\\+\\+'"),
        (FlowMatchEulerDiscreteScheduler(), "stochastic_sampling=True"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_deterministic_samplers_are_refused_at_once(scheduler, fix):
    pipe = pipes.sd(scheduler)
    with pytest.raises(ValueError, match=fix):
        steered(pipe, brightness)


def refused(pipe, error, match, call, **options):
    """The call is refused before the network runs, and leaves no trace."""
    calls, handle = count_calls(pipe)
    cls = type(pipe)
    with pytest.raises(error, match=match), steered(pipe, brightness, **options) as run:
        call(pipe)
    handle.remove()
    assert not calls
    assert type(pipe) is cls and "step" not in vars(pipe.scheduler)
    with pytest.raises(RuntimeError, match="no result"):
        run.result


@pytest.mark.parametrize("family", ["sd", "sdxl", "controlnet", "img2img", "animate"])
def test_ddim_without_eta_is_refused_before_any_compute(family):
    pipe = getattr(pipes, family)()
    refused(pipe, ValueError, "eta=1", lambda p: generate(family, p, eta=0.0), num_particles=K)


def test_a_pipeline_that_passes_no_eta_is_refused_at_the_first_step():
    pipe = pipes.ddpm(DDIMScheduler())
    calls, handle = count_calls(pipe)
    with pytest.raises(ValueError, match="eta=1"), steered(pipe, brightness, num_particles=K):
        pipe(4, num_inference_steps=3)
    handle.remove()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "more, match",
    [
        ({"num_images_per_prompt": 3}, "num_images_per_prompt=2"),
        ({"num_images_per_prompt": 1}, "num_images_per_prompt=2"),
        ({"prompts": ["a", "b", "b", "a"], "num_images_per_prompt": 1}, "images of each prompt"),
        ({"num_inference_steps": 3, "num_images_per_prompt": 4}, "num_particles=2"),
    ],
)
def test_another_number_of_images_than_particles_is_refused(more, match):
    refused(
        pipes.sd(), ValueError, match, lambda p: generate("sd", p, generator=None, **more),
        num_particles=K,
    )  # fmt: skip


def test_prompts_in_a_row_count_as_particles():
    pipe = pipes.sd()
    with steered(pipe, brightness, num_particles=K) as run:
        generate("sd", pipe, k=1, prompts=["a", "a", "b", "b"])
    assert run.result.samples.prompts == ["a", "b"]
    refused(
        pipes.animate(), ValueError, "in a row|num_videos_per_prompt",
        lambda p: p(["a", "b"], num_frames=2, eta=1.0, **SIZE), num_particles=K,
    )  # fmt: skip


def test_a_pipeline_that_ignores_the_number_is_found_out_at_the_first_step():
    pipe = pipes.animate()
    with (
        pytest.raises(ValueError, match="each prompt that many times in a row"),
        steered(pipe, brightness, num_particles=K),
    ):
        pipe("a", num_videos_per_prompt=K, num_frames=2, eta=1.0, num_inference_steps=2, **SIZE)
    with (
        pytest.raises(ValueError, match="batch of 3"),
        steered(pipes.ddpm(), brightness, num_particles=K) as run,
    ):
        run.pipe(3, num_inference_steps=2)


class Wordy:
    """A reward that needs prompts, and keeps them."""

    def __init__(self):
        from diffreward.rewards.base import RewardInfo

        self.info = RewardInfo("wordy", needs_prompt=True)

    def __call__(self, samples):
        from diffreward.rewards.base import Scores

        self.prompts = samples.prompts
        return Scores(brightness(samples))


def test_prompts_come_from_the_call_or_are_named():
    pipe, reward = pipes.sd(), Wordy()
    with steered(pipe, reward, num_particles=K):
        pipe("hello", num_images_per_prompt=K, eta=1.0, num_inference_steps=2, **SIZE)
    assert reward.prompts == ["hello"] * K
    embeds, negative = pipe.encode_prompt("hello", "cpu", 1, True)
    call = {
        "prompt_embeds": embeds, "negative_prompt_embeds": negative, "num_inference_steps": 2,
        "num_images_per_prompt": K, "eta": 1.0, **SIZE,
    }  # fmt: skip
    with (
        pytest.raises(ValueError, match="prompts="),
        steered(pipe, reward, num_particles=K),
    ):
        pipe(**call)
    with steered(pipe, reward, num_particles=K, prompts="named") as run:
        pipe(**call)
    assert run.result.particles.prompts == ["named"] * K
    with (
        pytest.raises(ValueError, match="3 prompts with num_particles=2"),
        steered(pipe, reward, num_particles=K, prompts=["a", "b", "c"]),
    ):
        pipe(**call)


def test_latents_changed_between_steps_are_refused():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    with (
        pytest.raises(RuntimeError, match="inpainting"),
        steered(pipes.inpaint(), brightness, num_particles=K) as run,
    ):
        run.pipe(
            "a", image=IMAGE, mask_image=mask, num_images_per_prompt=K, eta=1.0,
            num_inference_steps=4, strength=1.0, **SIZE,
        )  # fmt: skip


def test_one_call_for_one_block():
    pipe = pipes.sd()
    with steered(pipe, brightness, num_particles=K) as run:
        generate("sd", pipe)
        with pytest.raises(RuntimeError, match="one call"):
            generate("sd", pipe)
        with pytest.raises(RuntimeError, match="being steered"), steered(pipe, brightness):
            pass
    assert run.result.scores.value.shape == (4,)
    with pytest.raises(RuntimeError, match="has been used"), run:
        pass
    with steered(pipe, brightness, num_particles=K):
        pipe.scheduler = pipes.fresh(pipes.DDIM)
        with pytest.raises(RuntimeError, match="replaced"):
            generate("sd", pipe)


def test_the_pipeline_is_restored_after_an_exception():
    pipe = pipes.sd()
    cls, own = type(pipe), pipe.scheduler.step

    def broken(samples):
        raise OverflowError("broken")

    with pytest.raises(OverflowError), steered(pipe, broken, num_particles=K):
        assert type(pipe) is not cls and isinstance(pipe, cls)
        generate("sd", pipe)
    assert type(pipe) is cls and pipe.scheduler.step == own
    assert vars(pipe.scheduler).keys() == vars(pipes.sd().scheduler).keys()

    def mine(*args, **kwargs):
        return own(*args, **kwargs)

    pipe.scheduler.step = mine
    with steered(pipe, brightness, num_particles=K):
        pass
    assert pipe.scheduler.step is mine


@pytest.mark.parametrize(
    "options, match",
    [
        ({"reward": "clip_scor"}, "clip_score"),
        ({"potential": "diference"}, "did you mean 'difference'"),
        ({"resampling": "sistematic"}, "systematic"),
        ({"num_particles": 0}, "num_particles must be at least 1"),
        ({"decode_batch": 0}, "decode_batch must be at least 1"),
        ({"lmbda": float("nan")}, "finite"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        steered(pipes.sd(), **{"reward": brightness, **options})


@pytest.mark.parametrize(
    "reward, error, match",
    [
        (lambda s: s.data.mean(), ValueError, "one number for each sample"),
        (lambda s: torch.ones(len(s), dtype=torch.long), TypeError, "floating"),
        (lambda s: torch.full((len(s),), torch.nan), ValueError, "sample 0"),
    ],
)
def test_a_bad_reward_is_found_at_the_first_step(reward, error, match):
    pipe = pipes.sd()
    calls, handle = count_calls(pipe)
    with pytest.raises(error, match=match), steered(pipe, reward, num_particles=K, schedule=[4]):
        generate("sd", pipe)
    handle.remove()
    assert len(calls) == 1


def test_latents_that_cannot_be_decoded_need_decode():
    pipe = ToyPipe(pipes.DDIM, shape=(4, 2, 2))
    with pytest.raises(ValueError, match="decode="), steered(pipe, brightness, num_particles=K):
        pipe(["a"], K)


def test_a_collapsed_population_is_told():
    pipe = pipes.sd()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with steered(pipe, brightness, num_particles=K, lmbda=1e6, ess_threshold=1.0):
            generate("sd", pipe)
    mine = [w for w in caught if "one root" in str(w.message)]
    assert len(mine) == 1


def test_import_needs_no_diffusers():
    code = "import diffreward.steering.hook, sys; print('diffusers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"

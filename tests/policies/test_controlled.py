"""Conditional policies: parity with diffusers' ControlNet and adapter pipelines, and errors.

Tiny random networks, as in test_pipelines.py. Those of diffusers' pipelines that encode the control
image draw from the VAE's distribution; here both sides take its mean. Nor do they scale a tensor to
[-1, 1], as they do a picture.
"""

import copy

import pytest
import tiny
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    T2IAdapter,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from peft import LoraConfig
from torch import nn

from diffreward import steer
from diffreward.controlled import ControlledImages
from diffreward.finetuning.conditions import Conditions
from diffreward.policies import load_policy
from diffreward.policies.controlled import StableDiffusionControlNetPolicy
from diffreward.policy import Policy, rollout, sample_generators
from diffreward.samples import Samples

PROMPTS = ["a cat", "dog on a log"]
STEPS = 3
CLOSE = {"rtol": 0, "atol": 2e-5}
SIZE = {"height": 16, "width": 16}

UNETS = ["controlnet", "sdxl_controlnet", "adapter", "sdxl_adapter"]
FLOWS = ["sd3_control", "flux_control", "flux_hint"]
PLAIN = {  # pipeline with a controller -> the one without, and the option
    "controlnet": (tiny.sd, "controlnet"),
    "sdxl_controlnet": (tiny.sdxl, "controlnet"),
    "adapter": (tiny.sd, "adapter"),
    "sdxl_adapter": (tiny.sdxl, "adapter"),
    "sd3_control": (tiny.sd3, "controlnet"),
    "flux_control": (tiny.flux, "controlnet"),
    "flux_hint": (tiny.flux, "controlnet"),
}


def control_images(count=2, channels=3, size=16, seed=3):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def size_of(family):
    return 32 if family == "flux_hint" else 16


def own(family):
    """A tiny pipeline that shares nothing with other tests."""
    pipe = getattr(tiny, family)()
    for name, part in list(pipe.components.items()):
        if isinstance(part, nn.Module):
            pipe.register_modules(**{name: copy.deepcopy(part).requires_grad_(True)})
    return pipe


def policy_of(pipe, family, **options):
    size = size_of(family)
    kernel = "flow_renoise" if family in FLOWS else None
    options = {"num_steps": STEPS, "kernel": kernel, "height": size, "width": size, **options}
    return load_policy(pipe, **options)


def images(policy, control, step_noise="generators"):
    with torch.no_grad():
        inputs = {} if control is None else {"control": control}
        condition = policy.encode(PROMPTS, **inputs)
        generators = sample_generators(0, 2, 1)
        x = policy.initial(condition, generators)
        if step_noise == "global":
            torch.manual_seed(7)
            generators = None
        return policy.decode(rollout(policy, condition, generators, x=x).final, condition).data


def reference_images(pipe, family, control, scale, **options):
    torch.manual_seed(7)
    size = size_of(family)
    name = "control_image" if family in FLOWS else "image"
    kind = "adapter" if family.endswith("adapter") else "controlnet"
    more = {f"{kind}_conditioning_scale": scale, "height": size, "width": size}
    if family in FLOWS:
        control = control * 2 - 1
    else:
        more["eta"] = 1.0
    found = pipe(
        PROMPTS, **{name: control}, generator=sample_generators(0, 2, 1),
        num_inference_steps=STEPS, output_type="pt", **more, **options,
    ).images  # fmt: skip
    if isinstance(found, torch.Tensor):
        return found
    return torch.from_numpy(found).movedim(-1, 1)  # of an adapter's pipeline, whatever is asked for


@pytest.fixture(autouse=True)
def means(monkeypatch):
    """The VAE's mean on both sides."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_, **__: self.mean)


# Parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance, scale", [(1.0, 0.6), (5.0, 1.0), (5.0, 0.6)])
@pytest.mark.parametrize("family", UNETS)
def test_unet_families_match_their_pipelines(family, guidance, scale):
    pipe, control = getattr(tiny, family)(), control_images()
    policy = policy_of(pipe, family, guidance_scale=guidance, control_scale=scale)
    assert isinstance(policy, Policy)
    theirs = reference_images(pipe, family, control, scale, guidance_scale=guidance)
    ours = images(policy, control)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert (images(policy, 1 - control) - ours).abs().max() > 1e-3  # control matters


@pytest.mark.parametrize("guidance, scale", [(1.0, 0.6), (5.0, 1.0)])
@pytest.mark.parametrize("zeros", [False, True])
def test_sd3_matches_its_pipeline(guidance, scale, zeros):
    """With and without the pooled prompt, for which the shift of the latents differs, too."""
    pipe, control = tiny.sd3_control(), control_images()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        controlnet = tiny.sd3_controlnet(force_zeros_for_pooled_projection=zeros)
    pipe.register_modules(controlnet=controlnet)
    policy = policy_of(pipe, "sd3_control", guidance_scale=guidance, control_scale=scale)
    theirs = reference_images(pipe, "sd3_control", control, scale, guidance_scale=guidance)
    ours = images(policy, control, step_noise="global")
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert (images(policy, 1 - control, step_noise="global") - ours).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("family", ["flux_control", "flux_hint"])
def test_flux_matches_its_pipeline(family, scale):
    pipe, control = getattr(tiny, family)(), control_images(size=size_of(family))
    policy = policy_of(pipe, family, control_scale=scale)
    theirs = reference_images(pipe, family, control, scale)
    ours = images(policy, control, step_noise="global")
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert (images(policy, 1 - control, step_noise="global") - ours).abs().max() > 1e-3


def test_flux_with_guidance_as_an_input_of_both_networks():
    pipe, control = own("flux_control"), control_images()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer = type(pipe.transformer)(**{**pipe.transformer.config, "guidance_embeds": True})
        controlnet = FluxControlNetModel(patch_size=1, guidance_embeds=True, **tiny.FLUX)
        tiny.awake(controlnet)
    pipe.register_modules(transformer=transformer.eval(), controlnet=controlnet)
    theirs = reference_images(pipe, "flux_control", control, 1.0, guidance_scale=2.5)
    policy = policy_of(pipe, "flux_control", guidance_scale=2.5)
    torch.testing.assert_close(images(policy, control, "global"), theirs, **CLOSE)


@pytest.mark.parametrize("family", [*UNETS, *FLOWS])
def test_a_controller_is_given_to_a_plain_pipeline(family):
    """The same as the pipeline that has it; and without it, or at scale 0, the plain law."""
    theirs = getattr(tiny, family)()
    build, kind = PLAIN[family]
    parts = {n: p for n, p in theirs.components.items() if n in ("unet", "transformer", "vae")}
    plain = build()
    plain.register_modules(**parts)
    plain.vae_scale_factor = theirs.vae_scale_factor
    noise, control = {"guidance_scale": 2.0}, control_images(size=size_of(family))
    controller = getattr(theirs, kind)
    policy = policy_of(plain, family, **noise, **{kind: controller})
    assert policy.pipe is plain and policy.denoiser is policy.controller is controller
    assert policy.base is (plain.transformer if family in FLOWS else plain.unet)
    found, without = images(policy, control), images(policy_of(plain, family, **noise), None)
    torch.testing.assert_close(found, images(policy_of(theirs, family, **noise), control))
    silent = policy_of(plain, family, **noise, control_scale=0.0, **{kind: controller})
    torch.testing.assert_close(images(silent, control), without)
    assert (found - without).abs().max() > 1e-3


# Loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_a_new_controlnet_changes_nothing_and_can_learn(family):
    parts = {"sd3": {"transformer": tiny.sd3_control_parts()["transformer"]}}.get(family, {})
    pipe = tiny.quiet(getattr(tiny, family)(**parts))
    name = "transformer" if family in ("sd3", "flux") else "unet"
    base = copy.deepcopy(getattr(pipe, name))  # others' gradients stay behind
    pipe.register_modules(**{name: base})
    config = copy.deepcopy(dict(base.config))
    policy = load_policy(pipe, num_steps=STEPS, guidance_scale=2.0, controlnet="new", **SIZE)
    assert dict(base.config) == config  # diffusers' from_transformer of SD3 writes into it
    torch.rand(1)  # what else is drawn makes no difference
    again = load_policy(pipe, num_steps=STEPS, guidance_scale=2.0, controlnet="new", **SIZE)
    for a, b in zip(policy.denoiser.parameters(), again.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    plain = load_policy(pipe, num_steps=STEPS, guidance_scale=2.0, **SIZE)
    torch.testing.assert_close(images(policy, control_images()), images(plain, None))
    policy.base.requires_grad_(False)
    condition = policy.encode(PROMPTS, control=control_images())
    x0 = policy.initial(condition, sample_generators(0, 2, 1))
    policy.denoising_loss(x0, condition, sample_generators(1, 2, 1)).sum().backward()
    last = {n for n, p in policy.denoiser.named_parameters() if p.grad is not None and p.grad.any()}
    assert last and all(n.startswith("controlnet_") and "embed" not in n for n in last)
    assert all(p.grad is None for p in policy.base.parameters())


def test_a_new_adapter_fits():
    for family, options in (("adapter", {}), ("sdxl_adapter", {"match": "down block 0 .a plain"})):
        pipe = tiny.sd() if family == "adapter" else tiny.sdxl()
        if not options:
            pipe.register_modules(unet=tiny.crossed_unet_part())
            policy = policy_of(pipe, family, adapter="new")
            first, second = (images(policy, control_images(seed=s)) for s in (1, 2))
            assert (first - second).abs().max() > 1e-3
        else:  # two blocks are neither Stable Diffusion's nor XL's
            with pytest.raises(ValueError, **options):
                policy_of(pipe, family, adapter="new")
    three = tiny.unet(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # as XL's
    pipe = tiny.sd()
    pipe.register_modules(unet=three)
    policy = policy_of(pipe, "adapter", adapter="new")
    assert policy.controller.config.adapter_type == "full_adapter_xl"
    assert len(policy.controller(control_images())) == 4
    images(policy, control_images())


@pytest.mark.parametrize("family", ["controlnet", "sd3_control", "flux_control", "sdxl_adapter"])
def test_controllers_load_from_folders(family, tmp_path):
    pipe, (build, kind) = getattr(tiny, family)(), PLAIN[family]
    controller = getattr(pipe, kind)
    controller.save_pretrained(tmp_path / "c")
    pipe.save_pretrained(tmp_path / "pipe")
    plain = build()
    if family == "sd3_control":
        plain.register_modules(transformer=pipe.transformer)
    wanted = images(policy_of(pipe, family), control_images())
    for spec, option in ((plain, {kind: tmp_path / "c"}), (str(tmp_path / "pipe"), {})):
        policy = policy_of(spec, family, **option)
        assert not policy.controller.training
        assert torch.equal(images(policy, control_images()), wanted)


def test_embedded_controllers_are_assets(tmp_path, monkeypatch):
    from diffreward.policies import loading

    tiny.controlnet_part().save_pretrained(tmp_path / "mine")
    monkeypatch.setattr(loading, "asset_path", lambda name: tmp_path / name)
    policy = load_policy(tiny.sd(), controlnet="embedded:mine", num_steps=2)
    assert isinstance(policy, StableDiffusionControlNetPolicy)


def test_dtypes():
    """A control network takes the base's dtype; the control image stays as it is."""
    pipe = own("sd").to(torch.bfloat16)
    policy = load_policy(pipe, controlnet=copy.deepcopy(tiny.controlnet_part()), num_steps=2)
    assert policy.dtype == policy.base.dtype == torch.bfloat16
    control = control_images()
    condition = policy.encode(PROMPTS, control=control)
    assert torch.equal(condition.tensors["control"], control)
    with torch.no_grad():
        law = policy.step_law(policy.initial(condition), 0, condition)
        assert law.mean.dtype == torch.float32 and law.mean.isfinite().all()
        policy.denoiser.float()  # as full training with mixed precision has it
        mixed = policy.step_law(policy.initial(condition), 0, condition)
    assert mixed.mean.isfinite().all() and policy.base.dtype == torch.bfloat16
    torch.manual_seed(0)
    x = policy.initial(condition)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert policy.step_law(x, 0, condition).mean.isfinite().all()


@pytest.mark.parametrize("family", ["sd3_control", "flux_control", "controlnet", "adapter"])
def test_a_float32_controller_of_a_bfloat16_base(family):
    pipe = own(family)
    exact = policy_of(pipe, family, guidance_scale=2.0)
    condition = exact.encode(PROMPTS, control=control_images())
    x = exact.initial(condition, sample_generators(0, 2, 1))
    with torch.no_grad():
        wanted = exact.step_law(x, 0, condition).x0
        exact.base.to(torch.bfloat16)
        found = exact.step_law(x, 0, condition).x0
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05 * wanted.abs().max().item())


def controlnet_of(unet=None, channels=3, embedding=(8, 8), **config):
    unet = tiny.sd_parts()["unet"] if unet is None else unet
    return ControlNetModel.from_config(
        {**ControlNetModel.from_unet(unet).config, "_use_default_values": [],
         "conditioning_channels": channels,
         "conditioning_embedding_out_channels": embedding, **config}
    )  # fmt: skip


def adapter_of(**config):
    return T2IAdapter(**{"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 2, **config})


MISFITS = [
    (tiny.sd, lambda: {"controlnet": controlnet_of(cross_attention_dim=8)},
     "cross_attention_dim is 8, but 16 is needed"),
    (tiny.sd, lambda: {"controlnet": controlnet_of(block_out_channels=(8, 32))},
     r"block_out_channels is \(8, 32\), but \(8, 16\)"),
    (tiny.sd, lambda: {"controlnet": controlnet_of(
        block_out_channels=(8, 16, 16), down_block_types=("DownBlock2D",) * 3)},
     r"block_out_channels is \(8, 16, 16\)"),
    (tiny.sd, lambda: {"controlnet": controlnet_of(layers_per_block=2)}, "layers_per_block is 2"),
    (tiny.sd, lambda: {"controlnet": controlnet_of(embedding=(8, 8, 8))},
     "control images 4 times as large as the latents, and pictures are 2"),
    (tiny.sd, lambda: {"controlnet": controlnet_of(global_pool_conditions=True)}, "pools its"),
    (tiny.sd, lambda: {"controlnet": tiny.sdxl_controlnet_part()}, "cross_attention_dim is 32"),
    (tiny.sd3, lambda: {"controlnet": tiny.sd3_controlnet(num_layers=2)},
     "num_layers is 2, but there are only 1"),
    (tiny.sd3, lambda: {"controlnet": tiny.sd3_controlnet(extra_conditioning_channels=1)},
     "extra_conditioning_channels is 1, but 0"),
    (tiny.sd3, lambda: {"controlnet": "new"}, "made of all blocks but the last: there is one"),
    (tiny.flux, lambda: {"controlnet": FluxControlNetModel(patch_size=1, num_mode=2, **tiny.FLUX)},
     "num_mode is 2, but None"),
    (tiny.flux, lambda: {"controlnet": tiny.flux_hint_parts()["controlnet"]},
     "num_layers is 2, but there are only 1"),
    (tiny.flux, lambda: {"controlnet": FluxControlNetModel(
        patch_size=2, conditioning_embedding_channels=4, **tiny.FLUX)},
     "patches of 16 pixels, and one of"),
    (tiny.sd, lambda: {"adapter": adapter_of()},
     "8x8x8 came for down block 0 .a plain one: added after downsampling., which takes 8x4x4"),
    (tiny.sdxl, lambda: {"adapter": adapter_of(downscale_factor=3)}, "cannot read images of 16x16"),
    (tiny.adapter, lambda: {"adapter": adapter_of()}, "has its own adapter"),
    (tiny.controlnet, lambda: {"controlnet": "new"}, "has its own controlnet"),
    (tiny.sd, lambda: {"controlnet": "new", "adapter": "new"}, "a controlnet or an adapter"),
    (tiny.ddpm, lambda: {"controlnet": "new"}, "no controlnet for DDPMPipeline; .*FluxPipeline"),
    (tiny.sd3, lambda: {"adapter": "new"}, "no adapter for StableDiffusion3Pipeline; models that"),
    (tiny.sd, lambda: {"controlnet": tiny.adapter_part()}, "is a ControlNetModel, .*T2IAdapter"),
    (tiny.sd, lambda: {"control_scale": 0.5}, "StableDiffusionPipeline has none; give controlnet"),
    (tiny.sd, lambda: {"train": "base"}, "has none; give controlnet"),
    (tiny.controlnet, lambda: {"train": "both"}, "train must be 'control' or 'base', but 'both'"),
    (tiny.controlnet, lambda: {"control_scale": float("nan")}, "control_scale must be finite"),
]  # fmt: skip


@pytest.mark.parametrize("build, options, words", MISFITS, ids=range(len(MISFITS)))
def test_what_does_not_fit_is_refused_when_loaded(build, options, words):
    with pytest.raises(ValueError, match=words):
        load_policy(build(), **options(), **({} if build is tiny.ddpm else SIZE))


def test_a_feature_map_too_many():
    pipe = tiny.sd()
    pipe.register_modules(unet=tiny.crossed_unet_part())
    with pytest.raises(ValueError, match="feature map of 16x2x2 came for the middle block, which"):
        load_policy(pipe, adapter=adapter_of(channels=[8, 16, 16]), **SIZE)
    with pytest.raises(ValueError, match="4 feature maps, and there are 3 places"):
        load_policy(pipe, adapter=adapter_of(channels=[8, 16, 16, 16]), **SIZE)


def test_several_controlnets_are_refused():
    pipe = own("controlnet")
    pipe = type(pipe)(**{**pipe.components, "controlnet": [pipe.controlnet] * 2}, **{
        "requires_safety_checker": False})  # fmt: skip
    with pytest.raises(ValueError, match="is one ControlNetModel, but MultiControlNetModel came"):
        load_policy(pipe)


@pytest.mark.parametrize("spec", ["embedded:dna", "embedded:protein"])
def test_sequences_take_no_controlnet(spec):
    with pytest.raises(ValueError, match="no option 'controlnet'"):
        load_policy(spec, controlnet="new")


def test_folders_without_a_controller(tmp_path):
    (tmp_path / "empty").mkdir()
    adapter_of().save_pretrained(tmp_path / "adapter")
    for spec, error, words in (
        ("no/such/folder", FileNotFoundError, "controlnet folder .* does not exist"),
        (tmp_path / "empty", FileNotFoundError, "holds no ControlNetModel"),
        (tmp_path / "adapter", ValueError, "is a ControlNetModel, but .* holds a T2IAdapter"),
        ("nobody/nothing", FileNotFoundError, "hub could not be reached"),
        ("embedded:nothing", FileNotFoundError, "no embedded asset 'nothing'"),
    ):
        with pytest.raises(error, match=words):
            load_policy(tiny.sd(), controlnet=spec)


# Conditions -----------------------------------------------------------------------------------


def test_bad_control_images():
    policy = policy_of(tiny.controlnet(), "controlnet")
    good = control_images()
    for control, words in (
        (None, r"control image for each prompt, and none came; encode\(prompts, control=...\) .*"
               r"\(2, 3, 16, 16\) in \[0, 1\]"),
        ([1, 2], "but list came"),
        (good[0], r"but \(3, 16, 16\) came"),
        (good.mul(255).byte(), r"but torch.uint8 came; divide uint8 images by 255"),
        (good[:1], "1 control images came for 2 prompts"),
        (good[:, :2], "have 3 channels .or 1., but 2 came"),
        (good[..., :8], "are 16x16, but 16x8 came; resize"),
        (good * 2 - 1, r"lie in \[0, 1\], but values from -0.99"),
        (good.index_fill(0, torch.tensor([1]), float("nan")), "values from nan to nan"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            policy.encode(PROMPTS, control=control)
    with pytest.raises(ValueError, match="takes prompts and control, but mask came"):
        policy.encode(PROMPTS, control=good, mask=good)
    with pytest.raises(ValueError, match=r"prompts only, but control came; for a control image"):
        load_policy(tiny.sd()).encode(PROMPTS, control=good)


def test_grey_control_images_are_repeated():
    policy = policy_of(tiny.controlnet(), "controlnet")
    grey = control_images(channels=1)
    found = policy.encode(PROMPTS, control=grey).tensors["control"]
    assert torch.equal(found, grey.repeat(1, 3, 1, 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        of_one = tiny.awake(controlnet_of(channels=1))
    policy = load_policy(tiny.sd(), controlnet=of_one, num_steps=2, **SIZE)
    assert policy.encode(PROMPTS, control=grey).tensors["control"].shape[1] == 1
    images(policy, grey)
    with pytest.raises(ValueError, match="have 1 channels"):
        policy.encode(PROMPTS, control=control_images())


@pytest.mark.parametrize("family", ["controlnet", "sd3_control", "flux_control", "adapter"])
def test_control_goes_with_its_prompt(family):
    """Taken, repeated, kept in main memory and joined, it stays beside its prompt."""
    policy = policy_of(getattr(tiny, family)(), family, guidance_scale=3.0)
    control = control_images()
    condition = policy.encode(PROMPTS, control=control).repeat(3).take([4, 0])
    assert torch.equal(condition.tensors["control"], control.flip(0))
    x = policy.initial(condition, sample_generators(0, 2, 1))
    with torch.no_grad():
        direct = policy.encode(PROMPTS[::-1], control=control.flip(0))
        laws = [policy.step_law(x, 1, c).mean for c in (condition, direct)]
        torch.testing.assert_close(*laws)
        assert torch.equal(policy.decode(x, condition).context["control"], control.flip(0))

    class Data(ControlledImages):
        def load(self, indices):
            return Samples(control[list(indices)], "image", None, {"control": control[indices]})

    kept = Conditions(policy, PROMPTS, 1, Data(PROMPTS, [], None, [], None))
    assert torch.equal(kept.take([1, 0]).tensors["control"], control.flip(0))
    with torch.no_grad():
        torch.testing.assert_close(policy.step_law(x, 1, kept.take([1, 0])).mean, laws[1])
    kept.close()


def test_text_encoders_are_parked():
    pipe = own("controlnet")
    policy = policy_of(pipe, "controlnet")
    before = policy.encode(PROMPTS, control=control_images()).tensors
    policy.park_encoders()
    after = policy.encode(PROMPTS, control=control_images()).tensors
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


# Which network --------------------------------------------------------------------------------


def shifted(network, by=0.1):
    with torch.no_grad():
        for p in network.parameters():
            p += by * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("train", ["control", "base"])
@pytest.mark.parametrize("family", ["controlnet", "sd3_control", "flux_control", "sdxl_adapter"])
def test_reference_is_the_pretrained_law(family, train):
    """With a frozen copy of the trained network alone, whichever it is."""
    policy = policy_of(own(family), family, train=train, guidance_scale=2.0)
    networks = policy.controller, policy.base
    assert policy.denoiser is networks[train == "base"] is not networks[train == "control"]
    condition = policy.encode(PROMPTS, control=control_images())
    x = policy.initial(condition, sample_generators(0, 2, 1))

    def mean(policy):
        with torch.no_grad():
            return policy.step_law(x, 0, condition).mean

    before, reference = mean(policy), policy.reference()
    assert reference.denoiser is not policy.denoiser
    assert not any(p.requires_grad for p in reference.denoiser.parameters())
    assert (reference.base is policy.base) == (train == "control")
    assert (reference.controller is policy.controller) == (train == "base")
    shifted(policy.denoiser)
    assert torch.equal(mean(reference), before)
    assert (mean(policy) - before).abs().max() > 1e-3
    assert torch.equal(mean(policy.reference()), mean(policy))


@pytest.mark.parametrize("train", ["control", "base"])
def test_reference_of_an_adapter_switches_it_off(train):
    policy = policy_of(own("controlnet"), "controlnet", train=train)
    condition = policy.encode(PROMPTS, control=control_images())
    x = policy.initial(condition)
    with torch.no_grad():
        before = policy.step_law(x, 0, condition).mean
        policy.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        for name, p in policy.denoiser.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
        reference = policy.reference()
        assert reference.denoiser is policy.denoiser
        assert torch.equal(reference.step_law(x, 0, condition).mean, before)
        assert (policy.step_law(x, 0, condition).mean - before).abs().max() > 1e-4


@pytest.mark.parametrize("family", [*UNETS, *FLOWS])
def test_denoise_has_control_and_no_guidance(family):
    """Its prediction is that of an unguided policy at a step of the chain; gradients flow."""
    pipe = own(family)
    guided = policy_of(pipe, family, guidance_scale=5.0)
    plain = guided if family.startswith("flux") else policy_of(pipe, family, guidance_scale=1.0)
    for part in (guided.base, guided.pipe.vae):
        part.requires_grad_(False)
    control = control_images(size=size_of(family))
    condition = guided.encode(PROMPTS, control=control)
    x0, i = guided.initial(condition, sample_generators(0, 2, 1)), 1
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    a, s = guided.kernel.level(i, x0)
    t = guided.kernel.timesteps[i] / 1000
    u = torch.full((2,), float(t) + (0 if family in FLOWS else 1e-4))
    found, error = guided.denoise(x0, u, eps, condition)
    law = plain.step_law(a * x0 + s * eps, i, plain.encode(PROMPTS, control=control))
    torch.testing.assert_close(found, law.x0, rtol=1e-4, atol=1e-4)
    other, _ = guided.denoise(x0, u, eps, guided.encode(PROMPTS, control=1 - control))
    assert (other - found).abs().max() > 1e-5
    error.sum().backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in guided.denoiser.parameters()]
    assert sum(reached) > 0.4 * len(reached)  # text streams of last blocks are not used
    assert all(p.grad is None for p in guided.base.parameters())


def echo(samples):
    """How near a picture is to its control image."""
    return -(samples.data - samples.context["control"]).abs().flatten(1).mean(1)


def test_steering():
    policy = policy_of(tiny.controlnet(), "controlnet", guidance_scale=2.0)
    control = control_images()
    found = steer(
        policy, echo, PROMPTS, num_particles=2, schedule=1, inputs={"control": control},
        max_batch=2, seed=0, progress=False,
    )  # fmt: skip
    assert torch.equal(found.samples.context["control"], control)
    with pytest.raises(ValueError, match="control image for each prompt, and none came; .*inputs"):
        steer(policy, echo, PROMPTS, num_particles=2, progress=False)

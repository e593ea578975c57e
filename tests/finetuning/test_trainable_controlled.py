"""ControlNets and adapters in training: that one network learns, and reads back elsewhere."""

import copy

import pytest
import tiny
import torch
from diffusers import ControlNetModel, FluxControlNetModel, SD3ControlNetModel, T2IAdapter
from peft import PeftModel
from torch import nn

from diffreward.finetuning.options import LoRA, Training
from diffreward.finetuning.trainable import Trainable
from diffreward.policies import load_lora, load_policy
from diffreward.policy import rollout, sample_generators

FAMILIES = ["controlnet", "sd3_control", "flux_control", "adapter"]
CLASSES = {"sd3_control": SD3ControlNetModel, "flux_control": FluxControlNetModel,
           "adapter": T2IAdapter}  # fmt: skip
ODD = LoRA(rank=4, alpha=2.5)


def parts_of(family, frozen=True):
    """A plain pipeline that shares nothing with other tests, and its controller's option.

    Convolutions of weights that require gradients may round differently, so that what is compared
    bit for bit must have the same of them frozen.
    """
    theirs = getattr(tiny, family)()
    kind = "adapter" if family == "adapter" else "controlnet"
    plain = {"sd3_control": tiny.sd3, "flux_control": tiny.flux}
    pipe = plain.get(family, tiny.sd)()
    for name in pipe.components:
        part = getattr(theirs, name, None)
        if isinstance(part, nn.Module):
            pipe.register_modules(**{name: copy.deepcopy(part).requires_grad_(not frozen)})
    return pipe, {kind: copy.deepcopy(getattr(theirs, kind)).requires_grad_(not frozen)}


def policy_of(family, frozen=True, **options):
    pipe, controller = parts_of(family, frozen)
    options = {"num_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16, **options}
    return load_policy(pipe, **{**controller, **options})


def inputs(policy):
    control = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        condition = policy.encode(["a cat", "dog on a log"], control=control)
        return condition, policy.initial(condition, sample_generators(0, 2, 1))


def mean(policy):
    condition, x = inputs(policy)
    with torch.no_grad():
        return policy.step_law(x, 0, condition).mean


def images(policy):
    condition, x = inputs(policy)
    with torch.no_grad():
        final = rollout(policy, condition, sample_generators(1, 2, 1), x=x).final
        return policy.decode(final, condition).data


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


def scramble(trainable, scale):
    generator = torch.Generator().manual_seed(5)
    for p in trainable.parameters.values():
        p.data += scale * torch.randn(p.shape, generator=generator).to(p)


@pytest.mark.parametrize("train", ["control", "base"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_network_is_trained(family, method, train):
    """Gradients reach it and no other; the reference stays."""
    policy = policy_of(family, frozen=False, train=train)
    before = mean(policy)
    trainable = Trainable(policy, Training(method=method, lora=ODD))
    assert trainable.network is (policy.controller if train == "control" else policy.base)
    same(mean(policy), before)
    scramble(trainable, 0.5 if method == "lora" else 0.05)
    assert (mean(policy) - before).abs().max() > 1e-3
    same(mean(trainable.reference), before)
    condition, x = inputs(policy)
    policy.denoising_loss(x, condition, sample_generators(2, 2, 1)).sum().backward()
    ours = {id(p) for p in trainable.parameters.values()}
    for part in (policy.controller, policy.base, *policy.pipe.components.values()):
        for p in part.parameters() if isinstance(part, nn.Module) else []:
            assert p.requires_grad == (id(p) in ours)
            assert p.grad is None or id(p) in ours
    reached = [p.grad is not None and bool(p.grad.any()) for p in trainable.parameters.values()]
    assert sum(reached) > 0.4 * len(reached)


def test_layers_that_get_adapters():
    """Of a ControlNet its attention; of an adapter, which has none, its convolutions."""
    found = {}
    for family in ("controlnet", "adapter"):
        trainable = Trainable(policy_of(family), Training())
        found[family] = {name.split(".lora_")[0] for name in trainable.parameters}
    assert len(found["controlnet"]) == 16  # 2 transformer blocks, 2 attentions, 4 projections
    assert all(".attn" in name for name in found["controlnet"])
    convolutions = [n for n, m in tiny.adapter_part().named_modules() if isinstance(m, nn.Conv2d)]
    assert found["adapter"] == set(convolutions)
    base = Trainable(policy_of("adapter", train="base"), Training())
    assert all(".attn" in name for name in base.parameters)


def test_a_new_controlnet_is_no_place_for_adapters():
    """Behind layers that are zero they would learn nothing, for ever."""
    policy = policy_of("controlnet", controlnet="new")
    with pytest.raises(ValueError, match="is new: its last layers are zero.*train it in full"):
        Trainable(policy, Training())
    targets = ".*(to_q|controlnet_mid_block|controlnet_down_blocks.0)"
    trainable = Trainable(policy, Training(lora=LoRA(targets=targets)))
    condition, x = inputs(policy)
    policy.denoising_loss(x, condition, sample_generators(2, 2, 1)).sum().backward()
    assert any(p.grad.any() for p in trainable.parameters.values())
    Trainable(policy_of("controlnet", controlnet="new"), Training(method="full"))
    Trainable(policy_of("controlnet", controlnet="new", train="base"), Training())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_reads_back_as_a_model_of_its_own(family, tmp_path):
    policy = policy_of(family)
    kind = "adapter" if family == "adapter" else "controlnet"
    before = images(policy)
    trainable = Trainable(policy, Training(method="full", ema_decay=0.5))
    scramble(trainable, 0.05)
    trainable.ema_step()
    trained = images(policy)
    assert (trained - before).abs().max() > 1e-4
    scramble(trainable, 0.05)  # not what is to be saved
    trainable.save(tmp_path / "final")
    assert {p.name for p in (tmp_path / "final").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    found = CLASSES.get(family, ControlNetModel).from_pretrained(tmp_path / "final")
    for controller in (found, tmp_path / "final"):
        assert torch.equal(images(policy_of(family, **{kind: controller})), trained)


@pytest.mark.parametrize("family", ["controlnet", "flux_control", "adapter"])
def test_lora_of_a_controller_is_pefts(family, tmp_path):
    policy = policy_of(family)
    before = images(policy)
    trainable = Trainable(policy, Training(lora=ODD))
    scramble(trainable, 0.5)
    trained = images(policy)
    assert (trained - before).abs().max() > 1e-4
    trainable.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json"
    }  # fmt: skip
    for fuse in (False, True):
        again = policy_of(family)
        load_lora(again, tmp_path, fuse=fuse)
        torch.testing.assert_close(images(again), trained, rtol=0, atol=1e-5)
        reference = images(again.reference())
        torch.testing.assert_close(reference, trained if fuse else before, rtol=0, atol=1e-5)
    again = policy_of(family, lora=tmp_path)
    torch.testing.assert_close(images(again), trained, rtol=0, atol=1e-5)
    if family != "adapter":  # diffusers' adapters have no support for peft
        _, controller = parts_of(family)
        (controller,) = controller.values()
        PeftModel.from_pretrained(controller, str(tmp_path))
        again = policy_of(family, controlnet=controller)
        torch.testing.assert_close(images(again), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["controlnet", "flux_control", "adapter"])
def test_lora_of_the_base_is_the_pipelines(family, tmp_path):
    policy = policy_of(family, train="base")
    before = images(policy)
    trainable = Trainable(policy, Training(lora=ODD))
    scramble(trainable, 0.5)
    trained = images(policy)
    assert (trained - before).abs().max() > 1e-4
    trainable.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe, controller = parts_of(family)
    pipe.load_lora_weights(tmp_path)
    again = load_policy(
        pipe, num_steps=2, guidance_scale=2.0, height=16, width=16, train="base", **controller
    )
    torch.testing.assert_close(images(again), trained, rtol=0, atol=1e-5)
    for train in ("base", "control"):  # also below a control network that is trained
        again = policy_of(family, train=train, lora=tmp_path)
        torch.testing.assert_close(images(again), trained, rtol=0, atol=1e-5)


def test_full_base_is_saved_as_its_pipeline(tmp_path):
    pipe = tiny.controlnet()
    for name, part in list(pipe.components.items()):
        if isinstance(part, nn.Module):
            pipe.register_modules(**{name: copy.deepcopy(part)})
    options = {"num_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16, "train": "base"}
    policy = load_policy(pipe, **options)
    trainable = Trainable(policy, Training(method="full"))
    scramble(trainable, 0.02)
    trained = images(policy)
    trainable.save(tmp_path)
    again = load_policy(tmp_path, **options)
    same(images(again), trained)
    for name, p in again.base.state_dict().items():
        assert torch.equal(p, policy.base.state_dict()[name])


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_recomputed(family, method):
    """Of both networks; an adapter's are kept. Gradients are the same."""
    grads = []
    for checkpointing in (False, True):
        policy = policy_of(family)
        training = Training(method=method, activation_checkpointing=checkpointing, lora=ODD)
        trainable = Trainable(policy, training)
        scramble(trainable, 0.05)
        condition, x = inputs(policy)
        places = [policy.base] if family == "adapter" else [policy.base, policy.controller]
        inner = [m for n in places for m in n.modules() if type(m).__name__.startswith("Attention")]
        inner += [m for n in places for m in n.modules() if type(m).__name__ == "FluxAttention"]
        calls = dict.fromkeys(inner, 0)
        for module in inner:
            module.register_forward_pre_hook(
                lambda m, *_, calls=calls: calls.update({m: calls[m] + 1})
            )
        policy.denoising_loss(x, condition, sample_generators(2, 2, 1)).sum().backward()
        for network in places:
            most = max(count for module, count in calls.items() if module in set(network.modules()))
            assert most == 1 + checkpointing
        grads.append([p.grad for p in trainable.parameters.values()])
    for plain, recomputed in zip(*grads, strict=True):
        assert (plain is None and recomputed is None) or torch.equal(plain, recomputed)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16(method):
    pipe, controller = parts_of("controlnet")
    pipe.to(torch.bfloat16)
    policy = load_policy(pipe, num_steps=2, guidance_scale=2.0, height=16, width=16, **controller)
    training = Training(method=method, mixed_precision="bf16", lora=ODD)
    trainable = Trainable(policy, training)
    assert {p.dtype for p in trainable.parameters.values()} == {torch.float32}
    assert policy.base.dtype == torch.bfloat16
    assert torch.equal(mean(trainable.reference), mean(policy))
    condition, x = inputs(policy)
    with torch.autocast("cpu", torch.bfloat16):
        policy.denoising_loss(x, condition, sample_generators(2, 2, 1)).sum().backward()
    grads = [p.grad for p in trainable.parameters.values() if p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)

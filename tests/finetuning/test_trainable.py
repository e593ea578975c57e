"""What is trained, that nothing else is, and that what is saved gives the same images elsewhere."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_model
from torch import nn

from diffreward.finetuning.options import LoRA, Training
from diffreward.finetuning.trainable import Trainable
from diffreward.networks.dna import DNAConvNet
from diffreward.policies import load_lora, load_policy
from diffreward.policies.dna import DNAPolicy
from diffreward.policy import rollout, sample_generators

FAMILIES = ["sd", "sdxl", "sd3", "flux", "ddpm"]
NETWORK = {"sd3": "transformer", "flux": "transformer"}  # others: unet
TEXT = [f"add_{x}_proj" for x in "qkv"]
ODD = LoRA(rank=4, alpha=2.5)  # a scale that is neither 1 nor a rank


def own(family):
    """A tiny pipeline that shares nothing with other tests: training changes networks in place."""
    pipe = getattr(tiny, family)()
    for name, part in list(pipe.components.items()):
        if isinstance(part, nn.Module):
            pipe.register_modules(**{name: copy.deepcopy(part).requires_grad_(True)})
    return pipe


def policy_of(pipe):
    size = {} if type(pipe).__name__ == "DDPMPipeline" else {"height": 16, "width": 16}
    return load_policy(pipe, num_steps=2, guidance_scale=2.0, **size)


def inputs(policy):
    prompts = ["a cat", "dog on a log"]
    with torch.no_grad():
        condition = policy.encode(prompts)
        return condition, policy.initial(condition, sample_generators(0, 2, 1))


def images(policy):
    condition, x = inputs(policy)
    with torch.no_grad():
        final = rollout(policy, condition, sample_generators(1, 2, 1), x=x).final
        return policy.decode(final, condition).data


def mean(policy, i=0):
    condition, x = inputs(policy)
    with torch.no_grad():
        return policy.step_law(x, i, condition).mean


def scramble(trainable, scale=0.5):
    """Other weights, as if they had been trained."""
    generator = torch.Generator().manual_seed(5)
    for p in trainable.parameters.values():
        p.data += scale * torch.randn(p.shape, generator=generator).to(p)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


class Toy:
    """A policy without a pipeline."""

    def __init__(self, network):
        self.denoiser = network

    def reference(self):
        return SimpleNamespace(denoiser=copy.deepcopy(self.denoiser))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.outer = nn.Linear(5, 2)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.outer(self.drop(torch.tanh(self.inner(x))))


def toy(**training):
    torch.manual_seed(0)
    training = {"lora": LoRA(rank=2, targets=["inner", "outer"]), **training}
    return Trainable(Toy(Net()), Training(**training))


# What is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_starts_as_the_pretrained_law_and_keeps_it_as_reference(family):
    pipe = own(family)
    policy = policy_of(pipe)
    before = [mean(policy, i) for i in range(2)]
    trainable = Trainable(policy, Training(lora=ODD))
    assert trainable.policy is policy and trainable.network is getattr(
        pipe, NETWORK.get(family, "unet")
    )
    assert all(torch.equal(mean(policy, i), before[i]) for i in range(2))
    scramble(trainable)
    for i in range(2):
        assert (mean(policy, i) - before[i]).abs().max() > 1e-3
        assert torch.equal(mean(trainable.reference, i), before[i])
        assert (mean(policy, i) - before[i]).abs().max() > 1e-3  # adapters are on again


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_adapters_and_nothing_else(family):
    pipe = own(family)
    policy = policy_of(pipe)
    base = {name: p.clone() for name, p in policy.denoiser.named_parameters()}
    trainable = Trainable(policy, Training(lora=ODD))
    scramble(trainable)  # with B = 0 nothing would reach A
    assert list(trainable.parameters) == sorted(trainable.parameters)
    ends = {name.split(".lora_")[0].split(".attn")[-1] for name in trainable.parameters}
    text = {"sd3": [*TEXT], "flux": [*TEXT, "to_add_out"]}.get(family, [])
    for end in ["to_q", "to_k", "to_v", "to_out.0", *text]:
        assert any(found.endswith(end) for found in ends), end
    targeted = len({name.split(".lora_")[0] for name in trainable.parameters})
    everywhere = [
        name for name, m in trainable.network.named_modules()
        if isinstance(m, nn.Linear) and "lora_" not in name
        and name.removesuffix(".base_layer").endswith(
            ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
             "to_add_out")
        )
    ]  # fmt: skip
    assert targeted == len(everywhere) and len(trainable.parameters) == 2 * targeted
    condition, x = inputs(policy)
    law = policy.step_law(x, 0, condition)
    law.log_prob(law.sample()).sum().backward()
    for part in pipe.components.values():
        for p in part.parameters() if isinstance(part, nn.Module) else []:
            ours = any(p is q for q in trainable.parameters.values())
            assert p.requires_grad == ours and (p.grad is None) != ours
    # the queries of SD3's last text block are computed and not used
    reached = {name for name, p in trainable.parameters.items() if p.grad.abs().max() > 0}
    assert all("add_q_proj" in name for name in trainable.parameters.keys() - reached)
    optimizer = torch.optim.SGD(trainable.parameters.values(), lr=1.0)
    optimizer.step()
    now = dict(trainable.network.named_parameters())
    for name, value in base.items():
        found = now.get(name, now.get(".base_layer.".join(name.rsplit(".", 1))))
        assert torch.equal(found, value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_are_float32_on_a_bfloat16_network(family, autocast):
    pipe = own(family).to(torch.bfloat16)
    policy = policy_of(pipe)
    before = mean(policy)
    trainable = Trainable(policy, Training())
    assert {p.dtype for p in trainable.parameters.values()} == {torch.float32}
    assert policy.dtype == torch.bfloat16 and torch.equal(mean(policy), before)
    scramble(trainable, 0.05)
    condition, x = inputs(policy)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        law = policy.step_law(x, 0, condition)
    law.log_prob(law.sample()).sum().backward()
    grads = [p.grad for p in trainable.parameters.values()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    assert sum(g.abs().max() > 0 for g in grads) > len(grads) / 2
    assert torch.equal(mean(trainable.reference), before)


def test_full_trains_everything_and_the_reference_is_a_frozen_copy():
    policy = policy_of(own("sd"))
    before = mean(policy)
    trainable = Trainable(policy, Training(method="full"))
    network = trainable.network
    assert list(trainable.parameters) == sorted(n for n, _ in network.named_parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in trainable.reference.denoiser.parameters())
    assert not any(p.requires_grad for p in policy.pipe.vae.parameters())
    scramble(trainable, 0.02)
    assert (mean(policy) - before).abs().max() > 1e-3
    assert torch.equal(mean(trainable.reference), before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_full_weights_are_float32_under_mixed_precision(precision):
    pipe = own("sd").to(torch.bfloat16)
    policy = policy_of(pipe)
    trainable = Trainable(policy, Training(method="full", mixed_precision=precision, ema_decay=0.9))
    wanted = torch.bfloat16 if precision == "no" else torch.float32
    assert {p.dtype for p in trainable.parameters.values()} == {wanted}
    assert policy.dtype == wanted and pipe.vae.dtype == torch.bfloat16
    assert torch.equal(mean(trainable.reference), mean(policy))  # computed alike: KL 0
    # an average in bfloat16 would not move
    assert trainable.state_dict()["ema/conv_in.bias"].dtype == torch.float32


def test_float64_stays():
    policy = Toy(Net().double())
    trainable = Trainable(policy, Training(lora=LoRA(targets=["inner"]), mixed_precision="bf16"))
    assert {p.dtype for p in trainable.network.parameters()} == {torch.float64}
    full = Trainable(Toy(Net().double()), Training(method="full", mixed_precision="bf16"))
    assert {p.dtype for p in full.parameters.values()} == {torch.float64}


def test_adapters_are_those_of_lora():
    """y = W x + alpha / rank B A x, A ~ N(0, 1 / rank^2), of the seed alone; B = 0."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    nets = [copy.deepcopy(nn.Sequential(nn.Linear(400, 300))) for _ in range(3)]
    torch.set_rng_state(state)
    found = []
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        training = Training(lora=LoRA(rank=8, alpha=3.0, targets=["0"]), seed=seed)
        found.append(Trainable(Toy(net), training).parameters)
        torch.rand(1)  # what else is drawn makes no difference
    torch.set_rng_state(state)
    a, b = found[0].values()
    assert a.shape == (8, 400) and b.shape == (300, 8) and not b.any()
    assert abs(a.mean()) < 5 / 8 / 3200**0.5 and abs(a.std() * 8 - 1) < 5 / 6400**0.5
    assert torch.equal(a, next(iter(found[1].values())))
    assert not torch.equal(a, next(iter(found[2].values())))
    b.data.normal_()
    x = torch.randn(5, 400)
    linear = nets[0][0].base_layer
    torch.testing.assert_close(nets[0](x), linear(x) + 3 / 8 * x @ a.T @ b.T, rtol=1e-4, atol=1e-4)
    state = torch.get_rng_state()
    toy()
    torch.manual_seed(0)
    Net()
    after = torch.get_rng_state()
    toy()
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(state, after)


def test_alpha_defaults_to_the_rank():
    assert toy().network.inner.scaling == {"reward": 1.0}


# Which layers ---------------------------------------------------------------------------------


def targeted(targets, family="sd"):
    network = getattr(own(family), NETWORK.get(family, "unet"))
    trainable = Trainable(Toy(network), Training(lora=LoRA(rank=2, targets=targets)))
    return sorted({name.split(".lora_")[0] for name in trainable.parameters})


def test_targets():
    attention = targeted(None)
    assert len(attention) == 32  # 4 transformer blocks, 2 attentions, 4 projections
    assert targeted(["to_q", "to_k", "to_v", "to_out.0"]) == attention
    assert targeted(r".*\.to_(q|k|v|out\.0)") == attention
    assert targeted(["mid_block.attentions.0.proj_in", "conv_in"]) == [
        "conv_in", "mid_block.attentions.0.proj_in"
    ]  # fmt: skip
    network = own("sd").unet
    leaves = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert targeted(".*") == sorted(leaves)
    assert targeted(["net.2"])[0].endswith("ff.net.2")
    assert not any("attn1" in name for name in targeted(["attn2.to_q"]))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_qq"], r"UNet2DConditionModel has no layer 'to_qq'.*did you mean to_q, to_"),
        (["out.0"], r"no layer 'out.0', nor one that ends in '.out.0'; did you mean to_out.0"),
        (["q"], r"no layer 'q'"),
        (["zzzz"], r"layers that can have one end in: conv_in, linear_1"),
        ([], r"layers that can have one end in: conv_in"),
        ("to_q", r"expression 'to_q' matches the whole name of no layer.*did you mean to_q"),
        ("attn9.*", r"matches the whole name of no layer"),
        (["attn1"], r"no layer 'attn1'"),  # a module, not a layer
    ],
)
def test_targets_that_match_nothing(targets, message):
    with pytest.raises(ValueError, match=message):
        targeted(targets)


def test_refusals():
    with pytest.raises(
        ValueError, match=r"none of the layers that get adapters by.*end in: inner, outer"
    ):
        toy(lora=LoRA())
    with pytest.raises(ValueError, match="rank must be at least 1, but 0 came"):
        toy(lora=LoRA(rank=0))
    with pytest.raises(ValueError, match=r"object cannot be trained: its attribute `denoiser`"):
        Trainable(object(), Training())
    with pytest.raises(ValueError, match=r"Net cannot recompute its activations .* set activation"):
        toy(activation_checkpointing=True)
    once = toy()
    for method in ("lora", "full"):
        with pytest.raises(ValueError, match=r"has adapters already. Fuse them"):
            Trainable(once.policy, Training(method=method, lora=LoRA(targets=["inner"])))


# Modes ----------------------------------------------------------------------------------------


def test_dropout_is_off():
    policy = Toy(Net().train())
    scramble(Trainable(policy, Training(lora=LoRA(rank=2, targets=["inner"]))))
    x = torch.randn(4, 3)
    assert torch.equal(policy.denoiser(x), policy.denoiser(x))
    full = Trainable(Toy(Net().train()), Training(method="full"))
    assert torch.equal(full.network(x), full.network(x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_activations_are_recomputed(family, method):
    counts, grads = [], []
    for checkpointing in (False, True):
        policy = policy_of(own(family))
        training = Training(method=method, activation_checkpointing=checkpointing, lora=ODD)
        trainable = Trainable(policy, training)
        scramble(trainable, 0.05)
        calls = []
        # diffusers recomputes the convolutions of a UNet, and not all of its attentions
        inside = "to_q" if family in NETWORK else "up_blocks.0.resnets.1.conv1"
        inner = next(m for n, m in policy.denoiser.named_modules() if n.endswith(inside))
        inner.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        condition, x = inputs(policy)
        law = policy.step_law(x, 0, condition)
        forward = len(calls)
        law.log_prob(law.sample(sample_generators(0, 2, 1))).sum().backward()
        counts.append(len(calls) / forward)
        grads.append([p.grad for p in trainable.parameters.values()])
        calls.clear()
        mean(policy)
        assert len(calls) == forward
    assert counts == [1, 2]
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_compile_is_in_place():
    plain, compiled = toy(), toy(compile=True)
    assert plain.network._compiled_call_impl is None
    assert compiled.network._compiled_call_impl is not None
    assert compiled.parameters.keys() == plain.parameters.keys()
    with torch.compiler.set_stance("force_eager"):
        x = torch.randn(2, 3)
        assert torch.equal(compiled.network(x), plain.network(x))
    full = toy(method="full", compile=True)
    assert full.reference.denoiser._compiled_call_impl is None


# The moving average ---------------------------------------------------------------------------


def fill(trainable, value):
    for p in trainable.parameters.values():
        p.data.fill_(value)


def values(trainable):
    return {v for p in trainable.parameters.values() for v in p.detach().unique().tolist()}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9999])
def test_average(method, decay):
    trainable = toy(method=method, ema_decay=decay)
    truth = 0.0
    for n in range(1, 7):
        fill(trainable, float(n * n))
        trainable.ema_step()
        rate = min(decay, n / (n + 9))
        truth = n * n if truth is None else rate * truth + (1 - rate) * n * n
    fill(trainable, 7.0)
    with trainable.averaged():
        (found,) = values(trainable)
        assert found == pytest.approx(truth, rel=1e-5)
    assert values(trainable) == {7.0}


def test_averaged_restores_whatever_happens():
    trainable = toy(ema_decay=0.5)
    trainable.ema_step()
    scramble(trainable)
    before = {name: p.clone() for name, p in trainable.parameters.items()}
    with pytest.raises(ZeroDivisionError), trainable.averaged():
        assert not all(torch.equal(p, before[n]) for n, p in trainable.parameters.items())
        with trainable.averaged():  # once is enough
            pass
        assert not all(torch.equal(p, before[n]) for n, p in trainable.parameters.items())
        _ = 1 / 0
    assert all(torch.equal(p, before[n]) for n, p in trainable.parameters.items())


def test_no_average():
    trainable = toy()
    trainable.ema_step()
    scramble(trainable)
    x = torch.randn(2, 3)
    before = trainable.network(x)
    with trainable.averaged():
        assert torch.equal(trainable.network(x), before)
    assert trainable.state_dict().keys() == trainable.parameters.keys()


# Resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_state_round_trip(method, ema_decay):
    whole, other = (toy(method=method, ema_decay=ema_decay, seed=n) for n in (1, 2))
    for n in range(3):
        scramble(whole)
        whole.ema_step()
        if n == 1:
            state = {name: value.clone() for name, value in whole.state_dict().items()}
    scramble(other, 3.0)
    other.load_state_dict(state)
    scramble(other)
    other.ema_step()
    assert other.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    for name, p in whole.parameters.items():
        assert torch.equal(other.parameters[name], p)


def test_state_of_another_model_is_refused():
    trainable = toy(ema_decay=0.9)
    before = {name: value.clone() for name, value in trainable.state_dict().items()}
    good = {name: torch.full_like(value, 3) for name, value in before.items()}
    name = "inner.lora_A.reward.weight"
    bad = {
        f"{name} is missing": {k: v for k, v in good.items() if k != name},
        "x is unknown here": {**good, "x": torch.ones(1)},
        rf"{name} is torch.float32 \(2, 4\), but torch.float32 \(2, 3\) here": {
            **good, name: torch.ones(2, 4)
        },
        f"{name} is torch.float64": {**good, name: good[name].double()},
        "ema/.* is missing; .*; and 4 more": {},
    }  # fmt: skip
    for message, state in bad.items():
        with pytest.raises(ValueError, match=message):
            trainable.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in trainable.state_dict().items())


# What is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("targets", [None, ".*(to_q|proj_out|add_k_proj|conv_in)"])
def test_lora_reads_back_through_the_pipeline(family, targets, tmp_path):
    policy = policy_of(own(family))
    base = images(policy)
    training = Training(lora=LoRA(rank=4, alpha=2.5, targets=targets), ema_decay=0.5)
    trainable = Trainable(policy, training)
    scramble(trainable)
    trainable.ema_step()  # the first average is the weights
    trained = images(policy)
    assert (trained - base).abs().max() > 1e-3
    scramble(trainable)  # not what is to be saved
    assert (images(policy) - trained).abs().max() > 1e-3
    trainable.save(tmp_path / "new" / "final")
    assert [p.name for p in (tmp_path / "new").rglob("*")] == [
        "final", "pytorch_lora_weights.safetensors"
    ]  # fmt: skip
    for folder in (tmp_path / "new" / "final", str(tmp_path / "new" / "final")):
        pipe = own(family)
        pipe.load_lora_weights(folder)
        same(images(policy_of(pipe)), trained)
        pipe.set_adapters("default_0", 0.0)
        same(images(policy_of(pipe)), base)
    for fuse in (False, True):
        again = policy_of(own(family))
        load_lora(again, tmp_path / "new" / "final", fuse=fuse)
        torch.testing.assert_close(images(again), trained, rtol=0, atol=1e-5)
        reference = images(again.reference())
        torch.testing.assert_close(reference, trained if fuse else base, rtol=0, atol=1e-5)
    # and training goes on from the fused one
    Trainable(again, Training())
    torch.testing.assert_close(images(again), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [None, ".*"])
def test_lora_without_a_reader_is_pefts(targets, tmp_path):
    policy = policy_of(own("ddpm"))
    base = images(policy)
    trainable = Trainable(policy, Training(lora=LoRA(rank=4, alpha=2.5, targets=targets)))
    scramble(trainable, 0.05 if targets else 0.5)
    trained = images(policy)
    assert (trained - base).abs().max() > 1e-3
    trainable.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json"
    }  # fmt: skip
    pipe = own("ddpm")
    PeftModel.from_pretrained(pipe.unet, str(tmp_path))
    same(images(policy_of(pipe)), trained)
    for fuse in (False, True):
        again = policy_of(own("ddpm"))
        load_lora(again, tmp_path, fuse=fuse)
        torch.testing.assert_close(images(again), trained, rtol=0, atol=1e-5)
        reference = images(again.reference())
        torch.testing.assert_close(reference, trained if fuse else base, rtol=0, atol=1e-5)
    Trainable(again, Training())
    torch.testing.assert_close(images(again), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_reads_back_as_a_pipeline(family, tmp_path):
    pipe = own(family)
    policy = policy_of(pipe)
    base = images(policy)
    trainable = Trainable(policy, Training(method="full", ema_decay=0.5))
    scramble(trainable, 0.02)
    trainable.ema_step()
    trained = images(policy)
    scramble(trainable, 0.02)
    trainable.save(tmp_path / "final")
    again = tiny.quiet(type(pipe).from_pretrained(tmp_path / "final"))
    same(images(policy_of(again)), trained)
    assert (trained - base).abs().max() > 1e-3
    assert (images(policy) - trained).abs().max() > 1e-3


def test_policies_without_a_pipeline(tmp_path):
    x = torch.randn(2, 3)
    trainable = toy()
    scramble(trainable)
    trainable.save(tmp_path / "lora")
    fresh = Toy(Net())
    base_state = {
        k.replace(".base_layer", ""): v for k, v in trainable.network.state_dict().items()
    }
    fresh.denoiser.load_state_dict({k: v for k, v in base_state.items() if "lora" not in k})
    fresh.denoiser.eval()
    load_lora(fresh, tmp_path / "lora")
    torch.testing.assert_close(fresh.denoiser(x), trainable.network(x))
    full = toy(method="full")
    scramble(full)
    full.save(tmp_path / "full")
    net = Net().eval()
    load_model(net, tmp_path / "full" / "model.safetensors")
    assert torch.equal(net(x), full.network(x))


@pytest.mark.parametrize(
    ("kind", "names"),
    [("dna", {"stem", "conv", "0", "2"}), ("protein", {"W1", "W2", "W3", "W_in", "W_out"})],
)
def test_adapters_of_sequence_networks(kind, names, tmp_path):
    """The default ones, all of which take part; they read back."""
    policy = load_policy("embedded:protein", num_steps=4, device="cpu")
    if kind == "dna":
        policy = DNAPolicy(DNAConvNet(channels=4, rounds=1), 10, num_steps=4)
        fresh = copy.deepcopy(policy)
    trainable = Trainable(policy, Training())
    scramble(trainable, 0.3)
    layers = {name.split(".lora_")[0] for name in trainable.parameters}
    assert {name.split(".")[-1] for name in layers} == names
    if kind == "dna":  # peft has no dilated ones
        assert {name for name in layers if "blocks" in name} == {"blocks.0.conv", "blocks.1.conv"}
    condition = policy.encode([""])
    law = policy.step_law(policy.relax(policy.initial(condition)), 0, condition)
    law.x0.square().sum().backward()
    for name, p in trainable.parameters.items():
        assert p.grad.abs().max() > 0, name
    assert (policy.reference().step_law(law.x, 0, condition).x0 - law.x0).abs().max() > 1e-4
    trainable.save(tmp_path / "lora")
    if kind == "dna":
        load_lora(fresh, tmp_path / "lora", fuse=True)
    else:
        fresh = load_policy("embedded:protein", num_steps=4, lora=tmp_path / "lora", device="cpu")
    assert not any("lora" in name for name, _ in fresh.denoiser.named_parameters())
    found = fresh.step_law(law.x, 0, condition).x0
    torch.testing.assert_close(found, law.x0, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "ddpm"])
def test_failed_save_damages_nothing(family, tmp_path, monkeypatch):
    trainable = Trainable(policy_of(own(family)), Training())
    folder = tmp_path / "final"
    trainable.save(folder)
    (folder / "README.md").write_text("card")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    scramble(trainable)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        where = "safetensors.torch" if family == "sd" else "diffreward.finetuning.trainable"
        patch.setattr(f"{where}.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            trainable.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    (tmp_path / ".unfinished-final").mkdir()  # of one that was killed
    (tmp_path / ".unfinished-final" / "rubbish").touch()
    trainable.save(folder)
    now = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert now.keys() == before.keys() and now["README.md"] == b"card"
    weights = next(name for name in now if name.endswith(".safetensors"))
    assert now[weights] != before[weights]
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def _peft_is_too_old():
    """Whether transformers, which loads LoRAs of text encoders, refuses the peft that is there."""
    from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        return True
    return False


@pytest.mark.skipif(_peft_is_too_old(), reason="transformers wants a newer peft for text encoders")
def test_fusing_takes_text_encoders_too(tmp_path):
    """Others' LoRAs may have them."""
    layers, metadata = {}, {}
    pipe = own("sd")
    for name, targets in (("unet", ["to_q"]), ("text_encoder", ["q_proj", "out_proj"])):
        lora = LoRA(rank=2, alpha=1.0, targets=targets)
        trained = Trainable(Toy(getattr(pipe, name)), Training(lora=lora))
        scramble(trained)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(trained.network, None, "reward")
        config = trained.network.peft_config["reward"].to_dict()
        metadata[f"{name}_lora_adapter_metadata"] = config
    pipe.save_lora_weights(tmp_path, **layers, **metadata)
    found = {}
    for fuse in (False, True):
        policy = policy_of(own("sd"))
        base = policy.encode(["a cat"]).tensors["prompt_embeds"]
        load_lora(policy, tmp_path, fuse=fuse)
        assert (policy.encode(["a cat"]).tensors["prompt_embeds"] - base).abs().max() > 1e-3
        found[fuse] = images(policy)
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=1e-5)
    same(found[False], images(policy_of(pipe)))


def test_loras_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither pytorch_lora_weights.* nor adapter_conf"):
        load_lora(policy_of(own("sd")), tmp_path)
    for family in ("sd", "sd3", "ddpm"):
        Trainable(policy_of(own(family)), Training()).save(tmp_path / family)
    with pytest.raises(ValueError, match="has nothing for this UNet2DConditionModel"):
        load_lora(policy_of(own("sd")), tmp_path / "sd3")
    with pytest.raises(ValueError, match="does not fit this UNet2DConditionModel"):
        load_lora(policy_of(own("sdxl")), tmp_path / "sd")
    with pytest.raises(ValueError, match="which DDPMPipeline has not"):
        load_lora(policy_of(own("ddpm")), tmp_path / "sd")
    with pytest.raises(ValueError, match="does not fit this Net"):
        load_lora(Toy(Net()), tmp_path / "ddpm")

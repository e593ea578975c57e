"""The DNA networks against plain sums, finite differences, and what they say of themselves."""

import json

import numpy as np
import pytest
import torch
from scipy.special import erf

from diffreward.networks.dna import (
    PAPER,
    SMALL,
    DNAConvNet,
    SequenceCNN,
    reverse_complement,
)
from diffreward.samples import to_strings, to_tokens

TINY = {"channels": 6, "kernel": 3, "dilations": (1, 3), "rounds": 2}


def trained(network):
    """Weights that are nowhere what they were initialised to (LayerNorm starts as 1 and 0)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return network.double().eval()


def tokens(b, length, high, seed=0):
    return torch.randint(high, (b, length), generator=torch.Generator().manual_seed(seed))


def relaxed(b, length, v, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, length, v, generator=g, dtype=torch.float64).softmax(-1)


# -- plain sums: what the networks are defined to be, in loops ------------------------------------


def conv(x, weight, bias, dilation=1):
    """(in, l) -> (out, l), zeros outside."""
    out = np.tile(bias[:, None], (1, x.shape[1]))
    middle = weight.shape[2] // 2
    for at in range(x.shape[1]):
        for tap in range(weight.shape[2]):
            there = at + (tap - middle) * dilation
            if 0 <= there < x.shape[1]:
                out[:, at] += weight[:, :, tap] @ x[:, there]
    return out


def norm(x, weight, bias):
    centred = x - x.mean(0)
    return centred / np.sqrt((centred**2).mean(0) + 1e-5) * weight[:, None] + bias[:, None]


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def numbers(network):
    return {name: w.numpy() for name, w in network.state_dict().items()}


@pytest.mark.parametrize("time", ["none", "constant", "level"])
def test_denoiser_is_what_its_docstring_says(time):
    network = trained(DNAConvNet(**TINY, time=time, mask_output=time == "constant"))
    x, w, t = relaxed(1, 11, 5), numbers(network), 0.3
    h = relu(conv(x[0].T.numpy(), w["stem.weight"], w["stem.bias"]))
    if time != "none":
        angle = 2 * np.pi * (t if time == "level" else 0.0) * w["embed_time.frequencies"]
        features = np.concatenate([np.sin(angle), np.cos(angle)])
        embedded = relu(w["embed_time.linear.weight"] @ features + w["embed_time.linear.bias"])
    for k, dilation in enumerate((1, 3, 1, 3)):
        block = {n.removeprefix(f"blocks.{k}."): v for n, v in w.items() if f"blocks.{k}." in n}
        inner = h
        if time != "none":
            inner = h + (block["time.weight"] @ embedded + block["time.bias"])[:, None]
        inner = norm(inner, block["norm.weight"], block["norm.bias"])
        h = h + relu(conv(inner, block["conv.weight"], block["conv.bias"], dilation))
    h = relu(conv(h, w["head.0.weight"], w["head.0.bias"]))
    want = conv(h, w["head.2.weight"], w["head.2.bias"]).T[:, :4]  # a fifth is that of MASK
    got = network(x, torch.tensor([t], dtype=torch.float64))[0]
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-10)


@pytest.mark.parametrize("length", [16, 13])
def test_oracle_is_what_its_docstring_says(length):
    network = trained(SequenceCNN(["x", "y"], channels=5, motif=7, blocks=2))
    x, w = relaxed(1, length, 4), numbers(network)
    h = gelu(conv(x[0].T.numpy(), w["stem.weight"], w["stem.bias"]))
    for k in range(2):
        inner = norm(h, w[f"norms.{k}.weight"], w[f"norms.{k}.bias"])
        h = h + gelu(conv(inner, w[f"convs.{k}.weight"], w[f"convs.{k}.bias"]))
        h = np.stack([h[:, i : i + 2].mean(1) for i in range(0, h.shape[1], 2)], 1)
    features = np.concatenate([h.mean(1), h.max(1)])
    want = w["head.weight"] @ features + w["head.bias"]
    np.testing.assert_allclose(network(x)[0].detach().numpy(), want, rtol=1e-9)


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "count"), [(PAPER, 3_326_597), (SMALL, 748_484)])
def test_number_of_parameters(config, count):
    network = DNAConvNet(**config)
    assert sum(p.numel() for p in network.parameters()) == count
    assert network(tokens(1, 200, 5)).shape == (1, 200, 4)  # no logit of MASK


def test_receptive_field():
    """With kernel 3, a letter reaches 1 in the first layer, then 1 + 3 in each of two rounds."""
    network = trained(DNAConvNet(**TINY))
    x = tokens(1, 41, 5)
    other = x.clone()
    other[0, 20] = (x[0, 20] + 1) % 5
    changed = (network(x) != network(other)).any(-1)[0].nonzero()[:, 0]
    assert changed.tolist() == list(range(20 - 9, 20 + 9 + 1))


def test_whole_window_is_seen():
    network = DNAConvNet(**SMALL).double()
    x = torch.zeros(1, 200, 5, dtype=torch.float64)
    x[..., 4] = 1
    x.requires_grad_()
    network(x)[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


# -- hard and relaxed tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "v"),
    [(DNAConvNet(**TINY), 5), (DNAConvNet(**PAPER), 5), (SequenceCNN(["x", "y"]), 4)],
)
def test_vertices_are_exact(network, v):
    x = tokens(2, 30, v)
    hot = torch.nn.functional.one_hot(x, v).float()
    torch.testing.assert_close(network.eval()(x), network(hot), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("network", "v"), [(DNAConvNet(**TINY), 5), (SequenceCNN(["x"], channels=6), 4)]
)
def test_gradient_against_finite_differences(network, v):
    x = relaxed(1, 9, v).requires_grad_()
    assert torch.autograd.gradcheck(trained(network), (x,), eps=1e-6, atol=1e-6)
    network(x).sum().backward()
    assert (x.grad.abs() > 0).any(-1).all()  # it reaches every position


def test_batch_does_not_matter():
    for network, v in ((DNAConvNet(**TINY), 5), (SequenceCNN(["x"]), 4)):
        x = tokens(4, 25, v)
        alone = torch.cat([network.eval()(row[None]) for row in x])
        torch.testing.assert_close(network(x), alone, rtol=1e-4, atol=1e-5)


def test_noise_level_matters_where_it_should():
    x, low, high = tokens(2, 20, 5), torch.full((2,), 0.1), torch.full((2,), 0.9)
    for time in ("none", "constant"):
        network = DNAConvNet(**TINY, time=time)
        assert torch.equal(network(x, low), network(x, high))
        assert torch.equal(network(x, low), network(x))
    network = DNAConvNet(**TINY, time="level")
    assert not torch.allclose(network(x, low), network(x, high))
    mixed = network(x, torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(mixed[1], network(x, high)[1])
    with pytest.raises(ValueError, match="give t"):
        network(x)


def test_half_precision_network_takes_what_the_chain_holds():
    network = DNAConvNet(**TINY).to(torch.bfloat16)
    assert network(relaxed(1, 8, 5).float()).dtype == torch.bfloat16


def test_oracle_drops_features_in_training_alone():
    network, x = SequenceCNN(["x"], dropout=0.5), tokens(1, 40, 4)
    assert not torch.equal(network.train()(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


# -- strands --------------------------------------------------------------------------------------


def test_reverse_complement():
    x = to_tokens("AACGTC", "dna")
    assert to_strings(reverse_complement(x[None]), "dna") == ["GACGTT"]
    assert reverse_complement(torch.tensor([0, 4, 1])).tolist() == [2, 4, 3]  # MASK stays
    x = tokens(3, 50, 5)
    assert torch.equal(reverse_complement(reverse_complement(x)), x)
    with pytest.raises(ValueError, match=r"0 to 3, and 4 for MASK, but 0 to 5 came"):
        reverse_complement(torch.tensor([0, 5]))


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "v"),
    [
        (DNAConvNet(**TINY), 5),
        (DNAConvNet(**TINY, time="level", mask_output=True), 5),
        (SequenceCNN(["one", "two"], channels=8, motif=5, blocks=1, dropout=0.1), 4),
    ],
)
def test_saved_network_is_the_same(network, v, tmp_path):
    network.save_pretrained(tmp_path / "new")
    again = type(network).from_pretrained(tmp_path / "new")
    assert again.config == network.config and not again.training
    x, t = tokens(2, 20, v), (torch.tensor([0.2, 0.7]),) * (v == 5)
    torch.testing.assert_close(again(x, *t), network.eval()(x, *t), rtol=0, atol=0)


def test_outputs_are_named():
    assert SequenceCNN(["one", "two"]).outputs == ("one", "two")
    assert SequenceCNN(["one", "two"])(tokens(3, 20, 4)).shape == (3, 2)


def test_what_is_no_such_network_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*missing"):
        DNAConvNet.from_pretrained(tmp_path / "missing")
    SequenceCNN(["x"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of a SequenceCNN, not of a DNAConvNet"):
        DNAConvNet.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"channels": 32}))
    with pytest.raises(ValueError, match=r"no working SequenceCNN.*size mismatch"):
        SequenceCNN.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 32}))
    with pytest.raises(ValueError, match=r"no working SequenceCNN.*'width'"):
        SequenceCNN.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        SequenceCNN.from_pretrained(tmp_path)


# -- bad input ------------------------------------------------------------------------------------


def test_bad_input():
    network, oracle = DNAConvNet(**TINY), SequenceCNN(["x"])
    with pytest.raises(ValueError, match="tokens must be 0 to 4, but 0 to 5 came"):
        network(torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match="tokens must be 0 to 3, but 0 to 4 came"):
        oracle(torch.tensor([[0, 4]]))  # a masked sequence has no score
    with pytest.raises(ValueError, match=r"must have 5 channels \(v \+ 1 with MASK\), but 4 came"):
        network(relaxed(1, 6, 4))
    with pytest.raises(ValueError, match=r"must have 4 channels \(v\), but 5 came"):
        oracle(relaxed(1, 6, 5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DNAConvNet(kernel=8), "odd to keep the length, but 8 came"),
        (lambda: DNAConvNet(time="log"), "none, constant or level, but 'log' came"),
        (lambda: SequenceCNN([]), r"at least one output .* but \[\]"),
        (lambda: SequenceCNN(["x"], motif=6), "odd motif width .* 6 came"),
    ],
)
def test_bad_configuration(build, message):
    with pytest.raises(ValueError, match=message):
        build()

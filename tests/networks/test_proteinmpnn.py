"""ProteinMPNN against numbers of the authors' code, and against its equations written plainly."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from diffreward._assets import asset_path
from diffreward.networks.proteinmpnn import (
    EMBEDDED,
    MASK,
    Decoder,
    Graph,
    ProteinMPNN,
    load_proteinmpnn,
    random_order,
)
from diffreward.networks.structure import Structure, read_structure

SCRIPT = Path(__file__).parents[2] / "scripts/embedded/reference_proteinmpnn.py"
REFERENCE = json.loads(Path(__file__).with_name("proteinmpnn_reference.json").read_text())


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    path = asset_path("structures") / "1ubi.pdb"
    two = tmp_path_factory.mktemp("pdb") / "two_chains.pdb"
    two.write_text(runpy.run_path(str(SCRIPT))["two_chains"](path.read_text()))
    return {"1ubi": read_structure(path), "two_chains": read_structure(two)}


def toy(length=9, neighbours=5, seed=0, dtype=torch.float64):
    """A small random network and a random walk of residues in two chains."""
    torch.manual_seed(seed)
    network = ProteinMPNN(num_neighbours=neighbours, num_layers=2).to(dtype)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1) if p.ndim > 1 else nn.init.normal_(p, 1.0, 0.1)
    steps = torch.randn(length, 1, 3).cumsum(0) * 2
    structure = Structure(
        "toy",
        (steps + torch.randn(length, 4, 3)).float(),
        "ACDEFGHIKLMNPQRSTVWY"[:length],
        ["A"] * (length - 4) + ["B"] * 4,
        [str(i) for i in range(length)],
        torch.arange(length),
    )
    return network, structure


def states(length, rows=6, seed=1):
    """Partly masked tokens, from all masked to complete, and an order for each row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(20, (rows, length), generator=g)
    x[torch.rand(x.shape, generator=g) < torch.linspace(1, 0, rows)[:, None]] = MASK
    return x, torch.rand((rows, length), generator=g).argsort(1)


def one_hot(x, width=21):
    return F.one_hot(x, width).double()


# The authors' numbers


@pytest.mark.parametrize("case", REFERENCE, ids=lambda c: f"{c['structure']}-{c['weights']}")
def test_equals_the_authors_code(case, structures):
    network, structure = load_proteinmpnn(case["weights"]), structures[case["structure"]]
    assert structure.native.tolist() == case["native"]
    with torch.no_grad():
        graph = network.encode(structure)
        # all cases in one batch: rows do not mix
        x = torch.tensor([c["tokens"] for c in case["conditionals"]])
        order = torch.tensor([c["order"] for c in case["conditionals"]])
        log_p = network(x, graph, order).log_softmax(-1)
        for row, c in zip(log_p, case["conditionals"], strict=True):
            expected = torch.tensor(c["log_probs"])
            torch.testing.assert_close(row[c["positions"]], expected, atol=1e-4, rtol=0)
        each = network.log_likelihood(
            structure.native[None], graph, torch.tensor([case["autoregressive"]["order"]])
        )[0]
    expected = torch.tensor(case["autoregressive"]["log_likelihood"])
    torch.testing.assert_close(each, expected, atol=1e-4, rtol=0)


def test_every_embedded_checkpoint_knows_ubiquitin(structures):
    structure = structures["1ubi"]
    order = random_order(torch.ones(76, dtype=torch.bool), torch.Generator().manual_seed(0))[None]
    found = {}
    with torch.no_grad():
        for name in EMBEDDED:
            each = load_proteinmpnn(name).log_likelihood(structure.native[None], structure, order)
            found[name] = float(each.mean())
    assert all(-1.7 < v < -1.0 for v in found.values())  # a uniform guess: -3.0
    assert len({round(v, 4) for v in found.values()}) == len(EMBEDDED)  # five different networks


# The equations, written plainly


def plain_decoder(decoder: Decoder, x, graph: Graph, order):
    """Logits for relaxed x (b, l, 21), message inputs concatenated and W3 inside the sum."""
    b, (length, k) = len(x), graph.neighbours.shape
    near, letters, v = graph.neighbours, x[..., :20] @ decoder.W_s.weight[:20], 1 - x[..., 20]
    h = graph.nodes.expand(b, length, -1)
    for layer in decoder.decoder_layers:
        sums = []
        for q in range(length):
            total = 0
            for j in range(k):
                p = near[q, j]
                a = (1 - v[:, q]) + v[:, q] * (order[:, p] < order[:, q])
                a = (a * (p != q))[:, None]
                w = a * v[:, p, None]
                state = w * h[:, p] + (1 - w) * graph.nodes[p]
                edge = graph.edges[q, j].expand(b, -1)
                z = torch.cat([h[:, q], edge, a * letters[:, p], state], -1)
                total = total + layer.W3(F.gelu(layer.W2(F.gelu(layer.W1(z)))))
            sums.append(total / 30)
        h = layer.norm1(h + torch.stack(sums, 1))
        h = layer.norm2(h + layer.dense(h))
    return decoder.W_out(h)


def test_the_fast_message_layer_equals_the_plain_one():
    network, structure = toy()
    graph = network.encode(structure)
    x, order = states(len(structure))
    hard = plain_decoder(network.decoder, one_hot(x), graph, order)
    torch.testing.assert_close(network(x, graph, order), hard, atol=1e-10, rtol=0)
    soft = torch.randn(6, len(structure), 21, dtype=torch.float64).softmax(-1)
    plain = plain_decoder(network.decoder, soft, graph, order)
    torch.testing.assert_close(network(soft, graph, order), plain, atol=1e-10, rtol=0)


def test_relaxed_inputs_are_exact_on_vertices():
    network, structure = toy()
    x, order = states(len(structure))
    expected = network(x, structure, order)
    torch.testing.assert_close(network(one_hot(x), structure, order), expected)
    complete = x[-1:]
    assert (complete < MASK).all()
    letters = one_hot(complete)[..., :20]
    torch.testing.assert_close(network(letters, structure, order[-1:]), expected[-1:])
    torch.testing.assert_close(
        network.log_likelihood(letters, structure, order[-1:]),
        network.log_likelihood(complete, structure, order[-1:]),
    )


def test_gradient_of_relaxed_inputs():
    network, structure = toy(length=6, neighbours=6)
    graph = network.encode(structure)
    graph = Graph(graph.nodes.detach(), graph.edges.detach(), graph.neighbours)
    x = torch.randn(1, 6, 21, dtype=torch.float64).softmax(-1).requires_grad_()
    order = torch.tensor([[3, 0, 5, 1, 4, 2]])
    weight = torch.randn(1, 6, 21, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: (network(x, graph, order) * weight).sum(), x)
    torch.autograd.gradcheck(lambda x: network.log_likelihood(x[..., :20], graph, order).sum(1), x)
    (gradient,) = torch.autograd.grad((network(x, graph, order) * weight).sum(), x)
    assert (gradient.abs().amax(-1) > 1e-6).all()  # every position matters


# What a position sees


def test_the_likelihood_is_the_product_of_masked_conditionals():
    """Unmasking one position per step, in any order, is autoregressive sampling."""
    network, structure = toy()
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(20, (len(structure),), generator=g)
    for _ in range(3):
        order = torch.randperm(len(structure), generator=g)
        x, total = torch.full_like(tokens, MASK), []
        for step in range(len(structure)):
            at = int((order == step).nonzero())
            log_p = network(x[None], structure, order[None]).log_softmax(-1)[0, at]
            total.append(log_p[tokens[at]])
            x[at] = tokens[at]
        each = network.log_likelihood(tokens[None], structure, order[None])[0]
        torch.testing.assert_close(torch.stack(total).sum(), each.sum())


def test_the_order_of_masked_positions_does_not_matter():
    network, structure = toy()
    x, order = states(len(structure))
    masked = x == MASK
    other = torch.where(masked, torch.rand(x.shape).mul(9), order.float())
    here, there = network(x, structure, order), network(x, structure, other)
    torch.testing.assert_close(here[masked], there[masked])


def test_batch_and_rigid_motion_change_nothing():
    network, structure = toy()
    x, order = states(len(structure))
    together = network(x, structure, order)
    alone = torch.cat([network(x[i : i + 1], structure, order[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(alone, together)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    turn = turn * turn.det()  # a rotation, not a reflection
    moved = Structure(**vars(structure))
    moved.coordinates = (structure.coordinates.double() @ turn + 50.0).float()
    torch.testing.assert_close(network(x, moved, order), together, atol=1e-4, rtol=0)
    mirrored = Structure(**vars(structure))
    mirrored.coordinates = structure.coordinates * torch.tensor([1.0, 1.0, -1.0])
    assert (network(x, mirrored, order) - together).abs().max() > 1e-3  # chirality is seen


def test_without_an_order_positions_come_one_after_the_other():
    network, structure = toy()
    x, _ = states(len(structure))
    order = torch.arange(len(structure))[None]
    torch.testing.assert_close(network(x, structure), network(x, structure, order))


def test_visible_positions_of_one_rank_do_not_see_each_other():
    network, structure = toy()
    x, _ = states(len(structure), rows=2)
    complete = torch.stack([x[-1], (x[-1] + 1) % 20])
    same = torch.zeros(1, len(structure))
    first, second = network(complete, structure, same)
    torch.testing.assert_close(first, second)


def test_a_random_order_puts_fixed_positions_first():
    later = torch.tensor([True, False, True, True, False])
    order = random_order(later, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    assert order[~later].max() < order[later].min()


def test_backbone_noise_is_reproducible(structures):
    network, structure = toy()
    plain = network.encode(structure).nodes
    a, b = (network.encode(structure, 0.1, torch.Generator().manual_seed(4)) for _ in range(2))
    torch.testing.assert_close(a.nodes, b.nodes)
    assert (a.nodes - plain).abs().max() > 1e-3


# Adapters


def test_adapters_act_as_their_merged_weights():
    from peft import LoraConfig, inject_adapter_in_model

    network, structure = toy()
    x, order = states(len(structure))
    before = network(x, structure, order)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["W1", "W2", "W3"]), network)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    adapted = network(x, structure, order)
    assert (adapted - before).abs().max() > 1e-3
    for module in list(network.modules()):
        if hasattr(module, "merge"):
            module.merge()
    torch.testing.assert_close(network(x, structure, order), adapted)


# Files and bad input


def test_the_authors_file_and_ours_are_the_same_network(tmp_path):
    source = load_proteinmpnn("v_48_002")
    checkpoint = {"num_edges": 48, "noise_level": 0.02}
    checkpoint["model_state_dict"] = source.published_state()
    torch.save(checkpoint, tmp_path / "other.pt")
    read = load_proteinmpnn(tmp_path / "other.pt").published_state()
    assert len(read) == 118  # as in the published checkpoints
    assert all(torch.equal(read[k], v) for k, v in source.published_state().items())
    assert not load_proteinmpnn("v_48_002").training


def test_files_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'v_48_20'.*v_48_020"):
        load_proteinmpnn("v_48_20")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load_proteinmpnn(tmp_path / "nothing.pt")
    state = load_proteinmpnn().published_state()
    ca_only = {"num_edges": 48, "noise_level": 0.2}
    ca_only["model_state_dict"] = {**state, "W_v.weight": torch.zeros(1)}
    torch.save(ca_only, tmp_path / "ca.pt")
    with pytest.raises(ValueError, match="CA-only"):
        load_proteinmpnn(tmp_path / "ca.pt")
    torch.save({"something": torch.zeros(2)}, tmp_path / "else.pt")
    with pytest.raises(ValueError, match="no ProteinMPNN checkpoint"):
        load_proteinmpnn(tmp_path / "else.pt")
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(FileNotFoundError, match=r"bare\.json"):
        load_proteinmpnn(tmp_path / "bare.safetensors")
    shutil.copy(asset_path("proteinmpnn") / "v_48_020.json", tmp_path / "bare.json")
    load_proteinmpnn(tmp_path / "bare.safetensors")
    save_file({k: v for k, v in state.items() if "W_out" not in k}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="no ProteinMPNN checkpoint"):
        load_proteinmpnn(tmp_path / "bare.safetensors")


def test_sequences_that_are_refused():
    network, structure = toy()
    graph, (x, order) = network.encode(structure), states(len(structure))
    with pytest.raises(ValueError, match="backbone 9"):
        network(x[:, 1:], graph)
    with pytest.raises(ValueError, match="0 to 20"):
        network(x + 1, graph)
    with pytest.raises(ValueError, match="0 to 20"):
        network(x - 21, graph)
    with pytest.raises(ValueError, match="MASK last"):
        network(torch.zeros(2, 9, 22, dtype=torch.float64), graph)
    with pytest.raises(ValueError, match="order has 8"):
        network(x, graph, order[:, 1:])
    with pytest.raises(ValueError, match="complete"):
        network.log_likelihood(x, graph, order)

"""ProteinMPNN as a masked chain: laws, what is kept, what is trained."""

import shutil

import pytest
import torch

from diffreward._assets import asset_path
from diffreward.networks.proteinmpnn import MASK, ProteinMPNN, load_proteinmpnn
from diffreward.networks.structure import Structure
from diffreward.policies.protein import LETTERS, ProteinPolicy, load_protein
from diffreward.policy import Policy, path_log_prob, rollout, sample_generators


@pytest.fixture(scope="module")
def ubiquitin():
    return load_protein("1ubi.pdb", num_steps=8, device="cpu")


def random_network():
    torch.manual_seed(0)
    network = ProteinMPNN(num_neighbours=5, num_layers=1).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    return network


def toy(length=8, **options):
    """A policy of a small random network on two random chains, in float64."""
    network = random_network()
    structure = Structure(
        "toy",
        torch.randn(length, 4, 3) * 2 + torch.randn(length, 1, 3).cumsum(0) * 2,
        "ACDEFGHIKLMNPQRSTVWY"[:length],
        ["A"] * (length - 3) + ["B"] * 3,
        [str(i + 1) for i in range(length)],
        torch.arange(length),
    )
    return ProteinPolicy(network, structure, **{"num_steps": 4, **options})


def partly(policy, rows=5, seed=2):
    g = torch.Generator().manual_seed(seed)
    x = policy.structure.native.repeat(rows, 1)
    x[torch.rand(x.shape, generator=g) < torch.linspace(1, 0.2, rows)[:, None]] = MASK
    return x


# The law


def test_one_position_per_step_is_autoregressive_sampling():
    policy = toy()
    condition = policy.encode([""])
    order = condition.tensors["order"][0]
    tokens = torch.randint(20, (1, 8), generator=torch.Generator().manual_seed(1))
    x, total = policy.initial(condition), 0.0
    for step in range(8):
        at = int((order == step).nonzero())
        law = policy.step_law(x, 0, condition)
        total += law.x0[0, at, tokens[0, at]].log()
        x = x.clone()
        x[0, at] = tokens[0, at]
    # the autoregressive pass over the complete sequence, without the letter X
    graph = policy._backbone
    native = policy.denoiser(tokens, graph, order[None])[..., :20].log_softmax(-1)
    expected = native.gather(-1, tokens[..., None]).sum()
    torch.testing.assert_close(total, expected)


def test_relaxed_states_mean_the_same_on_vertices():
    policy = toy()
    x = partly(policy)
    condition = policy.encode([""] * len(x))
    hard, soft = (policy.step_law(v, 1, condition) for v in (x, policy.relax(x)))
    torch.testing.assert_close(soft.x0, hard.x0)
    torch.testing.assert_close(soft.probs, hard.probs)


def test_samples_do_not_depend_on_their_batch(ubiquitin):
    assert isinstance(ubiquitin, Policy)
    generators = sample_generators(0, 1, 3)
    with torch.no_grad():
        together = rollout(ubiquitin, ubiquitin.encode([""] * 3), generators).final
        alone = rollout(ubiquitin, ubiquitin.encode([""]), sample_generators(0, 1, 2)[1:]).final
        with ubiquitin.reuse_logits():
            reused = rollout(ubiquitin, ubiquitin.encode([""] * 3), sample_generators(0, 1, 3))
    assert torch.equal(together[1:2], alone) and torch.equal(reused.final, together)
    samples = ubiquitin.decode(together, ubiquitin.encode([""] * 3))
    assert samples.modality == "protein" and samples.context["structure"][2].name == "1ubi.pdb"
    assert samples.take([2, 0]).context["structure"] == [ubiquitin.structure] * 2


def test_it_recovers_much_of_the_native_sequence(ubiquitin):
    with torch.no_grad():
        condition = ubiquitin.encode([""] * 4)
        trajectory = rollout(
            ubiquitin, condition, sample_generators(1, 1, 4), keep_path=True, log_prob=True
        )
        again = path_log_prob(ubiquitin, trajectory)
    torch.testing.assert_close(again, trajectory.log_probs)
    recovered = ubiquitin.recovery(trajectory.final)
    # guessing recovers 0.05; the authors report about 0.5 on average over natural proteins
    assert recovered.mean() > 0.3


def test_the_bound_prefers_the_native_sequence(ubiquitin):
    native = ubiquitin.structure.native
    shuffled = native[torch.randperm(76, generator=torch.Generator().manual_seed(0))]
    x0 = torch.stack([native, shuffled])
    with torch.no_grad():
        bound = ubiquitin.elbo(x0, ubiquitin.encode([""] * 2), sample_generators(0, 1, 2), 4)
    assert bound[0] > bound[1] + 50


def test_the_order_is_random_and_fixed():
    first, second = toy().encode(["", ""]), toy().encode([""])
    assert torch.equal(first.tensors["order"][1:], second.tensors["order"])
    assert sorted(first.tensors["order"][0].tolist()) == list(range(8))
    other = toy(order_seed=1).encode([""]).tensors["order"]
    assert not torch.equal(other, second.tensors["order"])
    given = toy().encode(["", ""], order=torch.arange(8)).tensors["order"]
    assert given.tolist() == [list(range(8))] * 2
    rows = torch.stack([torch.arange(8), torch.arange(8).flip(0)])
    policy = toy()
    x = partly(policy, 2, seed=5)
    condition = policy.encode(["", ""], order=rows)
    assert torch.equal(condition.tensors["order"], rows.float())
    both = policy.step_law(x, 0, condition).x0
    alone = policy.step_law(x[1:], 0, condition.take([1])).x0
    torch.testing.assert_close(both[1:], alone)


# What stays


def test_fixed_residues_and_omitted_letters():
    policy = toy(design="B, A:2", omit="CA", num_steps=3)
    assert policy.designed.tolist() == [False, True, False, False, False, True, True, True]
    condition = policy.encode([""] * 200)
    with torch.no_grad():
        final = rollout(policy, condition, torch.Generator().manual_seed(0)).final
    native = policy.structure.native
    assert (final[:, ~policy.designed] == native[~policy.designed]).all()
    assert LETTERS[native[0]] == "A"  # native letters stay even if they are omitted elsewhere
    drawn = final[:, policy.designed].unique().tolist()
    assert not {LETTERS.index(c) for c in "CA"} & set(drawn) and max(drawn) < 20
    assert len(drawn) > 10
    order = condition.tensors["order"][0]
    assert order[~policy.designed].max() < order[policy.designed].min()
    recovered = policy.recovery(native[None])
    assert recovered.tolist() == [1.0]


def test_other_chains_are_seen():
    policy = toy(design="A")
    letters = policy.structure.sequence[:5] + "WWW"
    other = Structure(**{**vars(policy.structure), "sequence": letters})
    changed = ProteinPolicy(random_network(), other, design="A", num_steps=4)
    a, b = (p.step_law(p.initial(p.encode([""])), 0, p.encode([""])).x0 for p in (policy, changed))
    assert (a[:, :5] - b[:, :5]).abs().max() > 1e-4


# What is trained


def test_training_the_decoder_alone_is_the_default():
    decoder, everything = toy(), toy(train="all")
    x = partly(decoder)
    condition = decoder.encode([""] * len(x))
    laws = [p.step_law(x, 0, condition) for p in (decoder, everything)]
    torch.testing.assert_close(laws[0].x0, laws[1].x0)
    final = decoder.structure.native.repeat(len(x), 1)
    trained = []
    for policy in (decoder, everything):
        policy.step_law(x, policy.num_steps - 1, condition).log_prob(final).sum().backward()
        named = policy.denoiser.named_parameters()
        trained.append({n for n, p in named if p.grad is not None and p.grad.abs().max() > 0})
    assert not any("encoder" in n for n in trained[0]) and "W_out.weight" in trained[0]
    assert {"encoder.features.edge_embedding.weight", "decoder.W_out.weight"} <= trained[1]


@pytest.mark.parametrize("train", ["decoder", "all"])
def test_reference_is_the_law_before_training(train):
    policy = toy(train=train)
    reference = policy.reference()
    x = partly(policy)
    condition = policy.encode([""] * len(x))
    assert policy.step_law(x, 1, condition).kl(reference.step_law(x, 1, condition)).max() == 0
    before = reference.step_law(x, 1, condition).x0
    # weights that change in place and through .data, as optimisers and averages change them
    name = "encoder.W_e.bias" if train == "all" else "decoder_layers.0.W1.bias"
    weight = dict(policy.denoiser.named_parameters())[name]
    weight.data.add_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    kl = policy.step_law(x, 1, condition).kl(reference.step_law(x, 1, condition))
    incomplete = (x == MASK).any(1)
    assert (kl[incomplete] > 0).all() and (kl[~incomplete] == 0).all()
    assert torch.equal(reference.step_law(x, 1, condition).x0, before)


def test_a_reward_reaches_the_weights_through_the_relaxed_chain():
    policy = toy(tau=0.7)
    condition = policy.encode([""] * 3)
    final = rollout(policy, condition, sample_generators(0, 1, 3), differentiable=True).final
    samples = policy.decode(final, condition)
    torch.testing.assert_close(samples.data.sum(-1), torch.ones_like(samples.data[..., 0]))
    samples.data[..., LETTERS.index("K")].sum().backward()
    assert policy.denoiser.decoder_layers[0].W2.weight.grad.abs().max() > 0


def test_inference_mode_around_the_loading_does_not_forbid_training():
    with torch.inference_mode():
        structure = toy().structure
    network = random_network()
    with torch.inference_mode():
        policy = ProteinPolicy(network, structure, num_steps=4)
    x = torch.full((1, 8), MASK)
    policy.step_law(x, 0, policy.encode([""])).x0[0, 0, 0].backward()


# Loading, bad input


def test_where_structures_come_from(tmp_path):
    source = asset_path("structures") / "1ubi.pdb"
    shutil.copy(source, tmp_path / "mine.pdb")
    mine = load_protein(tmp_path / "mine.pdb", design="A:5-9", weights="s_48_020", device="cpu")
    assert mine.structure.name == "mine.pdb" and int(mine.designed.sum()) == 5
    assert (mine.num_steps, mine.temperature) == (50, 0.1)
    again = load_protein(mine.structure, chains="A", device="cpu")
    assert again.structure.sequence == mine.structure.sequence
    own = load_proteinmpnn("s_48_020").decoder.state_dict()
    assert all(torch.equal(own[k], v) for k, v in mine.denoiser.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"2ubi\.pdb; embedded are 1ake\.pdb, 1ubi\.pdb"):
        load_protein("2ubi.pdb")
    with pytest.raises(ValueError, match="no protein chain 'B'"):
        load_protein(mine.structure, chains="B")


def test_options_that_are_refused():
    with pytest.raises(ValueError, match="train must be one of decoder, all"):
        toy(train="encoder")
    with pytest.raises(ValueError, match="nothing to design in toy"):
        toy(design=[])
    with pytest.raises(ValueError, match=r"letters ACDEFGHIKLMNPQRSTVWY, but 'X'"):
        toy(omit="X")
    with pytest.raises(ValueError, match="some of the letters"):
        toy(omit=LETTERS)
    with pytest.raises(ValueError, match="no residue 99 in chain A"):
        toy(design="A:99")
    with pytest.raises(ValueError, match="temperature must be positive"):
        toy(temperature=0.0)
    with pytest.raises(ValueError, match="order has 7 positions, but toy has 8"):
        toy().encode([""], order=torch.arange(7))

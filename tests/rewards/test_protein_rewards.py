"""Rewards for proteins against hand calculations, Biopython, transformers, and naive networks."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from Bio.SeqUtils.IsoelectricPoint import IsoelectricPoint
from Bio.SeqUtils.ProtParam import ProteinAnalysis
from Bio.SeqUtils.ProtParamData import DIWV
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

from diffreward._assets import asset_path
from diffreward.networks.proteinmpnn import load_proteinmpnn
from diffreward.networks.structure import Structure
from diffreward.rewards import evaluate, make_reward, protein
from diffreward.rewards.protein import LETTERS, StabilityNetwork
from diffreward.rewards.testing import check_reward
from diffreward.rewards.tokens import one_hot
from diffreward.samples import Samples, to_tokens

# every letter, every kind of end, some repeats
WORDS = [
    "ACDEFGHIKLMNPQRSTVWYKKRR",
    "EEDDAACWYFGHIKLMNPQRSTVD",
    "MKTAYIAKQRQISFVKSHFSRQLE",
    "PWYVTSRQPNMLKIHGFEDCAGGK",
]


def tokens(words=WORDS, **context):
    return Samples(torch.stack([to_tokens(w, "protein") for w in words]), "protein", None, context)


def vertices(words=WORDS, mixed=0.0, **context):
    hard = one_hot(tokens(words))
    noise = torch.rand(hard.shape, generator=torch.Generator().manual_seed(0))
    relaxed = (1 - mixed) * hard + mixed * noise / noise.sum(-1, keepdim=True)
    return Samples(relaxed, "protein", None, context)


def values(reward, words=WORDS):
    return evaluate(make_reward(reward), tokens(words)).value


def close(value, expected, atol=1e-4, rtol=1e-5):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(value.double(), expected, atol=atol, rtol=rtol)


def backbone(length=24, seed=0, chains=1, name="helix"):
    """A noisy helix, with a break between chains."""
    n = torch.arange(length, dtype=torch.float32)
    angle = n * math.radians(100)
    centre = torch.stack([2.3 * angle.cos(), 2.3 * angle.sin(), 1.5 * n], 1)
    noise = torch.randn(length, 4, 3, generator=torch.Generator().manual_seed(seed))
    of = [str(int(i * chains / length)) for i in range(length)]
    along = torch.tensor([of[:i].count(c) for i, c in enumerate(of)])
    return Structure(
        name,
        centre[:, None] + torch.tensor([-1.0, 0.0, 1.0, 1.5])[:, None] + 0.4 * noise,
        "A" * length,
        of,
        [str(i + 1) for i in range(length)],
        along,
    )


# --------------------------------------------------------------------------------------------
# Charge, hydropathy, instability
# --------------------------------------------------------------------------------------------

PLAIN = {
    "net_charge": {},
    "charge towards": {"name": "net_charge", "target": 3, "ph": 5.5},
    "hydropathy": {},
    "hydropathy towards": {"name": "hydropathy", "target": -1},
    "instability_index": {},
    "isoelectric_point": {},
    "pI towards": {"name": "isoelectric_point", "target": 6},
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_rewards_keep_the_contract(name):
    reward = make_reward({"name": name, **PLAIN[name]})
    check_reward(reward, tokens())
    check_reward(reward, vertices(mixed=0.2))
    hard = evaluate(reward, tokens()).value
    torch.testing.assert_close(hard, evaluate(reward, vertices()).value, atol=1e-4, rtol=1e-5)
    assert hard.std() > 0.05
    assert reward.info.differentiable == (reward.info.name != "isoelectric_point")


def test_they_are_those_of_biopython():
    words = [*WORDS, *(a * 23 + b for a, b in zip(LETTERS, LETTERS[1:] + "A", strict=True))]
    words = [w[:24] for w in words]
    analyses = [ProteinAnalysis(w) for w in words]
    for ph in (2.0, 7.0, 9.5):
        charges = values({"name": "net_charge", "ph": ph}, words)
        close(charges, [a.charge_at_pH(ph) for a in analyses])
        target = values({"name": "net_charge", "ph": ph, "target": 2}, words)
        close(target, [-abs(a.charge_at_pH(ph) - 2) for a in analyses])
    close(values("hydropathy", words), [a.gravy() for a in analyses])
    close(values({"hydropathy": 1.5}, words), [-abs(a.gravy() - 1.5) for a in analyses])
    close(values("instability_index", words), [-a.instability_index() for a in analyses], atol=1e-3)
    close(values("isoelectric_point", words), [a.isoelectric_point() for a in analyses])
    close(
        values({"isoelectric_point": 7}, words), [-abs(IsoelectricPoint(w).pi() - 7) for w in words]
    )
    assert make_reward({"isoelectric_point": 7}).info.range == (-5.0, 0.0)


def test_charges_by_hand():
    """Far from every pK, charges are whole; at a pK, half."""
    # K K D E, and the two ends, which cancel at neutral pH
    assert values({"name": "net_charge", "ph": 7}, ["GKKDEG"]).item() == pytest.approx(0, abs=0.25)
    assert values({"name": "net_charge", "ph": -5}, ["GKKDEG"]).item() == pytest.approx(3)
    assert values({"name": "net_charge", "ph": 30}, ["GKKDEG"]).item() == pytest.approx(-3)
    at = values({"name": "net_charge", "ph": 10.0}, ["GGGGKG", "GGGGGG"])
    assert (at[0] - at[1]).item() == pytest.approx(0.5, abs=1e-6)
    at = values({"name": "net_charge", "ph": 4.05}, ["GGGGDG", "GGGGGG"])
    assert (at[0] - at[1]).item() == pytest.approx(-0.5, abs=1e-6)
    with pytest.raises(ValueError, match="ph must be a number, but inf came"):
        make_reward("net_charge", ph=math.inf)
    assert values("hydropathy", ["IIR"]).item() == pytest.approx(4.5 / 3)


@pytest.mark.parametrize("name", ["net_charge", "hydropathy", "instability_index"])
def test_relaxed_values_are_means_over_all_sequences(name):
    """Three positions of three letters each, 27 sequences, each with its probability."""
    letters = [["D", "K", "A"], ["I", "R", "W"], ["E", "D", "V"]]
    p = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.25, 0.35, 0.4]])
    x, law, words = torch.zeros(1, 3, 20), [], []
    for j, i in itertools.product(range(3), range(3)):
        x[0, j, LETTERS.index(letters[j][i])] = p[j, i]
    for word in itertools.product(range(3), repeat=3):
        law.append(math.prod(p[j, i].item() for j, i in enumerate(word)))
        words.append("".join(letters[j][i] for j, i in enumerate(word)))
    mean = (torch.tensor(law) * values(name, words)).sum()
    torch.testing.assert_close(
        evaluate(make_reward(name), Samples(x, "protein")).value[0], mean, atol=1e-4, rtol=1e-5
    )


def test_the_gradients_are_those_of_finite_differences():
    x = vertices([w[:3] for w in WORDS[:2]], mixed=0.6).data.double().requires_grad_()
    table = torch.tensor([[DIWV[a][b] for b in LETTERS] for a in LETTERS]).double()
    functions = [protein.charge, protein.gravy, lambda x: protein.instability(x, table)]
    for function in functions:
        assert torch.autograd.gradcheck(function, x)


def test_wrong_proteins_are_refused():
    bad = tokens()
    bad.data[1, 2] = 20
    with pytest.raises(ValueError, match="token 3 of sample 1 is 20; protein has ACDEF"):
        evaluate(make_reward("hydropathy"), bad)
    with pytest.raises(ValueError, match="has 20 channels .*, but 21 came; leave MASK out"):
        evaluate(make_reward("net_charge"), Samples(torch.rand(2, 6, 21), "protein"))
    with pytest.raises(ValueError, match="scores protein samples, but dna samples came"):
        evaluate(make_reward("net_charge"), Samples(torch.zeros(2, 6, dtype=torch.long), "dna"))


@pytest.mark.parametrize("name", ["isoelectric_point", "instability_index"])
def test_a_missing_biopython_is_named(name, monkeypatch):
    for module in ("IsoelectricPoint", "ProtParamData"):
        monkeypatch.setitem(sys.modules, f"Bio.SeqUtils.{module}", None)
    with pytest.raises(ImportError, match=rf'{name}.*Biopython.*pip install "diffreward\[bio\]"'):
        make_reward(name)


# --------------------------------------------------------------------------------------------
# ESM
# --------------------------------------------------------------------------------------------

VOCABULARY = [
    "<cls>",
    "<pad>",
    "<eos>",
    "<unk>",
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    "<null_1>",
    "<mask>",
]


@pytest.fixture(scope="module", params=["esm2", "esm1b"])
def esm(request, tmp_path_factory):
    """ESM-2 has rotary positions and token dropout, ESM-1b learned positions."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    rotary = request.param == "esm2"
    config = EsmConfig(
        vocab_size=len(VOCABULARY), mask_token_id=32, pad_token_id=1, hidden_size=16,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=28, position_embedding_type="rotary" if rotary else "absolute",
        token_dropout=rotary, emb_layer_norm_before=not rotary, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EsmForMaskedLM(config).eval()
    network.save_pretrained(folder)
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder), network


def pseudo_log_likelihood(network, word, one_pass):
    """By transformers' own input path, one masked sequence at a time."""
    ids = torch.tensor([0, *(VOCABULARY.index(a) for a in word), 2])
    total = 0.0
    for i in range(1, len(word) + 1):
        given = ids.clone()
        if not one_pass:
            given[i] = 32
        with torch.no_grad():
            logits = network(given[None], attention_mask=torch.ones(1, len(ids))).logits
        total += logits[0, i].double().log_softmax(0)[ids[i]].item()
    return total / len(word)


@pytest.mark.parametrize("one_pass", [False, True])
def test_esm_is_the_pseudo_log_likelihood(esm, one_pass):
    folder, network = esm
    reward = make_reward("esm", model=folder, one_pass=one_pass, chunk_size=7)
    expected = [pseudo_log_likelihood(network, w, one_pass) for w in WORDS]
    close(evaluate(reward, tokens()).value, expected)
    assert np.std(expected) > 0.01
    close(evaluate(reward, vertices()).value, expected)
    check_reward(reward, tokens([w[:6] for w in WORDS]))
    check_reward(reward, vertices([w[:6] for w in WORDS], mixed=0.3))


def test_the_gradient_of_esm_is_that_of_finite_differences(esm):
    reward = make_reward("esm", model=esm[0])
    reward.network.double()
    x = vertices([w[:5] for w in WORDS[:2]], mixed=0.5).data.double()
    # parts of transformers' network compute in float32
    how = {"step": 1e-4, "rtol": 1e-3}
    check_directional(lambda x: (x * reward.log_probs(x)).sum((1, 2)), x, **how)


def check_directional(function, x, step=1e-5, rtol=1e-5):
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    with torch.no_grad():
        ends = [function(x + e * direction).sum() for e in (step, -step)]
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(
        (gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=rtol, atol=1e-7
    )


def test_esm_refuses_what_it_cannot_read(esm, tmp_path):
    folder, network = esm
    reward = make_reward("esm", model=folder)
    if network.config.position_embedding_type == "absolute":
        with pytest.raises(ValueError, match="reads 24 letters, but sequences of 25 came"):
            evaluate(reward, tokens([w + "A" for w in WORDS]))
    else:
        assert len(evaluate(reward, tokens([w + "A" for w in WORDS]))) == 4
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        make_reward("esm", model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        make_reward("esm", model=folder, chunk_size=0)


# --------------------------------------------------------------------------------------------
# ProteinMPNN
# --------------------------------------------------------------------------------------------


def test_mpnn_likelihood_keeps_the_contract():
    one, two = backbone(10), backbone(10, seed=1, chains=2, name="other")
    words = [w[:10] for w in WORDS]
    # grouped by structure the order is 0, 3, 1, 2, which is not its own inverse
    own = {"structure": [one, two, backbone(10, seed=2), one]}
    reward = make_reward("mpnn_likelihood", weights=["v_48_020", "v_48_002"], orders=2)
    check_reward(reward, tokens(words, **own))
    check_reward(reward, vertices(words, mixed=0.3, **own))
    scores, soft = evaluate(reward, tokens(words, **own)), evaluate(reward, vertices(words, **own))
    torch.testing.assert_close(scores.value, soft.value)
    # the ensemble is the mean and standard deviation of its members
    members = [
        evaluate(make_reward("mpnn_likelihood", weights=w, orders=2), tokens(words, **own))
        for w in ("v_48_020", "v_48_002")
    ]
    a, b = (m.value for m in members)
    torch.testing.assert_close(scores.value, (a + b) / 2)
    torch.testing.assert_close(scores.std, (a - b).abs() / 2, atol=1e-5, rtol=1e-4)
    assert members[0].std is None and scores.std.min() > 1e-3
    # one structure for all, as an option
    for i, structure in enumerate([one, two]):
        fixed = make_reward("mpnn_likelihood", weights="v_48_020", structure=structure, orders=2)
        assert not fixed.info.needs_context
        torch.testing.assert_close(evaluate(fixed, tokens(words)).value[i], a[i])


@pytest.mark.parametrize("orders", [0, 3])
def test_mpnn_likelihood_is_the_product_of_conditionals(orders):
    """Letter after letter, each by a pass that sees only those before it."""
    structure, network = backbone(length=8), load_proteinmpnn("v_48_020")
    words = [w[:8] for w in WORDS[:2]]
    reward = make_reward("mpnn_likelihood", structure=structure, orders=orders, seed=3)
    orderings = reward._orders(8)
    assert len(orderings) == max(orders, 1)
    if not orders:
        assert orderings[0].tolist() == list(range(8))
    else:
        assert len({tuple(o.tolist()) for o in orderings}) == 3
    x, total = tokens(words).data, torch.zeros(2, dtype=torch.float64)
    for order in orderings:
        known = torch.full_like(x, 20)
        for q in order.argsort().tolist():
            with torch.no_grad():
                log_p = network(known, structure, order[None]).double().log_softmax(-1)
            total += log_p[torch.arange(2), q, x[:, q]]
            known[:, q] = x[:, q]
    close(evaluate(reward, tokens(words)).value, total / 8 / len(orderings))


def test_the_gradient_of_mpnn_likelihood_is_that_of_finite_differences():
    reward = make_reward("mpnn_likelihood", structure=backbone(length=6))
    network = reward.networks[0].double()
    x = vertices([w[:6] for w in WORDS[:2]], mixed=0.5).data.double()
    with torch.no_grad():
        graph = network.encode(backbone(length=6))
    check_directional(lambda x: network.decoder.log_likelihood(x, graph).mean(1), x)
    # the reward's own, in float32
    x = x.float().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    reward = make_reward("mpnn_likelihood", structure=backbone(length=6))
    value = evaluate(reward, Samples(x, "protein")).value.sum()
    (gradient,) = torch.autograd.grad(value, x)
    with torch.no_grad():
        ends = [
            evaluate(reward, Samples(x + e * direction, "protein")).value.double().sum()
            for e in (1e-2, -1e-2)
        ]
    assert (gradient * direction).sum().item() == pytest.approx(
        (ends[0] - ends[1]).item() / 2e-2, rel=0.02
    )


def test_a_native_sequence_is_likelier_than_its_shuffle():
    pytest.importorskip("gemmi")
    path = str(asset_path("structures") / "1ubi.pdb")
    reward = make_reward("mpnn_likelihood", structure=path, chains="A")
    native = reward.structure.sequence
    shuffled = "".join(np.random.default_rng(0).permutation(list(native)))
    value = evaluate(reward, tokens([native, shuffled])).value
    assert value[0] > value[1] + 0.5


def test_structures_that_do_not_fit_are_refused():
    reward = make_reward("mpnn_likelihood")
    with pytest.raises(ValueError, match="sample 1 has 24 letters, but its structure short has 5"):
        evaluate(
            reward, tokens(structure=[backbone(), backbone(5, name="short"), *[backbone()] * 2])
        )
    with pytest.raises(ValueError, match="is a list of Structure .*but sample 0 has a str"):
        evaluate(reward, tokens(structure=["1ubi.pdb"] * 4))
    with pytest.raises(ValueError, match="needs structure in Samples.context"):
        evaluate(reward, tokens())
    for options in ({"weights": []}, {"orders": -1}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match="at least one checkpoint, no negative number of ord"):
            make_reward("mpnn_likelihood", **options)
    with pytest.raises(ValueError, match="unknown ProteinMPNN weights 'v_48_040'"):
        make_reward("mpnn_likelihood", weights="v_48_040")
    with pytest.raises(ValueError, match="has no protein chain 'B'"):
        make_reward("mpnn_likelihood", structure=backbone(), chains="B")


# --------------------------------------------------------------------------------------------
# Stability
# --------------------------------------------------------------------------------------------


def test_ddg_by_a_callable():
    weight = torch.randn(20, generator=torch.Generator().manual_seed(0))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight.clone())

        def forward(self, x):
            return (x @ self.weight).sum(1, keepdim=True)  # (b, 1) will do

    expected = torch.stack([weight[row].sum() for row in tokens().data])
    reward = make_reward("ddg", model=Net(), reads="sequence", chunk_size=3)
    close(evaluate(reward, tokens()).value, expected)
    check_reward(reward, vertices(mixed=0.3))
    turned = make_reward("ddg", model=Net(), reads="sequence", negative_is_stable=True)
    close(evaluate(turned, tokens()).value, -expected)

    def on_structure(x, structure):
        return (x @ weight).sum(1) * structure.coordinates.mean()

    structures = [backbone(seed=n % 2) for n in range(4)]
    reward = make_reward("ddg", model=on_structure)
    scale = torch.stack([s.coordinates.mean() for s in structures])
    own = tokens(structure=structures)
    close(evaluate(reward, own).value, expected * scale)
    check_reward(reward, own)
    assert reward.info.differentiable is None
    for model, says in [
        (lambda x: x.sum((0, 2)), r"must give \(4,\) numbers, \(24,\) came"),
        (lambda x: 1.0, r"must give \(4,\) numbers, float came"),
    ]:
        with pytest.raises(ValueError, match=says):
            evaluate(make_reward("ddg", model=model, reads="sequence"), tokens())
    with pytest.raises(ValueError, match="reads is sequence or structure, but 'both' came"):
        make_reward("ddg", model=on_structure, reads="both")
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        make_reward("ddg", model=on_structure, chunk_size=0)


@pytest.fixture(scope="module")
def published():
    """Random weights under the names of the authors' checkpoints."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = StabilityNetwork(num_neighbours=30, num_layers=2)
    return {key.removeprefix("encoder."): w.clone() for key, w in network.state_dict().items()}


def naive_oracle(state, structure, word):
    """Message passing edge by edge, every position seeing every letter."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, x):
        return F.layer_norm(x, (128,), state[f"{name}.weight"], state[f"{name}.bias"])

    network = StabilityNetwork(30, 2)
    own = network.encoder.state_dict()
    network.encoder.load_state_dict({k: v for k, v in state.items() if k in own})
    with torch.no_grad():
        graph = network.encoder(structure)
    letters = state["W_s.weight"][to_tokens(word, "protein")]
    h = graph.nodes
    for n in range(2):
        name, sums = f"decoder_layers.{n}", []
        for q in range(len(word)):
            total = 0
            for edge, p in zip(graph.edges[q], graph.neighbours[q], strict=True):
                message = linear(f"{name}.W1", torch.cat([h[q], edge, letters[p], h[p]]))
                message = linear(f"{name}.W2", F.gelu(message))
                total = total + linear(f"{name}.W3", F.gelu(message))
            sums.append(total / 30)
        h = norm(f"{name}.norm1", h + torch.stack(sums))
        inner = F.gelu(linear(f"{name}.dense.W_in", h))
        h = norm(f"{name}.norm2", h + linear(f"{name}.dense.W_out", inner))
    return linear("W_out_mlp.2", linear("W_out_mlp.0", h.mean(0)).relu()).item()


@pytest.mark.parametrize("kind", ["pt", "wrapped.pt", "safetensors"])
def test_the_papers_oracle_is_loaded(published, kind, tmp_path):
    file = tmp_path / f"oracle.{kind}"
    if kind == "safetensors":
        save_file(published, file)
    else:
        state = {**published, "W_s_ft.weight": published["W_s.weight"].T.clone()}
        torch.save({"model_state_dict": state} if "wrapped" in kind else state, file)
    structures = [backbone(), backbone(seed=1, chains=2), backbone(), backbone(seed=2)]
    reward = make_reward("ddg", model=str(file))
    own = tokens(structure=structures)
    value = evaluate(reward, own).value
    if kind == "pt":
        truth = [naive_oracle(published, s, w) for s, w in zip(structures, WORDS, strict=True)]
        close(value, truth)
        assert np.std(truth) > 1e-3
        check_reward(reward, vertices(mixed=0.3, structure=structures))
    torch.testing.assert_close(value, evaluate(reward, vertices(structure=structures)).value)
    assert reward.info.weights == str(file) and reward.info.differentiable


def test_other_checkpoints_are_no_oracles(published, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint '.*gone.pt'"):
        make_reward("ddg", model=str(tmp_path / "gone.pt"))
    for state in (
        {k: v for k, v in published.items() if k != "W_out_mlp.2.bias"},
        {**published, "W_out.weight": torch.zeros(1)},
        {"model": Structure},
        [torch.zeros(1)],
    ):
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match="bad.pt is no stability oracle in DRAKES' layout"):
            make_reward("ddg", model=str(tmp_path / "bad.pt"))

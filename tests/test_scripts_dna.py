"""The scripts of the embedded DNA models: windows and splits by brute force, bounds by enumeration,
and every step of the way on a small random genome."""

import argparse
import collections
import itertools
import json
import math
import sys
import types

import numpy as np
import pytest
import torch

from diffreward.networks.dna import DNAConvNet, SequenceCNN
from diffreward.policies.dna import load_dna
from scripts.embedded import build_dna, train_dna

SPACE, BLOCKS = 600, 60  # one gene per block of the tiny data


def text(tokens) -> str:
    return "".join("ACGT"[k] for k in tokens)


def other_strand(sequence: str) -> str:
    return sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))


@pytest.fixture(scope="module")
def genome():
    return np.random.default_rng(0).integers(0, 4, SPACE * BLOCKS).astype(np.uint8)


@pytest.fixture(scope="module")
def genes():
    """Alternately on both strands, with 240 or 220 bp of their block before them."""
    rows = []
    for k in range(BLOCKS):
        first = SPACE * k
        rows.append((first + 230, first + 590, 1) if k % 2 else (first + 10, first + 370, -1))
    return np.array(rows)


@pytest.fixture(scope="module")
def data(genome, genes):
    return build_dna.build(genome, genes, SPACE)


# -- windows and splits ---------------------------------------------------------------------------


def test_upstream_windows_end_where_genes_start(genome, genes, data):
    drawn = {text(row) for row in build_dna.windows(genome, data["upstream"])}
    expected = set()
    for first, end, strand in genes:
        before = text(genome[first - 200 : first]) if strand > 0 else None
        expected.add(before or other_strand(text(genome[end : end + 200])))
    assert drawn <= expected
    # a last one lacks room for its shift
    assert len(drawn) == len(data["upstream"]) >= len(expected) - 1


def test_coding_windows_lie_within_genes(genes, data):
    for first, strand in data["coding"]:
        gene = genes[first // SPACE]
        assert gene[0] + 50 <= first and first + 200 <= gene[1] - 50 and strand == gene[2]
    # 360 bp, 50 of them at either end left out: 61 places, 17 apart
    assert len(data["coding"]) == BLOCKS * 4
    assert {(f - genes[f // SPACE][0]) % 3 for f, _ in data["coding"]} == {0, 1, 2}


@pytest.mark.parametrize(("gap", "kept"), [(99, 0), (100, 1)])
def test_upstream_window_needs_room_between_genes(gap, kept):
    genes = np.array([(50, 400, 1), (400 + gap, 800, 1)])
    where = build_dna.Where(np.zeros(1000, np.uint8), np.zeros(1000, bool))
    assert len(build_dna.upstream_windows(genes, where)) == kept
    genes = np.array([(100, 400, -1), (400 + gap, 800, -1)])  # the other strand looks the other way
    rows = build_dna.upstream_windows(genes, where)
    assert rows.tolist() == [[400, -1]] * kept  # and nothing fits after the second


def test_windows_keep_to_one_side_of_every_border(data):
    role, jitter = data["role"], build_dna.JITTER
    for first, _ in data["upstream"]:
        assert len(set(role[first - jitter : first + 200 + jitter])) == 1
    for first, _ in data["coding"]:
        assert len(set(role[first : first + 200])) == 1
    assert all((role[first : first + 200] >= 2).all() for first in data["held_out"])
    assert np.diff(data["held_out"]).min() >= 200
    assert len(data["held_out"]) == BLOCKS // 10 * SPACE // 200


def test_roles(data):
    role, half = data["role"], SPACE * BLOCKS // 2
    assert set(role[:half]) == {0, 2} and set(role[half:]) == {1, 3}
    assert (role >= 2).mean() == 0.1


def test_where_is_right_everywhere():
    rng = np.random.default_rng(1)
    role = np.repeat([0, 2, 0, 1], 100).astype(np.uint8)
    repeat = rng.random(400) < 0.01
    first = np.arange(-10, 400)
    got = build_dna.Where(role, repeat)(first, first + 60)
    for f, ok in zip(first, got, strict=True):
        fits = f >= 0 and f + 60 <= 400 and len(set(role[f : f + 60])) == 1
        # only k-mers that lie within the window
        assert ok == (fits and not repeat[f : f + 60 - 31 + 1].any())


def test_repeats_by_brute_force():
    rng = np.random.default_rng(0)
    genome = rng.integers(0, 4, 400).astype(np.uint8)
    genome[300:340] = genome[20:60]
    genome[200:235] = 3 - genome[100:135][::-1]
    for k in (7, 31):
        words = [text(genome[i : i + k]) for i in range(400 - k + 1)]
        count = collections.Counter(min(w, other_strand(w)) for w in words)
        expected = [count[min(w, other_strand(w))] > 1 for w in words] + [False] * (k - 1)
        assert build_dna.repeats(genome, k).tolist() == expected
    assert build_dna.repeats(genome, 31).sum() >= 2 * 10 + 2 * 5


def test_windows_with_repeats_are_left_out(genome, genes):
    copied = genome.copy()
    at = SPACE * 41 + 100  # in an upstream window of the second half, from one of the first
    copied[at : at + 40] = genome[SPACE * 3 + 100 : SPACE * 3 + 140]
    data = build_dna.build(copied, genes, SPACE)
    left = set(data["upstream"][:, 0] // SPACE)
    assert {3, 41}.isdisjoint(left) and {5, 39} <= left


# -- files ----------------------------------------------------------------------------------------


def test_genome_is_read(tmp_path):
    (tmp_path / "g.fa").write_text(">gi|1|ref|NC_1.1| some bug\nacGT\nAA\n")
    name, tokens = build_dna.read_fasta(tmp_path / "g.fa")
    assert name == "NC_1.1" and tokens.tolist() == [0, 1, 2, 3, 0, 0]
    (tmp_path / "g.fa").write_text(">one\nACGN\n")
    with pytest.raises(ValueError, match="letter 4 of .* is 'N'"):
        build_dna.read_fasta(tmp_path / "g.fa")
    (tmp_path / "g.fa").write_text(">one\nAC\n>two\nGT\n")
    with pytest.raises(ValueError, match="has 2 sequences"):
        build_dna.read_fasta(tmp_path / "g.fa")


def test_places_in_the_fasta_are_right(genome, data, tmp_path):
    build_dna.write_fasta(data, "NC_1.1", tmp_path / "up.fasta")
    lines = (tmp_path / "up.fasta").read_text().splitlines()
    assert len(lines) == 2 * len(data["upstream"])
    for header, sequence in zip(lines[::2], lines[1::2], strict=True):
        name, half, *held_out = header.removeprefix(">NC_1.1:").split()
        first, last = (int(n) for n in name.removeprefix("c").split("-"))
        if name[0] == "c":
            first, last = last, first
            sequence = other_strand(sequence)
        assert sequence == text(genome[first - 1 : last])
        role = data["role"][first]
        assert half == f"half={'ab'[role % 2]}" and held_out == ["held_out"] * int(role >= 2)


def test_genes_are_called_with_prodigals_coordinates(monkeypatch):
    """1-based and closed there, 0-based and half-open here; incomplete genes are left out."""

    def gene(begin, end, strand, partial=False):
        return types.SimpleNamespace(
            begin=begin, end=end, strand=strand, partial_begin=partial, partial_end=False
        )

    class Finder:
        def train(self, sequence):
            assert sequence == "ACGT"

        def find_genes(self, sequence):
            return [gene(7, 9, -1), gene(1, 6, 1), gene(10, 12, 1, partial=True)]

    monkeypatch.setitem(sys.modules, "pyrodigal", types.SimpleNamespace(GeneFinder=Finder))
    found = build_dna.call_genes(np.arange(4))
    assert found.tolist() == [[0, 6, 1], [6, 9, -1]]


# -- measures -------------------------------------------------------------------------------------


def test_bound_by_enumeration():
    """Averaged over all sets of n masks, for n = 1, 2, 3."""
    torch.manual_seed(0)
    network = DNAConvNet(channels=8, kernel=3, dilations=(1,), rounds=1).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)
    x, length = torch.tensor([[0, 3, 1]]), 3
    exact = 0.0
    for n in range(1, length + 1):
        sets = list(itertools.combinations(range(length), n))
        for hidden in sets:
            masked = x.clone()
            masked[0, list(hidden)] = 4
            log_p = network(masked)[0].log_softmax(-1).detach()
            nats = -sum(log_p[i, x[0, i]].item() for i in hidden) / n
            exact += nats / len(sets) / length
    drawn = train_dna.bound_bits(network, x.repeat(3000, 1), draws=3)
    error = drawn.std() / math.sqrt(len(drawn))
    assert abs(drawn.mean() - exact / math.log(2)) < 4 * error < 0.05


def test_uniform_network_needs_two_bits():
    network = DNAConvNet(channels=4, kernel=3, dilations=(1,), rounds=1)
    torch.nn.init.zeros_(network.head[-1].weight), torch.nn.init.zeros_(network.head[-1].bias)
    bits = train_dna.bound_bits(network, torch.randint(4, (5, 20)))
    np.testing.assert_allclose(bits, 2, rtol=1e-6)


def test_masks_are_uniform():
    rng = np.random.default_rng(0)
    count = torch.zeros(11)
    for _ in range(400):
        masks = train_dna.stratified_masks(10, 10, rng)
        assert masks.sort().values.diff().max() <= 2  # spread over the batch
        count += torch.bincount(masks, minlength=11)
    assert count[0] == 0 and count[1:].min() > 300 and count[1:].max() < 500


def test_markov_chain_is_a_distribution(genome, data):
    """2 to the minus bits, summed over all windows of three letters, is 1 at every order."""
    every = np.array(list(itertools.product(range(4), repeat=3)), np.uint8)
    bits = np.array([train_dna.markov_bits(data, row[None], orders=2) for row in every])
    np.testing.assert_allclose((2.0 ** (-3 * bits)).sum(0), 1, rtol=1e-9)


def test_markov_chain_knows_a_periodic_genome_and_nothing_of_a_random_one(data):
    n = SPACE * BLOCKS
    periodic = {"genome": np.tile(np.array([0, 0, 1], np.uint8), n // 3), "role": data["role"]}
    window = periodic["genome"][None, :201]
    bits = train_dna.markov_bits(periodic, window, orders=2)
    # with both strands, 1/3 A, 1/6 C, 1/6 G, 1/3 T
    assert bits[0] == pytest.approx(2 / 3 * math.log2(3) + 1 / 3 * math.log2(6), abs=1e-3)
    assert bits[2] < 0.05
    held = build_dna.windows(data["genome"], train_dna.forward(data["held_out"]))
    bits = train_dna.markov_bits(data, held, orders=6)
    assert bits[0] == pytest.approx(2, abs=0.01) and bits[6] > 2


def test_markov_chain_does_not_count_what_is_held_out(data):
    changed = data["genome"].copy()
    held = data["role"] >= 2
    changed[held] = 0
    window = data["genome"][None, :200]
    before, after = (
        train_dna.markov_bits({**data, "genome": g}, window, orders=3)
        for g in (data["genome"], changed)
    )
    # a k-mer that reaches into a held-out block is no more counted than one within
    assert before == after


def test_three_mers():
    assert train_dna.three_mers(np.array([[0, 0, 0, 1]])).nonzero()[0].tolist() == [0, 1]
    a = np.array([[0, 1, 2, 3, 0, 1]])
    assert train_dna.three_mer_correlation(a, np.tile(a, (3, 1))) == pytest.approx(1)


def test_accuracy_and_auc():
    logit = np.array([3.0, 2.0, 1.0, -1.0, -2.0])
    label = np.array([True, True, False, True, False])
    found = train_dna.accuracy_and_auc(logit, label)
    assert found == {"accuracy": 3 / 5, "auc": pytest.approx(5 / 6)}
    assert train_dna.accuracy_and_auc(np.zeros(5), label)["auc"] == 0.5  # all tied


# -- the way from a genome to the shipped folder --------------------------------------------------

RUN = ["--tiny", "--steps", "6", "--batch", "8"]


@pytest.fixture(scope="module")
def built(tmp_path_factory, genome, genes):
    folder = tmp_path_factory.mktemp("dna")
    (folder / "g.fa").write_text(f">NC_1.1\n{text(genome)}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_dna, "call_genes", lambda g: genes)
        build_dna.main([str(folder / "g.fa"), str(folder / "data"), "--tiny"])
    return folder / "data"


def test_every_step_to_the_shipped_folder(built, tmp_path, capsys):
    train_dna.main(["diffusion", str(built), *RUN])
    for half in "ab":
        train_dna.main(["oracle", str(built), "--half", half, *RUN])
    few = ["--samples", "6", "--sampling_steps", "3", "--held_out", "9", "--draws", "2"]
    train_dna.main(["evaluate", str(built), *few])
    found = json.loads((built / "evaluation.json").read_text())
    assert found["samples"] == 6 and 1.8 < found["bits"] < 2.4
    train_dna.main(["export", str(built), str(tmp_path / "dna")])
    (tmp_path / "dna" / "old").touch()
    train_dna.main(["export", str(built), str(tmp_path / "dna")])  # replaces
    files = {str(p.relative_to(tmp_path / "dna")) for p in (tmp_path / "dna").rglob("*.*")}
    networks = ("policy", "oracle_a", "oracle_b")
    expected = {f"{n}/{f}" for n in networks for f in ("config.json", "model.safetensors")}
    assert files == expected | {"README.md", "natural_upstream.fasta"}
    assert not (tmp_path / "dna" / "old").exists()
    card = (tmp_path / "dna" / "README.md").read_text()
    assert f"{found['bits']:.3f} ± " in card and "oracle DATA --half b --steps 6 --batch 8" in card
    assert "{" not in card
    assert load_dna(tmp_path / "dna" / "policy", device="cpu").denoiser.vocabulary == 4
    oracle = SequenceCNN.from_pretrained(tmp_path / "dna" / "oracle_a")
    assert oracle.outputs == ("upstream",)
    capsys.readouterr()


def options(**given):
    return argparse.Namespace(
        steps=6, batch=4, rate=1e-2, decay=0.01, every=0.0, seed=0, device="cpu", threads=1,
        bf16=False, **given,
    )  # fmt: skip


def small_fit(path, stop=None):
    torch.manual_seed(0)
    network = SequenceCNN(["x"], channels=4, blocks=1, dropout=0.5)

    def loss(network, rng):
        return network(torch.from_numpy(rng.integers(0, 4, (4, 20)))).square().mean()

    def monitor(average):
        if stop is not None and path.exists() and torch.load(path)["step"] == stop:
            raise KeyboardInterrupt
        return {}

    measured = train_dna.fit(network, loss, path, options(), monitor)
    return network.state_dict(), measured


def test_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    whole, _ = small_fit(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        small_fit(tmp_path / "cut.pt", stop=3)
    assert torch.load(tmp_path / "cut.pt")["step"] == 3
    again, measured = small_fit(tmp_path / "cut.pt")
    assert measured["steps"] == 6
    for name, w in whole.items():
        torch.testing.assert_close(again[name], w, rtol=0, atol=0)
    once_more, _ = small_fit(tmp_path / "cut.pt")  # nothing is left to do
    assert all(torch.equal(once_more[name], w) for name, w in whole.items())


def test_average_is_saved_and_not_the_last_weights(tmp_path):
    state, _ = small_fit(tmp_path / "x.pt")
    saved = SequenceCNN.from_pretrained(tmp_path / "x").state_dict()
    raw = torch.load(tmp_path / "x.pt")["network"]
    assert all(torch.equal(saved[name], w) for name, w in state.items())
    assert any(not torch.equal(saved[name], w) for name, w in raw.items())


@pytest.mark.parametrize("what", [["diffusion"], ["oracle", "--half", "b"]])
def test_nothing_held_out_is_trained_on(built, tmp_path, monkeypatch, what):
    data, seen = train_dna.load(built), []

    def fit(network, loss, path, args, monitor):
        seen.clear()  # what was measured on
        loss(network, np.random.default_rng(0))

    def windows(genome, rows):
        seen.append(rows)
        return build_dna.windows(genome, rows)

    monkeypatch.setattr(train_dna, "fit", fit)
    monkeypatch.setattr(train_dna, "windows", windows)
    train_dna.main([what[0], str(built), *what[1:], "--tiny", "--batch", "400"])
    rows = np.concatenate(seen)
    assert len(rows) == 400
    roles = set(np.concatenate([data["role"][f : f + 200] for f, _ in rows]))
    assert roles == ({0, 1} if what[0] == "diffusion" else {1})
    assert set(rows[:, 1]) == {1, -1}

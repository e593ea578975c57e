"""Rewards for DNA and RNA against hand calculations, enumeration, scipy, Biopython, ViennaRNA."""

import itertools
import math
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from Bio import motifs as bio_motifs
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from diffreward.networks.dna import SequenceCNN
from diffreward.rewards import available_rewards, evaluate, make_reward
from diffreward.rewards import sequence as dna
from diffreward.rewards.motifs import load_motifs, motif_scores, read_motifs, score_threshold
from diffreward.rewards.testing import check_reward
from diffreward.rewards.tokens import one_hot, read_sequences, strings
from diffreward.samples import Samples, to_tokens

LETTERS = "ACGT"
WORDS = [
    "ACGTTTTTACGGCATCGATTACAGG",
    "GGGGGGCCCCAATTACGCATCGAAA",
    "TATATATATATATTTTAAAACGTCC",
    "CGCGCGTTAACCGGATATCGCGTGA",
]
JASPAR = """>MA0001.1 first
A [ 0  3 79 40 ]
C [94 75  4  3 ]
G [ 1  0  3  4 ]
T [ 2 19 11 50 ]
>MA0002.2\tsecond
A [1 2 0.5]
C [8 1 0]
G [0 0 0.5]
T [1 7 9]
"""
MEME = """MEME version 4

ALPHABET= ACGT

strands: + -

Background letter frequencies
A 0.3 C 0.2 G 0.2 T 0.3

MOTIF MA0001.1 first
letter-probability matrix: alength= 4 w= 4 nsites= 50 E= 0
 0.10 0.70 0.10 0.10
 0.00 0.50 0.50 0.00
 0.25 0.25 0.25 0.25
 0.90 0.02 0.04 0.04
URL http://example.org

MOTIF second
letter-probability matrix: alength= 4 w= 2
1 0 0 0
0 0 0 1
"""


def tokens(words, modality="dna"):
    return Samples(torch.stack([to_tokens(w, modality) for w in words]), modality)


def vertices(words, modality="dna", mixed=0.0):
    hard = one_hot(tokens(words, modality))
    noise = torch.rand(hard.shape, generator=torch.Generator().manual_seed(0))
    relaxed = (1 - mixed) * hard + mixed * noise / noise.sum(-1, keepdim=True)
    return Samples(relaxed, modality)


def values(reward, words=WORDS, modality="dna"):
    return evaluate(make_reward(reward), tokens(words, modality)).value


def close(value, expected, atol=1e-5, rtol=1e-5):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(value.double(), expected, atol=atol, rtol=rtol)


@pytest.fixture
def jaspar(tmp_path):
    file = tmp_path / "two.jaspar"
    file.write_text(JASPAR)
    return str(file)


@pytest.fixture
def meme(tmp_path):
    file = tmp_path / "two.meme"
    file.write_text(MEME)
    return str(file)


class Net(nn.Module):
    """Reads position-dependent weights, so that layouts cannot be exchanged."""

    outputs = ("left", "right")

    def __init__(self, first=False):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(len(WORDS[0]), 4, 2, generator=generator) / 5)
        self.dropout, self.first = nn.Dropout(0.5), first

    def forward(self, x):
        x = x.transpose(1, 2) if self.first else x
        return torch.einsum("blv,lvk->bk", self.dropout(x), self.weight).tanh()


# --------------------------------------------------------------------------------------------
# The contract, for all of them
# --------------------------------------------------------------------------------------------

DIFFERENTIABLE = {
    "gc_content": {},
    "gc towards": {"name": "gc_content", "target": 0.4},
    "kmer_similarity": {"reference": WORDS[:2], "k": 2},
    "homopolymer": {},
    "occupancy": {"name": "motif", "p_value": 0.01},
    "log_sum_exp": {"name": "motif", "output": "log_sum_exp", "temperature": 0.7},
    "max": {"name": "motif", "output": "max", "both_strands": False},
    "sequence_oracle": {"model": Net(), "output": "right", "activation": "sigmoid"},
}
BLACK_BOX = {
    "melting_temperature": {},
    "melting towards": {"name": "melting_temperature", "target": 60},
    "folding_energy": {},
    "folding avoided": {"name": "folding_energy", "avoid": True},
}


def build(name, options, jaspar):
    spec = {"name": name, **options}
    if spec["name"] == "motif":
        spec["source"] = jaspar
    return make_reward(spec)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_differentiable_rewards_keep_the_contract(name, jaspar):
    reward = build(name, DIFFERENTIABLE[name], jaspar)
    check_reward(reward, tokens(WORDS))
    check_reward(reward, vertices(WORDS, mixed=0.3))
    hard, soft = evaluate(reward, tokens(WORDS)), evaluate(reward, vertices(WORDS))
    torch.testing.assert_close(hard.value, soft.value)
    assert hard.value.std() > 1e-3 and reward.info.differentiable


@pytest.mark.parametrize("name", BLACK_BOX)
def test_black_boxes_keep_the_contract(name, jaspar):
    reward = build(name, BLACK_BOX[name], jaspar)
    modality = reward.info.modality
    words = [w.replace("T", "U") if modality == "rna" else w for w in WORDS]
    check_reward(reward, tokens(words, modality))
    check_reward(reward, vertices(words, modality, mixed=0.3))  # of the likeliest letters
    torch.testing.assert_close(
        evaluate(reward, tokens(words, modality)).value,
        evaluate(reward, vertices(words, modality, mixed=0.3)).value,
    )
    assert reward.info.differentiable is False


@pytest.mark.parametrize("name", ["gc_content", "kmer_similarity", "homopolymer", "motif"])
def test_rna_by_option(name, jaspar):
    options = {"kmer_similarity": {"reference": ["ACGUACC"]}, "motif": {"source": jaspar}}
    words = [w.replace("T", "U") for w in WORDS]
    rna = make_reward({"name": name, "modality": "rna", **options.get(name, {})})
    options["kmer_similarity"] = {"reference": ["ACGTACC"]}
    same = make_reward({"name": name, **options.get(name, {})})
    torch.testing.assert_close(
        evaluate(rna, tokens(words, "rna")).value, evaluate(same, tokens(WORDS)).value
    )
    with pytest.raises(ValueError, match="scores rna samples, but dna samples came"):
        evaluate(rna, tokens(WORDS))
    with pytest.raises(ValueError, match="modality is dna or rna, but 'protein' came"):
        make_reward({"name": name, "modality": "protein", **options.get(name, {})})


def test_the_gradients_are_those_of_finite_differences(jaspar):
    x = vertices([w[:9] for w in WORDS[:2]], mixed=0.6).data.double().requires_grad_()
    matrix = read_motifs(jaspar)[1].log_odds()
    counts = dna.reference_kmers(WORDS, 2)
    functions = [
        dna.gc_share,
        dna.longest_run,
        lambda x: dna.pearson(dna.kmer_counts(x, 2), counts),
        *(
            lambda x, how=how: dna._motif_value(motif_scores(x, matrix).flatten(1), how, 0.5, 0.8)
            for how in ("occupancy", "log_sum_exp", "max")
        ),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, x)
    oracle = dna.SequenceOracle(Net().double(), 1, "softmax", layout="blv", chunk_size=1)
    x = vertices(WORDS[:2], mixed=0.6).data.double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(oracle(Samples(x, "dna")).value.sum(), x)
    with torch.no_grad():
        ends = [oracle(Samples(x + e * direction, "dna")).value.sum() for e in (1e-5, -1e-5)]
    assert (gradient * direction).sum().item() == pytest.approx(
        (ends[0] - ends[1]).item() / 2e-5, rel=1e-6
    )


def test_data_that_are_no_sequences_are_refused():
    reward = make_reward("gc_content")
    bad = tokens(WORDS)
    bad.data[2, 6] = 4
    with pytest.raises(ValueError, match="token 7 of sample 2 is 4; dna has ACGT, numbered 0 to 3"):
        evaluate(reward, bad)
    with pytest.raises(ValueError, match=r"has 4 channels \(ACGT\), but 5 came; leave MASK out"):
        evaluate(reward, Samples(torch.rand(2, 6, 5), "dna"))
    with pytest.raises(ValueError, match=r"int64 \(b, l\) or float.*float32 \(2, 6\) came"):
        evaluate(reward, Samples(torch.rand(2, 6), "dna"))
    with pytest.raises(ValueError, match=r"but list came"):
        evaluate(reward, Samples(["ACG"], "dna"))
    with pytest.raises(ValueError, match="sequences of length 0"):
        evaluate(reward, Samples(torch.zeros(2, 0, dtype=torch.long), "dna"))
    assert strings(vertices(WORDS, mixed=0.3)) == WORDS


# --------------------------------------------------------------------------------------------
# Composition
# --------------------------------------------------------------------------------------------


def test_gc_content_by_hand():
    words = ["GGCC", "ATTA", "ACGA", "GGCA"]
    close(values("gc_content", words), [1, 0, 0.5, 0.75])
    reward = make_reward({"gc_content": 0.6})
    close(evaluate(reward, tokens(words)).value, [-0.4, -0.6, -0.1, -0.15])
    assert reward.info.range == (-0.6, 0.0)
    with pytest.raises(ValueError, match="share from 0 to 1, but 60 came"):
        make_reward({"gc_content": 60})


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_kmer_similarity_is_the_correlation_of_counted_words(k):
    def count(words):
        seen = Counter(w[i : i + k] for w in words for i in range(len(w) - k + 1))
        return [seen["".join(kmer)] for kmer in itertools.product(LETTERS, repeat=k)]

    reference = ["ACGGT", *WORDS[1:3]]
    expected = [stats.pearsonr(count([w]), count(reference))[0] for w in WORDS]
    reward = make_reward("kmer_similarity", reference=reference, k=k)
    close(evaluate(reward, tokens(WORDS)).value, expected)
    assert dna.reference_kmers(reference, k).tolist() == count(reference)


def test_relaxed_counts_are_means_over_all_sequences():
    """Four positions, 256 sequences, each with its probability."""
    x = vertices(["ACGT"], mixed=0.8).data.double()
    law = torch.tensor(
        [
            math.prod(x[0, j, a].item() for j, a in enumerate(word))
            for word in itertools.product(range(4), repeat=4)
        ]
    ).double()
    everything = torch.tensor(list(itertools.product(range(4), repeat=4)))
    hard = one_hot(Samples(everything, "dna")).double()
    for k in (1, 2, 3, 4):
        torch.testing.assert_close(dna.kmer_counts(x, k)[0], law @ dna.kmer_counts(hard, k))
    runs = torch.zeros(4, 4, dtype=torch.float64)  # mean length of the run of a that ends at j
    for word, p in zip(everything.tolist(), law, strict=True):
        for j in range(4):
            length = len(list(itertools.takewhile(lambda i, a=word[j], w=word: w[i] == a,
                                                  range(j, -1, -1))))  # fmt: skip
            runs[j, word[j]] += p * length
    assert dna.longest_run(x).item() == pytest.approx(runs.max().item())


def test_a_flat_spectrum_scores_zero_and_a_flat_reference_is_refused():
    assert values({"name": "kmer_similarity", "reference": "AACG".split(), "k": 1}, ["ACGT"]) == 0
    x = vertices(["ACGT", "AAAC"]).data.requires_grad_()
    reward = make_reward({"name": "kmer_similarity", "reference": ["AACG"], "k": 1})
    evaluate(reward, Samples(x, "dna")).value.sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad[0] == 0).all()
    with pytest.raises(ValueError, match="all 1-mers are equally frequent in the reference"):
        make_reward({"name": "kmer_similarity", "reference": ["ACGT"], "k": 1})
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k is from 1 to 8, but {k} came"):
            make_reward({"name": "kmer_similarity", "reference": ["ACGT"], "k": k})
    with pytest.raises(ValueError, match="sequences of 2 letters have no 3-mers"):
        evaluate(make_reward({"kmer_similarity": ["AACG"]}), tokens(["AC"]))


def test_reference_files(tmp_path):
    fasta = tmp_path / "ref.fasta"
    fasta.write_text(">one two\nACG\nTta\n\n>x\nGG\n")
    assert read_sequences(fasta, "dna") == ["ACGTTA", "GG"]
    lines = tmp_path / "ref.txt"
    lines.write_text("ACG\n\nTT\n")
    assert read_sequences(str(lines), "dna") == ["ACG", "TT"]
    lines.write_text("ACG\nTXT\n")
    with pytest.raises(ValueError, match=r"ref.txt, line 2: letter 2 is 'X'; dna has ACGT"):
        make_reward({"kmer_similarity": str(lines)})
    fasta.write_text(">one\nACG\n>empty\n>more\nAC")
    with pytest.raises(ValueError, match=r"ref.fasta, line 3: the sequence is empty"):
        read_sequences(fasta, "dna")
    fasta.write_text("\n")
    with pytest.raises(ValueError, match="no sequences in"):
        read_sequences(fasta, "dna")
    with pytest.raises(ValueError, match="sequence 2: letter 1 is 'U'"):
        make_reward({"kmer_similarity": ["ACG", "UCA"]})
    with pytest.raises(FileNotFoundError, match="no file of sequences 'nowhere.fa'"):
        make_reward({"kmer_similarity": "nowhere.fa"})


def test_homopolymer_is_the_longest_group():
    words = [*WORDS, "A" * 25, "ACGT" * 6 + "A", "ACGT" * 5 + "CCCCC"]
    longest = [max(len(list(g)) for _, g in itertools.groupby(w)) for w in words]
    assert longest[-3:] == [25, 1, 5]
    close(values("homopolymer", words), [-n for n in longest])
    close(values({"homopolymer": 4}, words), [-max(n - 4, 0) for n in longest])
    with pytest.raises(ValueError, match="allowed is a length"):
        make_reward({"homopolymer": -1})


# --------------------------------------------------------------------------------------------
# Physics
# --------------------------------------------------------------------------------------------

# kcal/mol and cal/(mol K), Allawi & SantaLucia 1997
NEIGHBOURS = {
    "AA": (-7.9, -22.2), "AT": (-7.2, -20.4), "TA": (-7.2, -21.3), "CA": (-8.5, -22.7),
    "GT": (-8.4, -22.4), "CT": (-7.8, -21.0), "GA": (-8.2, -22.2), "CG": (-10.6, -27.2),
    "GC": (-9.8, -24.4), "GG": (-8.0, -19.9),
}  # fmt: skip


def celsius(word, sodium=0.05, strand=25e-9, complement=25e-9):
    other = {a + b: v for ab, v in NEIGHBOURS.items() for a, b in [ab.translate(
        str.maketrans("ACGT", "TGCA"))[::-1]]}  # fmt: skip
    table = {**other, **NEIGHBOURS}
    heat = sum(table[a + b][0] for a, b in itertools.pairwise(word))
    entropy = sum(table[a + b][1] for a, b in itertools.pairwise(word))
    for end in word[0], word[-1]:
        heat += 2.3 if end in "AT" else 0.1
        entropy += 4.1 if end in "AT" else -2.8
    entropy += 0.368 * (len(word) - 1) * math.log(sodium)
    return 1000 * heat / (entropy + 1.987 * math.log(strand - complement / 2)) - 273.15


def test_melting_temperature_by_hand():
    close(values("melting_temperature"), [celsius(w) for w in WORDS], atol=1e-3)
    how = {"name": "melting_temperature", "sodium": 150, "strand": 500, "complement": 100}
    expected = [celsius(w, 0.15, 500e-9, 100e-9) for w in WORDS]
    close(values(how), expected, atol=1e-3)
    close(values({**how, "target": 55}), [-abs(t - 55) for t in expected], atol=1e-3)
    rna = [w.replace("T", "U") for w in WORDS]
    warm = values({"name": "melting_temperature", "modality": "rna"}, rna, "rna")
    assert (warm != values("melting_temperature")).all() and (warm > 30).all()
    for options, says in [
        ({"table": "DNA_NN9"}, "no table 'DNA_NN9'; there are DNA_NN1, "),
        ({"sodium": 0}, "concentrations must be above 0"),
        ({"complement": 60}, "strand is the higher concentration, but 25.0 came with 60"),
    ]:
        with pytest.raises(ValueError, match=says):
            make_reward("melting_temperature", **options)


def test_folding_energy_is_that_of_viennarna():
    import RNA

    words = ["GGGGAAAACCCC", "AAAAAAAAAAAA", "GGCGAAAGCCAU"]
    energies = [RNA.fold(w)[1] for w in words]
    assert energies[0] < -4 and energies[1] == 0
    close(values("folding_energy", words, "rna"), [-e for e in energies])
    close(values({"folding_energy": True}, words, "rna"), energies)
    hot = values({"name": "folding_energy", "temperature": 60}, words, "rna")
    assert 0 < hot[0] < -energies[0]
    close(values("folding_energy", words, "rna"), [-e for e in energies])  # no global setting left
    with pytest.raises(ValueError, match="degrees Celsius"):
        make_reward("folding_energy", temperature=-300)


@pytest.mark.parametrize(
    "name, module, says, extra",
    [
        ("melting_temperature", "Bio.SeqUtils", "Biopython", "bio"),
        ("folding_energy", "RNA", "ViennaRNA", "bio"),
        ("motif", "pyjaspar", "pyjaspar", "jaspar"),
    ],
)
def test_a_missing_extra_is_named(name, module, says, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    options = {"source": "MA0139.2"} if name == "motif" else {}
    with pytest.raises(ImportError, match=rf'{name}.*{says}.*pip install "diffreward\[{extra}\]"'):
        make_reward(name, **options)


# --------------------------------------------------------------------------------------------
# Motifs
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, text", [("jaspar", JASPAR), ("minimal", MEME)])
def test_motif_files_are_read_as_biopython_reads_them(kind, text, tmp_path):
    file = tmp_path / "motifs"
    file.write_text(text)
    with open(file) as opened:
        truth = bio_motifs.parse(opened, kind)
    ours = read_motifs(file)
    assert len(ours) == len(truth) == 2
    for one, other in zip(ours, truth, strict=True):
        frequencies = np.array([other.counts.normalize()[a] for a in LETTERS]).T
        mine = one.counts / one.counts.sum(1, keepdim=True)
        close(mine, frequencies, atol=0.02 if kind == "minimal" else 1e-9)  # it rounds the counts
    if kind == "jaspar":
        assert [(m.id, m.name) for m in ours] == [("MA0001.1", "first"), ("MA0002.2", "second")]
    else:
        assert [(m.id, m.name) for m in ours] == [("MA0001.1", "first"), ("second", "")]
        assert ours[0].background == (0.3, 0.2, 0.2, 0.3)
        assert ours[0].counts[0].tolist() == pytest.approx([5, 35, 5, 5])
        assert ours[1].counts.sum(1).tolist() == [20, 20]


def test_other_spellings_of_jaspar(tmp_path):
    file = tmp_path / "MYC.pfm"
    file.write_text("1 2\n3 4\n5 6\n7 8\n")
    (plain,) = read_motifs(file)
    assert plain.id == "MYC" and plain.counts.tolist() == [[1, 3, 5, 7], [2, 4, 6, 8]]
    file.write_text(">x\nU [7 8]\nC[3 4]\na 1 2\nG | 5 6\n")
    assert read_motifs(file)[0].counts.tolist() == [[1, 3, 5, 7], [2, 4, 6, 8]]


@pytest.mark.parametrize("both", [True, False])
def test_scores_are_those_of_biopython_on_both_strands(jaspar, both):
    background = (0.3, 0.2, 0.15, 0.35)
    names = dict(zip(LETTERS, background, strict=True))
    with open(jaspar) as file:
        truth = bio_motifs.parse(file, "jaspar")
    for one, other in zip(read_motifs(jaspar), truth, strict=True):
        pssm = other.counts.normalize(
            pseudocounts={a: 0.5 * p for a, p in names.items()}
        ).log_odds(names)  # fmt: skip
        scores = motif_scores(
            one_hot(tokens(WORDS)).double(), one.log_odds(0.5, background), both_strands=both
        )
        assert scores.shape[1] == 1 + both
        for n, word in enumerate(WORDS):
            close(scores[n, 0], math.log(2) * pssm.calculate(word).astype(float), atol=1e-4)
            if both:
                reverse = pssm.reverse_complement().calculate(word).astype(float)
                close(scores[n, 1], math.log(2) * reverse, atol=1e-4)


def test_a_motif_on_both_strands_does_not_know_the_strand(jaspar):
    other = [w.translate(str.maketrans("ACGT", "TGCA"))[::-1] for w in WORDS]
    for output in ("occupancy", "log_sum_exp", "max"):
        spec = {"name": "motif", "source": jaspar, "output": output}
        torch.testing.assert_close(values(spec), values(spec, other))
        one = {**spec, "both_strands": False}
        assert (values(one) - values(one, other)).abs().max() > 0.01


@pytest.mark.parametrize("p_value", [0.3, 0.05, 0.004, 1e-9])
def test_the_threshold_has_the_p_value_it_says(jaspar, p_value):
    """All words enumerated: four letters, 256 words, of unequal probabilities."""
    background = (0.3, 0.2, 0.1, 0.4)
    for motif in read_motifs(jaspar):
        matrix = (motif.log_odds(1.0, background) / 0.01).round() * 0.01
        words = list(itertools.product(range(4), repeat=len(motif)))
        score = np.array([sum(matrix[j, a].item() for j, a in enumerate(w)) for w in words])
        chance = np.array([math.prod(background[a] for a in w) for w in words])
        level = score_threshold(matrix, background, p_value)
        reached = score >= level - 1e-6
        if chance[reached].sum() > p_value:  # even the best word is likelier
            assert reached.sum() == (score >= score.max() - 1e-6).sum()
        else:
            below = score[score < level - 1e-6].max()
            assert chance[score >= below - 1e-6].sum() > p_value
        assert np.abs(score - level).min() < 1e-6


def test_motif_values_by_hand(jaspar):
    """One place, one strand: the score is the word's; then two places."""
    counts = np.array([[1, 8, 0, 1], [2, 1, 0, 7], [0.5, 0, 0.5, 9]])
    odds = np.log((counts + 0.25) / (counts.sum(1, keepdims=True) + 1) / 0.25)
    best = odds[0, 1] + odds[1, 3] + odds[2, 3]  # CTT
    next_ = odds[0, 3] + odds[1, 3] + odds[2, 0]  # TTA
    spec = {"name": "motif", "source": jaspar, "choose": "second", "both_strands": False}
    soft = {**spec, "output": "log_sum_exp", "temperature": 0.5}
    close(values({**spec, "output": "max"}, ["CTT", "TTA"]), [best, next_])
    close(values(soft, ["CTTA"]), [0.5 * np.log(np.exp(2 * best) + np.exp(2 * next_))])
    sites = {**spec, "threshold": 1, "temperature": 2}
    expected = sum(1 / (1 + np.exp(-(s - 1) / 2)) for s in (best, next_))
    close(values(sites, ["CTTA"]), [expected])
    # by default the threshold is that of the p-value
    threshold = score_threshold(load_motifs(jaspar, "second")[0].log_odds(), (0.25,) * 4, 1 / 32)
    close(values({**spec, "p_value": 1 / 32}, ["CTT"]), [1 / (1 + np.exp(threshold - best))])
    assert make_reward({**spec, "output": "max"}).info.range == (-math.inf, math.inf)


def test_several_motifs_are_averaged_and_reported(jaspar):
    scores = evaluate(make_reward({"motif": jaspar}), tokens(WORDS))
    alone = [values({"name": "motif", "source": jaspar, "choose": n}) for n in ("first", "second")]
    assert list(scores.parts) == ["first", "second"]
    torch.testing.assert_close(scores.value, sum(alone) / 2)
    torch.testing.assert_close(scores.parts["second"], alone[1])
    chosen = load_motifs(jaspar, ["MA0002.2", "first"])
    assert [m.id for m in chosen] == ["MA0002.2", "MA0001.1"]
    with pytest.raises(ValueError, match="has no motif 'seccond'; did you mean second"):
        load_motifs(jaspar, "seccond")
    with pytest.raises(ValueError, match=r"no motif 'q'; it has MA0001.1, MA0002.2"):
        load_motifs(jaspar, "q")


def test_the_background_of_a_meme_file_is_used(meme):
    first = read_motifs(meme)[0]
    letters = torch.tensor([0.3, 0.2, 0.2, 0.3], dtype=torch.float64)
    p = (50 * torch.tensor([0.1, 0.7, 0.1, 0.1], dtype=torch.float64) + 2 * letters) / 52
    torch.testing.assert_close(first.log_odds(2.0)[0], (p / letters).log())
    uniform = first.log_odds(2.0, (0.25,) * 4)
    assert (uniform - first.log_odds(2.0)).abs().max() > 0.1


@pytest.mark.parametrize(
    "text, says",
    [
        (JASPAR.replace("94", "-94"), r"line 3: -94 is negative: these are log-odds, not counts"),
        (JASPAR.replace("94", "x4"), r"line 3: 'x4' is no number"),
        (JASPAR.replace("94", "nan"), r"line 3: nan is no count"),
        (JASPAR.replace("94 75", "94"), r"line 3: row 'C' has 3 counts, the first row 4"),
        (JASPAR.replace("G [", "N ["), r"line 4: a row 'N': a matrix has one for each of A, C, G"),
        (JASPAR.replace("G [", "C ["), r"line 4: a second row 'C'"),
        (JASPAR.replace("T [ 2 19 11 50 ]\n", ""), r"line 1: a motif without counts of T"),
        (JASPAR + ">MA3 third\n", r"line 11: a motif without counts of A, C, G, T"),
        (JASPAR.replace("G [ 1  0", "G {1 0"), r"line 4: 'G|no number"),
        (">x\n1 2 3 4\n" * 1 + "1 2 3 4\n" * 6, r"line 6: a fifth row.*transposed"),
        (">x\n0 1\n0 1\n0 1\n0 1\n", r"line 1: position 1 of the motif has no counts"),
        ("", "has no motif in it"),
        (MEME.replace("ACGT", "ACDEFGHIKLMNPQRSTVWY"), r"line 3: .*alphabet must be ACGT or ACGU"),
        (MEME.replace("alength= 4", "alength= 20"), r"line 11: alength is 20, and must be 4"),
        (MEME.replace("0.10 0.70", "-0.10 0.90"), r"line 12: -0.10 is negative"),
        (MEME.replace("0.10 0.70", "0.10 0.90"), r"line 12: the probabilities sum to 1.2, not to"),
        (MEME.replace(" 0.10 0.70", " 0.80"), r"line 12: 3 probabilities came, expected 4"),
        (MEME.replace("w= 4", "w= 5"), r"4 rows came, expected w= 5"),
        (MEME.replace("A 0.3 C", "A 0.3 X"), r"line 8: the background is of \['A', 'X'"),
        (MEME + "MOTIF third\n", r"line 22: motif 'third' has no letter-probability matrix"),
    ],
)
def test_broken_motif_files_are_named_with_the_line(text, says, tmp_path):
    file = tmp_path / "bad.motif"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"bad.motif.*{says}"):
        make_reward({"motif": str(file)})


def test_motif_options_are_checked(jaspar, tmp_path):
    for options, says in [
        ({"output": "sum"}, "output is one of occupancy, log_sum_exp, max, but 'sum' came"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"pseudocount": 0}, "pseudocount must be above 0"),
        ({"p_value": 0}, "a p-value is between 0 and 1, but 0 came"),
        ({"background": [0.5, 0.5, 0.5, 0.5]}, "four frequencies of A, C, G and T"),
    ]:
        with pytest.raises(ValueError, match=says):
            make_reward("motif", source=jaspar, **options)
    with pytest.raises(ValueError, match="the motif has 4 letters, but sequences of 3 came"):
        values({"motif": jaspar}, ["ACG"])
    with pytest.raises(FileNotFoundError, match=r"no motif file '.*gone.jaspar', and it is no mat"):
        make_reward("motif", source=str(tmp_path / "gone.jaspar"))


def test_a_jaspar_id_is_looked_up(monkeypatch, jaspar):
    """By a stand-in for pyjaspar, which returns Biopython's motifs."""
    with open(jaspar) as file:
        truth = {m.matrix_id: m for m in bio_motifs.parse(file, "jaspar")}
    database = types.SimpleNamespace(fetch_motif_by_id=truth.get)
    monkeypatch.setitem(sys.modules, "pyjaspar", types.SimpleNamespace(jaspardb=lambda: database))
    (found,) = load_motifs("MA0002.2")
    (same,) = load_motifs(jaspar, "MA0002.2")
    assert (found.id, found.name) == (same.id, same.name)
    torch.testing.assert_close(found.counts, same.counts)
    with pytest.raises(ValueError, match=r"JASPAR has no matrix 'MA9999.1'"):
        make_reward({"motif": "MA9999.1"})


# --------------------------------------------------------------------------------------------
# Oracles
# --------------------------------------------------------------------------------------------


def test_an_oracle_is_its_network_in_either_layout():
    net = Net().eval()
    with torch.no_grad():
        truth = net(one_hot(tokens(WORDS)))
    for layout, first in [("blv", False), ("bvl", True)]:
        for output, column in [(0, 0), (1, 1), ("right", 1)]:
            reward = make_reward(
                "sequence_oracle", model=Net(first), layout=layout, output=output, chunk_size=3
            )
            close(evaluate(reward, tokens(WORDS)).value, truth[:, column])
    for activation, expected in [("sigmoid", truth.sigmoid()), ("softmax", truth.softmax(1))]:
        reward = make_reward("sequence_oracle", model=Net(), activation=activation)
        close(evaluate(reward, tokens(WORDS)).value, expected[:, 0])
        assert reward.info.range == (0, 1)
    assert not reward.network.training and not reward.network.weight.requires_grad


def test_any_callable_is_an_oracle():
    def gc(x):
        return x[..., 1:3].sum((1, 2))

    def tracks(x):  # (b, 2, n)
        return torch.stack([x[:, 0], 2 * x[:, 1]], 1)

    reward = make_reward("sequence_oracle", model=gc)
    close(evaluate(reward, tokens(WORDS)).value, [w.count("G") + w.count("C") for w in WORDS])
    assert reward.info.differentiable is None
    check_reward(reward, tokens(WORDS))
    reward = make_reward("sequence_oracle", model=tracks, layout="bvl", output=1)
    close(evaluate(reward, tokens(WORDS)).value, [2 * w.count("C") / len(w) for w in WORDS])
    with_logits = make_reward(
        "sequence_oracle", model=lambda x: types.SimpleNamespace(logits=gc(x))
    )
    close(evaluate(with_logits, tokens(WORDS)).value, gc(one_hot(tokens(WORDS))))
    protein = make_reward("sequence_oracle", model=lambda x: x[..., 3].sum(1), modality="protein")
    close(evaluate(protein, tokens(["ACDE", "EEAE"], "protein")).value, [1, 3])


def test_oracles_that_do_not_fit_are_refused():
    for options, says in [
        ({"output": "middle"}, "no output 'middle'; its outputs are left, right"),
        ({"output": 2}, "no output 2; its outputs are left, right"),
        ({"output": -1}, "no output -1"),
        ({"activation": "relu"}, "activation is one of none, sigmoid, softmax, but 'relu'"),
        ({"layout": "lbv"}, "layout is one of blv, bvl, but 'lbv'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            make_reward("sequence_oracle", model=Net(), **options)
    for model, says in [
        (lambda x: x.sum((1, 2)), "takes output 1, but its network has 1, numbered from 0"),
        (lambda x: x.sum(), r"gives 4 sequences \(b,\).*but \(\) came"),
        (lambda x: 3.0, "but float came"),
    ]:
        with pytest.raises(ValueError, match=says):
            evaluate(make_reward("sequence_oracle", model=model, output=1), tokens(WORDS))


def test_a_saved_oracle_is_loaded(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SequenceCNN(["strong", "weak"], channels=8, motif=5, blocks=2).eval()
    network.save_pretrained(tmp_path / "oracle")
    with torch.no_grad():
        truth = network(tokens(WORDS).data)
    reward = make_reward("sequence_oracle", model=str(tmp_path / "oracle"), output="weak")
    close(evaluate(reward, tokens(WORDS)).value, truth[:, 1])
    check_reward(reward, vertices(WORDS, mixed=0.4))
    assert reward.info.weights == str(tmp_path / "oracle") and reward.info.differentiable
    with pytest.raises(FileNotFoundError, match=r"no config.json in '.*nowhere'"):
        make_reward("sequence_oracle", model=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="there is no embedded asset 'dna/nothing'"):
        make_reward("sequence_oracle", model="embedded:dna/nothing")


def test_a_transformers_classifier_reads_letters(tmp_path):
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3, max_position_embeddings=64, initializer_range=1.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BertForSequenceClassification(config).eval()
    network.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path)
    ids = torch.tensor([[2, *(vocabulary[a] for a in w), 3] for w in WORDS])
    with torch.no_grad():
        truth = network(ids).logits
    assert truth.std(0).min() > 0.01
    reward = make_reward("sequence_oracle", model=f"transformers:{tmp_path}", output=2)
    close(evaluate(reward, tokens(WORDS)).value, truth[:, 2])
    assert reward.info.differentiable is False
    check_reward(reward, vertices(WORDS, mixed=0.3))


def test_grelu_checkpoints_by_a_stand_in(tmp_path, monkeypatch):
    """Of the interface that gReLU documents; the package itself is not here."""
    file = tmp_path / "oracle.ckpt"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of gReLU '.*oracle.ckpt'"):
        make_reward("sequence_oracle", model=f"grelu:{file}")
    first = Net(first=True)
    settings = {"model_params": {"first": True}, "train_params": {"task": "regression"}}
    torch.save({"hyper_parameters": settings, "state_dict": first.state_dict()}, file)
    monkeypatch.setitem(sys.modules, "grelu", None)
    with pytest.raises(ImportError, match="pip install gReLU"):
        make_reward("sequence_oracle", model=f"grelu:{file}")

    class LightningModel(Net):
        def __init__(self, model_params, train_params):
            assert train_params == {"task": "regression"}
            super().__init__(**model_params)

        def forward(self, x):
            return super().forward(x)[..., None]  # (b, tasks, 1)

    monkeypatch.setitem(sys.modules, "grelu", types.ModuleType("grelu"))
    stand_in = types.SimpleNamespace(LightningModel=LightningModel)
    monkeypatch.setitem(sys.modules, "grelu.lightning", stand_in)
    reward = make_reward("sequence_oracle", model=f"grelu:{file}", output=1)
    with torch.no_grad():
        truth = Net().eval()(one_hot(tokens(WORDS)))
    close(evaluate(reward, tokens(WORDS)).value, truth[:, 1])
    torch.save({"hyper_parameters": settings, "state_dict": {"weight": Counter()}}, file)
    with pytest.raises(ValueError, match="cannot be read as tensors and plain values of a gReLU"):
        make_reward("sequence_oracle", model=f"grelu:{file}")
    torch.save({"state_dict": {}}, file)
    with pytest.raises(ValueError, match="hyper_parameters"):
        make_reward("sequence_oracle", model=f"grelu:{file}")


def test_the_registry_knows_them():
    known = available_rewards()
    assert known["sequence_judge"].weights != known["sequence_oracle"].weights
    assert not known["sequence_judge"].needs_download
    for name in ("gc_content", "kmer_similarity", "homopolymer", "melting_temperature"):
        assert known[name].modality == "dna" and known[name].weights is None
    assert known["folding_energy"].modality == "rna"

"""Metrics of sets of sequences against hand calculations, scipy and enumeration."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from diffreward.rewards.motifs import Motif
from diffreward.sequence_metrics import (
    kmer_correlation,
    motif_correlation,
    motif_hits,
    pairwise_identity,
    positional_entropy,
    recovery,
)

WORDS = ["ACGTTTACG", "ACGAATTCG", "TTTTTTACG", "GGGCCCATA"]
REFERENCE = ["ACGTACGTACGT", "TTACGAA", "GATTACA", "CCCGGGTTTAAA"]


def motif(word, strength=1000.0):
    """Fits one word and nothing else."""
    counts = torch.zeros(len(word), 4, dtype=torch.float64)
    for j, letter in enumerate(word):
        counts[j, "ACGT".index(letter)] = strength
    return Motif(word, "", counts)


def complement(word):
    return word.translate(str.maketrans("ACGT", "TGCA"))[::-1]


def occurrences(word, sequences):
    return sum(
        s[i : i + len(word)] == word for s in sequences for i in range(len(s) - len(word) + 1)
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_kmer_correlation_is_pearsons_of_the_counts(k):
    def count(sequences):
        seen = Counter(s[i : i + k] for s in sequences for i in range(len(s) - k + 1))
        return [seen["".join(kmer)] for kmer in itertools.product("ACGT", repeat=k)]

    expected = stats.pearsonr(count(WORDS), count(REFERENCE))[0]
    assert kmer_correlation(WORDS, REFERENCE, k) == pytest.approx(expected)
    assert kmer_correlation(WORDS, WORDS * 3, k) == pytest.approx(1)
    rna = [[s.replace("T", "U") for s in words] for words in (WORDS, REFERENCE)]
    assert kmer_correlation(*rna, k=k, modality="rna") == pytest.approx(expected)


def test_motif_hits_are_counted_on_both_strands():
    words = ["ACGT", "TTT", "ACG", "TTACG", "CCCCC", "GGGCCC", "ACGTTTACGA"]
    hits = motif_hits([*WORDS, *REFERENCE], [motif(w) for w in words], p_value=1e-9)
    everything = [*WORDS, *REFERENCE]
    expected = [occurrences(w, everything) + occurrences(complement(w), everything) for w in words]
    assert hits.tolist() == expected and len(set(expected)) > 3
    # a palindrome is found twice where it is, and a longer motif than the sequence nowhere
    assert expected[0] == 2 * occurrences("ACGT", everything) and expected[-1] == 0


def test_a_hit_is_a_word_that_background_reaches_as_rarely_as_said():
    """All 256 words of four letters, the score of each computed by itself."""
    counts = torch.tensor([[5, 1, 1, 3], [2, 2, 5, 1], [0, 9, 1, 0], [4, 3, 2, 1.0]]).double()
    one = Motif("x", "", counts)
    odds = ((counts + 0.25) / (counts.sum(1, keepdim=True) + 1) / 0.25).log()
    words = ["".join(w) for w in itertools.product("ACGT", repeat=4)]
    scores = np.array(
        [sum(odds[j, "ACGT".index(a)].item() for j, a in enumerate(w)) for w in words]
    )
    for p_value in (0.1, 0.02, 0.005):
        threshold = np.sort(scores)[::-1][int(p_value * 256) - 1]
        both = sum((scores[words.index(v)] >= threshold - 1e-6)
                   for w in words for v in (w, complement(w)))  # fmt: skip
        assert abs(int(motif_hits(words, [one], p_value)[0]) - both) <= 2  # scores on a grid


def test_motif_correlation_is_spearmans_of_the_hits():
    motifs = [motif(w) for w in ("ACG", "TTT", "GATTA", "CCC", "AATT", "GTAC")]
    hits = [motif_hits(s, motifs, 0.02) for s in (WORDS, REFERENCE)]
    expected = stats.spearmanr(*hits)[0]
    assert -1 < expected < 1
    assert motif_correlation(WORDS, REFERENCE, motifs, 0.02) == pytest.approx(expected)
    with pytest.raises(ValueError, match="needs two or more motifs, but 1 came"):
        motif_correlation(WORDS, REFERENCE, motifs[:1])


def test_diversity_by_hand():
    assert pairwise_identity(["AAAA", "AAAC", "GGGG"]) == pytest.approx((0.75 + 0 + 0) / 3)
    pairs = [
        np.mean([a == b for a, b in zip(s, t, strict=True)])
        for s, t in itertools.combinations(WORDS, 2)
    ]
    assert pairwise_identity(WORDS) == pytest.approx(np.mean(pairs))
    assert pairwise_identity(["ACDW"] * 5) == 1
    # one position of one letter, one of two, one of four
    four = ["AAA", "AAC", "ACG", "ACT"]
    assert positional_entropy(four) == pytest.approx((0 + 1 + 2) / 3)
    assert positional_entropy(["AC"]) == 0
    columns = [stats.entropy(list(Counter(c).values()), base=2) for c in zip(*WORDS, strict=True)]
    assert positional_entropy(WORDS) == pytest.approx(np.mean(columns))


def test_recovery_by_hand():
    torch.testing.assert_close(
        recovery(["MKTA", "mkwa", "WWWW"], "MKTA"), torch.tensor([1, 0.75, 0])
    )


def test_sets_that_cannot_be_compared_are_refused():
    for function in (pairwise_identity, positional_entropy, lambda s: recovery(s[1:], s[0])):
        with pytest.raises(ValueError, match="the first has 4 letters and number 3 has 3"):
            function(["ACGT", "AAAA", "ACG"])
    for call in (
        lambda: pairwise_identity([]),
        lambda: positional_entropy([]),
        lambda: kmer_correlation([], WORDS),
        lambda: kmer_correlation(WORDS, []),
        lambda: motif_hits([], [motif("ACG")]),
    ):
        with pytest.raises(ValueError, match="a set without sequences"):
            call()
    with pytest.raises(ValueError, match="two or more sequences, but one came"):
        pairwise_identity(["ACGT"])
    with pytest.raises(ValueError, match=r"letter 2 is 'X'"):
        kmer_correlation(["AXGT"], WORDS)
    assert math.isclose(kmer_correlation(["ACGT"], WORDS, k=1), 0)  # no preference, no correlation

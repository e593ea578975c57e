"""Rewards for DNA and RNA: oracles, motifs, composition, k-mers, melting, folding.

Sequences are tokens ``(b, l)``, or relaxed tokens ``(b, l, 4)`` in the order ACGT (ACGU). Rewards
that are differentiable give a vertex of the relaxation what they give the letters there; the others
read its likeliest letters. Each scores DNA by default, and RNA with ``modality="rna"``.
"""

import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffreward._assets import asset_path
from diffreward.rewards.base import Reward, RewardInfo, Scores, register_reward
from diffreward.rewards.combine import safe_sqrt
from diffreward.rewards.motifs import Motif, load_motifs, motif_scores, score_threshold
from diffreward.rewards.tokens import (
    letter_values,
    missing,
    one_hot,
    per_string,
    read_sequences,
    registered,
    strings,
    towards,
    towards_range,
)
from diffreward.samples import Samples, to_tokens

_GUIDE, _JUDGE = "embedded:dna/oracle_a", "embedded:dna/oracle_b"
_PLAIN = dict(modality="dna", licence="Apache-2.0")

# --------------------------------------------------------------------------------------------
# Oracles
# --------------------------------------------------------------------------------------------

_ORACLE = dict(
    modality="dna",
    differentiable=True,
    licence="Apache-2.0 (embedded); otherwise that of the weights",
    source="Wang et al. 2025 (DRAKES), arXiv:2410.13643",
)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "none": (lambda out: out, (-math.inf, math.inf)),
    "sigmoid": (torch.sigmoid, (0.0, 1.0)),
    "softmax": (lambda out: out.softmax(dim=1), (0.0, 1.0)),
}


@register_reward("sequence_oracle", weights=_GUIDE, **_ORACLE)
def sequence_oracle(
    model: str | Callable = _GUIDE,
    output: int | str = 0,
    activation: str = "none",
    layout: str = "blv",
    modality: str = "dna",
    chunk_size: int = 256,
) -> "SequenceOracle":
    """An output of a network that reads a sequence: expression, activity, accessibility.

    Args:
        model: a module or a callable on one-hot or relaxed sequences; ``"embedded:dna/oracle_a"``
            or a folder that `diffreward.networks.dna.SequenceCNN` saved; ``"transformers:NAME"``,
            a sequence classifier's folder or hub id, which reads letters, without gradient;
            ``"grelu:PATH"``, a checkpoint of gReLU, as those of DRAKES.
        output: which of its outputs, by number or, where they have names, by name.
        activation: ``"none"``, ``"sigmoid"`` or ``"softmax"`` (over the outputs).
        layout: of what a module or callable reads: ``"blv"``, (b, l, 4), or ``"bvl"``, (b, 4, l).
        modality: ``"dna"``, ``"rna"`` or ``"protein"``.
        chunk_size: sequences given to the network at once.
    """
    return SequenceOracle(model, output, activation, layout, modality, chunk_size)


@register_reward("sequence_judge", weights=_JUDGE, **_ORACLE)
def sequence_judge(
    output: int | str = 0, activation: str = "none", chunk_size: int = 256
) -> "SequenceOracle":
    """sequence_oracle by the second embedded network, of other data, held out to judge."""
    return SequenceOracle(_JUDGE, output, activation, chunk_size=chunk_size, name="sequence_judge")


class SequenceOracle:
    """One output of a network or callable, higher is better.

    A network is frozen, put in eval mode, and follows the samples' device; it must not let one
    sequence of a batch see another. It may give ``(b,)``, ``(b, k)``, or ``(b, k, n)``, of which
    the mean over n positions is taken (gReLU, with n = 1), or an object with such ``logits``.

    Args:
        model, output, activation, layout, modality, chunk_size: see :func:`sequence_oracle`.
        name: what the reward is called in reports.

    Raises:
        FileNotFoundError, ImportError: the weights are not there, or gReLU is not.
        ValueError: an unknown output, activation or layout; a checkpoint that does not fit; when
            called, an output of another shape.
    """

    def __init__(
        self,
        model: str | Callable = _GUIDE,
        output: int | str = 0,
        activation: str = "none",
        layout: str = "blv",
        modality: str = "dna",
        chunk_size: int = 256,
        name: str = "sequence_oracle",
    ) -> None:
        for what, value, known in [
            ("activation", activation, _ACTIVATIONS),
            ("layout", layout, ("blv", "bvl")),
        ]:
            if value not in known:
                raise ValueError(f"{what} is one of {', '.join(known)}, but {value!r} came")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but {chunk_size} came")
        self.layout, self.chunk_size = layout, chunk_size
        self.judge: Any = None  # a transformers classifier and its tokenizer, which reads letters
        self.function: Callable = self._load(model) if isinstance(model, str) else model
        self.network = self.function if isinstance(self.function, nn.Module) else None
        if self.network is not None:
            self.network.requires_grad_(False).eval()
        self.output = _output_number(output, getattr(self.function, "outputs", None), model)
        self.activation, limits = _ACTIVATIONS[activation]
        weights = model if isinstance(model, str) else None
        # Of a callable nothing is known: what it gives will show.
        differentiable = None if self.network is None else True
        self.info = RewardInfo(
            name,
            modality=modality,
            differentiable=differentiable if self.judge is None else False,
            range=limits,
            licence=_ORACLE["licence"],
            weights=weights,
            source=_ORACLE["source"],
            description=f"output {output} of {weights or type(model).__name__}",
        )

    def _load(self, model: str) -> Callable:
        kind, _, name = model.partition(":")
        if kind == "transformers":
            from diffreward.rewards.text import Classifier

            self.judge = Classifier(name, 0, output="logit", multi_label=True).judge
            return self._of_letters
        if kind == "grelu":
            self.layout = "bvl"
            return _load_grelu(Path(name).expanduser())
        from diffreward.networks.dna import SequenceCNN

        self.layout = "blv"
        folder = asset_path(name) if kind == "embedded" else Path(model).expanduser()
        return SequenceCNN.from_pretrained(folder)

    def __call__(self, samples: Samples) -> Scores:
        if self.judge is not None:
            outputs = self._of_letters(strings(samples))
        else:
            x = one_hot(samples)
            self.to(x.device)
            outputs = torch.cat([self._of_tokens(part) for part in x.split(self.chunk_size)])
        if not self.output < outputs.shape[1]:
            raise ValueError(
                f"reward {self.info.name!r} takes output {self.output}, but its network has "
                f"{outputs.shape[1]}, numbered from 0"
            )
        return Scores(self.activation(outputs)[:, self.output])

    def _of_tokens(self, x: Float[Tensor, "c l v"]) -> Float[Tensor, "c k"]:
        weight = x if self.network is None else next(self.network.parameters(), x)
        x = x.to(weight.dtype)
        found = self.function(x if self.layout == "blv" else x.transpose(1, 2))
        found = getattr(found, "logits", found)
        if not isinstance(found, Tensor) or found.ndim not in (1, 2, 3) or len(found) != len(x):
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"reward {self.info.name!r}: an oracle gives {len(x)} sequences (b,), (b, k) or "
                f"(b, k, n) numbers, but {came} came"
            )
        found = found[:, None] if found.ndim == 1 else found
        return found.mean(dim=2) if found.ndim == 3 else found

    def _of_letters(self, sequences: Sequence[str]) -> Float[Tensor, "b k"]:
        judge = self.judge
        rows = judge.tokenize(sequences, self.info.name)
        outputs = torch.empty(len(rows), judge.network.config.num_labels, device=judge.device)
        with torch.no_grad():
            for which, ids, there in judge.batches(rows):
                outputs[which] = judge.network(ids, attention_mask=there.long()).logits
        return outputs

    def to(self, device: torch.device | str) -> "SequenceOracle":
        """Move the network."""
        # Not in the caller's inference mode: the weights must stay usable for gradients.
        with torch.inference_mode(False):
            if self.judge is not None:
                self.judge.to(device)
            elif self.network is not None:
                self.network.to(device)
        return self


def _output_number(output: int | str, names: Any, model: Any) -> int:
    named = isinstance(names, tuple | list)
    if isinstance(output, str) and named and output in names:
        return list(names).index(output)
    if isinstance(output, str) or output < 0 or (named and output >= len(names)):
        known = ", ".join(map(str, names)) if named else "numbers from 0, without names"
        raise ValueError(f"{model!r} has no output {output!r}; its outputs are {known}")
    return output


def _load_grelu(path: Path) -> nn.Module:
    """The network of a checkpoint of gReLU's LightningModel (Lal et al. 2024).

    Only tensors and plain values are read from it, never pickled objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint of gReLU {str(path)!r}")
    try:
        from grelu.lightning import LightningModel
    except ImportError as err:
        raise ImportError(
            f"a checkpoint of gReLU needs its package ({err}): pip install gReLU"
        ) from err
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = checkpoint["hyper_parameters"]
        network = LightningModel(settings["model_params"], settings.get("train_params", {}))
        network.load_state_dict(checkpoint["state_dict"])
    except (pickle.UnpicklingError, LookupError, TypeError, RuntimeError, ValueError) as err:
        raise ValueError(
            f"{path} cannot be read as tensors and plain values of a gReLU model ({err}); if you "
            "trust it, load it with gReLU yourself and pass the network as the option model, with "
            "layout='bvl'"
        ) from err
    return network.float()


# --------------------------------------------------------------------------------------------
# Motifs
# --------------------------------------------------------------------------------------------

_MOTIF_OUTPUTS = {"occupancy": (0.0, math.inf), "log_sum_exp": (-math.inf, math.inf)}
_MOTIF_OUTPUTS["max"] = _MOTIF_OUTPUTS["log_sum_exp"]


@register_reward(
    "motif",
    modality="dna",
    differentiable=True,
    range=_MOTIF_OUTPUTS["occupancy"],
    licence="Apache-2.0; the matrices have their own",
    weights="a motif file (JASPAR or MEME), or a JASPAR matrix id",
    source="Stormo 2000, DNA binding sites: representation and discovery; "
    "Roider et al. 2007, Predicting transcription factor affinities to DNA (occupancy)",
)
def motif(
    source: str,
    choose: str | Sequence[str] | None = None,
    output: str = "occupancy",
    both_strands: bool = True,
    p_value: float | int = 1e-4,
    threshold: float | int | None = None,
    temperature: float | int = 1.0,
    pseudocount: float | int = 1.0,
    background: Sequence[float] | None = None,
    modality: str = "dna",
) -> Reward:
    """How well motifs (position weight matrices) fit somewhere in the sequence.

    The score of a place is its log-odds s in nats, see :mod:`diffreward.rewards.motifs`. With
    several motifs, the value is the mean over them, and each is among the parts.

    Args:
        source: a file in JASPAR's or MEME's format, or a JASPAR matrix id such as ``"MA0139.2"``
            (needs pyjaspar).
        choose: ids or names of some of its motifs; by default all.
        output: ``"occupancy"``, the sum over places of sigmoid((s - threshold) / temperature), the
            expected number of bound sites; ``"log_sum_exp"``, temperature * log sum
            exp(s / temperature), a soft maximum; ``"max"``, the best place's score.
        both_strands: also read the reverse complement.
        p_value: of the occupancy's threshold, for a background word.
        threshold: itself, in nats; by default from ``p_value``.
        temperature: in nats.
        pseudocount: see :meth:`Motif.log_odds`.
        background: frequencies of A, C, G, T; by default the file's (MEME), or uniform.
        modality: ``"dna"``, or ``"rna"`` (with ``both_strands=False`` as a rule).
    """
    if output not in _MOTIF_OUTPUTS:
        raise ValueError(f"output is one of {', '.join(_MOTIF_OUTPUTS)}, but {output!r} came")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, but {temperature} came")
    motifs = load_motifs(source, choose)
    matrices, thresholds = [], []
    for each in motifs:
        matrices.append(each.log_odds(pseudocount, background))
        if threshold is None and output == "occupancy":
            letters = each.frequencies(background)
            thresholds.append(score_threshold(matrices[-1], letters, p_value))
        else:
            thresholds.append(float(threshold or 0.0))

    def reward(samples: Samples) -> Scores:
        x = one_hot(samples)
        parts = {
            _motif_title(one, motifs): _motif_value(
                motif_scores(x, matrix, both_strands).flatten(1), output, level, float(temperature)
            )
            for one, matrix, level in zip(motifs, matrices, thresholds, strict=True)
        }
        value = torch.stack(list(parts.values())).mean(dim=0)
        return Scores(value, None, parts if len(parts) > 1 else {})

    return registered(
        "motif", reward, range=_MOTIF_OUTPUTS[output], modality=_nucleic(modality), weights=source
    )


def _motif_value(
    scores: Float[Tensor, "b places"], output: str, threshold: float, temperature: float
) -> Float[Tensor, " b"]:
    if output == "occupancy":
        return torch.sigmoid((scores - threshold) / temperature).sum(dim=1)
    if output == "log_sum_exp":
        return temperature * torch.logsumexp(scores / temperature, dim=1)
    return scores.amax(dim=1)


def _motif_title(one: Motif, among: Sequence[Motif]) -> str:
    """Its name, or its id where the name is missing or not its own."""
    alone = sum(other.name == one.name for other in among) == 1
    return one.name if one.name and alone else one.id


def _nucleic(modality: str) -> str:
    if modality not in ("dna", "rna"):
        raise ValueError(f"modality is dna or rna, but {modality!r} came")
    return modality


# --------------------------------------------------------------------------------------------
# Composition
# --------------------------------------------------------------------------------------------


@register_reward(
    "gc_content", differentiable=True, range=(0.0, 1.0), source="this package", **_PLAIN
)
def gc_content(target: float | int | None = None, modality: str = "dna") -> Reward:
    """Share of G and C among the letters.

    Args:
        target: if given, minus the distance to it.
        modality: ``"dna"`` or ``"rna"``.
    """
    if target is not None and not 0 <= target <= 1:
        raise ValueError(f"target is a share from 0 to 1, but {target} came")
    return registered(
        "gc_content",
        lambda samples: towards(gc_share(one_hot(samples)), target),
        range=towards_range((0.0, 1.0), target),
        modality=_nucleic(modality),
    )


def gc_share(x: Float[Tensor, "b l 4"]) -> Float[Tensor, " b"]:
    """Mean over the positions of P(G) + P(C)."""
    return (x @ letter_values({"G": 1.0, "C": 1.0}, "dna", x)).mean(dim=1)


@register_reward(
    "kmer_similarity",
    differentiable=True,
    range=(-1.0, 1.0),
    source="Wang et al. 2025 (DRAKES), arXiv:2410.13643 (3-mer Pearson correlation), per sample",
    **_PLAIN,
)
def kmer_similarity(reference: str | Sequence[str], k: int = 3, modality: str = "dna") -> Reward:
    """Pearson correlation of a sample's k-mer counts with those of a reference set.

    Over all 4^k k-mers. A sample whose counts are all alike scores 0. The paper's metric, of a set
    of samples, is :func:`diffreward.sequence_metrics.kmer_correlation`.

    Args:
        reference: a FASTA file, a file with one sequence a line, or the sequences.
        k: length of the words, up to 8.
        modality: ``"dna"`` or ``"rna"``.
    """
    counts = reference_kmers(read_sequences(reference, _nucleic(modality)), k, modality)
    if not (counts - counts.mean()).any():
        raise ValueError(f"all {k}-mers are equally frequent in the reference: no correlation")
    return registered(
        "kmer_similarity",
        lambda samples: pearson(kmer_counts(one_hot(samples), k), counts),
        modality=modality,
    )


def kmer_counts(x: Float[Tensor, "b l v"], k: int) -> Float[Tensor, "b kmers"]:
    """How often each of the v^k words occurs, overlapping; the first letter counts most.

    Of relaxed tokens, the expected counts under independent positions.

    Raises:
        ValueError: k is not from 1 to 8, or the sequences are shorter.
    """
    if not 1 <= k <= 8:
        raise ValueError(f"k is from 1 to 8, but {k} came")
    windows = x.shape[1] - k + 1
    if windows < 1:
        raise ValueError(f"sequences of {x.shape[1]} letters have no {k}-mers")

    def words(first: int, last: int) -> Tensor:  # (b, windows, v^(last - first))
        found = x.new_ones(len(x), windows, 1)
        for i in range(first, last):
            found = (found[..., None] * x[:, i : i + windows, None, :]).flatten(2)
        return found

    half = k // 2  # by halves, so that no (windows, v^k) is ever stored
    return (words(0, half).transpose(1, 2) @ words(half, k)).flatten(1)


def reference_kmers(
    sequences: Sequence[str], k: int, modality: str = "dna"
) -> Float[Tensor, " kmers"]:
    """k-mer counts of all sequences together, float64.

    Raises:
        ValueError: see `kmer_counts`.
    """
    size = 4 if modality != "protein" else 20
    counts = torch.zeros(size**k, dtype=torch.float64)
    for sequence in sequences:
        x = nn.functional.one_hot(to_tokens(sequence, modality), size).double()
        counts += kmer_counts(x[None], k)[0]
    return counts


def pearson(counts: Float[Tensor, "b m"], reference: Float[Tensor, " m"]) -> Float[Tensor, " b"]:
    """Correlation of each row with the reference; 0, without gradient, for a constant row."""
    reference = reference.to(counts)
    a, r = counts - counts.mean(dim=1, keepdim=True), reference - reference.mean()
    norm = safe_sqrt(a.square().sum(dim=1)) * torch.linalg.vector_norm(r)
    constant = norm == 0
    found = (a @ r) / torch.where(constant, 1.0, norm)
    return torch.where(constant, 0.0, found).clamp(-1.0, 1.0)


@register_reward(
    "homopolymer",
    differentiable=True,
    range=(-math.inf, 0.0),
    source="this package",
    **_PLAIN,
)
def homopolymer(allowed: int = 0, modality: str = "dna") -> Reward:
    """Minus the length of the longest run of one letter.

    Args:
        allowed: runs up to this length cost nothing, longer ones what they exceed it by.
        modality: ``"dna"`` or ``"rna"``.
    """
    if allowed < 0:
        raise ValueError(f"allowed is a length, but {allowed} came")
    return registered(
        "homopolymer",
        lambda samples: -(longest_run(one_hot(samples)) - allowed).clamp_min(0),
        modality=_nucleic(modality),
    )


def longest_run(x: Float[Tensor, "b l v"]) -> Float[Tensor, " b"]:
    """Length of the longest run of one letter.

    Of relaxed tokens, the largest expected length of a run of letter a that ends at position j,
    R(j, a) = x(j, a) (1 + R(j - 1, a)), exact for independent positions.
    """
    run, longest = x[:, 0], [x[:, 0]]
    for j in range(1, x.shape[1]):
        run = x[:, j] * (1 + run)
        longest.append(run)
    return torch.stack(longest, dim=1).flatten(1).amax(dim=1)


# --------------------------------------------------------------------------------------------
# Physics, by other packages
# --------------------------------------------------------------------------------------------


@register_reward(
    "melting_temperature",
    modality="dna",
    differentiable=False,
    licence="Biopython License or BSD-3-Clause (Biopython)",
    source="Allawi & SantaLucia 1997, Thermodynamics and NMR of internal G.T mismatches in DNA "
    "(nearest neighbours, by Biopython)",
)
def melting_temperature(
    target: float | int | None = None,
    table: str | None = None,
    sodium: float | int = 50.0,
    strand: float | int = 25.0,
    complement: float | int = 25.0,
    modality: str = "dna",
) -> Reward:
    """Melting temperature of the duplex with the perfect complement, in degrees Celsius.

    By nearest neighbours, with Biopython's salt correction 5 (SantaLucia 1998). Meant for
    oligonucleotides: two states, up to some 60 letters.

    Args:
        target: if given, minus the distance to it.
        table: ``"DNA_NN1"`` to ``"DNA_NN4"``, ``"RNA_NN1"`` to ``"RNA_NN3"``, or ``"R_DNA_NN1"``;
            by default DNA_NN3 (Allawi & SantaLucia 1997) or RNA_NN3 (Chen et al. 2012).
        sodium: concentration, mM.
        strand: concentration of the strand of higher concentration, nM.
        complement: of the other, nM.
        modality: ``"dna"`` or ``"rna"``.
    """
    table = table or {"dna": "DNA_NN3", "rna": "RNA_NN3"}[_nucleic(modality)]
    try:
        from Bio.SeqUtils import MeltingTemp
    except ImportError as err:
        raise missing("melting_temperature", "Biopython", err) from err
    known = [name for name in dir(MeltingTemp) if "NN" in name and not name.startswith("Tm")]
    if table not in known:
        raise ValueError(f"there is no table {table!r}; there are {', '.join(known)}")
    if not (sodium > 0 and strand > 0 and complement > 0):
        raise ValueError("concentrations must be above 0")
    if strand < complement:
        raise ValueError(
            f"strand is the higher concentration, but {strand} came with {complement}: "
            "exchange them"
        )

    def celsius(sequence: str) -> float:
        return MeltingTemp.Tm_NN(
            sequence, nn_table=getattr(MeltingTemp, table), Na=sodium, dnac1=strand,
            dnac2=complement,
        )  # fmt: skip

    return registered(
        "melting_temperature",
        lambda samples: per_string(celsius, samples, target),
        range=towards_range((-math.inf, math.inf), target),
        modality=modality,
    )


@register_reward(
    "folding_energy",
    modality="rna",
    differentiable=False,
    range=(0.0, math.inf),
    licence="that of ViennaRNA: free use, no redistribution for a fee",
    source="Lorenz et al. 2011, ViennaRNA Package 2.0",
)
def folding_energy(avoid: bool = False, temperature: float | int = 37.0) -> Reward:
    """Minus the minimum free energy of the fold of an RNA, kcal/mol: high is a stable fold.

    Args:
        avoid: the energy itself: high, at most 0, is no fold.
        temperature: degrees Celsius.
    """
    try:
        import RNA
    except ImportError as err:
        raise missing("folding_energy", "ViennaRNA", err) from err
    if not -273.15 < temperature < math.inf:
        raise ValueError(f"temperature is in degrees Celsius, but {temperature} came")

    def energy(sequence: str) -> float:
        settings = RNA.md()
        settings.temperature = float(temperature)
        _, mfe = RNA.fold_compound(sequence, settings).mfe()
        return mfe if avoid else -mfe

    return registered(
        "folding_energy",
        lambda samples: per_string(energy, samples),
        range=(-math.inf, 0.0) if avoid else (0.0, math.inf),
    )

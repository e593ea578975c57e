"""Rewards for proteins: charge, hydropathy, stability, and likelihood under language models.

Sequences are tokens ``(b, l)``, or relaxed tokens ``(b, l, 20)`` in the order of
`diffreward.samples.ALPHABETS`. Rewards that are differentiable give a vertex of the relaxation what
they give the letters there; the others read its likeliest letters.

Rewards of a sequence on a backbone take the structure as an option, one for all samples, or find
each sample's in ``Samples.context["structure"]``, a list of
`diffreward.networks.structure.Structure`.
"""

import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffreward.networks.proteinmpnn import (
    EMBEDDED,
    HIDDEN,
    Decoder,
    Encoder,
    Graph,
    load_proteinmpnn,
    random_order,
)
from diffreward.networks.structure import Structure, read_structure
from diffreward.rewards.base import Reward, RewardInfo, Scores, register_reward
from diffreward.rewards.text import _load, _most_tokens
from diffreward.rewards.tokens import (
    letter_values,
    missing,
    one_hot,
    per_string,
    registered,
    towards,
    towards_range,
)
from diffreward.samples import ALPHABETS, Samples

LETTERS = ALPHABETS["protein"]
STRUCTURE = "structure"
"""Where in ``Samples.context`` the structures are."""

_PLAIN = dict(modality="protein", licence="Apache-2.0")
_BIOPYTHON = dict(modality="protein", licence="Biopython License or BSD-3-Clause (Biopython)")

# --------------------------------------------------------------------------------------------
# Charge and hydropathy
# --------------------------------------------------------------------------------------------

# Bjellqvist et al. 1993 and 1994: of side chains, and of the ends by the residue there.
_BASIC = {"K": 10.0, "R": 12.0, "H": 5.98}
_ACIDIC = {"D": 4.05, "E": 4.45, "C": 9.0, "Y": 10.0}
_FIRST, _FIRST_OF = 7.5, {
    "A": 7.59, "M": 7.0, "S": 6.93, "P": 8.36, "T": 6.82, "V": 7.44, "E": 7.7,
}  # fmt: skip
_LAST, _LAST_OF = 3.55, {"D": 4.55, "E": 4.75}

_HYDROPATHY = {
    "A": 1.8, "R": -4.5, "N": -3.5, "D": -3.5, "C": 2.5, "Q": -3.5, "E": -3.5, "G": -0.4,
    "H": -3.2, "I": 4.5, "L": 3.8, "K": -3.9, "M": 1.9, "F": 2.8, "P": -1.6, "S": -0.8,
    "T": -0.7, "W": -0.9, "Y": -1.3, "V": 4.2,
}  # fmt: skip


@register_reward(
    "net_charge",
    differentiable=True,
    source="Bjellqvist et al. 1993, The focusing positions of polypeptides (pK values)",
    **_PLAIN,
)
def net_charge(target: float | int | None = None, ph: float | int = 7.0) -> Reward:
    """Net charge at a pH, in elementary charges.

    Args:
        target: if given, minus the distance to it.
        ph: the pH.
    """
    if not math.isfinite(ph):
        raise ValueError(f"ph must be a number, but {ph} came")
    return registered(
        "net_charge",
        lambda samples: towards(charge(one_hot(samples), ph), target),
        range=towards_range((-math.inf, math.inf), target),
    )


def charge(x: Float[Tensor, "b l 20"], ph: float | int = 7.0) -> Float[Tensor, " b"]:
    """Sum of the mean charges of side chains and ends (Henderson-Hasselbalch).

    Of relaxed tokens, its mean: it is linear in each position.
    """

    def positive(pk: float) -> float:
        return 1 / (1 + 10 ** (ph - pk))

    def negative(pk: float) -> float:
        return -1 / (1 + 10 ** (pk - ph))

    side = {letter: positive(pk) for letter, pk in _BASIC.items()}
    side |= {letter: negative(pk) for letter, pk in _ACIDIC.items()}
    first = {letter: positive(_FIRST_OF.get(letter, _FIRST)) for letter in LETTERS}
    last = {letter: negative(_LAST_OF.get(letter, _LAST)) for letter in LETTERS}
    sides, firsts, lasts = (letter_values(t, "protein", x) for t in (side, first, last))
    return (x @ sides).sum(dim=1) + x[:, 0] @ firsts + x[:, -1] @ lasts


@register_reward(
    "hydropathy",
    differentiable=True,
    range=(-4.5, 4.5),
    source="Kyte & Doolittle 1982, A simple method for displaying the hydropathic character of a "
    "protein",
    **_PLAIN,
)
def hydropathy(target: float | int | None = None) -> Reward:
    """Grand average of hydropathy (GRAVY): the mean of the letters' Kyte-Doolittle values.

    Args:
        target: if given, minus the distance to it.
    """
    return registered(
        "hydropathy",
        lambda samples: towards(gravy(one_hot(samples)), target),
        range=towards_range((-4.5, 4.5), target),
    )


def gravy(x: Float[Tensor, "b l 20"]) -> Float[Tensor, " b"]:
    """Mean hydropathy; positive is hydrophobic."""
    return (x @ letter_values(_HYDROPATHY, "protein", x)).mean(dim=1)


# --------------------------------------------------------------------------------------------
# By Biopython
# --------------------------------------------------------------------------------------------


@register_reward(
    "isoelectric_point",
    differentiable=False,
    range=(4.05, 12.0),
    source="Bjellqvist et al. 1993, The focusing positions of polypeptides (by Biopython)",
    **_BIOPYTHON,
)
def isoelectric_point(target: float | int | None = None) -> Reward:
    """The pH at which the net charge is zero, between 4.05 and 12.

    Args:
        target: if given, minus the distance to it.
    """
    try:
        from Bio.SeqUtils.IsoelectricPoint import IsoelectricPoint
    except ImportError as err:
        raise missing("isoelectric_point", "Biopython", err) from err
    return registered(
        "isoelectric_point",
        lambda samples: per_string(lambda letters: IsoelectricPoint(letters).pi(), samples, target),
        range=towards_range((4.05, 12.0), target),
    )


@register_reward(
    "instability_index",
    differentiable=True,
    range=(-582.8, 159.1),
    source="Guruprasad et al. 1990, Correlation between stability of a protein and its dipeptide "
    "composition (table by Biopython)",
    **_BIOPYTHON,
)
def instability_index() -> Reward:
    """Minus the instability index: above -40 a protein is called stable."""
    try:
        from Bio.SeqUtils.ProtParamData import DIWV
    except ImportError as err:
        raise missing("instability_index", "Biopython", err) from err
    table = torch.tensor([[DIWV[a][b] for b in LETTERS] for a in LETTERS], dtype=torch.float64)
    return registered("instability_index", lambda samples: -instability(one_hot(samples), table))


def instability(x: Float[Tensor, "b l 20"], table: Float[Tensor, "20 20"]) -> Float[Tensor, " b"]:
    """10 / l times the sum of the weights of all pairs of neighbours.

    Of relaxed tokens, its mean under independent positions.
    """
    pairs = (x[:, :-1] @ table.to(x) * x[:, 1:]).sum(dim=(1, 2))
    return 10 / x.shape[1] * pairs


# --------------------------------------------------------------------------------------------
# ESM
# --------------------------------------------------------------------------------------------

_ESM = dict(
    modality="protein",
    differentiable=True,
    range=(-math.inf, 0.0),
    licence="that of the weights (MIT for ESM-2)",
    source="Lin et al. 2023 (ESM-2), Science 379; Salazar et al. 2020, arXiv:1910.14659 "
    "(pseudo-log-likelihood)",
)


@register_reward(
    "esm", weights="a masked protein language model, by default facebook/esm2_t6_8M_UR50D", **_ESM
)
class ESM:
    """Pseudo-log-likelihood under ESM: the mean over positions of log p(letter | the others).

    In nats per residue, at most 0. Each position is masked in turn, which takes as many passes as
    there are letters. Of relaxed tokens, embeddings and log-probabilities are averaged over the
    letters.

    Args:
        model: of transformers' EsmForMaskedLM: a folder saved by ``save_pretrained``, or a hub id.
        one_pass: mask nothing, and take all log-probabilities from a single pass: far cheaper, and
            higher, since each position sees itself.
        chunk_size: sequences given to the network at once.

    Raises:
        FileNotFoundError: there is no such folder, and it could not be had from the hub.
        ValueError: the checkpoint lacks weights, or its tokenizer a letter; when called, a
            sequence that is too long.
    """

    def __init__(
        self,
        model: str = "facebook/esm2_t6_8M_UR50D",
        one_pass: bool = False,
        chunk_size: int = 32,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but {chunk_size} came")
        network, tokenizer = _load("EsmForMaskedLM", model, ())
        self.network = network.requires_grad_(False).eval()
        self.one_pass, self.chunk_size = one_pass, chunk_size
        vocabulary = tokenizer.get_vocab()
        absent = [letter for letter in LETTERS if letter not in vocabulary]
        if absent:
            raise ValueError(f"the tokenizer of {model!r} has no token for {', '.join(absent)}")
        self.letters = [vocabulary[letter] for letter in LETTERS]
        self.ends = (tokenizer.cls_token_id, tokenizer.eos_token_id)
        self.mask = network.config.mask_token_id
        if None in (*self.ends, self.mask):
            raise ValueError(f"the tokenizer of {model!r} has no cls, eos or mask token")
        # Rotary positions have no end.
        bounded = getattr(network.config, "position_embedding_type", "") == "absolute"
        self.longest = (_most_tokens(network, tokenizer) or math.inf) if bounded else math.inf
        entry = type(self).info
        self.info = RewardInfo(
            entry.name,
            weights=model,
            description=f"{'' if one_pass else 'masked '}pseudo-log-likelihood, {model}",
            **_ESM,
        )

    def __call__(self, samples: Samples) -> Scores:
        x = one_hot(samples)
        if x.shape[1] + 2 > self.longest:
            raise ValueError(
                f"reward {self.info.name!r}: {self.info.weights} reads {self.longest - 2} letters, "
                f"but sequences of {x.shape[1]} came"
            )
        self.to(x.device)
        x = x.to(self.network.dtype)
        return Scores((x * self.log_probs(x)).sum(dim=2).mean(dim=1))

    def log_probs(self, x: Float[Tensor, "b l 20"]) -> Float[Tensor, "b l 20"]:
        """log p of each letter at each position given the other positions, or given all."""
        b, length, _ = x.shape
        table = self.network.get_input_embeddings().weight
        ids = torch.tensor([self.ends[0], *[self.letters[0]] * length, self.ends[1]])
        ids = ids.to(x.device).expand(b, -1)
        first, last = (table[i].expand(b, 1, -1) for i in self.ends)
        embedded = torch.cat([first, x @ table[self.letters], last], dim=1)
        found = []
        if self.one_pass:
            for rows in torch.arange(b, device=x.device).split(self.chunk_size):
                found.append(self._logits(ids[rows], embedded[rows])[:, 1:-1])
        else:
            for rows in torch.arange(b * length, device=x.device).split(self.chunk_size):
                sample, position = rows // length, rows % length + 1
                hidden = F.one_hot(position, length + 2).bool()
                masked = torch.where(hidden[..., None], table[self.mask], embedded[sample])
                logits = self._logits(ids[sample].masked_fill(hidden, self.mask), masked)
                found.append(logits[torch.arange(len(rows), device=x.device), position])
        logits = torch.cat(found).view(b, length, -1)
        return logits.log_softmax(dim=-1)[..., self.letters]

    def _logits(self, ids: Int[Tensor, "c l"], embedded: Float[Tensor, "c l d"]) -> Tensor:
        """Of embeddings which take the place of the tokens'.

        (``inputs_embeds`` skips positions and ESM's token dropout in some releases of transformers,
        and goes through them in others.)
        """
        hook = self.network.get_input_embeddings().register_forward_hook(lambda *_: embedded)
        try:
            return self.network(input_ids=ids).logits
        finally:
            hook.remove()

    def to(self, device: torch.device | str) -> "ESM":
        """Move the network."""
        # Not in the caller's inference mode: the weights must stay usable for gradients.
        with torch.inference_mode(False):
            self.network.to(device)
        return self


# --------------------------------------------------------------------------------------------
# Rewards of a sequence on a backbone
# --------------------------------------------------------------------------------------------


def _given(structure: Any, chains: str | Sequence[str] | None) -> Structure | None:
    """The structure of an option: itself, or of a PDB or mmCIF file."""
    if structure is None or isinstance(structure, Structure):
        return structure if structure is None or chains is None else structure.take_chains(chains)
    return read_structure(structure, chains)


def _by_structure(
    samples: Samples, given: Structure | None, who: str
) -> list[tuple[Structure, list[int]]]:
    """Which samples each structure has, checked for their length."""
    length = samples.data.shape[1]
    each = [given] * len(samples) if given is not None else samples.context[STRUCTURE]
    groups: dict[int, tuple[Structure, list[int]]] = {}
    for i, structure in enumerate(each):
        if not isinstance(structure, Structure):
            raise ValueError(
                f"reward {who!r}: Samples.context[{STRUCTURE!r}] is a list of Structure (see "
                f"diffreward.networks.structure), but sample {i} has a {type(structure).__name__}"
            )
        if len(structure) != length:
            raise ValueError(
                f"reward {who!r}: sample {i} has {length} letters, but its structure "
                f"{structure.name} has {len(structure)} residues"
            )
        groups.setdefault(id(structure), (structure, []))[1].append(i)
    return list(groups.values())


class _Encoded:
    """Backbones encoded by a frozen network, remembered."""

    def __init__(self, encoder: nn.Module, limit: int = 64) -> None:
        self.encoder, self.limit = encoder, limit
        self.known: dict[tuple[int, torch.device], tuple[Structure, Graph]] = {}

    def __call__(self, structure: Structure) -> Graph:
        key = (id(structure), next(self.encoder.parameters()).device)
        if key not in self.known:
            if len(self.known) >= self.limit:
                self.known.pop(next(iter(self.known)))
            # Not in the caller's inference mode: they must serve gradients later.
            with torch.inference_mode(False), torch.no_grad():
                # with the structure, lest another gets its number
                self.known[key] = (structure, self.encoder(structure))
        return self.known[key][1]


def _scattered(
    samples: Samples,
    groups: Sequence[tuple[Structure, list[int]]],
    score: Callable[[Tensor, Structure], Tensor],
    chunk_size: int,
) -> Tensor:
    """``score(x, structure)``, (c, ...), of every sample, in the samples' order."""
    x = one_hot(samples)
    parts, order = [], []
    for structure, members in groups:
        order += members
        rows = x[torch.tensor(members, device=x.device)]
        parts += [score(part, structure) for part in rows.split(chunk_size)]
    back = torch.tensor(order, device=x.device).argsort()
    return torch.cat(parts)[back]


_MPNN = dict(
    modality="protein",
    differentiable=True,
    range=(-math.inf, 0.0),
    licence="MIT (ProteinMPNN's code and weights)",
    source="Dauparas et al. 2022 (ProteinMPNN), Science 378",
)


@register_reward(
    "mpnn_likelihood",
    weights="embedded:proteinmpnn",
    needs_context=(STRUCTURE,),
    **_MPNN,
)
class MPNNLikelihood:
    """Mean log-likelihood of the letters given the backbone under ProteinMPNN, nats per residue.

    Autoregressive, averaged over decoding orders (the authors' score is its negative) and over the
    checkpoints of an ensemble, whose standard deviation is ``Scores.std``. Relaxed letters enter as
    mixtures; the backbone is encoded without noise, and once.

    Args:
        weights: one checkpoint or several: ``"v_48_002"``, ``"v_48_010"``, ``"v_48_020"``,
            ``"v_48_030"``, ``"s_48_020"`` (soluble proteins; keep it to judge what the others
            guided), or files (see `diffreward.networks.proteinmpnn.load_proteinmpnn`).
        structure: a PDB or mmCIF file, or a Structure; by default each sample's own.
        chains: of the file; by default all.
        orders: random decoding orders, the same for all sequences of a length; 0: from the first
            residue to the last.
        seed: of the orders.
        chunk_size: sequences given to the network at once.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `load_proteinmpnn` and `read_structure`;
            when called, a ValueError for a sequence of another length than its backbone.
    """

    def __init__(
        self,
        weights: str | Sequence[str] = "v_48_020",
        structure: Any = None,
        chains: str | Sequence[str] | None = None,
        orders: int = 1,
        seed: int = 0,
        chunk_size: int = 32,
    ) -> None:
        names = [weights] if isinstance(weights, str) else list(weights)
        if not names or orders < 0 or chunk_size < 1:
            raise ValueError(
                "mpnn_likelihood needs at least one checkpoint, no negative number of orders, and "
                f"a chunk_size of at least 1, but {names}, {orders} and {chunk_size} came"
            )
        self.structure = _given(structure, chains)
        self.networks = [load_proteinmpnn(name).requires_grad_(False) for name in names]
        self.encoded = [_Encoded(network.encoder) for network in self.networks]
        self.orders, self.seed, self.chunk_size = orders, seed, chunk_size
        entry = type(self).info
        self.info = RewardInfo(
            entry.name,
            needs_context=(STRUCTURE,) if self.structure is None else (),
            weights=entry.weights if set(names) <= set(EMBEDDED) else " + ".join(names),
            description=f"log-likelihood per residue, ProteinMPNN {', '.join(names)}",
            **_MPNN,
        )

    def __call__(self, samples: Samples) -> Scores:
        x = one_hot(samples)
        groups = _by_structure(samples, self.structure, self.info.name)
        self.to(x.device)
        orders = self._orders(x.shape[1]).to(x.device)

        def score(part: Tensor, structure: Structure) -> Tensor:  # (c, members)
            columns = []
            for network, encode in zip(self.networks, self.encoded, strict=True):
                graph = encode(structure)
                nats = [
                    network.decoder.log_likelihood(part, graph, order[None]).mean(dim=1)
                    for order in orders
                ]
                columns.append(torch.stack(nats).mean(dim=0))
            return torch.stack(columns, dim=1)

        members = _scattered(samples, groups, score, self.chunk_size)
        if members.shape[1] == 1:
            return Scores(members[:, 0])
        return Scores(members.mean(dim=1), members.std(dim=1, correction=0))

    def _orders(self, length: int) -> Float[Tensor, "orders l"]:
        if not self.orders:
            return torch.arange(length, dtype=torch.float32)[None]
        generator = torch.Generator().manual_seed(self.seed)
        none = [False] * length
        return torch.stack([random_order(none, generator) for _ in range(self.orders)])

    def to(self, device: torch.device | str) -> "MPNNLikelihood":
        """Move the networks."""
        with torch.inference_mode(False):
            for network in self.networks:
                network.to(device)
        return self


# --------------------------------------------------------------------------------------------
# Stability
# --------------------------------------------------------------------------------------------

_DDG = dict(
    modality="protein",
    licence="that of the weights",
    source="Wang et al. 2025 (DRAKES), arXiv:2410.13643; data: Tsuboyama et al. 2023, Mega-scale "
    "experimental analysis of protein folding stability",
)


@register_reward("ddg", weights="a stability oracle, to be named", **_DDG)
class DDG:
    """Predicted change of the folding energy against the wild type, kcal/mol: positive is stabler.

    As in the mega-scale data, ddG = dG - dG of the wild type, where dG > 0 is folded.

    Args:
        model: a checkpoint in the layout of DRAKES' oracle (``.pt``, ``.ckpt`` or
            ``.safetensors``, see :class:`StabilityNetwork`); or a module or callable.
        structure: a PDB or mmCIF file, or a Structure; by default each sample's own.
        chains: of the file; by default all.
        reads: what a callable is given: ``"sequence"``, the one-hot or relaxed letters
            ``(b, l, 20)``; or ``"structure"``, these and one Structure, which they share.
        negative_is_stable: turn the sign of models whose negative values are stable.
        chunk_size: sequences given to the model at once.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it has another layout, or an unknown ``reads``; when called, a sequence of
            another length than its backbone, or an output that is not one number per sequence.
    """

    def __init__(
        self,
        model: str | Callable,
        structure: Any = None,
        chains: str | Sequence[str] | None = None,
        reads: str = "structure",
        negative_is_stable: bool = False,
        chunk_size: int = 64,
    ) -> None:
        if reads not in ("sequence", "structure"):
            raise ValueError(f"reads is sequence or structure, but {reads!r} came")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, but {chunk_size} came")
        named = isinstance(model, str)
        self.function: Callable = StabilityNetwork.load(model) if named else model
        self.network = self.function if isinstance(self.function, nn.Module) else None
        if self.network is not None:
            self.network.requires_grad_(False).eval()
        self.on_structure = reads == "structure" or named
        self.structure = _given(structure, chains)
        self.sign, self.chunk_size = (-1.0 if negative_is_stable else 1.0), chunk_size
        entry, own = type(self).info, self.on_structure and self.structure is None
        self.info = RewardInfo(
            entry.name,
            differentiable=None if self.network is None else True,
            needs_context=(STRUCTURE,) if own else (),
            weights=model if named else None,
            description=f"stability against the wild type, {model if named else 'a callable'}",
            **_DDG,
        )

    def __call__(self, samples: Samples) -> Scores:
        x = one_hot(samples)
        if self.network is not None:
            self.to(x.device)
        if self.on_structure:
            groups = _by_structure(samples, self.structure, self.info.name)
            return Scores(_scattered(samples, groups, self._score, self.chunk_size))
        return Scores(torch.cat([self._score(part) for part in x.split(self.chunk_size)]))

    def _score(self, x: Tensor, *structure: Structure) -> Tensor:
        weight = x if self.network is None else next(self.network.parameters(), x)
        found = self.function(x.to(weight.dtype), *structure)
        if not isinstance(found, Tensor) or found.shape not in ((len(x),), (len(x), 1)):
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"reward {self.info.name!r}: the model must give ({len(x)},) numbers, {came} came"
            )
        return self.sign * found.reshape(-1)

    def to(self, device: torch.device | str) -> "DDG":
        """Move the network."""
        with torch.inference_mode(False):
            self.network.to(device)
        return self


class StabilityNetwork(nn.Module):
    """The oracle of DRAKES for proteins: ProteinMPNN whose every position sees every letter.

    ProteinMPNN's encoder and decoder layers, without a decoding order; the mean over the residues,
    and two linear layers with a ReLU between them. Its vocabulary has X and MASK beside the 20
    letters.

    Args:
        num_neighbours: of each residue; 30 in the paper.
        num_layers: of the encoder and of the decoder.
    """

    def __init__(self, num_neighbours: int = 30, num_layers: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder(num_neighbours, num_layers)
        self.W_s = nn.Embedding(len(LETTERS) + 2, HIDDEN)
        self.decoder_layers = Decoder(num_layers).decoder_layers
        self.W_out_mlp = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(
        self, x: Float[Tensor, "b l 20"], backbone: Structure | Graph
    ) -> Float[Tensor, " b"]:
        """Predicted ddG of each sequence on one backbone."""
        graph = backbone if isinstance(backbone, Graph) else self.encoder(backbone)
        letters = x @ self.W_s.weight[: len(LETTERS)]
        everyone = x.new_ones(x.shape[:2])
        sees = everyone[..., None].expand(-1, -1, graph.neighbours.shape[1])
        h = graph.nodes[None]
        for layer in self.decoder_layers:
            h = layer(h, letters, everyone, sees, graph)
        return self.W_out_mlp(h.mean(dim=1)).squeeze(-1)

    @classmethod
    def load(cls, path: str | Path, num_neighbours: int = 30) -> "StabilityNetwork":
        """The network of a file of weights under the names of the authors' checkpoints.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: other weights than these are in it.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model_state_dict", state)
            layers = {key.split(".")[1] for key in state if key.startswith("decoder_layers.")}
            network = cls(num_neighbours, len(layers))
            own = set(network.encoder.state_dict())
            # The linear copy of W_s that finetuning adds says nothing new.
            renamed = {
                f"encoder.{key}" if key in own else key: value
                for key, value in state.items()
                if key != "W_s_ft.weight"
            }
            network.load_state_dict(renamed)
        except (pickle.UnpicklingError, AttributeError, RuntimeError, ValueError) as err:
            raise ValueError(f"{path} is no stability oracle in DRAKES' layout: {err}") from err
        return network.float().eval()

"""Inverse folding as masked diffusion: ProteinMPNN as the denoiser of a protein's letters.

A state is the sequence of one structure, l letters or MASK; the network gives, in one pass,
p(x_q | visible letters, backbone) for all masked q (see `diffreward.networks.proteinmpnn`). The
weights are those of the published autoregressive model: nothing is retrained, and a chain that
reveals one position per step in the order of ``Condition.tensors["order"]`` draws exactly as that
model does. Steps that reveal several positions draw them independently.

The network's conditionals depend, weakly, on the order in which visible letters count as decoded.
It is one random order per policy, the same at all steps and for all samples, so that trained law
and reference see the same one and results do not depend on the batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from diffreward._assets import asset_path
from diffreward.networks.proteinmpnn import ProteinMPNN, load_proteinmpnn, random_order
from diffreward.networks.structure import Structure, read_structure
from diffreward.policies.lora import load_lora
from diffreward.policies.masked import MaskedPolicy
from diffreward.policy import Condition
from diffreward.samples import ALPHABETS, Samples

LETTERS = ALPHABETS["protein"]
TRAINED = ("decoder", "all")


class ProteinPolicy(MaskedPolicy):
    """Sequences for one structure.

    By default only the decoder is trained (0.70M of 1.66M parameters): the backbone is then encoded
    once, here, and never again. With ``train="all"`` it is encoded at each call of the network,
    which costs about as much as two or three sequences of the batch do.

    Args:
        network: ProteinMPNN.
        structure: the backbone. Samples are sequences of all its residues.
        design: the residues whose letters are sampled, as for `Structure.select` ("A", "B:10-20");
            the others keep their native letters. None: all.
        omit: letters that are never sampled, such as "C". Native letters that stay are not
            affected.
        train: "decoder" or "all".
        order_seed: of the random decoding order, in which designed positions come last.
        **sampling: options of `MaskedPolicy`.

    Attributes:
        designed: ``(l,)`` bool, the positions that are sampled.

    Raises:
        ValueError: nothing to design, letters to omit that are none or all there are, unknown
            residues or options.
    """

    time_independent = True
    lora_targets = ("W1", "W2", "W3", "W_in", "W_out")

    def __init__(
        self,
        network: ProteinMPNN,
        structure: Structure,
        *,
        design: str | Sequence[str] | None = None,
        omit: str = "",
        train: str = "decoder",
        order_seed: int = 0,
        **sampling,
    ) -> None:
        if train not in TRAINED:
            raise ValueError(f"train must be one of {', '.join(TRAINED)}, but {train!r} came")
        denoiser = network.decoder if train == "decoder" else network
        super().__init__(denoiser, len(LETTERS), "protein", **sampling)
        everything = torch.ones(len(structure), dtype=torch.bool)
        self.structure = structure
        self.designed = everything if design is None else structure.select(design)
        if not self.designed.any():
            raise ValueError(f"there is nothing to design in {structure.name}: design={design!r}")
        unknown = set(omit.upper()) - set(LETTERS)
        if unknown or set(omit.upper()) == set(LETTERS):
            raise ValueError(f"omit must be some of the letters {LETTERS}, but {omit!r} came")
        kept = torch.tensor([letter not in omit.upper() for letter in LETTERS])
        self._fixed = torch.where(self.designed, -1, structure.native)
        self._allowed = kept | ~self.designed[:, None]
        self._order = random_order(self.designed, torch.Generator().manual_seed(order_seed))
        self._backbone = structure
        if train == "decoder":
            # an inference tensor could not take part in training later
            with torch.inference_mode(False), torch.no_grad():
                self._backbone = network.encode(structure)

    def encode(
        self, prompts: Sequence[str], *, order: Num[Tensor, "*b l"] | None = None
    ) -> Condition:
        """One row per prompt; the prompts themselves make no difference.

        Args:
            prompts: b of them.
            order: another decoding order of the visible positions, lowest number first, ``(l,)`` or
                ``(b, l)``.

        Raises:
            ValueError: an order of another length.
        """
        order = self._order if order is None else order
        if order.shape[-1] != len(self.structure):
            raise ValueError(
                f"the order has {order.shape[-1]} positions, but {self.structure.name} has "
                f"{len(self.structure)} residues"
            )
        tensors = {"fixed": self._fixed, "allowed": self._allowed, "order": order.float()}
        own = {"fixed": 1, "allowed": 2, "order": 1}  # dimensions of one row
        rows = {
            name: (t if t.ndim > own[name] else t[None].expand(len(prompts), *t.shape))
            for name, t in tensors.items()
        }
        return Condition(list(prompts), {k: v.to(self.device) for k, v in rows.items()})

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        return (len(self.structure),)

    def logits(
        self, x: Tensor, t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b l v"]:
        if not isinstance(self._backbone, Structure):
            self._backbone = self._backbone.to(self.device, self.dtype)
        order = condition.tensors["order"].to(self.device)
        return self.denoiser(x, self._backbone, order)[..., : self.vocabulary]

    def decode(self, x0: Tensor, condition: Condition) -> Samples:
        """Samples with their structure as ``context["structure"]``."""
        samples = super().decode(x0, condition)
        samples.context["structure"] = [self.structure] * len(samples)
        return samples

    def recovery(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, " b"]:
        """Share of the designed positions that have their native letter."""
        return self.structure.recovery(tokens, self.designed)


def load_protein(
    structure: str | os.PathLike | Structure = "1ubi.pdb",
    *,
    chains: str | Sequence[str] | None = None,
    design: str | Sequence[str] | None = None,
    weights: str | os.PathLike = "v_48_020",
    incomplete: str = "refuse",
    omit: str = "",
    train: str = "decoder",
    order_seed: int = 0,
    num_steps: int = 50,
    temperature: float = 0.1,
    device: torch.device | str | None = None,
    lora: str | os.PathLike | None = None,
    **sampling,
) -> ProteinPolicy:
    """A policy over the sequences of a structure, from ProteinMPNN.

    Args:
        structure: a PDB or mmCIF file, the name of an embedded one ("1ubi.pdb", "1ake.pdb"), or a
            `Structure`.
        chains: which chains there are, for the network too; None: all protein chains.
        design: which residues are sampled, as for `ProteinPolicy`; None: all.
        weights: of ProteinMPNN, as for `load_proteinmpnn`.
        incomplete: "refuse" or "drop" residues without all backbone atoms.
        omit, train, order_seed: as for `ProteinPolicy`.
        num_steps: T.
        temperature: divides the logits. 0.1 is what ProteinMPNN is sampled with, and what the
            authors of DRAKES sample and train with; samples of 1 are more diverse and less like
            natural sequences.
        device: None: CUDA if there is one.
        lora: folder of a LoRA that finetuning saved, which is added to the weights.
        **sampling: further options of `MaskedPolicy` (schedule, top_p, relaxation, tau, ...).

    Raises:
        FileNotFoundError: there is no such structure.
        ImportError: gemmi is not installed.
        ValueError: a file, chain, residue, letter or option that does not do.
    """
    if not isinstance(structure, Structure):
        structure = read_structure(_find(structure), chains, incomplete=incomplete)
    elif chains is not None:
        structure = structure.take_chains(chains)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = ProteinPolicy(
        load_proteinmpnn(weights).to(device),
        structure,
        design=design,
        omit=omit,
        train=train,
        order_seed=order_seed,
        num_steps=num_steps,
        temperature=temperature,
        **sampling,
    )
    if lora is not None:
        load_lora(policy, lora, fuse=True)
    return policy


def _find(structure: str | os.PathLike) -> Path:
    """A file, or an embedded structure of that name."""
    path = Path(structure)
    folder = asset_path("structures")
    if path.is_file():
        return path
    if path.name == str(structure) and (folder / path.name).is_file():
        return folder / path.name
    embedded = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in (".pdb", ".cif")))
    raise FileNotFoundError(f"there is no structure file {path}; embedded are {embedded}")

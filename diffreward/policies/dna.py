"""Masked diffusion of DNA: `DNAConvNet` as a policy."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffreward._assets import asset_path
from diffreward.networks.dna import DNAConvNet
from diffreward.policies.lora import load_lora
from diffreward.policies.masked import MaskedPolicy
from diffreward.policy import Condition
from diffreward.samples import ALPHABETS

IUPAC = {
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT",
    "K": "GT", "M": "AC", "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip
"""Which letters a code of a template stands for (NC-IUB 1984)."""


class DNAPolicy(MaskedPolicy):
    """A `DNAConvNet` as a masked diffusion policy. It has no prompt, but may have a template.

    Args:
        denoiser: the network.
        length: of the sequences, in bases.
        options: of `MaskedPolicy`.

    Raises:
        ValueError: no length, or an option out of range.
    """

    denoiser: DNAConvNet
    lora_targets = ("stem", "conv", "head.0", "head.2")  # adapters are of undilated ones alone

    def __init__(self, denoiser: DNAConvNet, length: int = 200, **options) -> None:
        super().__init__(denoiser, denoiser.vocabulary, "dna", **options)
        if length < 1:
            raise ValueError(f"the length must be 1 or more, but {length} came")
        self.length = length
        self.time_independent = denoiser.time != "level"

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        return (self.length,)

    def encode(
        self, prompts: Sequence[str], *, template: str | Sequence[str] | None = None
    ) -> Condition:
        """One unconditional sequence per prompt, whose text only names it.

        Args:
            prompts: as many as sequences.
            template: what is known, in IUPAC codes: A, C, G and T stay; N is any letter, W is A or
                T, and so on. One for all, or one per prompt.

        Raises:
            ValueError: a template of another length or with unknown codes, or another number of
                templates than of prompts.
        """
        condition = Condition(list(prompts))
        if template is None:
            return condition
        templates = [template] * len(condition) if isinstance(template, str) else list(template)
        if len(templates) != len(condition):
            raise ValueError(f"{len(templates)} templates came for {len(condition)} prompts")
        allowed = torch.stack([self._allowed(t, row) for row, t in enumerate(templates)])
        letters = allowed.sum(-1)
        # the tensors that MaskedPolicy reads
        condition.tensors["fixed"] = torch.where(letters == 1, allowed.int().argmax(-1), -1)
        if ((letters > 1) & (letters < self.vocabulary)).any():
            condition.tensors["allowed"] = allowed
        return condition

    def logits(
        self, x: Tensor, t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b l v"]:
        return self.denoiser(x, t)

    def _allowed(self, template: str, row: int) -> Tensor:
        """(l, v) bool."""
        codes = template.strip().upper()
        if len(codes) != self.length:
            raise ValueError(
                f"template {row} has {len(codes)} bases, but the policy's sequences {self.length}; "
                "fill it up with N, or give load_dna the other length"
            )
        unknown = next((at for at, code in enumerate(codes) if code not in IUPAC), None)
        if unknown is not None:
            raise ValueError(
                f"template {row} has {codes[unknown]!r} at position {unknown}; expected one of "
                f"{''.join(IUPAC)}, where N is any letter"
            )
        letters = ALPHABETS["dna"]
        return torch.tensor([[letter in IUPAC[code] for letter in letters] for code in codes])


def load_dna(
    folder: str | os.PathLike | None = None,
    *,
    num_steps: int = 64,
    length: int = 200,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    lora: str | os.PathLike | None = None,
    **options,
) -> DNAPolicy:
    """The policy of a folder that `DNAConvNet.save_pretrained` wrote.

    Args:
        folder: None: the embedded model of 200 bp windows of a bacterial genome.
        num_steps: steps of the chain; more of them unmask fewer positions at once.
        length: of the sequences; the network takes any, but knows those it was trained on.
        device: None: a GPU if there is one.
        dtype: of the network.
        lora: folder of a LoRA that finetuning saved, which is added to the weights.
        options: of `MaskedPolicy` (schedule, temperature, top_p, relaxation, tau, remasking).

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing from it.
        ValueError: it holds another network, or an option is out of range.
    """
    folder = asset_path("dna/policy") if folder is None else folder
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = DNAConvNet.from_pretrained(folder).to(device=device, dtype=dtype)
    policy = DNAPolicy(network, length, num_steps=num_steps, **options)
    if lora is not None:
        load_lora(policy, lora, fuse=True)
    return policy

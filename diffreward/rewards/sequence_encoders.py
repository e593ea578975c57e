"""Encoders of sequences: frequencies of words (k-mers), and a protein language model (ESM)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards.encoders import Encoder, NetworkEncoder, register_encoder
from diffreward.rewards.protein import ESM
from diffreward.rewards.sequence import kmer_counts
from diffreward.rewards.tokens import one_hot
from diffreward.samples import ALPHABETS, Samples


@register_encoder("kmers", licence="Apache-2.0", source="this package")
class Kmers(Encoder):
    """Frequencies of a sequence's overlapping words of k letters; parts are those of its windows.

    Of relaxed tokens, the expected frequencies under independent positions.

    Args:
        k: letters of a word: there are 4^k (or 20^k) numbers.
        modality: ``"dna"``, ``"rna"`` or ``"protein"``.
        window: letters of a part; one starts at every letter. By default k: each word for itself.

    Raises:
        ValueError: numbers out of range; when called, sequences shorter than k, or than a window.
    """

    differentiable: bool | None = True

    def __init__(self, k: int = 3, modality: str = "dna", window: int | None = None) -> None:
        if modality not in ALPHABETS:
            raise ValueError(f"modality is one of {', '.join(ALPHABETS)}, but {modality!r} came")
        longest = 8 if modality != "protein" else 3
        if not 1 <= k <= longest:
            raise ValueError(f"k is from 1 to {longest} for {modality}, but {k} came")
        self.window = k if window is None else window
        if self.window < k:
            raise ValueError(f"a window has at least k = {k} letters, but {window} came")
        self.k, self.modality = k, modality
        self.key = f"kmers k={k} {modality} window={self.window}"

    def __call__(self, samples: Samples) -> Float[Tensor, "b d"]:
        x = one_hot(samples)
        return kmer_counts(x, self.k) / (x.shape[1] - self.k + 1)

    def parts(self, samples: Samples) -> Float[Tensor, "b n d"]:
        """Of the windows, from the first to the last."""
        x = one_hot(samples)
        if x.shape[1] < self.window:
            raise ValueError(f"sequences of {x.shape[1]} letters have no windows of {self.window}")
        count = x.shape[1] - self.k + 1
        words = x[:, :count]
        for i in range(1, self.k):
            words = (words[..., None] * x[:, i : i + count, None, :]).flatten(2)
        per_window = self.window - self.k + 1
        return F.avg_pool1d(words.transpose(1, 2), per_window, stride=1).transpose(1, 2)


@register_encoder(
    "esm",
    modality="protein",
    weights="a masked protein language model, by default facebook/esm2_t6_8M_UR50D",
    licence="that of the weights (MIT for ESM-2)",
    source="Lin et al. 2023 (ESM-2), Science 379",
)
class ESMStates(NetworkEncoder):
    """ESM's last hidden states: their mean over the residues; parts are the residues.

    Of relaxed tokens, the input embeddings are averaged over the letters.

    Args:
        model: of transformers' EsmForMaskedLM: a folder saved by ``save_pretrained``, or a hub id.
        chunk_size: sequences given to the network at once.

    Raises:
        FileNotFoundError, ValueError: as `diffreward.rewards.protein.ESM`.
    """

    def __init__(self, model: str = "facebook/esm2_t6_8M_UR50D", chunk_size: int = 32) -> None:
        self.judge = ESM(model, chunk_size=chunk_size)
        super().__init__(self.judge.network, chunk_size)

    def __call__(self, samples: Samples) -> Float[Tensor, "b d"]:
        return self.parts(samples).mean(dim=1)

    def parts(self, samples: Samples) -> Float[Tensor, "b n d"]:
        """Of the residues, from the first to the last."""
        x = one_hot(samples)
        if x.shape[1] + 2 > self.judge.longest:
            raise ValueError(
                f"encoder {self.name!r} reads {self.judge.longest - 2} letters, but sequences of "
                f"{x.shape[1]} came"
            )
        return self.chunked(self._states, x)

    def _states(self, x: Float[Tensor, "c l 20"]) -> Float[Tensor, "c l d"]:
        first, last = self.judge.ends
        inputs = self.network.get_input_embeddings()
        ids = torch.tensor([first, *[self.judge.letters[0]] * x.shape[1], last], device=x.device)
        ends = [inputs.weight[i].expand(len(x), 1, -1) for i in (first, last)]
        embedded = torch.cat([ends[0], x @ inputs.weight[self.judge.letters], ends[1]], dim=1)
        # As in ESM's reward: they take the place of the tokens' embeddings.
        hook = inputs.register_forward_hook(lambda *_: embedded)
        try:
            hidden = self.network.esm(input_ids=ids.expand(len(x), -1)).last_hidden_state
        finally:
            hook.remove()
        return hidden[:, 1:-1]

"""Networks for DNA: a dilated convolutional denoiser, and a convolutional regressor or classifier.

`DNAConvNet` has the shape of the denoiser of DRAKES (Wang et al. 2025, arXiv:2410.13643), which is
that of Dirichlet flow matching (Stark et al. 2024, arXiv:2402.05841): with `PAPER`, 3,326,597
trained parameters. `SequenceCNN` is an oracle: a sequence in, one number per output out.

Both take hard tokens, or relaxed ones, which mean the same where they are one-hot, and both are
differentiable in the latter. In them, whatever lies outside the sequence is zero, so that they know
where it ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffreward.samples import ALPHABETS

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

SMALL: dict[str, Any] = {"channels": 64}
"""748,484 parameters: what the embedded model is."""

PAPER: dict[str, Any] = {"channels": 128, "time": "constant", "mask_output": True}
"""3,326,597 parameters, the paper's: its time embedding sees a constant, and its head also has an
output for MASK, which the SUBS parameterisation discards."""


class DNAConvNet(nn.Module):
    """Logits of each letter at each position, for sequences in which some letters are masked.

    Conv1d to ``channels``, then ``4 * len(dilations)`` residual blocks x + relu(conv(norm(x))), and
    a head of two 1x1 convolutions.

    Args:
        channels: width.
        kernel: width of the convolutions, odd.
        dilations: of the blocks of one round.
        rounds: how often the dilations are gone through.
        time: ``"none"``: the network does not see the noise level, which the number of masks tells
            it anyway; ``"level"``: a Gaussian-Fourier embedding of it is added in every block;
            ``"constant"``: an embedding of zero is (as the paper's network has it).
        mask_output: an output for MASK, which `forward` leaves out.
        vocabulary: number of letters v; MASK is number v.

    Attributes:
        config: the arguments, by name.

    Raises:
        ValueError: an even kernel, or an unknown ``time``.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel: int = 9,
        dilations: Sequence[int] = (1, 1, 4, 16, 64),
        rounds: int = 4,
        time: str = "none",
        mask_output: bool = False,
        vocabulary: int = 4,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"the kernel must be odd to keep the length, but {kernel} came")
        if time not in ("none", "constant", "level"):
            raise ValueError(f"time must be none, constant or level, but {time!r} came")
        self.config = {
            "channels": channels, "kernel": kernel, "dilations": list(dilations), "rounds": rounds,
            "time": time, "mask_output": mask_output, "vocabulary": vocabulary,
        }  # fmt: skip
        self.vocabulary, self.time = vocabulary, time
        self.stem = nn.Conv1d(vocabulary + 1, channels, kernel, padding=kernel // 2)
        timed = time != "none"
        self.blocks = nn.ModuleList(
            _DilatedBlock(channels, kernel, d, timed) for d in tuple(dilations) * rounds
        )
        self.embed_time = _TimeEmbedding(channels) if timed else None
        self.head = nn.Sequential(
            nn.Conv1d(channels, channels, 1),
            nn.ReLU(),
            nn.Conv1d(channels, vocabulary + mask_output, 1),
        )

    def forward(
        self,
        x: Int[Tensor, "b l"] | Float[Tensor, "b l v1"],
        t: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b l v"]:
        """Raw logits of the v letters at every position, visible ones included.

        Args:
            x: tokens 0..v, v being MASK, or relaxed tokens whose v + 1 channels sum to 1.
            t: noise levels in (0, 1]; used only, and then needed, with ``time="level"``.

        Raises:
            ValueError: ``x`` has another number of channels, or ``t`` is missing.
        """
        x = _channels_first(x, self.vocabulary + 1, "v + 1 with MASK", self.stem.weight.dtype)
        embedded = None
        if self.embed_time is not None:
            if self.time == "level" and t is None:
                raise ValueError("this network is conditioned on the noise level: give t")
            level = t if self.time == "level" else x.new_zeros(len(x))
            embedded = self.embed_time(level.to(x.dtype))
        h = F.relu(self.stem(x))
        for block in self.blocks:
            h = block(h, embedded)
        return self.head(h).transpose(1, 2)[..., : self.vocabulary]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``."""
        _save(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DNAConvNet:
        """The network of a folder that `save_pretrained` wrote, in eval mode.

        Raises:
            FileNotFoundError: there is no such folder, or a file is missing from it.
            ValueError: it holds another network, or weights that do not fit its configuration.
        """
        return _load(cls, folder)


class _DilatedBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilation: int, timed: bool) -> None:
        super().__init__()
        self.time = nn.Linear(channels, channels) if timed else None
        self.norm = nn.LayerNorm(channels)
        pad = dilation * (kernel // 2)
        self.conv = nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=pad)

    def forward(self, x: Tensor, embedded: Tensor | None) -> Tensor:
        h = x if self.time is None else x + self.time(embedded)[:, :, None]
        h = self.norm(h.transpose(1, 2)).transpose(1, 2)
        return x + F.relu(self.conv(h))


class _TimeEmbedding(nn.Module):
    """Random Fourier features of the time (Tancik et al. 2020, arXiv:2006.10739), and a layer."""

    def __init__(self, channels: int, scale: float = 30.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(channels // 2))
        self.linear = nn.Linear(channels // 2 * 2, channels)

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t[:, None] * self.frequencies
        return F.relu(self.linear(torch.cat([angle.sin(), angle.cos()], 1)))


class SequenceCNN(nn.Module):
    """Numbers read off a sequence of any length: expression, activity, the logit of a class.

    A wide convolution that finds motifs, residual blocks that halve the length between them, then
    mean and maximum over the positions, and a linear layer.

    Args:
        outputs: their names, in order.
        channels: width.
        motif: width of the first convolution, odd.
        blocks: number of residual blocks, each followed by a halving of the length.
        dropout: share of the features dropped before the last layer while training.
        vocabulary: number of letters v.

    Attributes:
        config: the arguments, by name.

    Raises:
        ValueError: no outputs, or an even motif width.
    """

    def __init__(
        self,
        outputs: Sequence[str],
        channels: int = 64,
        motif: int = 15,
        blocks: int = 4,
        dropout: float = 0.2,
        vocabulary: int = 4,
    ) -> None:
        super().__init__()
        if not outputs or motif % 2 == 0:
            raise ValueError(
                f"at least one output and an odd motif width are needed, but {list(outputs)} and "
                f"{motif} came"
            )
        self.config = {
            "outputs": list(outputs), "channels": channels, "motif": motif, "blocks": blocks,
            "dropout": dropout, "vocabulary": vocabulary,
        }  # fmt: skip
        self.outputs, self.vocabulary = tuple(outputs), vocabulary
        self.stem = nn.Conv1d(vocabulary, channels, motif, padding=motif // 2)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(blocks))
        self.convs = nn.ModuleList(
            nn.Conv1d(channels, channels, 5, padding=2) for _ in range(blocks)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * channels, len(outputs))

    def forward(self, x: Int[Tensor, "b l"] | Float[Tensor, "b l v"]) -> Float[Tensor, "b outputs"]:
        """One row per sequence, one column per output.

        Args:
            x: tokens 0..v-1, or relaxed tokens whose v channels sum to 1.

        Raises:
            ValueError: ``x`` has another number of channels.
        """
        x = _channels_first(x, self.vocabulary, "v", self.stem.weight.dtype)
        h = F.gelu(self.stem(x))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = h + F.gelu(conv(norm(h.transpose(1, 2)).transpose(1, 2)))
            # a rest at the end is averaged over what there is of it
            h = F.avg_pool1d(h, 2, ceil_mode=True)
        return self.head(self.dropout(torch.cat([h.mean(2), h.amax(2)], 1)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``."""
        _save(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SequenceCNN:
        """The network of a folder that `save_pretrained` wrote, in eval mode.

        Raises:
            FileNotFoundError: there is no such folder, or a file is missing from it.
            ValueError: it holds another network, or weights that do not fit its configuration.
        """
        return _load(cls, folder)


def reverse_complement(tokens: Int[Tensor, "*b l"]) -> Int[Tensor, "*b l"]:
    """The other strand, read in its own direction; MASK stays MASK.

    Raises:
        ValueError: a token is neither a letter of DNA nor MASK.
    """
    last = len(ALPHABETS["dna"]) - 1  # the complement of letter k of ACGT is letter 3 - k
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= last + 1:
        raise ValueError(
            f"tokens of DNA are 0 to {last}, and {last + 1} for MASK, but "
            f"{int(tokens.min())} to {int(tokens.max())} came"
        )
    return torch.where(tokens <= last, last - tokens, tokens).flip(-1)


def _channels_first(x: Tensor, channels: int, what: str, dtype: torch.dtype) -> Tensor:
    """Hard or relaxed tokens as ``(b, channels, l)``."""
    if not x.is_floating_point():
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < channels:
            raise ValueError(
                f"tokens must be 0 to {channels - 1}, but {int(x.min())} to {int(x.max())} came"
            )
        x = F.one_hot(x.long(), channels)
    elif x.shape[-1] != channels:
        raise ValueError(
            f"relaxed tokens must have {channels} channels ({what}), but {x.shape[-1]} came"
        )
    return x.to(dtype).transpose(1, 2)


def _save(network: nn.Module, folder: str | Path) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"network": type(network).__name__, **network.config}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: w.detach().cpu().contiguous() for name, w in network.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)


def _load(cls: type, folder: str | Path) -> Any:
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"there is no {name} in {str(folder)!r}; a {cls.__name__} is a folder with "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}, as save_pretrained writes it"
            )
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    kind = config.pop("network", None) if isinstance(config, Mapping) else None
    if kind != cls.__name__:
        raise ValueError(f"{str(folder / CONFIG_FILE)!r} is of a {kind}, not of a {cls.__name__}")
    try:
        network = cls(**config)
        network.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (TypeError, RuntimeError) as err:
        why = " ".join(str(err).split()[:40])  # torch names every weight
        raise ValueError(f"{str(folder)!r} holds no working {cls.__name__}: {why}") from err
    return network.eval()

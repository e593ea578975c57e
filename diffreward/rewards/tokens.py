"""What rewards of sequences share: tokens, letters, files of sequences, targets, missing extras.

Sequences are int64 ``(b, l)``, or relaxed, float ``(b, l, v)``, whose v channels are the letters'
probabilities; token k is letter k of `diffreward.samples.ALPHABETS`.
"""

import dataclasses
import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffreward.rewards.base import Reward, as_reward, find_reward
from diffreward.samples import ALPHABETS, Samples, to_strings, to_tokens

Range = tuple[float | int, float | int]


def registered(name: str, function: Callable[[Samples], Any], **changes: Any) -> Reward:
    """``function`` as the reward of that name, with what its options change in the info."""
    return as_reward(function, dataclasses.replace(find_reward(name).info, **changes))


def one_hot(samples: Samples) -> Float[Tensor, "b l v"]:
    """Relaxed tokens as they are; hard ones as float32 vertices.

    Raises:
        ValueError: an empty sequence, a token that is no letter, another number of channels.
    """
    data, letters = _checked(samples)
    return data if data.ndim == 3 else F.one_hot(data.long(), len(letters)).float()


def strings(samples: Samples) -> list[str]:
    """The sequences in letters; of relaxed tokens the likeliest.

    Raises:
        ValueError: as in `one_hot`.
    """
    return to_strings(_checked(samples)[0].detach(), samples.modality)


def _checked(samples: Samples) -> tuple[Tensor, str]:
    data, modality = samples.data, samples.modality
    letters = ALPHABETS[modality]
    hard = isinstance(data, Tensor) and data.ndim == 2 and not data.is_floating_point()
    relaxed = isinstance(data, Tensor) and data.ndim == 3 and data.is_floating_point()
    if not (hard or relaxed):
        came = (
            f"{data.dtype} {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        )
        raise ValueError(f"{modality} samples are int64 (b, l) or float (b, l, v), but {came} came")
    if not data.shape[1]:
        raise ValueError(f"{modality} sequences of length 0 came")
    if relaxed and data.shape[2] != len(letters):
        raise ValueError(
            f"relaxed {modality} has {len(letters)} channels ({letters}), but {data.shape[2]} came"
            + ("; leave MASK out" if data.shape[2] == len(letters) + 1 else "")
        )
    if hard:
        outside = (data < 0) | (data >= len(letters))
        if outside.any():
            sample, position = (int(n) for n in outside.nonzero()[0])
            raise ValueError(
                f"token {position + 1} of sample {sample} is {int(data[sample, position])}; "
                f"{modality} has {letters}, numbered 0 to {len(letters) - 1}"
            )
    return data, letters


def letter_values(table: Mapping[str, float], modality: str, like: Tensor) -> Float[Tensor, " v"]:
    """One number per letter, 0 where the table has none, in the order of the alphabet."""
    return like.new_tensor([table.get(letter, 0.0) for letter in ALPHABETS[modality]])


def towards(value: Float[Tensor, " b"], target: float | int | None) -> Float[Tensor, " b"]:
    """The value itself, or minus its distance to the target."""
    return value if target is None else -(value - target).abs()


def towards_range(range: Range, target: float | int | None) -> Range:
    """Range of `towards`."""
    low, high = range
    return range if target is None else (-max(abs(low - target), abs(high - target)), 0.0)


def per_string(
    function: Callable[[str], float], samples: Samples, target: float | int | None = None
) -> Float[Tensor, " b"]:
    """A number of each sequence in letters, as float32 on the samples' device; no gradient."""
    values = [function(string) for string in strings(samples)]
    return (
        towards(torch.tensor(values, dtype=torch.float64), target).float().to(samples.data.device)
    )


def missing(name: str, package: str, error: ImportError, extra: str = "bio") -> ImportError:
    """What to raise when a reward's optional package cannot be imported."""
    return ImportError(
        f'reward {name!r} needs {package} ({error}); pip install "diffreward[{extra}]"'
    )


def read_sequences(source: str | Path | Sequence[str], modality: str) -> list[str]:
    """Sequences in capital letters.

    Args:
        source: a FASTA file (may end in .gz), a text file with one sequence a line, or the
            sequences themselves.
        modality: whose alphabet they are checked against.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no sequence, an empty one, or a letter that is none of the alphabet's; the
            message names the file, the line and the letter.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file of sequences {str(source)!r}")
        found = _of_lines(path)
    else:
        found = [(f"sequence {n}", sequence) for n, sequence in enumerate(source, 1)]
    if not found:
        raise ValueError(f"no sequences in {str(source)!r}")
    for where, sequence in found:
        try:
            to_tokens(sequence, modality)
        except ValueError as err:
            raise ValueError(f"{where}: {err}") from None
    return [sequence.strip().upper() for _, sequence in found]


def _of_lines(path: Path) -> list[tuple[str, str]]:
    """(where it starts, sequence); lines after a ``>`` belong together, others stand alone."""
    opened = gzip.open if path.suffix == ".gz" else open
    found: list[tuple[str, str]] = []
    with opened(path, "rt", encoding="utf-8") as file:
        fasta = False
        for n, line in enumerate(file, 1):
            line = line.strip()
            if line.startswith(">"):
                fasta = True
                found.append((f"{path}, line {n}", ""))
            elif line and fasta:
                found[-1] = (found[-1][0], found[-1][1] + line)
            elif line:
                found.append((f"{path}, line {n}", line))
    return found

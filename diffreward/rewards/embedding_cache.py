"""Embeddings remembered on disk, by the content of what was embedded."""

import warnings
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffreward.files import write_atomic
from diffreward.rewards.encoders import Encoder, EncoderSpec, FunctionEncoder, make_encoder
from diffreward.rewards.registry import normalise
from diffreward.samples import Samples


class Cached(Encoder):
    """An encoder that remembers on disk what it embedded, by content.

    What is remembered is found by the encoder's key and the sample's data, prompt and context,
    whatever its file is called and wherever it lies. Calls that need a gradient go past it, and
    samples whose context is more than numbers and words. Each call that computes anything writes
    one file, whole or not at all, so that any number of processes may share a folder.

    Args:
        encoder: what to ask for what is not there.
        folder: made if need be; it may serve many encoders.

    Raises:
        ValueError: a callable of which nothing says what it computes.
    """

    def __init__(self, encoder: EncoderSpec, folder: str | Path) -> None:
        self.encoder = make_encoder(encoder)
        if isinstance(self.encoder, FunctionEncoder) and not self.encoder.identified:
            raise ValueError(
                f"what {self.encoder.name!r} computes cannot be told from its name, so that its "
                "embeddings cannot be cached: give it an attribute 'key', another for each version"
            )
        self.name, self.modality = self.encoder.name, self.encoder.modality
        self.key, self.differentiable = self.encoder.key, self.encoder.differentiable
        mark = blake2b(self.key.encode(), digest_size=8).hexdigest()
        self.folder = Path(folder).expanduser() / f"{normalise(self.name)}-{mark}"
        self._known: dict[bytes, tuple[Path, int]] = {}  # hash -> file, row
        for file in sorted(self.folder.glob("[!.]*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    self._enter(file, opened.get_tensor("hashes"))
            except (OSError, SafetensorError) as err:
                warnings.warn(f"{file} cannot be read and is not used: {err}", stacklevel=2)

    def __call__(self, samples: Samples) -> Tensor:
        return self._of_samples("whole", samples, self.encoder)

    def parts(self, samples: Samples) -> Tensor:
        """Of each sample's parts."""
        return self._of_samples("parts", samples, self.encoder.parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Of texts."""
        hashes = [_hash("text", text) for text in texts]
        return self._found(hashes, lambda rows: self.encoder.texts([texts[i] for i in rows]))

    def resized(self, samples: Samples) -> Samples:
        """As the encoder does it."""
        return self.encoder.resized(samples)

    def to(self, device: torch.device | str) -> "Cached":
        """Move the encoder."""
        self.encoder.to(device)
        return self

    def _of_samples(
        self, what: str, samples: Samples, encode: Callable[[Samples], Tensor]
    ) -> Tensor:
        data = samples.data
        tensors = isinstance(data, Tensor)
        hashes = content_hashes(samples, what)
        if hashes is None or (tensors and data.requires_grad and torch.is_grad_enabled()):
            return encode(samples)
        found = self._found(hashes, lambda rows: encode(samples.take(rows)))
        return found.to(data.device) if tensors else found

    def _found(self, hashes: Sequence[bytes], compute: Callable[[list[int]], Tensor]) -> Tensor:
        new = {h: i for i, h in enumerate(hashes) if h not in self._known}
        if new:
            # What is remembered must not depend on who asked first, in which precision.
            device = "cuda" if torch.cuda.is_available() else "cpu"
            with torch.no_grad(), torch.autocast(device, enabled=False):
                rows = compute(list(new.values())).contiguous().cpu()
            self._write(list(new), rows)
        files: dict[Path, list[int]] = {}
        for i, h in enumerate(hashes):
            files.setdefault(self._known[h][0], []).append(i)
        found: list[Tensor] = [torch.empty(0)] * len(hashes)
        for file, members in files.items():
            with safe_open(file, framework="pt") as opened:
                rows = opened.get_slice("rows")
                for i in members:
                    found[i] = rows[self._known[hashes[i]][1]]
        return torch.stack(found)

    def _write(self, hashes: list[bytes], rows: Tensor) -> None:
        marks = torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.uint8).view(-1, _BYTES)
        name = blake2b(b"".join(hashes), digest_size=_BYTES).hexdigest()
        file = self.folder / f"{name}.safetensors"
        write_atomic(file, lambda path: save_file({"hashes": marks, "rows": rows}, path))
        self._enter(file, marks)

    def _enter(self, file: Path, hashes: Tensor) -> None:
        for row, mark in enumerate(hashes):
            self._known[bytes(mark.tolist())] = file, row


_BYTES = 16
_PLAIN = (int, float, str, type(None))


def content_hashes(samples: Samples, what: str = "") -> list[bytes] | None:
    """Each sample by its data, prompt and context, and by what is to be remembered of it.

    None if the context is more than numbers and words.
    """
    beside = {"prompt": samples.prompts or [None] * len(samples), **samples.context}
    if not all(isinstance(v, _PLAIN) for values in beside.values() for v in values):
        return None
    return [
        _hash((what, samples.modality, {k: v[i] for k, v in beside.items()}), row)
        for i, row in enumerate(samples.data)
    ]


def _hash(facts: Any, data: Tensor | str) -> bytes:
    digest = blake2b(repr(facts).encode(), digest_size=_BYTES)
    if isinstance(data, str):
        digest.update(data.encode())
    else:
        digest.update(repr((data.dtype, data.shape)).encode())
        digest.update(data.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.digest()

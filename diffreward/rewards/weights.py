"""Files of weights: where they are, and whether they are still the same."""

from hashlib import blake2b
from pathlib import Path

import torch

from diffreward.rewards.base import Reward

_PREFIXES = ("local-dir:", "transformers:")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".txt")


def weights_file(name: str) -> str:
    """The path of a file of weights: a path, ``ORG/REPO/FILE`` on the Hugging Face hub, or a URL.

    Raises:
        FileNotFoundError: there is no such file, or it could not be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return str(path)
    parts = name.split("/", 2)
    url = name.startswith("https://")
    local = path.is_absolute() or name.startswith((".", "~")) or len(parts) < 3 or not all(parts)
    if local and not url:
        raise FileNotFoundError(f"there is no file {name}; on the hub it would be ORG/REPO/FILE")
    try:
        if url:
            file = Path(torch.hub.get_dir()) / "checkpoints" / name.rsplit("/", 1)[1]
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(name, str(file), progress=False)
            return str(file)
        from huggingface_hub import hf_hub_download

        return hf_hub_download("/".join(parts[:2]), parts[2])
    except (OSError, ValueError) as err:
        raise FileNotFoundError(
            f"{name} is no file here and could not be downloaded ({err}); "
            "fetch it yourself and give its path"
        ) from err


def fingerprints(name: str) -> dict[str, str]:
    """Full path -> hash of the file ``name``, or of each file of weights in the folder ``name``.

    Two of these that differ say that the weights were replaced, under the same name, between one
    call and the other. Of contents, not of dates: copies on several machines have dates of their
    own. Files up to 64 MB are read whole, of larger ones 64 pieces of a megabyte, which finetuning
    does not leave as they were, though a change of a few numbers can be missed.

    Args:
        name: a path, which "local-dir:" or "transformers:" may precede.

    Returns:
        Nothing where there is no such file or folder.
    """
    return {str(file.resolve()): _hash(file) for file in _files(name)}


def weights_fingerprint(reward: Reward) -> dict[str, str]:
    """`fingerprints` of what ``info.weights`` names, of a reward or of the members of one.

    Nothing, if it names no file that is here: it has no weights, or they are embedded, or in the
    hub's cache.
    """
    members = getattr(reward, "members", None)
    if isinstance(members, dict):
        found = [weights_fingerprint(member) for member in members.values()]
    else:
        found = [fingerprints(name) for name in _names(reward.info.weights)]
    return dict(sorted((path, mark) for some in found for path, mark in some.items()))


def _names(weights: str | None) -> list[str]:
    """The parts of ``"MODEL (PRETRAINED) + HEAD"``."""
    names = []
    for part in weights.split(" + ") if weights else []:
        names.append(part)
        if part.endswith(")") and " (" in part:
            names.extend(part.removesuffix(")").split(" (", 1))
    return names


def _files(name: str) -> list[Path]:
    """A file, or what a folder holds of weights and settings, itself and not below."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    path = Path(name).expanduser()
    try:
        if not name:
            return []
        if path.is_file():
            return [path]
        return [f for f in path.iterdir() if f.suffix in _SUFFIXES and f.is_file()]
    except (OSError, ValueError):  # no such folder, or no name at all
        return []


def _hash(file: Path) -> str:
    pieces, length, size = 64, 2**20, file.stat().st_size
    digest = blake2b(str(size).encode(), digest_size=16)
    with open(file, "rb") as opened:
        for n in range(pieces):
            # one after the other, or spread from the first byte to the last
            opened.seek(max(n * length, n * (size - length) // (pieces - 1)))
            digest.update(opened.read(length))
    return digest.hexdigest()

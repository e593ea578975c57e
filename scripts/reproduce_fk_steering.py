"""Feynman-Kac steering against best-of-N at equal network calls, on the embedded model.

    python scripts/reproduce_fk_steering.py --output runs/fk          # resumable
    python scripts/reproduce_fk_steering.py --output runs/fk --report # tables and figure only
    python scripts/reproduce_fk_steering.py --tune 10 30 100          # lambda, on other prompts

Guide: the CLIP model ``clip_guide``. Judges, which steering never sees: ``clip_judge`` (another
seed, the other half of the data) and the exact ``shapes_checker``. Prompts: the 120 held-out
composed scenes. For each seed and k the particle of highest guiding score is kept, by steering and
by best-of-k; both start from the same noise. k = 4 runs on every seed, the other k on seed 0.
Every (seed, arm, k) is one line of ``results.jsonl``; finished lines are not run again.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffreward import (
    Samples,
    evaluate,
    load_policy,
    make_reward,
    rollout,
    sample_generators,
    steer,
)
from diffreward._assets import asset_path
from diffreward.rewards.shapes import CATEGORIES, random_scene

JUDGES = {
    "guide": "clip_score",
    "judge": {"name": "clip_score", "model": "embedded:clip_judge"},
    "checker": "shapes_checker",
}


def plain_pool(policy, prompts: list[str], n: int, seed: int, batch: int) -> Samples:
    """n plain samples per prompt, prompt-major, from the noise steering starts from."""
    parts, group = [], max(1, batch // n)
    with torch.no_grad():
        for start in tqdm(range(0, len(prompts), group), desc=f"plain seed {seed}"):
            chunk = prompts[start : start + group]
            condition = policy.encode(chunk).repeat(n)
            noise = sample_generators(seed, len(chunk), n, first_prompt=start)
            parts.append(policy.decode(rollout(policy, condition, noise).final, condition))
    return Samples.cat(parts)


def run(args, rewards, path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["arm"], r["seed"], r["k"], r["lmbda"]) for r in lines}
    rows = [
        json.loads(line) for line in asset_path("prompts/scenes.jsonl").read_text().splitlines()
    ]
    prompts = [row["prompt"] for row in rows][:: args.every]
    policy = load_policy(
        "embedded:emoji", num_steps=args.num_steps, guidance_scale=args.guidance_scale
    )

    def record(**line) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    for seed in args.seeds:
        ks = args.ks if seed == 0 else [args.k]
        n = max(ks)
        if ("plain", seed, n, 0.0) not in done:
            pool = plain_pool(policy, prompts, n, seed, args.batch)
            scores = {name: evaluate(r, pool).value.tolist() for name, r in rewards.items()}
            record(arm="plain", seed=seed, k=n, lmbda=0.0, scores=scores)
        for k in ks:
            if k == 1 or ("steered", seed, k, args.lmbda) in done:
                continue
            result = steer(
                policy, rewards["guide"], prompts, num_particles=k, lmbda=args.lmbda, seed=seed,
                ess_threshold=args.ess_threshold, max_batch=args.batch,
            )  # fmt: skip
            scores = {n: evaluate(r, result.particles).value.tolist() for n, r in rewards.items()}
            record(
                arm="steered", seed=seed, k=k, lmbda=args.lmbda, scores=scores,
                roots=result.roots.tolist(),
            )  # fmt: skip


def tune(args, rewards) -> None:
    """Mean scores of the chosen particle by lambda, on 24 scenes that are not held out."""
    rng, prompts = np.random.default_rng(0), []
    while len(prompts) < 24:
        scene = random_scene(rng, CATEGORIES[len(prompts) % len(CATEGORIES)])
        if not scene.held_out() and scene.caption() not in prompts:
            prompts.append(scene.caption())
    policy = load_policy(
        "embedded:emoji", num_steps=args.num_steps, guidance_scale=args.guidance_scale
    )
    for lmbda in args.tune:
        result = steer(
            policy, rewards["guide"], prompts, num_particles=args.k, lmbda=lmbda,
            best_of_n=True, max_batch=args.batch,
        )  # fmt: skip
        means = [
            f"{name} {evaluate(r, arm.samples).value.mean():.3f}"
            for arm in (result.best_of_n, result)
            for name, r in rewards.items()
        ]
        roots = result.roots.double().mean()
        print(f"lambda {lmbda:g}: best-of-{args.k}, steered: {', '.join(means)}; {roots:.2f} roots")


def chosen(line: dict, name: str, k: int) -> np.ndarray:
    """Score ``name`` of the particle of highest guiding score among the first k: (prompts,)."""
    guide = np.array(line["scores"]["guide"]).reshape(-1, line["k"])[:, :k]
    values = np.array(line["scores"][name]).reshape(-1, line["k"])[:, :k]
    return np.take_along_axis(values, guide.argmax(1)[:, None], 1)[:, 0]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and 95 % half-width over prompts of values ``(seeds, prompts)``: seeds are averaged."""
    per_prompt = values.mean(0)
    return per_prompt.mean(), 1.96 * per_prompt.std(ddof=1) / math.sqrt(len(per_prompt))


def report(args, path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    pools = sorted((r for r in lines if r["arm"] == "plain"), key=lambda r: r["k"])
    plain = {r["seed"]: r for r in pools}  # the largest of each seed
    steered = {
        (r["seed"], r["k"]): r for r in lines if r["arm"] == "steered" and r["lmbda"] == args.lmbda
    }
    print(f"lambda = {args.lmbda:g}; mean [difference steered - best-of-k, 95 % half-width]\n")
    print("| k | seeds | score | k = 1 | best-of-k | steered | difference | roots | one root |")
    print("|---|---|---|---|---|---|---|---|---|")
    curves: dict[str, dict[str, list]] = {n: {"best-of-k": [], "steered": []} for n in JUDGES}
    ks = sorted({k for _, k in steered})
    for k in ks:
        seeds = sorted(s for s, kk in steered if kk == k)
        roots = np.array([steered[s, k]["roots"] for s in seeds])
        for name in JUDGES:
            one = np.stack([chosen(plain[s], name, 1) for s in seeds])
            best = np.stack([chosen(plain[s], name, k) for s in seeds])
            ours = np.stack([chosen(steered[s, k], name, k) for s in seeds])
            delta, half = interval(ours - best)
            curves[name]["best-of-k"].append(interval(best))
            curves[name]["steered"].append(interval(ours))
            print(
                f"| {k} | {len(seeds)} | {name} | {one.mean():.3f} | {best.mean():.3f} | "
                f"{ours.mean():.3f} | {delta:+.3f} ± {half:.3f} | {roots.mean():.2f} | "
                f"{(roots == 1).mean():.0%} |"
            )
    plot(ks, curves, plain[0], path.with_name("scaling.png"))


def plot(ks: list[int], curves, plain: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), layout="tight")
    for ax, (name, arms) in zip(axes, curves.items(), strict=True):
        for arm, points in arms.items():
            mean, half = np.array(points).T
            ax.errorbar(ks, mean, half, marker="o", capsize=3, label=arm)
        ax.axhline(chosen(plain, name, 1).mean(), color="grey", lw=1, ls=":", label="k = 1")
        ax.set(xscale="log", xticks=ks, xticklabels=ks, xlabel="k", title=name)
        ax.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=120)
    print(f"\nfigure: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/fk"))
    parser.add_argument("--every", type=int, default=1, help="use every n-th prompt only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--k", type=int, default=4, help="the k run on every seed")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--lmbda", type=float, default=10.0)
    parser.add_argument("--ess_threshold", type=float, default=0.5)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tune", type=float, nargs="+", help="try these lambda, then stop")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    args = parser.parse_args()
    rewards = {name: make_reward(spec) for name, spec in JUDGES.items()}
    if args.tune:
        tune(args, rewards)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.jsonl"
    if not args.report:
        run(args, rewards, path)
    report(args, path)


if __name__ == "__main__":
    main()

"""What steering costs beyond what cannot be avoided, as ratios within one run.

    python scripts/bench_steer.py                     # embedded model, CPU, about 2 minutes
    python scripts/bench_steer.py --model PATH_OR_ID --device cuda --dtype bfloat16

The unavoidable work of K particles per prompt with H scored steps is: sampling P * K images,
decoding them H + 1 times, scoring them H + 1 times. That work is timed as plain calls (`rollout`,
``policy.decode``, ``evaluate``), then `steer` is timed, alternating, and the ratio of each pair is
taken. Peak memory is that of a fresh process per arm (resident set; CUDA: allocated).
Results belong in docs/benchmarks.md, with hardware and date.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from diffreward import evaluate, load_policy, make_reward, rollout, sample_generators, steer


def prepare(args):
    policy = load_policy(
        args.model,
        num_steps=args.num_steps,
        device=args.device,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
    )
    prompts = ["a red heart above a blue circle", "three green stars"][: args.prompts]
    return policy, make_reward(args.reward), prompts


def unavoidable(policy, reward, prompts, args) -> None:
    """Sampling P * K images, and decoding and scoring them H + 1 times."""
    with torch.no_grad():
        condition = policy.encode(prompts).repeat(args.particles)
        x = rollout(policy, condition, sample_generators(0, len(prompts), args.particles)).final
        for _ in range(args.scored_steps + 1):
            evaluate(reward, policy.decode(x, condition))


def steered(policy, reward, prompts, args) -> None:
    """The same number of images, decodes and scores, with selection."""
    fractions = [(h + 1) / (args.scored_steps + 1) for h in range(args.scored_steps)]
    steer(
        policy, reward, prompts, num_particles=args.particles, schedule=fractions,
        ess_threshold=1.0, progress=False,
    )  # fmt: skip


ARMS = {"unavoidable": unavoidable, "steered": steered}


def synchronise(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def clock(arm, *work) -> float:
    synchronise(work[-1].device)
    start = time.perf_counter()
    arm(*work)
    synchronise(work[-1].device)
    return time.perf_counter() - start


def peak_memory(args) -> dict[str, float]:
    """MiB per arm, each in a process of its own."""
    peaks = {}
    for arm in ARMS:
        command = [sys.executable, __file__, "--peak_of", arm, *sys.argv[1:]]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[arm] = float(out.strip().splitlines()[-1])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:emoji")
    parser.add_argument("--reward", default="clip_score")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--scored_steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak_of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()

    work = (*prepare(args), args)
    if args.peak_of:
        ARMS[args.peak_of](*work)
        if torch.device(args.device).type == "cuda":
            print(torch.cuda.max_memory_allocated() / 2**20)
        else:
            # getrusage would include the peak of the process that started this one
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10)
        return

    for arm in ARMS.values():  # warm-up
        arm(*work)
    pairs = [(clock(unavoidable, *work), clock(steered, *work)) for _ in range(args.repeats)]
    ratios = sorted(b / a for a, b in pairs)
    peaks = peak_memory(args)
    print(
        json.dumps(
            {
                "unavoidable_s": round(statistics.median(a for a, _ in pairs), 3),
                "steered_s": round(statistics.median(b for _, b in pairs), 3),
                "time_ratio": {
                    "min": round(ratios[0], 3),
                    "median": round(statistics.median(ratios), 3),
                    "max": round(ratios[-1], 3),
                },
                "peak_mib": {arm: round(mib) for arm, mib in peaks.items()},
                "memory_ratio": round(peaks["steered"] / peaks["unavoidable"], 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()

"""The command line: ``diffreward steer | finetune | score | serve | rewards | doctor``.

A verb is a function from its arguments to the exit code; `VERBS` lists them. It reads its
configuration (:mod:`diffreward.config`), calls the library, and reports
(:mod:`diffreward.report`). Heavy imports happen inside, so that help is quick.

A failure is one paragraph on stderr and an exit code: 2 if the command can be put right, 1 for
anything else. ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

from diffreward import __version__
from diffreward.config import (
    SAMPLES,
    FinetuneConfig,
    ScoreConfig,
    ServeConfig,
    SteerConfig,
    UsageError,
    lists_of_words,
    parse,
    read_prompts,
    to_yaml,
)

# --------------------------------------------------------------------------------------------
# diffreward steer
# --------------------------------------------------------------------------------------------

STEER_EXAMPLES = """\
examples:
  diffreward steer
  diffreward steer --prompts '[a red heart, two blue stars]' --steer.num_particles 8
  diffreward steer --config configs/steer/sd15_imagereward.yaml --model.spec ./my-sd15 --seed 1
  diffreward steer --print_config > mine.yaml
"""


def steer(argv: Sequence[str]) -> int:
    """Steer a model's samples towards a reward; compare with plain samples and best-of-N."""
    config = parse(SteerConfig, argv, "diffreward steer", STEER_EXAMPLES)
    prompts = given = read_prompts(config.prompts)

    from diffreward import report, steering
    from diffreward.controlled import read_controlled
    from diffreward.files import environment, run_folder
    from diffreward.policies import load_policy
    from diffreward.rewards import make_reward

    with run_folder(config.output, "steer") as folder:
        with refusals():  # whatever can be refused is refused before the model is loaded
            guide = make_reward(config.reward)
            _check_options(config, guide)
            data, inputs = _read(read_controlled, "data", config.data), {}
            if data is not None:
                prompts = data.prompts
            judges = _judges(config, guide, prompts, data)
            say(f"loading {config.model.spec}")
            policy = load_policy(config.model.spec, **config.model.arguments())
            if data is not None:
                if not hasattr(policy, "height"):
                    raise ValueError(f"data are captioned pictures; {config.model.spec} draws none")
                inputs = data.resized(policy.height, policy.width).load(range(len(data))).context
            policy.encode(prompts[:1], **{name: each[:1] for name, each in inputs.items()})
        started = time.monotonic()
        result = steering.steer(
            policy, guide, prompts, seed=config.seed, inputs=inputs, **vars(config.steer)
        )
        seconds = round(time.monotonic() - started, 1)
        found = report.SteeringReport(
            prompts, result, guide.info.name, judges, policy.num_steps, config.steer.ess_threshold
        )
        about = environment(policy.device, seed=config.seed, seconds=seconds)
        first = found.write(folder, to_yaml(replace(config, prompts=given)), about)
    print(f"{found.summary()}\n\n{found.roots()}; {seconds:.0f} s\nsee {first}")
    return 0


def _check_options(config: SteerConfig, guide) -> None:
    """Refuse what `steer` would refuse, before the model is loaded."""
    from diffreward.steering.feynman_kac import FeynmanKac, check_options

    options = dict(vars(config.steer))
    options.pop("best_of_n")
    fk = FeynmanKac(**{field.name: options.pop(field.name) for field in fields(FeynmanKac)})
    if config.model.num_steps is not None:
        fk.steps(config.model.num_steps)
    check_options(guide, uncertainty=fk.uncertainty, **options)


def _judges(config: SteerConfig, guide, prompts: list[str], data) -> dict:
    """Label -> held-out reward and which prompts it can judge; a useless one is left out."""
    import torch

    from diffreward.rewards import judge_prompts, make_reward
    from diffreward.rewards.combine import distinct
    from diffreward.samples import Samples

    control = {} if data is None else data.load([0]).context
    size = control["control"].shape[2:] if control else (64, 64)
    blank, judges = Samples(torch.ones(1, 3, *size), "image", [""], control), {}
    kind = guide.info.modality
    for spec in config.judges:
        if spec == config.reward:
            say(f"{guide.info.name} guides, so it is no judge and is left out of the judges")
            continue
        judge = make_reward(spec)
        if kind in (None, "image"):
            can, problem = judge_prompts(judge, prompts, blank)
        else:  # of other kinds there is no blank: their shape is the model's
            can = [judge.info.modality in (None, kind)] * len(prompts)
            problem = f"it scores {judge.info.modality}, not {kind}"
        label = distinct(judge.info.name, [guide.info.name, *judges])
        if any(can):
            judges[label] = judge, can
        else:
            say(f"{label} cannot judge these prompts and is left out: {problem}")
    return judges


# --------------------------------------------------------------------------------------------
# diffreward finetune
# --------------------------------------------------------------------------------------------

FINETUNE_EXAMPLES = """\
examples:
  diffreward finetune
  diffreward finetune --algorithm ddpo --reward aesthetic --training.iterations 50
  diffreward finetune --algorithm '{name: prdp, preset: paper_small}' --prompts prompts.txt
  diffreward finetune --config config.yaml --output runs/mine --resume latest
  accelerate launch -m diffreward finetune --config config.yaml --output runs/mine
"""


def finetune(argv: Sequence[str]) -> int:
    """Finetune a model towards a reward; show held-out rewards and pictures before and after."""
    config = parse(FinetuneConfig, argv, "diffreward finetune", FINETUNE_EXAMPLES)
    prompts = given = read_prompts(config.prompts)
    eval_prompts = None if config.eval_prompts is None else read_prompts(config.eval_prompts)
    if config.resume is not None and config.output is None:
        raise UsageError("--resume needs --output, the folder of the run to go on with")

    from accelerate import PartialState

    from diffreward import finetuning
    from diffreward.algorithms import make_algorithm
    from diffreward.controlled import read_controlled
    from diffreward.files import run_folder
    from diffreward.policies import load_policy
    from diffreward.preferences import read_preferences
    from diffreward.rewards import make_reward

    processes = PartialState(cpu=str(config.model.device).startswith("cpu"))
    if processes.num_processes > 1 and config.output is None:
        raise UsageError("several processes share a run: say where with --output")
    new = config.resume is None and processes.is_main_process
    with run_folder(config.output, "finetune") if new else nullcontext(config.output) as folder:
        with refusals():  # whatever can be refused is refused before the model is loaded
            algorithm, reward = make_algorithm(config.algorithm), make_reward(config.reward)
            algorithm.check(reward)
            training, preferences = config.training, None
            if config.preferences is not None:
                preferences = _read(read_preferences, "preferences", config.preferences)
                prompts, size = preferences.prompts_and_size()
                training = replace(training, samples_per_prompt=size)
            data = _read(read_controlled, "data", config.data)
            eval_data = _read(read_controlled, "eval_data", config.eval_data)
            if data is not None:
                prompts = data.prompts
            finetuning.check_run(
                algorithm, training, len(prompts), processes.num_processes,
                output=config.output, resume=config.resume, hub=config.push_to_hub,
                preferences=preferences, data=data,
            )  # fmt: skip
            if config.reward in config.judges:
                say(f"{reward.info.name} is trained on, so it is left out of the judges")
            judges = [make_reward(spec) for spec in config.judges if spec != config.reward]
            say(f"loading {config.model.spec}")
            policy = load_policy(config.model.spec, **config.model.arguments())
            engine = finetuning.Engine(
                policy, reward, algorithm, prompts, training, preferences=preferences, data=data,
                judges=judges, eval_prompts=eval_prompts, eval_data=eval_data, output=folder,
                resume=config.resume,
                config=asdict(replace(config, prompts=given, output=None, resume=None)),
                hub=config.push_to_hub,
            )  # fmt: skip
        result = engine.run()
    if not processes.is_main_process:
        return 0
    if result.stopped == "signal":
        say(
            f"stopped by a signal after {result.iterations} iterations; go on with "
            f"--output {folder} --resume latest"
        )
        return 0
    if result.stopped == "guard":
        say(f"the guard stopped the run after {result.iterations} iterations")
    shown = sorted(Path(folder).glob("before_after.*")) or [Path(folder, "samples")]
    print(f"{result.summary()}\nsee {shown[0]} and README.md beside it")
    return 0


def _read(reader: Callable, option: str, source: str | dict | None):
    """A data set: None, the reader's first argument, or a mapping of its arguments."""
    if source is None:
        return None
    known = list(inspect.signature(reader).parameters)
    arguments = {known[0]: source} if isinstance(source, str) else source
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}"
            raise UsageError(f"{option} has no entry {name!r}; {hint}")
    if known[0] not in arguments:
        raise UsageError(f"{option} needs the entry {known[0]!r}, but {arguments} came")
    return reader(**arguments)


# --------------------------------------------------------------------------------------------
# diffreward score
# --------------------------------------------------------------------------------------------

SCORE_EXAMPLES = """\
examples:
  diffreward score
  diffreward score images/ more.csv --rewards colorfulness jpeg_compressibility --out scores.parquet
  diffreward score shard-*.tar --rewards '{name: clip_score, model: ViT-L-14, pretrained: openai}'
  diffreward score images/ --rewards frechet vendi clip_score --reference photos/
  diffreward score base/ tuned/ --rewards frechet --reference photos/ --group_by folder
  torchrun --nproc_per_node 8 -m diffreward score images/ --out scores.parquet
  RAY_ADDRESS=auto diffreward score images/ --out scores.parquet --engine ray
"""


def score(argv: Sequence[str]) -> int:
    """Score files by any rewards, resumably; one row a file, and a summary."""
    words = lists_of_words(argv, "paths", "rewards")
    config = parse(ScoreConfig, words, "diffreward score", SCORE_EXAMPLES)
    options = dict(vars(config))
    paths, rewards, out = (options.pop(name) for name in ("paths", "rewards", "out"))
    paths = [paths] if isinstance(paths, str) else paths
    if out is None and paths != [SAMPLES]:
        out = "scores.parquet"
    for spec in rewards:
        if isinstance(spec, str) and os.path.exists(spec):
            raise UsageError(f"{spec!r} is a path, not a reward; write paths before --rewards")
    if isinstance(config.prompts, list) or str(config.prompts).endswith((".txt", ".jsonl")):
        options["prompts"] = read_prompts(config.prompts)

    from diffreward import report, scoring
    from diffreward.files import table

    with refusals():
        found = scoring.score(paths, rewards, out=out, progress=True, **options)
    if found.table is None:
        say(
            f"done: {found.computed} rows scored here; other processes are still scoring, and the "
            f"last of them writes {out}"
        )
        return 0
    if found.labels:
        print(f"{report.score_summary(found.summary())}\n")
    if found.sets:
        header = ["reward of sets", "set", "count", "errors", "value", "standard error"]
        print(f"{table(header, [_set_row(each) for each in found.sets])}\n")
    for each in found.sets:
        if each.error:
            say(f"{each.reward}{'' if each.group is None else f' of {each.group}'}: {each.error}")
    wrong = found.errors
    for name, error in wrong[:3]:
        say(f"{name}: {error}")
    if len(wrong) > 3:
        say(f"... and {len(wrong) - 3} more rows with an error")
    about = f"{len(found)} rows" + (f", {len(wrong)} of them with an error" if wrong else "")
    if found.computed:
        about += f"; {found.computed} scored in {found.seconds:.1f} s, {found.rate:.1f} a second"
        about += f", batch size {found.batch_size}"
    print(about + (f"\nsee {out}" if out else "\n(--out FILE keeps the rows)"))
    return 0


def _set_row(found) -> list[str]:
    pair = found.value + 0.0, found.standard_error  # no "-0"
    numbers = [f"{x:.4g}" if math.isfinite(x) else "-" for x in pair]
    return [found.reward, found.group or "-", str(found.n), str(found.errors), *numbers]


# --------------------------------------------------------------------------------------------
# diffreward serve
# --------------------------------------------------------------------------------------------

SERVE_EXAMPLES = """\
examples:
  diffreward serve
  diffreward serve --rewards '[clip_score, {name: target_color, color: blue}]' --port 9000
  diffreward serve --host 0.0.0.0 --token env:DIFFREWARD_TOKEN
"""


def serve(argv: Sequence[str]) -> int:
    """Serve rewards over HTTP, for the reward 'remote' and whatever else speaks HTTP."""
    config = parse(ServeConfig, argv, "diffreward serve", SERVE_EXAMPLES)
    options = dict(vars(config))
    host, port = options.pop("host"), options.pop("port")

    from diffreward import serve as serving

    with refusals():
        app = serving.create_app(**options)
    serving.run(app, host, port, open_to_all=config.token is None)
    return 0


# --------------------------------------------------------------------------------------------
# diffreward rewards
# --------------------------------------------------------------------------------------------


def rewards(argv: Sequence[str]) -> int:
    """List the rewards there are, or show one with its options."""
    parser = Arguments(prog="diffreward rewards", description=rewards.__doc__)
    parser.add_argument("name", nargs="?", help="show this one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(argv)

    from diffreward.files import plain, table
    from diffreward.rewards import available_rewards
    from diffreward.rewards.base import find_reward

    if chosen.name is None:
        infos = available_rewards().values()
        if chosen.json:
            print(json.dumps([plain(asdict(info)) for info in infos], indent=2))
            return 0
        header = ["name", "scores", "gradient", "prompt", "range", "weights", "description"]
        print(table(header, [_reward_row(info) for info in infos], numbers=False))
        print("\n'diffreward rewards NAME' shows its options and licence")
        return 0

    with refusals():
        entry = find_reward(chosen.name)
    options = {
        option.name: "required" if option.default is option.empty else option.default
        for option in inspect.signature(entry.factory).parameters.values()
    }
    if chosen.json:
        print(json.dumps(plain({**asdict(entry.info), "options": options}), indent=2))
        return 0
    print(f"{entry.info.name}\n\n{inspect.getdoc(entry.factory) or entry.info.description}\n")
    facts = {
        "options": ", ".join(f"{name}={value!r}" for name, value in options.items()) or "none",
        "scores": _scored(entry.info),
        "gradient": _yes(entry.info.differentiable),
        "prompt": "needed" if entry.info.needs_prompt else "not needed",
        "context": ", ".join(entry.info.needs_context) or "none needed",
        "range": _range(entry.info.range),
        "licence": entry.info.licence or "not declared",
        "weights": entry.info.weights or "none",
        "source": entry.info.source or "not declared",
    }
    print("\n".join(f"{name + ':':10} {value}" for name, value in facts.items()))
    return 0


def _reward_row(info) -> list[str]:
    return [
        info.name,
        _scored(info),
        _yes(info.differentiable),
        _yes(info.needs_prompt),
        _range(info.range),
        info.weights or "none",
        info.description,
    ]


def _scored(info) -> str:
    return ("sets of " if info.of_sets else "") + (info.modality or "anything")


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "?"}[value]


def _range(range: tuple[float, float]) -> str:
    return f"{range[0]:g} .. {range[1]:g}"


# --------------------------------------------------------------------------------------------
# diffreward doctor
# --------------------------------------------------------------------------------------------


def doctor(argv: Sequence[str]) -> int:
    """Check versions, devices, embedded models and caches; say what to do about what is wrong."""
    parser = Arguments(prog="diffreward doctor", description=doctor.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(argv)

    from diffreward.doctor import examine

    findings = list(examine())
    if chosen.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.state:7} {finding.what}: {finding.found}")
            if finding.advice:
                print(f"{'':7} -> {finding.advice}")
    broken = sum(finding.state == "broken" for finding in findings)
    if not chosen.json:
        print(f"\n{broken} broken" if broken else "\nnothing is broken")
    return 1 if broken else 0


# --------------------------------------------------------------------------------------------
# All verbs
# --------------------------------------------------------------------------------------------

VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "steer": steer,
    "finetune": finetune,
    "score": score,
    "serve": serve,
    "rewards": rewards,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments, without the program's name; None: those of the process.

    Returns:
        The exit code: 0, 2 for a command that can be put right, 1 for any other failure.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.filterwarnings("always", category=UserWarning, module=r"diffreward\b")
        if not debug:  # other packages' advice to their callers
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return _run([arg for arg in argv if arg != "--debug"])
        except SystemExit as exit:  # after --help and --print_config
            return exit.code if isinstance(exit.code, int) else 0
        except BrokenPipeError:  # diffreward rewards | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        except Exception as err:
            if debug:
                traceback.print_exc()
            say(f"error: {_one_paragraph(err)}")
            return 2 if isinstance(err, UsageError | FileExistsError) else 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"diffreward {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(VERBS)}"
        raise UsageError(f"there is no verb {verb!r}; {hint}")
    return VERBS[verb](rest)


def _help() -> str:
    verbs = "\n".join(f"  {name:9} {(f.__doc__ or '').strip()}" for name, f in VERBS.items())
    return (
        "usage: diffreward VERB [--config FILE] [--option VALUE ...]\n\n"
        "More reward out of diffusion models.\n\n"
        f"verbs:\n{verbs}\n\n"
        "'diffreward VERB --help' lists a verb's options. Every verb runs without any, on models\n"
        "that come with the package. --debug shows the traceback of a failure; --version the\n"
        "version."
    )


@contextmanager
def refusals() -> Iterator[None]:
    """What is refused in here, before anything is computed, can be put right by the user."""
    try:
        yield
    except (ValueError, FileNotFoundError) as err:
        raise UsageError(_one_paragraph(err)) from err


class Arguments(argparse.ArgumentParser):
    """argparse, but an error is a `UsageError`."""

    def error(self, message: str):
        raise UsageError(f"{message}; see '{self.prog} --help'")


def say(message: str) -> None:
    """A line on stderr, where it does not mix with results."""
    print(f"diffreward: {message}", file=sys.stderr, flush=True)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    say(f"warning: {' '.join(str(message).split())}")


def _one_paragraph(err: BaseException) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    if isinstance(err, KeyError | AttributeError | AssertionError):  # a defect: name it as such
        text = f"{type(err).__name__}: {text} (--debug shows where)"
    if "out of memory" in text.lower():
        text += (
            " Lower --steer.max_batch (of finetune: --training.max_batch) or the decode_batch "
            "beside it, or use half precision."
        )
    return text

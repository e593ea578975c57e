"""Configurations: YAML files and dotted overrides on the command line become dataclasses.

The fields below, with their types, defaults and descriptions, *are* the options of the command
line, of the YAML files in ``configs/`` and of a run's ``config.yaml``: jsonargparse reads them.
Nothing else knows about YAML, and no value names code to import. This module imports no torch, so
that ``--help`` and ``--print_config`` are quick.
"""

from __future__ import annotations

import difflib
import json
import re
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

from diffreward._assets import asset_path
from diffreward.finetuning.options import Training


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message says what to do instead."""


# --------------------------------------------------------------------------------------------
# diffreward steer
# --------------------------------------------------------------------------------------------

# What the embedded model draws, more or less; the last two are emoji, the rest scenes.
PROMPTS = (
    "a red heart",
    "a green star",
    "three blue squares",
    "a yellow circle and a black triangle",
    "blue heart",
    "grinning face",
)


@dataclass(frozen=True)
class ModelConfig:
    """Model

    Args:
        spec: "embedded:emoji", a folder, or a hub id such as
            "stable-diffusion-v1-5/stable-diffusion-v1-5"; of sequences "embedded:dna",
            "embedded:protein", a PDB or mmCIF file, or "text:" and a hub id.
        num_steps: denoising steps; null: 25 of a pipeline, 64 of DNA and text, 50 of proteins.
        kernel: how a step is drawn: ddim or ddpm; flow_renoise or flow_sde for flow-matching
            models; null: the first that fits.
        eta: noise of ddim; 1 is as much as ancestral sampling, 0 cannot be steered.
        noise_level: noise of flow_sde.
        guidance_scale: classifier-free guidance, with diffusers' meaning; null: the pipeline's.
        negative_prompt: for classifier-free guidance.
        height: of the pictures, in pixels; null: the model's own.
        width: of the pictures, in pixels; null: the model's own.
        seconds: length of sounds; null: the model's own.
        dtype: of the networks; null: bfloat16 on CUDA, else float32.
        device: cpu, cuda, cuda:1, mps, ...; null: CUDA if there is one.
        lora: folder or hub id of a LoRA for it, such as the final/ of a finetuning run.
        controlnet: folder or hub id of a ControlNet, "embedded:" and its name, or new: one to be
            trained; the model then takes control images.
        adapter: the same with a T2I-Adapter.
        control_scale: what the ControlNet or adapter adds is multiplied by it.
        train: what finetuning trains: control, which is the ControlNet or adapter, or base.
        options: of models of sequences, in place of those above from kernel to seconds: length,
            structure, design, omit, temperature, schedule, relaxation, tau, ...
    """

    spec: str = "embedded:emoji"
    num_steps: int | None = None
    kernel: str | None = None
    eta: float = 1.0
    noise_level: float = 0.7
    guidance_scale: float | None = None
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    seconds: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    lora: str | None = None
    controlnet: str | None = None
    adapter: str | None = None
    control_scale: float = 1.0
    train: Literal["control", "base"] = "control"
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Of `load_policy`: what differs from the defaults, some of which not every model has."""
        default = ModelConfig()
        own = {name: v for name, v in vars(self).items() if v != getattr(default, name)}
        own.pop("spec", None)
        return own | own.pop("options", {})


@dataclass(frozen=True)
class SteeringConfig:
    """Steering

    Args:
        num_particles: K, particles per prompt.
        potential: difference, max, sum, running_max or none.
        lmbda: strength of the tilt exp(lmbda * reward), nats per unit of reward.
        resampling: systematic, stratified, multinomial, residual or ssp.
        ess_threshold: resample a prompt when its effective sample size is at most this fraction
            of K; 1.0 or null: at every scored step.
        schedule: which steps are scored: every n-th, a list of steps, or of fractions of the
            chain; null: at 20, 40, 60 and 80 %.
        tempering: how lmbda grows along the chain: constant, linear or adaptive.
        target_ess: of adaptive tempering, as a fraction of K.
        uncertainty: of rewards that know their std: terminal (steer by reward - kappa * std) or
            intermediate (uncertain predictions are selected less, the target is the same).
        kappa: of terminal.
        proposal: policy; gradient, which follows the gradient of a differentiable reward; or
            gradient_x0 (of tokens), the same with the network taken as constant.
        gradient_clip: largest norm of the gradient of lmbda * reward.
        num_x0_samples: score this many draws of the clean sample instead of its expectation.
        best_of_n: also draw K plain samples per prompt, for comparison at equal compute.
        max_batch: most particles in one network call; lower it when memory runs out.
        decode_batch: most pictures decoded at once; lower it when memory runs out.
    """

    num_particles: int = 4
    potential: str = "difference"
    lmbda: float = 10.0
    resampling: str = "systematic"
    ess_threshold: float | None = 0.5
    schedule: int | list[int] | list[float] | None = None
    tempering: str = "constant"
    target_ess: float = 0.5
    uncertainty: str | None = None
    kappa: float = 1.0
    proposal: str = "policy"
    gradient_clip: float | None = None
    num_x0_samples: int = 1
    best_of_n: bool = True
    max_batch: int | None = None
    decode_batch: int | None = None


@dataclass(frozen=True)
class SteerConfig:
    """Steer a model's samples towards a reward and compare them with plain sampling

    Args:
        model: the model.
        reward: what guides: a name from `diffreward rewards`, or {name: ..., option: ...}.
        judges: held-out rewards, which only report.
        prompts: a prompt, a list of them, or a file: .txt with one per line, .jsonl with a
            "prompt" per line; "embedded:prompts/scenes.jsonl" is one of the package's own.
        data: captioned pictures in place of prompts, for models with control images; as of
            finetune.
        steer: how it is steered.
        seed: every particle's noise follows from the seed, its prompt's place and its own.
        output: folder for the results, which must not exist; null: a new one under runs/.
    """

    model: ModelConfig = field(default_factory=lambda: ModelConfig(num_steps=25))
    reward: str | dict[str, Any] = "clip_score"
    judges: list[str | dict[str, Any]] = field(
        default_factory=lambda: ["clip_judge", "shapes_checker"]
    )
    prompts: str | list[str] = field(default_factory=lambda: list(PROMPTS))
    data: str | dict[str, Any] | None = None
    steer: SteeringConfig = field(default_factory=SteeringConfig)
    seed: int = 0
    output: str | None = None


# --------------------------------------------------------------------------------------------
# diffreward finetune
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneConfig:
    """Finetune a model towards a reward

    Args:
        model: the model.
        reward: what is learnt: a name from `diffreward rewards`, or {name: ..., option: ...}.
        algorithm: prdp, ddpo, grpo, dpok, reinforce, refl, draft, alignprop, drakes, raft, dpo,
            kto, dragon or ctrl_u; or {name: ..., preset: ..., option: ...}.
        prompts: a prompt, a list of them, or a file: .txt with one per line, .jsonl with a
            "prompt" per line; "embedded:prompts/scenes.jsonl" is one of the package's own.
        preferences: for dpo and kto: a data set of them (.jsonl, .parquet) to learn from in place
            of own samples, with its own prompts; {path: ..., modality: dna} if it has no images.
        data: captioned pictures in place of prompts, for ctrl_u and for models with control images:
            a manifest (.jsonl, .parquet), a folder with metadata.jsonl, or embedded:scenes; or
            {source: ..., control: what reads control images off the pictures, first: ..., count:
            ...}.
        judges: held-out rewards, which only report.
        eval_prompts: as prompts, for evaluations; null: the first of prompts.
        eval_data: as data, for evaluations; null: the first of data.
        training: the options of training.
        output: folder for the results, which must not exist; null: a new one under runs/.
        resume: latest, or a checkpoint's number or path: go on with the run in output.
        push_to_hub: repository (owner/name) that gets the trained weights and their card.
    """

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(num_steps=10, guidance_scale=1.0)
    )
    reward: str | dict[str, Any] = "clip_score"
    algorithm: str | dict[str, Any] = field(
        default_factory=lambda: {"name": "prdp", "beta": 0.05, "passes": 1}
    )
    prompts: str | list[str] = field(default_factory=lambda: list(PROMPTS))
    preferences: str | dict[str, str] | None = None
    data: str | dict[str, Any] | None = None
    judges: list[str | dict[str, Any]] = field(
        default_factory=lambda: ["clip_judge", "shapes_checker"]
    )
    eval_prompts: str | list[str] | None = None
    eval_data: str | dict[str, Any] | None = None
    training: Training = field(
        default_factory=lambda: Training(
            iterations=24,
            prompts_per_update=6,
            samples_per_prompt=16,
            learning_rate=3e-3,
            schedule="linear",
            evaluate_every=12,
            eval_samples=8,
            step_fraction=0.5,
        )
    )
    output: str | None = None
    resume: str | int | None = None
    push_to_hub: str | None = None


# --------------------------------------------------------------------------------------------
# diffreward score
# --------------------------------------------------------------------------------------------

SAMPLES = "embedded:samples/manifest.jsonl"


@dataclass(frozen=True)
class ScoreConfig:
    """Score files by any rewards, and go on where an interrupted run stopped

    Args:
        paths: folders, globs, images, .csv, .tsv, .jsonl or .parquet manifests, .tar shards,
            Hugging Face datasets on disk, .fasta and .txt files; "embedded:..." is one of the
            package's own.
        rewards: names from `diffreward rewards`, or {name: ..., option: ...}.
        out: .parquet, .jsonl or .csv file, which must not exist; null: scores.parquet (nothing
            for the embedded samples). The same command again finishes an interrupted run.
        prompts: one for all, or a list or file (.txt, .jsonl) with one for each input, in their
            order; null: those that come with the inputs.
        data_column: of manifests, with the image, text or sequence; null: the usual names.
        prompt_column: of manifests; null: prompt, caption or text.
        reference: exemplars for every reward that compares with exemplars and names none itself:
            a folder, a manifest, texts, or saved statistics (.safetensors).
        group_by: a column of the manifests, or folder, the one that each file is in: each of its
            values makes a set for the rewards of sets; null: all inputs are one.
        influence: add a column of what each row contributes to its set's value, for each reward of
            sets.
        batch_size: null: what fits into the memory of the GPU; 32 on a CPU.
        num_workers: processes that decode; null: by the number of cores; 0: none, and a file
            that kills its decoder kills the run.
        shard_rows: rows that are written, and lost by a kill, together.
        device: cpu, cuda, cuda:1, mps, ...; null: CUDA if there is one.
        engine: local, or ray: the Ray cluster of RAY_ADDRESS, or of this machine.
        num_actors: of Ray; null: one for each GPU, or CPU core if there is no GPU.
    """

    paths: str | list[str] = field(default_factory=lambda: [SAMPLES])
    rewards: list[str | dict[str, Any]] = field(
        default_factory=lambda: ["clip_score", "colorfulness"]
    )
    out: str | None = None
    prompts: str | list[str] | None = None
    data_column: str | None = None
    prompt_column: str | None = None
    reference: str | list[str] | None = None
    group_by: str | None = None
    influence: bool = False
    batch_size: int | None = None
    num_workers: int | None = None
    shard_rows: int = 256
    device: str | None = None
    engine: Literal["local", "ray"] = "local"
    num_actors: int | None = None


# --------------------------------------------------------------------------------------------
# diffreward serve
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServeConfig:
    """Serve rewards over HTTP

    Args:
        rewards: names from `diffreward rewards`, or {name: ..., option: value}.
        host: address to listen at; the default can be reached from this machine only.
        port: 0 is for any free one.
        token: what clients must send; "env:NAME" reads it from the environment; null: nothing.
        max_bytes: largest body of a request.
        max_queue: requests read, waiting or computed at a time; others are sent away.
        max_batch: most samples in a request.
        max_pixels: of an image file.
        device: cpu, cuda, cuda:1, mps, ...; null: CUDA if there is one.
    """

    rewards: list[str | dict[str, Any]] = field(default_factory=lambda: ["clip_score"])
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    max_bytes: int = 64 * 2**20
    max_queue: int = 16
    max_batch: int = 256
    max_pixels: int = 2**25
    device: str | None = None


# --------------------------------------------------------------------------------------------
# Reading and writing
# --------------------------------------------------------------------------------------------

Config = TypeVar("Config")


def parse(kind: type[Config], argv: Sequence[str], prog: str, examples: str = "") -> Config:
    """A configuration from the arguments of a command line.

    Args:
        kind: the dataclass.
        argv: ``--config FILE``, which may come more than once, and dotted overrides.
        prog: the command, for its help.
        examples: shown at the end of the help.

    Raises:
        UsageError: an unknown option (the nearest known one is named), a wrong type, or a file
            that cannot be read.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--option VALUE ...]",
        epilog=examples,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with these options")
    parser.add_class_arguments(kind)
    try:
        chosen = parser.parse_args(list(argv))
    except ArgumentError as err:
        known = list(parser.get_defaults().keys())
        raise UsageError(_explain(str(err), known, prog)) from err
    built = parser.instantiate(chosen)
    return kind(**{option.name: built[option.name] for option in fields(kind)})


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the lines of the examples left as they are."""


_UNKNOWN = [
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"[Uu]nrecognized arguments: (?P<key>--?[^\s=]+)"),
]
_NOT_A_GROUP = re.compile(r"Parser key \"(?P<group>\w+)\":\s+Unable to load config '(?P<value>.*)'")


def _explain(message: str, known: list[str], prog: str) -> str:
    """jsonargparse's message in one paragraph; for an unknown option, with the nearest known."""
    for pattern in _UNKNOWN:
        if found := pattern.search(message):
            key = found["key"].lstrip("-")
            if "group" in found.groupdict():
                key = f"{found['group']}.{key}"
            near = nearest_option(key, known)
            hint = f"did you mean {near!r}?" if near else f"'{prog} --help' lists them all"
            return f"there is no option {key!r}; {hint}"
    if found := re.search(r"[Uu]nrecognized arguments: (.+)", message):
        return f"{found[1]!r} belongs to no option; options are written --name VALUE"
    if found := _NOT_A_GROUP.search(message):
        options = [key for key in known if key.startswith(found["group"] + ".")]
        return (
            f"{found['group']!r} is a group of options and cannot be {found['value']!r}; "
            f"set one of {', '.join(options)}"
        )
    return re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))


def nearest_option(key: str, known: Sequence[str]) -> str | None:
    """The known dotted option closest to ``key``, by its whole name or else by its last part."""
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return near[0]
    last = {name.split(".")[-1]: name for name in known}
    near = difflib.get_close_matches(key.split(".")[-1], last, n=1)
    return last[near[0]] if near else None


def lists_of_words(argv: Sequence[str], positional: str, *many: str) -> list[str]:
    """``a b --rewards x y`` as ``--paths [a, b] --rewards [x, y]``, which `parse` reads.

    Args:
        argv: a command line.
        positional: the option which words belong to that follow no option.
        many: options that take all the words that follow them; the others take one.
    """
    found: dict[str, list[str]] = {}
    rest, taker, takes_next = [], positional, False
    for word in argv:
        if word.startswith("-"):
            name = word.lstrip("-")
            taker = name if name in many else positional
            takes_next = name not in many and "=" not in word and name not in _SWITCHES
            if name in many:
                found.setdefault(name, [])
            else:
                rest.append(word)
        elif takes_next:
            rest.append(word)
            takes_next = False
        else:
            found.setdefault(taker, []).append(word)
    for name, words in found.items():
        rest.append(f"--{name}")
        if len(words) == 1 and words[0].startswith("[") and words[0].endswith("]"):
            rest += words
        elif words:
            rest.append(json.dumps(words if name == positional else [_value(w) for w in words]))
    return rest


_SWITCHES = ("h", "help", "print_config")  # options without a value


def _value(word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError as err:
        raise UsageError(f"{word!r} is no YAML: {' '.join(str(err).split())}") from err


def to_yaml(config: Any) -> str:
    """The configuration as YAML which ``--config`` reads back to the same."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=88)


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts themselves, from what a configuration may say instead.

    Args:
        prompts: a list (returned as it is), one prompt, or the path of a ``.txt`` or ``.jsonl``
            file, which may start with ``embedded:``.

    Raises:
        UsageError: no prompts, a missing file, or a line without a prompt.
    """
    if not isinstance(prompts, str):
        found, where = list(prompts), "the list of prompts"
    elif not prompts.endswith((".txt", ".jsonl")):
        found, where = [prompts], ""
    else:
        found, where = _read_prompt_file(prompts), prompts
    if not found:
        raise UsageError(f"{where} is empty; give at least one prompt")
    return found


def _read_prompt_file(name: str) -> list[str]:
    try:
        embedded = name.startswith("embedded:")
        path = asset_path(name.removeprefix("embedded:")) if embedded else Path(name)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise UsageError(f"cannot read the prompts in {name}: {reason}") from err
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if name.endswith(".txt"):
            found.append(line.strip())
            continue
        try:
            found.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as err:
            raise UsageError(
                f'{name}, line {number}: expected an object like {{"prompt": "..."}}'
            ) from err
    return found

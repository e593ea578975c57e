import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest

from diffreward.algorithms import make_algorithm
from diffreward.config import (
    FinetuneConfig,
    ModelConfig,
    SteerConfig,
    SteeringConfig,
    UsageError,
    nearest_option,
    parse,
    read_prompts,
    to_yaml,
)
from diffreward.controlled import read_controlled
from diffreward.finetuning import Guard, LoRA, Training
from diffreward.finetuning.batches import Batches
from diffreward.rewards.base import find_reward

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
STEER_CONFIGS = [file for file in CONFIGS if file.parent.name == "steer"]
FINETUNE_CONFIGS = [file for file in CONFIGS if file.parent.name == "finetune"]


# whose numbers were measured where they run
MEASURED = (
    "embedded", "drakes_protein", "drakes_dna", "dragon_frechet", "dragon_vendi", "ctrlu_edges",
    "ctrlu_segmentation",
)  # fmt: skip


def steer_config(*argv: str) -> SteerConfig:
    return parse(SteerConfig, argv, "diffreward steer")


def finetune_config(*argv: str) -> FinetuneConfig:
    return parse(FinetuneConfig, argv, "diffreward finetune")


def test_no_arguments_give_the_defaults():
    assert steer_config() == SteerConfig()
    assert finetune_config() == FinetuneConfig()


def test_yaml_reads_back_the_same(tmp_path):
    changed = SteerConfig(
        model=ModelConfig(spec="./here", guidance_scale=2.5, height=64),
        reward={"name": "target_color", "color": [1.0, 0.5, 0.0]},
        judges=["colorfulness", {"name": "clip_score", "model": "local-dir:x"}],
        prompts=["yes", "3", "a: b", "null", "", "café ☕", '"quoted"'],
        # null where the default is not: it must not come back as the default
        steer=SteeringConfig(ess_threshold=None, schedule=[0.25, 0.5], best_of_n=False),
        seed=7,
        output="somewhere",
    )
    for config in (SteerConfig(), changed):
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        assert steer_config("--config", str(file)) == config


def test_yaml_of_finetuning_reads_back_the_same(tmp_path):
    changed = FinetuneConfig(
        algorithm={"name": "prdp", "beta": 1e-11, "standardize": False},
        prompts=["yes", "null", "a: b"],
        judges=[],
        eval_prompts=["one"],
        training=Training(
            # a number without a point, and null where the default is not
            learning_rate=1e-5, betas=(0.5, 0.9), lora=LoRA(4, 8.0, ["to_q", "to_out.0"]),
            ema_decay=0.9, max_batch=3, loggers=[], guard=Guard(max_kl=5.0, stop=True),
        ),
        resume=30,
    )  # fmt: skip
    for config in (FinetuneConfig(), changed):
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        assert finetune_config("--config", str(file)) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.iteration", "3"], "did you mean 'training.iterations'"),
        (["--learning_rate", "1"], "did you mean 'training.learning_rate'"),
        (["--training.lora.rnak", "3"], "did you mean 'training.lora.rank'"),
        (["--rank", "3"], "did you mean 'training.lora.rank'"),
        (["--max_kl", "3"], "did you mean 'training.guard.max_kl'"),
        (["--training.method", "lara"], "lora"),
        (["--training.loggers", "[tensorbord]"], "tensorboard"),
        (["--training", "fast"], "set one of training.iterations"),
        (["--training.learning_rate", "high"], "Expected a float"),
    ],
)
def test_wrong_arguments_of_finetuning_are_refused(argv, message):
    with pytest.raises(UsageError) as err:
        finetune_config(*argv)
    assert message in str(err.value)
    assert "\n" not in str(err.value)


def test_every_option_of_training_has_words():
    for kind in (FinetuneConfig, Training, LoRA, Guard):
        for option in fields(kind):
            assert f"\n        {option.name}: " in kind.__doc__


def test_print_config_reads_back_the_same(tmp_path, capsys):
    argv = ["--steer.ess_threshold", "null", "--reward.name", "target_color", "--seed", "3"]
    with pytest.raises(SystemExit) as exit:
        steer_config(*argv, "--print_config")
    assert exit.value.code in (0, None)
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert steer_config("--config", str(file)) == steer_config(*argv)


def test_later_options_override_earlier_ones(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(f"seed: {seed}\nmodel: {{num_steps: {seed}0}}\n")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    found = steer_config("--config", a, "--config", b, "--model.num_steps", "5")
    assert (found.seed, found.model.num_steps) == (2, 5)


@pytest.mark.parametrize("schedule", ["7", "[3, 5]", "[0.25, 0.5]", "null"])
def test_schedule_keeps_its_type(schedule):
    found = steer_config("--steer.schedule", schedule).steer.schedule
    assert repr(found) == {"null": "None"}.get(schedule, schedule)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steer.num_particle", "3"], "did you mean 'steer.num_particles'"),
        (["--steer.num_particle=3"], "did you mean 'steer.num_particles'"),
        (["--num_particles", "3"], "did you mean 'steer.num_particles'"),
        (["--promts", "a"], "did you mean 'prompts'"),
        (["--model.dtipe", "float16"], "did you mean 'model.dtype'"),
        (["--model.dtype", "float61"], "bfloat16"),
        (["--zzz", "3"], "--help"),
        (["a red heart"], "'a red heart' belongs to no option"),
        (["--model", "embedded:emoji"], "set one of model.spec"),
        (["--steer.num_particles", "many"], "Expected a int. Got value: many"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--seed"], "expected one argument"),
    ],
)
def test_wrong_arguments_are_refused(argv, message):
    with pytest.raises(UsageError) as err:
        steer_config(*argv)
    assert message in str(err.value)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promts: a", "did you mean 'prompts'"),
        ("steer: {lamda: 3}", "did you mean 'steer.lmbda'"),
        ("num_steps: 3", "did you mean 'model.num_steps'"),
        ("steer: [", "config"),
        ("seed: one", "Expected a int"),
    ],
)
def test_wrong_files_are_refused(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as err:
        steer_config("--config", str(file))
    assert message in str(err.value)


def test_nearest_option_prefers_the_whole_name():
    known = ["model.spec", "steer.seed", "seed"]
    assert nearest_option("sead", known) == "seed"
    assert nearest_option("modl.spec", known) == "model.spec"
    assert nearest_option("spek", known) == "model.spec"
    assert nearest_option("xyzzy", known) is None


def test_steering_options_are_those_of_steer():
    """Of the same names and defaults, except that the comparison is on."""
    from diffreward.steering import steer

    given = {"policy", "reward", "prompts", "inputs", "seed", "progress"}
    signature = inspect.signature(steer).parameters
    theirs = {name: p.default for name, p in signature.items() if name not in given}
    ours = vars(SteeringConfig())
    assert ours == {**theirs, "best_of_n": True}


def test_model_options_are_those_of_load_pipeline():
    from diffreward.policies import load_pipeline

    signature = inspect.signature(load_pipeline).parameters
    theirs = {name: p.default for name, p in signature.items() if name != "spec"}
    own = {"spec": "embedded:emoji", "num_steps": None, "options": {}}  # steps by the model
    assert vars(ModelConfig()) == {**theirs, **own}
    assert SteerConfig().model.num_steps == theirs["num_steps"]


# -- prompts ------------------------------------------------------------------------------------


def test_prompts_from_anywhere(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a\n\n  café \n", encoding="utf-8")
    lines.write_text(json.dumps({"prompt": "a", "category": "x"}) + '\n\n{"prompt": "b"}\n')
    assert read_prompts(["a", ""]) == ["a", ""]
    assert read_prompts("one prompt") == ["one prompt"]
    assert read_prompts(str(text)) == ["a", "café"]
    assert read_prompts(str(lines)) == ["a", "b"]
    assert len(read_prompts("embedded:prompts/scenes.jsonl")) >= 100


def test_bad_prompts_are_refused(tmp_path):
    empty, broken = tmp_path / "p.txt", tmp_path / "p.jsonl"
    empty.write_text("\n")
    broken.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    for prompts, message in [
        ([], "empty"),
        (str(empty), "empty"),
        (str(broken), "line 2"),
        (str(tmp_path / "missing.txt"), "missing.txt"),
        ("embedded:nothing.txt", "no embedded asset"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_prompts(prompts)


# -- the files in configs/ ----------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_file_opens_with_command_hardware_and_expectation(file):
    text = file.read_text(encoding="utf-8")
    command = f"# diffreward {file.parent.name} --config configs/{file.parent.name}/{file.name}"
    assert text.splitlines()[0] == command
    assert "# Hardware: " in text and "# Expected: " in text


@pytest.mark.parametrize("file", STEER_CONFIGS, ids=lambda file: file.stem)
def test_config_file_is_read(file):
    config = steer_config("--config", str(file))
    assert read_prompts(config.prompts)
    assert parse(SteerConfig, ["--config", str(file)], "diffreward steer") == config


@pytest.mark.parametrize("kind", [SteerConfig, FinetuneConfig])
def test_embedded_config_is_the_default(kind):
    verb = "steer" if kind is SteerConfig else "finetune"
    (file,) = [f for f in CONFIGS if (f.parent.name, f.name) == (verb, "embedded.yaml")]
    assert parse(kind, ["--config", str(file)], f"diffreward {verb}") == kind()
    assert file.read_text(encoding="utf-8").endswith(to_yaml(kind()))


@pytest.mark.parametrize("file", FINETUNE_CONFIGS, ids=lambda file: file.stem)
def test_config_of_finetuning_fits_together(file):
    """Whatever can be checked without the weights; tests/test_cli_finetune.py runs them all."""
    config = finetune_config("--config", str(file))
    prompts, algorithm = read_prompts(config.prompts), make_algorithm(config.algorithm)
    training = config.training
    if config.data is not None:
        source = {"source": config.data} if isinstance(config.data, str) else config.data
        prompts = read_controlled(**source).prompts
    assert algorithm.family != "pathwise" or not algorithm.needs_data or config.data is not None
    Batches(
        training.prompts_per_update, training.samples_per_prompt, algorithm.minibatches,
        1, training.max_batch, len(prompts),
    )  # fmt: skip
    assert config.eval_prompts is None or set(read_prompts(config.eval_prompts)) <= set(prompts)
    for n, spec in enumerate([config.reward, *config.judges]):
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        entry = find_reward(options.pop("name"))
        inspect.signature(entry.factory).bind(**options)
        if n == 0 and algorithm.family == "pathwise":
            assert entry.info.differentiable
    if file.stem not in MEASURED:
        head = file.read_text(encoding="utf-8").split("\nmodel:")[0]
        assert "not measured" in head.split("# Hardware: ")[1].split("# Expected: ")[0]
        assert "# Expected: not measured." in head


def test_prompt_sets_are_what_their_card_says():
    animals = read_prompts("embedded:prompts/animals.txt")
    paintings = read_prompts("embedded:prompts/animal_paintings.txt")
    assert len(set(animals)) == 45
    assert paintings == [f"A painting of a{'n' * (a[0] in 'aeiou')} {a}" for a in animals]

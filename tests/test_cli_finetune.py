"""`diffreward finetune` through `main`, on tiny pipelines that are loaded from a folder."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import diffreward
from diffreward import policies
from diffreward.cli import main
from diffreward.config import FinetuneConfig, parse, read_prompts
from diffreward.finetuning import Training
from diffreward.networks.dna import DNAConvNet
from diffreward.policies import load_policy
from diffreward.policies.dna import DNAPolicy
from diffreward.policy import rollout, sample_generators
from diffreward.rewards import evaluate, make_reward
from diffreward.samples import Samples

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
OF_SEQUENCES = [file for file in CONFIGS if file.stem in ("drakes_dna", "drakes_protein")]
PROMPTS = ["a red heart", "a blue star"]
# what makes a run quick; a learning rate at which two updates can be seen
SMALL = {
    "training.iterations": 2, "training.prompts_per_update": 2, "training.samples_per_prompt": 2,
    "training.learning_rate": 0.01, "training.eval_samples": 1, "training.evaluate_every": 0,
    "training.checkpoint_every": 0, "training.loggers": "[]", "training.lora.rank": 4,
    "model.num_steps": 3, "model.guidance_scale": 2, "reward": "saturation",
    "judges": "[colorfulness]", "prompts": "[a red heart, a blue star]", "algorithm": "prdp",
    "training.schedule": "constant", "training.step_fraction": 1.0,
}  # fmt: skip
OFTEN = {"training.evaluate_every": 1, "training.checkpoint_every": 1}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """The folder of a finished run; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {"output": folder, "training.loggers": "[tensorboard]", "training.lora.alpha": 8}
    assert finetune(model, **OFTEN, **options) == 0
    return folder


@pytest.fixture
def untouchable(monkeypatch):
    """`load_policy` fails: whoever refuses before has no need of it."""

    def load(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(policies, "load_policy", load)


def arguments(model: Path, *argv: str, **options) -> list[str]:
    """Of `diffreward finetune`; an option of None is left out."""
    chosen = {"model.spec": model, **SMALL, **options}
    words = [word for name, v in chosen.items() if v is not None for word in (f"--{name}", str(v))]
    return [*words, *argv]


def finetune(model: Path, *argv: str, **options) -> int:
    return main(["finetune", *arguments(model, *argv, **options)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "final" / "pytorch_lora_weights.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pictures(policy) -> torch.Tensor:
    generators = sample_generators(5, len(PROMPTS), 1)
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        return policy.decode(rollout(policy, condition, generators).final, condition).data


# -- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_everything(run):
    names = {p.name for p in run.iterdir()}
    assert names == {
        "config.yaml", "env.json", "metrics.jsonl", "samples", "checkpoints", "final",
        "before_after.png", "curves.png", "README.md", "tensorboard",
    }  # fmt: skip
    environment = json.loads((run / "env.json").read_text())
    assert environment["seed"] == 0 and environment["diffreward"] == diffreward.__version__
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    for name in ("before_after.png", "curves.png", "samples/iteration-000002.png"):
        with Image.open(run / name) as image:
            assert image.width > 100
    assert not list(run.rglob(".unfinished*")) and not list(run.rglob("*.pt"))


def test_metrics_are_of_every_iteration_and_evaluation(run):
    rows = lines(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "reward" in row] == [1, 2]
    evaluations = [row for row in rows if "evaluation" in row]
    assert [row["iteration"] for row in evaluations] == [0, 1, 2]
    assert set(evaluations[0]["evaluation"]["scores"]) == {"saturation", "colorfulness"}
    assert evaluations[0]["evaluation"]["kl"] == 0 < evaluations[2]["evaluation"]["kl"]
    last = next(row for row in rows if row.get("reward") is not None and row["iteration"] == 2)
    assert last["updates"] == 4 and last["learning_rate"] == 0.01
    # of 4 samples, 3 steps, with and without prompt: rollout, reference, and the matrix of PRDP's
    # second pass; backward what the clip leaves of it
    whole = 4 * 3 * 2
    assert last["forward_rows"] == 3 * whole and whole <= last["backward_rows"] <= 2 * whole


def test_scores_of_an_evaluation_are_those_of_its_pictures(run):
    rows = lines(run / "samples" / "iteration-000002.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    with safe_open(run / "samples" / "latest.safetensors", "pt") as file:
        images = file.get_tensor("samples").float() / 255
    for name in ("saturation", "colorfulness"):
        expected = evaluate(make_reward(name), Samples(images, "image", PROMPTS)).value
        scores = torch.tensor([row["scores"][name] for row in rows])
        torch.testing.assert_close(scores, expected, rtol=0.02, atol=0.01)


def test_final_lora_reads_back_with_its_alpha(run, model):
    """Into the policy, into another pipeline, and as what the last evaluation showed."""
    untrained = load_policy(str(model), num_steps=3, guidance_scale=2.0)
    trained = load_policy(str(model), num_steps=3, guidance_scale=2.0, lora=run / "final")
    expected = pictures(trained)
    assert (expected - pictures(untrained)).abs().max() > 0.01
    pipe = copy.deepcopy(untrained.pipe)
    pipe.load_lora_weights(run / "final")
    again = load_policy(pipe, num_steps=3, guidance_scale=2.0)
    torch.testing.assert_close(pictures(again), expected, rtol=0, atol=1e-4)
    with safe_open(run / "samples" / "latest.safetensors", "pt") as file:
        shown = file.get_tensor("samples").float() / 255
    condition = trained.encode(PROMPTS)
    generators = sample_generators(0, 2, 1, stream=2**32 - 1)  # of evaluations
    with torch.no_grad():
        found = trained.decode(rollout(trained, condition, generators).final, condition).data
    torch.testing.assert_close(found, shown, rtol=0, atol=0.005)


def test_card_says_what_happened(run, model):
    card = (run / "README.md").read_text()
    for text in (
        "finetuned with PRDP", "for 2 iterations on 2 prompts", "| saturation (trained)",
        "| colorfulness (held out)", "KL to the pretrained model", "before_after.png",
        f"from_pretrained('{model}')", 'load_lora_weights("final")', "`learning_rate` ",
    ):  # fmt: skip
        assert text in card, text


def test_config_of_a_run_repeats_it(model):
    Path("prompts.txt").write_text(
        "a red heart\n\n   \na blue star\n"
    )  # blank lines are no prompts
    options = {"prompts": "prompts.txt", "training.seed": 3, "training.iterations": 1}
    assert finetune(model, output="one", **options) == 0
    Path("prompts.txt").unlink()  # the prompts are in the configuration
    saved = yaml.safe_load(Path("one/config.yaml").read_text())
    assert saved["prompts"] == PROMPTS and saved["output"] is None
    assert main(["finetune", "--config", "one/config.yaml", "--output", "two"]) == 0
    one, two = weights(Path("one")), weights(Path("two"))
    assert one and all(torch.equal(two[name], w) for name, w in one.items())
    assert Path("one/config.yaml").read_bytes() == Path("two/config.yaml").read_bytes()


def test_command_line_agrees_with_the_library(run, model):
    policy = load_policy(str(model), num_steps=3, guidance_scale=2.0)
    result = diffreward.finetune(
        policy, "saturation", "prdp", PROMPTS, judges=["colorfulness"], progress=False,
        training=Training(
            iterations=2, prompts_per_update=2, samples_per_prompt=2, learning_rate=0.01,
            eval_samples=1, evaluate_every=1, loggers=[], lora=diffreward.LoRA(4, 8.0),
        ),
    )  # fmt: skip
    rows = [row for row in lines(run / "metrics.jsonl") if "reward" in row]
    assert [row["loss"] for row in rows] == [row["loss"] for row in result.metrics]
    trained = load_policy(str(model), num_steps=3, guidance_scale=2.0, lora=run / "final")
    torch.testing.assert_close(pictures(policy), pictures(trained), rtol=0, atol=1e-4)


def test_summary_and_warnings_are_shown(model, capsys):
    judges = "[shapes_checker, saturation, {name: target_color}, {name: target_color, color: blue}]"
    options = {"prompts": "[a cat, a red star]", "training.iterations": 1}
    assert finetune(model, judges=judges, **options) == 0
    (folder,) = Path("runs").iterdir()
    out, err = capsys.readouterr()
    assert "saturation (trained)" in out and "target_color (held out)" in out
    assert "target_color 2 (held out)" in out and "saturation 2" not in out
    assert "saturation is trained on, so it is left out of the judges" in err
    (shapes,) = [line for line in out.splitlines() if line.startswith("| shapes_checker")]
    assert shapes.split("|")[-2].strip() == "1"  # of the two prompts it can judge one
    assert str(folder) in out
    assert "2 prompts x 2 samples = 4 per update" in err
    assert "on-policy log-probabilities agree within" in err


def test_judges_that_can_judge_nothing(model, capsys):
    options = {"prompts": "[a cat, a dog]", "training.iterations": 1}
    assert finetune(model, judges="[shapes_checker]", output="run", **options) == 0
    assert "cannot be judged" in capsys.readouterr().out
    assert "cannot be judged" in Path("run/README.md").read_text()


def test_rewards_that_do_not_vary_are_warned_about(model, capsys):
    constant = "{clip_range: {reward: saturation, low: 2.0, high: 3.0}}"
    options = {"training.iterations": 1, "algorithm": "reinforce", "reward": constant}
    assert finetune(model, output="run", **options) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert all(line.startswith("diffreward: warning") for line in warned)
    text = " ".join(warned)
    assert "all 4 samples of the first rollout have the reward 2" in text
    assert "for 100% of the prompts all samples got the same reward" in text
    assert "for 100% of the prompts" in Path("run/README.md").read_text()


def test_guard_stops_a_run(model, capsys):
    options = {"training.guard.max_kl": 1e-9, "training.guard.stop": "true", **OFTEN}
    assert finetune(model, output="run", **{"training.iterations": 5, **options}) == 0
    rows = lines(Path("run/metrics.jsonl"))
    assert max(row["iteration"] for row in rows) == 2  # two evaluations in a row
    assert "the KL to the pretrained model is" in capsys.readouterr().err
    assert "The guard stopped the run" in Path("run/README.md").read_text()


@pytest.mark.parametrize("spec", ["raft", "{name: draft, steps: 2}"])
def test_other_families(spec, model):
    assert finetune(model, output="run", algorithm=spec, **{"training.iterations": 1}) == 0
    moved = [w for name, w in weights(Path("run")).items() if "lora_B" in name]  # born zero
    assert moved and any(w.any() for w in moved)


def pairs(size: int = 12) -> Path:
    """A data set of preferences: bright pictures are chosen, dark ones rejected."""
    rows = []
    for n in range(3):
        for kind, grey in (("chosen", 230), ("rejected", 40)):
            Image.new("RGB", (size, size), (grey, 60 * n, grey)).save(f"{n}-{kind}.png")
        files = {kind: f"{n}-{kind}.png" for kind in ("chosen", "rejected")}
        rows.append({"prompt": f"picture {n}", **files})
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path("pairs.jsonl")


def test_preferences_take_the_place_of_own_samples(model):
    options = {"algorithm": "dpo", "preferences": pairs(), "output": "run"}
    assert finetune(model, **options) == 0
    rows = [row for row in lines(Path("run/metrics.jsonl")) if "implicit_accuracy" in row]
    assert len(rows) == 2 and rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["preferences"] == "pairs.jsonl" and saved["prompts"] == PROMPTS
    again = ["--config", "run/config.yaml", "--output", "again"]
    assert main(["finetune", *again]) == 0
    assert all(torch.equal(w, weights(Path("run"))[n]) for n, w in weights(Path("again")).items())


def test_preferences_that_do_not_fit_are_refused_before_a_model_is_loaded(
    untouchable, model, capsys
):
    file = pairs()
    before = sorted(Path.cwd().iterdir())
    assert finetune(model, algorithm="prdp", preferences=file) == 2
    assert "PRDP learns from own samples" in capsys.readouterr().err
    assert finetune(model, algorithm="dpo", preferences="none.jsonl") == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert sorted(Path.cwd().iterdir()) == before


def test_all_weights(model):
    options = {"training.method": "full", "training.iterations": 1, "training.learning_rate": 1e-3}
    assert finetune(model, output="run", **options) == 0
    trained = load_policy("run/final", num_steps=3, guidance_scale=2.0)
    untrained = load_policy(str(model), num_steps=3, guidance_scale=2.0)
    assert not torch.equal(pictures(trained), pictures(untrained))
    assert 'from_pretrained("final")' in Path("run/README.md").read_text()


# -- a finished run is used ----------------------------------------------------------------------


def test_steering_takes_the_lora_of_a_run(run, model):
    argv = ["--model.spec", str(model), "--model.num_steps", "3", "--model.guidance_scale", "2"]
    argv += ["--reward", "saturation", "--judges", "[]", "--steer.num_particles", "2"]
    argv += ["--prompts", "[a red heart]"]
    assert main(["steer", *argv, "--output", "plain"]) == 0
    assert main(["steer", *argv, "--model.lora", str(run / "final"), "--output", "lora"]) == 0
    policy = load_policy(str(model), num_steps=3, guidance_scale=2.0, lora=run / "final")
    expected = diffreward.steer(policy, "saturation", ["a red heart"], num_particles=2)
    found = {name: lines(Path(name, "scores.jsonl")) for name in ("plain", "lora")}
    scores = {
        name: [row["score"] for row in rows if row["arm"] == "steered"]
        for name, rows in found.items()
    }
    assert scores["lora"] == expected.scores.value.tolist() != scores["plain"]


def test_finetuning_goes_on_from_the_lora_of_a_run(run, model):
    options = {"model.lora": run / "final", "training.iterations": 1}
    assert finetune(model, output="more", **options) == 0
    rows = lines(Path("more/metrics.jsonl"))
    first, last = rows[0]["evaluation"], lines(run / "metrics.jsonl")[-1]["evaluation"]
    assert first["kl"] == 0  # the pretrained model is the one with the first LoRA
    assert first["scores"]["saturation"]["mean"] == pytest.approx(
        last["scores"]["saturation"]["mean"], abs=1e-4
    )


# -- stopping and going on -----------------------------------------------------------------------


def test_resumed_runs_end_with_the_same_weights(run, model, capsys):
    alpha = {"training.lora.alpha": 8, **OFTEN}
    assert finetune(model, output="run", **{"training.iterations": 1, **alpha}) == 0
    for which in ("latest", "1"):  # the second time from before what is there already
        assert finetune(model, "--resume", which, output="run", **alpha) == 0
        assert "resumed from checkpoint-1" in capsys.readouterr().err
        one, two = weights(run), weights(Path("run"))
        assert one.keys() == two.keys()
        assert all(torch.equal(two[name], w) for name, w in one.items())
        times = ("seconds", "samples_per_second")
        whole, resumed = (
            [{k: v for k, v in row.items() if k not in times} for row in lines(f / "metrics.jsonl")]
            for f in (run, Path("run"))
        )
        assert whole == resumed


def test_sigterm_saves_and_exits_cleanly(model, capsys):
    """What a scheduler sends before it kills."""
    folder = Path("run")

    def send():
        for _ in range(6000):
            if list(folder.glob("checkpoints/checkpoint-*")):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.01)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert finetune(model, output=folder, **{"training.iterations": 500, **OFTEN}) == 0
    sender.join()
    assert "--output run --resume latest" in capsys.readouterr().err
    done = lines(folder / "metrics.jsonl")[-1]["iteration"]
    assert 1 <= done < 500 and (folder / f"checkpoints/checkpoint-{done}").is_dir()
    assert not (folder / "final").exists()
    more = {"training.iterations": done + 1}
    assert finetune(model, "--resume", str(done), output=folder, **more) == 0
    assert (folder / "final").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training.learning_rate": 0.5}, "training.learning_rate: 0.01 in the checkpoint, 0.5"),
        ({"algorithm": "ddpo"}, "algorithm.name: 'PRDP' in the checkpoint, 'DDPO' now"),
        ({"reward": "contrast"}, "'saturation' in the checkpoint, 'contrast' now"),
        ({"model.guidance_scale": 3}, "guidance_scale: 2.0 in the checkpoint, 3.0 now"),
        ({"prompts": "[a cat, a dog]"}, "prompts: "),
        ({"training.lora.rank": 8}, "training.lora.rank: 4 in the checkpoint, 8 now"),
        ({"training.eval_samples": 2}, "training.eval_samples: 1 in the checkpoint, 2 now"),
    ],
)
def test_checkpoint_of_another_run_is_refused_and_kept(options, message, run, model, capsys):
    before = snapshot(run)
    changed = {"training.lora.alpha": 8, "output": run, **options}
    assert finetune(model, "--resume", "latest", **changed) == 2
    assert message in capsys.readouterr().err
    assert snapshot(run) == before


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training.iteration": 3}, "did you mean 'training.iterations'"),
        ({"training.lora.ranks": 3}, "did you mean 'training.lora.rank'"),
        ({"algorithm": "prpd"}, "did you mean 'prdp'"),
        ({"algorithm": "{name: prdp, bta: 1}"}, "did you mean 'beta'"),
        ({"algorithm": "{name: prdp, preset: paper_smal}"}, "did you mean 'paper_small'"),
        ({"algorithm": "{name: prdp, beta: 0.0}"}, "PRDP needs beta above 0"),
        ({"algorithm": "draft", "reward": "jpeg_compressibility"}, "DRaFT needs a differentiable"),
        ({"reward": "saturaton"}, "did you mean: saturation"),
        ({"judges": "[colourfulness]"}, "colorfulness"),
        ({"prompts": "[]"}, "give at least one prompt"),
        ({"prompts": "missing.txt"}, "missing.txt"),
        ({"eval_prompts": "missing.txt"}, "missing.txt"),
        ({"eval_prompts": "[]"}, "give at least one prompt"),
        ({"resume": "latest"}, "--resume needs --output"),
        ({"config": "missing.yaml"}, "missing.yaml"),
        ({"training.loggers": "[tensorbord]"}, "tensorboard"),
        ({"training.iterations": 0}, "iterations must be at least 1"),
        ({"training.learning_rate": -1}, "learning_rate must be positive"),
        ({"training.prompts_per_update": 3}, "set prompts_per_update to at most 2"),
        ({"training.max_batch": 0}, "max_batch must be at least 1"),
        ({"training.decode_batch": 0}, "decode_batch must be at least 1"),
        ({"training.ema_decay": 1}, "ema_decay lies in [0, 1)"),
        ({"training.seed": -1}, "seed must be at least 0"),
        ({"training.checkpoint_every": -1}, "checkpoint_every must be at least 0"),
        ({"push_to_hub": "some/one"}, "HF_HUB_OFFLINE"),
        ({"output": "never", "resume": "latest"}, "start without --resume"),
    ],
)
def test_refused_before_a_model_is_loaded(options, message, untouchable, model, capsys):
    assert finetune(model, **options) == 2
    out, err = capsys.readouterr()
    assert message in err and not out
    assert err.count("\n") == 1 and err.startswith("diffreward: error: ")
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training.lora.rank": 0}, "lora.rank must be at least 1"),
        ({"training.lora.targets": "[to_qq]"}, "did you mean to_q"),
        ({"training.lora.targets": "nothing.*"}, "matches the whole name of no layer"),
        ({"model.eta": 0}, "this policy is deterministic"),
    ],
)
def test_refused_before_anything_is_computed(options, message, model, capsys):
    assert finetune(model, **options) == 2
    out, err = capsys.readouterr()
    assert message in err and not out
    assert err.splitlines()[-1].startswith("diffreward: error: ")
    assert not list(Path.cwd().iterdir())


def test_existing_folder_is_refused_and_kept(untouchable, model, capsys):
    Path("mine").mkdir()
    Path("mine/notes").write_text("keep")
    assert finetune(model, output="mine") == 2
    assert "never overwritten" in capsys.readouterr().err
    assert [p.name for p in Path("mine").iterdir()] == ["notes"]


def test_no_such_checkpoint(run, untouchable, model, capsys):
    before = snapshot(run)
    assert finetune(model, "--resume", "77", output=run) == 2
    assert "there are checkpoint-1, checkpoint-2" in capsys.readouterr().err
    assert snapshot(run) == before


def test_missing_model(capsys, model):
    assert finetune(Path("./no-such-model")) == 2
    assert "no-such-model" in capsys.readouterr().err
    assert finetune(model, **{"model.lora": "no-such-lora"}) == 2
    assert "no-such-lora" in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_failure_while_computing_keeps_what_is_written(model, monkeypatch, capsys):
    from diffreward.policies.pipelines import StableDiffusionPolicy

    decode, calls = StableDiffusionPolicy.decode, []

    def fail(self, *args):
        calls.append(1)
        if len(calls) > 2:  # after the evaluation before training and the first rollout
            raise RuntimeError("a\n b")
        return decode(self, *args)

    monkeypatch.setattr(StableDiffusionPolicy, "decode", fail)
    assert finetune(model, output="run") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "diffreward: error: a b"
    assert Path("run/config.yaml").exists()
    monkeypatch.setattr(StableDiffusionPolicy, "decode", decode)
    assert finetune(model, output="run") == 2  # it exists


def test_full_disk_while_saving_damages_nothing(model, monkeypatch, capsys):
    from diffreward.finetuning import checkpoint

    save, calls = checkpoint.save_file, []

    def full(tensors, file):
        calls.append(file)
        if "checkpoint-2" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert finetune(model, output="run", **OFTEN) == 1
    assert "Make room" in capsys.readouterr().err
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["checkpoint-1"]
    monkeypatch.setattr(checkpoint, "save_file", save)
    assert finetune(model, "--resume", "latest", output="run", **OFTEN) == 0


def test_out_of_memory_says_what_to_do(model, monkeypatch, capsys):
    from diffreward.policies.pipelines import StableDiffusionPolicy

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(StableDiffusionPolicy, "step_law", fail)
    assert finetune(model) == 1
    assert "--training.max_batch" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["--print_config"]])
def test_help_loads_nothing_heavy(argv):
    code = (
        "import sys; from diffreward.cli import main; code = main(sys.argv[1:]); "
        "print('loaded:', *sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "finetune", *argv], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split("loaded:")[1].split())
    assert not {"torch", "diffusers", "transformers", "accelerate"} & loaded
    assert "--training.lora.rank" in done.stdout or "rank: 16" in done.stdout


# -- configurations ------------------------------------------------------------------------------


FAMILIES = {
    "v1-": tiny.sd,
    "embedded": tiny.sd,
    "xl": tiny.sdxl,
    "-3.5-": tiny.sd3,
    "FLUX": tiny.flux,
}


OF_CONTROL = [file for file in CONFIGS if file.stem.startswith("ctrlu")]
OF_IMAGES = [file for file in CONFIGS if file not in (*OF_SEQUENCES, *OF_CONTROL)]


@pytest.mark.parametrize("file", OF_CONTROL, ids=lambda file: file.stem)
def test_every_config_with_control_images_runs(file):
    """As configured, on the embedded models, but for the numbers; the card's words load it."""
    argv = ["--config", str(file), "--output", "run", "--model.num_steps", "2"]
    argv += ["--data.count", "4", "--eval_data.count", "2"]
    small = {"iterations": 1, "prompts_per_update": 2, "eval_samples": 1, "loggers": "[]"}
    for name, value in small.items():
        argv += [f"--training.{name}", str(value)]
    assert main(["finetune", *argv]) == 0
    (row,) = [row for row in lines(Path("run/metrics.jsonl")) if "diffusion_loss" in row]
    assert row["pixel_weight"] <= 1 and row["backward_rows"] == 2
    judged = lines(Path("run/samples/iteration-000001.jsonl"))
    assert len(judged) == 2 and Path("run/before_after.png").exists()
    code = Path("run/README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code.replace("'final'", "'run/final'"), found)
    trained = found["policy"].denoiser.state_dict()
    before = load_policy("embedded:emoji", controlnet="embedded:controlnet").denoiser.state_dict()
    assert any(not torch.equal(before[name], w) for name, w in trained.items())


@pytest.mark.parametrize("file", OF_IMAGES, ids=lambda file: file.stem)
def test_every_config_runs_on_a_tiny_model_of_its_family(file, monkeypatch, capsys):
    """Everything as configured but the weights, sizes and numbers; in the precision of a GPU."""
    config = parse(FinetuneConfig, ["--config", str(file)], "diffreward finetune")
    load = load_policy

    def load_tiny(spec, **options):
        (build,) = [build for part, build in FAMILIES.items() if part in spec]
        options |= {"num_steps": 3, "height": 16, "width": 16, "device": "cpu"}
        if spec != "embedded:emoji" and options.get("dtype") is None:
            options["dtype"] = "bfloat16"  # what it is on CUDA
        return load(copy.deepcopy(build()), **options)

    monkeypatch.setattr(policies, "load_policy", load_tiny)
    argv = ["--config", str(file), "--output", "run", "--reward", "saturation"]
    argv += ["--judges", "[colorfulness]", "--eval_prompts", "[a cat]"]
    small = {"iterations": 1, "prompts_per_update": 2, "eval_samples": 1, "max_batch": 2}
    small["samples_per_prompt"] = min(config.training.samples_per_prompt, 2)
    small |= {"decode_batch": 2, "loggers": "[]"}
    for name, value in small.items():
        argv += [f"--training.{name}", str(value)]
    assert main(["finetune", *argv]) == 0
    assert "degrees of freedom" not in capsys.readouterr().err  # of the only sample
    rows = lines(Path("run/metrics.jsonl"))
    assert [row["iteration"] for row in rows if "evaluation" in row] == [0, 1]
    evaluated = lines(Path("run/samples/iteration-000001.jsonl"))
    assert [row["prompt"] for row in evaluated] == ["a cat"] and list(Path("run/final").iterdir())
    assert yaml.safe_load(Path("run/config.yaml").read_text())["prompts"] == read_prompts(
        config.prompts
    )


@pytest.mark.parametrize("file", OF_SEQUENCES, ids=lambda file: file.stem)
def test_every_config_of_sequences_runs(file, monkeypatch):
    """Proteins as configured but for the size; DNA by a tiny network and plain rewards."""
    SeqIO = pytest.importorskip("Bio.SeqIO")
    argv = ["--config", str(file), "--output", "run", "--model.num_steps", "9"]
    small = {"iterations": 1, "samples_per_prompt": 2, "eval_samples": 2, "evaluate_every": 0}
    for name, value in {**small, "checkpoint_every": 0, "loggers": "[]"}.items():
        argv += [f"--training.{name}", str(value)]
    load, length = load_policy, 76
    if file.stem == "drakes_dna":
        network, length = DNAConvNet(channels=8, dilations=(1, 2), rounds=1), 20

        def load(spec, num_steps, **options):
            assert (spec, options.pop("length")) == ("embedded:dna", 200)
            assert options.pop("guidance_scale") == 1  # none
            return DNAPolicy(copy.deepcopy(network), length, num_steps=num_steps, **options)

        monkeypatch.setattr(policies, "load_policy", load)
        argv += ["--reward", "gc_content", "--judges", "[homopolymer]"]
    assert main(["finetune", *argv]) == 0
    rows = lines(Path("run/samples/iteration-000001.jsonl"))
    written = list(SeqIO.parse("run/before_after.fasta", "fasta"))
    assert [str(r.seq) for r in written[2:]] == [row["sequence"] for row in rows]
    assert {len(r) for r in written} == {length} and len(written) == 4
    with Image.open("run/logos.png") as image:
        assert image.width > 1000
    # the card's own words load the trained network
    card = Path("run/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "diffusers" not in card and "load_model(policy.denoiser" in code
    if file.stem == "drakes_protein":
        monkeypatch.chdir("run")
        found: dict = {}
        exec(code, found)
        untrained = load_policy("embedded:protein").denoiser.state_dict()
        weights = found["policy"].denoiser.state_dict()
        assert any(not torch.equal(untrained[name], w) for name, w in weights.items())


# -- processes -----------------------------------------------------------------------------------


def test_two_processes_share_a_run(run, model):
    """`accelerate launch -m diffreward finetune`, as the documentation has it."""
    # what it does with several GPUs; with several CPU processes it wants MPI
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    launch += [str(28000 + os.getpid() % 1000), "-m", "diffreward"]
    argv = arguments(model, output="two", **{"training.lora.alpha": 8, "model.device": "cpu"})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, "finetune", *argv], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saturation (trained)") == 1  # the main process alone speaks
    assert "2 on each of 2 processes" in done.stderr
    one, two = weights(run), weights(Path("two"))
    for name, w in one.items():
        torch.testing.assert_close(two[name], w, rtol=0.02, atol=1e-4)

"""Every verb through `main`, and through a process of its own where that matters."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from painter import Painter
from PIL import Image

import diffreward
from diffreward import policies, report
from diffreward.cli import VERBS, main
from diffreward.config import ScoreConfig, SteerConfig, lists_of_words, parse
from diffreward.controlled import read_controlled
from diffreward.doctor import Finding
from diffreward.rewards import available_rewards, evaluate, make_reward
from diffreward.samples import Samples, to_tokens

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs" / "steer").glob("*.yaml"))
OF_IMAGES = [file for file in CONFIGS if file.stem != "fk_protein"]  # which has its own test
UBIQUITIN = str(ROOT / "assets" / "structures" / "1ubi.pdb")
# what makes a run quick, and independent of the embedded models
QUICK = ["--reward.name", "target_color", "--judges", "[colorfulness]", "--model.num_steps", "5"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def painter(monkeypatch):
    """`load_policy` loads a `Painter`; the list of what it was asked for."""
    asked = []

    def load(spec, num_steps, **options):
        asked.append({"spec": spec, "num_steps": num_steps, **options})
        return Painter(num_steps)

    monkeypatch.setattr(policies, "load_policy", load)
    return asked


def python(*argv: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in conftest.py
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, env=environment, **options
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- steer --------------------------------------------------------------------------------------


def test_steer_writes_a_run_folder(painter, capsys):
    assert main(["steer", *QUICK, "--seed", "4"]) == 0
    (folder,) = Path("runs").iterdir()
    for name in ("grid.png", "lineage.png"):
        with Image.open(folder / name) as image:
            assert image.width > 300
    count, k = len(SteerConfig().prompts), SteerConfig().steer.num_particles
    assert len(list((folder / "images").iterdir())) == count
    assert len(lines(folder / "scores.jsonl")) == 2 * count * k
    environment = json.loads((folder / "env.json").read_text())
    assert environment["seed"] == 4 and environment["diffreward"] == diffreward.__version__
    assert "best-of-4" in (folder / "README.md").read_text()
    shown = capsys.readouterr().out
    assert "target_color (guide)" in shown and "colorfulness (held out)" in shown
    assert str(folder / "grid.png") in shown
    assert painter == [{"spec": SteerConfig().model.spec, "num_steps": 5}]


def test_steer_agrees_with_the_library(painter):
    assert main(["steer", *QUICK, "--output", "run", "--prompts", "[a, b]"]) == 0
    result = diffreward.steer(
        Painter(5), "target_color", ["a", "b"], num_particles=4, best_of_n=True
    )
    rows = lines(Path("run/scores.jsonl"))
    for arm, found in (("steered", result), ("plain", result.best_of_n)):
        scores = [row["score"] for row in rows if row["arm"] == arm]
        assert scores == found.scores.value.tolist()


def test_config_of_a_run_repeats_it(painter):
    Path("prompts.txt").write_text("a red heart\nanother\n")
    argv = ["--prompts", "prompts.txt", "--steer.lmbda", "30", "--steer.ess_threshold", "null"]
    assert main(["steer", *QUICK, *argv, "--output", "one"]) == 0
    Path("prompts.txt").unlink()  # the prompts are in the configuration
    assert main(["steer", "--config", "one/config.yaml", "--output", "two"]) == 0
    for name in ("scores.jsonl", "images/001-another.png"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_steer_without_comparison(painter, capsys):
    assert main(["steer", *QUICK, "--steer.best_of_n", "false", "--prompts", "one"]) == 0
    assert "best-of" not in capsys.readouterr().out


def test_judges_that_do_not_apply_are_left_out(painter, capsys):
    judges = ["--judges", "[shapes_checker, {name: target_color}, {name: colorfulness}]"]
    assert main(["steer", *QUICK, *judges, "--prompts", "[a cat, a red star]"]) == 0
    assert "shapes_checker (held out, 1 of 2 prompts)" in capsys.readouterr().out
    assert main(["steer", *QUICK, *judges, "--prompts", "a cat"]) == 0
    out, err = capsys.readouterr()
    assert "shapes_checker cannot judge these prompts" in err and "shapes_checker" not in out
    assert "target_color guides, so it is no judge" in err


def test_judges_of_one_name_are_told_apart(painter, capsys):
    judges = "[{name: target_color, color: blue}, {name: target_color, color: green}]"
    assert main(["steer", *QUICK, "--judges", judges]) == 0
    out = capsys.readouterr().out
    assert "target_color 2 (held out)" in out and "target_color 3 (held out)" in out


# -- control images ------------------------------------------------------------------------------

CONTROLNET = ["--model.controlnet", "embedded:controlnet", "--model.num_steps", "2"]
SCENES = "{source: embedded:scenes, control: edges, first: 3, count: 2}"
OF_EDGES = ["--reward", "control_edges", "--judges", "[control_ssim]", "--data", SCENES]


def test_steer_takes_control_images(capsys, monkeypatch):
    argv = [*CONTROLNET, *OF_EDGES, "--steer.num_particles", "2"]
    grid, shown = report.image_grid, []
    monkeypatch.setattr(report, "image_grid", lambda *given: shown.append(given) or grid(*given))
    assert main(["steer", *argv, "--output", "one"]) == 0
    assert "control_ssim (held out)" in capsys.readouterr().out
    policy = diffreward.load_policy("embedded:emoji", controlnet="embedded:controlnet", num_steps=2)
    data = read_controlled("embedded:scenes", "edges", first=3, count=2)
    scenes = data.load([0, 1])
    found = diffreward.steer(
        policy, "control_edges", scenes.prompts, inputs=scenes.context, num_particles=2,
        best_of_n=True,
    )  # fmt: skip
    rows = lines(Path("one/scores.jsonl"))
    assert [row["prompt"] for row in rows[::2]] == 2 * scenes.prompts
    scores = [row["score"] for row in rows if row["arm"] == "steered"]
    assert scores == found.scores.value.tolist()
    columns, drawn = shown[0]
    assert columns == ["control", "unsteered", "best-of-2", "steered"]
    for p, (prompt, cells) in enumerate(drawn):
        assert prompt == scenes.prompts[p] and len(cells) == 4
        assert torch.equal(cells[0].image, scenes.context["control"][p])
    assert main(["steer", "--config", "one/config.yaml", "--output", "two"]) == 0
    assert Path("one/scores.jsonl").read_bytes() == Path("two/scores.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*CONTROLNET, *QUICK[:4]], "the command line: data"),
        (OF_EDGES, "for a control image, load it with controlnet"),
        ([*OF_EDGES[:2], "--data.source", "missing.jsonl"], "there is no file missing.jsonl"),
        (
            [*OF_EDGES[:2], "--data", "{source: embedded:scenes, colour: red}"],
            "there is source, control",
        ),
        ([*OF_EDGES, "--model.spec", UBIQUITIN], "captioned pictures"),
    ],
)
def test_control_images_that_do_not_fit_the_model_are_refused(argv, message, capsys):
    assert main(["steer", *argv, "--output", "run"]) == 2
    out, err = capsys.readouterr()
    assert message in err and not out and not Path("run").exists()


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steer.num_particle", "3"], "did you mean 'steer.num_particles'"),
        (["--reward", "target_colour"], "did you mean: target_color"),
        (["--reward.name", "target_color", "--reward.colour", "red"], "did you mean 'color'"),
        (["--judges", "[colourfulness]"], "colorfulness"),
        (["--steer.potential", "differences"], "did you mean 'difference'"),
        (["--steer.resampling", "systematik"], "did you mean 'systematic'"),
        (["--steer.tempering", "lineer"], "did you mean 'linear'"),
        (["--steer.proposal", "gradients"], "did you mean 'gradient'"),
        (["--steer.num_particles", "0"], "num_particles must be at least 1"),
        (["--steer.num_x0_samples", "0"], "num_x0_samples must be at least 1"),
        (["--steer.max_batch", "0"], "max_batch must be at least 1"),
        (["--steer.uncertainty", "terminl"], "did you mean 'terminal'"),
        (
            ["--steer.uncertainty", "intermediate", "--steer.num_x0_samples", "2"],
            "one clean prediction",
        ),
        (["--steer.lmbda", ".nan"], "lmbda must be finite"),
        (["--steer.lmbda", ".inf"], "lmbda must be finite"),
        (["--steer.schedule", "[7]"], "0..4"),
        (["--steer.ess_threshold", "1.5"], "[0, 1]"),
        (["--prompts", "[]"], "give at least one prompt"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_refused_before_a_model_is_loaded(argv, message, painter, capsys):
    assert main(["steer", *QUICK, *argv]) == 2
    out, err = capsys.readouterr()
    assert message in err and not out
    assert err.count("\n") == 1 and err.startswith("diffreward: error: ")
    assert not painter and not list(Path.cwd().iterdir())


def test_existing_folder_is_refused_and_kept(painter, capsys):
    Path("mine").mkdir()
    Path("mine/notes").write_text("keep")
    assert main(["steer", *QUICK, "--output", "mine"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert [p.name for p in Path("mine").iterdir()] == ["notes"] and not painter


def test_failure_while_computing_is_one_paragraph(painter, monkeypatch, capsys):
    monkeypatch.setattr(Painter, "decode", lambda *_: (_ for _ in ()).throw(RuntimeError("a\n b")))
    assert main(["steer", *QUICK]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "diffreward: error: a b"
    assert not list(Path.cwd().iterdir())
    assert main(["steer", *QUICK, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_failure_while_writing_keeps_what_is_written(painter, monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report, "image_grid", fail)
    assert main(["steer", *QUICK, "--output", "run"]) == 1
    assert "disk full" in capsys.readouterr().err
    assert {p.name for p in Path("run").iterdir()} >= {"scores.jsonl", "config.yaml", "images"}


def test_out_of_memory_says_what_to_do(painter, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Painter, "step_law", fail)
    assert main(["steer", *QUICK]) == 1
    assert "--steer.max_batch" in capsys.readouterr().err


def test_interruption(painter, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Painter, "step_law", interrupt)
    assert main(["steer", *QUICK]) == 130
    assert capsys.readouterr().err.endswith("diffreward: interrupted\n")
    assert not list(Path.cwd().iterdir())


def test_warnings_are_one_line(painter, capsys):
    assert main(["steer", *QUICK, "--steer.lmbda", "1000", "--prompts", "one"]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warning.startswith("diffreward: warning: all 4 particles descend from one root")


# -- real models --------------------------------------------------------------------------------


def test_missing_local_folder(capsys):
    assert main(["steer", *QUICK, "--model.spec", "./no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_hub_id_without_network(capsys):
    assert main(["steer", *QUICK, "--model.spec", "nobody/no-such-model"]) in (1, 2)
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("diffreward: error: ") and "nobody/no-such-model" in err
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("file", OF_IMAGES, ids=lambda file: file.stem)
def test_every_config_runs_with_the_embedded_models_in_place_of_its_own(file, capsys):
    config = parse(SteerConfig, ["--config", str(file)], "diffreward steer")
    argv = ["--config", str(file), "--model.num_steps", "3", "--output", "run"]
    if config.model.spec != "embedded:emoji":
        own = "[clip_judge, shapes_checker]"
        argv += ["--model.spec", "embedded:emoji", "--reward", "clip_score", "--judges", own]
        argv += ["--model.kernel", "null", "--model.height", "null", "--model.width", "null"]
    argv += ["--prompts", "[a red heart, smiling face]", "--steer.schedule", "[1]"]
    assert main(["steer", *argv]) == 0
    assert "clip_judge (held out)" in capsys.readouterr().out
    assert len(lines(Path("run/scores.jsonl"))) == 2 * 2 * config.steer.num_particles


@pytest.mark.parametrize("file", [file for file in CONFIGS if "protein" in file.stem], ids=str)
def test_every_config_of_proteins_runs(file, capsys):
    """As it is, but for its size and with a judge of pictures, who is left out."""
    SeqIO = pytest.importorskip("Bio.SeqIO")
    judges = "[clip_judge, {name: mpnn_likelihood, weights: s_48_020}]"
    argv = ["--config", str(file), "--model.num_steps", "3", "--output", "run", "--judges", judges]
    argv += ["--prompts", "[one]", "--steer.num_particles", "2", "--steer.schedule", "[1]"]
    assert main(["steer", *argv]) == 0
    out, err = capsys.readouterr()
    assert "clip_judge cannot judge these prompts and is left out: it scores image" in err
    assert "mpnn_likelihood (held out)" in out and "see run/logo.png" in out
    rows = lines(Path("run/scores.jsonl"))
    written = list(SeqIO.parse("run/samples.fasta", "fasta"))
    assert len(rows) == 4 and [r.id.split("-")[0] for r in written] == ["steered"] + ["plain"] * 2
    assert {len(row["sequence"]) for row in rows} == {76}
    # what is written is what was judged
    judge = make_reward({"name": "mpnn_likelihood", "weights": "s_48_020", "structure": UBIQUITIN})
    tokens = torch.stack([to_tokens(row["sequence"], "protein") for row in rows])
    found = evaluate(judge, Samples(tokens, "protein")).value
    told = torch.tensor([row["held_out"]["mpnn_likelihood"] for row in rows])
    torch.testing.assert_close(found, told, rtol=0, atol=1e-4)
    for name in ("logo.png", "rewards.png", "lineage.png"):
        with Image.open(f"run/{name}") as image:
            assert image.width > 300


def test_long_prompt_is_warned_about(caplog):
    from diffusers.utils import logging  # its handler writes to stderr; records are easier to see

    argv = ["--model.num_steps", "1", "--steer.schedule", "[]", "--judges", "[]"]
    argv += ["--prompts", "a red heart " * 60, "--steer.num_particles", "1"]
    logging.enable_propagation()
    try:
        assert main(["steer", *argv]) == 0
    finally:
        logging.disable_propagation()
    assert "truncated" in caplog.text


def test_a_process_of_its_own():
    argv = ["--model.num_steps", "2", "--steer.num_particles", "2", "--prompts", "a red heart"]
    done = python("-m", "diffreward", "steer", *argv, "--output", "run", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "clip_score (guide)" in done.stdout and Path("run/grid.png").exists()
    done = python("-m", "diffreward", "steer", *argv, "--output", "run")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("diffreward: error: run exists")


# -- rewards ------------------------------------------------------------------------------------


def test_rewards_lists_the_registry(capsys):
    assert main(["rewards"]) == 0
    shown = capsys.readouterr().out
    for name in available_rewards():
        assert f"\n{name} " in shown
    assert main(["rewards", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == list(available_rewards())


def test_rewards_shows_one(capsys):
    assert main(["rewards", "Target-Color"]) == 0
    shown = capsys.readouterr().out
    assert "color='red', background=None" in shown and "gradient:  yes" in shown
    assert main(["rewards", "jpeg_compressibility", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"] == {"quality": 95} and found["range"] == ["-inf", 0.0]


def test_rewards_refuses_unknown_names(capsys):
    assert main(["rewards", "clip_scor"]) == 2
    assert "did you mean: clip_score" in capsys.readouterr().err
    assert main(["rewards", "--jsn"]) == 2
    assert "diffreward rewards --help" in capsys.readouterr().err


# -- doctor -------------------------------------------------------------------------------------


def test_doctor_finds_nothing_broken(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is broken" in shown and "embedded emoji" in shown and "cpu" in shown
    assert main(["doctor", "--json"]) == 0
    assert {finding["state"] for finding in json.loads(capsys.readouterr().out)} <= {"ok", "note"}


def test_doctor_says_what_is_broken(monkeypatch, capsys):
    def missing(name):
        raise FileNotFoundError(name)

    monkeypatch.setattr("diffreward.doctor.asset_path", missing)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "broken  embedded emoji: missing" in shown and "-> reinstall" in shown


def test_doctor_compares_versions_with_the_requirements(monkeypatch):
    from diffreward import doctor

    requires = ["torch>=999", "no-such-package>=1", "numpy>=1", "ruff>=999; extra == 'test'"]
    about = {"Requires-Python": ">=3.10"}
    about = type("About", (dict,), {"get_all": lambda self, name: ["test"]})(about)
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: about)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires)
    found = {finding.what: finding for finding in doctor.python_and_packages()}
    assert found["torch"].state == "broken" and ">=999 is needed" in found["torch"].found
    assert found["no-such-package"].found == "not installed"
    assert found["numpy"] == Finding("ok", "numpy", found["numpy"].found)
    assert (
        found["extra [test]"].state == "note" and "diffreward[test]" in found["extra [test]"].advice
    )


# -- the program --------------------------------------------------------------------------------


def test_help_lists_every_verb(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb} " in shown for verb in VERBS)
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert f"diffreward {verb}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffreward {diffreward.__version__}\n"


def test_unknown_verb(capsys):
    assert main(["ster"]) == 2
    assert "did you mean 'steer'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "heavy"),
    [
        (["--help"], {"torch", "diffusers", "transformers", "matplotlib"}),
        (["steer", "--help"], {"torch", "diffusers", "transformers", "matplotlib"}),
        (["steer", "--print_config"], {"torch", "diffusers", "transformers", "matplotlib"}),
        (["score", "--help"], {"torch", "diffusers", "transformers", "pyarrow"}),
        (["rewards"], {"diffusers", "transformers", "open_clip"}),
    ],
)
def test_quick_verbs_import_nothing_heavy(argv, heavy):
    code = (
        "import sys; from diffreward.cli import main; code = main(sys.argv[1:]); "
        "print('loaded:', *sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = python("-c", code, *argv, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not heavy & set(done.stderr.split("loaded:")[1].split())


def test_closed_pipe_is_no_failure():
    command = f"{sys.executable} -m diffreward rewards | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("name") and done.stderr == ""


# -- score --------------------------------------------------------------------------------------


@pytest.fixture
def images():
    for n, color in enumerate(["red", "green", "blue"]):
        Path("f").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), color).save(f"f/{n}.png")
    Path("f/bad.png").touch()


def test_score_without_arguments_scores_the_embedded_samples(capsys):
    assert main(["score"]) == 0
    shown = capsys.readouterr().out
    assert ["clip_score", "12", "0"] in [line.split()[:3] for line in shown.splitlines()]
    assert not list(Path.cwd().iterdir())


def test_score_writes_rows_and_shows_a_summary(images, capsys):
    argv = [
        "f",
        "f/0.png",
        "--rewards",
        "colorfulness",
        "{name: jpeg_compressibility, quality: 50}",
    ]
    assert main(["score", *argv, "--out", "o.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert "jpeg_compressibility" in out and "5 rows, 1 of them with an error" in out
    assert "see o.jsonl" in out and "f/bad.png: the file is empty" in err
    rows = lines(Path("o.jsonl"))
    assert [row["id"] for row in rows] == ["f/0.png", "f/1.png", "f/2.png", "f/bad.png", "f/0.png"]
    assert main(["score", *argv, "--out", "o.jsonl"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert main(["score", "--rewards", "colorfulness", "--batch_size", "2", "f"]) == 0
    assert Path("scores.parquet").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rewards", "colorfulness", "f"], "write paths before --rewards"),
        (["f", "--rewards", "colourfulnes"], "did you mean: colorfulness"),
        (["f", "--rewards", "{name: target_color, colour: red}"], "did you mean 'color'"),
        (["f", "--rewards", "{name: "], "is no YAML"),
        (["f", "--reward", "colorfulness"], "did you mean 'rewards'"),
        (["f"], "reward 'clip_score' compares samples with their prompts, but f has none"),
        (["gone"], "gone does not exist"),
        (["f", "--rewards", "colorfulness", "--out", "o.xlsx"], "the output is .parquet"),
        (["f", "--rewards", "colorfulness", "--prompts", "gone.txt"], "gone.txt"),
        (["f", "--rewards", "colorfulness", "--prompts", "[a, b]"], "2 prompts came for 4 inputs"),
    ],
)
def test_score_refuses_before_anything_is_computed(argv, message, images, capsys):
    assert main(["score", *argv]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert [path.name for path in Path.cwd().iterdir()] == ["f"]


def test_score_reads_its_configs():
    for file in (ROOT / "configs" / "score").glob("*.yaml"):
        config = parse(ScoreConfig, ["--config", str(file)], "diffreward score")
        assert config.rewards and config.paths
    samples = ROOT / "configs" / "score" / "samples.yaml"
    assert main(["score", "--config", str(samples)]) == 0


def test_score_options_are_those_of_the_library():
    theirs = inspect.signature(diffreward.score).parameters
    ours = vars(ScoreConfig())
    assert set(ours) == set(theirs) - {"inputs", "progress"} | {"paths"}
    for name in set(ours) - {"paths", "rewards"}:
        assert ours[name] == theirs[name].default


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("a b --rewards x y --out o", '--out o --paths ["a", "b"] --rewards ["x", "y"]'),
        ("--out o a", '--out o --paths ["a"]'),
        ("--out=o a", '--out=o --paths ["a"]'),
        ("--rewards [x,y] --seed 3", "--seed 3 --rewards [x,y]"),
        ("--rewards", "--rewards"),
        ("--help a", '--help --paths ["a"]'),
    ],
)
def test_words_become_lists(argv, expected):
    assert " ".join(lists_of_words(argv.split(), "paths", "rewards")) == expected

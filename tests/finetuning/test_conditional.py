"""Runs that learn from captioned pictures: a tiny ControlNet through the whole engine."""

import copy
import json
import math

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

from diffreward import policies
from diffreward.algorithms import make_algorithm
from diffreward.algorithms.ctrl_u import CtrlU
from diffreward.cli import main
from diffreward.controlled import read_controlled
from diffreward.finetuning import Training, engine, figures, finetune
from diffreward.finetuning.card import Card, loading_code
from diffreward.finetuning.checks import check_data, check_image_gradient, check_run
from diffreward.finetuning.engine import Engine
from diffreward.finetuning.monitor import Evaluation
from diffreward.policies import load_policy
from diffreward.rewards import RewardInfo, as_reward, make_reward
from diffreward.samples import Samples

SIZE, ROWS = 16, 6
SMALL = dict(
    prompts_per_update=2, samples_per_prompt=2, iterations=2, learning_rate=1e-3, loggers=[],
    evaluate_every=0, eval_samples=2, method="full", weight_decay=0.0,
)  # fmt: skip
CTRL_U = {"name": "ctrl_u", "max_time": 0.7, "interval": 0.05, "weight": 5.0}
REWARD = {"name": "control_luma", "cells": 4}
TIMES = {"seconds", "samples_per_second"}


def conditional(**options):
    """A policy with networks of its own: the builders of `tiny` share theirs."""
    pipe = tiny.controlnet()
    for name, part in list(pipe.components.items()):
        if isinstance(part, nn.Module):
            pipe.register_modules(**{name: copy.deepcopy(part)})
    size = {"height": SIZE, "width": SIZE}
    return load_policy(pipe, num_steps=2, guidance_scale=2.0, **size, **options)


def plain():
    pipe = copy.deepcopy(tiny.sd())
    pipe.set_progress_bar_config(disable=True)
    return load_policy(pipe, num_steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = []
    for k in range(ROWS):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{k}.png")  # twice the model's size
        rows.append({"image": f"{k}.png", "text": f"picture {k}"})
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def data(manifest):
    return read_controlled(manifest, {"luma": 4})


@pytest.fixture
def untouchable(monkeypatch):
    """`load_policy` fails: whoever refuses before has no need of it."""

    def load(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(policies, "load_policy", load)


def made(data, algorithm=CTRL_U, policy=None, **options):
    more = {name: options.pop(name) for name in ("eval_data", "eval_prompts") if name in options}
    return Engine(
        policy or conditional(), make_reward(REWARD), make_algorithm(algorithm), data.prompts,
        Training(**{**SMALL, **options}), data=data, progress=False, **more,
    )  # fmt: skip


def train(data, algorithm=CTRL_U, policy=None, reward=REWARD, **options):
    policy = policy or conditional()
    options = {**SMALL, "data": data, "progress": False, **options}
    return policy, finetune(policy, reward, algorithm, **options)


def weights(policy):
    return {
        f"{name}.{key}": value.detach().clone()
        for name, part in policy.pipe.components.items()
        if isinstance(part, nn.Module)
        for key, value in part.state_dict().items()
    }


# -- what is conditioned on ----------------------------------------------------------------------


def test_conditions_are_those_of_the_rows(data):
    e = made(data)
    sized = data.resized(SIZE, SIZE)
    found = e.conditions.take([4, 0, 4])
    assert found.prompts == ["picture 4", "picture 0", "picture 4"]
    own = sized.load([4, 0, 4])
    assert torch.equal(found.tensors["control"], own.context["control"])
    expected = e.policy.encode(own.prompts, control=own.context["control"])
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_each_row_is_conditioned_on_the_picture_that_it_learns_from(data, monkeypatch):
    e, seen, loss = made(data, max_batch=3), [], CtrlU.loss

    def spy(self, policy, condition, generator, score, *, x0, reward):
        seen.extend(zip(condition.prompts, x0, strict=True))
        return loss(self, policy, condition, generator, score, x0=x0, reward=reward)

    monkeypatch.setattr(CtrlU, "loss", spy)
    e._pathwise([])
    prompts = [prompt for prompt, _ in seen]
    assert len(seen) == 4 and prompts[0] == prompts[1] != prompts[2] == prompts[3]
    sized = data.resized(SIZE, SIZE)
    with torch.no_grad():
        every = e.policy.encode_samples(sized.load(range(ROWS)))
    assert torch.pdist(every.flatten(1)).min() > 0.1
    for prompt, x0 in seen:
        torch.testing.assert_close(x0, every[int(prompt.split()[1])])
        assert not x0.requires_grad


def test_evaluations_have_the_first_rows_or_those_of_other_data(data):
    e = made(data)
    assert e.evaluator.prompts == ["picture 0", "picture 1"]
    control = data.resized(SIZE, SIZE).load([0, 1]).context["control"]
    assert torch.equal(e.evaluator.condition.tensors["control"], control)
    e = made(data, eval_data=data.take([5, 3, 1]), max_batch=2)
    assert e.evaluator.prompts == ["picture 5", "picture 3", "picture 1"]
    control = data.resized(SIZE, SIZE).load([5, 3, 1]).context["control"]
    assert torch.equal(e.evaluator.condition.tensors["control"], control)


def test_control_images_are_kept_and_shown(data, tmp_path, monkeypatch):
    found = made(data, eval_data=data.take([5, 3])).evaluator(0)
    control = data.resized(SIZE, SIZE).load([5, 3]).context["control"]
    assert torch.equal(found.samples.context["control"], control.repeat_interleave(2, 0))
    found.save(tmp_path / "e.safetensors")
    again = Evaluation.load(tmp_path / "e.safetensors")
    assert torch.equal(again.samples.context["control"], found.samples.context["control"])
    shown = []
    sheet = Image.new("RGB", (1, 1))
    monkeypatch.setattr(figures, "image_grid", lambda *given: shown.append(given) or sheet)
    figures.before_after(found, again)
    figures.sample_grid(again)
    for columns, rows in shown:
        assert columns[0] == "condition" and len(columns) > 2
        assert [prompt for prompt, _ in rows] == ["picture 5", "picture 3"]
        for (_, cells), image in zip(rows, control, strict=True):
            assert torch.equal(cells[0].image, image) and cells[0].caption == ()
            assert len(cells) == len(columns) and cells[1].caption
    shown.clear()
    del again.samples.context["control"]
    figures.before_after(again, again)
    (columns, _), = shown  # fmt: skip
    assert columns[0] == "before, sample 1"


# -- Ctrl-U --------------------------------------------------------------------------------------


def test_the_trained_part_changes_and_nothing_else(data, tmp_path):
    policy = conditional()
    before = weights(policy)
    _, found = train(data, policy=policy, output=tmp_path / "run")
    after = weights(policy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("controlnet.") for name in changed)
    assert len(changed) > 0.9 * sum(name.startswith("controlnet.") for name in before)
    assert found.iterations == 2 and [row["updates"] for row in found.metrics] == [1, 2]
    for row in found.metrics:
        assert all(math.isfinite(row[name]) for name in ("loss", "reward", "grad_norm"))
        assert 0 < row["diffusion_loss"] < row["loss"]
        assert 0 <= row["rewarded"] <= 1 and row["uncertainty"] > 0
        assert 0 < row["pixel_weight"] < 1 and 0 < row["pixel_weight_ess"] <= 1
        assert row["reward"] < 0
    assert found.after.samples.context["control"].shape == (4, 3, SIZE, SIZE)
    with Image.open(tmp_path / "run" / "before_after.png") as picture:
        assert picture.width > 100
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "data.jsonl" in settings and "digest" in settings


def test_pieces_do_not_change_the_result(data):
    start, found, rows = weights(conditional()), [], []
    for max_batch in (None, 3):
        policy, result = train(data, max_batch=max_batch)
        found.append(weights(policy))
        rows.append(result.metrics)
    for other, metrics in zip(found[1:], rows[1:], strict=True):
        for name in start:
            moved = found[0][name] - start[name]
            torch.testing.assert_close(other[name] - start[name], moved, rtol=0.02, atol=5e-5)
        for mine, theirs in zip(rows[0], metrics, strict=True):
            for name in ("loss", "diffusion_loss", "rewarded", "grad_norm"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(data, manifest, tmp_path):
    options = {"checkpoint_every": 1, "ema_decay": 0.5, "eval_samples": 1}
    whole, found = train(data, output=tmp_path / "whole", **options)
    options["output"] = tmp_path / "broken"
    train(data, iterations=1, **options)
    options |= {"iterations": 2, "resume": "latest"}
    for others in (data.take([1, 0, 2, 3, 4, 5]), read_controlled(manifest, "edges")):
        with pytest.raises(ValueError, match="another run|data|prompts"):
            train(others, **options)
    broken, rest = train(data, **options)
    mine, theirs = weights(whole), weights(broken)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(rest.metrics) == 2
    for a, b in zip(found.metrics, rest.metrics, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {
            k: v for k, v in b.items() if k not in TIMES | {"iteration"}
        }
    assert torch.equal(found.after.samples.data, rest.after.samples.data)


def test_other_algorithms_take_the_conditions(data):
    policy = conditional()
    before = weights(policy)
    _, found = train(data, "prdp", policy)
    after = weights(policy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("controlnet.") for name in changed)
    assert found.metrics[0]["reward"] < 0 and found.before.kl.abs().max() == 0


@pytest.mark.parametrize("algorithm", ["draft", "refl"])
def test_pathwise_algorithms_take_the_conditions(data, algorithm):
    _, found = train(data, algorithm, iterations=1)
    assert found.metrics[0]["grad_norm"] > 0 and "diffusion_loss" not in found.metrics[0]


def test_the_base_network_can_be_trained_instead(data):
    policy = conditional(train="base")
    before = weights(policy)
    train(data, policy=policy, iterations=1)
    after = weights(policy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("unet.") for name in changed)


# -- what is refused -----------------------------------------------------------------------------


def test_the_card_says_how_a_trained_controlnet_is_loaded():
    def code(method, trained):
        card = Card("embedded:emoji", "CtrlU", "r", 1, method,
                    controller=("controlnet", "embedded:controlnet", trained))  # fmt: skip
        return loading_code(card).splitlines()[-1]

    assert code("full", "control") == ("policy = load_policy('embedded:emoji', controlnet='final')")
    assert "'embedded:emoji', controlnet='embedded:controlnet', lora='final')" in code(
        "lora", "control"
    )
    assert "(\"final\", controlnet='embedded:controlnet', train='base')" in code("full", "base")
    assert "lora='final', train='base')" in code("lora", "base")


def test_what_needs_pictures_and_has_none(data):
    with pytest.raises(ValueError, match=r"CtrlU learns from pictures; give data \(a manifest, or"):
        check_run(make_algorithm("ctrl_u"), Training(**SMALL), 4)
    check_run(make_algorithm("ctrl_u"), Training(**SMALL), 4, data=data)
    check_run(make_algorithm("prdp"), Training(**SMALL), 4)
    with pytest.raises(ValueError, match="CtrlU learns from pictures"):
        finetune(plain(), REWARD, "ctrl_u", ["a", "b"], progress=False, **SMALL)

    class Bare:
        encode_samples = None

    with pytest.raises(ValueError, match="predicts noised pictures, and Bare has no denoise"):
        check_data(data, make_algorithm("ctrl_u"), Bare())
    with pytest.raises(ValueError, match="predicts noised pictures, and object has no encode_samp"):
        check_data(data, make_algorithm("ctrl_u"), object())
    check_data(data, make_algorithm("prdp"), Bare())


def test_prompts_come_once(data, tmp_path):
    policy = conditional()
    with pytest.raises(ValueError, match="prompts come with the data; give only one of prompts"):
        finetune(policy, REWARD, CTRL_U, ["a", "b"], data=data, progress=False, **SMALL)
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "a", "chosen": "1.png", "rejected": "2.png"})
    )
    for k in (1, 2):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match="prompts come with the data; give only one of prompts"):
        train(data, "dpo", policy, preferences=tmp_path / "p.jsonl")
    from diffreward.preferences import read_preferences

    preferences = read_preferences(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match="from preferences or from data; give one of the two"):
        check_run(
            make_algorithm("dpo"), Training(**SMALL), 1, preferences=preferences, data=data
        )  # fmt: skip
    with pytest.raises(ValueError, match="give eval_prompts or eval_data"):
        train(data, policy=policy, eval_prompts=["a"], eval_data=data)


def test_data_with_control_images_is_named(data, manifest):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    path = manifest.parent / "controlled.jsonl"  # the next picture is the control image
    others = [row["image"] for row in rows[1:] + rows[:1]]
    named = [{**row, "control": other} for row, other in zip(rows, others, strict=True)]
    path.write_text("\n".join(map(json.dumps, named)))
    first, one = train(read_controlled(path), iterations=1)
    second, other = train(str(path), iterations=1, eval_data=path)
    assert [r["loss"] for r in one.metrics] == [r["loss"] for r in other.metrics]
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(first).values(), weights(second).values(), strict=True)
    )
    assert other.before.prompts == [row["text"] for row in rows]


def test_a_model_without_control_refuses_control_images(data):
    with pytest.raises(ValueError, match="takes prompts only, but control came"):
        train(data, policy=plain())


def test_a_model_with_control_needs_control_images(manifest):
    with pytest.raises(ValueError, match="conditioned on a control image for each prompt"):
        train(read_controlled(manifest))


def test_pictures_without_control_images_are_learnt_from(manifest):
    """A reward of the picture alone, of a model that takes prompts."""
    reward = as_reward(
        lambda s: s.data[:, 0].mean((1, 2)),
        RewardInfo("red", differentiable=True, range=(0.0, 1.0)),
    )
    _, found = train(read_controlled(manifest), CTRL_U, plain(), reward, iterations=1)
    assert 0 < found.metrics[0]["reward"] < 1  # the reward, not its loss
    assert "control" not in found.after.samples.context


# -- gradients of rewards ------------------------------------------------------------------------


def through_integers(samples):
    pixels = (samples.data * 255).round().to(torch.uint8)
    return pixels.float().mean((1, 2, 3))


def under_no_grad(samples):
    with torch.no_grad():
        return samples.data.mean((1, 2, 3))


def piecewise(samples):
    return (samples.data * 255).round().mean((1, 2, 3))


def not_a_number(samples):
    zero = samples.data.mean((1, 2, 3)) * 0
    return samples.data.mean((1, 2, 3)) + (zero * zero).sqrt()


def elsewhere(samples):
    return torch.ones(len(samples), requires_grad=True) * 2


BAD = {
    through_integers: "has no gradient with respect to the picture: somewhere it is cut",
    under_no_grad: "has no gradient with respect to the picture",
    elsewhere: "has no gradient with respect to the picture",
    piecewise: "with respect to 2 pictures is 0 everywhere: is it piecewise constant",
    not_a_number: "with respect to 2 pictures is NaN or infinite",
}


def pictures(value=None):
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x if value is None else torch.full_like(x, value)
    return Samples(x, "image", ["a", "b"], {"control": x.clone()})


@pytest.mark.parametrize("broken", BAD, ids=lambda f: f.__name__)
def test_rewards_that_cannot_be_climbed(broken):
    with pytest.raises(ValueError, match=f"{broken.__name__}.*{BAD[broken]}"):
        check_image_gradient(as_reward(broken), pictures())


@pytest.mark.parametrize("name", ["control_luma", "control_edges", "control_colour"])
def test_rewards_that_can_be_climbed(name):
    """Also at their maximum, where control and picture are the same, and in flat pictures."""
    with torch.no_grad():
        for value in (None, 0.0, 0.5, 1.0):
            check_image_gradient(make_reward(name), pictures(value))


def test_the_check_leaves_samples_as_they_are():
    samples = pictures()
    before = samples.data.clone()
    check_image_gradient(make_reward("control_luma"), samples)
    assert torch.equal(samples.data, before) and not samples.data.requires_grad


@pytest.mark.parametrize("broken", BAD, ids=lambda f: f.__name__)
def test_they_are_refused_before_the_first_update(broken, monkeypatch):
    monkeypatch.setattr(engine.Evaluator, "__call__", lambda *_: pytest.fail("it was evaluated"))
    monkeypatch.setattr(Engine, "_step", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=BAD[broken]):
        finetune(plain(), broken, "draft", ["a", "b"], progress=False, **SMALL)


def test_of_data_its_pictures_are_asked(data, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "check_image_gradient", lambda reward, s: asked.append(s))
    e = made(data, iterations=1)
    e.run()
    sized = data.resized(SIZE, SIZE).load([0, 1])
    assert torch.equal(asked[0].data, sized.data) and len(asked) == 1
    assert torch.equal(asked[0].context["control"], sized.context["control"])
    assert len(e.conditions.examples(9)) == ROWS


def test_algorithms_without_gradients_take_any_reward():
    for broken in (through_integers, not_a_number):
        finetune(
            plain(), broken, "prdp", ["a", "b"], progress=False, **{**SMALL, "iterations": 1}
        )  # fmt: skip


# -- the command line ----------------------------------------------------------------------------

FEW = [
    "--training.prompts_per_update", "2", "--training.loggers", "[]", "--judges", "[]",
    "--reward", "control_luma", "--model.spec", "nowhere",
]  # fmt: skip


def refused(capsys, *argv):
    assert main(["finetune", *FEW, *map(str, argv)]) != 0
    return " ".join(capsys.readouterr().err.split())


def test_data_of_the_command_line(manifest, tmp_path, monkeypatch, capsys, untouchable):
    monkeypatch.chdir(tmp_path)
    ctrl_u = ("--algorithm", "ctrl_u")
    assert "CtrlU learns from pictures; give data" in refused(capsys, *ctrl_u)
    says = refused(capsys, *ctrl_u, "--data", f"{{source: {manifest}, cout: 3}}")
    assert "data has no entry 'cout'; did you mean 'count'?" in says
    says = refused(capsys, *ctrl_u, "--data", f"{{source: {manifest}, xyz: 3}}")
    assert "data has no entry 'xyz'; there is source, control, size, count, first" in says
    says = refused(capsys, *ctrl_u, "--data", "{control: luma}")
    assert "data needs the entry 'source'" in says
    says = refused(capsys, *ctrl_u, "--data", manifest, "--eval_data", "{sorce: x}")
    assert "eval_data has no entry 'sorce'; did you mean 'source'?" in says
    assert "there is no file none.jsonl" in refused(capsys, *ctrl_u, "--data", "none.jsonl")
    says = refused(capsys, *ctrl_u, "--data", f"{{source: {manifest}, count: 1}}")
    assert "prompts_per_update" in says  # of the data, of which there is one
    says = refused(capsys, "--algorithm", "dpo", "--preferences", "{pth: x}")
    assert "preferences has no entry 'pth'; did you mean 'path'?" in says
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_run_of_the_command_line(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "load_policy", lambda *_, **__: conditional())
    options = {
        "data": f"{{source: {manifest}, control: {{luma: 4}}}}",
        "eval_data": f"{{source: {manifest}, control: {{luma: 4}}, first: 4}}",
        "algorithm": json.dumps(CTRL_U), "reward": json.dumps(REWARD), "judges": "[]",
        "training.iterations": 1, "training.prompts_per_update": 2, "training.eval_samples": 1,
        "training.samples_per_prompt": 1, "training.loggers": "[]", "training.method": "full",
        "output": tmp_path / "run",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["finetune", *words]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").open()]
    assert any("pixel_weight" in row for row in rows)
    shown = (tmp_path / "run" / "samples" / "iteration-000001.jsonl").read_text()
    assert "picture 4" in shown and "picture 0" not in shown

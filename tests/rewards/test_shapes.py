"""Scenes of shapes: grammar, renderer and judge agree, and the judge refuses what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffreward.rewards.base import evaluate, make_reward
from diffreward.rewards.shapes import (
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZE,
    Item,
    Scene,
    ShapesChecker,
    coverage,
    detect,
    judge,
    parse,
    random_scene,
    render,
)
from diffreward.samples import Samples

PROMPTS = Path(__file__).parents[2] / "assets" / "prompts" / "scenes.jsonl"


def draw(scenes, seed=0):
    rng = np.random.default_rng(seed)
    pictures = np.stack([render(scene, rng) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def check(images, prompts):
    return ShapesChecker()(Samples(images, "image", prompts=prompts))


def soften(images):
    """A 3x3 binomial blur, as a decoder's, and noise of 5 %."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(kernel, kernel).expand(3, 1, 3, 3)
    images = F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), kernel, groups=3)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 0.05 * noise).clamp(0, 1)


# ---------------------------------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a red circle", Scene((Item("circle", "red"),))),
        ("Three green stars.", Scene((Item("star", "green", 3),))),
        ("star", Scene((Item("star"),))),
        (
            "a red circle and an orange square",
            Scene((Item("circle", "red"), Item("square", "orange"))),
        ),
        (
            "a red heart above two blue circles",
            Scene((Item("heart", "red"), Item("circle", "blue", 2)), "above"),
        ),
        (
            "a ring to the left of one black ring",
            Scene((Item("ring"), Item("ring", "black")), "left of"),
        ),
    ],
)
def test_parse_reads_english(prompt, scene):
    assert parse(prompt) == scene


@pytest.mark.parametrize("category", [*CATEGORIES, None])
def test_caption_and_parse_are_inverse(category):
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng, category)
        assert parse(scene.caption()) == scene


@pytest.mark.parametrize(
    "prompt", ["a photo of a cat", "", "five red stars", "red stars", "a pink heart", "a red"]
)
def test_unreadable_prompt_names_itself_and_the_problem(prompt):
    with pytest.raises(ValueError, match=r"Understood: .*heart|plural without") as error:
        check(torch.ones(1, 3, SIZE, SIZE), [prompt])
    assert repr(prompt) in str(error.value)


def test_too_many_objects_are_refused():
    with pytest.raises(ValueError, match="asks for 5 objects, at most 4"):
        parse("three red stars and two blue rings")


def test_all_wordings_of_a_scene_are_held_out_together():
    for a, b in [
        ("a red circle and a blue ring", "a blue ring and a red circle"),
        ("a red circle below a blue ring", "a blue ring above a red circle"),
        ("two stars right of a red heart", "a red heart left of two stars"),
    ]:
        assert parse(a).canonical() == parse(b).canonical()
    rng = np.random.default_rng(0)
    share = np.mean([random_scene(rng, "position").held_out() for _ in range(4000)])
    assert 0.1 < share < 0.15  # an eighth


def test_held_out_prompts():
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 120
    for category in CATEGORIES:
        scenes = [parse(row["prompt"]) for row in rows if row["category"] == category]
        assert len(scenes) == 20
        assert all(scene.held_out() or scene.count == 1 for scene in scenes)


# --------------------------------------------------------------------------------------- renderer


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_fills_its_box(shape):
    mask = coverage(shape, (10.0, 20.0, 42.0, 50.0))
    rows, columns = np.flatnonzero(mask.max(1) > 0.1), np.flatnonzero(mask.max(0) > 0.1)
    assert abs(rows[0] - 20) <= 1 and abs(rows[-1] - 49) <= 1
    assert abs(columns[0] - 10) <= 1 and abs(columns[-1] - 41) <= 1
    areas = {"square": 32 * 30, "circle": np.pi / 4 * 32 * 30, "triangle": 0.5 * 32 * 30}
    if shape in areas:
        assert mask.sum() == pytest.approx(areas[shape], rel=0.03)


def test_render_is_reproducible_and_on_white():
    scene = parse("two red stars")
    a, b = (render(scene, np.random.default_rng(3)) for _ in range(2))
    assert a.shape == (64, 64, 3) and a.dtype == np.uint8 and (a == b).all()
    assert (a[0] == 255).all() and (a[:, 0] == 255).all()


# ------------------------------------------------------------------------------------------ judge


@pytest.mark.parametrize("distort", [lambda x: x, soften], ids=["clean", "blur and noise"])
@pytest.mark.parametrize("category", CATEGORIES)
def test_rendered_scenes_pass(category, distort):
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, category) for _ in range(100)]
    scores = check(distort(draw(scenes)), [scene.caption() for scene in scenes])
    floor = 0.95 if category == "counting" and distort is soften else 0.99
    assert scores.value.mean() >= floor
    assert scores.value.dtype == torch.float32


def test_detect_finds_every_shape_in_every_colour():
    scenes = [Scene((Item(s, c),)) for s in SHAPES for c in COLOURS]
    for scene, objects in zip(scenes, detect(draw(scenes)), strict=True):
        assert [(o.shape, o.colour) for o in objects] == [
            (scene.items[0].shape, scene.items[0].colour)
        ]


@pytest.mark.parametrize(
    ("drawn", "asked", "faulty"),
    [
        ("a red circle", "a blue circle", "colour"),
        ("a red circle", "a red square", "objects"),
        ("a red circle", "two red circles", "count"),
        ("three red circles", "two red circles", "count"),
        ("a red circle and a blue square", "a blue circle and a red square", "colour"),
        ("a red circle and a blue square", "a red circle", "count"),
        ("a red heart above a blue star", "a blue star above a red heart", "position"),
        ("a red heart left of a blue star", "a red heart above a blue star", "position"),
        ("a red heart left of a red heart", "a red heart below a red heart", "position"),
        ("a green ring", "a green circle", "objects"),
        ("two red stars below a ring", "two red stars right of a ring", "position"),
    ],
)
def test_wrong_scenes_are_rejected(drawn, asked, faulty):
    images = draw([parse(drawn)] * 20)
    scores = check(images, [asked] * 20)
    assert (scores.value == 0).all()
    assert (scores.parts[faulty] < 1).all()
    assert (check(images, [drawn] * 20).value == 1).all()


def test_random_other_captions_are_rejected():
    rng = np.random.default_rng(11)
    scenes = [random_scene(rng, "colour attribution") for _ in range(100)]
    other = [*scenes[1:], scenes[0]]
    differs = torch.tensor(
        [a.canonical() != b.canonical() for a, b in zip(scenes, other, strict=True)]
    )
    assert (check(draw(scenes), [s.caption() for s in other]).value[differs] == 0).all()


def test_specks_are_ignored_but_objects_are_not():
    image = draw([parse("a red heart")])
    image[:, :, 61:, 61:] = torch.tensor([0.1, 0.2, 0.9])[:, None, None]
    assert check(image, ["a red heart"]).value.item() == 1
    image[:, :, 56:, 56:] = torch.tensor([0.1, 0.2, 0.9])[:, None, None]
    scores = check(image, ["a red heart"])
    assert scores.value.item() == 0 and scores.parts["count"].item() == pytest.approx(0.5)


def test_shapeless_pictures_are_rejected():
    noise = torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    blank = torch.ones(8, 3, SIZE, SIZE)
    for images in (noise, blank, 1 - blank):
        assert (check(images, ["a red circle"] * 8).value == 0).all()


def test_verdict_does_not_depend_on_the_batch():
    rng = np.random.default_rng(2)
    scenes = [random_scene(rng) for _ in range(12)]
    images, prompts = soften(draw(scenes)), [scene.caption() for scene in scenes]
    whole = check(images, prompts)
    for i in range(12):
        alone = check(images[i : i + 1], prompts[i : i + 1])
        assert alone.value[0] == whole.value[i]
        assert all(alone.parts[k][0] == whole.parts[k][i] for k in whole.parts)


def test_larger_pictures_are_judged_alike():
    scenes = [parse("two red stars below a ring"), parse("a heart")]
    images = F.interpolate(draw(scenes), scale_factor=4, mode="bilinear")
    assert (check(images, [scene.caption() for scene in scenes]).value == 1).all()


def test_parts_name_the_fault_in_fractions():
    found = detect(draw([parse("two red circles and a blue square")]))[0]
    verdict = judge(parse("two red circles and two blue squares"), found)
    assert verdict["exact"] == 0
    assert verdict["objects"] == verdict["count"] == verdict["colour"] == 0.75


def test_registered():
    reward = make_reward("shapes_checker")
    assert reward.info.needs_prompt and not reward.info.differentiable
    assert reward.info.weights is None and reward.info.range == (0.0, 1.0)
    samples = Samples(draw([parse("a red heart")]), "image", prompts=["a red heart"])
    assert evaluate(reward, samples).value.item() == 1
    with pytest.raises(ValueError, match="prompts"):
        evaluate(reward, Samples(samples.data, "image"))


def test_relations_are_exclusive():
    objects = detect(draw([parse("a red heart above a blue star")]))[0]
    verdicts = {
        r: judge(parse(f"a red heart {r} a blue star"), objects)["exact"] for r in RELATIONS
    }
    assert verdicts == {"above": 1, "below": 0, "left of": 0, "right of": 0}

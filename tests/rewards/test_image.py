"""Image rewards against independent computations, and the conformance of every built-in reward."""

import io
import json
import math
import string
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file

from diffreward._assets import asset_path
from diffreward.rewards import RewardInfo, available_rewards, base, evaluate, make_reward
from diffreward.rewards.image import ClipScore, preprocess
from diffreward.rewards.testing import check_reward
from diffreward.samples import Samples

PROMPTS = ["a red heart", "a blue circle", "two green stars", "a red heart above a blue ring"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def photos(b: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    """(b, h, w, 3) uint8: smooth colour fields with hard-edged rectangles and some grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w] / 16
    waves = rng.uniform(0.5, 2, (b, 1, 1, 3)) * x[..., None] + rng.uniform(0, 6, (b, 1, 1, 3))
    images = 128 + 100 * np.sin(waves + y[..., None] * rng.uniform(-1, 1, (b, 1, 1, 3)))
    images[:, h // 4 : h // 2, w // 4 : 3 * w // 4] = rng.uniform(0, 255, (b, 1, 1, 3))
    return (images + rng.normal(0, 3, images.shape)).clip(0, 255).round().astype(np.uint8)


def to_samples(pixels: np.ndarray, prompts: list[str] | None = None) -> Samples:
    return Samples(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, "image", prompts)


# --------------------------------------------------------------------------------------------
# CLIP
# --------------------------------------------------------------------------------------------


def tiny_config(vocab_size: int) -> dict:
    return {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8
        },
        "text_cfg": {
            "context_length": 32, "vocab_size": vocab_size, "width": 32, "heads": 2, "layers": 2
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP in the folder layout open_clip reads with ``local-dir:``."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, ","]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=32).save_pretrained(folder)
    config = tiny_config(len(vocab))
    torch.manual_seed(0)
    save_file(open_clip.model.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    config["text_cfg"]["hf_tokenizer_name"] = "in this folder"
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return make_reward({"name": "clip_score", "model": f"local-dir:{clip_folder}"})


def clip_truth(folder, pixels: np.ndarray, prompts: list[str]) -> torch.Tensor:
    """The cosine by open_clip alone, one sample at a time, through PIL."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    cosines = []
    with torch.no_grad():
        for image, prompt in zip(pixels, prompts, strict=True):
            a = model.encode_image(transform(Image.fromarray(image))[None])[0].double()
            b = model.encode_text(tokenizer([prompt]))[0].double()
            cosines.append((a @ b) / (a.norm() * b.norm()))
    return torch.stack(cosines).float()


@pytest.mark.parametrize(
    ("size", "gap"),
    # at the model's own size nothing is resized; otherwise PIL rounds to 8 bits, twice
    [((32, 32), 1e-6), ((64, 64), 1e-3), ((48, 81), 1e-3), ((20, 24), 1e-3)],
)
def test_clip_score_is_open_clips_cosine(clip, clip_folder, size, gap):
    pixels = photos(4, *size)
    value = evaluate(clip, to_samples(pixels, PROMPTS)).value
    truth = clip_truth(clip_folder, pixels, PROMPTS)
    assert truth.std() > 0.02  # well above the gap
    torch.testing.assert_close(value, truth, atol=gap, rtol=0)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("target", [(32, 32), (32, 40)])
@pytest.mark.parametrize("size", [(64, 64), (48, 81), (20, 24), (100, 33), (37, 41)])
def test_preprocessing_is_open_clips(mode, target, size):
    pixels = photos(1, *size)
    truth = image_transform(target, False, MEAN, STD, resize_mode=mode, fill_color=7)
    expected = truth(Image.fromarray(pixels[0]))
    ours = preprocess(
        to_samples(pixels).data, size=target, mean=MEAN, std=STD, resize_mode=mode, fill=7 / 255
    )[0]
    assert ours.shape == expected.shape
    gap = (ours - expected).abs() * torch.tensor(STD)[:, None, None] * 255
    # a rounding to 8 bits is 0.25 on average; a shift by one pixel would be above 4
    assert gap.mean() < 0.5


def test_clip_score_encodes_each_prompt_once(clip_folder, monkeypatch):
    reward = ClipScore(f"local-dir:{clip_folder}", chunk_size=2)
    encoded = []
    encode_text = reward.network.encode_text

    def counting(tokens, **options):
        encoded.append(len(tokens))
        return encode_text(tokens, **options)

    monkeypatch.setattr(reward.network, "encode_text", counting)
    prompts = ["a", "b", "a", "c", "a", "b"]
    samples = to_samples(photos(6, 32, 32), prompts)
    first = evaluate(reward, samples).value
    assert encoded == [2, 1]
    torch.testing.assert_close(evaluate(reward, samples).value, first)
    assert encoded == [2, 1]
    assert not first.requires_grad
    monkeypatch.setattr("diffreward.rewards.image._TEXT_CACHE_SIZE", 2)
    torch.testing.assert_close(evaluate(reward, samples).value, first)
    assert len(reward._text) == 2


def test_clip_score_is_frozen_in_float32_and_says_which_model(clip, clip_folder):
    assert not clip.network.training
    assert not any(p.requires_grad for p in clip.network.parameters())
    assert {p.dtype for p in clip.network.parameters()} == {torch.float32}
    assert str(clip_folder) in clip.info.weights
    assert clip.to("cpu") is clip


def test_clip_score_warns_of_a_prompt_it_cannot_read_whole(clip):
    fits, too_long = "a " * 30, "a " * 31  # and the start and end tokens
    samples = to_samples(photos(3, 32, 32), [fits, too_long, "a b c"])
    with pytest.warns(UserWarning) as caught:
        evaluate(clip, samples)
    assert [str(w.message) for w in caught] == [
        f"reward 'clip_score' reads only the first 32 tokens of {too_long!r}"
    ]


def test_clip_score_takes_an_architecture_with_a_checkpoint_file(tmp_path):
    config = tiny_config(49408)  # the vocabulary of open_clip's own tokenizer
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    torch.manual_seed(1)
    model = open_clip.model.CLIP(**config).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    reward = make_reward(
        {
            "name": "clip_score",
            "model": "tiny/test",
            "pretrained": str(tmp_path / "weights.safetensors"),
        }
    )
    pixels = photos(4, 32, 32)
    transform = image_transform(32, False)
    with torch.no_grad():
        images = torch.stack([transform(Image.fromarray(p)) for p in pixels])
        a = model.encode_image(images)
        b = model.encode_text(open_clip.tokenize(PROMPTS, context_length=32))
    expected = torch.cosine_similarity(a, b)
    value = evaluate(reward, to_samples(pixels, PROMPTS)).value
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)


def test_a_tag_trained_with_quick_gelu_gets_quick_gelu(monkeypatch):
    """ViT-L-14 with the tag openai, as open_clip stands, would have the wrong activation."""
    asked = {}

    def create_model(name, **options):
        asked.update(options, name=name)
        raise InterruptedError

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for tag, quick in (("openai", True), ("laion2b_s32b_b82k", False)):
        with pytest.raises(InterruptedError):
            ClipScore("ViT-L-14", tag)
        assert asked["force_quick_gelu"] is quick
        assert asked["require_pretrained"] is True


def test_clip_score_says_what_is_wrong_with_a_model(tmp_path):
    def make(**options):
        return make_reward({"name": "clip_score", **options})

    with pytest.raises(ValueError, match=r"no architecture 'ViT-L-15'; did you mean .*ViT-L-14"):
        make(model="ViT-L-15")
    with pytest.raises(ValueError, match=r"'ViT-L-14' needs pretrained=.*openai.*none came"):
        make(model="ViT-L/14")
    with pytest.raises(ValueError, match="'opnai' is neither"):
        make(model="ViT-L-14", pretrained="opnai")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config.json is missing"):
        make(model=f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match="has its own weights"):
        make(model=f"local-dir:{tmp_path}", pretrained="openai")
    with pytest.raises(FileNotFoundError, match="no embedded asset 'clip_gide'"):
        make(model="embedded:clip_gide")
    with pytest.raises(ValueError, match="chunk_size"):
        make(chunk_size=0)


def test_a_folder_without_weights_is_not_scored_with_random_ones(clip_folder, tmp_path):
    config = (clip_folder / "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(RuntimeError, match=r"[Rr]equired pretrained weights"):
        make_reward({"name": "clip_score", "model": f"local-dir:{tmp_path}"})


# --------------------------------------------------------------------------------------------
# The embedded CLIPs
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip_score", "clip_judge"])
def test_embedded_clip_is_open_clips_cosine_and_knows_its_shapes(name):
    from diffreward.rewards.shapes import parse, render

    rng = np.random.default_rng(0)
    prompts = [
        f"a {colour} {shape}"
        for colour in ("red", "blue", "green")
        for shape in ("heart", "circle")
    ]
    pixels = np.stack([render(parse(prompt), rng) for prompt in prompts])
    reward = make_reward(name)
    assert reward.info.name == name
    value = evaluate(reward, to_samples(pixels, prompts)).value
    folder = asset_path(available_rewards()[name].weights.removeprefix("embedded:"))
    torch.testing.assert_close(value, clip_truth(folder, pixels, prompts), atol=5e-3, rtol=0)
    # every image likes its own prompt better than those of another colour
    others = prompts[2:] + prompts[:2]
    assert (value > evaluate(reward, to_samples(pixels, others)).value).all()


def test_the_judge_can_be_named_in_a_spec():
    judge = make_reward({"name": "clip_score", "model": "embedded:clip_judge"})
    samples = to_samples(photos(2, 64, 64), PROMPTS[:2])
    value = evaluate(judge, samples).value
    torch.testing.assert_close(value, evaluate(make_reward("clip_judge"), samples).value)
    assert not torch.allclose(value, evaluate(make_reward("clip_score"), samples).value)


# --------------------------------------------------------------------------------------------
# JPEG
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [95, 30])
def test_jpeg_size_is_pils(quality):
    pixels = photos(3, 40, 56)
    sizes = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        sizes.append(len(file.getvalue()) / 1000)
    expected = torch.tensor(sizes)
    assert expected.std() > 0
    options = {} if quality == 95 else {"quality": quality}  # 95 is the default
    samples = to_samples(pixels)
    assert torch.equal(
        evaluate(make_reward("jpeg_incompressibility", **options), samples).value, expected
    )
    assert torch.equal(
        evaluate(make_reward("jpeg_compressibility", **options), samples).value, -expected
    )


def test_jpeg_never_turns_nan_into_a_size():
    samples = to_samples(photos(3, 16, 16))
    samples.data[1, 0, 0, 0] = math.nan
    value = make_reward("jpeg_compressibility")(samples).value  # without evaluate's own check
    assert value.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="from 1 to 100"):
        make_reward("jpeg_compressibility", quality=0)


# --------------------------------------------------------------------------------------------
# Colour
# --------------------------------------------------------------------------------------------


def test_colorfulness_is_hasler_and_susstrunks():
    pixels = photos(4, 24, 32)
    red, green, blue = pixels.astype(np.float64).transpose(3, 0, 1, 2)
    rg, yb = red - green, 0.5 * (red + green) - blue
    over = (1, 2)
    sigma = np.sqrt(rg.std(axis=over) ** 2 + yb.std(axis=over) ** 2)
    mu = np.sqrt(rg.mean(axis=over) ** 2 + yb.mean(axis=over) ** 2)
    expected = torch.from_numpy(sigma + 0.3 * mu).float()
    value = evaluate(make_reward("colorfulness"), to_samples(pixels)).value
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-3)


def test_colorfulness_of_known_images():
    grey = torch.full((1, 3, 8, 8), 0.3)
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    halves = red.clone()  # left red, right cyan: mean of rg and yb 0, sigma 255 and 127.5
    halves[..., 4:] = 1 - halves[..., 4:]
    value = evaluate(
        make_reward("colorfulness"), Samples(torch.cat([grey, red, halves]), "image")
    ).value
    norm = 255 * math.sqrt(1.25)
    torch.testing.assert_close(value, torch.tensor([0, 0.3 * norm, norm]), atol=1e-3, rtol=1e-5)


def test_colorfulness_of_a_grey_image_has_a_finite_gradient():
    data = torch.full((1, 3, 8, 8), 0.3, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        evaluate(make_reward("colorfulness"), Samples(data, "image")).value.sum(), data
    )
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("color", ["orange", "#ffa500", (1.0, 165 / 255, 0)])
def test_target_color_is_minus_the_mean_squared_distance(color):
    pixels = photos(3, 16, 20)
    mean = pixels.astype(np.float64).mean(axis=(1, 2)) / 255
    expected = -((mean - np.array([255, 165, 0]) / 255) ** 2).mean(axis=1)
    value = evaluate(make_reward("target_color", color=color), to_samples(pixels)).value
    torch.testing.assert_close(value, torch.from_numpy(expected).float(), atol=1e-6, rtol=1e-5)


def test_target_color_of_the_foreground_does_not_see_the_background():
    reward = make_reward({"name": "target_color", "color": "blue", "background": "white"})
    images = torch.ones(4, 3, 16, 16)
    images[0, :2, 4:8, 4:8] = 0  # a small blue square
    images[1, :2, 2:14, 2:14] = 0  # a large one
    images[2, 1:, 2:14, 2:14] = 0  # a large red one
    value = evaluate(reward, Samples(images, "image")).value  # the last image is empty
    assert value[:2].abs().max() < 1e-4
    torch.testing.assert_close(value[2:], torch.tensor([-2 / 3, -2 / 3]), atol=1e-4, rtol=0)


def test_target_color_says_what_is_no_colour():
    with pytest.raises(ValueError, match="no colour 'ornge'; did you mean orange"):
        make_reward("target_color", color="ornge")
    for color in [(255, 0, 0), (0.5, 0.5)]:
        with pytest.raises(ValueError, match=r"three numbers in \[0, 1\]"):
            make_reward("target_color", color=color)


# --------------------------------------------------------------------------------------------
# Conformance
# --------------------------------------------------------------------------------------------

BUILT_IN = {
    entry.info.name: entry.info
    for entry in base._TABLE.values()
    if entry.factory.__module__.startswith("diffreward.")
}


def conformance_samples() -> Samples:
    """Four different pictures, two of which show their prompt."""
    from diffreward.rewards.shapes import parse, render

    rng = np.random.default_rng(0)
    shown = [render(parse(prompt), rng) for prompt in (PROMPTS[0], PROMPTS[2])]
    unrelated = photos(2, 64, 64)
    pixels = np.stack([shown[0], unrelated[0], shown[1], unrelated[1]])
    return to_samples(pixels, PROMPTS)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_reward_keeps_the_contract(name):
    assert BUILT_IN[name].modality == "image"
    assert BUILT_IN[name].licence and BUILT_IN[name].source and BUILT_IN[name].description
    check_reward(make_reward(name), conformance_samples())


def test_clip_score_of_any_folder_keeps_the_contract(clip_folder):
    reward = make_reward({"name": "clip_score", "model": f"local-dir:{clip_folder}"})
    # some image sides are not the model's, and the prompts do not fill one chunk
    check_reward(reward, to_samples(photos(5, 24, 40), ["a", "b", "a", "", "c, d"]))


def test_target_color_of_a_foreground_keeps_the_contract():
    check_reward(make_reward("target_color", background="white"), conformance_samples())


def row(info: RewardInfo) -> str:
    """A reward's row in the table of docs/rewards.md."""
    low, high = info.range
    cells = [
        f"`{info.name}`",
        info.modality or "any",
        {True: "yes", False: "no", None: "not declared"}[info.differentiable],
        "yes" if info.needs_prompt else "no",
        f"[{low:g}, {high:g}]",
        info.licence,
        f"`{info.weights}`" if info.weights else "none",
        info.source,
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_in_the_docs_is_the_registry():
    page = Path(__file__).parents[2] / "docs" / "rewards.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    expected = [row(BUILT_IN[name]) for name in sorted(BUILT_IN)]
    assert rows == expected, "the table should be:\n" + "\n".join(expected)

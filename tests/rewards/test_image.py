"""Image rewards against independent computations, and the conformance of every built-in reward."""

import io
import math
from contextlib import nullcontext

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from tiny_towers import (
    MEAN,
    STD,
    affine,
    assert_gap,
    conformance_samples,
    linear_head,
    open_clip_architecture,
    photos,
    save_open_clip,
    save_siglip,
    save_transformers_clip,
    to_samples,
)

from diffreward._assets import asset_path
from diffreward.rewards import available_rewards, evaluate, make_reward
from diffreward.rewards.image import ClipScore, load_aesthetic_head
from diffreward.rewards.testing import check_reward
from diffreward.rewards.towers import Preprocess
from diffreward.samples import Samples

PROMPTS = ["a red heart", "a blue circle", "two green stars", "a red heart above a blue ring"]

# --------------------------------------------------------------------------------------------
# CLIP
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP in the folder layout open_clip reads with ``local-dir:``."""
    return save_open_clip(tmp_path_factory.mktemp("clip"))


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
    ours = Preprocess(target, MEAN, STD, resize_mode=mode, fill=7 / 255)(to_samples(pixels).data)[0]
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
    monkeypatch.setattr("diffreward.rewards.towers._TEXT_CACHE_SIZE", 2)
    torch.testing.assert_close(evaluate(reward, samples).value, first)
    assert len(reward.tower._text) == 2


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
        f"{clip.tower.name} reads only the first 32 tokens of {too_long!r}"
    ]


def test_clip_score_takes_an_architecture_with_a_checkpoint_file(tmp_path):
    model = open_clip_architecture(tmp_path, "tiny-test")
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


@pytest.mark.parametrize("size", [(64, 64), (48, 81), (20, 24)])
def test_exact_clip_score_is_open_clips_cosine_to_round_off(clip_folder, size):
    exact = make_reward("clip_score", model=f"local-dir:{clip_folder}", exact=True)
    assert exact.info.differentiable is False
    pixels = photos(4, *size)
    value = evaluate(exact, to_samples(pixels, PROMPTS)).value
    torch.testing.assert_close(value, clip_truth(clip_folder, pixels, PROMPTS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("save", [save_transformers_clip, save_siglip])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 81), (20, 24)])
def test_clip_score_of_transformers_is_its_cosine_within_4_percent_of_the_spread(
    tmp_path, save, size
):
    import transformers

    pixels, prompts = photos(8, *size), 2 * PROMPTS
    folder = save(tmp_path)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    kind = "SiglipImageProcessorPil" if save is save_siglip else "CLIPImageProcessorPil"
    processor = getattr(transformers, kind).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    with torch.no_grad():
        inputs = processor([Image.fromarray(image) for image in pixels], return_tensors="pt")
        a = model.get_image_features(**inputs).pooler_output
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        b = model.get_text_features(input_ids=tokens["input_ids"]).pooler_output
    truth = torch.cosine_similarity(a, b)
    spec = {"name": "clip_score", "model": f"transformers:{folder}"}
    with pytest.warns(UserWarning) if len(max(PROMPTS, key=len)) > length else nullcontext():
        value = evaluate(make_reward(spec), to_samples(pixels, prompts)).value
        exact = evaluate(make_reward(spec, exact=True), to_samples(pixels, prompts)).value
    assert_gap(value, truth, percent=4)
    torch.testing.assert_close(exact, truth, atol=2e-6, rtol=0)
    for exactly in (False, True):
        reward = make_reward(spec, exact=exactly)
        check_reward(reward, to_samples(photos(5, *size), ["a", "b", "a", "", "c, d"]))


# --------------------------------------------------------------------------------------------
# Aesthetics
# --------------------------------------------------------------------------------------------

LAYERS = [f"layers.{i}" for i in (0, 2, 4, 6, 7)]  # of sac+logos+ava1-l14-linearMSE.pth


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_aesthetic_head_has_the_published_layout_and_no_activation(tmp_path, suffix):
    state = linear_head(768, LAYERS)
    file = tmp_path / f"head.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    head = load_aesthetic_head(file)
    unit = torch.nn.functional.normalize(torch.randn(64, 768), dim=-1)
    value = head(unit)
    assert value.shape == (64, 1) and not value.requires_grad and not head.training
    torch.testing.assert_close(value[:, 0].double(), affine(state, unit), atol=1e-5, rtol=1e-5)


def test_a_head_of_another_layout_is_refused(tmp_path):
    def refused(state, match):
        torch.save(state, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=match):
            load_aesthetic_head(tmp_path / "head.pth")

    state = linear_head(768, LAYERS)
    refused({**state, "layers.9.bias": torch.zeros(1)}, r"expected layers.0.weight.*layers.9.bias")
    refused({k: v for k, v in state.items() if "7" not in k}, "has not the layout of this head")
    refused({**state, "layers.2.weight": torch.zeros(128, 9)}, r"do not lead .*\(128, 9\)")
    refused({**state, "layers.7.weight": torch.zeros(2, 16)}, r"and to one number")
    refused([1, 2], "it holds <class 'list'>")
    refused(torch.nn.Linear(2, 1), "is no file of weights")  # a pickle of code is not run
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_aesthetic_head(tmp_path / "nothing.pth")


@pytest.fixture(scope="module")
def aesthetic_head(tmp_path_factory):
    file = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(linear_head(16, LAYERS), file)
    return file


def aesthetic_truth(folder, head, pixels: np.ndarray) -> torch.Tensor:
    """The published computation, one image at a time, through PIL."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    state = torch.load(head, weights_only=True)
    with torch.no_grad():
        a = model.eval().encode_image(torch.stack([transform(Image.fromarray(p)) for p in pixels]))
    return affine(state, a / a.norm(dim=1, keepdim=True)).float()


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 81), (20, 24)])
def test_aesthetic_is_the_published_formula_within_4_percent_of_the_spread(
    clip_folder, aesthetic_head, size
):
    pixels = photos(8, *size)
    truth = aesthetic_truth(clip_folder, aesthetic_head, pixels)
    spec = {"name": "aesthetic", "head": str(aesthetic_head), "model": f"local-dir:{clip_folder}"}
    value = evaluate(make_reward(spec), to_samples(pixels)).value
    assert_gap(value, truth, percent=4)
    exact = evaluate(make_reward(spec, exact=True), to_samples(pixels)).value
    torch.testing.assert_close(exact, truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("exact", [False, True])
def test_aesthetic_keeps_the_contract(clip_folder, aesthetic_head, exact):
    reward = make_reward(
        "aesthetic", head=str(aesthetic_head), model=str(clip_folder), exact=exact, chunk_size=2
    )
    assert reward.info.differentiable is not exact
    assert str(clip_folder) in reward.info.weights and str(aesthetic_head) in reward.info.weights
    assert reward.to("cpu") is reward
    check_reward(reward, to_samples(photos(5, 24, 40)))


def test_aesthetic_reads_openais_clip_by_default_and_refuses_another_width(
    clip_folder, tmp_path, monkeypatch
):
    torch.save(linear_head(8, LAYERS), tmp_path / "head.pth")
    head = str(tmp_path / "head.pth")
    reward = make_reward("aesthetic", head=head, model=str(clip_folder))
    with pytest.raises(ValueError, match=r"reads embeddings of 8 numbers, but .* gives 16"):
        evaluate(reward, to_samples(photos(2, 32, 32)))
    asked = []
    monkeypatch.setattr(
        "diffreward.rewards.image.load_tower", lambda *spec: asked.append(spec) or reward.tower
    )
    assert make_reward("aesthetic", head=head).info.weights.startswith("ViT-L-14 (openai)")
    make_reward("aesthetic", head=head, model="transformers:openai/clip-vit-large-patch14")
    assert asked == [("ViT-L-14", "openai"), ("transformers:openai/clip-vit-large-patch14", None)]


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


def test_clip_score_of_any_folder_keeps_the_contract(clip_folder):
    reward = make_reward({"name": "clip_score", "model": f"local-dir:{clip_folder}"})
    # some image sides are not the model's, and the prompts do not fill one chunk
    check_reward(reward, to_samples(photos(5, 24, 40), ["a", "b", "a", "", "c, d"]))


def test_target_color_of_a_foreground_keeps_the_contract():
    check_reward(make_reward("target_color", background="white"), conformance_samples())

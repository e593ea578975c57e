"""Towers and preprocessing against open_clip, transformers and PIL themselves; sharing, counted."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from open_clip.transform import image_transform
from PIL import Image
from tiny_towers import (
    MEAN,
    STD,
    affine,
    linear_head,
    photos,
    save_open_clip,
    save_siglip,
    save_transformers_clip,
    to_samples,
)

from diffreward.rewards import evaluate, make_reward
from diffreward.rewards.towers import (
    Preprocess,
    load_tower,
    load_transformers,
    share_towers,
)

PROMPTS = ["a red heart", "two stars", "", "a"]
SIZES = [(64, 64), (48, 81), (20, 24), (100, 33), (37, 41)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    save = {"open_clip": save_open_clip, "clip": save_transformers_clip, "siglip": save_siglip}
    return {kind: str(build(tmp_path_factory.mktemp(kind))) for kind, build in save.items()}


def eight_bits(gap: torch.Tensor, std=STD) -> torch.Tensor:
    """A difference of normalised pixels, in steps of 1/255."""
    return gap.abs() * torch.tensor(std)[:, None, None] * 255


# --------------------------------------------------------------------------------------------
# Preprocessing
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("target", [(32, 32), (32, 40)])
@pytest.mark.parametrize("size", SIZES)
def test_exact_is_open_clips_pil_pixel_for_pixel_and_tensors_are_half_a_step_away(
    mode, target, size
):
    pixels = photos(2, *size)
    original = image_transform(target, False, MEAN, STD, resize_mode=mode, fill_color=7)
    expected = torch.stack([original(Image.fromarray(image)) for image in pixels])
    tensors = Preprocess(target, MEAN, STD, resize_mode=mode, fill=7 / 255)
    images = to_samples(pixels).data
    exact = replace(tensors, exact=True)(images)
    torch.testing.assert_close(exact, expected, atol=2e-6, rtol=0)
    gap = eight_bits(tensors(images) - expected)
    assert gap.mean() < 0.5 and gap.max() < 2  # of 255; a shift by one pixel: above 4


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("size", SIZES)
def test_exact_is_transformers_pil_pixel_for_pixel_and_tensors_are_half_a_step_away(
    folders, kind, size
):
    pixels = photos(2, *size)
    cls = {"clip": "CLIPImageProcessorPil", "siglip": "SiglipImageProcessorPil"}[kind]
    original = getattr(transformers, cls).from_pretrained(folders[kind])
    expected = original([Image.fromarray(image) for image in pixels], return_tensors="pt")
    expected = expected["pixel_values"]
    tensors = load_transformers(folders[kind]).preprocess
    images = to_samples(pixels).data
    exact = replace(tensors, exact=True)(images)
    torch.testing.assert_close(exact, expected, atol=2e-6, rtol=0)
    gap = eight_bits(tensors(images) - expected, tensors.std)
    assert gap.mean() < 0.5 and gap.max() < 2


def test_exact_rounds_has_no_gradient_and_keeps_nan():
    exact = Preprocess((8, 8), (0.0,) * 3, (1.0,) * 3, exact=True)
    images = torch.rand(3, 3, 8, 8, requires_grad=True)
    assert torch.equal(exact(images), (images.detach() * 255).round() / 255)
    assert not exact(images).requires_grad
    broken = images.detach().clone()
    broken[1, 0, 0, 0] = torch.nan
    assert exact(broken).isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert Preprocess((4, 4), MEAN, STD)(images).requires_grad
    assert torch.equal(exact(images.detach() * 3 - 1), exact((images.detach() * 3 - 1).clamp(0, 1)))


def test_without_clipping_the_overshoot_stays_even_when_exact():
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    clipped = Preprocess((16, 16), (0.0,) * 3, (1.0,) * 3)
    assert clipped(edge).min() == 0 and clipped(edge).max() == 1
    for exact in (False, True):
        kept = replace(clipped, clip=False, exact=exact)(edge)
        assert kept.min() < -0.02 and kept.max() > 1.02


def test_preprocess_is_its_own_key_and_says_what_it_does_not_know():
    assert {Preprocess((8, 8), MEAN, STD): 1}[Preprocess((8, 8), MEAN, STD)]
    assert Preprocess((8, 8), MEAN, STD) != Preprocess((8, 8), MEAN, STD, exact=True)
    with pytest.raises(ValueError, match="bicubic, bilinear, but 'lanczos'"):
        Preprocess((8, 8), MEAN, STD, interpolation="lanczos")
    with pytest.raises(ValueError, match="longest or squash, but 'crop'"):
        Preprocess((8, 8), MEAN, STD, resize_mode="crop")


# --------------------------------------------------------------------------------------------
# transformers
# --------------------------------------------------------------------------------------------


def transformers_truth(folder: str, pixels: np.ndarray, prompts: list[str]):
    """Features by transformers alone, one sample at a time, through PIL."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    siglip = model.config.model_type == "siglip"
    kind = "SiglipImageProcessorPil" if siglip else "CLIPImageProcessorPil"
    processor = getattr(transformers, kind).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images, texts = [], []
    with torch.no_grad():
        for image, prompt in zip(pixels, prompts, strict=True):
            inputs = processor(Image.fromarray(image), return_tensors="pt")
            images.append(model.get_image_features(**inputs).pooler_output[0])
            # SigLIP is trained on padded prompts, without a mask; CLIP on neither
            length = model.config.text_config.max_position_embeddings
            padding = dict(padding="max_length", max_length=length) if siglip else {}
            tokens = tokenizer([prompt], return_tensors="pt", **padding)["input_ids"]
            texts.append(model.get_text_features(input_ids=tokens).pooler_output[0])
    return torch.stack(images), torch.stack(texts)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_gives_transformers_own_features(folders, kind):
    pixels = photos(4, 48, 81)
    images, texts = transformers_truth(folders[kind], pixels, PROMPTS)
    tower = load_tower(f"transformers:{folders[kind]}")
    data = to_samples(pixels).data
    exact = replace(tower.preprocess, exact=True)
    torch.testing.assert_close(
        tower.image_features(data, exact, chunk_size=3), images, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        tower.text_features(PROMPTS, chunk_size=3), texts, atol=1e-5, rtol=1e-5
    )
    assert {p.dtype for p in tower.network.parameters()} == {torch.float32}
    assert not tower.network.training
    assert not any(p.requires_grad for p in tower.network.parameters())


def test_the_vision_side_alone_gives_the_same_features(folders, tmp_path):
    gc.collect()  # no other test's
    images, _ = transformers_truth(folders["siglip"], photos(2, 32, 32), PROMPTS[:2])
    tower = load_transformers(folders["siglip"], text=False)
    data = to_samples(photos(2, 32, 32)).data
    torch.testing.assert_close(tower.image_features(data), images, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="has no text side"):
        tower.text_features(["a"])
    # a folder which has nothing else, as SiglipVisionModel saves it
    transformers.SiglipVisionModel.from_pretrained(folders["siglip"]).save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    alone = load_transformers(str(tmp_path), text=False)
    torch.testing.assert_close(alone.image_features(data), images, atol=1e-5, rtol=1e-5)
    # where the whole SigLIP is there already, it is used
    del tower, alone
    gc.collect()
    whole = load_transformers(folders["siglip"])
    assert load_transformers(folders["siglip"], text=False) is whole


def test_half_precision_weights_are_computed_in_float32(folders, tmp_path):
    model = transformers.CLIPModel.from_pretrained(folders["clip"]).half()
    model.save_pretrained(tmp_path)
    tower = load_transformers(str(tmp_path), folders["clip"])
    assert {p.dtype for p in tower.network.parameters()} == {torch.float32}


def test_a_tower_warns_of_a_prompt_it_cannot_read_whole(folders):
    tower = load_tower(f"transformers:{folders['clip']}")
    fits, too_long = "a " * 22, "a " * 23  # and the start and end tokens
    with pytest.warns(UserWarning) as caught:
        tower.text_features([fits, too_long])
    assert [str(w.message) for w in caught] == [
        f"transformers:{folders['clip']} reads only the first 24 tokens of {too_long!r}"
    ]


def test_weights_are_never_random(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    save_transformers_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its clip .*visual_projection.weight"):
        load_tower(f"transformers:{tmp_path}")


def test_load_tower_says_what_is_wrong(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_tower(f"transformers:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_tower(f"transformers:{tmp_path}/nothing")
    with pytest.raises(ValueError, match="has its own weights"):
        load_tower(f"transformers:{folders['clip']}", "openai")
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is no folder here"):
        load_tower("transformers:nobody/nothing")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert model, which does not embed images and text"):
        load_tower(f"transformers:{tmp_path}")
    transformers.CLIPModel.from_pretrained(folders["clip"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="must hold the image processor and tokenizer"):
        load_tower(f"transformers:{tmp_path}/bare")


@pytest.mark.parametrize(
    "settings",
    [
        dict(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        dict(size={"shortest_edge": 32}, do_center_crop=False),
        dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=0),
    ],
)
def test_preprocessing_that_cannot_be_reproduced_is_refused(folders, tmp_path, settings):
    save_transformers_clip(tmp_path)
    transformers.CLIPImageProcessor(**settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not one of those known here"):
        load_tower(f"transformers:{tmp_path}")


# --------------------------------------------------------------------------------------------
# Sharing
# --------------------------------------------------------------------------------------------


def test_equal_specs_share_one_tower_while_anyone_holds_it(folders, monkeypatch):
    folder = folders["open_clip"]
    tower = load_tower(f"local-dir:{folder}")
    assert load_tower(folder) is tower  # the layout is recognised
    assert load_tower(f"local-dir:{folder}/../{folder.rsplit('/', 1)[1]}") is tower
    assert make_reward("clip_score", model=folder, exact=True).tower is tower
    assert load_tower(folders["clip"]) is load_tower(f"transformers:{folders['clip']}")
    assert load_tower("embedded:clip_guide") is not load_tower("embedded:clip_judge")
    gone = weakref.ref(tower)
    del tower
    gc.collect()
    assert gone() is None


@pytest.fixture
def pair(folders, tmp_path):
    """clip_score and aesthetic on one tower, and the calls its network has had."""
    state = linear_head(16, [f"layers.{i}" for i in (0, 2, 4, 6, 7)])
    torch.save(state, tmp_path / "head.pth")
    model = folders["open_clip"]
    rewards = [
        make_reward("clip_score", model=model),
        make_reward("aesthetic", head=str(tmp_path / "head.pth"), model=model),
    ]
    tower = rewards[0].tower
    calls = []
    handle = tower.network.visual.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    yield rewards, calls
    handle.remove()


def values(rewards, samples) -> torch.Tensor:
    return torch.stack([evaluate(reward, samples).value for reward in rewards])


def test_a_shared_tower_runs_once_a_batch_and_nothing_is_kept(pair):
    rewards, calls = pair
    samples = to_samples(photos(4, 48, 64), PROMPTS)
    apart = values(rewards, samples)
    assert calls == [4, 4]
    with share_towers():
        assert torch.equal(values(rewards, samples), apart)
        assert calls == [4, 4, 4]
        with share_towers():  # joins
            assert torch.equal(values(rewards, samples), apart)
        assert torch.equal(values(rewards, samples), apart)
        assert calls == [4, 4, 4]
        assert torch.equal(values(rewards, to_samples(photos(4, 48, 64), PROMPTS)), apart)
        assert calls == [4] * 4  # equal, but another tensor
    values(rewards, samples)
    assert calls == [4] * 6
    with share_towers():
        values(rewards, samples)
        other = make_reward("clip_score", model=rewards[0].info.weights, exact=True)
        values([other], samples)
    assert calls == [4] * 8  # exact pixels are other pixels


def test_prepared_images_share_too_and_score_the_same(pair):
    rewards, calls = pair
    samples = to_samples(photos(4, 48, 64), PROMPTS)
    apart = values(rewards, samples)
    prepared = rewards[0].preprocess(samples.data)
    calls.clear()
    with share_towers():
        for reward, expected in zip(rewards, apart, strict=True):
            assert torch.equal(reward.score_prepared(prepared, PROMPTS).value, expected)
    assert calls == [4]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_images_modified_in_place_are_scored_anew(pair, mode):
    rewards, calls = pair
    samples = to_samples(photos(4, 48, 64), PROMPTS)
    changed = to_samples(photos(4, 48, 64, seed=1), PROMPTS)
    expected = values(rewards, changed)
    calls.clear()
    with mode(), share_towers():
        samples.data = samples.data.clone()  # in inference mode: a tensor that counts no versions
        before = values(rewards, samples)
        samples.data.copy_(changed.data)
        after = values(rewards, samples)
    assert calls == [4, 4]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after.clone(), expected)


def test_a_gradient_is_never_lost_to_sharing(pair):
    rewards, calls = pair
    samples = to_samples(photos(2, 48, 64), PROMPTS[:2])
    with share_towers():
        with torch.no_grad():
            values(rewards, samples)
        values(rewards, samples)
        samples.data.requires_grad_()
        total = values(rewards, samples).sum()
        (shared,) = torch.autograd.grad(total, samples.data)
        assert calls == [2, 2, 2]
    apart = torch.zeros_like(shared)
    for reward in rewards:
        apart += torch.autograd.grad(evaluate(reward, samples).value.sum(), samples.data)[0]
    assert shared.abs().sum() > 0
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=1e-4)


def test_within_a_long_block_features_go_with_their_images(pair):
    rewards, _ = pair
    with share_towers():
        samples = to_samples(photos(2, 32, 32), PROMPTS[:2])
        with torch.no_grad():
            features = rewards[0].tower.encode(rewards[0].preprocess(samples.data))
        gone = weakref.ref(features)
        del features
        assert gone() is not None
        del samples
        gc.collect()
        assert gone() is None


def test_rewards_of_a_shared_tower_are_right(pair, tmp_path):
    """The shared numbers against the formula: a cosine, and an affine map of the unit vector."""
    rewards, _ = pair
    samples = to_samples(photos(4, 32, 32), PROMPTS)
    with share_towers(), torch.no_grad():
        shared = values(rewards, samples)
    network = rewards[0].tower.network
    with torch.no_grad():
        pixels = (samples.data - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        a, b = network.encode_image(pixels), rewards[0].tower.text_features(PROMPTS)
    torch.testing.assert_close(shared[0], torch.cosine_similarity(a, b), atol=1e-5, rtol=0)
    head = torch.load(tmp_path / "head.pth", weights_only=True)
    expected = affine(head, a / a.norm(dim=1, keepdim=True)).float()
    torch.testing.assert_close(shared[1], expected, atol=1e-4, rtol=1e-5)

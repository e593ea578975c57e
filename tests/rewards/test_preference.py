"""PickScore, HPSv2 and the SigLIP aesthetics against the published formulas, on random weights."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as TF
import transformers
from PIL import Image
from safetensors.torch import save_file
from tiny_towers import (
    affine,
    assert_gap,
    linear_head,
    open_clip_architecture,
    photos,
    save_siglip,
    save_transformers_clip,
    to_samples,
)

import diffreward.rewards.preference  # noqa: F401  (registers them)
from diffreward.rewards import available_rewards, evaluate, make_reward
from diffreward.rewards.testing import check_reward

PROMPTS = ["a red heart", "two stars", "", "a"]
SIZES = [(32, 32), (48, 81), (20, 24), (100, 33)]


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "siglip_aesthetic"])
def test_what_is_declared(name):
    info = available_rewards()[name]
    assert info.modality == "image" and info.differentiable
    assert info.needs_prompt is (name != "siglip_aesthetic")
    assert info.needs_download and "arXiv" in info.source and info.licence


# --------------------------------------------------------------------------------------------
# PickScore
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_transformers_clip(tmp_path_factory.mktemp("pickscore"))


def pickscore_truth(folder: Path, pixels: np.ndarray, prompts: list[str]) -> torch.Tensor:
    """exp(logit_scale) times the cosine, one sample at a time, through PIL, as its model card."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scores = []
    with torch.no_grad():
        for image, prompt in zip(pixels, prompts, strict=True):
            inputs = processor(Image.fromarray(image), return_tensors="pt")
            a = model.get_image_features(**inputs).pooler_output[0].double()
            tokens = tokenizer([prompt], padding=True, truncation=True, return_tensors="pt")
            b = model.get_text_features(**tokens).pooler_output[0].double()
            scores.append(model.logit_scale.exp() * (a @ b) / (a.norm() * b.norm()))
    return torch.stack(scores).float()


@pytest.mark.parametrize("size", SIZES)
def test_pickscore_is_the_model_cards_number_within_4_percent_of_the_spread(clip_folder, size):
    pixels, prompts = photos(8, *size), 2 * PROMPTS
    truth = pickscore_truth(clip_folder, pixels, prompts)
    spec = {"name": "pickscore", "model": str(clip_folder)}
    samples = to_samples(pixels, prompts)
    assert_gap(evaluate(make_reward(spec), samples).value, truth, percent=4)
    exact = evaluate(make_reward(spec, exact=True), samples).value
    torch.testing.assert_close(exact, truth, atol=5e-5, rtol=0)
    scale = transformers.CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    cosine = evaluate(make_reward(spec, exact=True, scaled=False), samples).value
    torch.testing.assert_close(cosine, truth / scale, atol=5e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"scaled": False, "chunk_size": 2}])
def test_pickscore_keeps_the_contract(clip_folder, options):
    reward = make_reward("pickscore", model=str(clip_folder), **options)
    assert reward.info.differentiable is not options.get("exact", False)
    assert reward.info.range[1] == (1.0 if "scaled" in options else reward.tower.logit_scale)
    check_reward(reward, to_samples(photos(4, 24, 40), PROMPTS))


def test_pickscore_takes_its_processor_from_where_the_authors_did(clip_folder, monkeypatch):
    asked = []

    def load(model, processor=None):
        asked.append((model, processor))
        raise InterruptedError

    monkeypatch.setattr("diffreward.rewards.preference.load_transformers", load)
    for options in ({}, {"model": "mine"}, {"model": "mine", "processor": "yours"}):
        with pytest.raises(InterruptedError):
            make_reward("pickscore", **options)
    laion = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert asked == [
        ("yuvalkirstain/PickScore_v1", laion),
        ("mine", None),
        ("mine", "yours"),
    ]


def test_pickscore_without_network_says_what_is_missing():
    with pytest.raises(FileNotFoundError, match="'yuvalkirstain/PickScore_v1' is no folder here"):
        make_reward("pickscore")


# --------------------------------------------------------------------------------------------
# HPSv2
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A folder of both published files for a tiny architecture, and its two networks."""
    folder = tmp_path_factory.mktemp("hps")
    networks = {}
    for version, file in {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}.items():
        network = open_clip_architecture(folder, "tiny-hps")
        if version == "2.1":
            for p in network.parameters():
                p.data *= 1.1
        torch.save({"state_dict": network.state_dict()}, folder / file)
        networks[version] = network
    return folder, networks


def hps_truth(network, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The authors' computation: resize in float by torchvision, black bars, cosine."""
    cosines = []
    for image, prompt in zip(images, prompts, strict=True):
        scale = 32 / max(image.shape[1:])
        if scale != 1:
            h, w = (round(side * scale) for side in image.shape[1:])
            image = TF.resize(image, [h, w], TF.InterpolationMode.BICUBIC)
            down, across = 32 - h, 32 - w
            image = TF.pad(
                image, [across // 2, down // 2, across - across // 2, down - down // 2], fill=0
            )
        image = TF.normalize(image, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        with torch.no_grad():
            a = network.encode_image(image[None])[0].double()
            b = network.encode_text(open_clip.tokenize([prompt], context_length=32))[0].double()
        cosines.append((a @ b) / (a.norm() * b.norm()))
    return torch.stack(cosines).float()


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_is_the_authors_letterboxed_cosine_without_a_gap(hps, version, size):
    folder, networks = hps
    samples = to_samples(photos(4, *size), PROMPTS)
    truth = hps_truth(networks[version], samples.data, PROMPTS)
    assert truth.std() > 0.01
    spec = {"name": "hpsv2", "version": version, "weights": str(folder), "model": "tiny-hps"}
    value = evaluate(make_reward(spec), samples).value
    torch.testing.assert_close(value, truth, atol=2e-6, rtol=0)
    exact = make_reward(spec, exact=True)
    torch.testing.assert_close(evaluate(exact, samples).value, truth, atol=2e-6, rtol=0)
    # between the steps of 8 bits, exact is the score of the nearest file
    between = to_samples(photos(4, *size), PROMPTS)
    between.data = (between.data + 0.001).clamp(0, 1)
    torch.testing.assert_close(evaluate(exact, between).value, truth, atol=2e-6, rtol=0)


def test_hpsv2_sees_the_edges_of_a_long_image(hps):
    """Cropped, as the plain CLIP does, it would not."""
    folder, _ = hps
    images = torch.full((2, 3, 32, 128), 0.5)
    images[1, :, :, :8] = 1
    reward = make_reward("hpsv2", weights=str(folder), model="tiny-hps")
    value = reward.score_prepared(reward.preprocess(images), ["a", "a"]).value
    assert (value[0] - value[1]).abs() > 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_hpsv2_keeps_the_contract(hps, exact):
    folder, _ = hps
    file = str(folder / "HPS_v2_compressed.pt")
    reward = make_reward("hpsv2", weights=file, model="tiny-hps", exact=exact, chunk_size=3)
    assert reward.info.weights == file and reward.info.differentiable is not exact
    check_reward(reward, to_samples(photos(4, 24, 40), PROMPTS))


def test_hpsv2_versions_and_missing_files(hps, tmp_path):
    folder, _ = hps
    options = {"weights": str(folder), "model": "tiny-hps"}
    for version, file in ((2.1, "v2.1"), ("v2.0", "v2"), (2.0, "v2")):  # YAML reads 2.1 as a number
        reward = make_reward("hpsv2", version=version, **options)
        assert reward.info.weights == f"{folder}/HPS_{file}_compressed.pt"
    with pytest.raises(ValueError, match=r"comes in 2.0 and 2.1, but version 3 came"):
        make_reward("hpsv2", version="3", **options)
    with pytest.raises(FileNotFoundError, match=r"HPS_v2.1_compressed.pt"):
        make_reward("hpsv2", weights=str(tmp_path), model="tiny-hps")
    with pytest.raises(FileNotFoundError, match=r"xswu/HPSv2/HPS_v2.1_compressed.pt .*yourself"):
        make_reward("hpsv2")


# --------------------------------------------------------------------------------------------
# Aesthetic predictor v2.5
# --------------------------------------------------------------------------------------------

LAYERS = [f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)]  # of aesthetic_predictor_v2_5.pth


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = save_siglip(tmp_path_factory.mktemp("siglip"))
    torch.save(linear_head(32, LAYERS), folder / "aesthetic_predictor_v2_5.pth")
    save_file(linear_head(32, LAYERS), folder / "head.safetensors")
    return folder


def siglip_truth(folder: Path, pixels: np.ndarray) -> torch.Tensor:
    model = transformers.SiglipModel.from_pretrained(folder).eval().vision_model
    processor = transformers.SiglipImageProcessorPil.from_pretrained(folder)
    inputs = processor([Image.fromarray(image) for image in pixels], return_tensors="pt")
    with torch.no_grad():
        a = model(**inputs).pooler_output
    state = torch.load(folder / "aesthetic_predictor_v2_5.pth", weights_only=True)
    return affine(state, a / a.norm(dim=1, keepdim=True)).float()


@pytest.mark.parametrize("size", SIZES)
def test_siglip_aesthetic_is_the_published_formula_within_4_percent_of_the_spread(siglip, size):
    pixels = photos(8, *size)
    truth = siglip_truth(siglip, pixels)
    heads = [str(siglip / name) for name in ("aesthetic_predictor_v2_5.pth", "head.safetensors")]
    spec = {"name": "siglip_aesthetic", "head": heads[0], "model": str(siglip)}
    value = evaluate(make_reward(spec), to_samples(pixels)).value
    assert_gap(value, truth, percent=4)
    exact = evaluate(make_reward({**spec, "head": heads[1]}, exact=True), to_samples(pixels)).value
    torch.testing.assert_close(exact, truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("exact", [False, True])
def test_siglip_aesthetic_keeps_the_contract(siglip, exact):
    head = str(siglip / "aesthetic_predictor_v2_5.pth")
    reward = make_reward("siglip_aesthetic", head=head, model=str(siglip), exact=exact)
    assert reward.info.differentiable is not exact
    check_reward(reward, to_samples(photos(4, 24, 40)))


def test_siglip_aesthetic_refuses_laions_head(siglip, tmp_path):
    laion = [f"layers.{i}" for i in (0, 2, 4, 6, 7)]
    torch.save(linear_head(768, laion), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="expected scoring_head.0.weight.*it holds layers.0"):
        make_reward("siglip_aesthetic", head=str(tmp_path / "head.pth"), model=str(siglip))

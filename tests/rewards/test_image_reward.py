"""ImageReward against the published computation, written out in plain torch."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision import transforms

from diffreward.rewards import evaluate, make_reward
from diffreward.rewards.image_reward import MAX_TOKENS, ImageReward
from diffreward.rewards.testing import check_exact_agrees, check_reward
from diffreward.samples import Samples

WORDS = ["a", "red", "heart", "blue", "circle", "above", "two", "stars", ",", "."]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PROMPTS = ["a red heart", "a blue circle above two stars", "stars", "a red heart, a blue circle."]
SIDE, PATCH, WIDTH, HIDDEN, LAYERS = 32, 8, 128, 32, 2
MED_CONFIG = {
    "architectures": ["BertModel"],
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "vocab_size": len(VOCABULARY) + 2,  # [DEC] and [ENC]
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "encoder_width": 768,  # the published file says so, though the network's is 1024
    "add_cross_attention": True,
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def published_weights() -> dict[str, Tensor]:
    """Random weights under the names of the published checkpoint."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def linear(name, into, out):
        weights[f"{name}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        weights[f"{name}.bias"] = torch.randn(out, generator=generator) / 4

    def norm(name, size):
        weights[f"{name}.weight"] = 1 + torch.randn(size, generator=generator) / 4
        weights[f"{name}.bias"] = torch.randn(size, generator=generator) / 4

    def table(name, *shape):
        weights[name] = torch.randn(*shape, generator=generator) / 2

    vit = "blip.visual_encoder"
    table(f"{vit}.cls_token", 1, 1, WIDTH)
    table(f"{vit}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, WIDTH)
    linear(f"{vit}.patch_embed.proj", 3 * PATCH**2, WIDTH)
    kernel = weights[f"{vit}.patch_embed.proj.weight"]
    weights[f"{vit}.patch_embed.proj.weight"] = kernel.view(WIDTH, 3, PATCH, PATCH)
    for name in list(weights):  # small, so that the epsilon of the first norm counts
        weights[name] = weights[name] / 40
    for i in range(LAYERS + 1):  # deeper than the text encoder
        norm(f"{vit}.blocks.{i}.norm1", WIDTH)
        linear(f"{vit}.blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{vit}.blocks.{i}.attn.proj", WIDTH, WIDTH)
        norm(f"{vit}.blocks.{i}.norm2", WIDTH)
        linear(f"{vit}.blocks.{i}.mlp.fc1", WIDTH, 4 * WIDTH)
        linear(f"{vit}.blocks.{i}.mlp.fc2", 4 * WIDTH, WIDTH)
    norm(f"{vit}.norm", WIDTH)

    bert = "blip.text_encoder"
    weights[f"{bert}.embeddings.position_ids"] = torch.arange(40)[None]
    table(f"{bert}.embeddings.word_embeddings.weight", MED_CONFIG["vocab_size"], HIDDEN)
    table(f"{bert}.embeddings.position_embeddings.weight", 40, HIDDEN)
    norm(f"{bert}.embeddings.LayerNorm", HIDDEN)
    for i in range(LAYERS):
        layer = f"{bert}.encoder.layer.{i}"
        for attention, width in (("attention", HIDDEN), ("crossattention", WIDTH)):
            linear(f"{layer}.{attention}.self.query", HIDDEN, HIDDEN)
            linear(f"{layer}.{attention}.self.key", width, HIDDEN)
            linear(f"{layer}.{attention}.self.value", width, HIDDEN)
            linear(f"{layer}.{attention}.output.dense", HIDDEN, HIDDEN)
            norm(f"{layer}.{attention}.output.LayerNorm", HIDDEN)
        linear(f"{layer}.intermediate.dense", HIDDEN, 48)
        linear(f"{layer}.output.dense", 48, HIDDEN)
        norm(f"{layer}.output.LayerNorm", HIDDEN)
    linear("blip.vision_proj", WIDTH, 8)  # of BLIP's contrastive loss: not used
    linear("blip.text_proj", HIDDEN, 8)
    sizes = [HIDDEN, 24, 16, 8, 4, 1]
    for n, into, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        linear(f"mlp.layers.{n}", into, out)
    return weights


def save_tokenizer(folder):
    from transformers import BertTokenizer

    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)


@pytest.fixture(scope="module")
def weights():
    return published_weights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return make_reward({"name": "image_reward", "path": str(folder)})


def photos(b: int, h: int, w: int) -> np.ndarray:
    """(b, h, w, 3) uint8: smooth colour fields, a hard-edged rectangle and some grain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:h, 0:w][..., None] / 16
    images = 128 + 100 * np.sin(
        rng.uniform(0.5, 2, (b, 1, 1, 3)) * x + rng.uniform(-1, 1, (b, 1, 1, 3)) * y
    )
    images[:, h // 4 : h // 2, w // 4 : 3 * w // 4] = rng.uniform(0, 255, (b, 1, 1, 3))
    return (images + rng.normal(0, 3, images.shape)).clip(0, 255).round().astype(np.uint8)


def to_samples(pixels: np.ndarray, prompts: list[str] | None = PROMPTS) -> Samples:
    return Samples(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, "image", prompts)


# --------------------------------------------------------------------------------------------
# The published computation: one image, one prompt, no padding, in double precision
# --------------------------------------------------------------------------------------------


def published_score(weights: dict[str, Tensor], pixels: np.ndarray, prompt: str) -> float:
    p = {name: weight.double() for name, weight in weights.items()}

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def attend(query, key, value, heads):
        out = []
        for q, k, v in zip(*(t.chunk(heads, dim=-1) for t in (query, key, value)), strict=True):
            logits = q @ k.T / math.sqrt(q.shape[-1])
            out.append((logits - logits.logsumexp(-1, keepdim=True)).exp() @ v)
        return torch.cat(out, dim=-1)

    # the image, as torchvision prepares it in PIL
    prepare = transforms.Compose([
        transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(SIDE),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    image = prepare(Image.fromarray(pixels)).double()

    # ViT, pre-norm (Dosovitskiy et al. 2021)
    vit = "blip.visual_encoder"
    patches = [
        image[:, top : top + PATCH, left : left + PATCH].reshape(-1)
        for top in range(0, SIDE, PATCH)
        for left in range(0, SIDE, PATCH)
    ]
    kernel = p[f"{vit}.patch_embed.proj.weight"].flatten(1)
    x = torch.stack(patches) @ kernel.T + p[f"{vit}.patch_embed.proj.bias"]
    x = torch.cat([p[f"{vit}.cls_token"][0], x]) + p[f"{vit}.pos_embed"][0]
    for i in range(LAYERS + 1):
        block = f"{vit}.blocks.{i}"
        query, key, value = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(
            3, dim=-1
        )
        x = x + linear(attend(query, key, value, WIDTH // 64), f"{block}.attn.proj")
        hidden = gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    seen = norm(x, f"{vit}.norm", 1e-6)

    # BERT, post-norm (Devlin et al. 2019), with cross-attention in every layer (Li et al. 2022)
    bert = "blip.text_encoder"
    words = prompt.replace(",", " ,").replace(".", " .").split()
    ids = [VOCABULARY.index(word) for word in ["[CLS]", *words, "[SEP]"]]
    x = p[f"{bert}.embeddings.word_embeddings.weight"][ids]
    x = x + p[f"{bert}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x, f"{bert}.embeddings.LayerNorm", 1e-12)
    for i in range(LAYERS):
        layer = f"{bert}.encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            name = f"{layer}.{attention}"
            source = x if attention == "attention" else seen
            attended = attend(
                linear(x, f"{name}.self.query"),
                linear(source, f"{name}.self.key"),
                linear(source, f"{name}.self.value"),
                MED_CONFIG["num_attention_heads"],
            )
            x = norm(
                x + linear(attended, f"{name}.output.dense"), f"{name}.output.LayerNorm", 1e-12
            )
        hidden = linear(gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(x + hidden, f"{layer}.output.LayerNorm", 1e-12)

    # the head, without activations, and its standardisation
    score = x[0]
    for n in (0, 2, 4, 6, 7):
        score = linear(score, f"mlp.layers.{n}")
    return (score.item() - 0.16717362830052426) / 1.0333394966054072


def published_scores(weights, pixels, prompts=PROMPTS) -> Tensor:
    pairs = zip(pixels, prompts, strict=True)
    return torch.tensor([published_score(weights, *pair) for pair in pairs])


@pytest.mark.parametrize(
    ("size", "gap"),
    # at the network's own size nothing is resized; otherwise PIL rounds to 8 bits, twice
    [((32, 32), 1e-5), ((64, 64), 5e-3), ((48, 81), 5e-3), ((20, 24), 5e-3)],
)
def test_it_is_the_published_score(reward, folder, weights, size, gap):
    pixels = photos(4, *size)
    truth = published_scores(weights, pixels)
    assert truth.std() > 0.05  # well above the gap
    value = evaluate(reward, to_samples(pixels)).value
    torch.testing.assert_close(value, truth, atol=gap, rtol=0)
    exact = make_reward({"name": "image_reward", "path": str(folder), "exact": True})
    value = evaluate(exact, to_samples(pixels)).value
    torch.testing.assert_close(value, truth, atol=1e-5, rtol=0)
    check_exact_agrees(reward, exact, to_samples(pixels), gap)


def test_image_and_prompt_both_count(reward):
    pixels = photos(4, 32, 32)
    own = evaluate(reward, to_samples(pixels)).value
    other_prompt = evaluate(reward, to_samples(pixels, PROMPTS[::-1])).value
    other_image = evaluate(reward, to_samples(pixels[::-1].copy())).value
    assert (own - other_prompt).abs().min() > 0.01
    assert (own - other_image).abs().min() > 0.01
    torch.testing.assert_close(other_prompt.flip(0), other_image, atol=1e-5, rtol=0)


def test_a_long_prompt_is_cut_to_35_tokens_with_a_warning(reward, weights):
    fits = ["a red"] + ["heart"] * (MAX_TOKENS - 4)  # and [CLS], [SEP]
    fits, too_long = " ".join(fits), " ".join([*fits, "blue", "blue"])
    samples = to_samples(photos(2, 32, 32), [fits, too_long])
    with pytest.warns(UserWarning) as caught:
        value = evaluate(reward, samples).value
    assert [str(w.message) for w in caught] == [
        f"reward 'image_reward' reads only the first 35 tokens of {too_long!r}"
    ]
    # what is cut is the end of the prompt: [SEP] stays
    truth = published_scores(weights, photos(2, 32, 32), [fits, fits])
    torch.testing.assert_close(value, truth, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------
# Contract
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"exact": True}])
def test_it_keeps_the_contract(folder, options):
    reward = make_reward({"name": "image_reward", "path": str(folder), **options})
    assert reward.info.differentiable is not options.get("exact", False)
    check_reward(reward, to_samples(photos(4, 40, 48)))


def test_prepared_images_score_the_same(reward):
    samples = to_samples(photos(4, 40, 48))
    prepared = reward.preprocess(samples.data)
    assert prepared.shape == (4, 3, SIDE, SIDE)
    torch.testing.assert_close(
        reward.score_prepared(prepared, samples.prompts).value, evaluate(reward, samples).value
    )
    for prompts, came in ((None, "none came"), (PROMPTS[:2], "2 came")):
        with pytest.raises(ValueError, match=f"needs 4 prompts, but {came}"):
            reward.score_prepared(prepared, prompts)


def test_the_gradient_is_that_of_finite_differences(reward):
    samples = to_samples(photos(1, 32, 32), PROMPTS[:1])
    data = samples.data.clone().requires_grad_()
    samples = dataclasses.replace(samples, data=data)
    (gradient,) = torch.autograd.grad(evaluate(reward, samples).value.sum(), data)
    step = 2e-3 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (
            evaluate(reward, dataclasses.replace(samples, data=data + sign * step)).value
            for sign in (1, -1)
        )
    slope = (up - down).item() / (2 * 2e-3)
    assert slope == pytest.approx(gradient.norm().item(), rel=0.02)


def test_networks_are_frozen_in_float32(reward):
    assert not reward.network.training
    assert not any(p.requires_grad for p in reward.network.parameters())
    assert {p.dtype for p in reward.network.parameters()} == {torch.float32}
    assert reward.to("cpu") is reward


# --------------------------------------------------------------------------------------------
# Finding and reading checkpoints
# --------------------------------------------------------------------------------------------


def test_file_safetensors_and_hub_id_are_one_reward(reward, folder, weights, tmp_path, monkeypatch):
    save_file(weights, tmp_path / "ImageReward.safetensors")
    (tmp_path / "med_config.json").write_text(json.dumps(MED_CONFIG))
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    samples = to_samples(photos(4, 32, 32))
    expected = evaluate(reward, samples).value
    for options in (
        {"path": str(folder / "ImageReward.pt")},
        {"path": str(tmp_path), "tokenizer": str(folder)},
        {},
    ):
        value = evaluate(make_reward("image_reward", **options), samples).value
        torch.testing.assert_close(value, expected, atol=0, rtol=0)
    assert asked == [("THUDM/ImageReward", n) for n in ("ImageReward.pt", "med_config.json")]


def test_loading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    ImageReward(str(folder))
    assert torch.equal(torch.get_rng_state(), state)


def test_it_says_what_is_wrong_with_a_checkpoint(folder, weights, tmp_path):
    def make(weights, config=MED_CONFIG):
        torch.save(weights, tmp_path / "ImageReward.pt")
        (tmp_path / "med_config.json").write_text(json.dumps(config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ImageReward(str(tmp_path), tokenizer=str(folder))

    make(weights)
    lacking = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    for name, message in (
        (lacking, r"lacks encoder\.layer\.1\.crossattention\.self\.key\.bias \(1 in all\)"),
        ("blip.visual_encoder.blocks.0.norm1.weight", r"lacks encoder\.layers\.0\.layer_norm1"),
        ("blip.visual_encoder.patch_embed.proj.weight", "no checkpoint of ImageReward"),
    ):
        with pytest.raises(ValueError, match=message):
            make({n: w for n, w in weights.items() if n != name})
    with pytest.raises(ValueError, match=r"does not need, but has, encoder\.layer\.1\."):
        make(weights, {**MED_CONFIG, "num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"has in another shape .*intermediate"):
        make(weights, {**MED_CONFIG, "intermediate_size": 40})
    with pytest.raises(ValueError, match="no checkpoint of ImageReward"):
        make({"weight": torch.zeros(1)})
    small = {**weights, "blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(9, 32)}
    with pytest.raises(ValueError, match=r"tokenizer has 17 tokens, but the network .* knows 9"):
        make(small, {**MED_CONFIG, "vocab_size": 9})


def test_it_says_what_is_missing(tmp_path, weights):
    with pytest.raises(FileNotFoundError, match="neither a file, nor a folder, nor a hub id"):
        ImageReward(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"has neither ImageReward.safetensors nor Image"):
        ImageReward(str(tmp_path))
    torch.save(weights, tmp_path / "ImageReward.pt")
    with pytest.raises(FileNotFoundError, match=r"med_config.json is missing"):
        ImageReward(str(tmp_path))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, but 0 came"):
        ImageReward(str(tmp_path), chunk_size=0)

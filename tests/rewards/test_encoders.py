"""Encoders against open_clip, transformers, diffusers and torch-fidelity called directly."""

import copy
import gc
import itertools
import subprocess
import sys
from dataclasses import replace

import diffusers
import numpy as np
import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tiny_towers import photos, save_open_clip, save_siglip, save_transformers_clip, to_samples
from torch import nn

from diffreward._assets import asset_path
from diffreward.rewards import encoders, registry
from diffreward.rewards.embedding_cache import Cached, content_hashes
from diffreward.rewards.encoders import (
    Encoder,
    available_encoders,
    embed,
    make_encoder,
    network_key,
    register_encoder,
)
from diffreward.rewards.exemplars import load_exemplars
from diffreward.samples import ALPHABETS, Samples, to_tokens

close = torch.testing.assert_close
WORDS = ["MKTAYIAKQR", "GAVLIPFWYC", "HHHHHHDEDE"]
VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-"]
VOCABULARY += ["<null_1>", "<mask>"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    save = {
        "open_clip": save_open_clip, "clip": save_transformers_clip, "siglip": save_siglip,
        "dino": save_dino, "registers": save_registers, "esm": save_esm,
    }  # fmt: skip
    return {kind: str(build(tmp_path_factory.mktemp(kind))) for kind, build in save.items()}


def save_dino(folder, cls=transformers.Dinov2Model, config=transformers.Dinov2Config, **more):
    """As DINOv2 is published: a network, and an image processor that resizes and crops."""
    torch.manual_seed(4)
    side = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
    cls(config(**side, image_size=48, **more)).save_pretrained(folder)
    transformers.BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32},
        image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.25, 0.3),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_registers(folder):
    model = transformers.Dinov2WithRegistersModel
    return save_dino(folder, model, transformers.Dinov2WithRegistersConfig, num_register_tokens=3)


def save_esm(folder):
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    config = transformers.EsmConfig(
        vocab_size=len(VOCABULARY), mask_token_id=32, pad_token_id=1, hidden_size=16,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=28, position_embedding_type="rotary", token_dropout=True,
        initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.EsmForMaskedLM(config).save_pretrained(folder)
    transformers.EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def tokens(modality, words):
    return Samples(torch.stack([to_tokens(word, modality) for word in words]), modality)


def relaxed(modality, words, mixed=0.0):
    """One-hot letters, mixed with random distributions."""
    x = F.one_hot(tokens(modality, words).data, len(ALPHABETS[modality])).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    return Samples((1 - mixed) * x + mixed * noise / noise.sum(-1, keepdim=True), modality)


def check(encoder, samples, parts=True):
    """Finite rows that differ, whatever the batch; nothing in the network asks for gradients."""
    for what in (False, True) if parts else (False,):
        whole = embed(encoder, samples, what)
        backwards = samples.take(range(len(samples))[::-1])
        close(embed(encoder, backwards, what).flip(0), whole, atol=1e-5, rtol=1e-4)
        each = [embed(encoder, samples.take([i]), what) for i in range(len(samples))]
        close(torch.cat(each), whole, atol=1e-5, rtol=1e-4)
        spread = whole.flatten(1)
        assert torch.cdist(spread, spread)[0, 1:].min() > 1e-3
        assert not whole.requires_grad and whole.dtype in (torch.float32, torch.float64)
    network = getattr(encoder, "network", None)
    if network is not None:
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def check_gradient(function, x, step=1e-3, rtol=1e-2):
    """Of a random projection of what comes out, along the gradient itself."""
    with torch.no_grad():
        there = function(x)
        weights = torch.randn(there.shape, generator=torch.Generator().manual_seed(1)).to(there)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((function(leaf) * weights).sum(), leaf)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ends = [(function(x + e * direction) * weights).sum().double() for e in (step, -step)]
    assert gradient.norm() > 1e-4
    numeric = (ends[0] - ends[1]) / (2 * step)
    close(numeric, gradient.norm().double(), rtol=rtol, atol=0)


# --------------------------------------------------------------------------------------------
# CLIP
# --------------------------------------------------------------------------------------------


def open_clip_truth(folder, pixels):
    """Embeddings and patch tokens by open_clip alone, through PIL, one image at a time."""
    network, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    network.eval().visual.output_tokens = True
    with torch.no_grad():
        found = [network.visual(transform(Image.fromarray(p))[None]) for p in pixels]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def test_clip_is_open_clips(folders):
    pixels = photos(3, 40, 56)
    embeddings, patches = open_clip_truth(folders["open_clip"], pixels)
    encoder = make_encoder("clip", model=folders["open_clip"], exact=True, normalise=False)
    close(encoder(to_samples(pixels)), embeddings, atol=1e-5, rtol=1e-4)
    close(encoder.parts(to_samples(pixels)), patches, atol=1e-5, rtol=1e-4)
    assert patches.shape == (3, 16, 32)
    assert encoder.differentiable is False
    normal = make_encoder("clip", model=folders["open_clip"], exact=True)
    close(normal(to_samples(pixels)), F.normalize(embeddings), atol=1e-5, rtol=1e-4)
    close(normal.parts(to_samples(pixels)), patches, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_clip_is_transformers(folders, kind):
    pixels = photos(3, 40, 56)
    network = transformers.AutoModel.from_pretrained(folders[kind]).eval()
    cls = {"clip": "CLIPImageProcessorPil", "siglip": "SiglipImageProcessorPil"}[kind]
    processor = getattr(transformers, cls).from_pretrained(folders[kind])
    prepared = processor([Image.fromarray(p) for p in pixels], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        vision = network.vision_model(pixel_values=prepared)
        features = network.get_image_features(pixel_values=prepared).pooler_output
    encoder = make_encoder(
        "clip", model=f"transformers:{folders[kind]}", exact=True, normalise=False
    )
    close(encoder(to_samples(pixels)), features, atol=1e-5, rtol=1e-4)
    patches = vision.last_hidden_state
    if kind == "clip":  # of which transformers normalises the class token only
        patches = network.vision_model.post_layernorm(patches[:, 1:])
        close(network.vision_model.post_layernorm(vision.last_hidden_state[:, 0]),
              vision.pooler_output)  # fmt: skip
    assert patches.shape == (3, 16, 32)
    close(encoder.parts(to_samples(pixels)), patches, atol=1e-5, rtol=1e-4)


def test_clip_keeps_the_contract_and_has_a_gradient(folders):
    encoder = make_encoder("clip", model=folders["open_clip"], chunk_size=2)
    check(encoder, to_samples(photos(5, 40, 56)))
    images = to_samples(photos(2, 32, 32)).data
    for call in (encoder, encoder.parts):
        check_gradient(lambda x, call=call: call(Samples(x, "image")), images, step=1e-2, rtol=0.02)


def test_texts_are_embedded_where_their_images_are():
    """The embedded CLIP knows which of these words each embedded picture shows."""
    encoder = make_encoder("clip")
    names = ["00-a-red-heart", "01-a-green-star", "02-a-yellow-circle", "03-a-purple-ring"]
    pixels = [np.asarray(Image.open(asset_path(f"samples/{n}.png")).convert("RGB")) for n in names]
    images = encoder(to_samples(np.stack(pixels)))
    texts = encoder.texts([name[3:].replace("-", " ") for name in names])
    close(texts.norm(dim=1), torch.ones(4))
    assert torch.equal((images @ texts.T).argmax(dim=1), torch.arange(4))
    assert torch.equal((images @ texts.T).argmax(dim=0), torch.arange(4))


def test_the_embedded_judge_has_another_key_and_a_copy_the_same(folders, tmp_path):
    guide, judge = make_encoder("clip"), make_encoder("clip", model="embedded:clip_judge")
    assert guide.key.startswith("clip-") and guide.key != judge.key
    copy = tmp_path / "copy"
    copy.symlink_to(folders["open_clip"])
    one, two = (make_encoder("clip", model=str(f)) for f in (folders["open_clip"], copy))
    assert one.key == two.key
    other = [make_encoder("clip", model=folders["open_clip"], **{o: v}).key
             for o, v in [("exact", True), ("normalise", False)]]  # fmt: skip
    assert len({one.key, *other}) == 3
    assert make_encoder("clip", model=folders["open_clip"], chunk_size=3).key == one.key


# --------------------------------------------------------------------------------------------
# DINO
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dino", "registers"])
@pytest.mark.parametrize("size", [(48, 48), (40, 57), (61, 44)])
def test_dino_is_transformers(folders, kind, size):
    pixels = photos(2, *size)
    network = transformers.AutoModel.from_pretrained(folders[kind]).eval()
    processor = transformers.BitImageProcessorPil.from_pretrained(folders[kind])
    prepared = processor([Image.fromarray(p) for p in pixels], return_tensors="pt")["pixel_values"]
    assert prepared.shape[-2:] == (32, 32)
    with torch.no_grad():
        hidden = network(pixel_values=prepared).last_hidden_state
    encoder = make_encoder("dino", model=folders[kind])
    encoder.preprocess = replace(encoder.preprocess, exact=True)  # 8 bits as PIL has
    close(encoder(to_samples(pixels)), hidden[:, 0], atol=1e-4, rtol=1e-3)
    close(encoder.parts(to_samples(pixels)), hidden[:, -16:], atol=1e-4, rtol=1e-3)
    assert hidden.shape[1] == 17 + 3 * (kind == "registers")


def test_dino_keeps_the_contract_and_has_a_gradient(folders):
    encoder = make_encoder("dino", model=folders["dino"], chunk_size=2)
    check(encoder, to_samples(photos(3, 40, 44)))
    images = to_samples(photos(2, 40, 40)).data
    for call in (encoder, encoder.parts):
        check_gradient(lambda x, call=call: call(Samples(x, "image")), images, step=1e-2, rtol=0.02)


def test_dinos_size_is_what_its_network_sees(folders):
    encoder = make_encoder("dino", model=folders["dino"], size=24)
    assert encoder.parts(to_samples(photos(2, 24, 36))).shape == (2, 9, 32)
    images = to_samples(photos(2, 24, 24)).data
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    with torch.no_grad():
        truth = encoder.network(pixel_values=(images - mean) / std).last_hidden_state[:, 0]
    close(encoder(Samples(images, "image")), truth)
    assert encoder.key != make_encoder("dino", model=folders["dino"]).key
    with pytest.raises(ValueError, match="multiple of the patch size 8, but 20 came"):
        make_encoder("dino", model=folders["dino"], size=20)


def test_dino_refuses_other_networks_and_missing_weights(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        make_encoder("dino", model=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no folder of a network"):
        make_encoder("dino", model="nobody/nothing")
    network = transformers.Dinov2Model.from_pretrained(folders["dino"])
    state = {k: v for k, v in network.state_dict().items() if "layer.1.norm1" not in k}
    network.save_pretrained(tmp_path / "half", state_dict=state)
    transformers.BitImageProcessor.from_pretrained(folders["dino"]).save_pretrained(
        tmp_path / "half"
    )
    with pytest.raises(ValueError, match="lacks 2 weights, .*norm1.bias: they would be random"):
        make_encoder("dino", model=str(tmp_path / "half"))


# --------------------------------------------------------------------------------------------
# Latents
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(5)
    tiny.vae(shift_factor=0.1, scaling_factor=0.5).save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize("where", ["vae", "."])
def test_vae_is_the_mean_latent_of_diffusers(vae_folder, where):
    samples = to_samples(photos(3, 16, 24))
    network = diffusers.AutoencoderKL.from_pretrained(vae_folder / "vae").eval()
    with torch.no_grad():
        latents = (network.encode(2 * samples.data - 1).latent_dist.mode() - 0.1) * 0.5
    b, c, h, w = latents.shape
    pooled = make_encoder("vae", model=str(vae_folder / where), chunk_size=2)
    close(pooled(samples), latents.mean(dim=(2, 3)), atol=1e-5, rtol=1e-4)
    flat = make_encoder("vae", model=str(vae_folder / where), pool="flatten")
    close(flat(samples).view(b, c, h, w), latents, atol=1e-5, rtol=1e-4)
    parts = pooled.parts(samples)
    close(parts[:, 2 * w + 1], latents[:, :, 2, 1], atol=1e-5, rtol=1e-4)
    close(parts.mean(dim=1), pooled(samples))
    assert parts.shape == (3, h * w, 4)
    check(pooled, samples)
    check_gradient(lambda x: flat(Samples(x, "image")), samples.data[:1], step=1e-2, rtol=0.02)


def test_vae_of_the_embedded_model_of_a_module_and_of_another_size(vae_folder):
    embedded = make_encoder("vae")
    assert embedded(to_samples(photos(2, 64, 64))).shape == (2, 16)
    assert embedded.parts(to_samples(photos(2, 64, 64))).shape == (2, 64, 16)
    network = diffusers.AutoencoderKL.from_pretrained(vae_folder / "vae")
    own = make_encoder("vae", model=network)
    named = make_encoder("vae", model=str(vae_folder))
    samples = to_samples(photos(2, 16, 16))
    close(own(samples), named(samples))
    assert own.key == named.key != embedded.key
    sized = make_encoder("vae", model=network, size=16, pool="flatten")
    assert sized(to_samples(photos(2, 32, 24))).shape == sized(samples).shape
    close(sized(samples), make_encoder("vae", model=network, pool="flatten")(samples))
    keys = {sized.key, own.key, make_encoder("vae", model=network, pool="flatten").key}
    assert len(keys) == 3
    with pytest.raises(ValueError, match="mean or flatten, but 'max' came"):
        make_encoder("vae", pool="max")
    with pytest.raises(FileNotFoundError, match="subfolder='vae'"):
        make_encoder("vae", model="nobody/nothing")


# --------------------------------------------------------------------------------------------
# Inception
# --------------------------------------------------------------------------------------------


def test_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"diffreward\[inception\]"):
        make_encoder("inception")


def test_inception_is_torch_fidelitys(tmp_path, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    cls, file = fidelity.FeatureExtractorInceptionV3, tmp_path / "random.pth"
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(cls, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        truth = cls("truth", ["2048"])
    for module in truth.modules():  # torch's default lets all images fade to the same features
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(truth.state_dict(), file)
    samples = to_samples(photos(3, 40, 56))
    rounded = make_encoder("inception", weights=str(file), exact=True)
    with torch.no_grad():
        expected = truth((samples.data * 255).round().to(torch.uint8))[0]
    close(rounded(samples), expected, atol=1e-5, rtol=1e-4)
    floats = make_encoder("inception", weights=str(file), chunk_size=2)
    close(floats(samples), expected, atol=1e-5, rtol=1e-4)
    assert (floats.differentiable, rounded.differentiable) == (True, False)
    check(floats, samples, parts=False)
    check_gradient(lambda x: floats(Samples(x, "image")), samples.data[:1], step=1e-2, rtol=0.05)
    assert floats.key != rounded.key
    assert rounded.resized(samples) is samples
    check_resized(floats, (299, 299), MIXED[:1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="not their parts"):
        floats.parts(samples)


MIXED = [(40, 56), (64, 64), (33, 90), (200, 47), (64, 40), (31, 30)]


def check_resized(encoder, side, sizes=MIXED, **tolerance):
    """Of one size whatever came, embedded as before, and left as they are a second time."""
    for size in sizes:
        samples = to_samples(photos(1, *size))
        again = encoder.resized(samples)
        assert again.data.shape == (1, 3, *side) and again.modality == "image"
        assert torch.equal(encoder.resized(again).data, again.data)
        close(encoder(again), encoder(samples), **tolerance)


@pytest.mark.parametrize("options", [{}, {"exact": True}])
@pytest.mark.parametrize("kind", ["open_clip", "clip", "siglip"])
def test_clip_is_the_same_of_resized_images(folders, kind, options):
    encoder = make_encoder("clip", model=folders[kind], **options)
    check_resized(encoder, encoder.preprocess.size, rtol=0, atol=0)


def test_images_may_be_resized_beforehand(folders):
    check_resized(make_encoder("dino", model=folders["dino"]), (40, 40), rtol=0, atol=0)
    check_resized(make_encoder("dino", model=folders["dino"], size=48), (48, 48), rtol=0, atol=0)
    check_resized(make_encoder("vae", size=24), (24, 24), rtol=0, atol=0)
    samples = to_samples(photos(2, 40, 24))
    assert make_encoder("vae").resized(samples) is samples
    twice = make_encoder("clip", exact=True)
    twice.preprocess = replace(twice.preprocess, clip=False)  # float after rounding: not twice
    assert twice.resized(samples) is samples
    assert make_encoder("kmers").resized(samples) is samples


@pytest.mark.parametrize("cache", [False, True])
def test_a_folder_of_many_sizes_is_embedded_in_full_batches(tmp_path, monkeypatch, cache):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, size in enumerate(MIXED):
        Image.fromarray(photos(1, *size, seed=i)[0]).save(pictures / f"{i}.png")
    encoder, batches = make_encoder("clip"), []
    each = [encoder(to_samples(photos(1, *size, seed=i))) for i, size in enumerate(MIXED)]
    call = type(encoder).__call__
    monkeypatch.setattr(
        type(encoder), "__call__", lambda e, s: batches.append(len(s)) or call(e, s)
    )
    how = {"cache": tmp_path / "cache"} if cache else {}
    found = load_exemplars(pictures, encoder, batch=4, gaussian=False, **how)
    assert batches == [4, 2]
    close(found.features, torch.cat(each), atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------
# Sequences
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("modality", ["dna", "rna"])
def test_kmers_count_words(k, modality):
    words = ["ACGTACGGTA", "TTTTTTTTTT", "GATTACAGAT"]
    words = [word.replace("T", ALPHABETS[modality][3]) for word in words]
    encoder = make_encoder({"kmers": {"k": k, "modality": modality}})
    kinds = ["".join(letters) for letters in itertools.product(ALPHABETS[modality], repeat=k)]
    windows = [[word[i : i + k] for i in range(len(word) - k + 1)] for word in words]
    expected = torch.tensor([[w.count(kind) / len(w) for kind in kinds] for w in windows])
    close(encoder(tokens(modality, words)), expected)
    parts = encoder.parts(tokens(modality, words))
    assert [[kinds[int(row.argmax())] for row in sample] for sample in parts] == windows
    close(parts.sum(-1), torch.ones(3, len(windows[0])))
    check(encoder, tokens(modality, words))
    check(encoder, relaxed(modality, words, mixed=0.3))


def test_relaxed_kmers_are_the_expected_counts():
    """Over all sequences of 4 letters, each with its probability."""
    encoder = make_encoder("kmers", k=2, window=3)
    x = relaxed("dna", ["ACGT"], mixed=0.8)
    letters = torch.tensor(list(itertools.product(range(4), repeat=4)))
    probability = x.data[0, torch.arange(4), letters].prod(dim=1)
    close(probability.sum(), torch.tensor(1.0, dtype=torch.float64))
    every = Samples(letters, "dna")
    whole = probability[None] @ encoder(every).double()
    parts = (probability[:, None, None] * encoder.parts(every)).sum(dim=0, keepdim=True)
    close(encoder(x), whole)
    close(encoder.parts(x), parts)
    assert parts.shape == (1, 2, 16)
    # a window is a sequence
    close(encoder.parts(x)[:, 1], encoder(Samples(x.data[:, 1:], "dna")))
    for call in (encoder, encoder.parts):
        check_gradient(lambda d, call=call: call(Samples(d, "dna")), x.data, 1e-5, 1e-6)


def test_kmers_refuse_what_makes_no_sense():
    for options, message in [
        ({"k": 0}, "k is from 1 to 8 for dna, but 0"),
        ({"k": 4, "modality": "protein"}, "1 to 3 for protein"),
        ({"modality": "image"}, "modality is one of dna"),
        ({"k": 3, "window": 2}, "at least k = 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_encoder("kmers", **options)
    with pytest.raises(ValueError, match="no windows of 5"):
        make_encoder("kmers", window=5).parts(tokens("dna", ["ACGT"]))
    keys = {make_encoder("kmers", **o).key for o in ({}, {"k": 2}, {"window": 4})}
    assert len(keys) == 3


def test_esm_is_transformers(folders):
    network = transformers.EsmModel.from_pretrained(folders["esm"], add_pooling_layer=False).eval()
    tokenizer = transformers.EsmTokenizer.from_pretrained(folders["esm"])
    with torch.no_grad():
        expected = network(**tokenizer(WORDS, return_tensors="pt")).last_hidden_state[:, 1:-1]
    encoder = make_encoder("esm", model=folders["esm"], chunk_size=2)
    close(encoder.parts(tokens("protein", WORDS)), expected, atol=1e-5, rtol=1e-4)
    close(encoder(tokens("protein", WORDS)), expected.mean(dim=1), atol=1e-5, rtol=1e-4)
    vertices = relaxed("protein", WORDS)
    close(encoder(vertices), expected.mean(dim=1), atol=1e-5, rtol=1e-4)
    check(encoder, tokens("protein", WORDS))
    check(encoder, relaxed("protein", WORDS, mixed=0.3))
    for call in (encoder, encoder.parts):
        check_gradient(
            lambda x, call=call: call(Samples(x, "protein")),
            relaxed("protein", WORDS, mixed=0.5).data.float(),
        )


def test_esm_refuses_what_is_too_long(folders, tmp_path):
    config = transformers.EsmConfig.from_pretrained(folders["esm"])
    config.position_embedding_type, config.max_position_embeddings = "absolute", 12
    transformers.EsmForMaskedLM(config).save_pretrained(tmp_path)
    transformers.EsmTokenizer.from_pretrained(folders["esm"]).save_pretrained(tmp_path)
    encoder = make_encoder("esm", model=str(tmp_path))
    assert encoder(tokens("protein", [w[:8] for w in WORDS])).shape == (3, 16)
    with pytest.raises(ValueError, match="reads 8 letters, but sequences of 10 came"):
        encoder(tokens("protein", WORDS))


# --------------------------------------------------------------------------------------------
# Callables; what goes in and what comes out
# --------------------------------------------------------------------------------------------


def corner(samples):
    return samples.data[:, :, 0, 0]


class Linear(nn.Module):
    modality = "image"

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(3, 2)

    def forward(self, samples):
        return self.layer(samples.data.mean(dim=(2, 3)))


def test_a_callable_is_an_encoder():
    samples = to_samples(photos(3, 8, 8))
    encoder = make_encoder(corner)
    close(embed(encoder, samples), samples.data[:, :, 0, 0])
    assert (encoder.name, encoder.modality) == ("corner", None)
    assert encoder.key == f"callable {__name__}.corner"
    assert make_encoder(encoder) is encoder
    module = make_encoder(Linear(0))
    assert module.modality == "image" and module.key == make_encoder(Linear(0)).key
    assert module.key != make_encoder(Linear(1)).key
    with pytest.raises(ValueError, match="encoder 'corner' embeds whole samples only"):
        encoder.parts(samples)
    with pytest.raises(ValueError, match="encoder 'corner' has no text side; .* such as 'clip'"):
        encoder.texts(["a star"])


def test_embed_checks_what_goes_in_and_what_comes_out():
    samples = to_samples(photos(3, 8, 8))
    with pytest.raises(ValueError, match="'clip' takes image samples, but dna ones came"):
        embed(make_encoder("clip"), tokens("dna", ["ACGT"]))
    with pytest.raises(ValueError, match="given no samples"):
        embed(make_encoder(corner), samples.take([]))
    for function, error, message in [
        (lambda s: s.data[:, 0, 0, 0], ValueError, r"shape \(3,\) for 3 samples"),
        (lambda s: s.data[:2, :, 0, 0], ValueError, r"shape \(2, 3\) for 3 samples"),
        (lambda s: s.data[:, :0, 0, 0], ValueError, r"shape \(3, 0\) for 3 samples"),
        (lambda s: (s.data[:, :, 0, 0] * 255).long(), TypeError, "torch.int64"),
        (lambda s: [1.0] * len(s), TypeError, "list, expected"),
        (lambda s: (s.data[:, :, 0, 0] - s.data[1, :, 0, 0]).log().abs() * 0, ValueError,
         "gave sample 0|gave sample 1"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            embed(make_encoder(function), samples)


def test_network_key_sees_any_weight_and_no_device_or_number_of_steps():
    network = nn.Sequential(nn.Conv2d(3, 40, 5), nn.BatchNorm2d(40))
    key = network_key("n", network, 1)
    assert network_key("n", network, 1) == key
    assert network_key("n", network, 2) != key and network_key("m", network, 1) != key
    network[1].num_batches_tracked += 1
    assert network_key("n", network, 1) == key
    for tensor in (network[0].bias, network[0].weight, network[1].running_mean):
        with torch.no_grad():
            tensor += 0.01
        new = network_key("n", network, 1)
        assert new != key
        key = new
    assert network_key("n", nn.Linear(2, 3)) != network_key("n", nn.Linear(3, 2))


# --------------------------------------------------------------------------------------------
# The registry
# --------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(encoders.REGISTRY, "table", dict(encoders.REGISTRY.table))


def test_specs_are_written_as_those_of_rewards(table):
    @register_encoder("My Pixels", modality="image", licence="MIT")
    class Pixels(Encoder):
        """First pixels."""

        def __init__(self, count: int, scale: float = 1.0):
            self.count, self.scale, self.key = count, scale, "pixels"

        def __call__(self, samples):
            return samples.data.flatten(1)[:, : self.count] * self.scale

    info = available_encoders()["My Pixels"]
    assert (info.modality, info.licence, info.description) == ("image", "MIT", "First pixels.")
    for spec in (
        {"name": "my-pixels", "count": 2, "scale": 3.0},
        {"my_pixels": {"count": 2, "scale": 3.0}},
        {"name": "MYPIXELS", "scale": 3.0, "count": 2},
    ):
        assert make_encoder(spec).count == 2 and make_encoder(spec).scale == 3.0
    made = make_encoder({"my pixels": 5})
    assert (made.count, made.name, made.modality) == (5, "My Pixels", "image")
    assert make_encoder("My Pixels", count=4).count == 4
    with pytest.raises(ValueError, match="needs the option count"):
        make_encoder("my pixels")
    with pytest.raises(ValueError, match="already registered by .*Pixels; choose another"):
        register_encoder("my_pixels")(Pixels)
    register_encoder("my_pixels", overwrite=True)(Pixels)
    with pytest.raises(ValueError, match="already built and takes no options, but count"):
        make_encoder(made, count=3)


def test_errors_name_what_is_near(table):
    for spec, error, message in [
        ("dinno", ValueError, "no encoder 'dinno'; did you mean: dino"),
        ("zzz", ValueError, "no encoder 'zzz'; there are: .*kmers"),
        ({"name": "kmers", "windwo": 3}, ValueError, "no option 'windwo' .did you mean 'window'"),
        ({"clip": {"modle": "x"}}, ValueError, "did you mean 'model'"),
        ({"model": "x", "size": 3}, ValueError, "needs a 'name'"),
        ({}, ValueError, "needs a 'name'"),
        (3, TypeError, "3"),
    ]:
        with pytest.raises(error, match=message):
            make_encoder(spec)
    with pytest.raises(ValueError, match="takes samples, so it is an encoder"):
        register_encoder("corner")(corner)
    with pytest.raises(ValueError, match="no name"):
        register_encoder(" - ")
    with pytest.raises(TypeError, match="colour"):
        register_encoder("other", colour="red")(Linear)


def test_an_encoder_is_shared_while_someone_holds_it():
    one = make_encoder({"kmers": 3})
    assert make_encoder("kmers", k=3) is one and make_encoder("kmers", k=2) is not one
    mark = id(one)
    del one
    gc.collect()
    assert not any(id(e) == mark and e.k == 3 for e in encoders._BUILT.values())


def test_plugins_of_rewards_may_bring_encoders(table, monkeypatch):
    class Point:
        name, value = "theirs", "theirs"

        def load(self):
            register_encoder("theirs")(lambda: make_encoder(corner))

    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [Point()])
    assert make_encoder("theirs").name == "corner"


def test_importing_encoders_loads_no_heavy_library():
    code = (
        "import sys, diffreward.rewards.encoders, diffreward.rewards.exemplars\n"
        "heavy = {'diffusers', 'transformers', 'open_clip', 'torch_fidelity'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------
# Remembered on disk
# --------------------------------------------------------------------------------------------


class Counting(Encoder):
    """Counts the rows it is asked for."""

    name, modality = "counting", "image"

    def __init__(self, key="one"):
        self.key, self.rows = key, 0

    def __call__(self, samples):
        self.rows += len(samples)
        return samples.data.mean(dim=(2, 3)) * 2

    def parts(self, samples):
        self.rows += len(samples)
        return samples.data.flatten(2).transpose(1, 2)

    def texts(self, texts):
        self.rows += len(texts)
        return torch.tensor([[len(t), 1.0] for t in texts])


def test_what_was_embedded_is_remembered_by_content(tmp_path):
    samples = to_samples(photos(4, 8, 8))
    encoder = Counting()
    cached = Cached(encoder, tmp_path)
    truth = encoder(samples)
    encoder.rows = 0
    close(cached(samples), truth, rtol=0, atol=0)
    close(cached(samples.take([3, 1, 1])), truth[[3, 1, 1]], rtol=0, atol=0)
    assert encoder.rows == 4
    again = Cached(encoder, tmp_path)  # another process, later
    close(again(samples.take([2, 0])), truth[[2, 0]], rtol=0, atol=0)
    assert encoder.rows == 4
    changed = samples.data.clone()
    changed[1, 2, 7, 7] += 1e-6
    other = Samples(changed, "image")
    close(again(other), encoder(other), rtol=0, atol=0)
    assert encoder.rows == 4 + 1 + 4
    # a copy of the data under another name, in another layout, is the same content
    again(Samples(changed.to(memory_format=torch.channels_last), "image"))
    assert encoder.rows == 9
    again(Samples(samples.data.double(), "image"))
    again(Samples(samples.data, "image", prompts=["a", "b", "c", "d"]))
    assert encoder.rows == 17
    again(Samples(samples.data.reshape(4, 3, 4, 16), "image"))
    assert encoder.rows == 21


def test_parts_texts_and_other_encoders_are_remembered_apart(tmp_path):
    samples = to_samples(photos(2, 8, 8))
    encoder, second = Counting(), Counting("two")
    cached = Cached(encoder, tmp_path)
    for _ in range(2):
        close(cached(samples), Counting()(samples))
        close(cached.parts(samples), Counting().parts(samples))
        close(cached.texts(["a", "bcd", "a"]), torch.tensor([[1.0, 1], [3, 1], [1, 1]]))
    assert encoder.rows == 2 + 2 + 2
    Cached(second, tmp_path)(samples)
    assert second.rows == 2
    assert (cached.key, cached.name, cached.modality) == ("one", "counting", "image")


def test_the_cache_lets_gradients_and_unknown_contexts_pass(tmp_path):
    samples = to_samples(photos(2, 8, 8))
    encoder = Counting()
    cached = Cached(encoder, tmp_path)
    cached(samples)
    leaf = samples.data.clone().requires_grad_()
    cached(Samples(leaf, "image")).sum().backward()
    assert leaf.grad.abs().sum() > 0 and encoder.rows == 4
    with torch.no_grad():
        assert torch.equal(cached(Samples(leaf, "image")), cached(samples))
    assert encoder.rows == 4
    for _ in range(2):  # numbers count as content
        cached(Samples(samples.data, "image", context={"sampling_rate": [8000, 16000]}))
    assert encoder.rows == 6
    for _ in range(2):
        cached(Samples(samples.data, "image", context={"structure": [object(), object()]}))
    assert encoder.rows == 10


def test_the_cache_survives_what_was_broken_off(tmp_path):
    samples = to_samples(photos(2, 8, 8))
    encoder = Counting()
    Cached(encoder, tmp_path)(samples)
    (file,) = tmp_path.rglob("*.safetensors")
    half = file.read_bytes()[:-9]
    (file.parent / f".unfinished-1-{file.name}").write_bytes(half)
    Cached(encoder, tmp_path)(samples)
    assert encoder.rows == 2
    file.write_bytes(half)
    with pytest.warns(UserWarning, match="cannot be read and is not used"):
        close(Cached(encoder, tmp_path)(samples), Counting()(samples))
    assert encoder.rows == 4
    Cached(encoder, tmp_path)(samples)
    assert encoder.rows == 4


def test_a_callable_without_identity_is_not_cached(tmp_path):
    with pytest.raises(ValueError, match="give it an attribute 'key'"):
        Cached(corner, tmp_path)

    def named(samples):
        return samples.data[:, :, 0, 0]

    named.key = "corner, first version"
    samples = to_samples(photos(2, 8, 8))
    close(Cached(named, tmp_path)(samples), corner(samples))
    Cached(Linear(0), tmp_path)
    cached = Cached(make_encoder("clip"), tmp_path)
    with torch.inference_mode():
        found = cached(to_samples(photos(2, 64, 64)))
    close(found, make_encoder("clip")(to_samples(photos(2, 64, 64))))


def test_the_same_bits_of_another_type_are_another_content():
    x = torch.rand(2, 5)
    kinds = [Samples(x, "latent"), Samples(x.view(torch.int32), "latent"), Samples(x, "other")]
    hashes = [each for samples in kinds for each in content_hashes(samples)]
    assert len(set(hashes)) == 6


def test_what_is_remembered_has_full_precision(tmp_path):
    weights = torch.rand(3 * 8 * 8, 4)

    def project(samples):
        return samples.data.flatten(1) @ weights

    project.key = "project"
    samples = to_samples(photos(2, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert project(samples).dtype == torch.bfloat16
        Cached(project, tmp_path)(samples)
    close(Cached(project, tmp_path)(samples), project(samples))


def test_the_key_of_a_vae_has_its_scale():
    network = make_encoder("vae").network
    other = copy.deepcopy(network)
    other.register_to_config(scaling_factor=2 * network.config.scaling_factor)
    keys = {
        make_encoder("vae", model=m, pool=p).key
        for m in (network, other)
        for p in ("mean", "flatten")
    }
    assert len(keys) == 4


def test_the_key_of_a_network_has_the_shapes_of_its_weights():
    wide, tall = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    wide.weight.data = tall.weight.data.reshape(3, 2)
    assert network_key("n", wide) != network_key("n", tall)

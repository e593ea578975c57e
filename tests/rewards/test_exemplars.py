"""Exemplars against numpy and the encoders themselves; every kind of source, and every error."""

import csv
import gc
import json
import warnings
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_towers import photos, to_samples

from diffreward.rewards import encoders, exemplars, make_reward
from diffreward.rewards.encoders import Encoder, make_encoder
from diffreward.rewards.exemplars import Exemplars, load_exemplars, save_exemplars
from diffreward.samples import Samples

close = torch.testing.assert_close
SEQUENCES = ["ACGTACGGTA", "TTTTTTATTT", "GATTACAGAT", "CCCGGGACGT", "ACACACACAC"]


class Colours(Encoder):
    """Mean and corner colour, (b, 6); parts are the pixels; counts its calls."""

    name, modality = "colours", "image"

    def __init__(self, key="colours", modality="image"):
        self.key, self.modality, self.batches = key, modality, []

    def __call__(self, samples):
        self.batches.append(len(samples))
        return torch.cat([samples.data.mean(dim=(2, 3)), samples.data[:, :, 0, 0]], dim=1)

    def parts(self, samples):
        return samples.data.flatten(2).transpose(1, 2)

    def texts(self, texts):
        return torch.tensor([[len(text), text.count("a"), 1, 0, 0, 0] for text in texts]).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine pictures in two folders, with things beside them that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for i, pixels in enumerate(photos(9, 8, 10)):
        Image.fromarray(pixels).save(folder / ("more" if i > 5 else "") / f"{i}.png")
    (folder / "0.txt").write_text("a prompt")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def truth(pixels):
    return Colours()(to_samples(pixels))


def numpys(features):
    features = features.double().numpy()
    return torch.from_numpy(features.mean(0)), torch.from_numpy(np.cov(features.T))


def check_gaussian(gaussian, features, **tolerance):
    mean, covariance = numpys(features)
    close(gaussian.mean, mean, **tolerance)
    close(gaussian.covariance, covariance, **tolerance)
    assert gaussian.count == len(features)


# --------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_a_folder_of_images(folder, batch):
    encoder = Colours()
    found = load_exemplars(folder, encoder, batch=batch)
    close(found.features, truth(photos(9, 8, 10)))  # by name, those below last
    assert found.features.dtype == torch.float32
    check_gaussian(found.gaussian, found.features)
    assert (found.encoder, found.parts, found.shrinkage) == ("colours", None, 0.0)
    assert max(encoder.batches) <= batch and sum(encoder.batches) == 9


def test_the_same_from_every_kind_of_source(folder, tmp_path):
    files = sorted(folder.rglob("[0-9].png"), key=lambda path: path.name)
    expected = truth(photos(9, 8, 10))
    names = [str(path) for path in files]
    with open(tmp_path / "m.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": "x", "image": name}) + "\n\n" for name in names)
    relative = [str(path.relative_to(folder)) for path in files]
    for name, separator in [("m.csv", ","), ("m.tsv", "\t")]:
        with open(folder / name, "w", newline="") as file:
            csv.writer(file, delimiter=separator).writerows([["path"], *([r] for r in relative)])
    pq.write_table(pa.table({"n": range(9), "mine": names}), tmp_path / "m.parquet")
    samples = to_samples(photos(9, 8, 10))
    sources = [
        (str(folder), {}), (files, {}), (samples, {}), (tmp_path / "m.jsonl", {}),
        (str(folder / "m.csv"), {}), (folder / "m.tsv", {}),
        (tmp_path / "m.parquet", {"column": "mine"}),
    ]  # fmt: skip
    for source, options in sources:
        close(load_exemplars(source, Colours(), **options).features, expected)
    for name in ("m.csv", "m.tsv"):
        (folder / name).unlink()


def test_texts_stand_for_images(tmp_path):
    texts = ["a red heart", "a star", "blue", "two rings", "a", "aa", "bbb"]
    (tmp_path / "t.txt").write_text("\n\n".join(texts) + "\n")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"caption": t}) + "\n" for t in texts))
    (tmp_path / "t.csv").write_text("".join(f"{t}\n" for t in ["words", *texts]))
    expected = Colours().texts(texts)
    for source, options in [
        (texts, {}), (tmp_path / "t.txt", {}), (tmp_path / "t.jsonl", {}),
        (tmp_path / "t.csv", {"column": "words"}),
    ]:  # fmt: skip
        found = load_exemplars(source, Colours(), batch=3, **options)
        close(found.features, expected)
        check_gaussian(found.gaussian, expected)
    with pytest.raises(ValueError, match="texts have no parts"):
        load_exemplars(texts, Colours(), parts=True)


def test_text_exemplars_are_nearest_to_the_images_that_show_them():
    """On the embedded CLIP: red hearts and green stars, each nearest to its own texts."""
    from diffreward.rewards.shapes import parse, render

    encoder, rng = make_encoder("clip"), np.random.default_rng(0)
    kinds = ["a red heart", "a green star"]
    shown = [
        encoder(to_samples(np.stack([render(parse(kind), rng) for _ in range(6)])))
        for kind in kinds
    ]
    texts = [
        load_exemplars([kind, f"one {kind[2:]}", f"the {kind[2:]}"], "clip", gaussian=False)
        for kind in kinds
    ]
    apart = [[(s.mean(0) - t.features.mean(0)).norm().item() for t in texts] for s in shown]
    assert apart[0][0] < apart[0][1] and apart[1][1] < apart[1][0]
    assert texts[0].gaussian is None and texts[0].encoder == encoder.key


def test_sequences(tmp_path):
    (tmp_path / "s.fasta").write_text("".join(f">{i}\n{s}\n" for i, s in enumerate(SEQUENCES)))
    (tmp_path / "s.txt").write_text("\n".join(s.lower() for s in SEQUENCES))
    pq.write_table(pa.table({"seq": SEQUENCES}), tmp_path / "s.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.fa").write_text("".join(f">x\n{s}\n" for s in SEQUENCES[:2]))
    (tmp_path / "folder" / "b.fa").write_text("".join(f">x\n{s}\n" for s in SEQUENCES[2:]))
    encoder = make_encoder("kmers", k=1)
    expected = torch.tensor([[s.count(letter) / 10 for letter in "ACGT"] for s in SEQUENCES])
    sources = [SEQUENCES, *(tmp_path / n for n in ("s.fasta", "s.txt", "s.parquet", "folder"))]
    for source in sources:
        close(load_exemplars(source, encoder, batch=2).features, expected)
    # of different lengths, in their order
    shorter = [s[: 4 + i] for i, s in enumerate(SEQUENCES)] + [SEQUENCES[0][:4], "ACGT"]
    expected = [[s.count(letter) / len(s) for letter in "ACGT"] for s in shorter]
    close(load_exemplars(shorter, encoder, batch=2).features, torch.tensor(expected))
    with pytest.raises(ValueError, match="letter 3 is 'N'"):
        load_exemplars(["ACG", "ACN"], encoder)
    with pytest.raises(ValueError, match="row 1 has no 'seq'|'ACN' cannot be read|letter 3 is 'N'"):
        pq.write_table(pa.table({"seq": ["ACN"]}), tmp_path / "bad.parquet")
        load_exemplars(tmp_path / "bad.parquet", encoder)


def test_samples_of_text_for_an_encoder_of_text():
    class Lengths(Encoder):
        name, modality, key = "lengths", "text", "lengths"

        def __call__(self, samples):
            return torch.tensor([[len(text), text.count("a")] for text in samples.data]).float()

    found = load_exemplars(["a", "bb", "caa"], Lengths())
    close(found.features, torch.tensor([[1.0, 1], [2, 0], [3, 2]]))


def test_sounds(tmp_path):
    sounds = pytest.importorskip("diffreward.sounds")

    class Loudness(Encoder):
        name, modality, key = "loudness", "audio", "loudness"

        def __call__(self, samples):
            rates = torch.tensor(samples.context["sampling_rate"]).float()
            return torch.stack([samples.data.abs().amax(dim=(1, 2)), rates / 1000], dim=1)

    for i, (rate, length) in enumerate([(8000, 50), (16000, 50), (8000, 70)]):
        sounds.write_wav(tmp_path / f"{i}.wav", torch.full((1, length), 0.25 * (i + 1)), rate)
    found = load_exemplars(tmp_path, Loudness())
    expected = torch.tensor([[0.25, 8], [0.5, 16], [0.75, 8]])
    close(found.features, expected, atol=1e-4, rtol=0)


def test_an_embedded_folder_and_the_warning_of_too_few():
    with pytest.warns(UserWarning, match="12 exemplars embedded in 128 dimensions by 'clip'"):
        found = load_exemplars("embedded:samples", "clip")
    assert found.features.shape == (12, 128)
    for options in ({"shrinkage": 0.1}, {"gaussian": False}):
        load_exemplars("embedded:samples", "clip", **options)  # a warning would be an error
    close(load_exemplars("embedded:samples/manifest.jsonl", "clip", gaussian=False).features,
          found.features)  # fmt: skip


# --------------------------------------------------------------------------------------------
# Images as they are in files
# --------------------------------------------------------------------------------------------


def test_as_many_exemplars_as_dimensions_are_not_warned_of(folder):
    files = sorted(folder.rglob("[0-9].png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_exemplars(files[:6], Colours())
        make_reward("kid", exemplars=files[:3], encoder=Colours())  # needs no covariance
    with pytest.warns(UserWarning, match="5 exemplars embedded in 6 dimensions"):
        load_exemplars(files[:5], Colours())


def test_images_are_read_upright_on_white_and_exactly(tmp_path):
    pixels = photos(1, 6, 4)[0]
    Image.fromarray(pixels).save(tmp_path / "0.png")
    sideways = Image.fromarray(np.rot90(pixels))
    exif = sideways.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    sideways.save(tmp_path / "1.png", exif=exif)
    clear = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    clear[0, 0] = 7, 7, 7, 0
    Image.fromarray(clear).save(tmp_path / "2.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "3.png")
    whole = Colours()
    whole.__class__ = type("Whole", (Colours,), {"__call__": lambda s, x: x.data.flatten(1)})
    found = load_exemplars(tmp_path, whole, gaussian=False).features.view(4, 3, 6, 4)
    truth = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    close(found[:2], torch.stack([truth, truth]), rtol=0, atol=1e-7)
    assert (found[2, :, 0, 0] == 1).all()
    close(found[2, :, 1:], truth[:, 1:], rtol=0, atol=1e-7)
    close(found[3], truth[:1].expand(3, -1, -1), rtol=0, atol=1e-7)


def test_mixed_sizes(tmp_path):
    sizes = [(8, 8), (8, 10), (6, 6), (8, 8), (12, 8), (8, 10), (8, 8)]
    every = [photos(1, *size, seed=i)[0] for i, size in enumerate(sizes)]
    for i, pixels in enumerate(every):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    encoder = Colours()
    found = load_exemplars(tmp_path, encoder, batch=2)
    close(found.features, torch.cat([truth(pixels[None]) for pixels in every]))
    check_gaussian(found.gaussian, found.features)
    assert sorted(encoder.batches) == [1, 1, 1, 2, 2]
    flat = make_encoder("vae", pool="flatten")
    with pytest.raises(ValueError, match=r"of size 16x16, but \d+ of those of size 16x24: bring"):
        for i in (0, 1, 2):
            Image.fromarray(photos(1, 16, 16 + 8 * (i > 1))[0]).save(tmp_path / f"v{i}.png")
        load_exemplars([tmp_path / f"v{i}.png" for i in (0, 1, 2)], flat, gaussian=False)


def test_few_wait_however_many_sizes_there_are():
    items = ((n % 50, n) for n in range(500))
    waiting, largest = set(), 0
    for numbers, size, members in exemplars._by_size((watch(i, waiting) for i in items), 4):
        assert numbers == members and all(n % 50 == size for n in numbers)
        largest = max(largest, len(waiting))
        waiting.difference_update(members)
    assert largest <= 16 and not waiting


def watch(item, waiting):
    waiting.add(item[1])
    return item


# --------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrinkage", [0.0, 0.25, 1.0])
def test_shrinkage(folder, shrinkage):
    found = load_exemplars(folder, Colours(), shrinkage=shrinkage, parts=True)
    pixels = torch.from_numpy(photos(9, 8, 10)).view(-1, 3) / 255
    for gaussian, rows in [(found.gaussian, found.features), (found.parts, pixels)]:
        mean, covariance = numpys(rows)
        d = len(mean)
        shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / d * torch.eye(d)
        close(gaussian.mean, mean)
        close(gaussian.covariance, shrunk)
        assert gaussian.count == len(rows)
    assert found.shrinkage == shrinkage


def test_the_gaussian_of_parts_is_of_all_parts_of_all(folder):
    found = load_exemplars(folder, Colours(), parts=True, batch=2)
    check_gaussian(found.parts, torch.from_numpy(photos(9, 8, 10)).view(-1, 3) / 255)
    assert found.parts.count == 9 * 80
    encoder = Colours()
    alone = load_exemplars(folder, encoder, parts=True, features=False, gaussian=False)
    close(alone.parts.covariance, found.parts.covariance)
    assert not encoder.batches and alone.gaussian is None and alone.features is None


def test_without_features_few_are_kept(folder, monkeypatch):
    monkeypatch.setattr(exemplars, "_SMALL", 8 * 6)  # eight of the 36

    class Watched(Colours):
        def __init__(self):
            super().__init__()
            self.seen, self.most = [], 0

        def __call__(self, samples):
            found = super().__call__(samples)
            self.most = max(self.most, sum(ref() is not None for ref in self.seen))
            self.seen += [weakref.ref(samples.data), weakref.ref(found)]
            return found

    listed = sorted(folder.rglob("[0-9].png")) * 4
    with_features, without = Watched(), Watched()
    load_exemplars(listed, with_features, batch=2)
    found = load_exemplars(listed, without, batch=2, features=False)
    assert found.features is None and found.gaussian.count == 36
    assert with_features.most > 15 and without.most <= 2 + 4
    assert sum(ref() is not None for ref in without.seen) == 0
    close(found.gaussian.covariance, load_exemplars(listed, Colours()).gaussian.covariance)


def test_a_file_of_statistics_comes_back(folder, tmp_path):
    first = load_exemplars(folder, Colours(), parts=True)
    file = tmp_path / "deep" / "statistics.safetensors"
    save_exemplars(file, first)
    found = load_exemplars(str(file), Colours(), parts=True)
    close(found.features, first.features, rtol=0, atol=0)
    for name in ("gaussian", "parts"):
        one, two = getattr(found, name), getattr(first, name)
        close(one.mean, two.mean, rtol=0, atol=0)
        close(one.covariance, two.covariance, rtol=0, atol=0)
        assert one.count == two.count and one.mean.dtype == torch.float64
    assert found.encoder == first.encoder and found.shrinkage == 0
    assert load_exemplars(file, Colours(), features=False).features is None
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    # Exemplars pass as they are
    assert load_exemplars(first, Colours()).features is first.features


def test_statistics_without_features_are_small_and_enough(folder, tmp_path):
    first = load_exemplars(folder, Colours(), features=False)
    save_exemplars(tmp_path / "s.safetensors", first)
    assert "features" not in load_file(tmp_path / "s.safetensors")
    found = load_exemplars(tmp_path / "s.safetensors", Colours())
    assert found.features is None and found.parts is None
    close(found.gaussian.covariance, first.gaussian.covariance, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no statistics of parts: make it with parts=True"):
        load_exemplars(tmp_path / "s.safetensors", Colours(), parts=True)


@pytest.mark.parametrize("saved_with", [0.0, 0.3])
@pytest.mark.parametrize("loaded_with", [0.0, 0.3, 0.8])
def test_a_file_may_be_loaded_with_any_shrinkage(folder, tmp_path, saved_with, loaded_with):
    save_exemplars(
        tmp_path / "s.safetensors",
        load_exemplars(folder, Colours(), shrinkage=saved_with, parts=True),
    )
    found = load_exemplars(tmp_path / "s.safetensors", Colours(), shrinkage=loaded_with, parts=True)
    direct = load_exemplars(folder, Colours(), shrinkage=loaded_with, parts=True)
    close(found.gaussian.covariance, direct.gaussian.covariance)
    close(found.parts.covariance, direct.parts.covariance)
    assert found.shrinkage == loaded_with
    again = load_exemplars(direct, Colours(), shrinkage=saved_with)
    close(again.gaussian.covariance, load_exemplars(folder, Colours(), shrinkage=saved_with)
          .gaussian.covariance)  # fmt: skip


def test_exemplars_of_another_encoder_are_refused(folder, tmp_path):
    first = load_exemplars(folder, Colours())
    save_exemplars(tmp_path / "s.safetensors", first)
    for source in (tmp_path / "s.safetensors", first):
        with pytest.raises(ValueError, match="by encoder 'colours', but 'other' came: .* anew"):
            load_exemplars(source, Colours("other"))
    guide = load_exemplars("embedded:samples", "clip", shrinkage=0.1)
    with pytest.raises(ValueError, match="by encoder 'clip-[0-9a-f]{16}', but 'clip-"):
        load_exemplars(guide, {"clip": "embedded:clip_judge"})


def test_files_that_are_none_of_ours(tmp_path, folder):
    save_file({"mean": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, error, message in [
        ("other", ValueError, "was not written by save_exemplars"),
        ("broken", ValueError, "cannot be read"),
        ("absent", FileNotFoundError, "there is no file of exemplars"),
    ]:
        with pytest.raises(error, match=message):
            load_exemplars(tmp_path / f"{name}.safetensors", Colours())
    with pytest.raises(ValueError, match=r"saved as .safetensors, but 'x.npz' came"):
        save_exemplars(tmp_path / "x.npz", load_exemplars(folder, Colours()))
    with pytest.raises(ValueError, match="shrinkage 1"):
        whole = load_exemplars(folder, Colours(), shrinkage=1.0)
        save_exemplars(tmp_path / "x.safetensors", whole)
    assert not (tmp_path / "x.safetensors").exists()


def test_exemplars_move(folder):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = load_exemplars(folder, Colours(), parts=True)
    found = first.to(device)
    for tensor in (found.features, found.gaussian.mean, found.parts.covariance):
        assert tensor.device.type == device
    close(found.features.cpu(), first.features)
    assert Exemplars(None, None, "x").to(device).features is None


# --------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------


def test_the_cache_embeds_new_content_only(folder, tmp_path):
    encoder = Colours()
    cold = load_exemplars(folder, encoder, cache=tmp_path / "cache", batch=4)
    assert sum(encoder.batches) == 9
    close(cold.features, truth(photos(9, 8, 10)))
    encoder = Colours()
    warm = load_exemplars(folder, encoder, cache=tmp_path / "cache", batch=5)
    assert encoder.batches == []
    close(warm.features, cold.features, rtol=0, atol=0)
    # other names, one picture changed
    copy = tmp_path / "copy"
    copy.mkdir()
    pixels = photos(9, 8, 10)
    pixels[3, 0, 0, 0] ^= 1
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(copy / f"{9 - i}.png")
    found = load_exemplars(copy, encoder, cache=tmp_path / "cache")
    assert encoder.batches == [1]
    close(found.features, truth(pixels[::-1].copy()))
    load_exemplars(folder, Colours("other"), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_network_is_called_only_for_what_is_new(tmp_path, monkeypatch):
    encoder, rows = make_encoder("clip"), []
    encode = type(encoder.tower)._encode_images
    monkeypatch.setattr(
        type(encoder.tower), "_encode_images", lambda t, x: rows.append(len(x)) or encode(t, x)
    )
    how = {"cache": tmp_path, "gaussian": False}
    first = load_exemplars("embedded:samples", encoder, **how)
    exemplars._RECENT.clear()
    second = load_exemplars("embedded:samples", encoder, **how)
    assert rows == [12]
    close(first.features, second.features, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------
# Remembered in the process
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("frechet", "kid"), ("kid", "frechet", "mmd")])
def test_rewards_of_the_same_exemplars_embed_them_once(folder, names):
    encoder = Colours()
    samples = to_samples(photos(8, 8, 10, seed=5))
    shared = [make_reward(name, exemplars=str(folder), encoder=encoder) for name in names]
    assert encoder.batches == [9]
    alone = [make_reward(name, exemplars=str(folder), encoder=Colours()) for name in names]
    for one, other in zip(shared, alone, strict=True):
        close(one(samples), other(samples), rtol=1e-9, atol=1e-12)


def test_what_is_remembered_is_what_was_asked_for(folder):
    encoder, fresh = Colours(), Colours()
    wishes = [
        {"features": False}, {"gaussian": False}, {}, {"shrinkage": 0.25},
        {"features": False, "shrinkage": 1.0}, {"parts": True}, {"parts": True, "shrinkage": 0.5},
        {"parts": True, "features": False, "gaussian": False},
    ]  # fmt: skip
    for wish in wishes:
        exemplars._RECENT.pop(fresh, None)
        found, truth = (
            load_exemplars(folder, encoder, **wish),
            load_exemplars(folder, fresh, **wish),
        )
        assert found.shrinkage == truth.shrinkage
        for name in ("features", "gaussian", "parts"):
            one, other = getattr(found, name), getattr(truth, name)
            assert (one is None) == (other is None), (wish, name)
            if isinstance(one, torch.Tensor):
                close(one, other, rtol=0, atol=0)
            elif one is not None:
                close(one.mean, other.mean, rtol=1e-12, atol=1e-14)
                close(one.covariance, other.covariance, rtol=1e-12, atol=1e-14)
                assert one.count == other.count
    assert encoder.batches == [9]  # its parts are no call of it


def test_a_change_of_the_exemplars_is_noticed(tmp_path):
    pixels = photos(4, 8, 8)
    for i, image in enumerate(pixels[:3]):
        Image.fromarray(image).save(tmp_path / f"{i}.bmp")
    table = tmp_path / "table.csv"
    table.write_text("path\n" + "".join(f"{i}.bmp\n" for i in range(3)))
    encoder = Colours()

    def changed(source, calls, expected):
        before = sum(encoder.batches)
        for _ in range(2):
            close(load_exemplars(source, encoder).features, truth(expected))
        assert sum(encoder.batches) - before == calls

    changed(tmp_path, 3, pixels[:3])
    changed(table, 0, pixels[:3])  # the same files
    pixels[1] = 255 - pixels[1]
    Image.fromarray(pixels[1]).save(tmp_path / "1.bmp")  # of the same length
    changed(tmp_path, 3, pixels[:3])
    changed(table, 0, pixels[:3])
    table.write_text("path\n2.bmp\n0.bmp\n")
    changed(table, 2, pixels[[2, 0]])
    Image.fromarray(pixels[3]).save(tmp_path / "3.bmp")
    changed(tmp_path, 4, pixels)
    changed(to_samples(pixels), 4, pixels)  # samples go by content
    changed(to_samples(pixels.copy()), 0, pixels)
    changed(to_samples(pixels[::-1].copy()), 4, pixels[::-1].copy())


def test_texts_samples_and_encoders_are_remembered_apart(folder):
    encoder, calls = Colours(), []
    texts = type(encoder).texts
    encoder.texts = lambda these: calls.append(len(these)) or texts(encoder, these)
    for words, expected in [(["a", "bb"], 1), (["a", "bb"], 1), (["bb", "a"], 2), (["abb"] * 2, 3)]:
        load_exemplars(words, encoder)
        assert len(calls) == expected
    for options, count in [({}, 1), ({"batch": 5}, 3), ({"device": "cpu"}, 4), ({}, 4)]:
        load_exemplars(folder, encoder, **options)
        assert len(encoder.batches) == count, options
    other = Colours()
    load_exemplars(folder, other)
    assert other.batches == [9]
    strange = Samples(torch.rand(3, 3, 4, 4), "image", context={"what": [object()] * 3})
    for _ in range(2):  # nothing says whether these are the same
        load_exemplars(strange, other)
    assert other.batches == [9, 3, 3]


def test_few_sources_are_remembered_and_no_encoder_is_kept(folder):
    encoder = Colours()
    files = sorted(folder.rglob("[0-9].png"))
    for i in range(6):
        load_exemplars(files[i : i + 3], encoder)
    assert len(encoder.batches) == 6 and len(exemplars._RECENT[encoder]) == exemplars._SOURCES
    load_exemplars(files[2:5], encoder)  # the oldest that is left, and now the newest
    load_exemplars(files[0:3], encoder)
    load_exemplars(files[2:5], encoder)
    assert len(encoder.batches) == 7
    gone = weakref.ref(encoder)
    del encoder
    gc.collect()
    assert gone() is None


def test_the_cache_is_written_though_the_exemplars_are_remembered(folder, tmp_path):
    encoder = Colours()
    load_exemplars(folder, encoder)
    load_exemplars(folder, encoder, cache=tmp_path)
    assert list(tmp_path.rglob("*.safetensors")) and encoder.batches == [9, 9]


# --------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named(tmp_path, folder):
    (tmp_path / "half.png").write_bytes(next(folder.glob("*.png")).read_bytes()[:60])
    (tmp_path / "m.jsonl").write_text('{"path": "gone.png"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a star"}\nno json\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "hole.csv").write_text("text,b\na star,1\n,2\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("a,b\n")
    (tmp_path / "x.zip").write_bytes(b"")
    (tmp_path / "none").mkdir()
    Image.fromarray(np.zeros((4, 4), np.int32)).save(tmp_path / "deep.tif")
    image = Colours()
    one = to_samples(photos(1, 8, 8))
    dna = make_encoder("kmers")
    for source, encoder, error, message in [
        (tmp_path / "absent", image, FileNotFoundError, "no file or folder of exemplars"),
        (tmp_path / "none", image, ValueError, "there is no image below .*none: no .png"),
        (tmp_path / "none", dna, ValueError, "there is no dna below .*none: no .fasta"),
        ([tmp_path / "half.png"], image, ValueError, "half.png' cannot be read"),
        ([tmp_path / "deep.tif"], image, ValueError, "deep.tif' cannot be read: pixels of mode"),
        (tmp_path / "m.jsonl", image, FileNotFoundError, "gone.png, which is among"),
        (tmp_path / "bad.jsonl", image, ValueError, "line 2 is no JSON"),
        (tmp_path / "list.jsonl", image, ValueError, "line 1 is no JSON object"),
        (tmp_path / "hole.csv", image, ValueError, "row 2 has no 'text', but ''"),
        (tmp_path / "other.csv", image, ValueError, "no column 'path' or .*there are 'a', 'b'"),
        (tmp_path / "empty.csv", image, ValueError, "has no rows"),
        (tmp_path / "x.zip", image, ValueError, "cannot be read as exemplars for an encoder of im"),
        (one, image, ValueError, "2 exemplars or more, but 1 came"),
        ([], image, ValueError, "2 exemplars or more, but 0 came"),
        ([], dna, ValueError, "2 exemplars or more, but 0 came"),
        (["a", tmp_path], image, ValueError, "texts or sequences only, or pathlib.Path only"),
        ([tmp_path / "a.fa"], dna, ValueError, "strings or one file, not a list"),
        (one, dna, ValueError, "takes dna samples, but image ones came"),
        (["a", "b"], make_encoder(lambda s: s.data), ValueError, "does not say what it takes"),
        (folder, Colours(modality="video"), ValueError, "come as Samples only"),
    ]:
        with pytest.raises(error, match=message):
            load_exemplars(source, encoder)
    with pytest.raises(ValueError, match="no column 'mine'"):
        load_exemplars(tmp_path / "other.csv", image, column="mine")
    for options, message in [({"batch": 0}, "batch"), ({"shrinkage": 1.5}, "from 0 to 1")]:
        with pytest.raises(ValueError, match=message):
            load_exemplars(folder, image, **options)


def test_a_diverged_encoder_is_named(folder):
    broken = Colours()
    broken.__class__ = type("B", (Colours,), {"__call__": lambda s, x: x.data[:, :, 0, 0] / 0})
    with pytest.raises(ValueError, match="'colours' gave sample 0 a NaN or infinite number"):
        load_exemplars(folder, broken)


def test_an_encoder_without_a_modality_takes_samples():
    samples = to_samples(photos(4, 8, 8))
    found = load_exemplars(samples, lambda s: s.data[:, :2, 0, 0])
    close(found.features, samples.data[:, :2, 0, 0])
    assert found.encoder.startswith("callable ")
    drawn = Samples(torch.rand(4, 5), "latent")
    close(load_exemplars(drawn, lambda s: s.data, gaussian=False).features, drawn.data)
    assert encoders.make_encoder(Colours()).key == "colours"

"""Questions to tiny random vision-language models, asked by hand too; and OCR of drawn words."""

import functools
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers

from diffreward.rewards import evaluate, make_reward
from diffreward.rewards import vlm as module
from diffreward.rewards.testing import check_reward
from diffreward.rewards.vlm import edit_distance, found_text, quoted
from diffreward.samples import Samples

# --------------------------------------------------------------------------------------------
# Tiny models, built once and saved as their users' would be
# --------------------------------------------------------------------------------------------

WORDS = """Does this figure show a red heart blue circle above two stars , ? " Please answer yes Yes
no or . user assistant :""".split()
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<vision>", "</vision>", "<video>"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
PROMPTS = ["a red heart", "a blue circle above two stars", "two stars", "a red heart , two stars"]
SIDE, PATCH = 16, 8


def template(image: str) -> str:
    """A chat template of one user's turn."""
    return (
        "{% for m in messages %}<s> {{ m['role'] }} : {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + " {% else %}{{ c['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )


def tokenizer(**special: str):
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", extra_special_tokens=special,
    )  # fmt: skip


def ids(*words: str) -> torch.Tensor:
    return torch.tensor([[VOCABULARY[word] for word in " ".join(words).split()]])


def spread(network):
    """Random weights large enough that answers depend on the image and the question."""
    torch.manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return network.eval()


def llava(folder):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=SIDE, patch_size=PATCH, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2,
        ),
        text_config=LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=2,
            eos_token_id=3,
        ),
        image_token_index=VOCABULARY["<image>"], image_seq_length=4,
    )  # fmt: skip
    network = spread(LlavaForConditionalGeneration(config))
    network.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer(image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    ).save_pretrained(folder)
    return network


def llava_logits(network, picture: Image.Image, question: str) -> torch.Tensor:
    """The last logits of LLaVA for a picture of its own size, with the inputs written out."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (torch.from_numpy(np.array(picture)) / 255 - mean) / std
    read = ids("<s> user :", *["<image>"] * 4, question, "assistant :")
    return network(input_ids=read, pixel_values=pixels.permute(2, 0, 1)[None]).logits[0, -1]


def qwen(folder):
    """Images become as many tokens as they have patches, whose positions are rotary in 3D."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    config = Qwen2VLConfig(
        vision_config=dict(
            depth=2, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=2
        ),
        text_config=dict(
            vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=2,
            eos_token_id=3,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        ),
        image_token_id=VOCABULARY["<image>"], video_token_id=VOCABULARY["<video>"],
        vision_start_token_id=VOCABULARY["<vision>"], vision_end_token_id=VOCABULARY["</vision>"],
    )  # fmt: skip
    network = spread(Qwen2VLForConditionalGeneration(config))
    network.save_pretrained(folder)
    names = dict(
        image_token="<image>", video_token="<video>", vision_bos_token="<vision>",
        vision_eos_token="</vision>",
    )  # fmt: skip
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=1024),
        tokenizer(**names),
        Qwen2VLVideoProcessor(patch_size=4),
        chat_template=template("<vision> <image> </vision>"),
    ).save_pretrained(folder)
    return network


def blip2(folder):
    """An encoder-decoder without a chat template."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
    )

    config = Blip2Config(
        vision_config=dict(
            image_size=SIDE, patch_size=PATCH, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2,
        ),
        qformer_config=dict(
            vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, encoder_hidden_size=16, cross_attention_frequency=1,
        ),
        text_config=dict(
            model_type="t5", vocab_size=len(VOCABULARY), d_model=32, d_kv=8, d_ff=48,
            num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,
            is_encoder_decoder=True,
        ),
        num_query_tokens=4, image_token_index=VOCABULARY["<image>"],
    )  # fmt: skip
    network = spread(Blip2ForConditionalGeneration(config))
    network.save_pretrained(folder)
    Blip2Processor(
        BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer(), num_query_tokens=4
    ).save_pretrained(folder)
    return network


MODELS = {"llava": llava, "qwen": qwen, "blip2": blip2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (folder, network); a model is built when first asked for."""

    @functools.cache
    def build(name: str):
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(), torch.inference_mode(False):
            return str(folder), MODELS[name](folder)

    return build


def photos(b: int, h: int, w: int) -> np.ndarray:
    """(b, h, w, 3) uint8: colour fields with grain."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 255, (b, 1, 1, 3)) + rng.normal(0, 40, (b, h, w, 3))
    return pixels.clip(0, 255).round().astype(np.uint8)


def to_samples(pixels: np.ndarray, prompts: list[str] | None = PROMPTS) -> Samples:
    return Samples(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, "image", prompts)


# --------------------------------------------------------------------------------------------
# Visual question answering
# --------------------------------------------------------------------------------------------


def asked(prompt: str) -> str:
    """VQAScore's question, as words of the vocabulary."""
    return f'Does this figure show " {prompt} " ? Please answer yes or no .'


@torch.no_grad()
def test_vqa_is_the_softmax_of_a_forward_by_hand(saved):
    folder, network = saved("llava")
    pixels = photos(4, SIDE, SIDE)
    logits = torch.stack([
        llava_logits(network, Image.fromarray(image), asked(prompt))
        for image, prompt in zip(pixels, PROMPTS, strict=True)
    ])  # fmt: skip
    p = logits.double().exp() / logits.double().exp().sum(dim=1, keepdim=True)
    yes = (p[:, VOCABULARY["yes"]] + p[:, VOCABULARY["Yes"]]).float()
    no = p[:, VOCABULARY["no"]].float()
    assert yes.std() > 1e-3
    scores = evaluate(make_reward("vqa", model=folder), to_samples(pixels))
    torch.testing.assert_close(scores.value, yes, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scores.parts["yes"], yes, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scores.parts["no"], no, atol=1e-6, rtol=1e-4)
    reward = make_reward("vqa", model=folder, normalise=True)
    torch.testing.assert_close(
        evaluate(reward, to_samples(pixels)).value, yes / (yes + no), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_vqa_asks_what_it_is_told_to(saved):
    folder, network = saved("llava")
    pixels = photos(2, SIDE, SIDE)
    question = "{prompt} or no heart ?"
    reward = make_reward("vqa", model=folder, question=question, answers=["circle", "heart"])
    expected = [
        llava_logits(network, Image.fromarray(image), question.replace("{prompt}", prompt))
        .softmax(dim=0)[VOCABULARY["circle"]]
        for image, prompt in zip(pixels, PROMPTS, strict=False)
    ]  # fmt: skip
    torch.testing.assert_close(
        evaluate(reward, to_samples(pixels, PROMPTS[:2])).value,
        torch.stack(expected),
        atol=1e-6,
        rtol=1e-4,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen", "blip2"])
def test_vqa_is_the_first_step_of_generate(saved, name):
    """transformers' own decoding, one sample at a time, is the truth for other models."""
    from transformers import AutoProcessor

    folder, network = saved(name)
    processor = AutoProcessor.from_pretrained(folder)
    pixels = photos(4, 16, 24)
    expected = []
    for image, prompt in zip(pixels, PROMPTS, strict=True):
        text = asked(prompt)
        if name == "qwen":
            text = f"<s> user : <vision> <image> </vision> {text} assistant :"
        inputs = processor(text=text, images=Image.fromarray(image), return_tensors="pt")
        step = network.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        ).logits[0][0]  # fmt: skip
        p = step.softmax(dim=0)
        expected.append(p[VOCABULARY["yes"]] + p[VOCABULARY["Yes"]])
    expected = torch.stack(expected)
    assert expected.std() > 1e-3
    value = evaluate(make_reward("vqa", model=folder), to_samples(pixels)).value
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_vqa_keeps_the_contract(saved, name):
    # prompts of two lengths, more than a chunk of one of them; images not of the model's size
    prompts = ["a red heart", "two stars", "a blue circle", "a red circle", "two heart"]
    reward = make_reward("vqa", model=saved(name)[0], chunk_size=2)
    check_reward(reward, to_samples(photos(5, 20, 28), prompts), atol=1e-6)
    assert reward.info.weights == saved(name)[0]
    assert not reward.network.training
    assert not any(p.requires_grad for p in reward.network.parameters())


def test_vqa_batches_questions_of_one_length(saved, monkeypatch):
    reward = make_reward("vqa", model=saved("llava")[0], chunk_size=2)
    sizes = []
    forward = reward._forward
    monkeypatch.setattr(reward, "_forward", lambda q: (sizes.append(len(q)), forward(q))[1])
    prompts = ["a red heart", "two stars", "a blue circle", "a red circle"]
    evaluate(reward, to_samples(photos(4, SIDE, SIDE), prompts))
    assert sorted(sizes) == [1, 1, 2]


def test_vqa_in_half_precision_is_close(saved):
    folder, _ = saved("llava")
    samples = to_samples(photos(4, SIDE, SIDE))
    half = make_reward("vqa", model=folder, dtype="bfloat16")
    assert half.network.dtype == torch.bfloat16
    value = evaluate(half, samples).value
    assert value.dtype == torch.float32
    whole = evaluate(make_reward("vqa", model=folder), samples).value
    torch.testing.assert_close(value, whole, atol=0.01, rtol=0)


def test_vqa_says_what_is_wrong(saved, tmp_path):
    folder, network = saved("llava")
    with pytest.raises(ValueError, match="needs the option model"):
        make_reward("vqa")
    with pytest.raises(ValueError, match=r"must contain \{prompt\}, but 'is it good\?' came"):
        make_reward("vqa", model=folder, question="is it good?")
    with pytest.raises(ValueError, match="'oui' is not one token"):
        make_reward("vqa", model=folder, answers=["oui", "non"])
    with pytest.raises(ValueError, match="chunk_size must be at least 1, but 0 came"):
        make_reward("vqa", model=folder, chunk_size=0)
    weights = {n: w for n, w in network.state_dict().items() if "down_proj" not in n}
    network.save_pretrained(tmp_path, state_dict=weights)
    make_reward("vqa", model=folder)._processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 2 weights, one of them .*down_proj"):
        make_reward("vqa", model=str(tmp_path))
    tokenizer().save_pretrained(tmp_path / "text")
    with pytest.raises((ValueError, OSError)):
        make_reward("vqa", model=str(tmp_path / "text"))


# --------------------------------------------------------------------------------------------
# OCR
# --------------------------------------------------------------------------------------------


@functools.cache
def defined_distance(a: str, b: str) -> int:
    """Levenshtein's recurrence as it is defined."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        defined_distance(a[1:], b) + 1,
        defined_distance(a, b[1:]) + 1,
        defined_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edit_distance():
    known = {("kitten", "sitting"): 3, ("flaw", "lawn"): 2, ("", "abc"): 3, ("abc", "abc"): 0}
    for pair, distance in known.items():
        assert edit_distance(*pair) == edit_distance(*pair[::-1]) == distance
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 9))) for _ in range(2))
        assert edit_distance(a, b) == defined_distance(a, b)


def test_found_text():
    assert found_text("Hello World", "hello\nworld") == 1
    assert found_text("OPEN", "we are open today") == 1
    assert found_text("hello", "hallo") == pytest.approx(4 / 5)
    assert found_text("hello", "") == 0
    assert found_text("hi", "a lot of other words") == 0


def test_quoted():
    assert quoted('a sign that says "Open 24h"') == "Open 24h"
    assert quoted('“Hot” coffee and "cold" beer, it\'s fine') == "Hot cold"
    for prompt in ("a cat", 'a 5" nail', 'an empty "" sign', 'a blank " " sign'):
        with pytest.raises(ValueError, match="there is none in"):
            quoted(prompt)


def drawn(text: str) -> np.ndarray:
    """(64, 192, 3) uint8: black words on white."""
    picture = Image.new("RGB", (192, 64), "white")
    ImageDraw.Draw(picture).text((10, 12), text, fill="black", font=ImageFont.load_default(28))
    return np.array(picture)


@pytest.fixture(scope="module")
def reader():
    """The settings under which reading is fast enough for tests; pictures are small here."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return {"Det.limit_side_len": 96, "EngineConfig.onnxruntime.intra_op_num_threads": 1}


def test_ocr_reads_what_was_drawn(reader):
    reward = make_reward("ocr", params=reader)
    texts = ["Hello World", "Hello World", "Hello Word", "Coffee", ""]
    prompts = ['a sign "Hello World"', 'a "hello" sign', '"Hello World"', '"Hello World"', '"Hi"']
    value = evaluate(reward, to_samples(np.stack([drawn(t) for t in texts]), prompts)).value
    lost = edit_distance("helloworld", "coffee")
    expected = torch.tensor([1, 1, 1 - 1 / 10, 1 - lost / 10, 0])
    torch.testing.assert_close(value, expected)


def test_ocr_keeps_the_contract(reader):
    pixels = np.stack([drawn("Hello World"), drawn("Coffee")])
    check_reward(
        make_reward("ocr", params=reader), to_samples(pixels, ['a "Hello Word"', 'no "Tea"'])
    )
    one = make_reward("ocr", target="Coffee", params=reader)
    assert not one.info.needs_prompt
    assert evaluate(one, to_samples(pixels, None)).value[1] == 1


def test_ocr_that_fails_is_an_error_and_not_a_zero(monkeypatch):
    def fails(picture):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "_rapidocr", lambda params: fails)
    reward = make_reward("ocr", target="x")
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(reward, to_samples(photos(1, 8, 8), None))


def test_ocr_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr(module, "_rapidocr", lambda params: None)
    with pytest.raises(ValueError, match="must have letters to read, but ' ' came"):
        make_reward("ocr", target=" ")
    with pytest.raises(ValueError, match="there is none in 'a cat'"):
        evaluate(make_reward("ocr"), to_samples(photos(1, 8, 8), ["a cat"]))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r'pip install "diffreward\[ocr\]"'):
        make_reward("ocr")


@pytest.mark.parametrize("name", ["vqa", "ocr"])
def test_pixels_that_are_not_finite_are_never_rounded(saved, monkeypatch, name):
    monkeypatch.setattr(module, "_rapidocr", lambda params: None)
    options = {"vqa": {"model": saved("llava")[0]}, "ocr": {"target": "x"}}[name]
    samples = to_samples(photos(4, SIDE, SIDE))
    samples.data[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="sample 2 has NaN"):  # without evaluate's own check
        make_reward(name, **options)(samples)

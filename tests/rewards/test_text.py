"""Text rewards on tiny random models, saved as published ones are, against independent formulas."""

import functools
import math
import shutil

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit, log_softmax, softmax
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from diffreward.rewards import available_rewards, evaluate, make_reward
from diffreward.rewards.testing import check_reward
from diffreward.samples import Samples

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "the", "cat", "dog", "red", "heart"]
VOCAB = {word: i for i, word in enumerate(SPECIAL + WORDS)}
TEXTS = ["the cat", "a red heart the dog b c d e", "x", "the the the red", "q w e r t y u i o p"]
PROMPTS = ["a cat", "red heart", "x", "dog", "q w e r t y u i o p a s d f g"]
TINY = dict(vocab_size=len(VOCAB), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


def tokenizer(bert: bool, **special):
    words = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if bert:
        pair = [("[CLS]", VOCAB["[CLS]"]), ("[SEP]", VOCAB["[SEP]"])]
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=pair
        )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)


def save(network, folder, tokens):
    network.eval().save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


def seeded(build, config, seed=0):
    """Random weights, larger than usual, so that scores differ between texts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build(config)
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    return network


BERT_TOKENS = dict(bert=True, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sentence encoder, classifiers, and language models with and without BOS."""
    root = tmp_path_factory.mktemp("models")
    bert = dict(**TINY, intermediate_size=32, max_position_embeddings=24)
    gpt = dict(
        vocab_size=len(VOCAB), n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=4,
        eos_token_id=4,
    )  # fmt: skip
    roberta = RobertaConfig(
        **TINY, intermediate_size=32, max_position_embeddings=26, pad_token_id=0, type_vocab_size=1
    )
    toxic = dict(
        id2label={0: "toxic", 1: "obscene", 2: "insult"}, problem_type="multi_label_classification"
    )
    of = tokenizer(**BERT_TOKENS)
    plain, bos = tokenizer(bert=False), tokenizer(bert=False, bos_token="<s>", eos_token="<s>")
    build = {
        "encoder": (BertModel, BertConfig(**bert), of),
        "roberta": (RobertaModel, roberta, of),
        "cola": (BertForSequenceClassification, BertConfig(**bert, num_labels=2), of),
        "three": (BertForSequenceClassification, BertConfig(**bert, num_labels=3), of),
        "toxic": (BertForSequenceClassification, BertConfig(**bert, **toxic), of),
        "one": (BertForSequenceClassification, BertConfig(**bert, num_labels=1), of),
        "regression": (
            BertForSequenceClassification,
            BertConfig(**bert, num_labels=1, problem_type="regression"),
            of,
        ),
        "decoder": (GPT2ForSequenceClassification, GPT2Config(**gpt, num_labels=2), bos),
        "gpt": (GPT2LMHeadModel, GPT2Config(**gpt), bos),
        "gpt_without_bos": (GPT2LMHeadModel, GPT2Config(**gpt), plain),
    }
    return {
        name: save(seeded(kind, config, seed), root / name, tokens)
        for seed, (name, (kind, config, tokens)) in enumerate(build.items())
    }


def ids_of(text, bert=True):
    ids = [VOCAB.get(word, VOCAB["[UNK]"]) for word in text.split()]
    return [VOCAB["[CLS]"], *ids, VOCAB["[SEP]"]] if bert else ids


@functools.cache
def load(kind, folder):
    return kind.from_pretrained(folder).eval()


def hidden(folder, ids):
    """One text at a time, without padding or mask."""
    network = load(AutoModel, folder)
    with torch.no_grad():
        return network(torch.tensor([ids])).last_hidden_state[0].double().numpy()


def close(value, expected, atol=1e-5):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(value.double(), expected, atol=atol, rtol=1e-5)


def text(texts, prompts=None):
    return Samples(list(texts), "text", prompts)


# --------------------------------------------------------------------------------------------
# Similarity
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("name", ["encoder", "roberta"])
def test_text_similarity_is_the_cosine_of_pooled_states(folders, name, pooling):
    folder = folders[name]

    def embed(words):
        states = hidden(folder, ids_of(words))
        return states.mean(0) if pooling == "mean" else states[0]

    def cosine(a, b):
        a, b = embed(a), embed(b)
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    spec = {"name": "text_similarity", "model": folder, "pooling": pooling, "chunk_size": 2}
    reward = make_reward(spec)
    value = evaluate(reward, text(TEXTS, PROMPTS)).value
    close(value, [cosine(a, b) for a, b in zip(TEXTS, PROMPTS, strict=True)])
    assert value.std() > 0.01
    close(value[2], 1.0)  # the same text
    check_reward(reward, text(TEXTS, PROMPTS))

    reference = make_reward(spec, reference="red dog")
    close(evaluate(reference, text(TEXTS)).value, [cosine(a, "red dog") for a in TEXTS])
    assert not reference.info.needs_prompt and reward.info.needs_prompt
    check_reward(reference, text(TEXTS))


def test_prompts_are_encoded_once(folders, monkeypatch):
    reward = make_reward("text_similarity", model=folders["encoder"])
    seen = []
    features = reward.features
    monkeypatch.setattr(
        reward, "features", lambda texts: seen.append(list(texts)) or features(texts)
    )
    evaluate(reward, text(TEXTS[:3], ["a", "b", "a"]))
    evaluate(reward, text(TEXTS[:2], ["c", "a"]))
    assert seen == [TEXTS[:3], ["a", "b"], TEXTS[:2], ["c"]]


def test_a_text_that_is_too_long_is_cut_and_warned_of(folders):
    long = " ".join("abcdefghijklmnopqrstuvwxyz" * 2)
    # BERT has 24 positions; RoBERTa 26, of which two come before the first token
    for name, fits in [("encoder", 22), ("roberta", 23)]:
        reward = make_reward("text_similarity", model=folders[name], reference="the cat")
        with pytest.warns(UserWarning, match=rf"reads only the first {fits + 2} of 54 tokens of s"):
            value = evaluate(reward, text(["a", long])).value
        assert value[1] == pytest.approx(
            evaluate(reward, text([" ".join(long.split()[:fits])])).value.item(), abs=1e-5
        )
    reward = make_reward("text_similarity", model=folders["encoder"], reference="a", max_length=5)
    with pytest.warns(UserWarning, match="first 5 of 6"):
        value = evaluate(reward, text(["a b c d"])).value
    close(value, evaluate(reward, text(["a b c"])).value)
    with pytest.raises(ValueError, match="reads 2 to 24 tokens, but max_length=25 came"):
        make_reward("text_similarity", model=folders["encoder"], max_length=25)


# --------------------------------------------------------------------------------------------
# Classification
# --------------------------------------------------------------------------------------------


def logits_of(folder, texts=TEXTS, bert=True):
    network = load(AutoModelForSequenceClassification, folder)
    with torch.no_grad():
        rows = [network(torch.tensor([ids_of(t, bert)])).logits[0] for t in texts]
    return torch.stack(rows).double().numpy()


OUTPUTS = ["probability", "log_probability", "logit"]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", ["cola", "three", "decoder"])
def test_classifier_with_one_label_among_others(folders, name, output):
    logits = logits_of(folders[name], bert=name != "decoder")
    p = softmax(logits, axis=1)
    expected = {
        "probability": p[:, 1],
        "log_probability": log_softmax(logits, axis=1)[:, 1],
        "logit": np.log(p[:, 1] / (1 - p[:, 1])),
    }[output]
    avoided = {
        "probability": 1 - p[:, 1],
        "log_probability": np.log(1 - p[:, 1]),
        "logit": -expected,
    }[output]
    assert p[:, 1].std() > 0.01
    spec = {"model": folders[name], "label": "label_1", "output": output, "chunk_size": 2}
    reward = make_reward({"classifier": spec})
    close(evaluate(reward, text(TEXTS)).value, expected)
    avoid = make_reward({"classifier": {**spec, "label": 1, "avoid": True}})
    close(evaluate(avoid, text(TEXTS)).value, avoided)
    if output == "logit":
        check_reward(reward, text(TEXTS))


@pytest.mark.parametrize("output", OUTPUTS)
def test_classifier_with_labels_of_their_own(folders, output):
    logits = logits_of(folders["toxic"])[:, 2]
    reward = make_reward("classifier", model=folders["toxic"], label="Insult", output=output)
    value = evaluate(reward, text(TEXTS)).value
    close(
        value,
        {"probability": expit, "log_probability": log_expit, "logit": np.array}[output](logits),
    )
    shared = make_reward("classifier", model=folders["toxic"], label=2, multi_label=False)
    close(evaluate(shared, text(TEXTS)).value, softmax(logits_of(folders["toxic"]), axis=1)[:, 2])
    assert (
        "not insult"
        in make_reward("classifier", model=folders["toxic"], label=2, avoid=True).info.description
    )


def test_classifier_with_a_single_output(folders):
    logits = logits_of(folders["one"])[:, 0]
    reward = make_reward("classifier", model=folders["one"], label=0)
    close(evaluate(reward, text(TEXTS)).value, expit(logits))
    with pytest.raises(ValueError, match="is a regression and has no probability"):
        make_reward("classifier", model=folders["regression"], label=0)
    number = make_reward("classifier", model=folders["regression"], label=0, output="logit")
    close(evaluate(number, text(TEXTS)).value, logits_of(folders["regression"])[:, 0])


def test_classifier_says_which_labels_there_are(folders):
    says = r"no label 'insults' \(did you mean 'insult'\?\); it has 0 toxic, 1 obscene, 2 insult"
    with pytest.raises(ValueError, match=says):
        make_reward("classifier", model=folders["toxic"], label="insults")
    for label in (3, -1):
        with pytest.raises(ValueError, match=f"no label {label}"):
            make_reward("classifier", model=folders["toxic"], label=label)
    with pytest.raises(ValueError, match="output is one of probability, log_prob"):
        make_reward("classifier", model=folders["toxic"], label=0, output="p")
    with pytest.raises(ValueError, match="needs the option label"):
        make_reward("classifier", model=folders["toxic"])


def test_a_head_that_was_never_trained_is_refused(folders):
    with pytest.raises(ValueError, match=r"no weights for classifier\.bias.*would be random"):
        make_reward("classifier", model=folders["encoder"], label=0)
    # a sentence encoder may lack the pooler, which is not read, but nothing else
    network = AutoModel.from_pretrained(folders["encoder"], add_pooling_layer=False)
    folder = f"{folders['encoder']}_without_pooler"
    shutil.copytree(folders["encoder"], folder)
    network.save_pretrained(folder)
    reward = make_reward("text_similarity", model=folder, reference="a")
    whole = make_reward("text_similarity", model=folders["encoder"], reference="a")
    close(evaluate(reward, text(TEXTS)).value, evaluate(whole, text(TEXTS)).value)


# --------------------------------------------------------------------------------------------
# Perplexity
# --------------------------------------------------------------------------------------------


def log_likelihoods(folder, ids, length, stride):
    """log p of each token but the first, each by its own forward pass over what it may see."""
    network = load(AutoModelForCausalLM, folder)
    found = []
    for target in range(1, len(ids)):
        start = 0
        while start + length <= target:  # the first window that has it
            start += stride
        with torch.no_grad():
            logits = network(torch.tensor([ids[start:target]])).logits[0, -1]
        found.append(log_softmax(logits.double().numpy())[ids[target]])
    return np.array(found)


LONG = " ".join("the cat q w e r t y u i o p a s d f g h j k l z x c v b n m".split() * 2)


@pytest.mark.parametrize("stride", [None, 1, 4, 11])
def test_perplexity_is_the_mean_log_likelihood_of_the_whole_text(folders, stride):
    folder = folders["gpt"]
    texts = [*TEXTS, LONG, "the cat " * 9]
    reward = make_reward({"perplexity": {"model": folder, "stride": stride, "chunk_size": 3}})
    scores = evaluate(reward, text(texts))
    each = [
        log_likelihoods(folder, [VOCAB["<s>"], *ids_of(t, bert=False)], 12, stride or 6)
        for t in texts
    ]
    close(scores.value, [nats.mean() for nats in each])
    assert scores.value.std() > 0.01 and (scores.value < 0).all()
    close(scores.parts["perplexity"], [math.exp(-nats.mean()) for nats in each], atol=1e-3)
    assert scores.parts["tokens"].tolist() == [len(t.split()) for t in texts]
    if stride is None:
        check_reward(reward, text(texts))


def test_perplexity_agrees_with_the_loss_of_transformers(folders):
    network = load(AutoModelForCausalLM, folders["gpt"])
    ids = torch.tensor([[VOCAB["<s>"], *ids_of("a red heart the dog", bert=False)]])
    with torch.no_grad():
        loss = network(ids, labels=ids).loss
    value = evaluate(make_reward("perplexity", model=folders["gpt"]), text(["a red heart the dog"]))
    close(value.value, [-loss.item()])


def test_a_likelier_text_scores_higher(folders):
    """A model that says what it has seen last: repetition is likely, and the sign is right."""
    network = AutoModelForCausalLM.from_pretrained(folders["gpt"])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.transformer.wte.weight.copy_(
            torch.nn.functional.one_hot(torch.arange(len(VOCAB)) % 16, 16) * 9.0
        )
        network.transformer.ln_f.weight.fill_(1.0)
    folder = f"{folders['gpt']}_copies"
    shutil.copytree(folders["gpt"], folder)
    network.save_pretrained(folder)
    value = evaluate(
        make_reward("perplexity", model=folder, bos=False), text(["a a a a", "a b c d"])
    ).value
    assert value[0] > value[1] + 1


def test_without_bos_the_first_token_only_serves_as_context(folders):
    words = "a red heart"
    ids = ids_of(words, bert=False)
    for reward in (
        make_reward("perplexity", model=folders["gpt_without_bos"]),
        make_reward("perplexity", model=folders["gpt_without_bos"], bos=False),
    ):
        scores = evaluate(reward, text([words]))
        close(scores.value, [log_likelihoods(folders["gpt_without_bos"], ids, 12, 6).mean()])
        assert scores.parts["tokens"].tolist() == [2]
        with pytest.raises(ValueError, match=r"sample 1 \('x'\) has one token, and none before"):
            evaluate(reward, text(["a b", "x"]))
        with pytest.raises(ValueError, match=r"sample 0 \(''\) has no tokens"):
            evaluate(reward, text([""]))
    # with one, a single token has a score, and an empty text still none
    with_bos = make_reward("perplexity", model=folders["gpt"])
    assert evaluate(with_bos, text(["x"])).parts["tokens"].tolist() == [1]
    with pytest.raises(ValueError, match=r"sample 1 \(' '\) has no tokens"):
        evaluate(with_bos, text(["x", " "]))


def test_perplexity_refuses_windows_without_context(folders):
    for stride in (0, 12):
        with pytest.raises(ValueError, match=f"from 1 to 11 .*but {stride} came"):
            make_reward("perplexity", model=folders["gpt"], stride=stride)
    with pytest.raises(ValueError, match="reads 2 to 12 tokens, but max_length=13 came"):
        make_reward("perplexity", model=folders["gpt"], max_length=13)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        make_reward("perplexity", model=folders["gpt"], chunk_size=0)


# --------------------------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------------------------

NAMES = {"text_similarity": {}, "classifier": {"label": 0}, "perplexity": {}}


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_there_are_an_error(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        make_reward({"name": name, "model": str(tmp_path / "nowhere"), **NAMES[name]})
    with pytest.raises(FileNotFoundError, match="'someone/something' is no folder here and could"):
        make_reward({"name": name, "model": "someone/something", **NAMES[name]})
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError)):
        make_reward({"name": name, "model": str(tmp_path / "empty"), **NAMES[name]})


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_knows_them(name):
    info = available_rewards()[name]
    assert info.modality == "text" and info.differentiable is False
    assert info.licence and info.source and info.description and info.needs_download


def test_a_text_without_tokens_is_named(folders):
    tokens = tokenizer(bert=False, pad_token="[PAD]")
    folder = f"{folders['encoder']}_plain"
    shutil.copytree(folders["encoder"], folder)
    tokens.save_pretrained(folder)
    reward = make_reward("text_similarity", model=folder, reference="a")
    with pytest.raises(ValueError, match=r"sample 1 \(''\) has no tokens"):
        evaluate(reward, text(["a", ""]))


def test_text_rewards_combine(folders):
    spec = {
        "weighted_sum": [
            {"log_sigmoid": {"reward": {"name": "perplexity", "model": folders["gpt"]},
                             "reference": -3}},
            {"name": "classifier", "model": folders["toxic"], "label": "toxic", "avoid": True,
             "weight": 2},
        ]
    }  # fmt: skip
    reward = make_reward(spec)
    likelihood = evaluate(make_reward("perplexity", model=folders["gpt"]), text(TEXTS)).value
    toxic = expit(logits_of(folders["toxic"])[:, 0])
    expected = log_expit(likelihood.double().numpy() + 3) + 2 * (1 - toxic)
    close(evaluate(reward, text(TEXTS)).value, expected)
    assert reward.info.modality == "text" and reward.info.differentiable is False
    check_reward(reward, text(TEXTS))

"""Text as a policy: parity with transformers' models, on tiny random ones and local tokenizers."""

import functools
import itertools
import json
import math

import pytest
import torch
import transformers
from policies.mdlm_stand_in import StandIn, StandInConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from diffreward.finetuning import finetune
from diffreward.finetuning.options import LoRA, Training
from diffreward.finetuning.trainable import Trainable
from diffreward.policies import load_policy
from diffreward.policies.masked import first_hitting
from diffreward.policies.text import TextPolicy, load_text
from diffreward.policy import Policy, Trajectory, path_log_prob, rollout, sample_generators
from diffreward.steering import steer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]
WORDS = ["a", "red", "blue", "cat", "dog", "."]
VOCAB = {word: i for i, word in enumerate(SPECIAL + WORDS)}
PAD, CLS, SEP, MASK = (VOCAB[f"[{name}]"] for name in ("PAD", "CLS", "SEP", "MASK"))
HOLE = len(VOCAB)  # an id without a token, as vocabularies that are rounded up have
V = HOLE + 1
CHAIN_MASK = V
SIZE = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    pad_token_id=PAD,
)  # fmt: skip
NETWORKS = {
    "BertForMaskedLM": ("BertConfig", dict(max_position_embeddings=20)),
    "RobertaForMaskedLM": ("RobertaConfig", dict(max_position_embeddings=21, type_vocab_size=1)),
    "ModernBertForMaskedLM": (
        "ModernBertConfig",
        dict(max_position_embeddings=20, bos_token_id=CLS, eos_token_id=SEP, cls_token_id=CLS,
             sep_token_id=SEP, local_attention=4),
    ),
    "EsmForMaskedLM": (
        "EsmConfig",
        dict(max_position_embeddings=20, mask_token_id=MASK, token_dropout=True,
             position_embedding_type="rotary"),
    ),
}  # fmt: skip
TAKE_EMBEDDINGS = ["BertForMaskedLM", "RobertaForMaskedLM", "ModernBertForMaskedLM"]


FEW = {word: i for word, i in VOCAB.items() if i < HOLE - 2}


def words(vocab=VOCAB, bert=True, **special):
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    if bert:
        tokens.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
        special = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]") | special
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]", **special)


def network(kind="BertForMaskedLM", seed=0):
    """Random weights, larger than usual, so that predictions differ between contexts."""
    config, options = NETWORKS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(getattr(transformers, config)(**SIZE, **options))
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.5)
    return model.eval()


@functools.cache
def shared(kind):
    return network(kind)


def policy_of(kind="BertForMaskedLM", model=None, **options):
    options = {"max_length": 10, "num_steps": 4} | options
    return TextPolicy(model or shared(kind), words(mask_token="[MASK]"), **options)


def log_letters(logits):
    """Log-probabilities of the words, from logits (..., v) of a network: nothing else is drawn."""
    only = torch.full((V,), -math.inf)
    only[len(SPECIAL) : HOLE] = 0
    return (logits + only).log_softmax(-1)


def reds(samples):
    return torch.tensor([float(text.split().count("red")) for text in samples.data])


# -- prompts ------------------------------------------------------------------------------------


def test_prompt_with_blanks_is_a_template():
    policy = policy_of()
    condition = policy.encode(["a [MASK] cat [MASK]*2", "[MASK]"])
    row = [CLS, VOCAB["a"], -1, VOCAB["cat"], -1, -1, SEP, PAD, PAD, PAD]
    assert condition.tensors["fixed"].tolist() == [row, [CLS, -1, SEP, *[PAD] * 7]]
    assert condition.tensors["attention"].sum(1).tolist() == [7, 3]
    x = policy.initial(condition)
    assert x[1].tolist() == [CLS, CHAIN_MASK, SEP, *[PAD] * 7]


def test_prompt_without_blanks_is_continued():
    policy = policy_of(length=3)
    condition = policy.encode(["a cat", "", "[MASK] dog"])
    assert condition.tensors["fixed"].tolist() == [
        [CLS, VOCAB["a"], VOCAB["cat"], -1, -1, -1, SEP, *[PAD] * 3],
        [CLS, -1, -1, -1, SEP, *[PAD] * 5],
        [CLS, -1, VOCAB["dog"], SEP, *[PAD] * 6],  # a template is one whatever length is
    ]
    assert (policy.encode(["a cat"], length=1).tensors["fixed"] < 0).sum() == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat", r"prompt 1 \('a cat'\) has no blanks: write \[MASK\] .* or give length"),
        ("a [MASK]*9", r"has 12 tokens .* but max_length is 10: .*; the network reads 20"),
        ("[MASK]*0", r"prompt 1 .* has no blanks"),
    ],
)
def test_prompt_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        policy_of().encode(["[MASK]", prompt])


# -- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_logits_are_the_networks_and_padding_has_no_part(kind):
    """Each row against the transformers model called alone, without padding and mask."""
    policy = policy_of(kind)
    prompts = ["a [MASK] cat [MASK]*3", "[MASK] .", "a red [MASK]"]
    condition = policy.encode(prompts)
    x = policy.initial(condition)
    x[0, 2] = VOCAB["blue"]
    got = policy.logits(x, torch.ones(3), condition)
    for row, prompt in enumerate(prompts):
        tokens = words(mask_token="[MASK]")(prompt.replace("[MASK]*3", "[MASK]" * 3))["input_ids"]
        if row == 0:
            tokens[2] = VOCAB["blue"]
        alone = shared(kind)(torch.tensor([tokens])).logits[0]
        free = [at for at, k in enumerate(tokens) if k == MASK]
        assert free == (x[row] == CHAIN_MASK).nonzero()[:, 0].tolist()
        assert_close(got[row, free].log_softmax(-1), log_letters(alone[free]), rtol=1e-4, atol=1e-4)
        law = policy.step_law(x, 1, condition)
        assert_close(law.x0[row, free], log_letters(alone[free]).exp(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TAKE_EMBEDDINGS)
def test_relaxed_is_hard_at_vertices_and_has_a_gradient(kind):
    policy = policy_of(kind)
    condition = policy.encode(["a [MASK] cat [MASK]*3", "[MASK] ."])
    x = policy.initial(condition)
    soft = policy.relax(x).requires_grad_()
    hard = policy.logits(x, torch.ones(2), condition)
    got = policy.logits(soft, torch.ones(2), condition)
    some = condition.tensors["attention"]
    assert_close(got[some], hard[some], rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(got[0, 2, VOCAB["red"]], soft)
    # along a direction, against finite differences of embeddings mixed by hand
    mixed = policy.relax(x).double()
    table = policy.denoiser.get_input_embeddings().weight.detach().double()
    table = torch.cat([table[:V], table[MASK : MASK + 1]])
    model = network(kind).double()
    found = []
    for step in (-1e-4, 1e-4):
        moved = mixed.clone()
        moved[0, 4, VOCAB["dog"]] += step
        moved[0, 4, CHAIN_MASK] -= step
        out = model(inputs_embeds=moved @ table, attention_mask=some.long()).logits
        found.append(out[0, 2, VOCAB["red"]])
    slope = gradient[0, 4, VOCAB["dog"]] - gradient[0, 4, CHAIN_MASK]
    assert_close(slope.double(), (found[1] - found[0]) / 2e-4, rtol=1e-2, atol=1e-4)


def test_network_that_counts_its_masks_takes_no_relaxed_tokens():
    policy = policy_of("EsmForMaskedLM")
    condition = policy.encode(["a [MASK]"])
    soft = policy.relax(policy.initial(condition))
    with pytest.raises(ValueError, match="EsmForMaskedLM cannot take relaxed tokens"):
        policy.step_law(soft, 0, condition)


def test_adapters_of_the_embedding_are_in_relaxed_logits():
    from peft import LoraConfig, inject_adapter_in_model

    policy = policy_of(model=network())  # as finetuning does it, whatever peft transformers wants
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["word_embeddings"]), policy.denoiser)
    for name, p in policy.denoiser.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p)
    condition = policy.encode(["a [MASK]*3"])
    x = policy.initial(condition)
    hard, soft = (policy.logits(s, torch.ones(1), condition) for s in (x, policy.relax(x)))
    assert_close(soft[:, :6], hard[:, :6], rtol=1e-4, atol=1e-4)
    before = policy.reference().step_law(x, 0, condition).x0
    assert_close(before, policy_of().step_law(x, 0, condition).x0)
    assert (before - policy.step_law(x, 0, condition).x0).abs().max() > 1e-3


# -- the chain ----------------------------------------------------------------------------------


def test_rollout_keeps_prompts_and_draws_words_alone():
    policy = policy_of(temperature=30.0)  # everything that may be drawn soon is
    assert isinstance(policy, Policy)
    condition = policy.encode(["a [MASK]*4 cat"] * 60 + ["[MASK] ."] * 60)
    path = rollout(policy, condition, sample_generators(0, 1, 120), keep_path=True, log_prob=True)
    assert_close(path_log_prob(policy, path), path.log_probs)
    fixed = condition.tensors["fixed"]
    assert all((x[fixed >= 0] == fixed[fixed >= 0]).all() for x in path.latents)
    assert set(path.final[fixed < 0].tolist()) == {VOCAB[word] for word in WORDS}
    samples = policy.decode(path.final, condition)
    assert samples.modality == "text" and samples.prompts == condition.prompts
    first = [WORDS[k - len(SPECIAL)] for k in path.final[0, 2:6].tolist()]
    assert samples.data[0] == " ".join(["a", *first, "cat"])
    assert all(text.split()[1:] == ["."] for text in samples.data[60:])
    assert (first_hitting(policy, condition).final[fixed < 0] >= len(SPECIAL)).all()


def test_texts_do_not_depend_on_their_neighbours():
    policy = policy_of(length=4)
    prompts = ["a", "", "a red cat [MASK] dog"]
    generators = lambda: sample_generators(3, 3, 1)  # noqa: E731
    together = rollout(policy, policy.encode(prompts), generators()).final
    for row, prompt in enumerate(prompts):
        alone = rollout(policy, policy.encode([prompt]), [generators()[row]]).final
        assert torch.equal(alone[0], together[row])


def test_law_of_two_blanks_by_enumeration():
    """All paths of two steps, against the same law in closed form from the model's own logits."""
    policy = policy_of(num_steps=2)
    condition = policy.encode(["a [MASK][MASK]"])
    start = policy.initial(condition)
    letters = [VOCAB[word] for word in WORDS]
    paths, ends = [], []
    for middle in itertools.product([*range(V), CHAIN_MASK], repeat=2):
        for end in itertools.product(range(V), repeat=2):
            if all(m in (CHAIN_MASK, e) for m, e in zip(middle, end, strict=True)):
                paths.append((middle, end))
    x1, x2 = (start.repeat(len(paths), 1) for _ in range(2))
    x1[:, 2:4], x2[:, 2:4] = (torch.tensor(v) for v in zip(*paths, strict=True))
    n = len(paths)
    trajectory = Trajectory(condition.repeat(n), [start.repeat(n, 1), x1, x2])
    p = path_log_prob(policy, trajectory).sum(1).exp()
    assert_close(p.sum().item(), 1.0, rtol=0, atol=1e-6)
    ends = x2[:, 2:4].tolist()
    assert all(q == 0 or set(end) <= set(letters) for q, end in zip(p.tolist(), ends, strict=True))

    def given(first, second):
        out = shared("BertForMaskedLM")(torch.tensor([[CLS, VOCAB["a"], first, second, SEP]]))
        return log_letters(out.logits[0, 2:4].double()).exp()

    blank = given(MASK, MASK)
    for e in itertools.product(letters, repeat=2):
        both = blank[0, e[0]] * blank[1, e[1]]
        left = blank[0, e[0]] * given(e[0], MASK)[1, e[1]]
        right = blank[1, e[1]] * given(MASK, e[1])[0, e[0]]
        got = sum(q for q, end in zip(p.tolist(), ends, strict=True) if tuple(end) == e)
        assert_close(got, ((2 * both + left + right) / 4).item(), rtol=1e-4, atol=1e-7)


def test_decode_relaxed_and_masked():
    policy = policy_of()
    condition = policy.encode(["a [MASK] cat"])
    law = policy.step_law(policy.initial(condition), 0, condition)
    likeliest = WORDS[int(law.x0[0, 2, len(SPECIAL) : HOLE].argmax())]
    assert policy.decode(law.x0, condition).data == [f"a {likeliest} cat"]
    relaxed = torch.cat([law.x0, torch.zeros(1, 10, 1)], -1)
    assert policy.decode(relaxed, condition).data == [f"a {likeliest} cat"]
    with pytest.raises(ValueError, match="position 2 of sample 0 is still masked"):
        policy.decode(policy.initial(condition), condition)
    unknown = policy.encode(["a zebra [MASK]"])
    text = policy.decode(rollout(policy, unknown).final, unknown).data[0]
    assert text.startswith("a [UNK] ")  # what the network was shown is not hidden


def test_omitted_tokens_are_not_drawn():
    policy = policy_of(omit=["red", "blue", "."], temperature=30.0)
    condition = policy.encode(["red [MASK]*4"] * 40)
    final = rollout(policy, condition, torch.Generator().manual_seed(0)).final
    assert (final[:, 1] == VOCAB["red"]).all()  # of the prompt: it stays
    assert set(final[:, 2:6].flatten().tolist()) == {VOCAB[w] for w in ("a", "cat", "dog")}


# -- rewards ------------------------------------------------------------------------------------


def test_steering_samples_the_tilted_law():
    policy = policy_of(temperature=3.0)
    law = policy.step_law(policy.initial(c := policy.encode(["a [MASK] cat"])), 0, c)
    p = law.x0[0, 2].double()
    tilted = p.clone()
    tilted[VOCAB["red"]] *= math.exp(2.0)
    tilted /= tilted.sum()
    result = steer(policy, reds, "a [MASK] cat", num_particles=400, lmbda=2.0, progress=False)
    drawn = torch.tensor([VOCAB[text.split()[1]] for text in result.particles.data])
    w = result.log_weights[0].softmax(0)
    got = torch.zeros(V, dtype=torch.float64).index_add(0, drawn, w)
    assert_close(got, tilted, rtol=0, atol=0.1)  # 4 standard errors of 400 independent draws
    assert abs(tilted - p).max() > 0.2


def test_gradient_of_a_text_reward_is_refused():
    with pytest.raises(ValueError, match="gradient"):
        steer(policy_of(), reds, "a [MASK]", proposal="gradient", progress=False)


@pytest.mark.parametrize("algorithm", ["grpo", "prdp"])
def test_finetuning_teaches_a_word(algorithm, tmp_path):
    model = network()
    model.save_pretrained(tmp_path / "model")
    words(mask_token="[MASK]").save_pretrained(tmp_path / "model")
    policy = load_policy(
        tmp_path / "model", num_steps=3, max_length=8, length=2, temperature=3.0, device="cpu"
    )
    assert isinstance(policy, TextPolicy)
    result = finetune(
        policy, reds, algorithm, ["a", "[MASK] cat [MASK] .", ""],
        lora=LoRA(rank=4, targets=["query", "value", "dense"]), prompts_per_update=3,
        samples_per_prompt=8, iterations=8, learning_rate=2e-2, max_batch=16, eval_samples=8,
        evaluate_every=0, loggers=[], output=tmp_path / "run", progress=False,
    )  # fmt: skip
    before, after = (e.scores[next(iter(e.scores))].mean() for e in (result.before, result.after))
    assert after > before + 0.5
    again = load_policy(
        tmp_path / "model", num_steps=3, max_length=8, lora=tmp_path / "run" / "final",
        temperature=3.0, device="cpu",
    )  # fmt: skip
    condition = again.encode(["a [MASK]*3"])
    x = again.initial(condition)
    laws = [p.step_law(x, 0, condition).x0 for p in (policy, again, policy.reference())]
    assert_close(laws[1], laws[0], rtol=1e-4, atol=1e-5)
    assert (laws[2] - laws[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kind", "names"),
    [("BertForMaskedLM", {"query", "key", "value"}), ("ModernBertForMaskedLM", {"Wqkv"})],
)
def test_default_adapters_are_of_the_attention(kind, names):
    trained = Trainable(policy_of(kind, network(kind)), Training())
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained.parameters} == names


def test_all_weights_are_saved_with_their_tokenizer(tmp_path):
    policy = TextPolicy(network(), words(mask_token="[MASK]"), max_length=8, num_steps=3)
    trained = Trainable(policy, Training(method="full"))
    with torch.no_grad():
        for p in trained.parameters.values():
            p.add_(0.1)
    trained.save(tmp_path)
    again = load_policy(tmp_path, num_steps=3, max_length=8, device="cpu")
    condition = again.encode(["a [MASK]*3"])
    laws = [p.step_law(p.initial(condition), 0, condition).x0 for p in (policy, again)]
    assert_close(laws[1], laws[0])


# -- MDLM ---------------------------------------------------------------------------------------

GPT = {word: i for i, word in enumerate(["[UNK]", *WORDS, "<end>"])}  # MASK will be 8


def gpt_words():
    return words(GPT, bert=False, bos_token="<end>", eos_token="<end>")


def stand_in(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StandIn(StandInConfig(vocab_size=len(GPT) + 1, **options))


def test_mdlm_gets_its_noise_level_and_its_mask():
    model = stand_in()
    policy = TextPolicy(model, gpt_words(), max_length=6, num_steps=4, schedule="cosine")
    assert not policy.time_independent
    assert policy.most_tokens == 16 and policy.tokenizer.mask_token_id == len(GPT)
    condition = policy.encode(["a cat", "[MASK] [MASK] . [MASK]*3"])
    assert condition.tensors["fixed"].tolist() == [[1, 4, -1, -1, -1, -1], [-1, -1, 6, -1, -1, -1]]
    model.seen.clear()
    x = policy.initial(condition)
    got = policy.logits(x, torch.tensor([1.0, 0.5]), condition)
    alpha = [1e-3, 1 - (1 - 1e-3) * (1 - math.cos(math.pi / 4))]
    assert_close(model.seen[0], -torch.tensor(alpha).log())
    free = x == len(GPT) + 1
    expected = model(x.masked_fill(free, len(GPT)), timesteps=model.seen[0])
    drawable = list(range(1, len(WORDS) + 1))
    assert_close(got[free][:, drawable], expected[free][:, drawable])
    assert got[free][:, [0, 7, 8]].max() == -math.inf
    final = rollout(policy, condition, torch.Generator().manual_seed(0)).final
    assert len(policy.decode(final, condition).data[0].split()) == 6


def test_mdlm_without_time_conditioning_reuses_logits():
    policy = TextPolicy(stand_in(time_conditioning=False), gpt_words(), max_length=4, num_steps=8)
    condition = policy.encode(["a"])
    path = rollout(policy, condition, torch.Generator().manual_seed(0)).final
    with policy.reuse_logits():
        again = rollout(policy, condition, torch.Generator().manual_seed(0)).final
    assert policy.time_independent and torch.equal(path, again)


def test_mdlm_cannot_pad_nor_relax():
    policy = TextPolicy(stand_in(), gpt_words(), max_length=6)
    with pytest.raises(ValueError, match="has 2 tokens, and StandIn takes no attention mask"):
        policy.encode(["a [MASK]"])
    with pytest.raises(ValueError, match=r"\('a a a a a a'\) has no blanks"):
        policy.encode(["a a a a a a"])
    condition = policy.encode([""])
    with pytest.raises(ValueError, match="cannot take relaxed tokens"):
        policy.step_law(policy.relax(policy.initial(condition)), 0, condition)


def test_model_with_code_of_its_own(tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    StandInConfig.register_for_auto_class()
    StandIn.register_for_auto_class("AutoModelForMaskedLM")
    model = stand_in()
    model.save_pretrained(tmp_path / "model")
    gpt_words().save_pretrained(tmp_path / "words")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    assert about["architectures"] == ["StandIn"] and "AutoModelForMaskedLM" in about["auto_map"]
    options = dict(tokenizer=tmp_path / "words", max_length=5, device="cpu")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_policy(tmp_path / "model", **options)
    policy = load_policy(tmp_path / "model", trust_remote_code=True, **options)
    x = policy.initial(condition := policy.encode(["a"]))
    own = TextPolicy(model, gpt_words(), max_length=5)
    assert_close(*(p.logits(x, torch.ones(1), condition) for p in (policy, own)))


# -- loading ------------------------------------------------------------------------------------


def test_folder_round_trip(tmp_path):
    shared("BertForMaskedLM").save_pretrained(tmp_path)
    words(mask_token="[MASK]").save_pretrained(tmp_path)
    options = dict(num_steps=7, length=3, max_length=12, schedule="cosine", device="cpu")
    for policy in (
        load_text(tmp_path, **options),
        load_policy(tmp_path, **options, guidance_scale=1.0),
        load_policy(f"text:{tmp_path}", **options),
    ):
        assert (policy.num_steps, policy.length, policy.max_length) == (7, 3, 12)
        assert policy.schedule == "cosine" and policy.time_independent
        condition = policy.encode(["a cat", "[MASK]"])
        x, own = policy.initial(condition), policy_of(max_length=12)
        assert_close(
            policy.logits(x, torch.ones(2), condition), own.logits(x, torch.ones(2), condition)
        )
    half = load_policy(tmp_path, dtype="bfloat16", max_length=12, device="cpu")
    law = half.step_law(x, 0, condition)
    assert half.dtype == torch.bfloat16 and law.x0.dtype == torch.float32
    half.step_law(half.relax(x), 0, condition)
    with pytest.raises(ValueError, match="no option 'lenght' of .*; did you mean 'length'"):
        load_policy(tmp_path, lenght=3)
    assert load_policy(tmp_path).max_length == 20


def test_load_refuses(tmp_path):
    for spec in ("text:nowhere/at/all", "text:./nowhere"):
        with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
            load_policy(spec)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' lacks files, or is no folder"):
        load_policy("text:nobody/nothing")
    with pytest.raises(ValueError, match="no embedded model 'text'"):
        load_policy("embedded:text")
    shared("BertForMaskedLM").save_pretrained(tmp_path / "silent")
    with pytest.raises(ValueError, match="nothing but special tokens; is it missing?"):
        load_policy(tmp_path / "silent")
    shared("BertForMaskedLM").bert.save_pretrained(tmp_path / "headless")
    words(mask_token="[MASK]").save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="has no weights for cls"):
        load_text(tmp_path / "headless")


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (words(FEW), {}, "the tokenizer of this BertForMaskedLM has no mask token"),
        (
            words(VOCAB | {"more": V, "still": V + 1}, mask_token="[MASK]"), {},
            "the tokenizer has ids up to 14, but this BertForMaskedLM knows 13 tokens",
        ),
        (words(mask_token="[MASK]"), {"max_length": 21}, "reads 1 to 20 tokens, .*=21 came"),
        (words(mask_token="[MASK]"), {"max_length": 0}, "reads 1 to 20 tokens, .*=0 came"),
        (words(mask_token="[MASK]"), {"length": 0}, "length must be 1 or more, but 0 came"),
        (words(mask_token="[MASK]"), {"omit": "rad"}, "omit: 'rad' is no token"),
        (words(mask_token="[MASK]"), {"omit": WORDS}, "omit leaves no token"),
        (words(mask_token="[MASK]"), {"num_steps": 0}, "num_steps must be 1 or more"),
    ],
)  # fmt: skip
def test_constructor_refuses(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        TextPolicy(shared("BertForMaskedLM"), tokens, **{"max_length": 10} | options)


def test_network_is_in_eval_mode():
    assert not policy_of(model=network().train()).denoiser.training


def test_positions_of_roberta():
    # they start behind its padding index: 21 of them read 20 tokens
    assert policy_of("RobertaForMaskedLM", max_length=None).max_length == 20

"""The contract: what evaluate refuses, what the registry finds, what check_reward catches."""

import functools
import math
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from diffreward.rewards import (
    Reward,
    RewardInfo,
    Scores,
    SetReward,
    as_reward,
    available_rewards,
    base,
    evaluate,
    evaluate_set,
    judge_prompts,
    make_reward,
    register_reward,
    require_gradient,
)
from diffreward.rewards import registry as plugins
from diffreward.rewards.testing import check_exact_agrees, check_reward
from diffreward.samples import Samples


@pytest.fixture
def registry(monkeypatch):
    """Registrations of one test do not reach the next."""
    monkeypatch.setattr(base.REGISTRY, "table", dict(base.REGISTRY.table))


@pytest.fixture
def images():
    data = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Samples(data, "image", ["a cat", "a dog", "a red heart", "a blue ring"])


def brightness(samples):
    return samples.data.mean(dim=(1, 2, 3))


# --------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------


def test_scores_take_and_cat_keep_std_and_parts_with_their_samples():
    scores = Scores(torch.arange(4.0), torch.arange(4.0) / 10, {"sharp": -torch.arange(4.0)})
    taken = scores.take([3, 0, 0])
    assert taken.value.tolist() == [3, 0, 0]
    torch.testing.assert_close(taken.std, torch.tensor([0.3, 0, 0]))
    assert taken.parts["sharp"].tolist() == [-3, 0, 0]
    both = Scores.cat([taken, scores])
    assert len(both) == 7
    assert both.value.tolist() == [3, 0, 0, 0, 1, 2, 3]
    assert both.parts["sharp"].tolist() == [-3, 0, 0, 0, -1, -2, -3]
    assert torch.equal(both.std[3:], scores.std)


def test_scores_cat_refuses_what_would_lose_a_std_or_a_part():
    plain = Scores(torch.zeros(2))
    for other in (
        Scores(torch.zeros(2), torch.ones(2)),
        Scores(torch.zeros(2), None, {"a": plain.value}),
    ):
        for pair in ([plain, other], [other, plain]):
            with pytest.raises(ValueError, match="std or a part"):
                Scores.cat(pair)
    with pytest.raises(ValueError, match="at least one"):
        Scores.cat([])


# --------------------------------------------------------------------------------------------
# evaluate
# --------------------------------------------------------------------------------------------


def test_evaluate_gives_float32_on_the_samples_device_with_gradient(images):
    data = images.data.double().requires_grad_()
    scores = evaluate(brightness, Samples(data, "image"))
    assert scores.value.dtype == torch.float32
    assert scores.value.shape == (4,)
    (gradient,) = torch.autograd.grad(scores.value.sum(), data)
    torch.testing.assert_close(gradient, torch.full_like(data, 1 / 192))


def test_evaluate_keeps_std_parts_and_minus_infinity(images):
    def reward(samples):
        value = torch.tensor([0.0, -math.inf, 1.0, 2.0], dtype=torch.float64)
        return Scores(value, torch.ones(4, dtype=torch.float64), {"ok": torch.arange(4) > 1})

    scores = evaluate(reward, images)
    assert scores.value.tolist() == [0, -math.inf, 1, 2]
    assert scores.std.dtype == scores.parts["ok"].dtype == torch.float32
    assert scores.parts["ok"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("returned", "error", "says"),
    [
        (torch.zeros(4, 1), ValueError, r"\(4, 1\), expected \(4,\) for 4 samples; flatten"),
        (torch.zeros(()), ValueError, r"\(\), expected \(4,\) .* never a mean over the batch"),
        (torch.zeros(3), ValueError, r"\(3,\), expected \(4,\)"),
        (torch.zeros(4, dtype=torch.long), TypeError, r"torch\.int64.*\.float\(\)"),
        (torch.zeros(4, dtype=torch.bool), TypeError, r"torch\.bool"),
        ([0.0] * 4, TypeError, "list as value, expected a tensor"),
        (None, TypeError, "NoneType as value"),
        (0.5, TypeError, "float as value"),
    ],
)
def test_evaluate_names_the_reward_that_returns_the_wrong_thing(images, returned, error, says):
    def my_reward(samples):
        return returned

    with pytest.raises(error, match=f"reward 'my_reward' returned .*{says}"):
        evaluate(my_reward, images)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_evaluate_names_the_sample_with_a_bad_value(images, bad):
    def my_reward(samples):
        return torch.tensor([0.0, 1.0, bad, bad])

    with pytest.raises(ValueError, match=rf"'my_reward' gave {bad} to sample 2 \('a red heart'\)"):
        evaluate(my_reward, images)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_evaluate_refuses_a_std_that_is_none(images, bad):
    def my_reward(samples):
        return Scores(torch.zeros(4), torch.tensor([0.0, bad, 0.0, 0.0]))

    with pytest.raises(ValueError, match=r"gave std .* to sample 1 \('a dog'\)"):
        evaluate(my_reward, images)


def test_evaluate_checks_the_samples_before_the_reward_is_called(images):
    def never(samples):
        raise AssertionError("called")

    info = RewardInfo("mine", modality="image", needs_prompt=True, needs_context=("depth",))
    reward = as_reward(never, info)
    with pytest.raises(ValueError, match="'mine' scores image samples, but dna samples came"):
        evaluate(reward, Samples(torch.zeros(2, 5, dtype=torch.long), "dna", ["a", "b"]))
    with pytest.raises(ValueError, match="'mine' compares samples with their prompts"):
        evaluate(reward, Samples(images.data, "image"))
    with pytest.raises(
        ValueError, match=r"'mine' needs depth in Samples.context; there is nothing"
    ):
        evaluate(reward, images)
    broken = images.data.clone()
    broken[2, 1, 3, 3] = math.nan
    with pytest.raises(ValueError, match=r"sample 2 \('a red heart'\) has NaN"):
        evaluate(never, Samples(broken, "image", images.prompts))
    with pytest.raises(ValueError, match="no samples"):
        evaluate(never, Samples(torch.zeros(0, 3, 8, 8), "image"))


def test_evaluate_scores_text_and_tokens():
    text = Samples(["a", "bcd"], "text")
    length = evaluate(lambda s: torch.tensor([float(len(t)) for t in s.data]), text)
    assert length.value.tolist() == [1, 3]
    tokens = Samples(torch.tensor([[0, 1], [1, 1]]), "dna")
    assert evaluate(lambda s: s.data.float().mean(1), tokens).value.tolist() == [0.5, 1]


def test_a_reward_without_gradient_says_so_instead_of_giving_half_of_one(images):
    data = images.data.clone().requires_grad_()
    samples = Samples(data, "image")

    def half(samples):
        value = brightness(samples) + brightness(samples).detach()
        return Scores(value, value * 0.1, {"half": value})

    jagged = as_reward(half, RewardInfo("jagged", differentiable=False))
    scores = evaluate(jagged, samples)
    for tensor in (scores.value, scores.std, scores.parts["half"]):
        assert not tensor.requires_grad
    torch.testing.assert_close(scores.value, 2 * images.data.mean(dim=(1, 2, 3)))
    with pytest.raises(
        ValueError,
        match="^DRaFT needs a differentiable reward, and 'jagged' is not one; use DDPO$",
    ):
        require_gradient(jagged, what="DRaFT", instead="use DDPO")

    undeclared = as_reward(half)
    assert evaluate(undeclared, samples).value.requires_grad
    require_gradient(undeclared)
    require_gradient(undeclared, evaluate(undeclared, samples).value)
    with pytest.raises(ValueError, match="^this needs a gradient, and reward 'half' gave values"):
        require_gradient(undeclared, evaluate(undeclared, images).value)


def test_shapes_are_enforced_in_tests():
    with pytest.raises(Exception, match="Float"):
        Scores(torch.zeros(2, 1))


# --------------------------------------------------------------------------------------------
# Any callable is a reward
# --------------------------------------------------------------------------------------------


def test_a_callable_becomes_a_reward_named_after_it(images):
    reward = make_reward(brightness)
    assert isinstance(reward, Reward)
    assert reward.info == RewardInfo(name="brightness")
    torch.testing.assert_close(reward(images).value, images.data.mean(dim=(1, 2, 3)))
    assert make_reward(reward) is reward
    assert as_reward(functools.partial(brightness)).info.name == "brightness"

    class Mine:
        def __call__(self, samples):
            return brightness(samples)

    assert as_reward(Mine()).info.name == "Mine"


def test_an_object_with_info_is_a_reward_without_any_base_class():
    class Mine:
        info = RewardInfo("mine", modality="image")

        def __call__(self, samples):
            return Scores(brightness(samples))

    mine = Mine()
    assert make_reward(mine) is mine


def test_a_spec_is_no_reward_before_it_is_built(images):
    for spec in ("colorfulness", {"name": "colorfulness"}):
        with pytest.raises(TypeError, match=r"a reward is a callable .*; make_reward builds one"):
            as_reward(spec)
        with pytest.raises(TypeError, match="make_reward builds one"):
            evaluate(spec, images)


# --------------------------------------------------------------------------------------------
# The registry
# --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", ["My Reward", "my_reward", "MY-REWARD", "MyReward"])
def test_register_and_look_up_normalise_alike(images, name):
    @register_reward("My-reward", modality="image", differentiable=True, range=(0, 1))
    def factory(power: float = 1.0):
        """Mean pixel to a power.

        More words.
        """
        return lambda samples: brightness(samples) ** power

    reward = make_reward({"name": name, "power": 2.0})
    torch.testing.assert_close(reward(images).value, brightness(images) ** 2)
    assert reward.info.name == "My-reward"
    assert reward.info.description == "Mean pixel to a power."
    assert reward.info is available_rewards()["My-reward"]
    assert not reward.info.needs_download
    torch.testing.assert_close(
        make_reward(name, power=3).__call__(images).value, brightness(images) ** 3
    )
    with pytest.raises(ValueError, match=r"'My-reward' is already registered by .*factory"):
        register_reward(name)(factory)
    register_reward(name, overwrite=True)(factory)
    assert name in available_rewards()


@pytest.mark.usefixtures("registry")
def test_a_class_can_be_registered_and_may_bring_its_own_info(images):
    @register_reward("first", modality="image", weights="someone/hub-id")
    class First:
        def __call__(self, samples):
            return Scores(brightness(samples))

    assert isinstance(make_reward("first"), First)
    assert make_reward("first").info == available_rewards()["first"]
    assert First.info.needs_download

    @register_reward("second")
    class Second:
        def __init__(self, modality: str):
            self.info = RewardInfo("second", modality=modality)

        def __call__(self, samples):
            return Scores(brightness(samples))

    assert make_reward({"name": "second", "modality": "image"}).info.modality == "image"
    assert available_rewards()["second"].modality is None


@pytest.mark.usefixtures("registry")
def test_specs_that_are_wrong_say_what_is_right():
    @register_reward("blur", modality="image")
    def blur(radius, steps: int = 1):
        raise AssertionError("built")

    with pytest.raises(ValueError, match="no reward 'colourfulnes'; did you mean: colorfulness"):
        make_reward("colourfulnes")
    with pytest.raises(ValueError, match=r"no reward 'qqqq'; there are: .*colorfulness"):
        make_reward("qqqq")
    with pytest.raises(
        ValueError, match=r"no option 'radus' \(did you mean 'radius'\?\); it takes radius, steps"
    ):
        make_reward({"name": "blur", "radus": 1})
    with pytest.raises(ValueError, match="no option 'zzz'; it takes none"):
        make_reward("colorfulness", zzz=1)
    with pytest.raises(ValueError, match="needs the option radius"):
        make_reward("blur")
    with pytest.raises(ValueError, match="needs a 'name'"):
        make_reward({"nam": "blur"})
    with pytest.raises(ValueError, match="already built"):
        make_reward(brightness, power=2)


@pytest.mark.usefixtures("registry")
def test_a_spec_for_short_is_the_spec_in_full(images):
    @register_reward("power_mean")
    def power_mean(power: float = 1.0, shift: float = 0.0):
        return lambda samples: brightness(samples) ** power + shift

    for spec in (
        {"Power-Mean": 2.0},
        {"power_mean": {"power": 2.0}},
        {"name": "power_mean", "power": 2.0},
    ):
        torch.testing.assert_close(make_reward(spec)(images).value, brightness(images) ** 2)
    both = make_reward({"power_mean": {"power": 2.0, "shift": 1.0}})
    torch.testing.assert_close(both(images).value, brightness(images) ** 2 + 1)
    torch.testing.assert_close(
        make_reward({"power_mean": 2.0}, shift=1.0)(images).value, both(images).value
    )
    torch.testing.assert_close(make_reward({"power_mean": None})(images).value, brightness(images))
    assert make_reward({"colorfulness": None}).info.name == "colorfulness"

    with pytest.raises(ValueError, match="no option 'powr'"):
        make_reward({"power_mean": {"powr": 2.0}})
    with pytest.raises(ValueError, match="'colorfulness' takes no option, but 2 came"):
        make_reward({"colorfulness": 2})
    with pytest.raises(ValueError, match="needs a 'name' .*did you mean: power_mean"):
        make_reward({"powermeen": 2.0})
    with pytest.raises(ValueError, match="needs a 'name'"):
        make_reward({"power_mean": 2.0, "shift": 1.0})
    with pytest.raises(ValueError, match="options of 'power_mean' have a 'name'"):
        make_reward({"power_mean": {"name": "colorfulness"}})


@pytest.mark.usefixtures("registry")
def test_registering_a_reward_instead_of_a_factory_is_refused():
    with pytest.raises(ValueError, match="takes samples, so it is a reward, not a factory"):
        register_reward("brightness")(brightness)
    with pytest.raises(TypeError, match="modalty"):
        register_reward("x", modalty="image")(lambda: brightness)
    with pytest.raises(ValueError, match="no name"):
        register_reward("- _")


@pytest.mark.usefixtures("registry")
def test_plugins_load_once_at_the_first_look_up_that_needs_them(monkeypatch, images):
    loads = []

    def load_good():
        loads.append("good")
        register_reward("from_plugin")(lambda: brightness)

    def load_broken():
        raise ImportError("no module named 'missing_thing'")

    points = [
        types.SimpleNamespace(name="broken", value="broken_pkg.rewards", load=load_broken),
        types.SimpleNamespace(name="good", value="good_pkg.rewards", load=load_good),
    ]

    def entry_points(group):
        assert group == "diffreward.rewards"
        return points

    monkeypatch.setattr(plugins.metadata, "entry_points", entry_points)
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    make_reward("colorfulness")
    assert not loads
    with pytest.warns(RuntimeWarning, match=r"'broken' \(broken_pkg.rewards\).*missing_thing"):
        reward = make_reward("From Plugin")
    torch.testing.assert_close(reward(images).value, brightness(images))
    assert "from_plugin" in available_rewards()
    assert loads == ["good"]


def test_a_real_entry_point_is_found(tmp_path):
    """An installed distribution, as pip leaves it, in a fresh interpreter."""
    (tmp_path / "their_rewards.py").write_text(
        "from diffreward.rewards import register_reward\n"
        "@register_reward('theirs', modality='image')\n"
        "def theirs():\n"
        "    'Theirs.'\n"
        "    return lambda samples: samples.data.mean(dim=(1, 2, 3))\n"
    )
    dist = tmp_path / "their_rewards-1.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rewards\nVersion: 1.0\n")
    (dist / "entry_points.txt").write_text("[diffreward.rewards]\ntheirs = their_rewards\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from diffreward.rewards import make_reward\n"
        "heavy = {'open_clip', 'transformers', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(make_reward('theirs').info.description)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Theirs.\n"


# --------------------------------------------------------------------------------------------
# The conformance suite catches what it is there to catch
# --------------------------------------------------------------------------------------------

INFO = RewardInfo("mine", modality="image", differentiable=True, range=(0, 1))


def test_check_reward_passes_a_good_reward(images):
    check_reward(as_reward(brightness, INFO), images)
    words = Samples(["a", "bc"], "text")
    check_reward(as_reward(lambda s: torch.tensor([len(t) / 10 for t in s.data])), words)


def _noisy(samples):
    return brightness(samples) + torch.rand(len(samples)) * 1e-9


def _stateful():
    calls = iter(range(100))
    return lambda samples: brightness(samples) * 0 + next(calls) / 100


def _by_the_batch(samples):
    return brightness(samples) / brightness(samples).max()


def _by_the_place(samples):
    # the same score for a sample alone or first, so that splitting does not show it
    value = brightness(samples)
    return torch.cat([value[:1], value[1:].sort().values]) if len(value) > 3 else value


def _in_place(samples):
    if not samples.data.requires_grad:
        samples.data.clamp_(0.2, 0.8)
    return samples.data.mean(dim=(1, 2, 3))


def _remembers_inference_tensors():
    weight = []

    def reward(samples):
        if not weight:
            weight.append(torch.ones(3, 8, 8))
        return (samples.data * weight[0]).mean(dim=(1, 2, 3))

    return reward


def _with_std(std):
    return lambda samples: Scores(brightness(samples), std(samples))


def _with_part(part):
    return lambda samples: Scores(brightness(samples), None, part(samples))


def _changes(change):
    def reward(samples):
        change()
        return brightness(samples)

    return reward


def _draws(generator):
    return lambda samples: brightness(samples) + generator() * 1e-3


@pytest.fixture
def torch_settings():
    """As they were, whatever a reward does."""
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])
    torch.backends.cudnn.benchmark = before[2]
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (_draws(np.random.rand), "numpy's global random state"),
        (_draws(random.random), "when asked again|in inference mode"),
        (_changes(lambda: random.seed(0)), "seeds python's global random state"),
        (_changes(lambda: np.random.seed(0)), "numpy's global random state"),
        (_changes(lambda: torch.manual_seed(torch.initial_seed() + 1)), "torch's global random"),
        (_changes(lambda: torch.set_default_dtype(torch.float64)), "default dtype"),
        (_changes(lambda: torch.set_num_threads(torch.get_num_threads() + 1)), "threads"),
        (
            _changes(lambda: setattr(torch.backends.cudnn, "benchmark", True)),
            "torch.backends.cudnn.benchmark",
        ),
        (_with_std(lambda s: s.data.std().expand(len(s))), "std .* by itself"),
        (_with_std(lambda s: torch.arange(len(s)) * 1e-2), "std .* by itself"),
        (_with_part(lambda s: {"p": brightness(s) / brightness(s).max()}), "part 'p' .* by itself"),
        (_with_part(lambda s: {"p": brightness(s)} if s.prompts else {}), "no part 'p' without"),
        (_with_part(lambda s: {} if s.prompts else {"p": brightness(s)}), "gives part 'p' without"),
        (lambda s: brightness(s) * s.context["depth"], None),
    ],
)
def test_check_reward_catches_what_leaks(images, reward, says):
    needs = () if says else ("depth",)
    info = RewardInfo("mine", "image", True, range=(0, 2), needs_context=needs)
    samples = Samples(images.data, "image", images.prompts, {"depth": torch.linspace(0.5, 1, 4)})
    if says is None:
        check_reward(as_reward(reward, info), samples)
        return
    with pytest.raises(AssertionError, match=says):
        check_reward(as_reward(reward, info), samples)


def test_check_reward_catches_changed_context(images):
    def reward(samples):
        samples.context["depth"].mul_(0.5)
        return brightness(samples)

    samples = Samples(images.data, "image", images.prompts, {"depth": torch.ones(4)})
    with pytest.raises(AssertionError, match="changes the samples in place"):
        check_reward(as_reward(reward, INFO), samples)


def test_check_reward_takes_tokens_and_relaxed_tokens():
    tokens = torch.tensor([[0, 1, 2, 3], [1, 1, 1, 1], [3, 0, 0, 2]])
    weight = torch.tensor([0.0, 0.1, 0.4, 0.9])

    def content(samples):
        data = samples.data
        hard = not data.is_floating_point()
        return (weight[data] if hard else data @ weight).mean(dim=1)

    reward = as_reward(content, RewardInfo("content", "dna", True, range=(0, 1)))
    check_reward(reward, Samples(tokens, "dna"))
    relaxed = Samples(torch.nn.functional.one_hot(tokens, 4).float(), "dna")
    check_reward(reward, relaxed)
    rounds = as_reward(lambda s: content(Samples(s.data.argmax(-1), "dna")), reward.info)
    with pytest.raises(AssertionError, match="its value has no gradient"):
        check_reward(rounds, relaxed)


def test_check_exact_agrees_measures_the_gap(images):
    def rounded(samples):
        return (samples.data * 255).round().mean(dim=(1, 2, 3)) / 255

    reward = as_reward(brightness, INFO)
    exact = as_reward(rounded, RewardInfo("exact", differentiable=False))
    found = check_exact_agrees(reward, exact, images, gap=0.5 / 255)
    pixels = images.data.numpy().astype(np.float64)
    off = np.abs((np.round(pixels * 255) / 255 - pixels).mean(axis=(1, 2, 3))).max()
    assert found == pytest.approx(off, abs=1e-6) and found > 0
    with pytest.raises(AssertionError, match=r"through PIL: .* where 1e-06 is allowed"):
        check_exact_agrees(reward, exact, images, gap=1e-6)
    with pytest.raises(AssertionError, match="must declare differentiable=False"):
        check_exact_agrees(reward, reward, images, gap=1.0)


@pytest.mark.parametrize(
    ("reward", "info", "says"),
    [
        (brightness, {"range": (2, 3)}, "declares the range"),
        (lambda s: brightness(s).detach(), {}, "its value has no gradient"),
        (lambda s: brightness(s) * 0 + 0.5, {}, "zero everywhere"),
        (lambda s: (brightness(s) * 0).sqrt() + 0.5, {}, "not finite"),
        (_noisy, {}, "random state"),
        (_stateful(), {}, "in inference mode|when asked again"),
        (_by_the_batch, {}, "by itself"),
        (_by_the_place, {}, "by itself|reversed"),
        (_in_place, {}, "in place"),
        (lambda s: brightness(s) + (s.prompts is not None) * 0.1, {}, "without prompts"),
        (lambda s: torch.zeros(len(s), 1), {}, "cannot score valid samples"),
        (brightness, {"modality": None, "differentiable": False}, None),
    ],
)
def test_check_reward_catches(images, reward, info, says):
    fields = {"name": "mine", "modality": "image", "differentiable": True, "range": (0, 1), **info}
    candidate = as_reward(reward, RewardInfo(**fields))
    if says is None:
        check_reward(candidate, images)
        return
    with pytest.raises(AssertionError, match=says):
        check_reward(candidate, images)


def test_check_reward_catches_what_is_remembered_from_inference_mode(images):
    with pytest.raises((AssertionError, RuntimeError), match=r"[Ii]nference"):
        check_reward(as_reward(_remembers_inference_tensors(), INFO), images)


def test_judge_prompts():
    like = Samples(torch.ones(1, 3, 64, 64), "image", [""])
    can, problem = judge_prompts(make_reward("shapes_checker"), ["a red heart", "a cat"], like)
    assert can == [True, False] and "a cat" in problem
    assert judge_prompts(make_reward("colorfulness"), ["a cat"], like) == ([True], "")


# --------------------------------------------------------------------------------------------
# Rewards of sets
# --------------------------------------------------------------------------------------------


class Spread(SetReward):
    """Variance of the brightness; n / (n - 1) (x_j - mean)^2 / n is what each adds to the sum."""

    info = RewardInfo("spread", modality="image", of_sets=True)

    def features(self, samples):
        return brightness(samples)[:, None]

    def value(self, features):
        return features.double().var(correction=0)


def test_a_set_has_a_value_and_each_sample_its_influence(images):
    x = brightness(images).double().numpy()
    expected = [x.var() - np.delete(x, j).var() for j in range(4)]
    for batch in (None, 1, 3):
        scores = evaluate_set(Spread(), images, batch)
        assert scores.total == pytest.approx(x.var(), rel=1e-6)
        np.testing.assert_allclose(scores.value, expected, atol=1e-9)
        assert scores.features.shape == (4, 1) and scores.reward.info.name == "spread"
    torch.testing.assert_close(Spread()(images).item(), scores.total)
    torch.testing.assert_close(Spread().credit(images), scores.value)
    assert scores.take([1]).value.tolist() == [scores.value[1].item()]


def test_influences_are_computed_once_and_only_when_they_are_asked_for(images):
    calls = []

    class Counted(Spread):
        def influence(self, features):
            calls.append(len(features))
            return super().influence(features).float()

    scores = evaluate_set(Counted(), images)
    assert len(scores) == 4 and "4 samples" in repr(scores) and scores.std is None
    assert not calls
    assert scores.value.dtype == torch.float64 and scores.pseudovalues().shape == (4,)
    assert calls == [4]
    scores.value = torch.zeros(4)
    assert not scores.value.any() and calls == [4]


def test_sets_and_samples_are_not_mistaken_for_each_other(images, registry):
    with pytest.raises(ValueError, match="'spread' is of whole sets.*evaluate_set"):
        evaluate(Spread(), images)
    with pytest.raises(TypeError, match="'brightness' is no reward of sets"):
        evaluate_set(brightness, images)
    register_reward("spread_", modality="image", of_sets=True)(Spread)
    assert isinstance(make_reward("spread_"), Spread) and available_rewards()["spread_"].of_sets


def test_what_a_set_reward_may_not_give(images):
    class Few(Spread):
        min_samples = 5

    class Rows(Spread):
        def features(self, samples):
            return torch.zeros(1, 2)

    class Nan(Spread):
        def features(self, samples):
            return torch.where(samples.data.sum((1, 2, 3)) > 0, math.nan, 0.0)[:, None]

    class Vector(Spread):
        def value(self, features):
            return features[:, 0]

    class Infinite(Spread):
        def value(self, features):
            return torch.tensor(math.inf)

    for reward, error in (
        (Few(), "needs 5 samples or more, 4 came"),
        (Rows(), "gave 1 rows of features for 4 samples"),
        (Nan(), r"sample 0 \('a cat'\) features that are NaN"),
        (Vector(), "samples value of shape"),
        (Infinite(), "a set of 4 samples value that is NaN or inf"),
    ):
        with pytest.raises(ValueError, match=error):
            evaluate_set(reward, images)
    with pytest.raises(ValueError, match="scores image samples, but dna"):
        evaluate_set(Spread(), Samples(torch.zeros(3, 4, dtype=torch.int64), "dna"))
    with pytest.raises(ValueError, match="influence of one needs 3 or more, but 2 came"):
        _ = evaluate_set(Spread(), images.take([0, 1])).value

    class Wrong(Spread):
        def influence(self, features):
            return features

    class Endless(Spread):
        def influence(self, features):
            return torch.full((len(features),), math.nan)

    for reward, error in ((Wrong(), r"influence of shape \(4, 1\)"), (Endless(), "influence that")):
        with pytest.raises(ValueError, match=error):
            _ = evaluate_set(reward, images).value

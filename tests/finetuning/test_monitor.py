import json
import math
import threading

import pytest
import scipy.stats
import torch
from painter import Painter
from scipy.spatial.distance import pdist
from torch.testing import assert_close
from toys import ARChain, MaskedChain, MixtureChain, NormalLaw

from diffreward.finetuning.monitor import (
    Evaluation,
    Evaluator,
    Watch,
    diversity,
    group_statistics,
    paired,
    probe,
)
from diffreward.finetuning.options import Guard
from diffreward.finetuning.team import Team
from diffreward.rewards import as_reward, make_reward
from diffreward.samples import Samples


class ThreadTeam(Team):
    """Some of the processes of a run, as threads."""

    def __init__(self, rank=0, size=1, shared=None):
        self.rank, self.size = rank, size
        self.slots, self.barrier = shared or ([None] * size, threading.Barrier(size))

    def gather(self, value):
        self.slots[self.rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


def on_each(size, run):
    """What ``run(team)`` returns on each of ``size`` processes."""
    shared, found = ([None] * size, threading.Barrier(size)), [None] * size

    def work(rank):
        try:
            found[rank] = run(ThreadTeam(rank, size, shared))
        except BaseException as err:
            found[rank] = err
            shared[1].abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


class Shifted(ARChain):
    """x' = c + (sqrt(a) + slope) (x - c) + delta + scale sqrt(1 - a) z."""

    def __init__(self, delta=0.0, slope=0.0, scale=1.0, **options):
        super().__init__(**options)
        self.delta, self.slope, self.scale = delta, slope, scale

    def law(self, x, i, condition):
        law = super().law(x, i, condition)
        mean = law.mean + self.delta + self.slope * (x - condition.tensors["centre"])
        return NormalLaw(law.x0, mean, self.scale * law.std, law.x0_std)


def value(samples):
    return samples.data.float().flatten(1).mean(1)


MEAN = as_reward(value)


def evaluator(policy, reference=None, rewards=None, prompts=("0", "1", "2"), k=4, **options):
    rewards = {"mean": MEAN} if rewards is None else rewards
    team = options.pop("team", None) or ThreadTeam()
    return Evaluator(policy, reference, rewards, list(prompts), k, team=team, **options)


# -- statistics of samples ----------------------------------------------------------------------


def grey(*levels, size=32):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, size, size).clone()


def test_diversity_of_known_pictures():
    pictures = Samples(grey(0.0, 0.5, 1.0, 0.3, 0.3, 0.3), "image")
    assert_close(diversity(pictures, 3), torch.tensor([2 / 3, 0.0]).double())
    # root mean square: half of the pixels 0.6 apart
    left = grey(0.2, 0.2)
    left[1, :, :, 16:] += 0.6
    assert_close(
        diversity(Samples(left, "image"), 2)[0].item(), 0.6 / math.sqrt(2), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("size", [(32, 64), (20, 28)])
def test_diversity_sees_areas_not_texture(size):
    checks = (torch.arange(size[0])[:, None] + torch.arange(size[1])) % 2
    checks = torch.stack([checks, 1 - checks]).float()[:, None].expand(-1, 3, -1, -1)
    found = diversity(Samples(checks, "image"), 2).item()
    if size == (32, 64):  # areas of 2 x 4 pixels
        assert found == 0
    else:  # areas of several sizes
        assert found < 0.3
    small = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))  # not enlarged
    expected = (small[0] - small[1]).double().square().mean().sqrt()
    assert_close(diversity(Samples(small, "image"), 2)[0], expected)


def test_diversity_of_frames():
    clips = torch.stack([grey(0.0, 0.0), grey(0.0, 0.8)])  # one of two frames differs
    found = diversity(Samples(clips, "video"), 2)
    assert_close(found.item(), 0.8 / math.sqrt(2), rtol=1e-6, atol=0)


def test_diversity_of_tokens_agrees_with_scipy():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (10, 7), generator=g)
    expected = [pdist(group.numpy(), "hamming").mean() for group in tokens.view(2, 5, 7)]
    assert_close(diversity(Samples(tokens, "dna"), 5).tolist(), expected)
    # relaxed tokens: of certain ones, the same; of others, half the absolute differences
    certain = torch.nn.functional.one_hot(tokens, 4).float()
    assert_close(diversity(Samples(certain, "dna"), 5).tolist(), expected)
    relaxed = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.1, 0.9], [1.0, 0.0]]])
    assert_close(diversity(Samples(relaxed, "dna"), 2).item(), 0.2)


def test_diversity_of_other_samples():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + 1000
    expected = [pdist(g.double().numpy()).mean() / math.sqrt(5) for g in x.view(2, 3, 5)]
    assert_close(diversity(Samples(x, "toy"), 3).tolist(), expected)
    assert diversity(Samples(torch.tensor([1.0, 4.0]), "toy"), 2).item() == 3
    text = Samples(["a b c", "a b d", "", "", "x", "x"], "text")
    assert diversity(text, 2).tolist() == [0.5, 0.0, 0.0]
    assert diversity(text, 1).isnan().all() and len(diversity(text, 1)) == 6


def test_probes():
    tokens = torch.tensor([[0, 1, 2, 3], [2, 2, 2, 2], [0, 0, 0, 5]])
    bits = [2.0, 0.0, scipy.stats.entropy([3, 1], base=2)]
    assert_close(probe(Samples(tokens, "dna"))["entropy"].tolist(), bits, rtol=1e-6, atol=1e-7)
    relaxed = torch.nn.functional.one_hot(tokens, 6).float()
    assert_close(probe(Samples(relaxed, "dna"))["entropy"].tolist(), bits, rtol=1e-6, atol=1e-7)
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = probe(Samples(images, "image"))
    assert list(found) == ["sharpness", "contrast", "saturation", "entropy"]
    for name, values in found.items():
        assert_close(values, make_reward(name)(Samples(images, "image")).value)
    assert probe(Samples(torch.zeros(2, 5), "toy")) == {}
    assert probe(Samples(["a"], "text")) == {}


def test_group_statistics():
    values = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 0.0, 0.0, 0.1]).double()
    groups = torch.tensor([7, 7, 2, 2, 9, 4, 4, 4])
    found = group_statistics(values, groups)
    assert found.flat == pytest.approx(1 / 3)  # the single sample is no group
    spread = torch.tensor([0.0, 0.0, 0.1]).double().std(correction=0).item()
    assert found.std == pytest.approx((1 + 0 + spread) / 3)
    none = group_statistics(
        torch.tensor([-math.inf, -math.inf, -math.inf, 1.0]), groups[[0, 0, 2, 2]]
    )
    assert none.flat == 0.5 and none.std == 0
    assert group_statistics(values[:2], torch.tensor([0, 1])).flat == 0


def test_paired_agrees_with_scipy():
    g = torch.Generator().manual_seed(0)
    before = torch.randn(40, generator=g)
    after = before + 0.1 * torch.randn(40, generator=g) + 0.05
    found = paired(before, after)
    test = scipy.stats.ttest_rel(after.double(), before.double())
    assert found.mean / found.se == pytest.approx(test.statistic)
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    before[3], after[5], after[6] = math.nan, math.nan, -math.inf
    keep = [j for j in range(40) if j not in (3, 5, 6)]
    assert paired(before, after) == paired(before[keep], after[keep])
    assert paired(before, after).count == 37
    one = paired(before[:1], after[:1])
    assert math.isnan(one.se) and math.isnan(one.interval[0]) and one.count == 1
    assert paired(before[3:4], after[3:4]).count == 0


# -- evaluations --------------------------------------------------------------------------------


def test_kl_of_a_shifted_chain_is_exact():
    policy = Shifted(0.3, num_steps=4, a=0.5, dim=2)
    found = evaluator(policy, ARChain(4, dim=2))(0)
    nats = 4 * 2 * 0.3**2 / (2 * 0.5)
    assert_close(found.kl, torch.full((12,), nats, dtype=torch.float64))
    assert policy.calls == 4  # the laws that are sampled are those that are measured
    narrow = evaluator(Shifted(scale=0.5, dim=2), ARChain(4, dim=2))(0)
    nats = 4 * 2 * (math.log(2) + 0.5**2 / 2 - 0.5)  # KL(model || pretrained); the other is larger
    assert_close(narrow.kl, torch.full((12,), nats, dtype=torch.float64))


def test_mean_kl_of_a_steeper_chain():
    """E KL = sum_i slope^2 E[x_i^2] / (2 (1 - a)), with E[x_i^2] by recursion."""
    a, slope, n = 0.5, 0.2, 2000
    found = evaluator(Shifted(slope=slope), ARChain(), prompts=["0"], k=n, max_batch=512)(0)
    second, expected = 1.0, 0.0
    for _ in range(4):
        expected += slope**2 * second / (2 * (1 - a))
        second = (math.sqrt(a) + slope) ** 2 * second + 1 - a
    se = found.kl.std().item() / math.sqrt(n)
    assert abs(found.kl.mean().item() - expected) < 4 * se
    assert se < 0.05 * expected


def test_kl_where_there_is_none():
    assert evaluator(ARChain())(0).kl is None  # no pretrained model
    mixture = MixtureChain([0.5, 0.5], [[-1.0], [1.0]], [0.3, 0.3])
    assert evaluator(mixture, mixture)(0).kl is None  # no closed form
    assert evaluator(ARChain(), ARChain())(0).kl.eq(0).all()

    class Still(Painter):
        def step_law(self, x, i, condition):
            law = super().step_law(x, i, condition)
            law.std = law.std * (0 if i in still else 1)
            return law

    still = range(6)
    assert evaluator(Still(), Painter())(0).kl is None  # a KL of 0 would say nothing changed
    still = [5]
    assert evaluator(Still(), Painter())(0).kl.eq(0).all()


def same(a: Evaluation, b: Evaluation, **tolerance):
    def close(x, y):
        assert_close(x, y, **{"rtol": 0, "atol": 0, "equal_nan": True, **tolerance})

    assert (a.iteration, a.prompts, list(a.scores)) == (b.iteration, b.prompts, list(b.scores))
    assert a.samples.prompts == b.samples.prompts and a.probes.keys() == b.probes.keys()
    close(a.samples.data, b.samples.data)
    close(a.scores, b.scores)
    close(a.probes, b.probes)
    close(a.diversity, b.diversity)
    assert (a.kl is None) == (b.kl is None)
    if a.kl is not None:
        close(a.kl, b.kl)


ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # of float32, in other batches
CASES = [
    (lambda: Shifted(0.3), ARChain, {"mean": MEAN}),
    (lambda: MaskedChain(seed=0), lambda: MaskedChain(seed=1), {"mean": MEAN}),
    (Painter, Painter, {"red": make_reward("target_color", color="red"), "mean": MEAN}),
]


@pytest.mark.parametrize("policy, reference, rewards", CASES)
def test_batches_change_nothing(policy, reference, rewards):
    whole = evaluator(policy(), reference(), rewards)(3)
    for max_batch, decode_batch in [(1, None), (5, 2), (None, 7), (12, 12), (100, None)]:
        options = {"max_batch": max_batch, "decode_batch": decode_batch}
        same(whole, evaluator(policy(), reference(), rewards, **options)(3), **ROUNDING)
    policy = Shifted()
    evaluator(policy, max_batch=5, decode_batch=2)(0)
    assert policy.calls == 4 * 3 and policy.decoded == [2, 2, 1, 2, 2, 1, 2]


@pytest.mark.parametrize("size", [2, 3, 5, 14])
@pytest.mark.parametrize("policy, reference, rewards", CASES)
def test_processes_change_nothing(policy, reference, rewards, size):
    alone = evaluator(policy(), reference(), rewards)(3)

    def run(team):
        return evaluator(policy(), reference(), rewards, max_batch=2, team=team)(3)

    for found in on_each(size, run):
        same(alone, found, **ROUNDING)


def test_evaluations_start_from_the_same_noise():
    """A chain whose steps are shifted by delta ends delta * sum_j a^(j/2) away, pair by pair."""
    before, after = evaluator(ARChain())(0), evaluator(Shifted(0.25))(9)
    away = 0.25 * sum(0.5 ** (j / 2) for j in range(4))
    assert_close(after.samples.data - before.samples.data, torch.full((12, 1), away).double())
    change = paired(before.scores["mean"], after.scores["mean"])
    assert change.mean == pytest.approx(away, abs=1e-6) and change.se < 1e-6
    again = evaluator(ARChain())
    same(again(0), before)
    same(again(0), before)
    other = evaluator(ARChain(), seed=1)(0)
    assert not torch.isclose(other.samples.data, before.samples.data).any()
    # every sample has noise of its own, and a prompt's does not depend on how many there are
    assert len(before.samples.data.unique()) == 12
    assert torch.equal(evaluator(ARChain(), prompts=["0"])(0).samples.data, before.samples.data[:4])


def test_an_evaluation_leaves_no_trace():
    seen = []

    def watching(samples):
        seen.append(torch.is_grad_enabled())
        return value(samples)

    state = torch.get_rng_state()
    found = evaluator(ARChain(), rewards={"watching": as_reward(watching)})(0)
    assert torch.equal(torch.get_rng_state(), state) and seen == [False]
    assert not found.samples.data.requires_grad and torch.is_grad_enabled()


def test_held_out_rewards_judge_what_they_can():
    rewards = {
        "red": make_reward("target_color", color="red"),
        "shapes": make_reward("shapes_checker"),
        "mean": MEAN,
    }
    prompts = ["a red heart", "a cat", "two blue stars"]
    measure = evaluator(Painter(), None, rewards, prompts, max_batch=5)
    found = measure(0)
    unknown = found.scores["shapes"].isnan().view(3, 4)
    assert unknown.tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert not found.scores["red"].isnan().any() and found.trained == "red"
    expected = make_reward("shapes_checker")(found.samples.take([0, 11])).value
    assert_close(found.scores["shapes"][[0, 11]], expected)
    assert found.held_out == ["shapes", "mean"]


def test_a_reward_of_another_modality_judges_nothing():
    rewards = {"mean": MEAN, "colorfulness": make_reward("colorfulness")}
    found = evaluator(ARChain(), rewards=rewards)(0)
    assert found.scores["colorfulness"].isnan().all() and not found.scores["mean"].isnan().any()
    with pytest.raises(ValueError, match="scores image samples, but toy"):
        evaluator(ARChain(), rewards={"colorfulness": make_reward("colorfulness")})(0)


def test_a_judge_that_fails_later_is_an_error():
    bad = []

    def moody(samples):
        return torch.full((len(samples),), math.nan if bad else 1.0)

    measure = evaluator(ARChain(), rewards={"mean": MEAN, "moody": as_reward(moody)})
    measure(0)
    bad.append(True)
    with pytest.raises(ValueError, match="moody"):
        measure(1)


def test_what_an_evaluation_needs():
    with pytest.raises(ValueError, match="needs a reward, a prompt and a sample"):
        evaluator(ARChain(), rewards={})
    with pytest.raises(ValueError, match="needs a reward, a prompt and a sample"):
        evaluator(ARChain(), prompts=[])
    with pytest.raises(ValueError, match="2 rows for 3 prompts"):
        evaluator(ARChain(), condition=ARChain().encode(["1", "2"]))


def test_an_encoded_condition_is_used():
    class Deaf(ARChain):
        def encode(self, prompts, **inputs):
            raise AssertionError("its text encoder is gone")

    same(evaluator(Deaf(), condition=ARChain().encode(["0", "1", "2"]))(0), evaluator(ARChain())(0))


def test_save_and_load(tmp_path):
    rewards = {"mean": MEAN, "colorfulness": make_reward("colorfulness")}
    for policy, reference in [(Painter(), Painter()), (MaskedChain(), None), (Shifted(), None)]:
        found = evaluator(policy, reference, rewards, ["ein rotes Herz", "“☕”"])(7)
        found.save(tmp_path / "x.safetensors")
        back = Evaluation.load(tmp_path / "x.safetensors")
        if found.samples.modality == "image":  # to 8 bits
            assert_close(back.samples.data, found.samples.data, rtol=0, atol=0.5 / 255 + 1e-6)
            back.samples = found.samples
        same(found, back)
    words = Samples(["a", "b c"], "text", ["p", "p"])
    scores = {"z": torch.ones(2), "a": torch.zeros(2)}  # the trained one is not the first by name
    text = Evaluation(1, words, ["p"], scores, {}, torch.ones(1), None)
    text.save(tmp_path / "x.safetensors")
    back = Evaluation.load(tmp_path / "x.safetensors")
    assert back.samples == words and back.trained == "z" and back.kl is None


# -- the guard ----------------------------------------------------------------------------------


def made(trained, judge=None, *, diversity=(1.0, 1.0), sharpness=None, kl=None, iteration=0):
    """An evaluation of two prompts, from its numbers."""
    trained = torch.as_tensor(trained, dtype=torch.float32)
    n = len(trained)
    scores = {"trained": trained}
    if judge is not None:
        scores["judge"] = torch.as_tensor(judge, dtype=torch.float32)
    return Evaluation(
        iteration,
        Samples(torch.zeros(n, 1), "toy", ["a"] * n),
        ["a", "b"],
        scores,
        {} if sharpness is None else {"sharpness": torch.as_tensor(sharpness)},
        torch.tensor(diversity, dtype=torch.float64),
        None if kl is None else torch.full((n,), kl, dtype=torch.float64),
    )


FLAT = torch.zeros(4)


def test_diversity_warning():
    watch = Watch(Guard(min_diversity=0.5), made(FLAT, diversity=(1.0, 0.5)))
    assert watch.check(made(FLAT, diversity=(0.25, 0.5)), 0.0) == []
    (text,) = watch.check(made(FLAT, diversity=(0.2499, 0.5)), 0.0)
    assert "50% as far" in text and "0.375, was 0.75" in text and "limit is 50%" in text
    alone = (math.nan, math.nan)
    assert Watch(Guard(), made(FLAT, diversity=alone)).check(made(FLAT, diversity=alone), 0.0) == []
    assert Watch(Guard(), made(FLAT, diversity=(0.0, 0.0))).check(made(FLAT), 0.0) == []


def test_flat_warning():
    watch = Watch(Guard(max_flat_groups=0.5), made(FLAT))
    assert watch.check(made(FLAT), 0.5) == []
    (text,) = watch.check(made(FLAT), 0.625)
    assert "62% of the prompts" in text


@pytest.mark.parametrize("sign", [-1, 1])
def test_probe_warning(sign):
    before = torch.tensor([9.0, 11.0, 9.0, 11.0])  # std 2 / sqrt(3)
    watch = Watch(Guard(max_shift=2.0), made(FLAT, sharpness=before))
    step = 2 * 2 / math.sqrt(3)
    assert watch.check(made(FLAT, sharpness=before + sign * (step - 1e-4)), 0.0) == []
    (text,) = watch.check(made(FLAT, sharpness=before + sign * (step + 1e-4)), 0.0)
    assert text.startswith(f"sharpness moved from 10 to {10 + sign * step:.3g}") and "2.0" in text
    assert (
        Watch(Guard(), made(FLAT, sharpness=FLAT)).check(made(FLAT, sharpness=FLAT + 1), 0.0) == []
    )


def test_kl_warning():
    watch = Watch(Guard(max_kl=10.0), made(FLAT, kl=0.0))
    assert watch.check(made(FLAT, kl=10.0), 0.0) == []
    (text,) = watch.check(made(FLAT, kl=10.5), 0.0)
    assert "10.5 nats (the limit is 10)" in text
    assert Watch(Guard(), made(FLAT, kl=0.0)).check(made(FLAT, kl=1e6), 0.0) == []
    with pytest.raises(ValueError, match="guard.max_kl"):
        Watch(Guard(max_kl=1.0), made(FLAT))


def test_held_out_warning():
    before = torch.tensor([5.0, 0.0, 3.0, 1.0])
    d = torch.tensor([1.0, -1.0, 1.0, -1.0])  # standard error 1 / sqrt(3)
    watch = Watch(Guard(held_out=2.0), made(FLAT, before))
    edge = 2 / math.sqrt(3)
    assert watch.check(made(FLAT + 1, before + d - edge + 1e-4), 0.0) == []
    (text,) = watch.check(made(FLAT + 1, before + d - edge - 1e-4), 0.0)
    assert "judge" in text and "fell by 1.15 (standard error 0.58, 4 pairs)" in text
    assert "trained rose by 1" in text
    # both down, or both up, is no hacking
    assert watch.check(made(FLAT - 1, before - 9), 0.0) == []
    assert watch.check(made(FLAT + 1, before + 9), 0.0) == []
    # without pairs there is nothing to say
    blind = torch.full((4,), math.nan)
    assert Watch(Guard(), made(FLAT, blind)).check(made(FLAT + 1, blind), 0.0) == []


def test_noise_seldom_alarms():
    """Samples that only changed by noise: a held-out reward alarms at P(t_63 < -2) = 2.5%, times
    1/2 since the trained one must have risen; the other limits are far outside the noise."""
    g = torch.Generator().manual_seed(0)
    n, trials = 64, 3000

    def draw():
        return torch.randn(n, generator=g)

    common, count, others = draw(), 0, 0
    watch = Watch(Guard(), made(draw(), common + draw(), sharpness=draw(), diversity=(0.9, 1.1)))
    for _ in range(trials):
        before = made(draw(), common + draw(), sharpness=draw(), diversity=(0.9, 1.1))
        watch = Watch(Guard(), before)
        about = (torch.tensor([0.9, 1.1]) * (1 + 0.1 * torch.randn(2, generator=g))).tolist()
        found = watch.check(made(draw(), common + draw(), sharpness=draw(), diversity=about), 0.1)
        count += any("judge" in text for text in found)
        others += any("judge" not in text for text in found)
    rate = scipy.stats.t.cdf(-2, n - 1) / 2
    error = math.sqrt(rate * (1 - rate) / trials)
    assert abs(count / trials - rate) < 4 * error and others == 0


def test_stop_after_two_in_a_row():
    flat, narrow = 0.9, made(FLAT, diversity=(0.1, 0.1))
    for options, stops in [(Guard(stop=True), True), (Guard(), False)]:
        watch = Watch(options, made(FLAT))
        watch.check(made(FLAT), flat)
        assert not watch.stop
        watch.check(made(FLAT), 0.0)
        watch.check(made(FLAT), flat)
        assert not watch.stop  # not in a row
        watch.check(narrow, 0.0)
        assert not watch.stop  # in a row, but of two kinds
        watch.check(narrow, flat)
        assert watch.stop is stops
        watch.check(made(FLAT), 0.0)
        assert not watch.stop


def test_state_survives_a_restart():
    first = Watch(Guard(stop=True), made(FLAT))
    first.check(made(FLAT, iteration=25), 0.9)
    second = Watch(Guard(stop=True), made(FLAT))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state == first.state
    second.check(made(FLAT, iteration=50), 0.9)
    assert second.stop
    assert [iteration for iteration, _ in second.state.warnings] == [25, 50]


def test_diversity_of_pictures_in_any_memory_layout():
    data = torch.rand(4, 3, 32, 32)
    other = data.to(memory_format=torch.channels_last)
    found = [diversity(Samples(d, "image"), 2) for d in (data, other)]
    torch.testing.assert_close(found[0], found[1])

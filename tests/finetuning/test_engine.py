import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from algorithms.chains import LinearChain
from finetuning.run_tiny import red

from diffreward.algorithms import History, make_algorithm
from diffreward.algorithms.base import DenoisingAlgorithm, PathwiseAlgorithm, TrajectoryAlgorithm
from diffreward.finetuning import Training, finetune
from diffreward.finetuning.batches import Batches
from diffreward.finetuning.engine import Engine
from diffreward.policies import load_policy
from diffreward.policy import path_log_prob, rollout, sample_generators
from diffreward.rewards import evaluate

PROMPTS = ["red heart", "blue star", "a cat", "green square"]
SMALL = dict(
    prompts_per_update=2, samples_per_prompt=3, iterations=2, learning_rate=1e-3, loggers=[],
    evaluate_every=0, eval_samples=1,
)  # fmt: skip


def tiny_policy(num_steps=3, **options):
    """Of a pipeline of its own: the builders of `tiny` share theirs."""
    pipe = copy.deepcopy(tiny.sd())
    pipe.set_progress_bar_config(disable=True)
    return load_policy(pipe, num_steps=num_steps, guidance_scale=2.0, **options)


def engine(algorithm="prdp", policy=None, reward=red, **options):
    training = Training(**{**SMALL, **options})
    from diffreward.rewards import make_reward

    return Engine(
        policy or tiny_policy(), make_reward(reward), make_algorithm(algorithm), PROMPTS, training,
        progress=False,
    )  # fmt: skip


def weights(policy):
    return {
        name: p.detach().clone()
        for name, p in policy.denoiser.named_parameters()
        if p.requires_grad
    }


# -- batch arithmetic ---------------------------------------------------------------------------


def test_batches_say_how_samples_are_divided():
    assert str(Batches(8, 4, 1, 2, 6, 100)) == (
        "8 prompts x 4 samples = 32 per update, 16 on each of 2 processes, in 3 network calls of "
        "at most 6"
    )
    assert str(Batches(2, 4, 3, 1, None, 6)) == (
        "2 prompts x 4 samples = 8 per update, 3 updates per pass through a rollout of 24"
    )


def test_what_does_not_divide_is_refused_with_the_nearest_that_does():
    with pytest.raises(ValueError, match=r"21 samples per update .* by 4 processes; set .* 4 or 8"):
        Batches(7, 3, 1, 4, None, 100)
    with pytest.raises(ValueError, match="there are 7; set prompts_per_update to at most 3"):
        Batches(4, 3, 2, 1, None, 7)
    with pytest.raises(ValueError, match="max_batch must be at least 1, but 0 came"):
        Batches(4, 3, 2, 1, 0, 8)


def test_every_prompt_comes_once_per_epoch_and_never_twice_in_a_rollout():
    e = engine(prompts_per_update=2)
    seen = []
    for e.iteration in range(6):
        chosen = e._choose()
        assert len(set(chosen)) == 2
        seen += chosen
    for epoch in range(3):
        assert sorted(seen[4 * epoch : 4 * epoch + 4]) == [0, 1, 2, 3]
    assert seen[:4] != seen[4:8] or seen[4:8] != seen[8:]


def gradients(e):
    return {name: p.grad.clone() for name, p in e.trainable.parameters.items()}


# -- gradients ----------------------------------------------------------------------------------


class Everything(TrajectoryAlgorithm):
    """A loss that is not linear in any of its matrices, and leaves some entries alone."""

    needs_reference = needs_kl = True

    def loss(self, log_prob, log_prob_old, log_prob_ref, scores, groups, kl=None):
        change = (log_prob - log_prob_ref).sum(1)
        u = change - 3 * scores.value
        pairs = (u[:, None] - u[None, :])[groups[:, None] == groups[None, :]]
        late = torch.arange(log_prob.shape[1]) > 0
        return (pairs**2).mean() + (kl * late).pow(2).sum() + 0.3 * (kl * late).sum()


@pytest.mark.parametrize("max_batch, fraction, steps", [(None, 1.0, 3), (4, 1.0, 3), (4, 0.6, 2)])
def test_two_passes_give_the_gradient_of_the_whole_graph(max_batch, fraction, steps):
    e = engine(Everything(), max_batch=max_batch, step_fraction=fraction)
    with torch.no_grad():  # away from the reference, where the gradient of the KL is 0
        for p in e.parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    ro = e._rollout(lambda: False)
    taken = {}
    e._step = lambda: (
        taken.update({n: p.grad.clone() for n, p in e.trainable.parameters.items()}) or {}
    )
    e._trajectory(ro, 0, fresh=True)

    e.optimizer.zero_grad()
    reference, columns, kls = e.trainable.reference, [], []
    for i in range(steps):  # of 3
        law = e.policy.step_law(ro.latents[i], i, ro.condition)
        columns.append(law.log_prob(ro.latents[i + 1]))
        kls.append(law.kl(reference.step_law(ro.latents[i], i, ro.condition)))
    log_prob, kl = torch.stack(columns, 1).double(), torch.stack(kls, 1).double()
    loss = e.algorithm.loss(log_prob, ro.log_prob, ro.log_prob_ref, ro.credit, ro.groups, kl)
    loss.backward()
    assert taken.keys() == e.trainable.parameters.keys()
    for name, p in e.trainable.parameters.items():
        torch.testing.assert_close(taken[name], p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max())


def test_entries_without_weight_are_not_computed():
    class Last(TrajectoryAlgorithm):
        def loss(self, log_prob, log_prob_old, log_prob_ref, scores, groups, kl=None):
            return log_prob[0, 1] * 2.0

    e = engine(Last())
    ro = e._rollout(lambda: False)
    before = e.compute.counts()
    e._trajectory(ro, 0, fresh=True)
    forward, backward = (b - a for a, b in zip(before, e.compute.counts(), strict=True))
    assert (forward, backward) == (0, 2)  # one sample, one step, with and without its prompt


class Kept(DenoisingAlgorithm):
    needs_reference = True
    num_draws = 2

    def loss(self, error, error_ref, scores, groups):
        gain = (error_ref - error).mean(1)
        return (
            -(torch.nn.functional.logsigmoid(gain * scores.value.sign())).sum() + error[0, 0] ** 2
        )


def test_denoising_losses_have_the_gradient_of_the_whole_graph():
    e = engine(Kept(), max_batch=4)
    ro = e._rollout(lambda: False)
    e.updates = 1  # no self-check: weights are moved by hand
    with torch.no_grad():
        for p in e.parameters:
            p.add_(0.05)
    taken = {}
    e._step = lambda: (
        taken.update({n: p.grad.clone() for n, p in e.trainable.parameters.items()}) or {}
    )
    e._denoising(ro, 0, pass_=1)
    e.optimizer.zero_grad()

    def errors(policy):
        chosen = e._choose()
        draws = [e._generators(ro.rows, chosen, 3 + s) for s in range(2)]
        x0 = ro.latents[-1]
        return torch.stack([policy.denoising_loss(x0, ro.condition, g) for g in draws], 1).double()

    with torch.no_grad():
        reference = errors(e.trainable.reference)
    e.algorithm.loss(errors(e.policy), reference, ro.credit, ro.groups).backward()
    for name, p in e.trainable.parameters.items():
        torch.testing.assert_close(taken[name], p.grad, rtol=1e-3, atol=1e-6)


class Straight(PathwiseAlgorithm):
    def loss(self, policy, condition, generator, score):
        x = rollout(policy, condition, generator, differentiable=True).final
        samples = policy.decode(x, condition)
        scores = score(samples)
        return -scores.value, samples, scores


def test_pathwise_losses_are_averaged_over_all_pieces():
    grads = []
    for max_batch in (None, 4):
        e = engine(Straight(), max_batch=max_batch)
        e._step = lambda: {}
        e._pathwise([])
        grads.append(gradients(e))
    condition = e.policy.encode([PROMPTS[p] for p in e._choose() for _ in range(3)])
    e.optimizer.zero_grad()
    generators = e._generators(torch.arange(6), e._choose())
    samples = e.policy.decode(
        rollout(e.policy, condition, generators, differentiable=True).final, condition
    )
    (-red(samples).mean()).backward()
    for name, p in e.trainable.parameters.items():
        for grad in grads:
            torch.testing.assert_close(grad[name], p.grad, rtol=1e-3, atol=1e-7)


# -- what a run does ------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_prdp_reaches_the_optimum_in_closed_form(shared):
    chain = LinearChain()
    w, beta = 1.5, 2.0
    found = finetune(
        chain, lambda s: w * s.data[:, 0],
        {"name": "prdp", "beta": beta, "standardize": False, "shared_noise": shared, "passes": 1},
        ["0", "0.5"], prompts_per_update=2, samples_per_prompt=64, iterations=150,
        method="full", learning_rate=0.05, schedule="linear", weight_decay=0.0, evaluate_every=0,
        eval_samples=256, loggers=[], progress=False,
    )  # fmt: skip
    shift, expected = chain.shift.detach(), chain.optimum(w, beta)
    tolerance = 3e-3 if shared else 0.06  # no noise is left at the optimum, or some
    torch.testing.assert_close(shift, expected, rtol=0, atol=tolerance)
    gain = found.after.scores[found.after.trained] - found.before.scores[found.after.trained]
    rise = w * (chain.tail[1:] * expected).sum().item()
    assert gain.mean().item() == pytest.approx(rise, abs=0.15)
    kl = (expected**2 / (2 * chain.sigma**2)).sum().item()
    assert found.after.kl.mean().item() == pytest.approx(kl, rel=0.1 if shared else 0.6)


def test_only_the_adapters_change():
    policy = tiny_policy()
    before = {n: p.detach().clone() for n, p in policy.denoiser.named_parameters()}
    found = finetune(policy, red, "reinforce", PROMPTS, progress=False, **SMALL)
    after = dict(policy.denoiser.named_parameters())
    base = {n.replace(".base_layer", ""): p for n, p in after.items() if "lora_" not in n}
    assert base.keys() == before.keys()
    for name, p in base.items():
        assert torch.equal(p, before[name])
    assert [row["updates"] for row in found.metrics] == [1, 2]
    x, condition = torch.randn(2, 4, 8, 8), policy.encode(PROMPTS[:2])
    with torch.no_grad():
        untouched = tiny_policy().step_law(x, 0, condition).mean
        assert torch.equal(policy.reference().step_law(x, 0, condition).mean, untouched)
        assert not torch.equal(policy.step_law(x, 0, condition).mean, untouched)


@pytest.mark.parametrize("algorithm", ["prdp", "raft", "draft"])
def test_pieces_do_not_change_the_result(algorithm):
    found = []
    for max_batch in (None, 4, 1):
        policy = tiny_policy()
        finetune(policy, red, algorithm, PROMPTS, max_batch=max_batch, progress=False, **SMALL)
        found.append(weights(policy))
    start = weights(engine().policy)
    for other in found[1:]:
        for name in start:
            moved = found[0][name] - start[name]
            torch.testing.assert_close(other[name] - start[name], moved, rtol=0.02, atol=2e-5)
    assert any((found[0][name] != start[name]).any() for name in start)


def test_full_finetuning_keeps_a_reference():
    policy = tiny_policy()
    found = finetune(policy, red, "prdp", PROMPTS, method="full", progress=False, **SMALL)
    assert found.before.kl.abs().max() == 0
    assert found.after.kl.mean() > 0
    x, condition = torch.randn(2, 4, 8, 8), policy.encode(PROMPTS[:2])
    with torch.no_grad():
        assert not torch.equal(
            policy.step_law(x, 0, condition).mean, tiny_policy().step_law(x, 0, condition).mean
        )


def test_shared_noise_is_shared_by_a_group_and_by_nothing_else():
    e = engine({"name": "prdp", "shared_noise": True})
    ro = e._rollout(lambda: False)
    x = ro.latents[0]
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2]) and torch.equal(x[3], x[4])
    assert not torch.equal(x[0], x[3])
    steps = ro.latents[1]
    assert not torch.equal(steps[0], steps[1])
    alone = engine({"name": "prdp", "shared_noise": False})._rollout(lambda: False)
    assert torch.equal(alone.latents[0][0], x[0])  # the first sample's own
    assert not torch.equal(alone.latents[0][1], x[1])


def test_samples_are_those_of_the_seeds():
    e = engine()
    e.iteration = 1
    chosen = e._choose()
    ro = e._rollout(lambda: False)
    generators = [
        sample_generators(0, 1, 3, first_prompt=p, stream=1024)[s] for p in chosen for s in range(3)
    ]
    condition = e.policy.encode([PROMPTS[p] for p in chosen for _ in range(3)])
    with torch.no_grad():
        expected = rollout(e.policy, condition, generators, keep_path=True)
        log_prob = path_log_prob(e.policy, expected)
    assert torch.equal(ro.latents[-1], expected.final)
    torch.testing.assert_close(ro.log_prob, log_prob.double())
    value = evaluate(red, e.policy.decode(expected.final, condition)).value
    torch.testing.assert_close(ro.scores.value, value.double())


def test_schedules_of_the_learning_rate():
    def rates(schedule):
        e = engine("reinforce", iterations=5, schedule=schedule, warmup=2, learning_rate=1.0)
        return [round(e._rate(n), 3) for n in range(5)]

    assert rates("constant") == [0.5, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.667, 0.333]
    assert rates("cosine") == [0.5, 1, 1, 0.75, 0.25]


# -- self-checks and refusals ---------------------------------------------------------------------


def test_a_network_that_is_not_itself_is_found():
    policy = tiny_policy()
    e = engine(policy=policy)
    calls = []

    def drift(network, inputs, output):
        calls.append(1)
        output.sample.add_(0.002 * (len(calls) > 3))  # after the rollout: another network

    policy.denoiser.register_forward_hook(drift)
    with pytest.raises(
        RuntimeError, match=r"differ by [0-4]\.\d* nats between rollout and training"
    ):
        e._iterate(lambda: False)


def test_rewards_that_teach_nothing():
    with (
        pytest.warns(UserWarning, match="all 6 samples of the first rollout have the reward 1"),
        pytest.warns(UserWarning, match="the first update has no gradient"),
    ):
        finetune(
            tiny_policy(), lambda s: torch.ones(len(s)), "reinforce", PROMPTS, progress=False,
            **{**SMALL, "iterations": 1},
        )  # fmt: skip
    with pytest.raises(ValueError, match="finetuning needs finite rewards"):
        finetune(
            tiny_policy(), lambda s: torch.full((len(s),), -torch.inf), "prdp", PROMPTS,
            progress=False, **SMALL,
        )  # fmt: skip


def test_bad_options_are_refused_before_anything_is_computed():
    class Untouchable:
        device, num_steps, stochastic = torch.device("cpu"), 3, False
        encode = initial = step_law = decode = denoising_loss = reference = print

    with pytest.raises(ValueError, match="no option 'learning_rat' of finetune; did you mean 'lea"):
        finetune(Untouchable(), red, prompts=PROMPTS, learning_rat=1)
    with pytest.raises(ValueError, match="iterations must be at least 1, but 0 came"):
        finetune(Untouchable(), red, prompts=PROMPTS, iterations=0)
    with pytest.raises(ValueError, match=r"step_fraction lies in \(0, 1\], but 1.5 came"):
        finetune(Untouchable(), red, prompts=PROMPTS, step_fraction=1.5)
    with pytest.raises(ValueError, match="this policy is deterministic"):
        finetune(Untouchable(), red, "prdp", PROMPTS)
    with pytest.raises(ValueError, match="no algorithm 'prpd'; did you mean 'prdp'"):
        finetune(Untouchable(), red, "prpd", PROMPTS)
    with pytest.raises(ValueError, match="no option of prdp 'bta'; did you mean 'beta'"):
        make_algorithm({"name": "prdp", "bta": 1.0})
    with pytest.raises(ValueError, match="differentiable"):
        finetune(tiny_policy(), "jpeg_compressibility", "draft", PROMPTS)


def test_history_keeps_the_latest():
    history = History(3)
    history.add(["a", "b", "a", "a", "a"], torch.tensor([1.0, 2, 3, 4, 5]))
    assert history["a"].tolist() == [3, 4, 5] and history["b"].tolist() == [2]
    assert len(history["c"]) == 0
    again = History()
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    again.add(["a"], torch.tensor([6.0]))
    assert again["a"].tolist() == [4, 5, 6]


# -- processes -------------------------------------------------------------------------------

RUN = Path(__file__).with_name("run_tiny.py")
TIMES = {"seconds", "samples_per_second"}


def run(folder, launcher=(sys.executable,), **options):
    done = subprocess.run(
        [*launcher, str(RUN), str(folder), json.dumps(options)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def final_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "final" / "pytorch_lora_weights.safetensors")


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_killed_and_resumed_runs_end_with_the_same_weights(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole)
    for enough in (2, 4):
        command = [sys.executable, str(RUN), str(broken)]
        options = {"pause": 0.05} | ({"resume": "latest"} if enough > 2 else {})
        process = subprocess.Popen([*command, json.dumps(options)], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            there = list(broken.glob("checkpoints/checkpoint-*"))
            if any(int(p.name.split("-")[1]) >= enough for p in there):
                process.kill()
            time.sleep(0.01)
        assert process.wait() == -signal.SIGKILL
    run(broken, resume="latest")
    expected, found = final_weights(whole), final_weights(broken)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name])
    assert rows(whole) == rows(broken)
    assert len(list(broken.glob("checkpoints/*"))) == 2


def test_sigterm_saves_and_exits(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(RUN), str(folder), json.dumps({"pause": 0.3, "checkpoint_every": 0})],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (folder / "metrics.jsonl").exists() or "reward" not in rows(folder)[-1]:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped=signal" in out
    assert len(list(folder.glob("checkpoints/checkpoint-*"))) == 1
    assert "stopped=None iterations=6" in run(folder, resume="latest")
    run(tmp_path / "whole")
    expected = final_weights(tmp_path / "whole")
    assert all(torch.equal(expected[n], w) for n, w in final_weights(folder).items())


def test_two_processes_do_what_one_does(tmp_path):
    specs = [{"name": "prdp", "passes": 2, "minibatches": 2}, {"name": "raft"}, {"name": "draft"}]
    specs += [{"name": "grpo", "of_sets": True}]
    options = {"algorithms": specs, "iterations": 2}
    run(tmp_path / "one", **options)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    run(tmp_path / "two", (*launcher, "--master-port", str(29000 + os.getpid() % 1000)), **options)
    for spec in specs:
        a, b = tmp_path / "one" / spec["name"], tmp_path / "two" / spec["name"]
        one, two = final_weights(a), final_weights(b)
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0.02, atol=1e-4)
        for x, y in zip(rows(a), rows(b), strict=True):
            assert x.keys() == y.keys()
            if "reward" in x:
                assert x["reward"] == pytest.approx(y["reward"], abs=1e-3)
                assert x["loss"] == pytest.approx(y["loss"], rel=1e-2, abs=1e-4)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(tmp_path / "run", iterations=1)
    done = subprocess.run(
        [sys.executable, str(RUN), str(tmp_path / "run"),
         json.dumps({"resume": "latest", "learning_rate": 0.5})],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "training.learning_rate" in done.stderr and "0.5" in done.stderr


def test_mixed_precision_and_recomputed_activations():
    found = []
    for options in ({}, {"activation_checkpointing": True}, {"mixed_precision": "bf16"}):
        policy = tiny_policy()
        full = {**SMALL, "method": "full", "learning_rate": 1e-4, **options}
        finetune(policy, red, "reinforce", PROMPTS, progress=False, **full)
        assert policy.denoiser.conv_in.weight.dtype == torch.float32
        found.append(policy.denoiser.conv_in.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    start = tiny_policy().denoiser.conv_in.weight
    moved, other = (f - start for f in (found[0], found[2]))
    assert 0.5 < torch.nn.functional.cosine_similarity(moved.flatten(), other.flatten(), 0) < 1


def test_text_encoders_are_away_while_they_are_not_needed():
    e = engine()
    moves = []
    e.policy._move_encoders = lambda device: moves.append(str(device))
    e.conditions._park(True)
    e.policy.encode(["a cat"])
    e.conditions.close()
    e.policy.encode(["a cat"])
    assert moves == ["cpu", "cpu", "cpu", "cpu"]  # parked, there, parked, back
    assert not e.policy._parked


def test_few_prompts_are_one_update():
    found = finetune(
        tiny_policy(), red, "reinforce", PROMPTS[:2], iterations=1, samples_per_prompt=2,
        eval_samples=1, evaluate_every=0, loggers=[], progress=False,
    )  # fmt: skip
    assert len(found.metrics) == 1 and len(found.before.prompts) == 2


def test_runs_are_not_mixed(tmp_path):
    options = {**SMALL, "iterations": 1, "progress": False, "output": tmp_path / "run"}
    finetune(tiny_policy(), red, "reinforce", PROMPTS, **options)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already; give resume='latest'"):
        finetune(tiny_policy(), red, "reinforce", PROMPTS, **options)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_an_average_is_evaluated_and_saved(tmp_path):
    policy = tiny_policy()
    options = {**SMALL, "learning_rate": 1e-2, "ema_decay": 0.5}
    finetune(policy, red, "reinforce", PROMPTS, output=tmp_path / "run", progress=False, **options)
    saved = tiny_policy(lora=tmp_path / "run" / "final")
    x, condition = torch.randn(2, 4, 8, 8), policy.encode(PROMPTS[:2])
    with torch.no_grad():
        average, last = (p.step_law(x, 0, condition).mean for p in (saved, policy))
        start = tiny_policy().step_law(x, 0, condition).mean
    assert not torch.equal(average, last) and not torch.equal(average, start)
    assert (average - start).norm() < (last - start).norm()

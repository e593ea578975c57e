"""Checkpoints: what is there is whole, whenever a process died and however full the disk is."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from diffreward.finetuning import checkpoint as module
from diffreward.finetuning.checkpoint import (
    MAY_DIFFER,
    check_same,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)

FORK = multiprocessing.get_context("fork")  # children need not import torch again


def contents(step, size=10):
    """Three tensors and a state of which each part says what step it is of."""
    return {
        "model": {"a.weight": torch.full((size, 3), float(step)), "a.bias": torch.arange(step)},
        "optimizer": {"a.weight/step": torch.tensor(float(step))},
    }, {"step": step, "rewards": [step / 3, None], "text": "é"}


def save(folder, step, keep=2, size=10):
    return save_checkpoint(folder, step, *contents(step, size), keep=keep)


def check_whole(path, size=10):
    """The step of a checkpoint, of which every part must be of that step."""
    tensors, state = load_checkpoint(path)
    wanted, wanted_state = contents(state["step"], size)
    assert state == wanted_state
    assert {name: set(group) for name, group in tensors.items()} == {
        name: set(group) for name, group in wanted.items()
    }
    for name, group in wanted.items():
        for key, value in group.items():
            found = tensors[name][key]
            assert found.dtype == value.dtype and torch.equal(found, value)
    return state["step"]


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_round_trip(tmp_path):
    tensors = {
        "model": {
            "half": torch.randn(3, 4).bfloat16(),
            "double": torch.randn(3, dtype=torch.float64),
            "scalar": torch.tensor(0.1),
            "empty": torch.empty(0, 3),
            "strided": torch.randn(4, 6).T[1:, ::2],
            "graph": torch.randn(2, requires_grad=True),
        },
        "rng": {"torch": torch.get_rng_state(), "flag": torch.tensor([True, False])},
        "nothing": {},
    }
    whole = torch.randn(10)
    tensors["views"] = {"first": whole[:5], "last": whole[5:]}  # of one memory
    state = {"step": 7, "x": 0.1 + 0.2, "big": 2**63, "nested": {"list": [1, None, "é", True]}}
    path = save_checkpoint(tmp_path, 7, tensors, state, keep=1)
    assert path == tmp_path / "checkpoints" / "checkpoint-7"
    assert sorted(p.name for p in path.iterdir()) == [
        "model.safetensors", "nothing.safetensors", "rng.safetensors", "state.json",
        "views.safetensors",
    ]  # fmt: skip
    found, found_state = load_checkpoint(path)
    assert found_state == state
    assert found.keys() == tensors.keys()
    for name, group in tensors.items():
        assert found[name].keys() == group.keys()
        for key, value in group.items():
            assert found[name][key].dtype == value.dtype and torch.equal(found[name][key], value)


def test_older_ones_go(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (0, 5, 10, 100):
        save(tmp_path, step, keep=2)
        assert check_whole(latest_checkpoint(tmp_path)) == step
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]  # 10 < 100, as numbers
    save(tmp_path, 101, keep=1)
    assert names(tmp_path) == ["checkpoint-101"]


def test_the_same_step_again_replaces(tmp_path):
    save(tmp_path, 3, keep=1)
    save_checkpoint(tmp_path, 3, {"model": {"b": torch.ones(1)}}, {"new": True}, keep=1)
    tensors, state = load_checkpoint(tmp_path / "checkpoints" / "checkpoint-3")
    assert list(tensors) == ["model"] and list(tensors["model"]) == ["b"] and state == {"new": True}
    assert names(tmp_path) == ["checkpoint-3"]


def test_going_back_abandons_later_checkpoints_and_keeps_them(tmp_path):
    for _ in range(2):
        for step in (10, 20, 30):
            save(tmp_path, step, keep=3)
        save(tmp_path, 15, keep=3)
        assert latest_checkpoint(tmp_path).name == "checkpoint-15"
    assert names(tmp_path) == [
        "abandoned-checkpoint-15", "abandoned-checkpoint-20", "abandoned-checkpoint-20-2",
        "abandoned-checkpoint-30", "abandoned-checkpoint-30-2", "checkpoint-10", "checkpoint-15",
    ]  # fmt: skip
    assert check_whole(tmp_path / "checkpoints" / "abandoned-checkpoint-20") == 20


def test_find(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="none yet, so start without --resume"):
        find_checkpoint(tmp_path, "latest")
    first, second = save(tmp_path, 2), save(tmp_path, 10)
    assert find_checkpoint(tmp_path, "latest") == second
    monkeypatch.chdir(tmp_path)
    for which in (2, "2", "checkpoint-2", first, str(first), "checkpoints/checkpoint-2"):
        assert find_checkpoint(tmp_path, which).resolve() == first.resolve()
    for which in (3, "3", "last", "checkpoint-3", tmp_path):
        with pytest.raises(FileNotFoundError, match="there are checkpoint-2, checkpoint-10"):
            find_checkpoint(tmp_path, which)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint: there is no state\.json"):
        load_checkpoint(tmp_path)


def test_bad_input_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 2, keep=0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 2, contents(2)[0], {"x": torch.ones(2)}, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]


# Dying processes ------------------------------------------------------------------------------


def keep_saving(folder, keep, size, saved):
    latest = latest_checkpoint(folder)
    for step in itertools.count(number(latest.name) + 1 if latest else 1):
        save(folder, step, keep, size)
        saved.set()


@pytest.mark.parametrize("keep", [1, 2])
def test_kill_9_at_any_moment(tmp_path, keep):
    size, last, rng = 50_000, 0, random.Random(keep)
    for _ in range(25):
        saved = FORK.Event()
        process = FORK.Process(target=keep_saving, args=(tmp_path, keep, size, saved))
        process.start()
        assert saved.wait(60)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        for path in tmp_path.glob("checkpoints/checkpoint-*"):
            assert check_whole(path, size) == number(path.name)
        now = check_whole(latest_checkpoint(tmp_path), size)
        assert now > last
        last = now
    save(tmp_path, last + 1, keep, size)  # what the killed ones have left goes
    assert names(tmp_path) == sorted(f"checkpoint-{last + 1 - n}" for n in range(keep))


def number(name):
    return int(name.rpartition("-")[2])


def save_and_die(folder, step, keep, moment):
    """Die at the n-th thing done to the disk; exit 0 if there are fewer."""
    seen = itertools.count(1)
    events = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}

    def hook(event, args):
        if event in events and next(seen) == moment:
            os._exit(9)

    sys.addaudithook(hook)
    save(folder, step, keep)


@pytest.mark.parametrize(
    ("before", "step"), [((1, 2), 3), ((1, 2), 2), ((2,), 2), ((1, 4, 5), 2), ((), 1)]
)
def test_death_at_every_operation(tmp_path, before, step):
    """A new step, the same again, one that goes back; with the oldest removed in each."""
    for moment in range(1, 200):
        folder = tmp_path / str(moment)
        for old in before:
            save(folder, old, keep=3)
        process = FORK.Process(target=save_and_die, args=(folder, step, len(before) or 1, moment))
        process.start()
        process.join()
        latest = latest_checkpoint(folder)
        if latest is not None:
            check_whole(latest)
            whole = {check_whole(p) for p in folder.glob("checkpoints/checkpoint-*")}
            assert whole <= {*before, step}
        assert latest is not None or not before
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        # the next save puts everything in order
        save(folder, 9, keep=1)
        assert [n for n in names(folder) if "abandoned" not in n] == ["checkpoint-9"]
    assert process.exitcode == 0 and check_whole(latest) == step
    assert 5 < moment < 199


def test_what_is_being_replaced_counts_until_its_successor_is_there(tmp_path, monkeypatch):
    save(tmp_path, 1).rename(tmp_path / "checkpoints" / ".replaced-checkpoint-1")  # and was killed

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", full)
        for step in (1, 2):
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, step)
            assert check_whole(latest_checkpoint(tmp_path)) == 1
            assert check_whole(find_checkpoint(tmp_path, 1)) == 1
    save(tmp_path, 2, keep=2)
    assert names(tmp_path) == [".replaced-checkpoint-1", "checkpoint-2"]
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


# Full disks -------------------------------------------------------------------------------------


@contextmanager
def small_files(limit):
    """No file may grow beyond the limit: writes fail as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_small_files(folder, step, size, limit, found):
    with small_files(limit):
        try:
            save(folder, step, 1, size)
        except OSError as err:
            message = str(err)
    found.send(message)


@pytest.mark.parametrize("limit", [0, 50, 1000])
def test_full_disk(tmp_path, limit):
    save(tmp_path, 1, keep=1, size=1000)
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=in_small_files, args=(tmp_path, 2, 1000, limit, theirs))
    process.start()
    assert ours.poll(60)
    message = ours.recv()
    process.join()
    assert "checkpoint 2 could not be written" in message and "(checkpoint-1)" in message
    assert names(tmp_path) == ["checkpoint-1"] and check_whole(*once(tmp_path), size=1000) == 1
    save(tmp_path, 2, keep=1, size=1000)
    assert names(tmp_path) == ["checkpoint-2"]


def once(folder):
    return list(folder.glob("checkpoints/checkpoint-*"))


@pytest.mark.parametrize("failing", ["save_file", "_sync", "_put"])
def test_errors_at_every_stage(tmp_path, monkeypatch, failing):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, failing, full)
        with pytest.raises(OSError, match=r"No space left on device.*\(checkpoint-1\)\. Make room"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"] and check_whole(*once(tmp_path)) == 1


# Damaged checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "scrambled", "missing"])
def test_damaged(tmp_path, name, damage):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = file.read_bytes()
    if damage == "missing":
        if name == "state.json":
            return  # then there is no checkpoint
        file.unlink()
    else:
        changed = {
            "cut": data[:-1], "empty": b"", "longer": data + b"x", "scrambled": b"\xff" * len(data)
        }  # fmt: skip
        file.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=f"{name}.* is damaged.*another checkpoint: checkpoint-1$"):
        load_checkpoint(file.parent)
    assert check_whole(find_checkpoint(tmp_path, 1)) == 1


def test_damaged_and_alone(tmp_path):
    file = save(tmp_path, 1) / "state.json"
    file.write_text(json.dumps({"files": []}))
    with pytest.raises(ValueError, match="there is none"):
        load_checkpoint(file.parent)


# Optimisers -------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))


def adamw(net, **options):
    first, rest = list(net.parameters())[:1], list(net.parameters())[1:]
    groups = [{"params": first, "lr": 0.3}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, **options)


def update(net, optimizer, n):
    for group in optimizer.param_groups:
        group["lr"] *= 0.9  # a schedule
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(n))
    net[0].requires_grad_(n > 1)  # parameters that have no gradient yet have no state
    optimizer.zero_grad()
    (net(x) ** 2).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_resumed_optimizer_goes_on_bit_for_bit(tmp_path, stop, options):
    whole = network()
    optimizer = adamw(whole, **options)
    for n in range(8):
        update(whole, optimizer, n)

    net = network()
    optimizer = adamw(net, **options)
    for n in range(stop):
        update(net, optimizer, n)
    keys = [name for name, _ in net.named_parameters()]
    flat = optimizer_tensors(optimizer, keys)
    save_checkpoint(tmp_path, 4, {"model": net.state_dict(), "optimizer": flat}, {}, keep=1)

    tensors, _ = load_checkpoint(latest_checkpoint(tmp_path))
    net = network()
    net.load_state_dict(tensors["model"])
    optimizer = adamw(net, **options)
    load_optimizer_tensors(optimizer, keys, tensors["optimizer"])
    again = optimizer_tensors(optimizer, keys)
    assert again.keys() == flat.keys() and all(torch.equal(again[k], flat[k]) for k in flat)
    before = {k: v.clone() for k, v in tensors["optimizer"].items()}
    for n in range(stop, 8):
        update(net, optimizer, n)
    for ours, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(v, tensors["optimizer"][k]) for k, v in before.items())  # not shared


def test_optimizer_state_of_another_model():
    net = network()
    optimizer = adamw(net)
    update(net, optimizer, 2)
    keys = [name for name, _ in net.named_parameters()]
    flat = optimizer_tensors(optimizer, keys)
    with pytest.raises(ValueError, match="2 names came for an optimiser of 3"):
        optimizer_tensors(optimizer, keys[:2])
    with pytest.raises(ValueError, match=r"other/exp_avg is \(3, 4\), but there is no such"):
        load_optimizer_tensors(
            adamw(net), keys, {"other/exp_avg": flat["0.weight/exp_avg"], **flat}
        )
    with pytest.raises(ValueError, match=r"0\.weight/exp_avg is \(3,\), but it is \(3, 4\) here"):
        load_optimizer_tensors(adamw(net), keys, {**flat, "0.weight/exp_avg": torch.zeros(3)})
    with pytest.raises(ValueError, match="had 2 groups of parameters, now 1"):
        load_optimizer_tensors(torch.optim.AdamW(net.parameters()), keys, flat)
    lbfgs = torch.optim.LBFGS(net.parameters())
    lbfgs.step(lambda: (net(torch.ones(1, 4)) ** 2).sum())
    with pytest.raises(ValueError, match="only tensors can be saved; use AdamW"):
        optimizer_tensors(lbfgs, keys)


# Settings ---------------------------------------------------------------------------------------


def settings(**training):
    return {
        "model": {"spec": "a", "size": [16, 16]},
        "training": {
            "iterations": 9,
            "betas": [0.9, 0.999],
            "guard": {"stop": False},
            **training,
        },
        "prompts": ["x"],
    }


def test_equal_settings_pass():
    check_same(settings(), settings())
    check_same(settings(), settings(betas=(0.9, 0.999)))  # JSON has no tuples
    free = settings(iterations=7, guard={"stop": True, "max_kl": 3.0}, loggers=["wandb"])
    check_same(settings(), free)
    check_same(free, settings())


def test_other_settings_are_named():
    other = {**settings(seed=3, betas=[0.9, 0.99]), "model": {"spec": "b", "size": [16, 16]}}
    with pytest.raises(ValueError) as found:
        check_same(settings(seed=2), other)
    assert str(found.value).splitlines()[1:] == [
        "  model.spec: 'a' in the checkpoint, 'b' now",
        "  training.betas: [0.9, 0.999] in the checkpoint, [0.9, 0.99] now",
        "  training.seed: 2 in the checkpoint, 3 now",
    ]
    with pytest.raises(ValueError, match="training.warmup: not set in the checkpoint, 5 now"):
        check_same(settings(), settings(warmup=5))
    with pytest.raises(ValueError, match="training.warmup: 5 in the checkpoint, not set now"):
        check_same(settings(warmup=5), settings())
    with pytest.raises(ValueError, match="training.iterations: 9 in the checkpoint, 7 now"):
        check_same(settings(), settings(iterations=7), may_differ=["training.iter", "model"])


def test_what_may_differ_exists():
    from dataclasses import fields

    from diffreward.finetuning.options import Training

    known = {f"training.{field.name}" for field in fields(Training)}
    assert set(MAY_DIFFER) <= known

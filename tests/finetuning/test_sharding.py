"""Networks shared out over two processes do what whole ones do in one, and take half the memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuning import run_sharded
from safetensors.torch import load_file
from torch import nn

from diffreward.finetuning import sharding
from diffreward.finetuning.team import Team

RUN = Path(run_sharded.__file__)
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each of two processes found, the folder of their runs, and what one process found."""
    folder = tmp_path_factory.mktemp("sharded")
    one = {}
    for name in run_sharded.RUNS:
        where = folder / f"one-{name}" if name in run_sharded.KEPT else None
        engine, result = run_sharded.run(name, where)
        one[name] = (engine, result, run_sharded.weights(engine))
    for name in run_sharded.KEPT:
        run_sharded.run(name, folder / f"go-{name}", iterations=1)
    port = str(30000 + os.getpid() % 1000)
    done = subprocess.run(  # processes that wait for each other would do so forever
        [*LAUNCH, port, str(RUN), str(folder)], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    two = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]
    return two, folder, one


def close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


@pytest.mark.parametrize("name", run_sharded.RUNS)
def test_two_processes_with_half_a_network_each_do_what_one_does(runs, name):
    two, folder, one = runs
    engine, result, weights = one[name]
    close(load_file(folder / f"{name}.safetensors"), weights, rtol=1e-4, atol=2e-6)
    start = {n: w.detach() for n, w in run_sharded.Tiny().denoiser.named_parameters()}
    if engine.training.method == "full":
        assert any((weights[n] - start[n]).abs().max() > 1e-5 for n in start)
    for found in two:
        for key in ("reward", "grad_norm"):  # the latter is of the sum over processes
            assert found[name][key] == pytest.approx([r[key] for r in result.metrics], rel=1e-4)
        after = result.after.scores[result.after.trained].tolist()
        assert found[name]["after"] == pytest.approx(after, rel=1e-4)


def test_each_process_keeps_half(runs):
    two, _, one = runs
    whole = run_sharded.bytes_of(run_sharded.Tiny().denoiser.parameters())
    most = whole / 2 + 2 * 32 * 4  # one row of `scale` cannot be halved
    for name, found in ((name, found[name]) for found in two for name in one):
        assert found["shared"]  # also after the last call: nothing is left over
        for part in ("base", "reference"):
            assert whole / 2 - 2 * 32 * 4 <= found[part] <= most, (name, part)
        if one[name][0].training.method == "full":
            assert found["state"] <= 2 * most  # AdamW's two moments


@pytest.mark.parametrize("name", run_sharded.KEPT)
def test_checkpoints_and_results_are_those_of_a_whole_network(runs, name):
    _, folder, _ = runs
    for file in ("final", "checkpoints/checkpoint-2"):
        a, b = folder / f"one-{name}" / file, folder / f"two-{name}" / file
        assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
        for path in a.glob("*.safetensors"):
            if path.name != "rng.safetensors":
                close(load_file(b / path.name), load_file(path), rtol=1e-3, atol=2e-6)
    # begun by one process, gone on with by two, and the other way round; and never interrupted
    straight, _ = run_sharded.run(name, iterations=3)
    expected = run_sharded.weights(straight)
    engine, result = run_sharded.run(name, folder / f"two-{name}", iterations=3, resume="latest")
    assert result.iterations == 3
    close(run_sharded.weights(engine), expected, rtol=1e-4, atol=5e-6)
    close(load_file(folder / f"go-{name}.safetensors"), expected, rtol=1e-4, atol=5e-6)


def test_a_signal_to_one_process_stops_all_in_the_rollout(runs):
    two, folder, _ = runs
    # in the first step of the second rollout; each process had begun one chain of it
    assert [found["stopped"] for found in two] == [["signal", 1, 5]] * 2
    assert (folder / "stopped" / "checkpoints" / "checkpoint-1").exists()


def test_a_pipeline_is_saved_whole_and_as_what_it_is(runs):
    from diffusers import DDPMPipeline

    _, folder, _ = runs
    found = DDPMPipeline.from_pretrained(folder / "pipeline").unet
    config = json.loads((folder / "pipeline" / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DModel"
    close(found.state_dict(), run_sharded.pipeline().unet.state_dict(), rtol=0, atol=0)


def test_blocks_are_the_entries_of_the_outermost_lists():
    inner = nn.Sequential(nn.Linear(1, 1), nn.ModuleList([nn.Linear(1, 1)]))
    net = nn.Module()
    net.first = nn.Linear(1, 1)
    net.blocks = nn.ModuleList([inner, nn.Identity(), nn.Linear(1, 1)])
    net.middle = nn.Module()
    net.middle.nested = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)]), nn.ModuleDict()])
    names = {module: name for name, module in net.named_modules()}
    found = [names[block] for block in sharding._blocks(net)]
    assert found == ["blocks.0", "blocks.2", "middle.nested.0.0"]


def test_one_process_has_nothing_to_share():
    with pytest.warns(UserWarning, match="there is one: it stays whole"):
        assert not Team(torch.device("cpu"), shard=True).shard


def test_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(sharding, "NEEDED", (99, 1))
    with pytest.raises(RuntimeError, match=r"needs torch 99\.1 or newer, and this is 2"):
        sharding.share_out(nn.Linear(1, 1), torch.device("cpu"))

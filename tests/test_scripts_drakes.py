"""The benchmark of DRAKES runs, and compares like with like."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))  # as when it is run
    try:
        spec = importlib.util.spec_from_file_location("bench_drakes", SCRIPTS / "bench_drakes.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


def test_bench_runs(bench, capsys):
    bench.main(["--tiny", "--no_peaks"])
    found = json.loads(capsys.readouterr().out)["dna"]
    assert found["update"]["relative difference of gradients"] < 1e-5
    saved = found["update"]["saved_mib"]
    assert saved[bench.CHECKPOINTED] < saved[bench.DEFAULT] < saved[bench.PLAIN]
    rates = found["sampling"]["T = 4, l = 20"]["sequences_per_second"]
    assert set(rates) == {"every call", "reused", "first hitting"} and min(rates.values()) > 0


def test_default_is_unbiased(bench):
    """Over the draws of early steps, the mean gradient is that of the published procedure."""
    case = bench.Case("dna_tiny", "gc_content", 1, 6, 2)
    work = bench.Update(case, "cpu")
    torch.nn.init.normal_(work.parameters[-1])  # far from the reference
    work.generators = lambda: None  # the same draws of the chain, whichever steps are chosen

    def gradient(chosen):
        algorithm = bench.DRAKES(steps=2, early=2)
        object.__setattr__(algorithm, "_with_kl", lambda *_: (chosen, 4 / 2))
        torch.manual_seed(3)
        loss, _, _ = algorithm.loss(
            work.policy, work.condition, None,
            lambda samples: bench.evaluate(work.reward, samples), work.reference,
        )  # fmt: skip
        return work.gradient(loss)

    pairs = [(i, j) for i in range(4) for j in range(i)]
    each = []
    for pair in pairs:
        chosen = torch.zeros(1, 4, dtype=torch.bool)
        chosen[0, list(pair)] = True
        each.append(gradient(chosen))
    torch.manual_seed(3)
    whole = work.plain()
    assert max((g - whole).norm() for g in each) > 1e-3 * whole.norm()
    torch.testing.assert_close(torch.stack(each).mean(0), whole, rtol=1e-3, atol=1e-7)

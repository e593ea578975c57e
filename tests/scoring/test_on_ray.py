"""Scoring on a local Ray cluster: the rows of the local engine, whatever comes back first."""

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from picture_files import folder_of

from diffreward.rewards import RewardInfo
from diffreward.rewards.towers import Preprocess
from diffreward.samples import Samples
from diffreward.scoring import Inputs, Scorer, engine, on_ray, planner, score
from diffreward.scoring.decode import Decoder
from diffreward.scoring.writer import Parts


class Deadly(Decoder):
    """Dies of one file, as a decoder in C may."""

    def _read(self, item):
        if item.file.endswith("00003.png"):
            with open(os.path.join(os.path.dirname(item.file), "..", "..", "deaths"), "a") as file:
                file.write(".")
            os._exit(11)
        return super()._read(item)


class Brittle(Scorer):
    """Decodes with `Deadly`."""

    def decoder(self):
        made = super().decoder()
        return Deadly(made.modality, made.preprocess, made.raw)


class Suicidal(Scorer):
    """Arrives nowhere alive."""

    def __setstate__(self, state):
        os._exit(11)


class Prepared:
    """Mean of resized pixels; fails where it is told to."""

    preprocess = Preprocess((16, 16), (0.0,) * 3, (1.0,) * 3)
    info = RewardInfo("prepared", modality="image")

    def __init__(self, fail=lambda images: None):
        self.fail = fail

    def __call__(self, samples):
        return self.score_prepared(self.preprocess(samples.data))

    def score_prepared(self, prepared, prompts=None):
        self.fail(prepared)
        return prepared.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


OPTIONS = {"batch_size": 4, "shard_rows": 8}


@pytest.mark.slow
def test_the_rows_are_those_of_the_local_engine(here, ray, monkeypatch):
    folder_of(here / "f", 30, broken=6)
    inputs, rewards = ["f", "f"], [Prepared(), "colorfulness", "clip_score"]
    options = {**OPTIONS, "prompts": "a red heart"}
    local = score(inputs, rewards, out="local.parquet", num_workers=0, **options)
    assert len(local.errors) == 12

    scored = on_ray.Cluster.scored
    monkeypatch.setattr(  # the last batch comes first
        on_ray.Cluster, "scored", lambda *args: (each for each in [*scored(*args)][::-1])
    )
    found = score(inputs, rewards, out="ray.parquet", engine="ray", num_actors=2, **options)
    assert found.computed == local.computed == 30
    columns = ["id", "path", "prompt", "error", "notes"]
    assert found.table.select(columns).equals(local.table.select(columns))
    for name in ("prepared", "colorfulness", "clip_score"):
        np.testing.assert_allclose(found[name], local[name], atol=2e-6, rtol=1e-5)
    assert pq.read_table("ray.parquet").equals(found.table)
    assert sorted(os.listdir()) == ["f", "local.parquet", "ray.parquet"]
    assert ray.is_initialized()  # not its own


@pytest.mark.slow
@pytest.mark.parametrize("engines", [("ray", "local"), ("local", "ray")])
def test_either_engine_goes_on_where_the_other_was_stopped(here, ray, engines, monkeypatch):
    folder_of(here / "f", 30, broken=6)
    whole = score("f", Prepared(), **OPTIONS)
    first, second = engines
    add = Parts.add

    def stop(self, keys, rows):
        add(self, keys, rows)
        if len(list(Path("o.parquet.parts").glob("*.parquet"))) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            score("f", Prepared(), out="o.parquet", engine=first, **OPTIONS)
    found = score("f", Prepared(), out="o.parquet", engine=second, **OPTIONS)
    assert found.computed == 30 - 16
    np.testing.assert_allclose(found["prepared"], whole["prepared"], atol=1e-6)
    assert found.table["error"] == whole.table["error"]


@pytest.mark.slow
def test_tasks_that_decode_before_actors_score(here, ray):
    """What a cluster with GPUs does: decoding is a stage of its own."""
    folder_of(here / "f", 12, broken=3)
    local = score("f", [Prepared(), "colorfulness"], **OPTIONS)
    items = [on_ray._sent(item) for item in Inputs(["f"])]
    scorer = Scorer([Prepared(), "colorfulness"])
    tables = [on_ray._table(n, (items[n : n + 4], None)) for n in (0, 4, 8)]
    data = ray.data.from_arrow(tables)
    whole = {"batch_size": 1, "batch_format": "pyarrow"}
    data = data.map_batches(on_ray._decode, fn_args=(scorer.decoder(),), num_cpus=1, **whole)
    actor, rows = on_ray._Actor(scorer), {}
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        rows.update(on_ray._unpack(actor(table)))
    values = [row.get("0", np.nan) for n in (0, 4, 8) for row in rows[n]]
    np.testing.assert_allclose(values, local["prepared"], atol=1e-6)


@pytest.mark.slow
def test_what_is_no_samples_fault_stops_the_run(here, ray):
    folder_of(here / "f", 4)
    with pytest.raises(Exception, match="no_such_module"):
        score("f", Prepared(lambda images: __import__("no_such_module")), engine="ray", **OPTIONS)


@pytest.mark.slow
def test_a_deadly_file_stops_the_run_and_the_local_engine_goes_on(here, ray, monkeypatch):
    folder_of(here / "f", 12)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Scorer", Brittle)
        with pytest.raises(RuntimeError, match=r"died again and again .* engine='local' finds it"):
            score("f", Prepared(), out="o.parquet", engine="ray", num_actors=1, **OPTIONS)
        assert 1 <= os.path.getsize("deaths") <= 3
        found = score("f", Prepared(), out="o.parquet", num_workers=1, **OPTIONS)
    ((name, error),) = found.errors
    assert name.endswith("00003.png") and "kills the process" in error and len(found) == 12


@pytest.mark.slow
def test_tasks_that_die_are_not_tried_for_ever(here, ray, monkeypatch):
    """Decoding as it is where there are GPUs."""
    folder_of(here / "f", 4)
    task = planner.Task([*Inputs(["f"])], [bytes(16)] * 4, 0, 0, 1)
    scorer = Brittle(Prepared())
    cluster = on_ray.Cluster(1)
    monkeypatch.setattr(on_ray, "_needs", lambda scorer: {"num_cpus": 1})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1})
    scorer.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match=r"died again and again .* engine='local' finds it"):
        list(cluster.scored(scorer, iter([task]), False))
    assert os.path.getsize("deaths") <= 3


@pytest.mark.slow
def test_a_batch_size_is_taken_where_the_search_for_it_dies(here, ray):
    with on_ray.Cluster(1) as cluster, pytest.warns(UserWarning, match="32 is taken"):
        assert cluster.find_batch_size(Suicidal(Prepared()), []) == 32


def test_ray_is_asked_for_by_name(here, monkeypatch):
    folder_of(here / "f", 2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "diffreward\[ray\]"'):
        score("f", "colorfulness", engine="ray")


def test_refused(here, monkeypatch):
    with pytest.raises(ValueError, match="but samples in memory came"):
        score(Samples(torch.rand(2, 3, 8, 8), "image"), "colorfulness", engine="ray")
    with pytest.raises(ValueError, match="num_actors must be at least 1, but 0 came"):
        score("f", "colorfulness", engine="ray", num_actors=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="but 2 processes"):
        score("f", "colorfulness", engine="ray")

import json
import math

import pytest
import torch

from diffreward import files


def test_run_folders_are_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.time, "strftime", lambda form: form.split("%")[0] + "now")
    found = []
    for _ in range(3):
        with files.run_folder(None, "steer") as folder:
            found.append(folder)
            (folder / "file").touch()
    assert [f.as_posix() for f in found] == [
        "runs/steer-now", "runs/steer-now-2", "runs/steer-now-3"
    ]  # fmt: skip
    with (
        pytest.raises(FileExistsError, match="choose another --output"),
        files.run_folder(found[0], "steer"),
    ):
        pass


def test_failed_run_leaves_what_was_written_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), files.run_folder(None, "steer"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), files.run_folder("kept", "steer") as folder:
        files.write_text(folder / "a.txt", "a")
        _ = 1 / 0
    assert (tmp_path / "kept" / "a.txt").read_text() == "a"


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")

    def half(beside):
        beside.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_jsonl_is_strict_json(tmp_path):
    rows = [{"a": math.nan, "b": -math.inf, "c": torch.tensor(1.5), "d": "é"}, {"e": (1, [None])}]
    files.write_jsonl(tmp_path / "x.jsonl", rows)
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()

    def refuse(constant):
        raise AssertionError(constant)

    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert found == [{"a": None, "b": "-inf", "c": 1.5, "d": "é"}, {"e": [1, [None]]}]


def test_environment_names_versions_but_no_machine():
    found = files.environment("cpu", seed=3)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["device"] == "cpu" and found["seed"] == 3
    assert set(found) == {
        "diffreward", "python", "platform", "device", "device_name", "date", "packages", "seed"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.500"), (-12.3456, "-12.346"), (0.1, "0.100"), (0.0, "0.000"), (math.nan, "nan"),
        (-0.002538, "-0.00254"), (0.04, "0.04"), (-math.inf, "-inf"), (3e-7, "3e-07"),
    ],
)  # fmt: skip
def test_small_numbers_keep_three_digits(value, shown):
    assert files.short(value) == shown


def test_table():
    shown = files.table(["name", "a"], [["x", "1.0"], ["longer", "-10.0"]])
    assert shown.splitlines() == ["name         a", "x          1.0", "longer   -10.0"]
    shown = files.table(["name", "ab"], [["x", "1"]], markdown=True)
    assert shown.splitlines() == ["| name | ab |", "| ---- | -: |", "| x    |  1 |"]

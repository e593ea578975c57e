"""Embedded assets are found in a checkout and in an installed wheel, and nowhere else."""

import pytest

from diffreward import _assets


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A place where diffreward could be installed."""
    package = tmp_path / "diffreward"
    package.mkdir()
    monkeypatch.setattr(_assets.resources, "files", lambda name: tmp_path / name)
    return package


def test_checkout(package):
    (package.parent / "pyproject.toml").touch()
    (package.parent / "assets" / "thing").mkdir(parents=True)
    assert _assets.asset_path("thing") == package.parent / "assets" / "thing"


def test_wheel(package):
    (package / "assets").mkdir()
    (package / "assets" / "file.json").touch()
    assert _assets.asset_path("file.json") == package / "assets" / "file.json"


def test_a_neighbours_assets_are_not_ours(package):
    (package.parent / "assets" / "thing").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no embedded asset 'thing'.* has none"):
        _assets.asset_path("thing")


def test_missing_asset_lists_those_there_are(package):
    for name in ("clip_guide", "clip_judge"):
        (package / "assets" / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"'clip_gide'; .* has clip_guide, clip_judge"):
        _assets.asset_path("clip_gide")

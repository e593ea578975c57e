"""The package as a whole: light to import, honest about its names and version."""

import importlib
import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import diffreward

ROOT = Path(__file__).parent.parent


def modules_after(code: str) -> set[str]:
    code += "; import sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import diffreward",
        "import diffreward.rewards, diffreward.steering, diffreward.policies, diffreward.policy",
        "import diffreward as dr; dr.steer, dr.load_policy, dr.available_rewards()",
        "import diffreward as dr; dr.Training, dr.make_algorithm('prdp'), dr.finetune",
    ],
)
def test_importing_loads_no_model_library(code):
    assert not modules_after(code) & {"diffusers", "transformers", "open_clip"}


def test_importing_the_package_alone_does_not_even_load_torch():
    assert "torch" not in modules_after("import diffreward")


def test_options_of_finetuning_do_not_load_torch():
    assert "torch" not in modules_after(
        "import diffreward as dr; dr.Training(), dr.LoRA(), dr.Guard()"
    )


def test_every_public_name_is_there():
    for name in diffreward.__all__:
        assert getattr(diffreward, name) is not None
    assert set(diffreward.__all__) <= set(dir(diffreward))
    with pytest.raises(AttributeError, match="no attribute 'stear'"):
        _ = diffreward.stear


def test_every_module_imports_and_says_what_it_is():
    for module in pkgutil.walk_packages(diffreward.__path__, "diffreward."):
        if module.name != "diffreward.__main__":
            assert importlib.import_module(module.name).__doc__, module.name


def test_version_is_stated_once():
    assert diffreward.__version__ == metadata.version("diffreward")


def test_no_file_is_unpickled():
    for path in (ROOT / "diffreward").rglob("*.py"):
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, path
        if path.name == "on_ray.py":  # what one of our processes hands to another
            continue
        assert not re.search(r"pickle\.loads?\(|Unpickler\(|allow_pickle=True", path.read_text()), (
            path
        )

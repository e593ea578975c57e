"""Which loader a specification goes to, and with which options."""

import shutil

import pytest
import tiny
import torch

from diffreward._assets import asset_path
from diffreward.config import ModelConfig
from diffreward.networks.dna import DNAConvNet
from diffreward.policies import load_policy
from diffreward.policies.dna import DNAPolicy
from diffreward.policies.pipelines import StableDiffusionPolicy
from diffreward.policies.protein import ProteinPolicy


def test_sequences_are_told_from_pipelines(tmp_path):
    DNAConvNet(channels=8, rounds=1, dilations=(1,)).save_pretrained(tmp_path / "net")
    dna = load_policy(tmp_path / "net", length=12, num_steps=5)
    assert isinstance(dna, DNAPolicy) and (dna.length, dna.num_steps) == (12, 5)
    shutil.copy(asset_path("structures/1ubi.pdb"), tmp_path / "mine.pdb")
    for spec in ("embedded:protein", str(tmp_path / "mine.pdb")):
        protein = load_policy(spec, num_steps=3, omit="C")
        assert isinstance(protein, ProteinPolicy) and protein.num_steps == 3
        assert protein.latent_shape(protein.encode([""])) == (76,)
    assert isinstance(load_policy(tiny.sd(), num_steps=2), StableDiffusionPolicy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"architectures": ["BertForMaskedLM"]}', "in it lacks files"),
        ('{"auto_map": {"AutoModelForMaskedLM": "a--b.C"}}', "in it lacks files"),
        ('{"architectures": ["BertModel"]}', "no model_index.json in it"),
        ('{"architectures": null}', "no model_index.json in it"),
        ("[]", "no model_index.json in it"),
    ],
)
def test_text_is_told_from_pipelines(config, message, tmp_path, monkeypatch):
    def load(spec, *, length=None):
        raise FileNotFoundError(f"{length} {spec} in it lacks files")

    monkeypatch.setattr("diffreward.policies.text.load_text", load)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(FileNotFoundError, match=message):
        load_policy(tmp_path)
    with pytest.raises(FileNotFoundError, match="^3 owner/name in it lacks"):
        load_policy("text:owner/name", length=3)


def test_options_of_all_and_of_some(tmp_path):
    DNAConvNet(channels=8, rounds=1, dilations=(1,)).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, guidance_scale=1.0, height=None, dtype="bfloat16", tau=0.5)
    assert policy.dtype == torch.bfloat16 and policy.tau == 0.5
    with pytest.raises(ValueError, match="no option 'height' of .*; there is num_steps, length"):
        load_policy(tmp_path, height=64)
    with pytest.raises(ValueError, match="no option 'lenght' of .*; did you mean 'length'"):
        load_policy(tmp_path, lenght=64)
    with pytest.raises(ValueError, match="no option 'guidance_scale' of embedded:protein"):
        load_policy("embedded:protein", guidance_scale=3.0)
    with pytest.raises(ValueError, match="no option 'guidance' of StableDiffusionPip"):
        load_policy(tiny.sd(), guidance=2.0)
    with pytest.raises(ValueError, match="no embedded model 'dnaa'; did you mean 'embedded:dna'"):
        load_policy("embedded:dnaa")
    with pytest.raises(ValueError, match="dtype must be float32"):
        load_policy(tmp_path, dtype="single")


def test_config_passes_on_what_was_said():
    assert ModelConfig().arguments() == {}
    config = ModelConfig("embedded:protein", num_steps=8, options={"structure": "1ake.pdb"})
    assert config.arguments() == {"num_steps": 8, "structure": "1ake.pdb"}
    assert ModelConfig(guidance_scale=1.0, eta=0.5).arguments() == {
        "guidance_scale": 1.0,
        "eta": 0.5,
    }

"""Samples: shapes per modality, selection, concatenation."""

import pytest
import torch

from diffreward.samples import ALPHABETS, Samples, to_strings, to_tokens


def test_take_cat_and_len():
    a = Samples(torch.rand(3, 3, 4, 4), "image", ["x", "y", "z"], {"mask": torch.arange(3)})
    b = a.take([2, 0, 2])
    assert b.prompts == ["z", "x", "z"] and b.context["mask"].tolist() == [2, 0, 2]
    assert torch.equal(b.data, a.data[[2, 0, 2]])
    assert len(a.take([])) == 0
    c = Samples.cat([a, b])
    assert len(c) == 6 and torch.equal(c.data[3:], b.data) and c.prompts[3:] == b.prompts


def test_text_is_a_list():
    a = Samples(["one", "two"], "text", context={"ids": ["p", "q"]})
    assert a.take(torch.tensor([1])).data == ["two"] and a.take([1]).context == {"ids": ["q"]}
    assert Samples.cat([a, a]).data == ["one", "two", "one", "two"]
    assert a.to("cpu").data == a.data and a.detach().data == a.data


def test_detach_and_to():
    data = torch.rand(1, 3, 2, 2, requires_grad=True)
    a = Samples(data, "image", ["x"])
    assert a.data.requires_grad and not a.detach().data.requires_grad
    assert a.to("cpu").data.requires_grad


@pytest.mark.parametrize(
    "data, modality, words",
    [
        (torch.rand(2, 4, 4), "image", r"\(b, 3, h, w\), but \(2, 4, 4\) came"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "image", "divide uint8 images by 255"),
    ],
)
def test_bad_images(data, modality, words):
    with pytest.raises(ValueError, match=words):
        Samples(data, modality)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="prompts has 1 entries for 2 samples"):
        Samples(torch.zeros(2, 5, dtype=torch.long), "dna", ["a"])
    with pytest.raises(ValueError, match="depth has 3 entries for 2 samples"):
        Samples(torch.zeros(2, 5), "dna", context={"depth": torch.zeros(3)})


def test_cat_refuses_a_mixture():
    a, b = Samples(torch.zeros(1, 2), "dna", ["x"]), Samples(torch.zeros(1, 2), "protein", ["x"])
    with pytest.raises(ValueError, match="'dna' with 'protein'"):
        Samples.cat([a, b])
    with pytest.raises(ValueError, match="only some have prompts"):
        Samples.cat([a, Samples(torch.zeros(1, 2), "dna")])
    with pytest.raises(ValueError, match="at least one"):
        Samples.cat([])


def test_letters_and_tokens():
    assert to_tokens(" acGT", "dna").tolist() == [0, 1, 2, 3]
    assert to_tokens(ALPHABETS["protein"], "protein").tolist() == list(range(20))
    assert to_strings(torch.tensor([[0, 1], [3, 3]]), "rna") == ["AC", "UU"]
    relaxed = torch.tensor([[[0.1, 0.2, 0.6, 0.1], [0.7, 0.1, 0.1, 0.1]]])
    assert to_strings(relaxed, "dna") == ["GA"]
    with pytest.raises(ValueError, match="letter 2 is 'N'; dna has ACGT"):
        to_tokens("AN", "dna")
    with pytest.raises(ValueError, match="empty"):
        to_tokens(" ", "dna")
    with pytest.raises(ValueError, match="token 2 of sequence 1 is 4; dna has ACGT"):
        to_strings(torch.tensor([[0, 4]]), "dna")

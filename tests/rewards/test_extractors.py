"""What all extractors share: the registry, callables as extractors, networks and their maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffreward.rewards.control import available_extractors, make_extractor, register_extractor
from diffreward.rewards.extractors import REGISTRY, Extractor, Network


@pytest.fixture
def images():
    return torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))


class Green(Extractor):
    name = "green"

    def __call__(self, images):
        return images[:, 1:2]


def test_specs_name_an_extractor_in_every_way(images):
    names = ["canny", "colour", "depth", "edges", "lineart", "luma", "pose", "segmentation"]
    assert set(names) <= set(available_extractors())
    assert all(available_extractors()[name].description for name in names)
    for spec in ({"name": "luma", "cells": 2}, {"luma": {"cells": 2}}, {"luma": 2}):
        assert make_extractor(spec).cells == 2
    assert make_extractor("Luma", cells=3).cells == 3
    green = Green()
    assert make_extractor(green) is green
    torch.testing.assert_close(green.control(images), images[:, 1:2].expand(-1, 3, -1, -1))
    torch.testing.assert_close(green.target(green.control(images)), images[:, 1:2])


def test_an_object_with_the_contract_is_an_extractor_as_it_is():
    class Own:
        name, channels, differentiable, probabilistic = "own", 1, True, False
        control = target = loss = divergence = staticmethod(lambda *args: None)

        def __call__(self, images):
            return images

    own = Own()
    assert make_extractor(own) is own


def test_a_callable_is_an_extractor_of_values(images):
    def blue(images):
        return images[:, 2:]

    extractor = make_extractor(blue)
    assert (extractor.name, extractor.channels, extractor.probabilistic) == ("blue", 1, False)
    other = torch.rand(2, 1, 12, 10)
    squared = (images[:, 2] - other[:, 0]) ** 2
    torch.testing.assert_close(extractor.loss(extractor(images), other), squared)
    difference = (images[:, 2] - other[:, 0]).abs()
    torch.testing.assert_close(extractor.divergence(extractor(images), other), difference)

    def negative(images):
        return 1 - images

    negative.channels = 3
    torch.testing.assert_close(make_extractor(negative).control(images), 1 - images)


def test_one_can_be_registered(images):
    try:

        @register_extractor("red test")
        class Red(Extractor):
            """The red channel."""

            def __call__(self, images):
                return images[:, :1]

        assert available_extractors()["red test"].description == "The red channel."
        assert make_extractor("red-test").name == "red test"
        with pytest.raises(ValueError, match="already registered"):
            register_extractor("Red_Test")(Red)
    finally:
        REGISTRY.table.pop("redtest")


def test_a_wrong_spec_is_named():
    with pytest.raises(ValueError, match=r"no extractor 'edgs'; did you mean: edges"):
        make_extractor("edgs")
    with pytest.raises(ValueError, match=r"no option 'cels' \(did you mean 'cells'\?\)"):
        make_extractor({"luma": {"cels": 3}})
    with pytest.raises(ValueError, match="needs the option model"):
        make_extractor("depth")
    with pytest.raises(TypeError, match=r"pictures -> .* but <class .*Green'> came"):
        make_extractor(Green)
    with pytest.raises(ValueError, match="'green' is already built and takes no options"):
        make_extractor(Green(), distance="l1")
    with pytest.raises(ValueError, match="'mse' or 'l1', but 'l2' came"):
        make_extractor("edges", distance="l2")

    def two(images):
        return images[:, :2]

    two.channels = 2
    with pytest.raises(ValueError, match="channels of extractor 'two' are 1 or 3, but 2 came"):
        make_extractor(two)


def test_values_of_other_shapes_are_not_compared(images):
    with pytest.raises(
        ValueError, match=r"gave \(2, 1, 12, 10\), but its target is \(2, 1, 6, 5\)"
    ):
        Green().loss(Green()(images), torch.zeros(2, 1, 6, 5))


def test_a_network_is_frozen_and_its_map_is_brought_to_the_pictures_size(images):
    module = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Dropout(0.5)).half().train()
    network = Network(module, "toy")
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    found = network(images)
    small = module(images.half()).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, F.interpolate(small, size=(12, 10), mode="bilinear"), atol=2e-3, rtol=2e-3
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda found: {"out": found},
        lambda found: type("Output", (), {"out": found})(),
        lambda found: found[:, 0],
    ],
)
def test_a_network_may_give_its_map_in_several_ways(images, wrap):
    found = Network(lambda images: wrap(images[:, :1]), "toy", 1)(images)
    torch.testing.assert_close(found, images[:, :1])


def test_a_network_sees_pictures_at_its_size_scaled_as_asked(images):
    seen = []

    def model(images):
        seen.append(images)
        return images[:, :1]

    network = Network(model, "toy", 1, size=(24, 30))
    network.mean, network.std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    assert network(images).shape == (2, 1, 12, 10)
    (x,) = seen
    larger = F.interpolate(images, size=(24, 30), mode="bilinear")
    for channel, (mean, std) in enumerate([(0.5, 0.1), (0.4, 0.2), (0.3, 0.3)]):
        torch.testing.assert_close(x[:, channel], (larger[:, channel] - mean) / std)


def test_a_wrong_network_is_named(images):
    with pytest.raises(ValueError, match="model of extractor 'edges' is a module or a callable"):
        make_extractor("edges", model="hed")
    with pytest.raises(TypeError, match="is a name, a module or a callable, but 3 came"):
        Network(3, "toy")
    with pytest.raises(ValueError, match=r"size .* is \(height, width\) or 'picture', but 'big'"):
        make_extractor("depth", model=lambda images: images, size="big")
    for model, match in [
        (lambda images: images, r"gave torch.float32 \(2, 3, 12, 10\) for 2 .* \(2, 1, h, w\)"),
        (lambda images: images[:1, :1], r"gave torch.float32 \(1, 1, 12, 10\)"),
        (lambda images: (255 * images[:, :1]).to(torch.uint8), "gave torch.uint8"),
        (lambda images: {"edges": images}, "gave None for 2 pictures"),
    ]:
        with pytest.raises(ValueError, match=match):
            make_extractor("edges", model=model)(images)

"""Every encoder kind x features x mapper runs or is refused when the config is read (S13 to S16)."""

from __future__ import annotations

import itertools

import pytest
import torch

from git_model.architecture import MAPPER_FEATURES, MapperConfig
from git_model.config import Config
from git_model.errors import UserError
from git_model.models.mapper import MAPPERS, build_mapper
from git_model.schema import from_dict

WIDTHS = {
    ("RN50", "pooled"): (1024, 1),
    ("RN50", "grid"): (2048, 49),
    ("ViT", "pooled"): (512, 1),
    ("ViT", "grid"): (768, 49),
}
E = 48


def test_one_table_of_names() -> None:
    assert set(MAPPERS) == set(MAPPER_FEATURES)


@pytest.mark.parametrize(("encoder", "mapper"), itertools.product(WIDTHS, MAPPERS))
def test_every_combination_runs_or_is_refused(encoder: tuple[str, str], mapper: str) -> None:
    features = encoder[1]
    values = {"vision": {"features": features}, "mapper": {"type": mapper, "depth": 1}}
    if features not in MAPPER_FEATURES[mapper]:
        with pytest.raises(UserError, match="choose") as refusal:
            from_dict(Config, values)
        assert features in str(refusal.value)
        return
    config = from_dict(Config, values)
    dim, num_in = WIDTHS[encoder]
    if mapper == "none":
        with pytest.raises(UserError, match="linear"):
            build_mapper(config.mapper, dim, E, num_in)
        dim = E
    built = build_mapper(config.mapper, dim, E, num_in)
    tokens = built(torch.randn(2, num_in, dim))
    assert tokens.shape == (2, built.num_tokens, E)


@pytest.mark.parametrize("mapper", MAPPERS)
@torch.no_grad()
def test_images_never_see_each_other(mapper: str) -> None:
    features = MAPPER_FEATURES[mapper][-1]
    num_in = 1 if features == "pooled" else 4
    built = build_mapper(MapperConfig(type=mapper, depth=2), E, E, num_in).eval()
    images = torch.randn(3, num_in, E)
    changed = images.clone()
    changed[1] += torch.randn(num_in, E)
    moved = (built(changed) - built(images)).abs().amax(dim=(1, 2))
    assert moved[0] == moved[2] == 0
    assert moved[1] > 0


def test_mlp_has_the_originals_shape() -> None:
    net = build_mapper(MapperConfig(type="mlp"), 512, 1280, 1).net
    shapes = [tuple(p.shape) for p in net.parameters()]
    assert shapes == [(3200, 512), (3200,), (6400, 3200), (6400,)], "D -> 5E/2 -> 5E"
    assert isinstance(net[1], torch.nn.Tanh)
    linear, norm = build_mapper(MapperConfig(type="linearLn"), 768, 1280, 49).net
    assert tuple(linear.weight.shape) == (1280, 768)
    assert tuple(norm.weight.shape) == (1280,)


def test_the_transformers_constants_are_trained_and_projected() -> None:
    mapper = build_mapper(MapperConfig(type="transformer", tokens=10, depth=2), 512, 768, 1)
    assert mapper.num_tokens == 10
    mapper(torch.randn(2, 1, 512)).sum().backward()
    assert mapper.constants.grad is not None
    assert mapper(torch.randn(2, 1, 512)).shape == (2, 10, 768)


def test_grid_tells_cells_apart() -> None:
    mapper = build_mapper(MapperConfig(type="grid"), 64, E, 9)
    same = mapper(torch.ones(1, 9, 64))
    assert (same[0, 0] - same[0, 1]).abs().max() > 0

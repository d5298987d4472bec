"""The ensemble of sources fuses: every source counts, nothing of another row; the published one fails all of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from git_model.errors import UserError
from git_model.models.regressor import EnsembleRegressor, PublishedEnsemble, cosine_loss, load_published

WIDTHS = {"clip": 12, "convnext": 20, "text": 8}
PUBLISHED = (512, 768, 384)


def features(rows: int, widths: Any = (12, 20, 8), seed: int = 0) -> list[Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=dice) for width in widths]


@pytest.fixture
def model() -> EnsembleRegressor:
    torch.manual_seed(0)
    return EnsembleRegressor(WIDTHS, out=10, width=32, depth=2, heads=4).eval()


def test_a_row_does_not_depend_on_the_others(model: EnsembleRegressor) -> None:
    given = features(6)
    with torch.no_grad():
        together = model.vectors(given)
        alone = torch.cat([model.vectors([x[i : i + 1] for x in given]) for i in range(6)])
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        shuffled = model.vectors([x[order] for x in given])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(6))


def test_every_source_counts_and_learns(model: EnsembleRegressor) -> None:
    given = features(6)
    model.train()
    wanted = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    cosine_loss(model.vectors(given), wanted).backward()
    for number, projection in enumerate(model.fusion.projections):
        assert projection.weight.grad.abs().sum() > 0, list(WIDTHS)[number]  # type: ignore[union-attr]
    assert model.fusion.sources.grad is not None
    assert (model.fusion.sources.grad.abs().sum(dim=1) > 0).all()
    model.eval()
    with torch.no_grad():
        before = model.vectors(given)
        for number in range(3):
            turned = [x.roll(1, 0) if i == number else x for i, x in enumerate(given)]
            assert (model.vectors(turned) - before).abs().max() > 1e-3, list(WIDTHS)[number]
        swapped = EnsembleRegressor({"a": 12, "b": 12}, out=10, width=32, depth=2, heads=4).eval()
        one, two = features(3, (12, 12))
        assert (swapped.vectors([one, two]) - swapped.vectors([two, one])).abs().max() > 1e-3, (
            "which source it is counts"
        )


def test_a_missing_source_has_no_effect(model: EnsembleRegressor) -> None:
    given, missing = features(4), torch.zeros(4, 3, dtype=torch.bool)
    missing[1, 2] = missing[3, 0] = missing[3, 1] = True
    other = [x.clone() for x in given]
    other[2][1] = float("nan")
    other[0][3], other[1][3] = 1e9, 0.0
    with torch.no_grad():
        torch.testing.assert_close(model.vectors(given, missing), model.vectors(other, missing))
        full = model.vectors(given)
        masked = model.vectors(given, missing)
    torch.testing.assert_close(masked[[0, 2]], full[[0, 2]], atol=1e-5, rtol=0)
    assert (masked[1] - full[1]).abs().max() > 1e-3


def test_it_learns_what_takes_all_sources() -> None:
    """The answer is a sum of what each source tells of it."""
    torch.manual_seed(0)
    given = features(256)
    maps = features(3, (10,) * 20, seed=5)
    wanted = torch.stack([x @ torch.stack(maps)[: x.shape[1], i] for i, x in enumerate(given)]).sum(0)
    model = EnsembleRegressor(WIDTHS, out=10, width=32, depth=1, heads=4, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = cosine_loss(model.vectors([x[:200] for x in given]), wanted[:200])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.eval()
        held = 1 - float(cosine_loss(model.vectors([x[200:] for x in given]), wanted[200:]))
        without = []
        for number in range(3):
            turned = [x[200:].roll(1, 0) if i == number else x[200:] for i, x in enumerate(given)]
            without.append(1 - float(cosine_loss(model.vectors(turned), wanted[200:])))
    assert held > 0.7
    assert max(without) < held - 0.05


# ------------------------------------------------------------------------------------------------- the published one
def test_the_published_one_fails_all_of_it() -> None:
    torch.manual_seed(0)
    faulty, given = PublishedEnsemble().eval(), features(6, PUBLISHED)
    assert sum(p.numel() for p in faulty.parameters()) == 13_660_032
    with torch.no_grad():
        together = faulty(given)
        alone = torch.cat([faulty([x[i : i + 1] for x in given]) for i in range(6)])
        assert (together - alone).abs().max() > 1e-2, "the answer depends on the other rows"
        for number in (1, 2):
            turned = [x.roll(1, 0) if i == number else x for i, x in enumerate(given)]
            torch.testing.assert_close(faulty(turned), together, msg="the source has no effect")
    cosine_loss(faulty(given), torch.randn(6, 384)).backward()
    assert faulty.linear2.weight.grad is None or faulty.linear2.weight.grad.abs().max() == 0
    right = PublishedEnsemble(fused=True).eval()
    with torch.no_grad():
        assert (right([given[0], given[1].roll(1, 0), given[2]]) - right(given)).abs().max() > 1e-3


def test_its_checkpoints_load(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    saved, given = PublishedEnsemble().eval(), features(2, PUBLISHED)
    with caplog.at_level(logging.WARNING):
        loaded = load_published({f"model.{name}": value for name, value in saved.state_dict().items()})
    assert "the first alone has an effect" in caplog.text
    with torch.no_grad():
        assert (loaded(given) == saved(given)).all()
    state = saved.state_dict()
    state.pop("final.weight")
    with pytest.raises(UserError, match=r"no weights of the published ensemble: final\.weight"):
        load_published(state)


def test_what_cannot_be() -> None:
    with pytest.raises(UserError, match="at least one source"):
        EnsembleRegressor({})
    with pytest.raises(UserError, match="width 30 cannot be shared by 8 heads"):
        EnsembleRegressor(WIDTHS, width=30)
    with pytest.raises(ValueError, match="2 sources; wanted clip, convnext, text"):
        EnsembleRegressor(WIDTHS, width=32).vectors(features(1)[:2])

"""Muon: torch's own as the oracle, convolutions as matrices, and who gets which step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config, git_model
from torch import nn

from git_model.errors import UserError
from git_model.muon import Muon, orthogonal
from git_model.optimizer import parameter_groups


def matrices(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    """Random parameters."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def group(parameters: list[nn.Parameter], muon: bool = True, lr: float = 0.01) -> dict[str, Any]:
    """One parameter group."""
    return {"params": parameters, "lr": lr, "weight_decay": 0.1, "muon": muon}


@pytest.mark.parametrize("shape", [(3, 40, 100), (2, 100, 40), (1, 16, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_five_steps_are_torchs() -> None:
    shapes = ((64, 32), (64, 32), (32, 48))
    ours, theirs = matrices(*shapes), matrices(*shapes)
    one = Muon([group(ours)], lr=1, betas=(0.9, 0.98))
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    for p, q, start in zip(ours, theirs, matrices(*shapes), strict=True):
        moved = (q - start).norm()
        assert (p - q).norm() < 0.02 * moved  # torch's iteration is in bfloat16


def test_a_convolution_is_a_matrix_and_the_rest_is_adamw() -> None:
    flat, kernel = matrices((8, 36)), [nn.Parameter(matrices((8, 36))[0].detach().view(8, 4, 3, 3))]
    bias, reference = matrices((8,)), matrices((8,))
    both = Muon([group(kernel), group(bias, muon=False)], lr=1, betas=(0.9, 0.98))
    alone = Muon([group(flat)], lr=1, betas=(0.9, 0.98))
    adam = torch.optim.AdamW(reference, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98))
    for _ in range(3):
        flat[0].grad, bias[0].grad = torch.randn(8, 36), torch.randn(8)
        kernel[0].grad, reference[0].grad = flat[0].grad.view(8, 4, 3, 3), bias[0].grad.clone()
        for optimiser in (both, alone, adam):
            optimiser.step()
    torch.testing.assert_close(kernel[0].flatten(1), flat[0])
    torch.testing.assert_close(bias, reference)


def test_its_state_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(steps: range, parameters: list[nn.Parameter], state: Any = None) -> Any:
        optimiser = Muon([group(parameters)], lr=1, betas=(0.9, 0.98))
        if state is not None:
            optimiser.load_state_dict(state)
        for step in steps:
            parameters[0].grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
            optimiser.step()
        return optimiser.state_dict()

    whole, halves = matrices((16, 24)), matrices((16, 24))
    run(range(6), whole)
    torch.save(run(range(3), halves), tmp_path / "state.pt")
    run(range(3, 6), halves, torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(whole[0], halves[0])


def test_tables_and_vectors_are_adamws() -> None:
    model = git_model(mapper={"type": "transformer"})
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config(train={"optimizer": "muon"}).train)
    chosen = {names[id(p)] for g in groups if g["muon"] for p in g["params"]}
    others = {names[id(p)] for g in groups if not g["muon"] for p in g["params"]}
    assert chosen | others == set(names.values())
    assert not [name for name in chosen if "wte" in name or "wpe" in name or "position" in name or "bias" in name]
    assert any("in_proj_weight" in name for name in chosen)
    assert any(name.startswith("vision") and "stem" in name for name in chosen)
    assert any("c_attn.weight" in name for name in chosen)
    assert {"mapper.constants"} <= others
    assert not any(g["muon"] for g in parameter_groups(model, config().train))


def test_a_sharded_model_has_no_whole_matrices() -> None:
    with pytest.raises(UserError, match="--fsdp cannot go with --optimizer muon"):
        config(train={"optimizer": "muon", "fsdp": True})
    with pytest.raises(UserError, match=r"train.optimizer is 'muno'.*did you mean 'muon'|muno.*muon"):
        config(train={"optimizer": "muno"})

"""Muon: momentum whose steps are made orthogonal, for the matrices; AdamW for everything else.

Jordan et al. 2024, with Moonlight's scale, so that AdamW's learning rates and weight decay fit. torch.optim.Muon is
the same for plain matrices; this one also takes convolutions (as out x in*h*w), which small encoders are made of,
and works in float32, because bfloat16 is several times slower on a CPU without its units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that lifts small singular values to about 1 in 5 steps
ROUNDS = 5
SCALE = 0.2  # root mean square of an AdamW step


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `muon: True` hold matrices that take Muon steps.

    Args:
        groups: parameter groups with `lr`, `weight_decay` and `muon`.
        lr: of groups that name none.
        betas: AdamW's.
        momentum: Muon's (Nesterov).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], momentum: float = 0.95
    ) -> None:
        super().__init__(list(groups), lr=lr, betas=betas)
        self.momentum = momentum

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """Take one step."""
        everything = self.param_groups
        try:
            self.param_groups = [group for group in everything if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = everything
        with torch.no_grad():
            for group in everything:
                if group["muon"]:
                    self._orthogonal_step(group)
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        """Step all matrices of a group, those of one shape together."""
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is not None:
                alike.setdefault(p.shape, []).append((p, p.grad))
        for matrices in alike.values():
            wanted = []
            for p, gradient in matrices:
                if not self.state[p]:  # AdamW looks for "step" in every state that it loads
                    self.state[p] = {"momentum_buffer": torch.zeros_like(p), "step": torch.zeros(())}
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(gradient, 1 - self.momentum)
                wanted.append(torch.lerp(gradient, buffer, self.momentum).flatten(1))  # (out,in)
            steps = orthogonal(torch.stack(wanted).float())  # (matrices,out,in)
            size = SCALE * max(steps.shape[1:]) ** 0.5
            for (p, _), step in zip(matrices, steps, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step.view_as(p), alpha=-group["lr"] * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices (n,a,b) with their singular values brought near 1, by Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]  # the smaller Gram matrix is the cheaper one
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

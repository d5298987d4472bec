"""Cross-entropy over a large vocabulary, some tokens at a time: no tensor of all tokens and all words ever lives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**25  # logits at a time: 128 MB in float32, 667 tokens of GPT-2's vocabulary


def vocabulary_loss(
    hidden: Tensor,
    wanted: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    smoothing: float = 0.0,
    chunk: int = CHUNK,
) -> Tensor:
    """Return the mean cross-entropy of the wanted tokens; logits are `scale * (hidden W' + bias)`, softly capped.

    Gradients of the logits are made where the logits are, in the forward pass, and let go with them (as in Liger
    Kernel's fused linear cross-entropy; Hsu et al. 2024, arXiv:2410.10989).

    Args:
        hidden: (L,E) states that predict.
        wanted: (L,) ids of the tokens.
        weight: (V,E) of the head.
        bias: (V,) of the head.
        scale: of the logits (Cohere, Granite).
        cap: logits become `cap * tanh(logits / cap)` (Gemma 2).
        smoothing: of the labels.
        chunk: logits at a time.
    """
    return _Chunks.apply(hidden, wanted, weight, bias, scale, cap, smoothing, chunk)  # type: ignore[no-any-return]


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        wanted: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        cap: float | None,
        smoothing: float,
        chunk: int,
    ) -> Tensor:
        """Sum the losses of the chunks, and the gradients of what asks for them."""
        by_hidden, _, by_weight, by_bias, *_ = ctx.needs_input_grad
        total = torch.zeros((), device=hidden.device)
        # in float32 until the loss scale of fp16 has been multiplied on
        to_hidden = torch.empty_like(hidden, dtype=torch.float32) if by_hidden else None  # (L,E)
        to_weight = torch.zeros_like(weight) if by_weight else None  # (V,E)
        to_bias = torch.zeros_like(bias) if by_bias and bias is not None else None  # (V,)
        size = max(1, chunk // len(weight))
        for start in range(0, len(wanted), size):
            part = slice(start, start + size)
            raw = F.linear(hidden[part], weight, bias).float()  # (l,V)
            logits = raw if scale == 1 else raw.mul_(scale)
            logits = logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
            bent = None if cap is None else 1 - (logits / cap) ** 2  # the cap's slope (l,V)
            loss, slope = _loss_and_slope(logits, wanted[part], smoothing, any(ctx.needs_input_grad))
            total += loss
            if not any(ctx.needs_input_grad):
                continue
            slope = slope if bent is None else slope.mul_(bent)
            slope = (slope if scale == 1 else slope.mul_(scale)).to(weight.dtype)  # (l,V)
            if to_hidden is not None:
                to_hidden[part] = slope @ weight
            if to_weight is not None:
                to_weight += slope.T @ hidden[part].to(slope.dtype)
            if to_bias is not None:
                to_bias += slope.sum(0)
        ctx.count, ctx.kind = max(1, len(wanted)), hidden.dtype
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale what the forward pass found."""
        share = grad / ctx.count
        hidden, weight, bias = (None if found is None else found * share for found in ctx.saved_tensors)
        return None if hidden is None else hidden.to(ctx.kind), None, weight, bias, None, None, None, None


def _loss_and_slope(logits: Tensor, wanted: Tensor, smoothing: float, learns: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss and, where it `learns`, its gradient by the logits (l,V), which takes their place."""
    lines, words = torch.arange(len(wanted), device=wanted.device), logits.shape[1]
    norm = logits.logsumexp(1)  # (l,)
    loss = norm - (1 - smoothing) * logits[lines, wanted]  # (l,)
    if smoothing:
        loss -= smoothing / words * logits.sum(1)
    if not learns:
        return loss.sum(), logits
    slope = logits.sub_(norm[:, None]).exp_()  # (l,V)
    if smoothing:
        slope -= smoothing / words
    slope[lines, wanted] -= 1 - smoothing
    return loss.sum(), slope

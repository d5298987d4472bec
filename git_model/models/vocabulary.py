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
    learns = torch.is_grad_enabled()
    return _Chunks.apply(hidden, wanted, weight, bias, scale, cap, smoothing, chunk, learns)  # type: ignore[no-any-return]


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
        learns: bool,
    ) -> Tensor:
        """Sum the losses of the chunks, and the gradients of what asks for them."""
        by_hidden, _, by_weight, by_bias, *_ = (asks and learns for asks in ctx.needs_input_grad)
        learns = by_hidden or by_weight or by_bias
        total = torch.zeros((), device=hidden.device)
        # in float32 until they are means, and the loss scale of fp16 has been multiplied on
        wide = {"dtype": torch.float64 if hidden.dtype == torch.float64 else torch.float32}
        to_hidden = torch.empty_like(hidden, **wide) if by_hidden else None  # (L,E)
        to_weight = torch.zeros_like(weight, **wide) if by_weight else None  # (V,E)
        to_bias = torch.zeros_like(bias, **wide) if by_bias and bias is not None else None  # (V,)
        size = max(1, chunk // len(weight))
        for start in range(0, len(wanted), size):
            part = slice(start, start + size)
            raw = F.linear(hidden[part], weight, bias).float()  # (l,V)
            logits = raw if scale == 1 else raw.mul_(scale)
            logits = logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
            bent = None if cap is None else 1 - (logits / cap) ** 2  # the cap's slope (l,V)
            loss, slope = _loss_and_slope(logits, wanted[part], smoothing, learns)
            total += loss
            if not learns:
                continue
            slope = slope if bent is None else slope.mul_(bent)
            slope = slope if scale == 1 else slope.mul_(scale)  # (l,V)
            if to_hidden is not None:
                to_hidden[part] = slope.to(weight.dtype) @ weight
            if to_weight is not None:
                to_weight += _summed(slope, hidden[part])
            if to_bias is not None:
                to_bias += slope.sum(0)
        ctx.count, ctx.kinds = max(1, len(wanted)), [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale what the forward pass found."""
        share = grad / ctx.count
        hidden, weight, bias = (
            None if found is None else (found * share).to(kind)
            for found, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)
        )
        return hidden, None, weight, bias, None, None, None, None, None


def _summed(slope: Tensor, hidden: Tensor) -> Tensor:
    """Return slope' hidden, (V,E): sums over a chunk, which fp16 may not hold."""
    device = slope.device.type
    narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    if narrow or hidden.dtype == torch.float16:
        with torch.autocast(device, enabled=False):
            return slope.T.float() @ hidden.float()
    return slope.T.to(hidden.dtype) @ hidden


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

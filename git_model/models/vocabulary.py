"""Logits and cross-entropy over a large vocabulary, some tokens at a time: all tokens by all words never live.

In float32 on a CPU logits are made as `W hidden'`: of the two ways to take the product of a few tokens and very many
words, its libraries are faster at this one (1.3 to 1.6 times for GPT-2's vocabulary and 8 to 700 tokens).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**25  # logits at a time: 128 MB in float32, 667 tokens of GPT-2's vocabulary


class Room:
    """Memory that is kept from one chunk of logits to the next on a CPU, where new pages cost as much as the loss."""

    def __init__(self) -> None:
        self._kept = torch.empty(0)

    def take(self, words: int, tokens: int, weight: Tensor) -> Tensor | None:
        """Return what the logits of a head go into, (V,l); None where torch is to find the memory."""
        if not _on_cpu(weight):
            return None
        if self._kept.numel() < words * tokens:
            with torch.inference_mode(False):  # a training step may be the next to use it
                self._kept = torch.empty(words * tokens)
        return self._kept[: words * tokens].view(words, tokens)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the logits (...,V) of hidden states (...,E)."""
    found = words_first(hidden.reshape(-1, hidden.shape[-1]), weight, bias)  # (V,n)
    return found.t().contiguous().view(*hidden.shape[:-1], -1)


def words_first(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return the logits (V,n) of hidden states (n,E).

    Args:
        hidden: states that predict.
        weight: (V,E) of the head.
        bias: (V,) of the head.
        out: where they go, (V,n).
    """
    if not _on_cpu(weight):
        return F.linear(hidden, weight, bias).t()
    logits = torch.mm(weight, hidden.t(), out=out)  # (V,n)
    return logits if bias is None else logits.add_(bias[:, None])


def _on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


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
    room: Room | None = None,
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
        room: where they go; None = into new memory.
    """
    learns = torch.is_grad_enabled()
    return _Chunks.apply(hidden, wanted, weight, bias, scale, cap, smoothing, chunk, room, learns)  # type: ignore[no-any-return]


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
        room: Room | None,
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
        words = len(weight)
        size = max(1, chunk // words)
        for start in range(0, len(wanted), size):
            part = slice(start, start + size)
            space = None if room is None else room.take(words, len(wanted[part]), weight)
            logits = words_first(hidden[part], weight, bias, space).float()  # (V,l)
            logits = logits if scale == 1 else logits.mul_(scale)
            logits = logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
            bent = None if cap is None else 1 - (logits / cap) ** 2  # the cap's slope (V,l)
            loss, slope = _loss_and_slope(logits, wanted[part], smoothing, learns)
            total += loss
            if not learns:
                continue
            slope = slope if bent is None else slope.mul_(bent)
            slope = slope if scale == 1 else slope.mul_(scale)  # (V,l)
            if to_hidden is not None:
                to_hidden[part] = slope.T.to(weight.dtype) @ weight
            if to_weight is not None:
                to_weight += _summed(slope, hidden[part])
            if to_bias is not None:
                to_bias += slope.sum(1)
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
        return hidden, None, weight, bias, None, None, None, None, None, None


def _summed(slope: Tensor, hidden: Tensor) -> Tensor:
    """Return slope hidden, (V,E): sums over a chunk, which fp16 may not hold."""
    device = slope.device.type
    narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    if narrow or hidden.dtype == torch.float16:
        with torch.autocast(device, enabled=False):
            return slope.float() @ hidden.float()
    return slope.to(hidden.dtype) @ hidden


def _loss_and_slope(logits: Tensor, wanted: Tensor, smoothing: float, learns: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss and, where it `learns`, its gradient by the logits (V,l), which takes their place."""
    columns, words = torch.arange(len(wanted), device=wanted.device), len(logits)
    said = (1 - smoothing) * logits[wanted, columns]  # (l,)
    if smoothing:
        said += smoothing / words * logits.sum(0)
    top = logits.amax(0)  # (l,)
    slope = logits.sub_(top).exp_()  # (V,l)
    total = slope.sum(0)  # (l,)
    loss = (top + total.log() - said).sum()
    if not learns:
        return loss, slope
    slope.mul_(1 / total)
    if smoothing:
        slope -= smoothing / words
    slope[wanted, columns] -= 1 - smoothing
    return loss, slope

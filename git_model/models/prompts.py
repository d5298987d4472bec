"""Several prompts a row: which tokens are whose, a cache that grows, and whether a decoder is fit for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from git_model.batch import IGNORE_INDEX, CaptionBatch

if TYPE_CHECKING:
    from git_model.models.language import LanguageModel

SPARE = 64  # columns by which caches grow


def branches(batch: CaptionBatch) -> list[int]:
    """Return how many prompts each row holds."""
    if batch.targets:
        return [len(targets) for targets in batch.targets]
    return batch.segments.amax(1).clamp(min=1).tolist() if batch.segments.numel() else [1] * len(batch.segments)


def places(batch: CaptionBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the G prompts of a batch are.

    Returns:
        the row of each, (G,) on the CPU, in order; which of its columns are the prompt's own tokens and which the
        row's prefix, (G,T) bool each.
    """
    counts, device = branches(batch), batch.segments.device
    row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # (G,)
    number = torch.tensor([n for count in counts for n in range(1, count + 1)], device=device)  # (G,)
    segments = batch.segments[row.to(device)]  # (G,T)
    return row, segments == number[:, None], segments == 0


def one_a_row(embeds: Tensor, batch: CaptionBatch) -> tuple[Tensor, CaptionBatch]:
    """Return embeddings (G,T,E) and batch with a prompt a row, padded on the left: what transformers' `generate` needs.

    Args:
        embeds: (R,T,E) of the batch's tokens, image tokens among them.
        batch: without targets, in any layout.
    """
    if not batch.packed and (len(batch.input_ids) == 0 or bool(batch.attention_mask[:, -1].all())):
        return embeds, batch
    row, own, prefix = places(batch)
    keys = tuple(batch.keys[r] for r in row.tolist()) if batch.keys else ()
    row = row.to(embeds.device)
    seen = (own | prefix) & batch.attention_mask[row]  # (G,T)
    lengths = seen.sum(1)  # (G,)
    width = int(lengths.max())
    order = seen.int().argsort(dim=1, stable=True)[:, -width:]  # (G,width): what is seen comes last, in its order
    there = torch.arange(width, device=embeds.device) >= width - lengths[:, None]  # (G,width)

    def laid(values: Tensor, fill: float) -> Tensor:
        found = values[row].gather(1, order)
        return found.masked_fill(~there, fill)

    segments = laid(batch.segments, -1)
    rows = replace(
        batch,
        input_ids=laid(batch.input_ids, 0),
        image_mask=laid(batch.image_mask, False),
        attention_mask=there,
        segments=segments.clamp(max=1),
        positions=laid(batch.positions, 0),
        labels=torch.full_like(order, IGNORE_INDEX),
        sources=torch.zeros_like(order),
        targets=tuple((target,) for targets in batch.targets for target in targets),
        keys=keys,
        packed=False,
    )
    spread = order[..., None].expand(-1, -1, embeds.shape[2])
    return embeds[row].gather(1, spread) * there[..., None], rows


class Columns(DynamicLayer):
    """Keys and values of a layer, (R,heads,columns,width each), with room for more: no copy at every token."""

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make buffers like the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (R,heads,new,width); return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        assert self.keys is not None
        assert self.values is not None
        if end > self.keys.shape[2]:
            spare = end + max(SPARE, start // 4) - self.keys.shape[2]
            self.keys, self.values = (F.pad(x, (0, 0, 0, spare)) for x in (self.keys, self.values))
        self.keys[:, :, start:end], self.values[:, :, start:end] = key_states, value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Return the columns in use."""
        return self.length

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


@torch.no_grad()
def follows_masks(language: LanguageModel) -> bool:
    """Tell whether a decoder obeys the masks and positions of a tree: grow a small one, and a line without branches."""
    table, device = language.model.get_input_embeddings(), next(language.model.parameters()).device
    embeds = table(torch.tensor([[1, 2, 3, 4]], device=device))  # (1,4,E)
    cache = Cache(layer_class_to_replicate=Columns)

    def last(embeds: Tensor, sees: list[list[int]], positions: list[int]) -> Tensor:
        mask = (1 - torch.tensor(sees, device=device, dtype=embeds.dtype)) * torch.finfo(embeds.dtype).min
        out = language.body(
            inputs_embeds=embeds,
            attention_mask=mask[None, None],  # (1,1,Q,columns)
            position_ids=torch.tensor([positions], device=device),
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1].float()  # (1,E)

    training = language.training
    language.eval()  # in training some decoders keep no cache
    try:
        last(embeds, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]], [0, 1, 2, 2])
        grown = last(embeds[:, :1], [[1, 1, 1, 0, 1]], [3])  # after 1 2 3; the 4 is a branch beside the 3
        line = torch.cat([embeds[:, :3], embeds[:, :1]], dim=1)
        expected = language.body(inputs_embeds=line, use_cache=False).last_hidden_state[:, -1].float()  # (1,E)
    finally:
        language.train(training)
    return bool((grown - expected).norm() < 0.05 * expected.norm())

"""Greedy, sampled and beam search in which all that is asked about a picture shares its tokens.

A row of the batch is a tree: the prefix with the picture, a branch for each prompt, and on every branch the beams.
What is new of all of them goes into one row, side by side; a mask says which columns each may see. So the prefix runs
once, no cache is ever reordered, and rows that are through leave the batch. The texts are those of transformers'
`generate` (`LanguageModel.reference`), whose rules of scoring and stopping these are.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from git_model.batch import CaptionBatch
from git_model.models.prompts import Columns, places

if TYPE_CHECKING:
    from git_model.models.language import Decoding, LanguageModel

FAR = -1e9  # the score of a beam that is none, in transformers' beam search
LEAVE = 0.75  # share of the rows still at work at which the others are dropped


class Found(NamedTuple):
    """What a search found.

    Args:
        ids: (G,new) the new tokens of each prompt, padded after the end of text.
        scores: (G,) mean log-probability of each prompt's tokens, the end of text included, in the model's own eyes:
            before temperature, and as if nothing had been forbidden; None where they were not asked for.
    """

    ids: Tensor
    scores: Tensor | None = None


class Tree:
    """The model's side of a search: prompts with their beams, G of them, in R rows.

    Args:
        language: the decoder.
        embeds: (R,T,E) prompts with image tokens.
        batch: padded on either side, without targets; a row may hold several prompts ("packed").
        beams: of each prompt.
    """

    def __init__(self, language: LanguageModel, embeds: Tensor, batch: CaptionBatch, beams: int) -> None:
        self.language, self.embeds, self.batch, self.beams = language, embeds, batch, beams
        self.cache = Cache(layer_class_to_replicate=Columns)
        self.rows, self.length = embeds.shape[:2]
        self.row, own, prefix = places(batch)
        row = self.row.to(embeds.device)
        index = torch.arange(self.length, device=embeds.device)
        last, before = (torch.where(where, index, -1).amax(1) for where in (own, prefix))  # (G,) each
        self.tail = torch.where(last >= 0, last, before)  # (G,): an empty prompt goes on from the picture
        self.position = batch.positions[row, self.tail]  # (G,) of the newest token
        seen = (own | prefix) & batch.attention_mask[row]  # (G,T)
        self.visible = seen[:, None].expand(-1, beams, -1)  # (G,beams,columns)

    def plant(self) -> Tensor:
        """Run the prompts; return the logits that follow each, (G,1,V)."""
        hidden = self.language.hidden(self.embeds, self.batch, self.cache)  # (R,T,E)
        return self.language.project(hidden[self.row.to(hidden.device), self.tail]).float()[:, None]  # (G,1,V)

    def grow(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Add a token to every beam.

        Args:
            tokens: (G,beams) ids.
            parents: (G,beams), which beam each goes on from; None = itself.

        Returns:
            (G,beams,V) logits.
        """
        device, beams = tokens.device, self.beams
        counts = torch.bincount(self.row, minlength=self.rows)  # (R,)
        slot = torch.arange(len(self.row)) - (counts.cumsum(0) - counts)[self.row]  # (G,): its place in the row
        most = int(counts.max())
        row, slot = self.row.to(device), slot.to(device)
        place = slot[:, None] * beams + torch.arange(beams, device=device)  # (G,beams)
        if parents is not None:
            self.visible = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[2]))
        itself = F.one_hot(place, most * beams).bool()  # (G,beams,new columns)
        self.visible = torch.cat([self.visible, itself], dim=2)  # (G,beams,columns)
        self.length += most * beams
        self.position = self.position + 1

        table = self.language.model.get_input_embeddings()
        ids = tokens.new_zeros(self.rows, most * beams)  # (R,Q)
        positions = torch.zeros_like(ids)  # (R,Q)
        low = torch.finfo(self.embeds.dtype).min
        mask = self.embeds.new_zeros(self.rows, most * beams, self.length)  # (R,Q,columns); unused rows see all
        ids[row[:, None], place] = tokens
        positions[row[:, None], place] = self.position[:, None].expand(-1, beams)
        seen = torch.zeros(self.visible.shape, dtype=mask.dtype, device=device)
        mask[row[:, None], place] = seen.masked_fill(~self.visible, low)
        out = self.language.step(
            inputs_embeds=table(ids).to(self.embeds.dtype),
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.language.project(out.last_hidden_state[row[:, None], place]).float()  # (G,beams,V)

    def keep(self, alive: Tensor) -> None:
        """Drop the prompts that are through, (G,) bool, and their rows where that is worth a copy."""
        at = alive.to(self.row.device)
        self.row, self.visible, self.position = self.row[at], self.visible[alive], self.position[alive]
        left, renumbered = self.row.unique(return_inverse=True)
        if len(left) <= LEAVE * self.rows:
            self.row, self.rows = renumbered, len(left)
            for layer in self.cache.layers:
                layer.keep(left.to(self.embeds.device))  # type: ignore[union-attr]


class Single:
    """The choosing side of greedy search and of sampling; G prompts.

    What is drawn at a step is the same noise for every prompt (and so for every size of the batch): an answer depends
    on the seed, its picture and its prompt only.
    """

    def __init__(self, count: int, decoding: Decoding, eos_id: int, pad_id: int, device: torch.device) -> None:
        self.decoding, self.eos_id = decoding, eos_id
        self.found = torch.full((count, decoding.longest), pad_id, device=device)  # (all G,new)
        self.sums, self.counts = torch.zeros(
            2, count, device=device
        )  # (all G,) log-probabilities of the tokens; how many
        self.which = torch.arange(count, device=device)  # (G,) of those still at work
        self.dice = torch.Generator().manual_seed(decoding.seed)

    def step(self, step: int, logits: Tensor, last: bool) -> tuple[Tensor, None, Tensor]:
        """Return the next tokens (G,1), None, and who is through (G,), of logits (G,1,V)."""
        scores = self._forbid(step, logits[:, 0])  # (G,V)
        if self.decoding.sample:
            noise = -torch.log(-torch.log(torch.rand(scores.shape[1], generator=self.dice).clamp(1e-20, 1 - 1e-7)))
            scores = nucleus(scores / self.decoding.temperature, self.decoding.top_p) + noise.to(scores.device)
        tokens = scores.argmax(1)  # (G,)
        self.found[self.which, step] = tokens
        self.counts[self.which] += 1
        self.sums[self.which] += logits[:, 0].gather(1, tokens[:, None])[:, 0] - logits[:, 0].logsumexp(1)
        over = tokens == self.eos_id
        return tokens[:, None], None, over

    @property
    def means(self) -> Tensor:
        """The mean log-probability of each prompt's tokens, (all G,)."""
        return self.sums / self.counts

    def keep(self, alive: Tensor) -> None:
        """Go on with these, (G,) bool, only."""
        self.which = self.which[alive]

    def _forbid(self, step: int, scores: Tensor) -> Tensor:
        return forbidden(scores, self.decoding, step, self.eos_id, self.found[self.which, :step])


class Beams:
    """The choosing side of beam search, by the rules of transformers: scores over length, stopping, ties."""

    def __init__(self, count: int, decoding: Decoding, eos_id: int, pad_id: int, device: torch.device) -> None:
        self.decoding, self.eos_id = decoding, eos_id
        beams, new = decoding.beams, decoding.longest
        self.found = torch.full((count, new), pad_id, device=device)  # (all G,new)
        self.which = torch.arange(count, device=device)  # (G,) of those still at work
        self.tokens = torch.full((count, beams, new), pad_id, device=device)
        self.scores = torch.zeros(count, beams, device=device)
        self.scores[:, 1:] = FAR  # all begin alike: one of them counts
        self.ended = self.tokens.clone()  # (G,beams,new) the best that came to their end
        self.ended_scores = torch.full((count, beams), FAR, device=device)
        self.ended_means = self.scores.clone()
        self.means = torch.zeros(count, device=device)  # (all G,) mean log-probability of the tokens found
        self.is_ended = torch.zeros(count, beams, dtype=torch.bool, device=device)

    def step(self, step: int, logits: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next tokens and the beams they follow, (G,beams) each, and who is through (G,).

        Args:
            step: from 0.
            logits: (G,beams,V), or (G,1,V) for the first step.
            last: whether every text ends here.
        """
        beams, power = self.decoding.beams, self.decoding.length_penalty
        odds = F.log_softmax(logits, dim=-1).expand(-1, beams, -1)  # (G,beams,V)
        flat = forbidden(odds.flatten(0, 1), self.decoding, step, self.eos_id, self.tokens[:, :, :step].flatten(0, 1))
        total = flat.unflatten(0, (-1, beams)) + self.scores[:, :, None]  # (G,beams,V)
        best, index = total.flatten(1).topk(2 * beams)  # (G,2 beams): one end token each leaves enough to go on with
        parents, tokens = index // total.shape[2], index % total.shape[2]
        lines = self.tokens.gather(1, parents[..., None].expand(-1, -1, self.tokens.shape[2]))  # (G,2 beams,new)
        lines[:, :, step] = tokens
        ends = (tokens == self.eos_id) | last  # (G,2 beams)

        self.scores, running = (best + ends.float() * FAR).topk(beams)  # (G,beams)
        self.tokens = _pick(lines, running)
        first = torch.arange(2 * beams, device=best.device) < beams  # the others are there to go on with only
        ended = ends & first
        merged = torch.cat([self.ended_scores, best / (step + 1) ** power + (~ended).float() * FAR], dim=1)
        self.ended_scores, kept = merged.topk(beams)  # (G,beams)
        self.ended = _pick(torch.cat([self.ended, lines], dim=1), kept)
        self.ended_means = torch.cat([self.ended_means, best / (step + 1)], dim=1).gather(1, kept)
        self.is_ended = torch.cat([self.is_ended, ended], dim=1).gather(1, kept)

        possible = self.scores[:, 0] / (step + 1) ** power  # of what still runs
        worst = torch.where(self.is_ended, self.ended_scores.amin(1, keepdim=True), FAR)  # (G,beams)
        over = ~(possible[:, None] > worst).any(1) | ends.all(1)  # (G,)
        self.found[self.which], self.means[self.which] = self.ended[:, 0], self.ended_means[:, 0]
        return self.tokens[:, :, step], parents.gather(1, running), over

    def keep(self, alive: Tensor) -> None:
        """Go on with these, (G,) bool, only."""
        for name in ("which", "tokens", "scores", "ended", "ended_scores", "ended_means", "is_ended"):
            setattr(self, name, getattr(self, name)[alive])


def search(
    language: LanguageModel, embeds: Tensor, batch: CaptionBatch, decoding: Decoding, eos_id: int, pad_id: int
) -> Found:
    """Continue every prompt of a batch; see `LanguageModel.generate`, which decides whether the model is fit for it."""
    tree = Tree(language, embeds, batch, decoding.beams)
    kind = Beams if decoding.beams > 1 else Single
    choice = kind(len(tree.row), decoding, eos_id, pad_id, embeds.device)
    until = time.monotonic() + (math.inf if decoding.max_time is None else decoding.max_time)
    logits = tree.plant()
    for step in range(decoding.longest):
        last = step + 1 == decoding.longest or time.monotonic() > until
        tokens, parents, over = choice.step(step, logits, last)
        if last or bool(over.all()):
            break
        if bool(over.any()):
            alive = ~over
            tree.keep(alive)
            choice.keep(alive)
            tokens, parents = tokens[alive], None if parents is None else parents[alive]
        logits = tree.grow(tokens, parents)
    return Found(choice.found, choice.means)


def mean_of_text(odds: Tensor, ids: Tensor, eos_id: int) -> Tensor:
    """Return the mean of the values (G,new) of those ids (G,new) that are text, its end included, (G,)."""
    ends = ids == eos_id
    counts = torch.where(ends.any(1), ends.int().argmax(1) + 1, ids.shape[1])  # (G,)
    counted = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]  # (G,new)
    return odds.where(counted, 0.0).sum(1) / counts


def forbidden(scores: Tensor, decoding: Decoding, step: int, eos_id: int, ids: Tensor) -> Tensor:
    """Return scores (H,V) with what may not follow the ids so far, (H,step), at minus infinity."""
    if step < decoding.min_new_tokens:
        scores = scores.clone()
        scores[:, eos_id] = -torch.inf
    if decoding.answers is not None:
        shut = torch.full_like(scores, -torch.inf)
        for line, walked in enumerate(ids.tolist()):
            shut[line, decoding.answers.following(walked)] = 0
        scores = scores + shut
    return scores


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return logits (G,V) with all but the likeliest tokens that make up `top_p` at minus infinity."""
    if top_p >= 1:
        return logits
    ordered, index = logits.sort(dim=1, descending=True)
    odds = ordered.softmax(dim=1)
    beyond = odds.cumsum(dim=1) - odds >= top_p  # what comes before is enough already
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)


def _pick(lines: Tensor, which: Tensor) -> Tensor:
    """Return (G,beams,new) of (G,more,new)."""
    return lines.gather(1, which[..., None].expand(-1, -1, lines.shape[2]))

"""The three parts together: accumulation == big batch, batch == single, freezing, an empty batch, learning."""

from __future__ import annotations

import pytest
import torch
from tiny import captions, collator, git_model, picture
from torch import Tensor

from git_model.batch import CaptionBatch, Target
from git_model.datasets.collate import Collator, Loaded
from git_model.models.git import GitModel
from git_model.models.language import Decoding

SAMPLES = [
    captions("a cat", key="1"),
    captions("two dogs in a garden", key="2", seed=1),
    captions("b", key="3", seed=2),
]
MAPPERS = {"linear": "grid", "mlp": "pooled", "transformer": "grid", "mlp2x_gelu": "grid", "grid": "grid"}


def gradients(model: GitModel, batches: list[CaptionBatch]) -> dict[str, Tensor]:
    """The loop's rule: every token weighs the same, whatever batch it came in."""
    model.zero_grad()
    total = sum(b.num_targets for b in batches)
    for batch in batches:
        (model(batch) * batch.num_targets / total).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_accumulation_equals_the_big_batch(architecture: str) -> None:
    small = {"architecture": architecture, "width": 32, "depth": 2, "heads": 4, "positions": 256}
    model = git_model(language={"small": small})
    collate = collator(model)
    big = gradients(model, [collate(SAMPLES)])
    parts = gradients(model, [collate([s]) for s in SAMPLES])
    assert big.keys() == parts.keys()
    for name in big:
        torch.testing.assert_close(parts[name], big[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mapper", MAPPERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_batch_equals_single(mapper: str, beams: int) -> None:
    model = git_model(mapper={"type": mapper}, vision={"features": MAPPERS[mapper]})
    collate, decoding = collator(model, generate=True), Decoding(beams=beams, max_new_tokens=10)
    asks = [Loaded(str(i), (picture(i),), (Target("", "?" * i, i),)) for i in range(4)]
    together = model.generate(collate(asks), decoding)
    assert together == [model.generate(collate([ask]), decoding)[0] for ask in asks]


def test_two_images_fill_their_slots() -> None:
    model = git_model()
    ask = Loaded("two", (picture(0), picture(1)), (Target("", "[IMG] or [IMG] ?", 1),))
    swapped = Loaded("two", (picture(1), picture(0)), ask.targets)
    embeds = [
        model.language.embed(b, model.encode(b.images))
        for b in (collator(model, generate=True)([s]) for s in (ask, swapped))
    ]
    k = model.num_image_tokens
    torch.testing.assert_close(embeds[0][0, :k], embeds[1][0, -k - 1 : -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [("vision",), ("language",), ("vision", "language"), ("mapper",)])
def test_frozen_parts_do_not_move_and_stay_in_evaluation_mode(frozen: tuple[str, ...]) -> None:
    model = git_model(train={"freeze": list(frozen)})
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(collator(model)(SAMPLES)).backward()
    optimizer.step()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"vision", "mapper", "language"} - set(frozen)
    assert all(not getattr(model, part).training for part in frozen)


def test_an_empty_batch_gives_zero_with_every_parameter_in_the_graph() -> None:
    model = git_model()
    loss = model(collator(model)([]))
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is not None for p in model.parameters())


def test_checkpointed_activations_change_nothing() -> None:
    losses, norms = [], []
    for on in (False, True):
        model = git_model(train={"freeze": ["language"]})
        if on:
            model.checkpoint_activations()
        model.train()
        loss = model(collator(model)(SAMPLES))
        loss.backward()
        losses.append(loss.detach())
        norms.append(torch.stack([p.grad.norm() for p in model.mapper.parameters()]))
        if on:
            assert model.language.model.is_activation_checkpointing
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(norms[0], norms[1])


def test_it_learns_three_pictures_by_heart() -> None:
    model = git_model().train()
    batch = collator(model)(SAMPLES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = model.eval().generate(collator(model, generate=True)(SAMPLES))
    assert said == ["a cat", "two dogs in a garden", "b"]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_the_ends_are_predicted_and_not_read(mode: str, pack: bool) -> None:
    """The last column of a batch is left out of the decoder; loss and gradients are those of the whole batch."""
    model = git_model(language={"prefix_attention": mode})
    batch = Collator(model.codec, model.num_image_tokens, pack=pack)([captions("ab", "longer"), captions("c", seed=1)])
    seen = []
    model.language.body.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    loss = model(batch)
    loss.backward()
    short = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    whole = model.language.loss(model.language.embed(batch, model.encode(batch.images)), batch)
    whole.backward()
    assert seen == [batch.input_ids.shape[1] - 1, batch.input_ids.shape[1]]
    torch.testing.assert_close(loss, whole)
    for one, other in zip(short, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)

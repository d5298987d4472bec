"""torch.compile of the training forward and of decoding: no new graph for every length of text."""

from __future__ import annotations

import pytest
import torch
from test_search import SEARCHES, ending, found
from tiny import captions, collator, git_model, language_model
from torch._dynamo.testing import CompileCounterWithBackend

from git_model.batch import CaptionBatch
from git_model.models.git import GitModel


def batches(model: GitModel, pack: bool) -> list[CaptionBatch]:
    collate = collator(model, pack=pack)
    extra = ["another"] if pack else []
    return [
        collate([captions("x" * (length + i % 3), *extra, key=str(i), seed=length + i) for i in range(4)])
        for length in (5, 9, 12, 7, 20, 6)
    ]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_one_graph_and_few_shapes(architecture: str, pack: bool) -> None:
    torch._dynamo.reset()
    sizes = {"architecture": architecture, "width": 32, "depth": 2, "heads": 4, "positions": 256, "vocab_size": 257}
    model = git_model(language={"name": "small", "small": sizes}).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)  # a break would be an error
    for batch in batches(model, pack):
        plain, loss = model.forward(batch), compiled(batch)
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(value, list(model.mapper.parameters())) for value in (plain, loss)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3, "the first shape, then any"


@pytest.mark.parametrize(("architecture", "search"), [("gpt2", "4 beams"), ("llama", "greedy")])
def test_decoding_steps_are_few_graphs_and_say_the_same(
    architecture: str, search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    language = ending(language_model(architecture, "bidirectional"))
    expected = found(language, SEARCHES[search], 3, plain=False)
    counter, compiled = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda body, **how: compiled(body, backend=counter, fullgraph=True, **how))
    before = set(language.state_dict())
    language.compile_steps()
    ids, scores = found(language, SEARCHES[search], 3, plain=False)
    assert ids == expected[0]
    assert scores == pytest.approx(expected[1], abs=1e-4)
    assert 1 <= counter.frame_count <= 6, "not one for every length"
    assert set(language.state_dict()) == before

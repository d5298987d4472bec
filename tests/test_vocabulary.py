"""The loss in chunks is the plain cross-entropy: value, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from git_model.models.vocabulary import Room, logits_of, vocabulary_loss

L, E, V = 37, 16, 101


def parts(dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(E, V, bias=bias).to(dtype)
    return torch.randn(L, E, dtype=dtype, requires_grad=True), torch.randint(V, (L,)), head


@pytest.mark.parametrize("chunk", [1, 5 * V, 36 * V, 10**9])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients(
    chunk: int, smoothing: float, scale: float, cap: float | None, bias: bool, frozen: bool
) -> None:
    hidden, wanted, head = parts(torch.float64, bias)
    head.requires_grad_(not frozen)
    asked = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    logits = head(hidden) * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    plain = F.cross_entropy(logits.float(), wanted, label_smoothing=smoothing)
    expected = torch.autograd.grad(3 * plain, asked)

    def ours() -> Tensor:
        how = {"scale": scale, "cap": cap, "smoothing": smoothing, "chunk": chunk}
        return vocabulary_loss(hidden, wanted, head.weight, head.bias, **how)

    loss = ours()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(3 * loss, asked), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours(), loss)


def test_half_precision_under_autocast() -> None:
    hidden, wanted, head = parts(torch.float32, False)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(head(hidden).float(), wanted)
        loss = vocabulary_loss(hidden, wanted, head.weight, chunk=7 * V)
    torch.testing.assert_close(loss, plain)
    (got,), (want,) = torch.autograd.grad(loss, [hidden]), torch.autograd.grad(plain, [hidden])
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-4)


class Largest(TorchDispatchMode):
    """Notes the largest tensor any operation returns, in numbers."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.found = max(self.found, tensor.numel())
        return out


def test_no_tensor_of_all_tokens_and_words_lives() -> None:
    hidden, wanted, head = parts(torch.float32, False)
    with Largest() as plain:
        F.cross_entropy(head(hidden), wanted).backward()
    with Largest() as chunks:
        vocabulary_loss(hidden, wanted, head.weight, chunk=4 * V).backward()
    assert plain.found == L * V
    assert chunks.found == E * V, "the head's gradient; of logits four lines at most"


def test_a_tied_table_gets_both_gradients() -> None:
    hidden, wanted, head = parts(torch.float64, False)
    table = nn.Embedding(V, E, dtype=torch.float64)
    table.weight = head.weight
    ids = torch.arange(L) % V
    grads = []
    for loss in (
        F.cross_entropy(head(table(ids) + hidden), wanted),
        vocabulary_loss(table(ids) + hidden, wanted, head.weight, chunk=9 * V),
    ):
        head.weight.grad = None
        loss.backward()
        grads.append(head.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_gradients_of_half_precision_are_scaled_before_they_are_rounded() -> None:
    """fp16's smallest number is 6e-8: a gradient below it must live until the scaler has multiplied it."""
    torch.manual_seed(0)
    hidden = torch.randn(400, E, dtype=torch.float16, requires_grad=True)
    weight, wanted = (torch.randn(V, E) * 1e-5).half(), torch.randint(V, (400,))
    vocabulary_loss(hidden, wanted, weight).mul(65536).backward()
    assert hidden.grad is not None
    assert float((hidden.grad != 0).float().mean()) > 0.9


class Products(TorchDispatchMode):
    """Counts matrix products."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_nothing_is_made_for_gradients_that_nobody_asks_for() -> None:
    hidden, wanted, head = parts(torch.float32, False)
    with torch.no_grad(), Products() as seen:
        vocabulary_loss(hidden.detach(), wanted, head.weight, chunk=4 * V)
    assert seen.found == -(-L // 4)
    with Products() as seen:
        vocabulary_loss(hidden, wanted, head.weight, chunk=4 * V)
    assert seen.found == 3 * -(-L // 4)


@pytest.mark.parametrize("bias", [False, True])
def test_memory_that_is_kept_changes_nothing(bias: bool) -> None:
    hidden, wanted, head = parts(torch.float32, bias)
    room, found = Room(), []
    for keeps in (None, room, room):
        head.zero_grad()
        hidden.grad = None
        loss = vocabulary_loss(hidden, wanted, head.weight, head.bias, chunk=9 * V, room=keeps)
        loss.backward()
        assert hidden.grad is not None
        found.append([loss.detach(), hidden.grad, *(p.grad for p in head.parameters())])
    for one, other in zip(found[0] * 2, found[1] + found[2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_memory_of_a_validation_serves_training() -> None:
    hidden, wanted, head = parts(torch.float32, False)
    room = Room()
    with torch.inference_mode():
        first = vocabulary_loss(hidden.detach(), wanted, head.weight, room=room)
    loss = vocabulary_loss(hidden, wanted, head.weight, room=room)
    loss.backward()
    torch.testing.assert_close(loss.detach(), first.clone())


@pytest.mark.parametrize("shape", [(E,), (3, E), (2, 3, E)])
def test_logits(shape: tuple[int, ...]) -> None:
    _, _, head = parts(torch.float32, True)
    hidden = torch.randn(shape)
    found = logits_of(hidden, head.weight, head.bias)
    torch.testing.assert_close(found, head(hidden))
    assert found.is_contiguous()

"""One step of training without memory: on fake tensors everything is done but the arithmetic, and what is held counts.

What is followed is every tensor that torch makes: weights, activations, gradients, the optimiser's state, temporary
ones. What a kernel takes for itself inside, and what an allocator wastes between tensors, is not seen. torch's own
MemTracker would do for the counting, but not for a model that asks its masks something, nor for more than one size of
batch.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from git_model.architecture import DTYPES
from git_model.batch import CaptionBatch, Region, Target
from git_model.config import Config, TrainConfig
from git_model.datasets.collate import Collator, Loaded
from git_model.errors import UserError
from git_model.models.git import GitModel
from git_model.models.skeleton import fill, skeleton
from git_model.optimizer import build_optimizer

# what autocast computes in float32 on a card but not on a CPU, of torch's autocast_mode.h what language and image
# models use
WIDE_ON_CARDS = {
    *(F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm),
    *(torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.log, Tensor.log),
    *(F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softplus),
    *(torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.prod, Tensor.prod, torch.norm, Tensor.norm),
}
ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
PRIMES = (31, 37, 41, 43, 47, 53, 59, 61)


@dataclass(frozen=True)
class Record:
    """A record of the data as it goes into a batch.

    Args:
        images: pictures.
        texts: captions or questions a visit.
    """

    images: int = 1
    texts: int = 1


ONE = Record()


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, on fake tensors or real ones.

    Whole numbers and truth values that depend on no fake tensor (ids, masks, positions) are computed really, so that a
    model may ask them something.

    Args:
        mode: of the fake tensors; None counts real ones.
        rows: of the batch, where what grows with it is to be told from the rest: storages that do so are multiples of
            `rows` in bytes, and no others are; 0 = all count as fixed.
    """

    def __init__(self, mode: FakeTensorMode | None = None, rows: int = 0) -> None:
        super().__init__()
        self.mode, self.rows = mode, rows
        self.fixed, self.growing = 0, 0  # bytes alive: whatever the batch, and of the whole batch
        self.history: list[tuple[int, int]] = []  # (fixed, growing) after every operation
        self._held: dict[int, tuple[int, bool, Any]] = {}

    def hold(self, tensors: Any, fixed: bool = False) -> None:
        """Count tensors from now until nothing refers to their storage; `fixed` ones do not grow with the batch."""
        for tensor in tree_iter(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()  # one object in Python as long as it lives
            key, size = id(storage), storage.nbytes()
            if key not in self._held:
                grows = not fixed and self._grows(size)
                self._held[key] = (size, grows, weakref.ref(storage, lambda _, key=key: self._release(key)))
                self._add(size, grows)

    def _grows(self, size: int) -> bool:
        return bool(self.rows) and size % self.rows == 0

    def _release(self, key: int) -> None:
        size, grows, _ = self._held.pop(key)
        self._add(-size, grows)

    def _add(self, size: int, grows: bool) -> None:
        if grows:
            self.growing += size
        else:
            self.fixed += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        if func is torch.ops.prim.device.default:  # two in three calls
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        out = self._run(func, args, kwargs or {})
        self.hold(out)
        self.history.append((self.fixed, self.growing))
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)] if self.mode else []
        if self.mode is None or (given and not any(isinstance(x, FakeTensor) for x in given)):
            return func(*args, **kwargs)
        with self.mode:
            out = func(*args, **kwargs)
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        if given or any(x.is_floating_point() for x in made):
            return out
        return func(*args, **kwargs)  # numbers made of nothing: arange, zeros


class CardArithmetic(TorchFunctionMode):
    """Lets autocast on the CPU compute in float32 what it computes so on a card, whose attention drops out unseen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Widen the arguments of a function that cards widen."""
        kwargs = kwargs or {}
        if func in WIDE_ON_CARDS and torch.is_autocast_enabled("cpu"):
            wide = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))
            args, kwargs = wide
        if func is F.scaled_dot_product_attention:
            args, kwargs = (), {**dict(zip(ATTENTION, args, strict=False)), **kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


def full_batch(model: GitModel, config: Config, size: int, record: Record) -> CaptionBatch:
    """Return the largest batch of `size` records: black pictures, every text cut at `data.max_text_tokens`."""
    side = model.vision.resolution
    picture = torch.zeros(3, side, side, dtype=torch.uint8)  # (3,H,W)
    targets = tuple(Target(str(i)) for i in range(record.texts))
    if model.reads_regions:  # each text has a box of its own
        boxes = [(0.0, 0.0, 1.0, (i + 1) / record.texts) for i in range(record.texts)]
        targets = tuple(replace(t, regions=(Region(0, box),)) for t, box in zip(targets, boxes, strict=True))
    loaded = Loaded("", (picture,) * record.images, targets)
    collator = Collator(model.codec, model.num_image_tokens, pack=config.data.pack, regions=model.reads_regions)
    return collator([loaded] * size)


def gradients(model: GitModel, batch: CaptionBatch, config: TrainConfig, ledger: Ledger, card: bool) -> None:
    """Go forward and backward as a run's step does; from the second micro-batch on there are gradients already.

    Args:
        model: in training mode, real or fake.
        batch: of real numbers.
        config: its precision and accumulation.
        ledger: counts.
        card: by a card's rules of autocast, not a CPU's.
    """
    half = config.precision != "fp32"
    dtype = getattr(torch, DTYPES[config.precision]) if half else torch.bfloat16
    ledger.hold([getattr(batch, field.name) for field in fields(batch)])
    with ledger, CardArithmetic() if card else nullcontext():
        for _ in range(min(config.accumulation, 2)):
            with torch.autocast("cpu", dtype, enabled=half):
                loss = model(batch) * batch.num_targets
            # what loss.backward() comes to; itself it would leave `CardArithmetic`, which recomputing needs
            _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        if config.clip:
            clip_grads_with_norm_(trained, config.clip, norm)


def optimizer_step(optimizer: torch.optim.Optimizer, ledger: Ledger, card: bool = False) -> tuple[int, int]:
    """Step once; return the bytes that stay, and the most that there were at a time, beside those before.

    Args:
        optimizer: its parameters have their gradients.
        ledger: counts.
        card: where no kernel does it all, all parameters at once, as on a card; on a CPU one after the other.
    """
    for group in optimizer.param_groups:
        if not group.get("fused"):
            group["foreach"] = card
    before, start = ledger.fixed + ledger.growing, len(ledger.history)
    with ledger:
        optimizer.step()
    most = max(sum(live) for live in ledger.history[start:])
    return ledger.fixed + ledger.growing - before, most - before


@dataclass(frozen=True)
class Peaks:
    """What a step holds, and the most of it at every batch size; all in bytes.

    Args:
        weights: parameters and buffers, frozen ones too.
        gradients: when all are there.
        state: of the optimiser.
        step: most that the optimiser's step adds to weights and gradients; `state` is in it.
        fixed: alive after each operation of the two passes, that does not grow with the batch; (operations,).
        growing: for each record of the batch beside it; (operations,).
    """

    weights: int
    gradients: int
    state: int
    step: int
    fixed: np.ndarray
    growing: np.ndarray

    def at(self, size: int) -> int:
        """Return the peak at a batch size. From the second step on the optimiser's state is there in both passes."""
        passes = self.fixed + size * self.growing
        return int(max(passes.max() + self.state, passes[-1] + self.step))


class Rehearsal:
    """The steps of a config, on fake tensors.

    Args:
        config: of the run.
        record: as it goes into a batch.

    Raises:
        UserError: as building the model does.
    """

    def __init__(self, config: Config, record: Record = ONE) -> None:
        self.config, self.record = config, record
        self.model = skeleton(config)
        dims = {size for p in self.model.parameters() for size in p.shape}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        fill(self.model, self.mode)
        self.model.language.room = None  # a CPU's; where it is kept it is up to 128 MB more at the optimiser's step
        self.model.train()
        self.optimizer = build_optimizer(self.model, config.train)
        # a batch size that no size of the model is a multiple of: what is one grows with the batch
        self.rows = next((prime for prime in PRIMES if all(size % prime for size in dims)), PRIMES[-1])
        self.checkpointing = False
        self.state = 0
        self.steps: dict[bool, int] = {}  # by whether on a card

    def peaks(self, checkpointing: bool, card: bool = False, size: int | None = None) -> Peaks:
        """Return the peaks of a step.

        Args:
            checkpointing: with gradient checkpointing; there is no way back from it.
            card: by the rules of a card: its autocast, its optimiser's steps; else a CPU's.
            size: of the batch that is rehearsed; the figures then are for this size alone. None: for every size.

        Raises:
            UserError: the model does what fake tensors cannot.
        """
        if checkpointing and not self.checkpointing:
            self.model.checkpoint_activations()
        self.checkpointing = self.checkpointing or checkpointing
        assert self.checkpointing == checkpointing, "checkpointing cannot be switched off"
        ledger = Ledger(self.mode, 0 if size else self.rows)
        ledger.hold([*self.model.parameters(), *self.model.buffers()], fixed=True)
        weights = ledger.fixed
        try:
            batch = full_batch(self.model, self.config, size or self.rows, self.record)
            gradients(self.model, batch, self.config.train, ledger, card)
        except DataDependentOutputException as error:
            names = f"'{self.config.vision.name}' or '{self.config.language.name}'"
            raise UserError(f"--plan cannot follow {names}, which looks at its own numbers ({error.func})") from error
        passes = np.array(ledger.history, dtype=np.int64)  # (operations,2)
        held = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        if not self.steps:
            self.state, _ = optimizer_step(self.optimizer, ledger)  # later ones have all of it from the start
            self.steps = {on: self.state + optimizer_step(self.optimizer, ledger, on)[1] for on in (False, True)}
        self.optimizer.zero_grad()
        growing = passes[:, 1] // (1 if size else self.rows)
        return Peaks(weights, held, self.state, self.steps[card], passes[:, 0], growing)


def peak_memory(config: Config, batch_size: int, checkpointing: bool, record: Record = ONE, card: bool = False) -> int:
    """Return the most bytes that the tensors of a training step take at a time.

    Args:
        config: of the run; its own batch size and checkpointing are not looked at.
        batch_size: records a process and micro-batch.
        checkpointing: with gradient checkpointing.
        record: what is in a record.
        card: on a card, else on a CPU.

    Raises:
        UserError: as building the model does; a model that fake tensors cannot follow.
    """
    return Rehearsal(config, record).peaks(checkpointing, card, batch_size).at(0)

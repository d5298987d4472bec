"""What every benchmark measures with: sides in turn, the machine's ceiling, FLOPs, peak memory, one report.

A benchmark is a function `(Options) -> list[Result]`; `python -m benchmarks` runs those that it knows.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Side = Callable[[], Any]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """What a benchmark is told.

    Args:
        device: where models run.
        data: folder of the real data sets; may be missing.
        rounds: how often the sides take turns; None = the benchmark's own number.
        rows: data set sizes to compare.
        quick: tiny shapes, to see that everything runs; the figures mean nothing.
    """

    device: torch.device = field(default_factory=lambda: CPU)
    data: Path = Path("../shared/data")
    rounds: int | None = None
    rows: tuple[int, int] = (10_000, 100_000)
    quick: bool = False


@dataclass(frozen=True)
class Result:
    """One figure.

    Args:
        name: what was measured, e.g. 'training/pooled: speed'.
        value: the figure; None where there is only text.
        low: of its spread.
        high: of its spread.
        gate: what it has to reach; None = it is told, not judged.
        at_most: the gate is an upper limit.
        unit: 'x' for a ratio.
        details: all that lies behind the figure, as JSON can hold it.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    gate: float | None = None
    at_most: bool = False
    unit: str = "x"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether the gate is reached; None without one."""
        if self.gate is None or self.value is None:
            return None
        return self.value <= self.gate if self.at_most else self.value >= self.gate


@dataclass(frozen=True)
class Ratio:
    """How many times faster one side is than another: median of the rounds' ratios, and their spread."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds of each side in each round."""

    seconds: dict[str, list[float]]

    def median(self, side: str) -> float:
        """Return the middle of a side's times."""
        return statistics.median(self.seconds[side])

    def each(self, images: Mapping[str, int]) -> Timing:
        """Return the times of one picture, of sides that work on so many."""
        return Timing({side: [s / images[side] for s in times] for side, times in self.seconds.items()})

    def ratio(self, other: str, ours: str) -> Ratio:
        """Return other / ours: above 1, ours is faster. A disturbance that lasts a round hits both sides of it."""
        each = tuple(a / b for a, b in zip(self.seconds[other], self.seconds[ours], strict=True))
        return Ratio(statistics.median(each), min(each), max(each), each)


_now = time.perf_counter


def use_cpu_time() -> None:
    """From here on take one thread and measure the work it does, not how long it waits for other processes."""
    global _now
    _now = time.process_time
    torch.set_num_threads(1)


def clock(run: Side, device: torch.device) -> float:
    """Return the seconds a call takes; on a GPU until its last kernel is done."""
    if device.type != "cuda":
        start = _now()
        run()
        return _now() - start
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000


def alternate(sides: Mapping[str, Side], rounds: int, device: torch.device = CPU, warmups: int = 1) -> Timing:
    """Time the sides in turn, in one process.

    Args:
        sides: what to time, by name.
        rounds: how often; the order turns round each time, so that no side always comes after the same one.
        device: where they run.
        warmups: untimed calls of each before.
    """
    for run in sides.values():
        for _ in range(warmups):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            gc.collect()
            seconds[name].append(clock(sides[name], device))
        order.reverse()
    return Timing(seconds)


@dataclass(frozen=True)
class Ceiling:
    """The best this machine does: `flops` a second in a matrix product, `bandwidth` in bytes a second of a copy."""

    flops: float
    bandwidth: float


def machine_ceiling(device: torch.device = CPU, dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> Ceiling:
    """Measure the rate of matrix products (best of several sizes, read and written once) and of a large copy.

    Args:
        device: of the machine.
        dtype: of the product.
        seconds: to spend on each size.
    """
    sizes = (2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 2048)
    rates = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates.append(2 * size**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds))
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)  # 1 GiB, 256 MiB
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds)
    return Ceiling(max(rates), copied)


def _best(run: Side, device: torch.device, seconds: float) -> float:
    run()
    found, until = [], time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < until:
        found.append(clock(run, device))
    return min(found)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def count_flops(run: Side) -> int:
    """Return the floating point operations of a call's products, backward passes in it included.

    torch's counter knows the attention kernels of GPUs only; the CPU's are added here, by the same formulas (all
    pairs, whatever the mask).
    """
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return counter.get_total_flops()


def held_bytes(*things: Any) -> int:
    """Return the bytes of modules, optimisers and tensors; what they share counts once."""
    storages: dict[int, int] = {}
    for thing in things:
        tensors: list[Any] = [thing]
        if isinstance(thing, nn.Module):
            tensors = [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, torch.optim.Optimizer):
            tensors = [value for state in thing.state.values() for value in state.values()]
        for tensor in (t for t in tensors if isinstance(t, Tensor)):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def peak_growth(run: Side, device: torch.device = CPU) -> int:
    """Return the most bytes of tensors a call holds at a time beyond what there was before.

    A CPU has no such counter; the profiler sees every allocation, what autograd keeps and what lives inside of an
    operator included. The process's own size would tell less: what is freed stays with it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kept: Any = profiler.profiler
    events = [event for event in kept.kineto_results.events() if event.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what libraries in C++ write to stderr to itself; an error brings it back."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        except BaseException:
            heard.seek(0)
            os.write(kept, heard.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that make `Options`."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--data", type=Path, default=Options.data, help="folder of the real data sets")
    parser.add_argument("--rounds", type=int, help="how often the sides take turns")
    parser.add_argument("--rows", type=int, nargs=2, default=Options.rows, help="data set sizes to compare")
    parser.add_argument(
        "--cpu_time", action="store_true", help="one thread's own time: for a machine that is not quiet"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run? Its figures mean nothing")


def read_options(given: argparse.Namespace) -> Options:
    """Return what the flags say."""
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the training engine would take the card
    if given.cpu_time:
        use_cpu_time()
    return Options(torch.device(given.device), given.data, given.rounds, tuple(given.rows), given.quick)

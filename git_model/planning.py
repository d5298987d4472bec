"""What a run will take, before it starts: `train.py --plan`.

Memory is that of all tensors at the worst moment of a step, followed through one step on fake tensors
(rehearsal.py), at every size of batch. The margin is for the rest: what kernels take inside, an allocator's waste, a
card's context, the process's own libraries and its data workers. Approximate are these:

- Cards are reckoned on the CPU, with a card's rules of autocast and of the optimiser, and attention kernels that keep
  no scores (a CPU's keep them where there is dropout). Nothing of it is measured on a card.
- Rows are as long as `data.max_text_tokens` allows; a first token that a tokenizer adds is left out, and prompts are
  not counted beside the texts.
- The loss goes over a large vocabulary in chunks, of which one is counted whole: small batches take less.
- A small decoder has as many tokens as `language.small.vocab_size` says; one trained on little text has fewer.
- LLM.int8() is taken to make its weights anew for each product, as it does in the backward pass; on a CPU,
  bitsandbytes unpacks 4 bits through copies of a layer that are not seen.
- Pictures are encoded in every step, as without a feature store; sharding (--fsdp) and --compile are left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from git_model.architecture import PARTS
from git_model.cluster import rank_and_world
from git_model.config import Config
from git_model.datasets.files import RecordError
from git_model.datasets.order import GlobalSampler
from git_model.datasets.sources import Source, build_source
from git_model.errors import UserError
from git_model.rehearsal import Peaks, Record, Rehearsal, peak_memory
from git_model.training import parameter_count

__all__ = ["peak_memory", "plan"]

CARDS = (16, 32, 40, 80)  # GB
MARGIN, RESERVE = 0.1, 1e9  # of a memory left free: a share, and bytes
LARGEST = 1024  # batch that is looked at
LOOKED_AT = 16  # records, for how many pictures and texts one has


@dataclass(frozen=True)
class Outlook:
    """The peaks of a step in one place: here, or on a card.

    Args:
        name: of the place.
        off: without gradient checkpointing.
        on: with it.
        beside: bytes beside those at every size: the copies of gradients that several processes exchange.
    """

    name: str
    off: Peaks
    on: Peaks
    beside: int = 0

    def at(self, size: int) -> list[int]:
        """Return the peaks at a batch size in bytes, without and with checkpointing."""
        return [peaks.at(size) + self.beside for peaks in (self.off, self.on)]

    def fitting(self, memory: float) -> list[int]:
        """Return the largest powers of two, LARGEST at most, that fit a memory in bytes, without and with; 0 = none."""
        sizes = [2**i for i in range(LARGEST.bit_length())]
        return [max((s for s in sizes if self.at(s)[i] <= usable(memory)), default=0) for i in (0, 1)]


def usable(memory: float) -> float:
    """Return how many bytes of a memory tensors may take."""
    return (1 - MARGIN) * memory - RESERVE


def available_memory() -> tuple[str, int]:
    """Return what this machine's memory is called, and its bytes: the card's, else the RAM that is free."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return card.name, card.total_memory
    lines = _words(Path("/proc/meminfo")).splitlines()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    free += allowed_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return "this RAM", min(free or [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")])


def allowed_memory(groups: Path, tree: Path) -> list[int]:
    """Return the bytes that containers and cluster jobs still let this process have, for each limit there is.

    Args:
        groups: the file that says which control groups it is in.
        tree: folder of the groups, of version 2 or 1.
    """
    found = []
    for line in _words(groups).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, names = tree, ("memory.max", "memory.current", "inactive_file ")
        if kinds:
            top, names = tree / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        below = top / path.lstrip("/")
        for folder in (below, *(parent for parent in below.parents if parent.is_relative_to(top))):
            limit, used = (_words(folder / name).strip() for name in names[:2])
            if limit.isdecimal() and used.isdecimal():
                stat = _words(folder / "memory.stat").splitlines()
                cache = sum(int(word.split()[1]) for word in stat if word.startswith(names[2]))  # given up when needed
                found.append(int(limit) - int(used) + cache)
    return found


def _words(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def usual_record(config: Config, source: Source) -> Record:
    """Return the largest of some records spread over the data: pictures, and texts that a visit takes of them."""
    images = texts = 1
    for number in {i * len(source) // LOOKED_AT for i in range(LOOKED_AT)} if len(source) else ():
        try:
            sample = source[number]
        except (RecordError, OSError):
            continue  # a run counts it
        images, texts = max(images, len(sample.images)), max(texts, len(sample.targets))
    return Record(images, min(texts, config.data.targets or texts))


def steps_of_run(config: Config, images: int, world: int) -> tuple[int, int]:
    """Return the steps of an epoch and of the run that `images` records make on `world` processes."""
    options, kinds = config.train, {"seed": config.train.seed, "epochs": config.train.epochs, "world": world}
    sampler = GlobalSampler(images, options.batch_size, accumulation=options.accumulation, **kinds)
    return sampler.steps_per_epoch, options.epochs * sampler.steps_per_epoch


def plan(config: Config) -> str:
    """Return what a run will take, as lines of text: parameters, steps, memory, batch sizes that fit.

    Weights are not loaded (but an encoder's .pt file is read for its sizes), nothing is trained, nothing written.

    Raises:
        UserError: data or models that cannot be found or read, as in a run.
    """
    if config.regressor.type != "none":
        raise UserError("--plan reckons models that write text; a regressor is small beside its encoder: try it")
    source = build_source(config.data.train, config.data.dir)
    world, rehearsal = rank_and_world()[1], Rehearsal(config, usual_record(config, source))
    places = outlooks(rehearsal, world)
    parts = [told_parameters(rehearsal), told_steps(config, len(source), world), told_memory(rehearsal, places)]
    return "\n".join("\n".join(part) for part in (*parts, told_sizes(config, places), told_fits(config, places)))


def outlooks(rehearsal: Rehearsal, world: int) -> list[Outlook]:
    """Return the outlook on this machine and, where it has no card, that on cards."""
    kinds = {"this CPU": False, "a card": True}
    if torch.cuda.is_available() or rehearsal.config.train.precision == "fp16":  # which no CPU trains in
        del kinds["this CPU"]
    off = [rehearsal.peaks(False, card) for card in kinds.values()]
    on = [rehearsal.peaks(True, card) for card in kinds.values()]
    beside = off[0].gradients if world > 1 and not rehearsal.config.train.fsdp else 0
    return [Outlook(*place, beside) for place in zip(kinds, off, on, strict=True)]


def gigabytes(size: float) -> str:
    """Return bytes in GB of 10^9 bytes."""
    return f"{size / 1e9:,.2f} GB"


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines whose words stand under each other, the first to the left and the others to the right."""
    widths = [max(map(len, words)) for words in zip(*lines, strict=True)]
    aligned = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return ["  " + "  ".join(words).rstrip() for words in aligned]


def told_parameters(rehearsal: Rehearsal) -> list[str]:
    """Return the lines on the parts: parameters, bytes, what is trained."""
    config, model, lines = rehearsal.config, rehearsal.model, [("", "all", "trained", "memory", "")]
    names = {"vision": config.vision.name, "mapper": config.mapper.type, "language": config.language.name}
    for part in (*PARTS, ""):
        module = getattr(model, part) if part else model
        size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        counts = (f"{parameter_count(module):,}", f"{trained:,}")
        lines.append((part or "together", *counts, gigabytes(size), names.get(part, "")))
    return ["parameters", *columns(lines)]


def told_steps(config: Config, images: int, world: int) -> list[str]:
    """Return the lines on the data and the steps."""
    options, (epoch, total) = config.train, steps_of_run(config, images, world)
    made = f"batch {options.batch_size}, {options.accumulation} accumulated, {world} process{'es' * (world > 1)}"
    return [
        f"steps ({made})",
        f"  {images:,} images, {epoch:,} steps an epoch, {total:,} in {options.epochs} epochs",
    ]


def heads(places: Sequence[Outlook]) -> list[tuple[str, ...]]:
    """Return the two lines above figures without and with checkpointing in each place."""
    names = [name for place in places for name in ("on " + place.name, "")]
    return [("", *names), ("gradient checkpointing", *("off", "on") * len(places))]


def told_memory(rehearsal: Rehearsal, places: Sequence[Outlook]) -> list[str]:
    """Return the lines on where the memory of a step goes at the configured batch size."""
    config, record, size = rehearsal.config, rehearsal.record, rehearsal.config.train.batch_size
    peaks = [peaks for place in places for peaks in (place.off, place.on)]
    kept = {"weights": "weights", "gradients": "gradients", "optimiser's state": "state"}
    lines = [(name, *(gigabytes(getattr(p, key)) for p in peaks)) for name, key in kept.items()]
    rest = [p.at(size) - p.weights - p.gradients - p.state for p in peaks]
    lines.append(("activations, temporary", *map(gigabytes, rest)))
    if beside := places[0].beside:
        lines.append(("gradients exchanged", *[gigabytes(beside)] * len(peaks)))
    lines.append(("together", *(gigabytes(most) for place in places for most in place.at(size))))
    images, texts = record.images * rehearsal.model.num_image_tokens, f"{record.texts} text{'s' * (record.texts > 1)}"
    row = f"rows of {images} image tokens and {texts} of data.max_text_tokens {config.data.max_text_tokens}"
    return [f"most memory of a step (batch {size}, {config.train.precision}, {row})", *columns(heads(places) + lines)]


def told_sizes(config: Config, places: Sequence[Outlook]) -> list[str]:
    """Return the table of batch sizes, up to the first that no card holds."""
    sizes = sorted({config.train.batch_size, *(2**i for i in range(LARGEST.bit_length()))})
    rows = [(size, [most for place in places for most in place.at(size)]) for size in sizes]
    shown = [row for row in rows if min(row[1]) <= CARDS[-1] * 1e9 or row[0] == config.train.batch_size]
    lines = [(f"batch {size}", *map(gigabytes, figures)) for size, figures in shown]
    return ["most memory of a step, by batch", *columns(heads(places) + lines)]


def told_fits(config: Config, places: Sequence[Outlook]) -> list[str]:
    """Return the lines on the largest batches that fit, and what is suggested for this machine."""
    (name, memory), options = available_memory(), config.train
    here = places[0].fitting(memory)
    lines = [("gradient checkpointing", "off", "on"), (f"{name}, {gigabytes(memory)}", *map(told_size, here))]
    best = here[options.gradient_checkpointing]
    more = "" if options.gradient_checkpointing or here[1] <= best else f" ({here[1]} with --gradient_checkpointing)"
    advice = f"suggested here: {f'--bs {best}' if best else 'no batch fits'}{more}"
    if options.precision == "fp16" and not torch.cuda.is_available():
        del lines[1]
        advice = "suggested here: nothing, there is no card for --precision fp16"
    lines += [(f"a card of {card} GB", *map(told_size, places[-1].fitting(card * 1e9))) for card in CARDS]
    told = f"{MARGIN:.0%} and {gigabytes(RESERVE)} of a memory are left free for what is not counted"
    notes = ["kernels' workspace, libraries and data workers are not counted; cards are reckoned, not measured"]
    notes += ["--fsdp: each process holds its share of weights, gradients and state only"] * options.fsdp
    notes += ["--compile: not followed; compiled code mostly holds less"] * options.compile
    return [f"largest batch that fits, of powers of 2 ({told})", *columns(lines), advice, *notes]


def told_size(size: int) -> str:
    """Return a batch size as it is printed."""
    return "none" if not size else f"{size} or more" if size == LARGEST else str(size)

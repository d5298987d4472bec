"""Peak memory of a training step: what `train.py --plan` computes, and what a process then holds.

    python benchmarks/memory.py
    python benchmarks/memory.py --measure --batch 2 --json memory.json

Encoders and decoders of real shapes, the decoder frozen, bfloat16. `--measure` runs those that fit this machine's
memory, each in a process of its own that takes two steps (weights are not random: they are there for their size).
Measured is the most that the process held beyond what it had with its libraries loaded and used once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig

from git_model.config import Config
from git_model.hardware import peak_memory as process_peak
from git_model.hardware import reset_peak_memory
from git_model.models.git import GitModel
from git_model.models.skeleton import fill, skeleton
from git_model.optimizer import build_optimizer
from git_model.planning import available_memory, usable
from git_model.rehearsal import Ledger, Record, Rehearsal, full_batch, gradients, optimizer_step
from git_model.schema import from_dict

LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
OPT = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32}
DECODERS: dict[str, tuple[Any, int]] = {  # and bits
    "gpt2-large": (GPT2Config(n_embd=1280, n_layer=36, n_head=20, vocab_size=50257), 16),
    "opt-2.7b": (OPTConfig(**OPT, num_attention_heads=32, vocab_size=50272), 16),
    "llama-7b, 8 bits": (LlamaConfig(**LLAMA, vocab_size=32000), 8),
    "llama-7b, 4 bits": (LlamaConfig(**LLAMA, vocab_size=32000), 4),
}
ENCODERS = {
    "ViT-L/14 pooled": ({"name": "ViT-L/14", "features": "pooled"}, {"type": "mlp"}),
    "ViT-L/14 grid": ({"name": "ViT-L/14", "features": "grid"}, {"type": "linear"}),
}


def sections(encoder: str, decoder: str, folder: Path) -> dict[str, Any]:
    """Return the config of a pair as a dictionary; the decoder's config.json is written into `folder`."""
    shape, bits = DECODERS[decoder]
    vision, mapper = ENCODERS[encoder]
    place = folder / decoder.replace(", ", "-").replace(" ", "-")
    shape.save_pretrained(place)
    language = {"name": str(place), "bits": bits}
    return {"vision": vision, "mapper": mapper, "language": language, "train": {"precision": "bf16"}}


def measured(config: Config, batch: int, checkpointing: bool) -> int:
    """Take two steps on real tensors; return the bytes that this process grew by at most."""
    small = {"vision": {"name": "small"}, "mapper": {"type": "linear"}, "language": {"name": "small"}}
    warm_up = from_dict(Config, {**small, "train": {"precision": config.train.precision}})
    take_steps(real(warm_up), warm_up, 8)  # libraries take memory when they are used first
    model, device = skeleton(config), torch.device("cpu")
    gc.collect()
    reset_peak_memory(device)
    before = process_peak(device)
    real(config, model)
    if checkpointing:
        model.checkpoint_activations()
    reset_peak_memory(device)
    take_steps(model, config, batch)
    return process_peak(device) - before


def real(config: Config, model: GitModel | None = None) -> GitModel:
    """Return a model of real tensors with something in every weight: memory is a process's when it is written."""
    model = model or skeleton(config)
    fill(model, nullcontext())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01 if tensor.is_floating_point() else 1)
    return model.train()


def take_steps(model: GitModel, config: Config, batch: int) -> None:
    """Take two steps: from the second on the optimiser's state is there from the start."""
    optimizer = build_optimizer(model, config.train)
    for _ in range(2):
        gradients(model, full_batch(model, config, batch, Record()), config.train, Ledger(), card=False)
        optimizer_step(optimizer, Ledger())
        optimizer.zero_grad()


def in_a_process(values: dict[str, Any], batch: int, checkpointing: bool) -> int:
    """Return what `measured` says in a process of its own."""
    asked = json.dumps({"config": values, "batch": batch, "checkpointing": checkpointing})
    # glibc keeps what was freed of smaller blocks, and it would count as used
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "TOKENIZERS_PARALLELISM": "false"}
    line = [sys.executable, str(Path(__file__).resolve()), "--one", asked]
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def table(batch: int, measure: bool, limit: float) -> list[dict[str, Any]]:
    """Print a line for each pair, with and without checkpointing; return them."""
    lines: list[dict[str, Any]] = []
    print(f"GB of a step, batch {batch}, rows of all image tokens and 64 of text, bfloat16, frozen decoder")
    told = "   measured" if measure else ""
    print(f"{'encoder':<16} {'decoder':<17} {'checkpointing':<13}  on a card  on a CPU{told}")
    with tempfile.TemporaryDirectory() as name:
        for encoder in ENCODERS:
            for decoder in DECODERS:
                values = sections(encoder, decoder, Path(name))
                rehearsal = Rehearsal(from_dict(Config, values))
                for on in (False, True):
                    here, card = (rehearsal.peaks(on, card, batch).at(0) for card in (False, True))
                    line: dict[str, Any] = {"encoder": encoder, "decoder": decoder, "checkpointing": on}
                    line |= {"batch": batch, "cpu": here, "card": card}
                    if measure and here <= limit:
                        line["measured"] = in_a_process(values, batch, on)
                    lines.append(line)
                    show(line, measure)
    return lines


def show(line: dict[str, Any], measure: bool) -> None:
    """Print a line of the table."""
    got = line.get("measured")
    told = f" {got / 1e9:>10.2f} ({line['cpu'] / got - 1:+.1%})" if got else "          -" if measure else ""
    on = "on" if line["checkpointing"] else "off"
    figures = f"{line['card'] / 1e9:>9.2f} {line['cpu'] / 1e9:>9.2f}"
    print(f"{line['encoder']:<16} {line['decoder']:<17} {on:<13}  {figures}{told}", flush=True)


def main() -> None:
    """Print the table, or measure one line of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--measure", action="store_true", help="run what fits this machine, too")
    parser.add_argument("--limit", type=float, help="GB that a measured process may take; default: what is free")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        asked = json.loads(given.one)
        print(measured(from_dict(Config, asked["config"]), asked["batch"], asked["checkpointing"]))
        return
    limit = given.limit * 1e9 if given.limit else usable(available_memory()[1])
    lines = table(given.batch, given.measure, limit)
    if given.json:
        given.json.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What 8 and 4 bits of a frozen decoder cost and save: peak memory, images/s, loss, beside 16 bits (bfloat16).

Every line is a training process of its own (train.py, a random decoder, drawn pictures): the mapper alone, then LoRA.
`peak` is the card's memory, on a CPU that of the whole process from the first step on (loading takes more).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def save_decoder(folder: Path, architecture: str, width: int, depth: int) -> int:
    """Write a random decoder in bfloat16 with a byte tokenizer; return how many parameters it has."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

    from git_model.tokens import train_tokenizer

    torch.manual_seed(0)
    heads = width // 64
    ids = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0}
    body = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, **ids}
    config: Any = LlamaConfig(**body, intermediate_size=2 * width, max_position_embeddings=512)
    if architecture == "opt":
        config = OPTConfig(**body, ffn_dim=4 * width, word_embed_proj_dim=width, max_position_embeddings=512)
    if architecture == "gpt2":
        config = GPT2Config(n_embd=width, n_layer=depth, n_head=heads, n_positions=512, **ids)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    train_tokenizer([], 257).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def trained(folder: Path, bits: int, rank: int, batch: int, precision: str) -> dict[str, Any]:
    """Train a few steps in a process of its own; return what it says of them."""
    out = folder / f"{bits}-{rank}"
    shapes = {"type": "tsv", "images": "train.img.tsv", "captions": "train.caption.tsv"}
    line = [sys.executable, "train.py", "--output_dir", str(out), "-lm", str(folder / "decoder"), "-iet", "small"]
    line += ["--input_resolution", "64", "--output_grid", "True", "-mpt", "linear", "--data_dir", str(folder / "data")]
    line += ["--set", f"data.train=[{json.dumps(shapes)}]", "--set", f"data.val=[{json.dumps(shapes)}]"]
    line += ["--lm_bits", str(bits), "--lm_dtype", "bfloat16", "--precision", precision, "--workers", "0", "--bs"]
    line += [str(batch), "--epochs", "1", "-ws", "0", "--lr", "1e-3", "--log_every", "1", "--validate_samples", "1"]
    line += ["--max_text_tokens", "12"]  # what is validated runs to the end: random weights seldom stop
    line += ["--lora_rank", str(rank), "--freeze", "nothing"] if rank else []
    # glibc keeps what was freed of smaller blocks, and it would count as used
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    subprocess.run(line, cwd=ROOT, env=environment, check=True, capture_output=True)
    steps = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    report = json.loads((out / "run_report.json").read_text())
    rates = sorted(step["images_per_second"] for step in steps[1:])
    return {
        "bits": bits,
        "trained": f"LoRA {rank}" if rank else "mapper",
        "peak_mb": round(report["peak_memory_bytes"] / 1e6),
        "images_per_second": round(rates[len(rates) // 2], 2),
        "loss": [round(steps[0]["loss"], 3), round(steps[-1]["loss"], 3)],
    }


def main() -> None:
    """Print a line for each number of bits and each way of training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="llama", choices=["llama", "opt", "gpt2"])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = save_decoder(folder / "decoder", given.architecture, given.width, given.depth)
        task = f"{{'type': 'make_shapes', 'out_dir': '{folder / 'data'}', 'train': {given.images}, 'test': 2}}"
        subprocess.run([sys.executable, "inference.py", "-p", task], cwd=ROOT, check=True, capture_output=True)
        print(f"{parameters / 1e6:,.0f} million weights, {given.images // given.batch} steps of {given.batch} pictures")
        print("bits  trained   peak MB of 16 bits  images/s   loss, first and last step")
        for rank in (0, 8):
            for bits in (16, 8, 4):
                line = trained(folder, bits, rank, given.batch, given.precision)
                results.append(line)
                share = line["peak_mb"] / next(r["peak_mb"] for r in results if r["trained"] == line["trained"])
                rate, (first, last) = line["images_per_second"], line["loss"]
                told = f"{line['peak_mb']:>8,} {share:>10.0%} {rate:>9.2f}   {first:.3f} -> {last:.3f}"
                print(f"{bits:>4}  {line['trained']:<8} {told}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"parameters": parameters, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

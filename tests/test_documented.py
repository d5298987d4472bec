"""The original's commands as written, with small files in place of the big weights: CLIP, GPT-2, OPT, LLaMA, CC3M."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, captions, collator, png

import train
from git_model.architecture import MAPPER_FEATURES
from git_model.checkpoint import load_checkpoint, read_content
from git_model.config import Config
from git_model.errors import UserError
from git_model.flags import read_flags
from git_model.models.build import build_model
from git_model.models.openai_clip import _network
from git_model.schema import from_dict
from git_model.tasks.params import parse_params
from git_model.tasks.registry import run

TEXT = {"context_length": 8, "vocab_size": 50, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}
VISION = {
    "vit": {"vision_layers": 2, "vision_width": 64, "vision_patch_size": 16},
    "rn": {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None},
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parts a lab has: official-layout CLIP files, decoders in Hugging Face layout, CC3M."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shelf")
    for kind, sizes in VISION.items():
        clip = _network().CLIP(embed_dim=48, image_resolution=64, **sizes, **TEXT)
        torch.save(clip.state_dict(), folder / f"{kind}.pt")
    ids = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0}
    decoders: dict[str, Any] = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=128, **ids)),
        "opt": OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                word_embed_proj_dim=16,  # as opt-350m: the head is narrower than the body
                ffn_dim=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=128,
                **ids,
            )
        ),
        "llama": LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                pad_token_id=None,
                **ids,
            )
        ),
    }
    for name, model in decoders.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    data = folder / "conceptual"
    for split, file in (
        ("train", "Train_GCC-training.tsv"),
        ("val", "Validation_GCC-1.1.0-Validation.tsv"),
    ):
        (data / split).mkdir(parents=True)
        (data / file).write_text("".join(f"a picture number {i}\thttp://x/{i}\n" for i in range(8)), encoding="utf-8")
        for i in range(8):
            (data / split / f"{i:08d}.jpg").write_bytes(png(i, 80))
    return folder


COMMANDS = {
    "gpt2": "--epochs 1 --bs 4 -iet {0}/vit.pt -lm {0}/gpt2 -mpt mlp --lr 2e-5 -ws 5000 --output_dir {1}",
    "opt": "--epochs 1 --bs 4 -iet {0}/rn.pt -lm {0}/opt -mpt linearLn --output_grid True --lr 1e-4 -ws 1 "
    "--output_dir {1}",
    "llama": "--epochs 1 --bs 4 -iet {0}/vit.pt -lm {0}/llama --output_gird False -mpt mlp --lr 1e-5 -ws 5000 "
    "--output_dir {1}",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_originals_training_commands(shelf: Path, tmp_path: Path, name: str) -> None:
    command = (
        COMMANDS[name].format(shelf, tmp_path) + f" --data_dir {shelf}/conceptual --workers 0 --validate_samples 2"
    )
    assert train.main(shlex.split(command)) == 0
    assert (tmp_path / "model-000.pt").is_file()
    content = read_content(tmp_path / "model_latest.pt")
    assert {n.split(".")[0] for n in content["tensors"]} == {"vision", "mapper"}, "the frozen decoder is not saved"
    loaded = load_checkpoint(tmp_path / "model_latest.pt")
    assert loaded.model.frozen == ("language",)
    said = loaded.model.generate(collator(loaded.model, generate=True)([_asked(loaded.model.vision.resolution)]))
    assert len(said) == 1


def _asked(side: int) -> Any:
    from git_model.batch import Target
    from git_model.datasets.collate import Loaded

    return Loaded("x", (torch.zeros(3, side, side, dtype=torch.uint8),), (Target("", "", 0),))


def test_workers_and_torchrun(shelf: Path, tmp_path: Path, root: Path) -> None:
    launch = "-m torch.distributed.run --nnodes=1 --nproc_per_node=1 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0"
    command = (
        COMMANDS["gpt2"].format(shelf, tmp_path) + f" --data_dir {shelf}/conceptual --workers 2 --validate_samples 2"
    )
    done = subprocess.run(
        [sys.executable, *shlex.split(f"{launch} --local-addr=127.0.0.1 train.py {command}")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "language frozen" in done.stderr
    assert "warm-up of 5000 steps is longer than the run" in done.stderr


def test_the_originals_inference_command(shelf: Path, tmp_path: Path) -> None:
    command = (
        COMMANDS["gpt2"].format(shelf, tmp_path) + f" --data_dir {shelf}/conceptual --workers 0 --validate_samples 2"
    )
    assert train.main(shlex.split(command)) == 0
    text = f"""{{'type': 'test_git_inference_single_image', \\
      'image_path': '{shelf}/conceptual/val/00000000.jpg', \\
      'model_path': '{tmp_path}/model_latest.pt', \\
      'image_encoder_type': '{shelf}/vit.pt', \\
      'language_model': '{shelf}/gpt2', \\
      'mapping_type': 'mlp', \\
      'output_grid': False, \\
      'input_resolution': 64, \\
      'prompt': 'what is it?', \\
}}"""
    assert json.dumps(run(parse_params(text)))
    bare = tmp_path / "bare.pt"
    torch.save(read_content(tmp_path / "model_latest.pt")["tensors"], bare)
    said = run(parse_params(text.replace("model_latest.pt", "bare.pt")))
    assert said["text"] == run(parse_params(text))["text"], "a bare state dict, given its architecture"


@pytest.mark.parametrize(
    ("encoder", "features", "mapper"), itertools.product(VISION, ("pooled", "grid"), MAPPER_FEATURES), ids="-".join
)
def test_every_combination_trains_or_is_refused_when_the_config_is_read(
    shelf: Path, encoder: str, features: str, mapper: str
) -> None:
    """S13: the original runs 3 of 16 and its default crashes."""
    values = {
        "vision": {"name": str(shelf / f"{encoder}.pt"), "features": features},
        "mapper": {"type": mapper, "depth": 1, "heads": 2},
        "language": {"name": str(shelf / "gpt2")},
    }
    if features not in MAPPER_FEATURES[mapper]:
        with pytest.raises(UserError, match="choose"):
            from_dict(Config, values)
        return
    if mapper == "none":  # widths differ: said before anything runs
        with pytest.raises(UserError, match="wide"):
            build_model(from_dict(Config, values))
        return
    model = build_model(from_dict(Config, values)).train()
    side = model.vision.resolution
    batch = collator(model)([captions("a cat"), captions("two", seed=1)])
    batch = replace(batch, images=torch.zeros(2, 3, side, side).byte())
    loss = model(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.mapper.parameters())


def test_the_default_flags_run(shelf: Path, tmp_path: Path) -> None:
    """The original's defaults (linearLn on pooled features) crash in the original."""
    flags = f"-iet {shelf}/vit.pt -lm {shelf}/gpt2 --data_dir {shelf}/conceptual --output_dir {tmp_path} --workers 0"
    config, _ = read_flags([*shlex.split(flags), "--epochs", "1"])
    assert (config.mapper.type, config.vision.features) == ("linearLn", "pooled")
    assert train.main([*shlex.split(flags), "--epochs", "1"]) == 0


def test_parts_that_are_not_there(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--data_dir", str(shelf / "conceptual"), "--output_dir", str(tmp_path), "--workers", "0"]
    for flags, words in (
        (["-iet", "ViT-B/33", "-lm", str(shelf / "gpt2")], "ViT-B/32"),
        (["-iet", str(shelf / "vit.pt"), "-lm", "nobody/nothing"], "nobody/nothing"),
        (["-iet", str(shelf / "none.pt"), "-lm", str(shelf / "gpt2")], "none.pt"),
    ):
        assert train.main([*base, *flags]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error


def test_a_resnets_statistics_do_not_move(shelf: Path) -> None:
    values = {
        "vision": {"name": str(shelf / "rn.pt"), "features": "grid"},
        "mapper": {"type": "grid"},
        "language": {"name": str(shelf / "gpt2")},
    }
    model = build_model(from_dict(Config, values)).train()
    before = {n: b.clone() for n, b in model.vision.named_buffers()}
    model.encode(torch.full((2, 3, 64, 64), 255, dtype=torch.uint8))
    assert all(torch.equal(b, before[n]) for n, b in model.vision.named_buffers())
    assert any("running_mean" in n for n in before)


def test_a_frozen_decoder_follows_the_runs_precision(shelf: Path) -> None:
    parts = {"vision": {"name": str(shelf / "vit.pt")}, "language": {"name": str(shelf / "gpt2")}}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = build_model(from_dict(Config, parts | {"train": {"precision": precision}}))
        assert {p.dtype for p in model.language.parameters()} == {dtype}
        assert {p.dtype for p in model.vision.parameters()} | {p.dtype for p in model.mapper.parameters()} == {
            torch.float32
        }
    with pytest.raises(UserError, match="--precision fp16"):
        from_dict(Config, {"language": {"dtype": "float16"}})

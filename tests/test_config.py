"""One set of dataclasses for YAML, flags and checkpoints; typos are answered with the nearest name."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from git_model.config import Config
from git_model.errors import UserError
from git_model.flags import FLAGS, default_of, read_flags
from git_model.schema import from_dict, read_yaml, to_dict

DOCUMENTED = [
    "--epochs 5 --bs 32 -iet ViT-B/32 -lm gpt2-large -mpt mlp --lr 2e-5 -ws 5000 --output_dir checkpoints/vitb32_gpt2l",
    "--epochs 2 --bs 10 -iet ViT-B/16 -lm decapoda-research/llama-7b-hf --output_gird False -mpt mlp --lr 1e-5 "
    "-ws 5000 --output_dir checkpoints/vit-llama-8bit",
    "--data_dir ../data/conceptual --input_resolution 224 --output_grid -mpt linearLn --save_every 1000 "
    "--report_to_wandb",
]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_documented_commands_parse(command: str) -> None:
    config, _ = read_flags(command.split())
    assert from_dict(Config, to_dict(config)) == config, "a checkpoint gives the same config back"


def test_documented_flags_mean_what_they_say() -> None:
    first, second, third = (read_flags(command.split())[0] for command in DOCUMENTED)
    assert (first.vision.name, first.language.name, first.mapper.type) == ("ViT-B/32", "gpt2-large", "mlp")
    assert (first.train.lr, first.train.warmup, first.train.batch_size) == (2e-5, 5000, 32)
    assert second.vision.features == "pooled"
    assert (third.vision.features, third.train.report_to, third.train.save_every) == ("grid", "wandb", 1000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--epoch 5", ["--epoch", "--epochs"]),
        ("--bs x", ["train.batch_size", "'x'", "whole number"]),
        ("--bs 1.5", ["'1.5'"]),
        ("--bs 0", ["below 1"]),
        ("--lr nan", ["train.lr", "finite"]),
        ("-mpt mlpp", ["'mlp'", "linearLn"]),
        ("--output_grid True -mpt mlp", ["mlp", "--output_grid False"]),
        ("--output_grid perhaps", ["True or False", "perhaps"]),
        ("--freeze vison", ["'vision'"]),
        ("--precision fp8", ["fp8", "bf16"]),
        ("--set vision.smal.width=3", ["vision.smal", "small"]),
        ("--set vision", ["KEY=VALUE"]),
        ("--config /nowhere.yml", ["/nowhere.yml"]),
        ("--output_grid False --layers 3", ["--output_grid True"]),
        ("extra", ["extra"]),
    ],
)
def test_mistakes_are_named(arguments: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        read_flags(arguments.split())
    assert all(word in str(error.value) for word in words), error.value


def test_every_flag_names_a_key() -> None:
    for key, _ in FLAGS.values():
        default_of(key)


def test_recipes_parse(root: Path) -> None:
    recipes = sorted(root.glob("checkpoints/*/config.yml"))
    assert len(recipes) >= 3
    for recipe in recipes:
        config = from_dict(Config, read_yaml(recipe))
        assert config.train.output_dir == f"checkpoints/{recipe.parent.name}"


def test_yaml_that_is_no_recipe(tmp_path: Path) -> None:
    for text in ("- 1", "a: [", "vision: 3", "data: {train: 5}", "!!python/object/apply:os.getcwd []"):
        file = tmp_path / "r.yml"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError):
            read_flags(["--config", str(file)])


def test_a_typo_is_answered_in_under_a_second(root: Path) -> None:
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "train.py", "--epocs", "5"], cwd=root, capture_output=True, text=True)
        taken.append(time.perf_counter() - start)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "--epochs" in done.stderr
    assert min(taken) < 1


def test_help_teaches(root: Path) -> None:
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0
    for words in ("--prefix_attention", "ViT-L/14@336px", "torchrun", "[2e-05]"):
        assert words in done.stdout

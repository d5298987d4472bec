"""The command line of train.py: documented flags, each a name for one key of the config."""

from __future__ import annotations

import argparse
import math
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from git_model.config import Config
from git_model.errors import UserError, nearest
from git_model.schema import from_dict, read_bool, read_value, read_yaml

# flag names -> (key of the config, what it is). The first long name is shown in --help first.
FLAGS: dict[tuple[str, ...], tuple[str, str]] = {
    ("-iet", "--image_encoder_type"): (
        "vision.name",
        "RN50, RN101, RN50x4, RN50x16, RN50x64, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, a path to an "
        "official .pt, a Hugging Face vision model (id or directory), or 'small'",
    ),
    ("-lm", "--language_model"): ("language.name", "a Hugging Face causal LM (id or directory), or 'small'"),
    ("-mpt", "--mapping_type"): (
        "mapper.type",
        "linear, linearLn, mlp (pooled only), grid (grid only), transformer, mlp2x_gelu, None",
    ),
    ("--output_grid", "--output_gird"): (
        "vision.features",
        "True: one token a cell; False: the pooled vector",
    ),
    ("--layers",): ("vision.layers", "hidden layers of the encoder to join, e.g. -2 or 3,6,9,12"),
    ("--join",): ("vision.join", "concat, or mean: layers averaged behind a trained LayerNorm"),
    ("--region",): ("region.mode", "how boxes are read: roi, crop, query (Q-Former), prefix, ignore; none = no boxes"),
    ("--input_resolution",): ("vision.resolution", "pixels; default: the encoder's own"),
    ("--prefix_length",): ("mapper.tokens", "image tokens made by mlp and transformer"),
    ("--prefix_attention",): ("language.prefix_attention", "bidirectional (GIT) or causal"),
    ("--lm_dtype",): ("language.dtype", "of a frozen decoder: float32, float16, bfloat16"),
    ("--lm_bits",): ("language.bits", "of a frozen pretrained decoder: 16, 8 (LLM.int8()) or 4 (NF4)"),
    ("--lora_rank",): ("language.lora.rank", "of adapters trained on the frozen language model; 0 = none"),
    ("--lora_alpha",): ("language.lora.alpha", "an adapter's output is scaled by alpha / rank"),
    ("--lora_dropout",): ("language.lora.dropout", "on the adapters' input"),
    ("--lora_targets",): ("language.lora.targets", "layers, e.g. q_proj,v_proj or all-linear; default: the usual ones"),
    ("--regressor",): (
        "regressor.type",
        "none, head (picture -> vector of its prompt) or ensemble (vectors of several sources -> that vector)",
    ),
    ("--data_dir",): (
        "data.dir",
        "folder with Train_GCC-training.tsv, train/, ... or of the recipe's sources",
    ),
    ("--augment",): ("data.augment", "none, flip, dihedral, crop, crop+flip, crop+dihedral"),
    ("--decode",): ("data.decode", "exact, or scaled: JPEGs twice as fast, nearly the same pixels (training only)"),
    ("--group_by_length",): ("data.group_by_length", "sort texts by tokens within this many steps; 0 = off"),
    ("--feature_store",): ("data.feature_store", "folder for features of a frozen encoder: pictures are encoded once"),
    ("--feature_type",): ("data.feature_type", "of stored features: float16 or int8"),
    ("--targets",): ("data.targets", "captions or questions of an image per visit; 0 = all"),
    ("--max_text_tokens",): ("data.max_text_tokens", "longest target, EOS included"),
    ("--workers",): ("data.workers", "processes that read pictures; 0 = none"),
    ("--max_bad",): ("data.max_bad", "share of unusable samples that stops the run (exit code 3)"),
    ("--output_dir",): ("train.output_dir", "checkpoints, logs and the loss curve go here"),
    ("--epochs",): ("train.epochs", "passes over the data"),
    ("--bs", "--batch_size"): ("train.batch_size", "images per process and micro-batch"),
    ("--accumulation",): ("train.accumulation", "micro-batches per step"),
    ("--optimizer",): ("train.optimizer", "adamw or muon (for parts trained from nothing)"),
    ("--lr",): ("train.lr", "peak learning rate"),
    ("--lr_vision",): ("train.lr_vision", "of the encoder, when it differs"),
    ("--lr_mapper",): ("train.lr_mapper", "of the mapper, when it differs"),
    ("--lr_language",): ("train.lr_language", "of the language model, when it differs"),
    ("--layer_decay",): ("train.layer_decay", "a layer of the encoder learns this much slower than the one above it"),
    ("-ws", "--warmup_steps"): ("train.warmup", "steps of linear warm-up"),
    ("--schedule",): ("train.schedule", "linear, cosine or constant after the warm-up"),
    ("--weight_decay",): ("train.weight_decay", "of matrices only"),
    ("--clip",): ("train.clip", "gradient norm; 0 = off"),
    ("--label_smoothing",): ("train.label_smoothing", "GIT uses 0.1"),
    ("--freeze",): ("train.freeze", "auto, nothing, or parts: vision,mapper,language (of a regressor: vision,head)"),
    ("--precision",): ("train.precision", "fp32, fp16 (V100) or bf16 (A100 and newer)"),
    ("--gradient_checkpointing",): ("train.gradient_checkpointing", "less memory, more time"),
    ("--compile",): ("train.compile", "torch.compile the model"),
    ("--fsdp",): ("train.fsdp", "shard the weights over the processes (FSDP2): for models that do not fit one card"),
    ("--seed",): ("train.seed", "of weights, order and augmentation"),
    ("--log_every",): ("train.log_every", "steps between lines of metrics.jsonl"),
    ("--save_every",): ("train.save_every", "steps between saves; 0 = each epoch"),
    ("--validate_every",): ("train.validate_every", "steps between validations; 0 = each epoch"),
    ("--validate_samples",): ("train.validate_samples", "samples of a validation during training"),
    ("--init_from",): ("train.init_from", "checkpoint whose weights a new run starts from (its vocabulary, too)"),
    ("--resume",): ("train.resume", "auto (from the newest save that verifies) or no"),
    ("--keep",): ("train.keep", "saves that stay, at least 2"),
    ("--require_exact",): ("train.require_exact", "refuse to go on where the machine computes other bits"),
    ("--stop_before_end",): ("train.stop_before_end", "seconds before a SLURM job's end to save and leave"),
    ("--report_to",): ("train.report_to", "none, tensorboard or wandb"),
    ("--report_to_wandb",): ("train.report_to", "the original's flag for --report_to wandb"),
}
# flags that may stand alone, and what they then mean
BARE = {
    "--output_grid": "True",
    "--gradient_checkpointing": "True",
    "--compile": "True",
    "--fsdp": "True",
    "--require_exact": "True",
    "--report_to_wandb": "True",
}


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, in one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting with a usage page."""
        raise UserError(message)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return the flags' values; an unknown flag is told with the nearest one."""
        for word in argv:  # before what is missing: a typo is why it is
            flag = word.split("=")[0]
            if re.fullmatch(r"--?[A-Za-z]\w*", flag) and flag not in self._option_string_actions:
                raise UserError(
                    f"unknown flag '{flag}'{nearest(flag, self._option_string_actions)}; see {self.prog} -h"
                )
        known, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(f"'{unknown[0]}' belongs to no flag; see {self.prog} -h")
        return known


def number(low: float, high: float) -> Callable[[str], float]:
    """Return what reads a number of a flag, whole where `low` is, and holds it against its bounds."""
    kind: type = type(low)

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            words = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {words} from {low} to {high}, got '{text}'")
        return value

    return read


def build_parser() -> Parser:
    """Return the parser of train.py."""
    parser = Parser(
        prog="train.py",
        description="Train a vision encoder, a mapper and a language model to caption and answer.",
        epilog="Start on several GPUs with: torchrun --nproc_per_node=4 train.py ... "
        "Every key of a recipe can be set: --set language.small.width=256",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE.yml", help="a recipe; the other flags override it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe")
    parser.add_argument("--plan", action="store_true", help="print steps, memory and the batch that fits, then stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    for names, (key, text) in FLAGS.items():
        bare = BARE.get(next((n for n in names if n in BARE), ""))
        options: dict[str, Any] = {"nargs": "?", "const": bare} if bare else {}
        dest = names[-1] if names[-1] == "--report_to_wandb" else key
        text = f"{text} [{default_of(key)}]".replace("%", "%%")
        parser.add_argument(*names, dest=dest, default=argparse.SUPPRESS, metavar="X", help=text, **options)
    return parser


def default_of(key: str) -> Any:
    """Return the default value of a dotted key."""
    value: Any = Config()
    for name in key.split("."):
        value = getattr(value, name)
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def read_flags(argv: list[str]) -> tuple[Config, bool]:
    """Read the command line into a Config.

    Args:
        argv: the arguments, without the program's name.

    Returns:
        the config and whether --debug was given.

    Raises:
        UserError: unknown flag (with the nearest name), bad value, bad recipe.
    """
    known = build_parser().read(argv)
    values: dict[str, Any] = read_recipe(known.config) if known.config else {}
    for key, value in vars(known).items():
        if key == "--report_to_wandb":
            key, value = "train.report_to", "wandb" if read_bool(value, "--report_to_wandb") else "none"
        elif key == "vision.features":
            value = "grid" if read_bool(value, "--output_grid") else "pooled"
        if "." in key:
            _put(values, key, value)
    for assignment in known.set:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set wants KEY=VALUE, got '{assignment}'")
        _put(values, key, read_value(value, f"--set {key}"))
    return from_dict(Config, values), known.debug


# keys of the recipes of Gateway2745/Image-to-Prompts (ensemble_model.py's config-10k.yml) -> ours
ENSEMBLE_KEYS = {
    "num_layers": "regressor.depth",
    "num_heads": "regressor.heads",
    "seed": "train.seed",
    "batch_size": "train.batch_size",
    "learning_rate": "train.lr",
    "num_epochs": "train.epochs",
}
ENSEMBLE_DATA = ("exp_name", "num_examples", "embedding_paths", "gt_path", "train_fraction")


def read_recipe(path: str) -> dict[str, Any]:
    """Read a recipe: ours, or one of the published ensemble's, whose keys are its own.

    Raises:
        UserError: no such file, bad YAML, or keys of the published ensemble's that are unknown, missing or wrong.
    """
    values = read_yaml(path)
    if not {"embedding_paths", "gt_path", "exp_name"} & values.keys():
        return values
    allowed = [*ENSEMBLE_DATA, *ENSEMBLE_KEYS]
    for key in values:
        if key not in allowed:
            raise UserError(f"{path}: unknown key '{key}'{nearest(str(key), allowed)}; one of: {', '.join(allowed)}")
    if missing := [key for key in ("exp_name", "gt_path") if not isinstance(values.get(key), str)]:
        raise UserError(f"{path}: {missing[0]} must be a text")
    paths = values.get("embedding_paths")
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise UserError(f"{path}: embedding_paths must be a list of .npy files")
    names = [Path(p).stem for p in paths]
    if len(set(names)) < len(names):
        names = [f"source {number}" for number in range(1, len(paths) + 1)]
    entry = {"type": "vectors", "sources": dict(zip(names, paths, strict=True)), "truth": values["gt_path"]}
    entry |= {"fraction": float(read_number(values.get("train_fraction", 0.8), f"{path}: train_fraction"))}
    entry |= {"seed": read_whole(values.get("seed", 0), f"{path}: seed")}
    if values.get("num_examples") is not None:
        entry |= {"count": read_whole(values["num_examples"], f"{path}: num_examples")}
    recipe: dict[str, Any] = {
        "regressor": {"type": "ensemble"},
        "data": {"dir": ".", "workers": 0, "train": [entry | {"split": "train"}], "val": [entry | {"split": "val"}]},
        "train": {"output_dir": f"checkpoints/{values['exp_name']}", "schedule": "constant", "warmup": 100},
    }
    recipe["train"]["validate_samples"] = 2**31  # all of the rest, as there
    for key, ours in ENSEMBLE_KEYS.items():
        if key in values:
            _put(recipe, ours, values[key])
    return recipe


def read_whole(value: Any, where: str) -> int:
    """Return a whole number of a recipe; raises UserError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where} must be a whole number, got {value!r}")
    return value


def read_number(value: Any, where: str) -> float:
    """Return a number of a recipe; raises UserError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} must be a number, got {value!r}")
    return value


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UserError(f"'{key}': '{name}' holds no keys")
        values = inner
    values[last] = value


def read_command(argv: list[str] | None = None) -> tuple[Config, bool]:
    """Read `argv` (default: this process's) into a Config; see `read_flags`."""
    return read_flags(typing.cast(list[str], sys.argv[1:] if argv is None else argv))

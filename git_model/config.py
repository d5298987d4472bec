"""Every setting of a run, as frozen dataclasses; YAML, flags and checkpoints are read into the same ones.

An unknown key is an error with the nearest name; a value is checked once, here. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from git_model.errors import UserError, one_of

FEATURES = ("pooled", "grid")
PARTS = ("vision", "mapper", "language")
RESIZES = ("crop", "squash", "pad")
AUGMENTS = ("none", "flip", "dihedral", "crop", "crop+flip", "crop+dihedral")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# which features each mapper can read, and why not the others
MAPPER_FEATURES: dict[str, tuple[str, ...]] = {
    "none": FEATURES,
    "linear": FEATURES,
    "linearLn": FEATURES,
    "mlp": ("pooled",),
    "grid": ("grid",),
    "transformer": FEATURES,
    "mlp2x_gelu": FEATURES,
}
PAIR_ADVICE = {
    "mlp": "mapper 'mlp' makes its tokens from one pooled vector; choose --output_grid False with 'mlp', "
    "or with grid features one of: grid, linear, linearLn, mlp2x_gelu, transformer",
    "grid": "mapper 'grid' turns every cell into one token; choose --output_grid True with 'grid', "
    "or with pooled features one of: mlp, linear, linearLn, mlp2x_gelu, transformer",
}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _choice(what: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise one_of(what, got, allowed)


@dataclass(frozen=True)
class SmallVisionConfig:
    """The small encoder (``vision.name: small``), random weights."""

    stem: tuple[int, ...] = (32, 64, 128)
    """channels of the stride-2 convolutions: three of them turn 64 px into an 8 x 8 grid"""
    residual: int = 0
    """residual blocks of two 3x3 convolutions after each stem convolution but the first"""
    width: int = 128
    depth: int = 2
    heads: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(min(self.width, self.heads) >= 1, f"vision.small.width {self.width} or heads {self.heads} is below 1")
        _check(
            self.width % self.heads == 0,
            f"vision.small.width {self.width} is no multiple of heads {self.heads}",
        )
        _check(len(self.stem) >= 1, "vision.small.stem needs at least one convolution")
        _check(min(self.stem) >= 1, f"vision.small.stem {list(self.stem)} holds a width below 1")
        _check(self.depth >= 0, f"vision.small.depth {self.depth} is below 0")
        _check(0 <= self.dropout < 1, f"vision.small.dropout {self.dropout} is not in [0, 1)")


@dataclass(frozen=True)
class VisionConfig:
    """Which encoder, and which of its features."""

    name: str = "ViT-B/32"
    """an OpenAI CLIP name, a path to an official .pt, a Hugging Face id or directory, or 'small'"""
    features: str = "pooled"
    """'pooled': one vector an image; 'grid': one vector a cell"""
    layers: tuple[int, ...] = ()
    """several hidden layers joined along the channel, e.g. [-2] or [3, 6, 9, 12]; [] = the last"""
    resolution: int | None = None
    """input side in pixels; null = the encoder's own (else its position embedding is interpolated)"""
    small: SmallVisionConfig = field(default_factory=SmallVisionConfig)

    def __post_init__(self) -> None:
        _choice("vision.features", self.features, FEATURES)
        _check(
            self.features == "grid" or not self.layers,
            "vision.layers needs grid features (--output_grid True)",
        )
        _check(self.resolution is None or self.resolution >= 16, f"resolution {self.resolution} is below 16 px")


@dataclass(frozen=True)
class MapperConfig:
    """How image features become tokens of the language model."""

    type: str = "linearLn"
    tokens: int = 5
    """prefix length K of 'mlp' and 'transformer'"""
    depth: int = 8
    """layers of 'transformer' (ClipCap: 8)"""
    heads: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.type == "None":  # the original's spelling
            object.__setattr__(self, "type", "none")
        _choice("mapper.type (-mpt)", self.type, tuple(MAPPER_FEATURES))
        for name in ("tokens", "depth", "heads"):
            _check(getattr(self, name) >= 1, f"mapper.{name} {getattr(self, name)} is below 1")
        _check(0 <= self.dropout < 1, f"mapper.dropout {self.dropout} is not in [0, 1)")


@dataclass(frozen=True)
class SmallLanguageConfig:
    """The small decoder (``language.name: small``), random weights, its tokenizer trained on the data."""

    architecture: str = "gpt2"
    width: int = 128
    depth: int = 2
    heads: int = 4
    vocab_size: int = 1000
    positions: int = 512
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _choice("language.small.architecture", self.architecture, ("gpt2", "opt", "llama"))
        for name in ("width", "depth", "heads"):
            _check(getattr(self, name) >= 1, f"language.small.{name} {getattr(self, name)} is below 1")
        _check(self.vocab_size >= 257, f"language.small.vocab_size {self.vocab_size} is below 257 (bytes and the end)")
        _check(0 <= self.dropout < 1, f"language.small.dropout {self.dropout} is not in [0, 1)")
        _check(self.positions >= 16, f"language.small.positions {self.positions} is below 16")
        _check(
            self.width % self.heads == 0,
            f"language.small.width {self.width} is no multiple of heads {self.heads}",
        )


@dataclass(frozen=True)
class LanguageConfig:
    """Which causal language model, and how it attends to the image tokens."""

    name: str = "gpt2"
    """a Hugging Face id or directory, or 'small'"""
    prefix_attention: str = "causal"
    """'bidirectional': image tokens see each other (GIT); 'causal': the decoder's own mask"""
    dtype: str = "auto"
    """of a frozen decoder's weights: float32, float16, bfloat16; 'auto' follows train.precision.
    Trained parts are always float32"""
    small: SmallLanguageConfig = field(default_factory=SmallLanguageConfig)

    def __post_init__(self) -> None:
        _choice("language.prefix_attention", self.prefix_attention, ("causal", "bidirectional"))
        _choice("language.dtype", self.dtype, ("auto", *DTYPES.values()))


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes a batch."""

    dir: str = "../data/conceptual"
    """relative paths of the sources start here"""
    train: tuple[Mapping[str, Any], ...] = ({"type": "cc3m", "split": "train"},)
    val: tuple[Mapping[str, Any], ...] = ({"type": "cc3m", "split": "val"},)
    resize: str = "crop"
    """'crop': shorter side, then centre crop (CLIP's); 'squash': nothing lost; 'pad'"""
    augment: str = "none"
    targets: int = 1
    """captions or questions of an image per visit, drawn anew each epoch; 0 = all"""
    captions: int = 0
    """at most this many captions among the targets of a visit, where an image has questions too; 0 = no limit"""
    pack: bool = True
    """several targets of an image share its tokens in one row (each sees the image and itself only)"""
    max_text_tokens: int = 64
    """of a target, EOS included; longer ones are cut and counted"""
    max_prompt_tokens: int = 512
    workers: int = 4
    worker_timeout: int = 120
    """seconds without a batch until a hung worker is an error"""
    shuffle_block: int = 0
    """0: any record may follow any other; n: blocks of n records are drawn, and records within 16 of them at a time,
    so that reads from a network file system stay together (tar shards: their size)"""
    cache: bool = False
    """keep decoded pictures in memory (small sets)"""
    max_bad: float = 0.01
    """stop with exit code 3 when more than this share of the samples is unusable"""

    def __post_init__(self) -> None:
        _choice("data.resize", self.resize, RESIZES)
        _choice("data.augment", self.augment, AUGMENTS)
        _check(self.captions >= 0, f"data.captions {self.captions} is below 0")
        _check(self.shuffle_block >= 0, f"data.shuffle_block {self.shuffle_block} is below 0")
        _check(self.targets >= 0, f"data.targets {self.targets} is below 0")
        _check(self.max_text_tokens >= 2, f"data.max_text_tokens {self.max_text_tokens} is below 2")
        _check(0 <= self.max_bad <= 1, f"data.max_bad {self.max_bad} is no share between 0 and 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    output_dir: str = "checkpoints/run"
    epochs: int = 5
    batch_size: int = 32
    """images a process and micro-batch"""
    accumulation: int = 1
    optimizer: str = "adamw"
    """'adamw', or 'muon': Muon for matrices and convolutions, AdamW for the rest; learns faster from nothing"""
    lr: float = 2e-5
    lr_vision: float | None = None
    lr_mapper: float | None = None
    lr_language: float | None = None
    warmup: int = 5000
    """steps"""
    schedule: str = "linear"
    weight_decay: float = 0.01
    beta2: float = 0.999
    clip: float = 1.0
    """gradient norm; 0 = off"""
    label_smoothing: float = 0.0
    freeze: tuple[str, ...] = ("auto",)
    """'auto': the language model when it is pretrained (as the original); 'nothing'; or parts by name"""
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 0
    """steps between saves of model_latest.pt; 0 = at each epoch's end"""
    validate_every: int = 0
    """steps between validations; 0 = at each epoch's end"""
    validate_samples: int = 256
    max_bad_steps: int = 3
    """non-finite steps in a row until the run stops"""
    resume: str = "auto"
    """'auto': go on from the newest save in output_dir that verifies; 'no': start anew"""
    keep: int = 2
    """saves that stay, at least 2"""
    require_exact: bool = False
    """an error where the machine computes other bits than the one that saved (versions, threads, processes)"""
    stop_before_end: int = 120
    """seconds before a SLURM job's end at which to save and leave with exit code 75; 0 = at signals only"""
    report_to: str = "none"

    def __post_init__(self) -> None:
        for name in self.freeze:
            _choice("train.freeze", name, ("auto", "nothing", *PARTS))
        _choice("train.optimizer", self.optimizer, ("adamw", "muon"))
        _choice("train.schedule", self.schedule, ("linear", "cosine", "constant"))
        _choice("train.precision", self.precision, ("fp32", "fp16", "bf16"))
        _choice("train.resume", self.resume, ("auto", "no"))
        _choice("train.report_to", self.report_to, ("none", "tensorboard", "wandb"))
        for name in (
            "epochs",
            "batch_size",
            "accumulation",
            "log_every",
            "validate_samples",
            "max_bad_steps",
        ):
            _check(getattr(self, name) >= 1, f"train.{name} {getattr(self, name)} is below 1")
        for name in ("lr", "lr_vision", "lr_mapper", "lr_language"):
            rate = getattr(self, name)
            _check(rate is None or rate > 0, f"train.{name} {rate} is not above 0 (--freeze stops a part)")
        _check(self.keep >= 2, f"train.keep {self.keep} is below 2: one save alone is lost with one bad disk block")
        _check(self.stop_before_end >= 0, f"train.stop_before_end {self.stop_before_end} is below 0")
        _check(0 <= self.seed < 2**31, f"train.seed {self.seed} is not between 0 and {2**31 - 1}")
        _check(0 <= self.label_smoothing < 1, f"train.label_smoothing {self.label_smoothing} is not in [0, 1)")
        _check(self.warmup >= 0, f"train.warmup {self.warmup} is below 0")


@dataclass(frozen=True)
class Config:
    """A run: three parts of a model, its data, its training."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    mapper: MapperConfig = field(default_factory=MapperConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.vision.features not in MAPPER_FEATURES[self.mapper.type]:
            raise UserError(f"{PAIR_ADVICE[self.mapper.type]} (got {self.vision.features} features)")
        # gradients pass through a frozen half-precision decoder; without the scaler fp16 loses them
        if self.language.dtype == "float16" and self.train.precision != "fp16":
            raise UserError("language.dtype float16 needs --precision fp16 (its scaler); or choose --lm_dtype bfloat16")

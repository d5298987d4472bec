"""The settings that make a model: encoder, mapper, language model. What a run adds to them is in config.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from git_model.errors import UserError, one_of

FEATURES = ("pooled", "grid")
PARTS = ("vision", "mapper", "language")
REGRESSORS: dict[str, tuple[str, ...]] = {"none": PARTS, "head": ("vision", "head"), "ensemble": ("fusion", "head")}
ALL_PARTS = tuple(dict.fromkeys(part for parts in REGRESSORS.values() for part in parts))
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


def check(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def at_least_one(settings: Any, where: str, *names: str) -> None:
    """Raise UserError where one of the named numbers of some settings is below 1."""
    for name in names:
        check(getattr(settings, name) >= 1, f"{where}.{name} {getattr(settings, name)} is below 1")


def choice(what: str, got: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError where `got` is none of the allowed values; names the nearest."""
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
        check(min(self.width, self.heads) >= 1, f"vision.small.width {self.width} or heads {self.heads} is below 1")
        check(
            self.width % self.heads == 0,
            f"vision.small.width {self.width} is no multiple of heads {self.heads}",
        )
        check(len(self.stem) >= 1, "vision.small.stem needs at least one convolution")
        check(min(self.stem) >= 1, f"vision.small.stem {list(self.stem)} holds a width below 1")
        check(self.depth >= 0, f"vision.small.depth {self.depth} is below 0")
        check(0 <= self.dropout < 1, f"vision.small.dropout {self.dropout} is not in [0, 1)")


@dataclass(frozen=True)
class VisionConfig:
    """Which encoder, and which of its features."""

    name: str = "ViT-B/32"
    """an OpenAI CLIP name, a path to an official .pt, a Hugging Face id or directory, or 'small'"""
    features: str = "pooled"
    """'pooled': one vector an image; 'grid': one vector a cell"""
    layers: tuple[int, ...] = ()
    """several hidden layers, e.g. [-2] or [3, 6, 9, 12]; [] = the last"""
    join: str = "concat"
    """how several layers are joined: 'concat' along the channel, or 'mean', behind which a trained LayerNorm comes"""
    resolution: int | None = None
    """input side in pixels; null = the encoder's own (else its position embedding is interpolated)"""
    small: SmallVisionConfig = field(default_factory=SmallVisionConfig)

    def __post_init__(self) -> None:
        choice("vision.features", self.features, FEATURES)
        choice("vision.join", self.join, ("concat", "mean"))
        check(self.join == "concat" or bool(self.layers), "vision.join mean needs vision.layers (--layers 10,20,30)")
        check(
            self.features == "grid" or not self.layers,
            "vision.layers needs grid features (--output_grid True)",
        )
        check(self.resolution is None or self.resolution >= 16, f"resolution {self.resolution} is below 16 px")


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
        choice("mapper.type (-mpt)", self.type, tuple(MAPPER_FEATURES))
        at_least_one(self, "mapper", "tokens", "depth", "heads")
        check(0 <= self.dropout < 1, f"mapper.dropout {self.dropout} is not in [0, 1)")


REGION_MODES = ("none", "roi", "crop", "query", "prefix", "ignore")


@dataclass(frozen=True)
class RegionConfig:
    """How a box in a picture is read."""

    mode: str = "none"
    """'none': a box is an error; 'roi': the grid under it, pooled, and its corners; 'crop': cut out and encoded by
    itself; 'query': queries and corners ask the grid (Click4Caption's Q-Former); 'prefix': all of the grid and the
    corners; 'ignore': whole pictures whatever the box, the baseline that shows whether boxes are used"""
    cells: int = 3
    """n of roi's n x n cells"""
    queries: int = 32
    """of 'query': tokens a region takes"""
    width: int = 768
    """of 'query'"""
    depth: int = 12
    """layers of 'query'; every second one looks at the picture"""
    heads: int = 12
    warm_start: str | None = None
    """of 'query': folder of a BLIP-2 or BERT model in Hugging Face's layout, whose layers it starts from"""

    def __post_init__(self) -> None:
        choice("region.mode (--region)", self.mode, REGION_MODES)
        at_least_one(self, "region", "cells", "queries", "width", "depth", "heads")
        check(self.width % self.heads == 0, f"region.width {self.width} is no multiple of heads {self.heads}")
        check(self.width % 2 == 0, f"region.width {self.width} is not even")
        told = f"region.warm_start is for --region query, not {self.mode}"
        check(self.warm_start is None or self.mode == "query", told)

    @property
    def takes_boxes(self) -> bool:
        """Whether the model is given boxes, beside pictures."""
        return self.mode in ("roi", "query", "prefix")


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
        choice("language.small.architecture", self.architecture, ("gpt2", "opt", "llama"))
        at_least_one(self, "language.small", "width", "depth", "heads")
        check(self.vocab_size >= 257, f"language.small.vocab_size {self.vocab_size} is below 257 (bytes and the end)")
        check(0 <= self.dropout < 1, f"language.small.dropout {self.dropout} is not in [0, 1)")
        check(self.positions >= 16, f"language.small.positions {self.positions} is below 16")
        check(
            self.width % self.heads == 0,
            f"language.small.width {self.width} is no multiple of heads {self.heads}",
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA), trained on a frozen pretrained language model."""

    rank: int = 0
    """of the adapters; 0 = none"""
    alpha: float = 16.0
    """what an adapter adds is multiplied by alpha / rank"""
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """names of the layers that get one, e.g. [q_proj, v_proj], or [all-linear]; [] = the family's usual ones"""

    def __post_init__(self) -> None:
        check(self.rank >= 0, f"language.lora.rank {self.rank} is below 0")
        idle = self.rank == 0 and (self.targets or self.dropout or self.alpha != LoraConfig.alpha)
        check(not idle, "language.lora.alpha, dropout and targets (--lora_...) do nothing without --lora_rank")
        check(self.alpha > 0, f"language.lora.alpha {self.alpha} is not above 0")
        check(0 <= self.dropout < 1, f"language.lora.dropout {self.dropout} is not in [0, 1)")


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
    bits: int = 16
    """of a frozen pretrained decoder's weights: 16 (what `dtype` says), 8 (LLM.int8()) or 4 (NF4, double quantised)"""
    int8: str = "auto"
    """how 8-bit weights are multiplied: 'llm.int8' (compute capability 7.5 and up; a CPU imitates it), 'dequantised'
    on the fly (anywhere, a V100 too), or 'auto': the first where the card has it"""
    lora: LoraConfig = field(default_factory=LoraConfig)
    small: SmallLanguageConfig = field(default_factory=SmallLanguageConfig)

    def __post_init__(self) -> None:
        check(self.bits in (16, 8, 4), f"language.bits (--lm_bits) {self.bits} is not one of: 16, 8, 4")
        choice("language.int8", self.int8, ("auto", "llm.int8", "dequantised"))
        if self.name == "small":
            told = "is for pretrained language models; 'small' starts from nothing"
            check(self.bits == 16, f"--lm_bits {self.bits} {told}")
            check(not self.lora.rank, f"--lora_rank {self.lora.rank} {told}")
        choice("language.prefix_attention", self.prefix_attention, ("causal", "bidirectional"))
        choice("language.dtype", self.dtype, ("auto", *DTYPES.values()))


@dataclass(frozen=True)
class RegressorConfig:
    """A model whose answer is a vector, that of the prompt's text, in place of mapper and language model."""

    type: str = "none"
    """'none': the model writes text; 'head': picture -> encoder -> vector; 'ensemble': features of several sources ->
    transformer -> vector (its data are of type 'vectors')"""
    text_encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """whose vectors of the texts are the answers; a sentence-transformers id or folder"""
    dim: int = 384
    """numbers of a vector"""
    hidden: int = 0
    """of 'head': width of a layer between; 0 = none"""
    width: int = 512
    """of 'ensemble', as depth, heads and dropout"""
    depth: int = 3
    heads: int = 8
    dropout: float = 0.1
    sources: Mapping[str, Any] = field(default_factory=dict)
    """of 'ensemble': names and widths, in order; {} = as they are in the data"""

    def __post_init__(self) -> None:
        choice("regressor.type (--regressor)", self.type, tuple(REGRESSORS))
        at_least_one(self, "regressor", "dim", "width", "depth", "heads")
        check(self.hidden >= 0, f"regressor.hidden {self.hidden} is below 0")
        check(self.width % self.heads == 0, f"regressor.width {self.width} is no multiple of heads {self.heads}")
        check(0 <= self.dropout < 1, f"regressor.dropout {self.dropout} is not in [0, 1)")
        for name, width in self.sources.items():
            told = f"regressor.sources.{name} {width!r} is no width, a whole number above 0"
            check(isinstance(width, int) and not isinstance(width, bool) and width > 0, told)

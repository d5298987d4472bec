"""Every setting of a run, as frozen dataclasses; YAML, flags and checkpoints are read into the same ones.

An unknown key is an error with the nearest name; a value is checked once, here. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from git_model.architecture import (
    ALL_PARTS,
    MAPPER_FEATURES,
    PAIR_ADVICE,
    REGRESSORS,
    LanguageConfig,
    MapperConfig,
    RegionConfig,
    RegressorConfig,
    VisionConfig,
    at_least_one,
    check,
    choice,
)
from git_model.errors import UserError

RESIZES = ("crop", "squash", "pad")
AUGMENTS = ("none", "flip", "dihedral", "crop", "crop+flip", "crop+dihedral")
DECODES = ("exact", "scaled")
FEATURE_TYPES = ("float16", "int8")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes a batch."""

    dir: str = "../data/conceptual"
    """relative paths of the sources start here"""
    train: tuple[Mapping[str, Any], ...] = ({"type": "cc3m", "split": "train"},)
    val: tuple[Mapping[str, Any], ...] = ({"type": "cc3m", "split": "val"},)
    weights: tuple[float, ...] = ()
    """of the `train` sources, e.g. [5, 1, 3]: their shares of an epoch; [] = every record once an epoch"""
    resize: str = "auto"
    """'crop': shorter side, then centre crop (CLIP's); 'squash': nothing lost; 'pad'; 'auto': 'squash' with --region,
    else 'crop'"""
    augment: str = "none"
    decode: str = "exact"
    """of training pictures; 'scaled': JPEGs twice as fast, decoded at 1/2, 1/4 or 1/8 where that is plenty, resampled
    by torch; datasets/jpeg.py tells how far that is from 'exact'"""
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
    group_by_length: int = 0
    """n: the samples of n steps are sorted by the tokens of their texts, so that a batch is hardly padded; 0 = not"""
    cache: bool = False
    """keep decoded pictures in memory (small sets)"""
    feature_store: str | None = None
    """a folder, shared by all processes: a frozen encoder's features of every picture are made once, before the first
    step, and read from there; epochs then touch neither pictures nor encoder"""
    feature_type: str = "float16"
    """of the stored features; 'int8' takes half (a scale a token; the error is told)"""
    max_bad: float = 0.01
    """stop with exit code 3 when more than this share of the samples is unusable"""

    def __post_init__(self) -> None:
        choice("data.resize", self.resize, ("auto", *RESIZES))
        choice("data.augment", self.augment, AUGMENTS)
        choice("data.decode", self.decode, DECODES)
        choice("data.feature_type", self.feature_type, FEATURE_TYPES)
        told = (
            f"data.weights {list(self.weights)} has to be a number above 0 for each of {len(self.train)} train sources"
        )
        check(not self.weights or (len(self.weights) == len(self.train) and min(self.weights) > 0), told)
        check(not self.weights or not self.shuffle_block, "data.weights does not go with data.shuffle_block")
        check(self.captions >= 0, f"data.captions {self.captions} is below 0")
        check(self.shuffle_block >= 0, f"data.shuffle_block {self.shuffle_block} is below 0")
        check(self.group_by_length >= 0, f"data.group_by_length {self.group_by_length} is below 0")
        check(self.targets >= 0, f"data.targets {self.targets} is below 0")
        check(self.max_text_tokens >= 2, f"data.max_text_tokens {self.max_text_tokens} is below 2")
        check(0 <= self.max_bad <= 1, f"data.max_bad {self.max_bad} is no share between 0 and 1")


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
    layer_decay: float = 1.0
    """a layer of the image encoder learns at this times the rate of the one above it; 1 = all alike"""
    warmup: int = 5000
    """steps"""
    schedule: str = "linear"
    weight_decay: float = 0.01
    beta2: float = 0.999
    clip: float = 1.0
    """gradient norm; 0 = off"""
    label_smoothing: float = 0.0
    freeze: tuple[str, ...] = ("auto",)
    """'auto': the language model when it is pretrained (as the original); 'nothing'; or parts by name. Under adapters
    the language model is frozen in any case"""
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    """weights sharded over the processes (FSDP2), for language models that do not fit one card"""
    seed: int = 0
    log_every: int = 10
    save_every: int = 0
    """steps between saves of model_latest.pt; 0 = at each epoch's end"""
    validate_every: int = 0
    """steps between validations; 0 = at each epoch's end"""
    validate_samples: int = 256
    max_bad_steps: int = 3
    """non-finite steps in a row until the run stops"""
    init_from: str | None = None
    """a checkpoint of the same parts whose weights a new run starts from; its own saves go before it"""
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
            choice("train.freeze", name, ("auto", "nothing", *ALL_PARTS))
        choice("train.optimizer", self.optimizer, ("adamw", "muon"))
        choice("train.schedule", self.schedule, ("linear", "cosine", "constant"))
        choice("train.precision", self.precision, ("fp32", "fp16", "bf16"))
        choice("train.resume", self.resume, ("auto", "no"))
        choice("train.report_to", self.report_to, ("none", "tensorboard", "wandb"))
        at_least_one(
            self, "train", "epochs", "batch_size", "accumulation", "log_every", "validate_samples", "max_bad_steps"
        )
        for name in ("lr", "lr_vision", "lr_mapper", "lr_language"):
            rate = getattr(self, name)
            check(rate is None or rate > 0, f"train.{name} {rate} is not above 0 (--freeze stops a part)")
        check(0 < self.layer_decay <= 1, f"train.layer_decay {self.layer_decay} is not in (0, 1]")
        check(self.keep >= 2, f"train.keep {self.keep} is below 2: one save alone is lost with one bad disk block")
        check(self.stop_before_end >= 0, f"train.stop_before_end {self.stop_before_end} is below 0")
        check(0 <= self.seed < 2**31, f"train.seed {self.seed} is not between 0 and {2**31 - 1}")
        check(0 <= self.label_smoothing < 1, f"train.label_smoothing {self.label_smoothing} is not in [0, 1)")
        check(self.warmup >= 0, f"train.warmup {self.warmup} is below 0")


@dataclass(frozen=True)
class Config:
    """A run: the parts of a model, how they read boxes, its data, its training."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    mapper: MapperConfig = field(default_factory=MapperConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    regressor: RegressorConfig = field(default_factory=RegressorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.vision.features not in MAPPER_FEATURES[self.mapper.type]:
            raise UserError(f"{PAIR_ADVICE[self.mapper.type]} (got {self.vision.features} features)")
        self._check_regressor()
        frozen = set(self.train.freeze) & {"auto", "language"}
        if self.language.lora.rank and "language" in frozen:
            raise UserError("--lora_rank trains adapters on a frozen language model: leave 'language' out of --freeze")
        if self.language.bits < 16 and not self.language.lora.rank and not frozen:
            raise UserError(
                f"weights of {self.language.bits} bits cannot be trained: --lora_rank 8 trains adapters on them, "
                "--freeze auto leaves them as they are"
            )
        if self.data.resize == "auto":
            resize = "crop" if self.region.mode == "none" else "squash"  # a centre crop would cut boxes off
            object.__setattr__(self, "data", replace(self.data, resize=resize))
        if self.region.takes_boxes:
            told = f"--region {self.region.mode} reads boxes in a grid of features: give --output_grid True"
            check(self.vision.features == "grid", told)
        if self.data.feature_store is not None:
            told = f"--region {self.region.mode} needs the size of every picture, which --feature_store does not open"
            check(self.region.mode == "none", f"{told}; leave one of them out")
            told = "--feature_store keeps what a frozen encoder says of every picture"
            check("vision" in self.train.freeze, f"{told}: freeze it, e.g. --freeze vision,auto")
            check(self.data.augment == "none", f"{told}, once: leave out --augment {self.data.augment}")
        if self.train.fsdp:
            clash = [("--lm_bits 8 or 4", self.language.bits < 16), ("--compile", self.train.compile)]
            clash += [("--optimizer muon", self.train.optimizer == "muon")]
            for name, given in clash:
                check(not given, f"--fsdp cannot go with {name}; leave one of them out")
        # gradients pass through a frozen half-precision decoder; without the scaler fp16 loses them
        if self.language.dtype == "float16" and self.train.precision != "fp16":
            raise UserError("language.dtype float16 needs --precision fp16 (its scaler); or choose --lm_dtype bfloat16")

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the model's parts."""
        return REGRESSORS[self.regressor.type]

    def _check_regressor(self) -> None:
        """Raise UserError where a setting belongs to another kind of model."""
        kind, data, train = self.regressor.type, self.data, self.train
        for name in train.freeze:
            told = f"--freeze {name}: this model's parts are {', '.join(self.parts)}"
            check(name in ("auto", "nothing", *self.parts), told)
        if kind == "none":
            told = "settings of 'regressor' do nothing without its type: --regressor head or --regressor ensemble"
            check(self.regressor == RegressorConfig(), told)
            return
        others = {"mapper": MapperConfig(), "language": LanguageConfig(), "region": RegionConfig()}
        given = [name for name, usual in others.items() if getattr(self, name) != usual]
        given += [f"data.{n}" for n in ("group_by_length", "captions") if getattr(data, n)]
        switched = ("fsdp", "gradient_checkpointing", "label_smoothing", "lr_mapper", "lr_language")
        given += [f"train.{n}" for n in switched if getattr(train, n)]
        plain, foreign = RegressorConfig(), {"head": ("width", "depth", "heads", "dropout", "sources")}
        unread = foreign.get(kind, ("hidden",))
        given += [f"regressor.{n}" for n in unread if getattr(self.regressor, n) != getattr(plain, n)]
        told = "data.train is given and data.val is not: name what a validation looks at, e.g. the same with split: val"
        check(data.train == DataConfig().train or data.val != DataConfig().val, told)
        if kind == "ensemble":
            given += ["vision"] * (self.vision != VisionConfig()) + ["data.augment"] * (data.augment != "none")
            given += [f"data.{n}" for n in ("feature_store", "cache") if getattr(data, n)]
            given += ["train.lr_vision"] * (train.lr_vision is not None)
            given += ["train.layer_decay"] * (train.layer_decay != 1)
        check(not given, f"--regressor {kind} has nothing to do with: {', '.join(given)}; leave out these settings")

"""VisionEncoder: pictures -> features, by OpenAI CLIP, any Hugging Face vision model, or the small encoder.

(I,3,H,W) uint8 -> normalise -> (I,3,H,W) float -> forward -> (I,1,D) pooled | (I,N,D) grid
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from git_model.architecture import VisionConfig
from git_model.errors import UserError, one_of
from git_model.models import openai_clip
from git_model.models import small_vision as shared
from git_model.models.hub import check_name, quiet_transformers
from git_model.models.small_vision import EncoderPlan, Stats, VisionFacts, brief, first

log = logging.getLogger(__name__)

# openai-clip's clip.py, _transform; the others are the image processors' defaults in transformers
CLIP_STATS: Stats = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_STATS: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
USUAL_STATS = {"clip": CLIP_STATS, **dict.fromkeys(("siglip", "siglip2", "vit", "beit"), shared.HALF_STATS)}


class VisionEncoder(nn.Module):
    """An image encoder that answers questions about itself.

    Args:
        tower: (I,3,H,W) -> (I,N,D).
        config: for `.name` and `.features`.
        facts: for `.dim`, `.num_tokens` and `.resolution`.
        stats: for `.mean` and `.std`.
        pretrained: whether the weights came from the encoder's own file, so that its name brings them back.
    """

    def __init__(
        self, tower: nn.Module, config: VisionConfig, facts: VisionFacts, stats: Stats, pretrained: bool
    ) -> None:
        super().__init__()
        self.tower = tower
        self.name, self.features, self.pretrained = config.name, config.features, pretrained
        self.averaged = len(config.layers) if config.join == "mean" else 1  # layers that one vector is the mean of
        self.dim, self.num_tokens, self.resolution = facts.dim // self.averaged, facts.num_tokens, facts.resolution
        self.mean, self.std = stats
        for name, values in zip(("pixel_mean", "pixel_std"), stats, strict=True):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Turn (I,3,H,W) uint8 pictures into the encoder's input, in the dtype of its parameters."""
        if images.dtype != torch.uint8:
            raise ValueError(f"pictures are uint8, not {images.dtype}")
        mean, std = self.get_buffer("pixel_mean").float(), self.get_buffer("pixel_std").float()  # (3,1,1)
        return ((images - mean) / std).to(next(self.parameters()).dtype)  # (I,3,H,W)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (I,N,D) of normalised images (I,3,H,W); N = 1 when pooled."""
        if len(images) == 0:  # which transformers cannot reshape
            return images.new_zeros(0, self.num_tokens, self.dim)
        features = self.tower(images)  # (I,N,D), or (I,N,layers*D)
        return features if self.averaged == 1 else features.unflatten(2, (self.averaged, -1)).mean(2)  # (I,N,D)


def build_vision(config: VisionConfig, load_weights: bool = True) -> VisionEncoder:
    """Build the encoder of `config`, in evaluation mode, float32.

    Args:
        config: what to build; its combinations are checked before any weights are read.
        load_weights: False leaves random weights (a checkpoint brings them); nothing is fetched then.

    Raises:
        UserError: an unknown name, a file that is missing, damaged or another model's, a layer or a
            resolution the encoder does not have.
    """
    plan = _plan(config)
    load = load_weights and config.name != "small"
    tower = plan.load() if load else plan.make()
    for name, parameter in tower.named_parameters():
        if name in plan.unread:  # no gradient would reach it, at which DDP stops
            parameter.requires_grad_(False)
    return VisionEncoder(tower, config, plan.facts, plan.stats, load).eval()


def vision_facts(config: VisionConfig) -> VisionFacts:
    """Return what `build_vision(config)` would give, without its weights; raises the same errors."""
    return _plan(config).facts


def _plan(config: VisionConfig) -> EncoderPlan:
    """Find out which kind of encoder the name means."""
    name = config.name
    if name == "small":
        return shared.small_plan(config)
    if name in openai_clip.ARCHITECTURES or Path(name).is_file() or name.endswith((".pt", ".pth")):
        return _openai_plan(config)
    # 'ViT-B/31' has the form of a Hugging Face id and is a typing error
    if Path(name).is_dir() or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not re.match(r"(?i)RN\d|ViT-", name)):
        return _hf_plan(config)
    kinds = ["small", "a .pt file", "a folder", "a Hugging Face id (owner/name)"]
    raise one_of("image encoder", name, [*openai_clip.ARCHITECTURES, *kinds])


def _openai_plan(config: VisionConfig) -> EncoderPlan:
    name, state = config.name, None
    arch = openai_clip.ARCHITECTURES.get(name)
    if arch is None:
        state = openai_clip.read_weights(Path(name))
        arch = openai_clip.architecture_of(state, Path(name))
    side = shared.input_side(config, arch.resolution, arch.patch or 32)
    layers = shared.layer_numbers(config, arch.num_layers)

    def make() -> openai_clip.OpenAITower:
        return openai_clip.OpenAITower(arch, side, config.features, layers)

    def load() -> nn.Module:
        weights = state
        if weights is None:
            path = openai_clip.fetch(name)
            weights = openai_clip.read_weights(path)
            openai_clip.architecture_of(weights, path)
        with torch.device("meta"):
            tower = make()
        openai_clip.load_tower(tower, weights, name)
        return tower

    return EncoderPlan(make, load, VisionFacts(*arch.features(side, config.features, layers), side), CLIP_STATS)


class HFTower(nn.Module):
    """Features of a Hugging Face vision model.

    Pooled is the first there is of: projected embedding (CLIP), the model's pooled output, class token, mean.
    Grid is the last hidden state, normed, without class and register tokens, or the flattened feature map.

    Args:
        model: the model; gets `interpolate_pos_encoding` when an image is not of its own side.
        features: 'pooled' or 'grid'.
        layers: raw outputs of these layers (1-based), joined along D, instead of the last.
    """

    def __init__(self, model: Any, features: str, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.features, self.layers = model, features, layers
        self.patch = first(getattr(model.config, "patch_size", None))
        self.own = first(getattr(model.config, "image_size", None))
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters

    def forward(self, images: Tensor) -> Tensor:
        """Return (I,1,D) pooled or (I,N,D) grid features of normalised images (I,3,H,W)."""
        out = self.model(**self._inputs(images), output_hidden_states=bool(self.layers))
        last = out.last_hidden_state  # (I,T,D) or (I,D,h,w)
        if last.ndim == 4:
            return self._from_maps(out, last)
        cells = math.prod(s // self.patch for s in images.shape[-2:]) if self.patch else last.shape[1]
        extra = max(last.shape[1] - cells, 0)  # class and register tokens come first
        if self.features == "pooled":
            return self._pooled(out, last[:, 0] if extra else last.mean(dim=1))
        if self.layers:
            return torch.cat([out.hidden_states[i] for i in self.layers], dim=-1)[:, extra:]  # (I,N,D)
        if self.model.config.model_type == "clip_vision_model":
            last = self.model.post_layernorm(last)  # (I,T,D); CLIP itself norms the class token only
        return last[:, extra:]  # (I,N,D)

    def _pooled(self, out: Any, otherwise: Tensor) -> Tensor:
        for name in ("image_embeds", "pooler_output"):
            if out.get(name) is not None:
                return out[name].reshape(len(otherwise), 1, -1)  # (I,1,D)
        return otherwise[:, None]  # (I,1,D)

    def _from_maps(self, out: Any, last: Tensor) -> Tensor:
        if self.features == "pooled":
            return self._pooled(out, last.mean(dim=(2, 3)))
        maps = [out.hidden_states[i] for i in self.layers] or [last]
        return shared.join_maps(maps, (last.shape[2], last.shape[3]))  # (I,N,D)

    def _inputs(self, images: Tensor) -> dict[str, Any]:
        if self.model.config.model_type == "siglip2_vision_model":  # NaFlex: takes patches, rows of (h,w,3)
            rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
            x = images.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch))  # (I,3,r,p,c,p)
            x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (I,N,p*p*3)
            shapes = torch.tensor([[rows, columns]] * len(x), device="cpu")  # (I,2); read as numbers
            return {"pixel_values": x, "spatial_shapes": shapes, "pixel_attention_mask": None}
        if self.interpolates and images.shape[-1] != self.own:
            return {"pixel_values": images, "interpolate_pos_encoding": True}
        return {"pixel_values": images}


def _hf_class(config: VisionConfig) -> tuple[Any, Any, str]:
    """Return (model class, its config, model type) of a Hugging Face id or folder."""
    from transformers import MODEL_MAPPING, AutoConfig, CLIPVisionModelWithProjection

    check_name(config.name, "image encoder")
    try:
        full = AutoConfig.from_pretrained(config.name, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot load the image encoder '{config.name}': {brief(error)}") from error
    inner = copy.deepcopy(getattr(full, "vision_config", full))
    names = getattr(full, "architectures", None) or ["CLIPModel"]
    if inner.model_type == "clip_vision_model" and config.features == "pooled" and "CLIPVisionModel" not in names:
        # a full model's own; the nested one may be a default
        inner.projection_dim = getattr(full, "projection_dim", inner.projection_dim)
        return CLIPVisionModelWithProjection, inner, full.model_type
    kind = first(MODEL_MAPPING[type(inner)]) if type(inner) in MODEL_MAPPING else None
    if kind is None or kind.main_input_name != "pixel_values":
        raise UserError(f"'{config.name}' is no image encoder but a model of type '{full.model_type}'")
    if config.features == "grid" and hasattr(inner, "vision_use_head"):
        inner.vision_use_head = False  # SigLIP's pooling
    return kind, inner, full.model_type


def _preprocessing(name: str, inner: Any, model_type: str) -> tuple[int, Stats]:
    """Return resolution and channel statistics: preprocessor_config.json's, else the usual ones."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings = ImageProcessingMixin.get_image_processor_dict(name)[0]
    except OSError:
        settings = {}
    size = (settings.get("do_center_crop", True) and settings.get("crop_size")) or settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    patches = getattr(inner, "num_patches", None)  # of SigLIP 2 NaFlex, whose config has no image size
    own = math.isqrt(patches) * first(inner.patch_size) if patches else first(getattr(inner, "image_size", 224))
    stats = USUAL_STATS.get(model_type.removesuffix("_vision_model"), IMAGENET_STATS)
    if settings.get("image_mean") and settings.get("image_std"):
        stats = (tuple(settings["image_mean"]), tuple(settings["image_std"]))
    if settings.get("do_normalize") is False:
        stats = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return int(size or own), stats


def _measure(make: Callable[[], nn.Module], name: str, side: int) -> tuple[VisionFacts, frozenset[str]]:
    """Run an architecture on the meta device: its facts, and the parameters its features do not depend on."""
    with torch.device("meta"), torch.enable_grad():
        tower = make().eval()
        try:
            features = tower(torch.empty(1, 3, side, side))  # (1,N,D)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"'{name}' cannot read images of {side} px: {brief(error)}") from error
        features.sum().backward()
    unread = frozenset(n for n, p in tower.named_parameters() if p.grad is None)
    return VisionFacts(features.shape[2], features.shape[1], side), unread


def _hf_plan(config: VisionConfig) -> EncoderPlan:
    name = config.name
    with quiet_transformers():
        kind, inner, model_type = _hf_class(config)
        own, stats = _preprocessing(name, inner, model_type)
    depth = getattr(inner, "num_hidden_layers", None) or len(inner.depths)
    layers = shared.layer_numbers(config, depth)
    side = shared.input_side(config, own, first(getattr(inner, "patch_size", None)) or 1)
    # a BERT-style pooler is often missing from the file, and would be random: the class token instead
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}

    def make() -> nn.Module:
        return HFTower(kind(copy.deepcopy(inner), **options), config.features, layers)

    def load() -> nn.Module:
        with quiet_transformers():
            try:
                checks = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
                model, report = kind.from_pretrained(
                    name, config=copy.deepcopy(inner), dtype=torch.float32, **checks, **options
                )
            except Exception as error:  # whatever the readers of weight files say of a bad one
                raise UserError(f"cannot load the image encoder '{name}': {brief(error)}") from error
        if wrong := {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}:
            raise UserError(f"the weights of '{name}' lack, or have in another shape: {', '.join(sorted(wrong)[:5])}")
        if (table := first(getattr(inner, "image_size", side))) != side:
            log.info("%s: position embedding of %d px interpolated to %d px", name, table, side)
        return HFTower(model, config.features, layers)

    facts, unread = _measure(make, name, side)
    return EncoderPlan(make, load, facts, stats, unread)

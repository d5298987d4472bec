"""GitModel -> the weights and configuration of Hugging Face's LlavaForConditionalGeneration, or why there is none.

LLaVA reads raw layer outputs of a CLIP or SigLIP encoder, a projector of two linear layers with an activation between
them, and a decoder of the LLaMA family under a causal mask. Whatever is not exactly that is refused here.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from git_model.config import Config
from git_model.errors import UserError
from git_model.models.git import GitModel
from git_model.models.openai_clip import OpenAITower
from git_model.models.processing import tokenizer_refusal
from git_model.models.small_vision import first, resize_positions
from git_model.models.vision import HFTower, VisionEncoder

MAPPERS = ("linear", "mlp2x_gelu")
TOWERS = ("clip_vision_model", "siglip_vision_model")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
POSITIONS = "embeddings.position_embedding.weight"


def config_refusal(config: Config) -> str:
    """Return why a run can be no LLaVA, judged by its config alone; '' where nothing speaks against it."""
    vision, mapper = config.vision, config.mapper.type
    if vision.features != "grid":
        return "it reads pooled features, and LLaVA reads one token a cell; train with --output_grid True --layers -2"
    if not vision.layers:
        return (
            "its grid is the last layer behind the encoder's final norm, and LLaVA reads raw layers; "
            "train with --layers -1 or --layers -2"
        )
    if mapper not in MAPPERS:
        return f"its mapper is '{mapper}', and LLaVA's projector is one of: {', '.join(MAPPERS)}"
    if config.region.takes_boxes:
        return f"it reads boxes (--region {config.region.mode}), and LLaVA whole pictures"
    if config.vision.join != "concat":
        return "its layers are averaged (--join mean), and LLaVA joins them"
    if config.language.prefix_attention != "causal":
        return "its image tokens see each other (language.prefix_attention bidirectional), and LLaVA's mask is causal"
    if config.data.resize == "pad":
        return "it was trained with data.resize pad, which CLIP's image processor cannot do; choose crop or squash"
    return ""


def model_refusal(model: GitModel) -> str:
    """Return why a model can be no LLaVA; '' where it can."""
    tower, decoder = model.vision.tower, model.language.model
    if isinstance(tower, OpenAITower):
        kind = "clip_vision_model" if tower.is_vit else "a ResNet"
    else:
        kind = str(tower.model.config.model_type) if isinstance(tower, HFTower) else "the small encoder"
    if kind not in TOWERS:
        return f"its image encoder is {kind}, and the engines that serve LLaVA hold CLIP's ViT and SigLIP"
    family = decoder.config.model_type
    if family not in DECODERS:
        return f"its language model is a {family}, and the engines that serve LLaVA hold: {', '.join(DECODERS)}"
    if getattr(decoder.get_output_embeddings(), "bias", None) is not None:
        return "its vocabulary projection has a bias, and LLaVA's has none"
    return tokenizer_refusal(model.codec)


def vision_part(vision: VisionEncoder) -> tuple[Any, dict[str, Tensor]]:
    """Return the encoder as transformers' config and weights, its position table made for the run's resolution."""
    tower = vision.tower
    if isinstance(tower, OpenAITower):
        return _from_openai(tower)
    assert isinstance(tower, HFTower)
    config, weights = copy.deepcopy(tower.model.config), dict(tower.model.state_dict())
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    config.image_size = vision.resolution
    side, patch = vision.resolution // first(config.patch_size), first(tower.own) // first(config.patch_size)
    table = weights[POSITIONS]  # (T,D), a class token's row first
    extra = len(table) - patch * patch
    weights[POSITIONS] = torch.cat([table[:extra], resize_positions(table[extra:], (side, side))])  # (T,D)
    return config, weights


def _from_openai(tower: OpenAITower) -> tuple[Any, dict[str, Tensor]]:
    """Rename openai-clip's ViT to transformers' CLIPVisionModel."""
    from transformers import CLIPVisionConfig

    net = tower.visual
    block = net.transformer.resblocks[0]
    config = CLIPVisionConfig(
        hidden_size=net.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(net.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=tower.resolution,
        patch_size=net.conv1.kernel_size[0],
        hidden_act="quick_gelu",
        layer_norm_eps=net.ln_pre.eps,
    )
    out = {
        f"post_layernorm.{k}": v.detach() for k, v in nn.LayerNorm(config.hidden_size).state_dict().items()
    }  # unread
    for key, tensor in net.state_dict().items():
        out |= _renamed(key, tensor)
    return config, out


def _renamed(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return what a tensor of openai-clip's ViT is called in transformers; queries, keys and values part there."""
    whole = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": POSITIONS,
        "ln_pre.weight": "pre_layrnorm.weight",  # transformers' own spelling
        "ln_pre.bias": "pre_layrnorm.bias",
    }
    if key in whole:
        return {whole[key]: tensor}
    _, _, number, *rest = key.split(".")  # transformer.resblocks.3.attn.in_proj_weight
    name, layer = ".".join(rest), f"encoder.layers.{number}"
    if name.startswith("attn.in_proj_"):
        ending = name.removeprefix("attn.in_proj_")
        return {f"{layer}.self_attn.{p}_proj.{ending}": t for p, t in zip("qkv", tensor.chunk(3), strict=True)}
    module, ending = name.rsplit(".", 1)
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
    }
    return {f"{layer}.{names[module]}.{ending}": tensor}


def feature_layers(vision: VisionEncoder, depth: int) -> int | list[int]:
    """Return the layers LLaVA reads, counted from the end (-1: the last block's output); their order is the join's."""
    tower: Any = vision.tower
    layers = [int(layer) - depth - 1 for layer in tower.layers]
    return layers[0] if len(layers) == 1 else layers


def projector_part(mapper: Any) -> tuple[str, dict[str, Tensor]]:
    """Return the projector's activation and weights.

    A linear mapper W goes through two layers: where E >= 2 D as x -> (x, -x) -> GELU -> W: GELU(x) - GELU(-x) = x, and
    so for each approximation of GELU; engines that know no other activation can hold it. Else as W and the identity.
    """
    head = mapper.net[0]
    wide, dim_in = head.weight.shape  # E, D
    if len(mapper.net) == 3:
        act, enter, leave = "gelu", head, mapper.net[2]
    elif wide >= 2 * dim_in:
        act, enter, leave = "gelu", nn.Linear(dim_in, wide), nn.Linear(wide, wide)
        eye = torch.eye(dim_in)  # (D,D)
        spare = torch.zeros(wide - 2 * dim_in, dim_in)  # (E-2D,D)
        enter.weight.data, enter.bias.data = torch.cat([eye, -eye, spare]), torch.zeros(wide)  # (E,D), (E,)
        leave.weight.data = torch.cat([head.weight, -head.weight, torch.zeros(wide, wide - 2 * dim_in)], 1)  # (E,E)
        leave.bias.data = head.bias.data
    else:
        act, enter, leave = "linear", head, nn.Linear(wide, wide)
        leave.weight.data, leave.bias.data = torch.eye(wide), torch.zeros(wide)  # (E,E), (E,)
    layers = {"linear_1": enter, "linear_2": leave}
    return act, {f"{name}.{k}": t.detach() for name, layer in layers.items() for k, t in layer.state_dict().items()}


def language_part(model: GitModel, image_id: int) -> tuple[Any, dict[str, Tensor]]:
    """Return the decoder's config and weights, with a row for the image token in the embedding table and the head.

    The new rows are the mean of all others: the image token's logit is the mean of all logits, never above the
    largest, so it is never generated by greedy search; its embedding is never read (image features stand there).
    """
    decoder = model.language.model
    config, weights = copy.deepcopy(decoder.config), dict(decoder.state_dict())
    tied = decoder.get_input_embeddings().weight is decoder.get_output_embeddings().weight
    if tied:
        weights.pop("lm_head.weight", None)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = _with_row(weights[name], image_id)  # (V,E)
            config.vocab_size = len(weights[name])
    config.tie_word_embeddings = tied
    config.architectures = [type(decoder).__name__]
    config.eos_token_id, config.pad_token_id = model.codec.eos_id, model.codec.pad_id
    config.bos_token_id = (model.codec.bos_ids or [model.codec.eos_id])[0]
    return config, weights


def _with_row(table: Tensor, row: int) -> Tensor:
    """Return a table (V,E) in which row `row`, and whatever is new before it, is the mean of all others."""
    others = torch.cat([table[:row], table[row + 1 :]])  # (V,E)
    mean = others.float().mean(0, keepdim=True).to(table.dtype)  # (1,E)
    grown = torch.cat([table, mean.expand(max(row + 1 - len(table), 0), -1)])  # (V,E)
    grown[row] = mean[0]
    return grown


def llava_parts(model: GitModel, image_id: int, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """Return LlavaConfig and the tensors of model.safetensors, named as the published LLaVA 1.5 names them.

    Those names are read by every version of transformers and by the engines; transformers 5 would write shorter ones.

    Args:
        model: unwrapped, adapters merged, not quantised.
        image_id: the id of `<image>` in the exported tokenizer.
        dtype: of all weights.

    Raises:
        UserError: the model can be no LLaVA; see `model_refusal`.
    """
    from transformers import LlavaConfig

    if reason := model_refusal(model):
        raise UserError(f"no LLaVA can hold this model: {reason}")
    vision, vision_weights = vision_part(model.vision)
    act, projector = projector_part(model.mapper)
    text, text_weights = language_part(model, image_id)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=model.num_image_tokens,
        projector_hidden_act=act,
        vision_feature_select_strategy=select_strategy(vision),
        vision_feature_layer=feature_layers(model.vision, vision.num_hidden_layers),
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=str(dtype).removeprefix("torch."),
    )
    for inner in (text, vision):
        inner.dtype = str(dtype).removeprefix("torch.")
    places = {"vision_tower.vision_model": vision_weights, "multi_modal_projector": projector}
    places["language_model"] = text_weights
    weights = {
        f"{place}.{name}": tensor.detach().to(dtype).contiguous()
        for place, part in places.items()
        for name, tensor in part.items()
    }
    return config, weights


def select_strategy(vision_config: Any) -> Literal["default", "full"]:
    """Return LLaVA's word for which tokens it takes: CLIP's without its class token, all of an encoder without one."""
    return "default" if vision_config.model_type == "clip_vision_model" else "full"

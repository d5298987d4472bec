"""A model of the right shapes without its weights: on the meta device, then of empty tensors, fake or real ones.

Quantised decoders get bitsandbytes' own layers, around weights and scales as large as the real ones.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from git_model.config import Config
from git_model.models.build import build_model
from git_model.models.decoders import quiet_bitsandbytes
from git_model.models.git import GitModel
from git_model.models.hub import quiet_transformers
from git_model.models.lora import add_adapters, chosen_targets

NF4_BLOCK = 64  # weights that share a scale of 8 bits
SCALE_BLOCK = 256  # such scales that share one of 32 bits


class EndlessText:
    """What a codec asks of a tokenizer, without its files: every text is longer than any limit.

    Args:
        vocab_size: of a small decoder, whose tables take it from the tokenizer.
    """

    eos_token_id = 0
    pad_token_id = None
    bos_token_id = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Return more ids than a target may have."""
        return {"input_ids": [1] * (1 << 14)}

    def tokenize(self, text: str) -> list[str]:
        """Return the text as a token."""
        return [text]


def skeleton(config: Config) -> GitModel:
    """Return the model of a config on the meta device: types, frozen parts and adapters are those of a run.

    Its tokenizer is `EndlessText`. Nothing is read but a language model's or encoder's config.json (an encoder that is
    a .pt file is read whole: its sizes are those of its weights).

    Raises:
        UserError: as `build_model` and `add_adapters` do.
    """
    language = config.language
    if language.bits < 16 or language.lora.rank:
        quiet_bitsandbytes()
    with torch.device("meta"), torch.random.fork_rng(devices=[]), quiet_transformers():
        model = build_model(config, EndlessText(language.small.vocab_size), ("vision", "language"))
        decoder: Any = model.language.model
        targets = chosen_targets(decoder, language.lora) if language.lora.rank else ()
        if language.bits < 16:
            quantise(decoder, language.bits, model.language.compute or torch.float32)
        if language.lora.rank:
            add_adapters(decoder, language.lora, targets)
    return model


def quantise(decoder: Any, bits: int, compute: torch.dtype) -> None:
    """Put bitsandbytes' layers where `load_quantised` has them, in place, on the meta device.

    Args:
        decoder: a Hugging Face causal LM; what is not quantised becomes float32, as there.
        bits: 8 (a byte a weight and a float32 a row) or 4 (half a byte a weight, a byte a block of 64 weights, a
            float32 a block of 256 of those).
        compute: type of the products.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    from git_model.models.quantised import DequantisedLinear, recipe

    quantiser: Any = AutoHfQuantizer.from_config(recipe(bits, compute), pre_quantized=False)
    quantiser.preprocess_model(decoder, device_map=None)
    setattr(decoder, f"is_loaded_in_{bits}bit", True)  # by which peft chooses its adapters
    for parameter in decoder.parameters():
        parameter.data = parameter.data.float()
    for layer in decoder.modules():
        if quantised_bits(layer) == 8:
            _eight_bits(layer)
            layer.__class__ = DequantisedLinear
        elif quantised_bits(layer) == 4:
            _four_bits(layer, compute)


def _eight_bits(layer: Any) -> None:
    rows = len(layer.weight)
    layer.weight = nn.Parameter(torch.empty(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    layer.register_buffer("row_scales", torch.empty(rows), persistent=False)


def _four_bits(layer: Any, compute: torch.dtype) -> None:
    layer.support_avx512bf16_for_cpu = False
    layer.whole = layer.weight.shape, compute
    weights = layer.weight.numel()
    packed: Any = nn.Parameter(torch.empty(math.ceil(weights / 2), 1, dtype=torch.uint8), requires_grad=False)
    packed.compress_statistics, packed.quant_type = True, "nf4"  # which peft asks for
    layer.weight = packed
    blocks = math.ceil(weights / NF4_BLOCK)
    tables = {
        "block_scales": torch.empty(blocks, dtype=torch.uint8),
        "outer_scales": torch.empty(math.ceil(blocks / SCALE_BLOCK)),
        "outer_code": torch.empty(256),
        "code": torch.empty(16),
        "offset": torch.empty(()),
    }
    for name, table in tables.items():
        layer.register_buffer(name, table, persistent=False)


def quantised_bits(layer: nn.Module) -> int:
    """Return 8 or 4 for a layer of bitsandbytes', 0 for any other; by name, so that not everyone has to import it."""
    names = {kind.__name__ for kind in type(layer).__mro__ if kind.__module__.startswith("bitsandbytes.")}
    return 8 if "Linear8bitLt" in names else 4 if "Linear4bit" in names else 0


def fill(model: GitModel, made_in: AbstractContextManager[Any]) -> None:
    """Turn a model on the meta device into one of empty tensors on the CPU, in place; what is shared stays shared.

    Args:
        model: see `skeleton`.
        made_in: where tensors are made: a FakeTensorMode makes fake ones, which take no memory; nullcontext real ones.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # beside the tensor it stands for, lest that one's id is used again

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with made_in:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = (tensor, nn.Parameter(empty, tensor.requires_grad) if parameter else empty)
        return made[id(tensor)][1]

    for module in model.modules():
        tables: Any = (module._parameters, module._buffers, vars(module))  # the last: tensors that are no buffers
        for table in tables:
            table.update({name: stand_in(tensor) for name, tensor in table.items() if isinstance(tensor, Tensor)})
        _connect(module)


def _connect(layer: Any) -> None:
    """Tell a quantised layer where its weights are, as bitsandbytes does when it makes them."""
    kind = quantised_bits(layer)
    if kind == 8:
        layer.state.CB, layer.state.SCB = layer.weight.data, layer.row_scales
    if kind == 4:
        from bitsandbytes.functional import QuantState

        shape, compute = layer.whole
        outer = QuantState(layer.outer_scales, code=layer.outer_code, blocksize=SCALE_BLOCK, dtype=torch.float32)
        options: dict[str, Any] = {"blocksize": NF4_BLOCK, "quant_type": "nf4", "dtype": compute}
        options |= {"code": layer.code, "offset": layer.offset, "state2": outer}
        layer.weight.quant_state = QuantState(layer.block_scales, shape, **options)

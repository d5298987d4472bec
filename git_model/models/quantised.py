"""8-bit and 4-bit decoders through bitsandbytes, and what a card without 8-bit arithmetic does instead.

LLM.int8() (arXiv 2208.07339) multiplies 8-bit weights with 8-bit activations, which needs compute capability 7.5. On
a V100 (7.0), and on a CPU, the same 8-bit weights are turned back into numbers layer by layer, for one product at a
time. NF4 (QLoRA, arXiv 2305.14314) always works that way.
"""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from git_model.architecture import LanguageConfig
from git_model.errors import UserError

log = logging.getLogger(__name__)

INT8_CAPABILITY = (7, 5)


def load_quantised(config: LanguageConfig, compute: torch.dtype, device: torch.device) -> Any:
    """Return a pretrained decoder with quantised linear layers; tables, norms and vocabulary projection in float32.

    Args:
        config: its name, and 8 or 4 bits.
        compute: type of the products.
        device: where the weights are made and stay.

    Raises:
        UserError: 'llm.int8' on a card that has no such arithmetic.
    """
    how = int8_product(config.int8, device) if config.bits == 8 else ""
    model = AutoModelForCausalLM.from_pretrained(
        config.name, quantization_config=recipe(config.bits, compute), dtype=compute, device_map={"": str(device)}
    )
    for parameter in model.parameters():  # as QLoRA does: sums, norms and logits of a deep model need the bits
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            layer.__class__ = Int8Linear if how == "llm.int8" else DequantisedLinear  # the same weights, our product
        if isinstance(layer, bnb.nn.Linear4bit):
            # bitsandbytes 0.50 packs NF4 weights anew in a CPU's first forward without gradients: no gradient passes
            # through them after that (a validation would end the learning), and saving them spoils them
            layer.support_avx512bf16_for_cpu = False
    return model


def recipe(bits: int, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return bitsandbytes' settings for 8 or 4 bits."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def int8_product(chosen: str, device: torch.device) -> str:
    """Return how 8-bit weights are multiplied on `device`: 'llm.int8' or 'dequantised'.

    Raises:
        UserError: 'llm.int8' where the card's compute capability is below 7.5.
    """
    if chosen == "dequantised" or device.type != "cuda":  # a CPU has no 8-bit product either: bitsandbytes imitates it
        return "dequantised" if chosen == "auto" else chosen
    capability = torch.cuda.get_device_capability(device)
    if capability >= INT8_CAPABILITY:
        return "llm.int8"
    card = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
    if chosen == "llm.int8":
        raise UserError(
            f"{card}, LLM.int8() needs 7.5; choose --lm_bits 4 (NF4), or --set language.int8=dequantised (8-bit "
            "weights, dequantised for each product)"
        )
    log.warning("%s, LLM.int8() needs 7.5: the 8-bit weights are dequantised for each product", card)
    log.warning("--lm_bits 4 (NF4) takes half their memory")
    return "dequantised"


class Int8Linear(bnb.nn.Linear8bitLt):
    """A layer of 8-bit weights, W = CB * SCB / 127: y = x W^T + b in the type of the activations, or of autocast.

    bitsandbytes' own layer keeps its input beside autograd's saved tensors, where checkpointed activations cannot free
    it, and multiplies gradients in float32 wherever a norm comes before it.
    """

    llm_int8 = True

    def forward(self, x: Tensor) -> Tensor:
        """(...,in) -> (...,out)."""
        if getattr(self.weight, "CB", None) is not None:
            self.init_8bit_state()
        given, kind = x.dtype, x.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else given
        bias = None if self.bias is None else self.bias.to(compute)
        with torch.autocast(kind, enabled=False):
            return Int8Product.apply(x.to(compute), self.weight, self.state, bias, self.llm_int8).to(given)


class DequantisedLinear(Int8Linear):
    """The same, W made for each product; equal to bitsandbytes' MatMul8bitFp."""

    llm_int8 = False


class Int8Product(torch.autograd.Function):
    """x W^T + b of 8-bit rows and their scales; the backward pass makes W again, so that none is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None, llm_int8: bool) -> Tensor:
        """(...,in), int8 (out,in), the scales (out,) in `state`, (out,) -> (...,out)."""
        ctx.save_for_backward(state.CB, state.SCB)
        if not llm_int8:
            return F.linear(x, dequantised(state.CB, state.SCB, x.dtype), bias)  # (...,out)
        state.is_training = False  # on a CPU, too: the product that cards have
        return bnb.matmul(x, weight, bias=bias, state=state)  # (...,out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(...,out) -> (...,in)."""
        rows, scales = ctx.saved_tensors
        return grads[0] @ dequantised(rows, scales, grads[0].dtype), None, None, None, None


def dequantised(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W (out,in) of 8-bit rows and the largest absolute value of each."""
    return rows.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))

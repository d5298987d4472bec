"""Our native folders behind transformers' Auto classes: importing this module registers them.

import git_model.models.hf
model = AutoModel.from_pretrained("exported/x")
tokenizer, images = AutoTokenizer.from_pretrained("exported/x"), AutoImageProcessor.from_pretrained("exported/x")
pixels = images(Image.open("picture.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]
ids = tokenizer(["what color is it?"], add_special_tokens=False, return_tensors="pt")
print(model.say(model.generate(pixels, **ids)))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from git_model.batch import IGNORE_INDEX, CaptionBatch
from git_model.errors import UserError
from git_model.models.git import GitModel
from git_model.models.language import Decoding
from git_model.models.native import MODEL_TYPE, read_native

NOT_HERE = ("device_map", "quantization_config", "load_in_8bit", "load_in_4bit", "attn_implementation")


class GitModelConfig(PreTrainedConfig):
    """What config.json of a native folder says; `run` is the whole configuration of the training run."""

    model_type = MODEL_TYPE


class GitModelForCaptioning(PreTrainedModel):
    """A GitModel as a transformers model: normalised pictures and the ids of prompts in, logits or new ids out.

    Args:
        config: of a native folder.
        git: the model; `from_pretrained` brings it.
    """

    config_class = GitModelConfig
    main_input_name = "pixel_values"
    base_model_prefix = "git"

    def __init__(self, config: GitModelConfig, git: GitModel | None = None) -> None:
        super().__init__(config)
        if git is None:
            raise UserError("a GitModelForCaptioning comes from a folder only: GitModelForCaptioning.from_pretrained")
        self.git = git

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, **options: Any) -> GitModelForCaptioning:  # type: ignore[override]
        """Load a native folder.

        Args:
            folder: a local one.
            options: `dtype` changes the weights' type; what would need another loader is refused.

        Raises:
            UserError: no such folder, damaged, or an option that is not supported.
        """
        if asked := [name for name in NOT_HERE if options.get(name)]:
            raise UserError(f"{', '.join(asked)}: not for a native folder; load it, then move or change the model")
        model = read_native(Path(folder))[0]
        config = options.get("config") or GitModelConfig.from_pretrained(folder)
        whole = cls(config, model)
        dtype = options.get("dtype", options.get("torch_dtype"))
        if dtype not in (None, "auto"):
            whole = whole.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return whole.eval()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refuse: inference.py's task 'export' writes these folders, whole or not at all."""
        raise UserError("write a native folder with inference.py -p \"{'type': 'export', ...}\"")

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> CausalLMOutput:
        """Return the logits (I,T,V) of rows [BOS] + image tokens + prompt, padded on the left to T.

        Args:
            pixel_values: (I,3,H,W) normalised pictures.
            input_ids: (I,P) the prompts' ids without special tokens; None asks for captions.
            attention_mask: (I,P), 0 on padding, on either side.
        """
        batch, embeds = self._embedded(pixel_values, input_ids, attention_mask)  # (I,T,E)
        hidden = self.git.language.hidden(embeds, batch)  # (I,T,E)
        return CausalLMOutput(logits=self.git.language.project(hidden))  # (I,T,V)

    @torch.inference_mode()
    def generate(  # type: ignore[override]
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **search: Any
    ) -> Tensor:
        """Return the ids of the new tokens (I,new); greedy with at most 40 of them unless told otherwise.

        Args:
            pixel_values: (I,3,H,W) normalised pictures.
            input_ids: (I,P) the prompts' ids without special tokens; None asks for captions.
            attention_mask: (I,P), 0 on padding, on either side.
            search: `num_beams`, `max_new_tokens`, `min_new_tokens`, `length_penalty`.
        """
        names = {"num_beams": "beams"}
        allowed = ("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty")
        if wrong := [name for name in search if name not in allowed]:
            raise UserError(f"unknown argument of generate '{wrong[0]}'; one of: {', '.join(allowed)}")
        batch, embeds = self._embedded(pixel_values, input_ids, attention_mask)  # (I,T,E)
        codec, decoding = self.git.codec, Decoding(**{names.get(k, k): v for k, v in search.items()})
        return self.git.language.generate(embeds, batch, decoding, codec.eos_id, codec.pad_id).ids  # (I,new)

    def say(self, ids: Tensor) -> list[str]:
        """Return the texts of generated ids (I,new)."""
        return [self.git.codec.decode(row) for row in ids.tolist()]

    def _embedded(
        self, pixel_values: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[CaptionBatch, Tensor]:
        git = self.git
        features = git.vision(pixel_values.to(next(git.vision.parameters()).dtype))  # (I,N,D)
        tokens = git.encode(features)  # (I,K,E)
        prompts = _prompts(len(tokens), input_ids, attention_mask)
        batch = _batch(git, prompts).to(tokens.device)
        return batch, git.language.embed(batch, tokens)  # (I,T,E)


def _prompts(count: int, input_ids: Tensor | None, attention_mask: Tensor | None) -> list[list[int]]:
    """Return the ids of each prompt without its padding."""
    if input_ids is None:
        return [[] for _ in range(count)]
    if len(input_ids) != count:
        raise ValueError(f"{count} pictures and {len(input_ids)} prompts")
    kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (I,P)
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, kept, strict=True)]


def _batch(git: GitModel, prompts: list[list[int]]) -> CaptionBatch:
    """Lay rows out as in training: [BOS] + K image slots + prompt, padded on the left."""
    bos, slots = git.codec.bos_ids, git.num_image_tokens
    rows = [[*bos, *[git.codec.pad_id] * slots, *prompt] for prompt in prompts]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[git.codec.pad_id] * (width - len(row)) + row for row in rows])  # (I,T)
    index = torch.arange(width) - torch.tensor([[width - len(row)] for row in rows])  # (I,T), below 0 on padding
    attention = index >= 0  # (I,T)
    image = (index >= len(bos)) & (index < len(bos) + slots)  # (I,T)
    return CaptionBatch(
        images=torch.empty(0),
        image_index=torch.arange(len(rows)),  # (I,)
        input_ids=ids,
        image_mask=image,
        attention_mask=attention,
        segments=torch.where(attention, (index >= len(bos) + slots).long(), -1),  # (I,T)
        positions=index.clamp(min=0),  # (I,T)
        labels=torch.full_like(ids, IGNORE_INDEX),  # (I,T)
        sources=torch.zeros_like(ids),  # (I,T)
    )


AutoConfig.register(MODEL_TYPE, GitModelConfig)
AutoModel.register(GitModelConfig, GitModelForCaptioning)

"""PublishedModel: a Hugging Face image-to-text model (GIT, BLIP, BLIP-2, LLaVA...) that captions and answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from git_model.errors import UserError
from git_model.models.answers import AnswerTrie
from git_model.models.language import Decoding

log = logging.getLogger(__name__)


class PublishedModel:
    """Any model that `AutoModelForImageTextToText` loads, with its own processor.

    Args:
        name: id or folder.
        device: where it runs.

    Raises:
        UserError: it cannot be found or is no image-to-text model.
    """

    def __init__(self, name: str, device: str) -> None:
        from transformers import AutoConfig, AutoProcessor

        try:
            config = AutoConfig.from_pretrained(name)
            self.model: Any = _model_class(config).from_pretrained(name, dtype="auto")
            self.processor: Any = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"cannot load '{name}' as a Hugging Face image-to-text model: {reason}") from error
        self.model.to(device).eval()
        if device == "cpu":
            self.model.float()
        self.tokenizer: Any = self.processor.tokenizer
        self.device = device
        text = self.model.config.get_text_config()
        ends = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        if self.model.config.model_type == "blip":  # its decoder is a BERT: a text ends with [SEP]
            ends = text.sep_token_id
        self.end = int(ends[0] if isinstance(ends, list) else ends)
        pad = self.tokenizer.pad_token_id
        self.pad = int(pad if pad is not None else self.end)

    def length(self, prompt: str) -> int:
        """Return the tokens of the text a prompt becomes; the image's not counted."""
        return len(self.tokenizer(self._text(prompt))["input_ids"])

    @torch.inference_mode()
    def generate(self, images: Sequence[Any], prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """Return one text a picture.

        Args:
            images: PIL RGB pictures.
            prompts: of one length in tokens: nothing is padded, so a batch says what single pictures say.
            decoding: how.
        """
        texts = [self._text(prompt) for prompt in prompts]
        inputs = self._inputs(images, texts)
        if decoding.sample:
            torch.manual_seed(decoding.seed)
        settings = decoding.settings(self.end, self.pad)
        out = self.model.generate(**inputs, **settings)  # (I,prompt + new) or (I,new)
        return [text.strip() for text in self.processor.batch_decode(_new(out, inputs), skip_special_tokens=True)]

    def trie(self, answers: Sequence[str], after_prompt: bool) -> AnswerTrie:
        """Return the constraint to these answers."""
        spaced = self.tokenizer.tokenize(" a")[0].startswith("\u0120")  # byte-level BPE: a space belongs to the word
        joint = " " if spaced and after_prompt else ""
        encoded = (self.tokenizer(joint + answer, add_special_tokens=False)["input_ids"] for answer in answers)
        return AnswerTrie(([*ids, self.end] for ids in encoded), self.pad)

    def _text(self, prompt: str) -> str:
        """Return the text for the processor: the chat form where the model has one, with a mark for the image."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt or "Describe this image."}]
            return str(
                self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            )
        mark = getattr(self.processor, "image_token", None)
        if self.model.config.model_type.startswith("llava") and mark:
            return f"USER: {mark}\n{prompt or 'Describe this image.'} ASSISTANT:"
        return prompt

    def _inputs(self, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Any]:
        if any(texts):
            inputs = self.processor(images=list(images), text=list(texts), return_tensors="pt")
        else:
            inputs = self.processor(images=list(images), return_tensors="pt")
        dtype = next(self.model.parameters()).dtype
        return {k: v.to(self.device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def _model_class(config: Any) -> Any:
    """Return the auto class of a config: visual question answering models (BLIP-VQA) have one of their own."""
    from transformers import AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering
    from transformers.models.auto.modeling_auto import MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES as ASKED

    named = (config.architectures or [""])[0]
    if named.endswith("QuestionAnswering") and named in ASKED.values():
        return AutoModelForVisualQuestionAnswering
    return AutoModelForImageTextToText


def _new(out: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the new tokens: some models repeat the prompt before them, BLIP all but its ends."""
    ids = inputs.get("input_ids")
    if ids is None:
        return out
    length = ids.shape[1]
    if out.shape[1] >= length and torch.equal(out[:, :length], ids):
        return out[:, length:]
    if length > 1 and out.shape[1] >= length - 1 and torch.equal(out[:, 1 : length - 1], ids[:, 1:-1]):
        return out[:, length - 1 :]
    return out

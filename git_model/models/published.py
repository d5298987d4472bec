"""PublishedModel: a Hugging Face image-to-text model (GIT, BLIP, BLIP-2, LLaVA...) that captions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from git_model.errors import UserError
from git_model.models.answers import AnswerTrie
from git_model.models.hub import check_name
from git_model.models.language import Decoding

NESTED = ("idefics", "idefics2", "idefics3", "smolvlm", "mllama")  # processors that want a list of pictures a sample


class PublishedModel:
    """Any model that `AutoModelForImageTextToText` loads, with its own processor.

    Args:
        name: id or folder.
        device: where it runs.

    Raises:
        UserError: it cannot be found or is no image-to-text model.
    """

    def __init__(self, name: str, device: str) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

        check_name(name, "Hugging Face image-to-text model")
        try:
            config = AutoConfig.from_pretrained(name)
            self.model: Any = _model_class(config).from_pretrained(name, dtype="auto")
            self.processor: Any = AutoProcessor.from_pretrained(name)
            joint = hasattr(self.processor, "tokenizer") and hasattr(self.processor, "image_processor")
            if not joint:  # an encoder and a decoder joined by hand (vit-gpt2...): two halves, and no prompt
                self.processor = AutoImageProcessor.from_pretrained(name)
            tokenizer: Any = self.processor.tokenizer if joint else AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
            raise UserError(f"cannot load '{name}' as a Hugging Face image-to-text model: {_brief(error)}") from error
        self.model.to(device).eval()
        if device == "cpu":
            self.model.float()
        self.name, self.device, self.joint = name, device, joint
        self.tokenizer: Any = tokenizer
        self.kind: str = self.model.config.model_type
        text = self.model.config.get_text_config(decoder=True)
        self.most: int | None = getattr(text, "max_position_embeddings", None)
        ends = self.model.generation_config.eos_token_id or tokenizer.eos_token_id
        if self.kind == "blip":  # its decoder is a BERT: a text ends with [SEP]
            ends = text.sep_token_id
        self.ends: list[int] = list(ends) if isinstance(ends, list) else [int(ends)]
        pad = tokenizer.pad_token_id
        self.pad = int(pad if pad is not None else self.ends[0])

    def length(self, prompt: str, new: int) -> int:
        """Return the tokens of the text a prompt becomes; the image's not counted.

        Raises:
            UserError: the model cannot take this prompt, or not with `new` more tokens.
        """
        if prompt and not self.joint:
            raise UserError(f"'{self.name}' takes no prompt")
        if not prompt and type(self.model).__name__.endswith("QuestionAnswering"):
            raise UserError(f"'{self.name}' answers questions only")
        mark = str(getattr(self.processor, "image_token", None) or "")
        if mark and mark in prompt:
            raise UserError(f"the prompt holds '{mark}', which stands for the image")
        length = len(self.tokenizer(self._text(prompt))["input_ids"])
        if self.most is not None and length + new > self.most:
            raise UserError(f"the prompt has {length} tokens; with {new} new ones more than {self.most}")
        return length

    def generate(self, images: Sequence[Any], prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """Return one text a picture.

        Args:
            images: PIL RGB pictures.
            prompts: of one length in tokens: nothing is padded, so a batch says what single pictures say.
            decoding: how.

        Raises:
            UserError: the model's own processor refuses a picture or prompt.
        """
        texts = [self._text(prompt) for prompt in prompts]
        try:
            inputs = self._inputs(images, texts)
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            if len(images) > 1:  # pictures that become different numbers of tiles do not stack
                return [self.generate([i], [p], decoding)[0] for i, p in zip(images, prompts, strict=True)]
            raise UserError(f"'{self.name}' cannot take this picture or prompt: {_brief(error)}") from error
        return self._continued(inputs, decoding)

    @torch.inference_mode()
    def _continued(self, inputs: dict[str, Any], decoding: Decoding) -> list[str]:
        if decoding.sample:
            torch.manual_seed(decoding.seed)
        out = self.model.generate(**inputs, **decoding.settings(self.ends, self.pad))  # (I,prompt + new) or (I,new)
        new = _new(out, inputs)
        if decoding.answers:
            return [decoding.answers.text(row) for row in new.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def trie(self, answers: Sequence[str], after_prompt: bool) -> AnswerTrie:
        """Return the constraint to these answers."""
        spaced = self.tokenizer.tokenize(" a")[0].startswith("\u0120")  # byte-level BPE: a space belongs to the word
        joint = " " if spaced and after_prompt else ""
        encoded = {a: self.tokenizer(joint + a, add_special_tokens=False)["input_ids"] for a in answers}
        return AnswerTrie({answer: [*ids, self.ends[0]] for answer, ids in encoded.items()}, self.pad)

    def _text(self, prompt: str) -> str:
        """Return the text for the processor: the chat form where the model has one, with a mark for the image."""
        if getattr(self.model.config, "git_model_export", None):  # ours, as LLaVA: nothing is put around the prompt
            return f"{self.processor.image_token}{prompt}"
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
        """Return what the model reads; pictures stay separate lists where a processor takes several of a sample."""
        pictures: list[Any] = [[image] for image in images] if self.kind in NESTED else list(images)
        if not any(texts):
            inputs = self.processor(images=pictures, return_tensors="pt")
        elif self.kind == "git":  # its answers follow [CLS] question, without the [SEP] that ends a text
            inputs = self.processor(images=pictures, return_tensors="pt")
            rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            ids = [[self.tokenizer.cls_token_id, *row] for row in rows]
            inputs["input_ids"] = torch.tensor(ids)  # (I,T)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # (I,T)
        else:
            inputs = self.processor(images=pictures, text=list(texts), return_tensors="pt")
        dtype = next(self.model.parameters()).dtype
        return {k: v.to(self.device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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

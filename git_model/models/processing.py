"""What turns text and pictures into the input of an exported model: tokenizer, image processor, chat template."""

from __future__ import annotations

import json
from typing import Any

from git_model.models.vision import VisionEncoder
from git_model.tokens import TextCodec

IMAGE_TOKEN = "<image>"  # noqa: S105
PROBES = ("", "what color is the circle?", "Is it a cat", "a", "1 + 2", "caf\u00e9 \u65e5\u672c\n")

# One picture and one question, in the order the model was trained on: [BOS], image, text; nothing is put around them.
CHAT_TEMPLATE = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
    "{{ raise_exception('this model was trained on one user message of a picture and a text') }}"
    "{%- endif -%}{BOS}"
    "{%- if messages[0]['content'] is string -%}{{- messages[0]['content'] -}}{%- else -%}"
    "{%- for part in messages[0]['content'] if part['type'] in ('image', 'image_url') -%}<image>{%- endfor -%}"
    "{%- for part in messages[0]['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
)


def chat_template(codec: TextCodec) -> str:
    """Return the Jinja template of a conversation; it writes BOS itself, as engines expect of a template."""
    bos = "{{- bos_token -}}" if codec.bos_ids else ""
    return CHAT_TEMPLATE.replace("{BOS}", bos)


def plain_tokenizer(codec: TextCodec) -> Any:
    """Return a copy of a model's tokenizer that adds what our rows begin with (BOS or nothing), padding on the left.

    The copy is its `tokenizers` JSON under the generic class, so that no loader puts it together anew by its name.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    own = codec.tokenizer
    content = json.loads(own.backend_tokenizer.to_str())
    _mark_every_piece(content.get("pre_tokenizer"))
    backend: Any = Tokenizer.from_str(json.dumps(content))
    backend.no_padding()
    backend.no_truncation()
    first = [(own.convert_ids_to_tokens(i), i) for i in codec.bos_ids]
    bos = " ".join(token for token, _ in first)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A".strip(), pair=f"{bos} $A $B".strip(), special_tokens=first
    )
    names = {f"{n}_token": getattr(own, f"{n}_token") for n in ("bos", "eos", "unk") if getattr(own, f"{n}_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=own.convert_ids_to_tokens(codec.pad_id),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=getattr(own, "clean_up_tokenization_spaces", False),
        **names,
    )


def _mark_every_piece(node: Any) -> None:
    """Let a sentencepiece tokenizer mark a word's start after `<image>` too, as it does where a text stands alone."""
    if isinstance(node, dict):
        if node.get("type") == "Metaspace" and node.get("prepend_scheme") == "first":
            node["prepend_scheme"] = "always"
        for inner in node.get("pretokenizers", ()):
            _mark_every_piece(inner)


def image_tokenizer(codec: TextCodec) -> tuple[Any, int]:
    """Return the tokenizer with `<image>` among its special tokens, and that token's id."""
    from tokenizers import AddedToken

    tokenizer = plain_tokenizer(codec)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer, int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def tokenizer_refusal(codec: TextCodec) -> str:
    """Return why a tokenizer cannot hold `<image>` and give prompts behind it the ids of training; '' where it can."""
    if not hasattr(codec.tokenizer, "backend_tokenizer"):
        return f"its tokenizer ({type(codec.tokenizer).__name__}) has no tokenizer.json"
    tokenizer, image_id = image_tokenizer(codec)
    for text in PROBES:
        if tokenizer(IMAGE_TOKEN + text)["input_ids"] != [*codec.bos_ids, image_id, *codec.prompt(text)]:
            return f"its tokenizer gives the prompt {text!r} other ids behind {IMAGE_TOKEN} than alone"
    return ""


def image_processor(vision: VisionEncoder, resize: str) -> Any:
    """Return CLIP's image processor with the geometry and the statistics of a run.

    Args:
        vision: for resolution, mean and standard deviation.
        resize: 'crop' or 'squash', see `git_model.datasets.images.Transform`; 'pad' cannot be said in its settings.

    Returns:
        None for 'pad'.
    """
    from transformers import CLIPImageProcessorPil

    side = vision.resolution
    if resize == "pad":
        return None
    crop = resize == "crop"
    return CLIPImageProcessorPil(
        size={"shortest_edge": side} if crop else {"height": side, "width": side},
        do_center_crop=crop,
        crop_size={"height": side, "width": side},
        image_mean=list(vision.mean),
        image_std=list(vision.std),
        resample=3,  # bicubic
    )

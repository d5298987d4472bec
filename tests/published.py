"""Tiny random models of four published architectures, saved as their authors save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

ARCHITECTURES = ("git", "blip", "blip-2", "llava")
WORDS = ("what", "is", "it", "?", "red", "blue", "a", "dog", "runs", "yes", "no", "user", "assistant", ":", "describe")
SIDE = 32


def word_tokenizer(bert: bool, *more: str) -> Any:
    """One token a word; BERT's adds [CLS] and [SEP], the others begin with <s>."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if bert else ["<pad>", "<unk>", "<s>", "</s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *more, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    single = f"{special[2]} $A {special[3]}" if bert else f"{special[2]} $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(special[2], 2), (special[3], 3)]
    )
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if bert else {"bos_token": "<s>", "eos_token": "</s>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], unk_token=special[1],
        additional_special_tokens=list(more), model_input_names=["input_ids", "attention_mask"], **names,
    )  # fmt: skip


def save(architecture: str, folder: Path) -> Path:
    """Write a random model and its processor."""
    torch.manual_seed(0)
    body = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    eye = {**body, "image_size": SIDE, "patch_size": 8}
    clip = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    square = hf.BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    model: Any
    if architecture == "git":
        words = word_tokenizer(True)
        config = hf.GitConfig(vision_config=eye, vocab_size=len(words), bos_token_id=2, eos_token_id=3, **body)
        model, processor = hf.GitForCausalLM(config), hf.GitProcessor(clip, words)
    elif architecture == "blip":
        words = word_tokenizer(True)
        text = {**body, "vocab_size": len(words), "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
        text |= {"pad_token_id": 0, "encoder_hidden_size": 32}
        config = hf.BlipConfig(text_config=text, vision_config=eye)
        model, processor = hf.BlipForConditionalGeneration(config), hf.BlipProcessor(square, words)
    elif architecture == "blip-2":
        words = word_tokenizer(False, "<image>")
        text = {"model_type": "opt", "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64}
        text |= {"num_attention_heads": 4, "word_embed_proj_dim": 32, "bos_token_id": 2, "eos_token_id": 3}
        text |= {"pad_token_id": 0, "max_position_embeddings": 128}
        former = {**body, "encoder_hidden_size": 32, "vocab_size": len(words), "cross_attention_frequency": 1}
        config = hf.Blip2Config(
            vision_config=eye, qformer_config=former, text_config=text, num_query_tokens=4, image_token_index=4
        )
        model = hf.Blip2ForConditionalGeneration(config)
        processor = hf.Blip2Processor(square, words, num_query_tokens=4)
    else:
        words = word_tokenizer(False, "<image>")
        text = {**body, "model_type": "llama", "vocab_size": len(words), "bos_token_id": 2, "eos_token_id": 3}
        eye = {**eye, "model_type": "clip_vision_model", "projection_dim": 32}
        config = hf.LlavaConfig(vision_config=eye, text_config={**text, "pad_token_id": 0}, image_token_index=4)
        model = hf.LlavaForConditionalGeneration(config)
        processor = hf.LlavaProcessor(
            clip, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    for parameter in model.parameters():  # the library's initial weights are too small to tell anything apart
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.25)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_clip(folder: Path, positions: int = 12) -> str:
    """Write a CLIP of both towers, whose text tower reads some positions."""
    torch.manual_seed(0)
    words = word_tokenizer(True)
    body = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {**body, "vocab_size": len(words), "max_position_embeddings": positions}
    text |= {"eos_token_id": 3, "pad_token_id": 0}
    config = hf.CLIPConfig(
        text_config=text, vision_config={**body, "image_size": SIDE, "patch_size": 8}, projection_dim=24
    )
    model = hf.CLIPModel(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.2)
    pictures = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    model.save_pretrained(folder)
    hf.CLIPProcessor(pictures, words).save_pretrained(folder)
    return str(folder)


def save_diffusion(folder: Path) -> tuple[str, str]:
    """Write a Stable Diffusion pipeline and a ControlNet."""
    import diffusers

    made: Any = diffusers
    torch.manual_seed(0)
    names = [chr(code) + end for code in range(97, 123) for end in ("", "</w>")]
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *names])}
    text = hf.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=len(vocabulary),
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    unet = made.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=8, attention_head_dim=4,
    )  # fmt: skip
    control = made.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    for parameter in control.parameters():  # its outputs begin at zero
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.1)
    latents = made.AutoencoderKL(
        block_out_channels=(16, 32), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = made.StableDiffusionControlNetPipeline(
        vae=latents, text_encoder=hf.CLIPTextModel(text), unet=unet, controlnet=control,
        tokenizer=hf.CLIPTokenizer(vocabulary, [], model_max_length=16), scheduler=made.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "sd")
    control.save_pretrained(folder / "control")
    return str(folder / "sd"), str(folder / "control")


def save_joined(folder: Path) -> Path:
    """Write an encoder and a decoder joined by hand (as vit-gpt2-image-captioning is): no processor, no prompt."""
    torch.manual_seed(0)
    words = word_tokenizer(False)
    body = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    eye = hf.ViTConfig(**body, image_size=SIDE, patch_size=8)
    ends: Any = {"is_decoder": True, "add_cross_attention": True, "bos_token_id": 2, "eos_token_id": 3}
    mouth = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=len(words), n_positions=64, **ends)
    model = hf.VisionEncoderDecoderModel(encoder=hf.ViTModel(eye), decoder=hf.GPT2LMHeadModel(mouth))
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    model.generation_config.decoder_start_token_id, model.generation_config.eos_token_id = 2, [3, 1]
    model.generation_config.pad_token_id = 0
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.25)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder

"""The other sides, written here from what they do: the original, GIT's decoding loop, plain batched `generate`.

They take a GitModel's weights (the same tensors, not copies) but none of its code: the image tower is openai-clip's own
module, the decoder transformers' own class as it stands, so that nothing that makes ours faster makes them faster.

The original is kevin671/generative-image-to-text; what its training step and its inference do:
    image features of CLIP in every step -> mapper -> joined with the token embeddings of the captions, padded with the
    end of text to the longest -> the language model with `inputs_embeds` and `labels`, no attention mask: logits of
    every position, a loss that counts padding; AdamW. Inference: `generate` on one picture after the other.
GIT (microsoft/GenerativeImage2Text) decodes one picture a forward with 4 beams and keeps nothing between tokens: for
every new token all of the sequence, image tokens included, runs again for every beam.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from git_model.models.git import GitModel

IGNORED = -100  # transformers' label of what does not count


# ---------------------------------------------------------------------------------------------- the original's model
def clip_network() -> Any:
    """Return openai-clip's model.py, untouched; its package cannot be imported beside a new setuptools."""
    package = importlib.util.find_spec("clip")
    assert package is not None
    place = Path(next(iter(package.submodule_search_locations or ()))) / "model.py"
    spec = importlib.util.spec_from_file_location("benchmarks_openai_clip", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share(module: nn.Module, source: nn.Module) -> None:
    """Give a module made on the meta device the weights of another: the same tensors."""
    trained = {id(p): p.requires_grad for p in source.parameters()}
    module.load_state_dict(source.state_dict(keep_vars=True), assign=True)
    for parameter in source.parameters():  # assigning makes them all trainable
        parameter.requires_grad_(trained[id(parameter)])


class ClipFeatures(nn.Module):
    """CLIP's image tower with the original's `output_grid`: pooled embedding, or the cells' tokens after `ln_post`.

    Args:
        tower: a GitModel's tower, whose weights are used.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        assert not tower.layers, "the original reads the last layer"
        arch, self.grid = tower.arch, tower.features == "grid"
        sizes = (tower.resolution, arch.patch, arch.width, arch.depth, arch.width // 64, arch.embed_dim)
        with torch.device("meta"):
            self.visual: Any = clip_network().VisionTransformer(*sizes)
        if self.grid:
            self.visual.proj = None
        share(self.visual, tower.visual)

    def forward(self, images: Tensor) -> Tensor:
        """(I,3,H,W) normalised -> (I,1,D) or (I,N,D)."""
        if not self.grid:
            return self.visual(images)[:, None]  # (I,1,D)
        net = self.visual
        x = net.conv1(images)
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)  # (I,N,D)
        first = net.class_embedding + torch.zeros(len(x), 1, x.shape[-1], device=x.device)  # (I,1,D)
        x = net.ln_pre(torch.cat([first, x], dim=1) + net.positional_embedding)
        x = net.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        return net.ln_post(x)[:, 1:]  # (I,N,D)


def own_decoder(decoder: Any, config: Any = None) -> Any:
    """Return transformers' own module around a decoder's weights.

    Args:
        decoder: a `...ForCausalLM`.
        config: of the new module, where it differs in what has no weights (dropout, activation); None = the same.
    """
    with torch.device("meta"):
        own = type(decoder)(copy.deepcopy(config or decoder.config))
    share(own, decoder)
    own.tie_weights()
    for name, buffer in decoder.named_buffers():  # tables that no state dict holds
        where, _, last = name.rpartition(".")
        own.get_submodule(where)._buffers[last] = buffer
    own.loss_type = "ForCausalLM"  # what it falls back to, with a warning
    own.generation_config = GenerationConfig()
    return own.eval()


class Original(nn.Module):
    """The original's model over a GitModel's weights.

    Args:
        model: whose weights; an encoder that is not openai-clip's ViT, and the mapper, are used as they are.
        config: of the decoder, see `own_decoder`.
    """

    def __init__(self, model: GitModel, config: Any = None) -> None:
        super().__init__()
        tower: Any = model.vision.tower
        self.encoder = ClipFeatures(tower) if getattr(tower, "is_vit", False) else tower
        self.frozen_encoder = "vision" in model.frozen
        self.mapper: Any = model.mapper
        self.decoder = own_decoder(model.language.model, config)
        self.tokenizer: Any = copy.deepcopy(model.codec.tokenizer)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def prefix(self, images: Tensor) -> Tensor:
        """Normalised (I,3,H,W) -> image tokens (I,K,E)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder):
            features = self.encoder(images)  # (I,N,D)
        return self.mapper(features)  # (I,K,E)

    def outputs(self, images: Tensor, tokens: Tensor, labels: Tensor) -> Any:
        """Return transformers' output: `loss`, and `logits` of every position."""
        prefix = self.prefix(images)  # (I,K,E)
        table = self.decoder.get_input_embeddings()
        embeds = torch.cat([prefix, table(tokens)], dim=1)  # (I,K+T,E)
        before = torch.full(prefix.shape[:2], IGNORED, dtype=torch.long, device=tokens.device)
        return self.decoder(inputs_embeds=embeds, labels=torch.cat([before, labels], dim=1))

    def forward(self, images: Tensor, captions: Sequence[str]) -> Any:
        """The training forward: every token is a label, padding too."""
        tokens = self.tokenizer(list(captions), return_tensors="pt", padding=True).input_ids.to(images.device)
        return self.outputs(images, tokens, tokens)

    def caption(self, images: Tensor, settings: GenerationConfig, prompt: str = "") -> list[str]:
        """The inference: one picture after the other."""
        said = []
        for image in images:
            embeds = self.prefix(image[None])  # (1,K,E)
            if prompt:
                ids = self.tokenizer(prompt, return_tensors="pt").input_ids.to(images.device)
                embeds = torch.cat([embeds, self.decoder.get_input_embeddings()(ids)], dim=1)
            new = self.decoder.generate(inputs_embeds=embeds, generation_config=settings)
            said.append(self.tokenizer.decode(new[0], skip_special_tokens=True).strip())
        return said


def original_step(original: Original, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Sequence[str]], float]:
    """Return the original's training step: forward, backward, AdamW; it clips nothing."""

    def step(images: Tensor, captions: Sequence[str]) -> float:
        loss = original(images, captions).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # its progress bar shows it at each step

    return step


# ----------------------------------------------------------------------------------------------- the original's data
def original_batches(folder: Path, batch_size: int, workers: int = 0) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Yield the batches of an epoch: a picture opened by its row number, CLIP's transform, float32, normalised.

    Args:
        folder: `Train_GCC-training.tsv`, `train/{row:08d}.jpg`.
        batch_size: pictures; an incomplete last batch is dropped.
        workers: processes; the original takes 4.
    """
    from benchmarks.loader import OriginalDataset  # with it comes webdataset, which nothing else here needs

    data = OriginalDataset(folder)
    yield from DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=workers)


# ------------------------------------------------------------------------------------------------ GIT's decoding loop
def git_mask(prefix: int, length: int, like: Tensor) -> Tensor:
    """Return GIT's additive mask (1,1,T,T): image tokens see each other, text sees what came before."""
    index = torch.arange(length, device=like.device)
    allowed = (index[None, :] <= index[:, None]) | (index[None, :] < prefix) & (index[:, None] < prefix)  # (T,T)
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)[None, None]


@torch.no_grad()
def git_loop(
    original: Original, images: Tensor, beams: int, longest: int, eos: int, bidirectional: bool = False
) -> list[list[int]]:
    """Decode as GIT does: a picture at a time, nothing kept between tokens.

    The image tokens are made once a picture and repeated for each beam, the vocabulary's logits are those of all text
    positions so far, of which the last counts. Its own rules of beam search differ from transformers' in length
    penalty and in forbidding a word twice in a row; here they are transformers', so that texts can be compared.

    Args:
        original: the weights, in modules that are not ours.
        images: (I,3,H,W) normalised.
        beams: 4 in GIT.
        longest: most new tokens.
        eos: ends a text.
        bidirectional: with GIT's mask; else the decoder's own.

    Returns:
        for each picture its ids, the end included where it was said.
    """
    body, head = original.decoder.get_decoder(), original.decoder.get_output_embeddings()
    table, found = original.decoder.get_input_embeddings(), []
    for image in images:
        prefix = original.prefix(image[None])  # (1,K,E)

        def scores(texts: list[list[int]], prefix: Tensor = prefix) -> Tensor:
            """All of the sequence again: (beams,t) ids -> (beams,V) log-probabilities of the next token."""
            ids = torch.tensor(texts, dtype=torch.long, device=prefix.device)  # (beams,t)
            embeds = torch.cat([prefix.expand(len(texts), -1, -1), table(ids)], dim=1)  # (beams,K+t,E)
            mask = git_mask(prefix.shape[1], embeds.shape[1], embeds) if bidirectional else None
            hidden = body(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state  # (beams,K+t,E)
            logits = head(hidden[:, prefix.shape[1] - 1 :])  # (beams,1+t,V)
            return logits[:, -1].float().log_softmax(dim=-1)  # (beams,V)

        found.append(beam_search(scores, beams, longest, eos))
    return found


def beam_search(scores: Callable[[list[list[int]]], Tensor], beams: int, longest: int, eos: int) -> list[int]:
    """Return the likeliest text by its mean log-probability, by transformers' rules (length penalty 1).

    Args:
        scores: texts of one length -> log-probabilities of what may follow.
        beams: how many texts go on.
        longest: most tokens.
        eos: ends a text.
    """
    going: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, longest + 1):
        following = scores([text for _, text in going])  # (going,V)
        totals = following + torch.tensor([[total] for total, _ in going], device=following.device)
        best, places = totals.flatten().topk(2 * beams)
        size, after = totals.shape[1], []
        for rank, (total, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            text = [*going[place // size][1], place % size]
            if text[-1] == eos or length == longest:
                if rank < beams:
                    done.append((total / length, text))
            elif len(after) < beams:
                after.append((total, text))
        done = sorted(done, key=lambda pair: -pair[0])[:beams]
        going = after
        if not going or (len(done) == beams and going[0][0] / length <= done[-1][0]):
            break
    return done[0][1]


# ------------------------------------------------------------------------------------------- transformers, in batches
@torch.no_grad()
def plain_generate(
    original: Original, images: Tensor, prompts: Sequence[str], settings: GenerationConfig
) -> list[list[int]]:
    """Return the new ids of one batched `generate` with prompts padded on the left: the reference for texts."""
    prefix = original.prefix(images)  # (I,K,E)
    ids = [original.tokenizer(p, add_special_tokens=False)["input_ids"] if p else [] for p in prompts]
    width = max(map(len, ids))
    table = original.decoder.get_input_embeddings()
    rows, masks = [], []
    for tokens, picture in zip(ids, prefix, strict=True):
        pad = width - len(tokens)
        text = table(torch.tensor(tokens, dtype=torch.long, device=images.device))  # (t,E)
        rows.append(torch.cat([text.new_zeros(pad, text.shape[-1]), picture, text]))  # (pad+K+t,E)
        masks.append([0] * pad + [1] * (len(picture) + len(tokens)))
    mask = torch.tensor(masks, device=images.device)
    new = original.decoder.generate(
        inputs_embeds=torch.stack(rows), attention_mask=mask, generation_config=settings
    )  # (I,new)
    return [row.tolist() for row in new]

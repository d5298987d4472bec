"""LanguageModel: any Hugging Face causal LM that reads image tokens in its prompt; loss and decoding."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from git_model.batch import CaptionBatch
from git_model.errors import UserError
from git_model.models.decoding import Decoding
from git_model.models.lora import adapters, merge_adapters
from git_model.models.prompts import follows_masks, one_a_row
from git_model.models.search import Found, mean_of_text, search
from git_model.models.vocabulary import Room, logits_of, vocabulary_loss

log = logging.getLogger(__name__)


class LanguageModel(nn.Module):
    """A causal LM behind three verbs: embed, loss, generate.

    Args:
        model: a Hugging Face `...ForCausalLM`.
        name: its id, directory or 'small'.
        prefix_attention: 'bidirectional' lets image tokens see each other (GIT's mask), 'causal' leaves the
            decoder's own mask.
        label_smoothing: of the loss.
        compute: of a quantised model, the type of its products; None for others. What is not quantised is float32.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        prefix_attention: str = "causal",
        label_smoothing: float = 0.0,
        compute: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.bidirectional = prefix_attention == "bidirectional"
        self.label_smoothing = label_smoothing
        model.generation_config = GenerationConfig()  # a hub's own penalties would leak into what we call greedy
        config = model.config
        self.compute = compute
        self._branches: bool | None = None
        self._step: tuple[Any, ...] = ()  # the compiled decoder; in a tuple, or it would be a second part of this one
        self.room: Room | None = Room()
        self.sharded = False  # over processes, which then have to take every step together
        self.dim: int = model.get_input_embeddings().embedding_dim  # E
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        learned = config.model_type in ("gpt2", "opt", "gpt_neo", "gpt_bigcode")  # the others rotate: no table
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None) if learned else None

    @property
    def body(self) -> Any:
        """The decoder without its vocabulary projection; what `generate` calls too (OPT's is two floors down)."""
        return self.model.get_decoder()

    @property
    def step(self) -> Any:
        """What decodes the tokens after a prompt: the body, compiled where that was asked for."""
        return self._step[0] if self._step else self.body

    def compile_steps(self) -> None:
        """Compile what is run for every new token: one graph for all lengths, which pays on GPUs, in long runs."""
        self._step = (torch.compile(self.body, dynamic=True),)

    def adapters(self) -> dict[str, Tensor]:
        """Return the parameters of LoRA's adapters by name; none where the model has none."""
        return {f"model.{name}": p for name, p in adapters(self.model).items()}

    def merge_adapters(self) -> None:
        """Add the adapters to the weights, which become float32, and take them out; not for quantised weights."""
        merge_adapters(self.model)

    def embed(self, batch: CaptionBatch, image_tokens: Tensor) -> Tensor:
        """Return the input embeddings with the image tokens in their slots.

        Args:
            batch: ids and masks (R,T).
            image_tokens: (I,K,E), one block an image; a block fills every slot that names its image.
        """
        table = self.model.get_input_embeddings()
        embeds = table(batch.input_ids)  # (R,T,E)
        filled = image_tokens[batch.image_index].flatten(0, 1).to(embeds.dtype)  # (S*K,E)
        return embeds.masked_scatter(batch.image_mask.unsqueeze(-1), filled)  # (R,T,E)

    def hidden(self, embeds: Tensor, batch: CaptionBatch, cache: Any = None) -> Tensor:
        """Run the decoder's body: (R,T,E) -> last hidden states (R,T,E); keys and values go into a cache, if given."""
        if self.max_positions is not None and batch.longest > self.max_positions:
            told = f"is longer than '{self.name}' can hold ({self.max_positions})"
            raise UserError(f"a row of {batch.longest} tokens {told}")
        out = self.body(
            inputs_embeds=embeds,
            attention_mask=self._mask(batch, embeds.dtype),
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state  # (R,T,E)

    def loss(self, embeds: Tensor, batch: CaptionBatch) -> Tensor:
        """Return the mean negative log-likelihood of the targets; logits exist only where a label is."""
        hidden = self.hidden(embeds, batch)  # (R,T,E)
        picked = hidden.flatten(0, 1)[batch.predictors]  # (L,E)
        head, smoothing = self.model.get_output_embeddings(), self.label_smoothing
        if type(head) is not nn.Linear or torch.compiler.is_compiling():  # adapters on it; no loop over sizes
            return F.cross_entropy(self.project(picked).float(), batch.wanted, label_smoothing=smoothing)  # (L,V)
        scale, cap = self._bend()
        with self._exact(picked.device):
            how: dict[str, Any] = {"scale": scale, "cap": cap, "smoothing": smoothing, "room": self.room}
            return vocabulary_loss(self._as_head(picked, head), batch.wanted, head.weight, head.bias, **how)

    def project(self, hidden: Tensor) -> Tensor:
        """Return the vocabulary logits of hidden states: (...,E) -> (...,V).

        The scalings are those of Hugging Face's own heads: Gemma 2 (soft cap), Cohere (scale), Granite (divisor).
        """
        head, (scale, cap) = self.model.get_output_embeddings(), self._bend()
        with self._exact(hidden.device):
            hidden = self._as_head(hidden, head)
            if type(head) is nn.Linear and not torch.compiler.is_compiling():
                logits = logits_of(hidden, head.weight, head.bias)
            else:
                logits = head(hidden)
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _exact(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return what keeps the head of a quantised model, whose sums go over a great width, in float32."""
        return nullcontext() if self.compute is None else torch.autocast(device.type, enabled=False)

    def _as_head(self, hidden: Tensor, head: Any) -> Tensor:
        return hidden.to(head.weight.dtype if self.compute is None else torch.float32)

    def _bend(self) -> tuple[float, float | None]:
        """Return what logits are multiplied by and softly capped at."""
        config = self.model.config
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        bend = (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)
        return bend, getattr(config, "final_logit_softcapping", None)

    @property
    def branches(self) -> bool:
        """Whether prompts of a picture can share its tokens while they are answered; tried out once."""
        if self.sharded or self.model.config.model_type == "gpt_neo":  # whose own mask counts columns
            return False
        if self._branches is None:
            try:
                self._branches = follows_masks(self)
            except torch.OutOfMemoryError:
                raise
            except (
                TypeError,
                ValueError,
                RuntimeError,
                AttributeError,
                IndexError,
            ) as error:  # whatever one says of it
                log.debug("%s: %s", self.name, error)
                self._branches = False
            if not self._branches:
                log.info("'%s' is asked one prompt a row, through transformers' generate", self.name)
        return self._branches

    @torch.no_grad()
    def generate(
        self,
        embeds: Tensor,
        batch: CaptionBatch,
        decoding: Decoding,
        eos_id: int,
        pad_id: int,
        scored: bool = False,
    ) -> Found:
        """Continue the prompts of a batch, several a row where the batch is packed.

        Args:
            embeds: (R,T,E) prompts with image tokens.
            batch: without targets; left-padded with a prompt a row, unless the model `branches`.
            decoding: how.
            eos_id: ends a text.
            pad_id: fills a finished one.
            scored: whether scores are needed: not every way to generate has them at hand.

        Returns:
            the new tokens only, a line for each prompt, and their scores.
        """
        config = self.model.config  # a mask of ours would overrule the model's own windows
        windows = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
        fits = all(window is None or embeds.shape[1] + decoding.longest <= window for window in windows)
        if not fits or (decoding.sample and decoding.beams > 1) or not self.branches:
            return self.reference(*one_a_row(embeds, batch), decoding, eos_id, pad_id, scored)
        self._check_room(batch.longest, decoding)
        with self._arithmetic(embeds.device.type):
            return search(self, embeds, batch, decoding, eos_id, pad_id)

    @torch.no_grad()
    def reference(
        self,
        embeds: Tensor,
        batch: CaptionBatch,
        decoding: Decoding,
        eos_id: int,
        pad_id: int,
        scored: bool = False,
    ) -> Found:
        """Continue left-padded rows of one prompt each by transformers' `generate`; see there for the arguments."""
        if batch.packed or not bool(batch.attention_mask[:, -1].all()):
            raise ValueError("transformers' generate takes one prompt a row, padded on the left")
        self._check_room(embeds.shape[1], decoding)
        told = {"return_dict_in_generate": True, "output_logits": scored}  # logits of every step: large
        settings = decoding.settings(eos_id, pad_id, bos_token_id=eos_id, **told)
        if decoding.sample:
            torch.manual_seed(decoding.seed)
        with self._prefill_mask(batch), self._arithmetic(embeds.device.type):
            out = self.model.generate(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask.long(),
                synced_gpus=self.sharded,
                **settings,
            )
        ids = out.sequences  # (R,new)
        if not scored:
            return Found(ids)
        beams = getattr(out, "beam_indices", None)
        odds = self.model.compute_transition_scores(ids, out.logits, beams, normalize_logits=True)  # (R,new)
        return Found(ids, mean_of_text(odds, ids, eos_id))

    def _arithmetic(self, device: str) -> torch.autocast:
        half = self.compute in (torch.float16, torch.bfloat16)
        return torch.autocast(device, self.compute, enabled=half)

    def _check_room(self, prompt: int, decoding: Decoding) -> None:
        if self.max_positions is not None and prompt + decoding.longest > self.max_positions:
            raise UserError(
                f"{prompt} prompt and image tokens and max_new_tokens {decoding.longest} are more "
                f"than '{self.name}' can hold ({self.max_positions})"
            )

    def _mask(self, batch: CaptionBatch, dtype: torch.dtype) -> Tensor:
        """Return the mask for the body: plain (R,T) where the decoder's own rule is right, else additive (R,1,T,T)."""
        if not batch.packed and not self.bidirectional:
            return batch.attention_mask.long()  # (R,T)
        return full_mask(batch, self.bidirectional, dtype)

    @contextmanager
    def _prefill_mask(self, batch: CaptionBatch) -> Iterator[None]:
        """During generate, give the first forward (the whole prompt) GIT's mask; later steps see everything anyway."""
        if not self.bidirectional:
            yield
            return

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            embeds = kwargs.get("inputs_embeds")
            if embeds is None or embeds.shape[1] != batch.input_ids.shape[1]:
                return args, kwargs
            beams = len(embeds) // len(batch.input_ids)  # beam search repeats every row
            mask = full_mask(batch, True, embeds.dtype).repeat_interleave(beams, 0)  # (R*beams,1,T,T)
            positions = batch.positions.repeat_interleave(beams, 0)  # (R*beams,T)
            return args, {**kwargs, "attention_mask": mask, "position_ids": positions}

        handle = self.body.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def full_mask(batch: CaptionBatch, bidirectional: bool, dtype: torch.dtype) -> Tensor:
    """Return the additive mask of a batch: 0 where a token may look, the dtype's minimum elsewhere.

    A token sees its own segment and the prefix, never later ones; with `bidirectional` image tokens also see later
    image tokens.

    Returns:
        (R,1,T,T) of `dtype`; a padding row sees itself, so that no softmax is empty.
    """
    segments, length = batch.segments, batch.segments.shape[1]
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)  # (R,T,1), (R,1,T)
    index = torch.arange(length, device=segments.device)
    backwards = index[None, :] <= index[:, None]  # (T,T)
    if bidirectional:
        among_images = batch.image_mask.unsqueeze(2) & batch.image_mask.unsqueeze(1)  # (R,T,T)
        backwards = backwards | among_images  # (R,T,T)
    related = (key == 0) | (key == query)  # (R,T,T)
    allowed = backwards & related & batch.attention_mask.unsqueeze(1)  # (R,T,T)
    allowed = allowed | torch.eye(length, dtype=torch.bool, device=segments.device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)  # (R,1,T,T)

"""One face for every model that says something about pictures: a checkpoint of ours, or a published one.

`open_captioner` tells them apart: a file or a native folder of ours is a checkpoint, another folder or a hub's id is a
Hugging Face model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from git_model.errors import UserError
from git_model.tasks.opening import open_checkpoint, pick_device

if TYPE_CHECKING:
    from PIL.Image import Image

    from git_model.batch import Region, Target
    from git_model.checkpoint import Loaded
    from git_model.datasets.collate import Loaded as Asked
    from git_model.models.answers import AnswerTrie
    from git_model.models.language import Decoding
    from git_model.models.published import PublishedModel

log = logging.getLogger(__name__)


class Captioner(Protocol):
    """What the tasks know of a model."""

    shares: bool  # whether prompts of a picture are answered together

    def prepare(self, data: bytes | Image) -> Any:
        """Return a picture, or a file of one, as the model takes it; raises ImageError. Runs in worker processes."""

    def encode(self, pictures: Sequence[Any]) -> list[Any]:
        """Return what is computed once for a picture, however much is asked about it."""

    def length(self, prompt: str, new: int) -> int:
        """Return what prompts are sorted by; raises UserError where the model cannot take it and `new` tokens."""

    def answer(self, encoded: Sequence[Any], prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """Return a text for each pair; pairs of one call may differ in length."""

    def trie(self, answers: Sequence[str], after_prompt: bool) -> AnswerTrie:
        """Return the constraint to these answers."""


class GitCaptioner:
    """A checkpoint of ours."""

    batches = 8  # of pictures held at a time

    def __init__(self, loaded: Loaded, device: str) -> None:
        from git_model.datasets.images import Transform
        from git_model.training import asking

        self.model, self.device = loaded.model.to(device), device
        self.prepare = Transform(self.model.vision.resolution, loaded.config.data.resize)
        self.collator = asking(self.model)
        self.region_mode = loaded.config.region.mode
        self.shares = self.collator.pack  # several prompts of a picture are answered in one row

    def encode(self, pictures: Sequence[Any]) -> list[Any]:
        """Return (K,E) image tokens for each (3,H,W) picture."""
        import torch

        with torch.inference_mode():
            return list(self.model.encode(torch.stack(list(pictures)).to(self.device)))

    def length(self, prompt: str, new: int) -> int:
        """Return the tokens of a prompt."""
        from git_model.batch import IMG_SLOT

        if prompt.count(IMG_SLOT) > 1:
            raise UserError(f"{prompt.count(IMG_SLOT)} {IMG_SLOT} slots for 1 image")
        codec, most = self.model.codec, self.model.language.max_positions
        length = sum(len(codec.prompt(part.strip())) for part in prompt.split(IMG_SLOT))
        whole = len(codec.bos_ids) + self.model.num_image_tokens + length + new
        if most is not None and whole > most:
            raise UserError(f"the prompt has {length} tokens; with image and answer {whole}, more than {most}")
        return length

    def answer(self, encoded: Sequence[Any], prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """Return one text a prompt; prompts that follow each other and have the same picture share its tokens."""
        from git_model.batch import Target
        from git_model.datasets.collate import Loaded as Asked

        items: list[Asked] = []
        for tokens, prompt in zip(encoded, prompts, strict=True):
            target = (Target(prompt=prompt),)
            if self.shares and items and items[-1].images[0] is tokens:
                items[-1] = replace(items[-1], targets=items[-1].targets + target)
            else:
                items.append(Asked("", (tokens,), target))
        return self._answered(items, decoding, encoded=True)[0]

    def see(self, pictures: Sequence[Image], targets: Sequence[Target]) -> Asked:
        """Return what is asked about pictures, boxes in their frames.

        Args:
            pictures: decoded.
            targets: what is asked; their regions in pixels.

        Raises:
            ImageError: a picture, or a box in it, that cannot be used.
        """
        from git_model.datasets.collate import Loaded as Asked
        from git_model.datasets.regions import carried, cut_out, ignored

        if self.region_mode == "crop":
            images, targets = cut_out(targets, pictures, self.prepare)
            return Asked("", images, targets)
        seen = [self.prepare.framed(picture) for picture in pictures]
        given = ignored(targets) if self.region_mode == "ignore" else carried(targets, [frame for _, frame in seen])
        return Asked("", tuple(image for image, _ in seen), given)

    def shortened(self, turns: Sequence[str], regions: Sequence[Region], new: int) -> Target:
        """Return what is asked, without as many of the oldest turns as there is no room for, each with its images.

        Args:
            turns: earlier questions with their answers, then the question.
            regions: of all slots, in order; where no turn has a slot they stay before whatever is left.
            new: tokens of the answer.

        Raises:
            UserError: the question alone is too long.
        """
        from git_model.batch import IMG_SLOT, Target

        codec, most, size = self.model.codec, self.model.language.max_positions, self.model.num_image_tokens
        slots, length, whole = [turn.count(IMG_SLOT) for turn in turns], 0, 0
        for first in range(len(turns)):
            # no regions at all would mean all pictures: the last one stays, before the text
            kept = (regions[sum(slots[:first]) :] or regions[-1:]) if any(slots) else regions
            prompt = " ".join(turns[first:])
            length = sum(codec.lengths([part.strip() for part in prompt.split(IMG_SLOT)]))
            whole = len(codec.bos_ids) + size * len(kept) + length + new
            if (most is None or whole <= most) and length <= codec.max_prompt:
                if first:
                    log.warning("the %d oldest turns are left out: all are longer than the model can hold", first)
                return Target(prompt=prompt, regions=tuple(kept))
        raise UserError(f"the prompt has {length} tokens; with images and answer {whole}, more than {most}")

    def encoded(self, asked: Asked) -> Asked:
        """Return the same with the pictures' features in their place, for what is going to be asked several times."""
        import torch

        with torch.inference_mode():
            return replace(asked, images=tuple(self.model.features(torch.stack(asked.images).to(self.device))))

    def ask(self, asked: Sequence[Asked], decoding: Decoding) -> list[str]:
        """Return a text for every target, in their order; a picture is encoded once for all that is asked about it.

        Raises:
            UserError: prompts that do not fit their pictures or the model.
        """
        return self._answered(asked, decoding)[0]

    def ask_scored(self, asked: Sequence[Asked], decoding: Decoding) -> tuple[list[str], list[float]]:
        """Return what `ask` returns, and the mean log-probability of the tokens of each text, its end included."""
        return self._answered(asked, decoding, scored=True)

    def _answered(
        self, asked: Sequence[Asked], decoding: Decoding, encoded: bool = False, scored: bool = False
    ) -> tuple[list[str], list[float]]:
        """Return texts and scores in the order of the targets, whatever the batch makes of it."""
        count = sum(len(item.targets) for item in asked)
        numbers = iter(range(count))
        numbered = [
            replace(item, targets=tuple(replace(t, question_id=next(numbers)) for t in item.targets)) for item in asked
        ]
        batch = self.collator(numbered)
        if batch.skipped:
            raise UserError(batch.skipped[0].reason)
        batch = batch.to(self.device)
        said, scores = self.model.generate_scored(batch, decoding, batch.images if encoded else None, scored)
        order = [target.question_id for row in batch.targets for target in row]
        place = {number: i for i, number in enumerate(order)}
        mine = [place[number] for number in range(count)]
        return [said[i] for i in mine], [scores[i] for i in mine] if scored else []

    def trie(self, answers: Sequence[str], after_prompt: bool) -> AnswerTrie:
        """Return the constraint to these answers.

        Raises:
            UserError: an answer longer than the model's `max_text_tokens`.
        """
        from git_model.models.answers import AnswerTrie

        codec = self.model.codec
        encoded = {answer: codec.target(answer, after_prompt) for answer in answers}
        if long := [answer for answer, (_, cut) in encoded.items() if cut]:
            raise UserError(f"answer '{long[0]:.60}' has more than {codec.max_target - 1} tokens")
        return AnswerTrie({answer: ids for answer, (ids, _) in encoded.items()}, codec.pad_id)


class PublishedCaptioner:
    """A Hugging Face image-to-text model; prompts of one length share a batch, so none is padded."""

    batches = 1  # its pictures are held as they are, of any size
    shares = False

    def __init__(self, model: PublishedModel, prompt_format: str) -> None:
        self.model, self.prompt_format = model, prompt_format

    def prepare(self, data: bytes | Image) -> Any:
        """Return the RGB picture: the model's own processor does the rest."""
        from git_model.datasets.images import decode_image

        return decode_image(data) if isinstance(data, bytes) else data

    def encode(self, pictures: Sequence[Any]) -> list[Any]:
        """Return the pictures: these models keep their features to themselves."""
        return list(pictures)

    def length(self, prompt: str, new: int) -> int:
        """Return the tokens of a prompt as the model gets it."""
        return self.model.length(self._full(prompt), new)

    def answer(self, encoded: Sequence[Any], prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """Return one text a prompt."""
        full = [self._full(prompt) for prompt in prompts]
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(full):
            groups.setdefault(self.model.length(prompt, decoding.longest), []).append(i)
        texts: dict[int, str] = {}
        for members in groups.values():
            said = self.model.generate([encoded[i] for i in members], [full[i] for i in members], decoding)
            texts |= dict(zip(members, said, strict=True))
        return [texts[i] for i in range(len(full))]

    def trie(self, answers: Sequence[str], after_prompt: bool) -> AnswerTrie:
        """Return the constraint to these answers."""
        return self.model.trie(answers, after_prompt)

    def _full(self, prompt: str) -> str:
        return self.prompt_format.replace("{prompt}", prompt) if prompt else ""


def open_captioner(
    model_path: str, architecture: dict[str, Any], device: str, prompt_format: str = "{prompt}"
) -> GitCaptioner | PublishedCaptioner:
    """Load a model for the tasks.

    Args:
        model_path: a checkpoint, a bare state dict, an exported folder, or the id or folder of a Hugging Face model.
        architecture: the original's five keys; None where not given.
        device: see `pick_device`.
        prompt_format: for published models: what a prompt is put into, at `{prompt}`.

    Raises:
        UserError: nothing there, or it does not fit what was said of it.
    """
    where = pick_device(device)
    if not is_published(model_path):
        if prompt_format != "{prompt}":
            raise UserError("prompt_format is for Hugging Face models; our checkpoints take the question as it is")
        return GitCaptioner(open_checkpoint(model_path, architecture, where), where)
    if given := [key for key, value in architecture.items() if value is not None]:
        raise UserError(f"{', '.join(given)}: not for a Hugging Face model, '{model_path}' says what it is")
    from git_model.models.published import PublishedModel

    return PublishedCaptioner(PublishedModel(model_path, where), prompt_format)


def is_published(model_path: str) -> bool:
    """Tell whether a path is the folder, or a name the hub's id, of a Hugging Face model."""
    from git_model.models.native import is_native

    path = Path(model_path)
    if path.is_dir():
        if is_native(path):
            return False
        if not (path / "config.json").is_file():
            raise UserError(f"{model_path} is a folder without config.json; give a checkpoint or a Hugging Face model")
        return True
    looks_like_id = model_path.count("/") <= 1 and path.suffix != ".pt" and not path.is_absolute()
    return looks_like_id and not path.exists() and not path.parent.is_dir()

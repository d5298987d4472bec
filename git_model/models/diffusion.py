"""Text to image: a paragraph and a picture's edges become another picture, by Stable Diffusion with a ControlNet."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from git_model.errors import UserError
from git_model.models.hub import check_name, quiet_transformers

STEPS = 20
EDGES = (100, 200)  # Canny's thresholds
SIDE = 768  # pixels of the longer side at most
UNIT = 8  # sides are multiples of it


class Redrawer:
    """Draws a picture anew from its edges and a text.

    Args:
        model: id or folder of a Stable Diffusion pipeline.
        controlnet: id or folder of a ControlNet for Canny's edges that fits it.
        device: where it runs.

    Raises:
        UserError: the packages are not installed, or a model is not there.
    """

    def __init__(self, model: str, controlnet: str, device: str = "cpu") -> None:
        try:
            import cv2
            from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UniPCMultistepScheduler
        except ImportError as error:
            raise UserError("redrawing needs: pip install 'generative-image-to-text[diffusion]'") from error
        check_name(controlnet, "ControlNet")
        check_name(model, "diffusion model")
        self.canny, self.device = cv2.Canny, device
        with quiet_transformers():
            try:
                control = ControlNetModel.from_pretrained(controlnet)
                pipe: Any = StableDiffusionControlNetPipeline.from_pretrained(model, controlnet=control)
            except Exception as error:  # whatever the readers of model files say of a bad one
                raise UserError(f"cannot load '{model}' with '{controlnet}': {str(error).splitlines()[0]}") from error
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe.to(device)

    def __call__(self, picture: Image.Image, text: str, seed: int = 0) -> Image.Image:
        """Return a picture of the same shape, its sides rounded; the same for the same seed.

        Args:
            picture: RGB.
            text: what it shows; as much of it as the model's text tower reads.
            seed: of the noise.
        """
        import torch

        scale = min(1.0, SIDE / max(picture.size))
        width, height = (max(UNIT, round(side * scale / UNIT) * UNIT) for side in picture.size)
        small = picture.resize((width, height), Image.Resampling.BICUBIC)
        drawn = edges(small, self.canny)
        noise = torch.Generator().manual_seed(seed)
        out = self.pipe(text, image=drawn, num_inference_steps=STEPS, generator=noise, width=width, height=height)
        return out.images[0]


def edges(picture: Image.Image, canny: Any) -> Image.Image:
    """Return a picture's edges, white on black, RGB."""
    return Image.fromarray(np.asarray(canny(np.asarray(picture), *EDGES))).convert("RGB")

"""Dense captions: what sixteen boxes of a picture cost beside one, the picture being encoded once for all of them.

    python -m benchmarks.regions

ViT-B/32, its grid read under a box (roi), GPT-2 small, random weights; from the picture's file to texts with scores.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from benchmarks import harness
from benchmarks.captions import read_captions
from benchmarks.decoding import NEW, model_of
from benchmarks.features import SIDE
from benchmarks.harness import Options, Result
from benchmarks.report import alone
from git_model.checkpoint import Loaded
from git_model.datasets.images import decode_image
from git_model.models.language import Decoding
from git_model.tasks.captioner import GitCaptioner
from git_model.tasks.dense import describe

BOXES = 16
GATE = 3.0  # of one box's time


def run(options: Options) -> list[Result]:
    """Measure."""
    model, config = model_of({"name": "ViT-B/32", "features": "grid"}, read_captions(options.data), options, "roi")
    captioner = GitCaptioner(Loaded(model, config), str(options.device))
    dice = np.random.default_rng(0)
    noise = Image.fromarray(dice.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIDE, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=90)
    data = file.getvalue()
    corners = dice.uniform(0, 1, (BOXES, 2, 2)) * SIDE
    boxes = [(*np.minimum(a, b).tolist(), *np.maximum(a, b).tolist()) for a, b in corners]
    decoding = Decoding(max_new_tokens=NEW)
    sides = {
        "one": lambda: describe(captioner, decode_image(data), boxes[:1], decoding),
        "all": lambda: describe(captioner, decode_image(data), boxes, decoding, batch_size=BOXES),
    }
    alone_said, together = sides["one"](), sides["all"]()
    assert alone_said[0].text == together[0].text, "the same text whatever is asked beside it"
    timing = harness.alternate(sides, options.rounds or 5, options.device)
    ratio = timing.ratio("all", "one")
    flops = {name: harness.count_flops(side) for name, side in sides.items()}
    print(
        f"dense captions: one box {timing.median('one'):.2f} s, {BOXES} boxes {timing.median('all'):.2f} s", flush=True
    )
    name = f"dense captions: time of {BOXES} boxes beside one"
    facts = {"seconds": timing.seconds, "flops": flops}
    return [Result(name, ratio.median, ratio.low, ratio.high, GATE, at_most=True, details=facts)]


if __name__ == "__main__":
    alone(run, __doc__)

"""The prompt of a drawn scene: what somebody would type to have it made, in the manner of DiffusionDB's users."""

from __future__ import annotations

from git_model.datasets.shapes_text import Scene, place, relation

# what makes a ground look as it does, in the words of a prompt
STYLES = {
    "plain": "minimalist poster, clean flat design",
    "striped": "op art print, bold stripes",
    "dotted": "pointillist painting by georges seurat",
    "checkered": "8-bit pixel art, chess board floor",
    "shaded": "airbrush, smooth gradient, volumetric lighting",
    "grainy": "analog film photograph, heavy grain",
}
PALETTES = {
    "gray": "monochrome concrete",
    "tan": "desert sand and old parchment",
    "mint": "fresh mint ice cream",
    "mauve": "mauve twilight",
}


def prompt(scene: Scene) -> str:
    """Return the one prompt of a scene: its things, then the ground's style and palette, separated by commas."""
    first, *others = scene.things
    said = f"{first.size} {first.name}"
    if others:
        said += f" {relation(first, others[0])} " + " and ".join(f"{thing.size} {thing.name}" for thing in others)
    else:
        said += f" {place(first, scene.side)}"
    pattern, tone = scene.ground.split()
    return f"{said}, {STYLES[pattern]}, {PALETTES[tone]}"

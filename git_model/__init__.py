"""generative-image-to-text: a vision encoder, a mapper and a language model, glued and trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from git_model.checkpoint import load_checkpoint

__all__ = ["load_checkpoint"]


def __getattr__(name: str) -> Any:
    """Return `load_checkpoint`, importing torch when it is first asked for and not before."""
    if name == "load_checkpoint":
        from git_model.checkpoint import load_checkpoint

        return load_checkpoint
    raise AttributeError(f"module 'git_model' has no attribute '{name}'")

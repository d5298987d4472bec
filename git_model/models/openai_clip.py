"""OpenAI's CLIP image encoders: their architecture, their official weight files, their features.

The architecture is openai-clip's own ``clip/model.py``, loaded by path: the package's import needs
pkg_resources (gone from setuptools >= 82) and torchvision, and the network needs neither.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import logging
import math
import os
import sys
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch
from torch import Tensor, nn

from git_model.errors import EXIT_IO, UserError, one_of
from git_model.models.small_vision import QuickGELU, brief, join_maps, resize_positions

log = logging.getLogger(__name__)
CACHE_VARIABLE = "CLIP_CACHE"


@dataclass(frozen=True)
class Architecture:
    """The sizes of an image tower; ``patch`` is None for a ResNet, whose ``depth`` is blocks a stage."""

    embed_dim: int
    resolution: int
    depth: int | tuple[int, ...]
    width: int
    patch: int | None = None

    @property
    def num_layers(self) -> int:
        """How many hidden layers ``layers`` may name: blocks of a ViT, stages of a ResNet."""
        return self.depth if isinstance(self.depth, int) else len(self.depth)

    def features(self, side: int, features: str, layers: tuple[int, ...]) -> tuple[int, int]:
        """Return (D, N) of images of `side` pixels."""
        if features == "pooled":
            return self.embed_dim, 1
        widths = [self.width if self.patch else 2 * self.width * 2**i for i in layers or (self.num_layers,)]
        return sum(widths), (side // (self.patch or 32)) ** 2


# Radford et al. 2021, tables 19 and 20
ARCHITECTURES: dict[str, Architecture] = {
    "RN50": Architecture(1024, 224, (3, 4, 6, 3), 64),
    "RN101": Architecture(512, 224, (3, 4, 23, 3), 64),
    "RN50x4": Architecture(640, 288, (4, 6, 10, 6), 80),
    "RN50x16": Architecture(768, 384, (6, 8, 18, 8), 96),
    "RN50x64": Architecture(1024, 448, (3, 15, 36, 10), 128),
    "ViT-B/32": Architecture(512, 224, 12, 768, 32),
    "ViT-B/16": Architecture(512, 224, 12, 768, 16),
    "ViT-L/14": Architecture(768, 224, 24, 1024, 14),
    "ViT-L/14@336px": Architecture(768, 336, 24, 1024, 14),
}


def _package_file(name: str) -> Path:
    spec = importlib.util.find_spec("clip")  # finds, does not import
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / name).is_file() and (Path(folder) / "simple_tokenizer.py").is_file():
            return Path(folder) / name
    raise UserError("the package openai-clip is not installed: pip install openai-clip")


@functools.cache
def _network() -> ModuleType:
    """Load openai-clip's clip/model.py on its own."""
    name = "git_model_openai_clip_network"
    spec = importlib.util.spec_from_file_location(name, _package_file("model.py"))
    assert spec and spec.loader  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # its LayerNorm computes in float32 with the weights as they are, which fails on a half-precision
    # encoder; torch's accumulates in float32 itself and is the same in float32
    module.LayerNorm = nn.LayerNorm  # type: ignore[attr-defined]
    module.QuickGELU = QuickGELU  # type: ignore[attr-defined]
    sys.modules[name] = module  # torch.compile looks classes up by module name
    return module


def make_visual(arch: Architecture, resolution: int) -> Any:
    """Build the image tower with random weights and position tables for `resolution` pixels."""
    net = _network()
    if arch.patch is None:
        return net.ModifiedResNet(arch.depth, arch.embed_dim, arch.width // 2, resolution, arch.width)
    heads = arch.width // 64
    return net.VisionTransformer(resolution, arch.patch, arch.width, arch.depth, heads, arch.embed_dim)


class OpenAITower(nn.Module):
    """An image tower and the features read off it; parts these never reach are gone (DDP stops at such).

    Args:
        arch: sizes of the tower.
        resolution: input side in pixels.
        features: pooled = class token, normed and projected (ResNet: attention pool); grid = others, normed (last map).
        layers: of these blocks, from 1, the raw tokens (ResNet: stages, pooled to the last one's grid), joined along D.
    """

    def __init__(self, arch: Architecture, resolution: int, features: str, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.arch, self.features, self.layers, self.resolution = arch, features, layers, resolution
        self.visual: Any = make_visual(arch, resolution)
        self.is_vit, self.depth = arch.patch is not None, max(layers, default=arch.num_layers)
        unread = ["proj" if self.is_vit else "attnpool"] if features == "grid" else []
        if self.is_vit:
            self.visual.transformer.resblocks = self.visual.transformer.resblocks[: self.depth]
            unread += ["ln_post"] if layers else []
        else:
            unread += [f"layer{i}" for i in range(self.depth + 1, 5)]
        for part in unread:
            setattr(self.visual, part, None)

    def forward(self, images: Tensor) -> Tensor:
        """Return (I,1,D) pooled or (I,N,D) grid features of normalised images (I,3,H,W)."""
        if images.shape[-2:] != (self.resolution, self.resolution):
            raise ValueError(f"images of {tuple(images.shape[-2:])} px for an encoder of {self.resolution} px")
        return self._vit(images) if self.is_vit else self._resnet(images)

    def _vit(self, images: Tensor) -> Tensor:
        net = self.visual
        x = net.conv1(images).flatten(2).transpose(1, 2)  # (I,N,D)
        first = net.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (I,1,D)
        x = torch.cat([first, x], dim=1) + net.positional_embedding.to(x.dtype)  # (I,1+N,D)
        x = net.ln_pre(x).transpose(0, 1)  # (1+N,I,D): the blocks take the sequence first
        states: dict[int, Tensor] = {}
        for i, block in enumerate(net.transformer.resblocks, 1):
            x = block(x)  # (1+N,I,D)
            if i in self.layers:  # the others are let go
                states[i] = x
        if self.layers:
            return torch.cat([states[i] for i in self.layers], dim=-1)[1:].transpose(0, 1)  # (I,N,D)
        x = x.transpose(0, 1)  # (I,1+N,D)
        return net.ln_post(x[:, 1:]) if self.features == "grid" else net.ln_post(x[:, :1]) @ net.proj

    def _resnet(self, images: Tensor) -> Tensor:
        net, x = self.visual, images.contiguous(memory_format=torch.channels_last)  # the convolutions' own layout
        x = net.relu1(net.bn1(net.conv1(x)))  # (I,C/2,H/2,W/2)
        x = net.relu2(net.bn2(net.conv2(x)))  # (I,C/2,H/2,W/2)
        x = net.avgpool(net.relu3(net.bn3(net.conv3(x))))  # (I,C,H/4,W/4)
        maps = [x := getattr(net, f"layer{i}")(x) for i in range(1, self.depth + 1)]  # (I,C,h,w) each
        if self.features == "pooled":
            return net.attnpool(x)[:, None]  # (I,1,D)
        return join_maps([maps[i - 1] for i in self.layers or (4,)], (self.resolution // 32,) * 2)  # (I,N,D)


def weight_urls() -> dict[str, str]:
    """Return the official files by name, read from openai-clip's clip.py (not run)."""
    for node in ast.parse(_package_file("clip.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_MODELS":
            return ast.literal_eval(node.value)
    raise UserError("the installed openai-clip names no weight files (_MODELS in clip.py)")


def _download(url: str, target: Path, sha256: str, timeout: float) -> None:
    """Fetch to a temporary name, check, rename: `target` is whole or not there."""
    if not url.startswith(("https://", "http://")):
        raise UserError(f"no web address: '{url}'")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    digest, size = hashlib.sha256(), 0
    try:
        with urlopen(url, timeout=timeout) as source, part.open("xb") as out:  # noqa: S310
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                size += out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != sha256:
            raise UserError(f"{url} brought {size} bytes with sha256 {digest.hexdigest()}, expected {sha256}: not kept")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def fetch(name: str, urls: Mapping[str, str] | None = None, cache: str | None = None, timeout: float = 30.0) -> Path:
    """Return the official file of `name`, from the cache or fetched once; its SHA-256 is always checked.

    Args:
        name: a key of `urls`: name -> address ending in ``<sha256>/<file>``; None = openai-clip's table.
        cache: folder; None = $CLIP_CACHE, else ~/.cache/clip as openai-clip.
        timeout: seconds the network may be silent.
    """
    if name not in (urls := weight_urls() if urls is None else urls):
        raise one_of("OpenAI CLIP weights", name, urls)
    sha256, file_name = urls[name].split("/")[-2:]
    target = Path(cache or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "clip") / file_name
    try:
        if target.is_file():
            with target.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    return target
            log.warning("%s is damaged (its sha256 is not %s): fetching it again", target, sha256)
        log.info("fetching %s to %s", urls[name], target)
        _download(urls[name], target, sha256, timeout)
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"cannot fetch the weights of '{name}' ({error}): get {urls[name]} elsewhere and place it as "
            f"{target}, or give the path of the file as the encoder's name"
        ) from error
    except OSError as error:
        raise UserError(f"cannot keep the weights of '{name}' as {target}: {error}", EXIT_IO) from error
    return target


def _is_torchscript(path: Path) -> bool:
    """Tell a TorchScript archive from other files; refuse what is neither that nor a torch.save file."""
    with path.open("rb") as file:
        head = file.read(1024)
    if not head or b"oid sha256:" in head or head.lstrip().startswith(b"<"):
        kind = "empty" if not head else "a Git LFS pointer" if b"oid sha256:" in head else "a web page"
        raise UserError(f"{path} is {kind}; expected an official CLIP .pt file")
    if not head.startswith(b"PK"):
        return False
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if sum(i.file_size for i in infos) > 4 * path.stat().st_size + (64 << 20):
            raise UserError(f"{path} unpacks to far more than its size; expected an official CLIP .pt file")
        code = [i for i in infos if "/code/" in i.filename and i.filename.endswith(".py")]
        # the one TorchScript method that runs while loading; CLIP has none
        if any(b"def __setstate__" in archive.read(i) for i in code):
            raise UserError(f"{path} holds code that runs while loading; expected an official CLIP .pt file")
        return bool(code) and any(i.filename.endswith("/constants.pkl") for i in infos)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the image tower of an official file (TorchScript or state dict): keys without ``visual.``, float32."""
    try:
        if _is_torchscript(path):
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a reader says of bytes that are no such file
        raise UserError(f"{path} cannot be read as an official CLIP .pt file: {brief(error)}") from error
    found = state if isinstance(state, Mapping) else {}
    visual = {k[7:]: v for k, v in found.items() if str(k).startswith("visual.") and isinstance(v, Tensor)}
    if not visual:
        keys = ", ".join(map(str, list(found)[:5])) or f"a {type(state).__name__}"
        raise UserError(f"{path} is no CLIP file: expected keys like visual.conv1.weight, found {keys}")
    return {k: v.detach().float() if v.is_floating_point() else v.detach() for k, v in visual.items()}


def architecture_of(state: Mapping[str, Tensor], path: Path) -> Architecture:
    """Read the sizes off the weights and check every name and shape against them."""
    try:
        if "proj" in state:
            width, _, patch, _ = state["conv1.weight"].shape
            side = math.isqrt(len(state["positional_embedding"]) - 1)
            depth = sum(k.endswith(".attn.in_proj_weight") for k in state)
            arch = Architecture(state["proj"].shape[1], patch * side, depth, width, patch)
        else:
            stages = [{k.split(".")[1] for k in state if k.startswith(f"layer{i}.")} for i in (1, 2, 3, 4)]
            side = math.isqrt(len(state["attnpool.positional_embedding"]) - 1)
            width, embed_dim = len(state["layer1.0.conv1.weight"]), len(state["attnpool.c_proj.weight"])
            arch = Architecture(embed_dim, side * 32, tuple(map(len, stages)), width)
        with torch.device("meta"):
            expected = {k: v.shape for k, v in make_visual(arch, arch.resolution).state_dict().items()}
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
        keys = ", ".join(f"visual.{k}" for k in list(state)[:5])
        raise UserError(f"{path} is no CLIP image tower ({error}); found {keys}") from error
    problems = [f"missing visual.{k}" for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k, shape in expected.items() if k in state and state[k].shape != shape]
    problems += [f"unexpected visual.{k}" for k in state if k not in expected]
    problems += [f"visual.{k} is {tuple(state[k].shape)}, expected {tuple(expected[k])}" for k in wrong]
    if problems:
        raise UserError(f"{path} is no whole CLIP image tower: {'; '.join(problems[:5])}")
    return arch


def load_tower(tower: OpenAITower, state: Mapping[str, Tensor], name: str) -> None:
    """Give the tower (made on the meta device) its weights, fitting position tables to its resolution."""
    weights: dict[str, Tensor] = {}
    for key, own in tower.visual.state_dict().items():
        tensor = state.get(key, torch.zeros_like(own, device="cpu"))  # num_batches_tracked, never read
        if tensor.shape != own.shape:
            side, before = math.isqrt(len(own) - 1), math.isqrt(len(tensor) - 1)
            tensor = torch.cat([tensor[:1], resize_positions(tensor[1:], (side, side))])
            log.info("%s: position embedding interpolated from %d to %d cells a side", name, before, side)
        weights[key] = tensor
    tower.visual.load_state_dict(weights, assign=True)

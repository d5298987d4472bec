"""The image encoders: parity with openai-clip and transformers on random weights, weight files, refusals."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import serving
from torch import Tensor, nn

from git_model.architecture import SmallVisionConfig, VisionConfig
from git_model.errors import EXIT_IO, EXIT_USAGE, UserError
from git_model.models import openai_clip
from git_model.models.small_vision import resize_positions
from git_model.models.vision import VisionEncoder, build_vision, vision_facts

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
TEXT = {"context_length": 8, "vocab_size": 50, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}
TINY_VIT = {"embed_dim": 32, "image_resolution": 64, "vision_layers": 3, "vision_width": 128, "vision_patch_size": 16}
TINY_RN = {
    "embed_dim": 32,
    "image_resolution": 64,
    "vision_layers": (1, 1, 2, 1),
    "vision_width": 8,
    "vision_patch_size": None,
}
HF_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference() -> Any:
    """openai-clip's own network, loaded apart from the product's copy."""
    spec = importlib.util.find_spec("clip")
    assert spec is not None
    folder = Path((spec.submodule_search_locations or [""])[0])
    spec = importlib.util.spec_from_file_location("reference_clip_network", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shaken(model: nn.Module) -> Any:
    """Give every weight and statistic a value of its own (the initial ones hide errors: zeros, ones)."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))
    return model.eval()


def pixels(side: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


@torch.no_grad()
def features(encoder: VisionEncoder, images: Tensor) -> Tensor:
    out = encoder(encoder.normalise(images))
    assert out.shape == (len(images), encoder.num_tokens, encoder.dim)
    return out


def saved(model: nn.Module, path: Path) -> str:
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def tiny(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    """Tiny CLIP models and the state dict files of them: {'vit': (model, path), 'rn': ...}."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny")
    models = {"vit": shaken(reference.CLIP(**TINY_VIT, **TEXT)), "rn": shaken(reference.CLIP(**TINY_RN, **TEXT))}
    return {kind: (model, saved(model, folder / f"{kind}.pt")) for kind, model in models.items()}


# ---- OpenAI CLIP


@pytest.mark.parametrize("kind", ["vit", "rn"])
@torch.no_grad()
def test_pooled_is_clips_own(tiny: dict[str, tuple[Any, str]], kind: str) -> None:
    model, path = tiny[kind]
    encoder = build_vision(VisionConfig(path))
    assert encoder.pretrained
    assert not encoder.training
    images = pixels(64)
    x = encoder.normalise(images)
    torch.testing.assert_close(features(encoder, images)[:, 0], model.visual(x), **CLOSE)


@pytest.mark.parametrize(("name", "arch"), [
    ("RN50", {"embed_dim": 1024, "image_resolution": 224, "vision_layers": (3, 4, 6, 3), "vision_width": 64,
              "vision_patch_size": None}),
    ("ViT-B/32", {"embed_dim": 512, "image_resolution": 224, "vision_layers": 12, "vision_width": 768,
                  "vision_patch_size": 32}),
])  # fmt: skip
@torch.no_grad()
def test_real_architectures(reference: Any, name: str, arch: dict[str, Any]) -> None:
    """The official sizes by name: the same keys and shapes, and the same pooled features."""
    visual = reference.CLIP(**arch, **TEXT).eval().visual
    encoder = build_vision(VisionConfig(name), load_weights=False)
    assert not encoder.pretrained
    encoder.tower.visual.load_state_dict(visual.state_dict())  # type: ignore[union-attr]
    images = pixels(224, 1)
    torch.testing.assert_close(features(encoder, images)[:, 0], visual(encoder.normalise(images)), **CLOSE)


@pytest.mark.parametrize("name", openai_clip.ARCHITECTURES)
def test_every_name_has_weights_and_facts(name: str) -> None:
    url = openai_clip.weight_urls()[name]
    sha256, file = url.split("/")[-2:]
    assert len(bytes.fromhex(sha256)) == 32
    assert file.endswith(".pt")
    arch = openai_clip.ARCHITECTURES[name]
    with torch.device("meta"):
        visual = openai_clip.make_visual(arch, arch.resolution)
    width = visual.ln_post.weight.shape[0] if arch.patch else visual.attnpool.k_proj.in_features
    facts = vision_facts(VisionConfig(name, features="grid"))
    assert (facts.dim, facts.num_tokens, facts.resolution) == (
        width, (arch.resolution // (arch.patch or 32)) ** 2, visual.input_resolution)  # fmt: skip
    assert vision_facts(VisionConfig(name)).dim == visual.output_dim


@torch.no_grad()
def test_vit_grid_and_layers(tiny: dict[str, tuple[Any, str]]) -> None:
    model, path = tiny["vit"]
    visual, raw = model.visual, []
    hooks = [b.register_forward_hook(lambda _m, _i, out: raw.append(out)) for b in visual.transformer.resblocks]
    grid = build_vision(VisionConfig(path, features="grid"))
    images = pixels(64)
    visual(grid.normalise(images))
    for hook in hooks:
        hook.remove()
    states = [r.transpose(0, 1)[:, 1:] for r in raw]  # (I,16,128)
    torch.testing.assert_close(features(grid, images), visual.ln_post(states[-1]), **CLOSE)
    for layers, picked in (((-2,), [1]), ((1, 3), [0, 2]), ((-1, 1), [2, 0])):
        encoder = build_vision(VisionConfig(path, features="grid", layers=layers))
        torch.testing.assert_close(features(encoder, images), torch.cat([states[i] for i in picked], -1), **CLOSE)


@torch.no_grad()
def test_resnet_grid_and_layers(tiny: dict[str, tuple[Any, str]]) -> None:
    model, path = tiny["rn"]
    maps: dict[int, Tensor] = {}
    hooks = [
        getattr(model.visual, f"layer{i}").register_forward_hook(lambda _m, _i, out, i=i: maps.update({i: out}))
        for i in (1, 2, 3, 4)
    ]
    grid = build_vision(VisionConfig(path, features="grid"))
    images = pixels(64)
    model.visual(grid.normalise(images))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(features(grid, images), maps[4].flatten(2).transpose(1, 2), **CLOSE)
    for layers in ((2, 4), (-2,), (1, 2, 3)):
        encoder = build_vision(VisionConfig(path, features="grid", layers=layers))
        wanted = [maps[i if i > 0 else 5 + i] for i in layers]
        pooled = [nn.functional.avg_pool2d(m, m.shape[-1] // 2) for m in wanted]
        expected = torch.cat([p.flatten(2).transpose(1, 2) for p in pooled], -1)
        torch.testing.assert_close(features(encoder, images), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["vit", "rn"])
def test_other_resolutions(tiny: dict[str, tuple[Any, str]], kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny[kind][1]
    cell = 16 if kind == "vit" else 32
    with caplog.at_level(logging.INFO, logger="git_model"):
        pooled = build_vision(VisionConfig(path, resolution=128))
    assert sum("interpolated" in record.message for record in caplog.records) == 1
    assert (pooled.resolution, pooled.num_tokens) == (128, 1)
    assert features(pooled, pixels(128)).isfinite().all()
    grid = build_vision(VisionConfig(path, features="grid", resolution=96))
    assert grid.num_tokens == (96 // cell) ** 2
    features(grid, pixels(96))
    with pytest.raises(ValueError, match=r"images of \(64, 64\) px for an encoder of 96 px"):
        features(grid, pixels(64))
    with pytest.raises(UserError, match=r"resolution 100 is no multiple of (16|32) px.*try 96"):
        vision_facts(VisionConfig(path, resolution=100))


def test_resized_positions() -> None:
    ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1)  # rises with the row
    assert resize_positions(ramp, (4, 4)) is ramp
    larger = resize_positions(ramp, (8, 8)).reshape(8, 8)
    torch.testing.assert_close(larger, larger[:, :1].expand(8, 8))
    assert (larger[1:, 0] > larger[:-1, 0]).all()
    assert resize_positions(torch.ones(16, 5), (3, 7)).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["vit", "rn"])
@pytest.mark.parametrize("chosen", ["pooled", "grid"])
def test_load_weights_false_has_the_same_parameters(tiny: dict[str, tuple[Any, str]], kind: str, chosen: str) -> None:
    """A checkpoint's tensors fit the architecture built without weights, at a changed resolution too."""
    config = VisionConfig(tiny[kind][1], features=chosen, resolution=96)
    whole, empty = build_vision(config), build_vision(config, load_weights=False)
    images = pixels(96)
    assert not torch.allclose(features(whole, images), features(empty, images))
    empty.load_state_dict(whole.state_dict())
    assert torch.equal(features(whole, images), features(empty, images))
    assert (whole.pretrained, empty.pretrained) == (True, False)


# ---- weight files


def official_archive(reference: Any, sizes: dict[str, Any], path: Path) -> Any:
    """Write a TorchScript archive as OpenAI's: half precision, traced, sizes as buffers; return the model."""
    model = shaken(reference.CLIP(**sizes, **TEXT))
    for name, size in (("input_resolution", sizes["image_resolution"]), ("context_length", 8), ("vocab_size", 50)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(size))
    reference.convert_weights(model)
    example = (torch.zeros(1, 3, 64, 64), torch.zeros(1, 8, dtype=torch.long))
    traced: Any = torch.jit.trace(model, example, check_trace=False)
    traced.save(str(path))
    return model.float()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("sizes", [TINY_VIT, TINY_RN], ids=["vit", "rn"])
@torch.no_grad()
def test_archive_and_state_dict_are_one(reference: Any, tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = official_archive(reference, sizes, tmp_path / "archive.pt")
    plain = saved(model, tmp_path / "plain.pt")
    torch.save(model.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    images = pixels(64)
    encoders = [build_vision(VisionConfig(str(p))) for p in (tmp_path / "archive.pt", plain, tmp_path / "legacy.pt")]
    expected = model.visual(encoders[0].normalise(images))
    for encoder in encoders:
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
        torch.testing.assert_close(features(encoder, images)[:, 0], expected, **CLOSE)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


class Loader(nn.Module):
    """A TorchScript module that runs code when it is loaded."""

    @torch.jit.export
    def __getstate__(self) -> tuple[bool, Tensor]:  # type: ignore[override]
        return self.training, torch.zeros(1)

    @torch.jit.export
    def __setstate__(self, state: tuple[bool, Tensor]) -> None:
        self.training = state[0]

    def forward(self, x: Tensor) -> Tensor:
        return x


def _foreign_archive(path: Path, marker: Path) -> None:
    torch.jit.script(nn.Linear(2, 3)).save(str(path))


def _loading_archive(path: Path, marker: Path) -> None:
    torch.jit.script(Loader()).save(str(path))


def _pickle_in_archive(path: Path, marker: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Bomb(marker)))
        archive.writestr("a/constants.pkl", pickle.dumps(()))
        archive.writestr("a/code/__torch__.py", "class A(Module):\n  pass\n")
        archive.writestr("a/version", "3\n")


def _zip_bomb(path: Path, marker: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/code/__torch__.py", b" " * (80 << 20))


BAD_FILES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "empty": (lambda p, m: p.touch(), "empty"),
    "missing": (lambda p, m: None, "No such file"),
    "web page": (lambda p, m: p.write_text("\n<!DOCTYPE html><html>404</html>"), "web page"),
    "lfs": (lambda p, m: p.write_text("version x\noid sha256:4d7a\nsize 12\n"), "LFS pointer"),
    "noise": (lambda p, m: p.write_bytes(bytes(range(256)) * 64), "cannot be read"),
    "text": (lambda p, m: p.write_text("hello"), "cannot be read"),
    "pickle": (lambda p, m: p.write_bytes(pickle.dumps(Bomb(m), protocol=2)), "cannot be read"),
    "torch pickle": (lambda p, m: torch.save({"visual.proj": Bomb(m)}, p), "cannot be read"),
    "pickle in archive": (_pickle_in_archive, "cannot be read"),
    "loading archive": (_loading_archive, "runs while loading"),
    "zip bomb": (_zip_bomb, "unpacks to far more"),
    "tensor": (lambda p, m: torch.save(torch.ones(2), p), "found a Tensor"),
    "foreign archive": (_foreign_archive, "expected keys like visual.conv1.weight, found weight, bias"),
    "foreign": (
        lambda p, m: torch.save({f"layer{i}": torch.ones(1) for i in range(9)}, p),
        "found layer0, layer1, layer2, layer3, layer4$",
    ),
    "half a tower": (lambda p, m: torch.save({"visual.proj": torch.ones(2, 2)}, p), "found visual.proj"),
    "odd shapes": (
        lambda p, m: torch.save({"visual.proj": torch.ones(2), "visual.conv1.weight": torch.ones(3)}, p),
        "no CLIP image tower",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, kind: str) -> None:
    make, message = BAD_FILES[kind]
    path, marker = tmp_path / "weights.pt", tmp_path / "code was run"
    make(path, marker)
    with pytest.raises(UserError, match=message) as error:
        build_vision(VisionConfig(str(path)))
    assert error.value.exit_code == EXIT_USAGE
    assert "\n" not in str(error.value)
    assert "weights.pt" in str(error.value)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_files_are_refused(
    reference: Any, tiny: dict[str, tuple[Any, str]], tmp_path: Path, share: float
) -> None:
    official_archive(reference, TINY_RN, tmp_path / "archive.pt")
    for source in (tmp_path / "archive.pt", Path(tiny["vit"][1])):
        content = source.read_bytes()
        (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match="cannot be read"):
            build_vision(VisionConfig(str(tmp_path / "cut.pt")))


def test_incomplete_towers_are_refused(tiny: dict[str, tuple[Any, str]], tmp_path: Path) -> None:
    state = tiny["vit"][0].state_dict()
    path = tmp_path / "weights.pt"
    for change, message in (
        ({"visual.ln_pre.weight": None}, "missing visual.ln_pre.weight"),
        ({"visual.head.weight": torch.ones(1)}, "unexpected visual.head.weight"),
        ({"visual.ln_post.bias": torch.ones(7)}, r"visual.ln_post.bias is \(7,\), expected \(128,\)"),
    ):
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        torch.save(changed, path)
        with pytest.raises(UserError, match=message):
            build_vision(VisionConfig(str(path)))


# ---- fetching


class Shop(http.server.ThreadingHTTPServer):
    """Serves `files` by path; `cut` leaves out the end of every body."""

    files: dict[str, bytes]
    cut = 0
    requests = 0


class _Counter(http.server.BaseHTTPRequestHandler):
    server: Shop  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.server.requests += 1
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - self.server.cut])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv("no_proxy", "*")
    server = Shop(("127.0.0.1", 0), _Counter)
    server.files = {}
    with serving(server):
        yield server


def offer(shop: Shop, body: bytes, sha256: str | None = None) -> dict[str, str]:
    path = f"/{sha256 or hashlib.sha256(body).hexdigest()}/Tiny.pt"
    shop.files[path] = body
    return {"Tiny": f"http://127.0.0.1:{shop.server_address[1]}{path}"}


def test_fetch_once(shop: Shop, tiny: dict[str, tuple[Any, str]], tmp_path: Path) -> None:
    body = Path(tiny["vit"][1]).read_bytes()
    urls = offer(shop, body)
    cache = tmp_path / "deep" / "cache"
    path = openai_clip.fetch("Tiny", urls, str(cache))
    assert path == cache / "Tiny.pt"
    assert path.read_bytes() == body
    assert openai_clip.fetch("Tiny", urls, str(cache)) == path
    assert shop.requests == 1
    path.write_bytes(body[:-1])  # damaged in the cache
    assert openai_clip.fetch("Tiny", urls, str(cache)).read_bytes() == body
    assert shop.requests == 2
    assert [p.name for p in cache.iterdir()] == ["Tiny.pt"]


def test_fetch_refuses_what_does_not_verify(shop: Shop, tmp_path: Path) -> None:
    body = b"weights" * 1000
    wrong = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(UserError, match=f"7000 bytes with sha256 .*, expected {wrong}"):
        openai_clip.fetch("Tiny", offer(shop, body, wrong), str(tmp_path))
    shop.cut = 10
    with pytest.raises(UserError, match="6990 bytes"):
        openai_clip.fetch("Tiny", offer(shop, body), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_fetch_failures_say_what_to_do(shop: Shop, tmp_path: Path) -> None:
    urls = offer(shop, b"x")
    shop.files.clear()
    target = tmp_path / "Tiny.pt"
    with pytest.raises(UserError, match=f"404.*place it as {target}") as error:
        openai_clip.fetch("Tiny", urls, str(tmp_path))
    assert error.value.exit_code == EXIT_USAGE
    closed = {"Tiny": "http://127.0.0.1:9/" + "0" * 64 + "/Tiny.pt"}
    with pytest.raises(UserError, match=f"cannot fetch.*place it as {target}"):
        openai_clip.fetch("Tiny", closed, str(tmp_path))
    with pytest.raises(UserError, match="no web address"):
        openai_clip.fetch("Tiny", {"Tiny": f"file:///{'0' * 64}/Tiny.pt"}, str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'Tiny'"):
        openai_clip.fetch("Tinny", closed, str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot keep") as error:
        openai_clip.fetch("Tiny", offer(shop, b"x"), str(tmp_path / "file"))
    assert error.value.exit_code == EXIT_IO


def test_build_by_name_reads_the_cache(
    shop: Shop, tiny: dict[str, tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name goes through openai-clip's table, the cache and the file's own check of its sizes."""
    urls = {"ViT-B/32": offer(shop, Path(tiny["vit"][1]).read_bytes())["Tiny"]}
    monkeypatch.setattr(openai_clip, "weight_urls", lambda: urls)
    sizes = openai_clip.Architecture(32, 64, 3, 128, 16)
    monkeypatch.setitem(openai_clip.ARCHITECTURES, "ViT-B/32", sizes)
    monkeypatch.setenv(openai_clip.CACHE_VARIABLE, str(tmp_path))
    vision_facts(VisionConfig("ViT-B/32"))
    build_vision(VisionConfig("ViT-B/32"), load_weights=False)
    assert shop.requests == 0
    encoder = build_vision(VisionConfig("ViT-B/32"))
    images = pixels(64)
    assert torch.equal(features(encoder, images), features(build_vision(VisionConfig(tiny["vit"][1])), images))
    assert (tmp_path / "Tiny.pt").is_file()


# ---- Hugging Face


def hf_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the image tower of openai-clip to transformers' names."""
    out = {"visual_projection.weight": state["proj"].T.contiguous()}
    head = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    for key, tensor in state.items():
        if key in head:
            out[f"vision_model.{head[key]}"] = tensor
        elif key.startswith("ln_"):
            out[f"vision_model.{key.replace('ln_pre', 'pre_layrnorm').replace('ln_post', 'post_layernorm')}"] = tensor
        elif key.startswith("transformer.resblocks."):
            _, _, number, *rest = key.split(".")
            name, stem = ".".join(rest), f"vision_model.encoder.layers.{number}"
            if "in_proj" in name:
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{stem}.self_attn.{part}_proj.{name.split('_')[-1]}"] = piece
            else:
                for old, new in (("attn.out", "self_attn.out"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                                 ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):  # fmt: skip
                    name = name.replace(old, new)
                out[f"{stem}.{name}"] = tensor
    return out


@pytest.fixture(scope="module")
def clip_twin(tiny: dict[str, tuple[Any, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny ViT as transformers checkpoints: the image tower, without its projection, and a whole CLIP."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("twin")
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2,
             "image_size": 64, "patch_size": 16, "hidden_act": "quick_gelu"}  # fmt: skip
    tower = hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**sizes, projection_dim=32))
    tower.load_state_dict(hf_keys(tiny["vit"][0].visual.state_dict()))
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    whole = hf.CLIPModel(hf.CLIPConfig(vision_config=sizes, text_config=text, projection_dim=32))  # nested one: 512
    whole.load_state_dict(tower.state_dict(), strict=False)
    for name, model in (("tower", tower), ("bare", tower.vision_model), ("whole", whole)):
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ("tower", "bare", "whole")}


@pytest.mark.parametrize("kind", ["tower", "whole"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"features": "grid"},
        {"features": "grid", "layers": (1, -1)},
        {"resolution": 96},
        {"features": "grid", "resolution": 32},
    ],
)
def test_hf_and_openai_clip_agree(
    tiny: dict[str, tuple[Any, str]], clip_twin: dict[str, Path], kind: str, options: dict[str, Any]
) -> None:
    ours = build_vision(VisionConfig(tiny["vit"][1], **options))
    theirs = build_vision(VisionConfig(str(clip_twin[kind]), **options))
    assert (ours.mean, ours.std, ours.resolution) == (theirs.mean, theirs.std, theirs.resolution)
    images = pixels(ours.resolution)
    torch.testing.assert_close(features(theirs, images), features(ours, images), **CLOSE)


def test_hf_clip_without_projection(tiny: dict[str, tuple[Any, str]], clip_twin: dict[str, Path]) -> None:
    encoder = build_vision(VisionConfig(str(clip_twin["bare"])))
    assert encoder.dim == 128
    images, visual = pixels(64), tiny["vit"][0].visual
    expected = build_vision(VisionConfig(tiny["vit"][1]))
    projected = features(encoder, images) @ visual.proj
    torch.testing.assert_close(projected, features(expected, images), **CLOSE)


def hf_model(kind: str) -> Any:
    import transformers as hf

    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    sizes: dict[str, Any] = {**HF_SIZES, "num_hidden_layers": 2}
    naflex: dict[str, Any] = {k: v for k, v in sizes.items() if k != "image_size"} | {"num_patches": 16}
    dino = {k: v for k, v in sizes.items() if k != "intermediate_size"}
    convs: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 64}
    return {
        "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=sizes, text_config=text)),
        "siglip2": lambda: hf.Siglip2Model(hf.Siglip2Config(vision_config=naflex, text_config=text)),
        "siglip vision": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes)),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**dino, mlp_ratio=2)),
        "registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**dino, num_register_tokens=3)),
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**sizes)),
        "vit classifier": lambda: hf.ViTForImageClassification(hf.ViTConfig(**sizes)),
        "convnext": lambda: hf.ConvNextModel(hf.ConvNextConfig(**convs)),
        "convnextv2": lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**convs)),
    }[kind]()


def patches(images: Tensor, size: int) -> Tensor:
    """Cut as transformers' own NaFlex processor does: rows of (h, w, channel)."""
    count, _, height, width = images.shape
    x = images.permute(0, 2, 3, 1).reshape(count, height // size, size, width // size, size, 3)
    return x.transpose(2, 3).reshape(count, -1, size * size * 3)


def hf_expected(model: Any, kind: str, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return pooled, grid and raw hidden states (tokens of cells only, or maps) from transformers' own outputs."""
    if kind == "siglip2":
        shapes, mask = torch.tensor([[4, 4]] * len(x)), torch.ones(len(x), 16, dtype=torch.long)
        inputs = {
            "pixel_values": patches(x, 16),
            "spatial_shapes": shapes,
            "pixel_attention_mask": mask,
        }
    else:
        inputs = {"pixel_values": x}
    body = getattr(model, "vision_model", getattr(model, "vit", getattr(model, "convnextv2", model)))
    out = body(**inputs, output_hidden_states=True)
    last = out.last_hidden_state
    if last.ndim == 4:
        return out.pooler_output, last.flatten(2).transpose(1, 2), out.hidden_states
    extra = last.shape[1] - 16
    pooled = last[:, 0] if kind.startswith("vit") else out.pooler_output
    return pooled, last[:, extra:], tuple(h[:, extra:] for h in out.hidden_states)


SIGLIPS, DINOS = ("siglip", "siglip2", "siglip vision"), ("dinov2", "registers")
HF_KINDS = (*SIGLIPS, *DINOS, "vit", "vit classifier", "convnext", "convnextv2")


@pytest.mark.parametrize("kind", HF_KINDS)
def test_hf_models(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = shaken(hf_model(kind))
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    pooled = build_vision(VisionConfig(str(tmp_path)))
    grid = build_vision(VisionConfig(str(tmp_path), features="grid"))
    layers = build_vision(VisionConfig(str(tmp_path), features="grid", layers=(-2, -1)))
    large = build_vision(VisionConfig(str(tmp_path), features="grid", resolution=96))
    assert capfd.readouterr() == ("", "")  # no load reports, no progress bars
    images = pixels(64)
    with torch.no_grad():
        vector, tokens, states = hf_expected(model, kind, pooled.normalise(images))
    torch.testing.assert_close(features(pooled, images)[:, 0], vector, **CLOSE)
    torch.testing.assert_close(features(grid, images), tokens, **CLOSE)
    if states[-1].ndim == 4:
        before = nn.functional.avg_pool2d(states[-2], 2)
        joined = torch.cat([before, states[-1]], 1).flatten(2).transpose(1, 2)
    else:
        joined = torch.cat([states[-2], states[-1]], -1)
    torch.testing.assert_close(features(layers, images), joined, **CLOSE)
    assert large.num_tokens == (96 // (32 if "convnext" in kind else 16)) ** 2
    features(large, pixels(96))


def test_hf_preprocessing(tmp_path: Path) -> None:
    hf_model("dinov2").save_pretrained(tmp_path)
    assert vision_facts(VisionConfig(str(tmp_path))).resolution == 64
    settings = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40},
                "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = build_vision(VisionConfig(str(tmp_path), features="grid"))
    assert (encoder.resolution, encoder.num_tokens) == (32, 4)
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    settings |= {"do_center_crop": False, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"height": 48, "width": 48}}))
    encoder = build_vision(VisionConfig(str(tmp_path)), load_weights=False)
    assert (encoder.resolution, encoder.mean, encoder.std) == (48, (0.0,) * 3, (1.0,) * 3)


def test_hf_refusals(tmp_path: Path) -> None:
    import transformers as hf

    small = {"n_embd": 32, "n_layer": 1, "n_head": 1, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    hf.GPT2Model(hf.GPT2Config(**small)).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match="no image encoder but a model of type 'gpt2'"):
        build_vision(VisionConfig(str(tmp_path / "text")))
    with pytest.raises(UserError, match="cannot load the image encoder 'nobody/nothing'"):
        build_vision(VisionConfig("nobody/nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load"):
        build_vision(VisionConfig(str(tmp_path / "empty")))
    hf_model("vit").save_pretrained(tmp_path / "vit")
    weights = tmp_path / "vit" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot load"):
        build_vision(VisionConfig(str(tmp_path / "vit")))
    for name in ("dinov2", "vit"):
        torch.manual_seed(0)
        hf_model(name).save_pretrained(tmp_path / "other")
        if name == "vit":
            state = load_file(tmp_path / "other" / "model.safetensors")
            save_file({**state, "layernorm.bias": torch.ones(7)}, tmp_path / "other" / "model.safetensors")
        weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
        with pytest.raises(UserError, match=r"lack, or have in another shape: .*layernorm"):
            build_vision(VisionConfig(str(tmp_path / "vit")))
    marker = tmp_path / "code was run"
    foreign = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "empty" / "config.json").write_text(json.dumps(foreign))
    (tmp_path / "empty" / "code.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(UserError, match="cannot load"):
        build_vision(VisionConfig(str(tmp_path / "empty")))
    assert not marker.exists()


# ---- small, and what all share


@pytest.mark.parametrize("name", ["ViT-B/31", "vit-b/32", "RN51", "resnet", "ViT-L/14-336"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown image encoder.*one of: RN50, .*ViT-B/32, .*small") as error:
        vision_facts(VisionConfig(name))
    assert name == "resnet" or "did you mean" in str(error.value)


def test_small() -> None:
    config = VisionConfig("small", features="grid")
    grid, pooled = build_vision(config), build_vision(VisionConfig("small"))
    assert (grid.dim, grid.num_tokens, grid.resolution, grid.pretrained) == (128, 64, 64, False)
    pooled.load_state_dict(grid.state_dict())
    images = pixels(64)
    torch.testing.assert_close(features(pooled, images), features(grid, images).mean(1, keepdim=True), **CLOSE)
    assert grid(grid.normalise(pixels(96))).shape == (2, 144, 128)  # another input stretches the positions
    sizes = SmallVisionConfig(width=48, depth=3, heads=3, stem=(8, 20))
    encoder = build_vision(VisionConfig("small", features="grid", layers=(1, -1), resolution=32, small=sizes))
    assert (encoder.dim, encoder.num_tokens) == (96, 64)
    features(encoder, pixels(32))
    with pytest.raises(UserError, match="no multiple of 8 px"):
        build_vision(VisionConfig("small", resolution=60))


def test_small_learns_from_scratch() -> None:
    """Which of four quarters is bright: solved in a few steps, so position and gradient both work."""
    encoder = build_vision(
        VisionConfig("small", resolution=32, small=SmallVisionConfig((16, 32), width=32, depth=1))
    ).train()
    head = nn.Linear(encoder.dim, 4)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    quarter = torch.arange(32) % 4
    for _ in range(60):
        images = torch.randint(0, 60, (32, 3, 32, 32), dtype=torch.uint8)
        for image, q in zip(images, quarter.tolist(), strict=True):
            image[:, 16 * (q // 2) :, 16 * (q % 2) :][:, :16, :16] += 120
        logits = head(encoder(encoder.normalise(images))[:, 0])
        loss = nn.functional.cross_entropy(logits, quarter)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def every_encoder(tiny: dict[str, tuple[Any, str]], clip_twin: dict[str, Path]) -> Iterator[VisionEncoder]:
    every: list[dict[str, Any]] = [{}, {"features": "grid"}, {"features": "grid", "layers": (1, 2)}]
    for name in ("small", tiny["vit"][1], tiny["rn"][1], str(clip_twin["whole"])):
        for options in every:
            yield build_vision(VisionConfig(name, **options))


def test_what_all_encoders_share(tiny: dict[str, tuple[Any, str]], clip_twin: dict[str, Path]) -> None:
    images = pixels(64, 3)
    for encoder in every_encoder(tiny, clip_twin):
        alone = torch.cat([features(encoder, image[None]) for image in images])
        torch.testing.assert_close(features(encoder, images), alone, **CLOSE)  # batch == single
        assert len(features(encoder, images[:0])) == 0
        encoder.train()
        encoder(encoder.normalise(images)).square().sum().backward()
        for name, parameter in encoder.named_parameters():  # DDP: whatever is trainable is reached
            assert parameter.requires_grad == (parameter.grad is not None), name
        assert not any(key.startswith("pixel_") for key in encoder.state_dict())


def test_normalise(tiny: dict[str, tuple[Any, str]], clip_twin: dict[str, Path]) -> None:
    images = pixels(64)
    for encoder in every_encoder(tiny, clip_twin):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.mean, encoder.std))
        torch.testing.assert_close(encoder.normalise(images), (images / 255 - mean) / std, **CLOSE)
        exact = features(encoder, images)
        half = encoder.to(torch.bfloat16)
        assert half.normalise(images).dtype == torch.bfloat16
        out = features(half, images)
        assert out.dtype == torch.bfloat16
        cosine = nn.functional.cosine_similarity(out.float().flatten(1), exact.flatten(1))
        assert (cosine > 0.99).all(), encoder.name
        with pytest.raises(ValueError, match="uint8"):
            encoder.normalise(images.float())


def test_bad_layers(tiny: dict[str, tuple[Any, str]]) -> None:
    for name, count in (("ViT-B/32", 12), ("RN50", 4), ("small", 2), (tiny["vit"][1], 3)):
        for layer in (0, count + 1, -count - 1):
            with pytest.raises(UserError, match=rf"has no layer {layer}; one of: 1..{count} or -{count}..-1"):
                vision_facts(VisionConfig(name, features="grid", layers=(layer,)))
    with pytest.raises(UserError, match="needs grid features"):
        VisionConfig("RN50", layers=(1,))

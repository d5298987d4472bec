"""docs/serving.md: its commands resolve, its Python runs on an export as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from exporting import checkpoint, jpeg, llava_case
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel

from git_model.tasks.params import parse_params
from git_model.tasks.registry import resolve, run


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "serving.md").read_text(encoding="utf-8")


def test_its_commands_resolve(page: str) -> None:
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines()
    asked = [words[3] for line in lines if (words := shlex.split(line))[1:3] == ["inference.py", "-p"]]
    assert [resolve(parse_params(text))[0].__name__ for text in asked] == ["export", "export"]


def test_its_python_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("picture.jpg").write_bytes(jpeg(0, 80, 64))
    path = checkpoint(tmp_path, **llava_case(tmp_path, "openai clip, linear as a pair of GELUs, small llama"))
    run({"type": "export", "model_path": path, "out_dir": "exported/x"})
    run({"type": "export", "model_path": path, "out_dir": "exported/native", "format": "native"})
    for prompt in ("", "what color is it?"):
        ask = {"type": "test_git_inference_single_image", "image_path": "picture.jpg", "device": "cpu"}
        texts = {str(run({**ask, "model_path": m, "prompt": prompt})["text"]) for m in (path, "exported/native")}
        assert len(texts) == 1
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "serving.md", "exec"), {})
    assert "torch.Size([1," in capsys.readouterr().out

    whole = AutoModelForImageTextToText.from_pretrained("exported/x").eval()
    parts = Path("exported/x-parts")
    ids = torch.tensor([[5, 70, 9]])
    with torch.no_grad():
        language = AutoModelForCausalLM.from_pretrained(parts / "language").eval()(input_ids=ids).logits
        torch.testing.assert_close(language, whole(input_ids=ids).logits)
        x = torch.rand(1, 3, 64, 64)
        seen = CLIPVisionModel.from_pretrained(parts / "vision").eval()(x, output_hidden_states=True).hidden_states[-1]
        weights = torch.load(parts / "vision" / "llava.projector")
        y = torch.nn.functional.linear(seen[:, 1:], *(weights[f"model.mm_projector.0.{n}"] for n in ("weight", "bias")))
        y = torch.nn.functional.gelu(y)
        y = torch.nn.functional.linear(y, *(weights[f"model.mm_projector.2.{n}"] for n in ("weight", "bias")))
        torch.testing.assert_close(y[0], whole.get_image_features(x).pooler_output[0])

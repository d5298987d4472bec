"""What is said of a card before the first tensor is on it."""

from __future__ import annotations

import pytest
import torch

from git_model.errors import UserError
from git_model.hardware import check_card, check_precision, peak_memory, reset_peak_memory, runs_on, suited_dtype
from git_model.tasks.opening import pick_device

# torch.cuda.get_arch_list() of the default wheels of 2.10.0 (CUDA 12.8) and 2.13.0 (CUDA 13.0)
OLD = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
NEW = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((7, 0), OLD, True),
        ((7, 0), NEW, False),
        ((7, 2), OLD, True),
        ((8, 9), NEW, True),
        ((9, 0), NEW, True),
        ((12, 0), OLD, True),
        ((12, 1), OLD, True),
        ((11, 0), OLD, False),
        ((13, 0), NEW, False),
        ((13, 0), [*NEW, "compute_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((6, 1), OLD, False),
    ],
)
def test_which_builds_run_on_which_cards(capability: tuple[int, int], built: list[str], expected: bool) -> None:
    assert runs_on(capability, built) is expected


def card(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], built: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: capability >= (8, 0))


def test_a_v100_under_a_build_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "Tesla V100", (7, 0), NEW)
    with pytest.raises(UserError, match=r"Tesla V100 \(sm_70\): torch .* sm_75, .* only; install torch==2.10.0"):
        check_card()
    card(monkeypatch, "Tesla V100", (7, 0), OLD)
    check_card()


def test_a_card_newer_or_older_than_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "Next", (14, 0), NEW)
    with pytest.raises(UserError, match="install a newer torch, built for sm_140"):
        check_card()
    card(monkeypatch, "GTX 1080", (6, 1), OLD)
    with pytest.raises(UserError, match="install an older torch, built for sm_61"):
        check_card()


def test_bf16_on_a_v100_is_refused_though_torch_would_emulate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "Tesla V100", (7, 0), OLD)
    with pytest.raises(UserError, match="Tesla V100 has no bf16 arithmetic; choose --precision fp16"):
        check_precision("bf16", "auto")
    with pytest.raises(UserError, match="choose --lm_dtype float16 and --precision fp16"):
        check_precision("fp32", "bfloat16")
    check_precision("fp16", "float16")
    card(monkeypatch, "A100", (8, 0), OLD)
    check_precision("bf16", "bfloat16")


def test_what_an_a100_trained_is_read_by_a_v100(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card(monkeypatch, "Tesla V100", (7, 0), OLD)
    assert suited_dtype("bfloat16", "cuda:0") == "float16"
    assert "Tesla V100 has no bf16 arithmetic: float16 instead" in caplog.text
    assert suited_dtype("float32", "cuda:0") == "float32"
    assert suited_dtype("bfloat16", "cpu") == "bfloat16"
    card(monkeypatch, "A100", (8, 0), OLD)
    assert suited_dtype("bfloat16", "cuda:0") == "bfloat16"


def test_inference_looks_at_the_card_too(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, "Tesla V100", (7, 0), NEW)
    with pytest.raises(UserError, match=r"install torch==2.10.0"):
        pick_device("cuda")


def test_fp16_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_card()
    check_precision("bf16", "auto")
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        check_precision("fp16", "auto")


def test_the_peak_is_of_what_came_after_the_reset() -> None:
    device = torch.device("cpu")
    block = torch.ones(50_000_000)  # 200 MB
    high = peak_memory(device)
    del block
    reset_peak_memory(device)
    assert peak_memory(device) < high - 100e6
    block = torch.ones(50_000_000)
    assert peak_memory(device) > high - 100e6
    del block

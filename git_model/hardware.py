"""What the machine can do: kernels for its card, arithmetic for a precision, memory used at most."""

from __future__ import annotations

import contextlib
import logging
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from git_model.errors import UserError

log = logging.getLogger(__name__)

VOLTA_ADVICE = (
    "install torch==2.10.0, the newest default wheel with sm_70 (its driver: 525 to 580), or the cu126 build of a newer"
)


def check_card(device: str | None = None) -> None:
    """Say at the start that this build of torch has no kernels for the card: its own error comes late, and is obscure.

    Raises:
        UserError: names the card, what the build is for, and the build to install.
    """
    if not torch.cuda.is_available():
        return
    capability, built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not built or runs_on(capability, built):
        return
    number = f"{capability[0]}{capability[1]}"
    if capability < (7, 5):
        advice = VOLTA_ADVICE if capability == (7, 0) else f"install an older torch, built for sm_{number}"
    else:
        advice = f"install a newer torch, built for sm_{number}"
    raise UserError(
        f"{torch.cuda.get_device_name(device)} (sm_{number}): torch {torch.__version__} has kernels for "
        f"{', '.join(built)} only; {advice}"
    )


def runs_on(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Tell whether a card can run one of the architectures a build was made for.

    Args:
        capability: the card's compute capability.
        built: such as 'sm_80' (runs on 8.0 and later 8.x) and 'compute_90' (compiled anew on anything later).
    """
    for name in built:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if found is None:
            continue
        kind, version, own = found[1], (int(found[2]), int(found[3])), bool(found[4])
        if own and version != capability:  # sm_90a is for 9.0 alone
            continue
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


def check_precision(precision: str, dtype: str) -> None:
    """Refuse arithmetic the machine has not; emulated bf16 would "work" on a V100, slowly.

    Args:
        precision: of the training: fp32, fp16, bf16.
        dtype: of a frozen decoder: auto, float32, float16, bfloat16.

    Raises:
        UserError: names the card and what to choose.
    """
    if not torch.cuda.is_available():
        if precision == "fp16":
            raise UserError("--precision fp16 needs a GPU (its scaler has nothing to do on a CPU); choose fp32 or bf16")
        return
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return
    card = torch.cuda.get_device_name()
    if precision == "bf16":
        raise UserError(f"{card} has no bf16 arithmetic; choose --precision fp16")
    if dtype == "bfloat16":
        raise UserError(f"{card} has no bf16 arithmetic; choose --lm_dtype float16 and --precision fp16")


def suited_dtype(dtype: str, device: torch.device | str) -> str:
    """Return a half-precision type that the device has arithmetic for: a V100 reads what an A100 trained."""
    if dtype != "bfloat16" or torch.device(device).type != "cuda":
        return dtype
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return dtype
    log.warning("%s has no bf16 arithmetic: float16 instead", torch.cuda.get_device_name(device))
    return "float16"


def reset_peak_memory(device: torch.device) -> None:
    """Forget what was held at a time so far: loading a model takes more than training it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process held at a time: of the card's memory, or of the machine's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

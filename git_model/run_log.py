"""What a run leaves to read: metrics.jsonl, the trackers, run_report.json, loss_curve.png."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from git_model.config import Config
from git_model.datasets.files import write_all
from git_model.errors import UserError
from git_model.hardware import peak_memory
from git_model.schema import to_dict
from git_model.training import merge_ledgers

if TYPE_CHECKING:
    from accelerate import Accelerator


log = logging.getLogger(__name__)


class RunLog:
    """metrics.jsonl, the trackers, and the loss curve; a NaN is written as "nan", never as 0.

    Args:
        accelerator: the engine; only its main process writes.
        config: the run's; written as resolved_config.yml.
    """

    def __init__(self, accelerator: Accelerator, config: Config) -> None:
        self.accelerator = accelerator
        self.folder = Path(config.train.output_dir)
        self.path = self.folder / "metrics.jsonl"
        self.unit = "nats a token" if config.regressor.type == "none" else "1 - cosine"
        self.started = time.monotonic()
        if accelerator.is_main_process:
            import yaml

            self.folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(to_dict(config), sort_keys=False)
            write_all([(self.folder / "resolved_config.yml", [text.encode()])])
        if config.train.report_to != "none":
            try:
                accelerator.init_trackers("generative-image-to-text", config={"recipe": json.dumps(to_dict(config))})
            except Exception as error:  # the tracker's own kinds: no login, no network
                told = f"{config.train.report_to} cannot start: {' '.join(str(error).split())}"
                raise UserError(f"{told}; --report_to none trains without it") from error

    def trim(self, step: int) -> None:
        """Drop lines after `step`: a resumed run writes them again."""
        if self.accelerator.is_main_process and self.path.exists():
            kept = [line for line in read_lines(self.path) if line["step"] <= step]
            write_all([(self.path, (json.dumps(line).encode() + b"\n" for line in kept))])

    def write(self, step: int, **values: float) -> None:
        """Append one line."""
        if not self.accelerator.is_main_process:
            return
        plain = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        line = {"step": step, "seconds": round(time.monotonic() - self.started, 2), **plain}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.accelerator.log(values, step=step)

    def finish(self, samples: dict[str, Any], skipped_steps: int) -> None:
        """Write run_report.json, with the samples of all ranks, and loss_curve.png."""
        from accelerate.utils import gather_object

        ranks = gather_object([samples])
        if self.accelerator.is_main_process:
            peak = peak_memory(self.accelerator.device)
            log.info("peak memory %.1f MB (%s)", peak / 1e6, self.accelerator.device)
            report = {"samples": merge_ledgers(ranks), "skipped_steps": skipped_steps, "peak_memory_bytes": peak}
            write_all([(self.folder / "run_report.json", [json.dumps(report, indent=2).encode() + b"\n"])])
            plot_loss(self.path, self.folder / "loss_curve.png", self.unit)
        self.accelerator.wait_for_everyone()  # a process that leaves the group early may abort
        self.accelerator.end_training()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def plot_loss(metrics: Path, picture: Path, unit: str = "nats a token") -> None:
    """Draw training and validation loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_lines(metrics)
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in ("loss", "val_loss"):
        points = [(line["step"], float(line[name])) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if name == "val_loss" else None)
    axes.set(xlabel="step", ylabel=unit, title="loss")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)

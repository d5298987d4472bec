"""A training run: what it holds, and each phase of the loop as one verb. The loop itself is in train.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from git_model import checkpoint, engine, regression, resume, training, validation
from git_model.batch import Batch
from git_model.cluster import StopRequest, note_stop
from git_model.config import Config
from git_model.datasets.loader import train_batches
from git_model.datasets.sources import build_source
from git_model.encoding import use_features
from git_model.errors import Preempted, UserError
from git_model.hardware import reset_peak_memory
from git_model.models.build import build
from git_model.optimizer import build_optimizer, learning_rate_factor
from git_model.run_log import RunLog
from git_model.saves import Saves
from git_model.tokens import tokenizer_from_json, train_tokenizer
from git_model.weights import held_tensors, identify, start_from, whole

log = logging.getLogger(__name__)


class Run:
    """Model, data, optimiser and the position in the run.

    Args:
        config: all of it.
        stop: whether this process was asked to stop.

    Raises:
        UserError: bad input, found before the first step.
    """

    def __init__(self, config: Config, stop: StopRequest | None = None) -> None:
        options = config.train
        self.stop = stop or StopRequest()
        self.folder = Path(options.output_dir)
        self.accelerator = engine.build_accelerator(config)

        # data first: it is cheap, and most mistakes are there
        source = build_source(config.data.train, config.data.dir)
        val_source = build_source(config.data.val, config.data.dir)
        self.config = config = regression.completed(config, source, val_source)

        self.saves, world = Saves(self.folder, options.keep), self.accelerator.num_processes
        found = self._newest_save() if options.resume == "auto" else None
        latest = resume.read_model(found, config, world) if found else None
        given = None
        if latest is None and options.init_from is not None:
            given = checkpoint.read_content(Path(options.init_from))
        tokenizer = None
        if "language" in config.parts and config.language.name == "small":  # its tokenizer: from the texts at hand
            saved: Any = (latest or given or {}).get("tokenizer")
            size = config.language.small.vocab_size
            tokenizer = tokenizer_from_json(saved) if saved else train_tokenizer(source.texts(), size)
        with self.accelerator.local_main_process_first():  # weights by name are fetched once a machine
            model: Any = build(config, tokenizer, device=self.accelerator.device)
            vectors = regression.text_vectors(config, (source, val_source), self.accelerator.device)
        self.raw_model = model
        identify(self.raw_model)
        if given is not None and options.init_from is not None:
            start_from(Path(options.init_from), given, self.raw_model)
        if options.gradient_checkpointing:
            self.raw_model.checkpoint_activations()
        self.raw_model.train()
        self.teach = training.teaching(self.raw_model, config, vectors)

        resolution = self.raw_model.vision.resolution if "vision" in config.parts else 1  # an ensemble has no pictures
        self.data = training.training_data(config, source, resolution)
        self.val_data = validation.eval_data(config, val_source, resolution)
        place = (self.accelerator.process_index, self.accelerator.num_processes)
        self.sampler = training.data_order(config, source, getattr(self.raw_model, "codec", None), *place)
        if config.data.feature_store is not None:
            use_features(config, self.raw_model, self.data, self.val_data, self.accelerator, self.stop)
        self.total_steps = options.epochs * self.sampler.steps_per_epoch

        self.ledger = training.SampleLedger(config.data.max_bad)
        self.guard = training.StepGuard(options.max_bad_steps)
        self.log = RunLog(self.accelerator, config)
        self.step, self.best, self.scores = 0, float("-inf"), {}
        self.owes = False  # the validation and saves of the last step, which was cut short after its update
        self.epoch, self.epoch_step = 0, 0  # of the next step

        self._reset_window()
        state = None
        if found and latest:
            state = resume.load(found, latest, self.raw_model, exact=options.require_exact, world=world)
        self._prepare()
        if state:
            self._restore(state)
        else:
            self.log.trim(-1)
        if options.compile:
            self.model.compile()
        hidden = not self.accelerator.is_main_process
        if not hidden:
            log.info("%s", training.describe_parts(self.raw_model))
        reset_peak_memory(self.accelerator.device)
        self.bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=hidden, dynamic_ncols=True)

    def _prepare(self) -> None:
        """Hand model and optimiser to the engine; a sharded model's optimiser steps each process's share."""
        options, device = self.config.train, self.accelerator.device
        if options.fsdp:
            engine.shard(self.raw_model, self.config, device, self.accelerator.num_processes)
        self.optimizer: Any = build_optimizer(self.raw_model, options)
        factor = learning_rate_factor(options, self.total_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.trained = [p for p in self.raw_model.parameters() if p.requires_grad]
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.model: Any = self.raw_model if options.fsdp else self.accelerator.prepare(self.raw_model)
        self.scaler = self.accelerator.scaler
        self.gathers = self.accelerator.is_main_process or options.fsdp  # what a save holds: the writer, or all shards

    def steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step that is left, counting what was skipped."""
        settings, rank = self.config.data, self.accelerator.process_index
        batches = train_batches(
            self.data, self.sampler, self.teach, workers=settings.workers, timeout=settings.worker_timeout
        )
        for micro in training.steps_of(batches, self.config.train.accumulation):
            training.seed_step(self.config.train.seed, self.step, rank)
            for batch in micro:
                self.ledger.add(batch)
            yield micro

    def backward(self, micro: list[Batch]) -> float:
        """Add the step's gradients; return its loss: summed over target tokens / their number, over all ranks."""
        device, world = self.accelerator.device, self.accelerator.num_processes
        counts = torch.tensor(float(sum(batch.num_targets for batch in micro)), device=device)
        tokens = self.accelerator.reduce(counts, "sum").clamp(min=1)
        total = torch.zeros((), device=device)
        for number, batch in enumerate(micro):
            last = number == len(micro) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.model(batch.to(device)) * batch.num_targets
                # ranks average their gradients: times world / tokens makes it the mean over all tokens
                self.accelerator.backward(loss * (world / tokens))
                total += loss.detach()
        self.tokens = float(tokens)
        return float(self.accelerator.reduce(total, "sum") / tokens)

    def update(self, loss: float, micro: list[Batch]) -> float:
        """Take the step if loss and gradient are finite on every rank; return the gradient's norm."""
        if self.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = whole(get_total_norm([p.grad for p in self.trained if p.grad is not None]))
        keys = [key for batch in micro for key in batch.keys]
        allowed = self.guard.allows(loss, float(norm), keys, scaled=self.scaler is not None)
        if allowed and self.config.train.clip:
            clip_grads_with_norm_(self.trained, self.config.train.clip, norm)
        if allowed or self.scaler is not None:  # the scaler skips a bad step itself, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        self.epoch, self.epoch_step = training.next_position(self.sampler, self.epoch, self.epoch_step)
        return float(norm)

    def report(self, loss: float, norm: float, micro: list[Batch]) -> None:
        """Advance the progress bar and, every `log_every` steps, the log."""
        self.window_images += sum(len(batch.images) for batch in micro) * self.accelerator.num_processes
        self.window_loss += loss * self.tokens
        self.window_tokens += self.tokens
        self.bar.update()
        if self.step % self.config.train.log_every and self.step != self.total_steps:
            return
        rate = self.window_images / (time.monotonic() - self.window_start)
        mean, lr = self.window_loss / self.window_tokens, max(map(float, self.schedule.get_last_lr()))
        self.log.write(self.step, loss=mean, lr=lr, gradient_norm=norm, images_per_second=rate)
        self.bar.set_postfix_str(f"loss {mean:.3f}, lr {lr:.1e}, {rate:.0f} images/s")
        self._reset_window()

    def validate(self) -> None:
        """Score the validation set on the main process (a sharded model: on all); keep the model that is the best."""
        started, together = time.monotonic(), self.config.train.fsdp
        better = False
        if self.accelerator.is_main_process or together:
            try:
                device, asked = self.accelerator.device, lambda: self.stop.asked and not together
                self.scores = validation.validate(self.raw_model, self.val_data, self.config, self.teach, device, asked)
            except validation.Stopped:
                pass  # stop_if_asked, below, saves that this validation is owed
            else:
                self.log.write(self.step, **self.scores)
                better = validation.overall(self.scores) > self.best
                if self.accelerator.is_main_process:
                    self.bar.write(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in self.scores.items()))
        if engine.from_main(better) if together else better:
            self.best = validation.overall(self.scores)
            self.save(checkpoint.BEST)
        self.stop_if_asked()
        self.window_start += time.monotonic() - started  # validation is no training time

    def stop_if_asked(self) -> None:
        """Save and leave where any rank was asked to stop; all ranks come here at the same step.

        Raises:
            Preempted: everything is saved.
        """
        asked = torch.tensor(float(self.stop.asked), device=self.accelerator.device)
        if float(self.accelerator.reduce(asked, "sum")):
            self.owes = True
            self.save_latest()
            if self.accelerator.is_main_process:
                note_stop(self.step)
            why = self.stop.why or "another process"
            raise Preempted(f"stopped by {why} and saved at step {self.step} of {self.total_steps}; start it again")

    def save(self, name: str) -> None:
        """Write one model file, on the main process."""
        tensors = held_tensors(self.raw_model) if self.gathers else {}
        if self.accelerator.is_main_process:
            where = {"step": self.step, "epoch": self.epoch, "world": self.accelerator.num_processes}
            told = {"metrics": self.scores, "tensors": tensors}
            checkpoint.save_checkpoint(self.folder / name, self.raw_model, self.config, **where, **told)

    def save_latest(self) -> None:
        """Write a save, model_latest.pt with it, on the main process."""
        from accelerate.utils import gather_object

        samples = training.merge_ledgers(gather_object([self.ledger.state()]))
        tensors = held_tensors(self.raw_model) if self.gathers else {}
        optimizer = engine.optimizer_state(self.optimizer) if self.gathers else {}
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "epoch": self.epoch,
                "epoch_step": self.epoch_step,
                "owes": self.owes,
                "best": self.best,
                "metrics": self.scores,
                "guard": [self.guard.skipped, self.guard.in_a_row, self.guard.overflows],
                "window": [self.window_loss, self.window_tokens],
                "records": len(self.data),
                "ledger": samples,
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            }
            world = self.accelerator.num_processes
            resume.save(self.saves, self.raw_model, self.config, state, self.scores, world, tensors)
        self.accelerator.wait_for_everyone()

    def finish(self) -> dict[str, float]:
        """Write the report and the loss curve, leave the process group; return the last scores."""
        self.log.finish(self.ledger.state(), self.guard.skipped)
        return self.scores

    def _newest_save(self) -> Path | None:
        """Return what to go on from: the main process looks, so that all agree."""
        found: tuple[Path | None, UserError | None] = (None, None)
        if self.accelerator.is_main_process:
            try:
                found = (resume.newest(self.saves), None)
            except UserError as error:
                found = (None, error)
        save, error = engine.from_main(found)
        if error is not None:
            raise error
        return save

    def _restore(self, state: dict[str, Any]) -> None:
        engine.load_optimizer_state(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] and self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        if state["records"] != len(self.data):
            raise UserError(
                f"the run in {self.folder} reads {state['records']} records, the data now holds {len(self.data)}; "
                "--resume no starts anew"
            )
        if self.accelerator.is_main_process:  # the saved counts are those of all ranks
            self.ledger.restore(state["ledger"])
        self.guard.skipped, self.guard.in_a_row, self.guard.overflows = state["guard"]
        self.window_loss, self.window_tokens = state["window"]
        self.step, self.best, self.scores = state["step"], state["best"], state["metrics"]
        self.epoch, self.epoch_step, self.owes = state["epoch"], state["epoch_step"], state["owes"]
        self.sampler.start = (self.epoch, self.epoch_step)
        self.log.trim(self.step)
        if self.step >= self.total_steps and not self.owes:
            log.info("finished already, at step %d; more --epochs go on from there", self.step)
        else:
            log.info("resuming at step %d of %d", self.step, self.total_steps)

    def _reset_window(self) -> None:
        self.window_start = time.monotonic()
        self.window_images, self.window_loss, self.window_tokens, self.tokens = 0, 0.0, 0.0, 0.0

"""Train a captioner: flags or a recipe -> config -> model, data, optimiser -> the loop."""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from git_model.cluster import StopRequest, adopt_slurm, rank_and_world
from git_model.config import Config
from git_model.errors import EXIT_OK, UserError, explain
from git_model.flags import read_command
from git_model.lock import folder_lock

if TYPE_CHECKING:
    from git_model.run import Run


def train(config: Config) -> dict[str, float]:
    """Run the loop and return the last validation's scores.

    Raises:
        UserError: bad input, too many unusable samples, repeated non-finite steps, or asked to stop (all is saved).
    """
    check_paths(config)
    from git_model.datasets.loader import naming_failures
    from git_model.run import Run  # torch comes only now that the recipe is known to be right

    options, stop = config.train, StopRequest(config.train.stop_before_end)
    adopt_slurm()
    with sole_writer(Path(options.output_dir)), stop.listening():
        run = Run(config, stop)
        with naming_failures(run.data), run.bar:
            if run.owes:
                round_off(run)
            for micro in run.steps():
                # one optimiser step: some micro-batches, each rank its own, one gradient
                loss = run.backward(micro)
                norm = run.update(loss, micro)  # skipped and counted when anything is not finite
                run.report(loss, norm, micro)
                run.stop_if_asked()
                round_off(run)
        return run.finish()


def check_paths(config: Config) -> None:
    """Look at the recipe's data and folder: most mistakes are there, and it needs no torch."""
    from git_model.datasets.sources import build_source, checked_entry

    for entry in (*config.data.train, *config.data.val):
        checked_entry(entry)
    for entries in (config.data.train, config.data.val):
        build_source(entries, config.data.dir)
    if Path(config.train.output_dir).is_file():
        raise UserError(f"--output_dir {config.train.output_dir} is a file; give a folder")


def show_plan(config: Config) -> None:
    """Print what `train` would take, once for all processes."""
    check_paths(config)
    if rank_and_world()[0] == 0:
        from git_model.planning import plan

        print(plan(config))


def round_off(run: Run) -> None:
    """Do what is due after a step; positions have moved already: these speak of the step just taken."""
    options, run.owes = run.config.train, False
    epoch_done, last = run.epoch_step == 0, run.step == run.total_steps
    if last or (run.step % options.validate_every == 0 if options.validate_every else epoch_done):
        run.validate()
    if epoch_done:
        run.save(f"model-{run.epoch - 1:03d}.pt")
    if last or (run.step % options.save_every == 0 if options.save_every else epoch_done):
        run.save_latest()


def sole_writer(folder: Path) -> AbstractContextManager[None]:
    """Return the lock on a run's folder, for the first process of all."""
    return folder_lock(folder, "run") if rank_and_world()[0] == 0 else nullcontext()


def main(argv: list[str] | None = None) -> int:
    """Read the command line, train, and return the exit code (see git_model/errors.py)."""
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        config, debug = read_command(argv)
        if "--plan" in words:
            show_plan(config)
        else:
            train(config)
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error, "interrupted; the same command goes on from the last save, if there is one")
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return code
    else:
        return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())

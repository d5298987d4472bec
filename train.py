"""Train a captioner: flags or a recipe -> config -> model, data, optimiser -> the loop."""

from __future__ import annotations

import logging
import sys
import traceback

from git_model.config import Config
from git_model.errors import EXIT_OK, explain
from git_model.flags import read_command


def train(config: Config) -> dict[str, float]:
    """Run the loop and return the last validation's scores.

    Raises:
        UserError: bad input, too many unusable samples, or repeated non-finite steps.
    """
    from git_model.datasets.sources import checked_entry

    for entry in (*config.data.train, *config.data.val):
        checked_entry(entry)
    from git_model.run import Run  # torch comes only now that the recipe is known to be right

    run, options = Run(config), config.train
    for micro in run.steps():
        # one optimiser step: some micro-batches, each rank its own, one gradient
        loss = run.backward(micro)
        norm = run.update(loss, micro)  # skipped and counted when anything is not finite
        run.report(loss, norm, micro)

        # positions move inside update(): these speak of the step just taken
        epoch_done, last = run.epoch_step == 0, run.step == run.total_steps
        if last or (run.step % options.validate_every == 0 if options.validate_every else epoch_done):
            run.validate()
        if epoch_done:
            run.save(f"model-{run.epoch - 1:03d}.pt")
        if last or (run.step % options.save_every == 0 if options.save_every else epoch_done):
            run.save_latest()
    return run.finish()


def main(argv: list[str] | None = None) -> int:
    """Read the command line, train, and return the exit code (see git_model/errors.py)."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        config, debug = read_command(argv)
        train(config)
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error, "interrupted; start the same command again to go on from the last save")
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return code
    else:
        return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())

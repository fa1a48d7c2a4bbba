"""`efe-train` and `python -m efe_train`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from efe_train.commands import parse
from efe_train.config import UserError
from efe_train.streams import lasting_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0 done, 1 training met NaN or Inf, 2 a mistake of the user, 128 + N signal N."""
    with lasting_streams():
        # Of the processes of a machine the first one speaks: what the user has to mend is the same for all of them.
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        try:
            return dispatch(list(sys.argv[1:] if argv is None else argv))
        except UserError as error:
            problem = str(error)
            speaks = speaks or error.of_one_process
        except ImportError as error:
            if str(error.name).partition(".")[0] in ("efe_kernels", "efe_train"):
                raise
            problem = f'{" ".join(str(error).split())}: pip install "efe-kernels[train]" installs what training needs.'
        except OSError as error:
            if error.strerror is None:
                raise
            problem = f"{error.filename or 'A file'} cannot be used ({error.strerror})."
            speaks = True
        except KeyboardInterrupt:
            if speaks:
                print(
                    "efe-train: Interrupted; a run that has a checkpoint goes on from it with --resume.",
                    file=sys.stderr,
                )
            return 128 + signal.SIGINT
        if speaks:
            print(f"efe-train: {problem}", file=sys.stderr)
        return 2


def dispatch(arguments: list[str]) -> int:
    module, given = parse(arguments)
    if module != "run" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"efe-train {module} runs in one process: start it without torchrun or accelerate launch.")
    # Not at the top of the file: it takes seconds, which `--help` and a mistyped flag need not wait for.
    import torch

    try:
        code: int = import_module(f"efe_train.{module}").main(given)
    except torch.OutOfMemoryError:
        remedy = "try --accumulate or a smaller --batch_size, or in evaluation --tasks_per_batch"
        raise UserError(f"The GPU ran out of memory: {remedy}.", of_one_process=True) from None
    return code


if __name__ == "__main__":
    sys.exit(main())

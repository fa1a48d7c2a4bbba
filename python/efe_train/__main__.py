"""`efe-train` and `python -m efe_train`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import torch

from efe_train.config import UserError
from efe_train.streams import lasting_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0 done, 1 training met NaN or Inf, 2 a mistake of the user, 128 + N signal N."""
    with lasting_streams():
        try:
            return dispatch(list(sys.argv[1:] if argv is None else argv))
        except UserError as error:
            problem = str(error)
        except torch.OutOfMemoryError:
            problem = "The GPU ran out of memory: try a smaller --batch_size, or --tasks_per_batch in evaluation."
        except ImportError as error:
            if str(error.name).partition(".")[0] in ("efe_kernels", "efe_train"):
                raise
            problem = f'{" ".join(str(error).split())}: pip install "efe-kernels[train]" installs what training needs.'
        except KeyboardInterrupt:
            print("efe-train: Interrupted; a run that has a checkpoint goes on from it with --resume.", file=sys.stderr)
            return 128 + signal.SIGINT
        print(f"efe-train: {problem}", file=sys.stderr)
        return 2


def dispatch(arguments: list[str]) -> int:
    # Not at the top of the file: what these import comes with the extra `train`, and may be missing.
    from efe_train import evaluate, report, run, show

    commands = {"evaluate": evaluate.main, "report": report.main, "show": show.main}
    command = commands.get(arguments[0]) if arguments else None
    return command(arguments[1:]) if command else run.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`efe-train` and `python -m efe_train`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import torch

from efe_train import evaluate, train
from efe_train.config import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0 done, 1 training met NaN or Inf, 2 a mistake of the user, 128 + N signal N."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = evaluate.main if arguments[:1] == ["evaluate"] else train.main
    try:
        return command(arguments[1:] if command is evaluate.main else arguments)
    except UserError as error:
        print(f"efe-train: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("efe-train: The GPU ran out of memory: try a smaller --batch_size.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("efe-train: Interrupted; a run that has a checkpoint goes on from it with --resume.", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())

"""The choices that depend on the machine: where to compute, and in which precision."""

from __future__ import annotations

import torch

from efe_train.config import UserError


def choose_device(wish: str) -> torch.device:
    if wish == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda was asked for, but torch {torch.__version__} sees no CUDA device here: "
            "use --device cpu, or install a CUDA build of torch and a driver."
        )
    return torch.device("cuda" if wish == "cuda" or (wish == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(wish: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of autocast, and why."""
    if wish == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: on the CPU use fp32 or bf16.")
    if wish != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[wish], f"--precision {wish}"
    if device.type == "cpu":
        return torch.float32, "the CPU gains nothing from less"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU computes in it, and it needs no loss scaling"
    return torch.float32, "this GPU has no bf16; --precision fp16 is faster and scales the loss"

"""The metrics of a batch: what each is called, where it is shown, and what to check when it is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Row = Mapping[str, float]
"""The metrics of one batch, as they stand in metrics.jsonl."""


@dataclass(frozen=True)
class Metric:
    """A column of metrics.jsonl.

    bar, closing: its label in the progress bar and in the closing table; it is not shown where there is none.
    signed: it may lie on both sides of 0, so that the ratio of two values says nothing. tracked: --log_with logs it.
    check: what may be wrong when it is NaN or Inf, which ends the training.
    """

    name: str
    bar: str | None = None
    closing: str | None = None
    signed: bool = False
    tracked: bool = False
    check: str | None = None


METRICS = (
    Metric("batch"),  # its number, from 1
    Metric("epoch"),  # from 0
    Metric("queries"),  # in this batch
    Metric("refresh"),  # whether Qwen trained on this batch
    Metric(
        "loss",
        bar="loss",
        closing="Loss",
        tracked=True,
        check="the learning rates (lower --agent_lr), or logits that overflow in fp16 (--precision fp32)",
    ),
    Metric("efe", closing="EFE (unweighted)", tracked=True),  # without the weights that the loss puts on it
    Metric("mask_ratio", bar="mask", closing="Mask ratio", tracked=True),  # share of cells that the plan gets wrong
    Metric("reward", bar="reward", closing="Reward", signed=True, tracked=True),
    # Share of cells that the plan gets right, with Qwen's own prompt and with the refined one.
    # acc_copying and acc_look_up are what the scaled input and the look-up by a fixed rule get right of the same cells.
    Metric("acc_before", closing="Accuracy before", tracked=True),
    Metric("acc_after", closing="Accuracy after", tracked=True),
    Metric("acc_copying", closing="Accuracy, copying"),
    Metric("acc_look_up", closing="Accuracy, look-up"),
    Metric("qwen_grad", bar="Qwen_grad", tracked=True),  # L2 norm of Qwen's gradient at the last refresh
    # L2 norm of a query's prompt, the mean over the batch.
    Metric(
        "prompt_norm",
        check="Qwen's weights and learning rate (lower --qwen_lr), or fp16 activations (--precision bf16)",
    ),
    Metric("policy_loss", tracked=True, check="the policy's learning rate (lower --agent_lr)"),
    Metric("policy_grad_norm", check="the policy's learning rate (lower --agent_lr)"),
    # Of all parameters of the main optimizer, before clipping. Behind what explains more when several fail together.
    Metric(
        "grad_norm",
        tracked=True,
        check="the learning rates (lower --agent_lr and --qwen_lr, or --max_grad_norm)",
    ),
    Metric("agent_lr", tracked=True),
    Metric("qwen_lr", tracked=True),
    Metric("queries_per_s", bar="queries/s", tracked=True),
    # After the last batch of an epoch alone: of the tasks that are held out, the first attempt without adaptation.
    Metric("val_pixels", tracked=True),
    Metric("val_changed", tracked=True),
    Metric("val_exact", tracked=True),  # share of the test inputs
)

LOG_LINE = (
    "[Batch {batch:4.0f}] Reward: {reward:7.4f} | Loss: {loss:7.4f} | "
    "Qwen_grad: {qwen_grad:.2e} | Mask_ratio: {mask_ratio:.4f}"
)
"""Has an order of its own, which readers of logs rely on."""

"""The ops of prompt refinement and the autograd Functions over them. Their CPU and CUDA kernels are in csrc/prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efe_kernels.common.autograd import first_order, spread
from efe_kernels.common.library import accumulate_dtype, define_op
from efe_kernels.prompt import reference


def pool_forward_reference(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return reference.masked_mean_pool(hidden, mask), reference.reciprocal_count(mask, accumulate_dtype(hidden))


def pool_forward_fake(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, width = hidden.shape
    return hidden.new_empty(rows, width), hidden.new_empty(rows, dtype=accumulate_dtype(hidden))


def pool_backward_fake(grad: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(*mask.shape, grad.shape[1])


def noise_of(noise: Tensor | None, seed: Tensor | None, like: Tensor) -> Tensor:
    """The given noise, or that of the seed. like [B, D+1]."""
    if noise is not None:
        return noise
    assert seed is not None
    return reference.philox_normal(seed, like.shape[0], like.shape[1], dtype=like.dtype, device=like.device)


def refine_forward_reference(
    prompt: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor | None, seed: Tensor | None, delta_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.refine_prompt(prompt, mean, log_std, noise_of(noise, seed, mean), delta_scale)


def refine_forward_fake(
    prompt: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor | None, seed: Tensor | None, delta_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, width = mean.shape
    return prompt.new_empty(prompt.shape), mean.new_empty(batch, width), mean.new_empty(batch), mean.new_empty(batch)


def refine_backward_reference(
    grad_refined: Tensor | None,
    grad_action: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    action: Tensor,
    log_std: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    delta_scale: float,
    needs: list[bool],
) -> list[Tensor]:
    gradients = reference.refine_prompt_backward(
        torch.zeros_like(action[:, :-1]) if grad_refined is None else grad_refined,
        torch.zeros_like(action) if grad_action is None else grad_action,
        torch.zeros_like(action[:, 0]) if grad_log_prob is None else grad_log_prob,
        torch.zeros_like(action[:, 0]) if grad_entropy is None else grad_entropy,
        action, log_std, noise_of(noise, seed, action), delta_scale,
    )  # fmt: skip
    return wanted(gradients, needs)


def refine_backward_fake(
    grad_refined: Tensor | None,
    grad_action: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    action: Tensor,
    log_std: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    delta_scale: float,
    needs: list[bool],
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in wanted((action, log_std), needs)]


def log_prob_backward_reference(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    action: Tensor,
    mean: Tensor,
    log_std: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    gradients = reference.squashed_log_prob_backward(
        torch.zeros_like(action[:, 0]) if grad_log_prob is None else grad_log_prob,
        torch.zeros_like(action[:, 0]) if grad_entropy is None else grad_entropy,
        action, mean, log_std,
    )  # fmt: skip
    return wanted(gradients, needs)


def log_prob_forward_fake(action: Tensor, mean: Tensor, log_std: Tensor, delta_scale: float) -> tuple[Tensor, Tensor]:
    batch = action.shape[0]
    return action.new_empty(batch), action.new_empty(batch)


def log_prob_backward_fake(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    action: Tensor,
    mean: Tensor,
    log_std: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in wanted((action, mean, log_std), needs)]


def wanted(tensors: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor]:
    return [tensor for tensor, need in zip(tensors, needs, strict=True) if need]


masked_mean_pool_forward = define_op(
    "masked_mean_pool_forward(Tensor hidden, Tensor mask) -> (Tensor pooled, Tensor scale)",
    reference=pool_forward_reference,
    fake=pool_forward_fake,
)
masked_mean_pool_backward = define_op(
    "masked_mean_pool_backward(Tensor grad, Tensor mask, Tensor scale) -> Tensor",
    reference=reference.masked_mean_pool_backward,
    fake=pool_backward_fake,
)
refine_prompt_forward = define_op(
    "refine_prompt_forward(Tensor prompt, Tensor mean, Tensor log_std, Tensor? noise, Tensor? seed, float delta_scale) "
    "-> (Tensor refined, Tensor action, Tensor log_prob, Tensor entropy)",
    reference=refine_forward_reference,
    fake=refine_forward_fake,
)
refine_prompt_backward = define_op(
    "refine_prompt_backward(Tensor? grad_refined, Tensor? grad_action, Tensor? grad_log_prob, Tensor? grad_entropy, "
    "Tensor action, Tensor log_std, Tensor? noise, Tensor? seed, float delta_scale, bool[] needs) -> Tensor[]",
    reference=refine_backward_reference,
    fake=refine_backward_fake,
)
squashed_log_prob_forward = define_op(
    "squashed_log_prob_forward(Tensor action, Tensor mean, Tensor log_std, float delta_scale) "
    "-> (Tensor log_prob, Tensor entropy)",
    reference=reference.squashed_log_prob,
    fake=log_prob_forward_fake,
)
squashed_log_prob_backward = define_op(
    "squashed_log_prob_backward(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor action, Tensor mean, "
    "Tensor log_std, bool[] needs) -> Tensor[]",
    reference=log_prob_backward_reference,
    fake=log_prob_backward_fake,
)


# The Functions take ctx in forward: with a separate setup_context, torch binds the arguments by their names on every
# call, which takes longer than a small op.
class MaskedMeanPoolFunction(torch.autograd.Function):
    """Pooled [N, E]; differentiable by hidden."""

    plain = staticmethod(reference.masked_mean_pool)

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mask: Tensor) -> Tensor:
        pooled, scale = masked_mean_pool_forward(hidden, mask)
        ctx.save_for_backward(mask, scale)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *first_order("masked_mean_pool", pool_gradients, grad, *ctx.saved_tensors), None


def pool_gradients(grad: Tensor, mask: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (masked_mean_pool_backward(grad, mask, scale),)


class RefinePromptFunction(torch.autograd.Function):
    """Refined prompt, action, log_prob, entropy; all differentiable by prompt, mean and log_std."""

    plain = staticmethod(refine_forward_reference)

    @staticmethod
    def forward(
        ctx: Any, prompt: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor | None, seed: Tensor | None,
        delta_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        refined, action, log_prob, entropy = refine_prompt_forward(prompt, mean, log_std, noise, seed, delta_scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(action, log_std, noise, seed)
        ctx.delta_scale = delta_scale
        return refined, action, log_prob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need_prompt, *needs = ctx.needs_input_grad[:3]
        if all(grad is None for grad in grads):
            needs = [False, False]
        gradients: tuple[Tensor, ...] = ()
        if any(needs):
            gradients = first_order(
                "refine_prompt", refine_prompt_backward, *grads, *ctx.saved_tensors, ctx.delta_scale, needs
            )
        # refined = prompt + α·Δ: the prompt's gradient is that of refined.
        return grads[0] if need_prompt else None, *spread(gradients, needs, 5)


class SquashedLogProbFunction(torch.autograd.Function):
    """log_prob and entropy; differentiable by action, mean and log_std."""

    plain = staticmethod(reference.squashed_log_prob)

    @staticmethod
    def forward(ctx: Any, action: Tensor, mean: Tensor, log_std: Tensor, delta_scale: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(action, mean, log_std)
        return squashed_log_prob_forward(action, mean, log_std, delta_scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        if all(grad is None for grad in grads):
            needs = []
        gradients: tuple[Tensor, ...] = ()
        if any(needs):
            gradients = first_order("squashed_log_prob", squashed_log_prob_backward, *grads, *ctx.saved_tensors, needs)
        return spread(gradients, needs, 4)

"""gae and vtrace as loops over time in plain PyTorch: the definition, and what serves where no kernel exists.

All tensors are [N, T] of one floating dtype, and bool for terminated and truncated. Results have the memory layout that
torch.empty_like gives to reward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efe_kernels.common.library import accumulate_dtype


def laid_out(result: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """result in the given dtype and with the memory layout of torch.empty_like(like)."""
    return torch.empty_like(like, dtype=dtype).copy_(result)


def boundaries(terminated: Tensor, truncated: Tensor | None) -> Tensor:
    """Where the trace stops."""
    return terminated if truncated is None else terminated | truncated


def td_error(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, gamma: float, reward_scale: float
) -> Tensor:
    """reward + gamma · next_value · (1 - terminated) - value in the dtype of the arithmetic."""
    dtype = accumulate_dtype(reward)
    bootstrap = torch.where(terminated, 0, next_value.to(dtype))
    return reward.to(dtype) * reward_scale + gamma * bootstrap - value.to(dtype)


def gae_forward(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    gamma: float,
    lam: float,
    reward_scale: float,
) -> tuple[Tensor, Tensor]:
    """advantage_t = delta_t + gamma · lam · advantage_{t+1} within an episode; value_target = advantage + value."""
    delta = td_error(reward, value, next_value, terminated, gamma, reward_scale)
    stop = boundaries(terminated, truncated)
    advantage = torch.empty_like(delta)
    following = delta.new_zeros(delta.shape[0])
    for t in reversed(range(delta.shape[1])):
        following = delta[:, t] + gamma * lam * torch.where(stop[:, t], 0, following)
        advantage[:, t] = following
    return laid_out(advantage, reward, reward.dtype), laid_out(advantage + value, reward, reward.dtype)


def gae_backward(
    grad_advantage: Tensor | None,
    grad_target: Tensor | None,
    terminated: Tensor,
    truncated: Tensor | None,
    gamma: float,
    lam: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of value and next_value, those of them that are needed; the derivation stands beside the kernel."""
    upstream, to_target, dtype = upstream_gradients(grad_advantage, grad_target)
    stop = boundaries(terminated, truncated)
    grad_delta = torch.empty_like(upstream)
    carried = upstream.new_zeros(upstream.shape[0])
    for t in range(upstream.shape[1]):
        carried = upstream[:, t] + to_target[:, t] + carried
        grad_delta[:, t] = carried
        carried = gamma * lam * torch.where(stop[:, t], 0, carried)
    return value_gradients(grad_delta, to_target, terminated, gamma, dtype, needs)


def upstream_gradients(grad_advantage: Tensor | None, grad_target: Tensor | None) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in the dtype of the arithmetic, 0 where there is none, and the dtype they came in."""
    given = grad_advantage if grad_advantage is not None else grad_target
    assert given is not None, "an op's backward is called with at least one gradient"
    zero = torch.zeros_like(given, dtype=accumulate_dtype(given))
    advantage, target = (zero if grad is None else grad.to(zero.dtype) for grad in (grad_advantage, grad_target))
    return advantage, target, given.dtype


def value_gradients(
    grad_delta: Tensor, grad_target: Tensor, terminated: Tensor, gamma: float, dtype: torch.dtype, needs: list[bool]
) -> list[Tensor]:
    """From the gradient of reward + gamma · next_value - value to those of value and next_value."""
    found = []
    if needs[0]:
        found.append(laid_out(grad_target - grad_delta, terminated, dtype))
    if needs[1]:
        found.append(laid_out(torch.where(terminated, 0, gamma * grad_delta), terminated, dtype))
    return found


def vtrace_forward(
    log_ratio: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    gamma: float,
    rho_clip: float,
    c_clip: float,
    reward_scale: float,
) -> tuple[Tensor, Tensor]:
    """With x_t = v_target_t - value_t: x_t = rho_t delta_t + gamma c_t x_{t+1} within an episode.

    advantage_t = rho_t (reward_t + gamma · v_target_{t+1} - value_t), where v_target_{t+1} is next_value_t + x_{t+1}.
    """
    ratio = log_ratio.to(accumulate_dtype(reward)).exp()
    rho, c = ratio.clamp(max=rho_clip), ratio.clamp(max=c_clip)
    delta = rho * td_error(reward, value, next_value, terminated, gamma, reward_scale)
    stop = boundaries(terminated, truncated)
    advantage, excess = torch.empty_like(delta), torch.empty_like(delta)
    following = delta.new_zeros(delta.shape[0])
    for t in reversed(range(delta.shape[1])):
        following = gamma * torch.where(stop[:, t], 0, following)
        advantage[:, t] = delta[:, t] + rho[:, t] * following
        following = delta[:, t] + c[:, t] * following
        excess[:, t] = following
    return laid_out(advantage, reward, reward.dtype), laid_out(excess + value, reward, reward.dtype)


def vtrace_backward(
    grad_advantage: Tensor | None,
    grad_target: Tensor | None,
    log_ratio: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    gamma: float,
    rho_clip: float,
    c_clip: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of value and next_value, those of them that are needed; the derivation stands beside the kernel."""
    upstream, to_target, dtype = upstream_gradients(grad_advantage, grad_target)
    ratio = log_ratio.to(upstream.dtype).exp()
    rho, c = ratio.clamp(max=rho_clip), ratio.clamp(max=c_clip)
    stop = boundaries(terminated, truncated)
    grad_delta = torch.empty_like(upstream)
    carried = upstream.new_zeros(upstream.shape[0])
    for t in range(upstream.shape[1]):
        carried = to_target[:, t] + carried
        grad_delta[:, t] = rho[:, t] * (carried + upstream[:, t])
        carried = gamma * torch.where(stop[:, t], 0, c[:, t] * carried + rho[:, t] * upstream[:, t])
    return value_gradients(grad_delta, to_target, terminated, gamma, dtype, needs)

"""torch.compile(fullgraph=True) traces through the three functions, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from efe_kernels import masked_mean_pool, refine_prompt, squashed_log_prob
from tests.prompt.close import assert_close


def leaves(*shapes: tuple[int, ...], device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def pooled_policy(hidden: Tensor, mask: Tensor, mean: Tensor, log_std: Tensor, action: Tensor, seed: int) -> Tensor:
    prompt = masked_mean_pool(hidden, mask)
    refined = refine_prompt(prompt, mean, log_std, seed=seed)
    log_prob, entropy = squashed_log_prob(action, mean, log_std)
    return refined.prompt.square().sum() + refined.log_prob.sum() + (log_prob - entropy).sum()


def test_all_three_in_one_graph(device: str) -> None:
    hidden, mean, log_std = leaves((3, 5, 8), (3, 9), (9,), device=device)
    mask, action = torch.rand(3, 5, device=device) < 0.5, torch.randn(3, 9, device=device)
    compiled = torch.compile(pooled_policy, fullgraph=True, backend="aot_eager")
    for seed in (3, 4):
        total, expected = (f(hidden, mask, mean, log_std, action, seed) for f in (compiled, pooled_policy))
        assert_close("total", total.detach(), expected.detach(), 1e-6)
        found, wanted = (torch.autograd.grad(value, [hidden, mean, log_std]) for value in (total, expected))
        for name, grad, want in zip(("hidden", "mean", "log_std"), found, wanted, strict=True):
            assert_close(f"gradient of {name}", grad, want, 1e-6)


def test_a_seed_drawn_inside_the_graph_is_new_on_every_call(device: str) -> None:
    prompt, mean, log_std = leaves((3, 8), (3, 9), (9,), device=device)
    compiled = torch.compile(lambda: refine_prompt(prompt, mean, log_std).action, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(), compiled())

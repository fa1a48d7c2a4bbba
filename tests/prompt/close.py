from __future__ import annotations

import torch


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float, scale: float = 0.0) -> None:
    """The largest error, at most `tolerance` times the largest expected value (or `scale`, where that is larger)."""
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if actual.numel() == 0:
        return
    error = (actual.cpu().double() - expected.cpu().double()).abs().max().item()
    largest = max(expected.abs().max().item(), scale)
    assert error <= tolerance * largest, f"{name}: error {error:.2e}, largest value {largest:.2e}"

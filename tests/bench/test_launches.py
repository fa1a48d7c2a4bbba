"""What a recorded launch moves at least."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.launches import Launch, least_bytes


def launch(*tensors: Tensor) -> Launch:
    arguments = {f"argument{index}": tensor for index, tensor in enumerate(tensors)}
    return Launch(None, (1,), {**arguments, "numel": 7}, {}, "forward", (7,))


def test_a_tensor_that_stands_in_for_an_absent_one_is_counted_once() -> None:
    logits = torch.empty(4, 10)
    assert least_bytes(launch(logits, logits)) == 160


def test_a_view_counts_for_its_own_elements() -> None:
    plan = torch.empty(5, 10)
    assert least_bytes(launch(plan[-1])) == 40
    assert least_bytes(launch(torch.empty(3).expand(100, 3))) == 12


def test_a_tensor_and_a_view_of_it_count_for_the_tensor() -> None:
    plan = torch.empty(5, 10)
    assert least_bytes(launch(plan, plan[-1])) == 200


def test_tensors_of_their_own_memory_are_added_up() -> None:
    assert least_bytes(launch(torch.empty(8), torch.empty(8, dtype=torch.bfloat16), torch.empty(0))) == 48

"""grid_reward: the values of the system it replaces, resizing, ragged batches, NaN, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efe_kernels import RewardOutput, RewardWeights, grid_reward
from efe_kernels.common.library import INTERPRET
from efe_kernels.reward import reference

CASES = sorted((Path(__file__).parent.parent / "data" / "reward").glob("*.npz"))
INVERSES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "identity": lambda grid: grid,
    "transpose": lambda grid: grid.T,
    "flip_lr": lambda grid: grid.flip(-1),
    "crop_top_left_half": lambda grid: grid[: max(1, grid.shape[0] // 2), : max(1, grid.shape[1] // 2)],
}
STORED = {"accuracy": "acc", "size": "size", "colour": "color", "reversibility": "rev"}
STORED_DELTA = {"accuracy": "d_acc", "size": "d_size", "colour": "d_col", "reversibility": "d_rev"}

# Every entry is a few float32 operations on exact integers, of magnitude at most about 5.
FEW_ROUNDINGS = 1e-6


def random_grid(*shape: int, device: str, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(10, shape, device=device).to(dtype)


def entries(output: RewardOutput) -> dict[str, Tensor]:
    parts = {"terms": output.terms, "before": output.before, "after": output.after}
    named = {f"{part}.{name}": value for part, scores in parts.items() for name, value in scores.items()}
    return {"reward": output.reward, "mask_ratio": output.mask_ratio, **named}


def assert_same(output: RewardOutput, expected: RewardOutput, atol: float = 0.0) -> None:
    for name, value in entries(output).items():
        torch.testing.assert_close(
            value, entries(expected)[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path: Path, device: str) -> None:
    case = np.load(path)
    grids = {name: torch.from_numpy(case[name]).to(device) for name in ("before", "after", "target", "input")}
    output = grid_reward(
        grids["before"], grids["after"], grids["target"], source=grids["input"],
        inverse=INVERSES[str(case["solver_back"])], num_colors=int(case["num_colors"]),
    )  # fmt: skip
    assert output.reward.shape == ()
    assert output.reward.item() == pytest.approx(float(case["ref64_reward"]), abs=1e-6)
    for name, stored in STORED.items():
        assert output.before[name].item() == pytest.approx(float(case[f"ref64_{stored}_before"]), abs=1e-6)
        assert output.after[name].item() == pytest.approx(float(case[f"ref64_{stored}_after"]), abs=1e-6)
        assert output.terms[name].item() == pytest.approx(float(case[f"ref64_{STORED_DELTA[name]}"]), abs=1e-6)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (33, ((1, 1), (1, 1), (1, 1))),
        (5, ((7, 13), (7, 13), (7, 13))),
        (2, ((3, 5), (30, 30), (20, 11))),
        (2, ((30, 30), (26, 9), (22, 30))),
    ],
)
def test_logits_and_grids_agree_with_the_definition(dtype: torch.dtype, batch: int, sizes: Any, device: str) -> None:
    batch = min(batch, 3) if INTERPRET else batch
    size_before, size_after, size = sizes
    before = torch.randn(batch, *size_before, 10, device=device).to(dtype)
    after = random_grid(batch, *size_after, device=device, dtype=torch.uint8)
    target, valid = random_grid(batch, *size, device=device), torch.rand(batch, *size, device=device) > 0.2
    output = grid_reward(before, after, target, valid=valid)
    for b in (0, batch // 2, batch - 1):
        expected = scores(before[b].double().argmax(-1), target[b], valid[b]), scores(after[b], target[b], valid[b])
        for name in ("accuracy", "colour"):
            assert output.before[name][b].item() == pytest.approx(expected[0][name], abs=FEW_ROUNDINGS)
            assert output.after[name][b].item() == pytest.approx(expected[1][name], abs=FEW_ROUNDINGS)
        wanted = sum(
            weight * min(1.0, max(-1.0, expected[1][name] - expected[0][name]))
            for name, weight in (("accuracy", 1.0), ("size", 0.5), ("colour", 0.5))
        )
        assert output.reward[b].item() == pytest.approx(wanted, abs=3 * FEW_ROUNDINGS)
        assert output.mask_ratio[b].item() == pytest.approx(
            1 - expected[1]["accuracy"] if valid[b].any() else 0.0, abs=FEW_ROUNDINGS
        )


def scores(grid: Tensor, target: Tensor, valid: Tensor) -> dict[str, float]:
    """One prediction against one target, in float64 by loops of its own over the cells."""
    (height, width), (target_height, target_width) = grid.shape, target.shape
    size = 1 - (abs(height - target_height) / target_height + abs(width - target_width) / target_width) / 2
    hits = count = 0
    histograms = np.zeros((2, 10))
    for i in range(target_height):
        for j in range(target_width):
            if valid[i, j]:
                row = min(int(np.floor(np.float32(i) * np.float32(height / target_height))), height - 1)
                column = min(int(np.floor(np.float32(j) * np.float32(width / target_width))), width - 1)
                colour, wanted = int(grid[row, column]), int(target[i, j])
                hits, count = hits + (colour == wanted), count + 1
                histograms[0, colour] += 1
                histograms[1, wanted] += 1
    count = max(count, 1)
    difference = np.abs(histograms[0] - histograms[1]) / count
    return {"accuracy": hits / count, "size": size, "colour": 1 - difference.mean()}


def test_resize_index_is_that_of_interpolate_for_every_pair() -> None:
    for size in range(1, 31):
        ramp = torch.arange(size, dtype=torch.float32)[None, None]
        for new_size in range(1, 31):
            index = reference.resize_index(size, new_size, torch.device("cpu"))
            assert torch.equal(index, F.interpolate(ramp, new_size, mode="nearest")[0, 0].long()), (size, new_size)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("size", range(1, 31, 1 if not INTERPRET else 4))
def test_resize_of_the_op_for_every_pair(size: int, device: str) -> None:
    """The prediction numbers its rows; a target that says the same number everywhere counts how often each is read."""
    rows = torch.arange(size, device=device)[None, :, None]
    for new_size in range(1, 31) if not INTERPRET else (1, 7, 22, 30):
        index = reference.resize_index(size, new_size, torch.device("cpu"))
        target = index[None, :, None].to(device)
        output = grid_reward(rows, rows.transpose(1, 2), target, num_colors=30)
        assert output.before["accuracy"].item() == 1.0, new_size
        output = grid_reward(rows, rows.transpose(1, 2), target.transpose(1, 2), num_colors=30)
        assert output.after["accuracy"].item() == 1.0, new_size


def test_26_to_22_follows_float32() -> None:
    """float32(11) * float32(26 / 22) is just under 13, which exact arithmetic gives."""
    assert reference.resize_index(26, 22, torch.device("cpu"))[11].item() == 12


@pytest.mark.usefixtures("served_by")
def test_memory_order_does_not_matter(device: str) -> None:
    before, after = torch.randn(2, 5, 6, 7, 10, device=device)
    target = random_grid(5, 6, 7, device=device)
    expected = grid_reward(before, after, target)
    channel_first = before.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    odd = torch.randn(5, 9, 21, 30, device=device)[:, 1:7, ::3, 5:25:2]
    odd.copy_(after)
    odd_target = torch.zeros(6, 14, 5, dtype=torch.int64, device=device)[:, ::2].permute(2, 0, 1)
    odd_target.copy_(target)
    assert_same(grid_reward(channel_first, odd, odd_target), expected)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype: torch.dtype, device: str) -> None:
    before, after, target = random_grid(3, 4, 6, 5, device=device).unbind(0)
    expected = grid_reward(before, after, target)
    assert_same(grid_reward(before.to(dtype), after.to(dtype), target.to(dtype)), expected)


@pytest.mark.usefixtures("served_by")
def test_ragged_batch_is_each_grid_alone(device: str) -> None:
    """Grids of different sizes, padded alike and marked valid, score as each does alone, padding whatever it holds."""
    sizes = [(3, 3), (7, 2), (10, 10)]
    before = torch.full((3, 10, 10, 10), torch.nan, device=device)
    after = torch.full((3, 10, 10), 9, device=device)
    target = torch.full((3, 10, 10), -100, device=device)
    valid = torch.zeros(3, 10, 10, dtype=torch.bool, device=device)
    for b, (height, width) in enumerate(sizes):
        before[b, :height, :width] = torch.randn(height, width, 10, device=device)
        after[b, :height, :width] = random_grid(height, width, device=device)
        target[b, :height, :width] = random_grid(height, width, device=device)
        valid[b, :height, :width] = True
    masked, ignored = grid_reward(before, after, target.clamp(min=0), valid=valid), grid_reward(before, after, target)
    assert_same(masked, ignored)
    for b, (height, width) in enumerate(sizes):
        alone = grid_reward(before[b, :height, :width], after[b, :height, :width], target[b, :height, :width])
        assert alone.reward.shape == ()
        for name, value in entries(alone).items():
            assert entries(masked)[name][b] == value, name


@pytest.mark.usefixtures("served_by")
def test_episode_without_a_valid_cell(device: str) -> None:
    before, after, target = random_grid(3, 2, 4, 4, device=device).unbind(0)
    output = grid_reward(before, after, target, valid=torch.zeros(2, 4, 4, dtype=torch.bool, device=device))
    for scores_ in (output.before, output.after):
        assert scores_["accuracy"].tolist() == [0.0, 0.0]
        assert scores_["colour"].tolist() == [1.0, 1.0]
    assert output.reward.tolist() == [0.0, 0.0]
    assert output.mask_ratio.tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("served_by")
def test_nan_never_wins_and_ties_go_to_the_first(device: str) -> None:
    nan, inf = float("nan"), float("inf")
    cells = [[nan, 1.0, 0.0], [nan, nan, nan], [2.0, 2.0, nan], [-inf, -inf, -inf], [-inf, nan, 1.0], [inf, 3.0, inf]]
    logits = torch.tensor(cells, device=device)[None, None]
    target = torch.tensor([[[1, 0, 0, 0, 2, 0]]], device=device)
    output = grid_reward(logits, logits.half(), target, num_colors=3)
    assert output.before["accuracy"].item() == 1.0
    assert output.after["accuracy"].item() == 1.0
    assert output.reward.item() == 0.0


def test_inverse_is_asked_for_each_prediction(device: str) -> None:
    before, after = torch.randn(2, 3, 4, 6, 10, device=device)
    target, source = random_grid(3, 4, 6, device=device), random_grid(3, 6, 4, device=device)
    output = grid_reward(before, after, target, source=source, inverse=lambda grid: grid.T)
    for prediction, found in ((before, output.before), (after, output.after)):
        expected = (prediction.argmax(-1).transpose(1, 2) == source).float().mean((1, 2))
        torch.testing.assert_close(found["reversibility"], expected, rtol=0, atol=FEW_ROUNDINGS)
    without = grid_reward(before, after, target, source=source)
    assert without.before["reversibility"].tolist() == [0.5] * 3


@pytest.mark.usefixtures("served_by")
def test_weights(device: str) -> None:
    before, after = random_grid(2, 4, 6, 5, device=device).unbind(0)
    target, source = random_grid(4, 5, 5, device=device), random_grid(4, 5, 6, device=device)
    weights = RewardWeights(accuracy=0.25, size=3.0, colour=0.0, reversibility=-2.0)
    output = grid_reward(before, after[:, :3], target, source=source, inverse=lambda grid: grid.T, weights=weights)
    terms = output.terms
    assert terms["size"].abs().min() > 0
    expected = 0.25 * terms["accuracy"] + 3.0 * terms["size"] - 2.0 * terms["reversibility"]
    torch.testing.assert_close(output.reward, expected, rtol=0, atol=3 * FEW_ROUNDINGS)


def test_reward_is_constant_for_autograd_and_leaves_its_arguments_alone(device: str) -> None:
    before = torch.randn(2, 3, 3, 10, device=device, requires_grad=True)
    after, target = torch.randn(2, 3, 3, 10, device=device), random_grid(2, 3, 3, device=device)
    copies = before.detach().clone(), after.clone(), target.clone()
    output = grid_reward(before, after, target)
    assert not output.reward.requires_grad
    for tensor, copy in zip((before, after, target), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_two_runs_give_the_same_bits(device: str) -> None:
    before, after = torch.randn(2, 3, 30, 30, 10, device=device)
    target = random_grid(3, 30, 30, device=device)
    assert_same(grid_reward(before, after, target), grid_reward(before, after, target))


@pytest.mark.usefixtures("served_by")
def test_empty_batch(device: str) -> None:
    grids = torch.zeros(0, 3, 3, dtype=torch.int64, device=device)
    output = grid_reward(grids, grids, grids, source=grids, inverse=lambda grid: grid)
    assert output.reward.shape == output.after["colour"].shape == (0,)


def test_opcheck(device: str) -> None:
    before, after = torch.randn(2, 3, 4, 4, 10, device=device)
    target, valid = random_grid(3, 4, 4, device=device), torch.rand(3, 4, 4, device=device) > 0.5
    op = torch.ops.efe.grid_reward.default
    torch.library.opcheck(op, (before, after, target, None, None, [1.0, 0.5, 0.5, 0.5], 10))
    torch.library.opcheck(
        op, (before, target, target, valid, torch.rand(2, 3, device=device), [1.0, 0.5, 0.5, 0.5], 10)
    )


def test_compiles_as_one_graph(device: str) -> None:
    before, after = torch.randn(2, 3, 4, 4, 10, device=device)
    target = random_grid(3, 4, 4, device=device)
    compiled = torch.compile(grid_reward, fullgraph=True)
    assert_same(compiled(before, after, target), grid_reward(before, after, target))


def test_clear_errors(device: str) -> None:
    logits, target = torch.zeros(2, 3, 3, 10, device=device), torch.zeros(2, 3, 3, dtype=torch.int64, device=device)
    nan_target = torch.full((2, 3, 3), torch.nan, device=device)
    wrong: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "target must have an integer dtype, it was torch.float32", (logits, logits, nan_target), {}),
        (TypeError, "before must be a tensor, it was list", ([[1]], logits, target), {}),
        (TypeError, "before must have an integer dtype, it was torch.bool", (target == 0, logits, target), {}),
        (TypeError, "valid must be a bool tensor", (logits, logits, target), {"valid": target}),
        (ValueError, r"target must have the shape \[B, H, W\] or \[H, W\]", (logits, logits, target[0, 0]), {}),
        (TypeError, r"before must be logits \[B, H, W, C\] or a grid \[B, H, W\] of an integer dtype, it was",
         (target.float(), logits, target), {}),
        (ValueError, r"before must have the shape \[B, H, W, C\]", (logits[None], logits, target), {}),
        (ValueError, r"after must have the shape \[B, H, W\]", (logits, target[0], target), {}),
        (ValueError, "after must have the batch size of target, 2, it had 1", (logits, logits[:1], target), {}),
        (ValueError, "before must have num_colors = 10 logits per cell", (logits[..., :9], logits, target), {}),
        (ValueError, "before must have at least 1 cell", (logits[:, :0], logits, target), {}),
        (ValueError, r"valid must have the shape \[B, H, W\]", (logits, logits, target), {"valid": target[:1] == 0}),
        (ValueError, "source must be given with inverse", (logits, logits, target), {"inverse": lambda grid: grid}),
        (ValueError, r"source must have the shape \[B, H, W\], it was \[3, 3\]", (logits, logits, target),
         {"inverse": lambda grid: grid, "source": target[0]}),
        (ValueError, r"inverse\(grid\) must have the shape \[H, W\], it was \[9\]", (logits, logits, target),
         {"inverse": lambda grid: grid.flatten(), "source": target}),
        (TypeError, r"inverse\(grid\) must be a tensor, it was NoneType", (logits, logits, target),
         {"inverse": lambda grid: None, "source": target}),
        (ValueError, "before must be on the device of target", (logits.to("meta"), logits, target), {}),
    ]  # fmt: skip
    for error, message, arguments, keywords in wrong:
        with pytest.raises(error, match=message):
            grid_reward(*arguments, **keywords)


@pytest.mark.usefixtures("served_by")
def test_colour_out_of_range_is_an_error_on_the_cpu() -> None:
    logits, target = torch.zeros(1, 2, 2, 10), torch.zeros(1, 2, 2, dtype=torch.int64)
    for wrong in (10, -1):
        bad = target.clone()
        bad[0, 1, 1] = wrong
        with pytest.raises(ValueError, match=f"target must hold colours from 0 to 9, it held {wrong}"):
            grid_reward(logits, logits, bad)
        with pytest.raises(ValueError, match=f"after must hold colours from 0 to 9, it held {wrong}"):
            grid_reward(logits, bad, target)
        assert grid_reward(logits, bad, bad, valid=bad == 0).after["accuracy"].item() == 1.0


@pytest.mark.usefixtures("served_by")
def test_more_colours_than_a_narrow_target_can_hold(device: str) -> None:
    target = torch.full((1, 2, 2), 200, dtype=torch.uint8, device=device)
    assert grid_reward(target, target, target, num_colors=300).after["accuracy"] == 1

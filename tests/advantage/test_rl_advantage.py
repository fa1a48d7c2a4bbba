"""rl_advantage: values and gradients against PyTorch's formula in float64, corner cases of whitening, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from efe_kernels import rl_advantage
from efe_kernels.advantage.reference import Inputs, Settings

SETTINGS: list[dict[str, Any]] = [
    {},
    {"normalize": "clamp"},
    {"normalize": None, "reward_scale": 1.0},
    {"whiten": True},
    {"whiten": True, "group_size": 6, "normalize": None},
    {"whiten": True, "group_size": 1},
    {"whiten": "center"},
    {"whiten": "center", "group_size": 6, "normalize": None},
    {"whiten": "center", "group_size": 1},
]
# Results are rounded once to their dtype: one unit in the last place, and for float32 the few roundings of the
# arithmetic itself on values of about 1. Gradients of whitened advantages are sums of a few such terms.
TOLERANCES = [
    (torch.float32, 2e-6, 2e-6),
    (torch.float16, 2**-10, 1e-5),
    (torch.bfloat16, 2**-7, 1e-5),
    (torch.float64, 1e-12, 1e-12),
]


def definition(
    reward: Tensor,
    value: Tensor,
    *,
    reward_scale: float = 5.0,
    normalize: str | None = "tanh",
    whiten: bool | str = False,
    group_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """PyTorch's own operations on each group; autograd differentiates it."""
    scaled = reward * reward_scale
    scaled = {"tanh": scaled.tanh(), "clamp": scaled.clamp(-1, 1), None: scaled}[normalize]
    mask = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask
    advantage = torch.where(mask, scaled - value, 0)
    if whiten:
        groups = []
        for group, members in zip(advantage.flatten().split(group_size or reward.numel()),
                                  mask.flatten().split(group_size or reward.numel()), strict=True):  # fmt: skip
            chosen = group[members]
            out = torch.zeros_like(group)
            if whiten == "center":
                out = out.masked_scatter(members, chosen - chosen.mean())
            elif chosen.numel() > 1 and (chosen != chosen[0]).any():
                out = out.masked_scatter(members, (chosen - chosen.mean()) / (chosen.std() + 1e-4))
            else:
                out = out + 0 * group
            groups.append(out)
        advantage = torch.cat(groups).view_as(reward)
    return advantage


def inputs(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    reward, value = 0.3 * torch.randn(shape, device=device), torch.randn(shape, device=device)
    return reward.to(dtype), value.to(dtype).requires_grad_(), torch.rand(shape, device=device) > 0.3


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient(
    settings: dict[str, Any], dtype: torch.dtype, rtol: float, atol: float, masked: bool, device: str
) -> None:
    reward, value, mask = inputs(7, 6, device=device, dtype=dtype)
    mask = mask if masked else None
    exact_value = value.detach().double().requires_grad_()
    advantage = rl_advantage(reward, value, mask=mask, **settings)
    expected = definition(reward.double(), exact_value, mask=mask, **settings)
    assert advantage.dtype == dtype and advantage.shape == reward.shape
    torch.testing.assert_close(advantage.double(), expected, rtol=rtol, atol=atol)
    upstream = torch.randn(7, 6, device=device).to(dtype)
    (gradient,) = torch.autograd.grad(advantage, value, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, exact_value, upstream.double())
    assert gradient.dtype == dtype
    # The gradient of a whitened group is a difference of terms of the size of the largest of them.
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=atol * max(1.0, scale))


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("whiten", [True, "center"])
@pytest.mark.parametrize(
    ("numel", "group_size"),
    [(1, None), (5000, None), (4097, None), (33, 1), (33, 11), (2 * 4500, 4500), (8192, 4096), (40000, None)],
)
def test_whitening_of_any_group_size(numel: int, group_size: int | None, whiten: Any, device: str) -> None:
    """Groups that share a tile, fill one, need several, and so many that a launch of its own adds them up."""
    reward, value, mask = inputs(numel, device=device)
    advantage = rl_advantage(reward, value, whiten=whiten, group_size=group_size, mask=mask)
    exact_value = value.detach().double().requires_grad_()
    expected = definition(reward.double(), exact_value, whiten=whiten, group_size=group_size, mask=mask)
    # A mean over n values of about 1 in float32, summed pairwise.
    torch.testing.assert_close(advantage.double(), expected, rtol=5e-6, atol=5e-6)
    upstream = torch.randn(numel, device=device)
    (gradient,) = torch.autograd.grad(advantage, value, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, exact_value, upstream.double())
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that 3000 elements are more parts of a group than every program merges itself."""
    kernels = pytest.importorskip("efe_kernels.advantage.kernels")
    for name, limit in {"TILE_LIMIT": 1024, "MOST_TILES": 1, "MOST_PARTS": 2, "MERGED_AT_ONCE": 2}.items():
        monkeypatch.setattr(kernels, name, limit)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("whiten", [True, "center"])
@pytest.mark.parametrize(("numel", "group_size"), [(7000, None), (7000, 3500), (4000, 2000)])
def test_groups_of_very_many_parts(numel: int, group_size: int | None, whiten: Any, device: str) -> None:
    """7 and 4 parts of a group are merged before every program reads them, 2 are not."""
    test_whitening_of_any_group_size(numel, group_size, whiten, device)


@pytest.mark.usefixtures("small_tiles")
def test_what_a_program_reads_of_its_group_does_not_grow_with_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all programs together read the square of the group's size."""
    kernels = pytest.importorskip("efe_kernels.advantage.kernels")
    read: list[int] = []

    def launch(_function: Any, _grid: tuple[int, ...], *arguments: Any, **_: Any) -> None:
        read.extend(argument.parts for argument in arguments if isinstance(argument, kernels.Partial))

    monkeypatch.setattr(kernels, "launch", launch)
    for numel in (2048, 4096, 65536):
        x, statistics = torch.zeros(numel), torch.zeros(1, 3)
        inputs, settings = Inputs(x, x, None), Settings(5.0, "tanh", numel, False)
        kernels.rl_advantage_forward(inputs, settings)
        kernels.rl_advantage_backward(x, inputs, statistics, settings)
    assert read == [2, 2, 1, 1, 1, 1]


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("numel", [6, 5000, 40000])
@pytest.mark.parametrize("common", [0.1, 1e-6, 3e4])
def test_a_group_of_equal_rewards_gets_exactly_zero(numel: int, common: float, device: str) -> None:
    """Also where n times the value is no float32: the mean must not leave a remainder that the small std blows up."""
    reward = torch.full((numel,), common, device=device)
    value = torch.zeros(numel, device=device, requires_grad=True)
    advantage = rl_advantage(reward, value, normalize=None, reward_scale=1 / 3, whiten=True)
    assert advantage.abs().max().item() == 0.0
    (gradient,) = torch.autograd.grad(advantage, value, torch.randn(numel, device=device))
    assert gradient.abs().max().item() == 0.0


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("common", [0.1, 3e4, 1e20])
def test_equal_rewards_of_very_many_parts_get_exactly_zero(common: float, device: str) -> None:
    """Also where the square of the value is no float32, and a part of the group is masked."""
    reward = torch.full((7000,), common, device=device)
    mask = torch.arange(7000, device=device) // 1024 % 3 != 0
    advantage = rl_advantage(reward, torch.zeros_like(reward), normalize=None, reward_scale=1.0, whiten=True, mask=mask)
    assert advantage.abs().max().item() == 0.0


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_centring_needs_no_spread(scale: float, device: str) -> None:
    """Equal advantages have a gradient, and the squares of small ones are not asked for."""
    reward, upstream = scale * torch.arange(4.0, device=device), torch.arange(4.0, device=device)
    settings: dict[str, Any] = {"reward_scale": 1.0, "normalize": None, "whiten": "center"}
    zero = torch.zeros(4, device=device, requires_grad=True)
    found = rl_advantage(reward, zero.detach(), **settings)
    torch.testing.assert_close(found / scale, torch.tensor([-1.5, -0.5, 0.5, 1.5], device=device))
    equal = rl_advantage(torch.ones_like(reward), zero, **settings)
    (gradient,) = torch.autograd.grad(equal, zero, upstream)
    assert gradient.tolist() == [1.5, 0.5, -0.5, -1.5]

    def centred(value: Tensor) -> Tensor:
        return (rl_advantage(torch.ones_like(reward), value, **settings) * upstream).sum()

    assert torch.equal(torch.func.grad(centred)(zero.detach()), gradient)


def test_almost_equal_rewards_do_not_explode(device: str) -> None:
    reward = torch.full((8,), 0.1, device=device)
    reward[0] += 1e-8
    advantage = rl_advantage(reward, torch.zeros(8, device=device), whiten=True)
    assert advantage.abs().max().item() < 1e-2


def test_small_rewards_keep_their_digits(device: str) -> None:
    """tanh of 5 · 3e-5 to float32's relative precision: rewards of that size are common."""
    reward = torch.tensor([3e-5, -3e-5, 1e-12, 0.049, 0.051, 0.2, -3.0, 40.0, -torch.inf], device=device)
    advantage = rl_advantage(reward, torch.zeros_like(reward))
    torch.testing.assert_close(advantage.double(), (5 * reward.double()).tanh(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("served_by")
def test_nan_counts_where_it_is_valid_and_nowhere_else(device: str) -> None:
    nan = float("nan")
    reward = torch.tensor([0.1, nan, 0.3, 0.2, nan, 0.2], device=device)
    value = torch.tensor([0.1, 0.2, nan, 0.0, 0.0, 0.5], device=device, requires_grad=True)
    mask = torch.tensor([True, False, False, True, False, True], device=device)
    for whiten in (False, True):
        advantage = rl_advantage(reward, value, mask=mask, whiten=whiten)
        (gradient,) = torch.autograd.grad(advantage, value, torch.ones_like(advantage) * 3)
        assert advantage.isfinite().all() and gradient.isfinite().all()
        assert (advantage[~mask] == 0).all() and (gradient[~mask] == 0).all()
    for normalize in ("tanh", "clamp", None):
        assert rl_advantage(reward, value, normalize=normalize)[1].isnan()
    grouped = rl_advantage(reward, value.detach().nan_to_num(), whiten=True, group_size=2)
    assert grouped.isnan().tolist() == [True, True, False, False, True, True]


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("whiten", [True, "center"])
@pytest.mark.parametrize("infinite", [torch.inf, -torch.inf])
def test_a_group_with_one_infinite_member_is_nan(infinite: float, whiten: Any, device: str) -> None:
    """Its mean is no number to be taken off; infinities that are all equal are 0, like other equal members."""
    value = torch.zeros(4, 5, device=device)
    reward = torch.randn(4, 5, device=device)
    reward[1, 3], reward[2] = infinite, infinite
    found = rl_advantage(reward, value, normalize=None, whiten=whiten, group_size=5)
    assert found[[0, 3]].isfinite().all()
    assert found[1].isnan().all()
    assert (found[2] == 0).all()


@pytest.mark.usefixtures("served_by")
def test_groups_without_a_member(device: str) -> None:
    reward, value, _ = inputs(4, 3, device=device)
    mask = torch.zeros(4, 3, dtype=torch.bool, device=device)
    mask[2] = True
    advantage = rl_advantage(reward, value, whiten=True, group_size=3, mask=mask)
    (gradient,) = torch.autograd.grad(advantage.square().sum(), value)
    assert advantage[2].abs().min() > 0
    assert (advantage[[0, 1, 3]] == 0).all() and (gradient[[0, 1, 3]] == 0).all()


def test_mixed_dtypes_promote(device: str) -> None:
    """A float32 reward beside a critic under autocast."""
    reward, value = torch.randn(5, device=device), torch.randn(5, device=device).bfloat16().requires_grad_()
    advantage = rl_advantage(reward, value)
    assert advantage.dtype == torch.float32
    torch.testing.assert_close(advantage, (reward * 5).tanh() - value.float(), rtol=0, atol=1e-6)
    assert torch.autograd.grad(advantage.sum(), value)[0].dtype == torch.bfloat16


def test_strides_and_shapes(device: str) -> None:
    reward, value = torch.randn(2, 8, 9, device=device).unbind(0)
    expected = rl_advantage(reward, value, whiten=True, group_size=3)
    strided = torch.randn(9, 16, device=device).T[::2]
    strided.copy_(value)
    torch.testing.assert_close(rl_advantage(reward, strided, whiten=True, group_size=3), expected, rtol=0, atol=0)
    assert rl_advantage(reward[0, 0], value[0, 0]).shape == ()
    assert rl_advantage(reward[:0], value[:0], whiten=True).shape == (0, 9)


def test_only_value_gets_a_gradient(device: str) -> None:
    reward, value, _ = inputs(6, device=device)
    copies = reward.clone(), value.detach().clone()
    reward.requires_grad_()
    rl_advantage(reward, value, whiten=True).sum().backward()
    assert reward.grad is None and value.grad is not None
    assert torch.equal(reward, copies[0]) and torch.equal(value, copies[1])
    assert not rl_advantage(reward, value.detach()).requires_grad


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("whiten", [True, "center"])
def test_gradcheck(whiten: Any, group_size: int | None, device: str) -> None:
    reward, value, mask = inputs(8, device=device, dtype=torch.float64)
    settings = {"whiten": whiten, "group_size": group_size, "mask": mask}
    torch.autograd.gradcheck(lambda v: rl_advantage(reward, v, **settings), (value,))


def test_second_derivative_is_a_clear_error(device: str) -> None:
    reward, value, _ = inputs(6, device=device)
    (gradient,) = torch.autograd.grad(rl_advantage(reward, value, whiten=True).square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="rl_advantage has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("numel", [12, 5000])
def test_two_runs_give_the_same_bits(numel: int, device: str) -> None:
    reward, value, _ = inputs(numel, device=device)
    first, second = (rl_advantage(reward, value, whiten=True) for _ in range(2))
    assert torch.equal(first, second)
    upstream = torch.randn(numel, device=device)
    gradients = [torch.autograd.grad(advantage, value, upstream)[0] for advantage in (first, second)]
    assert torch.equal(*gradients)


def test_opcheck(device: str) -> None:
    reward, value, mask = inputs(3, 4, device=device)
    value = value.detach()
    for group_size in (0, 4):
        arguments = (reward, value.half(), mask, 5.0, "tanh", group_size, False)
        torch.library.opcheck(torch.ops.efe.rl_advantage_forward.default, arguments)
        statistics = torch.rand(3 if group_size else 0, 3, device=device)
        arguments = (reward, reward, value.half(), None, statistics, 5.0, None, group_size, True)
        torch.library.opcheck(torch.ops.efe.rl_advantage_backward.default, arguments)


def test_compiles_as_one_graph(device: str) -> None:
    reward, value, mask = inputs(12, device=device)

    def loss(value: Tensor) -> Tensor:
        return rl_advantage(reward, value, whiten=True, group_size=4, mask=mask).square().sum()

    expected = torch.autograd.grad(loss(value), value)[0]
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(value), value)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("whiten", [True, "center"])
@pytest.mark.parametrize("size", [8, 5000, 50_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_equal_rewards_that_overflow_when_scaled_are_equal(
    dtype: torch.dtype, size: int, whiten: Any, device: str
) -> None:
    reward = torch.full((size,), 6e4, dtype=dtype, device=device)
    value = torch.zeros_like(reward).requires_grad_()
    advantage = rl_advantage(reward, value, reward_scale=1e36, normalize=None, whiten=whiten)
    assert not advantage.any()
    (gradient,) = torch.autograd.grad(advantage.sum(), value)
    assert not gradient.any()


def test_clear_errors(device: str) -> None:
    reward, value, mask = torch.randn(6, device=device), torch.randn(6, device=device), torch.ones(6, device=device)
    wrong: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "reward must be float32, .* or float64, it was torch.int64", (reward.long(), value), {}),
        (TypeError, "value must be a tensor, it was float", (reward, 0.0), {}),
        (TypeError, "mask must be a bool tensor, it was torch.float32", (reward, value), {"mask": mask}),
        (ValueError, r"value must have the shape of reward = \[6\], it was \[5\]", (reward, value[:5]), {}),
        (ValueError, r"mask must have the shape of reward = \[6\]", (reward, value), {"mask": mask[:5] > 0}),
        (ValueError, "value must be on the device of reward", (reward, value.to("meta")), {}),
        (ValueError, "whiten must be one of True, False, 'center', it was 'std'", (reward, value), {"whiten": "std"}),
        (ValueError, "normalize must be one of 'tanh', 'clamp', None, it was 'relu'", (reward, value),
         {"normalize": "relu"}),
        (ValueError, "group_size must divide the 6 elements of reward, it was 4", (reward, value),
         {"whiten": True, "group_size": 4}),
        (ValueError, "group_size must be at least 1, it was 0", (reward, value),
         {"whiten": True, "group_size": 0}),
        (ValueError, "group_size must be None unless whiten is True or 'center', it was 3", (reward, value),
         {"group_size": 3}),
    ]  # fmt: skip
    for error, message, arguments, keywords in wrong:
        with pytest.raises(error, match=message):
            rl_advantage(*arguments, **keywords)

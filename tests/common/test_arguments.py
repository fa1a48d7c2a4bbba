"""What is said of a wrong argument: one sentence of TypeError or ValueError that names what the caller gave."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import efe_kernels
from efe_kernels import EFELoss, EFEWeights, RewardWeights

LOGITS, TARGET, PREFERENCE = torch.randn(2, 3, 4, 5, 10), torch.randint(0, 10, (2, 4, 5)), torch.randn(4, 5, 10)
X, FLAGS = torch.randn(4, 6), torch.zeros(4, 6, dtype=torch.bool)
GRIDS = torch.randint(0, 10, (2, 4, 5))


def loss(**settings: Any) -> Any:
    return efe_kernels.efe_loss(LOGITS, TARGET, PREFERENCE, **settings)


def reward(**settings: Any) -> Any:
    return efe_kernels.grid_reward(GRIDS, GRIDS, TARGET, **settings)


def policy_loss(**settings: Any) -> Any:
    return efe_kernels.policy_gradient_loss(X, X, X, X, X, old_log_prob=X, **settings)


def gae(**settings: Any) -> Any:
    return efe_kernels.gae(X, X, X, FLAGS, **settings)


def vtrace(**settings: Any) -> Any:
    return efe_kernels.vtrace(X, X, X, X, FLAGS, **settings)


def advantage(**settings: Any) -> Any:
    return efe_kernels.rl_advantage(X, X, **{"whiten": True, **settings})


def refined(**settings: Any) -> Any:
    return efe_kernels.refine_prompt(X[:, 1:], X, X, **settings)


NOT_A_NUMBER = (None, "1", [1.0], torch.tensor([1.0, 2.0]), torch.tensor(1.0, requires_grad=True), 1j)
NEVER = (math.nan, math.inf, -math.inf, 10**400)
NOT_AN_INTEGER = (None, "1", [1], 1.5, math.nan, torch.tensor([1, 2]), True)
BEYOND = (2**64, -(2**64))
# Function, setting, what it refuses beside these.
NUMBERS: list[tuple[Callable[..., Any], str, tuple[Any, ...]]] = [
    (loss, "hard_cell_min_ratio", NEVER),
    (policy_loss, "clip", (math.nan, -math.inf, 0, -0.1)),
    (policy_loss, "clip_high", (math.nan, -math.inf, 0, -0.1)),
    (policy_loss, "value_clip", (math.nan, -math.inf, 0, -0.1)),
    (policy_loss, "dual_clip", (math.nan, -math.inf, 0, 1)),
    (policy_loss, "kl_coef", NEVER),
    (lambda **s: policy_loss(aggregation="constant", **s), "normalizer", (*NEVER, 0, -1)),
    (policy_loss, "value_coef", NEVER),
    (policy_loss, "entropy_coef", NEVER),
    (gae, "gamma", (*NEVER, -0.1, 1.1, 2**40)),
    (gae, "lam", (*NEVER, -0.1, 1.1)),
    (gae, "reward_scale", NEVER),
    (vtrace, "gamma", (*NEVER, -0.1)),
    (vtrace, "rho_clip", (math.nan, -math.inf, -0.1)),
    (vtrace, "c_clip", (math.nan, -math.inf, -0.1)),
    (vtrace, "reward_scale", NEVER),
    (advantage, "reward_scale", NEVER),
    (refined, "delta_scale", (*NEVER, 0, -0.2)),
    (lambda **s: efe_kernels.squashed_log_prob(X, X, X, **s), "delta_scale", (*NEVER, 0, -0.2)),
]
INTEGERS: list[tuple[Callable[..., Any], str, tuple[Any, ...]]] = [
    (loss, "max_cells", (*BEYOND, 0, -1)),
    (loss, "ignore_index", BEYOND),
    (reward, "num_colors", (*BEYOND, 0, -1, 2**40)),
    (advantage, "group_size", (*BEYOND, 0, -1, 5, 2**40)),
    (refined, "seed", (*BEYOND, -1)),
    (EFELoss, "max_grid_size", (*BEYOND, 0, -1)),
    (EFELoss, "num_colors", (*BEYOND, 0, 1, -1)),
    (EFELoss, "prompt_dim", (*BEYOND, 0, -1)),
]
FLAG_SETTINGS = [(loss, "hard_cell"), (advantage, "whiten")]


def refusals() -> list[Any]:
    found = [(call, name, value) for call, name, more in NUMBERS for value in (*NOT_A_NUMBER, *more)]
    found += [(call, name, value) for call, name, more in INTEGERS for value in (*NOT_AN_INTEGER, *more)]
    found += [(call, name, value) for call, name in FLAG_SETTINGS for value in (None, "yes", 2, torch.tensor(True))]
    optional = ("group_size", "seed", "clip_high", "value_clip", "dual_clip")
    return [
        pytest.param(call, name, value, id=f"{name} {value!r:.30}")
        for call, name, value in found
        if not (value is None and name in optional)
    ]


@pytest.mark.parametrize(("call", "name", "value"), refusals())
def test_a_setting_that_cannot_be_is_named(call: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must [^\n]*\.$"):
        call(**{name: value})


@pytest.mark.parametrize("group", [EFEWeights, RewardWeights])
@pytest.mark.parametrize("value", [*NOT_A_NUMBER, *NEVER], ids=lambda value: f"{value!r:.30}")
def test_a_weight_that_cannot_be_is_named(group: type, value: Any) -> None:
    call, field = (loss, "risk") if group is EFEWeights else (reward, "colour")
    with pytest.raises((TypeError, ValueError), match=rf"^weights\.{field} must [^\n]*\.$"):
        call(weights=group(**{field: value}))
    with pytest.raises(TypeError, match=rf"^weights must be {group.__name__}, it was float\.$"):
        call(weights=1.0)


def test_numbers_of_numpy_are_numbers() -> None:
    assert torch.equal(loss(max_cells=np.int64(30), hard_cell=np.bool_(True)).total, loss(max_cells=30).total)
    assert torch.equal(advantage(group_size=np.int32(6)), advantage(group_size=6))
    assert torch.equal(gae(gamma=np.float32(0.5))[0], gae(gamma=0.5)[0])
    assert torch.equal(refined(seed=np.uint8(3)).action, refined(seed=3).action)


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "efe_loss": (
        efe_kernels.efe_loss,
        {
            "logits": LOGITS, "target": TARGET, "preference_logits": PREFERENCE, "backward_logits": LOGITS,
            "final_logits": LOGITS[:, 0], "observation_probs": LOGITS, "prompt": torch.randn(2, 12),
            "projection": torch.randn(10, 12), "target_preference": PREFERENCE, "valid": TARGET > 2,
        },
    ),
    "grid_reward": (
        efe_kernels.grid_reward,
        {"before": LOGITS[:, 0], "after": GRIDS, "target": TARGET, "valid": TARGET > 2, "source": GRIDS},
    ),
    "masked_mean_pool": (efe_kernels.masked_mean_pool, {"hidden": torch.randn(2, 4, 6), "mask": torch.ones(2, 4)}),
    "refine_prompt": (
        efe_kernels.refine_prompt, {"prompt": X[:, 1:], "mean": X, "log_std": X[0], "noise": X},
    ),
    "squashed_log_prob": (efe_kernels.squashed_log_prob, {"action": X, "mean": X, "log_std": X[0]}),
    "gae": (
        efe_kernels.gae, {"reward": X, "value": X, "next_value": X, "terminated": FLAGS, "truncated": FLAGS},
    ),
    "rl_advantage": (efe_kernels.rl_advantage, {"reward": X, "value": X, "mask": ~FLAGS}),
}  # fmt: skip
# Arguments without the dimension of the batch.
UNBATCHED = {"preference_logits", "projection", "target_preference", "log_std"}
OPTIONAL = {
    "backward_logits", "final_logits", "observation_probs", "prompt of efe_loss", "projection", "target_preference",
    "valid", "noise", "truncated", "mask of rl_advantage", "source",
}  # fmt: skip


def one_of(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name in UNBATCHED else value[0] for name, value in arguments.items()}


def positions() -> list[Any]:
    return [(function, name, batched) for function, (_, given) in CALLS.items() for name in given for batched in (0, 1)]


@pytest.mark.parametrize(("function", "name", "batched"), positions())
@pytest.mark.parametrize("value", [None, [1.0], 0.3, "x"], ids=str)
def test_what_is_no_tensor_is_named(function: str, name: str, batched: int, value: Any) -> None:
    call, arguments = CALLS[function]
    given = arguments if batched else one_of(arguments)
    if value is None and (name in OPTIONAL or f"{name} of {function}" in OPTIONAL):
        return
    extra = {"inverse": lambda grid: grid} if name == "source" else {}
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must [^\n]*\.$"):
        call(**{**given, name: value}, **extra)


@pytest.mark.parametrize(("function", "name", "batched"), positions())
def test_a_wrong_shape_is_told_as_it_was_given(function: str, name: str, batched: int) -> None:
    call, arguments = CALLS[function]
    given = arguments if batched else one_of(arguments)
    wrong = given[name][None, None]
    extra = {"inverse": lambda grid: grid} if name == "source" else {}
    # The first tensor of a call says what the others must be like.
    culprits = "|".join(given) if name == next(iter(given)) else name
    shape = ", ".join(map(str, wrong.shape))
    with pytest.raises((TypeError, ValueError), match=rf"^({culprits}) must [^\n]*\[{shape}\][^\n]*\.$"):
        call(**{**given, name: wrong}, **extra)


def test_a_batched_prompt_beside_an_unbatched_plan_is_told_its_own_shape() -> None:
    with pytest.raises(ValueError, match=r"^prompt must have the shape \[D\], it was \[1, 12\]\.$"):
        efe_kernels.efe_loss(LOGITS[0], TARGET[0], PREFERENCE, prompt=torch.randn(1, 12))


def test_a_prompt_of_another_width_names_the_setting_of_the_module() -> None:
    with pytest.raises(ValueError, match=r"prompt must have 256 dimensions, .* EFELoss\(prompt_dim=128\) takes it"):
        EFELoss()(LOGITS, TARGET, prompt=torch.randn(2, 128))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_every_unsigned_dtype_is_an_integer(dtype: torch.dtype) -> None:
    unsigned = TARGET.to(dtype)
    assert torch.equal(efe_kernels.efe_loss(LOGITS, unsigned, PREFERENCE).total, loss().total)
    found = efe_kernels.grid_reward(GRIDS.to(dtype), GRIDS.to(dtype), unsigned, source=unsigned, inverse=lambda g: g)
    assert torch.equal(found.reward, reward(source=TARGET, inverse=lambda g: g).reward)


def test_an_inverse_that_works_in_place_changes_no_grid() -> None:
    given = GRIDS.clone()
    efe_kernels.grid_reward(given, given, TARGET, source=GRIDS, inverse=lambda grid: grid.zero_())
    assert torch.equal(given, GRIDS)


def test_a_nested_tensor_is_named() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    with pytest.raises(TypeError, match=r"^hidden must be a strided tensor, it was nested\.$"):
        efe_kernels.masked_mean_pool(nested, torch.ones(2, 2))


@pytest.mark.parametrize("value", [np.ones(2), ["tanh"], {}, torch.ones(2), 1])
def test_what_is_no_choice_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^normalize must be one of 'tanh', 'clamp', None, it was "):
        advantage(normalize=value)


def test_an_inverse_that_cannot_be_called_is_named() -> None:
    with pytest.raises(TypeError, match=r"^inverse must be callable, it was 3\.$"):
        reward(source=GRIDS, inverse=3)


def empty(tensor: Tensor) -> Tensor:
    return tensor[:0].clone().requires_grad_(tensor.is_floating_point())


@pytest.mark.parametrize("function", CALLS)
def test_no_episode_gives_empty_results_and_a_mean_of_0(function: str) -> None:
    call, arguments = CALLS[function]
    given = {name: value if name in UNBATCHED else empty(value) for name, value in arguments.items()}
    found = call(**given)
    if function == "efe_loss":
        assert found.total == 0
        (gradient,) = torch.autograd.grad(found.total, given["logits"])
        assert gradient.shape == given["logits"].shape
        assert found.mask_ratio.shape == (0,)
        return
    for result in found if isinstance(found, tuple) else (found,):
        if isinstance(result, Tensor):
            assert result.shape[0] == 0


def test_a_policy_loss_of_no_element_is_0() -> None:
    assert all(value == 0 for value in efe_kernels.policy_gradient_loss(*[X[:0]] * 5))


@pytest.mark.parametrize(("function", "name", "batched"), positions())
def test_a_sparse_tensor_is_named(function: str, name: str, batched: int) -> None:
    call, arguments = CALLS[function]
    given = arguments if batched else one_of(arguments)
    sparse = torch.sparse_coo_tensor(size=given[name].shape, dtype=given[name].dtype)
    extra = {"inverse": lambda grid: grid} if name == "source" else {}
    with pytest.raises(TypeError, match=rf"^{name} must be a strided tensor, its layout was torch\.sparse_coo; .*\.$"):
        call(**{**given, name: sparse}, **extra)

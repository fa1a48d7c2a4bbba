"""What callers write: the public names, their parameters with kinds and defaults, and the fields of the results.

A change here is a change for every user: it belongs into the changelog.
"""

from __future__ import annotations

import inspect
from typing import Any

import efe_kernels
import efe_kernels.arc_efe

EFE_WEIGHTS = "EFEWeights(risk=1.0, ambiguity=0.0, consistency=2.0, agreement=0.5, anchor=0.2, prompt=0.3, step=0.1)"
REWARD_WEIGHTS = "RewardWeights(accuracy=1.0, size=0.5, colour=0.5, reversibility=0.5)"
# As `inspect.signature` writes them, without the types.
SIGNATURES = {
    "EFELoss": f"(max_grid_size=30, num_colors=10, prompt_dim=256, weights={EFE_WEIGHTS}, *, hard_cell=True,"
    " hard_cell_min_ratio=0.0, ignore_index=-100, reduction='mean')",
    "EFELoss.forward": "(self, logits, target, *, prompt=None, backward_logits=None, final_logits=None,"
    " observation_probs=None, valid=None)",
    "EFELoss.update_target_preference": "(self, target, valid, success_rate, *, synchronize=True)",
    "EFEWeights": "(risk=1.0, ambiguity=0.0, consistency=2.0, agreement=0.5, anchor=0.2, prompt=0.3, step=0.1)",
    "RewardWeights": "(accuracy=1.0, size=0.5, colour=0.5, reversibility=0.5)",
    "efe_loss": "(logits, target, preference_logits, *, backward_logits=None, final_logits=None,"
    " observation_probs=None, prompt=None, projection=None, target_preference=None, valid=None,"
    f" weights={EFE_WEIGHTS}, hard_cell=True, hard_cell_min_ratio=0.0, max_cells=900, ignore_index=-100,"
    " reduction='mean')",
    "gae": "(reward, value, next_value, terminated, truncated=None, *, gamma=0.99, lam=0.95, reward_scale=1.0,"
    " mask=None, time_dim=-1)",
    "grid_reward": "(before, after, target, *, valid=None, source=None, inverse=None,"
    f" weights={REWARD_WEIGHTS}, num_colors=10)",
    "masked_mean_pool": "(hidden, mask)",
    "next_values": "(value, last_value, terminated, truncated=None, final_value=None, *, mask=None, time_dim=-1)",
    "policy_efe": "(state_probs, likelihood, preference_logits)",
    "policy_gradient_loss": "(log_prob, advantage, value=None, value_target=None, entropy=None, *, old_log_prob=None,"
    " clip=0.2, clip_high=None, value_clip=None, old_value=None, value_coef=0.5, entropy_coef=0.01, ref_log_prob=None,"
    " kl_coef=0.0, dual_clip=None, aggregation='mean', normalizer=None, level='token', mask=None)",
    "refine_prompt": "(prompt, mean, log_std, *, noise=None, seed=None, delta_scale=0.2)",
    "rl_advantage": "(reward, value, *, reward_scale=5.0, normalize='tanh', whiten=False, group_size=None, mask=None)",
    "rollout_states": "(initial, transition, policies)",
    "squashed_log_prob": "(action, mean, log_std, *, delta_scale=0.2)",
    "td_lambda": "(reward, next_value, terminated, truncated=None, *, gamma=0.99, lam=0.95, reward_scale=1.0,"
    " mask=None, time_dim=-1)",
    "vtrace": "(log_ratio, reward, value, next_value, terminated, truncated=None, *, gamma=0.99, lam=1.0,"
    " rho_clip=1.0, c_clip=1.0, reward_scale=1.0, mask=None, time_dim=-1)",
}
FIELDS = {
    "EFELossOutput": ("total", "terms", "mask_ratio", "hard_cell_scale"),
    "PolicyEFE": ("efe", "risk", "ambiguity", "information_gain", "utility"),
    "PolicyLossOutput": (
        "total", "policy", "value", "entropy", "clip_fraction", "approx_kl", "explained_variance", "kl",
        "clip_fraction_low", "clip_fraction_high",
    ),
    "RefinedPrompt": ("prompt", "action", "log_prob", "entropy"),
    "RewardOutput": ("reward", "terms", "before", "after", "mask_ratio"),
}  # fmt: skip
ARC_EFE_SIGNATURES = {
    "EFELoss": "(lambda_risk=1.0, lambda_amb=0.0, lambda_step=0.1, lambda_cons=1.0, lambda_bi=0.5, lambda_z=0.2,"
    " lambda_prompt=0.3, lambda_grid_norm=0.1, max_grid_size=30, num_colors=10, prompt_dim=256)",
    "EFELoss.ensure_preference": "(self, height, width)",
    "EFELoss.forward": "(self, forward_predictions, backward_predictions, state_predictions, observation_probs,"
    " final_prediction, target_outcome, episode_length, prompt_embedding=None, grid_mask=None)",
    "EFELoss.update_target_preference": "(self, successful_outcomes, grid_sizes, success_rate=0.5)",
}


def signature(function: Any) -> str:
    found = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(inspect.Signature(bare))


def signatures(module: Any) -> dict[str, str]:
    """Of everything public that can be called, and of the public methods of the modules; NamedTuples are results."""
    found = {}
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value) or hasattr(value, "_fields"):
            continue
        found[name] = signature(value)
        methods = vars(value) if inspect.isclass(value) else {}
        found |= {
            f"{name}.{method}": signature(function)
            for method, function in methods.items()
            if inspect.isfunction(function) and not method.startswith("_") and method != "extra_repr"
        }
    return found


def test_public_signatures() -> None:
    assert signatures(efe_kernels) == SIGNATURES


def test_fields_of_results() -> None:
    results = {name: getattr(efe_kernels, name) for name in efe_kernels.__all__}
    assert {name: value._fields for name, value in results.items() if hasattr(value, "_fields")} == FIELDS


def test_the_drop_in_for_arc_efe() -> None:
    assert efe_kernels.arc_efe.__all__ == ["EFELoss"]
    assert signatures(efe_kernels.arc_efe) == ARC_EFE_SIGNATURES

"""`refine_prompt` as a policy: it learns on a continuous bandit to move a prompt to where a judge wants it.

The judge's goal is the prompt plus a move that depends on it; its score is minus the squared distance to that goal. The
policy sees the prompt, samples a refinement, and is told the gain of the score over the prompt as it is. Doing nothing
gains 0. The policy is updated apart from the sampling: the stored actions are scored by `squashed_log_prob` under the
policy as it is by then, and the gain is whitened within the refinements of each prompt.

    python examples/refine_prompt_policy.py       # 100 updates, a few seconds
    python examples/refine_prompt_policy.py --steps 20

It prints the mean gain as training goes on, then on new prompts, without noise, the squared distance to the goal of the
prompt, of an untrained refinement and of the learned one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from efe_kernels import policy_gradient_loss, refine_prompt, rl_advantage, squashed_log_prob

DIM, PROMPTS, GROUP, EPOCHS = 8, 32, 16, 2


class Result(NamedTuple):
    """Mean squared distance to the goal on new prompts, summed over the dimensions, without noise."""

    prompt: float
    untrained: float
    trained: float


class Policy(nn.Module):
    """[N, D] prompts -> mean and log_std, [N, D + 1]; the last component is α before squashing."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(DIM, 64), nn.Tanh(), nn.Linear(64, DIM + 1))
        self.log_std = nn.Parameter(torch.full((DIM + 1,), -1.0))

    def forward(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(prompt), self.log_std


def distance(prompt: Tensor, goal: Tensor) -> Tensor:
    return (prompt - goal).square().sum(-1)


@torch.no_grad()
def without_noise(policy: Policy, prompt: Tensor) -> Tensor:
    mean, log_std = policy(prompt)
    return refine_prompt(prompt, mean, log_std, noise=torch.zeros_like(mean)).prompt


def main(arguments: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    torch.manual_seed(settings.seed)
    direction = torch.randn(DIM, DIM) / DIM**0.5

    def goal_of(prompt: Tensor) -> Tensor:
        return prompt + 0.15 * torch.tanh(3 * prompt @ direction)  # within reach: a refinement moves by up to 0.2

    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    new = torch.randn(1024, DIM)
    before, untrained = distance(new, goal_of(new)), distance(without_noise(policy, new), goal_of(new))
    for step in range(settings.steps):
        prompt = torch.randn(PROMPTS, DIM).repeat_interleave(GROUP, 0)  # a group is consecutive
        with torch.no_grad():
            refined = refine_prompt(prompt, *policy(prompt), seed=settings.seed + step)
        gain = distance(prompt, goal_of(prompt)) - distance(refined.prompt, goal_of(prompt))
        advantage = rl_advantage(
            gain, torch.zeros_like(gain), reward_scale=1.0, normalize=None, whiten=True, group_size=GROUP
        )
        for _ in range(EPOCHS):
            log_prob, _ = squashed_log_prob(refined.action, *policy(prompt))
            # No critic: the group's mean gain is the baseline.
            loss = policy_gradient_loss(log_prob, advantage, old_log_prob=refined.log_prob)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
        if step % 20 == 0 or step == settings.steps - 1:
            print(f"update {step:3} mean gain {float(gain.mean()):+.4f} clipped {float(loss.clip_fraction):.2f}")
    after = distance(without_noise(policy, new), goal_of(new))
    result = Result(*(float(value.mean()) for value in (before, untrained, after)))
    print(
        f"squared distance: prompt {result.prompt:.4f}, untrained {result.untrained:.4f}, trained {result.trained:.4f}"
    )
    return result


if __name__ == "__main__":
    main()

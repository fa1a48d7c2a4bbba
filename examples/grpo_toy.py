"""GRPO on a toy: a policy writes four symbols for each of six prompts and is rewarded for those of a hidden answer.

For each prompt a group of answers is sampled. The advantage of an answer is its reward, whitened within its group, so
that no critic is needed; every symbol of it counts with that advantage.

    python examples/grpo_toy.py                   # 100 updates, a few seconds
    python examples/grpo_toy.py --plain           # the same in plain PyTorch
    python examples/grpo_toy.py --steps 10

It prints the mean reward, which is the share of right symbols: 1/8 for a policy that has learned nothing, up to 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from efe_kernels import policy_gradient_loss, rl_advantage

PROMPTS, GROUP, LENGTH, SYMBOLS = 6, 16, 4, 8
EPOCHS, CLIP = 2, 0.2


class Result(NamedTuple):
    untrained: float  # mean reward of the policy as it begins
    trained: float  # of the policy as it ends
    rewards: list[float]  # of each update
    weights: Tensor  # in the end


class Policy(nn.Module):
    """Symbols from left to right, each given the one before it and the prompt."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.prompt, self.place = nn.Embedding(PROMPTS, width), nn.Embedding(LENGTH, width)
        self.before = nn.Embedding(SYMBOLS + 1, width)  # the last row stands before the first symbol
        self.read = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, SYMBOLS))

    def forward(self, prompt: Tensor, before: Tensor, place: Tensor) -> torch.distributions.Categorical:
        return torch.distributions.Categorical(
            logits=self.read(self.prompt(prompt) + self.before(before) + self.place(place))
        )

    @torch.no_grad()
    def sample(self, prompt: Tensor) -> Tensor:
        """[N] prompts -> [N, LENGTH] symbols."""
        symbols = [torch.full_like(prompt, SYMBOLS)]
        for place in range(LENGTH):
            symbols.append(self(prompt, symbols[-1], torch.full_like(prompt, place)).sample())
        return torch.stack(symbols[1:], 1)

    def log_prob(self, prompt: Tensor, symbols: Tensor) -> Tensor:
        """Of each symbol, [N, LENGTH]."""
        start = torch.full_like(symbols[:, :1], SYMBOLS)
        policy = self(prompt[:, None], torch.cat([start, symbols[:, :-1]], 1), torch.arange(LENGTH))
        log_prob: Tensor = policy.log_prob(symbols)
        return log_prob


def plain_advantage(reward: Tensor) -> Tensor:
    groups = reward.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def plain_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    ratio, advantage = (log_prob - old_log_prob).exp(), advantage[:, None]
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


def reward_of(symbols: Tensor, answer: Tensor) -> Tensor:
    return (symbols == answer).float().mean(1)


def main(arguments: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without efe_kernels")
    settings = parser.parse_args(arguments)
    torch.manual_seed(settings.seed)
    answers = torch.randint(SYMBOLS, (PROMPTS, LENGTH))
    prompt = torch.arange(PROMPTS).repeat_interleave(GROUP)  # a group is consecutive
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    untrained = float(reward_of(policy.sample(prompt), answers[prompt]).mean())
    rewards = []
    for step in range(settings.steps):
        symbols = policy.sample(prompt)
        reward = reward_of(symbols, answers[prompt])
        rewards.append(float(reward.mean()))
        with torch.no_grad():
            old_log_prob = policy.log_prob(prompt, symbols)
        if settings.plain:
            advantage = plain_advantage(reward)
        else:
            zero = torch.zeros_like(reward)  # no critic
            advantage = rl_advantage(reward, zero, reward_scale=1.0, normalize=None, whiten=True, group_size=GROUP)
        for _ in range(EPOCHS):
            log_prob = policy.log_prob(prompt, symbols)
            if settings.plain:
                loss = plain_loss(log_prob, old_log_prob, advantage)
            else:
                loss = policy_gradient_loss(log_prob, advantage, old_log_prob=old_log_prob, clip=CLIP).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 20 == 0 or step == settings.steps - 1:
            print(f"update {step:3} mean reward {rewards[-1]:.3f}")
    trained = float(reward_of(policy.sample(prompt), answers[prompt]).mean())
    print(f"mean reward of new answers: untrained {untrained:.3f}, trained {trained:.3f}")
    weights = nn.utils.parameters_to_vector(policy.parameters()).detach()
    return Result(untrained, trained, rewards, weights)


if __name__ == "__main__":
    main()

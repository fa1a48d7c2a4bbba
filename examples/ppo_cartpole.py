"""PPO on gymnasium's CartPole-v1 with `gae` and `policy_gradient_loss`, or with both written out in plain PyTorch.

    python examples/ppo_cartpole.py               # 40 updates of 1024 steps, half a minute
    python examples/ppo_cartpole.py --plain       # the same in plain PyTorch
    python examples/ppo_cartpole.py --steps 3     # three updates

It prints the mean return of the latest episodes as training goes on. The two ways compute the same numbers up to
rounding, so with one seed their curves begin as one: to the printed digit over the first ten updates of seeds 0 and 1.
Then a rounding error tips an action, the episodes part, and the two differ as two seeds do; there it is the level that
agrees. A random policy has a mean return of about 22; 500 is the most that CartPole gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from efe_kernels import gae, policy_gradient_loss

ENVIRONMENTS, HORIZON, EPOCHS, MINIBATCH = 8, 128, 4, 256
LEARNING_RATE, GAMMA, LAM, CLIP, VALUE_COEF, ENTROPY_COEF = 2e-3, 0.99, 0.95, 0.2, 0.5, 0.01


class Rollout(NamedTuple):
    """[B, T] of environments and steps; observations are [B, T, 4]. next_observation is the last of an episode, too."""

    observation: Tensor
    next_observation: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor


class Result(NamedTuple):
    curve: list[float]  # mean return of the episodes that ended since the update before; NaN where none did
    returns: list[float]  # of every episode, in the order in which they ended
    start: Tensor  # the weights as they begin, flat
    weights: list[Tensor]  # after each update


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def act(self, observation: Tensor) -> torch.distributions.Categorical:
        return torch.distributions.Categorical(logits=self.policy(observation))

    def value(self, observation: Tensor) -> Tensor:
        return self.critic(observation)[..., 0]


def weights_of(agent: Agent) -> Tensor:
    return nn.utils.parameters_to_vector(agent.parameters()).detach().clone()


def plain_gae(reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor) -> list[Tensor]:
    delta = reward + GAMMA * next_value * ~terminated - value
    advantage, following = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        following = delta[:, t] + GAMMA * LAM * ~(terminated | truncated)[:, t] * following
        advantage[:, t] = following
    return [advantage, advantage + value]


def plain_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, value: Tensor, target: Tensor, ent: Tensor) -> Tensor:
    ratio = (log_prob - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return -surrogate.mean() + VALUE_COEF * (value - target).square().mean() - ENTROPY_COEF * ent.mean()


@torch.no_grad()
def collect(agent: Agent, envs: gymnasium.vector.VectorEnv, observation: np.ndarray) -> tuple[Rollout, np.ndarray]:
    steps = []
    for _ in range(HORIZON):
        before = torch.from_numpy(observation)
        policy = agent.act(before)
        action = policy.sample()
        observation, reward, terminated, truncated, info = envs.step(action.numpy())
        after = observation.copy()
        ended = terminated | truncated
        if ended.any():  # `observation` is already the first of the next episode there
            after[ended] = np.stack(info["final_obs"][ended])
        found = (torch.from_numpy(x) for x in (reward.astype(np.float32), terminated, truncated))
        steps.append((before, torch.from_numpy(after), action, policy.log_prob(action), *found))
    return Rollout(*[torch.stack(column, 1) for column in zip(*steps, strict=True)]), observation


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, plain: bool) -> None:
    with torch.no_grad():
        value, next_value = agent.value(rollout.observation), agent.value(rollout.next_observation)
    ends = (rollout.terminated, rollout.truncated)
    if plain:
        advantage, target = plain_gae(rollout.reward, value, next_value, *ends)
    else:
        advantage, target = gae(rollout.reward, value, next_value, *ends, gamma=GAMMA, lam=LAM)
    tensors = (rollout.observation, rollout.action, rollout.log_prob, advantage, target)
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    for _ in range(EPOCHS):
        for chosen in torch.randperm(ENVIRONMENTS * HORIZON).split(MINIBATCH):
            observation, action, old_log_prob, advantage, target = (tensor[chosen] for tensor in flat)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            policy, value = agent.act(observation), agent.value(observation)
            log_prob, entropy = policy.log_prob(action), policy.entropy()
            if plain:
                loss = plain_loss(log_prob, old_log_prob, advantage, value, target, entropy)
            else:
                loss = policy_gradient_loss(
                    log_prob, advantage, value, target, entropy, old_log_prob=old_log_prob, clip=CLIP,
                    value_coef=VALUE_COEF, entropy_coef=ENTROPY_COEF,
                ).total  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def main(arguments: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="updates, of 1024 steps each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without efe_kernels")
    settings = parser.parse_args(arguments)
    torch.manual_seed(settings.seed)
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    envs = gymnasium.make_vec(
        "CartPole-v1", ENVIRONMENTS, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}
    )
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    observation, _ = envs.reset(seed=settings.seed)
    result, running = Result([], [], weights_of(agent), []), np.zeros(ENVIRONMENTS)
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / settings.steps)
        rollout, observation = collect(agent, envs, observation)
        latest = []
        for reward, ended in zip(rollout.reward.T, (rollout.terminated | rollout.truncated).T, strict=True):
            running += reward.numpy()
            latest += running[ended].tolist()
            running[ended] = 0
        result.returns.extend(latest)
        result.curve.append(float(np.mean(latest)) if latest else float("nan"))
        update(agent, optimizer, rollout, settings.plain)
        result.weights.append(weights_of(agent))
        if step % 5 == 0 or step == settings.steps - 1:
            print(f"update {step:3} mean return of {len(latest):3} episodes {result.curve[-1]:6.1f}")
    print(f"mean return of the last 20 episodes {np.mean(result.returns[-20:]):.1f}")
    return result


if __name__ == "__main__":
    main()

"""A whole training step as one CUDA graph: the plan, its loss, the optimizer, and the policy's update after it.

At small batches a GPU waits for the host, which prepares some hundred launches for a step. A graph records them once
and replays them with one call. What a step must be for that: nothing in it reads a number from the device, what changes
from step to step is copied into the same tensors, noise included, and the optimizer is `capturable`.

The task: the colours of a grid move on by a number that depends on the rule. A learned embedding of the rule, in place
of a language model's, is the prompt; the policy refines it and learns from the reward, apart from the loss.

    python examples/cuda_graph.py                 # on a GPU 1000 steps, else 200: some ten seconds
    python examples/cuda_graph.py --steps 20

It prints the loss as training goes on, the share of right cells on new grids, beside that of the untrained planner, and
how long a step takes, on a GPU as it is and replayed. Without a GPU nothing is recorded: the same steps, one launch
after another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efe_kernels import EFELoss, grid_reward, policy_gradient_loss, refine_prompt, rl_advantage, squashed_log_prob

STEPS, COLORS, PROMPT_DIM, SIDE, BATCH, RULES, WIDTH = 3, 10, 16, 10, 16, 4, 64
WARM_UP = 3
"""Steps before the recording, in which kernels are compiled and the optimizers make their state."""


class Inputs(NamedTuple):
    """Everything that changes from step to step."""

    source: Tensor  # [B, H, W] colours
    target: Tensor  # [B, H, W]
    rule: Tensor  # [B]
    noise: Tensor  # [B, D+1] standard normal


class Metrics(NamedTuple):
    """0-d, on the device."""

    loss: Tensor
    wrong: Tensor
    reward: Tensor


class Result(NamedTuple):
    untrained: float  # share of right cells on new grids before training
    planned: float  # and after it
    metrics: list[Metrics]


def new_inputs(batch: int, device: torch.device) -> Inputs:
    source = torch.randint(COLORS, (batch, SIDE, SIDE))
    rule = torch.randint(RULES, (batch,))
    target = (source + 1 + rule[:, None, None]) % COLORS
    return Inputs(*(each.to(device) for each in (source, target, rule, torch.randn(batch, PROMPT_DIM + 1))))


class Planner(nn.Module):
    """Logits [B, T, H, W, C]: in each cell, shared weights turn a step of the plan into the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(COLORS, WIDTH)
        self.prompt = nn.Linear(PROMPT_DIM, WIDTH)
        self.step = nn.Linear(WIDTH, WIDTH)
        self.read = nn.Linear(WIDTH, COLORS)

    def forward(self, source: Tensor, prompt: Tensor) -> Tensor:
        hidden = self.embed(F.one_hot(source, COLORS).float()) + self.prompt(prompt)[:, None, None]
        plan = []
        for _ in range(STEPS):
            hidden = hidden + self.step(F.relu(hidden))
            plan.append(self.read(F.relu(hidden)))
        return torch.stack(plan, 1)


class Policy(nn.Module):
    """mean and log_std [B, D+1] of a refinement, and value [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(PROMPT_DIM, WIDTH)
        self.read = nn.Linear(WIDTH, 2 * (PROMPT_DIM + 1) + 1)

    def forward(self, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std, value = self.read(torch.tanh(self.hidden(prompt))).split([PROMPT_DIM + 1, PROMPT_DIM + 1, 1], 1)
        return mean, -1 - torch.sigmoid(log_std), value[:, 0]


class Trainer:
    """What training changes, and the step that changes it, on `inputs`."""

    def __init__(self, inputs: Inputs) -> None:
        device = inputs.source.device
        self.inputs = inputs
        self.planner, self.policy = Planner().to(device), Policy().to(device)
        self.prompts = nn.Embedding(RULES, PROMPT_DIM).to(device)
        self.loss = EFELoss(max_grid_size=SIDE, num_colors=COLORS, prompt_dim=PROMPT_DIM).to(device)
        self.learned = [*self.planner.parameters(), *self.prompts.parameters(), *self.loss.parameters()]
        # Its count of steps is on the device: a graph would repeat one that is on the host.
        capturable = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.learned, lr=3e-3, capturable=capturable)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-3, capturable=capturable)

    def step(self) -> Metrics:
        source, target, rule, noise = self.inputs
        prompt = self.prompts(rule)
        mean, log_std, value = self.policy(prompt.detach())
        refined = refine_prompt(prompt, mean.detach(), log_std.detach(), noise=noise)
        with torch.no_grad():
            before = self.planner(source, prompt)[:, -1]
        plan = self.planner(source, refined.prompt)
        out = self.loss(plan, target, prompt=refined.prompt)
        descend(out.total, self.optimizer, self.learned)
        self.loss.update_target_preference(target, None, 1 - out.mask_ratio.mean())

        reward = grid_reward(before, plan[:, -1].detach(), target).reward
        log_prob, entropy = squashed_log_prob(refined.action.detach(), mean, log_std)
        value_target = rl_advantage(reward, torch.zeros_like(reward))
        advantage = rl_advantage(reward, value.detach())
        policy_loss = policy_gradient_loss(log_prob, advantage, value, value_target, entropy).total
        descend(policy_loss, self.policy_optimizer, [*self.policy.parameters()])
        return Metrics(out.total.detach(), out.mask_ratio.mean(), reward.mean())

    def load(self, inputs: Inputs) -> None:
        """Other values in the same memory, where a graph reads them."""
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)

    @torch.no_grad()
    def right_cells(self) -> float:
        """On 512 new grids, the prompts as they are."""
        source, target, rule, _ = new_inputs(512, self.inputs.source.device)
        return float((self.planner(source, self.prompts(rule))[:, -1].argmax(-1) == target).float().mean())


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    # Gradients set to None are made anew in the graph's own memory when it is recorded.
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def recorded(step: Callable[[], Metrics]) -> Callable[[], Metrics]:
    """The step as a CUDA graph. Its results are in the same tensors after every call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> Metrics:
        graph.replay()
        return results

    return replay


def milliseconds(step: Callable[[], Metrics], times: int = 20) -> float:
    """Of one step, until the device is done."""
    float(step().loss)  # waits
    begun = time.perf_counter()
    for _ in range(times):
        metrics = step()
    float(metrics.loss)
    return (time.perf_counter() - begun) / times * 1e3


def main(arguments: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, default=1000 if on_gpu else 200)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if on_gpu else "cpu")
    trainer = Trainer(new_inputs(BATCH, device))
    untrained = trainer.right_cells()
    step = recorded(trainer.step) if on_gpu else trainer.step
    metrics = []
    for number in range(settings.steps):
        trainer.load(new_inputs(BATCH, device))
        metrics.append(Metrics(*(value.clone() for value in step())))
        if number % 50 == 0 or number == settings.steps - 1:
            loss, wrong, reward = map(float, metrics[-1])
            print(f"step {number:4} loss {loss:6.3f} wrong {wrong:.3f} reward {reward:+.3f}")
    result = Result(untrained, trainer.right_cells(), metrics)
    print(f"right cells on new grids: untrained {result.untrained:.3f}, trained {result.planned:.3f}")
    replayed = f", replayed {milliseconds(step):.2f} ms" if on_gpu else ""
    print(f"a step takes {milliseconds(trainer.step):.2f} ms{replayed}")
    return result


if __name__ == "__main__":
    main()

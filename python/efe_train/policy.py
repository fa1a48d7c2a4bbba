"""The policy that refines prompts, and its update by reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from efe_kernels import RefinedPrompt, grid_reward, policy_gradient_loss, refine_prompt, rl_advantage, squashed_log_prob
from efe_train.config import NUM_COLORS, PROMPT_DIM
from efe_train.data import Batch
from efe_train.facts import NUM_FEATURES
from efe_train.processes import ALONE, Processes
from efe_train.standardise import Standardise

NUM_CONTROLS = NUM_COLORS + 2
LOG_STD_RANGE = (-3.0, 0.0)
"""The entropy bonus pulls to the upper end: the refinement spreads over its range and does not stick to the ends."""
MAX_GRAD_NORM = 1.0
SHARPNESS = 4.0


class PolicyOutput(NamedTuple):
    """mean and log_std: [B, D+1], of the action before squashing. value: [B], of the normalised scaled reward."""

    mean: Tensor
    log_std: Tensor
    value: Tensor


@dataclass(frozen=True)
class Rollout:
    """What `Policy.update` needs of a batch; no tensor of it carries a graph.

    state: [B, S]. action: [B, K, D+1] before squashing, K samples for each query. lesson: [B, K], the reward
    and whatever else the policy is to learn from.
    """

    state: Tensor
    action: Tensor
    lesson: Tensor


class PolicyUpdate(NamedTuple):
    """0-d tensors without a graph."""

    loss: Tensor
    grad_norm: Tensor


class Policy(nn.Module):
    """A Gaussian over refinements given [prompt, control, features], with a value estimate."""

    def __init__(self, prompt_dim: int = PROMPT_DIM, hidden: int = 128) -> None:
        super().__init__()
        self.widths = prompt_dim, NUM_CONTROLS + NUM_FEATURES
        self.standardise = Standardise(sum(self.widths))
        self.read, self.see = (nn.Linear(width, hidden) for width in self.widths)
        self.mean = nn.Linear(hidden, prompt_dim + 1)
        self.log_std = nn.Linear(hidden, prompt_dim + 1)
        self.value = nn.Linear(hidden, 1)

    def forward(self, state: Tensor) -> PolicyOutput:
        """state: [B, S] as `policy_state` makes it."""
        prompt, facts = self.standardise(state).split(self.widths, 1)
        # At first the facts have the say: of the prompt, ten times as many numbers, only what proves to matter counts.
        hidden = nn.functional.silu(self.read(prompt / self.widths[0] ** 0.5) + self.see(facts))
        low, high = LOG_STD_RANGE
        # A smooth bound: a clamp would stop the gradient at its ends.
        log_std = low + (high - low) * torch.sigmoid(self.log_std(hidden))
        return PolicyOutput(self.mean(hidden), log_std, self.value(hidden)[:, 0])

    def refine_prompt(self, prompt: Tensor, state: Tensor, noise: Tensor | None) -> RefinedPrompt:
        """The prompt [B, D] refined by an action for the state: drawn with noise [B, D+1], without it the mean action.

        Gradients reach the prompt and not the policy, which learns from `update` alone.
        """
        with torch.no_grad():
            mean, log_std, _ = self(state)
        return refine_prompt(prompt, mean, log_std, noise=torch.zeros_like(mean) if noise is None else noise)

    @staticmethod
    def compute_reward(before: Tensor, after: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """How much nearer to the target the plan with the refined prompt is, [B] without a graph.

        before, after: logits [B, H, W, C] of the unrefined and the refined plan. target: [B, H, W]. valid: its cells.
        """
        return grid_reward(before, after, target, valid=valid).reward

    @staticmethod
    def expected_gain(before: Tensor, after: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """The gain in the mean probability of the target's colours, [B] without a graph.

        The policy learns from it beside the reward, which is 0 for nearly all refinements. The logits are sharpened, so
        that it is the nearly decided cells that count, and being surer of the same plan is no gain.
        """

        def right(logits: Tensor) -> Tensor:
            probs = (SHARPNESS * logits.detach().float()).softmax(-1)
            return (probs.gather(-1, target[..., None])[..., 0] * valid).sum((1, 2))

        return (right(after) - right(before)) / valid.sum((1, 2)).clamp_min(1)

    def update(self, rollout: Rollout, optimizer: torch.optim.Optimizer, processes: Processes = ALONE) -> PolicyUpdate:
        """One step of the score-function gradient on the rollout.

        optimizer: that of this policy's parameters. processes: which take this step together, from the same rollout.
        """
        optimizer.zero_grad(set_to_none=True)
        samples = rollout.action.shape[1]
        # The samples of a query stand together, which is what a group of `rl_advantage` is.
        mean, log_std, value = (part.repeat_interleave(samples, 0) for part in self(rollout.state))
        action, lesson = rollout.action.flatten(0, 1), rollout.lesson.flatten()
        log_prob, entropy = squashed_log_prob(action, mean, log_std)
        value_target = rl_advantage(lesson, torch.zeros_like(lesson))
        # Most refinements change little: within a query it counts which sample is better, not by how much.
        several = samples > 1
        advantage = rl_advantage(lesson, value.detach(), whiten=several, group_size=samples if several else None)
        loss = policy_gradient_loss(log_prob, advantage, value, value_target, entropy).total
        loss.backward()
        # The same but for what unlike devices round: without it, their policies would drift apart.
        processes.average_gradients(self.parameters())
        grad_norm = nn.utils.clip_grad_norm_(self.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        return PolicyUpdate(loss.detach(), grad_norm)


def standard_noise(seed: int, queries: int, device: torch.device) -> Tensor:
    """What the library draws for a seed, [B, D+1]: the action of a refinement with mean 0 and deviation 1."""
    zeros = torch.zeros(queries, PROMPT_DIM + 1, device=device)
    return refine_prompt(zeros[:, 1:], zeros, zeros, seed=seed).action


def policy_state(prompt: Tensor, before: Tensor, batch: Batch) -> Tensor:
    """What the policy sees, [B, S] without a graph: the prompt, the control and the features of the task.

    The control sums up the planner's unrefined plan `before` [B, H, W, C]: its mean colours, its mean entropy and the
    share of cells where it departs from the input. Like all that the policy sees it knows nothing of the target.
    """
    inside = batch.valid[..., None].float()
    cells = inside.sum((1, 2, 3)).clamp_min(1)[:, None]
    log_probs = before.detach().float().log_softmax(-1)
    probs = log_probs.exp()
    colours = (probs * inside).sum((1, 2)) / cells
    entropy = -(probs * log_probs * inside).sum((1, 2, 3))[:, None] / cells
    scaled = batch.observation.views[:, 0]
    departs = ((before.argmax(-1) != scaled) & batch.valid).sum((1, 2))[:, None] / cells
    return torch.cat([prompt.detach(), colours, entropy, departs, batch.features], 1)

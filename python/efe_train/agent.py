"""The agent: prompter, planner and policy, and the way from a batch of queries to a plan for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efe_kernels import RefinedPrompt
from efe_train.data import Batch, Query
from efe_train.planner import Planner
from efe_train.policy import Policy, policy_state
from efe_train.qwen import Prompter


@dataclass(frozen=True)
class Plan:
    """What the agent makes of a batch.

    logits: [B, T, H, W, C], the plan with the refined prompt. before: [B, H, W, C], where the plan with the unrefined
    prompt ends. prompt: [B, D], the unrefined one. state: [B, S], what the policy saw. refined: what it did.
    Gradients reach prompter and planner through `logits`; `before` and `state` have no graph.
    """

    logits: Tensor
    before: Tensor
    prompt: Tensor
    state: Tensor
    refined: RefinedPrompt


class Agent(nn.Module):
    """Prompter, planner and policy on one device, computing under autocast in one dtype. Parameters stay float32."""

    def __init__(
        self, prompter: Prompter, planner: Planner, policy: Policy, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.prompter = prompter
        self.planner = planner
        self.policy = policy
        self.device = device
        self.dtype = dtype
        self.to(device)

    def prompt(self, queries: Sequence[Query]) -> Tensor:
        """Qwen's prompts [B, D], before the policy refines them."""
        with self.autocast():
            prompts: Tensor = self.prompter(queries)
        return prompts

    def plan(self, batch: Batch, seed: int | None, prompt: Tensor | None = None) -> Plan:
        """The plan of training and of evaluation alike.

        seed: of the policy's noise; without one the policy's mean refines. prompt: [B, D], where Qwen's prompts are at
        hand already; without it Qwen is asked.
        """
        # 1. Qwen's prompts.
        if prompt is None:
            prompt = self.prompt(batch.queries)

        # 2. What the planner would do with the unrefined prompt.
        with torch.no_grad(), self.autocast():
            before = self.planner(batch.views, batch.valid, prompt)[:, -1]

        # 3. The policy refines the prompt. A loss of the plan trains Qwen through the refined prompt, not the policy.
        state = policy_state(prompt, before, batch.views, batch.valid, batch.features)
        refined = self.policy.refine_prompt(prompt, state, seed)

        # 4. The plan with the refined prompt. Its logits keep the dtype that autocast gives them.
        with self.autocast():
            logits = self.planner(batch.views, batch.valid, refined.prompt)
        return Plan(logits, before, prompt, state, refined)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

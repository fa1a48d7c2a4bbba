"""The agent: prompter, planner and policy, and the way from a batch of queries to a plan for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efe_kernels import RefinedPrompt
from efe_train.config import PROMPT_DIM
from efe_train.data import Batch, Query, by_longer_side, collate
from efe_train.planner import Planner
from efe_train.policy import Policy, policy_state
from efe_train.qwen import Prompter, Prompts
from efe_train.tasks import Grid


@dataclass(frozen=True)
class Plan:
    """What the agent makes of a batch.

    logits: [B, T, H, W, C], the plan with the prompt `used` [B, D]: the refined one, in some rows perhaps the unrefined
    `prompt` [B, D]. before: [B, H, W, C], where the plan with the unrefined prompt ends. state: [B, S],
    what the policy saw. refined: what it did. Gradients reach prompter and planner through `logits`;
    `before` and `state` have no graph.
    """

    logits: Tensor
    used: Tensor
    before: Tensor
    prompt: Tensor
    state: Tensor
    refined: RefinedPrompt


class Agent(nn.Module):
    """Prompter, planner and policy on one device, computing under autocast in one dtype. What trains stays float32."""

    def __init__(
        self,
        prompter: Prompter,
        planner: Planner,
        policy: Policy,
        device: torch.device,
        dtype: torch.dtype,
        *,
        reads: bool = True,
        refines: bool = True,
    ) -> None:
        """reads: whether it has Qwen's prompts; without them every prompt is 0. refines: whether it plans with refined
        prompts.
        """
        super().__init__()
        self.prompter = prompter
        self.planner = planner
        self.policy = policy
        self.device = device
        self.dtype = dtype
        self.reads = reads
        self.refines = refines
        # For kernels that are compiled for each shape.
        self.few_shapes = device.type == "cuda"
        self.to(device)

    def ask(self, queries: Sequence[Query]) -> Prompts:
        """Qwen's prompts, before the policy refines them."""
        if not self.reads:
            return Prompts(torch.zeros(len(queries), PROMPT_DIM, device=self.device), None)
        with self.autocast():
            prompts: Prompts = self.prompter(queries)
        return prompts

    def plan(
        self,
        batch: Batch,
        noise: Tensor | None = None,
        prompt: Tensor | None = None,
        is_refined: Tensor | None = None,
    ) -> Plan:
        """The plan of training and of evaluation alike.

        noise: [B, D+1], standard normal, of the policy; without it the policy's mean refines. prompt: [B, D], where
        Qwen's prompts are at hand already; without it Qwen is asked. is_refined: [B] bool, the queries that are planned
        with the refined prompt; without it all are.
        """
        # 1. Qwen's prompts.
        if prompt is None:
            prompt = self.ask(batch.queries).prompt

        # 2. What the planner would do with the unrefined prompt.
        before = self.outcome(batch, prompt)

        # 3. The policy refines the prompt. A loss of the plan trains Qwen through the refined prompt, not the policy.
        state = policy_state(prompt, before, batch)
        refined = self.policy.refine_prompt(prompt, state, noise)
        if not self.refines:
            used = prompt
        elif is_refined is None:
            used = refined.prompt
        else:
            used = torch.where(is_refined[:, None], refined.prompt, prompt)

        # 4. The plan with that prompt. Its logits keep the dtype that autocast gives them.
        with self.autocast():
            logits = self.planner(batch.observation, used)
        return Plan(logits, used, before, prompt, state, refined)

    @torch.no_grad()
    def outcome(self, batch: Batch, prompt: Tensor) -> Tensor:
        """Where the plan with a prompt [B, D] ends, [B, H, W, C] without a graph."""
        with self.autocast():
            logits: Tensor = self.planner(batch.observation, prompt)
        return logits[:, -1]

    @torch.no_grad()
    def predict(self, queries: Sequence[Query], batch_size: int) -> list[Grid]:
        """The grid that each query's plan ends with, the policy's mean refining its prompt. In evaluation mode."""
        training = self.training
        self.eval()
        order = sorted(range(len(queries)), key=lambda index: by_longer_side(queries[index]))
        grids: dict[int, Grid] = {}
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            batch = collate([queries[index] for index in part], few_shapes=self.few_shapes).to(self.device)
            ends = self.plan(batch).logits[:, -1].argmax(-1).cpu().numpy()
            for index, end in zip(part, ends, strict=True):
                height, width = queries[index].size
                grids[index] = end[:height, :width]
        self.train(training)
        return [grids[index] for index in range(len(queries))]

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

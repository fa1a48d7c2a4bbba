"""What one training step does, from the prompts of a batch to the update of the policy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from efe_kernels import EFELoss
from efe_train.agent import Agent
from efe_train.config import TrainConfig, learning_rates
from efe_train.data import Batch
from efe_train.planner import Planner
from efe_train.policy import Policy, Rollout
from efe_train.qwen import PromptCache, Prompter

EFE_WEIGHT = 0.7

REWARD_WEIGHT = 0.3

POLICY_RATE = 0.1
"""Learning rate of the policy over that of the planner: a gradient estimated from one reward each is a noisy one."""


def epoch_weight(epoch: int) -> float:
    return 0.6 if epoch == 0 else 0.3


class Trainer:
    """Everything that a run changes, and the step that changes it."""

    def __init__(self, config: TrainConfig, prompter: Prompter, device: torch.device, dtype: torch.dtype) -> None:
        agent_lr, qwen_lr, _ = learning_rates(config)
        self.config = config
        self.device = device
        # The order in which first weights are drawn: in another one, a seed would give another run.
        planner, efe_loss, policy = Planner(), EFELoss(), Policy()
        self.agent = Agent(prompter, planner, policy, device, dtype).train()
        self.efe_loss = efe_loss.to(device)
        self.cache = PromptCache()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*planner.parameters(), *efe_loss.parameters()], "lr": agent_lr},
                {"params": [weight for weight in prompter.parameters() if weight.requires_grad], "lr": qwen_lr},
            ]
        )
        self.policy_optimizer = torch.optim.Adam(policy.parameters(), lr=POLICY_RATE * agent_lr)
        # Parameters stay float32; fp16 gradients need scaling, and with bf16 and fp32 the same calls do nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.batches_done = 0
        self.qwen_grad = torch.zeros((), device=device)

    def step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """One training step. Returns its metrics, 0-d tensors on the device: nothing here waits for it."""
        assert batch.target is not None
        agent, refresh = self.agent, self.refresh_is_due()

        # 1. Qwen's prompts: with gradient on a refresh, from the cache otherwise.
        prompt = self.cache.prompts(agent.prompt, batch.queries, refresh=refresh)

        # 2 to 4. The plan before and after the policy refines the prompts.
        plan = agent.plan(batch, self.noise_seed(), prompt)

        # 5. The loss, of logits in the dtype that they have. The reward shifts its value and has no gradient.
        weight = torch.full((), EFE_WEIGHT * epoch_weight(epoch), device=self.device)
        efe = self.efe_loss(plan.logits, batch.target, prompt=plan.refined.prompt, valid=batch.valid)
        reward = agent.policy.compute_reward(plan.before, plan.logits[:, -1], batch.target, batch.valid)
        loss = weight * efe.total - REWARD_WEIGHT * reward.mean()

        # 6. Backward and the step of planner, loss and Qwen.
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if refresh:
            self.qwen_grad = gradient_norm(agent.prompter.language_model)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        # 7. Then the policy, from the stored state and action: no graph is shared with the loss above.
        rollout = Rollout(plan.state, plan.refined.action.detach(), reward)
        policy = agent.policy.update(rollout, self.policy_optimizer)

        mask_ratio = efe.mask_ratio.mean()
        self.efe_loss.update_target_preference(batch.target, batch.valid, 1 - mask_ratio)
        self.batches_done += 1
        return {
            "loss": loss.detach(),
            "efe": efe.total.detach(),
            "mask_ratio": mask_ratio,
            "reward": reward.mean(),
            "qwen_grad": self.qwen_grad,
            "grad_norm": grad_norm,
            "prompt_norm": plan.prompt.detach().norm(),
            "policy_loss": policy.loss,
            "policy_grad_norm": policy.grad_norm,
        }

    def refresh_is_due(self) -> bool:
        return self.batches_done % self.config.prompt_refresh == 0

    def noise_seed(self) -> int:
        """Of the refinement's noise: a function of seed and batch, so that a resumed run draws the same."""
        return (self.config.seed << 32) + self.batches_done

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds the weights of, by name; evaluation takes those of the agent."""
        return {**dict(self.agent.named_children()), "efe_loss": self.efe_loss}

    def state_dict(self) -> dict[str, Any]:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "batches_done": self.batches_done,
            "modules": {name: module.state_dict() for name, module in self.modules().items()},
            "optimizer": self.optimizer.state_dict(),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "cache": self.cache.state_dict(),
            "qwen_grad": self.qwen_grad,
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches_done = state["batches_done"]
        for name, module in self.modules().items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.cache.load_state_dict(state["cache"], self.device)
        self.qwen_grad = state["qwen_grad"].to(self.device)
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        agent_lr, qwen_lr, _ = learning_rates(self.config)
        for optimizer, rates in (
            (self.optimizer, (agent_lr, qwen_lr)),
            (self.policy_optimizer, (POLICY_RATE * agent_lr,)),
        ):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def gradient_norm(module: nn.Module) -> Tensor:
    """L2 norm of the gradients of all parameters, without a look at the device's result."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).detach()

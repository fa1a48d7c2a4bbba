"""What one training step does, from the prompts of a batch to the update of the policy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efe_kernels import EFELoss, EFEWeights
from efe_train.agent import Agent, Plan
from efe_train.config import TrainConfig, learning_rates, term_weights
from efe_train.data import Batch
from efe_train.planner import GIST, Planner, Recall
from efe_train.policy import Policy, Rollout
from efe_train.qwen import PromptCache, Prompter

EFE_WEIGHT = 0.7

REWARD_WEIGHT = 0.3

POLICY_RATES = (0.2, 2.0)
"""Learning rates of the policy over the full one of the planner: while the planner moves, and in the closing phase.

What is learned of a planner that moves is soon out of date.
"""


def build_agent(config: TrainConfig, prompter: Prompter, device: torch.device, dtype: torch.dtype) -> Agent:
    # The order in which first weights are drawn: in another one, a seed would give another run.
    planner, policy = Planner(look_up=config.has("look_up")), Policy()
    has = {"reads": config.has("prompt"), "refines": config.has("refinement")}
    return Agent(prompter, planner, policy, device, dtype, **has)


def build_loss(config: TrainConfig, reduction: str = "mean") -> EFELoss:
    weights = EFEWeights(**{**term_weights(TrainConfig.efe_weights), **term_weights(config.efe_weights)})
    return EFELoss(weights=weights, hard_cell=config.has("hard_cell"), reduction=reduction)


def epoch_weight(epoch: int) -> float:
    return 0.6 if epoch == 0 else 0.3


def rate_factor(
    done: int, batches: int, schedule: str = TrainConfig.schedule, warmup: int = TrainConfig.warmup
) -> float:
    """What the rates of planner, loss and Qwen are multiplied by after `done` of `batches`; 0 after the last one.

    They rise over `warmup` batches: at the full rate, the first steps would spoil what the look-up says.
    """
    if done >= batches:
        return 0.0
    rising = min(1.0, (done + 1) / warmup) if warmup else 1.0
    return rising * (0.5 * (1 + math.cos(math.pi * done / batches)) if schedule == "cosine" else 1.0)


class Trials(NamedTuple):
    """What K refinements of each prompt come to. action: [K, B, D+1]. reward, lesson (what the policy learns from) and
    accuracy: [K, B].
    """

    action: Tensor
    reward: Tensor
    lesson: Tensor
    accuracy: Tensor


class Trainer:
    """Everything that a run changes, and the step that changes it."""

    def __init__(
        self,
        config: TrainConfig,
        prompter: Prompter,
        device: torch.device,
        dtype: torch.dtype,
        batches: int | None = None,
    ) -> None:
        """batches: of the whole run. Without it the rates stay as they are, and the planner learns on every batch."""
        agent_lr, qwen_lr, _ = learning_rates(config)
        self.config = config
        self.rates = agent_lr, qwen_lr
        self.device = device
        self.agent = build_agent(config, prompter, device, dtype).train()
        self.efe_loss = build_loss(config).to(device)
        self.planner_batches = None if batches is None else round(batches * (1 - config.policy_share))
        self.cache = PromptCache()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*self.agent.planner.parameters(), *self.efe_loss.parameters()], "lr": agent_lr},
                {"params": [weight for weight in prompter.parameters() if weight.requires_grad], "lr": qwen_lr},
            ]
        )
        self.policy_optimizer = torch.optim.Adam(self.agent.policy.parameters())
        # Parameters stay float32; fp16 gradients need scaling, and with bf16 and fp32 the same calls do nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        # What the demonstrations say by a fixed rule: what training has to improve on.
        self.untrained = Recall().to(device).requires_grad_(False)
        self.batches_done = 0
        self.qwen_grad = torch.zeros((), device=device)

    def step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """One training step. Returns its metrics, 0-d tensors on the device: nothing here waits for it."""
        assert batch.target is not None
        agent, refresh, rate = self.agent, self.refresh_is_due(), self.rate()
        self.set_rates(rate)

        # At rate 0, in the closing phase, only the policy learns: the prompter's running statistics stay as they are.
        agent.prompter.train(rate > 0)
        if self.batches_done == self.planner_batches:
            self.cache.clear()  # the policy meets prompts of the Qwen that the run ends with
        with torch.set_grad_enabled(rate > 0):
            # 1. Qwen's prompts: with gradient on a refresh, from the cache otherwise.
            prompt = self.cache.prompts(agent.prompt, batch.queries, refresh=refresh)

            # 2 to 4. The plan before and after the policy refines the prompts. Half of the queries are planned without:
            # a planner that never met an unrefined prompt would make refinement look good.
            rows = self.refined_rows(len(batch.queries))
            plan = agent.plan(batch, self.noise_seed(), prompt, rows)

            # 5. The loss, of logits in the dtype that they have. The reward shifts its value and has no gradient.
            weight = torch.full((), EFE_WEIGHT * epoch_weight(epoch), device=self.device)
            efe = self.efe_loss(plan.logits, batch.target, prompt=plan.used, valid=batch.valid)
            tried = self.try_refinements(plan, batch, rows)
            loss = weight * efe.total - REWARD_WEIGHT * tried.reward.mean()

        # 6. Backward and the step of planner, loss and Qwen.
        grad_norm = self.descend(loss, refresh) if rate > 0 else torch.zeros_like(self.qwen_grad)

        # 7. Then the policy, from the stored state and actions: no graph is shared with the loss above.
        policy = agent.policy.update(Rollout(plan.state[rows], tried.action, tried.lesson), self.policy_optimizer)

        mask_ratio = efe.mask_ratio.mean()
        by_rule = self.untrained(batch.observation, plan.prompt.new_zeros(len(plan.prompt), GIST))
        if rate > 0:
            self.efe_loss.update_target_preference(batch.target, batch.valid, 1 - mask_ratio)
        self.batches_done += 1
        return {
            "loss": loss.detach(),
            "efe": efe.total.detach(),
            "mask_ratio": mask_ratio,
            "reward": tried.reward.mean(),
            "acc_before": right(plan.before.argmax(-1), batch, rows).mean(),
            "acc_after": tried.accuracy.mean(),
            "acc_copying": right(batch.observation.views[:, 0], batch, rows).mean(),
            "acc_look_up": right(by_rule.argmax(1), batch, rows).mean(),
            "qwen_grad": self.qwen_grad,
            "grad_norm": grad_norm,
            "prompt_norm": plan.prompt.detach().norm(dim=1).mean(),
            "policy_loss": policy.loss,
            "policy_grad_norm": policy.grad_norm,
        }

    @torch.no_grad()
    def try_refinements(self, plan: Plan, batch: Batch, rows: slice) -> Trials:
        """What the refinements of some rows come to: the plan's own, and in the closing phase further samples."""
        assert batch.target is not None
        target, valid = batch.target[rows], batch.valid[rows]
        several = self.rate() == 0 and self.agent.refines
        trials = []
        for sample in range(self.config.policy_samples if several else 1):
            if sample == 0:
                action, after = plan.refined.action, plan.logits[:, -1]
            else:
                refined = self.agent.policy.refine_prompt(plan.prompt, plan.state, self.noise_seed(sample))
                action, after = refined.action, self.agent.outcome(batch, refined.prompt)
            given = plan.before[rows], after[rows], target, valid
            reward = Policy.compute_reward(*given)
            lesson = reward + Policy.expected_gain(*given)
            trials.append((action[rows], reward, lesson, right(after.argmax(-1), batch, rows)))
        return Trials(*map(torch.stack, zip(*trials, strict=True)))

    def descend(self, loss: Tensor, refresh: bool) -> Tensor:
        """One step of planner, loss and Qwen down the gradient. Returns its norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if refresh:
            # Without any gradient, as where the prompt is left out, the norm is a number on the CPU.
            self.qwen_grad = gradient_norm(self.agent.prompter.language_model).to(self.device)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return grad_norm

    def set_rates(self, rate: float) -> None:
        for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * full
        self.policy_optimizer.param_groups[0]["lr"] = POLICY_RATES[rate == 0] * self.rates[0]

    def rate(self) -> float:
        """What the rates of planner, loss and Qwen are multiplied by in this batch."""
        if self.planner_batches is None:
            return 1.0
        return rate_factor(self.batches_done, self.planner_batches, self.config.schedule, self.config.warmup)

    def refined_rows(self, queries: int) -> slice:
        """The queries that are planned with a refined prompt: every other one by turns; in the closing phase, and where
        the batch has but one, all.
        """
        return slice(self.batches_done % min(2, queries), None, 2) if self.rate() > 0 else slice(None)

    def refresh_is_due(self) -> bool:
        return self.batches_done % self.config.prompt_refresh == 0

    def noise_seed(self, sample: int = 0) -> int:
        """Of a refinement's noise: a function of seed, batch and sample, so that a resumed run draws the same."""
        return (self.config.seed << 32) + self.batches_done * self.config.policy_samples + sample

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds the weights of, by name."""
        return {**dict(self.agent.named_children()), "efe_loss": self.efe_loss}

    def state_dict(self) -> dict[str, Any]:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "batches_done": self.batches_done,
            "modules": {
                name: module.kept_state() if isinstance(module, Prompter) else module.state_dict()
                for name, module in self.modules().items()
            },
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
            load = module.load_kept_state if isinstance(module, Prompter) else module.load_state_dict
            load(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.cache.load_state_dict(state["cache"], self.device)
        self.qwen_grad = state["qwen_grad"].to(self.device)
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


def gradient_norm(module: nn.Module) -> Tensor:
    """L2 norm of the gradients of all parameters, without a look at the device's result."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).detach()


def right(grids: Tensor, batch: Batch, rows: slice) -> Tensor:
    """Share of their valid cells that some rows of grids [B, H, W] get right."""
    target, valid = batch.target, batch.valid[rows]
    assert target is not None
    return ((grids[rows] == target[rows]) & valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)

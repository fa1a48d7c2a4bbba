"""What one training step does, from the prompts of a batch to the update of the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efe_train.agent import Plan
from efe_train.build import build_agent, build_loss
from efe_train.config import TrainConfig, learning_rates
from efe_train.data import Part, Share
from efe_train.planner import GIST, Recall
from efe_train.policy import Policy, Rollout, standard_noise
from efe_train.processes import ALONE, Processes, gradient_norm
from efe_train.profile import part as timed
from efe_train.qwen import PromptCache, Prompter, Prompts
from efe_train.schedule import POLICY_RATES, epoch_weight, rate_factor
from efe_train.state import load_state, state_of

EFE_WEIGHT, REWARD_WEIGHT = 0.7, 0.3


class Rows(NamedTuple):
    """What the plans of queries and K refinements of their prompts come to, a row for each query; no graph.

    state: [B, S]. action: [B, K, D+1]. reward, lesson (what the policy learns from), accuracy: [B, K]. prompt: [B, D].
    target: [B, H, W], ignore_index in padding. The others, [B], are metrics.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    lesson: Tensor
    accuracy: Tensor
    prompt: Tensor
    target: Tensor
    efe: Tensor
    mask_ratio: Tensor
    acc_before: Tensor
    acc_copying: Tensor
    acc_look_up: Tensor


class Trainer:
    """Everything that a run changes, and the step that changes it."""

    def __init__(
        self,
        config: TrainConfig,
        prompter: Prompter,
        device: torch.device,
        dtype: torch.dtype,
        batches: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """batches: of the whole run. Without it the rates stay as they are, and the planner learns on every batch."""
        agent_lr, qwen_lr, _ = learning_rates(config)
        self.config = config
        self.rates = agent_lr, qwen_lr
        self.device = device
        self.processes = processes
        self.agent = build_agent(config, prompter, device, dtype).train()
        self.base = prompter.base_fingerprint()
        processes.shard(prompter, prompter.language_model)
        self.efe_loss = build_loss(config).to(device)
        if config.compile:
            self.agent.few_shapes = True
            for module in (self.agent.planner, self.efe_loss, prompter.language_model):
                module.compile()
        self.planner_batches = None if batches is None else round(batches * (1 - config.policy_share))
        self.cache = PromptCache(max(PromptCache.CAPACITY, config.batch_size))
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

    def step(self, share: Share, epoch: int) -> dict[str, Tensor]:
        """One training step. share: of this process, in its parts. Returns the metrics of the whole batch, 0-d tensors
        on the device: nothing here waits for it, except transformers on a refresh, to see whether a prompt is padded.
        """
        agent, total, rate = self.agent, len(share.queries), self.rate()
        refresh = self.refresh_is_due()
        self.set_rates(rate)
        # At rate 0, in the closing phase, only the policy learns: the prompter's running statistics stay as they are.
        agent.prompter.train(rate > 0)
        if self.batches_done == self.planner_batches:
            self.cache.clear()  # the policy meets prompts of the Qwen that the run ends with

        # 1 to 6. Prompts, plans and the gradients of the loss, one part of the share after another.
        self.optimizer.zero_grad(set_to_none=True)
        weight = EFE_WEIGHT * epoch_weight(epoch)
        hidden = None if refresh else self.complete_cache(share)
        found, asked = zip(*(self.work_through(part, total, weight, refresh) for part in share.parts), strict=True)
        rows = Rows(*(self.whole(each, total) for each in zip(*found, strict=True)))
        if refresh:
            self.cache.store(share.queries, rows.prompt)
            hidden = self.whole(asked, total) if agent.reads else None
        grad_norm = self.descend(refresh) if rate > 0 else torch.zeros_like(self.qwen_grad)

        # 7. Then the policy, from the stored state and actions: no graph is shared with the loss above. Every process
        # takes the same step, from the rows of all of them.
        refined = self.refined_rows(total)
        rollout = Rollout(rows.state[refined], rows.action[refined], rows.lesson[refined])
        with timed("policy"):
            policy = agent.policy.update(rollout, self.policy_optimizer, self.processes)

        if rate > 0:
            self.efe_loss.update_target_preference(rows.target, None, 1 - rows.mask_ratio.mean(), synchronize=False)
            if hidden is not None:
                agent.prompter.observe(hidden)
        agent.policy.standardise.observe(rows.state)
        self.batches_done += 1
        reward = rows.reward[refined].mean()
        return {
            # The reward shifts the value of the loss and has no gradient.
            "loss": weight * rows.efe.mean() - REWARD_WEIGHT * reward,
            "efe": rows.efe.mean(),
            "mask_ratio": rows.mask_ratio.mean(),
            "reward": reward,
            "acc_before": rows.acc_before[refined].mean(),
            "acc_after": rows.accuracy[refined].mean(),
            "acc_copying": rows.acc_copying[refined].mean(),
            "acc_look_up": rows.acc_look_up[refined].mean(),
            "qwen_grad": self.qwen_grad,
            "grad_norm": grad_norm,
            "prompt_norm": rows.prompt.norm(dim=1).mean(),
            "policy_loss": policy.loss,
            "policy_grad_norm": policy.grad_norm,
        }

    def work_through(self, part: Part, total: int, weight: float, refresh: bool) -> tuple[Rows, Tensor | None]:
        """Plan a part of a batch of `total` queries and add the gradients of its loss.

        Returns its rows, and on a refresh the hidden states of its prompts.
        """
        batch, learns = part.batch, self.rate() > 0
        assert batch.target is not None
        with torch.set_grad_enabled(learns):
            # 1. Qwen's prompts: with gradient on a refresh, from the cache otherwise.
            with timed("prompts"):
                asked = self.agent.ask(batch.queries) if refresh else Prompts(self.cache.read(batch.queries), None)

            # 2 to 4. The plan before and after the policy refines the prompts. Half of the queries are planned without:
            # a planner that never met an unrefined prompt would make refinement look good.
            refined = self.refined_rows(total)
            is_refined = (part.rows - refined.start) % refined.step == 0
            with timed("plan"):
                plan = self.agent.plan(batch, self.noise(total)[part.rows], asked.prompt, is_refined)

            # 5. The loss, of logits in the dtype that they have.
            with timed("loss"):
                efe = self.efe_loss(plan.logits, batch.target, prompt=plan.used, valid=batch.valid)

        # 6. Backward: the gradients of parts add up, those of processes are averaged, both to the mean of the batch.
        if learns:
            counted = (efe.total * part.weight).sum() * (self.processes.count / total)
            with timed("backward"):
                self.scaler.scale(weight * counted).backward()
        by_rule = self.untrained(batch.observation, plan.prompt.new_zeros(len(plan.prompt), GIST))
        action, reward, lesson, accuracy = self.try_refinements(plan, part, total)
        rows = Rows(
            state=plan.state,
            action=action,
            reward=reward,
            lesson=lesson,
            accuracy=accuracy,
            prompt=plan.prompt.detach(),
            target=batch.target.masked_fill(~batch.valid, self.efe_loss.ignore_index),
            efe=efe.total.detach(),
            mask_ratio=efe.mask_ratio,
            acc_before=batch.right(plan.before.argmax(-1)),
            acc_copying=batch.right(batch.observation.views[:, 0]),
            acc_look_up=batch.right(by_rule.argmax(1)),
        )
        return rows, asked.hidden

    @torch.no_grad()
    def meet(self, share: Share) -> None:
        """Take the statistics of the first batch of a run before it is trained on: there are none yet."""
        total = len(share.queries)
        hidden = [self.agent.ask(part.batch.queries).hidden for part in share.parts]
        if self.agent.reads:
            self.agent.prompter.observe(self.whole(hidden, total))
        states = [self.agent.plan(part.batch).state for part in share.parts]
        self.agent.policy.standardise.observe(self.whole(states, total))

    @timed("prompts")
    @torch.no_grad()
    def complete_cache(self, share: Share) -> Tensor | None:
        """Compute the prompts that the cache lacks, each in one process. Returns their hidden states."""
        missing = self.cache.missing(share.queries)
        if not missing:
            return None
        own = [missing[place % len(missing)] for place in self.processes.positions(len(missing))]
        at_once = math.ceil(len(own) / len(share.parts))
        asked = [self.agent.ask(own[first : first + at_once]) for first in range(0, len(own), at_once)]
        self.cache.store(missing, self.whole([each.prompt for each in asked], len(missing)))
        return self.whole([each.hidden for each in asked], len(missing)) if self.agent.reads else None

    @timed("refinements")
    @torch.no_grad()
    def try_refinements(self, plan: Plan, part: Part, total: int) -> tuple[Tensor, ...]:
        """What the refinements of a part come to: the plan's own, and in the closing phase further samples.

        Returns action [B, K, D+1], reward, lesson and accuracy [B, K].
        """
        batch = part.batch
        assert batch.target is not None
        several = self.rate() == 0 and self.agent.refines
        trials = []
        for sample in range(self.config.policy_samples if several else 1):
            if sample == 0:
                action, after = plan.refined.action, plan.logits[:, -1]
            else:
                noise = self.noise(total, sample)[part.rows]
                refined = self.agent.policy.refine_prompt(plan.prompt, plan.state, noise)
                action, after = refined.action, self.agent.outcome(batch, refined.prompt)
            given = plan.before, after, batch.target, batch.valid
            reward = Policy.compute_reward(*given)
            lesson = reward + Policy.expected_gain(*given)
            trials.append((action, reward, lesson, batch.right(after.argmax(-1))))
        return tuple(torch.stack(each, dim=1) for each in zip(*trials, strict=True))

    def whole(self, parts: Sequence[Tensor | None], total: int) -> Tensor:
        """The rows of all parts and processes, in the order of the batch."""
        return self.processes.whole(torch.cat([part for part in parts if part is not None]), total)

    @timed("optimizer")
    def descend(self, refresh: bool) -> Tensor:
        """One step of planner, loss and Qwen down the gradient. Returns its norm before clipping."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        self.processes.average_gradients(parameter for group in groups for parameter in group)
        self.scaler.unscale_(self.optimizer)
        if refresh:
            self.qwen_grad = gradient_norm(self.agent.prompter.language_model.parameters(), self.device)
        # Sharded parameters go by themselves: their norm is not a number of one device.
        grad_norm = torch.stack([gradient_norm(group, self.device) for group in groups]).norm()
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, self.config.max_grad_norm or math.inf, grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return grad_norm

    def set_rates(self, rate: float) -> None:
        for group, full_rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * full_rate
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
        return slice(self.batches_done % min(2, queries), None, 2) if self.rate() > 0 else slice(0, None, 1)

    def refresh_is_due(self) -> bool:
        return self.batches_done % self.config.prompt_refresh == 0

    def noise(self, total: int, sample: int = 0) -> Tensor:
        """Of the refinements of a whole batch, [total, D+1]: a function of seed, batch and sample. So a resumed run
        draws the same, and so do several processes, each of which uses its rows.
        """
        seed = (self.config.seed << 32) + self.batches_done * self.config.policy_samples + sample
        return standard_noise(seed, total, self.device)

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds the weights of, by name."""
        return {**dict(self.agent.named_children()), "efe_loss": self.efe_loss}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"agent": self.optimizer, "policy": self.policy_optimizer}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, on the host of the first process; every process has to ask for it."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a checkpoint, on the host; the run may have had another number of processes."""
        load_state(self, state)

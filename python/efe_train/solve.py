"""What the agent makes of a task: planners see each test input in eight orientations and vote for two attempts.

The demonstrations and the test input are all that is seen; the answer is passed on in the task and never looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call

from efe_kernels import EFELoss
from efe_train.adapt import Lesson, Weights, adapt
from efe_train.agent import Agent
from efe_train.augment import Augmentation
from efe_train.data import Observation, Query, collate, evaluation_queries, training_examples
from efe_train.planner import GIST, Planner, Recall
from efe_train.scores import Attempts, Solution, copying
from efe_train.tasks import Grid, Task
from efe_train.views import ORIENTATIONS

ADAPTED, AGENT, UNREFINED, LOOK_UP = "agent, adapted", "agent", "agent without refinement", "look-up"
"""The predictors whose attempts are kept with the solutions."""

TURNED = [Augmentation.turned(orientation) for orientation in range(ORIENTATIONS)]

Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Solver:
    """Solves tasks with an agent.

    efe_loss: the run's, with reduction "none". steps: how many each task's planner is adapted for. evaluation: what the
    solutions are marked with.
    """

    agent: Agent
    efe_loss: EFELoss
    steps: int
    evaluation: str

    def solve(self, tasks: Sequence[Task]) -> list[list[Solution]]:
        """The solutions of each task's test inputs. The tasks are adapted to in one batch and do not mix otherwise."""
        lessons = {task.id: self.lesson(task) for task in tasks if self.steps and len(task.demonstrations) > 1}
        weights = adapt(self.agent, self.efe_loss, [*lessons.values()], self.steps) if lessons else []
        adapted = dict(zip(lessons, weights, strict=True))
        return [self.solutions(task, adapted.get(task.id, {})) for task in tasks]

    def lesson(self, task: Task) -> Lesson:
        examples = training_examples([task])
        return Lesson(examples, self.prompts([example.query for example in examples])[0])

    @torch.no_grad()
    def prompts(self, queries: Sequence[Query]) -> tuple[Tensor, Tensor]:
        """The prompts [B, D] that the agent plans with, and those before refinement."""
        # Without a seed the policy's mean refines, where training draws samples to learn from.
        plan = self.agent.plan(collate(queries).to(self.agent.device))
        return plan.used, plan.prompt

    def solutions(self, task: Task, weights: Weights) -> list[Solution]:
        """weights: of the planner adapted to the task; none where it was not adapted."""
        queries = evaluation_queries(task)
        prompts = zip(*self.prompts(queries), strict=True) if queries else []
        return [
            self.solution(task, number, query, weights, *pair)
            for number, (query, pair) in enumerate(zip(queries, prompts, strict=True))
        ]

    def solution(
        self, task: Task, number: int, query: Query, weights: Weights, refined: Tensor, unrefined: Tensor
    ) -> Solution:
        planner = self.agent.planner
        seen = collate([query] * ORIENTATIONS, None, TURNED).to(self.agent.device).observation
        agent = self.drafts(planner, {}, query, seen, refined)
        adapted = self.drafts(planner, weights, query, seen, refined) if weights else agent
        bare = self.drafts(planner, {}, query, seen, unrefined)
        looked_up, guesses = votes(self.look_up(query, seen)), copying(query)
        made = {
            ADAPTED: attempts(votes(adapted, ends=2 if weights else 1), votes(agent), looked_up, otherwise=guesses),
            AGENT: attempts(votes(agent), looked_up, otherwise=guesses),
            UNREFINED: attempts(votes(bare), looked_up, otherwise=guesses),
            LOOK_UP: attempts(looked_up, otherwise=guesses),
        }
        if not self.steps:
            del made[ADAPTED]
        plan = tuple(draft.argmax(0) for draft in adapted[0, :-1])
        first, *others = made
        return Solution(task, number, plan, made[first], {name: made[name] for name in others}, self.evaluation)

    @cached_property
    def rule(self) -> Recall:
        return Recall().to(self.agent.device)

    @torch.no_grad()
    def look_up(self, query: Query, seen: Observation) -> Probabilities:
        """What the demonstrations say by a fixed rule, as the drafts of a plan that does not move."""
        if not self.agent.planner.look_up:
            seen = seen.without_look_up()
        found = self.rule(seen, torch.zeros(ORIENTATIONS, GIST, device=self.agent.device))
        return turned_back(found[:, None].expand(-1, 2, -1, -1, -1), query)

    @torch.no_grad()
    def drafts(
        self, planner: Planner, weights: Weights, query: Query, seen: Observation, prompt: Tensor
    ) -> Probabilities:
        """What a query's plan, and one step more, comes to in each orientation, [8, T+1, C, H, W], turned back.

        weights: of the planner, where they are not its own. seen: of the query in each orientation.
        """
        given = seen, prompt.expand(ORIENTATIONS, -1), planner.num_steps + 1
        with self.agent.autocast():
            logits = functional_call(planner, weights, given)
        return turned_back(logits.float().softmax(-1).movedim(-1, 2), query)


def turned_back(drafts: Tensor, query: Query) -> Probabilities:
    """Drafts [8, T, C, H, W] of a query in each orientation, all in the query's own."""
    sizes = [change.size(query.size) for change in TURNED]
    return np.stack(
        [
            np.stack([change.restored(draft[:, :height, :width]) for draft in plan])
            for change, plan, (height, width) in zip(TURNED, drafts.cpu().numpy(), sizes, strict=True)
        ]
    )


def votes(drafts: Probabilities, ends: int = 1) -> list[Grid]:
    """The grids that a plan ends with in each orientation; before them that of the plan's mean probabilities, which
    decides between grids with equal votes.

    drafts: [8, T+1, C, H, W]. ends: 2 where the plan of one step more votes as well, which only adaptation trains.
    """
    voting = drafts[:, -2 : ends - 2 or None]
    return [voting[:, 0].mean(0).argmax(0), *(grid for grids in voting.argmax(2) for grid in grids)]


def attempts(*panels: Sequence[Grid], otherwise: Sequence[Grid]) -> Attempts:
    """The two grids to hand in: the favourite of each panel in turn, then what came second, and so on, then the others.

    Another predictor's favourite is right more often than what a predictor itself puts second. Where nothing says
    anything else, one grid is both attempts.
    """
    places = zip_longest(*map(by_votes, panels))
    in_turn = [grid for place in places for grid in place if grid is not None]
    first, *others = {grid.tobytes(): grid for grid in (*in_turn, *otherwise)}.values()
    return first, others[0] if others else first


def by_votes(panel: Sequence[Grid]) -> list[Grid]:
    """Each grid of a panel once, those with most votes first."""
    counts = Counter(grid.tobytes() for grid in panel)
    return [next(grid for grid in panel if grid.tobytes() == key) for key, _ in counts.most_common()]

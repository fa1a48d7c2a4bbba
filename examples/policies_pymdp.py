"""Expected free energy of policies in a small POMDP with `efe_loss`, beside the numbers of pymdp 0.0.7.

A maze has a start, a cue and two arms. One arm holds the reward, which one is hidden; the cue tells it with 90 %. A
policy is two moves, each to any of the four places, so there are sixteen. Place and reward are seen as one of seven
outcomes, one modality.

    python examples/policies_pymdp.py             # pip install inferactively-pymdp==0.0.7.1
    python examples/policies_pymdp.py --steps 1   # policies of one move

Per policy, in nats, summed over its steps, Q being what it predicts:

    risk             KL(Q(o) || C)          >= 0, minimised       risk term of efe_loss
    ambiguity        E_Q(s) H(P(o | s))     >= 0, minimised       ambiguity term of efe_loss, states as episodes
    utility          E_Q(o) log C           <= 0, maximised       pymdp's calc_expected_utility
    information gain H(Q(o)) - ambiguity    >= 0, maximised       pymdp's calc_states_info_gain

    utility + information gain = -(risk + ambiguity) = -G

The ambiguity term of `efe_loss` is the entropy of one distribution in each cell: that of `observation_probs`, or of the
plan itself, H(Q(o)), where they are not given. So the likelihood's entropies are computed with a state in place of an
episode, and their expectation is taken here, with the beliefs as weights.

It prints risk, ambiguity, G and pymdp's -(utility + information gain) of each policy, and the share of probability that
each gets, softmax(-16 G). G is positive here and smaller is better; what pymdp calls G is -G.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from pymdp import control
from pymdp.utils import to_obj_array
from torch import Tensor

from efe_kernels import EFEWeights, efe_loss

PLACES = ("start", "cue", "left", "right")
OUTCOMES = ("start", "cue says left", "cue says right", "left: reward", "left: none", "right: reward", "right: none")
LOG_PREFERENCE = np.array([0.0, 0.0, 0.0, 3.0, -3.0, 3.0, -3.0])
PRECISION = 16.0  # pymdp's default gamma


class Result(NamedTuple):
    """[P] each, one entry per policy, float64; the policies are [P, T] places."""

    policies: Tensor
    risk: Tensor
    ambiguity: Tensor
    entropy: Tensor  # H(Q(o)), summed over the steps
    probability: Tensor
    utility: Tensor  # pymdp's, as the next two
    information_gain: Tensor
    pymdp_probability: Tensor


def likelihood() -> np.ndarray:
    """P(outcome | side of the reward, place), [7, 2, 4]."""
    found = np.zeros((len(OUTCOMES), 2, len(PLACES)))
    found[0, :, 0] = 1
    found[1:3, :, 1] = [[0.9, 0.1], [0.1, 0.9]]
    found[3:5, :, 2] = [[0.95, 0.05], [0.05, 0.95]]
    found[5:7, :, 3] = [[0.05, 0.95], [0.95, 0.05]]
    return found


def expected_free_energy(beliefs: Tensor, columns: Tensor, log_preference: Tensor) -> tuple[Tensor, ...]:
    """Risk, ambiguity and entropy of the outcomes, [P] each and differentiable.

    beliefs: [P, T, S] over states. columns: [S, 7], the outcome's probabilities in each state. log_preference: [7].
    """
    outcomes = columns.shape[1]
    # A grid of one cell: a plan is an episode, a move is a step. Probability 0 is a logit of -inf.
    predicted = (beliefs @ columns).log()[:, :, None, None]
    preference = log_preference.view(1, 1, outcomes)
    alone = EFEWeights(risk=1, ambiguity=0, consistency=0, agreement=0, anchor=0, prompt=0, step=0)

    def terms(logits: Tensor, **more: Tensor) -> dict[str, Tensor]:
        unread = torch.zeros(len(logits), 1, 1, dtype=torch.long)  # a target, which neither term reads
        return efe_loss(logits, unread, preference, weights=alone, hard_cell=False, **more).terms

    plan = terms(predicted)
    states = columns[:, None, None, None]  # [S, 1, 1, 1, 7]
    entropies = terms(torch.zeros_like(states), observation_probs=states)["ambiguity"]  # H(P(o | s)), [S]
    # The terms of a plan are means over its steps; a policy's G is a sum.
    return beliefs.shape[1] * plan["risk"], (beliefs @ entropies).sum(1), beliefs.shape[1] * plan["ambiguity"]


def main(arguments: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="moves of a policy")
    settings = parser.parse_args(arguments)

    # pymdp: a factor of hidden states each for the side of the reward, which stays, and the place, which is chosen.
    A, C = to_obj_array(likelihood()), to_obj_array(LOG_PREFERENCE)
    B = np.empty(2, dtype=object)
    B[0], B[1] = np.eye(2)[:, :, None], np.zeros((4, 4, 4))
    B[1][np.arange(4), :, np.arange(4)] = 1  # move u leads to place u
    start = np.empty(2, dtype=object)
    start[:] = [np.array([0.5, 0.5]), np.eye(4)[0]]
    policies = control.construct_policies([2, 4], [1, 4], policy_len=settings.steps)
    states = [control.get_expected_states(start, B, policy) for policy in policies]
    utility = [control.calc_expected_utility(control.get_expected_obs(path, A), C) for path in states]
    gain = [control.calc_states_info_gain(A, path) for path in states]
    pymdp_probability, _ = control.update_posterior_policies(start, A, B, C, policies, gamma=PRECISION)

    # The same from beliefs over the eight joint states.
    beliefs = torch.tensor(np.array([[np.outer(*step).ravel() for step in path] for path in states]))
    columns = torch.from_numpy(likelihood().reshape(7, 8).T.copy())
    risk, ambiguity, entropy = expected_free_energy(beliefs, columns, torch.from_numpy(LOG_PREFERENCE))
    probability = torch.softmax(-PRECISION * (risk + ambiguity), 0)

    places = torch.tensor(np.array(policies))[..., 1]
    theirs = (torch.tensor(np.array(values, dtype=float)) for values in (utility, gain, pymdp_probability))
    result = Result(places, risk, ambiguity, entropy, probability, *theirs)
    print(f"{'policy':<14}{'risk':>8}{'ambiguity':>11}{'G':>8}{'pymdp':>8}{'share':>8}{'pymdp':>8}")
    for policy, *numbers in zip(*result, strict=True):
        a, b, _, share, gained, informed, their_share = map(float, numbers)
        name = " ".join(PLACES[place] for place in policy)
        print(f"{name:<14}{a:8.4f}{b:11.4f}{a + b:8.4f}{-gained - informed:8.4f}{share:8.4f}{their_share:8.4f}")
    return result


if __name__ == "__main__":
    main()

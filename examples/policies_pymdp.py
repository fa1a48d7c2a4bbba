"""Expected free energy of policies in a small POMDP with `policy_efe`, and beside it that of pymdp 0.0.7.

A maze has a start, a cue and two arms. One arm holds the reward, which one is hidden; the cue tells it with 90 %. A
policy is two moves, each to any of the four places, so there are sixteen. Place and reward are seen as one of seven
outcomes, one modality.

    python examples/policies_pymdp.py             # pip install inferactively-pymdp==0.0.7.1 adds the last two columns
    python examples/policies_pymdp.py --steps 1   # policies of one move

Per policy, in nats, summed over its moves, Q being what it predicts:

    risk              KL(Q(o) || C)         >= 0, minimised
    ambiguity         E_Q(s) H(P(o | s))    >= 0, minimised
    utility           E_Q(o) log C          <= 0, maximised
    information gain  H(Q(o)) - ambiguity   >= 0, maximised

    efe = risk + ambiguity = -(utility + information gain), which pymdp calls -G

It prints them for each policy, and the share of probability that the policy gets, softmax(-16 efe).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from efe_kernels import PolicyEFE, policy_efe, rollout_states

try:
    from pymdp import control
    from pymdp.utils import to_obj_array
except ImportError:
    control = None

PLACES = ("start", "cue", "left", "right")
OUTCOMES = ("start", "cue says left", "cue says right", "left: reward", "left: none", "right: reward", "right: none")
PREFERENCE = torch.tensor([0.0, 0.0, 0.0, 3.0, -3.0, 3.0, -3.0], dtype=torch.float64)  # logits
PRECISION = 16.0  # pymdp's default gamma


class Result(NamedTuple):
    """[P] each, one entry per policy, float64; the policies are [P, T] places."""

    policies: Tensor
    found: PolicyEFE
    share: Tensor
    pymdp: tuple[Tensor, Tensor, Tensor] | None  # utility, information gain, share


def likelihood() -> Tensor:
    """P(outcome | side of the reward, place), [7, 2, 4]."""
    found = torch.zeros(len(OUTCOMES), 2, len(PLACES), dtype=torch.float64)
    found[0, :, 0] = 1
    found[1:3, :, 1] = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    found[3:5, :, 2] = torch.tensor([[0.95, 0.05], [0.05, 0.95]])
    found[5:7, :, 3] = torch.tensor([[0.05, 0.95], [0.95, 0.05]])
    return found


def moves() -> Tensor:
    """P(place | place before, move), [4, 4, 4]: move u leads to place u."""
    return torch.eye(4, dtype=torch.float64)[:, None].expand(4, 4, 4)


def by_pymdp(policies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Utility, information gain and share, from the two factors of the state: the side, which stays, and the place."""
    A, C = to_obj_array(likelihood().numpy()), to_obj_array(PREFERENCE.numpy())
    B, start = np.empty(2, dtype=object), np.empty(2, dtype=object)
    B[:] = [np.eye(2)[:, :, None], moves().numpy()]
    start[:] = [np.array([0.5, 0.5]), np.eye(4)[0]]
    theirs = [np.stack([np.zeros_like(policy), policy], 1) for policy in policies.numpy()]
    paths = [control.get_expected_states(start, B, policy) for policy in theirs]
    utility = [float(control.calc_expected_utility(control.get_expected_obs(path, A), C)) for path in paths]
    gain = [float(control.calc_states_info_gain(A, path)) for path in paths]
    share, _ = control.update_posterior_policies(start, A, B, C, theirs, gamma=PRECISION)
    return torch.tensor(utility).double(), torch.tensor(gain).double(), torch.tensor(share.astype(float))


def main(arguments: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="moves of a policy")
    settings = parser.parse_args(arguments)

    policies = torch.cartesian_prod(*[torch.arange(4)] * settings.steps).view(-1, settings.steps)
    # The state is side and place together, eight in all.
    initial = torch.kron(torch.tensor([0.5, 0.5]), torch.eye(4)[0]).double()
    transition = torch.stack([torch.kron(torch.eye(2), move) for move in moves().unbind(-1)], -1)
    states = rollout_states(initial, transition, policies)  # [P, T, 8]
    found = policy_efe(states, likelihood().flatten(1), PREFERENCE)
    share = torch.softmax(-PRECISION * found.efe, 0)
    pymdp = None if control is None else by_pymdp(policies)

    titles = ("efe", "risk", "ambiguity", "gain", "utility", "share")
    print(f"{'policy':<14}" + "".join(f"{title:>10}" for title in titles) + ("" if pymdp is None else "     by pymdp"))
    for index, policy in enumerate(policies):
        row = [*(part[index] for part in found), share[index]]
        if pymdp is not None:
            utility, gain, their_share = pymdp
            row += [-(utility + gain)[index], their_share[index]]
        print(
            f"{' '.join(PLACES[place] for place in policy):<14}" + "".join(f"{float(number):10.4f}" for number in row)
        )
    return Result(policies, found, share, pymdp)


if __name__ == "__main__":
    main()

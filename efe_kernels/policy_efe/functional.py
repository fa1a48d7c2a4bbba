"""The public functions of discrete policies in a world that is partly observed, in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from efe_kernels.common import checks
from efe_kernels.common.arguments import promoted, without_autocast


class PolicyEFE(NamedTuple):
    """What `policy_efe` returns, [..., P] each, in nats, summed over the T steps.

    efe: risk + ambiguity, which is -(utility + information_gain). Smaller is better.
    risk: KL(observations || preference), at least 0: how far what will be observed is from what is preferred.
    ambiguity: entropy of the observations where the state is known, at least 0.
    information_gain: mutual information of state and observations, at least 0: the entropy of the observations less
        the ambiguity, what observing will tell about the state. Larger is better.
    utility: expected log-probability of the observations under the preference, at most 0. Larger is better.
    """

    efe: Tensor
    risk: Tensor
    ambiguity: Tensor
    information_gain: Tensor
    utility: Tensor


def rollout_states(initial: Tensor, transition: Tensor, policies: Tensor) -> Tensor:
    """Probabilities of the states that each policy leads to, step by step.

    Args:
        initial: [..., S], probabilities of the present state, float32, float16, bfloat16 or float64.
        transition: [S, S, A], transition[i, j, a] is the probability of state i after action a in state j.
        policies: [P, T] integers, the action of each policy at each step, in [0, A).

    Several state factors are one, S the product of their sizes; several control factors likewise.

    Returns:
        [..., P, T, S], after the first action, the second, ..., in the dtype to which initial and transition promote.
        Differentiable in both.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device.
        IndexError: on the CPU, for an action outside [0, A); on CUDA that is a device-side assertion.
    """
    checks.check_floating("initial", initial)
    if initial.dim() == 0:
        raise ValueError("initial must have the shape [..., S], it was [].")
    sizes = checks.Sizes("transition", transition, "S S A", S=initial.shape[-1])
    checks.check_floating("transition", transition)
    checks.check_device("initial", initial, "transition", transition.device)
    sizes.check("policies", policies, "P T")
    actions = checks.integer_tensor("policies", policies).long()
    initial, transition = promoted(initial, transition)
    states = initial[..., None, :].expand(*initial.shape[:-1], len(actions), -1)
    reached = []
    with without_autocast(states):
        for step in range(actions.shape[1]):
            taken = transition[:, :, actions[:, step]]  # [S, S, P]
            states = torch.einsum("ijp,...pj->...pi", taken, states)
            reached.append(states)
    return torch.stack(reached, -2) if reached else states[..., None, :].narrow(-2, 0, 0).clone()


def policy_efe(
    state_probs: Tensor, likelihood: Tensor | Sequence[Tensor], preference_logits: Tensor | Sequence[Tensor]
) -> PolicyEFE:
    """Expected free energy of policies, and its parts, from the states that they lead to.

    With q(s) the states of a step, q(o) = Σ_s p(o|s) q(s) and the preference p̃(o) = softmax(preference_logits):

        efe = Σ_t KL(q(o) || p̃(o)) + E_q(s) H[p(o|s)] = -Σ_t E_q(o)[log p̃(o)] + H[q(o)] - E_q(s) H[p(o|s)]

    Several modalities are observed together, independent of each other given the state: o is all of them, so that the
    information gain is that of their joint distribution, and the preference is the product of theirs.

    Args:
        state_probs: [..., P, T, S], probabilities of the states at each step of each policy, as `rollout_states` gives
            them; float32, float16, bfloat16 or float64.
        likelihood: [O, S], the probability of each outcome in each state, or a sequence of these, one per modality.
        preference_logits: [O], or [T, O] for a preference per step; with several modalities a sequence of as many.
            -inf forbids an outcome: utility -inf and risk inf where it has a probability.

    The joint distribution of M modalities has O_1·...·O_M outcomes, and as much memory per state of each step is used.

    Returns:
        PolicyEFE, float32, or float64 where any argument is. A probability of 0 adds 0 to an entropy, and its gradient
        is finite. Differentiable in every argument.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device, or another number of likelihoods than of preferences.

    Source: Friston et al., 2015, "Active inference and epistemic value". The numbers are those of pymdp (Heins et al.,
    2022), whose G is the efe here with the opposite sign.
    """
    likelihoods, preferences = modalities_of(state_probs, likelihood, preference_logits)
    # Together with a float32 number, every floating dtype promotes to that of the arithmetic.
    number = torch.empty(0, device=state_probs.device)
    _, state_probs, *tensors = promoted(number, state_probs, *likelihoods, *preferences)
    likelihoods, preferences = tensors[: len(likelihoods)], tensors[len(likelihoods) :]
    with without_autocast(state_probs):
        return efe_of_states(state_probs, likelihoods, preferences)


def efe_of_states(state_probs: Tensor, likelihoods: Sequence[Tensor], preferences: Sequence[Tensor]) -> PolicyEFE:
    """policy_efe of tensors of one dtype, whose matrix products are not to be autocast."""
    joint = joint_likelihood(likelihoods)  # [O_1 ··· O_M, S]
    ambiguity = (state_probs @ entropy(joint, 0)).sum(-1)
    of_observed = entropy(state_probs @ joint.mT, -1).sum(-1)
    utilities = [expected(state_probs @ one.mT, wish) for one, wish in zip(likelihoods, preferences, strict=True)]
    utility = functools.reduce(torch.add, utilities)
    risk, information_gain = -utility - of_observed, of_observed - ambiguity
    return PolicyEFE(risk + ambiguity, risk, ambiguity, information_gain, utility)


def modalities_of(
    state_probs: Tensor, likelihood: Tensor | Sequence[Tensor], preference_logits: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The likelihoods and the preferences, one of each per modality, checked."""
    checks.check_floating("state_probs", state_probs)
    if state_probs.dim() < 3:
        raise ValueError(f"state_probs must have the shape [..., P, T, S], it was {list(state_probs.shape)}.")
    likelihoods, preferences = listed("likelihood", likelihood), listed("preference_logits", preference_logits)
    if len(likelihoods) != len(preferences) or not likelihoods:
        raise ValueError(
            "likelihood and preference_logits must be one tensor each or as many of one as of the other, they were "
            f"{len(likelihoods)} and {len(preferences)}."
        )
    steps, states = state_probs.shape[-2:]
    for index, (one, wish) in enumerate(zip(likelihoods, preferences, strict=True)):
        named, wished = f"likelihood[{index}]", f"preference_logits[{index}]"
        checks.check_floating(named, one)
        checks.check_floating(wished, wish)
        sizes = checks.Sizes(named, one, "O S", S=states, T=steps)
        sizes.check(wished, wish, "T O" if wish.dim() == 2 else "O")
        checks.check_device(named, one, "state_probs", state_probs.device)
    return likelihoods, preferences


def listed(name: str, tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One tensor as a list of it."""
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Sequence):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, it was {type(tensors).__name__}.")
    return list(tensors)


def joint_likelihood(likelihoods: Sequence[Tensor]) -> Tensor:
    """[O_1 ··· O_M, S] of likelihoods [O_m, S] that are independent given the state."""
    joint = likelihoods[0]
    for one in likelihoods[1:]:
        joint = (joint[:, None] * one).flatten(0, 1)
    return joint


def entropy(probabilities: Tensor, dim: int) -> Tensor:
    """In nats. The logarithm of 0 is that of the smallest normal number, which keeps the gradient finite."""
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp_min(tiny).log()).sum(dim)


def expected(observed: Tensor, preference_logits: Tensor) -> Tensor:
    """Expected log-probability of what is observed [..., T, O] under softmax(preference_logits), summed over T."""
    wish = preference_logits.log_softmax(-1)
    return (observed * wish.where((observed > 0) | wish.isfinite(), 0.0)).sum((-2, -1))

"""The reference against the definition written a second time: Python floats, one cell after the other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from efe_kernels import efe_loss
from efe_kernels.efe_loss import reference
from efe_kernels.efe_loss.reference import Inputs, Settings
from tests.efe_loss.cases import WEIGHTS, Case, in_double, run


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(value - top) for value in values]
    return [value / sum(exps) for value in exps]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def episode_loss(case: Case, inputs: dict[str, Any], b: int) -> tuple[dict[str, float], float, float]:
    """Terms, mask ratio and total of one episode."""
    values = {name: value.detach() for name, value in inputs.items()}
    plan = values["logits"][b].tolist()
    target = values["target"][b].tolist()
    backward = values["backward_logits"][b].tolist() if case.backward else plan[::-1]
    final = values["final_logits"][b].tolist() if case.final else plan[-1]
    cells = [
        (h, w)
        for h in range(case.height)
        for w in range(case.width)
        if target[h][w] != -100 and (not case.valid or bool(values["valid"][b, h, w]))
    ]
    prompt = values["prompt"][b].tolist() if case.prompt else None
    terms = dict.fromkeys(("risk", "ambiguity", "consistency", "agreement", "anchor", "prompt", "step"), 0.0)
    n, steps = len(cells), case.steps
    wrong = 0
    for h, w in cells:
        preference = values["preference_logits"]
        row = (preference[b] if case.preference_per_episode else preference)[h, w].tolist()
        if prompt is not None:
            row = [logit / (1 + math.exp(-prompt[c])) for c, logit in enumerate(row)]
        c = softmax(row)
        for t in range(steps):
            q, r = softmax(plan[t][h][w]), softmax(backward[t][h][w])
            m = [(a + b) / 2 for a, b in zip(q, r, strict=True)]
            p = values["observation_probs"][b, t, h, w].tolist() if case.observation else q
            terms["risk"] += kl(q, c) / (n * steps)
            terms["agreement"] += (kl(q, m) + kl(r, m)) / 2 / (n * steps)
            terms["ambiguity"] -= sum(a * math.log(a) for a in p) / (n * steps)
        y = target[h][w]
        terms["consistency"] -= math.log(softmax(final[h][w])[y]) / n
        wrong += max(range(case.outcomes), key=final[h][w].__getitem__) != y
        if case.anchor and sum(values["target_preference"][h, w].tolist()) > 0:
            anchor = [max(a, 1e-8) for a in values["target_preference"][h, w].tolist()]
            terms["anchor"] += kl(c, anchor) / n
    if prompt is not None and case.projection:
        direction = (values["projection"] @ values["prompt"][b]).tolist()
        for t in range(steps):
            rows = [plan[t][h][w] for h, w in cells]
            z = [sum(row[c] - sum(row) / case.outcomes for row in rows) / n for c in range(case.outcomes)]
            terms["prompt"] -= cosine(z, direction) / steps
    terms["step"] = steps * n / 900
    ratio = wrong / n
    total = (0.5 + 0.5 * ratio) * sum(getattr(WEIGHTS, name) * value for name, value in terms.items())
    return terms, ratio, total


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(steps=4, backward=True, final=True, observation=True, preference_per_episode=True),
        Case(batch=1, steps=1, height=1, width=3, outcomes=3, valid=False, anchor=False),
        Case(prompt=False, outcomes=2),
    ],
)
def test_reference_equals_the_definition(case: Case) -> None:
    inputs = in_double(case.inputs())
    output, _ = run(inputs)
    for b in range(case.batch):
        terms, ratio, total = episode_loss(case, inputs, b)
        for name, value in terms.items():
            # Two float64 evaluations of sums of at most 10^4 addends.
            assert output.terms[name][b].item() == pytest.approx(value, rel=1e-12, abs=1e-13), name
        assert output.mask_ratio[b].item() == pytest.approx(ratio, rel=1e-12)
        assert output.total[b].item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("wrong", [-100, -1, 10])
def test_a_target_out_of_range_makes_the_loss_nan(wrong: int) -> None:
    """Where nothing can be raised, as on a GPU; -100 too, where another number is ignored."""
    inputs = Case(valid=False).inputs()
    inputs["target"] = inputs["target"].clamp_min(0)
    inputs["target"][1, 2, 3] = wrong
    inputs["preference_logits"] = inputs["preference_logits"][:4, :5]
    arguments = Inputs(*(inputs.get(name) for name in Inputs._fields))
    total, *_ = reference.efe_loss(arguments, Settings([1.0] * 7, True, 0.0, 900, 255, "none"))
    assert total[1].isnan() and total[0].isfinite()


def test_gradients_are_those_of_finite_differences() -> None:
    case = Case(
        batch=2, steps=3, height=2, width=2, outcomes=3, prompt_dim=4, backward=True, final=True, observation=True
    )
    inputs = in_double(case.inputs())
    names = [name for name, value in inputs.items() if value.requires_grad]

    def total_and_terms(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = efe_loss(**{**inputs, **dict(zip(names, leaves, strict=True))}, weights=WEIGHTS, reduction="none")
        return output.total, *(term for name, term in output.terms.items() if name != "step")

    assert torch.autograd.gradcheck(total_and_terms, [inputs[name] for name in names])

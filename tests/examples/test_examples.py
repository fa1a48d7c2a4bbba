"""Each example runs, shortened, and shows what it says that it shows."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.on_meta import META, only_on_meta

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(file.stem for file in EXAMPLES.glob("*.py"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models here are tiny: a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name: str, *arguments: str) -> Any:
    """What main of this example returns."""
    return example(name).main(arguments)


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_alike(ours: Tensor, plain: Tensor, before: Tensor, share: float) -> None:
    """Weights after a few updates that differ by less than this share of how far they moved."""
    moved = float((plain - before).norm())
    assert moved > 0
    assert float((ours - plain).norm()) < share * moved


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.startswith('"""') and f"python examples/{name}.py" in text
    assert f"[{name}.py]" in (EXAMPLES / "README.md").read_text()


def test_the_loss_in_a_loop_plans_better_than_copying() -> None:
    result = run("loss_in_a_loop", "--steps", "120")
    assert result.losses[-1] < result.losses[0] / 2
    assert result.planned > result.copied + 0.05


def test_ppo_does_with_the_library_what_it_does_in_plain_torch() -> None:
    """The first update's weights differ by rounding alone, so the next 1024 actions are the same."""
    pytest.importorskip("gymnasium")
    ours, plain = (run("ppo_cartpole", "--steps", "2", *flags) for flags in ([], ["--plain"]))
    # Each of 16 steps of Adam moves a weight by its gradient over the size of that gradient, with a relative error of
    # 2^-24 times what cancels in a mean over 256 elements: no more than 2^-24 · 256 · 16 of the way.
    assert_alike(ours.weights[0], plain.weights[0], plain.start, 2**-12)
    assert ours.returns == plain.returns


def test_ppo_learns() -> None:
    """Twice the return of a random policy, which is about 22."""
    pytest.importorskip("gymnasium")
    result = run("ppo_cartpole", "--steps", "8")
    assert sum(result.returns[-20:]) / 20 > 45


def test_grpo_does_with_the_library_what_it_does_in_plain_torch() -> None:
    ours, plain = (run("grpo_toy", "--steps", "10", *flags) for flags in ([], ["--plain"]))
    assert ours.rewards == plain.rewards
    before = run("grpo_toy", "--steps", "0").weights
    # As for PPO, with 20 steps of Adam and means over 384 symbols.
    assert_alike(ours.weights, plain.weights, before, 2**-24 * 384 * 20)


def test_grpo_earns_more_than_a_policy_that_does_nothing() -> None:
    result = run("grpo_toy", "--steps", "40")
    # A share of 384 symbols with a probability of 1/8 has a standard deviation of 0.017.
    assert abs(result.untrained - 1 / 8) < 4 * 0.017
    assert result.trained > 3 * result.untrained


def test_a_learned_refinement_brings_a_prompt_closer_to_the_goal() -> None:
    result = run("refine_prompt_policy", "--steps", "40")
    assert result.trained < result.prompt / 4
    assert result.untrained > result.prompt / 2


def test_the_step_of_the_graph_learns() -> None:
    result = run("cuda_graph", "--steps", "60")
    assert result.planned > 0.9 > 0.2 > result.untrained
    assert result.metrics[-1].loss < result.metrics[0].loss / 4


def test_the_step_of_the_graph_reads_nothing_from_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("cuda_graph")
    trainer = module.Trainer(module.new_inputs(module.BATCH, META))
    with only_on_meta(monkeypatch):
        assert all(value.shape == () for value in trainer.step())


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_trainer_of_transformers_trains_planner_and_loss() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    result = run("hf_trainer", "--steps", "60")
    assert result.planned > 0.5 > 2 * result.copied
    assert result.losses[-1] < result.losses[0] / 2
    assert bool(result.loss_state["preference_logits"].any()), "the preferences, which begin at zero, were trained"


def test_policies_have_the_expected_free_energy_that_pymdp_gives_them() -> None:
    result = run("policies_pymdp")
    assert len(result.policies) == 16
    worst = result.policies[result.share.argmin()]
    assert worst.tolist() == [0, 0], "to stay where nothing is to be seen or gained"
    if result.pymdp is None:
        pytest.skip("inferactively-pymdp 0.0.7.1 is not installed, so there is nothing to compare with")
    utility, gain, share = result.pymdp
    # pymdp adds exp(-16) to each of seven probabilities before it takes the logarithm, which moves their entropy by no
    # more than as much for each, in each of two steps.
    slack = 2 * 7 * math.exp(-16)
    torch.testing.assert_close(result.found.utility, utility, rtol=0, atol=slack)
    torch.testing.assert_close(result.found.information_gain, gain, rtol=0, atol=slack)
    # The precision of 16 multiplies the difference of two of them.
    torch.testing.assert_close(result.share, share, rtol=2 * 16 * slack, atol=0)

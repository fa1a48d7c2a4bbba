from __future__ import annotations

import dataclasses

import pytest
import torch

from efe_train.config import (
    TrainConfig,
    UserError,
    choose_precision,
    config_from,
    learning_rates,
    parse_train_arguments,
    resumed,
)


def test_flags_work_with_underscore_and_with_hyphen() -> None:
    underscore = [
        "--agent_lr",
        "0.1",
        "--qwen_lr",
        "0.2",
        "--max_batches",
        "3",
        "--batch_size",
        "4",
        "--prompt_refresh",
        "5",
    ]
    underscore += ["--max_grad_norm", "0", "--log_with", "wandb", "--qwen_model", "here"]
    underscore += ["--lora_rank", "8", "--gradient_checkpointing"]
    hyphen = [flag.replace("_", "-") for flag in underscore]
    expected = {
        "agent_lr": 0.1, "qwen_lr": 0.2, "max_batches": 3, "batch_size": 4, "prompt_refresh": 5, "max_grad_norm": 0.0,
        "log_with": "wandb", "qwen_model": "here", "lora_rank": 8, "gradient_checkpointing": True,
    }  # fmt: skip
    assert parse_train_arguments(underscore) == parse_train_arguments(hyphen) == expected


def test_every_setting_has_a_flag_that_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parse_train_arguments(["--help"])
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in shown
        if "{default}" in field.metadata["help"]:
            assert field.metadata["help"].format(default=field.default) in shown


def test_without_flags_the_defaults_hold() -> None:
    config = config_from(parse_train_arguments([]))
    assert config == TrainConfig()
    assert (config.epochs, config.seed, config.prompt_refresh, config.device) == (10, 42, 10, "auto")
    assert (config.lora_rank, config.gradient_checkpointing) == (0, False)


def test_the_learning_rates_suit_the_model_and_say_so() -> None:
    assert learning_rates(TrainConfig(qwen_model="Qwen/Qwen3-0.6B"))[:2] == (1e-5, 5e-5)
    agent, qwen, reason = learning_rates(TrainConfig())
    assert agent > 1e-5 and qwen > 5e-5
    assert "small Qwen" in reason
    assert learning_rates(TrainConfig(agent_lr=0.5))[:2] == (0.5, qwen)
    assert "--agent_lr as given" in learning_rates(TrainConfig(agent_lr=0.5))[2]
    assert learning_rates(TrainConfig(agent_lr=0.5, qwen_lr=0.25))[:2] == (0.5, 0.25)


def test_precision_is_chosen_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_precision("auto", cpu)[0] == torch.float32
    assert choose_precision("bf16", cpu) == (torch.bfloat16, "--precision bf16")
    assert choose_precision("fp16", gpu)[0] == torch.float16
    for supported, dtype, word in ((True, torch.bfloat16, "no loss scaling"), (False, torch.float32, "no bf16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        chosen, reason = choose_precision("auto", gpu)
        assert chosen == dtype and word in reason
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", cpu)


def test_a_resumed_run_keeps_its_settings_and_takes_those_that_may_change() -> None:
    saved = TrainConfig(epochs=2, seed=7, dataset="folder", agent_lr=0.1)
    config = resumed(saved, {"resume": True, "epochs": 5, "seed": 7})
    assert config == TrainConfig(epochs=5, seed=7, dataset="folder", agent_lr=0.1, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"batch_size": 3},
        {"dataset": "other"},
        {"qwen_model": "x"},
        {"lora_rank": 2},
        {"prompt_refresh": 3},
    ],
)
def test_a_resumed_run_refuses_what_would_make_it_another_run(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(change))} was .* leave --{next(iter(change))} out"):
        resumed(TrainConfig(), change)

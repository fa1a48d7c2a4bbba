from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from efe_kernels import EFEWeights
from efe_train.commands import parse_train_arguments
from efe_train.config import (
    EFE_TERMS,
    PARTS,
    TrainConfig,
    UserError,
    config_from,
    learning_rates,
    resumed,
    term_weights,
)
from efe_train.device import choose_precision


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
    underscore += ["--lora_rank", "8", "--gradient_checkpointing", "--policy_samples", "2", "--policy_share", "0.5"]
    underscore += ["--efe_weights", "risk=1", "--validation", "0"]
    hyphen = [flag.replace("_", "-") for flag in underscore]
    expected = {
        "agent_lr": 0.1, "qwen_lr": 0.2, "max_batches": 3, "batch_size": 4, "prompt_refresh": 5, "max_grad_norm": 0.0,
        "log_with": "wandb", "qwen_model": "here", "lora_rank": 8, "gradient_checkpointing": True,
        "policy_samples": 2, "policy_share": 0.5, "efe_weights": "risk=1", "validation": 0.0,
    }  # fmt: skip
    assert parse_train_arguments(underscore) == parse_train_arguments(hyphen) == expected


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_settings_come_from_a_file_and_flags_override_them(form: str, tmp_path: Path) -> None:
    file = tmp_path / f"settings.{form}"
    content = "epochs: 3\nqwen_lr: 1e-4\naugment: off\nqwen_model: null\ngradient-checkpointing: true\nseed: 5\n"
    file.write_text(content if form == "yaml" else json.dumps(yaml.safe_load(content)))
    given = parse_train_arguments(["--seed", "6", "--config", str(file)])
    assert given == {"epochs": 3, "qwen_lr": 1e-4, "augment": "off", "gradient_checkpointing": True, "seed": 6}


def test_the_settings_of_a_run_are_taken_as_they_are(tmp_path: Path) -> None:
    config = TrainConfig(epochs=2, lora_rank=3, without="prompt", max_grad_norm=0.5, gradient_checkpointing=True)
    saved = dataclasses.replace(config, resume=True, out="there")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(saved)))
    given = ["--config", str(tmp_path / "config.json")]
    assert config_from(parse_train_arguments(given)) == config
    changed = config_from(parse_train_arguments([*given, "--no-gradient-checkpointing", "--out", "here"]))
    assert changed == dataclasses.replace(config, gradient_checkpointing=False, out="here")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("- 1", "it should hold an object."),
        ("epochs: 0", "--epochs: must be a whole number of at least 1, it was '0'"),
        ("epoch: null", "'epoch' is not a setting."),
        ("lora_rank: true", "must be a whole number"),
        ("out: 2024-13-45", "month must be in 1..12"),
        ("resume: maybe", "ignored explicit argument 'maybe'"),
        ("epochs: [", "while parsing a flow node"),
        (b"\xff\xfe\x00", "codec can't decode"),
    ],
)
def test_a_file_that_holds_no_settings_is_explained(content: str | bytes, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(complaint)) as caught:
        parse_train_arguments(["--config", str(file)])
    assert str(caught.value).startswith(f"--config {str(file)!r} cannot be read as settings: ")
    assert "\n" not in str(caught.value)


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
        {"augment": "off"},
        {"validation": 0.0},
        {"policy_samples": 1},
        {"policy_share": 0.0},
        {"efe_weights": "risk=1"},
        {"without": "prompt"},
    ],
)
def test_a_resumed_run_refuses_what_would_make_it_another_run(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(change))} was .* leave --{next(iter(change))} out"):
        resumed(TrainConfig(), change)


def test_the_terms_are_those_of_the_loss_and_the_default_weighs_some_of_them() -> None:
    assert tuple(field.name for field in dataclasses.fields(EFEWeights)) == EFE_TERMS
    default = term_weights(TrainConfig().efe_weights)
    assert default and EFEWeights(**default) != EFEWeights()


@pytest.mark.parametrize(("text", "weights"), [
    ("risk=0.1,step=0", {"risk": 0.1, "step": 0.0}),
    ("anchor=2", {"anchor": 2.0}),
    ("", {}),
])  # fmt: skip
def test_weights_of_terms_are_read_from_a_flag(text: str, weights: dict[str, float]) -> None:
    (given,) = parse_train_arguments(["--efe_weights", text]).values()
    assert term_weights(str(given)) == weights


@pytest.mark.parametrize("text", ["rsk=1", "risk=a", "risk=-1", "risk=nan", "risk", "=1", "risk=1;step=0"])
def test_weights_of_terms_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--efe_weights.* must (name some of risk,.* step|be a number)"):
        parse_train_arguments(["--efe_weights", text])


def test_parts_are_left_out_by_name() -> None:
    whole, without = TrainConfig(), TrainConfig(without="prompt,hard_cell")
    assert all(whole.has(part) for part in PARTS)
    assert [part for part in PARTS if not without.has(part)] == ["prompt", "hard_cell"]
    with pytest.raises(UserError, match=r"--without: must be some of look_up, .*, it was 'prompt,qwen'"):
        parse_train_arguments(["--without", "prompt,qwen"])

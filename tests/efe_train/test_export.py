from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from efe_train import export, run
from efe_train.__main__ import main
from efe_train.commands import parse_train_arguments
from efe_train.config import PROMPT_DIM
from efe_train.data import Query, prompt_text
from efe_train.qwen import Prompter
from efe_train.standardise import Standardise


def trained(tasks: Path, out: Path, *arguments: str) -> tuple[Prompter, list[Query]]:
    """The prompter that a short run ends with, in evaluation mode, and queries of it."""
    given = ["--dataset", str(tasks), "--out", str(out), "--batch_size", "6", "--max_batches", "3", "--device", "cpu"]
    # So high a rate that what was trained shows.
    done = run.Run(
        run.prepare(parse_train_arguments([*given, "--prompt_refresh", "1", "--qwen_lr", "0.1", *arguments]))
    )
    done.train()
    return done.trainer.agent.prompter.eval(), [example.query for example in done.examples[:4]]


def exported(checkpoint: Path, out: Path) -> None:
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0


@torch.no_grad()
def assert_same_prompts(model: Any, out: Path, prompter: Prompter, queries: list[Query]) -> None:
    """Of a language model that was loaded for an export, with the rest of it: as those of the run, and on the way."""
    from transformers import AutoTokenizer

    texts = [prompt_text(query, prompter.max_tokens) for query in queries]
    tokens = AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt")
    hidden = model.eval()(**tokens).last_hidden_state
    own: Any = prompter.language_model
    torch.testing.assert_close(hidden, own(**tokens).last_hidden_state, rtol=0, atol=0)
    width = hidden.shape[-1]
    projection = nn.Sequential(nn.LayerNorm(width), Standardise(width), nn.Linear(width, PROMPT_DIM)).eval()
    projection.load_state_dict(load_file(out / "projection.safetensors"))
    mask = tokens["attention_mask"][..., None]
    mean = (hidden.float() * mask).sum(1) / mask.sum(1)
    # The run's own mean is rounded to the dtype of the hidden states.
    torch.testing.assert_close(
        projection(mean.to(hidden.dtype).float()), prompter(queries).prompt, rtol=1e-4, atol=1e-3
    )


def test_transformers_loads_the_language_model_of_a_run(
    arc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel

    prompter, queries = trained(arc_folder, tmp_path / "run")
    capsys.readouterr()
    exported(tmp_path / "run", tmp_path / "out")
    assert capsys.readouterr().out == (
        f"Written to {tmp_path}/out: the language model (AutoModel.from_pretrained('{tmp_path}/out')), the tokenizer, "
        "and in projection.safetensors the layers that make the prompt.\n"
    )
    assert_same_prompts(AutoModel.from_pretrained(tmp_path / "out"), tmp_path / "out", prompter, queries)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=["small", "float32", "bfloat16"])
def test_peft_loads_the_adapters_of_a_run(
    dtype: torch.dtype | None, prompter: Prompter, arc_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of the small Qwen, and of one that was saved in a dtype and is named by its place in the working directory."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    monkeypatch.chdir(tmp_path)
    arguments = ["--lora_rank", "2", "--lora_alpha", "7"]
    if dtype is not None:
        model: Any = prompter.language_model
        model.to(dtype).save_pretrained("model")
        prompter.tokenizer.save_pretrained("model")
        arguments += ["--qwen_model", "model"]
    own, queries = trained(arc_folder, tmp_path / "run", *arguments)
    exported(tmp_path / "run", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    base = tmp_path / ("model" if dtype else "run/qwen")
    assert settings["base_model_name_or_path"] == str(base)
    call = f"PeftModel.from_pretrained(AutoModel.from_pretrained('{base}'), '{tmp_path}/out')"
    assert call in capsys.readouterr().out
    loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "out")
    assert_same_prompts(loaded, tmp_path / "out", own, queries)
    with pytest.raises(AssertionError):  # the adapters say something
        assert_same_prompts(AutoModel.from_pretrained(base), tmp_path / "out", own, queries)


def test_another_frozen_model_than_that_of_the_run_is_noticed(
    prompter: Prompter, arc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was trained on since: of the same shapes."""
    pytest.importorskip("peft")
    model: Any = prompter.language_model
    prompter.tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    run_folder = ("--checkpoint", str(tmp_path / "run"))
    trained(arc_folder, tmp_path / "run", "--lora_rank", "2", "--qwen_model", str(tmp_path / "model"))
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "model")
    commands = (["--resume", "--out", str(tmp_path / "run"), "--max_batches", "4"], ["evaluate", *run_folder])
    for command in (*commands, ["export", *run_folder, "--out", str(tmp_path / "out")]):
        capsys.readouterr()
        assert main(command) == 2
        *_, message = capsys.readouterr().err.splitlines()
        assert "is not the one that it began with" in message, command


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["export", *arguments]) == 2
    *_, message = capsys.readouterr().err.splitlines()
    return message


def test_a_folder_that_cannot_be_written_is_explained(
    arc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ("--checkpoint", str(tmp_path / "run"))
    assert "'nothing' is not a run folder" in complaint(capsys, "--checkpoint", "nothing", "--out", "out")
    trained(arc_folder, tmp_path / "run")
    held = sorted(tmp_path.rglob("*"))
    assert "already holds " in complaint(capsys, *checkpoint, "--out", str(tmp_path / "run"))
    file = tmp_path / "run" / "config.json"
    assert "cannot be used (Not a directory)" in complaint(capsys, *checkpoint, "--out", str(file))
    assert "cannot be used (Not a directory)" in complaint(capsys, *checkpoint, "--out", str(file / "out"))
    assert sorted(tmp_path.rglob("*")) == held

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    message = complaint(capsys, *checkpoint, "--out", str(tmp_path / "out"))
    assert message.endswith("cannot be written ([Errno 28] No space left on device): name another folder.")

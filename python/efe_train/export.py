"""Writes what a run made of Qwen in the formats of peft and transformers: `efe-train export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from efe_train.commands import ExportConfig
from efe_train.config import UserError
from efe_train.folder import RunFolder, make_folder
from efe_train.qwen import Prompter, restored_prompter


def main(config: ExportConfig) -> int:
    """Write the folder and say how to load it. Returns the exit code.

    Raises:
        UserError: a mistake in the checkpoint, or the folder cannot be written or holds something.
    """
    folder = RunFolder.find(config.checkpoint)
    check_empty(config.out)
    trained = folder.read_config()
    prompter = restored_prompter(folder, trained, folder.read_checkpoint())
    out = make_folder(config.out)
    base = lasting(trained.qwen_model or str(folder.qwen))
    try:
        about = write(prompter, out, base)
    except Exception as error:  # safetensors and tokenizers raise classes of their own where a file cannot be written
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"--out {config.out!r} cannot be written ({reason}): name another folder.") from None
    print(f"Written to {out}: {about}, the tokenizer, and in projection.safetensors the layers that make the prompt.")
    return 0


def check_empty(out: str) -> None:
    try:
        held = next(Path(out).iterdir(), None)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--out {out!r} cannot be used ({error.strerror}): name a new or an empty folder.") from None
    if held is not None:
        raise UserError(f"--out {out!r} already holds {held.name}: name a new or an empty folder.")


def lasting(name: str) -> str:
    """The name of a model, for a reader in another working directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def write(prompter: Prompter, out: Path, base: str) -> str:
    """Write the adapters or else the language model, and what makes a prompt of it. Returns a phrase on the first.

    base: the model that the adapters belong to.
    """
    model: Any = prompter.language_model
    prompter.tokenizer.save_pretrained(out)
    save_file(prompter.projection.state_dict(), out / "projection.safetensors")
    if not prompter.has_adapters():
        model.save_pretrained(out)
        return f"the language model (AutoModel.from_pretrained({str(out)!r}))"
    write_adapters(model, out, base)
    return f"the adapters (PeftModel.from_pretrained(AutoModel.from_pretrained({base!r}), {str(out)!r}))"


def write_adapters(model: Any, out: Path, base: str) -> None:
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    # A PeftModel has the model that it adapts at this place.
    state = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(state, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    settings.save_pretrained(out)

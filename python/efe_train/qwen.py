"""Qwen as a prompter: the text of a query in, one prompt embedding out, and the cache between two refreshes."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from efe_kernels import masked_mean_pool
from efe_train.config import PROMPT_DIM, WITHOUT_LORA, Lora, TrainConfig, UserError
from efe_train.data import Query, prompt_text
from efe_train.files import REMEDY
from efe_train.folder import RunFolder
from efe_train.standardise import Standardise

SMALL_TOKENS = 384
PRETRAINED_TOKENS = 2048
"""Longest prompts. A pretrained Qwen reads about as many tokens as the small one reads bytes: each digit is one."""


class Prompts(NamedTuple):
    """prompt: [B, D] float32. hidden: [B, E] without a graph, what the projection standardises before it projects; None
    where no language model was asked.
    """

    prompt: Tensor
    hidden: Tensor | None


class Prompter(nn.Module):
    """A language model whose mean hidden state is projected to the prompt.

    language_model: maps token ids to `last_hidden_state` [N, L, E]. projection: trained from scratch, E to D.
    """

    def __init__(
        self, language_model: nn.Module, tokenizer: Any, max_tokens: int, prompt_dim: int = PROMPT_DIM
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        width = int(language_model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        # Texts of one kind have nearly the same mean hidden state: as it is, a tenth of a prompt would tell them apart.
        self.projection = nn.Sequential(nn.LayerNorm(width), Standardise(width), nn.Linear(width, prompt_dim))

    def forward(self, queries: Sequence[Query]) -> Prompts:
        texts = [prompt_text(query, self.max_tokens) for query in queries]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        device = self.projection[-1].weight.device
        ids, mask = (tokens[name].to(device, non_blocking=True) for name in ("input_ids", "attention_mask"))
        hidden = self.language_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        norm, standardise, project = self.projection.children()
        # A frozen language model may compute in bfloat16; the projection's weights are float32.
        level = norm(masked_mean_pool(hidden, mask.bool()).float())
        return Prompts(project(standardise(level)).float(), level.detach())

    def observe(self, hidden: Tensor) -> None:
        """Count the hidden states [B, E] of a batch among those that the projection standardises by."""
        standardise: Any = self.projection[1]
        standardise.observe(hidden)

    def recompute_activations(self) -> None:
        """Of each layer keep the input alone; backward computes the rest again. For the memory of long prompts."""
        model: Any = self.language_model
        # transformers 5 renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def add_lora(self, lora: Lora) -> None:
        """Freeze the language model and add to some of its linear layers a trainable update of low rank, in float32.

        The update is 0 at first: the prompts stay those of the model (Hu et al. 2021, "LoRA").

        Raises:
            UserError: peft is not installed, or the model has no linear layer of those names.
        """
        check_lora(lora)
        from peft import LoraConfig, inject_adapter_in_model

        # peft leaves lora_alpha alone when the rank changes: a fixed ratio keeps the size of a step.
        alpha = lora.alpha or 2 * lora.rank
        every = lora.targets == WITHOUT_LORA.targets
        targets = lora.targets if every else [name.strip() for name in lora.targets.split(",")]
        modules = self.language_model.named_modules()
        names = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
        if not every and not names.issuperset(targets):
            raise UserError(
                f"--lora_targets must be {WITHOUT_LORA.targets} or some of {','.join(sorted(names))} for this model, "
                f"it was {lora.targets!r}."
            )
        settings = LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=targets)
        inject_adapter_in_model(settings, self.language_model)
        for parameter in self.language_model.parameters():
            if parameter.requires_grad:  # peft gives it the dtype of the layer that it adapts
                parameter.data = parameter.data.float()

    def has_adapters(self) -> bool:
        return any(is_adapter(name) for name, _ in self.language_model.named_parameters())

    def base_fingerprint(self) -> str:
        """Of some of the weights that adapters leave frozen and a checkpoint leaves out; empty where there are none."""
        if not self.has_adapters():
            return ""
        found = hashlib.sha256()
        for name, tensor in without_adapters(self.language_model).items():
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 256)].double().cpu()
            found.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
        return found.hexdigest()

    def kept_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, as in `state_dict`: with adapters, these and the projection, else everything."""
        state = self.state_dict()
        if not self.has_adapters():
            return state
        return {name: each for name, each in state.items() if name.startswith("projection.") or is_adapter(name)}

    def load_kept_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `kept_state`. With adapters, the weights of the frozen model stay as they are.

        Raises:
            KeyError: a name is missing or unknown.
            RuntimeError: a tensor has another shape.
        """
        if differing := state.keys() ^ self.kept_state().keys():
            raise KeyError(f"missing or unknown: {', '.join(sorted(differing))}")
        self.load_state_dict(state, strict=False)

    def save_architecture(self, folder: Path) -> None:
        """Write what `load_architecture` needs, beside a checkpoint, to build this model again.

        A checkpoint with adapters lacks the frozen weights. Those of a pretrained model are found under its name again;
        random ones are nowhere else, and are written too.
        """
        model: Any = self.language_model
        model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.has_adapters() and not model.name_or_path:
            save_file(without_adapters(model), folder / "model.safetensors", metadata={"format": "pt"})


class PromptCache:
    """The latest prompt of each query, without its graph; the least recently used leave when it is full."""

    CAPACITY = 16384

    def __init__(self, capacity: int = CAPACITY) -> None:
        """capacity: at least the queries of a batch, which are read together."""
        self.capacity = capacity
        self.rows: OrderedDict[str, Tensor] = OrderedDict()

    def clear(self) -> None:
        self.rows.clear()

    def missing(self, queries: Sequence[Query]) -> list[Query]:
        """Those that are not there; the others count as used."""
        for query in queries:
            if query.key in self.rows:
                self.rows.move_to_end(query.key)
        return [query for query in queries if query.key not in self.rows]

    def store(self, queries: Sequence[Query], prompts: Tensor) -> None:
        """prompts: [B, D]."""
        for query, row in zip(queries, prompts.detach().clone().unbind(), strict=True):
            self.rows[query.key] = row
            self.rows.move_to_end(query.key)
        while len(self.rows) > self.capacity:
            self.rows.popitem(last=False)

    def read(self, queries: Sequence[Query]) -> Tensor:
        """[B, D], of queries that are all there."""
        return torch.stack([self.rows[query.key] for query in queries])

    def state_dict(self) -> dict[str, Any]:
        rows = torch.stack(list(self.rows.values())) if self.rows else torch.empty(0)
        return {"keys": list(self.rows), "rows": rows}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.rows = OrderedDict(zip(state["keys"], state["rows"].to(device).unbind(), strict=True))


def build_prompter(name: str | None, lora: Lora = WITHOUT_LORA) -> tuple[Prompter, str]:
    """The prompter of `--qwen_model` and of `--lora_rank` and its like, and a sentence about it.

    Raises:
        UserError: neither a folder with a saved model nor an id that can be loaded, or peft is missing.
    """
    check_lora(lora)
    if name is None:
        model, tokenizer = small_qwen()
        prompter = Prompter(model, tokenizer, SMALL_TOKENS)
        about = f"a small Qwen from a config, {millions(prompter)} parameters, random weights, byte tokens"
    else:
        model, tokenizer = load_pretrained(name)
        prompter = Prompter(model, tokenizer, PRETRAINED_TOKENS)
        about = f"{name}, {millions(prompter)} parameters"
    stored = " and ".join(sorted({str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"}))
    if lora.rank:
        # What is frozen gains nothing from more digits than it was stored with.
        prompter.add_lora(lora)
        about += f"; frozen{stored and ' in ' + stored.replace('torch.', '')}, with adapters of rank {lora.rank}: "
        about += f"{millions(prompter, trained=True)} parameters train"
    elif stored:
        model.float()
        about += f", loaded in {stored} and cast up to float32 master weights"
    return prompter, about


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is one of peft's, not one of the model that it adapts."""
    return ".lora_" in name


def without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, under the names that it had before it got adapters."""
    state = model.state_dict().items()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state if not is_adapter(name)}


def check_lora(lora: Lora) -> None:
    if not lora.rank and lora != WITHOUT_LORA:
        raise UserError(
            "--lora_alpha, --lora_dropout and --lora_targets are about the adapters of --lora_rank, which was 0: "
            "set it above 0, or leave them out."
        )
    if lora.rank and importlib.util.find_spec("peft") is None:
        raise UserError(
            f"--lora_rank {lora.rank} needs the package peft, which is not installed: pip install peft "
            "(it is the extra `lora` of efe-kernels)."
        )


def millions(module: nn.Module, *, trained: bool = False) -> str:
    counted = (parameter for parameter in module.parameters() if parameter.requires_grad or not trained)
    return f"{sum(parameter.numel() for parameter in counted) / 1e6:.1f} M"


def small_qwen() -> tuple[nn.Module, Any]:
    """A Qwen3 with random weights that two CPU cores can train, and a tokenizer of bytes. Nothing is downloaded."""
    from transformers import AutoModel, Qwen3Config

    tokenizer = byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=SMALL_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModel.from_config(config), tokenizer


def byte_tokenizer() -> Any:
    """Byte-pair encoding without any pair: each byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(
        models.BPE(vocab={"<pad>": 0, **{byte: 1 + n for n, byte in enumerate(alphabet)}}, merges=[])
    )
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", model_max_length=SMALL_TOKENS)


def load_pretrained(name: str, remedy: str | None = None) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a local folder or a Hugging Face id, in the dtype that they were stored in.

    remedy: what the user can do where they cannot be loaded, instead of naming another one.

    Raises:
        UserError: they cannot.
    """
    from transformers import AutoModel, AutoTokenizer

    check_exists(name, remedy or "give a local folder or an id such as Qwen/Qwen3-0.6B")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, dtype="auto")
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"--qwen_model {name!r} cannot be loaded ({reason}): "
            f"{remedy or 'it should hold a model and its tokenizer, as save_pretrained writes them'}."
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return model, tokenizer


def check_exists(name: str, remedy: str) -> None:
    """Whether there is a model of that name, asked once: transformers would ask an unreachable hub for minutes."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return
    try:
        if constants.HF_HUB_OFFLINE or try_to_load_from_cache(name, "config.json"):
            return
        HfApi().model_info(name, timeout=10)
    except HFValidationError:
        reason = "there is no such folder, and it is not a Hugging Face id"
    except Exception as error:  # the hub's client raises a different class per transport
        reason = f"there is no such folder, and the Hugging Face hub answers {type(error).__name__}"
    else:
        return
    raise UserError(f"--qwen_model {name!r} was not found: {reason}; {remedy}.")


ADAPTERS_ALONE = "put it back, the run needs it again because its checkpoint holds the adapters alone"
"""For a --qwen_model that is gone since the run began."""


def load_architecture(folder: Path, name: str | None, lora: Lora = WITHOUT_LORA) -> Prompter:
    """The prompter that `save_architecture` wrote, for the state of a checkpoint to complete.

    Its weights are random, but those that adapters leave frozen: they are what they were when the run began.
    name, lora: of that run.

    Raises:
        UserError: the folder is damaged, or the run has adapters and peft is missing or the model of that name.
    """
    if name and lora.rank:
        model, tokenizer = load_pretrained(name, ADAPTERS_ALONE)
    else:
        model, tokenizer = load_saved(folder, weights=lora.rank > 0)
    prompter = Prompter(model, tokenizer, PRETRAINED_TOKENS if name else SMALL_TOKENS)
    if lora.rank:
        prompter.add_lora(lora)
    return prompter


def load_saved(folder: Path, *, weights: bool) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a run's folder. weights: whether it holds those of the model, which are random if not."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if weights:
            return AutoModel.from_pretrained(folder, dtype="auto", local_files_only=True), tokenizer
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return AutoModel.from_config(config, dtype=torch.float32), tokenizer
    except Exception as error:  # transformers and tokenizers raise what a broken file happens to break
        raise UserError(f"{folder} cannot be loaded ({type(error).__name__}): {REMEDY}.") from None


def check_base(fingerprint: str, state: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: the frozen weights are not those that the adapters of a checkpoint were trained with.
    """
    if state["base"] != fingerprint:
        raise UserError(f"The --qwen_model of this run is not the one that it began with: {ADAPTERS_ALONE}.")


def restored_prompter(folder: RunFolder, config: TrainConfig, state: Mapping[str, Any]) -> Prompter:
    """The prompter of a run. config: of the run. state: what its checkpoint holds.

    Raises:
        UserError: as `load_architecture`, or the checkpoint is of another version of the model.
    """
    prompter = load_architecture(folder.qwen, config.qwen_model, config.lora)
    with folder.fitting():
        check_base(prompter.base_fingerprint(), state)
        prompter.load_kept_state(state["modules"]["prompter"])
    return prompter

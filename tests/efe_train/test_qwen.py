from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from efe_train import qwen
from efe_train.config import PROMPT_DIM, Lora, UserError
from efe_train.data import Example, Query
from efe_train.qwen import PromptCache, Prompter


@pytest.fixture
def queries(examples: list[Example]) -> list[Query]:
    return [example.query for example in examples[:4]]


def test_each_byte_is_one_token_and_nothing_is_lost() -> None:
    tokenizer = qwen.byte_tokenizer()
    text = "ARC puzzle. in 3x3 > 012|345..\n é→"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_prompt_hardly_depends_on_the_texts_beside_it(prompter: Prompter, queries: list[Query]) -> None:
    with torch.no_grad():
        together = prompter(queries).prompt
        alone = torch.cat([prompter([query]).prompt for query in queries])
    assert together.shape == (4, PROMPT_DIM)
    assert together.dtype == torch.float32
    # float32 attention over a few hundred tokens, with the padding masked
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[3]).abs().max() > 1e-2


def test_the_gradient_reaches_the_first_layer_of_qwen(prompter: Prompter, queries: list[Query]) -> None:
    prompter(queries).prompt.square().sum().backward()
    model: Any = prompter.language_model
    assert model.embed_tokens.weight.grad.norm() > 0
    assert all(parameter.grad.norm() > 0 for parameter in model.layers[0].parameters())
    assert all(parameter.grad is not None for parameter in prompter.projection.parameters())


def test_prompts_are_told_apart_by_more_than_a_tenth_of_their_size(prompter: Prompter, queries: list[Query]) -> None:
    with torch.no_grad():
        hidden = prompter(queries).hidden
        assert hidden is not None
        prompter.observe(hidden)
        prompts = prompter(queries).prompt
    spread = (prompts - prompts.mean(0)).norm(dim=1).mean()
    assert spread > 0.5 * prompts.norm(dim=1).mean()


@pytest.fixture
def adapted(prompter: Prompter) -> Prompter:
    pytest.importorskip("peft")
    prompter.add_lora(Lora(4))
    return prompter


def trainable(prompter: Prompter) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in prompter.named_parameters() if weight.requires_grad}


def test_with_lora_only_adapters_and_the_projection_train(adapted: Prompter) -> None:
    adapters = {name for name in trainable(adapted) if name.startswith("language_model.")}
    assert set(trainable(adapted)) - adapters == {
        f"projection.{name}" for name, _ in adapted.projection.named_parameters()
    }
    linear = [name for name, module in adapted.language_model.named_modules() if name.endswith("_proj")]
    assert len(linear) == 14, "seven linear layers in each of two blocks"
    assert adapters == {f"language_model.{name}.lora_{side}.default.weight" for name in linear for side in "AB"}


def test_with_lora_the_prompts_are_at_first_those_of_the_model(
    pristine_prompter: Prompter, adapted: Prompter, queries: list[Query]
) -> None:
    with torch.no_grad():
        assert torch.equal(adapted(queries).prompt, pristine_prompter(queries).prompt)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_lora_the_gradient_reaches_the_first_layers_adapter(
    adapted: Prompter, queries: list[Query], checkpointing: bool
) -> None:
    if checkpointing:
        adapted.recompute_activations()
    adapted.train()
    with torch.no_grad():  # the update's second factor is 0 at first, and with it the gradient of the first one
        for name, weight in trainable(adapted).items():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    adapted(queries).prompt.square().sum().backward()
    first = [weight for name, weight in trainable(adapted).items() if ".layers.0." in name]
    assert len(first) == 14
    assert all(weight.grad is not None and weight.grad.norm() > 0 for weight in first)
    assert all(weight.grad is None for weight in adapted.parameters() if not weight.requires_grad)


def test_a_missing_peft_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(UserError, match=r"--lora_rank 8 needs the package peft.*extra `lora`") as caught:
        qwen.build_prompter("./never/looked/for", lora=Lora(8))
    assert "\n" not in str(caught.value)


def test_gradient_checkpointing_computes_twice_and_changes_no_gradient(
    prompter: Prompter, queries: list[Query]
) -> None:
    model: Any = prompter.language_model
    prompter.train()
    calls = []
    model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> list[torch.Tensor]:
        calls.clear()
        prompter.zero_grad()
        prompter(queries).prompt.square().sum().backward()
        return [weight.grad.clone() for weight in prompter.parameters() if weight.grad is not None]

    expected = gradients()
    assert len(calls) == 1
    prompter.recompute_activations()
    found = gradients()
    assert len(calls) == 2
    assert len(found) == len(expected) == len(list(prompter.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_cache_gives_what_was_stored_last_without_its_graph(queries: list[Query]) -> None:
    cache = PromptCache()
    assert cache.missing(queries) == queries
    cache.store(queries[:2], torch.ones(2, 3))
    assert cache.missing(queries) == queries[2:]
    renewed = torch.arange(12.0).reshape(4, 3).requires_grad_()
    cache.store(queries, renewed)
    assert torch.equal(cache.read(queries[::-1]), renewed.detach().flip(0))
    assert not cache.read(queries).requires_grad


def test_the_cache_is_bounded_and_forgets_the_least_recently_used(queries: list[Query]) -> None:
    cache = PromptCache(capacity=3)
    for query in (*queries[:3], queries[0], queries[3]):
        cache.store(cache.missing([query]), torch.zeros(len(cache.missing([query])), 2))
    assert list(cache.rows) == [queries[2].key, queries[0].key, queries[3].key]


def test_the_cache_survives_saving(queries: list[Query]) -> None:
    cache, restored = PromptCache(), PromptCache()
    restored.load_state_dict(cache.state_dict(), torch.device("cpu"))
    assert not restored.rows
    cache.store(queries, torch.randn(4, 2))
    restored.load_state_dict(cache.state_dict(), torch.device("cpu"))
    assert list(restored.rows) == list(cache.rows)
    assert torch.equal(restored.read(queries), cache.read(queries))


def save(prompter: Prompter, folder: Path) -> str:
    model: Any = prompter.language_model
    model.save_pretrained(folder)
    prompter.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_folder_written_with_save_pretrained_loads_back(
    prompter: Prompter, queries: list[Query], tmp_path: Path
) -> None:
    loaded, about = qwen.build_prompter(save(prompter, tmp_path))
    assert "cast up" not in about
    loaded.projection.load_state_dict(prompter.projection.state_dict())
    loaded.max_tokens = prompter.max_tokens
    with torch.no_grad():
        assert torch.equal(loaded(queries).prompt, prompter(queries).prompt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_cast_up_with_a_message(
    prompter: Prompter, tmp_path: Path, dtype: torch.dtype
) -> None:
    prompter.language_model.to(dtype)
    loaded, about = qwen.build_prompter(save(prompter, tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert f"loaded in {dtype} and cast up to float32 master weights" in about


def test_the_architecture_alone_is_enough_for_a_checkpoint(
    prompter: Prompter, queries: list[Query], tmp_path: Path
) -> None:
    prompter.save_architecture(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    restored = qwen.load_architecture(tmp_path, None)
    restored.load_state_dict(prompter.state_dict())
    with torch.no_grad():
        assert torch.equal(restored(queries).prompt, prompter(queries).prompt)


def test_the_architecture_of_a_run_with_lora_takes_its_weights(
    adapted: Prompter, queries: list[Query], tmp_path: Path
) -> None:
    adapted.save_architecture(tmp_path)
    with torch.no_grad():
        for weight in trainable(adapted).values():
            weight.add_(0.01)
    restored = qwen.load_architecture(tmp_path, None, lora=Lora(4))
    restored.load_kept_state(adapted.kept_state())
    assert trainable(restored).keys() == trainable(adapted).keys()
    with torch.no_grad():
        assert torch.equal(restored(queries).prompt, adapted(queries).prompt)


def test_without_adapters_all_is_kept(prompter: Prompter) -> None:
    assert prompter.kept_state().keys() == prompter.state_dict().keys()


def test_with_adapters_what_is_frozen_is_neither_kept_nor_replaced(adapted: Prompter) -> None:
    kept = {name: tensor + 1 for name, tensor in adapted.kept_state().items()}
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    assert kept.keys() == trainable(adapted).keys() | {
        f"projection.{name}" for name, _ in adapted.projection.named_buffers()
    }
    adapted.load_kept_state(kept)
    after = adapted.state_dict()
    assert all(torch.equal(after[name], kept[name].to(after[name].dtype)) for name in kept)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - kept.keys())


def test_a_kept_state_of_another_model_is_noticed(
    adapted: Prompter, pristine_prompter: Prompter, prompter: Prompter
) -> None:
    kept = adapted.kept_state()
    missing = dict(list(kept.items())[1:])
    for wrong in (missing, kept | {"projection.3.weight": torch.ones(1)}, pristine_prompter.kept_state()):
        with pytest.raises(KeyError, match="missing or unknown: "):
            adapted.load_kept_state(wrong)
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapted.load_kept_state({name: tensor[..., None] for name, tensor in kept.items()})


@pytest.fixture
def stored(prompter: Prompter, tmp_path: Path) -> str:
    """A folder with a Qwen in bfloat16."""
    pytest.importorskip("peft")
    half = copy.deepcopy(prompter)
    half.language_model.bfloat16()
    return save(half, tmp_path / "stored")


@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_model_stays_in_the_dtype_that_it_was_stored_in(
    stored: str, prompter: Prompter, queries: list[Query], autocast: bool
) -> None:
    loaded, about = qwen.build_prompter(stored, Lora(4))
    assert "; frozen in bfloat16, with adapters of rank 4" in about and "cast up" not in about
    dtypes = {(weight.dtype, weight.requires_grad) for weight in loaded.parameters()}
    assert dtypes == {(torch.bfloat16, False), (torch.float32, True)}
    loaded.projection.load_state_dict(prompter.projection.state_dict())
    loaded.max_tokens = prompter.max_tokens
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prompts = loaded(queries).prompt
    prompts.square().sum().backward()
    assert prompts.dtype == torch.float32
    # bfloat16 keeps eight bits, and what is standardised is what differs between queries.
    expected = prompter(queries).prompt
    assert (prompts - expected).norm() < 0.1 * expected.norm()
    adapters = [weight for name, weight in trainable(loaded).items() if "lora_B" in name]
    assert len(adapters) == 14
    assert all(weight.grad is not None and weight.grad.norm() > 0 for weight in adapters)


def test_the_frozen_weights_of_a_pretrained_model_come_from_it_again(
    stored: str, queries: list[Query], tmp_path: Path
) -> None:
    begun, _ = qwen.build_prompter(stored, Lora(4))
    begun.save_architecture(tmp_path / "qwen")
    assert not list((tmp_path / "qwen").glob("*.safetensors"))
    restored = qwen.load_architecture(tmp_path / "qwen", stored, Lora(4))
    restored.load_kept_state(begun.kept_state())
    with torch.no_grad():
        assert torch.equal(restored(queries).prompt, begun(queries).prompt)


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (Path(folder) / "config.json").unlink()])
def test_a_pretrained_model_that_is_gone_is_asked_for(
    damage: Callable[[str], None], stored: str, tmp_path: Path
) -> None:
    damage(stored)
    with pytest.raises(UserError, match=r"^--qwen_model '.*stored' .*checkpoint holds the adapters alone\.$") as caught:
        qwen.load_architecture(tmp_path, stored, Lora(4))
    assert "\n" not in str(caught.value)


def test_adapters_are_those_that_were_asked_for(prompter: Prompter) -> None:
    pytest.importorskip("peft")
    prompter.add_lora(Lora(4, alpha=3, dropout=0.25, targets="q_proj, v_proj"))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(prompter) if "lora_" in name}
    assert names == {"q_proj", "v_proj"}
    model: Any = prompter.language_model
    adapter = model.layers[0].self_attn.q_proj
    assert adapter.scaling["default"] == 3 / 4
    assert adapter.lora_dropout["default"].p == 0.25


def test_adapters_for_layers_that_the_model_lacks_are_refused(prompter: Prompter) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"must be all-linear or some of down_proj,.*, it was 'q_proj,query'"):
        prompter.add_lora(Lora(4, targets="q_proj,query"))


@pytest.mark.parametrize("name", ["./no/such/folder", "../model", "/no/such/model", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(UserError, match="there is no such folder, and it is not a Hugging Face id") as caught:
        qwen.build_prompter(name)
    assert "\n" not in str(caught.value)


def test_an_id_that_the_hub_does_not_give_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("line one\nline two")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(UserError, match="the Hugging Face hub answers ConnectionError") as caught:
        qwen.build_prompter("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded .* as save_pretrained writes them") as caught:
        qwen.build_prompter(str(tmp_path))
    assert "\n" not in str(caught.value)

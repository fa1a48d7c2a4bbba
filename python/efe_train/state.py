"""What a checkpoint holds of a trainer: whole tensors on the host, in which no split over processes shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from efe_train.processes import sharded_like
from efe_train.qwen import Prompter

if TYPE_CHECKING:
    from efe_train.train import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """On the host, of the first process; every process has to ask for it. No process split shows in it."""
    rng = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(trainer.device)
    host = trainer.processes.on_host
    return {
        "batches_done": trainer.batches_done,
        "base": trainer.base,
        "modules": {name: host(kept_state(module)) for name, module in trainer.modules().items()},
        # Rates are set in each step, and no run changes the other settings of the optimizers.
        "optimizers": {name: host(each.state_dict()["state"]) for name, each in trainer.optimizers().items()},
        "scaler": trainer.scaler.state_dict(),
        "cache": host(trainer.cache.state_dict()),
        "qwen_grad": trainer.qwen_grad.cpu(),
        "rng": rng,
    }


def load_state(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Of a checkpoint, on the host; the run may have had another number of processes."""
    trainer.batches_done = state["batches_done"]
    for name, module in trainer.modules().items():
        load_module(module, state["modules"][name])
    for name, optimizer in trainer.optimizers().items():
        load_optimizer(optimizer, state["optimizers"][name])
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.cache.load_state_dict(state["cache"], trainer.device)
    trainer.qwen_grad = state["qwen_grad"].to(trainer.device)
    torch.set_rng_state(state["rng"]["cpu"])
    if trainer.device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"], trainer.device)


def kept_state(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module."""
    return module.kept_state() if isinstance(module, Prompter) else module.state_dict()


def load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what a checkpoint holds into a module that may be sharded."""
    own = kept_state(module)
    load = module.load_kept_state if isinstance(module, Prompter) else module.load_state_dict
    load({name: sharded_like(tensor, own.get(name, tensor)) for name, tensor in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The moments of each parameter, by its number, into an optimizer whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        int(number): {name: sharded_like(tensor, parameters[int(number)]) for name, tensor in tensors.items()}
        for number, tensors in state.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})

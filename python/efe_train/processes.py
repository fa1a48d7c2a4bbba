"""The processes that share a run, as torchrun and accelerate launch start them."""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from efe_train.config import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

R = TypeVar("R")
P = ParamSpec("P")


class Processes:
    """Which rows of a batch are this process's, and what those of all processes come to.

    Every process takes equally many rows: where a batch does not divide, the last ones repeat its first rows, and
    `whole` drops the repeats.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        """accelerator: of accelerate, which has joined the processes. Without it there is this process alone."""
        self.accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index
        # What the host has to know does not wait for a GPU: NCCL carries nothing from the CPU.
        # Torch alone holds the group: its threads end with the last reference, which is then `leave`'s to drop.
        self._hosts = weakref.ref(distributed.new_group(backend="gloo")) if self.count > 1 else None

    @property
    def hosts(self) -> distributed.ProcessGroup | None:
        """The group for what the host has to know. None where there is one process, and after `leave`."""
        return None if self._hosts is None else self._hosts()

    def positions(self, total: int) -> range:
        """The places of this process's rows in a batch of so many, which goes on with repeats from `total` on."""
        each = -(-total // self.count)
        return range(self.index * each, (self.index + 1) * each)

    def whole(self, rows: Tensor, total: int) -> Tensor:
        """The rows of all processes, [total, ...] in the order of the batch. rows: of `positions(total)`, no graph."""
        if self.accelerator is None or self.count == 1:
            return rows[:total]
        gathered: Tensor = self.accelerator.gather(rows.contiguous())
        return gathered[:total]

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make each gradient the mean over the processes. Those of sharded parameters are that already."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        gradients = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        sums = [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
        for gradient, summed in zip(gradients, sums, strict=True):
            summed.wait()
            gradient.div_(self.count)

    def on_host(self, state: Any) -> Any:
        """Nested dictionaries of tensors, whole and on the CPU in the first process; empty tensors in the others."""
        if isinstance(state, Mapping):
            return {name: self.on_host(each) for name, each in state.items()}
        if not isinstance(state, Tensor):
            return state
        tensor = full(state.detach())
        return tensor.cpu() if self.index == 0 else tensor.new_empty(0, device="cpu")

    @property
    def shards(self) -> bool:
        """Whether accelerate is configured for FSDP. Its own state only says so on GPUs."""
        return self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"

    def shard(self, model: nn.Module, like: nn.Module) -> None:
        """Split a model's parameters over the processes where `shards` says so.

        like: the part of it that knows its own blocks, as a model of transformers does.
        """
        if self.accelerator is None or not self.shards:
            return
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

        plugin = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise UserError(f"accelerate is configured for FSDP {plugin.fsdp_version}: set its fsdp_version to 2.")
        plugin.set_auto_wrap_policy(like)
        stands_alone = fsdp2_prepare_auto_wrap_policy(plugin, like) or (lambda module: False)
        mesh = init_device_mesh(self.accelerator.device.type, (self.count,))
        settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": plugin.reshard_after_forward}
        if plugin.cpu_offload:
            settings["offload_policy"] = plugin.cpu_offload
        for block in [module for module in like.modules() if stands_alone(module)]:
            fully_shard(block, **settings)
        fully_shard(model, **settings)

    def largest(self, number: int) -> int:
        """Of the processes' numbers. Waits for all of them, on the host alone."""
        if self.count == 1:
            return number
        found = torch.tensor(number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.hosts)
        return int(found)

    def by_first(self, work: Callable[[], R]) -> R:
        """What the first process's work returns, in every process: for what must be done once, as writing a file.

        Raises:
            UserError: in every process, where the work of the first has failed; there, whatever it failed with.
        """
        if self.count == 1:
            return work()
        told: list[Any] = [None, None]
        failed: Exception | None = None
        if self.index == 0:
            try:
                told[0] = work()
            except Exception as error:
                failed, told[1] = error, str(error)
        distributed.broadcast_object_list(told, src=0, group=self.hosts)
        result, problem = told
        if failed is not None:
            raise failed
        if problem is not None:
            raise UserError(problem)
        done: R = result
        return done

    def by_each(self, work: Callable[[], R]) -> R:
        """What a work returns that every process does for itself, as reading a file, and that fails for all or none.

        work: waits for no other process.

        Raises:
            UserError: in every process, where it has failed in one.
        """
        if self.count == 1:
            return work()
        problem: str | None = None
        try:
            done = work()
        except (UserError, OSError) as error:
            problem = str(error)
        problems: list[str | None] = [None] * self.count
        distributed.all_gather_object(problems, problem, group=self.hosts)
        if any(problems):
            index, problem = next((index, told) for index, told in enumerate(problems) if told)
            raise UserError(problem if index == 0 else f"process {index} of {self.count}: {problem}")
        return done


ALONE = Processes()


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """The processes that this one was started with, and its own device.

    Raises:
        UserError: there are several, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, device
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("Several processes need the package accelerate, which is not installed: pip install accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu")
    return Processes(accelerator), device if device.type == "cpu" else accelerator.device


def leave() -> None:
    """Part from the other processes, if there are any.

    A thread of gloo that still holds the tensors of the last message when Python ends aborts the process: `hosts` has
    to be gone by then, with its threads.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class Shared(Protocol):
    @property
    def processes(self) -> Processes: ...


S = TypeVar("S", bound=Shared)


def by_first(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that the first of its object's processes carries out for all of them."""

    @wraps(method)
    def shared(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.processes.by_first(lambda: method(self, *args, **kwargs))

    return shared  # type: ignore[return-value]  # mypy takes `self` for an argument with a name


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, split as another one is."""
    if not isinstance(pattern, DTensor) or tensor.shape != pattern.shape:
        return tensor
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)


def gradient_norm(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """L2 norm of all gradients, 0-d on the device, without a look at its result; 0 where there is none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=device)
    return full(nn.utils.get_total_norm(gradients).detach())

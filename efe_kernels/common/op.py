"""One declaration for an op with a gradient.

Who differentiates what is read from the signatures of the op's two references: a parameter `grad_x` of backward is the
gradient of the result x, `needs` says which gradients are asked for, and any other parameter is the argument or the
result of forward that has its name, and is kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from efe_kernels.common.library import define_op, fields_of, in_float32, is_group, parameters_of, with_groups


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(op(*args))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"{ctx.name} has no second derivative; call backward without create_graph=True.")


def first_order(name: str, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    """The gradients op(*args). Differentiating them again raises a sentence that names the function `name`."""
    if torch.is_grad_enabled():
        return tuple(_FirstOrder.apply(name, op, *args))
    return tuple(op(*args))


def spread(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for where `needs` is true, None elsewhere."""
    found = iter(gradients)
    return tuple([next(found) if need else None for need in needs])


def transformed() -> bool:
    """Whether the call is inside a transform of torch.func, such as vmap, grad or jacrev."""
    active: bool = torch._C._are_functorch_transforms_active()  # what autograd.Function asks, and torch.compile knows
    return active


def needs_function(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call must go through `apply`: for a gradient, for a transform, or to be refused in forward mode.

    An op alone would know nothing of forward mode and give tangents of 0.
    """
    in_forward_mode: bool = forward_ad._current_level >= 0
    wanted = torch.is_grad_enabled() and any([tensor is not None and tensor.requires_grad for tensor in tensors])
    return in_forward_mode or wanted or transformed()


def apply(function: type[torch.autograd.Function], plain: Callable[..., Any], *arguments: Any) -> Any:
    """function.apply, or inside a transform of torch.func the same from `plain`, in plain PyTorch, through which the
    transforms see.

    torch.compile refuses a tensor that is given twice: there every further time it is given as a view of itself.
    """
    if transformed():
        return plain(*arguments)
    if torch.compiler.is_compiling():
        given: list[Any] = []
        for argument in arguments:
            twice = isinstance(argument, Tensor) and any(argument is other for other in given)
            given.append(argument.view_as(argument) if twice else argument)
        arguments = tuple(given)
    return function.apply(*arguments)


class Wiring(NamedTuple):
    """Where backward takes its arguments from, by place.

    wrt: arguments of forward that can get a gradient. computed: those of them whose gradients backward computes.
    width: how many arguments forward has.
    differentiable: whether a result is, for each; their gradients come first among the arguments' sources.
    saved, constants: what is kept, of forward's arguments followed by its results.
    order: of the sources [gradients, needs, saved, constants], those that backward takes, in its order.
    passes: the other ones -> place of the result whose gradient is that argument's own.
    """

    wrt: tuple[int, ...]
    computed: tuple[int, ...]
    width: int
    differentiable: tuple[bool, ...]
    saved: tuple[int, ...]
    constants: tuple[int, ...]
    order: tuple[int, ...]
    passes: dict[int, int]


def results_of(forward: Callable[..., Any]) -> list[str]:
    """Names of what it returns; one tensor alone is called `result`."""
    returned = get_type_hints(forward)["return"]
    return list(fields_of(returned)) if is_group(returned) else ["result"]


def wire(
    forward: Callable[..., Any], backward: Callable[..., Any], wrt: Sequence[str], passes: Mapping[str, str]
) -> Wiring:
    arguments, results = parameters_of(forward), results_of(forward)
    names = [*arguments, *results]
    taken = list(parameters_of(backward))
    kept = [name for name in taken if name in names]
    saved = [name for name in kept if name in results or "Tensor" in str(arguments[name])]
    constants = [name for name in kept if name not in saved]
    sources = [*(f"grad_{name}" for name in results), "needs", *saved, *constants]
    return Wiring(
        wrt=tuple(names.index(name) for name in wrt),
        computed=tuple(names.index(name) for name in wrt if name not in passes),
        width=len(arguments),
        differentiable=tuple(f"grad_{name}" in taken or name in passes.values() for name in results),
        saved=tuple(names.index(name) for name in saved),
        constants=tuple(names.index(name) for name in constants),
        order=tuple(sources.index(name) for name in taken),
        passes={names.index(name): results.index(result) for name, result in passes.items()},
    )


def function_of(title: str, forward: Any, backward: Any, wiring: Wiring) -> type[torch.autograd.Function]:
    """The autograd Function over the ops `forward` and `backward`. title: what it calls itself in an error."""
    several = len(wiring.differentiable) > 1
    constant_results = [place for place, differentiable in enumerate(wiring.differentiable) if not differentiable]
    in_list = isinstance(backward.default._schema.returns[0].type, torch.ListType)
    gradients_of = backward if in_list else lambda *arguments: (backward(*arguments),)

    class Function(torch.autograd.Function):
        # Not split into forward and setup_context, which costs the call an inspection of its signature.
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = forward(*arguments)
            results = output if several else (output,)
            known = (*arguments, *results)
            ctx.set_materialize_grads(False)
            if constant_results:
                ctx.mark_non_differentiable(*[results[place] for place in constant_results])
            ctx.save_for_backward(*[known[place] for place in wiring.saved])
            ctx.constants = [known[place] for place in wiring.constants]
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            gradients: list[Tensor | None] = [None] * wiring.width
            needed = ctx.needs_input_grad  # made anew each time that it is asked for
            for place, result in wiring.passes.items():
                if needed[place]:
                    gradients[place] = grads[result]
            needs = [needed[place] for place in wiring.computed]
            if any(needs) and any([grad is not None for grad in grads]):
                sources = (*grads, needs, *ctx.saved_tensors, *ctx.constants)
                found = first_order(title, gradients_of, *[sources[place] for place in wiring.order])
                for place, gradient in zip(wiring.computed, spread(found, needs), strict=True):
                    gradients[place] = gradient
            return tuple(gradients)

    Function.__name__ = f"{title}_function"
    return Function


class DifferentiableOp:
    """An op as a function of its arguments, differentiable in some of them. Made by `differentiable_op`.

    forward, backward: the ops, `torch.ops.efe.<name>_forward` and `_backward`.
    plain: what computes the same in plain PyTorch, through which the transforms of torch.func see.
    """

    def __init__(self, title: str, forward: Any, backward: Any, plain: Callable[..., Any], wiring: Wiring) -> None:
        self.title, self.forward, self.backward, self.plain, self.wiring = title, forward, backward, plain, wiring
        self.function = function_of(title, forward, backward, wiring)

    def titled(self, title: str) -> DifferentiableOp:
        """The same op under the name of another public function."""
        return DifferentiableOp(title, self.forward, self.backward, self.plain, self.wiring)

    def __call__(self, *arguments: Any) -> Any:
        if needs_function([arguments[place] for place in self.wiring.wrt]):
            return apply(self.function, self.plain, *arguments)
        return self.forward(*arguments)


def differentiable_op(
    name: str,
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    wrt: Sequence[str],
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any] | None = None,
    like: Mapping[str, str] | None = None,
    passes: Mapping[str, str] | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    triton: str | None = None,
    triton_takes: Callable[..., bool] = in_float32,
    plain: Callable[..., Any] | None = None,
) -> DifferentiableOp:
    """Declare `torch.ops.efe.<name>_forward` and `_backward`, and the function over them.

    forward, backward: the references; backward gives the gradients of those of `wrt` that `needs` names, or, without
        that parameter, the one gradient.
    wrt: arguments of forward that can get a gradient.
    fake, triton, triton_takes: as in `define_op`.
    like: for an argument of `wrt` that backward does not keep, one of the same shape that it does.
    memory_format: of the gradients.
    fake_backward: where these cannot say what a gradient looks like.
    passes: arguments whose gradient is that of a result itself, so that backward does not compute it.
    plain: where the reference is not differentiable by autograd, one that is.
    """
    passes = passes or {}
    computed = [argument for argument in wrt if argument not in passes]
    forward_op = define_op(f"{name}_forward", reference=forward, fake=fake, triton=triton, triton_takes=triton_takes)
    examples = [(like or {}).get(argument, argument) for argument in computed]
    backward_op = define_op(
        f"{name}_backward",
        reference=backward,
        fake=fake_backward or gradients_like(backward, examples, memory_format),
        triton=triton,
        triton_takes=triton_takes,
    )
    return DifferentiableOp(
        name, forward_op, backward_op, with_groups(plain or forward), wire(forward, backward, wrt, passes)
    )


def gradients_like(
    backward: Callable[..., Any], names: Sequence[str], memory_format: torch.memory_format
) -> Callable[..., Any]:
    """Fake of a backward: each gradient that is needed has the form of the argument named for it, and, where that is a
    mask, the dtype of what arrives."""
    taken = list(parameters_of(backward))
    places = [taken.index(name) for name in names]
    upstream = [place for place, name in enumerate(taken) if name.startswith("grad_")]

    def fake(*arguments: Any) -> Any:
        def gradient(place: int) -> Tensor:
            example: Tensor = arguments[place]
            if not example.is_floating_point():
                example = example.to(next(arguments[p].dtype for p in upstream if arguments[p] is not None))
            return torch.empty_like(example, memory_format=memory_format)

        if "needs" not in taken:
            return gradient(places[0])
        return [gradient(place) for place, need in zip(places, arguments[taken.index("needs")], strict=True) if need]

    return fake

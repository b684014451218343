"""Turn one stage function into forward, input-gradient and weight-gradient kernels.

The stage's forward and `torch.autograd.grad` of it are traced together by `make_fx` into one joint
graph of functional ATen ops, on fake tensors of the rank's own device. The joint graph is then cut
by reachability:

    F = ancestors of the outputs
    B = ancestors of the gradients of boundary inputs, without F
    W = the rest: weight gradients

so what F must keep for B and W is an explicit list of tensors. W adds each weight gradient to its
buffer as soon as it exists (`addmm_` where the gradient is a matrix product), so no second copy of
the gradients is ever alive. W may be cut into parts (`StageProgram.parts`), so that gradients which
are complete can be summed over ranks while the others are computed. Ops that compute both kinds of
gradient at once are split (`split_joint_ops`), or W would be empty for convolutions. Where B
recomputes what weight gradients read (`recompute.py`), they are computed in B as well, as it would
else be kept until W.

All kernels take one list of tensors and empty it, so that a dead tensor is freed at once.
"""

from __future__ import annotations

import contextlib
import enum
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from ..compiler.ir.graph import Graph, OutputKind, Value, ValueKind
from ..compiler.ir.ops import Category
from .collective_ops import (
    StageCollectives,
    expand_local,
    has_collectives,
    mark_parameter_gathers,
)
from .fx_cut import boxed_module, cut_backward, mutates, simplify, use_addmm
from .gradient_parts import PartOf, keep_early
from .recompute import MarkedReplay, read_together

__all__ = [
    "Kernel",
    "StageKernels",
    "StageSignature",
    "WeightKernel",
    "trace_inference",
    "trace_training",
]

Kernel = Callable[[list[Tensor | None]], Sequence[Tensor | None]]
StageFunction = Callable[..., tuple[Tensor, ...]]


class Source(enum.StrEnum):
    """Where a saved or passed tensor of a backward kernel comes from.

    A `StrEnum` as it is a key of tables in every instruction: plain enums hash in Python.
    """

    ARGUMENT = "argument"  # argument of the stage function
    SAVED = "saved"  # extra result of F
    TANGENT = "tangent"  # gradient of an output
    PASSED = "passed"  # extra result of B, or of a part of W, read by later parts of W


@dataclass(frozen=True, slots=True)
class StageSignature:
    """Positions within a stage graph's arguments and outputs.

    `arguments` are the values that the stage does not compute, in id order; `trained` the
    positions (in `arguments`) of parameters with gradients, `differentiable` of boundary inputs
    with gradients; `tangents` the positions (in the graph's outputs) that receive a gradient.
    """

    arguments: tuple[Value, ...]
    trained: tuple[int, ...]
    differentiable: tuple[int, ...]
    tangents: tuple[int, ...]

    @staticmethod
    def of(graph: Graph) -> StageSignature:
        arguments = tuple(value for value in graph.values if value.kind is not ValueKind.RESULT)
        return StageSignature(
            arguments=arguments,
            trained=_positions(arguments, ValueKind.PARAMETER),
            differentiable=_positions(arguments, ValueKind.BOUNDARY),
            tangents=tuple(
                position
                for position, output in enumerate(graph.outputs)
                if output.kind in (OutputKind.LOSS, OutputKind.BOUNDARY)
                and graph.values[output.value].requires_grad
            ),
        )


def _positions(arguments: tuple[Value, ...], kind: ValueKind) -> tuple[int, ...]:
    return tuple(
        position
        for position, value in enumerate(arguments)
        if value.kind is kind and value.requires_grad and value.type.is_float
    )


@dataclass(frozen=True, slots=True)
class WeightKernel:
    """W or a part of it: adds to gradient buffers in place.

    `kernel([...]) -> [*passed]`, where `passed` are the numbers of its results as sources. It reads
    `sources`, and after those the gradient buffers of `accumulated` (positions in `arguments`).
    `name` is its key in `StageKernels.modules`.
    """

    name: str
    kernel: Kernel
    sources: tuple[tuple[Source, int], ...]
    accumulated: tuple[int, ...]
    passed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageKernels:
    """The kernels of one stage and how tensors travel between them.

    * `forward([key, *arguments]) -> [*outputs, *saved]`
    * `backward_input([...]) -> [*gradients of differentiable inputs, *passed]`
    * `backward_weights`, the parts of W in order.

    `input_sources` say, tensor by tensor, what B reads: ("argument", i), ("saved", i) and
    ("tangent", i). After those it reads the gradient buffers of `accumulated_early` (positions in
    `arguments`). `zero_inputs` are positions within the differentiable inputs whose gradient is
    structurally zero. `collectives` are those inside the kernels, where there are any.
    """

    signature: StageSignature
    num_outputs: int
    forward: Kernel
    backward_input: Kernel | None = None
    backward_weights: tuple[WeightKernel, ...] = ()
    input_sources: tuple[tuple[Source, int], ...] = ()
    accumulated_early: tuple[int, ...] = ()
    zero_inputs: tuple[int, ...] = ()
    modules: dict[str, fx.GraphModule] = field(default_factory=dict)
    collectives: StageCollectives | None = None

    @property
    def num_gradients(self) -> int:
        """How many gradients of inputs B returns."""
        return len(self.signature.differentiable) - len(self.zero_inputs)

    @property
    def is_capturable(self) -> bool:
        """Whether the kernels can be recorded as CUDA graphs."""
        return self.collectives is None or self.collectives.is_capturable

    def compiled(self) -> StageKernels:
        """The same kernels through Inductor (compiled at their first call).

        For kernels that were traced; a kernel whose collectives Inductor cannot take stays as it
        is, with a warning.
        """
        made = {
            part: _compiled_module(module, self.collectives)
            for part, module in self.modules.items()
        }
        return replace(
            self,
            forward=made.get("forward", self.forward),
            backward_input=made.get("input", self.backward_input),
            backward_weights=tuple(
                replace(part, kernel=made[part.name]) for part in self.backward_weights
            ),
        )


def _compiled_module(module: fx.GraphModule, collectives: StageCollectives | None) -> Kernel:
    bind = None if collectives is None else collectives.bind
    if not any(node.op == "call_function" for node in module.graph.nodes):
        return boxed_module(module, bind)
    if collectives is not None:
        module, reason = collectives.functional(module)
        if reason:
            warnings.warn(f"a kernel is not compiled: {reason}", stacklevel=2)
            return boxed_module(module, bind)
    compiled = torch.compile(module, dynamic=False)

    def run(tensors: list[Tensor | None]) -> Sequence[Tensor | None]:
        arguments = tuple(tensors)
        tensors.clear()
        with torch.no_grad():
            return compiled(*arguments)  # type: ignore[no-any-return]

    return run


def trace_inference(
    function: StageFunction,
    graph: Graph,
    device: torch.device,
    collectives: StageCollectives | None = None,
) -> StageKernels:
    """Kernels of a forward-only stage: the stage function itself, without autograd.

    The function may be a compiled one. (Compiling the kernel would not do: torch counts
    compilations by code, which all these kernels share, and gives up after a few.) Only a function
    with collectives is traced, as they have to be bound.
    """
    if has_collectives(graph):
        return _traced_inference(function, graph, device, collectives)

    def forward(tensors: list[Tensor | None]) -> Sequence[Tensor | None]:
        key, *rest = tensors
        tensors.clear()
        with torch.no_grad():
            return function(key, device, *rest)

    return StageKernels(StageSignature.of(graph), len(graph.outputs), forward)


def _traced_inference(
    function: StageFunction,
    graph: Graph,
    device: torch.device,
    collectives: StageCollectives | None,
) -> StageKernels:
    signature = StageSignature.of(graph)

    def forward(key: Tensor, *arguments: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(function(key, device, *arguments))

    with FakeTensorMode(), _plain_recurrent(graph):
        key = torch.zeros((), dtype=torch.int64, device=device)
        examples = [_example(value, device) for value in signature.arguments]
        traced = _functional(forward, key, *examples)
    mark_parameter_gathers(traced.graph, _held(signature))
    simplify(traced.graph)
    expand_local(traced.graph)
    traced.graph.eliminate_dead_code()
    return StageKernels(
        signature=signature,
        num_outputs=len(graph.outputs),
        forward=boxed_module(traced, None if collectives is None else collectives.bind),
        modules={"forward": traced},
        collectives=collectives,
    )


def trace_training(
    function: StageFunction,
    graph: Graph,
    device: torch.device,
    collectives: StageCollectives | None = None,
    kept: Mapping[str, PartOf] | None = None,
    parts: Sequence[Sequence[str]] = (),
) -> StageKernels:
    """F, B and W kernels of a training stage; see the module docstring.

    Args:
        function: the generated stage function.
        graph: its graph: argument and output types are read.
        device: where the stage runs (kernels chosen by torch depend on it).
        collectives: to bind those of the graph to, if it has any.
        kept: parts of gradients that are kept, by parameter; other gradients are kept whole.
        parts: parameters whose gradients each part of W completes; empty: W is in one piece.
    """
    signature = StageSignature.of(graph)
    joint = _trace_joint(function, graph, signature, device, kept or {})
    expand_local(joint.graph)
    number = {signature.arguments[p].origin: i for i, p in enumerate(signature.trained)}
    cut = cut_backward(
        joint,
        num_arguments=1 + len(signature.arguments),
        num_outputs=len(graph.outputs),
        num_input_gradients=len(signature.differentiable),
        weight_groups=_weight_groups(graph, signature),
        weight_parts=[[number[name] for name in names if name in number] for names in parts],
    )
    modules = {"forward": cut.forward, "input": cut.input}
    modules |= {_weight_name(i, cut.weights): part.module for i, part in enumerate(cut.weights)}
    for name, module in modules.items():
        if name != "forward":
            use_addmm(module)
    bind = None if collectives is None else collectives.bind
    return StageKernels(
        signature=signature,
        num_outputs=len(graph.outputs),
        forward=boxed_module(cut.forward, bind),
        backward_input=boxed_module(cut.input, bind),
        backward_weights=tuple(
            WeightKernel(
                name=_weight_name(position, cut.weights),
                kernel=boxed_module(part.module, bind),
                sources=tuple((Source(kind), index) for kind, index in part.sources),
                accumulated=tuple(signature.trained[index] for index in part.accumulated),
                passed=part.passed,
            )
            for position, part in enumerate(cut.weights)
        ),
        input_sources=tuple((Source(kind), index) for kind, index in cut.input_sources),
        accumulated_early=tuple(signature.trained[index] for index in cut.accumulated_early),
        zero_inputs=cut.zero_inputs,
        modules=modules,
        collectives=collectives if has_collectives(graph) or kept else None,
    )


def _weight_name(position: int, parts: Sequence[object]) -> str:
    return "weight" if len(parts) == 1 else f"weight {position}"


def _weight_groups(graph: Graph, signature: StageSignature) -> list[frozenset[int]]:
    """Positions in `trained` of the parameters that one node reads."""
    index = {signature.arguments[p].id: i for i, p in enumerate(signature.trained)}
    return [frozenset(index[v] for v in group if v in index) for group in read_together(graph)]


def _trace_joint(
    function: StageFunction,
    graph: Graph,
    signature: StageSignature,
    device: torch.device,
    kept: Mapping[str, PartOf],
) -> fx.GraphModule:
    """Graph of `(key, *arguments, *tangents) -> (*outputs, *input grads, *weight grads)`."""
    wanted = {*signature.trained, *signature.differentiable}
    order = [*signature.differentiable, *signature.trained]
    names = [signature.arguments[position].origin for position in signature.trained]

    def joint(
        key: Tensor, arguments: list[Tensor], tangents: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        leaves = [
            tensor.detach().requires_grad_() if position in wanted else tensor
            for position, tensor in enumerate(arguments)
        ]
        with torch.enable_grad():
            outputs = function(key, device, *leaves)
        pairs = [
            (outputs[position], tangent)
            for position, tangent in zip(signature.tangents, tangents, strict=True)
            if outputs[position].requires_grad
        ]
        gradients: Sequence[Tensor | None] = [None] * len(order)
        if pairs and order:
            gradients = torch.autograd.grad(
                [output for output, _ in pairs],
                [leaves[position] for position in order],
                [tangent for _, tangent in pairs],
                allow_unused=True,
            )
        found = list(gradients)
        for index, name in enumerate(names, len(signature.differentiable)):
            gradient = found[index]
            if name in kept and gradient is not None:
                found[index] = kept[name].of(gradient)
        return [output.detach() for output in outputs], found

    # One thread, so that backward is recorded in one order on all ranks that share the stage.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with FakeTensorMode(), _plain_recurrent(graph), one_thread:
        key = torch.zeros((), dtype=torch.int64, device=device)
        arguments = [_example(value, device) for value in signature.arguments]
        tangents = [
            _example(graph.values[graph.outputs[position].value], device)
            for position in signature.tangents
        ]
        traced = _functional(joint, key, arguments, tangents)
    mark_parameter_gathers(traced.graph, _held(signature))
    keep_early(traced.graph, (len(names) - i for i, name in enumerate(names) if name in kept))
    return traced


def _held(signature: StageSignature) -> list[int]:
    """Positions of the parameters among the placeholders of a trace, whose first is the key."""
    return [
        position
        for position, value in enumerate(signature.arguments, 1)
        if value.kind is ValueKind.PARAMETER
    ]


def _functional(function: Callable[..., object], *examples: object) -> fx.GraphModule:
    """Trace of `function`, without ops that work in place."""
    traced = make_fx(function)(*examples)
    if mutates(traced.graph):
        traced = make_fx(functionalize(MarkedReplay(traced).run))(*examples)
    left = mutates(traced.graph)
    assert not left, f"in-place ops survive functionalisation: {left}"
    return traced


def _plain_recurrent(graph: Graph) -> contextlib.AbstractContextManager[object]:
    """Keep oneDNN away from recurrent layers: its backward needs a workspace of the real forward,
    which a trace on fake tensors does not have."""
    if any(node.op.category is Category.RECURRENT for node in graph.nodes):
        return torch.backends.mkldnn.flags(enabled=False)
    return contextlib.nullcontext()


def _example(value: Value, device: torch.device) -> Tensor:
    return torch.empty(value.type.shape, dtype=value.type.dtype, device=device)

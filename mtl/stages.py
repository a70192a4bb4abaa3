"""Cut any network at named layer points into stages that can be run one after the other.

Trace with torch.fx but enter only the ancestors of the layer points; every other module stays one opaque call. Cut that tiny
graph after each point. Because blocks are never traced, control flow, dropout and stochastic depth inside them stay live,
and because a stage calls the network's own modules by their own names, state-dict keys stay the network's own.

A stage owns nothing: it is a function of (network, x), so the same stages run every tower of one architecture.

What cannot be cut is refused, with the reason: unknown points, points out of order, modules that run twice, a value that skips
past a point (a cut inside a residual block), and code above the points that depends on `self.training`. Code that depends on
the *values* of the input above the points cannot be traced and is refused too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from mtl.errors import ConfigError, unknown

END = "<end>"


class ModuleName(str):
    """The name of a Python module, standing for it in a pickled stage."""


@dataclass
class Stage:
    """The run of layers that ends at layer point `point` (`END` for the last one).

    `modules` are the names, in the network, of what it uses; anything else may be missing from the network it is run on.
    """

    point: str
    source: str
    modules: tuple[str, ...]
    _globals: dict[str, Any]
    _forward: Callable[[nn.Module, Tensor], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        scope = dict(self._globals)
        exec(compile(self.source, f"<stage up to {self.point}>", "exec"), scope)
        self._forward = scope["forward"]

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Run this stage with the modules of `network`: the previous point's output -> this point's output."""
        return self._forward(network, x)

    def __getstate__(self) -> dict[str, Any]:
        """Generated code and modules do not pickle (or deep-copy); their text and names do."""
        state = {key: value for key, value in self.__dict__.items() if key not in ("_forward", "_globals")}
        state["globals"] = {k: ModuleName(v.__name__) if isinstance(v, ModuleType) else v for k, v in self._globals.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        found = state.pop("globals")
        self._globals = {k: importlib.import_module(v) if isinstance(v, ModuleName) else v for k, v in found.items()}
        self.__dict__.update(state)
        self.__post_init__()


class CutError(ConfigError):
    """A network that cannot be cut at these layer points, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__([reason], source="layer points")


class _NeverCalledError(CutError):
    """A submodule that is a mere container."""


def cut(network: nn.Module, points: Sequence[str]) -> list[Stage]:
    """Stages of `network` that end at each of `points`, and a last one that runs to its output.

    Running them in order is bitwise the same as running the network, in training and in evaluation mode.

    Args:
        network: takes one tensor (B, ...) and returns one tensor.
        points: names of submodules (as in `named_modules()`), in execution order; may be empty, and then nothing is traced.

    Raises:
        CutError: no such cut; the message says why, and offers the right spelling for an unknown name.
    """
    known = [name for name, _ in network.named_modules() if name]
    for point in points:
        if point not in known:
            raise CutError(unknown("layer point", point, known))
    if len(set(points)) < len(points):
        raise CutError(f"a layer point is named twice: {', '.join(points)}")
    for point in points:
        if inner := [other for other in points if other.startswith(point + ".")]:
            raise CutError(f"layer point {point!r} contains layer point {inner[0]!r}; name the last module inside it instead")
    if not points:
        modules = tuple(name for name, _ in (*network.named_children(), *network.named_parameters(recurse=False)))
        return [Stage(END, "def forward(self, x):\n    return self(x)\n", modules, {})]
    return _stages(_trace(network, points), points)


Traces = tuple[fx.Graph, fx.Graph]
"""A network traced in evaluation and in training mode."""


def _stages(traces: Traces, points: Sequence[str]) -> list[Stage]:
    evaluating, training = (_pieces(graph, points) for graph in traces)
    stages = []
    for point, graph, other in zip([*points, END], evaluating, training, strict=True):
        code, train_code = graph.python_code("self"), other.python_code("self")
        if code.src != train_code.src:
            raise CutError(
                f"the code before layer point {point!r} reads self.training outside a submodule (a functional dropout, say); "
                "replace it by a module, or choose points further from it"
            )
        modules = tuple(dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")))
        stages.append(Stage(point, code.src, modules, dict(code.globals)))
    return stages


def legal_points(network: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Every submodule at which `network` can be cut on its own, and the reasons against the others."""
    legal: list[str] = []
    illegal: dict[str, str] = {}
    closed: list[str] = []  # what rules out a module rules out everything inside it
    traces: dict[str, Traces] = {}  # siblings have the same ancestors, and so the same trace
    for name, _ in network.named_modules():
        if not name:
            continue
        if outer := next((module for module in closed if name.startswith(module + ".")), None):
            illegal[name] = f"inside {outer!r}: {illegal[outer]}"
            continue
        parent = name.rpartition(".")[0]
        try:
            if parent not in traces:
                traces[parent] = _trace(network, [name])
            _stages(traces[parent], [name])
        except CutError as error:
            illegal[name] = error.problems[0]
            if not isinstance(error, _NeverCalledError):  # the items of a list that is never called are called themselves
                closed.append(name)
        else:
            legal.append(name)
    return legal, illegal


def module_outputs(network: nn.Module, x: Tensor) -> dict[str, tuple[int, ...] | str]:
    """Shape of one sample's output of every submodule, in the order they finish, by one pass in evaluation mode.

    The name of its type in place of the shape where a module gives something other than one batched tensor.

    Raises:
        CutError: the network fails on this input.
    """
    outputs: dict[str, tuple[int, ...] | str] = {}

    def note(name: str, y: Any) -> None:
        batched = isinstance(y, Tensor) and y.ndim >= 2 and y.shape[0] == x.shape[0]
        outputs[name] = tuple(y.shape[1:]) if batched else f"{type(y).__name__}{tuple(getattr(y, 'shape', ()))}"

    hooks = [
        module.register_forward_hook(lambda _, __, y, name=name: note(name, y))
        for name, module in network.named_modules()
        if name
    ]
    try:
        probe(network, cut(network, ()), x)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def keep_only(network: nn.Module, modules: Sequence[str]) -> None:
    """Delete every submodule and parameter of `network` that is not (in) one of `modules`, in place."""
    wanted = set(modules)

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in list(module.named_children()):
            path = prefix + name
            if path in wanted:
                continue
            if any(other.startswith(path + ".") for other in wanted):
                walk(child, path + ".")
            else:
                delattr(module, name)
        for store in (module._parameters, module._buffers):
            for name in [name for name in store if prefix + name not in wanted]:
                del store[name]

    walk(network, "")


class _Entry(nn.Module):
    """Hides the optional arguments of a network's `forward` from the trace."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


class _AncestorTracer(fx.Tracer):
    """Enters the ancestors of the layer points only; every other module stays one opaque call."""

    def __init__(self, points: Sequence[str]) -> None:
        super().__init__()
        self.entered = {"network"}
        for point in points:
            parts = point.split(".")
            self.entered |= {"network." + ".".join(parts[:i]) for i in range(1, len(parts))}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.entered


def _trace(network: nn.Module, points: Sequence[str]) -> Traces:
    was_training = network.training
    try:
        entry = _Entry(network)
        return _AncestorTracer(points).trace(entry.eval()), _AncestorTracer(points).trace(entry.train())
    except Exception as error:  # whatever the network's own code raises when run on a symbol
        raise CutError(
            f"{type(network).__name__} cannot be traced above its layer points {list(points)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        network.train(was_training)


def _pieces(graph: fx.Graph, points: Sequence[str]) -> list[fx.Graph]:
    nodes = [node for node in graph.nodes if node.op != "output"]
    result = graph.output_node().args[0]
    if not isinstance(result, fx.Node):
        raise CutError(f"the network must return one tensor; found {type(result).__name__}")
    where = _locate(nodes, points)
    bounds = [where[point] + 1 for point in points] + [len(nodes)]
    results = [nodes[where[point]] for point in points] + [result]
    pieces, start, carry, last = [], 0, nodes[0], "the input"
    for point, stop, out in zip([*points, END], bounds, results, strict=True):
        pieces.append(_piece(nodes[start:stop], carry, out, last))
        start, carry, last = stop, out, point
    return pieces


def _locate(nodes: Sequence[fx.Node], points: Sequence[str]) -> dict[str, int]:
    where: dict[str, int] = {}
    for i, node in enumerate(nodes):
        name = str(node.target).removeprefix("network.") if node.op == "call_module" else ""
        if name in points:
            if name in where:
                raise CutError(f"layer point {name!r} runs more than once in one forward pass")
            where[name] = i
    if lost := [point for point in points if point not in where]:
        raise _NeverCalledError(f"layer points that the forward pass never reaches as a call: {', '.join(lost)}")
    if (order := sorted(points, key=where.__getitem__)) != list(points):
        raise CutError(f"layer points must be in execution order: {', '.join(order)}; found {', '.join(points)}")
    return where


def _piece(nodes: Sequence[fx.Node], carry: fx.Node, out: fx.Node, last: str) -> fx.Graph:
    """The nodes between two cuts as a graph of its own, whose one input is the previous point's output."""
    graph = fx.Graph()
    copies = {carry: graph.placeholder("x")}

    def copy(node: fx.Node) -> None:
        new = graph.node_copy(node, lambda argument: copies[argument])
        if node.op in ("call_module", "get_attr"):
            new.target = str(node.target).removeprefix("network.")
        copies[node] = new

    for node in nodes:
        if node.op in ("placeholder", "get_attr"):  # attributes are copied by the piece that reads them
            continue
        for argument in node.all_input_nodes:
            if argument in copies:
                continue
            if argument.op != "get_attr":
                raise CutError(
                    f"cannot cut at {last!r}: {_shown(node)} also needs {_shown(argument)}, which skips past it (inside a "
                    "residual or dense block); choose the end of a block"
                )
            copy(argument)
        copy(node)
    if out not in copies:
        raise CutError(f"the network's output does not depend on what comes after layer point {last!r}")
    graph.output(copies[out])
    graph.lint()
    return graph


def _shown(node: fx.Node) -> str:
    return str(node.target).removeprefix("network.") if node.op == "call_module" else node.name


def probe(network: nn.Module, stages: Sequence[Stage], x: Tensor) -> list[tuple[int, ...]]:
    """Shape of one sample's output of each stage, by one forward pass in evaluation mode.

    Raises:
        CutError: a stage fails on this input, or gives something other than one batched tensor.
    """
    was_training = network.training
    shapes = []
    try:
        network.eval()
        with torch.no_grad():
            for stage in stages:
                try:
                    y = stage(network, x)
                except Exception as error:  # the network's own code may raise anything
                    raise CutError(
                        f"the network fails on its way to {stage.point!r} with an input of shape {tuple(x.shape[1:])}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                if not isinstance(y, Tensor) or y.ndim < 2 or y.shape[0] != x.shape[0]:
                    found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                    raise CutError(f"layer point {stage.point!r} must give one tensor (B, C, ...); found {found}")
                shapes.append(tuple(y.shape[1:]))
                x = y
    finally:
        network.train(was_training)
    return shapes

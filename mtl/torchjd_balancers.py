"""TorchJD's methods as balancers: every aggregator and every scalarization of its 0.18, by its class name in lower case.

An aggregator combines the gradients of the losses with respect to what the tasks share; a scalarization combines the losses.
Four names exist on both sides and say which they are: `sum_gradients`, `sum_losses`, and so on. The options of a method are the
arguments of its constructor that a config can hold, with TorchJD's own defaults and words.

Needs the extra `balance`. TorchJD's own extra `full` would bring `quadprog` and `ecos`, which are under the GPL: UPGrad and
DualProj run on a projector of ours instead, and NashMTL asks for `ecos`.

What a method gathers while it runs (FAMO's Adam moments, DWA's averages, ExcessMTL's sums of squares) is saved with a run, so
that it can go on, but is not among its weights; its parameters are.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, Field, create_model
from torch import Tensor, nn

from mtl.balancing import Balancer, Scalarization
from mtl.errors import ConfigError, MTLError, PluginError, RunError
from mtl.memory import memory_of, recall
from mtl.options import Options
from mtl.registry import register_balancer
from mtl.seeding import seeded

try:
    import numpy as np
    from scipy.optimize import nnls
    from torchjd import aggregation, scalarization
    from torchjd.aggregation import Aggregator, GramianWeightedAggregator
    from torchjd.autojac import jac_to_grad, mtl_backward
    from torchjd.linalg import DualConeProjector, PSDMatrix
    from torchjd.scalarization import Scalarizer
except ImportError as missing:
    raise PluginError(f"TorchJD or SciPy is missing ({missing}); pip install 'crosstitch[balance]'") from missing

GPL = ("ecos", "quadprog")
"""What TorchJD can use and this project never depends on."""

FILLED = ("shape", "n_tasks")
"""Arguments of TorchJD's constructors that are the number of tasks."""


class NNLSProjector(DualConeProjector):
    """Projects onto the dual cone of the gradients by non-negative least squares, in place of the GPL solver of TorchJD.

    The problem is min v^T G v subject to v >= u (Quinton and Rey 2024, arXiv 2406.16232, Proposition 1). With v = u + x and
    G = L L^T it is min |L^T x + L^T u|^2 over x >= 0, which is Lawson and Hanson's (1974).

    `norm_eps` and `reg_eps` are those of TorchJD's projector: gradients whose squared norms sum to less than the first are not
    projected at all, and the second, added to the diagonal of a Gramian of trace 1, keeps it positive definite. A task whose
    gradient is a hundredth of the others' is therefore protected in part only.
    """

    def __init__(self, norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> None:
        self.norm_eps = norm_eps
        self.reg_eps = reg_eps

    def __call__(self, U: Tensor, G: PSDMatrix) -> Tensor:  # noqa: N803 (TorchJD's names)
        """U (..., T) and G (T, T) -> weights of U's shape; not numbers where G is not finite, as after a loss that exploded."""
        gramian = G.detach().cpu().double().numpy()
        wanted = U.detach().cpu().double().numpy()
        if not np.isfinite(gramian).all():
            return torch.full_like(U, torch.nan)
        trace = np.trace(gramian)
        normalised = gramian / trace if trace >= self.norm_eps else np.zeros_like(gramian)
        root = np.linalg.cholesky(normalised + self.reg_eps * np.eye(len(gramian))).T
        rows = wanted.reshape(-1, len(gramian))
        projected = np.stack([u + nnls(root, -root @ u)[0] for u in rows])
        return torch.as_tensor(projected.reshape(wanted.shape), dtype=G.dtype, device=G.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"


def move_state(module: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """`move` the tensors that TorchJD's methods keep as plain attributes, which torch does not know to move."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                vars(part)[name] = move(value)
            elif isinstance(value, list) and any(isinstance(one, Tensor) for one in value):
                vars(part)[name] = [move(one) if isinstance(one, Tensor) else one for one in value]


def leave_out_of_weights(module: nn.Module) -> None:
    """Keep buffers that a method makes on its first call out of `state_dict`: a fresh one has no place for them, and TorchJD
    throws away any it did not make itself.
    """
    for part in module.modules():
        for name in [name for name, buffer in part._buffers.items() if buffer is None]:
            part.register_buffer(name, None, persistent=False)


class Aggregation(Balancer):
    """A TorchJD aggregator: T gradients of what the tasks share become one; heads have their own task's gradient.

    Each step costs T backward passes through what is shared, memory for T gradients of it, and a wait for the device. One
    process: under data parallelism the T gradients would have to be averaged over processes before they are combined.

    Most methods average the gradients (UPGrad and DualProj, whose preference is 1/T, MGDA, AlignedMTL, CAGrad, IMTL-G), where
    `fixed`, PCGrad, GradVac and GradDrop add them up: with SGD, a learning rate tuned for one is off by the factor T for the
    other. Adam cancels the factor, but not against L2 or clipping.
    """

    def __init__(self, method: Aggregator) -> None:
        super().__init__()
        leave_out_of_weights(method)
        self.method = method

    def backward(
        self, losses: Sequence[Tensor], features: Sequence[Tensor], shared_parameters: Sequence[nn.Parameter]
    ) -> Tensor:
        """Heads: the gradient of their own loss. Shared parameters: the aggregate of the T gradients, over all of them at once.
        Frozen ones, and those that no loss depends on, are left alone.

        Returns:
            The sum of the losses: there is no objective whose gradient this would be.
        """
        branches = [f for f in features if f.requires_grad]
        untrained = sum(not loss.requires_grad for loss in losses)
        if untrained or not branches:
            found = f"{untrained} of {len(losses)} losses depend on nothing that is trained" if untrained else "all are frozen"
            raise ConfigError(
                [f"balancer: {type(self.method).__name__} combines gradients of shared parameters; {found}; use fixed"]
            )
        mtl_backward(losses, features=branches, parallel_chunk_size=1)  # one task at a time: no vmap, less memory
        reached = [p for p in shared_parameters if hasattr(p, "jac")]
        largest = torch.stack(torch._foreach_norm([p.jac for p in reached], float("inf")))
        if not bool(largest.isfinite().all()):  # the methods fail on it, each in its own way; such a step is left out
            for p in reached:
                del p.jac
                p.grad = torch.full_like(p, float("nan"))
            return torch.stack([loss.detach() for loss in losses]).sum()
        try:
            # T x T products parameter by parameter, where that is all a method asks for: a long matrix less to hold
            if isinstance(self.method, GramianWeightedAggregator):
                jac_to_grad(reached, self.method, optimize_gramian_computation=True)
            else:
                jac_to_grad(reached, self.method)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # cvxpy, scipy and LAPACK each have their own for a matrix they cannot use
            values = ", ".join(f"{loss.item():.4g}" for loss in losses)
            raise RunError(
                f"balancer: {type(self.method).__name__} failed on the gradients of a step with losses {values}: "
                f"{type(error).__name__}: {error}; if they are no longer finite, try a lower optim.lr"
            ) from error
        return torch.stack([loss.detach() for loss in losses]).sum()

    def memory(self) -> dict[str, Any]:
        """What the method has gathered."""
        return memory_of(self.method)

    def recall(self, memory: dict[str, Any], device: torch.device) -> None:
        """Give it back to the method."""
        recall(self.method, memory, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Aggregation:
        super()._apply(fn, recurse)
        move_state(self.method, fn)
        return self


class LossCombination(Scalarization):
    """A TorchJD scalarizer. One that takes a step of its own, after every update or every epoch, gets it; such a one remembers
    losses, and so is shown finite ones only.
    """

    def __init__(self, method: Scalarizer) -> None:
        super().__init__()
        leave_out_of_weights(method)
        self.method = method
        self.needs_finite = hasattr(method, "update") or hasattr(method, "step")

    def combine(self, losses: Tensor) -> Tensor:
        """losses (T,) -> a scalar."""
        return self.method(losses)

    def after_step(self, losses: Callable[[], Tensor]) -> None:
        """Give the losses after the update to a method that learns from them (FAMO, Liu et al. 2023, arXiv 2306.03792)."""
        if (update := getattr(self.method, "update", None)) is not None:
            update(losses())

    def after_epoch(self) -> None:
        """Tell a method that keeps averages over epochs (DWA, Liu et al. 2019, arXiv 1803.10704) that one has ended."""
        if (step := getattr(self.method, "step", None)) is not None:
            step()

    def optimised(self) -> Iterable[nn.Parameter]:
        """None of a method that learns by its own `update`: its optimizer is inside it."""
        return () if hasattr(self.method, "update") else self.parameters()

    def memory(self) -> dict[str, Any]:
        """What the method has gathered."""
        return memory_of(self.method)

    def recall(self, memory: dict[str, Any], device: torch.device) -> None:
        """Give it back to the method."""
        recall(self.method, memory, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossCombination:
        super()._apply(fn, recurse)
        move_state(self.method, fn)
        return self


def concrete(module: types.ModuleType, base: type) -> list[type[Any]]:
    """The methods among a module's public classes: subclasses of `base` that no other one of them derives from."""
    public = [getattr(module, name) for name in module.__all__]
    classes = [c for c in public if issubclass(c, base) and not inspect.isabstract(c)]
    return [c for c in classes if not any(other is not c and issubclass(other, c) for other in public)]


def method_names() -> dict[str, tuple[type[Any], type[Aggregation] | type[LossCombination]]]:
    """Name -> a TorchJD class and what wraps it."""
    sides: tuple[tuple[str, list[type[Any]], type[Aggregation] | type[LossCombination]], ...] = (
        ("gradients", concrete(aggregation, Aggregator), Aggregation),
        ("losses", concrete(scalarization, Scalarizer), LossCombination),
    )
    spelt = [c.__name__.lower() for _, classes, _ in sides for c in classes]
    found: dict[str, tuple[type[Any], type[Aggregation] | type[LossCombination]]] = {}
    for side, classes, wrapper in sides:
        for c in classes:
            name = c.__name__.lower()
            found[f"{name}_{side}" if spelt.count(name) > 1 else name] = (c, wrapper)
    return found


def parts(annotation: Any) -> tuple[Any, ...]:
    """What a union is of; anything else is of itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def held(annotation: Any) -> Any:
    """The type of an argument as a config holds it: tensors are lists of numbers. None where a config cannot hold it."""
    known = []
    for part in parts(annotation):
        if part is Tensor:
            known.append(list[float])
        elif part in (int, float, bool, str, type(None)) or get_origin(part) is Literal:
            known.append(part)
        else:
            return None
    return Union[tuple(known)]  # noqa: UP007 (made at run time)


def first_sentences(docstring: str) -> dict[str, str]:
    """Argument -> the first sentence that a docstring in Sphinx's style says of it, without markup."""
    described = {}
    for name, text in re.findall(r":param (\w+):(.*?)(?=\n\s*:(?:param |returns?:)|\n\s*\n|\Z)", docstring, re.DOTALL):
        plain = re.sub(r":[\w:]+:`~?([^`]*)`", r"\1", " ".join(text.split())).replace("``", "")
        described[name] = re.split(r"(?<=[.?!])\s+(?=[A-Z])", plain)[0]
    return described


def options_of(method: type[Any]) -> type[Options] | None:
    """The options model of a TorchJD class, from its constructor; None where it takes nothing that a config could hold."""
    hints, about = get_type_hints(method.__init__), first_sentences(inspect.getdoc(method) or "")
    fields: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(method.__init__).parameters.items())[1:]:
        required = parameter.default is inspect.Parameter.empty
        kind = held(hints[name])
        if name in FILLED or DualConeProjector in parts(hints[name]):
            continue
        if kind is None and not required:  # GradDrop's function, say
            continue
        if kind is None:
            raise TypeError(f"{method.__name__}({name}: {hints[name]}) has no place in a config")
        if list[float] in parts(kind) and float not in parts(kind):
            about[name] = f"{about.get(name, '')} One number per task.".strip()
        fields[name] = (kind, Field(... if required else parameter.default, description=about.get(name)))
    return create_model(f"{method.__name__}Options", __base__=Options, **fields) if fields else None


def arguments_of(method: type[Any], given: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """What to call a TorchJD class with: options as they were given, lists as tensors, and what the tasks determine.

    Raises:
        ConfigError: a list with a number per task that has another length; all of them.
    """
    hints, wrong = get_type_hints(method.__init__), []
    arguments: dict[str, Any] = {}
    for name in list(inspect.signature(method.__init__).parameters)[1:]:
        value = given.get(name)
        if name in FILLED:
            arguments[name] = len(tasks)
        elif DualConeProjector in parts(hints[name]):
            arguments[name] = NNLSProjector()
        elif isinstance(value, list):
            arguments[name] = torch.tensor(value, dtype=torch.get_default_dtype())
            if float not in parts(hints[name]) and len(value) != len(tasks):
                found = f"found {len(value)}"
                wrong.append(f"balancer.{name}: one number for each of {len(tasks)} tasks ({', '.join(tasks)}); {found}")
        elif name in given:
            arguments[name] = value
    if wrong:
        raise ConfigError(wrong)
    return arguments


def make_method(name: str, method: type[Any], given: Mapping[str, Any], tasks: Sequence[str]) -> Any:
    """A fresh TorchJD object, after another like it has been tried on T made-up gradients, or losses.

    Raises:
        ConfigError: values that TorchJD refuses, or that do not go with this number of tasks.
        PluginError: it needs a package that is not installed.
    """
    arguments = arguments_of(method, given, tasks)
    try:
        trial = method(**arguments)
        with seeded(0, "trial"):
            trial(torch.eye(len(tasks)) if issubclass(method, Aggregator) else torch.ones(len(tasks)))
        return method(**arguments)
    except MTLError:
        raise
    except ImportError as error:
        packages = re.findall(r"'(\w+)'", str(error)) or [str(error)]
        licence = [package for package in packages if package in GPL]
        advice = (
            f"{' and '.join(licence)} is under the GPL and therefore no part of crosstitch[balance]; install it yourself if "
            "that licence suits you"
            if licence
            else "pip install 'crosstitch[balance]'"
        )
        raise PluginError(f"balancer {name!r} needs {' and '.join(packages)}, which is not installed; {advice}") from error
    except ValueError as error:
        raise ConfigError([f"balancer {name!r} with {len(tasks)} tasks: {error}"]) from error


def _register(name: str, method: type[Any], wrapper: type[Aggregation] | type[LossCombination]) -> Callable[..., Balancer]:
    def factory(tasks: Sequence[str], options: BaseModel | None = None) -> Balancer:
        return wrapper(make_method(name, method, dict(options) if options is not None else {}, tasks))

    factory.__name__ = factory.__qualname__ = name  # as the entry point calls it
    factory.__doc__ = inspect.getdoc(method)
    return register_balancer(name, options=options_of(method))(factory)


METHODS = method_names()
assert not METHODS.keys() & globals().keys()
globals().update({name: _register(name, method, wrapper) for name, (method, wrapper) in METHODS.items()})

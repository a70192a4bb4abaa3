"""Heads: what a task predicts from features, how that is scored, and what its outputs mean.

A head is a description (class names, options); `build` makes the module that learns. The trainer knows heads by this interface
alone, so any other kind of prediction is a subclass of `Head` in a plugin. Bundled: `mtl.classification`, `mtl.multilabel`,
`mtl.regression`, `mtl.ordinal`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mtl.errors import ConfigError, DataError, MTLError
from mtl.metrics import Metric


class Head(ABC):
    """From one tower's features to one task's output, with what is needed to train, score and read it.

    A subclass gives `build`, `targets`, `loss`, `metrics`, `predictions` and `decode`; `fitted`, `labelled`, `describe` and
    `restored` have defaults, which suit a head that takes nothing from the training data. One that does derives from
    `DataclassHead`, where what was taken is a field like any other.
    """

    consumes: ClassVar[Literal["vector", "map"]] = "vector"
    """What `build` can be given: "vector": features (D,), or a map (C, H, W) that the head reduces itself, as `FeatureHead`
    does; "map": features (C, H, W) only, for dense prediction. A backbone that gives vectors is then refused."""

    @abstractmethod
    def build(self, features: tuple[int, ...]) -> nn.Module:
        """The module: features (B, *features) -> output (B, ...). `features` is the shape of one sample's features."""

    @abstractmethod
    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        """What the loss receives for `labels` (N, ...) as the dataset stores them, where `valid`; anything finite elsewhere.

        Raises:
            DataError: a label out of range or not finite, with its position and value.
        """

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Unreduced loss, one value per label: output (B, ...), target as `targets` made it -> (B,) or the target's shape."""

    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The default metrics; exactly one carries the score."""

    @abstractmethod
    def predictions(self, output: Tensor) -> Tensor:
        """What the metrics compare with the targets."""

    @abstractmethod
    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Outputs (B, ...) in words: one mapping per sample, plain enough for JSON."""

    def fitted(self, target: Tensor, valid: Tensor) -> Self:
        """The head with what it takes from the training split: a mean and deviation, class frequencies. Default: as it is.

        Args:
            target: all training targets, as `targets` made them.
            valid: bool, (N,) or the target's shape: where they exist.

        Raises:
            DataError: this head cannot be learned from these targets (a class never seen, a target that never varies).
        """
        return self

    def named(self, classes: Sequence[str]) -> Head:
        """The head for a target whose dataset says what its labels stand for. Default: as it is."""
        return self

    def class_names(self) -> tuple[str, ...] | None:
        """What the labels 0, 1, ... stand for; None where they are no classes. A dataset that names them in another order has
        its labels renumbered.
        """
        return None

    def column_names(self) -> tuple[str, ...] | None:
        """What the columns of labels (N, K) stand for; None where they have no names. Of a dataset that names its columns they
        are taken by these.
        """
        return None

    def averaged(self, outputs: Sequence[Tensor]) -> Tensor:
        """Several models' outputs for the same samples as one, for an ensemble. Default: their mean; where outputs are logits,
        those of the mean probabilities.
        """
        return torch.stack(list(outputs)).mean(0)

    def labelled(self, predictions: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What the metrics receive where some labels are missing. Default: the predictions and targets that are `valid`."""
        return predictions[valid], target[valid]

    def describe(self) -> dict[str, Any]:
        """What a reader of a checkpoint needs to know of this head, what was fitted included; plain enough for JSON."""
        kind = type(self)
        bundled = kind.__module__.startswith("mtl.")
        return {"head": kind.__name__ if bundled else f"{kind.__module__}:{kind.__qualname__}"}

    def restored(self, description: dict[str, Any]) -> Self:
        """The head as it was when it wrote `description`, so that a run can be scored without its training data."""
        return self


class DataclassHead(Head):
    """A head whose dataclass fields are plain values, and say all there is to say: described and restored by them."""

    def describe(self) -> dict[str, Any]:
        """The head's kind and every field."""
        return {**super().describe(), **{name: getattr(self, name) for name in self._fields()}}

    def restored(self, description: dict[str, Any]) -> Self:
        """A head of this kind with the fields of `description`."""
        return self.restored_from(description)

    @classmethod
    def restored_from(cls, description: Mapping[str, Any]) -> Self:
        """A head of this kind with the fields of `description`; what an older one does not mention is at its default."""
        return cls(**{name: description[name] for name in cls._fields() if name in description})

    @classmethod
    def _fields(cls) -> list[str]:
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]


class FromClasses(Head):
    """A head that is made when the dataset has said what its classes are: `FromClasses(Classification, label_smoothing=0.1)`.

    Args:
        kind: takes the class names first.
        options: its other arguments.
    """

    def __init__(self, kind: Callable[..., Head], **options: Any) -> None:
        self.kind, self.options = kind, options

    def named(self, classes: Sequence[str]) -> Head:
        """The head."""
        return self.kind(classes, **self.options)

    def restored(self, description: dict[str, Any]) -> Head:  # type: ignore[override]
        """The head that wrote `description`, for the classes in it."""
        return self.named(description["classes"]).restored(description)

    def metrics(self) -> tuple[Metric, ...]:
        """Those of the head, whose names do not depend on its classes."""
        return self.named(("0", "1")).metrics()

    def build(self, features: tuple[int, ...]) -> nn.Module:
        raise self._unnamed()

    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        raise self._unnamed()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        raise self._unnamed()

    def predictions(self, output: Tensor) -> Tensor:
        raise self._unnamed()

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        raise self._unnamed()

    def _unnamed(self) -> DataError:
        return DataError(
            "this task takes its classes from the dataset, which names none for this target: if it holds numbers, the task is "
            "a regression; else name them, in the dataset's options where it has `classes`, or by ArrayDataset(classes=...)"
        )


class FeatureHead(nn.Sequential):
    """Linear readout of a feature vector; a feature map (C, H, W) is averaged over its positions first."""

    def __init__(self, features: tuple[int, ...], outputs: int) -> None:
        pool: list[nn.Module] = [SpatialMean()] if len(features) > 1 else []
        super().__init__(*pool, nn.Linear(features[0], outputs))


class SpatialMean(nn.Module):
    """(B, C, ...) -> (B, C). A mean, not an adaptive pool, whose backward is not deterministic on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


@lru_cache(maxsize=256)
def constant(values: float | tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers of a head as a float32 tensor, made once per device: a loss must not make the device wait for the host."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def numbers(what: str, given: Any) -> tuple[float, ...]:
    """A sequence of finite numbers as floats.

    Raises:
        MTLError: something else.
    """
    try:
        found = tuple(float(value) for value in given)
    except (TypeError, ValueError):
        found = (math.nan,)
    if not all(math.isfinite(value) for value in found):
        raise MTLError(f"{what} takes a sequence of finite numbers; found {given!r}")
    return found


def class_names(head: str, given: Sequence[str], least: int = 2) -> tuple[str, ...]:
    """The names of a head's classes, checked.

    Raises:
        MTLError: not a sequence, too few, or two of them equal.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise MTLError(f"{head}(classes=...) takes a sequence of names, as in ('even', 'odd'); found {given!r}")
    names = tuple(str(name) for name in given)
    if len(names) < least or len(set(names)) < len(names):
        raise MTLError(f"{head} needs {'two' if least == 2 else 'one'} or more different class names; found {list(names)}")
    return names


def class_indices(labels: Tensor, valid: Tensor, classes: int) -> Tensor:
    """Labels (N,) as int64 class indices, 0 where not `valid`.

    Raises:
        DataError: another shape, not an integer, or not one of the classes.
    """
    if labels.ndim != 1:
        raise DataError(f"labels must be one integer per sample, shape (N,); found {tuple(labels.shape)}")
    if valid.ndim != 1:
        raise DataError(f"the valid mask must be one bool per sample, shape (N,); found shape {tuple(valid.shape)}")
    allowed = f"the {classes} classes are 0 to {classes - 1}"
    if not labels.is_floating_point():
        labels = labels.long()  # an int8 or uint8 cannot be compared with every number of classes
    else:
        refuse(labels, valid & ~labels.isfinite(), "is not finite", allowed)
        refuse(labels, valid & (labels != labels.round()), "is not an integer", allowed)
    refuse(labels, valid & ((labels < 0) | (labels >= classes)), "is out of range", allowed)
    return torch.where(valid, labels, torch.zeros_like(labels)).to(torch.int64)


def class_counts(names: Sequence[str], target: Tensor, valid: Tensor) -> list[int]:
    """How many training samples each class has.

    Raises:
        DataError: a class without any cannot be learned.
    """
    counts: list[int] = torch.bincount(target[valid], minlength=len(names)).tolist()
    if missing := [name for name, n in zip(names, counts, strict=True) if n == 0]:
        raise DataError(
            f"{len(missing)} of {len(names)} classes never seen in the training split: {', '.join(missing)}; "
            "drop them from the head's classes, or give data that has them"
        )
    return counts


def refuse(labels: Tensor, bad: Tensor, what: str, allowed: str) -> None:
    """Complain about the labels that are `bad` (bool, of their shape), if any, with position and value of the first.

    Raises:
        DataError: there are some.
    """
    if count := int(bad.sum()):
        i = tuple(bad.nonzero()[0].tolist())
        where = f"sample {i[0]}" + (f", position {i[1] if len(i) == 2 else i[1:]}" if len(i) > 1 else "")
        raise DataError(f"label {labels[i].item()!r} of {where} {what}; {allowed} ({count} such of {labels.numel()})")


def check_consumes(head: Head, features: tuple[int, ...]) -> None:
    """Refuse features that a head has no use for.

    Raises:
        ConfigError: a vector where a map is needed.
    """
    if head.consumes == "map" and len(features) != 3:
        raise ConfigError(
            [
                f"{type(head).__name__} needs a feature map (C, H, W), and the backbone gives vectors of shape {features}; "
                "use a backbone that does not pool its last features"
            ]
        )

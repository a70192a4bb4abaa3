"""Multi-task learning for vision: N tasks trained together, with what they share as one line of a config.

The public names are below; each is imported when it is first used, so that `import mtl` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl.backbones import Backbone as Backbone
    from mtl.balancing import Balancer as Balancer
    from mtl.balancing import Scalarization as Scalarization
    from mtl.batches import Augment as Augment
    from mtl.build import evaluate_run as evaluate_run
    from mtl.build import train as train
    from mtl.classification import Classification as Classification
    from mtl.classification import ClassificationOptions as ClassificationOptions
    from mtl.columns import ClassColumn as ClassColumn
    from mtl.columns import Column as Column
    from mtl.columns import NumberColumn as NumberColumn
    from mtl.columns import SetAside as SetAside
    from mtl.columns import TextColumn as TextColumn
    from mtl.comparison import Comparison as Comparison
    from mtl.comparison import compare as compare
    from mtl.config import DataConfig as DataConfig
    from mtl.config import InitFrom as InitFrom
    from mtl.config import RunConfig as RunConfig
    from mtl.config import load as _load
    from mtl.conformance import Check as Check
    from mtl.conformance import check_task as check_task
    from mtl.cross_stitch import CrossStitch as CrossStitch
    from mtl.cross_stitch import CrossStitchUnit as CrossStitchUnit
    from mtl.data import Split as Split
    from mtl.datasets import ArrayDataset as ArrayDataset
    from mtl.errors import ConfigError as ConfigError
    from mtl.errors import DataError as DataError
    from mtl.errors import MTLError as MTLError
    from mtl.errors import PluginError as PluginError
    from mtl.errors import RunError as RunError
    from mtl.files import ImageFiles as ImageFiles
    from mtl.folders import Listed as Listed
    from mtl.folders import usable_files as usable_files
    from mtl.folders import walk as walk
    from mtl.heads import DataclassHead as DataclassHead
    from mtl.heads import FeatureHead as FeatureHead
    from mtl.heads import FromClasses as FromClasses
    from mtl.heads import Head as Head
    from mtl.metrics import Metric as Metric
    from mtl.metrics import torchmetric as torchmetric
    from mtl.multilabel import MultiLabel as MultiLabel
    from mtl.optim import OptimConfig as OptimConfig
    from mtl.options import Options as Options
    from mtl.ordinal import Ordinal as Ordinal
    from mtl.prediction import Predictions as Predictions
    from mtl.prediction import Restored as Restored
    from mtl.prediction import load_model as load_model
    from mtl.prediction import predict as predict
    from mtl.progress import for_terminal as for_terminal
    from mtl.registry import load_plugin_file as load_plugin_file
    from mtl.registry import register_backbone as register_backbone
    from mtl.registry import register_balancer as register_balancer
    from mtl.registry import register_dataset as register_dataset
    from mtl.registry import register_task as register_task
    from mtl.registry import register_unit as register_unit
    from mtl.regression import Regression as Regression
    from mtl.resuming import resume as resume
    from mtl.run import RunResult as RunResult
    from mtl.sharing import Exchange as Exchange
    from mtl.sharing import HardShared as HardShared
    from mtl.sharing import SplitAt as SplitAt
    from mtl.sharing import Unshared as Unshared
    from mtl.subsets import hashed_split as hashed_split
    from mtl.survey import dry_run as dry_run
    from mtl.tables import match_names as match_names
    from mtl.tables import read_table as read_table
    from mtl.tables import table_columns as table_columns
    from mtl.task import Task as Task
    from mtl.torch_data import TorchDataset as TorchDataset
    from mtl.units import ExchangeUnit as ExchangeUnit

    load_config = _load

_HOME = {
    "backbones": ("Backbone",),
    "balancing": ("Balancer", "Scalarization"),
    "batches": ("Augment",),
    "build": ("evaluate_run", "train"),
    "classification": ("Classification", "ClassificationOptions"),
    "columns": ("ClassColumn", "Column", "NumberColumn", "SetAside", "TextColumn"),
    "comparison": ("Comparison", "compare"),
    "config": ("DataConfig", "InitFrom", "RunConfig", "load_config"),
    "conformance": ("Check", "check_task"),
    "cross_stitch": ("CrossStitch", "CrossStitchUnit"),
    "data": ("Split",),
    "datasets": ("ArrayDataset",),
    "errors": ("ConfigError", "DataError", "MTLError", "PluginError", "RunError"),
    "files": ("ImageFiles",),
    "folders": ("Listed", "usable_files", "walk"),
    "heads": ("DataclassHead", "FeatureHead", "FromClasses", "Head"),
    "metrics": ("Metric", "torchmetric"),
    "multilabel": ("MultiLabel",),
    "optim": ("OptimConfig",),
    "options": ("Options",),
    "ordinal": ("Ordinal",),
    "prediction": ("Predictions", "Restored", "load_model", "predict"),
    "progress": ("for_terminal",),
    "registry": (
        "load_plugin_file",
        "register_backbone",
        "register_balancer",
        "register_dataset",
        "register_task",
        "register_unit",
    ),
    "regression": ("Regression",),
    "resuming": ("resume",),
    "run": ("RunResult",),
    "sharing": ("Exchange", "HardShared", "SplitAt", "Unshared"),
    "subsets": ("hashed_split",),
    "survey": ("dry_run",),
    "tables": ("match_names", "read_table", "table_columns"),
    "task": ("Task",),
    "torch_data": ("TorchDataset",),
    "units": ("ExchangeUnit",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mtl' has no attribute {name!r}")
    value = getattr(import_module(f"mtl.{_MODULE_OF[name]}"), "load" if name == "load_config" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

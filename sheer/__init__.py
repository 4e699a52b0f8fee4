"""Sheer trains PyTorch models: one loop, written once in plain Python, that you can run, read, or take with you."""

from sheer import data
from sheer.console import Console
from sheer.errors import (
    DataError,
    MissingPackageError,
    ModelError,
    NonFiniteError,
    RunError,
    SettingsError,
    SheerError,
    SheerWarning,
    StepError,
)
from sheer.loggers.csv import CSV
from sheer.loggers.jsonl import JSONL
from sheer.loggers.mlflow import MLflow
from sheer.loggers.tensorboard import TensorBoard
from sheer.loggers.wandb import WandB
from sheer.metrics import Figure, Image, Mean, Text, mean
from sheer.own_loop import Loop
from sheer.random import seed_everything
from sheer.run import Result
from sheer.saving import load_weights
from sheer.schedules import warmup_cosine, warmup_linear, warmup_stable_decay
from sheer.settings import Checkpoint, Settings
from sheer.trainer import Trainer
from sheer.version import __version__

__all__ = [
    "CSV",
    "JSONL",
    "Checkpoint",
    "Console",
    "DataError",
    "Figure",
    "Image",
    "Loop",
    "MLflow",
    "Mean",
    "MissingPackageError",
    "ModelError",
    "NonFiniteError",
    "Result",
    "RunError",
    "Settings",
    "SettingsError",
    "SheerError",
    "SheerWarning",
    "StepError",
    "TensorBoard",
    "Text",
    "Trainer",
    "WandB",
    "__version__",
    "data",
    "load_weights",
    "mean",
    "seed_everything",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]

"""Sheer trains PyTorch models: one loop, written once in plain Python, that you can run, read, or take with you."""

from sheer import data
from sheer.callbacks.device_stats import DeviceStats
from sheer.callbacks.early_stopping import EarlyStopping
from sheer.callbacks.ema import EMA
from sheer.callbacks.freeze import Freeze
from sheer.callbacks.gradient_norm import GradientNorm
from sheer.callbacks.learning_rate_monitor import LearningRateMonitor
from sheer.callbacks.model_summary import ModelSummary
from sheer.callbacks.on import On
from sheer.callbacks.profiler import Profiler
from sheer.callbacks.swa import SWA
from sheer.callbacks.throughput import Throughput
from sheer.callbacks.timer import Timer
from sheer.console import Console
from sheer.distributed.world import rank_zero_first
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
from sheer.events import RunInfo
from sheer.find_lr import LRFinding, find_lr
from sheer.language.attention import document_block_mask, document_mask, document_offsets
from sheer.language.linear_loss import linear_cross_entropy
from sheer.loggers.base import Logger
from sheer.loggers.csv import CSV
from sheer.loggers.jsonl import JSONL
from sheer.loggers.mlflow import MLflow
from sheer.loggers.tensorboard import TensorBoard
from sheer.loggers.wandb import WandB
from sheer.metrics import Figure, Image, Mean, Text, mean
from sheer.own_loop import Loop
from sheer.random import seed_everything
from sheer.run import Result
from sheer.schedules import Schedule, warmup_cosine, warmup_linear, warmup_stable_decay
from sheer.settings import Checkpoint, Compile, Parallel, Rollback, Settings
from sheer.trainer import Trainer
from sheer.version import __version__
from sheer.weights import load_weights

__all__ = [
    "CSV",
    "EMA",
    "JSONL",
    "SWA",
    "Checkpoint",
    "Compile",
    "Console",
    "DataError",
    "DeviceStats",
    "EarlyStopping",
    "Figure",
    "Freeze",
    "GradientNorm",
    "Image",
    "LRFinding",
    "LearningRateMonitor",
    "Logger",
    "Loop",
    "MLflow",
    "Mean",
    "MissingPackageError",
    "ModelError",
    "ModelSummary",
    "NonFiniteError",
    "On",
    "Parallel",
    "Profiler",
    "Result",
    "Rollback",
    "RunError",
    "RunInfo",
    "Schedule",
    "Settings",
    "SettingsError",
    "SheerError",
    "SheerWarning",
    "StepError",
    "TensorBoard",
    "Text",
    "Throughput",
    "Timer",
    "Trainer",
    "WandB",
    "__version__",
    "data",
    "document_block_mask",
    "document_mask",
    "document_offsets",
    "find_lr",
    "linear_cross_entropy",
    "load_weights",
    "mean",
    "rank_zero_first",
    "seed_everything",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]

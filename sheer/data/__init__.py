"""Batches: their order, where they come from, how they get to the device."""

from sheer.data.grouping import LengthGroupedBatches
from sheer.data.order import GlobalSampler
from sheer.data.packing import Packed

__all__ = ["GlobalSampler", "LengthGroupedBatches", "Packed"]

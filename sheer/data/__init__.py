"""Batches: their order, where they come from, how they get to the device."""

from sheer.data.order import GlobalSampler

__all__ = ["GlobalSampler"]

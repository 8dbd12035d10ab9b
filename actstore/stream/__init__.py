"""Streaming: a reading order that is a pure function, and the pipeline that carries it out."""

from actstore.stream.dataset import ActivationDataset
from actstore.stream.settings import Settings

__all__ = ["ActivationDataset", "Settings"]

"""A module as an ONNX file, by torch's exporter."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..base import quiet_torch
from .per_shape import Tensors

# the exporter, the warning filters and the logging levels belong to the whole process
_lock = threading.RLock()


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Inside, torch's exporter runs in one thread at a time and prints nothing."""
    with _lock, quiet_torch(), warnings.catch_warnings():
        disabled = logging.root.manager.disable
        logging.disable(max(disabled, logging.WARNING))  # it warns of optional packages that are missing
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)


def export(module: nn.Module, args: Tensors, folder: Path) -> Path:
    """Export a module for the shapes of ``args``, unless the folder has its file already.

    Returns:
        The ONNX file, named after the module's class.

    Raises:
        Exception: Whatever the exporter raises for a module that it cannot export.
    """
    path = folder / f"{type(module).__name__}.onnx"
    if not path.exists():
        with quiet_exporter():
            torch.onnx.export(module, args, path, dynamo=True, external_data=True, verbose=False)
    return path

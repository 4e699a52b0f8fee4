"""What loggers show, in the forms that their libraries take."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sheer.errors import StepError
from sheer.metrics import Figure, Image


def pixels(image: Image) -> NDArray[np.uint8]:
    """Return a picture as bytes, [height, width, channels] with 1, 3 or 4 channels. Where both ends could be channels, the first is.

    Raises:
        StepError: its shape is not that of a picture.
    """
    data = image.data.detach().cpu() if isinstance(image.data, Tensor) else image.data
    array = np.asarray(data.float() if isinstance(data, Tensor) and data.is_floating_point() else data)
    if array.ndim == 2:
        array = array[None]
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    elif array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise StepError(
            f"A sheer.Image has shape {list(array.shape)}. One picture is [height, width], [channels, height, width] or "
            "[height, width, channels], with 1, 3 or 4 channels; of a batch, choose one or make a grid."
        )
    if array.dtype == np.bool_ or np.issubdtype(array.dtype, np.floating):
        array = np.nan_to_num(array.astype(np.float32)) * 255
    return np.ascontiguousarray(np.rint(np.clip(array, 0, 255)), dtype=np.uint8)


def drawn(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as bytes, [height, width, 4], without pyplot, which would choose a display."""
    from matplotlib.image import imread

    file = io.BytesIO()
    figure.figure.savefig(file, format="png")
    file.seek(0)
    return pixels(Image(imread(file)))


def flattened(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested hyper-parameters on one level, as `optimizer.lr`; what is neither number nor string is written as text."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat

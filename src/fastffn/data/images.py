"""Small images with ten labels: scikit-learn's digits, which every machine has, and MNIST and USPS from a folder."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastffn.errors import ConfigError, DataError, MissingDependencyError, did_you_mean
from fastffn.settings import data_dir

if TYPE_CHECKING:
    import numpy

CLASSES = 10
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# Files below the folder that FASTFFN_DATA_DIR names.
FILES = {"mnist": "vision/mnist.npz", "usps": "vision/usps.npz"}
IMAGE_SETS = ("digits", *FILES)
# scikit-learn's digits have no official split: a fifth of them, drawn with a fixed seed, is tested on.
DIGITS_TESTED, DIGITS_SEED = 0.2, 0


@dataclass(frozen=True)
class Images:
    """A data set, pixels standardised by the mean and the deviation of all training pixels.

    Attributes:
        name: one of `IMAGE_SETS`.
        train, test: `[N, D]` float32, images as vectors.
        train_labels, test_labels: `[N]`, from 0 to 9.
    """

    name: str
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor

    @property
    def pixels(self) -> int:
        """D."""
        return self.train.shape[1]


def read_images(name: str) -> Images:
    """Reads a data set.

    Args:
        name: `digits` (8 x 8, 1,437 to train on and 360 to test), `mnist` (28 x 28, 60,000 and 10,000) or `usps`
            (16 x 16, 7,291 and 2,007).

    Raises:
        ConfigError: there is no data set of that name.
        DataError: its file is missing or is not what was expected.
        MissingDependencyError: scikit-learn is needed and not installed.
    """
    if name not in IMAGE_SETS:
        raise ConfigError(
            f"Unknown images '{name}'; there are {', '.join(IMAGE_SETS)}.{did_you_mean(name, IMAGE_SETS)}"
        )
    arrays = _digits() if name == "digits" else _file(name)
    train, test = (torch.tensor(arrays[f"x_{part}"]).flatten(1).float() for part in ("train", "test"))
    mean, deviation = train.mean(), train.std()
    labels = (torch.tensor(arrays[f"y_{part}"]).long() for part in ("train", "test"))
    return Images(name, (train - mean) / deviation, next(labels), (test - mean) / deviation, next(labels))


def _digits() -> Mapping[str, numpy.ndarray]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingDependencyError(
            "The images 'digits' come with scikit-learn, which is not installed: pip install 'fastffn[train]'."
        ) from error
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=DIGITS_TESTED, random_state=DIGITS_SEED, stratify=y)
    return dict(zip(("x_train", "x_test", "y_train", "y_test"), parts, strict=True))


def _file(name: str) -> Mapping[str, numpy.ndarray]:
    import numpy

    folder = data_dir()
    expected = f"arrays {', '.join(ARRAYS)}, images [N, height, width] and labels from 0 to {CLASSES - 1}"
    if folder is None:
        raise DataError(
            f"The images '{name}' are read from {FILES[name]} ({expected}) in the folder that FASTFFN_DATA_DIR names; "
            "it names none that exists. Set it, or take 'digits', which come with scikit-learn."
        )
    path = folder / FILES[name]
    try:
        # Opened here: of a damaged file numpy would leave its own handle open.
        with path.open("rb") as handle, numpy.load(handle, allow_pickle=False) as file:
            arrays = {array: file[array] for array in ARRAYS}
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing; expected are {expected}. Put it there, or take 'digits', which come with scikit-learn."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz file with {expected} ({error}).") from error
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        fits = x.ndim == 3 and y.shape == x.shape[:1] and len(x) and y.dtype.kind in "iu"
        if not fits or y.min() < 0 or y.max() >= CLASSES:
            raise DataError(f"{path}: x_{part} {list(x.shape)} and y_{part} {list(y.shape)}; expected are {expected}.")
    return arrays

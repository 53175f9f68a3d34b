from __future__ import annotations

import sys

import numpy
import pytest
import torch

from fastffn.data.images import FILES, read_images
from fastffn.errors import ConfigError, DataError, MissingDependencyError


def saved(folder, **changes) -> None:
    arrays = {
        "x_train": numpy.random.default_rng(0).integers(0, 256, (30, 4, 3), dtype=numpy.uint8),
        "y_train": numpy.arange(30, dtype=numpy.uint8) % 10,
        "x_test": numpy.full((5, 4, 3), 7, dtype=numpy.uint8),
        "y_test": numpy.array([1, 2, 3, 4, 9], dtype=numpy.uint8),
    } | changes
    (folder / "vision").mkdir(exist_ok=True)
    numpy.savez(folder / FILES["mnist"], **{name: value for name, value in arrays.items() if value is not None})


def test_digits_are_split_the_same_way_each_time() -> None:
    images = read_images("digits")
    assert (images.train.shape, images.test.shape) == ((1437, 64), (360, 64))
    assert images.pixels == 64
    assert sorted(set(images.test_labels.tolist())) == list(range(10))
    assert torch.equal(images.test, read_images("digits").test)
    together = torch.cat((images.train, images.test)).unique(dim=0)
    assert len(together) == 1797  # no image is in both


def test_a_file_is_standardised_by_its_training_pixels(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FASTFFN_DATA_DIR", str(tmp_path))
    saved(tmp_path)
    images = read_images("mnist")
    assert images.train.shape == (30, 12) and images.train.dtype == torch.float32
    assert float(images.train.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.train.std()) == pytest.approx(1, abs=1e-5)
    with numpy.load(tmp_path / FILES["mnist"]) as file:
        pixels = file["x_train"].astype(numpy.float64)
    assert float(images.test[0, 0]) == pytest.approx((7 - pixels.mean()) / pixels.std(ddof=1), abs=1e-5)
    assert images.test_labels.tolist() == [1, 2, 3, 4, 9]


def test_what_is_missing_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("FASTFFN_DATA_DIR", raising=False)
    with pytest.raises(DataError, match=r"vision/mnist\.npz .*x_train.* FASTFFN_DATA_DIR names"):
        read_images("mnist")
    monkeypatch.setenv("FASTFFN_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"usps.npz is missing; expected are arrays x_train"):
        read_images("usps")
    with pytest.raises(ConfigError, match="Did you mean 'mnist'"):
        read_images("mnits")


@pytest.mark.parametrize(
    "changes",
    [
        {"y_test": None},
        {"x_test": numpy.zeros((5, 12), dtype=numpy.uint8)},
        {"y_train": numpy.full(30, 10)},
        {"y_train": numpy.zeros(29, dtype=numpy.uint8)},
    ],
    ids=["no labels", "vectors", "eleven labels", "too few labels"],
)
def test_what_does_not_fit_is_said(changes, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FASTFFN_DATA_DIR", str(tmp_path))
    saved(tmp_path, **changes)
    with pytest.raises(DataError, match=r"expected are arrays|with arrays"):
        read_images("mnist")


def test_a_damaged_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FASTFFN_DATA_DIR", str(tmp_path))
    saved(tmp_path)
    path = tmp_path / FILES["mnist"]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"mnist.npz is not an .npz file with arrays"):
        read_images("mnist")


def test_without_scikit_learn(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match="scikit-learn, which is not installed"):
        read_images("digits")


@pytest.mark.parametrize(("name", "sizes"), [("mnist", (60000, 10000, 784)), ("usps", (7291, 2007, 256))])
def test_the_real_ones(name, sizes, data_dir) -> None:
    if not (data_dir / FILES[name]).is_file():
        pytest.skip(f"{FILES[name]} is not in FASTFFN_DATA_DIR")
    images = read_images(name)
    assert (len(images.train), len(images.test), images.pixels) == sizes

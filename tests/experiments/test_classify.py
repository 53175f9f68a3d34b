"""Training of one FFN as a classifier: what it counts, and what each repair does to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fastffn import DenseConfig, LeafTreeConfig, build
from fastffn.data.images import Images
from fastffn.errors import ConfigError, TrainingDivergedError
from fastffn.experiments import classify
from fastffn.experiments.classify import Recipe, accuracy, train_classifier
from fastffn.experiments.leaf_losses import leaf_losses, leaf_outputs

WIDTHS = {"d_model": 6, "d_out": 10, "activation": "relu"}
TREE = LeafTreeConfig(**WIDTHS, depth=2, leaf_width=3, hardening_weight=3.0)


@pytest.fixture
def images() -> Images:
    """Four clouds, well apart."""
    centres = 4 * torch.eye(6)[:4]
    labels = torch.arange(200) % 4
    x = centres[labels] + 0.3 * torch.randn(200, 6)
    return Images("clouds", x[:160], labels[:160], x[160:], labels[160:])


@pytest.mark.parametrize(
    "changes",
    [{}, {"soften": 0.5}, {"wait_for": 16}, {"leaf_losses": True}, {"optimizer": "adamw", "learning_rate": 0.02}],
    ids=str,
)
def test_a_leaf_tree_learns(images, changes) -> None:
    config = dataclasses.replace(TREE, hardening_weight=0.1, balance_weight=0.1)
    found = train_classifier(config, images, Recipe(epochs=25, batch=16, **changes), seed=0)
    assert min(found["memorisation"], found["generalisation"], found["validation"]) > 90
    assert found["parameters"] == sum(p.numel() for p in build(config).parameters())
    assert 25 <= found["busiest"] <= 100 and 0 <= found["dead"] <= 3


def test_the_same_seed_gives_the_same(images) -> None:
    first, second, other = (train_classifier(TREE, images, Recipe(epochs=2), seed=seed) for seed in (1, 1, 2))
    assert first == second != other


def test_what_is_held_out_is_not_trained_on(images, monkeypatch) -> None:
    seen: list[torch.Tensor] = []
    right = classify._epoch

    def watched(ffn, optimizer, schedule, x, *rest) -> None:
        seen.append(x)
        right(ffn, optimizer, schedule, x, *rest)

    monkeypatch.setattr(classify, "_epoch", watched)
    found = train_classifier(DenseConfig(**WIDTHS, d_hidden=4), images, Recipe(epochs=1), seed=0)
    assert [len(x) for x in seen] == [144]
    assert "busiest" not in found


def test_accuracy_is_that_of_one_leaf(images) -> None:
    ffn = build(TREE).train()
    right = sum(
        int(leaf_outputs(ffn, row[None])[0, ffn.path(row[None]).leaf].argmax() == label)
        for row, label in zip(images.test, images.test_labels, strict=True)
    )
    assert accuracy(ffn, images.test, images.test_labels) == pytest.approx(100 * right / 40)
    assert ffn.training


def test_hardening_rises(images, monkeypatch) -> None:
    weights = []
    right = classify._epoch
    monkeypatch.setattr(
        classify, "_epoch", lambda ffn, *a: (weights.append(ffn.config.hardening_weight), right(ffn, *a))
    )
    train_classifier(TREE, images, Recipe(epochs=6, soften=0.5), seed=0)
    assert weights == [0, 1, 2, 3, 3, 3]


def test_losses_of_leaves(images) -> None:
    ffn = build(dataclasses.replace(TREE, shared=2, balance_weight=0.5, hardening_weight=2.0))
    x, labels = images.test, images.test_labels
    outputs = leaf_outputs(ffn, x)
    torch.testing.assert_close(outputs[torch.arange(40), ffn.path(x).leaf], ffn.eval()(x))
    weights = ffn.leaf_weights(x)
    wrong = (
        sum(weights[:, leaf] @ F.cross_entropy(outputs[:, leaf], labels, reduction="none") for leaf in range(4)) / 40
    )
    share = torch.bincount(ffn.path(x).leaf, minlength=4) / 40
    expected = wrong + 2.0 * ffn.node_entropies(x).mean() + 0.5 * 4 * (share * weights.mean(0)).sum()
    torch.testing.assert_close(leaf_losses(ffn, x, labels), expected)
    # The same auxiliary losses as in soft training.
    ffn.train()(x)
    torch.testing.assert_close(ffn._asked, expected - wrong)


def test_a_leak_reaches_the_leaves_losses(images) -> None:
    ffn = build(dataclasses.replace(TREE, hardening_weight=0.0, region_leak=1.0))
    x, labels = images.test, images.test_labels
    turned = build(dataclasses.replace(TREE, hardening_weight=0.0))
    turned.load_state_dict(ffn.state_dict())
    with torch.no_grad():
        turned.node_weight.neg_()
        turned.node_bias.neg_()
    torch.testing.assert_close(leaf_losses(ffn, x, labels), leaf_losses(turned, x, labels))


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"batch": 0}, {"learning_rate": 0.0}], ids=str)
def test_recipes_are_checked(changes) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Recipe(**changes)


def test_divergence_is_said(images) -> None:
    with pytest.raises(TrainingDivergedError):
        train_classifier(DenseConfig(**WIDTHS, d_hidden=4), images, Recipe(epochs=9, learning_rate=1e30), seed=0)

"""Rows of the FFF paper's Table 1: which FFN, trained how; and the repairs, each alone and together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastffn.data.images import CLASSES, Images
from fastffn.errors import ConfigError
from fastffn.experiments.classify import Recipe
from fastffn.nn import DenseConfig, FFNConfig, LeafTreeConfig, MoEConfig

# As published for MNIST at training width 128: what training reaches on test images.
PUBLISHED = {"mnist": {"dense-128": 98.1, "leaf-8": 94.9, "leaf-1": 92.0}}
# Published for MNIST.
HARDENING = 3.0


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: that of its cells' files.
        title: for the table.
        config: of the FFN.
        recipe: of its training.
        active: hidden neurons that an image meets, the nodes of a tree and the scores of a router among them.
    """

    name: str
    title: str
    config: FFNConfig
    recipe: Recipe
    active: int


@dataclass(frozen=True)
class Repair:
    """A change to the published leaf tree.

    Attributes:
        title: for the table.
        config: the fields of the tree that change.
        training: the fields of the recipe that change.
    """

    title: str
    config: Callable[[LeafTreeConfig], dict[str, Any]] = lambda tree: {}
    training: dict[str, Any] = field(default_factory=dict)


def _half_shared(tree: LeafTreeConfig) -> dict[str, Any]:
    assert tree.leaf_width
    return {"leaf_width": tree.leaf_width - tree.leaf_width // 2, "shared": tree.leaf_width // 2}


REPAIRS = {
    "balance": Repair("balance loss", lambda tree: {"balance_weight": 0.3}),
    "schedule": Repair("hardening schedule", training={"soften": 0.75}),
    "unhardened": Repair("no hardening loss", lambda tree: {"hardening_weight": 0.0}),
    "straight-through": Repair(
        "hard, straight-through", lambda tree: {"decisions": "straight_through", "hardening_weight": 0.0}
    ),
    "shared": Repair("half of the leaf shared", _half_shared),
    "leak": Repair("region leak 0.1", lambda tree: {"region_leak": 0.1}),
    "large-batch": Repair("batch 1,024", training={"batch": 1024}),
    "small-batch": Repair("batch 64", training={"batch": 64}),
    "wait": Repair("leaves wait for 64 samples", training={"wait_for": 64}),
    "adamw": Repair("AdamW", training={"optimizer": "adamw", "learning_rate": 2e-3}),
    "dropout": Repair("input dropout 0.2", training={"input_dropout": 0.2}),
    "leaf-losses": Repair("leaves' own losses", training={"leaf_losses": True}),
}
LONGER = 3
# The best that was found by validation accuracy on MNIST.
TOGETHER = ("balance", "unhardened", "adamw", "dropout", "leaf-losses")


def published_rows(images: Images, recipe: Recipe, *, width: int, leaf_widths: tuple[int, ...]) -> list[Row]:
    """The paper's leaf trees, and beside each a mixture of experts; dense FFNs of every width that compares.

    Args:
        images: fixes the widths in and out.
        recipe: of all rows.
        width: hidden neurons in training, those of all leaves together.
        leaf_widths: one leaf tree each; `width` over it must be a power of two.

    Raises:
        ConfigError: a leaf width does not fit.
    """
    widths: dict[str, Any] = {"d_model": images.pixels, "d_out": CLASSES, "activation": "relu"}
    trees, mixtures = [], []
    compared = {width: "training width"}
    for leaf in leaf_widths:
        depth = (width // leaf).bit_length() - 1 if leaf >= 1 else -1
        if depth < 0 or leaf << depth != width:
            raise ConfigError(f"leaf width {leaf} does not fit width {width}; {width} over it must be a power of two.")
        tree = LeafTreeConfig(**widths, depth=depth, leaf_width=leaf, hardening_weight=HARDENING)
        trees.append(Row(f"leaf-{leaf}", f"leaf tree, leaf {leaf}, depth {depth}", tree, recipe, leaf + depth))
        experts = width // leaf
        mixture = MoEConfig(**widths, experts=experts, expert_width=leaf, active=1)
        mixtures.append(Row(f"moe-{leaf}", f"MoE, 1 of {experts} experts of {leaf}", mixture, recipe, leaf + experts))
        for neurons, what in (
            (leaf, f"inference width of leaf {leaf}"),
            (leaf + depth, f"active width of leaf {leaf}"),
        ):
            compared[neurons] = f"{compared[neurons]}, {what}" if neurons in compared else what
    dense = [
        Row(f"dense-{n}", f"dense {n}: {compared[n]}", DenseConfig(**widths, d_hidden=n), recipe, n)
        for n in sorted(compared, reverse=True)
    ]
    return dense + trees + mixtures


def repaired_rows(images: Images, recipe: Recipe, *, width: int, leaf: int) -> list[Row]:
    """One of the paper's leaf trees with each repair alone, with those that help together, and these less one each.

    All but one have the active width of the published row, so a shared part takes half of each leaf's neurons; the
    master leaf is as wide as a leaf, as published, and comes on top. Beside them dense FFNs that are trained with what
    they can use of the repairs.

    Args:
        images, recipe, width: as of `published_rows`.
        leaf: leaf width of the published row.
    """
    rows = published_rows(images, recipe, width=width, leaf_widths=(leaf,))
    published, tree = next((row, row.config) for row in rows if isinstance(row.config, LeafTreeConfig))
    title, used = f"leaf {leaf}", [REPAIRS[name] for name in TOGETHER]
    longer = Repair(f"{LONGER} x the epochs", training={"epochs": LONGER * recipe.epochs})
    master = Repair(f"master leaf of {leaf} more", lambda tree: {"shared": leaf})

    def row(name: str, title: str, *repairs: Repair) -> Row:
        config: FFNConfig = tree
        training = recipe
        for repair in repairs:
            config = dataclasses.replace(config, **repair.config(tree))
            training = dataclasses.replace(training, **repair.training)
        return Row(f"leaf-{leaf}-{name}", title, config, training, published.active)

    made = [row(f"with-{name}", f"{title} + {repair.title}", repair) for name, repair in REPAIRS.items()]
    made.append(row("repaired", f"{title}, repaired: {', '.join(repair.title for repair in used)}", *used))
    for name in TOGETHER:
        rest = [repair for repair in used if repair is not REPAIRS[name]]
        made.append(row(f"without-{name}", f"{title}, repaired, without: {REPAIRS[name].title}", *rest))
    made.append(row("repaired-longer", f"{title}, repaired, {longer.title}", *used, longer))
    wider = row("master", f"{title}, repaired, {master.title}", *used, master)
    made.append(dataclasses.replace(wider, active=published.active + leaf))
    for neurons in (width, published.active):
        config = DenseConfig(d_model=images.pixels, d_out=CLASSES, activation="relu", d_hidden=neurons)
        trained = dataclasses.replace(recipe, **REPAIRS["adamw"].training, **REPAIRS["dropout"].training)
        title = f"dense {neurons}, {REPAIRS['adamw'].title}, {REPAIRS['dropout'].title}"
        made.append(Row(f"dense-{neurons}-repaired", title, config, trained, neurons))
        trained = dataclasses.replace(trained, **longer.training)
        made.append(Row(f"dense-{neurons}-longer", f"{title}, {longer.title}", config, trained, neurons))
    return made

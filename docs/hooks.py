"""Fills the tables of the documentation from the code, so that they cannot disagree with it."""

from __future__ import annotations

import dataclasses
from typing import Any

from tabulate import tabulate

from fastffn.registry import kinds
from fastffn.train.config import PRESETS, PretrainConfig, get_preset


def kinds_table() -> str:
    """One row for each registered kind."""
    rows = []
    for kind in kinds().values():
        own = kind.config.own_fields()
        merges = kind.module.merged_tensors(kind.config(d_model=4).resolved()) is not None
        rows.append(
            (
                f"`{kind.name}`",
                f"`{kind.config.__name__}`",
                (kind.module.__doc__ or "").splitlines()[0],
                ", ".join(f"`{name}`" for name in own) or "none",
                "yes" if merges else "no",
            )
        )
    return tabulate(rows, headers=("kind", "configuration", "what it is", "own fields", "merges"), tablefmt="github")


def fields_table() -> str:
    """One row for each field of a pre-training run, with its value without a preset and in each."""
    sources = {"default": None} | {name: name for name in PRESETS}
    presets = {title: PretrainConfig.from_flat(get_preset(name)).to_flat() for title, name in sources.items()}
    helps = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(PretrainConfig)}
    names = next(iter(presets.values()))
    rows: list[tuple[Any, ...]] = []
    for name in names:
        values = [presets[preset][name] for preset in presets]
        shown = ["" if value in (None, "") else f"{value}" for value in values]
        rows.append((f"`{name}`", helps.get(name) or "option of the FFN kind", *shown))
    return tabulate(rows, headers=("field", "meaning", *presets), tablefmt="github", disable_numparse=True)


TABLES = {"<!-- kinds -->": kinds_table, "<!-- fields -->": fields_table}


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs for every page."""
    for mark, table in TABLES.items():
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown

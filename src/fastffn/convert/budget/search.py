"""The search: time every size of every kind, measure what each does to each FFN, then try plans on the whole model.

1. sizes that are not faster than the dense FFN on this machine are out
2. every FFN is made in every size, and compared with the dense one on held-out tokens
3. one probe for each FFN tells what an error there does to the model: damage = sensitivity x error
4. plans (`plans.py`) are put in place and measured, by bisection, for the fastest within the budget
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastffn.convert import match
from fastffn.convert.budget.plans import Choice, Plan, plans
from fastffn.convert.budget.quality import PROBED, Budget, Meter
from fastffn.convert.budget.report import BudgetReport, Point
from fastffn.convert.calibration import Batch, check_enough, sample_inputs
from fastffn.convert.checks import check_ffns, check_model
from fastffn.convert.report import ConversionReport, LayerReport, measure_speed
from fastffn.convert.select import Filter, enumerated, select
from fastffn.errors import ConfigError, ConversionError, NothingPaysError
from fastffn.nn import FFN, DenseConfig, FFNConfig
from fastffn.registry import get_kind, kind_of, kinds

_log = logging.getLogger(__name__)

# A kind must be this much faster than dense to be looked at: less is within the timer's noise.
WORTHWHILE = 1.05
# Held-out tokens on which FFNs are compared.
COMPARED = 2048


def convert_within(
    model: Any,
    budget: Budget,
    *,
    calibration: Iterable[Batch],
    held_out: Iterable[Batch],
    kinds_to_try: Sequence[str] | None = None,
    tokens: int = 1,
    filter: Filter | None = None,
    force: bool = False,
) -> BudgetReport:
    """Converts a model, in place, to be as fast as it can be on this machine within a budget of quality.

    Args:
        model: as for `fastffn.convert`.
        budget: what may be lost.
        calibration: batches from which the FFNs are made; see `fastffn.convert`.
        held_out: other batches, on which the model is measured: token numbers `[B, T]`, or mappings of `input_ids`
            and, where there is padding, `attention_mask`.
        kinds_to_try: names of kinds; None for all that have sizes to try (`FFNConfig.sizes_for`).
        tokens: in a call, for which the FFNs are to be fast: 1 for decoding one sequence.
        filter: FFNs that may change; see `fastffn.convert`.
        force: take the fastest plan within the budget or, if there is none, the one that does least damage.

    Returns:
        What was put in, with the trade-off between time and quality that was measured.

    Raises:
        NothingPaysError: nothing is faster on this machine, or nothing faster keeps the budget.
        ConversionError, ConfigError: see `fastffn.convert`, and `Budget`.

    The model is as it was if there is an error. Made FFNs wait in a temporary directory: it takes the space of all
    candidates, some times the FFNs' own.
    """
    family = match.family_of(getattr(model, "config", None))
    check_model(model)
    found = [path for path, _ in match.family_ffns(model, family)]
    paths = list(select(found, DenseConfig(), filter))
    if not paths:
        raise ConversionError(f"No FFN to convert: the model has {enumerated(found)}.")
    check_ffns(model, family, paths)
    if tokens < 1:
        raise ConfigError(f"tokens is {tokens}; it must be at least 1.")
    dense = {path: family.dense_config(model, path) for path in paths}
    like = next(model.parameters())
    names = _tried(kinds_to_try, set(dense.values()))
    sizes = {own: _fast_sizes(own, names, tokens, like) for own in set(dense.values())}
    if not any(sizes[own][1] for own in sizes):
        raise NothingPaysError(
            f"Nothing pays here: at {tokens} token{'s' if tokens > 1 else ''} a call no size of "
            f"{', '.join(names)} is {WORTHWHILE} times as fast as the dense FFN on this machine."
        )

    meter = budget.meter(model, held_out)
    _log.info("measured on %s held-out tokens; dense: %.4f", f"{meter.tokens:,}", meter.dense.value)
    shown = sample_inputs(model, paths, calibration)
    check_enough(shown)
    unseen = sample_inputs(model, paths, meter.batches, sample=COMPARED)
    with tempfile.TemporaryDirectory(prefix="fastffn-") as scratch:
        made = _Made(Path(scratch), model, dense)
        choices = {}
        for number, path in enumerate(paths):
            seconds, configs = sizes[dense[path]]
            rows, others = shown.pop(path), unseen.pop(path)
            errors = {config: made.make(path, config, rows, others) for config in configs}
            sensitivity = _sensitivity(made, meter, path, errors)
            choices[path] = [Choice(None, seconds, 0.0)] + [
                # Above that of staying dense, which is a choice even where another one does no damage.
                Choice(config, own, max(sensitivity * errors[config], sys.float_info.min))
                for config, own in configs.items()
            ]
            _log.info("%s: %d sizes made (%d of %d)", path, len(configs), number + 1, len(paths))
        return _best(made, meter, budget, plans(choices), found, force)


def _tried(kinds_to_try: Sequence[str] | None, ffns: Iterable[DenseConfig]) -> list[str]:
    """The kinds whose sizes are searched; one that is asked for and has none is refused."""
    having = [name for name in kinds() if any(get_kind(name).config.sizes_for(own) for own in ffns)]
    for name in kinds_to_try or ():
        if get_kind(name).name not in having:
            raise ConfigError(
                f"The kind '{name}' has no sizes to search for; kinds that have some: {', '.join(having)}. Within a "
                f"budget name those, or none for all of them; without one: --ffn {name} and its options."
            )
    return list(kinds_to_try or having)


def _fast_sizes(
    dense: DenseConfig, names: Sequence[str], tokens: int, like: torch.Tensor
) -> tuple[float, dict[FFNConfig, float]]:
    """Seconds of a dense FFN, and of every size that is faster."""
    fast, at_dense = {}, []
    for name in names:
        for config in get_kind(name).config.sizes_for(dense):
            with torch.device(like.device):
                module = kind_of(config).module(config.fitted_to(dense)).to(like.dtype)
            speed = measure_speed(dense, module, tokens)
            at_dense.append(speed.before)
            _log.info("%s: %.2f times as fast at %s tokens", _brief(config), speed.ratio, f"{tokens:,}")
            if speed.ratio >= WORTHWHILE:
                fast[config] = speed.after
    if not at_dense:
        return 0.0, {}
    return sorted(at_dense)[len(at_dense) // 2], fast


def _brief(config: FFNConfig) -> str:
    values = config.to_dict()
    usual = type(config)().to_dict()
    own = ", ".join(f"{n}={values[n]}" for n in config.own_fields() if values[n] != usual[n])
    name = kind_of(config).name
    return f"{name} ({own})" if own else name


class _Made:
    """FFNs that were made, on disk, and a model in which they can be put and taken out again."""

    def __init__(self, scratch: Path, model: Any, dense: Mapping[str, DenseConfig]) -> None:
        self.scratch, self.model, self.dense = scratch, model, dense
        self.family = match.family_of(model.config)
        self._files: dict[tuple[str, FFNConfig], tuple[Path, FFNConfig]] = {}

    @torch.no_grad()
    def make(self, path: str, config: FFNConfig, shown: torch.Tensor, unseen: torch.Tensor) -> float:
        """Makes an FFN; its mean squared error on tokens that it was not made for."""
        from safetensors.torch import save_file

        dense = self.family.to_dense(self.model, path).eval()
        like = next(dense.parameters())
        new = kind_of(config).module.from_dense(dense, config, shown).to(like.device, like.dtype).eval()
        file = self.scratch / f"{len(self._files)}.safetensors"
        save_file({name: value.contiguous() for name, value in new.state_dict().items()}, file)
        self._files[path, config] = file, new.config
        return float((new(unseen).float() - dense(unseen).float()).square().mean())

    def load(self, path: str, config: FFNConfig) -> FFN[Any]:
        """An FFN that was made."""
        from safetensors.torch import load_file

        file, fitted = self._files[path, config]
        old = self.model.get_submodule(path)
        parameters = list(self.family.parameters(self.model, path).values())
        with torch.device("meta"):
            new = kind_of(fitted).module(fitted)
        new.load_state_dict(load_file(file, device=str(parameters[0].device)), assign=True)
        new.requires_grad_(any(parameter.requires_grad for parameter in parameters))
        return new.train(old.training)

    @contextmanager
    def in_place(self, configs: Mapping[str, FFNConfig]) -> Iterator[None]:
        """The model with some of its FFNs changed, and as it was afterwards."""
        before: dict[str, nn.Module] = {}
        try:
            for path, config in configs.items():
                new = self.load(path, config)
                before |= {name: self.model.get_submodule(name) for name in (path, *self.family.beside(path))}
                self.family.put_in(self.model, path, new)
            yield
        finally:
            for name, module in before.items():
                match.replace_module(self.model, name, module)


def _sensitivity(made: _Made, meter: Meter, path: str, errors: Mapping[FFNConfig, float]) -> float:
    """Damage to the model for each unit of mean squared error of one FFN, from the size of middling error."""
    if not errors:
        return 0.0
    probe, error = sorted(errors.items(), key=lambda item: item[1])[len(errors) // 2]
    with made.in_place({path: probe}):
        damage = meter.measure(PROBED).damage
    # Rounding may make a harmless change look like an improvement.
    return max(damage, 0.0) / max(error, torch.finfo(torch.float32).tiny)


def _best(
    made: _Made, meter: Meter, budget: Budget, found: Sequence[Plan], all_paths: Sequence[str], force: bool
) -> BudgetReport:
    """Bisects for the fastest plan that keeps the budget, and puts it in place."""
    points = {0: Point(found[0], meter.dense)}
    allowed, refused = 0, len(found)
    step = len(found) - 1
    while step > allowed:
        with made.in_place(_configs(found[step])):
            points[step] = Point(found[step], meter.measure())
        keeps = budget.allows(meter.dense, points[step].quality)
        _log.info(
            "%d of %d FFNs changed, %.2f times as fast: %.4f, %s", found[step].changed, len(made.dense),
            found[0].seconds / found[step].seconds, points[step].quality.value, "kept" if keeps else "too much",
        )  # fmt: skip
        if keeps:
            allowed = step
        else:
            refused = step
        step = (allowed + refused) // 2
    chosen = allowed or (1 if force and len(found) > 1 else 0)
    if not chosen:
        told = f"; the least harmful gives {points[1].quality.value:.4f}" if len(found) > 1 else ""
        raise NothingPaysError(
            f"Nothing pays here: every change that makes the model faster on this machine breaks the budget ({budget}; "
            f"dense: {meter.dense.value:.4f}{told}). Allow more, or distill a converted model; --force writes the one "
            "that does least damage."
        )
    plan = found[chosen]
    configs = _configs(plan)
    new = {path: made.load(path, config) for path, config in configs.items()}
    for path, module in new.items():
        made.family.put_in(made.model, path, module)
    from fastffn.convert import io

    io.attach(made.model)
    layers = []
    for path in all_paths:
        dense = made.dense.get(path) or made.family.dense_config(made.model, path)
        reason = "stays dense: nothing pays" if path in made.dense else "not selected"
        layers.append(
            LayerReport(path, dense, new[path].config) if path in new else LayerReport(path, dense, None, reason)
        )
    curve = tuple(points[number] for number in sorted(points))
    return BudgetReport(ConversionReport(tuple(layers)), curve, points[chosen], meter.tokens, str(budget))


def _configs(plan: Plan) -> dict[str, FFNConfig]:
    return {path: choice.config for path, choice in plan.choices.items() if choice.config is not None}

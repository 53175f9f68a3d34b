"""Forms of stage 1 that are not in the library, tried once each: FFNs that grow, that are guided by dense ones, and
larger batches; beside them, for comparison, what the library has.

    python benchmarks/stage_one.py --data corpus/train-000.txt.xz --validation corpus/valid.txt.xz --output runs/one
    python benchmarks/stage_one.py ... narrow narrow-grows-64-128-256

Complete runs of 1,000 steps, 2 million tokens, of 4 layers x 128 (docs/two-stage-record.md, "Two million tokens"). The
same command goes on with what is not done. Writes `runs/one/result.json`, with all that is done, and prints a
table. FLOPs are those of matrix products, as `fastffn experiment time-to-loss` counts them.
"""

from __future__ import annotations

import argparse
import importlib
import math
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch.nn import functional as F

from fastffn.convert.files import read_json, write_json
from fastffn.convert.match import fastffn_modules
from fastffn.experiments.recipes import Recipe, recipes
from fastffn.experiments.run_cost import flops_of, record_of
from fastffn.measure.machine import describe_machine
from fastffn.nn.low_rank import LowRankLinear
from fastffn.nn.narrow import WOKEN, NarrowFFN
from fastffn.train.config import PretrainConfig
from fastffn.train.trainer import SWITCHED, StageTrainer

pretraining = importlib.import_module("fastffn.train.pretrain")  # the package has a function of this name
STEPS, RATE, SPREAD = 1000, 2e-3, 0.06
DENSE = recipes()["dense"]


class Change:
    """What is different about stage 1; this one: nothing."""

    def prepare(self, trainer: StageTrainer) -> None:
        """Before training."""

    def before_step(self, step: int) -> None:
        """Before an optimizer step, counted from 0."""

    def optimizer_made(self, trainer: StageTrainer, optimizer: Any) -> None:
        """Once the optimizer is there."""

    def stage_flops(self, config: PretrainConfig, vocabulary: int, steps: int) -> float:
        """Of the matrix products of stage 1."""
        return flops_of(config, vocabulary).factorised * steps


@dataclass
class Grow(Change):
    """FFNs of which a first part is used, more of it later: neurons that are awake, or ranks.

    What is added says nothing at first: weights out of it are zero. New neurons respond as the library's woken ones do.

    Attributes:
        sizes: from which step on, how many; the last is the size of the kind.
    """

    sizes: dict[int, int]

    def __post_init__(self) -> None:
        self.size = self.sizes[0]
        self.parts: list[Any] = []

    def prepare(self, trainer: StageTrainer) -> None:
        """See `Change`."""
        for _, ffn in fastffn_modules(trainer.model):
            if isinstance(ffn, NarrowFFN):
                self.parts.append(ffn)
                ffn.forward = lambda x, ffn=ffn: self._narrow(ffn, x)
            else:
                for part in (part for part in ffn.modules() if isinstance(part, LowRankLinear)):
                    self.parts.append(part)
                    part.forward = lambda x, part=part: self._low_rank(part, x)

    def _narrow(self, ffn: NarrowFFN, x: torch.Tensor) -> torch.Tensor:
        n = self.size
        hidden = ffn.act(F.linear(x, ffn.up.weight[:n], ffn.up.bias[:n]))
        return ffn.dropout(F.linear(hidden, ffn.down.weight[:, :n], ffn.down.bias))

    def _low_rank(self, part: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        n = self.size
        return F.linear(F.linear(x, part.a.weight[:n]), part.b.weight[:, :n], part.b.bias)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """See `Change`."""
        if self.sizes.get(step, self.size) == self.size:
            return
        old, self.size = self.size, self.sizes[step]
        for part in self.parts:
            narrow = isinstance(part, NarrowFFN)
            (part.down if narrow else part.b).weight[:, old : self.size] = 0
            if narrow:
                new = part.up.weight[old : self.size]
                scale = WOKEN * part.up.weight[:old].square().mean().sqrt() / new.square().mean().sqrt()
                new.mul_(scale), part.up.bias[old : self.size].mul_(scale)

    def stage_flops(self, config: PretrainConfig, vocabulary: int, steps: int) -> float:
        """See `Change`."""
        name = "width" if config.ffn == "narrow" else "rank"
        begins = [*self.sizes, steps]
        return sum(
            super(Grow, self).stage_flops(
                replace(config, ffn_options={**config.ffn_options, name: size}), vocabulary, end - begin
            )
            for (begin, size), end in zip(self.sizes.items(), begins[1:], strict=True)
        )


@dataclass
class Guide(Change):
    """Self-guided training (arXiv 2406.16450): `y = s W x + (1 - s) B A x`, s falling from 1 to 0 like a cosine.

    W starts as what the factors were made from, and is trained with an optimizer of its own at the factors' rate.

    Attributes:
        steps: after which s is 0, and W is no longer needed.
    """

    steps: int

    def __post_init__(self) -> None:
        self.share = 1.0
        self.dense: list[torch.nn.Parameter] = []

    def prepare(self, trainer: StageTrainer) -> None:
        """See `Change`."""
        model: Any = trainer.model
        torch.manual_seed(trainer.args.seed)  # the run's own dense start: the same seed, the same draws
        twin = type(model)(model.config)
        for path, ffn in fastffn_modules(model):
            mlp = twin.get_submodule(path)
            for part, linear in ((ffn.up, mlp.c_fc), (ffn.down, mlp.c_proj)):
                weight = torch.nn.Parameter(linear.weight.detach().T.contiguous())
                self.dense.append(weight)
                part.forward = lambda x, part=part, weight=weight: self._guided(part, weight, x)

    def _guided(self, part: LowRankLinear, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not self.share:
            return LowRankLinear.forward(part, x)
        thin = F.linear(F.linear(x, part.a.weight), part.b.weight)
        return self.share * F.linear(x, weight) + (1 - self.share) * thin + part.b.bias

    def before_step(self, step: int) -> None:
        """See `Change`."""
        self.share = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if step < self.steps else 0.0

    def optimizer_made(self, trainer: StageTrainer, optimizer: Any) -> None:
        """See `Change`."""
        args = trainer.args
        betas = (args.adam_beta1, args.adam_beta2)
        own = torch.optim.AdamW(self.dense, betas=betas, weight_decay=args.weight_decay)

        def too(*_: Any) -> None:
            if self.share:
                torch.nn.utils.clip_grad_norm_(self.dense, args.max_grad_norm)
                own.param_groups[0]["lr"] = optimizer.param_groups[SWITCHED]["lr"]
                own.step()
            own.zero_grad()

        optimizer.register_step_post_hook(too)

    def stage_flops(self, config: PretrainConfig, vocabulary: int, steps: int) -> float:
        """See `Change`."""
        layers = config.layers - (config.dense_layers or 0)
        tokens = config.batch * config.sequence * self.steps
        ffns = config.shape(vocabulary).ffn_flops_per_token * layers // config.layers
        return super().stage_flops(config, vocabulary, steps) + ffns * tokens


@dataclass
class LargerBatch(Change):
    """Gradients of several steps, each clipped by itself, before one of the optimizer.

    Attributes:
        times: how many.
        rate: learning rates of stage 1 over what they would be.
    """

    times: int
    rate: float

    def optimizer_made(self, trainer: StageTrainer, optimizer: Any) -> None:
        """See `Change`."""
        for group in optimizer.param_groups:
            group["lr"] *= self.rate
        step = optimizer.step
        kept: dict[Any, torch.Tensor] = {}
        count = 0

        def seldom(self_: Any, closure: Any = None) -> None:
            nonlocal count
            count += 1
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for p in parameters:
                kept[p] = kept.get(p, torch.zeros_like(p)) + p.grad / self.times
            if count % self.times == 0:
                for p in parameters:
                    p.grad = kept.pop(p)
                step()

        optimizer.step = types.MethodType(seldom, optimizer)


@dataclass
class Variant:
    """A recipe of the library's, what is changed about its stage 1, and steps of the whole run."""

    recipe: Recipe
    change: Change
    steps: int = STEPS


def variants() -> dict[str, Variant]:
    """By name."""
    known = recipes()
    narrow, first = known["narrow-2x-70-2x"], known["first-dense-16th-80"]
    wide = replace(narrow, width=2.0)
    ranks = replace(first, rank=1 / 4)
    everywhere = replace(ranks, factors_rate=2.0, ffn_rate=2.0, changes={"switch": 0.7})
    return {
        "dense": Variant(known["dense-ffn-2x"], Change()),
        "dense-800": Variant(known["dense-ffn-2x"], Change(), 800),
        "half-stays": Variant(known["half-stays-2x"], Change()),
        "narrow": Variant(narrow, Change()),
        # What a rule that finds the switch by itself could choose from; the rate falls in the dense stage only.
        **{
            f"narrow-switch-{at}": Variant(
                replace(narrow, changes={"switch": at / 100, "decay": min(0.3, round(1 - at / 100, 2))}), Change()
            )
            for at in (50, 80, 90)
        },
        "narrow-grows-64-128-256": Variant(wide, Grow({0: 64, 250: 128, 500: 256})),
        "first-dense": Variant(first, Change()),
        "first-dense-rank-grows": Variant(ranks, Grow({0: 4, 300: 8, 600: 32})),
        "rank": Variant(everywhere, Change()),
        "rank-grows": Variant(everywhere, Grow({0: 8, 250: 16, 500: 32})),
        "first-dense-guided": Variant(first, Guide(200)),
        "rank-guided": Variant(everywhere, Guide(350)),
        "narrow-batch-2": Variant(narrow, LargerBatch(2, 1.0)),
        "narrow-batch-2-faster": Variant(narrow, LargerBatch(2, 1.4)),
    }


def train(variant: Variant, base: PretrainConfig, seed: int, output: Path) -> dict[str, Any]:
    """One complete run, and what is kept of it."""
    change = variant.change
    config = variant.recipe.run(base, steps=variant.steps, rate=RATE, seed=seed)
    dense = DENSE.run(base, steps=STEPS, rate=RATE, seed=seed)

    class Trainer(StageTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            if self.stage.name == "stage1":
                change.prepare(self)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.stage.name == "stage1":
                change.before_step(self.state.global_step)
            return super().training_step(*args, **kwargs)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            made = self.optimizer is None
            optimizer = super().create_optimizer(*args, **kwargs)
            if made and self.stage.name == "stage1":
                change.optimizer_made(self, optimizer)
            return optimizer

    with mock.patch.object(pretraining, "StageTrainer", Trainer):
        results = pretraining.pretrain(config, output, overwrite=not (output / "results.json").is_file())
    record = record_of(config, results)
    vocabulary = results["text"]["vocabulary"]
    price = flops_of(config, vocabulary)
    whole = flops_of(dense, vocabulary).dense * STEPS
    spent = price.start + price.merge
    for stage in record["stages"]:
        steps = stage["end"] - stage["begin"]
        first = stage["name"] == "stage1"
        spent += change.stage_flops(config, vocabulary, steps) if first else price.dense * steps
    return {"loss": record["loss"], "flops_over_dense": round(spent / whole, 4), "stages": record["stages"]}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(variants())}; default: all")
    args = parser.parse_args()
    base = PretrainConfig(
        data=args.data, validation=args.validation, layers=4, d_model=128, heads=4, sequence=128, batch=16,
        warmup_steps=50, evaluate_every=50, checkpoint_every=100_000, log_every=50, validation_blocks=256,
        tokenizer="train:2048", initializer_range=SPREAD,
    )  # fmt: skip
    for name in args.names or variants():
        directory = args.output / f"{name}-seed-{args.seed}"
        kept = args.output / f"{directory.name}.json"
        if not kept.is_file():
            found = train(variants()[name], base, args.seed, directory)
            write_json(kept, {"variant": name, "seed": args.seed, **found})
    runs = [read_json(path) for path in sorted(args.output.glob("*-seed-*.json"))]
    shape = {n: v for n, v in base.to_flat().items() if v is not None}
    result = {"steps": STEPS, "rate": RATE, "config": shape, "runs": runs, "machine": describe_machine()}
    write_json(args.output / "result.json", result)
    rows = [[run["variant"], run["seed"], run["flops_over_dense"], run["loss"]] for run in runs]
    print(tabulate(rows, ["stage 1", "seed", "FLOPs", "final loss"], "github", floatfmt=("", "", ".3f", ".4f")))


if __name__ == "__main__":
    main()

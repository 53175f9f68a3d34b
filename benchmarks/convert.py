"""Real models converted, recovered and measured: `python benchmarks/convert.py minilm CHECKPOINT`.

    python benchmarks/real_models.py minilm checkpoints/minilm
    python benchmarks/convert.py minilm checkpoints/minilm --minutes 8 --name epyc-sentences
    python benchmarks/convert.py minilm checkpoints/minilm --minutes 8 --name epyc-2cores --text corpus
    python benchmarks/convert.py smollm2 checkpoints/smollm2 --minutes 10 --name epyc-2cores
    python benchmarks/convert.py smollm2 checkpoints/smollm2 --name epyc-int8 --recipes "int8 weights"

Three parts: `quality` (dense, int8, each recipe after conversion and, for some, after `--minutes` of distillation),
`sensitivity` (a few layers converted at a time) and `speed`. Pieces that are done are kept: the same command goes on.
Texts come from the folder that FASTFFN_DATA_DIR names. Writes `benchmarks/results/convert/<MODEL>-<NAME>.json`.

Measure speed with `MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=2000000000` in the environment: glibc else
gives the dense model's larger hidden activations back to the system after each call, and page faults flatter whatever
is narrower.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import convert_speed as speed
import torch
from convert_quality import Perplexity, Sentences, task_sentences

import fastffn
import fastffn.hf  # so that checkpoints with FastFFN kinds load
from fastffn.convert import match
from fastffn.convert.checkpoint import copy_model_files
from fastffn.convert.files import new_directory, read_json, write_json
from fastffn.data.batches import text_batches
from fastffn.data.text import find_text
from fastffn.data.tokenizer import load_tokenizer
from fastffn.measure.machine import describe_machine
from fastffn.nn import FFNConfig, Int8Config, LowRankConfig, MoEConfig, NarrowConfig
from fastffn.settings import data_dir

RESULTS = Path(__file__).parent / "results" / "convert"


@dataclass(frozen=True)
class Recipe:
    """A kind for some layers.

    Attributes:
        config: the kind.
        layers: how many, those that mind least; None: all. They are taken from the recipe of the same kind for all.
        distill: whether it is recovered as well.
    """

    config: FFNConfig
    layers: int | None = None
    distill: bool = False

    @property
    def linear(self) -> bool:
        """Whether its FFNs are linear layers, which may be quantised and packed as a dense one's."""
        return not isinstance(self.config, (Int8Config, MoEConfig))


@dataclass(frozen=True)
class Study:
    """What is done with a model.

    Attributes:
        text: what it is calibrated and recovered on: a general `corpus`, or single `sentences` (of tasks other than
            the one that quality is measured on).
        recipes: by name.
        together: layers that are converted together when it is measured which mind least.
        calibration, sequence: tokens, and how many in a sequence.
        distill: options of `DistillConfig`.
    """

    text: str
    recipes: dict[str, Recipe]
    together: int
    calibration: int
    sequence: int
    distill: dict[str, Any]


STUDIES = {
    "minilm": Study(
        text="sentences",
        recipes={
            "narrow 704": Recipe(NarrowConfig(width=704, drop=True), distill=True),
            "narrow 384": Recipe(NarrowConfig(width=384, drop=True)),
            "narrow 384, 4 layers": Recipe(NarrowConfig(width=384, drop=True), layers=4),
            "narrow 704, 4 layers": Recipe(NarrowConfig(width=704, drop=True), layers=4),
            "narrow 576": Recipe(NarrowConfig(width=576, drop=True)),
            "narrow 576, 5 layers": Recipe(NarrowConfig(width=576, drop=True), layers=5),
            "low_rank 128": Recipe(LowRankConfig(rank=128)),
            "moe 4 of 12, 192 shared": Recipe(MoEConfig(experts=12, active=4, shared=192)),
            "int8 weights": Recipe(Int8Config()),
        },
        together=1,
        calibration=32768,
        sequence=64,
        distill={"sequence": 64, "batch": 64, "layer_steps": 0, "steps": 250, "learning_rate": 1e-4},
    ),
    "smollm2": Study(
        text="corpus",
        recipes={
            "narrow 768": Recipe(NarrowConfig(width=768, drop=True), distill=True),
            "narrow 768, 9 layers": Recipe(NarrowConfig(width=768, drop=True), layers=9),
            "narrow 768, 18 layers": Recipe(NarrowConfig(width=768, drop=True), layers=18),
            "int8 weights": Recipe(Int8Config()),
        },
        together=3,
        calibration=8192,
        sequence=512,
        distill={"sequence": 256, "batch": 8, "layer_steps": 0, "steps": 20, "learning_rate": 3e-4},
    ),
}


class Bench:
    """One model's pieces, kept in one file."""

    def __init__(self, study: Study, directory: Path, data: Path, work: Path, results: Path) -> None:
        self.study, self.directory, self.data, self.work, self.file = study, directory, data, work, results
        self.kept: dict[str, Any] = read_json(results) if results.is_file() else {}
        self._quality: Any = None
        self._train: Any = None  # layers are not chosen by what the models are measured on
        self._converted: dict[str, Any] = {}

    def piece(self, part: str, name: str, make: Callable[[], Any]) -> Any:
        """What is kept under a name, or is made now."""
        found = self.kept.setdefault(part, {})
        if name not in found:
            begun = time.monotonic()
            found[name] = make()
            self.kept["machine"] = describe_machine()
            self.kept["malloc"] = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
            write_json(self.file, self.kept)
            print(f"{part}: {name} ({time.monotonic() - begun:.0f} s): {found[name]}", flush=True)
        return found[name]

    def load(self, directory: Path) -> Any:
        """A model, ready to be measured; the original where `directory` is its own."""
        import transformers

        name = read_json(directory / "config.json")["architectures"][0]
        return getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()

    @property
    def quality(self) -> Any:
        """Measures a model's quality."""
        if self._quality is None:
            original = self.load(self.directory)
            sentences = not hasattr(original, "lm_head")
            measure = Sentences(self.directory, self.data, original) if sentences else None
            self._quality = measure or Perplexity(self.directory, self.data)
        return self._quality

    def qualities(self, minutes: float) -> None:
        """Dense, int8, and every recipe, before and after it is recovered."""
        self.piece("quality", "dense", lambda: self.quality(self.load(self.directory)))
        self.piece("quality", "dense, int8", lambda: self.quality(speed.int8(self.load(self.directory))))
        narrower = "dense, bfloat16"
        self.piece("quality", narrower, lambda: self.quality(self.load(self.directory).to(torch.bfloat16)))
        for name, recipe in self.study.recipes.items():
            self.piece("quality", name, lambda name=name: self.quality(self.model(name)))
            if recipe.layers is None and recipe.linear:
                both = f"{name}, int8"
                self.piece("quality", both, lambda name=name: self.quality(speed.int8(self.model(name))))
            elif isinstance(recipe.config, Int8Config):
                both = f"{name}, bfloat16"
                self.piece("quality", both, lambda name=name: self.quality(self.model(name).to(torch.bfloat16)))
            if recipe.distill and minutes:
                student = self.student(name)
                self.piece("distilled", name, lambda student=student: self.recovered(student, minutes))
                better = student.with_name(student.name + "-run") / "student"
                self.piece("quality", f"{name}, distilled", lambda at=better: self.quality(self.load(at)))

    def student(self, name: str) -> Path:
        """The converted checkpoint of a recipe that takes all layers."""
        target = self.work / name.replace(", ", "-").replace(" ", "-")
        if not target.is_dir():
            model = self.load(self.directory)
            begun = time.monotonic()
            fastffn.convert(model, self.study.recipes[name].config, calibration=self.batches())
            self.piece("seconds", name, lambda: time.monotonic() - begun)
            with new_directory(target) as partial:
                model.save_pretrained(partial)
                copy_model_files(self.directory, partial)
        return target

    def model(self, name: str) -> Any:
        """The model of a recipe."""
        recipes = self.study.recipes
        config, layers = recipes[name].config, recipes[name].layers
        if layers is None:
            return self.load(self.student(name))
        whole = next(other for other, recipe in recipes.items() if recipe.config == config and recipe.layers is None)
        groups = self.sensitivities()
        mildest = sorted(groups, key=lambda group: groups[group]["loss"])[: layers // self.study.together]
        model = self.load(self.directory)
        self._convert_some(model, whole, [path for group in mildest for path in group.split()])
        return model

    def _convert_some(self, model: Any, recipe: str, paths: list[str]) -> None:
        """Puts FFNs of a converted model into the dense `model`."""
        if recipe not in self._converted:
            self._converted[recipe] = self.load(self.student(recipe))
        family = match.family_of(model.config)
        for path in paths:
            family.put_in(model, path, self._converted[recipe].get_submodule(path))

    def batches(self) -> Any:
        """The calibration."""
        tokenizer = load_tokenizer(str(self.directory), end_of_text=False)
        source = find_text(self.text("train"))
        return text_batches(source, tokenizer, sequence=self.study.sequence, tokens=self.study.calibration)

    def text(self, part: str) -> str:
        """The file of the texts to learn from; `part` is `train` or `valid`."""
        if self.study.text == "corpus":
            return str(self.data / "corpus" / ("train-000.txt.xz" if part == "train" else "valid.txt.xz"))
        file = self.work / f"sentences-{part}.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            texts = task_sentences(self.data, "train" if part == "train" else "dev")
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return str(file)

    def recovered(self, student: Path, minutes: float) -> dict[str, Any]:
        """Distils for so long at most; what the run says."""
        from fastffn.train.distill.config import DistillConfig
        from fastffn.train.distill.run import distill

        config = DistillConfig(
            student=str(student),
            teacher=str(self.directory),
            data=self.text("train"),
            validation=self.text("valid"),
            **self.study.distill,
        )
        results = distill(config, student.with_name(student.name + "-run"), max_minutes=minutes)
        if not results["complete"]:
            sys.exit(f"{minutes} minutes were not enough; the same command goes on.")
        record = results["stages"]["student"]
        return {"before": results["before"], **self.study.distill} | {
            key: record[key] for key in ("steps", "tokens", "own_seconds", "held_out")
        }

    def sensitivities(self) -> dict[str, dict[str, float]]:
        """What it costs to convert a few layers alone, by their paths."""
        model = self.load(self.directory)
        paths = [path for path, _ in match.family_ffns(model, match.family_of(model.config))]
        step = self.study.together
        groups = [paths[start : start + step] for start in range(0, len(paths), step)]
        self.piece("sensitivity of none", "dense", partial(self._some, []))
        return {
            " ".join(group): self.piece("sensitivity", " ".join(group), partial(self._some, group)) for group in groups
        }

    def _some(self, group: list[str]) -> dict[str, float]:
        model = self.load(self.directory)
        self._convert_some(model, next(iter(self.study.recipes)), group)
        if isinstance(self.quality, Perplexity):
            return {"loss": math.log(self.quality.of(model, self.quality.blocks["corpus"][:4]))}
        if self._train is None:
            self._train = Sentences(self.directory, self.data, self.load(self.directory), "train")
        found = self._train(model)
        return {"loss": -found["spearman"], **found}

    def speeds(self, rounds: int) -> None:
        """FFNs alone, and end to end; against the dense model as it is, by oneDNN, and in int8."""
        torch.manual_seed(0)
        dense = self.load(self.directory)
        paths = [path for path, _ in match.family_ffns(dense, match.family_of(dense.config))]
        models = {"dense": dense, "dense, oneDNN": speed.packed(dense), "dense, int8": speed.int8(dense)}
        models["dense, bfloat16"] = self.load(self.directory).to(torch.bfloat16)
        for name, recipe in self.study.recipes.items():
            model = self.model(name)
            models[name] = model
            if recipe.layers is None and recipe.linear:
                models[f"{name}, oneDNN"] = speed.packed(model)
                models[f"{name}, int8"] = speed.int8(model)
            elif isinstance(recipe.config, Int8Config):
                models[f"{name}, bfloat16"] = self.model(name).to(torch.bfloat16)
        races: dict[str, Callable[[], Any]] = {"FFNs, 32 tokens": lambda: speed.ffn_calls(models, paths, 32)}
        if hasattr(dense, "lm_head"):
            races["FFNs, 1 token"] = lambda: speed.ffn_calls(models, paths, 1)
            races["decoding, 1 sequence"] = lambda: speed.decode_calls(models)
            races["prompts, 16 x 32 tokens"] = lambda: speed.prompt_calls(models, 16)
        else:
            races["FFNs, 2048 tokens"] = lambda: speed.ffn_calls(models, paths, 2048)
            races["1 x 32 tokens"] = lambda: speed.encoder_calls(models, 1)
            races["64 x 32 tokens"] = lambda: speed.encoder_calls(models, 64)
        for name, calls in races.items():
            few = rounds if "1 " in name or "FFNs" in name else max(5, rounds // 4)
            self.piece("speed", name, lambda calls=calls, few=few: speed.race(calls(), few))

    def table(self) -> str:
        """What is kept, as Markdown."""
        from tabulate import tabulate

        qualities = self.kept.get("quality", {})
        measures = list(next(iter(qualities.values()))) if qualities else []
        races = self.kept.get("speed", {})
        names = list(dict.fromkeys([*qualities, *(name for race in races.values() for name in race)]))
        rows = [
            [name, *[f"{qualities[name][m]:.3f}" if name in qualities else "" for m in measures]]
            + [f"{r['dense']['median'] / r[name]['median']:.2f}" if name in r else "" for r in races.values()]
            for name in names
        ]
        return str(tabulate(rows, ["", *measures, *races], tablefmt="github", disable_numparse=True))


def main() -> None:
    """Do what is asked, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(STUDIES))
    parser.add_argument("checkpoint", type=Path, help="the dense original; see real_models.py")
    parser.add_argument("--text", choices=["corpus", "sentences"], help="to calibrate on; the model's own by default")
    parser.add_argument("--parts", default="quality,sensitivity,speed", help="some of them, with commas")
    parser.add_argument("--recipes", help="some of the model's recipes, with commas; all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="of distillation for a recipe; 0: none")
    parser.add_argument("--rounds", type=int, default=20, help="of the timer")
    parser.add_argument("--name", default="here", help="which machine it was")
    parser.add_argument("--work", type=Path, default=Path("runs/convert"), help="where converted checkpoints go")
    args = parser.parse_args()
    data = data_dir()
    if data is None:
        sys.exit("FASTFFN_DATA_DIR names no folder; the texts of this benchmark are read from there.")
    results = RESULTS / f"{args.model}-{args.name}.json"
    study = STUDIES[args.model]
    wanted = args.recipes.split(",") if args.recipes else list(study.recipes)
    recipes = {name: study.recipes[name] for name in wanted}
    study = dataclasses.replace(study, text=args.text or study.text, recipes=recipes)
    bench = Bench(study, args.checkpoint, data, args.work / f"{args.model}-{study.text}", results)
    for part in args.parts.split(","):
        if part == "sensitivity":
            bench.sensitivities()
        elif part == "quality":
            bench.qualities(args.minutes)
        elif part == "speed":
            bench.speeds(args.rounds)
    print(bench.table())


if __name__ == "__main__":
    main()

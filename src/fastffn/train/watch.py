"""What a run shows while it goes on: a bar on a terminal, a line a minute elsewhere, and the report so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastffn.train.gain import Gain
from fastffn.train.plan import Stage

# Between two lines where there is no terminal, and between two reports.
LINE_SECONDS = 60.0


class Forecast:
    """How long the rest of a run will take: steps left, at the speed of the steps so far.

    Args:
        stages: of the run, in order.
        gain: what dense and factorised steps cost, for stages of the other sort; None where all are alike.
    """

    def __init__(self, stages: dict[str, Stage], gain: Gain | None) -> None:
        self._stages = list(stages.values())
        self._cost = {False: gain.dense_seconds, True: gain.factorised_seconds} if gain else {False: 1.0, True: 1.0}

    def seconds_left(self, stage: Stage, step: int, seconds_a_step: float) -> float:
        """Seconds until the run ends, from `step` of `stage` on, validations and checkpoints included.

        Args:
            stage: the one that is trained.
            step: steps of the run that are done.
            seconds_a_step: what a step of this stage takes by the clock on the wall.
        """
        number = next(n for n, other in enumerate(self._stages) if other.name == stage.name)
        left = (stage.end - step) * self._cost[stage.factorised]
        left += sum(other.steps * self._cost[other.factorised] for other in self._stages[number + 1 :])
        return left * seconds_a_step / self._cost[stage.factorised]


def in_words(seconds: float) -> str:
    """A duration, roughly: `40 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class Watch(TrainerCallback):
    """Shows a stage.

    Args:
        stage: which.
        tokens_per_step: of an optimizer step, over all processes.
        forecast: for the time left.
        report: called with a sentence on the state of the stage and its log entries, at most once a minute, and at
            the end.
    """

    def __init__(
        self,
        stage: Stage,
        tokens_per_step: int,
        forecast: Forecast,
        report: Callable[[str, list[dict[str, Any]]], None],
    ) -> None:
        self.stage = stage
        self.tokens_per_step = tokens_per_step
        self.forecast = forecast
        self.report = report
        self.bar: Any = None
        self._logs: dict[str, Any] = {}
        self._begun = (0, 0.0)
        self._line_at = self._report_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
        now = time.monotonic()
        self._begun = (state.global_step, now)
        self._line_at = self._report_at = now
        if sys.stderr.isatty() and state.is_world_process_zero:
            self.bar = tqdm(
                total=self.stage.end,
                initial=state.global_step,
                desc=self.stage.name,
                unit="step",
                dynamic_ncols=True,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar, or prints a line if a minute has passed."""
        if not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.update(1)
        elif time.monotonic() - self._line_at >= LINE_SECONDS:
            self._line(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remembers losses and rate."""
        self._logs |= logs or {}
        if self.bar is not None:
            shown = {"loss": self._logs.get("loss"), "validation": self._logs.get("eval_loss")}
            numbers = {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
            self.bar.set_postfix(numbers | {"run": f"{in_words(self._left(state))} left"})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the report so far, if a minute has passed."""
        now = time.monotonic()
        ended = state.global_step >= self.stage.end
        if not state.is_world_process_zero or not (ended or now - self._report_at >= LINE_SECONDS):
            return
        self._report_at = now
        try:
            self.report(
                f"{self.stage.name}: step {state.global_step} of {self.stage.end}; about "
                f"{in_words(self._left(state))} left of the whole run.",
                state.log_history,
            )
        except Exception as error:  # a picture that cannot be drawn is no reason to stop training
            print(f"The report so far could not be written: {error}", flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar; a last line elsewhere."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        elif state.is_world_process_zero:
            self._line(state)

    def _left(self, state: TrainerState) -> float:
        step, at = self._begun
        return self.forecast.seconds_left(
            self.stage, state.global_step, (time.monotonic() - at) / max(1, state.global_step - step)
        )

    def _line(self, state: TrainerState) -> None:
        self._line_at = time.monotonic()
        step, at = self._begun
        speed = (state.global_step - step) * self.tokens_per_step / max(1e-9, self._line_at - at)
        parts = [f"{self.stage.name}  step {state.global_step}/{self.stage.end}"]
        parts += [
            f"{word} {self._logs[name]:{form}}"
            for word, name, form in (
                ("loss", "loss", ".4f"),
                ("validation", "eval_loss", ".4f"),
                ("rate", "learning_rate", ".2e"),
            )
            if name in self._logs
        ]
        left = self._left(state)
        parts.append(f"{speed:,.0f} tokens/s")
        parts.append(f"about {in_words(left)} left" if left > 0 else "done")
        print("  ".join(parts), flush=True)

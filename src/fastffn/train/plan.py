"""The stages of a run: which model is trained from which step to which, and at what rate."""

from __future__ import annotations

from dataclasses import dataclass

from fastffn.errors import ConfigError
from fastffn.train.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: also that of its directory.
        factorised: whether its FFNs are of the run's kind instead of dense.
        begin, end: optimizer steps; the schedule counts them from the beginning of the run.
        total: steps that the schedule spans.
        learning_rate, switched_learning_rate: peak rates of groups 0 and 1, and of group 2.
        rewarm_steps: steps from `begin` over which group 2's rate rises to the schedule; 0 for none.
        dense_layers: first FFNs that are never factorised: in group 0 instead of 2.
        data_seed: seed of the order of the data.
    """

    name: str
    factorised: bool = False
    begin: int = 0
    end: int
    total: int
    learning_rate: float
    switched_learning_rate: float
    rewarm_steps: int = 0
    dense_layers: int = 0
    data_seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps of its own."""
        return self.end - self.begin


def plan_stages(config: PretrainConfig, steps: int) -> dict[str, Stage]:
    """All stages of a run of `steps` optimizer steps (of each stage with `restart`), in order, by name.

    Raises:
        ConfigError: a stage would be empty.
    """
    rate = config.learning_rate
    dense_rate = config.dense_learning_rate or rate
    seed = config.seed

    def dense(name: str, steps: int) -> Stage:
        return Stage(
            name=name,
            end=steps,
            total=steps,
            learning_rate=dense_rate,
            switched_learning_rate=config.ffn_learning_rate or dense_rate,
            dense_layers=config.dense_layers or 0,
            data_seed=seed,
        )

    def part(name: str, begin: int, end: int, total: int, *, factorised: bool, rewarm: int = 0, seed: int) -> Stage:
        return Stage(
            name=name,
            factorised=factorised,
            begin=begin,
            end=end,
            total=total,
            learning_rate=rate,
            switched_learning_rate=(config.factor_learning_rate if factorised else config.ffn_learning_rate) or rate,
            rewarm_steps=rewarm,
            dense_layers=config.dense_layers or 0,
            data_seed=seed,
        )

    plan = []
    if config.baseline or config.ffn == "dense":
        plan.append(dense("dense", steps))
    if config.ffn == "dense":
        pass
    elif not config.two_stage:
        # What does not merge is trained to the end, in a directory that bears its name.
        plan.append(part(config.ffn, 0, steps, steps, factorised=True, seed=seed))
    elif config.restart:
        if config.baseline:
            # As many tokens as both stages together.
            plan.append(dense("dense_equal_tokens", 2 * steps))
        plan.append(part("stage1", 0, steps, steps, factorised=True, seed=seed))
        # The seed of the second pass over the data, as the baseline sees it.
        plan.append(part("stage2", 0, steps, steps, factorised=False, seed=seed + 1))
    else:
        switch = round(config.switch * steps)
        warm = round(config.dense_warmup * steps)
        if not 0 <= warm < switch < steps:
            raise ConfigError(
                f"{steps} steps are too few for a switch at {config.switch} and a dense warm-up of "
                f"{config.dense_warmup}: a stage would be empty. Take more steps."
            )
        rewarm = config.rewarm_steps
        if warm:
            plan.append(part("warmup", 0, warm, steps, factorised=False, seed=seed))
        plan.append(part("stage1", warm, switch, steps, factorised=True, rewarm=rewarm if warm else 0, seed=seed))
        plan.append(part("stage2", switch, steps, steps, factorised=False, rewarm=rewarm, seed=seed))
    return {stage.name: stage for stage in plan}

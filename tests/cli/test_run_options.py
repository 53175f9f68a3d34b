"""What a run becomes of a preset, a file and flags."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner

from fastffn.cli.commands import cli
from fastffn.errors import ConfigError
from fastffn.train.config import RATES, PretrainConfig
from fastffn.train.plan import plan_stages


def printed(*arguments: str) -> dict:
    """A run's fields; of the preset `demo` where none is named."""
    preset = [] if "--preset" in arguments else ["--preset", "demo"]
    result = CliRunner().invoke(cli, ["pretrain", *preset, *arguments, "--print-config"])
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.output)


def rates(*arguments: str) -> list[float | None]:
    values = printed(*arguments)
    return [values[name] for name in RATES]


def test_no_preset_is_none_of_the_demos_choices() -> None:
    """Rates that are right for 360 steps would handicap the dense side of a longer run."""
    result = CliRunner().invoke(cli, ["pretrain", "--data", "x", "--print-config"])
    values = yaml.safe_load(result.output)
    assert [values[name] for name in (*RATES, "dense_layers", "rank")] == [1e-3, None, None, None, None, None]
    assert PretrainConfig.from_flat(values) == PretrainConfig(data="x")


def test_help_has_the_values_of_what_it_starts_from() -> None:
    texts = {}
    for command in (("pretrain",), ("experiment", "tree-ladder"), ("experiment", "wikitext-2")):
        texts[command[-1]] = " ".join(CliRunner().invoke(cli, [*command, "--help"]).output.split())
    assert "[default: 360]" in texts["pretrain"] and "[default: 360]" in texts["wikitext-2"]
    assert "[small: 500]" in texts["tree-ladder"] and "[small: 360]" not in texts["tree-ladder"]
    assert "[default: small]" in texts["tree-ladder"] and "gpt2-small, seed. [default: none]" in texts["pretrain"]


def test_preset_then_file_then_flags(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    # YAML 1.1 reads 1e-3 as a word; the field's type decides.
    path.write_text("layers: 3\nlearning_rate: 1e-3\nwidth: 5\nheads: 2\n")
    values = printed("--preset", "gpt2-small", "--config", str(path), "--heads", "4", "--no-baseline", "--compile")
    assert (values["layers"], values["learning_rate"], values["width"], values["heads"]) == (3, 1e-3, 5, 4)
    assert (values["d_model"], values["baseline"], values["compile"]) == (768, False, True)


def test_one_length_replaces_the_other(tmp_path) -> None:
    values = printed("--epochs", "2")
    assert (values["steps"], values["epochs"]) == (None, 2.0)
    values = printed("--preset", "seed", "--steps", "7")
    assert (values["steps"], values["epochs"]) == (7, None)


def test_a_learning_rate_is_for_all() -> None:
    assert rates() == [1.4e-3, 1e-3, 3.5e-4, 1.25e-4]
    assert rates("--learning-rate", "3e-4", "--factor-learning-rate", "5e-4") == [3e-4, None, 5e-4, None]
    assert rates("--learning-rate", "3e-4", "--ffn-learning-rate", "6e-4") == [3e-4, None, None, 6e-4]


def test_files_put_aside_what_contradicts_them_as_flags_do(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("learning_rate: 3.0e-4\nepochs: 1\n")
    values = printed("--config", str(path))
    assert (values["steps"], values["epochs"]) == (None, 1.0)
    assert (values["learning_rate"], values["dense_learning_rate"], values["factor_learning_rate"]) == (
        3e-4,
        None,
        None,
    )
    path.write_text("learning_rate: 3.0e-4\ndense_learning_rate: 5.0e-4\n")
    assert printed("--config", str(path))["dense_learning_rate"] == 5e-4


def test_another_kind_does_not_have_the_presets_options() -> None:
    values = printed("--preset", "seed", "--data", "x", "--ffn", "block", "--blocks", "8")
    assert (values["ffn"], values["blocks"], values["rank"], values["start"]) == ("block", 8, None, None)
    # Without stages there are none for the schedule to span.
    values = printed("--preset", "seed", "--data", "x", "--ffn", "dense", "--no-restart", "--decay", "0.9")
    assert (values["ffn"], values["rank"], values["schedule"], values["decay"]) == ("dense", None, "cosine", 0.9)
    # Nor is the first FFN, which factors spare, for other kinds.
    assert printed()["dense_layers"] == 1 and printed("--ffn", "neuron_tree")["dense_layers"] is None
    assert printed("--ffn", "block", "--dense-layers", "2")["dense_layers"] == 2
    assert printed("--layers", "1")["dense_layers"] is None and printed("--layers", "2")["dense_layers"] == 1


def test_a_presets_rates_are_for_its_choice_of_ffns() -> None:
    # Without the FFN that is spared all parts learn as dense ones do, on both sides.
    for flags in (["--dense-layers", "0"], ["--layers", "1"], ["--ffn", "block"], ["--dense-layers", "2"]):
        assert rates(*flags) == [1e-3, 1e-3, None, None]
    assert rates("--dense-layers", "0", "--ffn-learning-rate", "2e-3") == [1e-3, 1e-3, None, 2e-3]
    assert rates("--ffn", "block", "--learning-rate", "3e-3") == [3e-3, None, None, None]
    assert rates("--dense-layers", "1", "--rank", "8") == rates()
    assert rates("--preset", "gpt2-small", "--dense-layers", "0") == rates("--preset", "gpt2-small")


def test_dense_by_itself_is_the_run_that_stands_beside_two_stages() -> None:
    both, alone = (PretrainConfig.from_flat(printed(*flags)) for flags in ([], ["--ffn", "dense"]))
    assert alone.ffn == "dense" and plan_stages(alone, 50) == {"dense": plan_stages(both, 50)["dense"]}
    assert alone.ffn_learning_rate and alone.dense_layers
    assert printed("--ffn", "dense", "--ffn-learning-rate", "2e-3")["ffn_learning_rate"] == 2e-3
    # All FFNs alike.
    alike = PretrainConfig.from_flat(printed("--ffn", "dense", "--dense-layers", "0"))
    (stage,) = plan_stages(alike, 50).values()
    assert stage.learning_rate == stage.switched_learning_rate == 1e-3
    assert printed("--ffn", "dense", "--layers", "1")["ffn_learning_rate"] is None


def test_rates_in_a_file_are_kept(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("factor_learning_rate: 2.0e-3\nffn_learning_rate: 4.0e-3\n")
    file = ["--config", str(path)]
    assert rates(*file, "--dense-layers", "0") == [1e-3, 1e-3, 2e-3, 4e-3]
    assert rates(*file, "--ffn", "narrow") == [1e-3, 1e-3, 2e-3, 4e-3]
    # Dense FFNs have no factors.
    assert rates(*file, "--ffn", "dense") == [1.4e-3, 1e-3, None, 4e-3]
    assert rates(*file, "--learning-rate", "5e-4") == [5e-4, None, None, None]
    path.write_text("ffn: narrow\nlearning_rate: 5.0e-3\nfactor_learning_rate: 2.0e-3\n")
    assert rates(*file) == [5e-3, None, 2e-3, None]
    path.write_text(CliRunner().invoke(cli, ["pretrain", "--preset", "demo", "--print-config"]).output)
    assert rates(*file) == rates() and rates(*file, "--dense-layers", "0") == rates()


@pytest.mark.parametrize("line", ["steps: 12.9", "layers: 2.9", "batch: true", "learning_rate: true", "baseline: 3"])
def test_a_file_says_what_a_flag_could_say(line, tmp_path) -> None:
    """Taken for a number, `steps: 12.9` would have been 12, and `batch: true` 1."""
    path = tmp_path / "config.yaml"
    path.write_text(line + "\n")
    result = CliRunner().invoke(cli, ["pretrain", "--config", str(path), "--print-config"])
    name, value = line.split(": ")
    assert isinstance(result.exception, ConfigError)
    assert f"{name} is {value.title() if value == 'true' else value}: " in str(result.exception)

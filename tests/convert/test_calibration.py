"""The tokens that calibration takes: the right ones, of every layer the same, in bounded memory."""

from __future__ import annotations

import pytest
import torch

import fastffn
from fastffn import LowRankConfig, LowRankFFN
from fastffn.convert.calibration import sample_inputs
from fastffn.convert.match import family_ffns, family_of, fastffn_modules
from fastffn.errors import ConversionError
from tests.convert.models import MODELS, VOCABULARY, D, first_output, make, tokens

PATHS = ["transformer.h.0.mlp", "transformer.h.1.mlp"]


def paths_of(model) -> list[str]:
    return [path for path, _ in family_ffns(model, family_of(model.config))]


def seen_by(model, path: str, **inputs: torch.Tensor) -> torch.Tensor:
    """`[B, T, D]`, what an FFN gets."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def rows_in(rows: torch.Tensor, of: torch.Tensor) -> list[int]:
    """Of each row the number of the nearest one among others, which must be all but equal."""
    distances = torch.cdist(rows.double(), of.double())
    assert distances.min(1).values.max() < 1e-5
    return distances.argmin(1).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_all_tokens_where_they_fit(name) -> None:
    model = make(name)
    paths, ids = paths_of(model), tokens(4)
    found = sample_inputs(model, paths, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}])
    assert list(found) == paths
    for path in paths:
        assert found[path].shape == (64, D)
        torch.testing.assert_close(found[path], seen_by(model, path, input_ids=ids).flatten(0, 1))
    tensors = sample_inputs(model, paths, [ids[:1], ids[1:]])
    assert all(torch.equal(tensors[path], found[path]) for path in paths)


def test_a_text_is_read_without_the_head() -> None:
    model = make("gpt2")
    called = []
    model.lm_head.register_forward_hook(lambda *_: called.append(True))
    ids = tokens(2)
    for batch in (ids, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        sample_inputs(model, PATHS, [batch])
    assert not called
    sample_inputs(model, PATHS, [{"input_ids": ids, "labels": ids}])
    assert called


def test_padding_is_left_out() -> None:
    model = make("bert")
    ids, mask = tokens(3), torch.ones(3, 16, dtype=torch.long)
    mask[0, 5:] = 0
    mask[2, :3] = 0
    for path in paths_of(model):
        found = sample_inputs(model, [path], [{"input_ids": ids, "attention_mask": mask}])[path]
        expected = seen_by(model, path, input_ids=ids, attention_mask=mask)[mask.bool()]
        assert len(found) == 5 + 16 + 13
        torch.testing.assert_close(found, expected)


def test_a_sample_is_of_the_same_tokens_in_all_layers_and_repeats() -> None:
    model = make("gpt2")
    batches = [tokens(2), *torch.randint(3, VOCABULARY, (5, 2, 16))]
    found = sample_inputs(model, PATHS, batches, sample=20)
    chosen = [rows_in(found[path], seen_by(model, path, input_ids=torch.cat(batches)).flatten(0, 1)) for path in PATHS]
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 20
    again = sample_inputs(model, PATHS, batches, sample=20)
    assert all(torch.equal(found[path], again[path]) for path in PATHS)
    other = sample_inputs(model, PATHS, batches, sample=20, seed=1)
    assert not torch.equal(found[PATHS[0]], other[PATHS[0]])


def test_every_token_is_as_likely() -> None:
    class Numbers(torch.nn.Module):
        """Hands its FFN the tokens' own numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.ffn = torch.nn.Linear(1, 1)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.ffn(input_ids.unsqueeze(-1).float())

    model, kept = Numbers(), torch.zeros(30)
    batches = [torch.arange(0, 12).view(1, 12), torch.arange(12, 16).view(2, 2), torch.arange(16, 30).view(1, 14)]
    for seed in range(400):
        rows = sample_inputs(model, ["ffn"], batches, sample=10, seed=seed)["ffn"]
        assert len(rows.unique()) == 10
        kept[rows.flatten().long()] += 1
    # Of 400 samples a third each: 133 with a deviation of 9.4; five of them.
    assert kept.sub(400 / 3).abs().max() < 47, kept


def test_memory_does_not_grow_with_the_batches() -> None:
    model = make("gpt2")
    given = 0

    def stream():
        nonlocal given
        for _ in range(50):
            given += 1
            yield tokens(1)

    found = sample_inputs(model, PATHS, stream(), sample=32)
    assert given == 50
    assert [rows.shape for rows in found.values()] == [(32, D)] * 2
    assert all(rows.untyped_storage().nbytes() == 32 * D * 4 for rows in found.values())


def test_the_model_stays_as_it_was() -> None:
    model = make("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    sample_inputs(model, PATHS, [tokens()])
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    # Dropout does not disturb what is seen.
    model.transformer.drop.p = 0.9
    torch.testing.assert_close(
        sample_inputs(model, PATHS, [tokens()])[PATHS[1]],
        seen_by(model.eval(), PATHS[1], input_ids=tokens()).flatten(0, 1),
    )


def test_the_kind_is_shown_the_inputs_of_its_layer(monkeypatch) -> None:
    shown = []
    from_dense = LowRankFFN.from_dense.__func__

    def spy(cls, dense, config, inputs=None):
        shown.append(inputs)
        return from_dense(cls, dense, config, inputs)

    monkeypatch.setattr(LowRankFFN, "from_dense", classmethod(spy))
    model = make("gpt2")
    expected = [seen_by(model, path, input_ids=tokens()).flatten(0, 1) for path in PATHS]
    fastffn.convert(model, LowRankConfig(rank=5), calibration=[tokens()], filter="*.1.mlp")
    assert len(shown) == 1
    torch.testing.assert_close(shown[0], expected[1])
    shown.clear()
    fastffn.convert(make("gpt2"), LowRankConfig(rank=5))
    assert shown == [None, None]


def test_half_precision_stays() -> None:
    rows = sample_inputs(make("llama-tied").bfloat16(), ["model.layers.0.mlp"], [tokens()])
    assert rows["model.layers.0.mlp"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "holds no batch"),
        ([{"input_ids": tokens(), "attention_mask": torch.zeros(2, 16)}], "1 batches without a token that counts"),
        ([tokens(1)], r"has 16 tokens, but transformer\.h\.0\.mlp needs 24 at least"),
        ([tokens(), {"labels_of_mine": tokens()}], r"refuses calibration batch 1.*labels_of_mine.*\[2, 16\]"),
        ([tokens() + VOCABULARY], "refuses calibration batch 0.*IndexError"),
        ([{"input_ids": tokens().repeat(1, 4)}], "refuses calibration batch 0"),
        ([[1, 2, 3]], "batch 0 is a list; it must be a mapping"),
    ],
    ids=["empty", "all padding", "too short", "other inputs", "no such token", "too long", "a list"],
)
def test_bad_calibrations_are_refused_and_nothing_changes(batches, words) -> None:
    model = make("gpt2").train()
    with pytest.raises(ConversionError, match=words):
        fastffn.convert(model, LowRankConfig(rank=5), calibration=batches)
    assert not list(fastffn_modules(model)) and model.training
    assert torch.equal(first_output(model.eval()), first_output(make("gpt2")))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mask", [{}, {"attention_mask": torch.ones(2, 16)}])
def test_chunks_are_refused(mask) -> None:
    model = make("bert")
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 4
    with pytest.raises(ConversionError, match="chunk_size_feed_forward = 0"):
        sample_inputs(model, paths_of(model), [{"input_ids": tokens(), **mask}])

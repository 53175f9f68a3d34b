from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastffn.convert.budget import quality
from fastffn.convert.budget.quality import Budget, Quality
from fastffn.errors import ConfigError, ConversionError
from tests.convert.models import VOCABULARY, make


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 7:] = 0
    return [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1, :5], "attention_mask": mask[:1, :5]}]


@pytest.mark.parametrize("kept", [2**26, 300])
def test_loss_and_divergence_by_hand(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "KEPT", kept)
    model = make("qwen2").train()
    sequences = [batches()[0]["input_ids"][0], batches()[0]["input_ids"][1, :7], batches()[0]["input_ids"][2]]
    sequences.append(batches()[1]["input_ids"][0])

    def by_hand() -> tuple[float, list[torch.Tensor]]:
        model.eval()
        with torch.no_grad():
            logits = [model(input_ids=ids[None]).logits[0, :-1] for ids in sequences]
        model.train()
        losses = [F.cross_entropy(own, ids[1:], reduction="none") for own, ids in zip(logits, sequences, strict=True)]
        return float(torch.cat(losses).mean()), [own.log_softmax(1) for own in logits]

    meter = Budget(max_loss_increase=0.1).meter(model, batches())
    loss, before = by_hand()
    assert meter.tokens == 36
    assert meter.dense == (pytest.approx(loss, rel=1e-5), 0)
    with torch.no_grad():
        model.lm_head.weight += 0.02 * torch.randn_like(model.lm_head.weight)
    now, (loss, after) = meter.measure(), by_hand()
    every = -(-36 // max(1, kept // VOCABULARY))
    divergences = [(old.exp() * (old - new)).sum(1)[::every] for old, new in zip(before, after, strict=True)]
    assert now.value == pytest.approx(loss, rel=1e-5) and now.value != meter.dense.value
    assert now.damage == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert model.training
    # The first sequence alone, and then the second too.
    for tokens, count in ((5, 1), (13, 2), (36, 4)):
        part = meter.measure(tokens)
        assert part.damage == pytest.approx(float(torch.cat(divergences[:count]).mean()), rel=1e-3)


def test_similarity_by_hand() -> None:
    model = make("bert-mlm").eval()
    meter = Budget(min_similarity=0.9).meter(model, batches())
    assert meter.measure().value == pytest.approx(1, abs=1e-6)

    def embedding(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.bert(input_ids=ids[None]).last_hidden_state[0].mean(0)

    sequences = [batches()[0]["input_ids"][1, :7], batches()[1]["input_ids"][0]]
    meter = Budget(min_similarity=0.9).meter(
        model, [{"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids))} for ids in sequences]
    )
    before = [embedding(ids) for ids in sequences]
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight.mul_(torch.linspace(0.2, 2, 24))
    cosines = [F.cosine_similarity(embedding(ids), old, dim=0) for ids, old in zip(sequences, before, strict=True)]
    now = meter.measure()
    assert now.value == pytest.approx(float(torch.stack(cosines).mean()), rel=1e-5) and now.value < 0.999
    assert now.damage == pytest.approx(1 - now.value)
    assert meter.measure(3).value == pytest.approx(float(cosines[0]), rel=1e-5)


def test_what_a_budget_allows() -> None:
    loss, similarity = Budget(max_loss_increase=0.02), Budget(min_similarity=0.99)
    assert loss.allows(Quality(2.0, 0), Quality(2.04, 9)) and not loss.allows(Quality(2.0, 0), Quality(2.05, 0))
    assert similarity.allows(Quality(1, 0), Quality(0.991, 9)) and not similarity.allows(
        Quality(1, 0), Quality(0.98, 0)
    )
    assert not loss.allows(Quality(2.0, 0), Quality(float("nan"), 0))


@pytest.mark.parametrize(
    "fields",
    [{}, {"max_loss_increase": 0.1, "min_similarity": 0.9}, {"max_loss_increase": 0.0}, {"max_loss_increase": -1.0},
     {"min_similarity": 1.0}, {"min_similarity": 0.0}, {"max_loss_increase": float("nan")}],
)  # fmt: skip
def test_budgets_that_make_no_sense(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Budget(**fields)


def test_models_and_texts_that_cannot_be_measured() -> None:
    with pytest.raises(ConversionError, match=r"BertModel is no causal language model.*min_similarity"):
        Budget(max_loss_increase=0.1).meter(make("bert"), batches())
    with pytest.raises(ConversionError, match="held-out text has 0 tokens"):
        Budget(max_loss_increase=0.1).meter(make("gpt2"), [])


def test_without_padding_token_numbers_are_enough() -> None:
    numbers = batches()[1]["input_ids"]
    model = make("qwen2").eval()
    mask = torch.ones_like(numbers)
    forms = (numbers, {"input_ids": numbers}, {"input_ids": numbers, "attention_mask": mask})
    assert len({Budget(max_loss_increase=0.1).meter(model, [form]).dense for form in forms}) == 1


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ([1, 2, 3], "is list"),
        (torch.ones(3, dtype=torch.long), r"shape \[3\]"),
        ({"inputs_embeds": torch.ones(1, 2, 3)}, "mapping of inputs_embeds"),
    ],
)
def test_held_out_batches_of_other_forms(batch, named) -> None:
    with pytest.raises(ConversionError, match=rf"held-out batch .*{named}.*token numbers \[B, T\]"):
        Budget(max_loss_increase=0.1).meter(make("qwen2"), [batch])


def test_a_subclass_of_a_language_model_is_one() -> None:
    model = make("qwen2")
    model.__class__ = type("MyModel", (type(model),), {})
    assert Budget(max_loss_increase=0.1).meter(model, batches()).dense == (
        Budget(max_loss_increase=0.1).meter(make("qwen2"), batches()).dense
    )


def test_padding_may_be_on_either_side() -> None:
    right = batches()
    left = [{name: value.clone() for name, value in batch.items()} for batch in right]
    for name in ("input_ids", "attention_mask"):
        left[0][name][1] = right[0][name][1].roll(5)
    assert left[0]["attention_mask"][1, :5].sum() == 0
    model = make("qwen2").eval()
    one, other = (Budget(max_loss_increase=0.1).meter(model, padded) for padded in (right, left))
    assert one.tokens == other.tokens and one.dense == other.dense

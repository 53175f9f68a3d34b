"""Objectives on small models: masked language models and encoders among them, whatever their FFNs are."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fastffn
from fastffn import LeafTreeConfig, LowRankConfig
from fastffn.convert.api import place_fresh
from fastffn.convert.match import fastffn_modules
from fastffn.data.masking import Masking
from fastffn.train.distill.models import InputsOf, choose_trainable, dense_ffns, ffn_parameters, lm_features, make_ready
from fastffn.train.distill.objectives import FFNRegression, LogitDistance, StateDistance
from fastffn.train.distill.trainer import held_out

MASKING = Masking(mask_token=4, special_tokens=(0, 1, 2), vocabulary=60)


def bert(cls):
    import transformers

    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    torch.manual_seed(3)
    return getattr(transformers, cls)(config).eval()


def pair_of(teacher):
    """The teacher, and a copy of which every weight is a little off."""
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student, teacher.requires_grad_(False)


def padded_batch() -> dict[str, torch.Tensor]:
    """Sentences of 12 and 7 tokens."""
    ids = torch.randint(5, 60, (2, 12))
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_other_padding(batch):
    ids = batch["input_ids"].clone()
    ids[batch["attention_mask"] == 0] = 33
    return batch | {"input_ids": ids}


@pytest.mark.parametrize("cls", ["GPT2LMHeadModel", "BertForMaskedLM", "LlamaForCausalLM"])
def test_features_and_head_make_the_logits(cls) -> None:
    import transformers

    if cls == "BertForMaskedLM":
        model = bert(cls)
    elif cls == "LlamaForCausalLM":
        config = transformers.LlamaConfig(
            vocab_size=60, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
        )
        model = transformers.LlamaForCausalLM(config).eval()
    else:
        from tests.conftest import tiny_gpt2_config

        model = transformers.GPT2LMHeadModel(tiny_gpt2_config(vocab_size=60)).eval()
    ids = torch.randint(5, 60, (2, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        features = lm_features(model, {"input_ids": ids})
        assert features.shape == (2, 9, 24)
        torch.testing.assert_close(model.get_output_embeddings()(features), logits)
        torch.testing.assert_close(model(input_ids=ids).logits, logits)  # the head is as it was


def test_logits_of_a_causal_model_by_hand(gpt2) -> None:
    student, teacher = pair_of(gpt2)
    ids = torch.randint(0, 97, (2, 16))
    objective = LogitDistance(teacher, None, temperature=2.0, text_weight=0.25)
    loss = objective.loss(student, {"input_ids": ids})
    ours, theirs = student(ids).logits, teacher(ids).logits
    p, q = ((x.double() / 2).log_softmax(-1) for x in (theirs, ours))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    nats = F.cross_entropy(ours[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    wanted = torch.autograd.grad(4 * kl + 0.25 * nats, list(student.parameters()))
    kl, nats = float(kl.detach()), float(nats.detach())
    expected = 4 * kl + 0.25 * nats
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    for (name, parameter), gradient in zip(student.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5, msg=name)
    metrics = objective.metrics(objective.sums(student, {"input_ids": ids}))
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["student_nats"] == pytest.approx(nats, rel=1e-5)
    assert metrics["kl"] > 0 and metrics["kl"] != pytest.approx(kl)


def test_a_masked_model_predicts_what_was_chosen() -> None:
    student, teacher = pair_of(bert("BertForMaskedLM"))
    objective = LogitDistance(teacher, MASKING)
    batch = padded_batch()
    shown = objective.shown(batch, torch.Generator().manual_seed(5))
    assert shown.predicted.any()
    assert not shown.predicted[:, 0].any() and not shown.predicted[1, 7:].any()
    sums = objective.sums(student, batch, torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, theirs = (model(**shown.inputs).logits[shown.predicted].double() for model in (student, teacher))
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    assert sums["kl"][1] == int(shown.predicted.sum())
    assert sums["kl"][0] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    nats = F.cross_entropy(theirs, batch["input_ids"][shown.predicted], reduction="sum")
    assert sums["teacher_nats"] == (pytest.approx(float(nats), rel=1e-5), int(shown.predicted.sum()))


def test_a_masked_batch_without_a_chosen_token_is_harmless() -> None:
    student, teacher = pair_of(bert("BertForMaskedLM"))
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    loss = LogitDistance(teacher, MASKING).loss(student, batch)
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_states_of_an_encoder_by_hand() -> None:
    student, teacher = pair_of(bert("BertModel"))
    objective, batch = StateDistance(teacher), padded_batch()
    loss = objective.loss(student, batch)
    with torch.no_grad():
        ours, theirs = (model(**batch).last_hidden_state.double() for model in (student, teacher))
    real = [(0, 12), (1, 7)]
    error = sum(float((ours[row, :n] - theirs[row, :n]).square().sum()) for row, n in real)
    size = sum(float(theirs[row, :n].square().sum()) for row, n in real)
    cosines = [float(F.cosine_similarity(ours[row, :n].mean(0), theirs[row, :n].mean(0), dim=0)) for row, n in real]
    distance = 1 - sum(cosines) / 2
    assert float(loss.detach()) == pytest.approx(error / size + distance, rel=1e-4)
    metrics = objective.metrics(objective.sums(student, batch))
    assert metrics["token_error"] == pytest.approx(error / size, rel=1e-4)
    assert metrics["sentence_distance"] == pytest.approx(distance, rel=1e-3, abs=1e-6)
    loss.backward()
    assert student.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("cls", ["BertForMaskedLM", "BertModel"])
def test_it_learns(cls) -> None:
    """A copy that is a little off comes near again."""
    student, teacher = pair_of(bert(cls))
    masking = MASKING if cls == "BertForMaskedLM" else None
    objective = LogitDistance(teacher, masking) if masking else StateDistance(teacher)
    batches = [padded_batch() for _ in range(8)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    before = objective.metrics(held_out(objective, student, batches, torch.device("cpu")))["loss"]
    for _ in range(5):
        for batch in batches:
            make_ready(student)
            optimizer.zero_grad()
            objective.loss(student, batch).backward()
            optimizer.step()
    after = objective.metrics(held_out(objective, student, batches, torch.device("cpu")))["loss"]
    assert after < 0.7 * before


def test_regression_by_hand(gpt2) -> None:
    student = copy.deepcopy(gpt2)
    fastffn.convert(student, LowRankConfig(rank=4))
    objective = FFNRegression(gpt2.requires_grad_(False), None, [path for path, _ in fastffn_modules(student)])
    ids = torch.randint(0, 97, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    choose_trainable(student, "ffn")
    loss = objective.loss(student, batch)
    states = gpt2(**batch, output_hidden_states=True).hidden_states
    expected = []
    for number, block in enumerate(gpt2.transformer.h):
        attended = states[number] + block.attn(block.ln_1(states[number]), attention_mask=causal(mask))[0]
        x = block.ln_2(attended)[mask.bool()]
        wanted, found = block.mlp(x), student.transformer.h[number].mlp(x)
        expected.append(float(((found - wanted).square().sum() / wanted.square().sum()).detach()))
    assert float(loss.detach()) == pytest.approx(sum(expected) / 2, rel=1e-4)
    metrics = objective.metrics(objective.sums(student, batch))
    assert [metrics[f"transformer.h.{n}.mlp"] for n in (0, 1)] == pytest.approx(expected, rel=1e-4)
    # What padding holds changes nothing.
    other = objective.loss(student, with_other_padding(batch))
    assert float(other.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    loss.backward()
    reached = {id(p) for p in student.parameters() if p.grad is not None}
    assert reached == {id(p) for p in ffn_parameters(student)}


def causal(mask):
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None]
    return torch.zeros(len(mask), 1, length, length).masked_fill(~seen[:, None], -torch.inf)


def test_dense_ffns_are_the_teachers(gpt2) -> None:
    paths = ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    ids = torch.randint(0, 97, (2, 9))
    outputs = {}
    for path in paths:
        gpt2.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: outputs.__setitem__(path, output)
        )
    with torch.no_grad(), InputsOf(gpt2, paths) as inputs:
        gpt2(ids)
    for path, ffn in dense_ffns(gpt2, paths).items():
        torch.testing.assert_close(ffn(inputs[path]), outputs[path])
    assert not gpt2.get_submodule(paths[0])._forward_pre_hooks  # nothing stays behind


def test_nothing_is_dropped(gpt2) -> None:
    """The student is trained without dropout, its FFNs in training mode all the same."""
    for module in gpt2.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    gpt2.config.resid_pdrop = 0.5
    fastffn.convert(gpt2, LowRankConfig(rank=4))
    make_ready(gpt2.train())
    ids = torch.randint(0, 97, (2, 9))
    assert torch.equal(gpt2(ids).logits, gpt2(ids).logits)
    assert all(ffn.training for _, ffn in fastffn_modules(gpt2))


@pytest.mark.parametrize("regression", [True, False])
def test_what_a_kind_asks_for_is_part_of_the_loss(gpt2, regression) -> None:
    """A leaf tree's hardening; held-out measures leave it out."""
    student = copy.deepcopy(gpt2)
    place_fresh(student, LeafTreeConfig(depth=2, leaf_width=8, hardening_weight=3.0))
    paths = [path for path, _ in fastffn_modules(student)]
    teacher = gpt2.requires_grad_(False)
    objective = FFNRegression(teacher, None, paths) if regression else LogitDistance(teacher, None)
    batch = {"input_ids": torch.randint(0, 97, (2, 16))}
    make_ready(student)
    loss = float(objective.loss(student, batch).detach())
    extra = float(fastffn.auxiliary_loss(student).detach())
    student.eval()
    held_out = objective.metrics(objective.sums(student, batch))["loss"]
    for _, ffn in fastffn_modules(student):
        ffn.config = dataclasses.replace(ffn.config, hardening_weight=0.0)
    make_ready(student)
    assert extra > 0.5
    assert loss - float(objective.loss(student, batch).detach()) == pytest.approx(
        extra / (2 if regression else 1), rel=1e-3
    )
    student.eval()
    assert objective.metrics(objective.sums(student, batch))["loss"] == held_out

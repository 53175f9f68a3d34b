"""What every registered kind must do. A new kind is checked here without an edit."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file, save_file

import fastffn
from fastffn.errors import ConfigError, FastFFNError, KindError, ShapeError
from fastffn.measure.gate import gate
from fastffn.nn import FFN, DenseConfig, DenseFFN, FFNConfig
from fastffn.registry import get_kind, kind_of, kinds

NAMES = sorted(kinds())
D, H, O = 20, 36, 12  # noqa: E741


# Options of a kind that bring further tensors or shapes, and so must pass the same checks.
OPTIONS = {
    "block": [{"blocks": 2, "rank": 3}, {"blocks": 4, "rank": 2, "gated": True, "bias": False, "d_out": O}],
    "neuron_tree": [{"depth": 4, "trees": 1, "d_out": O, "shared": 5}, {"depth": 0, "trees": 7}],
    # straight_through is not among them: a surrogate gradient fails gradcheck by design.
}

# Fields of a kind whose defaults are made for real models: small ones, so that all of this takes seconds.
SMALL = {
    "leaf_tree": {"depth": 2, "leaf_width": 4},
    "moe": {"experts": 4, "expert_width": 6},
    "neuron_tree": {"depth": 2, "trees": 3},
}


def config_of(name: str, **changes) -> FFNConfig:
    config = kinds()[name].config
    known = {field.name for field in dataclasses.fields(config)}
    wanted = {"d_model": D, "d_hidden": H, "activation": "gelu_new"} | SMALL.get(name, {}) | changes
    return config(**{key: value for key, value in wanted.items() if key in known})


def variants(name: str) -> list[FFNConfig]:
    found = [config_of(name), config_of(name, d_out=O)]
    if hasattr(found[0], "bias"):
        found += [config_of(name, bias=False)]
    if hasattr(found[0], "gated"):
        found += [config_of(name, gated=True, activation="silu"), config_of(name, gated=True, bias=False, d_out=O)]
    return found + [config_of(name, **options) for options in OPTIONS.get(name, [])]


OPTIONS |= {
    "leaf_tree": [
        {"depth": 3, "leaf_width": 5, "shared": 6, "d_out": O},
        {"depth": 2, "leaf_width": 4, "shared": 3, "gated": True, "activation": "silu"},
    ],
    "moe": [
        {"experts": 3, "active": 1},
        {"experts": 5, "active": 3, "gated": True, "bias": False, "d_out": O, "shared": 4},
        # weighting="sum" is tested with its kind: a straight-through gradient fails gradcheck by design.
    ],
}

CASES = [pytest.param(config, id=f"{name}-{i}") for name in NAMES for i, config in enumerate(variants(name))]


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_shapes(config: FFNConfig, shape: tuple[int, ...]) -> None:
    ffn = fastffn.build(config)
    y = ffn(torch.randn(*shape, D))
    assert y.shape == (*shape, config.d_out or D)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(config: FFNConfig, dtype: torch.dtype) -> None:
    ffn = fastffn.build(config)
    x = torch.randn(30, D, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = ffn(x)
    assert y.dtype == dtype
    narrow = copy.deepcopy(ffn).to(dtype)(x.to(dtype))
    # The floor: under autocast activations and parameters are rounded at other places than in the narrow module.
    gate("autocast", y, narrow, copy.deepcopy(ffn).double()(x.double()), floor=4 * torch.finfo(dtype).eps)
    y.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in ffn.parameters())


@pytest.mark.parametrize("config", CASES)
def test_without_memory_until_weights_are_assigned(config: FFNConfig) -> None:
    ffn = fastffn.build(config)
    with torch.device("meta"):
        empty = fastffn.build(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(ffn.state_dict(), assign=True)
    x = torch.randn(4, D)
    assert torch.equal(empty(x), ffn(x))


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(config: FFNConfig, dtype: torch.dtype) -> None:
    ffn = fastffn.build(config).to(dtype)
    y = ffn(torch.randn(3, D, dtype=dtype))
    assert y.dtype == dtype
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("config", CASES)
def test_same_result_on_other_strides(config: FFNConfig) -> None:
    ffn = fastffn.build(config)
    x = torch.randn(D, 7).T
    assert not x.is_contiguous()
    torch.testing.assert_close(ffn(x), ffn(x.contiguous()))


@pytest.mark.parametrize("config", CASES)
def test_gradients(config: FFNConfig) -> None:
    ffn = fastffn.build(config).double()
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in ffn.named_parameters()]

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ffn, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *ffn.parameters()))


@pytest.mark.parametrize("config", CASES)
def test_wrong_width_is_refused(config: FFNConfig) -> None:
    with pytest.raises(ShapeError, match=rf"\[3, {D + 1}\].*d_model={D}"):
        fastffn.build(config)(torch.randn(3, D + 1))


@pytest.mark.parametrize("config", CASES)
def test_config_round_trip(config: FFNConfig) -> None:
    resolved = config.resolved()
    assert type(config).from_dict(json.loads(json.dumps(resolved.to_dict()))) == resolved
    assert resolved.resolved() == resolved
    assert fastffn.build(kind_of(config).name, **config.to_dict()).config == resolved
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize("config", CASES)
def test_state_dict_round_trip(config: FFNConfig, tmp_path) -> None:
    ffn, other = fastffn.build(config), fastffn.build(config)
    x = torch.randn(4, D)
    assert not torch.equal(ffn(x), other(x))
    save_file(ffn.state_dict(), tmp_path / "ffn.safetensors")
    other.load_state_dict(load_file(tmp_path / "ffn.safetensors"))
    assert torch.equal(ffn(x), other(x))


@pytest.mark.parametrize("config", CASES)
def test_deepcopy(config: FFNConfig) -> None:
    ffn = fastffn.build(config)
    copied = copy.deepcopy(ffn)
    x = torch.randn(4, D)
    before = ffn(x)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.zero_()
    assert torch.equal(ffn(x), before)
    assert not torch.equal(copied(x), before)


@pytest.mark.parametrize("config", CASES)
def test_compile_in_one_graph(config: FFNConfig) -> None:
    torch._dynamo.reset()
    ffn = fastffn.build(config)
    x = torch.randn(4, D)
    torch.testing.assert_close(torch.compile(ffn, fullgraph=True, backend="aot_eager")(x), ffn(x))


@pytest.mark.parametrize("config", CASES)
def test_compile_once_for_any_number_of_tokens(config: FFNConfig) -> None:
    torch._dynamo.reset()
    ffn = fastffn.build(config)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    # No width of any kind: where one equals the number of tokens, torch takes them for one and the same.
    for tokens in (17, 23, 29):
        x = torch.randn(tokens, 3, D)
        torch.testing.assert_close(compiled(x), ffn(x))
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compile_to_code(name: str) -> None:
    torch._dynamo.reset()
    ffn = fastffn.build(config_of(name))
    x = torch.randn(4, D, requires_grad=True)
    compiled, eager = torch.compile(ffn, fullgraph=True)(x), ffn(x)
    torch.testing.assert_close(compiled, eager)
    (gradient,) = torch.autograd.grad(compiled.sum(), x)
    (expected,) = torch.autograd.grad(eager.sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("config", CASES)
def test_from_dense_keeps_what_dense_fixes(config: FFNConfig) -> None:
    kind = kind_of(config)
    resolved = config.resolved()
    shared = {field.name for field in dataclasses.fields(DenseConfig)}
    dense = DenseFFN(DenseConfig(**{k: v for k, v in resolved.to_dict().items() if k in shared})).eval()
    # A configuration without widths: all of them are the dense FFN's.
    bare = dataclasses.replace(
        config, d_model=None, d_out=None, **({"d_hidden": None} if hasattr(config, "d_hidden") else {})
    )
    ffn = kind.module.from_dense(dense, bare, torch.randn(60, D))
    assert {k: getattr(ffn.config, k) for k in shared if hasattr(ffn.config, k)} == {
        k: getattr(dense.config, k) for k in shared if hasattr(ffn.config, k)
    }
    assert not ffn.training
    assert all(parameter.requires_grad for parameter in ffn.parameters())
    assert not any(p.data_ptr() == q.data_ptr() for p in ffn.parameters() for q in dense.parameters()), (
        "shares memory with the dense FFN it was made from"
    )


@pytest.mark.parametrize("config", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merge_computes_the_same_function(config: FFNConfig, dtype: torch.dtype) -> None:
    ffn = fastffn.build(config)
    if kind_of(config).module.merged_tensors(ffn.config) is None:
        with pytest.raises(KindError):
            ffn.merge()
        return
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ffn = ffn.to(dtype)
    merged = ffn.merge()
    assert type(merged) is DenseFFN
    assert set(merged.state_dict()) == set(DenseFFN(merged.config).state_dict())
    assert all(parameter.requires_grad and parameter.dtype == dtype for parameter in merged.parameters())
    x = torch.randn(50, D, dtype=dtype)
    exact = copy.deepcopy(ffn).double()(x.double())
    # The floor: the product is rounded once to the dtype, and so is each result. In float64 `exact` is not exact: it
    # errs by the roundings of a sum of H products, as the merged layer does, and by how processors order that sum.
    roundings = H if dtype == torch.float64 else 4
    gate("merged", merged(x), ffn(x), exact, floor=roundings * torch.finfo(dtype).eps)


@pytest.mark.parametrize("config", CASES)
def test_merged_tensors_fit_the_state_dict(config: FFNConfig) -> None:
    ffn = fastffn.build(config)
    recipe = kind_of(config).module.merged_tensors(ffn.config)
    if recipe is None:
        pytest.skip(f"{kind_of(config).name} does not merge")
    used = {source for rule in recipe.values() for source in rule.sources}
    assert used == set(ffn.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_dropout_only_in_training(name: str) -> None:
    ffn = fastffn.build(config_of(name, dropout=0.5))
    x = torch.randn(200, D)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"d_model": 0},
        {"d_model": -3},
        {"d_out": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"activation": "gleu"},
        {"nonsense": 1},
    ],
    ids=str,
)
def test_bad_fields_are_refused(name: str, wrong: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        fastffn.build(name, **({"d_model": D} | wrong))
    assert next(iter(wrong)) in str(caught.value)
    assert isinstance(caught.value, (FastFFNError, ValueError))


@pytest.mark.parametrize("name", NAMES)
def test_d_model_is_needed(name: str) -> None:
    with pytest.raises(ConfigError, match="d_model"):
        fastffn.build(name)


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(KindError, match="Did you mean 'low_rank'"):
        get_kind("lowrank")


def test_build_refuses_fields_beside_a_config() -> None:
    with pytest.raises(ConfigError, match="rank"):
        fastffn.build(fastffn.LowRankConfig(d_model=8), rank=2)


@pytest.mark.parametrize("config", CASES)
def test_says_what_a_measurement_needs(config) -> None:
    """Widths, distance from a tie, and either writing into given memory or saying that it cannot."""
    ffn = fastffn.build(config).eval()
    assert 0 < ffn.config.active_width <= ffn.config.total_width
    x = torch.randn(7, D)
    margins = ffn.decision_margins(x)
    assert margins.shape == (7,) and bool((margins >= 0).all())
    if ffn.config.active_width == ffn.config.total_width:
        assert margins.isinf().all()
    with torch.no_grad():
        expected = ffn(x)
        out = torch.full_like(expected, float("nan"))
        if type(ffn).forward_out is FFN.forward_out:
            with pytest.raises(KindError, match="cannot write into memory"):
                ffn.forward_out(x, out)
        else:
            assert ffn.forward_out(x, out) is out
            torch.testing.assert_close(out, expected)

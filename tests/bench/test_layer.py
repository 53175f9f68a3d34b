"""`bench layer` on tiny FFNs: what is in its result, what it refuses. No times are judged."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

import fastffn
from fastffn.bench.layer import LayerCase, bench_layer, peers, run
from fastffn.bench.layer.bound import bound, multiply_adds, visited_bytes
from fastffn.bench.layer.check import check, decided
from fastffn.bench.layer.contender import Contender
from fastffn.bench.layer.dense import PackedDense, dense_config, dense_contenders, widths
from fastffn.bench.layer.report import format_layer, plot_layer, shown
from fastffn.errors import BackendError, ConfigError, FastFFNError, KindError, MeasurementError
from fastffn.measure.limits import Limits
from fastffn.nn import DenseConfig, LeafTreeConfig, LowRankConfig, MoEConfig, NeuronTreeConfig
from fastffn.nn.dense import DenseFFN
from fastffn.registry import Kind, kinds

D = 16
SMALL = {"neuron_tree": {"depth": 3}, "leaf_tree": {"depth": 3, "leaf_width": 5}, "moe": {"expert_width": 6}}
LIMITS = Limits(1e11, {2**18: 1e11, 2**28: 4e10}, {2**18: 1e11, 2**28: 2e10}, 3e9)

NOT_TOO_SLOW = run._not_too_slow


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(run, "measure_limits", lambda dtype, device: LIMITS)
    monkeypatch.setattr(run, "EVICTED", 2**12)
    # A busy machine must not decide which peers take part.
    monkeypatch.setattr(run, "_not_too_slow", lambda *_: None)


def case_of(kind: str = "neuron_tree", *, fields=None, **options) -> LayerCase:
    config = kinds()[kind].config(d_model=D, **(SMALL.get(kind, {}) if fields is None else fields)).resolved()
    options = {"tokens": (3, 70), "rounds": 1, "max_seconds": 0.05, "compiled": False} | options
    return LayerCase(config=config, **options)


def names(result: dict, role: str) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in result["rows"] if row["role"] == role))


@pytest.mark.parametrize("kind", sorted(kinds()))
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_kind_is_measured(kind, dtype) -> None:
    result = bench_layer(case_of(kind, dtype=dtype))
    assert result["kind"] == kind and 0 < result["active_width"] <= result["total_width"]
    own = [row for row in result["rows"] if row["role"] == "ffn"]
    assert [(row["tokens"], row["passes"]) for row in own] == [
        (tokens, passes)
        for tokens in (3, 70)
        for passes in ("forward", "forward + backward")[: 1 + kinds()[kind].config.TRAINS]
    ]
    for row in own:
        assert row["bound"] > 0 and row["seconds"]["calls"] >= 3
        assert row["gate"]["tokens"] > 0 and row["gate"]["error"] < {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.005}[dtype]
        assert row["gate"]["gradients"] == (row["passes"] != "forward")
    dense = [row for row in result["rows"] if row["role"] == "dense"]
    assert {row["width"] for row in dense} == {result["total_width"], 4 * D, result["active_width"]}
    assert {row["dtype"] for row in dense if row["stands_for"] == "total"} >= {"float32"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    table = format_layer(result)
    assert kind in table and f"dense {result['total_width']}" in table
    assert ("x any dtype" in table) == (dtype != "fp32")


def test_a_new_kind_is_measured_without_an_edit(monkeypatch) -> None:
    class TwiceConfig(DenseConfig):
        pass

    class TwiceFFN(DenseFFN):
        """Twice a dense FFN."""

        def forward(self, x):
            return 2 * super().forward(x)

    from fastffn import registry

    kinds()
    monkeypatch.setitem(registry._KINDS, "twice", Kind("twice", TwiceConfig, TwiceFFN))
    result = bench_layer(case_of("twice", fields={"d_hidden": 24}))
    assert names(result, "ffn") == ["twice"] and result["total_width"] == 24


def test_ratios_are_those_of_the_medians_and_the_baseline_is_the_fastest_dense() -> None:
    result = bench_layer(case_of(dtype="bf16", out=True))
    group = [row for row in result["rows"] if (row["tokens"], row["passes"]) == (70, "forward")]
    dense = {row["name"]: row for row in group if row["role"] == "dense"}
    same = {name: row for name, row in dense.items() if row["stands_for"] == "total" and row["dtype"] == "bfloat16"}
    assert set(same) - {"dense 15, oneDNN"} == {"dense 15", "dense 15, out="}
    fastest = min(same.values(), key=lambda row: row["seconds"]["median"])
    any_dtype = min(
        (row for row in dense.values() if row["stands_for"] == "total"), key=lambda row: row["seconds"]["median"]
    )
    active = min((r for r in dense.values() if r["stands_for"] == "active"), key=lambda row: row["seconds"]["median"])
    for row in group:
        assert row["baseline"] == fastest["name"]
        assert row["ratio"] == fastest["seconds"]["median"] / row["seconds"]["median"]
        assert row["ratio_any_dtype"] == any_dtype["seconds"]["median"] / row["seconds"]["median"]
        assert row["ratio_active"] == active["seconds"]["median"] / row["seconds"]["median"]
        if row["role"] == "ffn":
            assert row["bound"] == fastest["seconds"]["median"] / row["bound_seconds"]["seconds"]
    assert [row["name"] for row in shown({"rows": group}) if row.get("stands_for") == "active"] == [active["name"]]
    assert names(result, "ffn") == ["neuron_tree", "neuron_tree, out="]


def test_one_pass_or_both() -> None:
    assert {row["passes"] for row in bench_layer(case_of(passes="forward"))["rows"]} == {"forward"}


def test_each_backend_has_its_row() -> None:
    result = bench_layer(case_of(backends=("torch_grouped", "dense", "reference")))
    assert names(result, "ffn") == [f"neuron_tree, {name}" for name in ("torch_grouped", "dense", "reference")]
    with pytest.raises(BackendError, match="needs a tree of at least two levels"):
        bench_layer(case_of(fields={"depth": 0}, backends=("torch_grouped",)))
    with pytest.raises(ConfigError, match="backend is dense, but LowRankFFN runs no operation"):
        bench_layer(case_of("low_rank", backends=("dense",)))


def test_into_given_memory_only_where_that_is_possible() -> None:
    with pytest.raises(KindError, match="LowRankFFN cannot write into memory"):
        bench_layer(case_of("low_rank", out=True))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_dense_into_given_memory_is_dense(activation) -> None:
    case = case_of(fields={"depth": 3, "activation": activation}, out=True)
    into = next(one for one in dense_contenders(case) if one.out is not None)
    x = torch.randn(5, D)
    with torch.no_grad():
        y = into.layer(0, x, torch.full((5, D), float("nan")))
        torch.testing.assert_close(y, into.modules[0](x))


def test_layers_of_a_stack_get_the_same_tokens_and_their_outputs_are_added() -> None:
    case = case_of(layers=3)
    layers = case.build()
    x, gradient = torch.randn(5, D), torch.randn(5, D)
    expected = sum(layer(x) for layer in layers)
    one = Contender("it", "ffn", layers, layers)
    into = Contender("it", "ffn", layers, layers, out=lambda module, x, out: module.forward_out(x, out))
    for contender, passes in ((one, "forward"), (into, "forward"), (one, "forward + backward")):
        torch.testing.assert_close(contender.call(passes, [x], gradient)(), expected)
    wanted = torch.autograd.grad(expected, [layer.w_in for layer in layers], gradient)
    for layer, found in zip(layers, wanted, strict=True):
        torch.testing.assert_close(layer.w_in.grad, found)
    result = bench_layer(case)
    assert result["regime"].startswith("A stack") and result["layers"] == 3
    assert "3 layers" in format_layer(result)


def test_caches_are_emptied_before_each_call_only_where_that_is_asked(monkeypatch) -> None:
    seen = []
    timed = run.alternate

    def spy(calls, **options):
        seen.append(options.get("between") is not None)
        return timed(calls, **options)

    monkeypatch.setattr(run, "alternate", spy)
    bench_layer(case_of())
    bench_layer(case_of(layers=2))
    assert not any(seen)
    result = bench_layer(case_of(layers=2, cold=True))
    assert any(seen)
    assert result["cold"] and "caches are emptied" in format_layer(result)


def break_float32(monkeypatch, *, gradient: bool) -> None:
    right = fastffn.nn.NeuronTreeFFN.forward

    def wrong(self, x):
        y = right(self, x)
        if x.dtype != torch.float32:
            return y
        return y + 0.01 * (x - x.detach()) if gradient else y + 0.01

    monkeypatch.setattr(fastffn.nn.NeuronTreeFFN, "forward", wrong)


@pytest.mark.parametrize("gradient", [False, True])
def test_wrong_results_are_not_timed(gradient, monkeypatch) -> None:
    break_float32(monkeypatch, gradient=gradient)
    monkeypatch.setattr(run, "_timed", lambda *_: pytest.fail("timed all the same"))
    passes = "gradient of x" if gradient else "output"
    case = case_of(passes="both")
    if gradient:
        monkeypatch.setattr(run, "PASSES", ("forward + backward", "forward"))
    with pytest.raises(MeasurementError, match=f"neuron_tree, layer 0, 3 tokens, {passes}"):
        bench_layer(case)


def test_every_layer_of_a_stack_is_compared() -> None:
    case = case_of(layers=2)
    layers = case.build()
    broken = [layers[0], case.build()[0]]
    x, gradient = torch.randn(9, D), torch.randn(9, D)
    assert check(Contender("it", "ffn", layers, layers), "forward", x, gradient) is not None
    with pytest.raises(MeasurementError, match="layer 1"):
        check(Contender("it", "ffn", broken, layers), "forward", x, gradient)


def test_wrong_peers_are_not_timed(monkeypatch) -> None:
    right = peers.GatherBmm.tree
    monkeypatch.setattr(peers.GatherBmm, "tree", lambda self, x, tree: right(self, x, tree) * 1.001)
    result = bench_layer(case_of())
    assert names(result, "peer") == [name for name in names(result, "peer") if name != "gather + bmm"]
    assert "relative error" in result["left_out"]["gather + bmm, 3 tokens, forward"]


@pytest.mark.parametrize("kind", [peers.GatherBmm, peers.SparseCoo])
@pytest.mark.parametrize("trees", [1, 3])
def test_published_ways_through_trees_of_neurons(kind, trees) -> None:
    ffn = fastffn.build("neuron_tree", d_model=D, d_out=5, depth=4, trees=trees)
    x, gradient = torch.randn(40, D), torch.randn(40, 5)
    expected = torch.autograd.grad(ffn(x), list(ffn.parameters()), gradient)
    peer = kind(ffn)
    y = peer(x)
    torch.testing.assert_close(y, ffn(x))
    for ours, theirs in zip(torch.autograd.grad(y, list(ffn.parameters()), gradient), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_sparse_gradient_that_does_not_fit_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(peers, "memory", lambda device: 10_000)
    result = bench_layer(case_of())
    assert any("would hold" in reason for name, reason in result["left_out"].items() if name.startswith("sparse COO"))
    assert "Left out: sparse COO, 70 tokens, forward + backward" in format_layer(result)


def test_the_published_package() -> None:
    pytest.importorskip("fastfeedforward")
    result = bench_layer(case_of("leaf_tree"))
    (name,) = names(result, "peer")
    rows = [row for row in result["rows"] if row["name"] == name]
    assert name == "fastfeedforward 3 x 5" and len(rows) == 4
    # The same function: gated, and the bound holds for it.
    assert all(row["bound"] and row["gate"]["tokens"] for row in rows)
    assert set(result["left_out"]) == {"gather + bmm", "sparse COO"}
    # Beside another tree: a leaf tree of about as many neurons, and no bound.
    result = bench_layer(case_of(fields={"depth": 5}))
    assert "fastfeedforward 3 x 8" in names(result, "peer")
    assert not any("bound" in row for row in result["rows"] if row["name"] == "fastfeedforward 3 x 8")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LowRankConfig(d_model=D, rank=2), "evaluates all its neurons"),
        (LeafTreeConfig(d_model=D, depth=2, shared=3), "no shared part"),
        (LeafTreeConfig(d_model=D, depth=2, decisions="hard"), "soft decisions only"),
    ],
)
def test_why_the_published_package_is_left_out(config, reason) -> None:
    pytest.importorskip("fastfeedforward")
    case = LayerCase(config=config.resolved(), tokens=(3,))
    _, left_out = peers.peers(case, case.build())
    assert reason in left_out["fastfeedforward"]


def test_a_package_that_is_not_there_is_left_out(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fastfeedforward", None)
    result = bench_layer(case_of("leaf_tree", tokens=(3,)))
    assert "pip install fastfeedforward==0.2.1" in result["left_out"]["fastfeedforward"]


def test_slow_peers_are_left_out(monkeypatch) -> None:
    monkeypatch.setattr(run, "_not_too_slow", NOT_TOO_SLOW)
    calls = []
    right = peers.GatherBmm.tree
    monkeypatch.setattr(peers.GatherBmm, "tree", lambda *given: calls.append(given[1].shape[0]) or right(*given))
    result = bench_layer(case_of(tokens=(70, 3), max_seconds=1e-7))
    assert names(result, "peer") == []
    # Once for each pass, on the fewest tokens.
    assert calls == [3, 3]
    assert "too slow for fewer" in result["left_out"]["gather + bmm, 70 tokens, forward"]
    assert "too long for --max-seconds 1e-07" in result["left_out"]["gather + bmm, 3 tokens, forward"]


def test_the_mode_that_draws_at_random_is_not_compared() -> None:
    result = bench_layer(case_of("leaf_tree", fields={"depth": 2, "region_leak": 0.5}, tokens=(70,)))
    gates = {row["passes"]: row["gate"] for row in result["rows"] if row["role"] == "ffn"}
    assert gates["forward"]["tokens"] > 0 and gates["forward + backward"] is None


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_packed_dense_is_the_dense_ffn(activation: str) -> None:
    ffn = fastffn.build("dense", d_model=D, d_hidden=40, activation=activation)
    if not PackedDense.takes(ffn, torch.float32, "cpu"):
        pytest.skip("torch was built without oneDNN")
    packed = PackedDense(ffn)
    for tokens in (1, 7, 30, 7):
        x = torch.randn(tokens, D)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), ffn(x))
    with pytest.raises(RuntimeError, match="no backward"):
        packed(x)
    gated = fastffn.build("dense", d_model=D, d_hidden=40, gated=True)
    assert not PackedDense.takes(gated, torch.float32, "cpu")
    assert not PackedDense.takes(ffn, torch.float16, "cpu")


def test_few_tokens_are_such_whose_decisions_are_clear() -> None:
    case = case_of(fields={"depth": 9}, dtype="bf16")
    layers = case.build()
    batches, _ = run._inputs(case, layers, 20)
    assert len(batches) == 25 and {batch.shape for batch in batches} == {(20, D)}
    assert decided(layers, batches[0], torch.bfloat16).all()
    many, _ = run._inputs(case, layers, 500)
    assert len(many) == 2 and not torch.equal(*many)
    assert not decided(layers, many[0], torch.bfloat16).all()
    again, _ = run._inputs(case, layers, 500)
    assert torch.equal(many[1], again[1])


def test_tokens_that_decide_nothing_clearly_are_refused() -> None:
    ffn = fastffn.build("neuron_tree", d_model=D, depth=1)
    torch.nn.init.zeros_(ffn.w_in)
    torch.nn.init.zeros_(ffn.b_in)
    with pytest.raises(MeasurementError, match="within rounding of a tie"):
        check(Contender("it", "ffn", [ffn], [ffn]), "forward", torch.randn(3, D), torch.randn(3, D))


def test_weights_that_are_met() -> None:
    ffn = fastffn.build("neuron_tree", d_model=D, depth=2)
    torch.nn.init.zeros_(ffn.w_in[:, 0])
    ffn.b_in.data[0, 0] = -1.0  # all go left: to node 1, then to 3 or 4
    x = torch.randn(200, D)
    assert visited_bytes([ffn], x, 4) == 4 * 4 * (2 * D + 1)
    assert visited_bytes([ffn], x[:1], 2) == 2 * 3 * (2 * D + 1)
    assert visited_bytes([ffn, fastffn.build("dense", d_model=D, d_hidden=8)], x[:1], 2) == 2 * (
        3 * (2 * D + 1) + 8 * (2 * D + 1) + D
    )
    assert ffn.w_in.grad is None


def test_bound_by_hand(monkeypatch) -> None:
    from fastffn.bench.layer import bound as module

    asked = []
    monkeypatch.setattr(module, "fresh_seconds", lambda sizes, device: asked.append(sizes) or 1000.0)
    case = case_of("dense", fields={"d_hidden": 8})
    layers = case.build()
    weights, x = 4 * (2 * D * 8 + 8 + D), torch.randn(3, D)
    limits = Limits(2.0, {1: 10.0, 10**6: 5.0}, {1: 100.0}, None)
    found = bound(case, layers, x, "forward", limits, fresh=True)
    assert found.multiply_adds == 3 * 2 * D * 8
    assert found.products == found.multiply_adds / 2
    assert found.reads == (weights + 3 * D * 4) / 10
    assert found.writes == 3 * D * 4 / 100
    assert found.seconds == max(found.products, found.reads) + 1000.0
    assert bound(case, layers, x, "forward", limits, fresh=False).faults == 0
    found = bound(case, layers, x, "forward + backward", limits, fresh=True)
    assert found.multiply_adds == 3 * 3 * 2 * D * 8
    assert found.reads == (2 * weights + 3 * D * 4) / 10
    assert found.writes == (3 * D * 4 + weights + 3 * D * 4) / 100
    assert asked[-2:] == [[3 * D * 4, 4 * D * 8, 4 * 8, 4 * D * 8, 4 * D], [3 * D * 4]]
    for cold, bandwidth in ((False, 10), (True, 5)):  # from a cache, from memory
        stack = case_of("dense", fields={"d_hidden": 8}, layers=2, cold=cold)
        found = bound(stack, stack.build(), x, "forward", limits, fresh=True)
        assert found.reads == (2 * weights + 3 * D * 4) / bandwidth
        assert found.faults == 2000.0


def test_a_tree_multiplies_with_visited_neurons_only() -> None:
    config = NeuronTreeConfig(d_model=D, depth=5, trees=2)
    assert multiply_adds(config, 7, "forward") == 7 * 2 * 6 * 2 * D
    assert multiply_adds(config, 7, "forward + backward") == 3 * 7 * 2 * 6 * 2 * D


def test_dense_counterparts() -> None:
    moe = MoEConfig(d_model=D, experts=4, active=1, expert_width=16, gated=True, activation="silu").resolved()
    assert widths(moe) == {"total": 64, "active": 16}
    assert dense_config(moe, 64) == DenseConfig(d_model=D, d_out=D, d_hidden=64, gated=True, activation="silu")
    tree = NeuronTreeConfig(d_model=D, depth=3).resolved()
    assert widths(tree, padded=True) == {"total": 15, "padded": 16, "usual": 64, "active": 4}
    assert widths(NeuronTreeConfig(d_model=D, depth=3, shared=2).resolved()) == {"total": 17, "usual": 64, "active": 6}


def test_threads_are_what_was_asked_and_then_what_they_were() -> None:
    before = torch.get_num_threads()
    result = bench_layer(case_of(tokens=(3,), threads=3, passes="forward"))
    assert result["machine"]["threads"] == 3
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": ()}, "tokens is ''"),
        ({"tokens": (4, 0)}, "tokens is '4,0'; it must be whole numbers of at least 1"),
        ({"tokens": (-1,)}, "tokens is '-1'"),
        ({"passes": "backward"}, "passes is 'backward'; it must be forward or both"),
        ({"dtype": "bf61"}, "Did you mean 'bf16'"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"layers": 0}, "layers is 0"),
        ({"rounds": -1}, "rounds is -1"),
        ({"max_seconds": 0.0}, "max_seconds is 0.0"),
        ({"max_seconds": math.nan}, "max_seconds is nan"),
        ({"device": "warp"}, "device is 'warp', which cannot be used here .*; there is cpu"),
        ({"device": "meta"}, "device is 'meta', which cannot be used here"),
        ({"backends": ("torch_group",)}, "There is no backend 'torch_group'.*Did you mean 'torch_grouped'"),
        ({"fields": {"depth": 30}}, "parameters, dense ones beside them, and gradients need"),
    ],
)
def test_bad_input(options, words) -> None:
    with pytest.raises(FastFFNError, match=words) as caught:
        case_of(**options)
    assert caught.value.exit_code == 2


def test_plot(tmp_path) -> None:
    plot_layer(bench_layer(case_of()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("broken", ["dense 64", "dense 15", "neuron_tree"])
def test_who_runs_out_of_memory_leaves_the_others(monkeypatch, timed, broken) -> None:
    monkeypatch.setattr(LayerCase, "accelerated", True)
    right, name = Contender.call, "neuron_tree, dense" if broken == "neuron_tree" else broken

    def call(one, *given):
        run_it, calls = right(one, *given), []

        def limited():
            calls.append(one)
            if one.name == name and len(calls) > (4 if timed else 0):
                raise torch.OutOfMemoryError("too much")
            return run_it()

        return limited

    monkeypatch.setattr(Contender, "call", call)
    result = bench_layer(case_of(tokens=(3,), backends=("dense",)))
    assert result["left_out"][f"{name}, 3 tokens, forward"] == "ran out of memory"
    found = {row["name"] for row in result["rows"]}
    assert name not in found and {"dense 16", "dense 4", "gather + bmm"} <= found
    assert all(row["ratio"] > 0 for row in result["rows"])
    assert format_layer(result)


def test_tf32_rounds_as_float16(monkeypatch) -> None:
    case = case_of("dense", fields={"d_hidden": 8})
    x, layers = torch.randn(9, D), case.build()
    rough = Contender("it", "peer", [lambda x: layers[0](x) * 1.001], [layers[0]])
    monkeypatch.setattr(rough.modules[0], "zero_grad", lambda **_: None, raising=False)
    with pytest.raises(MeasurementError):
        check(rough, "forward", x, x)
    monkeypatch.setattr("fastffn.bench.layer.check.precision", lambda: "tf32")
    assert check(rough, "forward", x, x) is not None


@pytest.mark.slow
def test_dense_is_compiled_too() -> None:
    result = bench_layer(case_of(tokens=(3,), passes="forward", compiled=True))
    compiled = {f"dense {width}, compiled" for width in (15, 64, 4)}
    # Where there is no compiler the result says so.
    assert compiled <= set(names(result, "dense")) | {name.split(", 3 tokens")[0] for name in result["left_out"]}


def test_a_compiler_that_fails_is_left_out(monkeypatch) -> None:
    def broken(module, **options):
        def call(*_):
            raise RuntimeError("no compiler\nat all")

        compiled = torch.nn.Module()
        compiled.forward = call
        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    result = bench_layer(case_of(tokens=(3,), passes="forward", compiled=True))
    assert result["left_out"]["dense 15, compiled, 3 tokens, forward"] == "no compiler"
    found = [name for name in names(result, "dense") if "oneDNN" not in name]
    assert found == ["dense 15", "dense 64", "dense 4"]

"""`fastffn bench layer`: one FFN, or a stack of them, against the best dense FFN and against published code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from fastffn.bench.layer.bound import Bound, bound, multiply_adds
from fastffn.bench.layer.case import PASSES, LayerCase
from fastffn.bench.layer.check import Compared, check, decided
from fastffn.bench.layer.contender import Contender
from fastffn.bench.layer.dense import dense_config, dense_contenders
from fastffn.bench.layer.peers import LeftOut, peers
from fastffn.errors import FastFFNError, MeasurementError
from fastffn.measure.limits import Limits, measure_limits
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import Timing, alternate
from fastffn.nn import FFN
from fastffn.registry import kind_of

# Read and written before each call where caches are to be cold: several times what they hold.
EVICTED = 2**27


def bench_layer(case: LayerCase, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Gates and times an FFN, the dense FFNs that it is compared with, and its peers, in one process, alternating.

    Args:
        case: what to measure.
        progress: is called with a line for each row that is done.

    Returns:
        Rows with seconds, ratios and bounds; why something was left out; limits; machine.

    Raises:
        MeasurementError: a result of the FFN or of a dense one is wrong. A peer whose result is wrong is left out.
        ConfigError: what was asked for cannot be measured.
        BackendError: a backend cannot run this FFN.
        KindError: `out` is asked for, and the FFN cannot write into memory that is given.
    """
    with _threads(case.threads), torch._dynamo.config.patch(recompile_limit=64):
        case.check_backends()
        torch.manual_seed(0)
        layers = case.build()
        limits = measure_limits(case.torch_dtype, torch.device(case.device))
        found, left_out = peers(case, layers)
        contenders = [*_own(case, layers), *found, *dense_contenders(case)]
        rows: list[dict[str, Any]] = []
        both = case.passes == "both"
        if both and not case.config.TRAINS:
            both, left_out[PASSES[1]] = False, f"{kind_of(case.config).name} is for inference"
        for tokens in sorted(set(case.tokens)):
            for passes in PASSES[: 1 + both]:
                # What is compiled keeps all it ever met.
                torch._dynamo.reset()
                rows += _rows(case, layers, contenders, tokens, passes, limits, left_out)
                progress(_line(rows, tokens, passes))
        return {
            "kind": kind_of(case.config).name,
            "ffn": layers[0].config.to_dict(),
            "total_width": layers[0].config.total_width,
            "active_width": layers[0].config.active_width,
            "layers": case.layers,
            "dtype": case.dtype,
            "device": case.device,
            "cold": case.cold,
            "regime": _regime(case),
            "rows": rows,
            "left_out": left_out,
            "limits": {
                "multiply_adds_per_second": limits.multiply_adds,
                "read_bytes_per_second": {str(size): value for size, value in limits.reads.items()},
                "written_bytes_per_second": {str(size): value for size, value in limits.writes.items()},
                "first_touch_bytes_per_second": limits.first_touch,
            },
            "machine": describe_machine(),
        }


def _regime(case: LayerCase) -> str:
    if case.cold:
        return "All caches are emptied before each call, the interpreter's too"
    if case.layers == 1:
        return "One layer again and again: its weights may stay in a cache"
    return "A stack: its layers take turns, as in a model; weights stay in a cache if all of them do"


def _own(case: LayerCase, layers: list[FFN]) -> list[Contender]:
    """The FFN with each backend, and into memory that is given."""
    name, found = kind_of(case.config).name, []
    for backend in case.backends or (None,):
        label = name if backend is None else f"{name}, {backend}"
        common: dict[str, Any] = {"bounded": True, "backend": backend, "dtype": case.torch_dtype}
        facts = {"backend": backend}
        found.append(Contender(label, "ffn", layers, layers, facts=facts | {"out": False}, **common))
        if case.out:
            into = Contender(
                f"{label}, out=",
                "ffn",
                layers,
                layers,
                out=lambda module, x, out: module.forward_out(x, out),
                facts=facts | {"out": True},
                **common,
            )
            found.append(into)
    return found


def _inputs(case: LayerCase, layers: list[FFN], tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Batches of random tokens `[T, D]` and a random gradient of the output `[T, O]`, the same ones every time.

    Several batches take turns: with one, a tree would find the few rows of its paths in the nearest cache, which no
    model would. Of few tokens those are taken whose decisions are clear, where there are any: they can be compared.
    """
    config = layers[0].config
    assert config.d_model and config.d_out
    random = torch.Generator().manual_seed(tokens)
    few, batches = tokens <= 64, max(2, min(64, 512 // tokens))
    x = torch.randn(batches * tokens + 512 * few, config.d_model, generator=random)
    if few:
        sure = decided(layers, x, case.torch_dtype)
        x = x[torch.argsort((~sure).long(), stable=True)[: batches * tokens]]
    gradient = torch.randn(tokens, config.d_out, generator=random)
    x = x.to(case.device, case.torch_dtype)
    return [batch.contiguous() for batch in x.split(tokens)], gradient.to(case.device, case.torch_dtype)


def _rows(
    case: LayerCase,
    layers: list[FFN],
    contenders: list[Contender],
    tokens: int,
    passes: str,
    limits: Limits,
    left_out: dict[str, str],
) -> list[dict[str, Any]]:
    """All that is measured at one size of the batch and one pass."""
    batches, gradient = _inputs(case, layers, tokens)
    here = [one for one in contenders if passes == "forward" or (one.out is None and not one.inference_only)]
    compared: dict[str, Compared | None] = {}
    calls: dict[str, Callable[[], object]] = {}
    alone: dict[str, float] = {}
    for one in here:
        one.mode(passes != "forward")
        try:
            call = one.call(passes, batches, gradient)
            if one.role == "peer":
                _not_too_slow(one, call, passes, case.max_seconds)
            compared[one.name] = check(one, passes, batches[0], gradient)
            call()
            alone[one.name] = _once(call)
            calls[one.name] = call
        except LeftOut as reason:
            left_out[f"{one.name}, {tokens} tokens, {passes}"] = str(reason)
        except MeasurementError as error:
            # Published code may be less exact than this, in narrow dtypes above all; it is not timed then.
            if one.role != "peer":
                raise
            left_out[f"{one.name}, {tokens} tokens, {passes}"] = str(error)
        except FastFFNError:
            raise
        except Exception as error:
            # Published code that does not take the dtype; no compiler on this machine.
            if one.role == "ffn" or (one.role == "dense" and one.facts["way"] == ""):
                raise
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            left_out[f"{one.name}, {tokens} tokens, {passes}"] = said[:200]
    timings = _timed(case, calls, sum(alone[name] for name in calls))
    here = [one for one in here if one.name in timings]

    # Whatever reached a higher rate than the measured limit has shown where the limit is.
    for one in here:
        if one.role == "dense":
            rate = _multiply_adds(case, one, tokens, passes) / timings[one.name].median
            limits = limits.at_least(rate if one.dtype == case.torch_dtype else 0.0)
    for layer in layers:
        layer.train(passes != "forward")
    bounds = {fresh: bound(case, layers, batches[0], passes, limits, fresh=fresh) for fresh in (True, False)}
    return _ratios(case, here, timings, compared, bounds, tokens, passes)


def _once(call: Callable[[], object]) -> float:
    return alternate({"": call}, rounds=1, warmup=0)[""].median


def _not_too_slow(peer: Contender, call: Callable[[], object], passes: str, seconds: float) -> None:
    if passes in peer.too_slow:
        raise LeftOut("too slow for fewer tokens already")
    taken = _once(call)
    if taken > seconds / 10:
        peer.too_slow.add(passes)
        raise LeftOut(f"one call takes {taken:.1f} s, too long for --max-seconds {seconds:g}")


def _ratios(
    case: LayerCase,
    contenders: list[Contender],
    timings: dict[str, Timing],
    compared: dict[str, Compared | None],
    bounds: dict[bool, Bound],
    tokens: int,
    passes: str,
) -> list[dict[str, Any]]:
    def best(stands_for: str, *, any_dtype: bool = False) -> Contender | None:
        found = [
            one
            for one in contenders
            if one.role == "dense"
            and one.facts["stands_for"] == stands_for
            and (any_dtype or one.dtype == case.torch_dtype)
        ]
        return min(found, key=lambda one: timings[one.name].median, default=None)

    baseline = best("total")
    assert baseline is not None
    others = {
        "ratio_usual": best("usual"),
        "ratio_active": best("active"),
        "ratio_any_dtype": best("total", any_dtype=True),
    }
    rows = []
    for one in contenders:
        seconds = timings[one.name]
        row: dict[str, Any] = {"tokens": tokens, "passes": passes, "name": one.name, "role": one.role}
        row |= {"seconds": asdict(seconds), "baseline": baseline.name}
        row["ratio"] = timings[baseline.name].median / seconds.median
        row |= {name: timings[o.name].median / seconds.median for name, o in others.items() if o is not None}
        if one.bounded:
            limit = bounds[one.out is None]
            row["bound"] = timings[baseline.name].median / limit.seconds
            row["bound_seconds"] = asdict(limit) | {"seconds": limit.seconds}
        if one.role == "dense":
            row["best"] = one is best(one.facts["stands_for"]) or (
                one.dtype != case.torch_dtype and one is best("total", any_dtype=True)
            )
            row["multiply_adds_per_second"] = _multiply_adds(case, one, tokens, passes) / seconds.median
        found = compared[one.name]
        row["gate"] = None if found is None else found._asdict()
        rows.append(row | one.facts)
    return rows


def _multiply_adds(case: LayerCase, dense: Contender, tokens: int, passes: str) -> float:
    return case.layers * multiply_adds(dense_config(case.config, dense.facts["width"]), tokens, passes)


def _timed(case: LayerCase, calls: dict[str, Callable[[], object]], once: float) -> dict[str, Timing]:
    """Times the calls, all of which once take `once` seconds: more often where that is short, less where it is long."""
    between = None
    block = 12 if once < 0.02 else 3 if once < 1 else 1
    if case.cold:
        block = 1
        evicted = torch.zeros(EVICTED // 4, device=case.device)

        def between() -> object:
            return evicted.add_(1)

        once += len(calls) * 2 * alternate({"": between}, rounds=2)[""].median
    affordable = int(case.max_seconds / (block * once))
    usual = max(case.rounds, min(100, int(1 / (block * once))))
    return alternate(calls, rounds=max(3, min(usual, affordable)), block=block, between=between)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def _line(rows: list[dict[str, Any]], tokens: int, passes: str) -> str:
    own = next(row for row in rows if (row["tokens"], row["passes"]) == (tokens, passes) and row["role"] == "ffn")
    return f"{tokens:,} tokens, {passes}: {own['ratio']:.2f} times as fast, bound {own['bound']:.0f}"

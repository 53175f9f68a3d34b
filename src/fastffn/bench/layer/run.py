"""`fastffn bench layer`: one FFN, or a stack of them, against the best dense FFN and against published code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from fastffn.bench.layer.bound import Bound, bound, multiply_adds
from fastffn.bench.layer.case import PASSES, LayerCase
from fastffn.bench.layer.check import Compared, check, decided
from fastffn.bench.layer.contender import Contender
from fastffn.bench.layer.dense import dense_config, dense_contenders
from fastffn.bench.layer.peers import LeftOut, peers
from fastffn.errors import BackendError, ConfigError, FastFFNError, MeasurementError
from fastffn.measure.limits import Limits, measure_limits
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import OutOfMemory, Timing, alternate, free_memory
from fastffn.nn import FFN
from fastffn.ops import OPS
from fastffn.registry import kind_of

# Read and written before each call where caches are to be cold: several times what they hold.
EVICTED = 2**27
NO_MEMORY = "ran out of memory"


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
    """The FFN with each backend, and into memory that is given.

    On an accelerator, where no backend was asked for, the Triton kernels by name too: a rule that was predicted for
    another machine may leave calls to others that they do faster.
    """
    name, found = kind_of(case.config).name, []
    for backend in case.backends or ((None, "triton") if case.accelerated and _runs_triton(case) else (None,)):
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


def _runs_triton(case: LayerCase) -> bool:
    try:
        replace(case, backends=("triton",)).check_backends()
    except (BackendError, ConfigError):
        return False
    return True


def _inputs(case: LayerCase, layers: list[FFN], tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Batches of random tokens `[T, D]` and a random gradient of the output `[T, O]`, the same ones every time.

    Several batches take turns: with one, a tree would find the few rows of its paths in the nearest cache, which no
    model would. Of few tokens those are taken whose decisions are clear, where there are any: they can be compared.
    """
    config = layers[0].config
    assert config.d_model and config.d_out
    random = torch.Generator(case.device).manual_seed(tokens)
    few, batches = tokens <= 64, max(2, min(64, 512 // tokens))
    x = torch.randn(batches * tokens + 512 * few, config.d_model, generator=random, device=case.device)
    if few:
        sure = decided(layers, x, case.torch_dtype)
        x = x[torch.argsort((~sure).long(), stable=True)[: batches * tokens].to(x.device)]
    gradient = torch.randn(tokens, config.d_out, generator=random, device=case.device)
    x = x.to(case.torch_dtype)
    return [batch.contiguous() for batch in x.split(tokens)], gradient.to(case.torch_dtype)


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
    chosen: dict[str, dict[str, str]] = {}
    for one in here:
        if one.backend and not case.backends and [set(of.values()) for of in chosen.values()] == [{"triton"}]:
            continue  # what the rule chose
        one.mode(passes != "forward")
        try:
            call = one.call(passes, batches, gradient)
            if one.role == "peer":
                _not_too_slow(one, call, passes, case.max_seconds)
            compared[one.name] = check(one, passes, batches[0], gradient)
            if one.role == "ffn":
                chosen[one.name] = _chosen(call)
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
        except (torch.OutOfMemoryError, OutOfMemory):
            left_out[f"{one.name}, {tokens} tokens, {passes}"] = NO_MEMORY
        except Exception as error:
            # Published code that does not take the dtype; no compiler on this machine.
            if one.role == "ffn" or (one.role == "dense" and one.facts["way"] == ""):
                raise
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            left_out[f"{one.name}, {tokens} tokens, {passes}"] = said[:200]
        if case.accelerated:
            _free(here)
    timings: dict[str, Timing] = {}
    while calls and not timings:
        try:
            timings = _timed(case, calls, sum(alone[name] for name in calls), here)
        except OutOfMemory as error:
            del calls[error.name]
            left_out[f"{error.name}, {tokens} tokens, {passes}"] = NO_MEMORY
        if case.accelerated:
            _free(here)
    here = [one for one in here if one.name in timings]

    # Whatever reached a higher rate than the measured limit has shown where the limit is.
    for one in here:
        if one.role == "dense":
            rate = _multiply_adds(case, one, tokens, passes) / timings[one.name].median
            limits = limits.at_least(rate if one.dtype == case.torch_dtype else 0.0)
    for layer in layers:
        layer.train(passes != "forward")
    bounds = {fresh: bound(case, layers, batches[0], passes, limits, fresh=fresh) for fresh in (True, False)}
    rows = _ratios(case, here, timings, compared, bounds, tokens, passes)
    return [row | ({"chosen": chosen[row["name"]]} if row["name"] in chosen else {}) for row in rows]


def _chosen(call: Callable[[], object]) -> dict[str, str]:
    """The backend that ran each pass of each operation of a call."""
    for op in OPS.values():
        op.forget()
    call()
    return {f"{op.name}, {which}": backend for op in OPS.values() for which, backend in op.choices().items()}


def _free(contenders: list[Contender]) -> None:
    """So that nobody's gradients are in the way of another's. Not on a CPU: its calls pay for memory that is fresh."""
    for one in contenders:
        one.drop_gradients()
    free_memory()


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

    baseline = best("total")  # none where there was no memory for it
    others = {
        "ratio_usual": best("usual"),
        "ratio_active": best("active"),
        "ratio_any_dtype": best("total", any_dtype=True),
    }
    rows = []
    for one in contenders:
        seconds = timings[one.name]
        row: dict[str, Any] = {"tokens": tokens, "passes": passes, "name": one.name, "role": one.role}
        row["seconds"] = asdict(seconds)
        if baseline is not None:
            row |= {"baseline": baseline.name, "ratio": timings[baseline.name].median / seconds.median}
        row |= {name: timings[o.name].median / seconds.median for name, o in others.items() if o is not None}
        if one.bounded and baseline is not None:
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


def _timed(
    case: LayerCase, calls: dict[str, Callable[[], object]], once: float, contenders: list[Contender]
) -> dict[str, Timing]:
    """Times the calls, all of which once take `once` seconds: more often where that is short, less where it is long."""
    evicted: torch.Tensor | None = None

    def between() -> object:
        if case.accelerated:
            for one in contenders:
                one.drop_gradients()
        return None if evicted is None else evicted.add_(1)

    block = 12 if once < 0.02 else 3 if once < 1 else 1
    if case.cold:
        block = 1
        evicted = torch.zeros(EVICTED // 4, device=case.device)
        once += len(calls) * 2 * alternate({"": between}, rounds=2)[""].median
    affordable = int(case.max_seconds / (block * once))
    usual = max(case.rounds, min(100, int(1 / (block * once))))
    rounds = max(3, min(usual, affordable))
    return alternate(calls, rounds=rounds, block=block, between=between if case.cold or case.accelerated else None)


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
    here = [row for row in rows if (row["tokens"], row["passes"]) == (tokens, passes)]
    own = next((row for row in here if row["role"] == "ffn" and "ratio" in row), None)
    if own is None:
        return f"{tokens:,} tokens, {passes}: {NO_MEMORY}"
    return f"{tokens:,} tokens, {passes}: {own['ratio']:.2f} times as fast, bound {own['bound']:.0f}"

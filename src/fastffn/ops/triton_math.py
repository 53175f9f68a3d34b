"""What several Triton kernels share: activations with their slopes, and the product of two tiles."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """From exp; a series where the quotient would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    square = x * x
    series = x * (1.0 - square * (0.33333333333 - square * 0.13333333333))
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -t, t))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation of float32 `x`; `ACT` as `activations.plain_name` gives it."""
    if ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))
    elif ACT == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)))
    elif ACT == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACT == "relu":
        x = tl.where(x <= 0, 0.0, x)  # what is not a number stays so
    elif ACT == "relu2":
        x = tl.where(x <= 0, 0.0, x * x)
    elif ACT == "silu":
        x = x * tl.sigmoid(x)
    elif ACT == "tanh":
        x = tanh(x)
    elif ACT == "sigmoid":
        x = tl.sigmoid(x)
    else:
        tl.static_assert(ACT == "linear", "unknown activation")
    return x


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of the activation at float32 `x`."""
    if ACT == "gelu":
        x = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752)) + x * 0.39894228040143268 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        t = tanh(0.79788456080286536 * (x + 0.044715 * x * x * x))
        inner = 0.79788456080286536 * (1.0 + 0.134145 * x * x)
        x = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        x = s * (1.0 + 1.702 * x * (1.0 - s))
    elif ACT == "relu":
        x = tl.where(x <= 0, 0.0, 1.0)
    elif ACT == "relu2":
        x = tl.where(x <= 0, 0.0, 2.0 * x)
    elif ACT == "silu":
        s = tl.sigmoid(x)
        x = s * (1.0 + x * (1.0 - s))
    elif ACT == "tanh":
        # 1 - tanh^2, without a difference of numbers near one.
        e = tl.exp(-2.0 * tl.abs(x))
        x = 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif ACT == "sigmoid":
        s = tl.sigmoid(x)
        x = s * (1.0 - s)
    else:
        tl.static_assert(ACT == "linear", "unknown activation")
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """`total + a @ b` in float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)

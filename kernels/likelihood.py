"""What one element adds to the reconstruction term, and its gradient: shared by the kernels of the losses.

With v = activation(x), the decoder's output, and y the target:

    gaussian         error = (v - y)^2             unscaled_grad = (v - y) * v'                factor 2
    laplace          error = |v - y|               unscaled_grad = sign(v - y) * v'
    logistic         error = -log P(bin of y)      unscaled_grad = (sigmoid(-a) - sigmoid(b)) * v'    1 / s
    bernoulli        error = BCE(sigmoid(x), y)    unscaled_grad = sigmoid(x) - y
    probabilities    error = BCE(x, y)             unscaled_grad = (x - y) / (x (1 - x))

The gradient of the error is unscaled_grad times the factor. logistic: a and b are the ends of y's bin, one of
256, at a distance from v in scales s; log P = log sigmoid(a) + log sigmoid(-b) + log(1 - exp(b - a)), which
does not cancel; the first and last bin have no outer end. probabilities: logarithms are bounded by -100 and
x (1 - x) by 1e-12, as in F.binary_cross_entropy.
"""

import math

import triton
import triton.language as tl


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [-1, 1]: the rounding of 1 + x is divided out again (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))  # never overflows
    t = (1.0 - e) / (1.0 + e)
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 - square * (17 / 315)))
    # The quotient loses the digits of a small x, and the sign of a tiny one; the series has them up to 0.2.
    return tl.where(square < 0.04, series, tl.where(x < 0, -t, t))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus_and_sigmoid(x):
    """-log sigmoid(-x) and sigmoid(x), from one exponential."""
    e = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x < 0, 0.0, x) + _log1p(e), tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def pixel(loaded, shift, scale, LIKELIHOOD: tl.constexpr):
    """A loaded target in the decoder's range; NaN for what is no probability."""
    y = loaded.to(tl.float32)
    if loaded.dtype == tl.uint8:
        y = (y - shift) * scale
    elif LIKELIHOOD == "bernoulli" or LIKELIHOOD == "probabilities":
        y = tl.where((y < 0.0) | (y > 1.0), float("nan"), y)
    return y


@triton.jit
def error_and_grad(
    x, y, low, half_bin, inverse_scale, log_width, LIKELIHOOD: tl.constexpr, ACTIVATION: tl.constexpr
):
    """An element's error and its `unscaled_grad`, as in the module's docstring."""
    if LIKELIHOOD == "bernoulli":
        e = tl.exp(-tl.abs(x))  # never overflows; used for error and gradient
        log_sigmoid = tl.where(x < 0, x, 0.0) - _log1p(e)
        error = (1.0 - y) * x - log_sigmoid
        unscaled_grad = tl.where(x < 0, e, 1.0) / (1.0 + e) - y
    elif LIKELIHOOD == "probabilities":
        x = tl.where((x < 0.0) | (x > 1.0), float("nan"), x)
        log_one, log_zero = tl.log(x), _log1p(-x)
        log_one = tl.where(log_one < -100.0, -100.0, log_one)
        log_zero = tl.where(log_zero < -100.0, -100.0, log_zero)
        error = (y - 1.0) * log_zero - y * log_one
        spread = x * (1.0 - x)
        unscaled_grad = (x - y) / tl.where(spread < 1e-12, 1e-12, spread)
    else:
        v = x
        derivative = tl.full(x.shape, 1.0, tl.float32)
        if ACTIVATION == "tanh":
            v = _tanh(x)
            derivative = 1.0 - v * v
        if ACTIVATION == "sigmoid":
            v = _sigmoid(x)
            derivative = v * (1.0 - v)
        if LIKELIHOOD == "gaussian":
            error = (v - y) * (v - y)
            unscaled_grad = (v - y) * derivative
        elif LIKELIHOOD == "laplace":
            error = tl.abs(v - y)
            sign = tl.where(v > y, 1.0, tl.where(v < y, -1.0, 0.0))  # 0 of NaN, as torch's
            unscaled_grad = sign * derivative
        else:
            above, d_above = _softplus_and_sigmoid((v - y - half_bin) * inverse_scale)
            below, d_below = _softplus_and_sigmoid((y - half_bin - v) * inverse_scale)
            first, last = y <= low, y >= 1.0
            error = tl.where(first, above, tl.where(last, below, above + below - log_width))
            unscaled_grad = (tl.where(last, 0.0, d_above) - tl.where(first, 0.0, d_below)) * derivative
    return error, unscaled_grad


def factor(likelihood: str, scale: float) -> float:
    """The factor that turns an unscaled gradient into the gradient of the error."""
    return {"gaussian": 2.0, "logistic": 1.0 / scale}.get(likelihood, 1.0)


def arguments(likelihood: str, scale: float, pixel_low: float) -> dict[str, float | str]:
    """The kernel arguments that `pixel` and `error_and_grad` take.

    Args:
        scale: of the logistic.
        pixel_low: uint8 targets are scaled to [pixel_low, 1]; -1 or 0.
    """
    half_bin = (1.0 - pixel_low) / 510
    log_width = math.log(-math.expm1(-2 * half_bin / scale)) if likelihood == "logistic" else 0.0
    return {
        "pixel_shift": 0.0 if pixel_low == 0.0 else 127.5,
        "pixel_scale": 1 / 255 if pixel_low == 0.0 else 1 / 127.5,
        "low": pixel_low,
        "half_bin": half_bin,
        "inverse_scale": 1.0 / scale,
        "log_width": log_width,
        "LIKELIHOOD": likelihood,
    }

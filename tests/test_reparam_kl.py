"""reparam_kl: kernels and reference against float64; autograd, compile, checkpointing, extremes, misuse."""

import pytest
import torch
from numerics import DTYPES, assert_as_good_as_torch, same_places
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from bvae import ops, reference
from bvae.kernels import noise, reparam_kl

SEED, STEP = 1265, 3
SUMS = {"rtol": 1e-6, "atol": 1e-6}  # of two kernels: each thread's share of a row, so the order, may differ

SHAPES = {
    "1x1": (1, 1),
    "5x3": (5, 3),
    "2x41": (2, 41),
    "3x127": (3, 127),
    "3x129": (3, 129),
    "2x1271": (2, 1271),
    "144x128": (144, 128),
    "1x5000": (1, 5000),
    "2x4x32x32": (2, 4, 32, 32),
    "2x3x4x5x6": (2, 3, 4, 5, 6),
}


def eps_of(shape: tuple[int, ...], seed: int = SEED, step: int = STEP) -> Tensor:
    return noise.normal(shape, torch.tensor(seed), torch.tensor(step))


def heads(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """An encoder's output: mu and log_var are its halves along dimension 1."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn((shape[0], 2 * shape[1], *shape[2:]), generator=generator) * scale
    return both.to(device, dtype).requires_grad_()


def plain(mu: Tensor, log_var: Tensor, eps: Tensor, clamp=None) -> tuple[Tensor, Tensor, Tensor]:
    """What people write, in the dtype of mu throughout."""
    if clamp is not None:
        log_var = log_var.clamp(*clamp)
    kl = -0.5 * (1 + log_var - mu**2 - log_var.exp())
    return mu + torch.exp(0.5 * log_var) * eps.to(mu.dtype), kl.flatten(1).sum(1), kl.mean(0)


def outputs_and_gradient(function, both: Tensor, out_grads: list[Tensor]) -> list[Tensor]:
    outputs = function(*both.chunk(2, 1))
    torch.autograd.backward(outputs, [g.to(o) for g, o in zip(out_grads, outputs, strict=True)])
    return [o.detach().cpu() for o in outputs] + [both.grad.cpu()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "clamp"),
    [(shape, None) for shape in SHAPES.values()] + [((3, 129), (-0.55, 0.65)), ((2, 4, 8, 8), (-0.55, 0.65))],
    ids=[*SHAPES, "3x129, clamped", "2x4x8x8, clamped"],
)
def test_outputs_and_gradients_are_as_good_as_torchs(backend, shape, clamp, dtype):
    eps = eps_of(shape)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(s, generator=generator) for s in (shape, shape[:1], shape[1:])]
    grads[0] = grads[0].to(dtype).float()

    def fused(mu: Tensor, log_var: Tensor) -> tuple[Tensor, ...]:
        return ops.reparam_kl(mu, log_var, seed=SEED, step=STEP, clamp=clamp, per_dim=True)

    ours = outputs_and_gradient(fused, heads(shape, dtype, backend), grads)
    both = heads(shape, dtype, torch.device("cpu"))
    torchs = outputs_and_gradient(lambda m, v: plain(m, v, eps, clamp), both, grads)
    exact_both = both.detach().double().requires_grad_()
    exact = outputs_and_gradient(lambda m, v: plain(m, v, eps.double(), clamp), exact_both, grads)
    assert [o.dtype for o in ours] == [dtype, torch.float32, torch.float32, dtype]
    for name, *triple in zip(("z", "kl", "kl_per_dim", "gradient"), ours, torchs, exact, strict=True):
        assert_as_good_as_torch(*triple, backend, what=name)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_change_nothing_but_strides(kernels, layout):
    both = heads((3, 4, 6, 5), torch.float32, kernels).detach()
    strided = layout(both).requires_grad_()
    dense = strided.detach().contiguous().requires_grad_()
    results = []
    for x in (strided, dense):
        mu, log_var = x.chunk(2, 1)
        z, kl, per_dim = ops.reparam_kl(mu, log_var, seed=SEED, per_dim=True)
        (z.sum() + 2 * kl.sum() + 3 * per_dim.sum()).backward()  # incoming gradients of stride 0
        results.append((z, kl, per_dim, x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


PAIRS = {
    "rows apart": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", PAIRS.values(), ids=PAIRS)
def test_mu_and_log_var_may_differ_in_layout(kernels, layout):
    mu, log_var = (x.detach().contiguous() for x in heads((3, 4, 6, 5), torch.float32, kernels).chunk(2, 1))
    expected = ops.reparam_kl(mu, log_var, seed=SEED, per_dim=True)
    assert layout(mu).stride() != mu.stride()
    for pair in ((layout(mu), log_var), (mu, layout(log_var))):
        for a, b in zip(ops.reparam_kl(*pair, seed=SEED, per_dim=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_program_loops_over_its_columns(kernels, monkeypatch):
    monkeypatch.setattr(reparam_kl, "_PROGRAMS", 2)
    mu, log_var = heads((1, 5000), torch.float32, kernels).detach().chunk(2, 1)
    z, kl, per_dim = ops.reparam_kl(mu, log_var, seed=SEED, step=STEP, per_dim=True)
    expected = reference.reparam_kl(mu, log_var, eps_of(mu.shape).to(kernels))
    for a, b in zip((z, kl, per_dim), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_long_row_is_split_and_a_split_row_adds_up(kernels):
    both = heads((1, 65536), torch.float32, kernels)
    mu, log_var = both.chunk(2, 1)
    launch, _ = reparam_kl.plan_forward(mu, log_var, torch.tensor(0, device=kernels), None, None, False)
    assert launch.programs >= 132  # at least as many as an H100 has SMs
    kl = ops.gaussian_kl(mu.double(), log_var.double())
    torch.testing.assert_close(ops.reparam_kl(mu, log_var, seed=0)[1].double(), kl, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("clamp", [None, (-30.0, 20.0)], ids=["unclamped", "diffusers"])
def test_extremes_stand_where_the_reference_has_them(kernels, clamp):
    extremes = [-torch.inf, -100.0, -30.0, 0.0, 20.0, 50.0, 88.0, 100.0, torch.inf, torch.nan]
    mus = [0.0, -1e4, 1e4, torch.inf, torch.nan]
    mu = torch.tensor(mus).repeat_interleave(len(extremes))[:, None].expand(-1, 3)
    log_var = torch.tensor(extremes).repeat(len(mus))[:, None].expand(-1, 3)

    def run(function, device: torch.device) -> list[Tensor]:
        m, v = (x.clone().to(device).requires_grad_() for x in (mu, log_var))
        z, kl = function(m, v)[:2]
        torch.autograd.backward((z, kl), (torch.full_like(z, 0.5), torch.full_like(kl, 2.0)))
        return [x.detach().cpu() for x in (z, kl, m.grad, v.grad)]

    def by_reference(m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return reference.reparam_kl(m, v, eps_of(m.shape), clamp=clamp)

    ours = run(lambda m, v: ops.reparam_kl(m, v, seed=SEED, step=STEP, clamp=clamp), kernels)
    expected = run(by_reference, torch.device("cpu"))
    for name, a, b in zip(("z", "kl", "d mu", "d log_var"), ours, expected, strict=True):
        assert same_places(a, b), name
        finite = b.isfinite()
        torch.testing.assert_close(a[finite], b[finite], rtol=1e-5, atol=1e-5, msg=name)


def test_the_clamp_bounds_log_var_and_stops_its_gradient(backend):
    mu = torch.zeros(1, 6, device=backend)
    log_var = torch.tensor([[-40.0, -30.0, -29.0, 19.0, 20.0, 25.0]], device=backend, requires_grad=True)
    z, kl = ops.reparam_kl(mu, log_var, seed=0, clamp=(-30.0, 20.0))
    (z.sum() + kl.sum()).backward()
    assert (log_var.grad != 0).tolist() == [[False, False, True, True, False, False]]
    bounded = ops.reparam_kl(mu, log_var.clamp(-30.0, 20.0), seed=0)
    assert torch.equal(z, bounded[0])
    torch.testing.assert_close(kl, bounded[1], **SUMS)


@pytest.mark.parametrize("upstream", [0.0, 2.0])
def test_the_upstream_gradient_scales(backend, upstream):
    grads = []
    for factor in (1.0, upstream):
        both = heads((4, 10), torch.float32, backend)
        z, kl = ops.reparam_kl(*both.chunk(2, 1), seed=SEED)
        (factor * (z.square().sum() + kl.mean()) + 3.0).backward()
        grads.append(both.grad)
    torch.testing.assert_close(grads[1], upstream * grads[0])


def test_either_output_alone_has_a_gradient(backend):
    both = heads((4, 10), torch.float32, backend)
    z, kl = ops.reparam_kl(*both.chunk(2, 1), seed=SEED)
    (by_z,) = torch.autograd.grad(z.sum(), both, retain_graph=True)
    (by_kl,) = torch.autograd.grad(kl.sum(), both)
    mu, log_var = both.detach().cpu().chunk(2, 1)
    eps = eps_of(mu.shape, step=0)
    torch.testing.assert_close(by_z.cpu()[:, 10:], eps * torch.exp(log_var / 2) / 2)
    torch.testing.assert_close(by_kl.cpu(), torch.cat((mu, (log_var.exp() - 1) / 2), 1))


def test_the_kl_alone_is_the_kl(backend):
    both = heads((4, 10), torch.float32, backend)
    mu, log_var = both.chunk(2, 1)
    kl = ops.gaussian_kl(mu, log_var, clamp=(-0.5, 0.5))
    (grad,) = torch.autograd.grad(kl.sum(), both)
    _, expected = ops.reparam_kl(mu, log_var, seed=0, clamp=(-0.5, 0.5))
    (expected_grad,) = torch.autograd.grad(expected.sum(), both)
    torch.testing.assert_close(kl, expected, **SUMS)
    assert torch.equal(grad, expected_grad)


def test_mu_and_log_var_may_differ_in_dtype(backend):
    both = heads((3, 129), torch.bfloat16, backend)
    mu, log_var = (half.detach().requires_grad_() for half in both.chunk(2, 1))
    wide = log_var.detach().float().requires_grad_()
    grads = []
    for v in (log_var, wide):
        z, kl = ops.reparam_kl(mu, v, seed=SEED)
        assert (z.dtype, kl.dtype) == (torch.bfloat16, torch.float32)
        grads.append(torch.autograd.grad(z.float().sum() + kl.sum(), (mu, v)))
    assert [g.dtype for g in grads[1]] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1].bfloat16())


def test_a_step_advanced_before_the_backward_pass_does_not_change_it(backend):
    step = torch.tensor(STEP, device=backend)
    both = heads((4, 10), torch.float32, backend)
    z, _ = ops.reparam_kl(*both.chunk(2, 1), seed=SEED, step=step)
    step.add_(1)
    z.sum().backward()
    log_var = both.detach().cpu()[:, 10:]
    torch.testing.assert_close(both.grad.cpu()[:, 10:], eps_of((4, 10)) * torch.exp(log_var / 2) / 2)


def test_two_calls_in_one_graph_draw_twice(backend):
    def twice(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        return ops.reparam_kl(mu, log_var)[0], ops.reparam_kl(mu, log_var)[0]

    mu, log_var = heads((4, 10), torch.float32, backend).detach().chunk(2, 1)
    for function in (twice, torch.compile(twice, fullgraph=True)):
        first, second = function(mu, log_var)
        assert (first != second).all()


@pytest.mark.parametrize(
    "dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "dynamic"]
)
def test_compiled_equals_eager(backend, dynamic):
    def step(both: Tensor, seed: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        mu, log_var = both.chunk(2, 1)
        z, kl, per_dim = ops.reparam_kl(mu, log_var, seed=seed, step=number, clamp=(-2.0, 2.0), per_dim=True)
        return z * 2, kl.mean(), per_dim.square()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    seed, number = torch.tensor(SEED, device=backend), torch.tensor(STEP, device=backend)
    for batch in (4, 6) if dynamic else (4,):
        results = []
        for function in (step, compiled):
            both = heads((batch, 10), torch.float32, backend)
            out = function(both, seed, number)
            sum(o.sum() for o in out).backward()
            results.append((*out, both.grad))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_checkpointing_draws_the_same_noise_again(backend):
    grads = []
    for recompute in (False, True):
        torch.manual_seed(5)
        both = heads((4, 10), torch.float32, backend)

        def sample(x: Tensor) -> Tensor:
            z, kl = ops.reparam_kl(*x.chunk(2, 1))
            return z.square().sum() + kl.sum()

        loss = checkpoint(sample, both, use_reentrant=False) if recompute else sample(both)
        loss.backward()
        grads.append(both.grad)
    assert torch.equal(*grads)


def test_autocast_keeps_the_kl_in_float32(backend):
    layer = torch.nn.Linear(6, 20, device=backend)
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        both = layer(torch.randn(4, 6, device=backend))
        z, kl = ops.reparam_kl(*both.chunk(2, 1), seed=SEED)
    assert (both.dtype, z.dtype, kl.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    (z.sum() + kl.sum()).backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 41), (2, 4, 3, 5)], ids=str)
def test_opcheck(kernels, shape, dtype):
    mu, log_var = heads(shape, dtype, kernels).chunk(2, 1)
    mu, log_var = mu.detach().requires_grad_(), log_var.detach().requires_grad_()
    seed, step = torch.tensor(SEED, device=kernels), torch.tensor(STEP, device=kernels)
    opcheck(reparam_kl.reparam_kl, (mu, log_var, seed, step, [-1.0, 1.0], True))
    opcheck(reparam_kl.reparam_kl, (mu, log_var, None, None, None, False))
    key = torch.stack((seed, step))
    grads = torch.ones_like(mu), torch.ones(shape[0], device=kernels), torch.ones(shape[1:], device=kernels)
    opcheck(reparam_kl.reparam_kl_backward, (mu.detach(), log_var.detach(), key, *grads, None))


@pytest.mark.parametrize("clamp", [None, (-1.0, 1.0)], ids=["unclamped", "clamped"])
def test_gradcheck_of_the_reference_path(clamp):
    both = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return ops.reparam_kl(*x.chunk(2, 1), seed=SEED, clamp=clamp, per_dim=True)

    assert all(o.dtype == torch.float64 for o in function(both))
    assert torch.autograd.gradcheck(function, both)


@pytest.mark.parametrize("shape", [(0, 10), (0, 4, 8, 8)], ids=str)
def test_an_empty_batch(backend, shape):
    empty = torch.zeros(shape, device=backend, requires_grad=True)
    z, kl, per_dim = ops.reparam_kl(empty, empty, per_dim=True)
    assert (z.shape, kl.shape, per_dim.shape) == (shape, (0,), shape[1:])
    assert per_dim.isnan().all()
    (z.sum() + kl.sum()).backward()
    assert empty.grad.shape == shape


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


MISUSE = {
    "shapes": ((ones(2, 3), ones(2, 4)), {}, ValueError, r"log_var must have mu's shape \[2, 3\].*\[2, 4\]"),
    "devices": (
        (ones(2, 3), ones(2, 3).to("meta")),
        {},
        ValueError,
        r"log_var must be on mu's device cpu.*meta",
    ),
    "integer mu": (
        (ones(2, 3, dtype=torch.int64), ones(2, 3)),
        {},
        TypeError,
        r"mu must be float.*int64 \[2, 3\]",
    ),
    "no tensor": (([1.0], ones(1, 1)), {}, TypeError, "mu must be a tensor, got list"),
    "one dimension": ((ones(3), ones(3)), {}, ValueError, r"mu must be \[B, \.\.\.\].*\[3\]"),
    "six dimensions": ((ones(1, 1, 1, 1, 1, 1),) * 2, {}, ValueError, r"mu must be \[B, \.\.\.\]"),
    "seed's dtype": (
        (ones(2, 3),) * 2,
        {"seed": torch.tensor(1.0)},
        TypeError,
        r"seed must be an int64.*float32 \[\]",
    ),
    "seed's shape": (
        (ones(2, 3),) * 2,
        {"seed": torch.tensor([1])},
        ValueError,
        r"seed must be a 0-d.*\[1\]",
    ),
    "seed a float": (
        (ones(2, 3),) * 2,
        {"seed": 1.5},
        TypeError,
        "seed must be an int64 tensor or a Python int.*1.5",
    ),
    "step's dtype": (
        (ones(2, 3),) * 2,
        {"seed": 1, "step": torch.tensor(1, dtype=torch.int32)},
        TypeError,
        "step",
    ),
    "clamp": ((ones(2, 3),) * 2, {"clamp": (20.0, -30.0)}, ValueError, "clamp must be .* low < high"),
    "one bound": ((ones(2, 3),) * 2, {"clamp": 20.0}, TypeError, "clamp must be two numbers.*got 20.0"),
    "half a clamp": ((ones(2, 3),) * 2, {"clamp": (None, 20)}, TypeError, r"clamp must be .*\(None, 20\)"),
    "seed beyond 64 bits": ((ones(2, 3),) * 2, {"seed": 2**64}, ValueError, "seed must fit into 64 bits"),
    "step beyond 64 bits": ((ones(2, 3),) * 2, {"step": 2**63}, ValueError, "step must fit into 64 bits"),
}


@pytest.mark.parametrize(("args", "options", "error", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_says_what_was_expected(args, options, error, message):
    with pytest.raises(error, match=message):
        ops.reparam_kl(*args, **options)


def test_the_parts_of_a_batch_draw_what_the_whole_does(backend):
    whole = heads((7, 10), torch.float32, backend)
    z, kl = ops.reparam_kl(*whole.chunk(2, 1), seed=SEED, step=STEP)
    (z.sum() + kl.sum()).backward()
    for first, last in ((0, 3), (3, 7)):
        part = whole.detach()[first:last].requires_grad_()
        z_part, kl_part = ops.reparam_kl(*part.chunk(2, 1), seed=SEED, step=STEP, first_sample=first)
        (z_part.sum() + kl_part.sum()).backward()
        assert torch.equal(z_part, z[first:last])
        torch.testing.assert_close(kl_part, kl[first:last], **SUMS)
        assert torch.equal(part.grad, whole.grad[first:last])


@pytest.mark.parametrize("first_sample", [-1, 2**32 - 2])
def test_a_first_sample_out_of_range_is_named(first_sample):
    with pytest.raises(ValueError, match="first_sample must be"):
        ops.reparam_kl(torch.zeros(3, 4), torch.zeros(3, 4), first_sample=first_sample)

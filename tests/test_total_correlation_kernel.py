"""The kernel of the total correlation: against float64, strides, autograd, compile, limits."""

import pytest
import torch
from numerics import DTYPES, assert_as_good_as_torch, same_places
from torch import Tensor
from torch.library import opcheck

from bvae import ops, reference
from bvae.kernels import total_correlation

# NumPy's, of the rows that a tile has beyond the batch
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")

N = 10_000
SHAPES = [(3, 1), (3, 3), (5, 41), (9, 10), (34, 17), (3, 127), (6, 129), (3, 300), (3, 512)]


def latents(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """z, mu, log_var, of which the last two are halves of an encoder's output."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn((shape[0], 2 * shape[1]), generator=generator)
    mu, log_var = both.chunk(2, 1)
    z = mu + torch.exp(log_var / 2 - 0.5) * torch.randn(shape, generator=generator)
    z, both = z.to(device, dtype).requires_grad_(), both.to(device, dtype).requires_grad_()
    mu, log_var = both.chunk(2, 1)
    return [z, mu, log_var]


def plain(z: Tensor, mu: Tensor, log_var: Tensor, weights: str = "stratified") -> tuple[Tensor, Tensor]:
    """What people write, in the dtype of z throughout."""
    own, other = reference.log_importance_weights(len(z), N, weights)
    weight = torch.full((len(z), len(z)), other, dtype=z.dtype).fill_diagonal_(own)
    density = -0.5 * (
        (z[:, None] - mu) ** 2 / log_var.exp() + log_var + torch.log(torch.tensor(2 * torch.pi))
    )
    joint = torch.logsumexp(weight + density.sum(2), 1)
    return joint, torch.logsumexp(weight[..., None] + density, 1).sum(1)


def outputs_and_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    outputs = function(*tensors)
    batch = len(outputs[0])
    by = torch.linspace(-1, 2, batch), torch.linspace(3, -2, batch)
    gradients = torch.autograd.grad(outputs, tensors, [g.to(o) for g, o in zip(by, outputs, strict=True)])
    return [each.detach().cpu() for each in (*outputs, *gradients)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "weights"), [*((shape, "stratified") for shape in SHAPES), ((9, 10), "weighted")], ids=str
)
def test_outputs_and_gradients_are_as_good_as_torchs(backend, shape, weights, dtype):
    tensors = latents(shape, dtype, backend)
    ours = outputs_and_gradients(lambda *t: ops.log_aggregate_posterior(*t, N, weights=weights), tensors)
    on_cpu = [t.detach().cpu() for t in tensors]
    torchs = outputs_and_gradients(
        lambda *t: plain(*t, weights), [t.clone().requires_grad_() for t in on_cpu]
    )
    exact = outputs_and_gradients(
        lambda *t: plain(*t, weights), [t.double().requires_grad_() for t in on_cpu]
    )
    assert [o.dtype for o in ours] == [torch.float32, torch.float32, dtype, dtype, dtype]
    # The gradients share the rounding of the exponents, so they are compared together.
    joined = [(*each[:2], torch.cat([g.flatten() for g in each[2:]])) for each in (ours, torchs, exact)]
    for name, *triple in zip(("joint", "product", "gradients"), *joined, strict=True):
        assert_as_good_as_torch(*triple, backend, what=name)


def test_far_apart_posteriors_keep_their_digits(kernels):
    """|S| is some hundreds, and its rounding must be the same in all kernels: compare the gradients."""
    generator = torch.Generator().manual_seed(1)
    mu = torch.randn(24, 128, generator=generator)
    log_var = torch.full_like(mu, -9.0)
    z = mu + torch.exp(log_var / 2) * torch.randn(mu.shape, generator=generator)
    tensors = [t.to(kernels).requires_grad_() for t in (z, mu, log_var)]
    ours = outputs_and_gradients(lambda *t: ops.log_aggregate_posterior(*t, N), tensors)
    exact = outputs_and_gradients(plain, [t.detach().cpu().double().requires_grad_() for t in tensors])
    assert exact[0].abs().max() > 350
    for a, e in zip(ours, exact, strict=True):
        assert (a.double() - e).abs().max() <= 1e-6 * e.abs().max()


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "rows apart": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_change_nothing_but_strides(kernels, layout):
    dense = [t.detach().contiguous() for t in latents((5, 12), torch.float32, kernels)]
    strided = [layout(t) for t in dense]
    results = []
    for tensors in (strided, [t.contiguous() for t in strided]):
        tensors = [t.requires_grad_() for t in tensors]
        tc = ops.total_correlation(*tensors, N)  # its gradients have stride 0
        results.append([tc, *torch.autograd.grad(2 * tc + 3, tensors)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_dtypes_may_differ(kernels):
    z, mu, log_var = (t.detach() for t in latents((5, 12), torch.bfloat16, kernels))
    tensors = [z.requires_grad_(), mu.float().requires_grad_(), log_var.half().requires_grad_()]
    found = outputs_and_gradients(lambda *t: ops.log_aggregate_posterior(*t, N), tensors)
    assert [t.dtype for t in found[2:]] == [torch.bfloat16, torch.float32, torch.float16]
    wide = [t.detach().float().requires_grad_() for t in tensors]
    for a, b in zip(
        found, outputs_and_gradients(lambda *t: ops.log_aggregate_posterior(*t, N), wide), strict=True
    ):
        torch.testing.assert_close(a, b.to(a.dtype))


def test_one_output_alone_has_a_gradient(backend):
    tensors = latents((5, 4), torch.float32, backend)
    for which in (0, 1):
        found = torch.autograd.grad(ops.log_aggregate_posterior(*tensors, N)[which].sum(), tensors)
        expected = torch.autograd.grad(reference.log_aggregate_posterior(*tensors, N)[which].sum(), tensors)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_extremes_stand_where_the_reference_has_them(kernels):
    extremes = [0.0, 1e25, -1e25, torch.inf, torch.nan, -200.0, 200.0]
    for position in range(3):
        for value in extremes:
            tensors = [t.detach().clone() for t in latents((4, 3), torch.float32, kernels)]
            tensors[position][1, 2] = value
            ours = ops.log_aggregate_posterior(*tensors, N)
            expected = reference.log_aggregate_posterior(*tensors, N)
            for a, b in zip(ours, expected, strict=True):
                assert same_places(a, b), (position, value)


def test_more_latents_than_a_tile_holds_run_the_reference(kernels, monkeypatch):
    called = []
    monkeypatch.setattr(
        reference, "log_aggregate_posterior", lambda *_: called.append(1) or (_[0][:, 0],) * 2
    )
    for width in (512, 513):
        wide = torch.zeros(3, width, device=kernels)
        ops.log_aggregate_posterior(wide, wide, wide, N)
    assert called == [1]


def test_compiled_equals_eager(kernels):
    def step(z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
        return 2 * ops.total_correlation(z, mu, log_var, N) + 1

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = latents((5, 10), torch.float32, kernels)
        value = function(*tensors)
        results.append((value.detach(), *torch.autograd.grad(value, tensors)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_opcheck(kernels, dtype):
    z, mu, log_var = (t.detach().requires_grad_() for t in latents((4, 5), dtype, kernels))
    opcheck(total_correlation.log_aggregate_posterior, (z, mu, log_var, -3.0, -1.0))
    saved = torch.zeros(4, device=kernels), torch.zeros(4, 5, device=kernels)
    ones = torch.ones(4, device=kernels)
    inputs = (z.detach(), mu.detach(), log_var.detach(), *saved, ones, ones, -3.0, -1.0)
    opcheck(total_correlation.log_aggregate_posterior_backward, inputs)


def test_no_tensor_of_all_pairs_is_made():
    """What the launches of 1024 x 128 hold: inputs, outputs, and [B, D] for the backward pass."""
    z, mu, log_var = (torch.empty(1024, 128, device="meta") for _ in range(3))
    forward, outputs = total_correlation.plan_forward(z, mu, log_var, -3.0, -1.0)
    backward, _ = total_correlation.plan_backward(z, mu, log_var, *outputs[2:], *outputs[:2], -3.0, -1.0)
    held = {
        id(t): t.nbytes for each in (forward, *backward) for t in each.args.values() if isinstance(t, Tensor)
    }
    assert sum(held.values()) == (3 + 1 + 3) * 1024 * 128 * 4 + 3 * 1024 * 4

"""vae_loss: kernels and reference against float64 and the textbook; layouts, capacity, extremes, misuse."""

import pytest
import torch
import torch.nn.functional as F
from loss_inputs import SHAPE, decoder_output, divergence, pixels
from numerics import DTYPES, assert_as_good_as_torch, same_places
from torch import Tensor
from torch.library import opcheck

from bvae import ops, reference
from bvae.kernels import capacity_loss
from bvae.losses import BetaLoss, CapacityLoss, LossTerms
from bvae.objective import Objective

OBJECTIVES = {
    "mse": {},
    "tanh": {"activation": "tanh"},
    "sigmoid": {"activation": "sigmoid"},
    "tanh, sum, variance 0.1": {"activation": "tanh", "reduction": "sum", "decoder_variance": 0.1},
    "bernoulli": {"likelihood": "bernoulli"},
    "bernoulli, sum": {"likelihood": "bernoulli", "reduction": "sum"},
    "capacity": {"step": 3000, "activation": "tanh"},
    "capacity over the KL": {"step": 10_000, "activation": "tanh"},
}
TANH = Objective(activation="tanh")


def plain(
    recon: Tensor, target: Tensor, kl: Tensor, *, kl_weight: float, step: int | None = None, **options
) -> list:
    """The objective as people write it, in the dtype of recon."""
    bernoulli = options.get("likelihood") == "bernoulli"
    unit_range = bernoulli or options.get("activation") == "sigmoid"
    target = target.to(recon.dtype) / 255 if unit_range else target.to(recon.dtype) / 127.5 - 1
    x = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, None: lambda x: x}[options.get("activation")](recon)
    error = F.binary_cross_entropy_with_logits if bernoulli else F.mse_loss
    term = error(x, target, reduction=options.get("reduction", "mean"))
    if options.get("reduction") == "sum":
        term = term / len(recon)
    if not bernoulli:
        term = term / (2 * options.get("decoder_variance", 0.5))
    kld = kl.mean()
    capacity = (
        torch.zeros_like(kld) if step is None else torch.full_like(kld, min(25.0 / 10_000 * step, 25.0))
    )
    return [term + kl_weight * (kld if step is None else (kld - capacity).abs()), term, kld, capacity]


def specified(
    recon: Tensor, target: Tensor, kl: Tensor, *, step: Tensor | None = None, **options
) -> LossTerms:
    return reference.vae_loss(recon, target, kl, Objective(**options), step=step)


def values_and_gradients(terms, recon: Tensor, kl: Tensor) -> list[Tensor]:
    """The terms, and gradients of something that uses all three and is not the loss itself."""
    loss, recon_term, kld, capacity = terms
    (2 * loss + 0.5 * recon_term + 3 * kld + 1).backward()
    return [x.detach().cpu() for x in (loss, recon_term, kld, capacity, recon.grad, kl.grad)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_terms_and_gradients_are_as_good_as_torchs(backend, objective, dtype):
    def run(function, recon: Tensor, kl: Tensor, target: Tensor) -> list[Tensor]:
        return values_and_gradients(function(recon, target, kl, kl_weight=0.3, **objective), recon, kl)

    cpu = torch.device("cpu")
    ours = run(ops.vae_loss, decoder_output(dtype, backend), divergence(backend), pixels(backend))
    torchs = run(plain, decoder_output(dtype, cpu), divergence(cpu), pixels(cpu))
    exact_inputs = [
        x.detach().double().requires_grad_() for x in (decoder_output(dtype, cpu), divergence(cpu))
    ]
    exact = run(plain, *exact_inputs, pixels(cpu))
    assert [x.dtype for x in ours] == [torch.float32] * 4 + [dtype, torch.float32]
    for name, *triple in zip((*LossTerms._fields, "d recon", "d kl"), ours, torchs, exact, strict=True):
        assert_as_good_as_torch(*triple, backend, what=name)


LAYOUTS = {
    "NHWC shape": (lambda r: r, lambda t: t.permute(0, 2, 3, 1)),
    "both NCHW": (lambda r: r.contiguous(), lambda t: t.contiguous()),
    "recon NCHW": (lambda r: r.contiguous(), lambda t: t),
    "target NCHW": (lambda r: r, lambda t: t.contiguous()),
    "cropped": (lambda r: r[..., 1:-1, 2:-2], lambda t: t[..., 1:-1, 2:-2]),
    "flipped twice": (lambda r: r.transpose(2, 3), lambda t: t.transpose(2, 3)),
    "float target": (lambda r: r, lambda t: reference.scale_pixels(t)),
    "one target for all": (lambda r: r, lambda t: t[:1].expand(t.shape)),
}


@pytest.mark.parametrize(("recon_layout", "target_layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_change_nothing(kernels, recon_layout, target_layout):
    recon = recon_layout(decoder_output(torch.float32, kernels).detach()).requires_grad_()
    target = target_layout(pixels(kernels))
    terms = ops.vae_loss(recon, target, divergence(kernels), activation="tanh")
    (gradient,) = torch.autograd.grad(terms.loss, recon)
    same = recon.detach().cpu().requires_grad_()
    same_target = target.cpu() if target.shape == recon.shape else target.cpu().permute(0, 3, 1, 2)
    expected = reference.vae_loss(same, same_target, divergence(torch.device("cpu")), TANH)
    torch.testing.assert_close(terms.loss.cpu(), expected.loss)
    torch.testing.assert_close(gradient.cpu(), torch.autograd.grad(expected.loss, same)[0])


@pytest.mark.parametrize("shape", [(1, 1), (2, 41), (3, 127), (1, 1271), (9, 2500)], ids=str)
def test_odd_sizes(kernels, shape):
    recon, target = torch.randn(shape, device=kernels, requires_grad=True), torch.randn(shape, device=kernels)
    terms = ops.vae_loss(recon, target, torch.ones(shape[0], device=kernels))
    terms.recon.backward()
    torch.testing.assert_close(terms.recon, F.mse_loss(recon, target))
    torch.testing.assert_close(recon.grad, 2 * (recon - target).detach() / recon.numel())


def test_a_program_loops_over_its_share(kernels, monkeypatch):
    monkeypatch.setattr(capacity_loss, "_PROGRAMS", 2)
    recon = decoder_output(torch.float32, kernels, (9, 3, 30, 31))
    terms = ops.vae_loss(recon, pixels(kernels, (9, 3, 30, 31)), divergence(kernels, 9), activation="tanh")
    (gradient,) = torch.autograd.grad(terms.loss, recon)
    expected = reference.vae_loss(recon, pixels(kernels, (9, 3, 30, 31)), divergence(kernels, 9), TANH)
    torch.testing.assert_close(terms.recon, expected.recon)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.loss, recon)[0])


@pytest.mark.parametrize("trained", [True, False], ids=["decoder trained", "decoder fixed"])
def test_a_batch_larger_than_a_block(kernels, trained):
    recon = torch.randn(5000, 1, device=kernels, requires_grad=trained)
    kl = (torch.arange(5000.0, device=kernels) / 500).requires_grad_()
    terms = ops.vae_loss(recon, torch.zeros_like(recon).detach(), kl, kl_weight=2.0)
    terms.loss.backward()
    torch.testing.assert_close(terms.kld, kl.detach().mean())
    torch.testing.assert_close(kl.grad, torch.full_like(kl, 2 / 5000))
    if trained:
        torch.testing.assert_close(recon.grad, 2 * recon.detach() / 5000)


def test_a_kl_of_any_stride(kernels):
    images, table = torch.zeros(5, 2, device=kernels), torch.randn(5, 3, device=kernels, requires_grad=True)
    terms = ops.vae_loss(images, images, table[:, 1])
    torch.testing.assert_close(terms.kld, table[:, 1].mean())
    terms.kld.backward()
    torch.testing.assert_close(table.grad[:, 1], torch.full((5,), 0.2, device=kernels))
    expanded = torch.tensor(3.0, device=kernels).expand(5)
    assert float(ops.vae_loss(images, images, expanded).kld) == 3.0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("logit", [10.0, 16.0, 20.0, 30.0])
def test_a_confident_logit_keeps_its_small_error(backend, logit):
    one = torch.ones(1, 1, device=backend)
    terms = ops.vae_loss(logit * one, one, one[0], likelihood="bernoulli")
    exact = float(F.softplus(torch.tensor(-logit, dtype=torch.float64)))
    assert float(terms.recon) == pytest.approx(exact, rel=1e-5, abs=0)


def test_the_default_is_the_mean_squared_error(backend):
    recon, target = decoder_output(torch.float32, backend), torch.rand(SHAPE, device=backend)
    terms = BetaLoss(beta=4.0, kl_weight=0.25)(recon, target, divergence(backend))
    torch.testing.assert_close(terms.recon, F.mse_loss(recon, target))
    torch.testing.assert_close(terms.kld, divergence(backend).mean())
    torch.testing.assert_close(terms.loss, terms.recon + terms.kld)


def test_sum_and_mean_differ_by_the_size_of_an_image(backend):
    arguments = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    for options in ({"activation": "tanh"}, {"likelihood": "bernoulli"}):
        mean, total = (BetaLoss(kl_weight=1.0, reduction=r, **options)(*arguments) for r in ("mean", "sum"))
        torch.testing.assert_close(total.recon, mean.recon * (3 * 12 * 20))


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_pixels_are_scaled_to_the_whole_range(low):
    scaled = reference.scale_pixels(torch.arange(256, dtype=torch.uint8), low)
    assert (scaled[0], scaled[-1]) == (low, 1.0)
    torch.testing.assert_close(scaled, torch.linspace(low, 1.0, 256))


RANGES = {
    "none": ({}, (-1.0, 1.0)),
    "tanh": ({"activation": "tanh"}, (-1.0, 1.0)),
    "sigmoid": ({"activation": "sigmoid"}, (0.0, 1.0)),
    "bernoulli": ({"likelihood": "bernoulli"}, (0.0, 1.0)),
}


@pytest.mark.parametrize(("options", "expected"), RANGES.values(), ids=RANGES)
def test_uint8_targets_are_scaled_to_the_decoders_range(backend, options, expected):
    loss = BetaLoss(kl_weight=1.0, **options)
    assert loss.pixel_range == expected
    recon, target, kl = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    scaled = reference.scale_pixels(target, expected[0])
    torch.testing.assert_close(loss(recon, target, kl).loss, loss(recon, scaled, kl).loss)


def test_a_mean_of_float16_has_a_gradient_that_a_scaler_can_save(backend):
    shape = (16, 3, 64, 64)
    recon, target = decoder_output(torch.float16, backend, shape), pixels(backend, shape)
    terms = ops.vae_loss(recon, target, torch.zeros(16, device=backend), activation="tanh")
    (gradient,) = torch.autograd.grad(terms.loss * 65536, recon)
    exact = recon.detach().double().requires_grad_()
    loss = F.mse_loss(torch.tanh(exact), reference.scale_pixels(target).double())
    (expected,) = torch.autograd.grad(loss * 65536, exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-3, atol=1e-6)


# the capacity


def test_capacity_rises_linearly_and_stays(backend):
    kl = torch.tensor([8.0, 12.0], device=backend)
    images = torch.zeros(2, 3, 4, 4, device=backend)
    for step, capacity in {0: 0.0, 1: 0.0025, 4000: 10.0, 9999: 24.9975, 10_000: 25.0, 10**12: 25.0}.items():
        for number in (step, torch.tensor(step, device=backend)):
            terms = ops.vae_loss(images, images, kl, kl_weight=2.0, step=number)
            assert float(terms.capacity) == pytest.approx(capacity)
            assert float(terms.loss) == pytest.approx(2 * abs(10 - capacity), abs=1e-5)


@pytest.mark.parametrize(("kl_value", "sign"), [(24.0, -1.0), (25.0, 0.0), (26.0, 1.0)])
def test_the_kls_gradient_is_the_sign_of_its_distance(backend, kl_value, sign):
    kl = torch.full((4,), kl_value, device=backend, requires_grad=True)
    images = torch.zeros(4, 3, 4, 4, device=backend)
    ops.vae_loss(images, images, kl, kl_weight=3.0, step=10_000).loss.backward()
    assert kl.grad.tolist() == [3.0 * sign / 4] * 4


def test_no_capacity_is_the_absolute_kl(backend):
    images, kl = torch.zeros(4, 3, 4, 4, device=backend), divergence(backend, 4)
    terms = ops.vae_loss(images, images, kl, step=5, max_capacity=0.0)
    assert float(terms.capacity) == 0.0
    torch.testing.assert_close(terms.loss, kl.mean())


def test_without_gradients_nothing_is_stored(kernels, monkeypatch):
    sizes, plan = [], capacity_loss.plan_forward

    def spy(*arguments):
        launch, outputs = plan(*arguments)
        sizes.append(outputs[-1].numel())
        return launch, outputs

    monkeypatch.setattr(capacity_loss, "plan_forward", spy)
    recon, others = decoder_output(torch.float32, kernels), (pixels(kernels), divergence(kernels))
    with torch.no_grad():
        assert not ops.vae_loss(recon, *others).loss.requires_grad
    ops.vae_loss(recon.detach(), *others)
    assert sizes == [0, 0]
    ops.vae_loss(recon, *others)
    assert sizes[-1] == recon.numel()


def test_the_kl_term_alone_leaves_recon_without_a_gradient(backend):
    recon = torch.full((2, 3), torch.inf, device=backend, requires_grad=True)
    kl = divergence(backend, 2)
    ops.vae_loss(recon, torch.zeros_like(recon).detach(), kl).kld.backward()
    assert recon.grad is None or (recon.grad == 0).all()
    torch.testing.assert_close(kl.grad, torch.full_like(kl, 0.5))


def test_the_kl_may_be_overwritten_after_the_loss(backend):
    recon, kl = decoder_output(torch.float32, backend), divergence(backend)
    overwritten = kl * 1
    loss = ops.vae_loss(recon, pixels(backend), overwritten, kl_weight=2.0).loss
    overwritten.detach().zero_()
    with torch.no_grad():
        overwritten.zero_()
    loss.backward()
    assert kl.grad.tolist() == pytest.approx([2.0 / 5] * 5)


@pytest.mark.parametrize("step", [None, 10_000], ids=["beta", "capacity"])
def test_the_weight_may_be_a_tensor(backend, step):
    recon, target, kl = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    weight = torch.tensor(0.3, device=backend)
    terms, by_number = (ops.vae_loss(recon, target, kl, kl_weight=w, step=step) for w in (weight, 0.3))
    gradients = [torch.autograd.grad(t.loss, (recon, kl), retain_graph=True) for t in (terms, by_number)]
    for a, b in zip((*terms, *gradients[0]), (*by_number, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b)
    excess = (terms.kld - terms.capacity).abs() if step else terms.kld
    torch.testing.assert_close(terms.loss, terms.recon + 0.3 * excess)


def test_a_compiled_loss_takes_a_weight_that_changes(kernels):
    recon, target, kl = decoder_output(torch.float32, kernels), pixels(kernels), divergence(kernels)
    weight = torch.zeros((), device=kernels)
    compiled = torch.compile(
        lambda: ops.vae_loss(recon, target, kl, kl_weight=weight), fullgraph=True, backend="aot_eager"
    )
    for value in (0.5, 2.0):
        weight.fill_(value)
        torch.testing.assert_close(compiled().loss, ops.vae_loss(recon, target, kl, kl_weight=value).loss)


def test_a_fixed_decoder_still_trains_the_encoder(backend):
    kl = divergence(backend)
    recon = decoder_output(torch.float32, backend).detach()
    ops.vae_loss(recon, pixels(backend), kl, kl_weight=2.0).loss.backward()
    assert kl.grad.tolist() == pytest.approx([2.0 / 5] * 5)


# registration, numerics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_opcheck(kernels, likelihood, dtype):
    recon, target, kl = (
        decoder_output(dtype, kernels, (2, 3, 5, 7)),
        pixels(kernels, (2, 3, 5, 7)),
        divergence(kernels, 2),
    )
    activation = None if likelihood == "bernoulli" else "tanh"
    options = capacity_loss.Options(0.3, 25.0, 100, likelihood, activation, "mean", 0.5, -1.0)
    for step, with_grad in ((None, True), (torch.tensor(3, device=kernels), recon.requires_grad)):
        scale = None if step is None else torch.tensor(0.5, device=kernels)
        opcheck(capacity_loss.vae_loss, (recon, target, kl, step, scale, with_grad, *options))
    one = torch.ones((), device=kernels)
    for grad in (recon.detach(), recon.new_empty(0)):
        opcheck(capacity_loss.vae_loss_backward, (grad, one, one, None, one, 0.5, 2, torch.bfloat16))


def test_the_schema_has_the_options_in_order():
    """It is written by hand: the operation gets them one by one, and puts them together again."""
    schema = torch.ops.bvae.vae_loss.default._schema
    options = capacity_loss.Options.__annotations__
    kinds = {float: "float", int: "int", str: "str", str | None: "Optional[str]"}
    last = schema.arguments[-len(options) :]
    assert {a.name: str(a.type) for a in last} == {name: kinds[kind] for name, kind in options.items()}
    assert [a.name for a in last] == list(options)


def test_a_gradient_with_gaps_is_refused(kernels):
    one = torch.ones((), device=kernels)
    with pytest.raises(AssertionError, match="order of memory"):
        capacity_loss.vae_loss_backward(
            torch.ones(2, 4, device=kernels)[:, ::2], one, one, None, None, 1.0, 2, torch.float32
        )


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_gradcheck_of_the_reference_path(objective):
    generator = torch.Generator().manual_seed(4)
    recon = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    kl = (14 + torch.rand(2, dtype=torch.float64, generator=generator)).requires_grad_()
    target = torch.rand(2, 3, 2, 2, generator=generator)

    def function(recon: Tensor, kl: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.vae_loss(recon, target, kl, **objective)[:3])

    assert all(t.dtype == torch.float64 for t in function(recon, kl))
    assert torch.autograd.gradcheck(function, (recon, kl))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_extremes_stand_where_the_reference_has_them(kernels, objective):
    values = [0.0, 1e-30, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4, 1e18, torch.inf, -torch.inf, torch.nan]
    for kl_value in (0.0, 1e4, torch.inf, torch.nan):
        for value in values:
            results = []
            for function, device in ((ops.vae_loss, kernels), (specified, torch.device("cpu"))):
                recon = torch.full((1, 2), value, device=device, requires_grad=True)
                kl = torch.tensor([kl_value], device=device, requires_grad=True)
                target = torch.tensor([[0.0, 1.0]], device=device)
                step = {"step": torch.tensor(objective["step"], device=device)} if "step" in objective else {}
                terms = function(recon, target, kl, **{**objective, **step})
                terms.loss.backward()
                results.append([x.detach().cpu() for x in (*terms, recon.grad, kl.grad)])
            for a, b in zip(*results, strict=True):
                assert same_places(a, b), (value, kl_value)
                torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_an_empty_batch(backend):
    recon = torch.zeros(0, 3, 8, 8, device=backend, requires_grad=True)
    for loss in (BetaLoss(kl_weight=1.0), CapacityLoss(kl_weight=1.0).to(backend)):
        terms = loss(recon, torch.zeros(0, 8, 8, 3, dtype=torch.uint8, device=backend), recon.sum((1, 2, 3)))
        assert terms.loss.isnan()
        terms.loss.backward()
        assert recon.grad.shape == recon.shape


# misuse


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (2, 3, 8, 8), dtype=dtype)


KL = torch.ones(2)
MISUSE = {
    "target's shape": (
        (images(), images(2, 3, 8, 9), KL),
        {},
        ValueError,
        r"target must have .*\[2, 3, 8, 9\]",
    ),
    "target's device": (
        (images(), images().to("meta"), KL),
        {},
        ValueError,
        r"target must be on .*cpu.*meta",
    ),
    "target's dtype": (
        (images(), images(dtype=torch.int32), KL),
        {},
        TypeError,
        r"target must be uint8.*int32",
    ),
    "recon's dtype": (
        (images(dtype=torch.uint8), images(), KL),
        {},
        TypeError,
        r"recon must be float.*uint8 \[2",
    ),
    "kl's shape": ((images(), images(), torch.ones(3)), {}, ValueError, r"kl must be \[2\].*float32 \[3\]"),
    "kl a number": ((images(), images(), torch.ones(())), {}, ValueError, r"kl must be \[2\].*\[\]"),
    "no probability": (
        (images(), images() * 1.5, KL),
        {"likelihood": "bernoulli"},
        ValueError,
        r"target of a bernoulli .* \[0, 1\].*\[2, 3, 8, 8\].*1.5",
    ),
    "activated logits": (
        (images(), images(), KL),
        {"likelihood": "bernoulli", "activation": "sigmoid"},
        ValueError,
        "logits",
    ),
    "no tensor": ((images(), [1.0], KL), {}, TypeError, "target must be a tensor, got list"),
    "weight": (
        (images(), images(), KL),
        {"kl_weight": KL},
        ValueError,
        r"kl_weight must be a number or one in a tensor on cpu, got float32 \[2\]",
    ),
    "weight's dtype": (
        (images(), images(), KL),
        {"kl_weight": torch.tensor(1)},
        TypeError,
        "kl_weight must be a number or a floating-point tensor, got int64",
    ),
    "weight True": (
        (images(), images(), KL),
        {"kl_weight": True},
        TypeError,
        "kl_weight must be a number or a 0-d tensor, got bool",
    ),
    "recon a list": (([1.0], images(), KL), {"step": 3}, TypeError, "recon must be a tensor, got list"),
    "step beyond 64 bits": ((images(), images(), KL), {"step": 2**63}, ValueError, "step must fit"),
    "half an iteration": (
        (images(), images(), KL),
        {"capacity_iters": 2.5},
        ValueError,
        "capacity_iters must be .*whole, got 2.5",
    ),
    "no end of iterations": (
        (images(), images(), KL),
        {"capacity_iters": float("inf")},
        ValueError,
        "capacity_iters must be .* got inf",
    ),
    "likelihood": (
        (images(), images(), KL),
        {"likelihood": "poisson"},
        ValueError,
        "likelihood must be .*'poisson'",
    ),
    "activation": (
        (images(), images(), KL),
        {"activation": "relu"},
        ValueError,
        "activation must be .*'relu'",
    ),
    "reduction": (
        (images(), images(), KL),
        {"reduction": "batch"},
        ValueError,
        "reduction must be .*'batch'",
    ),
    "variance": (
        (images(), images(), KL),
        {"decoder_variance": 0.0},
        ValueError,
        "decoder_variance must be positive",
    ),
    "step": ((images(), images(), KL), {"step": torch.tensor(1.0)}, TypeError, "step must be an int64"),
    "iterations": (
        (images(), images(), KL),
        {"capacity_iters": 0},
        ValueError,
        "capacity_iters must be at least 1",
    ),
}


@pytest.mark.parametrize(("args", "options", "error", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_says_what_was_expected(args, options, error, message):
    with pytest.raises(error, match=message):
        ops.vae_loss(*args, **options)


def test_an_unknown_option_is_an_error(backend):
    arguments = images().to(backend), images().to(backend), KL.to(backend)
    with pytest.raises(TypeError, match="foo"):
        ops.vae_loss(*arguments, foo=1)


def test_pytorch_vaes_iterations_of_1e5_are_whole(backend):
    arguments = images().to(backend), images().to(backend), KL.to(backend)
    assert float(ops.vae_loss(*arguments, step=50_000, capacity_iters=1e5).capacity) == pytest.approx(12.5)


def test_where_nobody_can_look_a_wrong_probability_makes_the_loss_nan(kernels):
    options = capacity_loss.Options(1.0, 25.0, 1, "bernoulli", None, "mean", 0.5, 0.0)
    target = torch.full((2, 8), 0.5, device=kernels)
    target[1, 3] = 1.5
    logits, kl = torch.zeros_like(target), KL.to(kernels)
    loss, *_ = capacity_loss.vae_loss(logits, target, kl, None, None, False, *options)
    assert loss.isnan()
    assert reference.vae_loss(logits, target, kl, Objective(likelihood="bernoulli")).loss.isnan()

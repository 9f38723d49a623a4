"""BetaLoss and CapacityLoss: what modules add to the operations, and what callers do with modules."""

import copy
import pickle

import pytest
import torch
from loss_inputs import SHAPE, decoder_output, divergence, pixels
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from bvae import ops
from bvae.losses import BetaLoss, CapacityLoss


def test_the_counter_advances_in_training_alone_and_is_saved(backend):
    loss = CapacityLoss(kl_weight=1.0, max_capacity=10.0, capacity_iters=10).to(backend)
    arguments = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    assert [float(loss(*arguments).capacity) for _ in range(3)] == [1.0, 2.0, 3.0]
    loss.eval()
    assert [float(loss(*arguments).capacity) for _ in range(2)] == [3.0, 3.0]
    resumed = CapacityLoss(kl_weight=1.0, max_capacity=10.0, capacity_iters=10).to(backend)
    resumed.load_state_dict(loss.state_dict())
    assert float(resumed(*arguments).capacity) == 4.0
    assert (resumed.step.dtype, resumed.step.shape) == (torch.int64, ())


MODULES = {
    "beta": lambda: BetaLoss(beta=4.0, activation="tanh"),
    "capacity": lambda: CapacityLoss(max_capacity=10.0, activation="tanh"),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_mu_and_log_var_instead_of_the_kl(backend, make):
    both = torch.randn(5, 20, device=backend, requires_grad=True)
    mu, log_var = both.chunk(2, 1)
    recon, target = decoder_output(torch.float32, backend), pixels(backend)
    terms = make().to(backend)(recon, target, mu, log_var)
    kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
    options = {"beta": 4.0} if isinstance(make(), BetaLoss) else {"max_capacity": 10.0}
    by_number = type(make())(kl_weight=10 / (12 * 20), activation="tanh", **options).to(backend)
    expected = by_number(recon, target, kl)
    for ours, theirs in zip(terms, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(t.loss, both, retain_graph=True)[0] for t in (terms, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_modules_copy_and_pickle(make):
    loss = make()
    arguments = decoder_output(torch.float32, torch.device("cpu")), pixels(torch.device("cpu"))
    latents = torch.randn(5, 10), torch.randn(5, 10)
    loss(*arguments, *latents)
    copies = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    expected = loss(*arguments, *latents)
    for other in copies:
        assert repr(other) == repr(loss)
        assert other(*arguments, *latents).loss == expected.loss


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_modules_compile(backend, make):
    def train_step(loss, decoder, x: Tensor, target: Tensor, both: Tensor):
        z, kl = ops.reparam_kl(*both.chunk(2, 1), seed=SEED, step=STEP)
        return loss(decoder(x) + z.sum(), target, *both.chunk(2, 1)), kl

    SEED = torch.tensor(1, device=backend)
    STEP = torch.tensor(2, device=backend)
    results = []
    for compile_it in (False, True):
        torch.manual_seed(3)
        loss, decoder = make().to(backend), torch.nn.Conv2d(3, 3, 1).to(backend)
        x, both = torch.randn(SHAPE, device=backend), torch.randn(5, 20, device=backend, requires_grad=True)
        function = torch.compile(train_step, fullgraph=True) if compile_it else train_step
        for _ in range(2):
            terms, _ = function(loss, decoder, x, pixels(backend), both)
            terms.loss.backward()
        results.append((*terms, both.grad, decoder.weight.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_one_compiled_loss_takes_other_shapes_and_weights(backend):
    loss = BetaLoss(kl_weight=1.0, activation="tanh")
    compiled = torch.compile(lambda *tensors: loss(*tensors), fullgraph=True, dynamic=True)
    for shape, beta in {(4, 3, 8, 8): 1.0, (6, 3, 8, 8): 2.5, (2, 3, 12, 12): 4.0}.items():
        loss.beta = beta
        arguments = (
            decoder_output(torch.float32, backend, shape),
            pixels(backend, shape),
            divergence(backend, shape[0]),
        )
        ours, expected = compiled(*arguments), loss(*arguments)
        torch.testing.assert_close(ours.loss, expected.loss)
        gradients = [torch.autograd.grad(terms.loss, arguments[0])[0] for terms in (ours, expected)]
        torch.testing.assert_close(*gradients)


FACTORS = {
    "beta": (lambda: BetaLoss(activation="tanh"), "beta", 10 / (12 * 20)),
    "gamma": (lambda: CapacityLoss(activation="tanh"), "gamma", 10 / (12 * 20)),
    "kl_weight": (lambda: BetaLoss(2.0, 1.0, activation="tanh"), "kl_weight", 2.0),
}


@pytest.mark.parametrize(("make", "attribute", "others"), FACTORS.values(), ids=FACTORS)
def test_the_weight_may_change_every_step(backend, make, attribute, others):
    loss = make().to(backend).eval()
    target, latents = pixels(backend), torch.randn(5, 20, device=backend)
    recon = decoder_output(torch.float32, backend)
    compiles = CompileCounter()
    torch._dynamo.reset()  # the limit of recompilations is one for all parameters of this test
    compiled = torch.compile(
        lambda r: loss(r, target, *latents.chunk(2, 1)).loss, fullgraph=True, backend=compiles
    )
    for step in range(12):
        setattr(loss, attribute, 0.25 * step)
        terms = loss(recon, target, *latents.chunk(2, 1))
        torch.testing.assert_close(terms.loss, terms.recon + 0.25 * step * others * terms.kld)
        torch.testing.assert_close(compiled(recon), terms.loss)
    assert compiles.frame_count <= 2


def test_a_weight_that_does_not_change_launches_nothing(kernels, monkeypatch):
    writes = []
    fill = torch.Tensor.fill_
    monkeypatch.setattr(torch.Tensor, "fill_", lambda t, value: (writes.append(value), fill(t, value))[1])
    loss = BetaLoss(beta=2.0, kl_weight=0.5).to(kernels)
    writes.clear()
    for weight in (0.5, 0.5, 0.25, 0.25):
        loss.beta, loss.kl_weight = 2.0, weight
        terms = loss(decoder_output(torch.float32, kernels), pixels(kernels), divergence(kernels))
        torch.testing.assert_close(terms.loss, terms.recon + 2 * weight * terms.kld)
    assert writes == [0.5]


def test_other_dtypes_and_empty_memory_leave_the_weight(kernels):
    images, kl = torch.zeros(2, 3, 4, 4, device=kernels), torch.full((2,), 3.0, device=kernels)
    loss = BetaLoss(beta=0.1, kl_weight=1.0)
    for move in (lambda m: m.half(), lambda m: m.to("meta").to_empty(device=kernels), copy.deepcopy):
        loss = move(loss).to(kernels)
        assert loss._weight.dtype == torch.float32
        torch.testing.assert_close(loss(images, images, kl).loss, torch.tensor(0.3, device=kernels))
    assert not loss.state_dict()


def test_a_module_left_on_another_device_weighs_by_its_number(kernels):
    images, kl = torch.zeros(2, 3, 4, 4, device=kernels), torch.full((2,), 3.0, device=kernels)
    loss = BetaLoss(beta=0.5, kl_weight=1.0).to("meta")
    assert float(loss(images, images, kl).loss) == 1.5


@pytest.mark.parametrize("backend", ["reference", "interpreter"], indirect=True)  # gloo runs on the CPU
def test_distributed_data_parallel(backend, tmp_path):
    if torch.distributed.is_initialized():
        pytest.skip("one process group a process")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 20))
        model = torch.nn.parallel.DistributedDataParallel(model)
        images = torch.rand(6, 3, 4, 4)
        mu, log_var = model(images).chunk(2, 1)
        z, kl = ops.reparam_kl(mu, log_var)
        CapacityLoss(kl_weight=1.0)(images * z.mean(), images, kl).loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_leaves_the_terms_in_float32(backend):
    decoder = torch.nn.Conv2d(3, 3, 1).to(backend)
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        recon = decoder(torch.randn(SHAPE, device=backend))
        terms = BetaLoss(kl_weight=1.0, activation="tanh")(recon, pixels(backend), divergence(backend))
    assert recon.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 and t.shape == () for t in terms)
    terms.loss.backward()
    assert decoder.weight.grad.isfinite().all()


CONSTRUCTORS = {
    "beta": (lambda: BetaLoss(beta=-1.0), "beta must be a finite number of at least 0, got -1"),
    "gamma": (lambda: CapacityLoss(gamma=-1.0), "gamma must be a finite number of at least 0, got -1"),
    "a later beta": (lambda: setattr(BetaLoss(), "beta", float("nan")), "beta must be .* got nan"),
    "capacity": (lambda: CapacityLoss(max_capacity=-25.0), "max_capacity must be at least 0 nats, got -25"),
    "iterations": (lambda: CapacityLoss(capacity_iters=0), "capacity_iters must be at least 1 step.*got 0"),
    "half iterations": (lambda: CapacityLoss(capacity_iters=2.5), "capacity_iters must be .*whole, got 2.5"),
    "no end": (lambda: CapacityLoss(capacity_iters=float("inf")), "capacity_iters must be .* got inf"),
    "weight": (lambda: BetaLoss(kl_weight="n_over_m"), "kl_weight must be 'm_over_n' or a .*n_over_m"),
    "infinite weight": (lambda: BetaLoss(kl_weight=float("inf")), "kl_weight must be .*finite.* got inf"),
    "weight True": (lambda: BetaLoss(kl_weight=True), "kl_weight must be .* got True"),
    "M over N of a KL": (
        lambda: BetaLoss()(torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8), torch.ones(2)),
        "needs mu and log_var.*pass a number",
    ),
}


@pytest.mark.parametrize(("build", "message"), CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_modules_say_what_was_expected(build, message):
    with pytest.raises(ValueError, match=message):
        build()

"""The training step with the network's kernels: as exact as without, and as before where they do not fit."""

from collections.abc import Callable

import pytest
import torch
from test_golden import pictures
from test_step import GAUSSIAN, Names, batch, build_step, compiled_step
from torch import Tensor, nn

from bvae.kernels import last_block as kernel
from bvae.kernels import launch
from bvae.losses import AnnealedBeta, BetaLoss, CapacityLoss, LossTerms
from bvae.model import BetaVAE
from bvae.penalties import Discriminator
from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.training import last_block
from bvae.training.step import TrainingStep

CPU = torch.device("cpu")
BF16 = torch.bfloat16
LOSSES = {
    "B": lambda: CapacityLoss(10.0, 25.0, 10, **GAUSSIAN),
    "H, summed": lambda: BetaLoss(4.0, 1.0, activation="tanh", reduction="sum", decoder_variance=0.1),
    "annealed": lambda: AnnealedBeta(4.0, 10, **GAUSSIAN),
    "learned weight": lambda: BetaLoss(nn.Parameter(torch.tensor(4.0)), **GAUSSIAN),
    "learned variance": lambda: BetaLoss(decoder_variance=nn.Parameter(torch.tensor(0.3)), **GAUSSIAN),
    "optimal variance": lambda: CapacityLoss(10.0, 25.0, 10, decoder_variance="optimal", **GAUSSIAN),
    "laplace": lambda: BetaLoss(likelihood="laplace", **GAUSSIAN),
    "logistic": lambda: BetaLoss(likelihood="logistic", decoder_scale=0.1, **GAUSSIAN),
    "bernoulli": lambda: CapacityLoss(10.0, 25.0, 10, 0.01, likelihood="bernoulli"),
}


@pytest.fixture
def used(kernels, monkeypatch) -> list[Tensor]:
    """Turn the network's kernels on; gives the inputs of the last blocks that were computed as one."""
    inputs: list[Tensor] = []
    operation = last_block.last_block

    def watched(x: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
        inputs.append(x)
        return operation(x, *args, **options)

    monkeypatch.setattr(last_block, "last_block", watched)
    monkeypatch.setattr(launch, "NETWORK", True)
    return inputs


def numbers(step: TrainingStep) -> dict[str, Tensor]:
    """What a step gives: its metrics, the gradients and the running statistics, each in one vector."""
    step(batch(4, device=step.device))
    gradients = [p.grad for module in (step.model, step.loss) for p in module.parameters()]
    groups = {
        "metrics": [step.metrics_buffer.rows[:, :-1]],
        "gradients": gradients,
        "statistics": list(step.model.buffers()),
    }
    flat = {name: [t.double().flatten().cpu() for t in group] for name, group in groups.items()}
    return {name: torch.cat(group) for name, group in flat.items() if group}


def assert_as_exact_as_without(make_step: Callable[[torch.device], TrainingStep], device, patch) -> None:
    """Compare a step in bfloat16 with the same in float64, by the error of the step without the kernels."""
    ours = numbers(make_step(device))
    patch.setattr(launch, "NETWORK", False)
    plain, exact = numbers(make_step(device)), make_step(CPU)
    exact.model.double()
    exact.dtype = None
    for name, expected in numbers(exact).items():
        error, accepted = (torch.linalg.norm(each[name] - expected) for each in (ours, plain))
        assert error <= 1.5 * accepted + 1e-6 * torch.linalg.norm(expected), name


@pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
def test_every_loss(kernels, used, monkeypatch, make_loss):
    def step(device: torch.device) -> TrainingStep:
        step = build_step(device, make_loss(), dtype=BF16)
        if step.loss.likelihood == "bernoulli":
            step.model.activation = "sigmoid"
        return step

    assert_as_exact_as_without(step, kernels, monkeypatch)
    assert len(used) == 1


def test_parts_of_a_batch_a_penalty_and_a_clipped_gradient(kernels, used, monkeypatch):
    def step(device: torch.device) -> TrainingStep:
        torch.manual_seed(0)
        penalty = Discriminator(5, 1.0, width=8, layers=2).to(device)
        optimizer = torch.optim.Adam(penalty.parameters(), 1e-3)
        parts = {"penalty": penalty, "discriminator_optimizer": optimizer}
        return build_step(device, dtype=BF16, accumulate=2, clip_grad=0.1, **parts)

    assert_as_exact_as_without(step, kernels, monkeypatch)
    assert len(used) == 2


class Own(BetaLoss):
    """A user's loss, which needs the decoder's output."""

    def forward(self, recon: Tensor, target: Tensor, kl: Tensor) -> LossTerms:
        assert recon.shape == target.shape
        return super().forward(2 * recon, target, kl)


DO_NOT_FIT = {
    "float32": {"dtype": None},
    "a loss of the user's": {"loss": lambda: Own(**GAUSSIAN)},
    "a variance per channel": {"loss": lambda: BetaLoss(decoder_variance=torch.ones(3, 1, 1), **GAUSSIAN)},
    "a learned scale": {
        "loss": lambda: BetaLoss(likelihood="logistic", decoder_scale=torch.ones(()), **GAUSSIAN)
    },
    "pixels in another range": {"loss": lambda: BetaLoss(1.0, 0.01, likelihood="bernoulli")},
    "65 channels": {"model": lambda: BetaVAE(3, 5, (65,), 32)},
    "another network": {"model": lambda: BetaVAE(3, 5, image_size=32, arch="burgess")},
}


@pytest.mark.parametrize("parts", DO_NOT_FIT.values(), ids=DO_NOT_FIT)
def test_what_does_not_fit(kernels, used, monkeypatch, parts):
    def step(device: torch.device) -> TrainingStep:
        loss = parts["loss"]() if "loss" in parts else None
        step = build_step(device, loss, dtype=parts.get("dtype", BF16))
        if "model" in parts:
            torch.manual_seed(0)
            model = parts["model"]().to(device, memory_format=torch.channels_last)
            optimizer = torch.optim.Adam(model.parameters())
            step = TrainingStep(
                model, step.loss, optimizer, seed=3, dtype=BF16, compile=False, buffer_steps=8
            )
        return step

    assert_as_exact_as_without(step, kernels, monkeypatch)
    assert used == []


def test_statistics_that_stand_still_do_not_fit(kernels, used):
    step = build_step(kernels, dtype=BF16)
    before = [buffer.clone() for buffer in step.model.buffers()]
    step.model.eval()
    step(batch(device=kernels))
    assert used == []
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.buffers(), strict=True))


@pytest.mark.usefixtures("used")
def test_all_running_statistics_move_together(kernels):
    step = build_step(kernels, dtype=BF16)
    with Names() as seen:
        step.objective(batch(device=kernels), 0, step._one)
    assert (seen.names.count("_foreach_lerp_"), seen.names.count("lerp_")) == (1, 0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_compiled_it_is_the_eager_step(kernels, used, accumulate):
    """Up to the gradient of the last weights: compiled, it is rounded to bfloat16, as that of all weights."""
    options = {"device": kernels, "dtype": BF16, "accumulate": accumulate}
    (compiled, recorder), eager = compiled_step(**options), build_step(**options)
    found, expected = numbers(compiled), numbers(eager)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-3 * value.abs().max().item())
    for graphs, suffix in (("forward", ""), ("backward", "_backward")):
        assert len(recorder.calls(graphs, getattr(torch.ops.bvae, f"last_block{suffix}").default)) >= 1
    assert len(recorder.forward) <= 2


@pytest.mark.usefixtures("used")
def test_equal_steps_have_equal_bits(kernels):
    first, second = (numbers(build_step(kernels, dtype=BF16)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_golden_runs_losses(kernels, used, monkeypatch):
    """200 steps in bfloat16 stay as near to float32 as without the kernels, and have equal bits again."""
    # few programs, whose number is the interpreter's time; the sums need one per output channel
    for name, size in {"_PLACES": 2048, "_BACKWARD_PLACES": 1024, "_COLUMNS": 128}.items():
        monkeypatch.setattr(kernel, name, size)
    images = torch.from_numpy(pictures())[:24]

    def curves(device: torch.device, dtype: torch.dtype | None, steps: int = 200) -> Tensor:
        """Loss, MSE per pixel and KL of each step."""
        torch.manual_seed(0)
        model = BetaVAE(3, 3, (4, 8), 32).to(device, memory_format=torch.channels_last)
        loss = CapacityLoss(10.0, 25.0, 100, 3 / 32**2, activation="tanh").to(device)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        step = TrainingStep(model, loss, optimizer, seed=1, dtype=dtype, compile=False, buffer_steps=200)
        data = DeviceLoader(images.to(device), 6, 1, train=True, flip=True)
        for epoch in range(steps // 4):
            step.set_lr_factor(0.9**epoch)
            for given, _ in data.epoch(epoch):
                step(given)
        return step.metrics_buffer.rows[:steps, [0, 4, 2]].double().cpu()

    ours = curves(kernels, BF16)
    assert torch.equal(curves(kernels, BF16, steps=20), ours[:20])
    assert len(used) == 220
    monkeypatch.setattr(launch, "ENABLED", False)
    plain, exact = curves(kernels, BF16), curves(CPU, None)
    assert len(used) == 220
    assert exact[-1, 1] < 0.85 * exact[0, 1]  # it learns
    for name, error, accepted in zip(
        ("loss", "mse", "kld"), (ours - exact).norm(dim=0), (plain - exact).norm(dim=0), strict=True
    ):
        assert error <= 2 * accepted, (name, error, accepted)

"""torch.export with a batch of any size, ONNX, and torch.compile's modes, around the operations."""

import pytest
import torch
from loss_inputs import decoder_output, divergence, pixels
from torch import Tensor, nn

from bvae import BetaVAE, ops

BATCH = torch.export.Dim("batch")


class Sample(nn.Module):
    def forward(self, mu: Tensor, log_var: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        return ops.reparam_kl(mu, log_var, seed=seed)


class Loss(nn.Module):
    def forward(self, recon: Tensor, target: Tensor, kl: Tensor) -> Tensor:
        return ops.vae_loss(recon, target, kl, activation="tanh").loss


def small_model() -> BetaVAE:
    return BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32).eval()


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_is_exported_for_any_batch(backend, strict):
    model, images = small_model().to(backend), torch.rand(3, 3, 32, 32, device=backend)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: BATCH},), strict=strict).module()
    for batch in (1, 2, 7):
        x = torch.rand(batch, 3, 32, 32, device=backend)
        recon, _, mu, log_var = program(x)
        assert recon.shape == x.shape
        torch.testing.assert_close((mu, log_var), model.encode(x))


def test_the_operations_are_exported_for_any_batch(backend):
    shapes = {0: BATCH}, {0: BATCH}, None
    inputs = torch.randn(3, 4, device=backend), torch.randn(3, 4, device=backend)
    seed = torch.tensor(5, device=backend)
    program = torch.export.export(Sample(), (*inputs, seed), dynamic_shapes=shapes).module()
    both = torch.randn(6, 8, device=backend).chunk(2, 1)
    torch.testing.assert_close(program(*both, seed), ops.reparam_kl(*both, seed=seed))
    arguments = [
        decoder_output(torch.float32, backend).detach(),
        pixels(backend),
        divergence(backend).detach(),
    ]
    program = torch.export.export(Loss(), tuple(arguments), dynamic_shapes=({0: BATCH},) * 3).module()
    part = [argument[:2] for argument in arguments]
    torch.testing.assert_close(program(*part), Loss()(*part))


def test_onnx_runs_the_forward_pass_for_any_batch(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = small_model()
    program = torch.onnx.export(
        model, (torch.rand(3, 3, 32, 32),), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    x = torch.rand(5, 3, 32, 32)
    recon, _, mu, log_var = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert recon.shape == x.shape
    for ours, expected in zip((mu, log_var), model.encode(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), expected.detach(), rtol=1e-5, atol=1e-5)


def test_reduce_overhead_gives_the_same_loss_and_gradient(backend):
    """On a CPU torch leaves out the graphs, and the rest of the mode runs."""

    def loss(recon: Tensor, target: Tensor, kl: Tensor) -> Tensor:
        return ops.vae_loss(recon, target, kl, activation="tanh").loss

    results = []
    for function in (loss, torch.compile(loss, mode="reduce-overhead", fullgraph=True)):
        recon = decoder_output(torch.float32, backend)
        for _ in range(3):
            value = function(recon, pixels(backend), divergence(backend))
            (gradient,) = torch.autograd.grad(value, recon)
        results.append((value.clone(), gradient.clone()))
    torch.testing.assert_close(*results)

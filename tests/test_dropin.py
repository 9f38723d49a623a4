"""The snippets of docs/drop-in.md run, and their gradients are those of the code they replace."""

import pytest
import torch
import torch.nn.functional as F
from documents import snippet
from torch import Tensor, nn

from bvae import CapacityLoss, reparam_kl
from bvae.kernels import launch, noise


def short(code: str) -> str:
    """Code of at most twelve lines besides the import: what a drop-in may take."""
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    return code


def next_noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The noise that the next call without a seed draws; torch's generator is put back."""
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    if launch.runs_triton(torch.ones(1, device=device)):
        eps = noise.normal(shape, torch.randint(2**63 - 1, (), dtype=torch.int64, device=device))
    else:
        eps = torch.randn(shape, device=device)
    (torch.set_rng_state if device.type == "cpu" else torch.cuda.set_rng_state)(state)
    return eps


class BetaVAE(nn.Module):
    """PyTorch-VAE's attributes and its objectives, by their formulas, around one layer for a network."""

    def __init__(
        self,
        latent_dim: int,
        beta: int = 4,
        gamma: float = 1000.0,
        max_capacity: int = 25,
        Capacity_max_iter: float = 1e5,
        loss_type: str = "B",
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 2 * latent_dim)
        self.beta, self.gamma, self.loss_type = beta, gamma, loss_type
        self.C_max = torch.Tensor([max_capacity])
        self.C_stop_iter = Capacity_max_iter
        self.num_iter = 0

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return next_noise(mu.shape, mu.device) * torch.exp(0.5 * logvar) + mu

    def forward(self, x: Tensor) -> list[Tensor]:
        mu, log_var = self.layer(x.flatten(1)).chunk(2, 1)
        z = self.reparameterize(mu, log_var)
        return [torch.tanh(x * z.mean(1)[:, None, None, None]), x, mu, log_var]

    def loss_function(self, *args: Tensor, **kwargs: float) -> dict[str, Tensor]:
        recons, x, mu, log_var = args
        self.num_iter += 1
        reconstruction = F.mse_loss(recons, x)
        kld = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1))
        if self.loss_type == "H":
            loss = reconstruction + self.beta * kwargs["M_N"] * kld
        else:
            limit = self.C_max.to(x)
            capacity = torch.clamp(limit / self.C_stop_iter * self.num_iter, 0, limit.item())
            loss = reconstruction + self.gamma * kwargs["M_N"] * (kld - capacity).abs()
        return {"loss": loss.squeeze(), "Reconstruction_Loss": reconstruction, "KLD": kld}


@pytest.mark.parametrize("loss_type", ["H", "B"])
def test_pytorch_vae(backend, loss_type):
    namespace = {"BetaVAE": BetaVAE}
    exec(short(snippet("pytorch-vae")), namespace)
    params = {"latent_dim": 4, "gamma": 10.0, "Capacity_max_iter": 20, "loss_type": loss_type}
    torch.manual_seed(0)
    original, ours = BetaVAE(**params).to(backend), namespace["FastBetaVAE"](**params).to(backend)
    ours.load_state_dict(original.state_dict())  # strictly
    images = torch.rand(6, 3, 4, 4, device=backend) * 2 - 1
    for _ in range(3):
        results = []
        for model in (original, ours):
            model.zero_grad()
            losses = model.loss_function(*model(images), M_N=0.05, optimizer_idx=0, batch_idx=1)
            losses["loss"].backward()
            results.append((losses, model.layer.weight.grad))
        (expected, expected_grad), (losses, grad) = results
        assert losses.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(losses[name], expected[name])
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)
    assert ("objective.step" in ours.state_dict()) == (loss_type == "B")


def test_diffusers(backend):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).to(backend)
    images = torch.rand(2, 3, 8, 8, device=backend)
    eps = next_noise((2, 4, 8, 8), backend)
    namespace = {"vae": vae, "images": images}
    exec(short(snippet("diffusers")), namespace)
    z, kl = namespace["z"], namespace["kl"]
    posterior = vae.encode(images).latent_dist
    expected_z, expected_kl = posterior.mean + posterior.std * eps.to(backend), posterior.kl()
    torch.testing.assert_close(z, expected_z)
    torch.testing.assert_close(kl, expected_kl)
    weights = list(vae.encoder.parameters())
    ours = torch.autograd.grad(z.square().sum() + kl.mean(), weights)
    expected = torch.autograd.grad(expected_z.square().sum() + expected_kl.mean(), weights)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class VAE(nn.Module):
    """PyTorch's example, in miniature."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(784, 16), nn.Linear(16, 5), nn.Linear(16, 5)
        self.fc3, self.fc4 = nn.Linear(5, 16), nn.Linear(16, 784)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu + next_noise(mu.shape, mu.device) * torch.exp(0.5 * logvar)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(self.fc1(x.view(-1, 784)))
        mu, logvar = self.fc21(h), self.fc22(h)
        z = self.reparameterize(mu, logvar)
        return torch.sigmoid(self.fc4(torch.relu(self.fc3(z)))), mu, logvar


def original_loss(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return F.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum") + kld


def assert_same_gradients(ours: Tensor, expected: Tensor, weights: list[nn.Parameter]) -> None:
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (ours, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_plain_vae(backend, monkeypatch):
    namespace: dict = {}
    exec(short(snippet("plain-vae")), namespace)
    torch.manual_seed(0)
    model, x = VAE().to(backend), torch.rand(7, 1, 28, 28, device=backend)
    recon, mu, logvar = model(x)
    expected = original_loss(recon, x, mu, logvar)
    monkeypatch.setattr(VAE, "reparameterize", namespace["reparameterize"])
    recon, mu, logvar = model(x)
    assert_same_gradients(
        namespace["loss_function"](recon, x, mu, logvar), expected, list(model.parameters())
    )


def linear_annealing(init: float, fin: float, step: int, annealing_steps: int) -> float:
    return min(init + (fin - init) * step / annealing_steps, fin) if annealing_steps else fin


class BetaHLoss:
    """disentangling-vae's, by its formulas."""

    def __init__(self, beta: float, steps_anneal: int) -> None:
        self.beta, self.steps_anneal, self.n_train_steps = beta, steps_anneal, 0

    def _pre_call(self, is_train: bool, storer: None) -> None:
        self.n_train_steps += is_train

    def __call__(
        self, data: Tensor, recon_data: Tensor, latent_dist: tuple, is_train: bool, storer: None, **_: object
    ) -> Tensor:
        self._pre_call(is_train, storer)
        mean, logvar = latent_dist
        reconstruction = F.binary_cross_entropy(recon_data, data, reduction="sum") / len(data)
        kl = (0.5 * (-1 - logvar + mean.pow(2) + logvar.exp())).mean(dim=0).sum()
        anneal = linear_annealing(0, 1, self.n_train_steps, self.steps_anneal) if is_train else 1
        return reconstruction + anneal * (self.beta * kl)


def test_disentangling_vae(backend):
    namespace = {"BetaHLoss": BetaHLoss, "linear_annealing": linear_annealing}
    exec(short(snippet("disentangling-vae")), namespace)
    torch.manual_seed(0)
    losses = BetaHLoss(4.0, 2), namespace["FastBetaHLoss"](4.0, 2)
    data = torch.rand(5, 1, 8, 8, device=backend)
    layer = nn.Linear(10, 64).to(backend)
    code = torch.randn(5, 20, device=backend, requires_grad=True)
    for is_train in (True, True, True, False):
        mean, logvar = code.chunk(2, 1)
        recon = torch.sigmoid(layer(mean)).view_as(data)
        expected, ours = (loss(data, recon, (mean, logvar), is_train, None) for loss in losses)
        assert_same_gradients(ours, expected, [code, *layer.parameters()])


def test_pythae(tmp_path):
    pytest.importorskip("pythae")
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as Original
    from pythae.models import VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    namespace = {"VAE": Original}
    exec(short(snippet("pythae")), namespace)
    config = VAEConfig(input_dim=(1, 8, 8), latent_dim=4, reconstruction_loss="mse")
    data, weights = BaseDataset(torch.rand(40, 1, 8, 8), torch.ones(40)), []
    for kind in (Original, namespace["FastVAE"]):
        torch.manual_seed(0)
        model = kind(config)
        training = BaseTrainerConfig(
            output_dir=str(tmp_path), num_epochs=2, per_device_train_batch_size=8, no_cuda=True
        )
        BaseTrainer(model, train_dataset=data, training_config=training).train()  # ten steps
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.objective = nn.Linear(48, 8), CapacityLoss(capacity_iters=20)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            mu, log_var = self.layer(batch.flatten(1)).chunk(2, 1)
            z, _ = reparam_kl(mu, log_var)
            return self.objective(batch * z.mean(), batch, mu, log_var).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    trainer = lightning.Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.rand(40, 3, 4, 4), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert int(state["objective.step"]) == 10


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    layer, objective = nn.Linear(48, 8), CapacityLoss(capacity_iters=20)
    optimizer = torch.optim.Adam(layer.parameters())
    layer, objective, optimizer = accelerator.prepare(layer, objective, optimizer)
    before = layer.weight.detach().clone()
    for _ in range(10):
        images = torch.rand(4, 3, 4, 4)
        mu, log_var = layer(images.flatten(1)).chunk(2, 1)
        accelerator.backward(objective(images * reparam_kl(mu, log_var)[0].mean(), images, mu, log_var).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert int(objective.step) == 10
    assert not torch.equal(layer.weight, before)

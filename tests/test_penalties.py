"""Objectives with a penalty: their loss by hand, the step, small batches, resume, the record of a run."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import FIT, MEASURED, NETWORK
from torch import nn

from bvae import BetaLoss, BetaVAE, config, fit, ops, reference
from bvae.config import Config, ObjectiveConfig
from bvae.errors import UsageError
from bvae.penalties import Discriminator, permuted
from bvae.pipelines import faces
from bvae.train import main
from bvae.training.setup import build_loss, build_penalty
from bvae.training.step import TrainingStep

TINY = {**FIT, "max_steps": 4, "log_every": 1, "compile": False}
LOSSES = ["TC", "Factor", "DIP-I", "DIP-II"]


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (60, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 training images: 7 steps per epoch."""
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=150, seed=0, progress=False)


def records(fitted, split="train"):
    return [record for record in fitted.history if record["split"] == split]


# ---- the objective -----------------------------------------------------------------------------------------


def resolved(**objective) -> Config:
    return Config(objective=ObjectiveConfig(**objective)).resolve(100)


def test_the_penalties_of_the_configuration():
    generator = torch.Generator().manual_seed(0)
    z, mu, log_var = torch.randn(3, 6, 4, generator=generator)

    def weighted(**objective):
        penalty = build_penalty(resolved(recon="sum", **objective), 100)
        return penalty.weight * penalty(z, mu, log_var)

    tc = ops.total_correlation(z, mu, log_var, 100)
    torch.testing.assert_close(weighted(loss_type="TC", beta=6), 5 * tc)
    dip = reference.covariance_penalty
    torch.testing.assert_close(weighted(loss_type="DIP-I", lambda_od=2), dip(mu, None, 2, 20))
    torch.testing.assert_close(weighted(loss_type="DIP-II", lambda_od=2), dip(mu, log_var, 2, 2))
    torch.testing.assert_close(weighted(loss_type="DIP-II", lambda_d=3), dip(mu, log_var, 10, 3))
    for name in ("VAE", "H", "B"):
        assert build_penalty(resolved(loss_type=name), 100) is None


@pytest.mark.parametrize("name", LOSSES)
def test_recon_and_kl_are_those_of_a_vae(name):
    loss = build_loss(resolved(loss_type=name, recon="sum", beta=7, gamma=7).objective)
    assert (loss.beta, loss.kl_weight) == (1.0, 1.0)


@pytest.mark.parametrize("recon", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_sum_of_its_parts(images, name, recon):
    fitted = fit(images, loss_type=name, recon=recon, **TINY)
    objective = fitted.config.objective
    weight = build_penalty(fitted.config, 54).weight
    for record in fitted.history:
        recon_term = record.get("recon", record["loss"])
        if record["split"] == "valid":  # the reconstruction is not in the record
            recon_term = -(record["elbo"] + record["kld"]) / (32 * 32 * 3 if recon == "mean" else 1)
        expected = recon_term + objective.kl_weight * record["kld"] + weight * record["penalty"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
        assert record["penalty"] != 0


def test_beta_one_is_the_vae(images):
    tc, vae = (fit(images, loss_type=name, beta=1, **TINY) for name in ("TC", "VAE"))
    assert [r["loss"] for r in records(tc)] == [r["loss"] for r in records(vae)]


def test_a_strong_penalty_is_obeyed(images):
    """DIP-VAE-I draws the variances of the means to 1, where the KL alone draws them to 0."""
    options = {**TINY, "max_steps": 60, "lr": 1e-2}
    fitted = fit(images, loss_type="DIP-I", lambda_od=100, recon="sum", **options)
    penalties = [record["penalty"] for record in records(fitted)]
    assert penalties[-1] < 0.5 * penalties[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_is_eager(images, name):
    options = {**TINY, "loss_type": name, "recon": "sum"}
    eager, compiled = (fit(images, **{**options, "compile": flag}) for flag in (False, True))
    for a, b in zip(records(eager), records(compiled), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["penalty"] == pytest.approx(a["penalty"], rel=1e-3, abs=1e-5)


# ---- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 8, "accumulate": 4}], ids=str)
def test_parts_of_two_images_are_refused(images, options):
    with pytest.raises(UsageError, match=r"--loss-type TC .*at least 3 of them, got 2: raise --batch-size"):
        fit(images, loss_type="TC", **{**TINY, **options})


def test_a_data_set_of_two_images_is_refused(images):
    with pytest.raises(UsageError, match="--loss-type TC .*at least 3 of them, got 2"):
        fit(images[:2], valid=images[:5], loss_type="TC", **TINY)


@pytest.mark.parametrize(("held_out", "measured"), [(10, True), (8, True), (1, False)])
def test_the_last_batch_of_a_validation_may_be_small(images, held_out, measured):
    """Of 10 images in batches of 8, two are too few for an estimate; of one image there is none."""
    fitted = fit(images, valid=images[:held_out], loss_type="TC", **TINY)
    assert (fitted.validation.penalty == fitted.validation.penalty) == measured


# ---- runs --------------------------------------------------------------------------------------------------


def train(data, out, *options):
    options = (*NETWORK, "--log-every", "1", "--no-compile", *map(str, options))
    return main(["--data-root", str(data), "--out", str(out), *options])


def assert_equal_state(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def lines(out):
    every = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in each.items() if k not in MEASURED} for each in every]


@pytest.mark.parametrize("name", LOSSES)
def test_resumes_bit_for_bit(data, tmp_path, name, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = ("--loss-type", name, "--checkpoint-every", 3, "--accumulate", 2, "--schedule", "constant")
    assert train(data, whole, *options, "--max-steps", 6) == 0
    assert train(data, part, *options, "--max-steps", 3) == 0
    assert main(["--resume", str(part), "--max-steps", "6"]) == 0
    assert lines(part) == lines(whole)
    assert all("penalty" in record for record in lines(whole))
    ends = [torch.load(next((out / "checkpoints").glob("*006.pt"))) for out in (whole, part)]
    assert_equal_state(*(end["discriminator"] for end in ends))
    assert_equal_state(*(end["discriminator_optimizer"] for end in ends))
    assert bool(ends[0]["discriminator"]) == (name == "Factor")
    assert config.read(whole / "config.yaml")[0].objective.loss_type == name


def test_debug_nan_names_the_penalty(monkeypatch, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(data, out, "--loss-type", "TC", "--max-steps", 2) == 0
    monkeypatch.setattr(ops, "total_correlation", lambda z, *_: z.sum() * torch.nan)
    assert main(["--resume", str(out), "--max-steps", "4", "--debug-nan"]) == 0
    assert "the output of the penalty is nan at step 3" in capsys.readouterr().out


def test_a_run_without_a_penalty_logs_none(images):
    assert "penalty" not in records(fit(images, loss_type="VAE", **TINY))[0]


# ---- the discriminator -------------------------------------------------------------------------------------


def small(weight=1.0) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(3, weight, width=16, layers=2)


def test_the_discriminator_is_the_papers():
    network = Discriminator(10, 1.0).network
    widths = [(m.in_features, m.out_features) for m in network if isinstance(m, nn.Linear)]
    assert widths == [(10, 1000), *5 * [(1000, 1000)], (1000, 2)]
    assert {m.negative_slope for m in network if isinstance(m, nn.LeakyReLU)} == {0.2}


def test_each_column_is_permuted_on_its_own():
    z = torch.arange(40.0).view(10, 4)
    seed, step = torch.tensor(3), torch.tensor(5)
    found = permuted(z, seed, step)
    assert torch.equal(found.sort(0).values, z)
    orders = {tuple((column // 4).int().tolist()) for column in found.T}
    assert len(orders) == 4
    assert torch.equal(found, permuted(z, seed, step))
    for other in (permuted(z, seed, step + 1), permuted(z, seed + 1, step), permuted(z, seed, step, 10)):
        assert not torch.equal(found, other)


def test_all_orders_are_as_likely():
    """24 000 columns of 3 images: each of the 6 orders some 4 000 times, with a deviation of 58."""
    z = torch.arange(3.0)[:, None].expand(3, 24_000)
    found = permuted(z, torch.tensor(1), torch.tensor(1))
    _, counts = (found * torch.tensor([[9.0], [3.0], [1.0]])).sum(0).unique(return_counts=True)
    assert len(counts) == 6
    assert (counts - 4000).abs().max() < 300


def test_each_loss_reaches_its_own_parameters():
    penalty, z = small(), torch.randn(8, 3, requires_grad=True)
    (by_z,) = torch.autograd.grad(penalty(z, z, z), z, retain_graph=True)
    assert by_z.abs().sum() > 0
    penalty(z, z, z).backward()
    assert all(p.grad is None for p in penalty.parameters())
    z.grad = None
    penalty.loss(z, torch.tensor(1), torch.tensor(1), 0).backward()
    assert z.grad is None
    assert all(p.grad.abs().sum() > 0 for p in penalty.parameters())


def test_the_cross_entropies_are_of_the_right_classes():
    penalty, z = small(), torch.randn(8, 3)
    key = torch.tensor(1), torch.tensor(2)
    joint, product = (penalty.network(each).log_softmax(1) for each in (z, permuted(z, *key)))
    expected = -0.5 * (joint[:, 0].mean() + product[:, 1].mean())
    torch.testing.assert_close(penalty.loss(z, *key, 0), expected)


def test_a_trained_discriminator_estimates_the_total_correlation():
    """Of two Gaussian latents with correlation 0.8: -log(1 - 0.64) / 2 = 0.51 nats."""
    torch.manual_seed(0)
    penalty = Discriminator(2, 1.0, width=32, layers=2)
    optimizer = torch.optim.Adam(penalty.parameters(), 3e-3)
    factor = torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    for step in range(400):
        z = torch.randn(256, 2) @ factor.T
        optimizer.zero_grad()
        penalty.loss(z, torch.tensor(0), torch.tensor(step), 0).backward()
        optimizer.step()
    z = torch.randn(4000, 2) @ factor.T
    assert penalty(z, z, z).item() == pytest.approx(0.51, abs=0.08)


def test_both_updates_use_the_gradients_before_either(images):
    """One step is the same as two optimizers' by hand."""
    step = build_step(penalty=small(2.0))
    step.discriminator_optimizer = torch.optim.SGD(step.penalty.parameters(), 0.1)
    step.optimizer = torch.optim.SGD(step.model.parameters(), 1e-3)
    model, penalty = copy.deepcopy(step.model), copy.deepcopy(step.penalty)
    step(images[:8])

    target = images[:8].permute(0, 3, 1, 2)
    mu, log_var = model.encode_scaled(model.scale(target))
    number = torch.tensor(1)
    z, kl = ops.reparam_kl(mu, log_var, seed=step.seed, step=number)
    whole = step.loss(model.decode_raw(z), target, kl).loss + 2 * penalty(z, mu, log_var)
    by_model = torch.autograd.grad(whole, list(model.parameters()), retain_graph=True)
    by_network = torch.autograd.grad(penalty.loss(z, step.seed, number, 0), list(penalty.parameters()))
    for module, gradients, rate, trained in (
        (model, by_model, 1e-3, step.model),
        (penalty, by_network, 0.1, step.penalty),
    ):
        for old, gradient, new in zip(module.parameters(), gradients, trained.parameters(), strict=True):
            torch.testing.assert_close(new, old - rate * gradient, rtol=1e-5, atol=1e-6)


def build_step(penalty) -> TrainingStep:
    torch.manual_seed(0)
    model = BetaVAE(3, 3, (4, 8), 32)
    options = {"dtype": None, "compile": False, "buffer_steps": 4, "penalty": penalty}
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    return TrainingStep(model, BetaLoss(1.0, 1.0, activation="tanh"), optimizer, seed=3, **options)


def test_a_discriminator_that_diverges_is_named(data, tmp_path, capsys):
    options = ("--loss-type", "Factor", "--discriminator-lr", "1e38", "--max-steps", 6)
    assert train(data, tmp_path / "run", *options) == 1
    said = capsys.readouterr().err
    assert re.search(r"the discriminator has diverged: its estimate is \S+ at step 2, on ", said)
    assert "A lower --discriminator-lr may help" in said


def test_a_discriminator_that_diverges_in_the_last_step_is_not_saved(data, tmp_path, capsys, monkeypatch):
    original = Discriminator.loss

    def poisoned(*args):
        loss = original(*args)
        loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss

    monkeypatch.setattr(Discriminator, "loss", poisoned)
    assert train(data, tmp_path / "run", "--loss-type", "Factor", "--max-steps", 1) == 1
    said = capsys.readouterr().err
    assert "the discriminator has diverged: network.0.weight is not finite at step 1" in said
    assert "No checkpoint was written" in said


def test_a_checkpoint_of_another_discriminator_is_refused(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(data, out, "--loss-type", "Factor", "--max-steps", 1) == 0
    path = next((out / "checkpoints").glob("*.pt"))
    for key, value, message in [
        ("discriminator", {}, "the discriminator: "),
        ("discriminator", None, "it holds no discriminator"),
        ("discriminator_optimizer", {}, "the optimizer's state is not one of torch.optim"),
    ]:
        state = torch.load(path)
        original, state[key] = state[key], value
        torch.save(state, path)
        assert main(["--resume", str(out), "--max-steps", "2"]) == 2
        assert message in capsys.readouterr().err
        state[key] = original
        torch.save(state, path)


# ---- the record --------------------------------------------------------------------------------------------

RECORD = Path(__file__).parent / "golden" / "penalties.json"


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_on_record(name):
    """Loss and penalty of six steps; write a new record with `python tests/test_penalties.py`."""
    expected = json.loads(RECORD.read_text())[name]
    for found, recorded in zip(curve(name), expected, strict=True):
        assert found == pytest.approx(recorded, rel=1e-4, abs=1e-6)


def curve(name):
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = torch.stack([(x * (i % 7) + y * (i % 5) + 40 * i) % 256 for i in range(60)]).to(torch.uint8)
    options = {**TINY, "max_steps": 6, "fused": False}
    fitted = fit(images[..., None].expand(-1, -1, -1, 3).contiguous(), loss_type=name, recon="sum", **options)
    return [[record["loss"], record["penalty"]] for record in records(fitted)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    RECORD.write_text(json.dumps({name: curve(name) for name in LOSSES}, indent=1) + "\n")

"""Objectives with a penalty: their loss by hand, the step, small batches, resume, the record of a run."""

import json

import pytest
import torch
from tiny import NETWORK

from bvae import config, fit, ops, reference
from bvae.config import Config, ObjectiveConfig
from bvae.errors import UsageError
from bvae.pipelines import faces
from bvae.train import main
from bvae.training.setup import build_loss, build_penalty

TINY = {
    "hidden_dims": (4, 8),
    "latent_dim": 3,
    "batch_size": 8,
    "max_steps": 4,
    "log_every": 1,
    "device": "cpu",
    "compile": False,
}
LOSSES = ["TC", "DIP-I", "DIP-II"]


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


def resolved(**objective) -> ObjectiveConfig:
    return Config(objective=ObjectiveConfig(**objective)).resolve(100).objective


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
    loss = build_loss(resolved(loss_type=name, recon="sum", beta=7, gamma=7))
    assert (loss.beta, loss.kl_weight) == (1.0, 1.0)


@pytest.mark.parametrize("recon", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_sum_of_its_parts(images, name, recon):
    fitted = fit(images, loss_type=name, recon=recon, **TINY)
    objective = fitted.config.objective
    weight = build_penalty(objective, 54).weight
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


def lines(out):
    every = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in each.items() if k != "images_per_s"} for each in every]


@pytest.mark.parametrize("name", LOSSES)
def test_resumes_bit_for_bit(data, tmp_path, name, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = ("--loss-type", name, "--checkpoint-every", 3, "--accumulate", 2, "--schedule", "constant")
    assert train(data, whole, *options, "--max-steps", 6) == 0
    assert train(data, part, *options, "--max-steps", 3) == 0
    assert main(["--resume", str(part), "--max-steps", "6"]) == 0
    assert lines(part) == lines(whole)
    assert all("penalty" in record for record in lines(whole))
    assert config.read(whole / "config.yaml")[0].objective.loss_type == name


def test_debug_nan_names_the_penalty(monkeypatch, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(data, out, "--loss-type", "TC", "--max-steps", 2) == 0
    monkeypatch.setattr(ops, "total_correlation", lambda z, *_: z.sum() * torch.nan)
    assert main(["--resume", str(out), "--max-steps", "4", "--debug-nan"]) == 0
    assert "the output of the penalty is nan at step 3" in capsys.readouterr().out


def test_a_run_without_a_penalty_logs_none(images):
    assert "penalty" not in records(fit(images, loss_type="VAE", **TINY))[0]

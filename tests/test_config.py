"""Configurations: ours, PyTorch-VAE's two dialects, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from bvae import config
from bvae.config import Config
from bvae.errors import UsageError

OLD_DIALECT = """
model_params: {name: BetaVAE, in_channels: 3, latent_dim: 128, loss_type: B, gamma: 10.0, max_capacity: 25,
               Capacity_max_iter: 10000}
exp_params: {dataset: celeba, data_path: /images, img_size: 64, batch_size: 144, LR: 0.0005,
             weight_decay: 0.0, scheduler_gamma: 0.95}
trainer_params: {gpus: 1, max_nb_epochs: 50, max_epochs: 50}
logging_params: {save_dir: "logs/", name: "BetaVAE_B", manual_seed: 1265}
"""
NEW_DIALECT = """
model_params: {name: 'BetaVAE', in_channels: 3, latent_dim: 64, loss_type: 'H', beta: 6.}
data_params: {data_path: "Data/", train_batch_size: 32, val_batch_size: 64, patch_size: 96, num_workers: 4}
exp_params: {LR: 5e-3, weight_decay: 0.0, scheduler_gamma: 0.9, kld_weight: 0.00025, manual_seed: 7}
trainer_params: {gpus: [1], max_epochs: 10}
logging_params: {save_dir: "logs/", name: "BetaVAE"}
"""


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return config.read(path)


def test_old_dialect(tmp_path):
    ours, unused, out, _ = read(tmp_path, OLD_DIALECT)
    assert (ours.data.name, ours.data.root, ours.data.image_size) == ("celeba", Path("/images"), 64)
    assert (ours.model.latent_dim, ours.data.channels) == (128, 3)
    objective = ours.objective
    assert (objective.loss_type, objective.gamma, objective.max_capacity) == ("B", 10.0, 25.0)
    assert objective.capacity_iters == 10_000
    assert ours.resolve(1130).objective.kl_weight == 128 / 64**2
    training = ours.training
    assert (training.batch_size, training.lr, training.lr_gamma) == (144, 5e-4, 0.95)
    assert (training.epochs, training.seed) == (50, 1265)
    assert unused == ["trainer_params.gpus"]
    assert out == Path("logs/BetaVAE_B")


def test_new_dialect(tmp_path):
    ours, unused, out, _ = read(tmp_path, NEW_DIALECT)
    assert (ours.data.name, ours.data.root, ours.data.image_size) == ("celeba", Path("Data/"), 96)
    assert (ours.objective.loss_type, ours.objective.beta, ours.objective.kl_weight) == ("H", 6.0, 0.00025)
    assert (ours.training.batch_size, ours.training.lr, ours.training.epochs) == (32, 5e-3, 10)
    assert ours.training.seed == 7
    assert set(unused) == {"data_params.val_batch_size", "data_params.num_workers", "trainer_params.gpus"}
    assert out == Path("logs/BetaVAE")


TRAINER = """
exp_params: {dataset: CelebA, batch_size: 32}
trainer_params: {max_steps: 4000, max_epochs: 9, gradient_clip_val: 0.5, accumulate_grad_batches: 2,
                 precision: 16-mixed, accelerator: gpu, devices: 4, strategy: ddp, val_check_interval: 0.5}
logging_params: {version: 3}
"""


def test_arguments_of_lightnings_trainer(tmp_path):
    ours, unused, _, device = read(tmp_path, TRAINER)
    training = ours.training
    assert (ours.data.name, training.max_steps, training.clip_grad, training.amp) == (
        "celeba",
        4000,
        0.5,
        True,
    )
    assert (training.accumulate, training.batch_size) == (2, 64)  # Lightning's 32 are of one part
    assert device == "cuda"
    assert unused == [
        "trainer_params.devices (for 4 processes start with torchrun --nproc-per-node 4)",
        "trainer_params.strategy",
        "trainer_params.val_check_interval",
        "logging_params.version",
        "trainer_params.max_epochs (max_steps decides)",
    ]


def test_lightnings_no_limit(tmp_path):
    text = "trainer_params: {max_steps: -1, max_epochs: 7, gradient_clip_val: 0, accelerator: ddp}"
    ours, unused, _, device = read(tmp_path, text)
    training = ours.training
    assert (training.max_steps, training.epochs, training.clip_grad, training.amp) == (None, 7, None, False)
    assert device is None
    assert unused == ["trainer_params.accelerator ddp", "trainer_params.max_steps -1"]


def test_all_unknown_keys_are_named_at_once(tmp_path):
    text = "exp_params: {LRR: 1, quux: 2}\ntrainer_params: {max_epoch: 3}\nwandb: {}"
    with pytest.raises(UsageError) as refused:
        read(tmp_path, text)
    assert str(refused.value).endswith(
        "unknown keys 'wandb'; 'exp_params.LRR', did you mean 'exp_params.LR'?; 'exp_params.quux'; "
        "'trainer_params.max_epoch', did you mean 'trainer_params.max_epochs'?"
    )
    with pytest.raises(UsageError, match="unknown keys 'data.sise'; 'modle', did you mean 'model'"):
        read(tmp_path, "data: {sise: 3}\nmodle: {}")


def test_no_hint_for_a_large_distance(tmp_path):
    with pytest.raises(UsageError, match="unknown key 'trainer_params.quantize'") as refused:
        read(tmp_path, "trainer_params: {quantize: 1}")
    assert "did you mean" not in str(refused.value)


def test_vanilla_vae_is_the_vae_loss(tmp_path):
    assert read(tmp_path, "model_params: {name: VanillaVAE}")[0].objective.loss_type == "VAE"


def test_yaml_round_trip(tmp_path):
    before = Config().resolve(100)
    assert read(tmp_path, before.to_yaml())[0] == before


def test_presets_can_be_read():
    presets = sorted(file.stem for file in config.PRESETS.glob("*.yaml"))
    assert "faces_cpu" in presets
    for name in presets:
        config.read(name)[0].check()


def test_a_base_gives_what_the_file_leaves_open(tmp_path):
    base = config.read("locatello_sprites")[0]
    for beta in (1, 2, 4, 6, 8, 16):
        objective = dataclasses.replace(base.objective, beta=float(beta))
        expected = dataclasses.replace(base, objective=objective)
        assert config.read(f"locatello_sprites_beta{beta}")[0] == expected
    with pytest.raises(UsageError, match="no configuration at .*nothing.yaml; presets: .*faces_cpu"):
        read(tmp_path, "base: nothing")


def test_text_that_is_a_number(tmp_path):
    ours = read(tmp_path, "training: {lr: 5e-4}\nobjective: {kl_weight: 1e-3, capacity_iters: 1e4}")[0]
    objective = ours.objective
    assert (ours.training.lr, objective.kl_weight, objective.capacity_iters) == (5e-4, 1e-3, 10_000)


def test_a_file_comes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.read("faces_cpu")[0].model.latent_dim == 10
    (tmp_path / "faces_cpu").write_text("model: {latent_dim: 77}")
    assert config.read("faces_cpu")[0].model.latent_dim == 77


@pytest.mark.parametrize(
    ("recon", "given", "weight"),
    [("mean", None, 32 / 64**2), ("sum", None, 1.0), ("sum", "m_over_n", 32 / 64**2), ("mean", 0.5, 0.5)],
)
def test_kl_weight(recon, given, weight):
    mapping = {"model": {"latent_dim": 32}, "objective": {"recon": recon, "kl_weight": given}}
    assert config.from_mapping(Config, mapping).resolve(10).objective.kl_weight == weight


def test_capacity_fits_the_run():
    training = {"epochs": 3, "max_steps": 100}
    assert config.from_mapping(Config, {"training": training}).resolve(80).objective.capacity_iters == 50
    assert Config().resolve(80).objective.capacity_iters == 50 * 80 // 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective: {gama: 3}", r"unknown key 'objective.gama', did you mean 'objective.gamma'\?"),
        ("modle: {latent_dim: 3}", r"unknown key 'modle', did you mean 'model'\?"),
        ("exp_params: {LRR: 1}", r"unknown key 'exp_params.LRR', did you mean 'exp_params.LR'\?"),
        ("model_params: {}\ntraining: {lr: 1}", "unknown key 'training'"),
        ("model_params: {name: WAE}", "WAE is not trained here"),
        ("objective: {loss_type: C}", "Undefined loss type. objective.loss_type must be"),
        ("model_params: {loss_type: C}", "Undefined loss type."),
        ("training: {lr_gamma: 1e30}", "training.lr_gamma must be at most 10, got 1e[+]30"),
        ("training: {lr: fast}", "training.lr must be float, got 'fast'"),
        ("training: {amp: 1}", "training.amp must be bool, got 1"),
        ("training: {epochs: 2.5}", "training.epochs must be int, got 2.5"),
        ("model_params: 3", "model_params must be a section of keys, got 3"),
        ("model_params: {name: [a]}", "model_params.name must be text"),
        ("logging_params: {save_dir: 3}", "logging_params.save_dir must be text"),
        ("1: 2", "unknown key '1'"),
        ("exp_params: {img_size: [64, 64]}", r"exp_params.img_size must be int, got \[64, 64\]"),
        ("exp_params: {LR: -1}", "exp_params.LR must be positive, got -1"),
        ("trainer_params: {precision: 64}", "trainer_params.precision must be one of 16, .* got 64"),
        (
            "exp_params: {manual_seed: 1}\nlogging_params: {manual_seed: 2}",
            "exp_params.manual_seed is 1 and logging_params.manual_seed is 2: remove one of them",
        ),
        ("objective: {max_capacity: 1e40}", "objective.max_capacity must be 0 or more, got 1e"),
        ("training: [1]", "training must be a section of keys"),
        ("just text", "not a YAML mapping"),
        ("a: [", "run.yaml"),
        ("training: {lr: -1}", "training.lr must be positive, got -1"),
        ("training: {lr: .nan}", "training.lr must be positive, got nan"),
        ("training: {lr: .inf}", "training.lr must be positive, got inf"),
        ("model: {latent_dim: 0}", "model.latent_dim must be positive, got 0"),
        ("model: {hidden_dims: [8, -1]}", "model.hidden_dims must be 1 to 64 positive widths"),
        ("training: {batch_size: 1}", "training.batch_size must be 2 or more"),
        ("objective: {gamma: -1}", "objective.gamma must be 0 or more"),
        ("objective: {capacity_iters: 0}", "objective.capacity_iters must be positive"),
        ("data: {image_size: 20}", "data.image_size must be 32 to 256"),
        ("data: {name: sprites}", "sprites are grey, .* --channels 1 --no-flip"),
        ("data: {name: dsprites, channels: 1, flip: false, image_size: 32}", "dsprites are grey, of 64 x 64"),
        ("data: {image_size: 100}\nmodel: {arch: burgess}", "arch burgess takes images .* got 100"),
        ("model: {arch: resnet}", "arch must be one of .*burgess.*, got 'resnet'"),
        ("training: {optimizer: sgd}", "training.optimizer must be .*, got 'sgd'"),
        ("training: {network_kernels: fast}", "network_kernels must be compiler or ours or auto, got 'fast'"),
    ],
)
def test_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)[0].check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training: {seed: 1}\nmodel: {}\ntraining: {lr: 1e-3}",
            "line 3: 'training' is given twice, first in line 1",
        ),
        ("training:\n  seed: 1\n  lr: 1e-3\n  seed: 2\n", "line 4: 'seed' is given twice, first in line 2"),
        ("model: {latent_dim: 3, latent_dim: 3}", "line 1: 'latent_dim' is given twice"),
        ("exp_params: {kld_weight: 1}\nexp_params: {LR: 1}", "line 2: 'exp_params' is given twice"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        read(tmp_path, text)


def test_a_merged_key_may_be_replaced(tmp_path):
    ours = read(
        tmp_path, "model: &m {latent_dim: 3}\nbase: faces_cpu\ntraining: {<<: {seed: 1, lr: 2}, seed: 5}"
    )[0]
    assert (ours.training.seed, ours.training.lr) == (5, 2.0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_say_what_they_are(tmp_path, encoding):
    path = tmp_path / "run.yaml"
    path.write_bytes("data: {root: /图片}  # 数据".encode(encoding))
    assert config.read(path)[0].data.root == Path("/图片")


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("gbk", "line 2 is not UTF-8: save the file as UTF-8"), ("utf-16-le", "save the file as UTF-8")],
)
def test_other_encodings_are_refused_with_the_remedy(tmp_path, encoding, message):
    path = tmp_path / "run.yaml"
    path.write_bytes("training: {seed: 1}\ndata: {root: /数据}".encode(encoding))
    with pytest.raises(UsageError, match=message) as refused:
        config.read(path)
    assert "codec" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "\t- a", "a: !!python/object:os.system {}", "a: *b", "\x01"]
)
def test_a_yaml_error_is_one_line(tmp_path, text):
    with pytest.raises(UsageError) as refused:
        read(tmp_path, text)
    assert "\n" not in str(refused.value)


def test_missing_file_names_the_presets():
    with pytest.raises(FileNotFoundError, match="presets: .*faces_cpu"):
        config.read("absent.yaml")

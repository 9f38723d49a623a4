"""The options of the commands that look at trained models. No torch: `--help` needs none."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bvae.errors import UsageError

# fmt: off
WithFactors = Literal[
    "auto", "faces", "celeba", "sprites", "dsprites", "rooms", "shapes3d", "mpi3d", "cars3d", "smallnorb"
]
# fmt: on
BINS = 20  # of the metrics, which need at least as many points


@dataclass(frozen=True, kw_only=True)
class OwnNetwork:
    """A model may have a network of the user's own."""

    module: Annotated[str | None, tyro.conf.arg(name="import")] = None
    """A Python module to import first: one that calls bvae.register_architecture."""

    def register_network(self) -> None:
        """Import that module. Raises UsageError."""
        if self.module:
            from bvae.architectures import import_module  # imports torch

            import_module(self.module)


@dataclass(frozen=True)
class Protocol:
    """The data, and the sizes for disentanglement_lib's protocols."""

    data: WithFactors = "auto"
    """The data on which the model is measured. auto: those of the run's config.yaml."""
    data_root: Path | None = None
    """Folder of the faces and their factors.csv, or of CelebA and its list_attr_celeba; or the file or folder
    of dSprites or another data set. None: the one in config.yaml, or data/faces."""
    factor_bins: int = 10
    """A factor with more values than this is divided into this many bins of equal width (faces)."""
    seeds: int = 5
    """How many times each metric draws new points: the intervals are over these seeds."""
    points: int = 10_000
    """Points for MIG, modularity, posteriors and reconstructions, and to train DCI, SAP, BetaVAE and
    FactorVAE on. These four are tested on half as many."""
    boosting: Literal["histogram", "exact"] = "histogram"
    """DCI's trees. exact: disentanglement_lib's, twenty times slower."""
    fid_weights: Path | None = None
    """Inception's weights, for FID and KID of reconstructions and samples: torch-fidelity's file
    weights-inception-2015-12-05-6726825d.pth. None: no FID. A CPU takes minutes per 1000 images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    @property
    def sizes(self) -> dict[str, Any]:
        """Points to train the metrics' classifiers on, and to test them."""
        return {"train": self.points, "test": max(1, self.points // 2)}

    @property
    def observations(self) -> int:
        """Images that BetaVAE, with two times 64 for each of its points, and FactorVAE, with 64, draw."""
        return self.seeds * sum(self.sizes.values()) * 3 * 64


@dataclass(frozen=True)
class CompareOptions(OwnNetwork):
    """Which models, and which factor of their data."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.arg(name="RUN", metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
        tyro.conf.Positional,
    ]
    """Run folders; all models see the same images."""
    factor: str
    """For sprites: shape, scale, orientation, x or y. For rooms: floor_hue, wall_hue, object_hue, scale,
    shape or orientation. For the drawn faces: azimuth, smile and more."""
    data: WithFactors = "auto"
    """The images. auto: what each run's config.yaml names."""
    data_root: Path | None = None
    """Folder or file of the images, as for bvae.evaluate. None: the one in config.yaml."""
    factor_bins: int = 10
    """A factor of more values than this is cut into as many bins of equal width (faces)."""
    points: int = 10_000
    """Images from which the table's numbers are computed."""
    steps: int = 11
    """Pictures per row, with the latent from -3 to 3."""
    out: Path = Path("compare")
    """Path of the files to write, without .png, .gif and .md."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def check(self) -> None:
        """Raise ValueError for the first value out of its range."""
        if not self.runs:
            raise UsageError("name the run folders to compare")
        if self.points < 1:
            raise UsageError(f"--points must be positive, got {self.points}")
        if self.steps < 2:
            raise UsageError(f"--steps must be at least 2, got {self.steps}")


@dataclass(frozen=True)
class TraverseOptions(OwnNetwork):
    """Which latents to change, and where to write the picture."""

    run: Annotated[Path, tyro.conf.arg(name="RUN", metavar="RUN"), tyro.conf.Positional]
    """A run folder, or any folder with model.safetensors and config.json."""
    image: Path | None = None
    """The picture to start from. None: z = 0, the mean of the prior."""
    crop: int | None = None
    """Side of the centred square that is cropped from the image, in pixels (148 if the model was trained on
    CelebA or the drawn faces). None: the largest square."""
    latents: tuple[int, ...] = ()
    """Which latents, in this order. Without it: the ten that change the picture most."""
    range: tuple[float, float] = (-3, 3)
    """First and last value of a latent, in standard deviations of the prior."""
    steps: int = 11
    """Number of pictures from the first to the last value."""
    out: Path | None = None
    """The picture to write: .png shows all steps side by side, .gif one after another, forward and backward.
    None: traverse.png in the folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def check(self, latent_dim: int) -> None:
        """Raise ValueError for the first value out of its range."""
        for latent in self.latents:
            if not 0 <= latent < latent_dim:
                raise UsageError(f"--latents must be 0 to {latent_dim - 1} for this model, got {latent}")
        if not all(map(math.isfinite, self.range)) or self.range[0] == self.range[1]:
            raise UsageError(f"--range must be two different numbers, got {self.range[0]} {self.range[1]}")
        if self.steps < 2:
            raise UsageError(f"--steps must be at least 2, got {self.steps}")
        if self.crop is not None and self.crop < 1:
            raise UsageError(f"--crop must be positive, got {self.crop}")
        if self.out and self.out.suffix.lower() not in (".png", ".gif"):
            raise UsageError(f"--out must end in .png or .gif, got {self.out}")


@dataclass(frozen=True)
class ExploreOptions(OwnNetwork):
    """Which model, or which two, and where to write the page."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.arg(name="RUN", metavar="RUN [RUN]", help_behavior_hint="(required)"),
        tyro.conf.Positional,
    ]
    """A run folder, or any folder with model.safetensors and config.json; two of them side by side."""
    out: Path | None = None
    """The page to write. None: explorer.html in the folder; for two, explorer-<second>.html in the first."""

    def check(self) -> None:
        """Raise UsageError for the first value that cannot be used."""
        if not 1 <= len(self.runs) <= 2:
            raise UsageError(f"name a run folder, or two to see them side by side, got {len(self.runs)}")
        if self.out and self.out.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--out must end in .html, got {self.out}")


@dataclass(frozen=True)
class SampleOptions(OwnNetwork):
    """Which model, how many images, and where to write them."""

    run: Annotated[Path, tyro.conf.arg(name="RUN", metavar="RUN"), tyro.conf.Positional]
    """A run folder, or any folder of a saved model."""
    n: int = 64
    """How many images."""
    seed: int = 0
    """The same seed draws the same z."""
    which: Literal["last", "best"] = "last"
    """For a run: the newest state, or the best checkpoint by validation ELBO."""
    out: Path | None = None
    """A .png file: all images in one picture. A folder: each image in a file, 00000.png and so on.
    None: samples-<n>.png in the run folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""


@dataclass(frozen=True)
class ExportOptions(OwnNetwork):
    """Which model, and what its encoder takes."""

    run: Annotated[Path, tyro.conf.arg(name="RUN", metavar="RUN"), tyro.conf.Positional]
    """A run folder, or any folder of a saved model."""
    images: Literal["uint8", "float"] = "uint8"
    """What the encoder takes: pixels of 0 to 255, or float32 in the model's range, which the files name."""
    which: Literal["last", "best"] = "last"
    """For a run: the newest state, or the best checkpoint by validation ELBO."""
    out: Path | None = None
    """Folder of the files. None: export in the run folder."""


@dataclass(frozen=True)
class SweepOptions:
    """What to train, and with how many points and seeds to measure it."""

    preset: Annotated[str | None, tyro.conf.arg(name="PRESET", metavar="[PRESET]"), tyro.conf.Positional] = (
        None
    )
    """A preset's name or a YAML file, as for --config of bvae.train."""
    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """An option of bvae.train and its values: beta=1,4. Several options are combined:
    "loss_type=H beta=1,4". Can be given several times: the sweep has the models of all grids."""
    seeds: int = 5
    """Runs of each value, with training seeds 0, 1, ..."""
    baselines: bool = False
    """Measure codes that need no training, and nothing else."""
    metric_seeds: int = 1
    """How many times each metric draws new points; the spread shown is that of the runs."""
    points: int = 10_000
    """Points that the metrics' estimators are trained on, as for bvae.evaluate."""
    out: Path | None = None
    """Folder of the sweep. None: runs/sweep-<preset>, or runs/baselines."""
    jobs: int = 1
    """How many runs at a time. They share the threads, and take the GPUs in turn."""
    cluster: Literal["slurm", "local"] | None = None
    """Submit each run as a job with submitit. local: processes of this machine, to try it."""
    cluster_parameters: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """submitit's, each as NAME=VALUE: slurm_partition=gpu, timeout_min=240, gpus_per_node=1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def check(self) -> None:
        """Raise ValueError for the first option that cannot be used."""
        if not self.baselines and (self.preset is None or not self.grid):
            raise UsageError(
                "name a preset and a grid (locatello_sprites_beta4 --grid beta=1,4), or --baselines"
            )
        if self.baselines and self.grid:
            raise UsageError(f"--baselines trains nothing: --grid {self.grid[0]} has no effect")
        if self.cluster_parameters and not self.cluster:
            raise UsageError("--cluster-parameters have no effect without --cluster")
        if self.cluster and self.jobs > 1:
            raise UsageError("--jobs has no effect with --cluster, which runs all jobs that it has room for")
        for name, least in (("seeds", 1), ("metric_seeds", 1), ("points", BINS), ("jobs", 1)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} must be at least {least}, got {getattr(self, name)}")

"""Install bvae. `kernels/` and `pipelines/` are plain folders, installed inside the package as
`bvae.kernels` and `bvae.pipelines`, so that the project never shadows other packages of those names."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "bvae/__init__.py").read_text("utf-8"), re.MULTILINE)


class EditableWheel(editable_wheel):
    """Install a source tree as one line in a .pth file: the tree's root.

    bvae/__init__.py finds `kernels/` and `pipelines/` there itself. With them in the list, setuptools would
    install an import hook, which Python asks last: a folder named bvae in the current folder, such as the
    clone seen from its parent, would come before it.
    """

    def finalize_options(self):
        packages, elsewhere = self.distribution.packages, self.distribution.package_dir
        self.distribution.packages = [name for name in packages if name not in elsewhere]
        self.distribution.package_dir = {"": "."}
        super().finalize_options()


setup(
    name="bvae",
    version=VERSION[1],
    description="A fast beta-VAE trainer with fused Triton losses",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The bvae authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["variational autoencoder", "VAE", "beta-VAE", "disentanglement", "PyTorch", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        "bvae",
        "bvae.compat",
        "bvae.evaluation",
        "bvae.explorer",
        "bvae.kernels",
        "bvae.kernels.cpu",
        "bvae.metrics",
        "bvae.pipelines",
        "bvae.training",
    ],
    package_dir={"bvae.kernels": "kernels", "bvae.kernels.cpu": "kernels/cpu", "bvae.pipelines": "pipelines"},
    package_data={
        "bvae": ["presets/*.yaml", "py.typed"],
        "bvae.explorer": ["*.css", "*.html", "*.js"],
        "bvae.kernels.cpu": ["layers.cpp"],
    },
    entry_points={"console_scripts": ["bvae = bvae.__main__:main"]},
    cmdclass={"editable_wheel": EditableWheel},
    install_requires=[  # the model, the losses and their kernels
        "torch>=2.11",  # the model, autograd and torch.compile; 2.11 is the oldest release tested
        "triton>=3.6; sys_platform == 'linux'",  # the fused kernels; goes with torch 2.11
        "numpy>=1.26",  # arrays in and out
        "safetensors>=0.4",  # weights without pickle
    ],
    extras_require={
        "train": [  # the commands, and training from Python
            "torchvision>=0.26",  # decodes JPEG, antialiased resizing; goes with torch 2.11
            "pillow>=10.1",  # reads formats other than JPEG; writes grids with labels, GIFs
            "pyyaml>=6",  # run configurations and the PyTorch-VAE dialect
            "tyro>=1.0",  # one dataclass gives the command line, its types and its help
            "tensorboard>=2.16",  # the event writer behind torch.utils.tensorboard
            "tqdm>=4.66",  # progress bars with rate and ETA
            "scikit-learn>=1.4",  # the metrics' classifiers
            "scipy>=1.11",  # ranks and intervals for the metrics; comes with scikit-learn
            "matplotlib>=3.8",  # the plot of a sweep, and those of the benchmarks
            "threadpoolctl>=3",  # one thread for trees that are too small for more; comes with scikit-learn
        ],
        "hub": ["huggingface_hub>=1.0"],  # models by name: from_pretrained("user/repo"), push_to_hub
        "export": [  # bvae.export
            "onnx>=1.18",  # the file format
            "onnxscript>=0.5",  # torch.onnx.export writes with it
            "onnxruntime>=1.22",  # runs the file, to compare it with the model
        ],
        "quality": [  # bvae.evaluate --fid-weights
            "torchmetrics>=1.9",  # FID and KID
            "torch-fidelity>=0.4",  # Inception as the published figures used it
        ],
        "wandb": ["wandb>=0.20"],  # bvae.train --log wandb; several runs in one process need 0.20
        "mlflow": [
            "mlflow>=2.14"
        ],  # bvae.train --log mlflow; asynchronous logging into a given run needs 2.14
        # NVIDIA DALI decodes JPEGs, on a GPU if there is one; without it torchvision does. Its builds install
        # the same files, so that only one of them can be there, and none is a requirement.
        "cuda13": ["nvidia-dali-cuda130>=2.0"],
        "cuda12": ["nvidia-dali-cuda120>=2.0"],
        "hdf5": ["h5py>=3.10"],  # reads 3dshapes.h5
        "cluster": ["submitit>=1.5"],  # submits the runs of a sweep to SLURM, and waits for them
        "docs": ["pdoc>=15"],  # the pages of `make docs`
        "dev": [
            "pytest>=8",  # the tests
            "pytest-xdist>=3.5",  # CI runs the tests on both of its cores
            "hypothesis>=6.100",  # hostile files and options for them, by the thousand
            "nvidia-dali-cuda130>=2.0; sys_platform == 'linux' and platform_machine == 'x86_64'",  # as above
            "h5py>=3.10",  # 3dshapes.h5
            "submitit>=1.5",  # as above: its local executor
            *("nbclient>=0.10", "ipykernel>=6.29"),  # run the notebook of examples/
            "datasets>=3",  # Hugging Face's, which `bvae.fit` takes
            "diffusers>=0.35",  # the drop-in's test compares with its posterior
            "transformers>=4.50",  # must still import beside us, and so must
            "kernels>=0.5",  # this package, whose name is our folder's
            *("huggingface_hub>=1.0", "onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"),  # hub, export
            *("torchmetrics>=1.9", "torch-fidelity>=0.4"),  # quality
            "wandb>=0.20",  # as above: its offline mode
            "scikit-image>=0.22",  # our SSIM is compared with its
            "ruff>=0.6",  # lint and format
            "mypy>=1.11",  # types of the public API
            "types-PyYAML",  # stubs for mypy
            "types-tqdm",
        ],
    },
)

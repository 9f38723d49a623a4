"""Install bvae. `kernels/` and `pipelines/` are plain folders, installed inside the package as
`bvae.kernels` and `bvae.pipelines`, so that the project never shadows other packages of those names."""

from setuptools import setup

setup(
    name="bvae",
    version="0.1.0",
    description="A fast beta-VAE trainer with fused Triton losses",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "bvae",
        "bvae.compat",
        "bvae.evaluation",
        "bvae.kernels",
        "bvae.metrics",
        "bvae.pipelines",
        "bvae.training",
    ],
    package_dir={"bvae.kernels": "kernels", "bvae.pipelines": "pipelines"},
    package_data={"bvae": ["presets/*.yaml"]},
    install_requires=[
        "torch>=2.11",  # the model, autograd and torch.compile; 2.11 is the oldest release tested
        "torchvision>=0.26",  # decodes JPEG and PNG, antialiased resizing; goes with torch 2.11
        "triton>=3.6; sys_platform == 'linux'",  # the fused kernels; goes with torch 2.11
        "numpy>=1.26",  # TensorBoard and Pillow speak it
        "pillow>=10",  # writes the pictures: grids with labels, GIFs
        "pyyaml>=6",  # run configurations and the PyTorch-VAE dialect
        "tyro>=1.0",  # one dataclass gives the command line, its types and its help
        "tensorboard>=2.16",  # the event writer behind torch.utils.tensorboard
        "safetensors>=0.4",  # weights without pickle
        "tqdm>=4.66",  # progress bars with rate and ETA
        "scikit-learn>=1.4",  # the metrics' classifiers
        "scipy>=1.11",  # ranks and intervals for the metrics; comes with scikit-learn
        "matplotlib>=3.8",  # the plot of a sweep, and those of the benchmarks
        "threadpoolctl>=3",  # one thread for trees that are too small for more; comes with scikit-learn
    ],
    extras_require={
        # NVIDIA DALI decodes JPEGs, on a GPU if there is one; without it torchvision does. Its builds install
        # the same files, so that only one of them can be there, and none is a requirement.
        "cuda13": ["nvidia-dali-cuda130>=2.0"],
        "cuda12": ["nvidia-dali-cuda120>=2.0"],
        "dev": [
            "pytest>=8",  # the tests
            "pytest-xdist>=3.5",  # CI runs the tests on both of its cores
            "hypothesis>=6.100",  # hostile files and options for them, by the thousand
            "nvidia-dali-cuda130>=2.0; sys_platform == 'linux' and platform_machine == 'x86_64'",  # as above
            "diffusers>=0.35",  # the drop-in's test compares with its posterior
            "transformers>=4.50",  # must still import beside us, and so must
            "kernels>=0.5",  # this package, whose name is our folder's
            "ruff>=0.6",  # lint and format
            "mypy>=1.11",  # types of the public API
            "types-PyYAML",  # stubs for mypy
            "types-tqdm",
        ],
    },
)

"""The tiny networks that the tests train, as options of `bvae.train` and `bvae.fit`; what a log measures."""

NETWORK = ("--image-size", "32", "--hidden-dims", "4", "8", "8", "--latent-dim", "3", "--batch-size", "16")

MEASURED = {"images_per_s", "peak_memory_gib"}  # of a log's record: differ from run to run

FIT = {  # options of `bvae.fit`
    "hidden_dims": (4, 8),
    "latent_dim": 3,
    "batch_size": 8,
    "max_steps": 6,
    "log_every": 2,
    "device": "cpu",
}

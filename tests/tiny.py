"""The tiny network that the tests train, as options of `bvae.train`; what its log measures."""

NETWORK = ("--image-size", "32", "--hidden-dims", "4", "8", "8", "--latent-dim", "3", "--batch-size", "16")

MEASURED = {"images_per_s", "peak_memory_gib"}  # of a log's record: differ from run to run

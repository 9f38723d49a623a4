"""The tiny network that the tests train, as options of `bvae.train`."""

NETWORK = ("--image-size", "32", "--hidden-dims", "4", "8", "8", "--latent-dim", "3", "--batch-size", "16")

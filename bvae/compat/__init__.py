"""PyTorch-VAE's configurations and weights, read and written."""

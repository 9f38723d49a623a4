"""Write the results of a finished run: the model, and pictures of what it learned."""

from bvae.plots import save_pictures
from bvae.training import completion, kl_plot
from bvae.training.run import Run
from bvae.training.validation import Validation


def write(run: Run, result: Validation) -> None:
    """Write model.safetensors and the pictures into the run folder, then its mark. Raises OSError."""
    assert run.out
    run.model.save_pretrained(run.out)
    first = run.valid.head(32).permute(0, 3, 1, 2)
    save_pictures(run.model, run.model.scale(first), result.kl_per_dim, run.out)
    kl_plot.save(run.out, run.model.latent_dim)
    completion.mark(run.out)


def show(run: Run, result: Validation, images_per_s: float) -> None:
    """Print the results and their folder."""
    print(f"explained variance: {result.explained_variance:.2f}")
    print(f"validation: MSE {result.mse:.4f} per pixel, KL {result.kld:.2f} nats per image")
    if images_per_s:  # a finished run that is resumed trains no more
        print(f"speed: {images_per_s:.0f} images/s in training")
    print(f"results: {run.out}/ (see traversals.gif, traversals.png, reconstructions.png, samples.png)")

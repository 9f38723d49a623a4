"""Write the results of a finished run: the model, and pictures of what it learned."""

from bvae import files
from bvae.errors import UsageError
from bvae.explorer import page
from bvae.plots import save_pictures
from bvae.training import completion, kl_plot
from bvae.training.run import Run
from bvae.training.validation import Validation


def write(run: Run, result: Validation) -> None:
    """Write model.safetensors and the pictures into the run folder, then its mark. Raises OSError."""
    assert run.out
    run.model.save_pretrained(run.out)
    held_out = run.valid.head(32)
    first = held_out.permute(0, 3, 1, 2)
    save_pictures(run.model, run.model.scale(first), result.kl_per_dim, run.out)
    kl_plot.save(run.out, run.model.latent_dim)
    shown = page.Shown(run.out.resolve().name, run.model, result.kl_per_dim)
    try:
        page.write(run.out / page.NAME, [shown], held_out)
    except UsageError as error:  # a network of one's own
        files.remove(run.out / page.NAME)  # of a shorter run
        print(f"no {page.NAME}: {error}", flush=True)
    completion.mark(run.out)


def show(run: Run, result: Validation, images_per_s: float) -> None:
    """Print the results and their folder."""
    assert run.out
    print(f"explained variance: {result.explained_variance:.2f}")
    print(f"validation: MSE {result.mse:.4f} per pixel, KL {result.kld:.2f} nats per image")
    if images_per_s:  # a finished run that is resumed trains no more
        print(f"speed: {images_per_s:.0f} images/s in training")
    pages = f"{page.NAME}, " if (run.out / page.NAME).exists() else ""
    pictures = "traversals.gif, traversals.png, reconstructions.png, samples.png"
    print(f"results: {run.out}/ (see {pages}{pictures})")

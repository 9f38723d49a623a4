"""The examples of the docstrings: they run, and every public function and class has one."""

import doctest
import importlib
import inspect

import pytest
import torch

import bvae
from bvae import metrics

PUBLIC = {f"bvae.{name}": (bvae, name) for name in bvae.__all__}
PUBLIC |= {f"bvae.metrics.{name}": (metrics, name) for name in metrics.__all__}
TYPES = {  # what functions take and return
    *("LossTerms", "DCI", "InfoMEC", "UDR", "Boosting", "Reconstruction", "Sampler"),
}
MODULES = {"bvae.ops", "bvae.losses", "bvae.model", "bvae.command_line", "bvae.explorer.layers"} | {
    getattr(module, name).__module__ for module, name in PUBLIC.values() if name != "Boosting"
}


def examples(*documented):
    """The code of docstrings' examples."""
    texts = [inspect.getdoc(each) or "" for each in documented]
    return "".join(example.source for text in texts for example in doctest.DocTestParser().get_examples(text))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_examples_run(name, capsys):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name):
    module, attribute = PUBLIC[name]
    assert attribute in TYPES or f"{attribute}(" in examples(getattr(module, attribute))


def test_the_models_methods_have_examples():
    code = examples(bvae.BetaVAE, bvae.BetaVAE.save_pretrained, bvae.BetaVAE.from_pretrained)
    for method in ("sample", "encode", "decode", "reconstruct", "save_pretrained", "from_pretrained"):
        assert f".{method}(" in code

"""What is said to be measured while a generator trains is what is measured."""

from __future__ import annotations

import numpy as np
import pytest

from diffusers_eqvae.metrics.generation import evaluate_generation, load_reference
from diffusers_eqvae.metrics.image_sets import ImageSet, extract
from diffusers_eqvae.training_utils.transformer.evaluate import GenerationEvaluation
from tests.metrics.test_generation import TinyInception, images_uint8


@pytest.mark.parametrize("genuine", [True, False])
@pytest.mark.parametrize("has_features", [True, False])
def test_figures_that_may_choose_the_best_are_those_that_have_a_direction(tmp_path, genuine, has_features):
    network = TinyInception(genuine=genuine)
    reference = load_reference(ImageSet(images_uint8(60, 1, low=10), name="reference"), network)
    if not has_features:
        reference = type(reference)(**{**vars(reference), "features": None})
    samples = extract(network, np.array_split(images_uint8(50), 3))
    figures = evaluate_generation(samples, reference, network).figures
    evaluation = GenerationEvaluation.__new__(GenerationEvaluation)
    evaluation.references = {network: reference}
    assert evaluation.measured == {name: figure.better for name, figure in figures.items() if figure.better}

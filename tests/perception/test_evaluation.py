"""Results of a task as a result card takes them."""

from __future__ import annotations

import math

from diffusers_eqvae.perception.evaluation import split_results


def test_a_value_that_is_not_finite_is_a_mark():
    measured = {"head": {"mean_iou": math.nan, "accuracy": 0.5, "iou": [None, None]}}
    assert split_results(measured) == ({"accuracy_head": 0.5}, {"mean_iou_head": "nan for these images"})

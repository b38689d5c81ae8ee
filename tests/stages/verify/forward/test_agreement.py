"""Figures of two models' logits."""

from __future__ import annotations

import math

import pytest
import torch

from stages.verify.forward.agreement import agreement


def test_the_same_logits_agree() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    figures = agreement(logits, logits)
    assert figures == {"top1_agreement": 1, "max_abs": 0, "max_relative": 0, "kl_mean": 0, "kl_max": 0}


def test_figures_are_those_of_the_definitions() -> None:
    ours, theirs = torch.tensor([[0.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, math.log(3)], [0.0, 4.0]])
    figures = agreement(ours, theirs)
    # 1/4 and 3/4 against 1/2 each; where both are the same, nothing. Of equal logits the first counts as the greatest.
    divergence = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert figures["kl_max"] == pytest.approx(divergence, rel=1e-6)
    assert figures["kl_mean"] == pytest.approx(divergence / 2, rel=1e-6)
    assert figures["top1_agreement"] == 0.5
    assert figures["max_abs"] == pytest.approx(math.log(3))
    assert figures["max_relative"] == pytest.approx(math.log(3) / 4)

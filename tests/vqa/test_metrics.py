"""Metrics against closed forms: exact answers, answers off by a known amount, and answers that do not parse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spear_lightning.batches import TrueAnswer, VqaBatch
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, Quantizer
from spear_lightning.vqa.metrics import MEASURES, AnswerMetrics, CoordinateAccuracy, TaskLosses

TOKENS = CoordinateTokens(Quantizer.uniform(-2, 2), "metric")
HALF_BIN = 2 / 1024
BOX = "spear_lightning.vqa.object_tasks.BoxVertices"
DISTANCE = "spear_lightning.vqa.object_tasks.Distance"
CLOSER = "spear_lightning.vqa.object_tasks.Closer"


def cube(x: float) -> np.ndarray:
    corners = np.array([[k & 1, k >> 1 & 1, k >> 2 & 1] for k in range(8)], np.float64) - 0.5
    return corners + np.array([x, 0, 1])


def measured(texts: list[str], asked: list[list[TrueAnswer]]) -> dict[str, float]:
    metrics = AnswerMetrics(TOKENS)
    metrics.update(texts, asked, 98, 140)
    return {name: float(value) for name, value in metrics.compute().items()}


def test_boxes_shifted_by_half_a_side_overlap_by_a_third() -> None:
    truth = [[TrueAnswer(BOX, cube(0.0))], [TrueAnswer(BOX, cube(0.0))]]
    found = measured([TOKENS.text(cube(0.5)), TOKENS.text(cube(0.0))], truth)
    assert found["parse_rate"] == 1
    assert found["centre_error"] == pytest.approx(0.25, abs=2 * HALF_BIN)
    assert found["vertex_error"] == pytest.approx(0.25, abs=2 * HALF_BIN)
    assert found["iou"] == pytest.approx((1 / 3 + 1) / 2, abs=0.01)
    assert (found["iou_at_0.25"], found["iou_at_0.5"]) == (1, 0.5)


def test_answers_that_do_not_parse_count_against_shares_and_not_into_errors() -> None:
    truth = [[TrueAnswer(BOX, cube(0.0))]] * 2 + [[TrueAnswer(DISTANCE, np.array([1.0]))]]
    found = measured([TOKENS.text(cube(0.0)), "a box", TOKENS.text(np.array([1.5]))], truth)
    assert found["parse_rate"] == pytest.approx(2 / 3)
    assert (found["iou_at_0.25"], found["iou_at_0.5"]) == (0.5, 0.5)
    assert found["vertex_error"] < 2 * HALF_BIN
    assert found["relative_distance_error"] == pytest.approx(0.5, abs=2 * HALF_BIN)
    assert set(found) <= {"parse_rate", *MEASURES}


def test_several_answers_of_one_text_and_choices() -> None:
    asked = [[TrueAnswer(DISTANCE, np.array([0.5])), TrueAnswer(CLOSER, np.array([0.5, 1.0]), "mug")]]
    closer = "the mug is at {}, the cup is at {}, so the {} is closer"
    near, far = TOKENS.text(np.array([0.5])), TOKENS.text(np.array([1.0]))
    right = measured([near + "\n" + closer.format(near, far, "mug")], asked)
    assert right["choice_accuracy"] == 1
    wrong = measured([near + "\n" + closer.format(near, far, "cup")], asked)
    assert wrong["choice_accuracy"] == 0
    assert wrong["parse_rate"] == 1
    assert measured([near], asked) == {"parse_rate": 0, "choice_accuracy": 0}


def test_two_halves_merge_to_the_whole() -> None:
    asked = [[TrueAnswer(DISTANCE, np.array([value]))] for value in (0.5, 1.0, 1.5)]
    texts = [TOKENS.text(np.array([1.0]))] * 3
    whole, first, second = (AnswerMetrics(TOKENS) for _ in range(3))
    whole.update(texts, asked, 98, 140)
    first.update(texts[:1], asked[:1], 98, 140)
    second.update(texts[1:], asked[1:], 98, 140)
    first.merge_state(second)
    assert first.compute() == whole.compute()


def test_coordinate_accuracy_looks_at_3d_tokens_alone() -> None:
    accuracy = CoordinateAccuracy()
    predicted, target = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 0, 0]])
    accuracy.update(predicted, target, torch.tensor([[False, True, True, False]]))
    accuracy.update(predicted, predicted, torch.tensor([[False, False, True, True]]))
    assert float(accuracy.compute()) == 0.75


def test_losses_of_the_tokens_of_each_task() -> None:
    # Two answers of two tokens and of one, with a line break (13) between; then one of one token. 1 ends both.
    ids = torch.tensor([[2, 50, 13, 60, 61, 13, 62, 1], [2, 50, 13, 63, 1, 0, 0, 0]])
    answer_mask = torch.tensor([[False] * 3 + [True] * 5, [False] * 3 + [True] * 2 + [False] * 3])
    asked = [[TrueAnswer(BOX, cube(0)), TrueAnswer(DISTANCE, np.ones(1))], [TrueAnswer(BOX, cube(0))]]
    nothing = torch.zeros(2)
    batch = VqaBatch(
        images={},
        image_mask={},
        input_ids=ids,
        token_mask=ids != 0,
        answer_mask=answer_mask,
        answer_places=answer_mask.flatten().nonzero()[:, 0],
        coordinate_mask=answer_mask,
        questions=[""] * 2,
        answers=[""] * 2,
        asked=asked,
        clamped=nothing,
        unit=nothing,
        metric=nothing,
        intrinsics=nothing,
        dataset=nothing,
        position=nothing,
    )
    losses = TaskLosses([DISTANCE, BOX, CLOSER])
    losses.update(torch.tensor([1.0, 2, 3, 10, 20, 5, 7]), batch, 13)
    assert losses.compute() == {"BoxVertices": (1 + 2 + 3 + 5 + 7) / 5, "Distance": 15}

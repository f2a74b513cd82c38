"""Label -> question and answer -> tokens -> parsed label: within half a bin for every task; all else refused."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.geometry import quaternions
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.geometry.oriented_boxes import OrientedBox
from spear_lightning.labeling.records import ImageLabel, ObjectLabel
from spear_lightning.models.prompt import PromptTokenizer
from spear_lightning.vqa.back_projection import BackProjection
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, Quantizer
from spear_lightning.vqa.location_tokens import location_text, locations
from spear_lightning.vqa.mixture import TaskMixture, load_task, read_answers
from spear_lightning.vqa.naming import ObjectAtPoint, ObjectOrder
from spear_lightning.vqa.object_tasks import BoxVertices, Closer, Distance, KeyPoints, RandomPixels, Relation
from spear_lightning.vqa.task import Answer, QuestionAnswer, Scene, Task, clean_name

WIDTH, HEIGHT = 280, 210
CAMERA = PixelIntrinsics(300.0, 300.0, 140.0, 105.0, width=WIDTH, height=HEIGHT)
NAMES = ("red mug", "Green Bowl", "knife, sharp", "café cup", "box 2")


def random_labels(count: int, seed: int) -> list[ImageLabel]:
    """Labels with made-up boxes, mostly inside the image; made all at once, for speed."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, len(NAMES))
    depth = 0.3 + torch.rand((*size, 1), generator=generator, dtype=torch.float64)
    pixels = torch.rand((*size, 2), generator=generator, dtype=torch.float64) * torch.tensor([200, 150]) + 35
    centre = CAMERA.unproject(pixels, depth[..., 0])
    rotation = quaternions.random_unit(size, generator, dtype=torch.float64)
    extents = 0.02 + 0.1 * torch.rand((*size, 3), generator=generator, dtype=torch.float64)
    box = OrientedBox(centre, rotation, extents).canonical()
    parts = [part.to(torch.float32).numpy() for part in (box.centre, box.quaternion, box.extents, box.vertices())]
    distance = torch.linalg.vector_norm(centre, dim=-1).numpy()
    points = centre.to(torch.float32).numpy()
    labels = []
    for row in range(count):
        objects = []
        for column, name in enumerate(NAMES):
            own = [part[row, column] for part in parts]
            ends = own[3][[0, 7]]
            objects.append(
                ObjectLabel(
                    name,
                    np.zeros(4, np.float32),
                    np.zeros(0, np.int64),
                    *own,
                    *ends,
                    float(distance[row, column]),
                    9,
                )
            )
        labels.append(
            ImageLabel(
                f"{seed}-{row}",
                WIDTH,
                HEIGHT,
                "made up",
                "scale_free",
                float(depth[row].median()),
                tuple(objects),
                CAMERA,
                pixels[row].to(torch.float32).numpy(),
                points[row],
            )
        )
    return labels


TOKENS = CoordinateTokens.fit(random_labels(300, 99))
TASKS: list[Task] = [
    KeyPoints(),
    BoxVertices(),
    Relation(),
    Distance(),
    Closer(),
    BackProjection(),
    RandomPixels(),
]


def half_bins(values: np.ndarray) -> np.ndarray:
    return TOKENS.quantizer.half_width(TOKENS.quantizer.encode(values))


def assert_recovered(task: Task, found: Answer | None, truth: Answer) -> None:
    assert found is not None
    assert found.values.shape == truth.values.shape
    assert found.choice == truth.choice
    error = np.abs(found.values - truth.values)
    if isinstance(task, BackProjection):
        assert (error <= np.array([WIDTH, HEIGHT]) / 2048 + 1e-9).all()
        return
    inside = ~TOKENS.quantizer.outside(truth.values)
    assert (error[inside] <= half_bins(truth.values)[inside] * (1 + 1e-9)).all()
    # What lies outside became the outermost token, which is the nearest there is.
    ends = TOKENS.quantizer.decode(np.array([0, len(TOKENS.quantizer) - 1]))
    assert np.isin(found.values[~inside], ends).all()


def ask(task: Task, label: ImageLabel, rng: np.random.Generator) -> QuestionAnswer | None:
    scene = Scene(label, TOKENS)
    items = [item for item in scene.nameable() if task.suits(scene, item)][: task.objects]
    return task.ask(scene, items, rng) if len(items) == task.objects else None


@pytest.mark.slow
def test_ten_thousand_labels_come_back_within_half_a_bin_through_token_ids() -> None:
    prompt = PromptTokenizer()
    prompt.add_tokens([f"<3d_{index:04d}>" for index in range(1024)])
    rng = np.random.default_rng(0)
    labels = random_labels(10_000, 0)
    asked = dict.fromkeys(range(len(TASKS)), 0)
    for number, label in enumerate(labels):
        which = number % len(TASKS)
        task = TASKS[which]
        pair = ask(task, label, rng)
        if pair is None:
            continue
        asked[which] += 1
        ids = prompt.vocabulary.encode([pair.answer])[0]
        text = prompt.vocabulary.decode(ids)
        assert_recovered(task, task.parse(text, TOKENS, HEIGHT, WIDTH), pair.truth)
        # Coordinates are one token each.
        assert sum(number >= 259 for number in ids) == pair.answer.count("<3d_")
    assert min(asked.values()) > 500


@given(st.integers(0, 2**32 - 1))
def test_truth_is_the_label_s(seed: int) -> None:
    (label,) = random_labels(1, seed)
    rng = np.random.default_rng(seed)
    first, second = label.objects[:2]
    unit = label.median_depth
    found = {type(task): ask(task, label, rng) for task in TASKS}

    def truth(kind: type[Task]) -> np.ndarray:
        pair = found[kind]
        assert pair is not None
        return pair.truth.values

    np.testing.assert_allclose(truth(BoxVertices) * unit, first.box.vertices().numpy(), atol=1e-6)
    np.testing.assert_allclose(truth(Relation) * unit, second.centre - first.centre, atol=1e-6)
    np.testing.assert_allclose(truth(Distance) * unit, np.linalg.norm(first.centre), atol=1e-6)
    np.testing.assert_allclose(truth(KeyPoints)[2] * unit, first.centre, atol=1e-6)
    pair = found[BackProjection]
    if pair is not None:
        shown = next(item for item in label.objects if clean_name(item.name) in pair.question)
        vertices = torch.from_numpy(shown.vertices).double()
        np.testing.assert_allclose(pair.truth.values, CAMERA.project(vertices).numpy(), atol=1e-6)
    pixels = found[RandomPixels]
    assert pixels is not None
    positions = locations(pixels.question.split("pixels ")[-1].split("at ")[-1].strip("?."), HEIGHT, WIDTH)
    assert positions is not None
    seen = CAMERA.project(torch.from_numpy(pixels.truth.values)).numpy()
    np.testing.assert_allclose(positions, seen, atol=0.2)
    closer = found[Closer]
    if closer is not None:
        nearer = min((first, second), key=lambda item: float(np.linalg.norm(item.centre)))
        assert closer.truth.choice == clean_name(nearer.name)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_answers_that_are_not_exactly_right_do_not_parse(task: Task) -> None:
    rng = np.random.default_rng(0)
    pair = next(pair for label in random_labels(40, 5) if (pair := ask(task, label, rng)) is not None)
    good = pair.answer
    assert_recovered(task, task.parse(f" {good} ", TOKENS, HEIGHT, WIDTH), pair.truth)
    token = "<loc0001>" if isinstance(task, BackProjection) else "<3d_0001>"
    other = "<3d_0001>" if isinstance(task, BackProjection) else "<loc0001>"
    last = good.rfind("<")
    end = good.index(">", last) + 1
    wrong = {
        "nothing": "",
        "one token too many": good[:end] + token + good[end:],
        "one too few": good[:last] + good[end:],
        "a foreign token": good[:last] + other + good[end:],
        "cut off inside a token": good[: end - 1],
        "a number that is no token": good.replace("0", "x"),
        "a sentence after it": good + " i think",
        "twice": good + good,
        "an index that does not exist": good[:last]
        + ("<loc1024>" if "<loc" in token else "<3d_1024>")
        + good[end:],
    }
    for case, text in wrong.items():
        assert task.parse(text, TOKENS, HEIGHT, WIDTH) is None, case


def test_a_conclusion_about_a_third_object_does_not_parse_and_a_wrong_one_is_read_as_it_is() -> None:
    task = Closer()
    text = "the mug is at <3d_0001>, the cup is at <3d_0900>, so the {} is closer"
    for name in ("mug", "cup"):
        found = task.parse(text.format(name), TOKENS, HEIGHT, WIDTH)
        assert found is not None
        assert found.choice == name
    assert task.parse(text.format("spoon"), TOKENS, HEIGHT, WIDTH) is None
    truth = Answer(TOKENS.quantizer.decode(np.array([1, 900])), "mug")
    found = task.parse(text.format("cup"), TOKENS, HEIGHT, WIDTH)
    assert found is not None
    assert task.errors(found, truth)["choice_accuracy"] == 0


def test_objects_of_equal_distance_are_not_compared() -> None:
    (label,) = random_labels(1, 0)
    same = replace(
        label, objects=(label.objects[0], replace(label.objects[1], distance=label.objects[0].distance))
    )
    assert ask(Closer(), same, np.random.default_rng(0)) is None


def test_back_projection_needs_all_vertices_in_the_image_and_a_camera() -> None:
    labels = random_labels(300, 3)
    task = BackProjection()
    for label in labels:
        scene = Scene(label, TOKENS)
        for item in label.objects:
            pixels = CAMERA.project(torch.from_numpy(item.vertices).double()).numpy()
            inside = bool(((pixels >= 0) & (pixels <= [WIDTH, HEIGHT])).all())
            assert task.suits(scene, item) == inside
        assert not any(task.suits(Scene(replace(label, intrinsics=None), TOKENS), item) for item in label.objects)


def test_locations_are_paligemma_s_y_first() -> None:
    pixels = np.array([[279.9, 0.0], [140.0, 105.0], [280.0, 210.0]])
    text = location_text(pixels, 210, 280)
    assert text == "<loc0000><loc1023><loc0512><loc0512><loc1023><loc1023>"
    found = locations(text, 210, 280)
    assert found is not None
    assert (np.abs(found - pixels) <= np.array([280, 210]) / 2048 + 1e-9).all()
    with pytest.raises(DataError, match="outside the image"):
        location_text(np.array([[-1.0, 5.0]]), 210, 280)
    assert locations("<loc0001>", 210, 280) is None


def test_names_that_occur_twice_or_are_empty_are_not_asked_about() -> None:
    (label,) = random_labels(1, 1)
    names = ["cup", "Cup.", "mug", " .. ", "plate <loc0001>"]
    objects = tuple(replace(item, name=name) for item, name in zip(label.objects, names, strict=True))
    scene = Scene(replace(label, objects=objects), TOKENS)
    assert [item.name for item in scene.nameable()] == ["mug", "plate <loc0001>"]
    assert clean_name("plate <loc0001>") == "plate loc0001"


def test_examples_are_about_different_objects_and_read_back_in_order(all_tasks: dict[str, float]) -> None:
    mixture = TaskMixture(all_tasks)
    rng = np.random.default_rng(0)
    sizes = set()
    for label in random_labels(300, 7):
        scene = Scene(label, TOKENS)
        (plan,) = mixture.plan(1, rng)
        example = mixture.ask(scene, plan.tolist(), rng)
        named = [sum(clean_name(name) in pair.question for pair in example.pairs) for name in NAMES]
        assert max(named) <= 1
        assert sum(named) == sum(pair.task.objects for pair in example.pairs)
        sizes.add(len(example.pairs))
        found = read_answers(example.answer, [pair.task for pair in example.pairs], TOKENS, HEIGHT, WIDTH)
        for pair, answer in zip(example.pairs, found, strict=True):
            assert_recovered(pair.task, answer, pair.truth)
        if len(found) > 1:
            missing = "\n".join(example.answer.split("\n")[1:])
            assert read_answers(missing, [pair.task for pair in example.pairs], TOKENS, HEIGHT, WIDTH) == [
                None
            ] * len(found)
    assert sizes == {1, 2, 3, 4}


def test_tasks_are_drawn_as_numpy_draws(all_tasks: dict[str, float]) -> None:
    mixture = TaskMixture(all_tasks, max_pairs=3)
    rng = np.random.default_rng(5)
    weights = np.array(list(all_tasks.values()))
    drawn = rng.choice(len(weights), (1000, 3), p=weights / weights.sum())
    pairs = rng.integers(1, 4, 1000)
    plans = mixture.plan(1000, np.random.default_rng(5))
    assert [plan[plan >= 0].tolist() for plan in plans] == [
        row[:count].tolist() for row, count in zip(drawn, pairs, strict=True)
    ]


def test_plans_follow_the_weights() -> None:
    weights = {BoxVertices.path(): 3.0, Distance.path(): 1.0}
    mixture = TaskMixture(weights)
    plans = mixture.plan(20_000, np.random.default_rng(0))
    counts = (plans >= 0).sum(1)
    np.testing.assert_allclose(np.bincount(counts)[1:] / 20_000, 0.25, atol=0.015)
    assert (plans == 0).sum() / (plans >= 0).sum() == pytest.approx(0.75, abs=0.01)
    # All -1 come last.
    assert all((b >= 0) <= (a >= 0) for row in plans[:50] for a, b in pairwise(row))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "positive weights"),
        ({"spear_lightning.vqa.object_tasks.Distance": 0.0}, "positive weights"),
        ({"spear_lightning.vqa.object_tasks.Nothing": 1.0}, "no such task"),
        ({"nowhere": 1.0}, "no such task"),
        ({"spear_lightning.vqa.task.Scene": 1.0}, "not a task"),
    ],
)
def test_wrong_mixtures_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskMixture(weights)


def test_every_task_has_several_wordings_and_its_path() -> None:
    for task in TASKS:
        assert len(set(task.templates)) >= 3
        assert type(load_task(task.path())) is type(task)
        quantizer = Quantizer.uniform(-1, 1)
        assert task.parse("", CoordinateTokens(quantizer), HEIGHT, WIDTH) is None


def test_names_come_in_the_order_in_which_objects_are_seen() -> None:
    task, rng = ObjectOrder(), np.random.default_rng(0)
    (label,) = random_labels(1, 3)
    boxes = [np.array([left, 0, left + 20, 10], np.float32) for left in (150, 20, 90, 240, 60)]
    objects = [
        replace(item, box_2d=box, distance=distance)
        for item, box, distance in zip(label.objects, boxes, (0.5, 0.9, 0.7, 0.4, 0.8), strict=True)
    ]
    across = "the green bowl, the box 2, the knife sharp, the red mug, the café cup"
    away = "the café cup, the red mug, the knife sharp, the box 2, the green bowl"
    asked = set()
    for _ in range(30):
        pair = task.ask(Scene(replace(label, objects=tuple(objects)), TOKENS), [], rng)
        assert pair is not None
        asked.add(pair.question)
        assert pair.answer == (across if "left" in pair.question else away)
        found = task.parse(pair.answer, TOKENS, HEIGHT, WIDTH)
        assert found is not None
        assert task.errors(found, pair.truth) == {"naming_accuracy": 1.0}
    assert asked == set(task.templates)


def test_the_name_asked_for_at_a_point_is_that_of_the_object_there() -> None:
    task, rng = ObjectAtPoint(), np.random.default_rng(0)
    (label,) = random_labels(1, 3)
    scene = Scene(label, TOKENS)
    assert len({item.name for item in label.objects}) > 1
    for item in label.objects:
        pair = task.ask(scene, [item], rng)
        assert pair is not None
        (point,) = (TOKENS.values(found) for found in re.findall(r"(?:<3d_\d{4}>)+", pair.question))
        away = [np.linalg.norm(other.centre / scene.unit - point) for other in label.objects]
        there = label.objects[int(np.argmin(away))]
        found = task.parse(pair.answer, TOKENS, HEIGHT, WIDTH)
        assert found is not None
        assert found.choice == pair.truth.choice == f"the {clean_name(there.name)}"
        assert task.errors(found, pair.truth) == {"naming_accuracy": 1.0}
    for text in ("spoon", "the mug, the cup", ""):
        assert task.parse(text, TOKENS, HEIGHT, WIDTH) is None
    wrong = task.parse("the spoon", TOKENS, HEIGHT, WIDTH)
    assert wrong is not None
    assert task.errors(wrong, Answer(np.zeros(0), "the mug")) == {"naming_accuracy": 0.0}


def test_lists_that_are_wrong_or_too_long_or_unclear_score_less_or_are_not_asked() -> None:
    task = ObjectOrder()
    truth = Answer(np.zeros(0), "the mug, the cup, the bowl")
    for text, share in (("the mug, the bowl, the cup", 1 / 3), ("the mug, the cup", 2 / 3), ("the plate", 0.0)):
        found = task.parse(text, TOKENS, HEIGHT, WIDTH)
        assert found is not None
        assert task.errors(found, truth) == {"naming_accuracy": pytest.approx(share)}
    for text in ("", "mug", "the mug,", ", the mug", "the mug is <3d_0001>", "a mug. a cup"):
        assert task.parse(text, TOKENS, HEIGHT, WIDTH) is None
    (label,) = random_labels(1, 3)
    rng = np.random.default_rng(0)
    same = tuple(replace(item, distance=0.5) for item in label.objects)
    many = tuple(replace(label.objects[0], name=f"mug {number}") for number in range(9))
    for objects in (same, many, ()):
        scene = Scene(replace(label, objects=objects), TOKENS)
        assert all(task.ask(scene, [], rng) is None for _ in range(10))

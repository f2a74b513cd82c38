"""Batches of questions: layout, determinism, resumption, bucketing by length, and what is counted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spear_lightning.batches import TrueAnswer, VqaBatch
from spear_lightning.errors import CheckpointError, ConfigError, DataError
from spear_lightning.labeling.demo_labels import write_demo_labels
from spear_lightning.labeling.store import LabelStore
from spear_lightning.models.prompt import PromptTokenizer
from spear_lightning.robot_data.dataset import EvenSamples
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.mixture import SampleStream
from spear_lightning.vqa.augment import ViewRecipe
from spear_lightning.vqa.constant_mean import ConstantMean
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, Quantizer
from spear_lightning.vqa.dataset import VqaDataset
from spear_lightning.vqa.labelled_images import AvailableObjects, LabelledImages, LabelMixture, split_labels
from spear_lightning.vqa.loader import FiniteVqaLoader, ResumableVqaLoader
from spear_lightning.vqa.mixture import TaskMixture, load_task, read_answers
from spear_lightning.vqa.question_data import (
    fingerprint,
    measure_lengths,
    training_answers,
    training_dataset,
    validation_dataset,
)
from spear_lightning.vqa.question_stream import QuestionStream
from spear_lightning.vqa.task import Scene
from spear_lightning.vqa.text_layout import MULTIPLE, TextLayout

CAMERA = CameraSpec(140, 98)
BATCH = 4


def make_dataset(
    store: LabelStore,
    tokens: CoordinateTokens,
    tasks: dict[str, float],
    window_batches: int = 4,
    global_batch: int = BATCH,
    **changes: Any,
) -> VqaDataset:
    prompt = PromptTokenizer()
    prompt.add_tokens([f"<3d_{index:04d}>" for index in range(len(tokens.quantizer))])
    mixture = TaskMixture(tasks)
    whole = LabelledImages(store, np.arange(len(store)))
    stream = SampleStream([len(whole)], np.ones(1), seed=3)
    layout = TextLayout(prompt.vocabulary, len(tokens.quantizer), max_length=900)
    lengths = measure_lengths(mixture, (Scene(store[index], tokens) for index in range(20)), layout)
    available = AvailableObjects([whole], stream)
    values: dict[str, Any] = {
        "sources": [whole],
        "finder": stream,
        "questions": QuestionStream(mixture, global_batch, 3, window_batches, lengths, available),
        "mixture": mixture,
        "tokens": tokens,
        "layout": layout,
        "camera": CAMERA,
        "views": ViewRecipe(),
        "seed": 3,
    }
    return VqaDataset(**{**values, **changes})


def assert_equal(found: VqaBatch, expected: VqaBatch) -> None:
    for name in ("input_ids", "answer_mask", "coordinate_mask", "token_mask", "position", "intrinsics", "unit"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.images["primary"], expected.images["primary"])
    assert found.answers == expected.answers


def test_batches_are_laid_out_as_documented(
    demo_store: LabelStore, tokens: CoordinateTokens, all_tasks: dict[str, float]
) -> None:
    dataset = make_dataset(demo_store, tokens, all_tasks)
    batch = dataset.__getitems__(list(range(16)))
    prompt = PromptTokenizer()
    prompt.add_tokens([f"<3d_{index:04d}>" for index in range(1024)])
    assert batch.images["primary"].shape == (16, 3, 98, 140)
    assert batch.images["primary"].dtype == torch.uint8
    assert batch.image_mask["primary"].all()
    assert batch.input_ids.shape[1] % MULTIPLE == 0
    assert batch.metric.all()
    for row in range(len(batch)):
        ids = batch.input_ids[row]
        question = ids[batch.token_mask[row] & ~batch.answer_mask[row]].tolist()
        answer = ids[batch.answer_mask[row]].tolist()
        assert question[0] == 2
        assert prompt.vocabulary.decode(question) == batch.questions[row] + "\n"
        assert answer[-1] == 1
        assert prompt.vocabulary.decode(answer) == batch.answers[row]
        assert int(batch.coordinate_mask[row].sum()) == batch.answers[row].count("<3d_")
        assert (ids[batch.coordinate_mask[row]] >= 259).all()
        assert (ids[~batch.token_mask[row]] == 0).all()
        tasks = [load_task(item.task) for item in batch.asked[row]]
        assert 1 <= len(tasks) <= 4
        found = read_answers(batch.answers[row], tasks, tokens, 98, 140)
        for item, parsed in zip(batch.asked[row], found, strict=True):
            assert parsed is not None
            assert parsed.choice == item.choice
            assert parsed.values.shape == item.values.shape
    labels = batch.labels
    assert ((labels == -100) == ~batch.answer_mask).all()
    assert torch.equal(labels[batch.answer_mask], batch.input_ids[batch.answer_mask])
    prompts, mask = batch.prompts()
    assert torch.equal(prompts[mask], batch.input_ids[batch.token_mask & ~batch.answer_mask])
    assert int(mask.sum()) == int((batch.token_mask & ~batch.answer_mask).sum())
    assert mask[:, -1].any()


def test_the_numbers_belong_to_the_pixels(demo_store: LabelStore, tokens: CoordinateTokens) -> None:
    # Centres of boxes, read from the tokens and projected with the batch's camera, fall on pixels of their colour.
    dataset = make_dataset(demo_store, tokens, {"spear_lightning.vqa.object_tasks.BoxVertices": 1.0})
    hits, total = 0, 0
    for start in range(0, 48, 16):
        batch = dataset.__getitems__(list(range(start, start + 16)))
        for row in range(16):
            fx, fy, cx, cy = batch.intrinsics[row].tolist()
            pixels = batch.images["primary"][row].float()
            for question, item in zip(batch.questions[row].split("\n"), batch.asked[row], strict=True):
                x, y, z = item.values.mean(0)
                u, v = int(fx * x / z + cx), int(fy * y / z + cy)
                if not (0 <= u < 140 and 0 <= v < 98):
                    continue
                red, green, blue = pixels[:, v, u].tolist()
                spread = {
                    "red": red - max(green, blue),
                    "green": green - max(red, blue),
                    "blue": blue - max(red, green),
                    "yellow": min(red, green) - blue,
                    "purple": min(red, blue) - green,
                    "white": 40 - (max(red, green, blue) - min(red, green, blue)),
                }
                name = next(colour for colour in spread if f"{colour} box" in question)
                hits += spread[name] > 5
                total += 1
    assert total > 60
    # Some are hidden by others.
    assert hits / total > 0.85


def test_every_batch_is_a_function_of_its_place(
    demo_store: LabelStore, tokens: CoordinateTokens, all_tasks: dict[str, float]
) -> None:
    first, second = (make_dataset(demo_store, tokens, all_tasks) for _ in range(2))
    for start in (40, 0, 16):
        places = list(range(start, start + BATCH))
        assert_equal(first.__getitems__(places), second.__getitems__(places))
    other = make_dataset(demo_store, tokens, all_tasks, seed=4)
    assert other.__getitems__([0]).answers != first.__getitems__([0]).answers


def test_a_cut_that_leaves_nothing_to_ask_about_is_taken_back(
    demo_store: LabelStore, tokens: CoordinateTokens
) -> None:
    tasks = {"spear_lightning.vqa.object_tasks.Distance": 1.0}
    nothing = ViewRecipe(smallest_cut=0.05, pad=0, flip=0, keep=1)
    dataset = make_dataset(demo_store, tokens, tasks, views=nothing)
    assert all(dataset.__getitems__(list(range(8))).answers)


def test_bucketing_permutes_the_samples_and_saves_padding(
    demo_store: LabelStore, tokens: CoordinateTokens, all_tasks: dict[str, float]
) -> None:
    def read(window_batches: int) -> tuple[list[int], float]:
        dataset = make_dataset(demo_store, tokens, all_tasks, window_batches, global_batch=8)
        batches = [dataset.__getitems__(list(range(start, start + 8))) for start in range(0, 16 * 8, 8)]
        padding = sum(int((~batch.token_mask).sum()) for batch in batches)
        cells = sum(batch.token_mask.numel() for batch in batches)
        return [place for batch in batches for place in batch.position.tolist()], padding / cells

    sorted_places, sorted_waste = read(16)
    plain_places, plain_waste = read(1)
    assert plain_places == list(range(128))
    assert sorted(sorted_places) == plain_places
    assert sorted_places != plain_places
    assert sorted_waste < 0.5 * plain_waste


def test_a_resumed_loader_continues_exactly_also_with_other_processes(
    demo_store: LabelStore, tokens: CoordinateTokens, all_tasks: dict[str, float]
) -> None:
    dataset = make_dataset(demo_store, tokens, all_tasks)
    whole = ResumableVqaLoader(dataset, BATCH, epoch_batches=3, data="same")
    batches = list(whole) + list(whole) + list(whole)
    assert len(batches) == 9
    interrupted = ResumableVqaLoader(dataset, BATCH, epoch_batches=3, data="same")
    for _ in itertools.islice(interrupted, 2):
        pass
    state = interrupted.state_dict()
    resumed = ResumableVqaLoader(dataset, BATCH, epoch_batches=3, data="same")
    resumed.load_state_dict(state)
    rest = list(resumed) + list(resumed)
    assert len(rest) == 4
    for found, expected in zip(rest, batches[2:], strict=False):
        assert_equal(found, expected)
    halves = [ResumableVqaLoader(dataset, BATCH // 2, 3, rank, 2, data="same") for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    parts = [next(iter(half)) for half in halves]
    assert [answer for part in parts for answer in part.answers] == batches[2].answers
    for change in ({"data": "other"}, {"global_batch_size": 8}):
        with pytest.raises(CheckpointError, match="other questions"):
            resumed.load_state_dict({**state, **change})


@pytest.mark.slow
def test_workers_read_the_same(
    demo_store: LabelStore, tokens: CoordinateTokens, all_tasks: dict[str, float]
) -> None:
    dataset = make_dataset(demo_store, tokens, all_tasks)
    alone = ResumableVqaLoader(dataset, BATCH, epoch_batches=3)
    helped = ResumableVqaLoader(dataset, BATCH, epoch_batches=3, num_workers=2)
    for found, expected in zip(helped, alone, strict=True):
        assert_equal(found, expected)


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_one_it_raised(tokens: CoordinateTokens, tmp_path: Path) -> None:
    write_demo_labels(tmp_path, 20)
    dataset = make_dataset(LabelStore(tmp_path), tokens, {"spear_lightning.vqa.object_tasks.Distance": 1.0})
    for shard in tmp_path.glob("*.parquet"):
        shard.unlink()
    with pytest.raises(DataError) as raised:
        next(iter(FiniteVqaLoader(dataset, range(4), batch_size=4, num_workers=1)))
    assert str(raised.value).startswith("A file of labels cannot be read")
    assert "Traceback" not in str(raised.value)


def test_validation_reads_all_places_once(
    demo_store: LabelStore, tokens: CoordinateTokens, all_tasks: dict[str, float]
) -> None:
    training, held_out = split_labels(demo_store, 0.2, seed=0)
    assert len(training) + len(held_out) == 60
    assert 6 <= len(held_out) <= 18
    assert set(training.indices).isdisjoint(held_out.indices)
    assert training.fingerprint() != held_out.fingerprint()
    dataset = make_dataset(
        demo_store,
        tokens,
        all_tasks,
        window_batches=1,
        sources=[held_out],
        finder=EvenSamples([len(held_out)], 5),
        views=ViewRecipe.plain(),
    )
    loader = FiniteVqaLoader(dataset, range(5), batch_size=3)
    assert len(loader) == 2
    for _ in range(2):
        assert [batch.position.tolist() for batch in loader] == [[0, 1, 2], [3, 4]]
    with pytest.raises(ConfigError, match="left to train on"):
        split_labels(demo_store, 1 - 1e-12, seed=0)


def test_an_image_stays_held_out_when_others_are_added(demo_folder: Path, tmp_path: Path) -> None:
    def names(store: LabelStore, part: LabelledImages) -> set[str]:
        ids = list(store.image_ids())
        return {ids[index] for index in part.indices}

    write_demo_labels(tmp_path, 90)
    small, large = LabelStore(demo_folder), LabelStore(tmp_path)
    assert list(small.image_ids()) == [label.image_id for label in small]
    held = [names(store, split_labels(store, 0.2, seed=5)[1]) for store in (small, large)]
    assert held[0]
    assert held[0] == held[1] & set(small.image_ids())
    assert held[1] != names(large, split_labels(large, 0.2, seed=6)[1])


def test_the_constant_mean_is_the_mean_of_the_training_answers(
    demo_folder: Path, tokens: CoordinateTokens, all_tasks: dict[str, float]
) -> None:
    labels, tasks = LabelMixture({str(demo_folder): 1.0}, holdout=0.2), TaskMixture(all_tasks)
    before = tokens.encoded
    answers = list(training_answers(labels, tasks, tokens, CAMERA, 1000))
    assert tokens.encoded == before
    assert len(answers) > len(labels.training[0])
    box = "spear_lightning.vqa.object_tasks.BoxVertices"
    question = TrueAnswer(box, np.zeros((8, 3)))
    found, nothing = ConstantMean(answers).answer([question, TrueAnswer("another.Task", np.zeros(3))])
    assert nothing is None
    boxes = [answer.values for answer in answers if answer.task == box]
    assert found is not None
    np.testing.assert_allclose(found.values, np.mean(boxes, axis=0))
    with pytest.raises(DataError, match="no answers"):
        ConstantMean([])


def test_images_without_anything_to_ask_are_counted_and_not_predicted(
    demo_store: LabelStore, tokens: CoordinateTokens
) -> None:
    tasks = {"spear_lightning.vqa.object_tasks.Relation": 1.0}
    # A narrow strip rarely shows two whole objects.
    dataset = make_dataset(demo_store, tokens, tasks, camera=CameraSpec(42, 98), views=ViewRecipe.plain())
    batch = dataset.__getitems__(list(range(8)))
    empty = [not answer for answer in batch.answers]
    assert dataset.without_questions == sum(empty) > 0
    for row, is_empty in enumerate(empty):
        if is_empty:
            assert not batch.answer_mask[row].any()
            assert batch.asked[row] == []
            assert batch.input_ids[row][batch.token_mask[row]].tolist() == [2, 13]


def test_clamped_numbers_are_counted(demo_store: LabelStore) -> None:
    tight = CoordinateTokens(Quantizer.uniform(-0.05, 0.05))
    tasks = {"spear_lightning.vqa.object_tasks.Distance": 1.0}
    batch = make_dataset(demo_store, tight, tasks).__getitems__(list(range(8)))
    assert batch.clamped.tolist() == [len(questions) for questions in batch.asked]


def test_questions_that_do_not_fit_are_left_out_whole(
    demo_store: LabelStore, tokens: CoordinateTokens, all_tasks: dict[str, float]
) -> None:
    prompt = PromptTokenizer()
    prompt.add_tokens([f"<3d_{index:04d}>" for index in range(1024)])
    layout = TextLayout(prompt.vocabulary, 1024, max_length=200)
    dataset = make_dataset(demo_store, tokens, all_tasks, layout=layout)
    batch = dataset.__getitems__(list(range(16)))
    assert batch.input_ids.shape[1] <= 208
    assert int(batch.token_mask.sum(1).max()) <= 200
    assert layout.dropped > 0
    for row in range(16):
        tasks = [load_task(item.task) for item in batch.asked[row]]
        if tasks:
            assert None not in read_answers(batch.answers[row], tasks, tokens, 98, 140)


def test_batches_can_all_have_one_length(demo_store: LabelStore, tokens: CoordinateTokens) -> None:
    prompt = PromptTokenizer()
    prompt.add_tokens([f"<3d_{index:04d}>" for index in range(1024)])
    tasks = {"spear_lightning.vqa.object_tasks.Distance": 1.0}
    vocabulary = prompt.vocabulary
    layout = TextLayout(vocabulary, 1024, max_length=501, one_length=True)
    batch = make_dataset(demo_store, tokens, tasks, layout=layout).__getitems__(list(range(4)))
    plain = make_dataset(demo_store, tokens, tasks, layout=TextLayout(vocabulary, 1024, 501)).__getitems__(
        list(range(4))
    )
    shorter = plain.input_ids.shape[1]
    assert shorter < 501
    assert batch.input_ids.shape == (4, 501)
    assert torch.equal(batch.input_ids[:, :shorter], plain.input_ids)
    assert not batch.token_mask[:, shorter:].any()
    assert batch.answers == plain.answers


def test_training_and_validation_data_of_a_mixture(
    demo_folder: Path, tmp_path: Path, all_tasks: dict[str, float]
) -> None:
    write_demo_labels(tmp_path, 20, seed=1000)
    labels = LabelMixture({str(demo_folder): 0.9, str(tmp_path): 0.1}, "share", holdout=0.25, seed=1)
    tokens = CoordinateTokens.fit(labels.labels(50))
    prompt = PromptTokenizer()
    prompt.add_tokens([f"<3d_{index:04d}>" for index in range(1024)])
    tasks, layout = TaskMixture(all_tasks), TextLayout(prompt.vocabulary, 1024, max_length=900)
    training = training_dataset(labels, tasks, tokens, layout, CAMERA, ViewRecipe(), global_batch_size=8)
    batch = training.__getitems__(list(range(256)))
    assert 0.05 < float((batch.dataset == 1).double().mean()) < 0.15
    validation, places = validation_dataset(labels, tasks, tokens, layout, CAMERA, samples=100)
    first, second = (len(part) for part in labels.held_out)
    assert list(places) == list(range(first + second))
    held = validation.__getitems__(list(places))
    assert held.dataset.tolist() == [0] * first + [1] * second
    shown = {tuple(row.flatten().tolist()) for row in held.images["primary"]}
    assert len(shown) == first + second > 10
    other = LabelMixture({str(demo_folder): 1.0}, holdout=0.25, seed=1)
    changed = TaskMixture({**all_tasks, "spear_lightning.vqa.object_tasks.Distance": 2.0})
    hashes = [
        fingerprint(*parts)
        for parts in (
            (labels, tasks, tokens, CAMERA, ViewRecipe()),
            (other, tasks, tokens, CAMERA, ViewRecipe()),
            (labels, changed, tokens, CAMERA, ViewRecipe()),
            (labels, tasks, CoordinateTokens(Quantizer.uniform(-1, 1)), CAMERA, ViewRecipe()),
            (labels, tasks, tokens, CAMERA, ViewRecipe.plain()),
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == fingerprint(labels, tasks, tokens, CAMERA, ViewRecipe())


def test_objects_that_can_be_asked_about_are_counted_without_reading_labels(demo_store: LabelStore) -> None:
    images = LabelledImages(demo_store, np.array([7, 0, 33]))
    assert images.nameable.tolist() == [len(demo_store[index].objects) for index in (7, 0, 33)]
    assert [len(names) for names in demo_store.object_names()] == [len(label.objects) for label in demo_store]


def test_plans_ask_for_no_more_objects_than_there_are() -> None:
    path = "spear_lightning.vqa.object_tasks."
    mixture = TaskMixture({path + "Distance": 1.0, path + "Relation": 1.0, path + "RandomPixels": 1.0})
    plans = np.array([[1, 1, 0, 2], [1, 1, 0, 2], [0, 0, 0, 0], [2, 2, 1, -1]])
    found = mixture.fitted(plans, np.array([2, 3, 2, 0]))
    assert found.tolist() == [[1, -1, -1, 2], [1, -1, 0, 2], [0, 0, -1, -1], [2, 2, -1, -1]]


def test_tokenizers_that_cannot_write_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="several ids each"):
        TextLayout(PromptTokenizer().vocabulary, 1024)


def test_a_broken_image_is_masked(
    demo_folder: Path, tmp_path: Path, tokens: CoordinateTokens, caplog: pytest.LogCaptureFixture
) -> None:
    for path in demo_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = tmp_path / "labels-00000.images"
    data = bytearray(images.read_bytes())
    data[:3] = b"xxx"
    images.write_bytes(bytes(data))
    store = LabelStore(tmp_path)
    tasks = {"spear_lightning.vqa.object_tasks.Distance": 1.0}
    whole = LabelledImages(store, np.arange(4))
    dataset = make_dataset(
        store,
        tokens,
        tasks,
        sources=[whole],
        finder=EvenSamples([4], 4),
        window_batches=1,
        views=ViewRecipe.plain(),
    )
    batch = dataset.__getitems__([0, 1, 2, 3])
    assert batch.image_mask["primary"].tolist() == [False, True, True, True]
    assert not batch.answer_mask[0].any()
    assert dataset.broken_images == 1
    assert "demo-000000" in caplog.text

"""A store of made-up labels, and 3D tokens fitted to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear_lightning.labeling.demo_labels import write_demo_labels
from spear_lightning.labeling.store import LabelStore
from spear_lightning.models.prompt import PromptTokenizer
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens, token_names

ALL_TASKS = {
    "spear_lightning.vqa.object_tasks.KeyPoints": 1.0,
    "spear_lightning.vqa.object_tasks.BoxVertices": 2.0,
    "spear_lightning.vqa.object_tasks.Relation": 1.0,
    "spear_lightning.vqa.object_tasks.Distance": 1.0,
    "spear_lightning.vqa.object_tasks.Closer": 1.0,
    "spear_lightning.vqa.back_projection.BackProjection": 1.0,
    "spear_lightning.vqa.object_tasks.RandomPixels": 0.5,
}


@pytest.fixture(scope="session")
def all_tasks() -> dict[str, float]:
    return dict(ALL_TASKS)


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    folder = tmp_path_factory.mktemp("labels")
    write_demo_labels(folder, 60)
    return LabelStore(folder)


@pytest.fixture(scope="session")
def tokens(demo_store: LabelStore) -> CoordinateTokens:
    return CoordinateTokens.fit(demo_store)


@pytest.fixture
def prompt() -> PromptTokenizer:
    prompt = PromptTokenizer()
    prompt.add_tokens(token_names())
    return prompt


@pytest.fixture(scope="session")
def demo_folder(demo_store: LabelStore) -> Path:
    return demo_store.folder

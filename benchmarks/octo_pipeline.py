"""The tf.data pipeline as Octo and OpenVLA put it together, for the same samples. Prints one line of JSON.

What their code does and the tuned pipeline (`tfdata_pipeline.py`) does not: every feature of an episode is parsed;
pictures go through the chunking as strings with a window axis; frames are made by an interleave; whole pictures
are decoded with `decode_image` and resized with Lanczos3 to the target size (stretched, not cropped); a second map
over frames stands where augmentations would be; batches are made one after the other; autotuning within 1 GB.
Numbers of threads are OpenVLA's. `--goals` adds the goal pictures that both decode for every sample (OpenVLA does
not use them). Written after octo-models/octo (octo/data), openvla/openvla (prismatic/vla/datasets/rlds) and
kvablack/dlimp; by default Octo decodes a window of two pictures, here it is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import tensorflow as tf
from measure import time_batches
from tfdata_pipeline import FEATURES, Frame, add_options, episode_frames

READ_THREADS = TRAJECTORY_THREADS = 1
"""OpenVLA: the number of data sets of the mixture."""

FRAME_THREADS = 16
SIZES = {"external": (210, 280), "second": (112, 112)}
WINDOW = 1


def every_feature(record: tf.Tensor) -> dict[str, tf.Tensor]:
    """Parse all features of a step, needed or not."""
    scalars = {"discount": tf.float32, "reward": tf.float32}
    flags = dict.fromkeys(("is_first", "is_last", "is_terminal"), tf.int64)
    others = {
        f"steps/{name}": tf.io.FixedLenSequenceFeature([], kind, allow_missing=True)
        for name, kind in {**scalars, **flags}.items()
    }
    return tf.io.parse_single_example(record, {**FEATURES, **others})


def trajectory(record: tf.Tensor) -> dict[str, tf.Tensor]:
    """Parse an episode; keep the whole of it beside its samples, as their trajectory maps do."""
    parsed = every_feature(record)
    return {"frames": episode_frames(record), "length": tf.shape(parsed["steps/reward"])[0]}


def padding_masks(traj: Frame) -> Frame:
    """Mark which pictures are there."""
    frames = dict(traj["frames"])
    for name in SIZES:
        frames[f"{name}_there"] = tf.strings.length(frames[name]) != 0
    return {**traj, "frames": frames}


def with_goals(traj: Frame) -> Frame:
    """Give every sample a picture of a random later step as its goal."""
    frames = dict(traj["frames"])
    count = tf.shape(frames["state"])[0]
    places = tf.range(count)
    draw = tf.random.uniform([count])
    goal = places + tf.cast(draw * tf.cast(count - places, tf.float32), tf.int32)
    goal = tf.minimum(goal, count - 1)
    for name in SIZES:
        frames[f"{name}_goal"] = tf.gather(frames[name], goal)
    return {**traj, "frames": frames}


def windows(traj: Frame) -> Frame:
    """Give observations a window axis, by gathering strings like numbers."""
    frames = dict(traj["frames"])
    count = tf.shape(frames["state"])[0]
    window = tf.maximum(tf.range(count)[:, None] + tf.range(1 - WINDOW, 1), 0)
    for name in ("state", *SIZES, *(f"{name}_there" for name in SIZES)):
        frames[name] = tf.gather(frames[name], window)
    return {**traj, "frames": frames}


def decoded(encoded: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Decode and resize one picture."""

    def read() -> tf.Tensor:
        return tf.io.decode_image(encoded, expand_animations=False, dtype=tf.uint8)

    image = tf.cond(tf.strings.length(encoded) == 0, lambda: tf.zeros((*size, 3), tf.uint8), read)
    image = tf.image.resize(image, size, method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def decode_frame(frame: Frame) -> Frame:
    """Decode the window of each camera, and its goal if there is one."""
    frame = dict(frame)
    for name, size in SIZES.items():
        frame[name] = tf.stack([decoded(image, size) for image in tf.unstack(frame[name])])
        if f"{name}_goal" in frame:
            frame[f"{name}_goal"] = decoded(frame[f"{name}_goal"], size)
    return frame


def no_augmentation(frame: Frame) -> Frame:
    """Draw the seed of the augmentations, of which there are none."""
    seed = tf.random.uniform([2], maxval=tf.dtypes.int32.max, dtype=tf.int32)
    return {**frame, "seed": seed}


def training_batches(shards: list[str], buffer: int, batch_size: int, goals: bool) -> tf.data.Dataset:
    """Return the endless shuffled batches."""
    options = tf.data.Options()
    options.autotune.enabled = True
    options.deterministic = False
    options.experimental_optimization.map_and_filter_fusion = True
    files = tf.data.Dataset.from_tensor_slices(shards).shuffle(len(shards))
    records = files.interleave(tf.data.TFRecordDataset, cycle_length=16, num_parallel_calls=READ_THREADS)
    steps = records.with_options(options).map(trajectory, TRAJECTORY_THREADS).repeat()
    for transform in (padding_masks, *([with_goals] if goals else []), windows):
        steps = steps.map(transform, TRAJECTORY_THREADS)
    frames = steps.interleave(
        lambda traj: tf.data.Dataset.from_tensor_slices(traj["frames"]),
        cycle_length=TRAJECTORY_THREADS,
        num_parallel_calls=TRAJECTORY_THREADS,
    )
    mixed = tf.data.Dataset.sample_from_datasets([frames], [1.0]).shuffle(buffer)
    samples = mixed.map(decode_frame, FRAME_THREADS).map(no_augmentation, FRAME_THREADS)
    memory = tf.data.Options()
    memory.autotune.ram_budget = 1 << 30
    return samples.batch(batch_size).with_options(memory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--goals", action="store_true", help="decode a goal picture of each camera too")
    options = parser.parse_args()
    shards = sorted(str(path) for path in options.data.rglob("*.tfrecord-*"))

    def open_loader() -> Iterator[int]:
        dataset = training_batches(shards, options.buffer, options.batch, options.goals)
        return (len(batch["state"]) for batch in dataset.as_numpy_iterator())

    result = time_batches(open_loader, options.seconds, options.windows, options.warm_up)
    sys.stdout.write(json.dumps(result | {"versions": {"tensorflow": tf.__version__}}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

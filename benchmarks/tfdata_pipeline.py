"""The usual way to load RLDS: a tf.data pipeline as in Octo and OpenVLA, with the work of our loader.

Shards are interleaved, whole episodes parsed and turned into chunks, frames taken apart with their pictures still
encoded, shuffled in a buffer, then decoded, resized and batched. Runs in an environment of its own (see
load_robot_data.py) and prints one line of JSON; `--check FILE` writes the first frames instead, unshuffled.

Shape letters: T steps, S steps that may start a chunk, H horizon, B batch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from measure import time_batches

HORIZON = 5
FEATURES = {
    "steps/observation/image_0": tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True),
    "steps/observation/image_1": tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True),
    "steps/observation/state": tf.io.FixedLenSequenceFeature([7], tf.float32, allow_missing=True),
    "steps/action": tf.io.FixedLenSequenceFeature([7], tf.float32, allow_missing=True),
    "steps/language_instruction": tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True),
}
Frame = dict[str, tf.Tensor]


def episode_frames(record: tf.Tensor) -> Frame:
    """Parse an episode into its S samples; pictures stay encoded."""
    steps = tf.io.parse_single_example(record, FEATURES)
    state_T7, action_T7 = steps["steps/observation/state"], steps["steps/action"]
    count = tf.shape(state_T7)[0]
    position_T3, rotation_T4 = state_T7[:, :3], quaternion(state_T7[:, 3:6])
    openness_T1 = tf.clip_by_value(state_T7[:, 6:], 0.0, 1.0)
    command_T1 = next_decided(action_T7[:, 6])[:, None]
    # Bridge's first action is zero by construction; the last step has no motion after it.
    start_S = tf.range(1, count - 1)
    target_SH = start_S[:, None] + tf.range(1, HORIZON + 1)
    mask_SH = target_SH < count
    target_SH = tf.minimum(target_SH, count - 1)
    translation_SH3 = tf.gather(position_T3, target_SH) - tf.gather(position_T3, start_S)[:, None]
    turn_SH4 = between(tf.gather(rotation_T4, start_S)[:, None], tf.gather(rotation_T4, target_SH))
    # The command of a step leads to the next one.
    gripper_SH1 = tf.gather(command_T1, target_SH - 1)
    state_T8 = tf.concat([position_T3, rotation_T4, openness_T1], axis=-1)
    return {
        "external": tf.gather(steps["steps/observation/image_0"], start_S),
        "second": tf.gather(steps["steps/observation/image_1"], start_S),
        "instruction": tf.gather(steps["steps/language_instruction"], start_S),
        "state": tf.gather(state_T8, start_S),
        "actions": tf.concat([translation_SH3, turn_SH4, gripper_SH1], axis=-1),
        "mask": mask_SH,
    }


def next_decided(command_T: tf.Tensor) -> tf.Tensor:
    """Make gripper commands binary: values in between take the next decided value, or round at the end."""
    decided_T = (command_T > 0.95) | (command_T < 0.05)
    places = tf.where(decided_T)[:, 0]
    nearest_T = tf.searchsorted(places, tf.range(tf.size(command_T, tf.int64)))
    # The step after the last stands for "never decided".
    padded = tf.concat([tf.gather(command_T, places), [0.0]], axis=0)
    open_T = tf.where(nearest_T < tf.size(places), tf.gather(padded, nearest_T), command_T) > 0.5
    return tf.cast(open_T, tf.float32)


def quaternion(euler_T3: tf.Tensor) -> tf.Tensor:
    """Return unit quaternions xyzw, w >= 0, of extrinsic x-y-z angles."""
    sx, sy, sz = tf.unstack(tf.sin(euler_T3 / 2), axis=-1)
    cx, cy, cz = tf.unstack(tf.cos(euler_T3 / 2), axis=-1)
    x, y = sx * cy * cz - cx * sy * sz, cx * sy * cz + sx * cy * sz
    z, w = cx * cy * sz - sx * sy * cz, cx * cy * cz + sx * sy * sz
    return upper(tf.stack([x, y, z, w], axis=-1))


def between(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Return a* b, w >= 0."""
    av, aw, bv, bw = -a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    av = tf.broadcast_to(av, tf.shape(bv))
    vector = aw * bv + bw * av + tf.linalg.cross(av, bv)
    return upper(tf.concat([vector, aw * bw - tf.reduce_sum(av * bv, -1, keepdims=True)], axis=-1))


def upper(q: tf.Tensor) -> tf.Tensor:
    """Return the quaternions' signs that have w >= 0."""
    return tf.where(q[..., 3:] < 0, -q, q)


def decoded(frame: Frame, method: str = "bilinear") -> Frame:
    """Decode and resize a frame's pictures: centre crop to 4:3 and 280x210, and 112x112."""
    # Of 256x256 pixels, the rows that a 4:3 picture shows; decoding no others is faster than cutting them out.
    external = tf.io.decode_and_crop_jpeg(frame["external"], [32, 0, 192, 256], channels=3)
    second = tf.io.decode_jpeg(frame["second"], channels=3)
    return frame | {"external": resized(external, 210, 280, method), "second": resized(second, 112, 112, method)}


def resized(image: tf.Tensor, height: int, width: int, method: str) -> tf.Tensor:
    """Resize with antialiasing, uint8."""
    image = tf.image.resize(image, (height, width), method, antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def training_batches(shards: list[str], cores: int, buffer: int, batch_size: int, method: str) -> tf.data.Dataset:
    """Return the endless shuffled batches."""
    files = tf.data.Dataset.from_tensor_slices(shards).shuffle(len(shards)).repeat()
    records = files.interleave(
        tf.data.TFRecordDataset, cycle_length=4, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False
    )
    frames = records.map(episode_frames, tf.data.AUTOTUNE, deterministic=False).unbatch().shuffle(buffer)
    samples = frames.map(partial(decoded, method=method), tf.data.AUTOTUNE, deterministic=False)
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    return samples.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE).with_options(options)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every pipeline of TensorFlow."""
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--buffer", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--warm-up", type=float, default=2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--resize", choices=["bilinear", "lanczos3"], default="bilinear")
    parser.add_argument("--check", type=Path, help="write one batch to this .npz file instead")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(options.cores)
    tf.config.threading.set_inter_op_parallelism_threads(options.cores)
    shards = sorted(str(path) for path in options.data.rglob("*.tfrecord-*"))
    if options.check:
        frames = tf.data.TFRecordDataset(shards).map(episode_frames).unbatch().map(decoded)
        first = next(frames.batch(options.batch).as_numpy_iterator())
        np.savez(options.check, **{name: first[name] for name in first if name != "instruction"})
        return 0

    def open_loader() -> Iterator[int]:
        dataset = training_batches(shards, options.cores, options.buffer, options.batch, options.resize)
        return (len(batch["state"]) for batch in dataset.as_numpy_iterator())

    result = time_batches(open_loader, options.seconds, options.windows, options.warm_up)
    sys.stdout.write(json.dumps(result | {"versions": {"tensorflow": tf.__version__}}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

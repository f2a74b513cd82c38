"""Which loaders are compared, and what follows from the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contender import Contender, ratio

if TYPE_CHECKING:
    from load_robot_data import Bench

GOALS = {"tuned": 5.0, "lanczos": 8.0}
"""Wanted: 5x a tf.data pipeline of the same work, 8x one with the Lanczos filter."""

COPIES = 8
OPENVLA_BUFFER = 256_000


class Comparison:
    """Our loader in its variants, tf.data in its, and the limit of both.

    Args:
        bench: Makes the contenders.
    """

    def __init__(self, bench: Bench) -> None:
        cores, self._frames = str(bench.options.cores), bench.frames
        workers, threads = ("--workers", cores), ("--threads", cores)
        self.limit = bench.limit(f"decode + resize alone, {cores} processes")
        self.workers = bench.load(f"ours, {cores} workers", "once", *workers)
        self.threads = bench.load(f"ours, {cores} threads", "once", *threads)
        self.tuned = bench.load_tfdata("tf.data tuned, the same filter", "once", self._frames)
        lanczos = ("--resize", "lanczos3")
        self.lanczos = bench.load_tfdata("tf.data tuned, Lanczos", "once", self._frames, *lanczos)
        self.octo = bench.load_octo("tf.data as Octo and OpenVLA build it", "once", self._frames)
        self.compared = [self.limit, self.workers, self.threads, self.tuned, self.lanczos, self.octo]
        self.one = bench.load("ours, 1 worker", "once", "--workers", "1")
        self.prompt = bench.load("ours, nothing read ahead", "once")
        self.scaled = bench.load(
            f"ours, {cores} workers, scaled decode (OTHER pixels)", "once", *workers, "--scaled-decode"
        )
        self.exact = bench.load(
            f"ours, {cores} workers, exact cache (made before)", "once", *workers, "--cache", "exact"
        )
        self.jpeg = bench.load(
            f"ours, {cores} workers, JPEG cache (made before, OTHER pixels)", "once", *workers, "--cache", "jpeg"
        )
        self.many = bench.load(f"ours, {cores} workers, {COPIES}x the episodes", "many", *workers)
        self.full = bench.load_tfdata(f"tf.data tuned, {COPIES}x the episodes", "many", COPIES * self._frames)
        self.goals = bench.load_octo(
            "tf.data as Octo and OpenVLA build it, with goals", "once", self._frames, "--goals"
        )

    def measure(self, rounds: int) -> None:
        """Run everything: what is compared in turns, so that other work on the machine disturbs all alike."""
        for _ in range(rounds):
            for contender in self.compared:
                contender.measure()
        for contender in self.rows():
            if contender not in self.compared:
                contender.measure()

    def rows(self) -> list[Contender]:
        """Return all contenders in the order of the table."""
        ours = [self.workers, self.threads, self.one, self.prompt, self.many]
        return [
            self.limit,
            *ours,
            self.scaled,
            self.jpeg,
            self.exact,
            self.tuned,
            self.full,
            self.lanczos,
            self.octo,
            self.goals,
        ]

    def ratio_header(self) -> list[str]:
        """Return the head of the table of ratios."""
        return ["", *(reference.name for reference in self._references)]

    def ratio_rows(self) -> list[list[str]]:
        """Return how our variants stand to each reference."""
        ours = [self.limit, self.workers, self.threads, self.scaled, self.jpeg, self.exact]
        return [[each.name, *(self._text(each, reference) for reference in self._references)] for each in ours]

    @property
    def _references(self) -> list[Contender]:
        return [self.tuned, self.lanczos, self.octo, self.goals, self.limit]

    @staticmethod
    def _text(a: Contender, b: Contender) -> str:
        rate, cpu = ratio(a, b)
        return "-" if a is b else f"{rate:.2f}x ({cpu:.2f}x)"

    def findings(self) -> list[str]:
        """Return what follows, in sentences."""
        tuned, lanczos = (ratio(self.workers, reference)[0] for reference in (self.tuned, self.lanczos))
        share = ratio(self.workers, self.limit)[0]
        made = {
            name: f"{each.rounds[0]['cache_s']:.1f} s and {each.rounds[0]['cache_mb']:.0f} MB"
            for name, each in (("exact", self.exact), ("JPEG", self.jpeg))
        }
        return [
            f"{self.workers.name} / tf.data tuned by us, same work and filter: {tuned:.2f}x; the goal of "
            f"{GOALS['tuned']:g}x is {'met' if tuned >= GOALS['tuned'] else 'not met'}. Decode and resize alone, "
            f"the limit of a loader that decodes these JPEGs in full, is at {self._text(self.limit, self.tuned)}.",
            f"{self.workers.name} / tf.data tuned by us, Lanczos: {lanczos:.2f}x; the goal of "
            f"{GOALS['lanczos']:g}x is {'met' if lanczos >= GOALS['lanczos'] else 'not met'}.",
            f"{self.workers.name} / decode and resize alone: {100 * share:.0f} %; {self.threads.name}: "
            f"{100 * ratio(self.threads, self.limit)[0]:.0f} %.",
            f"Caches are NOT the same work: their pictures were made before ({self._frames:,} samples), the exact "
            f"one in {made['exact']}, the JPEG one in {made['JPEG']}. The exact one gives the same pixels to the "
            "bit.",
            "With goals: Octo and OpenVLA decode a goal picture of each camera for every sample (OpenVLA does not "
            "use them); that row does twice the decoding.",
            *self._memory(),
        ]

    def _memory(self) -> list[str]:
        """Say how memory and start-up grow with the data."""
        added = (COPIES - 1) * self._frames
        kilobytes = (self.full.median("rss_mb") - self.tuned.median("rss_mb")) * 1000 / added
        start = (self.full.median("first_batch_s") - self.tuned.median("first_batch_s")) / added
        more = self.many.median("pss_mb") - self.workers.median("pss_mb")
        return [
            f"{COPIES}x the episodes: ours {more:+.0f} MB of PSS ({more * 1000 / added:.1f} kB a frame); tf.data, "
            f"with a buffer of all frames, {kilobytes * added / 1000:+,.0f} MB ({kilobytes:.1f} kB a frame).",
            f"At OpenVLA's buffer of {OPENVLA_BUFFER:,} frames that would be about "
            f"{kilobytes * OPENVLA_BUFFER / 1e6:.0f} GB a process and {start * OPENVLA_BUFFER:.0f} s to fill it "
            "(extrapolated, files in the page cache).",
        ]

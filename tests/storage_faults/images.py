"""One run: a master at work, its disk recorded, and what a stock SQLite makes of the remains."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from contextlib import closing
from enum import StrEnum
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from msgspec import Struct, field
from sqlite_utils import Database

from storage import recovery, writer
from storage.database import open_writer
from tests.support.memory_folder import memory_folder
from tests.support.power_loss import Image, Recording
from tests.support.sqlite_tap import tapped
from tests.support.storage_bench import task
from tests.support.storage_workload import DurableStore, Workload, content
from zmqcluster.core.effects import Changes
from zmqcluster.errors import StorageError
from zmqcluster.model import Durability, TaskId

# What a master does that goes on after a sync that failed.
LATER_COMMITS: Final = 8


class Verdict(StrEnum):
    """What became of an image. KEPT: it holds all that was acknowledged, and nothing in half.

    LOST: an earlier state of the master, whole. REFUSED: it cannot be opened. DAMAGED: it can, but
    is no state the master was ever in.
    """

    KEPT = "kept"
    LOST = "lost"
    REFUSED = "refused"
    DAMAGED = "damaged"


class Totals(Struct):
    """What the images of one durability came to. stories: of the first that were not kept."""

    durability: Durability | None
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    operations: int = 0
    commits: int = 0
    seconds: float = 0.0
    stories: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        return self.verdicts.total()

    @property
    def tried(self) -> dict[str, int]:
        return {"power-loss images": self.images}

    def __str__(self) -> str:
        found = ", ".join(f"{self.verdicts[one]} {one}" for one in Verdict)
        rate = self.images / self.seconds if self.seconds else 0.0
        return (
            f"power loss, durability={_name(self.durability)}: {self.images} images of "
            f"{self.operations} operations and {self.commits} commits: {found}; {rate:.0f} images/s"
        )


def _name(durability: Durability | None) -> str:
    return durability.value if durability is not None else "none"


def cut_power(
    durability: Durability | None,
    *,
    images: int,
    commits: int,
    seed: int,
    totals: Totals,
    failing_sync: int = 0,
    kills: bool = False,
) -> None:
    """Let a master commit so often, cut its power in so many ways, and add up what is found.

    failing_sync: number of a sync that fails. If that ends the master the next one goes on from
    there. kills: the first had no time to close the file.
    """
    began = time.monotonic()
    recording, states = Recording(failing_sync), list[int]()
    with memory_folder() as folder, tapped(recording):
        try:
            _work(folder, durability, commits, seed, recording, states, kills=kills)
        except StorageError:
            _go_on(folder, recording, states)
    with memory_folder() as folder:
        for number, image in enumerate(recording.images(images, Random(seed))):
            verdict, why = _judge(folder / "image", image, states, durability)
            totals.verdicts[verdict] += 1
            if verdict is not Verdict.KEPT and len(totals.stories) < 10:
                totals.stories.append(
                    f"seed {seed}, {commits} commits, image {number} of {images}, after operation "
                    f"{image.point} and {image.acknowledged} acknowledged commits: {verdict}: {why}"
                )
    totals.operations += len(recording.operations)
    totals.commits += commits
    totals.seconds += time.monotonic() - began


def _work(
    folder: Path,
    durability: Durability | None,
    commits: int,
    seed: int,
    recording: Recording,
    states: list[int],
    *,
    kills: bool,
) -> None:
    """The life of a master. states: after each thing that somebody may have been told of.

    What it leaves is in folder, also when it raises StorageError.
    """
    store = DurableStore(
        folder / "cluster.db", durability, on_commit=partial(_see, recording, states)
    )
    with closing(store):
        # The state before the first commit: nobody was told anything yet.
        states.append(content(store.database))
        try:
            Workload(store, Random(seed)).run(commits)
        except StorageError:
            if kills:
                # What it does while it closes is not part of the story, nor on disk.
                recording.is_off = True
                left = {one: one.read_bytes() for one in folder.iterdir()}
                store.close()
                for path, data in left.items():
                    if not path.name.endswith("-shm"):
                        path.write_bytes(data)
                recording.is_off = False
            raise


def _go_on(folder: Path, recording: Recording, states: list[int]) -> None:
    """The next master: what it finds it tells, and it commits a little more."""
    with closing(open_writer(folder / "cluster.db")) as database:
        if not states:
            # The first never came so far as to have a state.
            states.append(content(database))
        _see(recording, states, database)
        next_id = recovery.load(database).next_task_id
        for task_id in range(next_id, next_id + LATER_COMMITS):
            writer.apply(database, Changes(new_tasks={TaskId(task_id): task(task_id)}))
            _see(recording, states, database)


def _see(recording: Recording, states: list[int], database: Database) -> None:
    states.append(content(database))
    recording.mark()


def _judge(
    folder: Path, image: Image, states: list[int], durability: Durability | None
) -> tuple[Verdict, str]:
    """Open it as the next master would. states: after each commit, the empty database first."""
    folder.mkdir()
    for name, data in image.files.items():
        (folder / name).write_bytes(data)
    try:
        with closing(
            open_writer(folder / "cluster.db", durability or Durability.NORMAL)
        ) as database:
            (found,) = database.conn.execute("PRAGMA integrity_check(1)").fetchone()
            recovery.load(database)
            state = content(database)
    except StorageError as error:
        return Verdict.REFUSED, str(error)
    finally:
        shutil.rmtree(folder)
    # One commit more may be there: the one that nobody had been told of yet.
    if found != "ok":
        return Verdict.DAMAGED, str(found)
    if state in states[image.acknowledged : image.acknowledged + 2]:
        return Verdict.KEPT, ""
    if state in states[: image.acknowledged]:
        return Verdict.LOST, f"it is where it was after commit {states.index(state)}"
    return Verdict.DAMAGED, "it was never in this state"

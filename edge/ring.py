"""Frames in shared memory: the camera process fills a slot, the line lends it to engine and journal and frees it.

One memfd, mapped by every process that is handed its descriptor: it has no name, so nothing is left behind whoever is
killed. A slot holds one frame and, after it, the anomaly map that the engine made of it; only pages that are written
take memory. A slot is FREE or TAKEN. The camera turns FREE into TAKEN, the line turns TAKEN into FREE, nobody else
does either, so no lock is needed; what lies in a slot is announced by a message, which orders the memory accesses.

    header (one page)   state of each slot, uint8; the camera's progress and a digest of its last picture, uint64
    slot 0              image: IMAGE_BYTES, map: MAP_BYTES
    slot 1              ...
"""

import math
import mmap
import os

import numpy as np

from stpm.edge.preprocess import Image
from stpm.edge.score import Array

PAGE = 4096
IMAGE_BYTES = 64 << 20  # 22 million BGR pixels
MAP_BYTES = 4 << 20  # 1024×1024 float32
MAX_SLOTS = 256

FREE, TAKEN = 0, 1


class Ring:
    def __init__(self, slots: int, descriptor: int | None = None) -> None:
        """`slots` slots in new memory, or in that of `descriptor`, which the ring then owns."""
        if not 0 < slots <= MAX_SLOTS:
            raise ValueError(f"wanted 1 to {MAX_SLOTS} slots, found {slots}")
        size = PAGE + slots * (IMAGE_BYTES + MAP_BYTES)
        if descriptor is None:
            descriptor = os.memfd_create("stpm-frames", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
        self.slots, self.descriptor = slots, descriptor
        self._memory = mmap.mmap(descriptor, size)
        self._states = np.frombuffer(self._memory, np.uint8, slots)
        self._progress = np.frombuffer(self._memory, np.uint64, 1, PAGE - 8)
        self._digest = np.frombuffer(self._memory, np.uint64, 1, PAGE - 16)

    def claim(self) -> int | None:
        """A slot to fill (camera only), or None when all are in use."""
        free = np.flatnonzero(self._states == FREE)
        if not len(free):
            return None
        slot = int(free[0])
        self._states[slot] = TAKEN
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back (line only; a camera process may give back what it has claimed and not announced)."""
        self._states[slot] = FREE

    @property
    def taken(self) -> list[int]:
        return [int(slot) for slot in np.flatnonzero(self._states == TAKEN)]

    @property
    def progress(self) -> int:
        """Counts up while the camera process gets on; one that stands still hangs in its driver."""
        return int(self._progress[0])

    def advance(self) -> None:
        """One step of progress (camera only)."""
        self._progress[0] += np.uint64(1)

    @property
    def last_picture(self) -> int:
        """A digest of what the camera showed last, for the camera process that comes after this one; 0: of nothing."""
        return int(self._digest[0])

    @last_picture.setter
    def last_picture(self, digest: int) -> None:
        self._digest[0] = digest

    def image(self, slot: int, shape: tuple[int, ...]) -> Image:
        """The frame in a slot, uint8 of that shape: a view, good until the slot is freed."""
        return np.frombuffer(self._memory, np.uint8, *self._place(slot, 0, IMAGE_BYTES, 1, shape)).reshape(shape)

    def map(self, slot: int, shape: tuple[int, ...]) -> Array:
        """The anomaly map in a slot, float32 of that shape: a view, good until the slot is freed."""
        return np.frombuffer(self._memory, np.float32, *self._place(slot, IMAGE_BYTES, MAP_BYTES, 4, shape)).reshape(
            shape
        )

    def _place(
        self, slot: int, offset: int, capacity: int, item_bytes: int, shape: tuple[int, ...]
    ) -> tuple[int, int]:
        """How many items, and from which byte on."""
        count = math.prod(shape)
        if not 0 <= slot < self.slots or count * item_bytes > capacity:
            raise ValueError(f"no room for {shape} in slot {slot} of {self.slots}")
        return count, PAGE + slot * (IMAGE_BYTES + MAP_BYTES) + offset

    def close(self) -> None:
        """Let go; a second call does nothing. Views that are still held keep the mapping until they go."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            del self._states, self._progress, self._digest
            try:
                self._memory.close()
            except BufferError:
                return  # a view is still held

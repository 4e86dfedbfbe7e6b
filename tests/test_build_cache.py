"""Features in memory, on disk or nowhere, by what is free."""

import collections
import errno
import os

import numpy as np
import pytest
import torch

from stpm.build import cache
from stpm.build.cache import feature_cache, free_memory

SHAPES = [(5, 3, 4, 4), (5, 7, 2, 2)]
SIZE = 2 * (5 * 3 * 4 * 4 + 5 * 7 * 2 * 2)
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes of memory and of the disk are."""

    def say(memory, disk):
        monkeypatch.setattr(cache, "free_memory", lambda: memory)
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: Usage(disk, 0, disk))

    return say


def files_written(monkeypatch):
    sizes = []
    allocate = os.posix_fallocate
    monkeypatch.setattr(
        os, "posix_fallocate", lambda file, offset, size: (sizes.append(size), allocate(file, offset, size))
    )
    return sizes


def fill_and_read(features):
    filled = [torch.randn(tensor.shape).half() for tensor in features]
    for tensor, values in zip(features, filled, strict=True):
        tensor[...] = values
    for tensor, values in zip(features, filled, strict=True):
        assert torch.equal(tensor, values)
        picked = torch.from_numpy(np.array([3, 0]))
        assert torch.equal(tensor[picked], values[picked])


@pytest.mark.parametrize(("memory", "on_disk"), [(2 * SIZE, []), (2 * SIZE - 1, [SIZE])])
def test_half_of_the_free_memory_is_used_and_then_the_disk(tmp_path, monkeypatch, free, memory, on_disk):
    free(memory, 2 * SIZE)
    written = files_written(monkeypatch)
    features = feature_cache(SHAPES, tmp_path)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in features] == [(shape, torch.float16) for shape in SHAPES]
    fill_and_read(features)
    assert written == on_disk
    assert not list(tmp_path.iterdir())  # nothing is left, however the process ends


def test_many_features_are_on_disk_even_where_memory_is_free(tmp_path, monkeypatch, free):
    free(1 << 40, 1 << 40)
    monkeypatch.setattr(cache, "MEMORY_LIMIT", SIZE - 1)
    written = files_written(monkeypatch)
    fill_and_read(feature_cache(SHAPES, tmp_path))
    assert written == [SIZE]


def test_without_room_there_is_no_cache(tmp_path, free):
    free(2 * SIZE - 1, 2 * SIZE - 1)
    assert feature_cache(SHAPES, tmp_path) is None


def test_a_disk_that_fills_up_in_between_is_said_before_anything_is_written_to_it(tmp_path, monkeypatch, free):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    free(0, 2 * SIZE)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        feature_cache(SHAPES, tmp_path)
    assert not list(tmp_path.iterdir())


def test_free_memory_is_what_the_kernel_says_is_available(tmp_path, monkeypatch):
    file = tmp_path / "meminfo"
    file.write_text(
        "MemTotal:       25165824 kB\nMemFree:         1048576 kB\nMemAvailable:    2097152 kB\nCached: 5 kB\n"
    )
    monkeypatch.setattr(cache, "MEMORY_FACTS", file)
    assert free_memory() == 2 << 30

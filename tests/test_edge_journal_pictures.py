"""The pictures of the journal: which are made, what they show, and which are deleted."""

import os
import signal
from datetime import datetime, timedelta, timezone

import cv2
import numpy as np
import pytest
from journal_line import SHAPE, query, runs, texts

from stpm.edge.journal.messages import PartRecord, utc_now
from stpm.edge.journal.pictures import Pictures, copy_out, picture_path
from stpm.edge.ring import Ring


def test_a_reject_with_its_heat_map_is_drawn_as_the_networks_saw_it(lines, tmp_path):
    line = lines(tmp_path)
    slot = line.ring.claim()
    frame = line.ring.image(slot, SHAPE)
    frame[:] = 90
    frame[20:40, 30:60] = 200  # the region of interest
    anomaly = line.ring.map(slot, (40, 60))
    anomaly[:] = 0
    anomaly[10:14, 20:26] = 1.0
    assert line.part("FAIL", slot=slot, shape=SHAPE, map_shape=(40, 60), roi=(30, 20, 30, 20))
    line.until(lambda: slot not in line.ring.taken)
    frame[:] = 0  # the slot is somebody else's now
    line.close()
    (path,) = (tmp_path / "pictures").glob("*/*.png")
    run = runs(tmp_path)[0]
    assert path == tmp_path / picture_path(run.at, 1, utc_now(), "FAIL")
    picture = cv2.imread(str(path))
    assert picture.shape == (40 + 22, 2 * 60, 3)
    part, heat = picture[22:, :60], picture[22:, 60:]
    assert (part[30, 50] == 200).all()
    assert (part == (0, 0, 255)).all(axis=2).any()  # the defect is outlined
    assert heat[12, 22, 2] > heat[30, 50, 2]  # and red in the map
    assert heat[12, 22, 0] < heat[30, 50, 0]


def test_a_frame_without_a_map_is_kept_as_it_is(lines, tmp_path):
    line = lines(tmp_path)
    slot = line.ring.claim()
    frame = line.ring.image(slot, SHAPE)
    frame[:] = np.random.default_rng(0).integers(0, 256, SHAPE)
    expected = frame.copy()
    del frame
    line.part("UNKNOWN", slot=slot, shape=SHAPE)
    line.close()
    (path,) = (tmp_path / "pictures").glob("*/*-00000001-UNKNOWN.png")
    assert (cv2.imread(str(path)) == expected).all()


def test_rejects_and_a_sample_of_passes_are_pictured(lines, tmp_path):
    line = lines(tmp_path, passes_every=5)
    line.opened()
    for number in range(1, 13):
        line.part("FAIL" if number in (3, 9) else "PASS", frame=True)
        line.until(lambda: not line.ring.taken)
    line.close()
    names = sorted(path.stem.split("-", 1)[1] for path in (tmp_path / "pictures").glob("*/*"))
    assert names == ["00000001-PASS", "00000003-FAIL", "00000007-PASS", "00000009-FAIL"]
    assert runs(tmp_path)[0].lost_pictures == 0


def test_no_more_slots_are_lent_than_agreed_and_pictures_left_out_are_counted(lines, tmp_path):
    line = lines(tmp_path, slots=3)
    line.opened()
    os.kill(line.process.pid, signal.SIGSTOP)
    assert [line.part("FAIL", frame=True) for _ in range(5)] == [True, True, True, False, False]
    assert len(line.ring.taken) == 3
    os.kill(line.process.pid, signal.SIGCONT)
    line.until(lambda: not line.ring.taken)
    line.until(lambda: line.writer.status.lost_pictures == 2)
    line.close()
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 3
    assert (runs(tmp_path)[0].lost, runs(tmp_path)[0].lost_pictures) == (0, 2)
    assert any("2 pictures" in text for text in texts(tmp_path))


def test_a_record_that_does_not_fit_its_slot_costs_its_picture_only(lines, tmp_path):
    line = lines(tmp_path)
    line.part("FAIL", slot=line.ring.claim(), shape=(50_000, 50_000, 3))
    line.part("FAIL", slot=line.ring.claim(), shape=SHAPE, map_shape=(40, 60), roi=(70, 50, 30, 20))
    line.until(lambda: not line.ring.taken)
    line.close()
    assert (runs(tmp_path)[0].records, runs(tmp_path)[0].lost_pictures) == (3, 2)


@pytest.mark.parametrize("map_shape", [None, SHAPE[:2]])
def test_what_a_picture_needs_is_copied_out_of_the_ring(map_shape):
    ring = Ring(1)
    part = PartRecord(1, utc_now(), 1, "", "FAIL", 1.0, 1.0, 1.0, "", "", None, 0, "", 0, SHAPE, map_shape)
    drawing = copy_out(ring, part, 0)
    ring.image(0, SHAPE)[:] = 7
    ring.map(0, SHAPE[:2])[:] = 7
    assert not drawing.image.any()
    assert drawing.map is None or not drawing.map.any()
    ring.close()


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    pictures = Pictures(tmp_path, 1e9)
    pictures.measure(lambda: None)
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        pictures.write(picture_path(utc_now(), 1, utc_now(), "FAIL"), b"png")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_oldest_pictures_go_when_there_are_too_many_bytes(tmp_path):
    size = 10_000
    pictures = Pictures(tmp_path, 10 * size)
    old = tmp_path / "pictures" / "20200101"
    old.mkdir(parents=True)
    (old / "old.png").write_bytes(bytes(size))
    (old / ".half.png").write_bytes(bytes(size))
    pictures.measure(lambda: None)
    assert not (old / ".half.png").exists()
    at = utc_now()
    for part in range(25):
        pictures.write(picture_path(at, part, at, "FAIL"), bytes(size))
        assert sum(path.stat().st_size for path in (tmp_path / "pictures").glob("*/*")) <= 10 * size
        assert (old / "old.png").exists() == (part < 9)
    left = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "pictures").glob("*/*.png"))
    assert left == list(range(15, 25))
    assert not old.exists()


def test_what_somebody_else_has_put_beside_the_pictures_stays_and_stops_nothing(tmp_path):
    size = 10_000
    day = tmp_path / "pictures" / "20200101"
    for folder in (day / "keep", day / ".trash"):
        folder.mkdir(parents=True)
        (folder / "picture.png").write_bytes(bytes(size))
    (day / "old.png").write_bytes(bytes(size))
    pictures = Pictures(tmp_path, 3 * size)
    pictures.measure(lambda: None)
    at = utc_now()
    for part in range(5):
        pictures.write(picture_path(at, part, at, "FAIL"), bytes(size))
    assert len(list((tmp_path / "pictures" / at[:10].replace("-", "")).iterdir())) == 3
    assert sorted(path.name for path in day.iterdir()) == [".trash", "keep"]
    while pictures.expire("99990101"):
        pass
    assert (day / "keep" / "picture.png").exists()


def test_what_is_too_old_is_deleted(lines, tmp_path):
    now = datetime.now(timezone.utc)
    long_ago = (now - timedelta(days=8)).isoformat(timespec="microseconds")
    recent = (now - timedelta(days=6)).isoformat(timespec="microseconds")
    line = lines(tmp_path)
    line.opened()
    for _ in range(1500):
        line.part(at=long_ago)
        line.poll()
    for _ in range(10):
        line.part(at=recent)
    line.written()
    line.close()
    for day in (long_ago, recent):
        folder = tmp_path / "pictures" / day[:10].replace("-", "")
        folder.mkdir(parents=True)
        for number in range(120):
            (folder / f"{number}.png").write_bytes(b"png")
    assert query(tmp_path, "SELECT count(*) FROM parts") == [(1510,)]

    line = lines(tmp_path, max_days=1e12)  # for ever
    line.opened()
    line.close()
    assert query(tmp_path, "SELECT count(*) FROM parts") == [(1510,)]
    line = lines(tmp_path, max_days=7.0)
    line.until(lambda: query(tmp_path, "SELECT count(*) FROM parts") == [(10,)])
    line.until(lambda: len(list((tmp_path / "pictures").iterdir())) == 1)
    line.close()
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 120
    assert [run.records for run in runs(tmp_path)] == [1511, 1, 1]
    assert [run.lost for run in runs(tmp_path)] == [0, 0, 0]

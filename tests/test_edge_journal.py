"""What the line records is in the journal, once, and can be read while it runs."""

import os
import sqlite3
import time
from datetime import datetime, timedelta, timezone

from journal_line import BUNDLE, counts, query, rows, runs, texts

from stpm.edge.journal.database import Database
from stpm.edge.journal.messages import Event, Run, utc_now
from stpm.edge.journal.query import Filter, Journal
from stpm.edge.journal.records import Records


def test_every_column_of_a_part_and_an_event_is_kept(lines, tmp_path):
    line = lines(tmp_path)
    line.writer.event("operator", "threshold changed")
    line.part("FAIL")
    number = line.writer.newest
    line.part("UNKNOWN", score=None, latency_ms=None, box=None, reason="late")
    line.writer.outcome(number, "delivered rejected")
    line.close()
    with Journal(tmp_path) as journal:
        failed, unknown = journal.newest(Filter(), 10)
        assert failed[:2] == (1, 3)
        assert failed[3:] == (
            *(1, "frame 1", "FAIL", 0.5, 0.25, 12.5, BUNDLE, "score above the threshold"),
            *(1, 2, 3, 4, 7, "delivered rejected"),
        )
        assert unknown[3:] == (
            *(2, "frame 2", "UNKNOWN", None, 0.25, None, BUNDLE, "late"),
            *(None, None, None, None, 7, ""),
        )
        assert datetime.now(timezone.utc) - datetime.fromisoformat(failed[2]) < timedelta(minutes=1)
        (run,) = journal.runs()
        assert (run.station, run.version, run.recipes) == ("station", "1.0", {"1": f"screw {BUNDLE}"})
        assert (run.end, run.records, run.lost) == ("closed", 5, 0)
    assert texts(tmp_path, "operator") == ["threshold changed"]
    assert not counts(tmp_path)


def test_texts_that_no_database_likes_do_not_stop_the_line(lines, tmp_path):
    line = lines(tmp_path)
    line.part(frame=False, reason="r" * 100_000)
    line.writer.event("alarm", "bad \udcff name" + "e" * 100_000)
    line.part(score=float("nan"))
    line.part(score=float("inf"))
    line.close()
    assert runs(tmp_path)[0].records == 5
    assert texts(tmp_path, "alarm")[0].startswith("bad ? name")
    assert query(tmp_path, "SELECT score FROM parts ORDER BY record") == [(0.5,), (None,), (float("inf"),)]


def test_the_database_is_read_while_the_line_runs(lines, tmp_path):
    line = lines(tmp_path, commit_s=0.01)
    line.opened()
    seen = []
    for _ in range(30):
        for _ in range(20):
            line.part()
        line.poll()
        with Journal(tmp_path) as journal:
            seen.append(sum(map(len, journal.parts(Filter()))))
        time.sleep(0.005)
    line.written()
    assert seen == sorted(seen)
    assert 0 < seen[20] < 600
    assert rows(tmp_path) == 601


def test_the_process_gives_way_to_the_others(lines, tmp_path):
    line = lines(tmp_path)
    line.opened()
    assert os.getpriority(os.PRIO_PROCESS, line.process.pid) == 10


def test_a_database_of_a_newer_schema_is_left_alone(lines, tmp_path):
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    connection.execute("CREATE TABLE parts (future)")
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = (tmp_path / "journal.sqlite").read_bytes()
    line = lines(tmp_path)
    line.until(lambda: "found schema 7" in line.writer.status.reason)
    line.part()
    line.until(lambda: line.writer.fileno() == -1)
    line.close()
    assert (tmp_path / "journal.sqlite").read_bytes() == before


def test_two_lines_do_not_write_one_journal(lines, tmp_path):
    first = lines(tmp_path)
    first.opened()
    second = lines(tmp_path)
    second.part()
    second.until(lambda: "another journal process writes there" in second.writer.status.reason)
    first.part()
    first.written()
    first.close()
    second.opened()
    second.close()
    assert [(run.records, run.lost, run.end) for run in runs(tmp_path)] == [(2, 0, "closed")] * 2


def test_a_process_that_is_started_again_begins_where_the_database_stands(tmp_path):
    run = Run(1, utc_now(), "", "", {})
    database = Database(tmp_path)
    database.write(database.begin(run).id, [Event(2, utc_now(), "state", "x")], [], 5, 3)
    database.close()
    records = Records(tmp_path, 0.2, 30)
    records.run = run
    assert records.open(0.0) is not None
    assert (records.through, records.lost, records.lost_pictures) == (5, 3, 3)
    records.finish(1.0, 3)


def test_a_commit_that_is_written_twice_is_counted_once(tmp_path):
    database = Database(tmp_path)
    row = database.begin(Run(1, utc_now(), "", "", {}))
    events = [Event(number, utc_now(), "state", "x") for number in (2, 3)]
    assert database.write(row.id, events, [], 3, 0) == 2
    assert database.write(row.id, events, [], 3, 0) == 0
    database.close()
    assert (runs(tmp_path)[0].records, runs(tmp_path)[0].lost) == (3, 0)

"""stpm-journal on a journal as the journal process writes it."""

import csv
import shutil
import sqlite3
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone

import pyarrow.parquet
import pytest

from stpm.edge.journal.cli import main
from stpm.edge.journal.database import Database, Note
from stpm.edge.journal.handed import HandedCount, count_file
from stpm.edge.journal.messages import Event, Outcome, PartRecord, Run
from stpm.edge.journal.pictures import Pictures, picture_path

SCREW, NUT = "5" * 64, "9" * 64
START = datetime(2026, 3, 15, 10, tzinfo=timezone.utc)


def at(seconds):
    return (START + timedelta(seconds=seconds)).isoformat(timespec="microseconds")


def part(number, record, seconds, verdict, bundle=SCREW):
    score = {"PASS": 0.001 * number, "FAIL": 0.5, "UNKNOWN": None}[verdict]
    reason = {"PASS": "", "FAIL": "score above the threshold", "UNKNOWN": "late: no verdict within 500 ms"}[verdict]
    latency = None if verdict == "UNKNOWN" else float(number)
    return PartRecord(
        record, at(seconds), number, f"{number:03d}.png", verdict, score, 0.1, latency, bundle, reason, None, 0, ""
    )


@pytest.fixture
def folder(tmp_path):
    """Run 1: parts 1 to 100 of two recipes, a part a second, 10 FAIL, 5 UNKNOWN, 3 records lost. Run 2: 4 parts."""
    folder = tmp_path / "journal"
    folder.mkdir()
    database = Database(folder)
    run = database.begin(Run(1, at(0), "hall 3", "1.0", {"1": f"screw {SCREW}", "2": f"nut {NUT}"}))
    verdicts = ["UNKNOWN" if n % 20 == 0 else "FAIL" if n % 10 == 5 else "PASS" for n in range(1, 101)]
    parts = [part(n, n + 1, n, verdict, SCREW if n <= 60 else NUT) for n, verdict in enumerate(verdicts, 1)]
    outcome = Outcome(102, 6, "acknowledged rejected")
    event = Event(103, at(200), "operator", "anna cleared the fault")
    database.write(run.id, [*parts, outcome, event], [Note(at(201), "3 records were lost")], 106, 2, "closed")
    run = database.begin(Run(1, at(3600), "hall 3", "1.1", {"1": f"screw {SCREW}"}))
    database.write(run.id, [part(n, n + 1, 3600 + n, "PASS") for n in range(1, 5)], [], 5, 0, "killed")
    database.close()
    pictures = Pictures(folder, 1e9)
    pictures.measure(lambda: None)
    pictures.write(picture_path(at(0), 5, at(5), "FAIL"), b"png")
    pictures.write(picture_path(at(3600), 1, at(3601), "PASS"), b"png")
    return folder


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def lines_of(capsys, *arguments):
    assert main([str(each) for each in arguments]) == 0
    return capsys.readouterr().out.splitlines()


def sentence(capsys, *arguments):
    assert main([str(each) for each in arguments]) == 8
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("stpm-journal: ")
    return line


def test_the_list_ends_with_the_newest_and_fits_a_terminal(folder, capsys):
    lines = lines_of(capsys, "list", folder, "--last", 6)
    assert lines == [
        "time (UTC)           run     part verdict     score      ms outcome               reason",
        "2026-03-15 10:01:39    1       99 PASS    9.900e-02    99.0",
        "2026-03-15 10:01:40    1      100 UNKNOWN                                         late: no verdict …",
        "2026-03-15 11:00:01    2        1 PASS    1.000e-03     1.0",
        "2026-03-15 11:00:02    2        2 PASS    2.000e-03     2.0",
        "2026-03-15 11:00:03    2        3 PASS    3.000e-03     3.0",
        "2026-03-15 11:00:04    2        4 PASS    4.000e-03     4.0",
    ]
    assert len(lines_of(capsys, "list", folder)) == 51
    assert max(len(line) for line in lines_of(capsys, "list", folder, "--last", 200)) <= 100
    (failed,) = lines_of(capsys, "list", folder, "--part", 5, "--verdict", "FAIL")[1:]
    assert "acknowledged rejected" in failed


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("--verdict UNKNOWN", [20, 40, 60, 80, 100]),
        ("--verdict fail --part 20-50", [25, 35, 45]),
        ("--part 4", [4, 4]),
        ("--part 4 --run 2", [4]),
        ("--from 2026-03-15T10:01:38", [98, 99, 100, 1, 2, 3, 4]),
        ("--from 2026-03-15T10:01:38Z --to 2026-03-15T11:00:00+00:00", [98, 99, 100]),
        ("--from 2026-03-15T12:00:02+01:00", [2, 3, 4]),
        ("--from 2026-03-16", []),
        ("--reason LATE:", [20, 40, 60, 80, 100]),
        ("--min-score 0.5 --part 1-30", [5, 15, 25]),
        ("--from 1m", []),
    ],
)
def test_filters(folder, capsys, tmp_path, words, numbers):
    found = lines_of(capsys, "list", folder, *words.split())[1:]
    assert [int(line[24:33]) for line in found if line != "no such parts"] == numbers
    out = tmp_path / "parts.csv"
    lines_of(capsys, "export", folder, "--format", "csv", "--out", out, *words.split())
    with out.open(newline="") as file:
        assert [int(row["part"]) for row in csv.DictReader(file)] == numbers


def test_ago_is_counted_from_now(folder, capsys):
    database = Database(folder)
    now = datetime.now(timezone.utc)
    run = database.begin(Run(1, now.isoformat(timespec="microseconds"), "", "", {}))
    for record, minutes in ((2, 100), (3, 20)):
        moment = (now - timedelta(minutes=minutes)).isoformat(timespec="microseconds")
        database.write(
            run.id, [PartRecord(record, moment, record, "", "PASS", 0, 1, 1, "", "", None, 0, "")], [], record, 0
        )
    database.close()
    assert len(lines_of(capsys, "list", folder, "--from", "30m")) == 2
    assert len(lines_of(capsys, "list", folder, "--from", "2h")) == 3


def test_the_summary_counts_per_recipe_and_run(folder, capsys):
    assert lines_of(capsys, "summary", "--journal", folder) == [
        "                                         parts      PASS      FAIL   UNKNOWN  rejected",
        "all                                        104        89        10         5   14.42 %",
        "recipe 1 screw 55555555                     64        55         6         3   14.06 %",
        "recipe 2 nut 99999999                       40        34         4         2   15.00 %",
        "run 1 of 2026-03-15 10:00:00               100        85        10         5   15.00 %",
        "run 2 of 2026-03-15 11:00:00                 4         4         0         0    0.00 %",
        "",
        "latency, capture to verdict: p50 48.0 ms, p90 89.2 ms, p99 98.0 ms, max 99.0 ms (99 parts)",
        "run 1 lost 3 records and 2 pictures",
    ]


def test_records_that_are_not_here_yet_are_named(folder, capsys):
    count = HandedCount(folder, at(3600))
    count.write(9)
    assert lines_of(capsys, "summary", folder, "--run", 2)[-1] == (
        "run 2: 4 records are not here yet; when the line does not run, they are lost"
    )
    count.close()
    count_file(folder, at(3600)).unlink()


def test_runs_and_events(folder, capsys):
    assert lines_of(capsys, "runs", folder) == [
        " run began (UTC)         station          version    records   lost  end      recipes",
        "   1 2026-03-15 10:00:00 hall 3           1.0            103      3  closed   1 screw, 2 nut",
        "   2 2026-03-15 11:00:00 hall 3           1.1              5      0  killed   1 screw",
    ]
    assert lines_of(capsys, "events", folder) == [
        "2026-03-15 10:03:20.000 run 1    operator anna cleared the fault",
        "2026-03-15 10:03:21.000 run 1    journal  3 records were lost",
    ]
    assert len(lines_of(capsys, "events", folder, "--kind", "journal")) == 1
    assert lines_of(capsys, "events", folder, "--run", 2) == ["no such events"]


def test_where_the_picture_is(folder, capsys):
    (path,) = lines_of(capsys, "picture", folder, 5)
    assert path == str(folder / "pictures/20260315/20260315T100000000000Z-00000005-FAIL.png")
    assert len(lines_of(capsys, "picture", "1-5", "--journal", folder)) == 2
    assert "no picture of 6 " in sentence(capsys, "picture", folder, 6)
    assert "no part 600 " in sentence(capsys, "picture", folder, 600)


def test_parquet_has_the_types_of_the_database(folder, capsys, tmp_path):
    out = tmp_path / "parts.parquet"
    assert lines_of(capsys, "export", folder, "--format", "parquet", "--out", out) == [f"104 parts in {out}"]
    table = pyarrow.parquet.read_table(out)
    assert table.num_rows == 104
    row = table.slice(19, 1).to_pylist()[0]
    assert (row["at"], row["part"], row["verdict"], row["score"]) == (
        START + timedelta(seconds=20),
        20,
        "UNKNOWN",
        None,
    )
    assert str(table.schema.field("score").type) == "double"


def test_parquet_without_pyarrow(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arguments = ("export", folder, "--format", "parquet", "--out", tmp_path / "x.parquet")
    assert "pip install 'stpm-edge[parquet]'" in sentence(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def test_an_export_is_whole_or_not_there(folder, capsys, tmp_path, monkeypatch):
    out = tmp_path / "parts.csv"
    out.write_text("the old one")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        assert "no space left" in sentence(capsys, "export", folder, "--format", "csv", "--out", out)
    assert out.read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "parts.csv"]
    assert "check the path" in sentence(
        capsys, "export", folder, "--format", "csv", "--out", tmp_path / "no" / "x.csv"
    )


def test_a_long_export_comes_in_pages_and_shows_its_progress(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("stpm.edge.journal.query.PAGE", 7)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("stpm.edge.journal.cli.BAR_AFTER_S", 0)
    out = tmp_path / "parts.csv"
    assert main(["export", str(folder), "--format", "csv", "--out", str(out), "--verdict", "PASS"]) == 0
    assert "/89" in capsys.readouterr().err
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({(row["run"], row["record"]) for row in rows}) == 89


def test_no_journal_and_no_folder(folder, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no journal.sqlite in it" in sentence(capsys, "list", tmp_path / "empty")
    assert "no such folder" in sentence(capsys, "list", tmp_path / "nowhere")
    (tmp_path / "empty" / "journal.sqlite").touch()
    assert "an empty database" in sentence(capsys, "list", tmp_path / "empty")


def test_recipes_of_a_run_that_cannot_be_read_leave_the_run_readable(folder, capsys):
    before = lines_of(capsys, "runs", folder)
    with sqlite3.connect(folder / "journal.sqlite") as connection:
        connection.execute("UPDATE runs SET recipes = '{broken'")
    connection.close()
    assert len(lines_of(capsys, "runs", folder)) == len(before)


def test_text_that_is_not_utf_8_is_a_sentence(folder, capsys):
    assert main(["list", str(folder), "--reason", "\udce9"]) == 3
    assert "stpm-journal: ? cannot be written as utf-8" in capsys.readouterr().err


def test_a_damaged_journal_and_one_of_another_schema(folder, capsys):
    path = folder / "journal.sqlite"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(4096) + content[8192:])
    assert "is damaged" in sentence(capsys, "runs", folder)
    path.write_bytes(b"something else altogether, and long enough for a header " * 100)
    assert "is damaged (file is not a database)" in sentence(capsys, "summary", folder)
    path.write_bytes(content)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    assert "wanted a journal of schema 1, found schema 2" in sentence(capsys, "list", folder)


def test_a_copy_on_a_read_only_disk_can_be_read(folder, capsys, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.copytree(folder, disk / "journal")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert len(lines_of(capsys, "list", disk / "journal", "--verdict", "FAIL")) == 11
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        (disk / "journal" / "journal.sqlite-wal").write_bytes(b"log")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "copy the folder" in sentence(capsys, "list", disk / "journal")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_reading_changes_nothing_in_the_folder(folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    lines_of(capsys, "summary", folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix[-3:] != "shm"}
    assert {path: content for path, content in after.items() if content} == before


@pytest.mark.parametrize(
    "words",
    [
        "",
        "list",
        "list here --journal there",
        "list here --from yesterday",
        "list here --from 999999999d",
        "list here --from 0001-01-01T00:00+05:00",
        "list here --part x",
        "list here --part 20-10",
        "list here --part 99999999999999999999",
        "list here --last 99999999999999999999",
        "list here --run 99999999999999999999",
        "events here --kind jurnal",
        "list here --last 0",
        "export here --format xml --out x",
        "list here --verdict MAYBE",
    ],
)
def test_wrong_command_line_is_code_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2


def test_a_reader_that_goes_away_is_no_error(folder):
    command = f"{sys.executable} -m stpm.edge.journal.cli list {folder} --last 200 | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("time (UTC)")
    assert result.stderr == ""


def test_a_large_journal_is_listed_at_once(tmp_path, capsys):
    database = Database(tmp_path)
    run = database.begin(Run(1, at(0), "", "", {}))
    for first in range(0, 50_000, 5000):
        database.write(run.id, [part(n, n + 2, n, "PASS") for n in range(first, first + 5000)], [], first + 5001, 0)
    database.close()
    began = time.perf_counter()
    assert len(lines_of(capsys, "list", tmp_path)) == 51
    listed = time.perf_counter() - began
    began = time.perf_counter()
    lines_of(capsys, "export", tmp_path, "--format", "csv", "--out", tmp_path / "x.csv")
    assert listed < (time.perf_counter() - began) / 3

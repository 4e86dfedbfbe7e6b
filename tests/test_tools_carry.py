"""carry.py: pieces for a box without network; whole, damaged, missing and hostile ones."""

import ast
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from stpm.tools import carry

PIECE = 4000


@pytest.fixture
def source(tmp_path):
    """A folder with what is easily lost: an empty file and folder, an executable, a long and a broken name, a link."""
    folder = tmp_path / "in" / "screw-int8"
    (folder / "deep" / ("n" * 120)).mkdir(parents=True)
    (folder / "nothing").mkdir()
    (folder / "manifest.json").write_bytes(b'{"schema": 2}')
    (folder / "empty").touch()
    (folder / "int8.onnx").write_bytes(bytes(range(256)) * 50)  # more than three pieces
    (folder / "deep" / ("n" * 120) / "größe.txt").write_text("µ")
    (folder / os.fsdecode(b"not-utf8-\xff")).write_text("latin")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "latest").symlink_to("int8.onnx")
    return folder


@pytest.fixture
def pieces(source, tmp_path, capsys):
    """What `split` wrote."""
    out = tmp_path / "stick"
    assert split(source, out) == 0
    capsys.readouterr()
    return out


def split(source, out, *more, size=PIECE):
    return carry.main(["split", str(source), *map(str, more), "--out", str(out), "--piece-size", str(size)])


def join(pieces, to):
    return carry.main(["join", str(pieces), "--to", str(to)])


def contents(folder):
    """Everything about a folder that is to arrive."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else (path.is_dir(), path.read_bytes() if path.is_file() else b"", bool(path.stat().st_mode & 0o100))
        for path in folder.rglob("*")
    }


def refused(pieces, to, capsys, code=3):
    """The sentence, from a join that left nothing behind."""
    before = sorted(to.parent.iterdir())
    assert join(pieces, to) == code
    assert sorted(to.parent.iterdir()) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def encoded(parts):
    return [os.fsencode(part) for part in parts]


def names(pieces):
    return sorted(path.name for path in pieces.glob("part.*"))


def test_everything_arrives(source, pieces, tmp_path, capsys):
    wheel = tmp_path / "in" / "numpy.whl"
    wheel.write_bytes(b"PK")
    out = tmp_path / "both"
    assert split(source, out, wheel) == 0
    assert len(names(out)) > 3
    assert {path.stat().st_size for path in out.glob("part.*")} - {PIECE} == {(out / names(out)[-1]).stat().st_size}
    capsys.readouterr()
    assert carry.main(["verify", str(out)]) == 0
    assert "all whole" in capsys.readouterr().out
    assert join(out, tmp_path / "new" / "stpm") == 0
    assert contents(tmp_path / "new" / "stpm") == contents(tmp_path / "in")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["stpm"]


def test_the_pieces_are_a_tar_that_others_read_too(source, pieces):
    joined = b"".join((pieces / name).read_bytes() for name in names(pieces))
    with tarfile.open(fileobj=io.BytesIO(joined)) as tar:
        members = {member.name: member for member in tar}
    assert [name.split("/") for name in members] == sorted((name.split("/") for name in members), key=encoded)
    assert members["screw-int8/int8.onnx"].size == 12800
    assert members["screw-int8/latest"].linkname == "int8.onnx"
    assert members["screw-int8/empty"].isreg()
    assert members["screw-int8/nothing"].isdir()
    assert {(member.uid, member.gid, member.uname, member.mtime) for member in members.values()} == {(0, 0, "", 0)}
    assert len(joined) % tarfile.RECORDSIZE == 0


def test_the_index_is_what_the_docstring_says(source, pieces):
    index = json.loads((pieces / "carry.json").read_text("ascii"))
    joined = b"".join((pieces / piece["name"]).read_bytes() for piece in index["pieces"])
    assert (index["schema"], index["size"], index["piece_size"]) == (1, len(joined), PIECE)
    assert index["sha256"] == hashlib.sha256(joined).hexdigest()
    for piece in index["pieces"]:
        assert piece["sha256"] == hashlib.sha256((pieces / piece["name"]).read_bytes()).hexdigest()
    files = {file["path"]: (file["size"], file["sha256"]) for file in index["files"]}
    assert len(files) == 6
    assert files["screw-int8/empty"] == (0, hashlib.sha256().hexdigest())
    unsealed = {name: value for name, value in index.items() if name != "seal"}
    compact = json.dumps(unsealed, sort_keys=True, separators=(",", ":")).encode()
    assert index["seal"] == hashlib.sha256(compact).hexdigest()
    assert index["made"].endswith("+00:00")


def test_the_same_sources_give_the_same_pieces(source, pieces, tmp_path):
    copy = tmp_path / "elsewhere" / "screw-int8"
    shutil.copytree(source, copy, symlinks=True, copy_function=shutil.copyfile)
    (copy / "run.sh").chmod(0o700)
    os.utime(copy / "int8.onnx", (1, 1))
    assert split(copy, tmp_path / "again") == 0
    for name in names(pieces):
        assert (tmp_path / "again" / name).read_bytes() == (pieces / name).read_bytes()
    assert names(tmp_path / "again") == names(pieces)


def test_these_bytes_do_not_change_with_the_version_of_python(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ("long" * 40)).write_bytes(b"x")
    digest = hashlib.sha256(b"".join(carry.stream(carry.entries_of([tmp_path / "a"], tmp_path / "out"))))
    assert digest.hexdigest() == "654f4f262067cad021cc7de071a2ceb26c03bb1f77ead094f5f8fdf030711b81"


def test_the_order_of_the_sources_does_not_matter(source, tmp_path):
    other = tmp_path / "in" / "a.whl"
    other.write_bytes(b"PK")
    assert split(source, tmp_path / "one", other) == split(other, tmp_path / "two", source) == 0
    assert [(tmp_path / "one" / name).read_bytes() for name in names(tmp_path / "one")] == [
        (tmp_path / "two" / name).read_bytes() for name in names(tmp_path / "two")
    ]


def test_one_flipped_bit_names_its_piece(pieces, tmp_path, capsys):
    flip(pieces / "part.002")
    error = refused(pieces, tmp_path / "to", capsys)
    assert "part.002 damaged" in error
    assert "part.001" not in error
    assert "carry it again" in error


def test_all_bad_pieces_are_named_together(pieces, tmp_path, capsys):
    flip(pieces / "part.000")
    (pieces / "part.001").unlink()
    os.truncate(pieces / "part.003", 17)
    (pieces / "part.004").write_bytes((pieces / "part.004").read_bytes() + b"x")
    error = refused(pieces, tmp_path / "to", capsys)
    assert "part.000 damaged, part.001 missing, part.003 truncated (17 instead of 4000 bytes) and part.004 " in error
    assert "too long (4001 instead of 4000 bytes): carry these again" in error
    assert "part.002" not in error
    assert carry.main(["verify", str(pieces)]) == 3


def test_a_piece_that_cannot_be_read_is_named_like_the_others(pieces, tmp_path, capsys):
    (pieces / "part.001").unlink()
    (pieces / "part.001").mkdir()
    assert "part.001 unreadable (Is a directory)" in refused(pieces, tmp_path / "to", capsys)


def test_a_damaged_missing_or_newer_index(pieces, tmp_path, capsys):
    index = (pieces / "carry.json").read_text()
    for found, replacement, said in [
        ('"size": 12800', '"size": 12801', "is damaged: carry it again"),
        ('"schema": 1', '"schema": 2', "of schema 1, found 2: use the carry.py that came with it"),
        ("{", "", "is damaged"),
    ]:
        assert found in index
        (pieces / "carry.json").write_text(index.replace(found, replacement, 1))
        assert said in refused(pieces, tmp_path / "to", capsys)
    (pieces / "carry.json").write_text("[" * 100_000)
    assert "is damaged" in refused(pieces, tmp_path / "to", capsys)
    (pieces / "carry.json").unlink()
    assert "found no" in refused(pieces, tmp_path / "to", capsys)


def test_an_index_cannot_name_files_elsewhere(pieces, tmp_path, capsys):
    fields = json.loads((pieces / "carry.json").read_text())
    fields["pieces"][0]["name"] = "../part.000"
    fields["seal"] = carry.seal(fields)
    (pieces / "carry.json").write_text(json.dumps(fields))
    assert "is damaged" in refused(pieces, tmp_path / "to", capsys)


def test_a_destination_that_exists_is_left_alone(pieces, tmp_path, capsys):
    to = tmp_path / "to"
    to.symlink_to("nowhere")  # even this is something of somebody
    assert "is there already" in refused(pieces, to, capsys)
    to.unlink()
    to.mkdir()
    assert "is there already" in refused(pieces, to, capsys)
    assert list(to.iterdir()) == []
    assert "is there already" in refused(pieces, tmp_path / "to" / "..", capsys)


def forged(out, members):
    """A carry whose hashes are all right, around any members: (name, type, content or link)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
            else:
                info.linkname = content
            tar.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    files = [
        carry.File(name, len(content), hashlib.sha256(content).hexdigest())
        for name, kind, content in members
        if kind == tarfile.REGTYPE
    ]
    digest = hashlib.sha256(raw.getvalue()).hexdigest()
    size = len(raw.getvalue())
    piece = carry.Piece("part.000", size, digest)
    out.mkdir()
    (out / "carry.json").write_bytes(carry.Index("today", size, digest, size, [piece], files).encode())
    (out / "part.000").write_bytes(raw.getvalue())
    return out


HOSTILE = {
    "parent": [("../evil", tarfile.REGTYPE, b"x")],
    "parent in the middle": [("a/../../evil", tarfile.REGTYPE, b"x")],
    "absolute": [("ROOT/evil", tarfile.REGTYPE, b"x")],
    "parent as a folder": [("../evil", tarfile.DIRTYPE, "")],
    "link to a parent": [("a/b", tarfile.SYMTYPE, "../../evil")],
    "absolute link": [("a", tarfile.SYMTYPE, "/etc/passwd")],
    "link over a link": [("b/c", tarfile.SYMTYPE, ".."), ("a", tarfile.SYMTYPE, "b/c/..")],
    "hard link": [("a", tarfile.LNKTYPE, "/etc/passwd")],
    "character device": [("a", tarfile.CHRTYPE, "")],
    "block device": [("a", tarfile.BLKTYPE, "")],
    "pipe": [("a", tarfile.FIFOTYPE, "")],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_nothing_leaves_the_destination(members, tmp_path, capsys):
    members = [(name.replace("ROOT", str(tmp_path)), kind, content) for name, kind, content in members]
    pieces = forged(tmp_path / "in", [("good", tarfile.REGTYPE, b"g"), *members])
    error = refused(pieces, tmp_path / "to", capsys)
    assert "do not use them" in error
    assert repr(members[-1][0]) in error


def test_a_file_is_never_written_through_a_link(tmp_path, capsys):
    members = [("d", tarfile.SYMTYPE, "e"), ("e/x", tarfile.REGTYPE, b"1"), ("d/y", tarfile.REGTYPE, b"2")]
    pieces = forged(tmp_path / "in", members)
    assert "collide" in refused(pieces, tmp_path / "to", capsys)
    twice = forged(tmp_path / "twice", [("a", tarfile.REGTYPE, b"1"), ("a", tarfile.REGTYPE, b"2")])
    assert "collide" in refused(twice, tmp_path / "to", capsys)


def test_pieces_that_hold_something_else_than_the_index_lists(tmp_path, capsys):
    pieces = forged(tmp_path / "in", [("a", tarfile.REGTYPE, b"1")])
    index = carry.read_index(pieces)
    (pieces / "carry.json").write_bytes(index._replace(files=[]).encode())
    assert "are not those of" in refused(pieces, tmp_path / "to", capsys)
    (pieces / "carry.json").write_bytes(index._replace(sha256="0" * 64).encode())
    assert "do not make the stream" in refused(pieces, tmp_path / "to", capsys)


def test_whole_pieces_that_are_no_tar(tmp_path, capsys):
    pieces = forged(tmp_path / "in", [])
    digest = hashlib.sha256(b"no tar at all").hexdigest()
    (pieces / "part.000").write_bytes(b"no tar at all")
    (pieces / "carry.json").write_bytes(
        carry.Index("today", 13, digest, 13, [carry.Piece("part.000", 13, digest)], []).encode()
    )
    assert "are no tar" in refused(pieces, tmp_path / "to", capsys)


def test_an_honest_link_arrives(tmp_path):
    members = [("a/b/l", tarfile.SYMTYPE, "../../c"), ("c", tarfile.REGTYPE, b"1")]
    assert join(forged(tmp_path / "in", members), tmp_path / "to") == 0
    assert (tmp_path / "to" / "a" / "b" / "l").read_bytes() == b"1"


def test_a_full_disk_is_found_before_anything_is_written(source, pieces, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(carry.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    error = refused(pieces, tmp_path / "to", capsys, code=8)
    assert "found 10000 bytes" in error
    assert split(source, tmp_path / "other") == 8
    assert list((tmp_path / "other").iterdir()) == []
    assert "wanted 1.1 MB free" in capsys.readouterr().err


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(pieces, source, tmp_path, capsys, monkeypatch):
    real, left = os.fsync, [0]

    def full(handle):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(carry.os, "fsync", full)
    left[0] = 4
    assert "free some space" in refused(pieces, tmp_path / "to", capsys, code=8)
    left[0] = 7  # index, its folder, carry.py, its folder, a piece, its folder, and the second piece
    assert split(source, tmp_path / "other") == 8
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["carry.json", "carry.py", "part.000"]
    assert split(source, tmp_path / "other") == 0
    assert "; 1 piece there already" in capsys.readouterr().out


def test_an_interrupted_join_leaves_nothing(pieces, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(carry, "_write_member", interrupt)
    assert "interrupted" in refused(pieces, tmp_path / "to", capsys, code=130)


def test_what_a_killed_process_left_goes(source, pieces, tmp_path):
    (tmp_path / ".to.partial-99999999" / "half").mkdir(parents=True)
    (tmp_path / f".to.partial-{os.getppid()}").mkdir()  # that one still runs
    (pieces / ".part.001.partial-99999999").write_bytes(b"half")
    assert join(pieces, tmp_path / "to") == 0
    assert sorted(path.name for path in tmp_path.glob(".*")) == [f".to.partial-{os.getppid()}"]
    assert split(source, pieces) == 0
    assert not list(pieces.glob(".*"))


@pytest.mark.parametrize("size", ["999", "0", "-5", "60 M", "60T", "", "1e6", "M", "٦٠M"])
def test_a_bad_piece_size_is_a_wrong_command_line(size, source, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        split(source, tmp_path / "out", size=size)
    assert stopped.value.code == 2
    assert "--piece-size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_units_are_decimal():
    assert [carry.byte_count(text) for text in ("1000", "700k", "60M", "60MB", "2G")] == [
        1000,
        700_000,
        60_000_000,
        60_000_000,
        2_000_000_000,
    ]


def test_too_many_pieces(source, tmp_path, capsys):
    with open(source / "big", "wb") as file:
        file.truncate(10_000_000)
    assert split(source, tmp_path / "out", size=1000) == 3
    assert "larger --piece-size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_split_goes_on_with_the_pieces_that_are_whole(source, pieces, capsys):
    before = {name: (pieces / name).read_bytes() for name in names(pieces)}
    times = {name: (pieces / name).stat().st_ino for name in names(pieces)}
    index = (pieces / "carry.json").read_bytes().replace(b'"made": "2', b'"made": "1')
    fields = json.loads(index)
    fields["seal"] = carry.seal(fields)
    (pieces / "carry.json").write_text(json.dumps(fields))
    (pieces / "part.001").unlink()
    flip(pieces / "part.002")
    assert split(source, pieces) == 0
    assert f"{len(before) - 2} pieces there already" in capsys.readouterr().out
    assert {name: (pieces / name).read_bytes() for name in names(pieces)} == before
    assert [name for name in times if (pieces / name).stat().st_ino == times[name]] != []
    assert (pieces / "part.000").stat().st_ino == times["part.000"]
    assert json.loads((pieces / "carry.json").read_text())["made"].startswith("1")  # still that of the first time


def test_pieces_of_another_carry_are_not_overwritten(source, pieces, capsys):
    before = {path.name: path.read_bytes() for path in pieces.iterdir()}
    assert split(source, pieces, size=PIECE + 1) == 3
    (source / "manifest.json").write_text("changed")
    assert split(source, pieces) == 3
    assert "something else" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in pieces.iterdir()} == before
    (pieces / "carry.json").unlink()
    assert split(source, pieces) == 3


def test_another_file_of_the_name_carry_py_is_not_overwritten(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "carry.py").write_text("mine")
    assert split(source, out) == 3
    assert (out / "carry.py").read_text() == "mine"
    assert [path.name for path in out.iterdir()] == ["carry.py"]


def test_sources_that_cannot_be_carried(source, tmp_path, capsys):
    def sentence(*sources, out=tmp_path / "out"):
        assert split(*sources[:1], out, *sources[1:]) == 3
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    twin = tmp_path / "other" / source.name
    twin.mkdir(parents=True)
    error = sentence(source, twin)
    assert str(source) in error
    assert str(twin) in error
    assert "lies inside the source" in sentence(source, out=source / "out")
    assert "No such file" in sentence(tmp_path / "nowhere")
    assert "with a name" in sentence(Path("/"))
    (source / "out").symlink_to("../../secret")
    assert "replace it by a copy" in sentence(source)
    (source / "out").unlink()
    os.mkfifo(source / "pipe")
    assert "neither a file nor a folder" in sentence(source)


@pytest.mark.parametrize("change", [b"", b"shorter", b"x" * 12800, b"x" * 12801])
def test_a_source_that_changes_meanwhile(change, source, tmp_path, capsys, monkeypatch):
    real = carry.measure

    def measure(*arguments):
        index = real(*arguments)
        (source / "int8.onnx").write_bytes(change)
        return index

    monkeypatch.setattr(carry, "measure", measure)
    assert split(source, tmp_path / "out") == 3
    assert "changed while it was read" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 12799, 12801])
def test_a_source_of_another_size_than_announced_makes_no_stream(size, source, tmp_path):
    entries = carry.entries_of([source], tmp_path / "out")
    os.truncate(source / "int8.onnx", size)
    with pytest.raises(carry.CarryError, match="changed while it was read"):
        list(carry.stream(entries))


def test_a_link_that_was_given_stands_for_its_folder(source, tmp_path):
    (tmp_path / "in" / "current").symlink_to(source.name)
    assert split(tmp_path / "in" / "current", tmp_path / "out") == 0
    assert join(tmp_path / "out", tmp_path / "to") == 0
    assert contents(tmp_path / "to" / "current") == contents(source)


def alone(pieces, *arguments):
    """The copy in a Python without site-packages, environment and current folder on its path."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "carry.py", *arguments], cwd=pieces, env={}, capture_output=True, text=True
    )


def test_the_copy_works_alone(source, pieces, tmp_path):
    assert (pieces / "carry.py").read_bytes() == Path(carry.__file__).read_bytes()
    result = alone(pieces, "join", ".", "--to", "../to")
    assert (result.returncode, result.stderr) == (0, "")
    assert contents(tmp_path / "to" / source.name) == contents(source)
    assert alone(pieces, "verify", ".").returncode == 0
    flip(pieces / "part.000")
    result = alone(pieces, "verify", ".")
    assert result.returncode == 3
    assert result.stderr.startswith("carry.py: wanted")
    assert alone(pieces, "join", ".").returncode == 2


def test_it_is_written_in_python_3_8_and_imports_the_standard_library_only():
    tree = ast.parse(Path(carry.__file__).read_text(), feature_version=(3, 8))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert "tarfile" in imported
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_progress_is_for_people_only(source, tmp_path, capsys, monkeypatch):
    now = iter(range(1_000_000))
    monkeypatch.setattr(carry.time, "monotonic", lambda: next(now))
    assert split(source, tmp_path / "one") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert split(source, tmp_path / "two") == 0
    shown = capsys.readouterr().err
    assert "reading the sources: " in shown
    assert "writing the pieces: " in shown
    assert " s left" in shown
    assert shown.endswith("\r\x1b[K")


def test_exit_codes_are_those_of_the_others():
    from stpm.edge.command import INTERRUPTED
    from stpm.edge.errors import InputError, StorageError

    assert carry.CarryError.exit_code == InputError.exit_code
    assert carry.DiskError.exit_code == StorageError.exit_code
    assert carry.INTERRUPTED == INTERRUPTED

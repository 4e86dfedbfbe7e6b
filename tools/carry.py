"""Carries a bundle and wheels to a box without network, in pieces that fit a stick, a mail gateway or a slow link.

    python tools/carry.py split bundles/screw-int8 wheels --out stick --piece-size 60M
    python3 carry.py verify .              on the far side, in the folder that arrived
    python3 carry.py join . --to ~/stpm    ~/stpm/screw-int8 and ~/stpm/wheels

The far side needs Python 3.8 or later and its standard library, nothing else: this file travels with the pieces and
imports nothing of this project. What `split` writes:

    part.000, part.001, ...  the stream, cut every `piece_size` bytes; only the last piece may be shorter
    carry.json               the index
    carry.py                 this file

The stream is a GNU tar without compression (weights and wheels hardly shrink; `cat part.* | tar x` reads it too).
Members stand under the last name of their source, in the order of the bytes of their names, a folder before what is
in it. Owner 0, time 0, mode 755 for folders and executables, 644 for the rest: the same sources give the same
pieces on any machine with Python 3.9 or later (3.8 fills two unused fields in another way), so a lost piece can be
made again. Symbolic links are carried where they stay inside.

carry.json, in ASCII; what is not UTF-8 in a path is a lone surrogate, as Python's os.fsdecode makes it:

    schema      1
    made        when, ISO 8601, UTC
    size        bytes of the stream; sha256: of the whole stream
    piece_size  bytes of a piece
    pieces      [{"name": "part.000", "size": bytes, "sha256": hex}, ...]
    files       [{"path": "screw-int8/manifest.json", "size": bytes, "sha256": hex}, ...], regular files only
    seal        sha256 of this object without `seal`, as compact JSON with sorted keys

Hashes find what was lost or damaged on the way. Against someone who changes pieces on purpose they help only if both
sides compare the seal by another way: `split`, `verify` and `join` print its beginning.

Exit codes are those of stpm.edge.errors: 0 done; 1 unexpected; 2 wrong command line; 3 sources or pieces missing,
damaged or in the way; 8 disk full or not writable; 130 interrupted, after which `split`
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import time
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Iterable, Iterator, NamedTuple, NoReturn  # noqa: UP035  (the far side may have Python 3.8)

SCHEMA = 1
INDEX = "carry.json"
SMALLEST_PIECE = 1000
MOST_PIECES = 10_000  # more files than that in one folder is no fun on a stick
BLOCK = 1 << 20
INTERRUPTED = 130
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}  # decimal: never above a limit that was meant in powers of 1024

EXAMPLES = """\
examples:
  python tools/carry.py split bundles/screw-int8 wheels --out stick --piece-size 60M
  python3 carry.py verify .
  python3 carry.py join . --to ~/stpm

exit codes: 0 done; 1 unexpected; 2 wrong command line; 3 sources or pieces; 8 disk; 130 interrupted"""


class CarryError(Exception):
    """Sources or pieces that are missing, damaged or in the way."""

    exit_code = 3


class DiskError(CarryError):
    exit_code = 8


class Entry(NamedTuple):
    name: str  # in the stream, with / between folders
    path: Path
    kind: bytes  # REGTYPE, DIRTYPE or SYMTYPE of tarfile
    size: int
    executable: bool
    link: str


class Piece(NamedTuple):
    name: str
    size: int
    sha256: str


class File(NamedTuple):
    path: str
    size: int
    sha256: str


class Index(NamedTuple):
    made: str
    size: int
    sha256: str
    piece_size: int
    pieces: list[Piece]
    files: list[File]

    def encode(self) -> bytes:
        fields = self._asdict()
        fields["schema"] = SCHEMA
        fields["pieces"] = [piece._asdict() for piece in self.pieces]
        fields["files"] = [file._asdict() for file in self.files]
        fields["seal"] = seal(fields)
        return (json.dumps(fields, indent=1) + "\n").encode("ascii")


# --- sources and the stream


def entries_of(sources: list[Path], out: Path) -> list[Entry]:
    """What goes into the stream, in its order."""
    named: dict[str, Path] = {}
    for source in sources:
        name = os.path.basename(os.path.abspath(source))
        if not name:
            raise CarryError(f"wanted a folder or file with a name, found {source}: give what is in it")
        if name in named:
            raise CarryError(
                f"wanted sources with different names, found {named[name]} and {source}, which would both be {name}: "
                "rename one of them"
            )
        if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
            raise CarryError(f"--out {out} lies inside the source {source}: choose a folder outside of it")
        named[name] = source
    try:
        return [entry for name in sorted(named, key=os.fsencode) for entry in _walk(named[name], name, True)]
    except OSError as error:
        raise CarryError(
            f"cannot read {error.filename} ({error.strerror}): check the sources and their permissions"
        ) from error


def _walk(path: Path, name: str, given: bool) -> Iterator[Entry]:
    # a link that was given by hand stands for what it leads to, one found inside is carried as a link
    status = path.stat() if given else path.lstat()
    if stat.S_ISREG(status.st_mode):
        yield Entry(name, path, tarfile.REGTYPE, status.st_size, bool(status.st_mode & stat.S_IXUSR), "")
    elif stat.S_ISDIR(status.st_mode):
        yield Entry(name, path, tarfile.DIRTYPE, 0, True, "")
        for child in sorted(os.listdir(path), key=os.fsencode):
            yield from _walk(path / child, f"{name}/{child}", False)
    elif stat.S_ISLNK(status.st_mode):
        link = os.readlink(path)
        if leaves(name, link):
            raise CarryError(f"{path} is a link to {link}, which is not carried: replace it by a copy")
        yield Entry(name, path, tarfile.SYMTYPE, 0, True, link)
    else:
        raise CarryError(f"{path} is neither a file nor a folder: remove it, or give its neighbours one by one")


def leaves(name: str, link: str) -> bool:
    """Whether a link called `name` may lead out of the folder that all names begin in.

    `..` is allowed in front only. Behind another link it would not mean what the letters say: with a → b/c/..
    and b/c → .., each harmless, a is outside.
    """
    parts = [part for part in link.split("/") if part not in ("", ".")]
    up = len(list(itertools.takewhile(lambda part: part == "..", parts)))
    return link.startswith("/") or not parts or ".." in parts[up:] or up > name.count("/")


def stream(entries: list[Entry], files: list[File] | None = None) -> Iterator[bytes]:
    """The bytes of the tar. `files` is filled with what was read, where it is wanted."""
    size = 0
    for entry in entries:
        digest = hashlib.sha256()
        for block in _member(entry):
            size += len(block)
            yield block
        if entry.kind == tarfile.REGTYPE:
            for block in _content(entry):
                if files is not None:
                    digest.update(block)
                yield block
            padding = -entry.size % tarfile.BLOCKSIZE
            size += entry.size + padding
            yield bytes(padding)
            if files is not None:
                files.append(File(entry.name, entry.size, digest.hexdigest()))
    yield bytes(2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)


def _member(entry: Entry) -> Iterator[bytes]:
    info = tarfile.TarInfo(entry.name)
    info.type, info.size, info.linkname = entry.kind, entry.size, entry.link
    info.mode = 0o755 if entry.executable else 0o644
    # GNU, because its long names are the bytes themselves; the default of tarfile has changed between Pythons
    yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _content(entry: Entry) -> Iterator[bytes]:
    left = entry.size
    try:
        with open(entry.path, "rb") as file:
            while True:
                # one byte more than is left, so that a file which has grown is seen
                block = file.read(min(BLOCK, left + 1))
                if len(block) > left or (left and not block):
                    raise CarryError(f"{entry.path} was changed while it was read: leave it alone and run it again")
                if not block:
                    return
                left -= len(block)
                yield block
    except OSError as error:
        raise CarryError(
            f"cannot read {entry.path} ({error.strerror}): check the source and its permissions"
        ) from error


def cut(blocks: Iterable[bytes], piece_size: int) -> Iterator[tuple[int, bytes]]:
    """(number of the piece, bytes); no bytes lie across the border of two pieces."""
    number, room = 0, piece_size
    for block in blocks:
        view = memoryview(block)
        while len(view):
            if not room:
                number, room = number + 1, piece_size
            yield number, bytes(view[:room])
            taken = min(room, len(view))
            room, view = room - taken, view[taken:]


# --- the index


def seal(fields: dict[str, Any]) -> str:
    unsealed = {name: value for name, value in fields.items() if name != "seal"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def piece_name(number: int, count: int) -> str:
    """All names of a carry have the same length, so that `cat part.*` has them in order."""
    return f"part.{number:0{max(3, len(str(count - 1)))}d}"


def measure(entries: list[Entry], piece_size: int) -> Index:
    """The index, from reading all sources once. Knowing it before the first piece is written lets `split` go on."""
    files: list[File] = []
    whole, found = hashlib.sha256(), []
    total = sum(entry.size for entry in entries)
    if total // piece_size >= MOST_PIECES:
        raise CarryError(
            f"{megabytes(total)} in pieces of {megabytes(piece_size)} would be {total // piece_size + 1} pieces, more "
            f"than {MOST_PIECES}: choose a larger --piece-size"
        )
    with Progress("reading the sources", total) as progress:
        for _, blocks in itertools.groupby(cut(stream(entries, files), piece_size), key=_number):
            digest, size = hashlib.sha256(), 0
            for _, block in blocks:
                digest.update(block)
                whole.update(block)
                size += len(block)
                progress.add(len(block))
            found.append((size, digest.hexdigest()))
    pieces = [Piece(piece_name(number, len(found)), *each) for number, each in enumerate(found)]
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Index(made, sum(piece.size for piece in pieces), whole.hexdigest(), piece_size, pieces, files)


def _number(numbered: tuple[int, bytes]) -> int:
    return numbered[0]


def read_index(folder: Path) -> Index:
    path = folder / INDEX
    try:
        fields = json.loads(path.read_bytes())
        if isinstance(fields, dict) and fields.get("schema") != SCHEMA and "schema" in fields:
            raise CarryError(
                f"wanted {path} of schema {SCHEMA}, found {fields['schema']}: use the carry.py that came with it"
            )
        return _decode(fields)
    except FileNotFoundError:
        raise CarryError(
            f"wanted the folder that `carry.py split` wrote, found no {path}: carry {INDEX} too"
        ) from None
    except OSError as error:
        raise CarryError(f"cannot read {path} ({error.strerror}): carry it again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CarryError(f"{path} is damaged: carry it again") from None


def _decode(fields: dict[str, Any]) -> Index:
    """ValueError, KeyError or TypeError where it is not what `Index.encode` writes."""
    if fields["seal"] != seal(fields):
        raise ValueError("seal")
    count = len(fields["pieces"])
    pieces = [Piece(each["name"], int(each["size"]), each["sha256"]) for each in fields["pieces"]]
    if [piece.name for piece in pieces] != [piece_name(number, count) for number in range(count)]:
        raise ValueError("names of pieces")  # and so none of them leads out of the folder
    files = [File(str(each["path"]), int(each["size"]), each["sha256"]) for each in fields["files"]]
    return Index(fields["made"], int(fields["size"]), fields["sha256"], int(fields["piece_size"]), pieces, files)


# --- split


def split(sources: list[Path], out: Path, piece_size: int) -> None:
    entries = entries_of(sources, out)
    index = measure(entries, piece_size)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        index = _same_carry(out, index)
        wanted = _missing(out, index)
        check_space(out, sum(index.pieces[number].size for number in wanted) + BLOCK)
        _clear_after_killed(out)
        write_file(out / INDEX, [index.encode()])
        write_file(out / "carry.py", [Path(__file__).read_bytes()])
        if wanted:
            _write_pieces(entries, out, index, wanted)
    kept = len(index.pieces) - len(wanted)
    say(
        f"{out}: {described(index)}, at most {megabytes(index.piece_size)} each"
        + (f"; {count_of(kept, 'piece')} there already" if kept else "")
    )
    say(f"on the far side, in that folder: python3 carry.py join . --to DEST   (seal {short_seal(index)})")


def _same_carry(out: Path, index: Index) -> Index:
    """The index to write: the one that is there when it is of the same stream, so that `made` stays."""
    others = sorted(path.name for path in out.glob("part.*"))
    if (out / INDEX).exists():
        there = read_index(out)
        if there[1:] == index[1:]:  # all but `made`
            return there
        others.append(INDEX)
    elif (out / "carry.py").exists() and (out / "carry.py").read_bytes() != Path(__file__).read_bytes():
        others.append("carry.py")
    if others:
        raise CarryError(
            f"wanted an empty --out or one with pieces of the same sources and piece size, found {others[0]} of "
            f"something else in {out}: choose another folder, or empty it"
        )
    return index


def _missing(out: Path, index: Index) -> set[int]:
    """The numbers of the pieces that are not there, or not whole."""
    with Progress("checking what is there", index.size) as progress:
        faults = [_fault(out, piece, lambda block: progress.add(len(block))) for piece in index.pieces]
    return {number for number, fault in enumerate(faults) if fault is not None}


def _write_pieces(entries: list[Entry], out: Path, index: Index, wanted: set[int]) -> None:
    with Progress("writing the pieces", index.size) as progress:
        for number, blocks in itertools.groupby(cut(stream(entries), index.piece_size), key=_number):
            content = progress.through(block for _, block in blocks)
            piece = index.pieces[number]
            if number not in wanted:
                for _ in content:
                    pass  # whole already; only the place in the stream moves on
            elif not write_file(out / piece.name, content, piece.sha256):
                raise CarryError(
                    f"a source was changed while it was read: leave the sources alone, remove {out} and run it again"
                )


def write_file(path: Path, blocks: Iterable[bytes], sha256: str | None = None) -> bool:
    """Write beside it and rename, so that a file has its name only when it is whole. False and no file when the
    sha256 is another one."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
            flush(file.fileno())
        if sha256 not in (None, digest.hexdigest()):
            return False
        os.replace(partial, path)
        flush_folder(path.parent)
        return True
    finally:
        partial.unlink(missing_ok=True)


# --- verify and join


def check(folder: Path, index: Index) -> None:
    """CarryError that names every piece which must be carried again."""
    whole = hashlib.sha256()
    with Progress("checking the pieces", index.size) as progress:

        def watch(block: bytes) -> None:
            whole.update(block)
            progress.add(len(block))

        faults = [(piece.name, _fault(folder, piece, watch)) for piece in index.pieces]
    bad = [(name, fault) for name, fault in faults if fault is not None]
    if bad:
        found = listed([f"{name} {fault}" for name, fault in bad])
        again = "it" if len(bad) == 1 else "these"
        whole_ones = len(faults) - len(bad)
        raise CarryError(
            f"wanted {count_of(len(faults), 'whole piece')} in {folder}, found {found}: carry {again} again"
            + (f" (the other {whole_ones} can stay)" if whole_ones else "")
        )
    if whole.hexdigest() != index.sha256:
        raise CarryError(f"the pieces in {folder} do not make the stream of {INDEX}: split the sources again")


def _fault(folder: Path, piece: Piece, watch: Callable[[bytes], None]) -> str | None:
    """What is wrong with a piece, None when it is whole. `watch` sees its bytes too."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(folder / piece.name, "rb") as file:
            for block in iter(lambda: file.read(BLOCK), b""):
                size += len(block)
                digest.update(block)
                watch(block)
    except FileNotFoundError:
        return "missing"
    except OSError as error:  # sticks wear out
        return f"unreadable ({error.strerror})"
    if size != piece.size:
        return f"{'truncated' if size < piece.size else 'too long'} ({size} instead of {piece.size} bytes)"
    return None if digest.hexdigest() == piece.sha256 else "damaged"


def verify(folder: Path) -> None:
    index = read_index(folder)
    check(folder, index)
    say(f"{folder}: {described(index)}, all whole   (seal {short_seal(index)})")


def join(folder: Path, destination: Path) -> None:
    index = read_index(folder)
    if os.path.lexists(destination):
        raise CarryError(f"{destination} is there already: choose another --to, or move it away")
    check(folder, index)
    with disk_errors(destination):
        # a block is 4096 bytes on most disks: a file takes up to that much more than its size
        check_space(destination.parent, sum(file.size + 4096 for file in index.files))
        _clear_after_killed(destination.parent, destination.name)
        partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            _unpack(folder, index, partial)
            os.rename(partial, destination)
            flush_folder(destination.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    say(f"{destination}: {described(index)}   (seal {short_seal(index)})")


class Joined(io.RawIOBase):
    """The pieces as one stream."""

    def __init__(self, paths: list[Path], progress: Progress) -> None:
        self._left = iter(paths)
        self._file: io.BufferedIOBase = io.BytesIO()
        self._progress = progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        while not count:
            path = next(self._left, None)
            if path is None:
                return 0
            self._file.close()
            self._file = open(path, "rb")  # noqa: SIM115  (closed with this object)
            count = self._file.readinto(buffer)
        self._progress.add(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpack(folder: Path, index: Index, into: Path) -> None:
    found: list[File] = []
    links: list[tarfile.TarInfo] = []
    with Progress("unpacking", index.size) as progress:
        joined = io.BufferedReader(Joined([folder / piece.name for piece in index.pieces], progress), BLOCK)
        try:
            with joined, tarfile.open(fileobj=joined, mode="r|", encoding="utf-8", errors="surrogateescape") as tar:
                for member in tar:
                    _take(tar, member, into, found, links)
            # last of all: nothing is ever written through a link
            for member in links:
                os.symlink(member.linkname, into / member.name)
        except (tarfile.TarError, ValueError) as error:  # ValueError: crafted numbers and names
            raise CarryError(f"the pieces in {folder} are no tar ({error}): split the sources again") from error
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise CarryError(f"two names in the pieces collide ({error.filename}): split the sources again") from error
    if sorted(found) != sorted(index.files):
        raise CarryError(f"the files in the pieces are not those of {folder / INDEX}: split the sources again")
    for each, _, _ in os.walk(into):
        flush_folder(Path(each))


def _take(
    tar: tarfile.TarFile, member: tarfile.TarInfo, into: Path, found: list[File], links: list[tarfile.TarInfo]
) -> None:
    """One member of the stream: written, or kept in `links` for the end. Python's own extraction is not used,
    because it follows such members out of the folder before 3.12."""
    kinds = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE)
    if member.type not in kinds or any(part in ("", ".", "..") for part in member.name.split("/")):
        _hostile(member)
    target = into / member.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.type == tarfile.DIRTYPE:
        target.mkdir(exist_ok=True)
    elif member.type == tarfile.SYMTYPE:
        if leaves(member.name, member.linkname):
            _hostile(member)
        links.append(member)
    else:
        found.append(_write_member(tar, member, target))


def _hostile(member: tarfile.TarInfo) -> NoReturn:
    raise CarryError(
        f"wanted files, folders and links that stay inside, found {member.name!r} in the pieces, which does not: "
        "do not use them, and ask who made them"
    )


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> File:
    digest = hashlib.sha256()
    content = tar.extractfile(member)
    assert content is not None  # it is a regular file
    # the umask applies; no bit but the executable one is taken from the stream
    mode = 0o777 if member.mode & stat.S_IXUSR else 0o666
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with content, open(handle, "wb") as file:
        for block in iter(lambda: content.read(BLOCK), b""):
            digest.update(block)
            file.write(block)
        flush(file.fileno())
    return File(member.name, member.size, digest.hexdigest())


# --- disk


class disk_errors:  # noqa: N801  (read as a verb: with disk_errors(path))
    """OSErrors of writing to `target` as DiskError with a sentence."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
            return
        if error.errno == errno.EFBIG:
            hint = "choose a smaller --piece-size; FAT takes less than 4G in one file"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space and run it again"
        else:
            hint = "check the path and its permissions"
        raise DiskError(f"cannot write {self._target} ({error.strerror or error}): {hint}") from error


def check_space(folder: Path, needed: int) -> None:
    """DiskError before the first byte is written."""
    while not folder.exists():
        folder = folder.absolute().parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"wanted {megabytes(needed)} free on the disk of {folder.absolute()}, found {megabytes(free)}: free some "
            "space and run it again"
        )


def flush(handle: int) -> None:
    os.fsync(handle)  # a stick is often pulled right after


def flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some file systems of sticks and shares cannot do this for a folder, and need not
    finally:
        os.close(handle)


def _clear_after_killed(folder: Path, name: str = "") -> None:
    """What a process that was killed left of `name`, or of any piece, goes."""
    if not (folder.is_dir() and Path("/proc/self").exists()):  # without /proc nobody knows who still runs
        return
    of_split = r"part\.[0-9]+|carry\.json|carry\.py"
    pattern = re.compile(rf"\.({re.escape(name) or of_split})\.partial-([0-9]+)")
    for left in list(folder.iterdir()):
        match = pattern.fullmatch(left.name)
        if match is None or Path("/proc", match.group(2)).exists():
            continue
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


# --- what the person at the keyboard sees


class Progress:
    """One line on stderr with the time left; silent unless somebody is watching."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(total, 1), 0
        self._watched = sys.stderr.isatty()
        self._begun = self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watched:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._watched and now - self._shown > 0.2:
            self._shown = now
            left = (now - self._begun) * max(self._total - self._done, 0) / max(self._done, 1)
            line = (
                f"{self._what}: {min(self._done / self._total, 1):.0%} of {megabytes(self._total)}, {left:.0f} s left"
            )
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def through(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self.add(len(block))
            yield block


def say(text: str) -> None:
    """Print and flush; when nobody reads it any more, go quiet. A name that is not UTF-8 is shown with `?`."""
    try:
        print(text.encode("utf-8", "replace").decode(), flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def described(index: Index) -> str:
    return (
        f"{count_of(len(index.files), 'file')}, {megabytes(index.size)} in {count_of(len(index.pieces), 'piece')}, "
        f"made {index.made}"
    )


def short_seal(index: Index) -> str:
    return str(json.loads(index.encode())["seal"])[:16]


def listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def count_of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size} bytes"


def byte_count(text: str) -> int:
    """60M is 60 million bytes."""
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)B?", text.upper())
    size = int(match.group(1)) * UNITS[match.group(2)] if match else 0
    if size < SMALLEST_PIECE:
        raise argparse.ArgumentTypeError(
            f"wanted a size of at least {SMALLEST_PIECE} bytes like 60M, 700K or 2G, found {text!r}"
        )
    return size


def main(arguments: list[str] | None = None) -> int:
    try:
        _run(_options(arguments))
    except CarryError as error:
        print(f"carry.py: {error}".encode("utf-8", "replace").decode(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("carry.py: interrupted; nothing half-written is left, run the same command again", file=sys.stderr)
        return INTERRUPTED
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        prog="carry.py",
        description="Carry folders and files to a box without network, in pieces that are checked on arrival.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = options.add_subparsers(dest="verb", required=True, metavar="split|verify|join")
    cutting = verbs.add_parser("split", help="cut sources into pieces", allow_abbrev=False)
    cutting.add_argument(
        "sources", nargs="+", type=Path, metavar="SOURCE", help="a bundle, a folder of wheels, a file"
    )
    cutting.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pieces go")
    cutting.add_argument(
        "--piece-size", type=byte_count, default="60M", metavar="SIZE", help="at most this much (default: 60M)"
    )
    checking = verbs.add_parser("verify", help="check the pieces and write nothing", allow_abbrev=False)
    joining = verbs.add_parser("join", help="check the pieces and unpack them", allow_abbrev=False)
    for verb in (checking, joining):
        verb.add_argument("folder", type=Path, metavar="DIR", help="where the pieces are")
    joining.add_argument(
        "--to", type=Path, required=True, metavar="DEST", help="the folder to make; must not be there"
    )
    return options.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    if options.verb == "split":
        split(options.sources, options.out, options.piece_size)
    elif options.verb == "verify":
        verify(options.folder)
    else:
        join(options.folder, Path(os.path.abspath(options.to)))


if __name__ == "__main__":
    sys.exit(main())

"""How every command ends: a sentence on stderr and a documented exit code, or 0."""

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from stpm.edge.errors import InputError, StorageError, StpmError

INTERRUPTED = 130

EXIT_CODES = (
    "exit codes: 0 done; 1 unexpected; 2 wrong command line; 3 images or weights; 4 bundle;\n"
    "5 engine or self test; 6 camera; 7 PLC; 8 disk; 9 training; 10 accuracy gate; 130 interrupted"
)


def parser(name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name,
        description=summary,
        epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run_command(name: str, command: Callable[[], None], when_interrupted: str) -> int:
    """Run a command and give its exit code. A bug is not caught: its traceback is wanted."""
    try:
        command()
    except StpmError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {when_interrupted}", file=sys.stderr)
        return INTERRUPTED
    except UnicodeEncodeError as error:
        text = printable(error.object)[:200]
        print(f"{name}: {text} cannot be written as {error.encoding}: rename it, or say it otherwise", file=sys.stderr)
        return InputError.exit_code
    except OSError as error:
        if error.errno == errno.EPIPE:
            say("")  # goes quiet for good
            return 0
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space and run it again" if full else "check the path and its permissions"
        print(f"{name}: {error.filename or 'the disk'}: {error.strerror or error}; {hint}", file=sys.stderr)
        return StorageError.exit_code
    return 0


def printable(name: object) -> str:
    """A path or other name, with `?` for bytes that are not UTF-8: it goes to terminals and JSON."""
    return str(name).encode("utf-8", "replace").decode()


def say(text: str) -> None:
    """Print and flush; when nobody reads our output any more, go quiet and carry on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # what is left in the buffer, and what Python flushes at exit, goes to nowhere
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def warn(text: str) -> None:
    """A sentence about something that is allowed but may not be meant, among the output of the command."""
    say(f"WARNING: {text}")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and a hang-up set; a second one interrupts. The old handlers come back after."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

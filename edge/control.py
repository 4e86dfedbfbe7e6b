"""stpm-ctl: what an operator may ask of a running line, over a Unix socket that its user and group may open.

One connection is one request and one answer, both JSON: {"verb": "recipe", "recipe": 2} → {"ok": true, "text": "..."}.
"""

import argparse
import getpass
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from stpm.edge.command import parser, run_command, say
from stpm.edge.errors import ConfigError, StpmError

LONGEST = 32 << 10
CALLERS = 8  # whose request has not come yet; more of them wait in the socket's queue
SILENT_S = 5.0  # a caller who has not asked anything by then is let go
REFUSED_S = 1.0  # after the system had no descriptor for a caller
Verb = Literal["status", "recipe", "reload", "rollback", "clear", "stop"]

EXAMPLES = """\
  stpm-ctl --socket /run/stpm/line1.sock status
  stpm-ctl --socket /run/stpm/line1.sock recipe 2     judge with recipe 2 from the next part on
  stpm-ctl --socket /run/stpm/line1.sock reload 1     load the bundle of recipe 1 again, which was replaced on disk
  stpm-ctl --socket /run/stpm/line1.sock rollback 1   go back to the bundle before the last reload
  stpm-ctl --socket /run/stpm/line1.sock clear        the missed trigger, the overrun has been looked at"""


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    verb: Verb
    recipe: int | None = None
    by: str = "somebody"


class Answer(msgspec.Struct, frozen=True):
    ok: bool
    text: str
    details: dict[str, object] = {}


class Control:
    """The line's side. Never waits: a caller who does not read its answer goes without, and those who say nothing are
    few and not kept for long."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if self._path.is_socket() and not _answered(self._path):
                self._path.unlink()  # of a line that was killed
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._listener.bind(path)
        except OSError as error:
            self._listener.close()
            raise ConfigError(
                f"cannot listen at control.socket {path} ({error.strerror}): give another path, or stop the line that "
                "uses it"
            ) from error
        self._path.chmod(0o660)
        self._listener.listen(CALLERS)
        self._listener.setblocking(False)
        self._callers: dict[socket.socket, float] = {}  # and since when
        self._accept_again = 0.0

    def filenos(self) -> list[int]:
        """Those to wait for. While nobody can be accepted the listener is none of them: it would wake us for ever."""
        listener = [self._listener.fileno()] if self._accepts(time.monotonic()) else []
        return [*listener, *(caller.fileno() for caller in self._callers)]

    def poll(self) -> list[tuple[Request, Callable[[Answer], None]]]:
        """The requests that have come, each with what answers it."""
        now = time.monotonic()
        self._accept(now)
        requests: list[tuple[Request, Callable[[Answer], None]]] = []
        for caller, since in list(self._callers.items()):
            try:
                data = caller.recv(LONGEST)
            except BlockingIOError:
                if now - since > SILENT_S:
                    del self._callers[caller]
                    _reply(caller, Answer(False, f"no request has come within {SILENT_S:g} s"))
                continue
            except OSError:
                data = b""
            del self._callers[caller]
            try:
                request = msgspec.json.decode(data, type=Request)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                _reply(caller, Answer(False, f"not a request: {error}"))
                continue
            requests.append((request, partial(_reply, caller)))
        return requests

    def _accepts(self, now: float) -> bool:
        return len(self._callers) < CALLERS and now >= self._accept_again

    def _accept(self, now: float) -> None:
        while self._accepts(now):
            try:
                caller, _ = self._listener.accept()
            except BlockingIOError:
                return  # nobody else calls
            except OSError:
                self._accept_again = now + REFUSED_S
                return
            caller.setblocking(False)
            self._callers[caller] = now

    def close(self) -> None:
        for connection in (self._listener, *self._callers):
            connection.close()
        self._path.unlink(missing_ok=True)


def _reply(caller: socket.socket, answer: Answer) -> None:
    with caller:
        try:
            caller.send(msgspec.json.encode(answer))
        except OSError:
            return  # the caller has gone


def _answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        return probe.connect_ex(str(path)) == 0


def ask(path: str, request: Request, timeout_s: float = 150) -> Answer:
    """The answer of the line that listens at `path`. ConfigError when none does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
            connection.send(msgspec.json.encode(request))
            data = connection.recv(LONGEST)
        except PermissionError as error:
            raise ConfigError(
                f"{path} is not open to this user: call it as the user that runs the line, or as one of its group"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"no line answers at {path} ({error.strerror or error}): check --socket and that stpm-run is running "
                "with control.socket set"
            ) from error
    if not data:
        raise ConfigError(f"the line at {path} has stopped before it answered")
    return msgspec.json.decode(data, type=Answer)


def main(arguments: list[str] | None = None) -> int:
    options = parser("stpm-ctl", "Ask a running line for something.", EXAMPLES)
    options.add_argument("--socket", required=True, metavar="PATH", help="control.socket of the station")
    options.add_argument("--json", action="store_true", help="the answer as JSON")
    options.add_argument("verb", choices=Verb.__args__)  # type: ignore[attr-defined]
    options.add_argument("recipe", nargs="?", type=int, help="its number, for recipe, reload and rollback")
    chosen = options.parse_args(arguments)
    if chosen.verb == "recipe" and chosen.recipe is None:
        options.error("recipe needs a number")
    return run_command("stpm-ctl", lambda: _run(chosen), "the line goes on")


def _run(options: argparse.Namespace) -> None:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    answer = ask(options.socket, Request(options.verb, options.recipe, user))
    if options.json:
        say(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())
    elif answer.ok:
        say(answer.text)
        for name, value in answer.details.items():
            say(f"  {name:<12}{value}")
    if not answer.ok:
        raise StpmError(answer.text)


if __name__ == "__main__":
    sys.exit(main())

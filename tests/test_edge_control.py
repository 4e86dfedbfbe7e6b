"""stpm-ctl and systemd: what a running line is asked, and what it tells."""

import errno
import os
import resource
import select
import socket
import threading
import time

import pytest

from stpm.edge import control as module
from stpm.edge.control import CALLERS, Answer, Control, Request, ask, main
from stpm.edge.errors import ConfigError
from stpm.edge.notify import Notify


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "line.sock")


@pytest.fixture
def control(path):
    control = Control(path)
    yield control
    control.close()


def answered(control, call, reply):
    """`call` in a thread of its own, while the line polls and answers with `reply`."""
    found = []
    caller = threading.Thread(target=lambda: found.append(call()))
    caller.start()
    requests = []
    while not requests:
        requests = control.poll()
    for request, answer in requests:
        answer(reply(request))
    caller.join(5)
    return found[0], requests[0][0]


def test_a_request_comes_whole_and_its_answer_goes_back(control, path):
    answer, request = answered(
        control,
        lambda: ask(path, Request("recipe", 2, "anna")),
        lambda request: Answer(True, f"recipe {request.recipe}"),
    )
    assert request == Request("recipe", 2, "anna")
    assert answer == Answer(True, "recipe 2")


def test_a_caller_who_says_nothing_holds_nobody_up_and_a_caller_who_goes_is_forgotten(control, path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(path)
        assert control.poll() == []
        answer, _ = answered(control, lambda: ask(path, Request("status")), lambda request: Answer(True, "RUNNING"))
        assert answer.text == "RUNNING"
    control.poll()
    assert len(control.filenos()) == 1


@pytest.fixture
def callers(path):
    """Calls the line so many times, and says nothing. Those that got into the queue of the socket."""
    opened = []

    def call(count):
        for _ in range(count):
            caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            caller.setblocking(False)
            try:
                caller.connect(path)
                opened.append(caller)
            except BlockingIOError:  # it is full
                caller.close()
        return opened

    yield call
    for each in opened:
        each.close()


def test_many_silent_callers_are_few_for_the_line_and_do_not_wake_it(control, callers, monkeypatch):
    silent = callers(40)
    assert len(silent) > CALLERS
    for _ in range(20):
        assert control.poll() == []
    assert len(control.filenos()) == CALLERS  # the listener, which still has callers, is not one of them
    assert select.select(control.filenos(), [], [], 0.05)[0] == []
    assert not any(readable(caller) for caller in silent)
    monkeypatch.setattr(module, "SILENT_S", 0.0)
    control.poll()
    told = [caller.recv(1000) for caller in silent if readable(caller)]
    assert len(told) == CALLERS
    assert all(b"no request has come within" in answer for answer in told)


def test_who_is_silent_for_too_long_makes_room_for_who_is_not(control, callers, path, monkeypatch):
    callers(CALLERS)
    assert control.poll() == []
    monkeypatch.setattr(module, "SILENT_S", 0.2)
    before = time.monotonic()
    answer, _ = answered(control, lambda: ask(path, Request("status")), lambda request: Answer(True, "RUNNING"))
    assert answer.text == "RUNNING"
    assert 0.1 < time.monotonic() - before < 5


def test_a_system_without_a_descriptor_for_a_caller_neither_ends_the_line_nor_wakes_it_for_ever(
    control, callers, path, monkeypatch
):
    callers(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the first one that is
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        assert control.poll() == []
        assert control.filenos() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(control, "_accept_again", 0.0)  # a second later
    assert control.poll() == []
    assert len(control.filenos()) == 2


def readable(caller):
    return bool(select.select([caller], [], [], 0)[0])


@pytest.mark.parametrize("nonsense", [b'{"verb": "explode"}', b'{"verb": "status", "by": "\xff"}', b"\x00"])
def test_nonsense_is_answered_and_not_passed_on(control, path, nonsense):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.connect(path)
        caller.send(nonsense)
        assert control.poll() == []
        assert b"not a request" in caller.recv(1000)


def test_the_socket_of_a_killed_line_is_taken_over_and_that_of_a_running_one_is_not(path):
    left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.bind(path)
    left.close()
    control = Control(path)
    try:
        with pytest.raises(ConfigError, match="another path"):
            Control(path)
    finally:
        control.close()
    assert not os.path.exists(path)


def test_only_user_and_group_may_ask(control, path):
    assert os.stat(path).st_mode & 0o777 == 0o660


def test_the_command_prints_the_answer_and_fails_with_it(control, path, capfd):
    code, _ = answered(
        control, lambda: main(["--socket", path, "status"]), lambda request: Answer(True, "RUNNING", {"recipe": 1})
    )
    assert code == 0
    assert capfd.readouterr().out.split() == ["RUNNING", "recipe", "1"]
    code, _ = answered(
        control, lambda: main(["--socket", path, "recipe", "9"]), lambda request: Answer(False, "no such")
    )
    assert code == 1
    assert "stpm-ctl: no such" in capfd.readouterr().err


def test_no_line_at_the_socket_is_a_sentence(path, capfd):
    assert main(["--socket", path, "status"]) == 2
    assert "no line answers" in capfd.readouterr().err


def test_a_socket_of_somebody_else_is_not_taken_for_a_line_that_is_not_there(path, capfd, monkeypatch):
    def refuse(connection, address):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert main(["--socket", path, "status"]) == 2
    assert "not open to this user" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["recipe"], ["explode"], []])
def test_a_wrong_command_line_is_code_2(path, words):
    with pytest.raises(SystemExit) as ended:
        main(["--socket", path, *words])
    assert ended.value.code == 2


# --- systemd


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    listener.settimeout(2)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    yield listener
    listener.close()


def test_systemd_hears_ready_and_a_watchdog_at_half_its_interval(systemd):
    notify = Notify()
    notify.say("READY=1")
    assert systemd.recv(100) == b"READY=1"
    for now_ms in range(0, 2000, 10):
        notify.alive(now_ms * 1_000_000)
    systemd.setblocking(False)
    heard = 0
    while True:
        try:
            assert systemd.recv(100) == b"WATCHDOG=1"
        except BlockingIOError:
            break
        heard += 1
    assert heard == 4


def test_the_watchdog_of_another_process_is_not_ours(systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_PID", "1")
    Notify().alive(10**12)
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(100)


def test_without_systemd_nothing_happens_and_one_that_has_gone_is_no_error(monkeypatch, tmp_path):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notify().say("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    Notify().say("READY=1")


def test_without_a_free_descriptor_systemd_hears_nothing_and_the_line_goes_on(systemd, monkeypatch):
    def refuse(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("stpm.edge.notify.socket.socket", refuse)
    Notify().alive(10**12)

"""Frames between machines: who may speak, what is refused, and that nothing on the way can be changed."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError
from fsdp_testkit.ranks.wire import DATA_LIMIT, STRANGER_LIMIT, Wire, WireError, answer, ask, read_secret

SECRET, OTHER = b"0123456789abcdef", b"0123456789abcdeX"


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


@pytest.fixture
def wires() -> Iterator[tuple[Wire, Wire]]:
    ours, theirs = map(Wire, connected())
    yield ours, theirs
    ours.close()
    theirs.close()


def shake(pytest_side: Callable[[], object], agent_side: Callable[[], object]) -> list[BaseException | None]:
    """Run both halves at the same time; return what each of them raised."""
    raised: list[BaseException | None] = [None, None]

    def run(index: int, half: Callable[[], object]) -> None:
        try:
            half()
        except Exception as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=entry) for entry in enumerate((pytest_side, agent_side))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return raised


def shaken(wires: tuple[Wire, Wire]) -> tuple[Wire, Wire]:
    ours, theirs = wires
    assert shake(lambda: ask(ours, SECRET, "b"), lambda: answer(theirs, SECRET)) == [None, None]
    return ours, theirs


def test_json_and_bytes_arrive_unchanged_in_both_directions(wires: tuple[Wire, Wire]) -> None:
    ours, theirs = shaken(wires)
    for number in range(3):
        ours.send({"number": number, "text": "ü\n"}, b"\0\xff" * number)
        theirs.send({"back": number})
    assert [theirs.receive() for _ in range(3)] == [
        ({"number": number, "text": "ü\n"}, b"\0\xff" * number) for number in range(3)
    ]
    frames = ours.arrived()
    while len(frames) < 3:
        frames += ours.arrived()
    assert frames == [({"back": number}, b"") for number in range(3)]


@pytest.mark.parametrize(("theirs_knows", "ours_knows"), [(SECRET, OTHER), (OTHER, SECRET)])
def test_a_wrong_secret_is_refused_on_both_sides(
    wires: tuple[Wire, Wire], theirs_knows: bytes, ours_knows: bytes
) -> None:
    ours, theirs = wires
    mine, its = shake(lambda: ask(ours, ours_knows, "host b"), lambda: answer(theirs, theirs_knows))
    assert isinstance(mine, UsageError)
    assert "host b refused this pytest: wrong secret" in str(mine)
    assert isinstance(its, WireError)
    assert "does not know the secret" in str(its)


def test_an_agent_that_does_not_know_the_secret_is_refused(wires: tuple[Wire, Wire]) -> None:
    ours, theirs = wires

    def impostor() -> None:
        theirs.send({"fsdp_testkit": 1, "nonce": "00" * 32})
        sent, _ = theirs.receive()
        theirs.send({"proof": sent["proof"]})  # the only proof that it has is pytest's own

    mine, _ = shake(lambda: ask(ours, SECRET, "host b"), impostor)
    assert isinstance(mine, UsageError)
    assert "does not know the secret of this pytest" in str(mine)


def test_a_recorded_handshake_is_worth_nothing(wires: tuple[Wire, Wire]) -> None:
    ours, theirs = wires
    heard = {}

    def record() -> None:
        theirs.send({"fsdp_testkit": 1, "nonce": "11" * 32})
        heard.update(theirs.receive()[0])
        theirs.close()

    shake(lambda: ask(ours, SECRET, "b"), record)
    again, agent = map(Wire, connected())

    def replay() -> None:
        again.receive()
        again.send(heard)

    _, its = shake(replay, lambda: answer(agent, SECRET))
    assert isinstance(its, WireError)
    for wire in (again, agent):
        wire.close()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]), "not authentic"),
        (lambda frame: frame.replace(b"true", b"null"), "not authentic"),
        (lambda frame: frame + frame, "not authentic"),  # the second is a repetition
        (lambda frame: struct.pack(">II", 1 << 30, 0) + frame[8:], "not allowed"),
        (lambda frame: struct.pack(">II", 4, DATA_LIMIT + 1) + frame[8:], "not allowed"),
    ],
)
def test_a_frame_that_was_touched_ends_the_connection(
    wires: tuple[Wire, Wire], spoil: Callable[[bytes], bytes], problem: str
) -> None:
    ours, theirs = shaken(wires)
    raw, recorder = connected()
    real, ours.socket = ours.socket, raw
    ours.send({"go": True})
    frame = recorder.recv(4096)
    ours.socket = real
    spoilt = spoil(frame)
    real.sendall(spoilt)
    if spoilt.startswith(frame):
        assert theirs.receive() == ({"go": True}, b"")
    with pytest.raises(WireError, match=problem):
        theirs.receive()
    for item in (raw, recorder):
        item.close()


def test_a_frame_between_two_agents_is_not_taken_for_one_of_the_other_direction(wires: tuple[Wire, Wire]) -> None:
    ours, theirs = shaken(wires)
    ours.send({"echo": True})
    theirs.socket.sendall(theirs.socket.recv(4096))
    with pytest.raises(WireError, match="not authentic"):
        ours.receive()


@pytest.mark.parametrize("size", [STRANGER_LIMIT + 1, 1 << 31])
def test_a_stranger_cannot_make_an_agent_read_much(wires: tuple[Wire, Wire], size: int) -> None:
    ours, theirs = wires
    ours.socket.sendall(struct.pack(">II", size, 0))
    with pytest.raises(WireError, match="not allowed"):
        theirs.receive()


@pytest.mark.parametrize("text", [b"rubbish", b"[1]", b"3"])
def test_only_json_objects_are_frames(wires: tuple[Wire, Wire], text: bytes) -> None:
    ours, theirs = wires
    ours.socket.sendall(struct.pack(">II", len(text), 0) + text)
    with pytest.raises(WireError, match="JSON"):
        theirs.receive()


def test_the_end_of_the_other_side_is_told(wires: tuple[Wire, Wire]) -> None:
    ours, theirs = wires
    ours.close()
    with pytest.raises(WireError, match="closed the connection"):
        theirs.receive()


def test_something_else_that_listens_is_no_agent(wires: tuple[Wire, Wire]) -> None:
    ours, theirs = wires
    text = json.dumps({"hello": 1}).encode()
    theirs.socket.sendall(struct.pack(">II", len(text), 0) + text)
    with pytest.raises(UsageError, match="b is no agent"):
        ask(ours, SECRET, "b")


# --- where the secret comes from --------------------------------------------------------------------------------


def test_the_secret_is_in_a_file_or_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FSDP_TESTKIT_SECRET", "FSDP_TESTKIT_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="need a shared secret"):
        read_secret(None)
    monkeypatch.setenv("FSDP_TESTKIT_SECRET", "from the environment")
    assert read_secret(None) == b"from the environment"
    file = tmp_path / "secret"
    file.write_text("from the file, longer\n")
    file.chmod(0o600)
    assert read_secret(file) == b"from the file, longer"
    monkeypatch.setenv("FSDP_TESTKIT_SECRET_FILE", str(file))
    assert read_secret(None) == b"from the file, longer"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET)
    file.chmod(mode)
    with pytest.raises(UsageError, match="chmod 600"):
        read_secret(file)


def test_a_short_secret_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with pytest.raises(EnvironmentLacksError, match="cannot be read"):
        read_secret(file)
    file.write_text("short\n")
    file.chmod(0o600)
    with pytest.raises(UsageError, match="at least 16 characters; it holds 5"):
        read_secret(file)

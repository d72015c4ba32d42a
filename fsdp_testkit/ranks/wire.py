"""Frames between pytest and the agents on other machines: JSON and raw bytes. Nothing is ever unpickled.

Both sides prove that they know a shared secret before anything else is read (HMAC-SHA256 over two fresh nonces, as in
ISO/IEC 9798-4), and every later frame carries a code of its own (RFC 2104) under a key of this connection, so that
nobody on the way can put frames in, leave some out or repeat them. The frames are not encrypted.

A frame is two lengths of four bytes (big-endian), that many bytes of JSON, that many raw bytes, and, after the
handshake, 32 bytes of authentication.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import stat
import struct
from pathlib import Path
from typing import Any

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError

PROTOCOL = 1
#: Environment variable that holds the secret where no file does.
SECRET_VARIABLE = "FSDP_TESTKIT_SECRET"
#: Environment variable that names the file.
SECRET_FILE_VARIABLE = "FSDP_TESTKIT_SECRET_FILE"
#: Characters of a secret at least: short ones can be guessed from a recorded handshake.
SECRET_LENGTH = 16
#: Seconds for a handshake: whoever connects and says nothing holds nobody up.
HANDSHAKE_LIMIT = 10.0
#: Seconds for the other side to take what is sent; small frames never wait.
SEND_LIMIT = 30.0
#: Bytes of a frame: before the other side has proved itself, and after.
STRANGER_LIMIT = 4096
JSON_LIMIT = 32 << 20
DATA_LIMIT = 1 << 20
#: Seconds without a sign of life after which the kernel gives a connection up: 2 + 4 * 1.
SILENCE_LIMIT = 6
_LENGTHS = struct.Struct(">II")
_COUNTER = struct.Struct(">Q")
_CODE = 32

Frame = tuple[dict[str, Any], bytes]


class WireError(ConnectionError):
    """The other side is gone, or does not speak this protocol: the message says which."""


class Wire:
    """One connection; the socket is closed by `close`.

    Args:
        link: a connected TCP socket.
    """

    def __init__(self, link: socket.socket) -> None:
        self.socket = link
        link.settimeout(HANDSHAKE_LIMIT)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel watches the line, so that a busy Python process is not taken for a dead machine.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_LIMIT - 2)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_LIMIT * 1000)
        self._keys: tuple[bytes, bytes] | None = None  # what we send, what we get
        self._counts = [0, 0]
        self._buffer = b""

    def secure(self, ours: bytes, theirs: bytes) -> None:
        """From now on authenticate each frame, with a key for each direction."""
        self._keys = (ours, theirs)
        self.socket.settimeout(SEND_LIMIT)

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        """Send a frame.

        Raises:
            WireError: the other side is gone, or does not read.
        """
        text = json.dumps(message).encode()
        frame = _LENGTHS.pack(len(text), len(data)) + text + data
        if self._keys is not None:
            frame += self._code(0, frame)
        try:
            self.socket.sendall(frame)
        except OSError as error:
            raise WireError(reason(error)) from None

    def receive(self) -> Frame:
        """Wait for the next frame, at most the socket's timeout for each part.

        Raises:
            WireError: none came, or one that is not allowed.
        """
        while (frame := self._next()) is None:
            self._read()
        return frame

    def arrived(self) -> list[Frame]:
        """Return the frames that are complete once the socket was readable; it may be none.

        Raises:
            WireError: the other side is gone, or sent what is not allowed.
        """
        self._read()
        return self.complete()

    def complete(self) -> list[Frame]:
        """Return the frames that are here already: a socket is not readable for what was read with another frame."""
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def _read(self) -> None:
        try:
            data = self.socket.recv(1 << 20)
        except OSError as error:
            raise WireError(reason(error)) from None
        if not data:
            raise WireError("the other side closed the connection")
        self._buffer += data

    def _next(self) -> Frame | None:
        if len(self._buffer) < _LENGTHS.size:
            return None
        text, data = _LENGTHS.unpack_from(self._buffer)
        known = self._keys is not None
        if text > (JSON_LIMIT if known else STRANGER_LIMIT) or data > (DATA_LIMIT if known else 0):
            raise WireError(f"it sent a frame of {text} + {data} bytes, which is not allowed")
        begin, middle = _LENGTHS.size, _LENGTHS.size + text
        end = middle + data
        after = end + (_CODE if known else 0)
        if len(self._buffer) < after:
            return None
        if known and not hmac.compare_digest(self._buffer[end:after], self._code(1, self._buffer[:end])):
            raise WireError("a frame is not authentic")
        frame = self._buffer[begin:middle], self._buffer[middle:end]
        self._buffer = self._buffer[after:]
        try:
            message = json.loads(frame[0])
        except ValueError:
            raise WireError("it sent what is no JSON") from None
        if not isinstance(message, dict):
            raise WireError("it sent JSON that is no object")
        return message, frame[1]

    def _code(self, direction: int, frame: bytes) -> bytes:
        assert self._keys is not None
        counter = _COUNTER.pack(self._counts[direction])
        self._counts[direction] += 1
        return hmac.digest(self._keys[direction], counter + frame, "sha256")


def reason(error: OSError) -> str:
    """Return what an error of a socket says, in lower case."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def answer(wire: Wire, secret: bytes) -> None:
    """Do the agent's half of the handshake.

    Raises:
        WireError: the other side does not know the secret, or speaks something else.
    """
    ours = secrets.token_hex(32)
    wire.send({"fsdp_testkit": PROTOCOL, "nonce": ours})
    message, _ = wire.receive()
    nonce, proof = message.get("nonce"), message.get("proof")
    if message.get("fsdp_testkit") != PROTOCOL or not isinstance(nonce, str) or not isinstance(proof, str):
        wire.send({"refused": f"this agent speaks version {PROTOCOL} of the protocol"})
        raise WireError("it speaks another protocol")
    if not hmac.compare_digest(proof.encode(), _proof(secret, "pytest", ours, nonce)):
        wire.send({"refused": "wrong secret"})
        raise WireError("it does not know the secret")
    wire.send({"proof": _proof(secret, "agent", ours, nonce).decode()})
    wire.secure(_key(secret, "agent", ours, nonce), _key(secret, "pytest", ours, nonce))


def ask(wire: Wire, secret: bytes, name: str) -> None:
    """Do pytest's half of the handshake with the agent called ``name``.

    Raises:
        WireError: the agent is gone, or is none.
        UsageError: one of the two does not know the other's secret.
    """
    message, _ = wire.receive()
    theirs = message.get("nonce")
    if message.get("fsdp_testkit") != PROTOCOL or not isinstance(theirs, str):
        raise UsageError(f"{name} is no agent of this version of fsdp_testkit")
    ours = secrets.token_hex(32)
    wire.send({"fsdp_testkit": PROTOCOL, "nonce": ours, "proof": _proof(secret, "pytest", theirs, ours).decode()})
    message, _ = wire.receive()
    if "refused" in message:
        raise UsageError(f"{name} refused this pytest: {str(message['refused'])[:200]}")
    proof = message.get("proof")
    if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), _proof(secret, "agent", theirs, ours)):
        raise UsageError(f"{name} does not know the secret of this pytest")
    wire.secure(_key(secret, "pytest", theirs, ours), _key(secret, "agent", theirs, ours))


def _proof(secret: bytes, who: str, agent: str, pytest: str) -> bytes:
    return hmac.new(secret, f"proof {who} {agent} {pytest}".encode(), hashlib.sha256).hexdigest().encode()


def _key(secret: bytes, who: str, agent: str, pytest: str) -> bytes:
    return hmac.digest(secret, f"key {who} {agent} {pytest}".encode(), "sha256")


def read_secret(file: str | os.PathLike[str] | None) -> bytes:
    """Return the shared secret, from a file or from the environment: never from a command line, which others can see.

    Args:
        file: where it is; the variable `SECRET_FILE_VARIABLE`, then `SECRET_VARIABLE` is read where ``None``.

    Raises:
        UsageError: there is none, it is too short, or others may read the file.
        EnvironmentLacksError: the file cannot be read.
    """
    file = file or os.environ.get(SECRET_FILE_VARIABLE) or None
    if file is None:
        text = os.environ.get(SECRET_VARIABLE, "")
        if not text:
            raise UsageError(
                f"agents and pytest need a shared secret: name its file, or set {SECRET_FILE_VARIABLE} or "
                f"{SECRET_VARIABLE}"
            )
        where = SECRET_VARIABLE
    else:
        where = f"the secret file {os.fspath(file)}"
        try:
            with Path(file).open("rb") as opened:
                mode = os.fstat(opened.fileno()).st_mode
                text = opened.read(4096).decode("utf-8", "replace")
        except OSError as error:
            raise EnvironmentLacksError(f"{where} cannot be read: {error.strerror}") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(f"{where} may be read by others (mode {stat.S_IMODE(mode):04o}): chmod 600 it")
    secret = text.strip().encode()
    if len(secret) < SECRET_LENGTH:
        raise UsageError(f"{where} must hold a secret of at least {SECRET_LENGTH} characters; it holds {len(secret)}")
    return secret

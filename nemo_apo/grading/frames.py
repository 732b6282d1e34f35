"""Messages over a pipe: four bytes of length, then that many bytes."""

import os
import struct

_LENGTH = struct.Struct("<I")
_CHUNK = 65536


class BadFrame(ValueError):
    """A message longer than its reader takes."""


def write_frame(fd: int, payload: bytes) -> None:
    """Write one message; blocks while the pipe is full.

    Raises:
        OSError: if nobody reads any more.
    """
    data = memoryview(_framed(payload))
    while data:
        data = data[os.write(fd, data) :]


class FrameWriter:
    """Writes messages to a pipe, which it makes non-blocking, and never waits for their reader.

    Args:
        fd: to write to.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._unsent = memoryview(b"")

    @property
    def pending(self) -> bool:
        """Whether part of the last message has not been written."""
        return bool(self._unsent)

    def put(self, payload: bytes) -> None:
        """Begin to write a message; ``flush`` goes on with it."""
        assert not self._unsent
        self._unsent = memoryview(_framed(payload))
        self.flush()

    def flush(self) -> None:
        """Write as much as the pipe takes now; what nobody reads any more is dropped."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.fd, self._unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._unsent = memoryview(b"")


class FrameReader:
    """Reads messages from a pipe.

    Args:
        fd: to read from.
        limit: longest message taken, bytes; a longer one is never held in memory.
    """

    def __init__(self, fd: int, limit: int) -> None:
        self.fd = fd
        self._limit = limit
        self._data = bytearray()

    def fill(self) -> bool:
        """Receive what is there, at least one byte; False at the end of the pipe."""
        data = os.read(self.fd, _CHUNK)
        self._data += data
        return bool(data)

    def pop(self) -> bytes | None:
        """The next message, None if it is not complete.

        Raises:
            BadFrame: if it is too long.
        """
        if len(self._data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._data)
        if length > self._limit:
            raise BadFrame(f"a message of {length} bytes, at most {self._limit} are taken")
        end = _LENGTH.size + length
        if len(self._data) < end:
            return None
        message = bytes(self._data[_LENGTH.size : end])
        del self._data[:end]
        return message

    def wait(self) -> bytes | None:
        """The next message, waiting for it; None at the end of the pipe."""
        while (message := self.pop()) is None:
            if not self.fill():
                return None
        return message


def _framed(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload

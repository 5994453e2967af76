"""Messages as packed structs, for a service of one's own: what C++'s `pack` writes and `unpack`
reads.

    READING = Packed("dd")  # there: struct [[gnu::packed]] Reading { double room; double target; };
"""

import struct
from typing import Any

from ipc_bridge.errors import Error, Status
from ipc_bridge.frame import Buffer


class Packed:
    """The shape of a message, by the letters of the module struct; little-endian, without gaps."""

    def __init__(self, letters: str) -> None:
        self._struct = struct.Struct("<" + letters)

    def pack(self, *values: Any) -> bytes:
        """The bytes. Raises struct.error for what does not fit."""
        return self._struct.pack(*values)

    def unpack(self, payload: Buffer) -> tuple[Any, ...]:
        """The values. Raises Error: INVALID_ARGUMENT for bytes of another size."""
        if len(payload) != self._struct.size:
            what = f"{self._struct.size} bytes are wanted, and {len(payload)} came"
            raise Error(Status.INVALID_ARGUMENT, what)
        return self._struct.unpack(payload)

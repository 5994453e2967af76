"""A 1080p image through shared memory, as a numpy array on both sides, without a further copy.

    python docs/examples/image.py

The request says what the bytes are: shape and dtype, then the pixels. How long a view lives: the
handler's request until the handler is done, the client's reply until its next call. An array made
from it by `numpy.frombuffer` is the same memory, so it lives as long; `.copy()` keeps it. (The view
is of the receiver's own buffer, never of memory that the peer could still change.)
"""

import struct
import tempfile
import threading

import numpy as np

from ipc_bridge import Call, Service, connect, serve

INVERT = 1
SHAPE = struct.Struct("<4I8s")  # height, width, channels, 0; dtype, as numpy writes it


def pack(image: np.ndarray) -> bytearray:
    """Shape, dtype and pixels, in one buffer."""
    message = bytearray(SHAPE.size + image.nbytes)
    SHAPE.pack_into(message, 0, *image.shape, 0, image.dtype.str.encode())
    view(message)[:] = image
    return message


def view(message: bytearray | memoryview) -> np.ndarray:
    """The image in a message: no copy, so it lives as long as the message."""
    height, width, channels, _, dtype = SHAPE.unpack_from(message)
    pixels = np.frombuffer(message, np.dtype(dtype.rstrip(b"\0").decode()), offset=SHAPE.size)
    return pixels.reshape(height, width, channels)


def invert(call: Call, request: memoryview) -> bytearray:
    """The handler: `request` is a view that lives until this returns."""
    return pack(255 - view(request))


def main() -> None:
    service = Service()
    service.unary(INVERT, invert)
    image = np.arange(1080 * 1920 * 3, dtype=np.uint8).reshape(1080, 1920, 3)
    with tempfile.TemporaryDirectory() as directory:
        server = serve(f"shm://{directory}/image", service)
        thread = threading.Thread(target=server.run)
        thread.start()
        with server, connect(server.url) as bridge:
            reply = view(bridge.call(INVERT, pack(image), timeout=5.0))
            assert np.array_equal(reply, 255 - image)
            kept = reply.copy()  # `reply` is void after the next call
            bridge.call(INVERT, pack(kept))
            server.stop()
            thread.join()
    print(f"{kept.shape} {kept.dtype}: inverted, {image.nbytes} bytes each way")


if __name__ == "__main__":
    main()

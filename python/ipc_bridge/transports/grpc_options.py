"""What both ends of gRPC know: methods, metadata, sizes and times."""

ECHO = 1  # service's; the typed methods of bridge.proto
STREAM = 2

MAX_PAYLOAD_KEY = "ipc-bridge-max-payload"  # the metadata that tells a client's (bridge.proto)
MESSAGE_EXTRA_BYTES = 64  # tags and sizes around a payload: more than any message here has
KEEPALIVE_MS = 5000  # of silence: then ask. No answer for 20 s more, gRPC's default: gone.

Arguments = list[tuple[str, int | str]]


def message_bytes(payload_bytes: int) -> int:
    """The largest message for a payload; gRPC takes an int, and protobuf makes none larger."""
    return min(payload_bytes + MESSAGE_EXTRA_BYTES, 0x7FFFFFFF)


def too_large(size: int, who: str, size_max: int) -> str:
    return f"payload of {size} bytes, the {who} takes {size_max}"

# gRPC, bare: the generated stubs of Echo and Stream, alone. Pick it for its contract in a .proto
# file and for the tools and languages around it; every call costs its own HTTP/2 stream.
# The trap: a server takes over a port that another one holds, and unlinks another one's socket
# file. so_reuseport=0 remedies the first, a lock beside the path the second. It never spins.
#     python grpc_rpc.py serve unix:/tmp/demo 64 block & sleep 1
#     python grpc_rpc.py ping unix:/tmp/demo 64 block 100000
#     python grpc_rpc.py stream unix:/tmp/demo 64 block 1000000
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter_ns

import grpc
import rounds

from ipc_bridge.bridge_pb2 import EchoReply, EchoRequest, StreamItem, StreamRequest
from ipc_bridge.bridge_pb2_grpc import BridgeServicer, BridgeStub, add_BridgeServicer_to_server

LIMITS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Service(BridgeServicer):
    def Echo(self, request: EchoRequest, context: grpc.ServicerContext) -> EchoReply:  # noqa: N802
        return EchoReply(payload=request.payload)

    def Stream(self, request: StreamRequest, context: grpc.ServicerContext) -> Iterator[StreamItem]:  # noqa: N802
        fillings = b"\x55" * request.size, b"\xaa" * request.size
        for at in range(request.count):
            yield StreamItem(payload=fillings[at % 2])


def serve(words: rounds.Words) -> None:
    options = [("grpc.so_reuseport", 0), *LIMITS]
    server = grpc.server(ThreadPoolExecutor(), options=options)
    add_BridgeServicer_to_server(Service(), server)
    try:
        port = server.add_insecure_port(words.address)
    except RuntimeError:
        rounds.fail("bind", words.address)
    server.start()
    rounds.say(f"ready {words.address if port == 1 else f'127.0.0.1:{port}'}")
    server.wait_for_termination()


def connect(words: rounds.Words) -> BridgeStub:
    return BridgeStub(grpc.insecure_channel(words.address, LIMITS))


def ping(words: rounds.Words) -> None:
    stub = connect(words)
    back = b""

    def call(message: memoryview) -> bool:
        nonlocal back
        try:
            back = stub.Echo(EchoRequest(payload=bytes(message))).payload
        except grpc.RpcError as error:
            rounds.fail("echo", str(error.details()))
        return True

    def answer(message: memoryview) -> bool:
        message[:] = back
        return True

    rounds.measure(words, call, answer)


def stream(words: rounds.Words) -> None:
    fillings = b"\x55" * words.size, b"\xaa" * words.size
    warm_up = words.count // 10
    # It is left: else the server might have done all before us.
    request = StreamRequest(count=1 << 60, size=words.size)
    items = connect(words).Stream(request)
    start = perf_counter_ns()
    try:
        for at, item in zip(range(warm_up + words.count), items, strict=False):
            if at == warm_up:
                start = perf_counter_ns()
            if item.payload != fillings[at % 2]:
                rounds.fail("stream", "other bytes came")
    except grpc.RpcError as error:
        rounds.fail("stream", str(error.details()))
    took = perf_counter_ns() - start
    items.cancel()
    rounds.say(f"items_per_second={words.count * 1_000_000_000 // took}")


if __name__ == "__main__":
    rounds.run("ADDRESS", serve, ping, stream)

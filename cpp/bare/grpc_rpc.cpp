// gRPC, bare: the generated stubs of Echo and Stream, alone. Pick it for its contract in a .proto
// file and for the tools and languages around it; every call costs its own HTTP/2 stream.
// The trap: a server takes over a port that another one holds, and unlinks another one's socket
// file. so_reuseport=0 remedies the first, a lock beside the path the second. It never spins.
//     grpc_rpc serve unix:/tmp/demo 64 block & sleep 1
//     grpc_rpc ping unix:/tmp/demo 64 block 100000
//     grpc_rpc stream unix:/tmp/demo 64 block 1000000
#include <grpcpp/grpcpp.h>

#include "rounds.hpp"
#include <ipc_bridge/bridge.grpc.pb.h>

using namespace ipc_bridge;
class Service : public Bridge::Service {
    grpc::Status Echo(grpc::ServerContext*, const EchoRequest* request, EchoReply* reply) override {
        reply->set_payload(request->payload());
        return grpc::Status::OK;
    }

    grpc::Status Stream(
        grpc::ServerContext*, const StreamRequest* request, grpc::ServerWriter<StreamItem>* writer
    ) override {
        StreamItem item;
        for (std::uint64_t at = 0; at < request->count(); ++at) {
            item.mutable_payload()->assign(request->size(), at % 2 == 0 ? '\x55' : '\xaa');
            if (!writer->Write(item))
                break;
        }
        return grpc::Status::OK;
    }
};

void serve(const rounds::Words& words) {
    Service service;
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort(words.address, grpc::InsecureServerCredentials(), &port);
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.SetMaxReceiveMessageSize(-1);
    builder.RegisterService(&service);
    const auto server = builder.BuildAndStart();
    if (!server)
        rounds::fail("bind", words.address);
    rounds::say("ready " + (port == 1 ? words.address : "127.0.0.1:" + std::to_string(port)));
    server->Wait();
}

auto connect(const rounds::Words& words) {
    grpc::ChannelArguments limits;
    limits.SetMaxReceiveMessageSize(-1);
    const auto open = grpc::InsecureChannelCredentials();
    return Bridge::NewStub(grpc::CreateCustomChannel(words.address, open, limits));
}

void ping(const rounds::Words& words) {
    const auto stub = connect(words);
    EchoRequest request;
    EchoReply reply;
    const auto call = [&](std::span<std::byte> message) {
        grpc::ClientContext context;
        request.set_payload(message.data(), message.size());
        if (const auto status = stub->Echo(&context, request, &reply); !status.ok())
            rounds::fail("echo", status.error_message());
    };
    const auto answer = [&](std::span<std::byte> message) {
        const std::size_t size = message.size();
        return reply.payload().copy(reinterpret_cast<char*>(message.data()), size) == size;
    };
    rounds::measure(words, call, answer);
}

void stream(const rounds::Words& words) {
    const std::string one(words.size, '\x55'), other(words.size, '\xaa');
    const std::size_t warm_up = words.count / 10;
    StreamRequest request;
    request.set_count(1ULL << 60);  // it is left: else the server might have done all before us
    request.set_size(static_cast<std::uint32_t>(words.size));
    grpc::ClientContext context;
    const auto stub = connect(words);
    const auto reader = stub->Stream(&context, request);
    StreamItem item;
    auto start = std::chrono::steady_clock::now();
    for (std::size_t at = 0; at < warm_up + words.count; ++at) {
        if (at == warm_up)
            start = std::chrono::steady_clock::now();
        if (!reader->Read(&item))
            rounds::fail("stream", reader->Finish().error_message());
        if (item.payload() != (at % 2 == 0 ? one : other))
            rounds::fail("stream", "other bytes came");
    }
    const auto ns = static_cast<std::size_t>((std::chrono::steady_clock::now() - start).count());
    context.TryCancel();
    rounds::say("items_per_second=" + std::to_string(words.count * 1'000'000'000 / ns));
}

int main(int argc, char** argv) {
    // (gRPC's threads may still be ending: they must not meet destructors of static objects.)
    std::quick_exit(rounds::run(argc, argv, "ADDRESS", serve, ping, stream));
}

// gRPC, bare: the generated stubs of Echo, alone. Pick it for its contract in a .proto file and for
// the tools and languages around it; every call costs its own HTTP/2 stream.
// The trap: a server takes over a port that another one holds, and unlinks another one's socket
// file. so_reuseport=0 remedies the first, a lock beside the path the second. It never spins.
//     grpc_rpc serve unix:/tmp/demo 64 block & sleep 1
//     grpc_rpc ping unix:/tmp/demo 64 block 100000
#include <grpcpp/grpcpp.h>

#include "rounds.hpp"
#include <ipc_bridge/bridge.grpc.pb.h>

using ipc_bridge::EchoReply, ipc_bridge::EchoRequest;
class Service : public ipc_bridge::Bridge::Service {
    grpc::Status Echo(grpc::ServerContext*, const EchoRequest* request, EchoReply* reply) override {
        reply->set_payload(request->payload());
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

void ping(const rounds::Words& words) {
    grpc::ChannelArguments limits;
    limits.SetMaxReceiveMessageSize(-1);
    const auto open = grpc::InsecureChannelCredentials();
    const auto channel = grpc::CreateCustomChannel(words.address, open, limits);
    const auto stub = ipc_bridge::Bridge::NewStub(channel);
    EchoRequest request;
    EchoReply reply;
    const auto call = [&](std::span<std::byte> message) {
        grpc::ClientContext context;
        request.set_payload(message.data(), message.size());
        const grpc::Status status = stub->Echo(&context, request, &reply);
        if (!status.ok())
            rounds::fail("echo", status.error_message());
    };
    const auto answer = [&](std::span<std::byte> message) {
        const std::size_t size = message.size();
        return reply.payload().copy(reinterpret_cast<char*>(message.data()), size) == size;
    };
    rounds::measure(words, call, answer);
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "ADDRESS", serve, ping);
}

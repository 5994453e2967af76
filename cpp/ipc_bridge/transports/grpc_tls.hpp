// Files of keys for `grpc+tcp`, and what gRPC makes of them; grpc_rpc says how to make them.
#pragma once

#include <memory>
#include <string>

namespace grpc {
class ChannelCredentials;
class ServerCredentials;
}  // namespace grpc

namespace ipc_bridge {

// Files in PEM form that let the peers of `grpc+tcp` know each other; "" for none.
struct Keys {
    std::string ca;    // who signs the other side's certificate
    std::string cert;  // one's own
    std::string key;   // and its private key
    std::string name;  // that a client wants in the server's certificate, instead of the host
};

namespace grpc_rpc {

// Those of a client; null: it has no keys. Throws Error: NOT_FOUND.
std::shared_ptr<grpc::ChannelCredentials> channel_credentials(const Keys& keys);

// Those of a server, which wants its clients' certificates if it has who signs them; null: it has
// no keys. Throws Error: NOT_FOUND.
std::shared_ptr<grpc::ServerCredentials> server_credentials(const Keys& keys);

}  // namespace grpc_rpc
}  // namespace ipc_bridge

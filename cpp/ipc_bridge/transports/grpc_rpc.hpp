// gRPC: `grpc+unix` and `grpc+tcp`, the service of bridge.proto as any gRPC client sees it.
//
// Pick it when others are to call the service too: other languages, grpcurl, proxies, and their
// tools. It is slow, with Python the slowest of all: every call is a stream of HTTP/2, with its own
// headers, and every payload goes through protobuf.
//
// Meeting: gRPC's own. On a Unix socket a lock beside the path comes first, for gRPC's servers take
// each other's paths; `grpc+tcp` serves other hosts only with keys (mutual TLS).
//
// The trap: by default gRPC reads ahead up to megabytes, and more on a fast link, so that a slow
// reader hardly slows its producer. Here a window below the default is fixed: a producer is at most
// that window, and 512 KiB or an item, ahead (measured with 4 KiB items: 0 to 256 KiB). With the
// default, up to 6 MiB were measured, and 11 with a client in C++ over TCP: its gRPC, 1.51, is slow
// unless it may widen the connection's window. Others are remedied where they bite: servers that
// share a port, proxies, channels that share a connection, reconnecting at leisure.
//
// Keys: one's own CA signs a certificate for each side, with the server's host in subjectAltName.
//     openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650
//         -subj /CN=ca -keyout ca.key -out ca.pem
//     openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=server
//         -addext subjectAltName=DNS:HOST -keyout server.key -out server.csr
//     openssl x509 -req -copy_extensions copy -days 365 -in server.csr -CA ca.pem
//         -CAkey ca.key -out server.pem
// and the last two again for the client; then ?ca=ca.pem&cert=server.pem&key=server.key.
//
// gRPC is a session layer: this gives the faces of Client and Server, not a Stream. Its source is a
// file of its own, so that nobody else waits for gRPC's headers to compile.
//
// Copy with it: bridge.proto, grpc_options, grpc_tls, grpc_client, grpc_loop, grpc_calls,
// grpc_methods, grpc_health, grpc_server, errors, frame, session, system, unix_address, client,
// server.
// Run: ipc-bridge-peer serve grpc+unix:///tmp/demo.sock
#pragma once

#include <memory>
#include <string>

#include <ipc_bridge/client.hpp>
#include <ipc_bridge/server.hpp>
#include <ipc_bridge/transports/grpc_tls.hpp>
#include <ipc_bridge/transports/unix_address.hpp>

namespace ipc_bridge {

// An address that gRPC serves.
class Grpc {
  public:
    virtual ~Grpc() = default;

    std::string url;

    // Reach the server. The options and errors are those of Client.
    virtual std::unique_ptr<Caller> connect(const ConnectOptions& options) = 0;

    // Become the server. The options and errors are those of Server, but `clients_max` bounds the
    // calls that run at once, and `window_bytes` has no meaning.
    virtual std::unique_ptr<Callee> serve(Service service, const ServeOptions& options) = 0;
};

// `grpc+unix:///path`: a socket file, mode 0600, and `path.lock` while a server lives.
class GrpcUnix : public Grpc {
  public:
    // Throws Error: INVALID_ARGUMENT for a path that is empty or too long.
    explicit GrpcUnix(const std::string& path);

    std::unique_ptr<Caller> connect(const ConnectOptions& options) override;
    std::unique_ptr<Callee> serve(Service service, const ServeOptions& options) override;

  private:
    UnixAddress address_;
};

// `grpc+tcp://host:port`; port 0 lets the kernel choose. A server binds loopback unless it has keys
// by which it knows its clients, or `allow_remote` is set.
class GrpcTcp : public Grpc {
  public:
    // Throws Error: INVALID_ARGUMENT for a certificate without its key.
    GrpcTcp(std::string host, int port, Keys keys = {}, bool allow_remote = false);

    std::unique_ptr<Caller> connect(const ConnectOptions& options) override;
    std::unique_ptr<Callee> serve(Service service, const ServeOptions& options) override;

  private:
    std::string host_;
    int port_;
    Keys keys_;
    bool allow_remote_;
};

}  // namespace ipc_bridge

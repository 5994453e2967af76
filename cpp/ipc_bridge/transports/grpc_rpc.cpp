// The source of grpc_rpc.hpp.
//
// Which API, and why (gRPC 1.51; figures stand in docs/grpc.md): a thread that waits should read
// the socket itself, and go on with what it has read. In the synchronous API a client's does; a
// server's wakes another first, to wait in its stead, and so do the threads of the callback API. In
// the asynchronous API the threads are ours (`grpc_loop`): one, which answers what it has read, and
// writes a stream's next item. It must not be blocked; of handlers that may block, one at a time
// runs there, beside a second thread, and the others have a thread each.
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include <grpc/grpc.h>
#include <grpcpp/grpcpp.h>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/grpc_client.hpp>
#include <ipc_bridge/transports/grpc_options.hpp>
#include <ipc_bridge/transports/grpc_rpc.hpp>
#include <ipc_bridge/transports/grpc_server.hpp>
#include <ipc_bridge/transports/grpc_tls.hpp>

namespace ipc_bridge {

using namespace grpc_rpc;

namespace {

// gRPC writes what it meets to stderr; what matters here reaches the caller as an Error. Whoever
// wants its log sets GRPC_VERBOSITY.
void quieten() {
    ::setenv("GRPC_VERBOSITY", "NONE", 0);
}

// gRPC stays once there was a server: when the last of its objects goes, it waits for a thread of
// its own, which may wait for a server's socket, for 10 s.
void stay() {
    static const bool stays = (::grpc_init(), true);
    static_cast<void>(stays);
}

// RFC 3986 2.1, for a target of gRPC.
std::string quoted(const std::string& path) {
    constexpr char digits[] = "0123456789ABCDEF";
    std::string out;
    for (const char c : path) {
        const auto byte = static_cast<unsigned char>(c);
        if (std::isalnum(byte) != 0 || std::strchr("/-._~", c) != nullptr) {
            out += c;
        } else {
            out += {'%', digits[byte >> 4U], digits[byte & 15U]};
        }
    }
    return out;
}

struct Place {
    std::string host;  // in numbers
    int family;
    bool is_loopback;
    sockaddr_storage address;
    socklen_t size;
};

Place resolve(const std::string& host, int port, const std::string& url) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    if (::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) {
        throw Error(Status::NOT_FOUND, "unknown host", url);
    }
    Place place{};
    place.family = found->ai_family;
    place.size = found->ai_addrlen;
    std::memcpy(&place.address, found->ai_addr, found->ai_addrlen);
    ::freeaddrinfo(found);
    char name[NI_MAXHOST];
    ::getnameinfo(
        reinterpret_cast<const sockaddr*>(&place.address),
        place.size,
        name,
        sizeof(name),
        nullptr,
        0,
        NI_NUMERICHOST
    );
    place.host = name;
    if (place.family == AF_INET6) {
        const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&place.address);
        place.is_loopback = IN6_IS_ADDR_LOOPBACK(&v6->sin6_addr);
    } else {
        const auto* v4 = reinterpret_cast<const sockaddr_in*>(&place.address);
        place.is_loopback = (ntohl(v4->sin_addr.s_addr) >> 24U) == 127;
    }
    return place;
}

std::string authority(const std::string& host, int port) {
    const bool is_v6 = host.find(':') != std::string::npos;
    return (is_v6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

// gRPC does not say why it cannot listen: bind the address once before it does. Throws Error.
void check_free(const Place& place, const std::string& url) {
    const Fd fd(checked(::socket(place.family, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket", url));
    const int on = 1;
    checked(::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)), "setsockopt", url);
    checked(
        ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&place.address), place.size), "bind", url
    );
    checked(::listen(fd.get(), 1), "bind", url);
}

}  // namespace

GrpcUnix::GrpcUnix(const std::string& path) : address_(path, "grpc+unix://" + path, SOCK_STREAM) {
    url = address_.url;
}

std::unique_ptr<Caller> GrpcUnix::connect(const ConnectOptions& options) {
    quieten();
    const std::int64_t deadline_ns = deadline_after(options.timeout);
    // Once by ourselves: gRPC asks nobody whose socket it is, and is slow to try again.
    address_.connect(deadline_ns).close();
    auto client = std::make_unique<RpcClient>(
        "unix:" + quoted(address_.path),
        grpc::InsecureChannelCredentials(),
        grpc::ChannelArguments(),
        url,
        options
    );
    client->meet(deadline_ns, "no server");
    return client;
}

std::unique_ptr<Callee> GrpcUnix::serve(Service service, const ServeOptions& options) {
    quieten();
    stay();
    auto lock = std::make_shared<Lock>(address_.path + ".lock");
    address_.reclaim();
    // The file is born with its mode. (umask(2) is the process's: others that make files now get
    // narrower ones.)
    const mode_t before = ::umask(0177);
    std::unique_ptr<RpcServer> server;
    try {
        server = std::make_unique<RpcServer>(
            "unix:" + quoted(address_.path),
            grpc::InsecureServerCredentials(),
            false,
            [url = url](int) { return url; },
            [path = address_.path, lock] {
                ::unlink(path.c_str());
                lock->close();
            },
            std::move(service),
            options
        );
    } catch (...) {
        ::umask(before);
        throw;
    }
    ::umask(before);
    return server;
}

GrpcTcp::GrpcTcp(std::string host, int port, Keys keys, bool allow_remote)
    : host_(std::move(host)), port_(port), keys_(std::move(keys)), allow_remote_(allow_remote) {
    url = "grpc+tcp://" + authority(host_, port_);
    if (keys_.cert.empty() != keys_.key.empty()) {
        throw Error(Status::INVALID_ARGUMENT, "cert and key go together", url);
    }
}

std::unique_ptr<Caller> GrpcTcp::connect(const ConnectOptions& options) {
    quieten();
    const std::int64_t deadline_ns = deadline_after(options.timeout);
    const Place place = resolve(host_, port_, url);
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive_ms);
    auto credentials = channel_credentials(keys_);
    std::string missing = "no server";
    if (credentials) {
        missing = "no server, or none that shares our keys";
        arguments.SetSslTargetNameOverride(keys_.name.empty() ? host_ : keys_.name);
    }
    auto client = std::make_unique<RpcClient>(
        authority(place.host, port_),
        credentials ? credentials : grpc::InsecureChannelCredentials(),
        arguments,
        url,
        options
    );
    client->meet(deadline_ns, missing);
    return client;
}

std::unique_ptr<Callee> GrpcTcp::serve(Service service, const ServeOptions& options) {
    quieten();
    stay();
    const Place place = resolve(host_, port_, url);
    const bool knows_clients = !keys_.ca.empty() && !keys_.cert.empty();
    if (!place.is_loopback && !knows_clients && !allow_remote_) {
        throw Error(
            Status::PERMISSION_DENIED,
            "not a loopback address: ?ca=F&cert=F&key=F serves hosts with keys, "
            "?allow_remote=1 any",
            url
        );
    }
    if (!keys_.ca.empty() && keys_.cert.empty()) {
        throw Error(Status::INVALID_ARGUMENT, "a server with ca needs cert and key", url);
    }
    const auto credentials = server_credentials(keys_);
    check_free(place, url);
    return std::make_unique<RpcServer>(
        authority(place.host, port_),
        credentials ? credentials : grpc::InsecureServerCredentials(),
        credentials != nullptr,
        [host = host_](int port) { return "grpc+tcp://" + authority(host, port); },
        [] {},
        std::move(service),
        options
    );
}

}  // namespace ipc_bridge

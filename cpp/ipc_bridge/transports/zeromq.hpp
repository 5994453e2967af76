// ZeroMQ: `zmq+ipc` (one machine) and `zmq+tcp` (other hosts too), DEALER to ROUTER.
//
// Pick it when ZeroMQ is what your programs speak already, or for its encryption (CURVE). It costs
// two more thread switches each way than a plain socket, as a thread of libzmq's own moves the
// bytes.
//
// Meeting: a ROUTER binds, a DEALER connects. After the routing id, the parts of a message, joined,
// are whole frames; small ones share a part, a large payload is one. An empty message is the end of
// the server's output: a ROUTER cannot hang up on one client.
//
// The traps, all of one kind: ZeroMQ hides what happens to a connection.
// - A DEALER connects again by itself, and hands an old call to a new server. RECONNECT_IVL=-1 or
//   IMMEDIATE=1 prevent that, but drop what has come and is not read yet when the connection ends:
//   so the interval is 24 days here, and the socket's monitor tells of the end.
// - A ROUTER drops what it cannot deliver, unless ROUTER_MANDATORY is set, or above a high-water
//   mark: so there is none. The session's credit bounds what is sent ahead; for who sends calls and
//   reads no answers a ROUTER cannot tell what waits, or stop reading him: so now and then a
//   message is sent that says when it has left (zmq_msg_init_data(3)), and his input is limited.
//   POLLOUT of a ROUTER is always true. (A DEALER is bounded likewise: requests whose deadlines
//   pass would heap up before a server that stands still.)
// - Whose connection has ended? The monitor names a descriptor, and so does a client's first
//   message.
// - ZMQ_FD says that something may have changed, once: whoever sleeps on it looks at EVENTS before,
//   after his last call to the socket. A zmq_recv(3) that waits does all that in one call, but sees
//   no monitor: so it is short.
// - A second bind takes an ipc path over without a word: hence the lock, and a socket bound by us.
//
// Copy with it: zeromq_socket, zeromq_curve, zeromq_client, zeromq_server, errors, system,
// unix_address (and frame, session, client, server for the calls on top). Run: ipc-bridge-peer
// serve zmq+ipc:///tmp/demo.sock
#pragma once

#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <zmq.hpp>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/unix_address.hpp>
#include <ipc_bridge/transports/zeromq_client.hpp>
#include <ipc_bridge/transports/zeromq_curve.hpp>
#include <ipc_bridge/transports/zeromq_server.hpp>
#include <ipc_bridge/transports/zeromq_socket.hpp>

namespace ipc_bridge {
namespace zeromq {

// 24 days: never; see above.
inline constexpr int reconnect_ivl_ms = std::numeric_limits<int>::max();
// Who says no ZMTP greeting in this time is a stranger, and hung up on.
inline constexpr int handshake_ivl_ms = 5'000;
// Of MAXMSGSIZE, above a payload: small frames that share a part.
inline constexpr std::int64_t part_bytes_more = 1 << 20;
// Silence, then a probe a second unanswered: the host is gone (tcp(7)).
inline constexpr int probe_after_s = 5;
inline constexpr int probes = 5;
// Above two payloads: who is not read and sends more is hung up on.
inline constexpr std::size_t inbox_bytes_more = 2U << 20;

}  // namespace zeromq

// What both schemes share: the sockets' options, and reaching a server.
class Zmq : public Transport {
  public:
    std::unique_ptr<Stream> connect(std::int64_t deadline_ns) override {
        std::optional<zeromq::CurveKeys> keys;
        if (has_keys()) {
            keys.emplace(curve_);
        }
        std::int64_t pause_ns = connect_retry_ns[0];
        while (true) {
            if (auto stream = attempt(keys, deadline_ns)) {
                return stream;
            }
            check_refusal();
            const std::int64_t left_ns = deadline_ns - now_ns();
            if (left_ns <= 0) {
                const char* missing =
                    keys ? "no server, or none that shares our keys" : "no server";
                throw Error(Status::UNAVAILABLE, missing, url);
            }
            sleep_ns(std::min(pause_ns, left_ns));
            pause_ns = std::min(2 * pause_ns, connect_retry_ns[1]);
        }
    }

  protected:
    // `curve` is a file of keys, read when they are needed, or "". Throws Error: INVALID_ARGUMENT
    // for a wait that cannot be.
    Zmq(std::string url_, std::string address, Wait wait, std::string curve)
        : address_(std::move(address)), curve_(std::move(curve)) {
        if (wait == Wait::SPIN) {
            throw Error(
                Status::INVALID_ARGUMENT,
                "ZeroMQ has no spin: its own threads would starve; wait is block",
                url_
            );
        }
        url = std::move(url_);
    }

    bool has_keys() const { return !curve_.empty(); }

    // May we talk to whom we have reached? False: try again.
    virtual bool check_server(int fd) const = 0;

    // Throw an Error if another attempt is in vain.
    virtual void check_refusal() const {}

    // With the port filled in.
    virtual std::string url_of(zmq::socket_t& /*router*/) const { return url; }

    // Set what both ends need (zmq_setsockopt(3)).
    virtual void prepare(zmq::socket_t& socket) const {
        socket.set(zmq::sockopt::sndhwm, 0);  // a ROUTER would drop, a DEALER block; see above
        socket.set(zmq::sockopt::rcvhwm, 0);
        socket.set(zmq::sockopt::rcvtimeo, zeromq::receive_ms);
        socket.set(zmq::sockopt::handshake_ivl, zeromq::handshake_ivl_ms);
        // What a peer may make libzmq hold before a frame's size is looked at.
        socket.set(
            zmq::sockopt::maxmsgsize, std::int64_t{payload_bytes_max} + zeromq::part_bytes_more
        );
        socket.set(zmq::sockopt::ipv6, true);
    }

    // Give a listening socket to a ROUTER; -1: it binds one itself.
    std::unique_ptr<Listener> listen_on(int fd, bool is_local, std::function<void()> cleanup) {
        auto context = std::make_unique<zmq::context_t>();
        context->set(zmq::ctxopt::max_sockets, zeromq::sockets_max);
        zmq::socket_t router(*context, zmq::socket_type::router);
        zmq::socket_t monitor;
        std::unique_ptr<zeromq::KeyChecker> checker;
        try {
            prepare(router);
            if (has_keys()) {
                const zeromq::CurveKeys keys(curve_);
                keys.prepare_router(router);
                checker = std::make_unique<zeromq::KeyChecker>(*context, keys);
            }
            router.set(zmq::sockopt::linger, 0);
            router.set(zmq::sockopt::router_mandatory, true);  // else it drops the undeliverable
            if (fd >= 0) {
                set(router, ZMQ_USE_FD, fd);
            }
            constexpr int events = ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_DISCONNECTED;
            monitor = zeromq::make_monitor(*context, router, events);
            router.bind(address_);
        } catch (const zmq::error_t& error) {
            throw SystemError("bind", error.num(), url);
        }
        const std::string bound = url_of(router);
        return std::make_unique<zeromq::RouterHub>(
            std::make_shared<zeromq::Router>(
                std::move(context),
                std::move(router),
                std::move(monitor),
                bound,
                std::move(checker),
                is_local,
                std::move(cleanup),
                2 * std::size_t{payload_bytes_max} + zeromq::inbox_bytes_more
            ),
            bound
        );
    }

  private:
    // Connect once; null if no server answers (yet).
    std::unique_ptr<Stream> attempt(
        const std::optional<zeromq::CurveKeys>& keys, std::int64_t deadline_ns
    ) {
        zmq::socket_t dealer = zeromq::Clients::all().open();
        zmq::socket_t monitor;
        const auto undo = [&] {
            if (monitor) {
                zeromq::close_monitor(dealer, monitor);
            }
            zeromq::Clients::all().close(std::move(dealer));
        };
        try {
            prepare(dealer);
            dealer.set(zmq::sockopt::reconnect_ivl, zeromq::reconnect_ivl_ms);
            if (keys) {
                keys->prepare_dealer(dealer);
            }
            monitor = zeromq::make_monitor(zeromq::Clients::all().context(), dealer, ZMQ_EVENT_ALL);
            dealer.connect(address_);
            if (shake_hands(monitor, deadline_ns)) {
                return std::make_unique<zeromq::DealerStream>(
                    std::move(dealer), std::move(monitor), url
                );
            }
        } catch (const zmq::error_t& error) {
            undo();
            throw SystemError("connect", error.num(), url);
        } catch (...) {
            undo();
            throw;
        }
        undo();
        return nullptr;
    }

    bool shake_hands(zmq::socket_t& monitor, std::int64_t deadline_ns) const {
        pollfd fd{zeromq::fd_of(monitor), POLLIN, 0};
        do {
            for (const zeromq::Event& event : zeromq::events_of(monitor)) {
                switch (event.number) {
                    case ZMQ_EVENT_CONNECTED:
                        if (!check_server(event.value)) {
                            return false;
                        }
                        break;
                    case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
                        return true;
                    case ZMQ_EVENT_HANDSHAKE_FAILED_AUTH:
                    case ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL:
                        throw Error(
                            Status::UNAUTHENTICATED,
                            "no handshake: another protocol, or CURVE keys that one end does not "
                            "know",
                            url
                        );
                    case ZMQ_EVENT_CLOSED:
                    case ZMQ_EVENT_DISCONNECTED:
                        return false;
                    default:
                        break;
                }
            }
        } while (sleep_until_ready({&fd, 1}, deadline_ns));
        return false;
    }

    static void set(zmq::socket_t& socket, int option, int value) {
        if (::zmq_setsockopt(socket.handle(), option, &value, sizeof(value)) < 0) {
            throw zmq::error_t();
        }
    }

    std::string address_;
    std::string curve_;
};

// `zmq+ipc:///path`: a socket file, mode 0600, and `path.lock` while a server lives.
class ZmqIpc : public Zmq {
  public:
    // Throws Error: INVALID_ARGUMENT for a path that is empty or too long; as Zmq.
    explicit ZmqIpc(const std::string& path, Wait wait = Wait::BLOCK, const std::string& curve = "")
        : Zmq("zmq+ipc://" + path, "ipc://" + path, wait, curve), unix_(path, url, SOCK_STREAM) {}

    std::unique_ptr<Listener> listen() override {
        auto door = std::make_shared<UnixDoor>(unix_.listen());
        try {
            return listen_on(door->fd.release(), true, [door] { door->close(); });
        } catch (...) {
            door->close();
            throw;
        }
    }

  private:
    // libzmq keeps the errno of connect(2) to itself.
    void check_refusal() const override {
        if (unix_.attempt()) {
            return;
        }
        const auto& later = unix_address::later;
        if (std::find(later.begin(), later.end(), errno) == later.end()) {
            throw SystemError("connect", errno, url);
        }
    }

    bool check_server(int fd) const override {
        try {
            check_peer(fd, url);
            return true;
        } catch (const SystemError&) {  // it has gone already, and libzmq has closed its descriptor
            return false;
        }
    }

    UnixAddress unix_;
};

// `zmq+tcp://host:port`; port 0 lets the kernel choose. A server binds loopback unless it has keys,
// or `allow_remote` is set: there is neither encryption nor a password then.
class ZmqTcp : public Zmq {
  public:
    ZmqTcp(
        std::string host,
        int port,
        Wait wait = Wait::BLOCK,
        const std::string& curve = "",
        bool allow_remote = false
    )
        : Zmq("zmq+tcp://" + join(host, std::to_string(port)),
              "tcp://" + join(host, std::to_string(port)),
              wait,
              curve),
          host_(std::move(host)),
          allow_remote_(allow_remote) {}

    std::unique_ptr<Listener> listen() override {
        if (!has_keys() && !allow_remote_ && !is_loopback()) {
            throw Error(
                Status::PERMISSION_DENIED,
                "not a loopback address: it takes keys, ?curve=FILE (or ?allow_remote=1)",
                url
            );
        }
        return listen_on(-1, false, [] {});
    }

  private:
    static std::string join(const std::string& host, const std::string& port) {
        const bool is_v6 = host.find(':') != std::string::npos;
        return (is_v6 ? "[" + host + "]" : host) + ":" + port;
    }

    void prepare(zmq::socket_t& socket) const override {
        Zmq::prepare(socket);
        socket.set(zmq::sockopt::tcp_keepalive, 1);  // a host that fell silent
        socket.set(zmq::sockopt::tcp_keepalive_idle, zeromq::probe_after_s);
        socket.set(zmq::sockopt::tcp_keepalive_intvl, 1);
        socket.set(zmq::sockopt::tcp_keepalive_cnt, zeromq::probes);
    }

    bool is_loopback() const {
        addrinfo hints{};
        hints.ai_socktype = SOCK_STREAM;
        addrinfo* found = nullptr;
        if (::getaddrinfo(host_.c_str(), nullptr, &hints, &found) != 0) {
            throw Error(Status::NOT_FOUND, "unknown host", url);
        }
        const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, ::freeaddrinfo);
        if (found->ai_family == AF_INET) {
            const auto* address = reinterpret_cast<const sockaddr_in*>(found->ai_addr);
            return (ntohl(address->sin_addr.s_addr) >> 24U) == 127;
        }
        const auto* address = reinterpret_cast<const sockaddr_in6*>(found->ai_addr);
        return IN6_IS_ADDR_LOOPBACK(&address->sin6_addr);
    }

    std::string url_of(zmq::socket_t& router) const override {
        const auto endpoint = router.get(zmq::sockopt::last_endpoint);
        return "zmq+tcp://" + join(host_, endpoint.substr(endpoint.rfind(':') + 1));
    }

    // A port of the ephemeral range with no server: TCP may meet itself there.
    bool check_server(int fd) const override {
        sockaddr_storage here{};
        sockaddr_storage there{};
        socklen_t size = sizeof(here);
        socklen_t size_there = sizeof(there);
        return ::getsockname(fd, reinterpret_cast<sockaddr*>(&here), &size) == 0 &&
               ::getpeername(fd, reinterpret_cast<sockaddr*>(&there), &size_there) == 0 &&
               (size != size_there || std::memcmp(&here, &there, size) != 0);
    }

    std::string host_;
    bool allow_remote_;
};

}  // namespace ipc_bridge

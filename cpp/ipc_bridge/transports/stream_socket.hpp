// Stream sockets: `unix` (one machine) and `tcp` (also the next one).
//
// Pick `unix` when in doubt: bidirectional, the kernel names the peer's user, and its end shows at
// once. Pick `tcp` when the peers may part one day; it costs about half as much again on loopback.
//
// Meeting: listen and accept. `unix` takes a lock beside its address first, so that a second server
// is told so and the socket of a dead one is reclaimed; for `tcp` the kernel's own rule suffices.
//
// The trap: a socket is a stream, so a read may end anywhere and a write may be partial. Others are
// remedied where they bite below: Nagle's delay, SIGPIPE, connecting to oneself, full descriptors.
//
// Copy with it: errors, system, unix_address (and frame, session, client, server for the calls).
// Run: ipc-bridge-peer serve unix:///tmp/demo.sock
#pragma once

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/unix_address.hpp>

namespace ipc_bridge {
namespace stream_socket {

// Of a Unix socket. Linux doubles it (socket(7)), so a frame of 1 MiB wakes its reader once; with
// the default, 208 KiB, five times. net.core.wmem_max bounds it. (TCP sizes its own: tcp(7).)
inline constexpr int send_buffer_bytes = 512 << 10;
// Silence, then a probe a second unanswered: the host is gone (tcp(7)).
inline constexpr int probe_after_s = 5;
inline constexpr int probes = 5;
// ENOTCONN: the server went at once, which getpeername(2) tells.
inline constexpr std::initializer_list<int> later = {
    ECONNREFUSED, ECONNRESET, ENOTCONN, EADDRNOTAVAIL, EHOSTUNREACH};

// end_of_stream for the errors that mean that the peer has gone; others are thrown.
inline std::ptrdiff_t end_of(int number) {
    if (number == EAGAIN) {
        return would_block;
    }
    if (number == EPIPE || number == ECONNRESET || number == ETIMEDOUT || number == EHOSTUNREACH) {
        return end_of_stream;
    }
    throw SystemError("recv or send", number, "socket");
}

// A connected socket, in blocking mode: MSG_DONTWAIT says where not to wait, so that a reader with
// nothing else to do sleeps and reads in one system call.
class SocketStream : public Stream {
  public:
    SocketStream(Fd fd, Wait wait) : Stream(wait), fd_(std::move(fd)) {
        const int flags = ::fcntl(fd_.get(), F_GETFL);
        ::fcntl(fd_.get(), F_SETFL, flags & ~O_NONBLOCK);
    }

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override {
        return receive(buffer, MSG_DONTWAIT);
    }

    std::ptrdiff_t try_write(std::span<const std::span<const std::byte>> buffers) override {
        constexpr int flags = MSG_DONTWAIT | MSG_NOSIGNAL;
        ssize_t count = 0;
        if (buffers.size() == 1) {
            count = retrying([&] {
                return ::send(fd_.get(), buffers[0].data(), buffers[0].size(), flags);
            });
        } else {
            // An iovec is a pointer and a size, as a span is, but for the const.
            static_assert(sizeof(std::span<const std::byte>) == sizeof(iovec));
            msghdr message{};
            message.msg_iov =
                reinterpret_cast<iovec*>(const_cast<std::span<const std::byte>*>(buffers.data()));
            message.msg_iovlen = buffers.size();
            count = retrying([&] { return ::sendmsg(fd_.get(), &message, flags); });
        }
        return count >= 0 ? count : end_of(errno);
    }

    bool wait(bool readable, bool writable, std::int64_t deadline_ns) override {
        const int events = (readable ? POLLIN : 0) | (writable ? POLLOUT : 0);
        pollfd fd{fd_.get(), static_cast<short>(events), 0};
        return sleep_until_ready({&fd, 1}, deadline_ns);
    }

    int fileno() const override { return fd_.get(); }

    void interrupt() override { ::shutdown(fd_.get(), SHUT_RD); }

    void close() override { fd_.close(); }

  protected:
    std::ptrdiff_t sleep_and_read(std::span<std::byte> buffer, std::int64_t deadline_ns) override {
        if (deadline_ns != never) {
            return Stream::sleep_and_read(buffer, deadline_ns);
        }
        return receive(buffer, 0);
    }

  private:
    std::ptrdiff_t receive(std::span<std::byte> buffer, int flags) {
        const ssize_t count =
            retrying([&] { return ::recv(fd_.get(), buffer.data(), buffer.size(), flags); });
        if (count > 0) {
            return count;
        }
        return count == 0 ? end_of_stream : end_of(errno);
    }

    Fd fd_;
};

// A listening socket; `admit` says whether a client may stay, by throwing Error.
class SocketListener : public Listener {
  public:
    SocketListener(
        Fd fd,
        std::string url_,
        Wait wait,
        std::function<void(int)> admit,
        std::function<void()> cleanup
    )
        : fd_(std::move(fd)), wait_(wait), admit_(std::move(admit)), cleanup_(std::move(cleanup)) {
        url = std::move(url_);
    }
    ~SocketListener() override { close(); }

    std::unique_ptr<Stream> accept() override {
        while (true) {
            pollfd fds[] = {{wakeup_.fileno(), POLLIN, 0}, {fd_.get(), POLLIN, 0}};
            sleep_until_ready(fds, never);
            if (stopped_) {
                return nullptr;
            }
            Fd client(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC));
            if (!client) {
                if (is_exhausted(errno)) {  // still readable: without a pause this would spin
                    sleep_until_ready({fds, 1}, now_ns() + retry_ns);
                }
                continue;  // anything else concerns a client that has left already: accept(2)
            }
            try {
                admit_(client.get());
                return std::make_unique<SocketStream>(std::move(client), wait_);
            } catch (const Error&) {
            }
        }
    }

    void interrupt() override {
        stopped_ = true;
        wakeup_.set();
    }

    void close() override {
        fd_.close();
        if (auto cleanup = std::exchange(cleanup_, nullptr)) {
            cleanup();
        }
    }

  private:
    Fd fd_;
    Wait wait_;
    std::function<void(int)> admit_;
    std::function<void()> cleanup_;
    Wakeup wakeup_;
    std::atomic<bool> stopped_ = false;
};

// Set what every Unix connection of ours needs.
inline void widen(int fd) {
    const int bytes = send_buffer_bytes;
    checked(::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)), "setsockopt", "unix");
}

inline std::string tcp_url(const std::string& host, int port) {
    const bool is_v6 = host.find(':') != std::string::npos;
    return "tcp://" + (is_v6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

// Set what every TCP connection of ours needs (tcp(7)). TCP_USER_TIMEOUT is not of that kind: it
// also ends a connection whose reader stops for that long, though its host answers all the time.
inline void prepare(int fd) {
    const auto set = [fd](int level, int option, int value) {
        checked(::setsockopt(fd, level, option, &value, sizeof(value)), "setsockopt", "tcp");
    };
    set(IPPROTO_TCP, TCP_NODELAY, 1);  // a reply must not wait for an ACK
    set(SOL_SOCKET, SO_KEEPALIVE, 1);  // a host that fell silent
    set(IPPROTO_TCP, TCP_KEEPIDLE, probe_after_s);
    set(IPPROTO_TCP, TCP_KEEPINTVL, 1);
    set(IPPROTO_TCP, TCP_KEEPCNT, probes);
}

}  // namespace stream_socket

// `unix:///path`: a socket file, mode 0600, and `path.lock` while a server lives.
class Unix : public Transport {
  public:
    // Throws Error: INVALID_ARGUMENT for a path that is empty or too long.
    explicit Unix(const std::string& path, Wait wait = Wait::ADAPTIVE)
        : address_(path, "unix://" + path, SOCK_STREAM), wait_(wait) {
        url = "unix://" + path;
    }

    std::unique_ptr<Stream> connect(std::int64_t deadline_ns) override {
        Fd fd = address_.connect(deadline_ns);
        stream_socket::widen(fd.get());
        return std::make_unique<stream_socket::SocketStream>(std::move(fd), wait_);
    }

    std::unique_ptr<Listener> listen() override {
        auto door = std::make_shared<UnixDoor>(address_.listen());
        return std::make_unique<stream_socket::SocketListener>(
            std::move(door->fd),
            url,
            wait_,
            [where = url](int client) {
                check_peer(client, where);
                stream_socket::widen(client);
            },
            [door] { door->close(); }
        );
    }

  private:
    UnixAddress address_;
    Wait wait_;
};

// `tcp://host:port`; port 0 lets the kernel choose. A server binds loopback unless `allow_remote`
// is set: there is neither encryption nor a password on this wire.
class Tcp : public Transport {
  public:
    Tcp(std::string host, int port, Wait wait = Wait::ADAPTIVE, bool allow_remote = false)
        : host_(std::move(host)), port_(port), wait_(wait), allow_remote_(allow_remote) {
        url = stream_socket::tcp_url(host_, port_);
    }

    std::unique_ptr<Stream> connect(std::int64_t deadline_ns) override {
        const auto attempt = [&]() -> Fd {
            const Address address = resolve();
            Fd fd = make_socket(address, SOCK_NONBLOCK);
            const int number = connect_by(fd.get(), address, deadline_ns);
            if (number != 0) {
                fd.close();
                errno = number;
                return fd;
            }
            stream_socket::prepare(fd.get());
            return fd;
        };
        return std::make_unique<stream_socket::SocketStream>(
            persist(attempt, stream_socket::later, url, deadline_ns), wait_
        );
    }

    std::unique_ptr<Listener> listen() override {
        const Address address = resolve();
        if (!allow_remote_ && !is_loopback(address)) {
            throw Error(
                Status::PERMISSION_DENIED,
                "not a loopback address; ?allow_remote=1 serves other hosts, unencrypted",
                url
            );
        }
        Fd fd = make_socket(address, SOCK_NONBLOCK);
        // Else the connections of an earlier server block its port for a minute: socket(7).
        const int on = 1;
        checked(
            ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)), "setsockopt", url
        );
        checked(::bind(fd.get(), address.get(), address.size), "bind", url);
        checked(::listen(fd.get(), unix_address::backlog), "bind", url);
        Address bound;
        checked(::getsockname(fd.get(), bound.get(), &bound.size), "getsockname", url);
        // Both families keep the port at the same place.
        const int port = ntohs(reinterpret_cast<const sockaddr_in*>(&bound.storage)->sin_port);
        return std::make_unique<stream_socket::SocketListener>(
            std::move(fd), stream_socket::tcp_url(host_, port), wait_, stream_socket::prepare, [] {}
        );
    }

  private:
    struct Address {
        sockaddr_storage storage{};
        socklen_t size = sizeof(storage);
        sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
        const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
    };

    static Fd make_socket(const Address& address, int flags) {
        const int family = address.storage.ss_family;
        return Fd(checked(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | flags, 0), "socket", "tcp")
        );
    }

    // 0 once connected, else an errno.
    static int connect_by(int fd, const Address& address, std::int64_t deadline_ns) {
        if (::connect(fd, address.get(), address.size) < 0) {
            if (errno != EINPROGRESS) {
                return errno;
            }
            pollfd ready{fd, POLLOUT, 0};
            if (!sleep_until_ready({&ready, 1}, deadline_ns)) {
                return ECONNREFUSED;
            }
            int number = 0;
            socklen_t size = sizeof(number);
            ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &number, &size);
            if (number != 0) {
                return number;
            }
        }
        Address here;
        Address there;
        ::getsockname(fd, here.get(), &here.size);
        if (::getpeername(fd, there.get(), &there.size) < 0) {
            return errno;
        }
        // A port of the ephemeral range with no server: TCP may meet itself there.
        const bool is_self =
            here.size == there.size && std::memcmp(&here.storage, &there.storage, here.size) == 0;
        return is_self ? ECONNREFUSED : 0;
    }

    Address resolve() const {
        addrinfo hints{};
        hints.ai_socktype = SOCK_STREAM;
        addrinfo* found = nullptr;
        if (::getaddrinfo(host_.c_str(), std::to_string(port_).c_str(), &hints, &found) != 0) {
            throw Error(Status::NOT_FOUND, "unknown host", url);
        }
        Address address;
        address.size = found->ai_addrlen;
        std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
        ::freeaddrinfo(found);
        return address;
    }

    static bool is_loopback(const Address& address) {
        if (address.storage.ss_family == AF_INET6) {
            const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&address.storage);
            return IN6_IS_ADDR_LOOPBACK(&v6->sin6_addr);
        }
        const auto* v4 = reinterpret_cast<const sockaddr_in*>(&address.storage);
        return (ntohl(v4->sin_addr.s_addr) >> 24U) == 127;
    }

    std::string host_;
    int port_;
    Wait wait_;
    bool allow_remote_;
};

}  // namespace ipc_bridge

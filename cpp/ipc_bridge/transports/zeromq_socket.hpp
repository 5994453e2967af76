// What ZeroMQ's sockets need at both ends: to receive, to send, and to be told of events.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <zmq.hpp>

#include <ipc_bridge/system.hpp>

namespace ipc_bridge::zeromq {

// Of a context; a client takes three, and the default is 1023.
inline constexpr int sockets_max = 65'535;
// For so long a receive waits by itself: most messages come by then, and death is seen soon after.
inline constexpr int receive_ms = 5;

// That libzmq holds for a peer; beyond, nothing is taken for it.
inline constexpr std::size_t unsent_bytes_max = 4U << 20;
// So often it is asked to tell when it has sent what it holds.
inline constexpr std::size_t mark_bytes = 256U << 10;
// And looked for that, while a peer does not read: nothing wakes us.
inline constexpr std::int64_t unsent_look_ns = 5'000'000;

using Buffers = std::span<const std::span<const std::byte>>;
using Receive = bool(zmq::socket_t&, zmq::message_t&);  // false: nothing

// Receive what is there; false: nothing.
inline bool receive(zmq::socket_t& socket, zmq::message_t& part) {
    return retrying([&] { return ::zmq_msg_recv(part.handle(), socket.handle(), ZMQ_DONTWAIT); }) >=
           0;
}

// Wait for receive_ms, or until a signal comes, and receive; false: nothing. It is one call where
// poll(2) and libzmq's ways around it are three, but sees nothing except messages.
inline bool await(zmq::socket_t& socket, zmq::message_t& part) {
    return ::zmq_msg_recv(part.handle(), socket.handle(), 0) >= 0;
}

// Is there time for `await`?
inline bool is_far(std::int64_t deadline_ns) {
    return deadline_ns == never || deadline_ns - now_ns() > std::int64_t{receive_ms} * 1'000'000;
}

inline bool is_readable(zmq::socket_t& socket) {
    return (socket.get(zmq::sockopt::events) & ZMQ_POLLIN) != 0;
}

// Send one message, of which `buffers` are the parts, behind what was sent with SNDMORE: the count
// of bytes, or -1 and errno.
//
// Copied into the message, also large ones: by reference they would have to live until libzmq has
// sent them, but a call whose deadline passes returns before. (It would save 8% of the time of an
// echo of 1 MiB. Python's bytes live for as long as anybody wants them, and go by reference.)
inline std::ptrdiff_t send(zmq::socket_t& socket, Buffers buffers) {
    std::ptrdiff_t size = 0;
    for (std::size_t i = 0; i < buffers.size(); ++i) {
        const int flags = i + 1 < buffers.size() ? ZMQ_DONTWAIT | ZMQ_SNDMORE : ZMQ_DONTWAIT;
        const auto& part = buffers[i];
        if (retrying([&] { return ::zmq_send(socket.handle(), part.data(), part.size(), flags); }) <
            0) {
            return -1;
        }
        size += static_cast<std::ptrdiff_t>(part.size());
    }
    return size;
}

inline std::size_t size_of(Buffers buffers) {
    std::size_t size = 0;
    for (const auto& part : buffers) {
        size += part.size();
    }
    return size;
}

// What was written to one peer, and is not sent yet: libzmq takes all, also for a peer that reads
// nothing. This is the bound, as a socket's buffer is elsewhere.
class Unsent {
  public:
    std::int64_t taken = 0;  // bytes written

    bool has_room() const { return taken - *sent_ <= std::int64_t{unsent_bytes_max}; }

    // As `zeromq::send`.
    std::ptrdiff_t send(zmq::socket_t& socket, Buffers buffers) {
        if (!is_due(buffers)) {
            return zeromq::send(socket, buffers);
        }
        for (const auto& part : buffers) {
            const bool last = &part == &buffers.back();
            zmq::message_t message = last ? mark(part) : copy(part);
            const int flags = last ? ZMQ_DONTWAIT : ZMQ_DONTWAIT | ZMQ_SNDMORE;
            if (retrying([&] { return ::zmq_msg_send(message.handle(), socket.handle(), flags); }) <
                0) {
                return -1;
            }
        }
        return static_cast<std::ptrdiff_t>(size_of(buffers));
    }

    // The parts of a message, for another thread to send.
    std::vector<zmq::message_t> hand(Buffers buffers) {
        const bool due = is_due(buffers);
        std::vector<zmq::message_t> parts;
        for (const auto& part : buffers) {
            parts.push_back(due && &part == &buffers.back() ? mark(part) : copy(part));
        }
        return parts;
    }

  private:
    // Is the last part of a message, which is handed over now, to tell when it was sent?
    bool is_due(Buffers buffers) {
        handed_ += static_cast<std::int64_t>(size_of(buffers));
        if (handed_ - marked_ < std::int64_t{mark_bytes}) {
            return false;
        }
        marked_ = handed_;
        return true;
    }

    static zmq::message_t copy(std::span<const std::byte> bytes) {
        return {bytes.data(), bytes.size()};
    }

    // A copy that tells.
    zmq::message_t mark(std::span<const std::byte> bytes) const {
        struct Mark {
            std::shared_ptr<std::atomic<std::int64_t>> sent;
            std::int64_t when_sent;
            std::vector<std::byte> bytes;
        };
        auto made = std::make_unique<Mark>(Mark{sent_, handed_, {bytes.begin(), bytes.end()}});
        const auto tell = [](void* /*data*/, void* hint) {  // in libzmq's thread
            const std::unique_ptr<Mark> done(static_cast<Mark*>(hint));
            *done->sent = std::max<std::int64_t>(*done->sent, done->when_sent);
        };
        void* data = made->bytes.data();
        const std::size_t size = made->bytes.size();
        return {data, size, tell, made.release()};
    }

    std::int64_t handed_ = 0;  // bytes, to libzmq
    std::int64_t marked_ = 0;  // of them, when it was last asked to tell
    // Of them, by libzmq, at least; its threads hold on to this.
    std::shared_ptr<std::atomic<std::int64_t>> sent_ =
        std::make_shared<std::atomic<std::int64_t>>(0);
};

// What happens to a socket's connections.
struct Event {
    int number = 0;
    int value = 0;  // a descriptor, where there is one
};

// The socket that tells of a socket's events.
inline zmq::socket_t make_monitor(zmq::context_t& context, zmq::socket_t& socket, int events) {
    const std::string name =
        "inproc://monitor-" + std::to_string(reinterpret_cast<std::uintptr_t>(socket.handle()));
    if (::zmq_socket_monitor(socket.handle(), name.c_str(), events) < 0) {
        throw zmq::error_t();
    }
    zmq::socket_t monitor(context, zmq::socket_type::pair);
    monitor.connect(name);
    return monitor;
}

inline void close_monitor(zmq::socket_t& socket, zmq::socket_t& monitor) {
    ::zmq_socket_monitor(socket.handle(), nullptr, 0);
    monitor.set(zmq::sockopt::linger, 0);
    monitor.close();
}

// What the monitor has to tell: events, each with its value.
inline std::vector<Event> events_of(zmq::socket_t& monitor) {
    std::vector<Event> found;
    zmq::message_t part;
    while (receive(monitor, part)) {
        if (part.size() == 6) {  // u16 event, u32 value; the part behind it is the endpoint
            std::uint16_t number = 0;
            std::int32_t value = 0;
            std::memcpy(&number, part.data(), sizeof(number));
            std::memcpy(&value, part.data<char>() + sizeof(number), sizeof(value));
            found.push_back({number, value});
        }
        while (part.more() && receive(monitor, part)) {
        }
    }
    return found;
}

inline int fd_of(zmq::socket_t& socket) {
    return socket.get(zmq::sockopt::fd);
}

inline std::size_t copy_out(
    const zmq::message_t& part, std::size_t from, std::span<std::byte> buffer
) {
    const std::size_t size = std::min(buffer.size(), part.size() - from);
    std::memcpy(buffer.data(), part.data<std::byte>() + from, size);
    return size;
}

}  // namespace ipc_bridge::zeromq

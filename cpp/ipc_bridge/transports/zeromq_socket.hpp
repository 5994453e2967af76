// What ZeroMQ's sockets need at both ends: to receive, to send, and to be told of events.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
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

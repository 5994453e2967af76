// The service: a thermostat, from both sides. This is the file to edit, and service.py with it.
//
// A method is a number and what its bytes mean, the same in both languages:
//
//     10 set_target  unary      f64 the target in degrees Celsius -> f64 the target before
//     11 watch       streaming  u32 how many readings, f64 seconds between them -> Reading, ...
//
// Server: `make_service` registers a handler for each method. Client: `Thermostat` gives each a
// face.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>

#include <ipc_bridge/client.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/server.hpp>

namespace thermostat {

using ipc_bridge::Bytes;
using ipc_bridge::Call;
using ipc_bridge::Error;
using ipc_bridge::Item;
using ipc_bridge::Payload;
using ipc_bridge::Producer;
using ipc_bridge::Service;
using ipc_bridge::Status;

inline constexpr std::uint16_t set_target_method = 10;
inline constexpr std::uint16_t watch_method = 11;

struct [[gnu::packed]] WatchRequest {  // packed: no gaps, as Python's "<"
    std::uint32_t count;
    double seconds;
};

inline constexpr double celsius_min = 5.0;
inline constexpr double celsius_max = 30.0;

// An item of `watch`, in degrees Celsius.
struct [[gnu::packed]] Reading {
    double room;
    double target;
};

// Throws Error: INVALID_ARGUMENT for bytes of another size.
template <class Shape>
Shape unpack(Bytes payload) {
    if (payload.size() != sizeof(Shape)) {
        throw Error(
            Status::INVALID_ARGUMENT,
            std::to_string(sizeof(Shape)) + " bytes are wanted, and " +
                std::to_string(payload.size()) + " came"
        );
    }
    Shape shape;
    std::memcpy(&shape, payload.data(), sizeof(shape));
    return shape;
}

template <class Shape>
std::string pack(const Shape& shape) {
    static_assert(std::is_trivially_copyable_v<Shape>);
    return {reinterpret_cast<const char*>(&shape), sizeof(shape)};
}

// --- the server's side ---

// What the server knows. Every connection has a thread of its own: they share it by a lock.
class Room {
  public:
    // Unary: bytes in, bytes out.
    Payload set_target(Call& /*call*/, Bytes request) {
        const auto target = unpack<double>(request);
        if (!(celsius_min <= target && target <= celsius_max)) {
            std::ostringstream what;
            what << "the target is not within " << celsius_min << " to " << celsius_max
                 << " degrees";
            throw Error(Status::INVALID_ARGUMENT, what.str());
        }
        const std::lock_guard lock(mutex_);
        return pack(std::exchange(target_, target));
    }

    // Streaming: a function that gives the next item, or nothing at the end. It is destroyed if
    // the client leaves early. What it captures must be copyable, as std::function is: hold a file
    // or the like by a std::shared_ptr.
    Producer watch(Call& call, Bytes request) {
        const auto asked = unpack<WatchRequest>(request);
        return [this, &call, asked, i = 0U]() mutable -> std::optional<Item> {
            if (i == asked.count) {
                return std::nullopt;
            }
            if (i++ > 0) {
                call.sleep(asked.seconds);  // ends early if the client cancels
            }
            const std::lock_guard lock(mutex_);
            now_ += (target_ - now_) / 2;
            return pack(Reading{now_, target_});
        };
    }

  private:
    std::mutex mutex_;
    double now_ = 18.0;
    double target_ = 20.0;
};

// The methods, for a server.
inline Service make_service() {
    auto room = std::make_shared<Room>();
    Service service;
    service.unary(set_target_method, [room](Call& call, Bytes request) {
        return room->set_target(call, request);
    });
    service.streaming(watch_method, [room](Call& call, Bytes request) {
        return room->watch(call, request);
    });
    return service;
}

// --- the client's side ---

// The service as its client sees it. `timeout` in seconds; each throws as Client::call does.
class Thermostat {
  public:
    explicit Thermostat(ipc_bridge::Caller& client) : client_(client) {}

    // The target before.
    double set_target(double target, std::optional<double> timeout = std::nullopt) {
        return unpack<double>(
            client_.call(set_target_method, ipc_bridge::bytes_of(pack(target)), timeout)
        );
    }

    // A reading every so many seconds: for each item, unpack<Reading>(item); leaving the loop
    // early cancels. (Python unpacks on the way: C++20 has no generators.)
    ipc_bridge::Items watch(
        std::uint32_t count, double seconds, std::optional<double> timeout = std::nullopt
    ) {
        const std::string request = pack(WatchRequest{count, seconds});
        return client_.call_stream(watch_method, ipc_bridge::bytes_of(request), timeout);
    }

  private:
    ipc_bridge::Caller& client_;
};

}  // namespace thermostat

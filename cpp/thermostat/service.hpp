// The service: a thermostat. This is the file to edit, and service.py with it.
//
// A method is a number and what its bytes mean, the same in both languages:
//
//     10 set_target  unary      f64 the target in degrees Celsius -> f64 the target before
//     11 watch       streaming  WatchRequest -> Reading, Reading, ...
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/handlers.hpp>
#include <ipc_bridge/packed.hpp>

namespace thermostat {

using namespace ipc_bridge;

inline constexpr std::uint16_t set_target_method = 10;
inline constexpr std::uint16_t watch_method = 11;

struct [[gnu::packed]] WatchRequest {
    std::uint32_t count;
    double seconds;  // between two readings
};

struct [[gnu::packed]] Reading {
    double room;  // in degrees Celsius
    double target;
};

// --- from here on: the server's side; delete it if the server is in Python ---

// The handlers, and what they share: every connection has its own thread, hence the lock.
class Handlers {
  public:
    // Unary: bytes in, bytes out.
    Payload set_target(Call& /*call*/, Bytes request) {
        const auto target = unpack<double>(request);
        if (!(5.0 <= target && target <= 30.0)) {
            throw Error(Status::INVALID_ARGUMENT, "the target is not within 5 to 30 degrees");
        }
        const std::lock_guard lock(mutex_);
        return pack(std::exchange(target_, target));
    }

    // Streaming: a function that gives the next item, or nothing at the end. It is destroyed if
    // the client leaves early. (It is copied: hold a file or the like by a std::shared_ptr.)
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

// The methods, for server.cpp.
inline Service make_service() {
    auto handlers = std::make_shared<Handlers>();
    Service service;
    service.unary(set_target_method, std::bind_front(&Handlers::set_target, handlers));
    service.streaming(watch_method, std::bind_front(&Handlers::watch, handlers));
    return service;
}

}  // namespace thermostat

// What a service is made of: its handlers, and what they know and give.
//
// A handler is called with its Call and the request, a view that lives until the handler is done:
//
//     Payload unary(Call& call, Bytes request)
//     Producer streaming(Call& call, Bytes request)  // gives items, Pauses, at the end nothing
//
// and may block. Throw Error to end the call with a status; anything else ends it with INTERNAL.
// (Python returns an iterator where C++ returns a function: C++20 has no generators.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>

namespace ipc_bridge {

// In place of an item: nothing before `until_ns` (monotonic). The connection goes on reading
// meanwhile, so a cancel ends it; unlike Call::sleep it occupies no thread of a shared loop.
struct Pause {
    std::int64_t until_ns;
};

// Bytes that a handler gives back: its own, or a view of what lives until the next item is asked
// for, or (of a reply) as long as the request. (Python's buffers know their owner.)
class Payload {
  public:
    Payload() = default;
    Payload(Bytes view) : bytes_(view) {}
    Payload(std::vector<std::byte> bytes) { own(std::move(bytes)); }
    Payload(std::string text) { own(std::move(text)); }

    Bytes bytes() const { return bytes_; }

  private:
    template <class Owned>
    void own(Owned owned) {
        auto owner = std::make_shared<const Owned>(std::move(owned));
        bytes_ = std::as_bytes(std::span(*owner));
        owner_ = std::move(owner);
    }

    Bytes bytes_;
    std::shared_ptr<const void> owner_;  // null: the handler's
};

class Call;
using Item = std::variant<Payload, Pause>;
using Producer = std::function<std::optional<Item>()>;
using UnaryHandler = std::function<Payload(Call&, Bytes)>;
using StreamHandler = std::function<Producer(Call&, Bytes)>;

// Methods by number, each with its handler.
//
// A handler that neither waits nor computes for long may say that it does not block; if none of a
// service does, some transports serve all clients in one thread, which is faster.
class Service {
  public:
    bool blocks = false;  // does any of the handlers? (Python's is the parameter's name as well)

    // Register a method that answers once. Throws UsageError: INVALID_ARGUMENT for number 0. (In
    // Python also for what is above 65535, which no number is here.)
    void unary(std::uint16_t method, UnaryHandler handler, bool may_block = true) {
        frame::check_method(method);
        blocks = blocks || may_block;
        unary_[method] = std::move(handler);
    }

    // Register a method that answers with a stream of items. Throws as `unary`.
    void streaming(std::uint16_t method, StreamHandler handler, bool may_block = true) {
        frame::check_method(method);
        blocks = blocks || may_block;
        streaming_[method] = std::move(handler);
    }

    // Throws Error: UNIMPLEMENTED.
    const UnaryHandler& find_unary(std::uint32_t method) const {
        const auto found = unary_.find(method);
        if (found == unary_.end()) {
            throw Error(Status::UNIMPLEMENTED, "no unary method " + std::to_string(method));
        }
        return found->second;
    }

    // Throws Error: UNIMPLEMENTED.
    const StreamHandler& find_streaming(std::uint32_t method) const {
        const auto found = streaming_.find(method);
        if (found == streaming_.end()) {
            throw Error(Status::UNIMPLEMENTED, "no streaming method " + std::to_string(method));
        }
        return found->second;
    }

  private:
    std::map<std::uint32_t, UnaryHandler> unary_;  // 32 bits: gRPC has room for such a number
    std::map<std::uint32_t, StreamHandler> streaming_;
};

// Why a call ended before its handler was done.
inline std::string reason_text(Status why) {
    switch (why) {
        case Status::CANCELLED:
            return "cancelled by the client";
        case Status::DEADLINE_EXCEEDED:
            return "the deadline has passed";
        default:
            return "the server is shutting down";
    }
}

inline void print_handler_failure(const std::string& what) {
    std::fputs(("ERROR: a handler failed: " + what + "\n").c_str(), stderr);
}

// Told of whatever a handler threw that is no Error, from any thread; set it before serving. Null:
// nobody is told but the client. (In Python that is the logger "ipc_bridge", which prints to stderr
// as well until logging is set up.)
inline void (*on_handler_failure)(const std::string& what) = print_handler_failure;

inline void tell_handler_failure(const std::string& what) {
    if (on_handler_failure != nullptr) {
        on_handler_failure(what);
    }
}

// What a handler knows of the call it answers.
class Call {
  public:
    explicit Call(std::int64_t deadline) : deadline_ns(deadline) {}
    virtual ~Call() = default;
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    // On the monotonic clock, CLOCK_MONOTONIC, in ns; `never` if the client set none.
    const std::int64_t deadline_ns;

    // Look at the input: has the client cancelled or gone, or is the deadline past?
    virtual bool is_cancelled() = 0;

    // Sleep; ends early when `is_cancelled`. Items made so far are sent first.
    virtual void sleep(double seconds) = 0;

    // The largest payload that the client takes.
    virtual std::uint32_t peer_payload_bytes_max() const = 0;
};
}  // namespace ipc_bridge

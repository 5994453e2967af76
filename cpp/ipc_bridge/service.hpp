// The service: echo and stream, from both sides. This is the file to replace with one's own.
//
// Server: `make_service()` registers a handler for each method. Client: `Bridge` gives each method
// a typed face over `call` and `call_stream`. The contract is proto/bridge.proto.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <ipc_bridge/bridge.pb.h>
#include <ipc_bridge/client.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/handlers.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge {

inline constexpr std::uint16_t echo_method = 1;
inline constexpr std::uint16_t stream_method = 2;

// A prime: no item size divides it, so a shifted item never verifies.
inline constexpr std::size_t pattern_period = 65521;
inline constexpr std::size_t item_stride = 257;
inline constexpr std::size_t stamp_bytes = 8;  // monotonic ns
// A century after the first item: any rate above 0 is legal, however low.
inline constexpr double due_ns_max = 4e18;

// The bytes of every item of one size (bridge.proto).
class Pattern {
  public:
    explicit Pattern(std::size_t size) : size_(size), bytes_(pattern_period + size) {
        for (std::size_t i = 0; i < bytes_.size(); ++i) {
            const std::size_t k = i % pattern_period;
            bytes_[i] = static_cast<std::byte>((k * k + (k >> 8U)) % 251);
        }
    }

    // Item `index`, without a copy.
    Bytes item(std::uint64_t index) const { return {bytes_.data() + offset(index), size_}; }

    // Is this item `index`, apart from its first `skip` bytes?
    bool verifies(std::uint64_t index, Bytes item, std::size_t skip = 0) const {
        return item.size() == size_ && skip <= size_ &&
               std::memcmp(
                   item.data() + skip, bytes_.data() + offset(index) + skip, size_ - skip
               ) == 0;
    }

  private:
    static std::size_t offset(std::uint64_t index) {
        return index % pattern_period * item_stride % pattern_period;
    }

    std::size_t size_;
    std::vector<std::byte> bytes_;
};

namespace service_detail {

inline StreamRequest parse(Bytes request) {
    StreamRequest asked;
    if (!asked.ParseFromArray(request.data(), static_cast<int>(request.size()))) {
        throw Error(Status::INVALID_ARGUMENT, "not a StreamRequest");
    }
    if (!std::isfinite(asked.rate_hz()) || asked.rate_hz() < 0) {
        std::ostringstream text;  // as Python's %g
        text << "rate_hz of " << asked.rate_hz();
        throw Error(Status::INVALID_ARGUMENT, text.str());
    }
    if (asked.stamped() && asked.size() < stamp_bytes) {
        throw Error(
            Status::INVALID_ARGUMENT, "a stamp takes " + std::to_string(stamp_bytes) + " bytes"
        );
    }
    return asked;
}

inline Producer paced(std::shared_ptr<const Pattern> items, const StreamRequest& asked) {
    return [items = std::move(items),
            asked,
            index = std::uint64_t{0},
            began_ns = now_ns(),
            stamped = std::vector<std::byte>(asked.size())]() mutable -> std::optional<Item> {
        if (index == asked.count()) {
            return std::nullopt;
        }
        if (asked.rate_hz() > 0) {
            const auto due_ns =
                began_ns + static_cast<std::int64_t>(std::min(
                               static_cast<double>(index) * 1e9 / asked.rate_hz(), due_ns_max
                           ));
            if (now_ns() < due_ns) {
                return Pause{due_ns};
            }
        }
        const Bytes item = items->item(index++);
        if (!asked.stamped()) {
            return item;
        }
        std::memcpy(stamped.data(), item.data(), item.size());
        const std::int64_t sent_ns = now_ns();
        std::memcpy(stamped.data(), &sent_ns, stamp_bytes);
        return Bytes(stamped);
    };
}

}  // namespace service_detail

// The same bytes.
inline Payload echo(Call& /*call*/, Bytes request) {
    return request;
}

// `count` items of the pattern, paced if asked for. Throws Error: INVALID_ARGUMENT for a request
// that makes no sense, RESOURCE_EXHAUSTED for items that the client does not take.
inline Producer stream(Call& call, Bytes request) {
    const StreamRequest asked = service_detail::parse(request);
    if (asked.size() > call.peer_payload_bytes_max()) {
        throw Error(
            Status::RESOURCE_EXHAUSTED,
            "items of " + std::to_string(asked.size()) + " bytes, the client takes " +
                std::to_string(call.peer_payload_bytes_max())
        );
    }
    auto items = std::make_shared<const Pattern>(asked.size());
    if (asked.rate_hz() > 0 || asked.stamped()) {
        return service_detail::paced(std::move(items), asked);
    }
    return [items = std::move(items), count = asked.count(), index = std::uint64_t{0}](
           ) mutable -> std::optional<Item> {
        if (index == count) {
            return std::nullopt;
        }
        return items->item(index++);
    };
}

// The two methods, for a server.
inline Service make_service() {
    Service service;
    service.unary(echo_method, echo, false);
    service.streaming(stream_method, stream, false);
    return service;
}

// The service as its client sees it.
class Bridge {
  public:
    explicit Bridge(std::unique_ptr<Caller> caller) : caller_(std::move(caller)) {}

    Bytes call(
        std::uint16_t method, Bytes payload = {}, std::optional<double> timeout = std::nullopt
    ) {
        return caller_->call(method, payload, timeout);
    }

    Items call_stream(
        std::uint16_t method, Bytes payload = {}, std::optional<double> timeout = std::nullopt
    ) {
        return caller_->call_stream(method, payload, timeout);
    }

    // The same bytes, as a view that lives until the next call.
    //
    // `timeout` in seconds. Throws as Client::call does.
    Bytes echo(Bytes payload, std::optional<double> timeout = std::nullopt) {
        return call(echo_method, payload, timeout);
    }

    // `count` items of `size` bytes, each a view that lives until the next; see bridge.proto.
    //
    // Leaving the loop early cancels. Throws as Client::call_stream does.
    Items stream(
        std::uint64_t count,
        std::uint32_t size,
        double rate_hz = 0.0,
        bool stamped = false,
        std::optional<double> timeout = std::nullopt
    ) {
        StreamRequest asked;
        asked.set_count(count);
        asked.set_size(size);
        asked.set_rate_hz(rate_hz);
        asked.set_stamped(stamped);
        return call_stream(stream_method, bytes_of(asked.SerializeAsString()), timeout);
    }

    // Close the connection. Idempotent.
    void close() { caller_->close(); }

  private:
    std::unique_ptr<Caller> caller_;
};

}  // namespace ipc_bridge

// What both ends of gRPC know: methods, metadata, sizes and times.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>

namespace ipc_bridge::grpc_rpc {

// service.hpp's; the typed methods of bridge.proto. (It names its client's face Bridge, as the
// generated code does the service.)
inline constexpr std::uint16_t echo_method = 1;
inline constexpr std::uint16_t stream_method = 2;

// The metadata that tells a client's max_payload (bridge.proto).
inline const std::string max_payload_key = "ipc-bridge-max-payload";
// Tags and sizes around a payload: more than any message here has.
inline constexpr std::int64_t message_extra_bytes = 64;
// Of silence: then ask. No answer for 20 s more, gRPC's default: gone.
inline constexpr int keepalive_ms = 5000;

// The largest message for a payload; gRPC takes an int, and protobuf makes none that is larger.
inline int message_bytes(std::uint32_t payload_bytes) {
    constexpr std::int64_t limit = std::numeric_limits<int>::max();
    return static_cast<int>(std::min(payload_bytes + message_extra_bytes, limit));
}

inline std::string too_large(std::size_t size, const char* who, std::uint32_t size_max) {
    return "payload of " + std::to_string(size) + " bytes, the " + who + " takes " +
           std::to_string(size_max);
}

}  // namespace ipc_bridge::grpc_rpc

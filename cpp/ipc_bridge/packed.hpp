// Messages as packed structs, for a service of one's own: what Python's `Packed` writes and reads.
//
//     struct [[gnu::packed]] Reading { double room; double target; };  // there: Packed("dd")
#pragma once

#include <bit>
#include <cstring>
#include <string>
#include <type_traits>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>

namespace ipc_bridge {

static_assert(std::endian::native == std::endian::little);

// The bytes of a number or a packed struct.
template <class Shape>
std::string pack(const Shape& shape) {
    static_assert(std::is_trivially_copyable_v<Shape>);
    return {reinterpret_cast<const char*>(&shape), sizeof(shape)};
}

// The number or struct. Throws Error: INVALID_ARGUMENT for bytes of another size.
template <class Shape>
Shape unpack(Bytes payload) {
    static_assert(std::is_trivially_copyable_v<Shape>);
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

}  // namespace ipc_bridge

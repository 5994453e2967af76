// Packed messages: the bytes, and what is refused. (tests/test_packed.py has the same.)
#include <cstddef>
#include <cstdint>
#include <string>

#include <doctest/doctest.h>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/packed.hpp>

namespace {

using ipc_bridge::bytes_of;
using ipc_bridge::pack;
using ipc_bridge::unpack;

struct [[gnu::packed]] Message {
    std::uint8_t first;
    std::uint32_t second;
};

TEST_CASE("packed: little-endian, without gaps") {
    const std::string data = pack(Message{7, 1});
    CHECK(data == std::string("\7\1\0\0\0", 5));
    const auto message = unpack<Message>(bytes_of(data));
    CHECK(int{message.first} == 7);
    CHECK(std::uint32_t{message.second} == 1);
}

TEST_CASE("packed: another size is refused") {
    for (const std::size_t size : {0U, 4U, 6U}) {
        try {
            unpack<Message>(bytes_of(std::string(size, '\0')));
            FAIL("it was taken");
        } catch (const ipc_bridge::Error& error) {
            CHECK(error.status == ipc_bridge::Status::INVALID_ARGUMENT);
            const std::string what = error.what();
            CHECK(what.find("5 bytes are wanted, and " + std::to_string(size)) != what.npos);
        }
    }
}

}  // namespace

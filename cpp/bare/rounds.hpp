// What the bare programs share, and no part of a mechanism: command line, errors, timed rounds.
// The trap: a ping-pong that compares nothing may time anything. Every reply is compared here,
// outside the timed span, and two fillings take turns, so that no old reply passes for a new one.
#pragma once

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace rounds {

constexpr std::size_t number_max = 1 << 27;  // 128 MiB a message; 1 GiB of samples in memory

struct Usage {};  // thrown: the words make no sense

struct Words {
    std::string verb, address;
    std::size_t size = 0;  // bytes a message
    bool spin = false;
    std::size_t count = 0;  // rounds
    std::string samples;    // where the raw nanoseconds go, or ""
    char** command = nullptr;
};

[[noreturn]] inline void fail(const std::string& call, const std::string& reason) {
    throw std::runtime_error(call + ": " + reason);
}

template <typename Result>
Result checked(Result result, const char* call) {
    if (result < 0) {
        fail(call, std::strerror(errno));
    }
    return result;
}

inline std::size_t number(const std::string& word, std::size_t least, std::size_t most) {
    std::size_t value = 0;
    const char* const end = word.data() + word.size();
    const auto [stop, error] = std::from_chars(word.data(), end, value);
    if (error != std::errc{} || stop != end || value < least || value > most) {
        throw Usage{};
    }
    return value;
}

inline void say(const std::string& line) {
    if (std::puts(line.c_str()) < 0 || std::fflush(stdout) != 0) {  // flushed: somebody waits
        fail("print", std::strerror(errno));
    }
}

inline Words parse(char** argv, bool has_address) {
    auto next = [&] { return *++argv == nullptr ? throw Usage{} : std::string(*argv); };
    return {};
}

// Makes `count` round trips, after a tenth as many to warm up, and prints what they took.
// round_trip(message, reply) sends the one, receives the other, and is false at end of file.
template <typename RoundTrip>
void measure(const Words& words, RoundTrip round_trip) {
    using Clock = std::chrono::steady_clock;
    std::vector<std::byte> message(words.size), reply(words.size);
    std::vector<std::int64_t> ns(words.count);
    const std::size_t warm_up = words.count / 10;
    for (std::size_t round = 0; round < warm_up + words.count; ++round) {
        std::ranges::fill(message, std::byte{round % 2 == 0 ? 0x55 : 0xaa});
        const auto start = Clock::now();
        const bool whole = round_trip(std::span<const std::byte>(message), std::span(reply));
        const auto took = Clock::now() - start;
    }
}

}  // namespace rounds

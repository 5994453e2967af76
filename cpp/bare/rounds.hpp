// What the bare programs share, and no part of a mechanism: command line, errors, timed rounds.
// The trap: a ping-pong that compares nothing may time anything. Every reply is compared, outside
// the timed span, and two fillings take turns, so that an old reply never passes for a new one.
#pragma once

#include <stdio.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace rounds {

constexpr std::size_t number_max = 1 << 27;  // 128 MiB a message, 1 GiB of samples in memory

struct Usage {};  // thrown: the words make no sense

struct Words {
    std::string verb, address, wait, samples;  // samples: the file for raw nanoseconds, or ""
    std::size_t size = 0, count = 0;           // bytes a message, round trips
    char** command = nullptr;                  // what stands behind --
    bool spin() const { return wait == "spin"; }
};

[[noreturn]] inline void fail(const std::string& call, const std::string& reason) {
    throw std::runtime_error(call + ": " + reason);
}

auto checked(auto result, const char* call) {
    if (result < 0)
        fail(call, std::strerror(errno));
    return result;
}

inline void say(const std::string& line) {
    checked(dprintf(1, "%s\n", line.c_str()), "print");
}

inline std::size_t number(const std::string& word, std::size_t least, std::size_t most) {
    std::size_t value = 0;
    const auto end = word.data() + word.size();
    const auto [stop, error] = std::from_chars(word.data(), end, value);
    if (error != std::errc{} || stop != end || value < least || value > most)
        throw Usage{};
    return value;
}

inline Words parse(char** argv, bool has_address) {
    const auto next = [&] { return *++argv ? std::string(*argv) : throw Usage{}; };
    Words words;
    words.verb = next();
    words.address = has_address ? next() : "none";
    words.size = number(next(), 1, number_max);
    words.wait = next();
    const bool ping = words.verb == "ping";
    if (ping)
        words.count = number(next(), 1, number_max);
    if (ping && argv[1] && argv[1] != std::string("--"))
        words.samples = next();
    if (ping && !has_address && next() == "--" && next() != "")
        words.command = argv;
    
    return words;
}

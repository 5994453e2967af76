// What the bare programs share, and no part of a mechanism: words, errors, and ping's timed rounds.
// The trap: a ping-pong that compares nothing may time anything. Every reply is compared, outside
// the timed span, and two fillings take turns, so that an old reply never passes for a new one.
#pragma once

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <span>
#include <string>
#include <vector>

namespace rounds {

struct Words {
    std::string verb, address, wait, samples;  // samples: a file for raw nanoseconds, or ""
    std::size_t size, count;                   // bytes a message; round trips
    char** command;                            // of stdio_pipe: what starts its peer
};

inline std::string usage;  // run sets it

[[noreturn]] inline void leave(const std::string& text, int status) {
    std::cerr << text << std::endl;
    std::exit(status);
}

[[noreturn]] inline void fail(const std::string& call, const std::string& reason) {
    leave("error: " + call + ": " + reason, 1);
}

auto checked(auto result, const char* call) {
    if (result < 0)
        fail(call, std::strerror(errno));
    return result;
}

inline void say(const std::string& line) {
    if (!(std::cout << line << std::endl))  // flushed: somebody waits for it
        fail("print", std::strerror(errno));
}

inline std::size_t number(const std::string& word, std::size_t least, std::size_t most) {
    std::size_t value = most + 1;  // and stays so where there is no number
    const auto end = std::from_chars(word.data(), word.data() + word.size(), value).ptr;
    if (end != word.data() + word.size() || value < least || value > most)
        leave(usage, 2);
    return value;
}

// The words of serve and ping. `has_address` is false for stdio_pipe, whose ping ends in -- COMMAND.
inline Words parse(int argc, char** argv, bool has_address) {
    char** const dashes = std::find(argv + 1, argv + argc, std::string("--"));
    std::vector<std::string> given(argv + 1, dashes);
    given.insert(given.begin() + !given.empty(), has_address ? 0 : 1, "none");
    const bool ping = given.size() >= 5 && given.size() <= 6 && given[0] == "ping";
    const bool serve = given.size() == 4 && given[0] == "serve";
    const bool starts_peer = argv + argc - dashes >= 2;
    given.resize(6);
    const bool waits = given[3] == "block" || given[3] == "spin";
    if (!(serve || ping) || !waits || given[1].empty() || starts_peer != (ping && !has_address))
        leave(usage, 2);
    const std::size_t size = number(given[2], 1, 1 << 27);  // 128 MiB
    const std::size_t count = ping ? number(given[4], 1, 1 << 27) : 0;  // 1 GiB of samples
    return {given[0], given[1], given[3], given[5], size, count, dashes + 1};
}

inline void report(const Words& words, std::vector<std::int64_t>& ns) {
    std::ofstream samples(words.samples.empty() ? "/dev/null" : words.samples, std::ios::binary);
    const auto bytes = static_cast<std::streamsize>(ns.size() * sizeof ns[0]);
    if (!samples.write(reinterpret_cast<const char*>(ns.data()), bytes).flush())
        fail("write samples", std::strerror(errno));
    std::ranges::sort(ns);
    say("p50_ns=" + std::to_string(ns[ns.size() / 2]) + " p99_ns=" +
        std::to_string(ns[ns.size() * 99 / 100]) + " rounds=" + std::to_string(ns.size()));
}

// Times round_trip(message, reply), which sends the one and receives the other, or returns false
// at end of file. A tenth of the rounds comes first, to warm up.
void measure(const Words& words, auto round_trip) {
    std::vector<std::byte> message(words.size), reply(words.size);
    std::vector<std::int64_t> ns(words.count);
    const std::size_t warm_up = words.count / 10;
    for (std::size_t round = 0; round < warm_up + words.count; ++round) {
        std::ranges::fill(message, round % 2 == 0 ? std::byte{0x55} : std::byte{0xaa});
        const auto start = std::chrono::steady_clock::now();
        const bool whole = round_trip(std::span<const std::byte>(message), std::span(reply));
        const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - start;
        if (!whole)
            fail("echo", "end of file");
        if (reply != message)
            fail("echo", "other bytes came back");
        if (round >= warm_up)
            ns[round - warm_up] = took.count();
    }
    report(words, ns);
}

using Part = void (*)(const Words&);
inline int run(int argc, char** argv, const std::string& address, Part serve, Part ping) {
    const std::string stem = program_invocation_short_name, named = address + " SIZE block|spin";
    usage = "usage: " + stem + " serve" + ...;
    const Words words = parse(argc, argv, !address.empty());
    (words.verb == "serve" ? serve : ping)(words);
    return 0;
}

}  // namespace rounds

// What the bare programs share: words, errors, whole messages, and the rounds that ping times.
// The trap: a ping-pong that compares nothing may time anything. Every reply is compared, outside
// the timed span, and two fillings take turns, so that an old reply never passes for a new one.
#pragma once

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace rounds {

struct Words {
    std::string verb, address, samples;  // samples: a file for raw nanoseconds, or ""
    std::size_t size, count;             // bytes a message; rounds, or items of a stream
    int wait;                            // O_NONBLOCK: spin; 0: block, asleep in the kernel
    char** command;                      // what starts stdio_pipe's peer
};

inline std::string usage;  // run sets it

[[noreturn]] inline void leave(int status, const std::string& text) {
    std::cerr << text << std::endl;
    std::exit(status);
}

[[noreturn]] inline void fail(const std::string& call, const std::string& reason) {
    leave(1, "error: " + call + ": " + reason);
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

template <typename Number = std::size_t>
Number number(const std::string& word, std::size_t least, std::size_t most) {
    std::size_t value = most + 1;  // and stays so where there is no number
    const char* const end = word.data() + word.size();
    if (std::from_chars(word.data(), end, value).ptr != end || value < least || value > most)
        leave(2, usage);
    return static_cast<Number>(value);
}

// The words, with an address also where the mechanism has none; there ping ends in -- COMMAND.
inline Words parse(int argc, char** argv, bool has_address, bool has_stream) {
    char** const dashes = std::find(argv + 1, argv + argc, std::string("--"));
    std::vector<std::string> words(argv + 1, dashes);
    if (!has_address && !words.empty())
        words.insert(words.begin() + 1, "none");
    const bool ping = (words.size() == 5 || words.size() == 6) && words[0] == "ping";
    const bool stream = has_stream && words.size() == 5 && words[0] == "stream";
    const bool serve = words.size() == 4 && words[0] == "serve";
    const bool has_command = argv + argc - dashes > 1;
    words.resize(6);
    const bool spin = words[3] == "spin";
    const bool known = ping || stream || serve;
    const bool right = known && (spin || words[3] == "block") && !words[1].empty();
    if (!right || has_command != (ping && !has_address))
        leave(2, usage);
    const std::size_t size = number(words[2], 1, 1 << 27);               // 128 MiB
    const std::size_t count = serve ? 0 : number(words[4], 1, 1 << 27);  // 1 GiB of samples
    return {words[0], words[1], words[5], size, count, spin ? O_NONBLOCK : 0, dashes + 1};
}

// Makes of move(rest), which may move only a part of a message, a function that moves all of it.
// False is an end of file before the message; in its middle it is an error.
auto whole(const char* call, auto move) {
    return [=](std::span<std::byte> message) {
        std::size_t done = 0;
        while (done < message.size()) {
            const ssize_t count = move(message.subspan(done));
            if (count == 0 && done == 0)
                return false;
            if (count == 0)
                fail(call, "end of file in the middle of a message");
            if (count > 0 || errno != EAGAIN)  // EAGAIN: spin, not yet
                done += static_cast<std::size_t>(checked(count, call));
        }
        return true;
    };
}

// Times rounds of write_all(message) and read_all(reply), after a tenth as many to warm up, and
// prints the percentiles.
void measure(const Words& words, auto write_all, auto read_all) {
    std::vector<std::byte> message(words.size), reply(words.size);
    std::vector<std::int64_t> ns(words.count);
    const std::size_t warm_up = words.count / 10;
    for (std::size_t round = 0; round < warm_up + words.count; ++round) {
        std::ranges::fill(message, round % 2 == 0 ? std::byte{0x55} : std::byte{0xaa});
        const auto start = std::chrono::steady_clock::now();
        write_all(message);
        const bool replied = read_all(reply);
        const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - start;
        if (!replied || reply != message)
            fail("echo", replied ? "other bytes came back" : "end of file");
        if (round >= warm_up)
            ns[round - warm_up] = took.count();
    }
    if (!words.samples.empty()) {
        std::ofstream file(words.samples, std::ios::binary);
        const auto bytes = static_cast<std::streamsize>(ns.size() * sizeof ns[0]);
        if (!file.write(reinterpret_cast<const char*>(ns.data()), bytes).flush())
            fail("write samples", std::strerror(errno));
    }
    std::ranges::sort(ns);
    say("p50_ns=" + std::to_string(ns[words.count / 2]) + " p99_ns=" +
        std::to_string(ns[words.count * 99 / 100]) + " rounds=" + std::to_string(words.count));
}

using Verb = std::function<void(const Words&)>;

// Does what the words ask for. `address` is its name in the usage text; "": it has none. `stream`
// reads one, where the mechanism has streams of its own.
inline int run(
    int argc, char** argv, const std::string& address, Verb serve, Verb ping, Verb stream = {}
) {
    std::signal(SIGPIPE, SIG_IGN);  // as in Python: a write to a peer that left is an error
    const std::string stem = program_invocation_short_name;
    const std::string figures = (address.empty() ? "" : " " + address) + " SIZE block|spin";
    usage = "usage: " + stem + " serve" + figures + "\n       " + stem + " ping" + figures +
            " ROUNDS [SAMPLES]" + (address.empty() ? " -- COMMAND..." : "") +
            (stream ? "\n       " + stem + " stream" + figures + " ITEMS" : "");
    const Words words = parse(argc, argv, !address.empty(), stream != nullptr);
    (words.verb == "serve" ? serve : words.verb == "ping" ? ping : stream)(words);
    return 0;
}

}  // namespace rounds

// Two named pipes (FIFOs), bare. Pick them for the least overhead, one client, one way each.
// The trap: open waits for the other end. Both peers open the same FIFO first; in crossed orders
// each would wait for the other for ever.
//     g++ -std=c++20 -O2 pipe.cpp -o pipe
//     ./pipe serve /tmp/demo 64 block & sleep 1; ./pipe ping /tmp/demo 64 block 100000
#include <sys/stat.h>
#include <unistd.h>

#include "rounds.hpp"

using rounds::checked;

bool read_all(int reader, std::span<std::byte> message) {
    const auto move = [=](auto rest) { return read(reader, rest.data(), rest.size()); };
    return rounds::move_all("read", message, move);
}

void write_all(int writer, std::span<const std::byte> message) {
    const auto move = [=](auto rest) { return write(writer, rest.data(), rest.size()); };
    rounds::move_all("write", message, move);
}

int open_end(const std::string& path, int flags, const rounds::Words& words) {
    const int end = checked(open(path.c_str(), flags), "open");
    checked(fcntl(end, F_SETFL, words.wait), "fcntl");  // not before: O_NONBLOCK changes open
    return end;
}

void serve(const rounds::Words& words) {
    const std::string c2s = words.address + ".c2s", s2c = words.address + ".s2c";
    checked(mkfifo(c2s.c_str(), 0600), "mkfifo");
    if (mkfifo(s2c.c_str(), 0600) < 0) {
        const int error = errno;
        unlink(c2s.c_str());  // half a pair is no use to anybody
        rounds::fail("mkfifo", std::strerror(error));
    }
    rounds::say("ready " + words.address);
    const int reader = open_end(c2s, O_RDONLY, words);
    const int writer = open_end(s2c, O_WRONLY, words);
    checked(unlink(c2s.c_str()), "unlink");  // both peers are in
    checked(unlink(s2c.c_str()), "unlink");
    std::vector<std::byte> message(words.size);
    while (read_all(reader, message))
        write_all(writer, message);
}

void ping(const rounds::Words& words) {
    const int writer = open_end(words.address + ".c2s", O_WRONLY, words);
    const int reader = open_end(words.address + ".s2c", O_RDONLY, words);
    rounds::measure(words, [=](auto message, auto reply) {
        write_all(writer, message);
        return read_all(reader, reply);
    });
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "PREFIX", serve, ping);
}

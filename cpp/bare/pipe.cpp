// Two named pipes (FIFOs), bare. Pick them for the least overhead, one client, one way each.
// The trap: open waits for the other end. Both peers open the same FIFO first; in crossed orders
// each would wait for the other for ever.
//     g++ -std=c++20 -O2 pipe.cpp -o pipe
//     ./pipe serve /tmp/demo 64 block & sleep 1; ./pipe ping /tmp/demo 64 block 100000
#include <sys/stat.h>
#include <unistd.h>

#include "rounds.hpp"

using rounds::checked;

// One call may move only a part of a message: read_all and write_all call until it is whole.
auto moves(int reader, int writer) {
    auto receive = [=](auto rest) { return read(reader, rest.data(), rest.size()); };
    auto transmit = [=](auto rest) { return write(writer, rest.data(), rest.size()); };
    return std::pair(rounds::whole("read", receive), rounds::whole("write", transmit));
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
    const auto [read_all, write_all] = moves(reader, writer);
    std::vector<std::byte> message(words.size);
    while (read_all(message))
        write_all(message);
}

void ping(const rounds::Words& words) {
    const int writer = open_end(words.address + ".c2s", O_WRONLY, words);
    const int reader = open_end(words.address + ".s2c", O_RDONLY, words);
    const auto [read_all, write_all] = moves(reader, writer);
    rounds::measure(words, write_all, read_all);
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "PREFIX", serve, ping);
}

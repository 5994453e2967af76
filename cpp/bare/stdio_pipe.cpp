// Pipes on stdin and stdout, bare. Pick them when one program starts the other anyway: no names.
// The trap: stdout is the wire, and a stray print corrupts it. So serve moves the wire away from
// fd 1 first of all, and points fd 1 at stderr.
//     g++ -std=c++20 -O2 stdio_pipe.cpp -o stdio_pipe
//     ./stdio_pipe ping 64 block 100000 -- ./stdio_pipe serve 64 block
#include <sys/wait.h>
#include <unistd.h>

#include "rounds.hpp"

using rounds::checked;

// One call may move only a part of a message: read_all and write_all call until it is whole.
auto moves(int reader, int writer) {
    auto receive = [=](auto rest) { return read(reader, rest.data(), rest.size()); };
    auto transmit = [=](auto rest) { return write(writer, rest.data(), rest.size()); };
    return std::pair(rounds::whole("read", receive), rounds::whole("write", transmit));
}

void serve(const rounds::Words& words) {
    const int reader = 0, writer = checked(dup(1), "dup");
    checked(dup2(2, 1), "dup2");
    checked(fcntl(reader, F_SETFL, words.wait), "fcntl");
    checked(fcntl(writer, F_SETFL, words.wait), "fcntl");
    const auto [read_all, write_all] = moves(reader, writer);
    std::vector<std::byte> message(words.size);
    while (read_all(message))
        write_all(message);
}

void ping(const rounds::Words& words) {
    int down[2], up[2], status = 0;  // CLOEXEC: a peer that keeps our ends sees no end of file
    checked(pipe2(down, O_CLOEXEC), "pipe2");
    checked(pipe2(up, O_CLOEXEC), "pipe2");
    const pid_t child = checked(fork(), "fork");
    if (child == 0) {
        checked(dup2(down[0], 0), "dup2");
        checked(dup2(up[1], 1), "dup2");
        checked(execvp(words.command[0], words.command), "execvp");
    }
    checked(close(down[0]), "close");
    checked(close(up[1]), "close");
    checked(fcntl(up[0], F_SETFL, words.wait), "fcntl");
    checked(fcntl(down[1], F_SETFL, words.wait), "fcntl");
    const auto [read_all, write_all] = moves(up[0], down[1]);
    rounds::measure(words, write_all, read_all);
    checked(close(down[1]), "close");  // end of file, so that the peer leaves
    checked(waitpid(child, &status, 0), "waitpid");
    if (status != 0)
        rounds::fail("peer", "failed");
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "", serve, ping);
}

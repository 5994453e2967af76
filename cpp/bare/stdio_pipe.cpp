// Pipes on stdin and stdout, bare. Pick them when one program starts the other anyway: no names.
// The trap: stdout is the wire, and a stray print corrupts it. So serve moves the wire away from
// fd 1 first of all, and points fd 1 at stderr.
//     g++ -std=c++20 -O2 stdio_pipe.cpp -o stdio_pipe
//     ./stdio_pipe ping 64 block 100000 -- ./stdio_pipe serve 64 block
#include <sys/wait.h>
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

void serve(const rounds::Words& words) {
    const int reader = 0, writer = checked(dup(1), "dup");
    checked(dup2(2, 1), "dup2");
    checked(fcntl(reader, F_SETFL, words.wait), "fcntl");
    checked(fcntl(writer, F_SETFL, words.wait), "fcntl");
    std::vector<std::byte> message(words.size);
    while (read_all(reader, message))
        write_all(writer, message);
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
    rounds::measure(words, [=](auto message, auto reply) {
        write_all(down[1], message);
        return read_all(up[0], reply);
    });
    checked(close(down[1]), "close");  // end of file, so that the peer leaves
    checked(waitpid(child, &status, 0), "waitpid");
    if (status != 0)
        rounds::fail("peer", "failed");
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "", serve, ping);
}

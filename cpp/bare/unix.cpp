// A Unix stream socket, bare. Pick it first on one machine: access by file permission, room for
// many clients (here: one), and end of file at once when a peer goes, however it goes.
// The trap: the path outlives its server and fails the next bind. Whoever bound it unlinks it.
//     g++ -std=c++20 -O2 unix.cpp -o unix
//     ./unix serve /tmp/demo 64 block & sleep 1; ./unix ping /tmp/demo 64 block 100000
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "rounds.hpp"

using rounds::checked;

// One call may move only a part of a message: read_all and write_all call until it is whole.
auto moves(int peer) {
    const int room = 512 << 10;  // Linux doubles it; each 208 KiB by default is a wake-up
    checked(setsockopt(peer, SOL_SOCKET, SO_SNDBUF, &room, sizeof room), "setsockopt");
    auto receive = [=](auto rest) { return recv(peer, rest.data(), rest.size(), 0); };
    // MSG_NOSIGNAL: to write to a peer that left is an error, not our death.
    auto transmit = [=](auto rest) { return send(peer, rest.data(), rest.size(), MSG_NOSIGNAL); };
    return std::pair(rounds::whole("recv", receive), rounds::whole("send", transmit));
}

void name_socket(auto call, const char* name, int fd, const std::string& path) {
    sockaddr_un address{AF_UNIX, {}};  // Python's socket does all this by itself
    if (path.copy(address.sun_path, sizeof address.sun_path - 1) < path.size())
        rounds::fail(name, "AF_UNIX path too long");
    checked(call(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), name);
}

void serve(const rounds::Words& words) {
    const int listener = checked(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
    checked(fchmod(listener, 0600), "fchmod");  // bind gives the path this mode, from the start
    name_socket(bind, "bind", listener, words.address);
    checked(listen(listener, 1), "listen");
    rounds::say("ready " + words.address);
    const int peer = checked(accept(listener, nullptr, nullptr), "accept");
    checked(close(listener), "close");  // one client is all: refuse the next
    checked(unlink(words.address.c_str()), "unlink");
    checked(fcntl(peer, F_SETFL, words.wait), "fcntl");
    const auto [read_all, write_all] = moves(peer);
    std::vector<std::byte> message(words.size);
    while (read_all(message))
        write_all(message);
}

void ping(const rounds::Words& words) {
    const int peer = checked(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
    name_socket(connect, "connect", peer, words.address);
    checked(fcntl(peer, F_SETFL, words.wait), "fcntl");
    const auto [read_all, write_all] = moves(peer);
    rounds::measure(words, write_all, read_all);
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "PATH", serve, ping);
}

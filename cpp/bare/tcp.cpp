// A TCP socket on the loopback, bare. Pick it when the peer may move to another machine one day.
// The trap: Nagle's algorithm holds a small message back until the last is acknowledged, which can
// take 40 ms. TCP_NODELAY turns that off, and it takes both ends.
//     g++ -std=c++20 -O2 tcp.cpp -o tcp
//     ./tcp serve 5000 64 block & sleep 1; ./tcp ping 5000 64 block 100000
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include "rounds.hpp"

using rounds::checked;

// One call may move only a part of a message: read_all and write_all call until it is whole.
auto moves(int peer) {
    auto receive = [=](auto rest) { return recv(peer, rest.data(), rest.size(), 0); };
    // MSG_NOSIGNAL: to write to a peer that left is an error, not our death.
    auto transmit = [=](auto rest) { return send(peer, rest.data(), rest.size(), MSG_NOSIGNAL); };
    return std::pair(rounds::whole("recv", receive), rounds::whole("send", transmit));
}

void serve(const rounds::Words& words) {
    const auto port = rounds::number<in_port_t>(words.address, 0, 65535);
    sockaddr_in address{AF_INET, htons(port), {htonl(INADDR_LOOPBACK)}, {}};
    socklen_t size = sizeof address;
    const int listener = checked(socket(AF_INET, SOCK_STREAM, 0), "socket");
    const int on = 1;  // REUSEADDR: else the port rests for a minute after a run
    checked(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), "setsockopt");
    checked(bind(listener, reinterpret_cast<sockaddr*>(&address), size), "bind");
    checked(listen(listener, 1), "listen");
    checked(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size), "getsockname");
    rounds::say("ready " + std::to_string(ntohs(address.sin_port)));  // 0 has become a free port
    const int peer = checked(accept(listener, nullptr, nullptr), "accept");
    checked(close(listener), "close");  // one client is all: refuse the next
    checked(setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), "setsockopt");
    checked(fcntl(peer, F_SETFL, words.wait), "fcntl");
    const auto [read_all, write_all] = moves(peer);
    std::vector<std::byte> message(words.size);
    while (read_all(message))
        write_all(message);
}

void ping(const rounds::Words& words) {
    const auto port = rounds::number<in_port_t>(words.address, 0, 65535);
    sockaddr_in address{AF_INET, htons(port), {htonl(INADDR_LOOPBACK)}, {}};
    const int peer = checked(socket(AF_INET, SOCK_STREAM, 0), "socket");
    checked(connect(peer, reinterpret_cast<sockaddr*>(&address), sizeof address), "connect");
    const int on = 1;
    checked(setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), "setsockopt");
    checked(fcntl(peer, F_SETFL, words.wait), "fcntl");
    const auto [read_all, write_all] = moves(peer);
    rounds::measure(words, write_all, read_all);
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "PORT", serve, ping);
}

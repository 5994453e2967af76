// A TCP socket on the loopback, bare: what works the same when the peer moves to another machine.
// The trap: Nagle's algorithm holds a small message back until the last is acknowledged, which can
// take 40 ms. TCP_NODELAY turns that off, and it takes both ends.
//     ./tcp serve 5000 64 block & sleep 1; ./tcp ping 5000 64 block 100000
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

void need(bool ok, const char* step) {  // Python raises without being asked
    ok ? void() : (perror(step), exit(1));
}

bool move_all(auto call, int peer, std::vector<char>& message, int flags) {
    std::size_t done = 0;  // one call may move only a part of the message
    for (ssize_t moved = 1; moved && done < message.size(); done += size_t(std::max(moved, 0L))) {
        moved = call(peer, &message[done], message.size() - done, flags);
        need(moved >= 0 || errno == EAGAIN, "error: recv or send");  // EAGAIN: spinning, not yet
    }
    return done == message.size();  // if not: end of file
}

int main(int argc, char** argv) {
    need((errno = EINVAL) && argc > 4, "error: serve|ping PORT SIZE block|spin [ROUNDS [FILE]]");
    const bool serve = argv[1] == std::string("serve");
    const int flags = MSG_NOSIGNAL | (argv[4] == std::string("spin") ? MSG_DONTWAIT : 0);
    sockaddr_in name{AF_INET, htons(uint16_t(std::stoul(argv[2]))), {htonl(INADDR_LOOPBACK)}, {}};
    socklen_t name_size = sizeof name;
    int peer = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    need((serve ? bind : connect)(peer, (sockaddr*)&name, name_size) == 0, "error: PORT");
    if (serve) {  // port 0 has become a free one
        need(!listen(peer, 1) && !getsockname(peer, (sockaddr*)&name, &name_size), "error: PORT");
        need(dprintf(1, "ready %d\n", ntohs(name.sin_port)) > 0, "error: ready");
        need((peer = accept(peer, nullptr, nullptr)) >= 0, "error: accept");
    }
    need(setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0, "error: TCP_NODELAY");
    std::vector<char> message(std::stoul(argv[3])), reply(message);
    for (; serve; move_all(send, peer, message, flags))
        if (!move_all(recv, peer, message, flags))
            return 0;
    const std::size_t rounds = std::stoul(argc > 5 ? argv[5] : "1000"), all = 8 * rounds;
    std::vector<long> ns(rounds);
    for (std::size_t turn = rounds - rounds / 10; turn < 2 * rounds; ++turn) {
        message.assign(reply.size(), static_cast<char>(turn));  // no byte like the last reply's
        const auto start = std::chrono::steady_clock::now();
        move_all(send, peer, message, flags);
        move_all(recv, peer, reply, flags);
        ns[turn % rounds] = (std::chrono::steady_clock::now() - start).count();  // over warm-up's
        need((errno = EBADMSG) && reply == message, "error: echo");
    }
    need(argc < 7 || write(creat(argv[6], 0600), &ns[0], all) == ssize_t(all), "error: FILE");
    std::ranges::sort(ns);
    printf("p50_ns=%ld p99_ns=%ld rounds=%zu\n", ns[rounds / 2], ns[rounds * 99 / 100], rounds);
}

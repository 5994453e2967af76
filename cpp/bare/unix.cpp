// A Unix stream socket, bare: the first choice on one machine. Any number of clients, access by
// file permission, and end of file at once when a peer goes, however it goes.
// The trap: the path outlives its server and fails the next bind. Whoever bound it unlinks it.
//     ./unix serve /tmp/demo 64 block & sleep 1; ./unix ping /tmp/demo 64 block 100000
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
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
    need((errno = EINVAL) && argc > 4, "error: serve|ping PATH SIZE block|spin [ROUNDS [FILE]]");
    const bool serve = argv[1] == std::string("serve");
    const int flags = MSG_NOSIGNAL | (argv[4] == std::string("spin") ? MSG_DONTWAIT : 0);
    sockaddr_un name{AF_UNIX, {}};
    need(snprintf(name.sun_path, sizeof name.sun_path, "%s", argv[2]) < 108, "error: PATH");
    int peer = socket(AF_UNIX, SOCK_STREAM, 0);
    need((serve ? bind : connect)(peer, (sockaddr*)&name, sizeof name) == 0, "error: PATH");
    if (serve) {
        need(listen(peer, 1) == 0 && dprintf(1, "ready %s\n", argv[2]) > 0, "error: listen");
        peer = accept(peer, nullptr, nullptr);
        need(unlink(argv[2]) == 0 && peer >= 0, "error: accept");  // no second client: unlink
    }
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

// Two named pipes (FIFOs), bare: the least overhead of the kernel's byte streams, but one way each
// and for one client. The trap: open() waits for the other end. So both peers open the same FIFO
// first; in crossed orders each would wait for the other for ever.
//     ./pipe serve /tmp/demo 64 block & sleep 1; ./pipe ping /tmp/demo 64 block 100000
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

void need(bool ok, const char* step) {  // Python raises without being asked
    ok ? void() : (perror(step), exit(1));
}

bool move_all(auto call, int fd, std::vector<char>& message) {
    std::size_t done = 0;  // one call may move only a part of the message
    for (ssize_t moved = 1; moved && done < message.size(); done += size_t(std::max(moved, 0L))) {
        moved = call(fd, &message[done], message.size() - done);
        need(moved >= 0 || errno == EAGAIN, "error: read or write");  // EAGAIN: spinning, not yet
    }
    return done == message.size();  // if not: end of file
}

int main(int argc, char** argv) {
    need((errno = EINVAL) && argc > 4, "error: serve|ping PREFIX SIZE block|spin [ROUNDS [FILE]]");
    const bool serve = argv[1] == std::string("serve"), spin = argv[4] == std::string("spin");
    const std::string c2s = argv[2] + std::string(".c2s"), s2c = argv[2] + std::string(".s2c");
    need(!serve || (!mkfifo(c2s.c_str(), 0600) && !mkfifo(s2c.c_str(), 0600)), "error: mkfifo");
    need(!serve || dprintf(1, "ready %s\n", argv[2]) > 0, "error: ready");
    const int first = open(c2s.c_str(), serve ? O_RDONLY : O_WRONLY);
    const int second = open(s2c.c_str(), serve ? O_WRONLY : O_RDONLY);
    const int reader = serve ? first : second, writer = serve ? second : first;
    need(!serve || (!unlink(c2s.c_str()) && !unlink(s2c.c_str())), "error: unlink");  // both are in
    for (const int fd : {reader, writer})
        need(fd >= 0 && (!spin || fcntl(fd, F_SETFL, O_NONBLOCK) == 0), "error: PREFIX");
    signal(SIGPIPE, SIG_IGN);  // a peer that left is an error of write, not our death
    std::vector<char> message(std::stoul(argv[3])), reply(message);
    for (; serve; move_all(write, writer, message))
        if (!move_all(read, reader, message))
            return 0;
    const std::size_t rounds = std::stoul(argc > 5 ? argv[5] : "1000"), all = 8 * rounds;
    std::vector<long> ns(rounds);
    for (std::size_t turn = rounds - rounds / 10; turn < 2 * rounds; ++turn) {
        message.assign(reply.size(), static_cast<char>(turn));  // no byte like the last reply's
        const auto start = std::chrono::steady_clock::now();
        move_all(write, writer, message);
        move_all(read, reader, reply);
        ns[turn % rounds] = (std::chrono::steady_clock::now() - start).count();  // over warm-up's
        need((errno = EBADMSG) && reply == message, "error: echo");
    }
    need(argc < 7 || write(creat(argv[6], 0600), &ns[0], all) == ssize_t(all), "error: FILE");
    std::ranges::sort(ns);
    printf("p50_ns=%ld p99_ns=%ld rounds=%zu\n", ns[rounds / 2], ns[rounds * 99 / 100], rounds);
}

// Pipes on stdin and stdout, bare: the parent starts its peer as a child, so nobody needs a name.
// The trap: stdout is the wire, and a stray print corrupts it. So serve moves the wire away from
// fd 1 first of all and points fd 1 at stderr.
//     ./stdio_pipe ping 64 block 100000 -- ./stdio_pipe serve 64 block
#include <fcntl.h>
#include <sys/wait.h>
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
    need((errno = EINVAL) && argc > 3, "error: serve|ping SIZE block|spin [ROUNDS [FILE] -- PEER]");
    const bool serve = argv[1] == std::string("serve"), spin = argv[3] == std::string("spin");
    int reader = 0, writer = dup(1), status = 0, down[2], up[2];
    need(serve ? dup2(2, 1) == 1 : !pipe2(down, O_CLOEXEC) && !pipe2(up, O_CLOEXEC), "error: pipe");
    if (!serve) {
        char** const peer = std::find(argv, argv + argc, std::string("--")) + 1;
        if (fork() == 0)
            need(!dup2(down[0], 0) && dup2(up[1], 1) == 1 && !execvp(*peer, peer), "error: PEER");
        close(down[0]), close(up[1]), reader = up[0], writer = down[1];
    }
    for (const int fd : {reader, writer})
        need(!spin || fcntl(fd, F_SETFL, O_NONBLOCK) == 0, "error: fcntl");
    signal(SIGPIPE, SIG_IGN);  // a peer that left is an error of write, not our death
    std::vector<char> message(std::stoul(argv[2])), reply(message);
    for (; serve; move_all(write, writer, message))
        if (!move_all(read, reader, message))
            return 0;
    const std::size_t rounds = std::stoul(argc > 4 ? argv[4] : "1000"), all = 8 * rounds;
    std::vector<long> ns(rounds);
    for (std::size_t turn = rounds - rounds / 10; turn < 2 * rounds; ++turn) {
        message.assign(reply.size(), static_cast<char>(turn));  // no byte like the last reply's
        const auto start = std::chrono::steady_clock::now();
        move_all(write, writer, message);
        move_all(read, reader, reply);
        ns[turn % rounds] = (std::chrono::steady_clock::now() - start).count();  // over warm-up's
        need((errno = EBADMSG) && reply == message, "error: echo");
    }
    need(*argv[5] == '-' || write(creat(argv[5], 0600), &ns[0], all) == ssize_t(all), "error: IO");
    std::ranges::sort(ns);
    printf("p50_ns=%ld p99_ns=%ld rounds=%zu\n", ns[rounds / 2], ns[rounds * 99 / 100], rounds);
    need(!close(writer) && wait(&status) > 0 && status == 0, "error: PEER");  // it sees the end
}

// A pair of System V message queues, bare. Pick them to learn them: messages stay whole, in order.
// The trap: a queue belongs to nobody. It has no end of file (here: an empty message), and outlives
// all its users until somebody removes it: ipcs shows it, ipcrm -Q KEY ends it.
//     g++ -std=c++20 -O2 sysv_queue.cpp -o sysv_queue
//     ./sysv_queue serve 7000 64 block & sleep 1; ./sysv_queue ping 7000 64 block 100000
#include <sys/msg.h>

#include <memory>

#include "rounds.hpp"

using rounds::checked;

struct Chunk {
    long type = 1;       // any but 0
    std::byte at[8192];  // msgmax by default; what is larger goes in several messages
};
constexpr int key_max = 1 << 30;

int open_queue(int key, int flags) {
    return checked(msgget(key, flags), "msgget");
}

// One call moves one chunk: read_all and write_all call until the message is whole.
auto moves(int reader, int writer, int wait) {
    const int flags = wait != 0 ? IPC_NOWAIT : 0;
    const auto chunk = std::make_shared<Chunk>();
    auto receive = [=](auto rest) {
        const ssize_t count = msgrcv(reader, chunk.get(), sizeof chunk->at, 0, flags);
        std::copy_n(chunk->at, std::max<ssize_t>(count, 0), rest.data());
        errno = errno == ENOMSG ? EAGAIN : errno;
        return count;
    };
    auto transmit = [=](auto rest) {
        const auto count = static_cast<ssize_t>(std::min(rest.size(), sizeof chunk->at));
        std::copy_n(rest.data(), count, chunk->at);
        return msgsnd(writer, chunk.get(), static_cast<std::size_t>(count), flags) ? -1 : count;
    };
    return std::pair(rounds::whole("msgrcv", receive), rounds::whole("msgsnd", transmit));
}

void serve(const rounds::Words& words) {
    const int key = rounds::number<int>(words.address, 1, key_max);
    const int c2s = open_queue(key, IPC_CREAT | IPC_EXCL | 0600);
    const int s2c = open_queue(key + 1, IPC_CREAT | IPC_EXCL | 0600);
    rounds::say("ready " + words.address);
    const auto [read_all, write_all] = moves(c2s, s2c, words.wait);
    std::vector<std::byte> message(words.size);
    while (read_all(message))
        write_all(message);
    for (const int queue : {c2s, s2c})  // ping has read all: nothing unread is lost
        checked(msgctl(queue, IPC_RMID, nullptr), "msgctl");
}

void ping(const rounds::Words& words) {
    const int key = rounds::number<int>(words.address, 1, key_max);
    const int writer = open_queue(key, 0), reader = open_queue(key + 1, 0);
    const auto [read_all, write_all] = moves(reader, writer, words.wait);
    rounds::measure(words, write_all, read_all);
    const Chunk end{};
    checked(msgsnd(writer, &end, 0, 0), "msgsnd");
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "KEY", serve, ping);
}

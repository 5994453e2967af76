// System V shared memory under semaphores, bare: the textbook's bounded buffer, one for each way.
// The trap: nobody hears that a peer died, and all of it outlives all its users until somebody
// removes it: ipcs shows it, ipcrm -M KEY ends the segment, ipcrm -S KEY a semaphore.
//     g++ -std=c++20 -O2 sysv_shm.cpp -o sysv_shm
//     ./sysv_shm serve 7000 64 block & sleep 1; ./sysv_shm ping 7000 64 block 100000
#include <sys/sem.h>
#include <sys/shm.h>

#include "rounds.hpp"

using rounds::checked;

constexpr std::size_t slots = 4, slot_bytes = 8192;
constexpr int key_max = 1 << 30;
struct Slot {
    std::uint32_t size;  // 0: the end
    std::byte bytes[slot_bytes];
};

struct Way {
    Way(int key, int flags, Slot* first) : slot(first) {
        free = checked(semget(key, 1, flags), "semget");  // counts slots, as `full` does
        full = checked(semget(key + 1, 1, flags), "semget");
        if (flags != 0)
            checked(semctl(free, 0, SETVAL, slots), "semctl");
    }
    Slot* slot;
    int free, full;
    std::size_t next = 0;
};

// What a semaphore counts is also seen: who has got a full slot sees all that was put into it.
int step(int semaphore, short by, int wait) {
    sembuf change{0, by, static_cast<short>(wait != 0 ? IPC_NOWAIT : 0)};
    return semop(semaphore, &change, 1);
}

ssize_t take(Way& way, std::span<std::byte> rest, int wait) {
    if (step(way.full, -1, wait) < 0)
        return -1;
    const Slot& slot = way.slot[way.next++ % slots];
    const auto count = std::min<std::size_t>(slot.size, rest.size());
    std::copy_n(slot.bytes, count, rest.data());
    checked(step(way.free, 1, 0), "semop");
    return static_cast<ssize_t>(count);
}

ssize_t put(Way& way, std::span<const std::byte> rest, int wait) {
    if (step(way.free, -1, wait) < 0)
        return -1;
    Slot& slot = way.slot[way.next++ % slots];
    slot.size = static_cast<std::uint32_t>(std::min(rest.size(), slot_bytes));
    std::copy_n(rest.data(), slot.size, slot.bytes);
    checked(step(way.full, 1, 0), "semop");
    return static_cast<ssize_t>(slot.size);
}

auto moves(Way& in, Way& out, int wait) {
    auto receive = [&in, wait](auto rest) { return take(in, rest, wait); };
    auto transmit = [&out, wait](auto rest) { return put(out, rest, wait); };
    return std::pair(rounds::whole("semop", receive), rounds::whole("semop", transmit));
}

auto attach(int key, int flags) {
    const int segment = checked(shmget(key, 2 * slots * sizeof(Slot), flags), "shmget");
    void* const at = shmat(segment, nullptr, 0);
    checked(at == reinterpret_cast<void*>(-1) ? -1 : 0, "shmat");
    return static_cast<Slot*>(at);
}

void serve(const rounds::Words& words) {
    const int key = rounds::number<int>(words.address, 1, key_max);
    const int fresh = IPC_CREAT | IPC_EXCL | 0600;
    Slot* const at = attach(key, fresh);
    Way c2s(key, fresh, at), s2c(key + 2, fresh, at + slots);
    rounds::say("ready " + words.address);
    const auto [read_all, write_all] = moves(c2s, s2c, words.wait);
    std::vector<std::byte> message(words.size);
    while (read_all(message))
        write_all(message);
    checked(shmctl(shmget(key, 0, 0), IPC_RMID, nullptr), "shmctl");
    for (const int semaphore : {c2s.free, c2s.full, s2c.free, s2c.full})
        checked(semctl(semaphore, 0, IPC_RMID), "semctl");
}

void ping(const rounds::Words& words) {
    const int key = rounds::number<int>(words.address, 1, key_max);
    Slot* const at = attach(key, 0);
    Way c2s(key, 0, at), s2c(key + 2, 0, at + slots);
    const auto [read_all, write_all] = moves(s2c, c2s, words.wait);
    rounds::measure(words, write_all, read_all);
    put(c2s, {}, 0);  // the end
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "KEY", serve, ping);
}

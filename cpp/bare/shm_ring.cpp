// Shared memory, bare: a ring of slots for each way, without a lock, and while both spin without a
// system call. Nothing is faster; pick it where a core may poll.
// The trap: bytes, then a flag, is not enough. Compiler and processor may store the flag first, or
// load the bytes first, unless the flag is stored with release and loaded with acquire. And nobody
// hears that a peer died, or that it waits the other way: both must block, or both spin.
//     g++ -std=c++20 -O2 shm_ring.cpp -o shm_ring
//     ./shm_ring serve /dev/shm/it 64 spin & sleep 1; ./shm_ring ping /dev/shm/it 64 spin 100000
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "rounds.hpp"

using rounds::checked;

constexpr std::size_t slots = 16, slot_bytes = 16384;
struct Slot {
    alignas(64) std::atomic<std::uint32_t> filled;  // 0: free, the writer's; else the reader's:
    alignas(64) std::byte bytes[slot_bytes];        // its size, and 1
};

struct Way {
    Slot* slot;
    int wait;
    std::size_t next = 0;
};

// acquire: pairs with hand_over's release. Who has a slot sees all that was done to it before.
std::uint32_t wait_for(Slot& slot, bool filled, int wait) {
    while (true) {
        const std::uint32_t now = slot.filled.load(std::memory_order_acquire);
        if ((now != 0) == filled)
            return now;
        if (wait == 0)  // sleep, unless it has changed by now: the kernel looks again, futex(2)
            syscall(SYS_futex, &slot.filled, FUTEX_WAIT, now, nullptr, nullptr, 0);
    }
}

// release: what was done to the slot is done before it is the other's.
void hand_over(Slot& slot, std::size_t filled, int wait) {
    slot.filled.store(static_cast<std::uint32_t>(filled), std::memory_order_release);
    if (wait == 0)
        checked(syscall(SYS_futex, &slot.filled, FUTEX_WAKE, 1, nullptr, nullptr, 0), "futex");
}

ssize_t take(Way& way, std::span<std::byte> rest) {
    Slot& slot = way.slot[way.next++ % slots];
    const std::size_t size = wait_for(slot, true, way.wait) - 1;  // 0: the end
    const std::size_t count = std::min({size, rest.size(), slot_bytes});
    std::copy_n(slot.bytes, count, rest.data());
    hand_over(slot, 0, way.wait);
    return static_cast<ssize_t>(count);
}

ssize_t put(Way& way, std::span<const std::byte> rest) {
    Slot& slot = way.slot[way.next++ % slots];
    const std::size_t count = std::min(rest.size(), slot_bytes);
    wait_for(slot, false, way.wait);
    std::copy_n(rest.data(), count, slot.bytes);
    hand_over(slot, count + 1, way.wait);
    return static_cast<ssize_t>(count);
}

auto moves(Way& in, Way& out) {
    auto receive = [&in](auto rest) { return take(in, rest); };
    auto transmit = [&out](auto rest) { return put(out, rest); };
    return std::pair(rounds::whole("take", receive), rounds::whole("put", transmit));
}

auto attach(const rounds::Words& words, int flags) {
    constexpr std::size_t bytes = 2 * slots * sizeof(Slot);
    const int fd = checked(open(words.address.c_str(), O_RDWR | flags, 0600), "open");
    checked(fallocate(fd, 0, 0, bytes), "fallocate");  // now: later it would be SIGBUS
    void* const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    checked(at == MAP_FAILED ? -1 : 0, "mmap");
    Slot* const slot = static_cast<Slot*>(at);
    return std::pair(Way{slot, words.wait}, Way{slot + slots, words.wait});
}

void serve(const rounds::Words& words) {
    auto [c2s, s2c] = attach(words, O_CREAT | O_EXCL);  // filled with zeros: all is free
    rounds::say("ready " + words.address);
    const auto [read_all, write_all] = moves(c2s, s2c);
    std::vector<std::byte> message(words.size);
    while (read_all(message))
        write_all(message);
    checked(unlink(words.address.c_str()), "unlink");
}

void ping(const rounds::Words& words) {
    auto [c2s, s2c] = attach(words, 0);
    const auto [read_all, write_all] = moves(s2c, c2s);
    rounds::measure(words, write_all, read_all);
    put(c2s, {});  // the end
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "PATH", serve, ping);
}

// Shared memory, bare. Pick it for speed: while both spin, a message of 56 bytes is one cache line
// that moves from core to core. Here is one slot each way, and strict turns; no ring, one client.
// The trap: nobody tells that a peer died, and nothing orders bytes and flag but release/acquire.
//     g++ -std=c++20 -O2 shm.cpp -o shm
//     ./shm serve /dev/shm/demo 64 spin & sleep 1; ./shm ping /dev/shm/demo 64 spin 100000
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "rounds.hpp"

using rounds::checked;

constexpr std::size_t chunk = 16384, stride = chunk + 64;  // flag u32, 4 bytes, payload
constexpr std::uint32_t over = ~0U;                        // the flag of a peer that leaves

std::atomic_ref<std::uint32_t> flag(std::byte* at) {
    return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(at));
}

void signal(std::byte* at, std::uint32_t value, int wait) {
    flag(at).store(value, std::memory_order_release);  // who sees it sees the payload
    if (wait != O_NONBLOCK)
        syscall(SYS_futex, at, FUTEX_WAKE, 1, nullptr);
}

std::byte* map(int file, const rounds::Words& words) {
    const std::size_t size = 2 * stride * (words.size / chunk + 1);
    checked(ftruncate(file, static_cast<off_t>(size)), "ftruncate");
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
    return at == MAP_FAILED ? rounds::fail("mmap", std::strerror(errno)),
           nullptr          : static_cast<std::byte*>(at);
}

// Chunks, so that the reader copies the first out while the writer copies the next in.
auto moves(std::byte* in, std::byte* out, int wait) {
    auto each = [](std::span<std::byte> message, std::byte* at, auto move) {
        for (std::size_t done = 0; done < message.size(); done += chunk, at += stride)
            if (!move(message.subspan(done, std::min(chunk, message.size() - done)), at))
                return false;
        return true;
    };
    auto read_all = [=, turn = 0U](std::span<std::byte> message) mutable {
        return each(message, in, [&, now = ++turn](auto part, std::byte* at) {
            std::uint32_t seen = 0;
            while ((seen = flag(at).load(std::memory_order_acquire)) != now && seen != over)
                if (wait != O_NONBLOCK)
                    syscall(SYS_futex, at, FUTEX_WAIT, seen, nullptr);
            std::memcpy(part.data(), at + 8, part.size());
            return seen == now;
        });
    };
    auto write_all = [=, turn = 0U](std::span<std::byte> message) mutable {
        return each(message, out, [&, now = ++turn](auto part, std::byte* at) {
            std::memcpy(at + 8, part.data(), part.size());
            signal(at, now, wait);
            return true;
        });
    };
    return std::pair(read_all, write_all);
}

void serve(const rounds::Words& words) {
    const int file = checked(open(words.address.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600), "open");
    std::byte* const base = map(file, words);
    rounds::say("ready " + words.address);
    auto [read_all, write_all] = moves(base, base + stride * (words.size / chunk + 1), words.wait);
    std::vector<std::byte> message(words.size);
    while (read_all(message)) {
        unlink(words.address.c_str());  // both peers are in
        write_all(message);
    }
}

void ping(const rounds::Words& words) {
    const int file = checked(open(words.address.c_str(), O_RDWR), "open");
    std::byte* const base = map(file, words);
    auto [read_all, write_all] = moves(base + stride * (words.size / chunk + 1), base, words.wait);
    rounds::measure(words, write_all, read_all);
    signal(base, over, words.wait);
}

int main(int argc, char** argv) {
    return rounds::run(argc, argv, "PATH", serve, ping);
}

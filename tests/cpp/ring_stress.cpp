// Two threads on the two sides of one ring, as hard as they can. tests/test_ring.py builds it,
// also against copies of ring.hpp with one memory order taken away, and expects it to find that.
//
//     ring_stress pingpong ROUNDS   each sleeps now and then: a lost wake-up ends it with 3
//     ring_stress flood BYTES       each sends and receives without sleeping, and verifies: 4
//
// Under ThreadSanitizer `flood` sees an order that is missing between payload and index, also where
// this processor would have kept it by itself.
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <ipc_bridge/transports/ring.hpp>

namespace {

using namespace ipc_bridge;

constexpr int lost = 3;
constexpr int differs = 4;
constexpr int sleep_ms_max = 3000;  // far above any wake-up, also on a busy machine

// Both sides on one mapping, which is what TSan can watch.
struct Pair {
    explicit Pair(std::uint64_t start) {
        int ends[2];
        checked(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends), "socketpair", "");
        const auto memory = ring::Memory::make(ring::capacity_bytes_min, start).first;
        for (const int side : {0, 1}) {
            bells[side] = Fd(ends[side]);
            sides[side] = std::make_unique<ring::Duplex>(memory, side, ends[side], "stress");
        }
    }
    Fd bells[2];
    std::unique_ptr<ring::Duplex> sides[2];
};

class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) {}
    std::uint64_t below(std::uint64_t limit) {
        state_ = state_ * 6364136223846793005U + 1442695040888963407U;
        return (state_ >> 33U) % limit;
    }

  private:
    std::uint64_t state_;
};

void pin(int side) {
    cpu_set_t allowed;
    sched_getaffinity(0, sizeof(allowed), &allowed);
    int seen = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &allowed) && seen++ == side) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            pthread_setaffinity_np(pthread_self(), sizeof(one), &one);
        }
    }
}

// Sleep as a stream does, after a spin; returns how long that was.
std::uint64_t wait_readable(ring::Duplex& side, int bell, std::uint64_t spins_max) {
    for (std::uint64_t spins = 0; spins < spins_max; ++spins) {
        if (side.is_readable()) {
            return spins;
        }
    }
    while (true) {
        side.arm();
        if (side.is_readable()) {
            side.disarm();
            return spins_max;
        }
        pollfd ready{bell, POLLIN, 0};
        const int count = ::poll(&ready, 1, sleep_ms_max);
        side.disarm();
        if (count == 0 && side.is_readable()) {
            std::puts("a wake-up was lost");
            std::exit(lost);
        }
        side.take_bells();
        if (side.is_readable()) {
            return spins_max;
        }
    }
}

void play(Pair& pair, int number, std::uint64_t rounds) {
    pin(number);
    Random random(static_cast<std::uint64_t>(number) + 1);
    ring::Duplex& side = *pair.sides[number];
    std::array<std::byte, 24> ball{};
    const std::span<const std::byte> parts[] = {ball};
    std::uint64_t usual = 100;  // spins until the answer, if nobody sleeps
    for (std::uint64_t round = 0; round < rounds; ++round) {
        if (number == 0) {
            side.write(parts);
        }
        // Now and then the spin ends just as the answer comes: there the fences are needed.
        const bool sleeps = random.below(8) == 0;
        const std::uint64_t most = sleeps ? random.below(2 * usual + 2) : 10'000;
        const std::uint64_t spins = wait_readable(side, pair.bells[number].get(), most);
        usual = sleeps || spins == most ? usual : (7 * usual + spins) / 8;
        side.read(ball);
        if (number == 1) {
            side.write(parts);
        }
    }
}

std::byte byte_of(int sender, std::uint64_t at) {
    const std::uint64_t mixed = (at + static_cast<std::uint64_t>(sender)) * 0x9E3779B97F4A7C15U;
    return static_cast<std::byte>(mixed >> 56U);
}

void flood(Pair& pair, int number, std::uint64_t bytes) {
    pin(number);
    Random random(static_cast<std::uint64_t>(number) + 7);
    ring::Duplex& side = *pair.sides[number];
    std::vector<std::byte> out(40'000);
    std::vector<std::byte> in(40'000);
    std::uint64_t sent = 0;
    std::uint64_t got = 0;
    while (sent < bytes || got < bytes) {
        if (sent < bytes) {
            const std::uint64_t size =
                std::min(bytes - sent, 1 + random.below(random.below(8) == 0 ? out.size() : 200));
            for (std::uint64_t i = 0; i < size; ++i) {
                out[i] = byte_of(number, sent + i);
            }
            const std::span<const std::byte> parts[] = {
                {out.data(), size / 3}, {out.data() + size / 3, size - size / 3}};
            sent += side.write(parts);
        }
        if (got < bytes) {
            const std::size_t count = side.read({in.data(), 1 + random.below(in.size())});
            for (std::size_t i = 0; i < count; ++i) {
                if (in[i] != byte_of(1 - number, got + i)) {
                    std::puts("other bytes came");
                    std::exit(differs);
                }
            }
            got += count;
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::puts("usage: ring_stress pingpong|flood COUNT");
        return 2;
    }
    const auto body = std::string(argv[1]) == "pingpong" ? play : flood;
    const std::uint64_t count = std::strtoull(argv[2], nullptr, 10);
    Pair pair(0 - (std::uint64_t{1} << 16U));  // the indices pass 2^64 soon
    std::thread other([&] { body(pair, 1, count); });
    body(pair, 0, count);
    other.join();
    return 0;
}

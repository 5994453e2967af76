// What no transport can beat on this machine, for the harness to compare with:
//
//     ipc-bridge-floors line CORE CORE SECONDS        a cache line, to another core and back
//     ipc-bridge-floors memcpy CORE SIZE SECONDS      one copy within a process
//     ipc-bridge-floors copy CORE CORE SIZE SECONDS   copied into shared memory by one process, and
//                                                     out of it by another (or on one core, by one)
//
// Prints `p50_ns=N rounds=N` or `bytes_per_second=N`. Both sides spin: a core each, or it crawls.
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace {

constexpr std::size_t chunk_bytes = 16384;  // that of the shared-memory transport
constexpr std::size_t chunks = 16;          // 256 KiB in all: more gains nothing
constexpr std::size_t size_bytes_max = std::size_t{1} << 30U;
constexpr double seconds_max = 60.0;
constexpr int core_max = CPU_SETSIZE - 1;

struct alignas(128) Line {
    std::atomic<std::uint32_t> turn{0};
};

// A slot of the ring: its flag has a line of its own.
struct Chunk {
    alignas(128) std::atomic<std::uint32_t> filled{0};
    alignas(128) std::array<std::byte, chunk_bytes> bytes;
};

[[noreturn]] void usage() {
    std::fputs(
        "usage: ipc-bridge-floors line CORE CORE SECONDS\n"
        "       ipc-bridge-floors memcpy CORE SIZE SECONDS\n"
        "       ipc-bridge-floors copy CORE CORE SIZE SECONDS\n",
        stderr
    );
    std::exit(2);
}

[[noreturn]] void fail(const char* call) {
    std::perror((std::string("error: ") + call).c_str());
    std::exit(1);
}

template <class Number>
Number number(const char* word, Number least, Number most) {
    char* end = nullptr;
    const double value = std::strtod(word, &end);
    if (end == word || *end != '\0' || !(value >= static_cast<double>(least)) ||
        value > static_cast<double>(most)) {
        usage();
    }
    return static_cast<Number>(value);
}

std::int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch()
    )
        .count();
}

void pin(int core) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(static_cast<std::size_t>(core), &cores);
    if (::sched_setaffinity(0, sizeof(cores), &cores) != 0) {
        fail("sched_setaffinity");
    }
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Memory that a child shares; it is ended by the system with this process.
template <class Shared>
Shared* share(std::size_t count = 1) {
    constexpr int protection = PROT_READ | PROT_WRITE;
    void* memory =
        ::mmap(nullptr, count * sizeof(Shared), protection, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        fail("mmap");
    }
    return new (memory) Shared[count];
}

// Run `body` for ever in a child on a core of its own; it is killed when the parent is done.
template <class Body>
class Child {
  public:
    Child(int core, Body body) : pid_(::fork()) {
        if (pid_ < 0) {
            fail("fork");
        }
        if (pid_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // if the parent dies first
            pin(core);
            body();
        }
    }
    Child(const Child&) = delete;
    Child& operator=(const Child&) = delete;
    ~Child() {
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, nullptr, 0);
    }

  private:
    pid_t pid_;
};

// The middle one, as of a latency.
std::int64_t median(std::vector<std::int64_t>& samples) {
    const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
    std::nth_element(samples.begin(), middle, samples.end());
    return *middle;
}

void measure_line(int core, int other_core, std::int64_t span_ns) {
    Line* lines = share<Line>(2);
    std::atomic<std::uint32_t>& ping = lines[0].turn;
    std::atomic<std::uint32_t>& pong = lines[1].turn;
    const Child child(other_core, [&] {
        for (std::uint32_t turn = 1;; ++turn) {
            while (ping.load(std::memory_order_acquire) != turn) {  // pairs with the parent's store
                pause();
            }
            pong.store(turn, std::memory_order_release);
        }
    });
    pin(core);
    std::vector<std::int64_t> samples;
    samples.reserve(1U << 22U);
    const std::int64_t began_ns = now_ns();
    std::int64_t at_ns = began_ns;
    for (std::uint32_t turn = 1; at_ns - began_ns < span_ns; ++turn) {
        const std::int64_t start_ns = now_ns();
        ping.store(turn, std::memory_order_release);
        while (pong.load(std::memory_order_acquire) != turn) {  // pairs with the child's store
            pause();
        }
        at_ns = now_ns();
        samples.push_back(at_ns - start_ns);
    }
    std::printf(
        "p50_ns=%lld rounds=%zu\n", static_cast<long long>(median(samples)), samples.size()
    );
}

// `move` moves `size_bytes`, and is called until the time is up; then the rate is printed: that of
// the median slice, for a side that loses its core for a moment says nothing of the machine's best.
template <class Move>
void print_rate(std::size_t size_bytes, std::int64_t span_ns, Move move) {
    move();  // page faults and caches
    const std::size_t moves = 1 + (chunks * chunk_bytes - 1) / size_bytes;  // of a slice
    std::vector<std::int64_t> slices;
    slices.reserve(1U << 16U);
    const std::int64_t began_ns = now_ns();
    for (std::int64_t at_ns = began_ns; at_ns - began_ns < span_ns;) {
        const std::int64_t start_ns = at_ns;
        for (std::size_t i = 0; i < moves; ++i) {
            move();
        }
        at_ns = now_ns();
        slices.push_back(at_ns - start_ns);
    }
    const auto moved = static_cast<double>(moves * size_bytes);
    std::printf("bytes_per_second=%.0f\n", moved * 1e9 / static_cast<double>(median(slices)));
}

void measure_memcpy(int core, std::size_t size_bytes, std::int64_t span_ns) {
    // At the same place of a page, source and target would slow each other down tenfold (a load is
    // held up by an earlier store whose address has the same last 12 bits).
    constexpr std::size_t page_bytes = 4096;
    pin(core);
    std::vector<std::byte> memory(2 * size_bytes + 3 * page_bytes, std::byte{0x55});
    void* start = memory.data();
    std::size_t space = memory.size();
    auto* from = static_cast<std::byte*>(std::align(page_bytes, 1, start, space));
    std::byte* to = from + (size_bytes / page_bytes + 1) * page_bytes + page_bytes / 2;
    print_rate(size_bytes, span_ns, [&] {
        std::memcpy(to, from, size_bytes);
        asm volatile("" : : "r"(to) : "memory");  // the copy is wanted
    });
}

// Moves an item through the ring, a chunk at a time.
class Mover {
  public:
    explicit Mover(Chunk* ring) : ring_(ring) {}

    void put(const std::vector<std::byte>& from) {
        each_chunk(from.size(), [&](Chunk& chunk, std::size_t at, std::size_t count) {
            while (chunk.filled.load(std::memory_order_acquire) != 0) {  // pairs with take's store
                pause();
            }
            std::memcpy(chunk.bytes.data(), from.data() + at, count);
            chunk.filled.store(1, std::memory_order_release);
        });
    }

    void take(std::vector<std::byte>& to) {
        each_chunk(to.size(), [&](Chunk& chunk, std::size_t at, std::size_t count) {
            while (chunk.filled.load(std::memory_order_acquire) != 1) {  // pairs with put's store
                pause();
            }
            std::memcpy(to.data() + at, chunk.bytes.data(), count);
            chunk.filled.store(0, std::memory_order_release);
        });
    }

    // Both, for one process alone.
    void pass(const std::vector<std::byte>& from, std::vector<std::byte>& to) {
        each_chunk(from.size(), [&](Chunk& chunk, std::size_t at, std::size_t count) {
            std::memcpy(chunk.bytes.data(), from.data() + at, count);
            asm volatile("" : : "r"(chunk.bytes.data()) : "memory");
            std::memcpy(to.data() + at, chunk.bytes.data(), count);
        });
    }

  private:
    template <class Step>
    void each_chunk(std::size_t size_bytes, Step step) {
        for (std::size_t at = 0; at < size_bytes; at += chunk_bytes) {
            step(ring_[next_], at, std::min(chunk_bytes, size_bytes - at));
            next_ = (next_ + 1) % chunks;
        }
    }

    Chunk* ring_;
    std::size_t next_ = 0;
};

void measure_copy(int core, int other_core, std::size_t size_bytes, std::int64_t span_ns) {
    Chunk* ring = share<Chunk>(chunks);
    const std::vector<std::byte> from(size_bytes, std::byte{0x55});
    std::vector<std::byte> to(size_bytes);
    Mover mover(ring);
    if (core == other_core) {
        pin(core);
        print_rate(size_bytes, span_ns, [&] { mover.pass(from, to); });
        return;
    }
    const Child child(other_core, [&] {
        for (Mover producer(ring);;) {
            producer.put(from);
        }
    });
    pin(core);
    print_rate(size_bytes, span_ns, [&] { mover.take(to); });
}

}  // namespace

int main(int argument_count, char** arguments) {
    const std::string what = argument_count > 1 ? arguments[1] : "";
    const int words = what == "copy" ? 6 : 5;
    if (argument_count != words || (what != "line" && what != "memcpy" && what != "copy")) {
        usage();
    }
    const double seconds = number(arguments[words - 1], 0.001, seconds_max);
    const auto span_ns = static_cast<std::int64_t>(seconds * 1e9);
    const int core = number(arguments[2], 0, core_max);
    if (what == "memcpy") {
        measure_memcpy(core, number(arguments[3], std::size_t{1}, size_bytes_max), span_ns);
        return 0;
    }
    const int other_core = number(arguments[3], 0, core_max);
    if (what == "line") {
        measure_line(core, other_core, span_ns);
        return 0;
    }
    measure_copy(core, other_core, number(arguments[4], std::size_t{1}, size_bytes_max), span_ns);
    return 0;
}

// The ring by itself: what goes in comes out, wherever the indices stand; what a hostile or dying
// peer leaves is a typed error, or nothing. Two threads at once: ring_stress.cpp.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <ipc_bridge/transports/ring.hpp>

namespace {

using namespace ipc_bridge;
using ring::capacity_bytes_min;
using ring::chunk_bytes;
using ring::Duplex;
using ring::Memory;
using View = std::span<const std::byte>;

constexpr std::uint64_t starts[] = {
    0,
    (std::uint64_t{1} << 32U) - 8 * 64,  // the indices pass 2^32, and 2^64
    0 - std::uint64_t{8 * 64},
};

// A ring and its two sides, which map it each for itself.
struct Pair {
    explicit Pair(std::uint64_t start = 0, std::size_t capacity = capacity_bytes_min) {
        int ends[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends) == 0);
        auto [made, memory_fd] = Memory::make(capacity, start);
        fd = std::move(memory_fd);
        memory = made;
        for (int number : {0, 1}) {
            bells[number] = Fd(ends[number]);
        }
        left = std::make_unique<Duplex>(made, 0, ends[0], "left");
        right = std::make_unique<Duplex>(
            Memory::attach(fd.get(), capacity, "right"), 1, ends[1], "right"
        );
    }
    Fd fd;
    std::shared_ptr<const Memory> memory;  // as the left side maps it
    Fd bells[2];
    std::unique_ptr<Duplex> left;
    std::unique_ptr<Duplex> right;
};

std::vector<std::byte> bytes_from(std::size_t size, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<std::byte> bytes(size);
    for (auto& byte : bytes) {
        byte = static_cast<std::byte>(random());
    }
    return bytes;
}

std::size_t write(Duplex& side, View bytes) {
    const View parts[] = {bytes};
    return side.write(parts);
}

std::vector<std::byte> read_all(Duplex& side) {
    std::vector<std::byte> all;
    std::vector<std::byte> buffer(1 << 20);
    while (const std::size_t count = side.read(buffer)) {
        all.insert(all.end(), buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(count));
    }
    return all;
}

bool has_bell(const Fd& fd) {
    pollfd ready{fd.get(), POLLIN, 0};
    return ::poll(&ready, 1, 0) == 1;
}

// The first word of the record at which a side writes next, if it began at `start`.
std::atomic_ref<std::uint32_t> word_at(const Pair& pair, int side, std::uint64_t index) {
    std::byte* at = pair.memory->ring_of(side) + index % pair.memory->capacity();
    return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(at));
}

std::string refusal_of(const std::function<void()>& body) {
    try {
        body();
    } catch (const ProtocolError& error) {
        return error.broken;
    }
    return "";
}

}  // namespace

TEST_CASE("records begin at every offset of the ring, and pass its end, 2^32 and 2^64") {
    const auto payload = bytes_from(chunk_bytes, 1);
    for (const std::uint64_t edge : {std::uint64_t{1} << 32U, std::uint64_t{0}}) {
        for (std::size_t line = 0; line < capacity_bytes_min / 64; ++line) {
            Pair pair(edge - 64 * line);
            // Together more than the ring holds, so that the indices pass the edge.
            const std::size_t sizes[] = {
                chunk_bytes, 1, 1 + line * 37 % 500, chunk_bytes, chunk_bytes, chunk_bytes};
            for (const std::size_t size : sizes) {
                REQUIRE(write(*pair.left, View(payload).first(size)) == size);
                REQUIRE(
                    read_all(*pair.right) == std::vector(payload.begin(), payload.begin() + size)
                );
            }
        }
    }
}

TEST_CASE("any pieces in, any pieces out, both ways") {
    for (const std::uint64_t start : starts) {
        std::mt19937_64 random(start + 5);
        Pair pair(start);
        const auto all = bytes_from(3'000'000, 2);
        for (auto [from, to] :
             {std::pair(pair.left.get(), pair.right.get()),
              std::pair(pair.right.get(), pair.left.get())}) {
            std::size_t sent = 0;
            std::vector<std::byte> got;
            std::vector<std::byte> buffer(50'000);
            while (got.size() < all.size()) {
                const auto rest = View(all).subspan(sent);
                const auto most = rest.first(std::min<std::size_t>(rest.size(), random() % 90'000));
                const std::size_t cut = most.size() / (1 + random() % 3);
                const View parts[] = {most.first(cut), {}, most.subspan(cut)};
                sent += from->write(parts);
                const std::size_t count = to->read({buffer.data(), 1 + random() % buffer.size()});
                got.insert(
                    got.end(), buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(count)
                );
            }
            REQUIRE(got == all);
        }
    }
}

TEST_CASE("a ring takes what it has room for, and takes again what was read") {
    Pair pair;
    for (const std::size_t size :
         {capacity_bytes_min - 1, capacity_bytes_min, capacity_bytes_min + 1}) {
        const auto all = bytes_from(size, size);
        std::size_t sent = write(*pair.left, all);
        CHECK(sent >= capacity_bytes_min / 2);
        CHECK(sent < capacity_bytes_min);
        CHECK_FALSE(pair.left->is_writable());
        auto got = read_all(*pair.right);
        CHECK(pair.left->is_writable());
        sent += write(*pair.left, View(all).subspan(sent));
        const auto rest = read_all(*pair.right);
        got.insert(got.end(), rest.begin(), rest.end());
        CHECK(sent == size);
        CHECK(got == all);
    }
}

TEST_CASE("a drained ring has room for any record, though its reader publishes lazily") {
    Pair pair;
    const auto payload = bytes_from(chunk_bytes, 3);
    for (std::size_t size = 1; size <= chunk_bytes; size += 61) {
        REQUIRE(write(*pair.left, View(payload).first(size)) == size);
        REQUIRE(read_all(*pair.right).size() == size);
        REQUIRE(pair.left->is_writable());
    }
}

TEST_CASE("bells ring for who sleeps, once") {
    Pair pair;
    const auto payload = bytes_from(100, 4);
    write(*pair.left, payload);
    CHECK_FALSE(has_bell(pair.bells[1]));
    read_all(*pair.right);
    pair.right->arm();
    CHECK_FALSE(pair.right->is_readable());
    write(*pair.left, payload);
    CHECK(has_bell(pair.bells[1]));
    CHECK(pair.right->is_readable());
    CHECK(pair.right->take_bells());
    write(*pair.left, payload);  // it was told already
    CHECK_FALSE(has_bell(pair.bells[1]));
    pair.right->arm();
    pair.right->disarm();
    write(*pair.left, payload);
    CHECK_FALSE(has_bell(pair.bells[1]));

    while (write(*pair.left, payload) == payload.size()) {
    }
    pair.left->arm();  // for room
    CHECK_FALSE(pair.left->is_writable());
    read_all(*pair.right);
    CHECK(has_bell(pair.bells[0]));
    CHECK(pair.left->is_writable());

    pair.bells[1].close();
    CHECK_FALSE(pair.left->take_bells());
}

TEST_CASE("a hostile peer's words are refused, and nothing beyond the ring is touched") {
    const std::byte one[] = {std::byte{1}};
    const auto broken_read = [&](std::uint32_t n) {
        Pair pair;
        word_at(pair, 0, 0) = n;
        return refusal_of([&] { read_all(*pair.right); });
    };
    CHECK(broken_read(chunk_bytes).empty());
    CHECK_FALSE(broken_read(chunk_bytes + 1).empty());
    CHECK_FALSE(broken_read(0xFFFFFFFF).empty());

    // What the peer says that it has consumed, when 64 bytes at most of it can be true.
    const auto broken_write = [&](std::uint64_t head) {
        Pair pair;
        write(*pair.left, one);
        pair.memory->side(1).head = head;
        return refusal_of([&] {
            while (write(*pair.left, one) == 1) {
            }
        });
    };
    CHECK(broken_write(0).empty());
    CHECK(broken_write(64).empty());
    CHECK_FALSE(broken_write(32).empty());
    CHECK_FALSE(broken_write(capacity_bytes_min).empty());  // not yet written then
    CHECK_FALSE(broken_write(0 - std::uint64_t{64}).empty());
    CHECK_FALSE(broken_write(std::uint64_t{1} << 32U).empty());
    CHECK_FALSE(broken_write(std::uint64_t{1} << 63U).empty());

    // An index that goes back.
    Pair pair;
    const auto much = bytes_from(40'000, 5);
    for (int i = 0; i < 3; ++i) {
        write(*pair.left, much);
        read_all(*pair.right);
    }
    pair.memory->side(1).head = 0;
    CHECK_FALSE(refusal_of([&] { write(*pair.left, much), write(*pair.left, much); }).empty());

    // Indices that begin between records.
    for (int side : {0, 1}) {
        Pair fresh;
        fresh.memory->side(side).head = 8;
        CHECK_FALSE(refusal_of([&] { Duplex(fresh.memory, 0, -1, ""); }).empty());
    }
}

TEST_CASE("what a peer changes after the check changes nothing") {
    Pair pair;
    const auto payload = bytes_from(1000, 6);
    write(*pair.left, payload);
    std::array<std::byte, 400> part{};
    REQUIRE(pair.right->read(part) == part.size());
    word_at(pair, 0, 0) = 0xFFFFFFFF;  // the size, with the record half read
    std::vector<std::byte> rest(1 << 20);
    CHECK(pair.right->read(rest) == 600);
    CHECK(pair.right->read(rest) == 0);
}

TEST_CASE("random words anywhere in the memory: errors or bytes, never a crash") {
    std::mt19937_64 random(20);
    for (int round = 0; round < 300; ++round) {
        Pair pair;
        std::vector<std::byte> buffer(100'000);
        try {
            for (int step = 0; step < 200; ++step) {
                const std::uint64_t value = random() % 3 != 0 ? random() % 70'000 : random();
                if (random() % 2 != 0) {
                    pair.memory->side(1).head = value * (random() % 2 != 0 ? 64 : 1);
                } else {
                    word_at(pair, 1, random() % 2000 * 64) = static_cast<std::uint32_t>(value);
                }
                pair.memory->side(static_cast<int>(random() % 2)).asleep = std::uint32_t(random());
                write(*pair.left, View(buffer).first(random() % buffer.size()));
                pair.left->read({buffer.data(), 1 + random() % buffer.size()});
            }
        } catch (const ProtocolError&) {
        }
    }
}

TEST_CASE("memory that could shrink, or is of another size, is refused") {
    constexpr std::size_t capacity = capacity_bytes_min;
    const auto attach = [](int fd, std::size_t size) {
        return refusal_of([&] { Memory::attach(fd, size, "here"); });
    };
    const auto made = Memory::make(capacity);
    CHECK(attach(made.second.get(), capacity).empty());
    CHECK(attach(made.second.get(), 2 * capacity) == "shared memory of a wrong size");
    CHECK(attach(made.second.get(), 0) == "shared memory of a wrong size");
    CHECK(attach(made.second.get(), capacity + 64) == "shared memory of a wrong size");
    CHECK(::ftruncate(made.second.get(), 0) < 0);  // and that of ours cannot be changed

    const Fd unsealed(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    REQUIRE(::ftruncate(unsealed.get(), ring::control_bytes + 2 * capacity) == 0);
    CHECK(attach(unsealed.get(), capacity) == "shared memory that is not sealed");
    REQUIRE(::fcntl(unsealed.get(), F_ADD_SEALS, F_SEAL_GROW) == 0);
    CHECK(attach(unsealed.get(), capacity) == "shared memory that is not sealed");

    const Fd file(::open("/tmp", O_TMPFILE | O_RDWR, 0600));
    if (file) {
        REQUIRE(::ftruncate(file.get(), ring::control_bytes + 2 * capacity) == 0);
        CHECK(attach(file.get(), capacity) == "shared memory that is not sealed");
    }
    const Fd device(::open("/dev/zero", O_RDWR));
    CHECK(attach(device.get(), capacity) == "shared memory of a wrong size");
}

// --- row 16: a side is killed at every step ---

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int stride = 97;  // many more instructions, and slow ones
#else
constexpr int stride = 1;
#endif

// A child that does something, one of its instructions at a time (ptrace(2)), and is killed at the
// end. While it stands still, the shared memory is what it would leave if it died there.
class Child {
  public:
    explicit Child(const std::function<void()>& action) : pid_(::fork()) {
        if (pid_ == 0) {
            ::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
            ::raise(SIGSTOP);
            action();
            ::_exit(0);
        }
        int status = 0;
        ::waitpid(pid_, &status, 0);
        runs_ = WIFSTOPPED(status);
    }
    Child(const Child&) = delete;
    Child& operator=(const Child&) = delete;
    ~Child() {
        if (runs_) {
            ::kill(pid_, SIGKILL);
            ::waitpid(pid_, nullptr, 0);
        }
    }

    // So many instructions; false: it is done.
    bool step(int count = stride) {
        for (int status = 0; count > 0 && runs_; --count) {
            runs_ = ::ptrace(PTRACE_SINGLESTEP, pid_, nullptr, nullptr) == 0 &&
                    ::waitpid(pid_, &status, 0) == pid_ && WIFSTOPPED(status);
        }
        return runs_;
    }

  private:
    pid_t pid_;
    bool runs_;
};

// All of a pair's memory, as it was: put back at the end.
class Snapshot {
  public:
    explicit Snapshot(const Pair& pair)
        : memory_(reinterpret_cast<std::byte*>(&pair.memory->side(0))),
          bytes_(memory_, memory_ + ring::control_bytes + 4 * pair.memory->capacity()) {}
    Snapshot(const Snapshot&) = delete;
    Snapshot& operator=(const Snapshot&) = delete;
    ~Snapshot() { std::copy(bytes_.begin(), bytes_.end(), memory_); }

  private:
    std::byte* memory_;
    std::vector<std::byte> bytes_;
};

constexpr std::size_t line = ring::line_bytes;
constexpr std::size_t short_bytes = line - ring::record_header_bytes;  // fill a line

// As many as fit.
std::size_t write_lines(Duplex& side) {
    const auto payload = bytes_from(short_bytes, 9);
    std::size_t count = 0;
    while (write(side, payload) != 0) {
        ++count;
    }
    return count;
}

// The left side has filled its ring and sleeps; the right side has read all but the last record of
// those with which it publishes that there is room.
constexpr std::size_t published_lines = capacity_bytes_min / 8 / line;
void fill_and_sleep(Pair& pair) {
    REQUIRE(write_lines(*pair.left) == capacity_bytes_min / line - 1);
    std::vector<std::byte> buffer((published_lines - 1) * short_bytes);
    std::size_t done = 0;
    while (done < buffer.size()) {
        done += pair.right->read(std::span(buffer).subspan(done));
    }
    pair.left->arm();
}

// All that a side does: read, publish, ring, write, ring, park, wake up.
void read_write_and_sleep(Duplex& side) {
    std::array<std::byte, short_bytes> buffer{};
    side.read(buffer);
    write(side, buffer);
    side.arm();
    side.disarm();
    side.take_bells();
}

}  // namespace

TEST_CASE("a writer killed at any instruction leaves a whole record or none") {
    const auto payload = bytes_from(300, 7);
    Pair pair;
    for (std::size_t i = 0; i < 2 * capacity_bytes_min; i += chunk_bytes) {
        write(*pair.left, bytes_from(chunk_bytes, i));  // so that old records lie below
        read_all(*pair.right);
    }
    write(*pair.left, View(payload).first(50));
    pair.right->arm();
    Child writer([&] { write(*pair.left, payload); });
    bool was_there = false;
    int steps = 0;
    for (bool runs = true; runs; ++steps) {
        runs = writer.step();
        const Snapshot afterwards(pair);
        Duplex reader = *pair.right;
        const auto got = read_all(reader);
        REQUIRE(got.size() >= 50);
        const bool is_there = got.size() > 50;
        if (is_there) {
            REQUIRE(std::vector(got.begin() + 50, got.end()) == payload);
        }
        REQUIRE(read_all(reader).empty());
        REQUIRE(is_there >= was_there);  // once committed, it stays
        was_there = is_there;
    }
    MESSAGE("could have been killed at " << steps << " instructions");
    CHECK(was_there);
    CHECK(has_bell(pair.bells[1]));
}

TEST_CASE("a reader killed at any instruction has freed what it read, or not") {
    Pair pair;
    fill_and_sleep(pair);
    Child reader([&] { read_write_and_sleep(*pair.right); });
    const std::byte* const ring = pair.memory->ring_of(0);
    const std::vector<std::byte> unread(
        ring + published_lines * line, ring + capacity_bytes_min - line
    );
    std::size_t was_free = 0;
    int steps = 0;
    for (bool runs = true; runs; ++steps) {
        runs = reader.step();
        const Snapshot afterwards(pair);
        Duplex writer = *pair.left;
        const auto got = read_all(writer);
        REQUIRE((got.empty() || got.size() == short_bytes));
        const std::size_t free = write_lines(writer);
        REQUIRE((free == 0 || free == published_lines));
        REQUIRE(free >= was_free);  // once published, it stays
        was_free = free;
        REQUIRE(std::equal(unread.begin(), unread.end(), ring + published_lines * line));
    }
    MESSAGE("could have been killed at " << steps << " instructions");
    CHECK(was_free == published_lines);
    CHECK(has_bell(pair.bells[0]));
}

TEST_CASE("whoever sleeps is told that its peer was killed, wherever that was") {
    int deaths = 0;
    for (bool runs = true; runs; ++deaths) {
        Pair pair;
        fill_and_sleep(pair);
        {
            Child peer([&] { read_write_and_sleep(*pair.right); });
            pair.bells[1].close();  // the child's alone
            runs = peer.step(1 + deaths * (100 + 9 * stride));
        }
        REQUIRE(has_bell(pair.bells[0]));
        REQUIRE_FALSE(pair.left->take_bells());
        const auto got = read_all(*pair.left);
        CHECK((got.empty() || got.size() == short_bytes));
        write_lines(*pair.left);  // to nobody: no error, no signal
    }
    CHECK(deaths > 3);
}

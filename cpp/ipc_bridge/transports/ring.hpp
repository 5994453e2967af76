// The ring: bytes between two processes through shared memory, without a lock, and without a system
// call unless somebody sleeps. C++ uses it as it is, Python through the module ipc_bridge._native:
// pure Python has no atomics, and what it writes into shared memory may tear.
//
// A sealed memfd (memfd_create(2)) holds a control area and two rings, one a direction. A ring is
// mapped twice in a row, so that a record is contiguous wherever it begins:
//
//     control: for each side a slot of 128 bytes: head u64 (what it has consumed) | asleep u32
//     record:  u32 n (0: not committed) | 4 bytes | n >= 1 bytes | up to a multiple of 64 bytes
//
// The commit is in the record: flag, size and a short payload share a cache line, which is all that
// a message costs; and a record that its writer did not finish is never seen. Indices count bytes
// and wrap at 2^64.
//
// The peer is not trusted: it can write anything anywhere at any time. What is its own to say is
// read once into a local, then checked, then used; what is ours is kept outside the shared memory.
// Payload is copied out before anybody looks at it. A memfd that could shrink is refused: to touch
// what is no longer there is SIGBUS.
//
// Sleeping: whoever has nothing to do sets its flag `asleep`, looks once more, and sleeps on a
// socket; whoever has changed something looks at the other's flag, and sends a byte. Each side
// writes and then reads what the other writes, so each needs a full fence between the two (Dekker):
// without either, both may read the past, one sleeps, and nobody wakes it. tests/model_ring.py
// explores that, and tests/cpp/ring_stress.cpp shows it.
//
// Copy with it: errors, system.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge::ring {

inline constexpr std::size_t line_bytes = 64;
// Two lines: processors fetch lines in pairs, and what the sides write must not meet.
inline constexpr std::size_t side_bytes = 2 * line_bytes;
// A page on any machine: those of aarch64 have up to 64 KiB.
inline constexpr std::size_t control_bytes = 64U << 10;
// Default, of each ring. Peers that sleep wake each other once a filling, and a wake-up may take
// longer than to copy it: with 256 KiB a stream of 64 KiB items went at a sixth of the pace.
inline constexpr std::size_t capacity_bytes = 1U << 20;
inline constexpr std::size_t capacity_bytes_min = 64U << 10;  // a page, see above
inline constexpr std::size_t capacity_bytes_max = 1U << 30;
// Payload of a record: small against the ring, so that reader and writer overlap; large against
// what a record costs.
inline constexpr std::size_t chunk_bytes = 16U << 10;
static_assert(chunk_bytes <= capacity_bytes_min / 4, "Duplex::publish counts on it");
// Bells taken from the socket at once: two can be there, or a hostile peer has sent more.
inline constexpr int bells_max = 16;

// What one side tells the other, in the shared memory.
struct alignas(side_bytes) Side {
    std::atomic<std::uint64_t> head;    // bytes of the ring that it has consumed
    std::atomic<std::uint32_t> asleep;  // it sleeps, or is about to: send it a byte
};
static_assert(sizeof(Side) == side_bytes && offsetof(Side, asleep) == 8);
static_assert(2 * sizeof(Side) <= control_bytes);
static_assert(
    std::atomic<std::uint64_t>::is_always_lock_free &&
        std::atomic<std::uint32_t>::is_always_lock_free,
    "a lock would be one of this process only"
);

// The bytes before a record's payload.
inline constexpr std::size_t record_header_bytes = 8;
static_assert(std::atomic_ref<std::uint32_t>::required_alignment <= record_header_bytes);

// What a record of `n` bytes takes.
constexpr std::uint64_t span_of(std::uint64_t n) {
    return (record_header_bytes + n + line_bytes - 1) / line_bytes * line_bytes;
}
static_assert(span_of(1) == 64 && span_of(56) == 64 && span_of(57) == 128);

// Does a ring of this size work? (A power of two, so that an index wraps with it.)
constexpr bool is_capacity(std::size_t capacity) {
    return std::has_single_bit(capacity) && capacity >= capacity_bytes_min &&
           capacity <= capacity_bytes_max;
}

// Control area and rings, mapped.
class Memory {
  public:
    // Make it: an anonymous file that no name leads to, all of it allocated, never to change in
    // size. `start` is where the indices begin. Throws Error: RESOURCE_EXHAUSTED.
    static std::pair<std::shared_ptr<const Memory>, Fd> make(
        std::size_t capacity, std::uint64_t start = 0
    ) {
        const char* const name = "ipc-bridge-ring";
        const std::size_t size = control_bytes + 2 * capacity;
        Fd fd(checked(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING), "memfd_create", name));
        checked(::ftruncate(fd.get(), static_cast<off_t>(size)), "ftruncate", name);
        // Now, where it is an error: at the first touch it would be SIGBUS.
        checked(::fallocate(fd.get(), 0, 0, static_cast<off_t>(size)), "fallocate", name);
        checked(::fcntl(fd.get(), F_ADD_SEALS, seals), "fcntl F_ADD_SEALS", name);
        std::shared_ptr<const Memory> memory(new Memory(fd.get(), capacity, name));
        for (int number : {0, 1}) {
            memory->side(number).head.store(start, std::memory_order_relaxed);  // nobody else yet
        }
        return {std::move(memory), std::move(fd)};
    }

    // Map what a peer has made. Throws ProtocolError for one that does not fit, or could shrink.
    static std::shared_ptr<const Memory> attach(
        int fd, std::size_t capacity, const std::string& where
    ) {
        struct stat info {};
        checked(::fstat(fd, &info), "fstat", where);
        if (!is_capacity(capacity) || !S_ISREG(info.st_mode) ||
            static_cast<std::size_t>(info.st_size) != control_bytes + 2 * capacity) {
            throw ProtocolError("shared memory of a wrong size", where);
        }
        const int has = ::fcntl(fd, F_GET_SEALS);
        if (has < 0 || (has & seals) != seals) {
            throw ProtocolError("shared memory that is not sealed", where);
        }
        return std::shared_ptr<const Memory>(new Memory(fd, capacity, where));
    }

    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { ::munmap(base_, control_bytes + 4 * capacity_); }

    std::size_t capacity() const { return capacity_; }

    Side& side(int number) const { return reinterpret_cast<Side*>(base_)[number]; }

    // The ring that a side writes.
    std::byte* ring_of(int number) const {
        return base_ + control_bytes + 2 * capacity_ * static_cast<std::size_t>(number);
    }

  private:
    static constexpr int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

    Memory(int fd, std::size_t capacity, const std::string& where) : capacity_(capacity) {
        // The address range first, so that nothing else comes between the parts.
        void* const range = ::mmap(
            nullptr,
            control_bytes + 4 * capacity,
            PROT_NONE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
            -1,
            0
        );
        if (range == MAP_FAILED) {
            throw SystemError("mmap", errno, where);
        }
        base_ = static_cast<std::byte*>(range);
        std::byte* at = base_;
        const auto map = [&](std::size_t offset, std::size_t size) {
            const bool done = ::mmap(
                                  at,
                                  size,
                                  PROT_READ | PROT_WRITE,
                                  MAP_SHARED | MAP_FIXED | MAP_POPULATE,
                                  fd,
                                  static_cast<off_t>(offset)
                              ) != MAP_FAILED;
            at += size;
            return done;
        };
        bool done = map(0, control_bytes);
        for (std::size_t number : {0, 1}) {
            for (int copy = 0; copy < 2; ++copy) {
                done = done && map(control_bytes + number * capacity, capacity);
            }
        }
        if (!done) {
            const int number = errno;
            ::munmap(base_, control_bytes + 4 * capacity);
            throw SystemError("mmap", number, where);
        }
    }

    std::byte* base_ = nullptr;
    std::size_t capacity_;
};

// One side: writes the one ring, reads the other. One thread uses it at a time.
class Duplex {
  public:
    // `side` is 0 for who made the memory, 1 for who attached it; `bell` the socket to its peer,
    // which stays the caller's. Throws ProtocolError if the indices begin nowhere.
    Duplex(std::shared_ptr<const Memory> memory, int side, int bell, std::string where)
        : memory_(std::move(memory)),
          mine_(memory_->side(side)),
          its_(memory_->side(1 - side)),
          out_(memory_->ring_of(side)),
          in_(memory_->ring_of(1 - side)),
          capacity_(memory_->capacity()),
          bell_(bell),
          where_(std::move(where)),
          tail_(its_.head.load(std::memory_order_acquire)),  // what the maker stored
          seen_(tail_),
          head_(mine_.head.load(std::memory_order_acquire)),
          published_(head_) {
        if ((tail_ | head_) % line_bytes != 0) {
            refuse("an index that is no record's");
        }
    }

    // --- writing ---

    // Write the front of `parts`, in order: the count of bytes taken, 0 if there is no room.
    //
    // Throws ProtocolError if the peer's index is impossible.
    std::size_t write(std::span<const std::span<const std::byte>> parts) {
        std::size_t left = 0;
        for (const auto& part : parts) {
            left += part.size();
        }
        const std::size_t all = left;
        std::size_t at = 0;  // in parts.front()
        while (left > 0) {
            const std::size_t n = std::min(left, chunk_bytes);
            if (!has_room(n)) {
                break;
            }
            std::byte* into = begin(n);
            for (std::size_t rest = n; rest > 0;) {
                const std::size_t count = std::min(rest, parts.front().size() - at);
                if (count > 0) {  // of an empty part the data may be null
                    std::memcpy(into, parts.front().data() + at, count);
                }
                into += count;
                rest -= count;
                at += count;
                if (at == parts.front().size()) {
                    parts = parts.subspan(1);
                    at = 0;
                }
            }
            commit(n);
            ring_bell();
            left -= n;
        }
        return all - left;
    }

    // Is there room for any record? Throws as `write`.
    bool is_writable() { return has_room(chunk_bytes); }

    // --- reading ---

    // Read into `buffer`, which is not empty: the count of bytes, 0 if there is nothing.
    //
    // Stops after a record that its writer did not fill: the next is rarely there yet, and to look
    // at it would take its line from the writer, in the way of the answer.
    // Throws ProtocolError for a record of an impossible size.
    std::size_t read(std::span<std::byte> buffer) {
        std::size_t done = 0;
        while (done < buffer.size()) {
            if (left_ == 0 && !open()) {
                break;
            }
            const std::size_t count = std::min(left_, buffer.size() - done);
            std::memcpy(buffer.data() + done, from_, count);
            done += count;
            from_ += count;
            left_ -= count;
            if (left_ == 0 && !finish()) {
                break;
            }
        }
        return done;
    }

    // Is there something to read?
    bool is_readable() const {
        // relaxed: only a hint, `open` loads it again
        return left_ > 0 || word(in_, head_).load(std::memory_order_relaxed) != 0;
    }

    // --- sleeping ---

    // Tell the peer to ring. Whoever arms looks once more before it sleeps, and disarms then.
    void arm() {
        mine_.asleep.store(1, std::memory_order_relaxed);
        // seq_cst: pairs with ring_bell's. Our flag is out before we look at what the peer writes,
        // its write is out before it looks at our flag: one of us sees the other.
        std::atomic_thread_fence(std::memory_order_seq_cst);
    }

    // Awake again. (relaxed: a bell too many is taken from the socket at the next sleep.)
    void disarm() { mine_.asleep.store(0, std::memory_order_relaxed); }

    // Take the bells off the socket; false: the peer has gone, what it wrote before is there.
    bool take_bells() const {
        for (int i = 0; i < bells_max; ++i) {
            char byte = 0;
            const auto count = retrying([&] { return ::recv(bell_, &byte, 1, MSG_DONTWAIT); });
            if (count <= 0) {
                return count < 0 && errno == EAGAIN;  // ECONNRESET: it left a bell of ours unread
            }
        }
        return true;
    }

  private:
    static std::atomic_ref<std::uint32_t> word_at(std::byte* at) {
        return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(at));
    }

    std::atomic_ref<std::uint32_t> word(std::byte* ring, std::uint64_t index) const {
        return word_at(ring + (index & (capacity_ - 1)));
    }

    [[noreturn]] void refuse(const char* what) const { throw ProtocolError(what, where_); }

    // Is there room for a record of `n` bytes, and the word that follows it?
    bool has_room(std::size_t n) {
        const std::uint64_t stop = tail_ + span_of(n) + line_bytes;
        if (stop - seen_ <= capacity_) {
            return true;
        }
        // acquire: pairs with publish. What we write next comes after the peer's reads of it.
        const std::uint64_t head = its_.head.load(std::memory_order_acquire);
        if (tail_ - head > capacity_ || head - seen_ > tail_ - seen_ || head % line_bytes != 0) {
            refuse("the peer has consumed what was never written");
        }
        seen_ = head;
        return stop - seen_ <= capacity_;
    }

    // Where the payload of the next record goes.
    std::byte* begin(std::size_t n) {
        // The word that follows, where old bytes lie. relaxed: commit's release orders it.
        word(out_, tail_ + span_of(n)).store(0, std::memory_order_relaxed);
        return out_ + (tail_ & (capacity_ - 1)) + record_header_bytes;
    }

    void commit(std::size_t n) {
        // release: pairs with open's acquire. Who sees n sees the payload, and 0 in the next word.
        word(out_, tail_).store(static_cast<std::uint32_t>(n), std::memory_order_release);
        tail_ += span_of(n);
    }

    // Begin with the record at `head_`, if it is committed.
    bool open() {
        // acquire: pairs with commit's release. What we read next was written before.
        const std::size_t n = word(in_, head_).load(std::memory_order_acquire);
        if (n == 0) {
            return false;
        }
        if (n > chunk_bytes) {
            refuse("a record of an impossible size");
        }
        size_ = left_ = n;
        from_ = in_ + (head_ & (capacity_ - 1)) + record_header_bytes;
        return true;
    }

    // Done with the record; true: look at the next one at once.
    bool finish() {
        head_ += span_of(size_);
        if (head_ - published_ >= capacity_ / 8) {
            publish();
        }
        return size_ == chunk_bytes;
    }

    // Lazily: the peer's line is touched once for many records. A ring that we have drained still
    // shows 7/8 of its room, and no record takes more than 1/4, so nobody waits for the rest.
    void publish() {
        // release: pairs with has_room's acquire. Our reads are done before the peer writes there.
        mine_.head.store(head_, std::memory_order_release);
        published_ = head_;
        ring_bell();
    }

    // Wake the peer if it sleeps: after whatever it may wait for.
    void ring_bell() {
        // seq_cst: pairs with arm's.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        // relaxed: the fences order the flag, and nothing else hangs on it; the exchange makes one
        // bell of many.
        if (its_.asleep.load(std::memory_order_relaxed) != 0 &&
            its_.asleep.exchange(0, std::memory_order_relaxed) != 0) {
            const char byte = 1;
            // A full socket has bells enough, and a peer that has gone needs none.
            retrying([&] { return ::send(bell_, &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL); });
        }
    }

    const std::shared_ptr<const Memory> memory_;
    Side& mine_;
    Side& its_;
    std::byte* const out_;
    std::byte* const in_;
    const std::uint64_t capacity_;
    const int bell_;
    const std::string where_;
    // Writing:
    std::uint64_t tail_;  // of the next record
    std::uint64_t seen_;  // the peer's head, as last read
    // Reading:
    std::uint64_t head_;       // of the record under way
    std::uint64_t published_;  // what the peer knows of it
    std::size_t size_ = 0;     // of the record under way
    std::size_t left_ = 0;     // of it, not yet read
    const std::byte* from_ = nullptr;
};

}  // namespace ipc_bridge::ring

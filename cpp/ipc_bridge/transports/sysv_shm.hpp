// System V shared memory with semaphores: `sysv-shm`, the textbook's bounded buffer.
//
// Pick it to learn it, or to meet a program that has it. It copies a byte twice, as a pipe does,
// and pays two system calls for each slot at either end; the ring of `shm` pays none.
//
// Meeting: `meeting`; the server makes for each client a segment, with a buffer for each direction,
// and two counting semaphores for each buffer: how many slots are full, and how many are free. Its
// answer names them, and the client, the last to attach, marks the segment for removal: the kernel
// removes it when both have gone, however they go.
//
// Why this is correct although Python says nothing about memory order: a reader touches a slot only
// after its semop(2) has taken a unit that the writer's semop gave after filling it. Each is a
// system call that takes the semaphore's lock in the kernel, and to take a lock that another has
// released orders all memory before the one before all after the other, on every processor. A flag
// in the memory itself would need atomic instructions, which Python does not have.
//
// The trap: semaphores count up to 32,767, so they count slots, not bytes. SEM_UNDO would undo a
// dead peer's work under the living one. And semop(2) waits for its unit and for nothing else: a
// watcher (sysv_watcher) wakes the sleeper, by giving a unit that stands for nothing.
//
// Copy with it: errors, system, meeting, unix_address, sysv_objects, sysv_watcher, sysv_stream (and
// frame, session, client, server for the calls).
// Run: ipc-bridge-peer serve sysv-shm:///tmp/demo.shm
#pragma once

#include <sys/sem.h>
#include <sys/shm.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/sysv_objects.hpp>
#include <ipc_bridge/transports/sysv_stream.hpp>

namespace ipc_bridge {
namespace sysv_shm {

// Of a buffer: enough that a writer and a reader seldom wait for each other.
inline constexpr std::uint32_t slots = 16;
// With its head; a system call costs as much as copying some KiB.
inline constexpr std::uint32_t slot_bytes = 16U << 10;
// Of a slot: how many bytes follow.
struct Head {
    std::uint32_t size;
    std::uint32_t zero;
};
inline constexpr std::size_t chunk_bytes = slot_bytes - sizeof(Head);
inline constexpr std::size_t buffer_bytes = std::size_t{slots} * slot_bytes;

// Give or take units of a semaphore: 0, or an errno.
inline int operate(int semaphore, short units, short flags = 0) {
    sembuf operation{0, units, flags};
    return ::semop(semaphore, &operation, 1) == 0 ? 0 : errno;
}

// One direction's semaphores.
struct Half {
    sysv::Object full;
    sysv::Object free;

    // Idempotent, whoever was first.
    void remove() const {
        full.remove();
        free.remove();
    }
};

// A segment, attached; it is detached at the end.
class Segment {
  public:
    // Throws Error: as shmat(2) fails.
    explicit Segment(sysv::Object object)
        : object_(object), memory_(::shmat(object.id, nullptr, 0)) {
        if (memory_ == reinterpret_cast<void*>(-1)) {
            throw SystemError("shmat", errno);
        }
    }
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;
    ~Segment() { detach(); }

    // Throws SystemError.
    std::size_t size() const {
        shmid_ds info{};
        checked(::shmctl(object_.id, IPC_STAT, &info), "shmctl", "segment");
        return info.shm_segsz;
    }

    std::byte* at(std::size_t offset) const { return static_cast<std::byte*>(memory_) + offset; }

    void remove() const { object_.remove(); }

    void detach() {
        if (void* memory = std::exchange(memory_, nullptr)) {
            ::shmdt(memory);
        }
    }

  private:
    sysv::Object object_;
    void* memory_;
};

// A buffer to read and a buffer to write: the client's is the first of the segment.
class ShmStream : public sysv::SysvStream {
  public:
    static constexpr const char* scheme = "sysv-shm";
    struct Shape {
        std::uint32_t slots;
        std::uint32_t slot_bytes;
    };

    static Shape offer() { return {slots, slot_bytes}; }

    // The semaphores to the server and to the client, each way `full` and `free`; and the segment.
    static std::vector<sysv::Part> parts(const Shape& shape) {
        if (shape.slots != slots || shape.slot_bytes != slot_bytes) {
            return {};
        }
        constexpr auto semaphore = sysv::Kind::SEMAPHORE;
        return {
            {semaphore, 0, 0},
            {semaphore, 1, slots},
            {semaphore, 2, 0},
            {semaphore, 3, slots},
            {sysv::Kind::SEGMENT, 0, 2 * buffer_bytes}};
    }

    ShmStream(
        Fd&& life_line,
        const std::vector<sysv::Object>& objects,
        const Shape& /*shape*/,
        Wait wait,
        std::uint32_t key,
        std::shared_ptr<sysv::Journal> journal
    )
        : SysvStream(life_line, objects, wait, key, journal),
          segment_(objects[4]),
          in_(journal ? Half{objects[0], objects[1]} : Half{objects[2], objects[3]}),
          out_(journal ? Half{objects[2], objects[3]} : Half{objects[0], objects[1]}),
          in_at_(journal ? 0 : buffer_bytes),
          out_at_(journal ? buffer_bytes : 0) {
        if (const std::size_t size = segment_.size(); size < 2 * buffer_bytes) {
            throw ProtocolError("a segment of " + std::to_string(size) + " bytes");
        }
        if (!journal) {
            segment_.remove();  // both are attached: it goes with the last of them
        }
        begin(life_line);
    }
    ~ShmStream() override { ShmStream::close(); }

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override {
        const std::lock_guard lock(lock_);
        if (at_ == size_) {
            const std::ptrdiff_t taken = over_ ? take_left() : take_now();
            if (taken <= 0) {
                return taken;
            }
        }
        const std::size_t count = std::min(size_ - at_, buffer.size());
        const std::size_t start = in_at_ + in_slot_ * slot_bytes + sizeof(Head) + at_;
        std::memcpy(buffer.data(), segment_.at(start), count);
        at_ += count;
        if (at_ == size_) {
            in_slot_ = (in_slot_ + 1) % slots;
            if (!over_) {
                give_back();
            }
        }
        return static_cast<std::ptrdiff_t>(count);
    }

    std::ptrdiff_t try_write(std::span<const std::span<const std::byte>> buffers) override {
        if (over_) {
            return end_of_stream;
        }
        std::ptrdiff_t done = 0;
        std::size_t index = 0;
        std::size_t at = 0;
        for (std::uint32_t i = 0; i < slots && index < buffers.size(); ++i) {
            if (const int number = operate(out_.free.id, -1, IPC_NOWAIT)) {
                if (number != EAGAIN) {
                    return end_of(number);
                }
                fulls_ += done == 0 ? 1 : 0;
                return done != 0 ? done : would_block;
            }
            const std::size_t size = fill(buffers, index, at);
            if (const int number = operate(out_.full.id, 1)) {
                return end_of(number);
            }
            out_slot_ = (out_slot_ + 1) % slots;
            done += static_cast<std::ptrdiff_t>(size);
        }
        fulls_ = 0;
        return done;
    }

    void close() override {
        SysvStream::close();
        segment_.detach();
    }

  protected:
    bool has_some() const override { return at_ != size_; }

    int take_one() override {
        const int number = operate(in_.full.id, -1);
        if (number == 0) {
            open_slot();
        }
        return number;
    }

    void wake() override {
        ++false_;
        if (operate(in_.full.id, 1, IPC_NOWAIT) == EACCES) {  // closed to us: its end wakes, too
            in_.full.remove();
        }
    }

    void take_rest() override {
        const int full = ::semctl(in_.full.id, 0, GETVAL) - false_;
        rest_ = std::clamp(full, 0, static_cast<int>(slots));
    }

    void remove_in() override {
        in_.remove();
        segment_.remove();  // already marked, unless the client never came
    }

    std::function<void()> remover_of_out() const override {
        return [half = out_] { half.remove(); };
    }

  private:
    // Fill the next slot from byte `at` of buffer `index` on, both moved to where it ends; its
    // size.
    std::size_t fill(
        std::span<const std::span<const std::byte>> buffers, std::size_t& index, std::size_t& at
    ) {
        const std::size_t start = out_at_ + out_slot_ * slot_bytes;
        std::size_t size = 0;
        while (size < chunk_bytes && index < buffers.size()) {
            const std::size_t count = std::min(buffers[index].size() - at, chunk_bytes - size);
            std::memcpy(segment_.at(start + sizeof(Head) + size), &buffers[index][at], count);
            size += count;
            at += count;
            if (at == buffers[index].size()) {
                ++index;
                at = 0;
            }
        }
        const Head head{static_cast<std::uint32_t>(size), 0};
        std::memcpy(segment_.at(start), &head, sizeof(head));
        return size;
    }

    // Take the next full slot, if there is one: 1, would_block or end_of_stream.
    std::ptrdiff_t take_now() {
        if (const int number = operate(in_.full.id, -1, IPC_NOWAIT)) {
            if (number == EAGAIN) {
                return interrupted_ ? end_of_stream : would_block;
            }
            return end_of(number);
        }
        return open_slot() ? 1 : would_block;
    }

    // As `take_now`, of what a peer has left: the semaphores have gone with it.
    std::ptrdiff_t take_left() {
        if (rest_ == 0) {
            return end_of_stream;
        }
        --rest_;
        measure();
        return 1;
    }

    // A unit is taken: does it stand for a slot? Then that is the one to read.
    bool open_slot() {
        if (false_ > 0) {
            --false_;
            return false;
        }
        measure();
        return true;
    }

    void measure() {
        Head head{};  // read once: a peer may change it
        std::memcpy(&head, segment_.at(in_at_ + in_slot_ * slot_bytes), sizeof(head));
        if (head.size == 0 || head.size > chunk_bytes) {
            throw ProtocolError("a slot of " + std::to_string(head.size) + " bytes");
        }
        at_ = 0;
        size_ = head.size;
        fulls_ = 0;  // the peer is at work
    }

    void give_back() {
        if (const int number = operate(in_.free.id, 1)) {
            end_of(number);
        }
    }

    // end_of_stream for the errors that mean that somebody has removed the semaphore; others are
    // thrown.
    std::ptrdiff_t end_of(int number) {
        if (sysv::is_removed(number)) {
            return removed();
        }
        if (number == ERANGE) {
            throw ProtocolError("the peer has set our semaphore");
        }
        throw SystemError("semop", number, "semaphore");
    }

    Segment segment_;
    Half in_;
    Half out_;
    std::size_t in_at_;
    std::size_t out_at_;
    std::size_t in_slot_ = 0;
    std::size_t out_slot_ = 0;
    std::size_t at_ = 0;          // of the slot being read: the next byte to give,
    std::size_t size_ = 0;        // and the end
    int rest_ = 0;                // slots still full, once the peer has gone
    std::atomic<int> false_ = 0;  // units that stand for no slot, by `wake`
};

}  // namespace sysv_shm

// `sysv-shm:///path`: a socket to meet at, and for each client a segment and four semaphores, all
// 0600.
class SysvShm : public sysv::SysvTransport<sysv_shm::ShmStream> {
  public:
    using SysvTransport::SysvTransport;
};

}  // namespace ipc_bridge

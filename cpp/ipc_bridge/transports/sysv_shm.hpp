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
// watcher (sysv_objects) wakes the sleeper, by giving a unit that stands for nothing.
//
// Copy with it: errors, system, meeting, unix_address, sysv_objects (and frame, session, client,
// server for the calls).
// Run: ipc-bridge-peer serve sysv-shm:///tmp/demo.shm
#pragma once

#include <sys/ipc.h>
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
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/meeting.hpp>
#include <ipc_bridge/transports/sysv_objects.hpp>

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

struct Answer {
    std::uint32_t key;
    std::uint32_t slots;
    std::uint32_t slot_bytes;
};

// Give or take units of a semaphore: 0, or an errno.
inline int operate(int semaphore, short units, short flags = 0) {
    sembuf operation{0, units, flags};
    return ::semop(semaphore, &operation, 1) == 0 ? 0 : errno;
}

// One direction's semaphores, by their ids.
struct Half {
    int full = -1;
    int free = -1;

    // Idempotent, whoever was first.
    void remove() const {
        for (const int semaphore : {full, free}) {
            ::semctl(semaphore, 0, IPC_RMID);
        }
    }
};

// A segment, attached; it is detached at the end.
class Segment {
  public:
    // Throws Error: as shmat(2) fails.
    explicit Segment(int id_) : id(id_), memory_(::shmat(id_, nullptr, 0)) {
        if (memory_ == reinterpret_cast<void*>(-1)) {
            throw SystemError("shmat", errno);
        }
    }
    Segment(Segment&& other) noexcept
        : id(other.id), memory_(std::exchange(other.memory_, nullptr)) {}
    Segment& operator=(Segment&&) = delete;
    ~Segment() { detach(); }

    const int id;

    std::byte* at(std::size_t offset) const { return static_cast<std::byte*>(memory_) + offset; }

    void remove() const { ::shmctl(id, IPC_RMID, nullptr); }

    void detach() {
        if (void* memory = std::exchange(memory_, nullptr)) {
            ::shmdt(memory);
        }
    }

  private:
    void* memory_;
};

// A segment and its semaphores, to read and to write.
struct Objects {
    Segment segment;
    Half in;
    Half out;
};

// A buffer to read and a buffer to write: the client's is the first of the segment.
class ShmStream : public sysv::SysvStream {
  public:
    ShmStream(
        Fd life_line,
        Objects objects,
        Wait wait,
        std::uint32_t key,
        std::shared_ptr<sysv::Journal> journal
    )
        : SysvStream(std::move(life_line), wait, key, journal),
          segment_(std::move(objects.segment)),
          in_(objects.in),
          out_(objects.out),
          in_at_(journal ? 0 : buffer_bytes),
          out_at_(journal ? buffer_bytes : 0) {
        begin();
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
            if (const int number = operate(out_.free, -1, IPC_NOWAIT)) {
                if (number != EAGAIN) {
                    return end_of(number);
                }
                fulls_ += done == 0 ? 1 : 0;
                return done != 0 ? done : would_block;
            }
            const std::size_t size = fill(buffers, index, at);
            if (const int number = operate(out_.full, 1)) {
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
        const int number = operate(in_.full, -1);
        if (number == 0) {
            open_slot();
        }
        return number;
    }

    void wake() override {
        ++false_;
        operate(in_.full, 1, IPC_NOWAIT);
    }

    void take_rest() override {
        const int full = ::semctl(in_.full, 0, GETVAL) - false_;
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
        if (const int number = operate(in_.full, -1, IPC_NOWAIT)) {
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
        if (const int number = operate(in_.free, 1)) {
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
class SysvShm : public Transport {
  public:
    // Throws Error: INVALID_ARGUMENT for a path that is empty or too long.
    explicit SysvShm(std::string path, Wait wait = Wait::ADAPTIVE)
        : meeting_("sysv-shm", path), path_(std::move(path)), wait_(wait) {
        url = meeting_.url;
    }

    std::unique_ptr<Stream> connect(std::int64_t deadline_ns) override {
        auto [life_line, record] = meeting_.connect(deadline_ns);
        Answer answer{};
        if (record.body.size() == sizeof(answer)) {
            std::memcpy(&answer, record.body.data(), sizeof(answer));
        }
        if (!sysv::is_ours(answer.key) || answer.slots != sysv_shm::slots ||
            answer.slot_bytes != sysv_shm::slot_bytes) {
            throw ProtocolError("not an answer of sysv-shm", url);
        }
        return std::make_unique<sysv_shm::ShmStream>(
            std::move(life_line), open(answer.key), wait_, answer.key, nullptr
        );
    }

    std::unique_ptr<Listener> listen() override {
        auto door = std::make_shared<UnixDoor>(meeting_.open());
        auto journal = std::make_shared<sysv::Journal>(path_);
        const auto welcome = [journal, wait = wait_](Fd& life_line, meeting::Record& /*hello*/) {
            auto [key, objects] = make(*journal);
            std::unique_ptr<Stream> stream;
            try {
                stream = std::make_unique<sysv_shm::ShmStream>(
                    std::move(life_line), std::move(objects), wait, key, journal
                );
            } catch (...) {  // no descriptor for a watcher, perhaps
                unmake(*journal, key, objects.segment.id, objects.in, objects.out);
                throw;
            }
            const Answer answer{key, sysv_shm::slots, sysv_shm::slot_bytes};
            meeting::Record record;
            record.body.assign(reinterpret_cast<const char*>(&answer), sizeof(answer));
            return std::pair(std::move(stream), std::move(record));
        };
        return std::make_unique<MeetingListener>(meeting_, door, welcome, [journal, door] {
            journal->close();
            door->close();
        });
    }

  private:
    using Answer = sysv_shm::Answer;
    using Half = sysv_shm::Half;
    using Objects = sysv_shm::Objects;

    // What the server has made: the segment, and the halves to read and to write.
    Objects open(std::uint32_t key) const {
        const auto semaphore = [&](std::uint32_t number) {
            return found(::semget(static_cast<key_t>(number), 0, 0), "semget");
        };
        const Half c2s{semaphore(key), semaphore(key + 1)};
        const Half s2c{semaphore(key + 2), semaphore(key + 3)};
        sysv_shm::Segment segment(found(::shmget(static_cast<key_t>(key), 0, 0), "shmget"));
        shmid_ds info{};
        checked(::shmctl(segment.id, IPC_STAT, &info), "shmctl", url);
        if (info.shm_perm.cuid != ::geteuid() && info.shm_perm.cuid != 0) {
            throw Error(
                Status::PERMISSION_DENIED,
                "the segment is of uid " + std::to_string(info.shm_perm.cuid),
                url
            );
        }
        if (info.shm_segsz < 2 * sysv_shm::buffer_bytes) {
            throw ProtocolError("a segment of " + std::to_string(info.shm_segsz) + " bytes", url);
        }
        segment.remove();  // both are attached: it goes with the last of them
        return {std::move(segment), s2c, c2s};
    }

    int found(int id, const char* call) const {
        if (id < 0 && errno == ENOENT) {
            throw Error(
                Status::UNAVAILABLE,
                "the server's segment is not here: it has gone, or is in another IPC namespace",
                url
            );
        }
        return checked(id, call, url);
    }

    // A new segment and its semaphores: their first key, and they, to read and to write.
    //
    // Throws Error: RESOURCE_EXHAUSTED.
    static std::pair<std::uint32_t, Objects> make(sysv::Journal& journal) {
        while (true) {
            const std::uint32_t key = journal.reserve();
            Half in;
            Half out;
            int id = -1;
            if ((in.full = create(key, 0)) >= 0 &&
                (in.free = create(key + 1, sysv_shm::slots)) >= 0 &&
                (out.full = create(key + 2, 0)) >= 0 &&
                (out.free = create(key + 3, sysv_shm::slots)) >= 0) {
                id = ::shmget(static_cast<key_t>(key), 2 * sysv_shm::buffer_bytes, flags);
            }
            const int number = errno;
            try {
                if (id >= 0) {
                    return {key, Objects{sysv_shm::Segment(id), in, out}};
                }
            } catch (const Error&) {
                unmake(journal, key, id, in, out);
                throw;
            }
            unmake(journal, key, id, in, out);
            if (number != EEXIST) {  // else somebody has one of these keys: take others
                throw sysv::refusal("semget or shmget", number);
            }
        }
    }

    // Removing what was not made fails, and no more.
    static void unmake(
        sysv::Journal& journal, std::uint32_t key, int segment, const Half& in, const Half& out
    ) {
        in.remove();
        out.remove();
        ::shmctl(segment, IPC_RMID, nullptr);
        journal.release(key);
    }

    static int create(std::uint32_t key, std::uint32_t value) {
        const int semaphore = ::semget(static_cast<key_t>(key), 1, flags);
        if (semaphore >= 0) {
            ::semctl(semaphore, 0, SETVAL, static_cast<int>(value));
        }
        return semaphore;
    }

    static constexpr int flags = IPC_CREAT | IPC_EXCL | 0600;

    Meeting meeting_;
    std::string path_;
    Wait wait_;
};

}  // namespace ipc_bridge

// System V message queues: `sysv-queue`, the textbook's other IPC.
//
// Pick it to learn it, or where it is there already: it keeps messages whole and wakes as cheaply
// as a pipe. A Unix socket does more: it has a descriptor, an end-of-file and no limit of the
// machine's.
//
// Meeting: `meeting`; the server makes a pair of queues for each client, and its answer names them.
// The stream of bytes goes through them in chunks, so that any payload passes through any queue.
//
// The trap: msgrcv(2) waits for a message and for nothing else: neither for a time nor for the
// peer's end. So a watcher (sysv_objects) that knows both sends the sleeper a message of another
// type. And msgsnd(2) would wait for room for ever, so it never waits here: who finds the queue
// full reads its own meanwhile (else two writers would wait for each other), and tries again.
//
// Copy with it: errors, system, meeting, unix_address, sysv_objects (and frame, session, client,
// server for the calls).
// Run: ipc-bridge-peer serve sysv-queue:///tmp/demo.queue
#pragma once

#include <sys/ipc.h>
#include <sys/msg.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/meeting.hpp>
#include <ipc_bridge/transports/sysv_objects.hpp>

namespace ipc_bridge {
namespace sysv_queue {

// Types of messages: a chunk of the stream; nothing, for whoever sleeps.
inline constexpr long data = 1;
inline constexpr long wake = 2;
// Of a message, where the machine allows more: more gains nothing.
inline constexpr std::size_t chunk_bytes_max = 64U << 10;
// Then the caller has a look at its input and its deadline.
inline constexpr int chunks_per_write = 16;
// The key of the client's queue (the server's is the next), and the chunk.
struct Answer {
    std::uint32_t key;
    std::uint32_t chunk_bytes;
};

// A pair of queues, by their ids.
struct Queues {
    int in;
    int out;
};

inline void remove(int queue) {
    ::msgctl(queue, IPC_RMID, nullptr);
}

// A message in the kernel's layout: a type, then bytes.
class Message {
  public:
    explicit Message(std::size_t size_max) : bytes_(sizeof(long) + size_max) {}

    long type() const {
        long type = 0;
        std::memcpy(&type, bytes_.data(), sizeof(type));
        return type;
    }
    void set_type(long type) { std::memcpy(bytes_.data(), &type, sizeof(type)); }
    std::span<std::byte> bytes() { return std::span(bytes_).subspan(sizeof(long)); }
    void* raw() { return bytes_.data(); }

  private:
    std::vector<std::byte> bytes_;
};

// A queue to read and a queue to write.
class QueueStream : public sysv::SysvStream {
  public:
    QueueStream(
        Fd life_line,
        Queues queues,
        std::size_t chunk_bytes,
        Wait wait,
        std::uint32_t key,
        std::shared_ptr<sysv::Journal> journal
    )
        : SysvStream(std::move(life_line), wait, key, std::move(journal)),
          queues_(queues),
          taken_(chunk_bytes),
          sent_(chunk_bytes) {
        sent_.set_type(data);
        begin();
    }
    ~QueueStream() override { QueueStream::close(); }

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override {
        const std::lock_guard lock(lock_);
        if (left_.empty()) {
            if (over_) {
                return end_of_stream;
            }
            const ssize_t count = receive(IPC_NOWAIT);
            if (count < 0 && errno == ENOMSG) {
                return interrupted_ ? end_of_stream : would_block;
            }
            if (count < 0) {
                return end_of(errno);
            }
            if (taken_.type() == wake_type) {
                return would_block;
            }
            take(count);
        }
        const std::size_t count = std::min(left_.size(), buffer.size());
        std::memcpy(buffer.data(), left_.data(), count);
        left_ = left_.subspan(count);
        return static_cast<std::ptrdiff_t>(count);
    }

    std::ptrdiff_t try_write(std::span<const std::span<const std::byte>> buffers) override {
        if (over_) {
            return end_of_stream;
        }
        std::ptrdiff_t done = 0;
        std::size_t index = 0;
        std::size_t at = 0;
        for (int i = 0; i < chunks_per_write; ++i) {
            const std::size_t size = gather(buffers, index, at);
            if (size == 0) {
                break;
            }
            if (::msgsnd(queues_.out, sent_.raw(), size, IPC_NOWAIT) < 0) {
                if (errno != EAGAIN) {
                    return end_of(errno);
                }
                fulls_ += done == 0 ? 1 : 0;
                return done != 0 ? done : would_block;
            }
            done += static_cast<std::ptrdiff_t>(size);
        }
        fulls_ = 0;
        return done;
    }

  protected:
    bool has_some() const override { return !left_.empty(); }

    int take_one() override {
        const ssize_t count = receive(0);
        if (count < 0) {
            return errno;
        }
        if (taken_.type() != wake_type) {
            take(count);
        }
        return 0;
    }

    void wake() override {
        struct {
            long type;
            char none;
        } message{wake_type, 0};
        ::msgsnd(queues_.in, &message, 0, IPC_NOWAIT);  // a full queue wakes, too
    }

    void take_rest() override {
        rest_.assign(left_.begin(), left_.end());
        const auto next = [this] {
            return ::msgrcv(
                queues_.in, taken_.raw(), taken_.bytes().size(), 0, IPC_NOWAIT | MSG_NOERROR
            );
        };
        for (ssize_t count = 0; (count = next()) >= 0;) {
            if (taken_.type() == data) {
                const auto chunk = taken_.bytes().first(static_cast<std::size_t>(count));
                rest_.insert(rest_.end(), chunk.begin(), chunk.end());
            }
        }
        left_ = rest_;
    }

    void remove_in() override { remove(queues_.in); }

    std::function<void()> remover_of_out() const override {
        return [queue = queues_.out] { remove(queue); };
    }

  private:
    static constexpr long wake_type = sysv_queue::wake;

    ssize_t receive(int flags) {
        const ssize_t count = ::msgrcv(queues_.in, taken_.raw(), taken_.bytes().size(), 0, flags);
        if (count < 0 && errno == E2BIG) {  // it stays at the head for ever
            throw ProtocolError("a message longer than a chunk");
        }
        return count;
    }

    void take(ssize_t count) {
        if (taken_.type() != data || count == 0) {
            throw ProtocolError(
                "a message of type " + std::to_string(taken_.type()) + " and " +
                std::to_string(count) + " bytes"
            );
        }
        fulls_ = 0;  // the peer is at work
        left_ = taken_.bytes().first(static_cast<std::size_t>(count));
    }

    // The next chunk into `sent_`, from byte `at` of buffer `index` on, both moved to where it
    // ends: its size.
    std::size_t gather(
        std::span<const std::span<const std::byte>> buffers, std::size_t& index, std::size_t& at
    ) {
        const std::span<std::byte> chunk = sent_.bytes();
        std::size_t size = 0;
        while (size < chunk.size() && index < buffers.size()) {
            const std::span<const std::byte> piece = buffers[index].subspan(
                at, std::min(buffers[index].size() - at, chunk.size() - size)
            );
            std::memcpy(&chunk[size], piece.data(), piece.size());
            size += piece.size();
            at += piece.size();
            if (at == buffers[index].size()) {
                ++index;
                at = 0;
            }
        }
        return size;
    }

    std::ptrdiff_t end_of(int number) {
        if (sysv::is_removed(number)) {
            return removed();
        }
        throw SystemError("msgrcv or msgsnd", number, "queue");
    }

    Queues queues_;
    Message taken_;  // the latest, and what to send next
    Message sent_;
    std::span<const std::byte> left_;  // taken out of the queue, and not given yet
    std::vector<std::byte> rest_;      // all that is left, once the peer has gone
};

}  // namespace sysv_queue

// `sysv-queue:///path`: a socket to meet at, and a pair of queues for each client, all 0600.
class SysvQueue : public Transport {
  public:
    // Throws Error: INVALID_ARGUMENT for a path that is empty or too long.
    explicit SysvQueue(std::string path, Wait wait = Wait::ADAPTIVE)
        : meeting_("sysv-queue", path), path_(std::move(path)), wait_(wait) {
        url = meeting_.url;
    }

    std::unique_ptr<Stream> connect(std::int64_t deadline_ns) override {
        auto [life_line, record] = meeting_.connect(deadline_ns);
        Answer answer{};
        if (record.body.size() == sizeof(answer)) {
            std::memcpy(&answer, record.body.data(), sizeof(answer));
        }
        if (!sysv::is_ours(answer.key) || answer.chunk_bytes == 0 ||
            answer.chunk_bytes > sysv_queue::chunk_bytes_max) {
            throw ProtocolError("not an answer of sysv-queue", url);
        }
        const Queues queues{open(answer.key + 1), open(answer.key)};
        return std::make_unique<sysv_queue::QueueStream>(
            std::move(life_line), queues, answer.chunk_bytes, wait_, answer.key, nullptr
        );
    }

    std::unique_ptr<Listener> listen() override {
        auto door = std::make_shared<UnixDoor>(meeting_.open());
        auto journal = std::make_shared<sysv::Journal>(path_);
        const auto welcome = [journal, wait = wait_](Fd& life_line, meeting::Record& /*hello*/) {
            const auto [answer, queues] = make(*journal);
            std::unique_ptr<Stream> stream;
            try {
                stream = std::make_unique<sysv_queue::QueueStream>(
                    std::move(life_line), queues, answer.chunk_bytes, wait, answer.key, journal
                );
            } catch (...) {  // no descriptor for a watcher, perhaps
                unmake(*journal, answer.key, {queues.in, queues.out});
                throw;
            }
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
    using Answer = sysv_queue::Answer;
    using Queues = sysv_queue::Queues;

    // A queue that the server has made.
    int open(std::uint32_t key) const {
        const int queue = ::msgget(static_cast<key_t>(key), 0);
        if (queue < 0 && errno == ENOENT) {
            throw Error(
                Status::UNAVAILABLE,
                "the server's queue is not here: it has gone, or is in another IPC namespace",
                url
            );
        }
        msqid_ds info{};
        checked(queue, "msgget", url);
        checked(::msgctl(queue, IPC_STAT, &info), "msgctl", url);
        if (info.msg_perm.cuid != ::geteuid() && info.msg_perm.cuid != 0) {
            throw Error(
                Status::PERMISSION_DENIED,
                "the queue is of uid " + std::to_string(info.msg_perm.cuid),
                url
            );
        }
        return queue;
    }

    // A pair of new queues. Throws Error: RESOURCE_EXHAUSTED.
    static std::pair<Answer, Queues> make(sysv::Journal& journal) {
        const std::size_t chunk_bytes =
            std::min({sysv::limit("msgmax"), sysv::limit("msgmnb") / 2, sysv_queue::chunk_bytes_max}
            );
        while (true) {
            const std::uint32_t key = journal.reserve();
            const int in = create(key);
            const int out = in < 0 ? -1 : create(key + 1);
            if (out >= 0) {
                const auto size = static_cast<std::uint32_t>(std::max<std::size_t>(1, chunk_bytes));
                return {{key, size}, {in, out}};
            }
            const int number = errno;
            unmake(journal, key, {in});
            if (number != EEXIST) {  // else somebody has this key: take another
                throw sysv::refusal("msgget", number);
            }
        }
    }

    static void unmake(sysv::Journal& journal, std::uint32_t key, std::initializer_list<int> made) {
        for (const int queue : made) {
            sysv_queue::remove(queue);  // of what was not made: EINVAL
        }
        journal.release(key);
    }

    static int create(std::uint32_t key) {
        return ::msgget(static_cast<key_t>(key), IPC_CREAT | IPC_EXCL | 0600);
    }

    Meeting meeting_;
    std::string path_;
    Wait wait_;
};

}  // namespace ipc_bridge

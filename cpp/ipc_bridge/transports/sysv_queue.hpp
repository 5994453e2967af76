// System V message queues: `sysv-queue`, the textbook's other IPC.
//
// Pick it to learn it, or where it is there already: it keeps messages whole, and in C++ it
// wakes as cheaply as a pipe. A Unix socket does more: it has a descriptor, an end-of-file and no
// limit of the machine's.
//
// Meeting: `meeting`; the server makes a pair of queues for each client, and its answer names them.
// The stream of bytes goes through them in chunks, so that any payload passes through any queue.
//
// The trap: msgrcv(2) waits for a message and for nothing else: neither for a time nor for the
// peer's end. So a watcher (sysv_watcher) that knows both sends the sleeper a message of another
// type. And msgsnd(2) would wait for room for ever, so it never waits here: who finds the queue
// full reads its own meanwhile (else two writers would wait for each other), and tries again.
//
// Copy with it: errors, system, meeting, unix_address, sysv_objects, sysv_watcher, sysv_stream (and
// frame, session, client, server for the calls).
// Run: ipc-bridge-peer serve sysv-queue:///tmp/demo.queue
#pragma once

#include <sys/msg.h>

#include <algorithm>
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
namespace sysv_queue {

// Types of messages: a chunk of the stream; nothing, for whoever sleeps.
inline constexpr long data = 1;
inline constexpr long wake = 2;
// Of a message, where the machine allows more: more gains nothing.
inline constexpr std::size_t chunk_bytes_max = 64U << 10;
// Then the caller has a look at its input and its deadline.
inline constexpr int chunks_per_write = 16;

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
    static constexpr const char* scheme = "sysv-queue";
    struct Shape {
        std::uint32_t chunk_bytes;
    };

    static Shape offer() {
        const std::size_t chunk_bytes =
            std::min({sysv::limit("msgmax"), sysv::limit("msgmnb") / 2, chunk_bytes_max});
        return {static_cast<std::uint32_t>(std::max<std::size_t>(1, chunk_bytes))};
    }

    // The queue to the server, and that to the client.
    static std::vector<sysv::Part> parts(const Shape& shape) {
        if (shape.chunk_bytes == 0 || shape.chunk_bytes > chunk_bytes_max) {
            return {};
        }
        return {
            {sysv::Kind::QUEUE, 0, shape.chunk_bytes}, {sysv::Kind::QUEUE, 1, shape.chunk_bytes}};
    }

    QueueStream(
        Fd&& life_line,
        const std::vector<sysv::Object>& objects,
        const Shape& shape,
        Wait wait,
        std::uint32_t key,
        std::shared_ptr<sysv::Journal> journal
    )
        : SysvStream(life_line, objects, wait, key, journal),
          in_(objects[journal ? 0 : 1]),
          out_(objects[journal ? 1 : 0]),
          taken_(shape.chunk_bytes),
          sent_(shape.chunk_bytes) {
        sent_.set_type(data);
        begin(life_line);
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
            if (::msgsnd(out_.id, sent_.raw(), size, IPC_NOWAIT) < 0) {
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
        // A full queue wakes, too; and one that is closed to us does by its end.
        if (::msgsnd(in_.id, &message, 0, IPC_NOWAIT) < 0 && errno == EACCES) {
            in_.remove();
        }
    }

    void take_rest() override {
        rest_.assign(left_.begin(), left_.end());
        const auto next = [this] {
            return ::msgrcv(
                in_.id, taken_.raw(), taken_.bytes().size(), 0, IPC_NOWAIT | MSG_NOERROR
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

    void remove_in() override { in_.remove(); }

    std::function<void()> remover_of_out() const override {
        return [queue = out_] { queue.remove(); };
    }

  private:
    static constexpr long wake_type = sysv_queue::wake;

    ssize_t receive(int flags) {
        const ssize_t count = ::msgrcv(in_.id, taken_.raw(), taken_.bytes().size(), 0, flags);
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

    sysv::Object in_;
    sysv::Object out_;
    Message taken_;  // the latest, and what to send next
    Message sent_;
    std::span<const std::byte> left_;  // taken out of the queue, and not given yet
    std::vector<std::byte> rest_;      // all that is left, once the peer has gone
};

}  // namespace sysv_queue

// `sysv-queue:///path`: a socket to meet at, and a pair of queues for each client, all 0600.
class SysvQueue : public sysv::SysvTransport<sysv_queue::QueueStream> {
  public:
    using SysvTransport::SysvTransport;
};

}  // namespace ipc_bridge

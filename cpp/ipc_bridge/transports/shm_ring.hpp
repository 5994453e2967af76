// Shared memory: `shm`, two lock-free rings between a client and its server. The fastest way.
//
// Pick it when a call costs more than it does: a round trip is two cache lines each way while both
// spin, and large payloads move at the speed of two copies. Spinning is what makes it fast: a
// reader that sleeps is woken through a socket, at a socket's price.
//
// Meeting: as `meeting`. The server makes the memory once a client has said who it is, and passes
// its descriptor; no name leads to it, so nothing is left of it, whoever dies.
//
// The trap: the other process writes into our memory. The ring trusts nothing that it reads there
// (`ring`), and refuses memory that could shrink under it.
//
// Copy with it: errors, system, unix_address, meeting, ring (and frame, session, client, server for
// the calls).
// Run: ipc-bridge-peer serve shm:///tmp/demo.sock?wait=spin
#pragma once

#include <poll.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/meeting.hpp>
#include <ipc_bridge/transports/ring.hpp>

namespace ipc_bridge {
namespace shm_ring {

// Between two looks at the life-line of a reader that does not sleep: short against a second, in
// which a death is seen, and long against the system call.
inline constexpr std::int64_t look_ns = 1'000'000;
// Reads in vain for each such look by who brings a loop of his own.
inline constexpr unsigned looks_empty = 1024;

// Leave the core to its other thread for a moment, and the line to its writer.
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // yield does next to nothing there
#endif
}

}  // namespace shm_ring

// One side of a ring, and the life-line: bells come on it, and its end is the peer's.
class RingStream : public Stream {
  public:
    // `side` as in ring::Duplex. Throws ProtocolError as it does; `life_line` is not taken then.
    RingStream(
        Fd&& life_line,
        std::shared_ptr<const ring::Memory> memory,
        int side,
        Wait wait,
        const std::string& where
    )
        : Stream(wait),
          ring_(std::in_place, std::move(memory), side, life_line.get(), where),
          life_line_(std::move(life_line)) {}

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override {
        if (!ring_) {
            return end_of_stream;
        }
        if (const std::size_t count = ring_->read(buffer)) {
            return static_cast<std::ptrdiff_t>(count);
        }
        if (++empty_ % shm_ring::looks_empty == 0) {
            look();
        }
        if (!gone_ && !interrupted_.load(std::memory_order_relaxed)) {
            return would_block;
        }
        const std::size_t count = ring_->read(buffer);  // what it wrote before it went is here now
        return count > 0 ? static_cast<std::ptrdiff_t>(count) : end_of_stream;
    }

    std::ptrdiff_t try_write(std::span<const std::span<const std::byte>> buffers) override {
        if (gone_) {
            return end_of_stream;
        }
        return static_cast<std::ptrdiff_t>(ring_->write(buffers));
    }

    // Spins first, as the stream's strategy says: who writes more than the ring holds waits often.
    bool wait(bool readable, bool writable, std::int64_t deadline_ns) override {
        if (const std::int64_t budget_ns = spinner.budget_ns()) {
            if (spin_until_ready(readable, writable, budget_ns, deadline_ns)) {
                return true;
            }
            if (budget_ns == never && now_ns() >= deadline_ns) {
                return false;
            }
        }
        return sleep(readable, writable, deadline_ns);
    }

    // The descriptor says nothing before this, for the ring needs no system call.
    bool arm() override {
        if (gone_) {
            return true;
        }
        look();
        ring_->arm();
        if (is_ready(true, false)) {
            ring_->disarm();
            return true;
        }
        return false;
    }

    int fileno() const override { return life_line_.get(); }

    void interrupt() override {
        interrupted_.store(true, std::memory_order_relaxed);
        wakeup_.set();
    }

    void close() override {
        gone_ = true;
        ring_.reset();
        wakeup_.close();
        life_line_.close();
    }

  protected:
    // Called about every millisecond of a wait, and after a signal; may throw. (Python lets its
    // signal handlers run here.)
    virtual void on_pause() {}

    std::ptrdiff_t spin(
        std::span<std::byte> buffer, std::int64_t budget_ns, std::int64_t deadline_ns
    ) override {
        return spin_until_ready(true, false, budget_ns, deadline_ns) ? try_read(buffer)
                                                                     : would_block;
    }

    std::ptrdiff_t sleep_and_read(std::span<std::byte> buffer, std::int64_t deadline_ns) override {
        while (sleep(true, false, deadline_ns)) {
            const std::ptrdiff_t count = try_read(buffer);
            if (count != would_block) {
                return count;
            }
        }
        return would_block;
    }

  private:
    bool is_ready(bool readable, bool writable) {
        return gone_ || (writable && ring_->is_writable()) ||
               (readable && (ring_->is_readable() || interrupted_.load(std::memory_order_relaxed)));
    }

    // See to the life-line.
    void look() { gone_ = gone_ || !ring_->take_bells(); }

    bool spin_until_ready(
        bool readable, bool writable, std::int64_t budget_ns, std::int64_t deadline_ns
    ) {
        const std::int64_t began_ns = now_ns();
        const std::int64_t until_ns =
            budget_ns == never ? deadline_ns : std::min(deadline_ns, began_ns + budget_ns);
        std::int64_t look_ns = began_ns + shm_ring::look_ns;
        while (true) {
            for (int i = 0; i < spin_clock_reads; ++i) {
                if (is_ready(readable, writable)) {
                    spinner.spun(true);
                    return true;
                }
                shm_ring::pause();
            }
            const std::int64_t at_ns = now_ns();
            if (at_ns >= until_ns || spinner.is_crowded()) {
                spinner.spun(false);
                return false;
            }
            if (at_ns >= look_ns) {
                look();
                on_pause();
                look_ns = at_ns + shm_ring::look_ns;
            }
        }
    }

    bool sleep(bool readable, bool writable, std::int64_t deadline_ns) {
        while (!gone_) {
            ring_->arm();
            if (is_ready(readable, writable)) {
                ring_->disarm();
                return true;
            }
            const int count = poll(readable, deadline_ns);
            ring_->disarm();
            if (count > 0) {
                look();
                return true;
            }
            if (count == 0) {
                return false;
            }
            on_pause();  // a signal
        }
        return true;
    }

    // ppoll(2), once: its count, -1 if a signal came.
    int poll(bool readable, std::int64_t deadline_ns) {
        pollfd fds[] = {{life_line_.get(), POLLIN, 0}, {wakeup_.fileno(), POLLIN, 0}};
        timespec left{};
        if (deadline_ns != never) {
            const std::int64_t left_ns = std::max<std::int64_t>(0, deadline_ns - now_ns());
            left = {left_ns / 1'000'000'000, left_ns % 1'000'000'000};
        }
        // An interrupted stream may still be written to: then its wake-up, always set, is left out.
        const int count =
            ::ppoll(fds, readable ? 2 : 1, deadline_ns == never ? nullptr : &left, nullptr);
        if (count < 0 && errno != EINTR) {
            throw SystemError("ppoll", errno);
        }
        return count;
    }

    std::optional<ring::Duplex> ring_;  // none once closed
    Wakeup wakeup_;
    Fd life_line_;
    bool gone_ = false;  // the peer, or this side by `close`
    std::atomic<bool> interrupted_ = false;
    unsigned empty_ = 0;  // reads in vain
};

namespace shm_ring {

// What the answer of a meeting says; the memory's descriptor goes with it.
struct Welcome {
    std::uint32_t layout = 1;  // of the memory (see `ring`)
    std::uint32_t capacity_bytes = 0;
};
static_assert(sizeof(Welcome) == 8);

}  // namespace shm_ring

// `shm:///path`: a socket file, mode 0600, and `path.lock` while a server lives.
class Shm : public Transport {
  public:
    // `capacity_bytes` of each ring is the server's to say. Throws Error: INVALID_ARGUMENT for a
    // path that is empty or too long, and unless it is a power of two from 64 KiB to 1 GiB.
    explicit Shm(
        const std::string& path,
        Wait wait = Wait::ADAPTIVE,
        std::size_t capacity_bytes = ring::capacity_bytes
    )
        : meeting_("shm", path), wait_(wait), capacity_bytes_(capacity_bytes) {
        url = meeting_.url;
        if (!ring::is_capacity(capacity_bytes)) {
            throw Error(
                Status::INVALID_ARGUMENT, "a ring of " + std::to_string(capacity_bytes) + " bytes"
            );
        }
    }

    std::unique_ptr<Stream> connect(std::int64_t deadline_ns) override {
        auto [life_line, answer] = meeting_.connect(deadline_ns);
        shm_ring::Welcome welcome;
        if (answer.body.size() != sizeof(welcome)) {
            throw ProtocolError("not the answer of a shm server", url);
        }
        std::memcpy(&welcome, answer.body.data(), sizeof(welcome));
        if (welcome.layout != shm_ring::Welcome{}.layout) {
            throw ProtocolError("another layout of the shared memory", url);
        }
        if (answer.fds.empty()) {
            throw ProtocolError("an answer without the shared memory", url);
        }
        const Fd fd = answer.take_fd(url);
        return std::make_unique<RingStream>(
            std::move(life_line),
            ring::Memory::attach(fd.get(), welcome.capacity_bytes, url),
            1,
            wait_,
            url
        );
    }

    std::unique_ptr<Listener> listen() override {
        const auto welcome = [*this](Fd& life_line, meeting::Record&) {
            auto [memory, fd] = ring::Memory::make(capacity_bytes_);
            meeting::Record answer;
            const shm_ring::Welcome body{.capacity_bytes = std::uint32_t(capacity_bytes_)};
            answer.body.assign(reinterpret_cast<const char*>(&body), sizeof(body));
            answer.fds.push_back(std::move(fd));
            return std::pair<std::unique_ptr<Stream>, meeting::Record>(
                std::make_unique<RingStream>(
                    std::move(life_line), std::move(memory), 0, wait_, url
                ),
                std::move(answer)
            );
        };
        return std::make_unique<MeetingListener>(
            meeting_, std::make_shared<UnixDoor>(meeting_.open()), welcome
        );
    }

  private:
    Meeting meeting_;
    Wait wait_;
    std::size_t capacity_bytes_;
};

}  // namespace ipc_bridge

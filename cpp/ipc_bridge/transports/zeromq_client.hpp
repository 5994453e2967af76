// A client's end of ZeroMQ: a DEALER and its monitor; the traps stand in zeromq.
#pragma once

#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <utility>

#include <zmq.hpp>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/zeromq_socket.hpp>

namespace ipc_bridge::zeromq {

// The context that all clients of a process share: its threads live as long as one of them.
class Clients {
  public:
    static Clients& all() {
        static Clients clients;
        return clients;
    }

    // A DEALER. `close` it here.
    zmq::socket_t open() {
        const std::lock_guard lock(mutex_);
        if (!context_) {
            context_ = std::make_unique<zmq::context_t>();
            context_->set(zmq::ctxopt::max_sockets, sockets_max);
        }
        zmq::socket_t dealer(*context_, zmq::socket_type::dealer);
        ++users_;
        return dealer;
    }

    // What it has not sent belongs to a call that nobody waits for.
    void close(zmq::socket_t dealer) {
        dealer.set(zmq::sockopt::linger, 0);
        dealer.close();
        const std::lock_guard lock(mutex_);
        if (--users_ == 0) {
            context_.reset();
        }
    }

    zmq::context_t& context() { return *context_; }

  private:
    Clients() {
        ::pthread_atfork(nullptr, nullptr, [] { all().after_fork(); });
    }

    void after_fork() {
        // What it had is the parent's, and its threads are not here; see client's Orphan. (The
        // mutex may be held by a thread that is not here either.)
        [[maybe_unused]] auto* leaked = context_.release();
        new (&mutex_) std::mutex;
        users_ = 0;
    }

    std::mutex mutex_;
    std::unique_ptr<zmq::context_t> context_;
    std::size_t users_ = 0;
};

// A client's end. Messages come whole, and are read bit by bit.
class DealerStream : public Stream {
  public:
    DealerStream(zmq::socket_t dealer, zmq::socket_t monitor, std::string url)
        : Stream(Wait::BLOCK),
          dealer_(std::move(dealer)),
          monitor_(std::move(monitor)),
          url_(std::move(url)) {
        fds_[0] = {fd_of(dealer_), POLLIN, 0};
        fds_[1] = {fd_of(monitor_), POLLIN, 0};
    }
    ~DealerStream() override { close(); }

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override {
        return read_some(buffer, receive);
    }

    std::ptrdiff_t try_write(Buffers buffers) override {
        if (gone_ || ended_) {
            return end_of_stream;
        }
        if (!unsent_.has_room()) {
            return would_block;
        }
        const std::ptrdiff_t count = checked(unsent_.send(dealer_, buffers), "zmq_send", url_);
        unsent_.taken += count;
        return count;
    }

    bool wait(bool readable, bool writable, std::int64_t deadline_ns) override {
        while (!(writable && unsent_.has_room()) && !(readable && arm())) {
            const std::int64_t until_ns =
                writable ? std::min(deadline_ns, now_ns() + unsent_look_ns) : deadline_ns;
            if (sleep(until_ns)) {
                return true;
            }
            if (until_ns == deadline_ns) {
                return false;
            }
        }
        return true;
    }

    bool arm() override {
        const bool idle = read_ == part_.size() && !gone_ && !ended_ && !interrupted_;
        return !idle || is_readable(dealer_);
    }

    // That of an epoll(7) over the sockets' descriptors: there are two.
    int fileno() const override {
        if (!epoll_) {
            epoll_ = Fd(checked(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1", url_));
            for (const pollfd& one : fds_) {
                epoll_event event{EPOLLIN, {}};
                checked(
                    ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, one.fd, &event), "epoll_ctl", url_
                );
            }
        }
        return epoll_.get();
    }

    // Of a server's streams only; a client has nobody who would.
    void interrupt() override { interrupted_ = true; }

    void close() override {
        if (!dealer_) {
            return;
        }
        epoll_.close();
        close_monitor(dealer_, monitor_);
        Clients::all().close(std::move(dealer_));
    }

  protected:
    std::ptrdiff_t sleep_and_read(std::span<std::byte> buffer, std::int64_t deadline_ns) override {
        std::ptrdiff_t count = read_some(buffer, is_far(deadline_ns) ? await : receive);
        while (count == would_block && sleep(deadline_ns)) {
            count = try_read(buffer);
        }
        return count;
    }

  private:
    std::ptrdiff_t read_some(std::span<std::byte> buffer, Receive* how) {
        if (read_ == part_.size()) {
            const std::ptrdiff_t count = take(how);
            if (count <= 0) {
                return count;
            }
        }
        const std::size_t size = copy_out(part_, read_, buffer);
        read_ += size;
        return static_cast<std::ptrdiff_t>(size);
    }

    // Take the next part that is not empty into `part_`: 1, would_block or end_of_stream.
    std::ptrdiff_t take(Receive* how) {
        read_ = 0;  // of `part_`, which zmq_msg_recv(3) empties also when there is nothing
        while (!ended_) {
            if (!how(dealer_, part_)) {
                return end_if_gone();
            }
            const bool starts = !std::exchange(more_, part_.more());
            if (part_.size() != 0) {
                return 1;
            }
            ended_ = starts && !more_;
        }
        return end_of_stream;
    }

    std::ptrdiff_t end_if_gone() {
        if (interrupted_) {
            return end_of_stream;
        }
        // (Asked here, not remembered from a sleep of ours: others sleep on `fileno`.)
        if (!gone_ && sleep_until_ready(std::span(fds_).subspan(1), 0)) {
            look_at_monitor();
            if (gone_) {  // what came before that is here now
                return take(receive);
            }
        }
        ended_ = gone_;
        return gone_ ? end_of_stream : would_block;
    }

    bool sleep(std::int64_t deadline_ns) { return sleep_until_ready(fds_, deadline_ns); }

    // (Only this call touches the monitor's socket: its descriptor tells the truth.)
    void look_at_monitor() {
        for (const Event& event : events_of(monitor_)) {
            gone_ = gone_ || event.number == ZMQ_EVENT_DISCONNECTED;
        }
    }

    zmq::socket_t dealer_;
    zmq::socket_t monitor_;
    std::string url_;
    Unsent unsent_;
    zmq::message_t part_;   // that is being read
    std::size_t read_ = 0;  // bytes of it that were
    bool more_ = false;     // parts of its message
    bool gone_ = false;     // the server: no more will come than what is here
    bool ended_ = false;
    std::atomic<bool> interrupted_ = false;
    pollfd fds_[2] = {};
    mutable Fd epoll_;
};

}  // namespace ipc_bridge::zeromq

// The watch over life-lines: what ends a wait that the kernel would not end.
//
// msgrcv(2) and semop(2) wait for their own objects and for nothing else: neither the peer's end
// nor a deadline wakes them. (semtimedop(2) could do the latter; Python has no way to it.) One
// thread a process waits for both instead. And it looks after objects that nobody waits on: the
// kernel tells their removal, by ipcrm(1), to those who sleep on them and to nobody else.
//
// Copy with it: errors, system, meeting, unix_address.
#pragma once

#include <sys/epoll.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>
#include <utility>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/meeting.hpp>

namespace ipc_bridge {
namespace sysv {

// How often to look whether what is shared with a peer is still there: its removal is to be seen
// within a second, also on a busy machine.
inline constexpr std::int64_t look_every_ns = 250'000'000;

// What the watcher looks after: a life-line, a time to wake somebody, and a time to look.
class Watched {
  public:
    explicit Watched(Fd life_line) : life_line_(std::move(life_line)), fd(life_line_.get()) {}
    // `life_line_` follows.
    explicit Watched(int fd_) : fd(fd_) {}
    virtual ~Watched() = default;
    Watched(const Watched&) = delete;
    Watched& operator=(const Watched&) = delete;

    // The peer has gone, or what is shared with it. True: forget this. May neither watch nor
    // unwatch.
    virtual bool on_gone() = 0;

    // `wake_ns` has come. The same holds.
    virtual void on_time() {}

    // `look_ns` has come: is something gone of what is shared with the peer? The same holds.
    virtual bool is_broken() { return false; }

  protected:
    Fd life_line_;

  public:
    const int fd;
    std::atomic<std::int64_t> wake_ns = never;
    std::int64_t look_ns = never;  // the watcher's, once it has this
};

// One thread a process, while there is something to watch: asleep until a life-line ends or a time
// comes. msgrcv(2) can do neither: it waits for a message and nothing else.
//
// A time that is set while an earlier one is planned costs no system call: at that earlier one the
// thread looks again.
class Watcher {
  public:
    Watcher() : epoll_(checked(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1", "watcher")) {
        control(EPOLL_CTL_ADD, poke_.fileno(), EPOLLIN | EPOLLET);
    }

    // Throws Error: RESOURCE_EXHAUSTED.
    void add(Watched& one) {
        if (!thread_.joinable()) {
            try {
                thread_ = std::thread([this] { run(); });
            } catch (const std::system_error&) {
                throw Error(Status::RESOURCE_EXHAUSTED, "no further thread for the watcher");
            }
        }
        control(EPOLL_CTL_ADD, one.fd, EPOLLRDHUP | EPOLLONESHOT);
        all_.insert(&one);
        by_fd_[one.fd] = &one;
        plan(one.look_ns);
    }

    void remove(Watched& one) {
        all_.erase(&one);
        if (const auto found = by_fd_.find(one.fd);
            found != by_fd_.end() && found->second == &one) {
            by_fd_.erase(found);
            ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, one.fd, nullptr);
        }
    }

    bool is_idle() const { return all_.empty(); }

    // Somebody has set its `wake_ns` to this.
    void plan(std::int64_t wake_ns) {
        if (wake_ns < planned_ns_) {
            poke_.set();
        }
    }

    // Nothing is left to watch: end the thread.
    void join() {
        poke_.set();
        thread_.join();
    }

    // Of what is watched; held while somebody is told.
    static std::mutex& changes() {
        static auto* mutex = new std::mutex;  // for ever: the thread may outlive static objects
        return *mutex;
    }
    static std::shared_ptr<Watcher>& current() {
        static auto* watcher = new std::shared_ptr<Watcher>;
        return *watcher;
    }

  private:
    void control(int operation, int fd, std::uint32_t events) {
        epoll_event event{};
        event.events = events;
        event.data.fd = fd;
        checked(::epoll_ctl(epoll_.get(), operation, fd, &event), "epoll_ctl", "watcher");
    }

    void run() {
        epoll_event ready[64];
        while (true) {
            // Who sets a time and then sees an old plan is seen by the second look.
            planned_ns_ = first_ns();
            planned_ns_ = std::min(planned_ns_.load(), first_ns());
            const auto timeout_ms = std::min<std::int64_t>(remaining_ms(planned_ns_), 1 << 30);
            const int count =
                ::epoll_wait(epoll_.get(), ready, std::size(ready), static_cast<int>(timeout_ms));
            const std::lock_guard lock(changes());
            for (int i = 0; i < count; ++i) {
                tell_gone(ready[i].data.fd);
            }
            const std::int64_t now = now_ns();
            std::erase_if(all_, [&](Watched* one) {
                if (one->wake_ns <= now) {
                    one->wake_ns = never;
                    one->on_time();
                }
                if (one->look_ns > now) {
                    return false;
                }
                one->look_ns = now + look_every_ns;
                return one->is_broken() && tell(*one);
            });
            if (all_.empty()) {
                if (current().get() == this) {  // nobody joins
                    thread_.detach();
                    epoll_.close();
                    current().reset();
                }
                return;
            }
        }
    }

    std::int64_t first_ns() const {
        const std::lock_guard lock(changes());
        std::int64_t first = never;
        for (const Watched* one : all_) {
            first = std::min({first, one->wake_ns.load(), one->look_ns});
        }
        return first;
    }

    void tell_gone(int fd) {
        // The event may be of a descriptor that was closed since, whose number a new one has now.
        if (const auto found = by_fd_.find(fd); found != by_fd_.end() && meeting::is_over(fd)) {
            Watched* one = found->second;
            if (tell(*one)) {
                all_.erase(one);
            }
        }
    }

    // That it is over, once. True: forget it.
    bool tell(Watched& one) {
        by_fd_.erase(one.fd);
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, one.fd, nullptr);
        one.look_ns = never;
        return one.on_gone();
    }

    Fd epoll_;
    Wakeup poke_;
    std::set<Watched*> all_;
    std::map<int, Watched*> by_fd_;
    std::atomic<std::int64_t> planned_ns_ = never;
    std::thread thread_;
};

// Look after it, until `unwatch`; the watcher that does. Throws Error: RESOURCE_EXHAUSTED.
inline Watcher* watch(Watched& one) {
    const std::lock_guard lock(Watcher::changes());
    if (!Watcher::current()) {
        Watcher::current() = std::make_shared<Watcher>();
    }
    Watcher::current()->add(one);
    return Watcher::current().get();
}

// Once this returns, it is told nothing any more. Not for who is just being told.
inline void unwatch(Watched& one) {
    std::shared_ptr<Watcher> last;
    {
        const std::lock_guard lock(Watcher::changes());
        if (!Watcher::current()) {
            return;
        }
        Watcher::current()->remove(one);
        if (!Watcher::current()->is_idle()) {
            return;
        }
        last = std::move(Watcher::current());
        Watcher::current().reset();
    }
    last->join();
}
}  // namespace sysv
}  // namespace ipc_bridge

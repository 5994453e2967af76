// A server's end of ZeroMQ: a ROUTER, and a stream for each client; the traps stand in zeromq.
#pragma once

#include <endian.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include <zmq.hpp>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/zeromq_curve.hpp>
#include <ipc_bridge/transports/zeromq_socket.hpp>

namespace ipc_bridge::zeromq {

// Of a server: for its last words to leave; a stopped client must not hold it up.
inline constexpr int linger_ms = 300;
// A connection that has said nothing for so long is hung up on.
inline constexpr std::int64_t silent_ns = 5'000'000'000;
// After so many a busy server looks for who has gone.
inline constexpr unsigned look_messages = 64;
inline constexpr char first_byte_of_automatic_id = 0;  // zmq_setsockopt(3), ZMQ_ROUTING_ID
inline constexpr std::size_t automatic_id_bytes = 5;   // then a count, big-endian

class Router;

// A server's end of one client: what the ROUTER brought for it waits in `inbox`.
//
// In a shared loop (Hub::next) the one thread does all; else the hub's thread fills the inbox, and
// takes what is written to the ROUTER.
class RouterStream : public Stream {
  public:
    RouterStream(std::shared_ptr<Router> hub, std::string id, int its_fd)
        : Stream(Wait::BLOCK), routing_id(std::move(id)), fd(its_fd), hub_(std::move(hub)) {}
    ~RouterStream() override { close(); }

    const std::string routing_id;
    const int fd;  // of libzmq's socket
    std::deque<zmq::message_t> inbox;
    bool is_queued = false;  // among those with input
    std::atomic<bool> gone = false;
    bool closed = false;
    std::atomic<bool> overrun = false;  // it has sent more than is kept for it
    std::condition_variable changed;
    Unsent unsent;

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override;
    std::ptrdiff_t try_write(Buffers buffers) override;
    bool wait(bool readable, bool writable, std::int64_t deadline_ns) override;
    int fileno() const override;
    void interrupt() override;
    void close() override;

    // Can one of the wanted be done, or has it come to its end?
    bool is_ready(bool readable, bool writable) const {
        const bool ended = gone || interrupted_ || overrun;
        return ended || (readable && !inbox.empty()) || (writable && has_room());
    }

    bool has_room() const { return unsent.has_room(); }

    // What has come; unless it is too much.
    void put(zmq::message_t part, std::size_t bytes_max) {
        inbox_bytes_ += part.size();
        inbox.push_back(std::move(part));
        if (inbox_bytes_ > bytes_max) {
            overrun = true;
            inbox.clear();
            inbox_bytes_ = 0;
            read_ = 0;
        }
    }

  private:
    void check_overrun() {
        if (overrun.exchange(false)) {
            unsent.taken = std::numeric_limits<std::int64_t>::min() / 2;  // what is written says
            throw Error(
                Status::RESOURCE_EXHAUSTED,
                "the client sends more and more, and does not wait for answers"
            );
        }
    }

    std::shared_ptr<Router> hub_;
    std::size_t inbox_bytes_ = 0;
    std::size_t read_ = 0;  // bytes of the inbox's first part
    bool interrupted_ = false;
};

// The ROUTER, under the lock of its address, and the streams of all its clients, who hold on to it:
// a handler's thread may outlive the server. (Python's RouterHub.)
class Router : public std::enable_shared_from_this<Router> {
  public:
    Router(
        std::unique_ptr<zmq::context_t> context,
        zmq::socket_t router,
        zmq::socket_t monitor,
        std::string url,
        std::unique_ptr<KeyChecker> checker,
        bool is_local,
        std::function<void()> cleanup,
        std::size_t inbox_bytes_max
    )
        : context_(std::move(context)),
          router_(std::move(router)),
          monitor_(std::move(monitor)),
          url_(std::move(url)),
          checker_(std::move(checker)),
          is_local_(is_local),
          cleanup_(std::move(cleanup)),
          inbox_bytes_max_(inbox_bytes_max) {
        fds_[0] = {fd_of(router_), POLLIN, 0};
        fds_[1] = {fd_of(monitor_), POLLIN, 0};
        fds_[2] = {wakeup_.fileno(), POLLIN, 0};
        fds_[3] = {checker_ ? fd_of(checker_->socket) : -1, POLLIN, 0};  // poll(2) skips a -1
        look_around();
    }

    std::mutex mutex;  // of inboxes and outbox, once there are threads

    // --- one thread for all ---

    Hub::Input next(std::int64_t deadline_ns) {
        while (true) {
            if (!ready_.empty()) {
                RouterStream* stream = ready_.front();
                ready_.pop_front();
                stream->is_queued = false;
                return {stream, take_new(stream)};
            }
            if (left_ || (stopped_ && !closed_)) {
                return {};
            }
            if (!pump(deadline_ns)) {
                return {};
            }
        }
    }

    // Until one of the wanted can be done; false at the deadline. The loop serves nobody meanwhile:
    // a handler that says that it does not block, and does, holds up all.
    bool wait(RouterStream& stream, bool readable, bool writable, std::int64_t deadline_ns) {
        if (!has_thread_) {
            while (!stream.is_ready(readable, writable)) {
                if (!pump(deadline_ns)) {
                    return false;
                }
            }
            return true;
        }
        std::unique_lock lock(mutex);
        while (!stream.is_ready(readable, writable)) {
            const std::int64_t now = now_ns();
            if (now >= deadline_ns) {
                return false;
            }
            const std::int64_t until_ns =
                writable ? std::min(deadline_ns, now + unsent_look_ns) : deadline_ns;
            if (until_ns == never) {
                stream.changed.wait(lock);
            } else {
                stream.changed.wait_for(lock, std::chrono::nanoseconds(until_ns - now));
            }
        }
        return true;
    }

    // In the loop: it gets another turn once there is some.
    void wait_for_room(RouterStream& stream) {
        if (!has_thread_ && std::find(full_.begin(), full_.end(), &stream) == full_.end()) {
            full_.push_back(&stream);
        }
    }

    // One message for one client: the count of bytes, or end_of_stream if it has gone.
    std::ptrdiff_t send(RouterStream& stream, Buffers buffers) {
        if (has_thread_ && std::this_thread::get_id() != thread_.get_id()) {
            const std::lock_guard lock(mutex);
            outbox_.push_back({stream.routing_id, stream.unsent.hand(buffers)});
            wakeup_.set();
            return static_cast<std::ptrdiff_t>(size_of(buffers));
        }
        if (!address(stream.routing_id)) {
            stream.gone = true;
            return end_of_stream;
        }
        return checked(stream.unsent.send(router_, buffers), "zmq_send", url_);
    }

    // --- a thread for each ---

    std::unique_ptr<Stream> accept() {
        std::unique_lock lock(mutex);
        if (!has_thread_ && !closed_) {
            has_thread_ = true;
            thread_ = std::thread([self = shared_from_this()] { self->run(); });
        }
        arrived_.wait(lock, [this] { return !new_.empty() || stopped_; });
        if (stopped_) {
            return nullptr;
        }
        auto stream = std::move(new_.front());
        new_.pop_front();
        return stream;
    }

    // --- both ---

    int fileno() { return fds_[0].fd; }

    void interrupt() {
        stopped_ = true;
        wakeup_.set();
    }

    void close() {
        std::deque<std::unique_ptr<RouterStream>> unseen;
        {
            const std::lock_guard lock(mutex);
            if (closed_.exchange(true)) {
                return;
            }
            cleanup_();
            unseen.swap(new_);
            if (!has_thread_) {  // which clears it itself: a set that we took would be lost
                wakeup_.clear();
            }
        }
        unseen.clear();
        leave();
    }

    // It stays known, and closed, until its client has gone: what comes meanwhile is no new
    // client's.
    void close_stream(RouterStream& stream) {
        {
            const std::lock_guard lock(mutex);
            if (std::exchange(stream.closed, true)) {
                return;
            }
            stream.inbox.clear();
            std::erase(ready_, &stream);
            std::erase(full_, &stream);
            if (const auto found = clients_.find(stream.routing_id); found != clients_.end()) {
                found->second.stream = nullptr;
            }
        }
        if (!stream.gone) {
            say_end(stream);
        }
        {
            const std::lock_guard lock(mutex);
            --open_;
        }
        leave();
    }

  private:
    // A client that is connected; null: its stream is closed. (In Python the stream says so.)
    struct Client {
        RouterStream* stream;
        int fd;
    };

    struct Message {
        std::string routing_id;
        std::vector<zmq::message_t> parts;
    };

    bool look_for_room() {
        const std::size_t found = std::erase_if(full_, [this](RouterStream* stream) {
            const bool over = stream->gone || stream->has_room();
            if (over) {
                tell(*stream);
            }
            return over;
        });
        return found != 0;
    }

    // Receive a message, or sleep until there may be one; false at the deadline.
    bool pump(std::int64_t deadline_ns) {
        if (++received_ % look_messages == 0) {
            look_around();
            look_for_room();
            return true;  // a stream may be ready now: do not sleep
        }
        const bool quiet = departed_.empty() && full_.empty();
        if (take(quiet && is_far(deadline_ns) ? await : receive)) {
            return true;
        }
        if (!departed_.empty()) {
            bury();
            return true;
        }
        if (look_for_room()) {
            return true;
        }
        if (!sleep(deadline_ns)) {
            return false;
        }
        if (fds_[1].revents != 0 || fds_[3].revents != 0 || silent_until_ns() <= now_ns()) {
            look_around();
        }
        return true;
    }

    // Until there is something to do; false at the deadline.
    bool sleep(std::int64_t deadline_ns) {
        const std::int64_t look_ns = full_.empty() ? silent_until_ns() : now_ns() + unsent_look_ns;
        return sleep_until_ready(fds_, std::min(deadline_ns, look_ns)) || deadline_ns > look_ns;
    }

    // Take one message to its stream; false if there is none.
    bool take(Receive* how) {
        zmq::message_t part;
        if (!how(router_, part)) {
            return false;
        }
        routing_id_.assign(part.data<char>(), part.size());
        bool more = receive(router_, part);  // a message is here whole, or not at all
        auto found = clients_.find(routing_id_);
        if (found == clients_.end()) {
            found = meet(part);
        }
        while (more) {
            more = part.more();
            if (part.size() != 0 && found != clients_.end() && found->second.stream) {
                found->second.stream->put(std::move(part), inbox_bytes_max_);
                tell(*found->second.stream);
            }
            if (more) {
                receive(router_, part);
            }
        }
        return true;
    }

    using Found = std::unordered_map<std::string, Client>::iterator;

    // A new client; none if it may not stay.
    Found meet(zmq::message_t& part) {
        const int fd = ::zmq_msg_get(part.handle(), ZMQ_SRCFD);
        const char* address = ::zmq_msg_gets(part.handle(), "Peer-Address");
        if (fd < 0 || !address) {  // it has gone already, so libzmq could not ask who it was
            return clients_.end();
        }
        look_around();  // whoever had this fd before has gone: it is here, behind that
        if (const auto holder = by_fd_.find(fd);
            holder != by_fd_.end() && is_later(holder->second, routing_id_)) {
            return clients_.end();  // left over from one who had this fd before
        }
        end(fd);
        has_spoken(fd);
        by_fd_[fd] = routing_id_;
        const auto found = clients_.insert_or_assign(routing_id_, Client{nullptr, fd}).first;
        // Ids that a client gave itself may come again, on another connection.
        if (!is_automatic(routing_id_) || !may_stay(address) || closed_) {
            if (this->address(routing_id_)) {
                ::zmq_send(router_.handle(), nullptr, 0, ZMQ_DONTWAIT);
            }
            return found;
        }
        auto stream = std::make_unique<RouterStream>(shared_from_this(), routing_id_, fd);
        found->second.stream = stream.get();
        ++open_;
        new_.push_back(std::move(stream));
        arrived_.notify_one();
        return found;
    }

    static bool is_automatic(const std::string& id) {
        return id.size() == automatic_id_bytes && id[0] == first_byte_of_automatic_id;
    }

    // Was a client's id made after another's? libzmq counts them (and may pass 2^32).
    static bool is_later(const std::string& id, const std::string& other) {
        if (!is_automatic(id) || !is_automatic(other)) {
            return false;
        }
        return static_cast<std::int32_t>(count_of(id) - count_of(other)) > 0;
    }

    static std::uint32_t count_of(const std::string& id) {
        std::uint32_t count = 0;
        std::memcpy(&count, id.data() + 1, sizeof(count));
        return be32toh(count);
    }

    // On ipc the address is HOST:UID:GID:PID, from SO_PEERCRED.
    bool may_stay(const std::string& address) const {
        if (!is_local_) {
            return true;
        }
        const auto pid = address.rfind(':');
        const auto gid = pid == 0 ? std::string::npos : address.rfind(':', pid - 1);
        const auto uid = gid == 0 ? std::string::npos : address.rfind(':', gid - 1);
        if (pid == std::string::npos || gid == std::string::npos || uid == std::string::npos) {
            return false;
        }
        const std::string text = address.substr(uid + 1, gid - uid - 1);
        return text == std::to_string(::geteuid()) || text == "0";
    }

    // It has input, or has come to its end.
    void tell(RouterStream& stream) {
        if (has_thread_) {
            stream.changed.notify_one();
        } else if (!stream.is_queued) {
            stream.is_queued = true;
            ready_.push_back(&stream);
        }
    }

    // Who has gone, and who asks to come?
    void look_around() {
        fds_[1].revents = 0;
        if (checker_) {
            checker_->answer();
        }
        for (const Event& event : events_of(monitor_)) {
            if (event.number == ZMQ_EVENT_DISCONNECTED) {
                departed_.push_back(event.value);
                has_spoken(event.value);
            } else if (event.number == ZMQ_EVENT_ACCEPTED) {
                if (std::erase(departed_, event.value) != 0) {
                    end(event.value);
                }
                silent_.push_back({event.value, now_ns() + silent_ns});
            }
        }
        while (silent_until_ns() <= now_ns()) {
            // libzmq keeps the connection for ever: a ROUTER hears of it by its first message.
            ::shutdown(silent_.front().fd, SHUT_RDWR);
            silent_.pop_front();
        }
    }

    std::int64_t silent_until_ns() const { return silent_.empty() ? never : silent_[0].until_ns; }

    // Or has gone: nothing more is expected of it.
    void has_spoken(int fd) {
        std::erase_if(silent_, [fd](const Silent& one) { return one.fd == fd; });
    }

    // Nothing more comes of those whose connection has ended.
    void bury() {
        for (const int fd : std::exchange(departed_, {})) {
            end(fd);
        }
    }

    // The client that had a descriptor has gone.
    void end(int fd) {
        const auto id = by_fd_.find(fd);
        if (id == by_fd_.end()) {
            return;
        }
        if (const auto found = clients_.find(id->second); found != clients_.end()) {
            if (RouterStream* stream = found->second.stream) {
                stream->gone = true;
                tell(*stream);
            }
            clients_.erase(found);
        }
        by_fd_.erase(id);
    }

    // Begin a message for a client; false if it has gone.
    bool address(const std::string& routing_id) {
        const int sent = retrying([&] {
            return ::zmq_send(
                router_.handle(), routing_id.data(), routing_id.size(), ZMQ_SNDMORE | ZMQ_DONTWAIT
            );
        });
        if (sent < 0 && errno != EHOSTUNREACH) {
            throw SystemError("zmq_send", errno, url_);
        }
        return sent >= 0;
    }

    void say_end(RouterStream& stream) {
        const std::span<const std::byte> nothing;
        send(stream, {&nothing, 1});
    }

    std::unique_ptr<RouterStream> take_new(RouterStream* stream) {
        for (auto it = new_.begin(); it != new_.end(); ++it) {
            if (it->get() == stream) {
                auto taken = std::move(*it);
                new_.erase(it);
                return taken;
            }
        }
        return nullptr;
    }

    // The hub's thread: the only one that touches the ROUTER.
    void run() {
        while (true) {
            const bool more = exchange();
            {
                const std::lock_guard lock(mutex);
                if (closed_ && open_ == 0) {
                    send_outbox();
                    return;
                }
                if (!more) {
                    bury();  // whom we knew of before we had read all
                }
                look_around();
                if (stopped_) {
                    arrived_.notify_all();
                }
                if (more || !departed_.empty()) {
                    continue;
                }
            }
            sleep(never);
        }
    }

    // Send and receive for a while; false: there is no more to receive. The lock is given away at
    // each message: else a client that sends and sends would keep all others from it.
    bool exchange() {
        for (unsigned i = 0; i < look_messages; ++i) {
            const std::lock_guard lock(mutex);
            send_outbox();
            if (!take(receive)) {
                return false;
            }
        }
        return true;
    }

    void send_outbox() {
        wakeup_.clear();
        while (!outbox_.empty()) {
            Message message = std::move(outbox_.front());
            outbox_.pop_front();
            if (!address(message.routing_id)) {
                continue;
            }
            for (zmq::message_t& part : message.parts) {
                const bool last = &part == &message.parts.back();
                ::zmq_msg_send(
                    part.handle(), router_.handle(), ZMQ_DONTWAIT | (last ? 0 : ZMQ_SNDMORE)
                );
            }
        }
    }

    // Whoever is the last to go takes the socket with him, and waits for its last words to leave.
    void leave() {
        {
            const std::lock_guard lock(mutex);
            if (!closed_ || open_ != 0 || std::exchange(left_, true)) {
                return;
            }
        }
        if (has_thread_) {
            wakeup_.set();
            thread_.join();
        }
        checker_.reset();
        close_monitor(router_, monitor_);
        router_.set(zmq::sockopt::linger, linger_ms);
        router_.close();
        context_.reset();
    }

    std::unique_ptr<zmq::context_t> context_;
    zmq::socket_t router_;
    zmq::socket_t monitor_;
    std::string url_;
    std::unique_ptr<KeyChecker> checker_;
    bool is_local_;
    std::function<void()> cleanup_;
    std::size_t inbox_bytes_max_;
    Wakeup wakeup_;
    pollfd fds_[4] = {};
    std::string routing_id_;                           // of the message that is being taken
    std::unordered_map<std::string, Client> clients_;  // by routing id, until they have gone
    std::unordered_map<int, std::string> by_fd_;
    struct Silent {
        int fd;
        std::int64_t until_ns;
    };
    std::deque<Silent> silent_;        // who has said nothing, and until when he may
    std::vector<int> departed_;        // fds that were closed, before we have read all they sent
    std::deque<RouterStream*> ready_;  // have input, in the loop
    std::vector<RouterStream*> full_;  // have output, and wait for room, in the loop
    std::deque<std::unique_ptr<RouterStream>> new_;
    std::size_t open_ = 0;  // streams that are not closed
    unsigned received_ = 0;
    std::atomic<bool> stopped_ = false;
    std::atomic<bool> closed_ = false;
    bool left_ = false;
    std::atomic<bool> has_thread_ = false;
    std::thread thread_;
    std::deque<Message> outbox_;  // of threads
    std::condition_variable arrived_;
};

inline std::ptrdiff_t RouterStream::try_read(std::span<std::byte> buffer) {
    const std::lock_guard lock(hub_->mutex);
    check_overrun();
    if (inbox.empty()) {
        return gone || interrupted_ ? end_of_stream : would_block;
    }
    const std::size_t size = copy_out(inbox.front(), read_, buffer);
    read_ += size;
    inbox_bytes_ -= size;
    if (read_ == inbox.front().size()) {
        inbox.pop_front();
        read_ = 0;
    }
    return static_cast<std::ptrdiff_t>(size);
}

inline std::ptrdiff_t RouterStream::try_write(Buffers buffers) {
    if (gone) {
        return end_of_stream;
    }
    check_overrun();
    if (!has_room()) {
        hub_->wait_for_room(*this);
        return would_block;
    }
    const std::ptrdiff_t count = hub_->send(*this, buffers);
    unsent.taken += std::max<std::ptrdiff_t>(0, count);
    return count;
}

inline bool RouterStream::wait(bool readable, bool writable, std::int64_t deadline_ns) {
    return (writable && has_room()) || hub_->wait(*this, readable, writable, deadline_ns);
}

inline int RouterStream::fileno() const {
    return hub_->fileno();
}

inline void RouterStream::interrupt() {
    const std::lock_guard lock(hub_->mutex);
    interrupted_ = true;
    changed.notify_one();
}

inline void RouterStream::close() {
    hub_->close_stream(*this);
}

// The server's face of a Router.
class RouterHub : public Hub {
  public:
    RouterHub(std::shared_ptr<Router> router, std::string url_) : router_(std::move(router)) {
        url = std::move(url_);
    }
    ~RouterHub() override { close(); }

    Input next(std::int64_t deadline_ns) override { return router_->next(deadline_ns); }
    std::unique_ptr<Stream> accept() override { return router_->accept(); }
    void interrupt() override { router_->interrupt(); }
    void close() override { router_->close(); }

  private:
    std::shared_ptr<Router> router_;
};

}  // namespace ipc_bridge::zeromq

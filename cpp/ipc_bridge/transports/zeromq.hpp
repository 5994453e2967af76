// ZeroMQ: `zmq+ipc` (one machine) and `zmq+tcp` (other hosts too), DEALER to ROUTER.
//
// Pick it when ZeroMQ is what your programs speak already, or for its encryption (CURVE). It costs
// two more thread switches each way than a plain socket, as a thread of libzmq's own moves the
// bytes.
//
// Meeting: a ROUTER binds, a DEALER connects. After the routing id, the parts of a message, joined,
// are whole frames; small ones share a part, a large payload is one. An empty message is the end of
// the server's output: a ROUTER cannot hang up on one client.
//
// The traps, all of one kind: ZeroMQ hides what happens to a connection.
// - A DEALER connects again by itself, and hands an old call to a new server. RECONNECT_IVL=-1 or
//   IMMEDIATE=1 prevent that, but drop what has come and is not read yet when the connection ends:
//   so the interval is 24 days here, and the socket's monitor tells of the end.
// - A ROUTER drops what it cannot deliver, unless ROUTER_MANDATORY is set, or above a high-water
//   mark: so there is none, and the session's credit is the bound. POLLOUT of a ROUTER is always
//   true.
// - Whose connection has ended? The monitor names a descriptor, and so does a client's first
//   message.
// - ZMQ_FD says that something may have changed, once: whoever sleeps on it looks at EVENTS before,
//   after his last call to the socket.
// - A second bind takes an ipc path over without a word: hence the lock, and a socket bound by us.
//
// Copy with it: errors, system, unix_address (and frame, session, client, server for the calls on
// top). Run: ipc-bridge-peer serve zmq+ipc:///tmp/demo.sock
#pragma once

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
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
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include <zmq.hpp>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/unix_address.hpp>

namespace ipc_bridge {
namespace zeromq {

// 24 days: never; see above.
inline constexpr int reconnect_ivl_ms = std::numeric_limits<int>::max();
// Who says no ZMTP greeting in this time is a stranger, and hung up on.
inline constexpr int handshake_ivl_ms = 5'000;
// Of a server: for its last words to leave; a stopped client must not hold it up.
inline constexpr int linger_ms = 300;
// Of MAXMSGSIZE, above a payload: small frames that share a part.
inline constexpr std::int64_t part_bytes_more = 1 << 20;
// Of a context; a client takes three, and the default is 1023.
inline constexpr int sockets_max = 65'535;
// After so many a busy server looks for who has gone.
inline constexpr unsigned look_messages = 64;

// Where libzmq asks whether a key may come (RFC 27).
inline constexpr char zap_address[] = "inproc://zeromq.zap.01";
// Z85 of 32 bytes (RFC 32).
inline constexpr std::size_t key_characters = 40;
// Of a file of keys: more clients than a server takes.
inline constexpr std::size_t keys_bytes_max = 1U << 20;

inline constexpr char first_byte_of_automatic_id = 0;  // zmq_setsockopt(3), ZMQ_ROUTING_ID

using Buffers = std::span<const std::span<const std::byte>>;

// A file of CURVE keys (RFC 26), as `ipc-bridge curve-keys DIR` makes them for either end.
//
// A line is a word and a key: `secret` and `public` are one's own; at a client `server` is the
// server's public key, at a server each `client` is the public key of one that may come.
class CurveKeys {
  public:
    // Throws Error: NOT_FOUND, PERMISSION_DENIED unless it is ours alone, INVALID_ARGUMENT.
    explicit CurveKeys(std::string path_) : path(std::move(path_)) {
        std::istringstream lines(read(path));
        std::vector<std::string> secrets;
        std::vector<std::string> publics;
        std::vector<std::string> servers;
        for (std::string line; std::getline(lines, line);) {
            std::istringstream words(line);
            std::string word;
            std::string key;
            std::string more;
            words >> word >> key >> more;
            if (word.empty() || word.starts_with("#")) {
                continue;
            }
            auto* list = word == "secret"   ? &secrets
                         : word == "public" ? &publics
                         : word == "server" ? &servers
                         : word == "client" ? &clients
                                            : nullptr;
            if (!list || key.size() != key_characters || !more.empty()) {
                refuse("not a file of CURVE keys");
            }
            list->push_back(key);
        }
        if (secrets.size() != 1 || publics.size() != 1 || servers.size() > 1) {
            refuse("not a file of CURVE keys");
        }
        secret_ = secrets[0];
        public_ = publics[0];
        server_ = servers.empty() ? "" : servers[0];
    }

    const std::string path;
    std::vector<std::string> clients;

    // Throws Error: INVALID_ARGUMENT if they are a server's.
    void prepare_dealer(zmq::socket_t& dealer) const {
        if (server_.empty()) {
            refuse("a client's keys name its server");
        }
        dealer.set(zmq::sockopt::curve_secretkey, secret_);
        dealer.set(zmq::sockopt::curve_publickey, public_);
        dealer.set(zmq::sockopt::curve_serverkey, server_);
    }

    // Throws Error: INVALID_ARGUMENT if they are a client's.
    void prepare_router(zmq::socket_t& router) const {
        if (clients.empty()) {
            refuse("a server's keys name its clients");
        }
        router.set(zmq::sockopt::curve_server, true);
        router.set(zmq::sockopt::curve_secretkey, secret_);
        router.set(zmq::sockopt::zap_domain, "ipc-bridge");  // else nobody is asked
    }

  private:
    [[noreturn]] void refuse(const std::string& what) const {
        throw Error(Status::INVALID_ARGUMENT, what, path);
    }

    static std::string read(const std::string& path) {
        const Fd fd(checked(
            retrying([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC); }), "open", path
        ));
        struct stat info {};
        checked(::fstat(fd.get(), &info), "fstat", path);
        if (info.st_uid != ::geteuid() || (info.st_mode & 077) != 0) {
            throw Error(
                Status::PERMISSION_DENIED, "the file of keys is not ours alone (mode 0600)", path
            );
        }
        std::string text(keys_bytes_max, '\0');
        const ssize_t size = checked(
            retrying([&] { return ::read(fd.get(), text.data(), text.size()); }), "read", path
        );
        text.resize(static_cast<std::size_t>(size));
        return text;
    }

    std::string secret_;
    std::string public_;
    std::string server_;
};

// The context that all clients of a process share: its threads live as long as one of them.
class Clients {
  public:
    static Clients& all() {
        static Clients clients;
        return clients;
    }

    // A socket does not survive them.
    std::atomic<unsigned> forks = 0;

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
        // The parent's: its threads are not here, and its descriptors are shared. (The mutex may
        // be held by a thread that is not here either.)
        [[maybe_unused]] auto* leaked = context_.release();
        new (&mutex_) std::mutex;
        users_ = 0;
        ++forks;
    }

    std::mutex mutex_;
    std::unique_ptr<zmq::context_t> context_;
    std::size_t users_ = 0;
};

// Receive what is there; false: nothing.
inline bool receive(zmq::socket_t& socket, zmq::message_t& part) {
    return retrying([&] { return ::zmq_msg_recv(part.handle(), socket.handle(), ZMQ_DONTWAIT); }) >=
           0;
}

inline bool is_readable(zmq::socket_t& socket) {
    return (socket.get(zmq::sockopt::events) & ZMQ_POLLIN) != 0;
}

// Send one message, of which `buffers` are the parts, behind what was sent with SNDMORE: the count
// of bytes, or -1 and errno.
inline std::ptrdiff_t send(zmq::socket_t& socket, Buffers buffers) {
    std::ptrdiff_t size = 0;
    for (std::size_t i = 0; i < buffers.size(); ++i) {
        const int flags = i + 1 < buffers.size() ? ZMQ_DONTWAIT | ZMQ_SNDMORE : ZMQ_DONTWAIT;
        const auto& part = buffers[i];
        if (retrying([&] { return ::zmq_send(socket.handle(), part.data(), part.size(), flags); }) <
            0) {
            return -1;
        }
        size += static_cast<std::ptrdiff_t>(part.size());
    }
    return size;
}

// What happens to a socket's connections.
struct Event {
    int number = 0;
    int value = 0;  // a descriptor, where there is one
};

// The socket that tells of a socket's events.
inline zmq::socket_t make_monitor(zmq::context_t& context, zmq::socket_t& socket, int events) {
    const std::string name =
        "inproc://monitor-" + std::to_string(reinterpret_cast<std::uintptr_t>(socket.handle()));
    if (::zmq_socket_monitor(socket.handle(), name.c_str(), events) < 0) {
        throw zmq::error_t();
    }
    zmq::socket_t monitor(context, zmq::socket_type::pair);
    monitor.connect(name);
    return monitor;
}

inline void close_monitor(zmq::socket_t& socket, zmq::socket_t& monitor) {
    ::zmq_socket_monitor(socket.handle(), nullptr, 0);
    monitor.set(zmq::sockopt::linger, 0);
    monitor.close();
}

// What the monitor has to tell: events, each with its value.
inline std::vector<Event> events_of(zmq::socket_t& monitor) {
    std::vector<Event> found;
    zmq::message_t part;
    while (receive(monitor, part)) {
        if (part.size() == 6) {  // u16 event, u32 value; the part behind it is the endpoint
            std::uint16_t number = 0;
            std::int32_t value = 0;
            std::memcpy(&number, part.data(), sizeof(number));
            std::memcpy(&value, part.data<char>() + sizeof(number), sizeof(value));
            found.push_back({number, value});
        }
        while (part.more() && receive(monitor, part)) {
        }
    }
    return found;
}

// Answers libzmq, which asks over ZAP (RFC 27) whether a client with some key may come.
class KeyChecker {
  public:
    KeyChecker(zmq::context_t& context, const CurveKeys& keys)
        : socket(context, zmq::socket_type::rep) {
        for (const std::string& key : keys.clients) {
            std::string raw(key_characters / 5 * 4, '\0');
            ::zmq_z85_decode(reinterpret_cast<std::uint8_t*>(raw.data()), key.c_str());
            keys_.push_back(raw);
        }
        socket.set(zmq::sockopt::linger, 0);
        socket.bind(zap_address);
    }

    zmq::socket_t socket;

    // All that is asked now.
    void answer() {
        zmq::message_t part;
        while (receive(socket, part)) {
            std::vector<std::string> asked{part.to_string()};
            while (part.more() && receive(socket, part)) {
                asked.push_back(part.to_string());
            }
            // version, request, domain, address, routing id, mechanism, credentials
            const bool known = asked.size() == 7 && asked[5] == "CURVE" &&
                               std::find(keys_.begin(), keys_.end(), asked[6]) != keys_.end();
            const std::string request = asked.size() > 1 ? asked[1] : "";
            const std::string parts[] = {
                "1.0", request, known ? "200" : "400", known ? "OK" : "unknown key", "", ""};
            std::vector<std::span<const std::byte>> buffers;
            for (const std::string& text : parts) {
                buffers.push_back(std::as_bytes(std::span(text)));
            }
            send(socket, buffers);
        }
    }

  private:
    std::vector<std::string> keys_;
};

inline int fd_of(zmq::socket_t& socket) {
    return socket.get(zmq::sockopt::fd);
}

inline std::size_t copy_out(
    const zmq::message_t& part, std::size_t from, std::span<std::byte> buffer
) {
    const std::size_t size = std::min(buffer.size(), part.size() - from);
    std::memcpy(buffer.data(), part.data<std::byte>() + from, size);
    return size;
}

// A client's end. Messages come whole, and are read bit by bit.
class DealerStream : public Stream {
  public:
    DealerStream(zmq::socket_t dealer, zmq::socket_t monitor, std::string url)
        : Stream(Wait::BLOCK),
          dealer_(std::move(dealer)),
          monitor_(std::move(monitor)),
          url_(std::move(url)),
          forks_(Clients::all().forks) {
        fds_[0] = {fd_of(dealer_), POLLIN, 0};
        fds_[1] = {fd_of(monitor_), POLLIN, 0};
    }
    ~DealerStream() override { close(); }

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override {
        if (read_ == part_.size()) {
            const std::ptrdiff_t count = take();
            if (count <= 0) {
                return count;
            }
        }
        const std::size_t size = copy_out(part_, read_, buffer);
        read_ += size;
        return static_cast<std::ptrdiff_t>(size);
    }

    std::ptrdiff_t try_write(Buffers buffers) override {
        check_fork();
        if (gone_ || ended_) {
            return end_of_stream;
        }
        return checked(send(dealer_, buffers), "zmq_send", url_);
    }

    bool wait(bool /*readable*/, bool writable, std::int64_t deadline_ns) override {
        return writable || arm() || sleep(deadline_ns);
    }

    bool arm() override {
        check_fork();
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
        if (forks_ != Clients::all().forks) {  // the parent's: to touch it would disturb him
            [[maybe_unused]] auto* leaked = new std::pair(std::move(dealer_), std::move(monitor_));
            return;
        }
        close_monitor(dealer_, monitor_);
        Clients::all().close(std::move(dealer_));
    }

  protected:
    std::ptrdiff_t sleep_and_read(std::span<std::byte> buffer, std::int64_t deadline_ns) override {
        while (true) {
            const std::ptrdiff_t count = try_read(buffer);
            if (count != would_block) {
                return count;
            }
            if (!sleep(deadline_ns)) {
                return would_block;
            }
        }
    }

  private:
    // Take the next part that is not empty into `part_`: 1, would_block or end_of_stream.
    std::ptrdiff_t take() {
        check_fork();
        read_ = 0;  // of `part_`, which zmq_msg_recv(3) empties also when there is nothing
        while (!ended_) {
            if (!receive(dealer_, part_)) {
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
        if (!gone_ && fds_[1].revents != 0) {
            look_at_monitor();
            if (gone_) {  // what came before that is here now
                return take();
            }
        }
        ended_ = gone_;
        return gone_ ? end_of_stream : would_block;
    }

    bool sleep(std::int64_t deadline_ns) { return sleep_until_ready(fds_, deadline_ns); }

    // (Only this call touches the monitor's socket: its descriptor tells the truth.)
    void look_at_monitor() {
        fds_[1].revents = 0;
        for (const Event& event : events_of(monitor_)) {
            gone_ = gone_ || event.number == ZMQ_EVENT_DISCONNECTED;
        }
    }

    void check_fork() const {
        if (forks_ != Clients::all().forks) {
            throw Error(
                Status::FAILED_PRECONDITION,
                "a ZeroMQ connection does not survive a fork; connect in the child",
                url_
            );
        }
    }

    zmq::socket_t dealer_;
    zmq::socket_t monitor_;
    std::string url_;
    unsigned forks_;
    zmq::message_t part_;   // that is being read
    std::size_t read_ = 0;  // bytes of it that were
    bool more_ = false;     // parts of its message
    bool gone_ = false;     // the server: no more will come than what is here
    bool ended_ = false;
    std::atomic<bool> interrupted_ = false;
    pollfd fds_[2] = {};
    mutable Fd epoll_;
};

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
    std::condition_variable changed;

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override;
    std::ptrdiff_t try_write(Buffers buffers) override;
    bool wait(bool readable, bool writable, std::int64_t deadline_ns) override;
    int fileno() const override;
    void interrupt() override;
    void close() override;

    // May be read, even if it is the end.
    bool is_ready() const { return !inbox.empty() || gone || interrupted_; }

  private:
    std::shared_ptr<Router> hub_;
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
        std::function<void()> cleanup
    )
        : context_(std::move(context)),
          router_(std::move(router)),
          monitor_(std::move(monitor)),
          url_(std::move(url)),
          checker_(std::move(checker)),
          is_local_(is_local),
          cleanup_(std::move(cleanup)) {
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

    // Until a stream may be read; false at the deadline. The loop serves nobody meanwhile: a
    // handler that says that it does not block, and does, holds up all.
    bool wait(RouterStream& stream, std::int64_t deadline_ns) {
        if (!has_thread_) {
            while (!stream.is_ready()) {
                if (!pump(deadline_ns)) {
                    return false;
                }
            }
            return true;
        }
        std::unique_lock lock(mutex);
        while (!stream.is_ready()) {
            if (deadline_ns == never) {
                stream.changed.wait(lock);
                continue;
            }
            const std::int64_t left_ns = deadline_ns - now_ns();
            if (left_ns <= 0) {
                return false;
            }
            stream.changed.wait_for(lock, std::chrono::nanoseconds(left_ns));
        }
        return true;
    }

    // One message for one client: the count of bytes, or end_of_stream if it has gone.
    std::ptrdiff_t send(RouterStream& stream, Buffers buffers) {
        if (has_thread_ && std::this_thread::get_id() != thread_.get_id()) {
            Message message{stream.routing_id, {}};
            std::ptrdiff_t size = 0;
            for (const auto& part : buffers) {
                message.parts.emplace_back(part.data(), part.size());
                size += static_cast<std::ptrdiff_t>(part.size());
            }
            const std::lock_guard lock(mutex);
            outbox_.push_back(std::move(message));
            wakeup_.set();
            return size;
        }
        if (!address(stream.routing_id)) {
            stream.gone = true;
            return end_of_stream;
        }
        return checked(zeromq::send(router_, buffers), "zmq_send", url_);
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
        }
        unseen.clear();
        wakeup_.clear();
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

    // Receive a message, or sleep until there may be one; false at the deadline.
    bool pump(std::int64_t deadline_ns) {
        if (++received_ % look_messages == 0) {
            look_around();
        }
        if (take()) {
            return true;
        }
        if (!departed_.empty()) {
            bury();
            return true;
        }
        const bool woken = sleep_until_ready(fds_, deadline_ns);
        if (fds_[1].revents != 0 || fds_[3].revents != 0) {
            look_around();
        }
        return woken;
    }

    // Take one message to its stream; false if there is none.
    bool take() {
        zmq::message_t part;
        if (!receive(router_, part)) {
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
                found->second.stream->inbox.push_back(std::move(part));
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
        end(fd);
        auto stream = std::make_unique<RouterStream>(shared_from_this(), routing_id_, fd);
        by_fd_[fd] = routing_id_;
        const auto found = clients_.insert_or_assign(routing_id_, Client{nullptr, fd}).first;
        // Ids that a client gave itself may come again, on another connection.
        if (routing_id_[0] != first_byte_of_automatic_id || !may_stay(address) || closed_) {
            stream->closed = true;
            say_end(*stream);
            return found;
        }
        found->second.stream = stream.get();
        ++open_;
        new_.push_back(std::move(stream));
        arrived_.notify_one();
        return found;
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
            } else if (event.number == ZMQ_EVENT_ACCEPTED) {
                if (std::erase(departed_, event.value) != 0) {
                    end(event.value);
                }
            }
        }
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
            {
                const std::lock_guard lock(mutex);
                send_outbox();
                if (closed_ && open_ == 0) {
                    return;
                }
                while (take()) {
                    send_outbox();
                }
                look_around();
                if (!departed_.empty()) {
                    bury();
                    continue;
                }
                if (stopped_) {
                    arrived_.notify_all();
                }
            }
            sleep_until_ready(fds_, never);
        }
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
    Wakeup wakeup_;
    pollfd fds_[4] = {};
    std::string routing_id_;                           // of the message that is being taken
    std::unordered_map<std::string, Client> clients_;  // by routing id, until they have gone
    std::unordered_map<int, std::string> by_fd_;
    std::vector<int> departed_;        // fds that were closed, before we have read all they sent
    std::deque<RouterStream*> ready_;  // have input, in the loop
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
    if (inbox.empty()) {
        return gone || interrupted_ ? end_of_stream : would_block;
    }
    const std::size_t size = copy_out(inbox.front(), read_, buffer);
    read_ += size;
    if (read_ == inbox.front().size()) {
        inbox.pop_front();
        read_ = 0;
    }
    return static_cast<std::ptrdiff_t>(size);
}

inline std::ptrdiff_t RouterStream::try_write(Buffers buffers) {
    return gone ? end_of_stream : hub_->send(*this, buffers);
}

inline bool RouterStream::wait(bool /*readable*/, bool writable, std::int64_t deadline_ns) {
    return writable || hub_->wait(*this, deadline_ns);
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

}  // namespace zeromq

// What both schemes share: the sockets' options, and reaching a server.
class Zmq : public Transport {
  public:
    std::unique_ptr<Stream> connect(std::int64_t deadline_ns) override {
        std::optional<zeromq::CurveKeys> keys;
        if (has_keys()) {
            keys.emplace(curve_);
        }
        std::int64_t pause_ns = connect_retry_ns[0];
        while (true) {
            if (auto stream = attempt(keys, deadline_ns)) {
                return stream;
            }
            check_refusal();
            const std::int64_t left_ns = deadline_ns - now_ns();
            if (left_ns <= 0) {
                throw Error(Status::UNAVAILABLE, "no server", url);
            }
            sleep_ns(std::min(pause_ns, left_ns));
            pause_ns = std::min(2 * pause_ns, connect_retry_ns[1]);
        }
    }

  protected:
    // `curve` is a file of keys, read when they are needed, or "". Throws Error: INVALID_ARGUMENT
    // for a wait that cannot be.
    Zmq(std::string url_, std::string address, Wait wait, std::string curve)
        : address_(std::move(address)), curve_(std::move(curve)) {
        if (wait == Wait::SPIN) {
            throw Error(
                Status::INVALID_ARGUMENT,
                "ZeroMQ has no spin: its own threads would starve; wait is block",
                url_
            );
        }
        url = std::move(url_);
    }

    bool has_keys() const { return !curve_.empty(); }

    // May we talk to whom we have reached? False: try again.
    virtual bool check_server(int fd) const = 0;

    // Throw an Error if another attempt is in vain.
    virtual void check_refusal() const {}

    // With the port filled in.
    virtual std::string url_of(zmq::socket_t& /*router*/) const { return url; }

    // Give a listening socket to a ROUTER; -1: it binds one itself.
    std::unique_ptr<Listener> listen_on(int fd, bool is_local, std::function<void()> cleanup) {
        auto context = std::make_unique<zmq::context_t>();
        context->set(zmq::ctxopt::max_sockets, zeromq::sockets_max);
        zmq::socket_t router(*context, zmq::socket_type::router);
        zmq::socket_t monitor;
        std::unique_ptr<zeromq::KeyChecker> checker;
        try {
            prepare(router);
            if (has_keys()) {
                const zeromq::CurveKeys keys(curve_);
                keys.prepare_router(router);
                checker = std::make_unique<zeromq::KeyChecker>(*context, keys);
            }
            router.set(zmq::sockopt::linger, 0);
            router.set(zmq::sockopt::router_mandatory, true);  // else it drops the undeliverable
            if (fd >= 0) {
                set(router, ZMQ_USE_FD, fd);
            }
            constexpr int events = ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_DISCONNECTED;
            monitor = zeromq::make_monitor(*context, router, events);
            router.bind(address_);
        } catch (const zmq::error_t& error) {
            throw SystemError("bind", error.num(), url);
        }
        const std::string bound = url_of(router);
        return std::make_unique<zeromq::RouterHub>(
            std::make_shared<zeromq::Router>(
                std::move(context),
                std::move(router),
                std::move(monitor),
                bound,
                std::move(checker),
                is_local,
                std::move(cleanup)
            ),
            bound
        );
    }

  private:
    // Connect once; null if no server answers (yet).
    std::unique_ptr<Stream> attempt(
        const std::optional<zeromq::CurveKeys>& keys, std::int64_t deadline_ns
    ) {
        zmq::socket_t dealer = zeromq::Clients::all().open();
        zmq::socket_t monitor;
        const auto undo = [&] {
            if (monitor) {
                zeromq::close_monitor(dealer, monitor);
            }
            zeromq::Clients::all().close(std::move(dealer));
        };
        try {
            prepare(dealer);
            dealer.set(zmq::sockopt::reconnect_ivl, zeromq::reconnect_ivl_ms);
            if (keys) {
                keys->prepare_dealer(dealer);
            }
            monitor = zeromq::make_monitor(zeromq::Clients::all().context(), dealer, ZMQ_EVENT_ALL);
            dealer.connect(address_);
            if (shake_hands(monitor, deadline_ns)) {
                return std::make_unique<zeromq::DealerStream>(
                    std::move(dealer), std::move(monitor), url
                );
            }
        } catch (const zmq::error_t& error) {
            undo();
            throw SystemError("connect", error.num(), url);
        } catch (...) {
            undo();
            throw;
        }
        undo();
        return nullptr;
    }

    bool shake_hands(zmq::socket_t& monitor, std::int64_t deadline_ns) const {
        pollfd fd{zeromq::fd_of(monitor), POLLIN, 0};
        do {
            for (const zeromq::Event& event : zeromq::events_of(monitor)) {
                switch (event.number) {
                    case ZMQ_EVENT_CONNECTED:
                        if (!check_server(event.value)) {
                            return false;
                        }
                        break;
                    case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
                        return true;
                    case ZMQ_EVENT_HANDSHAKE_FAILED_AUTH:
                    case ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL:
                        throw Error(
                            Status::UNAUTHENTICATED,
                            "no handshake: another protocol, or CURVE keys that one end does not "
                            "know",
                            url
                        );
                    case ZMQ_EVENT_CLOSED:
                    case ZMQ_EVENT_DISCONNECTED:
                        return false;
                    default:
                        break;
                }
            }
        } while (sleep_until_ready({&fd, 1}, deadline_ns));
        return false;
    }

    // Set what both ends need (zmq_setsockopt(3)).
    void prepare(zmq::socket_t& socket) const {
        socket.set(zmq::sockopt::sndhwm, 0);  // a ROUTER would drop, a DEALER block; see above
        socket.set(zmq::sockopt::rcvhwm, 0);
        socket.set(zmq::sockopt::handshake_ivl, zeromq::handshake_ivl_ms);
        // What a peer may make libzmq hold before a frame's size is looked at.
        socket.set(
            zmq::sockopt::maxmsgsize, std::int64_t{payload_bytes_max} + zeromq::part_bytes_more
        );
        socket.set(zmq::sockopt::ipv6, true);
    }

    static void set(zmq::socket_t& socket, int option, int value) {
        if (::zmq_setsockopt(socket.handle(), option, &value, sizeof(value)) < 0) {
            throw zmq::error_t();
        }
    }

    std::string address_;
    std::string curve_;
};

// `zmq+ipc:///path`: a socket file, mode 0600, and `path.lock` while a server lives.
class ZmqIpc : public Zmq {
  public:
    // Throws Error: INVALID_ARGUMENT for a path that is empty or too long; as Zmq.
    explicit ZmqIpc(const std::string& path, Wait wait = Wait::BLOCK, const std::string& curve = "")
        : Zmq("zmq+ipc://" + path, "ipc://" + path, wait, curve), unix_(path, url, SOCK_STREAM) {}

    std::unique_ptr<Listener> listen() override {
        auto door = std::make_shared<UnixDoor>(unix_.listen());
        try {
            return listen_on(door->fd.release(), true, [door] { door->close(); });
        } catch (...) {
            door->close();
            throw;
        }
    }

  private:
    // libzmq keeps the errno of connect(2) to itself.
    void check_refusal() const override {
        if (unix_.attempt()) {
            return;
        }
        const auto& later = unix_address::later;
        if (std::find(later.begin(), later.end(), errno) == later.end()) {
            throw SystemError("connect", errno, url);
        }
    }

    bool check_server(int fd) const override {
        ucred peer{};
        socklen_t size = sizeof(peer);
        if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0) {
            return false;  // it has gone already
        }
        check_peer(fd, url);
        return true;
    }

    UnixAddress unix_;
};

// `zmq+tcp://host:port`; port 0 lets the kernel choose. A server binds loopback unless it has keys,
// or `allow_remote` is set: there is neither encryption nor a password then.
class ZmqTcp : public Zmq {
  public:
    ZmqTcp(
        std::string host,
        int port,
        Wait wait = Wait::BLOCK,
        const std::string& curve = "",
        bool allow_remote = false
    )
        : Zmq("zmq+tcp://" + join(host, std::to_string(port)),
              "tcp://" + join(host, std::to_string(port)),
              wait,
              curve),
          host_(std::move(host)),
          allow_remote_(allow_remote) {}

    std::unique_ptr<Listener> listen() override {
        if (!has_keys() && !allow_remote_ && !is_loopback()) {
            throw Error(
                Status::PERMISSION_DENIED,
                "not a loopback address: it takes keys, ?curve=FILE (or ?allow_remote=1)",
                url
            );
        }
        return listen_on(-1, false, [] {});
    }

  private:
    static std::string join(const std::string& host, const std::string& port) {
        const bool is_v6 = host.find(':') != std::string::npos;
        return (is_v6 ? "[" + host + "]" : host) + ":" + port;
    }

    bool is_loopback() const {
        addrinfo hints{};
        hints.ai_socktype = SOCK_STREAM;
        addrinfo* found = nullptr;
        if (::getaddrinfo(host_.c_str(), nullptr, &hints, &found) != 0) {
            throw Error(Status::NOT_FOUND, "unknown host", url);
        }
        const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, ::freeaddrinfo);
        if (found->ai_family == AF_INET) {
            const auto* address = reinterpret_cast<const sockaddr_in*>(found->ai_addr);
            return (ntohl(address->sin_addr.s_addr) >> 24U) == 127;
        }
        const auto* address = reinterpret_cast<const sockaddr_in6*>(found->ai_addr);
        return IN6_IS_ADDR_LOOPBACK(&address->sin6_addr);
    }

    std::string url_of(zmq::socket_t& router) const override {
        const auto endpoint = router.get(zmq::sockopt::last_endpoint);
        return "zmq+tcp://" + join(host_, endpoint.substr(endpoint.rfind(':') + 1));
    }

    // A port of the ephemeral range with no server: TCP may meet itself there.
    bool check_server(int fd) const override {
        sockaddr_storage here{};
        sockaddr_storage there{};
        socklen_t size = sizeof(here);
        socklen_t size_there = sizeof(there);
        return ::getsockname(fd, reinterpret_cast<sockaddr*>(&here), &size) == 0 &&
               ::getpeername(fd, reinterpret_cast<sockaddr*>(&there), &size_there) == 0 &&
               (size != size_there || std::memcmp(&here, &there, size) != 0);
    }

    std::string host_;
    bool allow_remote_;
};

}  // namespace ipc_bridge

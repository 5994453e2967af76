// The server: one thread a connection, each the same loop: read, step the session, flush. (Where
// one socket brings all clients, and no handler blocks, one thread for all: see `serve_all`.)
//
// A handler is called with its Call and the request, a view that lives until the handler is done:
//
//     Payload unary(Call& call, Bytes request)
//     Producer streaming(Call& call, Bytes request)   // gives an item, a Pause, or nothing: the
//     end
//
// and may block. Throw Error to end the call with a status; anything else ends it with INTERNAL.
// (Python returns an iterator where C++ returns a function: C++20 has no generators.)
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/session.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge {

// A client that says nothing for so long is gone.
inline constexpr double server_hello_timeout_s = 5.0;
// Of small items for one write; more gains nothing.
inline constexpr std::size_t batch_bytes = 64U << 10;
// Items made between two looks at the clock: at most these wait for a batch.
inline constexpr int stride_items_max = 16;
// A stride that takes longer is sent at once.
inline constexpr std::int64_t stride_ns = 20'000;
// Of clients with input, in a shared loop, before those whose time has come.
inline constexpr int turns_max = 16;
// Default; each costs a thread and 256 KiB of buffer.
inline constexpr std::size_t clients_max_default = 256;
// Connections that have not said HELLO; beyond, the oldest is dropped.
inline constexpr std::size_t strangers_max = 256;
// Default; for running calls when the server is told to stop.
inline constexpr double grace_s_default = 1.0;
// Then, for handlers to notice that they are cut.
inline constexpr double cut_s = 0.5;

// In place of an item: nothing before `until_ns` (monotonic). The connection goes on reading
// meanwhile, so a cancel ends it; unlike Call::sleep it occupies no thread of a shared loop.
struct Pause {
    std::int64_t until_ns;
};

// Bytes that a handler gives back: its own, or a view of what lives until the next item is asked
// for, or (of a reply) as long as the request. (Python's buffers know their owner.)
class Payload {
  public:
    Payload() = default;
    Payload(Bytes view) : bytes_(view) {}
    Payload(std::vector<std::byte> bytes) { own(std::move(bytes)); }
    Payload(std::string text) { own(std::move(text)); }

    Bytes bytes() const { return bytes_; }

  private:
    template <class Owned>
    void own(Owned owned) {
        auto owner = std::make_shared<const Owned>(std::move(owned));
        bytes_ = std::as_bytes(std::span(*owner));
        owner_ = std::move(owner);
    }

    Bytes bytes_;
    std::shared_ptr<const void> owner_;  // null: the handler's
};

class Call;
using Item = std::variant<Payload, Pause>;
using Producer = std::function<std::optional<Item>()>;
using UnaryHandler = std::function<Payload(Call&, Bytes)>;
using StreamHandler = std::function<Producer(Call&, Bytes)>;

// Methods by number, each with its handler.
//
// A handler that neither waits nor computes for long may say that it does not block; if none of a
// service does, some transports serve all clients in one thread, which is faster.
class Service {
  public:
    bool blocks = false;  // does any of the handlers? (Python's is the parameter's name as well)

    // Register a method that answers once.
    void unary(std::uint16_t method, UnaryHandler handler, bool may_block = true) {
        blocks = blocks || may_block;
        unary_[method] = std::move(handler);
    }

    // Register a method that answers with a stream of items.
    void streaming(std::uint16_t method, StreamHandler handler, bool may_block = true) {
        blocks = blocks || may_block;
        streaming_[method] = std::move(handler);
    }

    // Throws Error: UNIMPLEMENTED.
    const UnaryHandler& find_unary(std::uint16_t method) const {
        const auto found = unary_.find(method);
        if (found == unary_.end()) {
            throw Error(Status::UNIMPLEMENTED, "no unary method " + std::to_string(method));
        }
        return found->second;
    }

    // Throws Error: UNIMPLEMENTED.
    const StreamHandler& find_streaming(std::uint16_t method) const {
        const auto found = streaming_.find(method);
        if (found == streaming_.end()) {
            throw Error(Status::UNIMPLEMENTED, "no streaming method " + std::to_string(method));
        }
        return found->second;
    }

  private:
    std::map<std::uint16_t, UnaryHandler> unary_;
    std::map<std::uint16_t, StreamHandler> streaming_;
};

// Why a call ended before its handler was done.
inline std::string reason_text(Status why) {
    switch (why) {
        case Status::CANCELLED:
            return "cancelled by the client";
        case Status::DEADLINE_EXCEEDED:
            return "the deadline has passed";
        default:
            return "the server is shutting down";
    }
}

// What a handler knows of the call it answers.
class Call {
  public:
    explicit Call(std::int64_t deadline) : deadline_ns(deadline) {}
    virtual ~Call() = default;
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    const std::int64_t deadline_ns;

    // Look at the input: has the client cancelled or gone, or is the deadline past?
    virtual bool is_cancelled() = 0;

    // Sleep; ends early when `is_cancelled`. Items made so far are sent first.
    virtual void sleep(double seconds) = 0;

    // The largest payload that the client takes.
    virtual std::uint32_t peer_payload_bytes_max() const = 0;
};

class Connection;

// The call that runs on a connection.
class ConnectionCall : public Call {
  public:
    ConnectionCall(Connection& connection, std::int64_t deadline)
        : Call(deadline), connection_(connection) {}

    bool is_cancelled() override;
    void sleep(double seconds) override;
    std::uint32_t peer_payload_bytes_max() const override;

  private:
    Connection& connection_;
};

// One client: its session, its stream, and the call that runs.
//
// `run` is the loop of a connection's thread: `step` does all that can be done without input,
// `exchange` waits for what the session needs next and reads it. `turn` is for a loop that serves
// many: it waits for nothing, and `due_ns` says when to come back.
class Connection {
  public:
    Connection(
        std::unique_ptr<Stream> stream_,
        const Service& service,
        std::uint32_t window_bytes,
        std::uint32_t size_max,
        std::function<void(Connection&)> on_hello
    )
        : stream(std::move(stream_)),
          session(window_bytes, size_max),
          service_(service),
          on_hello_(std::move(on_hello)),
          hello_deadline_ns_(deadline_after(server_hello_timeout_s)) {}

    std::unique_ptr<Stream> stream;
    ServerSession session;
    std::atomic<bool> is_idle = false;   // no call is running: may be interrupted to drain
    std::atomic<bool> draining = false;  // set from another thread: take no further call
    std::atomic<bool> cut = false;       // set from another thread: the grace is over

    // Serve the client until it goes, breaks the rules, or the server stops.
    void run() {
        guarded_step([this] {
            while (step()) {
                exchange();
            }
            return false;
        });
    }

    // Take the input that is here, and step; false once the connection is over.
    bool turn() {
        return guarded_step([this] {
            std::ptrdiff_t count = 1;
            while (count > 0) {
                if (session.state != State::RUNNING) {
                    if (session.outbox.size() != 0 && !step()) {
                        return false;
                    }
                    if (session.outbox.size() != 0) {
                        return true;  // nothing more is read before END is out; see `exchange`
                    }
                    session.decoder.release();
                }
                count = stream->try_read(session.decoder.space());
                take(count);
                if (!step()) {
                    return false;
                }
            }
            return true;
        });
    }

    // When `turn` has something to do, also without input.
    std::int64_t due_ns() const {
        if (session.state != State::RUNNING) {
            return met_ ? never : hello_deadline_ns_;
        }
        if (session.credit > 0 && due_ns_ == 0 && session.outbox.size() == 0) {
            return 0;
        }
        return std::min(due_ns_ != 0 ? due_ns_ : never, call_ ? call_->deadline_ns : never);
    }

    // Do all that can be done without input; false once the connection is over.
    bool step() {
        if (draining) {
            session.drain();
        }
        while (true) {
            flush();
            if (session.state == State::CLOSED) {
                return false;
            }
            if (session.state == State::RUNNING) {
                session.next_event();  // takes in CREDIT, notes CANCEL
                advance();
                if (session.state == State::RUNNING) {
                    return true;
                }
                continue;
            }
            if (session.outbox.size() != 0) {
                return !cut;  // nothing more is decoded before END is out (FRAME.md)
            }
            if (session.state == State::DRAINING || cut) {
                return false;
            }
            const auto event = session.next_event();
            if (!met_ && session.state != State::HELLO) {
                met_ = true;
                on_hello_(*this);
            }
            if (!event) {
                return met_ || now_ns() < hello_deadline_ns_;
            }
            start();
        }
    }

    // For a handler: exchange bytes with the client until a time (0: once, without waiting) or
    // until the call is over.
    void pump(std::int64_t until_ns) {
        session.next_event();
        while (reason() == Status::OK) {
            flush();
            if (until_ns == 0 && session.outbox.size() == 0) {
                take(stream->try_read(session.decoder.space()));
            } else {
                read(until_ns);
            }
            session.next_event();
            if (now_ns() >= until_ns) {
                return;
            }
        }
    }

    // Why the running call must end before its handler is done; OK: it need not.
    Status reason() const {
        if (session.cancelled) {
            return Status::CANCELLED;
        }
        if (cut) {
            return Status::UNAVAILABLE;
        }
        if (call_ && call_->deadline_ns != never && now_ns() >= call_->deadline_ns) {
            return Status::DEADLINE_EXCEEDED;
        }
        return Status::OK;
    }

  private:
    // False once the connection is over; then the client has been told why, and all is freed.
    template <class Body>
    bool guarded_step(Body body) {
        try {
            if (body()) {
                return true;
            }
        } catch (const Error& error) {  // a ProtocolError, a refusal, a system call that failed
            session.farewell(error.status, error.message);
        } catch (const std::bad_alloc&) {  // no room for a payload: its client goes, nobody else
            session.farewell(Status::RESOURCE_EXHAUSTED, "the server is out of memory");
        }
        session.outbox.own();  // what is not sent yet may be the handler's, which goes now
        close_handler();
        try {
            flush();
        } catch (const Error&) {  // there is nobody to tell
        }
        return false;
    }

    void exchange() {
        if (session.state == State::RUNNING) {
            if (session.outbox.size() == 0 && session.credit > 0 && due_ns_ == 0) {
                take(stream->try_read(session.decoder.space()));
            } else {
                read(due_ns_ != 0 ? due_ns_ : never);
            }
        } else if (session.outbox.size() != 0) {
            stream->wait(false, true, never);
        } else {
            session.decoder.release();
            is_idle = true;
            if (!draining) {  // else whoever set it may have seen us busy and not woken us
                const std::int64_t deadline_ns = met_ ? never : hello_deadline_ns_;
                take(stream->read(session.decoder.space(), deadline_ns));
            }
            is_idle = false;
        }
    }

    // Wait, while a call runs, for input (or room, if there is output), and read.
    void read(std::int64_t until_ns) {
        const std::int64_t deadline_ns = std::min(until_ns, call_ ? call_->deadline_ns : never);
        if (session.outbox.size() != 0) {
            stream->wait(true, true, deadline_ns);
            take(stream->try_read(session.decoder.space()));
        } else {
            take(stream->read(session.decoder.space(), deadline_ns));
        }
    }

    void take(std::ptrdiff_t count) {
        if (count > 0) {
            session.decoder.filled(static_cast<std::size_t>(count));
        } else if (count == end_of_stream) {
            if (cut || (draining && session.state != State::RUNNING)) {
                session.drain();  // interrupted by us, not by the client
            } else {
                session.end_of_input();
            }
        }
    }

    // Write what can be written at once.
    void flush() {
        frame::Outbox& outbox = session.outbox;
        while (outbox.size() != 0) {
            const std::ptrdiff_t count = stream->try_write(outbox.buffers());
            if (count > 0) {
                outbox.sent(static_cast<std::size_t>(count));
            } else {
                if (count == end_of_stream) {
                    outbox.clear();  // the input will end too, once it is read to its end
                }
                return;
            }
        }
    }

    // Run the handler of a CALL; a unary one to its end.
    void start() {
        const std::int64_t left_ms = session.remaining_ms;
        call_.emplace(*this, left_ms != 0 ? now_ns() + left_ms * 1'000'000 : never);
        guarded([&] {
            if (session.streaming) {
                producer_ = service_.find_streaming(session.method)(*call_, session.payload);
                due_ns_ = 0;
                stride_ = 1;
            } else {
                unsent_ = service_.find_unary(session.method)(*call_, session.payload);
                end(unsent_.bytes());
            }
        });
    }

    // Make the next batch of items and write it, or end the stream.
    void advance() {
        if (const Status why = reason(); why != Status::OK) {
            fail(why, reason_text(why));
            return;
        }
        if (session.outbox.size() != 0) {
            return;  // an item in it may still be its handler's
        }
        if (due_ns_ != 0 && now_ns() >= due_ns_) {
            due_ns_ = 0;
        }
        looked_ns_ = now_ns();
        guarded([&] {
            while (due_ns_ == 0 && make_stride()) {
            }
        });
        flush();
    }

    // Make a few items; false once it is time to send what is made.
    bool make_stride() {
        for (int i = 0; i < stride_; ++i) {
            if (session.credit <= 0) {
                return false;
            }
            std::optional<Item> item = producer_();
            if (session.state != State::RUNNING || session.cancelled) {
                return false;  // the handler looked, and the client has left
            }
            if (!item) {
                end({});
                return false;
            }
            if (const auto* pause = std::get_if<Pause>(&*item)) {
                due_ns_ = pause->until_ns;
                return false;
            }
            auto& payload = std::get<Payload>(*item);
            session.item(payload.bytes());
            if (payload.bytes().size() > frame::join_bytes_max) {
                unsent_ = std::move(payload);
                return false;  // it is not copied: out with it before the handler goes on
            }
        }
        const std::int64_t at_ns = now_ns();
        if (at_ns - std::exchange(looked_ns_, at_ns) > stride_ns) {
            stride_ = 1;
            return false;
        }
        stride_ = std::min(2 * stride_, stride_items_max);
        return session.outbox.size() < batch_bytes;
    }

    // The handler is done.
    void end(Bytes reply) {
        const Status why = reason();
        if (session.state != State::RUNNING) {
            close_handler();
        } else if (why != Status::OK) {
            fail(why, reason_text(why));
        } else {
            session.end(reply);
            close_handler();
        }
    }

    template <class Body>
    void guarded(Body body) {
        try {
            body();
        } catch (const Error& error) {
            fail_by(error.status, error.message);
        } catch (const std::exception& error) {
            fail_by(Status::INTERNAL, error.what());
        } catch (...) {
            fail_by(Status::INTERNAL, "a handler failed");
        }
    }

    void fail_by(Status status, const std::string& text) {
        if (session.broken) {
            throw ProtocolError(*session.broken);  // found while the handler looked at its input
        }
        fail(status, text);
    }

    // End the call with another status than OK.
    void fail(Status status, const std::string& text) {
        session.outbox.own();  // what is not sent yet may be the handler's, which goes now
        close_handler();
        if (session.state == State::RUNNING) {
            session.fail(status, text);
        }
    }

    void close_handler() {
        producer_ = nullptr;
        call_.reset();
    }

    const Service& service_;
    std::function<void(Connection&)> on_hello_;  // once it said hello; throws Error to refuse it
    std::int64_t hello_deadline_ns_;
    bool met_ = false;
    std::optional<ConnectionCall> call_;
    Producer producer_;
    Payload unsent_;  // the latest reply or large item: not copied, it lives until it is sent
    std::int64_t due_ns_ = 0;     // no item before it
    std::int64_t looked_ns_ = 0;  // at the clock, before this stride
    int stride_ = 1;              // items until the next look
};

inline bool ConnectionCall::is_cancelled() {
    connection_.pump(0);
    return connection_.reason() != Status::OK;
}

inline void ConnectionCall::sleep(double seconds) {
    connection_.pump(deadline_after(seconds));
}

inline std::uint32_t ConnectionCall::peer_payload_bytes_max() const {
    return connection_.session.peer_payload_bytes_max;
}

// `payload_bytes_max` is the largest request taken, `window_bytes` what is stated for streams
// towards this side (there are none yet).
struct ServeOptions {
    std::uint32_t window_bytes = window_bytes_default;
    std::uint32_t payload_bytes_max = frame::payload_bytes_max;
    std::size_t clients_max = clients_max_default;
    double grace_s = grace_s_default;
};

// What answers calls: `Server`, or another with the same face; `run` it.
class Callee {
  public:
    virtual ~Callee() = default;

    std::string url;  // what a client connects to, the port filled in

    // Serve until `stop`, or until no further client can come; then let running calls end within
    // the grace, and cut what is left.
    virtual void run() = 0;

    // From any thread, or a signal handler: make `run` return.
    virtual void stop() = 0;

    // Stop listening, and remove the address. From any thread: a `run` under way is told to `stop`,
    // and does it. Idempotent.
    virtual void close() = 0;
};

// Listens on a transport and serves a service.
class Server : public Callee {
  public:
    // Listen; clients may come from now on. Throws Error as Transport::listen does.
    Server(Transport& transport, Service service, const ServeOptions& options = {})
        : shared_(std::make_shared<Shared>(std::move(service), options)) {
        ServerSession(options.window_bytes, options.payload_bytes_max);  // a bad option shows now
        transport.payload_bytes_max = options.payload_bytes_max;
        listener_ = transport.listen();
        if (!shared_->service.blocks) {  // else a thread for each client all the same
            hub_ = dynamic_cast<Hub*>(listener_.get());
        }
        url = listener_->url;
    }
    ~Server() override { close(); }
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;

    void run() override {
        {
            const std::lock_guard lock(shared_->mutex);
            if (closed_) {
                return;
            }
            running_ = true;
        }
        try {
            if (hub_) {
                while (serve_all(never)) {
                }
            } else {
                while (auto stream = listener_->accept()) {
                    welcome(std::move(stream));
                }
            }
        } catch (...) {
            drain();
            throw;
        }
        drain();
    }

    void stop() override { listener_->interrupt(); }

    void close() override {
        const std::lock_guard lock(shared_->mutex);
        closed_ = true;
        if (running_) {
            listener_->interrupt();
        } else {
            listener_->close();
        }
    }

  private:
    // What the threads of connections hold on to; they may outlive the server, if a handler does.
    struct Shared {
        Shared(Service service_, const ServeOptions& options_)
            : service(std::move(service_)), options(options_) {}

        Service service;
        ServeOptions options;
        std::mutex mutex;
        std::condition_variable changed;
        std::list<std::shared_ptr<Connection>> strangers;  // have not said hello; oldest first
        std::list<std::shared_ptr<Connection>> clients;

        void on_hello(Connection& connection) {
            const std::lock_guard lock(mutex);
            if (clients.size() >= options.clients_max) {
                throw Error(
                    Status::RESOURCE_EXHAUSTED,
                    "the server has " + std::to_string(options.clients_max) +
                        " clients and takes no more"
                );
            }
            clients.splice(clients.end(), strangers, find_stranger(connection));
            changed.notify_all();
        }

        std::list<std::shared_ptr<Connection>>::iterator find_stranger(const Connection& connection
        ) {
            return std::find_if(strangers.begin(), strangers.end(), [&](const auto& one) {
                return one.get() == &connection;
            });
        }

        void forget(const std::shared_ptr<Connection>& connection) {
            const std::lock_guard lock(mutex);
            connection->stream->close();  // under the lock: nobody interrupts it after that
            strangers.remove(connection);
            clients.remove(connection);
            changed.notify_all();
        }

        template <class Body>
        void each(Body body) {
            for (auto* list : {&strangers, &clients}) {
                for (const auto& connection : *list) {
                    body(connection);
                }
            }
        }

        bool is_empty() const { return strangers.empty() && clients.empty(); }
    };

    // A round of the loop in which one thread serves all: give a turn to those with input, and to
    // those whose time has come. False at the deadline, or once the hub is interrupted.
    bool serve_all(std::int64_t deadline_ns) {
        std::int64_t soonest_ns = never;
        for (const auto& [connection, due_ns] : due_) {
            soonest_ns = std::min(soonest_ns, due_ns);
        }
        Hub::Input input = hub_->next(std::min(soonest_ns, deadline_ns));
        int served = 0;
        while (input.stream) {
            const auto found = by_stream_.find(input.stream);
            turn(found != by_stream_.end() ? found->second : admit(std::move(input.owned)));
            ++served;
            if (soonest_ns != 0 || served == turns_max) {
                break;
            }
            input = hub_->next(0);
        }
        if (soonest_ns == never) {
            return served != 0;
        }
        const std::int64_t now = now_ns();
        std::vector<std::shared_ptr<Connection>> due;
        for (const auto& [connection, due_ns] : due_) {
            if (due_ns <= now) {
                due.push_back(connection);
            }
        }
        for (const auto& connection : due) {
            turn(connection);
        }
        return served != 0 || !due.empty();
    }

    void turn(std::shared_ptr<Connection> connection) {  // a copy: it may be the map's last
        const bool lives = connection->turn();
        const std::int64_t due_ns = lives ? connection->due_ns() : never;
        if (due_ns != never) {
            due_[connection] = due_ns;
        } else if (!due_.empty()) {
            due_.erase(connection);
        }
        if (!lives) {
            by_stream_.erase(connection->stream.get());
            shared_->forget(connection);
        }
    }

    std::shared_ptr<Connection> admit(std::unique_ptr<Stream> stream) {
        auto connection = std::make_shared<Connection>(
            std::move(stream),
            shared_->service,
            shared_->options.window_bytes,
            shared_->options.payload_bytes_max,
            [&all = *shared_](Connection& one) { all.on_hello(one); }
        );
        {
            std::unique_lock lock(shared_->mutex);
            if (shared_->strangers.size() >= strangers_max) {
                const auto oldest = shared_->strangers.front();
                cut(oldest);
                // They come faster than threads end; without this wait there is no bound. (In a
                // shared loop it goes in the next round, and nobody else would end it.)
                const auto is_gone = [&] {
                    return shared_->find_stranger(*oldest) == shared_->strangers.end();
                };
                if (!hub_) {
                    shared_->changed.wait_for(lock, std::chrono::duration<double>(cut_s), is_gone);
                }
            }
            shared_->strangers.push_back(connection);
        }
        if (hub_) {
            by_stream_[connection->stream.get()] = connection;
        }
        return connection;
    }

    void cut(const std::shared_ptr<Connection>& connection) {
        connection->cut = true;
        connection->stream->interrupt();
        if (hub_) {
            due_[connection] = 0;
        }
    }

    void welcome(std::unique_ptr<Stream> stream) {
        auto shared = shared_;
        auto connection = admit(std::move(stream));
        try {
            std::thread([shared, connection] {
                try {
                    connection->run();
                } catch (const std::exception&) {  // whatever it is, it ends this connection only
                }
                shared->forget(connection);
            }).detach();
        } catch (const std::system_error&) {  // no further thread: this client is turned away
            shared->forget(connection);
        }
    }

    void drain() {
        {
            const std::lock_guard lock(shared_->mutex);
            listener_->close();
            shared_->each([this](const std::shared_ptr<Connection>& connection) {
                connection->draining = true;
                if (connection->is_idle) {
                    connection->stream->interrupt();
                }
                if (hub_) {
                    due_[connection] = 0;
                }
            });
        }
        if (wait_until_empty(shared_->options.grace_s)) {
            return;
        }
        {
            const std::lock_guard lock(shared_->mutex);
            shared_->each([this](const auto& connection) { cut(connection); });
        }
        wait_until_empty(cut_s);
    }

    bool wait_until_empty(double timeout_s) {
        if (!hub_) {
            std::unique_lock lock(shared_->mutex);
            const auto is_empty = [this] { return shared_->is_empty(); };
            return shared_->changed.wait_for(
                lock, std::chrono::duration<double>(timeout_s), is_empty
            );
        }
        const std::int64_t deadline_ns = deadline_after(timeout_s);
        while (!shared_->is_empty() && now_ns() < deadline_ns) {
            serve_all(deadline_ns);
        }
        return shared_->is_empty();
    }

    std::shared_ptr<Shared> shared_;
    std::unique_ptr<Listener> listener_;
    bool running_ = false;  // then the listener is for `run` to close
    bool closed_ = false;
    Hub* hub_ = nullptr;  // the listener, where one thread serves all
    std::unordered_map<Stream*, std::shared_ptr<Connection>> by_stream_;  // there
    std::unordered_map<std::shared_ptr<Connection>, std::int64_t> due_;   // and who has a time
};

}  // namespace ipc_bridge

// The client: joins a session to a stream, one call at a time.
//
// A client is used by one thread at a time. More calls at once means more connections, as in
// HTTP/1.1. After a fork(2) it is the parent's; in the child its calls fail, and harm nobody.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/session.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge {

// A server that says nothing for so long is none of ours.
inline constexpr double client_hello_timeout_s = 5.0;
// Default; a server that starts together with its client is up by then.
inline constexpr double connect_timeout_s = 5.0;

// `window_bytes` is what a stream's server may send ahead of this reader; `payload_bytes_max` is
// the largest reply or item that this client takes; `timeout` in seconds, none: for ever.
struct ConnectOptions {
    std::uint32_t window_bytes = window_bytes_default;
    std::uint32_t payload_bytes_max = frame::payload_bytes_max;
    std::optional<double> timeout = connect_timeout_s;
};

// Where the items of a call come from.
class ItemSource {
  public:
    virtual ~ItemSource() = default;
    // All that are here, at least one; none at the end. They live until the next are asked for.
    virtual std::span<const Bytes> next() = 0;
    virtual void close() noexcept = 0;
};

// The items of an open stream, in order; each is a view that lives until the next.
//
// Leaving the loop early, `close`, or dropping it cancels the call. Iteration throws CallError for
// an end that is not OK.
class Items {
  public:
    explicit Items(std::unique_ptr<ItemSource> source) : source_(std::move(source)) {}
    Items(Items&&) = default;
    Items& operator=(Items&&) = delete;
    ~Items() { close(); }

    // The next item; nothing at the end.
    std::optional<Bytes> next() {
        Bytes item;
        return take(item) ? std::optional(item) : std::nullopt;
    }

    // The next items, all that are here at once: for many small ones. Each is a view as `next`
    // gives it, and all live until the next; none at the end. (Python: `batches`.)
    std::span<const Bytes> next_batch() {
        return ready_.empty() ? source_->next() : std::exchange(ready_, {});
    }

    // Cancel the call unless it has ended. Idempotent.
    void close() noexcept {
        ready_ = {};
        if (source_) {
            source_->close();
        }
    }

    class Iterator {
      public:
        using iterator_concept = std::input_iterator_tag;
        using difference_type = std::ptrdiff_t;
        using value_type = Bytes;
        explicit Iterator(Items& items) : items_(items.take(item_) ? &items : nullptr) {}
        Bytes operator*() const { return item_; }
        Iterator& operator++() {
            items_ = items_->take(item_) ? items_ : nullptr;
            return *this;
        }
        void operator++(int) { ++*this; }
        bool operator==(std::default_sentinel_t) const { return items_ == nullptr; }

      private:
        Bytes item_;
        Items* items_;  // null at the end
    };
    Iterator begin() { return Iterator(*this); }
    std::default_sentinel_t end() const { return {}; }

  private:
    // (Not an optional: to copy one, its flag and its span, costs more than the rest of an item.)
    bool take(Bytes& item) {
        if (ready_.empty()) {
            ready_ = source_->next();
            if (ready_.empty()) {
                return false;
            }
        }
        item = ready_.front();
        ready_ = ready_.subspan(1);
        return true;
    }

    std::unique_ptr<ItemSource> source_;
    std::span<const Bytes> ready_;  // taken from the source, and not yet given out
};

// What makes calls: `Client`, or another with the same face.
class Caller {
  public:
    virtual ~Caller() = default;
    virtual Bytes call(
        std::uint16_t method, Bytes payload = {}, std::optional<double> timeout = std::nullopt
    ) = 0;
    virtual Items call_stream(
        std::uint16_t method, Bytes payload = {}, std::optional<double> timeout = std::nullopt
    ) = 0;
    virtual void close() = 0;
};

// The stream of a client in the child of a fork: the parent's, so nothing touches it here. It is
// kept, for its end would close or remove what the parent uses.
class Orphan : public Stream {
  public:
    Orphan(std::unique_ptr<Stream> parents, std::string url)
        : Stream(Wait::BLOCK), parents_(parents.release()), url_(std::move(url)) {}

    std::ptrdiff_t try_read(std::span<std::byte> /*buffer*/) override { refuse(); }
    std::ptrdiff_t try_write(std::span<const Bytes> /*buffers*/) override { refuse(); }
    bool wait(bool /*readable*/, bool /*writable*/, std::int64_t /*deadline_ns*/) override {
        refuse();
    }
    int fileno() const override { refuse(); }
    void interrupt() override {}
    void close() override {}

  private:
    [[noreturn]] void refuse() const {
        const char* what = "the connection is the parent's, from before the fork: connect anew";
        throw Error(Status::FAILED_PRECONDITION, what, url_);
    }

    [[maybe_unused]] Stream* parents_;
    std::string url_;
};

// A connection to a server. Not movable: an open stream refers to it.
class Client : public Caller {
  public:
    // Reach a server, waiting up to `options.timeout` seconds for it to start, and exchange hellos.
    //
    // Throws Error: UNAVAILABLE at the timeout, INVALID_ARGUMENT, PERMISSION_DENIED,
    // RESOURCE_EXHAUSTED if the server is full; nothing stays open then.
    explicit Client(Transport& transport, const ConnectOptions& options = {})
        : url_(transport.url), session_(options.window_bytes, options.payload_bytes_max) {
        transport.payload_bytes_max = options.payload_bytes_max;
        const std::int64_t by_ns = deadline_after(options.timeout);
        stream_ = transport.connect(by_ns);
        meet(std::min(by_ns, deadline_after(client_hello_timeout_s)));
    }
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;

    const std::string& url() const { return url_; }

    // Call a unary method and return its reply, a view that lives until the next call.
    //
    // `method` is not 0; `timeout` in seconds; none: wait as long as it takes. Throws UsageError if
    // nothing was sent (FAILED_PRECONDITION: a stream is open; INVALID_ARGUMENT: no number of a
    // method; RESOURCE_EXHAUSTED: too large), CallError with the server's status,
    // DEADLINE_EXCEEDED, or UNAVAILABLE if the server has gone, ProtocolError if it breaks the
    // rules, SystemError, and Error (FAILED_PRECONDITION) in the child of a fork.
    //
    // The connection lives after UsageError, any status that a handler gave (its own UNAVAILABLE,
    // too), and a deadline. What ends it: the server's end or farewell, whose status may be another
    // than UNAVAILABLE (RESOURCE_EXHAUSTED: it is full, or hangs up on who reads no answers);
    // ProtocolError, SystemError and a fork; and a deadline met while the request was still being
    // sent. Each further call throws CallError, UNAVAILABLE, then: connect anew. (gRPC does that by
    // itself: there the connection lives after all but a fork.)
    Bytes call(
        std::uint16_t method, Bytes payload = {}, std::optional<double> timeout = std::nullopt
    ) override {
        start(method, payload, false, timeout);
        while (event() != Kind::END) {
        }
        return session_.payload;
    }

    // Call a streaming method; the items come as they are iterated. Throws as `call`.
    Items call_stream(
        std::uint16_t method, Bytes payload = {}, std::optional<double> timeout = std::nullopt
    ) override {
        start(method, payload, true, timeout);
        return Items(std::make_unique<Source>(*this));
    }

    // The stream's descriptor (see Stream::fileno).
    int fileno() const { return stream_->fileno(); }

    // Close the connection; an open call is cancelled by that. Idempotent.
    void close() override {
        session_.state = State::CLOSED;
        session_.outbox.clear();
        stream_->close();
    }

  private:
    class Source : public ItemSource {
      public:
        explicit Source(Client& client) : client_(client) {}

        std::span<const Bytes> next() override {
            if (!open_) {
                return {};
            }
            ClientSession& session = client_.session_;
            session.consumed();
            if (session.outbox.size() != 0) {
                client_.write();
            }
            try {
                if (session.state == State::CLOSED) {  // by its owner, in mid-stream
                    throw CallError(Status::UNAVAILABLE, "the connection is closed", client_.url_);
                }
                if (client_.is_late()) {
                    client_.expire();
                }
                if (const std::span<const Bytes> items = session.items(); !items.empty()) {
                    return items;
                }
                if (client_.event() == Kind::ITEM) {
                    return {&session.payload, 1};
                }
            } catch (...) {
                open_ = false;
                throw;
            }
            open_ = false;
            return {};
        }

        void close() noexcept override {
            if (std::exchange(open_, false)) {
                try {
                    client_.cancel();
                } catch (const Error&) {  // the connection is gone, and the call with it
                }
            }
        }

      private:
        Client& client_;
        bool open_ = true;
    };

    // Send a CALL, whole: its payload is the caller's, who may change it afterwards.
    void start(std::uint16_t method, Bytes payload, bool streaming, std::optional<double> timeout) {
        const std::int64_t by_ns = deadline_after(timeout);
        const std::int64_t left_ms =
            by_ns == never ? 0 : std::min<std::int64_t>(remaining_ms(by_ns), frame::u32_max);
        if (left_ms == 0 && by_ns != never) {
            throw CallError(Status::DEADLINE_EXCEEDED, "the deadline has passed", url_);
        }
        session_.decoder.hold();  // the payload may be a view of the last reply
        try {
            if (session_.outbox.size() != 0 && session_.state == State::IDLE) {
                deadline_ns_ = by_ns;  // the CANCEL of the last call
                send();
            }
            session_.call(method, payload, streaming, static_cast<std::uint32_t>(left_ms));
        } catch (const UsageError& error) {
            throw UsageError(error.status, error.message, url_);
        } catch (const CallError& error) {
            throw CallError(error.status, error.message, url_);
        }
        deadline_ns_ = by_ns;
        try {
            send();
        } catch (...) {  // half of a request: nobody can complete it
            close();
            throw;
        }
        session_.decoder.release();
    }

    // Write all that is due.
    void send() {
        write();
        while (session_.outbox.size() != 0) {
            if (decode()) {
                throw ProtocolError("an answer to a call that is still on its way", url_);
            }
            read_while_full();
            write();
        }
    }

    // The next event of the open call; what is due is written first. Throws CallError for an END
    // that is not OK, and at the deadline.
    Kind event() {
        while (true) {
            if (const auto event = decode()) {
                return *event;
            }
            if (session_.outbox.size() != 0) {
                write();
            }
            if (session_.outbox.size() != 0) {
                read_while_full();
                continue;
            }
            const std::ptrdiff_t count =
                moved([&] { return stream_->read(session_.decoder.space(), deadline_ns_); });
            take(count);  // what came at the deadline is not lost: the next call needs it
            if (count == would_block || is_late()) {
                expire();
            }
        }
    }

    // Whoever cannot write reads meanwhile: never wait for writable alone (FRAME.md).
    void read_while_full() {
        take(moved([&] {
            stream_->wait(true, true, deadline_ns_);
            return stream_->try_read(session_.decoder.space());
        }));
        if (is_late()) {
            expire();
        }
    }

    bool is_late() const { return deadline_ns_ != never && now_ns() >= deadline_ns_; }

    // The next event that is here already. Throws as `event`, and ProtocolError.
    std::optional<Kind> decode() {
        std::optional<Kind> event;
        try {
            event = session_.next_event();
        } catch (const ProtocolError& error) {
            close();
            throw ProtocolError(error.broken, url_);
        }
        if (event == Kind::END && session_.status != Status::OK) {
            if (session_.state == State::CLOSED) {
                close();
            }
            throw CallError(session_.status, session_.message, url_);
        }
        return event;
    }

    // Do something with the stream. What it throws is final: the peer broke the mechanism's rules,
    // or a system call failed, and nobody knows how much was moved.
    template <class Step>
    std::ptrdiff_t moved(Step step) {
        try {
            return step();
        } catch (const ProtocolError& error) {
            close();
            throw ProtocolError(error.broken, url_);
        } catch (const Error&) {
            close();
            throw;
        }
    }

    void take(std::ptrdiff_t count) {
        if (count > 0) {
            session_.filled(static_cast<std::size_t>(count));
        } else if (count == end_of_stream) {
            session_.end_of_input();
            close();
            throw CallError(Status::UNAVAILABLE, session_.message, url_);
        }
    }

    void write() {
        frame::Outbox& outbox = session_.outbox;
        while (outbox.size() != 0) {
            const std::ptrdiff_t count =
                moved([&] { return stream_->try_write(outbox.buffers()); });
            if (count > 0) {
                outbox.sent(static_cast<std::size_t>(count));
            } else {
                if (count == end_of_stream) {
                    outbox.clear();  // why the server went may still stand in what it sent before
                }
                return;
            }
        }
    }

    // The deadline has come: give the call up.
    [[noreturn]] void expire() {
        cancel();
        throw CallError(Status::DEADLINE_EXCEEDED, "no answer before the deadline", url_);
    }

    void cancel() {
        if (session_.state == State::OPEN) {
            session_.cancel();
            write();
        }
    }

    void meet(std::int64_t by_ns) {
        deadline_ns_ = by_ns;
        try {
            send();
            while (!decode() && session_.state == State::HELLO) {
                const std::ptrdiff_t count =
                    moved([&] { return stream_->read(session_.decoder.space(), by_ns); });
                if (count == would_block) {
                    throw Error(Status::UNAVAILABLE, "the server said no hello in time", url_);
                }
                take(count);
            }
        } catch (const CallError& error) {
            if (error.status == Status::DEADLINE_EXCEEDED) {
                throw Error(Status::UNAVAILABLE, "the server said no hello in time", url_);
            }
            throw;
        }
    }

    // The clients of this process; a fork orphans them in the child.
    class Family {
      public:
        static Family& all() {
            static auto* family = new Family;  // for ever: a client may outlive static objects
            return *family;
        }

        void add(Client& client) {
            const std::lock_guard lock(mutex_);
            clients_.insert(&client);
        }
        void remove(Client& client) {
            const std::lock_guard lock(mutex_);
            clients_.erase(&client);
        }

      private:
        Family() {
            ::pthread_atfork(
                [] { all().mutex_.lock(); },
                [] { all().mutex_.unlock(); },
                [] {
                    all().orphan_all();
                    all().mutex_.unlock();
                }
            );
        }

        void orphan_all() {
            for (Client* client : clients_) {
                client->stream_ =
                    std::make_unique<Orphan>(std::move(client->stream_), client->url_);
            }
        }

        std::mutex mutex_;
        std::set<Client*> clients_;
    };

    struct Member {
        explicit Member(Client& whose) : client(whose) { Family::all().add(client); }
        Member(const Member&) = delete;
        Member& operator=(const Member&) = delete;
        ~Member() { Family::all().remove(client); }
        Client& client;
    };

    std::string url_;
    ClientSession session_;
    std::unique_ptr<Stream> stream_;
    std::int64_t deadline_ns_ = never;  // of the open call
    Member member_{*this};              // the last, so that all else is there as long as it is
};

}  // namespace ipc_bridge

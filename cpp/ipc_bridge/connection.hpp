// A client's connection at the server: read, step the session, flush.
//
// Copy with it: errors, frame, session, system, handlers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/handlers.hpp>
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
            fail_unexpectedly(error.what());
        } catch (...) {
            fail_unexpectedly("a handler failed");
        }
    }

    void fail_unexpectedly(const std::string& text) {
        if (!session.broken) {
            tell_handler_failure(text);
        }
        fail_by(Status::INTERNAL, text);
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
}  // namespace ipc_bridge

// The session: who may say what, and when (the state table of proto/FRAME.md).
//
// Sans-IO, as `frame`: the driver (client or server) reads into `decoder.space()`, takes events
// from `next_event()` until it says nothing, and writes what stands in `outbox`. Nothing is "not
// yet"; a ProtocolError means that the peer broke the contract and is final for this session. There
// is no clock here: deadlines are the driver's, and reach the session as a cancel or an end.
//
// An event is a Kind; what it carries stands in the members below it until the next one.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>

namespace ipc_bridge {

// Default: a few of the largest items that people stream, for full speed.
inline constexpr std::uint32_t window_bytes_default = 4U << 20;
inline constexpr std::uint32_t window_bytes_limit = 1U << 30;

// Where a session stands; the client's OPEN is the server's RUNNING.
enum class State : std::uint8_t { HELLO, IDLE, OPEN, RUNNING, DRAINING, CLOSED };

inline std::string_view name_of(State state) {
    static constexpr std::string_view names[] = {
        "HELLO", "IDLE", "OPEN", "RUNNING", "DRAINING", "CLOSED"};
    return names[static_cast<std::uint8_t>(state)];
}

// Ids rise by 1 from 1; 0 is skipped on wrap.
inline std::uint32_t next_id(std::uint32_t call_id) {
    return call_id == frame::u32_max ? 1 : call_id + 1;
}

// Is `text` UTF-8 (RFC 3629)? Python's decoder is the model: no surrogates, nothing overlong.
inline bool is_utf8(std::string_view text) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    for (std::size_t i = 0; i < text.size();) {
        const unsigned lead = byte(i);
        if (lead >= 0x80 && (lead < 0xC2 || lead > 0xF4)) {
            return false;
        }
        const std::size_t more = lead < 0x80 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
        if (i + more >= text.size()) {
            return false;
        }
        for (std::size_t k = 1; k <= more; ++k) {
            if ((byte(i + k) & 0xC0U) != 0x80) {
                return false;
            }
        }
        if (more > 0) {
            const unsigned second = byte(i + 1);
            if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) ||
                (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F)) {
                return false;
            }
        }
        i += more + 1;
    }
    return true;
}

// What both sides share: the hello, the farewell, and the walk through the table.
class Session {
  public:
    virtual ~Session() = default;

    State state = State::HELLO;
    frame::Outbox outbox;
    frame::Decoder decoder;
    std::uint32_t window_bytes;
    std::uint32_t peer_window_bytes = 0;
    std::uint32_t peer_payload_bytes_max = 0;
    // Of the latest event:
    Bytes payload;                   // CALL, ITEM, END with OK
    Status status = Status::OK;      // END
    std::string message;             // END with another status
    std::uint16_t method = 0;        // CALL
    bool streaming = false;          // CALL: the answer is a stream
    std::uint32_t remaining_ms = 0;  // CALL: to the deadline; 0: none

    std::optional<ProtocolError> broken;  // what the peer did, once it broke the rules
    bool cancelled = false;               // a server's: `end` the call, nothing is decoded before

    // The next event; nothing: read more. Throws ProtocolError, and again whenever it is asked.
    std::optional<Kind> next_event() {
        if (broken) {
            throw ProtocolError(*broken);
        }
        if (cancelled) {
            return std::nullopt;
        }
        try {
            while (auto header = decoder.next()) {
                if (auto event = act(*header)) {
                    return event;
                }
            }
            return std::nullopt;
        } catch (const ProtocolError& error) {
            broken = error;
            throw;
        }
    }

    // End the session, and tell the peer why (END of call 0).
    void farewell(Status why, std::string_view text) {
        if (state != State::CLOSED) {
            put_end(0, why, text);
            state = State::CLOSED;
        }
    }

  protected:
    using Header = frame::Header;

    Session(std::uint32_t window, std::uint32_t size_max)
        : decoder(message_bytes_max),  // for strangers; see meet
          window_bytes(window),
          size_max_(std::max(size_max, static_cast<std::uint32_t>(message_bytes_max))) {
        if (window < 1 || window > window_bytes_limit) {
            throw UsageError(
                Status::INVALID_ARGUMENT, "window of " + std::to_string(window) + " bytes"
            );
        }
        if (size_max > frame::payload_bytes_limit) {
            throw UsageError(
                Status::INVALID_ARGUMENT, "max_payload of " + std::to_string(size_max) + " bytes"
            );
        }
        const frame::Hello hello{frame::magic, size_max};
        outbox.put(
            {sizeof(hello), Kind::HELLO, 0, frame::version, 0, window},
            std::as_bytes(std::span(&hello, 1))
        );
    }

    // Look the frame up in the side's table, and do what it says.
    virtual std::optional<Kind> act(const Header& header) = 0;

    [[noreturn]] void refuse(const Header& header) const {
        throw ProtocolError(
            std::string(name_of(header.kind)) + " while " + std::string(name_of(state))
        );
    }

    void put_end(std::uint32_t call_id, Status why, std::string_view text) {
        if (why == Status::OK) {
            why = Status::INTERNAL;  // a failure that calls itself OK would be another frame
        }
        text = text.substr(0, message_bytes_max);
        while (!is_utf8(text)) {  // never cut inside a character
            text.remove_suffix(1);
        }
        outbox.put(
            {static_cast<std::uint32_t>(text.size()),
             Kind::END,
             0,
             static_cast<std::uint16_t>(why),
             call_id,
             0},
            bytes_of(text)
        );
    }

    std::optional<Kind> meet(const Header& header) {
        frame::Hello hello;
        std::memcpy(&hello, decoder.payload.data(), sizeof(hello));
        if (hello.magic != frame::magic) {
            throw ProtocolError("HELLO without the magic IPCB");
        }
        if (header.code != frame::version) {
            throw ProtocolError(
                "version " + std::to_string(header.code) + ", this side speaks " +
                std::to_string(frame::version)
            );
        }
        if (header.value < 1 || header.value > window_bytes_limit) {
            throw ProtocolError("window of " + std::to_string(header.value) + " bytes");
        }
        peer_window_bytes = header.value;
        peer_payload_bytes_max = hello.payload_bytes_max;
        decoder.size_max = size_max_;
        state = State::IDLE;
        return std::nullopt;
    }

    void set_message() {
        if (!is_utf8(text_of(decoder.payload))) {
            throw ProtocolError("a status message that is not UTF-8");
        }
        message = text_of(decoder.payload);
    }

  private:
    std::uint32_t size_max_;  // of a payload, from the hello on
};

// A side's table: for each state and kind of frame what to do; null: the peer broke the rules.
template <class Side>
using Table = std::array<std::array<std::optional<Kind> (Side::*)(const frame::Header&), 8>, 6>;

// The caller's side: `call`, then ITEM and END events of that call, or `cancel`.
class ClientSession : public Session {
  public:
    explicit ClientSession(
        std::uint32_t window = window_bytes_default,
        std::uint32_t size_max = frame::payload_bytes_max
    )
        : Session(window, size_max) {}

    // Start a call; `remaining` milliseconds to its deadline, 0 for none.
    //
    // Throws UsageError (FAILED_PRECONDITION: another call is open; INVALID_ARGUMENT: no number of
    // a method; RESOURCE_EXHAUSTED: more than the server takes) or CallError (UNAVAILABLE); nothing
    // is sent then.
    void call(std::uint16_t method_, Bytes request, bool streaming_, std::uint32_t remaining) {
        if (state != State::IDLE) {
            if (state == State::OPEN) {
                throw UsageError(
                    Status::FAILED_PRECONDITION, "a call is under way on this connection"
                );
            }
            throw CallError(Status::UNAVAILABLE, "the connection is closed");
        }
        if (leaving_) {
            throw CallError(Status::UNAVAILABLE, "the server is shutting down");
        }
        frame::check_method(method_);
        if (request.size() > peer_payload_bytes_max) {
            throw UsageError(
                Status::RESOURCE_EXHAUSTED,
                "payload of " + std::to_string(request.size()) + " bytes, the server takes " +
                    std::to_string(peer_payload_bytes_max)
            );
        }
        call_id_ = next_id(call_id_);
        streaming_call_ = streaming_;
        index_ = 0;
        owed_ = granted_ = 0;
        allowed_ = window_bytes;
        outbox.put(
            {static_cast<std::uint32_t>(request.size()),
             Kind::CALL,
             streaming_ ? frame::stream_wanted : std::uint8_t{0},
             method_,
             call_id_,
             remaining},
            request
        );
        state = State::OPEN;
    }

    // Give the open call up; whatever comes of it later is dropped. Without one: nothing.
    void cancel() {
        if (state == State::OPEN) {
            outbox.put({0, Kind::CANCEL, 0, 0, call_id_, 0});
            state = State::IDLE;
        }
    }

    // The payloads of the items that stand ready, for one pass; `consumed` when done.
    std::span<const Bytes> items() {
        if (state != State::OPEN || answer_id_ != call_id_ || !streaming_call_) {
            return {};
        }
        const std::int64_t bytes_max = std::min<std::int64_t>(allowed_, window_bytes / 2 + 1);
        const auto cost = decoder.items(call_id_, index_, bytes_max, views_);
        allowed_ -= cost;
        index_ += static_cast<std::uint32_t>(views_.size());
        owed_ += cost;
        return views_;
    }

    // All items handed out were used; gives their credit back once half the window is due.
    void consumed() {
        if (2 * owed_ >= window_bytes && state == State::OPEN) {
            outbox.put({0, Kind::CREDIT, 0, 0, call_id_, static_cast<std::uint32_t>(owed_)});
            granted_ += owed_;
            owed_ = 0;
        }
    }

    // `count` bytes were read into `decoder.space()`.
    void filled(std::size_t count) {
        decoder.filled(count);
        allowed_ += granted_;
        granted_ = 0;
    }

    // The server's bytes have ended: an END with UNAVAILABLE if a call was open.
    std::optional<Kind> end_of_input() {
        const bool was_open = state == State::OPEN;
        if (state != State::CLOSED) {
            status = Status::UNAVAILABLE;
            message = leaving_ ? "the server has shut down" : "the server closed the connection";
        }
        state = State::CLOSED;
        return was_open ? std::optional(Kind::END) : std::nullopt;
    }

  private:
    std::optional<Kind> item(const Header& header) {
        if (header.call_id != answer_id_ || !is_awaited()) {
            throw ProtocolError("ITEM of call " + std::to_string(header.call_id));
        }
        if (!is_live()) {
            return std::nullopt;
        }
        if (!streaming_call_) {
            throw ProtocolError("ITEM in answer to a unary call");
        }
        if (header.value != index_) {
            throw ProtocolError(
                "ITEM " + std::to_string(header.value) + " where " + std::to_string(index_) +
                " was due"
            );
        }
        if (allowed_ <= 0) {
            throw ProtocolError("ITEM without credit");
        }
        const auto cost = static_cast<std::int64_t>(frame::header_bytes + header.payload_size);
        allowed_ -= cost;
        owed_ += cost;
        ++index_;
        payload = decoder.payload;
        return Kind::ITEM;
    }

    std::optional<Kind> end(const Header& header) {
        if (header.call_id == 0) {
            return refused(header);
        }
        if (header.call_id != answer_id_ || !is_awaited()) {
            throw ProtocolError("END of call " + std::to_string(header.call_id));
        }
        const bool live = is_live();
        answer_id_ = next_id(answer_id_);
        if (!live) {
            return std::nullopt;
        }
        if (header.code == 0) {
            if (streaming_call_ && header.payload_size != 0) {
                throw ProtocolError("END of a stream with a payload");
            }
            status = Status::OK;
            payload = decoder.payload;
        } else {
            status = static_cast<Status>(header.code);
            set_message();
        }
        state = State::IDLE;
        return Kind::END;
    }

    std::optional<Kind> refused(const Header& header) {
        if (header.call_id != 0) {
            throw ProtocolError("END of call " + std::to_string(header.call_id) + " before HELLO");
        }
        status = static_cast<Status>(header.code);
        set_message();
        state = State::CLOSED;
        return Kind::END;
    }

    std::optional<Kind> goodbye(const Header& header) {
        leaving_ = true;
        if (state == State::OPEN && header.value != call_id_) {  // it crossed our call
            status = Status::UNAVAILABLE;
            message = "the server is shutting down";
            state = State::CLOSED;
            return Kind::END;
        }
        return std::nullopt;
    }

    bool is_awaited() const { return answer_id_ != next_id(call_id_); }

    bool is_live() const { return state == State::OPEN && answer_id_ == call_id_; }

    std::optional<Kind> act(const Header& header) override {
        using S = ClientSession;
        static constexpr Table<S> table = {{
            /* HELLO    */ {nullptr, &S::meet, nullptr, nullptr, &S::refused},
            /* IDLE     */
            {nullptr, nullptr, nullptr, &S::item, &S::end, nullptr, nullptr, &S::goodbye},
            /* OPEN     */
            {nullptr, nullptr, nullptr, &S::item, &S::end, nullptr, nullptr, &S::goodbye},
        }};
        const auto action =
            table[static_cast<std::size_t>(state)][static_cast<std::size_t>(header.kind)];
        if (!action) {
            refuse(header);
        }
        return (this->*action)(header);
    }

    std::uint32_t call_id_ = 0;    // of the latest call
    std::uint32_t answer_id_ = 1;  // of the oldest call whose END has not come: the one answered
    bool streaming_call_ = false;
    std::uint32_t index_ = 0;   // of the next item
    std::int64_t allowed_ = 0;  // credit as the server has it: above 0 it may send
    std::int64_t granted_ = 0;  // credit sent since the last read: no item read by then rests on it
    std::int64_t owed_ = 0;     // cost of items taken and not yet given back
    bool leaving_ = false;      // the server said GOODBYE
    std::vector<Bytes> views_;
};

// The callee's side: a CALL event, then `item` while there is `credit`, and one `end`.
class ServerSession : public Session {
  public:
    explicit ServerSession(
        std::uint32_t window = window_bytes_default,
        std::uint32_t size_max = frame::payload_bytes_max
    )
        : Session(window, size_max) {}

    std::int64_t credit = 0;  // bytes; an item may be sent while it is above 0

    // Send the next item of the running stream; only while `credit` is above 0.
    //
    // Throws UsageError (RESOURCE_EXHAUSTED) if the client takes no payload of that size.
    void item(Bytes item_payload) {
        check_size(item_payload.size());
        credit -= static_cast<std::int64_t>(frame::header_bytes + item_payload.size());
        outbox.put(
            {static_cast<std::uint32_t>(item_payload.size()), Kind::ITEM, 0, 0, call_id_, index_},
            item_payload
        );
        ++index_;
    }

    // End the running call with OK; `reply` is that of a unary one.
    //
    // Throws UsageError (RESOURCE_EXHAUSTED) if the client takes no payload of that size.
    void end(Bytes reply = {}) {
        check_size(reply.size());
        outbox.put({static_cast<std::uint32_t>(reply.size()), Kind::END, 0, 0, call_id_, 0}, reply);
        ended();
    }

    // End the running call with another status than OK.
    void fail(Status why, std::string_view text) {
        put_end(call_id_, why, text);
        ended();
    }

    // Take no further call: GOODBYE at once, or after the running one.
    void drain() {
        if (leaving_) {
            return;
        }
        leaving_ = true;
        if (state == State::HELLO || state == State::IDLE) {
            ended();
        }
    }

    // The client's bytes have ended: a CANCEL if a call was running.
    std::optional<Kind> end_of_input() {
        const bool was_running = state == State::RUNNING;
        cancelled = was_running;
        state = State::CLOSED;
        return was_running ? std::optional(Kind::CANCEL) : std::nullopt;
    }

  private:
    void ended() {
        cancelled = false;
        state = State::IDLE;
        if (leaving_) {
            outbox.put({0, Kind::GOODBYE, 0, 0, 0, call_id_});
            state = State::DRAINING;
        }
    }

    void check_size(std::size_t size) const {
        if (size > peer_payload_bytes_max) {
            throw UsageError(
                Status::RESOURCE_EXHAUSTED,
                "payload of " + std::to_string(size) + " bytes, the client takes " +
                    std::to_string(peer_payload_bytes_max)
            );
        }
    }

    std::optional<Kind> call(const Header& header) {
        if (header.call_id != next_id(call_id_)) {
            throw ProtocolError(
                "CALL " + std::to_string(header.call_id) + " after " + std::to_string(call_id_)
            );
        }
        call_id_ = header.call_id;
        if (state == State::DRAINING) {
            put_end(call_id_, Status::UNAVAILABLE, "the server is shutting down");
            return std::nullopt;
        }
        method = header.code;
        streaming = (header.flags & frame::stream_wanted) != 0;
        remaining_ms = header.value;
        payload = decoder.payload;
        decoder.hold();  // the driver releases it when END is out
        credit = peer_window_bytes;
        index_ = 0;
        state = State::RUNNING;
        return Kind::CALL;
    }

    std::optional<Kind> credited(const Header& header) {
        if (concerns_running(header)) {
            credit += header.value;
            if (credit > peer_window_bytes) {
                throw ProtocolError("CREDIT above the window");
            }
        }
        return std::nullopt;
    }

    std::optional<Kind> cancel(const Header& header) {
        if (!concerns_running(header)) {
            return std::nullopt;
        }
        cancelled = true;
        return Kind::CANCEL;
    }

    // True for the running call, false for an earlier one; a later one breaks the rules.
    bool concerns_running(const Header& header) const {
        if (call_id_ - header.call_id >= 1U << 31) {
            throw ProtocolError(
                std::string(name_of(header.kind)) + " of call " + std::to_string(header.call_id) +
                ", not yet made"
            );
        }
        return state == State::RUNNING && header.call_id == call_id_;
    }

    std::optional<Kind> act(const Header& header) override {
        using S = ServerSession;
        static constexpr Table<S> table = {{
            /* HELLO    */ {nullptr, &S::meet},
            /* IDLE     */ {nullptr, nullptr, &S::call, nullptr, nullptr, &S::credited, &S::cancel},
            /* OPEN     */ {},
            /* RUNNING  */ {nullptr, nullptr, nullptr, nullptr, nullptr, &S::credited, &S::cancel},
            /* DRAINING */ {nullptr, nullptr, &S::call, nullptr, nullptr, &S::credited, &S::cancel},
        }};
        const auto action =
            table[static_cast<std::size_t>(state)][static_cast<std::size_t>(header.kind)];
        if (!action) {
            refuse(header);
        }
        return (this->*action)(header);
    }

    std::uint32_t call_id_ = 0;  // of the latest call
    bool leaving_ = false;       // GOODBYE after the running call
    // Of the next item. Not beside call_id_: one load of both would wait for the store of this one.
    std::uint32_t index_ = 0;
};

}  // namespace ipc_bridge

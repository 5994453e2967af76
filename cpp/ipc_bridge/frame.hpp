// The frame: a 16-byte header, then the payload; its encoder and its decoder (proto/FRAME.md).
//
// Sans-IO: bytes come in through `Decoder::space()` and `Decoder::filled()`, in any chunking, and
// leave through an `Outbox`; nothing here knows a socket, a thread or a clock.
//
// The decoder owns one buffer. Input is read straight into it and a payload is handed out as a view
// of it, so that receiving copies nothing; the price is the rule that a view lives until the next
// input is read. A header is checked before the room for its payload is made.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <ipc_bridge/errors.hpp>

namespace ipc_bridge {

using Bytes = std::span<const std::byte>;

inline Bytes bytes_of(std::string_view text) {
    return std::as_bytes(std::span(text));
}

inline std::string_view text_of(Bytes bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// What a frame says.
enum class Kind : std::uint8_t {
    HELLO = 1,
    CALL = 2,
    ITEM = 3,
    END = 4,
    CREDIT = 5,
    CANCEL = 6,
    GOODBYE = 7,
};

inline std::string_view name_of(Kind kind) {
    static constexpr std::string_view names[] = {
        "", "HELLO", "CALL", "ITEM", "END", "CREDIT", "CANCEL", "GOODBYE"};
    return names[static_cast<std::uint8_t>(kind)];
}

namespace frame {

// The 16 bytes before each payload; every field is little-endian.
struct Header {
    std::uint32_t payload_size = 0;
    Kind kind{};
    std::uint8_t flags = 0;
    std::uint16_t code = 0;
    std::uint32_t call_id = 0;
    std::uint32_t value = 0;
};

inline constexpr std::size_t header_bytes = 16;
static_assert(
    sizeof(Header) == header_bytes && std::endian::native == std::endian::little,
    "the struct is the wire format only on a little-endian machine"
);

// The payload of HELLO.
struct Hello {
    std::array<char, 4> magic{};
    std::uint32_t payload_bytes_max = 0;
};
static_assert(sizeof(Hello) == 8);

inline constexpr std::array<char, 4> magic = {'I', 'P', 'C', 'B'};
inline constexpr std::uint16_t version = 1;
inline constexpr std::uint8_t stream_wanted = 1;  // flag of CALL: the answer is a stream

// Default; what one frame may make a receiver hold.
inline constexpr std::uint32_t payload_bytes_max = 64U << 20;
// So that what a reader owes (half a window, an item) fits in CREDIT.
inline constexpr std::uint32_t payload_bytes_limit = 1U << 31;
// A socket's buffer holds about as much, so one read empties it.
inline constexpr std::size_t buffer_bytes = 256U << 10;
// Below this, copying a payload is cheaper than a further iovec.
inline constexpr std::size_t join_bytes_max = 16U << 10;
inline constexpr std::size_t iovec_max = 1024;  // IOV_MAX, <limits.h>
// Refills without need of a grown buffer before it is given back.
inline constexpr int idle_refills_max = 256;

// Throws UsageError: INVALID_ARGUMENT for what is no number of a method; here only 0 is none.
inline void check_method(std::uint16_t method, const std::string& where = "") {
    if (method == 0) {
        throw UsageError(Status::INVALID_ARGUMENT, "method 0 is not within 1 to 65535", where);
    }
}

// The highest value of each field of one kind of frame; 0 means that it is unused.
struct Rule {
    std::uint32_t payload_size;
    std::uint8_t flags;
    std::uint16_t code;
    std::uint32_t value;
    std::uint32_t call_id_min;
    std::uint32_t call_id_max;
};

inline constexpr std::uint32_t u32_max = 0xFFFFFFFFU;
inline constexpr std::uint16_t u16_max = 0xFFFFU;
inline constexpr Rule rules[] = {
    {},
    /* HELLO   */ {sizeof(Hello), 0, u16_max, u32_max, 0, 0},
    /* CALL    */ {u32_max, stream_wanted, u16_max, u32_max, 1, u32_max},
    /* ITEM    */ {u32_max, 0, 0, u32_max, 1, u32_max},
    /* END     */ {u32_max, 0, status_max, 0, 0, u32_max},
    /* CREDIT  */ {0, 0, 0, u32_max, 1, u32_max},
    /* CANCEL  */ {0, 0, 0, 0, 1, u32_max},
    /* GOODBYE */ {0, 0, 0, u32_max, 0, 0},
};

// Throw ProtocolError unless the header is one that a correct peer can send.
inline void check(const Header& header, std::uint32_t size_max) {
    const auto kind = static_cast<unsigned>(header.kind);
    if (kind < 1 || kind >= std::size(rules)) {
        throw ProtocolError("unknown kind " + std::to_string(kind));
    }
    const Rule& rule = rules[kind];
    const auto name = [&] { return std::string(name_of(header.kind)); };
    const auto size = [&] { return std::to_string(header.payload_size); };
    if (header.payload_size > rule.payload_size || header.payload_size > size_max) {
        throw ProtocolError(name() + " of " + size() + " bytes, above the limit");
    }
    if (header.flags > rule.flags || header.code > rule.code || header.value > rule.value) {
        throw ProtocolError(name() + " with an unused field set");
    }
    if (header.call_id < rule.call_id_min || header.call_id > rule.call_id_max) {
        throw ProtocolError(name() + " with call id " + std::to_string(header.call_id));
    }
    if (header.kind == Kind::HELLO && header.payload_size != sizeof(Hello)) {
        throw ProtocolError("HELLO of " + size() + " bytes");
    }
    if (header.kind == Kind::END && header.code == 0 && header.call_id == 0) {
        throw ProtocolError("END of the session with status OK");
    }
    if (header.kind == Kind::END && header.code != 0 && header.payload_size > message_bytes_max) {
        throw ProtocolError("status message of " + size() + " bytes");
    }
}

// Frames on their way out: small ones joined, large payloads by reference.
//
// A payload above join_bytes_max is not copied: it must not change before it is sent. Memory of
// what was sent is used again once all is out, so a driver empties the box before it goes on
// filling it.
class Outbox {
  public:
    // Bytes not yet sent.
    std::size_t size() const { return size_; }

    // Append one frame.
    void put(Header header, Bytes payload = {}) {
        const bool joined = payload.size() <= join_bytes_max;
        std::byte* into = extend(header_bytes + (joined ? payload.size() : 0));
        std::memcpy(into, &header, header_bytes);
        if (!joined) {
            parts_.push_back({payload.data(), 0, payload.size()});
        } else if (!payload.empty()) {  // else its data may be null
            std::memcpy(into + header_bytes, payload.data(), payload.size());
        }
        size_ += header_bytes + payload.size();
    }

    // What to write next, in order, for one vectored write; valid until the next `put`.
    std::span<const Bytes> buffers() {
        views_.clear();
        const std::size_t end = std::min(parts_.size(), first_ + iovec_max);
        for (std::size_t i = first_; i < end; ++i) {
            const Part& part = parts_[i];
            const std::byte* base = part.outside ? part.outside : small_.get();
            views_.emplace_back(base + part.begin, part.end - part.begin);
        }
        return views_;
    }

    // The first `count` bytes of `buffers()` were written.
    void sent(std::size_t count) {
        size_ -= count;
        if (size_ == 0) {
            parts_.clear();
            first_ = 0;
            small_size_ = 0;
            return;
        }
        while (first_ < parts_.size() && count >= parts_[first_].end - parts_[first_].begin) {
            count -= parts_[first_].end - parts_[first_].begin;
            ++first_;
        }
        if (count != 0) {
            parts_[first_].begin += count;
        }
    }

    // Copy what is held by reference: its owner is about to go.
    void own() {
        auto rest = std::exchange(parts_, {});
        auto small = std::move(small_);
        const std::size_t first = std::exchange(first_, 0);
        small_capacity_ = small_size_ = 0;
        for (std::size_t i = first; i < rest.size(); ++i) {
            const std::byte* base = rest[i].outside ? rest[i].outside : small.get();
            const std::size_t size = rest[i].end - rest[i].begin;
            std::memcpy(extend(size), base + rest[i].begin, size);
        }
    }

    // Drop everything: there is nobody to send it to.
    void clear() { sent(size_); }

  private:
    struct Part {
        const std::byte* outside;  // null: of small_
        std::size_t begin;
        std::size_t end;
    };

    // Room for `count` more bytes of small frames.
    std::byte* extend(std::size_t count) {
        if (small_size_ + count > small_capacity_) {
            small_capacity_ = std::max(small_size_ + count, 2 * small_capacity_);
            auto grown = std::make_unique_for_overwrite<std::byte[]>(small_capacity_);
            std::copy_n(small_.get(), small_size_, grown.get());
            small_ = std::move(grown);
        }
        if (parts_.empty() || parts_.back().outside) {
            parts_.push_back({nullptr, small_size_, small_size_});
        }
        small_size_ += count;
        parts_.back().end = small_size_;
        return small_.get() + small_size_ - count;
    }

    std::size_t size_ = 0;
    std::unique_ptr<std::byte[]> small_;  // all small frames, one after the other
    std::size_t small_size_ = 0;
    std::size_t small_capacity_ = 0;
    std::vector<Part> parts_;
    std::size_t first_ = 0;  // of parts_ that is not sent
    std::vector<Bytes> views_;
};

// Bytes in, frames out.
//
// Read into `space()`, say `filled(n)`, then take frames by `next()` until it says nothing. After
// any ProtocolError the decoder is of no further use.
class Decoder {
  public:
    explicit Decoder(std::uint32_t size_max_ = payload_bytes_max) : size_max(size_max_) {
        renew(buffer_bytes);
    }

    std::uint32_t size_max;  // of a payload (Python's payload_bytes_max, a constant's name here)
    Bytes payload;           // of the frame that `next` returned last

    // Where to read the next input. Earlier payload views are void after it.
    //
    // Never empty, provided that `next` has said nothing since the last `filled`.
    std::span<std::byte> space() {
        const std::size_t need = need_ ? need_ : header_bytes;
        if (start_ == end_) {
            start_ = end_ = floor_;
            if (capacity_ > buffer_bytes) {
                shrink();
            }
        }
        if (start_ + need > capacity_) {
            move(need);
        }
        // Of a large payload ask just for the rest: what follows starts at the front again.
        const std::size_t stop = need > buffer_bytes / 2 ? start_ + need : capacity_;
        return {buffer_.get() + end_, stop - end_};
    }

    // `count` bytes were read into the front of `space()`.
    void filled(std::size_t count) { end_ += count; }

    // The next whole frame, its payload in `payload`; nothing: read more.
    //
    // Throws ProtocolError for a header that no correct peer sends, before its payload is here.
    std::optional<Header> next() {
        const std::size_t have = end_ - start_;
        if (have < header_bytes) {
            return std::nullopt;
        }
        Header header;
        std::memcpy(&header, buffer_.get() + start_, header_bytes);
        if (need_ == 0) {
            check(header, size_max);
            need_ = header_bytes + header.payload_size;
        }
        if (have < need_) {
            return std::nullopt;
        }
        payload = {buffer_.get() + start_ + header_bytes, header.payload_size};
        start_ += need_;
        need_ = 0;
        return header;
    }

    // The payloads of the ITEMs of `call_id` that stand ready, numbered from `index` on, into
    // `out`; returns what they cost.
    //
    // The loop that a stream of small items spends its time in, so it takes the frame apart by
    // itself; at any frame that is not plainly the next item it stops, and `next` judges it.
    // It also stops once the items cost `bytes_max`.
    std::int64_t items(
        std::uint32_t call_id, std::uint32_t index, std::int64_t bytes_max, std::vector<Bytes>& out
    ) {
        out.clear();
        const std::size_t limit =
            start_ + static_cast<std::size_t>(std::max<std::int64_t>(0, bytes_max));
        std::size_t start = start_;
        while (start + header_bytes <= end_ && start < limit) {
            Header header;
            std::memcpy(&header, buffer_.get() + start, header_bytes);
            const std::size_t stop = start + header_bytes + header.payload_size;
            if (stop > end_ || header.kind != Kind::ITEM || header.flags != 0 || header.code != 0 ||
                header.call_id != call_id || header.value != index ||
                header.payload_size > size_max) {
                break;
            }
            out.emplace_back(buffer_.get() + start + header_bytes, header.payload_size);
            start = stop;
            ++index;
        }
        if (out.empty()) {
            return 0;
        }
        need_ = 0;
        return static_cast<std::int64_t>(start - std::exchange(start_, start));
    }

    // Keep the payload that `next` returned last valid while more input is read.
    void hold() { floor_ = start_; }

    // End `hold`. Of the held buffer and the one that took its place the larger goes on, if nothing
    // stands in that: what a large payload has made grow is there for the next one.
    void release() {
        floor_ = 0;
        if (start_ == end_ && held_capacity_ > capacity_) {
            std::swap(buffer_, held_);
            std::swap(capacity_, held_capacity_);
            start_ = end_ = 0;
        }
    }

    // Nothing of an unfinished frame is here: a good place for the input to end.
    bool is_clean() const { return start_ == end_; }

  private:
    // Make room for `need` bytes from `start_` on: at the front, or in a fresh buffer.
    void move(std::size_t need) {
        const std::size_t size = end_ - start_;
        if (floor_ == 0 && need <= capacity_) {
            std::memmove(buffer_.get(), buffer_.get() + start_, size);
        } else if (floor_ == 0) {
            const auto old = std::move(buffer_);
            renew(std::max(need, buffer_bytes));
            std::memcpy(buffer_.get(), old.get() + start_, size);
        } else {
            std::swap(buffer_, held_);
            std::swap(capacity_, held_capacity_);
            if (capacity_ < std::max(need, buffer_bytes)) {
                renew(std::max(need, buffer_bytes));
            }
            std::memcpy(buffer_.get(), held_.get() + start_, size);
            floor_ = 0;
        }
        start_ = 0;
        end_ = size;
    }

    // Give a grown buffer back once it has not been needed for a while.
    void shrink() {
        if (floor_ != 0 || header_bytes + payload.size() > buffer_bytes) {
            refills_ = 0;
            return;
        }
        if (++refills_ > idle_refills_max) {
            renew(buffer_bytes);
        }
    }

    void renew(std::size_t capacity) {
        buffer_ = std::make_unique_for_overwrite<std::byte[]>(capacity);
        capacity_ = capacity;
        refills_ = 0;
    }

    std::unique_ptr<std::byte[]> buffer_;
    std::size_t capacity_ = 0;
    std::size_t start_ = 0;              // of what is not decoded yet
    std::size_t end_ = 0;                // of what has been read
    std::size_t need_ = 0;               // bytes of the frame at `start_`; 0: not known yet
    std::size_t floor_ = 0;              // below it the buffer is held
    int refills_ = 0;                    // since the grown buffer was last needed
    std::unique_ptr<std::byte[]> held_;  // the other buffer: held, or spare
    std::size_t held_capacity_ = 0;
};

}  // namespace frame
}  // namespace ipc_bridge

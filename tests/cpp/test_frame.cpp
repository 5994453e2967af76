// frame: the outbox and the decoder (proto/FRAME.md); the rules of a header stand in the vectors,
// which test_session.cpp runs. The mirror of tests/test_frame.py.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <ipc_bridge/frame.hpp>

using namespace ipc_bridge;
using namespace ipc_bridge::frame;

namespace {

using Blob = std::vector<std::byte>;

class Dice {
  public:
    explicit Dice(unsigned seed) : engine_(seed) {}
    std::uint32_t operator()() { return static_cast<std::uint32_t>(engine_()); }

  private:
    std::mt19937 engine_;
};

struct Frame {
    Header header;
    Blob payload;
};

Blob random_bytes(Dice& dice, std::size_t size) {
    Blob out(size);
    std::ranges::generate(out, [&] { return static_cast<std::byte>(dice()); });
    return out;
}

// Mostly small, often at the edges of the buffer.
std::size_t random_size(Dice& dice) {
    static constexpr std::size_t edges[] = {
        join_bytes_max,
        join_bytes_max + 1,
        buffer_bytes / 2 - header_bytes,
        buffer_bytes / 2,
        buffer_bytes - header_bytes,
        buffer_bytes - header_bytes + 1,
        buffer_bytes,
        3 * buffer_bytes,
    };
    return dice() % 10 == 0 ? edges[dice() % std::size(edges)] : dice() % 300;
}

Frame item(std::uint32_t call_id, std::uint32_t index, Blob payload) {
    const Header header{
        static_cast<std::uint32_t>(payload.size()), Kind::ITEM, 0, 0, call_id, index};
    return {header, std::move(payload)};
}

void append_to(Blob& wire, const Frame& frame) {
    const Bytes header = std::as_bytes(std::span(&frame.header, 1));
    wire.insert(wire.end(), header.begin(), header.end());
    wire.insert(wire.end(), frame.payload.begin(), frame.payload.end());
}

Blob wire_of(const Frame& frame) {
    Blob wire;
    append_to(wire, frame);
    return wire;
}

bool is_same(Bytes a, Bytes b) {
    return std::ranges::equal(a, b);
}

// One read of at most `most` bytes from the front of `wire`; the count.
std::size_t read_into(Decoder& decoder, Bytes wire, std::size_t most) {
    const std::span<std::byte> space = decoder.space();
    REQUIRE(!space.empty());
    const std::size_t count = std::min({space.size(), wire.size(), most});
    std::memcpy(space.data(), wire.data(), count);
    decoder.filled(count);
    return count;
}

std::size_t feed(Decoder& decoder, Bytes wire, std::size_t most = SIZE_MAX) {
    std::size_t frames = 0;
    while (!wire.empty()) {
        wire = wire.subspan(read_into(decoder, wire, most));
        while (decoder.next()) {
            ++frames;
        }
    }
    return frames;
}

}  // namespace

TEST_CASE("decoder: any chunking gives the same frames") {
    for (unsigned seed = 0; seed < 40; ++seed) {
        CAPTURE(seed);
        Dice dice(seed);
        std::vector<Frame> sent;
        Blob wire;
        for (std::uint32_t i = 0; i < 30; ++i) {
            sent.push_back(item(1, i, random_bytes(dice, random_size(dice))));
            append_to(wire, sent.back());
        }
        Decoder decoder;
        std::size_t got = 0;
        for (Bytes rest = wire; !rest.empty();) {
            const std::size_t most = seed == 0 ? SIZE_MAX : 1 + dice() % (seed * 5000);
            rest = rest.subspan(read_into(decoder, rest, most));
            while (const auto header = decoder.next()) {
                REQUIRE(got < sent.size());
                REQUIRE(std::memcmp(&*header, &sent[got].header, header_bytes) == 0);
                REQUIRE(is_same(decoder.payload, sent[got].payload));
                ++got;
            }
        }
        CHECK(got == sent.size());
        CHECK(decoder.is_clean());
    }
}

TEST_CASE("decoder: byte by byte") {
    Dice dice(1);
    Blob wire;
    for (std::uint32_t i = 0; i < 100; ++i) {
        append_to(wire, item(1, i, random_bytes(dice, i % 40)));
    }
    Decoder decoder;
    CHECK(feed(decoder, wire, 1) == 100);
    CHECK(feed(decoder, Bytes(wire).first(17), 1) == 1);
    CHECK_FALSE(decoder.is_clean());
}

TEST_CASE("decoder: items agree with next") {
    for (unsigned seed = 0; seed < 30; ++seed) {
        CAPTURE(seed);
        Dice dice(seed);
        const std::uint32_t first = 0xFFFFFFFEU;  // the index wraps
        std::vector<Frame> sent;
        Blob wire;
        for (std::uint32_t i = 0; i < 200; ++i) {
            sent.push_back(item(7, first + i, random_bytes(dice, random_size(dice) % 20'000)));
            append_to(wire, sent.back());
        }
        Decoder decoder;
        std::vector<Bytes> views;
        std::size_t got = 0;
        for (Bytes rest = wire; !rest.empty();) {
            rest = rest.subspan(read_into(decoder, rest, 1 + dice() % 90'000));
            while (true) {
                const std::int64_t bytes_max = static_cast<std::int64_t>(dice() % 3000) - 100;
                decoder.items(7, first + static_cast<std::uint32_t>(got), bytes_max, views);
                std::int64_t cost = 0;
                for (const Bytes& view : views) {
                    REQUIRE(cost < bytes_max);
                    REQUIRE(is_same(view, sent[got++].payload));
                    cost += static_cast<std::int64_t>(header_bytes + view.size());
                }
                if (decoder.next()) {
                    REQUIRE(is_same(decoder.payload, sent[got++].payload));
                } else {
                    break;
                }
            }
        }
        CHECK(got == sent.size());
    }
}

TEST_CASE("decoder: items stop at any frame that is not the next one") {
    const Header good{1, Kind::ITEM, 0, 0, 7, 5};
    std::vector<Header> others(7, good);
    others[0].kind = Kind::END;
    others[1].flags = 1;
    others[2].code = 1;
    others[3].call_id = 8;
    others[4].value = 6;
    others[5].payload_size = 2;     // not whole
    others[6].payload_size = 1025;  // above the limit
    for (const Header& other : others) {
        Blob wire = wire_of(item(7, 4, Blob(3)));
        // whole, so that only the limit can stop it
        append_to(wire, {other, Blob(other.payload_size > 1024 ? other.payload_size : 1)});
        Decoder decoder(1024);
        read_into(decoder, wire, SIZE_MAX);
        std::vector<Bytes> views;
        decoder.items(7, 4, 1'000'000, views);
        CHECK(views.size() == 1);
        decoder.items(7, 5, 1'000'000, views);
        CHECK(views.empty());
    }
}

TEST_CASE("decoder: a held payload stays while others come") {
    for (const std::size_t size :
         {std::size_t{0},
          std::size_t{1},
          std::size_t{100},
          buffer_bytes - header_bytes - 1,
          buffer_bytes - header_bytes,
          buffer_bytes,
          4 * buffer_bytes}) {
        CAPTURE(size);
        Dice dice(1);
        const Blob request = random_bytes(dice, size);
        Decoder decoder;
        CHECK(feed(decoder, wire_of(item(1, 0, request))) == 1);
        const Bytes view = decoder.payload;
        decoder.hold();
        for (unsigned round = 0; round < 20; ++round) {
            CHECK(feed(decoder, wire_of(item(1, 0, random_bytes(dice, random_size(dice))))) == 1);
        }
        CHECK(is_same(view, request));
        decoder.release();
        CHECK(decoder.space().size() >= header_bytes + size);  // what has grown is there again
        CHECK(feed(decoder, wire_of(item(1, 0, request))) == 1);
        CHECK(is_same(decoder.payload, request));
    }
}

TEST_CASE("decoder: it grows, reads a large payload in its place, and shrinks back") {
    Decoder decoder;
    const Blob large = wire_of(item(1, 0, Blob(8 * buffer_bytes)));
    const Blob small = wire_of(item(1, 0, Blob(1)));
    CHECK(feed(decoder, Bytes(large).first(1000)) == 0);
    CHECK(decoder.space().size() == large.size() - 1000);
    CHECK(feed(decoder, Bytes(large).subspan(1000)) == 1);
    for (int i = 0; i < idle_refills_max; ++i) {
        CHECK(feed(decoder, small) == 1);
    }
    CHECK(decoder.space().size() > buffer_bytes);
    for (int i = 0; i < 3; ++i) {
        CHECK(feed(decoder, small) == 1);
    }
    CHECK(decoder.space().size() <= buffer_bytes);
}

TEST_CASE("decoder: a refused size makes no room") {
    for (const std::uint32_t size : {payload_bytes_max + 1, u32_max}) {
        Decoder decoder;
        const Header header{size, Kind::CALL, 0, 1, 1, 0};
        read_into(decoder, std::as_bytes(std::span(&header, 1)), SIZE_MAX);
        CHECK_THROWS_AS(decoder.next(), ProtocolError);
        CHECK_THROWS_AS(decoder.next(), ProtocolError);
        CHECK(decoder.space().size() <= buffer_bytes);
    }
}

TEST_CASE("decoder: garbage gives protocol errors only") {
    for (unsigned seed = 0; seed < 2000; ++seed) {
        CAPTURE(seed);
        Dice dice(seed);
        Blob wire = random_bytes(dice, 200);
        if (seed % 2 == 0) {  // a kind that exists, so that more is looked at
            for (std::size_t at = 0; at + 8 < wire.size(); at += 16) {
                wire[at + 1] = wire[at + 2] = wire[at + 3] = std::byte{0};
                wire[at + 4] = static_cast<std::byte>(1 + dice() % 7);
                wire[at + 5] = wire[at + 6] = wire[at + 7] = std::byte{0};
            }
        }
        Decoder decoder(1024);
        try {
            feed(decoder, wire, 1 + dice() % 64);
        } catch (const ProtocolError&) {
            CHECK_THROWS_AS(decoder.next(), ProtocolError);
        }
    }
}

TEST_CASE("outbox: order through partial writes, own and clear") {
    for (unsigned seed = 0; seed < 200; ++seed) {
        CAPTURE(seed);
        Dice dice(seed);
        Outbox outbox;
        std::vector<Blob> lent;  // what may be held by reference
        Blob waiting;
        const auto write = [&](std::size_t most) {
            Blob out;
            for (const Bytes part : outbox.buffers()) {
                REQUIRE(!part.empty());
                out.insert(out.end(), part.begin(), part.end());
            }
            REQUIRE(out.size() <= waiting.size());
            REQUIRE(std::equal(out.begin(), out.end(), waiting.begin()));
            const std::size_t count = std::min(most, out.size());
            if (dice() % 4 == 0) {  // an asynchronous driver may add while it writes
                const Header header{0, Kind::CREDIT, 0, 0, 1, 9};
                outbox.put(header);
                append_to(waiting, {header, {}});
            }
            outbox.sent(count);
            waiting.erase(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(count));
        };
        for (int step = 0; step < 60; ++step) {
            const unsigned choice = dice() % 20;
            if (choice < 8) {
                const std::size_t size =
                    dice() % 3 == 0 ? join_bytes_max + dice() % 3 : dice() % 50;
                const Frame frame = item(1, 0, random_bytes(dice, size));
                append_to(waiting, frame);
                lent.push_back(frame.payload);
                outbox.put(frame.header, lent.back());
            } else if (choice < 18) {
                write(1 + dice() % (choice < 14 ? 100 : 100'000));
            } else if (choice == 18) {
                outbox.own();
                for (Blob& payload : lent) {
                    std::ranges::fill(payload, std::byte{0x3F});
                }
                lent.clear();
            } else {
                outbox.clear();
                waiting.clear();
            }
            REQUIRE(outbox.size() == waiting.size());
        }
        while (!waiting.empty()) {
            write(SIZE_MAX);
        }
    }
}

TEST_CASE("outbox: small payloads are copied and joined, large ones are neither") {
    Outbox outbox;
    Blob small(join_bytes_max, std::byte{1});
    const Blob large(join_bytes_max + 1, std::byte{2});
    outbox.put({0, Kind::CANCEL, 0, 0, 1, 0});
    outbox.put({static_cast<std::uint32_t>(small.size()), Kind::ITEM, 0, 0, 1, 0}, small);
    outbox.put({static_cast<std::uint32_t>(large.size()), Kind::ITEM, 0, 0, 1, 1}, large);
    outbox.put({0, Kind::CANCEL, 0, 0, 1, 0});
    std::ranges::fill(small, std::byte{3});
    const std::span<const Bytes> buffers = outbox.buffers();
    REQUIRE(buffers.size() == 3);
    CHECK(buffers[0].size() == 3 * header_bytes + small.size());
    CHECK(buffers[0][2 * header_bytes] == std::byte{1});
    CHECK(buffers[1].data() == large.data());
    outbox.sent(buffers[0].size() + 5);
    CHECK(outbox.buffers()[0].data() == large.data() + 5);
}

TEST_CASE("outbox: more buffers than one write takes") {
    Outbox outbox;
    std::vector<Blob> lent;
    Blob waiting;
    for (std::size_t i = 0; i < iovec_max; ++i) {  // two buffers each
        Frame frame = item(1, 0, Blob(join_bytes_max + 1, static_cast<std::byte>(i)));
        append_to(waiting, frame);
        lent.push_back(std::move(frame.payload));
        outbox.put(frame.header, lent.back());
    }
    CHECK(outbox.buffers().size() == iovec_max);
    outbox.sent(100);
    outbox.own();
    lent.clear();
    Blob out(waiting.begin(), waiting.begin() + 100);
    while (outbox.size() != 0) {
        std::size_t count = 0;
        for (const Bytes part : outbox.buffers()) {
            out.insert(out.end(), part.begin(), part.end());
            count += part.size();
        }
        outbox.sent(count);
    }
    CHECK(is_same(out, waiting));
}

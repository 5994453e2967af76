// The client over a stream that fails, or brings much at once. Its Python twin is
// tests/test_client.py (and test_batches.py).
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <ipc_bridge/client.hpp>
#include <ipc_bridge/handlers.hpp>

namespace {

using namespace ipc_bridge;

using Blob = std::vector<std::byte>;

// What a session has to say.
Blob said(Session& session) {
    Blob all;
    for (const auto& part : session.outbox.buffers()) {
        all.insert(all.end(), part.begin(), part.end());
    }
    session.outbox.sent(all.size());
    return all;
}

enum class At { NOWHERE, READ, WRITE, READ_WHILE_FULL };

// What the test knows of a stream that the client owns.
struct Script {
    std::vector<Blob> reads;  // what each read brings, after the hello
    std::exception_ptr failure = nullptr;
    At at = At::NOWHERE;
    bool is_closed = false;
};

// Takes what is written, and gives a server's hello; then the script, and then the failure.
class Scripted : public Stream {
  public:
    explicit Scripted(Script& script) : Stream(Wait::BLOCK), script_(script) {
        ServerSession server;
        script_.reads.insert(script_.reads.begin(), said(server));
    }

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override {
        if (next_ == script_.reads.size()) {
            fail_at(At::READ);
            return end_of_stream;
        }
        const Blob& bytes = script_.reads[next_++];
        REQUIRE(bytes.size() <= buffer.size());
        std::memcpy(buffer.data(), bytes.data(), bytes.size());
        return static_cast<std::ptrdiff_t>(bytes.size());
    }

    std::ptrdiff_t try_write(std::span<const std::span<const std::byte>> buffers) override {
        fail_at(At::WRITE);
        if (next_ > 0 && script_.at == At::READ_WHILE_FULL) {
            return would_block;
        }
        std::size_t size = 0;
        for (const auto& buffer : buffers) {
            size += buffer.size();
        }
        return static_cast<std::ptrdiff_t>(size);
    }

    bool wait(bool /*readable*/, bool /*writable*/, std::int64_t /*deadline_ns*/) override {
        fail_at(At::READ_WHILE_FULL);
        return true;
    }

    int fileno() const override { return -1; }
    void interrupt() override {}
    void close() override { script_.is_closed = true; }

  private:
    void fail_at(At at) const {
        if (next_ > 0 && script_.at == at) {
            std::rethrow_exception(script_.failure);
        }
    }

    Script& script_;
    std::size_t next_ = 0;
};

// Leads to one stream.
class To : public Transport {
  public:
    explicit To(Script& script) : script_(script) { url = "here"; }
    std::unique_ptr<Stream> connect(std::int64_t /*deadline_ns*/) override {
        return std::make_unique<Scripted>(script_);
    }
    std::unique_ptr<Listener> listen() override { return nullptr; }

  private:
    Script& script_;
};

// Frames of a server, by hand.
Blob frame_of(const frame::Header& header, Bytes payload = {}) {
    Blob bytes(sizeof(header));
    std::memcpy(bytes.data(), &header, sizeof(header));
    bytes.insert(bytes.end(), payload.begin(), payload.end());
    return bytes;
}

Blob item(std::uint32_t index, Bytes payload) {
    const auto size = static_cast<std::uint32_t>(payload.size());
    return frame_of({size, Kind::ITEM, 0, 0, 1, index}, payload);
}

Blob end() {
    return frame_of({0, Kind::END, 0, 0, 1, 0});
}

Blob joined(const std::vector<Blob>& parts) {
    Blob all;
    for (const Blob& part : parts) {
        all.insert(all.end(), part.begin(), part.end());
    }
    return all;
}

std::vector<std::string> texts_of(std::span<const Bytes> views) {
    std::vector<std::string> texts;
    for (const Bytes& view : views) {
        texts.emplace_back(text_of(view));
    }
    return texts;
}

using Texts = std::vector<std::string>;

}  // namespace

TEST_CASE("what a stream throws ends the connection, as its end-of-file does") {
    const std::exception_ptr failures[] = {
        std::make_exception_ptr(ProtocolError("a record of an impossible size", "here")),
        std::make_exception_ptr(SystemError("read", EIO, "here"))};
    const std::function<void(Client&)> calls[] = {
        [](Client& client) { client.call(1, bytes_of("hello")); },
        [](Client& client) {
            for (const Bytes item : client.call_stream(2)) {
                CHECK(item.empty());
            }
        },
        [](Client& client) { client.call_stream(2).next_batch(); },
    };
    for (const auto& failure : failures) {
        for (const At at : {At::READ, At::WRITE, At::READ_WHILE_FULL}) {
            for (const auto& call : calls) {
                Script script;
                script.failure = failure;
                script.at = at;
                To transport(script);
                Client client(transport);
                CHECK_THROWS_AS(call(client), Error);
                CHECK(script.is_closed);
                CHECK_THROWS_WITH_AS(
                    client.call(1), "UNAVAILABLE: the connection is closed, here", CallError
                );
            }
        }
    }
}

TEST_CASE("no method has the number 0") {
    Script script;
    To transport(script);
    Client client(transport);
    const char* what = "INVALID_ARGUMENT: method 0 is not within 1 to 65535, here";
    CHECK_THROWS_WITH_AS(client.call(0), what, UsageError);
    CHECK_THROWS_WITH_AS(client.call_stream(0), what, UsageError);
    CHECK(!script.is_closed);
    Service service;
    CHECK_THROWS_AS(service.unary(0, {}), UsageError);
    CHECK_THROWS_AS(service.streaming(0, {}), UsageError);
}

TEST_CASE("next_batch gives all items that are here, each once, whatever came before") {
    const Bytes a = bytes_of("a");
    const Bytes b = bytes_of("bb");
    const auto script_of = [&] {
        Script script;
        script.reads = {
            joined({item(0, a), item(1, b), item(2, {}), item(3, a)}),  // many in one read
            item(4, b),                                                 // one alone
            joined({item(5, a), item(6, b), end()}),                    // and the end behind
        };
        return script;
    };

    SUBCASE("batches alone") {
        Script script = script_of();
        To transport(script);
        Client client(transport);
        Items items = client.call_stream(2);
        Texts all;
        std::size_t largest = 0;  // the item for which it waited may come by itself
        for (auto batch = items.next_batch(); !batch.empty(); batch = items.next_batch()) {
            largest = std::max(largest, batch.size());
            std::ranges::copy(texts_of(batch), std::back_inserter(all));
        }
        CHECK(all == Texts{"a", "bb", "", "a", "bb", "a", "bb"});
        CHECK(largest >= 3);
        CHECK(items.next_batch().empty());
        CHECK_FALSE(items.next());
    }

    SUBCASE("after some were taken one by one, the rest") {
        Script script = script_of();
        To transport(script);
        Client client(transport);
        Items items = client.call_stream(2);
        CHECK(text_of(items.next().value()) == "a");
        CHECK(texts_of(items.next_batch()) == Texts{"bb", "", "a"});
        CHECK(text_of(items.next().value()) == "bb");
        CHECK(text_of(items.next().value()) == "a");
        CHECK(texts_of(items.next_batch()) == Texts{"bb"});
        CHECK_FALSE(items.next());
        CHECK(items.next_batch().empty());
    }

    SUBCASE("a large item in pieces is a batch of one") {
        const Blob much(300'000, std::byte{7});
        const Blob whole = item(0, much);
        Script script;
        for (std::size_t at = 0; at < whole.size();) {
            const std::size_t count = std::min<std::size_t>(4096, whole.size() - at);
            const auto from = whole.begin() + static_cast<std::ptrdiff_t>(at);
            script.reads.emplace_back(from, from + static_cast<std::ptrdiff_t>(count));
            at += count;
        }
        script.reads.push_back(end());
        To transport(script);
        Client client(transport);
        Items items = client.call_stream(2);
        const auto batch = items.next_batch();
        REQUIRE(batch.size() == 1);
        CHECK(std::ranges::equal(batch[0], much));
        CHECK(items.next_batch().empty());
    }

    SUBCASE("an end that is not OK is thrown, after the items before it") {
        const std::string why = "it went wrong";
        Script script;
        const auto size = static_cast<std::uint32_t>(why.size());
        const frame::Header aborted{size, Kind::END, 0, std::uint16_t(Status::ABORTED), 1, 0};
        script.reads = {joined({item(0, a), frame_of(aborted, bytes_of(why))})};
        To transport(script);
        Client client(transport);
        Items items = client.call_stream(2);
        CHECK(texts_of(items.next_batch()) == Texts{"a"});
        CHECK_THROWS_WITH_AS(items.next_batch(), "ABORTED: it went wrong, here", CallError);
        CHECK(items.next_batch().empty());
    }

    SUBCASE("more than half the window at once is left for the next, and its credit comes back") {
        ConnectOptions options;
        options.window_bytes = 100;
        Script script;
        script.reads = {
            joined({item(0, a), item(1, a), item(2, a), item(3, a), item(4, a), item(5, a)}),
            end()};
        To transport(script);
        Client client(transport, options);
        Items items = client.call_stream(2);
        Texts all;
        for (auto batch = items.next_batch(); !batch.empty(); batch = items.next_batch()) {
            CHECK(batch.size() <= 4);
            std::ranges::copy(texts_of(batch), std::back_inserter(all));
        }
        CHECK(all == Texts(6, "a"));
    }
}

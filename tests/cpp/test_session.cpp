// session: who may say what, and when (proto/FRAME.md, proto/frame_vectors.json).
//
// The vectors are shared with tests/test_session.py. The rest joins two sessions by channels that
// lose nothing, and lets both applications do what they may in any order.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <ipc_bridge/session.hpp>

using namespace ipc_bridge;
using Json = nlohmann::json;

namespace {

using Blob = std::vector<std::byte>;

class Dice {
  public:
    explicit Dice(unsigned seed) : engine_(seed) {}
    std::uint32_t operator()() { return static_cast<std::uint32_t>(engine_()); }

  private:
    std::mt19937 engine_;
};

// An explicit instantiation may name private members: how the tests set a counter near its end.
template <class Tag, typename Tag::Type member>
struct Opened {
    friend typename Tag::Type private_member(Tag) { return member; }
};
struct ClientCallId {
    using Type = std::uint32_t ClientSession::*;
    friend Type private_member(ClientCallId);
};
struct ClientAnswerId {
    using Type = std::uint32_t ClientSession::*;
    friend Type private_member(ClientAnswerId);
};
struct ClientIndex {
    using Type = std::uint32_t ClientSession::*;
    friend Type private_member(ClientIndex);
};
struct ServerCallId {
    using Type = std::uint32_t ServerSession::*;
    friend Type private_member(ServerCallId);
};
struct ServerIndex {
    using Type = std::uint32_t ServerSession::*;
    friend Type private_member(ServerIndex);
};
template struct Opened<ClientCallId, &ClientSession::call_id_>;
template struct Opened<ClientAnswerId, &ClientSession::answer_id_>;
template struct Opened<ClientIndex, &ClientSession::index_>;
template struct Opened<ServerCallId, &ServerSession::call_id_>;
template struct Opened<ServerIndex, &ServerSession::index_>;

void set_last_call_id(ClientSession& session, std::uint32_t value) {
    session.*private_member(ClientCallId{}) = value;
    session.*private_member(ClientAnswerId{}) = next_id(value);
}

void set_last_call_id(ServerSession& session, std::uint32_t value) {
    session.*private_member(ServerCallId{}) = value;
}

void set_next_item(ClientSession& session, std::uint32_t value) {
    session.*private_member(ClientIndex{}) = value;
}

void set_next_item(ServerSession& session, std::uint32_t value) {
    session.*private_member(ServerIndex{}) = value;
}

void filled(ClientSession& session, std::size_t count) {
    session.filled(count);
}
void filled(ServerSession& session, std::size_t count) {
    session.decoder.filled(count);
}

// One read of the driver; the count of bytes that found room.
template <class Side>
std::size_t read_into(Side& session, Bytes wire, std::size_t most = SIZE_MAX) {
    const std::span<std::byte> space = session.decoder.space();
    REQUIRE(!space.empty());
    const std::size_t count = std::min({space.size(), wire.size(), most});
    std::memcpy(space.data(), wire.data(), count);
    filled(session, count);
    return count;
}

// One write of the driver, of at most `most` bytes.
Blob written(Session& session, std::size_t most = SIZE_MAX) {
    Blob out;
    for (const Bytes part : session.outbox.buffers()) {
        const Bytes now = part.first(std::min(part.size(), most - out.size()));
        out.insert(out.end(), now.begin(), now.end());
    }
    if (!out.empty()) {
        session.outbox.sent(out.size());
    }
    return out;
}

std::string hex_of(Bytes bytes) {
    static constexpr char digits[] = "0123456789abcdef";
    std::string out;
    for (const std::byte byte : bytes) {
        out += digits[std::to_integer<unsigned>(byte) >> 4U];
        out += digits[std::to_integer<unsigned>(byte) & 15U];
    }
    return out;
}

// The vectors' hex: a string or a list of them; 61*1024 is a byte 1024 times.
Blob from_hex(const Json& value) {
    Blob out;
    if (value.is_array()) {
        for (const Json& part : value) {
            const Blob bytes = from_hex(part);
            out.insert(out.end(), bytes.begin(), bytes.end());
        }
        return out;
    }
    std::istringstream words(value.get<std::string>());
    for (std::string word; words >> word;) {
        const std::size_t star = word.find('*');
        const int times = star == std::string::npos ? 1 : std::stoi(word.substr(star + 1));
        const std::string digits = word.substr(0, star);
        for (int i = 0; i < times; ++i) {
            for (std::size_t at = 0; at < digits.size(); at += 2) {
                out.push_back(static_cast<std::byte>(std::stoi(digits.substr(at, 2), nullptr, 16)));
            }
        }
    }
    return out;
}

std::string message_of(const Json& step) {
    return step.contains("message_hex") ? std::string(text_of(from_hex(step["message_hex"])))
                                        : step["message"].get<std::string>();
}

// An expected event, in the form that `VectorRun::add_event` gives.
Json plain(Json event) {
    if (event.contains("payload")) {
        event["payload"] = hex_of(from_hex(event["payload"]));
    }
    if (event.contains("message_hex")) {
        event["message"] = message_of(event);
        event.erase("message_hex");
    }
    return event;
}

// Runs the steps of a vector on a session; `read_bytes` at a time arrive.
template <class Side>
class VectorRun {
  public:
    VectorRun(const Json& vectors, const Json& vector, std::size_t read_bytes, bool by_items)
        : session_(
              vector.value("window", std::uint32_t{4} << 20),
              vector.value("max_payload", std::uint32_t{64} << 20)
          ),
          read_bytes_(read_bytes),
          by_items_(by_items) {
        if (vector.contains("after")) {
            for (const Json& step : vectors["openings"][vector["after"].get<std::string>()]) {
                run(step);
            }
        }
        for (const Json& step : vector["steps"]) {
            run(step);
        }
    }

  private:
    void run(const Json& step) {
        const std::string shown = step.dump();
        CAPTURE(shown);
        events_ = Json::array();
        std::string error;
        try {
            if (step.contains("receive")) {
                receive(from_hex(step["receive"]));
            } else if (step.contains("local")) {
                act(step, step["local"].get<std::string>());
            }
            take_events();
        } catch (const Error& raised) {
            error = raised.what();
        }
        CHECK(error == step.value("error", ""));
        Json expected = Json::array();
        for (const Json& event : step.value("events", Json::array())) {
            expected.push_back(plain(event));
        }
        CHECK(events_.dump() == expected.dump());
        if (step.contains("sends")) {
            CHECK(hex_of(written(session_)) == hex_of(from_hex(step["sends"])));
        }
        if (step.contains("state")) {
            CHECK(name_of(session_.state) == step["state"].get<std::string>());
        }
        if constexpr (std::is_same_v<Side, ServerSession>) {
            if (step.contains("credit")) {
                CHECK(session_.credit == step["credit"].get<std::int64_t>());
            }
        }
    }

    void receive(const Blob& wire) {
        for (Bytes rest = wire; !rest.empty();) {
            rest = rest.subspan(read_into(session_, rest, read_bytes_));
            take_events();
        }
    }

    void take_events() {
        while (true) {
            if constexpr (std::is_same_v<Side, ClientSession>) {
                if (by_items_) {
                    for (const Bytes view : session_.items()) {
                        events_.push_back({{"event", "ITEM"}, {"payload", hex_of(view)}});
                    }
                }
            }
            const std::optional<Kind> kind = session_.next_event();
            if (!kind) {
                return;
            }
            add_event(*kind);
        }
    }

    void add_event(Kind kind) {
        Json event = {{"event", std::string(name_of(kind))}};
        if (kind == Kind::CALL) {
            event["method"] = session_.method;
            event["streaming"] = session_.streaming;
            event["remaining_ms"] = session_.remaining_ms;
        }
        if (kind == Kind::END) {
            event["status"] = static_cast<int>(session_.status);
        }
        if (kind == Kind::END && session_.status != Status::OK) {
            event["message"] = session_.message;
        } else if (kind != Kind::CANCEL) {
            event["payload"] = hex_of(session_.payload);
        }
        events_.push_back(event);
    }

    void act(const Json& step, const std::string& name) {
        payload_ = from_hex(step.value("payload", ""));
        if (name == "farewell") {
            session_.farewell(Status{step["status"].get<std::uint16_t>()}, message_of(step));
        } else if (name == "end_of_input") {
            if (const std::optional<Kind> kind = session_.end_of_input()) {
                add_event(*kind);
            }
        } else if (name == "last_call_id") {
            set_last_call_id(session_, step["value"].get<std::uint32_t>());
        } else if (name == "next_item") {
            set_next_item(session_, step["value"].get<std::uint32_t>());
        } else if constexpr (std::is_same_v<Side, ClientSession>) {
            if (name == "call") {
                session_.call(
                    step["method"].get<std::uint16_t>(),
                    payload_,
                    step["streaming"].get<bool>(),
                    step["remaining_ms"].get<std::uint32_t>()
                );
            } else if (name == "cancel") {
                session_.cancel();
            } else if (name == "consumed") {
                session_.consumed();
            } else {
                FAIL("unknown step " << name);
            }
        } else {
            if (name == "item") {
                session_.item(payload_);
            } else if (name == "end") {
                session_.end(payload_);
            } else if (name == "fail") {
                session_.fail(Status{step["status"].get<std::uint16_t>()}, message_of(step));
            } else if (name == "drain") {
                session_.drain();
            } else {
                FAIL("unknown step " << name);
            }
        }
    }

    Side session_;
    std::size_t read_bytes_;
    bool by_items_;
    Json events_;
    Blob payload_;
};

}  // namespace

TEST_CASE("session: the vectors") {
    const auto root = std::filesystem::path(__FILE__).parent_path().parent_path().parent_path();
    const Json vectors = Json::parse(std::ifstream(root / "proto" / "frame_vectors.json"));
    REQUIRE(vectors["vectors"].size() > 250);
    for (const Json& vector : vectors["vectors"]) {
        const std::string name = vector["name"].get<std::string>();
        for (const std::size_t read_bytes : {SIZE_MAX, std::size_t{1}, std::size_t{7}}) {
            CAPTURE(name);
            CAPTURE(read_bytes);
            if (vector["side"] == "client") {
                VectorRun<ClientSession>(vectors, vector, read_bytes, false);
                VectorRun<ClientSession>(vectors, vector, read_bytes, true);
            } else {
                VectorRun<ServerSession>(vectors, vector, read_bytes, false);
            }
        }
    }
}

TEST_CASE("session: options out of range") {
    CHECK_THROWS_AS(ClientSession(0, 1), UsageError);
    CHECK_THROWS_AS(ServerSession(window_bytes_limit + 1, 1), UsageError);
    CHECK_THROWS_AS(ServerSession(1, frame::payload_bytes_limit + 1), UsageError);
    CHECK_NOTHROW(ClientSession(1, 0));
    CHECK_NOTHROW(ServerSession(window_bytes_limit, frame::payload_bytes_limit));
}

TEST_CASE("session: ids skip 0") {
    CHECK(next_id(0) == 1);
    CHECK(next_id(0xFFFFFFFEU) == 0xFFFFFFFFU);
    CHECK(next_id(0xFFFFFFFFU) == 1);
}

TEST_CASE("session: is_utf8 agrees with a decoder of code points") {
    const auto is_valid = [](std::string_view text) {  // by the definition, one by one
        for (std::size_t i = 0; i < text.size();) {
            const auto lead = static_cast<unsigned char>(text[i]);
            const int size = lead < 0x80   ? 1
                             : lead < 0xC0 ? 0
                             : lead < 0xE0 ? 2
                             : lead < 0xF0 ? 3
                                           : 4;
            std::uint32_t point = size == 1 ? lead : lead & (0x7FU >> size);
            if (size == 0 || lead >= 0xF8 || i + static_cast<std::size_t>(size) > text.size()) {
                return false;
            }
            for (int k = 1; k < size; ++k) {
                const auto next = static_cast<unsigned char>(text[i + static_cast<std::size_t>(k)]);
                if (next >> 6U != 2) {
                    return false;
                }
                point = point << 6U | (next & 0x3FU);
            }
            static constexpr std::uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
            if (point < least[size] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) {
                return false;
            }
            i += static_cast<std::size_t>(size);
        }
        return true;
    };
    static constexpr unsigned char bytes[] = {0x00, 0x61, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF,
                                              0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE,
                                              0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xF8, 0xFE, 0xFF};
    Dice dice(1);
    for (int n = 0; n < 200'000; ++n) {
        std::string text(1 + dice() % 12, ' ');
        std::ranges::generate(text, [&] {
            return static_cast<char>(bytes[dice() % std::size(bytes)]);
        });
        if (is_utf8(text) != is_valid(text)) {
            FAIL(hex_of(bytes_of(text)));
        }
    }
    CHECK_FALSE(is_utf8(std::string(20, '\x80')));
}

TEST_CASE("session: a CREDIT counts only for what is read after it") {
    for (const bool by_items : {false, true}) {
        ClientSession client(32);
        ServerSession server;
        read_into(server, written(client));
        read_into(client, written(server));
        CHECK(client.next_event() == std::nullopt);
        CHECK(server.next_event() == std::nullopt);
        client.call(2, {}, true, 0);
        read_into(server, written(client));
        CHECK(server.next_event() == Kind::CALL);
        const Blob one(1);
        server.item({});
        server.item({});
        server.item(one);  // a server that overruns its credit
        read_into(client, written(server));
        CHECK(client.items().size() == 2);
        client.consumed();
        CHECK(client.outbox.size() == frame::header_bytes);
        if (by_items) {
            CHECK(client.items().empty());
        }
        CHECK_THROWS_AS(client.next_event(), ProtocolError);
        CHECK_THROWS_AS(client.next_event(), ProtocolError);
    }
}

namespace {

// Two sessions and the channels between them; both applications do what they may, in any order.
class Joined {
  public:
    explicit Joined(unsigned seed)
        : dice_(seed), client_(pick({1, 16, 50, 300, 5000, 300'000})), server_(1) {
        const std::uint32_t last_id = pick({0, 0xFFFFFFFDU, 0xFFFFFFFEU, 0xFFFFFFFFU});
        set_last_call_id(client_, last_id);
        set_last_call_id(server_, last_id);
    }

    void run() {
        for (int step = 0; step < 400; ++step) {
            act(dice_() % 10);
            check();
        }
        while (client_.outbox.size() != 0 || server_.outbox.size() != 0 || !up_.empty() ||
               !down_.empty() || server_.state == State::RUNNING) {
            client_.consumed();
            move(SIZE_MAX);
            end();
        }
        check();
        CHECK(client_.state != State::OPEN);
        for (const auto& made : calls_) {
            CHECK(made->results == 1);
        }
    }

    int answered = 0;
    int given_up = 0;

  private:
    struct Made {
        bool streaming = false;
        Blob request;
        std::vector<Blob> sent;  // items of the server
        std::size_t got = 0;     // of them, at the client
        bool ended = false;      // by the server
        int results = 0;         // at the client
    };

    std::uint32_t pick(std::initializer_list<std::uint32_t> from) {
        return from.begin()[dice_() % from.size()];
    }

    Blob bytes(std::size_t size) {
        Blob out(size);
        std::ranges::generate(out, [&] { return static_cast<std::byte>(dice_()); });
        return out;
    }

    void act(unsigned choice) {
        if (choice == 0 && client_.state == State::IDLE) {
            calls_.push_back(std::make_unique<Made>());
            Made& made = *calls_.back();
            made.streaming = dice_() % 3 != 0;
            made.request = bytes(pick({0, 1, 100, 16385, 140'000, 300'000}));
            client_.call(7, made.request, made.streaming, 0);
        } else if (choice == 1 && dice_() % 3 == 0 && client_.state == State::OPEN) {
            client_.cancel();
            ++calls_.back()->results;
            ++given_up;
        } else if (choice == 2) {
            client_.consumed();
        } else if (choice == 3 && dice_() % 4 == 0) {
            end();
        } else if (choice < 6) {
            items();
        } else {
            move(pick({1, 16, 40, 20'000, 1U << 30}));
        }
    }

    void items() {
        for (unsigned n = dice_() % 5; n > 0; --n) {
            if (server_.state != State::RUNNING || server_.cancelled || server_.credit <= 0 ||
                !running().streaming) {
                return;
            }
            running().sent.push_back(bytes(pick({0, 1, 8, 100, 16384, 16385, 140'000})));
            server_.item(running().sent.back());
        }
    }

    void end() {
        if (server_.state != State::RUNNING) {
            return;
        }
        running().ended = true;
        server_.outbox.own();
        if (server_.cancelled || dice_() % 5 == 0) {
            server_.fail(Status::CANCELLED, "no");
        } else {
            server_.end(running().streaming ? Bytes{} : server_.payload);
        }
    }

    void move(std::size_t most) {
        append(up_, written(client_, most));
        append(down_, written(server_, most));
        server_steps();
        if (!up_.empty() && server_may_read()) {
            take(up_, read_into(server_, up_, most));
            server_steps();
        }
        if (!down_.empty()) {
            take(down_, read_into(client_, down_, most));
            client_steps();
        }
    }

    bool server_may_read() const {
        return !server_.cancelled &&
               (server_.state == State::RUNNING || server_.outbox.size() == 0);
    }

    void server_steps() {
        while (server_may_read()) {
            if (server_.state == State::IDLE) {
                server_.decoder.release();
            }
            const std::optional<Kind> event = server_.next_event();
            if (!event) {
                return;
            }
            if (event == Kind::CALL) {
                ++accepted_;
                CHECK(server_.streaming == running().streaming);
                request_ = server_.payload;
            }
        }
    }

    void client_steps() {
        while (true) {
            if (dice_() % 2 == 0) {
                for (const Bytes view : client_.items()) {
                    got(view);
                }
            }
            const std::optional<Kind> event = client_.next_event();
            if (!event) {
                return;
            }
            if (event == Kind::ITEM) {
                got(client_.payload);
                continue;
            }
            Made& made = *calls_.back();
            ++made.results;
            ++answered;
            REQUIRE(made.ended);
            if (client_.status == Status::OK) {
                REQUIRE(made.got == made.sent.size());
                const Bytes reply = made.streaming ? Bytes{} : Bytes(made.request);
                REQUIRE(std::ranges::equal(client_.payload, reply));
            }
        }
    }

    void got(Bytes view) {
        Made& made = *calls_.back();
        REQUIRE(made.got < made.sent.size());
        REQUIRE(std::ranges::equal(view, made.sent[made.got++]));
    }

    void check() {
        if (server_.state == State::RUNNING) {
            REQUIRE(std::ranges::equal(request_, running().request));
            std::int64_t ahead = 0;
            for (std::size_t i = running().got; i < running().sent.size(); ++i) {
                ahead += static_cast<std::int64_t>(frame::header_bytes + running().sent[i].size());
            }
            REQUIRE(ahead < client_.window_bytes + 16 + 140'000);
        }
        if (!calls_.empty()) {
            REQUIRE(calls_.back()->results == (client_.state == State::OPEN ? 0 : 1));
        }
    }

    Made& running() { return *calls_[accepted_ - 1]; }

    static void append(Blob& to, const Blob& bytes) {
        to.insert(to.end(), bytes.begin(), bytes.end());
    }

    static void take(Blob& from, std::size_t count) {
        from.erase(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(count));
    }

    Dice dice_;
    ClientSession client_;
    ServerSession server_;
    Blob up_;
    Blob down_;
    std::vector<std::unique_ptr<Made>> calls_;
    std::size_t accepted_ = 0;
    Bytes request_;
};

}  // namespace

TEST_CASE("session: two of them, any order") {
    int answered = 0;
    int given_up = 0;
    for (unsigned seed = 0; seed < 150; ++seed) {
        CAPTURE(seed);
        Joined joined(seed);
        joined.run();
        answered += joined.answered;
        given_up += joined.given_up;
    }
    CHECK(answered > 100);
    CHECK(given_up > 100);
}

TEST_CASE("session: garbage gives protocol errors only") {
    for (unsigned seed = 0; seed < 5000; ++seed) {
        CAPTURE(seed);
        Dice dice(seed);
        ClientSession client;
        ServerSession server;
        Blob hello = written(server);
        Blob wire = hello;
        for (unsigned n = dice() % 6; n > 0; --n) {
            const frame::Header header{
                dice() % 3 == 0 ? dice() % 40 : 0U,
                static_cast<Kind>(1 + dice() % 7),
                static_cast<std::uint8_t>(dice() % 8 == 0),
                static_cast<std::uint16_t>(dice() % 3),
                dice() % 3,
                dice() % 3,
            };
            const Bytes bytes = std::as_bytes(std::span(&header, 1));
            wire.insert(wire.end(), bytes.begin(), bytes.end());
            wire.resize(wire.size() + header.payload_size % 64);
        }
        wire[dice() % wire.size()] ^= static_cast<std::byte>(dice() % 4 == 0 ? 0 : dice() % 256);
        const auto play = [&](auto& session) {
            try {
                for (Bytes rest = wire; !rest.empty();) {
                    rest = rest.subspan(read_into(session, rest, 1 + dice() % 50));
                    while (session.next_event()) {
                        if (session.state == State::CLOSED) {
                            return;
                        }
                    }
                    if (session.cancelled) {
                        return;
                    }
                    if constexpr (std::is_same_v<decltype(session), ClientSession&>) {
                        if (session.state == State::IDLE && dice() % 2 == 0) {
                            session.call(1, {}, true, 0);
                        }
                    }
                }
            } catch (const ProtocolError&) {
                CHECK_THROWS_AS(session.next_event(), ProtocolError);
            } catch (const CallError&) {  // it said GOODBYE
            }
        };
        play(client);
        play(server);
    }
}

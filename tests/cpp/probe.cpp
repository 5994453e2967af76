// The conformance peer, server or client; its Python twin is tests/probe.py.
//
//     probe serve URL [--window N] [--max-payload N] [--clients-max N] [--claims-not-to-block]
//     probe run URL [--window N] [--max-payload N]
//
// `serve` offers echo, stream, and methods that misbehave or tell how the server is. `run` is a
// client that takes a JSON command a line, and answers each by a line: {"ok": true, ...} or
// {"status": ...}. A stream says {"at": n} besides, after n items, if it is asked for this
// "notice".
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <ipc_bridge/endpoint.hpp>

namespace {

using namespace ipc_bridge;
using nlohmann::json;

struct Arguments {
    std::string command;
    std::string url;
    std::uint32_t window = window_bytes_default;
    std::uint32_t max_payload = frame::payload_bytes_max;
    std::size_t clients_max = clients_max_default;
    bool claims_not_to_block = false;  // all handlers, also those that do
};

// --- the server ---

// What the handlers did.
struct Counts {
    std::atomic<int> live = 0;   // handlers that have begun and are not freed yet
    std::atomic<int> ended = 0;  // sleeps, however they ended
    std::atomic<long> made = 0;  // items of method 16
};

Counts counts;

// In a handler, for as long as it lives.
struct Alive {
    Alive() { ++counts.live; }
    Alive(const Alive&) = delete;
    Alive& operator=(const Alive&) = delete;
    ~Alive() { --counts.live; }
};

Payload fail(Call& /*call*/, Bytes /*request*/) {
    throw std::runtime_error("boom");
}

Payload sleep_for(Call& call, Bytes request) {
    double seconds = 0;
    if (request.size() != sizeof(seconds)) {
        throw Error(Status::INVALID_ARGUMENT, "not a number of seconds");
    }
    std::memcpy(&seconds, request.data(), sizeof(seconds));
    const Alive alive;
    call.sleep(seconds);
    ++counts.ended;
    return std::string(call.is_cancelled() ? "cancelled" : "slept");
}

Payload chatter(Call& /*call*/, Bytes request) {
    std::puts("a print in a handler");
    std::fflush(stdout);
    return request;
}

Producer trickle(Call& call, Bytes /*request*/) {
    return [&call, alive = std::make_shared<Alive>()]() -> std::optional<Item> {
        call.sleep(0.001);
        return Payload(std::string(64, '\0'));
    };
}

Producer abort_early(Call& /*call*/, Bytes /*request*/) {
    return [left = 3, alive = std::make_shared<Alive>()]() mutable -> std::optional<Item> {
        if (left-- == 0) {
            throw Error(Status::ABORTED, "enough");
        }
        return Payload(std::string(64, '\0'));
    };
}

Producer give_and_sleep(Call& call, Bytes /*request*/) {
    return [&call, left = 3, alive = std::make_shared<Alive>()]() mutable -> std::optional<Item> {
        if (left-- == 0) {
            call.sleep(60.0);
            return std::nullopt;
        }
        return Payload(std::string(64, '\0'));
    };
}

Producer flood(Call& /*call*/, Bytes /*request*/) {
    const auto block = std::make_shared<const std::vector<std::byte>>(4096);
    return [block, alive = std::make_shared<Alive>()]() -> std::optional<Item> {
        ++counts.made;
        return Payload(Bytes(*block));
    };
}

// Echo and stream, and the methods of the tests.
Service probe_service() {
    const auto number = [](const auto& count) {
        return [&count](Call&, Bytes) -> Payload { return std::to_string(count.load()); };
    };
    Service service = make_service();
    service.unary(10, fail);
    service.unary(11, sleep_for);
    service.unary(12, chatter);
    service.streaming(13, trickle);
    service.unary(14, number(counts.live));
    service.streaming(15, abort_early);
    service.streaming(16, flood);
    service.unary(17, number(counts.made));
    service.unary(18, number(counts.ended));
    service.streaming(19, give_and_sleep);
    return service;
}

Callee* running = nullptr;  // for the signal handler, in the main thread only: it destroys it

void mask_sigterm(int how) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(how, &signals, nullptr);
}

int run_server(const Arguments& arguments) {
    ServeOptions options;
    options.window_bytes = arguments.window;
    options.payload_bytes_max = arguments.max_payload;
    options.clients_max = arguments.clients_max;
    Service service = probe_service();
    service.blocks = !arguments.claims_not_to_block;
    const auto server = serve(arguments.url, std::move(service), options);
    running = server.get();
    signal(SIGTERM, [](int) { running->stop(); });
    if (!server->url.starts_with("stdio:")) {
        std::printf("ready %s\n", server->url.c_str());
        std::fflush(stdout);
    }
    mask_sigterm(SIG_UNBLOCK);
    server->run();
    return 0;
}

// --- the client ---

void say(const json& answer) {
    std::puts(answer.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
    std::fflush(stdout);
}

void need(bool right, const std::string& what) {
    if (!right) {
        throw Error(Status::DATA_LOSS, what);
    }
}

// What stands in a command under a name; nothing if that is missing or null.
template <class Value>
std::optional<Value> find(const json& command, const char* name) {
    const auto found = command.find(name);
    return found == command.end() || found->is_null() ? std::nullopt
                                                      : std::optional(found->get<Value>());
}

std::string payload_of(const json& command) {
    if (const auto seconds = find<double>(command, "seconds")) {
        std::string payload(sizeof(double), '\0');
        std::memcpy(payload.data(), &*seconds, sizeof(double));
        return payload;
    }
    return find<std::string>(command, "text").value_or("");
}

// Does what the commands say.
class Runner {
  public:
    explicit Runner(Bridge bridge) : bridge_(std::move(bridge)) {}

    json answer(const json& command) {
        items_ = 0;
        began_ns_ = now_ns();
        json answer = {{"ok", true}};
        try {
            (this->*ops.at(command.at("op")))(command, answer);
        } catch (const Error& error) {
            answer = {{"status", name_of(error.status)}, {"what", error.message}};
        }
        answer["items"] = items_;
        answer["elapsed_s"] = static_cast<double>(now_ns() - began_ns_) / 1e9;
        return answer;
    }

  private:
    using Verifies = std::function<bool(std::uint64_t, Bytes)>;

    // `size` bytes of the pattern's item `seed`; or `all`, every value of a byte.
    void echo(const json& command, json& /*answer*/) {
        const Pattern pattern(command.value("size", 0U));
        const auto seed = command.value("seed", 0U);
        std::vector<unsigned char> every(command.value("all", false) ? 256 : 0);
        std::iota(every.begin(), every.end(), static_cast<unsigned char>(0));
        const Bytes sent = every.empty() ? pattern.item(seed) : std::as_bytes(std::span(every));
        began_ns_ = now_ns();
        const Bytes reply = bridge_.echo(sent, find<double>(command, "timeout"));
        need(std::ranges::equal(reply, sent), "another echo");
    }

    void call(const json& command, json& answer) {
        const std::string payload = payload_of(command);
        const auto timeout = find<double>(command, "timeout");
        answer["text"] = text_of(bridge_.call(command.at("method"), bytes_of(payload), timeout));
    }

    // Read to the end, or leave after `take` items.
    void stream(const json& command, json& /*answer*/) {
        const std::uint64_t count = command.at("count");
        const std::uint32_t size = command.at("size");
        const Pattern pattern(size);
        began_ns_ = now_ns();
        const double rate_hz = find<double>(command, "rate").value_or(0);
        const auto timeout = find<double>(command, "timeout");
        walk(bridge_.stream(count, size, rate_hz, false, timeout), command, verifier(pattern));
        const bool left = items_ == find<std::uint64_t>(command, "take");
        need(left || items_ == count, "another count of items");
    }

    void call_stream(const json& command, json& /*answer*/) {
        const std::string payload = payload_of(command);
        const auto timeout = find<double>(command, "timeout");
        walk(
            bridge_.call_stream(command.at("method"), bytes_of(payload), timeout),
            command,
            [](std::uint64_t, Bytes) { return true; }
        );
    }

    // An echo while a stream is open: its status; then the stream to its end.
    void busy(const json& /*command*/, json& answer) {
        const std::uint64_t count = 1000;
        const Pattern pattern(64);
        Items items = bridge_.stream(count, 64);
        try {
            bridge_.echo(bytes_of("too much"));
        } catch (const Error& error) {
            answer["status"] = name_of(error.status);
        }
        walk(std::move(items), json::object(), verifier(pattern));
        need(items_ == count, "another count of items");
    }

    // `count` streams of 3 items, left anywhere; after each at once an echo.
    void cancel_race(const json& command, json& /*answer*/) {
        std::mt19937 choice(command.value("seed", 0U));
        const Pattern pattern(64);
        const std::uint64_t count = command.at("count");
        for (std::uint64_t turn = 0; turn < count; ++turn) {
            items_ = 0;
            const std::uint64_t take = choice() % 5;  // 3: before its END, 4: after it
            walk(bridge_.stream(3, 64), {{"take", take}}, verifier(pattern));
            need(items_ == std::min<std::uint64_t>(take, 3), "another count of items");
            need(pattern.verifies(turn, bridge_.echo(pattern.item(turn))), "another echo");
        }
    }

    void close(const json& /*command*/, json& /*answer*/) { bridge_.close(); }

    // In mid-stream: the status that the child meets, which reads on, calls, then closes.
    void fork(const json& /*command*/, json& answer) {
        const Pattern pattern(1000);
        Items items = bridge_.stream(10'000, 1000);
        need(pattern.verifies(0, items.next().value()), "another first item");
        const pid_t child = ::fork();
        if (child == 0) {
            int code = 0;
            try {
                while (items.next()) {
                }
            } catch (const Error& error) {
                items.close();
                code = is_refused() ? static_cast<int>(error.status) : 98;
                bridge_.close();
            }
            ::_exit(code);
        }
        int status = 0;
        ::waitpid(child, &status, 0);
        answer["child"] = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
        items_ = 1;
        walk(std::move(items), json::object(), verifier(pattern));
        need(items_ == 10'000, "another count of items");
    }

    bool is_refused() {
        try {
            bridge_.echo(bytes_of("child"), 2.0);
        } catch (const Error&) {
            return true;
        }
        return false;
    }

    void walk(Items items, const json& command, const Verifies& verifies) {
        const auto take = find<std::uint64_t>(command, "take");
        const auto notice = find<std::uint64_t>(command, "notice");
        const auto pause_at = find<std::uint64_t>(command, "pause_at");
        while (items_ != take) {
            if (items_ == notice) {
                say({{"at", *notice}});
            }
            if (items_ == pause_at) {
                const double pause_s = command.at("pause_s");
                std::this_thread::sleep_for(std::chrono::duration<double>(pause_s));
            }
            const auto item = items.next();
            if (!item) {
                break;
            }
            need(verifies(items_, *item), "another item " + std::to_string(items_));
            ++items_;
        }
    }  // closes the items

    static Verifies verifier(const Pattern& pattern) {
        return
            [&pattern](std::uint64_t index, Bytes item) { return pattern.verifies(index, item); };
    }

    using Op = void (Runner::*)(const json&, json&);
    static const std::map<std::string, Op> ops;

    Bridge bridge_;
    std::int64_t began_ns_ = 0;  // when the first byte of the command's call could go out
    std::uint64_t items_ = 0;    // read so far
};

const std::map<std::string, Runner::Op> Runner::ops = {
    {"echo", &Runner::echo},
    {"call", &Runner::call},
    {"stream", &Runner::stream},
    {"call_stream", &Runner::call_stream},
    {"busy", &Runner::busy},
    {"cancel_race", &Runner::cancel_race},
    {"close", &Runner::close},
    {"fork", &Runner::fork},
};

// The next line of stdin. (Unlike Python's, C++'s streams take a signal for the end.)
std::optional<std::string> read_line() {
    std::string line;
    char c = 0;
    while (true) {
        const ssize_t count = ::read(0, &c, 1);
        if (count == 0 || (count < 0 && errno != EINTR)) {
            return std::nullopt;
        }
        if (count == 1 && c == '\n') {
            return line;
        }
        if (count == 1) {
            line += c;
        }
    }
}

int run_client(const Arguments& arguments) {
    std::optional<Runner> runner;
    try {
        ConnectOptions options;
        options.window_bytes = arguments.window;
        options.payload_bytes_max = arguments.max_payload;
        runner.emplace(connect(arguments.url, options));
    } catch (const Error& error) {
        say({{"status", name_of(error.status)}, {"what", error.message}});
        return 1;
    }
    while (const auto line = read_line()) {
        say(runner->answer(json::parse(*line)));
    }
    return 0;
}

// --- both ---

// SIGALRM for every thread, every millisecond. (A timer's signals all go to one thread.)
void pester() {
    struct sigaction action {};
    action.sa_handler = [](int) {};  // without SA_RESTART: calls end with EINTR
    sigaction(SIGALRM, &action, nullptr);
    std::thread([] {
        while (true) {
            for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
                tgkill(getpid(), std::stoi(task.path().filename()), SIGALRM);
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }).detach();
}

}  // namespace

int main(int argc, char** argv) {
    CLI::App parser("probe");
    Arguments arguments;
    parser.add_option("command", arguments.command)
        ->required()
        ->check(CLI::IsMember({"serve", "run"}));
    parser.add_option("url", arguments.url)->required();
    parser.add_option("--window", arguments.window);
    parser.add_option("--max-payload", arguments.max_payload);
    parser.add_option("--clients-max", arguments.clients_max);
    parser.add_flag("--claims-not-to-block", arguments.claims_not_to_block);
    CLI11_PARSE(parser, argc, argv);
    if (arguments.command == "serve") {
        mask_sigterm(SIG_BLOCK);  // for all threads to come
    }
    if (std::getenv("PROBE_ALARM") != nullptr) {
        pester();
    }
    return arguments.command == "serve" ? run_server(arguments) : run_client(arguments);
}

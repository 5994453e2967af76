// The peer program, server or client: `ipc-bridge-peer`. Its Python twin `python -m
// ipc_bridge.peer` takes the same words, prints the same texts, and leaves with the same codes.
//
// Here is what each command does; what it may be told stands in `arguments`.
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "console.hpp"
#include <ipc_bridge/endpoint.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/load.hpp>
#include <ipc_bridge/server.hpp>
#include <ipc_bridge/service.hpp>
#include <ipc_bridge/system.hpp>

namespace {

using namespace ipc_bridge;
using namespace ipc_bridge::peer;
using std::to_string;

constexpr std::uint64_t count_max = 999'999'999'999'999'999;
constexpr std::uint64_t clients_max = 65'536;      // of a server
constexpr std::uint64_t bench_clients_max = 1024;  // each costs a thread, and its buffers
constexpr double duration_s_min = 0.001;
constexpr double duration_s_max = 3600;  // bounds the samples, in memory until the end
constexpr std::uint64_t method_max = 0xFFFF;
constexpr std::uint64_t pid_max = 1U << 22U;  // of Linux

// The figures with --json, else the text.
void print_result(const Arguments& arguments, const Json& figures, const std::string& text) {
    write_out(arguments.json ? json_of(figures) : text);
}

// --- signals and the ready file ---

// SIGTERM and SIGINT: the first drains the server, the second ends the program at once.
//
// (Python runs handlers between its instructions; here a thread waits for the signals, which every
// other thread blocks.)
class StopSignals {
  public:
    StopSignals() {
        ::sigemptyset(&signals_);
        ::sigaddset(&signals_, SIGTERM);
        ::sigaddset(&signals_, SIGINT);
        ::pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
    }
    StopSignals(const StopSignals&) = delete;
    StopSignals& operator=(const StopSignals&) = delete;
    ~StopSignals() {
        if (thread_.joinable()) {
            done_ = true;
            ::pthread_kill(thread_.native_handle(), SIGTERM);
            thread_.join();
        }
    }

    // The server to stop; at once if a signal came while it was starting.
    void watch(Callee& running) {
        thread_ = std::thread([this, &running] {
            await();
            if (!done_) {
                running.stop();
                await();
            }
            if (!done_) {
                ::_exit(exit_interrupted);
            }
        });
    }

  private:
    void await() const {
        int number = 0;
        ::sigwait(&signals_, &number);
    }

    sigset_t signals_{};
    std::atomic<bool> done_ = false;
    std::thread thread_;
};

// Ctrl-C of a client, wherever it waits.
extern "C" void on_interrupt(int /*number*/) {
    constexpr std::string_view line = "error: CANCELLED: interrupted\n";
    [[maybe_unused]] const auto written = ::write(2, line.data(), line.size());
    ::_exit(exit_interrupted);
}

// --ready-file: there, and whole, as long as the server may be called.
class ReadyFile {
  public:
    ReadyFile(const Arguments& arguments, const std::string& url) {
        if (!arguments.has("--ready-file")) {
            return;
        }
        const std::string path = arguments.text("--ready-file");
        struct stat there {};
        if (::lstat(path.c_str(), &there) == 0 && !S_ISREG(there.st_mode)) {  // /dev/null, perhaps
            throw Error(Status::ALREADY_EXISTS, "not a file of ours to replace", path);
        }
        const std::string temporary = path + "." + to_string(::getpid());
        try {
            write_all(create(temporary, path).get(), bytes_of(url + "\n"), path);
            checked(::rename(temporary.c_str(), path.c_str()), "rename", path);
        } catch (const Error&) {
            ::unlink(temporary.c_str());
            throw;
        }
        path_ = path;
    }
    ReadyFile(const ReadyFile&) = delete;
    ReadyFile& operator=(const ReadyFile&) = delete;
    ~ReadyFile() {
        if (!path_.empty()) {
            ::unlink(path_.c_str());
        }
    }

  private:
    std::string path_;
};

// --- the commands ---

// Serve until a signal, or until the parent has gone (stdio).
int run_serve(const Arguments& arguments) {
    ServeOptions options;
    options.clients_max = arguments.count("--clients-max", 1, clients_max, clients_max_default);
    options.grace_s = arguments.number("--grace", 0, number_max, grace_s_default);
    options.payload_bytes_max = arguments.payload_bytes_max;
    std::unique_ptr<Callee> running;  // outlives the thread of the signals
    StopSignals signals;
    running = serve(arguments.url, make_service(), options);
    signals.watch(*running);
    const ReadyFile ready_file(arguments, running->url);
    if (!running->url.starts_with("stdio:")) {  // there, stdout is the wire
        print_result(arguments, {{"ready", running->url}}, "ready " + running->url + "\n");
    }
    running->run();
    return 0;
}

// Echo one payload, once or often.
int run_echo(const Arguments& arguments) {
    const bool is_text = arguments.payload_is_text();
    const std::uint64_t count = arguments.count("--count", 1, count_max, 1);
    const std::optional<double> timeout = arguments.timeout();
    const std::string payload = arguments.payload();
    Bridge bridge = arguments.connect();
    const std::int64_t began_ns = now_ns();
    for (std::uint64_t i = 0; i < count; ++i) {
        if (text_of(bridge.echo(bytes_of(payload), timeout)) != payload) {
            const std::string what = "the answer differs from the payload";
            throw Error(Status::DATA_LOSS, what, arguments.url);
        }
    }
    const double seconds = static_cast<double>(now_ns() - began_ns) / 1e9;
    bridge.close();
    Json figures;
    figures["payload"] = is_text ? Json(payload) : Json();
    figures["size_bytes"] = payload.size();
    figures["count"] = count;
    figures["seconds"] = seconds;
    print_result(arguments, figures, is_text ? payload + "\n" : payload);
    return 0;
}

// Read one stream, and verify it to the last byte.
int run_stream(const Arguments& arguments) {
    const std::uint64_t count = arguments.count("--count", 0, count_max);
    const std::uint64_t size_bytes = arguments.size("--size", 0, arguments.payload_bytes_max);
    const double rate_hz = arguments.number("--rate", 0, number_max, 0.0);
    const std::optional<double> timeout = arguments.timeout();
    const Pattern pattern(size_bytes);
    std::uint64_t seen = 0;
    Bridge bridge = arguments.connect();
    const std::int64_t began_ns = now_ns();
    const auto size = static_cast<std::uint32_t>(size_bytes);
    for (const Bytes item : bridge.stream(count, size, rate_hz, false, timeout)) {
        if (!pattern.verifies(seen, item)) {
            const std::string what = "item " + to_string(seen) + " differs from the pattern";
            throw Error(Status::DATA_LOSS, what, arguments.url);
        }
        ++seen;
    }
    const double seconds = static_cast<double>(now_ns() - began_ns) / 1e9;
    bridge.close();
    if (seen != count) {
        const std::string what = to_string(seen) + " items instead of " + to_string(count);
        throw Error(Status::DATA_LOSS, what, arguments.url);
    }
    const double items_per_second = static_cast<double>(count) / seconds;
    const double bytes_per_second = items_per_second * static_cast<double>(size_bytes);
    Json figures;
    figures["count"] = count;
    figures["size_bytes"] = size_bytes;
    figures["seconds"] = seconds;
    figures["items_per_second"] = items_per_second;
    figures["bytes_per_second"] = bytes_per_second;
    const std::string figures_text = Arguments::format(
        " verified in %.3f s (%.0f items/s, %.1f MB/s)\n",
        seconds,
        items_per_second,
        bytes_per_second / 1e6
    );
    const std::string what = to_string(count) + " items of " + to_string(size_bytes) + " bytes";
    print_result(arguments, figures, what + figures_text);
    return 0;
}

// What the options of `bench` ask for.
load::Plan make_plan(const Arguments& arguments) {
    load::Plan plan;
    plan.url = arguments.url;
    plan.op = arguments.text("--op");
    if (plan.op != "echo" && plan.op != "stream") {
        throw CommandLineError("'" + plan.op + "' is neither echo nor stream", "--op");
    }
    plan.method = static_cast<std::uint16_t>(arguments.count("--method", 1, method_max, 0));
    const bool has_payload = arguments.has("--payload");
    if (has_payload && plan.method == 0) {
        throw CommandLineError("this option goes with --method", "--payload");
    }
    plan.rate_hz = arguments.number("--rate", 0, number_max, 0.0);
    const bool stamped = plan.op == "stream" && plan.rate_hz > 0;
    if (stamped && plan.method != 0) {
        throw CommandLineError("a method's stream has its own pace", "--rate");
    }
    const std::size_t size_min = stamped ? stamp_bytes : 0;
    plan.work_s = arguments.number("--work", 0, duration_s_max, 0.0);
    if (plan.op != "stream" && arguments.has("--work")) {
        throw CommandLineError("this option goes with --op stream", "--work");
    }
    plan.server_pid = load::child;
    if (!arguments.has("--server-pid") || arguments.text("--server-pid") != "child") {
        plan.server_pid = static_cast<int>(arguments.count("--server-pid", 1, pid_max, 0));
    }
    // A payload of one's own has its own size; the option may still be there, and is not looked at.
    if (!has_payload) {
        plan.size_bytes = arguments.size("--size", size_min, arguments.payload_bytes_max);
    }
    plan.duration_s = arguments.number("--duration", duration_s_min, duration_s_max);
    plan.warmup_s = arguments.number("--warmup", 0, duration_s_max, 0.0);
    plan.clients = arguments.count("--clients", 1, bench_clients_max, 1);
    if (has_payload) {
        plan.payload = arguments.payload();
    }
    plan.window_bytes = arguments.window_bytes;
    plan.payload_bytes_max = arguments.payload_bytes_max;
    return plan;
}

// Measure; the result is one JSON object, indented unless --json asks for a single line.
int run_bench(const Arguments& arguments) {
    load::Plan plan = make_plan(arguments);
    const std::string samples_path =
        arguments.has("--samples") ? arguments.text("--samples") : "/dev/null";
    // Opened before the measurement, so that a bad path shows at once.
    const Fd samples_fd = create(samples_path, samples_path);
    const auto result = load::run(std::move(plan));
    const std::vector<std::uint64_t> samples = result->samples();
    write_all(samples_fd.get(), std::as_bytes(std::span(samples)), samples_path);
    const Json figures = result->report(language, version);
    print_result(arguments, figures, json_of(figures, 2));
    const std::optional<Error> error = result->error();
    return error ? report_error(*error) : 0;
}

const std::map<std::string, int (*)(const Arguments&)> run_by_name = {
    {"serve", run_serve},
    {"echo", run_echo},
    {"stream", run_stream},
    {"bench", run_bench},
};

// Do what the words say; the exit code.
int run(const std::vector<std::string>& words) {
    const std::string first = words.empty() ? "" : words.front();
    if (first == "-h" || first == help_option.name) {
        write_out(overview());
        return 0;
    }
    if (first == version_option.name) {
        write_out(version_line());
        return 0;
    }
    const std::string known =
        joined(commands, ", ", [](const Command& command) { return command.name; });
    if (words.empty()) {
        throw CommandLineError("a command is missing; known are " + known);
    }
    for (const Command& command : commands) {
        if (command.name == first) {
            return run_by_name.at(first)(Arguments(command, {words.begin() + 1, words.end()}));
        }
    }
    throw CommandLineError(
        first.starts_with("-") ? "unknown option" : "unknown command; known are " + known, first
    );
}

}  // namespace

int main(int argument_count, char** arguments) {
    ::signal(SIGPIPE, SIG_IGN);  // else `| head` kills
    ::signal(SIGINT, on_interrupt);
    try {
        return run({arguments + 1, arguments + argument_count});
    } catch (const Error& error) {
        return report_error(error);
    } catch (const std::exception& error) {  // out of memory, or of threads
        return report_error(Error(Status::INTERNAL, error.what()));
    }
}

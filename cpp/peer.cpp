// The peer program, server or client: `ipc-bridge-peer`. Its Python twin `python -m
// ipc_bridge.peer` takes the same words, prints the same texts, and leaves with the same codes.
//
// Only the command line is here. CLI11 splits it and explains it; all values are taken as text and
// converted below, so that both programs find the same faults, and name them alike.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <ipc_bridge/client.hpp>
#include <ipc_bridge/endpoint.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/load.hpp>
#include <ipc_bridge/server.hpp>
#include <ipc_bridge/service.hpp>
#include <ipc_bridge/session.hpp>
#include <ipc_bridge/system.hpp>

namespace {

using namespace ipc_bridge;
using load::Json;
using std::to_string;

const std::string version = "0.1.0";  // as in pyproject.toml; a test compares the programs
const std::string language = "cpp";
const std::string program = "ipc-bridge-peer";
constexpr int exit_usage = 2;
constexpr int exit_status = 10;        // plus the status
constexpr int exit_interrupted = 130;  // as a shell reports SIGINT
constexpr std::uint64_t count_max = 999'999'999'999'999'999;
constexpr std::uint64_t clients_max = 65'536;      // of a server
constexpr std::uint64_t bench_clients_max = 1024;  // each costs a thread, and its buffers
constexpr double duration_s_min = 0.001;
constexpr double duration_s_max = 3600;  // bounds the samples, in memory until the end
constexpr std::uint64_t method_max = 0xFFFF;
constexpr std::uint64_t pid_max = 1U << 22U;  // of Linux
constexpr double number_max = 1e9;            // above what the digits of a number can say

// The command line is at fault, and not what it asked for: another exit code.
class CommandLineError : public Error {
  public:
    explicit CommandLineError(std::string what, std::string at = "")
        : Error(Status::INVALID_ARGUMENT, std::move(what), std::move(at)) {}
};

// --- what can be said ---

class Arguments;

// One option of a command.
struct Option {
    std::string name;
    std::string value;  // what to write after it; "": nothing, it is a flag
    std::string text;
};

// One command of the program.
struct Command {
    std::string name;
    std::string text;
    std::string usage;
    std::vector<Option> options;
    std::string example;
    int (*run)(const Arguments& arguments);
};

const std::string payload_value = "TEXT|@FILE|-";
const std::vector<Option> common_options = {
    {"--window", "BYTES", "how far a stream may run ahead of its reader (default 4MiB)"},
    {"--max-payload", "BYTES", "largest payload taken from the peer (default 64MiB)"},
    {"--json", "", "print one JSON object, on one line, instead of text"},
};
const std::vector<Option> serve_options = {
    {"--ready-file", "FILE", "write the URL into FILE once clients may come"},
    {"--clients-max", "N", "turn further clients away (default 256)"},
    {"--grace", "SECONDS", "for running calls to end in when told to stop (default 1)"},
};
const std::vector<Option> echo_options = {
    {"--payload", payload_value, "what to send: the text, what is in FILE, or what stdin brings"},
    {"--count", "N", "how many times (default 1)"},
    {"--timeout", "SECONDS", "for connecting (default 5), and for each answer (no limit)"},
};
const std::vector<Option> stream_options = {
    {"--count", "N", "how many items"},
    {"--size", "BYTES", "of an item, as 64, 4KiB or 1MiB"},
    {"--rate", "HZ", "items a second (default: as fast as they are read)"},
    {"--timeout", "SECONDS", "for connecting (default 5), and for all items (no limit)"},
};
const std::vector<Option> bench_options = {
    {"--op", "echo|stream", "what to measure: round trips, or one endless stream"},
    {"--size", "BYTES", "of a payload or an item, as 64, 4KiB or 1MiB"},
    {"--duration", "SECONDS", "how long to measure, at most 3600"},
    {"--warmup", "SECONDS", "not counted, before that (default 0)"},
    {"--rate", "HZ", "of all clients, timed from when each was due (default: no pause)"},
    {"--clients", "N", "connections at once, with a thread each (default 1)"},
    {"--method", "M", "number of a method of your own; its answers are not verified"},
    {"--payload", payload_value, "what to send to that method (default: a payload of --size)"},
    {"--samples", "FILE", "write the latencies into FILE, as u64 little-endian ns"},
    {"--work", "SECONDS", "sleep so long after each item of a stream (default 0)"},
    {"--server-pid", "PID|child", "report what that process uses too, or stdio's server"},
};
const Option help_option = {"--help", "", "print this help, and leave"};
const Option version_option = {"--version", "", "print the version, and leave"};

int run_serve(const Arguments& arguments);
int run_echo(const Arguments& arguments);
int run_stream(const Arguments& arguments);
int run_bench(const Arguments& arguments);

const std::vector<Command> commands = {
    {"serve",
     "Serve echo and stream at URL until told to stop (SIGTERM, Ctrl-C).",
     "URL [OPTIONS]",
     serve_options,
     "serve unix:///tmp/demo.sock",
     run_serve},
    {"echo",
     "Send a payload, compare what comes back, and print it.",
     "URL --payload TEXT|@FILE|- [OPTIONS]",
     echo_options,
     "echo unix:///tmp/demo.sock --payload hello",
     run_echo},
    {"stream",
     "Read a stream of items, and verify every byte.",
     "URL --count N --size BYTES [OPTIONS]",
     stream_options,
     "stream unix:///tmp/demo.sock --count 1000000 --size 64",
     run_stream},
    {"bench",
     "Measure latency and throughput, verifying every answer; prints JSON.",
     "URL --op echo|stream --size BYTES --duration SECONDS [OPTIONS]",
     bench_options,
     "bench unix:///tmp/demo.sock --op echo --size 64 --duration 2 --warmup 0.5",
     run_bench},
};

// The texts of a list, one after the other.
template <class List, class Make>
std::string joined(const List& list, const std::string& between, Make make) {
    std::string text;
    for (const auto& one : list) {
        text += (text.empty() ? "" : between) + make(one);
    }
    return text;
}

// What a URL of a scheme looks like.
std::string url_form(const std::string& scheme) {
    if (scheme == "stdio") {
        return "stdio:COMMAND WORDS";
    }
    return scheme + (scheme.ends_with("tcp") ? "://127.0.0.1:5000" : ":///tmp/demo");
}

// The forms of a URL, for every help.
std::string url_help() {
    const std::string forms = joined(endpoint::schemes, "", [](const endpoint::Scheme& scheme) {
        return "  " + url_form(std::string(scheme.name)) + "\n";
    });
    return "URL is one of\n" + forms +
           "and may end in ?wait=block, spin or adaptive (the default); for stdio that stands "
           "before\nthe command: stdio:?wait=spin COMMAND WORDS\n";
}

// The help of the program as a whole.
std::string overview() {
    const std::string list = joined(commands, "", [](const Command& command) {
        std::string name = command.name;
        name.resize(8, ' ');
        return "  " + name + command.text + "\n";
    });
    const std::string examples = joined(commands, "", [](const Command& command) {
        return "  " + program + " " + command.example + "\n";
    });
    return "usage: " + program +
           " COMMAND URL [OPTIONS]\n\n"
           "Serves, calls and measures an echo and a stream over any local transport. There is a\n"
           "C++ and a Python program; they take the same words, and talk to each other.\n\n"
           "commands (each has its own --help):\n" +
           list + "\n" + url_help() +
           "\nexamples (start the server, then the others in a second terminal):\n" + examples +
           "\nexit codes: 0 all is well, 2 the command line is wrong, 10 + status a call failed\n"
           "(24 no server, 25 wrong bytes; statuses are gRPC's), 130 interrupted\n";
}

// The same in both languages but for the name of the language.
std::string version_line() {
    return program + " " + version + " (" + language + ")\n";
}

// --- files and output ---

// All that can be read, up to the largest payload that there can be.
std::string read_all(int fd, const std::string& where) {
    std::string data;
    while (true) {
        const std::size_t had = data.size();
        data.resize(had + (1U << 20U));
        const ssize_t count =
            checked(retrying([&] { return ::read(fd, &data[had], 1U << 20U); }), "read", where);
        data.resize(had + static_cast<std::size_t>(count));
        if (count == 0) {
            return data;
        }
        if (data.size() > frame::payload_bytes_limit) {
            const std::string what = "above " + to_string(frame::payload_bytes_limit) + " bytes";
            throw Error(Status::RESOURCE_EXHAUSTED, what, where);
        }
    }
}

// Write it whole.
void write_all(int fd, Bytes data, const std::string& where) {
    while (!data.empty()) {
        const ssize_t count = checked(
            retrying([&] { return ::write(fd, data.data(), data.size()); }), "write", where
        );
        data = data.subspan(static_cast<std::size_t>(count));
    }
}

// A descriptor of a new, empty file.
Fd create(const std::string& path, const std::string& where) {
    constexpr int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC;
    return Fd(checked(retrying([&] { return ::open(path.c_str(), flags, 0666); }), "open", where));
}

// Print. A reader who has left (| head) has what he wanted.
void write_out(std::string_view text) {
    try {
        write_all(1, bytes_of(text), "stdout");
    } catch (const Error& error) {
        if (error.status != Status::UNAVAILABLE) {
            throw;
        }
    }
}

// Say in one line what is wrong; the exit code for it.
int report_error(const Error& error) {
    std::string line = std::string("error: ") + error.what();
    std::replace(line.begin(), line.end(), '\n', ' ');
    line += '\n';
    try {
        write_all(2, bytes_of(line), "stderr");
    } catch (const Error&) {  // there is nobody to tell
    }
    const bool usage = dynamic_cast<const CommandLineError*>(&error) != nullptr;
    return usage ? exit_usage : exit_status + static_cast<int>(error.status);
}

// --- from words to values ---

// CLI11 with our usage.
class HelpFormatter : public CLI::Formatter {
  public:
    explicit HelpFormatter(std::string usage) : usage_(std::move(usage)) { column_width(28); }

    std::string make_usage(const CLI::App* /*app*/, std::string /*name*/) const override {
        return "usage: " + usage_ + "\n";
    }

  private:
    std::string usage_;
};

// `--name=value` as `--name value`: CLI11 takes no empty value else. Here a flag shows that has
// one.
std::vector<std::string> split(const std::vector<std::string>& words, const Command& command) {
    std::map<std::string, bool> takes_value;
    for (const auto* options : {&command.options, &common_options}) {
        for (const Option& option : *options) {
            takes_value[option.name] = !option.value.empty();
        }
    }
    std::vector<std::string> out;
    for (std::size_t i = 0; i < words.size(); ++i) {
        const std::size_t equals = std::min(words[i].find('='), words[i].size());
        const auto found = takes_value.find(words[i].substr(0, equals));
        if (found == takes_value.end() || (!found->second && equals == words[i].size())) {
            out.push_back(words[i]);
            continue;
        }
        if (!found->second) {
            throw CommandLineError("this option takes no value", found->first);
        }
        out.push_back(found->first);
        if (equals < words[i].size()) {
            out.push_back(words[i].substr(equals + 1));
        } else if (i + 1 < words.size()) {
            out.push_back(words[++i]);
        } else {
            throw CommandLineError("a value is missing", found->first);
        }
    }
    return out;
}

// The words of one command; each method converts one option, and names it in its error.
class Arguments {
  public:
    Arguments(const Command& command, const std::vector<std::string>& words) {
        const std::vector<std::string> extra = parse(command, words);
        if (!extra.empty() && extra.front().starts_with("-")) {
            const std::string& word = extra.front();
            throw CommandLineError("unknown option", word.substr(0, word.find('=')));
        }
        if (!extra.empty()) {
            throw CommandLineError("one word too many", extra.front());
        }
        try {
            endpoint::way_of(url);
        } catch (const Error& error) {
            if (error.status != Status::INVALID_ARGUMENT) {  // a library that is missing
                throw;
            }
            throw CommandLineError(error.message, error.where);
        }
        window_bytes =
            static_cast<std::uint32_t>(size("--window", 1, window_bytes_limit, window_bytes_default)
            );
        payload_bytes_max = static_cast<std::uint32_t>(
            size("--max-payload", 0, frame::payload_bytes_limit, frame::payload_bytes_max)
        );
    }

    std::string url;
    bool json = false;
    std::uint32_t window_bytes = 0;
    std::uint32_t payload_bytes_max = 0;

    // Was the option given?
    bool has(const std::string& name) const { return values_.contains(name); }

    // As it was written.
    const std::string& text(const std::string& name) const {
        const auto found = values_.find(name);
        if (found == values_.end()) {
            throw CommandLineError("a required option is missing", name);
        }
        return found->second;
    }

    // Bytes: `64`, `4KiB`, `1MiB`, `1GiB`.
    std::uint64_t size(
        const std::string& name,
        std::uint64_t low,
        std::uint64_t high,
        std::optional<std::uint64_t> otherwise = std::nullopt
    ) const {
        if (otherwise && !has(name)) {
            return *otherwise;
        }
        static const std::map<std::string, std::uint64_t, std::less<>> units = {
            {"", 1}, {"KiB", 1U << 10U}, {"MiB", 1U << 20U}, {"GiB", 1U << 30U}};
        const std::string& written = text(name);
        const std::size_t digits = digits_of(written);
        const auto unit = units.find(std::string_view(written).substr(digits));
        if (digits < 1 || digits > 18 || unit == units.end()) {
            throw CommandLineError("'" + written + "' is not a size", name);
        }
        const std::uint64_t value = number_of(written.substr(0, digits));
        return within(written, value, low, high, name, unit->second);
    }

    // A whole number.
    std::uint64_t count(
        const std::string& name,
        std::uint64_t low,
        std::uint64_t high,
        std::optional<std::uint64_t> otherwise = std::nullopt
    ) const {
        if (otherwise && !has(name)) {
            return *otherwise;
        }
        const std::string& written = text(name);
        const std::size_t digits = digits_of(written);
        if (digits != written.size() || digits < 1 || digits > 18) {
            throw CommandLineError("'" + written + "' is not a whole number", name);
        }
        return within(written, number_of(written), low, high, name, 1);
    }

    // A decimal number, without sign and exponent.
    double number(
        const std::string& name,
        double low,
        double high,
        std::optional<double> otherwise = std::nullopt
    ) const {
        if (otherwise && !has(name)) {
            return *otherwise;
        }
        const std::string& written = text(name);
        const std::size_t whole = digits_of(written);
        const bool point = whole < written.size() && written[whole] == '.';
        const std::size_t part = point ? digits_of(written.substr(whole + 1)) : 0;
        const bool complete = whole + (point ? 1 : 0) + part == written.size();
        if (!complete || whole + part == 0 || whole > 9 || part > 9) {
            throw CommandLineError("'" + written + "' is not a decimal number", name);
        }
        double value = 0.0;
        std::from_chars(written.data(), written.data() + written.size(), value);
        if (value < low || value > high) {
            const std::string range = format("%g to %g", low, high);
            throw CommandLineError("'" + written + "' is not within " + range, name);
        }
        return value;
    }

    // --timeout; nothing: not given.
    std::optional<double> timeout() const {
        if (!has("--timeout")) {
            return std::nullopt;
        }
        return number("--timeout", 0, number_max);
    }

    // Does --payload stand on the command line itself?
    bool payload_is_text() const {
        const std::string& written = text("--payload");
        return written != "-" && !written.starts_with("@");
    }

    // --payload: the text itself, what a file holds, or what comes on stdin.
    std::string payload() const {
        const std::string& written = text("--payload");
        if (payload_is_text()) {
            return written;
        }
        if (written == "-") {
            return read_all(0, "stdin");
        }
        const std::string path = written.substr(1);
        const Fd fd(checked(
            retrying([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC); }), "open", path
        ));
        return read_all(fd.get(), path);
    }

    // The connection that all options together ask for.
    Bridge connect() const {
        ConnectOptions options{
            .window_bytes = window_bytes, .payload_bytes_max = payload_bytes_max};
        options.timeout = timeout().value_or(connect_timeout_s);
        return ipc_bridge::connect(url, options);
    }

    // printf(3) into a string; for short texts.
    template <class... Values>
    static std::string format(const char* how, Values... values) {
        char text[256];
        const int count = std::snprintf(text, sizeof(text), how, values...);
        return {text, std::min(sizeof(text) - 1, static_cast<std::size_t>(count))};
    }

  private:
    // Fills `url`, `json` and the values; what is left over.
    std::vector<std::string> parse(const Command& command, const std::vector<std::string>& words) {
        CLI::App app(command.text);
        app.formatter(
            std::make_shared<HelpFormatter>(program + " " + command.name + " " + command.usage)
        );
        app.footer(url_help() + "\nexample:\n  " + program + " " + command.example);
        app.allow_extras();
        auto* url_option = app.add_option("URL", url, "where the server is; see below");
        url_option->option_text(" ");
        std::map<std::string, std::string> texts;
        std::vector<CLI::Option*> with_value;
        for (const auto* options : {&command.options, &common_options}) {
            for (const Option& option : *options) {
                if (option.value.empty()) {
                    app.add_flag(option.name, json, option.text);
                    continue;
                }
                auto* added = app.add_option(option.name, texts[option.name], option.text);
                with_value.push_back(added->option_text(option.value)->take_last());
            }
        }
        app.set_help_flag("-h," + help_option.name, help_option.text);
        app.set_version_flag(version_option.name, version_line(), version_option.text);
        auto reversed = split(words, command);
        std::reverse(reversed.begin(), reversed.end());
        try {
            app.parse(reversed);
        } catch (const CLI::CallForHelp&) {
            write_out(app.help());
            std::exit(0);
        } catch (const CLI::CallForVersion&) {
            write_out(version_line());
            std::exit(0);
        } catch (const CLI::ParseError& error) {  // `split` leaves none that we know of
            throw CommandLineError(error.what());
        }
        if (url_option->count() == 0) {
            throw CommandLineError("a required word is missing", "URL");
        }
        for (const CLI::Option* option : with_value) {
            if (option->count() != 0) {
                values_[option->get_name()] = texts[option->get_name()];
            }
        }
        return app.remaining();
    }

    // How many digits it begins with.
    static std::size_t digits_of(std::string_view written) {
        return std::min(written.find_first_not_of("0123456789"), written.size());
    }

    // At most 18 digits, which always fit.
    static std::uint64_t number_of(const std::string& digits) {
        std::uint64_t value = 0;
        std::from_chars(digits.data(), digits.data() + digits.size(), value);
        return value;
    }

    static std::uint64_t within(
        const std::string& written,
        std::uint64_t value,
        std::uint64_t low,
        std::uint64_t high,
        const std::string& name,
        std::uint64_t unit
    ) {
        if (value > high / unit || value * unit < low) {
            const std::string range = to_string(low) + " to " + to_string(high);
            throw CommandLineError("'" + written + "' is not within " + range, name);
        }
        return value * unit;
    }

    std::map<std::string, std::string> values_;
};

// As JSON, always UTF-8; on one line unless indented.
std::string json_of(const Json& figures, int indent = -1) {
    return figures.dump(indent, ' ', false, Json::error_handler_t::replace) + "\n";
}

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
    options.window_bytes = arguments.window_bytes;
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
            return command.run(Arguments(command, {words.begin() + 1, words.end()}));
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

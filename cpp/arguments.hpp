// The command line of the peer program: what can be said, the help that says so, and the values of
// what was said. Its Python twin is python/ipc_bridge/arguments.py.
//
// CLI11 splits the words and explains them; all values are taken as text and converted here, so
// that both programs find the same faults, and name them alike.
#pragma once

#include <fcntl.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "console.hpp"
#include <ipc_bridge/client.hpp>
#include <ipc_bridge/endpoint.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/session.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge::peer {

inline const std::string version = "0.1.0";  // as in pyproject.toml; a test compares the programs
inline const std::string language = "cpp";
inline const std::string program = "ipc-bridge-peer";
inline constexpr double number_max = 1e9;  // above what the digits of a number can say

// --- what can be said ---

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
};

inline const std::string payload_value = "TEXT|@FILE|-";
inline const Option window_option = {
    "--window", "BYTES", "how far a stream may run ahead of us (default 4MiB)"};
inline const std::vector<Option> common_options = {
    {"--max-payload", "BYTES", "largest payload taken from the peer (default 64MiB)"},
    {"--json", "", "print one JSON object, on one line, instead of text"},
};
inline const std::vector<Option> serve_options = {
    {"--ready-file", "FILE", "write the URL into FILE once clients may come"},
    {"--clients-max", "N", "turn further clients away (of grpc, calls; default 256)"},
    {"--grace", "SECONDS", "for running calls to end in when told to stop (default 1)"},
};
inline const std::vector<Option> echo_options = {
    {"--payload", payload_value, "what to send: the text, what is in FILE, or what stdin brings"},
    {"--count", "N", "how many times (default 1)"},
    {"--timeout", "SECONDS", "for connecting (default 5), and for each answer (no limit)"},
};
inline const std::vector<Option> stream_options = {
    {"--count", "N", "how many items"},
    {"--size", "BYTES", "of an item, as 64, 4KiB or 1MiB"},
    {"--rate", "HZ", "items a second (default: as fast as they are read)"},
    {"--timeout", "SECONDS", "for connecting (default 5), and for all items (no limit)"},
    window_option,
};
inline const std::vector<Option> bench_options = {
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
    window_option,
};
inline const Option help_option = {"--help", "", "print this help, and leave"};
inline const Option version_option = {"--version", "", "print the version, and leave"};

inline const std::vector<Command> commands = {
    {"serve",
     "Serve echo and stream at URL until told to stop (SIGTERM, Ctrl-C).",
     "URL [OPTIONS]",
     serve_options,
     "serve unix:///tmp/demo.sock"},
    {"echo",
     "Send a payload, compare what comes back, and print it.",
     "URL --payload TEXT|@FILE|- [OPTIONS]",
     echo_options,
     "echo unix:///tmp/demo.sock --payload hello"},
    {"stream",
     "Read a stream of items, and verify every byte.",
     "URL --count N --size BYTES [OPTIONS]",
     stream_options,
     "stream unix:///tmp/demo.sock --count 1000000 --size 64"},
    {"bench",
     "Measure latency and throughput, verifying every answer; prints JSON.",
     "URL --op echo|stream --size BYTES --duration SECONDS [OPTIONS]",
     bench_options,
     "bench unix:///tmp/demo.sock --op echo --size 64 --duration 2 --warmup 0.5"},
};

inline const std::vector<Option> url_options = {
    {"wait", "block|spin|adaptive", "how to wait (default adaptive; zmq and grpc block)"},
    {"allow_remote", "1", "serve other hosts, unencrypted: tcp, zmq+tcp, grpc+tcp"},
    {"curve", "FILE", "keys of `ipc-bridge curve-keys`: zmq+ipc, zmq+tcp"},
    {"ca", "FILE", "who signs the other side's certificate: grpc+tcp"},
    {"cert", "FILE", "our own certificate: grpc+tcp"},
    {"key", "FILE", "its private key: grpc+tcp"},
    {"name", "NAME", "in the server's certificate, if not its host: grpc+tcp"},
};

// The texts of a list, one after the other.
template <class List, class Make>
inline std::string joined(const List& list, const std::string& between, Make make) {
    std::string text;
    for (const auto& one : list) {
        text += (text.empty() ? "" : between) + make(one);
    }
    return text;
}

// What a URL of a scheme looks like.
inline std::string url_form(const std::string& scheme) {
    if (scheme == "stdio") {
        return "stdio:COMMAND WORDS";
    }
    return scheme + (scheme.ends_with("tcp") ? "://127.0.0.1:5000" : ":///tmp/demo");
}

// The forms of a URL and its options, for every help.
inline std::string url_help() {
    const std::string forms = joined(endpoint::schemes, "", [](const endpoint::Scheme& scheme) {
        return "  " + url_form(std::string(scheme.name)) + "\n";
    });
    const std::string options = joined(url_options, "", [](const Option& option) {
        std::string form = option.name + "=" + option.value;
        form.resize(26, ' ');
        return "  " + form + option.text + "\n";
    });
    return "URL is one of\n" + forms + "and may end in options, as ?wait=spin&allow_remote=1:\n" +
           options +
           "zmq takes no spin, grpc nothing but block. Those of stdio stand before the command:\n"
           "stdio:?wait=spin COMMAND WORDS. In a path ? is written %3F, # %23 and % %25.\n";
}

// The help of the program as a whole.
inline std::string overview() {
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
inline std::string version_line() {
    return program + " " + version + " (" + language + ")\n";
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
inline std::vector<std::string> split(
    const std::vector<std::string>& words, const Command& command
) {
    std::map<std::string, bool> takes_value = {
        {help_option.name, false}, {version_option.name, false}};
    for (const auto* options : {&command.options, &common_options}) {
        for (const Option& option : *options) {
            takes_value[option.name] = !option.value.empty();
        }
    }
    std::vector<std::string> out;
    for (std::size_t i = 0; i < words.size(); ++i) {
        if (words[i] == "--") {  // the libraries do not agree on what follows
            throw CommandLineError("unknown option", words[i]);
        }
        if (words[i].starts_with("-h") && words[i].size() > 2) {
            throw CommandLineError("this option takes no value", help_option.name);
        }
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

}  // namespace ipc_bridge::peer

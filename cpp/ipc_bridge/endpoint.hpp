// The one map from a URL to a transport. Whoever needs only one transport can do without it.
//
//     pipe:///dir            stdio:COMMAND WORDS        unix:///path        tcp://127.0.0.1:5000
//     shm:///path            sysv-queue:///path     sysv-shm:///path
//     zmq+ipc:///path        zmq+tcp://127.0.0.1:5000
//     grpc+unix:///path      grpc+tcp://127.0.0.1:5000
//
// Options follow as a query: `?wait=block|spin|adaptive` everywhere (zmq has no spin, grpc
// only blocks), `?allow_remote=1` for what ends in tcp, `?curve=FILE` for zmq, `?ca=FILE&cert=FILE&
// key=FILE&name=NAME` for grpc+tcp; that of stdio stands before the command: `stdio:?wait=spin
// COMMAND WORDS`. In a path `?` is written %3F, `#` %23 and `%` %25; proto/url_vectors.json has the
// odd cases.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <ipc_bridge/client.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/server.hpp>
#include <ipc_bridge/service.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/grpc_rpc.hpp>
#include <ipc_bridge/transports/pipe.hpp>
#include <ipc_bridge/transports/shm_ring.hpp>
#include <ipc_bridge/transports/stream_socket.hpp>
#include <ipc_bridge/transports/sysv_queue.hpp>
#include <ipc_bridge/transports/sysv_shm.hpp>
#include <ipc_bridge/transports/zeromq.hpp>

namespace ipc_bridge {
namespace endpoint {

using Options = std::map<std::string, std::string>;

// What carries calls by sessions of its own, as gRPC does.
class Sessions {
  public:
    virtual ~Sessions() = default;
    virtual std::unique_ptr<Caller> connect(const ConnectOptions& options) = 0;
    virtual std::unique_ptr<Callee> serve(Service service, const ServeOptions& options) = 0;
};

// A transport, whose bytes a session needs; or what has sessions of its own.
using Way = std::variant<std::unique_ptr<Transport>, std::unique_ptr<Sessions>>;

[[noreturn]] inline void refuse(const std::string& what, const std::string& url) {
    throw Error(Status::INVALID_ARGUMENT, what, url);
}

// %XX of RFC 3986 2.1; what is not one stays.
inline std::string unquote(std::string_view text) {
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
        unsigned value = 0;
        if (text[i] == '%' && i + 2 < text.size() &&
            std::from_chars(&text[i + 1], &text[i + 3], value, 16).ptr == &text[i + 3]) {
            out += static_cast<char>(value);
            i += 2;
        } else {
            out += text[i];
        }
    }
    return out;
}

inline Options options_of(
    std::string_view query, std::initializer_list<std::string_view> known, const std::string& url
) {
    Options options;
    while (!query.empty()) {
        const auto pair = query.substr(0, query.find('&'));
        query.remove_prefix(std::min(query.size(), pair.size() + 1));
        const auto equals = std::min(pair.find('='), pair.size());
        if (pair.empty()) {
            continue;
        }
        const std::string name = unquote(pair.substr(0, equals));
        if (std::find(known.begin(), known.end(), name) == known.end()) {
            refuse("unknown option " + name, url);
        }
        options[name] = unquote(pair.substr(std::min(equals + 1, pair.size())));
    }
    return options;
}

inline Wait wait_of(const Options& options, const std::string& url) {
    const auto found = options.find("wait");
    if (found == options.end() || found->second == "adaptive") {
        return Wait::ADAPTIVE;
    }
    if (found->second == "block") {
        return Wait::BLOCK;
    }
    if (found->second == "spin") {
        return Wait::SPIN;
    }
    refuse("wait is block, spin or adaptive", url);
}

inline bool flag_of(const Options& options, const std::string& name, const std::string& url) {
    const auto found = options.find(name);
    if (found == options.end() || found->second == "0") {
        return false;
    }
    if (found->second != "1") {
        refuse(name + " is 0 or 1", url);
    }
    return true;
}

// The parts of `scheme://authority/path?query`.
struct Parts {
    std::string scheme;
    std::string authority;
    std::string path;
    std::string query;
};

inline Parts split(const std::string& url) {
    Parts parts;
    const auto colon = url.find(':');
    parts.scheme = url.substr(0, colon);
    std::string rest = url.substr(colon + 1);
    if (rest.find('#') != std::string::npos) {
        // A fragment means nothing here; and cut off, two paths would be one.
        refuse("write # as %23", url);
    }
    const auto question = std::min(rest.find('?'), rest.size());
    parts.query = rest.substr(std::min(question + 1, rest.size()));
    rest.resize(question);
    if (rest.starts_with("//")) {
        const auto slash = std::min(rest.find('/', 2), rest.size());
        parts.authority = rest.substr(2, slash - 2);
        rest.erase(0, slash);
    }
    parts.path = unquote(rest);
    return parts;
}

inline std::pair<std::string, Options> path_of(
    const std::string& url, std::initializer_list<std::string_view> known
) {
    const Parts parts = split(url);
    if (!parts.authority.empty() || !parts.path.starts_with("/") ||
        parts.path.find('\0') != std::string::npos) {
        refuse(parts.scheme + " takes an absolute path: " + parts.scheme + ":///path", url);
    }
    return {parts.path, options_of(parts.query, known, url)};
}

inline Way make_unix(const std::string& url) {
    auto [path, options] = path_of(url, {"wait"});
    return std::make_unique<Unix>(path, wait_of(options, url));
}

inline Way make_shm(const std::string& url) {
    auto [path, options] = path_of(url, {"wait"});
    return std::make_unique<Shm>(path, wait_of(options, url));
}

struct Host {
    std::string name;
    int port;
    Options options;
};

inline Host host_of(const std::string& url, std::initializer_list<std::string_view> known) {
    const Parts parts = split(url);
    const std::string& authority = parts.authority;
    const auto colon = std::min(authority.rfind(':'), authority.size());
    std::string host = authority.substr(0, colon);
    std::string_view special = "[]:";  // what a host cannot hold, unless in brackets
    if (host.size() > 2 && host.starts_with("[") && host.ends_with("]")) {
        host = host.substr(1, host.size() - 2);
        special = "[]";
    }
    const std::string digits = authority.substr(std::min(colon + 1, authority.size()));
    unsigned port = 0;
    std::from_chars(digits.data(), digits.data() + digits.size(), port);
    const bool is_port = !digits.empty() && digits.size() <= 5 && port <= 65535 &&
                         digits.find_first_not_of("0123456789") == std::string::npos;
    if (host.empty() || host.find_first_of(special) != std::string::npos || !is_port ||
        (!parts.path.empty() && parts.path != "/")) {
        refuse(parts.scheme + " takes a host and a port", url);
    }
    return {host, static_cast<int>(port), options_of(parts.query, known, url)};
}

inline Way make_tcp(const std::string& url) {
    const Host host = host_of(url, {"wait", "allow_remote"});
    const Wait wait = wait_of(host.options, url);  // the first fault is named, as in Python
    const bool allow_remote = flag_of(host.options, "allow_remote", url);
    return std::make_unique<Tcp>(host.name, host.port, wait, allow_remote);
}

inline Way make_zmq_ipc(const std::string& url) {
    auto [path, options] = path_of(url, {"wait", "curve"});
    return std::make_unique<ZmqIpc>(path, wait_of(options, url), options["curve"]);
}

inline Way make_zmq_tcp(const std::string& url) {
    Host host = host_of(url, {"wait", "curve", "allow_remote"});
    const bool allow_remote = flag_of(host.options, "allow_remote", url);
    const Wait wait = wait_of(host.options, url);
    return std::make_unique<ZmqTcp>(
        host.name, host.port, wait, host.options["curve"], allow_remote
    );
}

inline Way make_pipe(const std::string& url) {
    auto [path, options] = path_of(url, {"wait"});
    return std::make_unique<Pipe>(path, wait_of(options, url));
}

inline Way make_sysv_queue(const std::string& url) {
    auto [path, options] = path_of(url, {"wait"});
    return std::make_unique<SysvQueue>(path, wait_of(options, url));
}

inline Way make_sysv_shm(const std::string& url) {
    auto [path, options] = path_of(url, {"wait"});
    return std::make_unique<SysvShm>(path, wait_of(options, url));
}

// A command line's words, quoted as a shell's are (POSIX 2.2: backslash, '...' and "...").
inline std::vector<std::string> words_of(std::string_view command, const std::string& url) {
    std::vector<std::string> words;
    std::string word;
    bool is_word = false;
    char quote = 0;
    for (std::size_t i = 0; i < command.size(); ++i) {
        const char c = command[i];
        const bool escapes = c == '\\' && quote != '\'';
        if (escapes && i + 1 < command.size()) {
            const char next = command[++i];
            if (quote == '"' && next != '"' && next != '\\') {
                word += c;
            }
            word += next;
            is_word = true;
        } else if (escapes) {
            refuse("a quote is not closed", url);
        } else if (quote != 0 ? c == quote : c == '\'' || c == '"') {
            quote = quote != 0 ? '\0' : c;
            is_word = true;
        } else if (quote == 0 && (c == ' ' || c == '\t' || c == '\n' || c == '\r')) {
            if (std::exchange(is_word, false)) {
                words.push_back(std::exchange(word, {}));
            }
        } else {
            word += c;
            is_word = true;
        }
    }
    if (quote != 0) {
        refuse("a quote is not closed", url);
    }
    if (is_word) {
        words.push_back(word);
    }
    return words;
}

// A command's words may hold any character, so the query stands before them, if at all.
inline Way make_stdio(const std::string& url) {
    std::string_view command = std::string_view(url).substr(std::string_view("stdio:").size());
    std::string_view query;
    if (command.starts_with("?")) {
        query = command.substr(1, command.find(' ') - 1);
        command.remove_prefix(std::min(command.size(), query.size() + 2));
    }
    auto words = words_of(command, url);
    const Wait wait = wait_of(options_of(query, {"wait"}, url), url);
    return std::make_unique<Stdio>(std::move(words), wait);
}

#ifdef IPC_BRIDGE_GRPC  // set by the target ipc_bridge::grpc
class GrpcSessions : public Sessions {
  public:
    explicit GrpcSessions(std::unique_ptr<Grpc> grpc) : grpc_(std::move(grpc)) {}

    std::unique_ptr<Caller> connect(const ConnectOptions& options) override {
        return grpc_->connect(options);
    }

    std::unique_ptr<Callee> serve(Service service, const ServeOptions& options) override {
        return grpc_->serve(std::move(service), options);
    }

  private:
    std::unique_ptr<Grpc> grpc_;
};

// Sessions that wait in gRPC's own threads, which always block.
inline void check_wait(const Options& options, const std::string& url) {
    const auto found = options.find("wait");
    if (found != options.end() && found->second != "block") {
        refuse("gRPC waits in threads of its own: wait can only be block", url);
    }
}

inline Way make_grpc_unix(const std::string& url) {
    const auto [path, options] = path_of(url, {"wait"});
    check_wait(options, url);
    return std::make_unique<GrpcSessions>(std::make_unique<GrpcUnix>(path));
}

inline Way make_grpc_tcp(const std::string& url) {
    auto [host, port, options] =
        host_of(url, {"wait", "allow_remote", "ca", "cert", "key", "name"});
    check_wait(options, url);
    const Keys keys{options["ca"], options["cert"], options["key"], options["name"]};
    return std::make_unique<GrpcSessions>(
        std::make_unique<GrpcTcp>(host, port, keys, flag_of(options, "allow_remote", url))
    );
}
#else
inline Way make_grpc_unix(const std::string& url) {
    throw Error(Status::UNIMPLEMENTED, "this program was built without gRPC", url);
}
inline Way make_grpc_tcp(const std::string& url) {
    return make_grpc_unix(url);
}
#endif

struct Scheme {
    std::string_view name;
    Way (*make)(const std::string& url);
};
inline constexpr Scheme schemes[] = {
    {"pipe", make_pipe},
    {"stdio", make_stdio},
    {"unix", make_unix},
    {"tcp", make_tcp},
    {"shm", make_shm},
    {"sysv-queue", make_sysv_queue},
    {"sysv-shm", make_sysv_shm},
    {"zmq+ipc", make_zmq_ipc},
    {"zmq+tcp", make_zmq_tcp},
    {"grpc+unix", make_grpc_unix},
    {"grpc+tcp", make_grpc_tcp},
};

// What a URL leads to. Throws Error: INVALID_ARGUMENT.
inline Way way_of(const std::string& url) {
    const auto colon = url.find(':');
    std::string known;
    for (const Scheme& scheme : schemes) {
        if (colon != std::string::npos && scheme.name == std::string_view(url).substr(0, colon)) {
            return scheme.make(url);
        }
        known += (known.empty() ? "" : ", ") + std::string(scheme.name);
    }
    refuse("unknown scheme; known are " + known, url);
}

}  // namespace endpoint

// The transport that a URL names. Throws Error: INVALID_ARGUMENT.
inline std::unique_ptr<Transport> make_transport(const std::string& url) {
    endpoint::Way way = endpoint::way_of(url);
    if (auto* transport = std::get_if<std::unique_ptr<Transport>>(&way)) {
        return std::move(*transport);
    }
    endpoint::refuse("this carries calls, not bytes", url);
}

// Reach the server at `url`, for a service of one's own; the options and errors are those of
// Client.
inline std::unique_ptr<Caller> dial(const std::string& url, const ConnectOptions& options = {}) {
    const endpoint::Way way = endpoint::way_of(url);
    if (const auto* sessions = std::get_if<std::unique_ptr<endpoint::Sessions>>(&way)) {
        return (*sessions)->connect(options);
    }
    return std::make_unique<Client>(*std::get<std::unique_ptr<Transport>>(way), options);
}

// As `dial`, for echo and stream.
inline Bridge connect(const std::string& url, const ConnectOptions& options = {}) {
    return Bridge(dial(url, options));
}

// Become the server of `url`; `run` what it returns. The options and errors are those of Server.
inline std::unique_ptr<Callee> listen(
    const std::string& url, Service service, const ServeOptions& options = {}
) {
    const endpoint::Way way = endpoint::way_of(url);
    if (const auto* sessions = std::get_if<std::unique_ptr<endpoint::Sessions>>(&way)) {
        return (*sessions)->serve(std::move(service), options);
    }
    return std::make_unique<Server>(
        *std::get<std::unique_ptr<Transport>>(way), std::move(service), options
    );
}

// As `listen`; the service is echo and stream unless given.
inline std::unique_ptr<Callee> serve(
    const std::string& url, Service service = make_service(), const ServeOptions& options = {}
) {
    return listen(url, std::move(service), options);
}

}  // namespace ipc_bridge

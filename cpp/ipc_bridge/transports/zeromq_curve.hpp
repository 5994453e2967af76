// CURVE for ZeroMQ (RFC 26): files of keys, and who may come.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <zmq.hpp>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/zeromq_socket.hpp>

namespace ipc_bridge::zeromq {

// Where libzmq asks whether a key may come (RFC 27).
inline constexpr char zap_address[] = "inproc://zeromq.zap.01";
// Z85 of 32 bytes (RFC 32).
inline constexpr std::size_t key_characters = 40;
// Of a file of keys: more clients than a server takes.
inline constexpr std::size_t keys_bytes_max = 1U << 20;

// False, unless the text is Z85 of 32 bytes. (Five characters can be more than 32
// bits: what is encoded again must be the same.)
inline bool decode(const std::string& text, std::string& raw) {
    raw.assign(key_characters / 5 * 4, '\0');
    if (text.size() != key_characters ||
        !::zmq_z85_decode(reinterpret_cast<std::uint8_t*>(raw.data()), text.c_str())) {
        return false;
    }
    char again[key_characters + 1];
    ::zmq_z85_encode(again, reinterpret_cast<const std::uint8_t*>(raw.data()), raw.size());
    return text == again;
}

// A file of CURVE keys (RFC 26), as `ipc-bridge curve-keys DIR` makes them for either end.
//
// A line is a word and a key: `secret` and `public` are one's own; at a client `server` is the
// server's public key, at a server each `client` is the public key of one that may come.
class CurveKeys {
  public:
    // Throws Error: NOT_FOUND, PERMISSION_DENIED unless it is ours alone, INVALID_ARGUMENT.
    explicit CurveKeys(std::string path_) : path(std::move(path_)) {
        std::istringstream lines(read(path));
        std::vector<std::string> secrets;
        std::vector<std::string> publics;
        std::vector<std::string> servers;
        for (std::string line; std::getline(lines, line);) {
            std::istringstream words(line);
            std::string word;
            std::string key;
            std::string more;
            words >> word >> key >> more;
            if (word.empty() || word.starts_with("#")) {
                continue;
            }
            auto* list = word == "secret"   ? &secrets
                         : word == "public" ? &publics
                         : word == "server" ? &servers
                         : word == "client" ? &clients
                                            : nullptr;
            std::string raw;
            if (!list || !decode(key, raw) || !more.empty()) {
                refuse("not a file of CURVE keys");
            }
            list->push_back(key);
        }
        if (secrets.size() != 1 || publics.size() != 1 || servers.size() > 1) {
            refuse("not a file of CURVE keys");
        }
        secret_ = secrets[0];
        public_ = publics[0];
        server_ = servers.empty() ? "" : servers[0];
    }

    const std::string path;
    std::vector<std::string> clients;

    // Throws Error: INVALID_ARGUMENT if they are a server's.
    void prepare_dealer(zmq::socket_t& dealer) const {
        if (server_.empty()) {
            refuse("a client's keys name its server");
        }
        dealer.set(zmq::sockopt::curve_secretkey, secret_);
        dealer.set(zmq::sockopt::curve_publickey, public_);
        dealer.set(zmq::sockopt::curve_serverkey, server_);
    }

    // Throws Error: INVALID_ARGUMENT if they are a client's.
    void prepare_router(zmq::socket_t& router) const {
        if (clients.empty()) {
            refuse("a server's keys name its clients");
        }
        router.set(zmq::sockopt::curve_server, true);
        router.set(zmq::sockopt::curve_secretkey, secret_);
        router.set(zmq::sockopt::zap_domain, "ipc-bridge");  // else nobody is asked
    }

  private:
    [[noreturn]] void refuse(const std::string& what) const {
        throw Error(Status::INVALID_ARGUMENT, what, path);
    }

    static std::string read(const std::string& path) {
        const Fd fd(checked(
            retrying([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC); }), "open", path
        ));
        struct stat info {};
        checked(::fstat(fd.get(), &info), "fstat", path);
        if (info.st_uid != ::geteuid() || (info.st_mode & 077) != 0) {
            throw Error(
                Status::PERMISSION_DENIED, "the file of keys is not ours alone (mode 0600)", path
            );
        }
        std::string text(keys_bytes_max, '\0');
        const ssize_t size = checked(
            retrying([&] { return ::read(fd.get(), text.data(), text.size()); }), "read", path
        );
        text.resize(static_cast<std::size_t>(size));
        return text;
    }

    std::string secret_;
    std::string public_;
    std::string server_;
};

// Answers libzmq, which asks over ZAP (RFC 27) whether a client with some key may come.
class KeyChecker {
  public:
    KeyChecker(zmq::context_t& context, const CurveKeys& keys)
        : socket(context, zmq::socket_type::rep) {
        for (const std::string& key : keys.clients) {
            decode(key, keys_.emplace_back());
        }
        socket.set(zmq::sockopt::linger, 0);
        socket.bind(zap_address);
    }

    zmq::socket_t socket;

    // All that is asked now.
    void answer() {
        zmq::message_t part;
        while (receive(socket, part)) {
            std::vector<std::string> asked{part.to_string()};
            while (part.more() && receive(socket, part)) {
                asked.push_back(part.to_string());
            }
            // version, request, domain, address, routing id, mechanism, credentials
            const bool known = asked.size() == 7 && asked[5] == "CURVE" &&
                               std::find(keys_.begin(), keys_.end(), asked[6]) != keys_.end();
            const std::string request = asked.size() > 1 ? asked[1] : "";
            const std::string parts[] = {
                "1.0", request, known ? "200" : "400", known ? "OK" : "unknown key", "", ""};
            std::vector<std::span<const std::byte>> buffers;
            for (const std::string& text : parts) {
                buffers.push_back(std::as_bytes(std::span(text)));
            }
            send(socket, buffers);
        }
    }

  private:
    std::vector<std::string> keys_;
};

}  // namespace ipc_bridge::zeromq

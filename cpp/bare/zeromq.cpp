// ZeroMQ, bare: DEALER to ROUTER over ipc at a path, or over TCP at tcp://127.0.0.1:*. Pick it for
// many clients at one socket, and other hosts one day; zeromq_req is its simplest form. The traps:
// there is no end of file (an empty message says it here), and a second bind takes a path over
// without a word, so look first.
//     g++ -std=c++20 -O2 zeromq.cpp -o zeromq -lzmq
//     ./zeromq serve /tmp/demo 64 block & sleep 1; ./zeromq ping /tmp/demo 64 block 100000
#include <sys/stat.h>

#include <zmq.hpp>

#include "rounds.hpp"

// A message is whole or not there: no loop, but to spin.
bool receive(zmq::socket_t& socket, zmq::message_t& message, int wait) {
    const auto flags = wait ? zmq::recv_flags::dontwait : zmq::recv_flags::none;
    while (!socket.recv(message, flags)) {
    }
    return message.size() != 0;
}

std::string endpoint(const std::string& address) {
    return address.find("://") != address.npos ? address : "ipc://" + address;
}

void serve(const rounds::Words& words) {
    if (access(words.address.c_str(), F_OK) == 0)
        rounds::fail("bind", std::strerror(EADDRINUSE));
    zmq::context_t context;
    zmq::socket_t router(context, zmq::socket_type::router);
    umask(0177);  // bind makes the file with this mode
    router.bind(endpoint(words.address));
    const std::string bound = router.get(zmq::sockopt::last_endpoint);
    rounds::say("ready " + bound.substr(bound.starts_with("ipc") ? std::strlen("ipc://") : 0));
    zmq::message_t client, message;  // what a client sent comes behind the client's name
    while (receive(router, client, words.wait) && receive(router, message, words.wait)) {
        router.send(client, zmq::send_flags::sndmore);
        router.send(message, zmq::send_flags::none);
    }
    unlink(words.address.c_str());  // libzmq leaves the file
}

void ping(const rounds::Words& words) {
    zmq::context_t context;
    zmq::socket_t dealer(context, zmq::socket_type::dealer);
    dealer.connect(endpoint(words.address));
    auto write = [&](auto bytes) { dealer.send(zmq::buffer(bytes), zmq::send_flags::none); };
    auto read = [&](auto& reply) {
        zmq::message_t message;
        const bool replied = receive(dealer, message, words.wait);
        std::memcpy(reply.data(), message.data(), std::min(reply.size(), message.size()));
        return replied;
    };
    rounds::measure(words, write, read);
    dealer.send(zmq::message_t(), zmq::send_flags::none);
}

int main(int argc, char** argv) try {
    return rounds::run(argc, argv, "ENDPOINT", serve, ping);
} catch (const zmq::error_t& error) {
    rounds::fail("zmq", error.what());
}

// ZeroMQ, bare: REQ to REP over ipc, its simplest form: send and receive take turns, by force. Pick
// it for a lesson. The trap: a peer that dies in between leaves the other waiting for ever, so real
// programs take DEALER and ROUTER (zeromq). An empty message is our end of file.
//     g++ -std=c++20 -O2 zeromq_req.cpp -o zeromq_req -lzmq
//     ./zeromq_req serve /tmp/demo 64 block & sleep 1; ./zeromq_req ping /tmp/demo 64 block 100000
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

void serve(const rounds::Words& words) {
    if (access(words.address.c_str(), F_OK) == 0)
        rounds::fail("bind", std::strerror(EADDRINUSE));
    zmq::context_t context;
    zmq::socket_t rep(context, zmq::socket_type::rep);
    umask(0177);  // bind makes the file with this mode
    rep.bind("ipc://" + words.address);
    rounds::say("ready " + words.address);
    zmq::message_t message;
    while (receive(rep, message, words.wait))
        rep.send(message, zmq::send_flags::none);
    unlink(words.address.c_str());  // libzmq leaves the file
}

void ping(const rounds::Words& words) {
    zmq::context_t context;
    zmq::socket_t req(context, zmq::socket_type::req);
    req.connect("ipc://" + words.address);
    auto write = [&](auto bytes) { req.send(zmq::buffer(bytes), zmq::send_flags::none); };
    auto read = [&](auto& reply) {
        zmq::message_t message;
        const bool replied = receive(req, message, words.wait);
        std::memcpy(reply.data(), message.data(), std::min(reply.size(), message.size()));
        return replied;
    };
    rounds::measure(words, write, read);
    req.send(zmq::message_t(), zmq::send_flags::none);
}

int main(int argc, char** argv) try {
    return rounds::run(argc, argv, "PATH", serve, ping);
} catch (const zmq::error_t& error) {
    rounds::fail("zmq", error.what());
}

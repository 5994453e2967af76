// Serves until SIGTERM or Ctrl-C:  thermostat-server URL
#include <atomic>
#include <csignal>
#include <iostream>
#include <string>

#include "service.hpp"
#include <ipc_bridge/endpoint.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/server.hpp>

namespace {

std::atomic<ipc_bridge::Callee*> running = nullptr;  // what a signal stops

void stop(int /*number*/) {
    if (ipc_bridge::Callee* server = running) {
        server->stop();
    }
}

int serve(const std::string& url) {
    try {
        const auto server = ipc_bridge::listen(url, thermostat::make_service());
        running = server.get();
        for (const int number : {SIGTERM, SIGINT}) {
            std::signal(number, stop);
        }
        std::cout << "ready " << server->url << std::endl;  // whoever starts us waits for this line
        server->run();
        running = nullptr;
    } catch (const ipc_bridge::Error& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::cerr << "usage: thermostat-server URL\n";
        return 1;
    }
    return serve(argv[1]);
}

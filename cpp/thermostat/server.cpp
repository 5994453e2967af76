// Serves until SIGTERM or Ctrl-C:  thermostat-server URL
#include <csignal>
#include <iostream>
#include <string>

#include "service.hpp"
#include <ipc_bridge/endpoint.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/server.hpp>

namespace {

ipc_bridge::Callee* running = nullptr;  // what a signal stops

void stop(int /*number*/) {
    running->stop();
}

int serve(const std::string& url) {
    // The server's threads inherit the mask: so the handler runs in this thread alone, and never
    // once the server is gone.
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    try {
        const auto server = ipc_bridge::listen(url, thermostat::make_service());
        running = server.get();
        std::signal(SIGTERM, stop);
        std::signal(SIGINT, stop);
        pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
        std::cout << "ready " << server->url << std::endl;  // whoever starts us waits for this line
        server->run();
        pthread_sigmask(SIG_BLOCK, &signals, nullptr);
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

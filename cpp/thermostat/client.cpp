// Calls each method once:  thermostat-client URL
#include <cstdio>
#include <iostream>
#include <string>

#include "service.hpp"
#include <ipc_bridge/endpoint.hpp>

namespace {

constexpr double timeout_s = 5.0;

// Edit this: the calls. A reply or item is a view that lives until the next.
void talk(ipc_bridge::Caller& client) {
    using namespace thermostat;

    const Bytes reply = client.call(set_target_method, bytes_of(pack(22.0)), timeout_s);
    const auto before = unpack<double>(reply);
    std::printf("the target was %.1f\n", before);

    const std::string request = pack(WatchRequest{4, 0.01});
    for (const Bytes item : client.call_stream(watch_method, bytes_of(request), timeout_s)) {
        const auto reading = unpack<Reading>(item);  // leaving the loop early cancels
        std::printf("%.2f, on the way to %.1f\n", reading.room, reading.target);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::cerr << "usage: thermostat-client URL\n";
        return 1;
    }
    try {
        talk(*ipc_bridge::dial(argv[1]));
    } catch (const ipc_bridge::Error& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
    return 0;
}

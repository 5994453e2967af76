// Calls each method once:  thermostat-client URL
#include <cstdio>
#include <iostream>
#include <string>

#include "service.hpp"
#include <ipc_bridge/endpoint.hpp>
#include <ipc_bridge/errors.hpp>

namespace {

constexpr double timeout_s = 5.0;

int call(const std::string& url) {
    try {
        const auto client = ipc_bridge::dial(url);
        thermostat::Thermostat thermostat(*client);
        const double before = thermostat.set_target(22.0, timeout_s);
        std::printf("the target was %.1f\n", before);
        for (const auto item : thermostat.watch(4, 0.01, timeout_s)) {
            const auto reading = thermostat::unpack<thermostat::Reading>(item);
            std::printf("%.2f, on the way to %.1f\n", reading.room, reading.target);
        }
    } catch (const ipc_bridge::Error& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::cerr << "usage: thermostat-client URL\n";
        return 1;
    }
    return call(argv[1]);
}

// endpoint: what a URL leads to (proto/url_vectors.json). Its Python twin is
// tests/test_endpoint.py.
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <ipc_bridge/endpoint.hpp>

using namespace ipc_bridge;
using Json = nlohmann::json;

TEST_CASE("endpoint: the vectors") {
    const auto root = std::filesystem::path(__FILE__).parent_path().parent_path().parent_path();
    const Json vectors = Json::parse(std::ifstream(root / "proto" / "url_vectors.json"));
    REQUIRE(vectors["vectors"].size() > 100);
    for (const Json& vector : vectors["vectors"]) {
        const std::string url = vector["url"].get<std::string>();
        CAPTURE(url);
        if (vector.contains("error")) {
            try {
                endpoint::way_of(url);
                FAIL("it is taken");
            } catch (const Error& error) {
                CHECK(error.status == Status::INVALID_ARGUMENT);
                CHECK(error.message.starts_with(vector["error"].get<std::string>()));
                CHECK(error.where == url);
            }
            continue;
        }
        CHECK_NOTHROW(endpoint::way_of(url));
        if (vector.contains("words")) {
            const std::string_view command = std::string_view(url).substr(url.find(':') + 1);
            CHECK(endpoint::words_of(command, url) == vector["words"]);
        } else if (vector.contains("path")) {
            const auto [path, options] = endpoint::path_of(url, {"wait"});
            CHECK(path == vector["path"]);
            CHECK(options == vector["options"]);
        } else {
            const endpoint::Host host = endpoint::host_of(url, {"wait", "allow_remote"});
            CHECK(host.name == vector["host"]);
            CHECK(host.port == vector["port"]);
            CHECK(host.options == vector["options"]);
        }
    }
}

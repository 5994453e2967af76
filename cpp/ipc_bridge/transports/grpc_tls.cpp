// The source of grpc_tls.hpp.
#include <cerrno>
#include <fstream>
#include <memory>
#include <string>

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/transports/grpc_tls.hpp>

namespace ipc_bridge::grpc_rpc {
namespace {

// A file of keys, whole. Throws Error.
std::string read_key(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text;
    std::getline(file, text, '\0');  // PEM has none: it is the whole file
    if (!file.is_open() || file.bad()) {
        throw SystemError("open", errno != 0 ? errno : ENOENT, path);
    }
    return text;
}

std::string read_if(const std::string& path) {
    return path.empty() ? std::string() : read_key(path);
}

}  // namespace

std::shared_ptr<grpc::ChannelCredentials> channel_credentials(const Keys& keys) {
    if (keys.ca.empty() && keys.cert.empty()) {
        return nullptr;
    }
    return grpc::SslCredentials({read_if(keys.ca), read_if(keys.key), read_if(keys.cert)});
}

std::shared_ptr<grpc::ServerCredentials> server_credentials(const Keys& keys) {
    if (keys.cert.empty()) {
        return nullptr;
    }
    grpc::SslServerCredentialsOptions secure(
        keys.ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                        : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
    );
    secure.pem_root_certs = read_if(keys.ca);
    secure.pem_key_cert_pairs = {{read_key(keys.key), read_key(keys.cert)}};
    return grpc::SslServerCredentials(secure);
}

}  // namespace ipc_bridge::grpc_rpc

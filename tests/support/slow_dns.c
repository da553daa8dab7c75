/* Preloaded into a process, makes names below slow.test take six seconds and then not exist, and
 * quick.test be this machine. Every other name goes its way. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

static int ends_with(const char *name, const char *end) {
    size_t length = strlen(name), wanted = strlen(end);
    return length >= wanted && !strcmp(name + length - wanted, end);
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    if (node && ends_with(node, ".slow.test")) {
        sleep(6);
        return EAI_NONAME;
    }
    return real(node && !strcmp(node, "quick.test") ? "127.0.0.1" : node, service, hints, found);
}

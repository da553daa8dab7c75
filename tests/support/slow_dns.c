/* Preloaded into a process, answers for some names as bad servers do:
 *
 *     *.slow.test     takes six seconds, and then does not exist
 *     quick.test      127.0.0.1
 *     inside.test     127.0.0.2
 *     mixed.test      127.0.0.2 and 127.0.0.1
 *     *.turning.test  127.0.0.1 and 127.0.0.2 in turn, at each look-up
 *
 * Every other name goes its way.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

static const char *const OUTSIDE = "127.0.0.1", *const INSIDE = "127.0.0.2";
static atomic_uint turns;

static int ends_with(const char *name, const char *end) {
    size_t length = strlen(name), wanted = strlen(end);
    return length >= wanted && !strcmp(name + length - wanted, end);
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    const char *name = node ? node : "";
    if (ends_with(name, ".slow.test")) {
        sleep(6);
        return EAI_NONAME;
    }
    if (!strcmp(name, "quick.test")) node = OUTSIDE;
    if (!strcmp(name, "inside.test") || !strcmp(name, "mixed.test")) node = INSIDE;
    if (ends_with(name, ".turning.test")) node = turns++ % 2 ? INSIDE : OUTSIDE;
    int error = real(node, service, hints, found);
    if (!error && !strcmp(name, "mixed.test")) {
        struct addrinfo *last = *found;
        while (last->ai_next) last = last->ai_next;
        error = real(OUTSIDE, service, hints, &last->ai_next);
    }
    return error;
}

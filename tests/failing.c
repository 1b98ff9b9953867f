/* A file system that fails when it is told to: preloaded, it stands between a program and libc.
 *
 * Below the folder FAILING_BELOW, calls of the kind FAILING_CALL (write, read, sync, rename or link)
 * fail with errno FAILING_ERRNO: from the FAILING_AT-th on, or, if FAILING_AFTER is set, once so many
 * bytes went through (the call that meets the limit is cut short, as by a full disk). FAILING_TIMES
 * calls fail, or all of them; with FAILING_LATE they do their work first.
 *
 * Not seen: what is written through mmap, C's FILE, io_uring or copy_file_range.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char below[PATH_MAX];
static const char *kind = "";
static int error, late;
static long at = 1, times = -1, after = -1, calls, failures;

static long number(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}

__attribute__((constructor)) static void configure(void) {
  const char *folder = getenv("FAILING_BELOW");
  if (!folder || !realpath(folder, below)) return;
  kind = getenv("FAILING_CALL");
  error = number("FAILING_ERRNO", EIO);
  at = number("FAILING_AT", 1);
  times = number("FAILING_TIMES", -1);
  after = number("FAILING_AFTER", -1);
  late = number("FAILING_LATE", 0);
}

static int is_below(const char *path) {
  size_t length = strlen(below);
  return length && !strncmp(path, below, length) && (path[length] == '/' || !path[length]);
}

static int file_below(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_below(path);
}

/* The folder counts, so that it does not matter whether the name is there. */
static int name_below(int folder, const char *name) {
  char path[PATH_MAX], real[PATH_MAX];
  if (name[0] == '/' || folder == AT_FDCWD)
    snprintf(path, sizeof path, "%s", name);
  else
    snprintf(path, sizeof path, "/proc/self/fd/%d/%s", folder, name);
  char *slash = strrchr(path, '/');
  if (slash) slash[slash == path] = 0;
  return realpath(slash ? path : ".", real) && is_below(real);
}

/* How many of `bytes` may pass, or -1 if the call is to fail. */
static ssize_t allowed(const char *call, size_t bytes) {
  if (strcmp(call, kind)) return bytes;
  pthread_mutex_lock(&lock);
  ssize_t passing = bytes;
  if (after >= 0) {
    if ((size_t)after < bytes) passing = after ? after : -1;
    after -= passing > 0 ? passing : 0;
  } else if (++calls >= at) {
    passing = -1;
  }
  if (passing < 0 && times >= 0 && failures++ >= times) passing = bytes;
  pthread_mutex_unlock(&lock);
  return passing;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Fails instead of `call`, or after it. */
#define FAIL(call)       \
  do {                   \
    if (late) (void)!call; \
    errno = error;       \
    return -1;           \
  } while (0)

#define SIMPLE(group, inside, name, declaration, arguments)                         \
  int name declaration {                                                            \
    if ((inside) && allowed(group, 0) < 0) FAIL(REAL(name) arguments);              \
    return REAL(name) arguments;                                                    \
  }

#define BYTES(group, name, pointer, extra, rest)                                    \
  ssize_t name(int file, pointer buffer, size_t size extra) {                       \
    ssize_t passing = file_below(file) ? allowed(group, size) : (ssize_t)size;      \
    if (passing < 0) FAIL(REAL(name)(file, buffer, size rest));                     \
    return REAL(name)(file, buffer, passing rest);                                  \
  }

/* Cut short, only the first vector passes. */
#define VECTORS(group, name, extra, rest)                                           \
  ssize_t name(int file, const struct iovec *vectors, int count extra) {            \
    size_t size = 0;                                                                \
    for (int i = 0; i < count; i++) size += vectors[i].iov_len;                     \
    ssize_t passing = file_below(file) ? allowed(group, size) : (ssize_t)size;      \
    if (passing < 0) FAIL(REAL(name)(file, vectors, count rest));                   \
    if ((size_t)passing == size) return REAL(name)(file, vectors, count rest);      \
    struct iovec first = vectors[0];                                                \
    if (first.iov_len > (size_t)passing) first.iov_len = passing;                   \
    return REAL(name)(file, &first, 1 rest);                                        \
  }

#define COMMA ,
BYTES("write", write, const void *, , )
BYTES("write", pwrite, const void *, COMMA off_t offset, COMMA offset)
BYTES("write", pwrite64, const void *, COMMA off64_t offset, COMMA offset)
BYTES("read", read, void *, , )
BYTES("read", pread, void *, COMMA off_t offset, COMMA offset)
BYTES("read", pread64, void *, COMMA off64_t offset, COMMA offset)
VECTORS("write", writev, , )
VECTORS("write", pwritev, COMMA off_t offset, COMMA offset)
VECTORS("write", pwritev64, COMMA off64_t offset, COMMA offset)
VECTORS("read", readv, , )
VECTORS("read", preadv, COMMA off_t offset, COMMA offset)
VECTORS("read", preadv64, COMMA off64_t offset, COMMA offset)

SIMPLE("sync", file_below(file), fsync, (int file), (file))
SIMPLE("sync", file_below(file), fdatasync, (int file), (file))
SIMPLE("rename", name_below(AT_FDCWD, to), rename, (const char *from, const char *to), (from, to))
SIMPLE("rename", name_below(folder, to), renameat,
       (int old, const char *from, int folder, const char *to), (old, from, folder, to))
SIMPLE("rename", name_below(folder, to), renameat2,
       (int old, const char *from, int folder, const char *to, unsigned flags),
       (old, from, folder, to, flags))
SIMPLE("link", name_below(AT_FDCWD, to), link, (const char *from, const char *to), (from, to))
SIMPLE("link", name_below(folder, to), linkat,
       (int old, const char *from, int folder, const char *to, int flags),
       (old, from, folder, to, flags))

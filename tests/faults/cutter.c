/* Cuts a process short, or makes its disk fail, at one exact system call.
 *
 * Preloaded (LD_PRELOAD) before libc, it counts every call that changes something under one folder (calls of all threads and of all forked children
 * together: the counter lives in shared memory) and at call number `cut` does what `mode` says. Disarmed, it only passes calls on.
 * tests/faults/test_cutter.py compares its count with strace's, so that no system call can go past it unnoticed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, KILL = 1, TORN = 2, FAIL_FROM = 3, FAIL_ONCE = 4, KILL_SELF = 5 };
enum { GROWS = 1, OTHER = 2 }; /* what a full disk refuses, and what it doesn't */

struct control {
    int armed, mode, error;
    long cut, count;
    pid_t owner; /* KILL_SELF spares this process: only its children are hit */
    char root[PATH_MAX];
};
static struct control *shared;

__attribute__((constructor)) static void start(void) {
    if (!shared) shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void cutter_arm(const char *root, long cut, int mode, int error) {
    start();
    snprintf(shared->root, sizeof shared->root, "%s", root);
    shared->cut = cut, shared->mode = mode, shared->error = error, shared->count = 0, shared->owner = getpid();
    __sync_synchronize();
    shared->armed = 1;
}
void cutter_disarm(void) { shared->armed = 0; }
long cutter_count(void) { return shared->count; }

static int below(const char *path) {
    size_t length = strlen(shared->root);
    return strncmp(path, shared->root, length) == 0 && (path[length] == '/' || path[length] == 0);
}
static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    if (!shared || !shared->armed || fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return below(path);
}
static int path_below(int dir, const char *name) {
    char path[PATH_MAX];
    if (!shared || !shared->armed || !name) return 0;
    if (name[0] == '/') return below(name);
    if (dir != AT_FDCWD) return fd_below(dir);
    return getcwd(path, sizeof path) && below(path);
}
static void die(void) {
    if (shared->mode == KILL_SELF)
        syscall(SYS_kill, getpid(), SIGKILL);
    else
        syscall(SYS_kill, 0, SIGKILL); /* the whole group: what a dead machine leaves */
    for (;;) pause();
}

/* Returns 1 if the call must fail with errno set, 2 if it is to be torn, 0 if it goes on. */
static int hit(int relevant, int kind) {
    if (!relevant) return 0;
    if (shared->mode == KILL_SELF && getpid() == shared->owner) return 0;
    long number = __sync_add_and_fetch(&shared->count, 1);
    switch (shared->mode) {
    case KILL:
    case KILL_SELF:
        if (number == shared->cut) die();
        return 0;
    case TORN:
        return number == shared->cut ? 2 : 0;
    case FAIL_FROM:
        if (number < shared->cut || (shared->error == ENOSPC && kind != GROWS)) return 0;
        errno = shared->error;
        return 1;
    case FAIL_ONCE:
        if (number != shared->cut) return 0;
        errno = shared->error;
        return 1;
    }
    return 0;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
/* A call that can't be torn is done, and the process ends right after it. */
#define GUARD(relevant, kind, call, failure) \
    do { \
        int what = hit(relevant, kind); \
        if (what == 1) return failure; \
        if (what == 2) { (void)!(call); die(); } \
        return call; \
    } while (0)
/* A torn write: half of its bytes. */
#define GUARD_DATA(fd, whole, half) \
    do { \
        int what = hit(fd_below(fd), GROWS); \
        if (what == 1) return -1; \
        if (what == 2) { (void)!(half); die(); } \
        return whole; \
    } while (0)

ssize_t write(int fd, const void *data, size_t size) { REAL(write); GUARD_DATA(fd, real(fd, data, size), real(fd, data, size / 2)); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); GUARD_DATA(fd, real(fd, data, size, at), real(fd, data, size / 2, at)); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); GUARD_DATA(fd, real(fd, data, size, at), real(fd, data, size / 2, at)); }
ssize_t writev(int fd, const struct iovec *parts, int count) { REAL(writev); GUARD_DATA(fd, real(fd, parts, count), real(fd, parts, count / 2)); }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) { REAL(pwritev); GUARD_DATA(fd, real(fd, parts, count, at), real(fd, parts, count / 2, at)); }
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags) { REAL(pwritev2); GUARD_DATA(fd, real(fd, parts, count, at, flags), real(fd, parts, count / 2, at, flags)); }
ssize_t sendfile(int out, int in, off_t *at, size_t size) { REAL(sendfile); GUARD_DATA(out, real(out, in, at, size), real(out, in, at, size < 128 ? size / 2 : 64)); }
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) { REAL(sendfile64); GUARD_DATA(out, real(out, in, at, size), real(out, in, at, size < 128 ? size / 2 : 64)); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) { REAL(copy_file_range); GUARD_DATA(out, real(in, from, out, to, size, flags), real(in, from, out, to, size / 2, flags)); }

int fsync(int fd) { REAL(fsync); GUARD(fd_below(fd), OTHER, real(fd), -1); }
int fdatasync(int fd) { REAL(fdatasync); GUARD(fd_below(fd), OTHER, real(fd), -1); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); GUARD(fd_below(fd), GROWS, real(fd, size), -1); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); GUARD(fd_below(fd), GROWS, real(fd, size), -1); }
int fallocate(int fd, int mode, off_t at, off_t size) { REAL(fallocate); GUARD(fd_below(fd), GROWS, real(fd, mode, at, size), -1); }
int posix_fallocate(int fd, off_t at, off_t size) { REAL(posix_fallocate); GUARD(fd_below(fd), GROWS, real(fd, at, size), errno); }
int fchmod(int fd, mode_t mode) { REAL(fchmod); GUARD(fd_below(fd), OTHER, real(fd, mode), -1); }
int chmod(const char *path, mode_t mode) { REAL(chmod); GUARD(path_below(AT_FDCWD, path), OTHER, real(path, mode), -1); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); GUARD(path_below(AT_FDCWD, path), GROWS, real(path, mode), -1); }
int mkdirat(int dir, const char *path, mode_t mode) { REAL(mkdirat); GUARD(path_below(dir, path), GROWS, real(dir, path, mode), -1); }
int unlink(const char *path) { REAL(unlink); GUARD(path_below(AT_FDCWD, path), OTHER, real(path), -1); }
int unlinkat(int dir, const char *path, int flags) { REAL(unlinkat); GUARD(path_below(dir, path), OTHER, real(dir, path, flags), -1); }
int rmdir(const char *path) { REAL(rmdir); GUARD(path_below(AT_FDCWD, path), OTHER, real(path), -1); }
int remove(const char *path) { REAL(remove); GUARD(path_below(AT_FDCWD, path), OTHER, real(path), -1); }
int truncate(const char *path, off_t size) { REAL(truncate); GUARD(path_below(AT_FDCWD, path), GROWS, real(path, size), -1); }
int rename(const char *from, const char *to) { REAL(rename); GUARD(path_below(AT_FDCWD, to) || path_below(AT_FDCWD, from), OTHER, real(from, to), -1); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); GUARD(path_below(b, to) || path_below(a, from), OTHER, real(a, from, b, to), -1); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { REAL(renameat2); GUARD(path_below(b, to) || path_below(a, from), OTHER, real(a, from, b, to, flags), -1); }
int link(const char *from, const char *to) { REAL(link); GUARD(path_below(AT_FDCWD, to), GROWS, real(from, to), -1); }
int linkat(int a, const char *from, int b, const char *to, int flags) { REAL(linkat); GUARD(path_below(b, to), GROWS, real(a, from, b, to, flags), -1); }
int symlink(const char *from, const char *to) { REAL(symlink); GUARD(path_below(AT_FDCWD, to), GROWS, real(from, to), -1); }
int symlinkat(const char *from, int dir, const char *to) { REAL(symlinkat); GUARD(path_below(dir, to), GROWS, real(from, dir, to), -1); }

/* Opening counts where it makes or empties a file. */
#define MUTATES(flags) (((flags) & (O_CREAT | O_TRUNC)) || ((flags) & O_TMPFILE) == O_TMPFILE)
#define MODE mode_t mode = 0; if (MUTATES(flags)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...) { REAL(open); MODE GUARD(MUTATES(flags) && path_below(AT_FDCWD, path), GROWS, real(path, flags, mode), -1); }
int open64(const char *path, int flags, ...) { REAL(open64); MODE GUARD(MUTATES(flags) && path_below(AT_FDCWD, path), GROWS, real(path, flags, mode), -1); }
int openat(int dir, const char *path, int flags, ...) { REAL(openat); MODE GUARD(MUTATES(flags) && path_below(dir, path), GROWS, real(dir, path, flags, mode), -1); }
int openat64(int dir, const char *path, int flags, ...) { REAL(openat64); MODE GUARD(MUTATES(flags) && path_below(dir, path), GROWS, real(dir, path, flags, mode), -1); }
int creat(const char *path, mode_t mode) { REAL(creat); GUARD(path_below(AT_FDCWD, path), GROWS, real(path, mode), -1); }
FILE *fopen(const char *path, const char *mode) { REAL(fopen); GUARD(mode[0] != 'r' && path_below(AT_FDCWD, path), GROWS, real(path, mode), NULL); }
FILE *fopen64(const char *path, const char *mode) { REAL(fopen64); GUARD(mode[0] != 'r' && path_below(AT_FDCWD, path), GROWS, real(path, mode), NULL); }

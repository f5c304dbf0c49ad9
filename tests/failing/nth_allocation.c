/* Lets the n-th large allocation of memory fail, as on a machine that has no more. Loaded by LD_PRELOAD.

   FAIL_LARGE  how many bytes are large
   FAIL_BELOW  a folder (its real path): allocations count from the first file that is opened below it, so that what
               is loaded before the work begins does not
   FAIL_AT     n, from 1; 0: none fails
   FAIL_COUNT  a file outside the folder, to which each process appends a byte an allocation

   An allocation fails as it would: malloc, calloc, realloc, aligned ones and anonymous mmap with ENOMEM. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static int (*really_open)(const char *, int, ...);
static void *(*really_map)(void *, size_t, int, int, int, off64_t);
static size_t large;
static volatile int begun;

static __attribute__((constructor)) void find(void)
{
	really_open = dlsym(RTLD_NEXT, "open64");
	really_map = dlsym(RTLD_NEXT, "mmap64");
	large = getenv("FAIL_LARGE") ? (size_t)atol(getenv("FAIL_LARGE")) : 0;
}

/* Whether this allocation is the n-th of all processes. */
static int fails(size_t size)
{
	if (!begun || !large || size < large)
		return 0;
	const char *count = getenv("FAIL_COUNT"), *at = getenv("FAIL_AT");
	int saved = errno, fd = count ? really_open(count, O_WRONLY | O_APPEND | O_CLOEXEC) : -1;
	if (fd < 0)
		return 0;
	off_t number = write(fd, ".", 1) == 1 ? lseek(fd, 0, SEEK_CUR) : 0;
	close(fd);
	errno = saved;
	return at && number == atol(at);
}

#define FAIL_IF(size, value) \
	do { \
		if (fails(size)) { \
			errno = ENOMEM; \
			return value; \
		} \
	} while (0)

void *malloc(size_t size)
{
	FAIL_IF(size, NULL);
	return __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
	FAIL_IF(count * size, NULL);
	return __libc_calloc(count, size);
}

void *realloc(void *old, size_t size)
{
	FAIL_IF(size, NULL);
	return __libc_realloc(old, size);
}

void *memalign(size_t alignment, size_t size)
{
	FAIL_IF(size, NULL);
	return __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
	return memalign(alignment, size);
}

int posix_memalign(void **made, size_t alignment, size_t size)
{
	return (*made = memalign(alignment, size)) ? 0 : ENOMEM;
}

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset)
{
	if (flags & MAP_ANONYMOUS && protection & PROT_WRITE && !(flags & MAP_STACK))
		FAIL_IF(size, MAP_FAILED);
	return really_map(at, size, protection, flags, fd, offset);
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
	__attribute__((alias("mmap64")));

static void begin(const char *path)
{
	const char *folder = getenv("FAIL_BELOW");
	if (folder && !begun && strstr(path, folder) == path)
		begun = 1;
}

int open64(const char *path, int flags, ...)
{
	va_list more;
	va_start(more, flags);
	mode_t mode = va_arg(more, mode_t);
	va_end(more);
	begin(path);
	return really_open(path, flags, mode);
}

int open(const char *path, int flags, ...) __attribute__((alias("open64")));

// A heap for tensors that ends each of them at memory that may not be touched: reading or writing past the end
// stops the process, and so does any access after free. Loaded before libc; PyTorch allocates by posix_memalign.
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { kPage = 4096, kCanary = 0xA5 };
static const size_t kRegion = (size_t)1 << 40;  // addresses only; none is used twice
static _Atomic(char*) next;
static char* region;

extern void __libc_free(void*);

__attribute__((constructor)) static void reserve(void) {
  region = mmap(NULL, kRegion, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) abort();
  next = region;
}

static void stop(const char* message) {
  if (write(2, message, strlen(message)) < 0) _exit(98);
  abort();
}

// one page of bookkeeping, the tensor, then a page that is never opened
int posix_memalign(void** to, size_t alignment, size_t size) {
  if (region == NULL) reserve();
  const size_t rounded = (size + alignment - 1) & -alignment, pages = (rounded + kPage - 1) & -(size_t)kPage;
  char* const first = atomic_fetch_add(&next, pages + 2 * kPage);
  if (first + pages + 2 * kPage > region + kRegion) return ENOMEM;
  if (mprotect(first, pages + kPage, PROT_READ | PROT_WRITE) != 0) return ENOMEM;
  char* const tensor = first + kPage + pages - rounded;
  memset(first + kPage, kCanary, pages);
  ((size_t*)first)[0] = size;
  *to = tensor;
  return 0;
}

void free(void* pointer) {
  char* const tensor = pointer;
  if (region == NULL || tensor < region || tensor >= region + kRegion) return __libc_free(pointer);
  char* first = (char*)((uintptr_t)tensor & -(uintptr_t)kPage) - kPage;
  const size_t size = ((size_t*)first)[0];
  for (char* c = first + kPage; c < tensor; ++c)
    if ((unsigned char)*c != kCanary) stop("guard: written before the start of a tensor\n");
  for (char* c = tensor + size; ((uintptr_t)c & (kPage - 1)) != 0; ++c)
    if ((unsigned char)*c != kCanary) stop("guard: written past the end of a tensor\n");
  char* last = (char*)(((uintptr_t)(tensor + size) + kPage - 1) & -(uintptr_t)kPage);
  if (madvise(first, last - first, MADV_DONTNEED) != 0 || mprotect(first, last - first, PROT_NONE) != 0)
    stop("guard: cannot close a tensor\n");
}

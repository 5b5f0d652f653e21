/* A stand-in for the CUDA driver: calls that matter are written to a file, a line each; nothing runs. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WRITE(...)                                     \
  do {                                                 \
    FILE *f = fopen(getenv("CUDA_CALLS"), "a");        \
    fprintf(f, __VA_ARGS__);                           \
    fclose(f);                                         \
  } while (0)

static __thread void *current;

static int fails(const char *name) {
  const char *chosen = getenv("CUDA_FAILS");
  return chosen && !strcmp(chosen, name) ? 718 : 0;
}

int cuGetErrorName(int code, const char **text) { return *text = "CUDA_ERROR_OF_A_TEST", 0; }
int cuGetErrorString(int code, const char **text) { return *text = "an error of a test", 0; }
int cuCtxGetCurrent(void **context) { return *context = current, 0; }
int cuCtxSetCurrent(void *context) {
  WRITE("context %p\n", context);
  return current = context, 0;
}
int cuDeviceGet(int *device, int index) { return *device = 16 + index, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(intptr_t)device, 0; }
int cuModuleLoadData(void **module, const char *image) {
  *module = (void *)8;
  return memcmp(image, "\x7f""ELF", 4) ? 200 : fails("cuModuleLoadData");
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  WRITE("function %s\n", name);
  return *function = (void *)9, 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  WRITE("attribute %d of %p is %d\n", attribute, function, value);
  return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned j, unsigned k,
                   unsigned shared, void *stream, void **arguments, void **extra) {
  /* sizes of the arguments, a digit each */
  WRITE("launch %p (%u %u %u) (%u %u %u) %u %p %p in %p:", function, x, y, z, threads, j, k, shared, stream,
        (void *)extra, current);
  for (const char *s = getenv("CUDA_SIZES"); *s; s++, arguments++)
    WRITE(" %lld", *s == '8' ? *(long long *)*arguments : (long long)*(int *)*arguments);
  WRITE("\n");
  return fails("cuLaunchKernel");
}

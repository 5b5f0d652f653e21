/* Three operations on lists of tensors, registered through torch's stable C ABI; the start of kernels, the order of
   pointers and copies of rows, which Python calls.

   describe(Tensor[] tensors, Tensor(a!) rows) -> ()
     One row of int64 per tensor: its spec, as `read_pointers` compares it.

   read_pointers(Tensor[] tensors, Tensor spec_index, Tensor specs, Tensor(a!) pointers) -> ()
     Compares each of n tensors with its row of `specs` and writes its data pointer. The last of the n + 1 numbers of
     `pointers` becomes -1, or 2 * i for the first tensor i that differs from its spec, 2 * i + 1 if its elements lie
     outside of its storage.

   new_tensors(Tensor spec_index, Tensor specs, Tensor(a!) pointers) -> Tensor[]
     Makes a tensor for each row of `specs` that `spec_index` names, with memory of its own, and writes its data
     pointer. The list ends before the first tensor for which there is no memory. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t StableIValue;
typedef void *Handle;
typedef int32_t Error;
typedef void (*Kernel)(StableIValue *, uint64_t, uint64_t);

/* The functions of torch and of Python in use. Python resolves each by its name, so no library has to be linked. */
#define FUNCTIONS(X)                                                                    \
  X(aoti_torch_library_init_fragment, (const char *, const char *, uint32_t, Handle *)) \
  X(aoti_torch_library_init_impl, (const char *, const char *, const char *, uint32_t, Handle *)) \
  X(aoti_torch_library_def, (Handle, const char *))                                     \
  X(torch_library_impl, (Handle, const char *, Kernel, uint64_t))                       \
  X(torch_list_size, (Handle, size_t *))                                                \
  X(torch_list_get_item, (Handle, size_t, StableIValue *)) /* the caller owns the item */ \
  X(torch_delete_list, (Handle))                                                        \
  X(torch_new_list_reserve_size, (size_t, Handle *))                                    \
  X(torch_list_push_back, (Handle, StableIValue)) /* the list owns the item */            \
  X(aoti_torch_empty_strided,                                                           \
    (int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, Handle *))   \
  X(aoti_torch_delete_tensor_object, (Handle))                                          \
  X(aoti_torch_get_data_ptr, (Handle, void **))                                         \
  X(aoti_torch_dtype_int64, (void))                                                     \
  X(aoti_torch_device_type_cpu, (void))                                                 \
  X(aoti_torch_get_dtype, (Handle, int32_t *))                                          \
  X(aoti_torch_get_layout, (Handle, int32_t *))                                         \
  X(aoti_torch_get_device_type, (Handle, int32_t *))                                    \
  X(aoti_torch_get_device_index, (Handle, int32_t *))                                   \
  X(aoti_torch_get_dim, (Handle, int64_t *))                                            \
  X(aoti_torch_get_sizes, (Handle, int64_t **))                                         \
  X(aoti_torch_get_strides, (Handle, int64_t **))                                       \
  X(aoti_torch_get_storage_offset, (Handle, int64_t *))                                 \
  X(aoti_torch_get_storage_size, (Handle, int64_t *))                                   \
  X(PyGILState_Ensure, (void))                                                          \
  X(PyGILState_Release, (int))

#define POINTER(name, arguments) static Error(*name) arguments;
FUNCTIONS(POINTER)

const char *const function_names[] = {
#define NAME(name, arguments) #name,
    FUNCTIONS(NAME)
#undef NAME
};
const int n_functions = sizeof function_names / sizeof *function_names;

void resolve(void *const *addresses) {
#define RESOLVE(name, arguments) name = (Error(*) arguments) * addresses++;
  FUNCTIONS(RESOLVE)
#undef RESOLVE
}

/* Columns of a row: `SPAN` bytes from the first element to the last, elements of `ITEM` bytes, then `SIZES` and
   `STRIDES`, each as many numbers as the tensor has dimensions. */
enum { DTYPE, LAYOUT, DEVICE_TYPE, DEVICE, DIM, SPAN, ITEM, SIZES };

static int64_t *data_of(Handle tensor) {
  void *data = NULL;
  aoti_torch_get_data_ptr(tensor, &data);
  return data;
}

/* Size of a tensor of `dim` dimensions in one of them; 0 for a tensor of another number of dimensions. */
static int64_t size_of(Handle tensor, int64_t dim, int64_t k) {
  int64_t found, *sizes;
  if (aoti_torch_get_dim(tensor, &found) || found != dim || aoti_torch_get_sizes(tensor, &sizes)) return 0;
  return sizes[k];
}

/* Whether a tensor is a list or table of int64 in host memory, one number after the other, all within its storage:
   anybody may call an operation. */
static int holds_numbers(Handle tensor) {
  int32_t dtype, device;
  int64_t dim, offset, bytes, *sizes, *strides, n = 1;
  if (aoti_torch_get_dtype(tensor, &dtype) || dtype != aoti_torch_dtype_int64()) return 0;
  if (aoti_torch_get_device_type(tensor, &device) || device != aoti_torch_device_type_cpu()) return 0;
  if (aoti_torch_get_dim(tensor, &dim)) return 0;
  if (aoti_torch_get_sizes(tensor, &sizes) || aoti_torch_get_strides(tensor, &strides)) return 0;
  for (int64_t k = dim; k-- > 0; n *= sizes[k])
    if (sizes[k] != 1 && strides[k] != n) return 0;
  if (aoti_torch_get_storage_offset(tensor, &offset) || aoti_torch_get_storage_size(tensor, &bytes)) return 0;
  return n <= bytes / 8 - offset;
}

/* A row of a table, if it is there and complete; else NULL. */
static const int64_t *row_at(const int64_t *table, int64_t n_rows, int64_t width, int64_t k) {
  const int64_t *row = table + k * width;
  return k < 0 || k >= n_rows || width < SIZES || row[DIM] < 0 || row[DIM] > (width - SIZES) / 2 ? NULL : row;
}

static size_t length_of(Handle list) {
  size_t n = 0;
  return torch_list_size(list, &n) ? 0 : n;
}

/* A tensor of a list, to be deleted by the caller; NULL if torch does not hand it over. */
static Handle tensor_at(Handle list, size_t i) {
  StableIValue item;
  return torch_list_get_item(list, i, &item) ? NULL : (Handle)item;
}

/* Deletes a list and its tensors from the first on that has not been deleted yet. */
static void delete_list(Handle list, size_t first) {
  for (size_t i = first, n = length_of(list); i < n; i++) aoti_torch_delete_tensor_object(tensor_at(list, i));
  torch_delete_list(list);
}

static int describe_one(Handle t, int64_t *row, int64_t width) {
  int32_t number;
  int64_t *sizes, *strides;
  if (aoti_torch_get_dtype(t, &number)) return 1;
  row[DTYPE] = number;
  if (aoti_torch_get_layout(t, &number)) return 1;
  row[LAYOUT] = number;
  if (aoti_torch_get_device_type(t, &number)) return 1;
  row[DEVICE_TYPE] = number;
  if (aoti_torch_get_device_index(t, &number)) return 1;
  row[DEVICE] = number;
  if (aoti_torch_get_dim(t, row + DIM)) return 1;
  if (aoti_torch_get_sizes(t, &sizes) || aoti_torch_get_strides(t, &strides)) return 1;
  if (!row[DIM]) return 0;
  if (2 * row[DIM] > width - SIZES) return 1;
  memcpy(row + SIZES, sizes, 8 * row[DIM]);
  memcpy(row + SIZES + row[DIM], strides, 8 * row[DIM]);
  return 0;
}

static int differs(Handle t, const int64_t *spec) {
  int32_t number;
  int64_t dim, *numbers;
  if (aoti_torch_get_dtype(t, &number) || number != spec[DTYPE]) return 1;
  if (aoti_torch_get_layout(t, &number) || number != spec[LAYOUT]) return 1;
  if (aoti_torch_get_device_type(t, &number) || number != spec[DEVICE_TYPE]) return 1;
  if (aoti_torch_get_device_index(t, &number) || number != spec[DEVICE]) return 1;
  if (aoti_torch_get_dim(t, &dim) || dim != spec[DIM]) return 1;
  if (!dim) return 0;
  if (aoti_torch_get_sizes(t, &numbers) || memcmp(numbers, spec + SIZES, 8 * dim)) return 1;
  return aoti_torch_get_strides(t, &numbers) || memcmp(numbers, spec + SIZES + dim, 8 * dim);
}

static int outside(Handle t, const int64_t *spec) {
  int64_t offset, bytes;
  if (!spec[SPAN]) return 0;
  if (aoti_torch_get_storage_offset(t, &offset) || aoti_torch_get_storage_size(t, &bytes)) return 1;
  return offset * spec[ITEM] + spec[SPAN] > bytes;
}

static void describe(StableIValue *stack, uint64_t n_in, uint64_t n_out) {
  Handle list = (Handle)stack[0], rows = (Handle)stack[1];
  int64_t *row = data_of(rows), width = size_of(rows, 2, 1);
  size_t i = 0, n = length_of(list);
  int fits = size_of(rows, 2, 0) >= (int64_t)n && width >= SIZES && holds_numbers(rows);
  for (; fits && i < n; i++, row += width) {
    Handle tensor = tensor_at(list, i);
    if (!tensor || describe_one(tensor, row, width)) row[DIM] = -1;
    aoti_torch_delete_tensor_object(tensor);
  }
  delete_list(list, i);
  aoti_torch_delete_tensor_object(rows);
}

static void read_pointers(StableIValue *stack, uint64_t n_in, uint64_t n_out) {
  Handle list = (Handle)stack[0], index = (Handle)stack[1], table = (Handle)stack[2], result = (Handle)stack[3];
  const int64_t *spec_index = data_of(index), *specs = data_of(table);
  int64_t n_rows = size_of(table, 2, 0), width = size_of(table, 2, 1);
  int64_t *pointers = data_of(result), found = -1;
  size_t i = 0, n = length_of(list);
  int fits = size_of(index, 1, 0) == (int64_t)n && size_of(result, 1, 0) > (int64_t)n;
  fits = fits && holds_numbers(index) && holds_numbers(table) && holds_numbers(result);
  /* the interpreter's lock, once: a tensor that only Python owns takes it whenever a reference to it is deleted */
  int lock = PyGILState_Ensure();
  for (; fits && i < n && found < 0; i++) {
    Handle tensor = tensor_at(list, i);
    const int64_t *spec = row_at(specs, n_rows, width, spec_index[i]);
    if (!tensor || !spec || differs(tensor, spec)) found = 2 * (int64_t)i;
    else if (outside(tensor, spec)) found = 2 * (int64_t)i + 1;
    else pointers[i] = (int64_t)(intptr_t)data_of(tensor);
    aoti_torch_delete_tensor_object(tensor);
  }
  delete_list(list, i);
  PyGILState_Release(lock);
  if (fits) pointers[n] = found; /* otherwise the status stays as it was */
  aoti_torch_delete_tensor_object(index);
  aoti_torch_delete_tensor_object(table);
  aoti_torch_delete_tensor_object(result);
}

static void new_tensors(StableIValue *stack, uint64_t n_in, uint64_t n_out) {
  Handle index = (Handle)stack[0], table = (Handle)stack[1], result = (Handle)stack[2], list = NULL;
  const int64_t *spec_index = data_of(index), *specs = data_of(table);
  int64_t n_rows = size_of(table, 2, 0), width = size_of(table, 2, 1);
  int64_t *pointers = data_of(result), n = 0;
  int fits = holds_numbers(index) && holds_numbers(table) && holds_numbers(result);
  if (fits && size_of(index, 1, 0) == size_of(result, 1, 0)) n = size_of(result, 1, 0);
  torch_new_list_reserve_size(n, &list);
  for (int64_t i = 0; i < n; i++) {
    const int64_t *spec = row_at(specs, n_rows, width, spec_index[i]);
    Handle tensor;
    if (!spec ||
        aoti_torch_empty_strided(spec[DIM], spec + SIZES, spec + SIZES + spec[DIM], (int32_t)spec[DTYPE],
                                 (int32_t)spec[DEVICE_TYPE], (int32_t)spec[DEVICE], &tensor))
      break;
    pointers[i] = (int64_t)(intptr_t)data_of(tensor);
    torch_list_push_back(list, (StableIValue)tensor);
  }
  aoti_torch_delete_tensor_object(index);
  aoti_torch_delete_tensor_object(table);
  aoti_torch_delete_tensor_object(result);
  stack[0] = (StableIValue)list;
}

/* `read_pointers` where the memory of a tensor does not hold its elements as they are: they are conjugated or
   negated when they are read, or all zero. torch's own fallback would hand over a copy that is gone after the call.
   The status stays as it was. */
static void refuse_pointers(StableIValue *stack, uint64_t n_in, uint64_t n_out) {
  delete_list((Handle)stack[0], 0);
  for (int k = 1; k < 4; k++) aoti_torch_delete_tensor_object((Handle)stack[k]);
}

static Error implement(const char *name_space, const char *key, const char *name, Kernel kernel, uint64_t version) {
  Handle library; /* never freed: a registration lasts as long as the process */
  Error error = aoti_torch_library_init_impl(name_space, key, __FILE__, __LINE__, &library);
  return error ? error : torch_library_impl(library, name, kernel, version);
}

/* Registers all operations; `version` is that of the ABI, as torch encodes its own. Returns 0 if all is well. */
int register_operations(const char *name_space, uint64_t version) {
  static const char *const lazy[] = {"Negative", "Conjugate", "ZeroTensor"};
  Handle library;
  Error error = aoti_torch_library_init_fragment(name_space, __FILE__, __LINE__, &library);
  if (!error) error = aoti_torch_library_def(library, "describe(Tensor[] tensors, Tensor(a!) rows) -> ()");
  if (!error)
    error = aoti_torch_library_def(
        library, "read_pointers(Tensor[] tensors, Tensor spec_index, Tensor specs, Tensor(a!) pointers) -> ()");
  if (!error)
    error = aoti_torch_library_def(
        library, "new_tensors(Tensor spec_index, Tensor specs, Tensor(a!) pointers) -> Tensor[]");
  if (!error) error = implement(name_space, "CompositeExplicitAutograd", "describe", describe, version);
  if (!error) error = implement(name_space, "CompositeExplicitAutograd", "new_tensors", new_tensors, version);
  if (!error) error = implement(name_space, "CompositeExplicitAutograd", "read_pointers", read_pointers, version);
  for (int k = 0; k < 3 && !error; k++)
    error = implement(name_space, lazy[k], "read_pointers", refuse_pointers, version);
  return error;
}

typedef struct {
  void (*run)(void *);
  void *launch;
} pass_t;

/* Runs passes and then moves counters on, in one call: no signal is handled by Python in between. */
void run_passes(const pass_t *passes, int64_t n_passes, int64_t *const *counters, int64_t n_counters) {
  for (int64_t k = 0; k < n_passes; k++) passes[k].run(passes[k].launch);
  for (int64_t k = 0; k < n_counters; k++) ++*counters[k];
}

/* The functions of the CUDA driver that launches call, and the context of their device. */
typedef struct {
  int (*get_context)(void **);
  int (*set_context)(void *);
  int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
  void *context;
} driver_t;

typedef struct {
  void *function;
  unsigned programs, threads, shared;
  void **arguments;
} kernel_launch_t;

/* Launches kernels of a GPU one after the other, in one call as well. Returns 0, or the number of the first error. */
int launch_kernels(const driver_t *driver, void *stream, const kernel_launch_t *launches, int64_t n) {
  void *current = NULL; /* a thread has no context before its first work on a device */
  int error = driver->get_context(&current);
  if (!error && !current) error = driver->set_context(driver->context);
  for (const kernel_launch_t *l = launches; l < launches + n && !error; l++)
    error = driver->launch(l->function, l->programs, 1, 1, l->threads, 1, 1, l->shared, stream, l->arguments, NULL);
  return error;
}

/* Copies pointers in an order, and returns the bitwise or of those at some positions: of their alignment. */
int64_t order_pointers(const int64_t *from, const int64_t *order, int64_t n, int64_t *to) {
  int64_t bits = 0;
  for (int64_t k = 0; k < n; k++) bits |= to[k] = from[order[k]];
  return bits;
}

/* Copies rows that lie one after another to an address each. */
void copy_rows(const char *from, int64_t bytes, int64_t n, char *const *to) {
  for (int64_t k = 0; k < n; k++) memcpy(to[k], from + k * bytes, bytes);
}
